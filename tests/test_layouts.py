"""The layout file: what is mapped is what is loaded, copied by nobody; refused when it is wrong."""

import dataclasses
import json
import re
import shutil
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import random_params

import checkpoint
import convert
import files
import kernels
import layouts
import model
import run
import runners
import sharding
import shards
from files import CheckpointError

# Sizes that allow 64 outputs side by side.
CONFIG = dataclasses.replace(
    model.PRESETS["tiny"],
    emb_size=128,
    widening_factor=3,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    key_size=64,
    fprop_dtype="bfloat16",
    activations="int8",
)
WEIGHTS = ["ternary", "ternary-experts-fit-64", "ternary2-64", "int8", "float32"]
TABLE = f"{runners.EMBEDDINGS}/embeddings"


def save(folder, weights="ternary", seed=0, **changes):
    """A converted checkpoint."""
    precision = model.PRECISIONS[weights]
    config = dataclasses.replace(CONFIG, **changes)
    about = model.config_to_dict(config) | checkpoint.quantization(weights, precision, "2bit")
    checkpoint.save_converted(folder, random_params(config, weights, seed=seed), about)
    return folder


def with_layout(folder, *args, **changes):
    convert.main([str(save(folder, *args, **changes)), "--layout", "cpu"])
    return folder


@pytest.fixture
def folder(tmp_path):
    return with_layout(tmp_path / "made")


def load(folder, mesh=(1, 1), weights=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    runner = runners.ModelRunner(config, sharding.make_mesh(*mesh))
    runner.load(folder, weights)
    return runner


def refused(*arguments, command=convert):
    with pytest.raises(SystemExit) as exit_:
        command.main([str(argument) for argument in arguments])
    return str(exit_.value.code)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def is_mapped(array) -> bool:
    """Whether the array's memory is that of a mapped layout file, by the system's own word."""
    at = array.addressable_shards[0].data.unsafe_buffer_pointer()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(text, 16) for text in line.split()[0].split("-"))
        if begin <= at < end:
            return layouts.FILE in line
    raise AssertionError(f"{at:x} is not mapped at all")


linux = pytest.mark.skipif(sys.platform != "linux", reason="the maps of Linux")


# --- What is mapped -------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    "weights, embeddings",
    [*((weights, "float") for weights in WEIGHTS), ("ternary-experts-fit-64", "int8")],
)
def test_mapped_weights_are_those_that_are_loaded_and_no_copy(tmp_path, weights, embeddings):
    folder = save(tmp_path / "made", weights, embeddings=embeddings)
    loaded = load(folder, embeddings=embeddings)
    assert not loaded.mapped_bytes and not any(map(is_mapped, jax.tree.leaves(loaded.params)))
    convert.main([str(folder), "--layout", "cpu"])
    mapped = load(folder, embeddings=embeddings)
    assert_same(mapped.params, loaded.params)
    arrays = jax.tree.leaves(mapped.params)
    assert all(map(is_mapped, arrays))
    assert mapped.mapped_bytes == sum(array.nbytes for array in arrays)


@linux
def test_what_is_wanted_otherwise_is_loaded_from_the_shards(folder, tmp_path):
    """Another table; all, where there are several devices; other weights than the file's."""
    runner = load(folder, fprop_dtype="float32")
    mapped = {name: is_mapped(array) for name, array in arrays_of(runner.params)}
    assert [name for name, found in mapped.items() if not found] == [TABLE]
    assert runner.params[runners.EMBEDDINGS]["embeddings"].dtype == jnp.float32
    assert not load(folder, mesh=(2, 1)).mapped_bytes
    int8 = with_layout(tmp_path / "int8", "int8")
    expected = load(save(tmp_path / "same", "int8"), weights="ternary").params
    runner = load(int8, weights="ternary")
    assert_same(runner.params, expected)
    mapped = {name for name, array in arrays_of(runner.params) if is_mapped(array)}
    assert any("router" in name for name in mapped)
    assert not any(".packed" in name for name in mapped)


