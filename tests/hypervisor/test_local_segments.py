"""Segments of the guest's own, in its GDT and LDT, as handlers, stacks and targets of returns (paper 2.1.1, 2.1.2)."""

from __future__ import annotations

from typing import Any

import pytest

from xenlab.hypervisor.trace import Kind
from xenlab.machine.paging import PagingMode

CODE, DATA = 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
GDT, LDT = 0, 4

# The page `segments` is GDT and LDT at once: selector 0x18 is code and 0x20 data for RING, 0x28 and 0x30 for ring 3.
GUEST = """
start:  mov ebp, esi
        mov eax, [ebp + 68]
        mov ecx, offset segments
        sub ecx, 0xC0000000
        shr ecx, 12
        mov eax, [eax + ecx * 4]
        mov [frame], eax
        mov ecx, eax
        shl ecx, 12
        or ecx, 0x61
        xor edx, edx
        xor esi, esi
        mov ebx, offset segments
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        mov [results], eax
        mov ebx, offset frame
        mov ecx, 512
        mov eax, __HYPERVISOR_set_gdt
        int 0x82
        mov [results + 4], eax
        mov ebx, offset local_table
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
        mov [results + 8], eax
        mov ebx, offset traps
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, {stack}
        mov ecx, offset kernel_stack
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        {before}
        push {outer_stack}
        push offset user_stack
        push 0x202
        push {outer_code}
        push offset user_start
        push 0x77
        mov eax, __HYPERVISOR_iret
        int 0x82
        .align 4
handler: jmp handler
traps:  .byte 6, 0
        .short {code}
        .long handler
        .byte 0x80, 3
        .short {code}
        .long handler
        .byte 11, 0
        .short FLAT_RING1_CS
        .long handler
        .byte 12, 0
        .short FLAT_RING1_CS
        .long handler
        .byte 13, 0
        .short FLAT_RING1_CS
        .long handler
        .long 0, 0
frame:  .long 0
results: .long -1, -1, -1
local_table: .long MMUEXT_SET_LDT
        .long segments
        .long 512
        .skip 256
kernel_stack:
        .align 4096
segments: .long 0, 0, 0, 0, 0, 0
        {descriptors}
        .skip 4096 - (. - segments)
        .align 4096
user_start:
        {probe}
        jmp user_start
        .skip 256
user_stack:
        .align 4096
user_end:
"""


def guest(descriptors: list[int], **parts: str) -> str:
    rows = "\n".join(f".long {value & 0xFFFF_FFFF:#x}, {value >> 32:#x}" for value in descriptors)
    usual = {
        "stack": "FLAT_RING1_SS",
        "code": "FLAT_RING1_CS",
        "outer_stack": "FLAT_RING3_SS",
        "outer_code": "FLAT_RING3_CS",
        "probe": "ud2",
        "before": "",
    }
    text = GUEST.replace("MMUEXT_SET_LDT", "13")
    return text.format(descriptors=rows, **usual | parts)


def of(ring: int) -> list[int]:
    return [CODE | ring << 45, DATA | ring << 45, CODE | 3 << 45, DATA | 3 << 45]


def set_up(seen: Any) -> None:
    assert seen.words("results", 3) == (0, 0, 0)


@pytest.mark.parametrize("table", [GDT, LDT])
@pytest.mark.parametrize("probe", ["ud2", "int 0x80"])
def test_a_handler_and_its_stack(table: int, probe: str, mode: PagingMode, play_text: Any) -> None:
    parts = {"code": f"{0x19 | table:#x}", "stack": f"{0x21 | table:#x}", "probe": probe}
    seen = play_text(guest(of(1), **parts), mode, budget=120)
    set_up(seen)
    assert not seen.domain.crashed
    state = seen.vcpu.state
    assert (state.cpl, state.eip) == (1, seen.label("handler"))
    assert [state.segment(name).selector for name in ("cs", "ss")] == [0x19 | table, 0x21 | table]
    assert seen.first.frame == seen.label("kernel_stack") - 20
    # The CPU takes a system call by itself, once the page of the LDT that it needs has been shown to it.
    if probe == "int 0x80" and table == GDT:
        assert seen.first.kind is Kind.GATE


