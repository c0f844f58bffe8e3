import concurrent.futures
import dataclasses
import json
import os
import re
import struct
import zlib
from pathlib import Path

import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from factories import join_header, mend_sums, split_header
from hypothesis import strategies as st

import checkpoint
import files
import formats
import quantize
import shards
from checkpoint import CheckpointError
from quantize import PackedWeight, QuantizedWeight

PAGE = Path(shards.__file__).with_name("docs") / "format.md"
FITTED = [name for name, format in formats.FORMATS.items() if format.fit]
RULES = (
    (r"/t$", "ternary"),
    (r"/q$", "int8"),
    *((f"/{name}$", name) for name in FITTED),
    (r"", "float32"),
)
CONFIG = checkpoint.quantization("mixed", RULES)


def matrix(shape, seed=0):
    random = np.random.default_rng(seed)
    trits = random.integers(-1, 2, shape, dtype=np.int8)
    gamma = random.random((*shape[:-2], 1, 1), np.float32)
    return quantize.pack(trits, gamma)


def mixed(shapes=((3, 7), (2, 21, 5), (1, 1), (8, 64, 9))):
    """Parameters of every format."""
    random = np.random.default_rng(1)
    params = {}
    for i, shape in enumerate(shapes):
        codes = random.integers(-128, 128, shape, dtype=np.int8)
        scales = random.random((*shape[:-2], 1, shape[-1])).astype(ml_dtypes.bfloat16)
        params[f"layer_{i}/linear"] = {
            "q": QuantizedWeight(codes, scales),
            "t": matrix(shape, i),
            "f": (floats := random.standard_normal(shape).astype(np.float32)),
            **{name: formats.FORMATS[name].quantize(floats) for name in FITTED},
        }
    return params


def template(params):
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, np.float32),
        params,
        is_leaf=lambda x: isinstance(x, QuantizedWeight | PackedWeight),
    )


def rules_of(params):
    """Those of RULES that match one of the parameters first."""
    first = (
        next(rule for rule in RULES if re.search(rule[0], f"/{n}"))
        for p in params.values()
        for n in p
    )
    return sorted(set(first), key=RULES.index)


def save(folder, params, packing="base3", **options):
    config = checkpoint.quantization("mixed", rules_of(params), packing)
    checkpoint.save_converted(folder, params, config, **options)
    return folder


def restore(folder, params):
    return checkpoint.restore(folder, template(params), rules_of(params))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- The files ------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 9)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(shards.PACKINGS),
)
def test_every_shape_comes_back(tmp_path_factory, shapes, packing):
    params = mixed([(e, i, o) if e else (i, o) for e, i, o in shapes])
    folder = save(tmp_path_factory.mktemp("shapes") / "saved", params, packing)
    assert_same(restore(folder, params), jax.tree.map(jax.numpy.asarray, params))


