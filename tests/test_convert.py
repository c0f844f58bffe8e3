"""The command, from the release to a converted checkpoint, through every interruption."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from factories import CASES, GOLDEN, golden_config, random_params
from hub import Hub, point_to
from huggingface_hub.utils import close_session
from test_shards import contents, flip

import card
import checkpoint
import convert
import formats
import model
import quantize
import run
import runners
import sharding
import shards
import tensor_file
import tokenizer

ROOT = Path(convert.__file__).parent
DEMO = ROOT / "checkpoints/demo"
SHARD = ["--shard-size", "0.0005"]  # GB: the demo in five shards
PRECISIONS = ["ternary", "int8", "ternary-experts", "ternary-fit", "ternary2-experts-64"]


def converted(source, output, *flags):
    convert.main([str(source), str(output), *flags])
    return output


def refused(*arguments):
    with pytest.raises(SystemExit) as exit_:
        convert.main([str(argument) for argument in arguments])
    return str(exit_.value.code)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, converted in one go."""
    return converted(DEMO, tmp_path_factory.mktemp("demo") / "ternary", *SHARD)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# --- Exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", shards.PACKINGS)
@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_restoring_either_gives_the_same_bits(tmp_path, case, weights, packing):
    folder = converted(
        GOLDEN / case,
        tmp_path / "out",
        "--weights",
        weights,
        "--packing",
        packing,
        "--threads",
        "3",
    )
    assert checkpoint.default_weights(folder) == weights
    template, rules = model.abstract_params(golden_config(case)), model.PRECISIONS[weights]
    before = checkpoint.restore(GOLDEN / case, template, rules)
    assert_same(checkpoint.restore(folder, template, rules), before)


