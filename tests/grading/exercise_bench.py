"""One bench for all exercises with a part: an answer on every guest of its exercise, and what is left of the points.

`judged` (see `conftest`) starts a process for each answer and runs each guest there and again in the judge's, as
`xenlab grade` does: it is for answers that tamper, end their process or loop outside a part.  `tried` runs each guest
once, in this process, and has the lesson judge that run, which is the one that the judge's replay gives: see
`assert_a_replay_is_the_recorded_run`.  It is for mistakes, of which each exercise has many.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from xenlab.grading import exercise
from xenlab.grading.decisions import Decision, Recorder
from xenlab.grading.guests import Run, image_from_source, record, replay, run
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import Lesson, lesson
from xenlab.grading.lessons.base import Finding, Guest, checks_of
from xenlab.grading.report import Check, Report
from xenlab.toolstack import Image

Grade = Callable[..., Report]
Read = Callable[[str], str]
Made = Callable[[], Any]
SOLUTIONS = Path(__file__).resolve().parents[2] / "solutions"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="the system has no timer of CPU time")
SEEDS = st.integers(0, (1 << 32) - 1)


def more(*cases: Any) -> list[Any]:
    """More cases of a kind of which one is always run: other students, other copies of ours.  For ``-m storm``."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.storm) for case in cases]


# Answers.


@cache
def solution_of(number: str) -> str:
    """The instructor's answer cell."""
    (source,) = SOLUTIONS.glob(f"{number}-*.ipynb")
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    (answer,) = (cell for cell in cells if cell["metadata"].get("nbgrader", {}).get("solution"))
    return "".join(answer["source"])


def changed(number: str, there: str, instead: str) -> str:
    """The instructor's answer with the last ``there`` in it replaced."""
    head, found, tail = solution_of(number).rpartition(there)
    assert found, f"solution {number} has no {there!r}"
    return head + instead + tail


def names_in(number: str, answer: str, student: str = "") -> dict[str, Any]:
    """What is defined once the answer's cell has run for that student."""
    names: dict[str, Any] = {"exercise": exercise(number, student)}
    exec(compile(answer, "<cell 1>", "exec"), names)
    return names


# Runs.


def all_guests(made: Lesson) -> list[Guest]:
    """Those of the self-checks, and the hidden ones."""
    hidden = import_module(f"xenlab.grading.hidden.lesson_{made.number}")
    return [*made.guests(), *hidden.guests(made)]


@cache
def image_of(source: str, name: str) -> Image:
    return image_from_source(source, name)


def played(made: Lesson, guest: Guest, part: Made) -> tuple[Run, list[Decision]]:
    """A guest that has run with a part, and what the part decided."""
    recorder, image = Recorder(made.slot.most_decisions), image_of(guest.source, guest.name)
    # The collector would count against the part's patience, and here it has the tests' objects to go through.
    gc.disable()
    try:
        return run(image, made.slot, recorder, part()), recorder.decisions
    finally:
        gc.enable()


def runs(made: Lesson, part: Made) -> Iterator[tuple[Guest, Run]]:
    """All guests with a part, one after the other."""
    for guest in all_guests(made):
        yield guest, played(made, guest, part)[0]


def assert_a_replay_is_the_recorded_run(made: Lesson, guest: Guest, part: Made) -> Run:
    """The judge's machine does what the student's did; that run."""
    image = image_of(guest.source, guest.name)
    first, decisions = played(made, guest, part)
    assert record(image, made.slot, part) == decisions
    again = replay(image, made.slot, json.loads(json.dumps(decisions)))
    assert again.events == first.events
    assert again.scheduled == first.scheduled
    assert made.judge(guest, again, decisions) == made.judge(guest, first, decisions)
    return again


# Points.


def findings_of(made: Lesson, part: Made, guests: Iterable[Guest] | None = None) -> list[Finding]:
    """What is found on each guest."""
    found = []
    for guest in all_guests(made) if guests is None else guests:
        found.append(made.judge(guest, *played(made, guest, part)))
    return found


def scores(made: Lesson, part: Made) -> tuple[int, ...]:
    """The points of a part for each check."""
    return points(checks_of(made.plan, findings_of(made, part)))


def tried(number: str, answer: str, student: str = "") -> Report:
    """The report on an answer, without a process of its own; see above."""
    made = lesson(number, seed_of(student))
    part = names_in(number, answer, student)[made.slot.names[0]]
    return Report("", number, seed_of(student), checks_of(made.plan, findings_of(made, part)), None)


def tried_with(number: str, mistake: tuple[Any, ...], student: str = "") -> Report:
    """The same for the solution with a mistake, which begins with what is changed there and into what."""
    return tried(number, changed(number, *mistake[:2]), student)


def points(found: Report | Iterable[Check]) -> tuple[int, ...]:
    """For each check, in order."""
    return tuple(check.points for check in (found.checks if isinstance(found, Report) else found))


def points_by_check(report: Report) -> dict[str, int]:
    return {check.id: check.points for check in report.checks}


def messages(report: Report) -> str:
    """All that a student reads."""
    return "\n".join(check.message for check in report.checks)


def self_checks(number: str, mistake: tuple[Any, ...], student: str) -> list[bool]:
    """Which of its own checks the solution passes with a mistake in it: they look at less than grading."""
    names = names_in(number, changed(number, *mistake[:2]), student)
    made = lesson(number, seed_of(student))
    return [bool(names["exercise"].check(plan.id, names[made.slot.names[0]])) for plan in made.plan]


def assert_no_decision_passes(made: Lesson, forged: Iterable[Any]) -> None:
    """Forged decisions are only wrong ones."""
    guest = made.guests()[0]
    for decisions in forged:
        finding = made.judge(guest, replay(image_of(guest.source, guest.name), made.slot, decisions), [])
        assert not finding.passed
        assert "first wrong step: instruction" in finding.message


def plain_data(*names: str) -> st.SearchStrategy[Any]:
    """Any JSON, with these names in it more often than by chance."""
    keys = st.text() | st.sampled_from(names) if names else st.text()
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
    )
