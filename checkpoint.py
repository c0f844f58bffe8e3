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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import conversion
import files
import formats
import kernels
import quantize
import shards
import tensor_file
from conversion import aligned_empty, check_finite, check_scales, slices
from quantize import PackedWeight, QuantizedWeight
from tensor_file import CheckpointError, check_writable, read_tensor, write_tensor

FOLDER = files.RELEASED
PIECE = 1 << 20  # bytes that a thread copies or decodes at a time

Params = dict[str, dict[str, Any]]


# --- Checkpoint folders ---------------------------------------------------------------------------


def save(folder: str | os.PathLike, params: Params) -> None:
    """Writes `{module: {name: weight}}` to folder/ckpt-0 in the release's format and order.

    Leaves are float32 arrays or int8 QuantizedWeights; `save_converted` takes ternary ones. All is
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
    if folder.suffix == ".gguf":
        cure = f"convert.py {folder} FOLDER makes one of a GGUF file"
    elif (folder / file_name(0)).exists():
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


# Of parameters, by path; first match wins.
FAMILIES = (
    (r"/multi_head_attention/", "attention"),
    (r"/moe/", "experts"),
    (r"/linear", "feed-forward"),
    (r"/router/", "router"),
    (r"norm", "norms"),
    (r"", "embeddings"),
)


def family_of(path: str) -> str:
    """What a table of FAMILIES counts the parameter "module/name" as."""
    return next(name for pattern, name in FAMILIES if re.search(pattern, path))


# --- Converted checkpoints ------------------------------------------------------------------------


def save_converted(
    folder: str | os.PathLike,
    params: Params,
    config: dict,
    extra: dict[str, bytes] | None = None,
) -> None:
    """Writes `{module: {name: weight}}` to a new folder, in the format of `docs/format.md`.

    Leaves are weights of `formats.FORMATS`, as `config` says of each.

    config: of the model, with what `quantization` says of the weights
    extra: more files, {name: content}, such as the tokenizer
    """
    about = config["quantization_config"]
    leaves = {f"{module}/{name}": params[module][name] for module, name in sorted_keys(params)}
    named = quantize.match_rules(about["precision"], leaves)
    shutil.rmtree(shards.partial_folder(folder), ignore_errors=True)

    def fill(path, stored):
        weight = quantize.in_rows(leaves[path])
        for leaf, out in zip(jax.tree.leaves(weight), arrays_of(stored), strict=True):
            out[...] = np.asarray(leaf)

    def form(path, leaf):
        if not isinstance(leaf, PackedWeight):
            return leaf
        leaf = jax.eval_shape(quantize.in_rows, leaf)
        if jax.tree.structure(leaf) != jax.tree.structure(formats.shapes(named[path], leaf.shape)):
            raise CheckpointError(f"{path}: is not {named[path]}, as its precision says")
        return shards.stored_form(named[path], leaf.shape, about["packing"])

    forms = {path: form(path, leaf) for path, leaf in leaves.items()}
    shards.write(folder, forms, fill, config, extra)


def arrays_of(w) -> list:
    """The arrays of a stored weight; trits as `StoredTrits`."""
    return jax.tree.leaves(w, is_leaf=shards.is_trits)


def quantization(weights: str, precision: quantize.Rules, packing: str = "base3") -> dict:
    """What a converted checkpoint's `config.json` says of its weights.

    weights: the name of the precision table, precision: the table
    packing: of trits, one of shards.PACKINGS
    """
    about = {
        "quant_method": "ternary",
        "format_version": shards.VERSION,
        "weights": weights,
        "precision": [list(rule) for rule in precision],
        "packing": packing,
    }
    return {"quantization_config": about}


def default_weights(folder: str | os.PathLike) -> str:
    """The name of the precision that a checkpoint is in: what it was converted to, or "ternary".

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
    if about.get("format_version") not in shards.READ_VERSIONS:
        raise CheckpointError(
            f"{path}: format version {files.shown(about.get('format_version'))}, this code reads "
            f"{shards.READ_VERSIONS}; update it, or convert the checkpoint again"
        )
    if not isinstance(about.get("weights"), str):
        raise CheckpointError(
            f"{path}: weights {files.shown(about.get('weights'))} in quantization_config, expected "
            "the name of a precision table; copy it again"
        )
    return about["weights"]


def stored_precision(folder: str | os.PathLike) -> dict[str, str] | None:
    """{path: format} of a converted checkpoint, as its shards say; None for a released one."""
    if not shards.exists(folder):
        return None
    default_weights(folder)  # refuses what is of another version
    return {path: format_of(leaf) for path, (_, leaf) in shards.open_shards(folder).items()}


