"""Steps compiled for devices that are not here: what a change must not bring back.

Each of these faults was there, and no test on a CPU could see it.
"""

import dataclasses
import functools

import jax
import pytest
from factories import slow

import aot
import kernels
import model
import runners
import sharding

LAYER = dataclasses.replace(model.PRESETS["grok-1"], num_layers=1)


def needs_compiler(platform):
    package = aot.missing_compiler(platform)
    return pytest.mark.skipif(
        package is not None,
        reason=f"{package} is not installed; pip install -r requirements-aot.txt",
    )


# --- Devices, and reading a program ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("h200x8", ("h200", 8)),
        ("V5E-8", ("v5e", 8)),
        ("h100", ("h100", 1)),
        ("b200x64", ("b200", 64)),
    ],
)
def test_names_of_devices(text, expected):
    assert aot.parse_devices(text) == expected


@pytest.mark.parametrize(
    "text", ["", "h200x", "h200x0", "h200x65", "v5p-128", "x8", "8xh200", "v4-8"]
)
def test_names_that_no_device_has(text):
    with pytest.raises(ValueError, match="as in h200x8 or v5e-8, one of a100, .*; got '"):
        aot.parse_devices(text)


def test_a_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="h200 needs jax-cuda13-plugin, which is not installed"):
        aot.described_mesh("h200", 1, 1)


PROGRAM = """HloModule a_program, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %inner = (s32[], f32[4]{0}) while(%p), condition=%enough, body=%deep, backend_config={"known_trip_count":{"n":"5"}}
}

%deep (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %copy.1 = (s32[], f32[4]{0}) copy(%q)
}

%yes (y: f32[4]) -> f32[4] {
  ROOT %sum = f32[4]{0} all-reduce(%y), to_apply=%add
}

%no (n: f32[4]) -> f32[4] {
  ROOT %n = f32[4]{0} parameter(0)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %made = (bf16[2,3]{1,0}, pred[7]{0}) custom-call(%a), custom_call_target="x", metadata={op_name="jit(f)/layer/twice/pallas_call"}
  %loop = (s32[], f32[4]{0}) while(%made), condition=%enough, body=%body, metadata={op_name="language_model"}, backend_config={"known_trip_count":{"n":"3"}}
  %either = f32[4]{0} conditional(%made, %a, %a), true_computation=%yes, false_computation=%no
  %start = f32[4]{0} all-reduce-start(%either), to_apply=%add
  ROOT %done = f32[4]{0} all-reduce-done(%start)
}
"""  # noqa: E501


def test_operations_of_loops_and_branches():
    found = list(aot.operations(PROGRAM))
    assert [(op.opcode, op.times, op.choice) for op in found if op.opcode != "parameter"] == [
        ("custom-call", 1, False),
        ("while", 1, False),
        ("while", 3, False),
        ("copy", 15, False),
        ("conditional", 1, False),
        ("all-reduce", 1, True),
        ("all-reduce-start", 1, False),
        ("all-reduce-done", 1, False),
    ]
    kernel = next(op for op in found if op.opcode == "custom-call")
    assert (kernel.kernel, kernel.bytes) == ("twice", 2 * 6 + 7)


def test_more_layers_add_what_one_adds():
    counter = aot.Counter
    two = aot.Compiled(100, 7, 3, 20, counter(a=2, b=1), 4, counter(x=1), 8)
    three = aot.Compiled(140, 7, 4, 30, counter(a=3, b=1, c=1), 6, counter(x=1, y=1), 9)
    assert three.extended(two, 10) == aot.Compiled(
        540, 7, 14, 130, counter(a=13, b=1, c=11), 26, counter(x=1, y=11), 19
    )


@pytest.mark.parametrize(
    "device, layers, expected",
    [("v6e", 64, [3, 4]), ("v5e", 64, [64]), ("v6e", 3, [3]), ("v5e", 3, [3]), ("v6e", 4, [3, 4])],
)
def test_a_plan_compiles_few_layers_where_these_tell_of_all(device, layers, expected, monkeypatch):
    """Programs of 64 layers for v5e are packed, those of four are not."""
    compiled = []

    def steps(config, *_):
        compiled.append(config.num_layers)
        return {name: 100 * config.num_layers + 7 for name in ("prefill", "decode")}

    def taken(size):
        return aot.Compiled(size, 0, size, 0, aot.Counter(), 0, aot.Counter(), 0)

    monkeypatch.setattr(aot, "compiled_steps", steps)
    monkeypatch.setattr(aot.Compiled, "of", taken)
    config = dataclasses.replace(LAYER, num_layers=layers)
    runner = runners.ModelRunner(config, sharding.make_mesh(1, 1))
    formats = model.formats_of(model.abstract_params(config), model.PRECISIONS["ternary"])
    plan = aot.make_plan(runner, formats, device, 1)
    assert compiled == expected
    assert plan.memory["programs"] == 2 * (100 * layers + 7)


