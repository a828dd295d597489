"""Exercise 07: the page-fault bounce, and the frames of all other exceptions, by an agreement that the seed chooses.

Guests whose kernels keep to the agreement page memory in on demand.  Every answer is read as such a kernel reads it:
word by word, and compared with what was so when the exception was raised.  Where one goes wrong, later ones are not
looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xenlab.abi.numbers import Shutdown
from xenlab.grading.bounce_slot import Bounced
from xenlab.grading.guests import BOUNCE, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.agreement import IN_FRAME, Agreement
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.grading.lessons.bounce_guests import KERNEL, NOTHING, NOWHERE, WINDOW, Kernel, Touch, source
from xenlab.machine.state import AC, ARITHMETIC, DF, ID, IF, RF, TF
from xenlab.machine.vectors import vector_name

NT = 0x4000
# The flags that are looked at in a handler; the others are not the guest's.
_FLAGS = ARITHMETIC | TF | DF | NT | RF | AC | ID
_PAGE, _WORD, _U32, _INT_BYTES = 4096, 4, 0xFFFF_FFFF, 2
_MOST_EXCEPTIONS = 100


class PageFaultBounce:
    """An agreement about frames that is nobody else's."""

    number = "07"
    title = "The page-fault bounce"
    slot = Slot(BOUNCE, ("MyBounce",))
    plan = (
        Plan("07.1", 3, "a page-fault handler finds the address and every word where the agreement puts them"),
        Plan("07.2", 3, "every other exception has its own frame, on the stack where it belongs"),
        Plan("07.3", 2, "the event mask and the flags are saved, and set for the handler, as agreed"),
        Plan("07.4", 2, "what cannot be delivered ends the guest, and nothing is written", needs="07.1"),
    )

    def __init__(self, seed: int) -> None:
        self.agreement = Agreement.chosen(Choices(seed, self.number))
        self.parameters: dict[str, Any] = self.agreement.parameters()

    def task(self) -> str:
        return self.agreement.task()

    def guests(self) -> list[Guest]:
        return [
            self.guest("07.1", "pager", (read(3, "b"), read(0, "o"), Touch(f"mov [{NOWHERE}], eax"), read(3, "b"))),
            self.guest("07.2", "mixed", (Touch("ud2", KERNEL), Touch("cli"), Touch("int 0x81"))),
            self.guest("07.3", "masked", (Touch("ud2", KERNEL, setup=mask(1)), Touch("ud2", KERNEL, setup=mask(0)))),
            self.guest("07.4", "no-stack", (read(1, "b", KERNEL), ended("ud2")), on_stack("0x1000")),
        ]

    def guest(self, check: str, name: str, steps: tuple[Touch, ...], kernel: Kernel | None = None) -> Guest:
        """A guest that takes the steps, those of ring 1 first."""
        kernel = replace(kernel or Kernel(), only_faults=check == "07.1")
        return Guest(check, name, source(self.agreement, steps, kernel), steps)

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 07 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        for asked in run.bounced[:_MOST_EXCEPTIONS]:
            problem = self._problem(asked) if asked.said else run.problem
            if problem:
                where = run.step(asked.time, _instruction(asked))
                return _failed(guest, f"first wrong step: {where}\n{_told(asked)}\n{problem}")
        expected = "".join(step.letter for step in guest.steps)
        if _ENDED in expected:
            last = run.bounced[-1] if run.bounced else None
            good = last is not None and last.said and last.answer is None and run.domain.crashed
            return Finding(guest.check, True) if good else _failed(guest, f"it should have ended; {run.end()}")
        if run.domain.shutdown is not Shutdown.POWEROFF or run.domain.console != expected:
            said = f"expected {expected!r} on its console, found {run.domain.console!r}"
            return _failed(guest, f"{said}; {run.problem or run.end()}")
        return Finding(guest.check, True)

    def _problem(self, asked: Bounced) -> str:
        """What is wrong with an answer, empty if nothing is."""
        ring, to_ring = asked.registers["cs"] & 3, asked.gate["cs"] & 3
        names = self.agreement.names(asked.trap, outer=to_ring < ring)
        why_not = _undeliverable(asked, len(names))
        if why_not:
            return f"{why_not}: expected None, found a frame" if asked.answer is not None else ""
        if asked.answer is None:
            return "it can be delivered, and the answer was None"
        return next((each for each in self._differences(asked, asked.answer, names) if each), "")

    def _differences(self, asked: Bounced, answer: Mapping[str, Any], names: list[str]) -> Iterator[str]:
        words, masked = answer["words"], asked.kernel["event_mask"]
        if len(words) != len(names):
            yield f"the frame has to be {' '.join(names)} from the lowest address up; found {len(words)} words"
        for place, (name, found, right) in enumerate(zip(names, words, self._right(asked, names), strict=True)):
            if found != right:
                yield f"word {place} from below is {name}: expected {right:#x}, found {found:#x}"
        yield from _registers(asked, answer["registers"], self._entered(asked, len(names)))
        yield from self._shared(asked, answer.get("shared", {}))
        after = masked | asked.gate["masks_events"]
        if answer.get("event_mask", masked) != after:
            yield f"in the handler the event mask has to be {after}, it is {1 - after}"

    def _right(self, asked: Bounced, names: list[str]) -> list[int]:
        """What the words have to be."""
        masked, flags = asked.kernel["event_mask"], asked.registers["eflags"]
        truth = dict(asked.registers) | {"eflags": flags & ~IF if masked else flags | IF}
        truth[self.agreement.mask_word] |= masked << self.agreement.mask_bit
        filler = self.agreement.no_error[0] if self.agreement.no_error else 0
        truth |= {"error": asked.trap.get("error", filler), "address": asked.trap.get("address", 0)}
        return [truth[name] for name in names]

    def _entered(self, asked: Bounced, words: int) -> dict[str, int]:
        """The registers that a handler has to find."""
        inwards = asked.gate["cs"] & 3 < asked.registers["cs"] & 3
        stack = asked.kernel if inwards else asked.registers
        cleared = TF | NT | RF | AC | (DF if self.agreement.clears_direction else 0)
        return {
            "eip": asked.gate["eip"],
            "cs": asked.gate["cs"],
            "esp": stack["esp"] - _WORD * words & _U32,
            "ss": stack["ss"],
            "eflags": asked.registers["eflags"] & ~cleared,
        }

    def _shared(self, asked: Bounced, shared: Mapping[int, int]) -> Iterator[str]:
        place = self.agreement.address
        right: dict[Any, int] = {place: asked.trap["address"]} if "address" in asked.trap and place != IN_FRAME else {}
        for offset, value in right.items():
            if shared.get(offset) != value:
                yield f"word {offset} of the shared page has to be the address, {value:#x}; found {shared}"
        extra = set(shared) - set(right)
        if extra:
            yield f"a word at offset {min(extra)} of the shared page, where the agreement has none"


