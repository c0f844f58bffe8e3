import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import slow

import checkpoint
import data
import evaluate
import files
import formats
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
SETTINGS = train.Settings(
    steps=6, batch_size=2, warmup=2, eval_every=3, dropout=0.1, router_noise=0.1
)
TEXT = "".join(f"{i} bottles of milk on the wall, {i} bottles of milk.\n" for i in range(60))


def jitted(weights, config=CONFIG):
    init, apply = learning.training_model(config, weights)
    return jax.jit(init), jax.jit(apply)


def state_of(folder, config=CONFIG, settings=SETTINGS):
    optimizer = learning.make_optimizer(settings)
    like = train.abstract_state(config, optimizer, sharding.make_mesh())
    return records.load_state(records.open_states(folder), like)


def start(folder, text=TEXT, processor=None, settings=SETTINGS, config=CONFIG, **other):
    processor = processor or tokenizer.load(None, config.vocab_size)
    about = {"command": "test"}
    return train.run(config, settings, "ternary", text, processor, folder, about, **other)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    # What a power failure may leave of a run that has no state yet: nobody's.
    (folder / "settings.json").write_text("")
    (folder / "log.jsonl").write_text('{"step": 0}\n{"st')
    return folder, start(folder)


def test_a_run_leaves_log_plot_state_and_checkpoint(run):
    folder, last = run
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [3, 6]
    assert log[-1] == last
    assert log[1]["loss"] < log[0]["loss"]
    load = np.array(last["load"])
    assert load.shape == (1, 8)
    np.testing.assert_allclose(load.sum(), 1, rtol=1e-6)
    assert (last["min_load"], last["max_load"]) == (load.min(), load.max())
    assert last["dead_experts"] == 0 and 0 < last["router_entropy"] <= np.log(8)
    for name in ("loss", "learning_rate", "expert_load"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((folder / "checkpoint/training.json").read_text())
    assert shards.exists(folder / "checkpoint")
    assert about["command"] == "test"
    assert about["validation"] == min(row["validation"] for row in log)
    assert json.loads((folder / "settings.json").read_text()) == {"command": "test"}
    left = {"settings.json", "tokenizer.model", "log.jsonl", "states", "checkpoint"}
    assert {path.name for path in folder.iterdir() if path.suffix != ".png"} == left


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import test_train, train
step = train.Trainer.step
def step_or_die(self, tokens):
    if int(self.state.step) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, tokens)
