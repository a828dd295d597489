"""Descriptors that change under the segment registers loaded from them; the failsafe callback (callback.h)."""

from __future__ import annotations

from typing import Any

import pytest
from test_local_segments import ABSENT, CODE, DATA, GDT, LDT, guest

from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING1_DS, FLAT_RING3_CS, FLAT_RING3_SS, Hypercall
from xenlab.hypervisor.trace import Kind
from xenlab.machine.paging import PagingMode

# The kernel loads selector 0x20 into some registers, and then has its descriptor changed.
CHANGE = """
        mov edx, FLAT_RING1_CS
        mov esi, offset failsafe
        mov ebx, FLAT_RING1_CS
        mov ecx, offset handler
        mov eax, __HYPERVISOR_set_callbacks
        int 0x82
        {register}
        mov eax, {selector}
        {loads}
        mov ebx, cs:[frame]
        shl ebx, 12
        add ebx, 0x20
        xor ecx, ecx
        mov edx, {low}
        mov esi, {high}
        mov eax, __HYPERVISOR_update_descriptor
        int 0x82
after:  mov cs:[marker], eax
        {behind}
        jmp after
        .align 4
marker: .long 0xFFFF
operation: .short 1, {flags}
        .long FLAT_RING1_CS
        .long failsafe
failsafe: jmp failsafe
"""
BY_CALLBACK_OP = "mov ebx, 0\n mov ecx, offset operation\n mov eax, __HYPERVISOR_callback_op\n int 0x82"


def changing(to: int, loads: str = "mov fs, eax", table: int = GDT, **parts: str) -> str:
    defaults = {"register": "", "behind": "", "flags": "0"}
    change = CHANGE.format(
        loads=loads, selector=hex(0x20 | 1 | table), low=hex(to & 0xFFFF_FFFF), high=hex(to >> 32), **defaults | parts
    )
    return guest([CODE | 1 << 45, DATA | 1 << 45], before=change)


def failed(seen: Any) -> list[Any]:
    found: list[Any] = seen.xen.trace.events(Kind.FAILSAFE)
    return found


@pytest.mark.parametrize("table", [GDT, LDT])
@pytest.mark.parametrize("loads", ["mov fs, eax", "mov ds, eax\n mov es, eax\n mov gs, eax"])
def test_a_descriptor_that_is_taken_away(table: int, loads: str, mode: PagingMode, play_text: Any) -> None:
    seen = play_text(changing(0, loads, table), mode, budget=120)
    (event,) = failed(seen)
    state, words, selector = seen.vcpu.state, event.words, 0x21 | table
    assert (event.from_ring, event.to_ring, event.handler) == (1, 1, seen.label("failsafe"))
    assert (state.cpl, state.eip, state.esp) == (1, seen.label("failsafe"), event.frame)
    # DS, ES, FS and GS as they were, then what was interrupted: behind the hypercall, which has its answer.
    plain = FLAT_RING1_DS
    expected = {"mov fs, eax": (plain, plain, selector, plain)}.get(loads, (selector, selector, plain, selector))
    assert words[:4] == expected
    assert words[4:6] == (seen.label("after"), FLAT_RING1_CS | 1 << 16)
    assert seen.words(event.frame, 7) == words
    assert state.eax == 0
    assert [state.segment(name).selector for name in ("ds", "es", "fs", "gs")] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "to", [DATA & ~ABSENT | 1 << 45, 0, 0x00CF_9900_0000_FFFF | 1 << 45, 0x0000_EC00_E019_0000], ids=hex
)
def test_what_cannot_be_loaded(to: int, play_text: Any) -> None:
    """Not present, empty, code that cannot be read, a call gate."""
    assert failed(play_text(changing(to), budget=120))


@pytest.mark.parametrize("to", [DATA | 2 << 45, DATA | 3 << 45, CODE | 1 << 45, 0x00CF_9100_0000_FFFF], ids=hex)
def test_what_still_can_be_loaded(to: int, play_text: Any) -> None:
    seen = play_text(changing(to), budget=120)
    assert not failed(seen)
    assert seen.word("marker") == 0
    assert seen.vcpu.state.segment("fs").selector == 0x21


def test_a_new_base_shows_at_once(mode: PagingMode, play_text: Any) -> None:
    """As in Xen, which loads the registers anew on its way back."""
    to = 0x00CF_9300_1000_FFFF | 1 << 45  # begins at 0x1000
    read = "mov edi, offset marker - 0x1000\n mov edi, fs:[edi]"
    seen = play_text(changing(to, behind=read), mode, budget=120)
    assert not failed(seen)
    assert seen.vcpu.state.edi == 0


def test_what_is_not_in_use_does_not_matter(play_text: Any) -> None:
    seen = play_text(changing(0, loads="nop"), budget=120)
    assert not failed(seen)
    assert seen.word("marker") == 0


def test_a_change_that_is_refused_changes_nothing(play_text: Any) -> None:
    seen = play_text(changing(0x0000_E900_0000_0067), budget=120)
    assert not failed(seen)
    assert seen.word("marker") == 0x1_0000_0000 - 22


@pytest.mark.parametrize("flags", [0, 1])
def test_callback_op_registers_it_too(flags: int, play_text: Any) -> None:
    unmask = "mov byte ptr [shared_info + 1], 0\n"
    seen = play_text(changing(0, register=unmask + BY_CALLBACK_OP, flags=str(flags)), budget=120)
    (event,) = failed(seen)
    assert event.words[5] == FLAT_RING1_CS
    assert event.words[6] & 0x200
    assert seen.xen.memory.bytes[seen.vcpu.info + 1] == flags


