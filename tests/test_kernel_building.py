"""The library of kernels: who compiles it when, where it is kept, and what is not trusted."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import kernels
from kernels import building

ROOT = Path(__file__).parents[1]

native = pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels: no compiler, or a GPU")

PRODUCT = """
import jax, jax.numpy as jnp, numpy as np, quantize
w = quantize.pack(np.ones((1, 8, 3), np.int8), np.ones((1, 1, 1), np.float32))
w = jax.tree.map(jnp.asarray, w)
x = jnp.full((1, 8), 127.0)
f = lambda x: quantize.grouped_dot(x, w, jnp.zeros(1, jnp.int32), activations="int8")
print("ffi_call" in str(jax.make_jaxpr(f)(x)), f(x).tolist(), f(x).tolist())
"""


def run_product(cache, **environment):
    return run_code(PRODUCT, cache, **environment)


def run_code(code, cache, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_no_compiler_is_a_note(tmp_path):
    out, err = run_product(tmp_path, PATH=str(tmp_path), CXX="")
    assert out == "False [[1016.0, 1016.0, 1016.0]] [[1016.0, 1016.0, 1016.0]]"
    assert err.startswith("note: no native kernels, several times slower: no C++ compiler; install")
    assert err.count("\n") == 0


def test_a_compiler_that_fails_is_a_note(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'cannot\nwork' >&2\nexit 3\n")
    compiler.chmod(0o755)
    out, err = run_product(tmp_path / "cache", CXX=str(compiler))
    assert out.startswith("False [[1016.0")
    begun, failed = err.splitlines()
    assert begun.startswith("note: compiling kernels, ")
    assert failed.startswith("note: no native") and failed.endswith("failed: cannot work")
    assert not list((tmp_path / "cache/ternary-grok/kernels").iterdir())


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    """And not another one taken in its place."""
    out, err = run_product(tmp_path, CXX="no-such-compiler -m32")
    assert out.startswith("False [[1016.0")
    assert "CXX names 'no-such-compiler', which is not there; correct it or unset it" in err


def test_the_environment_can_switch_them_off(tmp_path):
    out, err = run_product(tmp_path, TERNARY_GROK_NATIVE="0")
    assert out.startswith("False [[1016.0") and err == ""


THREADS = """
import concurrent.futures, subprocess, kernels
runs, run = [], subprocess.run
def counted(*args, **options):
    runs.append("-shared" in args[0])
    return run(*args, **options)
