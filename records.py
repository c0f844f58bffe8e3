"""What a training run leaves in its folder: log, plots, states to go on from, and the checkpoint.

settings.json          the command, from the first state on
tokenizer.model        that cuts the text, from the first state on, too
log.jsonl              a line for each evaluation
loss.png, learning_rate.png, expert_load.png
states/                the last state, written by Orbax
checkpoint/            the best weights so far, as `run.py` reads them
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import checkpoint
import files
import formats
import model
import quantize
import sharding
import tokenizer

# --- States ---------------------------------------------------------------------------------------


def open_states(folder: Path) -> ocp.CheckpointManager:
    """The states of a run folder, of which the last is kept; each is there whole or not at all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "states").absolute(), options=options)


def is_begun(folder: Path) -> bool:
    """Whether a run folder has a state; reads only, so that no lock is needed."""
    return bool(ocp.utils.checkpoint_steps(folder / "states"))


def save_state(states: ocp.CheckpointManager, state) -> None:
    """Saves a state, if the last one is not of the same step."""
    if states.latest_step() != int(state.step):
        states.save(int(state.step), args=ocp.args.StandardSave(state))


def load_state(states: ocp.CheckpointManager, like):
    """The last state, in the structure, shapes and shardings of `like` (`ShapeDtypeStruct`s)."""
    try:
        return states.restore(states.latest_step(), args=ocp.args.StandardRestore(like))
    except ValueError as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"{states.directory} is the state of another model: {text:.300}; give another --output"
        ) from None


# --- Log and plots --------------------------------------------------------------------------------


def read_log(folder: Path, last_step: int) -> list[dict]:
    """The rows of a log up to a step; later ones are of work that was lost.

    A last line that was cut short is lost too; ValueError for any other line that is no row.
    """
    path = folder / "log.jsonl"
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["step"] <= last_step:
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise ValueError(
                f"{path}: line {number} is no row of a log, {line!r:.80}; remove it"
            ) from None
    return rows


def write_log(folder: Path, log: list[dict]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in log)
    files.write_bytes(folder / "log.jsonl", lines.encode())


def plot(folder: Path, log: list[dict]) -> None:
    """Loss, learning rate and, with experts, their load, each against steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    losses = {"training": "train", "validation": "validation"}
    _plot_lines(folder / "loss.png", log, losses, "nats per character")
    _plot_lines(folder / "learning_rate.png", log, {"": "learning_rate"}, "learning rate")
    if "load" in log[-1]:
        _plot_load(folder / "expert_load.png", log)


def _plot_lines(path: Path, log: list[dict], lines: dict[str, str], unit: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for label, key in lines.items():
        points = [(row["step"], row[key]) for row in log if key in row]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    _save(figure, path)


def _plot_load(path: Path, log: list[dict]) -> None:
    """A heat map with a row for each expert of each layer: white is an even share, blue is less."""
    from matplotlib import pyplot

    rows = [row for row in log if "load" in row]
    load = np.array([row["load"] for row in rows])  # [evaluations, layers, E]
    _, layers, experts = load.shape
    figure, axes = pyplot.subplots(
        figsize=(7, min(24, 1.5 + 0.12 * layers * experts)), constrained_layout=True
    )
    image = axes.imshow(
        load.reshape(len(load), -1).T * experts,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
        extent=(0, rows[-1]["step"], layers * experts, 0),
    )
    axes.set(xlabel="step", yticks=(np.arange(layers) + 0.5) * experts)
    axes.set_yticklabels([f"layer {i}" for i in range(layers)])
    axes.hlines(np.arange(1, layers) * experts, 0, rows[-1]["step"], color="black", linewidth=0.8)
    figure.colorbar(image, label="load of each expert, 1 = even")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    with files.replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


# --- The checkpoint -------------------------------------------------------------------------------


def export(folder: Path, config, params, weights: str, form: str, processor, about: dict) -> None:
    """Writes a checkpoint folder, in place of one that is there.

    form: "converted" is that of `docs/format.md`, with the trits and scales that the forward pass
      sees (or the floats, if it does); "released" is Grok-1's, with the latent weights
      as int8, which turn into these trits on load
    about: the command, the settings, the loss; for `training.json`
    """
    part = folder.with_name(f"{folder.name}.part")
    files.recover(folder)
    shutil.rmtree(part, ignore_errors=True)
    extra = {
        tokenizer.FILE: processor.serialized_model_proto(),
        "training.json": files.json_bytes(about),
    }
    write = _write_converted if form == "converted" else _write_released
    write(part, jax.device_get(params), weights, model.config_to_dict(config), extra)
    files.replace_folder(part, folder)


def _write_converted(folder: Path, params, weights: str, described: dict, extra: dict) -> None:
    precision = model.precision_table(weights)

    def stored(_, format, w):
        return formats.format_named(format).quantize(jnp.asarray(w))  # as the forward pass has it

    described = described | checkpoint.quantization(weights, precision)
    saved = quantize.apply_rules(precision, params, stored)
    checkpoint.save_converted(folder, saved, described, extra)


def _write_released(folder: Path, params, weights: str, described: dict, extra: dict) -> None:
    def stored(_, format, w):
        return formats.quantize_int8_keeping_trits(w) if format == "int8" else w

    checkpoint.save(folder, quantize.apply_rules(model.PRECISIONS["int8"], params, stored))
    files.write_json(folder / "config.json", described)
    for name, content in extra.items():
        (folder / name).write_bytes(content)


# --- Checkpoints to begin from --------------------------------------------------------------------


def read_model(folder: Path) -> tuple[model.LanguageModelConfig, dict[str, str]]:
    """A checkpoint's configuration, and {path: format} of its parameters as they are stored."""
    checkpoint.check_folder(folder)
    config = model.config_from_dict(checkpoint.read_config(folder))
    released = model.formats_of(model.abstract_params(config), model.PRECISIONS["int8"])
    return config, checkpoint.stored_precision(folder) or released


def load_params(folder: Path, mesh: jax.sharding.Mesh) -> dict:
    """The parameters of a checkpoint of any form, as stored, on the mesh."""
    config, precision = read_model(folder)
    shardings = functools.partial(sharding.parameter_shardings, mesh)
    return checkpoint.restore(folder, model.abstract_params(config), precision, shardings)


def load_latent(folder: Path, mesh: jax.sharding.Mesh) -> dict:
    """The float32 parameters to train on from a checkpoint of any form, on the mesh."""
    config, _ = read_model(folder)
    shardings = sharding.parameter_shardings(mesh, model.abstract_params(config))

    def latent(params):
        return {
            module: {name: formats.latent(w) for name, w in entries.items()}
            for module, entries in params.items()
        }

    return jax.jit(latent, out_shardings=shardings)(load_params(folder, mesh))
