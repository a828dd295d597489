"""The ``iret`` hypercall: what is restored, what is ignored, what ends the guest."""

from __future__ import annotations

from typing import Any

import pytest

from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING3_CS, FLAT_RING3_SS
from xenlab.hypervisor.trace import Kind

RETURN = """
start:  mov eax, FLAT_RING3_DS
        mov ds, eax
        mov es, eax
        mov eax, FLAT_RING1_DS
        mov fs, eax
        mov byte ptr [shared_info + 1], {mask}
        push {ss}
        push {esp}
        push {flags}
        push {cs}
        push offset target
        mov eax, 0x1234ABCD
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4096
user_start:
target: jmp target
        .skip 1000
ustack:
        .align 4096
user_end:
"""
TO_RING3 = {"ss": "FLAT_RING3_SS", "esp": "offset ustack", "flags": "0x202", "cs": "FLAT_RING3_CS", "mask": "0"}


def come_back(play_text: Any, mode: Any = None, **parts: str) -> Any:
    options = {} if mode is None else {"mode": mode}
    # The trap of the last instruction has been taken, none of the target's has begun.
    seen = play_text(RETURN.format(**(TO_RING3 | parts)), budget=18, **options)
    assert seen.xen.trace.events(Kind.HYPERCALL)
    return seen


def mask_of(seen: Any) -> int:
    return seen.xen.memory.bytes[(seen.domain.shared_info_mfn << 12) + 1]


def test_to_an_application(mode: Any, play_text: Any) -> None:
    seen = come_back(play_text, mode)
    state = seen.vcpu.state
    assert (state.cpl, state.eip, state.esp) == (3, seen.label("target"), seen.label("ustack"))
    assert (state.segment("cs").selector, state.segment("ss").selector) == (FLAT_RING3_CS, FLAT_RING3_SS)
    assert state.eax == 0x1234_ABCD
    assert state.segment("ds").selector == FLAT_RING3_SS
    # Data segments of the kernel do not go out with it: emptied, selector and hidden part.
    for name in ("fs", "gs"):
        assert (state.segment(name).selector, state.segment(name).limit) == (0, 0)
    (event,) = seen.xen.trace.events(Kind.IRET)
    assert (event.to_ring, event.eip) == (3, seen.label("target"))


@pytest.mark.parametrize("cs", ["FLAT_RING1_CS", "0x7777e019"])
def test_inside_the_kernel_the_stack_stays(cs: str, mode: Any, play_text: Any) -> None:
    seen = come_back(play_text, mode, cs=cs)
    state = seen.vcpu.state
    assert (state.cpl, state.eip, state.segment("cs").selector) == (1, seen.label("target"), FLAT_RING1_CS)
    # EAX, EIP, CS and EFLAGS are gone; what lies above is not.
    assert seen.word(state.esp) == seen.label("ustack")
    assert seen.word(state.esp + 4) == FLAT_RING3_SS
    assert state.segment("fs").selector == FLAT_RING1_CS + 8
    assert state.eax == 0x1234_ABCD


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("interrupts", [0, 1])
def test_event_mask_comes_from_the_interrupt_flag(before: int, interrupts: int, play_text: Any) -> None:
    seen = come_back(play_text, flags=hex(2 | interrupts << 9), mask=str(before))
    assert mask_of(seen) == 1 - interrupts
    assert seen.vcpu.state.eflags & 0x200  # the real one is always on


@pytest.mark.parametrize("cs", ["FLAT_RING1_CS", "FLAT_RING3_CS"])
def test_only_harmless_flags_are_taken(cs: str, play_text: Any) -> None:
    seen = come_back(play_text, flags="0xfffdfeff", cs=cs)
    flags = seen.vcpu.state.eflags
    assert flags & 0x3000 == 0, "I/O privilege"
    assert flags & 0x4000 == 0, "nested task"
    assert flags & 0xFFC0_8028 == 0, "reserved bits"
    assert flags & 0xCD5 == 0xCD5, "arithmetic flags and direction"
    assert flags & 2


def test_no_io_privilege_after_iret(play: Any) -> None:
    for probe in ("cli", "in al, dx"):
        seen = play(probe, 3, flags="0x3202")
        assert (seen.first.vector, seen.frame["error"]) == (13, 0)


