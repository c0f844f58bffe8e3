"""Error-compensated rounding of one matrix to trits, by the inputs that it meets (GPTQ).

The rows of a matrix are rounded one after the other, and what that does to the outputs, the rows
that come later make up for as far as the inputs that belong to them go along with it (Frantar et
al. 2022, section 3.3). Here the inputs are those of the converted model, and the outputs wanted are
those of the model that it is made from, with its own inputs (as in GPTAQ, Li et al. 2025).

Shapes: I inputs, O outputs, R rows of activations, P planes of trits, G groups of inputs with a
scale of their own; N diagonal blocks of the second moments, K inputs each, so that N K is I and
the zeros that fill it up to a multiple of 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import formats
import quantize
from quantize import PackedWeight

LARGEST = 6144  # inputs of a diagonal block
STEP = 128  # inputs, at most, whose errors are passed on together
DAMPING = 0.05  # of the mean of the diagonal, added to it
TRIES = 4  # of damping, each twice the one before, until the factor is finite
RIDGE = 0.03  # towards the scales of the sweep, where they are fitted again
ROUNDS = 10  # of the fit of one scale for a matrix
OUTPUTS = 4096  # at a time

precisely = functools.partial(jax.default_matmul_precision, "float32")


class Moments(NamedTuple):
    """Sums over rows of activations x, each times its weight; x' are those of the other model.

    squares: float32 [N, K, K], of x x^T
    shifts: float32 [N, K, K], of x (x' - x)^T
    """

    squares: jax.Array
    shifts: jax.Array

    @classmethod
    def zeros(cls, inputs: int) -> "Moments":
        blocks = diagonal_blocks(inputs)
        size = (inputs + -inputs % 4) // blocks
        return cls(*(jnp.zeros((blocks, size, size), jnp.float32) for _ in range(2)))


def diagonal_blocks(inputs: int) -> int:
    """N: as few blocks of whole packing blocks as keep one within LARGEST; Grok-1's 32768: 8."""
    padded = inputs + -inputs % 4
    packing = 4 * quantize.packing_block(inputs)
    fitting = (n for n in range(1, padded + 1) if padded % (n * packing) == 0)
    return next(n for n in fitting if padded // n <= LARGEST or padded // n == packing)


@functools.partial(jax.jit, donate_argnums=0)
def add(moments: Moments, x: jax.Array, other: jax.Array, weights: jax.Array) -> Moments:
    """The moments with those of rows x [R, I] and of the other model's [R, I]; weights [R]."""
    blocks, size, _ = moments.squares.shape

    def split(x):
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, blocks * size - x.shape[1])])
        return x.reshape(-1, blocks, size)

    x, other = split(x), split(other)
    with precisely():
        products = functools.partial(jnp.einsum, "rni,rnj->nij", x * weights[:, None, None])
        return Moments(moments.squares + products(x), moments.shifts + products(other - x))


class Rounded(NamedTuple):
    """A matrix in trits, and how it was chosen.

    shift: of the share of the difference between the models' inputs that is made up for, 0 to 1
    damping: that it took, infinite where all inputs were taken to be independent
    losses: float32 [3], held-out squared error of the plain fit, of the sweep, and of the sweep
      with scales fitted again, over the energy of the outputs; but for what no weight changes
    """

    weight: PackedWeight
    shift: jax.Array
    damping: float
    losses: jax.Array


def round_matrix(w: jax.Array, plain: PackedWeight, format: str, seen: Moments, held: Moments):
    """w [I, O] in a packed format, Rounded: of three ways, the one best on what is held out.

    plain: the form that no activations were asked for
    seen, held: moments of the rows to fit and of other rows, to choose by
    """
    w = w.astype(jnp.float32)
    for i in range(TRIES + 1):
        damping = DAMPING * 2.0**i if i < TRIES else float("inf")
        made = _round(w, plain, seen, held, damping, format=format)
        if bool(jnp.isfinite(made.losses).all()):
            break
    return made._replace(damping=damping)


