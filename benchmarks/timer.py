"""What every benchmark shares: medians after a warm-up, and the machine's limits, measured."""

import ctypes
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kernels

REST = 0.2  # seconds
PEAK = Path(__file__).with_name("peak.cc")


def median(f: Callable, repeats: int = 7) -> float:
    """Median seconds of f(), whose result is waited for, after two calls that do not count."""
    seconds = []
    for i in range(repeats + 2):
        begin = time.perf_counter()
        jax.block_until_ready(f())
        if i >= 2:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def alternate(measures: dict[str, Callable[[], float]], rounds: int = 7) -> dict[str, np.ndarray]:
    """What each of several measures gives, [rounds], after a round that does not count.

    They take turns, so that a machine whose speed drifts is as fast for one as for the others.
    Before each, threads that spin while they wait for work get the time to fall asleep.
    """
    found = {name: [] for name in measures}
    for _ in range(rounds + 1):
        for name, measure in measures.items():
            time.sleep(REST)
            found[name].append(measure())
    return {name: np.array(values[1:]) for name, values in found.items()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (s.split(": ")[1] for s in lines if s.startswith("model name")), platform.processor()
    )


def read_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second that all cores read from memory together, of an array that no cache holds.

    In vectors as wide as registers, from large pages. On other devices, and without native kernels,
    of a sum over an array there.
    """
    array = jnp.ones(size // 4, jnp.int32)
    if not kernels.on_cpu():
        total = jax.jit(jnp.sum)
        return size / median(lambda: total(array))
    kernels.use_large_pages(array)
    parts = np.array_split(np.asarray(array), os.cpu_count())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return size / median(lambda: list(pool.map(sum_read, parts)))


def sum_read(array: np.ndarray) -> int:
    """The sum modulo 2**32 of int32 [n], as fast as a core can read."""
    return _peak_library().SumRead(array.ctypes.data, array.size)


def multiply_adds(groups: int, path: str | None = None) -> int:
    """So many groups of int8 multiply-adds, on this thread's registers alone; their number.

    path: one of `kernels.ternary_paths()`, by default the fastest
    """
    path = path or kernels.ternary_paths()[-1]
    return _peak_library().MultiplyAdds(path.encode(), groups)


@functools.cache
def _peak_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(kernels.build(PEAK)))
    library.MultiplyAdds.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.SumRead.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.MultiplyAdds.restype = library.SumRead.restype = ctypes.c_int64
    return library


def int8_peak(groups: int = 2000) -> float:
    """int8 multiplications and additions a second that all cores make on registers alone.

    On other devices, and without native kernels, of XLA's product.
    """
    if not kernels.on_cpu():
        return product_rate(jnp.int8)
    cores = os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        seconds = median(lambda: list(pool.map(multiply_adds, [groups] * cores)))
    return 2 * cores * multiply_adds(groups) / seconds


def product_rate(dtype) -> float:
    """Multiplications and additions a second in XLA's large product of this dtype."""
    n = 2048
    a = jnp.ones((n, n), dtype)
    wide = jnp.int32 if dtype == jnp.int8 else jnp.float32
    product = jax.jit(
        lambda a: jax.lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    )
    return 2 * n**3 / median(lambda: product(a))


def machine() -> dict:
    """The machine and its limits, for the head of a report."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "read_bandwidth_GB_per_s": round(read_bandwidth() / 1e9, 1),
        "int8_T_per_s": round(int8_peak() / 1e12, 2),
        "bfloat16_product_T_per_s": round(product_rate(jnp.bfloat16) / 1e12, 2),
    }
