"""Grok-1 in Haiku: configuration, presets, modules, key/value cache and forward pass.

Shape letters, here and in the einsums: B batch, T queries, S cache slots, D model, N query heads,
K key/value heads, G = N / K, H head size, F feed-forward, E experts, A experts per token,
V vocabulary; I, O for a bare matrix, R rows sorted by expert.

Modules and parameters carry the names of the release, whose files are numbered in the order of
the sorted parameter tree: renaming one shifts every tensor after it. A module that is given no name
has that of its class, such as `multi_head_attention`.
"""

import dataclasses
import functools
import json
import math
import re
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import attention
import captures
import experts
import files
import formats
import kernels
import quantize
import sharding

EMBEDDINGS = ("float", "int8")  # what the embedding table is kept in

# --- Configuration --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Architecture and arithmetic of a model; the defaults are those of Grok-1's release.

    fprop_dtype: dtype of activations and cache; norms, softmax and routing are always float32
    activations: what the ternary and int8 matrices are multiplied with, see
      `quantize.quantize_rows`: "float", "int15", or "int8" for BitNet's rounding to 8 bits
    embeddings: what the table that embeds tokens and gives their logits is kept in to run:
      "float", in fprop_dtype, or "int8", each row rounded with a scale of its own
    """

    vocab_size: int = 131072
    sequence_len: int = 8192
    emb_size: int = 6144
    num_layers: int = 64
    num_q_heads: int = 48
    num_kv_heads: int = 8
    key_size: int = 128
    widening_factor: float = 8
    num_experts: int = 8
    num_selected_experts: int = 2
    eos_token: int = 2
    embedding_init_scale: float = 1.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    attn_output_multiplier: float = 0.08838834764831845
    attn_logit_cap: float = 30.0
    rms_norm_eps: float = 1e-5
    rope_base: int = 10000
    fprop_dtype: str = "bfloat16"
    activations: str = "float"
    embeddings: str = "float"

    def __post_init__(self):
        def require(condition, text):
            if not condition:
                raise ValueError(f"bad configuration: {text}")

        sizes = ("vocab_size", "sequence_len", "emb_size", "num_layers", "num_kv_heads", "key_size")
        for name in sizes:
            require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        require(
            self.num_q_heads % self.num_kv_heads == 0,
            f"num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        require(self.key_size % 2 == 0, f"key_size must be even for RoPE, got {self.key_size}")
        require(
            1 <= self.num_selected_experts <= max(self.num_experts, 1),
            f"num_selected_experts {self.num_selected_experts} is not between 1 and "
            f"num_experts {self.num_experts}",
        )
        require(
            self.fprop_dtype in ("float32", "bfloat16"),
            f"fprop_dtype must be 'float32' or 'bfloat16', got {files.shown(self.fprop_dtype)}",
        )
        require(
            self.activations in quantize.ACTIVATIONS,
            f"activations must be one of {quantize.ACTIVATIONS}, "
            f"got {files.shown(self.activations)}",
        )
        require(
            self.embeddings in EMBEDDINGS,
            f"embeddings must be one of {EMBEDDINGS}, got {files.shown(self.embeddings)}",
        )

    @property
    def ffn_size(self) -> int:
        """F: two thirds of the widened size, rounded up to a multiple of 8."""
        size = int(self.widening_factor * self.emb_size) * 2 // 3
        return size + -size % 8


def small(emb_size: int, num_layers: int, q_heads: int, kv_heads: int, **sizes):
    """A ternary model to train from scratch: heads of 64, 2 of 8 experts as wide as the model, and
    the multipliers that follow from these."""
    standard = {"vocab_size": 1024, "sequence_len": 256, "key_size": 64, "widening_factor": 1.5}
    standard |= {"fprop_dtype": "float32", "activations": "int8"} | sizes
    return LanguageModelConfig(
        emb_size=emb_size,
        num_layers=num_layers,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        embedding_multiplier_scale=math.sqrt(emb_size),
        attn_output_multiplier=1 / math.sqrt(standard["key_size"]),
        **standard,
    )


PRESETS = {
    # int15: as fine as the bfloat16 that the release multiplies, and kernels take it.
    "grok-1": LanguageModelConfig(activations="int15"),
    "demo": small(256, 4, 4, 2),  # 7 million parameters
    "bench": LanguageModelConfig(  # 1.3 billion parameters, to measure against other programs
        vocab_size=32768,
        sequence_len=1024,
        emb_size=1536,
        num_layers=4,
        num_q_heads=12,
        num_kv_heads=2,
        activations="int8",
    ),
    "tiny": small(48, 2, 6, 2, sequence_len=64, key_size=8, widening_factor=2, activations="float"),
    # To train, named after their parameters.
    "1m": small(128, 2, 2, 1),
    "10m": small(256, 6, 4, 2),
    "100m": small(512, 14, 8, 2, sequence_len=512),
    "1b": small(1536, 16, 24, 8, sequence_len=1024),
}

# Fields of config.json that say nothing about the architecture, or that follow from other fields:
# those of converted checkpoints, and those of tests/golden, whose folders the commands take, too.
IGNORED_KEYS = {"preset", "quantization_config"}
IGNORED_KEYS |= {"case", "checkpoint", "ffn_size", "mesh", "pad_token", "shard_activations"}
OPTIONAL_KEYS = {"activations", "embedding_init_scale", "embeddings", "eos_token", "fprop_dtype"}

_MATRICES = r"/(query|key|value|linear|linear_v|linear_1)/w$"

_ATTENTION = r"/multi_head_attention/"

# For each choice of weights, the format that a parameter has in memory: ordered tables of path
# patterns, first match wins. `X-experts` keeps attention, 1.8 % of the parameters, at the release's
# precision: absmean there is what changes the routing most. "float32" is for models trained so.
PRECISIONS = {
    **{
        name: ((_MATRICES, name), (r"", "float32")) for name in formats.FORMATS if name != "float32"
    },
    **{
        re.sub("^ternary2?", r"\g<0>-experts", name): (
            (_ATTENTION, "int8"),
            (_MATRICES, name),
            (r"", "float32"),
        )
        for name, format in formats.FORMATS.items()
        if format.packed
    },
    "float32": ((r"", "float32"),),
}


def precision_table(weights: str) -> tuple[tuple[str, str], ...]:
    """The table of PRECISIONS with this name; ValueError if there is none."""
    if weights not in PRECISIONS:
        raise ValueError(f"unknown choice of weights {weights!r}; known: {list(PRECISIONS)}")
    return PRECISIONS[weights]


def parse_precision(content: bytes, title: str) -> tuple[tuple[str, str], ...]:
    """A precision table from JSON, a list of [pattern, format]; ValueError for anything else.

    The first pattern that is found in a parameter's "module/name" gives its format.
    """
    try:
        table = tuple((pattern, format) for pattern, format in json.loads(content))
        for pattern, format in table:
            re.compile(pattern)
            formats.format_named(format)
    except (ValueError, TypeError, re.error) as error:
        raise ValueError(
            f"{title}: not a list of pairs of a pattern and a format, such as "
            f'[["/moe/", "ternary2-128"], ["", "float32"]]: {error!s:.300}'
        ) from None
    return table


def formats_of(template: dict, precision: quantize.Rules) -> dict[str, str]:
    """{path: format} of the parameters of a tree `{module: {name: weight}}`, by a precision.

    Raises ValueError as `quantize.match_rules` does, for a format that there is not, and for one
    of a parameter that is no matrix of a linear layer.
    """
    paths = [f"{module}/{name}" for module in template for name in template[module]]
    named = quantize.match_rules(precision, paths)
    for path, format in named.items():
        formats.format_named(format)
        if format != "float32" and not re.search(_MATRICES, path):
            raise ValueError(
                f"{path} cannot be {format}, only float32: the products of attention and experts "
                "take other formats; correct the precision"
            )
    return named


def config_from_dict(values: dict | None) -> LanguageModelConfig:
    """A configuration from a checkpoint's `config.json`; without one it is Grok-1.

    Raises ValueError for keys that it does not know, for values of another type than the field's,
    and where a size or a multiplier is missing.
    """
    if values is None:
        return PRESETS["grok-1"]
    known = {field.name for field in dataclasses.fields(LanguageModelConfig)}
    unknown = set(values) - known - IGNORED_KEYS
    if unknown:
        raise ValueError(
            f"unknown configuration keys {files.shown(sorted(unknown))}; known: {sorted(known)}"
        )
    missing = known - set(values) - OPTIONAL_KEYS
    if missing:
        raise ValueError(f"the configuration lacks {sorted(missing)}; add them to config.json")
    for field in dataclasses.fields(LanguageModelConfig):
        _check_type(field, values.get(field.name, field.default))
    return LanguageModelConfig(**{key: values[key] for key in known & set(values)})


def _check_type(field: dataclasses.Field, value) -> None:
    """ValueError unless a value from JSON is of the field's type; a float may be written as 8."""
    fits = isinstance(value, str)
    if field.type is not str:
        number = (int, float) if field.type is float else int
        fits = isinstance(value, number) and not isinstance(value, bool) and abs(value) < 2**62
    if not fits:  # NaN and infinity neither
        raise ValueError(
            f"bad configuration: {field.name} must be of type {field.type.__name__}, got "
            f"{files.shown(value)}; correct config.json"
        )


