"""Speed of ternary products, of decoding and of prefill, with baselines and limits in the same run.

    python -m benchmarks
    python -m benchmarks --only products --json results.json

The limit of a product is the time to read its weights once at the measured bandwidth, or to
multiply at the measured int8 rate, whichever is longer; that of a decoded token, the weights of two
of eight experts, attention and the output head. Weights are random, and too large for a cache.
"""

import argparse
import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

import kernels
import model
import quantize
import runners
from benchmarks import timer
from quantize import QuantizedWeight1_58bit

SHAPES = ((6144, 32768), (32768, 6144), (1536, 8192))
ROWS = (1, 8, 128, 512)
PROMPTS = (128, 512)
DECODED = 64


def random_ternary(shape: tuple[int, ...], seed: int = 0) -> QuantizedWeight1_58bit:
    """A packed weight of logical shape [..., I, O], every code as likely."""
    *lead, inputs, outputs = shape
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 81, (*lead, outputs, inputs // 4), np.uint8)
    digits = np.array([sum(n // 3**k % 3 << 2 * k for k in range(4)) for n in range(81)], np.uint8)
    gamma = np.full((*lead, 1, 1), inputs**-0.5, np.float32)
    block = quantize.packing_block(inputs)
    return QuantizedWeight1_58bit(jnp.asarray(digits[numbers]), jnp.asarray(gamma), block)


@contextlib.contextmanager
def plain_jax():
    """Without the native kernels; what was compiled before must not be used inside."""
    kept, kernels.on_cpu = kernels.on_cpu, lambda: False
    try:
        yield
    finally:
        kernels.on_cpu = kept


# --- Products -------------------------------------------------------------------------------------


def product_seconds(multiply, x, weights) -> float:
    """Seconds of one product, in a compiled loop over several weights that no cache holds."""
    stacked = jax.tree.leaves(weights)[0].shape[0]
    count = stacked if x.shape[0] < 64 else min(stacked, 4)

    @jax.jit
    def loop(x, weights):
        def body(total, i):
            y = multiply(x + 0 * total.astype(x.dtype), weights, i)
            return y[0, 0].astype(jnp.float32), None

        return jax.lax.scan(body, jnp.float32(0), jnp.arange(count))[0]

    return timer.median(lambda: loop(x, weights), 5) / count


def ternary_product(activations):
    def multiply(x, w, i):
        return quantize.grouped_dot(x, w, i[None], activations=activations)

    return multiply


def dense_product(x, w, i):
    chosen = jax.lax.dynamic_index_in_dim(w, i, 0, False)
    wide = jnp.float32
    return jax.lax.dot_general(x, chosen, (((1,), (0,)), ((), ())), preferred_element_type=wide)


def dequantized_product(x, w, i):
    """The release's way: int8 times its scales, then a product."""
    codes, scales = (jax.lax.dynamic_index_in_dim(part, i, 0, False) for part in w)
    return x @ (codes.astype(x.dtype) * scales)


def products(report, limits) -> None:
    random = np.random.default_rng(0)
    for inputs, outputs in SHAPES:
        size = inputs * outputs
        ternary = random_ternary((max(2, (1 << 29) // size), inputs, outputs))
        codes = jnp.ones((2, inputs, outputs), jnp.int8)
        forms = [
            ("ternary, int8", ternary_product("int8"), ternary, jnp.float32, size / 4),
            ("ternary, int15", ternary_product("int15"), ternary, jnp.float32, size / 4),
            ("ternary, int8, plain JAX", ternary_product("int8"), ternary, jnp.float32, size / 4),
            ("ternary, float, bfloat16", ternary_product("float"), ternary, jnp.bfloat16, size / 4),
            ("dense bfloat16", dense_product, codes.astype(jnp.bfloat16), jnp.bfloat16, 2 * size),
            (
                "int8 dequantised to bfloat16",
                dequantized_product,
                (codes, jnp.ones((2, 1, outputs), jnp.bfloat16)),
                jnp.bfloat16,
                size,
            ),
        ]
        for rows in ROWS:
            values = random.standard_normal((rows, inputs))
            for name, multiply, weights, dtype, read in forms:
                plain = plain_jax() if "plain" in name else contextlib.nullcontext()
                with plain:
                    seconds = product_seconds(multiply, jnp.asarray(values, dtype), weights)
                limit = max(size / 4 / limits["bytes"], 2 * rows * size / limits["int8"])
                report(
                    case=f"{inputs} x {outputs}, {rows} rows, {name}",
                    ms=seconds * 1e3,
                    GB_per_s=read / seconds / 1e9,
                    of_limit=limit / seconds,
                )


# --- A model --------------------------------------------------------------------------------------


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


def decoded_bytes(runner: runners.ModelRunner) -> int:
    """Bytes of weights that one token reads: of the experts only the chosen ones."""
    config, total = runner.config, 0
    for module, entries in runner.params.items():
        share = config.num_selected_experts / config.num_experts if "/moe/" in module else 1
        total += sum(int(leaf.nbytes * share) for leaf in jax.tree.leaves(entries))
    return total


def timing_of(inference: runners.InferenceRunner, length: int, new: int) -> runners.Timing:
    """What a request of so many tokens, alone, took."""
    request = runners.Request(list(range(5, 5 + length)), temperature=0.0, max_len=new)
    inference.timing = runners.Timing()
    for _ in inference.generate([request]):
        pass
    return inference.timing


def models(report, limits) -> None:
    cases = (("int8", "bfloat16"), ("int15", "bfloat16"), ("int8", "float32"))
    for activations, dtype in cases:
        config = dataclasses.replace(
            model.PRESETS["bench"], activations=activations, fprop_dtype=dtype
        )
        runner = runners.ModelRunner(config)
        runner.params = random_params(config)
        name = f"bench, {activations}, {dtype}"
        inference = runners.InferenceRunner(runner)
        run = functools.partial(timing_of, inference)
        run(4, 4)
        speeds = []
        for _ in range(5):
            timing = run(4, DECODED)
            speeds.append(timing.decode_seconds / timing.decode_tokens)
        seconds = float(np.median(speeds))
        read = decoded_bytes(runner)
        report(
            case=f"{name}, decode",
            ms=seconds * 1e3,
            GB_per_s=read / seconds / 1e9,
            of_limit=read / limits["bytes"] / seconds,
            tokens_per_s=1 / seconds,
        )
        for length in PROMPTS:
            run(length, 1)
            seconds = float(np.median([run(length, 1).prefill_seconds for _ in range(5)]))
            active = 3 * config.num_selected_experts * config.ffn_size * config.emb_size
            active += 2 * (config.num_q_heads + config.num_kv_heads) * 128 * config.emb_size
            limit = 2 * length * config.num_layers * active / limits["int8"]
            report(
                case=f"{name}, prefill of {length}",
                ms=seconds * 1e3,
                of_limit=limit / seconds,
                tokens_per_s=length / seconds,
            )


CASES = {"products": products, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=CASES, help="one part (all)")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    args = parser.parse_args()
    machine = timer.machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    limits = {
        "bytes": machine["read_bandwidth_GB_per_s"] * 1e9,
        "int8": machine["int8_T_per_s"] * 1e12,
    }
    print(f"{'':52} {'ms':>9} {'GB/s':>7} {'of limit':>8} {'tokens/s':>9}")
    rows = []

    def report(**row):
        rows.append(row)
        speed, tokens = (f"{row[k]:.1f}" if k in row else "" for k in ("GB_per_s", "tokens_per_s"))
        print(
            f"{row['case']:52} {row['ms']:9.2f} {speed:>7} {row['of_limit']:8.2f} {tokens:>9}",
            flush=True,
        )

    for name, run in CASES.items():
        if args.only in (None, name):
            run(report, limits)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
