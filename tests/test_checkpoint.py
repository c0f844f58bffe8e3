import dataclasses
import functools
import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import checkpoint
import conversion
import formats
import kernels
import model
import quantize
import sharding
import tensor_file
from checkpoint import CheckpointError
from quantize import PackedWeight, QuantizedWeight

GOLDEN = Path(__file__).parent / "golden"
CASES = ["released_layout", "single_device", "dense"]
TERNARY = ((r"/(linear|linear_1|linear_v|query|key|value)/w$", "ternary"), (r"", "float32"))
INT8 = ((TERNARY[0][0], "int8"), (r"", "float32"))


def golden_template(case):
    """The template of a golden case, from its own list of files."""
    template = {}
    for entry in json.loads((GOLDEN / case / "config.json").read_text())["checkpoint"]["tensors"]:
        module, name = entry["path"].split("|")
        template.setdefault(module, {})[name] = jax.ShapeDtypeStruct(entry["shape"], jnp.float32)
    return template


def golden_ternary(case):
    for entry in json.loads((GOLDEN / case / "ternary.json").read_text())["tensors"]:
        yield *entry["path"].split("|"), entry


def random_weight(shape, groups, seed=0):
    """int8 codes over the whole range, also -128, and spread scales."""
    random = np.random.default_rng(seed)
    scales = 0.01 * np.exp(random.standard_normal((*shape[:-2], groups, shape[-1])))
    codes = random.integers(-128, 128, shape, dtype=np.int8)
    return QuantizedWeight(codes, scales.astype(ml_dtypes.bfloat16))


