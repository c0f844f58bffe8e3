"""Quantization-aware training of ternary models, and of their twins in full precision.

    python train.py --data tinyshakespeare --output runs/demo

Latent weights are float32. The forward pass is that of `model.py` with absmean ternary values in
their place; the backward pass goes straight through the rounding. The run folder gets a log, a plot
of the loss, a state to resume from, and `checkpoint/` with the weights that the forward pass saw.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from tqdm import tqdm

import checkpoint
import data
import evaluate
import kernels
import model
import quantize
import tokenizer


def setting(default, text: str):
    return dataclasses.field(default=default, metadata={"help": f"{text} ({default})"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What fixes a run, besides the model and the text; the defaults are the demo's recipe."""

    steps: int = setting(3000, "updates")
    batch_size: int = setting(16, "sequences in an update, each as long as the model's context")
    learning_rate: float = setting(2e-3, "of AdamW, after the warm-up; a cosine to zero follows")
    warmup: int = setting(100, "updates in which the learning rate rises")
    weight_decay: float = setting(0.1, "of matrices")
    bpe_dropout: float = setting(0.1, "chance to skip a merge when the text is cut into tokens")
    balance_weight: float = setting(0.01, "of the loss that keeps experts equally busy")
    router_z_weight: float = setting(1e-3, "of the loss that keeps router logits small")
    eval_every: int = setting(250, "updates between evaluations, each of which saves the state")
    seed: int = setting(0, "of weights and batches")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0
            if field.name in ("steps", "batch_size", "eval_every"):
                least = 1
            if not value >= least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be below steps, {self.steps}, got {self.warmup}")


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array  # int32
    params: dict  # latent, float32
    opt_state: Any


# --- Forward and loss -----------------------------------------------------------------------------


def training_model(config: model.LanguageModelConfig, weights: str) -> hk.Transformed:
    """The model on latent float weights; "ternary" ones are seen through `fake_ternarize`."""
    params = model.abstract_params(config)
    kinds = quantize.apply_rules(model.PRECISIONS[weights], params, lambda _, kind, w: kind)

    def getter(next_getter, value, context):
        w = next_getter(value)
        ternary = kinds[context.module_name][context.name] == "ternary"
        return quantize.fake_ternarize(w) if ternary else w

    def forward(*args, **kwargs):
        with hk.custom_getter(getter):
            return model.LanguageModel(config, model.Transformer(config))(*args, **kwargs)

    return hk.transform(forward)


def expert_load(index: jax.Array, experts: int) -> jax.Array:
    """The share of the choices, index int32 [B, T, A], that fell on each expert: float32 [E]."""
    return jnp.mean(jax.nn.one_hot(index, experts), axis=(0, 1, 2))


def balance_loss(probs: jax.Array, index: jax.Array) -> jax.Array:
    """E times the sum over experts of (share of tokens) x (mean probability); 1 when even.

    probs: float32 [B, T, E]; index: int32 [B, T, A]. (Switch Transformers, equations 4 to 6)
    """
    experts = probs.shape[-1]
    return experts * jnp.sum(expert_load(index, experts) * jnp.mean(probs, axis=(0, 1)))


def router_z_loss(logits: jax.Array) -> jax.Array:
    """Mean squared logsumexp of the router's logits [B, T, E]. (ST-MoE, equation 5)"""
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))


def loss_and_metrics(apply, settings: Settings, params: dict, tokens: jax.Array):
    """The training loss of tokens [B, T + 1], and what to log: losses and the busiest expert."""
    output = apply(params, None, tokens[:, :-1])
    loss = jnp.mean(evaluate.cross_entropy(output.logits, tokens[:, 1:]))
    metrics = {"loss": loss}
    routed = [layer for layer in output.layers if layer.expert_index is not None]
    if routed:
        metrics["balance"] = sum(balance_loss(r.router_probs, r.expert_index) for r in routed)
        metrics["router_z"] = sum(router_z_loss(r.router_logits) for r in routed)
        loss = loss + settings.balance_weight * metrics["balance"]
        loss = loss + settings.router_z_weight * metrics["router_z"]
        loads = jnp.stack([expert_load(r.expert_index, r.router_probs.shape[-1]) for r in routed])
        metrics["min_load"] = jnp.min(loads)  # 1/E when even, 0 for a dead expert
        metrics["max_load"] = jnp.max(loads)
    return loss, metrics


