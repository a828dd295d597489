"""The experiment with many domains: simulated numbers are the same each time, and are what the schedulers promise."""

from __future__ import annotations

from statistics import median

import pytest

from xenlab.errors import ScheduleError, XenlabError
from xenlab.hypervisor.domain import RunState
from xenlab.hypervisor.schedulers import Bvt, Credit, RoundRobin
from xenlab.hypervisor.trace import Kind
from xenlab.labs.crowd import MOST_DOMAINS, UNIT_INSTRUCTIONS, Crowd
from xenlab.labs.many_domains import (
    INSTRUCTIONS_PER_MS,
    PAPER_IDLE,
    PAPER_LOADED,
    Response,
    Results,
    borrowed_virtual_time,
    experiment,
    idle_response,
    loaded_response,
    throughput,
)

# Turns of 0.5 ms make everything ten times shorter.
SHORT = 0.5


@pytest.fixture(scope="module")
def crowd() -> Crowd:
    return Crowd(3, traced=True)


class TestCrowd:
    def test_each_is_connected_and_at_its_work(self, crowd: Crowd) -> None:
        assert [crowd.control.domid, *(worker.domid for worker in crowd.workers), crowd.idle.domid] == [0, 1, 2, 3, 4]
        assert sorted(crowd.control.ports) == [1, 2, 3, 4]
        assert [port.remote for _number, port in sorted(crowd.control.ports.items())] == [1, 2, 3, 4]
        states = [domain.vcpus[0].run_state for domain in (crowd.control, *crowd.workers, crowd.idle)]
        assert states == [RunState.BLOCKED, *[RunState.RUNNABLE] * 3, RunState.BLOCKED]

    def test_pings_are_answered_and_nobody_else_is_disturbed(self, crowd: Crowd) -> None:
        assert crowd.xen.trace is not None
        crowd.schedule(Bvt(1_000, 1_000), warp=5_000)
        crowd.xen.run(1_000)
        crowd.xen.trace.clear()
        for domain in (crowd.workers[1], crowd.idle):
            before, now = crowd.answers(domain), crowd.xen.now
            for delay in (0, 5_000, 20_000):
                crowd.ping(domain, now + delay)
            crowd.xen.run(40_000)
            assert crowd.answers(domain) == before + 3
        upcalls = [event.domain for event in crowd.xen.trace.events(Kind.UPCALL)]
        assert upcalls == [crowd.workers[1].domid] * 3 + [crowd.idle.domid] * 3
        assert crowd.control.vcpus[0].run_state is RunState.BLOCKED

    def test_a_unit_of_work_has_as_many_instructions_as_it_says(self) -> None:
        alone = Crowd(1)
        before = alone.done()[0]
        alone.xen.run(100 * UNIT_INSTRUCTIONS)
        assert alone.done()[0] - before == 100

    @pytest.mark.parametrize("count", [0, -1, MOST_DOMAINS + 1])
    def test_a_count_out_of_range(self, count: int) -> None:
        with pytest.raises(XenlabError, match=f"expected 1 to {MOST_DOMAINS}, found {count}"):
            Crowd(count)

    @pytest.mark.parametrize("make", [RoundRobin, Credit])
    def test_a_scheduler_without_a_warp(self, make: type[Credit]) -> None:
        with pytest.raises(ScheduleError, match=f"{make.__name__} has no warp"):
            idle_response(2, SHORT, warp_ms=1, make=make)


class TestThroughput:
    def test_work_switches_and_shares(self) -> None:
        alone, eight = throughput([8], [SHORT], instructions=2_000_000, repeats=2)
        assert (alone.domains, eight.domains) == (1, 8)
        assert alone.against_one == 1.0
        assert alone.switches == 0
        # Whoever is chosen catches up with the next one first, and then gets ahead by the allowance.
        turn = SHORT * INSTRUCTIONS_PER_MS * 8 / 7
        assert eight.switches == pytest.approx(4_000_000 / turn, abs=2)
        assert eight.simulated_ms == alone.simulated_ms == 40
        for one in (alone, eight):
            assert one.units == pytest.approx(4_000_000 / UNIT_INSTRUCTIONS, rel=0.02)
            assert one.units_per_simulated_second == pytest.approx(100_000_000 / UNIT_INSTRUCTIONS, rel=0.02)
            assert one.host_rate > 0
        assert max(eight.shares) - min(eight.shares) <= turn / UNIT_INSTRUCTIONS + 1

    def test_longer_turns_are_fewer(self) -> None:
        found = throughput([2], [SHORT, 10 * SHORT], instructions=2_000_000, repeats=1)
        assert [one.slice_ms for one in found] == [SHORT, SHORT, 5, 5]
        assert found[1].switches == pytest.approx(10 * found[3].switches, abs=10)


