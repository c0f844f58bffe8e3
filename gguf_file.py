"""GGUF files, those of llama.cpp: weights as their bytes and back, written in pieces, and read.

A file is, little-endian: "GGUF", its version, the numbers of tensors and of keys; each key, its
type and its value; each tensor's name, sizes (inputs first), type and place; then the data of the
tensors, each at a multiple of 32 bytes. Matrices are [outputs, inputs], transposes of Grok-1's.

    F32, F16, BF16   numbers
    Q8_0     for each 32 inputs: a scale in float16 and 32 int8
    TQ2_0    for each 256 inputs: 64 bytes of four trits each, then a scale in float16. Byte j of
             each 32 has the weights j, j + 32, j + 64 and j + 96 of its 128, the first lowest
    TQ1_0    for each 256 inputs: 52 bytes of five trits each, the last four of four, and a scale.
             A byte is the fraction 0.abcde in base 3, times 256 and rounded up. Of the first 32
             the weights lie 32 apart, of the next 16 by 16, of the last four by four
    Q2_0     for each 64 inputs: a scale in float16, then 16 bytes of four trits that are neighbours
    Q4_0     for each 32 inputs: a scale in float16, then 16 bytes of two trits each: j and j + 16
    IQ2_BN   for each output: a scale in float32, then all its inputs, four trits to a byte: of each
             64 the weights j, j + 16, j + 32 and j + 48. ik_llama.cpp's, which alone reads it

Integers and trits carry over as they are, and a scale of more inputs than a block is repeated; it
is rounded to the type's float, and nothing else is.
"""

import concurrent.futures
import functools
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tqdm

import conversion
import files
import quantize
from files import CheckpointError
from quantize import PackedWeight, QuantizedWeight

ALIGNMENT = 32
CURE = "copy or download the file again"
TILE = 1 << 22  # weights that a thread encodes at a time
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class Blocks(NamedTuple):
    """How a type holds integers and their scales.

    block: inputs that share a scale, or None for all of an output; bits: of a code, which is stored
    with `zero` added; apart: how many inputs lie between those of one byte; scale: its type;
    before: whether it comes before the codes. TQ1_0 has its own way with codes
    """

    block: int | None
    bits: int
    zero: int
    apart: int
    scale: np.dtype = FLOATS["F16"]
    before: bool = True

    @property
    def inputs(self) -> int:
        """What the number of inputs must be a multiple of."""
        return self.block or self.apart * 8 // self.bits

    def bytes(self, inputs: int) -> int:
        """Of the codes of so many inputs."""
        return inputs * self.bits // 8 if self.bits else inputs // 256 * 52


TERNARY = {
    "TQ2_0": Blocks(256, 2, 1, 32, before=False),
    "TQ1_0": Blocks(256, 0, 1, 0, before=False),
    "Q2_0": Blocks(64, 2, 1, 1),
    "Q4_0": Blocks(32, 4, 8, 16),
    "IQ2_BN": Blocks(None, 2, 1, 16, FLOATS["F32"]),
}
BLOCKS = TERNARY | {"Q8_0": Blocks(32, 8, 0, 1)}
BASE_3 = ((0, 5, 32), (160, 5, 16), (240, 4, 4))  # of TQ1_0: first input, digits, inputs between

# The numbers of types, of tensors and of whole files.
NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35}
NUMBERS |= {"Q2_0": 42, "IQ2_BN": 135}
FILE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37, "Q2_0": 41}


def row_bytes(kind: str, inputs: int) -> int:
    """Bytes of so many inputs of one output."""
    if kind in FLOATS:
        return FLOATS[kind].itemsize * inputs
    form = BLOCKS[kind]
    return form.bytes(inputs) + inputs // (form.block or inputs) * form.scale.itemsize


# --- Weights to bytes -----------------------------------------------------------------------------


