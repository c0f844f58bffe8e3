"""One ternary product at a time, beside other forms of the same matrix."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import formats
import kernels
import quantize
from benchmarks import timer
from quantize import PackedWeight

SHAPES = ((6144, 32768), (32768, 6144), (1536, 8192))
ROWS = (1, 8, 128, 512)
PACKED = ("ternary", "ternary-fit-128", "ternary2-128")  # formats, in turns


def random_ternary(shape: tuple[int, ...], seed: int = 0, name: str = "ternary") -> PackedWeight:
    """A packed weight of logical shape [..., I, O] and a format, every trit as likely.

    Multipliers are up to 63, so that two are 126 at most. I is a multiple of 4. On a CPU outputs
    lie side by side where they can
    """
    abstract = formats.shapes(name, shape)
    if kernels.on_cpu():
        abstract = jax.eval_shape(quantize.interleave, abstract)
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 81, abstract.packed.shape, np.uint8)
    digits = np.array([sum(n // 3**k % 3 << 2 * k for k in range(4)) for n in range(81)], np.uint8)
    scales = np.full(abstract.scales.shape, shape[-2] ** -0.5, np.float32)
    multipliers = abstract.multipliers
    if multipliers is not None:
        multipliers = jnp.asarray(random.integers(0, 64, multipliers.shape, np.int8))
    packed, scales = jnp.asarray(digits[numbers]), jnp.asarray(scales)
    return dataclasses.replace(abstract, packed=packed, scales=scales, multipliers=multipliers)


# --- Products -------------------------------------------------------------------------------------


def product_seconds(multiply, x, weights) -> float:
    """Seconds of one product, in a compiled loop over several weights that no cache holds."""
    loop, count = product_loop(multiply, x, weights)
    return timer.median(loop, 5) / count


def product_loop(multiply, x, weights):
    """That loop, to be called without arguments, and how many products it computes."""
    stacked = jax.tree.leaves(weights)[0].shape[0]
    count = stacked if x.shape[0] < 64 else min(stacked, 4)
    kernels.use_large_pages(weights)

    @jax.jit
    def loop(x, weights):
        def body(total, i):
            y = multiply(x + 0 * total.astype(x.dtype), weights, i)
            return y[0, 0].astype(jnp.float32), None

        return jax.lax.scan(body, jnp.float32(0), jnp.arange(count))[0]

    return lambda: loop(x, weights), count


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
        rows_of = jax.jit(quantize.in_rows)(ternary)
        codes = jnp.ones((2, inputs, outputs), jnp.int8)
        forms = [
            ("ternary, int8", ternary_product("int8"), ternary, jnp.float32, size / 4),
            ("ternary, int15", ternary_product("int15"), ternary, jnp.float32, size / 4),
            ("ternary, int8, plain JAX", ternary_product("int8"), rows_of, jnp.float32, size / 4),
            ("ternary, float, bfloat16", ternary_product("float"), rows_of, jnp.bfloat16, size / 4),
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


def packed_formats(report, limits) -> None:
    for (inputs, outputs), rows in itertools.product(SHAPES, (1, 128)):
        _packed_formats(report, limits, inputs, outputs, rows)


def _packed_formats(report, limits, inputs: int, outputs: int, rows: int) -> None:
    """Weights of each packed format times int8 rows, taking turns."""
    size = inputs * outputs
    shape = (max(2, (1 << 29) // size), inputs, outputs)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, inputs)), jnp.float32)
    weights = {name: random_ternary(shape, name=name) for name in PACKED}

    def measure(name):
        loop, count = product_loop(ternary_product("int8"), x, weights[name])
        return lambda: timer.median(loop, 1) / count

    found = timer.alternate({name: measure(name) for name in PACKED})
    for name, seconds in found.items():
        read = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[name])) / shape[0]
        limit = max(read / limits["bytes"], 2 * rows * size / limits["int8"])
        middle = np.median(seconds)
        report(
            case=f"{inputs} x {outputs}, {rows} rows, {name}",
            ms=middle * 1e3,
            GB_per_s=read / middle / 1e9,
            of_limit=limit / middle,
            of_ternary=np.median(seconds / found["ternary"]),
        )