@pytest.mark.parametrize("packing", shards.PACKINGS)
def test_the_reader_on_the_page_reads_it(tmp_path, packing):
    """Written from the page alone, in NumPy; it shares no code with ours."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    params = mixed()
    found = scope["read_checkpoint"](save(tmp_path / "saved", params, packing))
    expected = {f"{m}/{n}": quantize.dequantize(w) for m in params for n, w in params[m].items()}
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name])


def test_the_examples_on_the_page():
    trits = np.array([[1, 0, -1, 1, 0, 0, 1, -1]], np.int8).T
    np.testing.assert_array_equal(quantize.pack(trits, None, block=2).packed, [[146, 25]])
    packed = np.array([137, 0, 170, 0, 72], np.uint8)
    np.testing.assert_array_equal(shards.to_base3(packed), [61, 162, 80, 81])
    assert all(word in PAGE.read_text() for word in ("= 146", "= 25", "= 61", "= 162", "= 80"))


def test_the_safetensors_library_reads_it(tmp_path):
    params = mixed()
    folder = save(tmp_path / "saved", params, "2bit")
    (file,) = folder.glob("*.safetensors")
    arrays = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(
        arrays["layer_1/linear/t.trits"], params["layer_1/linear"]["t"].packed
    )
    np.testing.assert_array_equal(arrays["layer_1/linear/f"], params["layer_1/linear"]["f"])
    index = json.loads((folder / shards.INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(arrays, file.name)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    with safetensors.safe_open(file, "np") as opened:
        about = json.loads(opened.metadata()["layer_3/linear/t"])
    assert about == {"shape": [8, 64, 9], "format": "ternary", "packing": "2bit", "block": 2}


def test_tensors_are_aligned(tmp_path):
    (file,) = save(tmp_path / "saved", mixed()).glob("*.safetensors")
    data = file.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    assert begin % 8 == 0
    for name, entry in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % shards.DTYPES[entry["dtype"]].itemsize == 0


def test_a_plan_fills_shards_in_order_and_divides_no_parameter():
    leaves = {f"p{i}": np.zeros(n, np.float32) for i, n in enumerate([10, 10, 30, 5, 5, 5, 5])}
    plan = shards.plan(leaves, shard_size=80)
    assert [list(shard.leaves) for shard in plan] == [
        ["p0", "p1"],
        ["p2"],
        ["p3", "p4", "p5", "p6"],
    ]
    assert [shard.name for shard in plan] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


# --- Slices ---------------------------------------------------------------------------------------


class Watched(np.ndarray):
    """Notes which of its columns are read."""

    def __getitem__(self, index):
        self.seen.append(index)
        return super().__getitem__(index).view(np.ndarray)

    def __array_finalize__(self, other):
        self.seen = getattr(other, "seen", None)


def stored_trits(weight, packing):
    form = shards.stored_form("ternary", weight.shape, packing).packed
    leaf = dataclasses.replace(form, stored=np.empty(form.stored.shape, np.uint8))
    leaf[...] = weight.packed
    return leaf


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.data(), st.sampled_from(shards.PACKINGS))
def test_a_slice_reads_its_own_bytes_only(data, packing):
    experts, inputs, outputs = (data.draw(st.integers(1, n)) for n in (3, 90, 6))
    weight = matrix((experts, inputs, outputs))
    leaf = stored_trits(weight, packing)

    def draw(size):
        start = data.draw(st.integers(0, size - 1))
        return slice(start, data.draw(st.integers(start + 1, size)))

    index = tuple(draw(size) for size in weight.packed.shape)
    width = index[2]
    if packing == "base3":  # whole groups: four bytes for five
        width = slice(width.start // 5 * 4, -(-width.stop // 5) * 4)
    watched = leaf.stored.view(Watched)
    watched.seen = []
    found = dataclasses.replace(leaf, stored=watched)[index]
    np.testing.assert_array_equal(found, weight.packed[index])
    read = np.zeros(watched.shape, bool)
    for seen in watched.seen:
        read[seen] = True
    expected = np.zeros(watched.shape, bool)
    expected[index[0], index[1], width] = True
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("packing", shards.PACKINGS)
def test_pieces_and_threads_change_nothing(monkeypatch, packing):
    weight = matrix((2, 50, 40))
    monkeypatch.setattr(checkpoint, "PIECE", 64)
    leaf = stored_trits(weight, packing)
    index = tuple(slice(0, size) for size in leaf.shape)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        out = checkpoint._read(leaf, index, pool)
    np.testing.assert_array_equal(out, weight.packed)


# --- Damage ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    params = mixed()
    leaves = sum(map(len, params.values()))
    folder = save(tmp_path / "saved", params)
    assert len(shards.open_shards(folder)) == leaves
    (file,) = folder.glob("*.safetensors")
    return folder, file, params


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_verify_finds_nothing_wrong(saved):
    folder, file, _ = saved
    seen = []
    assert shards.verify(folder, seen.append) == []
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(seen) == sum(sizes.values()) - sizes[shards.CHECKSUMS]
    assert shards.without_sums(folder) == []


def test_verify_names_file_and_tensor(saved):
    folder, file, _ = saved
    data = file.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:begin])
    name = "layer_1/linear/t.trits"
    flip(file, begin + header[name]["data_offsets"][1] - 1)
    shards.open_shards(folder)  # sizes and headers are as they were
    assert shards.verify(folder) == [f"{file}: {name}: damaged; copy the file again"]


def test_verify_compares_the_sum_of_the_whole_file(saved):
    folder, file, _ = saved
    sums = json.loads((folder / shards.CHECKSUMS).read_text())
    sums[file.name]["sha256"] = "0" * 64
    (folder / shards.CHECKSUMS).write_text(json.dumps(sums))
    (problem,) = shards.verify(folder)
    assert re.search(rf"{file}: sha256 is [0-9a-f]{{64}}, not 0000", problem)


@pytest.mark.parametrize("at", [0, 8, 30])
def test_a_damaged_header_is_seen_on_load(saved, at):
    folder, file, params = saved
    flip(file, at)
    with pytest.raises(CheckpointError, match=rf"{file}: the header is damaged; copy the file"):
        restore(folder, params)
    (problem,) = shards.verify(folder)
    assert "the header is damaged" in problem


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_seen_on_load(saved, change):
    folder, file, params = saved
    size = file.stat().st_size
    data = file.read_bytes() + b"x"
    file.write_bytes(data[: size + change])
    match = rf"{file}: {size + change} bytes, it should have {size}; copy it again"
    with pytest.raises(CheckpointError, match=match):
        restore(folder, params)
    assert re.search(match, shards.verify(folder)[0])


def test_a_missing_shard(saved):
    folder, file, params = saved
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file}: missing"):
        restore(folder, params)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (shards.INDEX, "{", r"index.json: not JSON.*copy it again"),
        (shards.CHECKSUMS, "[]", r"checksums.json: expected a JSON object"),
        (shards.CHECKSUMS, "{}", r"checksums.json does not know it"),
        (shards.INDEX, '{"weight_map": {"x": "FILE"}}', r"index.json: not as it was written"),
    ],
)
def test_damaged_small_files(saved, name, content, message):
    folder, file, params = saved
    (folder / name).write_text(content.replace("FILE", file.name))
    with pytest.raises(CheckpointError, match=message):
        restore(folder, params)


def small_files(folder):
    return [path for path in folder.iterdir() if path.suffix != ".safetensors"]


@pytest.mark.parametrize("name", [shards.CONFIG, shards.INDEX, "tokenizer.model"])
@pytest.mark.parametrize("change", ["flip", "remove", "replace"])
def test_every_file_is_compared(tmp_path, name, change):
    """On load and by verify: another rope_base, tokenizer or index is another model."""
    params = mixed()
    folder = save(tmp_path / "saved", params, extra={"tokenizer.model": b"pieces"})
    path = folder / name
    if change == "flip":
        flip(path, 3)
    elif change == "remove":
        path.unlink()
    else:
        path.write_text("{}")
    message = "missing; copy it again" if change == "remove" else ": (not |expected a weight_map)"
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        restore(folder, params)
    try:
        (problem,) = shards.verify(folder)
    except CheckpointError as error:  # of an index that cannot be read nothing more can be said
        problem = str(error)
    assert re.search(f"{path}.*{message}", problem)


def test_the_configuration_is_compared_before_it_is_used(saved):
    folder = saved[0]
    (folder / shards.CONFIG).write_text(json.dumps(CONFIG | {"rope_base": 10001}))
    with pytest.raises(CheckpointError, match="config.json: not as it was written"):
        checkpoint.read_config(folder)


def without_small_sums(folder):
    """As the first version left it."""
    path = folder / shards.CHECKSUMS
    sums = json.loads(path.read_text())
    path.write_text(json.dumps({n: s for n, s in sums.items() if n.endswith(".safetensors")}))


def test_a_checkpoint_without_sums_of_the_small_files(saved):
    folder, file, params = saved
    without_small_sums(folder)
    assert_same(restore(folder, params), jax.tree.map(jax.numpy.asarray, params))
    assert shards.verify(folder) == []
    assert shards.without_sums(folder) == [shards.CONFIG, shards.INDEX]
    index = json.loads((folder / shards.INDEX).read_text())
    del index["weight_map"]["layer_1/linear/f"]
    (folder / shards.INDEX).write_text(json.dumps(index))
    match = rf"{file}: {shards.INDEX} and its header differ in 'layer_1/linear/f'; copy both"
    with pytest.raises(CheckpointError, match=match):
        restore(folder, params)
    assert re.search(match, *shards.verify(folder))


def test_a_shard_that_the_index_does_not_list(tmp_path):
    folder = tmp_path / "out"
    write(folder)
    without_small_sums(folder)
    index = json.loads((folder / shards.INDEX).read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if "00002" not in file
    }
    (folder / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="00002-of-00003.*differ in 'layer/p2'"):
        shards.open_shards(folder)
    assert len(shards.verify(folder)) == 1


HEX = "0" * 64
SUMS = {"bytes": 1, "sha256": HEX, "header_crc32": "0" * 8, "tensor_crc32": {}}


@pytest.mark.parametrize(
    "name, content",
    [
        (shards.INDEX, {}),
        (shards.INDEX, {"weight_map": {}}),
        (shards.INDEX, {"weight_map": ["a"]}),
        (shards.INDEX, {"weight_map": {"a": None}}),
        (shards.INDEX, {"weight_map": {"a": "../other/model.safetensors"}}),
        (shards.INDEX, {"weight_map": {"a": "/etc/passwd"}}),
        (shards.INDEX, {"weight_map": {"a": ".."}}),
        (shards.INDEX, {"weight_map": {"a": "model\n.safetensors"}}),
        (shards.CHECKSUMS, {"../a": SUMS}),
        (shards.CHECKSUMS, {"a": None}),
        (shards.CHECKSUMS, {"a": [1]}),
        (shards.CHECKSUMS, {"a": {}}),
        (shards.CHECKSUMS, {"a": SUMS | {"bytes": "1"}}),
        (shards.CHECKSUMS, {"a": SUMS | {"bytes": True}}),
        (shards.CHECKSUMS, {"a": SUMS | {"sha256": 1}}),
        (shards.CHECKSUMS, {"a": SUMS | {"sha256": HEX[1:]}}),
        (shards.CHECKSUMS, {"a": SUMS | {"tensor_crc32": []}}),
        (shards.CHECKSUMS, {"a": SUMS | {"tensor_crc32": {"x": 1}}}),
        (shards.CHECKSUMS, {"a": {k: v for k, v in SUMS.items() if k != "header_crc32"}}),
        (shards.CHECKSUMS, {"a": SUMS | {"more": 1}}),
    ],
)
def test_small_files_that_say_something_else(saved, name, content):
    folder, _, params = saved
    without_small_sums(folder)
    (folder / name).write_text(json.dumps(content))
    for read in (shards.verify, lambda folder: restore(folder, params)):
        with pytest.raises(CheckpointError, match=f"{folder / name}: .*expected .*copy it again"):
            read(folder)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_at_once(saved, kind):
    folder, _, params = saved
    for path in list(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
        with pytest.raises(CheckpointError, match=f"{path}: a folder, pipe or device"):
            restore(folder, params)
        path.unlink() if kind == "pipe" else path.rmdir()
        path.write_bytes(content)


# --- Headers that somebody wrote ------------------------------------------------------------------

T, Q, F = (f"layer_1/linear/{name}" for name in ("t.trits", "q.weight", "f"))


def entry(name, **changes):
    return lambda header: header[name].update(changes)


def about(**changes):
    """Changes what __metadata__ says of layer_1/linear/t."""

    def change(header):
        metadata = header["__metadata__"]
        text = json.dumps(json.loads(metadata["layer_1/linear/t"]) | changes)
        metadata["layer_1/linear/t"] = text

    return change


def narrower(header):
    """One byte less to a row, as bytes that fit."""
    *rows, width = header[T]["shape"]
    start, _ = header[T]["data_offsets"]
    header[T] |= {"shape": [*rows, width - 1], "data_offsets": [start, start + 2 * 5 * (width - 1)]}


def shifted(name, first, last):
    def change(header):
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start + first, end + last]

    return change


def renamed(old, new):
    def change(header):
        header[new] = header.pop(old)

    return change


def first_to_the_place_of_the_second(header):
    """Two float32 arrays of one size in one place."""
    header["layer_0/linear/t.scales"]["data_offsets"] = header["layer_2/linear/f"]["data_offsets"]


@pytest.mark.parametrize(
    "change, message",
    [
        (narrower, "begins at byte|the tensors end at byte"),
        (entry(T, shape=[2, 5, 7]), r"data_offsets .* of U8 \[2, 5, 7\], which has 70 bytes"),
        (entry(T, shape=[8, 5, 2]), r"expected .*.trits uint8 \[2, 5, 8\], found .* \[8, 5, 2\]"),
        (entry(T, shape=[80]), r"expected .*.trits uint8 \[2, 5, 8\]"),
        (entry(T, dtype="I8"), "found .* .trits int8"),
        (entry(T, dtype="F64"), "dtype 'F64', expected one of"),
        (entry(T, dtype=["U8"]), r"dtype \['U8'\], expected one of"),
        (entry(T, dtype=None), "dtype None"),
        (entry(F, dtype="I8"), "which has 210 bytes"),
        (entry(Q, dtype="U8"), "expected .scales bfloat16.*found .*.weight uint8"),
        (entry(F, shape=[2, 21, 5.0]), "expected a list of up to 8 sizes, found"),
        (entry(F, shape=[2, True, 105]), "expected a list of up to 8 sizes, found"),
        (entry(F, shape=[-2, -21, 5]), "expected a list of up to 8 sizes, found"),
        (entry(F, shape="2"), "expected a list of up to 8 sizes, found '2'"),
        (entry(F, shape={}), "expected a list of up to 8 sizes"),
        (entry(F, shape=[1] * 9), "expected a list of up to 8 sizes"),
        (entry(F, shape=[0, 1 << 47, 1 << 47], data_offsets=[0, 0]), "begins at byte"),
        (entry(F, shape=[1 << 61]), "expected a list of up to 8 sizes"),
        (entry(F, data_offsets=None), "expected a list of up to 8 sizes"),
        (entry(F, data_offsets=[1]), "data_offsets"),
        (entry(F, data_offsets=[0, 420, 840]), "data_offsets"),
        (entry(F, data_offsets=[840, 0]), "data_offsets"),
        (entry(F, data_offsets=[-840, 0]), "sizes, found"),
        (entry(F, data_offsets=[0, 1 << 62]), "sizes, found"),
        (
            entry(F, data_offsets=[1 << 40, (1 << 40) + 840]),
            "'layer_1/linear/t.scales' begins at byte",
        ),
        (entry(F, more=1), "expected dtype, shape and data_offsets"),
        (shifted(F, 4, 4), "begins at byte"),
        (shifted(F, -4, -4), "begins at byte"),
        (first_to_the_place_of_the_second, "begins at byte"),
        (lambda h: h.update({F: None}), "expected dtype, shape and data_offsets, found None"),
        (lambda h: h.update({F: [1, 2]}), "expected dtype, shape"),
        (lambda h: h.pop(F), "begins at byte|the tensors end"),
        (lambda h: h.pop("__metadata__"), "expected __metadata__ with a format_version of"),
        (lambda h: h.update(__metadata__=[]), "expected __metadata__"),
        (lambda h: h["__metadata__"].pop("format_version"), "expected __metadata__"),
        (
            lambda h: h["__metadata__"].update(format_version="3"),
            "version of .*'2'",
        ),
        (lambda h: h["__metadata__"].pop("layer_1/linear/t"), "expected its shape in __meta"),
        (lambda h: h["__metadata__"].update({"layer_1/linear/t": 3}), "expected its shape"),
        (lambda h: h["__metadata__"].update({"layer_1/linear/t": "{"}), "linear/t: not JSON"),
        (lambda h: h["__metadata__"].update({"layer_1/linear/t": "[]"}), "expected a JSON object"),
        (about(shape=[2, 21, 6]), r"expected .*.trits uint8 \[2, 6, 8\]"),
        (about(shape=[1 << 40, 21, 5]), r"expected .* \[1099511627776, 1, 1\]"),
        (about(shape=[2, 21, 5, 1]), "expected the shape of matrices"),
        (about(shape=[0, 21, 5]), "expected the shape of matrices"),
        (about(shape=[105]), "expected the shape of matrices"),
        (about(shape=None), "sizes, found None"),
        (about(packing="base4"), "'base4' is none of \\['base3', '2bit'\\]"),
        (about(packing=["base3"]), "is none of"),
        (about(format="ternary3"), "'ternary3' is none of .*'ternary2-64'"),
        (about(format=["ternary"]), "is none of"),
        (about(block=3), "block 3, expected 1"),
        (about(block="1"), "block '1'"),
        (about(more=1), "expected its shape"),
        (renamed(T, "layer_1/linear/t.codes"), "'layer_1/linear/t.codes' is not the name"),
        (renamed(F, "../f"), "'../f' is not the name of a tensor"),
        (renamed(F, "layer_1/\x1b]0;f"), r"'layer_1/\\x1b\]0;f' is not the name"),
        (renamed(F, "layer_1/linear/t"), r"expected .*, found  ?float32 \[2, 21, 5\], .scales"),
        (renamed("layer_1/linear/t.scales", "x"), "expected .scales float32"),
        (renamed("layer_1/linear/q.scales", "x.scales"), "expected"),
    ],
)
def test_a_header_that_somebody_wrote(saved, change, message):
    """With sums that agree: only the header itself can tell."""
    folder, file, params = saved
    text, rest = split_header(file.read_bytes())
    header = json.loads(text)
    change(header)
    file.write_bytes(join_header(json.dumps(header).encode(), rest))
    mend_sums(folder)
    with pytest.raises(CheckpointError, match=f"^{file}: .*({message})") as error:
        restore(folder, params)
    assert len(str(error.value)) < 2000 and str(error.value).isprintable()
    assert shards.verify(folder) == [str(error.value)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda text, rest: b"", "header is damaged"),
        (lambda text, rest: b"1234567", "header is damaged"),
        (lambda text, rest: (1 << 63).to_bytes(8, "little") + text, "header is damaged"),
        (lambda text, rest: (len(text + rest) + 1).to_bytes(8, "little") + text + rest, "damaged"),
        (lambda text, rest: join_header(b"", rest), "not JSON"),
        (lambda text, rest: join_header(b"[]", rest), "expected a JSON object"),
        (lambda text, rest: join_header(b"\xff", rest), "not JSON"),
        (lambda text, rest: join_header(b"[" * 100_000, rest), "not JSON"),
        (lambda text, rest: join_header(b'{"a":' * 100_000, rest), "not JSON"),
        (lambda text, rest: join_header(b'{"a":' + b"1" * 5000 + b"}", rest), "not JSON"),
        (lambda text, rest: join_header(b'{"a": 1, "a": 1}', rest), "the key 'a' is there twice"),
    ],
)
def test_a_header_that_is_none(saved, make, message):
    folder, file, params = saved
    file.write_bytes(make(*split_header(file.read_bytes())))
    mend_sums(folder)
    with pytest.raises(CheckpointError, match=f"^{file}: .*{message}"):
        restore(folder, params)
    assert message in shards.verify(folder)[0]


def test_narrower_rows_of_trits_never_reach_the_kernels(tmp_path):
    """The rows of base3 that a kernel takes are as wide as the logical shape says; with a byte less
    it wrote past the end of its result. The file is whole and so are its sums."""
    params = {module: {"t": leaves["t"]} for module, leaves in mixed().items()}
    folder = save(tmp_path / "saved", params)
    (file,) = folder.glob("*.safetensors")
    text, rest = split_header(file.read_bytes())
    header, name = json.loads(text), "layer_3/linear/t.trits"
    start, end = header[name]["data_offsets"]
    assert end == len(rest)
    *rows, width = header[name]["shape"]
    header[name] |= {
        "shape": [*rows, width - 1],
        "data_offsets": [start, start + 8 * 9 * (width - 1)],
    }
    rest = rest[: start + 8 * 9 * (width - 1)]
    file.write_bytes(join_header(json.dumps(header).encode(), rest))
    mend_sums(folder)
    with pytest.raises(CheckpointError, match=r"expected .*trits uint8 \[8, 9, 16\], found.* 15\]"):
        restore(folder, params)


def test_sums_are_parsed_once_in_a_load(tmp_path, monkeypatch):
    params = mixed()
    folder = save(tmp_path / "saved", params)
    parsed, parse = [], files.parse_json
    monkeypatch.setattr(files, "parse_json", lambda text: parsed.append(text) or parse(text))
    checkpoint.read_config(folder)
    checkpoint.stored_precision(folder)
    restore(folder, params)
    content = (folder / shards.CHECKSUMS).read_bytes()
    assert parsed.count(content) == 1


# --- Numbers that no model has --------------------------------------------------------------------


@pytest.mark.parametrize("packing", shards.PACKINGS)
def test_bytes_that_are_no_trits(tmp_path, packing, monkeypatch):
    params = mixed()
    folder = save(tmp_path / "saved", params, packing)
    (file,) = folder.glob("*.safetensors")
    flip_to(file, "layer_1/linear/t.trits", 3, 0xFF)
    title = f"{file}: layer_1/linear/t: "
    if packing == "2bit":
        message = f"{title}packed bytes with codes of 3"
    else:  # `quantize` refuses them, without a file to name
        message = f"{title}a byte of 255"
        decode = shards.from_base3

        def strict(digits):
            if (digits > 242).any():
                raise ValueError(f"a byte of {digits.max()}")
            return decode(digits)

        monkeypatch.setattr(shards, "from_base3", strict)
    with pytest.raises(CheckpointError, match=message):
        restore(folder, params)
    if packing == "2bit":
        checkpoint.restore(folder, template(params), RULES, check=False)


def flip_to(file, name, at, value):
    """Sets bytes of a tensor; the sums of payloads are not compared on load."""
    text, rest = split_header(file.read_bytes())
    at += json.loads(text)[name]["data_offsets"][0]
    value = bytes([value]) if isinstance(value, int) else value
    file.write_bytes(join_header(text, rest[:at] + value + rest[at + len(value) :]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers(saved, value):
    folder, file, params = saved
    flip_to(file, "layer_1/linear/f", 4 * 200, np.float32(value).tobytes())
    with pytest.raises(CheckpointError, match=f"{file}: layer_1/linear/f: NaN or infinite"):
        restore(folder, params)
    found = checkpoint.restore(folder, template(params), RULES, check=False)
    assert not np.isfinite(found["layer_1/linear"]["f"]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
@pytest.mark.parametrize("name, dtype", [("t", np.float32), ("q", ml_dtypes.bfloat16)])
def test_scales_that_are_no_scales(saved, name, dtype, value):
    folder, file, params = saved
    flip_to(file, f"layer_1/linear/{name}.scales", 0, dtype(value).tobytes())
    with pytest.raises(CheckpointError, match=f"{file}: layer_1/linear/{name}: negative or non-"):
        restore(folder, params)


def test_other_parameters_than_the_model_has(saved):
    folder, _, params = saved
    with pytest.raises(
        CheckpointError, match=r"has 44 parameters.*has 45.*\n.*layer_9/linear/t is miss"
    ):
        restore(folder, params | {"layer_9/linear": {"t": matrix((4, 4))}})
    with pytest.raises(CheckpointError, match=r"belongs to no parameter"):
        restore(folder, dict(list(params.items())[:3]))


def test_another_shape_or_precision(saved):
    folder, _, params = saved
    wrong = params | {"layer_0/linear": params["layer_0/linear"] | {"t": matrix((3, 8))}}
    with pytest.raises(
        CheckpointError, match=r"ternary \[3, 8\].*found ternary \[3, 7\].*choose the"
    ):
        restore(folder, wrong)
    int8 = ((r"/(t|q)$", "int8"), (r"", "float32"))
    with pytest.raises(
        CheckpointError, match="is ternary in the file, which cannot become int8; leave the choice"
    ):
        checkpoint.restore(folder, template(params), int8)
    floats = ((r"/q$", "int8"), (r"", "float32"))
    with pytest.raises(
        CheckpointError,
        match="is ternary in the file, which cannot become float32; leave the choice",
    ):
        checkpoint.restore(folder, template(params), floats)


def test_a_newer_format_is_refused(tmp_path):
    about = checkpoint.quantization("ternary", RULES)
    about["quantization_config"]["format_version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"version 3, this code reads \(1, 2\); update it"):
        checkpoint.default_weights(tmp_path)


# --- Interruptions --------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def write(folder, stop=None, filled=None, **options):
    """Writes six parameters to three shards; raises in the middle of parameter `stop`."""
    leaves = {f"layer/p{i}": np.full((5, 4), i, np.float32) for i in range(6)}
    filled = [] if filled is None else filled

    def fill(path, out):
        filled.append(path)
        out[:2] = leaves[path][:2]
        if path == stop:
            raise Interrupted
        out[2:] = leaves[path][2:]

    options = {"shard_size": 160, "source": "here", "extra": {"notes": b"x"}} | options
    shards.write(folder, leaves, fill, {"a": 1}, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    write(folder)
    found = contents(folder)
    assert len(found) == 3 + 4
    return found


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_write_goes_on_after_the_last_shard(tmp_path, whole, stop):
    folder, filled, sealed = tmp_path / "out", [], []
    with pytest.raises(Interrupted):
        write(folder, f"layer/p{stop}")
    partial = shards.partial_folder(folder)
    assert not folder.exists()
    with pytest.raises(CheckpointError, match="was not finished; run the same convert.py again"):
        shards.open_shards(partial)
    write(folder, filled=filled, sealed=lambda shard: sealed.append(list(shard.leaves)))
    assert filled == [f"layer/p{i}" for i in range(stop // 2 * 2, 6)]
    assert sealed == [[f"layer/p{i}", f"layer/p{i + 1}"] for i in (0, 2, 4)]
    assert contents(folder) == whole
    assert not partial.exists()


def test_a_shard_without_its_sum_is_made_again(tmp_path, whole):
    """As if the process had been killed between the shard's last byte and its sum."""
    folder, filled = tmp_path / "out", []
    with pytest.raises(Interrupted):
        write(folder, "layer/p4")
    partial = shards.partial_folder(folder)
    sums = json.loads((partial / shards.CHECKSUMS).read_text())
    del sums["model-00002-of-00003.safetensors"]
    (partial / shards.CHECKSUMS).write_text(json.dumps(sums))
    (partial / "model-00001-of-00003.safetensors").unlink()
    write(folder, filled=filled)
    assert len(filled) == 6
    assert contents(folder) == whole


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "there"}, "begun with another source, 'here', not 'there'"),
        ({"shard_size": 400}, "begun with another weight_map"),
    ],
)
def test_going_on_with_something_else_is_an_error(tmp_path, options, message):
    with pytest.raises(Interrupted):
        write(tmp_path / "out", "layer/p3")
    with pytest.raises(CheckpointError, match=f"{message}.*same source and options, or remove it"):
        write(tmp_path / "out", **options)