def encode(w: quantize.Weight, kind: str) -> tuple[np.ndarray, float]:
    """The bytes of a matrix [I, O] in NumPy, uint8 [O, bytes], and the largest relative error that
    rounding made in a scale.

    Floats as Q8_0 are rounded to it. Raises ValueError for numbers that the type cannot hold.
    """
    if kind in FLOATS:
        with np.errstate(over="ignore"):
            floats = quantize.dequantize(w).T.astype(FLOATS[kind], order="C")
        if not np.isfinite(floats).all():
            raise ValueError(f"it has numbers that are too large for {kind}; take F32")
        return floats.view(np.uint8), 0.0
    form = BLOCKS[kind]
    codes, scales = integers(w, kind)
    blocks = codes.shape[-1] // (form.block or codes.shape[-1])
    scales = scales.repeat(blocks // scales.shape[-1], axis=-1)
    rounded, error = _round_scales(scales, form.scale)
    data = _to_bytes(codes.reshape(-1, codes.shape[-1] // blocks), form)
    data = data.reshape(len(codes), blocks, -1)
    rounded = rounded[..., None].view(np.uint8)
    parts = (rounded, data) if form.before else (data, rounded)
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1), error


def integers(w: quantize.Weight, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [I, O] as codes, int8 [O, I], and the scales of groups of inputs, float32 [O, G]."""
    if not isinstance(w, PackedWeight | QuantizedWeight):
        blocks = np.ascontiguousarray(w.T, np.float32).reshape(w.shape[1], -1, BLOCKS[kind].block)
        scales = np.abs(blocks).max(axis=-1) / np.float32(127)
        codes = np.round(blocks / np.maximum(scales, 1e-30)[..., None]).astype(np.int8)
        return codes.reshape(w.shape[::-1]), scales
    scales = w.scales.T.astype(np.float32)  # [1 or O, G]
    if kind == "Q8_0" or w.multipliers is None:
        codes = quantize.codes_of(w)
    else:
        codes, scales = quantize.trits_of(w)[0], scales * w.multipliers[..., 0]
    return np.ascontiguousarray(codes.T), np.broadcast_to(scales, (w.shape[1], scales.shape[1]))


def _round_scales(scales: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, float]:
    with np.errstate(over="ignore"):
        rounded = scales.astype(dtype)
    if not np.isfinite(rounded).all():
        raise ValueError(f"it has the scale {scales.max():.3g}, too large for float16; take F32")
    error = np.abs(rounded.astype(np.float32) - scales) / np.maximum(scales, 1e-30)
    return rounded, float(error.max(initial=0))


def _to_bytes(codes: np.ndarray, form: Blocks) -> np.ndarray:  # int8 [blocks, n] -> uint8 [bytes]
    codes = (codes + np.int8(form.zero)).view(np.uint8)
    if form.bits:
        each = 8 // form.bits  # codes in a byte
        codes = codes.reshape(-1, each, form.apart)
        found = codes[:, 0].copy()
        for i in range(1, each):
            found |= codes[:, i] << np.uint8(i * form.bits)
        return found
    parts = []
    for start, count, apart in BASE_3:
        digits = codes[:, start : start + count * apart].reshape(len(codes), count, apart)
        number = np.zeros((len(codes), apart), np.uint16)
        for i in range(5):
            number *= np.uint16(3)
            number += digits[:, i] if i < count else 0
        parts.append((number * np.uint16(256) + np.uint16(242)) // np.uint16(243))
    return np.concatenate(parts, axis=-1).astype(np.uint8)


def decode(data: np.ndarray, kind: str, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """What `encode` made of codes: uint8 [O, bytes] as int8 [O, I], and scales float32 [O, G]."""
    form = BLOCKS[kind]
    blocks = inputs // (form.block or inputs)
    data = data.reshape(len(data), blocks, -1)
    at = [form.scale.itemsize] if form.before else [data.shape[-1] - form.scale.itemsize]
    parts = np.split(data, at, axis=-1)
    scales, stored = parts if form.before else parts[::-1]
    scales = np.ascontiguousarray(scales).view(form.scale)[..., 0].astype(np.float32)
    codes = _from_bytes(stored.reshape(len(data) * blocks, -1), form)
    return codes.reshape(len(data), inputs), scales


def _from_bytes(data: np.ndarray, form: Blocks) -> np.ndarray:  # uint8 [blocks, bytes] -> int8
    if form.bits:
        shift = np.arange(0, 8, form.bits, dtype=np.uint8)[:, None]
        codes = data.reshape(-1, 1, form.apart) >> shift
        codes &= np.uint8((1 << form.bits) - 1)
    else:
        parts, at = [], 0
        for _, count, apart in BASE_3:
            byte = data[:, None, at : at + apart]
            rest = byte * np.uint8(3) ** np.arange(count, dtype=np.uint8)[:, None]  # fractions
            parts.append((rest.astype(np.uint16) * 3 >> 8).reshape(len(data), -1))
            at += apart
        codes = np.concatenate(parts, axis=-1).astype(np.uint8)
    return codes.view(np.int8) - np.int8(form.zero)


# --- Writing --------------------------------------------------------------------------------------

# Numbers of the types of values.
BYTE, INTEGER, SIGNED, FLOAT, BOOL, TEXT, LIST = 0, 4, 5, 6, 7, 8, 9


class Tensor(NamedTuple):
    """A tensor to write: its type, its shape as in the file, rows first, and where it comes from.

    experts: gives, for each matrix of the tensor, a function of a slice of outputs, whose result is
    that part of the matrix in memory, [I, o]; threads call it
    """

    kind: str
    shape: tuple[int, ...]
    experts: Callable[[], Iterator[Callable[[slice], quantize.Weight]]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


def header_of(keys: dict, tensors: dict[str, Tensor]) -> bytes:
    """All that comes before the data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    header += b"".join(_string(key) + _value(value) for key, value in keys.items())
    place = 0
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", NUMBERS[tensor.kind], place)
        place += _aligned(tensor.bytes)
    return header.ljust(_aligned(len(header)), b"\0")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: str | bytes | bool | int | float | list) -> bytes:
    """The number of the type, string, bool, uint32, float32 or an array, and the value."""
    if isinstance(value, bytes):
        return struct.pack("<IIQ", LIST, BYTE, len(value)) + value
    if isinstance(value, list):
        if isinstance(value[0], str):
            content = struct.pack("<IQ", TEXT, len(value)) + b"".join(map(_string, value))
        else:
            kind, dtype = (FLOAT, "<f4") if isinstance(value[0], float) else (SIGNED, "<i4")
            content = struct.pack("<IQ", kind, len(value)) + np.array(value, dtype).tobytes()
        return struct.pack("<I", LIST) + content
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", INTEGER, value)
    return struct.pack("<If", FLOAT, value)


def size_of(keys: dict, tensors: dict[str, Tensor]) -> int:
    """Bytes of the file."""
    return len(header_of(keys, tensors)) + sum(_aligned(t.bytes) for t in tensors.values())


def write(
    path: Path,
    keys: dict,
    tensors: dict[str, Tensor],
    threads: int | None = None,
    progress: bool = False,
) -> float:
    """A new GGUF file of keys, each a str, bytes, bool, int, float or a list, and tensors.

    It is written under another name, each tensor in pieces, and gets its own at the end; after an
    error there is none. Gives the largest relative error that rounding made in a scale. Raises
    FileExistsError where there is one, OSError without room, CheckpointError for a tensor whose
    numbers its type cannot hold.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it, or choose another name")
    header, errors = header_of(keys, tensors), [0.0]
    total = sum(tensor.bytes for tensor in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        files.replacing(path) as part,
        open(part, "wb") as file,
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        with files.filling(path):
            os.posix_fallocate(file.fileno(), 0, size_of(keys, tensors))
            os.pwrite(file.fileno(), header, 0)
        place = len(header)
        for i, (name, tensor) in enumerate(tensors.items()):
            bar.set_description(f"tensor {i + 1}/{len(tensors)}", refresh=False)
            for piece, error in _fill(file.fileno(), place, path, name, tensor, pool):
                errors.append(error)
                bar.update(piece)
            place += _aligned(tensor.bytes)
    return max(errors)


def _fill(descriptor, place, path, name, tensor, pool) -> Iterator[tuple[int, float]]:
    """Writes a tensor; gives the bytes of each piece, and the error of its scales."""
    inputs = tensor.shape[-1]
    outputs = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    row = row_bytes(tensor.kind, inputs)

    def one(piece, read, place):
        w = read(piece)
        with files.naming(name):
            data, error = encode(w, tensor.kind)
        with files.filling(path):
            _write_all(descriptor, data, place + piece.start * row)
        return data.nbytes, error

    for read in tensor.experts():
        pieces = conversion.slices(0, outputs, max(1, TILE // inputs))
        yield from pool.map(functools.partial(one, read=read, place=place), pieces)
        place += outputs * row


def _write_all(descriptor: int, data: np.ndarray, place: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):  # a call writes 2 GB at most
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count


# --- Reading --------------------------------------------------------------------------------------

ARCHITECTURE = "general.architecture"
NUMBERED = {number: kind for kind, number in NUMBERS.items()}
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
MAX_AXES = 4


class Stored(NamedTuple):
    """A tensor of a file: its type, its shape, rows first, and its bytes, mapped: [rows, bytes]."""

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


class File(NamedTuple):
    """A GGUF file: its keys, and its tensors by name."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Stored]


class _Reader:
    """Values of the header, one after another; CheckpointError beyond the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise CheckpointError(
                f"truncated: {size} bytes should follow byte {self.at} of {len(self.data)}; {CURE}"
            )
        self.at += size
        return memoryview(self.data)[self.at - size : self.at]

    def number(self, form: str):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8", "replace")

    def value(self):
        kind = self.number("<I")
        if kind != LIST:
            return self.scalar(kind)
        kind, count = self.number("<I"), self.number("<Q")
        if kind == BYTE:
            return bytes(self.take(count))
        if kind in SCALARS:
            size = struct.calcsize(SCALARS[kind])
            return np.frombuffer(self.take(count * size), SCALARS[kind]).tolist()
        return [self.scalar(kind) for _ in range(count)]

    def scalar(self, kind: int):
        if kind == TEXT:
            return self.text()
        if kind not in SCALARS:
            raise CheckpointError(f"a value of the unknown type {kind}; {CURE}")
        return self.number(SCALARS[kind])

    def entry(self) -> tuple[str, list[int], int, int]:
        """Name, sizes with rows first, type and place of a tensor."""
        name, axes = self.text(), self.number("<I")
        if axes > MAX_AXES:
            raise CheckpointError(
                f"{files.shown(name)} has {axes} axes, {MAX_AXES} at most; {CURE}"
            )
        sizes = [self.number("<Q") for _ in range(axes)][::-1]
        return name, sizes, self.number("<I"), self.number("<Q")


def open_file(path: Path) -> File:
    """A GGUF file of Grok, mapped; CheckpointError if it is none, cut short, or one of several.

    As of any mapped file, cutting it short meanwhile ends the process.
    """
    with files.open_file(path) as file, files.naming(path):
        if file.read(4) != b"GGUF":
            raise CheckpointError("no GGUF file; give one, or the folder of a checkpoint")
        reader = _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        reader.take(4)
        version, tensors, count = (reader.number(form) for form in ("<I", "<Q", "<Q"))
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version}, read are 2 and 3, little-endian")
        keys = dict((reader.text(), reader.value()) for _ in range(count))
        _check_keys(keys)
        entries = [reader.entry() for _ in range(tensors)]
        step = keys.get("general.alignment", ALIGNMENT)
        if type(step) is not int or step < 1:
            raise CheckpointError(f"general.alignment {files.shown(step)}; {CURE}")
        begin = -(-reader.at // step) * step
        return File(path, keys, dict(_stored(reader.data, begin, *entry) for entry in entries))


def _check_keys(keys: dict) -> None:
    if keys.get(ARCHITECTURE) != "grok":
        raise CheckpointError(
            f"a model of the architecture {files.shown(keys.get(ARCHITECTURE))}, only grok is read"
        )
    if keys.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"one of {keys['split.count']} files; make them one with llama-gguf-split --merge"
        )


def _stored(data, begin: int, name: str, sizes: list[int], number: int, place: int):
    with files.naming(files.shown(name)):
        if number not in NUMBERED:
            raise CheckpointError(
                f"its type has the number {number} in llama.cpp, read are {[*NUMBERS]}; take a "
                "file of one of these"
            )
        kind, inputs = NUMBERED[number], sizes[-1] if sizes else 0
        if not inputs or (kind in BLOCKS and inputs % BLOCKS[kind].inputs):
            raise CheckpointError(f"{kind} {sizes}, which cannot be; {CURE}")
        rows, row = math.prod(sizes[:-1]), row_bytes(kind, inputs)
        start = begin + place
        if start + rows * row > len(data):
            raise CheckpointError(
                f"truncated: it ends at byte {start + rows * row}, the file at {len(data)}; {CURE}"
            )
        array = np.frombuffer(data, np.uint8, rows * row, start).reshape(rows, row)
        return name, Stored(kind, tuple(sizes), array)
