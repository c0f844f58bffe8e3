"""The converted checkpoint: safetensors shards that are written once, checked, and read by slices.

`docs/format.md` says what is in the files. A parameter "module/name" is stored in the form of

    float32 array            module/name
    QuantizedWeight8bit      module/name.weight, module/name.scales
    StoredTrits              module/name.trits, module/name.scales

Shards are filled in place, through memory maps, so that none is ever in memory as a whole; the
`safetensors` library, which reads them too, can only write what is.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import mmap
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

import files
import quantize
from files import CheckpointError
from quantize import QuantizedWeight1_58bit, QuantizedWeight8bit
from tensor_file import release

VERSION = 1  # of the format; also in config.json
INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"
SOURCE = "source.json"  # in an unfinished folder: what it is made from
PACKINGS = ("base3", "2bit")
SHARD_SIZE = 2_000_000_000  # bytes; a parameter is never split, so one shard may be larger
PIECE = 1 << 20  # bytes that a thread takes at a time
READ = 1 << 24  # bytes that are summed at a time

DTYPES = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}


@dataclasses.dataclass(frozen=True)
class StoredTrits:
    """A ternary weight as it is stored; arrays may be `ShapeDtypeStruct`s, to plan.

    trits: uint8 [..., O, bytes]
    scales: float32 [..., 1, 1]
    shape: logical, (..., I, O)
    packing: "2bit", bytes as in `QuantizedWeight1_58bit`, or "base3", by `quantize.to_base3`
    block: as in `QuantizedWeight1_58bit`
    """

    trits: Any
    scales: Any
    shape: tuple[int, ...]
    packing: str
    block: int

    @property
    def matrices(self) -> np.ndarray:
        """The trits, with an axis of experts in any case: uint8 [E, O, bytes]."""
        return self.trits.reshape(-1, *self.trits.shape[-2:])


def stored_form(weight: QuantizedWeight1_58bit, packing: str) -> StoredTrits:
    """The abstract StoredTrits of a ternary weight, of which only the shapes matter."""
    *lead, outputs, width = weight.packed.shape
    stored = -(-width // 5) * 4 if packing == "base3" else width
    return StoredTrits(
        jax.ShapeDtypeStruct((*lead, outputs, stored), np.uint8),
        jax.ShapeDtypeStruct((*lead, 1, 1), np.float32),
        weight.shape,
        packing,
        weight.block,
    )


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover start to stop."""
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


# --- Trits ----------------------------------------------------------------------------------------


