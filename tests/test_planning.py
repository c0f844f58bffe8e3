"""Formats for a budget: choosing them, measuring what they cost, and converting to them."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibration import CONFIG, FEW, text
from test_convert import converted, refused
from test_shards import contents

import calibration
import checkpoint
import convert
import files
import formats
import model
import planning
import quantize
import run
import runners
import tokenizer

PATHS = ("a", "b", "c", "d")

# --- Choosing -------------------------------------------------------------------------------------


def cases(seed: int):
    """Errors and sizes of a few paths: sizes that grow, errors that fall, most of the time."""
    random = np.random.default_rng(seed)
    errors, sizes = {}, {}
    for path in PATHS:
        falls = np.sort(random.exponential(size=3))[::-1]
        if seed % 4 == 0:  # a rung that is no better than the one below
            falls[1] = falls[0] * 1.1
        grows = np.cumsum(random.integers(1, 30, 3))
        errors[path] = dict(zip(planning.LADDER, map(float, falls), strict=True))
        sizes[path] = dict(zip(planning.LADDER, map(int, grows), strict=True))
    return errors, sizes


def total(table, chosen) -> float:
    return sum(table[path][format] for path, format in chosen.items())


@pytest.mark.parametrize("seed", range(12))
def test_choice_against_all_choices(seed):
    """Within a step of the best one, never above the budget, never worse with a larger one."""
    errors, sizes = cases(seed)
    everything = [
        dict(zip(PATHS, formats, strict=True))
        for formats in itertools.product(planning.LADDER, repeat=len(PATHS))
    ]
    least, most = (pick(total(sizes, c) for c in everything) for pick in (min, max))
    step = max(
        errors[p][a] - errors[p][b] for p in PATHS for a, b in itertools.permutations(errors[p], 2)
    )
    before = np.inf
    for budget in range(least, most + 2):
        chosen = planning.choose(errors, sizes, budget)
        assert total(sizes, chosen) <= budget
        best = min(total(errors, c) for c in everything if total(sizes, c) <= budget)
        found = total(errors, chosen)
        assert best <= found < best + step
        assert found <= before
        before = found
    assert before == pytest.approx(best)


def test_a_rung_is_skipped_where_that_is_worth_more():
    low, middle, high = planning.LADDER
    errors = {"a": {low: 1.0, middle: 0.9, high: 0.1}, "b": {low: 1.0, middle: 0.7, high: 0.6}}
    sizes = {path: {low: 10, middle: 20, high: 30} for path in errors}
    choose = functools.partial(planning.choose, errors, sizes)
    assert choose(20) == {"a": low, "b": low}
    assert choose(30) == {"a": low, "b": middle}  # the better of two steps of 10
    assert choose(40) == {"a": high, "b": low}  # 0.9 for 20, at once
    assert choose(50) == {"a": high, "b": middle}
    assert choose(10**9) == {"a": high, "b": high}


def test_rules_say_what_was_chosen_and_nothing_else():
    config = dataclasses.replace(CONFIG, num_layers=12)
    template = model.abstract_params(config)
    named = model.formats_of(template, planning.CHEAPEST)
    matrices = [path for path, format in named.items() if format != "float32"]
    random = np.random.default_rng(0)
    chosen = {path: str(random.choice(planning.LADDER)) for path in matrices}
    table = planning.rules(chosen)
    assert model.formats_of(template, table) == named | chosen
    assert len(table) <= 7 * len(planning.LADDER) + 1
    assert model.parse_precision(json.dumps(table).encode(), "") == tuple(table)


# --- Measuring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint whose first query matrix is hard to round: a few of its weights are most
    of it; a text beside it."""
    folder = tmp_path_factory.mktemp("model") / "float"
    random = np.random.default_rng(0)
    params = {
        module: {
            name: np.ones(w.shape, np.float32)
            if name == "scale"
            else (random.standard_normal(w.shape) * w.shape[-2] ** -0.5).astype(np.float32)
            for name, w in weights.items()
        }
        for module, weights in model.abstract_params(CONFIG).items()
    }
    hard = params["transformer/decoder_layer_0/multi_head_attention/query"]["w"]
    hard[...] = hard**5
    checkpoint.save(folder, params)
    files.write_json(folder / "config.json", model.config_to_dict(CONFIG))
    (folder.parent / "text").write_text(text(800, 2))
    return folder


def entries_of(folder):
    return checkpoint.check_files(folder, model.abstract_params(CONFIG), planning.CHEAPEST)


def windows_of(folder):
    processor = tokenizer.load(folder, CONFIG.vocab_size)
    tokens = tokenizer.encode(processor, convert.data.split(text(800, 2))[0])
    return calibration.choose_windows(tokens, CONFIG.sequence_len, 1024)


@pytest.fixture(scope="module")
def errors(folder, tmp_path_factory):
    kept = tmp_path_factory.mktemp("kept")
    arguments = CONFIG, entries_of(folder), windows_of(folder), str(folder), kept
    return planning.measure(*arguments, lambda entry, weights: None)