train.Trainer.step = step_or_die
test_train.start(test_train.Path({folder!r}))
"""


def test_a_killed_run_resumes_exactly(run, tmp_path):
    """To the last bit: parameters, optimizer, data, dropout and log."""
    tests = Path(__file__).parent
    code = KILLED.format(path=[str(tests), str(tests.parent)], folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert int(state_of(tmp_path).step) == 3
    last = start(tmp_path)
    whole, expected = run
    resumed, straight = state_of(tmp_path), state_of(whole)
    assert int(resumed.step) == 6
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert without_speed(last) == without_speed(expected)
    logs = [records.read_log(folder, 6) for folder in (tmp_path, whole)]
    assert [list(map(without_speed, log)) for log in logs][0] == list(map(without_speed, logs[1]))


def test_an_interrupted_run_resumes_exactly(run, tmp_path, monkeypatch):
    """Ctrl-C within an update loses none; before the first one, there is nothing to keep."""
    step, interrupted_at = learning.make_step, 4

    def make_step(*args):
        update = step(*args)

        def update_and_interrupt(state, *rest):
            if int(state.step) == interrupted_at:
                signal.raise_signal(signal.SIGINT)
            return update(state, *rest)

        return update_and_interrupt

    with monkeypatch.context() as patch:
        patch.setattr(learning, "make_step", make_step)
        with pytest.raises(
            KeyboardInterrupt, match=f"^the state after 5 updates is .* {tmp_path}$"
        ):
            start(tmp_path)
        patch.setattr(train.Texts, "batch", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="^$"):
            start(tmp_path)
    assert int(state_of(tmp_path).step) == 5
    start(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path), state_of(run[0]))


def test_a_finished_run_may_grow(begun, capsys):
    """At the rate of the longer cosine from there on."""
    longer = dataclasses.replace(SETTINGS, steps=8, eval_every=8)
    rate = float(learning.schedule(longer)(6))
    assert start(begun, settings=longer)["step"] == 8
    assert rate > 1e-4
    printed = capsys.readouterr().out
    assert f"goes on after 6 of 8 updates, at a learning rate of {rate:.3g}\n" in printed
    assert [row["step"] for row in records.read_log(begun, 8)] == [3, 6, 8]
    assert int(state_of(begun, settings=longer).step) == 8


def test_the_steps_of_a_begun_run_may_grow_but_not_shrink(tmp_path):
    def command(steps):
        return {"command": f"python train.py --steps {steps} --seed 1"}

    files.write_json(tmp_path / "settings.json", command(20))
    train.check_settings(tmp_path, command(100))
    with pytest.raises(ValueError, match="other settings: --steps was 20, now 9. Give"):
        train.check_settings(tmp_path, command(9))


@pytest.mark.parametrize(
    "interrupt, kept",
    [(KeyboardInterrupt("all is kept"), "all is kept"), (KeyboardInterrupt, "nothing new is kept")],
)
def test_what_the_command_says_when_it_is_interrupted(tmp_path, monkeypatch, interrupt, kept):
    def interrupted(*_, **__):
        raise interrupt

    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(train, "plan", lambda *_: None)
    monkeypatch.setattr(train, "run", interrupted)
    with pytest.raises(SystemExit, match=f"interrupted: {kept}; the same command goes on$"):
        train.main(["--data", str(tmp_path / "text"), "--output", str(tmp_path)])


def test_an_interrupt_keeps_no_state_that_diverged(begun, monkeypatch):
    """The good one before it stays."""

    def diverge(self, tokens):
        params = jax.tree.map(lambda w: w * jnp.nan, self.state.params)
        self.state = self.state._replace(step=self.state.step + 1, params=params)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "step", diverge)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        start(begun, settings=dataclasses.replace(SETTINGS, steps=8))
    assert int(state_of(begun).step) == 6


def without_speed(row):
    return {key: value for key, value in row.items() if key != "tokens_per_second"}


def test_a_run_resumes_on_another_mesh(run):
    folder, _ = run
    optimizer, states = learning.make_optimizer(SETTINGS), records.open_states(folder)
    one, many = (
        records.load_state(states, train.abstract_state(CONFIG, optimizer, sharding.make_mesh(*m)))
        for m in ((1, 1), (2, 2))
    )
    jax.tree.map(np.testing.assert_array_equal, one, many)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(many)} == {4}


def test_the_state_of_another_model_is_refused(run):
    with pytest.raises(ValueError, match="state of another model.*give another --output"):
        state_of(run[0], dataclasses.replace(CONFIG, num_layers=2))


@pytest.fixture
def begun(run, tmp_path):
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(run[0], tmp_path / "begun"))


def test_an_evaluation_leaves_a_text_in_the_log(run):
    """The first tokens of the validation text, a fourth of it, and what the model makes of them."""
    folder, last = run
    processor = tokenizer.load(None, 1024)
    tokens = tokenizer.encode(processor, data.split(TEXT)[1]).tolist()[:4]
    params, apply = state_of(folder).params, jitted("ternary")[1]
    while len(tokens) < 16:
        row = np.array([tokens + [7] * (16 - len(tokens))], np.int32)  # later ones are not seen
        tokens.append(int(np.argmax(apply(params, None, row).logits[0, len(tokens) - 1])))
    assert last["sample"] == processor.decode(tokens)


def test_a_text_continued_by_hand():
    """Each token follows from the one before it, and the given ones stay."""

    def apply(params, key, tokens):
        return SimpleNamespace(logits=jax.nn.one_hot((params * tokens + 1) % 11, 11))

    tokens = jnp.array([[5, 2, 0, 0, 0]])
    assert train.continued(apply, 3, tokens, 2).tolist() == [[5, 2, 7, 0, 1]]


def test_other_settings_in_a_begun_folder_are_refused(begun, monkeypatch, capsys):
    flags = ["--data", str(begun / "my text"), "--preset", "tiny", "--output", str(begun)]
    (begun / "my text").write_text(TEXT)
    old = train.command_of(train.parse_arguments([*flags, "--learning-rate", "0.1"]))
    files.write_json(begun / "settings.json", {"command": old})
    monkeypatch.setattr(train, "product_rate", lambda: 1e9)
    with pytest.raises(SystemExit) as stopped:
        train.main([*flags, "--steps", "200"])
    assert str(stopped.value) == (
        f"error: {begun} was begun with other settings: --steps was 1750, now 200; --learning-rate "
        "was 0.1, now 0.002. Give the same ones, or another --output"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"command": 5}', '{"command": "a \'"}'])
def test_a_begun_folder_whose_settings_are_lost(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings.json does not say how .*: remove it if that"):
        train.check_settings(tmp_path, {"command": "test"})
    (tmp_path / "settings.json").unlink()
    train.check_settings(tmp_path, {"command": "test"})


def test_two_runs_in_one_folder(tmp_path):
    with (
        files.lock(tmp_path),
        pytest.raises(ValueError, match="another process is writing it; wait for its end, or"),
    ):
        start(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_failed_at_once_has_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Trainer, "start", fake_start)
    monkeypatch.setattr(train.Trainer, "step", lambda self, tokens: {"loss": jnp.nan})
    monkeypatch.setattr(evaluate, "text_loss", lambda *_: evaluate.Loss(1.0, 1, 1))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        start(tmp_path)
    assert not (tmp_path / "settings.json").exists()
    assert records.open_states(tmp_path).latest_step() is None


def test_a_run_without_a_state_owns_nothing(tmp_path, monkeypatch):
    """Others begin anew in its folder, with other flags and another tokenizer."""
    files.write_json(tmp_path / "settings.json", {"command": "python train.py --seed 1"})
    (tmp_path / "tokenizer.model").write_text("half a tok")
    (tmp_path / "states" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    processor, _ = choose(tmp_path)
    assert len(processor) == 440
    began = []
    monkeypatch.setattr(train.Trainer, "start", fake_start)
    monkeypatch.setattr(train, "train_on", lambda *_: began.append(True))
    with pytest.raises(IndexError):  # there is no row yet
        start(tmp_path)
    assert began


def fake_start(self, init):
    self.state = learning.TrainState(jnp.int32(0), {}, ())


@pytest.mark.parametrize("text", ["", "a", "To be, or not to be."])
def test_a_text_too_short_leaves_nothing(tmp_path, text):
    with pytest.raises(ValueError, match="take a longer text"):
        start(tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


def test_a_log_that_lost_its_last_line(begun, run):
    """The row is computed again; that it was cut short is no error."""
    log = begun / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert [row["step"] for row in records.read_log(begun, 6)] == [3]
    last = start(begun)
    assert last == {"step": 6} | {key: run[1][key] for key in ("validation", "sample")}
    assert [row["step"] for row in records.read_log(begun, 6)] == [3, 6]


def test_a_log_with_a_damaged_line(tmp_path):
    for damaged in ("", "[]", '{"step": "x"}', '{"st', "7", "\ufffd"):
        (tmp_path / "log.jsonl").write_text(f'{{"step": 3}}\n{damaged}\n{{"step": 6}}\n')
        with pytest.raises(ValueError, match=r"log.jsonl: line 2 is no row of a log, .*; remove"):
            records.read_log(tmp_path, 6)


def test_log_and_plots_are_flushed_before_they_have_their_names(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "sync", lambda path: flushed.append(path.name))
    log = [{"step": 3, "train": 1, "validation": 2, "learning_rate": 1, "load": [[0.5, 0.5]]}]
    records.write_log(tmp_path, log)
    records.plot(tmp_path, log)
    names = ["log.jsonl", "loss.png", "learning_rate.png", "expert_load.png"]
    assert [name for name in flushed if name != tmp_path.name] == [f"{n}.part" for n in names]
    assert {path.name for path in tmp_path.iterdir()} == set(names)


class Loss:
    """Of an update; that it is asked for says that the update was waited for."""

    def __init__(self, step, events):
        self.step, self.events = step, events

    def __float__(self):
        self.events.append(f"done {self.step}")
        return self.step + 0.5


def test_the_bar_counts_and_shows_updates_that_are_done(monkeypatch):
    """From the first one on; another is under way while the next batch is made."""
    events = []

    class Trainer:
        def step(self, tokens):
            events.append(f"begun {tokens}")
            return {"loss": Loss(tokens, events)}

    class Texts:
        settings = SETTINGS
        batch_size, length, characters_per_token = 2, 16, 2.0

        def batch(self, step):
            events.append(f"batch {step}")
            return step

    class Bar:
        def __init__(self, initial, total, unit):
            events.append(f"bar {initial} of {total}")

        def set_postfix(self, refresh, **shown):
            events.append(shown)

        def update(self):
            events.append("counted")

        def close(self):
            events.append("closed")

    monkeypatch.setattr(train, "tqdm", Bar)
    monkeypatch.setattr(train, "log_row", lambda step, *_: {"validation": 1.0})
    train.train_on(Trainer(), Texts(), 1, lambda row: events.append("recorded"))
    assert events == [
        "bar 1 of 6",
        *["batch 1", "begun 1"],
        *["batch 2", "begun 2", "done 1", {"train": "0.750"}, "counted"],
        *["done 2", {"train": "1.250"}, "counted", "recorded"],
        *["batch 3", "begun 3"],
        *["batch 4", "begun 4", "done 3", {"train": "1.750", "validation": "1.000"}, "counted"],
        *["batch 5", "begun 5", "done 4", {"train": "2.250", "validation": "1.000"}, "counted"],
        *["done 5", {"train": "2.750", "validation": "1.000"}, "counted", "recorded", "closed"],
    ]


@pytest.mark.parametrize("flag", ["--steps", "--eval-every", "--batch-size"])
def test_settings_that_mean_nothing(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--data", "x", "--output", str(tmp_path), flag, "0"])
    assert f"error: {flag} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_numbers_that_are_none(value, tmp_path, capsys):
    for field in dataclasses.fields(train.Settings):
        if isinstance(field.default, float):
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(SystemExit):
                train.main(["--data", "x", "--output", str(tmp_path), f"{flag}={value}"])
            assert f"error: {flag} must be " in capsys.readouterr().err


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
        formats.round_to_trits(wrapped, formats.absmean_scale(wrapped)),
    )
    np.testing.assert_allclose(loaded.scales, formats.absmean_scale(wrapped), rtol=gamma_error)
    _, apply = jitted("ternary")
    tokens = np.random.default_rng(0).integers(4, 1024, (2, 16)).astype(np.int32)
    seen = apply(params, None, tokens).logits
    np.testing.assert_allclose(runner.logits(tokens), seen, atol=error)
    assert np.std(seen) > 0.3


def test_a_float_model_is_kept_in_floats(tmp_path):
    tokens = np.arange(16, dtype=np.int32)[None]
    init, apply = jitted("float32")
    params = init(jax.random.key(0), tokens)
    processor = tokenizer.load(None, CONFIG.vocab_size)
    records.export(tmp_path / "checkpoint", CONFIG, params, "float32", "converted", processor, {})
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
    floats = jitted("float32")[1]
    params = init(jax.random.key(0), tokens)
    plain = floats(params, None, tokens).logits
    seen = ternary(params, None, tokens).logits
    assert np.abs(plain - seen).max() > 0.1

    def rounded_one(_, kind, w):
        return quantize.dequantize(formats.ternarize(w)) if kind == "ternary" else w

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


def test_a_share_of_the_sequences_is_of_the_plain_text():
    """The others are cut apart, so that they hold more tokens of one character."""
    processor = tokenizer.load(None, CONFIG.vocab_size)
    settings = dataclasses.replace(SETTINGS, batch_size=64, bpe_dropout=0.7, plain=0.25)
    texts = train.Texts(processor, TEXT, settings, 16)
    characters = [len(processor.decode(row.tolist())) for row in texts.batch(0)]
    assert np.mean(characters[48:]) > 1.5 * np.mean(characters[:48])
    mixed = 0.75 * len(TEXT) / len(texts.tokens) + 0.25 * len(TEXT) / len(texts.plain)
    np.testing.assert_allclose(texts.characters_per_token, mixed)


def test_divergence_stops_and_keeps_what_was_good(tmp_path, monkeypatch):
    step = train.Trainer.step

    def diverging(self, tokens):
        metrics = step(self, tokens)
        return metrics | {"loss": jnp.where(self.state.step > 3, jnp.nan, metrics["loss"])}

    monkeypatch.setattr(train.Trainer, "step", diverging)
    with pytest.raises(FloatingPointError, match="loss is nan at step 6: lower --learning-rate"):
        start(tmp_path)
    assert int(state_of(tmp_path).step) == 3
    about = json.loads((tmp_path / "checkpoint/training.json").read_text())
    assert about["step"] == 3
    assert [row["step"] for row in records.read_log(tmp_path, 6)] == [3]


def test_a_loss_far_above_guessing_is_divergence():
    row = {"step": 5, "loss": 7.0, "validation": 2.0}
    train.check_progress(row, 14, Path("runs"))
    with pytest.raises(FloatingPointError, match="loss is 15.0 at step 5"):
        train.check_progress(row | {"loss": 15.0}, 14, Path("runs"))


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
    (tmp_path / "checkpoint.previous").mkdir()  # killed while a new one took its place
    with pytest.raises(OSError, match="disk full"):
        records.export(tmp_path / "checkpoint", CONFIG, params, "ternary", form, processor, {})
    assert (tmp_path / "checkpoint").exists()


# --- Tokenizers -----------------------------------------------------------------------------------


def choose(output, *flags, text=TEXT):
    args = train.parse_arguments(["--data", "x", "--output", str(output), *map(str, flags)])
    return train.choose_tokenizer(args, train.configuration(args), text)


def write_tokenizer(folder, pieces):
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer.train(TEXT, pieces))
    return folder


def test_a_tokenizer_is_made_of_the_text(tmp_path, capsys):
    """With as many pieces as the model, or as the text is good for."""
    text = Path(__file__).read_text()
    for flags in ([], ["--tokenizer", "train"]):
        processor, config = choose(tmp_path, *flags, text=text)
        assert processor.serialized_model_proto() == tokenizer.train(text, 1024)
        assert config == model.PRESETS["demo"] and not capsys.readouterr().out
    processor, config = choose(tmp_path)
    assert len(processor) == config.vocab_size == 440
    assert capsys.readouterr().out == "note: the text has only 440 pieces, not 1024\n"


def test_a_tokenizer_of_ones_own(tmp_path):
    """Never one of another folder when it is missing."""
    folder = write_tokenizer(tmp_path / "own", 300)
    message = f"^{folder}/tokenizer.model has 300 pieces, the model has 1024; give --vocab-size 300"
    for path in (folder, folder / "tokenizer.model"):
        with pytest.raises(ValueError, match=message):
            choose(tmp_path, "--tokenizer", path)
    with pytest.raises(FileNotFoundError):
        choose(tmp_path, "--tokenizer", tmp_path)
    (folder / "tokenizer.model").write_bytes(tokenizer.train(Path(__file__).read_text(), 1024))
    processor, _ = choose(tmp_path, "--tokenizer", folder)
    assert processor.serialized_model_proto() == (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_text("no")
    with pytest.raises(ValueError, match="is not a SentencePiece model .* or its folder"):
        choose(tmp_path, "--tokenizer", folder)


def test_the_tokenizer_of_a_checkpoint(run, tmp_path):
    """It is that of the model to begin or to learn from; one of another size fits none."""
    theirs = (run[0] / "checkpoint" / "tokenizer.model").read_bytes()
    for flag in ("--init", "--teacher"):
        processor, _ = choose(tmp_path, flag, run[0] / "checkpoint")
        assert processor.serialized_model_proto() == theirs
    for choice in ("train", write_tokenizer(tmp_path / "own", 300)):
        with pytest.raises(
            ValueError, match=r"pieces, the model has 1024; take the .* trained with"
        ):
            choose(tmp_path, "--init", run[0] / "checkpoint", "--tokenizer", choice)


def test_a_run_keeps_its_tokenizer(tmp_path):
    """In its folder and in its checkpoint; another one is refused when the run goes on."""
    processor, config = choose(tmp_path / "run", "--preset", "tiny")
    config = dataclasses.replace(CONFIG, vocab_size=config.vocab_size)
    one = dataclasses.replace(SETTINGS, steps=1, warmup=0)
    start(tmp_path / "run", processor=processor, settings=one, config=config)
    runner = runners.ModelRunner(config)
    runner.load(tmp_path / "run" / "checkpoint")
    kept = tokenizer.load(tmp_path / "run" / "checkpoint", runner.config.vocab_size)
    assert kept.serialized_model_proto() == processor.serialized_model_proto()
    for missing in (None, "tokenizer.model"):  # as before it was kept beside the state
        if missing:
            (tmp_path / "run" / missing).unlink()
        again, same = choose(tmp_path / "run", "--tokenizer", "train", text="another text")
        assert again.serialized_model_proto() == processor.serialized_model_proto()
        assert same.vocab_size == config.vocab_size
    other, _ = choose(tmp_path / "run", "--tokenizer", write_tokenizer(tmp_path / "own", 300))
    with pytest.raises(
        ValueError, match=f"^{tmp_path}/run was begun with another tokenizer, .* out"
    ):
        start(tmp_path / "run", processor=other, settings=one, config=config)


# --- Dropout and router noise ---------------------------------------------------------------------


def trainer_of(config=CONFIG, weights="ternary", mesh=(1, 1), teacher=(None, None), **settings):
    settings = dataclasses.replace(SETTINGS, dropout=0.0, router_noise=0.0, **settings)
    trainer = train.Trainer(config, settings, weights, sharding.make_mesh(*mesh), teacher)
    trainer.start(None)
    return trainer


def random_tokens(rows, length=17, seed=0):
    return np.random.default_rng(seed).integers(4, 1024, (rows, length)).astype(np.int32)


def test_dropout_follows_the_key_and_needs_one():
    tokens = random_tokens(2)
    params = jitted("ternary")[0](jax.random.key(0), tokens)
    apply = jax.jit(learning.training_model(CONFIG, "ternary", dropout=0.5).apply)
    one, again, other = (apply(params, jax.random.key(k), tokens).logits for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


def test_dropout_leaves_out_whole_values_of_each_sum():
    """Of the embeddings and of both blocks' outputs, half are 0, the others are doubled."""
    tokens = random_tokens(4)
    params = jitted("float32")[0](jax.random.key(0), tokens)
    dropped = jax.jit(learning.training_model(CONFIG, "float32", dropout=0.5).apply)
    zeros = {"scale": jnp.zeros(CONFIG.emb_size)}
    layer = "transformer/decoder_layer_0/"
    silent = params | {f"{layer}rms_norm_1": zeros, f"{layer}rms_norm_3": zeros}
    for module in (None, "rms_norm_1", "rms_norm_3"):
        loud = silent if module is None else silent | {layer + module: params[layer + module]}
        hidden = dropped(loud, jax.random.key(0), tokens).layers[-1].hidden
        share = np.mean(np.asarray(hidden) == 0)
        expected = 0.5 if module is None else 0.25  # the embedding or the block's output is left
        assert abs(share - expected) < 0.05, (module, share)


