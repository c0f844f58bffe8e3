"""Rounding that makes up for its own errors, beside plain linear algebra in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
import gptq
import quantize

pytestmark = pytest.mark.slow  # minutes on two cores, all of them

FORMATS = ["ternary", "ternary-fit", "ternary-fit-64", "ternary2-128"]
INPUTS, OUTPUTS, ROWS = 64, 24, 1500


def rows(seed: int, inputs: int = INPUTS, count: int = ROWS):
    """Correlated activations of two models, [R, I] each: the second's are those of the first, and
    a part that follows from them, and one that does not."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(1).standard_normal((2, inputs, inputs))
    mix[0] *= np.exp(-np.arange(inputs) / 12)[:, None]
    x = random.standard_normal((count, inputs)) @ mix[0]
    other = x + 0.02 * x @ mix[1] + 0.1 * random.standard_normal(x.shape)
    return x.astype(np.float32), other.astype(np.float32)


def moments(x, other, weights=None):
    weights = np.ones(len(x), np.float32) if weights is None else weights
    return gptq.add(gptq.Moments.zeros(x.shape[1]), x, other, weights)


def matrix(inputs: int = INPUTS):
    random = np.random.default_rng(2)
    spread = np.exp(0.3 * random.standard_normal(OUTPUTS))
    return (random.standard_normal((inputs, OUTPUTS)) * spread).astype(np.float32)


@functools.cache
def rounded(format: str, inputs: int = INPUTS):
    w = jnp.asarray(matrix(inputs))
    plain = formats.FORMATS[format].quantize(w)
    seen, held = (moments(*rows(seed, inputs)) for seed in (3, 4))
    return gptq.round_matrix(w, plain, format, seen, held)


def error(weight, inputs: int = INPUTS):
    """Squared error of the outputs on rows that nobody has seen, over their energy."""
    x, other = rows(5, inputs)
    wanted = other @ matrix(inputs)
    return np.square(wanted - x @ quantize.dequantize(weight)).sum() / np.square(wanted).sum()


@pytest.mark.parametrize("format", FORMATS)
def test_outputs_are_much_nearer_than_those_of_the_nearest_weights(format):
    """By a factor of 2 at least; it is 3 to 6 here."""
    made = rounded(format)
    plain = jax.tree.map(jnp.asarray, formats.FORMATS[format].quantize(matrix()))
    assert jax.tree.structure(made.weight) == jax.tree.structure(plain)
    assert error(made.weight) < 0.5 * error(plain)
    assert made.losses[1] < 0.5 * made.losses[0]
    assert made.losses[2] < made.losses[1]  # and descent is better still


@pytest.mark.parametrize("format", ["ternary", "ternary2-128"])
def test_sizes_that_fill_no_byte_and_no_block(format):
    made = rounded(format, 35)
    assert made.weight.shape == (35, OUTPUTS)
    plain = formats.FORMATS[format].quantize(jnp.asarray(matrix(35)))
    assert jax.tree.map(jnp.shape, made.weight) == jax.tree.map(jnp.shape, plain)
    assert error(made.weight, 35) < 0.6 * error(plain, 35)


def test_losses_are_the_error_of_outputs_up_to_what_no_weight_changes():
    made, (x, other), w = rounded("ternary-fit-64"), rows(4), matrix()
    off = x @ (w - quantize.dequantize(made.weight))
    missed = (other - x) @ w
    found = np.square(off + missed).sum() - np.square(missed).sum()
    wanted = found / np.square(x @ w).sum()
    np.testing.assert_allclose(min(made.losses), wanted, rtol=1e-3)  # float32 sums


