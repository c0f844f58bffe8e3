"""The forward pass of training, its losses and the update step: what is compiled, and no files.

Shape letters as in `model.py`; a batch has T + 1 tokens in a row, the last one a target only.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import formats
import model


def setting(default, text: str):
    return dataclasses.field(default=default, metadata={"help": f"{text} ({default})"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What fixes a run, besides the model and the text; the defaults are the demo's recipe."""

    steps: int = setting(1750, "updates")
    batch_size: int = setting(16, "sequences computed together, as long as the model's context")
    accumulate: int = setting(1, "batches whose gradients make one update")
    learning_rate: float = setting(2e-3, "of AdamW, after the warm-up; a cosine to zero follows")
    warmup: int = setting(100, "updates in which the learning rate rises")
    weight_decay: float = setting(0.1, "of matrices")
    dropout: float = setting(0.1, "of embeddings and of what each block adds to them")
    bpe_dropout: float = setting(0.2, "chance that no token reaches across a place in the text")
    plain: float = setting(0.5, "share of sequences of the text as it is, without such places")
    balance_weight: float = setting(0.01, "of the loss that keeps experts equally busy")
    router_z_weight: float = setting(1e-3, "of the loss that keeps router logits small")
    router_noise: float = setting(0.0, "largest relative change to each input of a router")
    distill_weight: float = setting(1.0, "of the distance to the teacher's predictions")
    temperature: float = setting(1.0, "at which predictions are compared with the teacher's")
    hidden_weight: float = setting(0.0, "of the distance to the teacher's hidden states")
    eval_every: int = setting(250, "updates between evaluations, each of which saves the state")
    seed: int = setting(0, "of weights, batches and dropout")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0
            if value == math.inf:
                raise ValueError(f"{field.name} must be finite, got {value}")
            if field.name in ("steps", "batch_size", "accumulate", "eval_every"):
                least = 1
            if not value >= least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        for name in ("dropout", "bpe_dropout", "router_noise"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}")
        if self.plain > 1:
            raise ValueError(f"plain must be at most 1, got {self.plain}")
        if not self.temperature:
            raise ValueError("temperature must be above 0, got 0")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be below steps, {self.steps}, got {self.warmup}")


class TrainState(NamedTuple):
    """All that changes from step to step; what is random follows from the seed and the step."""

    step: jax.Array  # int32
    params: dict  # latent, float32
    opt_state: Any


# --- Forward --------------------------------------------------------------------------------------


def training_model(
    config: model.LanguageModelConfig,
    weights: str,
    dropout: float = 0.0,
    router_noise: float = 0.0,
) -> hk.Transformed:
    """The model on latent float weights, seen as their formats of the precision `weights` are.

    dropout: of the embeddings, and of what each block adds to them
    router_noise: e; the inputs of routers are multiplied by random numbers from 1 - e to 1 + e
      (Switch Transformers, section 2.2, "input jitter")
    """
    params = model.abstract_params(config)
    named = model.formats_of(params, model.precision_table(weights))

    def getter(next_getter, value, context):
        w = next_getter(value)
        return formats.format_named(named[f"{context.module_name}/{context.name}"]).train(w)

    def interceptor(next_f, args, kwargs, context):
        if context.method_name == "added_to" and dropout:
            h, x = args
            return h + context.module(x)
        if context.method_name != "__call__":
            return next_f(*args, **kwargs)
        if router_noise and isinstance(context.module, model.Router):
            args = (jitter(hk.next_rng_key(), args[0], router_noise), *args[1:])
        y = next_f(*args, **kwargs)
        if dropout and is_added(context.module):
            y = drop(hk.next_rng_key(), y, dropout)
        return y

    def forward(*args, **kwargs):
        with hk.custom_getter(getter), hk.intercept_methods(interceptor):
            return model.LanguageModel(config, model.Transformer(config))(*args, **kwargs)

    return hk.transform(forward)


def is_added(module: hk.Module) -> bool:
    """Whether the stream of hidden states is the sum of what this module and others return."""
    return isinstance(module, model.InOutEmbed) or module.name in model.ADDED_NORMS


def drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """x with zeros at random, the others larger by as much; the rate is rounded to 256ths.

    A byte of randomness for each number: the 32 bits of `jax.random.bernoulli` were 6 % of a step.
    """
    dropped = round(256 * rate)
    bits = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(bits >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)


def jitter(key: jax.Array, x: jax.Array, amount: float) -> jax.Array:
    return x * jax.random.uniform(key, x.shape, x.dtype, 1 - amount, 1 + amount)


# --- Losses ---------------------------------------------------------------------------------------


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats: [..., V], int32 [...] -> float32 [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def expert_load(index: jax.Array, experts: int) -> jax.Array:
    """The share of the choices, index int32 [B, T, A], that fell on each expert: float32 [E]."""
    return jnp.mean(index.reshape(-1) == jnp.arange(experts)[:, None], axis=1, dtype=jnp.float32)


def balance_loss(probs: jax.Array, index: jax.Array) -> jax.Array:
    """E times the sum over experts of (share of tokens) x (mean probability); 1 when even.

    probs: float32 [B, T, E]; index: int32 [B, T, A]. (Switch Transformers, equations 4 to 6)
    """
    experts = probs.shape[-1]
    return experts * jnp.sum(expert_load(index, experts) * jnp.mean(probs, axis=(0, 1)))


def router_z_loss(logits: jax.Array) -> jax.Array:
    """Mean squared logsumexp of the router's logits [B, T, E]. (ST-MoE, equation 5)"""
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))


