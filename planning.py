"""The format of each matrix for a budget of bytes, chosen by what it does to outputs on a text.

A pass over the released model tells how much of the output of each matrix a format would lose, on
windows that calibration holds out. All matrices begin in the cheapest format; then, one after the
other, the change that lowers the errors most for each byte that it adds is made while one fits.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import calibration
import checkpoint
import conversion
import formats
import gptq
import kernels
import model
import quantize
import runners
from checkpoint import readable_size

LADDER = ("ternary-fit-128", "ternary2-128", "int8")  # formats to choose from, cheapest first
CHEAPEST = model.PRECISIONS[LADDER[0]]

# Names of budgets. JAX can use more of such a GPU, 0.97 of 80 GiB, if it is told to: that is left.
GPUS = {"80GB-GPU": 80 * 10**9, "96GB-GPU": 96 * 10**9}
LENGTH = 2048  # of the one request that has to fit beside the weights

Errors = dict[str, dict[str, float]]  # {path: {format: relative squared error of the outputs}}
Sizes = dict[str, dict[str, int]]  # {path: {format: bytes in memory}}

# --- Measuring ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a matrix loses in each format.

    energy: of its outputs, sum of squares; of independent inputs if it met no token
    lost: {format: the same of what is missing}
    """

    path: str
    expert: int | None
    met: bool
    energy: float
    lost: dict[str, float]


class MeasuredLayer(calibration.Layer):
    """A layer that stays as it is: its matrices, instead of being converted, are measured."""

    models = ("teacher",)

    def __init__(self, config, entries, streams, pool, advance):
        super().__init__(config, entries, streams, pool, advance)
        self.seen = 0  # windows: all are held out
        self.makers = {
            (at, format): conversion.converter(self.tensors[at], format, entries[at].title, pool)
            for at in self.plain
            for format in LADDER
            if format != checkpoint.format_of(self.tensors[at])
        }

    def _round(self, at, expert: int | None, tokens: int, seen, held):
        """The matrix as it is."""
        entry, stack, e = self.entries[at], conversion.stacked(self.tensors[at]), expert or 0
        weight = jax.tree.map(lambda x: jnp.asarray(x[e]), stack)
        squares = held.squares
        met = bool(squares.any())
        if not met:
            squares = jnp.broadcast_to(jnp.eye(squares.shape[-1]), squares.shape)
        lost = dict.fromkeys(LADDER, 0.0)
        for format in LADDER:
            if make := self.makers.get((at, format)):
                made = calibration.one_matrix(make, e, formats.shapes(format, stack.shape))
                lost[format] = float(_energy_lost(weight, made, squares))
        energy = float(gptq.energy(quantize.dequantize(weight), squares))
        self.choices.append(Measured(entry.path, expert, met, energy, lost))
        self.advance(entry, math.prod(weight.shape))
        return weight


@jax.jit
def _energy_lost(weight, made, squares) -> jax.Array:
    return gptq.energy(quantize.dequantize(weight) - quantize.dequantize(made), squares)


class Measurement(calibration.Calibration):
    """Measures layer by layer; what is done is kept, as in calibration."""

    of_layer = MeasuredLayer

    def errors(self) -> Errors:
        for layer in range(self.config.num_layers):
            if not self._choices(layer).exists():
                self._convert(layer)
            self._streams(layer).unlink(missing_ok=True)
        return relative_errors(self.report()["matrices"])


def measure(config, entries, windows, source: str, folder: Path, advance) -> Errors:
    """The errors of all matrices in the formats of LADDER, or those kept in the folder.

    entries: of `checkpoint.check_files`, in CHEAPEST; config, windows, advance: as of `Calibration`
    source: of the entries; what was measured of another one, or on another text, is not looked at
    """
    held = windows[calibration.Streams(windows, windows).seen :]
    about = json.dumps([source, model.config_to_dict(config), LADDER, held.shape]).encode()
    name = hashlib.sha256(about + held.tobytes()).hexdigest()[:16]
    return Measurement(config, entries, held, folder / f"measured-{name}", advance).errors()


def relative_errors(lines: Sequence[dict]) -> Errors:
    """The errors of each path's matrices together, from a `Measured` each, as a dict.

    An expert that met no token counts as much as those that did, on average.
    """
    by_path: dict[str, list[dict]] = {}
    for line in lines:
        by_path.setdefault(line["path"], []).append(line)
    errors: Errors = {}
    for path, group in by_path.items():
        energies = [line["energy"] for line in group if line["met"]] or [1.0]
        mean = sum(energies) / len(energies)
        counts = [line["energy"] if line["met"] else mean for line in group]
        errors[path] = {
            format: sum(
                count * line["lost"][format] / max(line["energy"], 1e-30)
                for count, line in zip(counts, group, strict=True)
            )
            / max(sum(counts), 1e-30)
            for format in LADDER
        }
    return errors


# --- Choosing -------------------------------------------------------------------------------------


