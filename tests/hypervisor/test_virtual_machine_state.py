"""What a guest is told about its processor: CPUID by the forced-emulation prefix, and model-specific registers."""

from __future__ import annotations

from typing import Any

import pytest

from xenlab.hypervisor.hypercalls import hypercall_page
from xenlab.hypervisor.model_registers import read_register, write_register
from xenlab.hypervisor.trace import Kind
from xenlab.hypervisor.virtual_cpuid import guest_cpuid
from xenlab.machine.cpuid import cpuid

FORCED = ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2"
SYSTEM = {"tsc": 0x1_2345_6789, "vcpu": 0}
# Registers that can be read, and some that cannot.
VALUES = {
    0x10: SYSTEM["tsc"],
    0x17: 0,
    0x1B: 0xFEE0_0900,
    0x3A: 1,
    0x8B: 0,
    0xC1: 0,
    0xCE: 0,
    0x140: 0,
    0x186: 0,
    0x198: 0,
    0x199: 0,
    0x1A0: 0x80_1801,
    0x30A: 0,
    0x345: 0,
    0x38F: 0,
    0x4000_0000: 0,
    0xC000_0080: 0x800,
}
FAULTS = (
    *(0, 0x79, 0xE7, 0xFE, 0x10A, 0x174, 0x175, 0x176, 0x179, 0x200, 0x277, 0x400, 0x800, 0x4000_0001),
    *range(0xC000_0081, 0xC000_0085),
    *range(0xC000_0100, 0xC000_0104),
    0xC001_0015,
)


class TestForcedEmulation:
    def test_answers_in_the_processors_place(self, ring: int, play: Any) -> None:
        for leaf in (0, 1, 7, 0x4000_0000, 0x4000_0003, 0x8000_0001, 0x8000_0002, 0xFFFF_FFFF):
            seen = play(f"mov eax, {leaf:#x}\n mov ecx, 1\n {FORCED}\n mov edi, ebx", ring)
            assert seen.first.vector == 0x80
            a, b, c, d = guest_cpuid(leaf, 1)
            assert (seen.word("seen"), *seen.words("seen", 4)[2:]) == (a, c, d)
            assert seen.vcpu.state.edi == b
            (event,) = seen.xen.trace.events(Kind.EMULATE)
            assert event.code == bytes.fromhex("0f0b78656e0fa2")

    @pytest.mark.parametrize(
        "probe",
        [
            "ud2",
            ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6f, 0x0f, 0xa2",
            ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x90, 0x90",
            ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0x31",
            ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x66, 0x0f, 0xa2",
        ],
    )
    def test_of_nothing_else(self, probe: str, ring: int, play: Any) -> None:
        seen = play(probe, ring)
        assert seen.first.vector == 6
        assert seen.frame["eip"] == seen.label("probe")
        assert not seen.xen.trace.events(Kind.EMULATE)

    @pytest.mark.parametrize("cut", range(2, 7))
    def test_prefix_that_runs_into_nothing_is_a_page_fault(self, cut: int, play_text: Any) -> None:
        code = bytes.fromhex("0f0b78656e0fa2")[:cut]
        stores = "\n".join(f"mov byte ptr [0xc0100000 - {cut - n}], {byte}" for n, byte in enumerate(code))
        seen = play_text(f"start: {stores}\n jmp there\n there: mov eax, 0xc0100000 - {cut}\n jmp eax", budget=40)
        assert seen.domain.crashed
        assert "exception 14" in seen.domain.report
        assert "at address 0xc0100000" in seen.domain.report

    def test_single_step_sees_it_as_one_instruction(self, play: Any) -> None:
        probe = f"pushf\n or dword ptr [esp], 0x100\n xor eax, eax\n popf\n {FORCED}\n there: nop"
        seen = play(probe, 1)
        assert seen.first.vector == 1
        assert seen.frame["eip"] == seen.label("there")
        assert seen.vcpu.control["dr6"] & 0x4000


class TestCpuid:
    def test_own_leaves(self) -> None:
        a, b, c, d = guest_cpuid(0x4000_0000, 0)
        assert a == 0x4000_0005
        assert b"".join(word.to_bytes(4, "little") for word in (b, c, d)) == b"XenVMMXenVMM"
        assert guest_cpuid(0x4000_0001, 0) == (4 << 16 | 17, 0, 0, 0)
        assert guest_cpuid(0x4000_0002, 0) == (1, 0x4000_0000, 1, 0)
        assert guest_cpuid(0x4000_0004, 0) == (0, 0, 0, 0)
        assert guest_cpuid(0x4000_0005, 0)[1] == 36
        for leaf in (0x4000_0006, 0x4000_0100, 0x3FFF_FFFF):
            assert guest_cpuid(leaf, 0) == (0, 0, 0, 0)

    def test_time_is_ten_nanoseconds_a_tick(self) -> None:
        kilohertz = guest_cpuid(0x4000_0003, 0)[2]
        _low, _high, scale, shift = guest_cpuid(0x4000_0003, 1)
        assert (1000 << shift) * scale >> 32 == 10_000
        assert kilohertz == guest_cpuid(0x4000_0003, 2)[0] == 100_000

    def test_the_rest_is_the_machines(self) -> None:
        for leaf in (0, 0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0008, 2):
            assert guest_cpuid(leaf, 0) == cpuid(leaf, 0)
        a, b, c, d = cpuid(1, 0)
        assert guest_cpuid(1, 0) == (a, b, c | 1 << 31, d)
        # No guest has virtual-8086 mode, superpages, global pages, memory types or SYSENTER.
        assert not d & sum(1 << bit for bit in (1, 3, 9, 11, 12, 13, 17))


