"""What each way of converting a model in full precision costs it, and what calibration gives back.

    python -m benchmarks.fidelity runs/float-0/checkpoint --data tinyshakespeare --folder /tmp/twins

Converts with `convert.py`, int8 activations, each format alone and calibrated with the text's first
nine tenths, and compares with the teacher on its last tenth, as `evaluate.py --against` does. What
is in the folder already is not made again. Bits are those of a matrix on the disk, scales included.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import checkpoint
import convert
import data
import evaluate
import fidelity
import model
import runners
import sharding
import shards

PLAIN = ("ternary", "ternary-fit", "ternary-fit-128", "ternary-experts-fit-128", "ternary2-128")
TWO_PLANES = [["/multi_head_attention/.*/w$", "ternary2-128"], ["/moe/linear", "ternary-fit-128"]]
COLUMNS = ("bits", "weights", "set", "top token", "KL", "loss", "lost", "won back")
TOKENS = 1 << 18


def ways(folder: Path) -> list[tuple[str, list[str]]]:
    """(name, flags of convert.py) of each row."""
    table = folder / "two-planes-of-attention.json"
    table.write_text(json.dumps([*TWO_PLANES, ["", "float32"]]))
    rows = [(name, ["--weights", name]) for name in PLAIN]
    rows += [("attention ternary2-128", ["--precision", str(table)])]
    return rows


def bits_of(folder: Path) -> float:
    """Stored bits for each weight of the matrices, scales included."""
    leaves = [leaf for _, leaf in shards.open_shards(folder).values()]
    matrices = [leaf for leaf in leaves if not isinstance(leaf, np.ndarray)]
    weights = sum(int(np.prod(leaf.shape)) for leaf in matrices)
    return 8 * sum(map(shards.stored_bytes, matrices)) / weights


def compared(folder: Path, teacher: Path, text: str) -> dict:
    config = model.config_from_dict(checkpoint.read_config(folder))
    mesh = sharding.make_mesh()
    precision = runners.precision_of(folder, model.abstract_params(config), None)
    student = fidelity.Walker(folder, config, precision, mesh)
    length = min(config.sequence_len, evaluate.MAX_LENGTH)
    return fidelity.compare(fidelity.open_teacher(teacher, mesh), student, text, length)


def row_of(found: dict, bits: float) -> dict:
    """The figures of a row; "lost" and "won back" come later."""
    families = found["families"].values()
    weights = sum(family["weights"] for family in families)
    error = sum(family["weights"] * family["error"] for family in families) / weights
    routing = [layer["set"] for layer in found["layers"] if "set" in layer]
    return {
        "bits": bits,
        "weights": error,
        "set": float(np.mean(routing)) if routing else float("nan"),
        "top token": found["agreement"],
        "KL": found["kl"],
        "loss": found["student"]["loss_per_character"],
        "teacher": found["teacher"]["loss_per_character"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("teacher", type=Path, help="checkpoint in float32 or int8")
    parser.add_argument("--data", required=True, help="text file, or name of one")
    parser.add_argument("--folder", type=Path, required=True, help="for what is converted")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to calibrate (%(default)s)")
    parser.add_argument("--recover", type=int, help="tokens of gradient steps, a third row of each")
    parser.add_argument("--characters", type=int, help="to compare on, of the last tenth (all)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    text = data.split(data.load_text(args.data))[1][: args.characters]
    calibrate = ["--calibrate", args.data, "--calibration-tokens", str(args.tokens)]
    methods = {"alone": [], "calibrated": calibrate}
    if args.recover:
        methods["recovered"] = [*calibrate, "--recover", str(args.recover)]
    absmean = None
    print(f"| {'weights':24} | {'made':10} | " + " | ".join(f"{c:>9}" for c in COLUMNS) + " |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for name, flags in ways(args.folder):
        for method, more in methods.items():
            folder = args.folder / f"{name} {method}".replace(" ", "-")
            if not folder.exists():
                flags_of_all = ["--activations", "int8", *flags, *more]
                convert.main([str(args.teacher), str(folder), *flags_of_all])
            row = row_of(compared(folder, args.teacher, text), bits_of(folder))
            row["lost"] = row["loss"] - row["teacher"]
            absmean = absmean or row["lost"]
            row["won back"] = 1 - row["lost"] / absmean
            figures = " | ".join(f"{row[column]:9.4f}" for column in COLUMNS)
            print(f"| {name:24} | {method:10} | {figures} |", flush=True)
    print(f"teacher: {row['teacher']:.4f} nats per character", file=sys.stderr)


if __name__ == "__main__":
    main()
