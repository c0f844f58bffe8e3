"""How weights are made: from floats, in training, and what each format is called.

To add a format, write its quantizer and give it a line in FORMATS; then all commands know it, and
files, meshes and products need no more, as long as its weights are of the types of `quantize.py`.
A scale for each row of the inputs, say, is a `QuantizedWeight` with `scales` [..., I, 1].

Shape letters as in `quantize.py`; n inputs of a group. Functions take NumPy and JAX arrays, and
give what they take; sums in NumPy are float64.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import quantize
from quantize import LEVELS, PackedWeight, QuantizedWeight, Weight

EPSILON = 1e-5  # added to gamma, so that an all-zero matrix divides by something
GROUPS = (64, 128, 256)  # inputs that share a scale
ROUNDS = 12  # of the alternating least squares for two planes; the error falls by 1 % after 4
MAX_INPUTS = 1 << 17  # then sums of products of codes and int8 stay within int32


class Format(NamedTuple):
    """What a parameter can become.

    quantize: float32 [..., I, O] -> weight; under `jax.eval_shape`, its shapes
    train: latent floats [..., I, O] -> what training multiplies with: the same values, whose
      gradients are those of the latent floats
    packed: whether that weight is a `PackedWeight`
    fit: of `fit`, (planes, inputs of a group or None for all), if that is the quantizer
    """

    quantize: Callable
    train: Callable
    packed: bool
    fit: tuple[int, int | None] | None = None


def _without_gradient(w):
    """w; TypeError where a derivative is asked for, which would be silently that of scales only."""
    return _constant(w) if isinstance(w, jax.Array) else w


@jax.custom_jvp
def _constant(w):
    return w


@_constant.defjvp
def _(primals, tangents):
    raise TypeError(
        f"a derivative for {primals[0].dtype} {list(primals[0].shape)}, weights that are rounded "
        "to codes, which have none; use formats.FORMATS[name].train, whose gradient goes "
        "straight through, or differentiate with respect to the scales of what was made"
    )


# --- Absmean --------------------------------------------------------------------------------------


def absmean_scale(w):
    """gamma = mean |W|, float32 [..., 1, 1]. (BitNet b1.58, section 2, equation 3)"""
    return abs(w.astype(np.float32)).mean(axis=(-2, -1), keepdims=True)


def round_to_trits(w, gamma):
    """clip(round(W / (gamma + eps)), -1, 1), in the dtype of w.

    (BitNet b1.58, section 2, equations 1 and 2.)
    """
    return (w / (gamma + EPSILON)).round().clip(-1, 1)


def ternarize(w) -> PackedWeight:
    """Absmean ternary form of a float matrix `[..., I, O]`: one scale for the matrix."""
    w = _without_gradient(w)
    gamma = absmean_scale(w)
    return quantize.pack(round_to_trits(w.astype(np.float32), gamma).astype(np.int8), gamma)


def fake_ternarize(w: jax.Array) -> QuantizedWeight:
    """Absmean ternary form of a float matrix in training: its gradient is that of the identity."""
    gamma = absmean_scale(w)
    return _seen_in_training(w, round_to_trits(w.astype(jnp.float32), gamma), gamma, trits=True)


def _seen_in_training(w: jax.Array, codes, scales, trits: bool) -> QuantizedWeight:
    scales = lax.stop_gradient(scales.astype(jnp.float32))
    scaled = w.astype(jnp.float32) / jnp.maximum(scales, 1e-30)
    codes = quantize.straight_through(scaled, codes.astype(jnp.float32))
    return QuantizedWeight(codes, scales, trits)


def as_in_training(w: jax.Array, to: Callable) -> QuantizedWeight:
    """What any quantizer `to` makes of w, with the gradient of the identity."""
    made = to(lax.stop_gradient(w))
    trits = isinstance(made, PackedWeight) and made.multipliers is None
    return _seen_in_training(w, quantize.codes_of(made), made.scales, trits)


# --- Least squares --------------------------------------------------------------------------------
#
# Magnitudes x [..., n, O] of weights, and how many there are of each: counts, like x or 1.


def fit(w, planes: int, group: int | None) -> PackedWeight:
    """The ternary form of floats `[..., I, O]` with the least squared error.

    planes: 1, the exact optimum; or 2, whose sum has nine levels, by alternating least squares
    group: inputs that share a scale, see `quantize.group_size`; None: all inputs of an output

    A group's scales are multiples of the output's: integers up to 127 in all, which resolves them
    to 0.4 % of the largest. (One plane whose groups are whole columns has a scale as it is.)
    """
    *lead, inputs, outputs = w.shape
    if inputs > MAX_INPUTS:
        raise ValueError(f"{inputs} inputs, but sums of this format are for {MAX_INPUTS} at most")
    w = _without_gradient(w)
    xp = np if isinstance(w, np.ndarray) else jnp
    groups = number_of_groups(inputs, group)
    padded = xp.pad(w.astype(np.float32), [(0, 0)] * len(lead) + [(0, -inputs % 4), (0, 0)])
    grouped = padded.reshape(*lead, groups, -1, outputs)
    magnitudes = -xp.sort(-abs(grouped), axis=-2)
    scales, multipliers = as_multiples(fit_scales(magnitudes, 1, planes))
    return rounded(grouped, inputs, scales, multipliers)


def number_of_groups(inputs: int, group: int | None) -> int:
    """G of I inputs, of which so many are to share a scale; None: all."""
    padded = inputs + -inputs % 4
    return 1 if group is None else padded // quantize.group_size(inputs, group)


def fit_scales(x, counts, planes: int):
    """The scales of each plane of trits that fit best: [..., P, G, O] for x [..., G, n, O].

    x: magnitudes, descending along n; counts: of each, to be broadcast with x
    """
    x = x.astype(np.float64) if isinstance(x, np.ndarray) else x
    xp = np if isinstance(x, np.ndarray) else jnp
    first = best_prefix(x, counts)
    return xp.stack([first] if planes == 1 else two_planes(x, counts, first), axis=-3)


def best_prefix(x, counts):
    """The scale, [..., O], that fits magnitudes [..., n, O] best as 0 or 1 times it.

    Whatever the scale, the weights that are nearer to it than to 0 are the largest ones. Of the k
    largest, with sum A, the best scale is A / k, and it lowers the squared error by A^2 / k.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    total, number = ((x * 0 + f).cumsum(axis=-2) for f in (x * counts, counts))
    number = xp.maximum(number, 1)
    gain = total * total / number
    best = x.shape[-2] - 1 - gain[..., ::-1, :].argmax(axis=-2, keepdims=True)
    return xp.take_along_axis(total / number, best, axis=-2)[..., 0, :]


