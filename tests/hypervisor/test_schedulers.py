"""Borrowed Virtual Time and credit: shares, latency, what a warp cannot buy, and changes while domains run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, XenlabError, boot
from xenlab.errors import PartError, ScheduleError
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.domain import Domain, RunState
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.schedulers import Bvt, Credit, RoundRobin, Scheduler, Tunable
from xenlab.hypervisor.scheduling import change_scheduler, set_parameters
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.timeline import Destroy, Timeline
from xenlab.toolstack import build, image_from_source
from xenlab.toolstack.schedule import SetSchedule, SetScheduler

LOOP = "start: inc eax\n jmp start"
YIELD = """
start:  inc edi
        mov ebx, SCHEDOP_yield
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
"""
SLEEPER = YIELD.replace("yield", "block")
SLICE, ALLOWANCE = 1000, 100


def bvt() -> Bvt:
    return Bvt(SLICE, ALLOWANCE)


def credit() -> Credit:
    return Credit(SLICE)


BOTH = pytest.mark.parametrize("make", [bvt, credit])
Make = Callable[[], Bvt | Credit]


@dataclass
class Sleeper:
    """Wakes each ``period`` instructions, works ``burst`` of its own and sleeps."""

    period: int
    burst: int


@dataclass
class World:
    """One CPU of plain numbers that does what a scheduler says, and keeps count.

    Attributes:
        ran: instructions by vCPU.
        turns: (time, vCPU, length) of each pick, None for idle.
        latencies: from each wake-up to the first instruction, by sleeper.
    """

    scheduler: Scheduler
    sleepers: dict[int, Sleeper] = field(default_factory=dict)
    now: int = 0
    ran: dict[int, int] = field(default_factory=dict)
    turns: list[tuple[int, tuple[int, int] | None]] = field(default_factory=list)
    latencies: dict[int, list[int]] = field(default_factory=dict)
    runnable: set[int] = field(default_factory=set)
    _due: dict[int, int] = field(default_factory=dict)
    _left: dict[int, int] = field(default_factory=dict)
    _woke: dict[int, int] = field(default_factory=dict)

    def wake(self, *vcpus: int) -> World:
        for vcpu in vcpus:
            self.scheduler.wake(vcpu, self.now)
            self.runnable.add(vcpu)
            self._woke[vcpu] = self.now
            if vcpu in self.sleepers:
                self._due[vcpu] = self.now + self.sleepers[vcpu].period
                self._left[vcpu] = self.sleepers[vcpu].burst
        return self

    def sleep(self, vcpu: int) -> None:
        self.scheduler.sleep(vcpu, self.now)
        self.runnable.discard(vcpu)

    def run(self, length: int) -> World:
        end = self.now + length
        while self.now < end:
            self.wake(
                *(vcpu for vcpu, due in sorted(self._due.items()) if due <= self.now and vcpu not in self.runnable)
            )
            picked = self.scheduler.pick(self.now)
            self.turns.append((self.now, picked))
            assert (picked is None) == (not self.runnable)
            nexts = [due for vcpu, due in self._due.items() if vcpu not in self.runnable and due > self.now]
            until = min([end, *nexts])
            if picked is not None:
                assert picked[0] in self.runnable
                assert picked[1] > 0
                until = min(until, self.now + picked[1])
                self._work(picked[0], until)
            else:
                self.now = until
        return self

    def _work(self, vcpu: int, until: int) -> None:
        if vcpu in self._woke:
            self.latencies.setdefault(vcpu, []).append(self.now - self._woke.pop(vcpu))
        did = min(until - self.now, self._left.get(vcpu, until))
        self.now += did
        self.ran[vcpu] = self.ran.get(vcpu, 0) + did
        if vcpu in self._left:
            self._left[vcpu] -= did
            if not self._left[vcpu]:
                self.sleep(vcpu)


def with_weights(make: Make, weights: Iterable[int]) -> World:
    world = World(make())
    assert isinstance(world.scheduler, Tunable)
    for vcpu, weight in enumerate(weights):
        world.scheduler.add(vcpu)
        world.scheduler.set_parameters(vcpu, 0, {"weight": weight})
        world.wake(vcpu)
    return world


def assert_shares(ran: dict[int, int], weights: list[int], turns: int = 0) -> None:
    """Within 4 %, or within so many turns, which a vCPU of small weight seldom gets."""
    total, all_weights = sum(ran.values()), sum(weights)
    for vcpu, weight in enumerate(weights):
        assert ran.get(vcpu, 0) == pytest.approx(total * weight / all_weights, rel=0.04, abs=turns * SLICE)


# Shares -----------------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.integers(16, 1024), min_size=1, max_size=12)


@BOTH
@settings(max_examples=60)
@given(weights=WEIGHTS)
def test_shares_follow_the_weights_within_four_per_cent(make: Make, weights: list[int]) -> None:
    world = with_weights(make, weights).run(300 * SLICE * len(weights))
    assert sum(world.ran.values()) == world.now
    assert_shares(world.ran, weights, turns=3 if make is credit else 0)


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_shares_of_seeded_crowds(make: Make, seed: int) -> None:
    random = Random(seed)
    weights = [random.choice((64, 128, 256, 512, 1024)) for _ in range(random.randint(2, 40))]
    assert_shares(with_weights(make, weights).run(300 * SLICE * len(weights)).ran, weights)


@given(weights=WEIGHTS)
def test_clocks_stay_within_an_allowance(weights: list[int]) -> None:
    world = with_weights(bvt, weights)
    for _ in range(30):
        world.run(777)
        clocks = world.scheduler.state()["vcpus"].values()
        least = min(clock["avt"] for clock in clocks)
        for clock in clocks:
            # A turn ends with a whole instruction.
            assert (clock["avt"] - least) * clock["weight"] < ALLOWANCE + 1 << 20


@given(st.integers(1, 65_535), st.lists(st.integers(1, 999), min_size=1, max_size=20))
def test_a_clock_says_the_same_however_the_run_was_cut(weight: int, cuts: list[int]) -> None:
    whole, parts = with_weights(bvt, [weight]), with_weights(bvt, [weight])
    whole.run(sum(cuts))
    whole.scheduler.pick(whole.now)
    for cut in cuts:
        parts.run(cut)
        parts.scheduler.pick(parts.now)
    clocks: list[Any] = [world.scheduler.state()["vcpus"][0] for world in (whole, parts)]
    assert clocks[0] == clocks[1]
    assert clocks[0]["avt"] * weight + clocks[0]["rest"] == sum(cuts) << 20


def test_two_equal_ones_change_places_after_twice_the_allowance() -> None:
    turns = [picked for _time, picked in with_weights(bvt, [256, 256]).run(1000).turns]
    assert turns[:4] == [(0, ALLOWANCE), (1, 2 * ALLOWANCE), (0, 2 * ALLOWANCE), (1, 2 * ALLOWANCE)]


ACTIONS = st.lists(st.tuples(st.sampled_from(["wake", "sleep", "run", "set"]), st.integers(0, 5), st.integers(1, 900)))


def play(world: World, actions: list[tuple[str, int, int]]) -> World:
    """Anything in any order; the world checks after each pick that somebody runs whenever somebody can."""
    for action, vcpu, number in actions:
        if action == "run":
            world.run(number)
        elif action == "set":
            assert isinstance(world.scheduler, Tunable)
            world.scheduler.add(vcpu)
            values = {"weight": 50 + number, "warp": 7 * number, "warp_limit": number // 2, "unwarp": 3 * number}
            names = world.scheduler.parameters(vcpu)
            world.scheduler.set_parameters(
                vcpu, world.now, {name: value for name, value in values.items() if name in names}
            )
        elif action == "wake" and vcpu not in world.runnable:
            world.wake(vcpu)
        elif action == "sleep" and vcpu in world.runnable:
            world.sleep(vcpu)
    return world


@BOTH
@settings(max_examples=200)
@given(actions=ACTIONS)
def test_somebody_runs_whenever_somebody_can(make: Make, actions: list[tuple[str, int, int]]) -> None:
    world = play(World(make()), actions)
    before = sum(world.ran.values())
    world.run(3 * SLICE)
    assert sum(world.ran.values()) == before + (3 * SLICE if world.runnable else 0)


@BOTH
@given(actions=ACTIONS, others=ACTIONS)
def test_a_loaded_state_decides_as_the_saved_one_did(
    make: Make, actions: list[tuple[str, int, int]], others: list[tuple[str, int, int]]
) -> None:
    first = play(World(make()), actions)
    second = deepcopy(first)
    second.scheduler = make()
    # What a scheduler knew before it is loaded must not matter.
    play(World(second.scheduler), others)
    second.scheduler.load(deepcopy(first.scheduler.state()))
    assert second.scheduler.state() == first.scheduler.state()
    for world in (first, second):
        play(world, others).run(3 * SLICE)
    assert first.turns == second.turns
    assert first.scheduler.state() == second.scheduler.state()


@BOTH
@settings(max_examples=60)
@given(actions=ACTIONS)
def test_nobody_starves(make: Make, actions: list[tuple[str, int, int]]) -> None:
    """Whatever happened before, and with warped sleepers beside it, each that stays runnable gets a turn."""
    world = play(World(make()), actions)
    before = dict(world.ran)
    world.run(4_000 * SLICE)
    assert all(world.ran[vcpu] > before.get(vcpu, 0) for vcpu in world.runnable)


@BOTH
def test_same_calls_same_decisions(make: Make) -> None:
    random = Random(7)
    actions = [
        (random.choice(("wake", "sleep", "run", "run", "set")), random.randrange(6), random.randrange(1, 900))
        for _ in range(500)
    ]
    assert play(World(make()), actions).turns == play(World(make()), actions).turns


@BOTH
def test_asking_again_when_idle_changes_nothing(make: Make) -> None:
    world = World(make()).wake(0).run(50)
    world.sleep(0)
    assert world.scheduler.pick(world.now) is None
    state = deepcopy(world.scheduler.state())
    assert world.scheduler.pick(world.now + 500) is None
    assert {**world.scheduler.state(), "times": ()} == {**state, "times": ()}


# Sleepers and warps -----------------------------------------------------------------------------------------------


def test_sleep_saves_nothing_up() -> None:
    world = World(bvt()).wake(0).run(100 * SLICE)
    world.wake(1).run(20 * SLICE)
    assert world.ran[1] == pytest.approx(10 * SLICE, abs=2 * ALLOWANCE)


def interactive(warp: int, limit: int = 0, unwarp: int = 0, *, sleeper: Sleeper, hogs: int = 5) -> World:
    """Vcpu 0 sleeps and wakes, the others compute."""
    scheduler = Bvt(SLICE, ALLOWANCE)
    scheduler.add(0)
    scheduler.set_parameters(0, 0, {"warp": warp, "warp_limit": limit, "unwarp": unwarp})
    world = World(scheduler, {0: sleeper})
    return world.wake(*range(1, hogs + 1)).run(10 * SLICE).wake(0)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(2 * ALLOWANCE, 50_000), st.integers(5, 200))
def test_a_warped_one_runs_the_moment_it_wakes(hogs: int, warp: int, burst: int) -> None:
    # It wants less than its share, so nothing of what it borrows stays unpaid.
    period = 2 * burst * (hogs + 1) + 13
    world = interactive(warp, sleeper=Sleeper(period, burst), hogs=hogs).run(60 * period)
    assert len(world.latencies[0]) >= 59
    assert max(world.latencies[0]) == 0


def test_without_a_warp_it_waits_for_its_place() -> None:
    world = interactive(0, sleeper=Sleeper(3000, 50), hogs=12).run(300_000)
    warped = interactive(1000, sleeper=Sleeper(3000, 50), hogs=12).run(300_000)
    assert max(world.latencies[0]) >= ALLOWANCE // 2
    assert sum(warped.latencies[0]) == 0
    assert warped.ran[0] == pytest.approx(world.ran[0], rel=0.02)


@settings(max_examples=40)
@given(st.integers(0, 5_000), st.integers(1, 8), st.integers(50, 5_000))
def test_what_is_borrowed_is_paid_back(warp: int, hogs: int, burst: int) -> None:
    """One that wants all of the CPU and sleeps for a moment after each burst gets its share and one warp, no more."""
    world = interactive(warp, sleeper=Sleeper(burst + 1, burst), hogs=hogs)
    start = world.now
    world.run(400 * SLICE)
    fair = (world.now - start) / (hogs + 1)
    assert world.ran[0] <= fair + warp + 2 * ALLOWANCE


@settings(max_examples=12)
@given(st.integers(20, 500), st.integers(1, 10), st.integers(10, 400))
def test_a_huge_warp_buys_no_more_than_its_limit(limit: int, times: int, burst: int) -> None:
    """Without the limit it would have the CPU to itself; falling asleep just in time does not help."""
    unwarp = times * limit
    world = interactive(1 << 40, limit, unwarp, sleeper=Sleeper(burst + 1, burst), hogs=3)
    start = world.now
    world.run(400 * SLICE)
    length = world.now - start
    # It runs warped for so long, then competes like the others for at least so long.
    warped = limit * (length // (limit + unwarp) + 1)
    assert world.ran[0] <= max(length / 4 + 2 * ALLOWANCE + limit, warped + 2 * ALLOWANCE)
    assert all(world.ran[hog] > 0 for hog in (1, 2, 3))
    unlimited = interactive(1 << 40, sleeper=Sleeper(burst + 1, burst), hogs=3).run(400 * SLICE)
    assert unlimited.ran[0] > 0.9 * length


def test_a_warp_ends_at_its_limit_in_the_middle_of_a_turn() -> None:
    world = interactive(1 << 40, 70, 1 << 40, sleeper=Sleeper(100_000, 5_000))
    begin = world.now
    world.run(200)
    assert (begin, (0, 70)) in world.turns
    assert (begin + 70) in [time for time, _picked in world.turns]
    assert not world.scheduler.state()["vcpus"][0]["warped"]


def test_credit_boosts_whoever_wakes_with_credit_left() -> None:
    world = World(credit(), {0: Sleeper(2500, 50)}).wake(*range(1, 6)).run(10 * SLICE).wake(0).run(100 * SLICE)
    assert max(world.latencies[0]) == 0
    greedy = World(credit(), {0: Sleeper(901, 900)}).wake(*range(1, 6)).run(10 * SLICE).wake(0).run(600 * SLICE)
    assert greedy.ran[0] <= 100 * SLICE * 1.1
    assert max(greedy.latencies[0]) > SLICE


def test_yields_save_nothing_up() -> None:
    xen = machine(bvt(), YIELD, LOOP)
    xen.run(100_000)
    clocks = xen.scheduler.state()["vcpus"].values()
    ahead = max(clock["avt"] for clock in clocks) - min(clock["avt"] for clock in clocks)
    assert ahead * 256 <= 2 * ALLOWANCE << 20


def test_weights_count_beside_sleepers_who_do_not_use_their_credit() -> None:
    """What a sleeper cannot keep goes to the others, or they would all sink into debt, where weights do not count."""
    scheduler = credit()
    for vcpu, weight in ((0, 1000), (1, 100), (2, 300)):
        scheduler.add(vcpu)
        scheduler.set_parameters(vcpu, 0, {"weight": weight})
    world = World(scheduler, {0: Sleeper(700, 10)}).wake(0, 1, 2).run(2000 * SLICE)
    assert world.ran[2] == pytest.approx(3 * world.ran[1], rel=0.04)


def test_nobody_keeps_more_than_a_period_of_credit_or_debt() -> None:
    world = World(credit(), {vcpu: Sleeper(3 * SLICE // 7, 2) for vcpu in range(1, 9)}).wake(*range(9))
    period = SLICE << 20
    for _ in range(100):
        world.run(SLICE)
        for vcpu, account in world.scheduler.state()["vcpus"].items():
            assert account["credit"] >= -2 * period  # one that was kept, and a turn
            assert account["credit"] <= period or vcpu in world.runnable


def test_nobody_sinks_deeper_than_a_period_of_debt() -> None:
    """One that takes most of the CPU while another one of far more weight lets it, waking with a boost each time."""
    scheduler = credit()
    for vcpu, weight in ((0, 60_000), (1, 1)):
        scheduler.add(vcpu)
        scheduler.set_parameters(vcpu, 0, {"weight": weight})
    world = World(scheduler, {1: Sleeper(212, 703)}).wake(0, 1)
    deepest = 0
    for _ in range(150):
        world.run(SLICE)
        deepest = min(deepest, *(account["credit"] for account in scheduler.state()["vcpus"].values()))
    period = SLICE << 20
    assert -2 * period <= deepest < -period  # one that was kept, and a turn


def test_one_that_falls_asleep_keeps_a_period_of_credit() -> None:
    # The heavy one waits for its first turn behind twenty others, and earns nearly all there is.
    world = with_weights(credit, [1] * 20 + [60_000]).run(6 * SLICE)
    period = SLICE << 20
    assert world.scheduler.state()["vcpus"][20]["credit"] > 4 * period
    world.sleep(20)
    assert world.scheduler.state()["vcpus"][20]["credit"] == period


def test_a_new_weight_leaves_no_part_of_the_old_one() -> None:
    scheduler = with_weights(bvt, [65_535]).run(778).scheduler
    assert isinstance(scheduler, Bvt)
    scheduler.pick(778)
    assert scheduler.state()["vcpus"][0]["rest"] > 0
    scheduler.set_parameters(0, 778, {"weight": 3})
    assert scheduler.state()["vcpus"][0]["rest"] == 0


@BOTH
def test_a_yield_lets_the_next_one_go_first(make: Make) -> None:
    scheduler = make()
    for vcpu in (0, 1):
        scheduler.wake(vcpu, 0)
    first = scheduler.pick(0)
    assert first is not None
    second = scheduler.pick(5)
    assert second is not None
    assert {first[0], second[0]} == {0, 1}
    # But a wake-up of somebody else is none.
    scheduler.wake(2, 7)
    third = scheduler.pick(7)
    assert third is not None
    assert third[0] in (second[0], 2)


# What it costs ----------------------------------------------------------------------------------------------------


def opcodes(action: Callable[[], object]) -> int:
    """How many instructions of Python an action takes: a cost that does not depend on the host."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event in ("opcode", "line")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@BOTH
