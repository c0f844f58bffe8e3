import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
import learning
import model
import quantize
import records
import runners
import sharding
import shards
import tokenizer
import train

CONFIG = dataclasses.replace(
    model.PRESETS["tiny"], sequence_len=16, num_layers=1, activations="int8"
)
SETTINGS = train.Settings(steps=6, batch_size=2, warmup=2, eval_every=3)
TEXT = "".join(f"{i} bottles of milk on the wall, {i} bottles of milk.\n" for i in range(60))


def jitted(weights, config=CONFIG):
    init, apply = learning.training_model(config, weights)
    return jax.jit(init), jax.jit(apply)


def state_of(folder, config=CONFIG, settings=SETTINGS):
    optimizer = learning.make_optimizer(settings)
    like = train.abstract_state(config, optimizer, sharding.make_mesh())
    return records.load_state(records.open_states(folder), like)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    last = train.run(CONFIG, SETTINGS, "ternary", TEXT, folder, {"command": "test"})
    return folder, last


def test_a_run_leaves_log_plot_state_and_checkpoint(run):
    folder, last = run
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [3, 6]
    assert log[-1] == last
    assert log[1]["loss"] < log[0]["loss"]
    assert 0 <= last["min_load"] <= 1 / 8 <= last["max_load"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((folder / "checkpoint/training.json").read_text())
    assert shards.exists(folder / "checkpoint")
    assert about["command"] == "test"
    assert about["validation"] == min(row["validation"] for row in log)


def test_an_interrupted_run_resumes_exactly(run, tmp_path, monkeypatch):
    """To the last bit: parameters, optimizer, data and log."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "plot", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(CONFIG, SETTINGS, "ternary", TEXT, tmp_path, {})
    assert int(state_of(tmp_path).step) == 3
    last = train.run(CONFIG, SETTINGS, "ternary", TEXT, tmp_path, {})
    whole, expected = run
    resumed, straight = state_of(tmp_path), state_of(whole)
    assert int(resumed.step) == 6
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    same = {key for key in expected if key != "tokens_per_second"}
    assert {key: last[key] for key in same} == {key: expected[key] for key in same}


def test_the_state_of_another_model_is_refused(run):
    with pytest.raises(ValueError, match="state of another model.*give another --output"):
        state_of(run[0], dataclasses.replace(CONFIG, num_layers=2))


def test_other_settings_in_a_begun_folder_are_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    (tmp_path / "settings.json").write_text(json.dumps({"command": "python train.py --steps 7"}))
    with pytest.raises(SystemExit, match="begun with other settings"):
        train.main(["--data", str(text), "--output", str(tmp_path), "--preset", "tiny"])


@pytest.mark.parametrize("flag", ["--steps", "--eval-every", "--batch-size"])
def test_settings_that_mean_nothing(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--data", "x", "--output", str(tmp_path), flag, "0"])
    assert f"{flag[2:].replace('-', '_')} must be at least 1, got 0" in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run():
    with pytest.raises(ValueError, match="warmup must be below steps, 4, got 100"):
        train.Settings(steps=4)


@pytest.mark.parametrize(
    "form, gamma_error, error",
    # The converted form holds gamma itself, which two programs may sum in two orders. In the
    # released one it is that of int8 latents, and int8 activations then round one step apart.
    [("converted", 1e-6, 1e-5), ("released", 3e-3, 0.05)],
)
def test_the_loaded_checkpoint_is_what_the_forward_pass_saw(
    run, tmp_path, form, gamma_error, error
):
    params = state_of(run[0]).params
    processor = tokenizer.load(None, CONFIG.vocab_size)
    records.export(tmp_path / "checkpoint", CONFIG, params, "ternary", form, processor, {})
    runner = runners.ModelRunner(CONFIG)
    runner.load(tmp_path / "checkpoint")
    wrapped = params["transformer/decoder_layer_0/moe/linear_1"]["w"]
    loaded = runner.params["transformer/decoder_layer_0/moe/linear_1"]["w"]
    np.testing.assert_array_equal(
        quantize.unpack(loaded),
        quantize.round_to_trits(wrapped, quantize.absmean_scale(wrapped)),
    )
    np.testing.assert_allclose(loaded.scales, quantize.absmean_scale(wrapped), rtol=gamma_error)
    _, apply = jitted("ternary")
    tokens = np.random.default_rng(0).integers(4, 1024, (2, 16)).astype(np.int32)
    seen = apply(params, None, tokens).logits
    np.testing.assert_allclose(runner.logits(tokens), seen, atol=error)
    assert np.std(seen) > 0.3


def test_a_float_model_is_kept_in_floats(tmp_path):
    tokens = np.arange(16, dtype=np.int32)[None]
    init, apply = jitted("float")
    params = init(jax.random.key(0), tokens)
    processor = tokenizer.load(None, CONFIG.vocab_size)
    records.export(tmp_path / "checkpoint", CONFIG, params, "float", "converted", processor, {})
    runner = runners.ModelRunner(CONFIG)
    runner.load(tmp_path / "checkpoint")
    jax.tree.map(np.testing.assert_array_equal, runner.params, params)


def test_every_matrix_gets_a_gradient_through_the_rounding():
    init, apply = jitted("ternary")
    tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, 1024)
    params = init(jax.random.key(0), tokens)
    loss = lambda p: learning.loss_and_metrics(apply, SETTINGS, p, tokens)[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


def test_ternary_training_sees_ternary_weights_and_float_training_does_not():
    tokens = np.arange(16, dtype=np.int32)[None]
    init, ternary = jitted("ternary")
    floats = jitted("float")[1]
    params = init(jax.random.key(0), tokens)
    plain = floats(params, None, tokens).logits
    seen = ternary(params, None, tokens).logits
    assert np.abs(plain - seen).max() > 0.1

    def rounded_one(_, kind, w):
        return quantize.dequantize(quantize.ternarize(w)) if kind == "ternary" else w

    rounded = quantize.apply_rules(model.PRECISIONS["ternary"], params, rounded_one)
    by_hand = floats(rounded, None, tokens).logits
    np.testing.assert_allclose(seen, by_hand, atol=1e-5)


def test_balance_loss_by_hand():
    even = jnp.full((1, 4, 4), 0.25)
    spread = jnp.arange(4).reshape(1, 4, 1)
    np.testing.assert_allclose(learning.balance_loss(even, spread), 1)
    certain = jax.nn.one_hot(jnp.zeros((1, 4), int), 4)
    np.testing.assert_allclose(learning.balance_loss(certain, jnp.zeros((1, 4, 1), int)), 4)


def test_router_z_loss_by_hand():
    logits = jnp.array([[[0.0, 0.0], [np.log(3.0), 0.0]]])
    expected = (np.log(2) ** 2 + np.log(4) ** 2) / 2
    np.testing.assert_allclose(learning.router_z_loss(logits), expected, rtol=1e-6)


def test_batches_are_a_function_of_the_step():
    processor = tokenizer.load(None, CONFIG.vocab_size)
    texts, again = (train.Texts(processor, TEXT, SETTINGS, 16) for _ in range(2))
    late = texts.steps_per_epoch + 1
    first, second = texts.batch(0), texts.batch(late)
    np.testing.assert_array_equal(again.batch(late), second)  # without the steps before
    np.testing.assert_array_equal(texts.batch(0), first)
    assert first.shape == (2, 17)
    assert (first != second).any()


def test_divergence_stops_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(train.evaluate, "cross_entropy", lambda *_: jnp.full((2, 16), jnp.nan))
    with pytest.raises(FloatingPointError, match="loss is nan at step 3: lower --learning-rate"):
        train.run(CONFIG, SETTINGS, "ternary", TEXT, tmp_path, {})
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize("form, function", [("released", "save"), ("converted", "save_converted")])
def test_a_folder_half_exported_does_not_look_whole(tmp_path, monkeypatch, form, function):
    params = jitted("ternary")[0](jax.random.key(0), np.zeros((1, 1), np.int32))

    def full_disk(folder, *_):
        (folder / "half").mkdir(parents=True)
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, function, full_disk)
    processor = tokenizer.load(None, CONFIG.vocab_size)
    with pytest.raises(OSError, match="disk full"):
        records.export(tmp_path / "checkpoint", CONFIG, params, "ternary", form, processor, {})
    assert not (tmp_path / "checkpoint").exists()
