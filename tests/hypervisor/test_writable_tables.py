"""Stores to page tables: executed by the CPU, judged, kept or put back (paper 3.3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode
from xenlab.timeline import Timeline
from xenlab.timeline.digest import machine_hash

# EDI: the l1 entry of page 100; EBX: its value; EDX: that of page 101; the page-fault handler stops the guest.
PROLOGUE = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, VMASST_CMD_enable
        mov ecx, VMASST_TYPE_writable_pagetables
        mov eax, __HYPERVISOR_vm_assist
        int 0x82
        mov edi, [esi + 60]             # pt_base
        lea edi, [edi + {l1} + 100 * {size}]
        mov ebx, [edi]
        mov edx, [edi + {size}]
        mov ebp, 0x5AFE
        xor eax, eax
"""
EPILOGUE = """
done:   jmp done
fault:  jmp fault
table:  .byte 14, 0
        .short FLAT_RING1_CS
        .long fault, 0, 0
"""


@dataclass
class Ran:
    """What became of a guest."""

    xen: Hypervisor
    domain: Domain
    writes: list[Any]

    @property
    def faulted(self) -> bool:
        return self.domain.vcpus[0].state.eip == self.domain.symbols["fault"]

    @property
    def finished(self) -> bool:
        return self.domain.vcpus[0].state.eip == self.domain.symbols["done"]

    def entry(self, pfn: int) -> int:
        table, index = self.xen.mmu.leaf_of(self.domain.vcpus[0], 0xC000_0000 + (pfn << 12))
        return self.domain.mode.read(self.xen.memory, table << 12, index)

    def frame(self, pfn: int) -> int:
        return self.domain.frames[pfn]


def source(body: str, mode: PagingMode) -> str:
    layout = {"l1": 0x1000 if mode is TWO_LEVEL else 0x2000, "size": mode.entry_size}
    return (PROLOGUE + body + EPILOGUE).replace("{l1}", str(layout["l1"])).replace("{size}", str(layout["size"]))


def play(body: str, mode: PagingMode, portable: bool = False, budget: int = 60) -> Ran:
    xen = Hypervisor(Machine(4, portable=portable), trace=Trace())
    domain = boot(xen, source(body, mode), mode=mode)
    xen.run(budget)
    check(xen)
    assert xen.trace is not None
    return Ran(xen, domain, xen.trace.events(Kind.TABLE_WRITE))


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    """Each kind of CPU."""
    return bool(request.param)


KEPT = {
    "store": ("mov [edi], edx", 101),
    "exchange": ("mov ecx, edx\n xchg [edi], ecx", 101),
    "compare and exchange": ("mov eax, ebx\n lock cmpxchg [edi], edx", 101),
    "string": ("mov esi, edi\n add esi, {size}\n cld\n movsd", 101),
    "logic": ("lock xor [edi], ebx\n lock xor [edi], edx", 101),
    "push": ("mov ecx, esp\n lea esp, [edi + 4]\n push edx\n mov esp, ecx", 101),
    "pop": ("push edx\n pop [edi]", 101),
    "two stores": ("mov dword ptr [edi], 0\n mov [edi], edx", 101),
}


@pytest.mark.parametrize("name", KEPT)
def test_an_allowed_store_is_kept(name: str, mode: PagingMode, portable: bool) -> None:
    body, page = KEPT[name]
    ran = play(body, mode, portable)
    assert ran.finished, ran.domain.report
    assert all(event.kept for event in ran.writes)
    assert mode.frame_of(ran.entry(100)) == ran.frame(page)
    frames = ran.xen.frames
    assert (frames.uses[ran.frame(101)], frames.uses[ran.frame(100)]) == (2, 0)