def plain_ternary(weight):
    """gamma and trits as SPEC has them, of whole float32 matrices; gamma summed in float64."""
    *lead, inputs, outputs = weight.shape
    scales = weight.scales.astype(np.float32)
    scales = np.repeat(scales, inputs // scales.shape[-2], axis=-2)
    w = weight.codes.astype(np.float32) * scales
    gamma = np.abs(w.astype(np.float64)).mean(axis=(-2, -1), keepdims=True).astype(np.float32)
    return gamma, formats.round_to_trits(w, gamma).astype(np.int8)


def trits(weight):
    return np.ascontiguousarray(quantize.unpack(jax.tree.map(np.asarray, weight)))


def mesh_shardings(data, model):
    return functools.partial(sharding.parameter_shardings, sharding.make_mesh(data, model))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def small(tmp_path):
    """A folder with three tensors, its template and rules."""
    params = {
        "layer/router": {"w": np.arange(24, dtype=np.float32).reshape(12, 2)},
        "layer/moe/linear": {"w": random_weight((2, 12, 7), 3)},
        "layer/query": {"w": random_weight((12, 5), 1)},
    }
    checkpoint.save(tmp_path, params)
    template = {m: {"w": jax.ShapeDtypeStruct(params[m]["w"].shape, np.float32)} for m in params}
    return tmp_path, template, TERNARY, params


# --- Golden cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_trits_and_scales(case):
    params = checkpoint.restore(GOLDEN / case, golden_template(case), TERNARY)
    arrays = np.load(GOLDEN / case / "golden.npz")
    for module, name, entry in golden_ternary(case):
        weight = params[module][name]
        assert isinstance(weight, PackedWeight)
        digest = hashlib.sha256(trits(weight)).hexdigest()
        assert digest == entry["sha256_int8_c_order"], module
        gamma = arrays[f"gamma_{entry['index']:05d}"]
        assert weight.scales.dtype == jnp.float32
        np.testing.assert_array_equal(np.ravel(weight.scales), np.ravel(gamma))
    assert jnp.ones(3, jnp.bfloat16).astype(jnp.float32).sum() == 3  # flags 80 and 64 did no harm
    assert np.dtype(ml_dtypes.bfloat16) in {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("case", CASES)
def test_golden_int8_and_floats(case):
    params = checkpoint.restore(GOLDEN / case, golden_template(case), INT8)
    ternary = {(module, name) for module, name, _ in golden_ternary(case)}
    for i, (module, name) in enumerate(checkpoint.sorted_keys(params)):
        leaf = params[module][name]
        assert isinstance(leaf, QuantizedWeight) == ((module, name) in ternary)
        file = GOLDEN / case / "ckpt-0" / checkpoint.file_name(i)
        assert_same(leaf, tensor_file.read_tensor(file))
        if isinstance(leaf, QuantizedWeight):
            assert (leaf.codes.dtype, leaf.scales.dtype) == (jnp.int8, jnp.bfloat16)
            jax.jit(quantize.dequantize)(leaf)
    assert len(jax.tree.leaves(golden_template(case))) == i + 1


@pytest.mark.parametrize("rules", [TERNARY, INT8, model.PRECISIONS["ternary2-experts-64"]])
@pytest.mark.parametrize("mesh", [(1, 8), (4, 2), (2, 4)])
def test_every_mesh_restores_the_same_bits(rules, mesh):
    args = GOLDEN / "released_layout", golden_template("released_layout"), rules
    sharded = checkpoint.restore(*args, mesh_shardings(*mesh))
    alone = checkpoint.restore(*args, threads=1)
    assert_same(alone, sharded)
    module = "transformer/decoder_layer_0/multi_head_attention/linear"
    leaf = jax.tree.leaves(sharded[module]["w"])[0]
    assert isinstance(leaf.sharding, NamedSharding) and not leaf.sharding.is_fully_replicated
    assert leaf.sharding.mesh.devices.shape == mesh


def test_some_parameters_are_those_of_all():
    """A layer alone, on a mesh, as from `restore`; nothing else is read."""
    args = GOLDEN / "released_layout", golden_template("released_layout"), TERNARY
    prefix = "transformer/decoder_layer_1/"
    entries = checkpoint.check_files(*args)
    placement = checkpoint.placement_of(entries, mesh_shardings(2, 4))
    others = [entry for entry in entries if not entry.module.startswith(prefix)]
    for entry in others:
        object.__setattr__(entry, "read", None)
    some = [entry for entry in entries if entry not in others]
    found = checkpoint.restore_entries(some, placement)
    whole = checkpoint.restore(*args)
    expected = {module: whole[module] for module in whole if module.startswith(prefix)}
    assert_same(expected, found)
    leaf = found[f"{prefix}multi_head_attention/query"]["w"]
    assert leaf.packed.sharding.mesh.devices.shape == (2, 4)


def test_files_are_in_the_order_of_jax_trees():
    template = {f"layer_{i}/linear": {"w": i, "b": -i} for i in range(12)}
    keys = checkpoint.sorted_keys(template)
    assert [template[module][name] for module, name in keys] == jax.tree.leaves(template)
    assert keys.index(("layer_10/linear", "w")) < keys.index(("layer_2/linear", "w"))


# --- int8 to ternary ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, groups",
    [((12, 7), 1), ((12, 7), 3), ((3, 10, 5), 5), ((2, 9, 4), 1), ((1, 4), 1), ((2, 2048, 9), 8)],
)
def test_ternary_is_the_plain_formula(tmp_path, monkeypatch, shape, groups):
    monkeypatch.setattr(conversion, "CHUNK", 64)  # several chunks and tiles even here
    monkeypatch.setattr(conversion, "COLUMNS", 3)
    weight = random_weight(shape, groups)
    checkpoint.save(tmp_path, {"linear": {"w": weight}})
    template = {"linear": {"w": jax.ShapeDtypeStruct(shape, np.float32)}}
    found = checkpoint.restore(tmp_path, template, [("w", "ternary")])["linear"]["w"]
    gamma, expected = plain_ternary(weight)
    assert found.shape == shape
    np.testing.assert_array_equal(trits(found), expected)
    np.testing.assert_allclose(found.scales, gamma, rtol=1e-6)  # order of a float64 sum
    packed = quantize.pack(expected, gamma)
    assert (found.block, found.padding) == (packed.block, packed.padding)
    np.testing.assert_array_equal(found.packed, packed.packed)


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf])
def test_scales_without_a_meaning(tmp_path, scale):
    weight = random_weight((8, 4), 1)
    weight.scales[0, 2] = scale
    checkpoint.save(tmp_path, {"linear": {"w": weight}})
    template = {"linear": {"w": jax.ShapeDtypeStruct((8, 4), np.float32)}}
    with pytest.raises(CheckpointError, match="linear/w: negative or non-finite scales"):
        checkpoint.restore(tmp_path, template, [("w", "ternary")])


