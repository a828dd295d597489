"""What a timeline does besides going back: inputs, forks, new domains, parts without a memory of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xenlab import Hypervisor, Machine, TimelineError, boot
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.frames import TSS_FRAME
from xenlab.hypervisor.inputs import Pause, Typed, Unpause
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind
from xenlab.timeline import Boot, Destroy, Timeline
from xenlab.timeline.snapshots import Snapshots, take
from xenlab.toolstack import image_from_source

COUNTS = "start: inc dword ptr [number]\n xor eax, [number]\n jmp start\n number: .long 0"
ECHO = """
start:  mov ebx, CONSOLEIO_read
        mov ecx, 16
        mov edx, offset buffer
        mov eax, __HYPERVISOR_console_io
        int 0x82
        mov ecx, eax
        jecxz start
        mov ebx, CONSOLEIO_write
        mov eax, __HYPERVISOR_console_io
        int 0x82
        jmp start
buffer: .space 16
"""
BLOCKS = "start: mov ebx, SCHEDOP_block\n mov eax, __HYPERVISOR_sched_op\n int 0x82\n inc esi\n jmp start"


def timeline_of(*sources: str, interval: int = 100, **options: int) -> Timeline:
    xen = Hypervisor(Machine(8), scheduler=RoundRobin(50))
    for source in sources:
        boot(xen, source)
    return Timeline(xen, interval=interval, **options)


def test_what_was_typed_is_typed_again_at_the_same_instruction() -> None:
    timeline = timeline_of(ECHO, COUNTS)
    timeline.run(777)
    timeline.submit(Typed(0, b"a"))
    timeline.submit(Typed(0, b"b"))
    timeline.run(1000)
    timeline.submit(Typed(0, b"c"))
    timeline.run(1000)
    after, events = timeline.machine_hash(), timeline.events()
    assert timeline.hypervisor.domains[0].console == "abc"
    timeline.seek(777)
    assert timeline.hypervisor.domains[0].console == ""
    assert [event.time for event in timeline.all_events() if event.kind is Kind.INPUT] == [777, 777, 1777]
    timeline.run(2000)
    assert (timeline.machine_hash(), timeline.events()) == (after, events)


def test_an_input_in_the_past_begins_another_future() -> None:
    timeline = timeline_of(ECHO)
    timeline.run(1000)
    timeline.submit(Typed(0, b"old"))
    timeline.run(1000)
    timeline.seek(600)
    timeline.submit(Typed(0, b"new"))
    assert timeline.end == 600
    assert all(event.time <= 600 for event in timeline.all_events())
    timeline.run(1400)
    assert timeline.hypervisor.domains[0].console == "new"
    straight = timeline_of(ECHO)
    straight.run(600)
    straight.submit(Typed(0, b"new"))
    straight.run(1400)
    assert straight.machine_hash() == timeline.machine_hash()


def test_a_domain_is_built_and_destroyed_again_in_a_replay() -> None:
    timeline = timeline_of(COUNTS)
    timeline.run(500)
    timeline.submit(Boot(image_from_source(ECHO, "second")))
    timeline.run(500)
    assert timeline.hypervisor.domains[1].name == "second"
    timeline.submit(Typed(1, b"hello"))
    timeline.run(1000)
    with_two = timeline.machine_hash()
    assert timeline.hypervisor.domains[1].console == "hello"
    timeline.submit(Destroy(1))
    timeline.run(1000)
    with_one, events = timeline.machine_hash(), timeline.events()
    assert list(timeline.hypervisor.domains) == [0]
    timeline.seek(300)
    assert list(timeline.hypervisor.domains) == [0]
    timeline.seek(2000)
    assert timeline.machine_hash() == with_two
    timeline.seek(3000)
    assert (timeline.machine_hash(), timeline.events()) == (with_one, events)


def test_a_domain_in_recycled_frames_runs_its_own_code_after_going_back() -> None:
    # Snapshots often enough that one holds the second domain, whose frames hold the third one's code later.
    timeline = timeline_of(COUNTS, interval=10)
    timeline.run(200)
    timeline.submit(Boot(image_from_source(ECHO)))
    timeline.run(300)
    timeline.submit(Destroy(1))
    timeline.submit(Boot(image_from_source("start: inc esi\n jmp start")))
    timeline.run(1000)
    timeline.seek(450)
    timeline.submit(Typed(1, b"y"))
    timeline.run(500)
    assert timeline.hypervisor.domains[1].console == "y"
    assert not timeline.hypervisor.domains[1].ended


def test_an_image_that_does_not_fit_leaves_an_event() -> None:
    timeline = timeline_of(COUNTS)
    timeline.submit(Boot(image_from_source(COUNTS), memory_mib=100))
    timeline.run(10)
    (refusal,) = (event for event in timeline.events() if event.kind is Kind.DOMAIN and event.domain == -1)
    assert "100 MiB" in refusal.change
    assert list(timeline.hypervisor.domains) == [0]


def test_an_idle_machine_stays_where_it_is_and_says_so() -> None:
    timeline = timeline_of(BLOCKS)
    assert timeline.run(1000).stop is Stop.IDLE
    idle, machine = timeline.position, timeline.machine_hash()
    result = timeline.step()
    assert (result.instructions, result.stop, timeline.position) == (0, Stop.IDLE, idle)
    timeline.back()
    assert timeline.seek(5000) == idle
    assert timeline.machine_hash() == machine
    timeline.submit(Typed(0, b"!"))
    assert timeline.step(2).instructions == 2


def test_going_idle_between_two_inputs_is_the_same_as_taking_both() -> None:
    timeline = timeline_of(COUNTS)
    timeline.run(130)
    timeline.submit(Pause(0))
    assert timeline.run(100).stop is Stop.IDLE
    paused = timeline.machine_hash()
    timeline.back(7)
    assert timeline.seek(130) == 130
    assert timeline.machine_hash() == paused
    timeline.submit(Unpause(0))
    timeline.run(100)
    after, events = timeline.machine_hash(), timeline.events()
    timeline.seek(50)
    timeline.seek(230)
    assert (timeline.machine_hash(), timeline.events()) == (after, events)


def test_what_is_due_at_a_time_is_done_when_the_run_goes_on() -> None:
    timeline = timeline_of(COUNTS, COUNTS)
    timeline.run(50)
    assert [event.time for event in timeline.events() if event.kind is Kind.SWITCH] == [0]
    timeline.step()
    assert [event.time for event in timeline.events() if event.kind is Kind.SWITCH] == [0, 50]
    timeline.back()
    assert [event.time for event in timeline.events() if event.kind is Kind.SWITCH] == [0]
    assert timeline.last_events(1) == timeline.events()[-1:]
    assert timeline.all_events()[-1].time == 50


def test_a_machine_that_was_changed_past_the_timeline_is_refused() -> None:
    timeline = timeline_of(COUNTS)
    timeline.run(100)
    boot(timeline.hypervisor, COUNTS)
    with pytest.raises(TimelineError, match="submit\\(Boot"):
        timeline.back()
    timeline.rebase()
    timeline.run(100)
    assert timeline.back(500) == timeline.start == 100
    with pytest.raises(TimelineError, match="begins at 100"):
        timeline.seek(99)


class Forgetful(RoundRobin):
    """A student's scheduler: remembers how often it was asked, and does not say so."""

    def __init__(self) -> None:
        super().__init__(30)
        self.asked = 0

    def pick(self, now: int) -> tuple[int, int] | None:
        self.asked += 1
        picked = super().pick(now)
        return picked and (picked[0], 20 + self.asked % 17)


