"""Quantization-aware training of ternary models, and of their twins in full precision.

    python train.py --data tinyshakespeare --output runs/demo

Latent weights are float32. The forward pass is that of `model.py` with absmean ternary values in
their place; the backward pass goes straight through the rounding. What the run folder gets is in
`records.py`; a run that was stopped, in whatever way, goes on when the command is given again, to
the same last bit.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import re
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from tqdm import tqdm

import checkpoint
import data
import evaluate
import files
import kernels
import learning
import model
import quantize
import records
import runners
import sharding
import tokenizer
from learning import Settings, TrainState

# --- What it takes --------------------------------------------------------------------------------


def abstract_state(config, optimizer, mesh) -> TrainState:
    """Shapes and shardings of a state on a mesh; the moments of Adam lie with their parameters."""

    def placed(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    params = model.abstract_params(config)
    params = jax.tree.map(placed, params, sharding.parameter_shardings(mesh, params))
    everywhere = sharding.activation_sharding(mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda x, param: placed(x, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: placed(x, everywhere),
    )
    return TrainState(placed(jnp.int32(0), everywhere), params, opt_state)


def training_memory(config, settings: Settings, weights: str, mesh) -> dict:
    """Bytes that a step takes on each device, by purpose, without a teacher; nothing is allocated.

    "activations" are what the backward pass needs of the forward pass before XLA fuses any of it:
    a third more than it comes to on a CPU, for the demo.
    """
    state = abstract_state(config, learning.make_optimizer(settings), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    params = sharding.device_bytes(state.params, shardings.params)
    batch = -(-settings.batch_size // mesh.shape["data"])
    one, two = (kept_bytes(config, settings, weights, batch, layers) for layers in (1, 2))
    return {
        "parameters": params,
        "Adam": sharding.device_bytes(state.opt_state, shardings.opt_state),
        "gradients": params * (1 if settings.accumulate == 1 else 2),
        "activations": one + (config.num_layers - 1) * (two - one),
    }


def kept_bytes(config, settings: Settings, weights: str, batch: int, layers: int) -> int:
    """Bytes that the gradient of a batch keeps from the forward pass of so many layers."""
    config = dataclasses.replace(config, num_layers=layers)
    apply = learning.training_model(config, weights, settings.dropout, settings.router_noise).apply
    loss = functools.partial(learning.loss_and_metrics, apply, settings)

    def backward(params, tokens, key):
        return jax.vjp(lambda params: loss(params, tokens, key)[0], params)[1]

    tokens = jax.ShapeDtypeStruct((batch, config.sequence_len + 1), jnp.int32)
    params, key = model.abstract_params(config), jax.random.key(0)
    kept = jax.tree.leaves(jax.eval_shape(backward, params, tokens, key))
    return sum(x.size * x.dtype.itemsize for x in kept)


def active_parameters(config) -> int:
    """How many of the parameters a token is multiplied with: of the experts, those it chooses."""
    params = model.abstract_params(config)
    share = config.num_selected_experts / max(config.num_experts, 1)
    return sum(
        int(w.size * (share if "/moe/" in f"{module}/" else 1))
        for module, entries in params.items()
        for w in entries.values()
    )


def flops_per_token(config) -> int:
    """Of the forward and the backward pass: 6 for each parameter in use, and attention."""
    return 6 * active_parameters(config) + attention_flops(config)


def attention_flops(config) -> int:
    """Of a token's queries with all keys, and of the sums of values, as if nothing were masked."""
    return 12 * config.sequence_len * config.num_layers * config.num_q_heads * config.key_size


def product_rate() -> float:
    """Multiplications and additions a second in a large float32 product, measured."""
    n = 2048
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    seconds = []
    for _ in range(4):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds)