def test_memory_is_that_of_the_result(tmp_path):
    shape = (8, 1024, 4096)
    weight = random_weight((1, *shape[1:]), 4)
    weight = jax.tree.map(lambda array: np.repeat(array, 8, axis=0), weight)
    checkpoint.save(tmp_path, {"linear": {"w": weight}})
    template = {"linear": {"w": jax.ShapeDtypeStruct(shape, np.float32)}}
    size = weight.codes.nbytes
    del weight
    tracemalloc.start()
    try:
        checkpoint.restore(tmp_path, template, [("w", "ternary")], threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size / 4 <= peak < size / 1.5, f"{peak / size:.2f} of the int8 bytes"  # 1/4 is packed


WORKER = """
import sys, hashlib, functools
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
import numpy as np
sys.path[:0] = sys.argv[3:5]
import checkpoint, shards, sharding, test_checkpoint as t
mesh = sharding.make_mesh(1, 8)
assert len(mesh.local_devices) == 4
read, load = 0, shards.StoredTrits.__getitem__
def counted(stored, index):
    global read
    packed = load(stored, index)
    read += packed.size
    return packed
shards.StoredTrits.__getitem__ = counted
params = checkpoint.restore(
    sys.argv[5], t.golden_template("released_layout"), t.TERNARY,
    functools.partial(sharding.parameter_shardings, mesh), progress=True)
print(read, t.local_digests(params, mesh.local_devices))
"""


def local_digests(params, devices):
    """A digest of what each of the devices holds."""
    found = {device.id % 1000: hashlib.sha256() for device in devices}
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            if shard.device in devices:
                found[shard.device.id % 1000].update(np.ascontiguousarray(shard.data))
    return [digest.hexdigest() for digest in found.values()]


@pytest.mark.parametrize("form", ["released", "converted"])
def test_two_processes_hold_the_same_bits_as_one(tmp_path, form):
    """And of a converted checkpoint each decodes its own half only."""
    args = GOLDEN / "released_layout", golden_template("released_layout"), TERNARY
    params = checkpoint.restore(*args, mesh_shardings(1, 8))
    folder, packed = args[0], 0
    if form == "converted":
        folder = tmp_path / "converted"
        checkpoint.save_converted(folder, params, checkpoint.quantization("ternary", TERNARY))
        weights = (w for entries in params.values() for w in entries.values())
        packed = sum(w.packed.size for w in weights if isinstance(w, PackedWeight))
    root = Path(checkpoint.__file__).parent
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(i), str(port)]
            + [str(root), str(root / "tests"), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=100) for worker in workers]
    expected = local_digests(params, jax.devices()[:8])
    for i, (out, err) in enumerate(outputs):
        assert out.splitlines()[-1] == f"{packed // 2} {expected[4 * i : 4 * i + 4]}", err
        assert ("tensor" in err) == (i == 0)  # the bar is process 0's


@pytest.mark.parametrize("piece", [64, 1000])
@pytest.mark.parametrize("shape", [(256, 30), (3, 256, 30)])
@pytest.mark.parametrize("name", formats.FORMATS)
def test_any_format_is_read_in_pieces(tmp_path, monkeypatch, name, shape, piece):
    """Arrays of one to four axes, and rows longer than a piece."""
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    params = {"linear": {"w": formats.FORMATS[name].quantize(w)}}
    config = checkpoint.quantization(name, [("w", name)])
    checkpoint.save_converted(tmp_path / "made", params, config)
    template = {"linear": {"w": jax.ShapeDtypeStruct(shape, np.float32)}}
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    found = checkpoint.restore(tmp_path / "made", template, [("w", name)])
    assert_same(found, params)


