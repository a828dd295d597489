"""README and ARCHITECTURE.md say what is true: the commands and the paths in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

COMMANDS = {
    "bash": (
        "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/xenlab lab",
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest',
    ),
    "powershell": (
        r"py -m venv .venv; .venv\Scripts\pip install -e .; .venv\Scripts\xenlab lab",
        r'py -m venv .venv; .venv\Scripts\pip install -e ".[test]"; .venv\Scripts\python -m pytest',
    ),
}
COLUMNS = ["paper section", "file", "lesson", "exercise", "test"]


@pytest.mark.parametrize("shell", COMMANDS)
def test_readme_shows_both_commands(shell: str, repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{shell}\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).splitlines()
    missing = [command for command in COMMANDS[shell] if command not in lines]
    assert not missing, f"not in a ```{shell} block of README.md, each on one line: {missing}"


def test_ci_ends_with_the_readme_test_command(repository: Path) -> None:
    script = (repository / ".ci" / "run").read_text(encoding="utf-8")
    assert script.splitlines()[-1] == COMMANDS["bash"][1]


def architecture_rows(repository: Path) -> list[list[str]]:
    """The rows below the header whose cells are COLUMNS."""
    rows: list[list[str]] = []
    inside = False
    for line in (repository / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if [cell.lower() for cell in cells] == COLUMNS:
            inside = True
        elif inside and not line.startswith("|"):
            break
        elif inside and not set(line) <= set("|-: "):
            rows.append(cells)
    return rows


def test_architecture_table_leads_to_existing_files(repository: Path) -> None:
    rows = architecture_rows(repository)
    assert rows, f"ARCHITECTURE.md has no table with the columns {COLUMNS}"
    for row in rows:
        assert len(row) == len(COLUMNS), row
        for column, cell in zip(COLUMNS[1:], row[1:], strict=True):
            paths = re.findall(r"`([^`]+)`", cell)
            assert paths or cell == "—", f"{row[0]}, {column}: {cell!r} is neither a path in backticks nor a dash"
            missing = [path for path in paths if not (repository / path).exists()]
            assert not missing, f"{row[0]}, {column}: no such file: {missing}"


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(document: str, repository: Path) -> None:
    text = (repository / document).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in targets if not (repository / target).exists()]
    assert not missing, f"{document} links to {missing}"
