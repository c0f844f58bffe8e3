"""Weights and their products: codes times scales, as they are or packed, and the one `dot` for all.

Shapes: I inputs (the contracted axis), O outputs, E experts, G groups of inputs, P planes of trits,
R rows; `...` is nothing or an expert axis. A weight's logical shape is always `[..., I, O]`,
whatever its bytes. `formats.py` makes weights; here is what they are.

Codes are integers from -127 to 127. A scale belongs to a matrix, an output, a group of inputs or a
row, which the shape of `scales` alone says: each of its sizes divides that of the weight.

How a ternary matrix is packed: transposed, four trits to a byte, in blocks of `4 * block` weights
of one output. Byte i of a block holds its weights i, block + i, 2 block + i and 3 block + i at bits
0, 2, 4 and 6, each as trit + 1. So the weights of one bit position, a slab, lie side by side, and
so do the activations that they meet. One output with eight inputs, block = 2:

    trits    1  0 -1  1  0  0  1 -1        codes    2  1  0  2  1  1  2  0
    byte 0 = 2 | 0 << 2 | 1 << 4 | 2 << 6 = 146      weights 0, 2, 4, 6
    byte 1 = 1 | 2 << 2 | 1 << 4 | 0 << 6 = 25       weights 1, 3, 5, 7

Trits of several planes may be added, each times a multiplier of its group of inputs. Then a block
has `block` bytes of the first plane and, behind, as many of the next; a group is all inputs, or
one, two or four slabs of a block. Multipliers are integers that sum up to 127 at most, so that
their sum of trits is a code, and sums of products with integers are exact in any order: on every
mesh and in every batch. The one float scale comes last.

So a matrix has rows of bytes, one for each output. A CPU wants the outputs side by side, so that
each has a lane of a vector: interleaved, four bytes of each of 64 outputs lie together, then the
next four of each. Which of the two a weight is follows from where it is placed; files have rows.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels

ACTIVATIONS = ("float", "int15", "int8")  # what quantized matrices are multiplied with
LEVELS = 127  # the largest code
MAX_BLOCK = 64  # bytes: 256 weights, one tile of a kernel
LANES = 64  # outputs side by side in an interleaved weight
QUAD = 4  # bytes of each
SHARDS = 8  # a block is small enough that this many shards of I each hold whole blocks
TILE = 1 << 22  # weights unpacked at a time on a CPU: enough for two cores, and no more
DEVICE_TILE = 1 << 24  # and on a GPU, where each tile is some launches
BATCHED = (((2,), (1,)), ((0,), (0,)))  # dimensions of [B, R, I] times [B, I, O]
FEW_ROWS = 8  # bfloat16 and int8 products of fewer rows take a slow path on a CPU


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["trits"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Codes as they are, times scales; also the rows of an embedding table, [V, D].

    codes: int8 [..., I, O]; in training float32, whose gradient goes on to the latent weights
    scales: bfloat16 or float32 [..., G, C]; G divides I, and C is 1 or O. Row i belongs to group
      i // (I / G)
    trits: in training, whether the codes are trits, which a kernel can multiply
    """

    codes: Any
    scales: Any
    trits: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., I, O]."""
        return tuple(self.codes.shape)

    def __getitem__(self, expert: int) -> "QuantizedWeight":
        """One expert's weight [I, O] of [E, I, O]."""
        return _expert(self, expert)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "multipliers"],
    meta_fields=["block", "padding", "interleaved"],
)
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """Codes that are trits, or sums of trits times multipliers, four trits to a byte, times scales.

    packed: uint8 [..., O, B], B bytes for each output (layout: see the module's docstring), or
      interleaved [..., O / 64, B / 4, 64, 4]
    scales: float32 [..., 1, C]; C is 1 or O
    block: bytes in a packing block of one plane
    padding: zeros appended to I to fill the last byte, 0 to 3
    multipliers: int8 [..., O, G, P], interleaved [..., O / 64, G, P, 64], or None: one plane, whose
      trits are the codes
    interleaved: whether 64 outputs lie side by side, see `interleave`
    """

    packed: Any
    scales: Any
    block: int
    padding: int = 0
    multipliers: Any = None
    interleaved: bool = False

    @property
    def planes(self) -> int:
        """P."""
        if self.multipliers is None:
            return 1
        return self.multipliers.shape[-2 if self.interleaved else -1]

    @property
    def block_bytes(self) -> int:
        """Of a packing block with all its planes."""
        return self.planes * self.block

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., I, O]."""
        *lead, outputs, width = self.packed.shape
        if self.interleaved:
            *lead, groups, quads = lead
            outputs, width = groups * LANES, quads * QUAD
        return (*lead, 4 * width // self.planes - self.padding, outputs)

    def __getitem__(self, expert: int) -> "PackedWeight":
        """One expert's weight [I, O] of [E, I, O]."""
        return _expert(self, expert)