# --- Reading one file -----------------------------------------------------------------------------


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(1, 6))
def test_a_malicious_pickle_is_refused_by_name(tmp_path, protocol):
    marker, path = tmp_path / "ran", tmp_path / "tensor"
    path.write_bytes(pickle.dumps({"weight": Evil(marker)}, protocol))
    with pytest.raises(CheckpointError, match=r"asks for '(posix|nt)\.mkdir'.*nothing was run"):
        tensor_file.read_tensor(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    "data, message",
    [
        (b"cos\nsystem\n(S'ls'\ntR.", r"asks for 'os\.system', which no Grok-1 tensor needs"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.", r"asks for 'posix\.system'"),
        (b"(S'ls'\nios\nsystem\n.", "pickle opcode 'STRING' is refused"),
        (b"(ios\nsystem\n.", r"asks for 'os\.system'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x05fromf\x93.", r"asks for 'numpy\.fromf'"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", r"asks for 'builtins\.eval'"),
        (b"\x80\x02Pid\n.", "pickle opcode 'PERSID' is refused"),
        (b"\x80\x04N.", "not a pickle of an array"),
        (b"\x80\x04" + b"N" * 2000 + b".", "more than 1000 opcodes"),
        (b"\x80\x04X\xff\xff\xff\x7f.", "a text of 2147483647 bytes"),
        (b"\xff", "refused"),
        (b"\x80\x04", "truncated"),
        (b"", "truncated: the file is empty"),
    ],
)
def test_other_pickles_are_refused(tmp_path, data, message):
    (tmp_path / "tensor").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        tensor_file.read_tensor(tmp_path / "tensor")
    assert str(tmp_path / "tensor") in str(error.value)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.integers(0, 1862), st.binary(min_size=0, max_size=3), st.booleans())
def test_damage_is_one_clear_error(tmp_path_factory, at, patch, cut):
    """A damaged file raises CheckpointError, or is another array: never anything else."""
    data = (GOLDEN / "released_layout/ckpt-0/tensor00005_000").read_bytes()
    data = data[:at] + patch + (b"" if cut else data[at + len(patch) :])
    path = tmp_path_factory.mktemp("damage", numbered=True) / "tensor"
    path.write_bytes(data)
    try:
        found = tensor_file.read_tensor(path)
        assert found.shape and tensor_file.describe(found)
        checkpoint.restored_shapes(found, (96, 16), "ternary")
    except CheckpointError:
        pass


@pytest.mark.parametrize("array", [np.ones((3, 2), np.float32), np.zeros((0, 4), np.float32)])
@pytest.mark.parametrize("protocol", [3, 4])
def test_what_this_numpy_pickles_can_be_read(tmp_path, array, protocol):
    (tmp_path / "tensor").write_bytes(pickle.dumps(array, protocol))
    assert_same(tensor_file.read_tensor(tmp_path / "tensor"), array)


def test_fortran_order_is_refused(tmp_path):
    """The release has none of it, and one bit of the file says so: flipped, it turned a matrix."""
    array = np.arange(15, dtype=np.float32).reshape(5, 3)
    (tmp_path / "tensor").write_bytes(pickle.dumps(np.asfortranarray(array), 4))
    with pytest.raises(CheckpointError, match="tensor: an array in Fortran's order"):
        tensor_file.read_tensor(tmp_path / "tensor")


# --- Pickles that somebody wrote ------------------------------------------------------------------


def text(string):
    return pickle.SHORT_BINUNICODE + bytes([len(string)]) + string.encode()


def shared_tuples(depth):
    """Puts a tuple on the stack that has 2 ** depth leaves, in four bytes for each level."""
    return pickle.EMPTY_TUPLE + (pickle.MEMOIZE + pickle.BINGET + b"%c" + pickle.TUPLE2) * depth % (
        tuple(range(depth))
    )


def array_pickle(shape, fortran=pickle.NEWFALSE):
    """A float32 array of eight bytes, whose shape is made by these opcodes."""
    data = pickle.dumps(np.ones((2, 1), np.float32), 4)
    made = pickle.BININT1 + b"\x02" + pickle.BININT1 + b"\x01" + pickle.TUPLE2
    assert data.count(made) == data.count(pickle.NEWFALSE + b"C") == 1
    return data.replace(made, shape).replace(pickle.NEWFALSE + b"C", fortran + b"C")


@pytest.mark.parametrize(
    "data, message",
    [
        (
            pickle.EMPTY_DICT + pickle.MARK + shared_tuples(60) + pickle.NONE + pickle.SETITEMS,
            "a dictionary whose keys are not texts",
        ),
        (shared_tuples(60) + text("x") + pickle.STACK_GLOBAL, "whose name is not a text"),
        (text("numpy") + shared_tuples(60) + pickle.STACK_GLOBAL, "whose name is not a text"),
        (array_pickle(b"B\x40\x42\x0f\0" + b"\2" * 1_000_000), "whose shape is not one of up to 8"),
        (array_pickle(b"B\x40\x42\x0f\0" + b"\1" * 1_000_000), "whose shape is not one of up to 8"),
        (array_pickle(b"C\2\2\1"), "whose shape is not one of up to 8"),
        (array_pickle(pickle.NEWTRUE + b"K\2\x86"), "whose shape is not one of up to 8"),
        (array_pickle(shared_tuples(60)), "whose shape is not one of up to 8"),
        (array_pickle(b"(K\2" + b"K\1" * 8 + b"t"), "whose shape is not one of up to 8"),
        (array_pickle(b"K\2K\1\x86", pickle.NEWTRUE), "Fortran"),
        (array_pickle(b"K\2K\1\x86", pickle.NONE), "Fortran"),
        (array_pickle(b"K\2K\1\x86", shared_tuples(60)), "Fortran"),
        (text("\x1b]0;evil\x07\r\n") + text("x") + pickle.STACK_GLOBAL, r"\\x1b\]0;evil\\x07"),
        (b"c" + b"m" * 900 + b"\n" + b"n" * 900 + b"\n", "asks for 'mmmm"),
        (b"c\xe2\x80\xae\nx\n", r"asks for '\\u202e\.x'"),
    ],
)
def test_a_pickle_that_somebody_wrote(tmp_path, data, message):
    """Some of these took for ever, or wrote to the terminal: each is one short, printable line."""
    path = tmp_path / "tensor"
    path.write_bytes(data if data.startswith(pickle.PROTO) else b"\x80\x04" + data + b".")
    with pytest.raises(CheckpointError, match=message) as error:
        tensor_file.read_tensor(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_tensor_that_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "tensor"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{path}: a folder, pipe or device, expected a file"):
        tensor_file.read_tensor(path)


@pytest.mark.parametrize(
    "shape, message",
    [
        (b"K\x02K\x02", r"24 bytes of data for float32 \[2, 2\], which needs 16"),
        (b"K\x09K\x02", "which needs 72"),
        (b"K\x03J\xfe\xff\xff\xff", "shape is not one of up to 8 sizes"),
        (b"\x8c\x01xJ\xff\xff\xff\x7f", "shape is not one of up to 8 sizes"),
    ],
)
def test_shapes_that_are_not_the_payloads(tmp_path, shape, message):
    data = pickle.dumps(np.ones((3, 2), np.float32), 4)
    (tmp_path / "tensor").write_bytes(data.replace(b"K\x03K\x02", shape))
    with pytest.raises(CheckpointError, match=message):
        tensor_file.read_tensor(tmp_path / "tensor")


def test_big_endian_and_objects_are_refused(tmp_path):
    for array, message in (
        (np.ones(3, ">f4"), "byte order is not little-endian"),
        (np.array([None]), "Python objects"),
    ):
        (tmp_path / "tensor").write_bytes(pickle.dumps(array, 4))
        with pytest.raises(CheckpointError, match=message):
            tensor_file.read_tensor(tmp_path / "tensor")


def test_payloads_are_mapped(tmp_path):
    tensor_file.write_tensor(tmp_path / "tensor", np.zeros((1 << 22,), np.float32))
    tracemalloc.start()
    found = tensor_file.read_tensor(tmp_path / "tensor")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert not found.flags.writeable and not found.flags.owndata


def test_a_parameter_outlives_its_file(small):
    """Also where the payload lies so that JAX could use it in place: at a multiple of 64 bytes."""
    folder, template, _, params = small
    path = folder / "ckpt-0" / checkpoint.file_name(2)
    data, payload = path.read_bytes(), params["layer/router"]["w"].tobytes()
    start = data.index(payload) - 2  # opcode and size
    padding = pickle.MEMOIZE * (-(start + 2) % 64)
    path.write_bytes(data[:start] + padding + data[start:])
    assert path.read_bytes().index(payload) % 64 == 0
    restored = checkpoint.restore(folder, template, INT8)
    for path in (folder / "ckpt-0").iterdir():
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    assert_same(restored, params)


# --- Errors of a folder ---------------------------------------------------------------------------


def refused(small, message, **changes):
    folder, template, rules, _ = small
    args = {"folder": folder, "template": template, "precision": rules} | changes
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.restore(**args)
    return str(error.value)


@pytest.fixture
def no_conversion(monkeypatch):
    """Fails the test if anything is converted: all is to be checked before."""
    monkeypatch.setattr(checkpoint, "_restore_one", lambda *_: pytest.fail("converted"))


def file_of(small, index):
    return small[0] / "ckpt-0" / checkpoint.file_name(index)


def test_folder_not_found(small, no_conversion):
    refused(small, "nowhere: no checkpoint here, expected a folder ckpt-0", folder="nowhere")
    inner = small[0] / "ckpt-0"
    assert f"give its parent, {small[0]}" in refused(small, "no checkpoint", folder=inner)


def test_the_folder_that_was_likely_meant(small, tmp_path, no_conversion):
    run = tmp_path / "run"
    shutil.copytree(small[0], run / "checkpoint", ignore=shutil.ignore_patterns("run"))
    refused(small, f"{run}: no checkpoint.*; give the checkpoint of this .*{run}/che", folder=run)
    (run / "out.incomplete").mkdir()
    refused(small, "out.incomplete was not finished: run the same convert", folder=run / "out")
    moved = run / "old"
    (moved / "ckpt-0.previous").mkdir(parents=True)
    refused(small, f"interrupted: rename {moved}/ckpt-0.previous to ckpt-0$", folder=moved)
    moved.rename(run / "other.previous")
    refused(small, f"rename {run}/other.previous to other$", folder=run / "other")
    checkpoint.check_folder(run / "checkpoint")
    for folder in (".", "/", ".."):
        with pytest.raises(CheckpointError, match="check the path"):
            checkpoint.check_folder(folder)


def test_missing_file(small, no_conversion):
    file_of(small, 1).unlink()
    text = refused(small, "has 2 tensor files, this model needs 3; choose the preset")
    assert "tensor00001_000: missing, should hold layer/query/w" in text


def test_extra_file(small, no_conversion):
    shutil.copy(file_of(small, 0), file_of(small, 3))
    assert "ckpt-0: 'tensor00003_000' belongs to no" in refused(small, "has 4 tensor files")


def test_other_files_do_not_matter(small):
    (small[0] / "ckpt-0" / "README.md").write_text("tensors")
    checkpoint.restore(*small[:3])


def test_truncated_file(small, no_conversion):
    path = file_of(small, 2)
    path.write_bytes(path.read_bytes()[:-40])
    text = refused(small, "tensor00002_000: layer/router/w: truncated: 96 bytes should follow")
    assert text.count(str(path)) == 1 and "download it again" in text


def test_bytes_after_the_end(small, no_conversion):
    path = file_of(small, 2)
    path.write_bytes(path.read_bytes() + b"abc")
    refused(small, "layer/router/w: 3 bytes follow the end")


def test_wrong_shape_is_a_wrong_preset(small, no_conversion):
    template = small[1] | {"layer/query": {"w": jax.ShapeDtypeStruct((12, 6), np.float32)}}
    refused(
        small,
        r"tensor00001_000: layer/query/w: expected int8 \[12, 6\] with scales bfloat16 \[1, 6\], "
        r"found int8 \[12, 5\] with scales bfloat16 \[1, 5\]; choose the preset",
        template=template,
    )


def test_wrong_dtype(small, no_conversion):
    file_of(small, 2).write_bytes(pickle.dumps(np.ones((12, 2)), 4))
    refused(small, r"router/w: expected float32 \[12, 2\], found float64 \[12, 2\]")


def test_groups_that_do_not_divide(small, no_conversion):
    tensor_file.write_tensor(file_of(small, 1), random_weight((12, 5), 7))
    refused(small, r"bfloat16 \[a divisor of 12, 5\], found .* scales bfloat16 \[7, 5\]")


def test_rules_and_files_disagree(small, no_conversion):
    message = "linear/w: it is int8 in the file, which cannot become float32; leave the choice"
    refused(small, message, precision=[("", "float32")])
    with pytest.raises(ValueError, match="unknown format 'int4'; known: .*'ternary2-128'"):
        checkpoint.restore(small[0], small[1], [("", "int4")])


def test_many_problems_are_cut_short(tmp_path, no_conversion):
    checkpoint.save(tmp_path, {f"m{i}": {"w": np.ones(2, np.float32)} for i in range(9)})
    template = {f"m{i}": {"w": jax.ShapeDtypeStruct((3,), np.float32)} for i in range(9)}
    with pytest.raises(CheckpointError, match="m4/w.*\n... and 4 more$"):
        checkpoint.restore(tmp_path, template, [("", "float32")])


def test_meshes_that_do_not_divide(small, no_conversion):
    mesh = sharding.make_mesh(1, 8)

    def rows(tree):
        return jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "model")), tree)

    refused(small, r"tensor00000_000: layer/moe/linear/w: .*choose a mesh", shardings=rows)