def test_errors_are_those_of_the_outputs_on_held_out_tokens(folder, errors):
    """Of query: rounded by itself, and multiplied with what the layer's norm gives."""
    windows = windows_of(folder)
    held = windows[-max(1, len(windows) // calibration.HELD) :]
    params = checkpoint.restore(folder, model.abstract_params(CONFIG), model.PRECISIONS["float32"])
    floats = dataclasses.replace(CONFIG, activations="float")
    hidden = model.make_model(floats).apply(params, None, held).layers[0].hidden
    norm = params["transformer/decoder_layer_1/rms_norm"]["scale"]
    x = model.rms_norm(hidden, norm, CONFIG.rms_norm_eps).reshape(-1, CONFIG.emb_size)
    path = "transformer/decoder_layer_1/multi_head_attention/query"
    w = params[path]["w"]
    for format in planning.LADDER:
        made = quantize.dequantize(formats.FORMATS[format].quantize(np.asarray(w)))
        expected = jnp.sum((x @ (w - made)) ** 2) / jnp.sum((x @ w) ** 2)
        # Calibration sees activations as they will be multiplied, here in int8.
        assert errors[f"{path}/w"][format] == pytest.approx(float(expected), rel=0.02)


def test_the_ladder_is_one(errors):
    paths = {
        p
        for p, f in model.formats_of(model.abstract_params(CONFIG), planning.CHEAPEST).items()
        if f != "float32"
    }
    assert errors.keys() == paths
    low, middle, high = planning.LADDER
    assert all(e[low] > 3 * e[middle] > 3 * e[high] > 0 for e in errors.values())
    hard = "transformer/decoder_layer_0/multi_head_attention/query/w"
    assert max(errors, key=lambda path: errors[path][middle]) == hard


def test_an_expert_without_tokens_counts_as_the_others_do():
    def line(expert, met, energy, lost):
        losses = dict.fromkeys(planning.LADDER, lost)
        return {"path": "a", "expert": expert, "met": met, "energy": energy, "lost": losses}

    def found(*lines):
        return planning.relative_errors(lines)["a"]["int8"]

    assert found(line(0, True, 30.0, 3.0), line(1, True, 10.0, 3.0)) == pytest.approx(6 / 40)
    lines = line(0, True, 30.0, 3.0), line(1, True, 10.0, 1.0), line(2, False, 48.0, 12.0)
    assert found(*lines) == pytest.approx((4 + 20 * 0.25) / 60)
    assert found(line(0, False, 48.0, 12.0)) == pytest.approx(0.25)


def test_int8_of_an_int8_source_costs_nothing(folder, tmp_path):
    source, config = tmp_path / "int8", dataclasses.replace(CONFIG, num_layers=1)
    template = model.abstract_params(config)
    named = model.formats_of(template, model.PRECISIONS["int8"])
    floats = checkpoint.restore(folder, model.abstract_params(CONFIG), model.PRECISIONS["float32"])
    checkpoint.save(
        source,
        {
            module: {
                name: formats.quantize_int8(floats[module][name])
                if named[f"{module}/{name}"] == "int8"
                else floats[module][name]
                for name in names
            }
            for module, names in template.items()
        },
    )
    entries = checkpoint.check_files(source, template, planning.CHEAPEST)
    arguments = config, entries, windows_of(folder), str(source), tmp_path / "kept"
    found = planning.measure(*arguments, lambda entry, weights: None)
    assert {error["int8"] for error in found.values()} == {0.0}
    assert all(0.01 < error["ternary2-128"] < 0.2 for error in found.values())


# --- Budgets and conversion -----------------------------------------------------------------------


def limits(folder) -> tuple[int, int]:
    """Bytes in memory with the cheapest formats, and with int8, everywhere."""
    short = [
        jax.tree.leaves(runners.abstract_weights(CONFIG, model.PRECISIONS[weights]))
        for weights in (planning.LADDER[0], "int8")
    ]
    return tuple(sum(x.size * x.dtype.itemsize for x in leaves) for leaves in short)


def flags_of(folder, bytes_: int) -> list[str]:
    return ["--budget", str(bytes_ / 1e9), "--calibrate", str(folder.parent / "text"), *FEW]


def test_a_conversion_keeps_to_its_budget(folder, errors, tmp_path, capsys):
    least, most = limits(folder)
    budget = (3 * least + most) // 4
    output = converted(folder, tmp_path / "out", *flags_of(folder, budget))
    table = capsys.readouterr().err
    stored = checkpoint.stored_precision(output)
    report = json.loads((output / convert.REPORT).read_text())
    assert report["budget"]["errors"] == errors
    assert {p: f for p, f in stored.items() if f != "float32"} == report["budget"]["chosen"]
    assert set(planning.LADDER) <= {*stored.values()}
    assert stored["transformer/decoder_layer_0/multi_head_attention/query/w"] == "int8"
    leaves = jax.tree.leaves(runners.abstract_weights(CONFIG, stored))
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    assert 0.9 * budget < size <= budget
    sizes = (checkpoint.readable_size(x) for x in (size, budget))
    assert "weights     {} of {}".format(*sizes) in table
    for family, format in {(checkpoint.family_of(p), f) for p, f in stored.items()}:
        assert format == "float32" or f"{family:<12}{format:<17}" in table
    about = checkpoint.read_config(output)["quantization_config"]
    assert about["weights"] == f"budget-{budget / 1e9:g}"
    assert about["precision"] == [list(rule) for rule in planning.rules(report["budget"]["chosen"])]
    run.main(["--checkpoint", str(output), "--prompt", "we see", "--max-len", "2"])
    assert f"weights     budget-{budget / 1e9:g}, " in capsys.readouterr().err
    # Once more: it is complete, which needs no measuring.
    convert.main([str(folder), str(output), *flags_of(folder, budget)])
    assert "is complete already" in capsys.readouterr().err
    message = refused(folder, output, *flags_of(folder, least))
    assert "exists and is something else: config.json has another quantization_config" in message


def test_interrupted_it_does_not_measure_again(folder, tmp_path, monkeypatch):
    least, most = limits(folder)
    flags = flags_of(folder, (least + most) // 2)
    whole = converted(folder, tmp_path / "whole", *flags)

    measured = []
    round_ = planning.MeasuredLayer._round

    def count(self, at, *arguments):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(at)
        return round_(self, at, *arguments)

    monkeypatch.setattr(planning.MeasuredLayer, "_round", count)
    per_layer = 4 + 3 * CONFIG.num_experts
    stop, output = per_layer + 3, tmp_path / "out"
    assert "interrupted" in refused(folder, output, *flags)
    measured.clear()
    stop = None
    with monkeypatch.context() as patched:
        patched.setattr(calibration.Layer, "convert", interrupt_after(CONFIG.num_layers))
        assert "interrupted" in refused(folder, output, *flags)
    assert len(measured) == per_layer  # the second layer
    converted(folder, output, *flags)
    assert len(measured) == per_layer
    assert contents(output) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def interrupt_after(measured: int):
    """`Layer.convert` that is interrupted once a layer is to be converted and not measured."""
    work = calibration.Layer.convert

    def convert_or_stop(self, devices):
        if not isinstance(self, planning.MeasuredLayer):
            raise KeyboardInterrupt
        return work(self, devices)

    return convert_or_stop


def test_a_layer_without_ternary_weights_is_no_obstacle(folder, tmp_path):
    """To converting the next ones: its outputs are their inputs."""
    table = [["layer_0/.*/(query|key|value|linear|linear_v|linear_1)/w$", "int8"]]
    table += [list(rule) for rule in model.PRECISIONS["ternary-fit-64"]]
    (tmp_path / "table.json").write_text(json.dumps(table))
    flags = ["--precision", str(tmp_path / "table.json")]
    flags += ["--calibrate", str(folder.parent / "text"), *FEW]
    made = converted(folder, tmp_path / "made", *flags)
    lines = json.loads((made / convert.REPORT).read_text())["matrices"]
    assert {calibration.layer_of(line["path"]) for line in lines} == {1}


def test_budgets_that_leave_no_choice(folder, tmp_path):
    least, most = limits(folder)
    message = refused(folder, tmp_path / "out", *flags_of(folder, least - 1))
    assert f"the weights take {checkpoint.readable_size(least)} in memory" in message
    enough = float(message.split("give --budget ")[1].split()[0])
    assert least <= enough * 1e9 < 1.01 * least
    message = refused(folder, tmp_path / "out", *flags_of(folder, most))
    assert f"int8 everywhere takes {checkpoint.readable_size(most)}" in message
    for bytes_ in (least, most - 1):  # are budgets
        planning.Budget(str(bytes_ / 1e9), CONFIG, entries_of(folder))
    assert not [*tmp_path.iterdir()]


def test_a_gpu_for_grok_1():
    """Of 80 GB not even the cheapest weights; of 96 GB what a request leaves."""
    config = model.PRESETS["grok-1"]
    template = model.abstract_params(config)
    named = model.formats_of(template, planning.CHEAPEST)
    entries = [
        checkpoint.Entry(
            module,
            name,
            None,
            lambda: convert._released_form(module, w.shape, "int8"),
            named[f"{module}/{name}"],
            formats.shapes(named[f"{module}/{name}"], w.shape),
            0,
        )
        for module, weights in template.items()
        for name, w in weights.items()
    ]
    print(len(entries))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--budget", "90"], "--budget chooses by a text; give one with --calibrate"),
        (["--budget", "90", "--weights", "ternary2"], "not allowed with argument"),
        (["--budget", "90", "--precision", "table"], "not allowed with argument"),
        (["--budget", "0", "--calibrate", "t"], "expected a number above 0, got '0'"),
        (["--budget", "90GB", "--calibrate", "t"], "expected a number above 0, got '90GB'"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        convert.parse_arguments(["source", "output", *flags])
    assert message in capsys.readouterr().err


def test_a_stream_has_no_budget(capsys):
    with pytest.raises(SystemExit):
        convert.parse_arguments(["--stream", "out", "--budget", "90", "--calibrate", "text"])
    assert "--stream would fetch it twice; --download it" in capsys.readouterr().err
