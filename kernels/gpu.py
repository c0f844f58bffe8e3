"""Kernels for NVIDIA GPUs, in Pallas for its Triton backend: ternary products, attention and glue.

Shapes: I inputs (the contracted axis), O outputs, E experts, R rows of a block, B bytes of packed
weights for one output, I = 4 B. How weights are packed: see `quantize.py`. Slab j of a packing
block is its weights at bits 2 j and 2 j + 1: as many, side by side, as the block has bytes.
Weights with multipliers have P planes of trits, so that I = 4 B / P, and G groups of inputs.

A GPU that decodes waits for weights, but only if unpacking takes few instructions: an H200 reads
17e12 packed weights a second, and has time for one integer instruction for each. So nothing is
unpacked that the tensor cores can take as it lies: bytes masked with 3 << 2 j are int8 operands,
4 ** j times too large, and as shifts cost more than masks, the sum is shifted instead, once, at
the end. Multipliers come before the product, so weights that have them are unpacked, but four at a
time. All sums are integers and exact: no tile and no split of I shows in a result.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# --- Ternary products -----------------------------------------------------------------------------

STEP = 64  # bytes of weights of an output that a kernel takes at a time
SMALLEST = 8  # rows of the smallest tensor core operand; fewer are filled up with zeros
SMALLEST_OUTPUTS = 16  # of a tile: those of the other operand


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    rows, outputs: the most rows of a block, and the most columns of O; powers of two
    warps, stages: what Triton calls so: groups of 32 threads, and loads on their way at a time
    programs: I is split until there are this many programs, so that no part of a GPU idles
    shift: unpack by shifting, with one accumulator, and not by masking with four
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    programs: int
    shift: bool


# Four accumulators fit with few rows, and then the masks leave the memory as the only limit. With
# many rows the tensor cores are the limit, and one accumulator leaves room for a larger tile.
FEW_ROWS = Tile(rows=16, outputs=128, warps=4, stages=4, programs=512, shift=False)
MANY_ROWS = Tile(rows=128, outputs=128, warps=8, stages=3, programs=264, shift=True)
# With fewer outputs than threads, each thread loads the multipliers that it needs. With more, they
# would go through shared memory, with two barriers for each group and plane.
FEW_ROWS_MULTIPLIED = Tile(rows=16, outputs=64, warps=4, stages=4, programs=512, shift=True)


def takes(
    x_shape: tuple[int, ...],
    packed_shape: tuple[int, ...],
    block: int,
    multipliers_shape: tuple[int, ...] | None = None,
) -> bool:
    """Whether `ternary_sums` has a kernel for x [blocks, R, I] and packed [E, O, B].

    multipliers_shape: [E, O, G, P], where there are any
    """
    shapes = (x_shape, packed_shape, multipliers_shape or (*packed_shape[:2], 1, 1))
    if [len(shape) for shape in shapes] != [3, 3, 4] or 0 in sum(shapes, ()):
        return False
    (_, rows, inputs), (*of, width), (*of_multipliers, groups, planes) = shapes
    steps = width // (planes * STEP)
    multiplied = block == STEP and planes <= 2 and groups in (1, steps, 2 * steps, 4 * steps)
    return (
        (multiplied if multipliers_shape else STEP % block == 0)
        and width == steps * planes * STEP
        and inputs == 4 * steps * STEP  # no padding
        and of[1] % SMALLEST_OUTPUTS == 0
        and of == of_multipliers
    )


def takes_weight(x, w, *_) -> bool:
    """Whether `ternary_sums` has a kernel for x and a `quantize.PackedWeight` [E, I, O]."""
    return x.dtype == jnp.int8 and _takes_packed(x.shape, w)


def takes_dots(x, weights, experts, *, activations, **_) -> bool:
    """As `takes_weight`, of `ternary_dots`."""
    return all(_takes_packed((1, *x.shape), w) for w in weights)


def takes_gated(x, gate, up, experts, *, activations) -> bool:
    return takes_dots(x, (gate, up), experts, activations=activations)


def _takes_packed(x_shape, w) -> bool:
    if w.interleaved or w.padding:
        return False
    multipliers_shape = None if w.multipliers is None else w.multipliers.shape
    return takes(x_shape, w.packed.shape, w.block, multipliers_shape)


def tile_for(rows: int, multipliers: bool = False) -> Tile:
    """The tile for blocks of R rows, of weights with multipliers or without."""
    if rows > FEW_ROWS.rows:
        return MANY_ROWS
    return FEW_ROWS_MULTIPLIED if multipliers else FEW_ROWS


def ternary_sums(
    x: jax.Array,
    packed: jax.Array,
    experts: jax.Array,
    block: int,
    multipliers: jax.Array | None = None,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:  # int32 [blocks, R, O]
    """Exact sums over I of blocks of rows times the codes of each block's expert.

    x: int8 [blocks, R, I]
    packed: uint8 [E, O, B]; experts are read where they lie
    experts: int32 [blocks]; a block whose expert is -1, or not there, is skipped: zeros
    block: bytes of a packing block; `takes` says which shapes will do
    multipliers: int8 [E, O, G, P], at least 0, and of all planes at most 127; None: trits are codes
    interpret: run on any device, slowly
    """
    weights = [(packed,) if multipliers is None else (packed, multipliers)]
    return _sums(x, weights, experts, block, tile, interpret)[0]


def ternary_dots(
    x: jax.Array, weights, experts: jax.Array, *, activations: str, interpret: bool = False, **_
) -> tuple:
    """`quantize.grouped_dots` of rows x [R, I] and `quantize.PackedWeight`s, for each [R, O].

    Two launches, or one for `quantize.RoundedRows`, and what XLA makes of scaling the sums.
    """
    rows, step = _rounded(x, activations, interpret)
    arrays = [_arrays_of(w) for w in weights]
    x_blocks = rows.reshape(len(experts), -1, x.shape[1])
    sums = _sums(x_blocks, arrays, experts, weights[0].block, None, interpret)

    def scaled(y, w):
        y = y.reshape(*rows.shape[:2], -1)  # [R, halves, O]
        gamma = w.scales[experts, 0].astype(jnp.float32)
        gamma = jnp.repeat(gamma, x.shape[0] // len(experts), axis=0)
        return (_joined(y, w.multipliers is None) * (gamma * step)).astype(x.dtype)

    return tuple(scaled(y, w) for y, w in zip(sums, weights, strict=True))


def gated_dot(
    x: jax.Array, gate, up, experts: jax.Array, *, activations: str, interpret: bool = False
) -> jax.Array:
    """`quantize.gated_dot`, as `ternary_dots`; GELU in float32, rounded to the dtype of x."""
    tokens = jnp.arange(x.shape[0], dtype=jnp.int32)
    return _gated(x, gate, up, tokens, experts, activations, interpret)


def gated_rows(x, gate, up, blocks, *, activations: str, interpret: bool = False) -> jax.Array:
    """`experts.gated_rows`: `gated_dot` of rows that are read where their tokens x [T, I] lie."""
    tokens, experts = blocks.token_of_row, blocks.expert_of_block
    return _gated(x, gate, up, tokens, experts, activations, interpret)


def _gated(x, gate, up, tokens, experts, activations, interpret):  # [T, I] -> [R, O]
    """Tokens are rounded, if they are not, and the rows of tokens [R] multiplied; zeros beyond T.

    A program sums over all of I: GELU needs the whole sum.
    """
    x_rows, step = _rounded(x, activations, interpret)  # [T, halves, I], [T, 1]
    halves, outputs = x_rows.shape[1], gate.shape[-1]
    tokens = tokens.reshape(len(experts), -1).astype(jnp.int32)
    arrays = [_arrays_of(w) for w in (gate, up)]
    tile = tile_for(halves * tokens.shape[1], len(arrays[0]) > 1)
    tile = dataclasses.replace(tile, outputs=min(tile.outputs, 64), programs=1)  # two sums fit
    shape = (*tokens.shape[:1], halves * tokens.shape[1], x.shape[1])
    plan = _Plan.of(shape, arrays, gate.block, tile, interpret)
    offsets = []  # of codes that stand for trit + 1
    if tile.shift and len(arrays[0]) == 1:
        offsets = [jnp.sum(x_rows, axis=2, dtype=jnp.int32)]
    y = pl.pallas_call(
        functools.partial(_gated_kernel, plan=plan, halves=halves),
        grid=plan.grid[:2],
        out_shape=jax.ShapeDtypeStruct((*tokens.shape, outputs), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="gated_dot",
    )(
        experts.astype(jnp.int32),
        tokens,
        x_rows,
        *offsets,
        step,
        *(w.scales.astype(jnp.float32) for w in (gate, up)),
        *(array for of_weight in arrays for array in of_weight),
    )
    return y.reshape(-1, outputs)


def _arrays_of(w) -> tuple:
    return (w.packed,) if w.multipliers is None else (w.packed, w.multipliers)


def _rounded(x, activations: str, interpret: bool):
    """Rows x [R, I] as int8 [R, halves, I] and their steps [R, 1]; int15 has two halves, `_joined`
    puts them together."""
    if hasattr(x, "integers"):  # `quantize.RoundedRows`
        integers, step = x.integers, x.step
    else:
        levels, halves = _levels(activations)
        integers, step = quantize_rows(x, levels, jnp.int8, halves=halves, interpret=interpret)
    return integers.reshape(len(integers), -1, x.shape[1]), step


def _levels(activations: str) -> tuple[int, int]:
    """The largest integer, and how many of int8 make one."""
    return (127, 1) if activations == "int8" else (127 * 128, 2)


def _joined(sums, trits: bool):
    """float32 [R, O] of the sums of halves, int32 [R, halves, O].

    Those of trits stay below 2^31. Others are added as floats: no product of ours rounds otherwise.
    """
    sums = sums if trits else sums.astype(jnp.float32)
    if sums.shape[1] == 1:
        return sums[:, 0].astype(jnp.float32)
    return (128 * sums[:, 0] + sums[:, 1]).astype(jnp.float32)


def _is_there(expert, packed):
    return (expert >= 0) & (expert < packed.shape[0])


def _check(name: str, array, shape, dtype) -> None:
    """ValueError for an array of another shape or dtype; Pallas would read beyond its end."""
    if array.shape != tuple(shape) or array.dtype != dtype:
        wanted = f"{jnp.dtype(dtype).name} {list(shape)}"
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {wanted}")


def _splits(programs: int, steps: int, wanted: int) -> int:
    """Into how many equal parts to split `steps`, to make `programs` the number wanted or more."""
    divisors = [n for n in range(1, steps + 1) if steps % n == 0]
    return next((n for n in divisors if n * programs >= wanted), steps)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How programs share the products of blocks of rows and some weights, [E, O, B] each.

    grid: tiles of rows of all blocks, of outputs of all weights, and parts of I
    tiles: of outputs, for each weight; rows, outputs: of a tile; steps: of a part
    arrays: of each weight: packed and, where there are any, multipliers
    """

    grid: tuple[int, int, int]
    row_tiles: int
    rows: int
    tiles: tuple[int, ...]
    outputs: int
    steps: int
    arrays: int
    block: int
    shift: bool
    interpret: bool

    @classmethod
    def of(cls, shape, weights, block: int, tile: Tile, interpret: bool) -> "_Plan":
        blocks, rows, inputs = shape
        tile_rows = min(tile.rows, max(SMALLEST, pl.next_power_of_2(rows)))
        row_tiles = pl.cdiv(rows, tile_rows)
        sizes = [arrays[0].shape[1] for arrays in weights]
        outputs = math.gcd(tile.outputs, *sizes)  # powers of two
        tiles = tuple(size // outputs for size in sizes)
        # Programs that share their weights come one after another, and find them in the cache.
        grid = (blocks * row_tiles, sum(tiles))
        steps = inputs // (4 * STEP)
        parts = _splits(math.prod(grid), steps, tile.programs)
        return cls(
            (*grid, parts),
            row_tiles,
            tile_rows,
            tiles,
            outputs,
            steps // parts,
            len(weights[0]),
            block,
            tile.shift,
            interpret,
        )


def _sums(x, weights, experts, block: int, tile: Tile | None, interpret: bool) -> list:
    """Exact sums int32 [blocks, R, O] of each weight, of one launch.

    weights: (packed,) or (packed, multipliers) of each
    """
    for arrays in weights:
        multipliers_shape = arrays[1].shape if len(arrays) > 1 else None
        if not takes(x.shape, arrays[0].shape, block, multipliers_shape):
            found = f"{x.shape} times {arrays[0].shape} in blocks of {block} bytes"
            found += f" with multipliers {multipliers_shape}" if multipliers_shape else ""
            raise ValueError(f"no kernel for {found}")
        _check("packed", arrays[0], arrays[0].shape, jnp.uint8)
        if multipliers_shape:
            _check("multipliers", arrays[1], multipliers_shape, jnp.int8)
    _check("x", x, x.shape, jnp.int8)
    _check("experts", experts, x.shape[:1], experts.dtype)
    tile = tile or tile_for(x.shape[1], len(weights[0]) > 1)
    plan = _Plan.of(x.shape, weights, block, tile, interpret)
    total = sum(plan.tiles) * plan.outputs
    parts = pl.pallas_call(
        functools.partial(_sums_kernel, plan=plan),
        grid=plan.grid,
        out_shape=jax.ShapeDtypeStruct((len(x), plan.grid[2], x.shape[1], total), jnp.int32),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="ternary_many_rows" if tile.rows > FEW_ROWS.rows else "ternary_few_rows",
    )(experts.astype(jnp.int32), x, *(array for arrays in weights for array in arrays))
    sums = jnp.sum(parts, axis=1)
    if tile.shift and len(weights[0]) == 1:
        # So far of trit + 1; in the kernel, that would cost more than the unpacking.
        offsets = jnp.sum(x, axis=2, keepdims=True, dtype=jnp.int32)
        sums -= jnp.where(_is_there(experts, weights[0][0])[:, None, None], offsets, 0)
    ends = np.cumsum(plan.tiles)[:-1] * plan.outputs
    return jnp.split(sums, ends, axis=2)


def _sums_kernel(experts_ref, x_ref, *refs, plan: _Plan):
    """One tile of rows and of the outputs of one weight, one part of I."""
    *weights_refs, sums_ref = refs
    each = plan.arrays
    block, part = pl.program_id(0) // plan.row_tiles, pl.program_id(2)
    first_row = pl.program_id(0) % plan.row_tiles * plan.rows
    first_tile, tile_of_all = 0, pl.program_id(1)

    def x_at(column):
        row, _ = _indices(first_row, plan.rows, 0, STEP)
        return triton.load(x_ref.at[block, row, column], mask=row < x_ref.shape[1], other=0)

    for i, tiles in enumerate(plan.tiles):
        refs, tile = weights_refs[i * each : (i + 1) * each], tile_of_all - first_tile

        def one(refs=refs, tile=tile):
            total = _tile_sums(experts_ref, x_at, x_ref, refs, block, tile, part, plan)
            first_column = tile_of_all * plan.outputs
            row, column = _indices(first_row, plan.rows, first_column, plan.outputs)
            there = row < x_ref.shape[1]
            triton.store(sums_ref.at[block, part, row, column], total, mask=there)

        if len(plan.tiles) == 1:
            one()
        else:
            pl.when((tile >= 0) & (tile < tiles))(one)
        first_tile += tiles


def _gated_kernel(experts_ref, tokens_ref, x_ref, *refs, plan: _Plan, halves: int):
    """gelu(x @ gate) * (x @ up) of one tile of rows, with their halves, and of outputs."""
    *offsets_ref, steps_ref, gate_scales_ref, up_scales_ref = refs[: -2 * plan.arrays - 1]
    scales_refs, y_ref = (gate_scales_ref, up_scales_ref), refs[-1]
    weights_refs, each = refs[-2 * plan.arrays - 1 : -1], plan.arrays
    block = pl.program_id(0) // plan.row_tiles
    expert = jnp.maximum(experts_ref[block], 0)
    rows = plan.rows // halves
    first_row = pl.program_id(0) % plan.row_tiles * rows
    first_output = pl.program_id(1) * plan.outputs
    outputs = pl.ds(first_output, plan.outputs)

    def tokens_of(row):  # and which of them there are
        there = row < tokens_ref.shape[1]
        token = triton.load(tokens_ref.at[block, row], mask=there, other=-1)
        return token, there & (token >= 0) & (token < x_ref.shape[0])

    half = jnp.arange(plan.rows, dtype=jnp.int32)
    token_of_half, half_there = tokens_of(first_row + half // halves)
    half %= halves

    def x_at(column):
        token, of_token, there = (
            jnp.broadcast_to(x[:, None], column.shape) for x in (token_of_half, half, half_there)
        )
        return triton.load(x_ref.at[token, of_token, column], mask=there, other=0)

    def product(i):
        refs = weights_refs[i * each : (i + 1) * each]
        total = _tile_sums(experts_ref, x_at, x_ref, refs, block, pl.program_id(1), 0, plan)
        if offsets_ref:
            offsets = triton.load(offsets_ref[0].at[token_of_half, half], mask=half_there, other=0)
            offsets = jnp.broadcast_to(offsets[:, None], total.shape)
            total -= jnp.where(_is_there(experts_ref[block], refs[0]), offsets, 0)
        total = total if each == 1 else total.astype(jnp.float32)
        if halves == 2:
            low, _ = _indices(0, plan.rows, 0, plan.outputs)
            total = total * jnp.where(low % 2 == 0, 128, 1).astype(total.dtype)
            total = jnp.sum(total.reshape(rows, 2, plan.outputs), axis=1)
        alone = scales_refs[i].shape[2] == 1
        gamma = scales_refs[i][expert, 0, 0 if alone else outputs]
        return total.astype(jnp.float32) * (gamma * step)

    row, column = _indices(first_row, rows, first_output, plan.outputs)
    token, there = tokens_of(row)
    step = triton.load(steps_ref.at[token, 0 * row], mask=there, other=0)
    gate, up = product(0), product(1)
    there = row < tokens_ref.shape[1]
    triton.store(y_ref.at[block, row, column], (_gelu(gate) * up).astype(y_ref.dtype), mask=there)


def _gelu(x):
    """`jax.nn.gelu`, its approximation by tanh, as x times a logistic function."""
    return x / (1 + jnp.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


def _tile_sums(experts_ref, x_at, x_ref, refs, block, tile, part, plan: _Plan):
    """int32 [rows, outputs] of a tile; refs: packed and, where there are any, multipliers.

    x_at: gives the tile's rows of columns [rows, STEP]
    Where plan.shift, of trits that are 1 too large.
    """
    packed_ref, *multipliers_ref = refs
    outputs = pl.ds(tile * plan.outputs, plan.outputs)
    expert = experts_ref[block]
    groups, planes = multipliers_ref[0].shape[2:] if multipliers_ref else (1, 1)
    groups = 4 * STEP * groups // x_ref.shape[-1]  # of a step; none if all inputs are one

    def packed_at(start, plane):
        return packed_ref[expert, outputs, pl.ds(start * planes + plane * STEP, STEP)]

    def multipliers_at(start, group, plane):  # [outputs, STEP], alike along STEP
        m = multipliers_ref[0][expert, outputs, start // STEP * groups + group, plane]
        return jnp.broadcast_to(m[:, None], (plan.outputs, STEP))

    def add_step(i, state):
        sums, offsets = list(state[0]), state[1]
        start = (part * plan.steps + i) * STEP  # of a plane
        codes = [packed_at(start, plane) for plane in range(planes)]
        if multipliers_ref:
            multipliers = [
                [multipliers_at(start, group, plane) for plane in range(planes)]
                for group in range(max(1, groups))
            ]
        for slab in range(4):
            _, column = _indices(0, plan.rows, 0, STEP)
            if plan.block < STEP:  # several packing blocks, each of four slabs
                column = column // plan.block * (4 * plan.block) + column % plan.block
            column += 4 * start + slab * plan.block
            x = x_at(column)
            if multipliers_ref:
                w = _summed(codes, multipliers[slab * groups // 4], slab, plan.interpret)
            elif plan.shift:
                w = _shifted(codes[0], slab, plan.interpret)
            else:
                w = _masked(codes[0], slab)
            sums[slab % len(sums)] += lax.dot_general(
                w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
            )
            if not plan.shift:  # masked codes stand for trit + 1, and in slab 3 for trit - 1
                offsets += x.astype(jnp.int32) * (-1 if slab == 3 else 1)
        return tuple(sums), offsets

    zeros = jnp.zeros((plan.outputs, plan.rows), jnp.int32)
    start = ((zeros,) * (1 if plan.shift else 4), jnp.zeros((plan.rows, STEP), jnp.int32))
    count = jnp.where(_is_there(expert, packed_ref), jnp.int32(plan.steps), jnp.int32(0))
    sums, offsets = lax.fori_loop(jnp.int32(0), count, add_step, start)
    total = functools.reduce(jnp.add, (s >> 2 * slab for slab, s in enumerate(sums))).T
    return total - jnp.sum(offsets, axis=1, keepdims=True)


def _indices(first_row, rows: int, first_column, columns: int):
    """Row and column numbers, int32 [rows, columns] each."""
    row, column = (lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))
    return first_row + row, first_column + column


def _masked(codes, slab: int):
    """int8 4 ** slab * (trit + 1); of slab 3, where that may be 128, 64 * (trit - 1)."""
    w = codes & jnp.uint8(3 << 2 * slab)
    return (w ^ jnp.uint8(128) if slab == 3 else w).astype(jnp.int8)


def _shifted(codes, slab: int, interpret: bool):
    """int8 trit + 1. In assembly, for four bytes at a time: Triton would shift each alone."""
    if interpret:
        return (codes >> jnp.uint8(2 * slab) & jnp.uint8(3)).astype(jnp.int8)
    assembly = f"{{ .reg .b32 t; shr.u32 t, $1, {2 * slab}; and.b32 $0, t, 0x03030303; }}"
    return _in_assembly(assembly, [codes])


def _summed(codes, multipliers, slab: int, interpret: bool):
    """int8 sum over planes of trit * multiplier. In assembly, for four bytes at a time.

    There a byte starts at 128, the multipliers are subtracted, and each (trit + 1) * multiplier is
    added. It is between 1 and 255 all the time, so that no byte spoils the next one.
    """
    planes = len(codes)
    if interpret:
        trits = (_shifted(plane, slab, interpret) - jnp.int8(1) for plane in codes)
        return sum((t * m for t, m in zip(trits, multipliers, strict=True)), jnp.int8(0))
    steps = [
        f"""sub.u32 sum, sum, ${planes + i}; and.b32 m, ${planes + i}, 255;
        shr.u32 t, ${i}, {2 * slab}; and.b32 t, t, 0x03030303; mad.lo.u32 sum, t, m, sum;"""
        for i in range(1, planes + 1)
    ]
    assembly = f"""{{ .reg .b32 t, m, sum; mov.b32 sum, 0x80808080; {" ".join(steps)}
        xor.b32 $0, sum, 0x80808080; }}"""
    return _in_assembly(assembly, [*codes, *multipliers])


def _in_assembly(assembly: str, arrays):
    """An int8 array made of others of bytes, four of each in a register."""
    (w,) = triton.elementwise_inline_asm(
        assembly,
        args=arrays,
        constraints=",".join(["=r", *"r" * len(arrays)]),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, jnp.int8)],
    )
    return w


# --- Attention ------------------------------------------------------------------------------------

SLOTS = 64  # of the cache, that a program takes at a time
ATTENTION_PROGRAMS = 128  # the cache is split into parts until there are about this many programs


def takes_attention(
    q, k, v, keys, values, positions, frequencies, *, multiplier: float, cap: float
) -> bool:
    """Whether `decode_attention` has a kernel for q [B, 1, N, H] and a cache [B, K, S, H]."""
    (batch, queries, heads, size), (kv_heads, slots) = q.shape, keys.shape[1:3]
    return (
        queries == 1
        and 0 not in (*q.shape, *keys.shape)
        and k.shape == v.shape == (batch, 1, kv_heads, size)
        and keys.shape == values.shape == (batch, kv_heads, slots, size)
        and heads % kv_heads == 0
        and size in (16, 32, 64, 128)
        and slots % SLOTS == 0
        and all(x.dtype == q.dtype for x in (k, v, keys, values))
    )


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    frequencies: jax.Array,
    *,
    multiplier: float,
    cap: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`model.attend_and_write` of one token a row: attention [B, 1, N, H], and keys and values.

    q [B, 1, N, H], k, v [B, 1, K, H] are not rotated; keys, values [B, K, S, H]; positions int32
    [B, 1]. A row sees the slots before its position, little more is read, and its own token unless
    there is no slot for it; where the position is negative it is zeros, and nothing is written.
    Query heads g G to g G + G - 1, where G = N / K, share key/value head g.

    No logit is above the cap, so the softmax needs no maximum: parts of the cache sum
    exp(logit - cap) and exp(logit - cap) v by themselves, in float32, and their sums are added.
    Needs a cap of at most `kernels.LARGEST_CAP`.
    """
    arrays = q, k, v, keys, values, positions, frequencies
    if not takes_attention(*arrays, multiplier=multiplier, cap=cap):
        found = ", ".join(f"{x.dtype} {list(x.shape)}" for x in arrays[:5])
        raise ValueError(f"no kernel for q, k, v and cache {found}")
    batch, _, heads, size = q.shape
    kv_heads, slots = keys.shape[1:3]
    _check("positions", positions, (batch, 1), positions.dtype)
    _check("frequencies", frequencies, (size // 2,), jnp.float32)
    group = heads // kv_heads
    parts = min(max(1, ATTENTION_PROGRAMS // (batch * kv_heads)), slots // SLOTS)
    angles = positions * frequencies
    kernel = functools.partial(
        _attention_kernel,
        group=group,
        multiplier=multiplier,
        cap=cap,
    )
    shapes = [
        jax.ShapeDtypeStruct((batch, kv_heads, parts, group, n), jnp.float32) for n in (size, 1)
    ]
    caches = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (keys, values)]
    sums, weights, keys, values = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, parts),
        out_shape=(*shapes, *caches),
        input_output_aliases={4: 2, 5: 3},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(
        positions[:, 0].astype(jnp.int32),
        jnp.sin(angles),
        jnp.cos(angles),
        jnp.concatenate([q, k, v], axis=2)[:, 0],  # made in one launch
        keys,
        values,
    )
    y = pl.pallas_call(
        _joined_attention_kernel,
        grid=(batch, kv_heads),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, group, size), q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="joined_attention",
    )(sums, weights)
    return y.reshape(q.shape), keys, values


def _attention_kernel(
    positions_ref,
    sin_ref,
    cos_ref,
    heads_ref,
    keys_ref,
    values_ref,
    sums_ref,
    weights_ref,
    new_keys_ref,
    new_values_ref,
    *,
    group,
    multiplier,
    cap,
):
    """One row's query heads of one key/value head, over an equal part of the row's own slots.

    The first part has the new token, too, which it writes; the others do not look at its slot.
    """
    row, head, part = (pl.program_id(axis) for axis in range(3))
    (kv_heads, slots, size), position = keys_ref.shape[1:], positions_ref[row]
    tile_rows = max(16, pl.next_power_of_2(group))
    query, column = _indices(0, tile_rows, 0, size)

    def rotated(load, column):  # as `model.rotary_embedding`
        half = size // 2
        x, pair = load(column), load((column + half) % size)
        sin, cos = (triton.load(ref.at[row, column % half]) for ref in (sin_ref, cos_ref))
        sin = jnp.where(column < half, -sin, sin)
        return (x.astype(jnp.float32) * cos + pair.astype(jnp.float32) * sin).astype(x.dtype)

    def weights_of(products):  # of queries and keys
        return jnp.exp(cap * jnp.tanh(products * multiplier / cap) - cap)

    dot = functools.partial(
        lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    there = query < group
    of_query, of_key = head * group + query, kv_heads * group + head
    q = rotated(
        lambda at: triton.load(heads_ref.at[row, of_query, at], mask=there, other=0), column
    )
    every = jnp.arange(size, dtype=jnp.int32)
    key = rotated(lambda at: triton.load(heads_ref.at[row, of_key, at]), every)
    value = triton.load(heads_ref.at[row, of_key + kv_heads, every])
    written = (part == 0) & (position >= 0) & (position < slots)
    slot, mask = jnp.clip(position, 0, slots - 1), (every >= 0) & written
    triton.store(new_keys_ref.at[row, head, slot, every], key, mask=mask)
    triton.store(new_values_ref.at[row, head, slot, every], value, mask=mask)
    key, value = (jnp.broadcast_to(x[None], q.shape).astype(jnp.float32) for x in (key, value))
    product = jnp.sum(q.astype(jnp.float32) * key, axis=1, keepdims=True)
    w = jnp.where(written, weights_of(product), 0)
    start = w.astype(q.dtype).astype(jnp.float32) * value, w

    length = jnp.clip(position, 0, slots)  # of what was there before
    tiles = pl.cdiv(length, SLOTS)
    share = pl.cdiv(tiles, pl.num_programs(2))

    def add_tile(i, state):
        sums, weights = state
        seen = pl.ds(i * SLOTS, SLOTS)
        products = dot(q, keys_ref[row, head, seen, :], (((1,), (1,)), ((), ())))
        _, slot = _indices(0, tile_rows, i * SLOTS, SLOTS)
        w = jnp.where(slot < length, weights_of(products), 0)
        v = values_ref[row, head, seen, :]
        sums += dot(w.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        return sums, weights + jnp.sum(w, axis=1, keepdims=True)

    end = jnp.minimum((part + 1) * share, tiles)
    sums, weights = lax.fori_loop(part * share, end, add_tile, start)
    triton.store(sums_ref.at[row, head, part, query, column], sums, mask=there)
    query, column = _indices(0, tile_rows, 0, 1)
    triton.store(weights_ref.at[row, head, part, query, column], weights, mask=query < group)


def _joined_attention_kernel(sums_ref, weights_ref, y_ref):
    """The sums of all parts over those of their weights; zeros where nothing was seen."""
    row, head = pl.program_id(0), pl.program_id(1)
    parts, group, size = sums_ref.shape[2:]
    query, column = _indices(0, pl.next_power_of_2(group), 0, size)
    there = query < group

    def add_part(part, state):
        found = (
            triton.load(ref.at[row, head, part, query, at], mask=there, other=0)
            for ref, at in ((sums_ref, column), (weights_ref, 0 * column))
        )
        return tuple(map(jnp.add, state, found))

    zeros = jnp.zeros(query.shape, jnp.float32)
    sums, weights = lax.fori_loop(jnp.int32(0), jnp.int32(parts), add_part, (zeros, zeros))
    y = (sums / jnp.where(weights > 0, weights, 1)).astype(y_ref.dtype)
    triton.store(y_ref.at[row, head, query, column], y, mask=there)


# --- Norm and rounding ----------------------------------------------------------------------------
#
# A row for each program. XLA makes two launches of a norm and three of rounding to integers, and a
# launch takes about as long as reading ten million weights.


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, interpret: bool = False) -> jax.Array:
    """scale * x / rms(x), in float32, of rows x [R, D] in their dtype; scale float32 [D]."""
    return _norm([x], scale, eps, "rms_norm", interpret)[0]


def rounded_norm(x, scale, eps: float, activations: str, *, interpret: bool = False) -> tuple:
    """`quantize.RoundedRows` of `rms_norm`: rows, integers and step."""
    return tuple(_norm([x], scale, eps, "rounded_norm", interpret, *_levels(activations)))


def added_norm(h, x, scale, eps: float, *, interpret: bool = False) -> jax.Array:
    """h + rms_norm(x, scale), which is rounded to their dtype before it is added."""
    _check("h", h, x.shape, x.dtype)
    return _norm([x, h], scale, eps, "added_norm", interpret)[0]


def _norm(arrays, scale, eps, name, interpret, levels=0, halves=0):
    """The norm of the first of some arrays, plus the second; with levels rounded then, too."""
    x = arrays[0]
    _check("scale", scale, x.shape[-1:], jnp.float32)

    def kernel(x_ref, *refs):
        *added_ref, scale_ref, y_ref = refs[: len(arrays) + 1]
        row, column, here = _row_of(x_ref)
        x = triton.load(x_ref.at[row, column], mask=here, other=0).astype(jnp.float32)
        scale = triton.load(scale_ref.at[column], mask=here, other=0)
        y = scale * x * lax.rsqrt(jnp.sum(x * x) / x_ref.shape[1] + eps)
        if added_ref:
            h = triton.load(added_ref[0].at[row, column], mask=here, other=0)
            y = h.astype(jnp.float32) + y.astype(h.dtype).astype(jnp.float32)
        y = y.astype(y_ref.dtype)
        triton.store(y_ref.at[row, column], y, mask=here)
        if levels:
            _store_rounded(y, x_ref.shape[1], levels, *refs[-2:])

    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if levels:
        out += _rounded_shapes(x, halves, jnp.int8)
    return _rows_call(kernel, x.shape, out, name, interpret)(*arrays, scale)


def quantize_rows(x: jax.Array, levels: int, dtype, *, halves: int = 1, interpret: bool = False):
    """Rows x [R, I] as integers of a dtype and a float32 step [R, 1], see `quantize.quantize_rows`.

    levels: the largest integer
    halves: 2 for [R, 2 I], `quantize.high_and_low` side by side
    """

    def kernel(x_ref, *refs):
        row, column, here = _row_of(x_ref)
        x = triton.load(x_ref.at[row, column], mask=here, other=0)
        _store_rounded(x, x_ref.shape[1], levels, *refs)

    out = _rounded_shapes(x, halves, dtype)
    return _rows_call(kernel, x.shape, out, "quantize_rows", interpret)(x)


def _rounded_shapes(x, halves: int, dtype) -> list:
    shapes = ((len(x), halves * x.shape[-1]), dtype), ((len(x), 1), jnp.float32)
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def _store_rounded(x, width: int, levels: int, integers_ref, step_ref):
    """Rounds this program's row x, of which `width` are there and all others zeros."""
    x, row, column = x.astype(jnp.float32), pl.program_id(0), jnp.arange(len(x), dtype=jnp.int32)
    here = column < width
    step = jnp.maximum(jnp.max(jnp.abs(x)), 1e-30) * np.float32(1 / levels)
    step_ref[row, 0] = step
    integers = _round(x / step).astype(jnp.int32)
    if integers_ref.shape[1] == 2 * width:
        high = (integers + 64) >> 7
        low = (integers - (high << 7)).astype(integers_ref.dtype)
        triton.store(integers_ref.at[row, width + column], low, mask=here)
        integers = high
    triton.store(integers_ref.at[row, column], integers.astype(integers_ref.dtype), mask=here)


def _row_of(ref):
    """This program's row, its columns up to a power of two, and which of them there are."""
    column = jnp.arange(pl.next_power_of_2(ref.shape[1]), dtype=jnp.int32)
    return pl.program_id(0), column, column < ref.shape[1]


def _rows_call(kernel, shape, out, name: str, interpret: bool):
    if len(shape) != 2:
        raise ValueError(f"{name} takes rows of rank 2, found {list(shape)}")
    return pl.pallas_call(
        kernel,
        grid=(shape[0],),
        out_shape=out,
        compiler_params=triton.CompilerParams(
            num_warps=8 if shape[1] <= 1 << 13 else 16, num_stages=1
        ),
        interpret=interpret,
        name=name,
    )


def _round(x):
    """`jnp.round`, halves to even, which this backend lacks."""
    low = jnp.floor(x)
    above = x - low
    odd = low != 2 * jnp.floor(low / 2)
    return low + jnp.where((above > 0.5) | ((above == 0.5) & odd), 1.0, 0.0)


# --- Router ---------------------------------------------------------------------------------------

ROUTED = 16  # rows at most: each program reads all of the matrix
CHUNK = 1024  # of its inputs, that are taken at a time


def takes_route(x, w, valid, *, selected: int) -> bool:
    """Whether `route` has a kernel for x [R, D] and w [D, E]."""
    powers = (2, 4, 8, 16, 32)  # of two, as all sizes of Triton
    return 0 < len(x) <= ROUTED and w.shape[1] in powers and w.dtype == jnp.float32


def route(x, w, valid, *, selected: int, interpret: bool = False) -> tuple:
    """`model.routed`, in one launch, which XLA makes of three. A program has a row."""
    (rows, size), count = x.shape, w.shape[1]
    _check("w", w, (size, count), jnp.float32)
    _check("valid", valid, (rows,), jnp.bool)

    def kernel(x_ref, w_ref, valid_ref, logits_ref, probs_ref, gates_ref, index_ref):
        row, expert = pl.program_id(0), jnp.arange(count, dtype=jnp.int32)

        def add_chunk(i, sums):
            inputs, column = _indices(i * CHUNK, CHUNK, 0, count)
            there = inputs < size
            x = triton.load(x_ref.at[row, inputs], mask=there, other=0)
            w = triton.load(w_ref.at[inputs, column], mask=there, other=0)
            return sums + x.astype(jnp.float32) * w

        zeros = jnp.zeros((CHUNK, count), jnp.float32)
        chunks = jnp.int32(pl.cdiv(size, CHUNK))
        logits = jnp.sum(lax.fori_loop(jnp.int32(0), chunks, add_chunk, zeros), axis=0)
        powers = jnp.exp(logits - jnp.max(logits))
        probs = powers / jnp.sum(powers)
        logits_ref[row, :] = logits
        probs_ref[row, :] = probs
        for i in range(selected):  # of equal ones the first, as `lax.top_k`
            largest = jnp.max(probs)
            chosen = jnp.min(jnp.where(probs == largest, expert, count - 1))
            gates_ref[row, i] = largest
            index_ref[row, i] = jnp.where(valid_ref[row], chosen, -1)
            probs = jnp.where(expert == chosen, -1.0, probs)

    shapes = ((count, jnp.float32), (count, jnp.float32), (selected, jnp.float32))
    return pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows, n), t) for n, t in (*shapes, (selected, jnp.int32))],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="route",
    )(x, w, valid)
