"""Guests that use a student's part, run in the student's process and again in the judge's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xenlab.errors import HypercallError
from xenlab.grading import alarms_slot, balloons, schedules
from xenlab.grading.bounce_slot import Bounced, BounceSlot
from xenlab.grading.decisions import (
    MAX_DECISIONS,
    Decision,
    EmulatorSlot,
    HypercallSlot,
    Recorder,
    Replayer,
    Sink,
    Unusable,
    described,
)
from xenlab.grading.event_slot import MAX_QUESTIONS, EventQuestion, race
from xenlab.grading.flush_slot import Asked, FlushClock, FlushSlot
from xenlab.grading.page_types_slot import MAX_ANSWERS, PageTypesSlot, Question
from xenlab.hypervisor.auditor import Violation
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.machine.disassembler import disassemble
from xenlab.machine.machine import Machine
from xenlab.toolstack import Image, boot, image_from_source
from xenlab.toolstack.image import SOURCE_BASE, SOURCE_HYPERCALL_PAGE, SOURCE_SHARED_INFO, Section

MEMORY_MIB = 4
BUDGET = 60_000
_LONGEST = 15
EMULATOR, HYPERCALL, PAGE_TYPES, BALLOON = "emulator", "hypercall", "page_types", "balloon"
FLUSH_POLICY, EVENT_BITS, BOUNCE = "flush_policy", "event_bits", "bounce"
ALARMS, SCHEDULER = "alarms", "scheduler"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a student's part goes.

    Attributes:
        kind: EMULATOR, HYPERCALL, PAGE_TYPES, BALLOON, FLUSH_POLICY, EVENT_BITS, BOUNCE, ALARMS, SCHEDULER, or empty
            for an exercise whose answer is data.
        names: what the notebook has to define; for a part, the name of its class.
        number: of the hypercall.
        scenarios: of the guests that run with others, by name: `balloons`, `event_slot`, `alarms_slot`, `schedules`.
        rules: of the `FlushClock`.
    """

    kind: str
    names: tuple[str, ...]
    number: int = 0
    scenarios: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: tuple[int, ...] = ()

    @property
    def most_decisions(self) -> int:
        """How often the part may be asked by one guest."""
        most = {
            PAGE_TYPES: MAX_ANSWERS,
            EVENT_BITS: MAX_QUESTIONS,
            ALARMS: alarms_slot.MAX_ANSWERS,
            SCHEDULER: schedules.MAX_PICKS,
        }
        return most.get(self.kind, MAX_DECISIONS)


@dataclass(frozen=True, slots=True)
class Call:
    """A hypercall of a guest whose page tables a student's part validates, as it stood on entry.

    Attributes:
        text: what it asks for, entries decoded.
        frames: the frames that it names.
        asked: how many questions the part had been asked before it.
    """

    text: str
    frames: tuple[int, ...]
    asked: int


@dataclass(slots=True)
class Run:
    """A guest that has run.

    Attributes:
        xen, domain: the machine it ran on and its domain.
        events: what was recorded.
        problem: why the part could not go on, empty if it could.
        calls: with a validator of the student's, each hypercall.
        questions: what that was asked, and answered.
        violations: the auditor's, after the last hypercall of ``calls``; with one of them a run ends.
        asked: what a balloon policy was asked, and what it answered.
        flushes: what a flush policy was asked, and answered.
        scheduled: what a scheduler was told and asked, and answered.
        event_questions: what event bits were asked, and answered.
        bounced: what a bounce was asked, and answered.
        told: what a part that keeps alarms was told and asked, and answered.
    """

    xen: Hypervisor
    domain: Domain
    events: list[Event]
    problem: str = ""
    calls: list[Call] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    asked: Sequence[balloons.Asked] = ()
    flushes: Sequence[Asked] = ()
    scheduled: Sequence[schedules.Call] = ()
    event_questions: Sequence[EventQuestion] = ()
    bounced: Sequence[Bounced] = ()
    told: Sequence[alarms_slot.Told] = ()

    def of(self, kind: Kind) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event.kind is kind]

    def step(self, time: int, eip: int) -> str:
        """A step in words: when, where, which instruction."""
        return f"instruction {time}, eip {eip:#010x}: {self.instruction_at(eip)}"

    def instruction_at(self, eip: int) -> str:
        """The disassembly of the guest's instruction at ``eip``."""
        for length in range(_LONGEST, 0, -1):
            try:
                code = self.xen.guest_memory.read(self.domain.vcpus[0], eip, length)
            except HypercallError:
                continue
            return disassemble(code, eip, count=1)[0].text
        return "no code there"

    def end(self) -> str:
        """How the guest ended, in words."""
        if self.domain.crashed:
            return self.domain.report.splitlines()[0]
        if self.domain.shutdown is None:
            return f"it was still running after {self.xen.now} instructions"
        return f"it shut down with {self.domain.shutdown.name.lower()}"