def test_a_pick_among_128_costs_what_one_among_two_does(make: Make) -> None:
    costs = []
    for vcpus in (1, 2, 128):
        world = with_weights(make, [256] * vcpus).run(128 * SLICE)
        cost = 0
        for _ in range(50):
            # In a period and in an allowance; handing out credit is once a period.
            world.scheduler.wake(999, world.now)
            cost += opcodes(partial(world.scheduler.pick, world.now))
            world.scheduler.sleep(999, world.now)
            cost += opcodes(partial(world.scheduler.pick, world.now))
        costs.append(cost)
    alone, two, many = costs
    assert 0 < many <= 1.1 * two
    assert many <= 2.5 * alone


def test_bvt_turns_among_128_cost_what_turns_among_two_do() -> None:
    costs = []
    for vcpus in (2, 128):
        world = with_weights(bvt, range(100, 100 + vcpus))
        costs.append(opcodes(partial(world.run, 100_000)) / len(world.turns))
    assert costs[1] <= 1.1 * costs[0]


# Parameters -------------------------------------------------------------------------------------------------------

BAD = [
    ({"weight": 0}, "weight of vCPU 0: expected a whole number from 1 to 65535, found 0"),
    ({"weight": -5}, "found -5"),
    ({"weight": 65_536}, "found 65536"),
    ({"weight": 1.5}, "found 1.5"),
    ({"weight": True}, "found True"),
    ({"weight": "256"}, "found '256'"),
    ({"cap": 50}, "has no parameter 'cap'; it has weight"),
]
BAD_WARPS = [
    ({"weight": 5, "warp": -1}, "warp of vCPU 0: expected a whole number from 0"),
    ({"weight": 5, "warp_limit": -1}, "warp_limit"),
    ({"weight": 5, "unwarp": None}, "found None"),
]


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [(make, *bad) for make in (bvt, credit) for bad in BAD] + [(bvt, *bad) for bad in BAD_WARPS],
)
def test_what_cannot_be_followed_is_refused_and_changes_nothing(
    make: Make, values: dict[str, Any], message: str
) -> None:
    world = with_weights(make, [100, 200]).run(333)
    state = deepcopy(world.scheduler.state())
    assert isinstance(world.scheduler, Tunable)
    with pytest.raises(ScheduleError, match=message):
        world.scheduler.set_parameters(0, world.now, values)
    assert world.scheduler.state() == state


