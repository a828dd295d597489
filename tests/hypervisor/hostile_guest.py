"""What the hostile guests of `test_memory_attacks` share: helpers in assembly, and a run beside a neighbour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.page_types import FrameTypes
from xenlab.hypervisor.trace import Trace
from xenlab.machine.paging import PagingMode

BASE = 0xC000_0000
# What the neighbour keeps in a page of its own, and does all the time.
NEIGHBOUR = """
start:  inc eax
        jmp start
        .align 4096
secret: .rept 1024
        .long 0x5EC2E7
        .endr
"""
# Has exception frames pushed over a function that it calls before and after; ENTER are two bytes that raise VECTOR.
FRAMES_OVER_CODE = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        lea eax, [esp + scratch - 4]
        clc
loop:   call patched
        add [sum], ecx
        rol dword ptr [sum], 1
        lea esp, [patched + 13]
        inc edi
        and edi, 7
        cmp eax, eax
        jmp dword ptr [edi * 4 + sites]
sites:  .rept 8
        .long site + (. - sites) / 2
        .endr
site:   .rept 8
        {enter}
        .endr
handler: mov esp, offset top
        lea eax, [esp + scratch - 4]
        clc
        jmp loop
sum:    .long 0
        .align 256
scratch: .skip 256
        .align 4096
# The frame's words, executed: the immediate is EIP; then sbb eax, esp; add [eax], al; and flags alike.
patched: .byte 0xb9, 0x11, 0x22, 0x33, 0x44, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x00, 0xc3, 0xc3
        .skip 200
top:    .align 4096
table:  .byte {vector}, {flags}
        .short FLAT_RING1_CS
        .long handler
        .long 0, 0
"""
# Subroutines take EAX, EDX and ECX and change only these; a result is in EAX.
PRELUDE = """
start:  mov [boot_info], esi
        mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        jmp attack

mfn_of:                                 # the frame behind the linear address EAX
        sub eax, 0xC0000000
        shr eax, 12
        mov edx, [boot_info]
        mov edx, [edx + 68]
        mov eax, [edx + eax * 4]
        ret
table_at:                               # the linear address of the guest's page table number EAX, the root 0
        shl eax, 12
        mov edx, [boot_info]
        add eax, [edx + 60]
        ret
table_mfn:                              # its frame
        call table_at
        jmp mfn_of
entry_of:                               # the machine address of the l1 entry of EAX, which the first l1 table maps
        push eax
        mov eax, LEAF_TABLE
        call table_mfn
        pop edx
        shl eax, 12
        shr edx, 12
        and edx, ENTRIES - 1
        lea eax, [eax + edx * ENTRY_SIZE]
        ret
update:                                 # mmu_update: the entry at EAX becomes EDX (low) and ECX (high)
        mov [request], eax
        mov dword ptr [request + 4], 0
        mov [request + 8], edx
        mov [request + 12], ecx
        push ebx
        push esi
        mov ebx, offset request
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
        pop esi
        pop ebx
        ret
map:                                    # update_va_mapping: the page at EAX becomes frame EDX with flags ECX, no flush
        push ebx
        push esi
        mov ebx, eax
        shl edx, 12
        or ecx, edx
        xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        pop esi
        pop ebx
        ret
extended:                               # mmuext_op: command EAX with EDX and ECX
        mov [request], eax
        mov [request + 4], edx
        mov [request + 8], ecx
        push ebx
        push esi
        mov ebx, offset request
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
        pop esi
        pop ebx
        ret
memory:                                 # memory_op: command EAX on the one extent EDX
        mov [extent], edx
        mov dword ptr [reservation], offset extent
        mov dword ptr [reservation + 4], 1
        mov dword ptr [reservation + 8], 0
        mov dword ptr [reservation + 16], DOMID_SELF
        push ebx
        mov ebx, eax
        mov ecx, offset reservation
        mov eax, __HYPERVISOR_memory_op
        int 0x82
        pop ebx
        ret
note:                                   # EAX is one result more
        mov edx, [cursor]
        mov [edx], eax
        add dword ptr [cursor], 4
        ret
finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82

on_page_fault:                          # results: 14, error code; then go on at [resume]
        mov eax, 14
        jmp faulted
on_protection:                          # results: 13, error code
        mov eax, 13
        jmp faulted
on_not_present:
        mov eax, 11
        jmp faulted
on_invalid:
        mov eax, 6
        push 0
faulted: mov ebx, FLAT_RING1_DS
        mov ds, ebx
        mov es, ebx
        mov ss, ebx
        mov ebx, [esp]
        mov esp, offset stack
        call note
        mov eax, ebx
        call note
        jmp dword ptr [resume]
        .align 4
table:  .byte 14, 0
        .short FLAT_RING1_CS
        .long on_page_fault
        .byte 13, 0
        .short FLAT_RING1_CS
        .long on_protection
        .byte 11, 0
        .short FLAT_RING1_CS
        .long on_not_present
        .byte 6, 0
        .short FLAT_RING1_CS
        .long on_invalid
        .long 0, 0
boot_info: .long 0
resume: .long finish
reason: .long 0
cursor: .long results
extent: .long 0
reservation: .skip 20
        .align 8
request: .skip 64
results: .skip 256
        .skip 1024
stack:
"""
PAGES = """
        .align 4096
one:    .skip 4096
two:    .skip 4096
three:  .skip 4096
four:   .skip 4096
five:   .skip 4096
        .skip 0x8000
"""


