"""How well a model predicts a text, and what its logits are.

    python evaluate.py checkpoints/demo --data tinyshakespeare
    python evaluate.py checkpoints/demo --tokens tokens.npy --save-logits logits.npy
    python evaluate.py STUDENT --against TEACHER --data tinyshakespeare --html report.html

The first prints the loss of the loaded weights on the last tenth of a text, which training never
sees; the second reads integers [B, T] and writes float32 [B, T, V]; the third compares a converted
model with the one that it was made from, layer by layer (`fidelity.py`).
"""

import argparse
import dataclasses
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import card
import checkpoint
import data
import fidelity
import files
import kernels
import learning
import model
import quantize
import report
import runners
import sharding
import tokenizer

BATCH = 8  # windows evaluated together
MAX_LENGTH = 1024  # tokens of a window, where the model's context is longer


class Loss(NamedTuple):
    """Summed loss of a text in nats, and what it was summed over."""

    nats: float
    tokens: int
    characters: int

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def per_character(self) -> float:
        return self.nats / self.characters

    @property
    def perplexity(self) -> float:
        """Per token."""
        return float(np.exp(self.per_token))


def text_loss(
    logits: Callable[[np.ndarray], jax.Array],
    text: str,
    processor,
    length: int,
    progress: bool = False,
) -> Loss:
    """Loss over all tokens of a text, in windows of T = `length` tokens that do not overlap.

    logits: int32 [B, T] -> float32 [B, T, V]
    """
    windows = data.windows(tokenizer.encode(processor, text), length)
    batches = data.batches(windows, BATCH)
    cross_entropy = jax.jit(learning.cross_entropy)
    nats = 0.0
    for inputs, targets, mask in tqdm(batches, disable=not progress, unit="batch"):
        losses = cross_entropy(logits(inputs), targets)
        nats += float(np.sum(np.asarray(losses, np.float64), where=mask))
    return Loss(nats, int(windows.mask.sum()), len(text))


def evaluate_text(runner: runners.ModelRunner, folder: Path, text: str, length: int) -> None:
    """Prints the loss of a text, aligned."""
    processor = tokenizer.load(folder, runner.config.vocab_size)
    loss = text_loss(runner.logits, text, processor, length, progress=True)
    print(f"tokens               {loss.tokens:>12,}")
    print(f"characters           {loss.characters:>12,}")
    print(f"loss per token       {loss.per_token:>12.4f} nats")
    print(f"loss per character   {loss.per_character:>12.4f} nats")
    print(f"perplexity per token {loss.perplexity:>12.2f}")


def read_tokens(source: Path, vocab_size: int) -> np.ndarray:
    """int32 [B, T] of a .npy file; ValueError for anything else."""
    try:
        tokens = np.load(source, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{source} is no .npy file ({error!s:.200}); write it with numpy.save"
        ) from None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{source} holds several arrays; write one with numpy.save")
    try:
        return runners.check_tokens(tokens, vocab_size, axes=2)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def save_logits(runner: runners.ModelRunner, tokens: np.ndarray, target: Path) -> None:
    """Writes the float32 logits [B, T, V] of int32 tokens [B, T]."""
    rows = [np.asarray(runner.logits(row[None])) for row in tqdm(tokens, unit="row")]
    with files.replacing(target) as part, part.open("wb") as file:  # np.save would add .npy
        np.save(file, np.concatenate(rows))
    print(f"{target}: float32 {(*tokens.shape, runner.config.vocab_size)}")


def compare(config: model.LanguageModelConfig, text: str, args: argparse.Namespace) -> None:
    """Prints what a student lost against its teacher, and writes it where `args` say."""
    mesh = sharding.parse_mesh(args.mesh)
    template = model.abstract_params(config)
    precision = runners.precision_of(args.checkpoint, template, args.weights)
    student = fidelity.Walker(args.checkpoint, config, precision, mesh)
    teacher = fidelity.open_teacher(args.against, mesh)
    length = min(config.sequence_len, teacher.config.sequence_len, MAX_LENGTH)
    found = fidelity.compare(teacher, student, text, length, progress=True)
    print(report.table(found))
    if args.json:
        files.write_bytes(args.json, (json.dumps(found) + "\n").encode())
    if args.html:
        files.write_bytes(args.html, report.page(found).encode())
    if args.card:
        part = "the last tenth of " if args.split == "validation" else ""
        card.add_comparison(
            args.checkpoint, found, args.against.resolve().name, part + Path(args.data).name
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder with ckpt-0/, and config.json if any")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help=f"text file, or one of {sorted(data.SOURCES)}")
    what.add_argument("--tokens", type=Path, help="integers [B, T] as .npy")
    parser.add_argument("--save-logits", type=Path, help="where to write those of --tokens (.npy)")
    parser.add_argument(
        "--against", type=Path, metavar="TEACHER", help="compare with the folder it was made from"
    )
    parser.add_argument("--json", type=Path, help="where to write the comparison, all of it")
    parser.add_argument("--html", type=Path, help="where to write it as a page, with plots")
    parser.add_argument(
        "--card", action="store_true", help="put it into the model card of the checkpoint"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "all"),
        default="validation",
        help="part of --data: its last tenth (default), or all of it",
    )
    parser.add_argument(
        "--weights", choices=model.PRECISIONS, help="in memory (as converted, else ternary)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of activations (default: the model's)"
    )
    parser.add_argument(
        "--activations", choices=quantize.ACTIVATIONS, help="in products (default: the model's)"
    )
    parser.add_argument(
        "--embeddings", choices=model.EMBEDDINGS, help="table in memory (default: the model's)"
    )
    parser.add_argument(
        "--mesh", default="1,1", metavar="D,M", help="devices: data,model axes (1,1)"
    )
    args = parser.parse_args(argv)
    if (args.tokens is None) != (args.save_logits is None):
        parser.error("--tokens and --save-logits go together")
    if args.against and args.tokens:
        parser.error(
            "--against takes a text, --data: of token ids that nobody wrote, predictions and "
            "routing are near their thresholds, and agreement says little"
        )
    if (args.json or args.html or args.card) and not args.against:
        parser.error("--json, --html and --card are of a comparison, --against TEACHER")
    if args.card and args.weights:
        parser.error("--card is about the weights as they are stored; leave out --weights")
    kernels.keep_compilations()
    try:
        checkpoint.check_folder(args.checkpoint)
        if args.card:
            card.check_card(args.checkpoint)
        config = model.config_from_dict(checkpoint.read_config(args.checkpoint))
        chosen = {"fprop_dtype": args.dtype, "activations": args.activations}
        chosen["embeddings"] = args.embeddings
        config = dataclasses.replace(config, **{k: v for k, v in chosen.items() if v is not None})
        text = args.data and data.load_text(args.data)
        tokens = args.tokens and read_tokens(args.tokens, config.vocab_size)
        part = data.split(text)[1] if text and args.split == "validation" else text
        if args.against:
            compare(config, part, args)
            return
        runner = runners.ModelRunner(config, sharding.parse_mesh(args.mesh))
        runner.load(args.checkpoint, args.weights, progress=True)
        if text is None:
            save_logits(runner, tokens, args.save_logits)
        else:
            evaluate_text(runner, args.checkpoint, part, min(config.sequence_len, MAX_LENGTH))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


if __name__ == "__main__":
    main()
