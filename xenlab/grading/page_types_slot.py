"""Types and counts decided by a student's part: each answer one number on the wire (exercise 05).

To build a domain of 1 MiB alone the part is asked some eight hundred times.  So a decision is a bare number, or
``{"unusable": why}`` where the part gave none.  Where it is judged, each question is kept with its answer: what
the part said about a frame before is what explains a wrong answer now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xenlab.abi.numbers import Errno
from xenlab.grading.decisions import Sink, Unusable, described, raise_if_unusable
from xenlab.grading.patience import OutOfPatience, patience
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_types import PageTypes

ANSWER_SECONDS = 1.0
MAX_ANSWERS = 4_000
_EXPECTED = {
    "entry": "a use (0 to 6) or a negated errno",
    "take": "-1 (refused), 0 (granted) or 1 (granted, validate)",
    "drop": "0, 1 (untyped), 2 (unused) or 3 (both)",
}
_ALLOWED = {
    "entry": frozenset((*map(int, Use), *(-number.value for number in Errno))),
    "take": frozenset((-1, 0, 1)),
    "drop": frozenset((0, 1, 2, 3)),
}


@dataclass(frozen=True, slots=True)
class Question:
    """What the part was asked and what it answered.

    Attributes:
        method: ``entry``, ``take`` or ``drop``.
        arguments: as it was given them.
        answer: what it said, None if it said nothing usable.
    """

    method: str
    arguments: tuple[Any, ...]
    answer: int | None

    def __str__(self) -> str:
        return f"{asked(self.method, self.arguments)} = {'nothing' if self.answer is None else self.answer}"


class PageTypesSlot:
    """`PageTypes` whose decisions pass through a `Sink`.

    Attributes:
        questions: all of them, in order.
    """

    def __init__(self, sink: Sink, part: PageTypes | None = None) -> None:
        self._sink, self._part = sink, part
        self.questions: list[Question] = []

    def entry(self, level: str, flags: int, domid: int, owner: int) -> int:
        return self._next("entry", level, flags, domid, owner)

    def take(self, mfn: int, use: int) -> int:
        return self._next("take", int(mfn), int(use))

    def drop(self, mfn: int, use: int) -> int:
        return self._next("drop", int(mfn), int(use))

    def state(self) -> dict[str, Any]:
        """Nothing: a run for grading is not taken back."""
        return {}

    def load(self, _state: dict[str, Any]) -> None:
        """Nothing to take back."""

    def _next(self, method: str, *arguments: Any) -> int:
        decision = self._sink.next(lambda: self._ask(method, arguments))
        try:
            answer = answer_of(method, arguments, decision)
        except Unusable:
            self.questions.append(Question(method, arguments, None))
            raise
        self.questions.append(Question(method, arguments, answer))
        return answer

    def _ask(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            with patience(ANSWER_SECONDS):
                value = getattr(self._part, method)(*arguments)
                if isinstance(value, int) and not isinstance(value, bool):
                    return int(value)
                return {"unusable": f"{asked(method, arguments)} must answer a whole number, it answered {value!r:.80}"}
        except OutOfPatience:
            return {"unusable": f"{asked(method, arguments)} did not answer within {ANSWER_SECONDS:g} s of CPU time"}
        except (Exception, SystemExit) as problem:
            return {"unusable": f"{asked(method, arguments)} raised {described(problem)}"}


def asked(method: str, arguments: tuple[Any, ...]) -> str:
    """A question as it is written in Python: ``take(0x70, 6)``."""
    if method == "entry":
        level, flags, domid, owner = arguments
        return f"entry({level!r}, {flags:#x}, {domid}, {owner})"
    mfn, use = arguments
    return f"{method}({mfn:#x}, {use})"


def answer_of(method: str, arguments: tuple[Any, ...], decision: Any) -> int:
    """The number in a decision.  Raises Unusable."""
    if isinstance(decision, dict):
        raise_if_unusable(decision)
    if type(decision) is not int or decision not in _ALLOWED[method]:
        raise Unusable(f"{asked(method, arguments)} must answer {_EXPECTED[method]}, it answered {decision!r:.40}")
    return decision
