"""Conversion with a text: layer by layer, each matrix rounded for the inputs that it will meet.

Two streams of hidden states go through the layers: that of the model as it is in its checkpoint,
and that of the converted one, in which each layer meets what the converted layers before it made of
the text. A layer's matrices are converted in the order in which the inputs of each are known:
query, key and value; linear; then, expert by expert, linear and linear_v, and linear_1.

Shapes: W windows of T tokens of the text, R rows, and as in `model.py`.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import conversion
import data
import files
import formats
import gptq
import model
import quantize
import runners

LAYER = "decoder_layer_0"  # what each layer is called here, so that all compile to one function
PREFIX = f"transformer/{LAYER}"
PATH = re.compile(r"transformer/decoder_layer_(\d+)")  # of a layer's parameters
TOKENS = 1 << 18  # of a text that are taken
HELD = 10  # of so many windows one is held out, to choose by
ROWS = 4096  # tokens computed at a time
LENGTH = 2048  # tokens of a window, where the model's context is longer

Params = dict[str, dict[str, Any]]


class Streams(NamedTuple):
    """Hidden states [W, T, D] in the compute dtype; of the windows, the last ones are held out."""

    teacher: np.ndarray
    student: np.ndarray

    @property
    def seen(self) -> int:
        """Windows that are not held out."""
        windows = len(self.teacher)
        return windows - max(1, windows // HELD) if windows > 1 else windows


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a matrix was converted: what a line of the report says.

    tokens: that it met; way: "plain", "swept" or "descended"; shift, damping and losses as in
    `gptq.Rounded`, but no damping if it is infinite
    """

    path: str
    expert: int | None
    format: str
    tokens: int
    way: str
    shift: float
    damping: float | None
    losses: tuple[float, ...]


WAYS = ("plain", "swept", "descended")

# --- A layer at a time ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def embed(params: Params, tokens: jax.Array, *, config) -> jax.Array:
    """What the first layer is given for tokens [B, T]: [B, T, D]."""

    def forward(tokens):
        with hk.name_scope("language_model"):
            return model.InOutEmbed(config)(tokens)

    return hk.without_apply_rng(hk.transform(forward)).apply(params, tokens)


@functools.partial(jax.jit, static_argnames=("config", "half", "want"))
def run(params: Params, h: jax.Array, *, config, half: str, want: str) -> Any:
    """What half a layer, "attention" or "experts", makes of h [B, T, D], or a part of it meets.

    want: "h", the new hidden states [B, T, D]; "output", of experts, the model.LayerOutput; or the
      inputs of a module of this name, a tuple
    """
    inputs = {}

    def look(next_f, args, kwargs, context):
        if context.method_name == "__call__":
            inputs[context.module.name] = tuple(map(quantize.floats_of, args))
        return next_f(*args, **kwargs)

    def forward(h):
        with (
            hk.intercept_methods(look),
            hk.name_scope("transformer"),
            hk.name_scope(LAYER),
        ):
            if half == "attention":
                positions = jnp.broadcast_to(jnp.arange(h.shape[1]), h.shape[:2])
                return model.add_attention(config, h, positions, None)[0]
            output = model.add_experts(config, h, jnp.ones(h.shape[:2], bool))
            return output if want == "output" else output.hidden

    made = hk.without_apply_rng(hk.transform(forward)).apply(params, h)
    return made if want in ("h", "output") else inputs[want]


def run_layer(params: Params, h: jax.Array, *, config) -> model.LayerOutput:
    """What a whole layer, called LAYER, makes of h [B, T, D]."""
    h = run(params, h, config=config, half="attention", want="h")
    return run(params, h, config=config, half="experts", want="output")


def as_multiplied(x: jax.Array, activations: str) -> jax.Array:
    """Rows [R, I] as they are multiplied with a quantized matrix: float32."""
    if activations == "float":
        return x.astype(jnp.float32)
    integers, step = quantize.quantize_rows(x, activations=activations)
    return integers * step


@functools.partial(jax.jit, static_argnames="config")
def hidden_rows(x, linear, linear_v, *, config):
    """The hidden activations [R, F] of one expert, or of a dense block, for x [R, D]."""
    dot = functools.partial(quantize.dot, activations=config.activations)
    return jax.nn.gelu(dot(x, linear)) * dot(x, linear_v)


