"""The tests of the C++ kernels under the address and undefined behaviour sanitizers of gcc.

    python tests/sanitize.py

Builds the C++ of `kernels/` with them, beside the ordinary library, and starts Python with their
runtimes loaded first: they have to see every allocation, those of XLA and NumPy too. Anything read
or written beyond an array ends the process. Without gcc's runtimes, says so and succeeds.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kernels import building  # noqa: E402  the path comes first

TESTS = ("tests/test_kernel_arguments.py", "tests/test_kernels.py", "tests/test_conversion.py")
# Null pointers are seen without a check at each use, and x86 takes any alignment: without those and
# with -O1, compiling takes a third of the time.
FLAGS = (
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,alignment,object-size,vptr",
    "-fno-sanitize-recover=all",
)
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last, for its exceptions to be seen


def runtimes() -> list[str]:
    """The paths of RUNTIMES; OSError without a compiler or without one of them."""
    found = []
    for name in RUNTIMES:
        command = [*building.compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise OSError(f"{command[0]} has no {name}")
        found.append(path)
    return found


def start() -> None:
    """Builds the library, and starts this script again with the runtimes."""
    try:
        preload = " ".join(runtimes())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"sanitizers skipped: {error}")
        return
    begin = time.perf_counter()
    building.build()
    print(f"sanitizers: built in {time.perf_counter() - begin:.0f} s", flush=True)
    environment = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "SANITIZED": "1"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=os.environ | environment)
    print(f"sanitizers: {time.perf_counter() - begin:.0f} s")
    sys.exit(done.returncode)


def run_tests() -> None:
    import pytest

    # A report is written to the descriptor, and the process ends: pytest must not keep it.
    sys.exit(pytest.main(["-q", "--capture=sys", "-k", "not gpu and not other_vectors", *TESTS]))


if __name__ == "__main__":
    os.environ[building.ALL_PATHS] = "all"
    building.FLAGS += FLAGS
    run_tests() if "SANITIZED" in os.environ else start()
