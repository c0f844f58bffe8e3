"""One ternary product at a time, beside other forms of the same matrix."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

import kernels
import quantize
from benchmarks import timer
from quantize import PackedWeight

SHAPES = ((6144, 32768), (32768, 6144), (1536, 8192))
ROWS = (1, 8, 128, 512)


def random_ternary(shape: tuple[int, ...], seed: int = 0) -> PackedWeight:
    """A packed weight of logical shape [..., I, O], every code as likely."""
    *lead, inputs, outputs = shape
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 81, (*lead, outputs, inputs // 4), np.uint8)
    digits = np.array([sum(n // 3**k % 3 << 2 * k for k in range(4)) for n in range(81)], np.uint8)
    gamma = np.full((*lead, 1, 1), inputs**-0.5, np.float32)
    block = quantize.packing_block(inputs)
    return PackedWeight(jnp.asarray(digits[numbers]), jnp.asarray(gamma), block)


# --- Products -------------------------------------------------------------------------------------


def product_seconds(multiply, x, weights) -> float:
    """Seconds of one product, in a compiled loop over several weights that no cache holds."""
    stacked = jax.tree.leaves(weights)[0].shape[0]
    count = stacked if x.shape[0] < 64 else min(stacked, 4)
    kernels.use_large_pages(weights)

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
                plain = kernels.disabled() if "plain" in name else contextlib.nullcontext()
                with plain:
                    seconds = product_seconds(multiply, jnp.asarray(values, dtype), weights)
                limit = max(size / 4 / limits["bytes"], 2 * rows * size / limits["int8"])
                report(
                    case=f"{inputs} x {outputs}, {rows} rows, {name}",
                    ms=seconds * 1e3,
                    GB_per_s=read / seconds / 1e9,
                    of_limit=limit / seconds,
                )
