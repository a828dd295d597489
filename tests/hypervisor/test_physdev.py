"""The virtual I/O privilege level, the bitmap, and port instructions carried out or handed back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypercall_bench import END, SCRATCH, Bench
from hypothesis import given
from hypothesis import strategies as st

from xenlab.abi.numbers import Errno, Hypercall, PhysdevOp, VmAssistType
from xenlab.hypervisor.domain import IoRights
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.port_io import ROUNDS, decode_port, is_allowed
from xenlab.hypervisor.trace import Kind
from xenlab.machine.paging import PagingMode

SET_LEVEL = "mov ecx, offset udata\n mov ebx, 6\n mov eax, 33\n int 0x82"
ARCHITECTURAL = "xor ebx, ebx\n mov ecx, 4\n mov eax, 21\n int 0x82"


@pytest.fixture
def bench(mode: PagingMode) -> Bench:
    return Bench(mode)


def call(bench: Bench, command: int, *words: int, at: int = SCRATCH) -> int:
    bench.write(SCRATCH, b"".join(word.to_bytes(4, "little") for word in words).ljust(64, b"\0"))
    return bench.call(Hypercall.physdev_op, command, at)


class TestHypercall:
    """By the rules of Xen's arch/x86/physdev.c."""

    def test_level(self, bench: Bench) -> None:
        for level in range(4):
            assert call(bench, PhysdevOp.SET_IOPL, level) == 0
            assert bench.vcpu.io.level == level
        for level in (4, 0x3000, 0xFFFF_FFFF):
            assert call(bench, PhysdevOp.SET_IOPL, level) == -Errno.EINVAL
        assert call(bench, PhysdevOp.SET_IOPL, at=END) == -Errno.EFAULT
        assert bench.vcpu.io.level == 3

    def test_bitmap(self, bench: Bench) -> None:
        start = start_of(bench.vcpu.state.mode)
        for address, ports in ((SCRATCH, 65536), (0, 0), (start - 8192, 1), (END, 7)):
            assert call(bench, PhysdevOp.SET_IOBITMAP, address, ports) == 0
            assert (bench.vcpu.io.bitmap, bench.vcpu.io.ports) == (address, ports)
        for address, ports in ((SCRATCH, 65537), (start - 8191, 1), (0xFFFF_FFFF, 0), (SCRATCH, 0xFFFF_FFFF)):
            assert call(bench, PhysdevOp.SET_IOBITMAP, address, ports) == -Errno.EINVAL
        assert call(bench, PhysdevOp.SET_IOBITMAP, at=END - 4) == -Errno.EFAULT
        assert bench.vcpu.io == IoRights(0, END, 7)

    def test_both_are_saved_with_the_vcpu(self, bench: Bench) -> None:
        call(bench, PhysdevOp.SET_IOPL, 2)
        saved = bench.vcpu.snapshot()
        call(bench, PhysdevOp.SET_IOPL, 1)
        bench.vcpu.restore(saved)
        assert bench.vcpu.io.level == 2

    def test_there_are_no_interrupts(self, bench: Bench) -> None:
        assert call(bench, PhysdevOp.IRQ_UNMASK_NOTIFY) == 0
        for command in (PhysdevOp.EOI, PhysdevOp.IRQ_STATUS_QUERY):
            assert call(bench, command, 1) == -Errno.EINVAL
            assert call(bench, command, at=END) == -Errno.EFAULT
        assert call(bench, PhysdevOp.GET_FREE_PIRQ, 0) == -Errno.ENOSPC

    @pytest.mark.parametrize("command", [8, 9, 10, 13, 14, 15, 16, 19, 20, 21, 24, 25, 26, 27, 30, 31])
    def test_devices_are_for_the_domain_that_has_them(self, command: int, bench: Bench) -> None:
        assert call(bench, command, at=END) == -Errno.EFAULT
        assert call(bench, command) == -Errno.EPERM
        bench.domain.privileged = True
        assert call(bench, command) == -Errno.ENODEV

    @pytest.mark.parametrize("command", [0, 1, 2, 3, 11, 17, 18, 22, 28, 29, 32, 0xFFFF_FFFF])
    def test_unknown_commands(self, command: int, bench: Bench) -> None:
        assert call(bench, command) == -Errno.ENOSYS

    def test_as_it_was_before_xen_3_2(self, bench: Bench) -> None:
        bench.write(SCRATCH, (6).to_bytes(4, "little") + (3).to_bytes(4, "little"))
        assert bench.call(Hypercall.physdev_op_compat, SCRATCH) == 0
        assert bench.vcpu.io.level == 3
        bench.write(END - 4, (6).to_bytes(4, "little"))
        assert bench.call(Hypercall.physdev_op_compat, END - 4) == -Errno.EFAULT
        assert bench.call(Hypercall.physdev_op_compat, END) == -Errno.EFAULT