def _expert(w, expert: int):
    """IndexError unless w is [E, I, O] and has this expert, which ends a loop over them, too."""
    if len(w.shape) != 3:
        raise IndexError(f"a weight [I, O], {list(w.shape)}, has no experts to index")
    if not -w.shape[0] <= expert < w.shape[0]:
        raise IndexError(f"expert {expert} of {w.shape[0]}; the first is 0")
    return jax.tree.map(lambda x: x[expert], w)


Weight = jax.Array | QuantizedWeight | PackedWeight


def dequantize(w: Weight) -> jax.Array:
    """The float32 matrix `[..., I, O]` that a weight stands for; NumPy in, NumPy out."""
    if not isinstance(w, QuantizedWeight | PackedWeight):
        return w.astype(np.float32)
    *lead, inputs, outputs = w.shape
    groups = w.scales.shape[-2]
    codes = codes_of(w).reshape(*lead, groups, inputs // groups, outputs)
    scales = w.scales[..., :, None, :].astype(np.float32)
    return (codes.astype(np.float32) * scales).reshape(w.shape)


def count(params: Any) -> int:
    """The number of weights that a tree of parameters, in any formats, stands for."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "shape"))
    return sum(math.prod(w.shape) for w in leaves)


def codes_of(w: QuantizedWeight | PackedWeight):
    """The codes [..., I, O] of a weight, int8 unless it is one in training."""
    return unpack(w) if isinstance(w, PackedWeight) else w.codes


# --- Packing --------------------------------------------------------------------------------------


def packing_block(inputs: int) -> int:
    """Bytes in a packing block for I inputs: the largest power of two up to 64 that fits.

    Where the size allows, blocks are small enough that each of 2, 4 or 8 shards of I holds whole
    ones. 6144 inputs: 64; 256: 8; 48: 1.
    """
    width = -(-inputs // 4)
    per_shard = width // math.gcd(width, SHARDS)
    return min(MAX_BLOCK, per_shard & -per_shard)


def group_size(inputs: int, wanted: int) -> int:
    """Inputs in a group: as many as wanted, 64 or more, or a whole packing block if that is less.

    So 2, 4 or 8 shards of I hold whole groups, too. 6144 inputs: as wanted up to 256; 1536: 64.
    """
    return min(wanted, 4 * packing_block(inputs))


def pack(trits, scales, multipliers=None, block: int | None = None) -> PackedWeight:
    """The packed form of int8 trits [..., I, O]; with multipliers, of planes [..., P, I, O].

    scales: float32 [..., 1, C]; multipliers: int8 [..., O, G, P]. NumPy in, NumPy out.
    """
    if multipliers is None:
        trits = trits[..., None, :, :]
    *lead, planes, inputs, outputs = trits.shape
    block, padding = block or packing_block(inputs), -inputs % 4
    codes = (trits.astype(np.int8, copy=False) + np.int8(1)).view(np.uint8)  # [..., P, I, O]
    if padding:
        xp = np if isinstance(trits, np.ndarray) else jnp
        rows = [(0, 0)] * (len(lead) + 1) + [(0, padding), (0, 0)]
        codes = xp.pad(codes, rows, constant_values=1)
    packed = pack_codes(codes, block)  # [..., P, W, O]
    packed = packed.reshape(*lead, planes, -1, block, outputs).swapaxes(-4, -3)
    packed = packed.reshape(*lead, -1, outputs).swapaxes(-1, -2)
    return PackedWeight(packed, scales, block, padding, multipliers)


def pack_codes(codes, block: int):  # [..., 4 W, O] -> [..., W, O]
    """Packed rows, not transposed yet, of trit + 1 of one plane, uint8; NumPy in, NumPy out."""
    *lead, _, outputs = codes.shape
    codes = codes.reshape(*lead, -1, 4, block, outputs)
    packed = codes[..., 3, :, :] * np.uint8(4)
    packed += codes[..., 2, :, :]
    packed *= np.uint8(4)
    packed += codes[..., 1, :, :]
    packed *= np.uint8(4)
    packed += codes[..., 0, :, :]
    return packed.reshape(*lead, -1, outputs)


def unpack(w: PackedWeight):
    """The int8 codes [..., I, O] of a packed weight: trits, or their sums times multipliers."""
    w = in_rows(w)
    *lead, outputs, width = w.packed.shape
    packed = w.packed.reshape(*lead, outputs, -1, w.planes, 1, w.block)
    trits = _trits_at(packed, np.array([0, 2, 4, 6], np.uint8)[:, None])  # [..., P, 4, block]
    codes = _sum_planes(trits, _of_slabs(w.multipliers, packed.shape[-4]))
    codes = codes.reshape(*lead, outputs, -1)
    return codes[..., : w.shape[-2]].swapaxes(-1, -2)


def trits_of(w: PackedWeight):
    """The trits of a packed weight, int8 [..., I, O]; with multipliers, of planes [..., P, I, O].

    `pack(trits_of(w), w.scales, w.multipliers)` is w, in rows.
    """
    w = in_rows(w)
    planes, inputs = w.planes, w.shape[-2]
    *lead, outputs, width = w.packed.shape
    packed = w.packed.reshape(*lead, outputs, -1, planes, 1, w.block)
    trits = _trits_at(packed, np.array([0, 2, 4, 6], np.uint8)[:, None])
    trits = trits.swapaxes(-4, -3).reshape(*lead, outputs, planes, -1)[..., :inputs]
    trits = trits.swapaxes(-3, -1).swapaxes(-3, -2)  # [..., P, I, O]
    return trits[..., 0, :, :] if w.multipliers is None else trits


def with_trits(w: PackedWeight, trits) -> PackedWeight:
    """w with other trits, an array like `trits_of(w)`, in the form that w has. NumPy in, NumPy out.

    Raises ValueError for an array of another shape, and for what is no trit.
    """
    wanted = jax.eval_shape(trits_of, w).shape
    if trits.shape != wanted:
        raise ValueError(
            f"trits of this weight are {list(wanted)}, got {list(trits.shape)}; see trits_of"
        )
    if not isinstance(trits, jax.core.Tracer) and (wrong := trits[abs(trits) > 1]).size:
        raise ValueError(f"a trit is -1, 0 or 1, got {wrong[0]}; clip or round first")
    rows = in_rows(w)
    packed = pack(trits, rows.scales, rows.multipliers, w.block)
    return interleave(packed) if w.interleaved else packed


def interleaves(outputs: int, width: int, block: int) -> bool:
    """Whether so many outputs of B bytes, in blocks of so many, can lie side by side."""
    return outputs % LANES == 0 and width % QUAD == 0 and block % QUAD == 0


def interleave(w: Weight) -> Weight:
    """A packed weight with 64 outputs side by side, the form that is fast on a CPU.

    As it is, which is slower there, if it is of another type or sizes do not allow it. NumPy in,
    NumPy out.
    """
    if not isinstance(w, PackedWeight) or w.interleaved:
        return w
    if not interleaves(*w.packed.shape[-2:], w.block):
        return w
    *lead, outputs, width = w.packed.shape
    packed = w.packed.reshape(*lead, outputs // LANES, LANES, width // QUAD, QUAD)
    packed, multipliers = packed.swapaxes(-3, -2), w.multipliers
    if multipliers is not None:
        multipliers = interleave_multipliers(multipliers)
    return dataclasses.replace(w, packed=packed, multipliers=multipliers, interleaved=True)


def interleave_multipliers(multipliers):
    """int8 [..., O, G, P] as [..., O / 64, G, P, 64]."""
    *lead, outputs, groups, planes = multipliers.shape
    multipliers = multipliers.reshape(*lead, outputs // LANES, LANES, groups, planes)
    return multipliers.swapaxes(-3, -2).swapaxes(-2, -1)


def in_rows(w: Weight) -> Weight:
    """A packed weight with a row of bytes for each output, as files have it; others as they are.

    NumPy in, NumPy out.
    """
    if not isinstance(w, PackedWeight) or not w.interleaved:
        return w
    *lead, groups, quads, lanes, quad = w.packed.shape
    packed = w.packed.swapaxes(-3, -2).reshape(*lead, groups * lanes, quads * quad)
    multipliers = w.multipliers
    if multipliers is not None:
        multipliers = multipliers.swapaxes(-2, -1).swapaxes(-3, -2)
        multipliers = multipliers.reshape(*lead, groups * lanes, *multipliers.shape[-2:])
    return dataclasses.replace(w, packed=packed, multipliers=multipliers, interleaved=False)


def _trits_at(packed, shift):
    """The int8 trits at bits `shift` and `shift + 1` of each byte."""
    return (packed >> shift & np.uint8(3)).astype(np.int8) - np.int8(1)


def _of_slabs(multipliers, blocks: int):
    """The multipliers [..., O, G, P] of each slab: int8 [..., O, blocks or 1, P, 4 or 1]."""
    if multipliers is None or multipliers.shape[-2] == 1:
        return None if multipliers is None else multipliers[..., None]
    *lead, groups, planes = multipliers.shape
    each = multipliers.reshape(*lead, blocks, groups // blocks, planes).swapaxes(-1, -2)
    return each.repeat(4 * blocks // groups, axis=-1)


def _sum_planes(trits, multipliers):
    """Trits int8 [..., P, 4, block] to codes [..., 4, block]; multipliers as in `_of_slabs`."""
    if multipliers is None:
        return trits[..., 0, :, :]
    return (trits * multipliers[..., None]).sum(axis=-3, dtype=np.int8)


# --- Rounding rows --------------------------------------------------------------------------------


@jax.custom_jvp
def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """rounded, in the dtype of x, with the gradient of x."""
    return rounded.astype(x.dtype)


@straight_through.defjvp
def _(primals, tangents):
    return straight_through(*primals), tangents[0]


def quantize_rows(
    x: jax.Array, axis_name: str | None = None, activations: str = "int8"
) -> tuple[jax.Array, jax.Array]:
    """Rows x [R, I] as integers [R, I] and a float32 step [R, 1], x ~ integers * step.

    "int8" is BitNet's: int8, to 127 times the step (BitNet b1.58, section 2). "int15" is fixed
    point in int16, to 16256 = 127 * 128 times the step: finer than bfloat16, and two halves of
    int8 (`high_and_low`), so that kernels for int8 multiply it. No gradient passes: `grouped_dot`
    lets it go straight through.

    axis_name: the mesh axis that I is split over, if any: the maximum is that of the whole row
    """
    levels, dtype = (127, jnp.int8) if activations == "int8" else (127 * 128, jnp.int16)
    whole = axis_name is None or lax.axis_size(axis_name) == 1
    split = {} if whole else {"axis_name": axis_name}
    return _rounded_rows(lax.stop_gradient(x), levels=levels, dtype=dtype, **split)


@kernels.accelerated("quantize_rows")
def _rounded_rows(x, *, levels, dtype, axis_name=None):
    largest = _row_maxima(x)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    step = in_this_order(jnp.maximum(largest, 1e-30) * np.float32(1 / levels))
    return _divided(x, step, dtype=dtype), step


# The kernels of these two read x from memory, once it is there. XLA makes it again in each of its
# own two loops, on a CPU not always to the same last bit.
@kernels.accelerated("row_maxima")
def _row_maxima(x):
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)


@kernels.accelerated("round_rows")
def _divided(x, step, *, dtype):
    return jnp.round(x.astype(jnp.float32) / step).astype(dtype)


def in_this_order(x: jax.Array) -> jax.Array:
    """x, and on a CPU a compiler may not multiply what it is multiplied with first.

    XLA does so or not by the number of rows, which would show in the last bit; elsewhere it would
    cost a launch.
    """
    return lax.optimization_barrier(x) if kernels.on_cpu() else x


def high_and_low(integers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int15 as two of int8: integers = 128 * high + low."""
    high = (integers + 64) >> 7
    return high.astype(jnp.int8), (integers - (high << 7)).astype(jnp.int8)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "integers", "step"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class RoundedRows:
    """Rows of floats that are rounded already, for kernels of products; others round them again.

    rows: [..., I]
    integers: int8 [..., I] or, of "int15", [..., 2 I], `high_and_low` side by side
    step: float32 [..., 1]
    """

    rows: jax.Array
    integers: jax.Array
    step: jax.Array

    @classmethod
    def of(cls, rows: jax.Array, activations: str) -> "RoundedRows":
        """Of rows [R, I], as `quantize_rows` rounds them."""
        integers, step = quantize_rows(rows, None, activations)
        if activations == "int15":
            integers = jnp.concatenate(high_and_low(integers), axis=-1)
        return cls(rows, integers, step)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    @property
    def dtype(self):
        return self.rows.dtype

    def reshape(self, *shape: int) -> "RoundedRows":
        """With other axes before the last."""
        return jax.tree.map(lambda x: x.reshape(*shape[:-1], x.shape[-1]), self)


def floats_of(x: jax.Array | RoundedRows) -> jax.Array:
    return x.rows if isinstance(x, RoundedRows) else x


# --- Products -------------------------------------------------------------------------------------


def dot(
    x: jax.Array,
    w: Weight,
    *,
    activations: str = "float",
    axis_name: str | None = None,
    scale_last: bool | None = None,
) -> jax.Array:  # [..., I] -> [..., O]
    """x @ w for a weight [I, O] of any format, in the dtype of x.

    activations: one of ACTIVATIONS. "float" multiplies x as it is; "int8" and "int15" round each
      row first, see `quantize_rows`, and then products with a weight that has no scales along I
      are exact integer sums. Gradients go straight through the rounding, to x and to the scales.
    axis_name: inside `shard_map`, the mesh axis that I is split over; the result is the whole sum
    scale_last: `has_last_scale` of the whole weight, where a device's part does not tell
    """
    options = {"activations": activations, "axis_name": axis_name, "scale_last": (scale_last,)}
    return dots(x, (w,), **options)[0]


def dots(x: jax.Array, weights: Sequence[Weight], **options) -> tuple[jax.Array, ...]:
    """`dot` of the same x with several weights, which may be one kernel."""
    stacks = [jax.tree.map(lambda leaf: leaf[None], w) for w in weights]
    rows, only = x.reshape(-1, x.shape[-1]), jnp.zeros(1, jnp.int32)
    products = grouped_dots(rows, stacks, only, **options)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in products)


