"""What a timeline does besides going back: inputs, forks, new domains, parts without a memory of their own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from xenlab import Hypervisor, Machine, TimelineError, boot
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.inputs import Pause, Typed, Unpause
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Event, Kind
from xenlab.timeline import Boot, Destroy, Timeline
from xenlab.timeline.snapshots import Snapshots
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

# Sleeps for so many nanoseconds, works for some hundred instructions, and sleeps again.
SLEEPS = """
start:  add dword ptr [until], {low}
        adc dword ptr [until + 4], {high}
        mov ebx, SCHEDOP_poll
        mov ecx, offset poll
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        inc dword ptr [woken]
        mov ecx, 300
works:  loop works
        jmp start
poll:   .long 0, 0
until:  .long 0, 0
woken:  .long 0
"""


def sleeper(instructions: int) -> str:
    nanoseconds = 10 * instructions
    return SLEEPS.format(low=nanoseconds & 0xFFFF_FFFF, high=nanoseconds >> 32)


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


def test_a_sleep_of_a_thousand_million_instructions_is_one_leap() -> None:
    timeline = timeline_of(sleeper(1_000_000_000))
    flushes = timeline.hypervisor.cpu.flushes
    assert timeline.run(3_000_000_500).stop is Stop.BUDGET
    assert len([event for event in timeline.events() if event.kind is Kind.TIMER]) == 3
    # It runs for about 300 instructions between two sleeps, with an interval of 100.
    assert timeline.hypervisor.cpu.flushes - flushes < 60
    after, events = timeline.machine_hash(), timeline.events()
    for time in (2_999_999_999, 1_500_000_000, 1_000_000_123, 1):
        assert timeline.seek(time) == time
    timeline.seek(3_000_000_500)
    assert (timeline.machine_hash(), timeline.events()) == (after, events)


@settings(max_examples=20)
@given(
    sleeps=st.tuples(st.integers(150, 5000), st.integers(150, 5000)),
    route=st.lists(st.integers(0, 8000), min_size=2, max_size=6),
    interval=st.sampled_from((1, 64, 1000)),
    key=st.integers(0, 8000),
)
def test_the_way_to_a_time_does_not_matter_where_guests_sleep(
    sleeps: tuple[int, int], route: list[int], interval: int, key: int
) -> None:
    seen: dict[int, tuple[str, list[Event]]] = {}
    for times in ([*route, *reversed(route)], [max(route)]):
        timeline = timeline_of(*map(sleeper, sleeps), interval=interval)
        timeline.hypervisor.inputs.submit(key, Typed(0, b"x"))
        timeline.run(1)
        for time in times:
            timeline.seek(time)
            found = timeline.machine_hash(), timeline.events()
            assert seen.setdefault(time, found) == found


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


def kept_of(xen: Hypervisor, limit: int, memory_mib: int, *, moments: int) -> tuple[Snapshots, list[int]]:
    """A snapshot each 100 instructions, and the times."""
    kept, times = Snapshots(xen, 0, limit, memory_mib), [xen.now]
    for number in range(1, moments + 1):
        xen.run(100)
        times.append(xen.now)
        kept.take(0, 100.0 * number)
    return kept, times


def test_snapshots_are_thinned_the_oldest_most_and_the_first_never() -> None:
    kept, times = kept_of(timeline_of(COUNTS).hypervisor, 8, 1000, moments=100)
    assert len(kept) == 8
    assert kept.latest(50).time == 0
    assert [kept.latest(time).time for time in times[-2:]] == times[-2:]
    gaps = [later - earlier for earlier, later in pairwise(kept.times())]
    assert gaps[0] > gaps[-1]


def test_a_snapshot_holds_the_pages_that_changed() -> None:
    xen = timeline_of(COUNTS).hypervisor
    xen.run(1000)  # the first turn of a vCPU also writes its time record
    kept, times = kept_of(xen, 50, 1000, moments=3)
    written = xen.domains[0].frames[-1]
    assert [len(kept.latest(time).changed) for time in times[1:]] == [1, 1, 1]
    xen.memory.frame(written)[7] = 1
    kept.take(0, 400.0)
    assert kept.latest(xen.now).changed.keys() == {written}


def test_a_memory_limit_thins_too() -> None:
    kept, _times = kept_of(timeline_of(COUNTS).hypervisor, 50, 0, moments=5)
    assert len(kept) == 2


class Pokes(RuleBasedStateMachine):
    """Snapshots in any order, thinned at will, against whole copies of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.xen = timeline_of(COUNTS).hypervisor
        self.kept = Snapshots(self.xen, 0, 6, 1000)
        self.copies = {self.xen.now: self.copy()}
        self.spare: list[int] = []

    def copy(self) -> tuple[bytes, list[int]]:
        return bytes(self.xen.memory.bytes), list(self.xen.frames.owner)

    @rule(place=st.integers(0, 12), value=st.integers(0, 3))
    def store(self, place: int, value: int) -> None:
        owned = self.xen.frames.owned_by(0)
        self.xen.memory.frame(owned[-1 - place])[:4] = bytes([value] * 4)

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        for mfn in self.xen.frames.allocate(count, 0):
            self.xen.memory.frame(mfn)[0] = 1

    @rule()
    def free(self) -> None:
        unused = [mfn for mfn in self.xen.frames.owned_by(0) if not self.xen.frames.refs[mfn]]
        self.xen.frames.release(unused[:2])

    @rule(ahead=st.integers(1, 300))
    def go_on_and_take(self, ahead: int) -> None:
        self.xen.cpu.instructions += ahead
        if self.xen.now not in self.copies:
            self.copies[self.xen.now] = self.copy()
            self.kept.take(0, self.xen.now / 7)

    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        time = data.draw(st.sampled_from(self.kept.times()))
        self.kept.put_back(self.kept.latest(time))
        assert self.xen.now == time

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        time = data.draw(st.sampled_from(self.kept.times()))
        self.kept.drop_after(time)
        self.copies = {at: copy for at, copy in self.copies.items() if at <= time}

    def teardown(self) -> None:
        for time in reversed(self.kept.times()):
            self.kept.put_back(self.kept.latest(time))
            assert self.copy() == self.copies[time]


TestPokes = Pokes.TestCase