REFUSED = {
    "another's frame": "mov ecx, 0x10003\n mov [edi], ecx",
    "no frame": "mov ecx, 0x12345003\n mov [edi], ecx",
    "a superpage": "or ebx, 0x80\n mov [edi], ebx",
    "a global page": "mov ecx, 0x100\n or [edi], ecx",
    "an exchange": "mov ecx, 0x10003\n xchg [edi], ecx\n mov ebp, 1",
    "a string": "mov ecx, 0x10003\n mov [0xC0064000], ecx\n mov esi, 0xC0064000\n cld\n movsd",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_store_is_put_back(name: str, mode: PagingMode, portable: bool) -> None:
    """Registers, memory and the table are as before the instruction, and the guest gets its page fault."""
    ran = play(REFUSED[name], mode, portable)
    assert ran.faulted, ran.domain.report
    assert not ran.writes[-1].kept
    assert mode.frame_of(ran.entry(100)) == ran.frame(100)
    state = ran.domain.vcpus[0].state
    (deliver,) = ran.xen.trace.events(Kind.DELIVER) if ran.xen.trace else ()
    assert (deliver.vector, deliver.words[0]) == (14, 3)
    assert ran.domain.vcpus[0].control["cr2"] == state.edi
    if name == "an exchange":
        assert (state.ecx, state.ebp) == (0x10003, 0x5AFE)
    if name == "a string":
        assert state.esi == 0xC0064000
    assert ran.xen.frames.uses[ran.frame(100)] == 1


def test_a_refused_push_ends_a_guest_whose_stack_is_a_table(mode: PagingMode, portable: bool) -> None:
    """There is nowhere to put the page fault's frame; the table is as it was all the same."""
    ran = play("lea esp, [edi + 4]\n push 0x10003", mode, portable)
    assert ran.domain.crashed
    assert "not on writable memory" in ran.domain.report
    assert ran.domain.vcpus[0].state.esp == ran.domain.vcpus[0].state.edi + 4
    assert mode.frame_of(ran.entry(100)) == ran.frame(100)


def test_a_table_is_not_made_writable_by_a_store(mode: PagingMode, portable: bool) -> None:
    """The entry that maps the l1 table itself: with the write bit, and with the value that an open one has."""
    page = "mov ecx, edi\n sub ecx, 0xC0000000\n shr ecx, 12\n lea ecx, [edi + ecx * {size} - 100 * {size}]\n"
    changes = (
        "or dword ptr [ecx], 2",
        "mov eax, [ecx]\n xor eax, 0x802\n mov [ecx], eax",
        "xor dword ptr [ecx], 0x802",
    )
    for change in changes:
        ran = play(page + change, mode, portable)
        check(ran.xen)
        table = ran.xen.mmu.leaf_of(ran.domain.vcpus[0], 0xC000_0000)[0]
        mapped = ran.entry(ran.domain.frames.index(table))
        assert not mapped & 2


def test_without_the_assist_it_is_a_page_fault(mode: PagingMode) -> None:
    body = "mov ebx, VMASST_CMD_disable\n mov eax, __HYPERVISOR_vm_assist\n int 0x82\n mov [edi], edx"
    ran = play(body, mode)
    assert ran.faulted
    assert ran.writes == []


def test_only_l1_tables_are_opened(mode: PagingMode) -> None:
    ran = play("mov edi, [esi + 60]\n mov dword ptr [edi], 0", mode)
    assert ran.faulted
    assert ran.writes == []


def test_applications_cannot_store(mode: PagingMode) -> None:
    body = """
        push FLAT_RING3_SS
        push 0
        push 2
        push FLAT_RING3_CS
        push offset user_start
        iret
        .align 4096
user_start: mov eax, FLAT_RING3_DS
        mov ds, eax
        mov [edi], edx
        .align 4096
user_end:
"""
    ran = play(body, mode)
    assert ran.writes == []
    assert ran.xen.frames.uses[ran.frame(100)] == 1


def test_halves_of_pae_entries_in_either_order() -> None:
    """Upper half first of an entry that is present: Xen takes it off first, and the lower half brings it back."""
    for body in (
        "mov dword ptr [edi], 0\n mov dword ptr [edi + 4], 0x80000000\n mov [edi], edx",
        "mov dword ptr [edi + 4], 0x80000000\n mov [edi], edx",
        "mov dword ptr [edi + 4], 5\n mov dword ptr [edi], 0\n mov dword ptr [edi + 4], 0x80000000\n mov [edi], edx",
    ):
        ran = play(body, PAE)
        assert ran.finished, ran.domain.report
        assert PAE.frame_of(ran.entry(100)) == ran.frame(101)
        assert ran.entry(100) >> 63 == 1


def test_a_whole_pae_entry_at_once() -> None:
    ran = play("mov eax, ebx\n mov ecx, 0\n xchg ebx, edx\n xor edx, edx\n cmpxchg8b [edi]", PAE)
    assert ran.finished, ran.domain.report
    assert ran.writes[-1].kept


def test_a_store_over_two_tables_is_the_guests_page_fault() -> None:
    """Both pages cannot be open at once; the guest is told, and time goes on."""
    body = "mov edi, [esi + 60]\n lea edi, [edi + 0x2000 - 2]\n mov [edi], ebx"
    xen = Hypervisor(Machine(16), trace=Trace())
    domain = boot(xen, source(body, TWO_LEVEL), memory_mib=5)
    xen.run(200)
    check(xen)
    assert xen.now == 200
    assert domain.vcpus[0].state.eip == domain.symbols["fault"]


def test_time_and_replay(mode: PagingMode) -> None:
    """A store that is carried out takes one instruction, however the run is cut, and replays to the bit."""
    body = "again: mov [edi], edx\n mov [edi], ebx\n jmp again"
    hashes = set()
    for piece in (1, 7, 50):
        xen = Hypervisor(Machine(4), trace=Trace())
        boot(xen, source(body, mode), mode=mode)
        for _ in range(300 // piece):
            xen.run(piece)
        xen.run(300 - xen.now)
        hashes.add(machine_hash(xen))
        assert xen.trace is not None
        assert len(xen.trace.events(Kind.TABLE_WRITE)) == (300 - 12) * 2 // 3
    assert len(hashes) == 1
    xen = Hypervisor(Machine(4), trace=Trace())
    boot(xen, source(body, mode), mode=mode)
    timeline = Timeline(xen, interval=64)
    timeline.run(300)
    end = timeline.machine_hash()
    for back in (299, 250, 131, 40):
        timeline.seek(back)
    timeline.seek(300)
    assert {timeline.machine_hash()} == hashes == {end}