def grouped_dot(
    x: jax.Array, w: Weight, experts: jax.Array, *, scale_last: bool | None = None, **options
) -> jax.Array:
    """Rows in equal blocks, each block times one expert's matrix: [R, I] -> [R, O].

    x: [R, I], R a multiple of the number of blocks; perhaps `RoundedRows`
    w: [E, I, O]; experts are read where they lie
    experts: int32 [blocks]; a block whose expert is -1 is skipped, and its rows are zeros
    scale_last, options: as `dot` has them
    """
    return grouped_dots(x, (w,), experts, scale_last=(scale_last,), **options)[0]


def grouped_dots(
    x: jax.Array,
    weights: Sequence[Weight],
    experts: jax.Array,
    *,
    activations: str = "float",
    axis_name: str | None = None,
    scale_last: Sequence[bool | None] | None = None,
) -> tuple[jax.Array, ...]:
    """`grouped_dot` of the same rows with several weights, of each its `scale_last`."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, got {activations!r}")
    scale_last = tuple(scale_last or [None] * len(weights))
    options = {"activations": activations, "axis_name": axis_name, "scale_last": scale_last}
    return _grouped_dots(x, tuple(weights), experts, **options)


@kernels.accelerated("ternary_dots")
def _grouped_dots(x, weights, experts, *, activations, axis_name, scale_last):
    x = floats_of(x)
    rows = None if activations == "float" else quantize_rows(x, axis_name, activations)
    product = functools.partial(_grouped_dot, activations=activations, axis_name=axis_name)
    pairs = zip(weights, scale_last, strict=True)
    return tuple(product(x, rows, w, experts, scale_last=last) for w, last in pairs)


@kernels.accelerated("scattered_dot")
def scattered_dot(x, w, experts, kept, *, activations, axis_name, scale_last=None):
    """Of some rows of `grouped_dot` the part of each device of a mesh axis: [K / n, O].

    kept: int32 [K], which rows, see `kernels.sums_of_devices`
    """
    rows = None if activations == "float" else quantize_rows(x, axis_name, activations)
    return _grouped_dot(x, rows, w, experts, activations, axis_name, scale_last, kept)


def _grouped_dot(x, rows, w, experts, activations, axis_name, scale_last, kept=None):
    """rows: x as `quantize_rows` gives it; None for float activations"""
    if in_training(w) and activations != "int8":
        w, scale_last = dequantize(w), False  # bfloat16 has 8 bits
    scale_last = has_last_scale(w) if scale_last is None else scale_last
    options = {"kept": kept, "axis_name": axis_name, "scale_last": scale_last}
    sums, step = functools.partial(_sums, **options), None
    if rows is None:
        y = sums(x, w, experts)
    else:
        rounded, step = rows
        scaled = x.astype(jnp.float32) / step
        if isinstance(w, jax.Array):  # floats, in training: rounded rows and no step
            y = sums(straight_through(x, (rounded * step).astype(x.dtype)), w, experts)
            step = None
        else:
            y = _of_rounded(sums)(scaled, rounded, w, experts)
    scale = step
    if scale_last:
        gamma = w.scales[experts, 0].astype(jnp.float32)  # [blocks, C]
        gamma = jnp.repeat(gamma, x.shape[0] // experts.shape[0], axis=0)
        scale = gamma if step is None else in_this_order(gamma * step)
    if kept is not None and scale is not None:
        scale = scale.at[kernels.part_of(kept, axis_name)].get(mode="clip")
    return (y if scale is None else y * scale).astype(x.dtype)


@kernels.accelerated("gated_dot")
def gated_dot(x, gate, up, experts, *, activations):  # [R, I] -> [R, O]
    """gelu(x @ gate) * (x @ up), for blocks of rows and weights as in `grouped_dot`.

    Floats may differ in the last bit from those of the two products and `jax.nn.gelu`.
    """
    gates, ups = grouped_dots(x, (gate, up), experts, activations=activations)
    return jax.nn.gelu(gates) * ups


def has_kernel(w: Weight, activations: str, rows: int = 1) -> bool:
    """Whether a kernel multiplies so many rows with a weight, perhaps abstract, of [I, O] or
    [E, I, O]."""
    if activations == "float" or not isinstance(w, PackedWeight):
        return False
    if len(w.shape) == 2:
        w = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), w)
    x = jax.ShapeDtypeStruct((1, rows, w.shape[-2]), jnp.int8)
    return packed_products.kernel(x, w) is not None


def has_grouped_kernel(w: Weight, activations: str, rows: int, dtype) -> bool:
    """Whether kernels multiply so many rows, of this dtype if they are not rounded, with experts
    [E, I, O] that are floats, perhaps abstract, and make their gradients."""
    packed = isinstance(w, PackedWeight) or (isinstance(w, QuantizedWeight) and not in_training(w))
    if packed or len(w.shape) != 3:
        return False
    x = jax.ShapeDtypeStruct((rows, 1, w.shape[1]), dtype)
    if in_training(w) and activations == "int8":
        x, _ = jax.eval_shape(_narrow, x, x)
    experts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    y = jax.ShapeDtypeStruct(w.shape, x.dtype)
    return _grouped_product.kernel(x, y, experts) is not None


def in_training(w: Weight) -> bool:
    """Whether the codes are floats that a gradient passes through."""
    return isinstance(w, QuantizedWeight) and w.codes.dtype == jnp.float32


def has_last_scale(w: Weight) -> bool:
    """Whether all inputs of an output share its scale, so that sums are scaled last."""
    return isinstance(w, QuantizedWeight | PackedWeight) and w.scales.shape[-2] == 1


def _sums(x, w, experts, kept, axis_name, scale_last):  # [R, I] -> float32 [R, O] or [K / n, O]
    """Sums over all of I, times scales of groups but not those that come last.

    kept: None for all rows on every device; or as `scattered_dot` has it
    """
    blocks, (rows, inputs) = experts.shape[0], x.shape
    x = x.reshape(blocks, -1, inputs)
    int15 = x.dtype == jnp.int16
    if int15:  # both halves in one product: the weights are read once
        x = jnp.concatenate(high_and_low(x), axis=1)
    y = _block_products(x, w, experts, scale_last)
    y = y.reshape(blocks, 1 + int15, rows // blocks, -1).swapaxes(0, 1)
    trits = isinstance(w, PackedWeight) and w.multipliers is None
    if int15 and trits:  # at most 32768 * 16256, in int32: a device sends half as much
        y = 128 * y[:1] + y[1:]
    y = y.reshape(len(y), rows, -1)
    y = y if axis_name is None else kernels.sums_of_devices(y, axis_name, kept)
    high, *low = y.astype(jnp.float32)
    return 128 * high + low[0] if low else high


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
        (scaled, rounded, w, experts), (d_scaled, _, d_w, _) = primals, tangents

        def product(scaled, w):
            return sums(straight_through(scaled, rounded), w, experts)

        product = product if in_training(w) else jax.checkpoint(product)
        _, tangent = jax.jvp(product, (scaled, w), (d_scaled, d_w))
        return of_rounded(*primals), tangent

    return of_rounded


def _block_products(x, w, experts, scale_last):
    """x [blocks, R, I] times each block's expert, [blocks, R, O], scaled as `_sums` says."""
    if in_training(w) and w.trits and x.dtype == jnp.int8 and kernels.on_cpu():
        packed = interleave(pack(w.codes.astype(jnp.int8), jnp.ones((len(w.codes), 1, 1))))
        return packed_products(x, packed, experts).astype(jnp.float32)
    if in_training(w):
        return grouped_product(*_narrow(x, w.codes), experts)
    if isinstance(w, jax.Array):
        return grouped_product(x, w.astype(x.dtype), experts)
    if isinstance(w, PackedWeight):
        return packed_products(x, w, experts)
    return _each_product(functools.partial(_codes_product, scale_last=scale_last), x, w, experts)


