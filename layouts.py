"""A converted checkpoint as it lies in the memory of one CPU: a file beside its shards, mapped.

Shards have rows of trits, five to a byte or four; a CPU wants 64 outputs side by side. So what is
loaded from shards is a copy, which takes time and is each process's own. `FILE` has that copy, each
array at a page of its own: mapping it reads nothing, all processes share its pages in the system's
cache, and those that memory has no room for are read from the disk again. `docs/format.md` says
what is in it. It is made from the shards, can be made again, and may be removed at any time.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

import files
import shards
from files import CheckpointError
from quantize import PackedWeight, QuantizedWeight
from tensor_file import release

FILE = "cpu.layout"
VERSION = 1
MAGIC = b"TGLAYOUT"
START = struct.Struct("<8sQQ")  # MAGIC, bytes of the header, its CRC-32
PAGE = 4096  # bytes; arrays begin at multiples
PIECE = 1 << 24  # bytes that are written, or summed, at a time
NO_SUM = "0" * 8

DTYPES = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in (np.float32, ml_dtypes.bfloat16, np.int8, np.uint8)
}
CRC = re.compile(r"[0-9a-f]{8}", re.ASCII)


def path_of(folder: str | os.PathLike) -> Path:
    return Path(folder) / FILE


# --- What is in it --------------------------------------------------------------------------------


def form_of(leaf) -> dict:
    """What a weight is in memory, for JSON: its type, and dtypes and shapes of its arrays."""
    weight = isinstance(leaf, QuantizedWeight | PackedWeight)
    form: dict[str, Any] = {"type": type(leaf).__name__ if weight else "array"}
    if isinstance(leaf, PackedWeight):
        form |= {name: getattr(leaf, name) for name in ("block", "padding", "interleaved")}
    arrays = jax.tree.leaves(leaf)
    return form | {"arrays": [[np.dtype(x.dtype).name, list(x.shape)] for x in arrays]}


@dataclasses.dataclass(frozen=True)
class Header:
    """The head of a layout file.

    source: of the shards it was made from, by `source_of`
    size: bytes of the file
    forms: {path: `form_of` its weight}
    places: {path: (offset, CRC-32) of each array}
    """

    source: str
    size: int
    forms: dict[str, dict]
    places: dict[str, list[tuple[int, str]]]

    def content(self) -> bytes:
        """The first bytes of the file; sums do not change their number."""
        about = {"version": VERSION, "source": self.source, "bytes": self.size}
        parameters = {
            path: form | {"places": self.places[path]} for path, form in self.forms.items()
        }
        text = json.dumps(about | {"parameters": parameters}, separators=(",", ":")).encode()
        return START.pack(MAGIC, len(text), zlib.crc32(text)) + text


def plan(source: str, leaves: dict[str, Any]) -> Header:
    """The header of a file for weights {path: leaf}, in abstract form; sums are still zeros."""
    forms = {path: form_of(leaf) for path, leaf in leaves.items()}

    def placed(begin: int) -> Header:
        places, end = {}, begin
        for path, form in forms.items():
            places[path] = []
            for array in form["arrays"]:
                places[path].append((end, NO_SUM))
                end = _next_page(end + _bytes(*array))
        return Header(source, end, forms, places)

    begin = 0
    while (
        needed := _next_page(len(placed(begin).content()))
    ) > begin:  # longer numbers, longer text
        begin = needed
    return placed(begin)


def _bytes(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _next_page(at: int) -> int:
    return -(-at // PAGE) * PAGE


def source_of(folder: str | os.PathLike) -> str:
    """What tells the shards of a checkpoint from others: the SHA-256 of their sums."""
    sums = shards.read_checksums(Path(folder)).items()
    found = sorted((name, noted["sha256"]) for name, noted in sums if "tensor_crc32" in noted)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


# --- Reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout file that is mapped."""

    path: Path
    header: Header
    data: mmap.mmap

    def leaf(self, path: str, form) -> Any:
        """The weight of this name, its arrays those of the mapped file; None if there is none of
        this form, an abstract weight."""
        found = self.header.forms.get(path)
        if found != form_of(form):
            return None
        arrays = [
            self._array(offset, *array)
            for (offset, _), array in zip(self.header.places[path], found["arrays"], strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(form), arrays)

    def _array(self, offset: int, dtype: str, shape: list[int]) -> np.ndarray:
        return np.ndarray(shape, DTYPES[dtype], self.data, offset)


def open_layout(folder: str | os.PathLike) -> Layout | None:
    """Maps the layout file of a checkpoint; None if it has none.

    Reads and checks the header only: whether the numbers are what was written, `verify` tells.
    Raises CheckpointError for a file that is damaged, or was made from other shards.
    """
    path = path_of(folder)
    if not path.exists():
        return None
    with files.open_file(path) as file:
        try:
            with files.naming(path):
                header = _read_header(file, os.fstat(file.fileno()).st_size)
                if header.source != source_of(folder):
                    raise CheckpointError("was made from other shards than those beside it")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; make it again with convert.py {folder} --layout cpu, or remove it"
            ) from None
        return Layout(path, header, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_header(file, size: int) -> Header:
    start = file.read(START.size)
    if len(start) < START.size or not start.startswith(MAGIC):
        raise CheckpointError("is no layout file")
    _, length, crc = START.unpack(start)
    text = file.read(min(length, files.MAX_JSON + 1))
    if len(text) != length or zlib.crc32(text) != crc:
        raise CheckpointError("the header is damaged")
    about = files.parse_json(text)
    if about.get("version") != VERSION:
        raise CheckpointError(f"version {files.shown(about.get('version'))}, not {VERSION}")
    if about.keys() != {"version", "source", "bytes", "parameters"}:
        raise CheckpointError(f"the header has {files.shown(sorted(about))}")
    if about["bytes"] != size:
        raise CheckpointError(f"{size} bytes, it should have {files.shown(about['bytes'])}")
    if not isinstance(about["parameters"], dict):
        raise CheckpointError(f"parameters {files.shown(about['parameters'])}")
    forms, places, end = {}, {}, len(start) + length
    for name, form in about["parameters"].items():
        with files.naming(files.shown(name)):
            if not isinstance(form, dict):
                raise CheckpointError(f"expected an object, found {files.shown(form)}")
            places[name], end = _parse_places(form, end, size)
        forms[name] = form
    return Header(about["source"], size, forms, places)


def _parse_places(form: dict, end: int, size: int) -> tuple[list[tuple[int, str]], int]:
    """Takes the places of a parameter's arrays out of what the header says of it; and their end.

    end: of what comes before; they lie behind it, one after the other, within `size` bytes
    """
    arrays, places = form.get("arrays"), form.pop("places", None)
    if not (isinstance(arrays, list) and isinstance(places, list) and len(arrays) == len(places)):
        raise CheckpointError(f"arrays {files.shown(arrays)} at {files.shown(places)}")
    found = []
    for array, place in zip(arrays, places, strict=True):
        match array, place:
            case [str(dtype), list(shape)], [int(offset), str(crc)] if (
                dtype in DTYPES
                and len(shape) <= shards.MAX_AXES
                and all(type(n) is int and 0 <= n < shards.MAX_SIZE for n in shape)
                and offset % PAGE == 0
                and end <= offset <= offset + _bytes(dtype, shape) <= size
                and CRC.fullmatch(crc)
            ):
                end = offset + _bytes(dtype, shape)
                found.append((offset, crc))
            case _:
                raise CheckpointError(f"an array {files.shown(array)} at {files.shown(place)}")
    return found, end


def verify(
    folder: str | os.PathLike, progress: Callable[[int], None] = lambda count: None
) -> list[str]:
    """What is wrong with the layout file of a checkpoint, if it has one; reads all of it.

    progress: called with the number of bytes read since the last call, from several threads
    """
    try:
        layout = open_layout(folder)
    except CheckpointError as error:
        return [str(error)]
    if layout is None:
        return []

    def damaged(path):
        form, view = layout.header.forms[path], memoryview(layout.data)
        crcs = []
        for (offset, _), array in zip(layout.header.places[path], form["arrays"], strict=True):
            crc = 0
            for piece in shards.slices(offset, offset + _bytes(*array), PIECE):
                crc = zlib.crc32(view[piece], crc)
                progress(piece.stop - piece.start)
            crcs.append(f"{crc:08x}")
        release(layout.data)
        return crcs != [crc for _, crc in layout.header.places[path]]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = zip(layout.header.forms, pool.map(damaged, layout.header.forms), strict=True)
        return [
            f"{layout.path}: {path}: damaged; make the file again with convert.py {folder} "
            "--layout cpu, or remove it"
            for path, wrong in found
            if wrong
        ]


# --- Writing --------------------------------------------------------------------------------------


def write(
    folder: str | os.PathLike,
    leaves: dict[str, Any],
    make: Callable[[str], Any],
    progress: Callable[[int], None] = lambda count: None,
) -> Path:
    """Writes the layout file of a converted checkpoint, whole or not at all; replaces one.

    leaves: abstract, {path: leaf}, as they lie in memory
    make: gives the arrays of a path's weight
    progress: called with the number of bytes written since the last call
    """
    target, header = path_of(folder), plan(source_of(folder), leaves)
    places = {}
    with files.lock(Path(folder)), files.replacing(target) as part, open(part, "wb", 0) as file:
        with files.filling(part):
            os.posix_fallocate(file.fileno(), 0, header.size)
        for path, leaf in leaves.items():
            made = make(path)
            assert form_of(made) == header.forms[path], (path, form_of(made), form_of(leaf))
            places[path] = []
            for array, (offset, _) in zip(jax.tree.leaves(made), header.places[path], strict=True):
                crc = _write_array(file, offset, np.asarray(array), progress)
                places[path].append((offset, crc))
        with files.filling(part):
            os.pwrite(file.fileno(), dataclasses.replace(header, places=places).content(), 0)
    return target


def _write_array(file, offset: int, array: np.ndarray, progress) -> str:
    """Writes an array at an offset of a file; its CRC-32."""
    view, crc = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)), 0
    with files.filling(Path(file.name)):
        for piece in shards.slices(0, len(view), PIECE):
            crc = zlib.crc32(view[piece], crc)
            file.seek(offset + piece.start)
            file.write(view[piece])
            progress(piece.stop - piece.start)
    return f"{crc:08x}"
