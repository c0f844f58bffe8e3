"""JAX's transformations of the model, with kernels and without, for every format of weights."""

import dataclasses
import functools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
import experts
import formats
import kernels
import model
import quantize

native = pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels: no compiler, or a GPU")
# Outputs of 64, which a CPU has side by side; F is 48.
CONFIG = dataclasses.replace(
    factories.ODD, emb_size=64, num_layers=1, num_q_heads=4, num_kv_heads=2, key_size=16
)
TOKENS = factories.random_tokens(CONFIG, 2, 5)
USUAL = ("ternary", "ternary2-64", "int8", "float32")  # of each kind one
SMALL = ("language_model/rms_norm", "transformer/decoder_layer_0/router")
X = jnp.asarray(np.random.default_rng(0).standard_normal((12, 64)), jnp.float32)


def weight(name, experts_=3, outputs=64, inputs=64):
    w = np.random.default_rng(1).standard_normal((experts_, inputs, outputs)).astype(np.float32)
    made = jax.tree.map(jnp.asarray, formats.FORMATS[name].quantize(w))
    return quantize.interleave(made)


@functools.cache
def problem(activations):
    config = dataclasses.replace(CONFIG, activations=activations)
    params = factories.random_params(config, "ternary")
    params = {
        m: {n: quantize.interleave(w) for n, w in entries.items()} for m, entries in params.items()
    }
    return model.make_model(config).apply, params


def scales_of(w):
    return w if isinstance(w, jax.Array) else w.scales


def with_scales(w, scales):
    return scales if isinstance(w, jax.Array) else dataclasses.replace(w, scales=scales)


def near(found, wanted, tolerance=1e-4):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


# --- Products -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, activations",
    [(name, kind) for name in USUAL for kind in quantize.ACTIVATIONS]
    + [(name, "int15") for name in ("ternary-fit-128", "ternary2")],
)
def test_derivatives_of_products_are_those_of_floats(name, activations):
    """Straight through the rounding of x: with the dequantized matrix, to x and to scales."""
    w, chosen = weight(name), jnp.array([2, -1, 0, 2])

    def product(x, scales):
        made = with_scales(w, scales)
        return quantize.grouped_dot(x, made, chosen, activations=activations)

    def wanted(x, scales):
        matrices = quantize.dequantize(with_scales(w, scales))[jnp.maximum(chosen, 0)]
        y = jnp.einsum("bri,bio->bro", x.reshape(4, 3, -1), matrices, precision="highest")
        return jnp.where(chosen[:, None, None] < 0, 0, y).reshape(12, -1)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(f, x, scales):
        dx, ds, dy = jnp.sin(x), jnp.cos(scales), jnp.cos(jnp.arange(768.0)).reshape(12, 64)
        _, pull = jax.vjp(jax.checkpoint(f), x, scales)
        return pull(dy), jax.jvp(f, (x, scales), (dx.astype(x.dtype), ds.astype(scales.dtype)))[1]

    scales = scales_of(w)
    tolerance = {"float": 1e-5, "int15": 1e-3, "int8": 0.03}[activations]
    if scales.dtype == jnp.bfloat16:  # a gradient in the dtype of what it belongs to
        tolerance = max(tolerance, 2**-7)
    near(everything(product, X, scales), everything(wanted, X, scales), tolerance)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ["ternary-fit-64", "int8"])
def test_vmap_of_products_is_each_by_itself(name, activations):
    """Over rows, experts and scales, to the last bit where sums are of integers."""
    w = weight(name)
    x, chosen = X.reshape(2, 6, 64), jnp.array([[2, -1, 0], [1, 1, -1]])
    scales = jnp.stack([w.scales, 2 * w.scales])

    def product(x, chosen, scales):
        made = dataclasses.replace(w, scales=scales)
        return quantize.grouped_dot(x, made, chosen, activations=activations)

    together = jax.jit(jax.vmap(product))(x, chosen, scales)
    alone = jnp.stack([jax.jit(product)(*one) for one in zip(x, chosen, scales, strict=True)])
    if activations == "float":
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(together, alone)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(product)(x, chosen, scales) ** 2)))(x)
    each = jax.jit(jax.grad(lambda x, *a: jnp.sum(product(x, *a) ** 2)))
    near(gradient, jnp.stack([each(*one) for one in zip(x, chosen, scales, strict=True)]), 1e-5)


