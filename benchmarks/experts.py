"""The expert products of one token of the `bench` preset, beside onnxruntime's 2-bit MatMulNBits.

Of each layer two experts: x + sum of (x @ linear * x @ linear_v) @ linear_1, without routing,
attention and the gelu, on the same trits. onnxruntime keeps a scale for each 128 inputs, and rounds
activations to int8 in blocks of them (accuracy level 4); ours rounds whole rows.
"""

import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import kernels
import model
import quantize
from benchmarks import timer
from benchmarks.products import random_ternary

INSTALL = "onnxruntime is not installed; pip install onnxruntime==1.31.1"
ROWS = (1, 128, 512)
ROUNDS = 7
BLOCK = 128  # inputs that share a scale
NAMES = ("linear", "linear_v", "linear_1")


def library():
    """onnxruntime; ImportError, with the cure, where it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return onnxruntime


def versions() -> dict[str, str]:
    return {"onnxruntime": library().__version__}


# --- A model for onnxruntime ----------------------------------------------------------------------
#
# Protocol buffers by hand, so that the `onnx` package is not needed. Numbers of fields are those of
# onnx.proto.


def varint(n: int) -> bytes:
    """Seven bits to a byte, the lowest first; the high bit says that more follow."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Fields (number, value): integers as varints, all else as bytes with their length."""
    encoded = []
    for number, value in fields:
        if isinstance(value, int):
            encoded.append(varint(number << 3) + varint(value))
        else:
            value = value.encode() if isinstance(value, str) else value
            encoded.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(encoded)


def tensor(name: str, array: np.ndarray) -> bytes:
    """A TensorProto, float32 or uint8."""
    kind = {"float32": 1, "uint8": 2}[array.dtype.name]
    sizes = [(1, size) for size in array.shape]
    return message(*sizes, (2, kind), (8, name), (9, array.tobytes()))


def node(kind: str, inputs: list[str], output: str, domain: str = "", **attributes: int) -> bytes:
    """A NodeProto, with integer attributes."""
    named = [(5, message((1, name), (3, value), (20, 2))) for name, value in attributes.items()]
    names = [(1, name) for name in inputs]
    return message(*names, (2, output), (4, kind), *named, (7, domain))


def rows_of(name: str, size: int) -> bytes:
    """A ValueInfoProto of float32 [rows, size]."""
    shape = message((1, message((2, "rows"))), (1, message((1, size))))
    return message((1, name), (2, message((1, message((1, 1), (2, shape))))))