def two_planes(x, counts, first):
    """Two scales, the larger one first, that fit magnitudes [..., n, O] best as sums of two trits.

    From `first`, the best scale of one plane, and a second one: in turns, each weight takes the
    nearest sum of two trits, and the scales are solved for. No turn makes the error larger, and
    with the first one it is that of one plane at most. Returns [..., O] twice.
    """
    xp = np if isinstance(x, np.ndarray) else jnp

    def turn(scales):
        first, second = scales
        a, b = nearest(x, first[..., None, :], second[..., None, :])
        aa, ab, bb, ax, bx = (
            _sum(counts * product) for product in (a * a, a * b, b * b, a * x, b * x)
        )
        det = aa * bb - ab * ab  # 0: all weights have one pattern of trits
        new = bb * ax - ab * bx, aa * bx - ab * ax
        return tuple(
            xp.where(det > 0, n / xp.maximum(det, 1e-30), old)
            for n, old in zip(new, scales, strict=True)
        )

    scales = first, 0.6 * first
    if xp is jnp:
        return lax.fori_loop(0, ROUNDS, lambda _, scales: turn(scales), scales)
    return functools.reduce(lambda scales, _: turn(scales), range(ROUNDS), scales)


def _sum(x):
    """The sum over n of [..., n, O]. NumPy's own adds in another order if O is 1."""
    return x.cumsum(axis=-2)[..., -1, :] if isinstance(x, np.ndarray) else x.sum(axis=-2)


def nearest(x, first, second):
    """The trits (a, b) for which a first + b second is nearest to magnitudes x, in x's dtype."""
    xp = np if isinstance(x, np.ndarray) else jnp
    trits, smallest = (x * 0, x * 0), x  # the distance from 0
    for a, b in ((0, 1), (1, -1), (1, 0), (1, 1)):
        distance = abs(x - (a * first + b * second))
        nearer = distance < smallest
        trits = tuple(xp.where(nearer, t, old) for t, old in zip((a, b), trits, strict=True))
        smallest = xp.where(nearer, distance, smallest)
    return trits


def as_multiples(scales):
    """Scales [..., P, G, O] as float32 [..., 1, O] and multipliers int8 [..., P, G, O] of these.

    None instead of multipliers for one plane and one group.
    """
    xp = np if isinstance(scales, np.ndarray) else jnp
    planes, groups, _ = scales.shape[-3:]
    if planes == groups == 1:
        return scales[..., 0, :, :].astype(np.float32), None
    largest = scales.sum(axis=-3).max(axis=-2, keepdims=True)  # [..., 1, O]
    unit = (largest / (LEVELS + 1 - planes)).astype(np.float32)  # each plane rounds up by 1/2
    multipliers = xp.rint(scales / xp.maximum(unit, 1e-37)[..., None, :, :])
    return unit, multipliers.astype(np.int8)


