"""Gradient steps on a converted layer, towards what the layer that it was made from puts out.

Calibration gives each matrix the trits that are best for its own outputs. Here those of a layer,
their scales, and its norms and router move together: latent weights in float32 are rounded anew in
each step, and gradients go straight through the rounding (Bengio et al. 2013), as in training.
What has been learned is kept if it serves windows that were held out.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import calibration
import formats
import gptq
import quantize
from quantize import PackedWeight

TOKENS = 1024  # of a step, in whole windows
RATE = 2e-2  # of Adam, which a cosine takes to zero; of latent weights, in units of their scale
SLOWLY = 0.1  # of that: relative changes of scales and norms, and a router's in units of its spread

Params = calibration.Params


class Latent(NamedTuple):
    """A packed weight in training.

    w: float32 [..., I, O], what is rounded
    scales: float32 [..., P, G, C], of each plane and group of inputs; C is 1 or O
    """

    w: jax.Array
    scales: jax.Array


def latent(weight: PackedWeight, wanted: jax.Array) -> Latent:
    """What rounds to a packed weight: the wanted [..., I, O], where that does, else itself."""
    scales = weight.scales[..., None, :, :]
    if weight.multipliers is not None:  # [..., O, G, P]
        scales = scales * jnp.moveaxis(weight.multipliers, -3, -1).swapaxes(-3, -2)
    made = quantize.dequantize(weight)
    same = jnp.abs(values(Latent(wanted, scales)) - made) <= 1e-3 * jnp.abs(made)
    return Latent(jnp.where(same, wanted, made), scales)


def values(weight: Latent) -> jax.Array:
    """The nearest sums of trits times scales, float32 [..., I, O].

    The gradient goes to the scales, and straight through to w, but not beyond 1.5 times the largest
    sum: w would move away from all that it can become.
    """
    w, planes = weight.w, of_inputs(weight)
    trits = jax.lax.stop_gradient(_trits(w, planes))
    inside = jnp.abs(w) <= 1.5 * planes.sum(axis=-3)
    straight = jnp.where(inside, w - jax.lax.stop_gradient(w), 0)
    return jnp.sum(trits * planes, axis=-3) + straight


def of_inputs(weight: Latent) -> jax.Array:
    """The scales of each input, [..., P, I, C]."""
    inputs, groups = weight.w.shape[-2], weight.scales.shape[-2]
    size = (inputs + -inputs % 4) // groups
    return jnp.repeat(weight.scales, size, axis=-2)[..., :inputs, :]


def _trits(w, planes):  # [..., I, O], [..., P, I, C] -> [..., P, I, O]
    x, scales = jnp.abs(w), jnp.moveaxis(planes, -3, 0)
    trits = formats.nearest(x, *scales) if len(scales) > 1 else [2 * x > scales[0]]
    return jnp.stack([jnp.sign(w) * t for t in trits], axis=-3)


def packed(weight: Latent) -> PackedWeight:
    """The packed form of a latent weight: its scales become multiples, and trits fit those."""
    if weight.scales.shape[-1] == 1:
        scale, multipliers, scales = weight.scales[..., 0, :, :], None, weight.scales
    else:
        scale, multipliers = formats.as_multiples(weight.scales)
        scales = scale[..., None, :, :] * (1 if multipliers is None else multipliers)
    trits = _trits(weight.w, of_inputs(weight._replace(scales=scales)))
    return gptq.pack(trits.astype(jnp.int8), scale, multipliers)


# --- What is learned ------------------------------------------------------------------------------


def is_latent(value) -> bool:
    return isinstance(value, Latent)


def learnable(converted: Params, original: Params) -> Params:
    """Of a converted layer, what is learned: packed weights as `Latent`, and floats."""

    def one(weight, wanted):
        if isinstance(weight, PackedWeight):
            return latent(weight, quantize.dequantize(wanted))
        return jnp.array(weight)  # a copy: `step` is given it for good

    return {
        module: {
            name: one(weight, original[module][name])
            for name, weight in weights.items()
            if not isinstance(weight, quantize.QuantizedWeight)
        }
        for module, weights in converted.items()
    }


def units(learned: Params) -> Params:
    """What a step of 1 means for each number, in a tree of arrays that fit."""

    def of(value):
        if is_latent(value):
            scale = value.scales[..., 0, :, :].mean(axis=-2, keepdims=True)
            return Latent(scale, SLOWLY * value.scales)
        return SLOWLY * (jnp.abs(value) if value.ndim == 1 else jnp.std(value))

    return jax.tree.map(of, learned, is_leaf=is_latent)


def put(learned: Params, params: Params, form: Callable[[Latent], Any]) -> Params:
    """A layer's params with what is learned in its place; latent weights in a form of theirs."""
    made = jax.tree.map(lambda x: form(x) if is_latent(x) else x, learned, is_leaf=is_latent)
    return {module: weights | made.get(module, {}) for module, weights in params.items()}


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def step(learned: Params, state, params: Params, unit: Params, h, wanted, rate, *, config):
    """What is learned, and the state of Adam, after a step towards the wanted hidden states.

    h, wanted: [B, T, D]; Adam takes no notice of how large the loss is
    """

    def loss(learned):
        made = calibration.run_layer(put(learned, params, values), h, config=config).hidden
        return jnp.mean(jnp.square(made.astype(jnp.float32) - wanted))

    return moved(learned, state, jax.grad(loss)(learned), unit, rate)