def to_wire(image: Image) -> dict[str, Any]:
    """An image assembled from source as JSON; the student's process need not assemble it again."""
    return {
        "entry": image.entry,
        "code": image.sections[0].data.hex(),
        "address": image.sections[0].address,
        "user": [image.user.start, image.user.stop],
    }


def from_wire(name: str, wire: dict[str, Any]) -> Image:
    """The image that `to_wire` described."""
    code = bytes.fromhex(wire["code"])
    return Image(
        name,
        SOURCE_BASE,
        wire["entry"],
        (Section(wire["address"], code, len(code)),),
        hypercall_page=SOURCE_HYPERCALL_PAGE,
        shared_info=SOURCE_SHARED_INFO,
        user=range(*wire["user"]),
    )


def run(image: Image, slot: Slot, sink: Sink, part: Any = None, budget: int = BUDGET) -> Run:
    """Boot ``image`` on a machine of its own with the part in its slot, and run it to its end or its budget."""
    if slot.kind == PAGE_TYPES:
        from xenlab.grading.validated import run_validated

        return run_validated(image, PageTypesSlot(sink, part), budget)
    if slot.kind == BALLOON:
        played = balloons.play(image, slot.scenarios[image.name], slot.number, sink, part)
        assert played.xen.trace is not None
        return Run(played.xen, played.xen.domains[0], played.xen.trace.events(), played.problem, asked=played.asked)
    if slot.kind == SCHEDULER:
        dealt = schedules.play(image, slot.scenarios[image.name], sink, part)
        return Run(dealt.xen, dealt.xen.domains[0], [], dealt.problem, scheduled=dealt.log)
    if slot.kind == EVENT_BITS:
        raced = race(image, slot.scenarios[image.name], sink, part, budget)
        assert raced.xen.trace is not None
        domain, events = raced.xen.domains[0], raced.xen.trace.events()
        return Run(raced.xen, domain, events, raced.problem, event_questions=raced.questions)
    if slot.kind == ALARMS:
        kept = alarms_slot.play(image, slot.scenarios[image.name], sink, part)
        assert kept.xen.trace is not None
        return Run(kept.xen, kept.xen.domains[0], kept.xen.trace.events(), kept.problem, told=kept.told)
    trace = Trace()
    emulator = EmulatorSlot(sink, part) if slot.kind == EMULATOR else None
    hypercalls = {slot.number: HypercallSlot(sink, part)} if slot.kind == HYPERCALL else None
    flushes = FlushSlot(sink, FlushClock(*slot.rules), part) if slot.kind == FLUSH_POLICY else None
    bounce = BounceSlot(sink, part) if slot.kind == BOUNCE else None
    xen = Hypervisor(
        Machine(MEMORY_MIB),
        emulator=emulator,
        hypercalls=hypercalls,
        flush_policy=flushes,
        bounce=bounce,
        trace=trace,
    )
    domain = boot(xen, image)
    if bounce is not None:
        bounce.now = lambda: xen.now
    if flushes is not None:
        flushes.begin(xen)
    problem = ""
    try:
        xen.run(budget)
    except Unusable as reason:
        problem = str(reason)
    flushed = flushes.asked if flushes is not None else ()
    return Run(
        xen, domain, trace.events(), problem, flushes=flushed, bounced=bounce.asked if bounce is not None else ()
    )


def record(image: Image, slot: Slot, part: Callable[[], Any]) -> list[Decision]:
    """Run a guest with the student's part, made anew by ``part()``; what the part decided."""
    try:
        made = part()
    except Exception as problem:
        return [{"unusable": f"{slot.names[0]}() raised {described(problem)}"}]
    recorder = Recorder(slot.most_decisions)
    run(image, slot, recorder, made)
    return recorder.decisions


def replay(image: Image, slot: Slot, decisions: Any) -> Run:
    """Run a guest with decisions that were recorded."""
    return run(image, slot, Replayer(decisions if isinstance(decisions, list) else [], slot.most_decisions))


__all__ = [
    "ALARMS",
    "BALLOON",
    "BOUNCE",
    "EMULATOR",
    "EVENT_BITS",
    "FLUSH_POLICY",
    "HYPERCALL",
    "PAGE_TYPES",
    "SCHEDULER",
    "Call",
    "Run",
    "Slot",
    "from_wire",
    "image_from_source",
    "record",
    "replay",
    "to_wire",
]