def choose(errors: Errors, sizes: Sizes, budget: int) -> dict[str, str]:
    """{path: format} of at most `budget` bytes, if the cheapest formats fit into it.

    The sum of errors is within that of one change from the least that there is, for what does not
    fit any more would have lowered it less for each byte; and a larger budget never has a larger
    one. (The greedy algorithm for the knapsack problem, with several sizes of each item.)
    """
    chosen = {
        path: min(of, key=lambda format: (of[format], errors[path][format]))
        for path, of in sizes.items()
    }
    room = budget - sum(sizes[path][format] for path, format in chosen.items())
    while True:
        best = None
        for path, old in chosen.items():
            for format, error in errors[path].items():
                gain = errors[path][old] - error
                added = sizes[path][format] - sizes[path][old]
                if gain > 0 and added <= room:
                    rate = gain / added if added > 0 else math.inf
                    if best is None or rate > best[0]:
                        best = rate, added, path, format
        if best is None:
            return chosen
        _, added, path, format = best
        chosen[path], room = format, room - added


def rules(chosen: dict[str, str]) -> list[tuple[str, str]]:
    """The precision table of these formats, one rule for all layers of a matrix and a format."""
    layers: dict[tuple[str, str], list[int]] = {}
    for path, format in chosen.items():
        name = calibration.PATH.sub("", path, count=1)
        layers.setdefault((name, format), []).append(calibration.layer_of(path))
    table = []
    for (name, format), numbers in sorted(layers.items()):
        some = "|".join(map(str, sorted(numbers)))
        table.append((f"^transformer/decoder_layer_({some}){re.escape(name)}$", format))
    return [*table, ("", "float32")]


# --- A budget -------------------------------------------------------------------------------------


class Budget:
    """Bytes for a model's weights in a device's memory, and what these take in each format."""

    def __init__(
        self,
        text: str,
        config: model.LanguageModelConfig,
        entries: Sequence[checkpoint.Entry],
    ):
        """text: GB, or one of GPUS; entries: in CHEAPEST

        Raises ValueError where there is nothing to choose: too little, or enough for all.
        """
        self.matrices = {e.path: e for e in entries if formats.FORMATS[e.format].packed}
        self.sizes = sizes_of(self.matrices.values())
        short = dataclasses.replace(config, sequence_len=min(LENGTH, config.sequence_len))
        params = runners.abstract_weights(short, CHEAPEST)
        self.rest = sum(
            _bytes(leaf)
            for module, leaves in params.items()
            for name, leaf in leaves.items()
            if f"{module}/{name}" not in self.sizes
        )
        note = ""
        if text in GPUS:
            runner = runners.ModelRunner(short)
            with kernels.compiling_for("gpu"):
                needed = runners.device_memory(runner, params, 1, short.sequence_len)
            beside = needed["cache"] + needed["activations"]
            note = f" beside {readable_size(beside)} for a request of {short.sequence_len} tokens"
            self.bytes = GPUS[text] - beside
        else:
            self.bytes = round(float(text) * 1e9)
        least = self.rest + sum(min(of.values()) for of in self.sizes.values())
        most = self.rest + sum(of[LADDER[-1]] for of in self.sizes.values())
        if least > self.bytes:
            fitting = f"--budget {_rounded_up(least / 1e9):g} or more"
            raise ValueError(
                f"--budget {text}: the weights take {readable_size(least)} in memory with "
                f"{LADDER[0]} everywhere, and it has {readable_size(max(0, self.bytes))} for "
                f"them{note}; give {fitting}, or spread --weights over several devices with "
                "run.py --mesh"
            )
        if most <= self.bytes:
            raise ValueError(
                f"--budget {text}: {LADDER[-1]} everywhere takes {readable_size(most)} in memory, "
                f"and it has {readable_size(self.bytes)} for the weights{note}; convert with "
                f"--weights {LADDER[-1]}, and without --calibrate"
            )

    def choose(self, errors: Errors) -> dict[str, str]:
        return choose(errors, self.sizes, self.bytes - self.rest)

    def table(self, errors: Errors, chosen: dict[str, str]) -> list[str]:
        """What was chosen, a line for each family and format; errors are means of parameters."""
        row = "{:<12}{:<17}{:>17}{:>10}{:>14}{:>8}".format
        lines = [row("family", "format", "parameters", "memory", "error before", "after")]
        groups: dict[tuple[str, int], list[str]] = {}
        for path, format in chosen.items():
            key = checkpoint.family_of(path), LADDER.index(format)
            groups.setdefault(key, []).append(path)
        for (family, rung), paths in sorted(groups.items()):
            format = LADDER[rung]
            count = sum(math.prod(self.matrices[path].restored.shape) for path in paths)
            size = readable_size(sum(self.sizes[path][format] for path in paths))
            means = (np.mean([errors[path][f] for path in paths]) for f in (LADDER[0], format))
            lines.append(row(family, format, f"{count:,}", size, *(f"{x:.4f}" for x in means)))
        lines.append(row("the rest", "", "", readable_size(self.rest), "", ""))
        total = self.rest + sum(self.sizes[path][format] for path, format in chosen.items())
        return [
            *map(str.rstrip, lines),
            f"weights     {readable_size(total)} of {readable_size(self.bytes)}",
        ]


def sizes_of(matrices: Iterable[checkpoint.Entry]) -> Sizes:
    """The bytes of matrices in memory, in each format."""

    def sizes(entry):
        tensor, shape = entry.read(), tuple(entry.restored.shape)
        return {f: _bytes(checkpoint.restored_shapes(tensor, shape, f)) for f in LADDER}

    return {entry.path: sizes(entry) for entry in matrices}


def _bytes(leaf: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))


def _rounded_up(x: float) -> float:
    """To three digits."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 2)
    return math.ceil(x / unit) * unit