def test_meshes_that_cut_a_packing_block(tmp_path, no_conversion, monkeypatch):
    monkeypatch.setattr(quantize, "SHARDS", 1)  # an output is one block of 16 bytes
    checkpoint.save(tmp_path, {"linear": {"w": random_weight((64, 4), 1)}})
    template = {"linear": {"w": jax.ShapeDtypeStruct((64, 4), np.float32)}}
    mesh = sharding.make_mesh(1, 8)

    def rows(tree):
        specs = PackedWeight(P(None, "model"), P(), 16, 0)
        return {"linear": {"w": jax.tree.map(functools.partial(NamedSharding, mesh), specs)}}

    with pytest.raises(
        CheckpointError, match="linear/w: a shard of 2 packed bytes cuts a block of 16"
    ):
        checkpoint.restore(tmp_path, template, [("w", "ternary")], rows)


@pytest.mark.skipif(not kernels.on_cpu(), reason="no native kernels")
@pytest.mark.parametrize("mesh", [None, (1, 2), (2, 4)])
@pytest.mark.parametrize("name", ["ternary", "ternary-fit-64", "ternary2-128"])
@pytest.mark.parametrize("stored", [True, False], ids=["converted", "released"])
def test_outputs_side_by_side_on_every_mesh(tmp_path, name, mesh, stored):
    """Where 64 outputs of a device's part lie in whole groups, and else in rows."""
    shapes = {"moe/linear": (2, 256, 512), "moe/linear_1": (2, 2048, 192), "moe/linear_v": (40, 96)}
    params = {f"layer/{module}": {"w": random_weight(s, 1)} for module, s in shapes.items()}
    template = {m: {"w": jax.ShapeDtypeStruct(w["w"].shape, np.float32)} for m, w in params.items()}
    checkpoint.save(tmp_path / "released", params)
    rules = [("w", name)]
    rows = checkpoint.restore(tmp_path / "released", template, rules)
    config = checkpoint.quantization(name, rules)
    checkpoint.save_converted(tmp_path / "converted", rows, config)
    folder = tmp_path / ("converted" if stored else "released")

    def shardings(tree):
        axes = {"linear": (None, "model"), "linear_1": ("model", None), "linear_v": (None, None)}

        def one(module, w):
            *lead, inputs, outputs = (None, *axes[module.rpartition("/")[2]])[-len(w.shape) :]
            on = functools.partial(NamedSharding, sharding.make_mesh(*mesh))
            last = [None] * w.interleaved
            return dataclasses.replace(
                w,
                packed=on(P(*lead, outputs, inputs, *last, *last)),
                scales=on(P()),
                multipliers=w.multipliers and on(P(*lead, outputs, inputs, None, *last)),
            )

        return {module: {"w": one(module, w["w"])} for module, w in tree.items()}

    found = checkpoint.restore(
        folder, template, rules, mesh and shardings, interleave=True, threads=2
    )
    assert [w["w"].interleaved for w in found.values()] == [True, True, False]
    assert_same(jax.tree.map(np.asarray, _in_rows(found)), rows)
    checkpoint.save_converted(tmp_path / "again", found, config)
    assert_same(checkpoint.restore(tmp_path / "again", template, rules), rows)


