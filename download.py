"""Grok-1's release from the Hugging Face hub, in a download that may be interrupted at any time.

huggingface_hub names the files with their sizes and sums and moves the bytes. Its own whole-file
functions are not used: `hf_hub_download` and `snapshot_download` of 2.4.0 drop an unfinished file
and start it again, over HTTP as over Xet, and check its size but not its sum. Here an unfinished
file stays as `ckpt-0/partial.<name>`, is continued with a Range request, and gets its own name when
it has the hub's size and sum. Since that is plain HTTP, Xet's settings do not matter.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import tqdm

import data
import files
from checkpoint import FOLDER
from tokenizer import FILE as TOKENIZER_FILE
from tokenizer import GROK_1_SHA256

REPO = "xai-org/grok-1"
TOKENIZER = "https://raw.githubusercontent.com/xai-org/grok-1/main/tokenizer.model"
LIBRARY = "huggingface_hub==2.4.0"
WORKERS = 8  # files at a time
TIMEOUT = 10  # seconds without an answer
AGAIN = "run the same command again: it goes on where it stopped"


class _File(NamedTuple):
    path: Path  # here
    url: str
    size: int
    sha256: str | None  # the hub knows it for files in LFS, that is all large ones


def tensor(
    folder: str | os.PathLike,
    name: str,
    repo: str = REPO,
    revision: str = "main",
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Path of the release's `ckpt-0/<name>` in `folder`, fetched or completed if it is not whole.

    `advance` is told of bytes as they come; what it raises stops the fetching, and passes.
    Raises OSError when it cannot be fetched (FileNotFoundError: the hub has no such file), and
    ValueError when huggingface_hub is missing, when the bytes are not those of the hub, or when
    another file has this name.
    """
    hub = _library()
    url = hub.hf_hub_url(repo, f"{FOLDER}/{name}", revision=revision)
    with _one_line(f"cannot find {FOLDER}/{name} in {repo}"):
        # Tries again for 23 seconds when the hub is away, so that a long conversion goes on.
        about = hub.get_hf_file_metadata(url, timeout=TIMEOUT, retry_on_errors=True)
        if about.commit_hash is None or about.size is None:
            raise OSError(f"{url} does not answer like the hub (a proxy or a login page?)")
    known = about.etag if re.fullmatch("[0-9a-f]{64}", about.etag or "") else None
    file = _File(Path(folder) / FOLDER / name, url, about.size, known)
    if not _is_whole(file):
        _check_space([file])
        _fetch(file, advance)
    return file.path


def release(
    folder: str | os.PathLike, names: Sequence[str], repo: str = REPO, revision: str = "main"
) -> None:
    """All of the release's `ckpt-0` in `folder`, several files at a time, with a bar on stderr.

    What is there whole is kept, what is there in part is completed. Raises FileNotFoundError,
    before anything is fetched, if the hub has not all of `names`; other errors as in `tensor`.
    """
    hub = _library()
    with _one_line(f"cannot list {repo}"):
        about = hub.HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=TIMEOUT
        )
    files = [
        _File(
            Path(folder) / sibling.rfilename,
            hub.hf_hub_url(repo, sibling.rfilename, revision=about.sha),
            sibling.size,
            sibling.lfs and sibling.lfs.sha256,
        )
        for sibling in about.siblings
        if re.fullmatch(rf"{FOLDER}/[^/]+", sibling.rfilename)
    ]
    absent = sorted(set(names) - {file.path.name for file in files})
    if absent:
        raise FileNotFoundError(
            f"{repo} at revision {revision} has {len(files)} files in {FOLDER} but not {absent[0]}"
            f" ({len(absent)} of {len(names)} absent): give a repository and revision that has them"
        )
    rest = [file for file in files if not _is_whole(file)]
    _check_space(rest)
    total = sum(file.size for file in files)
    missing = sum(map(_missing, rest))
    with tqdm.tqdm(
        total=total, initial=total - missing, unit="B", unit_scale=True, desc=repo
    ) as bar:
        _fetch_all(rest, bar.update)


