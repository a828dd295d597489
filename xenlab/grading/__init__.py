"""Exercises: seeded instances, self-checks, and the judge that replays what a student's part decided.

In a notebook: ``exercise = xenlab.grading.exercise("02", student="...")``.
For grading: ``grade(paths)`` gives one `Report` a submission.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xenlab.grading.judge import grade
    from xenlab.grading.report import Check, Report
    from xenlab.grading.self_check import exercise

__all__ = ["Check", "Report", "exercise", "grade"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: a notebook does not need the judge.
    homes = {"exercise": "self_check", "grade": "judge", "Check": "report", "Report": "report"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{homes[name]}"), name)
    globals()[name] = value
    return value