@pytest.mark.parametrize("n, rounded", [(1944, 1900), (1960, 2000), (48, 48), (7, 7), (0, 0)])
def test_operations_are_told_with_two_digits(n, rounded):
    assert aot.two_digits(n) == rounded


# --- Gates ----------------------------------------------------------------------------------------


@functools.cache
def compiled(device, heads, step, layers=1):
    mesh, config = (
        aot.described_mesh(device, 1, heads),
        dataclasses.replace(LAYER, num_layers=layers),
    )
    steps = aot.compiled_steps(config, model.PRECISIONS["ternary"], mesh, 1, [step])
    return steps[step]


@needs_compiler("gpu")
@pytest.mark.parametrize("heads", [1, 8])
def test_a_decode_step_on_gpus(heads):
    """All products are kernels, nothing loops, no table is gathered, and little is in between."""
    step = compiled("h200", heads, "decode")
    found = aot.Compiled.of(step)
    products = {"ternary_few_rows": 3, "gated_dot": 1}  # three are one, and two with GELU
    assert {name: found.kernels[name] for name in products} == products
    assert found.kernels["decode_attention"] == found.kernels["route"] == 1
    assert found.kernels["added_norm"] == found.kernels["rounded_norm"] == 2
    assert found.kernels["rms_norm"] == 1  # the last one, which feeds no product
    assert found.kernels["quantize_rows"] == {1: 2, 8: 0}[heads]  # of parts of rows XLA has maxima
    assert found.loops == 0
    assert found.operations < {1: 51, 8: 61}[heads]  # 48 and 58
    for op in aot.operations(step.as_text()):
        assert not (op.opcode.startswith("all-gather") and op.bytes > 1e6), op.text
    assert found.added < 10e6  # 1.8 MB: logits, and what is made of them


@needs_compiler("gpu")
@pytest.mark.parametrize("heads, operations", [(1, 16), slow(8, 24)])
def test_operations_of_a_layer_on_gpus(heads, operations):
    steps = compiled("h200", heads, "decode"), compiled("h200", heads, "decode", layers=2)
    one, two = (aot.Compiled.of(step).operations for step in steps)
    assert two - one <= operations


@needs_compiler("gpu")
def test_requests_on_two_gpus_are_apart():
    """But for their logits: no kernel stands where XLA gathers what it reads."""
    mesh = aot.described_mesh("h200", 2, 1)
    steps = aot.compiled_steps(LAYER, model.PRECISIONS["ternary"], mesh, 2, ["decode"])
    assert aot.Compiled.of(steps["decode"]).collectives == {"all-gather": 1}


@needs_compiler("gpu")
@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 8])
def test_a_chunk_of_a_prompt_on_gpus(heads):
    """Attention alone loops, over blocks of the cache."""
    found = aot.Compiled.of(compiled("h200", heads, "prefill"))
    assert found.kernels["ternary_many_rows"] == 3 and found.kernels["gated_dot"] == 1
    assert found.loops == 1


@needs_compiler("gpu")
@pytest.mark.slow
def test_a_chunk_sends_experts_sums_once():
    """To the device that gates them, and no rows of padding: those of 1024 tokens' pairs are 50 MB,
    with what is made of them 57. Then a token's row goes to all of them."""
    step = compiled("h200", 8, "prefill")
    of_experts = [op for op in aot.operations(step.as_text()) if "/moe/" in op.source]
    sent = {op.opcode.removesuffix("-start"): op.bytes for op in of_experts if op.bytes > 1e6}
    assert "all-reduce" not in sent
    assert sent["reduce-scatter"] <= 9 / 8 * 2048 * 6144 * 4
    assert sent["all-gather"] <= 9 / 8 * 1024 * 6144 * 2


@needs_compiler("gpu")
@pytest.mark.slow
def test_planned_memory_is_that_of_the_compiled_steps():
    """What `run.py` prints before it loads is right to 80 MB, a thousandth of all layers'."""
    config = dataclasses.replace(LAYER, num_layers=3)
    mesh = aot.described_mesh("h200", 1, 1)
    runner = runners.ModelRunner(config, mesh)
    precision = model.formats_of(model.abstract_params(config), model.PRECISIONS["ternary"])
    plan = aot.make_plan(runner, precision, "h200", slots=1)
    with kernels.compiling_for("gpu"):
        params = runners.abstract_weights(config, precision)
        needed = runners.device_memory(runner, params, 1, config.sequence_len)
    assert sum(plan.memory.values()) == pytest.approx(sum(needed.values()), abs=80e6)
    assert jax.default_backend() == "cpu"
