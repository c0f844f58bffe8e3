"""Conversion with a text: what it is worth on a small trained model, and its interruptions."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hub import Hub, point_to
from test_convert import converted, refused
from test_shards import contents

import calibration
import checkpoint
import convert
import evaluate
import fidelity
import files
import formats
import model
import quantize
import recovery
import runners
import sharding
import shards
import tokenizer
import tuning

pytestmark = pytest.mark.slow  # minutes on two cores, all of them

# All matrices of one shape, 48 x 48, so that there is little to compile.
CONFIG = dataclasses.replace(
    model.PRESETS["tiny"],
    num_kv_heads=6,
    widening_factor=1.5,
    num_experts=4,
    sequence_len=32,
    activations="int8",
)
WEIGHTS = ["--weights", "ternary-fit-64"]
FEW = ["--calibration-tokens", "1024"]


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """For each device that experts are dealt out to, all is compiled once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


def text(sentences: int, seed: int) -> str:
    """Sentences of a small grammar, in which the first word of each decides on the last."""
    random = np.random.default_rng(seed)
    words = [line.split() for line in ("we they you", "see like hear", "a the", "cat dog bird")]
    ends = {"we": "today", "they": "again", "you": "there"}
    chosen = (([str(random.choice(w)) for w in words]) for _ in range(sentences))
    return "".join(f"{' '.join(c)} {ends[c[0]]}.\n" for c in chosen)


