"""The control domain sets the wall clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, XenlabError, boot
from xenlab.abi.structures import SharedInfo
from xenlab.hypervisor.clocks import WALL_CLOCK_AT_START, to_ns
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.timeline import Timeline
from xenlab.toolstack.clock import SetWallClock

SPIN = "start: jmp start"


def shown(xen: Hypervisor, domain: Domain) -> tuple[int, int, int]:
    """Version, and what time it was when real time was 0, in seconds and nanoseconds."""
    info = SharedInfo.from_buffer_copy(xen.memory.frame(domain.shared_info_mfn))
    assert domain.shared_info_mfn << PAGE_SHIFT
    return info.wc_version, info.wc_sec | info.wc_sec_hi << 32, info.wc_nsec


def test_all_domains_see_the_new_time_and_so_does_one_that_comes_later() -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    first = boot(xen, SPIN)
    assert shown(xen, first) == (2, WALL_CLOCK_AT_START, 0)
    xen.run(100_000)
    xen.submit(SetWallClock(1_700_000_000, 5_000_000))
    xen.run(100)
    second = boot(xen, SPIN)
    assert xen.trace is not None
    (applied,) = xen.trace.events(Kind.INPUT)
    expected = 1_700_000_000 * 10**9 + 5_000_000 - to_ns(applied.time)
    for domain, version in ((first, 4), (second, 2)):
        found, seconds, nanoseconds = shown(xen, domain)
        assert found == version
        assert seconds * 10**9 + nanoseconds == expected


def test_it_is_set_again_when_a_run_is_made_again() -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    domain = boot(xen, SPIN)
    timeline = Timeline(xen)
    timeline.run(1_000)
    timeline.submit(SetWallClock(2_000_000_000))
    timeline.run(1_000)
    late = shown(xen, domain)
    timeline.seek(500)
    assert shown(xen, domain) == (2, WALL_CLOCK_AT_START, 0)
    assert xen.clocks.wall_clock == (WALL_CLOCK_AT_START, 0)
    timeline.seek(2_000)
    assert shown(xen, domain) == late


@given(st.integers(0, (1 << 62) - 1), st.integers(0, 10**9 - 1))
def test_any_time_of_day_can_be_set(seconds: int, nanoseconds: int) -> None:
    xen = Hypervisor(Machine(2))
    SetWallClock(seconds, nanoseconds).apply(xen)
    assert xen.clocks.wall_clock == (seconds, nanoseconds)


@pytest.mark.parametrize("values", [(-1, 0), (1 << 62, 0), (0, -1), (0, 10**9), (1.5, 0), (True, 0), ("now", 0)])
def test_what_is_no_time_of_day_is_refused(values: tuple[int, int]) -> None:
    with pytest.raises(XenlabError, match="of the wall clock: expected a whole number from 0 to"):
        SetWallClock(*values)
