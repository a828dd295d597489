"""Event bits and what happened to them: what the picture says is what stands in the pages, and what the run did."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from xenlab.abi.numbers import EvtchnStatus
from xenlab.hypervisor.domain import Port, RunState
from xenlab.hypervisor.event_bits import Bits, bits_of
from xenlab.hypervisor.trace import Kind
from xenlab.labs import lesson08
from xenlab.labs.event_guests import OPEN_AND_COMPUTE, alone, receiver, sender
from xenlab.timeline import Timeline
from xenlab.timeline.bit_log import BitLog, record_bits
from xenlab.views import CallTimeline, EventsView
from xenlab.views.event_story import RETURN, SEND, SLEEP, STORE, UPCALL, bound_to, differences
from xenlab.views.story import last_moves

SVG = "{http://www.w3.org/2000/svg}"


# Goes to ring 3 and stays there, with upcalls open.
IN_RING_3 = (
    alone(
        """
        call_xen __HYPERVISOR_stack_switch, FLAT_RING1_DS, "offset stack"
        push FLAT_RING3_SS
        push offset user_end
        push 0x202
        push FLAT_RING3_CS
        push offset user_start
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82
"""
    )
    + """
        .align 4096
user_start: jmp user_start
        .align 4096
user_end:
"""
)


def drawn(view: EventsView) -> str:
    root = ElementTree.fromstring(view.svg())
    return "\n".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


@pytest.fixture(scope="module")
def run() -> lesson08.Scene:
    return lesson08.scene(receiver(OPEN_AND_COMPUTE), sender(6, pause=5), instructions=600)


def test_bits_ports_and_states_are_those_of_the_domains(run: lesson08.Scene) -> None:
    for time in (1, 75, 100, 240, 400):
        run.timeline.seek(time)
        rows = run.view().rows()
        for row, domain in zip(rows, run.xen.domains.values(), strict=True):
            assert row.bits == bits_of(run.xen, domain)
            assert [port.port for port in row.ports] == list(domain.ports)
            assert row.callback == (domain.vcpus[0].event_callback is not None)
            for port in row.ports:
                assert (port.pending, port.masked) == (bool(row.bits.pending & 1 << port.port), False)
        assert [row.state for row in rows].count("on the CPU") == 1
    assert rows[0].ports[0].bound == "dom 1 port 1"
    assert "dom 1 port 1" in drawn(run.view())


def test_the_log_holds_every_change_and_who_made_it(run: lesson08.Scene) -> None:
    log, held = run.log, {domid: Bits(0, 0, 0, 0, 1) for domid in run.xen.domains}
    for time in range(0, 400):
        run.timeline.seek(time)
        for change in log.until(time):
            held[change.domid] = change.after
        for domid, domain in run.xen.domains.items():
            assert bits_of(run.xen, domain) == held[domid], time
    stores = [change for change in log.changes if change.by_guest]
    assert {change.domid for change in stores} == {0}
    assert differences(stores[0].before, stores[0].after) == ["upcalls unmasked"]
    assert [differences(store.before, store.after) for store in stores[1:4]] == [
        ["upcall flag cleared"],
        ["selector bit 0 cleared"],
        ["port 1 taken"],
    ]


def test_recording_leaves_the_run_where_it_was() -> None:
    timeline = Timeline(lesson08.machine(receiver(), sender(2)))
    timeline.run(40)
    before = timeline.machine_hash()
    log = record_bits(timeline, 300)
    assert (timeline.position, timeline.machine_hash()) == (40, before)
    assert log.changes
    assert all(change.time > 40 for change in log.changes)


def test_each_send_is_shown_with_where_it_stopped_and_when_it_was_taken(run: lesson08.Scene) -> None:
    run.timeline.seek(400)
    view = run.view(span=400)
    assert run.xen.trace is not None
    events = [event for event in run.xen.trace.events(Kind.EVENT) if event.domain == 0]
    sends = [mark for mark in view.marks() if mark.kind == SEND and mark.domid == 0]
    assert [(mark.time, mark.sender, mark.stopped) for mark in sends] == [
        (event.time, 1, event.stopped) for event in events
    ]
    taken = [change.time for change in run.log.changes if change.domid == 0 and change.cleared(1)]
    for mark in sends:
        after = next(time for time in taken if time > mark.time)
        assert mark.text.endswith(f"taken at {after}")
        assert mark.code == (1, run.xen.domains[1].symbols["send"] + 17, True)
    assert {"its bit was 1 already" in mark.text for mark in sends} == {True, False}
    kinds = [mark.kind for mark in view.marks() if mark.domid == 0]
    assert kinds.count(UPCALL) == kinds.count(RETURN) == len(taken)
    assert kinds.count(STORE) == 1 + 3 * len(taken)


def test_without_a_log_sends_name_their_upcall() -> None:
    run = lesson08.scene(receiver(), sender(1, pause=20))
    run.timeline.seek(200)
    view = EventsView(run.xen)
    (mark,) = [mark for mark in view.marks() if mark.kind == SEND and mark.domid == 0]
    (upcall,) = [mark for mark in view.marks() if mark.kind == UPCALL]
    assert mark.text.endswith(f"upcall at {upcall.time}")
    assert SLEEP in {mark.kind for mark in view.marks()}


def test_a_choice_shows_the_instruction_that_did_it(run: lesson08.Scene) -> None:
    run.timeline.seek(400)
    view = run.view(span=400)
    store = next(mark for mark in view.marks() if "port 1 taken" in mark.text)
    assert view.select(store.key)
    assert "> " in view.text()
    line = next(line for line in view.text().splitlines() if line.startswith("> "))
    assert "btr dword ptr" in line
    assert "btr dword ptr [PENDING], ebx" in line, "the source's own line"
    assert "btr dword ptr [PENDING], ebx" in drawn(view)
    assert not view.select("no such key")


def test_a_guest_that_sleeps_over_an_event_is_marked() -> None:
    run = lesson08.deaf()
    (row,) = run.view().rows()
    assert row.lost == (1,)
    assert "LOST: 1" in run.view().text()
    assert "asleep: LOST 1" in drawn(run.view())
    run.timeline.seek(20)
    assert "LOST" not in run.view().text()


def test_one_that_polls_is_not_called_lost() -> None:
    xen = lesson08.machine(alone("again: jmp again\n"))
    xen.run(100)
    vcpu = xen.domains[0].vcpus[0]
    xen.events.set_pending(xen.domains[0], 1)
    vcpu.run_state, vcpu.polling = RunState.BLOCKED, 9
    assert EventsView(xen).rows()[0].lost == ()
    vcpu.polling = 0
    assert EventsView(xen).rows()[0].lost == (1,)


def test_the_height_stays_while_a_run_goes_on(run: lesson08.Scene) -> None:
    heights = set()
    for time in range(0, 600, 13):
        run.timeline.seek(time)
        heights.add(ElementTree.fromstring(run.view().svg()).get("viewBox"))
    assert len(heights) == 1


def test_other_views_tell_of_events_too() -> None:
    run = lesson08.scene(receiver(), sender(2, pause=20))
    run.timeline.seek(200)
    lines = CallTimeline(run.xen, count=60).text().splitlines()
    assert any("event for port 1 from itself" in line for line in lines)
    assert any("event for port 1 from domain 1" in line and "stopped" not in line for line in lines)
    assert any("event for port 1 from domain 1, stopped at pending" in line for line in lines)
    assert any("upcall for an event, on to 0x" in line and "(callback)" in line for line in lines)
    ElementTree.fromstring(CallTimeline(run.xen, count=60).svg())
    # Within ring 1 an upcall is no change of ring.
    assert "upcall" not in {move.why for move in last_moves(run.xen, 60)}
    xen = lesson08.machine(IN_RING_3)
    xen.run(60)
    xen.submit(lesson08.Outside(0))
    xen.run(5)
    (move,) = [move for move in last_moves(xen, 60) if move.why == "upcall"]
    assert (move.from_ring, move.to_ring) == (3, 1)


def test_ports_by_their_kind() -> None:
    assert bound_to(Port(EvtchnStatus.UNBOUND, remote=3)) == "for dom 3"
    assert bound_to(Port(EvtchnStatus.VIRQ, virq=3)) == "VIRQ DOM_EXC"
    assert bound_to(Port(EvtchnStatus.VIRQ, virq=22)) == "VIRQ 22"
    assert bound_to(Port(EvtchnStatus.IPI)) == "itself"


def test_many_ports_and_domains_say_how_many_more() -> None:
    xen = lesson08.machine(*["start: jmp start"] * 5)
    for domain in xen.domains.values():
        for port in range(1, 12):
            domain.ports[port] = Port(EvtchnStatus.IPI)
    view = EventsView(xen, BitLog())
    assert "and 3 more ports" in drawn(view)
    assert "and 2 more domains with ports" in drawn(view)
    assert view.text().count("itself") == 55


def test_a_machine_without_domains() -> None:
    view = EventsView(lesson08.machine())
    assert "CPU idle" in view.text()
    ElementTree.fromstring(view.svg())
    assert "Nothing has happened" in drawn(view)
