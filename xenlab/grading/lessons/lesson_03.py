"""Exercise 03: a hypercall and its argument checks, by rules that the seed chooses.

Guests make the call with good and with bad arguments, and after each call write the memory round it
to their console.  A step says what the call answers and what has changed in that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xenlab.abi.numbers import Errno, Shutdown
from xenlab.abi.structures import StartInfo
from xenlab.grading.guests import HYPERCALL, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.hypervisor.trace import Kind

AREA, SOURCE, TARGET = 1024, 64, 512
_TRANSFORMS: dict[str, Callable[[bytes, int], bytes]] = {
    "reversed, then each XORed with {key:#x}": lambda data, key: bytes(byte ^ key for byte in reversed(data)),
    "each plus {key:#x}, modulo 256": lambda data, key: bytes(byte + key & 0xFF for byte in data),
    "each subtracted from {key:#x}, modulo 256": lambda data, key: bytes(key - byte & 0xFF for byte in data),
}
_RESULTS: dict[str, Callable[[bytes], int]] = {
    "the sum of the source's bytes": sum,
    "the largest byte of the source": max,
    "the source's first byte times 256 plus its last": lambda data: data[0] << 8 | data[-1],
}


@dataclass(frozen=True, slots=True)
class Step:
    """One hypercall of a guest.

    Attributes:
        source, length, target: its arguments as assembly operands.
        result: what it has to answer.
        written: what it has to write, and where in the area; None for nothing.
        rule: the rule of the task that says so.
    """

    source: str
    length: int
    target: str
    result: int
    rule: str
    written: tuple[int, bytes] | None = None


class ArgumentChecks:
    """A copy that transforms, with a limit, an alignment and errnos of its own."""

    number = "03"
    title = "A hypercall and its argument checks"
    plan = (
        Plan("03.1", 4, "a good call writes the transformed bytes to the target, answers the result, and no more"),
        Plan("03.2", 3, "a bad length, alignment or overlap answers its errno and writes nothing", needs="03.1"),
        Plan("03.3", 3, "whatever the pointers, the call answers -EFAULT and writes nothing", needs="03.1"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        self.call = choices.number("number", 40, 55)
        self.slot = Slot(HYPERCALL, ("MyHypercall",), self.call)
        self.limit = choices.pick("limit", (48, 64, 96, 128))
        self.align = choices.pick("align", (4, 8, 16))
        self.key = choices.number("key", 0x11, 0xEE)
        self.transform_words = choices.pick("transform", tuple(_TRANSFORMS))
        self.result_words = choices.pick("result", tuple(_RESULTS))
        errnos = choices.sample("errnos", (Errno.E2BIG, Errno.EINVAL, Errno.ENOSPC, Errno.EBUSY, Errno.EACCES), 3)
        self.too_long, self.misaligned, self.overlap = errnos
        self.area = bytes(choices.number(f"byte{at}", 1, 255) for at in range(AREA))
        self.parameters: dict[str, Any] = {
            "number": self.call,
            "limit": self.limit,
            "align": self.align,
            "key": self.key,
            "transform": self.transform_words.format(key=self.key),
            "result": self.result_words,
            "too_long": int(self.too_long),
            "misaligned": int(self.misaligned),
            "overlap": int(self.overlap),
        }

    def task(self) -> str:
        errno = {name: f"`-{number.name}` (-{int(number)})" for name, number in self._errnos().items()}
        return (
            f"Hypercall {self.call}: EBX is the source's address, ECX the length in bytes, EDX the target's address. "
            "Take the checks in this order; the first that fails gives the answer, and nothing is written.\n\n"
            "1. Length 0: answer 0, write nothing.\n"
            f"2. More than {self.limit} bytes: {errno['too_long']}.\n"
            f"3. The target's address is not a multiple of {self.align}: {errno['misaligned']}.\n"
            "4. The source cannot be read, all of it: `-EFAULT` (-14).\n"
            f"5. Source and target have a byte in common: {errno['overlap']}.\n\n"
            f"Otherwise write the source's bytes, {self.parameters['transform']}, to the target, "
            f"and answer {self.result_words}. (A target that cannot be written becomes -EFAULT without your doing.)"
        )

    def _errnos(self) -> dict[str, Errno]:
        return {"too_long": self.too_long, "misaligned": self.misaligned, "overlap": self.overlap}

    def good(self, length: int, source: int = SOURCE, target: int = TARGET) -> Step:
        """A call that succeeds; places are offsets in the area that no step before has written to."""
        data = self.area[source : source + length]
        written = _TRANSFORMS[self.transform_words](data, self.key)
        result = _RESULTS[self.result_words](data) if data else 0
        rule = f"good arguments, length {length}"
        return Step(f"offset area + {source}", length, f"offset area + {target}", result, rule, (target, written))

    def bad(
        self, rule: str, errno: Errno, source: int | str = SOURCE, length: int = 16, target: int | str = TARGET
    ) -> Step:
        """A call that fails; places are offsets in the area, or operands."""
        places = [f"offset area + {at}" if isinstance(at, int) else at for at in (source, target)]
        return Step(places[0], length, places[1], -errno, rule)

    def guests(self) -> list[Guest]:
        return [
            self.guest("03.1", "friendly", (self.good(16),)),
            self.guest("03.2", "long", (self.bad("longer than the limit", self.too_long, length=self.limit + 1),)),
            self.guest("03.3", "wild", (self.bad("a source that is not there", Errno.EFAULT, "0x10"), self.good(5))),
        ]

    def guest(self, check: str, name: str, steps: tuple[Step, ...]) -> Guest:
        """A guest that makes the calls in order and then shuts itself down."""
        return Guest(check, name, self._assembly(steps), steps)

    def _assembly(self, steps: tuple[Step, ...]) -> str:
        lines = [f"start: mov eax, [esi + {StartInfo.pt_base.offset}]", "mov [page_table], eax"]
        for step in steps:
            lines += [f"mov ebx, {step.source}", f"mov ecx, {step.length}", f"mov edx, {step.target}"]
            lines += [f"mov eax, {self.call}", "int 0x82", "call show"]
        data = "\n".join(f".byte {', '.join(map(str, self.area[at : at + 64]))}" for at in range(0, AREA, 64))
        return "\n".join(lines) + _EPILOGUE.format(area=AREA) + data

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 03 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        calls = [event for event in run.of(Kind.HYPERCALL) if event.number == self.call]
        answers = [event.result for event in run.of(Kind.RETURN) if event.number == self.call]
        shown = [event.data for event in run.of(Kind.CONSOLE)]
        area = bytearray(self.area)
        for number, step in enumerate(guest.steps):
            if number >= len(calls):
                return _failed(guest, f"call {number + 1} ({step.rule}) was never reached; {run.end()}")
            if number < len(answers) and step.written:
                area[step.written[0] : step.written[0] + len(step.written[1])] = step.written[1]
            problem = self._problem(step, answers[number:], shown[number:], area) or ""
            if problem:
                problem = run.problem if number >= len(answers) and run.problem else problem
                where = run.step(calls[number].time, calls[number].eip - 2)
                return _failed(
                    guest, f"first wrong step: {where}\n{_arguments(calls[number].registers)}: {step.rule}; {problem}"
                )
        if run.domain.shutdown is not Shutdown.POWEROFF:
            return _failed(guest, f"after its last call it should shut down with poweroff; {run.end()}")
        return Finding(guest.check, True)

    def _problem(self, step: Step, answers: list[int], shown: list[bytes], area: bytearray) -> str:
        if not answers or not shown:
            return "the call was not answered"
        # A guest sees 32 bits: 0xfffffff2 is -14.
        if (answers[0] ^ step.result) & 0xFFFF_FFFF:
            return f"expected the answer {step.result}, found {answers[0]}"
        wrong = next((at for at, pair in enumerate(zip(area, shown[0], strict=False)) if pair[0] != pair[1]), None)
        if wrong is None:
            return ""
        place = f"target + {wrong - TARGET}" if wrong >= TARGET else f"source + {wrong - SOURCE}"
        return f"the byte at {place} should be {area[wrong]:#04x}, found {shown[0][wrong]:#04x}"


def _arguments(registers: tuple[int, ...]) -> str:
    _eax, ecx, edx, ebx, *_ = registers
    return f"source {ebx:#x}, length {ecx:#x}, target {edx:#x}"


def _failed(guest: Guest, message: str) -> Finding:
    return Finding(guest.check, False, f"guest {guest.name!r}: {message}")


_EPILOGUE = """
 mov ebx, SCHEDOP_shutdown
 mov ecx, offset reason
 mov eax, __HYPERVISOR_sched_op
 int 0x82
show: mov ebx, CONSOLEIO_write
 mov ecx, {area}
 mov edx, offset area
 mov eax, __HYPERVISOR_console_io
 int 0x82
 ret
reason: .long SHUTDOWN_poweroff
page_table: .long 0
.align 4096
area:
"""


def lesson(seed: int) -> ArgumentChecks:
    """The exercise for a seed."""
    return ArgumentChecks(seed)
