"""Grok-1's release from the Hugging Face hub, in a download that may be interrupted at any time.

huggingface_hub has the addresses, the access token and the connections. Its own whole-file
functions are not used: `hf_hub_download` and `snapshot_download` of 2.4.0 drop an unfinished file
and start it again, over HTTP as over Xet, and check its size but not its sum. Here an unfinished
file stays as `ckpt-0/partial.<name>`, is continued with a Range request, and gets its own name when
it has the hub's size and sum. Since that is plain HTTP, Xet's settings do not matter.

No server is trusted to end: nothing beyond the size that the hub told is written, and one that
sends too little for too long is given up (`data.watched`).
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import tqdm

import data
import files
from files import RELEASED
from tokenizer import FILE as TOKENIZER_FILE
from tokenizer import GROK_1_SHA256

REPO = "xai-org/grok-1"
TOKENIZER = "https://raw.githubusercontent.com/xai-org/grok-1/main/tokenizer.model"
LIBRARY = "huggingface_hub==2.4.0"
WORKERS = 8  # files at a time
TIMEOUT = 10  # seconds without a byte
PATIENCE = 330  # seconds for the size of a file: the hub's limits on requests last five minutes
TRIES = 5  # connections in a row that bring less than data.LEAST
REDIRECTS = 10
BUSY = (408, 429, 500, 502, 503, 504)  # what may be well a second later
LISTING = 1 << 24  # bytes; Grok-1's has 0.3 million
AGAIN = "run the same command again: it goes on where it stopped"


class _File(NamedTuple):
    path: Path  # here
    url: str
    size: int
    sum: str  # sha256, of files in LFS, that is all large ones; or git's name, of others


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
    url = hub.hf_hub_url(repo, f"{RELEASED}/{name}", revision=revision)

    def ask(_):
        # Tries again for 23 seconds when the hub is away, so that a long conversion goes on.
        return hub.get_hf_file_metadata(url, timeout=TIMEOUT, retry_on_errors=True)

    with _one_line(f"cannot find {RELEASED}/{name} in {repo}"):
        about = data.watched(ask, PATIENCE)
        if about.commit_hash is None or about.size is None:
            raise OSError(f"{url} does not answer like the hub (a proxy or a login page?)")
    file = _checked(Path(folder) / RELEASED / name, url, about.size, about.etag)
    if not _is_whole(file):
        _check_space([file])
        _fetch(file, advance)
    return file.path


def release(
    folder: str | os.PathLike, names: Sequence[str], repo: str = REPO, revision: str = "main"
) -> None:
    """All of the release's `ckpt-0/<name>` in `folder`, several at a time, with a bar on stderr.

    What is there whole is kept, what is there in part is completed. Raises FileNotFoundError,
    before anything is fetched, if the hub has not all of `names`; other errors as in `tensor`.
    """
    hub = _library()
    with _one_line(f"cannot list {repo}"):
        commit, listed = _listing(repo, revision)
    absent = sorted(name for name in names if f"{RELEASED}/{name}" not in listed)
    if absent:
        raise FileNotFoundError(
            f"{repo} at revision {revision} has {len(listed)} files but not"
            f" {RELEASED}/{absent[0]} ({len(absent)} of {len(names)} absent): give a repository and"
            " revision that has them"
        )
    wanted = []
    for path in (f"{RELEASED}/{name}" for name in names):
        about, url = listed[path], hub.hf_hub_url(repo, path, revision=commit)
        lfs = about.get("lfs")
        known = lfs.get("sha256") if isinstance(lfs, dict) else about.get("blobId")
        wanted.append(_checked(Path(folder) / path, url, about.get("size"), known))
    rest = [file for file in wanted if not _is_whole(file)]
    _check_space(rest)
    total = sum(file.size for file in wanted)
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


def _checked(path: Path, url: str, size: Any, known: Any) -> _File:
    """A file as the hub describes it; ValueError for a size or a sum that is none."""
    is_sum = isinstance(known, str) and re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", known)
    if type(size) is not int or size < 0 or not is_sum:
        raise ValueError(
            f"the hub says of {url} that its size is {size!r:.80} and its sum {known!r:.80}: it"
            " could not be checked; give a repository and revision that has both"
        )
    return _File(path, url, size, known)


def _listing(repo: str, revision: str) -> tuple[str, dict[str, dict]]:
    """The commit of a revision, and {path: what the hub says of the file}; OSError without one."""
    from huggingface_hub import constants

    revision = urllib.parse.quote(revision, safe="")
    url = f"{constants.ENDPOINT}/api/models/{repo}/revision/{revision}?blobs=true"
    content = data.watched(lambda advance: _read(url, advance))
    try:
        about = json.loads(content)
        listed = {entry["rfilename"]: entry for entry in about["siblings"]}
        return urllib.parse.quote(about["sha"]), listed
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OSError(f"{url} does not answer like the hub: {error!r:.80}") from error


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


def _open(url: str, start: int = 0) -> Any:
    """The answer to a request for a file, or what follows its first bytes; the body is yet to come.

    Bodies of redirects and errors, which may be as long as they like, are not read.
    """
    import httpx2
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # With compression a server may ignore the Range.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    client = get_session()
    request = client.build_request("GET", url, headers=headers, timeout=TIMEOUT)
    for _ in range(REDIRECTS):
        answer = client.send(request, stream=True, follow_redirects=False)
        if answer.is_success:
            return answer
        answer.close()
        if answer.next_request is None:
            headers = {k: v for k, v in answer.headers.items() if k.startswith("x-")}
            hf_raise_for_status(
                httpx2.Response(answer.status_code, headers=headers, request=request)
            )
            break
        request = answer.next_request
    raise OSError(f"{url} redirects, without an end")


def _chunks(answer: Any) -> Iterator[bytes]:
    """What a server sends, as it comes; OSError if it is compressed: a little may become a lot."""
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise OSError(f"sent with Content-Encoding {encoding!r:.40}, not as it is")
    return answer.iter_raw()


def _read(url: str, advance: Callable[[int], None]) -> bytes:
    """What is at an address; OSError if it is longer than LISTING."""
    content = bytearray()
    with contextlib.closing(_open(url)) as answer:
        for chunk in _chunks(answer):
            advance(len(chunk))
            content += chunk
            if len(content) > LISTING:
                raise OSError(f"{url} sends more than {LISTING:,} bytes")
    return bytes(content)


def _fetch(file: _File, advance: Callable[[int], None] = lambda count: None) -> None:
    """Completes the partial file, checks it and gives it its name.

    Two processes that do so at once harm nothing, for they write the same bytes to the same places;
    the later one fails at the end and finds the file when it is run again.
    """
    part = _part(file)

    def complete(came):
        def both(count):
            came(count)
            advance(count)

        _complete(part, file, both)

    with _one_line(f"cannot fetch {file.url}"):
        part.touch()
        data.watched(complete)
        with part.open("rb") as content:
            size, found = os.fstat(content.fileno()).st_size, _sum(content, file)
        if (size, found) == (file.size, file.sum):
            files.sync(part)
            part.replace(file.path)
            files.sync(file.path.parent)
            return
        part.unlink()
    raise ValueError(
        f"{file.url} gave {size} bytes with sum {found}, expected {file.size} with {file.sum}:"
        " they are removed, run the same command again"
    )


def _sum(content: BinaryIO, file: _File) -> str:
    """sha256, or the name that git gives to a file, whichever the hub told."""
    if len(file.sum) == 64:
        return hashlib.file_digest(content, "sha256").hexdigest()
    header = b"blob %d\0" % file.size
    return hashlib.file_digest(content, lambda: hashlib.sha1(header)).hexdigest()


def _complete(part: Path, file: _File, advance: Callable[[int], None]) -> None:
    """Adds what is missing to the partial file, over several connections if they break."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    tries = 0
    with part.open("r+b") as output:
        while (start := output.seek(0, os.SEEK_END)) < file.size:
            if tries:
                time.sleep(1)
            problem = OSError(f"it ends after {start} of {file.size} bytes")
            try:
                _append(output, file, start, advance)
            except (httpx2.TransportError, HfHubHTTPError) as error:
                problem = error
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in BUSY:
                    raise
            came = output.seek(0, os.SEEK_END) - start
            tries = 0 if came >= data.LEAST else tries + 1
            if tries == TRIES and start + came < file.size:
                raise problem


def _append(output: BinaryIO, file: _File, start: int, advance: Callable[[int], None]) -> None:
    """Writes what a server sends from byte `start` on; or all, if it does not know ranges."""
    with contextlib.closing(_open(file.url, start)) as answer:
        found = answer.headers.get("Content-Range", "")
        if answer.status_code != 206:
            output.seek(0)
        elif not found.startswith(f"bytes {start}-"):
            raise OSError(f"asked for what follows {start} bytes, found {found!r:.40}")
        for chunk in _chunks(answer):
            advance(len(chunk))
            output.write(chunk[: file.size - output.tell()])
            if output.tell() == file.size:
                return
