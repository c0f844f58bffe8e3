"""Fast products, norms and attention, and what each takes; large pages; kept compilations.

On a CPU they are C++, `cpu_kernels.cc`, compiled on first use with the system's compiler and kept
in a cache folder. On an NVIDIA GPU they are those of `gpu_kernels.py`. Without a compiler, or for
other shapes and devices, plain JAX beside each call does the same, to the same integers, slower.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from files import cache_folder

SOURCE = Path(__file__).with_name("cpu_kernels.cc")
HANDLERS = (
    "TernarySums",
    "TableDot",
    "RmsNorm",
    "Attend",
    "AttendGradient",
    "WriteSlots",
    "Transpose",
)
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w")
_LOADING = threading.Lock()
LARGEST_CAP = 40  # of attention logits: exp(-2 * 40) is still a normal float32
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
        return loaded
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        text = " ".join(str(error).split())
        print(f"note: no native kernels, several times slower: {text:.300}", file=sys.stderr)
        return None


def build(folder: Path | None = None) -> Path:
    """Compiles the kernels unless that was done before; the path of the library.

    folder: by default `cache_folder()`
    Raises OSError without a compiler, subprocess.SubprocessError if it fails.
    """
    include = jax.ffi.include_dir()
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((path for name in compilers if name and (path := shutil.which(name))), None)
    known = (SOURCE.read_bytes(), jax.lib.__version__, platform.machine(), FLAGS, sys.platform)
    key = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"kernels-{key}.so"
    if path.exists():
        return path
    if compiler is None:
        raise OSError("no C++ compiler; install g++ or clang++, or set CXX")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    command = [compiler, *FLAGS, f"-I{include}", str(SOURCE), "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise OSError(f"{compiler} failed: {done.stderr}")
    os.replace(part, path)
    return path


def on_cpu() -> bool:
    """Whether computations run on a CPU by default, and the compiled kernels are there."""
    return jax.default_backend() == "cpu" and library() is not None


def keep_compilations() -> None:
    """Lets JAX keep what it compiles in `cache_folder()`, for the next process; for commands.

    JAX's own setting, such as JAX_COMPILATION_CACHE_DIR in the environment, goes first.
    """
    if jax.config.jax_compilation_cache_dir is None:
        # Code for one processor must not be loaded on another that shares the folder.
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
        known = sorted({line for line in lines if line.startswith(("model name", "flags"))})
        key = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"xla-{key}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def differentiable(fast: Callable, plain: Callable) -> Callable:
    """`fast`, with the derivative of `plain`, a slower function of the same arrays.

    Where a derivative is taken, only `plain` is computed.
    """
    f = jax.custom_jvp(fast)
    f.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return f


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Zeros for a loop to start from, which are made when x is there and not before.

    XLA:GPU makes zeros of one shape together, and those of all layers would be kept until the last
    layer needs them: for a chunk of 1024 tokens, 1.6 GB of Grok-1's attention, 53 of its experts.
    """
    zero, _ = jax.lax.optimization_barrier((jnp.zeros((), dtype), x))
    return jnp.broadcast_to(zero, shape)


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


# --- Five trits to a byte -------------------------------------------------------------------------


