"""Submissions made from the instructor's notebooks, and the judge."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xenlab.grading.judge import grade
from xenlab.grading.report import Report
from xenlab.grading.sandbox import Limits

# Test modules are imported by path, so helpers beside them have to be made findable.
sys.path.insert(0, str(Path(__file__).parent))

Submit = Callable[..., Path]
Grade = Callable[..., Report]


@pytest.fixture
def submit(repository: Path, tmp_path: Path) -> Submit:
    """``submit(number, answer=None, student="")``: a notebook with another answer cell than the solution's."""

    def make(number: str, answer: str | None = None, student: str = "") -> Path:
        (source,) = (repository / "solutions").glob(f"{number}-*.ipynb")
        notebook = json.loads(source.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["metadata"].get("nbgrader", {}).get("solution") and answer is not None:
                cell["source"] = answer
            if "".join(cell["source"]).startswith("student = "):
                cell["source"] = f"student = {student!r}"
        path = tmp_path / source.name
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return path

    return make


@pytest.fixture
def solution(repository: Path) -> Callable[[str], str]:
    """``solution(number)``: the instructor's answer cell."""

    def read(number: str) -> str:
        (source,) = (repository / "solutions").glob(f"{number}-*.ipynb")
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        (answer,) = (cell for cell in cells if cell["metadata"].get("nbgrader", {}).get("solution"))
        return "".join(answer["source"])

    return read


@pytest.fixture
def judged(submit: Submit) -> Grade:
    """``judged(number, answer=None, student="", limits=...)``: the report on such a notebook."""

    def run(number: str, answer: str | None = None, student: str = "", limits: Limits | None = None) -> Report:
        (report,) = grade([submit(number, answer, student)], limits=limits or Limits())
        return report

    return run