class TestResponses:
    def test_the_same_seed_gives_the_same_times(self) -> None:
        first, again, other = (loaded_response(8, SHORT, pings=20, seed=seed) for seed in (1, 1, 2))
        assert first == again
        assert first.times_ms != other.times_ms
        assert len(first.times_ms) == 20

    @pytest.mark.parametrize("make", [borrowed_virtual_time, Credit, RoundRobin])
    def test_one_that_computes_waits_for_its_turn(self, make: type[Credit]) -> None:
        found = loaded_response(16, SHORT, make=make, pings=100)
        # Somewhere in a round, evenly: the mean is half of it, the deviation a third of the square root of three.
        assert found.loaded
        assert max(found.times_ms) < 1.2 * 16 * SHORT
        assert found.mean_ms == pytest.approx(16 * SHORT / 2, rel=0.25)
        assert found.deviation_ms == pytest.approx(16 * SHORT / 12**0.5, rel=0.25)

    def test_what_a_warp_does_for_one_that_waits(self) -> None:
        none, some, more = (idle_response(16, SHORT, warp_ms=warp, pings=50) for warp in (0, SHORT / 5, 2 * SHORT))
        assert none.mean_ms > 2 * SHORT
        # The next, after the rest of somebody's turn.
        assert max(some.times_ms) <= SHORT
        assert some.mean_ms > SHORT / 10
        # At once: the few instructions of its callback up to the answer.
        assert max(more.times_ms) * INSTRUCTIONS_PER_MS < 30
        assert not more.loaded
        assert more.warp_ms == 2 * SHORT

    def test_credit_boosts_one_that_waits(self) -> None:
        # Unless it is in debt, for the few instructions that its last answer took.
        assert median(idle_response(16, SHORT, make=Credit, pings=50).times_ms) * INSTRUCTIONS_PER_MS < 30

    def test_mean_and_deviation(self) -> None:
        found = Response(True, 2, 5, 0, (1.0, 3.0))
        assert (found.mean_ms, found.deviation_ms) == (2.0, 1.0)


def test_tables_say_what_was_measured() -> None:
    measured = throughput([2], [SHORT], instructions=200_000, repeats=1)
    text = Results(measured, (Response(True, 128, 5, 0, (1.0, 3.0)), Response(False, 128, 5, 10, (0.25,)))).table()
    rows = [line.split() for line in text.splitlines()]
    assert ["one", "that", "computes", "128", "5", "2", "1", *(f"{figure:g}" for figure in PAPER_LOADED)] in rows
    assert ["the", "one", "that", "waits", "128", "5", "10", "0.25", "0", *map(str, (5.4, 16))] in rows
    assert PAPER_IDLE == (5.4, 16.0)
    assert [row[:2] for row in rows if row[:1] == ["0.5"]] == [["0.5", "1"], ["0.5", "2"]]


@pytest.mark.slow
def test_the_papers_experiment() -> None:
    results = experiment()
    by_count = {(one.slice_ms, one.domains): one for one in results.throughput}
    assert set(by_count) == {(5, 1), (5, 128), (50, 1), (50, 128)}
    # Numbers of the host are measured by `xenlab bench`; these are simulated ones, the same everywhere.
    assert by_count[5, 128].switches == pytest.approx(10 * by_count[50, 128].switches, abs=20)
    assert min(by_count[5, 128].shares) > 0
    half, whole, unwarped, next_one, at_once = results.responses
    assert whole.mean_ms == pytest.approx(2 * half.mean_ms, rel=0.01)
    # On one CPU 64 domains wait as the paper's 128 did on two.
    assert half.mean_ms == pytest.approx(PAPER_LOADED[0], rel=0.1)
    assert half.deviation_ms == pytest.approx(PAPER_LOADED[1], rel=0.15)
    assert unwarped.mean_ms > PAPER_LOADED[0]
    assert next_one.mean_ms < PAPER_IDLE[0]
    assert at_once.mean_ms < 0.001
    assert "147" in results.table()
