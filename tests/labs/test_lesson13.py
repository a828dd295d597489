"""The scenes of lesson 13 show what the machine did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from xenlab import XenlabError, boot
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.frames import FREE
from xenlab.labs import lesson13
from xenlab.toolstack.balloon import MoveUnderPressure, Row, SetMaximum, SetTarget, read_store
from xenlab.views import BalloonView


def test_the_lists_follow_a_page_out_and_back() -> None:
    xen = lesson13.machine()
    lesson13.settle(xen)
    guest, pages = xen.domains[0], range(0xFC, 0x100)
    old = [lesson13.p2m(xen, guest, pfn) for pfn in pages]
    assert lesson13.lists(xen, guest, pages).count("domain 0") == 4
    assert lesson13.set_target(xen, 0, 252) == 252
    assert lesson13.lists(xen, guest, pages).count("away") == 4
    assert lesson13.frames(xen, old).count("free") == 4
    assert all(xen.frames.owner[mfn] == FREE for mfn in old)
    xen.pause(boot(xen, "start: jmp start"))
    assert lesson13.set_target(xen, 0, 256) == 256
    assert "away" not in lesson13.lists(xen, guest, pages)
    assert not {lesson13.p2m(xen, guest, pfn) for pfn in pages} & set(old)
    check(xen)


def test_four_pages_take_one_batch_and_one_call() -> None:
    xen = lesson13.machine()
    lesson13.settle(xen)
    start = xen.now
    lesson13.set_target(xen, 0, 252)
    rows = [line.split() for line in lesson13.calls_since(xen, start).splitlines()[2:]]
    assert dict(rows) == {"multicall": "1", "memory_op": "1", "sched_op": "1"}
    start = xen.now
    lesson13.set_target(xen, 0, 152)
    assert "memory_op  7" in lesson13.calls_since(xen, start)


def test_a_guest_that_works_never_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson13, "_ENOUGH", 100_000)
    with pytest.raises(XenlabError, match="one still runs"):
        lesson13.settle(lesson13.machine(["2: 5x9"]))


@pytest.mark.parametrize("memory_mib", [1, 5, 64])
def test_what_is_left_adds_up(memory_mib: int) -> None:
    lowest = lesson13.lowest(memory_mib)
    assert lowest.pages == (256 * memory_mib, sum(pages for _what, pages in lowest.left))
    assert all(pages > 0 for _what, pages in lowest.left)
    assert lowest.pages[1] == lowest.xen.domains[0].pages
    assert str(lowest).splitlines()[-1].split() == ["together", str(lowest.pages[1]), str(lowest.kib[1])]
    check(lowest.xen)


def test_the_listing_is_the_guest_s_source() -> None:
    text = lesson13.listing("give_back", "populate")
    assert text.startswith("give_back:")
    assert "XENMEM_decrease_reservation" in text
    assert "populate:" not in text


def test_short_of_memory_until_the_maximum_is_raised() -> None:
    xen, guest = lesson13.short_of_memory(100)
    assert (guest.console, guest.pages) == ("out of memory\n", 100)
    assert read_store(xen, guest).failed > 0
    xen.submit(SetMaximum(0, 200))
    xen.run(100_000)
    assert guest.console.endswith("memory again\n")


def test_a_driver_that_does_not_obey_gets_as_far_as_its_maximum() -> None:
    xen = lesson13.machine()
    stubborn = boot(xen, lesson13.stubborn())
    for item in (SetMaximum(1, 300), SetTarget(1, 100)):
        xen.submit(item)
    lesson13.settle(xen)
    assert stubborn.pages == 300
    check(xen)


class Equal:
    def targets(self, free: int, domains: Sequence[Row]) -> Mapping[int, int]:
        everything = free + sum(domain["have"] for domain in domains)
        return {domain["domid"]: everything // len(domains) for domain in domains}


def test_a_policy_makes_a_difference() -> None:
    without, pressed, equal = lesson13.uneven(), lesson13.uneven(MoveUnderPressure()), lesson13.uneven(Equal())
    assert lesson13.failed(pressed) < min(lesson13.failed(without), lesson13.failed(equal))
    assert pressed.domains[2].pages < without.domains[2].pages
    assert lesson13.shortages(pressed) != lesson13.shortages(without)
    for xen in (without, pressed, equal):
        check(xen)


def test_the_driver_s_timeline_begins_with_a_guest_asleep() -> None:
    timeline = lesson13.driver_timeline()
    assert timeline.run(1_000).instructions == 0
    timeline.submit(SetTarget(0, 120))
    timeline.run(50_000)
    assert timeline.hypervisor.domains[0].pages == 120
    timeline.seek(timeline.start)
    assert timeline.hypervisor.domains[0].pages == 256


def test_pressure_can_be_watched_forwards_and_backwards() -> None:
    timeline = lesson13.pressure_timeline()
    timeline.run(300_000)
    end, late = timeline.position, BalloonView(timeline.hypervisor).text()
    timeline.seek(100_000)
    assert BalloonView(timeline.hypervisor).text() != late
    timeline.seek(end)
    assert BalloonView(timeline.hypervisor).text() == late
    for domain in timeline.hypervisor.domains.values():
        assert lesson13.LEAST <= domain.pages <= lesson13.MOST
