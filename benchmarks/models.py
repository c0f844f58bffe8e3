"""Decoding and prefill of a model with random ternary weights; the helpers of other benchmarks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import model
import quantize
import runners
from benchmarks import memory
from benchmarks.products import random_ternary

PROMPTS = (128, 512)
DECODED = 64
CASES = (("int8", "bfloat16"), ("int15", "bfloat16"), ("int8", "float32"))


def random_params(config: model.LanguageModelConfig) -> dict:
    """Ternary parameters of a model, at random, as they are in memory."""
    random = np.random.default_rng(0)

    def one(path, kind, weight):
        if kind == "ternary":
            return random_ternary(weight.shape)
        if path.endswith("/scale"):
            return jnp.ones(weight.shape, jnp.float32)
        values = random.standard_normal(weight.shape, np.float32) * weight.shape[-1] ** -0.5
        return jnp.asarray(values)

    params = quantize.apply_rules(model.PRECISIONS["ternary"], model.abstract_params(config), one)
    return runners.cast_embeddings(params, config)


def make_runner(config: model.LanguageModelConfig) -> runners.ModelRunner:
    """A model with random parameters."""
    runner = runners.ModelRunner(config)
    runner.params = random_params(config)
    return runner


def timing_of(inference: runners.InferenceRunner, length: int, new: int) -> runners.Timing:
    """What a request of so many tokens, alone, took."""
    request = runners.Request(list(range(5, 5 + length)), temperature=0.0, max_len=new)
    inference.timing = runners.Timing()
    for _ in inference.generate([request]):
        pass
    return inference.timing


# --- What they read and multiply ------------------------------------------------------------------


def expert_share(config: model.LanguageModelConfig, tokens: int = 1) -> float:
    """The share of the experts that some tokens need between them, if each takes any."""
    return 1 - (1 - config.num_selected_experts / config.num_experts) ** tokens


def step_bytes(runner: runners.ModelRunner, tokens: int = 1) -> float:
    """Bytes of weights that a step of so many tokens reads, of the experts `expert_share`."""
    share, total = expert_share(runner.config, tokens), 0
    for module, entries in runner.params.items():
        read = sum(leaf.nbytes for leaf in jax.tree.leaves(entries))
        total += read * (share if "/moe/" in module else 1)
    return total


def layer_products(config: model.LanguageModelConfig) -> int:
    """Multiplications of a token with the matrices of all layers."""
    experts = 3 * config.num_selected_experts * config.ffn_size * config.emb_size
    heads = 2 * (config.num_q_heads + config.num_kv_heads) * config.key_size
    return config.num_layers * (experts + heads * config.emb_size)


def decode_row(read: float, seconds: float, limits: dict) -> dict:
    """The columns of a decoded token that reads so many bytes."""
    return {
        "ms": seconds * 1e3,
        "GB_per_s": read / seconds / 1e9,
        "of_limit": read / limits["bytes"] / seconds,
        "tokens_per_s": 1 / seconds,
    }


def prefill_row(config, tokens: int, seconds: float, limits: dict, read: float = 0) -> dict:
    """The columns of tokens that are computed together and read so many bytes.

    Those of a prompt, whose products take longer than reading, or of a step of as many requests.
    """
    products = 2 * tokens * layer_products(config) / limits["int8"]
    return {
        "ms": seconds * 1e3,
        "of_limit": max(products, read / limits["bytes"]) / seconds,
        "tokens_per_s": tokens / seconds,
    }


# --- The cases ------------------------------------------------------------------------------------


def models(report, limits) -> None:
    for activations, dtype in CASES:
        config = dataclasses.replace(
            model.PRESETS["bench"], activations=activations, fprop_dtype=dtype
        )
        one_model(f"bench, {activations}, {dtype}", config, report, limits)


def one_model(name: str, config, report, limits) -> None:
    """Rows of one token decoded and of each of PROMPTS, each with its memory.

    Memory is what the process has grown by since before the parameters were made.
    """
    meter = memory.Meter()
    runner = make_runner(config)
    run = functools.partial(timing_of, runners.InferenceRunner(runner))

    def decoded():
        timing = run(4, DECODED)
        return timing.decode_seconds / timing.decode_tokens

    def median(measure):
        measure()  # compiles
        meter.read()
        return float(np.median([measure() for _ in range(5)]))

    row = decode_row(step_bytes(runner), median(decoded), limits)
    report(case=f"{name}, decode", **row, **meter.read())
    for length in PROMPTS:
        seconds = median(lambda length=length: run(length, 1).prefill_seconds)
        row = prefill_row(config, length, seconds, limits)
        report(case=f"{name}, prefill of {length}", **row, **meter.read())
