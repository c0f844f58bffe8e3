"""Weight formats: packing, quantizing by hand, and products that never see the whole matrix."""

import dataclasses
import functools
import itertools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import formats
import kernels
import quantize
import shards

# Largest difference from float64, relative to the largest |result|: sums of some 100 float32
# products lose a few ulps (1.2e-7); a bfloat16 result is rounded to 8 bits at the end.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}

FORMATS = ("float", "int8", "int8 in 7 groups", "ternary")


def random_trits(*shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def random_floats(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weight_in(form, w):
    if form == "ternary":
        return formats.ternarize(w)
    if form == "float":
        return w
    return formats.quantize_int8(w, groups=7 if "groups" in form else 1)


def exact(x, w):
    """x @ w in float64, of the matrices that a weight stands for."""
    return np.asarray(x, np.float64) @ np.asarray(quantize.dequantize(w), np.float64)


def assert_near(y, expected, dtype="float32"):
    error = np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2g} > {TOLERANCE[dtype]:.2g}"


# --- Packing --------------------------------------------------------------------------------------


def test_packing_is_that_of_the_docstring():
    trits = np.array([[1, 0, -1, 1, 0, 0, 1, -1]], np.int8).T  # [I, O] = [8, 1]
    packed = quantize.pack(trits, None, block=2)
    assert packed.packed.tolist() == [[146, 25]]
    assert packed.shape == (8, 1)


@settings(deadline=None, max_examples=150)
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 5),
    lead=st.sampled_from([(), (1,), (3,), (2, 3)]),
    seed=st.integers(0, 99),
)
def test_packing_round_trip(inputs, outputs, lead, seed):
    trits = random_trits(*lead, inputs, outputs, seed=seed)
    scales = np.ones((*lead, 1, 1), np.float32)
    packed = quantize.pack(trits, scales)
    assert packed.shape == trits.shape
    assert packed.packed.shape == (*lead, outputs, -(-inputs // 4))
    assert packed.packed.dtype == np.uint8
    assert np.array_equal(quantize.unpack(packed), trits)
    padded = quantize.unpack(dataclasses.replace(packed, padding=0))
    assert not padded[..., inputs:, :].any()


@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 31, 48, 70])
def test_numpy_and_jax_pack_the_same_bytes(inputs):
    trits = random_trits(2, inputs, 3)
    ours = quantize.pack(trits, np.ones((2, 1, 1), np.float32))
    assert isinstance(ours.packed, np.ndarray)
    jaxs = quantize.pack(jnp.asarray(trits), jnp.ones((2, 1, 1)))
    assert isinstance(jaxs.packed, jax.Array)
    assert np.array_equal(ours.packed, jaxs.packed)
    assert (ours.block, ours.padding) == (jaxs.block, jaxs.padding)
    assert np.array_equal(quantize.unpack(jaxs), trits)


@pytest.mark.parametrize("shape", [(31, 7), (3, 64, 5)])
def test_packing_inside_transformations(shape):
    trits = random_trits(*shape)
    scales = np.ones((*shape[:-2], 1, 1), np.float32)

    packed = jax.jit(quantize.pack)(trits, scales)
    assert packed.shape == shape
    assert np.array_equal(jax.jit(quantize.unpack)(packed), trits)

    abstract = jax.eval_shape(quantize.pack, trits, scales)
    assert abstract.shape == shape
    assert jax.eval_shape(quantize.unpack, abstract).shape == shape

    if len(shape) == 3:
        mapped = jax.vmap(quantize.pack)(trits, scales)
        assert np.array_equal(mapped.packed, packed.packed)
        assert np.array_equal(jax.vmap(quantize.unpack)(mapped), trits)


