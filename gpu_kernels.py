"""Ternary products on NVIDIA GPUs: Pallas kernels, written for the Triton backend.

Shapes: I inputs (the contracted axis), O outputs, E experts, R rows of a block, B bytes of packed
weights for one output, I = 4 B. How weights are packed: see `quantize.py`. Slab j of a packing
block is its weights at bits 2 j and 2 j + 1: as many, side by side, as the block has bytes.

A GPU that decodes waits for weights, but only if unpacking takes few instructions: an H200 reads
17e12 packed weights a second, and has time for one integer instruction for each. So nothing is
unpacked that the tensor cores can take as it lies: bytes masked with 3 << 2 j are int8 operands,
4 ** j times too large, and as shifts cost more than masks, the sum is shifted instead, once, at
the end. All sums are integers and exact: no tile and no split of I shows in a result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 64  # bytes of a packing block, which is what a kernel takes at a time
SMALLEST = 8  # rows of the smallest tensor core operand; fewer are filled up with zeros


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    rows, outputs: the most rows of a block, and the columns of O; powers of two
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


def takes(x_shape: tuple[int, ...], packed_shape: tuple[int, ...], block: int) -> bool:
    """Whether `ternary_sums` has a kernel for x [blocks, R, I] and packed [E, O, B]."""
    if len(x_shape) != 3 or len(packed_shape) != 3 or 0 in (*x_shape, *packed_shape):
        return False
    (_, rows, inputs), (_, outputs, width) = x_shape, packed_shape
    tile = tile_for(rows)
    return (
        block == BLOCK
        and width % BLOCK == 0
        and inputs == 4 * width  # no padding
        and outputs % tile.outputs == 0
        and outputs // tile.outputs < 1 << 16  # the second axis of a CUDA grid
    )


def tile_for(rows: int) -> Tile:
    """The tile for blocks of R rows."""
    return FEW_ROWS if rows <= FEW_ROWS.rows else MANY_ROWS


def ternary_sums(
    x: jax.Array,
    packed: jax.Array,
    experts: jax.Array,
    block: int,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:  # int32 [blocks, R, O]
    """Exact sums over I of blocks of rows times the trits of each block's expert.

    x: int8 [blocks, R, I]
    packed: uint8 [E, O, B]; experts are read where they lie
    experts: int32 [blocks]; a block whose expert is -1 is skipped, and its sums are zeros
    block: bytes of a packing block; `takes` says which shapes will do
    interpret: run on any device, slowly
    """
    if not takes(x.shape, packed.shape, block):
        raise ValueError(f"no kernel for {x.shape} times {packed.shape} in blocks of {block} bytes")
    tile = tile or tile_for(x.shape[1])
    parts = _code_sums(x, packed, experts.astype(jnp.int32), tile, interpret)
    sums = jnp.sum(parts, axis=1) - _offsets(x, tile.shift)
    return jnp.where(experts[:, None, None] < 0, 0, sums)


def _offsets(x, shift: bool):  # [blocks, R, I] -> [blocks, R, 1]
    """How far sums of codes lie above sums of trits: slab 3, when masked, holds trit - 1."""
    signs = jnp.array([1, 1, 1, 1 if shift else -1], jnp.int32)[:, None]
    slabs = x.reshape(*x.shape[:2], -1, 4, BLOCK).astype(jnp.int32)
    return jnp.sum(slabs * signs, axis=(2, 3, 4))[..., None]


def _splits(programs: int, steps: int, wanted: int) -> int:
    """Into how many equal parts to split `steps`, to make `programs` the number wanted or more."""
    divisors = [n for n in range(1, steps + 1) if steps % n == 0]
    return next((n for n in divisors if n * programs >= wanted), steps)


def _code_sums(x, packed, experts, tile: Tile, interpret: bool):
    """Sums over the parts that I is split into, int32 [blocks, parts, R, O], offsets included."""
    blocks, rows, _ = x.shape
    _, outputs, width = packed.shape
    tile_rows = min(tile.rows, max(SMALLEST, pl.next_power_of_2(rows)))
    row_tiles = pl.cdiv(rows, tile_rows)
    # Programs that share their weights come one after another, and find them in the cache.
    grid = (blocks * row_tiles, outputs // tile.outputs)
    steps = width // BLOCK
    splits = _splits(grid[0] * grid[1], steps, tile.programs)
    kernel = functools.partial(
        _kernel,
        row_tiles=row_tiles,
        tile_rows=tile_rows,
        tile_outputs=tile.outputs,
        steps=steps // splits,
        shift=tile.shift,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        grid=(*grid, splits),
        out_shape=jax.ShapeDtypeStruct((blocks, splits, rows, outputs), jnp.int32),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="ternary_many_rows" if tile.shift else "ternary_few_rows",
    )(experts, x, packed)


def _kernel(
    experts_ref,
    x_ref,
    packed_ref,
    sums_ref,
    *,
    row_tiles: int,
    tile_rows: int,
    tile_outputs: int,
    steps: int,
    shift: bool,
    interpret: bool,
):
    """One tile of rows and outputs, one part of I."""
    block, part = pl.program_id(0) // row_tiles, pl.program_id(2)
    first_row = pl.program_id(0) % row_tiles * tile_rows
    first_output = pl.program_id(1) * tile_outputs
    expert = experts_ref[block]

    def add_block(i, sums):
        start = (part * steps + i) * BLOCK
        codes = packed_ref[expert, pl.ds(first_output, tile_outputs), pl.ds(start, BLOCK)]
        sums = list(sums)
        for slab in range(4):
            row, column = _indices(first_row, tile_rows, 4 * start + slab * BLOCK, BLOCK)
            x = triton.load(x_ref.at[block, row, column], mask=row < x_ref.shape[1], other=0)
            w = _shifted(codes, slab, interpret) if shift else _masked(codes, slab)
            sums[slab % len(sums)] += lax.dot_general(
                w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
            )
        return tuple(sums)

    zeros = jnp.zeros((tile_outputs, tile_rows), jnp.int32)
    count = jnp.where(expert < 0, jnp.int32(0), jnp.int32(steps))
    sums = lax.fori_loop(jnp.int32(0), count, add_block, (zeros,) * (1 if shift else 4))
    total = functools.reduce(jnp.add, (s >> 2 * slab for slab, s in enumerate(sums)))
    row, column = _indices(first_row, tile_rows, first_output, tile_outputs)
    triton.store(sums_ref.at[block, part, row, column], total.T, mask=row < x_ref.shape[1])


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
    (w,) = triton.elementwise_inline_asm(
        assembly,
        args=[codes],
        constraints="=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int8)],
    )
    return w