def test_moments_are_weighted_sums_of_products():
    (x, other), weights = rows(6, 10, 50), np.random.default_rng(7).random(50, np.float32)
    whole = moments(x, other, weights)
    parts = gptq.add(moments(x[:20], other[:20], weights[:20]), x[20:], other[20:], weights[20:])
    for found in (whole, parts):
        squares, shifts = (np.asarray(m)[0, :10, :10] for m in found)
        np.testing.assert_allclose(squares, (x.T * weights) @ x, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(shifts, (x.T * weights) @ (other - x), rtol=1e-4, atol=1e-3)
        assert not np.asarray(found.squares)[0, 10:].any()  # two rows of zeros fill up a byte


def test_large_matrices_have_diagonal_blocks():
    assert gptq.diagonal_blocks(6144) == 1
    assert gptq.diagonal_blocks(32768) == 8
    assert gptq.Moments.zeros(35).squares.shape == (1, 36, 36)


def test_blocks_are_of_the_diagonal(monkeypatch):
    monkeypatch.setattr(gptq, "LARGEST", 32)
    x, other = rows(6)
    blocks = gptq.Moments.zeros(INPUTS)
    found = gptq.add.__wrapped__(blocks, x, other, jnp.ones(ROWS)).squares
    assert found.shape == (2, 32, 32)
    np.testing.assert_allclose(found[1], x[:, 32:].T @ x[:, 32:], rtol=1e-3)


def test_matrices_in_several_blocks_and_tiles(monkeypatch):
    """With blocks there is less to make up with, but it is still much better than plain."""
    format = "ternary-fit-64"
    w, plain = jnp.asarray(matrix()), formats.FORMATS[format].quantize(jnp.asarray(matrix()))
    seen, held = (moments(*rows(seed)) for seed in (3, 4))
    monkeypatch.setattr(gptq, "OUTPUTS", 8)
    round_alone = jax.jit(gptq._round.__wrapped__, static_argnames="format")
    tiles = round_alone(w, plain, seen, held, gptq.DAMPING, format=format).weight
    different = quantize.codes_of(tiles) != quantize.codes_of(rounded(format).weight)
    assert np.mean(different) < 0.01  # sums in another order turn a code now and then
    monkeypatch.setattr(gptq, "LARGEST", 32)
    seen, held = (
        gptq.add.__wrapped__(gptq.Moments.zeros(INPUTS), *rows(seed), jnp.ones(ROWS))
        for seed in (3, 4)
    )
    blocks = round_alone(w, plain, seen, held, gptq.DAMPING, format=format).weight
    assert error(blocks) < 0.7 * error(plain)


def test_inverse_factor():
    x, _ = rows(8, 12, 100)
    h = (x.T @ x)[None] + np.eye(12, dtype=np.float32)
    u = np.asarray(gptq.inverse_factor(jnp.asarray(h)))[0].astype(float)
    np.testing.assert_array_equal(u, np.triu(u))
    np.testing.assert_allclose(u.T @ u @ h[0], np.eye(12), atol=1e-3)


def test_scales_for_given_trits_are_least_squares():
    """Without a ridge, those of NumPy's `lstsq` over all rows."""
    random = np.random.default_rng(9)
    (x, _), w = rows(10), matrix()
    trits = random.integers(-1, 2, (2, INPUTS, OUTPUTS))
    h = jnp.asarray(x.T @ x)[None] / ROWS
    equations = gptq._equations(h, jnp.asarray(w)[None], jnp.asarray(trits), 4, False)
    a, b = (np.asarray(part)[0] for part in equations)
    for o in range(3):
        columns = np.stack(
            [
                x[:, 16 * g : 16 * g + 16] @ trits[p, 16 * g : 16 * g + 16, o]
                for p in range(2)
                for g in range(4)
            ],
            axis=1,
        )
        wanted = np.linalg.lstsq(columns.astype(float), x.astype(float) @ w[:, o], rcond=None)[0]
        found = np.linalg.solve(a[:, :, o].astype(float), b[:, o])
        np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3)


def test_the_difference_of_the_models_is_made_up_for_as_far_as_it_holds_for_other_rows():
    """A part of the other model's inputs that follows from one's own does; with fewer rows than
    inputs, what seems to follow from noise does not."""
    w = jnp.asarray(matrix())
    plain = formats.FORMATS["ternary-fit"].quantize(w)

    def shift(other, count):
        parts = []
        for seed in (11, 12):
            x = rows(seed, count=count)[0]
            parts.append(moments(x, other(x, np.random.default_rng(seed))))
        return float(gptq.round_matrix(w, plain, "ternary-fit", *parts).shift)

    turn = 0.1 * np.random.default_rng(13).standard_normal((INPUTS, INPUTS)).astype(np.float32)
    assert shift(lambda x, random: x + x @ turn, ROWS) > 0.95

    def noise(x, random):
        return x + x.std() * random.standard_normal(x.shape).astype(np.float32)

    assert shift(noise, 24) < 0.5


def test_where_no_rows_are_held_out_the_others_choose():
    """An expert that meets few tokens may have none of those that are held out."""
    w, format = jnp.asarray(matrix()), "ternary-fit"
    plain, seen = formats.FORMATS[format].quantize(w), moments(*rows(3))
    made = gptq.round_matrix(w, plain, format, seen, gptq.Moments.zeros(INPUTS))
    assert made.losses[2] < made.losses[1] < 0.5 * made.losses[0]
    assert error(made.weight) < 0.5 * error(plain)


def test_inputs_that_never_vary_and_sums_that_are_no_numbers():
    """Zeros leave nothing to make up with; a factor that is not finite takes inputs as independent,
    and what is not better than plain is not taken."""
    w = jnp.asarray(matrix())
    plain = formats.FORMATS["ternary-fit"].quantize(w)
    silent = gptq.Moments.zeros(INPUTS)
    made = gptq.round_matrix(w, plain, "ternary-fit", silent, silent)
    assert np.isfinite(made.losses).all()
    bad = moments(*rows(14))._replace(squares=-moments(*rows(14)).squares)
    made = gptq.round_matrix(w, plain, "ternary-fit", bad, moments(*rows(15)))
    assert made.damping == np.inf
    assert min(made.losses) <= made.losses[0]