class Plain:
    """The same without the pair: its attributes are saved for it."""

    def __init__(self) -> None:
        self.vcpus: list[int] = []
        self.asked = 0

    def wake(self, vcpu: int, _now: int) -> None:
        self.vcpus.append(vcpu)

    def sleep(self, vcpu: int, _now: int) -> None:
        self.vcpus.remove(vcpu)

    def pick(self, _now: int) -> tuple[int, int] | None:
        self.asked += 1
        return (self.vcpus[self.asked % len(self.vcpus)], 20 + self.asked % 17) if self.vcpus else None


class Threes(Plain):
    """Its slice ends with the instruction that blocks."""

    def pick(self, now: int) -> tuple[int, int] | None:
        picked = super().pick(now)
        return picked and (picked[0], 3)


class Generated(Plain):
    """Holds a generator, which nobody can save."""

    def __init__(self) -> None:
        super().__init__()
        self.order: Iterator[int] = (number for number in range(10))


def with_scheduler(scheduler: Plain | Forgetful) -> Timeline:
    xen = Hypervisor(Machine(8), scheduler=scheduler)
    boot(xen, COUNTS)
    boot(xen, COUNTS)
    return Timeline(xen, interval=64)


def test_a_scheduler_without_state_is_saved_by_its_attributes() -> None:
    timeline = with_scheduler(Plain())
    timeline.run(3000)
    after, events = timeline.machine_hash(), timeline.events()
    for time in (2990, 1234, 0, 3000):
        timeline.seek(time)
    assert (timeline.machine_hash(), timeline.events()) == (after, events)


def test_asking_an_idle_machine_again_changes_nothing() -> None:
    xen = Hypervisor(Machine(8), scheduler=Threes())
    boot(xen, BLOCKS)
    timeline = Timeline(xen)
    assert timeline.run(100).stop is Stop.IDLE
    idle = timeline.machine_hash()
    timeline.run(100)
    timeline.run(100)
    assert timeline.machine_hash() == idle


def test_a_scheduler_that_keeps_something_back_is_found_out() -> None:
    timeline = with_scheduler(Forgetful())
    timeline.run(3000)

    def look_around() -> None:
        # A replay is found out when it reaches a decision of the scheduler's.
        for time in range(2500, 1000, -100):
            timeline.seek(time)

    with pytest.raises(TimelineError, match="is not like the run"):
        look_around()


def test_a_scheduler_that_cannot_be_saved_is_refused() -> None:
    with pytest.raises(TimelineError, match="Generated cannot be saved"):
        with_scheduler(Generated())


def test_snapshots_are_thinned_the_oldest_most_and_the_first_never() -> None:
    xen = timeline_of(COUNTS).hypervisor
    first = take(xen, 0, {})
    kept = Snapshots(first, 8, 1000)
    times = []
    for _ in range(100):
        xen.run(100)
        times.append(xen.now)
        kept.add(take(xen, 0, kept.latest(xen.now).pages))
    assert len(kept) == 8
    assert kept.latest(50) is first
    assert [kept.latest(time).time for time in times[-2:]] == times[-2:]
    assert kept.latest(5000).time < 5000


def test_pages_that_did_not_change_are_kept_once() -> None:
    xen = timeline_of(COUNTS).hypervisor
    xen.run(1000)  # the first turn of a vCPU also writes its time record
    before = take(xen, 0, {})
    xen.run(1000)
    after = take(xen, 0, before.pages)
    # The task state segment changes too, with the first switch.
    changed = [mfn for mfn, data in after.pages.items() if before.pages.get(mfn) is not data and mfn != TSS_FRAME]
    assert len(changed) == 1
    limited = Snapshots(before, 50, 0)
    limited.add(after)
    xen.run(1000)
    limited.add(take(xen, 0, after.pages))
    assert len(limited) == 2