def test_evaluation_is_without_dropout_and_noise():
    tokens = random_tokens(2, 16)
    settings = dataclasses.replace(SETTINGS, dropout=0.5, router_noise=0.5)
    noisy = train.Trainer(CONFIG, settings, "ternary", sharding.make_mesh(), (None, None))
    noisy.start(None)
    plain = jitted("ternary")[1](noisy.state.params, None, tokens).logits
    np.testing.assert_allclose(noisy.logits(tokens), plain, atol=1e-5)


def test_router_noise_changes_choices_but_not_their_sums_by_much():
    tokens = random_tokens(4)
    params = jitted("float32")[0](jax.random.key(0), tokens)
    plain = jitted("float32")[1](params, None, tokens).layers[0]
    noisy = jax.jit(learning.training_model(CONFIG, "float32", router_noise=0.2).apply)
    one, other = (noisy(params, jax.random.key(k), tokens).layers[0] for k in (0, 1))
    moved = np.asarray(one.router_logits - plain.router_logits)
    assert 0.01 < moved.std() < 0.2 * np.asarray(plain.router_logits).std()
    assert (one.expert_index != plain.expert_index).any()
    assert (one.expert_index != other.expert_index).any()


def test_jitter_by_hand():
    noisy = learning.jitter(jax.random.key(0), jnp.full(1000, 10.0), 0.3)
    assert 7 <= noisy.min() < 7.1 and 12.9 < noisy.max() <= 13