def _in_rows(params):
    """Each of the weights as `quantize.in_rows` has it."""
    return {module: {"w": quantize.in_rows(w["w"])} for module, w in params.items()}


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_files_are_written_alike(tmp_path, monkeypatch, case):
    """Byte for byte; the two cases not of the release's era have another flags byte."""
    flags = 80 if case == "released_layout" else 64
    monkeypatch.setattr(tensor_file, "BFLOAT16_FLAGS", flags)
    params = checkpoint.restore(GOLDEN / case, golden_template(case), INT8)
    checkpoint.save(tmp_path, params)
    originals = sorted((GOLDEN / case / "ckpt-0").iterdir())
    written = sorted((tmp_path / "ckpt-0").iterdir())
    assert [path.name for path in written] == [path.name for path in originals]
    for ours, theirs in zip(written, originals, strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours.name


# Sizes of the released files, from its index: (shape, scales' shape, bytes)
RELEASED = [
    ((131072, 6144), None, 3221225637),
    ((6144,), None, 24727),
    ((6144, 8), None, 196770),
    ((8, 6144, 32768), (8, 1, 32768), 1611137347),
    ((8, 32768, 6144), (8, 8, 6144), 1611399491),
    ((6144, 1024), (1, 1024), 6293814),
    ((6144, 6144), (1, 6144), 37761334),
    ((6144, 6144), (8, 6144), 37847359),
]


@pytest.mark.parametrize("shape, scales, size", RELEASED)
def test_sizes_are_those_of_the_release(tmp_path, shape, scales, size):
    value = jax.ShapeDtypeStruct(shape, np.float32)
    if scales:
        value = QuantizedWeight(
            jax.ShapeDtypeStruct(shape, np.int8),
            jax.ShapeDtypeStruct(scales, ml_dtypes.bfloat16),
        )
    assert tensor_file.file_size(value) == size
    if size < 1e7:
        real = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), value)
        tensor_file.write_tensor(tmp_path / "tensor", real)
        assert (tmp_path / "tensor").stat().st_size == size
        assert_same(tensor_file.read_tensor(tmp_path / "tensor"), real)


