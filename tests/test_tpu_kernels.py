"""TPU kernels: to the last bit of plain JAX in the interpreter, and lowered for TPUs at Grok-1's
own sizes. No TPU and none of its compilers takes part; see test_aot_tpu.py for those."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

import formats
import kernels
import model
import quantize
import runners
from kernels import tpu

EXPERTS = [2, -1, 0, 3, 2**31 - 1]  # of the blocks: not in order, skipped, and not there


def random_weight(inputs, outputs, groups=None, planes=1, block=64, seed=0):
    """Of three experts; with a scale for each output if there are multipliers, or one for all."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (3, planes, inputs, outputs)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (3, 1, outputs if groups else 1)).astype(np.float32)
    if groups is None:
        return jax.tree.map(jnp.asarray, quantize.pack(trits[:, 0], scales, block=block))
    most = np.where(rng.random((3, outputs, groups)) < 0.5, 127, rng.integers(0, 128))
    first = most if planes == 1 else rng.integers(0, most + 1)
    multipliers = np.stack([first, most - first][:planes], axis=-1).astype(np.int8)
    return jax.tree.map(jnp.asarray, quantize.pack(trits, scales, multipliers, block))


@pytest.fixture(autouse=True)
def not_unrolled(monkeypatch):
    """What a kernel computes is the same, and interpreted sooner."""
    monkeypatch.setattr(tpu, "UNROLLED", 1)


def interpreted_sums(x, *weights, experts=EXPERTS, interpret=True):
    call = functools.partial(tpu.ternary_sums, interpret=interpret)
    return jax.jit(call)(jnp.asarray(x), weights, jnp.asarray(experts, jnp.int32))


def expected_sums(x, w, experts=EXPERTS):
    known = np.where((np.array(experts) >= 0) & (np.array(experts) < 3), experts, 0)
    sums = x.astype(np.int64) @ np.asarray(quantize.unpack(w)).astype(np.int64)[known]
    return np.where((known == experts)[:, None, None], sums, 0)


@pytest.mark.parametrize(
    "rows, inputs, outputs, options",
    [
        (1, 512, [256, 128], {}),
        (3, 256, [128], {"block": 8}),  # 64 bytes: no whole vectors, and several blocks in one
        (2, 512, [128], {"groups": 8, "planes": 2}),
        (9, 768, [128], {"groups": 6}),
    ],
)
def test_sums_are_exact(rows, inputs, outputs, options):
    weights = [random_weight(inputs, n, **options, seed=n) for n in outputs]
    x = np.random.default_rng(1).integers(-128, 128, (5, rows, inputs)).astype(np.int8)
    assert tpu.takes_weights(x, weights)
    sums = interpreted_sums(x, *weights, interpret=pltpu.InterpretParams())
    for y, w in zip(sums, weights, strict=True):
        assert y.dtype == jnp.int32
        np.testing.assert_array_equal(y, expected_sums(x, w))


@pytest.mark.parametrize("options", [{}, {"groups": 6, "planes": 2}])
def test_tiles_change_nothing(options, monkeypatch):
    """Of rows, three, of which the last is not full, and of outputs, two."""
    monkeypatch.setattr(tpu, "MOST_ROWS", 64 if options else 32)
    w = random_weight(768, 256, **options)
    monkeypatch.setattr(tpu, "WEIGHT_BYTES", 128 * w.packed.shape[2])
    x = np.random.default_rng(1).integers(-128, 128, (2, 70, 768)).astype(np.int8)
    assert tpu.row_tiles(70, w, 1)[:2] == (32, 3)
    assert tpu.output_tiles([256], w.packed.shape[2], 32) == 2
    (y,) = interpreted_sums(x, w, experts=[1, 2])
    np.testing.assert_array_equal(y, expected_sums(x, w, [1, 2]))


def test_largest_sums():
    """The longest rows, all at the ends of int8: masked codes are up to 128 times too large."""
    trits = np.broadcast_to(np.array([-1, 0, 1], np.int8)[:, None, None], (3, 32768, 128))
    x = np.full((3, 1, 32768), -128, np.int8)
    w = jax.tree.map(jnp.asarray, quantize.pack(trits, None, block=64))
    (y,) = interpreted_sums(x, w, experts=[0, 1, 2])
    np.testing.assert_array_equal(y[:, 0, 0], [1 << 22, 0, -1 << 22])


# --- Through the products of `quantize.py` --------------------------------------------------------


@pytest.fixture
def on_a_tpu(monkeypatch):
    """Functions are traced for a TPU, whose kernels are interpreted."""
    for name in ("ternary_sums", "ternary_dots", "scattered_dot"):
        interpreted = functools.partial(getattr(tpu, name), interpret=True)
        monkeypatch.setattr(tpu, name, interpreted)
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")


