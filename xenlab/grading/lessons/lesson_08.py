"""Exercise 08: send, unmask and block, with bits whose meaning the seed chooses.

Groups of another size than 32, a mask of either sense, ports that are insistent and ports that are quiet: a handful of
rules, each of which is a way to lose an event.  Guests race with each other, and the first answer that is not the right
one is named, with what came of it in the judge's run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xenlab.grading.event_slot import RECEIVER, EventQuestion, EventRules, differences, effect, in_python
from xenlab.grading.guests import EVENT_BITS, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.grading.lessons.event_guests import Race
from xenlab.hypervisor.domain import RunState
from xenlab.hypervisor.event_bits import bits_of
from xenlab.hypervisor.trace import Kind

# None of them divides 32, so that no group is a word of Xen's or a part of one.
_GROUPS = (3, 5, 6, 7, 9)
_EVERY = (3, 4, 5)
_LAST_PORT = 45
_INT_BYTES = 2
LOUD, INSISTENT, QUIET = "loud", "insistent", "quiet"
# A wrong answer to another question costs where that one is judged.
_JUDGED = {"08.1": ("send",), "08.2": ("send", "unmask"), "08.3": ("send", "unmask", "block")}
_STEPS = {"send": "an event is sent", "unmask": "the guest has a port unmasked", "block": "the guest wants to sleep"}


class SendMaskBlock:
    """The meaning of selector and mask, and two kinds of ports that have rules of their own."""

    number = "08"
    title = "Send, mask, block"
    plan = (
        Plan("08.1", 4, "an event at an open port gets as far as it has to, and no further"),
        Plan("08.2", 3, "what comes while a port is closed waits, and goes on when it is opened"),
        Plan("08.3", 3, "no guest sleeps over an event, and none is woken for nothing", needs="08.1"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        every = choices.pick("every", _EVERY)
        insistent, quiet = choices.sample("kinds", range(every), 2)
        self.rules = EventRules(
            choices.pick("group", _GROUPS), choices.number("open is 1", 0, 1), every, insistent, quiet
        )
        self.parameters: dict[str, Any] = {
            "group": self.rules.group,
            "open": self.rules.open_is_1,
            "every": every,
            "insistent": insistent,
            "quiet": quiet,
        }
        self._choices = choices
        self._races: dict[str, Race] = {}
        self._public = self._make_public()

    @property
    def slot(self) -> Slot:
        """Where the part goes; the scenarios are those of the guests that were made so far."""
        scenarios = {name: race.scenario for name, race in self._races.items()}
        return Slot(EVENT_BITS, ("MyEventBits",), scenarios=scenarios)

    def task(self) -> str:
        rules = self.rules
        means = "open, and 0 that it is closed" if rules.open_is_1 else "closed, and 0 that it is open"
        group = rules.group
        return (
            "The bits of your hypervisor:\n\n"
            f"* **Selector.** A bit stands for a group of {group} ports: bit 0 for the ports 0 to {group - 1}, bit 1 "
            f"for {group} to {2 * group - 1}, and so on. (A word of `pending` and `mask` still has 32 ports.)\n"
            f"* **Mask.** A bit that is 1 says that its port is {means}.\n"
            f"* **Insistent** are the ports whose number leaves a remainder of {rules.insistent} when it is divided by "
            f"{rules.every}.\n"
            f"* **Quiet** are those that leave a remainder of {rules.quiet}.\n\n"
            "What becomes of an event:\n\n"
            "1. `send` sets the port's `pending` bit. If that was 1 already, the event goes no further, "
            "unless the port is insistent.\n"
            "2. If the port is closed, it goes no further.\n"
            "3. It sets the `selector` bit of the port's group. Here it goes on even if that was 1 already: "
            "a quiet port of the same group may have set it.\n"
            "4. If the port is quiet and the guest is not asleep, it goes no further.\n"
            "5. It sets `upcall` to 1, and wakes the guest if that is asleep.\n\n"
            "`unmask` opens the port. If it was closed until now and its `pending` bit is 1, the event goes on with "
            "step 3. (Who asks for it is awake.) If the port was open, nothing else happens.\n\n"
            "`block`: the guest may sleep if `selector` and `upcall` are 0. If `upcall` is 0 and `selector` is not, "
            "a quiet event waits: set `upcall` to 1, so that it is told now, and do not let it sleep."
        )

    def ports(self, kind: str, count: int, name: str = "ports") -> list[int]:
        """Different ports of one kind, in a seeded order, none of which Xen's rules would put into the right group."""
        first = self.rules.group
        fits = [port for port in range(first, _LAST_PORT) if self.kind(port) == kind and port // first != port // 32]
        return self._choices.sample(f"{name}.{kind}", fits, count)

    def kind(self, port: int) -> str:
        """What a port is."""
        return INSISTENT if self.rules.is_insistent(port) else QUIET if self.rules.is_quiet(port) else LOUD

    def pick_turn(self, name: str) -> int:
        """A seeded number of instructions, so few that turns end at any of them."""
        return self._choices.number(f"turn.{name}", 2, 9)

    def race(self, name: str, ports: Sequence[int], turn: int) -> Race:
        """A new pair of guests between which these ports are bound."""
        made = self._races[name] = Race(self.rules, ports, turn)
        return made

    def guest(self, check: str, name: str) -> Guest:
        """The guests of a race that is written."""
        asked = self._races[name].asked
        return Guest(
            check, name, self._races[name].source(), tuple((q, asked[q]) for q in _JUDGED[check] if q in asked)
        )

    def guests(self) -> list[Guest]:
        return self._public

    def _make_public(self) -> list[Guest]:
        (loud, other), (quiet,) = self.ports(LOUD, 2), self.ports(QUIET, 1)
        self.race("busy", (loud, other), 40).takes().works(150).sends(loud, other, loud, loud, pause=12)
        closing = self.race("closing", (loud, other), 25).closes(loud).takes().works(40).opens(loud).works(30)
        closing.sends(other, loud, loud, pause=6)
        sleeper = self.race("sleeper", (loud, quiet), 30).blocks().works(5).blocks()
        sleeper.sends(loud, quiet, loud, pause=60)
        return [self.guest("08.1", "busy"), self.guest("08.2", "closing"), self.guest("08.3", "sleeper")]

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 08 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        judged = [asked for asked in run.event_questions if asked.question in _JUDGED[guest.check]]
        for asked in judged:
            problem = self._problem(asked, run)
            if problem:
                where = run.step(asked.time, asked.eip - _INT_BYTES)
                return _failed(guest, f"first wrong step: {where}\n{_STEPS[asked.question]}; {problem}")
        for question, times in guest.steps:
            found = sum(asked.question == question for asked in judged)
            if found < times:
                return _failed(guest, f"{question} was asked {found} times of {times}; {run.problem or run.end()}")
        if guest.check == "08.3" and run.domain.vcpus[0].run_state is not RunState.BLOCKED:
            return _failed(
                guest, f"all answers were right, and yet it does not sleep at last; {run.problem or run.end()}"
            )
        return Finding(guest.check, True)

    def _problem(self, asked: EventQuestion, run: Run) -> str:
        if asked.answer is None:
            return run.problem
        right = self.rules.right(asked.question, asked.told)
        wrong = differences(asked, right)
        if not wrong:
            return ""
        about = f" (port {asked.told[0]} is {self.kind(asked.told[0])})" if asked.question != "block" else ""
        said = f"{in_python(asked.question, asked.told)}{about}\nanswered {dict(asked.answer)}: {'; '.join(wrong)}"
        return f"{said}\n{_invariant(asked, effect(asked.question, asked.told, right))}{self._end(run)}"

    def _end(self, run: Run) -> str:
        """What came of it, as far as it shows at the end of the run."""
        bits, domain = bits_of(run.xen, run.domain), run.domain
        if domain.crashed:
            return f"\nin the end: {run.end()}"
        asleep = domain.vcpus[0].run_state is RunState.BLOCKED
        sent = sorted({event.port for event in run.of(Kind.EVENT) if event.domain == RECEIVER})
        served = {port: _word(run, f"served{port}") for port in sent}
        waits = [port for port in sent if bits.pending >> port & 1 and not self.rules.is_insistent(port)]
        waits = [port for port in waits if self.rules.is_open(port % 32, bits.mask >> port // 32 * 32)]
        said = [f"port {port} was never served" for port in sent if not served[port]]
        if asleep and waits:
            said.append(f"the guest sleeps over open ports with their bits set: {', '.join(map(str, waits))}")
        return f"\nin the end: {'; '.join(said)}" if said else ""


def _invariant(asked: EventQuestion, wanted: dict[str, int]) -> str:
    """Which promise an answer breaks."""
    assert asked.answer is not None
    found = effect(asked.question, asked.told, asked.answer)
    if any(found[name] != wanted[name] for name in ("pending", "mask") if name in wanted):
        return "broken: a port's own bits say what was sent to it, and whether it is open"
    if found.get("sleep", False) and not wanted.get("sleep", False):
        return "broken: nobody goes to sleep over an event"
    if wanted.get("wake", False) and not found["wake"]:
        return "broken: an event at an open port wakes a guest that sleeps"
    if found["upcall"] < wanted["upcall"] or wanted.get("selector", 0) & ~found.get("selector", 0):
        return "broken: no event is lost"
    return "broken: nobody is called, selected, woken or kept awake for nothing"


def _word(run: Run, label: str) -> int:
    at = run.domain.symbols.get(label)
    return run.xen.guest_memory.read_word(run.domain.vcpus[0], at) if at is not None else 0


def _failed(guest: Guest, message: str) -> Finding:
    return Finding(guest.check, False, f"guest {guest.name!r}: {message}")


def lesson(seed: int) -> SendMaskBlock:
    """The exercise for a seed."""
    return SendMaskBlock(seed)


__all__ = ["INSISTENT", "LOUD", "QUIET", "SendMaskBlock", "lesson"]
