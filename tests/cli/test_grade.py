"""``xenlab grade`` and ``xenlab release``: what they print and write.  What is judged is tested with grading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nbformat
from typer.testing import Result

Run = Callable[..., Result]


def test_json_is_a_list_with_an_object_each(xenlab: Run, tmp_path: Path) -> None:
    paths = [tmp_path / "one.ipynb", tmp_path / "two.ipynb"]
    paths[1].write_text("{", encoding="utf-8")
    result = xenlab("grade", *paths, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [report["submission"] for report in found] == [str(path) for path in paths]
    for report in found:
        assert sorted(report) == ["checks", "error", "lesson", "max_score", "score", "seed", "submission"]
        assert report["score"] == 0
        assert report["error"]


def test_text_names_each_submission(xenlab: Run, tmp_path: Path) -> None:
    paths = [tmp_path / "one.ipynb", tmp_path / "two.ipynb"]
    result = xenlab("grade", *paths)
    assert result.exit_code == 0
    assert all(f"{path}: " in result.stdout for path in paths)


def test_no_submission_is_2(xenlab: Run) -> None:
    assert xenlab("grade").exit_code == 2


def test_release_writes_exercises_without_solutions(xenlab: Run, clone: Path) -> None:
    source = "### BEGIN SOLUTION\nanswer = 42\n### END SOLUTION"
    cell = nbformat.v4.new_code_cell(source)
    cell.metadata["nbgrader"] = {
        "grade": False, "grade_id": "answer", "locked": False, "schema_version": 3, "solution": True, "task": False,
    }  # fmt: skip
    (clone / "solutions").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), clone / "solutions" / "00-first.ipynb")
    result = xenlab("release")
    assert result.exit_code == 0
    made = clone / "exercises" / "00-first.ipynb"
    assert result.stdout.strip() == str(made)
    text = made.read_text(encoding="utf-8")
    assert "answer = 42" not in text
    assert "YOUR CODE HERE" in text


def test_release_without_solutions_is_2(xenlab: Run, clone: Path) -> None:
    result = xenlab("release")
    assert result.exit_code == 2
    assert "solutions/" in result.stderr
