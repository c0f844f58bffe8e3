"""Stored weights in other formats: slices are those of the whole, and C++ is NumPy to the byte."""

import concurrent.futures
import functools

import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

import conversion
import formats
import kernels
import quantize
from formats import FORMATS
from quantize import PackedWeight, QuantizedWeight

FITTED = [name for name, format in FORMATS.items() if format.fit]

native = pytest.mark.skipif(kernels.library() is None, reason="no native kernels: no compiler")


@pytest.fixture(scope="module")
def pool():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def plain(monkeypatch):
    """A function that computes another without C++."""

    def without(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "library", lambda: None)
            return f(*args)

    return without


def int8_weight(shape, groups, seed=0):
    """Gaussian codes, -128 among them, of spread scales, some of them zeros."""
    random = np.random.default_rng(seed)
    codes = np.clip(np.rint(32 * random.standard_normal(shape)), -128, 127)
    codes.reshape(-1)[:: max(1, codes.size // 5)] = -128
    scales = 0.01 * np.exp(random.standard_normal((*shape[:-2], groups, shape[-1])))
    scales[random.random(scales.shape) < 0.03] = 0
    return QuantizedWeight(codes.astype(np.int8), scales.astype(ml_dtypes.bfloat16))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()  # -0 is not 0


def converted(tensor, name, pool, index=None):
    """The slice of a tensor in another format; [E, O, B] slices, or the whole."""
    make = conversion.converter(tensor, name, "tensor", pool)
    return make(tuple(slice(*i) for i in index) if index else whole(tensor, name))


def whole(tensor, name):
    experts, inputs, outputs = (1, *tensor.shape)[-3:]
    made = formats.shapes(name, tensor.shape)
    width = made.packed.shape[-1] if isinstance(made, PackedWeight) else inputs
    return tuple(slice(0, size) for size in (experts, outputs, width))


# --- Absmean --------------------------------------------------------------------------------------


@hypothesis.given(
    st.floats(0, 4, width=32),
    st.lists(st.floats(0, 2, width=16), min_size=1, max_size=5),
)
@hypothesis.example(1.0 - formats.EPSILON, [0.25, 0.5, 1.0, 0.0078125, 0.00390625])
@hypothesis.example(0.0, [1.0, 0.0])
def test_limits_are_where_the_formula_turns(gamma, scales):
    """Also on the edge: code 2 times 0.25 over a gamma of 1 is exactly half, and rounds to 0."""
    gamma = np.full((1, 1, 1), gamma, np.float32)
    scales = np.array(scales, ml_dtypes.bfloat16).astype(np.float32)
    codes = np.arange(-128, 128).astype(np.int8)[:, None].repeat(len(scales), 1)
    expected = formats.round_to_trits(codes.astype(np.float32) * scales, gamma[0])
    found = np.empty(codes.shape, np.uint8)
    lowest, highest = conversion.zero_range(scales[None, None], gamma)
    conversion.int8_to_codes(codes, lowest[0, 0], highest[0, 0], out=found)
    np.testing.assert_array_equal(found, expected + 1)


@pytest.mark.parametrize("columns", [3, 64, 2049])
def test_sums_of_all_codes_are_exact(columns, plain):
    weight = np.full((1000, columns + 2), -128, np.int8)
    weight[:, 2] = np.arange(1000) % 256 - 128
    weight = weight[:, 1:-1]  # a view
    expected = np.abs(weight.astype(np.int64)).sum(0)
    np.testing.assert_array_equal(conversion.absolute_sums(weight), expected)
    np.testing.assert_array_equal(plain(conversion.absolute_sums, weight), expected)


@native
@hypothesis.settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    st.sampled_from([1, 3, 4, 30, 31, 48, 64, 96, 192, 256, 512, 768, 2048]),
    st.sampled_from([1, 2, 63, 64, 65, 130, 2047, 2115]),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(0, 1 << 20),
)
@hypothesis.example(2048, 2115, 8, 0)  # blocks of 64 bytes, columns beyond 2048
@hypothesis.example(64, 130, 1, 0)  # of 2
@hypothesis.example(256, 65, 8, 0)  # of 8, and a group for each half of one
def test_absmean_in_cpp_gives_the_bytes_of_numpy(pool, plain, inputs, outputs, parts, seed):
    hypothesis.assume(inputs % parts == 0)
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (2, inputs, outputs + 3)).astype(np.int8)[..., 2:-1]
    scales = 5e-4 * np.exp(random.standard_normal((2, parts, outputs)))
    scales[random.random(scales.shape) < 0.05] = 0
    tensor = QuantizedWeight(codes, scales.astype(ml_dtypes.bfloat16))
    found = converted(tensor, "ternary", pool)
    assert_same(found, plain(converted, tensor, "ternary", pool))
    width, size = found.packed.shape[-1], found.block
    index = ((1, 2), (outputs // 3, outputs), (size * (width // size // 2), width))
    found = converted(tensor, "ternary", pool, index)
    assert_same(found, plain(converted, tensor, "ternary", pool, index))


@native
def test_cpp_is_what_makes_absmean(pool, monkeypatch):
    for name in ("int8_to_codes", "_pack_codes"):
        monkeypatch.delattr(conversion, name)
    converted(int8_weight((2, 256, 70), 8), "ternary", pool)


PACK_INT8 = {  # sizes that fit
    "rows": 6, "outputs": 5, "groups": 2, "size": 4, "first": 2,
    "block": 1, "columns": 2, "width": 2,
}  # fmt: skip


@native
@pytest.mark.parametrize(
    "other",
    [
        {"rows": -1},
        {"rows": 7},  # more than the groups have
        {"rows": 9, "groups": 3},  # more than the packed bytes have
        {"outputs": -1},
        {"groups": 1},
        {"groups": -1},
        {"size": 0},
        {"size": -4},
        {"first": -1},
        {"first": 3},
        {"block": 0},
        {"block": -1},
        {"block": 4},
        {"block": 128, "columns": 128, "width": 128},
        {"columns": 1},
        {"columns": 3},
    ],
)
def test_the_library_itself_refuses_sizes_that_do_not_fit(other):
    codes, packed = np.zeros((6, 5), np.int8), np.zeros((5, 2), np.uint8)
    bounds = [np.zeros((2, 5), np.int8).ctypes.data] * 2
    n = PACK_INT8 | other

    def pack(n):
        return kernels.library().PackInt8(
            codes.ctypes.data, 5, n["rows"], n["outputs"], *bounds, n["groups"], n["size"],
            n["first"], n["block"], packed.ctypes.data, n["columns"], n["width"],
        )  # fmt: skip

    assert pack(PACK_INT8) == 0
    assert pack(n) == -1
    assert kernels.library().AbsoluteSums(None, 5, -1, 5, None) == -1
    assert kernels.library().AbsoluteSums(None, 5, 1, -5, None) == -1


def test_gamma_does_not_depend_on_the_order_of_columns():
    random = np.random.default_rng(0)
    sums = random.integers(0, 1 << 19, (1, 4, 999))
    scales = np.exp(5 * random.standard_normal(sums.shape)).astype(np.float32)
    order = random.permutation(999)
    a = conversion.absmean_of_sums(sums, scales, 512)
    b = conversion.absmean_of_sums(sums[..., order], scales[..., order], 512)
    assert a.shape == (1, 1, 1) and a.dtype == np.float32
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(12, 7), (3, 31, 5)])
def test_absmean_of_floats(shape, pool, monkeypatch):
    monkeypatch.setattr(conversion, "CHUNK", 100)  # several pieces even here
    monkeypatch.setattr(conversion, "COLUMNS", 3)
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = converted(w, "ternary", pool)
    gamma = abs(w.astype(np.float64)).mean(axis=(-2, -1), keepdims=True)
    np.testing.assert_allclose(found.scales.reshape(gamma.shape), gamma, rtol=1e-7)  # rounded once
    trits = np.rint(w / (gamma + formats.EPSILON)).clip(-1, 1)
    np.testing.assert_array_equal(quantize.unpack(found).reshape(shape), trits)