# --- Update ---------------------------------------------------------------------------------------


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW on clipped gradients; warm-up, then a cosine down to zero; matrices alone decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup, settings.steps
    )

    def decayed(params):
        return jax.tree.map(lambda w: w.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=settings.weight_decay, mask=decayed),
    )


def make_step(apply, optimizer, settings: Settings):
    """`(state, tokens [B, T + 1]) -> (state, metrics)`, compiled; the old state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        loss = functools.partial(loss_and_metrics, apply, settings)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, tokens)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


# --- Files ----------------------------------------------------------------------------------------


def save_state(path: Path, state: TrainState) -> None:
    """Writes a state as safetensors, whole or not at all."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    part = path.with_suffix(".part")
    safetensors.numpy.save_file(arrays, part)
    os.replace(part, path)


def load_state(path: Path, like: TrainState) -> TrainState:
    """Reads what `save_state` wrote, in the structure of `like`."""
    arrays = safetensors.numpy.load_file(path)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    expected = {jax.tree_util.keystr(key): leaf.shape for key, leaf in leaves}
    found = {key: array.shape for key, array in arrays.items()}
    if found != expected:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[:4]
        raise ValueError(
            f"{path} is the state of another model, it differs in {wrong}; give another --output"
        )
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[key]) for key in expected])


def export(folder: Path, config, params, weights: str, form: str, processor, about: dict) -> None:
    """Writes a checkpoint folder, in place of one that is there.

    form: "converted" is that of `docs/format.md`, with the trits and scales that the forward pass
      sees (or the floats, if it does); "released" is Grok-1's, with the latent weights
      as int8, which turn into these trits on load
    about: the command, the settings, the loss; for `training.json`
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    files = {
        tokenizer.FILE: processor.serialized_model_proto(),
        "training.json": (json.dumps(about, indent=2) + "\n").encode(),
    }
    described = model.config_to_dict(config)
    params = jax.device_get(params)
    if form == "converted":
        rules = model.PRECISIONS[weights]
        saved = quantize.apply_rules(
            rules, params, lambda _, kind, w: quantize.ternarize(w) if kind == "ternary" else w
        )
        described |= checkpoint.quantization(weights, rules)
        checkpoint.save_converted(part, saved, described, files)
    else:
        saved = quantize.apply_rules(
            model.PRECISIONS["int8"],
            params,
            lambda _, kind, w: quantize.quantize_int8_keeping_trits(w) if kind == "int8" else w,
        )
        checkpoint.save(part, saved)
        files["config.json"] = (json.dumps(described, indent=2) + "\n").encode()
        for name, content in files.items():
            (part / name).write_bytes(content)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def plot(path: Path, log: list[dict]) -> None:
    """The training loss, smoothed, and the validation loss, against steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for key, label in (("train", "training"), ("validation", "validation")):
        points = [(row["step"], row[key]) for row in log if key in row]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# --- The run --------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc.

    A step on a CPU needs over a gigabyte for a moment. Given back and asked for again each time,
    that made 290,000 page faults a step of the demo, a fifth of its time on two cores.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-8, 1), (-4, 0), (-1, -1)):  # one arena; no mmap; never trim
            mallopt(parameter, value)


