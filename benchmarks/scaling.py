"""How the cost of a token grows with context, batch, layers and prompt, and plots of it.

    python -m benchmarks.scaling --output docs/scaling.png

The `bench` preset with random ternary weights, int8 activations, bfloat16.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

import model
import runners
from benchmarks import timer
from benchmarks.models import make_runner, timing_of

BASE = dataclasses.replace(model.PRESETS["bench"], fprop_dtype="bfloat16")
CONTEXTS = (128, 512, 2048, 8192)
BATCHES = (1, 2, 4, 8, 16, 32)
LAYERS = (1, 2, 4, 8)
PROMPTS = (64, 128, 256, 512, 1024, 2048, 4096)
STEPS = 16


def step_seconds(runner, slots: int, sequence_len: int) -> float:
    """Median seconds of a decode step of all slots, which hold prompts of three quarters."""
    inference = runners.InferenceRunner(runner, None, slots, sequence_len)
    for seed in range(slots):
        tokens = np.random.default_rng(seed).integers(5, 1000, sequence_len * 3 // 4)
        request = runners.Request(tokens.tolist(), 0.0, max_len=STEPS + 8, truncate=True)
        inference.insert(request)
    return timer.median(inference.step, STEPS)


def prefill_seconds(runner, length: int) -> float:
    inference = runners.InferenceRunner(runner, None, 1, max(PROMPTS) + 2)
    timing_of(inference, length, 1)
    return float(np.median([timing_of(inference, length, 1).prefill_seconds for _ in range(3)]))


def measure() -> dict:
    runner = make_runner(BASE)
    found = {
        "context": [(n, step_seconds(runner, 1, n)) for n in CONTEXTS],
        "batch": [(n, step_seconds(runner, n, 128)) for n in BATCHES],
        "prompt": [(n, prefill_seconds(runner, n)) for n in PROMPTS],
        "layers": [],
    }
    for layers in LAYERS:
        config = dataclasses.replace(BASE, num_layers=layers)
        found["layers"].append((layers, step_seconds(make_runner(config), 1, 128)))
    return found


def plot(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "context": ("cache slots", "ms a decoded token"),
        "batch": ("requests that decode together", "tokens/s, all together"),
        "layers": ("layers", "ms a decoded token"),
        "prompt": ("tokens of the prompt", "ms a token of prefill"),
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    for (name, (x, y)), axis in zip(titles.items(), axes.ravel(), strict=True):
        sizes, seconds = np.array(found[name]).T
        values = {"batch": sizes / seconds, "prompt": 1e3 * seconds / sizes}.get(
            name, 1e3 * seconds
        )
        axis.plot(sizes, values, "o-")
        axis.set(xlabel=x, ylabel=y, ylim=(0, None))
        if name != "layers":
            axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="PNG file; JSON goes beside it")
    args = parser.parse_args()
    machine = timer.machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    found = measure()
    for name, points in found.items():
        print(f"{name:8}", "  ".join(f"{n}: {1e3 * seconds:.1f} ms" for n, seconds in points))
    plot(found, args.output)
    args.output.with_suffix(".json").write_text(json.dumps(machine | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
