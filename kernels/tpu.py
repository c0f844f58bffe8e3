"""Kernels for TPUs, in Pallas for Mosaic: ternary products, and rounding their rows.

Shapes: I inputs (the contracted axis), O outputs, E experts, R rows of a block, B bytes of packed
weights for one output, I = 4 B. How weights are packed: see `quantize.py`. Slab j of a packing
block is its weights at bits 2 j and 2 j + 1: as many, side by side, as the block has bytes.
Weights with multipliers have P planes of trits, so that I = 4 B / P, and G groups of inputs.

A TPU that decodes waits for weights, but only if its vector unit has little to do with them. So no
byte is unpacked: masked with 3 << 2 j, bytes are int8 operands of the matrix unit, 4 ** j times too
large, and the sums are shifted back. Multipliers, too, meet the sums and not the weights: a row is
given once for each 64 bytes of a vector, with zeros where others are, for the matrix unit takes
sixteen rows in the time of eight. All sums are integers and exact: no tile shows in a result.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import kernels

LANES = 128  # of a vector
SUBLANES = 8
MULTIPLE = 32  # of it are the bytes of each output that a kernel takes
SEGMENT = 64  # bytes of a plane's packing block, where there are multipliers: half a vector
MOST_PARTS = 8  # segments of a part of B, see `parts_of`
UNROLLED = 8  # parts of B, with few rows
FEW_ROWS = 32
MOST_ROWS = 128  # of a tile: with as many, the matrix unit is busy
X_BYTES = 4 << 20  # of a tile, at most, and twice as much with the next one
WEIGHT_BYTES = 1 << 20
LONGEST = 1 << 25  # rows times bytes: programs are as long, for few loops are left in them
VMEM = 48 << 20  # that a kernel may take in all

# --- Which products have a kernel -----------------------------------------------------------------


def takes_weights(x, weights, *_) -> bool:
    """Whether `ternary_sums` has a kernel for x int8 [blocks, R, I] and such weights."""
    return x.dtype == jnp.int8 and x.ndim == 3 and 0 not in x.shape and _takes(x.shape[2], weights)


def takes_dots(x, weights, experts, *, activations: str, **_) -> bool:
    """Whether `ternary_dots` has a kernel for x [R, I] and weights, which are packed alike."""
    packed = all(hasattr(w, "packed") for w in weights) and activations != "float"
    return packed and len(x) > 0 and _takes(x.shape[1], weights)


def takes_dot(x, w, experts, kept, *, activations: str, **_) -> bool:
    """As `takes_dots`, of `scattered_dot`."""
    return takes_dots(x, [w], experts, activations=activations)


def _takes(inputs: int, weights) -> bool:
    first = weights[0]
    if any(w.interleaved or w.padding or w.packed.ndim != 3 for w in weights):
        return False
    width = first.packed.shape[2]
    outputs = [w.packed.shape[1] for w in weights]
    return (
        inputs * first.planes == 4 * width
        and width % (first.planes * first.block) == 0
        and width % MULTIPLE == 0
        and output_tiles(outputs, width, SUBLANES) is not None
        and _takes_multipliers(first, width)
        and all(_alike(w) == _alike(first) for w in weights)
        and _multiplies_int8()
    )


def _takes_multipliers(w, width: int) -> bool:
    if w.multipliers is None:
        return True
    blocks = width // (w.planes * SEGMENT)
    return (
        w.block == SEGMENT
        and w.planes <= 2
        and w.multipliers.shape[2] in (1, blocks, 2 * blocks, 4 * blocks)
        and parts_of(width)[1] <= MOST_PARTS
    )


def _alike(w) -> tuple:
    """What is the same of all weights of a call."""
    of_multipliers = None if w.multipliers is None else w.multipliers.shape[2:]
    return len(w.packed), w.packed.shape[2], w.block, of_multipliers


def _multiplies_int8() -> bool:
    """Whether the TPU that functions are traced for has products of int8: since the fifth."""
    return not pltpu.is_tpu_device() or pltpu.get_tpu_info().generation >= 5


# --- Tiles ----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """How the rows of a block are split.

    size, tiles: rows of a tile, and tiles; the last one may be less than full
    halves: 2 if a row of int15 makes two of int8, else 1
    copies: how often each is there, see `_multiplied`
    """

    size: int
    tiles: int
    halves: int
    copies: int

    @property
    def padded(self) -> int:
        """Rows of int8 of a tile, up to whole vectors."""
        return _up(self.size * self.halves, SUBLANES)


def row_tiles(rows: int, w, halves: int) -> Rows:
    """The tiles of blocks of R rows, times such weights."""
    width = w.packed.shape[2]
    copies = 1 if w.multipliers is None else parts_of(width)[1]
    most = min(MOST_ROWS, X_BYTES // (4 * width)) // (halves * copies)
    tiles = pl.cdiv(rows, max(most, MULTIPLE))
    size = rows if tiles == 1 else _up(pl.cdiv(rows, tiles), MULTIPLE)
    return Rows(size, pl.cdiv(rows, size), halves, copies)


def output_tiles(outputs: list[int], width: int, rows: int) -> int | None:
    """Into how many tiles of whole vectors to split each of some O, the same number for all.

    The least that makes tiles small enough. None where that cannot be done.
    """
    vectors, rest = divmod(math.gcd(*outputs), LANES)
    most = min(WEIGHT_BYTES, LONGEST // rows) // width
    fits = [n for n in range(1, vectors + 1) if vectors % n == 0]
    if rest or not fits:
        return None
    return next((n for n in fits if sum(outputs) <= n * most), fits[-1])


def parts_of(width: int) -> tuple[int, int]:
    """Into how many parts to split B bytes that are taken one by one, and the segments of each."""
    parts = width // LANES if width % LANES == 0 else 1
    return parts, width // parts // SEGMENT


def _for_each_part(width: int, rows: int, body, start):
    """`body(part, its bytes, state)`, which takes so many rows, for all parts of B bytes."""
    parts = parts_of(width)[0]
    if parts == 1:
        return body(0, slice(None), start)

    def at(part, state):
        return body(part, pl.ds(pl.multiple_of(part * LANES, LANES), LANES), state)

    return lax.fori_loop(0, parts, at, start, unroll=UNROLLED if rows <= FEW_ROWS else 1)


def _up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple


# --- Rows -----------------------------------------------------------------------------------------
#
# In the order of the packed bytes that they meet, slab by slab. XLA takes eight operations to round
# rows, to split them into halves and to put them in order.


def slabs(x, w, rows: Rows, levels: int | None = None, steps=None, *, interpret=False):
    """Rows [blocks, R, I] of int8, or of floats, which are rounded as by `quantize.quantize_rows`.

    levels: the largest integer, of floats
    steps: float32 [blocks, R, 1], of floats, where they are known

    Three arrays, int8 [blocks * tiles, 4, rows.copies * rows.padded, B]; what `_product` subtracts,
    int32 [blocks * tiles, rows.padded, 1]; and the steps, of floats.
    """
    blocks, count, inputs = x.shape
    width, padded = w.packed.shape[2], rows.padded
    used = rows.size * rows.halves
    given = [] if steps is None else [steps]
    made = [] if steps is not None or levels is None else [(blocks, count, 1)]

    def kernel(x_ref, *refs):
        slabs_ref, offsets_ref, *made_ref = refs[len(given) :]
        step = refs[0][0] if given else None
        if made:
            largest = jnp.max(jnp.abs(x_ref[0].astype(jnp.float32)), axis=1, keepdims=True)
            step = jnp.maximum(largest, 1e-30) * np.float32(1 / levels)
            made_ref[0][0] = step

        def arrange(part, here, offsets):
            size = inputs // parts_of(width)[0]
            there = here if here == slice(None) else pl.ds(pl.multiple_of(part * size, size), size)
            integers = x_ref[0, :, there]
            if step is not None:
                integers = jnp.round(integers.astype(jnp.float32) / step)
            integers = integers.astype(jnp.int32)
            if rows.halves == 2:
                high = (integers + 64) >> 7
                integers = jnp.concatenate([high, integers - (high << 7)], axis=0)
            for slab in range(4):
                starts = range(slab * w.block, size, 4 * w.block)
                pieces = [integers[:, i : i + w.block] for i in starts for _ in range(w.planes)]
                piece = jnp.concatenate(pieces, axis=1)
                offsets += -piece if slab == 3 else piece
                for copy in range(rows.copies):
                    kept = piece
                    if rows.copies > 1:
                        lane = lax.broadcasted_iota(jnp.int32, piece.shape, 1)
                        kept = jnp.where(lane // SEGMENT == copy, piece, 0)
                    at = pl.ds(copy * padded, used)
                    slabs_ref[0, slab, at, here] = kept.astype(jnp.int8)
            return offsets

        zeros = jnp.zeros((used, width // parts_of(width)[0]), jnp.int32)
        offsets = _for_each_part(width, used, arrange, zeros)
        offsets_ref[0, :used] = jnp.sum(offsets, axis=1, keepdims=True)

    def spec(size):
        return pl.BlockSpec((1, rows.size, size), lambda block, tile: (block, tile, 0))

    def spec_of_tile(*shape):
        return pl.BlockSpec((1, *shape), lambda b, t: (b * rows.tiles + t, *[0] * len(shape)))

    shape = (blocks * rows.tiles, 4, rows.copies * padded, width)
    arranged, offsets, *made = pl.pallas_call(
        kernel,
        grid=(blocks, rows.tiles),
        in_specs=[spec(inputs), *(spec(1) for _ in given)],
        out_specs=[
            spec_of_tile(*shape[1:]),
            spec_of_tile(padded, 1),
            *(spec(1) for _ in made),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.int8),
            jax.ShapeDtypeStruct((shape[0], padded, 1), jnp.int32),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in made),
        ],
        compiler_params=_parameters(2),
        interpret=interpret,
        name="slabs",
    )(x, *given)
    return arranged, offsets, *given, *made


def _parameters(axes: int):
    """Of a kernel whose programs depend on no other; with more than one row of a grid."""
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * axes, vmem_limit_bytes=VMEM)


# --- Ternary products -----------------------------------------------------------------------------


def ternary_sums(x, weights, experts, *, interpret=False) -> list[jax.Array]:
    """Exact sums over I of blocks of rows times the codes of each block's expert.

    x: int8 [blocks, R, I]
    weights: `quantize.PackedWeight`s [E, I, O] with rows of bytes, packed alike; experts are read
      where they lie
    experts: int32 [blocks]; a block whose expert is -1, or not there, is skipped: zeros
    interpret: run on any device, slowly

    Of each weight, int32 [blocks, R, O].
    """
    rows = row_tiles(x.shape[1], weights[0], 1)
    arranged = slabs(x, weights[0], rows, interpret=interpret)
    products = _products(*arranged, x.shape[1], rows, weights, experts, interpret=interpret)
    return [y[0] for y in products]


def scattered_dot(x, w, experts, kept, *, interpret=False, **options) -> jax.Array:
    """`quantize.scattered_dot`, as `ternary_dots`."""
    return ternary_dots(x, (w,), experts, kept, interpret=interpret, **options)[0]


def ternary_dots(
    x, weights, experts, kept=None, *, activations: str, axis_name=None, interpret=False, **_
) -> tuple:
    """`quantize.grouped_dots` of rows x [R, I] and weights that are packed alike, for each [R, O].

    Two kernels: one that rounds rows, and one that multiplies and scales. With I split over the
    devices of an axis, what is scaled are the sums of them all; kept: of these rows a part,
    [K / n, O].
    """
    levels, halves = (127 * 128, 2) if activations == "int15" else (127, 1)
    x = x.reshape(len(experts), -1, x.shape[1])
    whole, steps = axis_name is None or lax.axis_size(axis_name) == 1, None
    if not whole:
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=2, keepdims=True)
        largest = lax.pmax(largest, axis_name)
        steps = jnp.maximum(largest, 1e-30) * np.float32(1 / levels)
    rows = row_tiles(x.shape[1], weights[0], halves)
    *arranged, steps = slabs(x, weights[0], rows, levels, steps, interpret=interpret)
    products = functools.partial(
        _products, *arranged, x.shape[1], rows, weights, experts, interpret=interpret
    )
    scales = [w.scales[experts].astype(jnp.float32) for w in weights]  # [blocks, 1, O or 1]
    if whole:
        dots = products((steps, scales, x.dtype))
    else:
        dots = []
        for y, scale in zip(products(), scales, strict=True):
            y = y.reshape(len(y), -1, y.shape[-1])
            scale = (scale * steps).reshape(y.shape[1], -1)
            if kept is not None:
                scale = scale.at[kernels.part_of(kept, axis_name)].get(mode="clip")
            y = kernels.sums_of_devices(y, axis_name, kept)
            dots.append(_scaled(y, scale).astype(x.dtype))
    return tuple(y.reshape(-1, y.shape[-1]) for y in dots)


def _scaled(sums, scale):
    """Sums int32, one of the halves each, as float32."""
    high, *low = (y.astype(jnp.float32) for y in sums)
    return (128 * high + low[0] if low else high) * scale


def _products(arranged, offsets, count, rows, weights, experts, scaled=None, *, interpret):
    """Of each weight, int32 [1, blocks, R, O]; or [2, ...], both halves, of multiplied trits.

    arranged, offsets, count, rows: from `slabs`, R, the tiles
    scaled: None; or steps float32 [blocks, R, 1], of each weight its scales float32
      [blocks, 1, O or 1], and the dtype that products then have, [1, blocks, R, O]
    """
    if len(weights) > 1 and rows.padded > FEW_ROWS:  # with few, each call counts
        one = functools.partial(_products, arranged, offsets, count, rows, interpret=interpret)
        steps, scales, dtype = scaled or (None, weights, None)
        each = [(steps, [scale], dtype) if scaled else None for scale in scales]
        return [one([w], experts, of)[0] for w, of in zip(weights, each, strict=True)]
    first, blocks = weights[0], len(experts)
    width, stack = first.packed.shape[2], len(first.packed)
    columns, multiplied = width % LANES > 0, first.multipliers is not None
    turned = multiplied and first.multipliers.shape[2] % LANES == 0
    parts = output_tiles([w.packed.shape[1] for w in weights], width, rows.padded)
    experts = experts.astype(jnp.int32)
    experts = jnp.where((experts >= 0) & (experts < stack), experts, -1)

    def of_expert(*shape):  # the last axis, or the one before, is of outputs, `None` here
        def index(block, _, part, experts):
            expert = experts[block]
            part = jnp.where(expert < 0, 0, part)  # nothing is fetched for blocks that are skipped
            return (jnp.maximum(expert, 0), *(part if n is None else 0 for n in shape))

        return lambda size: pl.BlockSpec((1, *(n or size for n in shape)), index)

    arrays, in_specs, out_specs, shapes = [], [], [], []
    for w in weights:
        outputs = w.packed.shape[1]
        size = outputs // parts
        # XLA has the outputs side by side, unless rows of bytes or of groups fill vectors.
        arrays.append(w.packed.swapaxes(1, 2) if columns else w.packed)
        in_specs.append(of_expert(*((width, None) if columns else (None, width)))(size))
        if multiplied:
            groups, planes = w.multipliers.shape[2:]
            axes, shape = (
                ((0, 3, 1, 2), (None, groups)) if turned else ((0, 3, 2, 1), (groups, None))
            )
            arrays.append(w.multipliers.transpose(axes))
            in_specs.append(of_expert(planes, *shape)(size))
    if stack > 1 and not interpret:  # or XLA fetches all experts into the VMEM first
        arrays = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]
    moved = sum(array.size // stack for array in arrays) * blocks * rows.tiles

    made, dtype = 2 if multiplied and rows.halves == 2 else 1, jnp.int32
    if scaled:
        steps, scales, dtype = scaled
        made = 1
        arrays += [steps, *scales]
        in_specs.append(pl.BlockSpec((1, rows.size, 1), lambda b, r, *_: (b, r, 0)))
        for scale, w in zip(scales, weights, strict=True):
            one = scale.shape[2] == 1
            in_specs.append(
                pl.BlockSpec(
                    (1, 1, 1 if one else w.packed.shape[1] // parts),
                    (lambda b, r, o, _: (b, 0, 0)) if one else (lambda b, r, o, _: (b, 0, o)),
                )
            )
    for w in weights:
        size = w.packed.shape[1] // parts
        out_specs.append(pl.BlockSpec((made, 1, rows.size, size), lambda b, r, o, _: (0, b, r, o)))
        shapes.append(jax.ShapeDtypeStruct((made, blocks, count, w.packed.shape[1]), dtype))

    kernel = functools.partial(
        _kernel,
        len(weights),
        rows,
        scaled=bool(scaled),
        multiplied=multiplied,
        columns=columns,
        turned=turned,
    )

    def tile_of(array):
        axes = array.ndim - 1
        return pl.BlockSpec(
            (1, *array.shape[1:]), lambda b, r, *_: (b * rows.tiles + r, *[0] * axes)
        )

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, rows.tiles, parts),
            in_specs=[tile_of(arranged), tile_of(offsets), *in_specs],
            out_specs=out_specs,
        ),
        out_shape=shapes,
        compiler_params=_parameters(3),
        cost_estimate=pl.CostEstimate(
            flops=8 * moved * arranged.shape[2],
            transcendentals=0,
            bytes_accessed=moved + arranged.size + 4 * sum(math.prod(y.shape) for y in shapes),
        ),
        interpret=interpret,
        name="ternary_sums",
    )(experts, arranged, offsets, *arrays)


def _kernel(count, rows, experts_ref, *refs, scaled, multiplied, **order):
    """One tile of rows, and one of the outputs of each weight.

    refs: of each weight its packed bytes, and its multipliers if it has them; if sums are scaled,
      the steps of the rows, and of each weight its scales; of each weight what is made
    """
    product, each = (_multiplied, 2) if multiplied else (_product, 1)
    there = experts_ref[pl.program_id(0)] >= 0
    of_rows, refs = refs[:2], refs[2:]
    of_weights, of_scales, made = refs[: count * each], refs[count * each : -count], refs[-count:]

    @pl.when(there)
    def _():
        for i, y_ref in enumerate(made):
            total = product(*of_rows, rows, *of_weights[i * each : (i + 1) * each], **order)
            sums = [total[k * rows.size : (k + 1) * rows.size] for k in range(rows.halves)]
            if rows.halves == 2 and not multiplied:  # at most 32768 * 16256, in int32
                sums = [128 * sums[0] + sums[1]]
            if scaled:
                scale = of_scales[1 + i][0] * of_scales[0][0]
                sums = [_scaled(sums, scale).astype(y_ref.dtype)]
            for k, y in enumerate(sums):
                y_ref[k, 0] = y

    @pl.when(jnp.logical_not(there))
    def _():
        for y_ref in made:
            y_ref[...] = jnp.zeros_like(y_ref)


def _product(x_ref, offsets_ref, rows, packed_ref, *, columns, turned):  # int32 [rows.padded, O]
    """Masked codes stand for trit + 1, and in slab 3, where they may be 128, for trit - 1."""
    total = -offsets_ref[0]
    for slab in range(4):
        codes = packed_ref[0] & np.uint8(3 << 2 * slab)
        codes = codes ^ np.uint8(128) if slab == 3 else codes
        total += _slab_product(x_ref[0, slab], pltpu.bitcast(codes, jnp.int8), slab, columns)
    return total


def _multiplied(x_ref, _, rows, packed_ref, multipliers_ref, *, columns, turned):
    """int32 [rows.padded, O]; columns, turned: packed is [B, O], multipliers [P, O, G].

    Trits of a part of B are multiplied together, and the sums of its segments are apart. For that,
    there are as many copies of each row, each of which has zeros but for one segment.
    """
    _, planes, *shape = multipliers_ref.shape
    groups, outputs = reversed(shape) if turned else shape
    width = x_ref.shape[3]
    of_block = planes * SEGMENT * groups // width  # groups; 0 if all inputs are one

    def all_parts(wide_ref):  # rows of int32 can be read one by one
        for plane in range(planes):
            wide = multipliers_ref[0, plane].astype(jnp.int32)
            wide_ref[plane] = wide.T if turned else wide

        def add(part, here, total):
            packed = packed_ref[0, here] if columns else packed_ref[0, :, here]
            for slab in range(4):
                trits = _trits(packed, slab)
                sums = _slab_product(x_ref[0, slab, :, here], trits, slab, columns)
                for i in range(rows.copies):
                    block, plane = (part * rows.copies + i) // planes, i % planes
                    group = block * of_block + slab * of_block // 4
                    multipliers = wide_ref[plane, pl.ds(group, 1)]  # [1, O]
                    total += sums[i * rows.padded : (i + 1) * rows.padded] * multipliers
            return total

        return _for_each_part(
            width, x_ref.shape[2], add, jnp.zeros((rows.padded, outputs), jnp.int32)
        )

    return pl.run_scoped(all_parts, pltpu.VMEM((planes, groups, outputs), jnp.int32))


def _trits(packed, slab: int):
    """int8 trits of a slab of packed uint8, times 4 ** slab; four bytes at a time."""
    of_each = 0x01010101
    codes = pltpu.bitcast(packed, jnp.uint32)
    codes = (codes & np.uint32((3 << 2 * slab) * of_each)) + np.uint32((128 - 4**slab) * of_each)
    return pltpu.bitcast(codes ^ np.uint32(128 * of_each), jnp.int8)


def _slab_product(x, codes, slab: int, columns: bool):
    """x int8 [R, B] times int8 [O, B], 4 ** slab times too large; or [B, O], with columns."""
    inputs = ((1,), (0 if columns else 1,))
    sums = lax.dot_general(x, codes, (inputs, ((), ())), preferred_element_type=jnp.int32)
    return sums >> 2 * slab