@pytest.mark.parametrize(
    "weights, packing", [("ternary", "base3"), ("ternary", "2bit"), ("ternary2-64", "base3")]
)
@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)])
def test_every_mesh_restores_the_same_bits(tmp_path, mesh, weights, packing):
    options = "--weights", weights, "--packing", packing
    folder = converted(GOLDEN / "released_layout", tmp_path / "out", *options)
    template = model.abstract_params(golden_config("released_layout"))
    args = template, model.PRECISIONS[weights]
    shardings = functools.partial(sharding.parameter_shardings, sharding.make_mesh(*mesh))
    found = checkpoint.restore(folder, *args, shardings)
    assert_same(found, checkpoint.restore(GOLDEN / "released_layout", *args))
    leaf = found["transformer/decoder_layer_0/moe/linear_1"]["w"].packed
    assert leaf.sharding.is_fully_replicated == (mesh == (8, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_converting_on_load(tmp_path, dtype):
    case = GOLDEN / "released_layout"
    config = golden_config("released_layout", fprop_dtype=dtype)
    tokens = np.random.default_rng(0).integers(4, 128, (2, 33)).astype(np.int32)

    def logits(folder):
        runner = runners.ModelRunner(config)
        runner.load(folder)
        return runner.logits(tokens)

    np.testing.assert_array_equal(logits(converted(case, tmp_path / "out")), logits(case))


def test_run_recognises_it(tmp_path, capsys):
    config = dataclasses.replace(model.PRESETS["tiny"], num_layers=1)
    source = tmp_path / "source"
    checkpoint.save(source, random_params(config, "int8"))
    (source / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    folder = converted(source, tmp_path / "out", "--weights", "ternary-experts")
    flags = ["--prompt", "ROMEO:", "--max-len", "12", "--mesh", "1,1"]
    capsys.readouterr()
    run.main(["--checkpoint", str(folder), *flags])
    found = capsys.readouterr()
    assert "weights     ternary-experts" in found.err
    run.main(["--checkpoint", str(source), "--weights", "ternary-experts", *flags])
    assert capsys.readouterr().out == found.out and len(found.out) > 20
    with pytest.raises(SystemExit, match="is ternary in the file, which cannot become int8"):
        run.main(["--checkpoint", str(folder), "--weights", "int8", *flags])


# --- What is written ------------------------------------------------------------------------------


def test_a_converted_folder_has_all_that_people_know_from_hubs(demo):
    names = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    others = {"config.json", card.NAME, shards.INDEX, shards.CHECKSUMS, tokenizer.FILE}
    assert set(contents(demo)) == {*names, *others}
    config = json.loads((demo / "config.json").read_text())
    assert config["preset"] == "demo" and config["emb_size"] == 256
    about = config["quantization_config"]
    assert about["format_version"] == 2 and about["packing"] == "base3"
    assert about["precision"] == [list(rule) for rule in model.PRECISIONS["ternary"]]
    assert (demo / tokenizer.FILE).read_bytes() == tokenizer.DEMO.read_bytes()


def test_five_trits_take_a_byte(demo, tmp_path):
    def experts(folder):
        found = shards.open_shards(folder).items()
        return [leaf for path, (_, leaf) in found if "/moe/" in path]

    for folder, bits in ((demo, 1.6), (converted(DEMO, tmp_path / "o", "--packing", "2bit"), 2)):
        (found,) = {8 * leaf.packed.stored.size / np.prod(leaf.shape) for leaf in experts(folder)}
        assert bits <= found < 1.02 * bits


def test_no_tokenizer_is_a_note(tmp_path, capsys):
    config = dataclasses.replace(model.PRESETS["tiny"], vocab_size=999, num_layers=1)
    source = tmp_path / "source"
    checkpoint.save(source, random_params(config, "int8"))
    (source / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    folder = converted(source, tmp_path / "out")
    assert "note        no tokenizer beside the weights" in capsys.readouterr().err
    assert tokenizer.FILE not in contents(folder)


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """Of the heap; what is mapped is the benchmark's to measure."""
    random = np.random.default_rng(0)
    codes = np.repeat(random.integers(-128, 128, (1, 1024, 2048), np.int8), 16, axis=0)
    scales = np.ones((16, 1, 2048), jax.numpy.bfloat16)
    params = {"moe/linear": {"w": quantize.QuantizedWeight(codes, scales)}}
    checkpoint.save(tmp_path, params)
    size = codes.nbytes
    del codes, params
    template = {"moe/linear": {"w": jax.ShapeDtypeStruct((16, 1024, 2048), np.float32)}}
    entries = checkpoint.check_files(tmp_path, template, [("w", "ternary")])
    tracemalloc.start()
    try:
        convert.convert(entries, tmp_path / "out", {}, {}, source="", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 2  # two threads, each with some MB; converted it is a fifth


# --- Interruptions --------------------------------------------------------------------------------

STALLED = """
import signal, sys, time, convert
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
fill, calls = convert._fill_converted, []
def stalled(*args):
    calls.append(args)
    if len(calls) == int(sys.argv[1]):
        print("there", flush=True)
        time.sleep(60)
    fill(*args)
convert._fill_converted = stalled
convert.main(sys.argv[2:])
"""


def start_and_stall(after, *arguments):
    """The command in a process that waits before its n-th ternary tensor."""
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, str(after), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("how, after", [("KILL", 2), ("KILL", 13), ("INT", 20), ("TERM", 27)])
def test_killed_and_run_again_it_ends_with_the_same_files(demo, tmp_path, how, after):
    output = tmp_path / "out"
    process = start_and_stall(after, DEMO, output, *SHARD)
    process.send_signal(getattr(signal, f"SIG{how}"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert not output.exists()
    partial = shards.partial_folder(output)
    finished = [path for path in partial.glob("*.safetensors")]
    assert len(finished) >= (after > 13)
    if how == "INT":
        assert "run the same command again, it goes on where it stopped" in errors
        assert "Traceback" not in errors
    assert "was not finished" in refused("--verify", partial)
    stamps = {path.name: path.stat().st_mtime_ns for path in finished}
    sums = shards.read_checksums(partial)
    converted(DEMO, output, *SHARD)
    assert contents(output) == contents(demo)
    kept = {name: (output / name).stat().st_mtime_ns for name in stamps if name in sums}
    assert kept == {name: stamps[name] for name in kept}


def test_a_file_that_cannot_grow_is_one_error(demo, tmp_path):
    """The system's own error for a full disk, or the nearest that can be had: a limit."""
    output = tmp_path / "out"
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 900; exec "$0" "$@"', sys.executable, "convert.py"]
        + [DEMO, output, "--shard-size", "0.002"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1
    file = shards.partial_folder(output) / "model-00001-of-00002.safetensors.part"
    assert done.stderr.startswith(f"error: {file}: cannot be written: File too large; make room")
    assert done.stderr.count("\n") == 1
    assert not output.exists()
    converted(DEMO, output, "--shard-size", "0.002")
    assert shards.verify(output) == []


def test_too_little_space_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused(DEMO, tmp_path / "new/out")
    assert re.search(r"out needs 2.55 MB, .* has 1 MB free; make room, or choose", message)
    assert not list(tmp_path.iterdir())


def fail_after(count, monkeypatch):
    """Makes the next conversion fail after `count` ternary tensors."""
    fill, calls = convert._fill_converted, []

    def failing(*args):
        calls.append(args)
        if len(calls) > count:
            raise OSError("no")
        fill(*args)

    monkeypatch.setattr(convert, "_fill_converted", failing)


def test_other_options_do_not_go_on(demo, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_after(20, patch)
        assert refused(DEMO, output, *SHARD) == "error: no"
    message = refused(DEMO, output, *SHARD, "--packing", "2bit")
    assert "was begun with another quantization_config.packing, 'base3', not '2bit'" in message
    shutil.copytree(DEMO, tmp_path / "copy")
    assert "was begun with another source" in refused(tmp_path / "copy", output, *SHARD)
    converted(DEMO, output, *SHARD)
    assert contents(output) == contents(demo)


def test_what_holds_nothing_yet_does_not_block(tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_after(0, patch)
        assert refused(DEMO, output, "--packing", "2bit") == "error: no"
    assert shards.partial_folder(output).exists()
    converted(DEMO, output)
    assert shards.verify(output) == [] == shards.without_sums(output)


def test_a_converted_checkpoint_is_no_source(demo, tmp_path):
    message = f"error: {demo}: is converted already, transformer/decoder_layer_0/"
    assert refused(demo, tmp_path / "out").startswith(message)
    assert refused("--inspect", demo, "--source", demo).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_complete_output_is_left_alone(demo, capsys):
    before = contents(demo)
    converted(DEMO, demo, *SHARD)
    assert "is complete already" in capsys.readouterr().err
    message = refused(DEMO, demo, "--packing", "2bit")
    assert (
        "exists and is something else: config.json has another quantization_config.packing, "
        in (message)
    )
    assert "'base3', not '2bit'; remove it, or choose another folder" in message
    message = refused(DEMO, demo, "--weights", "ternary-experts")
    assert "has another quantization_config.weights, 'ternary', not 'ternary-experts'" in message
    assert "something else: it is no converted checkpoint; remove" in refused(DEMO, DEMO)
    assert contents(demo) == before


@pytest.mark.parametrize("name, value", [("router", np.nan), ("query", -1.0)])
def test_numbers_that_no_model_has_are_not_converted(tmp_path, name, value):
    """Of a router, and of a scale that is kept as it is."""
    config = dataclasses.replace(model.PRESETS["tiny"], num_layers=1)
    params = jax.tree.map(np.array, random_params(config, "int8"))
    module = next(m for m in params if m.endswith(name))
    w = params[module]["w"]
    (w if name == "router" else w.scales)[0, 0] = value
    source = tmp_path / "source"
    checkpoint.save(source, params)
    (source / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    message = refused(source, tmp_path / "out", "--weights", "ternary-experts")
    assert re.search(f"{source}/ckpt-0/tensor.*: {module}/w: (NaN or|negative or non-)", message)


# --- Verify and inspect ---------------------------------------------------------------------------


def test_verify(demo, tmp_path, capsys):
    convert.main(["--verify", str(demo)])
    out = capsys.readouterr().out
    assert re.search(r"9 files, 2.5\d MB, all as they were written\n$", out)
    folder = tmp_path / "copy"
    shutil.copytree(demo, folder)
    file = folder / "model-00003-of-00005.safetensors"
    flip(file, -1)
    message = refused("--verify", folder)
    assert re.search(rf"error: {file}: transformer/decoder_layer_\d/\S+: damaged", message)


def test_verify_a_checkpoint_of_the_first_version(demo, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(demo, folder)
    sums = shards.read_checksums(folder)
    sums = {name: sums[name] for name in sums if name.endswith(".safetensors")}
    (folder / shards.CHECKSUMS).write_text(json.dumps(sums))
    convert.main(["--verify", str(folder)])
    first, second = capsys.readouterr().out.splitlines()
    assert re.search("5 files, .*, all as they were written$", first)
    assert second == (
        "not compared, for they have no sums: 'README.md', 'config.json', "
        "'model.safetensors.index.json', 'tokenizer.model'"
    )


@pytest.mark.parametrize("flag", ["--verify", "--inspect"])
def test_what_is_no_converted_checkpoint(tmp_path, flag):
    message = refused(flag, DEMO)
    assert message.startswith(
        f"error: {DEMO}: a released checkpoint, which has no sums; convert.py"
    )
    assert "no checkpoint here" in refused(flag, tmp_path)


def test_inspect(demo, capsys):
    """Densities and errors are those of the arrays themselves."""
    convert.main(["--inspect", str(demo), "--source", str(DEMO)])
    lines = capsys.readouterr().out.splitlines()
    template = model.abstract_params(model.PRESETS["demo"])
    ternary, int8 = (
        checkpoint.restore(DEMO, template, model.PRECISIONS[name]) for name in ("ternary", "int8")
    )
    rows = {line.split()[0]: line.split() for line in lines if "/" in line.split(" ")[0]}
    assert len(rows) == sum(map(len, template.values()))
    for module in (
        "transformer/decoder_layer_2/moe/linear_1",
        "transformer/decoder_layer_0/router",
    ):
        row, w, t = rows[f"{module}/w"], int8[module]["w"], ternary[module]["w"]
        exact = np.asarray(quantize.dequantize(w), float)
        error = ((exact - np.asarray(quantize.dequantize(t))) ** 2).sum() / (exact**2).sum()
        assert row[-1] == f"{error:.4f}"
        if "moe" in module:
            density = np.mean(np.asarray(quantize.unpack(t)) != 0)
            size = f"{8 * 256 * 52 + 32:,}"
            assert row[1:-1] == ["ternary", "8", "x", "256", "x", "256", f"{density:.4f}",
                                 f"{np.mean(t.scales):.5g}", size]  # fmt: skip
    families = {line.split()[0]: line.split() for line in lines[len(rows) + 2 :]}
    assert list(families) == [
        "family",
        "embeddings",
        "norms",
        "experts",
        "attention",
        "router",
        "all",
    ]
    assert families["experts"][1:4] == ["6,291,456", "1,278,336", "1.625"]
    assert families["all"][1] == "7,352,576"
    assert families["router"][-1] == "0.0000"


def test_inspect_without_a_source_and_with_another(demo, tmp_path, capsys):
    convert.main(["--inspect", str(demo)])
    out = capsys.readouterr().out
    assert "embeddings" in out and "32.000" in out
    message = refused("--inspect", demo, "--source", GOLDEN / "dense")
    assert "was not made from" in message


def test_measures_add_up():
    a, b = convert.Measure(10, 4, 5, 1.0, 2.0), convert.Measure(20, 6, 7, 0.5, 2.0)
    assert convert.summed([a, b]) == convert.Measure(30, 10, 12, 1.5, 4.0)
    assert convert.summed([a, b]).density == "0.4000"
    assert convert.summed([a, b]).relative_error == "0.3750"
    assert convert.summed([a, convert.Measure(1, 4)]) == convert.Measure(11, 8)


# --- Precisions and sources -----------------------------------------------------------------------


def as_stored(folder):
    config = model.config_from_dict(checkpoint.read_config(folder))
    template = model.abstract_params(config)
    precision = checkpoint.stored_precision(folder)
    return config, precision, checkpoint.restore(folder, template, precision)


def test_version_1_loads():
    folder = GOLDEN / "version_1"
    config, precision, params = as_stored(folder)
    assert checkpoint.default_weights(folder) == "ternary-experts"
    template = model.abstract_params(config)
    assert precision == model.formats_of(template, model.PRECISIONS["ternary-experts"])
    with np.load(GOLDEN / "version_1.npz") as values:
        assert len(values) == len(precision)
        for path in precision:
            module, name = path.rsplit("/", 1)
            found = quantize.dequantize(params[module][name])
            np.testing.assert_array_equal(found, values[path.replace("/", "|")])


MIXED = [
    ["layer_0/.*/(query|key|value|linear|linear_v|linear_1)/w$", "int8"],
    ["/multi_head_attention/.*/w$", "ternary2"],
    ["/moe/linear_1/w$", "ternary2-64"],
    ["/moe/", "ternary-fit-64"],
    ["", "float32"],
]


def test_a_precision_of_ones_own(tmp_path, capsys):
    """By family and layer; config.json says what it is, and all commands know it."""
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(MIXED))
    folder = converted(DEMO, tmp_path / "out", "--precision", str(file))
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (about["weights"], about["precision"]) == ("mixed", MIXED)
    _, precision, params = as_stored(folder)
    layers = "transformer/decoder_layer_"
    assert precision[f"{layers}0/moe/linear/w"] == "int8"
    assert precision[f"{layers}1/moe/linear/w"] == "ternary-fit-64"
    assert precision[f"{layers}3/multi_head_attention/key/w"] == "ternary2"
    assert params[f"{layers}2/moe/linear_1"]["w"].multipliers.shape == (8, 256, 8, 2)
    convert.main(["--inspect", str(folder), "--source", str(DEMO)])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    errors = {path: float(row[-1]) for path, row in rows.items() if "/w" in path}
    assert errors[f"{layers}0/moe/linear/w"] == 0
    assert errors[f"{layers}1/moe/linear_1/w"] < 0.05 < errors[f"{layers}1/moe/linear/w"] < 0.3


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a list of pairs"),
        ('{"a": 1}', "not a list of pairs"),
        ('[["("], ["", "float32"]]', "not a list of pairs"),
        ('[["(", "int8"], ["", "float32"]]', "not a list of pairs.*unterminated subpattern"),
        ('[["/w$", "ternary3"], ["", "float32"]]', "unknown format 'ternary3'; known: "),
        ('[["/router/w", "ternary"], ["", "float32"]]', "router/w cannot be ternary, only float32"),
        ('[["/moe/", "ternary"]]', "no rule matches parameter"),
        ('[["", "float32"], ["/moe/", "ternary"]]', "match no parameter: .*/moe/"),
    ],
)
def test_precisions_that_are_none(tmp_path, content, message):
    file = tmp_path / "mixed.json"
    file.write_text(content)
    assert re.search(message, refused(DEMO, tmp_path / "out", "--precision", str(file)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source_weights", ["float32", "int8"])
def test_our_own_checkpoints_are_sources(tmp_path, source_weights):
    """Converted ones of floats or int8; what is made is what the quantizers make of the values."""
    config = dataclasses.replace(model.PRESETS["tiny"], num_layers=1)
    params, rules = random_params(config, source_weights), model.PRECISIONS[source_weights]
    about = model.config_to_dict(config) | checkpoint.quantization(source_weights, rules)
    source = tmp_path / "source"
    checkpoint.save_converted(source, params, about)
    for weights in ("ternary", "ternary-fit", "ternary2-experts-64", "int8"):
        folder = converted(source, tmp_path / weights, "--weights", weights)
        _, precision, found = as_stored(folder)
        for path, format in precision.items():
            module, name = path.rsplit("/", 1)
            w = params[module][name]
            if format != source_weights:  # from codes, two sums of trits may be equally near
                values = np.asarray(quantize.dequantize(w))
                made = formats.FORMATS[format].quantize(values)
                a, b = (quantize.dequantize(x) for x in (found[module][name], made))
                assert np.mean(np.isclose(a, b, rtol=1e-6)) > 0.99 and np.allclose(
                    np.square(a - values).sum(), np.square(b - values).sum(), rtol=1e-3
                )
                w = made
            assert jax.tree.structure(w) == jax.tree.structure(found[module][name])
    loaded = checkpoint.restore(
        source, model.abstract_params(config), model.PRECISIONS["ternary-fit"]
    )
    assert_same(loaded, as_stored(tmp_path / "ternary-fit")[2])


# --- From the hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with Hub(DEMO) as hub:
        point_to(hub.url, monkeypatch)
        yield hub
    close_session()


def stream(output, *flags):
    convert.main(["--stream", str(output), "--preset", "demo", *SHARD, *flags])
    return output


@pytest.mark.parametrize("weights", ["ternary", "ternary-experts"])
def test_a_stream_ends_with_the_same_weights(hub, tmp_path, weights):
    """And with none of the release's files; not all of them were here at once."""
    groups = golden_config("released_layout")  # a release that was sharded 8 ways
    hub.folder = GOLDEN / "released_layout"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setitem(model.PRESETS, "demo", groups)
        output = stream(tmp_path / "out", "--weights", weights)
    expected = converted(GOLDEN / "released_layout", tmp_path / "two", "--weights", weights, *SHARD)
    found, expected = contents(output), contents(expected)
    about = json.loads(found.pop("config.json")), json.loads(expected.pop("config.json"))
    assert about[0] | {"preset": None} == about[1]
    assert found.pop(shards.CHECKSUMS) != expected.pop(shards.CHECKSUMS)  # for that preset
    assert found == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "two"}


def test_a_stream_keeps_few_files(hub, tmp_path, monkeypatch, demo):
    counts = []
    fetch = convert.download.tensor

    def counted(folder, name, repo, **options):
        counts.append(len(list((folder / "ckpt-0").glob("*"))) if folder.exists() else 0)
        return fetch(folder, name, repo, **options)

    monkeypatch.setattr(convert.download, "tensor", counted)
    output = stream(tmp_path / "out")
    assert contents(output) == contents(demo)
    assert len(counts) == len(hub.files()) - 4  # each once; config.json and others are not its
    assert max(counts) < len(counts) / 2
    assert not (tmp_path / "out.download").exists()


def test_a_stream_interrupted_in_the_middle_goes_on(hub, tmp_path, demo):
    output, name = tmp_path / "out", "ckpt-0/tensor00030_000"
    size = (DEMO / name).stat().st_size
    hub.cut_once[name] = size // 2
    hub.plain.add(name)
    shutil.copytree(DEMO, tmp_path / "published")
    (tmp_path / "published" / name).rename(tmp_path / "away")
    hub.folder = tmp_path / "published"
    assert "cannot find ckpt-0/tensor00030_000" in refused(
        "--stream", output, "--preset", "demo", *SHARD
    )
    finished = len(list(shards.partial_folder(output).glob("*.safetensors")))
    assert 0 < finished < 5
    asked = len(hub.requests)
    (tmp_path / "away").rename(tmp_path / "published" / name)
    stream(output)
    assert contents(output) == contents(demo)
    again = {r.path for r in hub.requests[asked:] if r.path.startswith("/store/")}
    assert not any(path.endswith("tensor00000_000") for path in again)


def test_what_a_killed_stream_left_is_removed(demo, tmp_path):
    """Killed between its last rename and the cleaning."""
    shutil.copytree(demo, tmp_path / "out")
    (tmp_path / "out.download/ckpt-0").mkdir(parents=True)
    stream(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stream_that_is_closed_stops_fetching(tmp_path, monkeypatch):
    stopped = []

    def endless(folder, name, repo, advance):
        try:
            while True:
                advance(1)
        except BaseException as error:
            stopped.append(error)
            raise

    monkeypatch.setattr(convert.download, "tensor", endless)
    template = model.abstract_params(model.PRESETS["demo"])
    stream = convert.Stream(tmp_path, "repo", template, model.PRECISIONS["ternary"])
    stream.fetch(next(iter(stream.files.values())))
    stream.close()  # returns, for one thing
    assert len(stopped) == 1


def test_download(hub, tmp_path, capsys):
    convert.main(["--download", str(tmp_path / "release"), "--preset", "demo"])
    assert "has all" in capsys.readouterr().err
    fetched = {path.name: path.read_bytes() for path in (tmp_path / "release/ckpt-0").iterdir()}
    assert fetched == contents(DEMO / "ckpt-0")


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["a"], ["a", "b", "c"], ["--verify", "a", "b"], ["--verify", "a", "--inspect", "b"]],
)
def test_arguments_that_mean_nothing(arguments, capsys):
    with pytest.raises(SystemExit):
        convert.main(arguments)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--shard-size", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "two"])
def test_sizes_and_counts_that_mean_nothing(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        convert.main([str(DEMO), str(tmp_path / "out"), f"{flag}={value}"])
    error = capsys.readouterr().err
    assert f"error: argument {flag}: expected a number above 0, got '{value}'" in error
    assert not list(tmp_path.iterdir())


def test_no_source(tmp_path):
    assert "no checkpoint here, expected a folder ckpt-0" in refused(
        tmp_path / "a", tmp_path / "b", "--preset", "tiny"
    )
    assert not (tmp_path / "b.incomplete").exists()


def test_pages_are_given_back(tmp_path):
    tensor_file.write_tensor(tmp_path / "t", np.ones((1 << 20,), np.float32))
    array = tensor_file.read_tensor(tmp_path / "t")

    def resident():
        lines = Path("/proc/self/smaps").read_text().split("\n")
        at = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "t")))
        return int(next(line for line in lines[at:] if line.startswith("Rss")).split()[1])

    assert array.sum() == 1 << 20 and resident() >= 4096
    tensor_file.release(array[5:])
    assert resident() == 0
    assert array.sum() == 1 << 20
    tensor_file.release(np.ones(3))  # not mapped: nothing to do


def test_the_model_card():
    """What the Hub reads is YAML between dashes; the rest says what the weights became."""
    config = model.config_to_dict(model.PRESETS["grok-1"])
    leaves = {
        path: convert.stored_form(entry, "base3")
        for path, entry in {
            "layer/linear/w": entry_of("ternary", (8, 256, 64)),
            "norm/scale": entry_of("float32", (256,)),
        }.items()
    }
    about = checkpoint.quantization("ternary-experts", (), "base3")
    about["quantization_config"]["calibration"] = {"tokens": 32768}
    text = card.model_card(config | about, leaves).decode()
    head = text.split("---\n")[1]
    assert "base_model: xai-org/grok-1\n" in head and "license: apache-2.0\n" in head
    assert f"| parameters | {8 * 256 * 64 + 256:,}, in 64 layers |" in text
    assert (
        "absmean of each matrix, as in BitNet b1.58 (arXiv 2402.17764); attention in int8" in text
    )
    assert "on 32,768 tokens of a text" in text
    toy = dataclasses.asdict(model.PRESETS["tiny"])
    other = card.model_card(toy | checkpoint.quantization("mine", (), "2bit"), leaves).decode()
    assert "license" not in other and "mixed, by a table" in other


@pytest.mark.parametrize("weights", model.PRECISIONS)
def test_every_choice_of_weights_has_a_method(weights):
    assert card.method(weights) != card.method("a table of mine")


def entry_of(format, shape):
    made = formats.shapes(format, shape)
    return checkpoint.Entry("layer", "w", None, None, format, made, 0)
