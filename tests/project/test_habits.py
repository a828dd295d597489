"""Habits of the repository: no junk, short files, clean notebooks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400
JUNK_PARTS = {
    "__pycache__",
    ".ipynb_checkpoints",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".venv",
}
JUNK_SUFFIXES = {".pyc", ".pyo", ".swp", ".orig", ".rej", ".log", ".db", ".tmp"}
NOTEBOOKS = sorted(p for folder in ("notebooks", "exercises", "solutions") for p in (ROOT / folder).rglob("*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]


def tracked_files() -> list[Path]:
    """Paths that git tracks, relative to the root. Skips the test in a copy without git."""
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if run.returncode != 0:
        pytest.skip("this copy is not a git clone")
    return [Path(name) for name in run.stdout.split("\0") if name]


def test_no_junk_is_tracked() -> None:
    junk = [path for path in tracked_files() if JUNK_PARTS & set(path.parts) or path.suffix in JUNK_SUFFIXES]
    assert not junk, f"tracked, but made by a tool: {sorted(map(str, junk))}"


def test_source_files_stay_short() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "xenlab").rglob("*.py")}
    assert lengths
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n >= MAX_LINES}
    assert not long, f"{MAX_LINES} lines or more; split by mechanism: {long}"


def notebook_faults(notebook: dict[str, Any], *, generated: bool) -> list[str]:
    """What must not be committed in a notebook. ``generated``: it comes from a source and carries no output at all."""
    faults = []
    if "widgets" in notebook["metadata"]:
        faults.append("metadata.widgets is there: saved widget state")
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        if generated and cell["outputs"]:
            faults.append(f"cell {number} has outputs")
        if generated and cell["execution_count"] is not None:
            faults.append(f"cell {number} has an execution count")
    return faults


def test_notebook_faults_are_seen() -> None:
    cell = {"cell_type": "code", "outputs": [{"output_type": "stream"}], "execution_count": 3}
    dirty = {"metadata": {"widgets": {}}, "cells": [cell]}
    assert len(notebook_faults(dirty, generated=False)) == 1
    assert len(notebook_faults(dirty, generated=True)) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_notebook_is_clean(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    generated = path.relative_to(ROOT).parts[0] in {"exercises", "solutions"}
    faults = notebook_faults(notebook, generated=generated)
    assert not faults, f"{path.relative_to(ROOT)}: {'; '.join(faults)}. Clear outputs and widget state, then save"