@BOTH
def test_an_unknown_vcpu_is_refused_and_changes_nothing(make: Make) -> None:
    scheduler = with_weights(make, [100, 200]).scheduler
    state = deepcopy(scheduler.state())
    assert isinstance(scheduler, Tunable)
    for act in (
        lambda: scheduler.set_parameters(7, 0, {"weight": 5}),
        lambda: scheduler.parameters(7),
        lambda: scheduler.sleep(7, 0),
    ):
        with pytest.raises(XenlabError, match=r"expected one of vCPUs \[0, 1\], found 7"):
            act()
    with pytest.raises(ScheduleError, match="found 1, which is runnable"):
        scheduler.wake(1, 0)
    scheduler.add(9)
    with pytest.raises(ScheduleError, match="found 9, which sleeps"):
        scheduler.sleep(9, 0)
    scheduler.remove(9)
    assert scheduler.state() == state


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "x"])
def test_no_turn_without_a_length(wrong: Any) -> None:
    for make in (lambda: Bvt(wrong), lambda: Bvt(SLICE, wrong), lambda: Credit(wrong)):
        with pytest.raises(ScheduleError, match="expected a whole number from 1 on"):
            make()


@BOTH
def test_a_new_weight_holds_from_then_on(make: Make) -> None:
    world = with_weights(make, [256, 256, 256]).run(300 * SLICE)
    before = dict(world.ran)
    assert isinstance(world.scheduler, Tunable)
    for vcpu, weight in enumerate((100, 200, 300)):
        world.scheduler.set_parameters(vcpu, world.now, {"weight": weight})
    world.run(600 * SLICE)
    assert_shares({vcpu: world.ran[vcpu] - before[vcpu] for vcpu in world.ran}, [100, 200, 300])


