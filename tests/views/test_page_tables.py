"""The frame map, the tree of page tables and the reasons of refusals: from memory, the frame table and the trace."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from xenlab import Hypervisor, Machine, boot, guests
from xenlab.abi.numbers import MmuextOp
from xenlab.hypervisor.frames import FrameType
from xenlab.hypervisor.trace import Trace
from xenlab.labs.lesson05 import Trusting
from xenlab.labs.obedient import READ_ONLY, TABLE, WRITABLE, Obedient
from xenlab.machine.paging import PAE, PRESENT, PSE, TWO_LEVEL, PagingMode
from xenlab.views import FrameMap, PageTree, Picture, audit_report
from xenlab.views.refusals import last_refusal

SVG = "{http://www.w3.org/2000/svg}"
LIMIT = 60_000
VIEWS = (FrameMap, PageTree)


@pytest.fixture(params=[TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def guest(request: pytest.FixtureRequest) -> Obedient:
    return Obedient(mode=request.param)


def words_in(view: Picture) -> str:
    root = ElementTree.fromstring(view.svg())
    return "\n".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


def hung(guest: Obedient, number: int = 10) -> int:
    """Frame of a new l1 table with three pages, pinned."""
    page = guest.page(number)
    guest.fill(page, [(index, guest.mode.entry(guest.page(20 + index).mfn, WRITABLE)) for index in range(3)])
    guest.make_read_only(page)
    assert guest.extended(MmuextOp.PIN_L1_TABLE, page.mfn).result == 0
    return page.mfn


@pytest.mark.parametrize("view", VIEWS)
def test_forms_are_there_and_small(view: type[Picture], guest: Obedient) -> None:
    bundle = view(guest.xen)._repr_mimebundle_()
    assert ElementTree.fromstring(bundle["image/svg+xml"]).tag == f"{SVG}svg"
    assert sum(map(len, bundle.values())) < LIMIT


@pytest.mark.parametrize("view", VIEWS)
def test_machine_without_domains_or_trace(view: type[Picture]) -> None:
    picture = view(Hypervisor(Machine(memory_mib=1)))
    ElementTree.fromstring(picture.svg())
    assert picture.title in picture.text()


@pytest.mark.parametrize("view", VIEWS)
def test_height_stays_while_a_run_goes_on_and_what_is_drawn_changes(view: type[Picture]) -> None:
    xen = Hypervisor(Machine(memory_mib=8), trace=Trace())
    boot(xen, guests.source("tables"), name='"><script>')
    heights, pictures = set(), set()
    for _step in range(300):
        xen.run(1)
        picture = view(xen).svg()
        heights.add(ElementTree.fromstring(picture).get("viewBox"))
        pictures.add(picture)
    assert len(heights) == 1
    assert len(pictures) > 5
    assert not any("<script>" in picture for picture in pictures)


def test_frame_map_shows_all_frames_of_a_domain_once(guest: Obedient) -> None:
    hung(guest)
    view = FrameMap(guest.xen)
    runs = view.runs(0)
    shown = [mfn for run in runs for mfn in run.frames]
    assert sorted(shown) == guest.xen.frames.owned_by(0)
    assert all(view.look(mfn) == run.look for run in runs for mfn in run.frames)
    m2p = [guest.xen.frames.m2p[mfn] for mfn in shown]
    assert m2p == sorted(m2p)


def test_frame_map_says_type_count_and_marks(guest: Obedient) -> None:
    mfn = hung(guest)
    view = FrameMap(guest.xen)
    look = view.look(mfn)
    assert (look.kind, look.uses) == (FrameType.L1, 1)
    assert "pinned, validated" in view.text()
    assert "w 2" in words_in(view)  # the three pages, mapped twice
    guest.extended(MmuextOp.UNPIN_TABLE, mfn)
    assert view.look(mfn).kind is FrameType.NONE


def test_selected_frame_is_described_with_what_names_it(guest: Obedient) -> None:
    mfn, target = hung(guest), guest.page(20).mfn
    view = FrameMap(guest.xen)
    assert view.select(f"frame.{target:x}")
    named = view.named_by(target)
    assert named[0] == "domain 0 owns it"
    assert any(line.startswith(f"entry 0 of l1 table {mfn:#x}: ") for line in named)
    assert sum(line.startswith("entry") for line in named) == guest.xen.frames.refs[target] - 1
    assert guest.xen.frames.describe(target) in view.text()
    assert guest.xen.frames.describe(target) in words_in(view)
    assert view.select(f"frame.{guest.root:x}")
    assert "base pointer of domain 0, vCPU 0" in view.text()
    assert "it is pinned" in view.text()


@pytest.mark.parametrize("key", ["", "frame", "frame.", "frame.xyz", "frame.ffffff", "frame.-1", "table.1"])
def test_frame_map_has_no_such_part(guest: Obedient, key: str) -> None:
    assert not FrameMap(guest.xen).select(key)


def test_every_key_of_the_picture_can_be_selected(guest: Obedient) -> None:
    hung(guest)
    for view in (FrameMap(guest.xen), PageTree(guest.xen)):
        root = ElementTree.fromstring(view.svg())
        keys = [key for node in root.iter() if (key := node.get("data-event"))]
        assert len(keys) == len(set(keys)) > 1
        assert all(view.select(key) for key in keys)
        assert not view.select("no such key")


def test_tree_is_what_the_mmu_walks(guest: Obedient) -> None:
    view, mode = PageTree(guest.xen), guest.mode
    levels = view.levels()
    assert [node.level for nodes in levels for node in nodes] == [level.name for level in mode.levels]
    assert levels[0][0].mfn == guest.root
    leaf = levels[-1][0]
    assert leaf.mfn == guest.leaf
    for part in leaf.ranges:
        for index in range(part.first, part.last + 1):
            entry = guest.entry_at(leaf.mfn, index)
            assert entry & PRESENT
            assert (part.purpose == "writable page") == bool(entry & 2)
    present = sum(part.last - part.first + 1 for part in leaf.ranges)
    assert present == sum(guest.entry_at(leaf.mfn, index) & PRESENT for index in range(mode.levels[-1].entries))


def test_hypervisors_slots_stand_apart(guest: Obedient) -> None:
    own = [part for nodes in PageTree(guest.xen).levels() for node in nodes for part in node.ranges]
    found = {part.first for part in own if part.purpose == "the hypervisor's"}
    assert found == set(guest.domain.hypervisor_slots)


def test_a_table_that_names_itself_is_no_branch() -> None:
    guest = Obedient()
    assert guest.update(guest.root, 699, guest.mode.entry(guest.root, PRESENT)).result == 0
    root = PageTree(guest.xen).tree()
    assert root is not None
    assert root.linear == [699]
    assert [index for index, _child in root.children] == [768]


def test_pinned_tables_outside_the_tree_are_named(guest: Obedient) -> None:
    mfn = hung(guest)
    view = PageTree(guest.xen)
    assert view.pinned_apart() == [mfn]
    assert f"{mfn:#x}" in words_in(view)


def test_many_tables_are_cut_short() -> None:
    guest = Obedient()
    for place in range(3):
        guest.update(guest.root, 700 + place, guest.mode.entry(hung(guest, 10 + place), TABLE))
    assert "and 2 more l1 tables" in words_in(PageTree(guest.xen))
    assert len(PageTree(guest.xen).levels()[1]) == 4


def test_refused_update_is_shown_with_entry_errno_and_rule(guest: Obedient) -> None:
    entry = guest.mode.entry(guest.neighbour, WRITABLE)
    guest.update(guest.leaf, 300, entry)
    view = PageTree(guest.xen)
    refusal = view.refusal()
    assert refusal is not None
    assert (refusal.table, refusal.index, refusal.answer) == (guest.leaf, 300, "-EBUSY")
    assert refusal.why == "the frame is domain 1's"
    for text in (view.text(), words_in(view)):
        assert f"{entry:#x}: frame {guest.neighbour:#x}, present, writable" in text
        assert "the frame is domain 1's" in text
        assert "the auditor is content" in text
    assert "✗" in words_in(view)


def test_no_refusal_is_said_too(guest: Obedient) -> None:
    assert PageTree(guest.xen).refusal() is None
    assert "No update was refused so far." in words_in(PageTree(guest.xen))
    assert last_refusal(guest.xen, 1) is None


def why(guest: Obedient) -> str:
    refusal = last_refusal(guest.xen)
    assert refusal is not None
    return refusal.because


def test_reasons_of_leaves(guest: Obedient) -> None:
    mode, page = guest.mode, guest.page(0)
    for mfn, flags, reason in (
        (guest.leaf, WRITABLE, "it must not be writable"),
        (17, READ_ONLY, "the hypervisor's"),
        (guest.xen.frames.owner.index(-2), READ_ONLY, "free"),
        (0xFFFFF, READ_ONLY, "no such frame"),
        (page.mfn, WRITABLE | PSE, "this flag"),
    ):
        assert guest.update(guest.leaf, 300, mode.entry(mfn, flags)).result < 0
        assert reason in why(guest)


def test_reasons_of_tables() -> None:
    guest = Obedient()
    mode = guest.mode
    for mfn, flags, reason in (
        (guest.page(0).mfn, TABLE, "mapped writable (1 use)"),
        (guest.root, TABLE, "may name itself, but only to be read"),
        (guest.page(0).mfn, TABLE | PSE, "this flag"),
    ):
        assert guest.update(guest.root, 700, mode.entry(mfn, flags)).result < 0
        assert reason in why(guest)
    guest.extended(MmuextOp.PIN_L2_TABLE, guest.leaf)
    assert "it cannot be a table of another level" in why(guest)
    guest.extended(MmuextOp.UNPIN_TABLE, guest.leaf)
    assert "it is not pinned" in why(guest)
    guest.mmu_update((guest.pointer(guest.neighbour, 0), 0))
    assert "the frame is domain 1's" in why(guest)


@pytest.mark.parametrize(("mode", "slot"), [(TWO_LEVEL, 1020), (PAE, 3)], ids=["two-level", "PAE"])
def test_the_hypervisors_slots_have_a_reason(mode: PagingMode, slot: int) -> None:
    guest = Obedient(mode=mode)
    assert guest.update(guest.root, slot, 0).result < 0
    assert "hypervisor" in why(guest)
    refusal = PageTree(guest.xen).refusal()
    assert refusal is not None
    assert (refusal.table, refusal.index) == (guest.root, slot)


def test_a_refused_table_names_the_entry_inside() -> None:
    guest = Obedient()
    page = guest.page(10)
    guest.fill(page, [(5, guest.mode.entry(guest.neighbour, WRITABLE))])
    guest.make_read_only(page)
    guest.update(guest.root, 700, guest.mode.entry(page.mfn, TABLE))
    refusal = last_refusal(guest.xen)
    assert refusal is not None
    assert (refusal.table, refusal.index) == (guest.root, 700)
    assert refusal.inside.startswith(f"entry 5 of the table {page.mfn:#x} is ")
    assert refusal.why == "the frame is domain 1's"


def test_a_refused_store_is_a_page_fault(guest: Obedient) -> None:
    guest.writable_tables()
    place = guest.address_of(guest.leaf) + 300 * guest.mode.entry_size
    answer = guest.store(place, guest.mode.entry(guest.root, WRITABLE))
    assert answer.fault == 3
    assert answer.refusal is not None
    assert (answer.refusal.how, answer.refusal.answer) == ("store", "page fault")
    assert answer.refusal.index == 300


def test_what_nothing_is_against_any_more_was_refused_for_what_was_then() -> None:
    guest = Obedient()
    page = guest.page(10)
    guest.update(guest.root, 700, guest.mode.entry(page.mfn, TABLE))
    assert "mapped writable (1 use)" in why(guest)
    guest.make_read_only(page)
    assert "was mapped writable then" in why(guest)


def test_audit_report_names_what_is_broken() -> None:
    guest = Obedient()
    assert audit_report(guest.xen).endswith("4 page tables counted again: the auditor is content")
    trusting = Obedient(page_types=Trusting())
    assert trusting.update(trusting.leaf, 300, trusting.mode.entry(trusting.neighbour, WRITABLE)).result == 0
    report = audit_report(trusting.xen)
    assert "OWNERSHIP  broken: no guest maps a frame that it neither owns" in report
    assert f"entry 300 of l1 table {trusting.leaf:#x}" in report
    assert "the auditor: no guest maps" in PageTree(trusting.xen).text()
    assert "✗ the auditor" in words_in(PageTree(trusting.xen))