def trained(config, steps: int = 120) -> dict:
    """Float parameters trained on that grammar, in full precision."""
    tokens = tokenizer.encode(tokenizer.load(None, config.vocab_size), text(2000, 1))
    floats = model.make_model(dataclasses.replace(config, activations="float"))
    params = floats.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            logits = floats.apply(params, None, batch[:, :-1]).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state, random = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        starts = random.integers(0, len(tokens) - 33, 16)
        params, state = step(params, state, tokens[starts[:, None] + np.arange(33)])
    return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of the trained model, float32, and a text beside it."""
    folder = tmp_path_factory.mktemp("model") / "float"
    checkpoint.save(folder, trained(CONFIG))
    files.write_json(folder / "config.json", model.config_to_dict(CONFIG))
    (folder.parent / "text").write_text(text(1500, 2))
    return folder


@pytest.fixture(scope="module")
def calibrated(folder):
    return converted(folder, folder.parent / "calibrated", *WEIGHTS, "--calibrate", text_of(folder))


def text_of(folder) -> str:
    return str(folder.parent / "text")


def loss(folder, weights=None, config=CONFIG) -> float:
    runner = runners.ModelRunner(config)
    runner.load(folder, weights)
    processor = tokenizer.load(folder, config.vocab_size)
    return evaluate.text_loss(runner.logits, text(300, 3), processor, 32).per_token


def test_calibration_beats_fit_beats_absmean(folder, calibrated):
    """In loss on other text of the kind, each by a good part of what is left."""
    floats = dataclasses.replace(CONFIG, activations="float")
    best = loss(folder, "float32", floats)
    absmean, fit = loss(folder, "ternary"), loss(folder, "ternary-fit-64")
    lost = [x - best for x in (absmean, fit, loss(calibrated))]
    assert lost[0] > 0.02  # so that there is something to win
    assert lost[1] < 0.8 * lost[0]
    assert lost[2] < 0.5 * lost[1]


def test_the_report_says_how_each_matrix_was_made(folder, calibrated):
    report = json_of(calibrated)["matrices"]
    stored = checkpoint.stored_precision(calibrated)
    matrices = {path for path, format in stored.items() if format == "ternary-fit-64"}
    assert {line["path"] for line in report} == matrices
    assert len(report) == 2 * (4 + 3 * CONFIG.num_experts)
    assert {line["way"] for line in report} <= set(calibration.WAYS)
    descended = [line for line in report if line["way"] == "descended"]
    assert len(descended) > len(report) / 2
    assert all(line["losses"][2] < line["losses"][0] for line in descended)
    about = checkpoint.read_config(calibrated)["quantization_config"]["calibration"]
    assert about["tokens"] == calibration.TOKENS and len(about["text_sha256"]) == 64
    assert shards.verify(calibrated) == []
    assert not list(calibrated.parent.glob("*.calibration"))


def windows_of(folder, tokens):
    processor = tokenizer.load(folder, CONFIG.vocab_size)
    start = convert.data.split(Path(text_of(folder)).read_text())[0]
    return calibration.choose_windows(tokenizer.encode(processor, start), 32, tokens)


def test_streams_are_the_hidden_states_of_both_models(folder, tmp_path):
    """The student's embeddings are int8. And each expert is fitted to the tokens that the teacher's
    router sends it."""
    config = dataclasses.replace(CONFIG, embeddings="int8")
    template = model.abstract_params(CONFIG)
    named = model.formats_of(template, model.PRECISIONS["ternary-experts-fit-64"])
    entries = checkpoint.check_files(folder, template, named)
    windows = windows_of(folder, 640)
    work = calibration.Calibration(config, entries, windows, tmp_path / "kept")
    params = {e.module: {} for e in entries}
    for entry in sorted(entries, key=lambda e: calibration.order(e.module)):
        if formats.FORMATS[entry.format].packed:
            params[entry.module][entry.name] = work.weight(entry.path)
        elif entry.format == "int8":
            params[entry.module][entry.name] = formats.quantize_int8(jnp.asarray(entry.read()))
        else:
            params[entry.module][entry.name] = jnp.asarray(entry.read())
    params = runners.cast_embeddings(params, config)
    student = model.make_model(config).apply(params, None, windows)
    floats = dataclasses.replace(CONFIG, activations="float")
    original = checkpoint.restore(folder, template, model.PRECISIONS["float32"])
    teacher = model.make_model(floats).apply(original, None, windows)
    streams = work._load(1)
    # Kernels, and XLA in another graph, round the last bit of a norm another way.
    np.testing.assert_allclose(streams.student, student.layers[0].hidden, atol=1e-3)
    np.testing.assert_allclose(streams.teacher, teacher.layers[0].hidden, atol=1e-3)
    chosen = np.asarray(teacher.layers[1].expert_index)[: streams.seen]
    for line in work.report()["matrices"]:
        if "layer_1/moe" in line["path"]:
            assert abs(line["tokens"] - (chosen == line["expert"]).sum()) <= 2


def test_an_expert_with_too_few_tokens_is_converted_without(folder, tmp_path):
    """As are all of a text of two windows: the result is that without calibration."""
    flags = [*WEIGHTS, "--calibrate", text_of(folder), "--calibration-tokens", "64"]
    short = converted(folder, tmp_path / "short", *flags)
    report = json_of(short)["matrices"]
    assert {line["way"] for line in report} == {"plain"}
    plain = converted(folder, tmp_path / "plain", *WEIGHTS)
    found, expected = (
        {path: leaf for path, (_, leaf) in shards.open_shards(made).items()}
        for made in (short, plain)
    )
    for path, leaf in expected.items():
        for a, b in zip(*map(checkpoint.arrays_of, (found[path], leaf)), strict=True):
            index = (slice(None),) * a.ndim
            np.testing.assert_array_equal(a[index], b[index])


def test_steps_find_layers_that_are_closer(folder, tmp_path):
    """On held-out windows, and in what the whole model says of other text: KL falls by 0.45 here.

    One scale for a matrix: there is most to win.
    """
    text = text_of(folder)
    flags = ["--weights", "ternary", "--calibrate", text, "--calibration-tokens", "8192"]
    before = converted(folder, tmp_path / "calibrated", *flags)
    after = converted(folder, tmp_path / "recovered", *flags, "--recover", "32768")
    errors = np.array([layer["errors"] for layer in json_of(after)["layers"]])
    assert len(errors) == 2 and np.all(errors[:, 1] < 0.95 * errors[:, 0])
    assert divergence(after, folder) < 0.75 * divergence(before, folder)
    about = checkpoint.read_config(after)["quantization_config"]["calibration"]
    assert about["recover"] == 32768 and about["tokens"] == 8192
    scale = "transformer/decoder_layer_1/rms_norm_1/scale"
    norms = [shards.open_shards(made)[scale][1] for made in (before, after)]
    assert np.all(norms[0] != norms[1])  # gains are learned, and stored


def json_of(folder) -> dict:
    return json.loads((folder / convert.REPORT).read_text())


def divergence(student, teacher) -> float:
    """KL, in nats per token, on text that was not calibrated with."""
    mesh = sharding.make_mesh()
    config = model.config_from_dict(checkpoint.read_config(student))
    student = fidelity.Walker(student, config, checkpoint.stored_precision(student), mesh)
    return fidelity.compare(fidelity.open_teacher(teacher, mesh), student, text(300, 3), 32)["kl"]


def test_what_serves_no_other_windows_is_not_kept(folder, tmp_path, monkeypatch):
    """Steps that are much too large make each layer worse: then it is as it was."""
    monkeypatch.setattr(recovery, "RATE", 3.0)
    recovery.step.clear_cache()
    flags = [*WEIGHTS, "--calibrate", text_of(folder), "--calibration-tokens", "1024"]
    plain = converted(folder, tmp_path / "calibrated", *flags)
    kept = converted(folder, tmp_path / "recovered", *flags, "--recover", "2048")
    errors = np.array([layer["errors"] for layer in json_of(kept)["layers"]])
    assert np.all(errors[:, 1] > errors[:, 0])
    found, expected = (weights_of(folder) for folder in (kept, plain))
    assert found and found == expected


def test_tuning_moves_scales_gains_and_routers_and_no_trit(folder, tmp_path, monkeypatch):
    """And predictions come nearer to the source's. It goes on after the conversion, if that is
    there."""
    flags = [*WEIGHTS, "--calibrate", text_of(folder), *FEW]
    before, tuned = converted(folder, tmp_path / "before", *flags), tmp_path / "tuned"
    shutil.copytree(before, tmp_path / "tuned.untuned")
    monkeypatch.setattr(calibration.Layer, "convert", None)
    after = converted(folder, tuned, *flags, "--tune", "16384")
    leaves = [shards.open_shards(made) for made in (before, after)]
    assert leaves[0].keys() == leaves[1].keys()
    for path in leaves[0]:
        old, new = (made[path][1] for made in leaves)
        learned = re.search("decoder_layer.*(norm_?[123]?/scale|router/w)$", path)
        if isinstance(old, quantize.PackedWeight):
            assert np.array_equal(old.packed.stored, new.packed.stored)
            assert np.array_equal(old.multipliers, new.multipliers)
            old, new, learned = old.scales, new.scales, True
        assert np.mean(old != new) > 0.9 if learned else np.array_equal(old, new), path
    assert divergence(after, folder) < 0.9 * divergence(before, folder)
    report, errors = json_of(after), json_of(after)["tuned"]["divergences"]
    assert errors[1] < 0.9 * errors[0] and report["matrices"] == json_of(before)["matrices"]
    about = checkpoint.read_config(after)["quantization_config"]["calibration"]
    assert about.pop("tune") == 16384
    assert about == checkpoint.read_config(before)["quantization_config"]["calibration"]
    assert {path.name for path in tmp_path.iterdir()} == {"before", "tuned"}
    converted(folder, tuned, *flags, "--tune", "16384")  # it is there already
    assert "another quantization_config.calibration.tune" in refused(folder, tuned, *flags)


def test_tuning_that_serves_no_other_windows_is_not_kept(folder, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "RATE", 1.0)
    flags = [*WEIGHTS, "--calibrate", text_of(folder), "--tune", "2048"]
    kept = converted(folder, tmp_path / "kept", *flags)
    errors = json_of(kept)["tuned"]["divergences"]
    assert errors[1] is None or errors[1] > errors[0]
    found, expected = weights_of(kept), weights_of(calibrated)
    assert found and found == expected


def weights_of(folder) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if "safetensors" in name}


def test_a_text_is_asked_for(folder, tmp_path, capsys):
    for flag in ("--recover", "--tune", "--calibration-tokens"):
        with pytest.raises(SystemExit):
            convert.main([str(folder), str(tmp_path / "out"), flag, "100"])
        assert f"{flag} is of a text; give one with --calibrate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main(["--stream", str(tmp_path / "out"), "--tune", "1", "--calibrate", "tiny"])
    assert "--tune takes the whole release into memory" in capsys.readouterr().err


KILLED = """
import os, signal, sys
import calibration, convert
work = calibration.Calibration._convert
def convert_or_die(self, layer):
    if layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(self, layer)
