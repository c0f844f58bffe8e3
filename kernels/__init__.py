"""Fast products, norms and attention, and what each takes; large pages.

On a CPU they are the C++ beside this file, compiled on first use and kept, see `building.py`. On an
NVIDIA GPU they are those of `gpu.py`, on a TPU those of `tpu.py`. A function that has kernels is
plain JAX, and `accelerated` by the name under which `KERNELS` lists them. Without a compiler, or
for other shapes and devices, it runs as it is written, to the same integers, slower. (Of an int8
table, whose products with floats plain JAX does not round, to nearly the same floats.)

The C++ checks all arrays that it is given: what does not fit is an error of JAX that starts with
INVALID_ARGUMENT and shows the sizes.
"""

import contextlib
import ctypes
import functools
import importlib
import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels import building as building
from kernels.building import build as build
from kernels.building import keep_compilations as keep_compilations
from kernels.gradients import linear as linear

HANDLERS = (
    "TernaryDots",
    "TableDot",
    "RmsNorm",
    "AddedNorm",
    "RmsNormGradient",
    "Attend",
    "AttendAndWrite",
    "AttendGradient",
    "WriteSlots",
    "Rotate",
    "GatedSums",
    "GroupedProduct",
    "GroupedSums",
    "RowMaxima",
    "RoundRows",
    "Transpose",
    "Likeliest",
    "Choose",
    "Route",
)
COUNTS = (  # functions of the library that give a number
    "FromBase3",
    "ToBase3",
    "CopyTrits",
    "FitInt8",
    "AbsoluteSums",
    "PackInt8",
    "InterleaveGroups",
)
_LOADING = threading.Lock()
LONGEST_ROW = 1 << 14  # of an int8 table: no int32 sum is exceeded
LARGEST_CAP = 40  # of attention logits: exp(-2 * 40) is still a normal float32
BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them
DISABLE = "TERNARY_GROK_NATIVE"  # environment variable; 0: plain JAX


# --- The library ----------------------------------------------------------------------------------


def library() -> ctypes.CDLL | None:
    """The compiled kernels, registered with JAX; None, after a note on stderr, without them."""
    with _LOADING:  # of threads that load a checkpoint, one compiles
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    if os.environ.get(DISABLE) == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(build()))
        jax.devices("cpu")  # a library that the backend refuses must not be there when it starts
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(loaded, f"{name}Handler"))
            jax.ffi.register_ffi_target(f"ternary_grok_{name}", handler, platform="cpu")
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        sizes, of_rows = [number] * 4, [pointer, number, number, number]
        loaded.FromBase3.argtypes = [pointer, number, number, pointer, number]
        loaded.ToBase3.argtypes = loaded.FromBase3.argtypes
        loaded.FitInt8.argtypes = [*of_rows, pointer, *sizes, *[pointer] * 3]
        loaded.AbsoluteSums.argtypes = [*of_rows, pointer]
        loaded.PackInt8.argtypes = [*of_rows, pointer, pointer, *sizes, pointer, number, number]
        loaded.CopyTrits.argtypes = [pointer, number, pointer, number]
        loaded.InterleaveGroups.argtypes = [pointer, number, number]
        for name in COUNTS:
            getattr(loaded, name).restype = number
        loaded.TernaryPath.argtypes, loaded.TernaryPath.restype = [number], ctypes.c_char_p
        return loaded
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        text = " ".join(str(error).split())
        print(f"note: no native kernels, several times slower: {text:.300}", file=sys.stderr)
        return None


def on_cpu() -> bool:
    """Whether computations run on a CPU by default, and use the compiled kernels."""
    return platform() == "cpu" and _enabled and library() is not None


def ffi_call(name: str, outs, **options) -> Callable:
    """`jax.ffi.ffi_call` of one of HANDLERS; under `jax.vmap` it is called for each element."""
    target = f"ternary_grok_{name}"
    return jax.ffi.ffi_call(target, outs, vmap_method="sequential", **options)


# --- Where a kernel is used -----------------------------------------------------------------------

_enabled = True
_platform: str | None = None


