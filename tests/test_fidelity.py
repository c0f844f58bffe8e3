"""A converted model beside its source: each figure against whole models, computed another way."""

import dataclasses
import functools
import html.parser
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import EVEN, ODD, random_params

import calibration
import card
import checkpoint
import convert
import data
import evaluate
import fidelity
import files
import model
import quantize
import report
import runners
import sharding
import tokenizer

MOE = dataclasses.replace(ODD, vocab_size=1024)  # that of the tokenizer that is here
CONFIGS = {"experts": MOE, "dense": dataclasses.replace(MOE, num_experts=1, num_selected_experts=1)}
TEXT = "To be, or not to be: that is the <script>alert('question')</script> & \"more\".\n" * 6


def saved(folder, config: model.LanguageModelConfig, weights: str, seed: int = 0):
    """A folder in released format."""
    checkpoint.save(folder, random_params(config, weights, seed=seed))
    files.write_json(folder / "config.json", model.config_to_dict(config))
    return folder


def opened(folder, **changes) -> fidelity.Walker:
    """A student, in the formats of its folder."""
    config = model.config_from_dict(checkpoint.read_config(folder))
    config = dataclasses.replace(config, **changes)
    precision = runners.precision_of(folder, model.abstract_params(config))
    return fidelity.Walker(folder, config, precision, sharding.make_mesh())


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A source in floats, and what it is converted to: groups of 4, the last of 3."""
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    source, output = saved(folder / "source", config, "float32"), folder / "output"
    convert.main([str(source), str(output), "--weights", "ternary-fit-64"])
    return source, output


class Whole:
    """A model all at once, on its own jitted pass, and its output for windows [W, T]."""

    def __init__(self, walker: fidelity.Walker, weights: str | None, windows: data.Windows):
        runner = runners.ModelRunner(walker.config)
        runner.load(walker.folder, weights)
        self.params = runner.params
        self.apply = jax.jit(functools.partial(runner.model.apply, self.params, None))
        self.output = self.apply(windows.inputs)


@pytest.fixture(scope="module")
def compared(pair):
    """The comparison, with activations of the student's own; both models whole; the windows."""
    teacher = fidelity.open_teacher(pair[0], sharding.make_mesh())
    student = opened(pair[1], activations="int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "BATCH", 3)  # the last batch is padded
        found = fidelity.compare(teacher, student, TEXT, length=37)
    windows = data.windows(tokenizer.encode(tokenizer.load(None, 1024), TEXT), 37)
    assert len(windows.mask) == evaluate.BATCH and not windows.mask.all()
    return found, (Whole(teacher, "float32", windows), Whole(student, None, windows)), windows


def test_figures_are_those_of_whole_models(compared):
    found, (taught, converted), windows = compared
    a, b, mask = taught.output, converted.output, windows.mask
    p, q = (np.asarray(jax.nn.log_softmax(x.logits), float)[mask] for x in (a, b))
    np.testing.assert_allclose(found["kl"], np.mean(np.sum(np.exp(p) * (p - q), -1)), rtol=1e-4)
    agree = np.mean(p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(found["agreement"], agree, atol=1.01 / mask.sum())
    assert agree < 0.9
    assert found["tokens"] == mask.sum()

    embedded = np.asarray(taught.params[runners.EMBEDDINGS]["embeddings"])[windows.inputs]
    inputs = [embedded * MOE.embedding_multiplier_scale] * 2
    for layer, *outputs in zip(found["layers"], a.layers, b.layers, strict=True):
        hidden = [np.asarray(x.hidden, float) for x in outputs]
        for key, of_both in (
            ("cosine", hidden),
            ("delta_cosine", [h - x for h, x in zip(hidden, inputs, strict=True)]),
        ):
            unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in of_both]
            # Rounded to 8 bits, activations differ by a whole step where sums do in the last bit.
            np.testing.assert_allclose(layer[key], (unit[0] * unit[1]).sum(-1)[mask].mean(), 1e-4)
            assert layer[key] < 0.999
        inputs = hidden
        if outputs[0].router_probs is not None:
            check_routing(layer, outputs, mask)


def check_routing(layer, outputs, mask):
    close = functools.partial(np.testing.assert_allclose, atol=1.01 / mask.sum())  # one token
    chosen = [np.asarray(x.expert_index)[mask].tolist() for x in outputs]
    probs = -np.sort(-np.asarray(outputs[0].router_probs, float)[mask])
    same = {"top1": [], "set": []}
    for one, other in zip(*chosen, strict=True):
        same["top1"].append(one[0] == other[0])
        same["set"].append({*one} == {*other})
    for (key, agree), margin in zip(same.items(), -np.diff(probs)[:, :2].T, strict=True):
        close(layer[key], np.mean(agree))
        close(layer[f"{key}_weighted"], np.average(agree, weights=margin))
    for name, index in zip(fidelity.NAMES, chosen, strict=True):
        close(layer["load"][name], np.bincount(sum(index, [])) / mask.sum() / 2)


def test_losses_are_those_of_text_loss(compared):
    found, models, _ = compared
    processor = tokenizer.load(None, 1024)
    for one, name in zip(models, fidelity.NAMES, strict=True):
        loss = evaluate.text_loss(lambda t, one=one: one.apply(t).logits, TEXT, processor, 37)
        for key in ("per_token", "per_character"):
            np.testing.assert_allclose(found[name][f"loss_{key}"], getattr(loss, key), rtol=1e-5)
        np.testing.assert_allclose(found[name]["perplexity"], loss.perplexity, rtol=1e-4)
        assert (found["tokens"], found["characters"]) == (loss.tokens, loss.characters)


def test_errors_and_histograms_of_weights(compared):
    """A weight becomes 0 where it is between the thresholds."""
    found, (taught, converted), _ = compared
    errors, zeros = {}, {}
    for module, entries in converted.params.items():
        if not (match := re.search(r"layer_(\d)/(multi|moe|linear)", module)):
            continue
        w, other = np.asarray(taught.params[module]["w"], float), jax.device_get(entries["w"])
        family = {"multi": "attention", "moe": "experts", "linear": "feed-forward"}[match[2]]
        error = np.sum((w - quantize.dequantize(other)) ** 2)
        key = int(match[1]), family
        errors[key] = errors.get(key, 0) + np.array([error, np.sum(w**2)])
        zeros[key] = zeros.get(key, 0) + np.sum(quantize.codes_of(other) == 0)
    assert len(errors) == 4
    for (i, family), (error, energy) in errors.items():
        layer = found["layers"][i]
        np.testing.assert_allclose(layer["error"][family], error / energy, rtol=1e-5)
        histogram = layer["histograms"][family]
        edges = np.linspace(-found["reach"], found["reach"], len(histogram["counts"]) + 1)
        between = abs(edges[:-1] + edges[1:]) / 2 < 0.5
        assert (
            histogram["trits"] and sum(np.array(histogram["counts"])[between]) == zeros[i, family]
        )
    for family, total in found["families"].items():
        pairs = sum(value for (_, name), value in errors.items() if name == family)
        np.testing.assert_allclose(total["error"], pairs[0] / pairs[1], rtol=1e-5)


def test_a_model_beside_itself(tmp_path):
    """On two devices."""
    config = dataclasses.replace(EVEN, vocab_size=1024)
    walker = fidelity.open_teacher(saved(tmp_path, config, "int8"), sharding.make_mesh(1, 2))
    found = fidelity.compare(walker, walker, TEXT[:100], length=30)
    assert abs(found["kl"]) < 1e-6 and found["agreement"] == 1
    assert found["teacher"] == found["student"]
    for layer in found["layers"]:
        same = {"cosine", "delta_cosine", "top1", "top1_weighted", "set", "set_weighted"}
        np.testing.assert_allclose([layer[key] for key in same], 1, atol=1e-6)
        assert layer["load"]["teacher"] == layer["load"]["student"]
        assert set(layer["error"].values()) == {0}
        assert not any(histogram["trits"] for histogram in layer["histograms"].values())


@pytest.mark.parametrize("weights, expected", [("int8", "int15"), ("float32", "float")])
def test_activations_of_8_bits_are_for_weights_trained_with_them(tmp_path, weights, expected):
    folder = saved(tmp_path, MOE, weights)
    for configured, runs in (("int8", expected), ("int15", expected), ("float", "float")):
        config = dataclasses.replace(MOE, activations=configured)
        files.write_json(folder / "config.json", model.config_to_dict(config))
        teacher = fidelity.open_teacher(folder, sharding.make_mesh())
        assert teacher.config.activations == runs
    assert calibration.teacher_activations("int8", ["int8", "ternary", "float32"]) == "int8"


def test_agreement_counts_by_the_margin_of_the_teacher():
    """Two tokens: sure of (0, 1) and of 1 being behind 0, and hardly sure of either."""
    probs = jnp.array([[[0.6, 0.3, 0.1], [0.35, 0.33, 0.32]]])
    hidden = jnp.ones((1, 2, 4))
    output = functools.partial(model.LayerOutput, hidden, None, probs)
    before, after = (
        (hidden, hidden),
        (
            output(jnp.array([[[0, 1], [0, 1]]])),
            output(jnp.array([[[1, 0], [0, 2]]])),
        ),
    )
    sums = fidelity._layer_sums(before, after, jnp.ones((1, 2), bool))
    expected = {"top1": 1, "top1_weighted": 0.02, "top1_margin": 0.32}
    expected |= {"set": 1, "set_weighted": 0.2, "set_margin": 0.21}
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    assert sums["load"].tolist() == [[2, 2, 0], [2, 1, 1]]


# --- The command ----------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.titles, self.text = set(), set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("pair", ["experts"], indirect=True)
def test_the_command_prints_and_writes_all_of_it(tmp_path, pair, capsys):
    source, output = pair
    folder = tmp_path / "a<b>&c"
    folder.symlink_to(output)
    text, table, page = (tmp_path / name for name in ("text", "table.json", "page.html"))
    text.write_text(TEXT)
    flags = [
        "--data",
        str(text),
        "--split",
        "all",
        "--json",
        str(table),
        "--html",
        str(page),
        "--card",
    ]
    evaluate.main([str(folder), "--against", str(source), *flags])
    printed = capsys.readouterr().out
    found = json.loads(table.read_text())
    documented = re.findall(r"^    (\w[a-z_, ]+):", fidelity.compare.__doc__, re.MULTILINE)
    assert set(found) == set(", ".join(documented).split(", "))
    assert f"KL(teacher||student){found['kl']:>26.4f}" in printed
    layer = found["layers"][1]
    assert f"    1{layer['cosine']:>10.4f}{layer['delta_cosine']:>10.4f}" in printed

    told = output / card.NAME
    told.write_text(told.read_text() + "\n## Mine\n")
    for _ in range(2):
        card.add_comparison(output, found, source.name, "a text")
        text = told.read_text()
        assert text.count(report.table(found)) == 1 and "Not measured" not in text
        assert text.startswith("---\n") and text.endswith("```\n\n## Mine\n")
    convert.main(["--verify", str(output)])
    capsys.readouterr()

    content = page.read_text()
    read = Page(content)
    assert not read.tags & {"script", "link", "img", "iframe"} and "svg" in read.tags
    assert not read.attributes & {"src", "href", "onload", "onclick"}
    assert not re.search(r"https?:|url\(|@import", content)
    whole = "".join(read.text)
    assert str(folder) in whole and TEXT.replace("\n", "⏎\n") in whole
    assert len(read.titles) == len(found["sample"]) == found["tokens"]
    first = found["sample"][0]
    assert f"{100 * first['student'][0][1]:.1f} %" in read.titles[0]
    assert any("‘<’" in title for title in read.titles)

    piece = "<script>'&amp;\"</script>"  # of somebody else's tokenizer
    found["sample"][0] |= {"text": piece, "teacher": [[piece, 1.0]]}
    read = Page(report.page(found))
    assert "script" not in read.tags and piece in "".join(read.text)
    assert read.titles[0].count(piece) == 2


@pytest.mark.parametrize("pair", ["experts"], indirect=True)
def test_errors(tmp_path, pair, capsys):
    source, output = map(str, pair)

    def message(*args):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([str(arg) for arg in args])
        return f"{stopped.value}{capsys.readouterr().err}"

    logits = ["--tokens", "tokens.npy", "--save-logits", "logits.npy"]
    assert "--against takes a text" in message(output, "--against", source, *logits)
    text = ["--data", __file__]
    assert "are of a comparison" in message(output, *text, "--html", tmp_path / "page.html")
    assert "no model card" in message(source, *text, "--against", source, "--card")
    told = message(output, *text, "--against", source, "--card", "--weights", "ternary")
    assert "leave out --weights" in told
    assert "no checkpoint here" in message(output, *text, "--against", tmp_path)
    other = dataclasses.replace(MOE, num_layers=3, num_experts=4)
    saved(tmp_path / "other", other, "float32")
    told = message(output, *text, "--against", tmp_path / "other")
    assert "num_layers 2 instead of 3" in told and "num_experts 5 instead of 4" in told
    folder = tmp_path / "pieces"
    saved(folder, model.config_from_dict(checkpoint.read_config(source)), "float32")
    (folder / tokenizer.FILE).write_bytes(tokenizer.train(Path(__file__).read_text(), 1024))
    assert "it has another tokenizer" in message(output, *text, "--against", folder)


def test_logits_that_are_no_numbers(tmp_path):
    folder = saved(tmp_path, MOE, "float32")
    walker = fidelity.open_teacher(folder, sharding.make_mesh())
    params = walker.outer_params()
    params["language_model/rms_norm"]["scale"] *= np.float32(3e38)
    walker.outer_params = lambda: params
    with pytest.raises(ValueError, match=f"{folder}: logits that are not finite"):
        fidelity.compare(walker, walker, TEXT[:50], length=30)


def test_errors_of_weights():
    """Of each parameter, between two models in different formats."""
    float_params = random_params(EVEN, "float32")
    packed = random_params(EVEN, "ternary")
    errors = fidelity.weight_errors(float_params, packed)
    assert errors.keys() == {f"{m}/{n}" for m, of in float_params.items() for n in of}
    for path, error in errors.items():
        module, name = path.rsplit("/", 1)
        w, other = (
            np.asarray(quantize.dequantize(p[module][name]), np.float64)
            for p in (float_params, packed)
        )
        assert error == pytest.approx(np.sum((w - other) ** 2) / np.sum(w**2), rel=1e-5, abs=1e-12)
    assert max(errors.values()) > 0.1 and not any(fidelity.weight_errors(packed, packed).values())
