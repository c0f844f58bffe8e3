"""Formats for a budget: choosing them, measuring what they cost, and converting to them."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import random_params
from test_calibration import text
from test_convert import converted, refused
from test_shards import contents

import calibration
import checkpoint
import convert
import files
import formats
import gptq
import model
import planning
import quantize
import runners
import tokenizer
from checkpoint import readable_size

# Matrices of 128 x 128, all of them.
CONFIG = model.small(128, 2, 8, 8, sequence_len=32, key_size=16, num_experts=4)
# Too few for error-compensated rounding, which takes long to compile and is not needed here.
FEW = ["--calibration-tokens", "128"]
HARD = "transformer/decoder_layer_0/multi_head_attention/query/w"
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
    """A float checkpoint, and a text beside it.

    Small weights of the first query matrix meet large inputs: most of its outputs come from them.
    """
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
    params["transformer/decoder_layer_0/rms_norm"]["scale"][:4] = 100
    params[HARD.removesuffix("/w")]["w"][:4] /= 10
    checkpoint.save(folder, params)
    files.write_json(folder / "config.json", model.config_to_dict(CONFIG))
    (folder.parent / "text").write_text(text(800, 2))
    return folder


def entries_of(folder):
    return checkpoint.check_files(folder, model.abstract_params(CONFIG), planning.CHEAPEST)


def windows_of(folder):
    processor = tokenizer.load(folder, CONFIG.vocab_size)
    tokens = tokenizer.encode(processor, convert.data.split(text(800, 2))[0])
    return calibration.choose_windows(tokens, CONFIG.sequence_len, int(FEW[1]))


def limits(folder) -> tuple[int, int]:
    """Bytes in memory with the cheapest formats, and with int8, everywhere."""
    budget = planning.Budget("0.0008", CONFIG, entries_of(folder))
    matrices = budget.sizes.values()
    return tuple(budget.rest + sum(of[i] for of in matrices) for i in ("ternary-fit-128", "int8"))


def flags_of(folder, bytes_: int) -> list[str]:
    return ["--budget", str(bytes_ / 1e9), "--calibrate", str(folder.parent / "text"), *FEW]


@pytest.fixture(scope="module")
def middle(folder) -> int:
    """A budget that takes some of each format."""
    least, most = limits(folder)
    return (2 * least + most) // 3


@pytest.fixture(scope="module")
def whole(folder, middle):
    return converted(folder, folder.parent / "whole", *flags_of(folder, middle))


@pytest.fixture(scope="module")
def errors(whole):
    return json.loads((whole / convert.REPORT).read_text())["budget"]["errors"]


def test_errors_are_those_of_the_outputs_on_held_out_tokens(folder, errors):
    """Of queries: each matrix by itself, and multiplied with what its layer's norm gives."""
    windows = windows_of(folder)
    held = windows[-1:]  # of four
    params = checkpoint.restore(folder, model.abstract_params(CONFIG), model.PRECISIONS["float32"])
    floats = dataclasses.replace(CONFIG, activations="float")
    h = params["language_model/in_out_embed"]["embeddings"][held]
    h *= CONFIG.embedding_multiplier_scale
    for i in range(CONFIG.num_layers):
        prefix = f"transformer/decoder_layer_{i}"
        layer = {
            module.replace(prefix, calibration.PREFIX): weights
            for module, weights in params.items()
            if module.startswith(prefix)
        }
        norm = layer[f"{calibration.PREFIX}/rms_norm"]["scale"]
        x = model.rms_norm(h, norm, CONFIG.rms_norm_eps).reshape(-1, CONFIG.emb_size)
        path = f"{prefix}/multi_head_attention/query"
        w = np.asarray(params[path]["w"])
        for format in planning.LADDER:
            off = w - quantize.dequantize(formats.FORMATS[format].quantize(w))
            expected = jnp.sum((x @ off) ** 2) / jnp.sum((x @ w) ** 2)
            # Calibration sees activations as they will be multiplied, here in int8.
            assert errors[f"{path}/w"][format] == pytest.approx(float(expected), rel=0.05)
        padded = jnp.pad(h, [(0, calibration.ROWS // 32 - 1), (0, 0), (0, 0)])
        for half in ("attention", "experts"):
            padded = calibration.run(layer, padded, config=floats, half=half, want="h")
        h = padded[:1]


def test_what_is_measured_are_outputs_and_not_weights(errors):
    template = model.abstract_params(CONFIG)
    named = model.formats_of(template, planning.CHEAPEST)
    assert errors.keys() == {path for path, format in named.items() if format != "float32"}
    low, middle, high = planning.LADDER
    hard, others = errors[HARD], [error for path, error in errors.items() if path != HARD]
    assert hard[low] > 0.5 and hard[low] > hard[middle] > 100 * hard[high] > 0
    assert all(0.3 > e[low] > 2 * e[middle] > 2 * e[high] > 0 for e in others)


def test_what_was_measured_is_kept_for_the_same_question_only(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(planning.Measurement, "errors", lambda self: self.folder)
    windows = windows_of(folder)
    seen, held = (windows + (np.arange(len(windows)) == i)[:, None] for i in (0, -1 % len(windows)))
    other = dataclasses.replace(CONFIG, activations="int15")

    def kept(config=CONFIG, windows=windows, source="a"):
        return planning.measure(config, [], windows, source, tmp_path, None)

    assert kept() == kept() == kept(windows=seen)
    assert len({kept(), kept(other), kept(windows=held), kept(source="b")}) == 4


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


def test_int8_of_an_int8_source_loses_nothing(tmp_path):
    """And of ternary formats it says what a matrix that met no token loses of its weights."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    named = model.formats_of(model.abstract_params(config), model.PRECISIONS["int8"])
    params = random_params(config)
    for module, weights in params.items():
        for name, w in weights.items():
            if named[f"{module}/{name}"] == "int8":
                weights[name] = formats.quantize_int8(np.asarray(w))
    checkpoint.save(tmp_path, params)
    template = model.abstract_params(config)
    entries = checkpoint.check_files(tmp_path, template, planning.CHEAPEST)
    own = {(e.module, e.name): e for e in entries if "/decoder_layer_0/" in e.path}
    at = f"{calibration.PREFIX}/moe/linear_1", "w"
    streams = calibration.Streams(*np.zeros((2, 3, 32, config.emb_size), np.float32))
    nothing = gptq.Moments.zeros(config.ffn_size)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        layer = planning.MeasuredLayer(config, own, streams, pool, lambda entry, weights: None)
        kept = layer._round(at, 2, 0, nothing, nothing)
    w = quantize.dequantize(params[at[0]][at[1]])[2]
    np.testing.assert_array_equal(quantize.dequantize(kept), w)
    (line,) = layer.choices
    assert (line.path, line.expert, line.met) == ("/".join(at), 2, False)
    assert line.energy == pytest.approx(np.square(w).sum(), rel=1e-5)
    for format in planning.LADDER[:2]:
        off = w - quantize.dequantize(formats.FORMATS[format].quantize(w))
        assert line.lost[format] == pytest.approx(float(np.square(off).sum()), rel=1e-3)
    assert line.lost["int8"] == 0


# --- Budgets and conversion -----------------------------------------------------------------------


def test_a_conversion_keeps_to_its_budget(folder, errors, middle, whole):
    stored = checkpoint.stored_precision(whole)
    report = json.loads((whole / convert.REPORT).read_text())
    chosen = report["budget"]["chosen"]
    assert report["budget"]["errors"] == errors
    assert {p: f for p, f in stored.items() if f != "float32"} == chosen
    assert set(planning.LADDER) <= {*stored.values()}
    assert stored[HARD] == "int8"
    about = checkpoint.read_config(whole)["quantization_config"]
    assert about["weights"] == f"budget-{middle / 1e9:.12g}"
    assert about["precision"] == [list(rule) for rule in planning.rules(chosen)]
    runner = runners.ModelRunner(CONFIG)
    runner.load(whole)
    size = sum(x.nbytes for x in jax.tree.leaves(runner.params))
    assert 0.95 * middle < size <= middle
    budget = planning.Budget(f"{middle / 1e9:.12g}", CONFIG, entries_of(folder))
    *lines, total_line = budget.table(errors, chosen)
    assert total_line == f"weights     {readable_size(size)} of {readable_size(middle)}"
    families = {(checkpoint.family_of(path), format) for path, format in chosen.items()}
    assert sorted(tuple(line.split()[:2]) for line in lines[1:-1]) == sorted(families)
    for line in lines[1:-1]:
        family, format, count, *_, before, after = line.split()
        paths = [p for p, f in chosen.items() if (checkpoint.family_of(p), f) == (family, format)]
        weights = model.abstract_params(CONFIG)
        sizes = (weights[p.removesuffix("/w")]["w"].size for p in paths)
        assert int(count.replace(",", "")) == sum(sizes)
        for shown, of in ((before, planning.LADDER[0]), (after, format)):
            assert float(shown) == pytest.approx(np.mean([errors[p][of] for p in paths]), abs=1e-4)


def test_a_finished_conversion_is_not_measured_again(folder, middle, whole, monkeypatch, capsys):
    monkeypatch.setattr(planning, "measure", None)
    convert.main([str(folder), str(whole), *flags_of(folder, middle)])
    assert "is complete already" in capsys.readouterr().err
    message = refused(folder, whole, *flags_of(folder, middle + 5000))
    assert "exists and is something else: config.json has another quantization_config" in message
    message = refused(folder, folder, *flags_of(folder, middle))
    assert "exists and is something else: it was not converted with --budget" in message


def test_interrupted_it_does_not_measure_again(folder, middle, whole, tmp_path, monkeypatch):
    flags, output = flags_of(folder, middle), tmp_path / "out"
    measured, limit = [], 0
    round_ = planning.MeasuredLayer._round

    def count(self, at, *arguments):
        if len(measured) == limit:
            raise KeyboardInterrupt
        measured.append(at)
        return round_(self, at, *arguments)

    monkeypatch.setattr(planning.MeasuredLayer, "_round", count)
    per_layer = 4 + 3 * CONFIG.num_experts
    limit = per_layer + 3
    assert "interrupted" in refused(folder, output, *flags)
    measured.clear()
    limit = None
    with monkeypatch.context() as patched:
        patched.setattr(calibration.Layer, "convert", measure_only())
        assert "interrupted" in refused(folder, output, *flags)
    assert len(measured) == per_layer  # those of the second layer
    converted(folder, output, *flags)
    assert len(measured) == per_layer
    assert contents(output) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def measure_only():
    """`Layer.convert` that is interrupted where a layer is to be converted, not measured."""
    work = calibration.Layer.convert

    def convert_or_stop(self, devices):
        if not isinstance(self, planning.MeasuredLayer):
            raise KeyboardInterrupt
        return work(self, devices)

    return convert_or_stop


def test_a_layer_without_ternary_weights_is_no_obstacle(folder, tmp_path):
    """To converting the next ones: its outputs are their inputs."""
    table = [["layer_0/.*/(query|key|value|linear|linear_v|linear_1)/w$", "int8"]]
    table += [list(rule) for rule in model.PRECISIONS["ternary-fit-128"]]
    (tmp_path / "table.json").write_text(json.dumps(table))
    flags = ["--precision", str(tmp_path / "table.json")]
    flags += ["--calibrate", str(folder.parent / "text"), *FEW]
    made = converted(folder, tmp_path / "made", *flags)
    lines = json.loads((made / convert.REPORT).read_text())["matrices"]
    assert {calibration.layer_of(line["path"]) for line in lines} == {1}


def test_budgets_that_leave_no_choice(folder, tmp_path):
    least, most = limits(folder)
    entries = entries_of(folder)
    message = refused(folder, tmp_path / "out", *flags_of(folder, least - 1))
    assert f"the weights take {readable_size(least)} in memory" in message
    enough = float(message.split("give --budget ")[1].split()[0])
    assert least <= enough * 1e9 < 1.01 * least
    with pytest.raises(ValueError) as error:
        planning.Budget(str(most / 1e9), CONFIG, entries)
    assert f"int8 everywhere takes {readable_size(most)}" in str(error.value)
    for bytes_ in (least, most - 1):  # are budgets
        assert planning.Budget(str(bytes_ / 1e9), CONFIG, entries).bytes == bytes_
    assert not [*tmp_path.iterdir()]


def test_a_gpu_for_grok_1(monkeypatch):
    """Of 80 GB not even the cheapest weights; of 96 GB what a request leaves. From two layers."""
    config = dataclasses.replace(model.PRESETS["grok-1"], num_layers=2)
    template = model.abstract_params(config)
    named = model.formats_of(template, planning.CHEAPEST)
    entries = []
    for module, weights in template.items():
        for name, w in weights.items():
            format = named[f"{module}/{name}"]
            source = formats.shapes("int8" if format != "float32" else format, w.shape)
            source = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), source)
            made = formats.shapes(format, w.shape)
            read = functools.partial(lambda tensor: tensor, source)
            entries.append(checkpoint.Entry(module, name, None, read, format, made, 0))
    monkeypatch.setitem(planning.GPUS, "80GB-GPU", 4_600_000_000)
    monkeypatch.setitem(planning.GPUS, "96GB-GPU", 5_600_000_000)
    budget = planning.Budget("96GB-GPU", config, entries)
    beside = 5_600_000_000 - budget.bytes
    cache = 2 * 2 * 2 * (2048 * 8 * 128 * 2)  # two rows, two layers, keys and values
    assert cache + 0.46e9 < beside < cache + 0.47e9  # compiled for an H200: 0.42 GB
    with pytest.raises(ValueError) as error:
        planning.Budget("80GB-GPU", config, entries)
    matrices = sum(sizes["ternary-fit-128"] for sizes in budget.sizes.values())
    assert f"the weights take {readable_size(matrices + budget.rest)} in mem" in str(error.value)
    assert "beside 497 MB for a request of 2048 tokens" in str(error.value)
    whole, cache = 32 * matrices + budget.rest, 32 * cache
    assert 80e9 < whole < 96e9 - cache - beside


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
