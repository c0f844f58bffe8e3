"""One arithmetic: the logits of a request depend on no batch and no mesh, to the last bit.

With native kernels on CPUs, and int8 or int15 activations. Prefill and three steps of decoding.
"""

import dataclasses
import functools
from pathlib import Path

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
import kernels
import model
import quantize
import runners
import sharding
import tokenizer

PROMPT, STEPS, SLOTS = 13, 3, 64
CONFIG = dataclasses.replace(factories.EVEN, num_layers=1, activations="int8")
DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"

pytestmark = pytest.mark.skipif(
    not kernels.on_cpu(), reason="no native kernels: no compiler, or a GPU"
)


def as_used(preset):
    """One layer in the sizes of a preset; only Grok-1's own experts are narrower, 2048."""
    config = dataclasses.replace(
        model.PRESETS[preset], num_layers=1, vocab_size=104, activations="int8"
    )
    if preset == "grok-1":
        config = dataclasses.replace(config, widening_factor=0.5)
    return config


@functools.cache
def params_of(sizes, weights="ternary"):
    """Random parameters of a configuration's sizes; ternary ones are made without floats."""
    if weights != "ternary":
        return factories.random_params(sizes, weights)
    random = np.random.default_rng(0)
    codes = np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3
    ternary = np.flatnonzero((codes < 3).all(axis=1)).astype(np.uint8)  # bytes without a code of 3

    def one(path, kind, w):
        if kind == "ternary":
            made = jax.eval_shape(formats.ternarize, w)
            packed = ternary[random.integers(0, len(ternary), made.packed.shape)]
            # Attention logits are to reach their cap.
            gain = 3 if path.endswith(("query/w", "key/w")) else 1
            scales = np.full(made.scales.shape, gain * (2 / 3 * w.shape[-2]) ** -0.5, np.float32)
            return dataclasses.replace(made, packed=jnp.asarray(packed), scales=scales)
        mean = 1 if path.endswith("/scale") else 0
        size = w.shape[-1] if path.endswith("embeddings") else w.shape[0]
        deviation = 0.3 if mean else size**-0.5
        return jnp.asarray(mean + deviation * random.standard_normal(w.shape), jnp.float32)

    table = model.PRECISIONS["ternary"]
    return quantize.apply_rules(table, model.abstract_params(sizes), one)


@functools.cache
def compiled(config):
    apply = model.make_model(config).apply

    def computed(params, tokens, memory, lengths):
        return apply(params, None, tokens, memory, lengths, last_only=True)

    return jax.jit(computed, compiler_options=runners.EXACT)


def tokens_with(config, batch, row, count):
    """Tokens [B, T] of so many requests; those of one row are always the same."""
    tokens = np.array(factories.random_tokens(config, batch, count, seed=batch))
    tokens[row] = factories.random_tokens(config, 1, count, seed=0)[0]
    return tokens


def arrays_of(config, batch, row, mesh, weights="ternary"):
    """What is computed for one request, which is `row` of so many; the others differ. By name:
    logits, hidden states and router probabilities of prefill and each step, then the cache."""
    tokens = tokens_with(config, batch, row, PROMPT + STEPS)
    mesh = sharding.make_mesh(*mesh)
    sizes = dataclasses.replace(config, fprop_dtype="float32", activations="int8")
    params = params_of(sizes, weights)
    params = jax.device_put(params, sharding.parameter_shardings(mesh, params))
    memory, found = model.init_memory(config, batch, SLOTS), {}
    with jax.set_mesh(mesh):
        for start, stop in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))]:
            lengths = np.full(batch, stop - start, np.int32)
            output = compiled(config)(params, tokens[:, start:stop], memory, lengths)
            memory = output.model_state
            found[f"logits {start}"] = output.logits[row]
            found[f"hidden {start}"] = output.layers[0].hidden[row]
            found[f"router {start}"] = output.layers[0].router_probs[row]
    for name, cache in memory.layers[0]._asdict().items():
        found[name] = cache[row, :, : PROMPT + STEPS]
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


@functools.cache
def alone(config, weights):
    return arrays_of(config, 1, 0, (1, 1), weights)