def test_training_has_tangents_and_vmap():
    w = formats.FORMATS["ternary"].train(X[:, :8].T[None])  # [1, 8, 12]

    def f(x, codes):
        made = dataclasses.replace(w, codes=codes)
        return quantize.grouped_dot(x, made, jnp.zeros(1, int), activations="int8").std()

    x, codes = X[:, 8:16], w.codes
    gradients = jax.grad(f, argnums=(0, 1))(x, codes)
    steps = jax.tree.map(jnp.sign, gradients)
    _, tangent = jax.jvp(f, (x, codes), steps)
    slope = sum(jnp.sum(abs(g)) for g in gradients)
    np.testing.assert_allclose(tangent, slope, rtol=2**-6)  # each part is rounded to bfloat16
    both = jax.vmap(jax.grad(f), (0, None))(jnp.stack([x, x + 1]), codes)
    np.testing.assert_allclose(both[0], gradients[0], rtol=0.02, atol=1e-4)


# --- Attention and experts ------------------------------------------------------------------------


def attention_problem():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(s) for s in ((2, 3, 4, 6), (2, 2, 5, 6), (2, 2, 5, 6)))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)], jnp.array([[2, 3, 4], [0, 1, 2]])


def test_attention_in_every_mode():
    """Forward, reverse, forward over reverse, of a batch: as plain JAX."""
    arrays, positions = attention_problem()

    def f(q, k, v):
        return jnp.sum(attention.attend(q, k, v, positions, multiplier=0.9, cap=5.0) ** 2)

    def everything():
        steps = [jnp.sin(x) for x in arrays]
        both = [jnp.stack([x, x + 0.1]) for x in arrays]
        gradient = jax.grad(f, argnums=(0, 1, 2))
        call = jax.jit(
            lambda: (
                jax.jvp(f, arrays, steps),
                jax.jvp(gradient, arrays, steps),
                jax.vmap(gradient)(*both),
                jax.grad(lambda *a: jnp.sum(jax.vmap(f)(*a)))(*both),
            )
        )
        return call()

    found = everything()
    with kernels.disabled():
        near(found, everything(), 1e-5)


def test_a_large_cache_has_a_gradient(monkeypatch):
    """That of the whole, although blocks of it are read in a loop of unknown length."""
    monkeypatch.setattr(attention, "CACHE_BLOCK", 2)
    arrays, positions = attention_problem()

    def loss(look, arrays):
        return jnp.sum(jnp.sin(look(*arrays, positions, multiplier=0.9, cap=5.0)))

    with kernels.disabled():
        of = jax.value_and_grad(loss, argnums=1)
        value, found = of(attention.attend_to_cache, arrays)
        whole, wanted = of(attention.attend, arrays)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    near(found, wanted, 1e-5)


def test_tokens_sorted_by_expert_have_tangents():
    """Those of the gradients, whose rows are read and not scattered."""
    index, valid = jnp.array([[0, 2], [2, 1], [1, 0]]), jnp.array([True, True, False])
    blocks = experts.group_by_expert(jnp.where(valid[:, None], index, -1), 3)
    x, gates = X[:3, :4], jnp.abs(X[:3, 4:6])

    def f(x, gates):
        rows = experts.rows_of_tokens(x, blocks)
        return experts.gated_sums(rows * rows, gates, blocks)

    def wanted(x, gates):
        return jnp.where(valid[:, None], x * x * gates.sum(axis=1, keepdims=True), 0)

    steps = jnp.cos(x), jnp.sin(gates)
    near(jax.jvp(f, (x, gates), steps), jax.jvp(wanted, (x, gates), steps), 1e-6)
    found, plain = (jax.vjp(g, x, gates)[1](jnp.sin(x)) for g in (f, wanted))
    near(found, plain, 1e-6)
    text = str(jax.make_jaxpr(jax.grad(lambda x: f(x, gates).sum()))(x))
    assert "scatter-add" not in text