def formats_in(folder: str | os.PathLike, template: Params) -> dict[str, str]:
    """{path: format} of a checkpoint as it is stored, released or converted; errors as of
    `check_files`."""
    check_folder(folder)
    keys = sorted_keys(template)
    if (found := stored_precision(folder)) is None:
        sources = _released(pathlib.Path(folder), keys)
        tensors = zip(keys, sources, strict=True)
        found = {"/".join(key): format_of(read()) for key, (_, read) in tensors}
    return found


def format_of(stored) -> str:
    """The format, a name of formats.FORMATS, of a stored weight."""
    if isinstance(stored, PackedWeight):
        return stored.packed.format
    return "int8" if isinstance(stored, QuantizedWeight) else "float32"


# --- Restoring ------------------------------------------------------------------------------------


def restore(
    folder: str | os.PathLike,
    template: Params,
    precision: quantize.Rules,
    shardings: Callable[[Params], Params] | None = None,
    *,
    threads: int | None = None,
    progress: bool = False,
    check: bool = True,
    interleave: bool = False,
) -> Params:
    """The parameters `{module: {name: weight}}` of a folder, on the devices they belong to.

    template: `{module: {name: array or ShapeDtypeStruct}}` of logical shapes
    precision: the format of each parameter, a table for `quantize.match_rules` of "module/name" and
      names of formats.FORMATS: that of the file, or another one that is made from it, which
      float32 and int8 weights can be
    shardings: gives the sharding of every array of a tree like the result, from its shapes, such as
      `functools.partial(sharding.parameter_shardings, mesh)`; None for the default device
    threads: converting one tensor at a time; default: one for each core
    progress: a bar on stderr, of process 0 only
    check: looks at all numbers, which float32 or packed bytes may hold and a model may not: NaN,
      infinities, codes of 3
    interleave: packed weights, where the sizes of each device's part allow it, are as
      `quantize.interleave` makes them

    Host memory in use is that of one restored tensor and a few megabytes for each thread. The files
    are mapped, and each process reads the slices of its devices; what is made ternary by absmean
    is read once by all processes together besides. Raises CheckpointError, before anything is
    converted, if a file is missing, left over, damaged, or not what template and precision say, and
    later for what `check` finds.
    """
    entries, placement = plan(folder, template, precision, shardings, interleave)
    return restore_entries(entries, placement, threads=threads, progress=progress, check=check)


def plan(
    folder: str | os.PathLike,
    template: Params,
    precision: quantize.Rules,
    shardings: Callable[[Params], Params] | None = None,
    interleave: bool = False,
) -> tuple[list["Entry"], Params]:
    """What `restore` is to read, and where to put it, for `restore_entries`; same arguments."""
    entries = check_files(pathlib.Path(folder), template, precision)
    placement = placement_of(entries, shardings)
    if interleave:
        entries = [_interleaved(entry, placement[entry.module][entry.name]) for entry in entries]
        placement = placement_of(entries, shardings)
    return entries, placement


def _interleaved(entry: "Entry", where) -> "Entry":
    """An entry that is restored with outputs side by side, where each device's part allows it."""
    w = entry.restored
    if isinstance(w, PackedWeight):
        part = where.packed.shard_shape(w.packed.shape)[-2:]
        if quantize.interleaves(*part, w.block):
            return dataclasses.replace(entry, restored=_side_by_side_shapes(w))
    return entry


@functools.cache  # layers are alike
def _side_by_side_shapes(w: PackedWeight) -> PackedWeight:
    return jax.eval_shape(quantize.interleave, w)


def placement_of(
    entries: Sequence["Entry"], shardings: Callable[[Params], Params] | None = None
) -> Params:
    """The sharding of every array of all parameters, from `check_files`; see `restore`."""
    abstract: Params = {}
    for entry in entries:
        abstract.setdefault(entry.module, {})[entry.name] = entry.restored
    default = jnp.zeros(()).sharding
    placement = shardings(abstract) if shardings else jax.tree.map(lambda _: default, abstract)
    _check_placement(entries, placement)
    return placement


