"""What is compiled once and kept, in a folder that nobody else can write to.

That is the library of C++ kernels, and for commands what JAX compiles.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

import files

SOURCE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-w", "-ffp-contract=off", "-fno-trapping-math")
ALL_PATHS = "TERNARY_GROK_PATHS"  # environment variable; all: also those slower than another
# Files where a product need not be rounded before it is added.
CONTRACTED = ("attention", "grouped", "table", "ternary")
# Files of one path, ternary_NAME.cc, for whatever processor has its instructions: what one of them
# must have, any line of it. All others are compiled for this processor.
PATHS = {
    "avx2": ({"avx2"},),
    "avxvnni": ({"avx2", "avx_vnni"}, {"avx2", "avx512vl", "avx512_vnni"}),
    "avx512": ({"avx512bw", "avx512_vnni"},),
    "amx": ({"avx512bw", "avx512_vnni", "amx_tile", "amx_int8"},),
    "neon": ({"asimddp"},),
}
INSTRUCTIONS = {  # of the lines: the compiler's flag
    "avx2": "-mavx2",
    "avx_vnni": "-mavxvnni",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "amx_tile": "-mamx-tile",
    "amx_int8": "-mamx-int8",
    "asimddp": "-march=armv8.2-a+dotprod",
}
THIS_PROCESSOR = {  # of machines: the flag to compile for the processor at hand
    "x86_64": ["-march=native"],
    "aarch64": ["-mcpu=native"],
    "arm64": ["-mcpu=native"],
}
INCLUDES = (f"-I{jax.ffi.include_dir()}",)
_BUILDING = threading.Lock()


def build(source: Path = SOURCE, folder: Path | None = None) -> Path:
    """Compiles C++ to a library unless that was done before; the path of the library.

    source: a file, or a folder of files and headers
    folder: by default `cache_folder() / "kernels"`
    The name ends in a sum of the content, so that a damaged library is not loaded but built again.
    Raises OSError without a compiler, or for a folder that is not private; SubprocessError if it
    takes too long.
    """
    folder = private_folder(folder or files.cache_folder() / "kernels")
    command = [*compiler(), *FLAGS]
    content = [(path.name, path.read_bytes()) for path in _files(source, "*.cc", "*.h")]
    machine = (platform.machine(), sys.platform, _processor_lines(), path_flags())
    known = (content, jax.lib.__version__, command, CONTRACTED, machine)
    name = f"{source.stem}-{_sum(repr(known).encode())}"
    with _BUILDING:  # of several threads one
        for path in folder.glob(f"{name}-*.so"):
            if _is_private(path) and path.name == f"{name}-{_sum(path.read_bytes())}.so":
                return path
        content = _compiled(command, source)
        path = folder / f"{name}-{_sum(content)}.so"
        with files.replacing(path, shared=True) as part:
            part.write_bytes(content)
            part.chmod(0o600)  # as `_is_private` wants it, whatever the umask
        return path


def _files(source: Path, *patterns: str) -> list[Path]:
    """The files of a folder that fit one of the patterns, sorted; or else the file itself."""
    if not source.is_dir():
        return [source]
    return sorted(path for pattern in patterns for path in source.glob(pattern))


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compiled(command: list[str], source: Path) -> bytes:
    """The library that a compiler makes, of each file by itself, at once; OSError if it fails."""
    print(f"note: compiling {source.name}, 6 to 20 s on two cores, once", file=sys.stderr)
    of_path = path_flags()
    options = [*INCLUDES, *(f"-DTERNARY_{name.upper()}" for name in of_path)]
    own = {f"ternary_{name}": of_path.get(name) for name in PATHS} | {"ternary_plain": []}
    here = THIS_PROCESSOR.get(platform.machine(), [])
    own |= {name: [*here, "-ffp-contract=fast"] for name in CONTRACTED}
    sources = [path for path in _files(source, "*.cc") if own.get(path.stem, here) is not None]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(sources)) as pool:
        objects = [f"{folder}/{path.stem}.o" for path in sources]
        tasks = [
            pool.submit(
                _run, command, *options, *own.get(path.stem, here), "-c", str(path), "-o", to
            )
            for path, to in zip(sources, objects, strict=True)
        ]
        for task in tasks:
            task.result()
        library = Path(folder) / "library.so"
        _run(command, "-shared", *objects, "-o", str(library))
        return library.read_bytes()


def path_flags() -> dict[str, list[str]]:
    """The compiler's flags for the fastest of PATHS that this processor takes; see ALL_PATHS.

    And for AVX-512 beside AMX, which leaves few rows to it.
    """
    there = processor()
    found = {}
    for name, lines in PATHS.items():
        for needed in lines:
            if needed <= there and name not in found:
                found[name] = sorted(INSTRUCTIONS[instruction] for instruction in needed)
    fastest = list(found)[-2 if "amx" in found else -1 :]
    every = os.environ.get(ALL_PATHS) == "all"
    return found if every else {name: found[name] for name in fastest}


def processor() -> set[str]:
    """The names of what this processor's instructions are extended by, as Linux has them."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return {"asimddp"}  # every one of them has it
    return {word for line in _processor_lines() for word in line.partition(":")[2].split()}


def _processor_lines() -> list[str]:
    """What Linux says of the processors' model and instructions, each once, sorted."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})


def _run(command: list[str], *arguments: str) -> None:
    """A run of the compiler; OSError if it fails."""
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed: {done.stderr}")


def compiler() -> list[str]:
    """$CXX, which may have arguments, or else the first compiler there is; OSError without one."""
    wanted = os.environ.get("CXX", "")
    try:
        command = shlex.split(wanted)
    except ValueError as error:
        raise OSError(f"CXX is {wanted!r}: {error}; correct it or unset it") from None
    for name in command[:1] or ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path, *command[1:]]
    if command:
        raise OSError(f"CXX names {command[0]!r}, which is not there; correct it or unset it")
    raise OSError("no C++ compiler; install g++ or clang++, or set CXX")


def private_folder(path: Path) -> Path:
    """A folder for code to be run, made if it is not there: nobody else may be able to put any in.

    Raises OSError otherwise. (To compile elsewhere instead would take its time at every start.)
    """
    for folder in (path.parent, path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    above = path.parent.stat()
    open_to_all = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
    if open_to_all or above.st_uid not in (0, os.geteuid()):  # who could exchange `path`
        raise OSError(f"{path.parent} is not only yours; chmod o-w it, or set XDG_CACHE_HOME")
    if not _is_private(path):
        raise OSError(f"{path} belongs to another user, or others can write to it; remove it")
    return path


def _is_private(path: Path) -> bool:
    """Whether a file or folder is the user's own, and nobody else can write to it."""
    about = path.stat()
    return about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def keep_compilations() -> None:
    """Lets JAX keep what it compiles in `cache_folder()`, for the next process; for commands.

    JAX's own setting, such as JAX_COMPILATION_CACHE_DIR in the environment, goes first.
    """
    if jax.config.jax_compilation_cache_dir is None:
        # Code for one processor must not be loaded on another that shares the folder.
        key = _sum(repr(_processor_lines()).encode())
        try:
            folder = private_folder(files.cache_folder() / f"xla-{key}")
        except OSError as error:
            print(f"note: what JAX compiles is not kept: {error}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
