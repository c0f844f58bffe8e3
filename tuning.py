"""Gradient steps on a converted model as a whole, towards what its source predicts.

Calibration and `recovery.py` know of one layer at a time. Here the scales of all ternary matrices,
the gains of norms in layers and the routers move together, so that predictions come nearer to the
source's; trits, and the multipliers of groups, stay as they are. What was learned is kept if it
serves windows that were held out. Both models have to fit into the memory at once.
"""

import dataclasses
import functools
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import calibration
import checkpoint
import fidelity
import learning
import model
import quantize
import recovery
import sharding
from quantize import PackedWeight

TOKENS = 2048  # of a step, in whole windows
RATE = 3e-3  # of Adam, which a cosine takes to zero; relative, of a router in units of its spread

Params = calibration.Params


def learnable(params: Params) -> Params:
    """Of a converted model, what is learned: of its layers, scales of trits, gains and routers."""
    chosen = {
        module: {
            name: weight.scales if isinstance(weight, PackedWeight) else weight
            for name, weight in weights.items()
            if not isinstance(weight, quantize.QuantizedWeight)
        }
        for module, weights in params.items()
        if calibration.layer_of(module) is not None
    }
    return jax.tree.map(jnp.array, chosen)  # copies: `step` is given them for good


def units(learned: Params) -> Params:
    """What a step of 1 means for each number."""
    return {
        module: {
            name: jnp.std(x) if module.endswith("/router") else abs(x) for name, x in values.items()
        }
        for module, values in learned.items()
    }


def put(learned: Params, params: Params) -> Params:
    """The model with what is learned in its place."""

    def one(weight, value):
        packed = isinstance(weight, PackedWeight)
        return dataclasses.replace(weight, scales=value) if packed else value

    return {
        module: weights
        | {name: one(weights[name], value) for name, value in learned.get(module, {}).items()}
        for module, weights in params.items()
    }


def in_floats(params: Params) -> Params:
    """Packed weights as the floats that they stand for: faster to take gradients through."""

    def one(weight):
        return quantize.dequantize(weight) if isinstance(weight, PackedWeight) else weight

    return {m: {name: one(w) for name, w in weights.items()} for m, weights in params.items()}


# --- Learning -------------------------------------------------------------------------------------


def predicted(params: Params, tokens, config: model.LanguageModelConfig) -> jax.Array:
    """Logits [B, T, V] of tokens [B, T]."""
    return model.make_model(config).apply(params, None, tokens).logits


@functools.partial(jax.jit, static_argnames=("config", "of_teacher"))
def divergence(params: Params, teacher: Params, tokens, *, config, of_teacher) -> jax.Array:
    """Mean KL(teacher || student) of the predictions for tokens [B, T], in nats."""
    wanted = predicted(teacher, tokens, of_teacher)
    return learning.distill_loss(predicted(params, tokens, config), wanted, temperature=1.0)


@functools.partial(
    jax.jit, static_argnames=("config", "of_teacher"), donate_argnames=("learned", "state")
)
def step(learned, state, params, teacher, unit, tokens, rate, *, config, of_teacher):
    """What is learned, and the state of Adam, after a step on tokens [B, T]."""

    def loss(learned):
        student = in_floats(put(learned, params))
        return divergence(student, teacher, tokens, config=config, of_teacher=of_teacher)

    return recovery.moved(learned, state, jax.grad(loss)(learned), unit, rate)


class Tuning:
    """A converted checkpoint that learns; `convert.convert` takes it for a `Calibration`."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        windows: np.ndarray,
        tokens: int,
        advance: Callable[[Any, int], None] = lambda entry, weights: None,
    ):
        """source: of the converted folder; windows: int32 [W, T], the last of them held out

        tokens: that gradients are taken of; advance: as of `calibration.Calibration`
        """
        self.folder, self.windows, self.tokens, self.advance = folder, windows, tokens, advance
        mesh, config = sharding.make_mesh(), model.config_from_dict(checkpoint.read_config(folder))
        self.teacher = fidelity.open_teacher(source, mesh)
        precision = checkpoint.stored_precision(folder)
        self.student = fidelity.Walker(folder, config, precision, mesh)
        self.entries = {entry.path: entry for entry in self.student.entries}

    def weight(self, path: str):
        """A parameter of a layer, as it is to be stored."""
        entry = self.entries[path]
        weight = self.learned[0][entry.module][entry.name]
        if isinstance(weight, PackedWeight):
            self.advance(entry, math.prod(weight.shape))
        return weight

    def sealed(self, paths: Iterable[str]) -> None:
        """There is nothing to remove before the end."""

    def report(self) -> dict[str, Any]:
        """The KL on windows that were held out, without and with what was learned."""
        kl = [x if math.isfinite(x) else None for x in self.learned[1]]
        return {"tuned": {"divergences": kl}}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @functools.cached_property
    def learned(self) -> tuple[Params, list[float]]:
        """The model that is better on what was held out, and both divergences there."""
        seen, length = calibration.Streams(self.windows, self.windows).seen, self.windows.shape[1]
        size = max(1, TOKENS // length)
        steps = -(-self.tokens // (size * length))
        teacher, params = self.teacher.params(), self.student.params()
        configs = {"config": self.student.config, "of_teacher": self.teacher.config}
        learned = learnable(params)
        unit, state = units(learned), optax.scale_by_adam().init(learned)
        turns = recovery.turns(seen, size, steps, RATE)
        quiet = not sys.stderr.isatty()
        for chosen, rate in tqdm.tqdm(turns, "tune", steps, unit="step", disable=quiet):
            tokens = self.windows[chosen]
            learned, state = step(learned, state, params, teacher, unit, tokens, rate, **configs)
        models = params, put(learned, params)
        held = self.windows[seen:, None]
        kl = [float(np.mean([divergence(m, teacher, w, **configs) for w in held])) for m in models]
        return models[kl[1] < kl[0]], kl
