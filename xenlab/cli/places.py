"""Where the course lies: the folders beside the package in a clone."""

from __future__ import annotations

from pathlib import Path

import xenlab
from xenlab.errors import XenlabError


def clone() -> Path:
    """The folder that holds the package and, in a clone, the course."""
    return Path(xenlab.__file__).resolve().parents[1]


def folder(name: str) -> Path:
    """The course's folder ``name``.  Raises XenlabError where there is none."""
    path = clone() / name
    if not path.is_dir():
        raise XenlabError(
            f"the folder {name}/ is not beside the package: expected {path}. The course comes with the clone or the "
            "bundle, not with the installed package; in there, run: pip install -e ."
        )
    return path


def lessons() -> list[Path]:
    """The lessons in reading order.  Raises XenlabError where there are none."""
    home = folder("notebooks")
    found = sorted(home.glob("*.ipynb"))
    if not found:
        raise XenlabError(f"no lessons: expected *.ipynb in {home}, found none")
    return found
