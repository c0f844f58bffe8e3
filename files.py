"""What all file operations share: whole files or none, sums, JSON, locks, the cache folder.

A file is written under another name, flushed to the disk, and renamed: after a kill, a full disk or
a power failure there is the old one or the new one. A folder likewise; where an old one has to make
way first, `recover` undoes a replacement that stopped between its two renames.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import reprlib
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON = 1 << 23  # bytes; Grok-1's index has 0.2 MB

RELEASED = "ckpt-0"  # holds the tensors of a released checkpoint


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not the one asked for; says which file and why."""


def cache_folder() -> Path:
    """What is fetched or compiled: `$XDG_CACHE_HOME/ternary-grok`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ternary-grok"


# --- Reading --------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Opens a file to read; CheckpointError if there is none, or it is no file.

    A pipe or a device of this name could keep a reader waiting for ever.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(
                f"{path}: a folder, pipe or device, expected a file; copy it again"
            )
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; copy it again") from None


@contextlib.contextmanager
def naming(title: Any) -> Iterator[None]:
    """Puts the name of a file, or of a part of one, before an error, which becomes a
    CheckpointError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{title}: {error}") from None


def shown(value: Any) -> str:
    """A value that was read from a file, for a message: printable, and cut short."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxstring = short.maxlong = short.maxother = 100
    return f"{short.repr(value):.200}"


def sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object; CheckpointError for anything else."""
    with open_file(path) as file, naming(path):
        return parse_json(file.read(MAX_JSON + 1))


def parse_json(content: str | bytes) -> dict:
    """A JSON object; CheckpointError for anything else.

    A key that is there twice is an error: readers differ in which of the values they take.
    """
    if len(content) > MAX_JSON:
        raise CheckpointError(f"more than {MAX_JSON} bytes of JSON; correct or copy it again")
    try:
        text = content if isinstance(content, str) else str(content, "utf-8")
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON: {error}; correct or copy it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, found {shown(value)}; correct it")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


# --- Whole or not at all --------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Gives another name to write to, which becomes `path` at the end; removed on an error.

    shared: other processes may write the same file at the same time
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def filling(path: Path) -> Iterator[None]:
    """Says which file the system could not write, and the cure; its own error names none."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written: {error.strerror or error}; make room, or choose a folder "
            "on another disk, then run the same command again"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """A small file, whole or not at all; left alone if it has this content."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with filling(path), replacing(path) as part:
        part.write_bytes(content)


def write_json(path: Path, content: dict) -> None:
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """JSON to be read by people, too."""
    return (json.dumps(content, indent=2) + "\n").encode()


def replace_folder(part: Path, folder: Path) -> None:
    """Gives a complete folder its name, in place of one that is there.

    Call `recover` before a `part` is removed or begun again.
    """
    for path in (*part.rglob("*"), part):
        sync(path)
    previous = previous_name(folder)
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    part.rename(folder)
    sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path) -> None:
    """Gives an old folder its name back if `replace_folder` stopped before a new one got it."""
    previous = previous_name(folder)
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def previous_name(folder: Path) -> Path:
    """Where an old folder is while a new one takes its place."""
    return folder.parent / f"{folder.name}.previous"


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a folder, so that no other process writes it; CheckpointError if one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another process is writing it; wait for its end, or choose another"
                " folder"
            ) from None
        yield
    finally:
        os.close(descriptor)