# --- Meshes and accumulation ----------------------------------------------------------------------

FLOAT = dataclasses.replace(CONFIG, activations="float")  # no value on the edge of rounding
EVEN = {"balance_weight": 0.0}  # that loss is each accumulated part's own


@pytest.mark.parametrize("mesh", [slow((2, 1)), (2, 2)])
def test_training_does_not_depend_on_the_mesh(mesh):
    alone, sharded = trainer_of(FLOAT, **EVEN), trainer_of(FLOAT, mesh=mesh, **EVEN)
    for seed in range(3):
        expected, found = (t.step(random_tokens(4, seed=seed)) for t in (alone, sharded))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)
    processor = tokenizer.load(None, 1024)
    assert sharded.sample(processor, TEXT) == alone.sample(processor, TEXT)
    moment = sharded.state.opt_state[1][0].mu["transformer/decoder_layer_0/moe/linear"]["w"]
    assert moment.addressable_shards[0].data.shape == (8, 48, 64 // mesh[1])


def test_accumulated_batches_are_one_large_batch():
    whole, parts = trainer_of(FLOAT, **EVEN), trainer_of(FLOAT, accumulate=2, **EVEN)
    for seed in range(3):
        expected, found = (t.step(random_tokens(4, seed=seed)) for t in (whole, parts))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)