# --- The model ------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_whole_model(activations):
    """With its packed weights, native kernels on: vmap over prompts and parameters, both modes."""
    apply, params = problem(activations)
    small = {name: params[name] for name in SMALL}

    def loss(small):
        return apply(params | small, None, TOKENS).logits.std()

    @jax.jit
    def everything():
        value, gradient = jax.value_and_grad(loss)(small)
        steps = jax.tree.map(jnp.sin, small)
        prompts = jax.vmap(lambda t: apply(params, None, t[None]).logits[0])(TOKENS)
        pair = jax.tree.map(lambda x: jnp.stack([x, 1.2 * x]), small)
        _, tangent = jax.jvp(loss, (small,), (steps,))
        return value, gradient, steps, prompts, jax.vmap(loss)(pair), tangent

    value, gradient, steps, prompts, pair, tangent = everything()
    inner = jax.tree.map(lambda g, s: jnp.sum(g * s), gradient, steps)
    np.testing.assert_allclose(sum(jax.tree.leaves(inner)), tangent, rtol=1e-3)
    np.testing.assert_allclose(pair[0], value, rtol=1e-5)
    together = jax.jit(apply)(params, None, TOKENS).logits
    np.testing.assert_allclose(prompts, together, atol=1e-4)  # float32, summed in another order


def test_gradients_of_a_tree_with_packed_bytes():
    """As JAX has them with allow_int: nothing for bytes, and the gradient of all floats."""
    w = weight("ternary2-64", 1)

    def loss(w):
        return quantize.grouped_dot(X, w, jnp.zeros(1, int)).std()

    with pytest.raises(TypeError, match="set allow_int to True"):
        jax.grad(loss)(w)
    found = jax.grad(loss, allow_int=True)(w)
    assert found.packed.dtype == found.multipliers.dtype == jax.dtypes.float0
    assert found.scales.shape == w.scales.shape and found.scales.any()


@pytest.mark.parametrize("name", ["ternary", "ternary-fit-64", "ternary2", "int8"])
def test_rounding_to_codes_has_no_gradient(name):
    f = formats.FORMATS[name]
    with pytest.raises(
        TypeError, match=r"a derivative for float32 \[12, 64\].*; use formats.FORMATS"
    ):
        jax.grad(lambda w: quantize.dequantize(f.quantize(w)).sum())(X)
    assert (jax.grad(lambda w: quantize.dequantize(f.train(w)).sum())(X) != 0).any()


# --- Token ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, CONFIG.vocab_size])
def test_ids_outside_of_the_vocabulary(wrong):
    apply, params = problem("float")
    tokens = TOKENS.at[1, 3].set(wrong)
    with pytest.raises(ValueError, match=f"token id {wrong} is not in the vocabulary, 0 to 60"):
        apply(params, None, tokens)
    logits = jax.jit(apply)(params, None, tokens).logits
    assert np.isnan(logits[1, 3:]).all() and np.isfinite(logits[0]).all()


# --- Weights in hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ternary", "ternary-fit-64", "ternary2", "int8"])
def test_one_expert_of_a_weight(name):
    w = weight(name)
    whole = quantize.dequantize(w)
    for i, one in enumerate(w):
        np.testing.assert_array_equal(quantize.dequantize(one), whole[i])
    assert i == 2 and w[-1].shape == (64, 64)
    with pytest.raises(IndexError, match="expert 3 of 3; the first is 0"):
        w[3]
    with pytest.raises(IndexError, match=r"a weight \[I, O\], \[64, 64\], has no experts"):
        w[0][0]


@pytest.mark.parametrize("outputs", [64, 5])
@pytest.mark.parametrize("name", ["ternary", "ternary-fit-128", "ternary2-64"])
def test_trits_and_back(name, outputs):
    w = weight(name, 2, outputs, inputs=256)
    assert w.interleaved == (outputs == 64)
    trits = quantize.trits_of(w)
    assert trits.dtype == jnp.int8 and set(np.unique(trits)) == {-1, 0, 1}
    same = quantize.with_trits(w, trits)
    assert jax.tree.structure(same) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, same, w)
    flipped = quantize.dequantize(quantize.with_trits(w, -trits))
    np.testing.assert_array_equal(flipped, -quantize.dequantize(w))
    with pytest.raises(ValueError, match="a trit is -1, 0 or 1, got 2; clip or round first"):
        quantize.with_trits(w, trits.at[..., 0, 0].set(2))
    with pytest.raises(ValueError, match="trits of this weight are .*, got"):
        quantize.with_trits(w, trits[..., :1])


def test_count():
    _, params = problem("float")
    wanted = sum(x.size for x in jax.tree.leaves(model.abstract_params(CONFIG)))
    assert quantize.count(params) == quantize.count(model.abstract_params(CONFIG)) == wanted
