"""The same numbers on every mesh of eight CPU devices, and arrays where they belong."""

import dataclasses
import functools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import quantize
import sharding
from model import MEMORY_AXES, Memory, abstract_params, init_memory, make_model
from runners import cast_embeddings, decode_step, empty_slots

CONFIG = dataclasses.replace(factories.EVEN, num_layers=1)
DENSE = dataclasses.replace(CONFIG, num_experts=1, num_selected_experts=1)
INT8_ACTIVATIONS = dataclasses.replace(CONFIG, activations="int8")
MODULE = "transformer/decoder_layer_0/"

# Of float32 logits, whose standard deviation is 0.7: a mesh sums in another order. Gradients:
# relative to the largest of each parameter.
TOLERANCE = {"logits": 1e-4, "gradient": 1e-4}


@functools.cache
def params_of(config, weights):
    return factories.random_params(config, weights, groups=8)


@functools.cache
def unsharded(config, weights, batch):
    tokens = factories.random_tokens(config, batch, 13)
    return jax.jit(make_model(config).apply)(params_of(config, weights), None, tokens)


def on_mesh(config, weights, batch, mesh):
    tokens = factories.random_tokens(config, batch, 13)
    params = params_of(config, weights)
    params = jax.device_put(params, sharding.parameter_shardings(mesh, params))
    with jax.set_mesh(mesh):
        return jax.jit(make_model(config).apply)(params, None, tokens)


def assert_near(found, expected, what="logits"):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[what])


# --- The same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights, data, model, batch",
    [
        ("ternary", 1, 1, 8),
        ("ternary", 1, 8, 8),
        ("ternary", 2, 4, 8),
        ("ternary", 8, 1, 8),
        ("ternary", 2, 4, 3),  # a batch that does not split is computed whole on every device
        ("int8", 1, 8, 8),
        ("float32", 2, 4, 8),
    ],
)
def test_logits_do_not_depend_on_the_mesh(weights, data, model, batch):
    found = on_mesh(CONFIG, weights, batch, sharding.make_mesh(data, model))
    expected = unsharded(CONFIG, weights, batch)
    assert_near(found.logits, expected.logits)
    assert_near(found.layers[0].router_probs, expected.layers[0].router_probs)
    assert np.array_equal(found.layers[0].expert_index, expected.layers[0].expert_index)


def test_a_dense_model_on_a_mesh():
    found = on_mesh(DENSE, "ternary", 8, sharding.make_mesh(2, 4))
    assert_near(found.logits, unsharded(DENSE, "ternary", 8).logits)


@pytest.mark.parametrize("weights", ["int8", "ternary"])
def test_int8_activations_on_a_mesh(weights):
    """The maximum of a row is that of all its shards: each shard's own would move the logits by
    half of what rounding moves them. A value on the edge may still round to the other side."""
    found = on_mesh(INT8_ACTIVATIONS, weights, 8, sharding.make_mesh(2, 4)).logits
    expected = unsharded(INT8_ACTIVATIONS, weights, 8).logits
    error = np.sqrt(np.mean((found - expected) ** 2))
    effect = np.sqrt(np.mean((unsharded(CONFIG, weights, 8).logits - expected) ** 2))
    assert error < effect / 10, (error, effect)


@pytest.mark.parametrize("model", [2, 3, 4, 8])
def test_integer_products_are_exact_on_a_mesh(model):
    """Ternary weights and int8 activations: to the last bit, wherever the inputs are split, or not
    split: by 3 they are not, and then every device has the whole sum already."""
    w = np.random.default_rng(0).standard_normal((160, 13)).astype(np.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 160)), jnp.float32)
    w = factories.ternarize(w)

    def dot(x, w):
        axis = sharding.mesh_axis("ffn", 160)
        return quantize.dot(x, w, activations="int8", axis_name=axis)

    split = sharding.shard_map(dot, ((None, "ffn"), ("ffn", "embed")), (None, "embed"))
    expected = jax.jit(split)(x, w)
    with jax.set_mesh(sharding.make_mesh(1, model)):
        assert np.array_equal(jax.jit(split)(x, w), expected)


