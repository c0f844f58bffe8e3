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
DESCENTS = 4  # turns of scales and trits after the sweep
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


@jax.jit
def energy(w: jax.Array, squares: jax.Array) -> jax.Array:
    """Sum of the squared outputs of w [I, O] for rows with these moments [N, K, K]."""
    blocks, size, _ = squares.shape
    w = jnp.pad(w.astype(jnp.float32), [(0, blocks * size - w.shape[0]), (0, 0)])
    with precisely():
        of = over_outputs(
            lambda w: jnp.sum(w * _product(squares, w), axis=(0, 1)), w.reshape(blocks, size, -1)
        )
    return of.sum()


class Rounded(NamedTuple):
    """A matrix in trits, and how it was chosen.

    shift: of the share of the difference between the models' inputs that is made up for, 0 to 1
    damping: that it took, infinite where all inputs were taken to be independent
    losses: float32 [3], held-out squared error of the plain fit, of the sweep, and of what descent
      makes of that, over the energy of the outputs; but for what no weight changes
    """

    weight: PackedWeight
    shift: jax.Array
    damping: float
    losses: jax.Array


def round_matrix(w: jax.Array, plain: PackedWeight, format: str, seen: Moments, held: Moments):
    """w [I, O] in a packed format, Rounded: of three ways, the one best on what is held out.

    plain: the form that no activations were asked for
    seen, held: moments of the rows to fit and of other rows, to choose by, if there are any
    """
    w = w.astype(jnp.float32)
    if not bool(held.squares.any()):
        held = seen
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
    fit = formats.FORMATS[format].fit
    whole, (planes, group) = fit is None, fit or (1, None)
    groups = 1 if group is None else formats.number_of_groups(inputs, group) // blocks

    def split(w):  # [I, ...] -> [N, K, ...]
        padded = jnp.pad(w, [(0, blocks * size - inputs), (0, 0)])
        return padded.reshape(blocks, size, -1)

    with precisely():
        seen, held = (_normalised(m) for m in (seen, held))
        h = _damped(seen.squares, damping)
        factor = inverse_factor(h)  # [N, K, K]

        def moves(w):
            moved = _product(factor.mT, _product(factor, _product(seen.shifts, w)))
            along = jnp.sum(moved * _product(held.shifts, w), axis=(0, 1))
            return moved, along, jnp.sum(moved * _product(held.squares, moved), axis=(0, 1))

        moved, along, length = over_outputs(moves, split(w))
        shift = jnp.clip(along.sum() / jnp.maximum(length.sum(), 1e-30), 0, 1)
        target = split(w) + shift * moved

        importance = 1 / jnp.square(jnp.diagonal(factor, axis1=1, axis2=2))  # [N, K]
        importance /= importance.min()
        # [1, 1, O] of a matrix; else made below
        scales = _one_scale(target, importance) if whole else jnp.zeros((1, 1, outputs))

        def sweep(target, scales):
            if group is None and not whole:
                flat = target.reshape(1, inputs + -inputs % 4, -1)
                scales = _scales(flat, importance.reshape(1, -1), planes)
            given = scales if group is None else None
            trits, scales = _sweep(target, factor, importance, given, planes, groups)
            return trits.astype(jnp.int8), scales

        def fit_again(trits, scales):
            equations = functools.partial(_equations, h, groups=groups, of_columns=group is None)
            if not whole:

                def solved(target, trits, scales):
                    return _solved(*equations(target, trits), scales)

                return over_outputs(solved, target, trits, scales)
            a, b = over_outputs(equations, target, trits)  # one equation of all outputs
            total = (jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape) for x in (a, b))
            return _solved(*total, scales)

        def descend(_, found):
            trits, scales = found
            scales = fit_again(trits, scales)
            return over_outputs(functools.partial(_descend, h), target, trits, scales), scales

        swept = over_outputs(sweep, target, scales)
        trits, scales = lax.fori_loop(0, DESCENTS, descend, swept)
        descended = trits, fit_again(trits, scales)

        def packed(trits, scales):
            scale, multipliers = scales[0, :, :1], None
            if not whole:
                scale, multipliers = formats.as_multiples(scales)
            return pack(trits[:, :inputs], scale, multipliers)

        ways = plain, packed(*swept), packed(*descended)

        shifted = over_outputs(functools.partial(_product, held.shifts), split(w))

        def loss(off, shifted):
            changed = _product(held.squares, off) + 2 * shifted
            return jnp.sum(off * changed, axis=(0, 1))

        def lost(way):
            return over_outputs(loss, split(w - quantize.dequantize(way)), shifted).sum()

        losses = jnp.stack([lost(way) for way in ways])
        losses /= jnp.maximum(energy(w, held.squares), 1e-30)
    best = jnp.argmin(losses)
    return Rounded(jax.tree.map(lambda *x: lax.select_n(best, *x), *ways), shift, damping, losses)