@pytest.fixture
def installed_names(monkeypatch):
    """Lets the writer use the names and flags of the installed numpy and ml_dtypes."""
    function, _, state = np.ones(1).__reduce__()
    monkeypatch.setattr(tensor_file, "RECONSTRUCT", (function.__module__, function.__name__))
    flags = np.dtype(ml_dtypes.bfloat16).__reduce__()[2][-1]
    monkeypatch.setattr(tensor_file, "BFLOAT16_FLAGS", flags)


def pickled(value):
    parts = tensor_file._Writer(value).parts
    return b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4])
def test_arrays_are_pickled_as_python_does(installed_names, rank):
    """At every edge: short and long payloads, frames and sizes."""
    for count in (0, 1, 63, 64, 255, 256, 16000, 16383, 16384, 16385, 65535, 65536):
        array = np.ones((count, 1, 1, 1)[:rank], np.float32)
        assert pickled(array) == pickle.dumps(array, protocol=4), count


def test_weights_are_pickled_as_python_does(installed_names, monkeypatch):
    """Wherever among the opcodes of a weight the first frame ends, with small and large scales."""

    class Weight:
        pass

    Weight.__module__, Weight.__qualname__ = tensor_file.WEIGHT_CLASS
    monkeypatch.setattr(sys.modules["__main__"], Weight.__qualname__, Weight, raising=False)
    for size in (9, *range((1 << 16) - 450, (1 << 16) + 3)):
        theirs = Weight()
        theirs.weight = np.ones((1, size), np.int8)
        theirs.scales = np.ones((1, size if size % 2 else 3), ml_dtypes.bfloat16)
        ours = QuantizedWeight(theirs.weight, theirs.scales)
        assert pickled(ours) == pickle.dumps(theirs, protocol=4), size
        assert tensor_file.file_size(ours) == len(pickled(ours))


