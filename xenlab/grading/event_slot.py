"""Event bits decided by a student's part: each answer ``{"changes": {name: value}}`` on the wire (exercise 08).

The bits of the exercise mean something else than Xen's, by a few rules (`EventRules`) that the seed chooses.  What is
right follows from the rules and from what the part was told.

A scenario is plain data: ``ports``, which are bound between a receiver and a sender, and ``turn``, the
instructions that each gets before the other's turn.  Both domains run the same image; the one with a command line is
the sender.

The invariant: what the part is told follows from its own answers before and the scenario alone, in the student's
process and in the judge's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xenlab.abi.numbers import EvtchnStatus
from xenlab.grading.decisions import Decision, Sink, Unusable, check_object, described
from xenlab.grading.patience import OutOfPatience, patience
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Port
from xenlab.hypervisor.event_bits import WORD, Answer, EventBits, expected, is_answer
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.toolstack import Image, boot

MEMORY_MIB = 4
ANSWER_SECONDS = 0.25
MAX_QUESTIONS = 400
RECEIVER, SENDER = 0, 1
# Names of what a question tells, and of what may come of it.
TOLD = {
    "send": ("port", "pending", "mask", "selector", "upcall", "asleep"),
    "unmask": ("port", "pending", "mask", "selector", "upcall"),
    "block": ("selector", "upcall"),
}
_DECIMAL = frozenset(("port", "upcall", "asleep", "wake", "sleep"))


@dataclass(frozen=True, slots=True)
class EventRules:
    """What the bits mean.

    Attributes:
        group: ports for each bit of the selector.
        open_is_1: whether a mask bit of 1 says that its port is open; else that it is closed.
        every: by the remainder of a port's number by this, it is ...
        insistent: ... insistent, if the remainder is this: a send goes on though its bit is 1 already,
        quiet: or quiet, if it is this: it makes an upcall pending only if the guest sleeps.
    """

    group: int
    open_is_1: int
    every: int
    insistent: int
    quiet: int

    def is_open(self, port: int, mask: int) -> bool:
        """Whether a port is open by its mask word."""
        return bool(mask >> port % WORD & 1) == bool(self.open_is_1)

    def is_insistent(self, port: int) -> bool:
        """Whether a send to it never stops at its own bit."""
        return port % self.every == self.insistent

    def is_quiet(self, port: int) -> bool:
        """Whether it leaves a guest alone that is awake."""
        return port % self.every == self.quiet

    def right(self, question: str, told: tuple[int, ...]) -> Answer:
        """The right answer to a question."""
        answer: dict[str, int] = {"send": self._send, "unmask": self._unmask, "block": self._block}[question](*told)
        return answer

    def _send(self, *told: int) -> dict[str, int]:
        port, pending, mask, selector, upcall, asleep = told
        bit = 1 << port % WORD
        if pending & bit and not self.is_insistent(port):
            return {}
        goes_on = self._select(port, selector, upcall, bool(asleep)) if self.is_open(port, mask) else {}
        return {"pending": pending | bit} | goes_on

    def _unmask(self, *told: int) -> dict[str, int]:
        port, pending, mask, selector, upcall = told
        bit = 1 << port % WORD
        opened = {"mask": mask | bit if self.open_is_1 else mask & ~bit}
        if self.is_open(port, mask) or not pending & bit:
            return opened
        return opened | self._select(port, selector, upcall, False)

    def _select(self, port: int, selector: int, upcall: int, asleep: bool) -> dict[str, int]:
        chosen = {"selector": selector | 1 << port // self.group}
        if self.is_quiet(port) and not asleep:
            return chosen
        return chosen | {"upcall": upcall or 1} | ({"wake": True} if asleep else {})

    def _block(self, *told: int) -> dict[str, int]:
        selector, upcall = told
        return {"upcall": 1} if selector and not upcall else {"sleep": not upcall}


@dataclass(frozen=True, slots=True)
class EventQuestion:
    """A question to the part.

    Attributes:
        question: ``send``, ``unmask`` or ``block``.
        told: its arguments.
        answer: what it said, None if it said nothing usable.
        time, eip: when, and where the domain on the CPU was.
    """

    question: str
    told: tuple[int, ...]
    answer: Answer | None
    time: int
    eip: int

    def __str__(self) -> str:
        return in_python(self.question, self.told)


def in_python(question: str, told: Sequence[int]) -> str:
    """A question as it is written: ``send(port=9, pending=0x0, ...)``."""
    return f"{question}({', '.join(_shown(name, value) for name, value in zip(TOLD[question], told, strict=True))})"


def _shown(name: str, value: int) -> str:
    return f"{name}={value if name in _DECIMAL else hex(value)}"


def effect(question: str, told: tuple[int, ...], answer: Answer) -> dict[str, int]:
    """What there is after an answer: the words, whether a guest that slept is woken, and whether one goes to sleep."""
    before = dict(zip(TOLD[question], told, strict=True))
    after: dict[str, int] = {
        name: answer.get(name, before[name]) for name in ("pending", "mask", "selector", "upcall") if name in before
    }
    if question == "block":
        after["sleep"] = bool(answer.get("sleep", False))
    elif before.get("asleep"):
        after["wake"] = bool(answer.get("wake", False))
    return after


def differences(question: EventQuestion, right: Answer) -> list[str]:
    """Where an answer's effect is not the right one's, in words."""
    assert question.answer is not None
    found = effect(question.question, question.told, question.answer)
    wanted = effect(question.question, question.told, right)
    return [
        f"{_shown(name, wanted[name])} expected, found {_shown(name, found[name])}"
        for name in wanted
        if wanted[name] != found[name]
    ]


class EventSlot:
    """Event bits whose decisions pass through a `Sink`.

    Attributes:
        questions: all of them, in order.
        xen: the machine that asks.
    """

    xen: Hypervisor

    def __init__(self, sink: Sink, part: EventBits | None = None) -> None:
        self._sink, self._part = sink, part
        self.questions: list[EventQuestion] = []

    def send(self, port: int, pending: int, mask: int, selector: int, upcall: int, asleep: bool) -> Answer:
        return self._next("send", port, pending, mask, selector, upcall, asleep)

    def unmask(self, port: int, pending: int, mask: int, selector: int, upcall: int) -> Answer:
        return self._next("unmask", port, pending, mask, selector, upcall)

    def block(self, selector: int, upcall: int) -> Answer:
        return self._next("block", selector, upcall)

    def _next(self, question: str, *told: int) -> Answer:
        current = self.xen.current
        eip = current.state.eip if current is not None else 0
        answer = None
        try:
            answer = answer_of(question, self._sink.next(lambda: self._ask(question, told)))
            return answer
        finally:
            self.questions.append(EventQuestion(question, told, answer, self.xen.now, eip))

    def _ask(self, question: str, told: tuple[int, ...]) -> Decision:
        asked = in_python(question, told)
        try:
            with patience(ANSWER_SECONDS):
                value = getattr(self._part, question)(*told)
                if not is_answer(question, value):
                    return {"unusable": f"{asked} must return {expected(question)}; it returned {value!r:.120}"}
                return {"changes": {str(name): value[name] for name in value}}
        except OutOfPatience:
            return {"unusable": f"{asked} did not answer within {ANSWER_SECONDS:g} s of CPU time"}
        except (Exception, SystemExit) as problem:
            return {"unusable": f"{asked} raised {described(problem)}"}


def answer_of(question: str, decision: Any) -> Answer:
    """The answer in a decision.  Raises Unusable."""
    check_object(decision)
    changes = decision.get("changes")
    if not is_answer(question, changes):
        raise Unusable(f"an answer to {question}: expected {expected(question)}; found {decision!r:.120}")
    answer: Answer = changes
    return answer


@dataclass(slots=True)
class Raced:
    """A scenario that has run: the machine, why the part could not go on, and what it was asked."""

    xen: Hypervisor
    problem: str
    questions: list[EventQuestion]


def race(image: Image, scenario: Mapping[str, Any], sink: Sink, part: Any, budget: int) -> Raced:
    """Run a receiver and a sender on a machine of its own, with the part in the slot."""
    slot = EventSlot(sink, part)
    scheduler = RoundRobin(scenario["turn"])
    xen = slot.xen = Hypervisor(Machine(MEMORY_MIB), scheduler=scheduler, event_bits=slot, trace=Trace())
    for command_line in ("", "sender"):
        boot(xen, image, command_line=command_line)
    for port in scenario["ports"]:
        for ours, theirs in ((RECEIVER, SENDER), (SENDER, RECEIVER)):
            xen.domains[ours].ports[port] = Port(EvtchnStatus.INTERDOMAIN, 0, theirs, port)
    problem = ""
    try:
        xen.run(budget)
    except Unusable as reason:
        problem = str(reason)
    return Raced(xen, problem, slot.questions)
