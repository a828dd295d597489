"""Exercise 06: the flush decision, with a clock and stamps whose rules the seed chooses.

What a part is told leaves it in doubt about some flushes.  One that may be needed has to be made: a guest stores
through the translation that was left, and the auditor sees what it did.  One that cannot be needed must not be made:
it is counted.  A step says how a question comes about; the right answer follows from what the part was told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xenlab.abi.numbers import Shutdown
from xenlab.grading.flush_slot import NEVER, NOT_MAPPED, Asked, FlushClock, told
from xenlab.grading.guests import FLUSH_POLICY, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.grading.lessons.flush_guests import LANDED, STOPPED, Step, Story
from xenlab.hypervisor.auditor import audit
from xenlab.hypervisor.tlb import FREED, RETYPED

# Primes, so that the clock never begins again just when a copy of it is brought up to date.
_TOPS = (11, 13, 17, 19, 23)
_BEHIND = (2, 3, 4, 5)
_DIRECTIONS = ("up", "down")
_INT_BYTES = 2


class FlushDecision:
    """A short clock, going up or down, and stamps that lag behind it by more for one reason than for the other."""

    number = "06"
    title = "The flush decision"
    plan = (
        Plan("06.1", 4, "no page table is stored to through a translation from before it was one"),
        Plan("06.2", 3, "no frame that was given up is stored to through a translation that was left"),
        Plan("06.3", 3, "each flush that may be needed is made, and not one more", needs="06.1"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        top = choices.pick("top", _TOPS)
        self.direction = choices.pick("direction", _DIRECTIONS)
        retyped, freed = choices.sample("behind", _BEHIND, 2)
        self.clock = FlushClock(top, self.direction == "down", retyped, freed)
        self.slot = Slot(FLUSH_POLICY, ("MyFlushPolicy",), rules=(top, int(self.clock.down), retyped, freed))
        self.parameters: dict[str, Any] = {
            "top": top,
            "direction": self.direction,
            "every": {RETYPED: retyped, FREED: freed},
        }

    def task(self) -> str:
        top, every = self.clock.top, self.parameters["every"]
        turn = f"1, 2, … {top}, and after {top} comes 1 again"
        if self.clock.down:
            turn = f"{top}, {top - 1}, … 1, and after 1 comes {top} again"
        return (
            "Your hypervisor's clock and stamps:\n\n"
            "* **The clock** moves on by one with every flush, whoever asked for it. Stamps have little room in the "
            f"frame table, so the clock has only {top} readings: {turn}.\n"
            "* **Copies.** Every CPU of a large machine would write to such a clock, so it is slow to read. When a "
            "mapping goes away, its frame is therefore stamped from two copies of the clock, which may be behind it. "
            f"The copy for `retyped` is set to the clock by every {_nth(every[RETYPED])} flush, the copy for `freed` "
            f"by every {_nth(every[FREED])} flush. Between two such flushes a copy keeps its reading.\n"
            f"* **Never.** The stamp of a frame of which no mapping has ever gone away is {NEVER}, and the clock never "
            f"says {NEVER}.\n\n"
            "`left` is the frame's stamp for the reason that is asked about, `now` is what the clock itself says. "
            "Answer `True` if, by what you are told in this one call, a mapping of the frame **may** have gone away "
            "since the last flush. Answer `False` if that cannot be. "
            "A stamp from a whole turn ago looks like a new one. Nobody can tell the two apart, so flush. "
            "Beyond these, every flush is one too many."
        )

    def guests(self) -> list[Guest]:
        return [
            self.guest("06.1", "thief", self.latest(RETYPED).lag(RETYPED, 0).table()),
            self.guest("06.2", "leaver", self.latest(FREED).lag(FREED, 0).given_up_while_mapped()),
            self.guest("06.3", "patient", self._patient()),
        ]

    def story(self) -> Story:
        """A new guest."""
        return Story(self.clock)

    def latest(self, reason: str) -> Story:
        """A guest whose first mapping goes away when the copy for ``reason`` is as far behind as it can be."""
        story = self.story().lag(reason, self.clock.behind(reason) - 1)
        return story.table() if reason == RETYPED else story.given_up()

    def _patient(self) -> Story:
        story = self.story()
        for reason in (RETYPED, FREED):
            step = story.table if reason == RETYPED else story.given_up
            behind = self.clock.behind(reason)
            story.lag(reason, 0)
            step(behind)
            story.lag(reason, behind - 1)
            step()
        return story

    def guest(self, check: str, name: str, story: Story) -> Guest:
        """The guest of a story."""
        return Guest(check, name, story.source(), tuple(story.steps))

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 06 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        for number, step in enumerate(guest.steps):
            if number >= len(run.flushes):
                return _failed(guest, f"step {number + 1} ({step.story}) was never reached; {run.problem or run.end()}")
            problem = self._problem(guest, run, number)
            if problem:
                asked = run.flushes[number]
                where = run.step(asked.time, asked.eip - _INT_BYTES)
                return _failed(guest, f"first wrong step: {where}\n{step.story}; {_since(asked)}\n{problem}")
        if run.domain.shutdown is not Shutdown.POWEROFF or run.domain.console != STOPPED * len(guest.steps):
            return _failed(guest, f"all answers were right, and yet: {run.problem or run.end()}")
        return Finding(guest.check, True)

    def _problem(self, guest: Guest, run: Run, number: int) -> str:
        asked = run.flushes[number]
        if asked.answer is None:
            return run.problem
        question = told(asked.reason, asked.left, asked.now)
        needed = self.clock.may_be_stale(asked.reason, asked.left, asked.now)
        if needed and not asked.answer:
            return f"{question} must answer True, it answered False\n{_consequence(run, number)}"
        if asked.answer and not needed and guest.check == "06.3":
            return f"{question} must answer False, it answered True: a flush for nothing"
        return ""


def _since(asked: Asked) -> str:
    if asked.since == NOT_MAPPED:
        return "no TLB can hold a translation of it"
    times = {0: "not been emptied", 1: "been emptied once"}.get(asked.since, f"been emptied {asked.since} times")
    return f"the TLB has {times} since then"


def _consequence(run: Run, number: int) -> str:
    """What came of a flush that was left out."""
    if run.flushes[number].since:
        return "this time no translation was left; by what it was told, the part could not know"
    if run.domain.console[number : number + 1] != LANDED:
        return "the guest was stopped all the same: this machine's CPU had dropped the translation by itself"
    violations = audit(run.xen)
    seen = f"; the auditor: {violations[0]}" if violations else ""
    did = "stored" if run.flushes[number].reason == RETYPED else "had the hypervisor write"
    return f"the guest then {did} through the translation that was left{seen}"


def _nth(number: int) -> str:
    return {2: "second", 3: "third", 4: "fourth", 5: "fifth"}[number]


def _failed(guest: Guest, message: str) -> Finding:
    return Finding(guest.check, False, f"guest {guest.name!r}: {message}")


def lesson(seed: int) -> FlushDecision:
    """The exercise for a seed."""
    return FlushDecision(seed)


__all__ = ["FlushDecision", "Step", "lesson"]
