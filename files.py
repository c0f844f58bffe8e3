"""What all file operations share: whole files or none, sums, JSON, locks, the cache folder.

A file is written under another name, flushed to the disk, and renamed: after a kill, a full disk or
a power failure there is the old one or the new one. A folder likewise; where an old one has to make
way first, `recover` undoes a replacement that stopped between its two renames.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

RELEASED = "ckpt-0"  # holds the tensors of a released checkpoint


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not the one asked for; says which file and why."""


def cache_folder() -> Path:
    """What is fetched or compiled: `$XDG_CACHE_HOME/ternary-grok`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ternary-grok"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object; CheckpointError for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; copy it again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}; correct or copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {content!r:.80}; correct it")
    return content


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


def write_bytes(path: Path, content: bytes) -> None:
    """A small file, whole or not at all; left alone if it has this content."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: Path, content: dict) -> None:
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def replace_folder(part: Path, folder: Path) -> None:
    """Gives a complete folder its name, in place of one that is there.

    Call `recover` before a `part` is removed or begun again.
    """
    for path in (*part.rglob("*"), part):
        sync(path)
    previous = _previous(folder)
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    part.rename(folder)
    sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path) -> None:
    """Gives an old folder its name back if `replace_folder` stopped before a new one got it."""
    previous = _previous(folder)
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")


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
