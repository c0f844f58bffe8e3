"""Native kernels: the integers of every path are those of NumPy, and without a compiler too."""

import ctypes
import dataclasses
import functools
import itertools
import platform
import shlex
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
import kernels
import model
import quantize
import shards
from kernels import building, gpu

KINDS = [(1, 0), (1, 1), (1, 2), (1, 4), (2, 0), (2, 1), (2, 2), (2, 4)]  # see `grouped`
PATHS = ("plain", *kernels.building.PATHS)
ROOT = Path(__file__).parents[1]

native = pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels: no compiler, or a GPU")


def problem(blocks, rows, inputs, outputs, experts, seed=0):
    random = np.random.default_rng(seed)
    trits = random.integers(-1, 2, (experts, inputs, outputs)).astype(np.int8)
    x = random.integers(-127, 128, (blocks, rows, inputs)).astype(np.int8)
    chosen = random.integers(0, experts, blocks).astype(np.int32)
    if blocks > 1:
        chosen[0] = -1
    return x, quantize.pack(trits, None), chosen


def grouped(inputs, outputs, experts, planes, slabs, block=None, seed=0):
    """A weight with multipliers, most of them as large as they may be.

    slabs: of a packing block that are a group, 1, 2 or 4; 0: all inputs are
    """
    random = np.random.default_rng(seed)
    block = block or quantize.packing_block(inputs)
    groups = -(-inputs // 4) // block * 4 // slabs if slabs else 1
    first = random.integers(0, 128, (experts, outputs, groups, 1))
    first[random.random(first.shape) < 0.5] = 127
    second = random.integers(0, 128 - first)
    multipliers = np.concatenate([first, second], axis=-1)[..., :planes].astype(np.int8)
    trits = random.integers(-1, 2, (experts, planes, inputs, outputs)).astype(np.int8)
    return quantize.pack(trits, None, multipliers, block)


def expected(x, weight, chosen):
    codes = np.asarray(quantize.unpack(weight))[chosen].astype(np.int64)
    # Products of float64 are exact up to 2**53, and there is a fast routine for them.
    sums = (x.astype(np.float64) @ codes.astype(np.float64)).astype(np.int64)
    return np.where(chosen[:, None, None] < 0, 0, sums)


def sums(x, weight, chosen, path=-1):
    return sums_of_each(x, [weight], chosen, path)[0]


def sums_of_each(x, weights, chosen, path=-1):
    """Of several weights; what takes most of the time is to compile, which is done once."""

    @jax.jit
    def call(x, weights, chosen):
        return [kernels.ternary_sums(x, w, chosen, path) for w in weights]

    return [np.asarray(found) for found in call(x, weights, chosen)]


def assert_exact(x, weights, chosen, path=-1):
    for weight, found in zip(weights, sums_of_each(x, weights, chosen, path), strict=True):
        np.testing.assert_array_equal(found, expected(x, weight, chosen))


@pytest.fixture(params=PATHS)
def path(request):
    paths = kernels.ternary_paths()
    if request.param not in paths:
        pytest.skip(f"this processor has no {request.param}")
    return paths.index(request.param)


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("kind", [None, (1, 4), (2, 2)])
def test_products_in_one_call_are_those_of_its_parts(kind, activations, dtype, monkeypatch):
    """Rounding, sums and scales by themselves give the same bits; GELU in float32 nearly does."""
    experts, inputs, outputs = 3, 512, 192
    random = np.random.default_rng(3)

    def weight():
        w = problem(1, 1, inputs, outputs, experts)[1]
        if kind:
            w = quantize.interleave(grouped(inputs, outputs, experts, *kind))
        scales = random.uniform(0.01, 0.02, (experts, 1, outputs)).astype(np.float32)
        return dataclasses.replace(w, scales=jnp.asarray(scales))

    gate, up = weight(), weight()
    x = random.standard_normal((12, inputs)).astype(np.float32)
    x[2:4], x[4] = 0, np.inf  # rows of padding, and one that is not finite
    x, chosen = jnp.asarray(x, dtype), jnp.array([1, 0, -1, 2], jnp.int32)

    def run():
        options = {"activations": activations}
        both = jax.jit(lambda *a: quantize.grouped_dots(*a, **options))(x, (gate, up), chosen)
        return both, jax.jit(lambda *a: quantize.gated_dot(*a, **options))(x, gate, up, chosen)

    assert quantize.gated_dot.kernel(x, gate, up, chosen, activations=activations)
    together, gated = run()
    for name in ("ternary_dots", "gated_dot"):
        monkeypatch.setitem(kernels.KERNELS[name], "cpu", (None,))
    apart, _ = run()
    for pair in zip(together, apart, strict=True):
        found, wanted = (np.asarray(y, np.float32) for y in pair)
        np.testing.assert_array_equal(found, wanted)
        assert np.isnan(found[4]).all() and not np.isnan(found[:4]).any()
    # GELU and the product with `up` are both rounded, of a bfloat16 by 2^-8 of it at most.
    first, second = (np.asarray(y, np.float64) for y in apart)
    inner = np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)
    wanted = first * (1 + np.tanh(inner)) / 2 * second
    rtol = 2**-7 if dtype == "bfloat16" else 1e-5
    gated = np.asarray(gated, np.float32)
    np.testing.assert_allclose(gated, wanted, rtol=rtol, atol=1e-6)


@native
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
        (20, 16, 256, 200, 3),
        (2, 1, 4608, 70, 2),
        (3, 19, 2560, 45, 2),
        (1, 1, 1, 1, 1),
    ],
)
def test_every_path_gives_the_integers_of_numpy(shape, path):
    x, weight, chosen = problem(*shape)
    weights = [grouped(*shape[2:], planes, slabs) for planes, slabs in KINDS]
    assert_exact(x, [weight, *weights], chosen, path)