# Real guests ------------------------------------------------------------------------------------------------------


def machine(scheduler: Scheduler, *sources: str) -> Hypervisor:
    xen = Hypervisor(Machine(8), scheduler=scheduler, trace=Trace())
    for source in sources:
        boot(xen, source)
    return xen


def rounds(domain: Domain) -> int:
    return domain.vcpus[0].state.eax


def parameters(xen: Hypervisor, key: int) -> dict[str, int]:
    assert isinstance(xen.scheduler, Tunable)
    return xen.scheduler.parameters(key)


def refusals(xen: Hypervisor) -> list[str]:
    assert xen.trace is not None
    return [event.change for event in xen.trace.events(Kind.DOMAIN) if "not " in event.change]


@BOTH
def test_guests_get_shares_by_their_weights(make: Make) -> None:
    xen = machine(make(), LOOP, LOOP, LOOP)
    for domid, weight in enumerate((128, 256, 512)):
        xen.submit(SetSchedule(domid, {"weight": weight}))
    xen.run(300_000)
    assert_shares({domid: rounds(domain) for domid, domain in xen.domains.items()}, [128, 256, 512])


@BOTH
def test_a_guest_that_yields_leaves_the_cpu_to_others(make: Make) -> None:
    xen = machine(make(), YIELD, LOOP)
    xen.run(50_000)
    assert rounds(xen.domains[1]) > 22_000
    assert xen.domains[0].vcpus[0].state.edi > 10


