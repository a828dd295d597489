"""Each student's own instance of an exercise, chosen by a seed.

The problem: with one task for all, one answer is enough for all.  So the parameters of a task
(names, numbers, rules of an interface) follow from a seed, and the seed from the student's id.

The invariant: a seed gives the same instance on every machine and in every Python.  What breaks
without it: the grader would judge another task than the one the student was shown.  So choices
are drawn from a hash, not from `random`, whose sequences Python does not promise to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

T = TypeVar("T")
_SEED_BYTES, _DRAW_BYTES = 4, 8
NO_STUDENT_SEED = 0


def seed_of(student: str) -> int:
    """The seed of a student's id: 0 for an empty one, else 32 bits of its hash."""
    name = student.strip()
    return int.from_bytes(sha256(name.encode()).digest()[:_SEED_BYTES], "big") if name else NO_STUDENT_SEED


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices that follow from a seed; each is drawn by name and independent of the others.

    Attributes:
        seed: the instance.
        lesson: number of the exercise, so that neighbouring exercises are not chosen alike.
    """

    seed: int
    lesson: str

    def number(self, name: str, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        digest = sha256(f"{self.lesson}/{self.seed}/{name}".encode()).digest()
        return low + int.from_bytes(digest[:_DRAW_BYTES], "big") % (high - low + 1)

    def pick(self, name: str, options: Sequence[T]) -> T:
        """One of ``options``."""
        return options[self.number(name, 0, len(options) - 1)]

    def sample(self, name: str, options: Sequence[T], count: int) -> list[T]:
        """``count`` different ones of ``options``, in a seeded order."""
        left = list(options)
        return [left.pop(self.number(f"{name}.{turn}", 0, len(left) - 1)) for turn in range(count)]
