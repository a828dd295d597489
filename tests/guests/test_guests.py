"""The guests that come with xenlab do what their first lines say."""

from __future__ import annotations

import pytest

from xenlab import Hypervisor, ImageError, boot, guests
from xenlab.abi.numbers import Errno, Hypercall, Shutdown
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode


def run(name: str, mode: PagingMode = TWO_LEVEL) -> tuple[Hypervisor, str]:
    xen = Hypervisor(trace=Trace())
    guest = boot(xen, guests.source(name), name=name, mode=mode)
    xen.run(10_000)
    assert guest.shutdown is Shutdown.POWEROFF, guest.report
    return xen, guest.console


@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def test_hello_prints_and_powers_off(mode: PagingMode) -> None:
    _xen, console = run("hello", mode)
    assert console == "Hello from ring 1\n"


@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def test_rings_crosses_between_all_rings(mode: PagingMode) -> None:
    xen, console = run("rings", mode)
    assert console == "a!?z"
    deliveries = [(event.vector, event.from_ring, event.to_ring) for event in xen.trace.events(Kind.DELIVER)]
    assert deliveries == [(0x80, 3, 1), (13, 3, 1), (14, 3, 1), (0x80, 3, 1), (0x80, 3, 1)]
    assert [event.to_ring for event in xen.trace.events(Kind.IRET)] == [3, 3, 3, 3]
    assert len(xen.trace.events(Kind.EMULATE)) == 1


def test_pager_gives_pages_on_demand_and_is_called_without_the_hypervisor() -> None:
    xen, console = run("pager")
    assert console == "pg."
    mapped = [event for event in xen.trace.events(Kind.HYPERCALL) if event.number == Hypercall.update_va_mapping]
    assert [event.registers[3] for event in mapped] == [0xC020_3000, 0xC020_5000]
    assert [event.vector for event in xen.trace.events(Kind.DELIVER)] == [14, 6, 14, 14, 0x81]
    assert [event.vector for event in xen.trace.events(Kind.GATE)] == [0x80] * 3


def test_counter_never_stops_and_does_not_keep_the_cpu() -> None:
    xen = Hypervisor()
    domains = [boot(xen, guests.source("counter"), name=name) for name in "ab"]
    xen.run(1_000_000)
    assert not any(domain.ended for domain in domains)
    assert all(len(domain.console) > 5 for domain in domains)


def test_calls_does_the_same_work_three_ways_and_is_refused_three_times() -> None:
    xen, _console = run("calls")
    returns = [(event.number, event.result) for event in xen.trace.events(Kind.RETURN)]
    version = 4 << 16 | 17
    assert returns[:32] == [(Hypercall.xen_version, version)] * 32
    assert returns[32] == (Hypercall.multicall, 0)
    assert [result for _number, result in returns[33:36]] == [-Errno.ENOSYS, -Errno.ENOSYS, -Errno.EFAULT]


def test_frames_finds_its_way_through_both_lists_and_swaps_two_of_its_frames() -> None:
    xen, console = run("frames")
    assert console == "12345"
    guest, m2p = xen.domains[0], xen.frames.m2p
    left, right = (guest.symbols[name] - 0xC000_0000 >> 12 for name in ("left", "right"))
    assert (m2p[guest.frames[left]], m2p[guest.frames[right]]) == (right, left)
    answers = [event.result for event in xen.trace.events(Kind.RETURN) if event.number == Hypercall.update_va_mapping]
    assert answers == [0, -Errno.EBUSY]


def test_an_unknown_guest_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ImageError, match="counter, frames, hello"):
        guests.source("no-such-guest")