@pytest.mark.parametrize("multipliers", [None, (1, 1), (8, 2)])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_outputs_side_by_side(lead, multipliers):
    """Four bytes of each of 64 outputs, in turn; and back."""
    random = np.random.default_rng(0)
    scales = np.ones((*lead, 1, 1), np.float32)
    if multipliers is None:
        w = quantize.pack(random.integers(-1, 2, (*lead, 256, 128)).astype(np.int8), scales)
    else:
        groups, planes = multipliers
        trits = random.integers(-1, 2, (*lead, planes, 256, 128)).astype(np.int8)
        shape = (*lead, 128, groups, planes)
        w = quantize.pack(trits, scales, random.integers(0, 64, shape, np.int8))
    for made in (quantize.interleave(w), jax.jit(quantize.interleave)(w)):
        assert made.interleaved and (made.shape, made.planes) == (w.shape, w.planes)
        o, byte = 70, 13
        found = made.packed[..., o // 64, byte // 4, o % 64, byte % 4]
        np.testing.assert_array_equal(found, w.packed[..., o, byte])
        assert quantize.interleave(made) is made
        back = quantize.in_rows(made)
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
            np.testing.assert_array_equal(x, y)
        assert jax.tree.structure(back) == jax.tree.structure(w)
        np.testing.assert_array_equal(quantize.unpack(made), quantize.unpack(w))
        np.testing.assert_array_equal(quantize.dequantize(made), quantize.dequantize(w))


@pytest.mark.parametrize("inputs, outputs", [(256, 96), (40, 128), (1000, 64)])
def test_sizes_that_do_not_lie_side_by_side(inputs, outputs):
    w = quantize.pack(random_trits(inputs, outputs), np.ones((1, 1), np.float32))
    assert quantize.interleave(w) is w and quantize.in_rows(w) is w
    floats = np.ones((256, 128), np.float32)
    assert quantize.interleave(floats) is floats


@pytest.mark.parametrize("activations", ["float", "int8", "int15"])
@pytest.mark.parametrize("planes", [1, 2])
def test_interleaved_products_in_plain_jax(planes, activations, monkeypatch):
    """In tiles of columns, which do not show in sums of integers."""
    monkeypatch.setattr(quantize, "TILE", 256 * 100)  # of 64 outputs, then, and not of 100
    random = np.random.default_rng(0)
    trits = random.integers(-1, 2, (3, planes, 256, 192)).astype(np.int8)
    multipliers = random.integers(1, 64, (3, 192, 8, planes), np.int8)
    w = quantize.pack(trits, random.random((3, 1, 192), np.float32), multipliers)
    x = jnp.asarray(random.standard_normal((6, 256)), jnp.float32)
    weights = jnp.asarray(random.standard_normal((6, 192)), jnp.float32)

    def product(x, w):
        experts = jnp.array([2, -1, 0])
        return quantize.grouped_dot(x, w, experts, activations=activations)

    def both(w):
        w = jax.tree.map(jnp.asarray, w)
        with kernels.disabled():
            gradient = jax.grad(lambda x: jnp.sum(weights * product(x, w)))
            return jax.jit(product)(x, w), jax.jit(gradient)(x)

    (found, gradient), (wanted, of_rows) = both(quantize.interleave(w)), both(w)
    if activations != "float":
        np.testing.assert_array_equal(found, wanted)
    # float32 sums of some hundred terms of up to 100, in another order
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    np.testing.assert_allclose(gradient, of_rows, atol=1e-2)


def test_a_packed_weight_keeps_its_layout_through_tree_map():
    packed = quantize.pack(random_trits(30, 4), np.ones((1, 1), np.float32))
    copy = jax.tree.map(np.copy, packed)
    assert (copy.block, copy.padding, copy.shape) == (packed.block, 2, (30, 4))


@pytest.mark.parametrize(
    "inputs, block",
    [(6144, 64), (32768, 64), (2048, 64), (1024, 32), (384, 4), (256, 8), (48, 1), (3, 1)],
)
def test_packing_block(inputs, block):
    assert quantize.packing_block(inputs) == block


@pytest.mark.parametrize(
    "inputs, shards",
    [(48, 2), (48, 4), *itertools.product([96, 128, 160, 256, 6144, 32768], [2, 4, 8])],
)
def test_shards_of_the_inputs_hold_whole_blocks(inputs, shards):
    """A slice of the bytes is the packed form of the slice of the matrix, if the size allows it."""
    block = quantize.packing_block(inputs)
    assert inputs % (4 * shards * block) == 0
    trits = random_trits(inputs, 2)
    whole = quantize.pack(trits, None)
    for i in range(shards):
        rows = slice(i * inputs // shards, (i + 1) * inputs // shards)
        part = dataclasses.replace(whole, packed=np.split(whole.packed, shards, axis=1)[i])
        assert np.array_equal(quantize.unpack(part), trits[rows])


def test_base3_is_that_of_the_docstring():
    packed = np.array([0b10_00_10_01, 0, 0b10_10_10_10, 0, 0b01_00_10_00], np.uint8)
    assert shards.to_base3(packed).tolist() == [61, 162, 80, 81]
    assert shards.from_base3(np.array([61, 162, 80, 81], np.uint8)).tolist() == packed.tolist()


@pytest.mark.parametrize("native", [True, False])
def test_every_digit_of_base3(native, monkeypatch):
    """All 243 bytes at each of the four places, against arithmetic on Python's integers."""
    digits = np.array(
        [np.roll([number, 0, 121, 242], i) for number in range(243) for i in range(4)]
    )
    if not native:
        monkeypatch.setattr(quantize.kernels, "library", lambda: None)
    found = shards.from_base3(digits.astype(np.uint8))
    for row, packed in zip(digits.tolist(), found.tolist(), strict=True):
        base3 = [[number // 3**k % 3 for k in range(5)] for number in row]
        assert packed[:4] == [sum(d << 2 * k for k, d in enumerate(ds[:4])) for ds in base3]
        assert packed[4] == sum(ds[4] << 2 * j for j, ds in enumerate(base3))


@pytest.mark.parametrize("native", [True, False])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 700), st.integers(0, 3), st.integers(0, 99))
def test_base3_round_trip(native, monkeypatch, width, rows, seed):
    if not native:
        monkeypatch.setattr(quantize.kernels, "library", lambda: None)
    codes = np.random.default_rng(seed).integers(0, 3, (rows, width, 4), dtype=np.uint8)
    packed = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8)
    digits = shards.to_base3(packed)
    assert digits.shape == (rows, 4 * -(-width // 5)) and digits.max(initial=0) <= 242
    back = shards.from_base3(digits)
    np.testing.assert_array_equal(back[:, :width], packed)
    assert (back[:, width:] == 0b01_01_01_01).all()  # trits 0


# --- Quantizing -----------------------------------------------------------------------------------


def test_ternary_by_hand():
    w = jnp.array([[1.0, -0.5, 0.2], [-2.0, 0.3, 0.8]])
    ternary = formats.ternarize(w)
    assert ternary.scales.dtype == jnp.float32
    assert ternary.scales.tolist() == [[pytest.approx(0.8)]]  # 4.8 / 6; the threshold is 0.4
    assert quantize.unpack(ternary).tolist() == [[1, -1, 0], [-1, 0, 1]]
    expected = [[0.8, -0.8, 0], [-0.8, 0, 0.8]]
    np.testing.assert_allclose(quantize.dequantize(ternary), expected, rtol=1e-6)


def test_each_expert_has_its_own_gamma():
    w = random_floats(3, 10, 7) * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    together = formats.ternarize(w)
    assert together.scales.shape == (3, 1, 1)
    for i in range(3):
        alone = formats.ternarize(w[i])
        np.testing.assert_allclose(alone.scales, together.scales[i], rtol=1e-6)
        assert np.array_equal(alone.packed, together.packed[i])


@pytest.mark.parametrize("form", ["int8", "ternary"])
def test_a_matrix_of_zeros_stays_zero(form):
    w = weight_in(form, jnp.zeros((11, 3)))
    assert np.array_equal(quantize.dequantize(w), np.zeros((11, 3)))
    assert np.array_equal(quantize.dot(jnp.ones((2, 11)), w), np.zeros((2, 3)))


def test_dequantize_groups_by_hand():
    w = quantize.QuantizedWeight(
        jnp.array([[1, 2], [3, 4], [5, 6], [-7, 8]], jnp.int8),
        jnp.array([[1, 10], [0.5, 2]], jnp.bfloat16),
    )
    assert w.shape == (4, 2)
    assert quantize.dequantize(w).tolist() == [[1, 20], [3, 40], [2.5, 12], [-3.5, 16]]


@pytest.mark.parametrize("groups", [1, 3])
def test_int8_is_within_half_a_step(groups):
    w = random_floats(2, 12, 5)
    w8 = formats.quantize_int8(w, groups)
    assert w8.scales.dtype == jnp.bfloat16
    assert w8.scales.shape == (2, groups, 5)
    assert w8.codes.dtype == jnp.int8
    step = np.repeat(np.asarray(w8.scales, np.float32), 12 // groups, axis=1)
    # The bfloat16 scale may be 2^-9 short, which clips the largest by 127 / 512 of a step at most.
    assert np.all(np.abs(quantize.dequantize(w8) - w) <= 0.5001 * step)
    assert np.abs(np.asarray(w8.codes, np.int32)).max() >= 126


def test_rows_by_hand():
    rounded, step = quantize.quantize_rows(jnp.array([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]]))
    assert rounded.dtype == jnp.int8
    assert rounded.tolist() == [[32, -127, 64], [0, 0, 0]]  # 31.75 and 63.5
    assert step.shape == (2, 1)
    assert float(step[0, 0]) == pytest.approx(2 / 127)


def test_rows_round_within_half_a_step():
    x = random_floats(9, 31, dtype=jnp.bfloat16)
    rounded, step = quantize.quantize_rows(x)
    assert np.all(np.abs(rounded * step - x.astype(jnp.float32)) <= 0.5001 * step)
    assert np.all(np.abs(np.asarray(rounded, np.int32)).max(axis=-1) == 127)


def test_int15_is_two_halves_of_int8():
    integers = jnp.arange(-16256, 16257, dtype=jnp.int16)
    high, low = quantize.high_and_low(integers)
    assert high.dtype == low.dtype == jnp.int8
    found = 128 * np.asarray(high, np.int32) + np.asarray(low, np.int32)
    np.testing.assert_array_equal(found, integers)


def test_int15_rows_are_finer_than_bfloat16():
    x = random_floats(9, 6144)
    rounded, step = quantize.quantize_rows(x, activations="int15")
    assert rounded.dtype == jnp.int16
    assert np.all(np.abs(np.asarray(rounded, np.int32)).max(axis=-1) == 127 * 128)
    error = np.linalg.norm(rounded * step - x) / np.linalg.norm(x)
    bfloat16 = np.linalg.norm(x.astype(jnp.bfloat16).astype(jnp.float32) - x) / np.linalg.norm(x)
    assert error < 8e-5 < bfloat16  # 1 / sqrt(12) of a step, 4 standard deviations to 16256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_sees_exactly_what_is_saved(dtype):
    w = random_floats(3, 29, 13, dtype=dtype)
    saved = formats.ternarize(w)
    seen = formats.fake_ternarize(w)
    assert np.array_equal(seen.codes, quantize.unpack(saved))
    assert np.array_equal(seen.scales, saved.scales)
    # Compiled, the mean may be summed in another order; the trits are the same.
    compiled = jax.jit(formats.fake_ternarize)(w)
    assert np.array_equal(compiled.codes, seen.codes)
    np.testing.assert_allclose(compiled.scales, seen.scales, rtol=1e-6)


@pytest.mark.parametrize(
    "activations, tolerance", [("int8", 1e-6), ("int15", 1e-5), ("float", 1e-5)]
)
def test_training_computes_what_the_packed_weights_do(activations, tolerance):
    """With int8 rows the sums are the same integers; the scales meet in another order."""
    x, w = random_floats(6, 64), random_floats(3, 64, 24, seed=1)
    experts = jnp.array([2, -1, 0])
    trained, packed = (
        quantize.grouped_dot(x, form(w), experts, activations=activations)
        for form in (formats.fake_ternarize, formats.ternarize)
    )
    assert not np.any(trained[2:4])
    np.testing.assert_allclose(trained, packed, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("narrow, error", [(True, 4e-3), (False, 1e-6)])
def test_gradients_go_straight_through(monkeypatch, narrow, error):
    """To the latent weights and to x, as if neither were rounded but in the other's gradient; what
    comes back is rounded to bfloat16 on the way, where that is multiplied."""
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: narrow)
    w, x = random_floats(29, 13), random_floats(5, 29, seed=1)
    weight = random_floats(29, 13, seed=2)
    gradient = jax.grad(lambda w: jnp.sum(quantize.dequantize(formats.fake_ternarize(w)) * weight))(
        w
    )
    np.testing.assert_allclose(gradient, weight, rtol=1e-6)

    def loss(x, w, form):
        return jnp.sum(quantize.dot(x, form(w), activations="int8") ** 2)

    rounded, step = quantize.quantize_rows(x)
    for form, off in ((jnp.asarray, 1e-6), (formats.fake_ternarize, error)):
        seen = quantize.dequantize(form(w))
        y = (rounded * step) @ seen
        dx, dw = jax.grad(loss, argnums=(0, 1))(x, w, form)
        for found, wanted in ((dx, 2 * y @ seen.T), (dw, 2 * (rounded * step).T @ y)):
            assert np.linalg.norm(found - wanted) < off * np.linalg.norm(wanted)
    traced = jax.make_jaxpr(lambda x: jax.grad(loss)(x, w, formats.fake_ternarize))(x)
    assert ("bf16" in str(traced)) == narrow


@pytest.mark.parametrize(
    "platform, instructions, narrow",
    [
        ("cpu", {"avx512f", "avx512_vnni"}, False),
        ("cpu", {"avx512f", "avx512_bf16"}, True),
        ("cpu", {"asimddp"}, False),
        ("gpu", {"avx512f"}, True),
    ],
)
def test_bfloat16_is_multiplied_where_that_is_fast(monkeypatch, platform, instructions, narrow):
    monkeypatch.setattr(kernels.building, "processor", lambda: instructions)
    with kernels.compiling_for(platform):
        assert kernels.multiplies_bfloat16() == narrow


@pytest.mark.usefixtures("kernels_or_plain")
@pytest.mark.parametrize("activations", quantize.ACTIVATIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_gradients_through_any_format_are_those_of_its_matrices(form, activations):
    """To x and to the scales, forwards and backwards, from blocks of three experts and a skipped
    one: those of the product of the rounded rows with the dequantized matrices."""
    w = weight_in(form, random_floats(3, 77, 13))
    x, weight = random_floats(10, 77, seed=1), random_floats(10, 13, seed=2)
    experts = jnp.array([2, 0, -1, 0, 1])
    floats = jax.tree.leaves(w)[-1].astype(jnp.float32)  # scales, or all of a float matrix

    def with_floats(floats):
        return floats if form == "float" else dataclasses.replace(w, scales=floats)

    def loss(x, floats):
        y = quantize.grouped_dot(x, with_floats(floats), experts, activations=activations)
        return jnp.sum(jnp.sin(y) * weight)

    def plain(x, floats):
        y = plain_grouped_dot(x, with_floats(floats), experts, activations)
        return jnp.sum(jnp.sin(y) * weight)

    found, expected = (jax.grad(f, argnums=(0, 1))(x, floats) for f in (loss, plain))
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other)  # float32 sums of 77
    tangent = jax.jvp(loss, (x, floats), (x, floats))[1]
    np.testing.assert_allclose(tangent, jnp.vdot(found[0], x) + jnp.vdot(found[1], floats), 1e-4)
    if activations == "int8":
        assert_same_curvature(loss, plain, x, floats)


def plain_grouped_dot(x, w, experts, activations):
    """`quantize.grouped_dot` as products of rounded rows, floats, with dequantized matrices."""
    if activations != "float":
        rounded, step = quantize.quantize_rows(x, activations=activations)
        x = quantize.straight_through(x, rounded * step)
    of_block = quantize.dequantize(w)[experts] * (experts >= 0)[:, None, None]
    blocks = x.reshape(len(experts), -1, x.shape[-1])
    y = jnp.einsum("bri,bio->bro", blocks, of_block, precision="highest")
    return y.reshape(len(x), -1)


def assert_same_curvature(loss, plain, *floats):
    """Whether products of second derivatives with a vector are the same, either way round."""

    @functools.partial(jax.jit, static_argnums=0)
    def of_gradients(f, *x):
        return jax.jvp(jax.grad(f, argnums=(0, 1)), x, x)[1]

    @functools.partial(jax.jit, static_argnums=0)
    def of_tangent(f, *x):
        return jax.grad(lambda *moved: jax.jvp(f, moved, x)[1], argnums=(0, 1))(*x)

    expected = of_gradients(plain, *floats)
    for found in (of_gradients(loss, *floats), of_tangent(loss, *floats)):
        for one, other in zip(found, expected, strict=True):
            assert np.linalg.norm(one - other) < 1e-4 * np.linalg.norm(other)


@pytest.mark.usefixtures("kernels_or_plain")
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ["ternary", "int8", "float32"])
def test_second_derivatives_in_training(name, activations, monkeypatch):
    """Those of the product of rounded rows with the matrices, straight through the rounding."""
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    x, w, weight = (
        random_floats(*shape, seed=i) for i, shape in enumerate([(96, 64), (3, 64, 24), (96, 24)])
    )
    experts = jnp.array([2, 0, -1, 0, 1, 1])
    train = formats.FORMATS[name].train

    def loss(x, w):
        y = quantize.grouped_dot(x, train(w), experts, activations=activations)
        return jnp.sum(jnp.sin(y) * weight)

    def plain(x, w):
        y = plain_grouped_dot(x, train(w), experts, activations)
        return jnp.sum(jnp.sin(y) * weight)

    assert_same_curvature(loss, plain, x, w)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_training_shows_weights_that_are_no_numbers(name):
    w = random_floats(64, 8).at[3, 5].set(np.nan)
    y = quantize.dot(random_floats(2, 64), formats.FORMATS[name].train(w), activations="int8")
    assert not np.isfinite(y[:, 5]).any()


def test_a_gradient_keeps_no_unpacked_matrix():
    """What the backward pass keeps from the forward pass is smaller than the trits as int8."""
    w = formats.ternarize(random_floats(512, 128))
    x = random_floats(4, 512)
    _, pullback = jax.vjp(lambda x: quantize.dot(x, w, activations="int8"), x)
    assert all(leaf.size < 512 * 128 for leaf in jax.tree.leaves(pullback))


def test_a_matrix_of_zeros_has_a_gradient():
    zeros = jnp.zeros((8, 4))
    gradient = jax.grad(
        lambda w: jnp.sum(quantize.dot(jnp.ones((2, 8)), formats.fake_ternarize(w)))
    )
    assert np.all(np.isfinite(gradient(zeros)))


# --- Products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS)
def test_dot_is_the_product_with_the_dequantized_matrix(form, dtype):
    x = random_floats(2, 5, 77, dtype=dtype)
    w = weight_in(form, random_floats(77, 13, seed=1))
    if form == "float":
        w = w.astype(dtype)
    y = jax.jit(quantize.dot)(x, w)
    assert y.shape == (2, 5, 13)
    assert y.dtype == x.dtype
    assert_near(y, exact(x, w), dtype)


@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("form", FORMATS)
def test_dot_with_integer_activations_is_that_of_the_rounded_rows(form, activations):
    x = random_floats(5, 77)
    w = weight_in(form, random_floats(77, 13, seed=1))
    rounded, step = quantize.quantize_rows(x, activations=activations)
    y = jax.jit(functools.partial(quantize.dot, activations=activations))(x, w)
    assert_near(y, exact(np.asarray(rounded, np.float64) * np.asarray(step, np.float64), w))


def test_ternary_with_int8_activations_sums_exactly():
    """With steps and scales of one the result is the integer sum itself, here up to 127 * 4099."""
    x = np.random.default_rng(0).integers(-127, 128, (3, 4099))
    x[:, 0] = 127
    trits = random_trits(4099, 7)
    trits[:, 0] = np.sign(x[1])  # the largest sum there is
    w = quantize.pack(trits, np.ones((1, 1), np.float32))
    y = quantize.dot(jnp.asarray(x, jnp.float32), w, activations="int8")
    assert np.array_equal(np.asarray(y, np.int64), x.astype(np.int64) @ trits.astype(np.int64))


@pytest.mark.parametrize("multipliers", [None, (127,), (100, 27)])
def test_the_largest_sums_of_int15_fit(multipliers):
    """All of Grok-1's 32768 inputs at the largest activation, and the largest codes."""
    x, scales = jnp.full((1, 32768), 127 * 128, jnp.int16), np.ones((1, 1, 1), np.float32)
    trits, largest = np.ones((1, 32768, 2), np.int8), 1
    if multipliers is not None:
        trits, largest = np.stack([trits] * len(multipliers), axis=1), 127
        multipliers = np.broadcast_to(np.int8(multipliers), (1, 2, 1, len(multipliers)))
    w = quantize.pack(trits, scales, multipliers)
    y = quantize._sums(x, w, jnp.zeros(1, jnp.int32), None, None, True)
    assert y.tolist() == [[32768 * 127 * 128 * largest] * 2]  # which float32 has


@pytest.mark.parametrize("form, count", [("int8", 1), ("ternary", 4)])  # one for each bit position
@kernels.disabled()
def test_int8_activations_multiply_as_integers(form, count):
    w = weight_in(form, random_floats(77, 13))
    f = functools.partial(quantize.dot, activations="int8")
    jaxpr = jax.make_jaxpr(f)(jnp.ones((3, 77)), w)
    products = [e for e in factories.equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == count
    for product in products:
        assert [v.aval.dtype for v in product.invars] == [jnp.int8, jnp.int8]
        assert product.outvars[0].aval.dtype == jnp.int32


def test_unknown_activations():
    with pytest.raises(ValueError, match="one of .*'int15'.*, got 'int4'"):
        quantize.dot(jnp.ones((1, 3)), jnp.ones((3, 2)), activations="int4")


@pytest.mark.parametrize("columns", [1, 5, 12])
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("form", ["int8", "int8 in 7 groups", "ternary"])
def test_tiles_of_columns_change_nothing(form, activations, columns, monkeypatch):
    x = random_floats(3, 77)
    w = weight_in(form, random_floats(77, 13, seed=1))
    whole = jax.jit(functools.partial(quantize.dot, activations=activations))(x, w)
    monkeypatch.setattr(quantize, "TILE", columns * 77)
    tiled = jax.jit(functools.partial(quantize.dot, activations=activations))(x, w)
    if activations == "int8" and form == "ternary":
        assert np.array_equal(tiled, whole)
    else:  # the compiler may sum in another order
        assert_near(tiled, np.asarray(whole, np.float64))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("form", FORMATS)
def test_grouped_dot(form, activations):
    x = random_floats(5 * 3, 77)
    w = weight_in(form, random_floats(4, 77, 13, seed=1))
    experts = [2, -1, 0, 3, 2]
    f = jax.jit(functools.partial(quantize.grouped_dot, activations=activations))
    y = np.asarray(f(x, w, jnp.array(experts)))
    assert y.shape == (15, 13)
    for i, expert in enumerate(experts):
        rows = slice(3 * i, 3 * i + 3)
        if expert < 0:
            assert not y[rows].any()
        else:
            one = jax.tree.map(lambda leaf, e=expert: leaf[e], w)
            block = np.asarray(x[rows])
            if activations == "int8":
                rounded, step = quantize.quantize_rows(x[rows])
                block = np.asarray(rounded, np.float64) * np.asarray(step, np.float64)
            assert_near(y[rows], exact(block, one))


@pytest.mark.parametrize("form", FORMATS)
def test_grouped_dot_with_one_block_or_one_expert(form):
    f = jax.jit(quantize.grouped_dot)
    x, w = random_floats(6, 77), weight_in(form, random_floats(1, 77, 13, seed=1))
    assert not np.asarray(f(x, w, jnp.array([-1]))).any()
    expected = exact(x, jax.tree.map(lambda leaf: leaf[0], w))
    assert_near(f(x, w, jnp.array([0])), expected)
    assert_near(f(x, w, jnp.array([0, 0])), expected)


# --- What the compiler is given -------------------------------------------------------------------


def test_largest_array_looks_into_inner_jaxprs():
    def f(x):
        return jax.lax.cond(
            x[0] > 0, lambda: jax.jit(lambda: jnp.sum(jnp.outer(x, x)))(), lambda: x[0]
        )

    assert factories.largest_array(f, jnp.ones(17)) == 17 * 17


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_no_unpacked_matrix_exists(activations):
    """One row times a Grok-1 expert unpacks a tile at a time, of 2 % of the matrix."""
    inputs, outputs, experts = 6144, 32768, 8
    w = jax.eval_shape(
        quantize.pack,
        jax.ShapeDtypeStruct((experts, inputs, outputs), jnp.int8),
        jax.ShapeDtypeStruct((experts, 1, 1), jnp.float32),
    )
    f = functools.partial(quantize.grouped_dot, activations=activations)
    x = jax.ShapeDtypeStruct((1, inputs), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert factories.largest_array(f, x, w, index) <= quantize.TILE < inputs * outputs / 40


@pytest.mark.parametrize("form", ["ternary", "int8"])
def test_a_tpu_reads_whole_experts(form, monkeypatch):
    """XLA:TPU copies all experts to slice at a column that it cannot prove aligned."""
    w = weight_in(form, random_floats(4, 77, 13, seed=1))
    stored = w.packed if form == "ternary" else w.codes
    monkeypatch.setattr(quantize, "TILE", 77)
    monkeypatch.setattr(quantize, "DEVICE_TILE", 77)
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    x, experts = random_floats(6, 77), jnp.array([2, 0, -1])
    f = functools.partial(quantize.grouped_dot, activations="int8")
    slices = [
        equation.outvars[0].aval.shape
        for equation in factories.equations(jax.make_jaxpr(f)(x, w, experts))
        if equation.primitive.name == "dynamic_slice"
        and equation.invars[0].aval.shape == stored.shape
    ]
    assert slices == [(1, *stored.shape[1:])]


def test_a_tpu_multiplies_a_table_with_two_rows(monkeypatch):
    """A single one would not go to the matrix unit."""
    x, table = random_floats(1, 7), random_floats(13, 7, seed=1)
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    jaxpr = jax.make_jaxpr(quantize.table_dot)(x, table)
    (dot,) = (e for e in factories.equations(jaxpr) if e.primitive.name == "dot_general")
    assert dot.invars[0].aval.shape == (2, 7) and jaxpr.out_avals[0].shape == (1, 13)


# --- Tables ---------------------------------------------------------------------------------------


def test_first_rule_that_matches_wins():
    rules = [("router", "float"), ("w$", "ternary")]
    assert quantize.match_rules(rules, ["router/w", "linear/w"]) == {
        "router/w": "float",
        "linear/w": "ternary",
    }


def test_a_parameter_that_no_rule_matches():
    with pytest.raises(ValueError, match="no rule matches parameter 'norm/scale'; add one"):
        quantize.match_rules([("w$", 1)], ["linear/w", "norm/scale"])


def test_a_rule_that_is_never_used():
    with pytest.raises(ValueError, match=r"match no parameter: \['router'\]; remove or correct"):
        quantize.match_rules([("w$", 1), ("router", 2)], ["router/w"])


def test_int8_that_keeps_trits():
    """Plain int8 rounding changes some trits of a matrix with values close to the threshold."""
    w = np.random.default_rng(3).standard_normal((40, 30)).astype(np.float32)
    gamma = np.abs(w).mean()
    w[::4] = np.copysign(gamma * 0.5 * np.linspace(0.999, 1.001, 300).reshape(10, 30), w[::4])
    trits = quantize.unpack(formats.ternarize(jnp.asarray(w)))

    def kept(int8):
        return (quantize.unpack(formats.ternarize(quantize.dequantize(int8))) == trits).all()

    assert not kept(formats.quantize_int8(jnp.asarray(w)))
    int8 = formats.quantize_int8_keeping_trits(w)
    assert kept(int8)
    # One code more than rounding, of 127 that reach the largest value of a column.
    step = np.abs(w).max(axis=0) / 127
    assert (np.abs(quantize.dequantize(int8) - w) <= 1.6 * step).all()


def test_a_table_is_applied_to_each_parameter():
    rules = ((r"/w$", 2), (r"", 3))
    params = {"a": {"w": 5, "scale": 7}, "b": {"w": 11}}
    found = quantize.apply_rules(rules, params, lambda path, value, leaf: (path, value * leaf))
    assert found == {"a": {"w": ("a/w", 10), "scale": ("a/scale", 21)}, "b": {"w": ("b/w", 22)}}
    with pytest.raises(ValueError, match="match no parameter"):
        quantize.apply_rules((*rules, (r"c", 1)), params, lambda *_: None)


# --- Latent weights -------------------------------------------------------------------------------


def test_latent_weights_turn_into_the_ternary_ones_they_came_from():
    w = factories.ternarize(np.random.default_rng(0).standard_normal((3, 20, 7)).astype(np.float32))
    again = formats.ternarize(formats.latent(w))
    np.testing.assert_array_equal(again.packed, w.packed)
    np.testing.assert_allclose(again.scales, w.scales, rtol=1e-6)


def test_latent_weights_of_zeros_are_zeros():
    w = quantize.pack(jnp.zeros((8, 4), jnp.int8), jnp.zeros((1, 1)))
    assert not formats.latent(w).any()
