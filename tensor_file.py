"""One tensor file of the release: a pickle, read without running it and written byte for byte.

A pickle is a program; here it is read as data by a few lines that know its two forms, a float32
array and an int8 weight with its scales, and that import, call and copy nothing.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import struct
from typing import Any

import jax
import ml_dtypes
import numpy as np

import files
from files import CheckpointError
from quantize import PackedWeight, QuantizedWeight

# --- Reading one tensor ---------------------------------------------------------------------------

WEIGHT_CLASS = ("__main__", "QuantizedWeight8bit")
RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
NUMPY_2_RECONSTRUCT = ("numpy._core.multiarray", "_reconstruct")
NDARRAY = ("numpy", "ndarray")
DTYPE = ("numpy", "dtype")
BFLOAT16 = ("ml_dtypes", "bfloat16")
ALLOWED = (WEIGHT_CLASS, RECONSTRUCT, NUMPY_2_RECONSTRUCT, NDARRAY, DTYPE, BFLOAT16)

MAX_OPCODES = 1000  # a released tensor has about 75
MAX_TEXT = 1000
MAX_AXES = 8

_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_INTEGERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H"}
_TEXTS = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I"}
_BYTES = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q"}
_TUPLES = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
_GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_IGNORED = {pickle.PROTO: "<B", pickle.FRAME: "<Q"}
_MARK = object()


class _Name(tuple):
    """(module, name) of something that a pickle refers to; never imported."""


class _StandIn:
    """An object that a pickle is making: an array or a quantized weight, once `value` is set."""

    def __init__(self, kind: _Name):
        self.kind = kind
        self.value = None


class _Reader:
    """The stack machine of a pickle, cut down to what numpy arrays and their dtypes need.

    Large byte strings are slices of `data`, so memory-mapped data is not even read. Nothing that a
    pickle names is imported, and numpy's own bfloat16 dtype is used but never given the pickled
    state: its flags differ between releases of ml_dtypes, and JAX stops recognising a dtype whose
    flags have changed.
    """

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> np.ndarray | QuantizedWeight:
        for _ in range(MAX_OPCODES):
            opcode = bytes(self.take(1))
            if opcode == pickle.STOP:
                break
            self.step(opcode)
        else:
            raise CheckpointError(f"more than {MAX_OPCODES} opcodes")
        if self.at != len(self.data):
            raise CheckpointError(f"{len(self.data) - self.at} bytes follow the end of the tensor")
        tensor = self.stack[-1].value
        if not isinstance(tensor, np.ndarray | QuantizedWeight):
            raise CheckpointError("the pickle holds no tensor")
        return tensor

    def step(self, opcode: bytes) -> None:
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _INTEGERS:
            self.stack.append(self.number(_INTEGERS[opcode]))
        elif opcode in _TEXTS:
            self.stack.append(self.text(self.number(_TEXTS[opcode])))
        elif opcode in _BYTES:
            self.stack.append(self.take(self.number(_BYTES[opcode])))
        elif opcode in _TUPLES:
            self.stack.append(tuple(self.pop(_TUPLES[opcode])))
        elif opcode == pickle.TUPLE:
            self.stack.append(tuple(self.pop_to_mark()))
        elif opcode == pickle.MARK:
            self.stack.append(_MARK)
        elif opcode == pickle.EMPTY_DICT:
            self.stack.append({})
        elif opcode == pickle.SETITEMS:
            self.set_items(self.pop_to_mark())
        elif opcode == pickle.MEMOIZE:
            self.memo[len(self.memo)] = self.stack[-1]
        elif opcode in _PUTS:
            self.memo[self.number(_PUTS[opcode])] = self.stack[-1]
        elif opcode in _GETS:
            self.stack.append(self.memo[self.number(_GETS[opcode])])
        elif opcode in (pickle.GLOBAL, pickle.INST):
            self.stack.append(self.name(self.line(), self.line()))
        elif opcode == pickle.STACK_GLOBAL:
            self.stack.append(self.name(*self.pop(2)))
        elif opcode in (pickle.REDUCE, pickle.NEWOBJ):
            self.stack.append(_make(*self.pop(2)))
        elif opcode == pickle.BUILD:
            (state,) = self.pop(1)
            _fill(self.stack[-1], state)
        elif opcode in _IGNORED:
            self.number(_IGNORED[opcode])
        else:
            known = pickletools.code2op.get(opcode.decode("latin-1"))
            raise CheckpointError(f"pickle opcode {known.name if known else opcode!r} is refused")

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise CheckpointError(
                f"truncated: {size} bytes should follow byte {self.at}, the file has only "
                f"{len(self.data)} bytes; copy or download it again"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, size: int) -> str:
        if size > MAX_TEXT:
            raise CheckpointError(f"a text of {size} bytes, at most {MAX_TEXT} are read")
        return str(self.take(size), "utf-8")

    def line(self) -> str:
        rest = bytes(self.data[self.at : self.at + MAX_TEXT])
        text = self.text(rest.index(b"\n"))
        self.at += 1
        return text

    def set_items(self, items: list) -> None:
        # Of tuples that share their parts, one key can take longer to hash than anybody waits.
        if not all(isinstance(key, str) for key in items[::2]):
            raise CheckpointError("a dictionary whose keys are not texts")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> _Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise CheckpointError("the pickle asks for something whose name is not a text")
        if (module, name) not in ALLOWED:
            raise CheckpointError(
                f"the pickle asks for {f'{module}.{name}'!r:.200}, which no Grok-1 tensor needs; "
                "it is refused and nothing was run. Get the file from a source that you trust"
            )
        return _Name((module, name))

    def pop(self, count: int) -> list:
        if count > len(self.stack):
            raise CheckpointError("the pickle takes more from its stack than it put there")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def pop_to_mark(self) -> list:
        last = max(i for i, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[last + 1 :]
        del self.stack[last:]
        return items


def _make(name: Any, args: tuple) -> np.dtype | _StandIn:
    """What a pickle makes by calling `name`: a dtype, or a stand-in for the object."""
    if not isinstance(name, _Name):
        raise CheckpointError("the pickle calls something that is not a name")
    if name == DTYPE:
        if isinstance(args[0], _Name) and args[0] == BFLOAT16:
            return np.dtype(ml_dtypes.bfloat16)
        if isinstance(args[0], str) and re.fullmatch("[fiu][1248]", args[0]):
            return np.dtype(args[0])
        raise CheckpointError("an array of Python objects or of an unknown dtype; it is refused")
    if name in (WEIGHT_CLASS, RECONSTRUCT, NUMPY_2_RECONSTRUCT):
        return _StandIn(name)
    raise CheckpointError(f"the pickle calls {'.'.join(name)}, which is refused")


def _fill(made: np.dtype | _StandIn, state: Any) -> None:
    """The pickled state of a dtype, an array `(1, shape, dtype, is Fortran, bytes)` or a weight."""
    if isinstance(made, np.dtype):
        if state[1] not in ("<", "|"):
            raise CheckpointError(
                "byte order is not little-endian; save it again on such a machine"
            )
    elif made.kind == WEIGHT_CLASS:
        weight, scales = state["weight"].value, state["scales"].value
        if not (isinstance(weight, np.ndarray) and isinstance(scales, np.ndarray)):
            raise CheckpointError("a weight whose parts are not arrays")
        made.value = QuantizedWeight(weight, scales)
    else:
        _, shape, dtype, fortran, payload = state
        made.value = _array(shape, dtype, fortran, payload)


def _array(shape: Any, dtype: Any, fortran: Any, payload: Any) -> np.ndarray:
    if not (
        isinstance(shape, tuple)
        and len(shape) <= MAX_AXES
        and all(type(size) is int and size >= 0 for size in shape)
    ):
        raise CheckpointError(f"an array whose shape is not one of up to {MAX_AXES} sizes")
    if fortran is not False:
        raise CheckpointError("an array in Fortran's order, which the release has none of")
    if not (isinstance(dtype, np.dtype) and isinstance(payload, memoryview)):
        raise CheckpointError("an array without a dtype or without data")
    needed = math.prod(shape) * dtype.itemsize
    if payload.nbytes != needed:
        raise CheckpointError(
            f"{payload.nbytes} bytes of data for {dtype} {list(shape)}, which needs {needed}"
        )
    return np.ndarray(shape, dtype, payload)


def read_tensor(path: str | os.PathLike) -> np.ndarray | QuantizedWeight:
    """The array, or the int8 weight with its scales, that a file of the release holds.

    The arrays are read-only views of the memory-mapped file, unmapped when the last is dropped. A
    file that is cut short meanwhile ends the process (SIGBUS): replace it by renaming another one,
    as `write_tensor` does. Raises CheckpointError if the file is missing, truncated, or a pickle of
    anything else.
    """
    with files.open_file(path) as file, files.naming(os.fspath(path)):
        if os.fstat(file.fileno()).st_size == 0:
            raise CheckpointError("truncated: the file is empty; copy or download it again")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            return _Reader(data).load()
        except CheckpointError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"not a pickle of an array or of QuantizedWeight8bit ({error!s:.200}); copy or "
                "download it again"
            ) from None


def release(mapped: np.ndarray | mmap.mmap) -> None:
    """Takes the pages of a mapped file out of this process's memory; reading brings them back.

    Arrays that are not mapped are left alone.
    """
    while isinstance(mapped, np.ndarray | memoryview):
        mapped = mapped.base if isinstance(mapped, np.ndarray) else mapped.obj
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)


def describe(tensor) -> str:
    if isinstance(tensor, QuantizedWeight):
        return f"{describe(tensor.codes)} with scales {describe(tensor.scales)}"
    return f"{tensor.dtype} {list(tensor.shape)}"


# --- Writing one tensor ---------------------------------------------------------------------------

FRAME_SIZE = 1 << 16  # a frame ends at the first object after this; larger payloads stand outside
FRAME_MINIMUM = 4  # fewer bytes go without a frame
BFLOAT16_FLAGS = 80  # as in the release; newer ml_dtypes write 64


@dataclasses.dataclass(frozen=True)
class _Payload:
    """The bytes of an array."""

    array: Any


class _Writer:
    """The pickle of one tensor, protocol 4 with numpy 1.26's names, as a list of parts.

    A part is bytes, or an array whose bytes belong there; so nothing is copied, and shapes without
    values are enough to tell the size of a file.
    """

    def __init__(self, value):
        self.parts: list[Any] = [pickle.PROTO + b"\x04"]
        self.frame: list[Any] = []
        self.memo: dict[Any, int] = {}
        self.memos = 0
        self.save(value)
        self.put(pickle.STOP)
        self.end_frame()

    def put(self, *parts) -> None:
        self.frame.extend(parts)

    def memoize(self, key=None) -> None:
        self.put(pickle.MEMOIZE)
        if key is not None:
            self.memo[key] = self.memos
        self.memos += 1

    def end_frame(self) -> None:
        size = sum(map(_part_size, self.frame))
        if size >= FRAME_MINIMUM:
            self.parts.append(pickle.FRAME + struct.pack("<Q", size))
        self.parts.extend(self.frame)
        self.frame = []

    def save(self, value) -> None:
        if sum(map(_part_size, self.frame)) >= FRAME_SIZE:
            self.end_frame()
        if isinstance(value, str | bytes | _Name) and value in self.memo:
            self.put(pickle.BINGET, bytes([self.memo[value]]))
        elif value is None or isinstance(value, bool):
            self.put({None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value])
        elif isinstance(value, int):
            self.save_integer(value)
        elif isinstance(value, str):
            self.put(pickle.SHORT_BINUNICODE, bytes([len(value)]), value.encode())
            self.memoize(value)
        elif isinstance(value, bytes):
            self.put(pickle.SHORT_BINBYTES, bytes([len(value)]), value)
            self.memoize(value)
        elif isinstance(value, _Name):
            self.save(value[0])
            self.save(value[1])
            self.put(pickle.STACK_GLOBAL)
            self.memoize(value)
        elif isinstance(value, tuple):
            self.save_tuple(value)
        elif isinstance(value, np.dtype):
            self.save_dtype(value)
        elif isinstance(value, QuantizedWeight):
            self.save_weight(value)
        elif isinstance(value, _Payload):
            self.save_payload(value.array)
        else:
            self.save_array(value)

    def save_integer(self, value: int) -> None:
        opcode = pickle.BININT
        if 0 <= value < 1 << 16:
            opcode = pickle.BININT1 if value < 1 << 8 else pickle.BININT2
        self.put(opcode, struct.pack(_INTEGERS[opcode], value))

    def save_tuple(self, value: tuple) -> None:
        if len(value) > 3:
            self.put(pickle.MARK)
        for item in value:
            self.save(item)
        self.put({n: opcode for opcode, n in _TUPLES.items()}.get(len(value), pickle.TUPLE))
        if value:
            self.memoize()

    def save_dtype(self, dtype: np.dtype) -> None:
        bfloat16 = dtype == ml_dtypes.bfloat16
        order = "|" if dtype.itemsize == 1 else "<"
        layout = (2, 2, BFLOAT16_FLAGS) if bfloat16 else (-1, -1, 0)  # size, alignment, flags
        self.save(_Name(DTYPE))
        self.save((_Name(BFLOAT16) if bfloat16 else dtype.str[1:], False, True))
        self.put(pickle.REDUCE)
        self.memoize()
        self.save((3, order, None, None, None, *layout))
        self.put(pickle.BUILD)

    def save_array(self, array) -> None:
        self.save(_Name(RECONSTRUCT))
        self.save((_Name(NDARRAY), (0,), b"b"))
        self.put(pickle.REDUCE)
        self.memoize()
        self.save((1, tuple(array.shape), np.dtype(array.dtype), False, _Payload(array)))
        self.put(pickle.BUILD)

    def save_payload(self, array) -> None:
        size = _part_size(array)
        opcode = next(o for o, form in _BYTES.items() if size < 1 << 8 * struct.calcsize(form))
        header = opcode + struct.pack(_BYTES[opcode], size)
        if size < FRAME_SIZE:
            self.put(header, array)
        else:
            self.end_frame()
            self.parts += [header, array]
        self.memoize()

    def save_weight(self, value: QuantizedWeight) -> None:
        self.save(_Name(WEIGHT_CLASS))
        self.save(())
        self.put(pickle.NEWOBJ)
        self.memoize()
        self.put(pickle.EMPTY_DICT)
        self.memoize()
        self.put(pickle.MARK)
        for name, array in (("weight", value.codes), ("scales", value.scales)):
            self.save(name)
            self.save(array)
        self.put(pickle.SETITEMS, pickle.BUILD)


def _part_size(part) -> int:
    if isinstance(part, bytes):
        return len(part)
    return math.prod(part.shape) * np.dtype(part.dtype).itemsize


def file_size(value) -> int:
    """Bytes of the file of a tensor; shapes and dtypes (`jax.ShapeDtypeStruct`) are enough."""
    return sum(map(_part_size, _Writer(value).parts))


def write_tensor(path: str | os.PathLike, value) -> None:
    """Writes a float32 array or a QuantizedWeight as the release does, byte for byte.

    The file appears under its name only when it is complete. Raises CheckpointError for a value
    that the release has no form for, such as a ternary weight.
    """
    check_writable(os.fspath(path), value)
    value = jax.tree.map(lambda array: np.ascontiguousarray(array).reshape(array.shape), value)
    path = pathlib.Path(path)
    with files.filling(path), files.replacing(path) as target, open(target, "wb") as file:
        for part in _Writer(value).parts:
            file.write(part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8))


def check_writable(where: str, value) -> None:
    if isinstance(value, PackedWeight):
        raise CheckpointError(
            f"{where}: the release's format has no ternary form; save the int8 or float32 weight "
            "that it was made from, or quantize.dequantize(w)"
        )
    if isinstance(value, QuantizedWeight):
        expected, dtypes = "int8 with bfloat16 scales", (value.codes.dtype, value.scales.dtype)
        fits = dtypes == (np.int8, ml_dtypes.bfloat16)
    else:
        expected, fits = "float32", value.dtype == np.float32
    if not fits:
        raise CheckpointError(
            f"{where}: the release's format holds {expected} here, got {describe(value)}; convert "
            "it with .astype first"
        )
    for array in jax.tree.leaves(value):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise CheckpointError(
                f"{where}: parts of this array are on other processes; gather it with "
                "jax.experimental.multihost_utils.process_allgather(x, tiled=True) first"
            )