def test_a_domain_that_never_ran_can_be_given_parameters() -> None:
    xen = machine(bvt(), LOOP)
    domain = build(xen, image_from_source(LOOP, "waits"))
    set_parameters(xen, domain, {"weight": 1024, "warp": 5})
    xen.unpause(domain)
    xen.run(50_000)
    assert rounds(domain) == pytest.approx(4 * rounds(xen.domains[0]), rel=0.04)


def test_a_number_that_is_used_again_begins_anew() -> None:
    xen = machine(bvt(), LOOP, LOOP)
    set_parameters(xen, xen.domains[1], {"weight": 1, "warp": 100})
    xen.run(5_000)
    xen.destroy(xen.domains[1])
    with pytest.raises(ScheduleError, match=r"expected one of vCPUs \[0\], found 32"):
        parameters(xen, 32)
    heir = boot(xen, LOOP)
    assert heir.domid == 1
    assert parameters(xen, 32) == {"weight": 256, "warp": 0, "warp_limit": 0, "unwarp": 0}
    before = rounds(xen.domains[0])
    xen.run(50_000)
    assert rounds(heir) == pytest.approx(rounds(xen.domains[0]) - before, rel=0.04)


@pytest.mark.parametrize("values", [{"weight": 0}, {"weight": -1}, {"warp": -1}, {"weight": 1.5}, {"warp": None}])
def test_the_tools_are_told_at_once_what_nobody_can_follow(values: Any) -> None:
    with pytest.raises(ScheduleError, match="of domain 1: expected a whole number from"):
        SetSchedule(1, values)