def platform() -> str:
    """What functions are traced for, "cpu", "gpu" or "tpu": JAX's default backend, or that of
    `compiling_for`."""
    return _platform or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str):
    """Inside, functions are traced for this platform, which need not be here.

    They are then compiled for its devices, as `aot.py` does, or not run at all. What was traced
    before must not be used there.
    """
    global _platform
    before, _platform = _platform, name
    try:
        yield
    finally:
        _platform = before


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32: on accelerators, and on
    processors that have instructions for them; others widen each number first."""
    return platform() != "cpu" or not building.processor().isdisjoint(BFLOAT16_INSTRUCTIONS)


@contextlib.contextmanager
def disabled():
    """Inside, all is plain JAX; what was compiled before must not be used there."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def accelerated(name: str) -> Callable:
    """Decorates a plain function: a kernel of this name computes it, where one takes the arguments.

    Arrays, or trees of them, are passed by position, and everything else by keyword. The derivative
    is that of the plain function, which alone is computed where one is taken; the gradient may be
    the kernel's own, see `gradient_of`. Under `jax.vmap` C++ runs once for each element.

    The function's `kernel` gives the kernel that such arguments have on this backend, or None. It
    takes shapes for arrays, and needs only those arguments that the kernel's predicate asks for.
    """

    def decorate(plain: Callable) -> Callable:
        @functools.wraps(plain)
        def function(*arrays, **options):
            kernel = _kernel(name, *arrays, **options)
            if kernel is None:
                return plain(*arrays, **options)
            fast, slow = (functools.partial(f, **options) for f in (kernel, plain))
            if gradient := getattr(kernel, "gradient", None):
                fast, gradient = jax.custom_jvp(fast), functools.partial(gradient, **options)
                fast.defjvp(functools.partial(_jvp_with_gradient, fast, slow, gradient))
                return fast(*arrays)
            return with_derivative(fast, slow)(*arrays)

        function.kernel = functools.partial(_kernel, name)
        return function

    return decorate


def with_derivative(fast: Callable, slow: Callable) -> Callable:
    """fast, of arrays; slow, which gives the same, where a derivative is taken."""
    function = jax.custom_jvp(fast)
    function.defjvp(lambda primals, tangents: jax.jvp(slow, primals, tangents))
    return function


def gradient_of(kernel: Callable) -> Callable:
    """Decorates the gradient of a kernel whose arrays are floats first, and others then.

    (*arrays, result, its cotangent, **options) -> cotangents of the floats
    """

    def decorate(gradient: Callable) -> Callable:
        kernel.gradient = gradient
        return gradient

    return decorate


def _jvp_with_gradient(fast, slow, gradient, primals, tangents):
    """The tangents of `slow`, whose transpose is `gradient`, whose derivatives are `slow`'s."""
    moved = tuple(t for t in tangents if getattr(t, "dtype", None) != jax.dtypes.float0)
    count, y = len(moved), fast(*primals)

    def tangent(kept, moved):
        primals, _ = kept
        return jax.jvp(lambda *floats: slow(*floats, *primals[count:]), primals[:count], moved)[1]

    def plain_gradient(*arrays):
        *primals, _, dy = arrays
        _, pull = jax.vjp(lambda *floats: slow(*floats, *primals[count:]), *primals[:count])
        return pull(dy)

    @jax.custom_jvp
    def of_kernel(*arrays):
        return gradient(*arrays)

    of_kernel.defjvp(lambda primals, tangents: jax.jvp(plain_gradient, primals, tangents))

    def backward(kept, dy):
        primals, y = kept
        return of_kernel(*primals, y, dy)

    return y, linear(tangent, backward, (primals, y), moved)