@functools.partial(jax.jit, static_argnames="format")
def _round(w, plain, seen, held, damping, *, format):
    inputs, outputs = w.shape
    blocks, size, _ = seen.squares.shape
    planes, group = formats.FORMATS[format].fit or (1, None)
    groups = 1 if group is None else formats.number_of_groups(inputs, group) // blocks
    whole = formats.FORMATS[format].fit is None

    def split(w):
        padded = jnp.pad(w, [(0, blocks * size - inputs), (0, 0)])
        return padded.reshape(blocks, size, outputs)

    with precisely():
        seen, held = (_normalised(m) for m in (seen, held))
        h = _damped(seen.squares, damping)
        factor = inverse_factor(h)  # [N, K, K]
        split_w = split(w)
        wanted = _product(seen.shifts, split_w)
        moved = _product(factor.mT, _product(factor, wanted))
        along = jnp.sum(moved * _product(held.shifts, split_w))
        length = jnp.sum(moved * _product(held.squares, moved))
        shift = jnp.clip(along / jnp.maximum(length, 1e-30), 0, 1)
        target = split_w + shift * moved

        importance = 1 / jnp.square(jnp.diagonal(factor, axis1=1, axis2=2))  # [N, K]
        importance /= importance.min()
        scales = None
        if whole:
            scales = _one_scale(target, importance)
        elif group is None:
            scales = _scales(target.reshape(1, -1, outputs), importance.reshape(1, -1), planes)
        trits, scales = _sweep(target, factor, importance, scales, planes, groups)
        again = _fit_again(target, h, trits, scales, groups, group is None, whole)

    def packed(scales):
        scale, multipliers = scales[0, :, :1], None
        if not whole:
            scale, multipliers = formats.as_multiples(scales)
        return _pack(trits[..., :inputs, :], scale, multipliers)

    ways = plain, packed(scales), packed(again)
    with precisely():
        energy = jnp.sum(split_w * _product(held.squares, split_w))

        def loss(way):
            off = split_w - split(quantize.dequantize(way))
            changed = _product(held.squares, off) + 2 * _product(held.shifts, split_w)
            return jnp.sum(off * changed) / jnp.maximum(energy, 1e-30)

        losses = jnp.stack([loss(way) for way in ways])
    best = jnp.argmin(losses)
    return Rounded(jax.tree.map(lambda *x: lax.select_n(best, *x), *ways), shift, damping, losses)


_product = functools.partial(jnp.einsum, "nij,njo->nio")


def _normalised(moments: Moments) -> Moments:
    """Moments whose squares have a mean of 1."""
    mean = jnp.mean(jnp.diagonal(moments.squares, axis1=1, axis2=2))
    return jax.tree.map(lambda x: x / jnp.maximum(mean, 1e-30), moments)


def _damped(squares: jax.Array, damping) -> jax.Array:
    """Squares [N, K, K] with a share of each block's mean on its diagonal; infinite: only that."""
    diagonal = jnp.diagonal(squares, axis1=1, axis2=2)
    mean = jnp.maximum(diagonal.mean(axis=1), 1e-6)[:, None, None]
    eye = jnp.eye(squares.shape[1])
    alone = jnp.isinf(damping)
    return jnp.where(alone, squares * eye, squares) + eye * mean * jnp.where(alone, 1, damping)


def inverse_factor(h: jax.Array) -> jax.Array:
    """Upper triangular u [N, K, K] with u^T u the inverse of positive definite h [N, K, K].

    h with its rows and columns in reverse has a lower Cholesky factor; turned round, that is an
    upper one, r, with r r^T = h, and u is its inverse.
    """
    r = jnp.linalg.cholesky(h[:, ::-1, ::-1])[:, ::-1, ::-1]
    eye = jnp.broadcast_to(jnp.eye(h.shape[1]), h.shape)
    return jax.scipy.linalg.solve_triangular(r, eye, lower=False)


# --- Scales ---------------------------------------------------------------------------------------


def _scales(w, importance, planes: int):  # [G, n, O], [G, n] -> [P, G, O]
    """The scales that fit best, each weight's squared error times its importance."""
    importance = jnp.broadcast_to(importance[..., None], w.shape)
    below, importance = lax.sort((-abs(w), importance), dimension=1, num_keys=1)
    return formats.fit_scales(-below, importance, planes)


def _one_scale(w, importance):  # [N, K, O], [N, K] -> [1, 1, O], all the same
    """The scale of a whole matrix: trits and scale in turns, each the best for the other."""
    x, importance = abs(w), importance[..., None]

    def turn(_, scale):
        kept = jnp.where(x > scale / 2, importance, 0)
        return jnp.sum(kept * x) / jnp.maximum(jnp.sum(kept), 1e-30)

    scale = lax.fori_loop(0, ROUNDS, turn, 1.5 * x.mean())
    return jnp.broadcast_to(scale, (1, 1, w.shape[-1]))


def _values(w, scales):
    """w [O] as the nearest sums of trits times scales [P, O]: their values, and trits [P, O]."""
    x, sign = abs(w), jnp.sign(w)
    if len(scales) == 1:
        trits = jnp.where(2 * x > scales[0], sign, 0)[None]
    else:
        trits = sign * jnp.stack(formats.nearest(x, *scales))
    return jnp.sum(trits * scales, axis=0), trits


# --- The sweep ------------------------------------------------------------------------------------


