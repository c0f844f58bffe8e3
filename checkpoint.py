"""Checkpoints read onto any mesh, and written: Grok-1's `ckpt-0`, and what it is converted to.

A released checkpoint holds `ckpt-0/tensor00000_000`, `tensor00001_000`, ...: one pickle for each
parameter, in the order of a tree with sorted keys (layer 10 before layer 2), which `tensor_file.py`
reads; it is made ternary on the way. A converted one is ternary already, in files of `shards.py`.

Shapes: I inputs, O outputs, E experts, G scale groups, B packed bytes; `...` is nothing or E.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

import files
import quantize
import shards
import tensor_file
from quantize import QuantizedWeight1_58bit, QuantizedWeight8bit
from shards import StoredTrits, slices
from tensor_file import CheckpointError, check_writable, read_tensor, write_tensor

FOLDER = files.RELEASED
KINDS = ("ternary", "int8", "float32")
CHUNK = 1 << 21  # bytes of a weight, whole rows, that a thread takes at a time
CHECK = 1 << 18  # floats that are checked at a time: these, too, stay in the cache
COLUMNS = 2048  # columns of these converted at a time: with 256 rows, they stay in a core's cache

Params = dict[str, dict[str, Any]]


# --- Checkpoint folders ---------------------------------------------------------------------------


def save(folder: str | os.PathLike, params: Params) -> None:
    """Writes `{module: {name: weight}}` to folder/ckpt-0 in the release's format and order.

    Leaves are float32 arrays or QuantizedWeight8bit; `save_converted` takes ternary ones. All is
    written to another name first and renamed at the end; a `ckpt-0` that was there is replaced.
    Raises CheckpointError, before anything is written, for a leaf that the format has no form for.
    """
    leaves = [(f"{module}/{name}", params[module][name]) for module, name in sorted_keys(params)]
    for path, leaf in leaves:
        check_writable(path, leaf)
    target = pathlib.Path(folder) / FOLDER
    partial = target.with_name(f"{FOLDER}.partial")
    files.recover(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, (_, leaf) in enumerate(leaves):
        write_tensor(partial / file_name(i), leaf)
    files.replace_folder(partial, target)


def check_folder(folder: str | os.PathLike) -> None:
    """CheckpointError unless the folder holds a checkpoint, released or converted.

    It names what is likely meant: the checkpoint of a training run, the parent of a `ckpt-0`, or
    what an interruption left.
    """
    folder = pathlib.Path(folder)
    if _has_checkpoint(folder):
        return
    partial, ours = shards.partial_folder(folder), folder / FOLDER
    moved = [path for path in (ours, folder) if files.previous_name(path).is_dir()]
    if (folder / file_name(0)).exists():
        cure = f"give its parent, {folder.resolve().parent}"
    elif _has_checkpoint(folder / "checkpoint"):
        cure = f"give the checkpoint of this training run, {folder / 'checkpoint'}"
    elif moved:
        old = files.previous_name(moved[0])
        cure = f"saving another one was interrupted: rename {old} to {moved[0].name}"
    elif partial.is_dir():
        cure = f"{partial} was not finished: run the same convert.py again, it goes on"
    else:
        cure = "check the path"
    raise CheckpointError(
        f"{folder}: no checkpoint here, expected a folder {FOLDER} with tensor files, or a "
        f"{shards.INDEX}; {cure}"
    )


def _has_checkpoint(folder: pathlib.Path) -> bool:
    return (folder / FOLDER).is_dir() or shards.exists(folder)


def read_config(folder: str | os.PathLike) -> dict | None:
    """The checkpoint's `config.json`, None if it has none.

    CheckpointError if it is no JSON object, or not what a converted checkpoint has the sums of.
    """
    path = pathlib.Path(folder) / shards.CONFIG
    shards.check_file(path.parent, path.name)
    return files.read_json(path) if path.exists() else None


def readable_size(count: float) -> str:
    """Bytes for reading, such as 78.7 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def file_name(index: int) -> str:
    return f"tensor{index:05d}_000"


def sorted_keys(tree: Params) -> list[tuple[str, str]]:
    """(module, name) of each parameter in the order of the files, that of `jax.tree.leaves`."""
    return [(module, name) for module in sorted(tree) for name in sorted(tree[module])]


# --- Converted checkpoints ------------------------------------------------------------------------