def tokenizer(folder: str | os.PathLike) -> Path:
    """Path of Grok-1's `tokenizer.model` in `folder`, fetched when it is not there.

    Raises ValueError if another file has this name; errors of `data.fetch_file` pass.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.exists():
        cure = f"run the same command again, or download it by hand to {path}"
        data.fetch_file(TOKENIZER, GROK_1_SHA256, path, cure)
    elif (found := files.sha256(path)) != GROK_1_SHA256:
        raise ValueError(
            f"{path} is not Grok-1's tokenizer: it has sha256 {found}, expected {GROK_1_SHA256};"
            " move it away and run the same command again"
        )
    return path


# --- Parts ----------------------------------------------------------------------------------------


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"downloading needs huggingface_hub ({error}): pip install {LIBRARY}"
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _one_line(problem: str) -> Iterator[None]:
    """Errors of files, network and hub as an OSError of one line that says what to do."""
    import httpx2  # huggingface_hub's own
    from huggingface_hub import errors

    absent = errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError
    try:
        yield
    except (OSError, httpx2.HTTPError, json.JSONDecodeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, absent):
            cure = "give a repository and revision that has it"
            raise FileNotFoundError(f"{problem}: {text:.300}; {cure}") from error
        raise OSError(f"{problem}: {text:.300}; {AGAIN}") from error


def _part(file: _File) -> Path:
    return file.path.with_name(f"partial.{file.path.name}")  # for checkpoint.py, no tensor


def _missing(file: _File) -> int:
    """Bytes of a file that are still to be fetched."""
    part = _part(file)
    return file.size - (part.stat().st_size if part.exists() else 0)


def _is_whole(file: _File) -> bool:
    """Whether the file is there; ValueError if another one is. It was checked before it was named,
    so that its size is enough: the sums of all of Grok-1 take minutes.
    """
    if not file.path.exists():
        return False
    found = file.path.stat().st_size
    if found != file.size:
        raise ValueError(
            f"{file.path} has {found} bytes, the hub's has {file.size}: remove it and run the same"
            " command again"
        )
    return True


def _check_space(files: Sequence[_File]) -> None:
    """OSError if the disk has no room for the rest of these files."""
    missing = sum(map(_missing, files))
    if not missing:
        return
    folder = files[0].path.parent
    with _one_line(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(
            f"{folder} has {free:,} bytes free, {missing:,} are missing: make room, or choose"
            " another folder"
        )


def _fetch_all(files: Sequence[_File], advance: Callable[[int], None]) -> None:
    """Fetches all, or none any further after the first error or an interrupt from the keyboard."""
    lock, stop = threading.Lock(), threading.Event()

    def advance_or_stop(count: int) -> None:
        if stop.is_set():
            raise concurrent.futures.CancelledError
        with lock:
            advance(count)

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        tasks = [pool.submit(_fetch, file, advance_or_stop) for file in files]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Bar:
    """In place of the bar that huggingface_hub shows for one file: tells how many bytes came."""

    def __init__(self, advance: Callable[[int], None], **_):
        self.update = advance

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def _fetch(file: _File, advance: Callable[[int], None] = lambda count: None) -> None:
    """Completes the partial file, checks it and gives it its name.

    Two processes that do so at once harm nothing, for they write the same bytes to the same places;
    the later one fails at the end and finds the file when it is run again.
    """
    import httpx2
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # With compression a server may ignore the Range.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    part = _part(file)
    with _one_line(f"cannot fetch {file.url}"):
        part.touch()
        with part.open("r+b") as output:
            while (start := output.seek(0, os.SEEK_END)) < file.size:
                try:
                    http_get(
                        file.url,
                        output,
                        resume_size=start,
                        headers=headers,
                        expected_size=file.size,
                        tqdm_class=functools.partial(_Bar, advance),
                    )
                except httpx2.TransportError:  # http_get outlives some of these, but no reset
                    if output.seek(0, os.SEEK_END) == start:
                        raise
            size = output.tell()
            output.seek(0)
            found = file.sha256 and hashlib.file_digest(output, "sha256").hexdigest()
            if (size, found) == (file.size, file.sha256):
                os.fsync(output.fileno())
                part.replace(file.path)
                return
        part.unlink()
    raise ValueError(
        f"{file.url} gave {size} bytes with sha256 {found}, expected {file.size} with"
        f" {file.sha256}: they are removed, run the same command again"
    )