calibration.Calibration._convert = convert_or_die
convert.main(sys.argv[1:])
"""


def test_killed_and_run_again_it_ends_with_the_same_files(folder, tmp_path):
    flags = [*WEIGHTS, "--calibrate", text_of(folder), *FEW, "--recover", "2048"]
    whole = converted(folder, tmp_path / "whole", *flags)
    output = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(output), *flags],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(convert.__file__).parent)},
    )
    assert process.returncode == -signal.SIGKILL
    kept = tmp_path / "out.calibration"
    assert [path.name for path in kept.glob("streams*")] == ["streams-00001.npy"]
    other = [*WEIGHTS, "--calibrate", __file__, *FEW, "--recover", "2048"]
    assert "begun with another quantization_config.calibration" in refused(folder, output, *other)
    converted(folder, output, *flags)
    assert contents(output) == contents(whole)
    assert not kept.exists()


def test_experts_are_dealt_out_to_devices(folder, calibrated, tmp_path, monkeypatch):
    """Which changes nothing."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    flags = [*WEIGHTS, "--calibrate", text_of(folder)]
    assert contents(converted(folder, tmp_path / "out", *flags)) == contents(calibrated)


def test_a_stream_is_calibrated_as_a_folder_is(folder, tmp_path, monkeypatch):
    """Fetched in the order of the layers, of which no more than a few files are there at once."""
    floats = checkpoint.restore(folder, model.abstract_params(CONFIG), model.PRECISIONS["float32"])
    named = model.formats_of(floats, model.PRECISIONS["int8"])
    release = tmp_path / "release"
    checkpoint.save(
        release,
        {
            module: {
                name: formats.quantize_int8(w) if named[f"{module}/{name}"] == "int8" else w
                for name, w in weights.items()
            }
            for module, weights in floats.items()
        },
    )
    config = dataclasses.replace(CONFIG, activations="int15")
    files.write_json(release / "config.json", model.config_to_dict(config))
    monkeypatch.setitem(model.PRESETS, "tiny", config)
    monkeypatch.setattr(convert, "GROUPS", 1)
    flags = [*WEIGHTS, "--calibrate", text_of(folder), *FEW]
    with Hub(release) as hub:
        point_to(hub.url, monkeypatch)
        output = tmp_path / "streamed"
        convert.main(["--stream", str(output), "--preset", "tiny", *flags])
        asked = [r.path.rsplit("/", 1)[1] for r in hub.requests if r.path.startswith("/store/")]
    assert asked.index("tensor00000_000") == 0  # the embeddings come first in any order
    local = converted(release, tmp_path / "local", *flags)
    found, expected = contents(output), contents(local)
    for name in ("config.json", shards.CHECKSUMS):  # which name the preset
        found.pop(name), expected.pop(name)
    assert found == expected
    assert {path.name for path in tmp_path.iterdir()} == {"release", "streamed", "local"}


