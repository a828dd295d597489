"""``set_trap_table`` and ``stack_switch``: what is taken over, what is refused, what stays."""

from __future__ import annotations

from typing import Any

import pytest

from xenlab.abi.numbers import FLAT_RING1_CS

CALL = """
start:  mov ebx, {first}
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, {second}
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov edi, eax
stop:   jmp stop
one:    .byte 3, 3
        .short FLAT_RING1_CS
        .long start
        .long 0, 0
{data}
        .align 4096
last:   .skip 4080
tail:   {tail}
end:
"""


def run(play_text: Any, second: str, *, first: str = "offset one", data: str = "", tail: str = ".skip 16") -> Any:
    return play_text(CALL.format(first=first, second=second, data=data, tail=tail), budget=12)


def test_null_resets_all(play_text: Any) -> None:
    seen = run(play_text, "0")
    assert seen.vcpu.state.edi == 0
    assert seen.vcpu.traps == [None] * 256


def test_rows_are_added_to_what_is_there(play_text: Any) -> None:
    data = "two: .byte 14, 4\n .short 0xe018\n .long stop\n .byte 255, 0xff\n"
    data += " .short FLAT_RING3_CS\n .long one\n .long 0, 0"
    seen = run(play_text, "offset two", data=data)
    traps = seen.vcpu.traps
    assert {number for number, gate in enumerate(traps) if gate} == {3, 14, 255}
    assert (traps[3].dpl, traps[3].masks_events) == (3, False)
    # A selector that asks for ring 0 is moved to ring 1.
    assert (traps[14].cs, traps[14].eip, traps[14].dpl, traps[14].masks_events) == (
        FLAT_RING1_CS,
        seen.label("stop"),
        0,
        True,
    )
    assert (traps[255].cs, traps[255].dpl, traps[255].masks_events) == (0xE02B, 3, True)


@pytest.mark.parametrize(
    "pointer", ["1", "0x1000", "0xbfffffff", "0xfc000000", "0xff00e000", "0xfffffff8", "0xffffffff"]
)
def test_unreadable_table_is_efault_and_changes_nothing(pointer: str, play_text: Any) -> None:
    seen = run(play_text, pointer)
    assert seen.vcpu.state.edi == 2**32 - 14
    assert [number for number, gate in enumerate(seen.vcpu.traps) if gate] == [3]


def test_table_that_runs_off_the_mapped_memory_changes_nothing(play_text: Any) -> None:
    """The first rows can be read; the terminator is missing and the memory ends."""
    row = ".byte 7, 0\n .short FLAT_RING1_CS\n .long start"
    seen = run(play_text, "0xc00ffff0", data=f"row: {row}")
    top = 0xC010_0000 - 16
    words = seen.xen.guest_memory.read(seen.vcpu, seen.label("row"), 8)
    seen.xen.guest_memory.write(seen.vcpu, top, words * 2)
    before = list(seen.vcpu.traps)
    handler = seen.xen.services.set_trap_table
    with pytest.raises(Exception, match="errno 14"):
        handler(seen.vcpu, top)
    assert seen.vcpu.traps == before


def test_full_table_of_256_rows(play_text: Any) -> None:
    rows = "\n".join(f".byte {number}, 1\n .short FLAT_RING1_CS\n .long start + {number}" for number in range(256))
    seen = run(play_text, "offset all", data=f"all: {rows}\n .long 0, 0")
    assert seen.vcpu.state.edi == 0
    assert [gate.eip - seen.label("start") for gate in seen.vcpu.traps] == list(range(256))


def test_overlong_table_ends_after_a_bounded_number_of_rows(play_text: Any) -> None:
    rows = ".rept 4000\n .byte 9, 0\n .short FLAT_RING1_CS\n .long start\n .endr"
    seen = run(play_text, "offset all", data=f"all: {rows}")
    assert seen.vcpu.state.edi == 0
    assert {number for number, gate in enumerate(seen.vcpu.traps) if gate} == {3, 9}


@pytest.mark.parametrize(("given", "kept"), [(0xE020, 0xE021), (0xE021, 0xE021), (0x1_E033, 0xE033), (0, 1)])
def test_stack_switch_takes_16_bits_and_never_ring_0(given: int, kept: int, play_text: Any) -> None:
    seen = play_text(
        f"start: mov ebx, {given}\n mov ecx, 0x12345678\n mov eax, __HYPERVISOR_stack_switch\n int 0x82\n"
        " mov edi, eax\n stop: jmp stop",
        budget=8,
    )
    assert (seen.vcpu.kernel_ss, seen.vcpu.kernel_esp, seen.vcpu.state.edi) == (kept, 0x1234_5678, 0)


def test_exception_in_an_application_uses_the_stack_of_stack_switch(mode: Any, play: Any) -> None:
    setup = "mov ebx, FLAT_RING1_SS\n mov ecx, offset seen + 64\n mov eax, __HYPERVISOR_stack_switch\n int 0x82"
    seen = play("ud2", 3, mode, setup=setup)
    assert seen.first.frame == seen.label("seen") + 64 - 20


@pytest.mark.parametrize(
    ("ss", "esp", "reason"),
    [
        ("FLAT_RING3_SS", "offset seen + 64", "unusable selector"),
        ("FLAT_RING1_CS", "offset seen + 64", "unusable selector"),
        ("0x11", "offset seen + 64", "unusable selector"),
        ("FLAT_RING1_SS", "0x1000", "not on writable memory"),
        ("FLAT_RING1_SS", "0xfffffffc", "not on writable memory"),
        ("FLAT_RING1_SS", "0", "not on writable memory"),
        ("FLAT_RING1_SS", "0xff00f000", "not on writable memory"),
    ],
)
def test_unusable_kernel_stack_ends_the_guest_with_a_report(ss: str, esp: str, reason: str, play: Any) -> None:
    setup = f"mov ebx, {ss}\n mov ecx, {esp}\n mov eax, __HYPERVISOR_stack_switch\n int 0x82"
    seen = play("ud2", 3, setup=setup)
    assert seen.domain.crashed
    assert reason in seen.domain.report
    assert "ud2" in seen.domain.report


@pytest.mark.parametrize("cs", ["FLAT_RING1_DS", "0x9", "FLAT_RING3_CS", "0xfff9", "4", "1"])
def test_handler_with_an_unusable_code_selector_ends_the_guest(cs: str, play: Any) -> None:
    seen = play("ud2", 1, table=f".byte 6, 0\n .short {cs}\n .long handler")
    assert seen.domain.crashed
    assert seen.domain.vcpus[0].state.cpl == 1