@kernels.accelerated("ternary_sums")
def packed_products(x: jax.Array, w: PackedWeight, experts: jax.Array) -> jax.Array:
    """x [blocks, R, I] times the codes of each block's expert, [blocks, R, O]."""
    return _each_product(_packed_product, x, w, experts)


def _each_product(product, x, w, experts):
    """`product` of each block's rows, the weights and its expert; zeros for one that is skipped."""
    if len(experts) == 1:
        return jnp.where(experts < 0, 0, product(x[0], w, experts[0])[None])

    result = jax.eval_shape(product, x[0], w, experts[0])

    def body(i, y):
        one = lax.cond(
            _is_skipped(experts[i]),
            lambda: jnp.zeros(result.shape, result.dtype),
            lambda: jnp.where(experts[i] < 0, 0, product(x[i], w, experts[i])),
        )
        return lax.dynamic_update_index_in_dim(y, one, i, axis=0)

    y = kernels.zeros_after(x, (len(experts), *result.shape), result.dtype)
    return lax.fori_loop(0, len(experts), body, y)


@jax.custom_batching.custom_vmap
def _is_skipped(expert):
    return expert < 0


@_is_skipped.def_vmap
def _(size, batched, expert):
    """Whether all are: for a condition of each, JAX would copy the weights that many times."""
    return jnp.all(expert < 0), False