def config_to_dict(config: LanguageModelConfig) -> dict:
    """What `config_from_dict` reads, and the name of the preset if it is one."""
    preset = next((name for name, known in PRESETS.items() if known == config), None)
    return dataclasses.asdict(config) | {"preset": preset}


# --- State ----------------------------------------------------------------------------------------


class KVMemory(NamedTuple):
    """One layer's keys and values, [B, K, S, H] each, in the compute dtype."""

    k: jax.Array
    v: jax.Array


class Memory(NamedTuple):
    """The key/value cache of all layers.

    step: int32 [B], the tokens of each row so far; its next token takes slot and position `step`
    """

    layers: tuple[KVMemory, ...]
    step: jax.Array


class LayerOutput(NamedTuple):
    """What a layer computed: hidden [B, T, D] and, with experts, its routing.

    router_logits, router_probs: float32 [B, T, E]
    expert_index: int32 [B, T, A], largest probability first; -1 where the tokens are padding
    """

    hidden: jax.Array
    router_logits: jax.Array | None
    router_probs: jax.Array | None
    expert_index: jax.Array | None


class LanguageModelOutput(NamedTuple):
    """logits float32 [B, T, V], or [B, V] of the last tokens; the cache after them, if any."""

    logits: jax.Array
    model_state: Memory | None
    layers: tuple[LayerOutput, ...]


