"""exercises/ is what release makes of solutions/, without a word of the solutions, as nbgrader would make it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from xenlab.errors import XenlabError
from xenlab.grading.release import as_text, release, released
from xenlab.grading.student_process import run_cells

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "solutions").glob("*.ipynb"))


def text_of(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def secret_lines(text: str) -> list[str]:
    """The lines between markers that are long enough to be somebody's work."""
    lines, inside = [], False
    for line in text.split("\n"):
        if "BEGIN SOLUTION" in line or "BEGIN HIDDEN" in line:
            inside = True
        elif "END SOLUTION" in line or "END HIDDEN" in line:
            inside = False
        elif inside and len(line.strip()) > 20:
            lines.append(line.strip())
    return lines


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem[:2])
def test_exercises_are_up_to_date(source: Path) -> None:
    exercise = ROOT / "exercises" / source.name
    assert exercise.read_bytes() == released(source).encode(), "run `xenlab release`"


def test_each_exercise_has_a_source() -> None:
    assert [path.name for path in sorted((ROOT / "exercises").glob("*.ipynb"))] == [path.name for path in SOURCES]
    assert len(SOURCES) >= 4


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem[:2])
def test_nothing_of_the_solution_is_left(source: Path) -> None:
    secrets = secret_lines(text_of(source))
    public = "\n".join(text_of(path) for path in (ROOT / "exercises").glob("*.ipynb"))
    assert len(secrets) >= 5
    # A line that the public text of the source has as well, like the sample guest's, is no secret.
    outside = text_of(source)
    leaked = [line for line in secrets if line in public and outside.count(line) == 1]
    assert not leaked
    for marker in ("BEGIN SOLUTION", "END SOLUTION", "HIDDEN TESTS"):
        assert marker not in public


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem[:2])
def test_points_in_the_notebook_are_those_of_grading(source: Path) -> None:
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    assert sum(cell["metadata"].get("nbgrader", {}).get("points", 0) for cell in cells) == 10


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem[:2])
def test_sources_are_written_as_release_writes(source: Path) -> None:
    assert source.read_bytes() == as_text(json.loads(source.read_bytes())).encode()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem[:2])
