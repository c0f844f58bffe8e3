"""Training runs side by side: a table of their last validation losses, and a plot.

    python -m benchmarks.curves "ternary=runs/0,runs/1" "float=runs/2" nanoGPT=nanogpt.jsonl \\
        --plot docs/training.png

Each name has run folders of `train.py`, or logs, of one recipe with several seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def read(path: Path) -> list[dict]:
    """The evaluations of a run folder or of its log."""
    file = path / "log.jsonl" if path.is_dir() else path
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if not rows:
        raise ValueError(f"{file} has no evaluation yet; wait for the first")
    return rows


def parse(text: str) -> tuple[str, list[list[dict]]]:
    """The name and the logs of "name=path,path"."""
    name, _, paths = text.partition("=")
    if not paths:
        raise ValueError(f"runs are named, as in ternary=runs/0,runs/1; got {text!r}")
    return name, [read(Path(path)) for path in paths.split(",")]


def line(name: str, logs: list[list[dict]]) -> str:
    """A row of the table: the mean and the spread of the last losses, in nats per character."""
    last = np.array([log[-1]["validation"] for log in logs])
    rates = [row["tokens_per_second"] for log in logs for row in log if "tokens_per_second" in row]
    rate, steps = np.median(rates), logs[0][-1]["step"]
    spread = f"{np.ptp(last):>10.4f}" if len(last) > 1 else " " * 10
    return f"{name:<28}{len(logs):>6}{steps:>9}{last.mean():>10.4f}{spread}{rate:>10.0f}"


def plot(named: dict[str, list[list[dict]]], path: Path) -> None:
    """Validation losses against updates, a colour for each name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for i, (name, logs) in enumerate(named.items()):
        for j, log in enumerate(logs):
            points = [(row["step"], row["validation"]) for row in log]
            label = None if j else name
            axes.plot(*zip(*points, strict=True), f"C{i}", marker=".", label=label)
    axes.set(xlabel="update", ylabel="validation, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,RUN", help="run folders or logs")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    args = parser.parse_args(argv)
    try:
        named = dict(map(parse, args.runs))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{'':<28}{'seeds':>6}{'updates':>9}{'loss':>10}{'spread':>10}{'tokens/s':>10}")
    for name, logs in named.items():
        print(line(name, logs))
    if args.plot:
        plot(named, args.plot)


if __name__ == "__main__":
    main()