def test_sizes_that_do_not_split_are_computed_whole():
    """Neither experts nor vocabulary split in three. A threefold sum would hide behind the norm
    that follows it, but for its epsilon: that moves these logits by 7e-4."""
    config, tokens = CONFIG, factories.random_tokens(CONFIG, 8, 13)
    with jax.set_mesh(sharding.make_mesh(1, 3)):
        found = jax.jit(make_model(config).apply)(params_of(config, "ternary"), None, tokens)
    assert_near(found.logits, unsharded(config, "ternary", 8).logits)


@pytest.mark.parametrize("data, model", [(1, 8), (2, 4), (1, 3)])  # 3 does not divide 104
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_rows_of_a_table_on_a_mesh(kind, data, model):
    """To the last bit, for zeros are all that is added. Gradients, of the float32 that is trained,
    go to the rows that were read."""
    table = np.random.default_rng(0).standard_normal((104, 7)).astype(np.float32)
    table = jnp.asarray(table)
    table = quantize.quantize_table(table) if kind == "int8" else table.astype(kind)
    index = jnp.array([[0, 103, 12, 13, 14, 51], [52, 3, 3, 77, 91, 40]])
    axes = (("vocab", None), ("batch", None))

    def rows(table):
        look = functools.partial(
            quantize.table_rows, axis_name=sharding.mesh_axis("vocab", table.shape[0])
        )
        return sharding.shard_map(look, axes, ("batch", None, None))(table, index)

    def gradient(table):
        return jax.grad(lambda table: jnp.sum(rows(table) ** 2))(table) if kind == "float32" else 0

    expected = quantize.table_rows(table, index), jax.jit(gradient)(table)
    with jax.set_mesh(sharding.make_mesh(data, model)):
        found = jax.jit(lambda table: (rows(table), gradient(table)))(table)
    assert np.array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=TOLERANCE["gradient"], atol=0)


@pytest.mark.parametrize("embeddings", ["float", "int8"])
def test_no_device_needs_the_whole_table(embeddings):
    """Each looks into its own part. For a single index XLA:GPU gathered all of it, 1.6 GB of
    Grok-1's for each token. No other compiler does: what counts is what they are given."""
    config = dataclasses.replace(CONFIG, embeddings=embeddings)
    params = jax.eval_shape(
        functools.partial(cast_embeddings, config=config), params_of(config, "ternary")
    )
    slots = jax.eval_shape(lambda: empty_slots(config, 1, 37))
    step = functools.partial(decode_step, make_model(config), eos=2)
    with jax.set_mesh(sharding.make_mesh(1, 8)):
        jaxpr = jax.make_jaxpr(step)(params, slots)
    readers = [
        equation.primitive.name
        for equation in factories.equations(jaxpr)
        if any(x.aval.shape == (config.vocab_size, config.emb_size) for x in equation.invars)
    ]
    assert readers and set(readers) == {"shard_map"}, readers


@pytest.mark.parametrize("tokens, sums, scattered", [(24, 2, 0), (96, 1, 1)])
def test_experts_sums_of_many_tokens_are_scattered(tokens, sums, scattered):
    """So that nothing of a row of padding crosses devices, and each row of a pair once."""
    config = dataclasses.replace(CONFIG, num_layers=1, activations="int8")
    params = jax.eval_shape(lambda: params_of(config, "ternary"))
    apply = functools.partial(make_model(config).apply, last_only=True)
    memory = jax.eval_shape(lambda: init_memory(config, 1))
    with jax.set_mesh(sharding.make_mesh(1, 8)):
        jaxpr = jax.make_jaxpr(apply)(
            params, None, jax.ShapeDtypeStruct((1, tokens), jnp.int32), memory
        )
    found = {"psum": [], "reduce_scatter": []}
    for equation in factories.equations(jaxpr):
        shape = equation.invars[0].aval.shape if equation.invars else ()
        if equation.primitive.name in found and equation.invars[0].aval.dtype == jnp.int32:
            found[equation.primitive.name].append(shape)
    pairs = (1, tokens * config.num_selected_experts, config.emb_size)
    assert len(found["psum"]) == sums and found["reduce_scatter"] == [pairs] * scattered