def over_outputs(f, *arrays):
    """f of arrays [..., O], whose results are, too, for some of the outputs at a time."""
    outputs = arrays[0].shape[-1]
    size = max(n for n in range(1, min(outputs, OUTPUTS) + 1) if outputs % n == 0)
    if size == outputs:
        return f(*arrays)
    tiles = [jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -2, 0) for x in arrays]
    done = lax.map(lambda tiles: f(*tiles), tuple(tiles))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1), done)


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


# --- Descent --------------------------------------------------------------------------------------


def _descend(h, target, trits, scales):
    """Trits int8 [P, N K, O], each in its turn the best one as all others are.

    Coordinate descent on the error of the outputs, (W - W') H (W - W'), given the scales [P, G, O].
    (As in QuantEase, Behdin et al. 2023.)
    """
    blocks, size, outputs = target.shape
    planes, all_groups, _ = scales.shape
    groups = max(1, all_groups // blocks)
    n = size // groups  # inputs with one scale
    step = max(m for m in range(1, STEP + 1) if n % m == 0)
    scales = jnp.broadcast_to(
        scales.reshape(planes, -1, groups, outputs), (planes, blocks, groups, outputs)
    )

    def block(parts):
        h, target, trits, scales = parts  # [K, K], [K, O], [P, K, O], [P, g, O]
        rows = trits.reshape(planes, groups, n, outputs) * scales[:, :, None]
        value = rows.sum(axis=0).reshape(size, outputs)

        def advance(gap, i):  # gap: h @ (target - value)
            at = i * step
            own = scales[:, at // n]
            columns = lax.dynamic_slice_in_dim(h, at, step, axis=1)
            inner, mine, left = (
                lax.dynamic_slice_in_dim(x, at, step) for x in (columns, value, gap)
            )

            def one(left, j):
                wanted = mine[j] + left[j] / inner[j, j]
                new, trits = _values(wanted, own)
                change = new - mine[j]
                return left - inner[:, j, None] * change, (trits, change)

            _, (trits, change) = lax.scan(one, left, jnp.arange(step))
            return gap - columns @ change, trits.swapaxes(0, 1).astype(jnp.int8)

        _, trits = lax.scan(advance, h @ (target - value), jnp.arange(size // step))
        return trits.swapaxes(0, 1).reshape(planes, size, outputs)  # of [steps, P, step, O]

    trits = trits.reshape(planes, blocks, size, outputs).swapaxes(0, 1)
    trits = lax.map(block, (h, target, trits, scales.swapaxes(0, 1)))
    return trits.swapaxes(0, 1).reshape(planes, blocks * size, outputs)


# --- Scales for given trits -----------------------------------------------------------------------


def _equations(h, target, trits, groups: int, of_columns: bool):
    """Least squares for the scales of given trits [P, I, O], a scale for each plane and group.

    With all of h between the groups of a diagonal block; of columns, those of all blocks are one.
    Returns A [N, P g, P g, O] and b [N, P g, O], where g groups are in a block.
    """
    blocks, size, outputs = target.shape
    planes = len(trits)
    t = trits.astype(jnp.float32).reshape(planes, blocks, groups, -1, outputs).swapaxes(0, 1)

    def block(parts):
        h, target, t = parts  # [K, K], [K, O], [P, g, n, O]

        def sums(x):  # of all trits with x [K, O]: [P g, O]
            found = jnp.einsum("pgno,gno->pgo", t, x.reshape(groups, -1, outputs))
            return found.reshape(planes * groups, outputs)

        def of_group(at):
            plane, group = at
            n = size // groups
            columns = lax.dynamic_slice_in_dim(h, group * n, n, axis=1)
            return sums(columns @ t[plane, group])

        pairs = jnp.array([(p, g) for p in range(planes) for g in range(groups)])
        return lax.map(of_group, pairs), sums(h @ target)

    a, b = lax.map(block, (h, target, t))
    return (a.sum(0, keepdims=True), b.sum(0, keepdims=True)) if of_columns else (a, b)


def _solved(a, b, scales):
    """The scales [P, G, O] that solve the equations, with a ridge towards those that there are."""
    planes, outputs = len(scales), scales.shape[-1]
    old = scales.reshape(planes, len(b), -1, outputs).swapaxes(0, 1).reshape(b.shape)
    ridge = RIDGE * jnp.moveaxis(jnp.diagonal(a, axis1=1, axis2=2), -1, 1) + 1e-6  # [N, P g, O]
    a = jnp.moveaxis(a, -1, 1) + jnp.moveaxis(ridge, -1, 1)[..., None] * jnp.eye(a.shape[1])
    new = jnp.linalg.solve(a, jnp.moveaxis(b + ridge * old, -1, 1)[..., None])[..., 0]
    new = jnp.moveaxis(new, 1, -1).reshape(len(b), planes, -1, outputs)
    new = new.swapaxes(0, 1).reshape(scales.shape)
    return jnp.where(new > 0, new, scales)


def pack(trits, scales, multipliers) -> PackedWeight:
    """Trits int8 [..., P, I, O] packed; scales, multipliers as from `formats.as_multiples`."""
    if multipliers is None:
        return quantize.pack(trits[..., 0, :, :], scales)
    return quantize.pack(trits, scales, jnp.moveaxis(multipliers, -1, -3).swapaxes(-1, -2))
