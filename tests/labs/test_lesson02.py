"""The scenes of lesson 02 show what the machine did."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, XenlabError, boot, guests
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs import lesson02


def rings(source: str | None = None) -> tuple[Hypervisor, list[lesson02.Footstep]]:
    xen = Hypervisor(trace=Trace())
    domain = boot(xen, source or guests.source("rings"), name="rings")
    return xen, lesson02.footsteps(xen, domain)


def test_footsteps_are_the_run_itself() -> None:
    xen, steps = rings()
    whole = Hypervisor(trace=Trace())
    boot(whole, guests.source("rings"), name="rings")
    assert whole.run(10_000).instructions == len(steps)
    assert whole.trace is not None
    assert xen.trace is not None
    assert whole.trace.raw() == xen.trace.raw()
    traps = {event.time for event in xen.trace.events() if event.kind in (Kind.TRAP, Kind.HYPERCALL)}
    assert {step.time for step in steps if step.trapped} == traps


def test_the_way_into_the_kernel_leads_through_ring_0_and_iret_alone_out_without_it() -> None:
    _xen, steps = rings()
    path = lesson02.ring_path(steps)
    assert all(a != b for a, b in pairwise(path))
    assert (3, 1) not in set(pairwise(path))
    alone = [step for step in steps if (step.ring, step.after) == (1, 3) and not step.trapped]
    assert [step.text for step in alone] == ["iretd"]


def test_the_strip_follows_the_guest() -> None:
    _xen, steps = rings()
    _xen, changed = rings(guests.source("rings").replace("cli  ", "nop  "))
    assert lesson02.strip(steps) != lesson02.strip(changed)
    assert lesson02.strip(steps).count("■") == len(steps)
    assert lesson02.strip(steps).count("▲") == sum(step.trapped for step in steps)


def test_the_timeline_is_at_the_first_instruction_of_rings() -> None:
    timeline = lesson02.rings_timeline()
    assert timeline.position == 0
    timeline.run(10_000)
    assert timeline.hypervisor.domains[0].console == "a!?z"


def test_gates_are_those_that_the_guest_registered() -> None:
    xen, _steps = rings()
    text = lesson02.gates(xen.domains[0])
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["#GP", "#PF", "int"]
    xen, _steps = rings(guests.source("rings").replace(".byte SYSCALL_VECTOR", ".byte 0x33"))
    assert "0x33" in lesson02.gates(xen.domains[0])


@pytest.mark.parametrize(
    ("ring", "code", "trap", "then"),
    [
        (3, "nop", "none", "by itself"),
        (1, "nop", "none", "by itself"),
        (1, "mov eax, cr0", "#GP(0)", "emulated: eax"),
        (3, "mov eax, cr0", "#GP(0)", "#GP in ring 1, error code 0x0"),
        (1, "mov eax, cr0; xor eax, 0x10000; mov cr0, eax", "#GP(0)", "#GP in ring 1"),
        (1, "hlt", "#GP(0)", "#GP in ring 1"),
        (3, "ud2", "#UD", "#UD in ring 1"),
        (3, "int 0x80", "int 0x80", "int 0x80 in ring 1"),
        (3, "int 0x21", "int 0x21", "#GP in ring 1, error code 0x10a"),
        (3, "int 0x82", "int 0x82", "#GP in ring 1, error code 0x412"),
        (3, "mov [0x1000], ebx", "#PF(6) at 0x1000", "#PF in ring 1, error code 0x6"),
        (1, "mov [0x1000], ebx", "#PF(2) at 0x1000", "#PF in ring 1, error code 0x2"),
        (3, "mov eax, [shared_info]", "#PF(5)", "#PF in ring 1, error code 0x5"),
        (1, "mov eax, [0xfbfffffc]", "#PF(0)", "#PF in ring 1"),
        (1, "mov eax, [0xfd000000]", "#GP(0)", "#GP in ring 1"),
        (1, "mov eax, 0xfd000000; jmp eax", "#GP(0)", "#GP in ring 1"),
    ],
)
def test_outcomes(ring: int, code: str, trap: str, then: str) -> None:
    outcome = lesson02.attempt(code, ring=ring)
    assert outcome.trap.startswith(trap)
    assert then in outcome.then
    assert f"{outcome.trap}  " in lesson02.outcomes([(ring, code)])


def test_an_int_with_the_number_of_a_fault_is_not_taken_for_one() -> None:
    assert lesson02.attempt("int 14", int_ring=0).trap == "int 0xe"
    assert lesson02.attempt("int 14", int_ring=0).then.endswith("error code 0x72")
    # With an open gate the kernel sees a page fault that never was, without an error code.
    assert len(lesson02.attempt("int 14", int_ring=3).frame) == 5


def test_a_ring_that_no_guest_has_is_refused() -> None:
    with pytest.raises(XenlabError, match="ring 2"):
        lesson02.attempt("nop", ring=2)


def test_the_machine_can_be_left_in_the_handler() -> None:
    outcome = lesson02.attempt("mov [0x1000], ebx", stop_in_handler=True)
    state = outcome.domain.vcpus[0].state
    assert state.eip == outcome.domain.symbols["handler"]
    assert state.cpl == 1
    assert outcome.xen.guest_memory.read_word(outcome.domain.vcpus[0], state.esp) == outcome.frame[0] == 6
    assert outcome.fault_address == 0x1000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"handlers": ()}, "no handler"),
        ({"stack": "0x1000"}, "not on writable memory"),
        ({"selector": "0x0123"}, "unusable code selector"),
    ],
)
def test_what_cannot_be_delivered_ends_the_domain(arguments: dict[str, object], reason: str) -> None:
    outcome = lesson02.attempt("cli", **arguments)  # type: ignore[arg-type]
    assert outcome.domain.crashed
    assert outcome.then == "domain ended"
    assert reason in outcome.domain.report


@settings(max_examples=20)
@given(selector=st.integers(0, 0xFFFF))
def test_no_selector_leads_to_ring_0(selector: int) -> None:
    outcome = lesson02.attempt("cli", selector=str(selector), stop_in_handler=True)
    assert all(gate is None or gate.cs & 3 for gate in outcome.domain.vcpus[0].traps)
    assert outcome.domain.vcpus[0].state.cpl != 0


def test_round_trips_count_crossings_and_entries() -> None:
    skip = "add esp, 4; add dword ptr [esp], 6;"
    call = lesson02.round_trip("int 0x80", 0x80, lesson02.RETURN)
    direct = lesson02.round_trip("int 0x80", 0x80, "iretd")
    fault = lesson02.round_trip("mov [0x1000], ebx", 14, skip + lesson02.RETURN)
    reads_cr2 = lesson02.round_trip("mov [0x1000], ebx", 14, "mov eax, cr2;" + skip + lesson02.RETURN)
    assert (call.path, call.entries) == ((3, 0, 1, 0, 3), 2)
    assert (direct.path, direct.entries, direct.instructions) == ((3, 0, 1, 3), 1, 2)
    assert fault.crossings == 4
    assert reads_cr2.crossings == 6
    assert str(direct).startswith("3 → 0 → 1 → 3: 3 crossings")


def test_a_handler_that_does_not_return_is_reported() -> None:
    with pytest.raises(XenlabError, match="did not return"):
        lesson02.round_trip("int 0x80", 0x80, "jmp finish")


def test_a_neighbour_survives_the_crash() -> None:
    xen = lesson02.crash_beside_a_neighbour()
    careless, counter = xen.domains.values()
    assert careless.crashed
    assert "exception 6" in careless.report
    assert not counter.ended
    assert counter.console