def their_frames(xen: Hypervisor, neighbour: Domain) -> dict[str, int]:
    """Frames that the attacker has no business with, by name."""
    return {
        "THEIR_PAGE": neighbour.frames[neighbour.symbols["secret"] - BASE >> 12],
        "THEIR_TABLE": neighbour.vcpus[0].state.cr3 >> 12,
        "THEIR_SHARED_PAGE": neighbour.shared_info_mfn,
        "THEIR_DESCRIPTORS": neighbour.own_tables[0],
        "FLAT_DESCRIPTORS": xen.shared_pages.descriptors(neighbour.mode),
        "NUMBER_LIST": xen.frames.m2p_frames[0],
        "NO_FRAME": xen.frames.count,
    }


def source(attack: str, mode: PagingMode, frames: Mapping[str, int] | None = None) -> str:
    """The text of a guest that runs ``attack`` behind the helpers, with ``frames`` by name."""
    numbers = {
        "ENTRY_SIZE": mode.entry_size,
        "ENTRIES": 4096 // mode.entry_size,
        "LEAF_TABLE": len(mode.levels) - 1,
        "TOP_TABLE": len(mode.levels) - 2,
        "TOP_INDEX": mode.levels[-2].index(BASE),
    }
    text = PRELUDE + "attack:\n" + attack + "\n jmp finish\n" + PAGES
    for name, number in {**numbers, **(frames or {})}.items():
        text = text.replace(name, str(number))
    return text


@dataclass
class Outcome:
    """What is left after an attack."""

    xen: Hypervisor
    attacker: Domain
    neighbour: Domain

    def results(self, count: int) -> tuple[int, ...]:
        """The first results that the attacker noted, as signed numbers."""
        address = self.attacker.symbols["results"]
        return tuple(self.word(address + 4 * number) for number in range(count))

    @property
    def noted(self) -> int:
        """How many results there are."""
        return (self.word(self.attacker.symbols["cursor"]) - self.word_address("results")) // 4

    def word_address(self, name: str) -> int:
        address = self.attacker.symbols[name]
        return address - (address >> 31 << 32)

    def word(self, where: int | str) -> int:
        address = self.attacker.symbols[where] if isinstance(where, str) else where
        value = self.xen.guest_memory.read_word(self.attacker.vcpus[0], address)
        return value - (value >> 31 << 32)

    def frame_of(self, name: str) -> int:
        return self.attacker.frames[self.attacker.symbols[name] - BASE >> 12]


def bytes_of(xen: Hypervisor, domain: Domain) -> list[bytes]:
    """All that a domain has in its memory, but for its page tables, in which the MMU sets marks."""
    plain = [mfn for mfn in domain.frames if xen.frames.type[mfn] in (0, 6)]
    return [bytes(xen.memory.frame(mfn)) for mfn in plain]


def machine(portable: bool = False, most_uses: int | None = None, **options: Any) -> Hypervisor:
    """A machine with room for a few domains, on either CPU."""
    xen = Hypervisor(Machine(memory_mib=16, portable=portable), trace=Trace(), **options)
    if most_uses is not None:
        # The part is made with the frame table, which is made with the machine: so it is made anew, on the same table.
        xen.page_types.__init__(xen.frames, most_uses)  # type: ignore[misc]
        assert isinstance(xen.page_types, FrameTypes)
    return xen


def suffer(
    attack: str, mode: PagingMode, portable: bool = False, *, budget: int = 20_000, xen: Hypervisor | None = None
) -> Outcome:
    """Run an attack beside a neighbour, which has to get on and to keep its bytes, and end both."""
    xen = xen or machine(portable)
    neighbour = boot(xen, NEIGHBOUR, name="neighbour", mode=mode)
    xen.pause(neighbour)
    attacker = boot(xen, source(attack, mode, their_frames(xen, neighbour)), name="attacker", mode=mode)
    xen.unpause(neighbour)  # behind the attacker, which has the first turn
    before = bytes_of(xen, neighbour)
    xen.run(budget)
    if not attacker.ended:
        xen.pause(attacker)
    counted = neighbour.vcpus[0].state.eax
    xen.run(2_000)
    state = neighbour.vcpus[0].state
    assert state.eax > counted, "the neighbour does not get on"
    assert (state.cpl, neighbour.ended) == (1, False)
    assert bytes_of(xen, neighbour) == before, "the neighbour's bytes have changed"
    assert attacker.vcpus[0].state.cpl in (1, 2, 3)
    return Outcome(xen, attacker, neighbour)


__all__ = ["BASE", "NEIGHBOUR", "Outcome", "bytes_of", "machine", "source", "suffer", "their_frames"]