@native
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 21])
def test_every_block_size_of_the_packing(rows, block, path):
    inputs = 4 * block * (2048 // (4 * block) + 3)  # more than a chunk, and part of a vector
    x, weight, chosen = problem(1, rows, inputs, 9, 1)
    plain = quantize.pack(quantize.unpack(weight), None, block=block)
    weights = [grouped(inputs, 9, 1, planes, slabs, block) for planes, slabs in KINDS]
    assert_exact(x, [plain, *weights], chosen, path)


@native
@pytest.mark.parametrize(
    "rows, inputs", [(1, 6144), (3, 384), (6, 512), (40, 2560), (7, 126), (8, 384)]
)
def test_outputs_side_by_side(rows, inputs, path):
    x, weight, chosen = problem(2, rows, inputs, 192, 2)
    weights = [weight, *(grouped(inputs, 192, 2, planes, slabs) for planes, slabs in KINDS)]
    interleaved = [quantize.interleave(w) for w in weights]
    assert all(w.interleaved for w in interleaved)
    assert_exact(x, interleaved, chosen, path)


@native
def test_rows_are_interleaved_in_place():
    groups = np.random.default_rng(0).integers(0, 256, (3, 64 * 76), np.uint8)  # more than a line
    expected = groups.reshape(3, 64, 19, 4).swapaxes(1, 2).reshape(3, -1)
    kernels.interleave(groups)
    np.testing.assert_array_equal(groups, expected)
    for width in (64 * 6, 100):
        with pytest.raises(AssertionError):
            kernels.interleave(np.zeros((2, width), np.uint8))


@native
@pytest.mark.parametrize("planes, slabs", [(1, 1), (1, 4), (2, 0), (2, 2)])
def test_the_sums_of_a_row_do_not_depend_on_other_rows(planes, slabs, path):
    x, _, chosen = problem(1, 21, 1536, 70, 1)
    weight = grouped(1536, 70, 1, planes, slabs)
    whole = sums(x, weight, chosen, path)
    for rows in ([7], [20, 3], list(range(4, 20))):
        np.testing.assert_array_equal(sums(x[:, rows], weight, chosen, path), whole[:, rows])


@native
def test_the_largest_sums(path):
    """-128 too, which no activation is, and 32768 inputs."""
    for rows in (1, 16):
        for value in (127, -128):
            x = np.full((1, rows, 32768), value, np.int8)
            weight = quantize.pack(np.full((1, 32768, 3), -1, np.int8), None)
            found = sums(x, weight, np.zeros(1, np.int32), path)
            assert (found == -32768 * value).all()


@native
@pytest.mark.parametrize("multipliers", [(127,), (127, 0), (64, 63)])
@pytest.mark.parametrize("trits", [(0b00000000, -1), (0b10101010, 1)], ids=["-1", "1"])
def test_the_largest_sums_with_multipliers(trits, multipliers, path):
    """Of as many inputs as there may be, 131072."""
    inputs, planes, (byte, trit) = 1 << 17, len(multipliers), trits
    packed = np.full((1, 2, planes * inputs // 4), byte, np.uint8)
    weights = [
        quantize.PackedWeight(packed, None, 64, 0, np.full((1, 2, g, planes), multipliers, np.int8))
        for g in (1, inputs // 256, inputs // 64)
    ]
    for rows in (1, 16):
        for value in (127, -128):
            x = np.full((1, rows, inputs), value, np.int8)
            for found in sums_of_each(x, weights, np.zeros(1, np.int32), path):
                assert (found == inputs * 127 * value * trit).all()


@native
@pytest.mark.parametrize("rows", [5, 12, 33])
def test_rows_of_zeros_anywhere(rows):
    """Padding is skipped behind the last row that is not zero, and nowhere else."""
    x, weight, chosen = problem(3, rows, 304, 50, 2)
    chosen[0] = 1
    x[0, 2:], x[1, :3], x[2] = 0, 0, 0
    weights = [weight, grouped(304, 50, 2, 1, 4), grouped(304, 50, 2, 2, 0)]
    assert_exact(x, weights, chosen)


@native
@pytest.mark.parametrize("rows", [1, 3, 16, 50])
def test_blocks_of_one_expert_side_by_side(rows, path):
    """Joined, and divided again where they are many; with rows of zeros, and blocks of them."""
    chosen = np.array([2, 2, 2, 2, 0, -1, -1, 0, 0, 1, 1, 3, -1, -1], np.int32)
    x, weight, _ = problem(len(chosen), rows, 256, 70, 3)
    x[2, rows // 2 :], x[4, 1:], x[8], x[10, rows - 1 :], x[9] = 0, 0, 0, 0, 0
    x[3], x[3, -1, 5] = 0, 1  # the last row of all of expert 2
    wanted = expected(x, weight, np.where(chosen == 3, -1, chosen))
    np.testing.assert_array_equal(sums(x, weight, chosen, path), wanted)


@native
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("inputs", [255, 256])
@pytest.mark.parametrize("activations", ["int8", "int15"])
def test_a_row_that_is_not_finite_becomes_nan(activations, inputs, wrong):
    x = np.ones((3, inputs), np.float32)
    x[1, 0] = wrong
    scales = jnp.full((1, 1, 70), 0.01, jnp.float32)
    w = dataclasses.replace(problem(1, 1, inputs, 70, 1)[1], scales=scales)
    call = jax.jit(functools.partial(quantize.grouped_dot, activations=activations))
    found = np.asarray(call(x, w, np.zeros(1, np.int32)))
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


@native
@pytest.mark.parametrize("activations", ["int8", "int15"])
def test_products_of_blocks_do_not_depend_on_those_beside_them(activations):
    chosen = np.array([1, 1, 1, 0, 0, -1, 2, 2], np.int32)
    scales = jnp.asarray(np.random.default_rng(1).uniform(0.01, 0.02, (3, 1, 130)), jnp.float32)
    gate, up = (
        dataclasses.replace(problem(1, 1, 256, 130, 3, seed)[1], scales=scales) for seed in range(2)
    )
    x = np.random.default_rng(0).standard_normal((len(chosen) * 48, 256)).astype(np.float32)
    x[2 * 48 + 7 : 3 * 48], x[4 * 48 :: 48] = 0, 0

    @jax.jit
    def call(x, chosen):
        return quantize.gated_dot(x, gate, up, chosen, activations=activations)

    together, blocks = call(x, chosen), np.split(x, len(chosen))
    apart = [call(block, one[None]) for block, one in zip(blocks, chosen, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@native
def test_activations_that_do_not_fit_are_an_error():
    x, _, chosen = problem(1, 1, 256, 8, 1)
    _, weight, _ = problem(1, 1, 128, 8, 1)
    with pytest.raises(Exception, match="INVALID_ARGUMENT: 256 inputs do not fit 32 packed bytes"):
        sums(x, weight, chosen)


@native
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("planes", [0, 1, 2])
def test_products_are_those_of_plain_jax(planes, activations):
    """To the last bit: the integers are the same, and what follows them is."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((12, 320)), jnp.float32)
    w = grouped(320, 77, 3, planes, 2) if planes else problem(1, 1, 320, 77, 3)[1]
    w = dataclasses.replace(w, scales=random.random((3, 1, 1), np.float32))
    w = jax.tree.map(jnp.asarray, w)
    experts = jnp.array([2, 0, -1, 0])

    def product():
        call = jax.jit(lambda x: quantize.grouped_dot(x, w, experts, activations=activations))
        text = str(jax.make_jaxpr(lambda x: call(x))(x))
        return np.asarray(call(x)), "ffi_call" in text

    found, is_native = product()
    with kernels.disabled():
        plain, is_plain_native = product()
    assert is_native and not is_plain_native
    np.testing.assert_array_equal(found, plain)
    assert (found[6:9] == 0).all() and (found[:6] != 0).all()


# --- Which kernel ---------------------------------------------------------------------------------


def gpu_problem(*multipliers):
    """x, a weight with multipliers of so many groups and planes, or none, and experts."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((4, 2048)), jnp.float32)
    trits = random.integers(-1, 2, (3, *multipliers[1:], 2048, 128)).astype(np.int8)
    if multipliers:
        multipliers = [random.integers(0, 64, (3, 128, *multipliers), np.int8)]
    w = quantize.pack(trits, random.random((3, 1, 1), np.float32), *multipliers)
    return x, jax.tree.map(jnp.asarray, w), jnp.array([2, -1])


@pytest.mark.parametrize("multipliers", [(), (8, 1), (32, 2)])
@pytest.mark.parametrize("activations", ["int8", "int15"])
def test_gpu_kernels_give_the_products_of_plain_jax(activations, multipliers, monkeypatch):
    """Interpreted: to the last bit, through the same `grouped_dot`."""
    x, w, experts = gpu_problem(*multipliers)
    call = functools.partial(quantize.grouped_dot, activations=activations)
    with kernels.disabled():
        plain = jax.jit(lambda x: call(x, w, experts))(x)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    for name in ("ternary_dots", "quantize_rows"):  # these divide less exactly
        monkeypatch.setitem(kernels.KERNELS, name, {})
    monkeypatch.setattr(gpu, "ternary_sums", functools.partial(gpu.ternary_sums, interpret=True))
    text = str(jax.make_jaxpr(lambda x: call(x, w, experts))(x))
    assert "pallas_call" in text
    np.testing.assert_array_equal(jax.jit(lambda x: call(x, w, experts))(x), plain)


def test_the_kernel_is_that_of_the_device(monkeypatch):
    """Asked for abstract rows."""
    rows, w = jax.ShapeDtypeStruct((2, 2, 2048), jnp.int8), gpu_problem()[1]
    kernel, change = quantize.packed_products.kernel, functools.partial(dataclasses.replace, w)
    assert (kernel(rows, w) is None) != kernels.on_cpu()
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    assert kernel(rows, w)
    assert not kernel(rows.update(dtype=jnp.float32), w)
    assert not kernel(rows, change(padding=3)) and not kernel(rows, change(block=48))
    for groups, taken in ((1, True), (8, True), (4, False)):
        multipliers = jax.ShapeDtypeStruct((3, 128, groups, 1), jnp.int8)
        assert bool(kernel(rows, change(multipliers=multipliers))) == taken
    with kernels.disabled():
        assert kernel(rows, w) is None
    assert kernel(rows, w)
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    assert kernel(rows, w) and not kernel(rows, change(padding=3))
    monkeypatch.setattr(kernels, "platform", lambda: "another")
    assert kernel(rows, w) is None


@kernels.accelerated("twice")
def twice(x, *, factor):
    return 2 * factor * x


def test_a_kernel_where_one_takes_the_arguments_with_the_derivative_of_the_plain_function(
    monkeypatch,
):
    kernel = lambda x, factor: jnp.round(2 * factor * x)  # noqa: E731
    takes = (lambda x, **_: x.ndim == 1), (lambda x, factor=1: factor > 0)
    monkeypatch.setitem(kernels.KERNELS, "twice", {"gpu": (kernel, *takes)})
    x = jnp.array([0.4, 1.3])
    np.testing.assert_array_equal(twice(x, factor=1), 2 * x)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    np.testing.assert_array_equal(twice(x, factor=1), [1, 3])
    gradient = jax.grad(lambda x: jnp.sum(twice(x, factor=3)))
    np.testing.assert_array_equal(gradient(x), [6, 6])
    np.testing.assert_array_equal(twice(x[None], factor=1), [2 * x])
    np.testing.assert_array_equal(twice(x, factor=-1), -2 * x)
    assert twice.kernel(jax.ShapeDtypeStruct((2,), x.dtype)) is kernel
    with pytest.raises(ZeroDivisionError), kernels.disabled(), kernels.disabled():
        np.testing.assert_array_equal(twice(x, factor=1), 2 * x)
        1 / 0  # noqa: B018
    np.testing.assert_array_equal(twice(x, factor=1), [1, 3])


def test_a_kernel_may_have_a_gradient_of_its_own(monkeypatch):
    """Tangents are those of the plain function; that gradient is linear in what comes back."""

    def kernel(x, factor):
        return 2 * factor * x

    @kernels.gradient_of(kernel)
    def gradient(x, y, dy, factor):
        return (5 * dy,)

    monkeypatch.setitem(kernels.KERNELS, "twice", {"gpu": (kernel,)})
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    f = lambda x: twice(x, factor=1.0)  # noqa: E731
    assert jax.grad(f)(3.0) == jax.vmap(jax.grad(f))(jnp.ones(2))[1] == 5
    assert jax.jvp(f, (3.0,), (1.0,)) == (6, 2)
    assert jax.grad(lambda x: f(x) ** 2)(3.0) == 5 * 2 * 6
    assert jax.jvp(jax.grad(lambda x: f(x) ** 2), (3.0,), (1.0,))[1] == 5 * 2 * 2


# --- The output head ------------------------------------------------------------------------------


TABLES = ["float32", "bfloat16", "int8"]


def head(vocab, size, of_x, of_table):
    """Seven rows x, and a table."""
    random = np.random.default_rng(0)
    table = jnp.asarray(30 * random.standard_normal((vocab, size)), of_table)
    return jnp.asarray(random.standard_normal((7, size)), of_x), table


@native
@pytest.mark.parametrize("of_table", TABLES)
@pytest.mark.parametrize("of_x", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab, size", [(1, 1), (37, 100), (130, 64), (9, 1537)])
def test_table_dot(vocab, size, of_x, of_table):
    x, table = head(vocab, size, of_x, of_table)
    call = jax.jit(kernels.table_dot)
    for zeros in ([], [0], [2, 3, 6], range(7)):  # rows that are not multiplied
        some = x.at[np.array(zeros, int)].set(0)
        taken = np.asarray(some, np.float64)
        if of_table == "int8":
            integers, steps = quantize.quantize_rows(some, activations="int15")
            taken = np.asarray(integers, np.float64) * np.asarray(steps, np.float64)
        exact = taken @ np.asarray(table, np.float64).T
        found = call(some, table)
        # Sums of float32; of integers, two that are rounded.
        atol = 3e-7 * (np.sqrt(size) * 120 if of_table != "int8" else np.abs(exact).max())
        np.testing.assert_allclose(found, exact, atol=atol)


@native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of another processor's compiler")
@pytest.mark.parametrize("vectors", ["short", "emulated AVX-512"])
def test_processors_with_other_vectors_have_the_same_products(vectors, tmp_path, monkeypatch):
    flags = "-mno-avx512f -mno-avx2"
    if vectors != "short":
        flags = f"-Wno-psabi -include {shlex.quote(str(ROOT / 'tests/emulated_vectors.h'))}"
        if missing := {"avx2", "fma"} - building.processor():
            pytest.skip(f"this processor has no {', '.join(missing)}")
    source = tmp_path / "kernels"
    source.mkdir()
    for name in ("table.cc", "common.cc", "common.h", "dots.h", "lanes.h", "memory.h"):
        shutil.copy(building.SOURCE / name, source)
    monkeypatch.setenv("CXX", f"{shlex.join(building.compiler())} {flags}")
    library = ctypes.CDLL(str(building.build(source, tmp_path / "library")))
    handler, name = jax.ffi.pycapsule(library.TableDotHandler), f"table_dot, {vectors}"
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
    for of_x, of_table in itertools.product(["float32", "bfloat16"], TABLES):
        x, table = head(131, 333, of_x, of_table)
        out = jax.ShapeDtypeStruct((7, 131), jnp.float32)
        found = jax.jit(jax.ffi.ffi_call(name, out))(x, table)
        expected = jax.jit(kernels.table_dot)(x, table)
        atol = 0 if of_table == "int8" else 3e-7 * np.sqrt(333) * 120  # float32 sums
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@native
@pytest.mark.parametrize("of_table", TABLES)
@pytest.mark.parametrize("of_x", ["float32", "bfloat16"])
def test_logits_of_a_row_do_not_depend_on_other_rows_or_on_the_shard(of_x, of_table):
    x, table = head(256, 333, of_x, of_table)
    call = jax.jit(kernels.table_dot)
    whole = np.asarray(call(x, table))
    for rows in ([0], [3], [5, 6], [1, 2, 3], list(range(7))):
        np.testing.assert_array_equal(call(x[np.array(rows)], table), whole[rows])
    np.testing.assert_array_equal(call(x, table[32:64]), whole[:, 32:64])


@native
def test_other_dtypes_are_not_for_the_kernel():
    x, table = jnp.zeros((1, 4)), jnp.zeros((3, 4))
    halves = jax.make_jaxpr(quantize.table_dot)(x.astype(jnp.float16), table)
    assert "TableDot" not in str(halves)
    assert "TableDot" in str(jax.make_jaxpr(quantize.table_dot)(x, table))
    assert "TableDot" not in str(jax.make_jaxpr(quantize.table_dot)(x, table.astype(jnp.float16)))


@native
def test_rows_of_a_table_whose_sums_might_exceed_int32_are_refused():
    x, table = jnp.ones((1, 16385)), jnp.full((2, 16385), -128, jnp.int8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="rows of 16385 integers, more than 16384"):
        kernels.table_dot(x, table)
    found = kernels.table_dot(x[:, 1:], table[:, 1:])
    np.testing.assert_allclose(found, -128 * 16384, rtol=1e-6)
    assert "TableDot" not in str(
        jax.make_jaxpr(quantize.table_dot)(x, quantize.QuantizedWeight(table, x[:1, :1]))
    )


# --- Floats, by expert ----------------------------------------------------------------------------


def floats_by_expert(blocks, rows, inputs, outputs, count, seed=0):
    """Small integers, whose sums are exact in float32: x, w, dy and the expert of each block, of
    which some are skipped, some follow each other, and one expert has no block."""
    random = np.random.default_rng(seed)
    shapes = (blocks, rows, inputs), (count, inputs, outputs), (blocks, rows, outputs)
    x, w, dy = (random.integers(-4, 5, shape).astype(np.float32) for shape in shapes)
    experts = random.choice([-1, *range(1, count)], blocks).astype(np.int32)
    experts[: blocks // 2].sort()
    return x, w, dy, experts


@native
@pytest.mark.parametrize(
    "shape",  # blocks, rows of each, I, O, experts
    [
        (4, 16, 1, 1, 2),
        (9, 16, 7, 16, 3),
        (40, 8, 260, 37, 4),  # more than are added up in registers
        (70, 16, 140, 300, 3),  # more than a task has
        (2, 300, 33, 64, 5),
    ],
)
def test_products_of_floats_by_expert(shape):
    x, w, dy, experts = floats_by_expert(*shape)
    count, there = len(w), experts >= 0
    of_block = np.where(there[:, None, None], w[experts], 0)
    sums = np.zeros_like(w)
    np.add.at(sums, experts[there], x.swapaxes(1, 2)[there] @ dy[there])
    product, turned, found = (
        jax.jit(functools.partial(f, **options))
        for f, options in [
            (quantize.grouped_product, {}),
            (quantize.grouped_product, {"turned": True}),
            (quantize.grouped_sums, {"count": count}),
        ]
    )
    assert "GroupedProduct" in turned.lower(dy, w, experts).as_text()
    assert "GroupedSums" in found.lower(x, dy, experts).as_text()
    np.testing.assert_array_equal(product(x, w, experts), x @ of_block)
    np.testing.assert_array_equal(turned(dy, w, experts), dy @ of_block.swapaxes(1, 2))
    np.testing.assert_array_equal(found(x, dy, experts), sums)


@native
def test_products_of_a_row_of_floats_do_not_depend_on_other_rows():
    x, w, _, experts = floats_by_expert(24, 16, 300, 45, 2)
    x, experts = jnp.asarray(x * np.pi), np.ones_like(experts)
    product = jax.jit(functools.partial(kernels.grouped_product, turned=False))
    expected = product(x, w, experts)
    for rows in (1, 5, 7):
        part = x.reshape(-1, 300)[50 : 50 + rows][None]
        found = product(part, w, experts[:1])
        np.testing.assert_array_equal(found[0], expected.reshape(-1, 45)[50 : 50 + rows])


@native
@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_a_number_that_is_not_finite_stays_with_its_row_and_expert(wrong):
    x, w, dy, experts = floats_by_expert(6, 16, 20, 40, 3)
    experts[:] = [1, 1, 1, 2, 2, 2]
    dy[1, 3] = wrong
    found = kernels.grouped_product(dy, w, experts, turned=True)
    assert np.isfinite(np.delete(found.reshape(-1, 20), 19, axis=0)).all()
    assert not np.isfinite(found[1, 3]).any()
    sums = kernels.grouped_sums(x, dy, experts, count=3)
    assert np.isfinite(sums[2]).all() and not np.isfinite(sums[1]).any()
    assert (sums[0] == 0).all()


@native
def test_few_rows_of_floats_are_not_for_the_kernel():
    """It would put matrices in order for them."""
    x, w, dy, experts = floats_by_expert(4, 8, 20, 40, 3)
    assert quantize._grouped_product.kernel(x, w, experts) is None
    assert quantize._grouped_sums.kernel(x, dy, experts, count=3) is None
    assert quantize._grouped_product.kernel(x, w[:2], experts) is not None
    assert quantize._grouped_product.kernel(x[:1], w[:1], experts[:1]) is None


@native
def test_what_no_kernel_takes_is_plain_jax():
    half, scale = jnp.ones((2, 8), jnp.float16), jnp.ones(8)
    added = model._added_norm(half, half, scale, eps=1e-5)
    np.testing.assert_array_equal(added, half + model._norm_of_rows(half, scale, eps=1e-5))
    probs, _, index = model.chosen(jnp.zeros((2, 3, 8)), jnp.array([True, False, True]), selected=2)
    assert probs.shape == (2, 3, 8) and index[:, 1].tolist() == [[-1, -1]] * 2


@native
def test_the_derivative_is_that_of_plain_jax():
    random = np.random.default_rng(0)
    x, table = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((3, 5), (7, 5))
    )

    def gradients():
        loss = lambda x, table: jnp.sum(jnp.sin(quantize.table_dot(x, table)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, table)

    found = gradients()
    with kernels.disabled():
        expected = gradients()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)  # float32 sums of 7


# --- Attention, norm, cache -----------------------------------------------------------------------


def attention_problem(batch, queries, heads, kv_heads, slots, size, dtype="float32"):
    random = np.random.default_rng(0)
    q = 3 * random.standard_normal((batch, queries, heads, size))
    k, v = (random.standard_normal((batch, kv_heads, slots, size)) for _ in range(2))
    first = random.integers(0, max(1, slots - queries + 2), (batch, 1))  # one may see past the end
    positions = jnp.asarray(first + np.arange(queries), jnp.int32)
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), positions


SHAPES = [
    (1, 1, 12, 2, 600, 128),  # decoding, parts of the cache in parallel
    (3, 5, 6, 3, 70, 8),
    (2, 40, 6, 2, 300, 24),
    (1, 90, 4, 2, 530, 64),
    (1, 7, 6, 2, 13, 17),
]


@native
@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, dtype, error):
    """float32 sums; bfloat16 is that of the result, up to 3 here. The cap is felt."""
    q, k, v, positions = attention_problem(*shape, dtype)
    multiplier, cap = 2 * shape[-1] ** -0.5, 5.0
    found = jax.jit(kernels.attend, static_argnums=(4, 5))(q, k, v, positions, multiplier, cap)
    assert found.dtype == q.dtype
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    with kernels.disabled():
        expected = attention.attend(*wide, positions, multiplier=multiplier, cap=cap)
    assert np.abs(np.asarray(found, np.float32) - expected).max() < error


@native
@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_gradient_of_attention(shape, dtype, error):
    """Relative to its norm; bfloat16 rounds the output and each gradient, not what is between."""
    q, k, v, positions = attention_problem(*shape, dtype)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), dtype)

    def gradients(q, k, v, dy):
        def f(q, k, v):
            scale = 2 * shape[-1] ** -0.5
            return attention.attend(q, k, v, positions, multiplier=scale, cap=5.0)

        return jax.jit(lambda *args: jax.vjp(f, *args)[1](dy))(q, k, v)

    assert "AttendGradient" in str(jax.make_jaxpr(gradients)(q, k, v, dy))
    found = gradients(q, k, v, dy)
    with kernels.disabled():
        expected = gradients(*(x.astype(jnp.float32) for x in (q, k, v, dy)))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == q.dtype
        assert np.linalg.norm(one.astype(jnp.float32) - other) < error * np.linalg.norm(other)


@native
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 37, 53), (2, 16, 130), (19, 23), (2, 3, 9, 11), (0, 8, 8), (2, 0, 3)]
)
def test_transposed(shape):
    x = jnp.arange(np.prod(shape)).reshape(shape).astype(jnp.bfloat16)
    call = jax.jit(kernels.transposed)
    assert "Transpose" in str(jax.make_jaxpr(call)(x))
    np.testing.assert_array_equal(call(x), np.swapaxes(x, -1, -2))


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_a_query_that_sees_nothing_gives_zeros(shape, dtype):
    """And gradients of zeros; the others, in the same task, are as they were."""
    q, k, v, positions = attention_problem(*shape, dtype)
    hidden = np.arange(positions.size).reshape(positions.shape) % 3 == 0
    nowhere = np.array(positions)
    nowhere[hidden] = np.resize([-1, -(2**31)], hidden.sum())
    attend = functools.partial(attention.attend, multiplier=0.2, cap=9.0)
    call = jax.jit(lambda q, k, v, p: jax.vjp(lambda q: attend(q, k, v, p), q))
    found, pull = call(q, k, v, nowhere)
    assert (found[hidden] == 0).all() and (pull(jnp.ones_like(q))[0][hidden] == 0).all()
    np.testing.assert_array_equal(found[~hidden], call(q, k, v, positions)[0][~hidden])


@native
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_attention_of_a_query_depends_on_no_other(shape):
    """Nor on other rows and heads, nor on what lies behind what it sees."""
    q, k, v, positions = attention_problem(*shape)
    call = functools.partial(
        jax.jit(kernels.attend, static_argnums=(4, 5)), multiplier=0.2, cap=9.0
    )
    whole, group = np.asarray(call(q, k, v, positions)), shape[2] // shape[3]
    for b, t in ((0, 0), (-1, -1), (0, shape[1] // 2)):
        one = slice(b, b + 1 or None)
        seen = positions[one, t : t + 1 or None][:, :1]
        hidden = [x[one].at[:, :, int(seen[0, 0]) + 1 :].set(jnp.nan) for x in (k, v)]
        query = q[one, t : t + 1 or None]
        found = call(query[:, :, :group], *(x[:, :1] for x in hidden), seen)
        np.testing.assert_array_equal(found[0, 0], whole[b, t, :group])


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(3 * random.standard_normal((5, 1003)), dtype)
    scale = jnp.asarray(random.standard_normal(1003), jnp.float32)
    wide = np.asarray(x, np.float64)
    exact = scale * wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5)
    call = jax.jit(kernels.rms_norm, static_argnums=2)
    found = np.asarray(call(x, scale, 1e-5))
    assert found.dtype == x.dtype
    rounding = 2.0**-22 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=rounding)
    np.testing.assert_array_equal(call(x[3:4], scale, 1e-5), found[3:4])
    assert np.isnan(np.asarray(call(x.at[0, 0].set(jnp.nan), scale, 1e-5), np.float32)[0]).all()


@native
@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shape", [(1, 5), (3, 1003), (130, 64)])
def test_the_gradient_of_the_norm(shape, dtype, error):
    """Relative to its norm; that of a bfloat16 x is rounded, that of the scale not."""
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(2))
    scale = jnp.asarray(random.standard_normal(shape[1]), jnp.float32)

    def gradients(x, scale, dy):
        return jax.vjp(functools.partial(model.rms_norm, eps=1e-3), x, scale)[1](dy)

    assert "RmsNormGradient" in str(jax.make_jaxpr(gradients)(x, scale, dy))
    found = jax.jit(gradients)(x, scale, dy)
    with kernels.disabled():
        wanted = gradients(*(array.astype(jnp.float32) for array in (x, scale, dy)))
    for one, other, like in zip(found, wanted, (x, scale), strict=True):
        assert one.dtype == like.dtype
        assert np.linalg.norm(one.astype(jnp.float32) - other) < error * np.linalg.norm(other)


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_is_added_as_by_itself(dtype):
    random = np.random.default_rng(0)
    h, x = (jnp.asarray(random.standard_normal((5, 1003)), dtype) for _ in range(2))
    scale = jnp.asarray(random.standard_normal(1003), jnp.float32)
    norm = jax.jit(kernels.rms_norm, static_argnums=2)(x, scale, 1e-5)
    found = jax.jit(functools.partial(kernels.added_norm, eps=1e-5))(h, x, scale)
    np.testing.assert_array_equal(found, h + norm)