def test_bfloat16_trains_float32_weights():
    trainer = trainer_of(dataclasses.replace(CONFIG, fprop_dtype="bfloat16"))
    losses = [float(trainer.step(random_tokens(2))["loss"]) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.state.params)} == {jnp.dtype("float32")}


# --- From checkpoints -----------------------------------------------------------------------------


def export(folder, params, weights="ternary", form="converted", config=CONFIG):
    processor = tokenizer.load(None, config.vocab_size)
    records.export(folder, config, params, weights, form, processor, {})
    return folder


@pytest.mark.parametrize(
    "weights, form, error",
    [("ternary", "converted", 1e-4), ("ternary", "released", 0.05), ("float32", "converted", 1e-4)],
)
def test_beginning_from_a_checkpoint(run, tmp_path, weights, form, error):
    """The first forward pass is that of the checkpoint, of whatever form."""
    params = state_of(run[0]).params
    folder = export(tmp_path / "checkpoint", params, weights, form)
    trainer = trainer_of(weights=weights)
    before = np.asarray(trainer.logits(random_tokens(2, 16)))
    trainer.start(folder)
    runner = runners.ModelRunner(CONFIG)
    runner.load(folder)
    tokens = random_tokens(2, 16)
    expected = runner.logits(tokens)
    np.testing.assert_allclose(trainer.logits(tokens), expected, atol=error)
    assert np.abs(before - expected).max() > 0.2


