"""Memory of the process, or of its accelerator, since a point in time."""

import ctypes
import gc
from pathlib import Path

import jax

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def used() -> dict[str, int]:
    """Bytes now and at most so far, {"resident", "peak"}: of the first accelerator, or else of this
    process; nothing where the system does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return {"resident": stats["bytes_in_use"], "peak": stats["peak_bytes_in_use"]}
    if not STATUS.exists():
        return {}
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    names = {"resident": "VmRSS", "peak": "VmHWM"}
    return {key: int(lines[name].split()[0]) * 1024 for key, name in names.items()}


def reset_peak() -> None:
    """Lets the peak of the process start again, where the system allows it; returns free memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if CLEAR.exists():
        CLEAR.write_text("5")


class Meter:
    """What the memory has grown by since this was made.

    An accelerator's peak cannot be reset: there `peak_MB` is that of the process so far.
    """

    def __init__(self):
        reset_peak()
        self.before = used().get("resident")

    def read(self) -> dict[str, float]:
        """{"resident_MB": now, without what is free, "peak_MB": at most since the last call}."""
        peak = used()
        reset_peak()
        found = used() | {key: value for key, value in peak.items() if key == "peak"}
        return {f"{key}_MB": (value - self.before) / 1e6 for key, value in found.items()}
