"""The converted checkpoint: safetensors shards that are written once, checked, and read by slices.

`docs/format.md` says what is in the files. A parameter "module/name" is stored in the form of

    float32 array      module/name
    QuantizedWeight    module/name.weight, module/name.scales
    PackedWeight       module/name.trits, module/name.scales, some with module/name.multipliers

and is read and written as that type, whose arrays are then those of the mapped file.

Shards are filled in place, through memory maps, so that none is ever in memory as a whole; the
`safetensors` library, which reads them too, can only write what is.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

import files
import formats
import kernels
from files import CheckpointError
from quantize import PackedWeight, QuantizedWeight
from tensor_file import release

VERSION = 2  # of what is written; also in config.json
READ_VERSIONS = (1, 2)  # 1 has no weights but float32, int8 and absmean ternary ones
INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"
CONFIG = "config.json"
SOURCE = "source.json"  # in an unfinished folder: what it is made from
PACKINGS = ("base3", "2bit")
SHARD_SIZE = 2_000_000_000  # bytes; a parameter is never split, so one shard may be larger
PIECE = 1 << 20  # bytes that a thread takes at a time
READ = 1 << 24  # bytes that are summed at a time

PARTS = {  # what the arrays of a weight are called in the files
    QuantizedWeight: (".weight", ".scales"),
    PackedWeight: (".trits", ".scales", ".multipliers"),
}
NAME = re.compile(  # of a tensor
    r"([\w~-]+(?:/[\w~-]+)*)(|\.weight|\.trits|\.scales|\.multipliers)", re.ASCII
)
FILE = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # of a checkpoint, in its folder and nowhere else
MAX_NAME = 200
MAX_AXES = 8
MAX_SIZE = 1 << 48  # of an axis, or of a file

CODE_OF_3 = "packed bytes with codes of 3, which no trit has"

DTYPES = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover start to stop."""
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


