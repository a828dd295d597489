"""The benchmarks of many domains measure what they say: one upcall or one switch a round, and all domains at work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xenlab.cli.benchmarks import Unit, catalogue, guests, many
from xenlab.errors import XenlabError
from xenlab.hypervisor.domain import RunState
from xenlab.hypervisor.schedulers import Bvt, RoundRobin, Scheduler
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs.crowd import Crowd
from xenlab.toolstack import image_from_source


def test_an_event_a_round() -> None:
    xen = guests.hypervisor_with(many.UPCALL, traced=True)
    assert xen.trace is not None
    xen.trace.clear()
    xen.run(10 * many.UPCALL_INSTRUCTIONS)
    assert [event.result for event in xen.trace.events(Kind.RETURN)] == [0] * 10
    assert [(event.from_ring, event.to_ring) for event in xen.trace.events(Kind.UPCALL)] == [(1, 1)] * 10
    assert not xen.domains[0].ended


@pytest.mark.parametrize("scheduler", [RoundRobin, Bvt])
def test_each_round_is_a_switch_and_all_have_their_turn(scheduler: Callable[[], Scheduler]) -> None:
    xen = many.switching(scheduler(), 16)
    xen.trace = Trace()
    xen.run(32 * guests.YIELD_INSTRUCTIONS)
    switches = [event.to_vcpu for event in xen.trace.events(Kind.SWITCH)]
    assert len(switches) == len(xen.trace.events(Kind.RETURN)) == 32
    assert sorted(switches) == sorted(list(xen.vcpus) * 2)


def test_all_write_their_line() -> None:
    xen = many.all_greet(image_from_source(many.GREETS))
    assert len(xen.domains) == many.DOMAINS == 128
    assert {domain.vcpus[0].run_state for domain in xen.domains.values()} == {RunState.BLOCKED}
    with pytest.raises(XenlabError, match=r"no line from the domains \[0, 1, 2"):
        many.all_greet(image_from_source("start: jmp start"))


def test_throughput_is_of_few_against_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def small(count: int) -> Crowd:
        counts.append(count)
        return Crowd(min(count, 3))

    monkeypatch.setattr(many, "Crowd", small)
    assert 0.1 < many.domains_128_throughput()() < 10
    assert counts == [1, 128]


@pytest.mark.parametrize("name", ["event_upcall", "domain_switch_128", "domains_128_boot"])
def test_each_gives_a_value(name: str) -> None:
    assert catalogue()[name].prepare()() > 0


def test_targets_are_the_papers() -> None:
    found = catalogue()
    assert (found["domains_128_throughput"].unit, found["domains_128_throughput"].target) == (Unit.RATIO, 0.925)
    assert not found["domains_128_throughput"].met(0.92, 1000)
    assert found["domains_128_boot"].met(3.9, 1000)