@pytest.mark.parametrize("options", [{"source": "there"}, {"shard_size": 400}, {}])
def test_what_finished_no_shard_is_begun_again(tmp_path, options):
    """And nothing of the first attempt is left."""
    write(tmp_path / "whole", **options)
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        write(folder, "layer/p0", extra={"tokenizer.model": b"of the other source"})
    partial = shards.partial_folder(folder)
    assert {"tokenizer.model", shards.SOURCE} <= set(contents(partial))
    write(folder, **options)
    assert contents(folder) == contents(tmp_path / "whole")


def test_beginning_again_may_be_interrupted(tmp_path, whole, monkeypatch):
    folder, unlink = tmp_path / "out", Path.unlink
    with pytest.raises(Interrupted):
        write(folder, "layer/p0", source="there")
    count = len(contents(shards.partial_folder(folder)))
    for _ in range(count - 1):
        calls = []

        def once(path, calls=calls):
            if calls:
                raise Interrupted
            calls.append(path)
            unlink(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", once)
            with pytest.raises(Interrupted):
                write(folder)
    assert set(contents(shards.partial_folder(folder))) == {shards.SOURCE}
    write(folder)
    assert contents(folder) == whole


def test_all_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """After a power failure a folder that is there is whole, down to the small files."""
    synced, fsync = {}, os.fsync
    renamed = []

    def noted(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path.name] = path.read_bytes() if path.is_file() else b""
        fsync(descriptor)

    rename = Path.rename

    def checked(path, target):
        found = {name.removesuffix(".part"): content for name, content in synced.items()}
        renamed.append({n for n, content in contents(path).items() if found.get(n) != content})
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checked)
    write(tmp_path / "out")
    assert renamed == [set()]