# --- Trits ----------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stored"],
    meta_fields=["width", "packing", "format", "check"],
)
@dataclasses.dataclass(frozen=True)
class StoredTrits:
    """The array `PackedWeight.packed` as it is stored: uint8 [..., O, B], read and set by slices.

    stored: uint8 [..., O, bytes], mapped; a `ShapeDtypeStruct`, to plan
    width: B
    packing: "2bit", bytes as in memory, or "base3", by `to_base3`
    format: of the weight, a name of formats.FORMATS
    check: whether reading looks for codes of 3 in "2bit"; "base3" bytes above 242 are refused in
      any case
    """

    stored: Any
    width: int
    packing: str
    format: str
    check: bool = True

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., O, B]."""
        return (*self.stored.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Packed bytes, from no more of the file than needed; an index for each axis.

        Raises ValueError for bytes that are no trits: each way to multiply would take them
        otherwise.
        """
        *rows, columns = index
        start, stop, _ = columns.indices(self.width)
        if self.packing == "2bit":
            packed = self.stored[(*rows, columns)]
            if self.check and (packed & packed >> 1 & 0b01_01_01_01).any():
                raise ValueError(CODE_OF_3)
            return packed
        first = start // 5  # whole groups: four bytes are five
        packed = from_base3(self.stored[(*rows, slice(4 * first, -(-stop // 5) * 4))])
        return packed[..., start - 5 * first : stop - 5 * first]

    def read(self, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Sets `out` to the bytes of an index, as `out[...] = self[index]`, at once with checking
        them where C++ can: apart, it takes nearly as long as copying."""
        fused = self.check and self.packing == "2bit" and kernels.library() is not None
        packed = self.stored[index] if fused else out
        if not (fused and packed.flags.c_contiguous and out.flags.c_contiguous):
            out[...] = self[index]
        elif kernels.copy_trits(packed, out):
            raise ValueError(CODE_OF_3)

    def __setitem__(self, index: tuple[slice, ...], packed: np.ndarray) -> None:
        """Stores whole rows of bytes; the index is of the axes before them."""
        self.stored[index] = to_base3(packed) if self.packing == "base3" else packed


def is_trits(x) -> bool:
    """For `jax.tree`, to which they are a leaf where they are read or set as one array."""
    return isinstance(x, StoredTrits)


def stored_form(format: str, shape: tuple[int, ...], packing: str) -> PackedWeight:
    """A packed weight of logical shape [..., I, O] as it is stored, in abstract form."""
    weight = formats.shapes(format, shape)
    *lead, width = weight.packed.shape
    size = -(-width // 5) * 4 if packing == "base3" else width
    stored = jax.ShapeDtypeStruct((*lead, size), np.uint8)
    return dataclasses.replace(weight, packed=StoredTrits(stored, width, packing, format))


def to_base3(packed: np.ndarray) -> np.ndarray:
    """Packed bytes [..., B] at five trits to a byte: uint8 [..., 4 ceil(B / 5)], 0 to 242.

    Of every five bytes, the last gives one of its trits to each of the others: their own four are
    the low digits of a number in base 3, that one is its highest. Zeros (trits) fill up B. Codes
    are 0 to 2; one of 3 would become other trits.

    >>> to_base3(np.array([0b10_00_10_01, 0, 0b10_10_10_10, 0, 0b01_00_10_00], np.uint8))
    array([ 61, 162,  80,  81], dtype=uint8)
    """
    if kernels.library() is not None:
        return kernels.to_base3(packed)
    *lead, width = packed.shape
    fives = np.full((*lead, -(-width // 5) * 5), 0b01_01_01_01, np.uint8)
    fives[..., :width] = packed
    p = _first_fours(fives).copy().view(np.uint8)
    # Worth 1, 4, 16 and 64 in a packed byte, its trits become worth 1, 3, 9 and 27.
    digits = p - (p >> np.uint8(2))
    digits -= np.uint8(3) * (p >> np.uint8(4))
    digits -= np.uint8(9) * (p >> np.uint8(6))
    fifth = fives.reshape(-1)[4::5].astype("<u4")
    fifth = (fifth | fifth << 6 | fifth << 12 | fifth << 18) & 0x03030303  # a trit to each byte
    digits += np.uint8(81) * fifth.view(np.uint8)
    return digits.reshape(*lead, -(-width // 5) * 4)


def from_base3(digits: np.ndarray) -> np.ndarray:
    """The packed bytes [..., 5 G] that `to_base3` turned into digits uint8 [..., 4 G].

    Raises ValueError for other arrays, and for a byte above 242: five trits make none.
    """
    if kernels.library() is not None:
        return kernels.from_base3(digits)
    kernels.check_bytes(digits)
    kernels.check_digit(digits.max(initial=0))
    digits = np.ascontiguousarray(digits)
    *lead, width = digits.shape
    d = digits.reshape(-1)
    # With its quotients by 3, 9 and so on added, the trits of d are worth 1, 4, 16, 64 and 256:
    # the fifth leaves the byte by itself. (Multiplied, for NumPy shifts bytes left slowly.)
    fifth = d // np.uint8(81)
    p = np.uint8(4) * fifth + d // np.uint8(27)
    p = np.uint8(4) * p + d // np.uint8(9)
    p = np.uint8(4) * p + d // np.uint8(3) + d
    packed = np.empty((*lead, width // 4 * 5), np.uint8)
    _first_fours(packed)[...] = p.view("<u4")
    # The highest byte of the product: fifth[0] + 4 fifth[1] + 16 fifth[2] + 64 fifth[3].
    gathered = fifth.view("<u4") * np.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    packed.reshape(-1)[4::5] = gathered.view(np.uint8)[3::4]
    return packed


def _first_fours(fives: np.ndarray) -> np.ndarray:
    """A view of the first four of every five bytes, as one uint32 each."""
    return np.ndarray(fives.size // 5, "<u4", fives, strides=5)


# --- Shards ---------------------------------------------------------------------------------------


def parts(path: str, leaf) -> dict[str, Any]:
    """The tensors, by their names in the shard, that a parameter is stored as."""
    names = PARTS.get(type(leaf), ("",))
    return {path + name: array for name, array in zip(names, jax.tree.leaves(leaf), strict=False)}


def stored_bytes(leaf) -> int:
    """Bytes of a parameter's tensors."""
    return sum(map(_bytes, parts("", leaf).values()))


def _bytes(tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


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
            if isinstance(leaf, PackedWeight):
                trits = leaf.packed
                about = {"shape": leaf.shape, "format": trits.format, "packing": trits.packing}
                entries["__metadata__"][path] = json.dumps(about | {"block": leaf.block})
        end = 0
        for name, x in self.tensors.items():
            start, end = end, end + _bytes(x)
            entries[name] = {
                "dtype": codes[np.dtype(x.dtype)],
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


def plan(
    leaves: dict[str, Any], shard_size: int = SHARD_SIZE, begins: Collection[str] = ()
) -> list[Shard]:
    """Abstract leaves, in order, dealt out to as many shards as they need.

    begins: paths of parameters that begin a shard in any case
    """
    groups: list[dict[str, Any]] = []
    room = 0
    for path, leaf in leaves.items():
        needed = stored_bytes(leaf)
        if not groups or needed > room or path in begins:
            groups.append({})
            room = shard_size
        groups[-1][path] = leaf
        room -= needed
    return [
        Shard(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups)
    ]


# --- The header of a shard ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Header:
    """What a shard holds, in abstract form, {path: leaf}, and where its tensors lie."""

    leaves: dict[str, Any]
    offsets: dict[str, tuple[int, int]]  # name: start and end in the file, ascending


def parse_header(content: bytes, size: int) -> Header:
    """Reads, and checks every word of, the first bytes of a shard: a length, and as much JSON.

    size: bytes of the file
    Raises CheckpointError unless its tensors make up whole parameters, each in one of the three
    forms, with the bytes that their shapes and dtypes need, and fill the file without a gap.
    """
    entries = files.parse_json(content[8:])
    metadata = entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        with files.naming(files.shown(name)):
            tensors[name] = _parse_tensor(entry)
    offsets, end = {}, len(content)
    for name, (_, start, stop) in sorted(tensors.items(), key=lambda item: item[1][1:]):
        start, stop = len(content) + start, len(content) + stop
        if start != end:
            raise CheckpointError(
                f"{files.shown(name)} begins at byte {start}, the one before ends at {end}"
            )
        offsets[name], end = (start, stop), stop
    if end != size:
        raise CheckpointError(f"the tensors end at byte {end}, the file at {size}")
    return Header(_leaves({name: form for name, (form, *_) in tensors.items()}, metadata), offsets)


def _parse_tensor(entry: Any) -> tuple[jax.ShapeDtypeStruct, int, int]:
    """Shape and dtype of a tensor, and the start and end of its bytes after the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"expected dtype, shape and data_offsets, found {files.shown(entry)}")
    if entry["dtype"] not in list(DTYPES):  # a list, for what is no string may have no hash
        raise CheckpointError(f"dtype {files.shown(entry['dtype'])}, expected one of {[*DTYPES]}")
    form = jax.ShapeDtypeStruct(_parse_sizes(entry["shape"]), DTYPES[entry["dtype"]])
    offsets = _parse_sizes(entry["data_offsets"])
    if len(offsets) != 2 or offsets[1] - offsets[0] != _bytes(form):
        raise CheckpointError(
            f"data_offsets {list(offsets)} of {entry['dtype']} {list(form.shape)}, which has "
            f"{_bytes(form)} bytes"
        )
    return form, *offsets


def _parse_sizes(value: Any) -> tuple[int, ...]:
    if not (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(type(n) is int and 0 <= n < MAX_SIZE for n in value)
    ):
        raise CheckpointError(
            f"expected a list of up to {MAX_AXES} sizes, found {files.shown(value)}"
        )
    return tuple(value)


def _leaves(tensors: dict[str, jax.ShapeDtypeStruct], metadata: Any) -> dict[str, Any]:
    """The abstract parameters, {path: leaf}, that the tensors of a shard make up."""
    versions = [str(version) for version in READ_VERSIONS]
    if not isinstance(metadata, dict) or metadata.get("format_version") not in versions:
        raise CheckpointError(
            f"expected __metadata__ with a format_version of {versions}, found "
            f"{files.shown(metadata)}"
        )
    groups: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, form in tensors.items():
        match = NAME.fullmatch(name)
        if not match or len(name) > MAX_NAME:
            raise CheckpointError(f"{files.shown(name)} is not the name of a tensor")
        groups.setdefault(match[1], {})[match[2]] = form
    leaves = {}
    for path, found in groups.items():
        with files.naming(path):
            leaves[path] = _leaf(found, metadata.get(path))
    return leaves


def _leaf(found: dict[str, jax.ShapeDtypeStruct], about: Any) -> Any:
    """The abstract parameter that tensors make up, here by the ends of their names.

    about: what `__metadata__` says of a ternary one
    """
    if ".trits" in found:
        leaf = _parse_trits(about)
    elif ".weight" in found:
        *lead, inputs, outputs = _matrix(found[".weight"].shape)
        scales = found.get(".scales", found[".weight"]).shape
        groups = math.gcd(inputs, scales[-2]) if len(scales) > 1 else 1  # a divisor of `inputs`
        leaf = QuantizedWeight(
            jax.ShapeDtypeStruct((*lead, inputs, outputs), np.int8),
            jax.ShapeDtypeStruct((*lead, groups, outputs), ml_dtypes.bfloat16),
        )
    else:
        leaf = jax.ShapeDtypeStruct(next(iter(found.values())).shape, np.float32)
    expected = parts("", leaf)
    if found != expected:
        found, expected = (
            ", ".join(f"{name} {x.dtype} {list(x.shape)}".strip() for name, x in sorted(t.items()))
            for t in (found, expected)
        )
        raise CheckpointError(f"expected {expected}, found {found}")
    return leaf


def _parse_trits(text: Any) -> PackedWeight:
    about = files.parse_json(text) if isinstance(text, str) else {}
    about = {"format": "ternary"} | about  # which version 1 does not say
    if about.keys() != {"shape", "format", "packing", "block"}:
        raise CheckpointError(f"expected its shape in __metadata__, found {files.shown(text)}")
    shape, format = _matrix(_parse_sizes(about["shape"])), about["format"]
    packed = [name for name, known in formats.FORMATS.items() if known.packed]
    for value, known in ((about["packing"], [*PACKINGS]), (format, packed)):
        if value not in known:
            raise CheckpointError(f"{files.shown(value)} is none of {known}; update this code")
    try:
        leaf = stored_form(format, shape, about["packing"])
    except ValueError as error:
        raise CheckpointError(f"{format} {list(shape)}: {error}") from None
    if about["block"] != leaf.block:
        raise CheckpointError(f"block {files.shown(about['block'])}, expected {leaf.block}")
    return leaf


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) not in (2, 3) or 0 in shape:
        raise CheckpointError(f"expected the shape of matrices, found {list(shape)}")
    return shape


# --- Mapped shards --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A shard's memory-mapped file: its tensors, {path: leaf}, and where each of them lies."""

    data: mmap.mmap
    leaves: dict[str, Any]
    offsets: dict[str, tuple[int, int]]


def _map(file, content: bytes, write: bool = False) -> _Mapped:
    """content: the header of the file; CheckpointError if `parse_header` finds fault with it."""
    header = parse_header(content, os.fstat(file.fileno()).st_size)
    access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
    data = mmap.mmap(file.fileno(), 0, access=access)

    def array(name, form):
        start, end = header.offsets[name]
        return np.ndarray(form.shape, form.dtype, memoryview(data)[start:end])

    leaves = {}
    for path, leaf in header.leaves.items():
        arrays = [array(name, form) for name, form in parts(path, leaf).items()]
        leaves[path] = jax.tree.unflatten(jax.tree.structure(leaf), arrays)
    return _Mapped(data, leaves, header.offsets)


# --- Writing --------------------------------------------------------------------------------------


def partial_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Where a checkpoint is until it is complete."""
    folder = pathlib.Path(folder)
    return folder.parent / f"{folder.name}.incomplete"


def write(
    folder: str | os.PathLike,
    leaves: dict[str, Any],
    fill: Callable[[str, Any], None],
    config: dict,
    extra: dict[str, bytes | Callable[[], bytes]] | None = None,
    *,
    source: str = "",
    shard_size: int = SHARD_SIZE,
    begins: Collection[str] = (),
    sealed: Callable[[Shard], None] = lambda shard: None,
) -> None:
    """Writes a checkpoint, or goes on where an earlier call with the same arguments was stopped.

    All is written to `partial_folder(folder)`, which takes the folder's name once it is complete:
    a folder that is there is whole. A shard counts when its checksums are noted; then it is not
    made again.

    leaves: abstract, {path: leaf}, in the order of the files
    fill: called with a path and its leaf, whose arrays, in the file, it is to set
    config: for config.json
    extra: more files, {name: content}, such as the tokenizer; a function is called when all
      shards are safe
    source: what it is made from; an unfinished folder made from something else is an error
    begins: as in `plan`
    sealed: called for each shard once it is safe, also for those of an earlier call
    """
    folder, partial = pathlib.Path(folder), partial_folder(folder)
    extra = extra or {}
    if folder.exists():
        raise CheckpointError(f"{folder} exists; remove it, or choose another folder")
    shards = plan(leaves, shard_size, begins)
    for shard in shards:  # what could not be read is not written
        parse_header(shard.header(), shard.size)
    names = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(map(stored_bytes, leaves.values()))
    index = {"metadata": {"total_size": total}, "weight_map": names}
    partial.mkdir(parents=True, exist_ok=True)
    with files.lock(partial):
        finished = _finished_shards(partial)
        if not finished:
            _begin_again(partial)
        _note(partial / SOURCE, {"source": source})
        _note(partial / CONFIG, config)
        _note(partial / INDEX, index)
        last = {name: content for name, content in extra.items() if callable(content)}
        first = {name: content for name, content in extra.items() if name not in last}
        for name, content in first.items():
            files.write_bytes(partial / name, content)
        sums = finished | {name: _sums(partial / name) for name in (CONFIG, INDEX, *first)}
        _write_shards(partial, shards, sums, fill, sealed)
        for name, content in last.items():
            files.write_bytes(partial / name, content())
            sums[name] = _sums(partial / name)
        _note_sums(partial, sums)
        (partial / SOURCE).unlink()
        files.sync(partial)
        partial.rename(folder)
        files.sync(folder.parent)


def _finished_shards(partial: pathlib.Path) -> dict[str, dict]:
    """{file: sums} of the shards of an unfinished folder that need not be made again."""

    def is_whole(path, sums):
        return path.exists() and path.stat().st_size == sums["bytes"]

    noted = read_checksums(partial).items()
    return {
        name: sums
        for name, sums in noted
        if "tensor_crc32" in sums and is_whole(partial / name, sums)
    }


def _begin_again(partial: pathlib.Path) -> None:
    """Removes what an earlier call left that finished no shard: it need not have been the same."""
    if (partial / SOURCE).exists():  # it goes last, for it says that the others are ours
        for path in sorted(partial.iterdir(), key=lambda path: path.name == SOURCE):
            path.unlink()


def _write_shards(partial, shards, sums, fill, sealed) -> None:
    """sums: of the files that are finished, {name: sums}; those of the others are added"""

    def seal(shard, part):
        """Sums a filled shard while the next one is filled."""
        with open(part, "rb") as file:
            sums[shard.name] = _shard_sums(_map(file, shard.header()))
        os.replace(part, partial / shard.name)
        files.sync(partial)
        _note_sums(partial, sums)
        sealed(shard)

    with concurrent.futures.ThreadPoolExecutor(1) as background:
        pending = None
        for shard in shards:
            if shard.name in sums:
                sealed(shard)
                continue
            part = partial / f"{shard.name}.part"
            _fill_shard(part, shard, fill)
            if pending:
                pending.result()
            pending = background.submit(seal, shard, part)
        if pending:
            pending.result()


def rewrite(folder: pathlib.Path, name: str, content: bytes) -> None:
    """Another content for a small file of a complete checkpoint, which keeps its sums right."""
    sums = read_checksums(folder)
    files.write_bytes(folder / name, content)
    _note_sums(folder, sums | {name: _sums(folder / name)})


def _note_sums(partial: pathlib.Path, sums: dict[str, dict]) -> None:
    files.write_json(partial / CHECKSUMS, dict(sorted(sums.items())))


def _fill_shard(part: pathlib.Path, shard: Shard, fill) -> None:
    header = shard.header()
    with open(part, "w+b") as file:
        # Writing through a map when the disk is full would end the process; this raises OSError.
        with files.filling(part):
            os.posix_fallocate(file.fileno(), 0, shard.size)
            file.write(header)
            file.flush()
        mapped = _map(file, header, write=True)
        for path in shard.leaves:
            fill(path, mapped.leaves[path])
            release(mapped.data)
        mapped.data.flush()
        os.fsync(file.fileno())


def _sums(path: pathlib.Path) -> dict:
    """Size and sum of a file that is no shard."""
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _shard_sums(mapped: _Mapped, progress=lambda count: None) -> dict:
    """Size and sums of a shard; those of the header and the tensors tell what is damaged."""
    begin = min((start for start, _ in mapped.offsets.values()), default=len(mapped.data))
    sha256, crcs, view = hashlib.sha256(), {}, memoryview(mapped.data)
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        for name, (start, end) in {"": (0, begin), **mapped.offsets}.items():
            crc = 0
            for piece in slices(start, end, READ):
                summed = beside.submit(zlib.crc32, view[piece], crc)
                sha256.update(view[piece])
                crc = summed.result()
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
    if path.exists() and (text := difference(files.read_json(path), content)):
        raise CheckpointError(
            f"{path.parent} was begun with another {text}; finish it with the same source and "
            "options, or remove it"
        )
    files.write_json(path, content)


def difference(old: dict, new: dict) -> str | None:
    """The first entry in which two JSON objects differ: "key.key, value, not value"."""
    new = json.loads(json.dumps(new))  # tuples are lists in JSON
    for key in [*new, *sorted(old.keys() - new.keys())]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := difference(a, b):
                return f"{key:.200}.{inner}"
        elif a != b:
            return f"{key:.200}, {files.shown(a)}, not {files.shown(b)}"
    return None


# --- The other files ------------------------------------------------------------------------------


def exists(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a converted checkpoint, whole or not."""
    return any((pathlib.Path(folder) / name).exists() for name in (INDEX, CHECKSUMS))


def read_index(folder: pathlib.Path) -> dict[str, set[str]]:
    """{shard: names of its tensors}; CheckpointError if `INDEX` lists none, or other than that."""
    path = folder / INDEX
    names = files.read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path}: expected a weight_map of all tensors; copy it again")
    found: dict[str, set[str]] = {}
    for name, file in names.items():
        if not (isinstance(file, str) and FILE.fullmatch(file)):
            raise CheckpointError(
                f"{path}: {files.shown(name)} is in {files.shown(file)}, expected the name of a "
                "file in this folder; copy it again"
            )
        found.setdefault(file, set()).add(name)
    return found


def read_checksums(folder: pathlib.Path) -> dict[str, dict]:
    """{file: sums} of the finished files; earlier checkpoints have them of the shards alone."""
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    with files.open_file(path) as file, files.naming(path):
        return dict(_parse_checksums(file.read(files.MAX_JSON + 1)))


@functools.lru_cache(maxsize=1)  # one load asks several times
def _parse_checksums(content: bytes) -> dict[str, dict]:
    found = files.parse_json(content)
    for name, sums in found.items():
        if not (FILE.fullmatch(name) and _are_sums(sums)):
            raise CheckpointError(
                f"{files.shown(name)} has {files.shown(sums)}, expected a file of this folder and "
                "its sums; copy it again"
            )
    return found


def _are_sums(sums: Any) -> bool:
    """Whether these are as `_sums` or `_shard_sums` make them."""

    def is_hex(text, digits):
        return isinstance(text, str) and bool(re.fullmatch(rf"[0-9a-f]{{{digits}}}", text))

    if not (
        isinstance(sums, dict) and type(sums.get("bytes")) is int and is_hex(sums.get("sha256"), 64)
    ):
        return False
    crcs = sums.get("tensor_crc32")
    of_shard = isinstance(crcs, dict) and all(is_hex(crc, 8) for crc in crcs.values())
    if of_shard and is_hex(sums.get("header_crc32"), 8):
        return len(sums) == 4
    return len(sums) == 2


def check_file(folder: pathlib.Path, name: str) -> None:
    """CheckpointError for a file that is no shard, if it has sums and they are others."""
    noted = read_checksums(folder).get(name)
    if noted is not None:
        _check_sums(folder / name, noted)


def _check_sums(path: pathlib.Path, noted: dict) -> None:
    with files.open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size != noted["bytes"] or files.sha256(path) != noted["sha256"]:
        raise CheckpointError(
            f"{path}: not as it was written; copy it again, or, if you changed it, remove its "
            f"entry from {CHECKSUMS}"
        )


# --- Reading --------------------------------------------------------------------------------------


def open_shards(folder: str | os.PathLike) -> dict[str, tuple[pathlib.Path, Any]]:
    """{path: (file, leaf)} of all parameters, the arrays memory-mapped.

    Compares the small files with their sums; of the shards, reads and checks sizes and headers
    only. Raises CheckpointError for a file that is missing, of another size than noted, or damaged.
    A shard that is cut short while it is mapped ends the process (SIGBUS), as with any mapped file:
    replace a file by renaming another one, as all that is written here is.
    """
    folder = pathlib.Path(folder)
    shards, others = _listed(folder)
    for name, noted in others.items():
        _check_sums(folder / name, noted)
    found = {}
    for name, (tensors, noted) in shards.items():
        mapped = _open_shard(folder / name, tensors, noted)
        found |= {path: (folder / name, leaf) for path, leaf in mapped.leaves.items()}
    return found


def _listed(folder: pathlib.Path) -> tuple[dict[str, tuple[set[str], dict | None]], dict]:
    """{shard: (names of its tensors, its sums)}, and {file: sums} of the other files.

    CheckpointError if the checkpoint is not complete.
    """
    if (folder / SOURCE).exists():
        raise CheckpointError(
            f"{folder}: the conversion was not finished; run the same convert.py again, it goes on "
            "after the last shard"
        )
    index, sums = read_index(folder), read_checksums(folder)
    others = {name: noted for name, noted in sums.items() if "tensor_crc32" not in noted}
    names = sorted(index.keys() | sums.keys() - others.keys())
    return {name: (index.get(name, set()), sums.get(name)) for name in names}, others


def _open_shard(path: pathlib.Path, names: set[str], noted: dict | None) -> _Mapped:
    """names: of its tensors, noted: its sums; CheckpointError unless size and header fit them."""
    if noted is None or "header_crc32" not in noted:
        raise CheckpointError(f"{path}: {CHECKSUMS} does not know it; copy {CHECKSUMS} again")
    with files.open_file(path) as file, files.naming(path):
        size = os.fstat(file.fileno()).st_size
        if size != noted["bytes"]:
            raise CheckpointError(f"{size} bytes, it should have {noted['bytes']}; copy it again")
        header = _read_header(file, size)
        if f"{zlib.crc32(header):08x}" != noted["header_crc32"]:
            raise CheckpointError("the header is damaged; copy the file again")
        mapped = _map(file, header)
        if other := sorted(mapped.offsets.keys() ^ names):
            raise CheckpointError(
                f"{INDEX} and its header differ in {files.shown(other[0])}; copy both again"
            )
        return mapped


def _read_header(file, size: int) -> bytes:
    """The first bytes of a shard: the length of the rest, and the rest."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, files.MAX_JSON):
        raise CheckpointError("the header is damaged; copy the file again")
    return start + file.read(length)


def verify(folder: str | os.PathLike, progress=lambda count: None) -> list[str]:
    """What is wrong with the files of a checkpoint, by file and tensor; reads all of it.

    progress: called with the number of bytes read since the last call, from several threads
    Raises CheckpointError where `open_shards` does for the index and the sums.
    """
    folder = pathlib.Path(folder)
    shards, others = _listed(folder)
    problems = []
    for name, noted in others.items():
        try:
            _check_sums(folder / name, noted)
        except CheckpointError as error:
            problems.append(str(error))
        progress(noted["bytes"])

    def of_shard(item):
        name, (tensors, noted) = item
        try:
            mapped = _open_shard(folder / name, tensors, noted)
            return _differing(folder / name, noted, _shard_sums(mapped, progress))
        except CheckpointError as error:
            return [str(error)]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(of_shard, shards.items()), problems)


def _differing(path: pathlib.Path, noted: dict, found: dict) -> list[str]:
    """What is wrong with a shard, by its sums."""
    damaged = [
        f"{path}: {name}: damaged; copy the file again"
        for name, crc in found["tensor_crc32"].items()
        if noted["tensor_crc32"].get(name) != crc
    ]
    if found["sha256"] != noted["sha256"] and not damaged:
        return [f"{path}: sha256 is {found['sha256']}, not {noted['sha256']}; copy it again"]
    return damaged


def without_sums(folder: str | os.PathLike) -> list[str]:
    """The files beside the shards that `verify` cannot compare: earlier versions noted no sums."""
    sums = read_checksums(pathlib.Path(folder))
    names = {path.name for path in pathlib.Path(folder).iterdir()}
    return sorted(names - sums.keys() - {CHECKSUMS})
