"""Exercise 05: the validator, by rules that the seed chooses.

Guests ask for changes of their page tables, one hypercall after the other.  A step says what the guest asks for and
what it has to be answered.  After each hypercall the auditor counts again.  The first step where either is wrong
is what the report is about, with what the part had said about the frames concerned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xenlab.abi.numbers import Errno, Shutdown
from xenlab.grading.guests import PAGE_TYPES, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.grading.lessons.page_guests import (
    LEAF,
    NEIGHBOUR,
    OWN,
    ROOT,
    WRITABLE,
    Step,
    fill,
    guest_source,
    hang,
    map_page,
    own,
    take_out,
)
from xenlab.grading.page_types_slot import Question
from xenlab.hypervisor.trace import Kind

# What a guest is answered where `take` refuses.
REFUSED_PAGE, REFUSED_TABLE = Errno.EBUSY, Errno.EINVAL
_FREE_BITS = (0x200, 0x400, 0x800)
_ERRNOS = (
    Errno.EPERM,
    Errno.ENOENT,
    Errno.ESRCH,
    Errno.E2BIG,
    Errno.ENOMEM,
    Errno.EACCES,
    Errno.EEXIST,
    Errno.ENOSPC,
)
_USER_RULES = {
    "never": "an `l1` entry may not be for applications (`USER`, 0x4)",
    "not writable": (
        "an `l1` entry may not be for applications and writable at the same time (`USER`, 0x4, and `RW`, 0x2)"
    ),
}
_HISTORY = 5


class Validator:
    """Types, counts and entries as in Xen, but for a forbidden flag, a limit, errnos and a rule about descriptors."""

    number = "05"
    title = "The validator"
    slot = Slot(PAGE_TYPES, ("MyPageTypes",))
    plan = (
        Plan("05.1", 3, "a guest gets what it may have, as long as it may have it, and gets it again"),
        Plan("05.2", 3, "an entry that may not stand is refused with the errno of its rule", needs="05.1"),
        Plan("05.3", 4, "no frame is two things at once, whatever a guest tries", needs="05.1"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        self.bit = choices.pick("bit", _FREE_BITS)
        self.user = choices.pick("user", tuple(_USER_RULES))
        self.flags, self.nowhere, self.foreign, self.nobody = choices.sample("errnos", _ERRNOS, 4)
        self.first = choices.pick("first", ("flags", "frame"))
        self.most = choices.number("most", 3, 6)
        self.secret = choices.pick("secret", (True, False))
        self.parameters: dict[str, Any] = {
            "forbidden_bit": self.bit,
            "user": self.user,
            "flags": int(self.flags),
            "nowhere": int(self.nowhere),
            "foreign": int(self.foreign),
            "nobody": int(self.nobody),
            "first": self.first,
            "most_uses": self.most,
            "secret_descriptors": self.secret,
        }

    def task(self) -> str:
        errno = {
            name: f"`-{Errno(self.parameters[name]).name}` (-{self.parameters[name]})"
            for name in ("flags", "nowhere", "foreign", "nobody")
        }
        order = "the flags before the frame" if self.first == "flags" else "the frame before the flags"
        secret = (
            "A frame that is descriptors may not be read: `take` of it with use 0 is refused."
            if self.secret
            else "A frame that is descriptors may be read: `take` of it with use 0 is granted."
        )
        return (
            "Your hypervisor's rules, for `entry` "
            f"(look at {order}; the first rule that is broken gives the answer):\n\n"
            f"* **Flags**: {errno['flags']} for any of the bits 0x8, 0x10 (caching), 0x80 (superpage), 0x100 (global), "
            f"and for bit {self.bit:#x}, which your hypervisor wants for itself. Also, {_USER_RULES[self.user]}; "
            "the same errno.\n"
            f"* **Frame**: {errno['nowhere']} where `owner` is -3 (the machine has no such frame), "
            f"{errno['nobody']} for -1 (the hypervisor's), -2 (free) and -4 (its domain is gone), "
            f"{errno['foreign']} for another domain than `domid`.\n"
            "* Otherwise an `l1` entry makes a page to be written (6) of its frame if it has the bit RW (0x2), "
            "and a page to be read (0) if not; an `l2` entry makes an l1 table (1).\n\n"
            "For `take` and `drop`:\n\n"
            "* A frame has one type at a time. `take` with another type is refused (-1) "
            "while the count of uses is not 0.\n"
            f"* A frame has at most **{self.most} uses** of its type; one more is refused.\n"
            "* The first use as a table (1 to 4) or as descriptors (5) is answered by 1: "
            "its contents have to be checked. All else that is granted is answered by 0.\n"
            "* Use 0 has no type and no limit. It is a reference all the same, and so is each use of a type.\n"
            f"* {secret}\n"
            "* `drop` answers 1 if that was the last use of the frame's type, plus 2 if there is no reference left."
        )

    # Steps.

    def refused(self, step: Step, rule: str, errno: Errno) -> Step:
        """The step as one that must be answered by an errno."""
        return Step(step.code, -int(errno), rule)

    def bad_bit(self, place: int) -> Step:
        """An entry with the seed's forbidden bit."""
        step = map_page(place, own(1), WRITABLE | self.bit)
        return self.refused(step, f"bit {self.bit:#x} is not for guests", self.flags)

    def theirs(self, place: int) -> Step:
        """A mapping of the neighbour's frame."""
        return self.refused(map_page(place, NEIGHBOUR, WRITABLE), "the frame is the neighbour's", self.foreign)

    def up_to_the_limit(self, page: int, places: Sequence[int]) -> tuple[Step, ...]:
        """As many mappings of a page as there may be, of which its own is the first, and one more."""
        good = [map_page(place, own(page), WRITABLE) for place in places[: self.most - 1]]
        one_more = map_page(places[self.most - 1], own(page), WRITABLE)
        return (*good, self.refused(one_more, f"a frame has at most {self.most} uses", REFUSED_PAGE))

    def guests(self) -> list[Guest]:
        return [
            self.guest("05.1", "new-table", self._new_table()),
            self.guest("05.1", "many-mappings", self.up_to_the_limit(4, range(8))),
            self.guest("05.2", "greedy", (map_page(0, own(2), WRITABLE), self.theirs(1), self.bad_bit(2))),
            self.guest("05.3", "own-table", self._own_table()),
        ]

    def _new_table(self) -> tuple[Step, ...]:
        """A page becomes a table, is used as one, and becomes a page again."""
        return (
            fill(0, {0: own(1), 1: own(2)}).then(OWN.read_only(0)),
            hang(700, own(0)),
            take_out(700),
            OWN.writable(0),
            self.bad_bit(3),
        )

    def _own_table(self) -> tuple[Step, ...]:
        rule = "a page table must not be writable"
        return (
            map_page(0, LEAF, 0x1),
            self.refused(map_page(1, LEAF, WRITABLE), rule, REFUSED_PAGE),
            self.refused(map_page(1, ROOT, WRITABLE), rule, REFUSED_PAGE),
            map_page(1, own(1), WRITABLE),
        )

    def guest(self, check: str, name: str, steps: tuple[Step, ...]) -> Guest:
        """A guest that makes the calls of ``steps`` in order and then shuts itself down."""
        return Guest(check, name, guest_source(steps), steps)

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 05 is a part")

    # Judging.

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        if not run.calls:
            return _failed(guest, f"it could not be built: {run.problem or _violation(run) or run.end()}")
        answers = [event.result for event in run.of(Kind.RETURN)]
        for number, step in enumerate(guest.steps):
            if number >= len(run.calls):
                return _failed(guest, f"step {number + 1} ({step.rule}) was never reached; {run.problem or run.end()}")
            problem = self._problem(step, run, number, answers)
            if problem:
                return _failed(guest, f"first wrong step: {_where(run, number)}\n{problem}")
        if run.domain.shutdown is not Shutdown.POWEROFF:
            return _failed(guest, f"after its last step it should shut down with poweroff; {run.problem or run.end()}")
        return Finding(guest.check, True)

    def _problem(self, step: Step, run: Run, number: int, answers: list[int]) -> str:
        if number >= len(answers):
            return run.problem or "the hypercall was not answered"
        found = answers[number]
        if found != step.result:
            expected, told = _errno(step.result), _history(run, number)
            return f"{step.rule}; expected the answer {expected}, found {_errno(found)}\n{told}"
        if run.violations and number == len(run.calls) - 1:
            return f"{_violation(run)}\n{_history(run, number)}"
        return ""