def init_memory(
    config: LanguageModelConfig, batch_size: int, sequence_len: int | None = None
) -> Memory:
    """An empty cache of B rows and S slots (by default the model's context)."""
    slots = sequence_len or config.sequence_len
    shape = (batch_size, config.num_kv_heads, slots, config.key_size)
    zeros = functools.partial(jnp.zeros, shape, config.fprop_dtype)
    layers = tuple(KVMemory(zeros(), zeros()) for _ in range(config.num_layers))
    return Memory(layers, jnp.zeros(batch_size, jnp.int32))


MEMORY_AXES = ("batch", "heads", None, None)  # of KVMemory's arrays
HEADS_AXES = ("batch", None, "heads", None)  # of [B, T, heads, H]

# --- Pure parts -----------------------------------------------------------------------------------


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """scale * x / rms(x) of x [..., D], in float32, back in its dtype. (Zhang and Sennrich 2019)"""
    return _of_rows(_norm_of_rows, scale, eps, x)


def _of_rows(norm, scale, eps, *arrays):
    """A norm of arrays [B, ..., D], on each device of its own rows: XLA would gather what a kernel
    reads."""

    def of_rows(scale, *arrays):
        rows = (x.reshape(-1, x.shape[-1]) for x in arrays)
        return norm(*rows, scale, eps=eps).reshape(*arrays[0].shape)

    axes = ("batch", *[None] * (arrays[0].ndim - 1))
    in_axes = ((None,), *[axes] * len(arrays))
    return sharding.shard_map(of_rows, in_axes, axes)(scale, *arrays)