@pytest.mark.parametrize(
    ("register", "report"),
    [
        ("mov edx, FLAT_RING1_DS\n mov eax, __HYPERVISOR_set_callbacks\n int 0x82", "unusable code selector"),
        ("mov edx, FLAT_RING3_CS\n mov eax, __HYPERVISOR_set_callbacks\n int 0x82", "less privileged"),
        ("mov esp, 0x1000", "not on writable memory"),
        ("mov esp, [ebp + 60]\n add esp, 64", "not on writable memory"),
        ("mov esp, 0xff000000", "not on writable memory"),
    ],
)
def test_a_callback_that_cannot_be_entered_ends_the_guest(register: str, report: str, play_text: Any) -> None:
    seen = play_text(changing(0, register=register), budget=120)
    assert seen.domain.crashed
    assert "a segment register that cannot be loaded" in seen.domain.report
    assert report in seen.domain.report


def test_without_a_callback_the_register_is_empty(mode: PagingMode, play_text: Any) -> None:
    nowhere = "xor esi, esi\n mov eax, __HYPERVISOR_set_callbacks\n int 0x82"
    seen = play_text(changing(0, register=nowhere), mode, budget=120)
    assert not failed(seen)
    assert not seen.domain.ended
    assert (seen.word("marker"), seen.vcpu.state.segment("fs").selector) == (0, 0)


@pytest.mark.parametrize("name", ["gdt", "ldt"])
def test_a_table_that_goes_away(name: str, play_text: Any) -> None:
    drop = {
        "gdt": "mov ebx, offset frame\n xor ecx, ecx\n mov eax, __HYPERVISOR_set_gdt\n int 0x82",
        "ldt": "mov dword ptr cs:[local_table + 8], 0\n mov ebx, offset local_table\n mov ecx, 1\n xor edx, edx\n"
        "mov esi, DOMID_SELF\n mov eax, __HYPERVISOR_mmuext_op\n int 0x82",
    }[name]
    drop = drop.replace("dword ptr cs:", "dword ptr ss:")
    seen = play_text(changing(DATA | 1 << 45, table=LDT if name == "ldt" else GDT, behind=drop), budget=140)
    (event,) = failed(seen)
    assert event.words[2] == (0x25 if name == "ldt" else 0x21)


class TestApplications:
    """A vCPU in ring 3 whose kernel, on another one, changes a descriptor: here by the hypercall's function."""

    def stopped(self, play_text: Any, mode: PagingMode, probe: str, **parts: str) -> Any:
        text = guest([CODE | 3 << 45, DATA | 3 << 45], probe=probe, **parts)
        seen = play_text(text, mode, budget=120)
        assert seen.vcpu.state.cpl == 3
        return seen

    def change(self, seen: Any, at: int, to: int) -> None:
        address = (seen.vcpu.gdt[0] << 12) + at
        assert seen.xen.descriptor_tables.update_descriptor(seen.vcpu, address, 0, to & 0xFFFF_FFFF, to >> 32) == 0
        seen.xen.run(5)

    def delivered(self, seen: Any) -> tuple[Any, Any]:
        (event,) = seen.xen.trace.events(Kind.DELIVER)
        return event.vector, event.words

    def callback(self, seen: Any) -> None:
        address = seen.label("handler")
        seen.xen.hypercalls.handlers[Hypercall.set_callbacks](seen.vcpu, 0, 0, FLAT_RING1_CS, address)

    def test_data(self, mode: PagingMode, play_text: Any) -> None:
        seen = self.stopped(play_text, mode, "mov eax, 0x23\n mov gs, eax\n nop")
        self.callback(seen)
        self.change(seen, 0x20, 0)
        (event,) = failed(seen)
        assert (event.from_ring, event.to_ring) == (3, 1)
        assert event.frame == seen.label("kernel_stack") - 36
        assert event.words[3] == 0x23
        assert event.words[5] == FLAT_RING3_CS
        assert event.words[7:] == (seen.label("user_stack"), FLAT_RING3_SS)
        assert seen.vcpu.state.eip == seen.label("handler")

    def test_data_for_an_inner_ring_is_emptied(self, mode: PagingMode, play_text: Any) -> None:
        seen = self.stopped(play_text, mode, "mov eax, 0x20\n mov gs, eax\nhere: jmp here")
        self.callback(seen)
        self.change(seen, 0x20, DATA | 1 << 45)
        assert not failed(seen)
        state = seen.vcpu.state
        assert (state.cpl, state.segment("gs").selector, state.segment("gs").limit) == (3, 0, 0)

    @pytest.mark.parametrize(("to", "vector"), [(0, 13), (CODE & ~ABSENT | 3 << 45, 11)])
    def test_code(self, to: int, vector: int, mode: PagingMode, play_text: Any) -> None:
        seen = self.stopped(play_text, mode, "nop", outer_code="0x1b")
        self.change(seen, 0x18, to)
        raised, words = self.delivered(seen)
        assert (raised, words[0], words[2]) == (vector, 0x18, 0x1B)

    @pytest.mark.parametrize(("to", "vector"), [(DATA | 1 << 45, 13), (DATA & ~ABSENT | 3 << 45, 12)])
    def test_stack(self, to: int, vector: int, mode: PagingMode, play_text: Any) -> None:
        seen = self.stopped(play_text, mode, "nop", outer_stack="0x23")
        self.change(seen, 0x20, to)
        raised, words = self.delivered(seen)
        assert (raised, words[0], words[5]) == (vector, 0x20, 0x23)
