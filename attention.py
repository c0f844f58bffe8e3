"""Soft-capped attention over a sequence or over the cache, and writing the cache.

Shape letters as in `model.py`. Kernels of `kernels/` do the work where there are any.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

import kernels

CACHE_BLOCK = 512  # cache slots that the attention of a prompt's chunk reads at a time

einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@kernels.accelerated("attend")
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, multiplier: float, cap: float
) -> jax.Array:
    """Soft-capped attention of q [B, T, N, H] over k, v [B, K, S, H], as [B, T, N, H].

    A query sees the slots up to its own position, `positions` [B, T]. Query heads g G to
    g G + G - 1 share key/value head g.
    """
    weights = _weights(q, k, positions, multiplier, cap).astype(v.dtype)
    return _ungroup_heads(einsum("BKGTS,BKSH->BKGTH", weights, v), q)


def _weights(q, k, positions, multiplier, cap):  # float32 [B, K, G, T, S]
    logits = _capped_logits(_group_heads(q, k.shape[1]), k, multiplier, cap)
    visible = _visible(jnp.arange(k.shape[2]), positions)
    return jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1)


def weights(
    q: jax.Array, k: jax.Array, positions: jax.Array, multiplier: float, cap: float
) -> jax.Array:
    """The weights of `attend`, [B, N, T, S] in the dtype of q."""
    found = _weights(q, k, positions, multiplier, cap).astype(q.dtype)
    return found.reshape(*q.shape[::2], *found.shape[-2:])


def weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """What `attend` makes of its weights [B, N, T, S] and values [B, K, S, H]: [B, T, N, H]."""
    batch, heads, queries, slots = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, queries, slots)
    y = einsum("BKGTS,BKSH->BTKGH", grouped, v)
    return y.reshape(batch, queries, heads, -1).astype(v.dtype)


def attend_to_cache(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, multiplier: float, cap: float
) -> jax.Array:
    """`attend`, reading a large cache in blocks of slots, up to that of the last query.

    So a chunk of a prompt costs by what the cache holds, not by its size, and no [T, S] array is
    made. Blocks are added to sums that are scaled by the largest logit so far (online softmax;
    Milakov and Gimelshein, 2018, algorithm 3). A single query takes the whole cache: its blocks
    would be too little work. The derivative is that of `attend`: a loop over blocks whose number
    is not known before has no gradient.
    """
    whole = functools.partial(attend, multiplier=multiplier, cap=cap)
    if k.shape[2] <= CACHE_BLOCK or q.shape[1] == 1 or attend.kernel(q, k, cap=cap):
        return whole(q, k, v, positions)
    blocks = functools.partial(_attend_in_blocks, multiplier=multiplier, cap=cap)
    blocks = jax.custom_jvp(blocks)
    blocks.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
    return blocks(q, k, v, positions)


def _attend_in_blocks(q, k, v, positions, multiplier, cap):
    slots, block = k.shape[2], CACHE_BLOCK
    grouped = _group_heads(q, k.shape[1])

    def add_block(i, sums):
        largest, total, y = sums
        start = jnp.minimum(i * block, slots - block)  # the last block may overlap the one before
        keys, values = (lax.dynamic_slice_in_dim(x, start, block, axis=2) for x in (k, v))
        here = start + jnp.arange(block)
        visible = _visible(here, positions) & (here >= i * block)
        logits = jnp.where(visible, _capped_logits(grouped, keys, multiplier, cap), -1e30)
        larger = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
        weights, scale = jnp.exp(logits - larger), jnp.exp(largest - larger)
        total = total * scale + jnp.sum(weights, axis=-1, keepdims=True)
        y = y * scale + einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), values)
        return larger, total, y

    blocks = jnp.minimum(jnp.max(positions), slots - 1) // block + 1
    zeros = kernels.zeros_after(grouped, grouped.shape, jnp.float32)
    start = (zeros[..., :1] - 1e30, zeros[..., :1], zeros)
    _, total, y = lax.fori_loop(0, blocks, add_block, start)
    return _ungroup_heads(y / total, q)


def _group_heads(q: jax.Array, kv_heads: int) -> jax.Array:  # [B, T, N, H] -> [B, K, G, T, H]
    batch, queries, heads, size = q.shape
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, size)
    return grouped.transpose(0, 2, 3, 1, 4)


def _ungroup_heads(y: jax.Array, q: jax.Array) -> jax.Array:  # [B, K, G, T, H] -> as q
    return y.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _capped_logits(grouped, k, multiplier, cap):  # [B, K, G, T, S]
    logits = einsum("BKGTH,BKSH->BKGTS", grouped, k) * multiplier
    return cap * jnp.tanh(logits / cap)


def _visible(slots, positions):  # [S], [B, T] -> [B, 1, 1, T, S]
    return slots <= positions[:, None, None, :, None]


@kernels.accelerated("write_slots")
def write_slots(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """A cache [B, K, S, H] with new rows [B, T, K, H] at slots int32 [B, T]; others are dropped."""

    def row(cache, new, slots):  # [K, S, H], [T, K, H], [T]
        return cache.at[:, slots].set(new.swapaxes(0, 1), mode="drop")

    return jax.vmap(row)(cache, new.astype(cache.dtype), slots)
