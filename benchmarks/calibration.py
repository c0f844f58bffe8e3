"""What calibrating a layer takes: an attention block and one expert, all of their matrices.

    python -m benchmarks.calibration --folder /tmp/layer

Random int8 weights of Grok-1's shapes and correlated hidden states go through `calibration.Layer`,
the expert as a dense block that sees all tokens. Time is that of all cores together, in which other
work on the machine hardly shows. A matrix is rounded in pieces, each of which is kept in the
folder: the command, given again, goes on after the last one.
"""

import argparse
import concurrent.futures
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import calibration
import checkpoint
import conversion
import files
import formats
import gptq
import model
import quantize
from benchmarks import memory, timer

WEIGHTS = "ternary-fit-128"
PIECE = 1 << 24  # weights that are rounded at a time
PAPER = 1 << 18  # tokens to calibrate with that the outlook is for
# Matrices with the same inputs are converted together, in this order.
STEPS = {
    "attention": [("query", "key", "value"), ("linear",)],
    "expert": [("linear", "linear_v"), ("linear_1",)],
}
# Products of [I, K], K the inputs of a diagonal block, with [I, O]: 2 I K O operations each.
PRODUCTS = {"sweep": 1, "fits": 2 * (gptq.DESCENTS + 1), "descent": 2 * gptq.DESCENTS, "rest": 10}
PARTS = ("hidden states", "moments", "factor", *PRODUCTS)

Parts = dict[tuple[str, str], float]  # of each (block, part)

# --- Time -----------------------------------------------------------------------------------------


def core_seconds(f: Callable, *args, **kwargs):
    """What f gives, and the processor time of all threads until it is there."""
    begin = time.process_time()
    result = jax.block_until_ready(f(*args, **kwargs))
    return result, time.process_time() - begin


def compiled(f: Callable, *args):
    """`core_seconds` without those of compiling."""
    return core_seconds(jax.jit(f).lower(*args).compile(), *args)


def seconds_of_parts(w: jax.Array, seen: gptq.Moments) -> dict[str, float]:
    """Core-seconds of rounding w, by part, from one tile of its outputs; all but "rest"."""
    (blocks, size, _), (planes, group) = seen.squares.shape, formats.FORMATS[WEIGHTS].fit
    groups, outputs = formats.number_of_groups(len(w), group) // blocks, w.shape[1]
    tile = max(n for n in range(1, min(outputs, gptq.OUTPUTS) + 1) if outputs % n == 0)

    def factored(seen):
        h = gptq._damped(gptq._normalised(seen).squares, gptq.DAMPING)
        return h, gptq.inverse_factor(h)

    def sweep(target, factor):
        importance = 1 / jnp.square(jnp.diagonal(factor, axis1=1, axis2=2))
        trits, scales = gptq._sweep(target, factor, importance, None, planes, groups)
        return trits.astype(jnp.int8), scales

    def fit(h, target, trits, scales):
        return gptq._solved(*gptq._equations(h, target, trits, groups, False), scales)

    with gptq.precisely():
        (h, factor), factoring = compiled(factored, seen)
        target = w[:, :tile].reshape(blocks, size, tile)
        found, sweeping = compiled(sweep, target, factor)
        rounded = h, target, *found
        seconds = {
            "sweep": sweeping,
            "fits": (gptq.DESCENTS + 1) * compiled(fit, *rounded)[1],
            "descent": gptq.DESCENTS * compiled(gptq._descend, *rounded)[1],
        }
    tiles = outputs // tile
    return {"factor": factoring} | {part: tiles * s for part, s in seconds.items()}


# --- A layer --------------------------------------------------------------------------------------


