"""The views of memory show what the page tables and the two lists say, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from view_guests import ENDLESS, ROUND_TRIPS

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.frames import NO_PFN
from xenlab.hypervisor.layout import start_of
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode, Translation, mapped_pages, walk
from xenlab.views import AddressSpaceView, P2mView
from xenlab.views.pages import areas, pages, places, read_p2m

Run = Callable[..., Hypervisor]
BASE = 0xC000_0000
MAP_ANOTHER = """
start:  mov esi, [esi + 68]                  # start_info.mfn_list
        mov ecx, [esi + 4 * 200]             # the machine frame of pfn 200
        shl ecx, 12
        or ecx, 1                            # read-only
        mov ebx, 0xc0200000                  # behind the guest's memory
        xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
stay:   jmp stay
"""


@pytest.fixture(params=[TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> PagingMode:
    found: PagingMode = request.param
    return found


def booted(mode: PagingMode, *sources: str, memory_mib: int = 1) -> Hypervisor:
    xen = Hypervisor(Machine(memory_mib=8))
    for source in sources:
        boot(xen, source, mode=mode, memory_mib=memory_mib)
    return xen


@pytest.mark.parametrize("memory_mib", [1, 3])
def test_areas_cover_the_whole_address_space_without_a_gap(mode: PagingMode, memory_mib: int) -> None:
    found = AddressSpaceView(booted(mode, ROUND_TRIPS, memory_mib=memory_mib)).areas()
    assert found[0].start == 0
    assert found[-1].end == 1 << 32
    assert all(before.end == after.start for before, after in pairwise(found))


def test_pages_are_what_the_mmu_walks(mode: PagingMode) -> None:
    xen = booted(mode, ROUND_TRIPS)
    state = xen.domains[0].vcpus[0].state
    found = pages(xen, xen.domains[0])
    assert {page.address: page.entry for page in found} == dict(mapped_pages(xen.memory, mode, state.cr3))
    for page in found:
        place = walk(xen.memory, mode, state.cr3, page.address, update=False)
        assert isinstance(place, Translation)
        assert place.machine >> 12 == page.mfn


def test_names_are_where_start_info_puts_them(mode: PagingMode) -> None:
    xen = booted(mode, ROUND_TRIPS)
    domain = xen.domains[0]
    rows = {area.name: area for area in areas(xen, domain) if area.pages}
    esi, symbols = domain.vcpus[0].state.esi, domain.symbols
    assert rows["start_info"].start == esi
    assert rows["P2M list"].end == esi
    assert rows["page tables"].pages[0].mfn == domain.vcpus[0].state.cr3 >> 12
    assert rows["page tables"].rights == "read"
    assert rows["stack"].end == domain.vcpus[0].state.esp
    assert rows["shared info"].pages[0].mfn == domain.shared_info_mfn
    assert rows["hypercall page"].start == BASE
    assert rows["M2P list"].start == start_of(mode)
    assert {area.start for area in areas(xen, domain) if area.pages and area.pages[0].user} == {symbols["user_start"]}
    assert rows["free pages"].end == BASE + (1 << 20)


def test_a_page_that_the_guest_maps_gets_a_line_of_its_own() -> None:
    xen = booted(TWO_LEVEL, MAP_ANOTHER)
    view = AddressSpaceView(xen)
    before = {area.start for area in view.areas() if area.pages}
    xen.run(100)
    (new,) = [area for area in view.areas() if area.pages and area.start not in before]
    assert (new.start, new.name, new.rights) == (0xC020_0000, "free pages, pfn 0x0c8", "read")
    assert new.pages[0].mfn == xen.domains[0].frames[200]
    (row,) = P2mView(xen).rows(xen.domains[0], [200])
    assert [page.address for page in row.pages] == [BASE + 200 * 4096, 0xC020_0000]


def test_selection_chooses_an_area_and_only_one_that_is_mapped(run: Run) -> None:
    view = AddressSpaceView(run(ROUND_TRIPS))
    texts = set()
    for area in view.areas():
        assert view.select(f"{area.start:#x}") is bool(area.pages)
        texts.add(view.text())
    assert len(texts) == sum(1 for area in view.areas() if area.pages)
    assert not view.select("no such key")


def test_two_domains_have_the_same_numbers_for_different_frames(mode: PagingMode) -> None:
    xen = booted(mode, ROUND_TRIPS, ENDLESS)
    view = P2mView(xen)
    left, right = (view.rows(domain, range(256)) for domain in view.domains())
    assert [row.pfn for row in left] == [row.pfn for row in right] == list(range(256))
    assert not {row.mfn for row in left} & {row.mfn for row in right}
    assert all(row.consistent and row.back == row.pfn for row in (*left, *right))
    assert "512 frames of 2 domains, 0 beside their neighbour" in view.text()


def test_every_frame_can_be_chosen_and_others_not(run: Run) -> None:
    view = P2mView(run(ROUND_TRIPS, ENDLESS))
    assert view.select("1:200")
    chosen = view.chosen()
    assert chosen is not None
    assert (chosen.domid, chosen.pfn, chosen.mfn) == (1, 200, view.domains()[1].frames[200])
    assert f"{chosen.mfn:#x}, so machine address {chosen.mfn << 12:#x}" in view.text()
    assert chosen.mfn in [mfn for mfn, _owner, _back in view.neighbours(chosen.mfn)]
    for key in ("1:256", "2:0", "1:", "1:x", "1:-1", "x", "1:²"):
        assert not view.select(key)


def test_lists_that_disagree_are_marked(run: Run) -> None:
    xen = run(ENDLESS)
    domain = xen.domains[0]
    xen.frames.m2p[domain.frames[5]] = 77
    (row,) = P2mView(xen).rows(domain, [5])
    assert (row.back, row.consistent) == (77, False)
    assert "≠ back: 0x04d" in P2mView(xen).svg()


@given(st.lists(st.integers(0, NO_PFN), min_size=12, max_size=12), st.binary(min_size=80, max_size=80))
def test_whatever_a_guest_writes_into_its_lists_can_be_drawn(numbers: list[int], info: bytes) -> None:
    xen = booted(TWO_LEVEL, ENDLESS)
    domain = xen.domains[0]
    found = places(xen, domain)
    assert found is not None
    vcpu, esi = domain.vcpus[0], domain.vcpus[0].state.esi
    xen.guest_memory.write(vcpu, found.list_at, b"".join(number.to_bytes(4, "little") for number in numbers))
    assert read_p2m(xen, domain, found)[:12] == numbers
    xen.guest_memory.write(vcpu, esi + 32, info)
    for view in (P2mView(xen), AddressSpaceView(xen)):
        ElementTree.fromstring(view.svg())
        assert view.title in view.text()


def test_looking_changes_nothing(mode: PagingMode) -> None:
    xen = booted(mode, ROUND_TRIPS)
    xen.run(500)
    vcpu = xen.domains[0].vcpus[0]
    before = bytes(xen.memory.bytes), dict(vcpu.translations), vcpu.translated_at
    for view in (P2mView(xen), AddressSpaceView(xen)):
        view.svg()
        view.text()
    assert (bytes(xen.memory.bytes), dict(vcpu.translations), vcpu.translated_at) == before