class Texts:
    """Token batches of a training text, cut anew in each epoch when BPE-dropout is on."""

    def __init__(self, processor, text: str, settings: Settings, length: int):
        self.processor, self.text, self.settings, self.length = processor, text, settings, length
        plain = tokenizer.encode(processor, text)
        self.steps_per_epoch = max(1, len(plain) // (settings.batch_size * length))
        self.epoch, self.tokens = (None, plain) if settings.bpe_dropout else (0, plain)

    @property
    def characters_per_token(self) -> float:
        return len(self.text) / len(self.tokens)

    def batch(self, step: int) -> np.ndarray:
        """int32 [B, T + 1], a pure function of the settings and the step."""
        s = self.settings
        epoch = step // self.steps_per_epoch
        if s.bpe_dropout and epoch != self.epoch:
            seed = s.seed * 100_003 + epoch
            self.tokens = tokenizer.encode(self.processor, self.text, s.bpe_dropout, seed)
            self.epoch = epoch
        return data.batch(self.tokens, s.batch_size, self.length, s.seed, step)


def run(
    config,
    settings: Settings,
    weights: str,
    text: str,
    output: Path,
    about: dict,
    form: str = "converted",
) -> dict:
    """Trains, or goes on where the run folder's state ends; returns the last line of the log.

    about, form: of the exported checkpoint, see `export`
    """
    processor = tokenizer.load(None, config.vocab_size)
    training, validation = data.split(text)
    texts = Texts(processor, training, settings, config.sequence_len)
    init, apply = training_model(config, weights)
    optimizer = make_optimizer(settings)
    step = make_step(apply, optimizer, settings)
    logits = jax.jit(lambda params, tokens: apply(params, None, tokens).logits)

    @jax.jit
    def start(key):
        params = init(key, jnp.zeros((1, 1), jnp.int32))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    state = start(jax.random.key(settings.seed))
    state_file, log_file = output / "state.safetensors", output / "log.jsonl"
    log = []
    if state_file.exists():
        state = load_state(state_file, state)
        lines = [json.loads(line) for line in log_file.read_text().splitlines()]
        log = [row for row in lines if row["step"] <= state.step]
    log_file.write_text("".join(json.dumps(row) + "\n" for row in log))
    best = min((row["validation"] for row in log), default=float("inf"))

    first = int(state.step)
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, unit="step")
    since, recent = time.perf_counter(), []
    for i in bar:
        state, metrics = step(state, texts.batch(i))
        recent.append(metrics)
        if (i + 1) % settings.eval_every and i + 1 != settings.steps:
            continue
        rows = jax.device_get(recent)
        row = {"step": i + 1} | {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(
                f"the loss is {row['loss']} at step {i + 1}: lower --learning-rate; the state of "
                f"the evaluation before is in {state_file}"
            )
        seconds = time.perf_counter() - since
        row["tokens_per_second"] = len(recent) * settings.batch_size * texts.length / seconds
        row["train"] = row["loss"] / texts.characters_per_token
        loss = evaluate.text_loss(
            functools.partial(logits, state.params), validation, processor, config.sequence_len
        )
        row["validation"] = loss.per_character
        bar.set_postfix(train=f"{row['train']:.3f}", validation=f"{loss.per_character:.3f}")
        log.append(row)
        with log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if loss.per_character < best:
            best = loss.per_character
            folder, described = output / "checkpoint", about | row
            export(folder, config, state.params, weights, form, processor, described)
        save_state(state_file, state)
        plot(output / "loss.png", log)
        since, recent = time.perf_counter(), []
    return log[-1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help=f"text file, or one of {list(data.SOURCES)}")
    parser.add_argument("--output", type=Path, required=True, help="run folder; resumed if begun")
    presets = sorted(set(model.PRESETS) - {"grok-1"})
    parser.add_argument("--preset", default="demo", choices=presets, help="default: demo")
    parser.add_argument(
        "--weights",
        default="ternary",
        choices=("ternary", "float"),
        help="that the forward pass sees; with float, activations are float too (ternary)",
    )
    parser.add_argument(
        "--format",
        default="converted",
        choices=("converted", "released"),
        help="of the checkpoint: as convert.py writes it, or Grok-1's own, in int8 (converted)",
    )
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        parser.add_argument(flag, type=type(field.default), default=field.default, help=text)
    args = parser.parse_args(argv)
    try:
        settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    except ValueError as error:
        parser.error(str(error))
    command = ["--data", args.data, "--preset", args.preset, "--weights", args.weights]
    command += ["--format", args.format]
    for field in dataclasses.fields(Settings):
        command += ["--" + field.name.replace("_", "-"), str(getattr(settings, field.name))]
    about = {"command": " ".join(["python train.py", *command])}

    config = model.PRESETS[args.preset]
    if args.weights == "float":  # full precision all through
        config = dataclasses.replace(config, activations="float")
    kernels.keep_compilations()
    keep_freed_memory()
    params = model.abstract_params(config)
    count = sum(w.size for w in jax.tree.leaves(params))
    print(f"{args.preset}: {count:,} parameters, {dataclasses.asdict(config)}")
    print(dataclasses.asdict(settings))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        settings_file = args.output / "settings.json"
        if settings_file.exists() and json.loads(settings_file.read_text()) != about:
            raise ValueError(
                f"{args.output} was begun with other settings, see {settings_file}; give the same "
                "ones, or another --output"
            )
        settings_file.write_text(json.dumps(about) + "\n")
        text = data.load_text(args.data)
        last = run(config, settings, args.weights, text, args.output, about, args.format)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last evaluation")
    print(f"validation {last['validation']:.4f} nats per character after {last['step']} steps")


if __name__ == "__main__":
    main()