class MeasuredLayer(calibration.Layer):
    """A layer whose matrices are rounded piece by piece.

    seconds: of hidden states and moments so far; rounded: what is noted of each piece, by matrix
    """

    def __init__(self, *args, folder: Path, pieces: int | None):
        """pieces: of each matrix that are rounded, the rest being the plain fit; None: all"""
        super().__init__(*args)
        self.folder, self.pieces, self.block = folder, pieces, ""
        self.seconds: Parts = {}
        self.rounded: dict[str, list[dict]] = {}

    def note(self, part: str, f: Callable) -> Callable:
        """f; what calls of it take is added to a part of the block that is at work."""

        def timed(*args, **kwargs):
            result, spent = core_seconds(f, *args, **kwargs)
            key = self.block, part
            self.seconds[key] = self.seconds.get(key, 0.0) + spent
            return result

        return timed

    def _convert(self, half, names, want):
        self.block = "attention" if half == "attention" else "expert"
        super()._convert(half, names, want)

    def _move_on(self, half):
        if half == "attention":  # what comes out of the layer, nobody asks for
            super()._move_on(half)

    def _round(self, at, expert, tokens, seen, held):
        inputs, outputs = self.tensors[at].shape
        most = max(1, PIECE // inputs)
        size = max(n for n in range(1, min(most, outputs) + 1) if outputs % n == 0)
        made = []
        for i, columns in enumerate(conversion.slices(0, outputs, size)):
            plain = self.plain[at]((slice(0, 1), columns, slice(0, inputs)))
            plain = jax.tree.map(lambda x: jnp.asarray(x[0]), plain)
            chosen = self.pieces is None or i < self.pieces
            made.append(self._piece(at, columns, plain, seen, held) if chosen else plain)
        axes = conversion.output_axes(made[0])
        return jax.tree.map(lambda axis, *x: jnp.concatenate(x, axis), axes, *made)

    def _piece(self, at, columns: slice, plain, seen, held):
        name = f"{self.block}-{at[0].rsplit('/', 1)[1]}"
        noted = self.folder / f"{name}-{columns.start}.json"
        arrays = noted.with_suffix(".npz")
        if not noted.exists():
            part = jax.tree.map(lambda x: x[:, columns], self.tensors[at])
            w = jnp.asarray(quantize.dequantize(part))
            memory.reset_peak()
            begin = time.perf_counter()
            made, spent = core_seconds(gptq.round_matrix, w, plain, WEIGHTS, seen, held)
            found = {
                "outputs": w.shape[1],
                "seconds": time.perf_counter() - begin,
                "core_seconds": spent,
                "peak": memory.used().get("peak", 0),
                "losses": np.asarray(made.losses).tolist(),
            }
            found["parts"] = seconds_of_parts(w, seen)
            found["parts"]["rest"] = spent - sum(found["parts"].values())
            with files.replacing(arrays) as part, part.open("wb") as file:
                np.savez(file, *jax.tree.leaves(made.weight))
            files.write_json(noted, found)
        found = files.read_json(noted)
        self.rounded.setdefault(name, []).append(found)
        losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
        print(
            f"{noted.stem}: {found['outputs']} outputs, {found['core_seconds']:.0f} core-seconds "
            f"in {found['seconds']:.0f} s, {found['peak'] / 1e9:.1f} GB, held-out errors {losses}",
            flush=True,
        )
        with np.load(arrays) as stored:
            leaves = [jnp.asarray(stored[key]) for key in stored.files]
        return jax.tree.unflatten(jax.tree.structure(plain), leaves)


def layer_entries(config: model.LanguageModelConfig) -> dict:
    """A layer's parameters as those of a checkpoint, {(module, name): entry}: random int8."""
    template = model.abstract_params(config)
    named = model.formats_of(template, model.PRECISIONS[WEIGHTS])

    def read(shape, seed):
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        random, codes = np.random.default_rng(seed), np.empty(shape, np.int8)
        for rows in conversion.slices(0, len(codes), 256):
            drawn = random.standard_normal(codes[rows].shape, np.float32)
            codes[rows] = np.clip(np.rint(32 * drawn), -127, 127)
        scales = np.full((1, shape[1]), len(codes) ** -0.5 / 32, jnp.bfloat16)
        return quantize.QuantizedWeight(codes, scales)

    entries = {}
    for seed, (module, name) in enumerate(checkpoint.sorted_keys(template)):
        if module.startswith(calibration.PREFIX):
            format, shape = named[f"{module}/{name}"], template[module][name].shape
            make = lambda shape=shape, seed=seed: read(shape, seed)  # noqa: E731
            restored = formats.shapes(format, shape)
            entry = checkpoint.Entry(module, name, Path("random"), make, format, restored, 0)
            entries[module, name] = entry
    return entries


def hidden_states(windows: int, length: int, config) -> calibration.Streams:
    """Random ones [W, T, D]: the variance along the k-th of D directions is 1 / k."""
    random, size = np.random.default_rng(0), config.emb_size
    mix = random.standard_normal((size, size), np.float32)
    mix *= np.arange(1, size + 1, dtype=np.float32)[:, None] ** -0.5
    h = np.stack([random.standard_normal((length, size), np.float32) @ mix for _ in range(windows)])
    h /= h.std()
    off = 0.05 * random.standard_normal(h.shape, np.float32)  # by layers that came before
    return calibration.Streams(*(x.astype(jnp.dtype(config.fprop_dtype)) for x in (h, h + off)))


def convert(config, windows: int, length: int, folder: Path, pieces: int | None) -> MeasuredLayer:
    """The layer, converted."""
    folder.mkdir(parents=True, exist_ok=True)
    streams, entries = hidden_states(windows, length, config), layer_entries(config)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        layer = MeasuredLayer(config, entries, streams, pool, folder=folder, pieces=pieces)
        run, add = calibration.run, gptq.add
        rows, calibration.ROWS = calibration.ROWS, length  # so that no batch is padded
        calibration.run, gptq.add = layer.note("hidden states", run), layer.note("moments", add)
        try:
            layer.convert(jax.local_devices())
        finally:
            calibration.run, gptq.add, calibration.ROWS = run, add, rows
    return layer


# --- The outlook ----------------------------------------------------------------------------------


def shapes(config, block: str) -> dict[str, tuple[int, int]]:
    """[I, O] of the matrices of a block."""
    d, f = config.emb_size, config.ffn_size
    q, kv = (heads * config.key_size for heads in (config.num_q_heads, config.num_kv_heads))
    if block == "attention":
        return {"query": (d, q), "key": (d, kv), "value": (d, kv), "linear": (q, d)}
    return {"linear": (d, f), "linear_v": (d, f), "linear_1": (f, d)}


def operations(config, tokens: int) -> Parts:
    """Of each block's parts, on paper: products of matrices alone, an addition being one, too."""
    found = {(block, part): 0.0 for block in STEPS for part in PARTS}
    for block, steps in STEPS.items():
        sizes = shapes(config, block)
        for number, names in enumerate(steps):
            inputs = sizes[names[0]][0]
            size = inputs // gptq.diagonal_blocks(inputs)
            found[block, "moments"] += 4.0 * tokens * inputs * size
            for name in names:
                product = 2.0 * math.prod(sizes[name])
                # In both models; first for the inputs of the second step, then for the streams.
                often = {"attention": 2 - number, "expert": 1 - number}[block]
                found[block, "hidden states"] += 2 * tokens * product * often
                found[block, "factor"] += 4 / 3 * inputs * size**2
                for part, count in PRODUCTS.items():
                    found[block, part] += count * size * product
    return found


def measured(layer: MeasuredLayer) -> Parts:
    """Core-seconds of all outputs, from those of the ones that were rounded."""
    found = {(block, part): 0.0 for block in STEPS for part in PARTS} | layer.seconds
    for block in STEPS:
        for name, (_, outputs) in shapes(layer.config, block).items():
            pieces = layer.rounded[f"{block}-{name}"]
            for part in ("factor", *PRODUCTS):
                seconds = sum(piece["parts"][part] for piece in pieces)
                # A factor is made once for all outputs.
                done = (
                    len(pieces) if part == "factor" else sum(p["outputs"] for p in pieces) / outputs
                )
                found[block, part] += seconds / done
    return found


def of_layer(parts: Parts, config, tokens: int) -> Parts:
    """Of a layer with all experts and PAPER tokens, from what a block takes with so many tokens."""
    found = {}
    for (block, part), value in parts.items():
        expert, often = block == "expert", PAPER / tokens
        if part not in ("hidden states", "moments"):
            often = config.num_experts if expert else 1
        elif expert:
            often *= config.num_selected_experts
            if part == "hidden states":  # two products of five: the streams were not moved on
                often *= 5 / 2
        found[block, part] = value * often
    return found


def table(layer: MeasuredLayer, config, tokens: int) -> list[str]:
    """What was measured, beside the operations, and the outlook for all of the model."""
    cores = len(os.sched_getaffinity(0))
    seconds, count = measured(layer), operations(config, tokens)
    outlook = of_layer(seconds, config, tokens)
    work = of_layer(count, config, tokens)
    columns = "block", "part", "core-seconds", "TFLOP", "GFLOP/s", "of a layer: core-hours", "PFLOP"
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for key in [*seconds, ("all", "")]:
        s, n, hours, p = (
            sum(x.values()) if key[0] == "all" else x[key] for x in (seconds, count, outlook, work)
        )
        cells = f"{s:.0f}", f"{n / 1e12:.1f}", f"{n / s / 1e9:.0f}", f"{hours / 3600:.2f}"
        lines.append("| " + " | ".join([*key, *cells, f"{p / 1e15:.3f}"]) + " |")
    days = sum(outlook.values()) * config.num_layers / cores / 86400
    peak = max(piece["peak"] for pieces in layer.rounded.values() for piece in pieces)
    return lines + [
        f"{config.num_layers} layers, {PAPER:,} tokens: {days:.1f} days of {cores} cores, "
        f"{config.num_layers * sum(work.values()) / 1e15:.0f} PFLOP",
        f"the process had {peak / 1e9:.1f} GB at most ({timer.processor()})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="for what is rounded")
    add("--preset", choices=model.PRESETS, default="grok-1", help="(%(default)s)")
    add("--tokens", type=int, default=8192, help="to calibrate with (%(default)s)")
    add("--length", type=int, default=1024, help="of a window, in tokens (%(default)s)")
    add("--pieces", type=int, help="of each matrix that are rounded (all)")
    args = parser.parse_args()
    config = model.PRESETS[args.preset]
    windows = -(-args.tokens // args.length)
    windows += max(1, windows // (calibration.HELD - 1))  # held out
    dense = dataclasses.replace(config, num_layers=1, num_experts=1, num_selected_experts=1)
    layer = convert(dense, windows, args.length, args.folder, args.pieces)
    print("\n".join(table(layer, config, windows * args.length)))


if __name__ == "__main__":
    main()
