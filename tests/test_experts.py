"""Sorting tokens by expert, and the mixture beside a plain sum over all experts."""

import dataclasses
import functools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experts
import formats
import kernels
import quantize


def test_grouping_is_that_of_the_docstring(monkeypatch):
    monkeypatch.setattr(experts, "expert_block", lambda *_: 2)
    index = jnp.array([[1], [0], [1], [1]])
    blocks = experts.group_by_expert(index, 2)
    assert blocks.row_of_pair.ravel().tolist() == [2, 0, 3, 4]
    assert blocks.token_of_row.tolist() == [1, 4, 0, 2, 3, 4]
    assert blocks.expert_of_block.tolist() == [0, 1, 1]
    rows = experts.rows_of_tokens(jnp.array([[1], [2], [3], [4]]), blocks)
    assert rows.ravel().tolist() == [2, 0, 1, 3, 4, 0]


@pytest.mark.parametrize(
    "pairs, block",
    [
        (2, 1),
        (16, 8),
        (17, 16),
        (128, 16),
        (129, 32),
        (256, 32),
        (1024, 128),
        (4096, 256),
        (8192, 512),
    ],
)
def test_expert_block(pairs, block):
    assert experts.expert_block(pairs, 8) == block


@pytest.mark.parametrize("pairs, block", [(2, 1), (16, 8), (129, 16), (1024, 16), (8192, 16)])
def test_joined_blocks_are_small(pairs, block):
    assert experts.expert_block(pairs, 8, joined=True) == block


@pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels")
@pytest.mark.parametrize("activations", ["int8", "int15"])
def test_a_token_gets_the_same_from_blocks_that_are_joined(activations, monkeypatch):
    tokens, size, ffn, count = 333, 64, 128, 5
    config = dataclasses.replace(
        factories.ODD, emb_size=size, widening_factor=3, num_experts=count, num_layers=1
    )
    assert config.ffn_size == ffn
    moe = factories.random_params(config, "ternary")
    names = ("linear", "linear_v", "linear_1")
    moe = [moe[f"transformer/decoder_layer_0/moe/{name}"]["w"] for name in names]
    joins = functools.partial(experts.joins_blocks, pairs=2 * tokens, dtype=jnp.bfloat16)
    assert joins(moe, activations) and not joins(moe, "float")
    assert not joins([*moe[:2], jnp.zeros((count, ffn, size))], activations)
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    trained = [formats.fake_ternarize(quantize.dequantize(w)) for w in moe]
    assert joins(trained, "int8") and not joins(trained, "float")  # in bfloat16, without a kernel
    assert joins(trained, "float", dtype=jnp.float32)
    random = np.random.default_rng(0)
    x = random.standard_normal((1, tokens, size)).astype(np.float32)
    index = np.argsort(random.random((1, tokens, count)) - [0.9, 0, 0, 0, 0.4])[..., :2]
    gates = random.random(index.shape).astype(np.float32)

    def mixture():
        f = functools.partial(experts.mixture, activations=activations)
        return jax.jit(f)(x, gates, index.astype(np.int32), *moe)

    joined = mixture()
    monkeypatch.setattr(experts, "joins_blocks", lambda *_: False)
    np.testing.assert_array_equal(joined, mixture())


@pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels")
def test_a_gradient_has_blocks_that_are_not_joined():
    """It is that of plain JAX, which unpacks a matrix for each of them."""
    tokens, count = 333, 5
    config = dataclasses.replace(factories.ODD, emb_size=64, num_experts=count, num_layers=1)
    moe = factories.random_params(config, "ternary")
    names = ("linear", "linear_v", "linear_1")
    moe = [moe[f"transformer/decoder_layer_0/moe/{name}"]["w"] for name in names]
    index = jnp.zeros((1, tokens, 2), jnp.int32)
    f = functools.partial(experts.mixture, activations="int8")

    def total(x):
        return jnp.sum(f(x, jnp.ones(index.shape), index, *moe))

    def rows(joined):
        group = functools.partial(experts.group_by_expert, num_experts=count, joined=joined)
        return f"<{jax.eval_shape(group, index[0]).token_of_row.size}x"

    x = jnp.ones((1, tokens, 64))
    texts = [jax.jit(g).lower(x).as_text() for g in (total, jax.grad(total))]
    assert [rows(True) in text for text in texts] == [True, False]
    assert [rows(False) in text for text in texts] == [False, True]


@pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels")
@pytest.mark.parametrize("weights, activations", [("ternary", "int8"), ("float32", "float")])
def test_blocks_are_joined_in_training_too(weights, activations, monkeypatch):
    """Where products are of float32: the same, and the same gradients, but for the order of sums;
    where bfloat16 is multiplied, plain JAX does it, a matrix for each large block."""
    tokens, size, ffn, count = 333, 64, 96, 5
    random = np.random.default_rng(0)
    shapes = (1, tokens, size), *[(count, size, ffn)] * 2, (count, ffn, size)
    floats = [jnp.asarray(random.standard_normal(shape) / 8, jnp.float32) for shape in shapes]
    index = np.argsort(random.random((1, tokens, count)) - [0.9, 0, 0, 0, 0.4])[..., :2]
    gates = random.random(index.shape).astype(np.float32)
    train = formats.FORMATS[weights].train

    def loss(x, *moe):
        moe = map(train, moe)
        y = experts.mixture(x, gates, index.astype(np.int32), *moe, activations=activations)
        return jnp.sum(jnp.sin(y)), y

    def found():
        f = jax.jit(jax.value_and_grad(loss, argnums=range(4), has_aux=True))
        return f(*floats), f.lower(*floats).as_text()

    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    (((_, y), gradients), text) = found()
    assert text.count("GroupedSums") == 3
    assert text.count("TernaryDots") == (3 if weights == "ternary" else 0)
    with kernels.disabled():
        (((_, plain), expected), text) = found()
    assert "ternary_grok" not in text
    # Integers, times scales that XLA may multiply in another order; or sums of 96 floats.
    np.testing.assert_allclose(y, plain, rtol=0, atol=1e-6 * np.abs(plain).max())
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())

    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    (((_, y), gradients), text) = found()
    assert ("GroupedSums" in text) == (weights == "float32")
    np.testing.assert_allclose(y, plain, rtol=0, atol=1e-6 * np.abs(plain).max())
    for one, other in zip(gradients, expected, strict=True):  # bfloat16 has 8 bits
        np.testing.assert_allclose(one, other, rtol=0, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize(
    "tokens, selected, num_experts",
    [(1, 1, 3), (2, 5, 5), (13, 1, 2), (31, 3, 11), (300, 2, 8)],
)
def test_every_valid_pair_has_a_row_of_its_expert(tokens, selected, num_experts):
    random = np.random.default_rng(0)
    group = jax.jit(experts.group_by_expert, static_argnums=1)
    for trial in range(30):
        favourites = random.random((tokens, num_experts)) ** [1, 1, 9][trial % 3]
        if trial % 2:
            favourites += np.arange(num_experts)  # all choose the same
        index = np.argsort(-favourites)[:, :selected]
        valid = random.random(tokens) < random.choice([0, 0.3, 1])
        index = np.where(valid[:, None], index, -1)
        row_of_pair, token_of_row, expert_of_block = group(index, num_experts)
        rows, blocks = len(token_of_row), len(expert_of_block)
        expert_of_row = np.repeat(expert_of_block, rows // blocks)

        assert np.all(np.asarray(row_of_pair)[~valid] == rows)
        used = np.asarray(row_of_pair)[valid]
        assert used.size == np.unique(used).size and np.all(used < rows)
        token = np.broadcast_to(np.arange(tokens)[:, None], index.shape)[valid]
        assert np.array_equal(np.asarray(token_of_row)[used], token)
        assert np.array_equal(expert_of_row[used], index[valid])

        padding = ~np.isin(np.arange(rows), used)
        assert np.all((token_of_row == tokens) | (expert_of_row == -1), where=padding)
        empty = np.setdiff1d(np.arange(blocks), used // (rows // blocks))
        assert np.all(np.asarray(expert_of_block)[empty] == -1)


def test_the_gradient_of_experts_is_that_of_all_experts_weighted():
    """Of every weight, gate and token; tokens that are not valid get and give nothing."""
    random = np.random.default_rng(0)
    tokens, size, ffn, count = 37, 6, 8, 5
    shapes = [(1, tokens, size), (1, tokens, 2), (count, size, ffn), (count, size, ffn)]
    shapes += [(count, ffn, size)]
    floats = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]
    index = jnp.argsort(jnp.asarray(random.random((1, tokens, count))))[..., :2]
    valid = jnp.asarray(random.random((1, tokens)) < 0.7)
    weight = jnp.asarray(random.standard_normal(shapes[0]), jnp.float32)

    def sparse(x, gates, *matrices):
        chosen = jnp.where(valid[..., None], index, -1)
        y = experts.mixture(x, gates, chosen, *matrices, activations="float")
        return jnp.sum(y * weight)

    def dense(x, gates, linear, linear_v, linear_1):
        x, linear, linear_v = x[:, :, None, None], linear[None, None], linear_v[None, None]
        y = (jax.nn.gelu(x @ linear) * (x @ linear_v) @ linear_1)[..., 0, :]  # [1, T, E, D]
        share = jnp.sum(jax.nn.one_hot(index, count) * gates[..., None], axis=2)
        return jnp.sum(jnp.einsum("bted,bte->btd", y, share) * weight * valid[..., None])

    both = (jax.jit(jax.grad(f, argnums=range(5)))(*floats) for f in (sparse, dense))
    for found, expected in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32 sums of 60


@pytest.mark.parametrize("weights", ["int8", "ternary"])
def test_no_token_meets_every_expert(weights):
    tokens, size, ffn, count = 1021, 24, 40, 8
    config = dataclasses.replace(
        factories.ODD, emb_size=size, widening_factor=2.5, num_experts=count, num_layers=1
    )
    assert config.ffn_size == ffn
    moe = factories.random_params(config, weights)
    moe = [
        moe[f"transformer/decoder_layer_0/moe/{m}"]["w"] for m in ("linear", "linear_v", "linear_1")
    ]
    x = jnp.ones((1, tokens, size))
    gates, index = jnp.ones((1, tokens, 2)), jnp.ones((1, tokens, 2), jnp.int32)
    f = functools.partial(experts.mixture, activations="float")
    assert factories.largest_array(f, x, gates, index, *moe) < tokens * count * size
