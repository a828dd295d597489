"""Privileged instructions of a kernel in ring 1, carried out or handed back as #GP."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_bench import FREE_PFN, LEAF, READ_ONLY, REQUESTS, TABLE, Guest, guests

from xenlab.abi.numbers import MmuextOp
from xenlab.hypervisor import preemption
from xenlab.hypervisor.emulate import GENERAL, PrivilegedInstructions, decode
from xenlab.hypervisor.trace import Kind
from xenlab.machine.paging import TWO_LEVEL, PagingMode
from xenlab.machine.vectors import PROTECTION

CR0 = 0x8005_0033
# What the guest sees of the machine's CR4; with PAE page tables there is also 0x20.
CR4 = 0x600
REGISTERS = {name: 0x100 + number for number, name in enumerate(GENERAL)} | {"eip": 0x1000, "eflags": 2}
SYSTEM = {
    "ring": 1,
    "iopl": 0,
    "tsc": 0x1_2345_6789,
    "cr0": CR0,
    "cr2": 0xDEAD,
    "cr3": 0x5000,
    "cr4": 0,
    "machine_cr4": CR4,
    "vcpu": 0,
} | {
    "dr0": 1,
    "dr1": 2,
    "dr2": 3,
    "dr3": 4,
    "dr6": 0xFFFF_0FF0,
    "dr7": 0x400,
}

# Instruction, and EBX afterwards where it is a register's business.
DONE = {
    "mov ebx, cr0": CR0,
    "mov ebx, cr2": 0,
    "mov ebx, cr4\n and ebx, ~0x20": CR4,
    "mov ebx, dr6": 0xFFFF_0FF0,
    "mov ebx, dr7": 0x400,
    "clts": None,
    "wbinvd": None,
    "rdtsc": None,
    "mov eax, 0x12345\n mov cr2, eax\n mov ebx, cr2": 0x12345,
    "mov eax, 0xc\n mov cr4, eax\n mov ebx, cr4\n and ebx, ~0x20": CR4 | 0xC,
    # Bits of the machine's are as they are, whatever is written.
    "xor eax, eax\n mov cr4, eax\n mov ebx, cr4\n and ebx, ~0x20": CR4,
    "mov eax, 0xfffffff3\n mov cr4, eax\n mov ebx, cr4\n and ebx, ~0x20": CR4,
    "mov ebx, cr3\n mov cr3, ebx": None,
    "mov ebx, cr0\n or ebx, 8\n mov cr0, ebx\n mov ebx, cr0": CR0 | 8,
    "mov ebx, cr0\n or ebx, 8\n mov cr0, ebx\n clts\n mov ebx, cr0": CR0,
    "mov eax, 0x1234\n mov dr3, eax\n mov ebx, dr3": 0x1234,
    "mov ecx, 0xc0000080\n rdmsr\n mov ebx, eax": 0x800,
    "mov ecx, 0xc0000080\n rdmsr\n wrmsr": None,
    # The two upper bits of the operand byte mean nothing to moves of control registers.
    ".byte 0x0f, 0x20, 0x03": CR0,
    ".byte 0x0f, 0x20, 0x43": CR0,
    ".byte 0x0f, 0x20, 0x83": CR0,
    # Nor do segment and operand-size prefixes.
    ".byte 0x66, 0x0f, 0x20, 0xc3": CR0,
    ".byte 0x3e, 0x64, 0x66, 0x2e, 0x0f, 0x20, 0xc3": CR0,
}


@pytest.mark.parametrize("probe", DONE)
def test_carried_out_for_the_kernel(probe: str, mode: Any, play: Any) -> None:
    # What comes behind must be reached at the right place: the snippet's own end.
    seen = play(f"{probe}\n mov edx, ebx", 1, mode)
    assert seen.first.vector == 0x80
    assert seen.xen.trace.events(Kind.EMULATE)
    expected = DONE[probe]
    if expected is not None:
        assert seen.vcpu.state.edx == expected or seen.word("seen", 12) == expected


@pytest.mark.parametrize("probe", [name for name in DONE if name != "rdtsc"])
def test_refused_to_an_application(probe: str, play: Any) -> None:
    seen = play(probe, 3)
    assert (seen.first.vector, seen.frame["error"]) == (13, 0)
    assert not seen.xen.trace.events(Kind.EMULATE)


def test_time_stamp_is_for_everybody_and_is_instructions_begun(ring: int, play: Any) -> None:
    seen = play("rdtsc\n mov ecx, eax\n rdtsc", ring)
    assert seen.first.vector == 0x80
    first, second = (dict(event.changes) for event in seen.xen.trace.events(Kind.EMULATE))
    assert second["eax"] - first["eax"] == 2
    assert seen.word("seen", 8) == first["eax"]
    assert seen.word("seen", 12) == 0


@pytest.mark.parametrize(
    "probe",
    [
        *(f"mov eax, {CR0 ^ 1 << bit:#x}\n mov cr0, eax" for bit in range(32) if bit != 3),
        "mov eax, 0x1000\n mov cr3, eax",
        "mov eax, 0x2001\n mov dr7, eax",
        "mov eax, 0x2000\n mov dr7, eax",
        "mov eax, 0x20001\n mov dr7, eax",
        "mov ecx, 0x277\n rdmsr",
        "mov ecx, 0xc0000080\n xor edx, edx\n mov eax, 0x801\n wrmsr",
        "hlt",
        "lgdt [udata]",
        "invlpg [eax]",
        "lmsw ax",
        "in al, dx",
        "out dx, al",
        "cli",
        "sti",
    ],
)
def test_handed_back_to_the_kernel(probe: str, play: Any) -> None:
    seen = play(probe, 1)
    assert (seen.first.vector, seen.frame["error"]) == (13, 0)
    control = seen.vcpu.control
    assert (control["cr0"], control["cr4"], control["dr7"]) == (CR0, 0, 0x400)
    assert not seen.xen.trace.events(Kind.EMULATE)


@pytest.mark.parametrize("register", ["cr1", "cr5", "cr6", "cr7"])
def test_control_registers_that_do_not_exist(register: str, play: Any) -> None:
    code = 0xC3 | int(register[2]) << 3
    assert play(f".byte 0x0f, 0x20, {code}", 1).first.vector in (6, 13)


def test_instruction_at_the_end_of_the_last_mapped_page(mode: Any, play_text: Any) -> None:
    """Its three bytes end where memory ends; nothing behind them may be needed."""
    text = """
    start:  mov edi, 0xc0100000 - 3
            mov dword ptr [edi - 1], 0xc3200f90
            mov ebx, offset table
            mov eax, __HYPERVISOR_set_trap_table
            int 0x82
            jmp edi
    handler: mov ecx, 0x600D
    stop:   jmp stop
    table:  .byte 14, 0
            .short FLAT_RING1_CS
            .long handler
            .long 0, 0
    """
    seen = play_text(text, mode, budget=40)
    (emulated,) = seen.xen.trace.events(Kind.EMULATE)
    assert emulated.code == b"\x0f\x20\xc3"
    assert (seen.vcpu.state.ebx, seen.vcpu.state.ecx) == (CR0, 0x600D)
    assert seen.delivered[0].words[1] == 0xC010_0000


@pytest.mark.parametrize("before", [1, 2])
def test_instruction_across_two_pages(before: int, mode: Any, play_text: Any) -> None:
    text = f"start: jmp there\n .org 4096 - {before}\n there: mov ebx, cr0\n stop: jmp stop"
    seen = play_text(text, mode, budget=10)
    assert (seen.vcpu.state.ebx, seen.vcpu.state.eip) == (CR0, seen.label("stop"))


@pytest.mark.parametrize("cut", [1, 2])
def test_instruction_that_runs_into_nothing_is_not_emulated(cut: int, play_text: Any) -> None:
    """``0F 20`` at the end of memory without its operand byte is no instruction, whatever lies at address 0."""
    text = f"""
    start:  mov dword ptr [0xc0100000 - 4], {0x90200F90 if cut == 2 else 0x0F909090}
            mov word ptr [0xc0100000 - {cut}], {0x200F if cut == 2 else 0x0F}
            jmp there
    there:  mov eax, 0xc0100000 - {cut}
            jmp eax
    """
    if cut == 1:
        text = text.replace("mov word ptr", "mov byte ptr")
    seen = play_text(text, budget=40)
    assert seen.domain.crashed
    # The emulator looks at the ring before it fetches the operand; hardware would fault on the fetch both times.
    assert f"exception {14 if cut == 1 else 13}" in seen.domain.report
    assert not seen.xen.trace.events(Kind.EMULATE)


@given(st.binary(max_size=15), st.sampled_from([1, 3]))
def test_any_bytes_change_only_what_is_named(code: bytes, ring: int) -> None:
    system = SYSTEM | {"ring": ring}
    changes = PrivilegedInstructions().emulate(code, REGISTERS, system)
    if changes is not None:
        assert 0x1000 < changes["eip"] <= 0x1000 + len(code)
        assert set(changes) <= set(REGISTERS) | (set(SYSTEM) | {"exception", "hypercall_page"}) - {
            "ring",
            "iopl",
            "tsc",
        }
        assert changes.get("cr0", CR0) & ~8 == CR0
        assert changes.get("cr4", 0) & ~0xC == 0
        assert changes.get("dr7", 0x400) & 0xFC00 == 0x400
        assert ring == 1 or set(changes) <= {"eip", "eax", "edx"}


@pytest.mark.parametrize("code", [b"", b"\x0f", b"\x0f\x22", b"\x66\x0f\x20", b"\x66" * 15, b"\xf0\x0f\x20\xc0"])
def test_cut_off_and_locked_instructions_are_not_emulated(code: bytes) -> None:
    assert PrivilegedInstructions().emulate(code, REGISTERS, SYSTEM) is None


def test_all_operand_bytes_of_moves_from_control_registers() -> None:
    for operand in range(256):
        changes = PrivilegedInstructions().emulate(bytes((0x0F, 0x20, operand)), REGISTERS, SYSTEM)
        number = operand >> 3 & 7
        if number in (0, 2, 3, 4):
            value = CR4 if number == 4 else SYSTEM[f"cr{number}"]
            assert changes == {GENERAL[operand & 7]: value, "eip": 0x1003}
        else:
            assert changes is None


def test_io_privilege_is_what_lets_cli_pass() -> None:
    for iopl in range(4):
        for ring in (1, 3):
            done = PrivilegedInstructions().emulate(b"\xfa", REGISTERS, SYSTEM | {"iopl": iopl, "ring": ring})
            assert (done is not None) == (iopl >= ring)


def test_decode_counts_prefixes() -> None:
    assert decode(b"\x66\x2e\x0f\x06") == (4, 0x0F06)
    assert decode(b"\xfa") == (1, 0xFA)


class TestMoveToCr3:
    """A move to CR3 is the hypercall for another base pointer, in another form (Xen's arch/x86/pv/emul-priv-op.c)."""

    def move(self, guest: Guest, value: int) -> bool:
        """Execute ``mov cr3, eax``; whether it was carried out."""
        guest.run_me()
        guest.write(REQUESTS, b"\x0f\x22\xd8")
        guest.vcpu.state.eip, guest.vcpu.state.eax = REQUESTS, value
        guest.xen.trap(PROTECTION, 0, 0)
        return guest.vcpu.state.eip == REQUESTS + 3

    def copy_of_root(self, guest: Guest, pfn: int, more: dict[int, int] | None = None) -> int:
        mode, count = guest.mode, 4 if guest.mode is not TWO_LEVEL else 1008
        entries = {n: mode.read(guest.xen.memory, guest.root << 12, n) for n in range(count)}
        return guest.table(pfn, entries | (more or {}))

    def test_loads_a_root_table(self, mode: PagingMode) -> None:
        (guest,) = guests(mode)
        first, second = guest.root, self.copy_of_root(guest, FREE_PFN)
        frames, flushes = guest.xen.frames, guest.xen.tlb.counts["base pointer"]
        assert self.move(guest, second << 12)
        assert guest.root == second
        assert (frames.uses[second], frames.uses[first]) == (1, 1)  # in use, and pinned
        assert guest.xen.tlb.counts["base pointer"] == flushes + 1
        (event,) = guest.xen.trace.events(Kind.EMULATE)
        assert dict(event.changes)["cr3"] == second << 12
        assert self.move(guest, first << 12)
        assert frames.uses[second] == 0

    def test_of_the_same_value_empties_the_tlb(self, mode: PagingMode) -> None:
        (guest,) = guests(mode)
        flushes = guest.xen.tlb.counts["base pointer"]
        assert self.move(guest, guest.root << 12)
        assert guest.xen.tlb.counts["base pointer"] == flushes + 1

    def test_of_anything_else_is_handed_back(self, mode: PagingMode) -> None:
        guest, other = guests(mode, 2)
        root = guest.root
        values = [guest.frames[FREE_PFN] << 12, other.root << 12, guest.root << 12 | 1, 0xFFFF_F000, 0]
        for value in values:
            guest.domain.shutdown = None
            assert not self.move(guest, value)
            assert guest.root == root
        assert not guest.xen.trace.events(Kind.EMULATE)

    def test_that_is_interrupted_is_executed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (guest,) = guests(TWO_LEVEL)
        tables = {n: guest.table(FREE_PFN + 1 + n, {0: guest.entry(FREE_PFN + 9, LEAF)}) for n in range(3)}
        more = {n: guest.mode.entry(mfn, TABLE) for n, mfn in tables.items()}
        root = self.copy_of_root(guest, FREE_PFN, more)
        monkeypatch.setattr(preemption, "ALLOWANCE", preemption.TABLE_COST + 1)
        assert [self.move(guest, root << 12) for _ in range(4)] == [False, False, False, True]
        assert guest.root == root
        assert not guest.domain.ended
        monkeypatch.undo()
        assert guest.extended(MmuextOp.UNPIN_TABLE, root) < 0
        assert guest.map(FREE_PFN + 9, guest.entry(FREE_PFN + 9, READ_ONLY)) == 0
