"""What every view is: state and trace in, a picture and a table out.

The problem: one mechanism has to be seen on a live page, in a saved notebook without a kernel,
by a screen reader and by a test.

The invariant: `svg` and `text` are functions of the hypervisor's state and its trace, and both
say the same.  What breaks without it: a picture of what the author expected, not of the run.

A saved notebook keeps the picture as ``image/svg+xml``, not as HTML: front ends strip SVG out of
HTML in notebooks that they do not trust yet, and then show the table instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from xenlab.views.canvas import printable


class Picture(ABC):
    """A view.  Subclasses say what it looks like and what it reads.

    Attributes:
        title: what it shows, in a few words.
    """

    title: str

    @abstractmethod
    def svg(self) -> str:
        """The picture: a complete SVG document, at most 880 px wide."""

    @abstractmethod
    def text(self) -> str:
        """The same as a table of plain text."""

    def select(self, _key: str) -> bool:
        """Choose the part of the picture with this ``data-event`` key; False if it has no such part."""
        return False

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"image/svg+xml": self.svg(), "text/plain": self.text()}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of plain text under their headings, each as wide as its widest cell."""
    clean = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *clean, strict=True)]
    rule = ["-" * width for width in widths]
    lines = chain((headings, rule), clean)
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