def _sweep(target, factor, importance, scales, planes: int, groups: int):
    """Trits [P, N K, O] of a target [N, K, O], and their scales [P, G, O].

    scales: [P, 1, O] of all inputs; None to fit those of each group when its turn comes
    groups: of a diagonal block
    """
    blocks, size, outputs = target.shape
    step = size // groups
    if scales is not None:
        step = max(n for n in range(1, STEP + 1) if size % n == 0)

    def block(parts):
        target, factor, importance = parts

        def advance(w, i):
            at = i * step
            rows = lax.dynamic_slice_in_dim(w, at, step)
            onward = lax.dynamic_slice_in_dim(factor, at, step)  # [step, K]
            inner = lax.dynamic_slice_in_dim(onward, at, step, axis=1)
            own = scales
            if scales is None:
                some = lax.dynamic_slice_in_dim(importance, at, step)
                own = _scales(rows[None], some[None], planes)
            trits, errors = _within(rows, inner, own[:, 0])
            later = jnp.arange(size) >= at + step
            w -= jnp.where(later, onward, 0).T @ errors
            return w, (trits, own)

        _, (trits, own) = lax.scan(advance, target, jnp.arange(size // step))
        # [steps, P, step, O] and [steps, P, 1, O]
        return trits.swapaxes(0, 1).reshape(planes, size, outputs), own[:, :, 0].swapaxes(0, 1)

    trits, own = lax.map(block, (target, factor, importance))  # [N, P, K, O], [N, P, steps, O]
    trits = trits.swapaxes(0, 1).reshape(planes, blocks * size, outputs)
    if scales is None:
        scales = own.swapaxes(0, 1).reshape(planes, -1, outputs)
    return trits, scales


def _within(rows, factor, scales):
    """Trits [P, n, O] of rows [n, O], and what is left of each for later rows: [n, O]."""

    def advance(rows, j):
        w = rows[j]
        value, trits = _values(w, scales)
        error = (w - value) / factor[j, j]
        later = jnp.where(jnp.arange(len(rows)) > j, factor[j], 0)
        return rows - later[:, None] * error, (trits, error)

    _, (trits, errors) = lax.scan(advance, rows, jnp.arange(len(rows)))
    return trits.swapaxes(0, 1), errors


# --- Scales for given trits -----------------------------------------------------------------------


def _fit_again(target, h, trits, scales, groups: int, of_columns: bool, whole: bool):
    """The scales [P, G, O] with which given trits have the least error in what was seen.

    Least squares with all of h between the groups of a diagonal block, and a ridge towards the
    scales that there are.
    """
    blocks, size, outputs = target.shape
    planes = len(trits)
    n = size // groups
    t = trits.reshape(planes, blocks, groups, n, outputs).transpose(1, 0, 2, 3, 4)

    def block(parts):
        h, target, t = parts  # [K, K], [K, O], [P, g, n, O]

        def against(q, g):  # A of all groups with this one: [P, g, O]
            columns = lax.dynamic_slice_in_dim(h, g * n, n, axis=1)
            product = (columns @ t[q, g]).reshape(groups, n, outputs)
            return jnp.einsum("pgno,gno->pgo", t, product)

        pairs = [(q, g) for q in range(planes) for g in range(groups)]
        index = jnp.array(pairs)
        a = lax.map(lambda at: against(*at), index)  # [Pg, P, g, O]
        b = jnp.einsum("pgno,gno->pgo", t, (h @ target).reshape(groups, n, outputs))
        return a.reshape(len(pairs), len(pairs), outputs), b.reshape(len(pairs), outputs)

    a, b = lax.map(block, (h, target, t))  # [N, Pg, Pg, O], [N, Pg, O]
    old = scales.reshape(planes, -1, groups, outputs).swapaxes(0, 1)
    if of_columns:
        a, b = a.sum(0, keepdims=True), b.sum(0, keepdims=True)
    if whole:
        a, b = (jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape) for x in (a, b))
    old = old.reshape(b.shape)
    ridge = RIDGE * jnp.diagonal(a, axis1=1, axis2=2).swapaxes(1, 2) + 1e-6  # [N, Pg, O]
    a = jnp.moveaxis(a, -1, 1) + jnp.moveaxis(ridge, -1, 1)[..., None] * jnp.eye(a.shape[1])
    b = jnp.moveaxis(b + ridge * old, -1, 1)
    new = jnp.linalg.solve(a, b[..., None])[..., 0]  # [N, O, Pg]
    new = jnp.moveaxis(new, 1, -1).reshape(-1, planes, groups, outputs).swapaxes(0, 1)
    new = new.reshape(scales.shape)
    return jnp.where(new > 0, new, scales)


def _pack(trits, scales, multipliers):
    """The packed form of trits [P, I, O]; scales and multipliers as from `formats.as_multiples`."""
    trits = trits.astype(jnp.int8)
    if multipliers is None:
        return quantize.pack(trits[0], scales)
    return quantize.pack(trits, scales, jnp.moveaxis(multipliers, -1, -3).swapaxes(-1, -2))