@native
@pytest.mark.parametrize(
    "shape, count", [((3, 8), 8), ((2, 3, 100), 8), ((1, 1024), 1), ((2, 9), 2)]
)
def test_the_largest(shape, count):
    random = np.random.default_rng(0)
    call = jax.jit(functools.partial(kernels.likeliest, count=count))
    some = random.standard_normal(shape)
    equal, infinite = some.round() + 0.0, np.where(some > 0, -np.inf, some)
    larger_and_larger = np.sort(some, axis=-1)
    for x in (some, equal, np.zeros(shape), infinite, larger_and_larger, -larger_and_larger):
        x = jnp.asarray(x, jnp.float32)
        for found, expected in zip(call(x), jax.lax.top_k(x, count), strict=False):
            np.testing.assert_array_equal(found, expected)


@native
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 1000, 131072])
@pytest.mark.parametrize("spread, at", [(1, 0), (30, -500), (1000, 1e4)])
def test_log_of_the_sum_of_exp(size, spread, at):
    random = np.random.default_rng(0)
    x = (spread * random.standard_normal((3, size)) + at).astype(np.float32)
    x[0, 1:] = -np.inf
    largest = x.max(axis=-1, keepdims=True)
    exact = np.logaddexp.reduce((x - largest).astype(np.float64), axis=-1, keepdims=True)
    *_, total = jax.jit(functools.partial(kernels.likeliest, count=1))(x)
    assert total.shape == (3, 1) and total[0, 0] == 0
    # One unit in the last place of the log, and of exp in a sum.
    np.testing.assert_allclose(total, exact, rtol=2.0**-23, atol=2.0**-22)
    *_, alone = kernels.likeliest(x[2], count=1)
    np.testing.assert_array_equal(alone, total[2])


