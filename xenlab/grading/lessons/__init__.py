"""The exercises: for each the seeded task, the guests that use the answer, and what must be seen."""

from __future__ import annotations

from importlib import import_module

from xenlab.errors import XenlabError
from xenlab.grading.lessons.base import Lesson

NUMBERS = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "13")


def lesson(number: str, seed: int) -> Lesson:
    """The instance of exercise ``number`` that ``seed`` chooses.

    Raises:
        XenlabError: there is no such exercise.
    """
    if number not in NUMBERS:
        raise XenlabError(f"exercise {number!r}: expected one of {', '.join(NUMBERS)}")
    made: Lesson = import_module(f"xenlab.grading.lessons.lesson_{number}").lesson(seed)
    return made


__all__ = ["NUMBERS", "Lesson", "lesson"]
