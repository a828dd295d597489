"""Scenes of lesson 04: three kinds of address and the two lists between them (paper 2.1.1, 3.3.3, 3.3.4).

`observe` runs a piece of a kernel and says what was in its registers at the end, or which fault ended it.
`where` says for an address of a guest what it is called in each of the three worlds.  `confusion` lets a guest name
all its pages by the wrong number, one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from xenlab import guests
from xenlab.abi.numbers import Errno
from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, XEN
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import PRESENT, TWO_LEVEL, PageFault, PagingMode, walk
from xenlab.timeline import Timeline
from xenlab.toolstack import boot, build, image_from_source
from xenlab.toolstack.image import SOURCE_BASE
from xenlab.views.picture import table
from xenlab.views.story import short_vector, symbol

PAGES = 256
NEIGHBOURS_PFN = 200
_MACHINE_MIB, _ENOUGH = 8, 100_000
_REGISTERS = ("eax", "ebx", "ecx", "edx")

_KERNEL = """
        .set BASE, {base}                    # pseudo-physical frame 0 stands here
        .set M2P, {m2p}
        .set PAGES, {pages}
        .set NEIGHBOUR, {neighbour}          # a machine frame of another domain
start:  mov ebp, [esi + 68]                  # EBP: the physical-to-machine list
        mov edi, [esi + 60]                  # EDI: the root page table
        mov ebx, offset trap_table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        xor eax, eax
        xor ebx, ebx
        xor ecx, ecx
        xor edx, edx
here:
{code}
over:   mov [seen], eax
        mov [seen + 4], ebx
        mov [seen + 8], ecx
        mov [seen + 12], edx
handler:
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
        .align 8
trap_table:
        .byte 13, 0
        .word FLAT_RING1_CS
        .long handler
        .byte 14, 0
        .word FLAT_RING1_CS
        .long handler
        .long 0, 0
seen:   .fill 4, 4, 0
scratch:
        .fill 16, 4, 0                       # for arguments of hypercalls
        .align 4096
page:   .fill 4096, 1, 0x5a                  # a page of its own
"""


def frames_timeline() -> Timeline:
    """The guest ``frames`` at its first instruction, beside a neighbour that is paused, with a way forward and back."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    boot(xen, guests.source("frames"), name="frames")
    build(xen, image_from_source(guests.source("counter"), "counter"), memory_mib=1)
    return Timeline(xen)


def run_until_printed(timeline: Timeline, text: str) -> Domain:
    """Go forward until domain 0 has printed ``text``; the domain.

    Raises:
        XenlabError: it ended without.
    """
    domain = timeline.hypervisor.domains[0]
    while not domain.console.startswith(text):
        if domain.ended:
            raise XenlabError(f"domain 0 ended after {domain.console!r}, before it printed {text!r}\n{domain.report}")
        timeline.step()
    return domain


@dataclass(frozen=True, slots=True)
class Observation:
    """What a piece of a kernel did.

    Attributes:
        eax, ebx, ecx, edx: at its end; 0 if a fault ended it.
        fault: the fault, empty without one.
        entries: how often it entered the hypervisor.
        xen: the machine afterwards.
        domain: the guest.
    """

    eax: int
    ebx: int
    ecx: int
    edx: int
    fault: str
    entries: int
    xen: Hypervisor
    domain: Domain

    @property
    def answer(self) -> int:
        """EAX as a hypercall's answer: below zero for an error."""
        return self.eax - (self.eax >> 31 << 32)

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        return ", ".join(f"{name.upper()} = {getattr(self, name):#x}" for name in _REGISTERS)


def observe(code: str, *, mode: PagingMode = TWO_LEVEL, neighbours: int = 0) -> Observation:
    """Run a piece of a kernel in ring 1, with the names and registers that the lesson explains.

    Args:
        code: assembly.  At its start EBP is the address of the physical-to-machine list, EDI of the root page table,
            and EAX to EDX are 0; ``M2P``, ``BASE``, ``PAGES``, ``NEIGHBOUR``, ``scratch`` and ``page`` have a meaning.
        mode: the format of its page tables.
        neighbours: how many other domains were built before.

    Raises:
        AssemblyError: the code has a mistake.
        XenlabError: the code did not come to its end.
    """
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    others = [
        build(xen, image_from_source("start: jmp start", f"neighbour {number}", mode), memory_mib=1)
        for number in range(neighbours)
    ]
    neighbour = others[0].frames[NEIGHBOURS_PFN] if others else 0
    source = _KERNEL.format(base=SOURCE_BASE, m2p=start_of(mode), pages=PAGES, neighbour=neighbour, code=code)
    domain = boot(xen, source, name="observed", mode=mode)
    xen.run(_ENOUGH)
    if not domain.ended or domain.crashed:
        raise XenlabError(f"the code did not come to its end in {_ENOUGH:,} instructions\n{domain.report}".rstrip())
    return _observation(xen, domain)