# --- Slices ---------------------------------------------------------------------------------------


SOURCES = {
    "float32": lambda shape: np.random.default_rng(1).standard_normal(shape).astype(np.float32),
    "int8": lambda shape: int8_weight(shape, 1),
    "int8 in 4 groups": lambda shape: int8_weight(shape, 4),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("float32", "int8")])
def test_slices_are_those_of_the_whole(source, name, pool, monkeypatch):
    """Of experts, outputs across tiles and alone, and packed bytes by whole blocks."""
    monkeypatch.setattr(conversion, "CHUNK", 1 << 12)
    monkeypatch.setattr(conversion, "COLUMNS", 50)
    tensor = SOURCES[source]((3, 256, 130))
    full = converted(tensor, name, pool)
    size = full.block_bytes
    width = full.packed.shape[-1]
    for experts, outputs, part in (
        ((1, 3), (0, 130), (0, width)),
        ((0, 1), (129, 130), (0, width)),
        ((2, 3), (60, 70), (size, 3 * size)),
        ((0, 3), (1, 130), (width - size, width)),
    ):
        found = converted(tensor, name, pool, (experts, outputs, part))
        e, o, b = (slice(*i) for i in (experts, outputs, part))
        expected = conversion.cut_inputs(full, b)
        some = o if full.scales.shape[-1] > 1 else slice(None)
        multipliers = None if full.multipliers is None else expected.multipliers[e, o]
        expected = PackedWeight(
            expected.packed[e, o], full.scales[e, :, some], full.block, full.padding, multipliers
        )
        assert_same(found, expected)


