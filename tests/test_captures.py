"""Values of a forward pass by name: those of the NumPy reference, and others in their place."""

import dataclasses
import functools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import captures
import kernels
import model
import sharding

CONFIG = dataclasses.replace(factories.ODD, sequence_len=12)
DENSE = dataclasses.replace(CONFIG, num_experts=1, num_selected_experts=1)
TOKENS = factories.random_tokens(CONFIG, 2, 7)
GROK = model.make_model(CONFIG)
TOLERANCE = 5e-4  # that of hidden states in test_model.py


@functools.cache
def params_of(config=CONFIG, weights="ternary"):
    return factories.random_params(config, weights)


@functools.cache
def found(config=CONFIG):
    """Everything that there is to see of TOKENS."""
    call = jax.jit(captures.capture(model.make_model(config).apply, "*"))
    return call(params_of(config), None, TOKENS)


def run(values=None, *names):
    f = GROK.apply if values is None else captures.replace(GROK.apply, values)
    return jax.jit(captures.capture(f, *names) if names else f)(params_of(), None, TOKENS)


@functools.cache
def plain():
    return run().logits


# --- What is captured -----------------------------------------------------------------------------


def of_reference(monkeypatch, config, row):
    """{name: [calls of layer 0, 1, ...]} of what the reference computes on the way, [T, ...]."""
    seen: dict[str, list] = {}

    def noting(name):
        f = getattr(reference, name)

        def noted(*args):
            y = f(*args)
            seen.setdefault(name, []).append(np.array(y))
            return y

        monkeypatch.setattr(reference, name, noted)

    for name in ("rms_norm", "linear", "rotate", "softmax", "attention", "feed_forward"):
        noting(name)
    logits, hidden, *_ = reference.forward(config, factories.as_floats(params_of(config)), row)
    return seen, logits, hidden


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["experts", "dense"])
def test_values_are_those_of_the_reference(config, monkeypatch):
    seen = found(config)[1]
    for b in range(len(TOKENS)):
        with monkeypatch.context() as patch:
            calls, logits, hidden = of_reference(patch, config, TOKENS[b])

        def near(name, wanted, b=b):
            np.testing.assert_allclose(seen[name][b], wanted, rtol=0, atol=TOLERANCE, err_msg=name)

        near("logits", logits)
        near("embedding", hidden[0])
        near("rms_norm", calls["rms_norm"][-1])
        heads, experts = config.num_q_heads, config.num_experts
        of_experts = 3 * experts
        for i in range(config.num_layers):
            layer = f"layer_{i}"
            for j, name in enumerate(("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3")):
                near(f"{layer}/{name}", calls["rms_norm"][4 * i + j])
            near(f"{layer}/hidden", hidden[i + 1])
            near(f"{layer}/middle", hidden[i] + calls["rms_norm"][4 * i + 1])
            near(f"{layer}/attention/output", calls["attention"][i])
            of_layer = calls["linear"][(4 + of_experts) * i :][: 4 + of_experts]
            for name, y in zip(("query", "key", "value"), of_layer, strict=False):
                near(f"{layer}/attention/{name}", y.reshape(7, -1, config.key_size))
            near(f"{layer}/attention/rotated_query", calls["rotate"][2 * i])
            near(f"{layer}/attention/rotated_key", calls["rotate"][2 * i + 1])
            softmaxes = calls["softmax"][(heads + (experts > 1)) * i :]
            near(f"{layer}/attention/weights", np.stack(softmaxes[:heads]))
            if experts == 1:
                near(f"{layer}/experts/output", calls["feed_forward"][i])
                continue
            probs, outputs = softmaxes[heads], np.stack(calls["feed_forward"][experts * i :])
            chosen = np.argsort(-probs, axis=-1)[:, : config.num_selected_experts]
            np.testing.assert_array_equal(seen[f"{layer}/router/chosen"][b], chosen)
            logits = seen[f"{layer}/router/logits"][b]
            np.testing.assert_allclose(jax.nn.softmax(logits), probs, atol=TOLERANCE)
            gates = np.zeros_like(probs)
            np.put_along_axis(gates, chosen, np.take_along_axis(probs, chosen, -1), -1)
            near(f"{layer}/router/gates", gates)
            token = np.arange(7)[:, None]
            near(f"{layer}/experts/outputs", outputs[chosen, token])
            near(f"{layer}/experts/output", np.einsum("te,etd->td", gates, outputs[:experts]))