def teacher_activations(configured: str, formats: Collection[str]) -> str:
    """What a teacher's matrices are multiplied with, whatever else its config.json says.

    Floats are multiplied with floats; a runner of this configuration would round these first. Codes
    of int8 are not multiplied with "int8", which is for weights that were trained with it, but with
    "int15". Packed weights may have been: they run as configured.
    """
    if {*formats} == {"float32"}:
        return "float"
    plain = {*formats} <= {"int8", "float32"}
    return "int15" if plain and configured == "int8" else configured


# --- A layer --------------------------------------------------------------------------------------


class Layer:
    """One layer of both models; `convert` makes the second from the first.

    models: whose streams go through it; the inputs of the first are those that matrices are made
      for, the outputs of the last those that are wanted
    """

    models: tuple[str, ...] = ("student", "teacher")

    def __init__(
        self,
        config: model.LanguageModelConfig,
        entries: dict[tuple[str, str], Any],
        streams: Streams,
        pool: concurrent.futures.ThreadPoolExecutor,
        advance: Callable[[Any, int], None] = lambda entry, weights: None,
    ):
        """entries: of `checkpoint.check_files`, by (module, name) with the layer called LAYER

        config: of the converted model; streams: what goes into the layer, and, once it is
        converted, what comes out of it
        advance: as of `Calibration`
        """
        self.config, self.entries, self.streams, self.advance = config, entries, streams, advance
        self.seen = streams.seen
        self.tensors = {at: entry.read() for at, entry in entries.items()}
        stored = {checkpoint.format_of(tensor) for tensor in self.tensors.values()}
        activations = teacher_activations(config.activations, stored)
        self.of_teacher = dataclasses.replace(config, activations=activations)
        self.teacher = tree(
            {at: jax.tree.map(jnp.asarray, tensor) for at, tensor in self.tensors.items()}
        )
        self.plain = {
            at: conversion.converter(self.tensors[at], entry.format, entry.title, pool)
            for at, entry in entries.items()
            if entry.format != checkpoint.format_of(self.tensors[at])
        }
        # The teacher's, where the weights are still to be made; they are not looked at until then.
        self.student = {module: dict(weights) for module, weights in self.teacher.items()}
        for at in self.plain:
            if not self._is_calibrated(at):
                self._put(at, self._whole(at))
        self.choices: list[Choice] = []

    def report(self) -> dict[str, list]:
        """What is kept of a converted layer, and ends up in the report, ready for JSON."""
        return {"matrices": [dataclasses.asdict(choice) for choice in self.choices]}

    def _is_calibrated(self, at) -> bool:
        return formats.FORMATS[self.entries[at].format].packed

    def _whole(self, at):
        """A parameter that is made without the text, such as int8, on the device."""
        shape = self.tensors[at].shape
        experts, inputs, outputs = (1, *shape)[-3:]
        made = self.plain[at]((slice(0, experts), slice(0, outputs), slice(0, inputs)))
        return jax.tree.map(lambda x: jnp.asarray(x.reshape(x.shape[-len(shape) :])), made)

    def convert(self, devices: Sequence[jax.Device]) -> Params:
        """The converted layer; moves the streams on. Experts are dealt out to the devices."""
        attention = "multi_head_attention"
        self._convert(
            "attention", [f"{attention}/{n}" for n in ("query", "key", "value")], attention
        )
        self._convert("attention", [f"{attention}/linear"], "linear")
        self._move_on("attention")
        if self.config.num_experts > 1:
            self._convert_experts(devices)
        else:
            self._convert("experts", ["linear", "linear_v"], "linear")
            self._convert("experts", ["linear_1"], "linear_1")
        self._move_on("experts")
        return self.student

    def _batches(self, of: slice):
        """Slices of windows, and the weight, 1 or 0, of each window of a full batch."""
        size = max(1, ROWS // self.streams.teacher.shape[1])
        for batch in conversion.slices(of.start, of.stop, size):
            there = np.arange(size) < batch.stop - batch.start
            yield batch, there

    def _outputs(self, f: Callable, h: np.ndarray, of: slice):
        """Slices of windows, and f, an array or a tree, of the hidden states h [W, T, D] there."""
        for batch, there in self._batches(of):
            made = f(padded(h[batch], len(there)))
            yield batch, jax.tree.map(lambda x, there=there: np.asarray(x)[there], made)

    def _run(self, half: str, want: str, whose: str, h):
        config = self.config if whose == "student" else self.of_teacher
        return run(getattr(self, whose), h, config=config, half=half, want=want)

    def _move_on(self, half: str) -> None:
        for whose in self.models:
            stream = getattr(self.streams, whose)
            moved = functools.partial(self._run, half, "h", whose)
            for batch, h in self._outputs(moved, stream, slice(0, len(stream))):
                stream[batch] = h

    def _convert(self, half: str, names: list[str], want: str) -> None:
        """Converts matrices with the same inputs, those of the module `want`."""
        keys = [(f"{PREFIX}/{name}", "w") for name in names]
        keys = [at for at in keys if self._is_calibrated(at)]
        if not keys:
            return
        windows, parts = len(self.streams.teacher), []
        for part in (slice(0, self.seen), slice(self.seen, windows)):
            moments = gptq.Moments.zeros(self.tensors[keys[0]].shape[-2])
            for batch, there in self._batches(part):
                h = [padded(getattr(self.streams, w)[batch], len(there)) for w in self.models]
                met = [self._run(half, want, w, x)[0] for w, x in zip(self.models, h, strict=True)]
                weights = jnp.repeat(jnp.asarray(there, jnp.float32), met[0].shape[1])
                x, other = (y.reshape(-1, y.shape[-1]) for y in (met[0], met[-1]))
                x = as_multiplied(x, self.config.activations)
                moments = gptq.add(moments, x, other, weights)
            parts.append(moments)
        tokens = self.seen * self.streams.teacher.shape[1]
        for at in keys:
            weight = self._round(at, None, tokens, *parts)
            self._put(at, weight)

    def _put(self, at, weight) -> None:
        module, name = at
        self.student[module][name] = weight

    def _round(self, at, expert: int | None, tokens: int, seen, held):
        """A matrix, [I, O], in its format, by its moments, and a line of the report."""
        entry, stack = self.entries[at], conversion.stacked(self.tensors[at])
        e = expert or 0
        plain = one_matrix(self.plain[at], e, entry.restored)
        made = gptq.Rounded(plain, 0.0, 0.0, np.zeros(3))
        if tokens >= seen.squares.shape[-1]:
            w = jax.tree.map(lambda x: jnp.asarray(x[e]), stack)
            made = gptq.round_matrix(quantize.dequantize(w), plain, entry.format, seen, held)
        losses = np.asarray(made.losses)
        if not np.isfinite(losses).all():
            raise ValueError(
                f"{entry.title}: its weights, or what reaches them of the text, are not finite; "
                "verify the checkpoint"
            )
        way = WAYS[int(np.argmin(losses))]
        damping = float(made.damping) if np.isfinite(made.damping) else None
        numbers = float(made.shift), damping, tuple(map(float, losses))
        self.choices.append(Choice(entry.path, expert, entry.format, tokens, way, *numbers))
        self.advance(entry, math.prod(stack.shape[-2:]))
        return made.weight

    # Experts

    def _convert_experts(self, devices) -> None:
        """Converts all experts, each for the tokens that the teacher sends it."""
        names = ("linear", "linear_v", "linear_1")
        keys = [(f"{PREFIX}/moe/{name}", "w") for name in names]
        if not any(map(self._is_calibrated, keys)):
            return
        index, gates = self._routing()
        done = {}
        with concurrent.futures.ThreadPoolExecutor(len(devices)) as threads:
            turns = zip(range(self.config.num_experts), itertools.cycle(devices), strict=False)

            def one(turn):
                expert, device = turn
                with jax.default_device(device):
                    done[expert] = self._convert_expert(expert, keys, index, gates)

            list(threads.map(one, turns))
        self.choices.sort(key=lambda c: (c.path, c.expert or 0))
        for at in keys:
            if self._is_calibrated(at):
                stacked = [done[e][at] for e in range(self.config.num_experts)]
                self._put(at, jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *stacked))

    def _routing(self):
        """The teacher's choices, expert index and gate [W, T, A] each."""
        met = functools.partial(self._run, "experts", "moe", "teacher")  # x, gates, index
        h = self.streams.teacher
        found = [made for _, made in self._outputs(lambda h: met(h)[2:0:-1], h, slice(0, len(h)))]
        return tuple(np.concatenate(x) for x in zip(*found, strict=True))

    def _convert_expert(self, expert: int, keys, index, gates) -> dict:
        """The matrices of one expert, {key: weight}."""
        chosen = (index == expert).any(axis=-1)
        gate = np.where(index == expert, gates, 0).sum(axis=-1)
        seen = np.arange(len(chosen)) < self.seen
        parts = [np.nonzero(chosen & part[:, None]) for part in (seen, ~seen)]
        size = self.config.emb_size
        tokens = len(parts[0][0])
        norm = self.teacher[f"{PREFIX}/rms_norm_2"]["scale"]
        eps = self.config.rms_norm_eps

        def rows(part):
            """x of the student and of the teacher [ROWS, D], and weights [ROWS], piece by piece."""
            for piece in conversion.slices(0, len(part[0]), ROWS):
                at = tuple(axis[piece] for axis in part)
                weights = np.zeros(ROWS, np.float32)
                weights[: len(at[0])] = np.square(gate[at])
                x = []
                for stream in (getattr(self.streams, whose) for whose in self.models):
                    h = np.zeros((ROWS, size), stream.dtype)
                    h[: len(at[0])] = stream[at]
                    x.append(model.rms_norm(jnp.asarray(h), norm, eps))
                yield x[0], x[-1], jnp.asarray(weights)

        def of_expert(params, at):
            return jax.tree.map(lambda x: x[expert], params[at[0]][at[1]])

        up, gate_up, down = keys
        made = {}
        moments = [gptq.Moments.zeros(size) for _ in parts]
        for i, part in enumerate(parts):
            for x, other, weights in rows(part):
                x = as_multiplied(x, self.config.activations)
                moments[i] = gptq.add(moments[i], x, other, weights)
        for at in (up, gate_up):
            if self._is_calibrated(at):
                made[at] = self._round(at, expert, tokens, *moments)
            else:
                made[at] = of_expert(self.student, at)
        if self._is_calibrated(down):
            teacher = [of_expert(self.teacher, at) for at in (up, gate_up)]
            moments = [gptq.Moments.zeros(self.config.ffn_size) for _ in parts]
            for i, part in enumerate(parts):
                for x, other, weights in rows(part):
                    x = hidden_rows(x, made[up], made[gate_up], config=self.config)
                    other = hidden_rows(other, *teacher, config=self.of_teacher)
                    x = as_multiplied(x, self.config.activations)
                    moments[i] = gptq.add(moments[i], x, other, weights)
            made[down] = self._round(down, expert, tokens, *moments)
        return made


