"""Eight CPU devices for every test, so that meshes can be tried on any machine; and what is
compiled is kept for the next run, which takes half the time."""

import contextlib
import os
import signal
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["TERNARY_GROK_PATHS"] = "all"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402  the environment and the path come first

import kernels  # noqa: E402

kernels.keep_compilations()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


@pytest.fixture(params=["kernels", "plain"])
def kernels_or_plain(request):
    """A test that uses this runs twice: with kernels, where there are any, and without."""
    with kernels.disabled() if request.param == "plain" else contextlib.nullcontext():
        yield
