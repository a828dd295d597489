"""The linter, the formatter, the type checker and the layering of the rooms, as tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"
CHECKS = {
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy": ["-m", "mypy"],
    "lint-imports": ["-c", LINT_IMPORTS, "--no-cache"],
}


@pytest.mark.parametrize("name", CHECKS)
def test_check_passes(name: str, repository: Path) -> None:
    environment = {**os.environ, "PYTHONUTF8": "1", "NO_COLOR": "1"}
    run = subprocess.run(
        [sys.executable, *CHECKS[name]],
        cwd=repository,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 0, f"{name} found:\n{run.stdout}{run.stderr}"


def test_layers_contract_rejects_an_upward_import(repository: Path, tmp_path: Path) -> None:
    """The contract itself works: a copy of the rooms in which the machine imports the command line is refused."""
    package = tmp_path / "xenlab"
    for source in (repository / "xenlab").rglob("*.py"):
        copy = package / source.relative_to(repository / "xenlab")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    (package / "machine" / "__init__.py").write_text("import xenlab.cli\n", encoding="utf-8")
    settings = tmp_path / "pyproject.toml"
    settings.write_bytes((repository / "pyproject.toml").read_bytes())
    run = subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS, "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1", "NO_COLOR": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 1
    assert "xenlab.machine is not allowed to import xenlab.cli" in run.stdout
