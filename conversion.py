"""Stored weights made into other formats, a few outputs at a time, from mapped files.

NumPy, and C++ where it is there, for weights that are too large to be float32 all at once. The
result is that of the quantizers of `formats.py`, given the floats that the stored weight stands
for; of int8 codes, sums are exact, so that neither threads nor processes show in it.

Shapes: I inputs, O outputs, E experts (1 for a matrix without), G scale groups of the source,
B packed bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

import formats
import kernels
import quantize
import shards
from files import CheckpointError
from quantize import PackedWeight, QuantizedWeight

CHUNK = 1 << 21  # bytes of a weight, whole rows, that a thread takes at a time
ROWS = 512  # at least, that are summed at a time: their sums are as many bytes as 8 rows
COLUMNS = 2048  # columns of these converted at a time: with 256 rows, they stay in a core's cache
CHECK = 1 << 18  # floats that are checked at a time: these, too, stay in the cache
MAGNITUDES = 129  # of int8, 0 to 128
MAGNITUDES_DOWN = np.arange(MAGNITUDES - 1.0, -1, -1)[:, None]
OUTPUTS = 64  # that are fitted at a time: a line of the cache from each row of int8

Index = tuple[slice, slice, slice]  # of experts, outputs and packed bytes


def slices(start: int, stop: int, size: int):
    """Consecutive slices of at most `size` that cover start to stop."""
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


def stacked(w):
    """A weight with an axis of experts in any case; whatever its arrays are, as long as they take
    None as an index."""
    if len(w.shape) == 3:
        return w
    return jax.tree.map(lambda array: array[None], w)


def converter(tensor, name: str, title: str, pool) -> Callable[[Index], quantize.Weight]:
    """A function that makes a slice of a weight of a format, in memory, from a stored one.

    tensor: float32 [..., I, O] or QuantizedWeight, int8; mapped
    name: of a format of formats.FORMATS
    title: of the tensor, for errors; CheckpointError for scales or floats that are no numbers

    It takes slices of [E, O, B], the last of whole packing blocks and used by packed formats only,
    and returns these parts of the arrays, with the axis of experts. A format whose scale is of the
    whole matrix reads it all beforehand.
    """
    if isinstance(tensor, QuantizedWeight):
        check_scales(tensor.scales, title)
    stack, format = stacked(tensor), formats.format_named(name)
    if name == "ternary":
        scales, pack = _absmean(stack, pool)
        check_finite(scales, title)  # the sum of all magnitudes
        return functools.partial(_by_rows, stack.shape, scales, pack, pool)
    to = format.quantize
    if format.fit:
        planes, group = format.fit
        to = functools.partial(fit_tile, planes=planes, group=group)

    def checked(tile):
        if not isinstance(tile, QuantizedWeight):
            check_finite(tile, title)
        return to(tile)

    return functools.partial(_by_outputs, stack, formats.shapes(name, stack.shape), checked, pool)


def check_scales(scales: np.ndarray, title: str) -> None:
    """CheckpointError unless all scales are finite and none is negative."""
    scales = scales.astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise CheckpointError(
            f"{title}: negative or non-finite scales; copy or download the file again"
        )


def check_finite(array: np.ndarray, title: str) -> None:
    """CheckpointError for a NaN or an infinity among floats; one of them ruins every text."""
    flat = array.reshape(-1)
    for piece in slices(0, flat.size, CHECK):
        if not np.isfinite(flat[piece]).all():
            raise CheckpointError(
                f"{title}: NaN or infinite numbers; copy or download the file again"
            )


def aligned_empty(shape: Sequence[int], dtype) -> np.ndarray:
    """An array at a multiple of 64 bytes: JAX on CPU takes it over instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


# --- Absmean: a scale for the matrix --------------------------------------------------------------


