"""Grok-1's `ckpt-0` read onto any mesh, as released or as ternary, and written byte for byte alike.

A checkpoint folder holds `ckpt-0/tensor00000_000`, `tensor00001_000`, ...: one pickle for each
parameter, in the order of a tree with sorted keys (layer 10 before layer 2). A pickle is a program;
here it is read as data by a few lines that know its two forms and import, call and copy nothing.

Shapes: I inputs, O outputs, E experts, G scale groups, B packed bytes; `...` is nothing or E.
"""

import concurrent.futures
import dataclasses
import json
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm
from jax.experimental import multihost_utils

import quantize
from quantize import QuantizedWeight1_58bit, QuantizedWeight8bit

FOLDER = "ckpt-0"
KINDS = ("ternary", "int8", "float32")
CHUNK = 1 << 21  # bytes of a weight, whole rows, that a thread takes at a time
COLUMNS = 1024  # columns of these converted at a time: with 256 rows, they stay in a core's cache

Params = dict[str, dict[str, Any]]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not the one asked for; says which file and why."""


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

    def load(self) -> np.ndarray | QuantizedWeight8bit:
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
        if not isinstance(tensor, np.ndarray | QuantizedWeight8bit):
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
            items = self.pop_to_mark()
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
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

    def name(self, module: str, name: str) -> _Name:
        if (module, name) not in ALLOWED:
            raise CheckpointError(
                f"the pickle asks for {module}.{name}, which no Grok-1 tensor needs; it is refused "
                "and nothing was run. Get the file from a source that you trust"
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
        made.value = QuantizedWeight8bit(weight, scales)
    else:
        _, shape, dtype, fortran, payload = state
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise CheckpointError("an array whose shape is not one of sizes")
        needed = math.prod(shape) * dtype.itemsize
        if payload.nbytes != needed:
            raise CheckpointError(
                f"{payload.nbytes} bytes of data for {dtype} {list(shape)}, which needs {needed}"
            )
        made.value = np.ndarray(shape, dtype, payload, order="F" if fortran else "C")


def read_tensor(path: str | os.PathLike) -> np.ndarray | QuantizedWeight8bit:
    """The array, or the int8 weight with its scales, that a file of the release holds.

    The arrays are read-only views of the memory-mapped file, unmapped when the last is dropped.
    Raises CheckpointError if the file is missing, truncated, or a pickle of anything else.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError("truncated: the file is empty; copy or download it again")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _Reader(data).load()
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{os.fspath(path)}: not a pickle of an array or of QuantizedWeight8bit ({error}); "
            "copy or download it again"
        ) from None


def _describe(tensor) -> str:
    if isinstance(tensor, QuantizedWeight8bit):
        return f"{_describe(tensor.weight)} with scales {_describe(tensor.scales)}"
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
        elif isinstance(value, QuantizedWeight8bit):
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

    def save_weight(self, value: QuantizedWeight8bit) -> None:
        self.save(_Name(WEIGHT_CLASS))
        self.save(())
        self.put(pickle.NEWOBJ)
        self.memoize()
        self.put(pickle.EMPTY_DICT)
        self.memoize()
        self.put(pickle.MARK)
        for name in ("weight", "scales"):
            self.save(name)
            self.save(getattr(value, name))
        self.put(pickle.SETITEMS, pickle.BUILD)


def _part_size(part) -> int:
    if isinstance(part, bytes):
        return len(part)
    return math.prod(part.shape) * np.dtype(part.dtype).itemsize


def file_size(value) -> int:
    """Bytes of the file of a tensor; shapes and dtypes (`jax.ShapeDtypeStruct`) are enough."""
    return sum(map(_part_size, _Writer(value).parts))


def write_tensor(path: str | os.PathLike, value) -> None:
    """Writes a float32 array or a QuantizedWeight8bit as the release does, byte for byte.

    The file appears under its name only when it is complete. Raises CheckpointError for a value
    that the release has no form for, such as a ternary weight.
    """
    _check_writable(os.fspath(path), value)
    value = jax.tree.map(lambda array: np.ascontiguousarray(array).reshape(array.shape), value)
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as file:
        for part in _Writer(value).parts:
            data = part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _check_writable(where: str, value) -> None:
    if isinstance(value, QuantizedWeight1_58bit):
        raise CheckpointError(
            f"{where}: the release's format has no ternary form; save the int8 or float32 weight "
            "that it was made from, or quantize.dequantize(w)"
        )
    if isinstance(value, QuantizedWeight8bit):
        expected, dtypes = "int8 with bfloat16 scales", (value.weight.dtype, value.scales.dtype)
        fits = dtypes == (np.int8, ml_dtypes.bfloat16)
    else:
        expected, fits = "float32", value.dtype == np.float32
    if not fits:
        raise CheckpointError(
            f"{where}: the release's format holds {expected} here, got {_describe(value)}; convert "
            "it with .astype first"
        )
    for array in jax.tree.leaves(value):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise CheckpointError(
                f"{where}: parts of this array are on other processes; gather it with "
                "jax.experimental.multihost_utils.process_allgather(x, tiled=True) first"
            )


