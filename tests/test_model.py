"""The model: its tree, its relations with itself, and the NumPy reference."""

import dataclasses
import functools
import json

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import attention
import kernels
import learning
import model
import quantize
import runners
from model import PRECISIONS, PRESETS, KVMemory, LanguageModelConfig, init_memory, make_model

# Largest difference of float32 logits, whose standard deviation is 0.7 here, from float64 or from
# the same sums in another order: some 20 times the 5e-6 that we see. The residual stream is larger,
# and so are its errors; at positions near 260 a rotary angle itself is good to 2e-5 only, and
# logits to 1.2e-4 on one of our processors.
TOLERANCE = {"logits": 1e-4, "logits of a long text": 2e-4, "hidden": 5e-4, "router_probs": 1e-4}

CONFIG = factories.ODD
DENSE = dataclasses.replace(CONFIG, num_experts=1, num_selected_experts=1)


@functools.cache
def apply_of(config):
    return jax.jit(make_model(config).apply, static_argnames="last_only")


@functools.cache
def params_of(config, weights="ternary"):
    return factories.random_params(config, weights, groups=7)


def run(tokens, memory=None, lengths=None, config=CONFIG, weights="ternary", last_only=False):
    tokens = jnp.asarray(tokens)
    if lengths is None:
        lengths = [tokens.shape[1]] * len(tokens)
    lengths = jnp.asarray(lengths, jnp.int32)
    params = params_of(config, weights)
    return apply_of(config)(params, None, tokens, memory, lengths, last_only=last_only)


def assert_near(found, expected, what="logits"):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[what])


# --- Configuration and tree -----------------------------------------------------------------------


@functools.cache
def grok_1():
    return model.abstract_params(PRESETS["grok-1"])


def test_parameters_are_those_of_the_release_in_its_order():
    released = json.loads((factories.GOLDEN / "ckpt0_index.json").read_text())
    leaves, _ = jax.tree.flatten_with_path(grok_1())
    ours = [("|".join(key.key for key in path), list(leaf.shape)) for path, leaf in leaves]
    assert ours == [(tensor["path"], tensor["shape"]) for tensor in released]
    assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype("float32")}

    paths = [path.replace("|", "/") for path, _ in ours]
    kinds = quantize.match_rules(PRECISIONS["int8"], paths)
    names = {"int8": "int8", "float32": "f32"}
    assert [names[kinds[path]] for path in paths] == [tensor["kind"] for tensor in released]
    ternary = quantize.match_rules(PRECISIONS["ternary"], paths)
    assert {p for p in paths if ternary[p] == "ternary"} == {p for p in paths if kinds[p] == "int8"}


def test_grok_1_has_314_billion_parameters():
    experts = 3 * 8 * 6144 * 32768
    attention = 2 * 6144 * 48 * 128 + 2 * 6144 * 8 * 128
    norms_and_router = 4 * 6144 + 6144 * 8
    total = 64 * (experts + attention + norms_and_router) + 131072 * 6144 + 6144
    leaves = jax.tree.leaves(grok_1())
    assert sum(leaf.size for leaf in leaves) == total == 315_684_820_992


@pytest.mark.parametrize(
    "emb_size, widening, ffn_size", [(6144, 8, 32768), (96, 3, 192), (96, 4, 256), (35, 2, 48)]
)
def test_ffn_size(emb_size, widening, ffn_size):
    assert LanguageModelConfig(emb_size=emb_size, widening_factor=widening).ffn_size == ffn_size


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_a_file(name):
    values = json.loads(json.dumps(dataclasses.asdict(PRESETS[name])))
    assert model.config_from_dict(values) == PRESETS[name]


def test_no_configuration_is_grok_1():
    assert model.config_from_dict(None) == PRESETS["grok-1"]