def readable_time(seconds: float) -> str:
    """Seconds for reading, such as 3.4 hours."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1)):
        if seconds >= 2 * size or unit == "seconds":
            count = seconds / size
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"


def plan(config, settings: Settings, weights: str, mesh) -> None:
    """Prints what a run will take; ValueError if a device has too little memory for it."""
    needed = training_memory(config, settings, weights, mesh)
    total, limit = sum(needed.values()), sharding.memory_limit(mesh)
    size = checkpoint.readable_size
    tokens = settings.steps * settings.accumulate * settings.batch_size * config.sequence_len
    rate = product_rate() * (1 if jax.default_backend() == "cpu" else mesh.size)
    seconds = 3 * flops_per_token(config) * tokens / rate
    print("memory      " + " + ".join(f"{name} {size(count)}" for name, count in needed.items()))
    print(f"total       {size(total)} of {size(limit)} on each device")
    about = f"for {tokens:,} tokens, at a third of {rate:.2g} FLOP/s"
    print(f"time        {readable_time(seconds)} {about}")
    if total > limit:
        raise ValueError(
            f"this needs {size(total)} on each device, which has {size(limit)}; try a smaller "
            "--batch-size with a larger --accumulate, --mesh over more devices, or a smaller model"
        )


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


SETTINGS = "settings.json"
TRAIN = "train"  # --tokenizer: one made of the text
SAMPLE = 64  # tokens of a text that an evaluation leaves in the log, a fourth of them given
PROMPT = 1000  # characters, enough for these
DEAD = 0.01  # of an even share: an expert that is chosen less often learns nothing


class Texts:
    """Token batches of a training text, cut anew in each epoch when BPE-dropout is on."""

    def __init__(self, processor, text: str, settings: Settings, length: int):
        self.processor, self.text, self.settings, self.length = processor, text, settings, length
        self.tokens = self.plain = tokenizer.encode(processor, text)
        self.batch_size = settings.batch_size * settings.accumulate
        self.steps_per_epoch = max(1, len(self.plain) // (self.batch_size * length))
        self.epoch = None if settings.bpe_dropout else 0

    @property
    def characters_per_token(self) -> float:
        share = self.settings.plain
        return len(self.text) * ((1 - share) / len(self.tokens) + share / len(self.plain))

    def batch(self, step: int) -> np.ndarray:
        """int32 [N B, T + 1], a pure function of the settings and the step."""
        s = self.settings
        epoch = step // self.steps_per_epoch
        if s.bpe_dropout and epoch != self.epoch:
            seed = s.seed * 100_003 + epoch
            self.tokens = tokenizer.encode(self.processor, self.text, s.bpe_dropout, seed)
            self.epoch = epoch
        plain = round(s.plain * self.batch_size)
        batch = functools.partial(data.batch, length=self.length, step=step)
        cut = batch(self.tokens, self.batch_size - plain, seed=s.seed)
        return np.concatenate([cut, batch(self.plain, plain, seed=s.seed + 2**32)])


def teacher_of(folder: Path, processor, mesh):
    """A teacher's forward pass and its parameters; ValueError if it reads other tokens."""
    own, _ = records.read_model(folder)
    theirs = tokenizer.load(folder, own.vocab_size)
    if theirs.serialized_model_proto() != processor.serialized_model_proto():
        raise ValueError(f"the teacher {folder} has another tokenizer; it must have the student's")
    return model.make_model(own).apply, records.load_params(folder, mesh)


