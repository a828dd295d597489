"""The scenes of lesson 10 show what the lesson says they show."""

from __future__ import annotations

from statistics import fmean

import pytest

from xenlab.hypervisor.accounting import usage
from xenlab.hypervisor.schedulers import Bvt, Credit, Diary, RoundRobin
from xenlab.labs import lesson10
from xenlab.labs.lesson10 import ALLOWANCE, SLICE, Worker, busy
from xenlab.views import ScheduleView


def test_keys_wait_for_all_slices_of_round_robin() -> None:
    for slice_instructions in (20_000, 2_000):
        xen = lesson10.keyboard(RoundRobin(slice_instructions))
        assert set(lesson10.waits(xen, 3)) == {3 * slice_instructions}


def test_a_warp_takes_the_wait_away_and_leaves_the_share() -> None:
    plain, warped = (lesson10.keyboard(Bvt(SLICE, ALLOWANCE), warp=warp) for warp in (0, 3_000))
    assert max(lesson10.waits(plain, 3)) > 5_000
    assert max(lesson10.waits(warped, 3)) == 0
    ran = [lesson10.ran(xen, xen.domains[3]) for xen in (plain, warped)]
    assert abs(ran[0] - ran[1]) < 1_500
    heavy = lesson10.keyboard(Bvt(SLICE, ALLOWANCE), weight=1_024)
    assert fmean(lesson10.waits(heavy, 3)) > 1_000


def test_waits_are_those_of_the_accounts() -> None:
    xen = lesson10.keyboard(Bvt(SLICE, ALLOWANCE))
    counts = usage(xen, xen.domains[3]).latencies
    waits = lesson10.waits(xen, 3)
    # The accounts have the start as well.
    assert sum(counts) in (len(waits), len(waits) + 1)
    for size, count in enumerate(counts):
        assert count - sum(wait.bit_length() == size for wait in waits) in (0, 1)


def test_eight_domains_have_their_shares() -> None:
    workers = [Worker(f"weight {n}", weight=64 * n) for n in range(1, 9)]
    xen = lesson10.machine(Bvt(SLICE, ALLOWANCE), workers)
    xen.run(5_000_000)
    assert lesson10.worst_share(xen) < 0.01
    assert lesson10.shares(xen).splitlines()[-1].startswith("weight 8  512     1,110,479")
    assert len(lesson10.shares(xen, [1, 2]).splitlines()) == 4


def test_only_the_hoarder_gains_by_sleep() -> None:
    got = {}
    for scheduler in (Bvt(SLICE, ALLOWANCE), lesson10.Hoarder()):
        xen = lesson10.late_riser(scheduler, run=0)
        before = lesson10.ran(xen, xen.domains[2])
        xen.run(60_000)
        got[type(scheduler).__name__] = lesson10.ran(xen, xen.domains[2]) - before
    assert got["Bvt"] < 22_000 < 48_000 < got["Hoarder"]


def test_limits_keep_a_schemer_at_its_share() -> None:
    share = {}
    for name, values in {
        "none": {"warp": 0},
        "much": {"warp": 200_000},
        "limited": {"warp": 200_000, "warp_limit": 2_000, "unwarp": 20_000},
    }.items():
        xen = lesson10.schemer(**values)
        share[name] = lesson10.ran(xen, xen.domains[2]) / xen.now
    assert share["much"] > 0.45
    assert share["limited"] == pytest.approx(1 / 3, rel=0.02)


def test_credit_answers_at_once() -> None:
    assert max(lesson10.waits(lesson10.keyboard(Credit(3 * ALLOWANCE)), 3)) == 0


def test_switches_are_counted() -> None:
    xen = lesson10.machine(RoundRobin(1_000), busy(2))
    xen.run(10_000)
    assert lesson10.switches(xen) == 10


def test_the_live_scene_has_keys_from_its_start_and_again_after_a_step_back() -> None:
    timeline, sliders = lesson10.live_timeline()
    timeline.run(60_000)
    waits = lesson10.waits(timeline.hypervisor, 3)
    assert len(waits) == 60_000 // lesson10.KEYS_APART
    early = timeline.seek(20_000)
    sliders[4].move(timeline, 6_000)
    timeline.run(40_000)
    assert early == 20_000
    again = lesson10.waits(timeline.hypervisor, 3)
    assert again != waits
    assert set(again[2:]) == {0}


class Recorder:
    """Is told, and runs whoever woke first."""

    def __init__(self) -> None:
        self.told_of: list[tuple[int, int, int]] = []
        self.ready: list[int] = []

    def told(self, vcpu: int, now: int, weight: int, warp: int) -> None:
        self.told_of.append((vcpu, weight, warp))

    def wake(self, vcpu: int, now: int) -> None:
        self.ready.append(vcpu)

    def sleep(self, vcpu: int, now: int) -> None:
        self.ready.remove(vcpu)

    def pick(self, now: int) -> tuple[int, int] | None:
        return (self.ready[0], 500) if self.ready else None


def test_a_scheduler_of_the_exercise_can_be_looked_at() -> None:
    part = Recorder()
    xen = lesson10.machine(lesson10.Told(part), [Worker("one", weight=99, warp=7), Worker("two")])
    xen.run(3_000)
    assert part.told_of == [(0, 256, 0), (32, 256, 0), (0, 99, 7)]
    assert "one" in ScheduleView(xen).text()
    assert isinstance(xen.scheduler, Diary)
    assert xen.scheduler.parameters(0) == {"weight": 99, "warp": 7}
    saved = xen.scheduler.state()
    part.ready.clear()
    xen.scheduler.load(saved)
    assert part.ready == [0, 32]