def test_slices_of_int8_are_those_of_the_whole(pool):
    w = SOURCES["float32"]((3, 31, 130))
    full = converted(w, "int8", pool)
    assert_same(full, jax.tree.map(np.asarray, FORMATS["int8"].quantize(w)))
    found = converted(w, "int8", pool, ((1, 2), (60, 130), (0, 31)))
    assert_same(found, jax.tree.map(lambda x: x[1:2, :, 60:130], full))


# --- Least squares --------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("name", FITTED)
def test_counting_magnitudes_fits_as_sorting_floats_does(name, groups, plain):
    """The same sums in another order, and float32 rounds what the integers are not: where two
    choices are as good, they may differ, but not in their error."""
    tile = int8_weight((768, 9), groups)
    w = quantize.dequantize(tile)
    found = plain(functools.partial(conversion.fit_tile, tile), *FORMATS[name].fit)
    ours, theirs = (
        ((quantize.dequantize(x).astype(np.float64) - w) ** 2).sum(axis=0)
        for x in (found, FORMATS[name].quantize(w))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


KINDS = {
    "any": lambda random, shape: random.integers(-128, 128, shape),
    "zeros": lambda random, shape: np.zeros(shape),
    "alike": lambda random, shape: np.full(shape, random.integers(-128, 128)),
    "one": lambda random, shape: (
        -128 * (np.arange(shape[0]) == random.integers(shape[0]))[:, None] * np.ones(shape[1])
    ),
    "gaussian": lambda random, shape: (
        random.standard_normal(shape) * random.choice([1, 3, 32])
    ).clip(-127, 127),
    "few": lambda random, shape: random.integers(-3, 4, shape) * random.integers(1, 40),  # ties
}


@native
@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(
    deadline=None,
    max_examples=8,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    st.sampled_from([4, 12, 16, 48, 64, 128, 192, 256, 512]),
    st.sampled_from([1, 2, 63, 64, 65]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([0.0, 0.3, 5.0]),
    st.booleans(),
    st.integers(0, 1 << 20),
)
def test_cpp_gives_the_bytes_of_numpy(
    plain, kind, name, inputs, outputs, parts, spread, powers, seed
):
    """All of them, whatever the processor; also where scales are zero, or powers of two."""
    hypothesis.assume(inputs % parts == 0)
    random = np.random.default_rng(seed)
    codes = KINDS[kind](random, (inputs, outputs + 3)).astype(np.int8)[:, 2:-1]  # a view
    scales = 5e-4 * np.exp(spread * random.standard_normal((parts, outputs)))
    scales = 2 ** np.round(np.log2(scales)) if powers else scales
    scales[random.random(scales.shape) < 0.05] = 0
    tile = QuantizedWeight(codes, scales.astype(ml_dtypes.bfloat16))
    fit = FORMATS[name].fit
    assert_same(conversion.fit_tile(tile, *fit), plain(conversion.fit_tile, tile, *fit))


@native
@pytest.mark.parametrize("inputs, called", [(65532, 1), (65536, 0)])
def test_cpp_counts_in_16_bits(inputs, called, plain, monkeypatch):
    """Up to as many codes alike."""
    tile = QuantizedWeight(np.full((inputs, 2), -128, np.int8), np.ones((1, 2), np.float32))
    calls, fit = [], kernels.fit_int8
    monkeypatch.setattr(kernels, "fit_int8", lambda *args: calls.append(0) or fit(*args))
    assert_same(conversion.fit_tile(tile, 2, None), plain(conversion.fit_tile, tile, 2, None))
    assert len(calls) == called


@native
@pytest.mark.parametrize("name", FITTED)
def test_cpp_is_what_converts(name, pool, monkeypatch):
    """A release's matrices, with one group of scales or eight, do not go through floats."""
    whole(np.empty((2, 2048, 70)), name)  # which asks for shapes
    monkeypatch.delattr(formats, "rounded")
    for groups in (1, 8):
        converted(int8_weight((2, 2048, 70), groups), name, pool)


def test_counts_of_magnitudes():
    codes = np.array([[-128, 0], [127, -1], [1, 1], [-1, 0]], np.int8)
    counts = conversion.magnitude_counts(codes, 2)
    assert counts.shape == (2, 129, 2) and counts.sum() == 8
    assert counts[0, 0].tolist() == [1, 0] and counts[0, 1].tolist() == [1, 0]
    assert counts[0, 127:].tolist() == [[0, 1], [0, 1]]
    assert counts[1, 127:].tolist() == [[2, 1], [0, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["ternary", "ternary-fit", "ternary2-64", "int8"])
def test_floats_that_are_no_numbers_become_no_trits(name, value):
    w = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    w[3, 2] = value
    with (
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        pytest.raises(conversion.CheckpointError, match="here: NaN or infinite numbers"),
    ):
        make = conversion.converter(w, name, "here", pool)
        make((slice(0, 1), slice(0, 5), slice(0, 16)))