def distill_loss(logits: jax.Array, taught: jax.Array, temperature: float) -> jax.Array:
    """Mean KL(teacher || student) of two predictions, [B, T, V] each, at a temperature.

    Times the temperature's square, so that it moves the student as much at each. (Hinton et al.
    2015, section 2)
    """
    student, teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, taught))
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * jnp.mean(divergence)


def hidden_loss(layers, taught) -> jax.Array:
    """Mean squared difference of two models' hidden states, each scaled to a mean square of 1."""

    def scaled(layer):
        h = layer.hidden.astype(jnp.float32)
        return h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-5)

    differences = [scaled(a) - scaled(b) for a, b in zip(layers, taught, strict=True)]
    return sum(jnp.mean(jnp.square(d)) for d in differences) / len(differences)


def loss_and_metrics(apply, settings: Settings, params: dict, tokens, key=None, teach=None):
    """The training loss of tokens [B, T + 1], and what to log: its parts, and how experts are used.

    key: of dropout and router noise; teach: the teacher, from tokens to its output
    """
    output = apply(params, key, tokens[:, :-1])
    metrics = {"loss": jnp.mean(cross_entropy(output.logits, tokens[:, 1:]))}
    parts = [(1.0, metrics["loss"])]
    routed = [layer for layer in output.layers if layer.expert_index is not None]
    if routed:
        metrics |= router_metrics(routed)
        parts += [(settings.balance_weight, metrics["balance"])]
        parts += [(settings.router_z_weight, metrics["router_z"])]
    if teach is not None:
        taught = teach(tokens[:, :-1])
        metrics["distill"] = distill_loss(output.logits, taught.logits, settings.temperature)
        parts += [(settings.distill_weight, metrics["distill"])]
        if settings.hidden_weight:
            metrics["hidden"] = hidden_loss(output.layers, taught.layers)
            parts += [(settings.hidden_weight, metrics["hidden"])]
    return sum(weight * part for weight, part in parts), metrics


def router_metrics(routed) -> dict:
    """Summed balance and z loss, the load of each expert [L, E], the router's entropy in nats."""
    entropies = [jax.scipy.special.entr(r.router_probs).sum(axis=-1) for r in routed]  # [B, T]
    return {
        "balance": sum(balance_loss(r.router_probs, r.expert_index) for r in routed),
        "router_z": sum(router_z_loss(r.router_logits) for r in routed),
        "router_entropy": jnp.mean(jnp.stack(entropies)),  # log E when undecided
        "load": jnp.stack([expert_load(r.expert_index, r.router_probs.shape[-1]) for r in routed]),
    }


# --- Update ---------------------------------------------------------------------------------------


def schedule(settings: Settings) -> optax.Schedule:
    """The learning rate of each step: a linear warm-up, then a cosine down to zero."""
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup, settings.steps
    )


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW on clipped gradients; matrices alone decay."""

    def decayed(params):
        return jax.tree.map(lambda w: w.ndim > 1, params)

    decay = settings.weight_decay
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule(settings), b2=0.95, weight_decay=decay, mask=decayed),
    )


def make_step(apply, optimizer, settings: Settings, teacher=None, shardings=None):
    """`(state, tokens [N B, T + 1], teacher's parameters) -> (state, metrics)`, compiled.

    The old state is donated. teacher: a function of its parameters, a key and tokens, or None;
    shardings: of the state on a mesh
    """

    def gradients(params, tokens, key, taught):
        teach = None if teacher is None else functools.partial(teacher, taught, None)
        loss = functools.partial(loss_and_metrics, apply, settings)
        return jax.grad(loss, has_aux=True)(params, tokens, key, teach)

    out = None if shardings is None else (shardings, None)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out)
    def step(state, tokens, taught=None):
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        of_part = functools.partial(gradients, state.params, taught=taught)
        grads, metrics = mean_over_parts(of_part, tokens, key, settings.accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def mean_over_parts(f, tokens: jax.Array, key: jax.Array, parts: int):
    """The mean of f(tokens, key), a tree, over N equal parts of tokens [N B, T + 1], one by one.

    Each part takes every Nth row, so that on a mesh all devices have some of it.
    """
    if parts == 1:
        return f(tokens, key)
    tokens = tokens.reshape(-1, parts, tokens.shape[-1]).swapaxes(0, 1)  # [N, B, T + 1]
    keys = jax.random.split(key, parts)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, tokens[0], keys[0]))

    def add(total, part):
        return jax.tree.map(jnp.add, total, f(*part)), None

    total, _ = jax.lax.scan(add, zeros, (tokens, keys))
    return jax.tree.map(lambda x: x / parts, total)