@pytest.mark.parametrize("table", [GDT, LDT])
def test_a_return_to_an_application(table: int, mode: PagingMode, play_text: Any) -> None:
    parts = {"outer_code": f"{0x2B | table:#x}", "outer_stack": f"{0x33 | table:#x}"}
    seen = play_text(guest(of(1), **parts), mode, budget=120)
    set_up(seen)
    assert seen.first.vector == 6
    assert seen.first.words == (
        seen.label("user_start"),
        0x2B | table,
        0x202,
        seen.label("user_stack"),
        0x33 | table,
    )


@pytest.mark.parametrize("table", [GDT, LDT])
def test_ring_2_is_a_ring_too(table: int, mode: PagingMode, play_text: Any) -> None:
    """A return to it, an exception of it, and from there to the kernel's stack."""
    parts = {"outer_code": f"{0x1A | table:#x}", "outer_stack": f"{0x22 | table:#x}"}
    seen = play_text(guest(of(2), **parts), mode, budget=120)
    set_up(seen)
    assert (seen.first.vector, seen.first.from_ring, seen.first.to_ring) == (6, 2, 1)
    assert seen.first.words[1] == 0x1A | table
    assert seen.first.words[3:] == (seen.label("user_stack"), 0x22 | table)


ABSENT = 1 << 47
# What is in the table instead, vector and error code of the exception that a return raises.
NOT_THERE = {
    "code": ([CODE & ~ABSENT | 3 << 45, DATA | 3 << 45], 11, 0x18),
    "stack": ([CODE | 3 << 45, DATA & ~ABSENT | 3 << 45], 12, 0x20),
    "read-only stack": ([CODE | 3 << 45, 0x00CF_9100_0000_FFFF | 3 << 45], 13, 0x20),
    "stack of another ring": ([CODE | 3 << 45, DATA | 1 << 45], 13, 0x20),
    "code of another ring": ([CODE | 2 << 45, DATA | 3 << 45], 13, 0x18),
}


@pytest.mark.parametrize("table", [GDT, LDT])
@pytest.mark.parametrize("name", NOT_THERE)
def test_a_return_to_what_cannot_be_loaded(name: str, table: int, play_text: Any) -> None:
    descriptors, vector, error = NOT_THERE[name]
    parts = {"outer_code": f"{0x1B | table:#x}", "outer_stack": f"{0x23 | table:#x}"}
    seen = play_text(guest(descriptors, **parts), budget=120)
    set_up(seen)
    assert (seen.first.vector, seen.first.words[0]) == (vector, error | table)
    assert seen.first.words[1] == seen.label("user_start")


@pytest.mark.parametrize(
    ("probe", "vector"), [("mov eax, 0x23\n mov ds, eax", 11), ("mov eax, 0x23\n mov ss, eax", 12)]
)
@pytest.mark.parametrize("table", [GDT, LDT])
def test_a_segment_that_is_not_present(probe: str, vector: int, table: int, play_text: Any) -> None:
    """#NP, and #SS for the stack."""
    seen = play_text(guest([0, DATA & ~ABSENT | 3 << 45], probe=probe.replace("0x23", hex(0x23 | table))), budget=120)
    set_up(seen)
    assert (seen.first.vector, seen.first.words[0]) == (vector, 0x20 | table)


@pytest.mark.parametrize("selector", ["0x1005", "0xfffd", "0x7"])
def test_a_local_selector_without_a_descriptor(selector: str, play_text: Any) -> None:
    seen = play_text(guest(of(1), code=selector), budget=120)
    set_up(seen)
    assert seen.domain.crashed
    assert "unusable code selector" in seen.domain.report