@pytest.mark.parametrize(
    "name, value, type_",
    [
        ("vocab_size", "80", "int"),
        ("vocab_size", 2.0, "int"),
        ("vocab_size", None, "int"),
        ("num_layers", True, "int"),
        ("emb_size", [1], "int"),
        ("emb_size", 10**400, "int"),
        ("attn_logit_cap", "30", "float"),
        ("attn_logit_cap", float("nan"), "float"),
        ("rms_norm_eps", float("inf"), "float"),
        ("widening_factor", False, "float"),
        ("fprop_dtype", 32, "str"),
    ],
)
def test_values_of_another_type_are_named(name, value, type_):
    values = model.config_to_dict(PRESETS["tiny"]) | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be of type {type_}, got .*; correct conf"):
        model.config_from_dict(values)


def test_missing_configuration_keys():
    values = dataclasses.asdict(PRESETS["tiny"])
    del values["attn_output_multiplier"], values["activations"]
    with pytest.raises(ValueError, match=r"lacks \['attn_output_multiplier'\]; add them"):
        model.config_from_dict(values)


def test_unknown_configuration_keys():
    values = dataclasses.asdict(PRESETS["tiny"]) | {"num_leyers": 3}
    with pytest.raises(ValueError, match=r"unknown configuration keys \['num_leyers'\]; known: \["):
        model.config_from_dict(values)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"num_q_heads": 7}, "num_q_heads 7 is not a multiple of num_kv_heads 3"),
        ({"key_size": 9}, "key_size must be even for RoPE, got 9"),
        ({"num_selected_experts": 6}, "6 is not between 1 and num_experts 5"),
        ({"num_selected_experts": 0}, "0 is not between 1 and num_experts 5"),
        ({"fprop_dtype": "float16"}, "'float32' or 'bfloat16', got 'float16'"),
        ({"activations": "int4"}, "one of .*'int15'.*, got 'int4'"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


# --- Against NumPy --------------------------------------------------------------------------------


def assert_like_reference(config, weights, tokens):
    output = run(tokens, config=config, weights=weights)
    params = factories.as_floats(params_of(config, weights))
    for row, ids in enumerate(tokens):
        logits, hidden, probs, chosen = reference.forward(config, params, ids)
        what = "logits of a long text" if len(ids) > 257 else "logits"
        assert_near(output.logits[row], logits, what)
        ours = np.stack([layer.hidden[row] for layer in output.layers])
        assert_near(ours, hidden[1:], "hidden")
        if config.num_experts > 1:
            ours = np.stack([layer.router_probs[row] for layer in output.layers])
            assert_near(ours, probs, "router_probs")
            ours = np.stack([layer.expert_index[row] for layer in output.layers])
            assert np.array_equal(np.sort(ours), np.sort(chosen))
        else:
            assert all(layer.router_probs is None for layer in output.layers)


@pytest.mark.parametrize("weights", ["float32", "int8", "ternary"])
@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["experts", "dense"])
def test_reference_on_long_sequences(config, weights):
    """Past position 257, where rounded rotary angles show."""
    assert_like_reference(config, weights, factories.random_tokens(config, 2, 263))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 2, "num_selected_experts": 1, "num_kv_heads": 6},
        {"num_experts": 3, "num_selected_experts": 3, "num_kv_heads": 1},
        {"num_experts": 11, "num_selected_experts": 4},
        {"rope_base": 100, "rms_norm_eps": 0.1, "attn_logit_cap": 3.0},
    ],
    ids=str,
)
def test_reference_with_other_sizes(changes):
    config = dataclasses.replace(CONFIG, num_layers=1, **changes)
    assert_like_reference(config, "ternary", factories.random_tokens(config, 2, 31))


@pytest.mark.parametrize("weights", ["float32", "int8", "ternary"])
def test_int8_activations(weights):
    """Here and there float32 and float64 round to neighbouring codes; the rounding as a whole
    moves the logits five times as far as that or more."""
    config = dataclasses.replace(CONFIG, activations="int8")
    tokens = factories.random_tokens(config, 2, 263)
    logits = run(tokens, config=config, weights=weights).logits
    params = factories.as_floats(params_of(config, weights))
    expected, *_ = reference.forward(config, params, tokens[0])
    unrounded = run(tokens, weights=weights).logits
    error = np.sqrt(np.mean((logits[0] - expected) ** 2))
    effect = np.sqrt(np.mean((logits - unrounded)[0] ** 2))
    assert error < effect / 5, (error, effect)


