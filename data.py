"""Text files to `[B, T]` token batches, fixed by seed and step. Knows neither model nor devices.

Shapes: B batch, T tokens of a sequence, W evaluation windows, N tokens of a text.
"""

import concurrent.futures
import hashlib
import http.client
import os
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

import files

SOURCES = {  # name: (address, sha256)
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
LARGEST = 1 << 24  # bytes of a file that `fetch_file` takes
STALL = 30  # seconds in which a server must send
LEAST = 30_000  # bytes
T = TypeVar("T")


class Windows(NamedTuple):
    """Evaluation windows over one text; see `windows`."""

    inputs: np.ndarray  # int32 [W, T]
    targets: np.ndarray  # int32 [W, T]
    mask: np.ndarray  # bool [W, T], true where the target counts


# --- Fetching -------------------------------------------------------------------------------------


def watched(work: Callable[[Callable[[int], None]], T], seconds: float | None = None) -> T:
    """The result of `work(advance)`, where `work` tells `advance` how many bytes came, as they do.

    TimeoutError if fewer than LEAST come in so many seconds, by default STALL. A timeout of a
    socket is not enough: a byte now and then, in the header too, keeps it waiting for ever. `work`
    runs in a thread that is left to itself then; its next `advance` raises CancelledError.
    """
    seconds = STALL if seconds is None else seconds
    came, stopped, done = 0, threading.Event(), concurrent.futures.Future()

    def advance(count: int) -> None:
        nonlocal came
        if stopped.is_set():
            raise concurrent.futures.CancelledError
        came += count

    def run() -> None:
        try:
            done.set_result(work(advance))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not done.done():
            before = came
            concurrent.futures.wait([done], seconds)
            if not done.done() and came - before < LEAST:
                raise TimeoutError(f"fewer than {LEAST:,} bytes came in {seconds:g} seconds")
        return done.result()
    finally:
        stopped.set()


def fetch(name: str) -> Path:
    """Path of the text `name` of `SOURCES` in the cache, fetched when it is not there or damaged.

    Errors of `fetch_file` pass.
    """
    address, expected = SOURCES[name]
    path = files.cache_folder() / f"{name}.txt"
    if not path.exists() or files.sha256(path) != expected:
        cure = f"download it by hand and give its path in place of {name!r}"
        fetch_file(address, expected, path, cure)
    return path


def fetch_file(address: str, expected: str, path: Path, cure: str) -> None:
    """Writes the small file at `address`, whose sha256 must be `expected`, to `path`.

    Raises OSError when it cannot be fetched, ValueError when the bytes are not the expected ones,
    or more than LARGEST; `cure` ends the message.
    """
    try:
        content = watched(lambda advance: _read(address, advance))
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"cannot fetch {path.stem} from {address}: {error}; it is not in {path} either: {cure}"
        ) from error
    if len(content) > LARGEST:
        raise ValueError(f"{address} sends more than {LARGEST:,} bytes: {cure}")
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{address} gave {len(content)} bytes with sha256 {found}, expected {expected}: {cure}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path, shared=True) as part:
        part.write_bytes(content)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib reads all that comes with a redirect, however long it is."""

    def redirect_request(self, *_) -> None:
        return None


def _read(address: str, advance: Callable[[int], None]) -> bytes:
    """What an address sends, no more of it than a byte above LARGEST."""
    content = bytearray()
    with urllib.request.build_opener(_NoRedirects).open(address, timeout=STALL) as answer:
        while len(content) <= LARGEST and (piece := answer.read1(1 << 16)):
            advance(len(piece))
            content += piece
    return bytes(content[: LARGEST + 1])


# --- Texts ----------------------------------------------------------------------------------------


def load_text(name_or_path: str | os.PathLike) -> str:
    """Text of a UTF-8 file, line ends as they are, or of a name in `SOURCES`, fetched once.

    Raises FileNotFoundError for a path that is no file, ValueError for bytes that are not UTF-8;
    errors of `fetch` pass.
    """
    path = fetch(name_or_path) if name_or_path in SOURCES else Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"no text file {path}; give a path, or one of {sorted(SOURCES)}")
    return read_text(path)


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, line ends as they are; ValueError for bytes that are not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset"
            f" {error.start}; convert it, for example with iconv"
        ) from error


def split(text: str) -> tuple[str, str]:
    """Training text and validation text, the last tenth of the characters."""
    end = len(text) * 9 // 10
    return text[:end], text[end:]


def batch(tokens: np.ndarray, batch_size: int, length: int, seed: int, step: int) -> np.ndarray:
    """Random windows of a text, a pure function of its arguments, so that a run resumes exactly.

    tokens: [N], N > length
    Returns int32 [B, T + 1]: inputs are `[:, :-1]`, targets `[:, 1:]`.
    """
    tokens = np.asarray(tokens)
    if len(tokens) <= length:
        raise ValueError(
            f"a window of {length} tokens and its target need {length + 1}, the text has"
            f" {len(tokens)}: take a longer text or a shorter sequence"
        )
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(len(tokens) - length, size=batch_size)  # [B]
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def windows(tokens: np.ndarray, length: int, bos: int = 1, stride: int | None = None) -> Windows:
    """Windows in which every token of a text is a target that counts exactly once.

    `bos` is fed before the first token, which has no other context. Each window starts `stride`
    after the one before, by default `length`: no overlap. With a smaller stride all windows but the
    first give `length - stride` tokens of context to every target that counts. The last window is
    moved back to end with the text. A text shorter than `length` is padded on the right with 0.

    tokens [5, 6, 7, 8, 9], length 3, stride 2, bos 1:

        inputs   1 5 6   6 7 8      targets  5 6 7   7 8 9      mask  1 1 1   0 1 1
    """
    tokens = np.asarray(tokens, np.int32)
    stride = length if stride is None else stride
    if not len(tokens):
        raise ValueError("the text to evaluate has no tokens: take a longer text")
    if not 1 <= stride <= length:
        raise ValueError(f"stride must be from 1 to the window's {length} tokens, not {stride}")
    ends = [length]  # of windows, in tokens of the text
    while ends[-1] < len(tokens):
        ends.append(min(ends[-1] + stride, len(tokens)))
    ends = np.array(ends)
    positions = ends[:, None] - length + np.arange(length)  # [W, T], of the targets
    counted = np.concatenate([[0], ends[:-1]])  # [W], targets that earlier windows count
    padded = np.zeros(1 + max(length, len(tokens)), np.int32)
    padded[0], padded[1 : 1 + len(tokens)] = bos, tokens
    mask = (positions >= counted[:, None]) & (positions < len(tokens))
    return Windows(padded[positions], padded[positions + 1], mask)


def batches(windows: Windows, size: int) -> list[Windows]:
    """The windows, so many at a time; the last ones with windows of zeros in which nothing counts,
    so that one shape compiles."""
    missing = -len(windows.mask) % size
    whole = [np.pad(array, [(0, missing), (0, 0)]) for array in windows]
    return [
        Windows(*(array[start : start + size] for array in whole))
        for start in range(0, len(whole[0]), size)
    ]