def test_jax_arrays_on_a_mesh_are_written(tmp_path):
    args = golden_template("released_layout"), INT8, mesh_shardings(1, 8)
    params = checkpoint.restore(GOLDEN / "released_layout", *args)
    checkpoint.save(tmp_path, params)
    assert_same(checkpoint.restore(tmp_path, *args), params)


@pytest.mark.parametrize(
    "leaf, message",
    [
        (formats.ternarize(jnp.ones((8, 4))), "linear/w: the release's format has no ternary"),
        (jnp.ones(3, jnp.bfloat16), r"holds float32 here, got bfloat16 \[3\]"),
        (formats.quantize_int8(jnp.ones((8, 4))), None),
        (QuantizedWeight(np.ones((8, 4), np.int8), np.ones((1, 4))), "bfloat16 scales here"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_first(tmp_path, leaf, message):
    params = {"a": {"w": np.ones(3, np.float32)}, "linear": {"w": leaf}}
    if message is None:
        checkpoint.save(tmp_path, params)
        return
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path, params)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_previous_one(small, monkeypatch):
    folder, template, _, params = small
    write, written = tensor_file.write_tensor, []

    def full_disk(path, value):
        written.append(path)
        if len(written) == 2:
            raise OSError("no space left on device")
        write(path, value)

    monkeypatch.setattr(checkpoint, "write_tensor", full_disk)
    changed = jax.tree.map(np.zeros_like, params)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(folder, changed)
    assert_same(checkpoint.restore(folder, template, INT8), params)
    assert {path.parent.name for path in written} == {"ckpt-0.partial"}
    monkeypatch.undo()
    checkpoint.save(folder, changed)
    assert_same(checkpoint.restore(folder, template, INT8), changed)
    assert [path.name for path in folder.iterdir()] == ["ckpt-0"]


def test_a_save_that_was_killed_between_its_renames_loses_nothing(small, monkeypatch):
    """Not even if the next one fails, too."""
    folder, template, _, params = small
    changed, rename, calls = jax.tree.map(np.zeros_like, params), Path.rename, []

    def killed(self, target):
        calls.append(self.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder, changed)
    assert calls == ["ckpt-0", "ckpt-0.partial"]
    refused(small, f"rename {folder}/ckpt-0.previous to ckpt-0")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensor", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            checkpoint.save(folder, changed)
    assert_same(checkpoint.restore(folder, template, INT8), params)
    checkpoint.save(folder, changed)
    assert_same(checkpoint.restore(folder, template, INT8), changed)
    assert [path.name for path in folder.iterdir()] == ["ckpt-0"]


def test_a_full_disk_names_the_file_and_the_cure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file._Writer, "put", full)
    with pytest.raises(
        OSError, match=f"{tmp_path}/t: cannot be written: No space left.*; make roo"
    ):
        tensor_file.write_tensor(tmp_path / "t", np.ones(3, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_released_floats_that_are_no_numbers(small, value):
    folder, template, rules, params = small
    params["layer/router"]["w"][7, 1] = value
    checkpoint.save(folder, params)
    refused(small, "tensor00002_000: layer/router/w: NaN or infinite numbers; copy or download")
    found = checkpoint.restore(folder, template, rules, check=False)
    assert_same(found["layer/router"], params["layer/router"])


def test_released_scales_that_are_no_scales(small):
    """Also where nothing is made ternary."""
    params = small[3]
    params["layer/query"]["w"].scales[0, 0] = -1
    checkpoint.save(small[0], params)
    refused(small, "tensor00001_000: layer/query/w: negative or non-finite scales", precision=INT8)


ABOUT = checkpoint.quantization("ternary", TERNARY)["quantization_config"]


@pytest.mark.parametrize(
    "about, message",
    [
        ([], r"quantization_config \[\], expected an object"),
        ("ternary", "quantization_config 'ternary'"),
        ({}, "format version None, this code reads"),
        (ABOUT | {"format_version": [1]}, r"format version \[1\]"),
        (ABOUT | {"weights": None}, "weights None in quantization_config"),
        (ABOUT | {"weights": ["ternary"]}, "weights .* expected the name of a precision table"),
    ],
)
def test_what_config_json_says_of_the_weights(tmp_path, about, message):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": about}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json: {message}"):
        checkpoint.default_weights(tmp_path)


def test_read_config(tmp_path):
    assert checkpoint.read_config(tmp_path) is None
    assert checkpoint.read_config(GOLDEN / "dense")["num_layers"] == 3
    for text, message in (("{", "not JSON"), ("[1]", r"expected a JSON object, found \[1\]")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    "count, text",
    [(12, "12 B"), (45_000, "45 kB"), (3_456_000, "3.46 MB"), (78_654_321_000, "78.7 GB")],
)
def test_sizes_for_reading(count, text):
    assert checkpoint.readable_size(count) == text