def _kernel(name: str, *arrays, **options) -> Callable | None:
    there = on_cpu() if platform() == "cpu" else _enabled
    kernel, *takes = KERNELS[name].get(platform(), [None]) if there else [None]
    return kernel if all(f(*arrays, **options) for f in takes) else None


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Zeros for a loop to start from, which are made when x is there and not before.

    XLA:GPU makes zeros of one shape together, and those of all layers would be kept until the last
    layer needs them: for a chunk of 1024 tokens, 1.6 GB of Grok-1's attention, 53 of its experts.
    """
    zero, _ = jax.lax.optimization_barrier((jnp.zeros((), dtype), x))
    return jnp.broadcast_to(zero, shape)


# --- Sums over devices ----------------------------------------------------------------------------
#
# Inside `shard_map`, over the n devices of a mesh axis. Of few bytes, each gets the whole sum. Of
# many, each gets a part (`jax.lax.psum_scatter`, half of what crosses for a sum), does with it what
# comes next, and sends what became of it.


def scatters(axis_name: str) -> bool:
    """Whether each device gets a part. XLA:TPU would add integers on all of them, and then cut."""
    return jax.lax.axis_size(axis_name) > 1 and platform() != "tpu"


def sums_of_devices(y: jax.Array, axis_name: str, kept: jax.Array | None = None) -> jax.Array:
    """The sum of all devices' y [..., R, O]; or, of its rows kept int32 [K], `part_of` them.

    n divides K; what comes of a row that there is not is of no use.
    """
    y = y if kept is None else y.at[..., kept, :].get(mode="clip")
    if kept is None or not scatters(axis_name):
        return jax.lax.psum(y, axis_name)
    return jax.lax.psum_scatter(y, axis_name, scatter_dimension=y.ndim - 2, tiled=True)


def part_of(array: jax.Array, axis_name: str) -> jax.Array:
    """This device's part of the first axis, one n-th; all of it where nothing scatters."""
    if not scatters(axis_name):
        return array
    size = len(array) // jax.lax.axis_size(axis_name)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axis_name) * size, size)


def whole_of(part: jax.Array, axis_name: str) -> jax.Array:
    """What all devices' `part_of` are of."""
    if not scatters(axis_name):
        return part
    return jax.lax.all_gather(part, axis_name, tiled=True)


# --- Large pages ----------------------------------------------------------------------------------

LARGE_PAGE = 1 << 21


