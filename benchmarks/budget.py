"""Whether formats that were chosen by measured errors lose less than others of as many bytes.

    python -m benchmarks.budget checkpoints/twin --data tinyshakespeare

The same changes of format as in `planning.choose`, one after the other while one fits, but in other
orders, as controls: by chance; the least useful first; attention before experts, as many do; the
last layers first. Each is converted without calibration, and compared with the teacher.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import calibration
import checkpoint
import convert
import data
import evaluate
import fidelity
import model
import planning
import sharding

SHARES = (0.1, 0.3, 0.6)  # of the bytes between the smallest choice and int8 everywhere
SEEDS = (0, 1, 2)


def controls(errors: planning.Errors) -> dict[str, planning.Errors]:
    """Errors that make `planning.choose` take other changes first, by name."""

    def made(worth) -> planning.Errors:
        """Errors that fall by as much for each byte as the worth of a path says."""
        ladder = {format: 1 / (1 + i) for i, format in enumerate(planning.LADDER)}
        return {path: {f: worth(path) * ladder[f] for f in ladder} for path in errors}

    def chance(seed):
        random = np.random.default_rng(seed)
        worths = {path: 100.0 ** random.random() for path in errors}
        return made(worths.__getitem__)

    first = planning.LADDER[0]
    return {
        "measured": errors,
        **{f"by chance, {seed}": chance(seed) for seed in SEEDS},
        "least useful first": made(lambda path: 1 / max(errors[path][first], 1e-9) ** 4),
        "attention first": made(lambda path: 1e6 if "attention" in path else 1.0),
        "last layers first": made(lambda path: 100.0 ** calibration.layer_of(path)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("teacher", type=Path, help="checkpoint in float32 or int8")
    parser.add_argument("--data", required=True, help="text file, or name of one")
    parser.add_argument("--tokens", type=int, default=32768, help="to measure on (%(default)s)")
    args = parser.parse_args()
    training, text = data.split(data.load_text(args.data))
    config = convert.resolve_config(args.teacher)
    template = model.abstract_params(config)
    windows = convert.windows_of(args.teacher, config, training, args.tokens)
    entries = checkpoint.check_files(args.teacher, template, planning.CHEAPEST)
    with TemporaryDirectory() as folder:
        errors = planning.measure(
            config, entries, windows, str(args.teacher), Path(folder), lambda *_: None
        )
    sizes = planning.sizes_of(entry for entry in entries if entry.path in errors)
    least, most = (sum(f(of.values()) for of in sizes.values()) for f in (min, max))
    mesh = sharding.make_mesh()
    teacher = fidelity.open_teacher(args.teacher, mesh)
    length = min(config.sequence_len, evaluate.MAX_LENGTH)
    print("| of the bytes | order | MB | sum of errors | KL | loss |\n|---|---|---|---|---|---|")
    for share in SHARES:
        for name, made in controls(errors).items():
            chosen = planning.choose(made, sizes, round(least + share * (most - least)))
            precision = planning.rules(chosen)
            student = fidelity.Walker(args.teacher, config, precision, mesh)
            found = fidelity.compare(teacher, student, text, length)
            bytes_ = sum(sizes[path][format] for path, format in chosen.items())
            error = sum(errors[path][format] for path, format in chosen.items())
            loss = found["student"]["loss_per_character"]
            cells = f"{share:.1f}", name, f"{bytes_ / 1e6:.2f}", f"{error:.2f}"
            cells = *cells, f"{found['kl']:.4f}", f"{loss:.4f}"
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
