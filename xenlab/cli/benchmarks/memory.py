"""Benchmarks of validated page tables (paper 3.3.3): updates alone and in batches, pinning, direct stores.

The guests change entries between writable and read-only and back, so that each update is a change of use that
has to be counted, not only a change of flags.
"""

from __future__ import annotations

import gc
import tracemalloc

from xenlab.cli.benchmarks import Sample
from xenlab.cli.benchmarks.floor import clock_ns
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.page_entries import Use
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import ACCESSED, DIRTY, PRESENT, RW, TWO_LEVEL
from xenlab.toolstack import boot
from xenlab.toolstack.image import SOURCE_BASE

_MEMORY_MIB = 4
# Pages that neither hold anything nor map anything, so that their entries may change.
_FIRST_PAGE, _PAGES = 400, 512
_WORK = 2048

# Two batches of updates, to read-only and back to writable.
_UPDATES = """
start: mov ebp, [esi + {pt_base}]
    lea edx, [ebp - {base:#x} + 4096]
    shr edx, 12
    mov eax, [esi + {mfn_list}]
    mov eax, [eax + 4 * edx]            # the frame of the l1 table
    shl eax, 12
    lea eax, [eax + 4 * {first}]
    lea esi, [ebp + 4096 + 4 * {first}]
    mov edi, offset batch
    mov ecx, {count}
fill: mov ebx, [esi]
    mov [edi], eax
    mov [edi + {size}], eax
    mov [edi + {size} + 8], ebx
    and ebx, ~2
    mov [edi + 8], ebx
    add edi, 16
    add eax, 4
    add esi, 4
    dec ecx
    jnz fill
    mov edi, DOMID_SELF
    mov ebp, {count}
again: mov ebx, offset batch
    call update
    mov ebx, offset batch + {size}
    call update
    jmp again
{update}
    .align 4096
batch: .skip 2 * {size}
"""
_BATCHED = """
update: mov ecx, ebp
    mov esi, edi
    xor edx, edx
    mov eax, __HYPERVISOR_mmu_update
    int 0x82
    ret
"""
_BY_ADDRESS = """
start: mov ebp, {address:#x}
    mov edi, [esi + {pt_base}]
    mov edi, [edi + 4096 + 4 * {first}]
again: and edi, ~2
    call update
    or edi, 2
    call update
    jmp again
update: mov ebx, ebp
    mov ecx, edi
    xor edx, edx
    xor esi, esi
    mov eax, __HYPERVISOR_update_va_mapping
    int 0x82
    ret
"""
_DIRECT = """
start: mov ebx, VMASST_CMD_enable
    mov ecx, VMASST_TYPE_writable_pagetables
    mov eax, __HYPERVISOR_vm_assist
    int 0x82
    mov edi, [esi + {pt_base}]
    lea edi, [edi + 4096 + 4 * {first}]
    mov eax, [edi]
    mov edx, eax
    and edx, ~2
again: mov [edi], edx
    mov [edi], eax
    jmp again
"""
_OFFSETS = {"pt_base": 32 + 7 * 4, "mfn_list": 32 + 9 * 4, "base": SOURCE_BASE, "first": _FIRST_PAGE}
_SETTLE = 16_000


def _machine(source: str, memory_mib: int = _MEMORY_MIB) -> tuple[Hypervisor, Domain]:
    xen = Hypervisor(Machine(memory_mib + 4))
    domain = boot(xen, source, name="updates", memory_mib=memory_mib)
    xen.run(_SETTLE)
    return xen, domain


# Of one batch: the call, its arguments, the loop round it.
BATCH_INSTRUCTIONS = 8


def updating(count: int) -> tuple[Hypervisor, Domain]:
    """A guest that updates ``count`` entries with each hypercall, over and over."""
    return _machine(_UPDATES.format(count=count, size=16 * count, update=_BATCHED, **_OFFSETS))


