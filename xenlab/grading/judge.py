"""Grading a submission: its process decides, this process replays and judges.

The life of a submission: the notebook is read, not executed; its cells and the guests go to the
student's process (`sandbox`); decisions come back as JSON; each guest runs again here, with a
part that gives the recorded decisions; the lesson looks at that run's trace and at how the
guest ended.

The invariant: every submission gives a report, and nothing in this process was ever touched by
a student's object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from xenlab.errors import XenlabError
from xenlab.grading.guests import image_from_source, replay, to_wire
from xenlab.grading.instances import seed_of
from xenlab.grading.lessons import Lesson, lesson
from xenlab.grading.lessons.base import Finding, Guest, checks_of
from xenlab.grading.notebook import Submission, SubmissionError, read_submission
from xenlab.grading.report import Check, Report
from xenlab.grading.sandbox import Limits, NoReply, ask

DEFAULT_LIMITS = Limits()
_HIDDEN = "xenlab.grading.hidden"


def grade(paths: Iterable[Path | str], workers: int = 1, limits: Limits = DEFAULT_LIMITS) -> list[Report]:
    """Grade submissions, each by itself; the reports in the order of the paths.

    Args:
        paths: notebooks, of any of the exercises.
        workers: how many processes grade at the same time.
        limits: what each submission may use.

    Raises:
        XenlabError: this copy of the package has no hidden checks, or ``workers`` is below 1.
    """
    if workers < 1:
        raise XenlabError(f"workers: expected a whole number from 1, found {workers}")
    if find_spec(_HIDDEN) is None:
        raise XenlabError("this copy of xenlab is the students': it has no hidden checks, so it cannot grade")
    one = partial(grade_notebook, limits=limits)
    if workers == 1:
        return [one(path) for path in paths]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(one, paths))


def grade_notebook(path: Path | str, limits: Limits = DEFAULT_LIMITS) -> Report:
    """Grade one submission.  Whatever it holds, the answer is a report."""
    number, seed = "", 0
    checks: tuple[Check, ...] = ()
    try:
        submission = read_submission(Path(path))
        number, seed = submission.lesson, seed_of(submission.student)
        exercise = lesson(number, seed)
        checks = checks_of(exercise.plan, ())
        return _judged(str(path), submission, exercise, seed, limits)
    except NoReply as reason:
        return Report(str(path), number, seed, _without_points(checks, str(reason)), str(reason))
    except SubmissionError as reason:
        return Report(str(path), number, seed, checks, str(reason))
    # One strange submission among a thousand must not stop the others.
    except Exception as problem:
        return Report(str(path), number, seed, checks, f"could not be judged: {type(problem).__name__}: {problem}")


def _judged(path: str, submission: Submission, exercise: Lesson, seed: int, limits: Limits) -> Report:
    guests = exercise.guests() + _hidden_guests(exercise)
    images = {guest.name: image_from_source(guest.source, guest.name) for guest in guests}
    slot = exercise.slot
    reply = ask(
        {
            "cells": list(submission.cells),
            "kind": slot.kind,
            "names": list(slot.names),
            "number": slot.number,
            "scenarios": dict(slot.scenarios),
            "rules": list(slot.rules),
            "guests": {name: to_wire(image) for name, image in images.items()},
        },
        limits,
    )
    notes = tuple(str(note)[:500] for note in _list(reply.get("notes")))
    answer = reply.get("answer")
    if not isinstance(answer, dict):
        missing = ", ".join(str(name)[:80] for name in _list(reply.get("missing"))) or "an answer"
        checks = _without_points(checks_of(exercise.plan, ()), f"the notebook does not define {missing}")
        return Report(path, exercise.number, seed, checks, None, notes)
    if slot.kind:
        findings = [_replayed(exercise, guest, images[guest.name], answer.get(guest.name)) for guest in guests]
    else:
        findings = _hidden_findings(exercise, answer) or exercise.examine(answer)
    return Report(path, exercise.number, seed, checks_of(exercise.plan, findings), None, notes)


def _replayed(exercise: Lesson, guest: Guest, image: Any, decisions: Any) -> Finding:
    recorded = _list(decisions)
    return exercise.judge(guest, replay(image, exercise.slot, recorded), recorded)


def _hidden(exercise: Lesson, function: str) -> Any:
    name = f"{_HIDDEN}.lesson_{exercise.number}"
    return getattr(import_module(name), function, None) if find_spec(name) else None


def _hidden_guests(exercise: Lesson) -> list[Guest]:
    made = _hidden(exercise, "guests")
    return list(made(exercise)) if made else []


def _hidden_findings(exercise: Lesson, answer: dict[str, Any]) -> list[Finding]:
    found = _hidden(exercise, "findings")
    return list(found(exercise, answer)) if found else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _without_points(checks: Sequence[Check], reason: str) -> tuple[Check, ...]:
    return tuple(Check(check.id, 0, check.max_points, reason) for check in checks)