def test_what_this_scheduler_cannot_follow_leaves_an_event() -> None:
    xen = machine(bvt(), LOOP)
    xen.submit(SetSchedule(0, {"weight": 7, "cap": 50}))
    xen.submit(SetSchedule(9, {"weight": 7}))
    assert xen.run(1000).stop is Stop.BUDGET
    assert parameters(xen, 0)["weight"] == 256
    assert refusals(xen) == [
        "not scheduled: Bvt has no parameter 'cap'; it has weight, warp, warp_limit, unwarp",
    ]
    xen.submit(SetScheduler(RoundRobin(50)))
    xen.submit(SetSchedule(0, {"weight": 7}))
    xen.run(1000)
    assert "RoundRobin has no parameters" in refusals(xen)[-1]


@pytest.mark.parametrize("after", [bvt, credit, lambda: RoundRobin(100)], ids=["bvt", "credit", "round robin"])
@pytest.mark.parametrize("before", [bvt, credit, lambda: RoundRobin(100)], ids=["bvt", "credit", "round robin"])
def test_the_scheduler_can_be_changed_while_domains_run(
    before: Callable[[], Scheduler], after: Callable[[], Scheduler]
) -> None:
    xen = machine(before(), LOOP, LOOP, LOOP)
    xen.submit(SetSchedule(1, {"weight": 512}))
    xen.pause(xen.domains[2])
    xen.run(30_000)
    had = [rounds(domain) for domain in xen.domains.values()]
    xen.submit(SetScheduler(after()))
    xen.run(30_000)
    got = [rounds(domain) - then for domain, then in zip(xen.domains.values(), had, strict=True)]
    assert got[2] == 0
    # The weight goes with the domain where both know weights.
    twice = isinstance(xen.scheduler, Tunable) and not isinstance(before(), RoundRobin)
    assert got[1] == pytest.approx((2 if twice else 1) * got[0], rel=0.08)
    xen.unpause(xen.domains[2])
    xen.run(3_000)
    assert rounds(xen.domains[2]) > 0


