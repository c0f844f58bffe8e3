"""Convert the released weights once, to a checkpoint a fifth the size that loads in seconds.

    python convert.py --download checkpoints/grok-1
    python convert.py checkpoints/grok-1 checkpoints/grok-1-ternary
    python convert.py --verify checkpoints/grok-1-ternary
    python convert.py --inspect checkpoints/grok-1-ternary --source checkpoints/grok-1
    python convert.py --layout cpu checkpoints/grok-1-ternary
    python convert.py checkpoints/grok-1-ternary grok-1.gguf --gguf auto

The last but one puts a file beside a converted checkpoint that a CPU maps instead of loading it;
the last one makes a GGUF file for llama.cpp, and `convert.py grok-1.gguf FOLDER` goes back. Or all
at once, where there is no room for the release: each file is fetched, converted and deleted.

    python convert.py --stream checkpoints/grok-1-ternary

Run again after an interruption, each goes on where it stopped, but --layout and --gguf begin again.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import calibration
import card
import checkpoint
import conversion
import data
import download
import files
import formats
import gguf_file
import gguf_grok
import kernels
import layouts
import model
import planning
import quantize
import recovery
import runners
import shards
import tokenizer
import tuning
from checkpoint import CheckpointError, readable_size
from conversion import slices
from quantize import PackedWeight, QuantizedWeight
from tensor_file import read_tensor, release

COPY = 1 << 25  # bytes that are copied at a time
TILE = 1 << 21  # weights that are compared with their source at a time
GROUPS = 8  # scale groups of the release where it sharded the inputs, 8 ways

LAYOUTS = ("cpu",)

REPORT = "calibration.json"  # of a calibrated checkpoint: how each matrix was converted

byte_bar = functools.partial(tqdm.tqdm, unit="B", unit_scale=True)


# --- Converting -----------------------------------------------------------------------------------


def convert(
    entries: Sequence[checkpoint.Entry],
    output: Path,
    config: dict,
    extra: dict[str, bytes],
    *,
    source: str,
    packing: str = "base3",
    shard_size: int = shards.SHARD_SIZE,
    threads: int | None = None,
    progress: bool = False,
    calibrate: Callable[..., calibration.Calibration] | None = None,
    noted: dict | None = None,
    sealed: Callable[[shards.Shard], None] = lambda shard: None,
) -> None:
    """Writes a checkpoint's parameters to a converted one, one after the other; resumes.

    entries: of all parameters, from `checkpoint.check_files`
    config, extra, source, shard_size, sealed: as in `shards.write`
    packing: one of shards.PACKINGS
    threads: at work on a tensor; default: one for each core
    progress: a bar on stderr
    calibrate: makes a `Calibration` that is to convert the layers, given who is told of its
      progress; entries are then in the order of the layers, and each layer has its own shards
    noted: what its report says besides

    Host memory in use is a few dozen megabytes for each thread; files are mapped both ways, and
    their pages given back as they are done with.
    """
    by_path = {entry.path: entry for entry in entries}
    number = {path: i + 1 for i, path in enumerate(by_path)}
    leaves = {path: stored_form(entry, packing) for path, entry in by_path.items()}
    filled, written = set(), 0
    begins = layer_begins(by_path) if calibrate else ()
    with (
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        byte_bar(total=sum(e.bytes for e in entries), disable=not progress) as bar,
    ):

        def advance(entry, weights):
            bar.update(entry.bytes * weights // math.prod(entry.restored.shape))

        work = calibrate(advance) if calibrate else None

        def fill(path, stored):
            nonlocal written
            bar.set_description(f"tensor {number[path]}/{len(number)}", refresh=False)
            entry = by_path[path]
            # Every layer, also one without packed weights: the next one needs its outputs.
            made = work.weight(path) if work and calibration.layer_of(path) is not None else None
            if made is None:
                fill_alone(entry, stored)
            else:
                made = jax.tree.map(np.asarray, conversion.stacked(made))
                targets = checkpoint.arrays_of(conversion.stacked(stored))
                for array, out in zip(jax.tree.leaves(made), targets, strict=True):
                    for expert, values in enumerate(array):
                        _store(values, out, expert, pool)
                if not isinstance(stored, PackedWeight):
                    check_numbers(made, entry.title)
                    bar.update(entry.bytes)
            filled.add(path)
            written += shards.stored_bytes(stored)
            bar.set_postfix_str(f"{readable_size(written)} written", refresh=False)

        def fill_alone(entry, stored):
            tensor = entry.read()
            if entry.format == checkpoint.format_of(tensor):
                if not isinstance(tensor, np.ndarray):
                    conversion.check_scales(tensor.scales, entry.title)
                for array, out in zip(*map(checkpoint.arrays_of, (tensor, stored)), strict=True):
                    _copy(array, out, entry.title, bar.update)
            else:
                _fill_converted(entry, tensor, stored, pool, bar.update)

        def done(shard):
            bar.update(sum(by_path[path].bytes for path in shard.leaves if path not in filled))
            if work:
                work.sealed(shard.leaves)
            sealed(shard)

        if work:
            extra = extra | {REPORT: lambda: files.json_bytes({**work.report(), **(noted or {})})}
        shards.write(
            output,
            leaves,
            fill,
            config,
            extra,
            source=source,
            shard_size=shard_size,
            begins=begins,
            sealed=done,
        )
        if work:
            work.remove()


def check_numbers(w, title: str) -> None:
    """CheckpointError for floats, or scales of int8, that are no numbers."""
    if isinstance(w, QuantizedWeight):
        conversion.check_scales(w.scales, title)
    else:
        conversion.check_finite(w, title)


def layer_begins(paths: Iterable[str]) -> list[str]:
    """Of paths in the order of the layers, the first one of each layer, and of what follows."""
    return [next(paths) for _, paths in itertools.groupby(paths, key=calibration.layer_of)]


def stored_form(entry: checkpoint.Entry, packing: str):
    """The abstract leaf that a parameter is stored as."""
    if not isinstance(entry.restored, PackedWeight):
        return entry.restored
    return shards.stored_form(entry.format, entry.restored.shape, packing)


def _fill_converted(entry, tensor, stored, pool, update) -> None:
    """Makes a parameter of another format than its file's, an expert at a time."""
    make = conversion.converter(tensor, entry.format, entry.title, pool)
    experts, inputs, outputs = (1, *entry.restored.shape)[-3:]
    packed = isinstance(stored, PackedWeight)
    width = stored.packed.shape[-1] if packed else inputs
    targets = checkpoint.arrays_of(conversion.stacked(stored))
    for e in range(experts):
        made = make((slice(e, e + 1), slice(0, outputs), slice(0, width)))
        for array, out in zip(jax.tree.leaves(made), targets, strict=True):
            _store(array[0], out, e, pool)
        for array in (tensor, *shards.parts("", stored).values()):
            release(array.codes if isinstance(array, QuantizedWeight) else array)
        update(entry.bytes // experts)
    update(entry.bytes % experts)


def _store(array: np.ndarray, out, expert: int, pool) -> None:
    def store(piece):
        out[expert, piece] = array[piece]

    rows = max(1, shards.PIECE // max(1, array[:1].nbytes))
    for _ in pool.map(store, slices(0, len(array), rows)):
        pass


def _copy(source, out, title: str, update) -> None:
    rows = max(1, COPY // max(1, source[:1].nbytes))
    for piece in slices(0, len(source), rows):
        values = source[piece]
        if values.dtype == np.float32:
            conversion.check_finite(values, title)
        out[piece] = values
        release(source)
        release(out)
        update(values.nbytes)


# --- Sources --------------------------------------------------------------------------------------


class Stream:
    """The release on the hub, a file at a time: fetched ahead, and deleted once it is stored."""

    def __init__(self, folder: Path, repo: str, template: dict, precision, by_layer: bool = False):
        """Files are kept in folder/ckpt-0 as long as they are needed.

        by_layer: in the order of the layers, not of the files
        """
        self.folder, self.repo = folder, repo
        keys = list(enumerate(checkpoint.sorted_keys(template)))
        if by_layer:
            keys.sort(key=lambda key: calibration.order(key[1][0]))
        self.files = {
            f"{module}/{name}": folder / checkpoint.FOLDER / checkpoint.file_name(i)
            for i, (module, name) in keys
        }
        self.following = dict(itertools.pairwise(self.files.values()))
        self.ahead = concurrent.futures.ThreadPoolExecutor(1)
        self.fetching: dict[Path, concurrent.futures.Future] = {}
        self.closed = False
        named = quantize.match_rules(precision, self.files)
        self.entries = [
            self._entry(module, name, template[module][name].shape, named[f"{module}/{name}"])
            for _, (module, name) in keys
        ]

    def _entry(self, module, name, shape, format) -> checkpoint.Entry:
        file = self.files[f"{module}/{name}"]
        expected = _released_form(module, shape, format)
        made = formats.format_named(format).packed
        restored = formats.shapes(format, shape) if made else expected

        def read():
            self.fetch(file)
            tensor = read_tensor(self.fetching.pop(file).result())
            if file in self.following:
                self.fetch(self.following[file])
            found = checkpoint.restored_shapes(tensor, shape, format)
            if found != restored:
                raise CheckpointError(
                    f"{file}: {module}/{name}: found {found}, expected {restored}; --download the "
                    "release, then convert it"
                )
            return tensor

        return checkpoint.Entry(
            module, name, file, read, format, restored, shards.stored_bytes(expected)
        )

    def fetch(self, file: Path) -> None:
        def stop_when_closed(count):
            if self.closed:
                raise concurrent.futures.CancelledError

        if file not in self.fetching:
            self.fetching[file] = self.ahead.submit(
                download.tensor, self.folder, file.name, self.repo, advance=stop_when_closed
            )

    def delete(self, shard: shards.Shard) -> None:
        for path in shard.leaves:
            self.files[path].unlink(missing_ok=True)

    def close(self) -> None:
        """Stops what is being fetched; the next time it goes on there."""
        self.closed = True
        self.ahead.shutdown(cancel_futures=True)


def _released_form(module: str, shape: tuple[int, ...], format: str):
    """Shapes of a tensor in the release; it shares out the inputs of output projections, 8 ways."""
    if format == "float32":
        return jax.ShapeDtypeStruct(shape, np.float32)
    *lead, inputs, outputs = shape
    groups = GROUPS if re.search(r"moe/linear_1$|attention/linear$", module) else 1
    return QuantizedWeight(
        jax.ShapeDtypeStruct(shape, np.int8),
        jax.ShapeDtypeStruct((*lead, groups, outputs), jnp.bfloat16),
    )


# --- Inspecting -----------------------------------------------------------------------------------


class Measure(NamedTuple):
    """What `inspect` tells of a parameter, and in sums of a family.

    nonzero: of its trits, None if it has none
    error, energy: sums of |W - W'|^2 and |W|^2 over the source's W, None without one
    """

    weights: int
    bytes: int
    nonzero: int | None = None
    error: float | None = None
    energy: float | None = None

    @property
    def density(self) -> str:
        return "" if self.nonzero is None else f"{self.nonzero / self.weights:.4f}"

    @property
    def relative_error(self) -> str:
        return "" if self.error is None else f"{self.error / max(self.energy, 1e-30):.4f}"


def measure(stored, original, pool, update=lambda count: None) -> Measure:
    """Reads a stored parameter, and the source's where there is one, None where there is not."""
    weights, size = math.prod(stored.shape), shards.stored_bytes(stored)
    if isinstance(stored, np.ndarray) and stored.ndim < 2:
        stored, original = (w if w is None else w[None] for w in (stored, original))
    stack, source = (w if w is None else conversion.stacked(w) for w in (stored, original))
    packed = isinstance(stored, PackedWeight)
    experts, inputs, outputs = (1, *stored.shape)[-3:]
    tiles = [
        (slice(e, e + 1), columns)
        for e in range(experts)
        for columns in slices(0, outputs, max(1, TILE // inputs))
    ]

    def one(tile):
        part = conversion.outputs_of(stack, *tile)
        found = [np.count_nonzero(quantize.codes_of(part)) if packed else 0, 0.0, 0.0]
        if source is not None:
            w = quantize.dequantize(conversion.outputs_of(source, *tile))
            error = np.square(w - quantize.dequantize(part)).sum(dtype=float)
            found[1:] = error, np.square(w).sum(dtype=float)
        update(size // len(tiles))
        return found

    nonzero, error, energy = map(sum, zip(*pool.map(one, tiles), strict=True))
    for leaf in (stored, original):
        for array in () if leaf is None else shards.parts("", leaf).values():
            release(array)
    errors = (None, None) if original is None else (error, energy)
    return Measure(weights, size, nonzero if packed else None, *errors)


def inspect(folder: Path, source: Path | None, progress: bool) -> None:
    """Prints a table of a converted checkpoint's parameters, and one of their families."""
    check_converted(folder)
    if source is not None:
        check_source(source)
    stored = shards.open_shards(folder)
    originals: dict[str, Any] = {}
    if source is not None:
        template = model.abstract_params(resolve_config(source))
        precision = {path: checkpoint.format_of(leaf) for path, (_, leaf) in stored.items()}
        try:
            originals = {e.path: e for e in checkpoint.check_files(source, template, precision)}
        except ValueError as error:
            raise CheckpointError(f"{folder} was not made from {source}: {error}") from None
    widths = f"{{:{max(map(len, stored))}}} {{:>15}} {{:>16}} {{:>8}} {{:>11}} {{:>15}} {{:>7}}"
    row = widths.format
    print(row("parameter", "format", "shape", "density", "scale", "bytes", "error"))
    families: dict[str, list[Measure]] = {}
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        byte_bar(
            total=sum(shards.stored_bytes(leaf) for _, leaf in stored.values()),
            disable=not progress,
        ) as bar,
    ):
        for path, (file, leaf) in stored.items():
            original = originals[path].read() if originals else None
            with files.naming(f"{file}: {path}"):
                found = measure(leaf, original, pool, bar.update)
            scale = f"{leaf.scales.mean():.5g}" if isinstance(leaf, PackedWeight) else ""
            described = path, checkpoint.format_of(leaf), " x ".join(map(str, leaf.shape))
            size = f"{found.bytes:,}"
            line = row(*described, found.density, scale, size, found.relative_error)
            bar.write(line, file=sys.stdout)
            families.setdefault(checkpoint.family_of(path), []).append(found)
    row = "{:12} {:>16} {:>17} {:>12} {:>8} {:>7}".format
    print("\n" + row("family", "weights", "bytes", "bits/weight", "density", "error"))
    total = [found for group in families.values() for found in group]
    for name, group in [*families.items(), ("all", total)]:
        found = summed(group)
        bits = f"{8 * found.bytes / found.weights:.3f}"
        print(
            row(
                name,
                f"{found.weights:,}",
                f"{found.bytes:,}",
                bits,
                found.density,
                found.relative_error,
            )
        )
    if layout := layouts.open_layout(folder):
        mapped = f"{len(layout.header.forms)} parameters as a CPU has them"
        print(f"\n{layout.path.name}: {layout.header.size:,} bytes, {mapped}")


def summed(group: Sequence[Measure]) -> Measure:
    """The measure of several parameters; None where one of them has none."""
    columns = zip(*group, strict=True)
    return Measure(*(None if None in column else sum(column) for column in columns))


# --- The command ----------------------------------------------------------------------------------


def positive(kind: type, text: str) -> float:
    """A number of an option; the parser says which one."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r:.100}")
    return value


def budget(text: str) -> str:
    """A number of GB, or one of planning.GPUS, in one way of writing."""
    return text if text in planning.GPUS else f"{positive(float, text):.12g}"


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="released, and converted to write; either may be a GGUF file instead",
    )
    action = parser.add_mutually_exclusive_group()
    do = action.add_argument
    do("--download", type=Path, metavar="FOLDER", help="fetch the release and the tokenizer")
    do("--stream", type=Path, metavar="FOLDER", help="fetch and convert, file by file")
    do("--verify", type=Path, metavar="FOLDER", help="compare all of a checkpoint with its sums")
    do("--inspect", type=Path, metavar="FOLDER", help="table of a converted checkpoint")
    do(
        "--layout",
        choices=LAYOUTS,
        help="of a converted checkpoint: puts a file beside it with the weights as a CPU's memory "
        "has them, which starts at once, is shared by processes, and may be larger than memory",
    )
    do(
        "--gguf",
        choices=gguf_grok.CHOICES,
        metavar="TYPE",
        help="writes a GGUF file for llama.cpp, with the matrices as one of "
        f"{', '.join(gguf_grok.CHOICES)}. A checkpoint that is not ternary yet is made so first, "
        "or what --weights says; with Q8_0, F16 and F32 it stays as it is. auto: for each matrix "
        f"the first of {', '.join(gguf_grok.AUTO)} that holds it exactly, else F32",
    )
    add(
        "--embeddings",
        choices=gguf_grok.TABLES,
        help="of a GGUF file (F16; Q8_0 if the model keeps them in int8)",
    )
    add("--source", type=Path, metavar="FOLDER", help="released: --inspect tells the error too")
    add("--preset", choices=model.PRESETS, help="configuration (config.json, else grok-1)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--weights",
        choices=model.PRECISIONS,
        help="precision of the converted weights (ternary)",
    )
    precision.add_argument(
        "--precision",
        type=Path,
        metavar="FILE",
        help='the same as a table of one\'s own, JSON: [["/moe/", "ternary2-128"], ...]',
    )
    precision.add_argument(
        "--budget",
        type=budget,
        metavar="GB",
        help="of memory for the weights: each matrix gets the format that --calibrate's text calls "
        f"for; or one of {sorted(planning.GPUS)}",
    )
    add(
        "--calibrate",
        metavar="TEXT",
        help=f"round for the first nine tenths of a text file, or one of {sorted(data.SOURCES)}",
    )
    add(
        "--calibration-tokens",
        type=functools.partial(positive, int),
        metavar="N",
        help=f"of the text, spread over it ({calibration.TOKENS})",
    )
    add(
        "--recover",
        type=functools.partial(positive, int),
        metavar="N",
        help="then take gradients of N of these tokens in each layer, towards the source's outputs",
    )
    add(
        "--tune",
        type=functools.partial(positive, int),
        metavar="N",
        help="at last take gradients of N tokens in the whole model, if it fits: scales, norms and "
        "routers learn the source's predictions",
    )
    add(
        "--activations",
        choices=quantize.ACTIVATIONS,
        help="what the converted matrices are to be multiplied with (as the source says)",
    )
    add(
        "--packing",
        choices=shards.PACKINGS,
        default="base3",
        help="of trits in the files: five to a byte, or four, which load faster (%(default)s)",
    )
    size, count = functools.partial(positive, float), functools.partial(positive, int)
    add("--shard-size", type=size, default=2.0, metavar="GB", help="of a file (%(default)s)")
    add("--threads", type=count, help="at work on a tensor (one for each core)")
    add("--repo", default=download.REPO, help="on the hub, to fetch from (%(default)s)")
    args = parser.parse_args(argv)
    chosen = args.download or args.stream or args.verify or args.inspect
    args.from_gguf = bool(args.folders) and not chosen and args.folders[0].suffix == ".gguf"
    if args.layout and len(args.folders) != 1:
        parser.error("--layout takes the FOLDER of one converted checkpoint")
    if not args.layout and len(args.folders) != (0 if chosen else 2):
        parser.error("give SOURCE and OUTPUT folders, or one of the flags with its own")
    check_gguf_arguments(parser, args)
    if args.budget and not args.calibrate:
        parser.error("--budget chooses by a text; give one with --calibrate")
    for name in ("calibration_tokens", "recover", "tune"):
        if getattr(args, name) and not args.calibrate:
            parser.error(f"--{name.replace('_', '-')} is of a text; give one with --calibrate")
    args.calibration_tokens = args.calibration_tokens or calibration.TOKENS
    if args.tune and args.stream:
        parser.error(
            "--tune takes the whole release into memory, and --stream deletes it; --download it, "
            "then convert the folder"
        )
    if args.budget and args.stream:
        parser.error(
            "--budget reads the release twice, and --stream would fetch it twice; --download it, "
            "then convert the folder"
        )
    return args


def check_gguf_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program for flags that do not go with a GGUF file."""
    if args.embeddings and not args.gguf:
        parser.error("--embeddings is of a GGUF file; give --gguf TYPE, too")
    if args.gguf and (args.budget or args.calibrate):
        parser.error("--gguf takes no text; convert to a folder first, then give that folder")
    if not args.gguf and args.folders[1:] and args.folders[1].suffix == ".gguf":
        parser.error(f"to write {args.folders[1]}, give --gguf TYPE, such as --gguf auto")
    if args.from_gguf:
        others = ("gguf", "weights", "precision", "budget", "calibrate", "preset")
        if name := next((name for name in others if getattr(args, name)), None):
            parser.error(
                f"--{name} is not for a GGUF file, which becomes a folder as it is; convert it to "
                f"a folder, then that folder with --{name}"
            )


def report(**lines: str) -> None:
    for name, value in lines.items():
        print(f"{name:<12}{value}", file=sys.stderr)


def peak_memory() -> int:
    """Bytes that this process has had in memory at most, mapped pages of files included."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024  # getrusage's is that of the parent, if larger


def resolve_config(folder: Path | None, preset: str | None = None) -> model.LanguageModelConfig:
    """The preset, or the configuration of a checkpoint folder, if any, or else Grok-1's."""
    if preset:
        return model.PRESETS[preset]
    return model.config_from_dict(folder and checkpoint.read_config(folder))


def check_source(folder: Path) -> None:
    """CheckpointError unless the folder holds weights that others can be made from."""
    checkpoint.check_folder(folder)
    for path, format in (checkpoint.stored_precision(folder) or {}).items():
        if formats.format_named(format).packed:
            raise CheckpointError(
                f"{folder}: is converted already, {path} is {format}; give the checkpoint that it "
                "was made from"
            )


def check_converted(folder: Path) -> None:
    """CheckpointError unless the folder holds a converted checkpoint."""
    checkpoint.check_folder(folder)
    if not shards.exists(folder):
        raise CheckpointError(
            f"{folder}: a released checkpoint, which has no sums; convert.py {folder} OUTPUT makes "
            "one that has"
        )


def find_tokenizer(folder: Path | None, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer to put beside the converted weights, {name: content}, if there is one."""
    try:
        processor = tokenizer.load(folder, vocab_size)
    except ValueError as error:
        report(note=f"no tokenizer beside the weights: {error}")
        return {}
    return {tokenizer.FILE: processor.serialized_model_proto()}


def other_files(
    folder: Path, config: dict, entries: Sequence[checkpoint.Entry], packing: str
) -> dict[str, bytes]:
    """What a converted checkpoint has besides its weights: the tokenizer of a folder, and a card.

    config: of its config.json
    """
    leaves = {entry.path: stored_form(entry, packing) for entry in entries}
    found = find_tokenizer(folder, config["vocab_size"])
    return found | {card.NAME: card.model_card(config, leaves)}


def check_space(
    output: Path,
    entries: Sequence[checkpoint.Entry],
    packing: str,
    shard_size: int,
    streamed: bool,
    kept: int = 0,
) -> None:
    """OSError if the disk has no room for what is still to be written.

    A stream keeps its sources until their shard is safe: those of two shards, and the next file.
    kept: bytes that are there only as long as it is converted
    """
    plan = shards.plan({e.path: stored_form(e, packing) for e in entries}, shard_size)
    sources = {entry.path: entry.bytes for entry in entries}
    needed = kept + sum(shard.size for shard in plan)
    if streamed:
        needed += 2 * max(sum(sources[path] for path in shard.leaves) for shard in plan)
        needed += max(sources.values())
    partial = shards.partial_folder(output)
    done = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    check_room(output, needed - done)


def check_room(path: Path, needed: int) -> None:
    """OSError if the disk has no room for so many bytes of a file or folder."""
    where = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(where).free
    if needed > free:
        raise OSError(
            f"{path} needs {readable_size(needed)}, {where} has {readable_size(free)} "
            "free; make room, or choose a folder on another disk"
        )


def convert_command(args: argparse.Namespace) -> None:
    source, output = (None, args.stream) if args.stream else args.folders
    if source is not None:
        check_source(source)
    if args.tune and not output.exists():
        tune(args, source, output)
        return
    config = configured(args, resolve_config(source, args.preset))
    template = model.abstract_params(config)
    scratch = output.parent / f"{output.name}.download"
    kept = output.parent / f"{output.name}.calibration"
    text = noted = None
    if args.calibrate:
        text = data.split(data.load_text(args.calibrate))[0]
    if args.budget:
        noted = choose_formats(
            args, config, template, windows_of(source, config, text, args.calibration_tokens)
        )
        weights, precision = f"budget-{args.budget}", planning.rules(noted["budget"]["chosen"])
    else:
        weights, precision = resolve_precision(args)
    named = model.formats_of(template, precision)
    about = model.config_to_dict(config)
    about |= checkpoint.quantization(weights, precision, args.packing)
    if text is not None:
        check_calibrated(named)
        about["quantization_config"]["calibration"] = {
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": args.calibration_tokens,
        } | {name: getattr(args, name) for name in ("recover", "tune") if getattr(args, name)}
    if output.exists():
        check_complete(output, about)
        untuned = [untuned_folder(output)] if args.tune else []
        for folder in (scratch, kept, *untuned):  # what an interruption after the last rename left
            shutil.rmtree(folder, ignore_errors=True)
        report(done=f"{output} is complete already; --verify compares it with its checksums")
        return

    stream = None
    if args.stream:
        fetch_tokenizer(scratch, config)
        stream = Stream(scratch, args.repo, template, named, by_layer=text is not None)
        entries = stream.entries
    else:
        entries = checkpoint.check_files(source, template, named)
    calibrate, size_of_streams = None, 0
    if text is not None:
        kernels.keep_compilations()
        entries = sorted(entries, key=lambda entry: calibration.order(entry.module))
        where = scratch if stream else source
        windows = windows_of(where, config, text, args.calibration_tokens)
        calibrate = functools.partial(
            recovery.Recovery, config, entries, windows, kept, tokens=args.recover or 0
        )
        size_of_streams = calibration.stored_bytes(config, windows)
    shard_size = round(args.shard_size * 1e9)
    check_space(output, entries, args.packing, shard_size, stream is not None, kept=size_of_streams)
    begin = time.perf_counter()
    try:
        convert(
            entries,
            output,
            about,
            other_files(scratch if stream else source, about, entries, args.packing),
            source=args.repo if stream else str(source.resolve()),
            packing=args.packing,
            shard_size=shard_size,
            threads=args.threads,
            progress=sys.stderr.isatty(),
            calibrate=calibrate,
            noted=noted,
            sealed=stream.delete if stream else lambda shard: None,
        )
    finally:
        if stream:
            stream.close()
    if stream:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = time.perf_counter() - begin
    read = sum(entry.bytes for entry in entries)
    written = sum(file.stat().st_size for file in output.iterdir())
    report(
        read=f"{readable_size(read)} in {seconds:.1f} s, {read / seconds / 1e9:.2f} GB/s",
        written=f"{readable_size(written)} to {output}",
        memory=f"{readable_size(peak_memory())} at the peak, mapped pages of files included",
    )


def untuned_folder(output: Path) -> Path:
    """Where a model is converted to that then learns as a whole."""
    return output.parent / f"{output.name}.untuned"


def tune(args: argparse.Namespace, source: Path, output: Path) -> None:
    """Converts without --tune to a folder of its own, and that to the output."""
    untuned = untuned_folder(output)
    convert_command(argparse.Namespace(**vars(args) | {"folders": [source, untuned], "tune": None}))
    about, config = checkpoint.read_config(untuned), resolve_config(untuned)
    about["quantization_config"]["calibration"]["tune"] = args.tune
    text = data.split(data.load_text(args.calibrate))[0]
    count = args.tune * calibration.HELD // (calibration.HELD - 1)  # with those held out
    make = functools.partial(
        tuning.Tuning, source, untuned, windows_of(untuned, config, text, count), args.tune
    )
    named = checkpoint.stored_precision(untuned)
    entries = checkpoint.check_files(untuned, model.abstract_params(config), named)
    entries = sorted(entries, key=lambda entry: calibration.order(entry.module))
    shard_size = round(args.shard_size * 1e9)
    check_space(output, entries, args.packing, shard_size, streamed=False)
    convert(
        entries,
        output,
        about,
        other_files(untuned, about, entries, args.packing),
        source=str(source.resolve()),
        packing=args.packing,
        shard_size=shard_size,
        threads=args.threads,
        progress=sys.stderr.isatty(),
        calibrate=make,
        noted=files.read_json(untuned / REPORT),
    )
    found = files.read_json(output / REPORT)["tuned"]["divergences"]
    before, after = ("no number" if x is None else f"{x:.4f}" for x in found)
    report(tuned=f"KL from {before} to {after} nats per token, on windows that were held out")


def windows_of(folder: Path, config, text: str, tokens: int) -> np.ndarray:
    """The windows of a text, so many tokens, to calibrate with, by the tokenizer of a folder."""
    return calibration.choose_windows(
        tokenizer.encode(tokenizer.load(folder, config.vocab_size), text),
        min(config.sequence_len, calibration.LENGTH),
        tokens,
    )


def choose_formats(args: argparse.Namespace, config, template: dict, windows: np.ndarray) -> dict:
    """What the report is to note of --budget: the errors measured, and the formats chosen.

    Prints a table of these. A finished output is not measured again.
    """
    source, output = args.folders
    entries = checkpoint.check_files(source, template, planning.CHEAPEST)
    budget = planning.Budget(args.budget, config, entries)
    if output.exists():
        found = files.read_json(output / REPORT) if (output / REPORT).exists() else {}
        if "budget" not in found:
            raise CheckpointError(
                f"{output} exists and is something else: it was not converted with --budget; "
                "remove it, or choose another folder"
            )
        errors = found["budget"]["errors"]
    else:
        kept = output.parent / f"{output.name}.calibration"
        total = sum(math.prod(entry.restored.shape) for entry in budget.matrices.values())
        quiet = not sys.stderr.isatty()
        with tqdm.tqdm(total=total, desc="measure", unit_scale=True, disable=quiet) as bar:
            errors = planning.measure(
                config,
                entries,
                windows,
                str(source.resolve()),
                kept,
                lambda entry, weights: bar.update(weights),
            )
    chosen = budget.choose(errors)
    print("\n".join(budget.table(errors, chosen)), file=sys.stderr)
    return {"budget": {"errors": errors, "chosen": chosen}}


def check_calibrated(named: dict[str, str]) -> None:
    """ValueError unless a parameter is of a format that a text helps with."""
    if not any(formats.FORMATS[format].packed for format in named.values()):
        raise ValueError(
            f"--calibrate is for ternary weights, and these are {sorted(set(named.values()))}; "
            "choose others with --weights, or leave it out"
        )


def resolve_precision(args: argparse.Namespace) -> tuple[str, quantize.Rules]:
    """The name of the precision, and its table."""
    if args.precision is None:
        weights = args.weights or "ternary"
        return weights, model.PRECISIONS[weights]
    with files.open_file(args.precision) as file:
        return args.precision.stem, model.parse_precision(file.read(), str(args.precision))


def check_complete(output: Path, config: dict) -> None:
    """CheckpointError unless the folder is a converted checkpoint with this configuration."""
    found = checkpoint.read_config(output) or {}
    if not shards.exists(output):
        differing = "it is no converted checkpoint"
    elif differing := shards.difference(found, config):
        differing = f"{shards.CONFIG} has another {differing}"
    if differing:
        raise CheckpointError(
            f"{output} exists and is something else: {differing}; remove it, or choose another "
            "folder"
        )
    shards.open_shards(output)


def fetch_tokenizer(folder: Path, config: model.LanguageModelConfig) -> None:
    """Grok-1's, for a model of its vocabulary; others have none to fetch."""
    if config.vocab_size == tokenizer.GROK_1_SIZE:
        download.tokenizer(folder)


def download_command(args: argparse.Namespace) -> None:
    config = resolve_config(None, args.preset)
    count = len(checkpoint.sorted_keys(model.abstract_params(config)))
    names = [checkpoint.file_name(i) for i in range(count)]
    fetch_tokenizer(args.download, config)
    download.release(args.download, names, args.repo)
    report(done=f"{args.download} has all {count} files")


def layout_command(folder: Path) -> None:
    """Writes the layout file of a converted checkpoint, unless there is one as it should be."""
    check_converted(folder)
    config = resolve_config(folder)
    entries, placement = checkpoint.plan(
        folder,
        model.abstract_params(config),
        checkpoint.stored_precision(folder),
        on_one_cpu,
        interleave=kernels.library() is not None,
    )
    by_path = {entry.path: entry for entry in entries}
    leaves = {path: runners.form_in_memory(entry, config) for path, entry in by_path.items()}
    path, header = layouts.path_of(folder), layouts.plan(layouts.source_of(folder), leaves)
    if is_layout_of(folder, header):
        report(done=f"{path} is there already; --verify compares it with its sums")
        return
    check_room(path, header.size)

    def make(path):
        entry = by_path[path]
        leaf = checkpoint.restore_entries([entry], placement)[entry.module][entry.name]
        return runners.cast_table(leaf, config) if entry.module == runners.EMBEDDINGS else leaf

    begin = time.perf_counter()
    with byte_bar(total=header.size, disable=not sys.stderr.isatty()) as bar:
        layouts.write(folder, leaves, make, bar.update)
    seconds = time.perf_counter() - begin
    size = readable_size(header.size)
    report(written=f"{size} to {path} in {seconds:.1f} s, {header.size / seconds / 1e9:.2f} GB/s")


def on_one_cpu(params: checkpoint.Params) -> checkpoint.Params:
    """Where arrays of a tree are made that are to be written as they lie in a CPU's memory."""
    where = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda _: where, params)


def is_layout_of(folder: Path, header: layouts.Header) -> bool:
    """Whether the folder has a sound layout file of these weights."""
    try:
        found = layouts.open_layout(folder)
    except CheckpointError:
        return False
    return found is not None and found.header.forms == header.forms


def to_gguf_command(args: argparse.Namespace) -> None:
    """Writes a GGUF file of a checkpoint; see --gguf."""
    source, output = args.folders
    checkpoint.check_folder(source)
    config = configured(args, resolve_config(source, args.preset))
    template = model.abstract_params(config)
    entries = checkpoint.check_files(source, template, gguf_formats(args, source, template))
    begin = time.perf_counter()
    counts, rounding, notes = gguf_grok.write_checkpoint(
        output,
        entries,
        config,
        find_tokenizer(source, config.vocab_size).get(tokenizer.FILE),
        args.gguf,
        args.embeddings,
        room=check_room,
        threads=args.threads,
        progress=sys.stderr.isatty(),
    )
    seconds, written = time.perf_counter() - begin, output.stat().st_size
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    report(
        parameters=kinds,
        scales=f"rounded by {rounding:.2g} of their size at most",
        written=f"{readable_size(written)} to {output} in {seconds:.1f} s",
        memory=f"{readable_size(peak_memory())} at the peak, mapped pages of files included",
    )
    for note in notes:
        report(note=note)


def gguf_formats(args: argparse.Namespace, source: Path, template: dict) -> dict[str, str]:
    """{path: format} that the parameters have in a GGUF file."""
    stored = checkpoint.formats_in(source, template)
    chosen = args.weights or args.precision
    if any(formats.format_named(format).packed for format in stored.values()):
        if chosen:
            raise CheckpointError(
                f"{source}: is converted already; leave out --weights and --precision, or give the "
                "checkpoint that it was made from"
            )
        return stored
    if not chosen and args.gguf in ("Q8_0", *gguf_file.FLOATS):
        return stored
    return model.formats_of(template, resolve_precision(args)[1])


def from_gguf_command(args: argparse.Namespace) -> None:
    """Writes a GGUF file of Grok as a converted checkpoint, whose weights stay what they are."""
    source, output = args.folders
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it, or choose another folder")
    file = gguf_file.open_file(source)
    config = configured(args, gguf_grok.config_of(file))
    quiet = not sys.stderr.isatty()
    parameters = gguf_grok.Parameters(file, config, args.threads, progress=not quiet)
    leaves = parameters.leaves(args.packing)
    weights, precision = precision_of(parameters.formats)
    about = model.config_to_dict(config)
    about |= checkpoint.quantization(weights, precision, args.packing)
    extra = {card.NAME: card.model_card(about, leaves)}
    if proto := gguf_grok.tokenizer_of(file.keys):
        extra[tokenizer.FILE] = proto
    else:
        report(note=f"{source} has no vocabulary of SentencePiece: put its {tokenizer.FILE} in")
    total = sum(tensor.data.nbytes for tensor in file.tensors.values())
    check_room(output, sum(map(shards.stored_bytes, leaves.values())))
    with byte_bar(total=total, disable=quiet) as bar:
        shards.write(
            output,
            leaves,
            functools.partial(parameters.fill, progress=bar.update),
            about,
            extra,
            source=str(source.resolve()),
            shard_size=round(args.shard_size * 1e9),
        )
    found = ", ".join(sorted(set(parameters.formats.values())))
    report(written=f"{output}, its parameters {found}")


def precision_of(named: dict[str, str]) -> tuple[str, quantize.Rules]:
    """The name and the table of a precision of which parameters {path: format} are."""
    for name, table in model.PRECISIONS.items():
        try:
            if quantize.match_rules(table, named) == named:
                return name, table
        except ValueError:  # a rule of it matches none
            continue
    return "gguf", planning.rules({p: f for p, f in named.items() if f != "float32"})


def configured(args: argparse.Namespace, config) -> model.LanguageModelConfig:
    """A configuration with --activations, if that is given."""
    if args.activations:
        return dataclasses.replace(config, activations=args.activations)
    return config


def verify_command(folder: Path) -> None:
    check_converted(folder)
    sizes = [sums["bytes"] for sums in shards.read_checksums(folder).values()]
    layout = layouts.path_of(folder)
    if layout.exists():
        sizes.append(layout.stat().st_size)
    with byte_bar(total=sum(sizes), disable=not sys.stderr.isatty()) as bar:
        problems = shards.verify(folder, bar.update) + layouts.verify(folder, bar.update)
    if problems:
        raise CheckpointError("\n".join(problems))
    print(f"{folder}: {len(sizes)} files, {readable_size(sum(sizes))}, all as they were written")
    if rest := [name for name in shards.without_sums(folder) if name != layout.name]:
        print(f"not compared, for they have no sums: {', '.join(map(repr, rest))}")


def main(argv=None) -> None:
    args = parse_arguments(argv)
    try:
        if args.verify:
            verify_command(args.verify)
        elif args.inspect:
            inspect(args.inspect, args.source, sys.stderr.isatty())
        elif args.download:
            download_command(args)
        elif args.layout:
            layout_command(*args.folders)
        elif args.gguf:
            to_gguf_command(args)
        elif args.from_gguf:
            from_gguf_command(args)
        else:
            convert_command(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        going_on = "" if args.layout or args.gguf else ", it goes on where it stopped"
        sys.exit(f"\ninterrupted; run the same command again{going_on}")


if __name__ == "__main__":
    main()