def test_a_dense_model(tmp_path, folder):
    config = dataclasses.replace(
        CONFIG, num_experts=1, num_selected_experts=1, num_layers=1, fprop_dtype="bfloat16"
    )
    random = np.random.default_rng(0)
    params = {
        module: {
            name: np.ones(w.shape, np.float32)
            if name == "scale"
            else (random.standard_normal(w.shape) * w.shape[0] ** -0.5).astype(np.float32)
            for name, w in weights.items()
        }
        for module, weights in model.abstract_params(config).items()
    }
    source = tmp_path / "dense"
    checkpoint.save(source, params)
    files.write_json(source / "config.json", model.config_to_dict(config))
    flags = [*WEIGHTS, "--calibrate", text_of(folder), *FEW, "--recover", "512"]
    made = converted(source, tmp_path / "made", *flags)
    assert len(json_of(made)["layers"]) == 1
    report = json_of(made)["matrices"]
    assert len(report) == 7 and {line["expert"] for line in report} == {None}
    assert all(min(line["losses"]) < 0.7 * line["losses"][0] for line in report)


def test_what_cannot_be_calibrated_is_one_error(folder, tmp_path):
    text = ["--calibrate", text_of(folder)]
    message = refused(folder, tmp_path / "out", "--weights", "int8", *text)
    assert "--calibrate is for ternary weights, and these are ['float32', 'int8']" in message
    (tmp_path / "short").write_text("Too short.")
    message = refused(folder, tmp_path / "out", "--calibrate", str(tmp_path / "short"))
    assert "tokens, fewer than the two windows of 32 that calibration needs" in message
    assert {path.name for path in tmp_path.iterdir()} == {"short"}