def _history(run: Run, number: int) -> str:
    """The part's answers in this hypercall, and its last ones before it about the frames concerned."""
    call = run.calls[number]
    end = run.calls[number + 1].asked if number + 1 < len(run.calls) else len(run.questions)
    now = run.questions[call.asked : end]
    frames = {*call.frames, *(question.arguments[0] for question in now if question.method != "entry")}
    before = [item for item in run.questions[: call.asked] if item.method != "entry" and item.arguments[0] in frames]
    lines = [f"asked now: {_listed(now)}"]
    if before:
        lines.append(f"asked before about the same frames: {_listed(before[-_HISTORY:])}")
    return "\n".join(lines)


def _listed(questions: Sequence[Question]) -> str:
    shown = ", ".join(map(str, questions[:_HISTORY]))
    return (shown or "nothing") + (", ..." if len(questions) > _HISTORY else "")


def _violation(run: Run) -> str:
    if not run.violations:
        return ""
    return f"the auditor after it: {run.violations[0].invariant.name}: {run.violations[0]}"


def _where(run: Run, number: int) -> str:
    calls = run.of(Kind.HYPERCALL)
    at = f"instruction {calls[number].time}, eip {calls[number].eip - 2:#010x}" if number < len(calls) else ""
    return f"hypercall {number + 1}, {at}\n{run.calls[number].text}"


def _errno(result: int) -> str:
    known = result < 0 and -result in {errno.value for errno in Errno}
    return f"-{Errno(-result).name} ({result})" if known else str(result)


def _failed(guest: Guest, message: str) -> Finding:
    return Finding(guest.check, False, f"guest {guest.name!r}: {message}")


def lesson(seed: int) -> Validator:
    """The exercise for a seed."""
    return Validator(seed)


__all__ = ["Validator", "lesson"]