def random_rows(rows, inputs, dtype="bfloat16"):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, inputs)) * rng.random((rows, 1))
    return jnp.asarray(x, dtype).at[1].set(0)


@pytest.mark.parametrize(
    "activations, dtype, options",
    [
        ("int8", "float32", {}),
        ("int15", "bfloat16", {}),
        ("int15", "bfloat16", {"groups": 8, "planes": 2}),
        ("int8", "bfloat16", {"groups": 4}),
    ],
)
def test_products_are_those_of_plain_jax(activations, dtype, options, on_a_tpu, monkeypatch):
    """To the last bit; of two weights at once, in one kernel, and of weights that are not alike.

    In two tiles of outputs.
    """
    x, experts = random_rows(6, 512, dtype), jnp.array([2, -1, 0], jnp.int32)
    weights = [random_weight(512, 256, **options, seed=n) for n in range(2)]
    monkeypatch.setattr(tpu, "WEIGHT_BYTES", 256 * weights[0].packed.shape[2])
    assert tpu.output_tiles([256, 256], weights[0].packed.shape[2], 8) == 2
    other = random_weight(512, 128, 2)

    def traced():  # of its own, so that no trace of another is used
        dots = functools.partial(quantize.grouped_dots, activations=activations)
        return jax.jit(lambda x, *weights: dots(x, weights, experts))

    with kernels.disabled():
        plain = traced()(x, *weights, other)
    for given, calls in ((weights, 1), ([*weights, other], 3)):
        products = traced()
        text = str(jax.make_jaxpr(products)(x, *given))
        assert text.count("name=ternary_sums") == text.count("name=slabs") == calls
        for y, expected in zip(products(x, *given), plain, strict=False):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("options", [{}, {"groups": 16, "planes": 2}])
def test_inputs_on_two_devices(options, on_a_tpu):
    """The product is that of one device: rows are rounded by their maximum on both of them."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = random_rows(2, 1024), jax.tree.map(lambda a: a[:1], random_weight(1024, 128, **options))

    def product(x, packed, multipliers, axis_name=None):
        of = dataclasses.replace(w, packed=packed, multipliers=multipliers)
        only = jnp.zeros(1, jnp.int32)
        return quantize.grouped_dot(x, of, only, activations="int15", axis_name=axis_name)

    with kernels.disabled():
        expected = jax.jit(product)(x, w.packed, w.multipliers)
    spec = PartitionSpec
    split = jax.shard_map(
        functools.partial(product, axis_name="model"),
        mesh=mesh,
        in_specs=(spec(None, "model"), spec(None, None, "model"), spec(None, None, "model")),
        out_specs=spec(),
        check_vma=False,
    )
    assert "name=slabs" in str(jax.make_jaxpr(split)(x, w.packed, w.multipliers))
    np.testing.assert_array_equal(jax.jit(split)(x, w.packed, w.multipliers), expected)


def test_rows_that_are_kept_on_two_devices(on_a_tpu):
    """Of blocks of two experts' rows, whose scales differ; nothing is scattered."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = random_rows(6, 1024), random_weight(1024, 128)
    w = dataclasses.replace(w, scales=jnp.arange(1.0, 4)[:, None, None])
    experts, kept = jnp.array([2, 0, 1], jnp.int32), jnp.array([5, 0, 2, 3], jnp.int32)
    options = {"activations": "int15"}
    with kernels.disabled():
        expected = jax.jit(functools.partial(quantize.grouped_dot, **options))(x, w, experts)

    def product(x, packed):
        of = dataclasses.replace(w, packed=packed)
        return quantize.scattered_dot(x, of, experts, kept, axis_name="model", **options)

    spec = PartitionSpec
    specs = {"in_specs": (spec(None, "model"), spec(None, None, "model")), "out_specs": spec()}
    split = jax.shard_map(product, mesh=mesh, check_vma=False, **specs)
    text = str(jax.make_jaxpr(split)(x, w.packed))
    assert "name=slabs" in text and "reduce_scatter" not in text
    np.testing.assert_array_equal(jax.jit(split)(x, w.packed), expected[kept])


# --- What has a kernel ----------------------------------------------------------------------------


