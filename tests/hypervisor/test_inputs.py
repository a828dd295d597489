"""The queue of everything that comes from outside: its order, and what comes again and again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.inputs import InputQueue, Typed
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.timeline import Timeline

BUSY = "start: jmp start"


@dataclass(frozen=True)
class Tick:
    """Comes again."""

    interval: int

    def apply(self, hypervisor: Hypervisor) -> None:
        del hypervisor


def machine() -> Hypervisor:
    xen = Hypervisor(Machine(memory_mib=4), trace=Trace())
    boot(xen, BUSY)
    return xen


def applied(xen: Hypervisor) -> list[tuple[int, str]]:
    assert xen.trace is not None
    return [(event.time, event.what) for event in xen.trace.events(Kind.INPUT)]


@given(st.lists(st.integers(0, 20), max_size=12))
def test_inputs_stand_in_the_order_of_time_and_then_of_submission(times: list[int]) -> None:
    queue = InputQueue()
    for number, time in enumerate(times):
        queue.submit(time, Typed(0, bytes([number])))
    expected = sorted(enumerate(times), key=lambda pair: (pair[1], pair[0]))
    assert [item.data[0] for _time, item in queue.log if isinstance(item, Typed)] == [n for n, _time in expected]


def test_an_input_of_now_is_not_held_up_by_one_of_the_future() -> None:
    xen = machine()
    xen.inputs.submit(5_000, Typed(0, b"later"))
    xen.run(100)
    xen.submit(Typed(0, b"now"))
    xen.run(100)
    assert bytes(xen.domains[0].console_in) == b"now"
    xen.run(10_000)
    assert bytes(xen.domains[0].console_in) == b"nowlater"


def test_an_input_with_an_interval_comes_again() -> None:
    xen = machine()
    xen.run(100)
    xen.submit(Tick(1_000))
    xen.run(3_500)
    assert [time for time, _what in applied(xen)] == [100, 1_100, 2_100, 3_100]


def test_turns_that_were_slept_through_are_not_made_up_for() -> None:
    xen = Hypervisor(Machine(memory_mib=4), trace=Trace())
    domain = boot(xen, "start: mov ebx, SCHEDOP_block\n mov eax, __HYPERVISOR_sched_op\n int 0x82\n jmp start")
    xen.run(100)
    xen.submit(Tick(1_000))
    assert xen.run(10_000).instructions == 0
    xen.wake(domain.vcpus[0])
    xen.run(10_000)
    boot(xen, BUSY)
    xen.run(5_000)
    times = [time for time, _what in applied(xen)]
    assert times == sorted(set(times))
    assert all(later - before == 1_000 for before, later in pairwise(times[1:]))


def test_a_replay_gives_the_same_turns_and_no_more() -> None:
    timeline = Timeline(machine(), interval=700)
    timeline.submit(Tick(500))
    timeline.run(5_000)
    first, log = applied(timeline.hypervisor), list(timeline.hypervisor.inputs.log)
    for time in (0, 1_300, 4_999, 499, 5_000):
        timeline.seek(time)
    assert applied(timeline.hypervisor) == first
    assert timeline.hypervisor.inputs.log == log


def test_in_another_future_the_turns_go_on() -> None:
    timeline = Timeline(machine(), interval=700)
    timeline.submit(Tick(500))
    timeline.run(5_000)
    timeline.seek(1_200)
    timeline.submit(Typed(0, b"x"))
    timeline.run(1_000)
    times = [time for time, what in applied(timeline.hypervisor) if "Tick" in what]
    assert times == [0, 500, 1_000, 1_500, 2_000]
