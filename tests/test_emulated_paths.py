"""Ternary products of processors that this machine need not be: their code, emulated.

AMX's tiles are replaced by plain C++, around which the path runs as it is, on AVX-512 VNNI; NEON
runs under qemu, if that and a compiler for it are installed (Debian: g++-aarch64-linux-gnu and
qemu-user).
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import building

ROOT = Path(__file__).parents[1]
FLAGS = ["-O1", "-std=c++17", "-w", "-static"]


def run_path(function, files, compiler, flags, folder, emulator=()):
    """Standard output of tests/ternary_paths.cc, of a path and the files that it needs."""
    names = ["ternary_plain", *files]
    sources = [str(ROOT / "tests/ternary_paths.cc"), *(f"{building.SOURCE}/{n}.cc" for n in names)]
    program = str(folder / "paths")
    command = [*compiler, *FLAGS, *flags, *building.INCLUDES, f"-DPATH={function}", *sources]
    subprocess.run([*command, "-o", program], check=True, timeout=300)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_amx_without_amx(tmp_path):
    flags = building.path_flags()
    if "avx512" not in flags:
        pytest.skip("this processor has no AVX-512 VNNI, on which AMX's path rests")
    tiles = f'-DEMULATED_TILES="{ROOT}/tests/emulated_tiles.h"'
    found = run_path(
        "AmxGroup",
        ["ternary_amx", "ternary_avx512"],
        building.compiler(),
        [*flags["avx512"], tiles],
        tmp_path,
    )
    assert found == "672 problems\n"


def test_neon_under_qemu(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if missing := [name for name in (compiler, emulator) if not shutil.which(name)]:
        pytest.skip(f"{missing[0]} is not installed")
    flags = [building.INSTRUCTIONS[name] for name in sorted(*building.PATHS["neon"])]
    found = run_path(
        "NeonGroup", ["ternary_neon"], [compiler], flags, tmp_path, [emulator, "-cpu", "max"]
    )
    assert found == "672 problems\n"