class TestModelSpecificRegisters:
    """By the list in Xen's arch/x86/msr.c and arch/x86/pv/emul-priv-op.c."""

    def test_reads(self) -> None:
        for number, value in VALUES.items():
            assert read_register(number, SYSTEM) == value, hex(number)
        for number in FAULTS:
            assert read_register(number, SYSTEM) is None, hex(number)
        assert read_register(0x1B, SYSTEM | {"vcpu": 1}) == 0xFEE0_0800

    def test_writes(self) -> None:
        without_effect = {
            0x8B,
            0xC1,
            0xC8,
            0xE7,
            0xE8,
            0x186,
            0x189,
            0x199,
            0x19A,
            0x1A0,
            0x1B0,
            0x309,
            0x30A,
            0x38D,
            0x38F,
            0x390,
        }
        for number in without_effect:
            assert write_register(number, 0xFFFF_FFFF_FFFF_FFFF) == {}
        for number in (set(VALUES) | set(FAULTS)) - without_effect - {0x4000_0000}:
            assert write_register(number, 0xFFFF_FFFF_FFFF_FFFF) is None, hex(number)
        assert write_register(0xC000_0080, 0x800) == {}
        assert write_register(0xC000_0080, 0x801) is None
        assert write_register(0x140, 0) == {}
        assert write_register(0x140, 1) is None

    def test_reach_the_guest(self, play: Any) -> None:
        probe = "mov ecx, 0x1a0\n rdmsr\n mov esi, eax\n mov edi, edx\n xor eax, eax\n wrmsr"
        seen = play(probe, 1)
        assert seen.first.vector == 0x80
        assert (seen.vcpu.state.esi, seen.vcpu.state.edi) == (0x80_1801, 0)

    def test_filling_a_page_with_stubs(self, mode: Any, play: Any) -> None:
        """The page is named by its machine address; the guest finds the frame's number in its list."""
        probe = """
            mov eax, [boot_info]
            mov eax, [eax + 32 + 9 * 4]
            mov ebx, offset ustack_low
            and ebx, 0xfffff
            shr ebx, 12
            mov eax, [eax + 4 * ebx]
            shl eax, 12
            xor edx, edx
            mov ecx, 0x40000000
            wrmsr
        """
        seen = play(probe, 1, mode)
        assert seen.first.vector == 0x80
        assert seen.xen.guest_memory.read(seen.vcpu, seen.label("ustack_low"), 4096) == hypercall_page()

    @pytest.mark.parametrize("value", ["0", "0x2", "0xfff", "0xfffff000"])
    def test_pages_that_are_not_to_be_filled(self, value: str, play: Any) -> None:
        seen = play(f"mov eax, {value}\n xor edx, edx\n mov ecx, 0x40000000\n wrmsr", 1)
        assert (seen.first.vector, seen.frame["error"]) == (13, 0)

    def test_a_page_table_is_not_filled(self, play: Any) -> None:
        seen = play("mov eax, cr3\n xor edx, edx\n mov ecx, 0x40000000\n wrmsr", 1)
        assert (seen.first.vector, seen.frame["error"]) == (13, 0)


def test_time_stamp_for_kernels_only(ring: int, play: Any) -> None:
    seen = play("rdtsc", ring, setup="mov eax, 4\n mov cr4, eax")
    assert seen.first.vector == (0x80 if ring == 1 else 13)


@pytest.mark.parametrize(
    "probe", ["hlt", "invd", "rdpmc", "lmsw ax", "invlpg [eax]", "ltr ax", "lldt ax", "lgdt [udata]", "lidt [udata]"]
)
def test_what_is_replaced_by_hypercalls_faults(probe: str, play: Any) -> None:
    seen = play(probe, 1)
    assert (seen.first.vector, seen.frame["error"]) == (13, 0)


@pytest.mark.parametrize("probe", ["xgetbv", "xsetbv", "rdtscp"])
def test_what_the_processor_does_not_have(probe: str, ring: int, play: Any) -> None:
    code = {"xgetbv": "0xd0", "xsetbv": "0xd1", "rdtscp": "0xf9"}[probe]
    seen = play(f"xor ecx, ecx\n xor eax, eax\n xor edx, edx\n .byte 0x0f, 0x01, {code}", ring)
    assert seen.first.vector == 6