def test_values_go_on_to_what_is_computed_from_them():
    """The hidden neurons, which the reference does not have by themselves, and the heads."""
    output, seen = found()
    np.testing.assert_allclose(output.logits, plain(), atol=TOLERANCE)
    np.testing.assert_array_equal(output.layers[1].hidden, seen["layer_1/hidden"])
    gates = jnp.take_along_axis(seen["layer_1/router/gates"], seen["layer_1/router/chosen"], -1)
    total = jnp.einsum("bta,btad->btd", gates, seen["layer_1/experts/outputs"])
    np.testing.assert_allclose(total, seen["layer_1/experts/output"], atol=1e-5)
    values = seen["layer_0/attention/value"].repeat(2, axis=2)  # of the head of each query
    heads = jnp.einsum("bnts,bsnh->btnh", seen["layer_0/attention/weights"], values)
    np.testing.assert_allclose(heads, seen["layer_0/attention/heads"], atol=1e-5)
    zeros = run({"layer_0/experts/hidden": jnp.zeros_like}, "layer_0/experts/output")[1]
    assert not zeros["layer_0/experts/output"].any()


def test_names_without_computing():
    shapes = captures.names(GROK.apply, params_of(), None, TOKENS)
    wanted = {name: (x.shape, x.dtype) for name, x in found()[1].items()}
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == wanted
    assert len(shapes) == 3 + 20 * CONFIG.num_layers


def test_patterns_stop_at_slashes():
    seen = captures.names(GROK.apply, params_of(), None, TOKENS)
    picked = jax.eval_shape(
        lambda: captures.capture(GROK.apply, "layer_*/hidden", "lo*")(params_of(), None, TOKENS)[1]
    )
    assert picked.keys() == {"layer_0/hidden", "layer_1/hidden", "logits"} and len(seen) > 40


def test_nothing_is_added_to_a_program_that_is_not_watched(monkeypatch):
    def program():
        return str(jax.make_jaxpr(GROK.apply)(params_of(), None, TOKENS))

    before = program()
    jax.make_jaxpr(captures.capture(GROK.apply, "*"))(params_of(), None, TOKENS)
    assert program() == before
    monkeypatch.setattr(captures, "tap", lambda name, value: value)
    assert program() == before


def test_what_is_not_hidden_leaves_the_logits_as_they_are():
    """No other kernel is given up: bit for bit."""
    output, _ = run(None, "layer_*/hidden", "layer_*/router/*", "layer_*/attention/query")
    np.testing.assert_array_equal(output.logits, plain())


@pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels: no compiler, or a GPU")
def test_only_what_hides_a_value_is_given_up():
    call = captures.capture(GROK.apply, "layer_0/attention/weights")
    text = str(jax.make_jaxpr(call)(params_of(), None, TOKENS))
    assert text.count("ternary_grok_Attend ") + text.count("ternary_grok_Attend\n") <= 1
    assert "ternary_grok_RmsNorm" in text and "ternary_grok_Rotate" in text


# --- Replacing ------------------------------------------------------------------------------------


def test_what_is_replaced_is_what_goes_on():
    seen = found()[1]
    same = run({name: seen[name] for name in ("layer_0/hidden", "layer_1/attention/query")})
    np.testing.assert_allclose(same.logits, plain(), atol=TOLERANCE)
    direction = jnp.linspace(-1, 1, CONFIG.emb_size)
    output, after = run({"layer_1/hidden": lambda h: h + direction}, "layer_1/hidden")
    np.testing.assert_allclose(
        after["layer_1/hidden"], seen["layer_1/hidden"] + direction, atol=TOLERANCE
    )
    assert np.abs(output.logits - plain()).max() > 0.01


def test_patching_one_position_brings_the_other_prompts_logits():
    """All of the last layer's stream from another prompt gives that prompt's logits."""
    other = found()[1]["layer_1/hidden"][::-1]
    np.testing.assert_allclose(run({"layer_1/hidden": other}).logits, plain()[::-1], atol=TOLERANCE)
    last = lambda h: h.at[:, -1].set(other[:, -1])  # noqa: E731
    logits = run({"layer_1/hidden": last}).logits
    np.testing.assert_allclose(logits[:, -1], plain()[::-1, -1], atol=TOLERANCE)
    np.testing.assert_allclose(logits[:, :-1], plain()[:, :-1], atol=TOLERANCE)


def test_experts_can_be_silenced_or_avoided_or_chosen():
    def avoided(logits):
        return logits.at[..., 3].set(-jnp.inf)

    output, seen = run({"layer_*/router/logits": avoided}, "layer_*/router/chosen")
    assert not any((x == 3).any() for x in seen.values())
    assert (found()[1]["layer_0/router/chosen"] == 3).any()
    silenced = run({"layer_0/router/gates": lambda g: g.at[..., 3].set(0)}, "layer_0/*/output")[1]
    gates = found()[1]["layer_0/router/gates"].at[..., 3].set(0)
    gates = jnp.take_along_axis(gates, found()[1]["layer_0/router/chosen"], axis=-1)
    total = jnp.einsum("bta,btad->btd", gates, found()[1]["layer_0/experts/outputs"])
    np.testing.assert_allclose(silenced["layer_0/experts/output"], total, atol=TOLERANCE)
    forced = jnp.zeros((2, 7, 2), jnp.int32).at[..., 1].set(4)
    gates = run({"layer_0/router/chosen": forced}, "layer_0/router/gates")[1]
    assert ((gates["layer_0/router/gates"] > 0) == jnp.isin(jnp.arange(5), jnp.array([0, 4]))).all()


