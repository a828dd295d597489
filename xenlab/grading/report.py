"""What grading says about one submission, as data, JSON and text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xenlab.grading.instances import NO_STUDENT_SEED

NO_STUDENT = "no student id: judged against the instance of seed 0, the one of an empty `student`"
UNTRUSTED = (
    "untrusted: the student's code ran in a process with limits on time and memory, but without a sandbox; "
    "it could read files and the network"
)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        id: lesson and number, like ``02.1``.
        points, max_points: what was earned of what.
        message: which invariant held or broke, and where.
    """

    id: str
    points: int
    max_points: int
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one submission.

    Attributes:
        submission: its path, as it was given.
        lesson: number of the exercise, empty if it could not be told.
        seed: of the instance that was judged.
        checks: all checks of the exercise, those that earned nothing too.
        error: why the submission could not be judged as a whole, None if it could.
        notes: cells that failed and the like; for people, not in the JSON.
        trust: whether the student's code was kept from the rest of the machine, in words.
    """

    submission: str
    lesson: str
    seed: int
    checks: tuple[Check, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()
    trust: str = field(default=UNTRUSTED)

    @property
    def score(self) -> int:
        """Points earned."""
        return sum(check.points for check in self.checks)

    @property
    def max_score(self) -> int:
        """Points that could be earned."""
        return sum(check.max_points for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The object that ``xenlab grade --json`` prints for this submission."""
        return {
            "submission": self.submission,
            "lesson": self.lesson,
            "seed": self.seed,
            "score": self.score,
            "max_score": self.max_score,
            "checks": [
                {"id": check.id, "points": check.points, "max_points": check.max_points, "message": check.message}
                for check in self.checks
            ],
            "error": self.error,
        }

    def text(self) -> str:
        """The report for people, several lines."""
        lines = [f"{self.submission}: exercise {self.lesson or '?'}, seed {self.seed}: {self.score}/{self.max_score}"]
        if self.checks and self.seed == NO_STUDENT_SEED:
            lines.append(f"  {NO_STUDENT}")
        if self.error:
            lines.append(f"  error: {self.error}")
        for check in self.checks:
            lines += _indented(f"{check.id}  {check.points}/{check.max_points}  ", check.message)
        for note in self.notes:
            lines += _indented("note: ", note)
        lines.append(f"  {self.trust}")
        return "\n".join(lines)


def _indented(head: str, message: str) -> list[str]:
    first, *rest = message.splitlines() or [""]
    return [f"  {head}{first}", *("        " + line for line in rest)]