def _updates_of(count: int) -> Sample:
    """Nanoseconds an entry when each hypercall updates ``count``."""
    xen, domain = updating(count)
    rounds, instructions = max(_WORK // count, 1), BATCH_INSTRUCTIONS

    def sample() -> float:
        begin = clock_ns()
        xen.run(rounds * instructions)
        return (clock_ns() - begin) / (rounds * count)

    assert not domain.ended, domain.report
    return sample


def mmu_update_1() -> Sample:
    """A page-table entry changed by an `mmu_update` of its own."""
    return _updates_of(1)


def mmu_update_8() -> Sample:
    """The same by an `mmu_update` of 8 entries; per entry."""
    return _updates_of(8)


def mmu_update_64() -> Sample:
    """The same by an `mmu_update` of 64 entries; per entry."""
    return _updates_of(64)


def mmu_update_512() -> Sample:
    """The same by an `mmu_update` of 512 entries; per entry."""
    return _updates_of(512)


def mmu_update_gain() -> Sample:
    """An entry by a hypercall of its own, as a multiple of one in a batch of 512."""
    single, batch = _updates_of(1), _updates_of(512)
    return lambda: single() / batch()


def update_va_mapping() -> Sample:
    """An entry changed by `update_va_mapping`, without a flush."""
    address = SOURCE_BASE + (_FIRST_PAGE << PAGE_SHIFT)
    xen, domain = _machine(_BY_ADDRESS.format(address=address, **_OFFSETS))
    return _stepped(xen, domain, 9)


def table_write() -> Sample:
    """An entry changed by a plain store: opened, executed by the CPU, compared, judged, closed."""
    xen, domain = _machine(_DIRECT.format(**_OFFSETS))
    return _stepped(xen, domain, 1.5)


def _stepped(xen: Hypervisor, domain: Domain, instructions: float) -> Sample:
    """Nanoseconds an update of a loop with so many instructions for each."""
    assert not domain.ended, domain.report

    def sample() -> float:
        begin = clock_ns()
        xen.run(int(_WORK * instructions))
        return (clock_ns() - begin) / _WORK

    return sample


def pin_table() -> Sample:
    """A full l1 table of 1,024 entries, 992 of them writable mappings, checked when it is first used as one."""
    xen, domain = _machine("start: jmp start", 8)
    frames, mode = domain.frames, TWO_LEVEL
    table = frames[_FIRST_PAGE]
    leaf, index = xen.mmu.leaf_of(domain.vcpus[0], SOURCE_BASE + (_FIRST_PAGE << PAGE_SHIFT))
    xen.page_tables.update(domain, leaf, index, 0)
    entries = xen.page_tables.entries(mode, table)
    writable = frames[1024 : 1024 + 992]  # behind what the builder has mapped
    for place, mfn in enumerate([*writable, *frames[:32]]):
        entries[place] = mode.entry(mfn, PRESENT | ACCESSED | DIRTY | (RW if place < len(writable) else 0))

    def sample() -> float:
        begin = clock_ns()
        xen.page_tables.take(domain, table, Use.L1)
        spent = clock_ns() - begin
        xen.page_tables.drop(domain, table, Use.L1)
        return spent

    return sample


# Fills 16 l1 tables of 1,024 entries each, all mapping one page, by batches that the guest writes anew.
_BUILD = """
start: mov ebp, [esi + {mfn_list}]
    mov ebx, [ebp + 4 * {target}]
    shl ebx, 12
    or ebx, 0x21                        # what every entry maps: one page, read-only
    mov [entry], ebx
again: mov dword ptr [table], 0
next: mov eax, [table]
    mov eax, [ebp + 4 * eax + 4 * {tables}]
    shl eax, 12
    mov dword ptr [half], 2
two: mov edi, offset batch
    mov ecx, 512
    mov ebx, [entry]
fill: mov [edi], eax
    mov [edi + 8], ebx
    add edi, 16
    add eax, 4
    dec ecx
    jnz fill
    push eax
    mov ebx, offset batch
    mov ecx, 512
    xor edx, edx
    mov esi, DOMID_SELF
    mov eax, __HYPERVISOR_mmu_update
    int 0x82
    pop eax
    dec dword ptr [half]
    jnz two
    inc dword ptr [table]
    cmp dword ptr [table], 16
    jb next
    xor dword ptr [entry], 0x40
    jmp again
entry: .long 0
table: .long 0
half: .long 0
    .align 4096
batch: .skip 8192
"""
_SPACE_TABLES, _SPACE_ENTRIES = 16, 16 * 1024


def build_space() -> Sample:
    """Entries a second at which a guest fills the l1 tables of 64 MB by batches of 512, writing the batches anew.

    A sample is one pass over 16 tables: the guest's own loop, which writes the requests, is in the figure.
    """
    tables, target = 700, 690
    xen, domain = _machine(_BUILD.format(tables=tables, target=target, **_OFFSETS))
    xen.allowance.unlimited()
    for pfn in range(tables, tables + _SPACE_TABLES):
        leaf, index = xen.mmu.leaf_of(domain.vcpus[0], SOURCE_BASE + (pfn << PAGE_SHIFT))
        xen.page_tables.update(domain, leaf, index, 0)
        xen.page_tables.take(domain, domain.frames[pfn], Use.L1)
    instructions = _SPACE_TABLES * (2 * (3 + 512 * 6 + 10) + 8)

    def sample() -> float:
        begin = clock_ns()
        xen.run(instructions)
        return _SPACE_ENTRIES / (clock_ns() - begin) * 1e9

    return sample


def domain_bytes() -> Sample:
    """What the hypervisor keeps for one more idle domain of 1 MiB: objects, registers, frames of its own.

    Not in it: the domain's memory, and the frame table, which has a row for each frame of the machine anyway.
    """
    xen = Hypervisor(Machine(16))
    source = "start: jmp start"
    boot(xen, source)

    def sample() -> float:
        gc.collect()
        tracemalloc.start()
        xen.destroy(boot(xen, source))  # what is exchanged for each domain is not counted as new
        gc.collect()
        before, _peak = tracemalloc.get_traced_memory()
        frames = xen.frames.free_frames
        domain = boot(xen, source)
        gc.collect()
        after, _peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        own = frames - xen.frames.free_frames - domain.pages
        xen.destroy(domain)
        return after - before + (own << PAGE_SHIFT)

    return sample
