"""One arithmetic: the logits of a request depend on no batch and no mesh, to the last bit.

With native kernels on CPUs, and int8 or int15 activations. Prefill and three steps of decoding.
"""

import dataclasses
import functools

import factories
import jax
import numpy as np
import pytest

import kernels
import model
import runners
import sharding

PROMPT, STEPS, SLOTS = 13, 3, 64
CONFIG = dataclasses.replace(factories.EVEN, num_layers=1)

pytestmark = pytest.mark.skipif(
    not kernels.on_cpu(), reason="no native kernels: no compiler, or a GPU"
)


@functools.cache
def params_of(config):
    return factories.random_params(config, "ternary")


@functools.cache
def compiled(config):
    apply = model.make_model(config).apply

    def logits(params, tokens, memory, lengths):
        output = apply(params, None, tokens, memory, lengths, last_only=True)
        return output.logits, output.model_state

    return jax.jit(logits, compiler_options=runners.EXACT)


def tokens_with(config, batch, row, count):
    """Tokens [B, T] of so many requests; those of one row are always the same."""
    tokens = np.array(factories.random_tokens(config, batch, count, seed=batch))
    tokens[row] = factories.random_tokens(config, 1, count, seed=0)[0]
    return tokens


def logits_of(config, batch, row, mesh):
    """Logits [1 + STEPS, V] of one request, which is `row` of so many; the others differ."""
    tokens = tokens_with(config, batch, row, PROMPT + STEPS)
    mesh = sharding.make_mesh(*mesh)
    params = params_of(config)
    params = jax.device_put(params, sharding.parameter_shardings(mesh, params))
    memory, found = model.init_memory(config, batch, SLOTS), []
    with jax.set_mesh(mesh):
        for start, stop in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))]:
            lengths = np.full(batch, stop - start, np.int32)
            logits, memory = compiled(config)(params, tokens[:, start:stop], memory, lengths)
            found.append(np.asarray(logits[row]))
    return np.stack(found)


@functools.cache
def alone(config):
    return logits_of(config, 1, 0, (1, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize(
    "batch, row, mesh",
    [
        (8, 5, (1, 1)),
        (1, 0, (1, 2)),
        (1, 0, (1, 8)),
        (8, 5, (2, 4)),
    ],
)
def test_logits_of_a_request_are_its_own(batch, row, mesh, activations, dtype):
    config = dataclasses.replace(CONFIG, activations=activations, fprop_dtype=dtype)
    np.testing.assert_array_equal(logits_of(config, batch, row, mesh), alone(config))


def test_full_passes_and_an_int8_table_too():
    config = dataclasses.replace(CONFIG, activations="int8")
    exact, rounded = (
        runners.ModelRunner(dataclasses.replace(config, embeddings=kind))
        for kind in model.EMBEDDINGS
    )
    for runner in (exact, rounded):
        runner.params = runners.cast_embeddings(params_of(config), runner.config)
    one, three = (tokens_with(config, batch, batch - 1, PROMPT) for batch in (1, 3))
    for runner in (exact, rounded):
        np.testing.assert_array_equal(runner.logits(three)[2], runner.logits(one)[0])
    difference = np.std(exact.logits(one) - rounded.logits(one))
    assert 0 < difference < 0.05 * np.std(exact.logits(one))  # 127 steps to the largest of a row
