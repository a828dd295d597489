"""Reading a submission: which exercise, whose, and which cells to run.  Nothing of it is executed here.

The invariant: any file at all gives a `Submission` or a `SubmissionError` with a sentence in it.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xenlab.errors import XenlabError

SIZE_LIMIT = 4 << 20


class SubmissionError(XenlabError):
    """A file that is no submission of an exercise."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A notebook that was handed in.

    Attributes:
        lesson: number of the exercise, like ``02``.
        student: the id in it, empty if there is none.
        cells: the sources of the code cells to run, in order, self-checks left out.
    """

    lesson: str
    student: str
    cells: tuple[str, ...]


def read_submission(path: Path) -> Submission:
    """Read the notebook at ``path``.

    The exercise stands in the metadata (``xenlab.lesson``), else in the file's name (``02-...``).
    The student's id stands in the metadata (``xenlab.student``), else in a cell ``student = "..."``.

    Raises:
        SubmissionError: it cannot be read, is no notebook, or does not say which exercise it is.
    """
    notebook = _load(path)
    ours = _dict(_dict(notebook.get("metadata")).get("xenlab"))
    lesson = str(ours.get("lesson") or "")
    if not lesson and (match := re.match(r"(\d\d)-", path.name)):
        lesson = match[1]
    if not lesson:
        raise SubmissionError(
            f"{path.name}: neither its metadata (xenlab.lesson) nor its name says which exercise it is"
        )
    cells = tuple(_source(cell) for cell in notebook["cells"] if _is_to_run(cell))
    return Submission(lesson, str(ours.get("student") or "") or _student_in(cells), cells)


def _load(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise SubmissionError(f"{path.name}: cannot be read: {problem.strerror}") from None
    if len(data) > SIZE_LIMIT:
        raise SubmissionError(
            f"{path.name}: {len(data)} bytes; a submission has at most {SIZE_LIMIT}: clear its outputs"
        )
    try:
        notebook = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise SubmissionError(f"{path.name}: expected a notebook in JSON, found something else ({problem})") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise SubmissionError(f"{path.name}: expected a notebook with a list of cells (nbformat 4), found none")
    return notebook


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_to_run(cell: Any) -> bool:
    """Code cells, except self-checks: their verdict counts for nothing here."""
    if not isinstance(cell, dict) or cell.get("cell_type") != "code":
        return False
    nbgrader = _dict(_dict(cell.get("metadata")).get("nbgrader"))
    return not nbgrader.get("grade")


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source")
    return "".join(map(str, source)) if isinstance(source, list) else str(source or "")


def _student_in(cells: tuple[str, ...]) -> str:
    for source in cells:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for statement in tree.body:
            if (name := _assigned_id(statement)) is not None:
                return name
    return ""


def _assigned_id(statement: ast.stmt) -> str | None:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Constant):
        return None
    named = any(isinstance(target, ast.Name) and target.id == "student" for target in statement.targets)
    return str(statement.value.value) if named else None