# --- Checkpoint folders ---------------------------------------------------------------------------


def save(folder: str | os.PathLike, params: Params) -> None:
    """Writes `{module: {name: weight}}` to folder/ckpt-0 in the release's format and order.

    Leaves are float32 arrays or QuantizedWeight8bit. All is written to another name first and
    renamed at the end; a `ckpt-0` that was there is replaced. Raises CheckpointError, before
    anything is written, for a leaf that the format has no form for.
    """
    leaves = [(f"{module}/{name}", params[module][name]) for module, name in _sorted_keys(params)]
    for path, leaf in leaves:
        _check_writable(path, leaf)
    target = pathlib.Path(folder) / FOLDER
    partial, previous = (target.with_name(f"{FOLDER}.{word}") for word in ("partial", "previous"))
    for stale in (partial, previous):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, (_, leaf) in enumerate(leaves):
        write_tensor(partial / file_name(i), leaf)
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def read_config(folder: str | os.PathLike) -> dict | None:
    """The checkpoint's `config.json`, None if it has none; CheckpointError if it is no object."""
    path = pathlib.Path(folder) / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}; correct or remove it") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {config!r:.80}; correct it")
    return config


def file_name(index: int) -> str:
    return f"tensor{index:05d}_000"


def _sorted_keys(tree: Params) -> list[tuple[str, str]]:
    """(module, name) of each parameter in the order of the files, that of `jax.tree.leaves`."""
    return [(module, name) for module in sorted(tree) for name in sorted(tree[module])]


# --- Restoring ------------------------------------------------------------------------------------