def assert_its_own(config, batch, row, mesh, weights="ternary"):
    found = arrays_of(config, batch, row, mesh, weights)
    differing = {
        name: np.sum(found[name] != array)
        for name, array in alone(config, weights).items()
        if np.any(found[name] != array)
    }
    assert not differing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize(
    "batch, row, mesh",
    [
        (8, 5, (1, 1)),
        factories.slow(1, 0, (1, 2)),
        factories.slow(1, 0, (1, 8)),
        (16, 5, (2, 4)),  # 104 tokens on each: experts' sums are scattered, in prefill
    ],
)
def test_logits_of_a_request_are_its_own(batch, row, mesh, activations, dtype):
    config = dataclasses.replace(CONFIG, activations=activations, fprop_dtype=dtype)
    assert_its_own(config, batch, row, mesh)


# In sizes as small as these, groups of 64, 128 and 256 are all of 4 inputs.
DISTINCT = [name for name in formats.FORMATS if not name.endswith(("-64", "-256"))]


@pytest.mark.parametrize("weights", [name for name in DISTINCT if name != "float32"])
@pytest.mark.parametrize(
    "batch, row, mesh, activations",
    [
        factories.slow(8, 5, (1, 1), "int8"),
        factories.slow(1, 0, (1, 8), "int15"),
        (16, 5, (2, 4), "int8"),
    ],
)
def test_logits_are_the_requests_own_in_every_format(batch, row, mesh, activations, weights):
    config = dataclasses.replace(CONFIG, activations=activations, fprop_dtype="float32")
    assert_its_own(config, batch, row, mesh, weights)


@pytest.mark.parametrize(
    "preset, dtype",
    [
        ("grok-1", "float32"),
        ("demo", "float32"),
        *(factories.slow(p, "float32") for p in model.PRESETS if p not in ("grok-1", "demo")),
        factories.slow("grok-1", "bfloat16"),
    ],
)
def test_logits_are_the_requests_own_in_sizes_as_used(preset, dtype):
    config = dataclasses.replace(as_used(preset), fprop_dtype=dtype)
    assert_its_own(config, 8, 5, (1, 1))
    if config.num_kv_heads % 2 == 0:
        assert_its_own(config, 8, 5, (2, 2))


def generations(slots, pad_sizes):
    """Tokens of requests to the demo: greedy, sampled, and sampled from a part of the mass."""
    runner, requests = demo(), []
    for i, prompt in enumerate(["ROMEO:", "First Citizen:\nWe are", "The king", "JULIET:\nO"]):
        for temperature, top_p in ((0, 1), (0.8, 1), (1, 0.8)):
            requests.append(runners.Request(prompt, temperature, top_p, i, 80))
    server = runners.InferenceRunner(
        runner, tokenizer.load(DEMO, runner.config.vocab_size), slots, pad_sizes=pad_sizes
    )
    tokens = {}
    for number, token in server.generate(requests):
        tokens.setdefault(number, []).append(token.token_id)
    return tokens


@functools.cache
def demo():
    runner = runners.ModelRunner(model.PRESETS["demo"])
    runner.load(DEMO)
    return runner


@pytest.mark.parametrize(
    "slots, pad_sizes", [(4, (2, 4)), factories.slow(2, runners.PAD_SIZES), factories.slow(8, (3,))]
)
def test_whole_generations_depend_on_no_neighbour(slots, pad_sizes):
    """Nor on the chunks that the prompt was prefilled in."""
    assert generations(slots, pad_sizes) == generations_alone()


@functools.cache
def generations_alone():
    return generations(1, runners.PAD_SIZES)


def test_full_passes_and_an_int8_table_too():
    exact, rounded = (
        runners.ModelRunner(dataclasses.replace(CONFIG, embeddings=kind))
        for kind in model.EMBEDDINGS
    )
    for runner in (exact, rounded):
        runner.params = runners.cast_embeddings(params_of(CONFIG), runner.config)
    one, three = (tokens_with(CONFIG, batch, batch - 1, PROMPT) for batch in (1, 3))
    for runner in (exact, rounded):
        np.testing.assert_array_equal(runner.logits(three)[2], runner.logits(one)[0])
    difference = np.std(exact.logits(one) - rounded.logits(one))
    assert 0 < difference < 0.05 * np.std(exact.logits(one))  # 127 steps to the largest of a row
