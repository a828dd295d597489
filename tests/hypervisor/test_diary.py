"""A diary says what the scheduler was told and chose, up to now, however the run was taken back."""

from __future__ import annotations

from copy import deepcopy

import pytest

from xenlab import Hypervisor, Machine, boot, guests
from xenlab.errors import ScheduleError
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.schedulers import Bvt, Credit, Diary, RoundRobin, Scheduler, Tunable
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.timeline import Timeline
from xenlab.toolstack.schedule import SetSchedule, SetScheduler


def machine(scheduler: Scheduler) -> Hypervisor:
    """Two that always work, and one that works for 100 instructions after a key."""
    xen = Hypervisor(Machine(8), scheduler=scheduler, trace=Trace())
    for work in (0, 0, 100):
        boot(xen, guests.source("worker"), command_line=str(work))
    return xen


def diary(xen: Hypervisor) -> Diary:
    assert isinstance(xen.scheduler, Diary)
    return xen.scheduler


@pytest.mark.parametrize("make", [lambda: Bvt(1_000, 100), lambda: Credit(500), lambda: RoundRobin(300)])
def test_the_run_is_the_same_with_a_diary_and_without(make: type[RoundRobin]) -> None:
    runs = []
    for scheduler in (make(), Diary(make())):
        xen = machine(scheduler)
        xen.inputs.submit(5_000, Typed(2, b"."))
        xen.run(20_000)
        assert xen.trace is not None
        runs.append(xen.trace.raw())
    assert runs[0] == runs[1]
    assert isinstance(xen.scheduler, Tunable)


def test_lines_are_what_happened() -> None:
    xen = machine(Diary(Bvt(1_000, 100)))
    xen.inputs.submit(5_000, Typed(2, b"."))
    xen.run(20_000)
    lines = diary(xen).lines()
    assert [(line.time, line.vcpu) for line in lines if line.what == "wake"] == [(0, 0), (0, 32), (0, 64), (5_000, 64)]
    slept = [line for line in lines if line.what == "sleep"]
    assert [line.vcpu for line in slept] == [64, 64]
    picked = [line for line in lines if line.what == "pick"]
    changes = [b for a, b in zip([None, *picked], picked, strict=False) if a is None or a.vcpu != b.vcpu]
    assert xen.trace is not None
    switches = [(event.time, event.to_vcpu) for event in xen.trace.events(Kind.SWITCH)]
    assert [(line.time, line.vcpu) for line in changes] == switches


def test_clocks_are_the_scheduler_s() -> None:
    xen = machine(Diary(Bvt(1_000, 100)))
    xen.submit(SetSchedule(2, {"weight": 512, "warp": 700}))
    xen.inputs.submit(5_000, Typed(2, b"."))
    xen.run(20_000)
    lines = diary(xen).lines()
    woken = next(line for line in lines if line.what == "wake" and line.time == 5_000)
    _vcpu, actual, effective = woken.clocks[-1]
    assert actual - effective == 700
    assert {vcpu: (a, e) for vcpu, a, e in lines[-1].clocks} == diary(xen).scheduler.clocks()


def test_a_diary_goes_back_with_the_run_and_is_written_again() -> None:
    timeline = Timeline(machine(Diary(Bvt(1_000, 100))), interval=500)
    timeline.run(5_000)
    timeline.submit(Typed(2, b"."))
    timeline.run(15_000)
    xen = timeline.hypervisor
    whole = list(diary(xen).lines())
    for time in (3_000, 19_000, 100, 7_777, 20_000):
        timeline.seek(time)
        assert list(diary(xen).lines()) == [line for line in whole if line.time < time]


def test_another_future_has_other_lines() -> None:
    timeline = Timeline(machine(Diary(Bvt(1_000, 100))), interval=500)
    timeline.run(20_000)
    timeline.seek(4_000)
    timeline.submit(Typed(2, b"."))
    timeline.run(6_000)
    lines = diary(timeline.hypervisor).lines()
    assert [line.time for line in lines if line.what == "wake"] == [0, 0, 0, 4_000]
    assert [line.time for line in lines] == sorted(line.time for line in lines)
    assert timeline.position == 10_000
    assert lines[-1].time <= 10_000


def test_a_successor_goes_on_and_nobody_wakes_by_it() -> None:
    timeline = Timeline(machine(Diary(Bvt(1_000, 100))), interval=500)
    timeline.run(6_000)
    xen = timeline.hypervisor
    before = list(diary(xen).lines())
    timeline.submit(SetScheduler(diary(xen).successor(Bvt(1_000, 300))))
    timeline.run(6_000)
    lines = diary(xen).lines()
    assert list(lines[: len(before)]) == before
    assert [line.what for line in lines[len(before) :]].count("wake") == 0
    assert diary(xen).scheduler.allowance == 300
    timeline.seek(3_000)
    assert diary(xen).scheduler.allowance == 100
    timeline.seek(12_000)
    assert diary(xen).lines() == lines


def test_a_copy_shares_nothing_that_changes() -> None:
    xen = machine(Diary(Bvt(1_000, 100)))
    xen.run(3_000)
    copy = deepcopy(diary(xen))
    lines, clocks = list(copy.lines()), copy.scheduler.clocks()
    xen.run(3_000)
    assert (list(copy.lines()), copy.scheduler.clocks()) == (lines, clocks)


def test_a_scheduler_without_parameters_has_none_in_a_diary() -> None:
    kept = Diary(RoundRobin())
    kept.add(3)
    assert kept.parameters(3) == {}
    kept.set_parameters(3, 0, {})
    with pytest.raises(ScheduleError, match=r"RoundRobin has no parameters, found \{'weight': 5\}"):
        kept.set_parameters(3, 0, {"weight": 5})
    kept.remove(3)
    assert kept.lines() == []