def restore_entries(
    entries: Sequence["Entry"],
    placement: Params,
    *,
    threads: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> Params:
    """What `restore` gives of some parameters: of those of a layer, for models that do not fit.

    entries: some of those of `check_files`; placement: of all of them, from `placement_of`
    """
    params: Params = {}
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
            params.setdefault(entry.module, {})[entry.name] = leaf
            bar.update(entry.bytes)
    return params


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter, where it is read, and the format and shapes that it is restored to."""

    module: str
    name: str
    file: pathlib.Path
    read: Callable  # () -> the tensor, mapped
    format: str
    restored: Any
    bytes: int

    @property
    def path(self) -> str:
        return f"{self.module}/{self.name}"

    @property
    def title(self) -> str:
        return f"{self.file}: {self.path}"


def check_files(folder: pathlib.Path, template: Params, precision) -> list[Entry]:
    """All parameters of a checkpoint, in order; CheckpointError for the first few that do not fit.

    Reads the header of every file. Arguments as in `restore`.
    """
    keys = sorted_keys(template)
    named = quantize.match_rules(precision, [f"{module}/{name}" for module, name in keys])
    for format in sorted(set(named.values())):
        formats.format_named(format)
    check_folder(folder)
    sources = _converted_files(folder, keys) if shards.exists(folder) else _released(folder, keys)
    entries, problems = [], []
    for (module, name), (file, read) in zip(keys, sources, strict=True):
        format = named[f"{module}/{name}"]
        try:
            tensor = read()
            restored = restored_shapes(tensor, tuple(template[module][name].shape), format)
            size = shards.stored_bytes(tensor)
            entries.append(Entry(module, name, file, read, format, restored, size))
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


def restored_shapes(tensor, shape: tuple[int, ...], format: str):
    """The ShapeDtypeStructs of a format that a stored tensor is restored to.

    CheckpointError unless the tensor is a sound one of this logical shape, and of that format, or
    of another that it can be made from.
    """
    stored = format_of(tensor)
    if format != stored and (isinstance(tensor, PackedWeight) or format == "float32"):
        raise CheckpointError(
            f"it is {stored} in the file, which cannot become {format}; leave the choice of "
            "weights to the checkpoint, or choose a precision that says so of this parameter"
        )
    if _describe(tensor) != (expected := _expected(tensor, shape)):
        raise CheckpointError(
            f"expected {expected}, found {_describe(tensor)}; choose the preset that the "
            "checkpoint was made for"
        )
    if format != stored:
        if len(shape) not in (2, 3):
            raise CheckpointError(f"an array {list(shape)} is no matrix, and cannot be {format}")
        return formats.shapes(format, shape)
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
        tensor,
        is_leaf=shards.is_trits,
    )


def _describe(tensor) -> str:
    if isinstance(tensor, PackedWeight):
        return f"{format_of(tensor)} {list(tensor.shape)} in blocks of {tensor.block}"
    return tensor_file.describe(tensor)


def _expected(tensor, shape: tuple[int, ...]) -> str:
    """What `_describe` says of a sound tensor of this format and logical shape.

    G belongs to the file: where the one found divides I it is expected, else any is.
    """
    if isinstance(tensor, np.ndarray):
        return f"float32 {list(shape)}"
    if len(shape) not in (2, 3):
        return f"no matrix, but an array {list(shape)}"
    *lead, inputs, outputs = shape
    if isinstance(tensor, PackedWeight):
        block = quantize.packing_block(inputs)
        return f"{format_of(tensor)} {list(shape)} in blocks of {block}"
    groups: Any = tensor.scales.shape[-2] if tensor.scales.ndim > 1 else 0
    if groups == 0 or inputs % groups:
        groups = f"a divisor of {inputs}"
    scales = ", ".join(map(str, [*lead, groups, outputs]))
    return f"int8 {list(shape)} with scales bfloat16 [{scales}]"


def _check_placement(entries: list[Entry], placement: Params) -> None:
    for entry in entries:
        where = placement[entry.module][entry.name]
        try:
            local = jax.tree.map(lambda x, s: s.shard_shape(x.shape), entry.restored, where)
        except ValueError as error:
            raise CheckpointError(
                f"{entry.title}: {error}; choose a mesh that divides this axis"
            ) from None
        if not isinstance(local, PackedWeight) or local.interleaved:
            continue
        if local.packed[-1] % entry.restored.block_bytes:
            raise CheckpointError(
                f"{entry.title}: a shard of {local.packed[-1]} packed bytes cuts a block of "
                f"{local.block}; choose a smaller mesh axis for it"
            )


def _restore_one(entry: Entry, where, pool, check: bool):
    tensor = entry.read()
    if not isinstance(tensor, np.ndarray):
        check_scales(tensor.scales, entry.title)
    if entry.format == format_of(tensor):

        def read(array, index):
            with files.naming(entry.title):
                copy = _read(array, index, pool)
            if check and copy.dtype == np.float32:
                check_finite(copy, entry.title)
            return copy

        if isinstance(tensor, PackedWeight):
            trits = dataclasses.replace(tensor.packed, check=check)
            tensor = dataclasses.replace(tensor, packed=trits)
        parts = jax.tree.map(lambda x: functools.partial(read, x), tensor, is_leaf=shards.is_trits)
    else:
        parts = _converted_parts(entry, tensor, where, pool)
    if isinstance(parts, PackedWeight) and entry.restored.interleaved:
        parts = _side_by_side(parts, pool)
    restored = jax.tree.map(
        lambda make, x, sharding: _place(x.shape, sharding, make), parts, entry.restored, where
    )
    for array in shards.parts("", tensor).values():
        tensor_file.release(array)
    return restored


def _side_by_side(parts: PackedWeight, pool) -> PackedWeight:
    """`parts` of a weight in rows, functions of an index, as those of an interleaved one."""

    def packed(index):
        rows = np.ascontiguousarray(parts.packed(_packed_rows(index)))  # changed in place
        groups = rows.reshape(-1, quantize.LANES * rows.shape[-1])
        for _ in pool.map(kernels.interleave, np.array_split(groups, -(-len(groups) // 8))):
            pass
        return rows.reshape([s.stop - s.start for s in index])

    def multipliers(index):
        rows = parts.multipliers(_multiplier_rows(index))
        return np.ascontiguousarray(quantize.interleave_multipliers(rows))

    return dataclasses.replace(
        parts,
        packed=packed,
        multipliers=None if parts.multipliers is None else multipliers,
        interleaved=True,
    )


def _packed_rows(index: tuple[slice, ...]) -> tuple[slice, ...]:
    """Where in rows of bytes lies what has this index in interleaved ones."""
    *lead, groups, quads, _, _ = index
    return (*lead, _times(groups, quantize.LANES), _times(quads, quantize.QUAD))


def _multiplier_rows(index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The same of multipliers."""
    *lead, groups, inputs, planes, _ = index
    return (*lead, _times(groups, quantize.LANES), inputs, planes)


def _times(s: slice, by: int) -> slice:
    return slice(by * s.start, by * s.stop)


def _read(array, index: tuple[slice, ...], pool) -> np.ndarray:
    """A copy of a slice of a stored array; a parameter must not change, or end, with its file."""
    out = aligned_empty([s.stop - s.start for s in index], array.dtype)

    def copy(piece):
        pairs = zip(piece, index, strict=True)
        here = out[tuple(slice(p.start - i.start, p.stop - i.start) for p, i in pairs)]
        if shards.is_trits(array):
            array.read(piece, here)
        else:
            here[...] = array[piece]

    for _ in pool.map(copy, _pieces(index, out.itemsize)):
        pass
    return out


def _pieces(index: tuple[slice, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cover those of an index, of at most PIECE bytes, or one number."""
    if not index:
        yield ()
        return
    first, *rest = index
    row = itemsize * math.prod(s.stop - s.start for s in rest)
    for some in slices(first.start, first.stop, max(1, PIECE // max(1, row))):
        for inner in _pieces(tuple(rest), itemsize) if row > PIECE else [rest]:
            yield (some, *inner)


def _converted_parts(entry: Entry, tensor, where, pool):
    """A parameter in another format than the file's, made of the slice that this process needs.

    Its arrays, in rows, are functions of an index, within what this process's devices hold.
    """
    made = formats.shapes(entry.format, entry.restored.shape)
    packed = isinstance(made, PackedWeight)

    def hull(x, sharding):  # in which all slices of this process's devices lie
        if not packed:
            return tuple(slice(0, size) for size in x.shape)
        indices = sharding.addressable_devices_indices_map(x.shape).values()
        return tuple(
            slice(min(i.indices(size)[0] for i in axis), max(i.indices(size)[1] for i in axis))
            for size, axis in zip(x.shape, zip(*indices, strict=True), strict=True)
        )

    hulls = jax.tree.map(hull, entry.restored, where)
    if packed and hulls.interleaved:
        multipliers = hulls.multipliers and _multiplier_rows(hulls.multipliers)
        hulls = dataclasses.replace(
            hulls, packed=_packed_rows(hulls.packed), multipliers=multipliers, interleaved=False
        )
    *experts, rows, columns = hulls.packed if packed else hulls.codes
    index = (*(experts or [slice(0, 1)]), *((rows, columns) if packed else (columns, rows)))
    part = conversion.converter(tensor, entry.format, entry.title, pool)(index)

    def of(x, array, hull):
        array = array.reshape(array.shape[-len(x.shape) :])  # without an axis of experts

        def make(index):
            pairs = zip(index, hull, strict=True)
            return array[tuple(slice(i.start - h.start, i.stop - h.start) for i, h in pairs)]

        return make

    return jax.tree.map(of, made, part, hulls)


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


def taken_over(array: np.ndarray, sharding) -> jax.Array:
    """An array in the host's memory as one of JAX, on a sharding's one CPU.

    It is not copied if it begins at a multiple of 64 bytes, and must not change then. JAX neither
    writes nor frees it: where a function is given it to be donated, that gets a copy.
    """
    return _place(array.shape, sharding, lambda index: array)
