"""What the benchmarks rest on: the meter of memory, the model for onnxruntime, what is compiled."""

import dataclasses
import importlib.util
import io
import json
import runpy
import sys
import types

import jax
import numpy as np
import pytest

import convert
import kernels
import layouts
import learning
import model
import planning
import quantize
import runners
import shards
import train
from benchmarks import __main__ as command
from benchmarks import budget, compilation, curves, experts, llama, loading, memory, timer
from benchmarks import calibration as of_a_layer
from benchmarks.products import random_ternary

with_onnxruntime = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed"
)


@pytest.mark.skipif(
    not memory.CLEAR.exists() or jax.default_backend() != "cpu", reason="no /proc, or a device"
)
def test_the_meter_sees_what_is_kept_and_the_peak_of_each_part():
    meter = memory.Meter()
    kept = np.ones(25_000_000, np.float32)
    np.ones(50_000_000, np.float32)
    first, second = meter.read(), meter.read()
    assert first["resident_MB"] == pytest.approx(kept.nbytes / 1e6, abs=20)
    assert first["peak_MB"] == pytest.approx(300, abs=20)
    assert second["peak_MB"] == pytest.approx(100, abs=20)


@pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels")
def test_the_peak_counts_the_products_that_were_made():
    """A group is 8192 rounds of 12 vectors; AMX takes six tiles, a sixteenth as often."""
    lanes = {"plain": 64, "avx2": 12 * 32, "avxvnni": 12 * 32, "avx512": 12 * 64}
    lanes |= {"amx": 6 * 16 * 16 * 64 // 16, "neon": 12 * 16}
    paths = kernels.ternary_paths()
    assert timer.multiply_adds(3) == 3 * 8192 * lanes[paths[-1]]
    if "avx_vnni" not in kernels.building.processor():  # the kernels' other encoding of it
        paths = [path for path in paths if path != "avxvnni"]
    for path in paths:
        assert timer.multiply_adds(2, path) == 2 * 8192 * lanes[path]


@pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels")
def test_bandwidth_is_of_reads_that_add_up():
    numbers = np.random.default_rng(0).integers(-(2**31), 2**31, 10_007, np.int32)
    total = int(numbers.astype(np.int64).sum()) % 2**32
    assert timer.sum_read(numbers) == total
    assert timer.read_bandwidth(1 << 20) > 0
    with kernels.disabled():
        assert timer.read_bandwidth(1 << 20) > 0


def test_the_limits_of_the_machine_are_numbers(monkeypatch):
    monkeypatch.setattr(timer, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(timer, "product_rate", lambda dtype: 1e12)
    found = timer.machine()
    assert found["processor"] == timer.processor() and found["int8_T_per_s"] > 0
    with kernels.disabled():
        assert timer.machine()["int8_T_per_s"] == 1


def test_a_message_by_hand():
    """The specification's examples of a varint, a string and a nested message."""
    assert experts.message((1, 150)).hex() == "089601"
    assert experts.message((2, "testing")).hex() == "120774657374696e67"
    assert experts.message((3, experts.message((1, 150)))).hex() == "1a03089601"


@with_onnxruntime
def test_onnxruntime_multiplies_our_trits():
    shapes = {"linear": (256, 384), "linear_v": (256, 384), "linear_1": (384, 256)}
    layer = {
        name: random_ternary((2, *shape), seed=i) for i, (name, shape) in enumerate(shapes.items())
    }
    x = np.random.default_rng(0).standard_normal((5, 256), np.float32)
    w = {name: np.asarray(quantize.dequantize(weight)) for name, weight in layer.items()}
    exact = sum((x @ w["linear"][e] * (x @ w["linear_v"][e])) @ w["linear_1"][e] for e in (0, 1))
    found = experts.session([layer]).run(None, {"x": x})[0] - x
    ours = np.asarray(experts.ours(x, [layer])) - x
    for y in (found, ours):  # both are 0.02 off, by rounding activations to int8
        assert np.square(y - exact).mean() < np.square(0.04 * exact).mean()


def test_what_is_compiled_is_what_runs():
    config = dataclasses.replace(model.PRESETS["tiny"], activations="int8")
    runner = runners.ModelRunner(config)
    steps = compilation.steps(runner)
    inference = runners.InferenceRunner(runner)
    _, (_, slots) = steps["decode"]

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)

    assert described(slots) == described(inference._slots)
    with jax.set_mesh(runner.mesh):
        found = compilation.stages(*steps["decode"])
    assert found["instructions"] > 100 and found["compile_s"] > 0


@pytest.mark.parametrize("peer, package", [("llama-cpp", "llama_cpp"), ("onnxruntime",) * 2])
def test_a_peer_that_is_missing_is_an_error(peer, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"error: .* is not installed; pip install {peer}"):
        command.main([f"--{peer}"])
    assert capsys.readouterr().out == ""


def test_ik_llama_needs_a_build_and_a_part_that_uses_it(tmp_path, monkeypatch, capsys):
    for flags in (["--ik-llama", str(tmp_path)], ["--table", "F16"]):
        with pytest.raises(SystemExit):
            command.main(["--only", "products", *flags])
        assert "--ik-llama and --table go with --llama-cpp" in capsys.readouterr().err
    monkeypatch.setattr(llama, "library", lambda: types.SimpleNamespace(__version__="1"))
    assert llama.versions() == {"llama-cpp-python": "1"}
    with pytest.raises(SystemExit, match=f"error: {tmp_path} has no build/src/libllama.so; build"):
        command.main(["--only", "llama-cpp", "--ik-llama", str(tmp_path)])
    (tmp_path / "build/src").mkdir(parents=True)
    (tmp_path / "build/src/libllama.so").touch()
    assert llama.versions(tmp_path)["ik_llama.cpp"] == "of an unknown commit"


def test_programs_take_turns_and_are_compared_with_ours_of_the_same_table(monkeypatch):
    monkeypatch.setattr(timer, "REST", 0)
    seconds = {"ours, float table": 2.0, "a": 3.0, "ours, int8 table": 4.0, "b": 2.0}
    tables = dict(zip(seconds, ["F16", "F16", "Q8_0", "Q8_0"], strict=True))
    order = []

    def measure(program):
        order.append(program.name)
        return seconds[program.name]

    programs = [llama.Program(name, table, *[None] * 4) for name, table in tables.items()]
    found = {p.name: (middle, ratio) for p, middle, ratio in llama.turns(programs, measure)}
    assert order == list(seconds) * (1 + llama.ROUNDS)
    assert found["a"] == (3.0, {"ours_is_faster": 1.5})
    assert found["b"] == (2.0, {"ours_is_faster": 0.5})
    assert found["ours, int8 table"] == (4.0, {})


def test_our_batch_decodes_as_many_steps_as_a_peer():
    config = dataclasses.replace(model.PRESETS["tiny"], vocab_size=1024)
    runner = runners.ModelRunner(config)
    runner.init()
    inference = runners.InferenceRunner(runner, None, 3, 2 * (llama.START + llama.STEPS))
    assert llama.our_step_seconds(inference) > 0
    timing = inference.timing
    assert timing.decode_tokens == 3 * llama.STEPS and not inference.busy


def test_curves_give_mean_and_spread_of_the_last_losses(tmp_path, capsys):
    for name, loss in (("a", 1.5), ("b", 1.75)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": 5, "validation": 3.0}, {"step": 9, "validation": loss}]
        rows[1]["tokens_per_second"] = 100.0
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    png = tmp_path / "curves.png"
    logs = f"{tmp_path / 'a'},{tmp_path / 'b' / 'log.jsonl'}"
    curves.main([f"both={logs}", f"one={tmp_path / 'a'}", "--plot", str(png)])
    both, one = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert both == ["both", "2", "9", "1.6250", "0.2500", "100"]
    assert one == ["one", "1", "9", "1.5000", "100"]
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("runs", ["no name", "gone={}/gone", "empty={}/empty"])
def test_curves_of_nothing(runs, tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(
        SystemExit, match="error: .*(runs are named|No such file|no evaluation yet)"
    ):
        curves.main([runs.format(tmp_path)])


def test_the_gpt_beside_ours_has_as_many_parameters_for_a_token_and_learns(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks import nanogpt

    config = model.PRESETS["1m"]
    gpt = nanogpt.Gpt(config)
    count = sum(w.numel() for w in gpt.parameters()) - config.sequence_len * config.emb_size
    assert count == pytest.approx(train.active_parameters(config), rel=0.01)
    text = "".join(f"{i} bottles of milk on the wall, {i} bottles of milk.\n" for i in range(400))
    settings = learning.Settings(steps=12, batch_size=2, warmup=2, eval_every=6)
    last = nanogpt.run(
        dataclasses.replace(config, sequence_len=32), settings, text, tmp_path / "log"
    )
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert second == last and last["validation"] < first["validation"]


def test_without_pytorch_there_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "benchmarks.nanogpt", raising=False)
    for run, error in (("__main__", SystemExit), ("benchmarks.nanogpt", ImportError)):
        with pytest.raises(error, match="PyTorch is not installed; pip install torch"):
            runpy.run_module("benchmarks.nanogpt", run_name=run)


def test_controls_of_a_budget_take_other_changes_first():
    """Two layers of two matrices each, of one size; of 16 bytes to add, a second plane takes 8."""
    layers = [f"transformer/decoder_layer_{i}" for i in (0, 10)]
    paths = [
        f"{layer}/{name}/w" for layer in layers for name in ("multi_head_attention/key", "moe")
    ]
    errors = {
        path: {"ternary-fit-128": e, "ternary2-128": e / 6, "int8": e / 1000}
        for path, e in zip(paths, (0.1, 0.4, 0.2, 0.3), strict=True)
    }
    sizes = {path: {"ternary-fit-128": 10, "ternary2-128": 18, "int8": 60} for path in paths}
    chosen = {
        name: {path for path, format in planning.choose(made, sizes, 56).items() if "2-" in format}
        for name, made in budget.controls(errors).items()
    }
    assert chosen["measured"] == {paths[1], paths[3]}
    assert chosen["least useful first"] == {paths[0], paths[2]}
    assert chosen["attention first"] == {paths[0], paths[2]}
    assert chosen["last layers first"] == {paths[2], paths[3]}
    assert {len(found) for found in chosen.values()} == {2}


def test_the_outlook_counts_all_outputs_and_experts_and_the_tokens_that_each_gets():
    config, tokens = model.PRESETS["grok-1"], 4096
    count = of_a_layer.operations(config, tokens)
    d, f, block = 6144, 32768, 4096
    assert count["attention", "moments"] == 2 * 4 * tokens * d * d
    assert count["expert", "moments"] == 4 * tokens * (d * d + f * block)
    assert count["expert", "sweep"] == 2 * (2 * d * d * f + block * f * d)
    assert count["expert", "hidden states"] == 2 * 2 * 2 * tokens * d * f
    whole = of_a_layer.of_layer(count, config, tokens)
    assert whole["attention", "moments"] == 64 * count["attention", "moments"]
    assert whole["expert", "moments"] == 2 * 64 * count["expert", "moments"]
    assert whole["expert", "hidden states"] == 5 * 64 * count["expert", "hidden states"]
    assert whole["attention", "sweep"] == count["attention", "sweep"]
    assert whole["expert", "sweep"] == 8 * count["expert", "sweep"]

    parts = dict.fromkeys(of_a_layer.PARTS[2:], 1.5)
    rounded = {
        f"{of}-{name}": 2 * [{"outputs": outputs // 8, "parts": parts}]
        for of in of_a_layer.STEPS
        for name, (_, outputs) in of_a_layer.shapes(config, of).items()
    }
    seconds = {("expert", "moments"): 7.0}
    layer = types.SimpleNamespace(config=config, seconds=seconds, rounded=rounded)
    found = of_a_layer.measured(layer)
    assert found["expert", "moments"] == 7 and found["attention", "moments"] == 0
    assert found["expert", "fits"] == 3 * 8 * 1.5  # of a quarter of the outputs of each matrix
    assert found["expert", "factor"] == 3 * 1.5


def test_loading_measures_a_model_that_is_copied_beside_a_layout_file(
    tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(model.PRESETS["tiny"], num_layers=1)
    monkeypatch.setattr(loading, "CONFIG", config)
    monkeypatch.setattr(loading, "LENGTH", 32)
    monkeypatch.setattr(loading.kernels, "keep_compilations", lambda: None)
    loaded = []
    load = runners.ModelRunner.load
    monkeypatch.setattr(
        runners.ModelRunner, "load", lambda self, folder: (load(self, folder), loaded.append(self))
    )
    monkeypatch.setattr(layouts, "open_layout", layouts.open_layout)  # it is replaced, and put back
    folder = tmp_path / "made"
    loading.make_checkpoint(folder, 2)
    assert shards.verify(folder) == []
    convert.main(["--layout", "cpu", str(folder)])
    assert (
        runners.ModelRunner(dataclasses.replace(config, num_layers=2)).plan_loading(folder).mapped
    )
    monkeypatch.setattr("sys.stdin", io.StringIO())
    loading.serve(folder, 3, copied=True)
    row = json.loads(capsys.readouterr().out)
    assert row["load_s"] > 0 and row["token_s"] > 0 and row["token_GB_from_disk"] >= 0
    assert [runner.mapped_bytes for runner in loaded] == [0]
    assert loaded[0].config.num_layers == 2