class TestVmAssist:
    def test_types(self, bench: Bench) -> None:
        for kind in VmAssistType:
            assert bench.call(Hypercall.vm_assist, 0, kind) == 0
            assert bench.domain.assists >> kind & 1
            assert bench.call(Hypercall.vm_assist, 1, kind) == 0
            assert not bench.domain.assists >> kind & 1
            assert bench.call(Hypercall.vm_assist, 2, kind) == -Errno.ENOSYS
        # 32 is for 64-bit guests.
        for unknown in (6, 31, 32, 64, 0xFFFF_FFFF):
            for command in (0, 1, 2):
                assert bench.call(Hypercall.vm_assist, command, unknown) == -Errno.EINVAL

    def test_writable_tables_are_one_of_them(self, bench: Bench) -> None:
        assert bench.call(Hypercall.vm_assist, 0, 2) == 0
        assert bench.domain.writable_tables
        assert bench.call(Hypercall.vm_assist, 1, 2) == 0
        assert not bench.domain.writable_tables


@pytest.mark.parametrize("architectural", [False, True])
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("probe", ["cli", "sti", "out 0x80, al", "in al, dx", "in eax, 0x10", "out dx, eax"])
def test_who_may(probe: str, level: int, ring: int, architectural: bool, play: Any) -> None:
    setup = f"{ARCHITECTURAL if architectural else ''}\n {SET_LEVEL}"
    seen = play(probe, ring, setup=setup, udata=f".long {level}", flags=f"{level << 12 | 0x202:#x}")
    allowed = level >= ring or (architectural and ring == 1)
    assert seen.first.vector == (0x80 if allowed else 13)
    assert bool(seen.xen.trace.events(Kind.EMULATE)) == allowed
    assert seen.vcpu.state.eflags & 0x3000 == 0, "the real level is 0"


def test_frames_show_the_level_only_to_those_who_asked(play: Any) -> None:
    for assist, shown in (("", 0), (ARCHITECTURAL, 0x2000)):
        seen = play("nop", 1, setup=f"{assist}\n {SET_LEVEL}", udata=".long 2")
        assert seen.frame["eflags"] & 0x3000 == shown


def test_a_return_sets_the_level_of_those_who_asked(play: Any) -> None:
    for assist, level in (("", 0), (ARCHITECTURAL, 3)):
        seen = play("nop", 3, setup=assist, flags="0x3202")
        assert seen.vcpu.io.level == level


@pytest.mark.parametrize(
    ("probe", "eax"),
    [
        ("in al, 0x80", 0x123456FF),
        ("in ax, dx", 0x1234FFFF),
        ("in eax, dx", 0xFFFF_FFFF),
        (".byte 0x66, 0xe5, 0x10", 0x1234FFFF),
        ("mov al, 0x8f\n out 0x70, al\n xor eax, eax\n in al, 0x70", 0x8F),
        ("out 0x70, al\n in eax, 0x6f", 0xFFFF_78FF),
        ("mov dx, 0xcf8\n out dx, eax\n xor eax, eax\n in eax, dx", 0x1234_5678),
        ("mov dx, 0xcf8\n out dx, ax\n in ax, dx", 0x1234_FFFF),
        ("mov dx, 0xcfc\n in eax, dx", 0xFFFF_FFFF),
    ],
)
def test_what_ports_answer(probe: str, eax: int, play: Any) -> None:
    seen = play(f"mov eax, 0x12345678\n {probe}", 1, setup=SET_LEVEL, udata=".long 1")
    assert seen.first.vector == 0x80
    assert seen.word("seen") == eax


class TestBitmap:
    """A bit of 0 in the guest's bitmap lets an application use a port; two bytes are looked at, as the CPU does."""

    def allowed(self, bench: Bench, port: int, size: int) -> bool:
        return is_allowed(bench.xen.guest_memory, bench.vcpu, port, size)

    def test_bits(self, bench: Bench) -> None:
        bench.write(SCRATCH, b"\xff" * 8192)
        bench.write(SCRATCH + 0x10, b"\x0f\xfe")
        bench.vcpu.io = IoRights(0, SCRATCH, 65536)
        assert self.allowed(bench, 0x84, 4)
        assert self.allowed(bench, 0x87, 2)
        assert not self.allowed(bench, 0x87, 4)
        assert not self.allowed(bench, 0x83, 1)
        assert not self.allowed(bench, 0xFFFF, 1)

    def test_no_more_ports_than_were_named(self, bench: Bench) -> None:
        bench.write(SCRATCH, bytes(8192))
        bench.vcpu.io = IoRights(0, SCRATCH, 16)
        assert [self.allowed(bench, port, size) for port, size in ((12, 4), (13, 4), (15, 1), (16, 1))] == [
            True,
            False,
            True,
            False,
        ]
        bench.vcpu.io = replace(bench.vcpu.io, ports=65536)
        assert not self.allowed(bench, 0xFFFE, 4)

    def test_what_cannot_be_read_is_not_allowed(self, bench: Bench) -> None:
        bench.write(END - 1, b"\0")
        bench.vcpu.io = IoRights(0, END - 1, 65536)
        assert self.allowed(bench, 0, 4)
        assert not self.allowed(bench, 6, 4)
        bench.vcpu.io = IoRights(0, END, 65536)
        assert not self.allowed(bench, 0, 1)

    def test_is_looked_at_for_an_application(self, play: Any) -> None:
        setup = """
        mov dword ptr [udata], offset user_end - 4096
        mov ecx, offset udata
        mov ebx, 7
        mov eax, 33
        int 0x82
        mov byte ptr [user_end - 4096 + 0x10], 1
        """
        for port, vector in ((0x81, 0x80), (0x80, 13)):
            seen = play(f"in al, {port}", 3, setup=setup, udata=".long 0, 0x100")
            assert seen.first.vector == vector