def restore(
    folder: str | os.PathLike,
    template: Params,
    rules: Sequence[tuple[str, str]],
    shardings: Callable[[Params], Params] | None = None,
    *,
    threads: int | None = None,
    progress: bool = False,
) -> Params:
    """The parameters `{module: {name: weight}}` of folder/ckpt-0, on the devices they belong to.

    template: `{module: {name: array or ShapeDtypeStruct}}` of logical shapes
    rules: what each parameter becomes, a table for `quantize.match_rules` of "module/name":
      "float32" and "int8" as in the file, "ternary" made from an int8 file
    shardings: gives the sharding of every array of a tree like the result, from its shapes, such as
      `functools.partial(sharding.parameter_shardings, mesh)`; None for the default device
    threads: converting one tensor at a time; default: one for each core
    progress: a bar on stderr, of process 0 only

    Host memory in use is that of one restored tensor and a few megabytes for each thread; the files
    are mapped. Raises CheckpointError, before anything is converted, if a file is missing, left
    over, damaged, or not what template and rules say.
    """
    entries = _check_files(pathlib.Path(folder), template, rules)
    abstract: Params = {module: {} for module in template}
    for entry in entries:
        abstract[entry.module][entry.name] = entry.restored
    default = jnp.zeros(()).sharding
    placement = shardings(abstract) if shardings else jax.tree.map(lambda _: default, abstract)
    _check_placement(entries, placement)

    params: Params = {module: {} for module in template}
    total = sum(entry.path.stat().st_size for entry in entries)
    quiet = not progress or jax.process_index() != 0
    with (
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=quiet) as bar,
    ):
        for i, entry in enumerate(entries):
            bar.set_description(f"tensor {i + 1}/{len(entries)}", refresh=False)
            where = placement[entry.module][entry.name]
            leaf = jax.block_until_ready(_restore_one(entry, where, pool))
            params[entry.module][entry.name] = leaf
            bar.update(entry.path.stat().st_size)
    return params


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A parameter, its file, and the shapes it is restored to."""

    module: str
    name: str
    path: pathlib.Path
    kind: str
    restored: Any

    @property
    def title(self) -> str:
        return f"{self.path}: {self.module}/{self.name}"


def _check_files(folder: pathlib.Path, template: Params, rules) -> list[_Entry]:
    """Reads the header of every file; CheckpointError for the first few that do not fit."""
    keys = _sorted_keys(template)
    kinds = quantize.match_rules(rules, [f"{module}/{name}" for module, name in keys])
    unknown = sorted(set(kinds.values()) - set(KINDS))
    if unknown:
        raise CheckpointError(f"unknown precision {unknown[0]!r} in the rules; use one of {KINDS}")
    _check_names(folder, keys)
    entries, problems = [], []
    for i, (module, name) in enumerate(keys):
        path, kind = folder / FOLDER / file_name(i), kinds[f"{module}/{name}"]
        try:
            tensor = read_tensor(path)
            restored = _restored_shapes(tensor, tuple(template[module][name].shape), kind)
            entries.append(_Entry(module, name, path, kind, restored))
        except CheckpointError as error:
            text = str(error).removeprefix(f"{path}: ")
            problems.append(f"{path}: {module}/{name}: {text}")
    _raise_any(problems)
    return entries


def _check_names(folder: pathlib.Path, keys: list[tuple[str, str]]) -> None:
    tensors = folder / FOLDER
    if not tensors.is_dir():
        is_inner = (folder / file_name(0)).exists()
        cure = f"give its parent, {folder.resolve().parent}" if is_inner else "check the path"
        raise CheckpointError(
            f"{folder}: no checkpoint here, expected a folder {FOLDER} with tensor files; {cure}"
        )
    expected = {file_name(i): "/".join(key) for i, key in enumerate(keys)}
    found = {path.name for path in tensors.iterdir() if re.match(r"tensor\d+_\d+", path.name)}
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    problems = [f"{tensors / name}: missing, should hold {expected[name]}" for name in missing]
    problems += [f"{tensors / name}: belongs to no parameter" for name in extra]
    if problems:
        problems[0] = (
            f"{tensors} has {len(found)} tensor files, this model needs {len(keys)}; choose the "
            "preset that the checkpoint was made for, or complete it (an unfinished download?)\n"
            f"{problems[0]}"
        )
    _raise_any(problems)


def _raise_any(problems: list[str], shown: int = 5) -> None:
    if problems:
        more = [f"... and {len(problems) - shown} more"] * (len(problems) > shown)
        raise CheckpointError("\n".join(problems[:shown] + more))


def _restored_shapes(tensor, shape: tuple[int, ...], kind: str):
    """The ShapeDtypeStructs that a tensor is restored to; CheckpointError if it does not fit."""
    quantized = isinstance(tensor, QuantizedWeight8bit)
    if quantized == (kind == "float32"):
        wanted = "an int8 weight with scales" if kind != "float32" else "a float32 array"
        use = "'ternary' or 'int8'" if quantized else "'float32'"
        raise CheckpointError(
            f"expected {wanted}, to restore it as {kind!r}, found {_describe(tensor)}; choose a "
            f"precision table that says {use} of this parameter"
        )
    expected = _expected(tensor, shape)
    if _describe(tensor) != expected:
        raise CheckpointError(
            f"expected {expected}, found {_describe(tensor)}; choose the preset that the "
            "checkpoint was made for"
        )
    if kind == "float32":
        return jax.ShapeDtypeStruct(shape, np.float32)
    *lead, inputs, outputs = shape
    if kind == "int8":
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tensor)
    packed = (*lead, outputs, -(-inputs // 4))
    return QuantizedWeight1_58bit(
        jax.ShapeDtypeStruct(packed, np.uint8),
        jax.ShapeDtypeStruct((*lead, 1, 1), np.float32),
        quantize.packing_block(inputs),
        -inputs % 4,
    )


def _expected(tensor, shape: tuple[int, ...]) -> str:
    """What `_describe` says of a sound tensor of this kind and logical shape.

    G belongs to the file: where the one found divides I it is expected, else any is.
    """
    if not isinstance(tensor, QuantizedWeight8bit):
        return f"float32 {list(shape)}"
    if len(shape) not in (2, 3):
        return f"no int8 weight, but an array {list(shape)}"
    *lead, inputs, outputs = shape
    groups: Any = tensor.scales.shape[-2] if tensor.scales.ndim > 1 else 0
    if groups == 0 or inputs % groups:
        groups = f"a divisor of {inputs}"
    scales = ", ".join(map(str, [*lead, groups, outputs]))
    return f"int8 {list(shape)} with scales bfloat16 [{scales}]"


def _check_placement(entries: list[_Entry], placement: Params) -> None:
    for entry in entries:
        where = placement[entry.module][entry.name]
        try:
            shards = jax.tree.map(lambda x, s: s.shard_shape(x.shape), entry.restored, where)
        except ValueError as error:
            raise CheckpointError(
                f"{entry.title}: {error}; choose a mesh that divides this axis"
            ) from None
        if entry.kind == "ternary" and shards.packed[-1] % entry.restored.block:
            raise CheckpointError(
                f"{entry.title}: a shard of {shards.packed[-1]} packed bytes cuts a block of "
                f"{entry.restored.block}; choose a smaller mesh axis for it"
            )


def _restore_one(entry: _Entry, where, pool):
    tensor = read_tensor(entry.path)
    if entry.kind == "ternary":
        return _restore_ternary(entry, tensor, where, pool)
    return jax.tree.map(
        lambda array, sharding: _place(array.shape, sharding, lambda i: _aligned_copy(array[i])),
        tensor,
        where,
    )


def _place(shape, sharding, make: Callable) -> jax.Array:
    """The array whose slice at each index is make(index), called once for every index that the
    devices of this process hold."""
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards = []
    for bounds, holders in devices.items():
        data = make(tuple(slice(*pair) for pair in bounds))
        shards += [jax.device_put(data, device) for device in holders]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _aligned_empty(shape, dtype) -> np.ndarray:
    """An array at a multiple of 64 bytes: JAX on CPU takes it over instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    """A copy out of the mapped file, for a parameter must not change, or end, with its file."""
    copy = _aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _restore_ternary(entry: _Entry, tensor, where, pool) -> QuantizedWeight1_58bit:
    """Two passes over the file: sums of |code| for the scale, then trits of the slices held here.

    gamma must not depend on the mesh or on the number of processes: the sums are exact integers.
    """
    restored = entry.restored
    stack = jax.tree.map(lambda array: array[None] if array.ndim == 2 else array, tensor)
    scales = stack.scales.astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise CheckpointError(
            f"{entry.title}: negative or non-finite scales; copy or download the file again"
        )
    sums = _absolute_sums(stack, pool)
    gamma = quantize.absmean_of_sums(sums, scales, stack.shape[-2])
    limits = quantize.zero_limits(scales, gamma)

    def packed_slice(index):
        experts, outputs, width = index if len(index) == 3 else (slice(0, 1), *index)
        packed = _pack_slice(stack.weight, limits, (experts, outputs, width), restored.block, pool)
        return packed.reshape(packed.shape[-len(index) :])

    gamma = gamma.reshape(restored.scales.shape)
    packed = _place(restored.packed.shape, where.packed, packed_slice)
    scales = _place(gamma.shape, where.scales, gamma.__getitem__)
    return QuantizedWeight1_58bit(packed, scales, restored.block, restored.padding)