@native
@pytest.mark.parametrize("size", [1, 16, 100])
def test_the_log_of_a_sum_with_what_is_not_finite(size):
    x = np.zeros((4, size), np.float32)
    x[0, -1], x[1, 0], x[2, size // 2], x[3] = np.nan, np.nan, np.inf, -np.inf
    *_, total = kernels.likeliest(jnp.asarray(x), count=1)
    assert np.isnan(total).all()


@native
def test_the_largest_of_no_rows():
    shapes = [x.shape for x in kernels.likeliest(jnp.zeros((2, 0, 16)), count=8)]
    assert shapes == [(2, 0, 8), (2, 0, 8), (2, 0, 1)]


@native
def test_the_largest_wherever_it_is():
    _, index, _ = kernels.likeliest(jnp.eye(200), count=1)
    np.testing.assert_array_equal(index[:, 0], np.arange(200))


@native
@pytest.mark.parametrize("experts", [2, 8, 13, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router(dtype, experts):
    """Logits, probabilities and choices of plain JAX; of equal probabilities the first."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((6, 1501)), dtype).at[1].set(0)
    w = jnp.asarray(random.standard_normal((1501, experts)) / 30, jnp.float32)
    valid = jnp.array([True, True, False, True, True, True])
    call = jax.jit(functools.partial(kernels.route, selected=2))
    found = call(x, w, valid)
    # Plain JAX, but for the sums of 1501, which XLA makes in a row on some processors.
    logits = jnp.asarray(np.asarray(x, np.float64) @ np.asarray(w, np.float64), jnp.float32)
    with kernels.disabled():
        expected = logits, *model.chosen(logits, valid, selected=2)
        types = [y.dtype for y in model.routed(x, w, valid, selected=2)]
    for y, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, plain, rtol=0, atol=2e-6)  # float32 sums of 1501
    assert [y.dtype for y in found] == types
    assert found[3][1:3].tolist() == [[0, 1], [-1, -1]]
    for y, again in zip(found[1:], kernels.choose(found[0], valid, selected=2), strict=True):
        np.testing.assert_array_equal(y, again)
    for one, all_rows in zip(call(x[3:4], w, valid[3:4]), found, strict=True):
        np.testing.assert_array_equal(one[0], all_rows[3])  # of a token, whatever others there are


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_that_rotates_and_writes_is_its_parts(tokens, dtype):
    random = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q, k, v = (array(2, tokens, heads, 24) for heads in (6, 3, 3))
    caches = [array(2, 3, 70, 24) for _ in range(2)]
    # In the middle of the cache; and with some past its end, whose rows are dropped.
    positions = jnp.array([[33], [67]]) + jnp.arange(tokens)
    frequencies = model._frequencies(24, 10000.0)
    options = {"multiplier": 0.2, "cap": 30.0}
    found = jax.jit(functools.partial(kernels.attend_and_write, **options))(
        q, k, v, *caches, positions, frequencies
    )
    q, k = (jax.jit(kernels.rotate)(x, positions, frequencies) for x in (q, k))
    keys, values = (
        jax.jit(kernels.write_slots)(cache, x, positions)
        for cache, x in zip(caches, (k, v), strict=True)
    )
    y = jax.jit(functools.partial(kernels.attend, **options))(q, keys, values, positions)
    for one, other in zip(found, (y, keys, values), strict=True):
        np.testing.assert_array_equal(one, other)


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writing_slots_of_a_cache(dtype):
    random = np.random.default_rng(0)
    cache = jnp.asarray(random.standard_normal((2, 3, 7, 4)), dtype)
    new = jnp.asarray(random.standard_normal((2, 5, 3, 4)), dtype)
    slots = jnp.array([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]], jnp.int32)  # the last two are dropped
    found = jax.jit(kernels.write_slots)(cache, new, slots)
    with kernels.disabled():
        plain = model.write_memory(model.KVMemory(cache, cache), new, new, slots).k
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_array_equal(found[1, :, 4], new[1, 0])


# --- Five trits to a byte -------------------------------------------------------------------------


@pytest.fixture(params=["C++", "NumPy"])
def from_base3(request, monkeypatch):
    """`shards.from_base3`, in both of its ways."""
    if request.param == "NumPy":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("no native kernels")
    return shards.from_base3


@pytest.mark.parametrize("value", [243, 255])
@pytest.mark.parametrize("at", [0, 3, 4, 511, 999])
def test_a_byte_that_is_not_five_trits_is_an_error(from_base3, at, value):
    digits = np.full((2, 500), 242, np.uint8)
    assert (from_base3(digits) == 0b10_10_10_10).all()
    digits.reshape(-1)[at] = value
    with pytest.raises(ValueError, match=f"a byte is {value}, .* five trits make is 242"):
        from_base3(digits)


@pytest.mark.parametrize(
    "shape, dtype, found",
    [
        ((8, 256, 51), "uint8", r"uint8 \[8, 256, 51\]"),  # a result of 50 would be written behind
        ((3, 1), "uint8", r"uint8 \[3, 1\]"),
        ((), "uint8", r"uint8 \[\]"),
        ((2, 4), "int8", r"int8 \[2, 4\]"),
        ((2, 8), "int64", r"int64 \[2, 8\]"),
    ],
)
def test_bytes_that_come_in_no_fours_are_an_error(from_base3, shape, dtype, found):
    with pytest.raises(ValueError, match=rf"come in fours, uint8 \[..., 4 G\]; found {found}"):
        from_base3(np.ones(shape, dtype))


def test_bytes_with_gaps_between_them(from_base3):
    digits = np.random.default_rng(0).integers(0, 243, (6, 32), dtype=np.uint8)
    whole = from_base3(digits)
    np.testing.assert_array_equal(from_base3(np.asfortranarray(digits)), whole)
    np.testing.assert_array_equal(from_base3(digits[::2, 4:12]), whole[::2, 5:15])
    assert from_base3(digits[:0]).shape == (0, 40) and from_base3(digits[:, :0]).shape == (6, 0)


@native
@pytest.mark.parametrize("rows, width, packed", [(2, 7, 8), (2, 8, 9), (2, 8, 11), (-1, 4, 5)])
def test_the_library_itself_refuses_widths_that_do_not_fit(rows, width, packed):
    assert kernels.library().FromBase3(None, rows, width, None, packed) == -1
    assert kernels.library().CopyTrits(None, width, None, packed) == -1


@native
@pytest.mark.parametrize("rows, packed, width", [(2, 11, 8), (2, 10, 4), (2, -1, 0), (-1, 5, 4)])
def test_five_trits_to_a_byte_need_widths_that_fit(rows, packed, width):
    assert kernels.library().ToBase3(None, rows, packed, None, width) == -1


@native
@pytest.mark.parametrize("width", [5, 6, 9, 320, 1536])
def test_five_trits_to_a_byte_in_cpp_is_numpy(width, monkeypatch):
    packed = np.random.default_rng(0).choice(
        [a + 4 * b + 16 * c + 64 * d for a in range(3) for b in range(3) for c in range(3)
         for d in range(3)], (3, 7, width + 2),
    ).astype(np.uint8)  # fmt: skip
    views = [packed[..., 1:-1], packed[:, ::2, :-2], packed[0, 0, 2:], packed[:0]]
    found = [shards.to_base3(view) for view in views]
    monkeypatch.setattr(kernels, "library", lambda: None)
    for view, digits in zip(views, found, strict=True):
        np.testing.assert_array_equal(shards.to_base3(view), digits)


@native
@pytest.mark.parametrize("at", [None, 0, 63, 200, 299])
@pytest.mark.parametrize("code", [0b11, 0b11_00, 0b11_00_00, 0b11_00_00_00])
def test_copies_of_trits(at, code):
    packed = np.random.default_rng(0).choice([0, 1, 2, 0b10_01_10_00, 0b10_10_10_10], (3, 100))
    packed = packed.astype(np.uint8)
    if at is not None:
        packed.reshape(-1)[at] = code
    out = np.zeros_like(packed)
    assert kernels.copy_trits(packed, out) == (at is not None)
    np.testing.assert_array_equal(out, packed)


# --- Large pages ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="advice to Linux")
def test_large_pages_change_no_value():
    array = jnp.arange(3 << 20, dtype=jnp.int32)
    before = np.array(array)
    kernels.use_large_pages({"array": array, "small": jnp.ones(3), "not an array": 3})
    np.testing.assert_array_equal(array, before)


# --- Rounding rows --------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activations, levels", [("int8", 127), ("int15", 127 * 128)])
def test_rows_are_rounded_as_in_plain_jax(dtype, activations, levels):
    random = np.random.default_rng(0)
    x = random.standard_normal((9, 70)) * np.exp(8 * random.standard_normal((9, 1)))
    x[1], x[2, 3], x[3, 5], x[4] = 0, np.nan, np.inf, np.arange(70) - 35.5  # halves, too
    x = jnp.asarray(x, dtype)
    found, step = jax.jit(lambda x: quantize.quantize_rows(x, None, activations))(x)
    largest = np.abs(np.asarray(x, np.float32)).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(kernels.row_maxima(x), largest)
    with kernels.disabled():
        expected, plain_step = quantize.quantize_rows(x, None, activations)
    np.testing.assert_allclose(step, plain_step, rtol=1e-7)  # divided, or times the reciprocal
    rows = np.array([0, 1, 4, 5, 6, 7, 8])
    exact = np.rint(np.asarray(x, np.float32)[rows] / np.asarray(step)[rows])
    np.testing.assert_array_equal(found[rows], exact)
    assert found.dtype == expected.dtype and np.abs(found[rows]).max() == levels
    assert np.isnan(step[2, 0]) and np.isinf(step[3, 0])  # so that the result shows it
