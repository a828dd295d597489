"""Instructions against rings: which trap, which do not but should (lesson 01; paper 2.1.1).

Popek and Goldberg: a machine can be virtualized by trapping alone if every instruction that
reads or changes the machine's state (a sensitive one) traps outside ring 0.  The cells come
from `xenlab.labs.instruction_matrix`, which executes each; this file only draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.palette import HYPERVISOR, ink_on
from xenlab.views.picture import Picture, table
from xenlab.views.story import short_vector

_ROW, _NAME_WIDTH = 25, 182


class Outcome(Enum):
    """What an instruction did in a ring: symbol and words."""

    TRAPS = ("▲", "traps")
    EXECUTES = ("●", "executes")
    DIFFERS = ("◆", "no trap, acts differently than in ring 0")
    REVEALS = ("■", "no trap, shows the machine's state")

    @property
    def symbol(self) -> str:
        """A shape that tells it without colour."""
        return self.value[0]

    @property
    def words(self) -> str:
        """The same in words."""
        return self.value[1]

    @property
    def is_hole(self) -> bool:
        """Sensitive, and the hypervisor is never told."""
        return self in (Outcome.DIFFERS, Outcome.REVEALS)


_COLOURS = {
    Outcome.TRAPS: "#0072B2",
    Outcome.EXECUTES: "#009E73",
    Outcome.DIFFERS: "#E69F00",
    Outcome.REVEALS: HYPERVISOR,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One execution: the ring, what came of it, the vector if it trapped, what it visibly changed."""

    ring: int
    outcome: Outcome
    vector: int | None = None
    effect: str = ""

    @property
    def words(self) -> str:
        """In a few words."""
        return f"traps {short_vector(self.vector)}" if self.vector is not None else self.effect or "no visible effect"

    @property
    def text(self) -> str:
        """Outcome and effect, for the table."""
        return self.words if self.vector is not None else f"{self.outcome.words.split(', ')[-1]}: {self.words}"


@dataclass(frozen=True, slots=True)
class InstructionRow:
    """One instruction in all rings."""

    instruction: str
    cells: tuple[Cell, ...]

    @property
    def is_hole(self) -> bool:
        """Whether it is sensitive and does not trap in some ring outside 0."""
        return any(cell.outcome.is_hole for cell in self.cells if cell.ring)


class InstructionMatrix(Picture):
    """The picture of rows that were executed."""

    title = "Instructions and rings"

    def __init__(self, rows: Sequence[InstructionRow]) -> None:
        self.rows = tuple(rows)

    def text(self) -> str:
        rings = [cell.ring for cell in self.rows[0].cells] if self.rows else []
        rows = [
            (
                row.instruction,
                *(cell.text for cell in row.cells),
                _verdict(row),
            )
            for row in self.rows
        ]
        heads = ("instruction", *(f"ring {ring}" for ring in rings), "verdict")
        return f"{self.title}: {self._summary()}\n\n" + table(heads, rows)

    def svg(self) -> str:
        canvas = Canvas(self.title, self._summary())
        y = _legend(canvas, 50)
        for place, row in enumerate(self.rows):
            if not place:
                _heads(canvas, row, y + 14)
            _draw_row(canvas, row, y + 22 + _ROW * place)
        return canvas.render(y + 30 + _ROW * len(self.rows))

    def _summary(self) -> str:
        holes = sum(row.is_hole for row in self.rows)
        return f"{len(self.rows)} instructions executed; sensitive without a trap: {holes}"


def _verdict(row: InstructionRow) -> str:
    return "sensitive, does not trap" if row.is_hole else ""


def _legend(canvas: Canvas, y: float) -> float:
    x = 16.0
    for outcome in Outcome:
        canvas.rect(x, y - 13, 17, 17, fill=_COLOURS[outcome], rx="3")
        canvas.text(x + 8.5, y, outcome.symbol, f"{ink_on(_COLOURS[outcome])} s", anchor="middle")
        canvas.text(x + 23, y, outcome.words, "s")
        x += 44 + 6.4 * len(outcome.words)
    return y + 14


def _width(row: InstructionRow) -> float:
    return (WIDTH - 32 - _NAME_WIDTH) / max(len(row.cells), 1)


def _heads(canvas: Canvas, row: InstructionRow, y: float) -> None:
    for place, cell in enumerate(row.cells):
        canvas.text(16 + _NAME_WIDTH + _width(row) * place, y, f"ring {cell.ring}", "b")


def _draw_row(canvas: Canvas, row: InstructionRow, top: float) -> None:
    canvas.text(34, top + 17, clip(row.instruction, 21), "m b" if row.is_hole else "m")
    if row.is_hole:
        canvas.text(16, top + 17, "!", "b", colour=HYPERVISOR)
    width = _width(row)
    for place, cell in enumerate(row.cells):
        colour = _COLOURS[cell.outcome]
        x, ink = 16 + _NAME_WIDTH + width * place, ink_on(colour)
        canvas.rect(x, top + 1, width - 3, _ROW - 3, fill=colour, rx="3")
        canvas.text(x + 8, top + 17, cell.outcome.symbol, ink)
        canvas.text(x + 26, top + 17, clip(cell.words, int((width - 34) / 6.7)), f"m s {ink}")