# What the frame says, and the error code of #GP.
BAD = {
    "data segment as code": ({"cs": "FLAT_RING3_DS"}, FLAT_RING3_SS & ~3),
    "empty descriptor": ({"cs": "0x1b"}, 0x18),
    "local table": ({"cs": "0xe02f"}, 0xE02C),
    "null code of ring 3": ({"cs": "3"}, 0),
    "ring 2": ({"cs": "0xe01a"}, 0xE018),
    "inner code with outer privilege": ({"cs": "0xe01b"}, 0xE018),
    "null stack": ({"ss": "0"}, 0),
    "kernel's stack segment": ({"ss": "FLAT_RING1_SS"}, 0xE020),
    "code as stack": ({"ss": "FLAT_RING3_CS"}, 0xE028),
    "stack selector with privilege 0": ({"ss": "0xe030"}, 0xE030),
    "a code segment of the kernel's that is not there": ({"cs": "0x19"}, 0x18),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_frame_is_a_fault_of_its_target(name: str, mode: Any, play_text: Any) -> None:
    """The real IRET faults in the hypervisor, which hands the fault on as if the target had raised it."""
    parts, error = BAD[name]
    text = RETURN.format(**(TO_RING3 | parts)).replace(
        "start:",
        """start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, FLAT_RING1_SS
        mov ecx, offset kernel_stack
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        jmp begin
handler: jmp handler
table:  .byte 13, 4
        .short FLAT_RING1_CS
        .long handler, 0, 0
        .skip 200
kernel_stack:
begin:""",
        1,
    )
    seen = play_text(text, mode, budget=40)
    assert not seen.domain.crashed
    words = seen.first.words
    cs = seen.first.words[2]
    inner = cs & 3 == 1
    assert (seen.first.vector, words[0], words[1]) == (13, error, seen.label("target"))
    assert seen.vcpu.state.eax == 0x1234_ABCD
    assert mask_of(seen) == 1
    assert words[3] & 0x200
    if inner:
        # On the stack that the kernel had, behind what IRET took from it.
        assert seen.word(seen.first.frame + 16) == seen.label("ustack")
    else:
        assert seen.first.frame == seen.label("kernel_stack") - 24
        assert words[4] == seen.label("ustack")
        assert seen.first.from_ring == cs & 3


@pytest.mark.parametrize("name", BAD)
def test_bad_frame_ends_a_guest_without_a_handler(name: str, play_text: Any) -> None:
    seen = come_back(play_text, **BAD[name][0])
    assert seen.domain.crashed
    assert "iret to cs" in seen.domain.report
    assert "no handler registered" in seen.domain.report
    assert seen.vcpu.state.cpl == 1


@pytest.mark.parametrize("cs", ["0", "FLAT_RING1_CS - 1", "0xe008"])
def test_a_return_to_ring_0_ends_the_guest(cs: str, play_text: Any) -> None:
    seen = come_back(play_text, cs=cs)
    assert seen.domain.crashed
    assert "iret to ring 0" in seen.domain.report


def test_virtual_8086_mode_is_refused_on_the_kernels_stack(mode: Any, play_text: Any) -> None:
    text = """
    start:  mov ebx, offset table
            mov eax, __HYPERVISOR_set_trap_table
            int 0x82
            mov ebx, FLAT_RING1_SS
            mov ecx, offset kernel_stack
            mov eax, __HYPERVISOR_stack_switch
            int 0x82
            push 9
            push 8
            push 7
            push 6
            push 5
            push 4
            push 0x20302
            push 2
            push 1
            mov eax, 0x55
            jmp hypercall_page + 32 * __HYPERVISOR_iret
    handler: jmp handler
    table:  .byte 13, 0
            .short FLAT_RING1_CS
            .long handler, 0, 0
            .skip 200
    kernel_stack:
    """
    seen = play_text(text, mode, budget=60)
    state = seen.vcpu.state
    assert (state.cpl, state.eip, state.esp, state.eax) == (
        1,
        seen.label("handler"),
        seen.label("kernel_stack") - 40,
        0x55,
    )
    assert seen.words(state.esp, 10) == (0, 1, 2, 0x20302, 4, 5, 6, 7, 8, 9)
    assert state.eflags & 0x2_4100 == 0
    assert mask_of(seen) == 0


def test_virtual_8086_mode_without_a_handler_ends_the_guest(play_text: Any) -> None:
    seen = come_back(play_text, flags="0x20202")
    assert seen.domain.crashed
    assert "virtual-8086" in seen.domain.report


@pytest.mark.parametrize("esp", ["0x1000", "0xc00ffff4", "0xfbfffff8", "0xfffffff8", "0xffffffff", "0"])
def test_unreadable_frame_ends_the_guest(esp: str, mode: Any, play_text: Any) -> None:
    text = f"start: mov esp, {esp}\n mov eax, __HYPERVISOR_iret\n int 0x82\n jmp start"
    seen = play_text(text, mode, budget=100)
    assert seen.domain.crashed
    assert "cannot be read" in seen.domain.report


def test_stack_pointer_of_the_application_is_not_checked(play_text: Any) -> None:
    """As on hardware: a wild ESP hurts when it is used, not when it is loaded."""
    seen = come_back(play_text, esp="0xffffffff")
    assert not seen.domain.crashed
    assert seen.vcpu.state.esp == 0xFFFF_FFFF


def test_round_trip_keeps_every_register(mode: Any, play_text: Any) -> None:
    """A page fault in an application, mended by its kernel, goes unnoticed."""
    text = """
    start:  mov ebx, offset table
            mov eax, __HYPERVISOR_set_trap_table
            int 0x82
            mov eax, FLAT_RING3_DS
            mov ds, eax
            mov es, eax
            push FLAT_RING3_SS
            push offset ustack
            push 0x202
            push FLAT_RING3_CS
            push offset user_start
            push eax
            jmp hypercall_page + 32 * __HYPERVISOR_iret + 1
    fault:  add esp, 4
            add dword ptr [esp], 6
            inc dword ptr cs:[0]
    mended: jmp hypercall_page + 32 * __HYPERVISOR_iret
    again:  add esp, 4
            add dword ptr [esp], 7
            jmp mended
    table:  .byte 14, 0
            .short FLAT_RING1_CS
            .long again
            .long 0, 0
            .align 4096
    user_start:
            mov ebx, 0x11111111
            mov ecx, 0x22222222
            mov edx, 0x33333333
            mov esi, 0x44444444
            mov edi, 0x55555555
            mov ebp, 0x66666666
            mov eax, 0x77777777
            stc
            std
            .byte 0x3e
            mov dword ptr [0x1000], ebx
    wait:   jmp wait
            .skip 512
    ustack: .align 4096
    user_end:
    """
    seen = play_text(text, mode, budget=200)
    state = seen.vcpu.state
    assert len(seen.delivered) == 1
    assert [state.ebx, state.ecx, state.edx, state.esi, state.edi, state.ebp, state.eax] == [
        number * 0x1111_1111 for number in range(1, 8)
    ]
    assert (state.cpl, state.eip, state.esp) == (3, seen.label("wait"), seen.label("ustack"))
    assert state.eflags & 0x401 == 0x401