def test_a_run_from_a_checkpoint_says_where_it_begins(run, tmp_path):
    """Before the first update, once; and its start is the best until something is better."""
    folder, last = run
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-9)

    def begin(output, settings):
        model = folder / "checkpoint"
        start(output, settings=settings, init=model, teacher=model)
        return records.read_log(output, settings.steps)

    log = begin(tmp_path / "same", settings)
    assert [row["step"] for row in log] == [0, 3, 6]
    assert log[0]["validation"] == pytest.approx(last["validation"], rel=1e-5)
    assert log == begin(tmp_path / "same", settings)
    assert (tmp_path / "same" / "checkpoint" / "config.json").exists()
    with pytest.raises(FloatingPointError, match="the loss is"):
        begin(tmp_path / "worse", dataclasses.replace(SETTINGS, learning_rate=1e3))
    about = json.loads((tmp_path / "worse" / "checkpoint" / "training.json").read_text())
    assert about["step"] == 0
    assert not (tmp_path / "worse" / "settings.json").exists()  # other ones may be tried here
    assert records.open_states(tmp_path / "worse").latest_step() is None


def test_every_saved_matrix_is_ternary(run):
    """Exactly -1, 0 and 1 times its scale, all three of them."""
    params = records.load_params(run[0] / "checkpoint", sharding.make_mesh())
    matrices = [
        matrix
        for entries in params.values()
        for w in entries.values()
        if isinstance(w, quantize.PackedWeight)
        for matrix in np.asarray(quantize.dequantize(w)).reshape(-1, *w.shape[-2:])
    ]
    assert len(matrices) == 4 + 3 * 8
    for matrix in matrices:
        scale = np.abs(matrix).max()
        assert np.unique(matrix).tolist() == [-scale, 0, scale]


