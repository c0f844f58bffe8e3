"""Kernels called wrongly: each array of each kernel in turn has other sizes, ranks and dtypes.

What does not fit must be an error before anything is read. Whether anything was read all the same
shows under the address sanitizer: `tests/sanitize.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
import quantize

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels")

SIZES = {
    "blocks": 2, "R": 3, "I": 13, "E": 5, "O": 7, "B": 4, "D": 11, "V": 9,
    "T": 3, "K": 2, "S": 4, "H": 8, "H2": 4, "C": 17,
    "G": 2, "P": 1,
    "N": 6, "N64": 2, "Q": 1, "64": 64, "4": 4, "1": 1, "128": 128,
}  # fmt: skip
Q, CACHE, POSITIONS = "float32 B T N H", "float32 B K S H", "int32 B T"
ATTENTION = {"q": Q, "k": CACHE, "v": CACHE, "positions": POSITIONS}
CAPPED = {"multiplier": np.float32(0.5), "cap": np.float32(9)}
# Of each kernel its arguments, results and attributes. A result with the name of an argument is
# written in its place.
CALLS = {
    "TernaryDots": (
        {
            "x": "int8 blocks R I",
            "experts": "int32 blocks",
            "packed": "uint8 E O B",
            "multipliers": "int8 E O G P",
            "scales": "float32 E 1 O",
        },
        {"sums": "int32 blocks R O"},
        {"block": np.int64(2), "path": np.int64(-1), "levels": np.int64(0), "gated": np.int64(0)},
    ),
    "TernaryDots interleaved": (
        {
            "x": "int8 blocks R I",
            "experts": "int32 blocks",
            "packed": "uint8 E N64 Q 64 4",
            "multipliers": "int8 E N64 G P 64",
            "scales": "float32 E 1 128",
        },
        {"sums": "int32 blocks R 128"},
        {"block": np.int64(2), "path": np.int64(-1), "levels": np.int64(0), "gated": np.int64(0)},
    ),
    "TableDot": (
        {"x": "float32 R D", "table": "float32 V D"},
        {"logits": "float32 R V"},
        {},
    ),
    "GroupedProduct": (
        {"x": "float32 blocks R I", "w": "float32 E I O", "experts": "int32 blocks"},
        {"y": "float32 blocks R O"},
        {"turned": np.int64(0)},
    ),
    "GroupedProduct turned": (
        {"x": "float32 blocks R I", "w": "float32 E O I", "experts": "int32 blocks"},
        {"y": "float32 blocks R O"},
        {"turned": np.int64(1)},
    ),
    "GroupedSums": (
        {"x": "float32 blocks R I", "y": "float32 blocks R O", "experts": "int32 blocks"},
        {"sums": "float32 E I O"},
        {},
    ),
    "RmsNorm": (
        {"x": "float32 R D", "scale": "float32 D"},
        {"y": "float32 R D"},
        {"eps": np.float32(1e-5)},
    ),
    "RmsNormGradient": (
        {"x": "float32 R D", "scale": "float32 D", "dy": "float32 R D"},
        {"dx": "float32 R D", "dscale": "float32 D"},
        {"eps": np.float32(1e-5)},
    ),
    "AddedNorm": (
        {"h": "float32 R D", "x": "float32 R D", "scale": "float32 D"},
        {"y": "float32 R D"},
        {"eps": np.float32(1e-5)},
    ),
    "Attend": (ATTENTION, {"result": Q}, CAPPED),
    "AttendAndWrite": (
        {"q": Q, "k": "float32 B T K H", "v": "float32 B T K H"}
        | {"keys": CACHE, "values": CACHE, "positions": POSITIONS, "frequencies": "float32 H2"},
        {"result": Q, "keys": CACHE, "values": CACHE},
        CAPPED,
    ),
    "AttendGradient": (
        ATTENTION | {"y": Q, "dy": Q},
        {"result": Q, "dk": CACHE, "dv": CACHE},
        CAPPED,
    ),
    "WriteSlots": (
        {"cache": CACHE, "rows": "float32 B T K H", "slots": POSITIONS},
        {"cache": CACHE},
        {},
    ),
    "Likeliest": (
        {"x": "float32 R V"},
        {"values": "float32 R K", "index": "int32 R K", "total": "float32 R"},
        {},
    ),
    "Choose": (
        {"logits": "float32 R E", "valid": "bool R"},
        {"probabilities": "float32 R E", "gates": "float32 R K", "index": "int32 R K"},
        {},
    ),
    "Route": (
        {"x": "float32 R D", "router": "float32 D E", "valid": "bool R"},
        {
            "logits": "float32 R E",
            "probabilities": "float32 R E",
            "gates": "float32 R K",
            "index": "int32 R K",
        },
        {},
    ),
    "Transpose": ({"x": "bfloat16 B R C"}, {"transposed": "bfloat16 B C R"}, {}),
}


# Axes of one array alone, which may be longer or shorter: fewer inputs than packed bytes hold, one
# group of them all, and any number of slots.
FREE = {
    "TernaryDots": {("I", 12), ("G", 1)},
    "TernaryDots interleaved": {("I", 12), ("G", 1)},
    "GroupedProduct": {("E", 4), ("E", 320)},
    "GroupedProduct turned": {("E", 4), ("E", 320)},
    "GroupedSums": {("E", 4), ("E", 320)},
    "Likeliest": {("V", 8), ("V", 576)},
    "WriteSlots": {("S", 3), ("S", 256)},
}
OTHER_DTYPES = {
    ("Route", "x", "bfloat16"),
    ("TableDot", "x", "bfloat16"),
    ("TableDot", "table", "bfloat16"),
    ("TableDot", "table", "int8"),
}


def arrays_of(name):
    """The arrays of a kernel by name, each its dtype and its axes [(name, size), ...]."""
    arguments, results, _ = CALLS[name]
    arrays = {}
    for array, text in (arguments | results).items():
        dtype, *axes = text.split()
        arrays[array] = dtype, [(axis, SIZES[axis]) for axis in axes]
    return arrays


def call(name, arrays=None, **other_attributes):
    """Calls a kernel, with arguments of ones."""
    arguments, results, attributes = CALLS[name]
    structs = {
        array: jax.ShapeDtypeStruct([size for _, size in axes], jnp.dtype(dtype))
        for array, (dtype, axes) in (arrays or arrays_of(name)).items()
    }
    f = jax.ffi.ffi_call(
        f"ternary_grok_{name.split()[0]}",
        [structs[result] for result in results],
        input_output_aliases={
            list(arguments).index(r): i for i, r in enumerate(results) if r in arguments
        },
    )
    values = [np.ones(structs[array].shape, structs[array].dtype) for array in arguments]
    compiled = jax.jit(lambda *values: f(*values, **attributes | other_attributes))
    return jax.block_until_ready(compiled(*values))


def others(dtype, axes):
    """What is not an array of this dtype and these axes, but like it."""
    yield dtype, axes[1:]
    yield dtype, [*axes, ("1", 1)]
    for i, (axis, size) in enumerate(axes):
        for other in (size - 1, 64 * size):
            yield dtype, axes[:i] + [(axis, other)] + axes[i + 1 :]
    for other in ("float32", "bfloat16", "float16", "int8"):
        if other != dtype:
            yield other, axes


def may_be(name, array, other):
    """Whether an array may be like that, where all others are as `CALLS` says."""
    (dtype, axes), (other_dtype, other_axes) = arrays_of(name)[array], other
    if other_dtype != dtype:
        return (name, array, other_dtype) in OTHER_DTYPES
    new = set(other_axes) - set(axes)
    return len(other_axes) == len(axes) and new <= FREE.get(name, set())


@pytest.mark.parametrize("name", CALLS)
def test_arrays_that_fit(name):
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in call(name))


def error_of(name, arrays=None, **attributes):
    """The text of the error of a call, which must be one of JAX; "" without one."""
    try:
        call(name, arrays, **attributes)
        return ""
    except jax.errors.JaxRuntimeError as error:
        return str(error)


@pytest.mark.parametrize("name", CALLS)
def test_every_array_in_turn_is_another(name):
    for array, right in arrays_of(name).items():
        for other in others(*right):
            arrays = arrays_of(name) | {array: other}
            if not any(0 not in dict(arrays[r][1]).values() for r in CALLS[name][1]):
                continue  # XLA calls nothing for results without elements
            error = error_of(name, arrays)
            if may_be(name, array, other):
                assert error == "", (array, other)
            else:
                assert error.startswith("INVALID_ARGUMENT"), (array, other, error)


@pytest.mark.parametrize(
    "name, sizes, attributes, message",
    [
        ("TernaryDots", {}, {"block": 0}, "4 packed bytes are no whole blocks of 0 for each of 1"),
        ("TernaryDots", {}, {"block": -2}, "4 packed bytes are no whole blocks of -2"),
        ("TernaryDots", {}, {"block": 3}, "4 packed bytes are no whole blocks of 3"),
        ("TernaryDots", {"I": 17}, {}, "17 inputs do not fit 4 packed bytes"),
        ("TernaryDots", {"I": 9, "P": 2}, {}, "9 inputs do not fit 2 packed bytes"),
        ("TernaryDots", {"I": 4, "P": 2}, {"block": 4}, "4 packed bytes .* 4 for each of 2 planes"),
        ("TernaryDots", {"I": 4, "P": 3}, {}, "3 planes with 2 groups of multipliers"),
        ("TernaryDots", {"I": 4, "P": 0}, {}, "0 planes with 2 groups of multipliers"),
        ("TernaryDots", {"I": 4, "P": 2, "G": 0}, {}, "2 planes with 0 groups of multipliers"),
        ("TernaryDots", {"G": 3}, {}, "3 groups are neither 1 nor 1, 2 or 4 for each of 2 blocks"),
        ("TernaryDots", {"G": 16}, {}, "16 groups are neither"),
        ("TernaryDots", {"B": (1 << 20) + 2, "E": 1, "O": 1}, {}, "1048578 packed bytes .* more"),
        ("TernaryDots", {"B": 33288, "G": 1}, {}, "133152 inputs with .* might exceed int32"),
        ("Attend", {"S": 0}, {}, "a cache without slots"),
        ("Attend", {"K": 0}, {}, "6 query heads cannot share 0 key/value heads"),
        ("Attend", {"K": 4}, {}, "6 query heads cannot share 4 key/value heads"),
        ("Attend", {}, {"cap": 44}, r"cap 44 is not above 0, or exp\(-2 cap\) is no normal"),
        ("Attend", {}, {"cap": 0}, "cap 0 is not above"),
        ("Attend", {}, {"cap": np.nan}, "cap nan is not above"),
        ("AttendAndWrite", {"S": 0}, {}, "a cache without slots"),
        ("AttendAndWrite", {"H2": 5}, {}, "heads of 8 numbers, but 5 frequencies"),
        ("AttendAndWrite", {}, {"cap": 44}, "cap 44 is not above 0"),
        ("Likeliest", {"K": 10}, {}, "the 10 largest of 9"),
        ("Choose", {"K": 6}, {}, "the 6 most likely of 5 experts"),
        ("Route", {"K": 6}, {}, "the 6 most likely of 5 experts"),
        ("Route", {"K": 0}, {}, "the 0 most likely of 5 experts"),
        ("AttendGradient", {"S": 0}, {}, "a cache without slots"),
        ("AttendGradient", {"K": 0}, {}, "6 query heads cannot share 0 key/value heads"),
        ("AttendGradient", {}, {"cap": -1}, "cap -1 is not above"),
    ],
)
def test_sizes_and_numbers_that_are_not_possible(name, sizes, attributes, message, monkeypatch):
    for axis, size in sizes.items():
        monkeypatch.setitem(SIZES, axis, size)
    kinds = {key: type(value) for key, value in CALLS[name][2].items()}
    error = error_of(name, **{key: kinds[key](value) for key, value in attributes.items()})
    assert re.search(f"INVALID_ARGUMENT: {message}", error), error


@pytest.mark.parametrize(
    "name, array, other, message",
    [
        ("Attend", "v", "float32 B K T H", "v [B, K, S, H] is [4, 2, 3, 8], but S is 4"),
        ("Attend", "v", "bfloat16 B K S H", "v [B, K, S, H] is BF16, not F32"),
        ("Attend", "k", "float32 K S H", "k [B, K, S, H] is [2, 4, 8], not of rank 4"),
        ("Attend", "q", "float16 B T N H", "q is F16, neither F32 nor BF16"),
        ("RmsNorm", "x", "float32 D", "x [R, D] is [11], not of rank 2"),
        ("RmsNorm", "scale", "float32 R D", "scale [D] is [3, 11], not of rank 1"),
        ("WriteSlots", "slots", "int32 B", "slots [B, T] is [4], not of rank 2"),
        ("Transpose", "x", "bfloat16 B R C K", "x [B, R, C] is [4, 3, 17, 2], not of rank 3"),
        ("Likeliest", "index", "int32 R", "index [R, K] is [3], not of rank 2"),
        ("Route", "valid", "int8 R", "valid [R] is S8, not PRED"),
        ("GroupedProduct turned", "w", "float32 E I O", "w [E, N, K] is [5, 13, 7], but K is 13"),
        ("TableDot", "table", "float16 V D", "table is F16, neither F32, BF16 nor S8"),
    ],
)
def test_messages(name, array, other, message):
    dtype, *axes = other.split()
    arrays = arrays_of(name) | {array: (dtype, [(axis, SIZES[axis]) for axis in axes])}
    assert message in error_of(name, arrays)


@pytest.mark.parametrize(
    "name, arguments, attributes, message",
    [
        ("RowMaxima", 2, {}, "2 arguments, not 1"),
        ("TernaryDots", 4, {}, "4 arguments, not two and three of each weight"),
        ("RmsNorm", 2, {}, "eps is not given"),
        ("RmsNorm", 2, {"eps": np.int64(1)}, "eps is S64, not F32"),
        ("RmsNorm", 2, {"eps": "1"}, "eps is no number"),
    ],
)
def test_calls_that_are_no_call_of_the_kernel(name, arguments, attributes, message):
    arrays = [np.ones(11 if i else (3, 11), np.float32) for i in range(arguments)]
    out = jax.ShapeDtypeStruct((3, 1 if name == "RowMaxima" else 11), jnp.float32)
    f = jax.ffi.ffi_call(f"ternary_grok_{name}", out)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT: {message}"):
        jax.block_until_ready(jax.jit(lambda *arrays: f(*arrays, **attributes))(*arrays))


def test_a_cache_that_is_not_written_in_place_is_an_error():
    cache, rows, slots = np.ones((2, 2, 4, 8)), np.ones((2, 3, 2, 8)), np.ones((2, 3), np.int32)
    f = jax.ffi.ffi_call("ternary_grok_WriteSlots", jax.ShapeDtypeStruct(cache.shape, jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the cache is not the output"):
        jax.block_until_ready(jax.jit(f)(*(x.astype(np.float32) for x in (cache, rows)), slots))


@pytest.mark.parametrize("expert", [-1, 5, 2**31 - 1, -(2**31)])
def test_an_expert_that_is_not_there_gives_zeros(expert):
    x, packed = jnp.ones((2, 3, 13), jnp.int8), jnp.ones((5, 7, 4), jnp.uint8)
    w = quantize.PackedWeight(packed, None, block=2)
    sums = kernels.ternary_sums(x, w, jnp.array([expert, 0], jnp.int32))
    assert (sums[0] == 0).all() and (sums[1] != 0).all()


@pytest.mark.parametrize(
    "sizes",
    [
        {"G": 0},
        {"G": 0, "I": 0, "B": 0},
        {"G": 1, "I": 0, "B": 0},
        {"G": 4},
        {"G": 8},
        {"P": 2, "G": 1, "I": 7},
        {"P": 2, "G": 4, "I": 8},
        {"B": 33286, "G": 1, "I": 100},
    ],
)
def test_multipliers_that_fit(sizes, monkeypatch):
    for axis, size in sizes.items():
        monkeypatch.setitem(SIZES, axis, size)
    found = np.asarray(call("TernaryDots")[0])
    # A byte of 1 is a trit of 0 and three of -1; of each 8 inputs the first two have those of 0.
    inputs, planes = SIZES["I"], SIZES["P"]
    assert (found == -planes * (inputs - sum(i % 8 < 2 for i in range(inputs)))).all()


def test_no_experts_at_all(monkeypatch):
    monkeypatch.setitem(SIZES, "E", 0)
    assert (np.asarray(call("TernaryDots")[0]) == 0).all()


@pytest.mark.parametrize("name, empty", [("AttendGradient", "T"), ("AttendGradient", "N")])
def test_gradients_of_no_queries_are_zeros(name, empty, monkeypatch):
    monkeypatch.setitem(SIZES, empty, 0)
    _, dk, dv = call(name)
    assert (dk == 0).all() and (dv == 0).all()


MEMORY = """
import resource, jax, jax.numpy as jnp, numpy as np, kernels
assert kernels.on_cpu()
x = jnp.ones((4, 1 << 24), jnp.bfloat16)  # 128 MB; each row needs 64 more, as float32
scale = jnp.ones(1 << 24)
f = jax.jit(lambda x, scale: kernels.rms_norm(x, scale, 1e-5)).lower(x, scale).compile()
pages = int(open("/proc/self/statm").read().split()[0])
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + x.nbytes + (32 << 20), limit[1]))
try:
    f(x, scale).block_until_ready()
    print("no error")
except jax.errors.JaxRuntimeError as error:
    print(str(error).splitlines()[0])
resource.setrlimit(resource.RLIMIT_AS, limit)
print(bool((f(x, scale)[:, ::999] == 1).all()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="it needs all addresses")
def test_a_thread_that_finds_no_memory_is_an_error_and_not_the_end():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["RESOURCE_EXHAUSTED: no memory left for a kernel", "True"]
