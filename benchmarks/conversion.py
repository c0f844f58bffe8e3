"""How fast a layer of Grok-1 is converted, verified and loaded, and against what bounds.

    python -m benchmarks.conversion --folder /tmp/layer

Makes a release of one layer, random int8, in a folder, and keeps it for the next time: with all
eight experts 4.9 GB (7 GB in all), with `--experts 1` an eighth of that. Every
figure is the median of several runs, all files in the page cache; bounds are of the same run:
reading the same files with `cat`, and NumPy's mean of the same numbers. Formats whose scales are
fitted are compared with ternary, by absmean.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

import checkpoint
import model
import quantize
import shards
from benchmarks import timer
from quantize import QuantizedWeight
from tensor_file import read_tensor, write_tensor

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(model.PRESETS["grok-1"], num_layers=1, vocab_size=1024)
FITTED = ("ternary-fit", "ternary-fit-128", "ternary2-128")


def make_layer(folder: Path, experts: int, seed: int = 0) -> None:
    """A release of CONFIG: Gaussian columns whose spread is exp(0.3 N), in int8."""
    random = np.random.default_rng(seed)
    config = dataclasses.replace(CONFIG, num_experts=experts, num_selected_experts=min(2, experts))
    template = model.abstract_params(config)
    kinds = model.PRECISIONS["int8"]
    partial = folder.with_name(f"{folder.name}.partial")
    (partial / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
    normal = np.clip(np.round(random.standard_normal(1 << 26) * 32), -127, 127).astype(np.int8)
    matched = quantize.match_rules(kinds, [f"{m}/{n}" for m in template for n in template[m]])
    for i, (module, name) in enumerate(checkpoint.sorted_keys(template)):
        shape = template[module][name].shape
        if matched[f"{module}/{name}"] == "int8":
            *lead, _, outputs = shape
            groups = 8 if module.endswith(("moe/linear_1", "attention/linear")) else 1
            codes = np.resize(np.roll(normal, 977 * i), shape)
            spread = np.exp(0.3 * random.standard_normal((*lead, groups, outputs)))
            leaf = QuantizedWeight(codes, (5e-4 * spread).astype(ml_dtypes.bfloat16))
        else:
            leaf = random.standard_normal(shape).astype(np.float32)
        write_tensor(partial / checkpoint.FOLDER / checkpoint.file_name(i), leaf)
    (partial / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    partial.rename(folder)


def timed(f, repeats: int):
    """Median seconds of f(), after one call that is not counted, and the last result."""
    f()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = f()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


def cat(folder: Path) -> None:
    files = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def numpy_pass(folder: Path) -> list[float]:
    """The mean of |codes| of every int8 tensor, the plain way."""
    tensors = (read_tensor(path) for path in sorted((folder / checkpoint.FOLDER).iterdir()))
    return [float(np.abs(t.codes).mean()) for t in tensors if isinstance(t, QuantizedWeight)]


def command(*arguments) -> int:
    """Runs convert.py in a process of its own; its peak of resident memory in bytes."""
    code = "import sys, convert; convert.main(sys.argv[1:]); print(convert.peak_memory())"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(f"convert.py {arguments} failed: {done.stderr}")
    return int(done.stdout.split()[-1])


def load(folder: Path) -> None:
    config = model.config_from_dict(checkpoint.read_config(folder))
    rules = checkpoint.stored_precision(folder) or model.PRECISIONS["ternary"]
    jax.block_until_ready(checkpoint.restore(folder, model.abstract_params(config), rules))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="made if it is not there")
    parser.add_argument("--experts", type=int, default=8, help="of the layer made (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (%(default)s)")
    args = parser.parse_args()
    if not args.folder.exists():
        make_layer(args.folder, args.experts)
    read = sum(path.stat().st_size for path in (args.folder / checkpoint.FOLDER).iterdir())
    largest = max(path.stat().st_size for path in (args.folder / checkpoint.FOLDER).iterdir())

    def line(what, seconds, size, bound=None, memory=None):
        ratio = f"{seconds / bound:6.1f}" if bound else " " * 6
        peak = f"{memory / 1e9:6.2f}" if memory else ""
        print(f"{what:34} {seconds:7.2f} s {size / 1e9 / seconds:6.2f} GB/s {ratio} {peak}")

    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    print(f"{os.cpu_count()} cores, {timer.processor()}, {versions}")
    print(
        f"{read / 1e9:.2f} GB of int8, largest file {largest / 1e9:.2f} GB, of which the bound of "
        f"memory is {1.25 * largest / 1e9 + 1:.2f} GB"
    )
    print(f"{'':34} {'time':>9} {'speed':>11} {'/ cat':>6} {'peak GB':>7}")
    bound, _ = timed(lambda: cat(args.folder / checkpoint.FOLDER), args.repeats)
    line("cat of the release", bound, read)
    seconds, _ = timed(lambda: numpy_pass(args.folder), args.repeats)
    line("NumPy abs().mean()", seconds, read, bound)
    of_ternary = {}
    for weights, packing in [("ternary", p) for p in shards.PACKINGS] + [
        (w, "base3") for w in FITTED
    ]:
        output = args.folder.with_name(f"{args.folder.name}-made")

        def convert(output=output, weights=weights, packing=packing):
            shutil.rmtree(output, ignore_errors=True)
            return command(args.folder, output, "--weights", weights, "--packing", packing)

        seconds, memory = timed(convert, args.repeats)
        line(f"convert.py, {weights}, {packing}", seconds, read, bound, memory)
        if weights == "ternary":
            of_ternary[packing] = seconds
        else:
            print(f"{'times that of ternary':34} {seconds / of_ternary[packing]:7.2f}")
        written = sum(path.stat().st_size for path in output.iterdir())
        own_bound, _ = timed(lambda output=output: cat(output), args.repeats)
        line("cat of the result", own_bound, written)
        seconds, memory = timed(lambda output=output: command("--verify", output), args.repeats)
        line("convert.py --verify", seconds, written, own_bound, memory)
        seconds, _ = timed(lambda output=output: load(output), args.repeats)
        line("load", seconds, written, own_bound)
    seconds, _ = timed(lambda: load(args.folder), args.repeats)
    line("load of the release as ternary", seconds, read, bound)


if __name__ == "__main__":
    main()
