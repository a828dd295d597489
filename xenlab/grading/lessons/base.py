"""What all exercises share: checks with points, guests, findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xenlab.grading.guests import Run, Slot
from xenlab.grading.report import Check

_MESSAGES_SHOWN = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """A check before it is judged.

    Attributes:
        id: lesson and number, like ``02.1``.
        points: what it can earn.
        invariant: what must hold, in a sentence.
        needs: a check without which this one earns nothing: refusing everything is no defence
            while nothing works.
    """

    id: str
    points: int
    invariant: str
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that tests a part.

    Attributes:
        check: the check that it counts for.
        name: for people, unique in the exercise.
        source: its assembly.
        steps: what must be seen, in order; the lesson knows what they are.
    """

    check: str
    name: str
    source: str
    steps: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at for a check.

    Attributes:
        check: the check that it counts for.
        passed: whether it was as it should be.
        message: what was wrong, if it was not.
        remark: what a self-check says instead of the invariant when it could not look at all of it.
    """

    check: str
    passed: bool
    message: str = ""
    remark: str = ""


class Lesson(Protocol):
    """An exercise with its parameters chosen.

    Attributes:
        number, title: of the lesson.
        slot: where the student's part goes, or the names of the answer's variables.
        plan: its checks.
        parameters: what the seed chose, by name.
    """

    number: str
    title: str
    slot: Slot
    plan: tuple[Plan, ...]
    parameters: dict[str, Any]

    def task(self) -> str:
        """The task in words, as Markdown."""
        ...

    def guests(self) -> list[Guest]:
        """The guests of the self-checks."""
        ...

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        """Judge what is not a part: the answer's data by name."""
        ...

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        """Judge what a guest did on the judge's machine."""
        ...


def told(messages: Sequence[str]) -> str:
    """The first messages in full, the others counted: the first wrong step is the one to look at."""
    more = len(messages) - _MESSAGES_SHOWN
    return "\n".join([*messages[:_MESSAGES_SHOWN], *([f"and {more} more like these"] if more > 0 else [])])


def checks_of(plan: Iterable[Plan], findings: Sequence[Finding]) -> tuple[Check, ...]:
    """Points and messages: each check earns the share of its findings that passed, rounded down."""
    checks: dict[str, Check] = {}
    for planned in plan:
        mine = [finding for finding in findings if finding.check == planned.id]
        passed = sum(finding.passed for finding in mine)
        points = planned.points * passed // len(mine) if mine else 0
        message = told([finding.message for finding in mine if not finding.passed])
        if points and planned.needs and not checks[planned.needs].points:
            points, message = 0, f"counts only with some success in {planned.needs}"
        broken = f"broken: {planned.invariant}\n{message or 'nothing to judge'}"
        whole = points == planned.points
        checks[planned.id] = Check(
            planned.id, points, planned.points, f"held: {planned.invariant}" if whole else broken
        )
    return tuple(checks.values())