def rounded(grouped, inputs: int, scales, multipliers) -> PackedWeight:
    """Weights float32 [..., G, n, O], of I inputs and zeros, as the nearest trits.

    scales, multipliers: as from `as_multiples`
    """
    xp = np if isinstance(grouped, np.ndarray) else jnp
    values = scales[..., None, :, :]  # [..., P, G, O]
    if multipliers is not None:
        values = multipliers.astype(np.float32) * values
    first, *others = (values[..., p, :, None, :] for p in range(values.shape[-3]))
    x = abs(grouped)
    trits = nearest(x, first, *others) if others else ((2 * x > first) & (first > 0),)
    trits = xp.stack([xp.sign(grouped) * t for t in trits], axis=-4).astype(np.int8)
    trits = trits.reshape(*trits.shape[:-3], -1, trits.shape[-1])[..., :inputs, :]
    if multipliers is None:
        return quantize.pack(trits[..., 0, :, :], scales)
    return quantize.pack(trits, scales, xp.moveaxis(multipliers, -1, -3).swapaxes(-1, -2))


# --- int8 -----------------------------------------------------------------------------------------


def quantize_int8(w, groups: int = 1) -> QuantizedWeight:
    """Absolute-maximum int8 form of `[..., I, O]`, a bfloat16 scale for each column and group."""
    w = _without_gradient(w)
    xp = np if isinstance(w, np.ndarray) else jnp
    *lead, inputs, outputs = w.shape
    w = w.astype(np.float32).reshape(*lead, groups, inputs // groups, outputs)
    scales = abs(w).max(axis=-2) / LEVELS
    scales = xp.where(scales == 0, 1, scales).astype(jnp.bfloat16)  # NaN stays
    codes = xp.rint(w / scales[..., None, :].astype(np.float32)).clip(-LEVELS, LEVELS)
    return QuantizedWeight(codes.astype(np.int8).reshape(*lead, inputs, outputs), scales)


def quantize_int8_keeping_trits(w: jax.Array) -> QuantizedWeight:
    """int8 form of latent weights whose absmean trits are those of the latent weights.

    Rounding to int8 moves values across the ternary threshold here and there; those go one code
    back over it. Raises ValueError where that does not help.
    """
    w = jnp.asarray(w, jnp.float32)
    int8, moved = jax.jit(quantize_int8)(w), True
    for _ in range(8):  # each move changes gamma a little, which may call for another
        int8, moved = _toward_trits(int8, w)
        if not moved:
            return int8
    raise ValueError("some weights have no int8 form with the same trits; is a column all alike?")


@jax.jit
def _toward_trits(int8: QuantizedWeight, w: jax.Array):
    """Codes moved by one where their trits are not those of w, and whether any were."""
    stored = quantize.dequantize(int8)
    found, wanted = (round_to_trits(x, absmean_scale(x)) for x in (stored, w))
    codes = jnp.clip(int8.codes + (wanted - found), -LEVELS, LEVELS).astype(jnp.int8)
    return dataclasses.replace(int8, codes=codes), jnp.any(found != wanted)


# --- The table ------------------------------------------------------------------------------------


def _fitted(planes: int, group: int | None) -> Format:
    to = functools.partial(fit, planes=planes, group=group)
    return Format(to, functools.partial(as_in_training, to=to), True, (planes, group))


FORMATS = {
    "ternary": Format(ternarize, fake_ternarize, True),
    "ternary-fit": _fitted(1, None),
    **{f"ternary-fit-{n}": _fitted(1, n) for n in GROUPS},
    "ternary2": _fitted(2, None),
    **{f"ternary2-{n}": _fitted(2, n) for n in GROUPS},
    "int8": Format(quantize_int8, functools.partial(as_in_training, to=quantize_int8), False),
    "float32": Format(lambda w: w.astype(np.float32), lambda w: w, False),
}


def format_named(name: str) -> Format:
    """The line of FORMATS with this name; ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {[*FORMATS]}")
    return FORMATS[name]


@functools.cache
def shapes(name: str, shape: tuple[int, ...]) -> Weight:
    """The `ShapeDtypeStruct`s of a weight of a format, of logical shape [..., I, O]."""
    to = format_named(name).quantize
    return jax.eval_shape(to, jax.ShapeDtypeStruct(shape, jnp.float32))


def latent(w: Weight) -> jax.Array:
    """The float32 weights to train on from w: the values it stands for, [..., I, O].

    With one scale for a matrix of trits, larger by one over the share of its trits that are not 0:
    then their mean magnitude is that scale again, and their absmean ternary form is w.
    """
    values = quantize.dequantize(w)
    if not (isinstance(w, PackedWeight) and w.scales.shape[-1] == 1):
        return values
    return values * (w.scales / jnp.maximum(absmean_scale(values), 1e-30))
