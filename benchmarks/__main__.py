"""Speed of ternary products, of decoding and of prefill, with baselines and limits in the same run.

    python -m benchmarks
    python -m benchmarks --only products --json results.json
    python -m benchmarks --only models --llama-cpp --onnxruntime
    python -m benchmarks --only compile

The limit of a product is the time to read its weights once at the measured bandwidth, or to
multiply at the int8 rate of registers alone (`peak.cc`), whichever is longer; that of a decoded
token, the weights of two of eight experts, attention and the output head. Weights are random, and
too large for a cache.
Memory is what a case adds to the process: once loaded, and at most.
"""

import argparse
import json
import sys

from benchmarks import compilation, experts, llama, models, products, timer

CASES = {
    "products": products.products,
    "formats": products.packed_formats,
    "models": models.models,
}
PEERS = {"llama-cpp": llama, "onnxruntime": experts}
ALL = CASES | {name: peer.compare for name, peer in PEERS.items()} | {"compile": compilation.full}
COLUMNS = {  # key of a row: head and format
    "ms": ("ms", "10.2f"),
    "GB_per_s": ("GB/s", "7.1f"),
    "of_limit": ("of limit", "9.2f"),
    "of_ternary": ("x ternary", "10.2f"),
    "tokens_per_s": ("tokens/s", "9.1f"),
    "resident_MB": ("MB", "7.0f"),
    "peak_MB": ("peak MB", "8.0f"),
    "ours_is_faster": ("ours is x", "10.2f"),
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--only", choices=ALL, help=f"one part (by default {', '.join(CASES)})")
    parser.add_argument(
        "--llama-cpp",
        action="store_true",
        help="and the bench preset beside llama.cpp with the same weights, taking turns",
    )
    parser.add_argument(
        "--onnxruntime",
        action="store_true",
        help="and a token's expert products beside those of onnxruntime, taking turns",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the parts to run."""
    names = [args.only] if args.only else list(CASES)
    flags = {"llama-cpp": args.llama_cpp, "onnxruntime": args.onnxruntime}
    return names + [name for name, flag in flags.items() if flag and name not in names]


def line(row: dict) -> str:
    """A row of the table."""
    return f"{row['case']:52}" + "".join(
        f"{row[key]:{form}}" if key in row else " " * int(form.split(".")[0])
        for key, (_, form) in COLUMNS.items()
    )


def main(argv=None) -> None:
    args = parse_arguments(argv)
    names = chosen(args)
    try:
        for name in PEERS.keys() & set(names):
            PEERS[name].library()  # missing ones are missed before anything is measured
    except ImportError as error:
        sys.exit(f"error: {error}")
    machine = timer.machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    limits = {
        "bytes": machine["read_bandwidth_GB_per_s"] * 1e9,
        "int8": machine["int8_T_per_s"] * 1e12,
    }
    widths = (f"{head:>{form.split('.')[0]}}" for head, form in COLUMNS.values())
    print(" " * 52 + "".join(widths))
    rows = []

    def report(**row):
        rows.append(row)
        print(line(row).rstrip(), flush=True)

    for name in names:
        ALL[name](report, limits)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
