"""How fast a model of Grok-1's layer shapes starts from its layout file, fits or not.

    python -m benchmarks.loading --folder /tmp/layers --layers 8
    python -m benchmarks.loading --folder /tmp/layers --layers 24

Makes a checkpoint of so many layers in the folder, random trits in two bits, and its layout file by
`convert.py --layout cpu`; both stay there for the next time: 2.5 GB of disk for each layer. Then a
process loads it, from the layout file and, where it fits into memory, from the shards alone; and
two processes at once do, for the memory that they share. One that is larger than memory runs from
the disk. A model that fits is read once before, so that its layout file is in the page cache.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import checkpoint
import kernels
import layouts
import model
import quantize
import runners
import shards
import tokenizer
from benchmarks import timer

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(model.PRESETS["grok-1"], vocab_size=1024, sequence_len=2048)
WEIGHTS = "ternary"
PROMPT = list(range(5, 9))
LENGTH = 512  # of the cache


def make_checkpoint(folder: Path, layers: int, seed: int = 0) -> None:
    """A converted checkpoint of CONFIG with so many layers, at random, and Grok-1's scales."""
    random = np.random.default_rng(seed)
    config = dataclasses.replace(CONFIG, num_layers=layers)
    template = model.abstract_params(config)
    paths = {f"{m}/{n}": template[m][n].shape for m, n in checkpoint.sorted_keys(template)}
    named = quantize.match_rules(model.PRECISIONS[WEIGHTS], paths)

    def form(path, shape):
        if named[path] == "float32":
            return jax.ShapeDtypeStruct(shape, np.float32)
        return shards.stored_form(named[path], shape, "2bit")

    codes = random.integers(0, 3, (4, 1 << 25), np.uint8)
    some = (codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6).astype(np.uint8)

    def fill(path, stored):
        if named[path] == "float32":
            fan = 1 if path.endswith("/scale") else stored.shape[-1] ** 0.5
            stored[...] = random.standard_normal(stored.shape, np.float32) / fan
            return
        at, flat = random.integers(some.size), stored.packed.stored.reshape(-1)
        for piece in shards.slices(0, flat.size, some.size):
            flat[piece] = np.roll(some, at)[: piece.stop - piece.start]
        stored.scales[...] = paths[path][-2] ** -0.5

    about = model.config_to_dict(config)
    about |= checkpoint.quantization(WEIGHTS, model.PRECISIONS[WEIGHTS], "2bit")
    extra = {tokenizer.FILE: tokenizer.DEMO.read_bytes()}
    leaves = {path: form(path, shape) for path, shape in paths.items()}
    shards.write(folder, leaves, fill, about, extra)


# --- A process with the model ---------------------------------------------------------------------


def serve(folder: Path, new: int, copied: bool) -> None:
    """Loads a model, decodes, prints what that took, and stays until its input ends."""
    if copied:
        layouts.open_layout = lambda folder: None
    kernels.keep_compilations()
    config = model.config_from_dict(checkpoint.read_config(folder))
    runner = runners.ModelRunner(config)
    begin = time.perf_counter()
    runner.load(folder)
    row: dict[str, float] = {"load_s": time.perf_counter() - begin}
    inference = runners.InferenceRunner(runner, sequence_len=LENGTH)
    inference.warm_up([len(PROMPT)])
    for repeat in range(2):  # the first one brings pages in
        before = read_so_far()
        request = runners.Request(PROMPT, temperature=1.0, rng_seed=repeat, max_len=1 + new)
        begins = [(time.perf_counter(), read_so_far()) for _ in inference.generate([request])]
        (start, read), (end, all_read) = begins[0], begins[-1]
        row |= {
            "prompt_GB_from_disk": (read - before) / 1e9,
            "token_s": (end - start) / new,
            "token_GB_from_disk": (all_read - read) / new / 1e9,
        }
    print(json.dumps(row), flush=True)
    sys.stdin.read()


def read_so_far() -> int:
    """Bytes that this process has had read from the disk."""
    return int(fields("/proc/self/io")["read_bytes"])


def fields(path: str) -> dict[str, str]:
    """The lines "name: value" of a file of the system's."""
    lines = (line.split(":", 1) for line in Path(path).read_text().splitlines() if ": " in line)
    return {name: value.strip() for name, value in lines}


def measured(folder: Path, new: int, copied: bool = False, processes: int = 1) -> list[dict]:
    """What some processes at once say of themselves, one after the other, and of their memory."""
    command = [sys.executable, "-m", "benchmarks.loading", "--folder", str(folder)]
    command += ["--tokens", str(new), "--serve", "copied" if copied else "mapped"]
    started, rows = [], []
    try:
        for _ in range(processes):
            pipe = subprocess.PIPE
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
            started.append(child)
            line = child.stdout.readline()
            if not line:
                raise RuntimeError("it failed, see above")
            rows.append(json.loads(line))
        for child, row in zip(started, rows, strict=True):
            found = fields(f"/proc/{child.pid}/smaps_rollup")
            for name in ("Rss", "Pss", "Anonymous", "AnonHugePages", "FilePmdMapped"):
                row[f"{name}_GB"] = int(found.get(name, "0 kB").split()[0]) * 1024 / 1e9
    finally:
        for child in started:
            child.stdin.close()
            child.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="made if it is not there")
    add("--layers", type=int, default=8, help="of the model made (%(default)s)")
    add("--tokens", type=int, default=16, help="decoded in each measurement (%(default)s)")
    add("--serve", choices=("mapped", "copied"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.folder, args.tokens, args.serve == "copied")
        return
    if not args.folder.exists():
        make_checkpoint(args.folder, args.layers)
    command = [sys.executable, "convert.py", str(args.folder.resolve()), "--layout", "cpu"]
    subprocess.run(command, cwd=ROOT, check=True)
    size = layouts.path_of(args.folder).stat().st_size
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"{os.cpu_count()} cores, {timer.processor()}, {memory / 1e9:.1f} GB of memory")
    print(f"layout file of {size / 1e9:.1f} GB")
    cases = [("mapped", False, 1)]
    if size < 0.9 * memory:
        measured(args.folder, args.tokens)  # brings the file into the page cache
        cases += [("copied", True, 1), ("two processes, mapped", False, 2)]
    for name, copied, processes in cases:
        for row in measured(args.folder, args.tokens, copied, processes):
            print(f"{name:22}" + "".join(f"  {key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
