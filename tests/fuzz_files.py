"""Damaged and crafted checkpoint files, as many as one likes:

    python tests/fuzz_files.py --cases 100000 --seed 1

Each case changes a small checkpoint of either format at random and loads it. It must come back as
it was saved, or end in a CheckpointError of a few printable words, in a second and in little
memory; a case that does not is printed with the arguments that make it again.

Two things may load as other numbers, of the same shapes and dtypes: bytes of a released tensor, for
that format has no sums, and what somebody crafted whose sums agree. Of a converted checkpoint
loading reads the sums of all but the numbers; `verify` must find these.
"""

import argparse
import copy
import faulthandler
import functools
import json
import math
import os
import pickle
import pickletools
import random
import resource
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import conftest  # noqa: F401  the CPU, and the path to the modules
import jax
import numpy as np
from factories import GOLDEN, join_header, mend_sums, split_header

import checkpoint
import formats
import model
import shards
import tensor_file
from files import CheckpointError
from quantize import QuantizedWeight, pack

SECONDS = 1  # of all cores together, for a case
MEMORY = 1 << 26  # bytes that a case may add to the peak
HANGS = 60  # seconds after which a case is no more waited for

Random = random.Random


def require(condition, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def attempt(load: Callable, errors=CheckpointError):
    """What `load` gives, or its error, which must be fit to be read."""
    try:
        return load()
    except errors as error:
        lines = str(error).split("\n")
        require(all(line.isprintable() for line in lines), f"not printable: {str(error)!r}")
        require(len(str(error)) <= 2000, f"a message of {len(str(error))} characters")
        return error


def same(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def forms(tree) -> list:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


# --- Changes --------------------------------------------------------------------------------------


def damaged(data: bytes, other: bytes, rng: Random) -> bytes:
    """Bits flipped, bytes changed, cut out, put in, or taken from another file; more at the front,
    where the bytes say what the others are."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, size = int(len(data) * rng.random() ** 3), int(60 ** rng.random())
        head, tail = data[:at], data[at:]
        changes = (
            head + bytes(b ^ 1 << rng.randrange(8) for b in tail[:1]) + tail[1:],
            head + rng.randbytes(size) + tail[size:],
            head + tail[size:],
            head + rng.randbytes(size) + tail,
            head + tail[:size] + tail,
            head,
            head + other[int(len(other) * rng.random() ** 3) :],
        )
        data = rng.choice(changes)
    return data


NODES = [None, True, 0, 1, -1, 3, 1.0, 1e300, 1 << 31, 1 << 62, 1 << 63, 10**30, -(1 << 62)]
NODES += ["", "a", "..", "../a", "/etc/passwd", "\x1b]0;a\x07", "\ud800", "F32", "U8", "x" * 9999]
NODES += [[], {}, [[]], [1, 2], [0, 1 << 62], [-8, 0], [1] * 40, {"a": 1}, {"shape": [1]}]


def rewritten(tree: dict, rng: Random) -> dict:
    """JSON with a few of its values, or of those of JSON within it, replaced, removed or added."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        places, todo = [], [tree]
        while todo:
            node = todo.pop()
            keys = node if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
        if not places:
            break
        node, key = rng.choice(places)
        value = node[key]
        action = rng.randrange(6)
        if isinstance(value, str) and value.startswith("{") and action:
            node[key] = json.dumps(rewritten(json.loads(value), rng))
        elif type(value) is int and action > 2:
            node[key] = value + rng.choice((-8, -4, -1, 1, 4, 8, 1 << 40))
        elif action == 1:
            del node[key]
        elif action == 2 and isinstance(node, dict):
            node[rng.choice(("a", "layer/t", "layer/t.scales", "\x1b[2J", key + "/b"))] = (
                copy.deepcopy(value)
            )
        elif action == 3:
            other, place = rng.choice(places)
            node[key] = copy.deepcopy(other[place])
        else:
            node[key] = copy.deepcopy(rng.choice(NODES))
    return tree


def relaid(header: dict, rng: Random) -> tuple[dict, bytes]:
    """A header with other shapes or dtypes, and as many bytes as these need, where they belong."""
    names = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])
    for name in rng.sample(names, rng.choice((1, 1, 2))):
        entry, axis = header[name], rng.randrange(len(header[name]["shape"]))
        if rng.random() < 0.3:
            entry["dtype"] = rng.choice(list(shards.DTYPES))
        else:
            size = entry["shape"][axis] + rng.choice((-2, -1, 1, 2, 100))
            entry["shape"][axis] = max(0, size)
    end = 0
    for name in names:
        entry = header[name]
        size = math.prod(entry["shape"]) * shards.DTYPES[entry["dtype"]].itemsize
        entry["data_offsets"] = [end, end + size]
        end += size
    return header, rng.randbytes(end)


