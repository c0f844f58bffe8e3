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
