"""Latent weights of a converted layer; what gradient steps are worth is in test_calibration.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
import quantize
import recovery

pytestmark = pytest.mark.slow  # minutes on two cores, all of them

NAMES = ("ternary", "ternary-fit", "ternary-fit-64", "ternary2", "ternary2-128")


def weight_and_wanted(name: str, shape=(3, 256, 24)):
    random = np.random.default_rng(0)
    wanted, noise = random.standard_normal((2, *shape)).astype(np.float32)
    return formats.FORMATS[name].quantize(jnp.asarray(wanted + 0.2 * noise)), jnp.asarray(wanted)


@pytest.mark.parametrize("shape", [(3, 256, 24), (6, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_step_nothing_has_changed(name, shape):
    weight, wanted = weight_and_wanted(name, shape)
    found = jax.jit(lambda *args: recovery.packed(recovery.latent(*args)))(weight, wanted)
    assert np.array_equal(found.packed, weight.packed)
    made, expected = quantize.dequantize(found), quantize.dequantize(weight)
    np.testing.assert_allclose(made, expected, rtol=1e-6)  # products of scales are rounded


@pytest.mark.parametrize("name", NAMES)
def test_latent_weights_are_those_wanted_where_they_round_alike(name):
    weight, wanted = weight_and_wanted(name)
    learned = jax.jit(recovery.latent)(weight, wanted)
    made = quantize.dequantize(weight)
    np.testing.assert_allclose(recovery.values(learned), made, rtol=1e-6, atol=1e-7)
    kept = np.asarray(learned.w == wanted)
    assert 0.5 < kept.mean() < 1
    np.testing.assert_array_equal(learned.w[~kept], made[~kept])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_straight_through_and_to_the_scales(name):
    """Those of scales are the differences that small changes make, as no trit changes."""
    learned = jax.jit(recovery.latent)(*weight_and_wanted(name))
    towards = jnp.asarray(np.random.default_rng(1).standard_normal(learned.w.shape), jnp.float32)

    @jax.jit
    def total(learned):
        return jnp.sum(recovery.values(learned) * towards)

    gradient = jax.grad(total)(learned)
    within = np.abs(learned.w) <= 1.5 * recovery.of_inputs(learned).sum(axis=-3)
    assert np.mean(within) > 0 and np.array_equal(gradient.w, np.where(within, towards, 0))
    fixed = learned._replace(w=recovery.values(learned))  # far from where trits change
    for share in (0.01, -0.01):
        moved = fixed._replace(scales=learned.scales * (1 + share))
        expected = share * jnp.sum(gradient.scales * learned.scales)
        np.testing.assert_allclose(total(moved) - total(fixed), expected, rtol=1e-3)
