"""Imports go one way, and importing starts nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"convert", "download", "evaluate", "run", "serve", "tokenizer", "train"}


def python(code: str) -> str:
    """What another Python prints, with nothing imported so far."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "module, unwanted",
    [
        ("kernels", {"data", "quantize", "haiku"}),
        ("download", {"jax", "checkpoint", "quantize"}),  # so that it starts at once
        ("checkpoint", {"haiku", "model"} | COMMANDS),
        ("engine", {"starlette", "uvicorn"} | COMMANDS - {"tokenizer"}),
        ("learning", {"checkpoint", "data", "runners", "tqdm"} | COMMANDS),
    ],
)
def test_what_a_module_does_not_import(module, unwanted):
    imported = python(f"import sys, {module}; print(*sys.modules)").split()
    assert module in imported and not unwanted & set(imported)


def test_importing_starts_nothing():
    python(
        "import checkpoint, model\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