def _observation(xen: Hypervisor, domain: Domain) -> Observation:
    assert xen.trace is not None
    mine = [event for event in xen.trace.events() if event.domain == domain.domid]
    # The first call registers the handlers, the last one ends the guest.
    entered = [event for event in mine if event.kind in (Kind.HYPERCALL, Kind.TRAP)][1:-1]
    faults = [event for event in entered if event.kind is Kind.TRAP]
    fault = _fault(domain, faults[-1]) if faults else ""
    words = (0, 0, 0, 0) if fault else xen.guest_memory.read_words(domain.vcpus[0], domain.symbols["seen"], 4)
    return Observation(words[0], words[1], words[2], words[3], fault, len(entered), xen, domain)


def _fault(domain: Domain, trap: Event) -> str:
    at = f" at {trap.address:#x}" if trap.vector == 14 else ""
    return f"{short_vector(trap.vector)}({trap.error}){at}, by the instruction at {symbol(domain, trap.eip)}"


def where(xen: Hypervisor, domain: Domain, addresses: Iterable[str | int]) -> str:
    """What linear addresses, or labels of the guest, are called in the other two worlds, and what stands there."""
    rows = []
    for item in addresses:
        address = domain.symbols[item] if isinstance(item, str) else item
        found = walk(xen.memory, domain.mode, domain.vcpus[0].state.cr3, address, update=False)
        name = item if isinstance(item, str) else symbol(domain, address)
        if isinstance(found, PageFault):
            rows.append((name, f"{address:#010x}", "-", "-", "-", "not mapped"))
            continue
        mfn, inside = found.machine >> PAGE_SHIFT, xen.memory.bytes[found.machine]
        pfn = xen.frames.m2p[mfn]
        rows.append((name, f"{address:#010x}", f"{pfn:#x}", f"{mfn:#x}", f"{found.machine:#x}", f"{inside:#x}"))
    return table(("", "linear", "pfn", "mfn", "machine address", "byte there"), rows)


def walk_steps(xen: Hypervisor, domain: Domain, address: int) -> str:
    """A walk with every number in it: the part of the address, the entry's place, the entry."""
    mode = domain.mode
    at, rows = mode.root_address(domain.vcpus[0].state.cr3), []
    for level in mode.levels:
        index = level.index(address)
        place = at + index * mode.entry_size
        entry = mode.read(xen.memory, at, index)
        high = level.shift + level.entries.bit_length() - 2
        rows.append((level.name, f"{high}–{level.shift}", str(index), f"{place:#x}", f"{entry:#x}"))
        if not entry & PRESENT:
            break
        at = mode.frame_of(entry) << PAGE_SHIFT
    else:
        offset = address % PAGE_SIZE
        byte = xen.memory.bytes[at + offset]
        rows.append(("page", f"{PAGE_SHIFT - 1}–0", str(offset), f"{at + offset:#x}", f"{byte:#x}"))
    return table(("level", "bits", "their value", "so at machine address", "stands there"), rows)


_CONFUSED = """
next:   mov ecx, ebx                         # EBX: pfn, taken for a machine frame
        shl ecx, 12
        or ecx, 1
        push ebx
        mov ebx, BASE + 0x200000             # where it is to be mapped
        xor edx, edx
        mov esi, UVMF_INVLPG | UVMF_ALL
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        pop ebx
        neg eax
        mov [page + 4 * ebx], eax            # what Xen answered
        inc ebx
        cmp ebx, PAGES
        jb next
"""


@dataclass(frozen=True, slots=True)
class Confused:
    """A guest mapped its page ``pfn`` by that number instead of the machine frame's.

    Attributes:
        pfn: the page that it meant, and the machine frame that it named.
        owner: whose that frame is.
        errno: of the refusal; 0 if it was mapped.
        got: the page of its own that it got instead, None if it got none.
    """

    pfn: int
    owner: int
    errno: int
    got: int | None


def confusion(neighbours: int = 1) -> list[Confused]:
    """Let a guest name each of its 256 pages by the wrong number."""
    seen = observe(_CONFUSED, neighbours=neighbours)
    xen, domain = seen.xen, seen.domain
    found = []
    for pfn in range(PAGES):
        errno = xen.guest_memory.read_word(domain.vcpus[0], domain.symbols["page"] + 4 * pfn)
        owner = xen.frames.owner_of(pfn)
        found.append(Confused(pfn, owner, errno, None if errno else xen.frames.m2p[pfn]))
    return found


def tally(found: Iterable[Confused], guest: int = 1) -> str:
    """How often each owner's frame was hit, and what Xen said."""
    names = {XEN: "the hypervisor", FREE: "nobody", guest: "the guest itself"}
    count = Counter((names.get(item.owner, f"domain {item.owner}"), _answer(item)) for item in found)
    rows = [(owner, answer, str(times)) for (owner, answer), times in sorted(count.items(), key=lambda row: -row[1])]
    return table(("the frame with that number belongs to", "Xen", "times"), rows)


def _answer(item: Confused) -> str:
    return f"-{Errno(item.errno).name}" if item.errno else "maps it"


__all__ = [
    "Confused",
    "Observation",
    "confusion",
    "frames_timeline",
    "observe",
    "run_until_printed",
    "tally",
    "walk_steps",
    "where",
]