@kernels.accelerated("rms_norm")
def _norm_of_rows(x, scale, *, eps):
    wide = x.astype(jnp.float32)
    rms = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (scale * wide * rms).astype(x.dtype)


@kernels.accelerated("rounded_norm")
def _rounded_norm(x, scale, *, eps, activations):  # [R, D], [D]
    rounded = quantize.RoundedRows.of(_norm_of_rows(x, scale, eps=eps), activations)
    return rounded.rows, rounded.integers, rounded.step


@kernels.accelerated("added_norm")
def _added_norm(h, x, scale, *, eps):  # [R, D], [R, D], [D]
    return h + _norm_of_rows(x, scale, eps=eps)


def rotary_embedding(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates x [B, T, heads, H] by its positions [B, T]; half-split pairs (i, i + H/2).

    Angles are float32: bfloat16 turns position 257 into 256. (RoFormer, section 3.2.2)
    """
    return _rotate(x, positions, _frequencies(x.shape[-1], base))


def _frequencies(size: int, base: float) -> jax.Array:  # float32 [H/2], of heads of H
    half = size // 2
    return jnp.asarray(np.float32(base) ** (np.arange(half, dtype=np.float32) / -half))


@kernels.accelerated("rotate")
def _rotate(x, positions, frequencies):
    angles = positions[:, :, None, None] * frequencies  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    sin, cos = jnp.concatenate([-sin, sin], -1), jnp.concatenate([cos, cos], -1)
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


def write_memory(memory: KVMemory, k: jax.Array, v: jax.Array, positions: jax.Array) -> KVMemory:
    """Puts k, v [B, T, K, H] at their slots [B, T]; what lies past the last slot is dropped."""
    axes = (MEMORY_AXES, HEADS_AXES, ("batch", None))
    write = sharding.shard_map(attention.write_slots, axes, MEMORY_AXES)
    return KVMemory(write(memory.k, k, positions), write(memory.v, v, positions))


@kernels.accelerated("attend_and_write")
def attend_and_write(q, k, v, keys, values, positions, frequencies, *, multiplier, cap):
    """Attention of q [B, T, N, H] over a cache [B, K, S, H] and the tokens that it then has, too.

    k, v [B, T, K, H] are written to the slots positions [B, T]; q and k are rotated here, by
    positions times frequencies float32 [H/2]. Gives [B, T, N, H], keys and values.
    """
    q, k = (_rotate(x, positions, frequencies) for x in (q, k))
    keys, values = (
        attention.write_slots(cache, x, positions) for cache, x in ((keys, k), (values, v))
    )
    y = attention.attend_to_cache(q, keys, values, positions, multiplier, cap)
    return y, keys, values


@kernels.accelerated("route")
def routed(x, w, valid, *, selected):
    """Of tokens x [R, D] and a router w [D, E]: logits and probabilities, float32 [R, E], and
    of the chosen experts [R, A] probability and index, -1 where not valid [R]."""
    logits = quantize.table_dot(x.astype(jnp.float32), w.T)
    return logits, *chosen(logits, valid, selected=selected)


@kernels.accelerated("choose")
def chosen(logits, valid, *, selected):
    """What `routed` makes of logits [..., E] and valid [...]."""
    probs = jax.nn.softmax(logits, axis=-1)
    gates, index = lax.top_k(probs, selected)
    return probs, gates, jnp.where(valid[..., None], index, -1)


def check_ids(tokens, vocab_size: int) -> None:
    """ValueError for token ids outside of the vocabulary, where their values are there to see."""
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    tokens = np.asarray(tokens)
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise ValueError(
            f"token id {bad[0]} is not in the vocabulary, 0 to {vocab_size - 1}; "
            "encode texts with the model's own tokenizer"
        )


# --- Parts with parameters ------------------------------------------------------------------------


def matrix(*shape: int):
    """The parameter w [..., I, O] of the module or name scope around it, in any format of
    `quantize.py`."""
    return hk.get_parameter("w", shape, init=hk.initializers.TruncatedNormal(shape[-2] ** -0.5))


def matrices(module: hk.Module, shapes: dict[str, tuple[int, ...]]) -> tuple[list, list]:
    """The parameters NAME/w of a module, for each name its shape; and the logical axes of each."""
    weights, axes = [], []
    for name, shape in shapes.items():
        with hk.name_scope(name):
            weights.append(matrix(*shape))
        axes.append(sharding.parameter_axes(f"{module.module_name}/{name}/w", len(shape)))
    return weights, axes


def products(x: jax.Array, weights: list, axes: list, activations: str) -> list[jax.Array]:
    """x [B, T, I] times each of some weights [I, O], of such logical axes: [B, T, O] each.

    I has the same axis in all of them.
    """
    inputs = axes[0][0]
    scale_last = [quantize.has_last_scale(w) for w in weights]
    options = {"axis_name": sharding.mesh_axis(inputs, x.shape[-1]), "scale_last": scale_last}

    def dots(x, *weights):
        return list(quantize.dots(x, weights, activations=activations, **options))

    in_axes = (("batch", None, inputs), *axes)
    out_axes = [("batch", None, outputs) for _, outputs in axes]
    return sharding.shard_map(dots, in_axes, out_axes)(x, *weights)


@dataclasses.dataclass
class Linear(hk.Module):
    """x @ w; no bias, as in Grok-1."""

    output_size: int  # O
    activations: str
    name: str | None = None

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, I] -> [B, T, O]
        w = matrix(x.shape[-1], self.output_size)
        axes = sharding.parameter_axes(f"{self.module_name}/w", 2)
        return products(x, [w], [axes], self.activations)[0]


@dataclasses.dataclass
class RMSNorm(hk.Module):
    """`rms_norm` with a scale of its own."""

    eps: float
    name: str | None = None

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        scale = hk.get_parameter("scale", x.shape[-1:], init=jnp.ones)
        return captures.tap("", rms_norm(x, scale, self.eps))

    def rounded(self, x: jax.Array, activations: str) -> jax.Array | quantize.RoundedRows:
        """self(x), for products; rounded, too, where one kernel does both and nobody looks."""
        if captures.is_tapped("") or not _rounded_norm.kernel(activations=activations):
            return self(x)
        scale = hk.get_parameter("scale", x.shape[-1:], init=jnp.ones)

        def norm(*arrays, eps):
            return quantize.RoundedRows(*_rounded_norm(*arrays, eps=eps, activations=activations))

        return _of_rows(norm, scale, self.eps, x)

    def added_to(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """h + self(x) of [..., D], one kernel where nobody looks at what is added."""
        if captures.is_tapped(""):
            return h + self(x)
        scale = hk.get_parameter("scale", x.shape[-1:], init=jnp.ones)
        return _of_rows(_added_norm, scale, self.eps, h, x)


@dataclasses.dataclass
class InOutEmbed(hk.Module):
    """The table [V, D] that embeds tokens and, transposed, gives the logits."""

    config: LanguageModelConfig

    def table(self):
        """The parameter [V, D], floats or rows of int8, and the logical axis of V."""
        c = self.config
        init = hk.initializers.TruncatedNormal(c.embedding_init_scale * c.emb_size**-0.5)
        table = hk.get_parameter("embeddings", [c.vocab_size, c.emb_size], init=init)
        return table, sharding.parameter_axes(f"{self.module_name}/embeddings", 2)[0]

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
        c, dtype = self.config, self.config.fprop_dtype
        table, vocab = self.table()
        axis = sharding.mesh_axis(vocab, c.vocab_size)
        look = functools.partial(quantize.table_rows, axis_name=axis)
        in_axes = ((vocab, None), ("batch", None))
        look = sharding.shard_map(look, in_axes, ("batch", None, None))
        rows = look(table, tokens).astype(dtype).astype(jnp.float32)
        return (rows * c.embedding_multiplier_scale).astype(dtype)

    def decode(self, h: jax.Array) -> jax.Array:  # [..., D] -> float32 [..., V]
        table, vocab = self.table()
        if isinstance(table, jax.Array):
            table = table.astype(h.dtype)
        in_axes = (("batch", None), (vocab, None))
        dot = sharding.shard_map(quantize.table_dot, in_axes, ("batch", vocab))
        logits = dot(h.reshape(-1, h.shape[-1]), table).reshape(*h.shape[:-1], -1)
        return logits * self.config.output_multiplier_scale


# --- Forward pass ---------------------------------------------------------------------------------


@dataclasses.dataclass
class MultiHeadAttention(hk.Module):
    """Grouped-query attention with rotary positions and a soft cap on its logits."""

    config: LanguageModelConfig

    def __call__(self, x: jax.Array, positions: jax.Array, memory: KVMemory | None):
        """x [B, T, D], positions [B, T] -> [B, T, D] and the cache with the new keys and values."""
        c = self.config
        heads = {"query": c.num_q_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
        shapes = {name: (x.shape[-1], count * c.key_size) for name, count in heads.items()}
        projected = products(x, *matrices(self, shapes), c.activations)
        parts = (y.reshape(*x.shape[:2], -1, c.key_size) for y in projected)
        q, k, v = (captures.tap(name, y) for name, y in zip(heads, parts, strict=True))
        if memory is None or captures.is_tapped("rotated_query", "rotated_key", "weights"):
            y, memory = self._step_by_step(q, k, v, positions, memory)
        else:
            frequencies = _frequencies(c.key_size, c.rope_base)

            def look(*arrays):
                return list(attend_and_write(*arrays, frequencies, **self._options))

            look = sharding.shard_map(
                look,
                (HEADS_AXES, HEADS_AXES, HEADS_AXES, MEMORY_AXES, MEMORY_AXES, ("batch", None)),
                [HEADS_AXES, MEMORY_AXES, MEMORY_AXES],
            )
            y, *caches = look(q, k, v, *memory, positions)
            memory = KVMemory(*caches)
        y = captures.tap("heads", y)  # [B, T, N, H]
        y = Linear(c.emb_size, c.activations, "linear")(y.reshape(*x.shape[:2], -1))
        return captures.tap("output", y), memory

    @property
    def _options(self) -> dict[str, float]:
        return {"multiplier": self.config.attn_output_multiplier, "cap": self.config.attn_logit_cap}

    def _step_by_step(self, q, k, v, positions, memory):
        """`attend_and_write` without a cache, or with what is in between to look at."""
        q, k = (rotary_embedding(y, positions, self.config.rope_base) for y in (q, k))
        q, k = captures.tap("rotated_query", q), captures.tap("rotated_key", k)
        if memory is None:
            look, seen = attention.attend, KVMemory(k.swapaxes(1, 2), v.swapaxes(1, 2))
        else:
            look, seen = attention.attend_to_cache, write_memory(memory, k, v, positions)
            memory = seen
        position = ("batch", None)
        if captures.is_tapped("weights"):
            look = functools.partial(attention.weights, **self._options)
            look = sharding.shard_map(look, (HEADS_AXES, MEMORY_AXES, position), MEMORY_AXES)
            mix = sharding.shard_map(attention.weighted, (MEMORY_AXES, MEMORY_AXES), HEADS_AXES)
            return mix(captures.tap("weights", look(q, seen.k, positions)), seen.v), memory
        look = functools.partial(look, **self._options)
        in_axes = (HEADS_AXES, MEMORY_AXES, MEMORY_AXES, position)
        return sharding.shard_map(look, in_axes, HEADS_AXES)(q, *seen, positions), memory


@dataclasses.dataclass
class Router(hk.Module):
    """Softmax over all experts and the A largest; their probabilities are not renormalised."""

    config: LanguageModelConfig

    def __call__(self, x: jax.Array, valid: jax.Array):
        """[B, T, D] -> logits and probabilities, float32 [B, T, E], and of the chosen experts
        [B, T, A] probability and index, -1 where not valid [B, T]."""
        c, w = self.config, matrix(x.shape[-1], self.config.num_experts)
        selected = c.num_selected_experts

        def route(x, w, valid):
            found = routed(x.reshape(-1, x.shape[-1]), w, valid.reshape(-1), selected=selected)
            return [y.reshape(*x.shape[:2], -1) for y in found]

        token = ("batch", None, None)
        route = sharding.shard_map(route, (token, (None, None), token[:2]), [token] * 4)
        logits, probs, gates, index = route(x, w, valid)
        if captures.is_tapped("logits"):
            logits = captures.tap("logits", logits)

            def choose(*arrays):
                return list(chosen(*arrays, selected=selected))

            choose = sharding.shard_map(choose, (token, token[:2]), [token] * 3)
            probs, gates, index = choose(logits, valid)
        if captures.is_tapped("chosen", "gates"):
            index = captures.tap("chosen", index)
            of_chosen = probs * jax.nn.one_hot(index, c.num_experts).sum(axis=-2)  # [B, T, E]
            gates = jnp.take_along_axis(captures.tap("gates", of_chosen), index, axis=-1)
        return logits, probs, gates, index


@dataclasses.dataclass
class MoELayer(hk.Module):
    """(gelu(x @ linear) * (x @ linear_v)) @ linear_1 of each token's experts, times their gates."""

    config: LanguageModelConfig
    name: str = "moe"

    def __call__(self, x, gates, index):
        """x [B, T, D], perhaps `quantize.RoundedRows`, gates and index [B, T, A] -> [B, T, D]."""
        c = self.config
        up, down = (c.num_experts, c.emb_size, c.ffn_size), (c.num_experts, c.ffn_size, c.emb_size)
        shapes = {"linear": up, "linear_v": up, "linear_1": down}
        weights, axes = matrices(self, shapes)
        axis = sharding.mesh_axis(axes[-1][1], c.ffn_size)  # of F
        options = {"axis_name": axis, "scale_last": quantize.has_last_scale(weights[-1])}
        options["activations"] = c.activations
        token = ("batch", None, None)
        if captures.is_tapped("hidden", "outputs"):
            first = functools.partial(experts.hidden_of_each, activations=c.activations)
            pair = ("batch", None, None, axes[-1][1])
            first = sharding.shard_map(first, (token, token, *axes[:2]), pair)
            x = quantize.floats_of(x)
            hidden = captures.tap("hidden", first(x, index, *weights[:2]))
            last = functools.partial(experts.outputs_of_each, **options)
            out = (*token, None)
            last = sharding.shard_map(last, (pair, token, axes[-1]), out)
            each = captures.tap("outputs", last(hidden, index, weights[-1]))
            y = jnp.sum(each.astype(jnp.float32) * gates[..., None], axis=2).astype(x.dtype)
        else:
            mix = functools.partial(experts.mixture, **options)
            mix = sharding.shard_map(mix, (token, token, token, *axes), token)
            y = mix(x, gates, index, *weights)
        return captures.tap("output", y)


# The norms whose output is added to h; dropout in training comes after them (`learning.is_added`).
ADDED_NORMS = ("rms_norm_1", "rms_norm_3")


@dataclasses.dataclass
class DecoderLayer(hk.Module):
    """Attention, then experts (or one dense block), each between two norms and added to h."""

    config: LanguageModelConfig
    name: str

    def __call__(self, h, positions, valid, memory):
        """h [B, T, D], positions and valid [B, T] -> LayerOutput and the layer's cache."""
        h, memory = add_attention(self.config, h, positions, memory)
        return add_experts(self.config, h, valid), memory


def add_attention(c: LanguageModelConfig, h, positions, memory):
    """The first half of a layer: h [B, T, D] with its attention added, and the layer's cache."""
    y = RMSNorm(c.rms_norm_eps, "rms_norm").rounded(h, c.activations)
    y, memory = MultiHeadAttention(c)(y, positions, memory)
    return captures.tap("middle", RMSNorm(c.rms_norm_eps, "rms_norm_1").added_to(h, y)), memory


def add_experts(c: LanguageModelConfig, h, valid) -> LayerOutput:
    """The second half of a layer: h [B, T, D] with what its experts compute added."""
    x = RMSNorm(c.rms_norm_eps, "rms_norm_2").rounded(h, c.activations)
    logits = probs = index = None
    if c.num_experts > 1:
        logits, probs, gates, index = Router(c)(quantize.floats_of(x), valid)
        y = MoELayer(c)(x, gates, index)
    else:
        gate = jax.nn.gelu(Linear(c.ffn_size, c.activations, "linear")(x))
        y = gate * Linear(c.ffn_size, c.activations, "linear_v")(x)
        y = captures.tap("experts/hidden", y)
        y = captures.tap("experts/output", Linear(c.emb_size, c.activations, "linear_1")(y))
    h = captures.tap("hidden", RMSNorm(c.rms_norm_eps, "rms_norm_3").added_to(h, y))
    return LayerOutput(h, logits, probs, index)


@dataclasses.dataclass
class Transformer(hk.Module):
    """All decoder layers."""

    config: LanguageModelConfig

    def __call__(self, h: jax.Array, lengths: jax.Array, memory: Memory | None):
        """h [B, T, D], lengths [B] -> a LayerOutput for each layer, and the cache."""
        queries = jnp.arange(h.shape[1])
        step = jnp.zeros_like(lengths) if memory is None else memory.step
        positions = step[:, None] + queries  # [B, T]
        valid = queries < lengths[:, None]  # [B, T]
        outputs, caches = [], []
        for i in range(self.config.num_layers):
            layer = DecoderLayer(self.config, f"decoder_layer_{i}")
            cache = None if memory is None else memory.layers[i]
            output, cache = layer(h, positions, valid, cache)
            h = output.hidden
            outputs.append(output)
            caches.append(cache)
        if memory is not None:
            memory = Memory(tuple(caches), step + lengths)
        return tuple(outputs), memory


@dataclasses.dataclass
class LanguageModel(hk.Module):
    """Tokens to logits. The transformer is made outside, as in the release: its parameters are
    `transformer/...`, not `language_model/transformer/...`."""

    config: LanguageModelConfig
    transformer: Transformer

    def __call__(
        self,
        tokens: jax.Array,
        memory: Memory | None = None,
        lengths: jax.Array | None = None,
        last_only: bool = False,
    ) -> LanguageModelOutput:
        """The logits after each token, or after the last one of each row.

        tokens: int32 [B, T], padded on the right. ValueError for ids outside of the vocabulary;
          under `jit`, where no value can be an error, their logits are NaN
        memory: the cache to continue and to extend; without one the rows stand alone
        lengths: int32 [B], tokens of each row that are not padding (by default all T); a row of
          length 0 does not advance, what it writes is overwritten before it can be seen, and
          its last logits are 0
        """
        check_ids(tokens, self.config.vocab_size)
        if lengths is None:
            lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        embed = InOutEmbed(self.config)
        h = captures.tap("embedding", embed(tokens))
        layers, memory = self.transformer(h, lengths, memory)
        h = layers[-1].hidden
        if last_only:
            h = jnp.take_along_axis(h, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
            h = jnp.where(lengths[:, None] > 0, h, 0)  # of zeros no logits are computed
        h = RMSNorm(self.config.rms_norm_eps)(h)
        return LanguageModelOutput(captures.tap("logits", embed.decode(h)), memory, layers)


# --- Edges ----------------------------------------------------------------------------------------


def make_model(config: LanguageModelConfig) -> hk.Transformed:
    """The model as pure functions: `init(rng, tokens)` and `apply(params, None, tokens, ...)`.

    `apply` takes the arguments of `LanguageModel.__call__`. Parameters may be in any format of
    `quantize.py`.
    """
    return hk.transform(
        lambda *args, **kwargs: LanguageModel(config, Transformer(config))(*args, **kwargs)
    )


def abstract_params(config: LanguageModelConfig) -> dict:
    """The parameter tree `{module: {name: ShapeDtypeStruct}}` in the release's file order.

    All float32 and of logical shape; nothing is allocated. Of the layers, which are alike, one is
    traced: all 64 of Grok-1 would take seconds.
    """
    tokens, one = jax.ShapeDtypeStruct((1, 1), jnp.int32), dataclasses.replace(config, num_layers=1)
    params = {}
    for module, entries in jax.eval_shape(make_model(one).init, jax.random.key(0), tokens).items():
        for i in range(config.num_layers if "/decoder_layer_0/" in module else 1):
            name = module.replace("/decoder_layer_0/", f"/decoder_layer_{i}/")
            params[name] = dict(sorted(entries.items()))
    return {module: params[module] for module in sorted(params)}
