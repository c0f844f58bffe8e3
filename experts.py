"""The mixture of experts: tokens sorted by the experts they chose, their products, gated sums.

Shape letters as in `model.py`. Kernels of `kernels/` do the work where there are any.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels
import quantize


class ExpertBlocks(NamedTuple):
    """(token, expert) pairs laid out expert by expert, in blocks of rows that share one expert.

    row_of_pair: int32 [T, A], where each pair went; R for a pair that is skipped
    token_of_row: int32 [R], its inverse; T for a row of padding, of a block that is not empty
    expert_of_block: int32 [blocks], -1 for an empty block
    """

    row_of_pair: jax.Array
    token_of_row: jax.Array
    expert_of_block: jax.Array


def group_by_expert(index: jax.Array, num_experts: int, joined: bool = False) -> ExpertBlocks:
    """Sorts the experts that T tokens chose, index [T, A], into blocks; skips those that are -1.

    joined: as `expert_block` has it

    With two experts, blocks of two rows, and tokens that chose 1, 0, 1 and 1 (A = 1):
    row_of_pair is [2, 0, 3, 4], token_of_row [1, -, 0, 2, 3, -], expert_of_block [0, 1, 1].
    """
    tokens, selected = index.shape
    pairs = tokens * selected
    block = expert_block(pairs, num_experts, joined)
    blocks = (pairs + min(num_experts, pairs) * (block - 1)) // block
    rows = blocks * block
    flat = index.reshape(pairs)
    if block == 1:  # one token: nothing to sort
        pair = np.arange(pairs, dtype=np.int32)
        row_of_pair = jnp.where(flat < 0, pairs, pair).reshape(tokens, selected)
        return ExpertBlocks(row_of_pair, jnp.asarray(pair // selected), flat)

    flat = jnp.where(flat < 0, num_experts, flat)
    counts = jnp.bincount(flat, length=num_experts + 1)
    last_block = jnp.cumsum(-(-counts[:num_experts] // block))
    first_row = jnp.concatenate([jnp.zeros(1, jnp.int32), last_block * block])
    order = jnp.argsort(flat, stable=True)
    expert = flat[order]
    rank = jnp.arange(pairs) - (jnp.cumsum(counts) - counts)[expert]
    row = jnp.where(expert < num_experts, first_row[expert] + rank, rows)
    row_of_pair = jnp.zeros(pairs, jnp.int32).at[order].set(row)
    token_of_row = jnp.full(rows, tokens).at[row].set(order // selected, mode="drop")
    owner = jnp.sum(last_block <= jnp.arange(blocks)[:, None], axis=1)
    expert_of_block = jnp.where(owner < num_experts, owner, -1)
    return ExpertBlocks(row_of_pair.reshape(tokens, selected), token_of_row, expert_of_block)


def expert_block(pairs: int, num_experts: int, joined: bool = False) -> int:
    """Rows in a block: an expert's fair share, or four times as many, up to 16, so that with few
    tokens few experts need two blocks; at most 128, as many as are worth unpacking a matrix for, or
    half of the share: training reads a copy of the matrix for each block.

    Two of eight experts: 1 for one token, 8 for eight, 16 for 64, 32 for 128, 128 for 512 and 1024,
    512 for 4096, 2048 for 16384.

    joined: whether an expert's blocks are multiplied together, see `joins_blocks`. Then 16 at most,
      which leaves fewer rows of padding
    """
    share = pairs / num_experts
    rows = max(share, min(4 * share, 16))
    rows = min(rows, 16 if joined else max(128, share / 2))
    return 1 << max(0, math.ceil(math.log2(rows)))


def joins_blocks(weights, activations: str, pairs: int, dtype) -> bool:
    """Whether kernels multiply blocks of one expert that follow each other together, with each
    of these weights, perhaps abstract: those of a CPU do. dtype: of activations not rounded."""

    def joins(w):
        grouped = quantize.has_grouped_kernel(w, activations, pairs, dtype)
        return grouped or quantize.has_kernel(w, activations)

    return kernels.platform() == "cpu" and all(map(joins, weights))


def rows_of_tokens(x: jax.Array, blocks: ExpertBlocks) -> jax.Array:
    """The tokens x [T, D] as rows [R, D]; padding is zeros, which kernels leave out.

    The gradients of this and of `gated_sums` read rows, too: a scatter would be slower.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return _rows(blocks, x)
    return kernels.linear(_rows, _rows_backward, blocks, x)