def _of_blocks(w, experts):
    """The matrix [I, O] of each block, [blocks, I, O]; zeros for a block that is skipped."""
    if len(w) == len(experts) == 1:
        return jnp.where(experts[:, None, None] < 0, 0, w)
    return w.at[jnp.where(experts < 0, len(w), experts)].get(mode="fill", fill_value=0)


def _narrow(*arrays):
    """Floats that are integers of 8 bits: their products are exact in bfloat16, too, with sums in
    float32. Gradients that come are then rounded to bfloat16."""
    dtype = jnp.bfloat16 if kernels.multiplies_bfloat16() else jnp.float32
    return tuple(x.astype(dtype) for x in arrays)


# These two are linear in two arrays, and their derivatives are each other.


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def grouped_product(x, w, experts, turned: bool = False):
    """x [blocks, R, I] times floats w [E, I, O], or turned [E, O, I], of each block's expert:
    [blocks, R, O], float32. Gradients that come are rounded to the dtype of x."""
    return _grouped_product(x, w, experts, turned=turned)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def grouped_sums(x, y, experts, count: int):
    """Of each of so many experts, the sum over its rows of x [blocks, R, I] times y [blocks, R, O]:
    [count, I, O], float32. Gradients that come are rounded to the dtype of x."""
    return _grouped_sums(x, y, experts, count=count)


