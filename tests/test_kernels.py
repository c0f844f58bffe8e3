"""Native kernels: the integers of every path are those of NumPy, and without a compiler too."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_kernels
import kernels
import quantize

PATHS = {"plain": 0, "AVX2": 1, "AVX-512 VNNI": 2, "AMX": 3}
ROOT = Path(kernels.__file__).parent

native = pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels: no compiler, or a GPU")


def best_path():
    best = kernels.library().BestTernaryPath
    best.restype = kernels.ctypes.c_int64
    return best()


def problem(blocks, rows, inputs, outputs, experts, seed=0):
    random = np.random.default_rng(seed)
    trits = random.integers(-1, 2, (experts, inputs, outputs)).astype(np.int8)
    x = random.integers(-127, 128, (blocks, rows, inputs)).astype(np.int8)
    chosen = random.integers(0, experts, blocks).astype(np.int32)
    return x, trits, chosen


def expected(x, trits, chosen):
    sums = x.astype(np.int32) @ trits[chosen].astype(np.int32)
    return np.where(chosen[:, None, None] < 0, 0, sums)


def sums(x, weight, chosen, path=-1):
    call = jax.jit(kernels.ternary_sums, static_argnums=(3, 4))
    return np.asarray(call(x, weight.packed, chosen, weight.block, path))


@native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape",  # blocks, rows, inputs, outputs, experts
    [
        (1, 1, 256, 33, 1),
        (3, 2, 70, 37, 2),
        (2, 3, 1000, 65, 3),
        (1, 8, 6144, 64, 1),
        (2, 17, 512, 33, 2),
        (1, 40, 2052, 31, 1),
        (1, 128, 1536, 300, 1),
        (40, 16, 256, 600, 3),
        (1, 1, 1, 1, 1),
    ],
)
def test_every_path_gives_the_integers_of_numpy(shape, path):
    if PATHS[path] > best_path():
        pytest.skip(f"this processor has no {path}")
    x, trits, chosen = problem(*shape)
    if len(chosen) > 1:
        chosen[0] = -1
    weight = quantize.pack(trits, None)
    np.testing.assert_array_equal(sums(x, weight, chosen, PATHS[path]), expected(x, trits, chosen))


@native
@pytest.mark.parametrize("path", PATHS)
def test_the_largest_sums(path):
    """-128 too, which no activation is, and 32768 inputs."""
    if PATHS[path] > best_path():
        pytest.skip(f"this processor has no {path}")
    for rows in (1, 16):
        for value in (127, -128):
            x = np.full((1, rows, 32768), value, np.int8)
            weight = quantize.pack(np.full((1, 32768, 3), -1, np.int8), None)
            found = sums(x, weight, np.zeros(1, np.int32), PATHS[path])
            assert (found == -32768 * value).all()


@native
@pytest.mark.parametrize("rows", [5, 12, 33])
def test_rows_of_zeros_anywhere(rows):
    """Padding is skipped behind the last row that is not zero, and nowhere else."""
    x, trits, chosen = problem(3, rows, 300, 50, 2)
    x[0, 2:], x[1, :3], x[2] = 0, 0, 0
    weight = quantize.pack(trits, None)
    np.testing.assert_array_equal(sums(x, weight, chosen), expected(x, trits, chosen))


@native
def test_every_block_size_of_the_packing():
    x, trits, chosen = problem(1, 2, 512, 9, 1)
    for block in (1, 2, 4, 8, 16, 32, 64, 128):
        weight = quantize.pack(trits, None, block)
        np.testing.assert_array_equal(sums(x, weight, chosen), expected(x, trits, chosen))


@native
def test_activations_that_do_not_fit_are_an_error():
    x, trits, chosen = problem(1, 1, 256, 8, 1)
    weight = quantize.pack(trits[:, :128], None)
    with pytest.raises(Exception, match="activations do not fit the packed matrix"):
        sums(x, weight, chosen)


@native
@pytest.mark.parametrize("activations", ["int8", "int15"])
def test_products_are_those_of_plain_jax(activations, monkeypatch):
    """To the last bit: the integers are the same, and what follows them is."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((12, 300)), jnp.float32)
    w = quantize.pack(
        random.integers(-1, 2, (3, 300, 77)).astype(np.int8),
        random.random((3, 1, 1), np.float32),
    )
    w = jax.tree.map(jnp.asarray, w)
    experts = jnp.array([2, 0, -1, 0])

    def product():
        call = jax.jit(lambda x: quantize.grouped_dot(x, w, experts, activations=activations))
        text = str(jax.make_jaxpr(lambda x: call(x))(x))
        return np.asarray(call(x)), "ffi_call" in text

    found, is_native = product()
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    plain, is_plain_native = product()
    assert is_native and not is_plain_native
    np.testing.assert_array_equal(found, plain)
    assert (found[6:9] == 0).all() and (found[:6] != 0).all()


