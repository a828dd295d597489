"""The picture of the TLB: slots and counters are the replay's, and stale entries are those that a walk contradicts."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from view_guests import ENDLESS, ROUND_TRIPS, talker

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.trace import Trace
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.machine.tlb import FLUSHED, Policy, Tlb, TlbCost
from xenlab.timeline import Timeline
from xenlab.timeline.access_log import AccessLog, recorded
from xenlab.timeline.tlb_replay import HYPERVISOR_PAGE, TlbReplay, both_spaces
from xenlab.views import TlbView, space_bars
from xenlab.views.tlb import APPLICATION, HYPERVISOR, KERNEL

SVG = "{http://www.w3.org/2000/svg}"
# It makes a page of its own read-only by update_va_mapping without asking for a flush, and flushes later.
CARELESS = """
        .set MFN_LIST, 68
start:  mov ebp, [esi + MFN_LIST]
        mov eax, [window]
        mov eax, offset window
        sub eax, 0xc0000000
        shr eax, 12
        mov ecx, [ebp + 4 * eax]
        shl ecx, 12
        or ecx, 0x61
        mov ebx, offset window
        xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
changed: mov eax, [window]
        mov ebx, offset flush
        mov ecx, 1
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
flushed: mov eax, [window]
stay:   jmp stay
flush:  .long MMUEXT_INVLPG_LOCAL, window, 0
        .align 4096