@kernels.accelerated("grouped_product")
def _grouped_product(x, w, experts, *, turned):
    # One batched product: gradients through a loop cost twice as much.
    return _matmul(x, _of_blocks(w, experts), (((2,), (1 + turned,)), ((0,), (0,))))


@kernels.accelerated("grouped_sums")
def _grouped_sums(x, y, experts, *, count):
    products = _matmul(_transposed(x), y, BATCHED)
    sums = jnp.zeros((count, *products.shape[1:]), products.dtype)
    return sums.at[jnp.where(experts < 0, count, experts)].add(products, mode="drop")


@grouped_product.defjvp
def _(turned, primals, tangents):
    def cotangents(x, w, experts, dy):
        pair = (dy, x) if turned else (x, dy)
        return grouped_product(dy, w, experts, not turned), grouped_sums(*pair, experts, len(w))

    f = functools.partial(grouped_product, turned=turned)
    return f(*primals), _bilinear(f, cotangents, primals, tangents)


@grouped_sums.defjvp
def _(count, primals, tangents):
    def cotangents(x, y, experts, dw):
        return grouped_product(y, dw, experts, True), grouped_product(x, dw, experts)

    f = functools.partial(grouped_sums, count=count)
    return f(*primals), _bilinear(f, cotangents, primals, tangents)


