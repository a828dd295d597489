"""The scenes of lesson 01: what the CPU says in each ring, and the kernel that trap and emulate loses."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.errors import XenlabError
from xenlab.hypervisor.emulate import PrivilegedInstructions
from xenlab.labs import lesson01
from xenlab.labs.instruction_matrix import run_matrix
from xenlab.labs.lesson01 import TrapAndEmulate, observe
from xenlab.timeline import Timeline

IF = 0x200
UNPORTED = """
start:  pushf
        cli
        inc dword ptr [counter]
        popf
        jmp start
end:
counter: .long 0
"""
PORTED = """
start:  mov al, [shared_info + 1]
        mov byte ptr [shared_info + 1], 1
        inc dword ptr [counter]
        mov [shared_info + 1], al
        jmp start
counter: .long 0
"""


def rows(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.split("\n")[2:]]


@pytest.mark.parametrize(("ring", "kept"), [(0, 0), (1, IF), (3, IF)])
def test_popf_keeps_the_interrupt_flag_outside_ring_0(ring: int, kept: int) -> None:
    seen = observe("push 2; popf", ring)
    assert seen.before["eflags"] & IF
    assert seen.after["eflags"] & IF == kept
    assert not seen.traps


@given(st.integers(0, 0xFFFF_FFFF))
@settings(max_examples=15)
def test_popf_outside_ring_0_never_changes_it(value: int) -> None:
    # Without the trap flag and nested task, which act on the instruction behind.
    flags = value & ~0x7FFF_4100 & 0xFFFF_FFFF
    assert observe(f"push {flags}; popf", 3).after["eflags"] & IF


@pytest.mark.parametrize("ring", [0, 1, 3])
def test_push_cs_tells_the_ring(ring: int) -> None:
    assert observe("push cs; pop eax", ring).after["eax"] & 3 == ring


def test_every_ring_reads_the_same_descriptor_table_address() -> None:
    found = {observe("sgdt [buffer]; mov eax, [buffer + 2]", ring).after["eax"] for ring in (0, 1, 3)}
    assert len(found) == 1
    assert found.pop() >= 0xFC00_0000


def test_mov_from_cr0_traps_where_it_should() -> None:
    native, kernel, application = (observe("mov eax, cr0", ring) for ring in (0, 1, 3))
    assert native.traps == ()
    assert kernel.traps == ("#GP, emulated",)
    assert kernel.changed["eax"] == kernel.xen.domains[0].vcpus[0].control["cr0"]
    assert application.traps == ("#GP, guest ended",)
    assert application.after == application.changed == {}


def test_two_ways_to_read_cr0_agree_and_what_cannot_be_true_is_refused() -> None:
    code = "mov eax, cr0; or eax, 8; mov cr0, eax; mov ebx, cr0; smsw ecx"
    for ring in (0, 1):
        after = observe(code, ring).after
        assert after["ebx"] & after["ecx"] & 8
    assert observe("mov eax, cr0; and eax, 0xfffeffff; mov cr0, eax", 1).traps[-1] == "#GP, guest ended"


def test_compare_has_a_row_for_each_ring() -> None:
    assert rows(lesson01.compare("mov eax, 5", rings=(1, 3))) == [
        ["ring 1", "none", "eax 0x5"],
        ["ring 3", "none", "eax 0x5"],
    ]
    assert "did not get to its end" in lesson01.compare("hlt", rings=(3,))
    assert "hypercall 17" in lesson01.compare("mov eax, 17; int 0x82", rings=(1,))


def test_another_ring_is_refused() -> None:
    with pytest.raises(XenlabError, match="ring 2: expected one of 0, 1, 3"):
        observe("nop", 2)


def test_in_ring_0_the_kernel_gets_its_interrupts_back() -> None:
    flags = [row[-3] for row in rows(lesson01.follow(lesson01.kernel(UNPORTED, ring=0), 4))]
    assert flags == ["on", "OFF", "OFF", "on"]


def test_trap_and_emulate_loses_them_for_ever() -> None:
    xen = lesson01.kernel(UNPORTED, emulator=TrapAndEmulate())
    found = rows(lesson01.follow(xen, 10))
    assert [row[-2] for row in found] == ["on"] + ["OFF"] * 9
    assert {row[-3] for row in found} == {"on"}
    assert [row[1] for row in found if len(row) == 5] == ["#GP, emulated"] * 2


def test_trap_and_emulate_is_right_while_everything_traps() -> None:
    emulator = TrapAndEmulate()
    seen = observe("cli; nop; sti", 1, emulator=emulator)
    assert emulator.interrupts
    assert seen.traps == ("#GP, emulated",) * 2
    assert observe("cli", 1, emulator=emulator).after
    assert not emulator.interrupts


def test_trap_and_emulate_leaves_the_rest_to_xen() -> None:
    for code, ring in (("hlt", 1), ("cli", 3), ("mov eax, cr0", 1)):
        ours, xens = (observe(code, ring, emulator=part) for part in (TrapAndEmulate(), PrivilegedInstructions()))
        assert (ours.traps, ours.after) == (xens.traps, xens.after)


def test_its_flag_goes_back_in_time() -> None:
    emulator = TrapAndEmulate()
    timeline = Timeline(lesson01.kernel(UNPORTED, emulator=emulator))
    timeline.seek(4)
    assert not emulator.interrupts
    timeline.seek(1)
    assert emulator.interrupts


def test_xen_hands_the_fault_to_a_kernel_that_was_not_ported() -> None:
    xen = lesson01.kernel(UNPORTED)
    assert len(rows(lesson01.follow(xen, 5))) == 2
    assert "cli" in xen.domains[0].report


def test_the_ported_kernel_is_right_and_never_traps() -> None:
    ported, unported = lesson01.kernel(PORTED), lesson01.kernel(UNPORTED, emulator=TrapAndEmulate())
    assert [row[-1] for row in rows(lesson01.follow(ported, 4))] == ["on", "OFF", "OFF", "on"]
    for xen in (ported, unported):
        xen.run(10_000 - xen.now)
    assert (lesson01.entries(ported), lesson01.entries(unported)) == (0, 2_000)


def test_marked_says_what_a_translator_replaces() -> None:
    matrix = run_matrix(["popf", "pushf", "cli", "push cs", "mov eax, cs", "mov eax, cr0"])
    source = "start: pushf\ncli\npush cs\npush eax\nmov ebx, cs\nmov ebx, eax\nmov ebx, cr0\nend:\n.byte 0x9d\n"
    found = {row[2]: row[3] for row in rows(lesson01.marked(source, matrix))}
    assert [name for name, verdict in found.items() if verdict == "! must be replaced"] == [
        "pushfd",
        "push cs",
        "mov ebx, cs",
    ]
    assert [name for name, verdict in found.items() if verdict == "traps by itself"] == ["cli", "mov ebx, cr0"]


def test_marked_wants_an_end() -> None:
    with pytest.raises(XenlabError, match="label `end`"):
        lesson01.marked("nop", run_matrix(["popf"]))