class Broken(RoundRobin):
    """Fails at the second vCPU."""

    def wake(self, vcpu: int, now: int) -> None:
        if self.state():
            raise ValueError("one is enough")
        super().wake(vcpu, now)


def test_a_scheduler_that_cannot_take_over_leaves_the_old_one() -> None:
    xen = machine(bvt(), LOOP, LOOP)
    xen.run(500)
    old = xen.scheduler
    with pytest.raises(PartError, match=r"Broken, told that vCPU 32 is runnable: .* ValueError: one is enough"):
        change_scheduler(xen, Broken())
    assert xen.scheduler is old
    assert xen.run(500).instructions == 500


def test_a_scheduler_that_cannot_be_copied_is_refused() -> None:
    scheduler = RoundRobin()
    scheduler.order = (number for number in range(3))  # type: ignore[attr-defined]
    with pytest.raises(ScheduleError, match="RoundRobin cannot be copied"):
        SetScheduler(scheduler)


@BOTH
def test_a_run_can_be_taken_back_through_all_changes(make: Make) -> None:
    xen = Hypervisor(Machine(8), scheduler=make())
    for source in (LOOP, YIELD, LOOP):
        boot(xen, source)
    timeline = Timeline(xen, interval=500)
    timeline.run(3_000)
    timeline.submit(SetSchedule(0, {"weight": 700}))
    timeline.run(3_000)
    timeline.submit(SetScheduler(Credit(700) if make is bvt else Bvt(700, 50)))
    timeline.submit(SetSchedule(2, {"weight": 99, "warp": 300}))
    timeline.run(3_000)
    timeline.submit(SetScheduler(RoundRobin(60)))
    timeline.submit(Destroy(1))
    timeline.run(3_000)
    hashes: dict[int, str] = {}
    for time in (12_000, 2_500, 9_000, 6_000, 4_001, 0, 12_000):
        assert timeline.seek(time) == time
        hashes.setdefault(time, timeline.machine_hash())
        assert hashes[time] == timeline.machine_hash()
    after, events = timeline.machine_hash(), timeline.events()
    timeline.seek(0)
    assert isinstance(xen.scheduler, type(make()))
    timeline.run(12_000)
    assert (timeline.machine_hash(), timeline.events()) == (after, events)
    assert isinstance(xen.scheduler, RoundRobin)