def moved(learned: Params, state, gradient: Params, unit: Params, rate):
    """What is learned, and the state of Adam, a step on."""
    direction, state = optax.scale_by_adam().update(gradient, state)
    return jax.tree.map(lambda x, d, unit: x - rate * unit * d, learned, direction, unit), state


def turns(windows: int, size: int, steps: int, rate: float):
    """For each step, the indices of so many of the windows, and its rate, which a cosine lowers.

    In a random order, in which each comes once before any comes again.
    """
    random, order = np.random.default_rng(0), np.empty(0, int)
    for i in range(steps):
        while len(order) < size:
            order = np.concatenate([order, random.permutation(windows)])
        yield order[:size], rate * (1 + math.cos(math.pi * i / steps)) / 2
        order = order[size:]


class RecoveredLayer(calibration.Layer):
    """A layer that is calibrated, and then learns from the teacher's."""

    def __init__(self, *args, tokens: int):
        """tokens: that gradients are taken of; other arguments as of `calibration.Layer`"""
        *others, advance = args
        super().__init__(*others, lambda entry, weights: advance(entry, weights // 2))
        self.tokens, self.advance_step = tokens, advance
        self.errors: list[float] = []

    def convert(self, devices: Sequence[jax.Device]) -> Params:
        before = self.streams.student.copy()
        converted = super().convert(devices)
        learned = self._learn(before)
        self.errors = [self._error(params, before) for params in (converted, learned)]
        if self.errors[1] < self.errors[0]:
            self.student = learned
            for batch, h in self._made_by(learned, before, slice(0, len(before))):
                self.streams.student[batch] = h
        return self.student

    def report(self) -> dict[str, list]:
        """With the errors of hidden states on held-out windows, without and with what was learned.

        Squares, over those of the difference between what the layer is given and what is wanted;
        None for what is no number.
        """
        errors = [error if math.isfinite(error) else None for error in self.errors]
        return super().report() | {"layers": [{"errors": errors}]}

    def _made_by(self, params: Params, before: np.ndarray, of: slice):
        """Slices of windows, and what the layer makes of the hidden states there."""

        def hidden(h):
            return calibration.run_layer(params, h, config=self.config).hidden

        return self._outputs(hidden, before, of)

    def _error(self, params: Params, before: np.ndarray) -> float:
        lost = moved = 0.0
        for batch, h in self._made_by(params, before, slice(self.seen, len(before))):
            wanted = self.streams.teacher[batch].astype(np.float32)
            lost += np.square(h - wanted).sum(dtype=float)
            moved += np.square(before[batch] - wanted).sum(dtype=float)
        return lost / max(moved, 1e-30)

    def _learn(self, before: np.ndarray) -> Params:
        """The layer after steps on the windows that are not held out, in a random order."""
        size = max(1, TOKENS // before.shape[1])
        steps = -(-self.tokens // (size * before.shape[1]))
        learned = learnable(self.student, self.teacher)
        unit, state = units(learned), optax.scale_by_adam().init(learned)
        for i, (windows, rate) in enumerate(turns(self.seen, size, steps, RATE)):
            rows = before[windows], self.streams.teacher[windows]
            learned, state = step(
                learned, state, self.student, unit, *rows, rate, config=self.config
            )
            self._advance(i, steps)
        return jax.jit(functools.partial(put, form=packed))(learned, self.student)

    def _advance(self, i: int, steps: int) -> None:
        """The other half of the progress of each matrix."""
        for at in filter(self._is_calibrated, self.plain):
            half = math.prod(self.tensors[at].shape) // 2
            self.advance_step(self.entries[at], half * (i + 1) // steps - half * i // steps)


class Recovery(calibration.Calibration):
    """Calibration, with that many tokens of learning in each layer; none: calibration alone."""

    def __init__(self, *args, tokens: int):
        super().__init__(*args)
        if tokens:
            self.of_layer = functools.partial(RecoveredLayer, tokens=tokens)
