"""Tokens a second of training: our ternary model, its twin in full precision, and PyTorch.

    python -m benchmarks.training
    python -m benchmarks.training --preset 10m --rounds 7 --json training.json

Each round takes some steps of each, one after the other, so that a slow moment of the machine meets
all of them; medians are over rounds. The PyTorch model, where `torch` is installed, is the dense
GPT of `nanogpt.py`, with the layers, width, vocabulary, batch, dropout and active parameters of
ours. All train in float32 on random tokens; our ternary products are exact in bfloat16, too.
"""

import argparse
import dataclasses
import json
import time

import jax
import numpy as np

import kernels
import learning
import model
import sharding
import train
from benchmarks import timer


def ours(config, settings, weights: str, tokens: np.ndarray):
    """A function that makes so many steps."""
    activations = "float" if weights == "float32" else "int8"
    config = dataclasses.replace(config, activations=activations)
    trainer = train.Trainer(config, settings, weights, sharding.make_mesh(), (None, None))
    trainer.start(None)

    def steps(count: int):
        for _ in range(count):
            metrics = trainer.step(tokens)
        jax.block_until_ready(metrics)

    return steps


def pytorch(config, dropout: float, tokens: np.ndarray):
    """The same of a GPT; ImportError without PyTorch."""
    from benchmarks import nanogpt

    gpt = nanogpt.Gpt(config, dropout)
    optimizer = nanogpt.make_optimizer(gpt)
    batch = nanogpt.tensor(tokens)

    def steps(count: int):
        for _ in range(count):
            nanogpt.update(gpt, optimizer, batch)

    return steps


def seconds_of(run, steps: int):
    """A function that gives the seconds of a step, the mean of so many."""

    def measure() -> float:
        begin = time.perf_counter()
        run(steps)
        return (time.perf_counter() - begin) / steps

    return measure


def report(config, settings, rounds: int, steps: int) -> dict:
    tokens = np.random.default_rng(0).integers(
        4, config.vocab_size, (settings.batch_size, config.sequence_len + 1), np.int32
    )
    runs = {
        f"ours, {weights}": ours(config, settings, weights, tokens)
        for weights in ("ternary", "float32")
    }
    try:
        runs["PyTorch GPT"] = pytorch(config, settings.dropout, tokens)
    except ImportError as error:
        print(f"without PyTorch: {error}")
    seconds = timer.alternate({name: seconds_of(run, steps) for name, run in runs.items()}, rounds)
    batch = settings.batch_size * config.sequence_len
    return {name: round(batch / float(np.median(s))) for name, s in seconds.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="demo", choices=model.PRESETS, help="(demo)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences in a step (16)")
    parser.add_argument("--dropout", type=float, default=learning.Settings.dropout, help="(0.1)")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one (5)")
    parser.add_argument("--steps", type=int, default=4, help="of each model in a round (4)")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args(argv)
    kernels.keep_compilations()
    train.keep_freed_memory()
    config = model.PRESETS[args.preset]
    settings = learning.Settings(batch_size=args.batch_size, dropout=args.dropout)
    rates = report(config, settings, args.rounds, args.steps)
    active = train.active_parameters(config)
    flops = train.flops_per_token(config)
    print(timer.processor())
    print(f"{args.preset}, {active:,} active parameters, {flops / 1e6:.1f} million FLOPs a token")
    for name, rate in rates.items():
        print(f"{name:<16}{rate:>8,} tokens/s {rate * flops / 1e9:>6.0f} GFLOP/s")
    share = rates["ours, float32"] / rates["ours, ternary"]
    print(f"a step with ternary weights and int8 activations takes {share:.2f} of one with floats")
    if args.json:
        about = {
            "preset": args.preset,
            "dropout": args.dropout,
            "processor": timer.processor(),
            "tokens_per_second": rates,
        }
        with open(args.json, "w") as file:
            file.write(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