def test_every_cell_of_a_source_runs_and_writes_no_error(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    _, notes = run_cells(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    assert notes == []
    assert capsys.readouterr().err == ""


def test_release_is_repeatable_and_removes_what_has_no_source(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "99-old.ipynb").write_text("{}")
    first = {path.name: path.read_bytes() for path in release(ROOT / "solutions", tmp_path / "out")}
    second = {path.name: path.read_bytes() for path in release(ROOT / "solutions", tmp_path / "out")}
    assert first == second
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(first)


def test_bundle_has_neither_solutions_nor_hidden_checks(tmp_path: Path) -> None:
    *_, archive = release(ROOT / "solutions", tmp_path / "exercises", bundle=tmp_path / "one")
    *_, again = release(ROOT / "solutions", tmp_path / "exercises", bundle=tmp_path / "two")
    assert archive.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(archive) as bundle:
        names = bundle.namelist()
        everything = b"\n".join(map(bundle.read, names))
    assert "xenlab/exercises/02-the-emulation-of-a-privileged-instruction.ipynb" in names
    assert "xenlab/xenlab/__init__.py" in names
    assert not [name for name in names if "solutions" in name or "/hidden/" in name]
    assert b"def truth(" not in everything


def test_students_copy_says_that_it_cannot_grade(tmp_path: Path) -> None:
    *_, archive = release(ROOT / "solutions", tmp_path / "exercises", bundle=tmp_path)
    with zipfile.ZipFile(archive) as bundle:
        bundle.extractall(tmp_path)
    code = (
        "from xenlab.grading import exercise, grade\nprint(bool(exercise('01')))\n"
        "try: grade([])\nexcept Exception as reason: print(reason)"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "xenlab",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[0] == "True"
    assert "cannot grade" in run.stdout


@pytest.mark.parametrize(
    ("source", "nbgrader", "message"),
    [
        ("### BEGIN SOLUTION\n1", {"solution": True}, "without END SOLUTION"),
        ("### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION", {"solution": True}, "inside BEGIN SOLUTION"),
        ("### BEGIN SOLUTION\n1\n### END SOLUTION", {}, "not marked as a solution"),
        ("### BEGIN HIDDEN TESTS\n1\n### END HIDDEN TESTS", {}, "does not grade"),
    ],
)
def test_markers_that_do_not_fit_are_named(
    tmp_path: Path, source: str, nbgrader: dict[str, bool], message: str
) -> None:
    cell = {"cell_type": "code", "metadata": {"nbgrader": nbgrader}, "source": source}
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": [cell], "metadata": {}}))
    with pytest.raises(XenlabError, match=message):
        released(path)


def test_nothing_to_release_is_named(tmp_path: Path) -> None:
    with pytest.raises(XenlabError, match="found none"):
        release(tmp_path, tmp_path / "out")


# nbgrader's own limit for a cell is 30 s; ours say what they need.  It takes all points from a
# cell that writes to stderr, so a full score below also says that no self-check does.
CONFIG = """
c = get_config()
c.ExecutePreprocessor.timeout = 60
c.ClearSolutions.enforce_metadata = True
c.CourseDirectory.course_id = "xenlab"
"""
SCORES = """
import json
from nbgrader.api import Gradebook
with Gradebook("sqlite:///gradebook.db") as book:
    found = book.assignment_submissions("ps")
    print(json.dumps({f"{s.student.id}/{n.name[:2]}": n.score for s in found for n in s.notebooks}))
"""


class Course:
    """An nbgrader course in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "nbgrader_config.py").write_text(CONFIG)
        (folder / "source" / "ps").mkdir(parents=True)
        for source in SOURCES:
            shutil.copy(source, folder / "source" / "ps")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": search, "JUPYTER_NO_CONFIG": "1"}
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def nbgrader(self, *command: str) -> str:
        run = self.run("-m", "nbgrader", *command)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout + run.stderr

    def hand_in(self, student: str, notebooks: dict[str, str]) -> None:
        folder = self.folder / "submitted" / student / "ps"
        folder.mkdir(parents=True)
        for name, text in notebooks.items():
            (folder / name).write_text(text, encoding="utf-8")


def half_right(path: Path) -> str:
    """The solution of exercise 02 without CR4 and its MSR."""
    text = path.read_text(encoding="utf-8")
    return text.replace('if system[\\"ring\\"] != 1:', "if True:")


@pytest.mark.slow
def test_nbgrader_generates_validates_and_autogrades(tmp_path: Path) -> None:
    pytest.importorskip("nbgrader")
    course = Course(tmp_path)
    course.nbgrader("generate_assignment", "ps", "--create")
    made = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "release" / "ps").glob("*.ipynb")}
    ours = {path.name: released(path) for path in SOURCES}
    assert {name: json.loads(text) for name, text in made.items()} == {
        name: json.loads(text) for name, text in ours.items()
    }

    solved = {path.name: path.read_text(encoding="utf-8") for path in SOURCES}
    assert "passes all the tests" in course.nbgrader("validate", f"source/ps/{SOURCES[2].name}")
    assert "VALIDATION FAILED ON 4 CELL(S)" in course.nbgrader("validate", f"release/ps/{SOURCES[2].name}")

    course.hand_in("solved", solved)
    course.hand_in("empty", {name: ours[name] for name in (SOURCES[0].name, SOURCES[2].name)})
    course.hand_in("half", {SOURCES[2].name: half_right(SOURCES[2])})
    course.nbgrader("autograde", "ps", "--create")
    scores = json.loads(course.run("-c", SCORES).stdout)
    assert {key: score for key, score in scores.items() if key.startswith("solved")} == {
        f"solved/{path.name[:2]}": 10 for path in SOURCES
    }
    assert not any(score for key, score in scores.items() if key.startswith("empty"))
    assert 0 < scores["half/02"] < 10