# --- Which kernel ---------------------------------------------------------------------------------


def gpu_problem():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((4, 2048)), jnp.float32)
    trits = random.integers(-1, 2, (3, 2048, 128)).astype(np.int8)
    w = quantize.pack(trits, random.random((3, 1, 1), np.float32))
    return x, jax.tree.map(jnp.asarray, w), jnp.array([2, -1])


@pytest.mark.parametrize("activations", ["int8", "int15"])
def test_gpu_kernels_give_the_products_of_plain_jax(activations, monkeypatch):
    """Interpreted: to the last bit, through the same `grouped_dot`."""
    x, w, experts = gpu_problem()
    call = functools.partial(quantize.grouped_dot, activations=activations)
    monkeypatch.setattr(kernels, "ternary_kernel", lambda *_: None)
    plain = jax.jit(lambda x: call(x, w, experts))(x)
    interpreted = functools.partial(gpu_kernels.ternary_sums, interpret=True)
    monkeypatch.setattr(kernels, "ternary_kernel", lambda *_: interpreted)
    text = str(jax.make_jaxpr(lambda x: call(x, w, experts))(x))
    assert "pallas_call" in text
    np.testing.assert_array_equal(jax.jit(lambda x: call(x, w, experts))(x), plain)


def test_the_kernel_is_that_of_the_device(monkeypatch):
    x, w, _ = gpu_problem()
    rows = jax.ShapeDtypeStruct((2, 2, x.shape[1]), jnp.int8)
    if kernels.on_cpu():
        assert kernels.ternary_kernel(rows, w.packed, w.block, 0) is kernels.ternary_sums
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernels.ternary_kernel(rows, w.packed, w.block, 0) is gpu_kernels.ternary_sums
    assert kernels.ternary_kernel(rows, w.packed, w.block, 3) is None
    assert kernels.ternary_kernel(rows, w.packed, 32, 0) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert kernels.ternary_kernel(rows, w.packed, w.block, 0) is None


# --- The output head ------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab, size", [(1, 1), (37, 100), (130, 64), (9, 1537)])
def test_table_dot(vocab, size, dtype):
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((vocab, size)), dtype)
    x = jnp.asarray(random.standard_normal((7, size)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    found = jax.jit(kernels.table_dot)(x, table)
    np.testing.assert_allclose(found, exact, atol=3e-7 * np.sqrt(size) * 4)  # float32 sums


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_a_row_do_not_depend_on_other_rows_or_on_the_shard(dtype):
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((256, 333)), dtype)
    x = jnp.asarray(random.standard_normal((8, 333)), jnp.float32)
    call = jax.jit(kernels.table_dot)
    whole = np.asarray(call(x, table))
    for rows in ([0], [3], [5, 6], [1, 2, 3], list(range(7))):
        np.testing.assert_array_equal(call(x[np.array(rows)], table), whole[rows])
    np.testing.assert_array_equal(call(x, table[32:64]), whole[:, 32:64])


def test_many_rows_and_other_dtypes_are_not_for_the_kernel():
    assert not kernels.takes_table(9, jnp.zeros((3, 4)))
    assert not kernels.takes_table(1, jnp.zeros((3, 4), jnp.float16))


# --- Building -------------------------------------------------------------------------------------

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
    assert err.count("\n") == 0 and err.endswith("failed: cannot work")
    assert not list((tmp_path / "cache/ternary-grok").iterdir())


def test_the_environment_can_switch_them_off(tmp_path):
    out, err = run_product(tmp_path, TERNARY_GROK_NATIVE="0")
    assert out.startswith("False [[1016.0") and err == ""


THREADS = """
import concurrent.futures, subprocess, kernels
runs, run = [], subprocess.run
def counted(*args, **options):
    runs.append(args)
    return run(*args, **options)
subprocess.run = counted
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = {id(library) for library in pool.map(lambda _: kernels.library(), range(8))}
print(len(runs), len(found), kernels.library() is not None)
"""


@native
def test_of_several_threads_one_compiles(tmp_path):
    out, err = run_code(THREADS, tmp_path)
    assert (out, err) == ("1 1 True", "")


@native
def test_what_was_built_is_kept(tmp_path, monkeypatch):
    path = kernels.build(tmp_path)
    assert [path] == list(tmp_path.iterdir())

    def never(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    assert kernels.build(tmp_path) == path
    monkeypatch.setattr(kernels, "FLAGS", ("-O1",))
    with pytest.raises(AssertionError, match="compiled again"):
        kernels.build(tmp_path)
