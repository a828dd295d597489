"""Frames built by a student's part: on the wire ``{"end": true}``, or words, registers and words in the shared page.

As JSON, a frame is ``{"words": [...], "registers": {...}, "shared": [[offset, word], ...], "event_mask": 0 or 1}``, the
last one only where the part named it.

The invariant: each question is kept with what the judge's own machine knew when it was asked, and how much room there
was on the stack.  What breaks without it: an answer is judged by the memory of a later time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xenlab.grading.decisions import Decision, Sink, Unusable, check_object, described
from xenlab.grading.patience import OutOfPatience, patience
from xenlab.hypervisor.bounce import MOST_WORDS, REGISTERS, Bounce, Values, Writable, unusable
from xenlab.machine.vectors import vector_name

ANSWER_SECONDS = 0.2
_WORD, _U32 = 4, 0xFFFF_FFFF


@dataclass(slots=True)
class Bounced:
    """A question to the part.

    Attributes:
        trap, registers, gate, kernel: as it was told.
        room: how many words the handler's ring could have stored below the stack pointer that the frame begins at.
        time: instructions begun.
        answer: what it said; None to end the guest.
        said: whether it said anything usable.
    """

    trap: Values
    registers: Values
    gate: Values
    kernel: Values
    room: int
    time: int
    answer: Mapping[str, Any] | None = None
    said: bool = False


class BounceSlot:
    """A bounce whose decisions pass through a `Sink`.

    Attributes:
        asked: all questions, in order.
    """

    def __init__(self, sink: Sink, part: Bounce | None = None) -> None:
        self._sink, self._part = sink, part
        self.now: Callable[[], int] = lambda: 0
        self.asked: list[Bounced] = []

    def frame(
        self, trap: Values, registers: Values, gate: Values, kernel: Values, writable: Writable
    ) -> Mapping[str, Any] | None:
        inwards = gate["cs"] & 3 < registers["cs"] & 3
        room = _room(kernel["esp"] if inwards else registers["esp"], writable)
        question = Bounced(trap, registers, gate, kernel, room, self.now())
        self.asked.append(question)
        question.answer = frame_of(self._sink.next(lambda: self._ask(question, writable)))
        question.said = True
        return question.answer

    def _ask(self, asked: Bounced, writable: Writable) -> Decision:
        assert self._part is not None
        name = f"frame for {vector_name(asked.trap['vector'])}"
        # Copies: a part that changes what it was given must not change the machine.
        trap, registers, gate, kernel = (dict(each) for each in (asked.trap, asked.registers, asked.gate, asked.kernel))
        try:
            with patience(ANSWER_SECONDS):
                return _encoded(self._part.frame(trap, registers, gate, kernel, writable), name)
        except OutOfPatience:
            return {"unusable": f"{name}: no answer within {ANSWER_SECONDS:g} s of CPU time"}
        except (Exception, SystemExit) as problem:
            return {"unusable": f"{name} raised {described(problem)}"}


def _room(esp: int, writable: Writable) -> int:
    for words in range(MOST_WORDS, 0, -1):
        if writable(esp - _WORD * words & _U32, _WORD * words):
            return words
    return 0


def _encoded(found: Any, name: str) -> Decision:
    if found is None:
        return {"end": True}
    expected = unusable(found)
    if expected:
        return {"unusable": f"{name}: expected {expected}; found {found!r:.200}"}
    coded: dict[str, Any] = {
        "words": [int(word) for word in found["words"]],
        "registers": {name: int(found["registers"][name]) for name in REGISTERS},
        "shared": [[int(offset), int(word)] for offset, word in found.get("shared", {}).items()],
    }
    if "event_mask" in found:
        coded["event_mask"] = int(found["event_mask"])
    return coded


def frame_of(decision: Any) -> Mapping[str, Any] | None:
    """The frame in a decision, None to end the guest.  Raises Unusable."""
    check_object(decision)
    if decision.get("end") is True:
        return None
    pairs = decision.get("shared")
    well_formed = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not well_formed or not all(type(offset) is int for offset, _word in pairs):
        raise Unusable(f"expected a frame, found {decision!r:.80}")
    found = {**decision, "shared": dict(pairs)}
    expected = unusable(found)
    if expected:
        raise Unusable(f"expected {expected}; found {decision!r:.80}")
    return found


__all__ = ["BounceSlot", "Bounced", "frame_of"]