def padded(h: np.ndarray, size: int) -> np.ndarray:
    """Windows [W, T, D] and as many of zeros as make up `size`."""
    return np.pad(h, [(0, size - len(h)), (0, 0), (0, 0)])


def one_matrix(make: Callable[[conversion.Index], Any], expert: int, shapes: Any):
    """What `conversion.converter` makes of one expert, [I, O], on the device; shapes: of all."""
    packed = isinstance(shapes, quantize.PackedWeight)
    width = shapes.packed.shape[-1] if packed else shapes.shape[-2]
    made = make((slice(expert, expert + 1), slice(0, shapes.shape[-1]), slice(0, width)))
    return jax.tree.map(lambda x: jnp.asarray(x[0]), made)


def tree(weights: dict[tuple[str, str], Any]) -> Params:
    """{(module, name): weight} as {module: {name: weight}}."""
    params: Params = {}
    for (module, name), weight in weights.items():
        params.setdefault(module, {})[name] = weight
    return params


# --- All layers -----------------------------------------------------------------------------------


def choose_windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """Windows int32 [W, T] of a text's tokens, about `count` tokens, evenly spread over it.

    Every HELD-th one is moved to the end: those are held out. Raises ValueError for a text of
    fewer than two windows.
    """
    if len(tokens) < 2 * length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than the two windows of {length} that "
            "calibration needs; take a longer one"
        )
    windows = data.windows(tokens, length).inputs
    chosen = min(len(windows), max(2, count // length))
    windows = windows[np.linspace(0, len(windows) - 1, chosen).round().astype(int)]
    every = min(HELD, chosen)
    held = np.arange(chosen) % every == every - 1
    return np.concatenate([windows[~held], windows[held]])


def stored_bytes(config: model.LanguageModelConfig, windows: np.ndarray) -> int:
    """What a `Calibration` has in its folder at most: the streams into three layers.

    Of the one that is stored, of the one that is converted, and of the next one.
    """
    each = windows.size * config.emb_size * jnp.dtype(config.fprop_dtype).itemsize
    return 3 * len(Streams._fields) * each


class Calibration:
    """Converts a model's layers in their order; what is done is kept in a folder, to go on later.

    The folder has, before layer i, both streams as `streams-i.npy`, and after it the choices made.
    """

    of_layer = Layer

    def __init__(
        self,
        config: model.LanguageModelConfig,
        entries: Sequence[Any],
        windows: np.ndarray,
        folder: Path,
        advance: Callable[[Any, int], None] = lambda entry, weights: None,
    ):
        """config: of the converted model; entries: of `checkpoint.check_files`, all of them

        windows: int32 [W, T], of which the last ones are held out
        advance: is told of the weights done, and whose
        """
        self.config, self.windows, self.folder, self.advance = config, windows, folder, advance
        self.entries = {(entry.module, entry.name): entry for entry in entries}
        self.devices = jax.local_devices()
        self.done: tuple[int, dict[str, Any]] | None = None
        self.unsealed: dict[int | None, set[str]] = {}
        for entry in entries:
            self.unsealed.setdefault(layer_of(entry.module), set()).add(entry.path)

    def weight(self, path: str):
        """A parameter of a layer as it was converted, for now on a device; layers in order."""
        layer = layer_of(path)
        if self.done is None or self.done[0] != layer:
            self.done = None  # frees the last one
            self.done = layer, self._convert(layer)
        return self.done[1][path]

    def sealed(self, paths: Iterable[str]) -> None:
        """These are safe: what was needed to convert layers that are all safe is removed."""
        for path in paths:
            layer = layer_of(path)
            self.unsealed.get(layer, set()).discard(path)
            if layer is not None and not self.unsealed[layer]:
                self._streams(layer).unlink(missing_ok=True)

    def report(self) -> dict[str, list]:
        """Those of all layers, one after the other."""
        layers = [files.read_json(self._choices(i)) for i in range(self.config.num_layers)]
        return {key: [line for layer in layers for line in layer[key]] for key in layers[0]}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _streams(self, layer: int) -> Path:
        return self.folder / f"streams-{layer:05d}.npy"

    def _choices(self, layer: int) -> Path:
        return self.folder / f"choices-{layer:05d}.json"

    def _convert(self, layer: int) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        streams = self._start() if layer == 0 else self._load(layer)
        name = f"decoder_layer_{layer}"
        own = {
            (module.replace(name, LAYER), key): entry
            for (module, key), entry in self.entries.items()
            if layer_of(module) == layer
        }
        with concurrent.futures.ThreadPoolExecutor() as pool:
            work = self.of_layer(self.config, own, streams, pool, self.advance)
            made = work.convert(self.devices)
        if layer + 1 < self.config.num_layers:
            self._save(layer + 1, streams)
        files.write_json(self._choices(layer), work.report())
        return {own[module, key].path: w for module in made for key, w in made[module].items()}

    def _start(self) -> Streams:
        """The embeddings of the text, from the table that each model has in memory."""
        module, name = runners.EMBEDDINGS, "embeddings"
        params = {module: {name: jnp.asarray(self.entries[module, name].read())}}
        c = self.config
        shape, dtype = (*self.windows.shape, c.emb_size), jnp.dtype(c.fprop_dtype)
        streams = Streams(np.empty(shape, dtype), np.empty(shape, dtype))
        for h, table in zip(streams, (params, runners.cast_embeddings(params, c)), strict=True):
            for batch in conversion.slices(0, len(h), max(1, ROWS // h.shape[1])):
                h[batch] = embed(table, self.windows[batch], config=c)
        return streams

    def _save(self, layer: int, streams: Streams) -> None:
        with files.replacing(self._streams(layer)) as part, part.open("wb") as file:
            for stream in streams:  # as bytes: NumPy has no bfloat16
                np.save(file, stream.view(np.uint8))

    def _load(self, layer: int) -> Streams:
        path, dtype = self._streams(layer), jnp.dtype(self.config.fprop_dtype)
        with files.open_file(path) as file:
            return Streams(*(np.load(file).view(dtype) for _ in Streams._fields))


def order(module: str) -> int:
    """By which to sort: what is in no layer first, then layer by layer."""
    layer = layer_of(module)
    return -1 if layer is None else layer


def layer_of(path: str) -> int | None:
    """The number of the layer that a parameter or module belongs to, None for one of no layer."""
    match = PATH.match(path)
    return int(match[1]) if match else None
