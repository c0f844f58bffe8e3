"""Speed of ternary products, of decoding and of prefill, with baselines and limits in the same run.

    python -m benchmarks
    python -m benchmarks --only products --json results.json
    python -m benchmarks --only models --llama-cpp --onnxruntime
    python -m benchmarks --only llama-cpp --ik-llama ../ik_llama.cpp
    python -m benchmarks --only compile

The limit of a product is the time to read its weights once at the measured bandwidth, or to
multiply at the int8 rate of registers alone (`peak.cc`), whichever is longer; that of a decoded
token, the weights of two of eight experts, attention and the output head; of a batch, those of as
many experts as so many tokens need. Weights are random, and too large for a cache.
Memory is what a case adds to the process: once loaded, and at most.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import compilation, experts, llama, models, products, timer

CASES = {
    "products": products.products,
    "formats": products.packed_formats,
    "models": models.models,
}
PEERS = llama.PARTS | {"onnxruntime": experts.compare}
ALL = CASES | PEERS | {"compile": compilation.full}
WIDTH = 56  # of the name of a case
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
        "--ik-llama",
        type=Path,
        metavar="FOLDER",
        help="and beside ik_llama.cpp, too, of a clone in which it was built (see README.md)",
    )
    parser.add_argument(
        "--table",
        choices=llama.TABLES,
        help="with only this embedding table of llama.cpp's, and ours like it (by default both)",
    )
    parser.add_argument(
        "--onnxruntime",
        action="store_true",
        help="and a token's expert products beside those of onnxruntime, taking turns",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    args = parser.parse_args(argv)
    if (args.ik_llama or args.table) and not llama.PARTS.keys() & set(chosen(args)):
        parser.error("--ik-llama and --table go with --llama-cpp or --only llama-cpp")
    return args


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the parts to run."""
    names = [args.only] if args.only else list(CASES)
    flags = dict.fromkeys(llama.PARTS, args.llama_cpp) | {"onnxruntime": args.onnxruntime}
    return names + [name for name, flag in flags.items() if flag and name not in names]


def versions(names: list[str], ik_llama: Path | None) -> dict[str, str]:
    """Those of the peers in these parts; ImportError or FileNotFoundError where one is missing."""
    found = llama.versions(ik_llama) if llama.PARTS.keys() & set(names) else {}
    return found | (experts.versions() if "onnxruntime" in names else {})


def line(row: dict) -> str:
    """A row of the table."""
    return f"{row['case']:{WIDTH}}" + "".join(
        f"{row[key]:{form}}" if key in row else " " * int(form.split(".")[0])
        for key, (_, form) in COLUMNS.items()
    )


def main(argv=None) -> None:
    args = parse_arguments(argv)
    names = chosen(args)
    try:  # missing ones are missed before anything is measured
        peers = versions(names, args.ik_llama)
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    machine = timer.machine() | peers
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    limits = {
        "bytes": machine["read_bandwidth_GB_per_s"] * 1e9,
        "int8": machine["int8_T_per_s"] * 1e12,
    }
    widths = (f"{head:>{form.split('.')[0]}}" for head, form in COLUMNS.values())
    print(" " * WIDTH + "".join(widths))
    rows = []

    def report(**row):
        rows.append(row)
        print(line(row).rstrip(), flush=True)

    tables = [args.table] if args.table else list(llama.TABLES)
    options = dict.fromkeys(llama.PARTS, {"ik_llama": args.ik_llama, "tables": tables})
    for name in names:
        ALL[name](report, limits, **options.get(name, {}))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