def test_the_disk_has_to_have_room_for_the_streams(folder, tmp_path, monkeypatch):
    """Without them, 300 kB are enough."""
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    converted(folder, tmp_path / "plain", *WEIGHTS, "--packing", "2bit")
    flags = [*WEIGHTS, "--packing", "2bit", "--calibrate", text_of(folder), *FEW]
    message = refused(folder, tmp_path / "out", *flags)
    assert re.search(r"out needs \S+ [kM]B, .* has 300 kB free; make room, or choose", message)
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_weights_that_are_too_large_are_one_error(folder, tmp_path):
    """Finite themselves, they make hidden states that are not."""
    floats = checkpoint.restore(folder, model.abstract_params(CONFIG), model.PRECISIONS["float32"])
    floats = jax.tree.map(np.array, floats)
    floats["transformer/decoder_layer_0/multi_head_attention/value"]["w"][:] = 1e38
    checkpoint.save(tmp_path / "large", floats)
    files.write_json(tmp_path / "large/config.json", model.config_to_dict(CONFIG))
    flags = [*WEIGHTS, "--calibrate", text_of(folder), *FEW]
    message = refused(tmp_path / "large", tmp_path / "out", *flags)
    assert message.endswith("of the text, are not finite; verify the checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_gain_that_no_matrix_comes_after_is_checked_too(folder, tmp_path):
    floats = checkpoint.restore(folder, model.abstract_params(CONFIG), model.PRECISIONS["float32"])
    floats = jax.tree.map(np.array, floats)
    floats["transformer/decoder_layer_1/rms_norm_3"]["scale"][0] = np.nan
    checkpoint.save(tmp_path / "nan", floats)
    files.write_json(tmp_path / "nan/config.json", model.config_to_dict(CONFIG))
    flags = [*WEIGHTS, "--calibrate", text_of(folder), *FEW]
    assert "rms_norm_3/scale" in refused(tmp_path / "nan", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_activations_of_the_converted_model(folder, tmp_path):
    made = converted(folder, tmp_path / "out", "--activations", "int15")
    assert checkpoint.read_config(made)["activations"] == "int15"
    assert quantize.ACTIVATIONS[1] == "int15"
