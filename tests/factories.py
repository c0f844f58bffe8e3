"""What the tests share: small configurations, random parameters, the golden cases, and a look into
jaxprs."""

import dataclasses
import functools
import hashlib
import json
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
import formats
import quantize
from model import PRECISIONS, LanguageModelConfig, abstract_params, config_from_dict

GOLDEN = Path(__file__).parent / "golden"
CASES = ("released_layout", "single_device", "dense")

# Sizes that differ from one another, and odd ones where they may be. F is 48.
ODD = LanguageModelConfig(
    vocab_size=61,
    sequence_len=37,
    emb_size=35,
    num_layers=2,
    num_q_heads=6,
    num_kv_heads=3,
    key_size=14,
    widening_factor=2,
    num_experts=5,
    num_selected_experts=2,
    embedding_multiplier_scale=5.9,
    attn_output_multiplier=0.31,
    fprop_dtype="float32",
)

# As many heads, and so on, as eight devices can share. F is 160.
EVEN = dataclasses.replace(
    ODD,
    vocab_size=104,
    emb_size=40,
    num_q_heads=16,
    num_kv_heads=8,
    key_size=6,
    widening_factor=6,
)


quantize_int8 = jax.jit(formats.quantize_int8, static_argnums=1)


def ternarize(w: np.ndarray) -> quantize.PackedWeight:
    """`formats.ternarize` in NumPy, which has nothing to compile."""
    return jax.tree.map(jnp.asarray, formats.ternarize(w))


def slow(*values):
    """A case of a parametrized test that is left out unless `-m slow` asks for it: one of many
    that are alike."""
    return pytest.param(*values, marks=pytest.mark.slow)


def random_params(config: LanguageModelConfig, weights: str = "float32", groups: int = 1, seed=0):
    """Random parameters of a precision, a name of PRECISIONS.

    Every norm, expert and attention head matters, and attention logits reach the cap. `groups` is
    the number of scale groups of int8 matrices, where it divides their inputs.
    """
    random = np.random.default_rng(seed)
    table = PRECISIONS[weights]

    def one(path, format, abstract):
        shape = abstract.shape
        if path.endswith("/scale"):
            return jnp.asarray(1 + 0.3 * random.standard_normal(shape), jnp.float32)
        gain = 3 if path.endswith(("query/w", "key/w", "router/w")) else 1
        fan = shape[-1] if path.endswith("embeddings") else shape[-2]
        w = (gain * fan**-0.5 * random.standard_normal(shape)).astype(np.float32)
        if format == "int8":
            return quantize_int8(w, groups if shape[-2] % groups == 0 else 1)
        return jax.tree.map(jnp.asarray, formats.FORMATS[format].quantize(w))

    return quantize.apply_rules(table, abstract_params(config), one)


def as_floats(params: dict) -> dict:
    """The same parameters as float32 NumPy arrays."""
    params = jax.tree.map(np.asarray, params)
    return {
        module: {name: quantize.dequantize(w) for name, w in entries.items()}
        for module, entries in params.items()
    }


def random_tokens(config: LanguageModelConfig, *shape: int, seed: int = 0) -> jax.Array:
    """int32 tokens of this shape, none of them padding."""
    tokens = np.random.default_rng(seed).integers(1, config.vocab_size, shape)
    return jnp.asarray(tokens, jnp.int32)


def golden_config(case: str, **changes) -> LanguageModelConfig:
    """The configuration of a golden case."""
    values = json.loads((GOLDEN / case / "config.json").read_text())
    return dataclasses.replace(config_from_dict(values), **changes)


@functools.cache
def golden_arrays(case: str) -> dict[str, np.ndarray]:
    """What the reference computed; `golden/README.md` describes the arrays."""
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def golden_params(case: str, weights: str) -> dict:
    """The weights of a golden case, restored in the form that `weights` names in PRECISIONS."""
    template = abstract_params(golden_config(case))
    return checkpoint.restore(GOLDEN / case, template, PRECISIONS[weights])


# --- Checkpoints that somebody made to harm -------------------------------------------------------


def mend_sums(folder: Path) -> None:
    """Makes sizes and sums in checksums.json those of the files, whatever these are now."""
    path = folder / "checksums.json"
    sums = json.loads(path.read_text())
    for name, noted in sums.items():
        data = (folder / name).read_bytes()
        noted |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if "header_crc32" in noted:
            end = 8 + int.from_bytes(data[:8], "little")
            noted["header_crc32"] = f"{zlib.crc32(data[:end]):08x}"
    path.write_text(json.dumps(sums))


def split_header(data: bytes) -> tuple[bytes, bytes]:
    """The JSON at the head of a safetensors file, and what follows it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def join_header(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


# --- What the compiler is given -------------------------------------------------------------------


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(inner)


def largest_array(f, *args):
    """Elements of the largest array that f computes."""
    sizes = [
        math.prod(v.aval.shape)
        for equation in equations(jax.make_jaxpr(f)(*args))
        for v in equation.outvars
    ]
    return max(sizes)