def from_base3(digits: np.ndarray) -> np.ndarray:
    """`quantize.from_base3`, of contiguous digits; needs `library()`."""
    packed = np.empty((*digits.shape[:-1], digits.shape[-1] // 4 * 5), np.uint8)
    size = ctypes.c_int64(digits.size)
    library().FromBase3(
        ctypes.c_void_p(digits.ctypes.data), size, ctypes.c_void_p(packed.ctypes.data)
    )
    return packed


# --- Products -------------------------------------------------------------------------------------


def ternary_kernel(x: jax.Array, packed: jax.Array, block: int, padding: int) -> Callable | None:
    """The kernel for exact sums of such arrays on this backend, as `ternary_sums`; None: plain JAX.

    padding: of the inputs, see `quantize.QuantizedWeight1_58bit`
    """
    if on_cpu():
        return ternary_sums
    if jax.default_backend() == "gpu" and not padding:
        import gpu_kernels  # here, because Pallas takes a while to import

        if gpu_kernels.takes(x.shape, packed.shape, block):
            return gpu_kernels.ternary_sums
    return None


def ternary_sums(x: jax.Array, packed: jax.Array, experts: jax.Array, block: int, path: int = -1):
    """Exact sums int32 [blocks, R, O] of rows x int8 [blocks, R, I] times each block's expert.

    packed: uint8 [E, O, B], B >= I / 4, in blocks of `block` bytes, see `quantize.py`
    experts: int32 [blocks]; -1 gives zeros
    path: the best way to take, 0 plain C++, 1 AVX2, 2 AVX-512 VNNI, 3 AMX; -1 for any
    Needs `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct((*x.shape[:2], packed.shape[1]), jnp.int32)
    call = jax.ffi.ffi_call("ternary_grok_TernarySums", out)
    return call(x, packed, experts, block=np.int64(block), path=np.int64(path))


def takes_table(table: jax.Array) -> bool:
    """Whether `table_dot` is for such a table."""
    return on_cpu() and table.dtype in (jnp.float32, jnp.bfloat16, jnp.int8)


def table_dot(x: jax.Array, table: jax.Array) -> jax.Array:
    """x float32 [R, D] times a table [V, D], float32, bfloat16 or int8: float32 [R, V].

    The order of the sums depends on D only. Needs `takes_table`.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("ternary_grok_TableDot", out)(x, table)


# --- Norm and rounding ----------------------------------------------------------------------------


def norm_kernel() -> Callable | None:
    """The kernel of a norm on this backend, with the arguments of `rms_norm`; None: plain JAX."""
    if on_cpu():
        return rms_norm
    if jax.default_backend() == "gpu":
        import gpu_kernels

        return gpu_kernels.rms_norm
    return None


def rounding_kernel() -> Callable | None:
    """The kernel that rounds rows to integers on this backend: `gpu_kernels.quantize_rows`."""
    if jax.default_backend() == "gpu":
        import gpu_kernels

        return gpu_kernels.quantize_rows
    return None


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """scale * x / rms(x), in float32, of rows x [R, D] in their dtype, float32 or bfloat16.

    No other row shows in a result. Needs `on_cpu()`.
    """
    call = jax.ffi.ffi_call("ternary_grok_RmsNorm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, scale, eps=np.float32(eps))


# --- Attention ------------------------------------------------------------------------------------


def attention_kernel(q: jax.Array, k: jax.Array, cap: float) -> Callable | None:
    """The kernel for such queries and keys, with the arguments of `attend`; None: plain JAX."""
    if k.dtype != q.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return None
    if on_cpu() and 0 < cap <= LARGEST_CAP:
        return attend
    if jax.default_backend() == "gpu" and q.shape[1] == 1:
        import gpu_kernels

        if gpu_kernels.takes_attention((q.shape[0], *q.shape[2:]), k.shape, cap):
            return gpu_kernels.attend
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(q, k, v, positions, multiplier: float, cap: float) -> jax.Array:
    """`attention.attend`, reading the cache only as far as each query sees it.

    What a query gets depends on no other query, row or head, to the last bit. No array of queries
    by slots is made, for the gradient neither. Needs `on_cpu()`, and a cap of at most
    `LARGEST_CAP`.
    """
    call = jax.ffi.ffi_call("ternary_grok_Attend", jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(q, k, v, positions, multiplier=np.float32(multiplier), cap=np.float32(cap))


def _attend_forward(q, k, v, positions, multiplier, cap):
    y = attend(q, k, v, positions, multiplier, cap)
    return y, (q, k, v, positions, y)


def _attend_backward(multiplier, cap, kept, dy):
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept[:3]]
    call = jax.ffi.ffi_call("ternary_grok_AttendGradient", outs)
    return *call(*kept, dy, multiplier=np.float32(multiplier), cap=np.float32(cap)), None


attend.defvjp(_attend_forward, _attend_backward)


def write_slots(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """A cache [B, K, S, H] with new rows [B, T, K, H] at slots int32 [B, T]; others are dropped.

    In place if nothing else needs the cache: XLA's own scatter reads and writes all of it. Needs
    `on_cpu()`.
    """
    out = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    call = jax.ffi.ffi_call("ternary_grok_WriteSlots", out, input_output_aliases={0: 0})
    return call(cache, new, slots)


def transposed(x: jax.Array) -> jax.Array:
    """[B, R, C] as [B, C, R], for a product that contracts R.

    On a CPU bfloat16 is really moved: XLA would fold a transposition of its own into the product,
    which is then one for float32, eight times as slow.
    """
    *lead, rows, columns = x.shape
    if not on_cpu() or x.dtype != jnp.bfloat16:
        return x.swapaxes(-1, -2)
    out = jax.ShapeDtypeStruct((*lead, columns, rows), x.dtype)
    return jax.ffi.ffi_call("ternary_grok_Transpose", out)(x)
