"""``xenlab doctor`` and the command line as a whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import Result

from xenlab.cli import doctor

Run = Callable[..., Result]
Write = Callable[..., Path]

HELP = """
import sys
from xenlab.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"unicorn", "capstone", "numpy", "plotly", "ipywidgets", "nbclient", "jupyterlab", "ziglang", "elftools"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """xenlab's own metadata, whether or not it is installed here."""
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=3.11"})
    monkeypatch.setattr(metadata, "requires", lambda name: ["rich>=14,<16", 'pytest>=9; extra == "test"'])


def test_a_whole_installation_is_0(xenlab: Run, write_lesson: Write, installed: None) -> None:
    write_lesson("00-first", "1")
    result = xenlab("doctor")
    assert result.exit_code == 0, result.stdout
    assert "MISSING" not in result.stdout
    for subject in ("Python", "rich", "Unicorn's probes", "assembler", "widgets in JupyterLab", "lessons"):
        assert f"ok      {subject}: " in result.stdout


def test_missing_lessons_are_1_with_advice(xenlab: Run, clone: Path, installed: None) -> None:
    result = xenlab("doctor")
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("MISSING")]
    assert "no lessons" in line


def test_old_and_absent_packages_are_missing(monkeypatch: pytest.MonkeyPatch, installed: None) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "13.9")
    (line,) = [finding.line() for finding in doctor.dependencies() if finding.subject == "rich"]
    assert line.startswith("MISSING rich: 13.9. rich>=14,<16 is needed")

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    (line,) = [finding.line() for finding in doctor.dependencies() if finding.subject == "rich"]
    assert line.startswith("MISSING rich: not installed. Run: ")


def test_extras_are_not_asked_for(installed: None) -> None:
    assert [finding.subject for finding in doctor.dependencies()] == ["Python", "rich"]


@pytest.mark.parametrize(("system", "limits"), [("linux", "limits on time and memory"), ("win32", "a time limit")])
def test_grading_is_a_note_that_promises_no_sandbox(monkeypatch: pytest.MonkeyPatch, system: str, limits: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    finding = doctor.sandbox()
    assert finding.verdict == "note"
    assert f"a process of its own with {limits}. Results are marked untrusted" in finding.line()
    assert "not used yet" in finding.line()


def test_a_broken_package_is_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch, installed: None) -> None:
    def broken() -> doctor.Finding:
        raise ImportError("libunicorn.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "unicorn_layout", broken)
    lines = [finding.line() for finding in doctor.examine()]
    assert any(line.startswith("MISSING broken: ImportError: libunicorn.so") for line in lines)


@pytest.mark.parametrize("command", [[], ["boot"], ["bench"], ["lab"]])
def test_help_loads_nothing_heavy(command: list[str], repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HELP, *command, "--help"],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout


def test_wrong_usage_is_2(xenlab: Run) -> None:
    assert xenlab("boot").exit_code == 2
    assert xenlab("nonsense").exit_code == 2