def _bilinear(f, cotangents, primals, tangents):
    """The tangent of f(x, y, experts); cotangents: of x and y, from these and that of the result"""

    def tangent(kept, moved):
        (x, y, experts), (dx, dy) = kept, moved
        return f(dx, y, experts) + f(x, dy, experts)

    def transpose(kept, d):
        x, y, _ = kept
        dx, dy = cotangents(*kept, d.astype(x.dtype))
        return dx.astype(x.dtype), dy.astype(y.dtype)

    return kernels.linear(tangent, transpose, primals, tangents[:2])


@kernels.accelerated("transposed")
def _transposed(x):
    """[..., R, C] as [..., C, R], for a product that contracts R.

    The kernel really moves bfloat16: XLA would fold a transposition of its own into the product,
    which on a CPU is then one for float32, eight times as slow where bfloat16 is multiplied.
    """
    return x.swapaxes(-1, -2)


def _matmul(x, w, contract):
    """Float operands sum in float32 and int8 ones in int32; float32 is never rounded to TF32."""
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(
        x, w, contract, precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )


def _packed_product(x, w, expert):
    """x [R, I] times the codes of one expert: int32 for int8 x, else float32.

    A product for each of the four slabs, with the inputs that lie there: three times as fast on a
    CPU as putting a tile's codes in order first.
    """
    rows, width = x.shape[0], -(-w.shape[-2] // 4)
    few = x.dtype != jnp.float32 and rows < FEW_ROWS
    x = jnp.pad(x, [(0, FEW_ROWS - rows if few else 0), (0, w.padding)])
    slabs = x.reshape(-1, width // w.block, 4, w.block).transpose(2, 0, 1, 3)
    slabs = slabs.reshape(4, -1, width)  # inputs of each slab
    step = LANES if w.interleaved else 1

    def columns(start, size):
        def part(array):  # of these outputs, of one expert
            starts = (expert, start // step, *[0] * (array.ndim - 2))
            return lax.dynamic_slice(array, starts, (1, size // step, *array.shape[2:]))[0]

        tile = in_rows(jax.tree.map(part, dataclasses.replace(w, scales=None)))
        packed = tile.packed.reshape(size, -1, w.planes, 1, w.block)
        multipliers = _of_slabs(tile.multipliers, packed.shape[1])

        def product(slab, i):
            of_slab = multipliers
            if multipliers is not None and multipliers.shape[-1] > 1:
                of_slab = multipliers[..., i : i + 1]
            codes = _sum_planes(_trits_at(packed, np.uint8(2 * i)), of_slab)
            codes = codes.reshape(size, width).astype(x.dtype)
            return _matmul(slab, codes, (((1,), (1,)), ((), ())))

        products = (product(slab, i) for i, slab in enumerate(slabs))
        return functools.reduce(jnp.add, products)  # [R, size]

    return _by_column_tiles(columns, x, w.shape, step)[:rows]


def _codes_product(x, w, expert, scale_last):
    """x [R, I] times one expert's codes: int32 for int8 x, else float32.

    With several groups of scales along I, float32: each group's sums times its scales, added.
    """
    groups = w.scales.shape[-2]
    x = x.reshape(x.shape[0], groups, -1).swapaxes(0, 1)  # [G, R, I/G]

    def columns(start, size):
        at = (expert, 0, start)
        codes = lax.dynamic_slice(w.codes, at, (1, w.shape[-2], size))
        codes = codes.reshape(groups, -1, size).astype(x.dtype)
        sums = _matmul(x, codes, (((2,), (1,)), ((0,), (0,))))  # [G, R, size]
        if scale_last:
            return sums[0]
        # Of a single column of scales, `dynamic_slice` takes that one for any start.
        scales = lax.dynamic_slice(w.scales, at, (1, groups, min(size, w.scales.shape[-1])))[0]
        scales = scales.astype(jnp.float32)
        return jnp.sum(sums.astype(jnp.float32) * scales[:, None], axis=0)

    return _by_column_tiles(columns, x[0], w.shape)


def _by_column_tiles(columns, x, shape, step: int = 1):
    """Calls `columns(start, size)` over all O columns, so that only one tile is ever unpacked.

    step: columns that lie together, of which a tile has whole ones

    The last tile is moved left to end at O: its first columns are then computed twice, alike.

    On a TPU all columns are one tile: a product unpacks as it reads there, and for a slice from a
    column that might lie inside a tile of the memory layout, XLA first copied all experts.
    """
    inputs, outputs = shape[-2:]
    tile = TILE if kernels.platform() == "cpu" else DEVICE_TILE
    size = min(outputs, max(1, tile // inputs // step) * step)
    if size == outputs or kernels.platform() == "tpu":
        return columns(0, outputs)

    def body(i, y):
        start = jnp.minimum(i * size, outputs - size)
        return lax.dynamic_update_slice(y, columns(start, size), (0, start))

    result = jax.eval_shape(functools.partial(columns, 0, size))
    y = kernels.zeros_after(x, (result.shape[0], outputs), result.dtype)
    return lax.fori_loop(0, -(-outputs // size), body, y)


# --- Embedding tables -----------------------------------------------------------------------------


def quantize_table(table: jax.Array) -> QuantizedWeight:
    """Rows of a float table [V, D] rounded to int8, 127 at their largest."""
    return QuantizedWeight(*quantize_rows(table))


def table_rows(
    table: jax.Array | QuantizedWeight, index: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """Rows of a table, float32 [..., D], for index int32 [...]; NaN for a row that there is not.

    axis_name: inside `shard_map`, the mesh axis that V is split over. Each device looks into its
      own part, and one row and zeros are added: for one index, XLA:GPU would gather the table
    """

    def look(array):
        if axis_name is None:
            return array[index]
        here = index - lax.axis_index(axis_name) * table.shape[0]
        return array.at[here].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    int8 = isinstance(table, QuantizedWeight)
    rows = look(table.codes).astype(jnp.float32) * look(table.scales) if int8 else look(table)
    rows = (rows if axis_name is None else lax.psum(rows, axis_name)).astype(jnp.float32)
    size = table.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))
    return jnp.where(((index >= 0) & (index < size))[..., None], rows, jnp.nan)


def table_dot(x: jax.Array, table: jax.Array | QuantizedWeight) -> jax.Array:
    """Rows x [R, D] times each row of a table [V, D]: float32 [R, V].

    On a CPU the order of the sums does not depend on R or V, and of an int8 table they are of
    integers, exact: each row of x is rounded to int15 (the derivative is that without rounding).
    """
    if isinstance(table, QuantizedWeight):
        return _table_dot(x, table.codes) * table.scales[:, 0]
    return _table_dot(x, table)


@kernels.accelerated("table_dot")
def _table_dot(x, table):
    table = table.astype(x.dtype) if table.dtype == jnp.int8 else table
    # XLA:TPU gives a single row to the vector unit, which takes 2.6 times as long as two rows.
    alone = len(x) == 1 and kernels.platform() == "tpu"
    rows = jnp.pad(x, [(0, 1), (0, 0)]) if alone else x
    return _matmul(rows.astype(table.dtype), table, (((1,), (1,)), ((), ())))[: len(x)]


# --- Tables of choices ----------------------------------------------------------------------------


Rules = Sequence[tuple[str, Any]] | Mapping[str, Any]


def match_rules(rules: Rules, paths: Iterable[str]) -> dict[str, Any]:
    """What an ordered table of (pattern, value) says of each path: the first match wins.

    A mapping has the value of each path. Raises ValueError for a path that nothing is said of, and
    for a rule that is no path's first match.

    >>> match_rules([("router", "float"), ("w$", "ternary")], ["router/w", "linear/w"])
    {'router/w': 'float', 'linear/w': 'ternary'}
    """
    if isinstance(rules, Mapping):
        rules, paths = dict(rules), list(paths)
        if other := sorted(set(paths) ^ rules.keys()):
            raise ValueError(f"parameters and their formats differ: {other[0]!r} is in one only")
        return rules
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


def apply_rules(rules: Rules, params: dict, f: Callable) -> dict:
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
