"""Building a domain: memory, page tables and the first registers of a guest (paper 3.4).

In Xen this is work of the control domain's tools, not of the hypervisor.  What a new guest
finds is laid down in xen.h ("The domain must be started with ..."): from the base of its
address space upwards, page after page,

    image | physical-to-machine list | start_info | console | store | page tables | stack | free

with ESI pointing at ``start_info``, ESP at the top of the stack, paging on, ring 1.  The
page tables are mapped read-only for the guest, as every page table always is.

The invariant: the frames that the new page tables name all belong to the domain, but for the
shared-information page and the hypervisor's own range, which the guest cannot change.  What
breaks without it: a guest is born with a window into another.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING1_DS, FLAT_RING1_SS, StartFlags
from xenlab.abi.structures import COMMAND_LINE_BYTES, START_INFO_MAGIC, StartInfo
from xenlab.errors import ImageError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import VCPUS_PER_DOMAIN, Domain, Vcpu
from xenlab.hypervisor.hypercalls import hypercall_page
from xenlab.hypervisor.layout import GDT_BASE, flat_descriptors, start_of
from xenlab.hypervisor.lifecycle import add_vcpu, frames_beside, new_domain
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import ACCESSED, DIRTY, PRESENT, RW, USER, Level, PagingMode
from xenlab.machine.state import IF
from xenlab.toolstack.image import Image

_TABLE = PRESENT | RW | USER | ACCESSED
_STACK_PAGES = 1


@dataclass(frozen=True, slots=True)
class _Plan:
    """Pseudo-physical frame numbers of what follows the image, and how many frames there are."""

    p2m: int
    start_info: int
    console: int
    store: int
    tables: int
    stack: int
    total: int


def build(
    hypervisor: Hypervisor,
    image: Image,
    *,
    memory_mib: int = 4,
    command_line: str = "",
    privileged: bool = False,
) -> Domain:
    """Make a domain from ``image``; it is left paused.

    Args:
        hypervisor: where.
        image: what to load.
        memory_mib: the domain's memory, all of it mapped from the image's base upwards.
        command_line: passed in ``start_info``, at most 1,023 bytes.
        privileged: mark it as the initial domain.

    Raises:
        ImageError: the image does not fit into that memory or below the hypervisor.
        MachineError: not enough free frames; nothing is changed then.
    """
    plan = _plan(image, memory_mib, command_line)
    tables = plan.stack - plan.tables
    needed = plan.total + frames_beside(hypervisor, image.mode)
    if needed > hypervisor.frames.free_frames:
        raise ImageError(
            f"image {image.name!r}: a domain of {memory_mib} MiB needs {needed} free frames, "
            f"{hypervisor.frames.free_frames} are left"
        )
    domain = new_domain(hypervisor, image.name, image.mode, plan.total, privileged=privileged)
    domain.symbols.update(image.symbols)
    builder = _Builder(hypervisor, image, plan, domain)
    builder.load_image()
    builder.write_p2m()
    builder.write_start_info(command_line, tables)
    cr3 = builder.write_page_tables()
    add_vcpu(hypervisor, builder.first_vcpu(cr3))
    return domain


def _plan(image: Image, memory_mib: int, command_line: str) -> _Plan:
    if memory_mib < 1:
        raise ImageError(f"image {image.name!r}: memory of {memory_mib} MiB; at least 1 is needed")
    if len(command_line.encode()) >= COMMAND_LINE_BYTES:
        raise ImageError(f"command line of {len(command_line.encode())} bytes; at most {COMMAND_LINE_BYTES - 1} fit")
    total = memory_mib << 20 >> PAGE_SHIFT
    pages = image.end - image.base + PAGE_SIZE - 1 >> PAGE_SHIFT
    p2m_pages = total * 4 + PAGE_SIZE - 1 >> PAGE_SHIFT
    tables = _table_count(image.mode, image.base, total)
    counts = (pages, p2m_pages, 1, 1, 1, tables, _STACK_PAGES)
    p2m, start_info, console, store, tables_at, stack, used = accumulate(counts)
    if used > total:
        raise ImageError(
            f"image {image.name!r}: needs {used * 4} KiB with its page tables, the domain has {total * 4} KiB"
        )
    if image.base + (total << PAGE_SHIFT) > start_of(image.mode):
        raise ImageError(
            f"image {image.name!r}: {memory_mib} MiB from {image.base:#x} up reach into the hypervisor's range "
            f"at {start_of(image.mode):#x}"
        )
    return _Plan(p2m, start_info, console, store, tables_at, stack, total)


def _table_count(mode: PagingMode, base: int, total: int) -> int:
    """How many page-table pages map ``total`` pages from ``base`` on, the root included."""
    last = base + (total << PAGE_SHIFT) - 1
    # The hypervisor's range needs its own middle-level table in PAE mode.
    top_tables = 0 if len(mode.levels) == 2 else 1
    count = 1 + top_tables
    for level in mode.levels[:-1]:
        count += (last >> level.shift) - (base >> level.shift) + 1
        if level.name == "l3" and last >> level.shift == GDT_BASE >> level.shift:
            count -= top_tables
    return count


class _Builder:
    """Fills the frames of one domain."""

    def __init__(self, hypervisor: Hypervisor, image: Image, plan: _Plan, domain: Domain) -> None:
        self._xen, self._image, self._plan, self._domain = hypervisor, image, plan, domain
        self._memory: Memory = hypervisor.memory
        self._free_tables = list(range(plan.tables, plan.stack))

    def load_image(self) -> None:
        """Copy the sections and the hypercall page, and forget code the frames once held."""
        for section in self._image.sections:
            self._store(section.address, section.data)
        if self._image.hypercall_page is not None:
            self._store(self._image.hypercall_page, hypercall_page())
        for mfn in self._domain.frames:
            self._xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)

    def write_p2m(self) -> None:
        """The guest's map from pseudo-physical to machine frames."""
        data = b"".join(mfn.to_bytes(4, "little") for mfn in self._domain.frames)
        self._store(self._address(self._plan.p2m), data)

    def write_start_info(self, command_line: str, tables: int) -> None:
        """What the guest finds behind ESI."""
        plan, domain = self._plan, self._domain
        flags = StartFlags.PRIVILEGED | StartFlags.INITDOMAIN if domain.privileged else StartFlags(0)
        info = StartInfo(
            magic=START_INFO_MAGIC,
            nr_pages=plan.total,
            shared_info=domain.shared_info_mfn << PAGE_SHIFT,
            flags=int(flags),
            store_mfn=domain.frames[plan.store],
            console_mfn=domain.frames[plan.console],
            pt_base=self._address(plan.tables),
            nr_pt_frames=tables,
            mfn_list=self._address(plan.p2m),
            cmd_line=command_line.encode(),
        )
        self._store(self._address(plan.start_info), bytes(info))

    def write_page_tables(self) -> int:
        """Map all of the domain's memory; returns CR3."""
        root = self._new_table()
        tables = range(self._plan.tables, self._plan.stack)
        for pfn in range(self._plan.total):
            address = self._address(pfn)
            flags = PRESENT | ACCESSED | DIRTY | (0 if pfn in tables else RW)
            if address in self._image.user:
                flags |= USER
            self._map(root, address, self._domain.frames[pfn], flags)
        if self._image.shared_info is not None:
            flags = PRESENT | ACCESSED | DIRTY | RW
            self._map(root, self._image.shared_info, self._domain.shared_info_mfn, flags)
        if len(self._image.mode.levels) > 2:  # the hypervisor's range needs a table to stand in, from the start
            self._descend(root, GDT_BASE, stop_above_l1=True)
        return root << PAGE_SHIFT

    def first_vcpu(self, cr3: int) -> Vcpu:
        """The boot vCPU in the state that xen.h lays down."""
        mode = self._image.mode
        state = self._xen.cpu.new_state(mode, cr3)
        descriptors = flat_descriptors(mode)
        state.load_segment("ss", FLAT_RING1_SS, descriptors[FLAT_RING1_SS])
        state.load_segment("cs", FLAT_RING1_CS, descriptors[FLAT_RING1_CS])
        for name in ("ds", "es", "fs", "gs"):
            state.load_segment(name, FLAT_RING1_DS, descriptors[FLAT_RING1_DS])
        state.eip = self._image.entry
        state.esp = self._address(self._plan.stack + _STACK_PAGES)
        state.esi = self._address(self._plan.start_info)
        state.eflags = IF
        vcpu = Vcpu(self._domain.domid * VCPUS_PER_DOMAIN, self._domain, state)
        vcpu.kernel_ss, vcpu.kernel_esp = FLAT_RING1_SS, state.esp
        return vcpu

    def _map(self, root: int, address: int, mfn: int, flags: int) -> None:
        mode = self._image.mode
        table, _level = self._descend(root, address)
        mode.write(self._memory, table << PAGE_SHIFT, mode.levels[-1].index(address), mode.entry(mfn, flags))

    def _descend(self, root: int, address: int, *, stop_above_l1: bool = False) -> tuple[int, Level]:
        mode, table = self._image.mode, root
        for level in mode.levels[:-1]:
            if stop_above_l1 and level.name == "l2":
                return table, level
            entry = mode.read(self._memory, table << PAGE_SHIFT, level.index(address))
            if not entry & PRESENT:
                # PAE's root entries have none of the usual flags.
                entry = mode.entry(self._new_table(), PRESENT if level.name == "l3" else _TABLE)
                mode.write(self._memory, table << PAGE_SHIFT, level.index(address), entry)
            table = mode.frame_of(entry)
        return table, mode.levels[-1]

    def _new_table(self) -> int:
        return self._domain.frames[self._free_tables.pop(0)]

    def _address(self, pfn: int) -> int:
        return self._image.base + (pfn << PAGE_SHIFT)

    def _store(self, address: int, data: bytes) -> None:
        """Write through the domain's frames, which are scattered in machine memory."""
        at = address - self._image.base
        while data:
            size = min(len(data), PAGE_SIZE - at % PAGE_SIZE)
            machine = (self._domain.frames[at >> PAGE_SHIFT] << PAGE_SHIFT) + at % PAGE_SIZE
            self._memory.write(machine, data[:size])
            at, data = at + size, data[size:]