def save_converted(
    folder: str | os.PathLike,
    params: Params,
    config: dict,
    extra: dict[str, bytes] | None = None,
    packing: str = "base3",
) -> None:
    """Writes `{module: {name: weight}}` to a new folder, in the format of `docs/format.md`.

    Leaves are float32 arrays, QuantizedWeight8bit or QuantizedWeight1_58bit.

    config: of the model, with what `quantization` says of the weights
    extra: more files, {name: content}, such as the tokenizer
    packing: one of shards.PACKINGS
    """
    leaves = {f"{module}/{name}": params[module][name] for module, name in sorted_keys(params)}
    shutil.rmtree(shards.partial_folder(folder), ignore_errors=True)

    def fill(path, stored):
        leaf = jax.tree.map(np.asarray, leaves[path])
        if isinstance(leaf, QuantizedWeight1_58bit):
            matrices = leaf.packed.reshape(-1, *leaf.packed.shape[-2:])
            for matrix, out in zip(matrices, stored.matrices, strict=True):
                shards.store_trits(matrix, out, packing)
            stored.scales[...] = leaf.scales
        else:
            jax.tree.map(np.copyto, stored, leaf)

    def form(leaf):
        ternary = isinstance(leaf, QuantizedWeight1_58bit)
        if ternary and leaf.block != quantize.packing_block(leaf.shape[-2]):
            raise CheckpointError(f"packed in blocks of {leaf.block}, which the format has not")
        return shards.stored_form(leaf, packing) if ternary else leaf

    shards.write(folder, {path: form(leaf) for path, leaf in leaves.items()}, fill, config, extra)


def quantization(weights: str, rules: Sequence[tuple[str, str]], packing: str = "base3") -> dict:
    """What a converted checkpoint's `config.json` says of its weights.

    weights: the name of the precision table, rules: the table
    """
    about = {
        "quant_method": "absmean ternary",
        "format_version": shards.VERSION,
        "weights": weights,
        "precision": [list(rule) for rule in rules],
        "packing": packing,
    }
    return {"quantization_config": about}


def default_weights(folder: str | os.PathLike) -> str:
    """The name of the precision to load a checkpoint in: what it was converted to, or "ternary".

    Raises CheckpointError for a format that this code does not know.
    """
    about = (read_config(folder) or {}).get("quantization_config")
    if about is None:
        return "ternary"
    path = pathlib.Path(folder) / shards.CONFIG
    if not isinstance(about, dict):
        raise CheckpointError(
            f"{path}: quantization_config {files.shown(about)}, expected an object; copy it again"
        )
    if about.get("format_version") != shards.VERSION:
        raise CheckpointError(
            f"{path}: format version {files.shown(about.get('format_version'))}, this code reads "
            f"{shards.VERSION}; update it, or convert the checkpoint again"
        )
    if not isinstance(about.get("weights"), str):
        raise CheckpointError(
            f"{path}: weights {files.shown(about.get('weights'))} in quantization_config, expected "
            "the name of a precision table; copy it again"
        )
    return about["weights"]


# --- Restoring ------------------------------------------------------------------------------------