def test_transformations_of_both():
    """grad with respect to an activation, vmap over strengths, jvp: as finite differences say."""
    name, direction = "layer_0/hidden", jnp.linspace(-1, 1, CONFIG.emb_size)
    config = dataclasses.replace(CONFIG, num_layers=1)
    apply, params = model.make_model(config).apply, params_of(config, "float32")

    def f(strength):
        changed = captures.replace(apply, {name: lambda h: h + strength * direction})
        output, seen = captures.capture(changed, name)(params, None, TOKENS)
        return output.logits.std(), seen[name]

    def of_activation(h):
        return captures.replace(apply, {name: h})(params, None, TOKENS).logits.std()

    @jax.jit
    def everything():
        values, seen = jax.vmap(f)(jnp.array([-1e-2, 0, 1e-2]))
        gradient = jax.grad(lambda s: f(s)[0])(0.0)
        _, tangent = jax.jvp(lambda s: f(s)[0], (0.0,), (1.0,))
        return values, gradient, tangent, jax.grad(of_activation)(seen[1])

    values, gradient, tangent, each = everything()
    np.testing.assert_allclose([gradient, tangent], (values[2] - values[0]) / 2e-2, rtol=0.02)
    np.testing.assert_allclose(jnp.sum(each * direction), gradient, rtol=1e-3)


# --- With a cache, and on a mesh ------------------------------------------------------------------


def test_prefill_and_decode_see_what_one_pass_does():
    names = ("layer_1/attention/weights", "layer_*/hidden", "layer_*/experts/outputs")
    look = jax.jit(captures.capture(GROK.apply, *names))
    memory = model.init_memory(CONFIG, 2)
    output, first = look(params_of(), None, TOKENS[:, :6], memory)
    _, last = look(params_of(), None, TOKENS[:, 6:], output.model_state)
    for name, whole in found()[1].items():
        if name in first and not name.endswith("weights"):
            both = jnp.concatenate([first[name], last[name]], axis=1)
            np.testing.assert_allclose(both, whole, atol=TOLERANCE, err_msg=name)
    weights = last["layer_1/attention/weights"]
    assert weights.shape == (2, 6, 1, 12)  # of all slots of the cache
    np.testing.assert_allclose(
        weights[..., 0, :7], found()[1]["layer_1/attention/weights"][:, :, -1], atol=TOLERANCE
    )
    assert not weights[..., 7:].any()


def test_on_a_mesh():
    config = dataclasses.replace(factories.EVEN, activations="int8", num_layers=1)
    params, tokens = factories.random_params(config), factories.random_tokens(config, 2, 5)
    grok = model.make_model(config)
    call = jax.jit(captures.capture(grok.apply, "*"))
    alone = call(params, None, tokens)
    mesh = sharding.make_mesh(2, 4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.parameter_shardings(mesh, params))
        output, seen = call(placed, None, tokens)
    assert seen.keys() == alone[1].keys()
    for name, value in seen.items():
        np.testing.assert_allclose(value, alone[1][name], atol=TOLERANCE, err_msg=name)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f, error, message",
    [
        (
            lambda f: captures.capture(f, "layer_0/attention/wieghts"),
            ValueError,
            "no value is named 'layer_0/attention/wieghts'; near are layer_0/attention/weights, .*"
            "captures.names lists all",
        ),
        (
            lambda f: captures.replace(f, {"layer_7/hidden": jnp.zeros_like}),
            ValueError,
            "no value is named 'layer_7/hidden'; near are layer_",
        ),
        (lambda f: captures.replace(f, {"logits": None}), ValueError, "'logits' is replaced by No"),
        (
            lambda f: captures.replace(f, {"layer_0/hidden": jnp.zeros(3)}),
            ValueError,
            r"layer_0/hidden is float32 \[2, 7, 35\], and what replaces it float32 \[3\]; give an",
        ),
        (
            lambda f: captures.capture(lambda *args: [f(*args), f(*args)], "logits"),
            ValueError,
            "logits is computed twice here; capture each call by itself",
        ),
        (
            lambda f: captures.capture(jax.jit(lambda *args: f(*args)), "logits"),
            RuntimeError,
            r"logits is computed inside another transformation .* as in jax.jit\(capture\(f",
        ),
        (
            lambda f: captures.capture(lambda *args: jnp.zeros(3), "logits"),
            ValueError,
            "no value is named 'logits'; none was computed: is the model called",
        ),
    ],
)
def test_errors(f, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: f(GROK.apply)(params_of(), None, TOKENS))
    assert captures._watches.get() == ()