class Graph:
    """Nodes and weights of a model, in order."""

    def __init__(self):
        self.fields = []

    def add(self, *arguments, **attributes) -> str:
        """Appends `node`; the name of its output."""
        self.fields.append((1, node(*arguments, **attributes)))
        return arguments[2]

    def product(self, x: str, w: quantize.PackedWeight, output: str) -> str:
        """x times a packed matrix [I, O]: 2 bits a weight, code - 2, times a scale."""
        inputs, outputs = w.shape
        codes = quantize.unpack(w).view(np.uint8) + np.uint8(2)  # 1, 2, 3
        packed = quantize.pack_codes(codes, block=1).T.reshape(outputs, -1, BLOCK // 4)
        scales = np.full(packed.shape[:2], w.scales.item(), np.float32)
        names = [f"{output}.weight", f"{output}.scales"]
        self.fields += [(5, tensor(*pair)) for pair in zip(names, (packed, scales), strict=True)]
        sizes = {"K": inputs, "N": outputs, "bits": 2, "block_size": BLOCK, "accuracy_level": 4}
        return self.add("MatMulNBits", [x, *names], output, "com.microsoft", **sizes)

    def model(self, x: str, y: str, size: int) -> bytes:
        """The ModelProto of a graph from x to y, both [rows, size]."""
        graph = message(
            *self.fields, (2, "experts"), (11, rows_of(x, size)), (12, rows_of(y, size))
        )
        opsets = [
            (8, message((1, domain), (2, n))) for domain, n in (("", 17), ("com.microsoft", 1))
        ]
        return message((1, 8), *opsets, (7, graph))


def experts_model(layers: list[dict]) -> bytes:
    """The ModelProto of `ours`, for weights of NAMES, packed [experts, I, O], of each layer."""
    graph, x = Graph(), "x"
    size = layers[0]["linear"].shape[-2]
    for i, layer in enumerate(layers):
        start = x
        for e in range(len(layer["linear"].packed)):
            name = f"{i}.{e}"
            w = {
                key: jax.tree.map(lambda part, e=e: np.asarray(part[e]), layer[key])
                for key in NAMES
            }
            pair = [graph.product(start, w[key], f"{name}.{key}") for key in NAMES[:2]]
            hidden = graph.add("Mul", pair, f"{name}.hidden")
            out = graph.product(hidden, w["linear_1"], f"{name}.linear_1")
            x = graph.add("Add", [x, out], f"{name}.sum")
    return graph.model("x", x, size)


# --- Ours, and the comparison ---------------------------------------------------------------------


@jax.jit
def ours(x: jax.Array, layers: list[dict]) -> jax.Array:  # [R, D] -> [R, D]
    dot = functools.partial(quantize.grouped_dot, activations="int8")
    for layer in layers:
        chosen = jnp.arange(len(layer["linear"].packed))
        rows = jnp.tile(x, (len(chosen), 1))
        hidden = dot(rows, layer["linear"], chosen) * dot(rows, layer["linear_v"], chosen)
        out = dot(hidden, layer["linear_1"], chosen)
        x = x + out.reshape(len(chosen), *x.shape).sum(axis=0)
    return x


def session(layers: list[dict]):
    """An onnxruntime session of `experts_model`, on all cores."""
    onnxruntime = library()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count()
    return onnxruntime.InferenceSession(
        experts_model(layers), options, providers=["CPUExecutionProvider"]
    )


def random_layers(config: model.LanguageModelConfig) -> list[dict]:
    up, down = (config.emb_size, config.ffn_size), (config.ffn_size, config.emb_size)
    return [
        {
            name: random_ternary((config.num_selected_experts, *shape), seed=3 * i + j)
            for j, (name, shape) in enumerate(zip(NAMES, (up, up, down), strict=True))
        }
        for i in range(config.num_layers)
    ]


def seconds_of(f) -> float:
    """Mean seconds of as many calls as fill a tenth of a second, after one that does not count."""
    jax.block_until_ready(f())
    begin, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - begin < 0.1:
        jax.block_until_ready(f())
        calls += 1
    return (time.perf_counter() - begin) / calls


def compare(report, limits) -> None:
    config = model.PRESETS["bench"]
    layers = random_layers(config)
    theirs = session(layers)
    kernels.use_large_pages(layers)
    random = np.random.default_rng(0)
    products = 3 * config.num_selected_experts * config.num_layers
    products *= config.emb_size * config.ffn_size
    for rows in ROWS:
        x = random.standard_normal((rows, config.emb_size), np.float32)
        measures = {
            "ours": lambda x=x: ours(x, layers),
            "onnxruntime MatMulNBits": lambda x=x: theirs.run(None, {"x": x})[0],
        }
        a, b = (np.asarray(f()) for f in measures.values())
        error = np.sqrt(np.square(a - b).mean() / np.square(a).mean())
        if not error < 0.15:  # rounding makes 0.06 of four layers, other weights more than 1
            raise RuntimeError(
                f"onnxruntime's products differ from ours by {error:.3f} of their size"
            )
        found = timer.alternate(
            {name: functools.partial(seconds_of, f) for name, f in measures.items()}, ROUNDS
        )
        for name, seconds in found.items():
            middle = float(np.median(seconds))
            limit = max(products / 4 / limits["bytes"], 2 * rows * products / limits["int8"])
            row = {"ms": middle * 1e3, "of_limit": limit / middle, "tokens_per_s": rows / middle}
            if name != "ours":
                row["ours_is_faster"] = float(np.median(seconds / found["ours"]))
            report(case=f"experts of a token, {rows} rows, {name}", **row)