def restore(
    folder: str | os.PathLike,
    template: Params,
    rules: Sequence[tuple[str, str]],
    shardings: Callable[[Params], Params] | None = None,
    *,
    threads: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> Params:
    """The parameters `{module: {name: weight}}` of a folder, on the devices they belong to.

    template: `{module: {name: array or ShapeDtypeStruct}}` of logical shapes
    rules: what each parameter becomes, a table for `quantize.match_rules` of "module/name":
      "float32" and "int8" as in the file, "ternary" as in a converted checkpoint, or made from a
      released int8 file
    shardings: gives the sharding of every array of a tree like the result, from its shapes, such as
      `functools.partial(sharding.parameter_shardings, mesh)`; None for the default device
    threads: converting one tensor at a time; default: one for each core
    progress: a bar on stderr, of process 0 only
    check: looks at all numbers, which float32 or packed bytes may hold and a model may not: NaN,
      infinities, codes of 3

    Host memory in use is that of one restored tensor and a few megabytes for each thread. The files
    are mapped, and each process reads the slices of its devices; what is made ternary on the way is
    read once by all processes together besides. Raises CheckpointError, before anything is
    converted, if a file is missing, left over, damaged, or not what template and rules say, and
    later for what `check` finds.
    """
    entries = check_files(pathlib.Path(folder), template, rules)
    abstract: Params = {module: {} for module in template}
    for entry in entries:
        abstract[entry.module][entry.name] = entry.restored
    default = jnp.zeros(()).sharding
    placement = shardings(abstract) if shardings else jax.tree.map(lambda _: default, abstract)
    _check_placement(entries, placement)

    params: Params = {module: {} for module in template}
    total = sum(entry.bytes for entry in entries)
    quiet = not progress or jax.process_index() != 0
    with (
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=quiet) as bar,
    ):
        for i, entry in enumerate(entries):
            bar.set_description(f"tensor {i + 1}/{len(entries)}", refresh=False)
            where = placement[entry.module][entry.name]
            leaf = jax.block_until_ready(_restore_one(entry, where, pool, check))
            params[entry.module][entry.name] = leaf
            bar.update(entry.bytes)
    return params


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter, where it is read, and the shapes it is restored to."""

    module: str
    name: str
    file: pathlib.Path
    read: Callable  # () -> the tensor, mapped
    kind: str
    restored: Any
    bytes: int

    @property
    def path(self) -> str:
        return f"{self.module}/{self.name}"

    @property
    def title(self) -> str:
        return f"{self.file}: {self.path}"


def check_files(folder: pathlib.Path, template: Params, rules) -> list[Entry]:
    """All parameters of a checkpoint, in order; CheckpointError for the first few that do not fit.

    Reads the header of every file. Arguments as in `restore`.
    """
    keys = sorted_keys(template)
    kinds = quantize.match_rules(rules, [f"{module}/{name}" for module, name in keys])
    unknown = sorted(set(kinds.values()) - set(KINDS))
    if unknown:
        raise CheckpointError(f"unknown precision {unknown[0]!r} in the rules; use one of {KINDS}")
    check_folder(folder)
    sources = _converted_files(folder, keys) if shards.exists(folder) else _released(folder, keys)
    entries, problems = [], []
    for (module, name), (file, read) in zip(keys, sources, strict=True):
        kind = kinds[f"{module}/{name}"]
        try:
            tensor = read()
            restored = restored_shapes(tensor, tuple(template[module][name].shape), kind)
            size = shards.stored_bytes(tensor)
            entries.append(Entry(module, name, file, read, kind, restored, size))
        except CheckpointError as error:
            text = str(error).removeprefix(f"{file}: ")
            problems.append(f"{file}: {module}/{name}: {text}")
    _raise_any(problems)
    return entries


def _converted_files(folder: pathlib.Path, keys) -> list[tuple[pathlib.Path, Callable]]:
    """The file of each parameter of a converted checkpoint, and how to read it."""
    found = shards.open_shards(folder)
    expected = {f"{module}/{name}" for module, name in keys}
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    problems = [f"{folder}: {path} is missing" for path in missing]
    problems += [f"{folder}: {path} belongs to no parameter" for path in extra]
    if problems:
        problems[0] = (
            f"{folder} has {len(found)} parameters, this model has {len(keys)}; choose the preset "
            f"that the checkpoint was made for\n{problems[0]}"
        )
    _raise_any(problems)
    leaves = (found[f"{module}/{name}"] for module, name in keys)
    return [(file, lambda leaf=leaf: leaf) for file, leaf in leaves]


def _released(folder: pathlib.Path, keys) -> list[tuple[pathlib.Path, Callable]]:
    """The file of each parameter of a released checkpoint, and how to read it."""
    _check_names(folder, keys)
    tensors = [folder / FOLDER / file_name(i) for i in range(len(keys))]
    return [(file, functools.partial(read_tensor, file)) for file in tensors]


def _check_names(folder: pathlib.Path, keys: list[tuple[str, str]]) -> None:
    tensors = folder / FOLDER
    expected = {file_name(i): "/".join(key) for i, key in enumerate(keys)}
    found = {path.name for path in tensors.iterdir() if re.match(r"tensor\d+_\d+", path.name)}
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    problems = [f"{tensors / name}: missing, should hold {expected[name]}" for name in missing]
    problems += [f"{tensors}: {name!r} belongs to no parameter" for name in extra]
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


def restored_shapes(tensor, shape: tuple[int, ...], kind: str):
    """The ShapeDtypeStructs that a tensor is restored to; CheckpointError if it does not fit."""
    if isinstance(tensor, StoredTrits) and kind != "ternary":
        raise CheckpointError(
            f"expected {_wanted(kind)}, found ternary {list(tensor.shape)}: this checkpoint was "
            "converted, its weights are what they are; leave the choice of weights to it"
        )
    quantized = not isinstance(tensor, np.ndarray)
    if quantized == (kind == "float32"):
        use = "'ternary' or 'int8'" if quantized else "'float32'"
        raise CheckpointError(
            f"expected {_wanted(kind)}, to restore it as {kind!r}, found {_describe(tensor)}; "
            f"choose a precision table that says {use} of this parameter"
        )
    expected = _expected(tensor, shape)
    if _describe(tensor) != expected:
        raise CheckpointError(
            f"expected {expected}, found {_describe(tensor)}; choose the preset that the "
            "checkpoint was made for"
        )
    if kind == "float32":
        return jax.ShapeDtypeStruct(shape, np.float32)
    if kind == "int8":
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tensor)
    return shards.ternary_shapes(shape)


def _wanted(kind: str) -> str:
    return "a float32 array" if kind == "float32" else "an int8 weight with scales"


def _describe(tensor) -> str:
    if isinstance(tensor, StoredTrits):
        return f"ternary {list(tensor.shape)} in blocks of {tensor.block}"
    return tensor_file.describe(tensor)


def _expected(tensor, shape: tuple[int, ...]) -> str:
    """What `_describe` says of a sound tensor of this kind and logical shape.

    G belongs to the file: where the one found divides I it is expected, else any is.
    """
    if isinstance(tensor, np.ndarray):
        return f"float32 {list(shape)}"
    if len(shape) not in (2, 3):
        return f"no matrix, but an array {list(shape)}"
    if isinstance(tensor, StoredTrits):
        return f"ternary {list(shape)} in blocks of {quantize.packing_block(shape[-2])}"
    *lead, inputs, outputs = shape
    groups: Any = tensor.scales.shape[-2] if tensor.scales.ndim > 1 else 0
    if groups == 0 or inputs % groups:
        groups = f"a divisor of {inputs}"
    scales = ", ".join(map(str, [*lead, groups, outputs]))
    return f"int8 {list(shape)} with scales bfloat16 [{scales}]"


def _check_placement(entries: list[Entry], placement: Params) -> None:
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


def _restore_one(entry: Entry, where, pool, check: bool):
    tensor = entry.read()
    if not isinstance(tensor, np.ndarray):
        check_scales(tensor.scales, entry.title)
    if entry.kind != "ternary":

        def copy(array):
            copied = _aligned_copy(array)
            if check and entry.kind == "float32":  # of int8 the scales have been looked at
                check_finite(copied, entry.title)
            return copied

        restored = jax.tree.map(
            lambda array, sharding: _place(array.shape, sharding, lambda i: copy(array[i])),
            tensor,
            where,
        )
    elif isinstance(tensor, StoredTrits):
        restored = _restore_stored(entry, tensor, where, pool, check)
    else:
        restored = _restore_ternary(entry, tensor, where, pool)
    for leaf in shards.parts("", tensor).values():
        tensor_file.release(leaf)
    return restored


def check_finite(array: np.ndarray, title: str) -> None:
    """CheckpointError for a NaN or an infinity among floats; one of them ruins every text."""
    flat = array.reshape(-1)
    for piece in slices(0, flat.size, CHECK):
        if not np.isfinite(flat[piece]).all():
            raise CheckpointError(
                f"{title}: NaN or infinite numbers; copy or download the file again"
            )


def check_scales(scales: np.ndarray, title: str) -> None:
    """CheckpointError unless all scales are finite and none is negative."""
    scales = scales.astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise CheckpointError(
            f"{title}: negative or non-finite scales; copy or download the file again"
        )


def _restore_stored(
    entry: Entry, stored: StoredTrits, where, pool, check: bool
) -> QuantizedWeight1_58bit:
    """Trits as they are in the file, in the packing of memory."""

    def packed_slice(index):
        out = _aligned_empty([s.stop - s.start for s in index], np.uint8)
        with files.naming(entry.title):
            shards.load_trits(stored, index, out, pool.map, check)
        return out

    packed = _place(entry.restored.packed.shape, where.packed, packed_slice)
    scales = _place(stored.scales.shape, where.scales, lambda i: _aligned_copy(stored.scales[i]))
    return dataclasses.replace(entry.restored, packed=packed, scales=scales)


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


def _restore_ternary(entry: Entry, tensor, where, pool) -> QuantizedWeight1_58bit:
    gamma, pack = ternarize(tensor, entry.title, pool)

    def packed_slice(index):
        packed = pack(index if len(index) == 3 else (slice(0, 1), *index), entry.restored.block)
        return packed.reshape(packed.shape[-len(index) :])

    gamma = gamma.reshape(entry.restored.scales.shape)
    packed = _place(entry.restored.packed.shape, where.packed, packed_slice)
    scales = _place(gamma.shape, where.scales, gamma.__getitem__)
    return dataclasses.replace(entry.restored, packed=packed, scales=scales)


def ternarize(tensor: QuantizedWeight8bit, title: str, pool):
    """gamma of an int8 weight, float32 [E, 1, 1], and a function that packs a slice of its trits.

    `pack(index, block)` takes slices of [E, O, B], whole blocks of B, and returns these packed
    bytes. An E of 1 stands for none. The file is read twice: for the sums of |code| that gamma
    is made of, which must not depend on the mesh or the number of processes (they are exact
    integers, and each process sums its part), and for the trits.
    """
    stack = jax.tree.map(lambda array: array[None] if array.ndim == 2 else array, tensor)
    check_scales(stack.scales, title)
    scales = stack.scales.astype(np.float32)
    sums = _absolute_sums(stack, pool)
    gamma = quantize.absmean_of_sums(sums, scales, stack.shape[-2])
    zeros = quantize.zero_range(scales, gamma)
    return gamma, lambda index, block: _pack_slice(stack.weight, zeros, index, block, pool)


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
        for rows in slices(g * size, (g + 1) * size, max(1, CHUNK // outputs))
    ]
    chunks = chunks[jax.process_index() :: jax.process_count()]
    partial = pool.map(lambda at: quantize.absolute_sums(stack.weight[at[0], at[2]]), chunks)
    for (e, g, _), part in zip(chunks, partial, strict=True):
        sums[e, g] += part
    if jax.process_count() > 1:  # as int32, which JAX keeps: 128 times the rows
        sums = multihost_utils.process_allgather(sums.astype(np.int32)).sum(0, dtype=np.int64)
    return sums


def _pack_slice(weight, zeros, index, block: int, pool) -> np.ndarray:
    """Packed trits [E, O, B] of one slice of the packed array; zeros: see `quantize.zero_range`."""
    experts, outputs, width = index
    out = _aligned_empty([s.stop - s.start for s in index], np.uint8)
    per_row = weight.shape[1] // zeros[0].shape[1]  # rows of a scale group

    def convert(at):
        expert, taken = at  # `taken` bytes of each output, whole blocks
        rows = slice(4 * taken.start, min(4 * taken.stop, weight.shape[1]))
        for columns in slices(outputs.start, outputs.stop, COLUMNS):
            tile = weight[expert, rows, columns]
            codes = np.ones((4 * (taken.stop - taken.start), tile.shape[1]), np.uint8)
            for start in range(rows.start // per_row * per_row, rows.stop, per_row):
                group = slice(
                    max(start - rows.start, 0), min(start + per_row, rows.stop) - rows.start
                )
                lowest, highest = (bound[expert, start // per_row, columns] for bound in zeros)
                quantize.int8_to_codes(tile[group], lowest, highest, out=codes[group])
            here = slice(columns.start - outputs.start, columns.stop - outputs.start)
            there = slice(taken.start - width.start, taken.stop - width.start)
            packed = quantize.pack_codes(codes, block)
            # Transposed in the cache first: written across `out` directly, it takes twice as long.
            out[expert - experts.start, here, there] = np.ascontiguousarray(packed.T)

    per_chunk = max(1, CHUNK // (4 * block * weight.shape[2])) * block
    chunks = [
        (expert, taken)
        for expert in range(experts.start, experts.stop)
        for taken in slices(width.start, width.stop, per_chunk)
    ]
    list(pool.map(convert, chunks))
    return out
