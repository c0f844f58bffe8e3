"""Files that are whole or not there, whatever stops the process that writes them."""

import multiprocessing
import os

import pytest

import files


@pytest.fixture
def folders(tmp_path):
    """An old folder, and a complete new one to take its place."""
    old, new = tmp_path / "run", tmp_path / "run.part"
    for folder, content in ((old, b"old"), (new, b"new")):
        folder.mkdir()
        (folder / "weights").write_bytes(content)
    return old, new


def test_a_folder_takes_the_place_of_an_old_one(folders):
    old, new = folders
    files.replace_folder(new, old)
    assert (old / "weights").read_bytes() == b"new"
    assert [path.name for path in old.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("call, left", [(1, b"old"), (2, b"old"), (3, b"new")])
def test_a_stopped_replacement_loses_neither_folder(folders, monkeypatch, call, left):
    """Stopped before the first rename, before the second, and before the old one is removed."""
    old, new = folders
    calls = []

    def stop_at(f):
        def counted(*args, **kwargs):
            calls.append(f)
            if len(calls) == call:
                raise KeyboardInterrupt
            return f(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(type(old), "rename", stop_at(type(old).rename))
        rmtree = files.shutil.rmtree
        end = stop_at(rmtree) if call == 3 else rmtree
        patch.setattr(
            files.shutil, "rmtree", lambda p, **k: end(p, **k) if p.exists() else rmtree(p, **k)
        )
        with pytest.raises(KeyboardInterrupt):
            files.replace_folder(new, old)
    files.recover(old)
    assert (old / "weights").read_bytes() == left
    if left == b"old":
        assert (new / "weights").read_bytes() == b"new"
        files.replace_folder(new, old)
        assert (old / "weights").read_bytes() == b"new"


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "settings.json"
    files.write_json(path, {"seed": 1})
    with pytest.raises(OSError, match="full"), files.replacing(path) as part:
        part.write_bytes(b"half")
        raise OSError("full")
    assert files.read_json(path) == {"seed": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "sync", lambda path: done.append(("sync", path.name)))
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (done.append(("rename", b.name)), replace(a, b))
    )
    files.write_bytes(tmp_path / "a", b"1")
    assert done == [("sync", "a.part"), ("rename", "a"), ("sync", tmp_path.name)]
    files.write_bytes(tmp_path / "a", b"1")  # the same again: not touched
    assert len(done) == 3


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00"])
def test_json_that_is_no_object(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(files.CheckpointError, match=r"config.json: (not JSON|expected a JSON ob)"):
        files.read_json(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ('["' + "x" * 1000 + '"]', "expected a JSON object, found .{90,130}; correct it$"),
        ('["\\u001b]0;"]', r"found \['\\x1b\]0;'\]"),
        ("[" * 500 + "]" * 500, r"found \[\[\[\[\.\.\.\]\]\]\]; correct"),
    ],
)
def test_what_json_may_not_say_and_how_it_is_shown(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(files.CheckpointError, match=f"{path}: .*{message}"):
        files.read_json(path)


def test_json_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 100)
    (tmp_path / "a").write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(files.CheckpointError, match="a: more than 100 bytes of JSON"):
        files.read_json(tmp_path / "a")


@pytest.mark.parametrize("read", [files.read_json, files.sha256, files.open_file])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(files.CheckpointError, match="pipe: a folder, pipe or device, expected a f"):
        read(tmp_path / "pipe")
    with pytest.raises(files.CheckpointError, match="nothing: missing; copy it again"):
        read(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(files.CheckpointError, match="loop: cannot be read: Too many levels"):
        read(tmp_path / "loop")


def test_a_full_disk_names_the_file_and_the_cure(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match=f"{tmp_path}/a: cannot be written: No space left.*make room"):
        files.write_bytes(tmp_path / "a", b"1")


def _locked(folder):
    try:
        with files.lock(folder):
            return "mine"
    except files.CheckpointError as error:
        return str(error)


def test_one_process_holds_a_folder(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with files.lock(tmp_path):
            assert "another process is writing it" in pool.apply(_locked, [tmp_path])
        assert pool.apply(_locked, [tmp_path]) == "mine"