class TestStrings:
    """INS and OUTS."""

    def run(self, play: Any, probe: str, ring: int = 1, **more: Any) -> Any:
        return play(probe, ring, setup=SET_LEVEL, udata=".long 3\n .byte 1, 2, 3, 4, 5, 6, 7, 8", **more)

    def test_input_is_ones(self, ring: int, play: Any) -> None:
        probe = (
            "mov edi, offset udata + 4\n mov ecx, 2\n mov edx, 0x80\n rep insw\n mov ebx, [udata + 4]\n mov edx, edi"
        )
        seen = self.run(play, probe, ring)
        assert seen.first.vector == 0x80
        assert seen.words("seen", 4)[2:] == (0, seen.label("udata") + 8)
        assert seen.word("udata", 4) == 0xFFFF_FFFF
        assert seen.word("udata", 8) == 0x0807_0605

    def test_backwards(self, play: Any) -> None:
        probe = "mov edi, offset udata + 6\n mov ecx, 3\n mov edx, 0x80\n std\n rep insb\n cld\n mov edx, edi"
        seen = self.run(play, probe)
        assert seen.word("udata", 4) == 0x04FF_FFFF
        assert seen.word("seen", 12) == seen.label("udata") + 3

    def test_output_is_read_and_gone(self, play: Any) -> None:
        probe = "mov esi, offset udata + 4\n mov edx, 0x70\n outsb\n in al, 0x70\n mov edx, esi"
        seen = self.run(play, probe)
        assert seen.word("seen") & 0xFF == 1
        assert seen.word("seen", 12) == seen.label("udata") + 5

    def test_more_rounds_than_one_trap_does(self, play: Any) -> None:
        probe = f"mov esi, offset udata\n mov ecx, {2 * ROUNDS + 5}\n mov edx, 0x80\n rep outsb\n mov edx, esi"
        seen = self.run(play, probe)
        assert seen.first.vector == 0x80
        assert len(seen.xen.trace.events(Kind.EMULATE)) == 3
        assert seen.words("seen", 4)[2:] == (0, seen.label("udata") + 2 * ROUNDS + 5)

    def test_memory_that_is_not_there_is_a_page_fault(self, play: Any) -> None:
        probe = "mov edi, 0xc00ffffe\n mov ecx, 4\n mov edx, 0x80\n rep insb"
        seen = self.run(play, probe)
        assert seen.first.vector in (13, 14)
        seen = self.run(play, "mov edi, 0x10000000\n mov edx, 0x80\n insb")
        assert (seen.first.vector, seen.vcpu.control["cr2"]) == (14, 0x1000_0000)

    def test_an_application_cannot_have_its_kernel_written(self, play: Any) -> None:
        """Emulation itself is at work: the CPU's own try at the store would stop at the page too."""
        seen = self.run(play, "mov esi, offset start\n mov edx, 0x80\n outsb", 3)
        assert (seen.first.vector, seen.vcpu.control["cr2"]) == (14, seen.label("start"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("6c", (1, 1, False, None, True, False, "ds", 0xFFFF_FFFF)),
        ("f3 66 6f", (3, 2, True, None, True, True, "ds", 0xFFFF_FFFF)),
        ("64 67 6e", (3, 1, True, None, True, False, "fs", 0xFFFF)),
        ("e4 70", (2, 1, False, 0x70, False, False, "ds", 0xFFFF_FFFF)),
        ("e7 ff", (2, 4, True, 0xFF, False, False, "ds", 0xFFFF_FFFF)),
        ("66 ef", (2, 2, True, None, False, False, "ds", 0xFFFF_FFFF)),
    ],
)
def test_decoding(code: str, expected: tuple[Any, ...]) -> None:
    found = decode_port(bytes.fromhex(code))
    assert found is not None
    names = ("length", "size", "output", "port", "string", "repeated", "segment", "mask")
    assert tuple(getattr(found, name) for name in names) == expected


@given(st.binary(max_size=15))
def test_decoding_anything(code: bytes) -> None:
    found = decode_port(code)
    if found is None:
        return
    assert 0 < found.length <= len(code)
    opcode = code[found.length - (1 if found.port is None else 2)]
    assert opcode in (*range(0x6C, 0x70), *range(0xE4, 0xE8), *range(0xEC, 0xF0))
    assert found.output == bool(opcode & 2)