_ENDED = "\0"


def read(page: int, letter: str, ring: int = 3) -> Touch:
    """A step that reads a page of the window, which holds ``letter`` once it is there."""
    return Touch(f"mov eax, [{WINDOW + _PAGE * page:#x}]", ring, letter)


def ended(code: str, ring: int = 3, setup: str = "") -> Touch:
    """A step that has to end the guest."""
    return Touch(code, ring, _ENDED, setup)


def on_stack(esp: str, ss: str = "FLAT_RING1_SS", **other: Any) -> Kernel:
    """A kernel that names this stack for entries from ring 3."""
    return Kernel(stack=(ss, esp), **other)


def mask(value: int) -> str:
    """Instructions by which the kernel masks its events, or no longer does."""
    return f"mov byte ptr [shared_info + 1], {value}"


def _undeliverable(asked: Bounced, words: int) -> str:
    """Why there can be no frame; empty if there can."""
    ring, to_ring = asked.registers["cs"] & 3, asked.gate["cs"] & 3
    stack = asked.kernel if to_ring < ring else asked.registers
    if to_ring > ring:
        return f"the handler is in ring {to_ring}, outside ring {ring}"
    if stack["ss"] & 3 != to_ring:
        return f"the kernel's stack has the selector {stack['ss']:#x}, and the handler is in ring {to_ring}"
    if asked.room < words:
        return f"of the {words} words below {stack['esp']:#010x}, ring {to_ring} may write {asked.room or 'none'}"
    return ""


def _registers(asked: Bounced, found: Mapping[str, int], right: Mapping[str, int]) -> Iterator[str]:
    for name, value in right.items():
        looked_at = _FLAGS if name == "eflags" else _U32
        if (found[name] ^ value) & looked_at:
            yield f"in the handler {name.upper()} has to be {value & looked_at:#x}, it is {found[name] & looked_at:#x}"


def _instruction(asked: Bounced) -> int:
    """Where the instruction begins: INT leaves EIP behind it."""
    return asked.registers["eip"] - (_INT_BYTES if asked.trap["vector"] > 31 else 0)


def _told(asked: Bounced) -> str:
    trap, masked = asked.trap, "masked" if asked.kernel["event_mask"] else "not masked"
    error = f" with error code {trap['error']:#x}" if "error" in trap else ""
    place = f" at address {trap['address']:#x}" if "address" in trap else ""
    rings = f"from ring {asked.registers['cs'] & 3} to ring {asked.gate['cs'] & 3}"
    return f"{vector_name(trap['vector'])}{error}{place}, {rings}, events {masked}"


def _failed(guest: Guest, message: str) -> Finding:
    return Finding(guest.check, False, f"guest {guest.name!r}: {message}")


def lesson(seed: int) -> PageFaultBounce:
    """The exercise for a seed."""
    return PageFaultBounce(seed)


__all__ = ["NOTHING", "PageFaultBounce", "ended", "lesson", "mask", "on_stack", "read"]
