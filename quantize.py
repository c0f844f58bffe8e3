"""Weight formats: Grok-1's int8 and BitNet b1.58's ternary, and the one `dot` that takes them all.

Shapes: I inputs (the contracted axis), O outputs, E experts, G scale groups, R rows; `...` is
nothing or an expert axis. A weight's logical shape is always `[..., I, O]`, whatever its bytes.

How a ternary matrix is packed: transposed, four trits to a byte, in blocks of `4 * block` weights
of one output. Byte i of a block holds its weights i, block + i, 2 block + i and 3 block + i at bits
0, 2, 4 and 6, each as trit + 1. So the weights of one bit position lie side by side, and so do the
activations that they meet. One output with eight inputs, block = 2:

    trits    1  0 -1  1  0  0  1 -1        codes    2  1  0  2  1  1  2  0
    byte 0 = 2 | 0 << 2 | 1 << 4 | 2 << 6 = 146      weights 0, 2, 4, 6
    byte 1 = 1 | 2 << 2 | 1 << 4 | 0 << 6 = 25       weights 1, 3, 5, 7
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels

ACTIVATIONS = ("float", "int15", "int8")  # what quantized matrices are multiplied with
EPSILON = 1e-5  # added to gamma, so that an all-zero matrix divides by something
MAX_BLOCK = 64  # bytes: 256 weights, one tile of a kernel
SHARDS = 8  # a block is small enough that this many shards of I each hold whole blocks
TILE = 1 << 22  # weights unpacked at a time on a CPU: enough for two cores, and no more
DEVICE_TILE = 1 << 24  # and on a GPU, where each tile is some launches
BATCHED = (((2,), (1,)), ((0,), (0,)))  # dimensions of [B, R, I] times [B, I, O]
FEW_ROWS = 8  # bfloat16 and int8 products of fewer rows take a slow path on a CPU


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "scales"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight8bit:
    """The release's form: `weight` times the scale of its group of rows and its column.

    weight: int8 [..., I, O]
    scales: bfloat16 or float32 [..., G, O]; row i belongs to group i // (I / G)
    """

    weight: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., I, O]."""
        return tuple(self.weight.shape)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales"],
    meta_fields=["block", "padding"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight1_58bit:
    """{-1, 0, 1} times a scale, four trits to a byte (layout: see the module's docstring).

    packed: uint8 [..., O, B], B bytes for each output
    scales: float32 [..., 1, 1], one for a matrix, so one for each expert
    block: bytes in a packing block; divides B
    padding: zeros appended to I to fill the last byte, 0 to 3
    """

    packed: Any
    scales: Any
    block: int
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., I, O]."""
        *lead, outputs, width = self.packed.shape
        return (*lead, 4 * width - self.padding, outputs)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["trits", "scales"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class FakeTernaryWeight:
    """A ternary matrix in training, made of latent floats by `fake_ternarize`.

    trits: float32 [..., I, O], -1, 0 or 1; their gradient goes on to the latent weights
    scales: float32 [..., 1, 1]
    """

    trits: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., I, O]."""
        return tuple(self.trits.shape)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "scales"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedTable8bit:
    """An embedding table whose rows are int8 times a scale each.

    weight: int8 [V, D]
    scales: float32 [V, 1]
    """

    weight: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[V, D]."""
        return tuple(self.weight.shape)


Weight = jax.Array | QuantizedWeight8bit | QuantizedWeight1_58bit | FakeTernaryWeight


# --- Quantizing -----------------------------------------------------------------------------------


def absmean_scale(w):
    """gamma = mean |W|, float32 [..., 1, 1]. (BitNet b1.58, section 2, equation 3)"""
    return jnp.mean(jnp.abs(w.astype(jnp.float32)), axis=(-2, -1), keepdims=True)


def round_to_trits(w, gamma):
    """clip(round(W / (gamma + eps)), -1, 1), in the dtype of w; works on NumPy and JAX arrays.

    (BitNet b1.58, section 2, equations 1 and 2.)
    """
    return (w / (gamma + EPSILON)).round().clip(-1, 1)


def ternarize(w: jax.Array) -> QuantizedWeight1_58bit:
    """Absmean ternary form of a float matrix `[..., I, O]`."""
    gamma = absmean_scale(w)
    return pack(round_to_trits(w.astype(jnp.float32), gamma).astype(jnp.int8), gamma)


def fake_ternarize(w: jax.Array) -> FakeTernaryWeight:
    """Absmean ternary form of a float matrix in training: its gradient is that of the identity."""
    gamma = absmean_scale(w)
    wide = w.astype(jnp.float32)
    scaled = wide / lax.stop_gradient(jnp.maximum(gamma, 1e-30))
    trits = straight_through(scaled, round_to_trits(wide, gamma))
    return FakeTernaryWeight(trits, lax.stop_gradient(gamma))


def latent(w: Weight) -> jax.Array:
    """The float32 weights to train on from w: the values it stands for, [..., I, O].

    Of a ternary w, larger by one over the share of its trits that are not 0: then their mean
    magnitude is the scale of w again, and their absmean ternary form is w.
    """
    values = dequantize(w)
    if not isinstance(w, QuantizedWeight1_58bit):
        return values
    return values * (w.scales / jnp.maximum(absmean_scale(values), 1e-30))


def is_ternary(w: QuantizedWeight1_58bit) -> bool:
    """Whether each weight is exactly -1, 0 or 1 times its matrix's scale; a byte can say 2."""
    values = dequantize(w)
    return bool(jnp.all((values == 0) | (jnp.abs(values) == w.scales)))


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """The value of `rounded`, to the last bit, with the gradient of x."""
    return lax.stop_gradient(rounded) + (x - lax.stop_gradient(x))  # x + (rounded - x) rounds again