def _rows(blocks, x):
    return x.at[blocks.token_of_row].get(mode="fill", fill_value=0)


def _rows_backward(blocks, d_rows):
    ones = jnp.ones(blocks.row_of_pair.shape, jnp.float32)
    return _gated_sums(d_rows, ones, blocks.row_of_pair).astype(d_rows.dtype)


@kernels.accelerated("gated_rows")
def gated_rows(x, linear, linear_v, blocks, *, activations):
    """gelu(x @ linear) * (x @ linear_v) of the rows of tokens x [T, D], as [R, F]."""
    rows, chosen = rows_of_tokens(quantize.floats_of(x), blocks), blocks.expert_of_block  # [R, D]
    return quantize.gated_dot(rows, linear, linear_v, chosen, activations=activations)


@jax.custom_jvp
def gated_sums(rows: jax.Array, gates: jax.Array, blocks: ExpertBlocks) -> jax.Array:
    """Each token's rows of [R, D], times its gates [T, A], summed: float32 [T, D]."""
    return _gated_sums(rows, gates, blocks.row_of_pair)


@gated_sums.defjvp
def _(primals, tangents):
    d_rows, d_gates, _ = tangents
    d_sums = kernels.linear(_sums_tangent, _sums_backward, primals, (d_rows, d_gates))
    return gated_sums(*primals), d_sums


@kernels.accelerated("gated_sums")
def _gated_sums(rows, gates, index):
    chosen = rows.at[index].get(mode="clip")  # [T, A, D]
    used = jnp.where(index < len(rows), gates, 0)
    return jnp.sum(chosen.astype(jnp.float32) * used[..., None], axis=1)


def _sums_tangent(kept, tangents):
    (rows, gates, blocks), (d_rows, d_gates) = kept, tangents
    at = blocks.row_of_pair
    return _gated_sums(d_rows, gates, at) + _gated_sums(rows, d_gates, at)


def _sums_backward(kept, d_sums):
    rows, gates, blocks = kept
    d_rows, at = d_sums.at[blocks.token_of_row].get(mode="clip"), blocks.row_of_pair
    gate_of_row = jnp.zeros(len(rows)).at[at].set(gates, mode="drop")
    d_gates = jnp.sum(rows.astype(jnp.float32) * d_rows, axis=1)
    d_gates = d_gates.at[at].get(mode="fill", fill_value=0)
    return (d_rows * gate_of_row[:, None]).astype(rows.dtype), d_gates


SCATTERED = 64  # tokens from which on a collective more pays for sending fewer bytes


def is_scattered(w, tokens: int, devices: int) -> bool:
    """Whether `_scattered_sums` of a matrix w, perhaps abstract, that so many devices share are
    taken; in training not: their gradient would be a scatter."""
    integers = isinstance(w, quantize.QuantizedWeight | quantize.PackedWeight)
    integers = integers and not quantize.in_training(w)
    return integers and devices > 1 and tokens >= SCATTERED and tokens % devices == 0


def _scattered_sums(hidden, linear_1, gates, blocks, **options):  # -> [T, D]
    """`gated_sums` of the last product, in its dtype, each token's on one of the devices.

    Products are added over devices as integers, but for the rows of padding, where their token is
    gated: what every device then gets is one row for each token. No bit differs.
    """
    axis_name, pairs = options["axis_name"], blocks.row_of_pair
    chosen, kept = blocks.expert_of_block, pairs.reshape(-1)
    y = quantize.scattered_dot(hidden, linear_1, chosen, kept, **options)  # [T A / n, D]
    gates, pairs = (kernels.part_of(array, axis_name) for array in (gates, pairs))
    order = jnp.arange(pairs.size).reshape(pairs.shape)
    sums = _gated_sums(y, gates, jnp.where(pairs < len(hidden), order, pairs.size))
    return kernels.whole_of(sums.astype(y.dtype), axis_name)