def test_gradients_do_not_depend_on_the_mesh():
    config = INT8_ACTIVATIONS  # as in training: the maximum of a row crosses devices
    params = params_of(config, "float32")
    tokens = factories.random_tokens(config, 4, 13)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = make_model(config).apply(params, None, tokens).logits
            return -jnp.mean(jax.nn.log_softmax(logits[:, :-1])[..., 7])

        return jax.grad(loss)(params)

    expected = gradient(params)
    mesh = sharding.make_mesh(2, 4)
    with jax.set_mesh(mesh):
        found = gradient(jax.device_put(params, sharding.parameter_shardings(mesh, params)))
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        error = np.abs(one - other).max() / np.abs(other).max()
        assert error < TOLERANCE["gradient"], (path, error)


def test_decoding_with_a_cache_on_a_mesh():
    tokens = factories.random_tokens(CONFIG, 8, 13)
    mesh = sharding.make_mesh(2, 4)
    params = params_of(CONFIG, "ternary")
    params = jax.device_put(params, sharding.parameter_shardings(mesh, params))
    memory = init_memory(CONFIG, 8)
    axes = Memory(
        jax.tree.map(lambda _: MEMORY_AXES, memory.layers),
        ("batch",),
    )
    shardings = jax.tree.map(
        lambda x, axes: sharding.activation_sharding(mesh, axes, x.shape), memory, axes
    )
    memory = jax.device_put(memory, shardings)
    assert memory.layers[0].k.addressable_shards[0].data.shape == (4, 2, 37, 6)
    with jax.set_mesh(mesh):
        apply = jax.jit(make_model(CONFIG).apply)
        prefill = apply(params, None, tokens[:, :12], memory)
        last = apply(params, None, tokens[:, 12:], prefill.model_state)
    expected = unsharded(CONFIG, "ternary", 8).logits
    assert_near(prefill.logits, expected[:, :12])
    assert_near(last.logits, expected[:, 12:])


# --- Where arrays lie -----------------------------------------------------------------------------


def shard_shapes(weights, mesh, config=CONFIG):
    params = params_of(config, weights)
    placed = jax.device_put(params, sharding.parameter_shardings(mesh, params))
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, placed)


