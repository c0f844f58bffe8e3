import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub import Hub, point_to
from huggingface_hub.utils import close_session

import data
import download
import files

ROOT = Path(__file__).parent.parent
NAMES = [f"tensor{i:05d}_000" for i in range(3)]
SIZES = 9_001, 120_011, 50_021
LARGE = "ckpt-0/tensor00001_000"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The release in small, and huggingface_hub pointed to it whatever the environment says."""
    folder = tmp_path / "published"
    (folder / "ckpt-0").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for name, size in zip(NAMES, SIZES, strict=True):
        (folder / "ckpt-0" / name).write_bytes(rng.bytes(size))
    (folder / "README.md").write_text("a card")
    (folder / "other").mkdir()
    (folder / "other" / NAMES[0]).write_text("not a tensor")
    with Hub(folder) as hub:
        point_to(hub.url, monkeypatch)
        yield hub
    close_session()


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, noted in place of waiting."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def published(hub):
    return {name: content for name, content in contents(hub.folder).items() if "ckpt-0" in name}


def test_release_is_all_of_ckpt_0_and_nothing_else(hub, tmp_path, capsys):
    download.release(tmp_path / "own", NAMES)
    assert contents(tmp_path / "own") == published(hub)
    assert "179k/179k" in capsys.readouterr().err  # the bar
    asked = [request for request in hub.requests if request.path.startswith("/store/")]
    assert [request.range for request in asked] == [None] * 3
    assert {request.token for request in asked} == {None}  # the store is another host
    assert "Bearer secret" in {request.token for request in hub.requests}


def test_release_keeps_what_is_whole(hub, tmp_path):
    download.release(tmp_path, NAMES)
    before = len(hub.requests)
    download.release(tmp_path, NAMES)
    assert [request.path for request in hub.requests[before:]] == [
        "/api/models/xai-org/grok-1/revision/main"
    ]


def test_release_names_a_file_that_the_hub_has_not(hub, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"xai-org/grok-1 at .* main has 5 files but not ckpt-0/tensor00003_000 \(1 of 4 abs",
    ):
        download.release(tmp_path / "own", [*NAMES, "tensor00003_000"])
    assert not (tmp_path / "own").exists()


def test_release_goes_on_where_the_connection_broke(hub, tmp_path, pauses):
    own = tmp_path / "own"
    hub.cut[LARGE] = 50_021
    with pytest.raises(OSError, match=r"^cannot fetch .*tensor00001_000: peer closed .*same comma"):
        download.release(own, NAMES)
    assert len(pauses) <= 10
    part = own / "ckpt-0" / "partial.tensor00001_000"
    assert part.read_bytes() == published(hub)[LARGE][:50_021]
    assert LARGE not in contents(own)
    for name in {*NAMES} - {path.name for path in own.rglob("tensor*")} - {Path(LARGE).name}:
        download.tensor(own, name)  # whatever came too late before the break
    hub.cut.clear()
    hub.requests.clear()
    download.release(own, NAMES)
    assert contents(own) == published(hub)
    assert hub.ranges(LARGE) == ["bytes=50021-"]
    assert sum(request.path.startswith("/store/") for request in hub.requests) == 1


def test_tensor_outlives_one_break(hub, tmp_path, pauses):
    hub.cut_once[LARGE] = 20_015
    path = download.tensor(tmp_path, NAMES[1])
    assert path.read_bytes() == published(hub)[LARGE]
    assert hub.ranges(LARGE) == [None, "bytes=20015-"]


def test_tensor_outlives_a_reset(hub, tmp_path, pauses):
    hub.reset[LARGE] = 20_015
    path = download.tensor(tmp_path, NAMES[1])
    assert path.read_bytes() == published(hub)[LARGE]
    assert hub.ranges(LARGE) == [None, "bytes=20015-"]


def test_the_first_error_ends_the_other_downloads(monkeypatch):
    begun, ended = [], []

    def fetch(file, advance):
        begun.append(file)
        if file == 0:
            while 1 not in begun:
                time.sleep(0.01)
            raise OSError("broken")
        for _ in range(100):
            time.sleep(0.01)
            advance(1)
        ended.append(file)

    monkeypatch.setattr(download, "_fetch", fetch)
    with pytest.raises(OSError, match="broken"):
        download._fetch_all(range(100), lambda count: None)
    assert not ended and len(begun) <= download.WORKERS + 1


def test_release_goes_on_after_a_kill(hub, tmp_path):
    own = tmp_path / "own"
    hub.stall[LARGE] = 40_031
    code = f"import download; download.release({str(own)!r}, {NAMES})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **hub.environment}
    )
    part = own / "ckpt-0" / "partial.tensor00001_000"
    expected = {f"ckpt-0/{part.name}", *published(hub)} - {LARGE}
    deadline = time.monotonic() + 30
    while not (own.exists() and set(contents(own)) == expected and part.stat().st_size > 9_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    size = part.stat().st_size
    hub.stall.clear()
    hub.requests.clear()
    download.release(own, NAMES)
    assert contents(own) == published(hub)
    assert hub.ranges(LARGE) == [f"bytes={size}-"]
    assert sum(request.path.startswith("/store/") for request in hub.requests) == 1


def test_tensor_fetches_one_file_once(hub, tmp_path):
    for _ in range(2):
        path = download.tensor(tmp_path / "own", NAMES[2])
        assert path == tmp_path / "own" / "ckpt-0" / NAMES[2]
        assert contents(tmp_path / "own") == {f"ckpt-0/{NAMES[2]}": path.read_bytes()}
    assert path.read_bytes() == published(hub)[f"ckpt-0/{NAMES[2]}"]
    assert hub.ranges(f"ckpt-0/{NAMES[2]}") == [None]


def test_tensor_of_a_file_in_git(hub, tmp_path):
    hub.plain.add(LARGE)
    assert download.tensor(tmp_path / "own", NAMES[1]).read_bytes() == published(hub)[LARGE]


def test_tensor_says_that_the_hub_has_no_such_file(hub, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cannot find ckpt-0/tensor00009_000 in .*; give a"
    ):
        download.tensor(tmp_path / "own", "tensor00009_000")
    with pytest.raises(FileNotFoundError, match=r"cannot list xai-org/grok-2: 404 .*; give a"):
        download.release(tmp_path / "own", NAMES, repo="xai-org/grok-2")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("length", [30_021, SIZES[1], SIZES[1] + 1])
def test_tensor_drops_a_part_of_something_else(hub, tmp_path, length):
    part = tmp_path / "own" / "ckpt-0" / "partial.tensor00001_000"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(length))
    with pytest.raises(ValueError, match=rf"gave {max(length, SIZES[1])} bytes with sum .* run"):
        download.tensor(tmp_path / "own", NAMES[1])
    assert not contents(tmp_path / "own")
    assert download.tensor(tmp_path / "own", NAMES[1]).read_bytes() == published(hub)[LARGE]


def test_tensor_leaves_a_file_of_another_size_alone(hub, tmp_path):
    path = tmp_path / "ckpt-0" / NAMES[1]
    path.parent.mkdir()
    path.write_bytes(b"mine")
    for fetch in (
        lambda: download.tensor(tmp_path, NAMES[1]),
        lambda: download.release(tmp_path, NAMES),
    ):
        with pytest.raises(ValueError, match=rf"has 4 bytes, the hub's has {SIZES[1]}: remove it"):
            fetch()
    assert contents(tmp_path / "ckpt-0") == {NAMES[1]: b"mine"}


def test_a_full_disk_is_noticed_first(hub, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 99_000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"has 99,000 bytes free, 179,033 are missing: make room"):
        download.release(tmp_path / "own", NAMES)
    assert not contents(tmp_path / "own")


def test_an_unreachable_hub_is_one_line_soon(tmp_path, monkeypatch, pauses):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)
    with pytest.raises(OSError, match=r"^cannot list xai-org/grok-1: [^\n]*; run the same comm"):
        download.release(tmp_path / "own", NAMES)
    assert sum(pauses) == 0
    with pytest.raises(OSError, match=r"^cannot find ckpt-0/tensor00000_000 [^\n]*; run the same"):
        download.tensor(tmp_path / "own", NAMES[0])
    assert 0 < sum(pauses) < 30
    assert not (tmp_path / "own").exists()


def test_a_silent_hub_is_one_line_soon(tmp_path, monkeypatch, pauses):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects and never answers
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        with pytest.raises(OSError, match=r"^cannot list xai-org/grok-1: timed out; run the same"):
            download.release(tmp_path, NAMES)
        with pytest.raises(OSError, match=r"^cannot find ckpt-0/tensor00000_000 .*: timed out; r"):
            download.tensor(tmp_path, NAMES[0])
    assert 0 < sum(pauses) < 30


def test_something_else_than_a_hub_is_refused(hub, tmp_path, monkeypatch):
    point_to(f"{hub.url}/store/README.md?", monkeypatch)  # answers all alike, as a login page does
    with pytest.raises(OSError, match=r"does not answer like the hub"):
        download.tensor(tmp_path / "own", NAMES[0])
    with pytest.raises(OSError, match=r"^cannot list xai-org/grok-1: .* like the hub: JSON"):
        download.release(tmp_path / "own", NAMES)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for fetch in (download.tensor, download.release):
        with pytest.raises(ValueError, match=r"pip install huggingface_hub==") as error:
            fetch(tmp_path, NAMES[0])
    required = (ROOT / "requirements.txt").read_text().split()
    assert re.search(r"huggingface_hub==\S+", str(error.value))[0] in required


# --- Servers that lie -----------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch):
    """A server that sends too little is given up soon."""
    monkeypatch.setattr(data, "STALL", 0.3)
    monkeypatch.setattr(download, "PATIENCE", 0.3)


def test_no_more_is_written_than_the_hub_told(hub, tmp_path):
    hub.endless.add(LARGE)
    path = download.tensor(tmp_path / "own", NAMES[1])
    assert path.read_bytes() == published(hub)[LARGE]
    hub.endless.clear()
    hub.endless.add("*")  # a redirect, whose body has no end
    assert download.tensor(tmp_path / "own", NAMES[2]).stat().st_size == SIZES[2]
    with pytest.raises(FileNotFoundError, match=r"cannot list xai-org/grok-2: 404"):
        download.release(tmp_path / "own", NAMES, repo="xai-org/grok-2")


def test_a_listing_without_an_end(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LISTING", 10_000)
    hub.listing = bytes(10_001)
    with pytest.raises(OSError, match=r"cannot list xai-org/grok-1: .* more than 10,000 bytes"):
        download.release(tmp_path / "own", NAMES)


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize("file", ["*", LARGE])
def test_a_byte_now_and_then_is_not_enough(hub, tmp_path, soon, where, file):
    hub.drip[file] = where
    few = r"fewer than 30,000 bytes came in 0.3 seconds; run the same command again: it goes on"
    with pytest.raises(OSError, match=few):
        download.release(tmp_path / "own", NAMES)
    if (file, where) != ("*", "body"):  # a HEAD has none
        with pytest.raises(OSError, match=few):
            download.tensor(tmp_path / "own", NAMES[1])
    hub.drip.clear()
    download.release(tmp_path / "own", NAMES)
    assert contents(tmp_path / "own") == published(hub)


def test_a_connection_that_always_breaks_is_given_up(hub, tmp_path, pauses, monkeypatch):
    """Even if each brings something."""
    hub.cut.update({LARGE: 20_000})
    append = download._append

    def a_little_more(*arguments):
        hub.cut[LARGE] += 100
        append(*arguments)

    monkeypatch.setattr(download, "_append", a_little_more)
    with pytest.raises(OSError, match=r"^cannot fetch .*; run the same command again"):
        download.tensor(tmp_path / "own", NAMES[1])
    assert len(hub.ranges(LARGE)) == download.TRIES


@pytest.mark.parametrize("file", ["*", LARGE])
def test_what_is_compressed_is_refused(hub, tmp_path, file):
    hub.encoding[file] = "gzip"
    with pytest.raises(OSError, match=r"sent with Content-Encoding 'gzip', not as it is"):
        download.release(tmp_path / "own", NAMES)


def test_another_range_than_the_one_asked_for(hub, tmp_path, monkeypatch):
    part = tmp_path / "own" / "ckpt-0" / "partial.tensor00001_000"
    part.parent.mkdir(parents=True)
    part.write_bytes(published(hub)[LARGE][:1000])
    monkeypatch.setattr(hub.server.RequestHandlerClass, "shift", 1)
    with pytest.raises(OSError, match=r"asked for what follows 1000 bytes, found 'bytes 1001-"):
        download.tensor(tmp_path / "own", NAMES[1])


def listing(hub, **changes):
    """The real listing, but for what it says of LARGE."""
    siblings = []
    for name, content in published(hub).items():
        about = {"size": len(content), "lfs": {"sha256": hashlib.sha256(content).hexdigest()}}
        siblings.append({"rfilename": name, **about, **(changes if name == LARGE else {})})
    return json.dumps({"sha": "7" * 40, "siblings": siblings}).encode()


@pytest.mark.parametrize(
    "changes",
    [{"size": None}, {"size": "7"}, {"size": 7.5}, {"size": -1}, {"size": [1]}]
    + [{"lfs": lfs} for lfs in (None, {}, {"sha256": None}, {"sha256": "7" * 63}, ["sha256"], 5)],
)
def test_a_size_or_a_sum_that_is_none(hub, tmp_path, changes):
    hub.listing = listing(hub)
    download.release(tmp_path / "own", NAMES)  # the listing without the changes is fine
    hub.listing = listing(hub, **changes)
    with pytest.raises(ValueError, match=r"says of .*tensor00001_000 that its size is .* revision"):
        download.release(tmp_path / "other", NAMES)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "content",
    [b"[]", b"7", b"null", b"{}", b'{"sha": "7", "siblings": null}', b"[" * 100_000]
    + [b'{"sha": "7", "siblings": [%s]}' % entry for entry in (b"null", b"{}", b'"x"', b"[]")]
    + [b'{"sha": null, "siblings": []}', b'{"sha": "7", "siblings": [{"rfilename": []}]}', b"\xff"],
)
def test_a_listing_that_is_none(hub, tmp_path, content):
    hub.listing = content
    with pytest.raises(OSError, match=r"^cannot list .* does not answer like the hub: [^\n]*; run"):
        download.release(tmp_path / "own", NAMES)


def test_names_that_nobody_asked_for_are_not_fetched(hub, tmp_path):
    entries = json.loads(listing(hub))
    entries["siblings"] += [{"rfilename": None}, {"rfilename": "ckpt-0/../evil", "size": "7"}]
    hub.listing = json.dumps(entries).encode()
    (hub.folder / "ckpt-0" / "extra").write_text("large")
    download.release(tmp_path / "own", NAMES[:2])
    assert set(contents(tmp_path / "own")) == {f"ckpt-0/{name}" for name in NAMES[:2]}


def test_a_file_in_git_has_gits_sum(hub, tmp_path):
    """Which is not its sha256, and not nothing."""
    hub.plain.add(LARGE)
    download.release(tmp_path / "own", NAMES)
    assert contents(tmp_path / "own") == published(hub)
    part = tmp_path / "other" / "ckpt-0" / "partial.tensor00001_000"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(SIZES[1]))
    with pytest.raises(ValueError, match=rf"gave {SIZES[1]} bytes with sum [0-9a-f]{{40}}, exp"):
        download.tensor(tmp_path / "other", NAMES[1])


def test_jax_is_not_needed():
    code = "import sys, download; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- The tokenizer --------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A published tokenizer and, in place of the real sum, its own."""
    path = tmp_path / "published.model"
    path.write_bytes(b"pieces")
    monkeypatch.setattr(download, "TOKENIZER", path.as_uri())
    monkeypatch.setattr(download, "GROK_1_SHA256", hashlib.sha256(b"pieces").hexdigest())
    return path


def test_tokenizer_is_fetched_once(model, tmp_path):
    path = download.tokenizer(tmp_path / "own")
    assert contents(tmp_path / "own") == {"tokenizer.model": b"pieces"}
    model.unlink()
    assert download.tokenizer(tmp_path / "own") == path


def test_tokenizer_refuses_other_bytes(model, tmp_path):
    model.write_bytes(b"moved")
    with pytest.raises(ValueError, match=r"gave 5 bytes with sha256 .*: run .* or download it by"):
        download.tokenizer(tmp_path / "own")
    model.unlink()
    with pytest.raises(OSError, match=r"cannot fetch tokenizer from file:.*: run the same command"):
        download.tokenizer(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_tokenizer_leaves_another_one_alone(model, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"mine")
    digest = files.sha256(path)
    with pytest.raises(ValueError, match=rf"not Grok-1's .* sha256 {digest}, .*move it away"):
        download.tokenizer(tmp_path)
    assert path.read_bytes() == b"mine"