def test_names_that_could_not_be_read_are_not_written(tmp_path):
    for name in ("a.b", "a/../b", "a b", ""):
        with pytest.raises(CheckpointError, match="is not the name of a tensor"):
            shards.write(tmp_path / "out", {name: np.zeros(3, np.float32)}, print, {})
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_not_overwritten(tmp_path, whole):
    folder = tmp_path / "out"
    write(folder)
    with pytest.raises(CheckpointError, match="exists; remove it, or choose another folder"):
        write(folder)
    assert contents(folder) == whole


def test_two_writers_of_one_folder(tmp_path):
    def second(path, out):
        with pytest.raises(CheckpointError, match="another process is writing it"):
            write(tmp_path / "out")
        raise Interrupted

    with pytest.raises(Interrupted):
        shards.write(tmp_path / "out", {"a": np.zeros(3, np.float32)}, second, {})


def test_a_full_disk_is_an_error_that_can_be_resumed(tmp_path, whole, monkeypatch):
    folder, allocate = tmp_path / "out", shards.os.posix_fallocate
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        allocate(*args)

    monkeypatch.setattr(shards.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write(folder)
    assert not folder.exists()
    write(folder)
    assert contents(folder) == whole


def test_the_sums_are_those_of_other_programs(tmp_path):
    import hashlib

    folder = tmp_path / "out"
    write(folder)
    noted = json.loads((folder / shards.CHECKSUMS).read_text())
    assert set(noted) == set(contents(folder)) - {shards.CHECKSUMS}
    for name, sums in noted.items():
        data = (folder / name).read_bytes()
        assert sums["sha256"] == hashlib.sha256(data).hexdigest()
        assert sums["bytes"] == len(data)
        if not name.endswith(".safetensors"):
            continue
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        assert sums["header_crc32"] == f"{zlib.crc32(data[:begin]):08x}"
        path = sorted(sums["tensor_crc32"])[0]
        assert sums["tensor_crc32"][path] == f"{zlib.crc32(data[begin : begin + 80]):08x}"


# --- On a mesh, and in the model ------------------------------------------------------------------