def test_every_device_holds_its_part_of_ternary_weights():
    shapes = shard_shapes("ternary", sharding.make_mesh(2, 4))
    up = shapes[MODULE + "moe/linear_v"]["w"]  # [5, 40, 160], split over its outputs
    assert (up.packed, up.scales) == ((5, 160 // 4, 10), (5, 1, 1))
    down = shapes[MODULE + "moe/linear_1"]["w"]  # [5, 160, 40], split over its inputs
    assert (down.packed, down.scales) == ((5, 40, 40 // 4), (5, 1, 1))
    query = shapes[MODULE + "multi_head_attention/query"]["w"]  # [40, 96]
    assert (query.packed, query.scales) == ((96 // 4, 10), (1, 1))
    linear = shapes[MODULE + "multi_head_attention/linear"]["w"]  # [96, 40]
    assert (linear.packed, linear.scales) == ((40, 24 // 4), (1, 1))
    assert shapes["language_model/in_out_embed"]["embeddings"] == (104 // 4, 40)
    assert shapes[MODULE + "router"]["w"] == (40, 5)
    assert shapes[MODULE + "rms_norm_3"]["scale"] == (40,)


def test_every_device_holds_its_part_of_int8_weights():
    shapes = shard_shapes("int8", sharding.make_mesh(2, 4))
    up = shapes[MODULE + "moe/linear"]["w"]
    assert (up.codes, up.scales) == ((5, 40, 160 // 4), (5, 8, 160 // 4))
    down = shapes[MODULE + "moe/linear_1"]["w"]
    assert (down.codes, down.scales) == ((5, 160 // 4, 40), (5, 8 // 4, 40))


def test_one_group_of_scales_is_on_every_device():
    mesh = sharding.make_mesh(1, 8)
    params = factories.random_params(CONFIG, "int8", groups=1)
    shardings = sharding.parameter_shardings(mesh, params)
    down = shardings[MODULE + "moe/linear_1"]["w"]
    assert down.codes == NamedSharding(mesh, P(None, "model", None))
    assert down.scales == NamedSharding(mesh, P(None, None, None))


def test_shardings_of_shapes_are_those_of_arrays():
    mesh = sharding.make_mesh(2, 4)
    params = params_of(CONFIG, "ternary")
    abstract = jax.eval_shape(lambda: params)
    ours, theirs = (sharding.parameter_shardings(mesh, tree) for tree in (params, abstract))
    assert jax.tree.leaves(ours) == jax.tree.leaves(theirs)


def test_dense_blocks_are_split_like_experts():
    shapes = shard_shapes("float32", sharding.make_mesh(1, 8), DENSE)
    assert shapes[MODULE + "linear"]["w"] == (40, 160 // 8)
    assert shapes[MODULE + "linear_1"]["w"] == (160 // 8, 40)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["experts", "dense"])
def test_every_matrix_is_multiplied_where_it_lies(config, monkeypatch):
    """Modules ask for the axes of each of their matrices by its own path; the router's is whole."""
    asked, parameter_axes = {}, sharding.parameter_axes

    def recorded(path, rank):
        asked[path] = rank
        return parameter_axes(path, rank)

    monkeypatch.setattr(sharding, "parameter_axes", recorded)
    params = abstract_params(config)
    ranks = {f"{m}/{n}": w.ndim for m, entries in params.items() for n, w in entries.items()}
    assert asked == {p: r for p, r in ranks.items() if r > 1 and "router" not in p}


def test_axes_of_a_parameter_are_the_last_of_its_rule():
    assert sharding.parameter_axes(MODULE + "moe/linear_v/w", 3) == ("experts", "embed", "ffn")
    assert sharding.parameter_axes(MODULE + "linear_1/w", 2) == ("ffn", "embed")
    assert sharding.parameter_axes(MODULE + "router/w", 2) == (None, None)


# --- Errors ---------------------------------------------------------------------------------------


def test_too_few_devices():
    with pytest.raises(ValueError, match="mesh 3,4 needs 12 devices, but only 8 cpu.*smaller mesh"):
        sharding.make_mesh(3, 4)
    with pytest.raises(ValueError, match="both mesh axes must be at least 1, got 0,8"):
        sharding.make_mesh(0, 8)


@pytest.mark.parametrize("text", ["8", "1,2,3", "a,b", ""])
def test_a_mesh_is_two_numbers(text):
    with pytest.raises(ValueError, match=f"as in 1,8; got {text!r}"):
        sharding.parse_mesh(text)
    assert dict(sharding.parse_mesh("2,4").shape) == {"data": 2, "model": 4}


def test_a_parameter_without_a_rule():
    params = params_of(CONFIG, "float32") | {"transformer/bias": {"b": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="no rule matches parameter 'transformer/bias/b'"):
        sharding.parameter_shardings(sharding.make_mesh(1, 8), params)


def test_axes_without_a_rule():
    with pytest.raises(ValueError, match="no rule matches parameter 'bias/b'; add one to sharding"):
        sharding.parameter_axes("bias/b", 1)


def test_an_argument_with_more_axes_than_are_named():
    double = sharding.shard_map(lambda x: 2 * x, [("batch",)], ("batch",))
    with jax.set_mesh(sharding.make_mesh(2, 4)), pytest.raises(ValueError, match="zip"):
        double(jnp.ones((4, 3)))


def test_a_rule_without_a_parameter():
    params = {"language_model/rms_norm": {"scale": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"rules match no parameter: \['in_out_embed"):
        sharding.parameter_shardings(sharding.make_mesh(1, 8), params)


@pytest.mark.parametrize("weights", ["float32", "int8", "ternary"])
def test_an_axis_that_does_not_divide(weights):
    config = dataclasses.replace(CONFIG, vocab_size=103)
    message = r"in_out_embed/embeddings: an array of shape \(103, 40\) .* 'model' axis divides 103"
    with pytest.raises(ValueError, match=message):
        sharding.parameter_shardings(sharding.make_mesh(1, 8), params_of(config, weights))


@pytest.mark.parametrize("key_size", [2, 14])
def test_shards_that_cut_a_byte_or_a_block(key_size):
    """Eight heads of two are 16 inputs, so 2 for a device, but there are four trits in a byte."""
    config = dataclasses.replace(CONFIG, num_q_heads=8, key_size=key_size)
    message = rf"linear/w: {8 * key_size} packed inputs do not split into blocks of .* 8 devices"
    with pytest.raises(ValueError, match=message):
        sharding.parameter_shardings(sharding.make_mesh(1, 8), params_of(config, "ternary"))