def test_distillation_comes_nearer_to_the_teacher(run):
    folder = run[0] / "checkpoint"
    teacher = train.teacher_of(folder, tokenizer.load(None, 1024), sharding.make_mesh())
    weights = {"distill_weight": 10.0, "hidden_weight": 1.0}
    trainer = trainer_of(teacher=teacher, steps=100, learning_rate=1e-2, seed=1, **weights)
    rows = [trainer.step(random_tokens(4)) for _ in range(12)]
    for key in ("distill", "hidden"):
        assert 0 < rows[-1][key] < 0.8 * rows[0][key], (key, [float(row[key]) for row in rows])
    trainer.start(folder)  # the student is the teacher
    assert trainer.step(random_tokens(4))["distill"] < 1e-4


def test_distill_loss_by_hand():
    taught, logits = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(learning.distill_loss(logits, taught, 1.0), expected, rtol=1e-5)
    at_two = learning.distill_loss(2 * logits, 2 * taught, 2.0)
    np.testing.assert_allclose(at_two, 4 * expected, rtol=1e-5)
    np.testing.assert_allclose(learning.distill_loss(taught, taught, 3.0), 0, atol=1e-7)


def test_a_teacher_with_another_tokenizer(run, tmp_path):
    class Other:
        def serialized_model_proto(self):
            return b"other"

    with pytest.raises(ValueError, match="has another tokenizer; it must have the student's"):
        train.teacher_of(run[0] / "checkpoint", Other(), sharding.make_mesh())


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dropout", "1"], "--dropout must be below 1, got 1.0"),
        (["--bpe-dropout", "1"], "--bpe-dropout must be below 1, got 1.0"),
        (["--warmup", "9", "--steps", "9"], "--warmup must be below --steps, 9, got 9"),
        (["--temperature", "0"], "--temperature must be above 0, got 0"),
        (["--accumulate", "0"], "--accumulate must be at least 1, got 0"),
        (["--init", "x", "--preset", "tiny"], "leave --preset out"),
        (["--init", "x", "--num-layers", "3"], "leave --num-layers out"),
    ],
)
def test_flags_that_mean_nothing(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--data", "x", "--output", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--init", "--teacher"])
def test_a_folder_that_is_no_checkpoint(tmp_path, flag, monkeypatch):
    """Said at once, with where one is."""
    monkeypatch.setattr(train, "plan", lambda *_: pytest.fail("too late"))
    (tmp_path / "run" / "checkpoint" / "ckpt-0").mkdir(parents=True)
    for folder, cure in (("gone", ""), ("run", "run/checkpoint")):
        flags = ["--data", "x", "--output", str(tmp_path / "new"), flag, str(tmp_path / folder)]
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}/{folder}: .*{cure}"):
            train.main(flags)