@BOTH
@pytest.mark.parametrize("cut", [1, 7, 99, 1000])
def test_turns_do_not_depend_on_how_the_run_is_cut(make: Make, cut: int) -> None:
    machines = [machine(make(), LOOP, YIELD, LOOP) for _ in range(2)]
    machines[0].run(4000)
    while machines[1].now < 4000:
        machines[1].run(min(cut, 4000 - machines[1].now))
    traces = [xen.trace.raw() for xen in machines if xen.trace is not None]
    assert traces[0] == traces[1]
    assert machines[0].scheduler.state() == machines[1].scheduler.state()


def test_the_scheduler_knows_who_is_runnable_as_the_hypervisor_does() -> None:
    xen = machine(bvt(), LOOP, LOOP, SLEEPER)
    xen.pause(xen.domains[0])
    xen.run(1000)
    clocks = xen.scheduler.state()["vcpus"]
    assert {key: clock["runnable"] for key, clock in clocks.items()} == {0: False, 32: True, 64: False}
    assert {key: vcpu.run_state is RunState.RUNNABLE for key, vcpu in xen.vcpus.items()} == {
        0: False,
        32: True,
        64: False,
    }


def test_a_key_reaches_a_warped_guest_at_once() -> None:
    xen = machine(Bvt(SLICE, 10 * ALLOWANCE), *[LOOP] * 4, SLEEPER)
    reaction: dict[int, list[int]] = {}
    for warp in (0, 20 * ALLOWANCE):
        xen.submit(SetSchedule(4, {"warp": warp}))
        for _ in range(20):
            # A moment at which another one has most of its allowance before it.
            xen.run(1_237)
            woken, before = xen.now, xen.domains[4].vcpus[0].state.edi
            xen.submit(Typed(4, b"x"))
            while xen.domains[4].vcpus[0].state.edi == before:
                xen.run(1)
            reaction.setdefault(warp, []).append(xen.now - woken)
            assert xen.domains[4].vcpus[0].state.edi == before + 1
    least, most = (max(times) for _warp, times in sorted(reaction.items(), reverse=True))
    assert least <= 10 < most
