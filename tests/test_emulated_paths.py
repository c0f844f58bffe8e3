"""Ternary products of processors that this machine need not be: their code, emulated.

AMX's tiles are replaced by plain C++, around which the path runs as it is, on AVX-512 VNNI; and so
are instructions of AVX-512 and VNNI. NEON runs under qemu, if that and a compiler for it are
installed (Debian: g++-aarch64-linux-gnu and qemu-user).
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import building

ROOT = Path(__file__).parents[1]
FLAGS = ["-O1", "-std=c++17", "-w", "-static"]
TILES = f'-DEMULATED_TILES="{ROOT}/tests/emulated_tiles.h"'
VECTORS = ["-mavx2", "-mfma", "-Wno-psabi", f"-include{ROOT}/tests/emulated_vectors.h"]


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
    files = ["ternary_amx", "ternary_avx512"]
    flags = [*flags["avx512"], TILES]
    assert run_path("AmxGroup", files, building.compiler(), flags, tmp_path) == "672 problems\n"


@pytest.mark.parametrize(
    "function, files",
    [
        ("Avx512Group", ["ternary_avx512"]),
        ("AvxVnniGroup", ["ternary_avxvnni"]),
        ("AmxGroup", ["ternary_amx", "ternary_avx512"]),
    ],
)
def test_paths_without_their_instructions(function, files, tmp_path):
    if missing := {"avx2", "fma"} - building.processor():
        pytest.skip(f"this processor has no {', '.join(missing)}")
    flags = [*VECTORS, TILES]
    assert run_path(function, files, building.compiler(), flags, tmp_path) == "672 problems\n"


def test_neon_under_qemu(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if missing := [name for name in (compiler, emulator) if not shutil.which(name)]:
        pytest.skip(f"{missing[0]} is not installed")
    flags = [building.INSTRUCTIONS[name] for name in sorted(*building.PATHS["neon"])]
    found = run_path(
        "NeonGroup", ["ternary_neon"], [compiler], flags, tmp_path, [emulator, "-cpu", "max"]
    )
    assert found == "672 problems\n"
