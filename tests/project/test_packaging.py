"""Three places name the dependencies: pyproject.toml, environment.yml, docs/platforms.md. They agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PLATFORM_PATTERNS = (
    r"any|manylinux_\d+_\d+_x86_64",
    r"any|manylinux_\d+_\d+_aarch64",
    r"any|macosx_\d+_\d+_(arm64|universal2)",
    r"any|win_amd64",
)


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    """The ``[project]`` table of pyproject.toml."""
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def by_name(lines: list[str]) -> dict[str, str]:
    """Requirement lines as canonical name -> sorted specifier."""
    requirements = map(Requirement, lines)
    return {canonicalize_name(r.name): ",".join(sorted(map(str, r.specifier))) for r in requirements}


def test_environment_yml_equals_pyproject(project: dict[str, Any], repository: Path) -> None:
    environment = yaml.safe_load((repository / "environment.yml").read_text(encoding="utf-8"))
    lines: list[str] = []
    for entry in environment["dependencies"]:
        lines += entry["pip"] if isinstance(entry, dict) else [entry]
    found = by_name(lines)
    assert found.pop("python") == project["requires-python"]
    assert found.pop("pip") == ""
    assert found == by_name(project["dependencies"])


def platform_rows(repository: Path) -> dict[str, list[str]]:
    """The first table of docs/platforms.md: package -> [version, tag, tag, tag, tag]."""
    text = (repository / "docs" / "platforms.md").read_text(encoding="utf-8")
    section = text.split("## Direct dependencies", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows[2:]}


def test_platform_table_covers_the_dependencies(project: dict[str, Any], repository: Path) -> None:
    rows = platform_rows(repository)
    specifiers = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project["dependencies"])}
    assert sorted(rows) == sorted(specifiers)
    outside = {name: rows[name][0] for name, specifier in specifiers.items() if rows[name][0] not in specifier}
    assert not outside, f"checked versions that pyproject.toml does not allow: {outside}"


def test_platform_table_has_a_wheel_for_each_platform(repository: Path) -> None:
    for name, (_, *tags) in platform_rows(repository).items():
        assert len(tags) == len(PLATFORM_PATTERNS), name
        for tag, pattern in zip(tags, PLATFORM_PATTERNS, strict=True):
            assert re.fullmatch(rf"(py3|cp3\d+)-(none|abi3|cp3\d+)-({pattern})", tag), f"{name}: {tag}"


def test_binder_installs_the_package_itself(repository: Path) -> None:
    assert (repository / ".binder" / "requirements.txt").read_text(encoding="utf-8").split("\n") == ["-e .", ""]


def test_licence_fits_unicorn(project: dict[str, Any], repository: Path) -> None:
    assert project["license"] == "GPL-2.0-or-later"
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 2," in (repository / "LICENSE").read_text(
        "utf-8"
    )