def arrays_of(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


@linux
def test_outputs_lie_side_by_side_where_there_are_kernels(folder):
    w = load(folder).params["transformer/decoder_layer_0/moe/linear"]["w"]
    assert w.interleaved == kernels.on_cpu() and is_mapped(w.packed)


def test_only_memory_of_our_own_is_put_on_large_pages(folder, monkeypatch):
    advised = []
    monkeypatch.setattr(kernels, "use_large_pages", advised.append)
    load(folder)
    assert advised == [{}]
    load(folder, fprop_dtype="float32")
    assert [*advised[1]] == [runners.EMBEDDINGS]


def test_what_is_donated_is_copied_and_the_file_stays(folder):
    before = layouts.path_of(folder).read_bytes()
    params = load(folder).params
    changed = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    jax.block_until_ready(changed)
    assert layouts.path_of(folder).read_bytes() == before
    assert_same(load(folder).params, load(without_layout(folder)).params)


def without_layout(folder):
    layouts.path_of(folder).unlink()
    return folder


# --- Files that are wrong -------------------------------------------------------------------------


CURE = r"; make it again with convert.py \S+ --layout cpu, or remove it$"


def header_of(data):
    _, length, _ = layouts.START.unpack(data[: layouts.START.size])
    return json.loads(data[layouts.START.size :][:length])


def with_header(data, **changes):
    """The file with another header, whose sum agrees; as long as the space before the arrays."""
    text = json.dumps(header_of(data) | changes).encode()
    start = layouts.START.pack(layouts.MAGIC, len(text), zlib.crc32(text))
    room = min(offset for _, places in places_of(data) for offset, _ in places)
    assert len(start + text) <= room
    return (start + text).ljust(room, b"\0") + data[room:]


def places_of(data):
    return [(path, form["places"]) for path, form in header_of(data)["parameters"].items()]


def with_parameter(data, **changes):
    """The file with another description of its first parameter, one of a float32 array."""
    parameters = header_of(data)["parameters"]
    first = next(iter(parameters))
    return with_header(data, parameters=parameters | {first: parameters[first] | changes})


WRONG = {
    "is no layout file": lambda data: b"P" + data[1:],
    "is no layout file$": lambda data: data[:20],
    "the header is damaged": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "the header is damaged$": lambda data: data[:500],
    r"\d+ bytes, it should have \d+": lambda data: data[:-1],
    r"\d+ bytes, it should have \d+$": lambda data: data + b"x",
    "version 2, not 1": lambda data: with_header(data, version=2),
    "was made from other shards than those beside it": lambda data: with_header(data, source="x"),
    "the header has": lambda data: with_header(data, more=1),
    "parameters 3": lambda data: with_header(data, parameters=3),
    "'p': expected an object, found 3": lambda data: with_header(data, parameters={"p": 3}),
    "arrays 3 at": lambda data: with_parameter(data, arrays=3),
    r"arrays \[\['bfloat16', \[1024, 128\]\]\] at \[\]": lambda data: with_parameter(
        data, places=[]
    ),
    r"an array .* at \[-4096, '": lambda data: with_parameter(data, places=[[-4096, "0" * 8]]),
    r"an array .* at \[0, '": lambda data: with_parameter(data, places=[[0, "0" * 8]]),
    r"an array .* at \[65537, '": lambda data: with_parameter(data, places=[[65537, "0" * 8]]),
    r"an array .* at \[1073741824, '": lambda data: with_parameter(
        data, places=[[1 << 30, "0" * 8]]
    ),
    r"an array .* at \[65536, 7": lambda data: with_parameter(data, places=[[65536, 7]]),
    r"an array \['object'": lambda data: with_parameter(data, arrays=[["object", [1]]]),
    r"an array \['int8', \[-1": lambda data: with_parameter(data, arrays=[["int8", [-1]]]),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_file_that_is_wrong_is_refused_until_it_is_made_again_or_removed(folder, message):
    path = layouts.path_of(folder)
    sound = path.read_bytes()
    path.write_bytes(WRONG[message](sound))
    found = message.removesuffix("$")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{found}.*{CURE}"):
        load(folder)
    assert re.search(f"{found}.*{CURE}", refused("--verify", folder))
    convert.main([str(folder), "--layout", "cpu"])
    assert path.read_bytes() == sound


def test_a_file_of_other_shards(folder, tmp_path):
    other = with_layout(tmp_path / "other", seed=1)
    shutil.copy(layouts.path_of(other), folder)
    with pytest.raises(CheckpointError, match="other shards than those beside it; make it again"):
        load(folder)
    load(folder, mesh=(2, 1))  # which does not look at it


def test_a_form_that_is_not_asked_for_is_not_taken(folder):
    """An array of a shape that the header says, and the model does not have."""
    path = layouts.path_of(folder)
    path.write_bytes(with_parameter(path.read_bytes(), arrays=[["bfloat16", [1024, 64]]]))
    runner = load(folder)
    assert runner.params[runners.EMBEDDINGS]["embeddings"].shape == (1024, 128)
    assert not runner.plan_loading(folder).mapped.get(runners.EMBEDDINGS)


# --- The command ----------------------------------------------------------------------------------


def test_verify_reads_every_byte_and_names_what_is_damaged(folder, capsys):
    convert.main(["--verify", str(folder)])
    size = sum(path.stat().st_size for path in folder.iterdir())
    size -= (folder / shards.CHECKSUMS).stat().st_size
    out = capsys.readouterr().out
    assert f"{len([*folder.iterdir()]) - 1} files, {checkpoint.readable_size(size)}, all as" in out
    assert "not compared" not in out
    path = layouts.path_of(folder)
    data = path.read_bytes()
    for name, form in header_of(data)["parameters"].items():
        for (offset, _), array in zip(form["places"], form["arrays"], strict=True):
            last = offset + layouts._bytes(*array) - 1
            path.write_bytes(data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])
            (problem,) = layouts.verify(folder)
            assert problem.startswith(f"{path}: {name}: damaged; make the file again")
    assert "damaged" in refused("--verify", folder)


def test_it_is_made_once_and_again_when_the_table_is_another(folder, capsys):
    path = layouts.path_of(folder)
    before = path.stat().st_ino
    capsys.readouterr()
    convert.main([str(folder), "--layout", "cpu"])
    assert "is there already" in capsys.readouterr().err and path.stat().st_ino == before
    config = json.loads((folder / shards.CONFIG).read_text()) | {"fprop_dtype": "float32"}
    (folder / shards.CONFIG).write_text(json.dumps(config))
    sums = json.loads((folder / shards.CHECKSUMS).read_text())
    del sums[shards.CONFIG]
    (folder / shards.CHECKSUMS).write_text(json.dumps(sums))
    convert.main([str(folder), "--layout", "cpu"])
    assert re.match(r"written +\d+ [kM]B|written +[\d.]+ MB", capsys.readouterr().err)
    runner = load(folder, fprop_dtype="float32")
    assert runner.params[runners.EMBEDDINGS]["embeddings"].dtype == jnp.float32
    assert not runner.plan_loading(folder).entries


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    folder = save(tmp_path / "made")
    before = sorted(folder.iterdir())
    make, calls = checkpoint.restore_entries, []

    def third(entries, placement):
        calls.append(entries)
        if len(calls) == 3:
            assert (folder / f"{layouts.FILE}.part").exists()
            raise KeyboardInterrupt
        return make(entries, placement)

    monkeypatch.setattr(checkpoint, "restore_entries", third)
    assert "interrupted" in refused(folder, "--layout", "cpu")
    assert sorted(folder.iterdir()) == before
    monkeypatch.setattr(checkpoint, "restore_entries", make)
    (folder / f"{layouts.FILE}.part").write_bytes(b"of a process that was killed" * 100_000)
    convert.main([str(folder), "--layout", "cpu"])
    assert layouts.verify(folder) == []
    assert sorted(folder.iterdir()) == sorted([*before, layouts.path_of(folder)])


def test_two_processes_do_not_write_one_file(tmp_path):
    folder = save(tmp_path / "made")
    with files.lock(folder):
        assert "another process is writing it" in refused(folder, "--layout", "cpu")


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    folder = save(tmp_path / "made")
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert re.search(
        r"cpu.layout needs .* has 1 kB free; make room", refused(folder, "--layout", "cpu")
    )
    assert not layouts.path_of(folder).exists()


def test_what_has_no_layout(tmp_path, capsys):
    checkpoint.save(tmp_path, random_params(CONFIG, "int8"))
    text = refused(tmp_path, "--layout", "cpu")
    assert text.startswith(f"error: {tmp_path}: a released checkpoint, which has no sums; convert")
    refused(tmp_path, tmp_path / "out", "--layout", "cpu")
    assert "--layout takes the FOLDER of one converted" in capsys.readouterr().err


def test_inspect_tells_of_it(folder, capsys):
    convert.main(["--inspect", str(folder)])
    size = layouts.path_of(folder).stat().st_size
    count = len(header_of(layouts.path_of(folder).read_bytes())["parameters"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"cpu.layout: {size:,} bytes, {count} parameters as a CPU has them"


# --- More than memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "room, missing",
    [
        (1000, 0),  # all of it
        (620, 0),
        (420, 50),  # a quarter of the 200 that are not there
        (20, 150),  # no expert is
        (19, 170),  # not even what each token needs
        (0, 170),
    ],
)
def test_what_a_token_reads_from_the_disk(room, missing):
    """Experts of 600 bytes, of which a token takes a quarter, and 20 others."""
    config = dataclasses.replace(CONFIG, num_experts=8, num_selected_experts=2)
    of = lambda size: {"w": jax.ShapeDtypeStruct((size,), jnp.int8)}  # noqa: E731
    params = {"layer/moe/linear": of(400), "layer/moe/linear_1": of(200), "table": of(20)}
    assert runners.token_bytes(config, params, room) == (170, missing)


def test_a_model_larger_than_memory(tmp_path, monkeypatch, capsys):
    """It is refused, with the cure, and then it runs."""
    folder = save(tmp_path / "made")
    flags = ["--checkpoint", str(folder), "--prompt", "First", "--max-len", "5", "--mesh", "1,1"]
    total = plan_total()
    monkeypatch.setattr(sharding, "memory_limit", lambda mesh: total - 1000)
    text = refused(*flags, command=run)
    assert text.endswith(
        f"convert.py {folder} --layout cpu (a CPU then runs it from the disk, slowly)"
    )
    convert.main([str(folder), "--layout", "cpu"])
    capsys.readouterr()
    run.main(flags)
    out, err = capsys.readouterr()
    assert out.startswith("First") and len(out) > len("First\n")
    lines = dict(line.split(maxsplit=1) for line in err.splitlines())
    assert re.search(r"a token reads \d+ kB of them, about 250 B from the disk$", lines["disk"])
    assert lines["load"].endswith(" mapped")
    monkeypatch.setattr(sharding, "memory_limit", lambda mesh: 10_000)  # too little for the rest
    assert "this needs" in refused(*flags, command=run)


def plan_total():
    """Bytes that `run.py` plans with."""
    runner = runners.ModelRunner(CONFIG, sharding.make_mesh(1, 1))
    params = runners.abstract_weights(CONFIG, model.PRECISIONS["ternary"])
    return sum(runners.device_memory(runner, params, 1, CONFIG.sequence_len).values())