def dumped(tree: dict, rng: Random) -> bytes:
    """JSON text, now and then with a key twice."""
    text = json.dumps(tree)
    if tree and rng.random() < 0.05:
        key = rng.choice(list(tree))
        text = "{" + json.dumps(key) + ":" + json.dumps(tree[key]) + "," + text[1:]
    return text.encode()


# --- Released tensors -----------------------------------------------------------------------------


def tokens(data: bytes) -> list[bytes]:
    """A pickle by its opcodes."""
    starts = [at for _, _, at in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


FILES = [GOLDEN / "released_layout/ckpt-0" / checkpoint.file_name(i) for i in (1, 2, 5)]
SAMPLES = [path.read_bytes() for path in FILES]
OPCODES = [token for sample in SAMPLES for token in tokens(sample) if len(token) < 100]
OPCODES += [bytes([code]) for code in range(256)]
OPCODES += [b"K%c" % n for n in range(9)] + [b"h%c" % n for n in range(9)]
SHARED = b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(200, 255))  # 2 ** 55 leaves
NASTY = [SHARED, b"}(" + SHARED + b"Nu", SHARED + b"\x8c\x01x\x93", b"B\0\1\0\0" + b"\2" * 256]
NASTY += [pickle.NEWTRUE, pickle.NONE, b"K\1" * 30, b"\x85" * 300, b"(K\2K\1t", b"C\2\2\1"]
NASTY += [b"\x8c\x05\x1b]0;a\x8c\x01x\x93", b"c\x1b[2J\nx\n", b"c" + b"x" * 999 + b"\nx\n"]
NASTY += [b"cos\nsystem\n", b"(ios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"Pid\n", b"Q"]
NASTY += [b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x01\xff", b"r\xff\xff\xff\xff"]
NASTY += [b"B\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"\x95" + b"\xff" * 8]


def program(sample: bytes, rng: Random) -> bytes:
    """A pickle of known opcodes: a good one with some changed, or none that ever was."""
    if rng.random() < 0.2:
        return b"\x80\x04" + b"".join(rng.choices(OPCODES + NASTY, k=rng.randrange(60))) + b"."
    parts = tokens(sample)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(parts))
        new = rng.choice(rng.choice((OPCODES, NASTY, parts)))
        old, count = rng.choice(((1, 1), (0, 1), (1, 0), (1, 2)))
        parts[at : at + old] = [new] * count
        parts = parts or [pickle.STOP]
    return b"".join(parts)


class Released:
    """A folder to put a changed tensor into."""

    def __init__(self, folder: Path):
        self.path = folder / "tensor"
        self.tensors = [tensor_file.read_tensor(path) for path in FILES]

    def case(self, rng: Random) -> None:
        i = rng.randrange(len(SAMPLES))
        if rng.random() < 0.5:
            data = damaged(SAMPLES[i], rng.choice(SAMPLES), rng)
        else:
            data = program(SAMPLES[i], rng)
        self.path.write_bytes(data)
        self.check(data, self.tensors[i])

    def check(self, data: bytes, tensor) -> None:
        kind = "int8" if isinstance(tensor, QuantizedWeight) else "float32"

        def load():
            found = tensor_file.read_tensor(self.path)
            checkpoint.restored_shapes(found, tensor.shape, kind)
            return found

        found = attempt(load)
        if isinstance(found, CheckpointError):
            return
        weights = [w if kind == "float32" else w.codes for w in (found, tensor)]
        require(forms(weights[0]) == forms(weights[1]), "another shape or dtype")
        if all(leaf.tobytes() in data for leaf in jax.tree.leaves(tensor)):
            require(same(found, tensor), "other numbers, although their bytes are whole")


# --- Converted checkpoints ------------------------------------------------------------------------

RULES = [(r"/t$", "ternary"), (r"/u$", "ternary2-64"), (r"/q$", "int8"), (r"", "float32")]
CONFIG = model.config_to_dict(model.PRESETS["tiny"])


class Converted:
    """A checkpoint with parameters of all forms in two shards, and its files as they should be."""

    def __init__(self, folder: Path, packing: str):
        rng = np.random.default_rng(0)
        trits = rng.integers(-1, 2, (2, 21, 5), dtype=np.int8)
        scales = np.ones((2, 3, 5), jax.numpy.bfloat16)
        params = {
            "a/linear": {
                "t": pack(trits, np.full((2, 1, 1), 0.5, np.float32)),
                "u": formats.FORMATS["ternary2-64"].quantize(trits.astype(np.float32)),
            },
            "b/linear": {"q": QuantizedWeight(trits, scales)},
            "norm": {"f": rng.standard_normal((7, 3), np.float32), "g": np.ones(3, np.float32)},
        }
        self.folder = folder / packing
        self.template = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, np.float32), params, is_leaf=_is_weight
        )
        several = functools.partial(shards.plan, shard_size=200)
        with unittest.mock.patch.object(shards, "plan", lambda leaves, *_: several(leaves)):
            config = CONFIG | checkpoint.quantization("mixed", RULES, packing)
            checkpoint.save_converted(self.folder, params, config, {"tokenizer.model": b"pieces"})
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.names = sorted(self.files)
        self.shards = [name for name in self.names if name.endswith(".safetensors")]
        self.expected = self.load()

    def load(self):
        checkpoint.default_weights(self.folder)
        return checkpoint.restore(self.folder, self.template, RULES, threads=1)

    def put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def case(self, rng: Random) -> None:
        try:
            rng.choice((self.accident, self.crafted_header, self.crafted_other))(rng)
        finally:
            for name, data in self.files.items():
                self.put(name, data)

    def accident(self, rng: Random) -> None:
        """The sums are as they were."""
        name = rng.choice(self.names)
        data = damaged(self.files[name], self.files[rng.choice(self.names)], rng)
        self.put(name, data)
        found, problems = self.outcome()
        if data == self.files[name] or name == shards.CHECKSUMS:
            loaded = not isinstance(found, CheckpointError)
            require(not loaded or same(found, self.expected), "other numbers")
            return
        require(problems != [], f"verify found nothing wrong with {name}")
        small = name not in self.shards
        header = len(data) - len(split_header(self.files[name])[1])
        if (
            small
            or len(data) != len(self.files[name])
            or data[:header] != self.files[name][:header]
        ):
            require(isinstance(found, CheckpointError), f"loaded, with a damaged {name}")

    def crafted_header(self, rng: Random) -> None:
        """A shard whose sums agree with a header that somebody wrote."""
        name = rng.choice(self.shards)
        header, rest = split_header(self.files[name])
        how = rng.random()
        if how < 0.5:
            header = dumped(rewritten(json.loads(header), rng), rng)
        elif how < 0.8:
            header, rest = relaid(json.loads(header), rng)
            header = json.dumps(header).encode()
        else:
            header = damaged(header, self.files[rng.choice(self.names)], rng)
        if rng.random() < 0.3:
            rest = damaged(rest, header, rng)
        self.put(name, join_header(header, rest))
        mend_sums(self.folder)
        self.outcome()

    def crafted_other(self, rng: Random) -> None:
        """The configuration, index or sums that somebody wrote."""
        name = rng.choice((shards.CONFIG, shards.INDEX, shards.CHECKSUMS))
        self.put(name, dumped(rewritten(json.loads(self.files[name]), rng), rng))
        if name != shards.CHECKSUMS:
            mend_sums(self.folder)
        self.outcome()
        attempt(lambda: model.config_from_dict(checkpoint.read_config(self.folder)), ValueError)

    def outcome(self):
        """What loading and verifying give, each of which may be an error."""
        found = attempt(self.load)
        if not isinstance(found, CheckpointError):
            require(forms(found) == forms(self.expected), "another shape or dtype")
        return found, attempt(lambda: shards.verify(self.folder))


def _is_weight(x) -> bool:
    return not isinstance(x, dict)


# --- The command ----------------------------------------------------------------------------------


def watched(case: Callable, rng: Random) -> None:
    """Runs a case; AssertionError if it takes long, or much memory, or is wrong."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    begin, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case(rng)
    faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - begin
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    require(seconds <= SECONDS, f"took {seconds:.1f} s")
    require(more <= MEMORY, f"took {more} bytes")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other cases (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="case to begin with (%(default)s)")
    args = parser.parse_args(argv)
    failures = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        targets = [Released(folder), *(Converted(folder, packing) for packing in shards.PACKINGS)]
        for i in range(args.first, args.first + args.cases):
            rng = Random(f"{args.seed} {i}")
            try:
                watched(rng.choice(targets).case, rng)
            except Exception:
                failures += 1
                print(f"--seed {args.seed} --first {i} --cases 1", file=sys.stderr)
                traceback.print_exc()
    print(f"{args.cases} cases, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