window: .ascii "a"
"""
CHANGED, FLUSHED_AT = 13, 19


def machine(*sources: str, mode=TWO_LEVEL) -> Hypervisor:
    xen = Hypervisor(Machine(8), trace=Trace())
    for source in sources:
        boot(xen, source, mode=mode)
    return xen


def record(xen: Hypervisor, instructions: int) -> AccessLog:
    with recorded(xen) as log:
        xen.run(instructions)
    return log


def view_of(
    *sources: str, instructions: int = 2_000, own_space: bool = False, mode=TWO_LEVEL, tlb: Tlb | None = None
) -> TlbView:
    xen = machine(*sources, mode=mode)
    return TlbView(xen, TlbReplay(record(xen, instructions), tlb or Tlb(), own_space=own_space))


def words_in(view: TlbView) -> str:
    root = ElementTree.fromstring(view.svg())
    return "\n".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


def test_both_forms_show_the_slots_of_the_replay() -> None:
    xen = machine(ROUND_TRIPS)
    replay = TlbReplay(record(xen, 2_000), Tlb())
    view, tlb = TlbView(xen, replay), replay.to(xen.now)
    held = [entry for entry in tlb.slots if entry is not None]
    assert [slot.entry for slot in view.slots() if slot.entry] == held
    rows = view.text().split("\n\n")[1].splitlines()[2:]
    assert [row.split()[:3] for row in rows] == [
        [str(place // 4), str(place % 4), f"{entry.page:05x}"] for place, entry in enumerate(tlb.slots) if entry
    ]
    for entry in held:
        assert f"{entry.page:05x}" in words_in(view)
    for number in (tlb.hits, tlb.misses, tlb.fills[FLUSHED]):
        assert f"{number:,}" in words_in(view).splitlines()


@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def test_pages_belong_to_hypervisor_kernel_or_application(mode) -> None:
    view = view_of(ROUND_TRIPS, mode=mode)
    symbols = view._xen.domains[0].symbols
    whose = {slot.entry.page: slot.whose for slot in view.slots() if slot.entry}
    assert set(whose.values()) == {HYPERVISOR, KERNEL, APPLICATION}
    assert whose[symbols["user_start"] >> 12] == APPLICATION
    assert whose[symbols["handler"] >> 12] == KERNEL
    assert whose[HYPERVISOR_PAGE] == HYPERVISOR


def test_an_entry_is_stale_from_the_change_to_the_flush() -> None:
    xen = machine(CARELESS)
    timeline = Timeline(xen)
    with recorded(xen) as log:
        timeline.run(40)
    view = TlbView(xen, TlbReplay(log, Tlb()))
    page = xen.domains[0].symbols["window"] >> 12
    stale = {}
    for time in (*range(CHANGED - 3, FLUSHED_AT + 3), CHANGED + 1, CHANGED - 1):
        timeline.seek(time)
        found = [slot for slot in view.slots() if slot.now]
        assert time not in stale or stale[time] == bool(found)
        stale[time] = bool(found)
        assert ("STALE" in view.text()) is ("≠" in words_in(view).replace("follows ≠", "")) is bool(found)
        if found:
            (slot,) = found
            assert slot.entry.page == page
            assert slot.leads_to == f"{slot.entry.frame:x} rw"
            assert slot.now == f"{slot.entry.frame:x} r"
    assert [time for time, marked in sorted(stale.items()) if marked] == list(range(CHANGED, FLUSHED_AT))


def test_a_choice_says_what_brought_the_entry_in() -> None:
    view = view_of(talker("hello"), ENDLESS)
    page = view._xen.domains[1].symbols["start"] >> 12
    before = view.text()
    assert view.select(f"page.{page:05x}")
    assert "by the fetch of the instruction at c0002000 (start)" in view.text()
    assert "by the fetch of the instruction at c0002000 (start)" in words_in(view)
    assert view.text() != before
    assert not view.select("page.12345")


def test_a_choice_of_a_copied_or_an_own_page_says_that_the_hypervisor_did_it() -> None:
    source = "start: mov ebx, 0\n mov ecx, 1\n mov edx, offset text\n mov eax, __HYPERVISOR_console_io\n int 0x82\n"
    view = view_of(source + 'stay: jmp stay\n .align 4096\ntext: .ascii "x"', instructions=20)
    page = view._xen.domains[0].symbols["text"] >> 12
    view.select(f"page.{page:05x}")
    assert "Brought in at 5 by a copy that the hypervisor made" in view.text()
    view.select(f"page.{HYPERVISOR_PAGE:05x}")
    assert "each time that it is entered" in view.text()


@pytest.mark.parametrize(
    "tlb", [Tlb(), Tlb(64, None), Tlb(4, 2, Policy.ROUND_ROBIN), Tlb(16, 1)], ids=lambda t: f"{t.sets}"
)
def test_the_height_stays_while_a_run_goes_on(tlb: Tlb) -> None:
    xen = machine(talker("hello"), ROUND_TRIPS)
    timeline = Timeline(xen)
    with recorded(xen) as log:
        timeline.run(400)
    view = TlbView(xen, TlbReplay(log, tlb, own_space=True))
    heights = set()
    for time in range(0, 400, 7):
        timeline.seek(time)
        heights.add(ElementTree.fromstring(view.svg()).get("viewBox"))
    assert len(heights) == 1


def test_an_empty_machine_and_a_time_that_was_not_recorded() -> None:
    xen = machine()
    view = TlbView(xen, TlbReplay(record(xen, 10), Tlb()))
    assert "It is empty." in view.text()
    ElementTree.fromstring(view.svg())
    late = view_of(ENDLESS, instructions=10)
    late._xen.run(5)
    assert "recorded up to 10" in late.text()
    assert "recorded up to 10" in words_in(late)


def test_flushes_are_shown_by_reason_and_the_ways_only_for_an_own_space() -> None:
    top, own = view_of(ROUND_TRIPS), view_of(ROUND_TRIPS, own_space=True)
    assert "way in" not in top.text()
    assert "way in" in own.text()
    assert "switch" in words_in(top)
    assert "an address space of its own" in words_in(own)


def test_bars_are_the_costs_of_the_two_replays() -> None:
    log = record(machine(ROUND_TRIPS), 2_000)
    cost = TlbCost(levels=3, level_cycles=7, flush_cycles=11)
    bars = space_bars(log, cost=cost, hypervisor_pages=2)
    top, own = both_spaces(log, hypervisor_pages=2)
    expected = [cost.flushing(top), cost.walks(top), cost.flushing(own), cost.walks(own)]
    assert list(bars.values) == [value / log.traps() for value in expected]
    assert bars.values[2] == pytest.approx(2 * 11)
    assert space_bars(record(machine(ENDLESS), 10)).values[0] >= 0