def test_rotary_embedding_far_out():
    positions = np.array([0, 1, 255, 257, 258, 1023, 8191])
    x = np.random.default_rng(0).standard_normal((len(positions), 3, 14))
    found = model.rotary_embedding(jnp.asarray(x[None], jnp.float32), positions[None], 10000)
    expected = reference.rotate(x, positions, 10000)
    # A float32 angle of 8191 radians is good to 5e-4.
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-3)
    np.testing.assert_allclose(found[0, :5], expected[:5], rtol=0, atol=1e-4)
    rounded = jnp.asarray(x[None], jnp.bfloat16)
    found = model.rotary_embedding(rounded, positions[None], 10000)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0].astype(jnp.float32), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("slots", [5, 8, 16, 19, 23])
@pytest.mark.parametrize("dtype, error", [("float32", 2e-6), ("bfloat16", 2e-2)])
@kernels.disabled()
def test_attention_in_blocks_of_the_cache(slots, dtype, error, monkeypatch):
    """Every number of blocks, the last one cut short or not; what is behind is not even read."""
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)
    random = np.random.default_rng(0)
    q = jnp.asarray(3 * random.standard_normal((3, 2, 6, 4)), dtype)
    k, v = (jnp.asarray(random.standard_normal((3, 2, slots, 4)), dtype) for _ in range(2))
    blocks = jax.jit(attention.attend_to_cache, static_argnums=(4, 5))
    for last in range(1, slots + 2):  # one more than there are: padding may lie behind the cache
        positions = jnp.array([[last - 1, last], [0, 0], [last // 2, last // 2 + 1]])
        expected = attention.attend(q, k, v, positions, multiplier=0.7, cap=5.0)
        behind = (min(last, slots - 1) // 8 + 1) * 8 if slots > 8 else slots
        hidden = [x.at[:, :, min(behind, slots - 8) + 8 :].set(jnp.nan) for x in (k, v)]
        found = blocks(q, *(hidden if slots > 8 else (k, v)), positions, 0.7, 5.0)
        assert found.dtype == q.dtype
        difference = np.asarray(found, np.float32) - np.asarray(expected, np.float32)
        assert np.abs(difference).max() <= error


def test_a_large_cache_gives_the_same_logits(monkeypatch):
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)
    tokens = factories.random_tokens(CONFIG, 3, 29)
    whole = run(tokens)
    apply = jax.jit(make_model(CONFIG).apply)
    output = apply(params_of(CONFIG), None, tokens[:, :28], init_memory(CONFIG, 3))
    assert_near(output.logits, whole.logits[:, :28])
    output = apply(params_of(CONFIG), None, tokens[:, 28:], output.model_state)
    assert_near(output.logits[:, 0], whole.logits[:, 28])


# --- The model and itself -------------------------------------------------------------------------


def test_prefill_and_decode_are_one_pass():
    tokens = factories.random_tokens(CONFIG, 3, 29)
    whole = run(tokens)
    prefill = run(tokens[:, :11], init_memory(CONFIG, 3))
    assert_near(prefill.logits, whole.logits[:, :11])
    memory = prefill.model_state
    for t in range(11, 29):
        output = run(tokens[:, t : t + 1], memory)
        memory = output.model_state
        assert_near(output.logits[:, 0], whole.logits[:, t])
    assert memory.step.tolist() == [29, 29, 29]


def test_prefill_in_chunks_of_different_lengths():
    """Each row continues where it stands; a chunk's padding leaves no trace."""
    tokens = np.asarray(factories.random_tokens(CONFIG, 3, 29))
    whole = run(tokens)
    memory = init_memory(CONFIG, 3)
    done = np.zeros(3, int)
    while (done < 29).any():
        lengths = np.minimum([7, 11, 4], 29 - done)
        chunk = np.zeros((3, 11), np.int32)
        for row, (start, length) in enumerate(zip(done, lengths, strict=True)):
            chunk[row, :length] = tokens[row, start : start + length]
        output = run(chunk, memory, lengths)
        memory = output.model_state
        for row, (start, length) in enumerate(zip(done, lengths, strict=True)):
            expected = whole.logits[row, start : start + length]
            assert_near(output.logits[row, :length], expected)
        done += lengths
    assert memory.step.tolist() == [29, 29, 29]


def test_last_only_is_the_last_real_token():
    tokens = factories.random_tokens(CONFIG, 4, 29)
    lengths = [29, 1, 8, 0]
    every = run(tokens, None, lengths).logits
    last = run(tokens, None, lengths, last_only=True).logits
    assert last.shape == (4, CONFIG.vocab_size)
    for row, length in enumerate(lengths[:3]):
        assert_near(last[row], every[row, length - 1])
    assert not last[3].any()


def test_a_row_does_not_see_its_batch():
    tokens = factories.random_tokens(CONFIG, 3, 29)
    others = factories.random_tokens(CONFIG, 3, 29, seed=1).at[2].set(tokens[2])
    together = run(tokens).logits
    assert_near(run(tokens[2:3]).logits[0], together[2])
    # In the same shape the very same products are summed, wherever they lie.
    assert np.array_equal(run(others).logits[2], together[2])


def test_padding_changes_nothing():
    tokens = factories.random_tokens(CONFIG, 3, 29)
    lengths = [29, 12, 20]
    padded = run(tokens.at[1, 12:].set(0), None, lengths)
    other = run(tokens.at[1, 12:].set(7), None, lengths)
    assert np.array_equal(padded.logits[1, :12], other.logits[1, :12])
    assert np.array_equal(padded.logits[0], other.logits[0])
    assert_near(padded.logits[1, :12], run(tokens[1:, :12]).logits[0])


def test_padding_skips_the_experts():
    """Other experts give real tokens another output, and padding the same: none."""
    tokens, lengths = factories.random_tokens(CONFIG, 3, 29), jnp.array([29, 12, 20])
    params = params_of(CONFIG)
    module = "transformer/decoder_layer_0/moe/linear_1"
    w = params[module]["w"]
    others = params | {module: {"w": dataclasses.replace(w, scales=-w.scales)}}
    ours, theirs = (
        apply_of(CONFIG)(p, None, tokens, None, lengths, last_only=False).layers[0].hidden
        for p in (params, others)
    )
    same = np.all(ours == theirs, axis=-1)
    assert np.array_equal(same, np.arange(29) >= lengths[:, None])


def test_zero_is_a_token_like_any_other():
    """The reference hides id 0 from attention; here lengths alone say what is padding."""
    tokens = factories.random_tokens(CONFIG, 3, 29).at[:, 4].set(0)
    assert_like_reference(CONFIG, "ternary", tokens)


def test_an_idle_row_keeps_its_cache():
    tokens = factories.random_tokens(CONFIG, 3, 12)
    before = run(tokens[:, :11], init_memory(CONFIG, 3), [11, 5, 3]).model_state
    idle = run(tokens[:, 11:], before, [1, 0, 1]).model_state
    assert idle.step.tolist() == [12, 5, 4]
    for layer, old in zip(idle.layers, before.layers, strict=True):
        for cache, old_cache in zip(layer, old, strict=True):
            assert np.array_equal(cache[1, :, :5], old_cache[1, :, :5])
            assert not np.array_equal(cache[0, :, 11], old_cache[0, :, 11])
    # What an idle step may have left behind is overwritten before it is seen.
    token = tokens[:, 5:6]
    assert np.array_equal(run(token, idle).logits[1], run(token, before).logits[1])


def test_writing_past_the_cache_is_dropped():
    memory = KVMemory(*jnp.full((2, 1, 1, 4, 2), -1.0))
    new = jnp.arange(3.0)[None, :, None, None] * jnp.ones((1, 3, 1, 2))  # [B, T, K, H]
    k, v = model.write_memory(memory, new, 10 + new, jnp.array([[2, 3, 4]]))
    assert k[0, 0, :, 0].tolist() == [-1, -1, 0, 1]
    assert v[0, 0, :, 0].tolist() == [-1, -1, 10, 11]


def test_memory_has_the_compute_dtype():
    config = dataclasses.replace(CONFIG, fprop_dtype="bfloat16")
    memory = init_memory(config, 3, 5)
    assert {leaf.shape for leaf in jax.tree.leaves(memory.layers)} == {(3, 3, 5, 14)}
    tokens = factories.random_tokens(config, 3, 2)
    output = jax.eval_shape(make_model(config).apply, params_of(config), None, tokens, memory)
    assert {leaf.dtype for leaf in jax.tree.leaves(output.model_state.layers)} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert {layer.hidden.dtype for layer in output.layers} == {jnp.dtype(jnp.bfloat16)}
    assert {layer.router_probs.dtype for layer in output.layers} == {jnp.dtype(jnp.float32)}
    assert output.logits.dtype == jnp.float32


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels_or_plain")
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("weights", ["ternary", "int8", factories.slow("ternary-experts")])
def test_the_gradient_of_a_loaded_model_is_that_of_its_matrices(weights, activations):
    """To scales, norms, routers and the table, here of int8 rows: as if the packed weights were the
    floats that they stand for, with the same rounded activations."""
    config = dataclasses.replace(CONFIG, num_layers=1, activations=activations, embeddings="int8")
    tokens = factories.random_tokens(config, 2, 8)
    leaves, tree = jax.tree.flatten(
        runners.cast_embeddings(factories.random_params(config, weights, groups=7), config)
    )
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(floats, seen):
        rest = iter(floats)
        params = jax.tree.unflatten(
            tree, [next(rest) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in leaves]
        )
        params = {m: {n: seen(w) for n, w in entries.items()} for m, entries in params.items()}
        output = make_model(config).apply(params, None, tokens[:, :-1])
        return jnp.mean(learning.cross_entropy(output.logits, tokens[:, 1:]))

    # All matrices in one norm: where a norm follows, the gradient of a scale is next to nothing.
    found, expected = (
        np.concatenate([np.ravel(g.astype(jnp.float32)) for g in jax.jit(jax.grad(f))(floats)])
        for f in (
            functools.partial(loss, seen=lambda w: w),
            functools.partial(loss, seen=quantize.dequantize),
        )
    )
    # A sum in another order moves a value over an edge of its rounding here and there.
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_pass_that_writes_the_cache_has_a_gradient():
    """Of one cached pass, the gradient of a pass without a cache."""
    tokens = factories.random_tokens(CONFIG, 2, 9)
    params = params_of(CONFIG, "float32")

    def loss(params, memory):
        logits = make_model(CONFIG).apply(params, None, tokens, memory).logits
        return jnp.mean(jnp.square(logits))

    cached, plain = (
        jax.jit(jax.grad(loss))(params, memory) for memory in (init_memory(CONFIG, 2), None)
    )
    for found, expected in zip(jax.tree.leaves(cached), jax.tree.leaves(plain), strict=True):
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_decode_step_of_grok_1_unpacks_no_matrix():
    """Nothing that it computes is larger than the packed query matrix, 5 % of one expert's."""
    config = dataclasses.replace(PRESETS["grok-1"], num_layers=1)

    def one(w):
        trits = jax.ShapeDtypeStruct(w.shape, jnp.int8)
        scales = jax.ShapeDtypeStruct((*w.shape[:-2], 1, 1), jnp.float32)
        return jax.eval_shape(quantize.pack, trits, scales)

    template = model.abstract_params(config)
    kinds = quantize.match_rules(
        PRECISIONS["ternary"], [f"{m}/{n}" for m in template for n in template[m]]
    )
    params = {
        m: {n: one(w) if kinds[f"{m}/{n}"] == "ternary" else w for n, w in entries.items()}
        for m, entries in template.items()
    }
    embed = params["language_model/in_out_embed"]
    embed["embeddings"] = embed["embeddings"].update(dtype=jnp.bfloat16)
    memory = jax.eval_shape(lambda: init_memory(config, 1))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    apply = functools.partial(make_model(config).apply, last_only=True)
    largest = factories.largest_array(apply, params, None, token, memory)
    assert largest <= 6144 * 6144 // 4


def test_an_unknown_choice_of_weights():
    with pytest.raises(ValueError, match=r"unknown choice of weights 'half'; known: \['ternary'"):
        model.precision_table("half")
