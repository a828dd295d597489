"""The scenes of lesson 09 show what the machine did."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import XenlabError
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.clocks import to_ns
from xenlab.labs import lesson09
from xenlab.labs.lesson09 import MILLISECOND
from xenlab.labs.time_guests import listing
from xenlab.views import ClocksView


@pytest.mark.parametrize("domains", [1, 3])
def test_all_count_the_same_however_late_it_is(domains: int) -> None:
    found = lesson09.drift(domains)
    assert all(guest.counted in (9, 10, 11) for guest in found)
    assert all(guest.virtual_ns - 10_000_000 < 20_000 for guest in found)
    assert max(guest.real_ns for guest in found) >= domains * 10_000_000
    assert lesson09.drift_table((1,)).splitlines()[-1].split()[:2] == ["1", "10"]


def test_a_guest_that_never_reads_the_clock_is_told() -> None:
    with pytest.raises(XenlabError, match="expected domain 0 to have read the clocks"):
        lesson09.drift(4, work=8)


@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=5))
@settings(max_examples=10, deadline=None)
def test_guests_compute_real_time_to_the_instruction(work: list[int]) -> None:
    plan = " ".join(f"w {length} n" for length in work)
    xen = lesson09.run(f"{plan} q", "w 4000000000", instructions=2 * sum(work) + 40 * MILLISECOND, turn=MILLISECOND)
    assert len(lesson09.notes(xen)) == len(work)
    assert [real for real, _virtual in lesson09.notes(xen)] == [to_ns(time) for time in lesson09.counter_reads(xen)]
    virtual = [ran for _real, ran in lesson09.notes(xen)]
    assert virtual == sorted(virtual)
    assert virtual[-1] <= lesson09.virtual_ns(xen, 0)


def test_half_a_record_is_a_time_in_the_future_and_the_version_tells() -> None:
    computed, true, xen = lesson09.torn_read(careful=False)
    assert computed > true + 20_000_000
    check(xen)
    computed, true, xen = lesson09.torn_read(careful=True)
    assert computed == true
    assert lesson09.word(xen, xen.domains[0], "rounds") == 2


@pytest.mark.parametrize("neighbours", [0, 2])
def test_processes_are_charged_fairly_by_virtual_time_only(neighbours: int) -> None:
    xen, domain = lesson09.two_processes_beside(neighbours)
    done, by_real, by_virtual = (lesson09.words(xen, domain, name, 2) for name in ("done", "by_real", "by_virtual"))
    assert abs(done[0] - done[1]) < 10
    assert abs(by_virtual[0] - by_virtual[1]) < 1_000
    assert (abs(by_real[0] - by_real[1]) < 1_000) == (neighbours == 0)
    assert lesson09.charges(xen, domain).splitlines()[2].startswith("A ")


def test_a_kernel_that_has_no_turns_is_told() -> None:
    with pytest.raises(XenlabError, match="has not had 1000000 turns"):
        lesson09.two_processes_beside(0, turns=1_000_000)


def test_the_watched_domains_do_what_they_are_watched_for() -> None:
    timeline = lesson09.watched_timeline()
    timeline.run(12 * MILLISECOND)
    late = ClocksView(timeline.hypervisor).text()
    names = {
        domid: {name for _time, _domid, name in lesson09.went_off(timeline.hypervisor, domid)} for domid in range(3)
    }
    assert names == {0: {"tick"}, 1: {"virtual"}, 2: {"real"}}
    timeline.seek(3 * MILLISECOND)
    assert ClocksView(timeline.hypervisor).text() != late
    timeline.seek(12 * MILLISECOND)
    assert ClocksView(timeline.hypervisor).text() == late
    check(timeline.hypervisor)


PLANS = {
    "w 500 R 1 V 1 w 5000 q": (1, 1),
    "r 2000 r 9000 w 5000 w 9000 q": (1, 0),
    "r 2000 x w 9000 q": (0, 0),
    "v 2000 y w 9000 q": (0, 0),
    "e w 9000 q": (0, 0),
    "e v 2000 w 9000 q": (0, 1),
    "r 500 w 2000 s q": (1, 0),
    "p 3000 q": (0, 0),
    "v 500 p 3000 q": (0, 0),
    "t 100000 w 350000 t 0 w 350000 q": (3, 0),
}


@pytest.mark.parametrize("plan", PLANS)
def test_plans_of_the_guest(plan: str) -> None:
    xen = lesson09.run(plan, instructions=10 * MILLISECOND)
    domain = xen.domains[0]
    assert (domain.ended, domain.report) == (True, "")
    assert lesson09.events(xen) == PLANS[plan]
    check(xen)


def test_a_plan_may_go_round_and_a_guest_sleep_for_ever() -> None:
    xen = lesson09.run("( r 5000 s )", "w 100", "", instructions=60_000)
    assert 9 <= lesson09.events(xen)[0] <= 12
    assert not any(domain.ended for domain in xen.domains.values())
    assert xen.current is None


def test_more_notes_than_fit_are_left_out() -> None:
    xen = lesson09.run("( n )", instructions=100_000)
    assert len(lesson09.notes(xen)) == 64


def test_the_listing_is_the_guest_s_source() -> None:
    text = listing("real_time", "virtual_time")
    assert text.startswith("real_time:")
    assert "rdtsc" in text
    assert "vcpu_op" not in text