def quantize_int8(w: jax.Array, groups: int = 1) -> QuantizedWeight8bit:
    """Absolute-maximum int8 form of `[..., I, O]`, a bfloat16 scale for each column and group."""
    *lead, inputs, outputs = w.shape
    w = w.astype(jnp.float32).reshape(*lead, groups, inputs // groups, outputs)
    scales = jnp.max(jnp.abs(w), axis=-2) / 127
    scales = jnp.where(scales > 0, scales, 1).astype(jnp.bfloat16)
    weight = jnp.clip(jnp.round(w / scales[..., None, :].astype(jnp.float32)), -127, 127)
    return QuantizedWeight8bit(
        weight.astype(jnp.int8).reshape(*lead, inputs, outputs),
        scales,
    )


def quantize_int8_keeping_trits(w: jax.Array) -> QuantizedWeight8bit:
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
def _toward_trits(int8: QuantizedWeight8bit, w: jax.Array):
    """Codes moved by one where their trits are not those of w, and whether any were."""
    rounded = dequantize(int8)
    found, wanted = (round_to_trits(x, absmean_scale(x)) for x in (rounded, w))
    weight = jnp.clip(int8.weight + (wanted - found), -127, 127).astype(jnp.int8)
    return dataclasses.replace(int8, weight=weight), jnp.any(found != wanted)


def quantize_rows(
    x: jax.Array, axis_name: str | None = None, activations: str = "int8"
) -> tuple[jax.Array, jax.Array]:
    """Rows x [R, I] as integers [R, I] and a float32 step [R, 1], x ~ integers * step.

    "int8" is BitNet's: int8, to 127 times the step (BitNet b1.58, section 2). "int15" is fixed
    point in int16, to 16256 = 127 * 128 times the step: finer than bfloat16, and two planes of
    int8 (`planes`), so that kernels for int8 multiply it. No gradient passes: `grouped_dot` lets it
    go straight through.

    axis_name: the mesh axis that I is split over, if any: the maximum is that of the whole row
    """
    levels, dtype = (127, jnp.int8) if activations == "int8" else (127 * 128, jnp.int16)
    whole = axis_name is None or lax.axis_size(axis_name) == 1
    x, kernel = lax.stop_gradient(x), kernels.rounding_kernel()
    if kernel is not None and whole:
        return kernel(x, levels, dtype)
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if not whole:
        largest = lax.pmax(largest, axis_name)
    step = in_this_order(jnp.maximum(largest, 1e-30) / levels)
    return jnp.round(x / step).astype(dtype), step


def in_this_order(x: jax.Array) -> jax.Array:
    """x, and on a CPU a compiler may not multiply what it is multiplied with first.

    XLA does so or not by the number of rows, which would show in the last bit; elsewhere it would
    cost a launch.
    """
    return lax.optimization_barrier(x) if kernels.on_cpu() else x


def planes(integers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int15 as two of int8: integers = 128 * high + low."""
    high = (integers + 64) >> 7
    return high.astype(jnp.int8), (integers - (high << 7)).astype(jnp.int8)


def dequantize(w: Weight) -> jax.Array:
    """The float32 matrix `[..., I, O]` that a weight of any format stands for."""
    if isinstance(w, QuantizedWeight1_58bit):
        return unpack(w).astype(jnp.float32) * w.scales
    if isinstance(w, FakeTernaryWeight):
        return w.trits * w.scales
    if isinstance(w, QuantizedWeight8bit):
        *lead, inputs, outputs = w.shape
        groups = w.scales.shape[-2]
        grouped = w.weight.reshape(*lead, groups, inputs // groups, outputs)
        scales = w.scales[..., :, None, :].astype(jnp.float32)
        return (grouped.astype(jnp.float32) * scales).reshape(w.shape)
    return w.astype(jnp.float32)


# --- Packing --------------------------------------------------------------------------------------


def packing_block(inputs: int) -> int:
    """Bytes in a packing block for I inputs: the largest power of two up to 64 that fits.

    Where the size allows, blocks are small enough that each of 2, 4 or 8 shards of I holds whole
    ones. 6144 inputs: 64; 256: 8; 48: 1.
    """
    width = -(-inputs // 4)
    per_shard = width // math.gcd(width, SHARDS)
    return min(MAX_BLOCK, per_shard & -per_shard)


def pack(trits, scales, block: int | None = None) -> QuantizedWeight1_58bit:
    """int8 trits [..., I, O] and their scales to the packed form; NumPy in, NumPy out."""
    *lead, inputs, _ = trits.shape
    block = block or packing_block(inputs)
    padding = -inputs % 4
    codes = (trits.astype(np.int8, copy=False) + np.int8(1)).view(np.uint8)  # [..., I, O]
    if padding:
        xp = np if isinstance(trits, np.ndarray) else jnp
        rows = [(0, 0)] * len(lead) + [(0, padding), (0, 0)]
        codes = xp.pad(codes, rows, constant_values=1)
    packed = pack_codes(codes, block).swapaxes(-1, -2)
    return QuantizedWeight1_58bit(packed, scales, block, padding)


def pack_codes(codes, block: int):  # [..., 4 B, O] -> [..., B, O]
    """Packed rows, not transposed yet, of codes trit + 1, uint8; NumPy in, NumPy out."""
    *lead, _, outputs = codes.shape
    codes = codes.reshape(*lead, -1, 4, block, outputs)
    packed = codes[..., 3, :, :] * np.uint8(4)
    packed += codes[..., 2, :, :]
    packed *= np.uint8(4)
    packed += codes[..., 1, :, :]
    packed *= np.uint8(4)
    packed += codes[..., 0, :, :]
    return packed.reshape(*lead, -1, outputs)


def _trits_at(packed, shift):
    """The int8 trits at bits `shift` and `shift + 1` of each byte."""
    return (packed >> shift & np.uint8(3)).astype(np.int8) - np.int8(1)


def _unpack_rows(packed, block: int):  # [..., B] -> [..., 4 B]
    *lead, width = packed.shape
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    trits = _trits_at(packed.reshape(*lead, width // block, 1, block), shifts)
    return trits.reshape(*lead, 4 * width)


def unpack(w: QuantizedWeight1_58bit):
    """The int8 trits [..., I, O] of a packed weight."""
    trits = _unpack_rows(w.packed, w.block)
    return trits[..., : w.shape[-2]].swapaxes(-1, -2)


def to_base3(packed: np.ndarray) -> np.ndarray:
    """Packed bytes [..., B] at five trits to a byte: uint8 [..., 4 ceil(B / 5)], 0 to 242.

    Of every five bytes, the last gives one of its trits to each of the others: their own four are
    the low digits of a number in base 3, that one is its highest. Zeros (trits) fill up B. Codes
    are 0 to 2; one of 3 would become other trits.

    >>> to_base3(np.array([0b10_00_10_01, 0, 0b10_10_10_10, 0, 0b01_00_10_00], np.uint8))
    array([ 61, 162,  80,  81], dtype=uint8)
    """
    *lead, width = packed.shape
    fives = np.full((*lead, -(-width // 5) * 5), 0b01_01_01_01, np.uint8)
    fives[..., :width] = packed
    p = _first_fours(fives).copy().view(np.uint8)
    # Worth 1, 4, 16 and 64 in a packed byte, its trits become worth 1, 3, 9 and 27.
    digits = p - (p >> np.uint8(2))
    digits -= np.uint8(3) * (p >> np.uint8(4))
    digits -= np.uint8(9) * (p >> np.uint8(6))
    fifth = fives.reshape(-1)[4::5].astype("<u4")
    fifth = (fifth | fifth << 6 | fifth << 12 | fifth << 18) & 0x03030303  # a trit to each byte
    digits += np.uint8(81) * fifth.view(np.uint8)
    return digits.reshape(*lead, -(-width // 5) * 4)


def from_base3(digits: np.ndarray) -> np.ndarray:
    """The packed bytes [..., 5 G] that `to_base3` turned into digits uint8 [..., 4 G].

    Raises ValueError for other arrays, and for a byte above 242: five trits make none.
    """
    if kernels.library() is not None:
        return kernels.from_base3(digits)
    kernels.check_bytes(digits)
    kernels.check_digit(digits.max(initial=0))
    digits = np.ascontiguousarray(digits)
    *lead, width = digits.shape
    d = digits.reshape(-1)
    # With its quotients by 3, 9 and so on added, the trits of d are worth 1, 4, 16, 64 and 256:
    # the fifth leaves the byte by itself. (Multiplied, for NumPy shifts bytes left slowly.)
    fifth = d // np.uint8(81)
    p = np.uint8(4) * fifth + d // np.uint8(27)
    p = np.uint8(4) * p + d // np.uint8(9)
    p = np.uint8(4) * p + d // np.uint8(3) + d
    packed = np.empty((*lead, width // 4 * 5), np.uint8)
    _first_fours(packed)[...] = p.view("<u4")
    # The highest byte of the product: fifth[0] + 4 fifth[1] + 16 fifth[2] + 64 fifth[3].
    gathered = fifth.view("<u4") * np.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    packed.reshape(-1)[4::5] = gathered.view(np.uint8)[3::4]
    return packed


def _first_fours(fives: np.ndarray) -> np.ndarray:
    """A view of the first four of every five bytes, as one uint32 each."""
    return np.ndarray(fives.size // 5, "<u4", fives, strides=5)


# --- int8 to ternary, blockwise -------------------------------------------------------------------
#
# NumPy, for weights too large to be float32 all at once. The result is exactly that of
# `round_to_trits(weight * scales, gamma)`.


def absolute_sums(weight: np.ndarray) -> np.ndarray:
    """Sums of |weight| over the rows of int8 [I, O], exact: int64 [O]."""
    sums = np.zeros(weight.shape[1], np.int64)
    for start in range(0, len(weight), 256):  # 256 * 128 fits in 16 bits
        magnitude = np.abs(weight[start : start + 256]).view(np.uint8)  # |-128| wraps to 128
        sums += magnitude.sum(axis=0, dtype=np.uint16)
    return sums


def absmean_of_sums(sums: np.ndarray, scales: np.ndarray, inputs: int) -> np.ndarray:
    """gamma, float32 [E, 1, 1], from sums of |weight| and scales float32, both [E, G, O].

    Rounded once, from the exact sum (`math.fsum`): no order of summation shows in it.
    """
    count = inputs * scales.shape[-1]
    weighted = sums * scales.astype(np.float64)  # exact: 24 bits at most times 24
    means = [math.fsum(matrix.ravel().tolist()) / count for matrix in weighted]
    return np.array(means, np.float32).reshape(-1, 1, 1)


def zero_range(scales: np.ndarray, gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest code that round to 0 under each scale: int8 [E, G, O] each.

    scales: float32 [E, G, O], none negative; gamma: float32 [E, 1, 1]. A binary search that asks
    `round_to_trits` itself, which is monotonic in the code and symmetric about 0.
    """
    limits = np.zeros(scales.shape, np.int16)  # 0 to 128
    for step in (64, 32, 16, 8, 4, 2, 1, 1):
        w = (limits + np.int16(step)).astype(np.float32) * scales
        limits += np.int16(step) * (round_to_trits(w, gamma) == 0)
    return (-limits).astype(np.int8), np.minimum(limits, 127).astype(np.int8)


def int8_to_codes(weight: np.ndarray, lowest, highest, out: np.ndarray) -> None:
    """Writes trit + 1 of weights int8 [R, O] to `out`, uint8 [R, O]; the range of 0 is int8 [O]."""
    np.greater(weight, highest, out=out.view(bool))
    out += np.greater_equal(weight, lowest).view(np.uint8)


# --- Products -------------------------------------------------------------------------------------


def dot(
    x: jax.Array, w: Weight, *, activations: str = "float", axis_name: str | None = None
) -> jax.Array:  # [..., I] -> [..., O]
    """x @ w for a weight [I, O] of any format, in the dtype of x.

    activations: one of ACTIVATIONS. "float" multiplies x as it is; "int8" and "int15" round each
      row first, see `quantize_rows`, and then ternary products are exact integer sums. Gradients go
      straight through the rounding, to x and to the scales of w.
    axis_name: inside `shard_map`, the mesh axis that I is split over; the result is the whole sum
    """
    stack = jax.tree.map(lambda leaf: leaf[None], w)
    rows = x.reshape(-1, x.shape[-1])
    only = jnp.zeros(1, jnp.int32)
    y = grouped_dot(rows, stack, only, activations=activations, axis_name=axis_name)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def grouped_dot(
    x: jax.Array,
    w: Weight,
    experts: jax.Array,
    *,
    activations: str = "float",
    axis_name: str | None = None,
) -> jax.Array:  # [R, I] -> [R, O]
    """Rows in equal blocks, each block times one expert's matrix; experts are read where they lie.

    x: [R, I], R a multiple of the number of blocks
    w: [E, I, O]
    experts: int32 [blocks]; a block whose expert is -1 is skipped, and its rows are zeros
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, got {activations!r}")
    if isinstance(w, FakeTernaryWeight) and activations != "int8":
        w = dequantize(w)  # bfloat16 has 8 bits
    blocks = experts.shape[0]
    step = None

    def sums(rows, w, experts):  # [R, I] -> float32 [R, O], over all of I, not scaled
        y = _block_products(rows.reshape(blocks, -1, x.shape[-1]), w, experts)
        y = y.reshape(x.shape[0], -1)
        return (y if axis_name is None else lax.psum(y, axis_name)).astype(jnp.float32)

    if activations == "float":
        y = sums(x, w, experts)
    else:
        rounded, step = quantize_rows(x, axis_name, activations)
        if isinstance(w, QuantizedWeight1_58bit | QuantizedWeight8bit):
            y = _of_rounded(sums)(x.astype(jnp.float32) / step, rounded, w, experts)
        elif isinstance(w, FakeTernaryWeight):
            scaled = x.astype(jnp.float32) / step
            y = sums(straight_through(scaled, rounded.astype(jnp.float32)), w, experts)
        else:  # floats, in training: rounded rows and no step
            y = sums(straight_through(x, (rounded * step).astype(x.dtype)), w, experts)
            step = None
    scale = step
    if isinstance(w, QuantizedWeight1_58bit | FakeTernaryWeight):
        gamma = jnp.repeat(w.scales[experts, 0], x.shape[0] // blocks, axis=0)  # [R, 1]
        scale = gamma if step is None else in_this_order(gamma * step)
    return (y if scale is None else y * scale).astype(x.dtype)


def _of_rounded(sums: Callable) -> Callable:
    """`sums` of integer rows, as a function of the floats that were rounded to them as well.

    Its derivative is that of the product with these floats: straight through the rounding. What is
    unpacked for it is not kept from the forward pass for the backward pass, but unpacked again.
    """

    @jax.custom_jvp
    def of_rounded(scaled, rounded, w, experts):
        return sums(rounded, w, experts)

    @of_rounded.defjvp
    def _(primals, tangents):
        (_, rounded, w, experts), (d_scaled, _, d_w, _) = primals, tangents
        product = jax.checkpoint(lambda rows, w: sums(rows, w, experts))
        _, tangent = jax.jvp(product, (rounded.astype(jnp.float32), w), (d_scaled, d_w))
        return sums(rounded, w, experts), tangent

    return of_rounded


def _block_products(x, w, experts):
    """x [blocks, R, I] times each block's expert, summed over I but not scaled by rows or gamma."""
    if isinstance(w, FakeTernaryWeight):
        return _integer_products(x, _of_blocks(w.trits, experts))
    if not isinstance(w, QuantizedWeight1_58bit | QuantizedWeight8bit):
        # One batched product: gradients through a loop cost twice as much.
        return _matmul(x, _of_blocks(w, experts).astype(x.dtype), BATCHED)
    if x.dtype == jnp.int16:  # both planes in one product: the weights are read once
        rows = x.shape[1]
        both = _block_products(jnp.concatenate(planes(x), axis=1), w, experts)
        return 128 * both[:, :rows] + both[:, rows:]  # at most 32768 * 16256, in int32
    ternary = isinstance(w, QuantizedWeight1_58bit)
    if ternary and x.dtype == jnp.int8:
        kernel = kernels.ternary_kernel(x, w.packed, w.block, w.padding)
        if kernel is not None:
            return kernel(x, w.packed, experts, w.block)
    product = _ternary_product if ternary else _int8_product
    if len(experts) == 1:
        return jnp.where(experts < 0, 0, product(x[0], w, experts[0])[None])

    result = jax.eval_shape(product, x[0], w, experts[0])

    def body(i, y):
        one = lax.cond(
            experts[i] < 0,
            lambda: jnp.zeros(result.shape, result.dtype),
            lambda: product(x[i], w, experts[i]),
        )
        return lax.dynamic_update_index_in_dim(y, one, i, axis=0)

    y = kernels.zeros_after(x, (len(experts), *result.shape), result.dtype)
    return lax.fori_loop(0, len(experts), body, y)


def _of_blocks(w, experts):
    """The matrix [I, O] of each block, [blocks, I, O]; zeros for a block that is skipped."""
    if len(w) == len(experts) == 1:
        return jnp.where(experts[:, None, None] < 0, 0, w)
    return w.at[jnp.where(experts < 0, len(w), experts)].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _integer_products(x, trits):  # [blocks, R, I], [blocks, I, O] -> [blocks, R, O]
    """Products of floats that are integers of 8 bits: exact in bfloat16 with sums in float32.

    The gradient that comes back is rounded to bfloat16.
    """
    return _matmul(x.astype(jnp.bfloat16), trits.astype(jnp.bfloat16), BATCHED)


def _integer_products_forward(x, trits):
    x, trits = x.astype(jnp.bfloat16), trits.astype(jnp.bfloat16)
    return _matmul(x, trits, BATCHED), (x, trits)


def _integer_products_backward(kept, dy):
    x, trits = kept
    dy = dy.astype(jnp.bfloat16)
    dx = _matmul(dy, trits, (((2,), (2,)), ((0,), (0,))))
    return dx, _matmul(kernels.transposed(x), dy, BATCHED)


_integer_products.defvjp(_integer_products_forward, _integer_products_backward)


def _matmul(x, w, contract):
    """Float operands sum in float32 and int8 ones in int32; float32 is never rounded to TF32."""
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(
        x, w, contract, precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )


def _ternary_product(x, w, expert):
    """x [R, I] times the trits of one expert, unscaled: int32 for int8 x, else float32.

    A product for each of the four bit positions, with the inputs that lie there: three times as
    fast on a CPU as putting a tile's trits in order first.
    """
    rows, width = x.shape[0], w.packed.shape[-1]
    few = x.dtype != jnp.float32 and rows < FEW_ROWS
    x = jnp.pad(x, [(0, FEW_ROWS - rows if few else 0), (0, w.padding)])
    slabs = x.reshape(-1, width // w.block, 4, w.block).transpose(2, 0, 1, 3)
    slabs = slabs.reshape(4, -1, width)  # inputs at each bit position

    def columns(start, size):
        tile = lax.dynamic_slice(w.packed, (expert, start, 0), (1, size, width))[0]
        products = (
            _matmul(
                slab, _trits_at(tile, np.uint8(2 * i)).astype(x.dtype), (((1,), (1,)), ((), ()))
            )
            for i, slab in enumerate(slabs)
        )
        return functools.reduce(jnp.add, products)  # [R, size]

    return _by_column_tiles(columns, x, w.shape)[:rows]


def _int8_product(x, w, expert):
    """x [R, I] times one expert's int8 matrix and its scales, float32."""
    groups = w.scales.shape[-2]
    x = x.reshape(x.shape[0], groups, -1).swapaxes(0, 1)  # [G, R, I/G]

    def columns(start, size):
        at = (expert, 0, start)
        weight = lax.dynamic_slice(w.weight, at, (1, w.shape[-2], size))
        weight = weight.reshape(groups, -1, size).astype(x.dtype)
        scales = lax.dynamic_slice(w.scales, at, (1, groups, size))[0]
        sums = _matmul(x, weight, (((2,), (1,)), ((0,), (0,))))  # [G, R, size]
        return jnp.sum(sums.astype(jnp.float32) * scales[:, None].astype(jnp.float32), axis=0)

    return _by_column_tiles(columns, x[0], w.shape)


def _by_column_tiles(columns, x, shape):
    """Calls `columns(start, size)` over all O columns, so that only one tile is ever unpacked.

    The last tile is moved left to end at O: its first columns are then computed twice, alike.

    On a TPU all columns are one tile: a product unpacks as it reads there, and for a slice from a
    column that might lie inside a tile of the memory layout, XLA first copied all experts.
    """
    inputs, outputs = shape[-2:]
    tile = TILE if jax.default_backend() == "cpu" else DEVICE_TILE
    size = min(outputs, max(1, tile // inputs))
    if size == outputs or jax.default_backend() == "tpu":
        return columns(0, outputs)

    def body(i, y):
        start = jnp.minimum(i * size, outputs - size)
        return lax.dynamic_update_slice(y, columns(start, size), (0, start))

    result = jax.eval_shape(functools.partial(columns, 0, size))
    y = kernels.zeros_after(x, (result.shape[0], outputs), result.dtype)
    return lax.fori_loop(0, -(-outputs // size), body, y)


# --- Embedding tables -----------------------------------------------------------------------------


def quantize_table(table: jax.Array) -> QuantizedTable8bit:
    """Rows of a float table [V, D] rounded to int8, 127 at their largest."""
    weight, scales = quantize_rows(table)
    return QuantizedTable8bit(weight, scales)


def table_rows(
    table: jax.Array | QuantizedTable8bit, index: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """Rows of a table, float32 [..., D], for index int32 [...].

    axis_name: inside `shard_map`, the mesh axis that V is split over. Each device looks into its
      own part, and one row and zeros are added: for one index, XLA:GPU would gather the table
    """

    def look(array):
        if axis_name is None:
            return array[index]
        here = index - lax.axis_index(axis_name) * table.shape[0]
        return array.at[here].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    int8 = isinstance(table, QuantizedTable8bit)
    rows = look(table.weight).astype(jnp.float32) * look(table.scales) if int8 else look(table)
    return (rows if axis_name is None else lax.psum(rows, axis_name)).astype(jnp.float32)


def table_dot(x: jax.Array, table: jax.Array | QuantizedTable8bit) -> jax.Array:
    """Rows x [R, D] times each row of a table [V, D]: float32 [R, V].

    On a CPU the order of the sums does not depend on R or V.
    """
    if isinstance(table, QuantizedTable8bit):
        return table_dot(x, table.weight) * table.scales[:, 0]

    def plain(x, table):
        table = table.astype(x.dtype) if table.dtype == jnp.int8 else table
        # XLA:TPU gives a single row to the vector unit, which takes 2.6 times as long as two rows.
        alone = len(x) == 1 and jax.default_backend() == "tpu"
        rows = jnp.pad(x, [(0, 1), (0, 0)]) if alone else x
        return _matmul(rows.astype(table.dtype), table, (((1,), (1,)), ((), ())))[: len(x)]

    if kernels.takes_table(table):
        return kernels.differentiable(kernels.table_dot, plain)(x.astype(jnp.float32), table)
    return plain(x, table)


# --- Tables of choices ----------------------------------------------------------------------------


def match_rules(rules: Sequence[tuple[str, Any]], paths: Iterable[str]) -> dict[str, Any]:
    """What an ordered table of (pattern, value) says of each path: the first match wins.

    Raises ValueError for a path that no rule matches, and for a rule that is no path's first match.

    >>> match_rules([("router", "float"), ("w$", "ternary")], ["router/w", "linear/w"])
    {'router/w': 'float', 'linear/w': 'ternary'}
    """
    chosen, used = {}, set()
    for path in paths:
        found = next((i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path)), None)
        if found is None:
            raise ValueError(f"no rule matches parameter {path!r}; add one to the table {rules}")
        used.add(found)
        chosen[path] = rules[found][1]
    unused = [rules[i][0] for i in range(len(rules)) if i not in used]
    if unused:
        raise ValueError(f"these rules match no parameter: {unused}; remove or correct them")
    return chosen


def apply_rules(rules: Sequence[tuple[str, Any]], params: dict, f: Callable) -> dict:
    """f(path, value, weight) of each parameter of `{module: {name: weight}}`, as a tree like it.

    The value is what the table says of the path "module/name"; errors are those of `match_rules`.
    """
    chosen = match_rules(
        rules, [f"{module}/{name}" for module in params for name in params[module]]
    )
    return {
        module: {
            name: f(path := f"{module}/{name}", chosen[path], weight)
            for name, weight in entries.items()
        }
        for module, entries in params.items()
    }
