"""Trap table and frame builder: both forms say what the hypervisor keeps and what stands in the guest's memory."""

from __future__ import annotations

from itertools import product
from xml.etree import ElementTree

import pytest

from xenlab import Hypervisor, Machine, boot, guests
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs import lesson07
from xenlab.labs.trap_guests import CAUSES, rows_for, trapping
from xenlab.timeline import Timeline, When
from xenlab.views import FrameBuilder, TrapTableView, live
from xenlab.views.frames import page_fault_bits

SVG = "{http://www.w3.org/2000/svg}"


def words_in(view: FrameBuilder | TrapTableView) -> list[str]:
    root = ElementTree.fromstring(view.svg())
    return ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]


def keys_in(view: FrameBuilder | TrapTableView) -> set[str]:
    root = ElementTree.fromstring(view.svg())
    return {node.get("data-event") or "" for node in root.iter() if node.get("data-event")}


@pytest.fixture
def pager() -> Timeline:
    timeline = lesson07.pager_timeline()
    timeline.run(1_000)
    return timeline


def test_the_table_counts_what_was_delivered(pager: Timeline) -> None:
    view, trace = TrapTableView(pager.hypervisor), pager.hypervisor.trace
    assert trace is not None
    rows = {row.vector: row for row in view.rows()}
    for kind, way in ((Kind.DELIVER, ("bounced", "checked, bounced")), (Kind.GATE, ("direct",))):
        for event in trace.events(kind):
            assert rows[event.vector].way in way
    assert {vector: row.taken for vector, row in rows.items() if row.taken} == {6: 1, 14: 3, 0x80: 3, 0x81: 1}
    assert (rows[0x80].handler, rows[0x80].ring, rows[0x80].dpl) == ("system_call", 1, 3)
    assert rows[0].way == "ends the guest"


def test_both_forms_have_a_row_for_each_vector(pager: Timeline) -> None:
    view = TrapTableView(pager.hypervisor)
    assert keys_in(view) == {row.key for row in view.rows()}
    for row in view.rows():
        assert row.cells()[1] in view.text()
        assert row.way in words_in(view)


def test_a_choice_shows_the_last_frame_of_its_vector_and_once_more_of_any(pager: Timeline) -> None:
    view = TrapTableView(pager.hypervisor)
    assert view.select("vector.14")
    event, words = view.frame() or pytest.fail("no frame")
    assert event.vector == 14
    assert [word.name for word in words] == ["SS", "ESP", "EFLAGS", "CS | mask", "EIP", "error"]
    for word in words:
        assert f"{word.value:08x}" in words_in(view)
        assert f"{word.value:#010x}" in view.text()
    assert "no page; read in ring 3" in view.text()
    assert view.select("vector.0")
    assert view.frame() is None
    assert "No frame for #DE divide error yet" in view.text()
    assert view.select("vector.0")
    assert (view.frame() or pytest.fail("no frame"))[0].vector == 0x81
    assert not view.select("vector.77")


def test_the_table_follows_time(pager: Timeline) -> None:
    view = TrapTableView(pager.hypervisor)
    heights, taken = set(), []
    for time in range(0, 127, 6):
        pager.seek(time)
        heights.add(ElementTree.fromstring(view.svg()).get("viewBox"))
        taken.append(sum(row.taken for row in view.rows()))
    assert len(heights) == 1
    assert taken == sorted(taken)
    assert (taken[0], taken[-1]) == (0, 8)


def test_a_guest_with_all_vectors_still_fits() -> None:
    xen = Hypervisor(Machine(8), trace=Trace())
    boot(xen, trapping("int 0x90", rows_for(range(0x20, 0x82))))
    xen.run(1_000)
    view = TrapTableView(xen)
    assert len(view.rows()) > 90
    assert any("rows more in the text" in word for word in words_in(view))
    assert float((ElementTree.fromstring(view.svg()).get("viewBox") or "0").split()[3]) < 900


def test_a_domain_is_shown_by_its_number() -> None:
    xen = Hypervisor(Machine(8), trace=Trace())
    boot(xen, "start: jmp start")
    boot(xen, guests.source("pager"))
    xen.run(400_000)
    assert all(row.way == "ends the guest" for row in TrapTableView(xen, 0).rows())
    assert TrapTableView(xen, 1).frame() is not None
    assert TrapTableView(xen, 0).frame() is None


@pytest.mark.parametrize("vector", [0, 6, 13, 14, 0x80])
def test_slots_are_the_guests_memory(vector: int) -> None:
    for ring, masked, gate in product((1, 3), (False, True), (False, True)):
        builder = lesson07.frame_builder(vector, ring, masked=masked, gate_masks=gate)
        vcpu = builder.hypervisor.domains[0].vcpus[0]
        event = builder.delivered()
        assert event is not None
        named = [slot for slot in builder.slots() if slot.name]
        assert [slot.value for slot in named][::-1] == list(event.words)
        for slot in builder.slots():
            assert builder.hypervisor.guest_memory.read_word(vcpu, slot.address) == slot.value
            assert f"{slot.value:08x}" in words_in(builder)
            assert f"{slot.address:#010x}" in builder.text()
        direct = vector == 0x80 and not gate
        assert (event.kind is Kind.GATE) is direct
        assert builder.shared()[0] == int(masked or gate)
        assert vcpu.state.esp == event.frame


def test_before_the_exception_the_stack_is_empty_and_then_it_fills() -> None:
    builder = lesson07.frame_builder(14, 3)
    end = builder.position
    builder.seek(end - 1)
    assert builder.frame() == []
    assert "not raised yet" in builder.text()
    before = {slot.address for slot in builder.slots()}
    builder.run(1)
    assert {slot.address for slot in builder.slots()} == before
    assert [slot.name for slot in builder.slots()] == ["SS", "ESP", "EFLAGS", "CS | mask", "EIP", "error"]


def test_every_chip_can_be_chosen() -> None:
    builder = lesson07.frame_builder()
    keys = keys_in(builder)
    assert {f"vector.{vector}" for vector in CAUSES if vector != 0x81} <= keys
    for key in sorted(keys):
        assert builder.select(key)
        assert builder.delivered() is not None
        ElementTree.fromstring(builder.svg())
    assert not builder.select("vector.200")
    assert not builder.select("ring.0")


def test_a_live_builder_moves_its_own_guest() -> None:
    builder = lesson07.frame_builder(6, 1)
    widget = live(builder, builder)
    first = widget.end
    widget.command({"do": "select", "view": 0, "key": "vector.14"})
    assert builder.choice.vector == 14
    assert "#PF in ring 1" in widget.frames[0]["text"]
    event = builder.back_to(When(frozenset((Kind.HYPERCALL,))))
    assert event is not None
    assert event.kind is Kind.HYPERCALL
    again = builder.run_to(When(frozenset((Kind.DELIVER,))), 100)
    assert again is not None
    assert again.vector == 14
    widget.command({"do": "seek", "n": 0})
    assert widget.position == 0
    assert "CPU idle" in widget.frames[0]["text"]
    assert first > 0
    widget.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [(0, "no page; read in ring 0 to 2"), (6, "no page; write in ring 3"), (7, "no right; write in ring 3")],
)
def test_error_codes_in_words(error: int, said: str) -> None:
    assert page_fault_bits(error) == said