def store_trits(packed: np.ndarray, out: np.ndarray, packing: str, run=map) -> None:
    """Writes packed bytes [O, B] of one matrix to `out`, uint8 [O, bytes].

    run: `map`, or that of a pool of threads
    """

    def convert(rows):
        out[rows] = quantize.to_base3(packed[rows]) if packing == "base3" else packed[rows]

    for _ in run(convert, slices(0, len(packed), max(1, PIECE // max(1, packed.shape[1])))):
        pass


def load_trits(stored: StoredTrits, index: Sequence[slice], out: np.ndarray, run=map) -> None:
    """Reads packed bytes `[..., O, B][index]` into `out`, from no more of the file than needed.

    run: `map`, or that of a pool of threads
    """
    trits = stored.matrices
    experts, outputs, width = index if len(index) == 3 else (slice(0, 1), *index)
    out = out.reshape(-1, *out.shape[-2:])

    def convert(at):
        expert, rows = at
        here = slice(rows.start - outputs.start, rows.stop - outputs.start)
        if stored.packing == "2bit":
            piece = trits[expert, rows, width]
        else:  # whole groups: four bytes are five
            first = width.start // 5
            digits = trits[expert, rows, 4 * first : -(-width.stop // 5) * 4]
            piece = quantize.from_base3(digits)[:, width.start - 5 * first :]
            piece = piece[:, : width.stop - width.start]
        out[expert - experts.start, here] = piece

    rows = max(1, PIECE // max(1, width.stop - width.start))
    pieces = [
        (expert, piece)
        for expert in range(experts.start, experts.stop)
        for piece in slices(outputs.start, outputs.stop, rows)
    ]
    for _ in run(convert, pieces):
        pass


# --- Shards ---------------------------------------------------------------------------------------


def parts(path: str, leaf) -> dict[str, Any]:
    """The tensors, by their names in the shard, that a parameter is stored as."""
    if isinstance(leaf, QuantizedWeight8bit):
        return {f"{path}.weight": leaf.weight, f"{path}.scales": leaf.scales}
    if isinstance(leaf, StoredTrits):
        return {f"{path}.trits": leaf.trits, f"{path}.scales": leaf.scales}
    return {path: leaf}


def stored_bytes(leaf) -> int:
    """Bytes of a parameter's tensors."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in parts("", leaf).values())


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write: its name, and what it holds in abstract form, {path: leaf}."""

    name: str
    leaves: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Any]:
        """Its tensors in the order of the file: that of the parameters, larger dtypes first, so
        that each is aligned."""
        named = [item for path, leaf in self.leaves.items() for item in parts(path, leaf).items()]
        return dict(sorted(named, key=lambda item: -np.dtype(item[1].dtype).itemsize))

    def header(self) -> bytes:
        """The first bytes of the file, a multiple of 8: a length, and JSON of that length."""
        codes = {dtype: code for code, dtype in DTYPES.items()}
        entries: dict[str, Any] = {"__metadata__": {"format_version": str(VERSION)}}
        for path, leaf in self.leaves.items():
            if isinstance(leaf, StoredTrits):
                about = {"shape": leaf.shape, "packing": leaf.packing, "block": leaf.block}
                entries["__metadata__"][path] = json.dumps(about)
        end = 0
        for name, x in self.tensors.items():
            dtype = np.dtype(x.dtype)
            start, end = end, end + math.prod(x.shape) * dtype.itemsize
            entries[name] = {
                "dtype": codes[dtype],
                "shape": list(x.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header()) + sum(map(stored_bytes, self.leaves.values()))


def plan(leaves: dict[str, Any], shard_size: int = SHARD_SIZE) -> list[Shard]:
    """Abstract leaves, in order, dealt out to as many shards as they need."""
    groups: list[dict[str, Any]] = []
    room = 0
    for path, leaf in leaves.items():
        needed = stored_bytes(leaf)
        if not groups or needed > room:
            groups.append({})
            room = shard_size
        groups[-1][path] = leaf
        room -= needed
    return [
        Shard(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups)
    ]


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A shard's memory-mapped file: its tensors, {path: leaf}, and where each of them lies."""

    data: mmap.mmap
    leaves: dict[str, Any]
    offsets: dict[str, tuple[int, int]]  # name: start and end in the file


def _map(file, write: bool = False) -> _Mapped:
    access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
    data = mmap.mmap(file.fileno(), 0, access=access)
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:begin])
    metadata = entries.pop("__metadata__")
    arrays, offsets = {}, {}
    for name, entry in entries.items():
        start, end = (begin + offset for offset in entry["data_offsets"])
        dtype = DTYPES[entry["dtype"]]
        arrays[name] = np.ndarray(entry["shape"], dtype, memoryview(data)[start:end])
        offsets[name] = (start, end)
    leaves: dict[str, Any] = {}
    for name, array in arrays.items():
        path, _, part = name.partition(".")
        if not part:
            leaves[path] = array
        elif part == "weight":
            leaves[path] = QuantizedWeight8bit(array, arrays[f"{path}.scales"])
        elif part == "trits":
            about = json.loads(metadata[path])
            leaves[path] = StoredTrits(
                array,
                arrays[f"{path}.scales"],
                tuple(about["shape"]),
                about["packing"],
                about["block"],
            )
    return _Mapped(data, leaves, offsets)


# --- Writing --------------------------------------------------------------------------------------


def partial_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Where a checkpoint is until it is complete."""
    folder = pathlib.Path(folder)
    return folder.with_name(f"{folder.name}.incomplete")


def write(
    folder: str | os.PathLike,
    leaves: dict[str, Any],
    fill: Callable[[str, Any], None],
    config: dict,
    extra: dict[str, bytes] | None = None,
    *,
    source: str = "",
    shard_size: int = SHARD_SIZE,
    sealed: Callable[[Shard], None] = lambda shard: None,
) -> None:
    """Writes a checkpoint, or goes on where an earlier call with the same arguments was stopped.

    All is written to `partial_folder(folder)`, which takes the folder's name once it is complete:
    a folder that is there is whole. A shard counts when its checksums are noted; then it is not
    made again.

    leaves: abstract, {path: leaf}, in the order of the files
    fill: called with a path and its leaf, whose arrays, in the file, it is to set
    config: for config.json
    extra: more files, {name: content}, such as the tokenizer
    source: what it is made from; an unfinished folder made from something else is an error
    sealed: called for each shard once it is safe, also for those of an earlier call
    """
    folder, partial = pathlib.Path(folder), partial_folder(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists; remove it, or choose another folder")
    partial.mkdir(parents=True, exist_ok=True)
    with files.lock(partial):
        shards = plan(leaves, shard_size)
        names = {name: shard.name for shard in shards for name in shard.tensors}
        total = sum(map(stored_bytes, leaves.values()))
        index = {"metadata": {"total_size": total}, "weight_map": names}
        _note(partial / SOURCE, {"source": source})
        _note(partial / "config.json", config)
        _note(partial / INDEX, index)
        for name, content in (extra or {}).items():
            files.write_bytes(partial / name, content)
        _write_shards(partial, shards, fill, sealed)
        (partial / SOURCE).unlink()
        partial.rename(folder)
        files.sync(folder.parent)


def _write_shards(partial, shards, fill, sealed) -> None:
    sums = read_checksums(partial)
    for shard in shards:
        path = partial / shard.name
        if path.exists() and sums.get(shard.name, {}).get("bytes") != path.stat().st_size:
            sums.pop(shard.name, None)

    def seal(shard, part):
        """Sums a filled shard while the next one is filled."""
        sums[shard.name] = _checksums(part)
        os.replace(part, partial / shard.name)
        files.sync(partial)
        files.write_json(partial / CHECKSUMS, sums)
        sealed(shard)

    with concurrent.futures.ThreadPoolExecutor(1) as background:
        pending = None
        for shard in shards:
            if shard.name in sums and (partial / shard.name).exists():
                sealed(shard)
                continue
            part = partial / f"{shard.name}.part"
            _fill_shard(part, shard, fill)
            if pending:
                pending.result()
            pending = background.submit(seal, shard, part)
        if pending:
            pending.result()


def _fill_shard(part: pathlib.Path, shard: Shard, fill) -> None:
    header = shard.header()
    with open(part, "w+b") as file:
        # Writing through a map when the disk is full would end the process; this raises OSError.
        os.posix_fallocate(file.fileno(), 0, shard.size)
        file.write(header)
        file.flush()
        mapped = _map(file, write=True)
        for path in shard.leaves:
            fill(path, mapped.leaves[path])
            release(mapped.data)
        mapped.data.flush()
        os.fsync(file.fileno())


def _checksums(path: pathlib.Path, progress=lambda count: None) -> dict:
    """Size and sums of a shard; crc32 of the header and of every tensor, to find what is damaged.

    Raises CheckpointError if the header cannot be read.
    """
    with open(path, "rb") as file:
        try:
            mapped = _map(file)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise CheckpointError(f"{path}: the header is damaged: {error}") from None
    begin = min((start for start, _ in mapped.offsets.values()), default=len(mapped.data))
    ranges = {"": (0, begin)} | dict(sorted(mapped.offsets.items(), key=lambda item: item[1]))
    sha256, crcs, view = hashlib.sha256(), {}, memoryview(mapped.data)
    for name, (start, end) in ranges.items():
        crc = 0
        for piece in slices(start, end, READ):
            sha256.update(view[piece])
            crc = zlib.crc32(view[piece], crc)
            release(mapped.data)
            progress(piece.stop - piece.start)
        crcs[name] = f"{crc:08x}"
    header = crcs.pop("")
    return {
        "bytes": len(mapped.data),
        "sha256": sha256.hexdigest(),
        "header_crc32": header,
        "tensor_crc32": crcs,
    }


def _note(path: pathlib.Path, content: dict) -> None:
    """Writes JSON, or checks that what an earlier call wrote is the same."""
    content = json.loads(json.dumps(content))  # tuples are lists in JSON
    if path.exists() and files.read_json(path) != content:
        old, new = files.read_json(path), content
        differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        key = differing[0]
        raise CheckpointError(
            f"{path.parent} was begun with another {key}, {old.get(key)!r:.200}, not "
            f"{new.get(key)!r:.200}; finish it with the same source and options, or remove it"
        )
    files.write_json(path, content)


# --- Reading --------------------------------------------------------------------------------------


def exists(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a converted checkpoint, whole or not."""
    return (pathlib.Path(folder) / INDEX).exists()


def read_checksums(folder: pathlib.Path) -> dict:
    """{file: sums} of the finished shards."""
    path = folder / CHECKSUMS
    return files.read_json(path) if path.exists() else {}


def open_shards(folder: str | os.PathLike) -> dict[str, tuple[pathlib.Path, Any]]:
    """{path: (file, leaf)} of all parameters, the arrays memory-mapped.

    Reads and checks sizes and headers only. Raises CheckpointError for a shard that is missing, of
    another size than noted, or whose header is damaged.
    """
    folder = pathlib.Path(folder)
    found = {}
    for file, (names, noted) in _listed(folder).items():
        path = folder / file
        mapped = _open_shard(path, noted)
        if mapped.offsets.keys() != names:
            other = sorted(mapped.offsets.keys() ^ names)[0]
            raise CheckpointError(
                f"{path}: {INDEX} and its header differ in {other}; copy both again"
            )
        found |= {key: (path, leaf) for key, leaf in mapped.leaves.items()}
    return found


def _listed(folder: pathlib.Path) -> dict[str, tuple[set[str], dict | None]]:
    """{file: (names of its tensors, its sums)}; CheckpointError if it is not complete."""
    if (folder / SOURCE).exists():
        raise CheckpointError(
            f"{folder}: the conversion was not finished; run the same convert.py again, it goes on "
            "after the last shard"
        )
    index, sums = files.read_json(folder / INDEX), read_checksums(folder)
    names: dict[str, set[str]] = {}
    for name, file in index.get("weight_map", {}).items():
        names.setdefault(file, set()).add(name)
    return {file: (names[file], sums.get(file)) for file in sorted(names)}


def _open_shard(path: pathlib.Path, noted: dict | None) -> _Mapped:
    if noted is None:
        raise CheckpointError(f"{path}: {CHECKSUMS} does not know it; copy {CHECKSUMS} again")
    if not path.exists():
        raise CheckpointError(f"{path}: missing; copy it again")
    size = path.stat().st_size
    if size != noted["bytes"]:
        raise CheckpointError(
            f"{path}: {size} bytes, it should have {noted['bytes']}; copy it again"
        )
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0]
        if length > size or f"{zlib.crc32(start + file.read(length)):08x}" != noted["header_crc32"]:
            raise CheckpointError(f"{path}: the header is damaged; copy the file again")
        return _map(file)


def verify(folder: str | os.PathLike, progress=lambda count: None) -> list[str]:
    """What is wrong with the files of a checkpoint, by file and tensor; reads all of it.

    progress: called with the number of bytes read since the last call
    Raises CheckpointError where `open_shards` does for the index and the sums.
    """
    problems = []
    for file, (_, noted) in _listed(pathlib.Path(folder)).items():
        path = pathlib.Path(folder) / file
        try:
            _open_shard(path, noted)
            found = _checksums(path, progress)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        damaged = [
            name
            for name, crc in noted["tensor_crc32"].items()
            if found["tensor_crc32"].get(name) != crc
        ]
        problems += [f"{path}: {name}: damaged; copy the file again" for name in damaged]
        if found["sha256"] != noted["sha256"] and not damaged:
            problems.append(f"{path}: sha256 is {found['sha256']}, not {noted['sha256']}")
    return problems