subprocess.run = counted
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = {id(library) for library in pool.map(lambda _: kernels.library(), range(8))}
print(sum(runs), len(found), kernels.library() is not None)
"""


@native
def test_of_several_threads_one_compiles(tmp_path):
    """The first time, or where what was compiled lost its end in a power failure."""
    whole = kernels.build()
    damaged = tmp_path / "ternary-grok/kernels" / whole.name
    damaged.parent.mkdir(mode=0o700, parents=True)
    damaged.write_bytes(whole.read_bytes()[:100_000])
    out, err = run_code(THREADS, tmp_path)
    assert (out, err.count("\n")) == ("1 1 True", 0) and err.startswith("note: compiling")
    # From another folder a compiler may make other bytes, and so another name.
    sound = [p for p in damaged.parent.iterdir() if building._sum(p.read_bytes()) in p.name]
    assert len(sound) == 1


COMPILER = """#!/bin/sh
echo "$@" >> {folder}/runs
for output; do :; done
sleep {seconds}
printf %4096s a library > "$output"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that gives the arguments of all links so far by a compiler that $CXX names."""
    return make_compiler(tmp_path, monkeypatch, seconds=0)


def make_compiler(folder, monkeypatch, seconds):
    script = folder / "compiler"
    script.write_text(COMPILER.format(folder=folder, seconds=seconds))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return lambda: [run for run in all_runs(folder) if " -shared " in run]


def all_runs(folder):
    return (folder / "runs").read_text().splitlines() if (folder / "runs").exists() else []


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache/kernels"


def test_what_was_built_is_kept(compiler, cache, monkeypatch):
    path = kernels.build(folder=cache)
    assert [path] == list(cache.iterdir())
    assert kernels.build(folder=cache) == path and len(compiler()) == 1
    assert cache.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(building, "FLAGS", ("-O1",))
    assert kernels.build(folder=cache) != path and len(compiler()) == 2


def test_each_file_is_compiled_and_all_are_linked(compiler, cache, tmp_path):
    kernels.build(folder=cache)
    *compiled, linked = all_runs(tmp_path)
    other = {f"ternary_{name}.cc" for name in building.PATHS.keys() - building.path_flags().keys()}
    names = sorted({path.name for path in building.SOURCE.glob("*.cc")} - other)
    assert sorted(Path(run.split(" -c ")[1].split(" -o ")[0]).name for run in compiled) == names
    objects = {run.split(" -o ")[1] for run in compiled}
    assert set(linked.split(" -shared ")[1].split(" -o ")[0].split()) == objects


def test_only_what_the_processor_takes_is_compiled(compiler, cache, tmp_path, monkeypatch):
    """And another processor that shares the folder has another library."""
    libraries = set()
    for flags, paths in (
        ({"sse2"}, set()),
        ({"avx2", "avx_vnni"}, {"avx2", "avxvnni"}),
        ({"asimddp"}, {"neon"}),
    ):
        monkeypatch.setattr(building, "processor", lambda flags=flags: flags)
        libraries.add(kernels.build(folder=cache))
        runs = all_runs(tmp_path)
        (tmp_path / "runs").unlink()
        for name in building.PATHS:
            of_path = [run for run in runs if f"ternary_{name}.cc" in run]
            assert bool(of_path) == (name in paths)
            assert all(f"-DTERNARY_{name.upper()}" in run for run in of_path)
            needed = {building.INSTRUCTIONS[one] for one in flags & building.INSTRUCTIONS.keys()}
            assert all(needed & set(run.split()) for run in of_path)
    assert len(libraries) == 3


@pytest.mark.parametrize(
    "instructions, paths",
    [
        ({"avx2", "avx_vnni"}, ["avxvnni"]),
        ({"avx2", "avx512bw", "avx512vl", "avx512_vnni"}, ["avx512"]),
        ({"avx2", "avx512bw", "avx512_vnni", "amx_tile", "amx_int8"}, ["avx512", "amx"]),
        (set(), []),
    ],
)
def test_slower_paths_are_for_tests(instructions, paths, monkeypatch):
    monkeypatch.delenv(building.ALL_PATHS)
    monkeypatch.setattr(building, "processor", lambda: instructions)
    assert list(building.path_flags()) == paths


@pytest.mark.parametrize("name", ["one.cc", "two.cc", "two.h"])
def test_a_change_of_any_file_is_another_library(name, compiler, cache, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for each in ("one.cc", "two.cc", "two.h"):
        (source / each).write_text("int x;")
    path = kernels.build(source, cache)
    assert path.name.startswith("source-") and kernels.build(source, cache) == path
    (source / name).write_text("int y;")
    assert kernels.build(source, cache) != path and len(compiler()) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:100], lambda b: b[:-1]]
    + [lambda b: b[:1000] + bytes(1000) + b[2000:], lambda b: b + b" "],
)
def test_a_damaged_library_is_built_again(damage, compiler, cache):
    path = kernels.build(folder=cache)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert kernels.build(folder=cache) == path and path.read_bytes() == content
    assert len(compiler()) == 2 and [path] == list(cache.iterdir())


def test_a_library_that_others_may_have_written_is_built_again(compiler, cache, monkeypatch):
    path = kernels.build(folder=cache)
    path.chmod(0o622)
    assert kernels.build(folder=cache) == path and len(compiler()) == 2
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode, of", [(0o720, "kernels"), (0o702, "kernels"), (0o707, "cache")])
def test_a_folder_that_others_can_write_to_is_refused(mode, of, compiler, cache):
    path = kernels.build(folder=cache)
    folder = cache if of == "kernels" else cache.parent
    folder.chmod(mode)
    with pytest.raises(OSError, match=f"{folder} .*(others can write to it; remove|chmod o-w)"):
        kernels.build(folder=cache)
    folder.chmod(mode & 0o700 | (0o1007 if of == "cache" else 0))  # as /tmp is: names are safe
    assert kernels.build(folder=cache) == path and len(compiler()) == 1


def test_a_folder_of_another_user_is_refused(compiler, cache, monkeypatch):
    kernels.build(folder=cache)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(OSError, match="belongs to another user|is not only yours"):
        kernels.build(folder=cache)


def test_what_jax_compiles_is_not_kept_where_others_can_write(tmp_path, monkeypatch, capsys):
    """For it is code, too."""
    kept = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for mode in (0o700, 0o777):
            jax.config.update("jax_compilation_cache_dir", None)
            kernels.keep_compilations()
            for folder in tmp_path.glob("ternary-grok/xla-*"):
                folder.chmod(mode | 0o022)
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    assert capsys.readouterr().err.startswith("note: what JAX compiles is not kept: ")


def test_the_compiler_may_have_arguments(compiler, cache, monkeypatch):
    monkeypatch.setenv("CXX", f"env '{os.environ['CXX']}' -march=native '-D A'")
    path = kernels.build(folder=cache)
    assert compiler()[0].startswith("-march=native -D A -O3 ")
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -g")
    assert kernels.build(folder=cache) != path, "another command, another library"
    monkeypatch.setenv("CXX", "g++ '-g")
    with pytest.raises(OSError, match='CXX is "g\\+\\+ \'-g": No closing quotation; correct'):
        kernels.build(folder=cache)


def test_several_threads_and_processes_build_at_once(tmp_path, cache, monkeypatch):
    runs = make_compiler(tmp_path, monkeypatch, seconds=0.3)
    code = f"import kernels, pathlib; print(kernels.build(folder=pathlib.Path({str(cache)!r})))"
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        threads = [pool.submit(kernels.build, folder=cache) for _ in range(4)]
        processes = [pool.submit(run_code, code, tmp_path) for _ in range(2)]
        found = {str(one.result()) for one in threads} | {one.result()[0] for one in processes}
    assert found == {str(path) for path in cache.iterdir()} and len(found) == 1
    assert len(runs()) <= 3  # one for each process at most
