import concurrent.futures
import contextlib
import hashlib
import socket
import threading

import numpy as np
import pytest

import data
import files

TEXT = "Speak, speak.\r\nFirst Citizen:\n\tYou are all résolved?\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A known name whose text is a local file; the cache is a new folder."""
    path = tmp_path / "published.txt"
    path.write_bytes(TEXT.encode())
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    monkeypatch.setattr(data, "SOURCES", {"speech": (path.as_uri(), digest)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_load_text_reads_a_file_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    assert data.load_text(path) == data.load_text(str(path)) == TEXT


def test_load_text_names_what_it_knows_for_a_path_that_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt; give a path, or .*tinyshakespeare"):
        data.load_text(tmp_path / "absent.txt")


def test_load_text_refuses_other_encodings(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("abcé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        data.load_text(path)


def test_fetch_keeps_a_copy(source):
    assert data.load_text("speech") == TEXT
    source.unlink()
    assert data.load_text("speech") == TEXT
    assert [path.name for path in files.cache_folder().iterdir()] == ["speech.txt"]


def test_fetch_replaces_a_damaged_copy(source):
    path = data.fetch("speech")
    path.write_bytes(TEXT.encode()[:-1])
    assert data.load_text("speech") == TEXT


def test_fetch_refuses_other_bytes(source):
    source.write_bytes(b"moved")
    with pytest.raises(ValueError, match=r"gave 5 bytes with sha256 .*download it by hand"):
        data.load_text("speech")
    assert not files.cache_folder().exists()


def test_fetch_says_where_it_tried_and_what_to_do(source):
    source.unlink()
    with pytest.raises(OSError, match=r"cannot fetch speech from file:.*cache.*speech\.txt.*path"):
        data.load_text("speech")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server whose answer is what it is given: a function of a socket's file."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/speech"
        monkeypatch.setattr(data, "SOURCES", {"speech": (address, "0" * 64)})
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

        def answers(send):
            def serve():
                with contextlib.suppress(OSError), listening.accept()[0] as connection:
                    connection.recv(10_000)
                    send(connection)

            threading.Thread(target=serve, daemon=True).start()

        yield answers


def endless(connection):
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(1 << 16))


def endless_redirect(connection):
    connection.sendall(b"HTTP/1.0 302 Found\r\nLocation: /other\r\n\r\n")
    while True:
        connection.sendall(bytes(1 << 16))


def slow(start):
    def send(connection):
        connection.sendall(b"HTTP/1.0 200 OK\r\n" + start)
        while True:
            connection.sendall(b"0")
            threading.Event().wait(0.02)  # time.sleep is what other tests put something else for

    return send


def test_fetch_bounds_what_it_reads(server, monkeypatch):
    monkeypatch.setattr(data, "LARGEST", 100_000)
    server(endless)
    with pytest.raises(ValueError, match=r"sends more than 100,000 bytes: download it by hand"):
        data.load_text("speech")
    server(endless_redirect)
    with pytest.raises(OSError, match=r"cannot fetch speech .* 302: Found"):
        data.load_text("speech")


@pytest.mark.parametrize("start", [b"X-Slow: ", b"\r\n", b"Content-Encoding: gzip\r\n\r\n"])
def test_fetch_gives_up_when_too_little_comes(server, monkeypatch, start):
    monkeypatch.setattr(data, "STALL", 0.3)
    server(slow(start))
    with pytest.raises(OSError, match=r"fewer than 30,000 bytes came in 0.3 sec.*; .* by hand"):
        data.load_text("speech")


def test_what_was_given_up_stops_itself(monkeypatch):
    monkeypatch.setattr(data, "STALL", 0.1)
    go, stopped = threading.Event(), threading.Event()

    def work(advance):
        go.wait()
        try:
            advance(1)
        except concurrent.futures.CancelledError:
            stopped.set()

    with pytest.raises(TimeoutError):
        data.watched(work)
    go.set()
    assert stopped.wait(10)


def test_cache_folder_is_under_home_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder().parent == tmp_path / ".cache"


def test_split_validates_on_the_last_tenth():
    assert data.split("0123456789" * 2 + "x") == ("012345678901234567", "89x")


def test_batch_is_windows_of_the_text():
    tokens = np.arange(100, 131)
    batch = data.batch(tokens, batch_size=5, length=7, seed=3, step=11)
    assert batch.shape == (5, 8) and batch.dtype == np.int32
    np.testing.assert_array_equal(np.diff(batch), 1)  # neighbours in the text


def test_batch_is_a_function_of_seed_and_step():
    def draw(seed, step):
        return data.batch(np.arange(10_007), 5, 7, seed, step)

    np.testing.assert_array_equal(draw(3, 11), draw(3, 11))
    assert not np.array_equal(draw(3, 11), draw(3, 12))
    assert not np.array_equal(draw(3, 11), draw(4, 11))
    assert not np.array_equal(draw(3, 11), draw(11, 3))


def test_batch_reaches_every_window():
    batch = data.batch(np.arange(13), batch_size=500, length=7, seed=0, step=0)
    assert set(batch[:, 0]) == set(range(6))  # the last window is 5 to 12


def test_batch_of_the_shortest_text():
    np.testing.assert_array_equal(data.batch(np.arange(8), 2, 7, 0, 0), [range(8)] * 2)
    with pytest.raises(ValueError, match=r"of 7 tokens and its target need 8, the text has 7"):
        data.batch(np.arange(7), 2, 7, 0, 0)


def test_windows_example():
    found = data.windows([5, 6, 7, 8, 9], length=3, stride=2)
    np.testing.assert_array_equal(found.inputs, [[1, 5, 6], [6, 7, 8]])
    np.testing.assert_array_equal(found.targets, [[5, 6, 7], [7, 8, 9]])
    np.testing.assert_array_equal(found.mask, [[1, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize("count", [1, 6, 7, 8, 13, 14, 15, 101])
@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_windows_count_every_token_once_with_its_context(count, stride):
    tokens = np.arange(50, 50 + count)
    inputs, targets, mask = data.windows(tokens, 7, bos=2, stride=stride)
    assert inputs.shape == targets.shape == mask.shape == (len(inputs), 7)
    assert inputs.dtype == targets.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(targets[mask], tokens)
    np.testing.assert_array_equal(inputs[mask], [2, *tokens[:-1]])
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert mask[1:, : 7 - (stride or 7)].sum() == 0  # context only


def test_windows_pad_a_short_text_on_the_right():
    found = data.windows([5, 6], length=4)
    np.testing.assert_array_equal(found.inputs, [[1, 5, 6, 0]])
    np.testing.assert_array_equal(found.targets, [[5, 6, 0, 0]])
    np.testing.assert_array_equal(found.mask, [[1, 1, 0, 0]])


def test_batches_are_all_windows_in_order():
    windows = data.windows(np.arange(5, 26), length=3)
    first, second = data.batches(windows, 4)
    assert first.inputs.shape == second.inputs.shape == (4, 3)
    for all_of_it, *parts in zip(windows, first, second, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts)[:7], all_of_it)
        assert not parts[1][3].any()


def test_windows_refuse_nothing_and_gaps():
    with pytest.raises(ValueError, match="has no tokens"):
        data.windows([], 7)
    for stride in (0, 8):
        with pytest.raises(
            ValueError, match=rf"stride must be from 1 to .* 7 tokens, not {stride}"
        ):
            data.windows([5], 7, stride=stride)
