"""The scenes of lesson 07 show what the machine did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from xenlab import XenlabError
from xenlab.abi.numbers import Shutdown
from xenlab.hypervisor.bounce import XenBounce
from xenlab.hypervisor.trace import Kind
from xenlab.labs import lesson07
from xenlab.labs.lesson07 import ANYONE, MASKS_EVENTS, RETURN, Row
from xenlab.labs.trap_guests import CAUSES


def columns(text: str) -> list[list[str]]:
    """The cells of a table below its heading; cells are two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[2:]]


@pytest.mark.parametrize("vector", CAUSES)
def test_each_cause_raises_its_vector_in_both_rings(vector: int) -> None:
    for ring in (1, 3):
        builder = lesson07.frame_builder(vector, ring)
        event = builder.delivered()
        assert event is not None
        assert (event.vector, event.from_ring, event.to_ring) == (vector, ring, 1)
        assert len(builder.frame()) == 3 + 2 * (ring == 3) + (vector in (13, 14))


def test_frames_lists_words_from_the_lowest_address() -> None:
    rows = columns(lesson07.frames([(14, 3), (6, 1)]))
    assert rows[0] == ["#PF", "3", "6", "error", "EIP", "CS | mask", "EFLAGS", "ESP", "SS"]
    assert rows[1] == ["#UD", "1", "3", "EIP", "CS | mask", "EFLAGS"]


@pytest.mark.parametrize(("vector", "ring"), [(99, 3), (14, 0), (14, 2)])
def test_another_choice_is_refused(vector: int, ring: int) -> None:
    with pytest.raises(XenlabError, match=r"expected one of 0x0, .* in ring 1 or 3"):
        lesson07.frame_builder(vector, ring)


def test_the_pager_pages_in_what_is_touched() -> None:
    timeline = lesson07.pager_timeline()
    timeline.run(1_000)
    xen = timeline.hypervisor
    assert xen.domains[0].console == "pg."
    assert xen.domains[0].shutdown is Shutdown.POWEROFF
    rows = columns(lesson07.faults(xen))
    assert [row[3] for row in rows] == ["0xc0203010", "0xc0205004", "0x1000"]
    assert [row[5] for row in rows] == ["maps 0xc0203000", "maps 0xc0205000", "no page put there"]
    assert xen.cpu.gates.taken == 3


def test_a_bounce_of_ones_own_runs_the_pager() -> None:
    asked: list[int] = []

    class Spy(XenBounce):
        def frame(self, trap: Any, *rest: Any) -> Mapping[str, Any] | None:
            asked.append(trap["vector"])
            return super().frame(trap, *rest)

    timeline = lesson07.pager_timeline(Spy())
    timeline.run(1_000)
    assert asked == [14, 6, 14, 14, 0x81]
    assert timeline.hypervisor.domains[0].console == "pg."


def test_ways_of_a_system_call() -> None:
    direct = lesson07.round_trip("int 0x80", lesson07.calls())
    bounced = lesson07.round_trip("int 0x80", lesson07.calls(ANYONE | MASKS_EVENTS))
    back = lesson07.round_trip("int 0x80", lesson07.calls(ANYONE | MASKS_EVENTS, back=RETURN))
    other = lesson07.round_trip("int 0x81", lesson07.calls(vector=0x81))
    assert (direct.path, direct.entries) == ((3, 1, 3), 0)
    assert (bounced.path, bounced.entries) == ((3, 0, 1, 3), 1)
    assert (back.path, back.entries) == ((3, 0, 1, 0, 3), 2)
    assert other == bounced


def test_a_call_gate_needs_no_hypervisor_either() -> None:
    trip = lesson07.call_gate()
    assert (trip.path, trip.entries, trip.instructions) == ((3, 1, 3), 0, 2)


def test_a_trip_without_return_is_reported() -> None:
    with pytest.raises(XenlabError, match=r"(?s)handler of 'ud2' did not return.*no handler registered"):
        lesson07.round_trip("ud2", {})


def test_entries_are_counted_and_times_are_there_for_the_same_traps() -> None:
    assert list(lesson07.entries(rounds=20).values()) == [0, 1, 2, 1, 1]
    times = lesson07.call_ns(rounds=20, tries=1)
    assert list(times) == list(lesson07.entries(rounds=10))
    assert all(time > 0 for time in times.values())


@pytest.mark.parametrize(
    ("flags", "selector", "way"),
    [
        (ANYONE, "FLAT_RING1_CS", "direct"),
        (0, "FLAT_RING1_CS", "direct"),
        (ANYONE, "FLAT_RING1_CS & ~3", "direct"),
        (ANYONE | MASKS_EVENTS, "FLAT_RING1_CS", "bounced"),
        (ANYONE, "FLAT_RING3_CS", "bounced"),
    ],
)
def test_which_gates_are_direct(flags: int, selector: str, way: str) -> None:
    assert lesson07.gate_of(flags, selector) == way


def test_an_inner_fault_overwrites_the_address() -> None:
    assert lesson07.lost_address(read_first=True) == (0x1000, 0x1000)
    assert lesson07.lost_address(read_first=False) == (0x1000, 0x2000)


@pytest.mark.parametrize(("stack_bytes", "frames"), [(20, 1), (35, 1), (36, 2), (96, 5), (1024, 63)])
def test_recursive_faults_end_with_the_stack(stack_bytes: int, frames: int) -> None:
    touches = Row("mov eax, [0x1000]")
    xen = lesson07.with_neighbour("ud2", {6: touches, 14: touches}, stack_bytes=stack_bytes)
    guest, neighbour = xen.domains.values()
    assert xen.trace is not None
    assert len([event for event in xen.trace.events(Kind.DELIVER) if event.domain == 0]) == frames
    assert len(columns(lesson07.nesting(xen))) == frames
    assert guest.crashed
    assert "is not on writable memory" in guest.report
    assert not neighbour.ended
    assert neighbour.console


def test_a_guest_that_behaves_is_not_ended_beside_its_neighbour() -> None:
    xen = lesson07.with_neighbour("ud2", {6: Row(lesson07.skipping(6, 2))})
    assert xen.domains[0].shutdown is Shutdown.POWEROFF


def test_single_steps_follow_the_program() -> None:
    places = lesson07.single_steps("mov ecx, 2; again: loop again; nop")
    texts = [place.split(": ")[1].split()[0] for place in places]
    assert texts == ["loop", "loop", "nop", "int"]


def test_only_floating_point_costs_a_trap_and_only_once() -> None:
    rows = columns(lesson07.fpu_use(["nop", "fld1; fld1", "xor eax, eax", "movaps xmm1, xmm2"]))
    assert [row[-1] for row in rows] == ["0", "1", "0", "1"]
