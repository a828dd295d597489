"""Exercise 00: a guest that prints its name.

The answer is assembly source.  It runs on the judge's machine, which knows nothing of it but
its console, its hypercalls and how it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xenlab.abi.numbers import ConsoleIo, Hypercall, Shutdown
from xenlab.errors import XenlabError
from xenlab.grading.decisions import Recorder
from xenlab.grading.guests import Run, Slot, image_from_source, run
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.hypervisor.trace import Event, Kind

_NAMES = ("alder", "birch", "cedar", "elder", "hazel", "juniper", "larch", "maple", "rowan", "willow")
_GREETINGS = ("hello", "good morning", "ahoy", "salve", "moin", "hej", "ciao", "servus")
_FORMS = ("{n}: {greeting} from {name}", "{greeting} from {name}, line {n}", "{name} ({n}): {greeting}")
_REASONS = (Shutdown.REBOOT, Shutdown.SUSPEND, Shutdown.WATCHDOG, Shutdown.SOFT_RESET)
_BUDGET = 200_000


class PrintItsName:
    """A seeded greeting, a number of lines, and a reason to shut down with."""

    number = "00"
    title = "A guest that prints its name"
    slot = Slot("", ("source",))
    plan = (
        Plan("00.1", 2, "the guest's first line on the console is its greeting"),
        Plan("00.2", 4, "the console holds the lines of the task, in order, and nothing else"),
        Plan("00.3", 2, "each line is one console_io call", needs="00.1"),
        Plan("00.4", 2, "the guest ends itself with the reason of the task", needs="00.1"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        count = choices.number("count", 4, 8)
        first = choices.number("first", 0, 9 - count)
        step = choices.pick("direction", (1, -1))
        numbers = range(first, first + count)[::step]
        name = f"{choices.pick('name', _NAMES)}-{choices.number('number', 10, 99)}"
        form, greeting = choices.pick("form", _FORMS), choices.pick("greeting", _GREETINGS)
        self.lines = [form.format(n=n, greeting=greeting, name=name) for n in numbers]
        self.reason = choices.pick("reason", _REASONS)
        self.parameters: dict[str, Any] = {"lines": list(self.lines), "reason": self.reason.name.lower()}

    def task(self) -> str:
        shown = "\n".join(self.lines)
        return (
            f"Write a guest whose console shows exactly these {len(self.lines)} lines:\n\n```\n{shown}\n```\n\n"
            "Each line ends with a newline and is one `console_io` call. Let the guest change the digit itself, "
            f"in a loop. Then it shuts down with the reason `SHUTDOWN_{self.reason.name.lower()}`."
        )

    def guests(self) -> list[Guest]:
        return []

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        raise NotImplementedError("the answer of exercise 00 is a guest itself")

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        source = answer.get("source")
        if not isinstance(source, str):
            problem = f"`source` must be a string of assembly, found {type(source).__name__}"
            return [Finding(planned.id, False, problem) for planned in self.plan]
        try:
            done = run(image_from_source(source), self.slot, Recorder(), budget=_BUDGET)
        except XenlabError as problem:
            return [Finding(planned.id, False, f"the guest could not be built: {problem}") for planned in self.plan]
        return [self._first_line(done), self._all_lines(done), self._calls(done), self._end(done)]

    def _first_line(self, done: Run) -> Finding:
        found = done.domain.console.split("\n")[0]
        message = f"expected {self.lines[0]!r}, found {found!r:.200}\n{self._where(done)}"
        return Finding("00.1", found == self.lines[0], message)

    def _all_lines(self, done: Run) -> Finding:
        found = done.domain.console
        whole = "".join(line + "\n" for line in self.lines)
        message = f"expected {len(self.lines)} lines, found {found.count(chr(10))}\n{self._where(done)}"
        return Finding("00.2", found == whole, message)

    def _calls(self, done: Run) -> Finding:
        wrote = done.of(Kind.CONSOLE)
        for number, event in enumerate(wrote):
            if event.data.count(b"\n") != 1 or not event.data.endswith(b"\n"):
                where = f"call {number + 1} wrote {event.data!r:.120}\n{_at(done, event)}"
                return Finding("00.3", False, f"expected one whole line a call; {where}")
        message = f"expected {len(self.lines)} calls, found {len(wrote)}"
        return Finding("00.3", len(wrote) == len(self.lines), message)

    def _end(self, done: Run) -> Finding:
        expected = f"expected it to shut down with {self.reason.name.lower()}; {done.end()}"
        if done.domain.shutdown is None:
            state = done.domain.vcpus[0].state
            expected += f"\nlast seen at {done.step(done.xen.now, state.eip)}"
        return Finding("00.4", done.domain.shutdown is self.reason, expected)

    def _where(self, done: Run) -> str:
        """The first call after which the console is not what it should be."""
        whole = "".join(line + "\n" for line in self.lines).encode()
        shown = b""
        for event in done.of(Kind.CONSOLE):
            shown += event.data
            if not whole.startswith(shown):
                at = next(
                    (n for n, pair in enumerate(zip(shown, whole, strict=False)) if pair[0] != pair[1]), len(whole)
                )
                wrong = f"wrong from byte {at} on: expected {whole[at:][:24]!r}, found {shown[at:][:24]!r}"
                return f"{_at(done, event)}\n{wrong}"
        written = "what was written is right but not all" if shown else "nothing was written"
        return self._refused(done) or f"{written}; {done.end()}"

    def _refused(self, done: Run) -> str:
        for call, answer in zip(done.of(Kind.HYPERCALL), done.of(Kind.RETURN), strict=False):
            if call.number == Hypercall.console_io and answer.result:
                place = f"{done.step(call.time, call.eip - 2)}\n"
                _eax, ecx, edx, ebx, *_ = call.registers
                given = f"with command {ebx} (write is {int(ConsoleIo.WRITE)}), length {ecx:#x}, address {edx:#x}"
                return f"first wrong step: {place}console_io {given} answered {answer.result}"
        return ""


def _at(done: Run, event: Event) -> str:
    calls = [call for call in done.of(Kind.HYPERCALL) if call.time <= event.time]
    return f"first wrong step: {done.step(event.time, calls[-1].eip - 2)}" if calls else ""


def lesson(seed: int) -> PrintItsName:
    """The exercise for a seed."""
    return PrintItsName(seed)