def _absmean(stack, pool):
    """gamma, float32 [E, 1, 1], and a function that packs trits of an expert.

    It takes the expert, slices of rows and outputs, the block, and where to write, uint8 [O, B],
    of whole blocks; beyond the last row it writes zeros.

    The file is read for the sums that gamma is made of, which must not depend on the mesh or the
    number of processes: they are exact integers, and each process sums its part.
    """
    if not isinstance(stack, QuantizedWeight):
        gamma = _mean_magnitudes(stack, pool)

        def of_floats(expert, rows, columns):
            trits = formats.round_to_trits(stack[expert, rows, columns], gamma[expert])
            return (trits + 1).astype(np.uint8)

        return gamma, functools.partial(_pack_codes, of_floats)
    scales = stack.scales.astype(np.float32)
    gamma = absmean_of_sums(_absolute_sums(stack, pool), scales, stack.shape[-2])
    zeros = zero_range(scales, gamma)
    size = stack.shape[1] // scales.shape[1]  # rows of a scale group

    def of_int8(expert, rows, columns):
        tile = stack.codes[expert, rows, columns]
        codes = np.empty(tile.shape, np.uint8)
        for start in range(rows.start // size * size, rows.stop, size):
            group = slice(max(start - rows.start, 0), min(start + size, rows.stop) - rows.start)
            lowest, highest = (bound[expert, start // size, columns] for bound in zeros)
            int8_to_codes(tile[group], lowest, highest, out=codes[group])
        return codes

    if kernels.library() is None:
        return gamma, functools.partial(_pack_codes, of_int8)

    def pack(expert, rows, outputs, block, out):
        ranges = (bound[expert, :, outputs] for bound in zeros)
        codes = stack.codes[expert, rows, outputs]
        kernels.pack_int8(codes, *ranges, size, rows.start, block, out)

    return gamma, pack


def _mean_magnitudes(stack: np.ndarray, pool) -> np.ndarray:
    """gamma, float32 [E, 1, 1], of floats; sums are float64, in the order of the rows."""
    experts, inputs, outputs = stack.shape
    rows = [*slices(0, inputs, max(1, CHUNK // (4 * outputs)))]
    at = [(e, piece) for e in range(experts) for piece in rows]
    sums = pool.map(lambda at: np.abs(stack[at]).sum(dtype=np.float64), at)
    sums = np.array([*sums]).reshape(experts, len(rows)).sum(axis=1)
    return (sums / (inputs * outputs)).astype(np.float32).reshape(-1, 1, 1)


def _absolute_sums(stack: QuantizedWeight, pool) -> np.ndarray:
    """Sums of |code| over the rows of each expert and scale group: int64 [E, G, O], exact.

    Each process reads its part of the rows, and they exchange their sums.
    """
    experts, inputs, outputs = stack.shape
    sums = np.zeros(stack.scales.shape, np.int64)
    groups = sums.shape[1]
    size = inputs // groups
    chunks = [
        (e, g, rows)
        for e in range(experts)
        for g in range(groups)
        for rows in slices(g * size, (g + 1) * size, max(ROWS, CHUNK // outputs))
    ]
    chunks = chunks[jax.process_index() :: jax.process_count()]
    partial = pool.map(lambda at: absolute_sums(stack.codes[at[0], at[2]]), chunks)
    for (e, g, _), part in zip(chunks, partial, strict=True):
        sums[e, g] += part
    if jax.process_count() > 1:  # as int32, which JAX keeps: 128 times the rows
        sums = multihost_utils.process_allgather(sums.astype(np.int32)).sum(0, dtype=np.int64)
    return sums


def absolute_sums(codes: np.ndarray) -> np.ndarray:
    """Sums of |code| over the rows of int8 [I, O], exact: int64 [O]."""
    if kernels.library() is not None:
        return kernels.absolute_sums(codes)
    sums = np.zeros(codes.shape[1], np.int64)
    for start in range(0, len(codes), 256):  # 256 * 128 fits in 16 bits
        magnitude = np.abs(codes[start : start + 256]).view(np.uint8)  # |-128| wraps to 128
        sums += magnitude.sum(axis=0, dtype=np.uint16)
    return sums


def absmean_of_sums(sums: np.ndarray, scales: np.ndarray, inputs: int) -> np.ndarray:
    """gamma, float32 [E, 1, 1], from sums of |code| and scales float32, both [E, G, O].

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
        limits += np.int16(step) * (formats.round_to_trits(w, gamma) == 0)
    return (-limits).astype(np.int8), np.minimum(limits, 127).astype(np.int8)


def int8_to_codes(tile: np.ndarray, lowest, highest, out: np.ndarray) -> None:
    """Writes trit + 1 of int8 [R, O] to `out`, uint8 [R, O]; the range of 0 is int8 [O]."""
    np.greater(tile, highest, out=out.view(bool))
    out += np.greater_equal(tile, lowest).view(np.uint8)


def _pack_codes(codes: Callable, expert: int, rows: slice, outputs: slice, block: int, out) -> None:
    """Writes packed trits, see `_absmean`, of `codes`: trit + 1 of an expert, rows and outputs."""
    for some in slices(outputs.start, outputs.stop, COLUMNS):
        tile = np.ones((4 * out.shape[1], some.stop - some.start), np.uint8)
        tile[: rows.stop - rows.start] = codes(expert, rows, some)
        # Transposed in the cache first: written across directly, it takes twice as long.
        turned = np.ascontiguousarray(quantize.pack_codes(tile, block).T)
        out[some.start - outputs.start : some.stop - outputs.start] = turned


def _by_rows(shape, scales, pack: Callable, pool, index: Index) -> PackedWeight:
    """A slice of a packed weight of a scale for each matrix, by `pack` as of `_absmean`."""
    experts, outputs, width = index
    _, inputs, columns = shape
    block = quantize.packing_block(inputs)
    packed = aligned_empty([s.stop - s.start for s in index], np.uint8)

    def convert(at):
        expert, taken = at  # `taken` bytes of each output, whole blocks
        rows = slice(4 * taken.start, min(4 * taken.stop, inputs))
        there = slice(taken.start - width.start, taken.stop - width.start)
        pack(expert, rows, outputs, block, packed[expert - experts.start, :, there])

    per_chunk = max(1, CHUNK // (4 * block * columns)) * block
    chunks = [
        (expert, taken)
        for expert in range(experts.start, experts.stop)
        for taken in slices(width.start, width.stop, per_chunk)
    ]
    list(pool.map(convert, chunks))
    return PackedWeight(packed, scales[experts], block, -inputs % 4)


# --- Formats whose scales are of single outputs ---------------------------------------------------


def _by_outputs(stack, made, to: Callable, pool, index: Index) -> quantize.Weight:
    """A slice of a weight, of shapes `made`, by `to`, which is given a few whole outputs."""
    experts, outputs, width = index
    count = experts.stop - experts.start, outputs.stop - outputs.start

    def empty(shape, axis):
        shape = [count[0], *shape[1:]]
        shape[axis] = count[1] if shape[axis] > 1 else 1
        return shape

    axes = output_axes(made)
    out = jax.tree.map(lambda x, axis: aligned_empty(empty(x.shape, axis), x.dtype), made, axes)

    def convert(at):
        expert, some = at
        part = to(jax.tree.map(lambda array: array[expert, :, some], stack))
        here = slice(some.start - outputs.start, some.stop - outputs.start)

        def put(out, part, axis):
            where = [slice(None)] * part.ndim
            where[axis] = here
            out[expert - experts.start][tuple(where)] = part

        jax.tree.map(put, out, part, axes)

    tiles = [
        (expert, some)
        for expert in range(experts.start, experts.stop)
        for some in slices(outputs.start, outputs.stop, OUTPUTS)
    ]
    list(pool.map(convert, tiles))
    return cut_inputs(out, width) if isinstance(out, PackedWeight) else out


def output_axes(w):
    """The axis of the outputs, from the end, of each of the arrays of a weight."""
    if isinstance(w, PackedWeight):
        multipliers = None if w.multipliers is None else -3
        return dataclasses.replace(w, packed=-2, scales=-1, multipliers=multipliers)
    return jax.tree.map(lambda _: -1, w)


def outputs_of(stack, expert: slice, outputs: slice):
    """Some outputs of one matrix of a stored weight with an axis of experts, in memory."""

    def part(array, axis):
        index = [expert, *[slice(None)] * (array.ndim - 1)]
        index[axis] = outputs if array.shape[axis] > 1 else slice(None)
        return array[tuple(index)]

    return jax.tree.map(part, stack, output_axes(stack), is_leaf=shards.is_trits)


def cut_inputs(w: PackedWeight, width: slice) -> PackedWeight:
    """The inputs of these packed bytes, whole blocks."""
    if w.multipliers is None or (groups := w.multipliers.shape[-2]) == 1:
        return dataclasses.replace(w, packed=w.packed[..., width])
    per_group = w.packed.shape[-1] // groups
    here = slice(width.start // per_group, width.stop // per_group)
    multipliers = w.multipliers[..., here, :]
    return dataclasses.replace(w, packed=w.packed[..., width], multipliers=multipliers)


def fit_tile(tile, planes: int, group: int | None) -> PackedWeight:
    """`formats.fit` of some outputs, float32 [I, O] or a QuantizedWeight.

    Of int8 codes whose scale groups divide the groups that are fitted, or the other way round where
    all inputs of an output are fitted, it counts magnitudes instead of sorting floats.
    """
    if not isinstance(tile, QuantizedWeight):
        return formats.fit(tile, planes, group)
    inputs, parts = tile.shape[0], tile.scales.shape[0]
    groups = formats.number_of_groups(inputs, group)
    if inputs % (4 * max(groups, parts)) or (groups > 1 and groups % parts):
        return formats.fit(quantize.dequantize(tile), planes, group)
    if kernels.library() is None or inputs >= 1 << 16:  # which C++ counts in 16 bits
        return fit_int8(tile, planes, groups)
    block = quantize.packing_block(inputs)
    packed, multipliers, scales = kernels.fit_int8(tile.codes, tile.scales, groups, planes, block)
    return PackedWeight(packed, scales, block, 0, multipliers)


def fit_int8(tile: QuantizedWeight, planes: int, groups: int) -> PackedWeight:
    """`formats.fit` of int8 codes [I, O] from the number of each magnitude.

    4 G divides I, and the source has as many groups of scales, or a divisor of it; or any number,
    of 4 rows or a multiple, if G is 1. Sums of a single scale's magnitudes are integers, and exact.
    """
    scales = tile.scales.astype(np.float64)
    if groups > 1 or len(scales) == 1:
        counts, x = magnitude_counts(tile.codes, groups), MAGNITUDES_DOWN
        fitted = formats.fit_scales(x, counts, planes) * scales.repeat(groups // len(scales), 0)
    else:
        counts = magnitude_counts(tile.codes, len(scales)).reshape(1, -1, tile.shape[1])
        x = (MAGNITUDES_DOWN * scales[:, None]).reshape(counts.shape)
        order = np.argsort(-x, axis=-2, kind="stable")
        x, counts = (np.take_along_axis(array, order, axis=-2) for array in (x, counts))
        fitted = formats.fit_scales(x, counts, planes)
    grouped = quantize.dequantize(tile).reshape(groups, -1, tile.shape[1])
    return formats.rounded(grouped, tile.shape[0], *formats.as_multiples(fitted))


def magnitude_counts(codes: np.ndarray, groups: int) -> np.ndarray:
    """How many of each magnitude, 128 to 0, each group of int8 [I, O] has: int64 [G, 129, O]."""
    inputs, outputs = codes.shape
    first = np.arange(groups).repeat(inputs // groups)[:, None] * MAGNITUDES + MAGNITUDES - 1
    at = (first - np.abs(codes.astype(np.int16))) * outputs + np.arange(outputs)
    counts = np.bincount(at.reshape(-1), minlength=groups * MAGNITUDES * outputs)
    return counts.reshape(groups, MAGNITUDES, outputs)