def mixture(
    x,
    gates,
    index,
    linear,
    linear_v,
    linear_1,
    activations: str,
    axis_name: str | None = None,
    scale_last: bool | None = None,
) -> jax.Array:
    """The experts' gated sum [B, T, D] in the dtype of x: each token is computed by its chosen
    experts only.

    x: [B, T, D], perhaps `quantize.RoundedRows`
    gates, index: float32 and int32 [B, T, A]; an index of -1 counts nothing
    linear, linear_v: [E, D, F]; linear_1: [E, F, D]
    axis_name: inside `shard_map`, the mesh axis that F is split over, if any
    scale_last: of the whole linear_1, see `quantize.dot`
    """
    options = {"activations": activations, "axis_name": axis_name, "scale_last": scale_last}
    mix = functools.partial(_mixture, **options)
    weights = linear, linear_v, linear_1
    if joins_blocks(weights, activations, index.size, x.dtype):
        joined = functools.partial(mix, joined=True)
        # The derivative of packed weights is one of plain JAX, to which small blocks are many
        # matrices.
        packed = any(isinstance(w, quantize.PackedWeight) for w in weights)
        mix = kernels.with_derivative(joined, mix) if packed else joined
    return mix(x, gates, index, *weights)


def _mixture(x, gates, index, linear, linear_v, linear_1, joined=False, **options):
    batch, queries, size = x.shape

    def flat(x):
        return x.reshape(batch * queries, -1)

    blocks = group_by_expert(flat(index), linear.shape[0], joined)
    activations, axis_name = options["activations"], options["axis_name"]
    hidden = gated_rows(flat(x), linear, linear_v, blocks, activations=activations)  # [R, F]
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if is_scattered(linear_1, batch * queries, devices):
        y = _scattered_sums(hidden, linear_1, flat(gates), blocks, **options)
    else:
        out = quantize.grouped_dot(hidden, linear_1, blocks.expert_of_block, **options)  # [R, D]
        y = gated_sums(out, flat(gates), blocks)
    return y.reshape(batch, queries, size).astype(x.dtype)


# --- Of each expert, to look at -------------------------------------------------------------------
#
# Of each token and each of its experts by itself. Arguments as those of `mixture`.


def hidden_of_each(x, index, linear, linear_v, activations: str) -> jax.Array:
    """What an expert's last matrix is multiplied with, [B, T, A, F]; zeros where that is -1."""

    def product(rows, chosen):
        return quantize.gated_dot(rows, linear, linear_v, chosen, activations=activations)

    pairs = jnp.repeat(x[:, :, None], index.shape[-1], axis=2)  # [B, T, A, D]
    return _of_each(product, pairs, index, linear.shape[0])


def outputs_of_each(hidden, index, linear_1, **options) -> jax.Array:
    """What an expert makes of `hidden_of_each`, [B, T, A, D]; options of `quantize.grouped_dot`."""

    def product(rows, chosen):
        return quantize.grouped_dot(rows, linear_1, chosen, **options)

    return _of_each(product, hidden, index, linear_1.shape[0])


def _of_each(product, x, index, num_experts):  # [B, T, A, I] -> [B, T, A, O]
    blocks = group_by_expert(index.reshape(-1, 1), num_experts)
    rows = rows_of_tokens(x.reshape(-1, x.shape[-1]), blocks)
    y = product(rows, blocks.expert_of_block)
    y = y.at[blocks.row_of_pair[:, 0]].get(mode="fill", fill_value=0)
    return y.reshape(*index.shape, -1)