def abstract(name, inputs, outputs, devices=1, split=None):
    """A device's part of a stack of eight matrices; split: "inputs" or "outputs"."""
    w = formats.shapes(name, (8, inputs, outputs))
    if split == "inputs":
        groups = w.multipliers is not None and w.multipliers.shape[2] > 1
        sizes = {"packed": (1, 1, devices), "multipliers": (1, 1, devices if groups else 1, 1)}
    else:
        sizes = {"packed": (1, devices, 1), "multipliers": (1, devices, 1, 1)}
    parts = {
        field: jax.ShapeDtypeStruct(tuple(np.array(array.shape) // sizes[field]), array.dtype)
        for field in sizes
        if (array := getattr(w, field)) is not None
    }
    return dataclasses.replace(w, **parts)


def taken(w, rows=1, dtype=jnp.int8):
    return tpu.takes_weights(jax.ShapeDtypeStruct((2, rows, w.shape[-2]), dtype), [w])


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("name", [name for name, f in formats.FORMATS.items() if f.packed])
def test_all_products_of_grok_1_have_kernels(name, devices):
    of_inputs = [
        abstract(name, size, n, devices, "outputs")
        for size, n in ((6144, 6144), (6144, 1024), (6144, 32768))
    ]
    of_outputs = [abstract(name, size, 6144, devices, "inputs") for size in (6144, 32768)]
    assert all(taken(w, rows) for w in of_inputs + of_outputs for rows in (1, 128, 1024))


def test_what_has_no_kernel():
    w = random_weight(1024, 256)
    assert taken(w)
    assert not taken(w, rows=0)
    assert not taken(w, dtype=jnp.float32)
    assert not taken(quantize.interleave(w)), "another layout"
    assert not taken(dataclasses.replace(w, padding=3))
    assert not taken(random_weight(1024, 192)), "outputs that fill no vectors"
    assert not taken(random_weight(64, 128, block=2)), "16 bytes"
    assert not taken(random_weight(1024, 128, groups=2)), "groups of two blocks"
    assert not taken(random_weight(1024, 128, groups=8, block=32)), "smaller blocks"
    x = jax.ShapeDtypeStruct((2, 1, 1024), jnp.int8)
    assert not tpu.takes_weights(x, [w, random_weight(1024, 256, groups=4)]), "not alike"
    assert not tpu.takes_weights(x.update(shape=(2, 1, 512)), [w]), "other inputs"


@pytest.mark.parametrize(
    "kind, there", [("TPU v4", False), ("TPU v5 lite", True), ("TPU v6e", True)]
)
def test_the_fourth_tpu_multiplies_no_int8(kind, there):
    mesh = AbstractMesh((1, 1), ("data", "model"), abstract_device=AbstractDevice(kind, 1, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert taken(random_weight(1024, 256)) == there


# --- For TPUs -------------------------------------------------------------------------------------


def lowered_for_tpu(f, *arguments) -> list[str]:
    """Names of the kernels of a program for a TPU v5e: Mosaic's own lowering takes part."""
    device = AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = AbstractMesh((1, 1), ("data", "model"), abstract_device=device)
    leaves, structure = jax.tree.flatten(arguments)
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    with kernels.compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *leaves: f(*jax.tree.unflatten(structure, leaves))).trace(*leaves)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return [part.split('"')[1] for part in text.split("kernel_name = ")[1:]]


@pytest.mark.parametrize("weights", ["ternary", "ternary2-128"])
def test_a_layer_of_grok_1_lowers_for_tpus(weights):
    """Of one token, products of the same rows are one kernel: of three matrices of attention, of
    two of the experts."""
    config = dataclasses.replace(model.PRESETS["grok-1"], num_layers=1, vocab_size=1024)
    params = runners.abstract_weights(config, model.PRECISIONS[weights])
    memory = jax.eval_shape(lambda: model.init_memory(config, 1))
    apply = model.make_model(config).apply
    for tokens in (1, 1024):
        found = lowered_for_tpu(
            lambda params, tokens, memory: apply(params, None, tokens, memory, last_only=True),
            params,
            jax.ShapeDtypeStruct((1, tokens), jnp.int32),
            memory,
        )
        assert sorted(found) == ["slabs"] * 4 + ["ternary_sums"] * (4 if tokens == 1 else 7)


@pytest.mark.parametrize("preset", ["demo", "bench"])
def test_other_presets_have_kernels(preset):
    """Whose packing blocks have 8 and 16 bytes."""
    config = dataclasses.replace(model.PRESETS[preset], num_layers=1)
    params = runners.abstract_weights(config, model.PRECISIONS["ternary"])
    slots = jax.eval_shape(lambda: runners.empty_slots(config, 2, config.sequence_len))
    step = functools.partial(runners.decode_step, model.make_model(config), eos=2)
    assert lowered_for_tpu(step, params, slots).count("ternary_sums") == 4