def _absolute_sums(stack: QuantizedWeight8bit, pool) -> np.ndarray:
    """Sums of |code| over the rows of each expert and scale group: int64 [E, G, O], exact.

    Each process reads its part of the rows, and they exchange their sums.
    """
    experts, inputs, outputs = stack.shape
    sums = np.zeros(stack.scales.shape, np.int64)
    groups = sums.shape[1]
    size = inputs // groups
    chunks = [
        (e, g, rows)
        for e in range(experts)
        for g in range(groups)
        for rows in _chunks(g * size, (g + 1) * size, max(1, CHUNK // outputs))
    ]
    chunks = chunks[jax.process_index() :: jax.process_count()]
    partial = pool.map(lambda at: quantize.absolute_sums(stack.weight[at[0], at[2]]), chunks)
    for (e, g, _), part in zip(chunks, partial, strict=True):
        sums[e, g] += part
    if jax.process_count() > 1:  # as int32, which JAX keeps: 128 times the rows
        sums = multihost_utils.process_allgather(sums.astype(np.int32)).sum(0, dtype=np.int64)
    return sums


def _pack_slice(weight, limits, index, block: int, pool) -> np.ndarray:
    """Packed trits [E, O, B] of one slice of the packed array; `limits` is int16 [E, G, O]."""
    experts, outputs, width = index
    out = _aligned_empty([s.stop - s.start for s in index], np.uint8)
    per_row = weight.shape[1] // limits.shape[1]  # rows of a scale group

    def convert(at):
        expert, taken = at  # `taken` bytes of each output, whole blocks
        rows = slice(4 * taken.start, min(4 * taken.stop, weight.shape[1]))
        for columns in _chunks(outputs.start, outputs.stop, COLUMNS):
            codes = weight[expert, rows, columns]
            trits = np.empty(codes.shape, np.int8)
            for start in range(rows.start // per_row * per_row, rows.stop, per_row):
                group = slice(max(start - rows.start, 0), start + per_row - rows.start)
                limit = limits[expert, start // per_row, columns]
                quantize.int8_to_trits(codes[group], limit, out=trits[group])
            here = slice(columns.start - outputs.start, columns.stop - outputs.start)
            there = slice(taken.start - width.start, taken.stop - width.start)
            out[expert - experts.start, here, there] = quantize.pack(trits, None, block).packed

    per_chunk = max(1, CHUNK // (4 * block * weight.shape[2])) * block
    chunks = [
        (expert, taken)
        for expert in range(experts.start, experts.stop)
        for taken in _chunks(width.start, width.stop, per_chunk)
    ]
    list(pool.map(convert, chunks))
    return out


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))
