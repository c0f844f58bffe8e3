"""The driver of `fuzz_files.py`, in a process of its own: a fault there may end it, or hang."""

import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("fuzz_files.py")


def test_damaged_and_crafted_files():
    done = subprocess.run(
        [sys.executable, DRIVER, "--cases", "3000"], capture_output=True, text=True
    )
    assert done.stdout == "3000 cases, 0 failures\n", done.stderr
    assert done.returncode == 0
