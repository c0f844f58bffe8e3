"""The notebooks run from the first cell to the last, and print what is kept in them.

Cells with the tag "varies" are run, but what they print is not compared: differences in the last
bits, and what many steps of training make of them. Pictures are never compared.
"""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes, with all outputs


def printed(cell) -> str:
    """What a cell prints, and the value of its last line."""
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    kinds = [o.get("name") == "stdout" or o.output_type == "execute_result" for o in cell.outputs]
    return "".join(part for part, kind in zip(parts, kinds, strict=True) if kind)


def executed(notebook, folder: Path):
    """The notebook, run in a fresh kernel that was started in a folder; errors of cells pass."""
    ours = {"XLA_FLAGS", "TERNARY_GROK_PATHS"}  # of conftest.py
    env = {name: value for name, value in os.environ.items() if name not in ours}
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=resources)
    return client.execute(env=env)


def check_printed(kept, found) -> None:
    """AssertionError for a cell that prints something else than what is kept."""
    for old, new in zip(kept.cells, found.cells, strict=True):
        if old.cell_type == "code" and "varies" not in old.metadata.get("tags", []):
            assert printed(new) == printed(old), old.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_kept_in_it(path):
    kept = nbformat.read(path, as_version=4)
    found = executed(nbformat.read(path, as_version=4), ROOT)
    check_printed(kept, found)


def notebook_of(*sources: str, **metadata):
    cells = [nbformat.v4.new_code_cell(source, metadata=metadata) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.slow
def test_modules_are_found_from_the_notebooks_folder_and_what_differs_is_seen():
    first = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    found = executed(notebook_of(first, "import files; print(files.__name__)"), NOTEBOOKS[0].parent)
    assert [printed(cell) for cell in found.cells] == ["", "files\n"]
    others = executed(notebook_of("", "print('other')"), ROOT)
    with pytest.raises(AssertionError, match="files"):
        check_printed(found, others)
    check_printed(notebook_of("", "print('again')", tags=["varies"]), others)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        executed(notebook_of("1 / 0"), ROOT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_complete_small_and_of_no_machine(path):
    assert path.stat().st_size <= LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
    for cell in code:
        assert not {"execution", "scrolled"} & set(cell.metadata)
        for output in cell.outputs:
            assert output.get("name") != "stderr", output
            shown = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert "/home/" not in shown and str(ROOT) not in shown and " at 0x" not in shown