class Trainer:
    """A state on its mesh, what moves it a step on, and what it predicts."""

    def __init__(self, config, settings: Settings, weights: str, mesh, teacher):
        """teacher: its forward pass and parameters, see `teacher_of`, or (None, None)."""
        self.config, self.settings, self.mesh = config, settings, mesh
        self.optimizer = learning.make_optimizer(settings)
        self.like = abstract_state(config, self.optimizer, mesh)
        self.state = None
        teach, self.taught = teacher
        noisy = learning.training_model(config, weights, settings.dropout, settings.router_noise)
        shardings = jax.tree.map(lambda x: x.sharding, self.like)
        self._step = learning.make_step(noisy.apply, self.optimizer, settings, teach, shardings)
        plain = learning.training_model(config, weights)
        self._logits = jax.jit(lambda params, tokens: plain.apply(params, None, tokens).logits)
        self._continued = jax.jit(functools.partial(continued, plain.apply))

    def start(self, init: Path | None) -> None:
        """The state before the first step: random, or from a checkpoint."""
        where = jax.tree.map(lambda x: x.sharding, self.like)
        if init is None:
            make = jax.jit(model.make_model(self.config).init, out_shardings=where.params)
            params = make(jax.random.key(self.settings.seed), jnp.zeros((1, 1), jnp.int32))
        else:
            params = records.load_latent(init, self.mesh)
        moments = jax.jit(self.optimizer.init, out_shardings=where.opt_state)(params)
        self.state = TrainState(jax.device_put(jnp.int32(0), where.step), params, moments)

    def step(self, tokens: np.ndarray) -> dict:
        """One update on tokens [N B, T + 1]; the metrics are not waited for."""
        where = sharding.activation_sharding(self.mesh, ("batch", None), tokens.shape)
        with jax.set_mesh(self.mesh):
            tokens = jax.device_put(tokens, where)
            with runners.uninterrupted():  # the old state is donated: the new one must not get lost
                self.state, metrics = self._step(self.state, tokens, self.taught)
        return metrics

    def logits(self, tokens: np.ndarray) -> jax.Array:
        """int32 [B, T] to float32 [B, T, V], without dropout and noise."""
        with jax.set_mesh(self.mesh):
            return self._logits(self.state.params, tokens)

    def sample(self, processor, text: str) -> str:
        """The first tokens of a text, and the likeliest ones after them."""
        length = min(SAMPLE, self.config.sequence_len)
        prompt = tokenizer.encode(processor, text)[: max(1, length // 4)]
        tokens = np.full((1, length), tokenizer.PAD, np.int32)
        tokens[0, : len(prompt)] = prompt
        with jax.set_mesh(self.mesh):
            tokens = self._continued(self.state.params, tokens, len(prompt))
        return processor.decode(np.asarray(tokens)[0].tolist())


def continued(apply, params: dict, tokens: jax.Array, count: jax.Array) -> jax.Array:
    """int32 [B, T] with the likeliest token at each place from `count` on.

    Each takes a pass over all T, without a cache: T is small.
    """

    def write(i, tokens):
        logits = apply(params, None, tokens).logits[:, i - 1]  # [B, V]
        return tokens.at[:, i].set(jnp.argmax(logits, axis=-1).astype(jnp.int32))

    return jax.lax.fori_loop(count, tokens.shape[1], write, tokens)


def log_row(step: int, metrics: list[dict], texts: Texts, settings: Settings) -> dict:
    """A line of the log: means over the steps since the last one."""
    rows = jax.device_get(metrics)
    row = {"step": step, "learning_rate": float(learning.schedule(settings)(step - 1))}
    row |= {key: np.mean([r[key] for r in rows], axis=0).tolist() for key in rows[0]}
    row["train"] = row["loss"] / texts.characters_per_token
    if "load" in row:
        load = np.array(row["load"])  # [layers, E]
        even = 1 / load.shape[-1]
        row["min_load"], row["max_load"] = float(load.min()), float(load.max())
        row["dead_experts"] = int(np.sum(load < DEAD * even))
    return row


def check_progress(row: dict, limit: float, output: Path) -> None:
    """FloatingPointError where the loss is no number, or far above that of guessing."""
    for key in ("loss", "validation"):
        if key in row and not row[key] < limit:
            raise FloatingPointError(
                f"the {key} is {row[key]} at step {row['step']}: lower --learning-rate; the state "
                f"and the checkpoint of the evaluations before are kept in {output}"
            )


def check_text(texts: Texts, validation: str) -> None:
    """ValueError for a text too short to train on or to evaluate, before anything is computed."""
    data.batch(texts.plain, 1, texts.length, seed=0, step=0)
    data.windows(tokenizer.encode(texts.processor, validation), texts.length)


def tokenizer_file(output: Path) -> Path:
    """Of a run that has a state; one begun by an earlier version has it in its checkpoint alone."""
    own = output / tokenizer.FILE
    return own if own.exists() else output / "checkpoint" / tokenizer.FILE


def choose_tokenizer(args: argparse.Namespace, config, training: str):
    """The tokenizer of a run, and the configuration with as many pieces.

    It is the one that `--tokenizer` names, else that of the run, if it has begun, or of the
    checkpoint to begin or to learn from, else one made of the training text. ValueError if it does
    not fit the model.
    """
    named = args.tokenizer not in (None, TRAIN)
    begun, folder = records.is_begun(args.output), args.init or args.teacher
    if named or begun:
        path = Path(args.tokenizer) if named else tokenizer_file(args.output)
        path = path / tokenizer.FILE if path.is_dir() else path
        processor = tokenizer.read(path, f"--tokenizer takes a {tokenizer.FILE}, or its folder")
    elif folder and args.tokenizer is None:
        path = folder / tokenizer.FILE
        processor = tokenizer.load(folder, records.read_model(folder)[0].vocab_size)
    else:
        path = "the text"
        content = tokenizer.train_at_most(training, config.vocab_size)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        if len(processor) < config.vocab_size and not args.init:
            print(f"note: the text has only {len(processor)} pieces, not {config.vocab_size}")
            config = dataclasses.replace(config, vocab_size=len(processor))
    if begun and not args.init:  # it may have been such a text; another tokenizer is refused later
        config = dataclasses.replace(config, vocab_size=len(processor))
    if len(processor) != config.vocab_size:
        cure = (
            "take the tokenizer that it was trained with"
            if args.init
            else (f"give --vocab-size {len(processor)}, or another --tokenizer")
        )
        raise ValueError(
            f"{path} has {len(processor)} pieces, the model has {config.vocab_size}; {cure}"
        )
    return processor, config


def check_tokenizer(output: Path, processor) -> None:
    """ValueError if a run was begun with another tokenizer."""
    path = tokenizer_file(output)
    if path.read_bytes() != processor.serialized_model_proto():
        raise ValueError(
            f"{output} was begun with another tokenizer, {path}: leave --tokenizer out, or give "
            "another --output"
        )


def check_settings(output: Path, about: dict) -> None:
    """ValueError, which names the difference, if a run was begun with another command.

    Its steps may have grown. Its tokenizer is compared by `check_tokenizer`.
    """
    file = output / SETTINGS
    if not file.exists():
        return
    try:
        old = choices(files.read_json(file)["command"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not say how the run was begun ({error!r:.80}): remove it if that was with"
            " the same settings, else give another --output"
        ) from None
    new = choices(about["command"])
    if int(new.get("--steps", 0)) > int(old.get("--steps", 0)):
        old["--steps"] = new["--steps"]
    differing = [
        f"{flag} was {old.get(flag, 'not given')}, now {new.get(flag, 'not given')}"
        for flag in old | new
        if old.get(flag) != new.get(flag) and flag != "--tokenizer"
    ]
    if differing:
        raise ValueError(
            f"{output} was begun with other settings: {'; '.join(differing)}. Give the same ones, "
            "or another --output"
        )


def run(
    config,
    settings: Settings,
    weights: str,
    text: str,
    processor,
    output: Path,
    about: dict,
    form: str = "converted",
    *,
    mesh=None,
    init: Path | None = None,
    teacher: Path | None = None,
) -> dict:
    """Trains, or goes on where the run folder's state ends; returns the last line of the log.

    The folder belongs to a run from its first state on. KeyboardInterrupt says which state is kept.

    processor: the tokenizer
    about: the command; form: of the exported checkpoint, see `records.export`
    init, teacher: checkpoint folders, to begin from and to learn from
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    training, validation = data.split(text)
    texts = Texts(processor, training, settings, config.sequence_len)
    check_text(texts, validation)
    output.mkdir(parents=True, exist_ok=True)
    with files.lock(output):
        states = records.open_states(output)
        begun = states.latest_step() is not None
        if begun:
            check_settings(output, about)
            check_tokenizer(output, processor)
        taught = (None, None) if teacher is None else teacher_of(teacher, processor, mesh)
        trainer = Trainer(config, settings, weights, mesh, taught)
        if begun:
            trainer.state = records.load_state(states, trainer.like)
        else:
            trainer.start(init)
        first = int(trainer.state.step)
        log = records.read_log(output, first) if begun else []

        def keep() -> None:
            files.write_bytes(output / tokenizer.FILE, processor.serialized_model_proto())
            files.write_json(output / SETTINGS, about)
            records.save_state(states, trainer.state)

        def record(row: dict) -> None:
            """Evaluates; keeps the row, the state, and the weights if they are the best so far."""
            loss = evaluate.text_loss(trainer.logits, validation, processor, texts.length)
            row["validation"] = loss.per_character
            check_progress(row, 2 * np.log(config.vocab_size), output)
            row["sample"] = trainer.sample(processor, validation[:PROMPT])
            if all(row["validation"] < earlier["validation"] for earlier in log):
                folder, params, described = output / "checkpoint", trainer.state.params, about | row
                records.export(folder, config, params, weights, form, processor, described)
            log.append(row)
            records.write_log(output, log)
            if row["step"]:  # nothing is lost with the state before the first step
                keep()
            records.plot(output, log)

        if (begun or init is not None) and not (log and log[-1]["step"] == first):
            record({"step": first})  # where it begins; or the row of the state was lost
            loss = log[-1]["validation"]
            print(f"validation {loss:.4f} nats per character to begin with")
        try:
            train_on(trainer, texts, first, record)
        except KeyboardInterrupt:
            done = int(trainer.state.step)
            if done == first or not np.isfinite(optax.tree.norm(trainer.state.params)):
                raise
            keep()
            raise KeyboardInterrupt(f"the state after {done} updates is kept in {output}") from None
        return log[-1]


def train_on(trainer: Trainer, texts: Texts, first: int, record) -> None:
    """The steps from the first one on; `record` is called with a row of the log at evaluations."""
    settings, shown = texts.settings, {}
    if first:
        rate = float(learning.schedule(settings)(first))
        print(
            f"goes on after {first} of {settings.steps} updates, at a learning rate of {rate:.3g}"
        )
    bar = tqdm(initial=first, total=settings.steps, unit="step")
    since, recent = time.perf_counter(), []

    def done(metrics: dict) -> None:
        loss = float(metrics["loss"]) / texts.characters_per_token
        bar.set_postfix(train=f"{loss:.3f}", **shown, refresh=False)
        bar.update()

    for i in range(first, settings.steps):
        recent.append(trainer.step(texts.batch(i)))
        # One step is always under way, while the next batch is made.
        for metrics in recent[-2:-1]:
            done(metrics)
        if (i + 1) % settings.eval_every and i + 1 != settings.steps:
            continue
        done(recent[-1])
        row = log_row(i + 1, recent, texts, settings)
        seconds = time.perf_counter() - since
        row["tokens_per_second"] = len(recent) * texts.batch_size * texts.length / seconds
        record(row)
        shown["validation"] = f"{row['validation']:.3f}"
        since, recent = time.perf_counter(), []
    bar.close()


SIZES = {  # in the place of the preset's, by their names in the configuration
    "emb_size": "width of the model; the heads keep their size, so that their number follows",
    "num_layers": "layers",
    "num_experts": "experts of each layer",
    "sequence_len": "tokens of context",
    "vocab_size": "pieces of the tokenizer",
}


def parse_arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", required=True, help=f"text file, or one of {list(data.SOURCES)}")
    add("--output", type=Path, required=True, help="run folder; resumed if begun")
    add("--preset", choices=sorted(set(model.PRESETS) - {"grok-1"}), help="of the model (demo)")
    for name, text in SIZES.items():
        add(_flag(name), type=int, metavar="N", help=f"{text} (the preset's)")
    add("--init", type=Path, help="checkpoint folder to begin from, of any form; then no --preset")
    add("--teacher", type=Path, help="checkpoint folder of a model whose predictions to learn")
    add(
        "--tokenizer",
        metavar="train|FOLDER|FILE",
        help="one made of the text's training part, or a tokenizer.model (that of --init or "
        "--teacher, else train)",
    )
    add(
        "--weights",
        default="ternary",
        choices=[name for name in model.PRECISIONS if "experts" not in name],
        metavar="FORMAT",
        help="that the forward pass sees: %(choices)s; with float32, activations are floats, too "
        "(%(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of activations (the preset's)")
    add("--mesh", default="1,1", metavar="D,M", help="devices: data,model axes (1,1)")
    add(
        "--format",
        default="converted",
        choices=("converted", "released"),
        help="of the checkpoint: as convert.py writes it, or Grok-1's own, in int8 (converted)",
    )
    for field in dataclasses.fields(Settings):
        text = field.metadata["help"]
        add(_flag(field.name), type=type(field.default), default=field.default, help=text)
    args = parser.parse_args(argv)
    if args.format == "released" and args.weights not in ("ternary", "float32"):
        parser.error("--format released is int8 that turns into absmean trits: --weights ternary")
    if args.preset and args.init:
        parser.error("--init brings its own configuration: leave --preset out")
    fixed = [name for name in SIZES if getattr(args, name) is not None and name != "sequence_len"]
    if fixed and args.init:
        parser.error(f"--init brings its own configuration: leave {_flag(fixed[0])} out")
    args.preset = args.preset or (None if args.init else "demo")
    try:
        chosen = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
        args.settings = Settings(**chosen)
    except ValueError as error:
        parser.error(with_flags(error, chosen))
    return args


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def with_flags(error: ValueError, names) -> str:
    """An error's text, in which names of settings have become flags."""
    return re.sub(rf"\b({'|'.join(names)})\b", lambda name: _flag(name[0]), str(error))


def command_of(args: argparse.Namespace) -> str:
    """The command with every choice spelled out, but for the folder and the mesh, which may change
    when a run is resumed."""
    names = ["data", "preset", *SIZES, "init", "teacher", "tokenizer", "weights", "dtype", "format"]
    chosen = {name: getattr(args, name) for name in names} | dataclasses.asdict(args.settings)
    flags = [(_flag(name), str(value)) for name, value in chosen.items() if value is not None]
    return shlex.join(["python", "train.py", *itertools.chain(*flags)])


def choices(command: str) -> dict[str, str]:
    """{flag: value} of what `command_of` gave."""
    words = shlex.split(command)[2:]
    return dict(zip(words[::2], words[1::2], strict=True))


def aligned(values: dict) -> str:
    return "\n".join(f"{name:<31}{value}" for name, value in values.items())


def configuration(args: argparse.Namespace) -> model.LanguageModelConfig:
    """That of the preset, or of the checkpoint to begin from, with the sizes that are given."""
    config = records.read_model(args.init)[0] if args.init else model.PRESETS[args.preset]
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    try:
        config = resized(config, **sizes)
    except ValueError as error:
        raise ValueError(with_flags(error, SIZES)) from None
    if args.weights == "float32":  # full precision all through
        config = dataclasses.replace(config, activations="float")
    elif args.init:  # from a twin in full precision, to BitNet's activations
        config = dataclasses.replace(config, activations="int8")
    return dataclasses.replace(config, fprop_dtype=args.dtype or config.fprop_dtype)


def resized(config: model.LanguageModelConfig, **sizes: int) -> model.LanguageModelConfig:
    """A configuration with other sizes, and what follows from them, as in `model.small`.

    There are as many query heads as fill the width, and as many key/value heads as before if they
    divide these. ValueError for a width that heads do not fill, or sizes that make no model.
    """
    if "emb_size" in sizes:
        width, head = sizes["emb_size"], config.key_size
        if width < 1 or width % head:
            raise ValueError(f"emb_size must be a multiple of the heads' size, {head}, got {width}")
        sizes["num_q_heads"] = width // head
        sizes["num_kv_heads"] = math.gcd(width // head, config.num_kv_heads)
        sizes["embedding_multiplier_scale"] = math.sqrt(width)
    if "num_experts" in sizes:
        if sizes["num_experts"] < 1:
            raise ValueError(f"num_experts must be at least 1, got {sizes['num_experts']}")
        sizes["num_selected_experts"] = min(config.num_selected_experts, sizes["num_experts"])
    return dataclasses.replace(config, **sizes)


def main(argv=None):
    args = parse_arguments(argv)
    kernels.keep_compilations()
    keep_freed_memory()
    about, settings = {"command": command_of(args)}, args.settings
    try:
        if args.teacher:
            checkpoint.check_folder(args.teacher)
        config, mesh = configuration(args), sharding.parse_mesh(args.mesh)
        text = data.load_text(args.data)
        processor, config = choose_tokenizer(args, config, data.split(text)[0])
        count = quantize.count(model.abstract_params(config))
        print(f"{args.preset or args.init}: {count:,} parameters")
        print(aligned(dataclasses.asdict(config)))
        print(aligned({_flag(k): v for k, v in dataclasses.asdict(settings).items()}))
        plan(config, settings, args.weights, mesh)
        last = run(
            config,
            settings,
            args.weights,
            text,
            processor,
            args.output,
            about,
            args.format,
            mesh=mesh,
            init=args.init,
            teacher=args.teacher,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        kept = str(stopped) or "nothing new is kept"
        sys.exit(f"\ninterrupted: {kept}; the same command goes on")
    print(f"validation {last['validation']:.4f} nats per character after {last['step']} steps")
    best = args.output / "checkpoint"
    print(f"best weights in {best}: python run.py --checkpoint {shlex.quote(str(best))}")


if __name__ == "__main__":
    main()