def use_large_pages(arrays) -> None:
    """Puts the CPU's arrays of a tree on large pages, where Linux has them: a third more bandwidth.

    Nothing else changes, and whether it worked does not show.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    for array in jax.tree.leaves(arrays):
        for shard in getattr(array, "addressable_shards", ()):
            begin = shard.data.unsafe_buffer_pointer()
            first = -(-begin // LARGE_PAGE) * LARGE_PAGE
            size = (begin + shard.data.nbytes - first) // LARGE_PAGE * LARGE_PAGE
            for advice in (14, 25) if size > 0 else ():  # MADV_HUGEPAGE, MADV_COLLAPSE
                madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)


# --- Bytes of trits -------------------------------------------------------------------------------


def from_base3(digits: np.ndarray) -> np.ndarray:
    """`shards.from_base3`, with the same errors; needs `library()`."""
    check_bytes(digits)
    digits = np.ascontiguousarray(digits)
    packed = np.empty((*digits.shape[:-1], digits.shape[-1] // 4 * 5), np.uint8)
    rows, width = math.prod(digits.shape[:-1]), digits.shape[-1]
    largest = library().FromBase3(
        digits.ctypes.data, rows, width, packed.ctypes.data, packed.shape[-1]
    )
    assert largest >= 0, (digits.shape, packed.shape)
    check_digit(largest)
    return packed


def to_base3(packed: np.ndarray) -> np.ndarray:
    """`shards.to_base3`; needs `library()`."""
    assert packed.dtype == np.uint8, packed.dtype
    packed = np.ascontiguousarray(packed)
    *lead, width = packed.shape
    digits = np.empty((*lead, -(-width // 5) * 4), np.uint8)
    failed = library().ToBase3(
        packed.ctypes.data, math.prod(lead), width, digits.ctypes.data, digits.shape[-1]
    )
    assert not failed, (packed.shape, digits.shape)
    return digits


def copy_trits(packed: np.ndarray, out: np.ndarray) -> bool:
    """Copies packed bytes; whether there is a code of 3 among theirs. Both uint8, of one shape, and
    in one piece. Needs `library()`."""
    assert packed.dtype == out.dtype == np.uint8 and packed.shape == out.shape, out.shape
    assert packed.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable, out.strides
    found = library().CopyTrits(packed.ctypes.data, packed.size, out.ctypes.data, out.size)
    assert found >= 0, packed.shape
    return bool(found)


def check_bytes(digits: np.ndarray) -> None:
    """ValueError unless these are digits uint8 [..., 4 G]."""
    if digits.dtype != np.uint8 or not digits.ndim or digits.shape[-1] % 4:
        found = f"{digits.dtype} {list(digits.shape)}"
        raise ValueError(f"bytes of five trits come in fours, uint8 [..., 4 G]; found {found}")


def check_digit(largest: int) -> None:
    """ValueError if the largest of some bytes is none of five trits."""
    if largest > 242:  # 3**5 - 1
        raise ValueError(f"a byte is {largest}, but the largest that five trits make is 242")


# --- int8 made ternary ----------------------------------------------------------------------------
#
# Of codes int8 [I, O], each row by itself in one piece. Other threads run meanwhile. All need
# `library()`.


def _rows(codes: np.ndarray) -> tuple[int, int, int, int]:
    """How the C++ is given codes: where they are, the bytes between rows, I and O."""
    inputs, outputs = codes.shape
    assert codes.dtype == np.int8 and (outputs < 2 or codes.strides[1] == 1), codes.strides
    return codes.ctypes.data, codes.strides[0], inputs, outputs


def absolute_sums(codes: np.ndarray) -> np.ndarray:
    """`conversion.absolute_sums`: int64 [O]."""
    sums = np.zeros(codes.shape[1], np.int64)
    failed = library().AbsoluteSums(*_rows(codes), sums.ctypes.data)
    assert not failed, codes.shape
    return sums


def pack_int8(
    codes: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
    size: int,
    first: int,
    block: int,
    out: np.ndarray,
) -> None:
    """Writes the packed trits of some rows of `conversion.int8_to_codes` to `out`.

    lowest, highest: int8 [G, O], the range of 0 of each group of `size` rows of all
    first: the number of the first row
    out: uint8 [O, B], each output by itself in one piece, of whole blocks; what it holds beyond the
      rows becomes zeros (trits)
    """
    outputs, columns = out.shape
    assert lowest.shape == highest.shape == (len(lowest), codes.shape[1]), lowest.shape
    assert outputs == codes.shape[1] and out.dtype == np.uint8, (codes.shape, out.shape, out.dtype)
    assert out.size == 0 or (out.strides[1] == 1 and out.flags.writeable), out.strides
    lowest, highest = (np.ascontiguousarray(bound, np.int8) for bound in (lowest, highest))
    failed = library().PackInt8(
        *_rows(codes),
        lowest.ctypes.data,
        highest.ctypes.data,
        len(lowest),
        size,
        first,
        block,
        out.ctypes.data,
        columns,
        out.strides[0],
    )
    assert not failed, (codes.shape, lowest.shape, size, first, block, out.shape)


def fit_int8(codes: np.ndarray, scales: np.ndarray, groups: int, planes: int, block: int) -> tuple:
    """The arrays of `conversion.fit_int8`: packed, multipliers or None, scales.

    scales: [parts, O]
    """
    inputs, outputs = codes.shape
    scales = np.ascontiguousarray(scales, np.float32)
    packed = np.empty((outputs, planes * inputs // 4), np.uint8)
    multipliers = np.empty((outputs, groups, planes), np.int8) if groups * planes > 1 else None
    unit = np.empty((1, outputs), np.float32)
    failed = library().FitInt8(
        *_rows(codes),
        scales.ctypes.data,
        len(scales),
        groups,
        planes,
        block,
        packed.ctypes.data,
        None if multipliers is None else multipliers.ctypes.data,
        unit.ctypes.data,
    )
    if failed:
        raise MemoryError("no memory left for fitting scales")
    return packed, multipliers, unit


# --- Products -------------------------------------------------------------------------------------


def interleave(groups: np.ndarray) -> None:
    """Puts rows of bytes side by side, in place: uint8 [n, 64 B].

    They are [n, 64, B] before and [n, B / 4, 64, 4] then; B is a multiple of 4. Other threads run
    meanwhile. Needs `library()`.
    """
    assert groups.flags.c_contiguous and groups.dtype == np.uint8, groups.strides
    count, size = groups.shape
    assert size % 64 == 0, size
    failed = library().InterleaveGroups(groups.ctypes.data, count, size // 64)
    assert failed >= 0, groups.shape
    if failed:
        raise MemoryError("no memory left to interleave weights")


def ternary_paths() -> list[str]:
    """The names of the paths that `ternary_sums` can take, the fastest last. Needs `library()`."""
    names = (library().TernaryPath(i) for i in itertools.count())
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, names)]


def ternary_sums(x: jax.Array, w, experts: jax.Array, path: int = -1) -> jax.Array:
    """Exact sums int32 [blocks, R, O] of rows x int8 [blocks, R, I] times each block's expert.

    w: a `quantize.PackedWeight` [E, I, O], of rows or interleaved, whose codes are 0 to 2 in each
      byte: what a code of 3 gives depends on the processor. Multipliers, from 0 to 127, sum up to
      127 at most along P; for what others give depends on the processor, too
    experts: int32 [blocks]; -1 gives zeros, and so does one that there is not
    path: the fastest to take, an index of `ternary_paths()`; -1 for any
    Needs `on_cpu()`.
    """
    return _ternary(x, (w,), experts, jnp.int32, path=path)[0]


def ternary_dots(x: jax.Array, weights, experts: jax.Array, *, activations: str, **_) -> tuple:
    """`quantize.grouped_dots` of rows x [R, I] and `quantize.PackedWeight`s, for each [R, O].

    Rounded, multiplied and scaled in one call. Needs `on_cpu()`, and weights that are packed alike.
    """
    return _rounded_dots(x, weights, experts, activations)


def gated_dot(x: jax.Array, gate, up, experts: jax.Array, *, activations: str) -> jax.Array:
    """`quantize.gated_dot`, as `ternary_dots`; GELU in float32, rounded to the dtype of x."""
    return _rounded_dots(x, (gate, up), experts, activations, gated=1)[0]


def _rounded_dots(x, weights, experts, activations, **attributes):
    levels = 127 if activations == "int8" else 127 * 128
    rows = x.reshape(len(experts), -1, x.shape[-1])
    found = _ternary(rows, weights, experts, x.dtype, levels=levels, **attributes)
    return tuple(y.reshape(len(x), -1) for y in found)


def _ternary(x, weights, experts, dtype, path=-1, levels=0, gated=0) -> list[jax.Array]:
    """Products of rows x [blocks, R, I] with weights that are packed alike, see ternary.cc."""
    arrays = []
    for w in weights:
        multipliers = w.multipliers
        if multipliers is None:
            *lead, lanes = (*w.packed.shape[:2], w.packed.shape[3:4])
            multipliers = jnp.zeros((*lead, 0, 1, *lanes), jnp.int8)
        scales = w.scales.astype(jnp.float32) if levels else jnp.zeros((len(w.packed), 1, 1))
        arrays += [w.packed, multipliers, scales]
    outs = [jax.ShapeDtypeStruct((*x.shape[:2], w.shape[-1]), dtype) for w in weights]
    attributes = {"block": weights[0].block, "path": path, "levels": levels, "gated": gated}
    call = ffi_call("TernaryDots", outs[:1] if gated else outs)
    return call(x, experts, *arrays, **{name: np.int64(n) for name, n in attributes.items()})


def table_dot(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [R, D] times a table [V, D]: float32 [R, V].

    x: float32 or bfloat16. table: one of these; or int8, for which each row of x is rounded to
      int15, so that sums are of integers, exact

    The order of the sums depends on D, the dtypes and the processor only. Needs `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct((*x.shape[:1], *table.shape[:1]), jnp.float32)
    return ffi_call("TableDot", out)(x, table)


def grouped_product(x: jax.Array, w: jax.Array, experts: jax.Array, *, turned: bool) -> jax.Array:
    """`quantize.grouped_product` of float32. What a row gets depends on no other one. Needs
    `on_cpu()`."""
    out = jax.ShapeDtypeStruct((*x.shape[:2], w.shape[1 if turned else 2]), x.dtype)
    return ffi_call("GroupedProduct", out)(x, w, experts, turned=np.int64(turned))


def grouped_sums(x: jax.Array, y: jax.Array, experts: jax.Array, *, count: int) -> jax.Array:
    """`quantize.grouped_sums` of float32. The order of sums depends on how rows are cut into
    blocks. Needs `on_cpu()`."""
    out = jax.ShapeDtypeStruct((count, x.shape[2], y.shape[2]), y.dtype)
    return ffi_call("GroupedSums", out)(x, y, experts)


# --- Norm -----------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """scale * x / rms(x), in float32, of rows x [R, D] in their dtype, float32 or bfloat16.

    No other row shows in a result. Needs `on_cpu()`.
    """
    call = ffi_call("RmsNorm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, scale, eps=np.float32(eps))


@gradient_of(rms_norm)
def rms_norm_gradient(x, scale, y, dy, eps: float) -> list:
    """Cotangents of x and scale."""
    outs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, scale)]
    return ffi_call("RmsNormGradient", outs)(x, scale, dy, eps=np.float32(eps))


def added_norm(h: jax.Array, x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """h + `rms_norm` of x, both [R, D] and of one dtype. Needs `on_cpu()`."""
    call = ffi_call("AddedNorm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(h, x, scale, eps=np.float32(eps))


# --- Choices --------------------------------------------------------------------------------------


def likeliest(logits: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest of float32 [..., V] and their places, [..., count], the first of equals first;
    and log of the sum of exp(logits - largest), [..., 1].

    Where there is a NaN, places are those of some numbers, and the sum is NaN. Needs `on_cpu()`.
    """
    *leading, size = logits.shape
    rows = math.prod(leading)
    outs = [
        jax.ShapeDtypeStruct((rows, count), jnp.float32),
        jax.ShapeDtypeStruct((rows, count), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    ]
    found = ffi_call("Likeliest", outs)(logits.reshape(rows, size))
    sizes = count, count, 1
    return tuple(x.reshape(*leading, n) for x, n in zip(found, sizes, strict=True))


def _choices(rows: int, num_experts: int, selected: int) -> list:
    """The shapes of probabilities [R, E] and, of the chosen experts [R, A], of these and index."""
    probs, gates = (
        jax.ShapeDtypeStruct((rows, count), jnp.float32) for count in (num_experts, selected)
    )
    return [probs, gates, gates.update(dtype=jnp.int32)]


def choose(logits: jax.Array, valid: jax.Array, *, selected: int) -> tuple:
    """`model.chosen` of float32 logits [..., E]. Needs `on_cpu()`."""
    rows = logits.reshape(-1, logits.shape[-1])
    found = ffi_call("Choose", _choices(*rows.shape, selected))(rows, valid.reshape(-1))
    return tuple(y.reshape(*valid.shape, -1) for y in found)


def route(x: jax.Array, w: jax.Array, valid: jax.Array, *, selected: int) -> tuple:
    """`model.routed` of x [R, D], float32 or bfloat16, and a router float32 [D, E].

    What a token gets depends on no other one. Needs `on_cpu()`.
    """
    choices = _choices(len(x), w.shape[1], selected)
    return tuple(ffi_call("Route", [choices[0], *choices])(x, w, valid))


# --- Rotary embedding and gated sums --------------------------------------------------------------


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """x [B, T, N, H], float32 or bfloat16, its pairs (i, i + H / 2) rotated.

    By positions int32 [B, T] times frequencies float32 [H / 2]. Products are rounded before they
    are added, so that a result depends on its pair and angle only. Needs `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return ffi_call("Rotate", out)(x, positions, frequencies)


def gated_sums(rows: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    """The rows of [R, D] that each token names, times its gates, summed: float32 [T, D].

    rows: float32 or bfloat16; gates: float32, index: int32 [T, A]; rows that there are not count
    nothing. Products are rounded before they are added, in the order of the index. Needs
    `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct((len(index), rows.shape[1]), jnp.float32)
    return ffi_call("GatedSums", out)(rows, gates, index)


def row_maxima(x: jax.Array) -> jax.Array:
    """The largest magnitude of each row of x [R, I], float32 or bfloat16: float32 [R, 1].

    Needs `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct((len(x), 1), jnp.float32)
    return ffi_call("RowMaxima", out)(x)


def round_rows(x: jax.Array, steps: jax.Array, dtype) -> jax.Array:
    """x [R, I] / steps [R, 1], rounded to nearest, halves to even, as int8 or int16.

    What is less than 2^22 steps, that is. Needs `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct(x.shape, dtype)
    return ffi_call("RoundRows", out)(x, steps)


# --- Attention ------------------------------------------------------------------------------------


def attend(q, k, v, positions, multiplier: float, cap: float) -> jax.Array:
    """`attention.attend`, reading the cache only as far as each query sees it.

    What a query gets depends on no other query, row or head, to the last bit; with a negative
    position, zeros. No array of queries by slots is made, for the gradient neither. Needs
    `on_cpu()`, and a cap of at most `LARGEST_CAP`.
    """
    call = ffi_call("Attend", jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(q, k, v, positions, multiplier=np.float32(multiplier), cap=np.float32(cap))


@gradient_of(attend)
def attend_gradient(q, k, v, positions, y, dy, multiplier: float, cap: float) -> tuple:
    """Cotangents of q, k and v."""
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    call = ffi_call("AttendGradient", outs)
    options = {"multiplier": np.float32(multiplier), "cap": np.float32(cap)}
    return tuple(call(q, k, v, positions, y, dy, **options))


def attend_and_write(
    q, k, v, keys, values, positions, frequencies, *, multiplier: float, cap: float
) -> tuple:
    """`model.attend_and_write`, the caches in place if nothing else needs them.

    Needs `on_cpu()`, all but the frequencies of one dtype, and a cap of at most `LARGEST_CAP`.
    """
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, keys, values)]
    call = ffi_call("AttendAndWrite", outs, input_output_aliases={3: 1, 4: 2})
    options = {"multiplier": np.float32(multiplier), "cap": np.float32(cap)}
    return tuple(call(q, k, v, keys, values, positions, frequencies, **options))


def write_slots(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """A cache [B, K, S, H] with new rows [B, T, K, H] at slots int32 [B, T]; others are dropped.

    In place if nothing else needs the cache: XLA's own scatter reads and writes all of it. Needs
    `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    call = ffi_call("WriteSlots", out, input_output_aliases={0: 0})
    return call(cache, new.astype(cache.dtype), slots)


def transposed(x: jax.Array) -> jax.Array:
    """bfloat16 [..., R, C] as [..., C, R]. Needs `on_cpu()`."""
    *lead, rows, columns = x.shape
    batch = math.prod(lead)
    out = jax.ShapeDtypeStruct((batch, columns, rows), x.dtype)
    turned = ffi_call("Transpose", out)(x.reshape(batch, rows, columns))
    return turned.reshape(*lead, columns, rows)


# --- Which kernels there are ----------------------------------------------------------------------


def _in_module(module: str, name: str) -> Callable:
    """A function of `gpu.py` or `tpu.py`, imported when it is called: Pallas takes a while."""

    def call(*arrays, **options):
        return getattr(importlib.import_module(f"kernels.{module}"), name)(*arrays, **options)

    return call


_gpu, _tpu = functools.partial(_in_module, "gpu"), functools.partial(_in_module, "tpu")


FLOATS = (jnp.float32, jnp.bfloat16)


def _takes_cap(q, k, *_, cap: float, **__) -> bool:
    return k.dtype == q.dtype and q.dtype in FLOATS and 0 < cap <= LARGEST_CAP


def _takes_caches(q, k, v, keys, values, *_, **__) -> bool:
    return q.dtype == keys.dtype == values.dtype == v.dtype


def _is_on_one_device(*_, **__) -> bool:
    return jax.sharding.get_abstract_mesh().size <= 1  # else XLA would gather what a kernel reads


def _takes_float32(x, *_, **__) -> bool:
    return x.dtype == jnp.float32


def _takes_grouped(x, y, experts, *, count=None, **_) -> bool:
    rows, matrices = x.shape[0] * x.shape[1], count or len(y)
    many = len(experts) > 1 and rows >= 16 * matrices  # enough to put matrices in order for them
    return many and x.dtype == y.dtype == jnp.float32


def _takes_choices(logits, valid, **_) -> bool:
    return valid.dtype == bool and valid.shape == logits.shape[:-1]


def _takes_router(x, w, *_, **__) -> bool:
    return x.dtype in FLOATS and w.dtype == jnp.float32


def _takes_same(h, x, scale, **_) -> bool:
    return x.dtype in FLOATS and h.dtype == x.dtype and scale.dtype == jnp.float32


def _takes_floats(x, *_, **__) -> bool:
    return x.dtype in FLOATS


def _takes_activations(*_, activations, **__) -> bool:
    return activations != "float"


def _takes_table(x, table) -> bool:
    fits = table.dtype in FLOATS or (table.dtype == jnp.int8 and table.shape[1] <= LONGEST_ROW)
    return x.dtype in FLOATS and fits


def _takes_dots(x, weights, experts, *, activations, axis_name=None, **_) -> bool:
    first, packed = weights[0], all(hasattr(w, "packed") for w in weights)
    return (
        packed
        and x.dtype in FLOATS
        and activations != "float"
        and (axis_name is None or jax.lax.axis_size(axis_name) == 1)
        and all(_packing(w) == _packing(first) and w.shape[-2] == x.shape[-1] for w in weights)
    )


def _packing(w) -> tuple:
    groups = None if w.multipliers is None else w.multipliers.shape[2]
    return w.block, w.planes, w.padding, w.interleaved, groups


def _takes_gated(x, gate, up, experts, *, activations) -> bool:
    return _takes_dots(x, (gate, up), experts, activations=activations)


def _gpu_sums(x, w, experts):
    return _gpu("ternary_sums")(x, w.packed, experts, w.block, w.multipliers)


def _tpu_sums(x, w, experts):
    return _tpu("ternary_sums")(x, (w,), experts)[0]


def _tpu_takes(x, w, *_) -> bool:
    return _tpu("takes_weights")(x, (w,))


KERNELS = {  # of each name on each backend: the kernel, and what says which arguments it takes
    "added_norm": {"cpu": (added_norm, _takes_same), "gpu": (_gpu("added_norm"),)},
    "attend": {"cpu": (attend, _takes_cap)},
    "attend_and_write": {
        "cpu": (attend_and_write, _takes_cap, _takes_caches),
        "gpu": (_gpu("decode_attention"), _takes_cap, _gpu("takes_attention")),
    },
    "choose": {"cpu": (choose, _takes_float32, _takes_choices)},
    "gated_dot": {
        "cpu": (gated_dot, _takes_gated),
        "gpu": (_gpu("gated_dot"), _takes_gated, _gpu("takes_gated")),
    },
    "gated_rows": {"gpu": (_gpu("gated_rows"), _takes_gated, _gpu("takes_gated"))},
    "gated_sums": {"cpu": (gated_sums,)},
    "grouped_product": {"cpu": (grouped_product, _takes_grouped)},
    "grouped_sums": {"cpu": (grouped_sums, _takes_grouped)},
    "likeliest": {"cpu": (likeliest, _takes_float32, _is_on_one_device)},
    "quantize_rows": {"gpu": (_gpu("quantize_rows"), lambda x, axis_name=None, **_: not axis_name)},
    "rms_norm": {"cpu": (rms_norm, _takes_floats), "gpu": (_gpu("rms_norm"),)},
    "rotate": {"cpu": (rotate,)},
    "round_rows": {"cpu": (round_rows, _takes_floats)},
    "rounded_norm": {"gpu": (_gpu("rounded_norm"), _takes_activations)},
    "route": {
        "cpu": (route, _takes_router),
        "gpu": (_gpu("route"), _takes_floats, _gpu("takes_route")),
    },
    "row_maxima": {"cpu": (row_maxima, _takes_floats)},
    "scattered_dot": {"tpu": (_tpu("scattered_dot"), _takes_floats, _tpu("takes_dot"))},
    "table_dot": {"cpu": (table_dot, _takes_table)},
    "ternary_dots": {
        "cpu": (ternary_dots, _takes_dots),
        "gpu": (_gpu("ternary_dots"), _takes_dots, _gpu("takes_dots")),
        "tpu": (_tpu("ternary_dots"), _takes_floats, _tpu("takes_dots")),
    },
    "ternary_sums": {
        "cpu": (ternary_sums, lambda x, *_: x.dtype == jnp.int8),
        "gpu": (_gpu_sums, _gpu("takes_weight")),
        "tpu": (_tpu_sums, _tpu_takes),
    },
    "transposed": {"cpu": (transposed, lambda x: x.dtype == jnp.bfloat16)},
    "write_slots": {"cpu": (write_slots,)},
}