def test_what_the_command_prints(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(train, "product_rate", lambda: 1e9)
    monkeypatch.setattr(train, "run", lambda *_, **__: {"validation": 1.25, "step": 6})
    train.main(["--data", str(tmp_path / "text"), "--output", str(tmp_path), "--preset", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "note: the text has only 429 pieces, not 1024"
    assert lines[1].startswith("tiny: ")
    for name, value in (("emb_size", "48"), ("--learning-rate", "0.002"), ("--steps", "1750")):
        assert f"{name:<31}{value}" in lines
    assert lines[-2:] == [
        "validation 1.2500 nats per character after 6 steps",
        f"best weights in {tmp_path}/checkpoint: python run.py --checkpoint {tmp_path}/checkpoint",
    ]


def configured(*flags):
    return train.configuration(train.parse_arguments(["--data", "x", "--output", "y", *flags]))


def test_sizes_beside_a_preset(run, monkeypatch):
    """What follows from them is as in the presets: `1m` and `10m` are the demo in other sizes."""
    sizes = ["--emb-size", "128", "--num-layers", "2"]
    small = model.PRESETS["1m"]
    assert configured(*sizes) == dataclasses.replace(small, num_kv_heads=2)
    assert configured("--num-layers", "6") == model.PRESETS["10m"]
    odd = configured("--emb-size", "192", "--num-experts", "1", "--vocab-size", "500")
    assert (odd.num_q_heads, odd.num_kv_heads) == (3, 1)
    assert (odd.num_experts, odd.num_selected_experts, odd.vocab_size) == (1, 1, 500)
    longer = configured("--init", str(run[0] / "checkpoint"), "--sequence-len", "32")
    assert longer == dataclasses.replace(CONFIG, sequence_len=32)
    command = train.command_of(train.parse_arguments(["--data", "x", "--output", "y", *sizes]))
    assert "--preset demo --emb-size 128 --num-layers 2 --weights" in command


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--emb-size", "100"], "--emb-size must be a multiple of the heads' size, 64, got 100"),
        (["--num-layers", "0"], "--num-layers must be at least 1, got 0"),
        (["--num-experts", "0"], "--num-experts must be at least 1, got 0"),
        (["--vocab-size", "-1"], "--vocab-size must be at least 1, got -1"),
    ],
)
def test_sizes_that_make_no_model(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train.main(["--data", "x", "--output", str(tmp_path / "new"), *flags])


def test_times_for_reading():
    seconds = (0.4, 65, 119, 120, 900, 7200, 12_300, 300_000, 1e8)
    expected = "0.4 seconds, 65 seconds, 119 seconds, 2.0 minutes, 15 minutes, 2.0 hours, 3.4 hours"
    expected += ", 3.5 days, 1157 days"
    assert ", ".join(map(train.readable_time, seconds)) == expected


def test_the_command_can_be_given_again(tmp_path):
    """As it is kept, whatever is in its paths."""
    flags = ["--data", "my text's", "--output", str(tmp_path), "--init", "a b", "--steps", "200"]
    args = train.parse_arguments(flags)
    words = shlex.split(train.command_of(args))
    assert words[:2] == ["python", "train.py"]
    assert train.parse_arguments([*words[2:], "--output", str(tmp_path)]) == args


def test_too_little_memory_is_said_before_anything_begins(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(train.sharding, "memory_limit", lambda mesh: 1_000_000)
    with pytest.raises(SystemExit, match="on each device, which has 1 MB; try a smaller"):
        flags = ["--data", str(tmp_path / "text"), "--output", str(tmp_path / "run")]
        train.main([*flags, "--preset", "tiny"])
    printed = capsys.readouterr().out
    assert "time" in printed and "activations" in printed
    assert not (tmp_path / "run").exists()


def test_training_memory_by_hand():
    count = sum(w.size for w in jax.tree.leaves(model.abstract_params(CONFIG)))
    needed = train.training_memory(CONFIG, SETTINGS, "ternary", sharding.make_mesh())
    assert (needed["parameters"], needed["gradients"]) == (4 * count, 4 * count)
    assert needed["Adam"] == 8 * count + 2 * 4  # and two counts of steps
    large, two = (dataclasses.replace(SETTINGS, batch_size=n) for n in (64, 128))
    needed = train.training_memory(CONFIG, large, "ternary", sharding.make_mesh())
    twice = train.training_memory(CONFIG, two, "ternary", sharding.make_mesh())
    assert 1.8 < twice["activations"] / needed["activations"] < 2.1
    half = train.training_memory(CONFIG, two, "ternary", sharding.make_mesh(2, 2))
    assert half["activations"] == needed["activations"]
    assert half["parameters"] < 0.6 * needed["parameters"]


def test_flops_by_hand():
    """Per token, 6 for each parameter in use; 12 T for each number of a query."""
    d, f, heads = 48, 64, 6 * 8
    attention = d * (heads + 2 * 16) + heads * d
    norms = 5 * d
    active = 1024 * d + attention + 8 * d + 2 * 3 * d * f + norms
    assert train.flops_per_token(CONFIG) == 6 * active + 12 * 16 * heads


@pytest.mark.parametrize("name, size", [("1m", 1e6), ("10m", 1e7), ("100m", 1e8), ("1b", 1e9)])
def test_presets_are_as_large_as_they_say(name, size):
    count = sum(w.size for w in jax.tree.leaves(model.abstract_params(model.PRESETS[name])))
    assert 0.9 < count / size < 1.1
