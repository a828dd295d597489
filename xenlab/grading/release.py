"""From the instructor's notebooks to the students': solutions and hidden tests come out.

The problem: an exercise and its solution kept as two files drift apart.  So `solutions/` is the only
source, marked with nbgrader's markers, and `exercises/` is made from it.

The invariant: the cells are those that nbgrader's ``generate_assignment`` would make (a test compares
them), and the bytes follow from the source alone.  nbgrader itself is not needed for it.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from copy import deepcopy
from hashlib import md5
from pathlib import Path
from typing import Any

from xenlab.errors import XenlabError

Json = dict[str, Any]
_STUB = {"code": "# YOUR CODE HERE\nraise NotImplementedError()", "markdown": "YOUR ANSWER HERE"}
_SOLUTION, _HIDDEN = ("BEGIN SOLUTION", "END SOLUTION"), ("BEGIN HIDDEN TESTS", "END HIDDEN TESTS")
# A zip entry without a date of its own; the format begins in 1980.
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_BUNDLED = ("notebooks", "exercises", "xenlab")
_BUNDLED_FILES = ("pyproject.toml", "environment.yml", "README.md", "LICENSE")
_LEFT_OUT = ("__pycache__", ".ipynb_checkpoints", "hidden")


def release(solutions: Path, exercises: Path, *, bundle: Path | None = None) -> list[Path]:
    """Make each notebook of ``exercises`` from the one of the same name in ``solutions``.

    Args:
        solutions: folder of the sources.
        exercises: folder to write to; notebooks in it without a source are removed.
        bundle: folder for ``xenlab.zip``, the students' archive: lessons, exercises and package, without
            solutions and hidden checks.

    Returns:
        What was written.

    Raises:
        XenlabError: no sources, or one with markers that do not fit together.
    """
    sources = sorted(solutions.glob("*.ipynb"))
    if not sources:
        raise XenlabError(f"{solutions}: expected notebooks to release, found none")
    made = {exercises / source.name: released(source) for source in sources}
    exercises.mkdir(parents=True, exist_ok=True)
    for stale in set(exercises.glob("*.ipynb")) - set(made):
        stale.unlink()
    for path, text in made.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return [*made, *([_bundle(solutions.parent, exercises, bundle)] if bundle else [])]


def released(source: Path) -> str:
    """The text of the student's notebook for the instructor's at ``source``.  Raises XenlabError."""
    notebook = json.loads(source.read_text(encoding="utf-8"))
    cells = [_released_cell(cell, f"{source.name}, cell {number}") for number, cell in enumerate(notebook["cells"])]
    return as_text({**notebook, "cells": cells})


def as_text(notebook: Json) -> str:
    """A notebook's text as Jupyter writes it, with sorted keys."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _released_cell(cell: Json, place: str) -> Json:
    made = deepcopy(cell)
    if made["cell_type"] == "code":
        made.update(outputs=[], execution_count=None)
    nbgrader = made["metadata"].get("nbgrader", {})
    text = "".join(made["source"])
    text, solved = _without(text, _SOLUTION, place, _STUB.get(made["cell_type"], ""))
    if nbgrader.get("solution") and not solved:
        text = _STUB[made["cell_type"]]
    text, hidden = _without(text, _HIDDEN, place)
    if hidden and not nbgrader.get("grade"):
        raise XenlabError(f"{place}: {_HIDDEN[0]} in a cell that nbgrader does not grade")
    if solved and not nbgrader.get("solution"):
        raise XenlabError(f"{place}: {_SOLUTION[0]} in a cell that is not marked as a solution")
    made["source"] = text.splitlines(keepends=True)
    _lock(made, nbgrader, text)
    return made


def _without(text: str, markers: tuple[str, str], place: str, stub: str | None = None) -> tuple[str, bool]:
    """Text without the regions between the markers, each replaced by the stub; whether there was one."""
    begin, end = markers
    lines: list[str] = []
    inside = found = False
    for line in text.split("\n"):
        if begin in line:
            if inside:
                raise XenlabError(f"{place}: {begin} inside {begin}")
            inside = found = True
            indent = re.match(r"\s*", line)
            lines += [(indent[0] if indent else "") + part for part in stub.split("\n")] if stub is not None else []
        elif end in line:
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise XenlabError(f"{place}: {begin} without {end}")
    return "\n".join(lines), found


def _lock(cell: Json, nbgrader: Json, text: str) -> None:
    """What nbgrader writes into a cell that it knows: protection and checksum."""
    grade, solution, locked = (bool(nbgrader.get(name)) for name in ("grade", "solution", "locked"))
    if not (grade or solution or locked):
        return
    cell["metadata"]["deletable"] = False
    if not solution:
        cell["metadata"]["editable"] = False
    is_locked = not solution and (grade or locked)
    parts = [text, cell["cell_type"], str(grade), str(solution), str(is_locked), nbgrader["grade_id"]]
    parts += [str(float(nbgrader["points"]))] if grade else []
    nbgrader["checksum"] = md5("".join(parts).encode(), usedforsecurity=False).hexdigest()
    nbgrader["cell_type"] = cell["cell_type"]


def _bundle(root: Path, exercises: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "xenlab.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(_bundled(root, exercises)):
            entry = zipfile.ZipInfo(f"xenlab/{name}", _NO_DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())
    return path


def _bundled(root: Path, exercises: Path) -> Iterable[tuple[str, Path]]:
    for name in _BUNDLED:
        folder = exercises if name == "exercises" else root / name
        for file in folder.rglob("*"):
            if file.is_file() and not set(file.relative_to(folder).parts) & set(_LEFT_OUT):
                yield f"{name}/{file.relative_to(folder).as_posix()}", file
    for name in _BUNDLED_FILES:
        if (root / name).is_file():
            yield name, root / name
