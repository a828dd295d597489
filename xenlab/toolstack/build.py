"""Building a domain: memory, page tables and the first registers of a guest (paper 3.4).

In Xen this is work of the control domain's tools, not of the hypervisor.  What a new guest finds in its memory is
laid out in `plan`; here it is written.  It begins with ESI pointing at ``start_info``, ESP at the top of its stack,
paging on, in ring 1 with flat segments and with its events masked.  The page tables are mapped read-only for the
guest, as every page table always is.  The shared-information page is named by its machine address, and the guest
maps it where it likes.

The invariant: the frames that the new page tables name all belong to the domain, but for the
shared-information page and the hypervisor's own range, which the guest cannot change.  What
breaks without it: a guest is born with a window into another.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

from xenlab.abi.kernel_notes import Feature
from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING1_DS, FLAT_RING1_SS, StartFlags, VmAssistType
from xenlab.abi.structures import (
    COMMAND_LINE_BYTES,
    START_INFO_MAGIC,
    START_INFO_MAGIC_PAE,
    ScreenInfo,
    StartInfo,
    VcpuInfo,
)
from xenlab.errors import ImageError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import VCPU_INFO_BYTES, VCPUS_PER_DOMAIN, Domain, Vcpu
from xenlab.hypervisor.hypercalls import hypercall_page
from xenlab.hypervisor.layout import flat_descriptors
from xenlab.hypervisor.lifecycle import add_others, add_vcpu, frames_beside, new_domain
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import ACCESSED, DIRTY, PAE, PRESENT, RW, USER, Level
from xenlab.machine.state import IF
from xenlab.toolstack.image import Image
from xenlab.toolstack.notes import check
from xenlab.toolstack.plan import Plan, plan

_CONTROL = 0  # the domain in which the tools are
_TABLE = PRESENT | RW | USER | ACCESSED
_PAGE = PRESENT | ACCESSED | DIRTY


def build(
    hypervisor: Hypervisor,
    image: Image,
    *,
    memory_mib: int = 4,
    command_line: str = "",
    privileged: bool = False,
    max_vcpus: int = 1,
) -> Domain:
    """Make a domain from ``image``; it is left paused.

    Args:
        hypervisor: where.
        image: what to load.
        memory_mib: the domain's memory.
        command_line: passed in ``start_info``, at most 1,023 bytes.
        privileged: make it the initial domain.
        max_vcpus: how many vCPUs its kernel may start, the first included, which begins by itself.

    Raises:
        ImageError: the image does not fit into that memory or below the hypervisor, or cannot be the initial
            domain, or there are not enough free frames, or no such number of vCPUs; nothing is changed then.
    """
    check(image.notes, image.name, privileged=privileged)
    text = _checked(command_line)
    if type(max_vcpus) is not int or not 1 <= max_vcpus <= VCPUS_PER_DOMAIN:
        raise ImageError(
            f"image {image.name!r}: a domain can have from 1 to {VCPUS_PER_DOMAIN} vCPUs, found {max_vcpus!r:.80}"
        )
    layout = plan(image, memory_mib, privileged=privileged)
    needed = layout.total + frames_beside(hypervisor, image.mode, max_vcpus)
    if needed > hypervisor.frames.free_frames:
        raise ImageError(
            f"image {image.name!r}: a domain of {memory_mib} MiB needs {needed} free frames, "
            f"{hypervisor.frames.free_frames} are left"
        )
    domain = new_domain(hypervisor, image.name, image.mode, layout.total, privileged=privileged, vcpus=max_vcpus)
    domain.symbols.update(image.symbols)
    if Feature.pae_pgdir_above_4gb in image.notes.supported:
        domain.assists |= 1 << VmAssistType.PAE_EXTENDED_CR3
    builder = _Builder(hypervisor, image, layout, domain)
    builder.load_image()
    builder.write_p2m()
    builder.write_start_info(text)
    builder.mask_events()
    cr3 = builder.write_page_tables()
    add_vcpu(hypervisor, builder.first_vcpu(cr3))
    add_others(hypervisor, domain)
    return domain


def _checked(command_line: str) -> bytes:
    text = command_line.encode("utf-8", "surrogateescape")
    if len(text) >= COMMAND_LINE_BYTES:
        raise ImageError(f"command line of {len(text)} bytes; at most {COMMAND_LINE_BYTES - 1} fit")
    return text


class _Builder:
    """Fills the frames of one domain."""

    def __init__(self, hypervisor: Hypervisor, image: Image, layout: Plan, domain: Domain) -> None:
        self._xen, self._image, self._plan, self._domain = hypervisor, image, layout, domain
        self._memory: Memory = hypervisor.memory
        self._tables = {
            (table.level.name, table.number): domain.frames[layout.tables + place]
            for place, table in enumerate(layout.table_list)
        }

    def load_image(self) -> None:
        """Copy the sections and the hypercall page, and forget code the frames once held."""
        for section in self._image.sections:
            self._store(section.address, section.data)
        if self._image.hypercall_page is not None:
            self._store(self._image.hypercall_page, hypercall_page())
        for first, end in _runs(self._domain.frames):
            self._xen.cpu.forget_code(first << PAGE_SHIFT, end << PAGE_SHIFT)

    def write_p2m(self) -> None:
        """The guest's map from pseudo-physical to machine frames."""
        frames = self._domain.frames
        self._store(self._plan.address(self._plan.p2m), struct.pack(f"<{len(frames)}I", *frames))

    def write_start_info(self, command_line: bytes) -> None:
        """What the guest finds behind ESI; for the initial domain what it may know of the screen follows."""
        layout, domain = self._plan, self._domain
        info = StartInfo(
            magic=START_INFO_MAGIC_PAE if self._image.mode is PAE else START_INFO_MAGIC,
            nr_pages=layout.total,
            shared_info=domain.shared_info_mfn << PAGE_SHIFT,
            pt_base=layout.address(layout.tables),
            nr_pt_frames=len(layout.table_list),
            mfn_list=layout.address(layout.p2m),
            cmd_line=command_line,
        )
        if layout.console is None or layout.store is None:
            info.flags = int(StartFlags.PRIVILEGED | StartFlags.INITDOMAIN)
            info.console_info_off, info.console_info_size = ctypes.sizeof(StartInfo), ctypes.sizeof(ScreenInfo)
        else:
            info.store_mfn, info.console_mfn = domain.frames[layout.store], domain.frames[layout.console]
            domain.store_mfn, domain.console_mfn = info.store_mfn, info.console_mfn
            if self._image.notes.declared:
                # The store has nobody behind it yet, and no port says so.
                info.console_evtchn = self._xen.events.new_unbound(domain, _CONTROL)
        # The machine has no screen, and a page that is all zeros says so.
        self._store(layout.address(layout.start_info), bytes(info))

    def mask_events(self) -> None:
        """No vCPU takes events before its kernel says so: it begins with ``evtchn_upcall_mask`` set."""
        shared = self._domain.shared_info_mfn << PAGE_SHIFT
        first = shared + VcpuInfo.evtchn_upcall_mask.offset
        for number in range(VCPUS_PER_DOMAIN):
            self._memory.bytes[first + number * VCPU_INFO_BYTES] = 1

    def write_page_tables(self) -> int:
        """Map the region; returns CR3."""
        mode, layout = self._image.mode, self._plan
        for table in layout.table_list[1:]:
            self._link(table.level, table.number)
        tables = range(layout.tables, layout.stack)
        for pfn in range(layout.mapped):
            address = layout.address(pfn)
            flags = _PAGE if pfn in tables else _PAGE | RW
            if address in self._image.user:
                flags |= USER
            self._map(address, self._domain.frames[pfn], flags)
        if self._image.shared_info is not None:
            self._map(self._image.shared_info, self._domain.shared_info_mfn, _PAGE | RW)
        return self._tables[mode.levels[0].name, 0] << PAGE_SHIFT

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
        state.esp = self._plan.top_of_stack
        state.esi = self._plan.address(self._plan.start_info)
        state.eflags = IF
        vcpu = Vcpu(self._domain.domid * VCPUS_PER_DOMAIN, self._domain, state)
        vcpu.kernel_ss, vcpu.kernel_esp = FLAT_RING1_SS, state.esp
        self._xen.cpu.set_inner_stack(state, FLAT_RING1_SS, state.esp)
        return vcpu

    def _map(self, address: int, mfn: int, flags: int) -> None:
        self._write_entry(self._image.mode.levels[-1], address, mfn, flags)

    def _link(self, level: Level, number: int) -> None:
        """Name a table in the one above it."""
        levels = self._image.mode.levels
        above = levels[levels.index(level) - 1]
        # PAE's root entries have none of the usual flags.
        flags = PRESENT if above.name == "l3" else _TABLE
        self._write_entry(above, number << above.shift, self._tables[level.name, number], flags)

    def _write_entry(self, level: Level, address: int, mfn: int, flags: int) -> None:
        mode, table = self._image.mode, self._table_for(level, address)
        mode.write(self._memory, table << PAGE_SHIFT, level.index(address), mode.entry(mfn, flags))

    def _table_for(self, level: Level, address: int) -> int:
        """The frame of the table of ``level`` through which ``address`` is reached."""
        span = level.shift + level.entries.bit_length() - 1
        return self._tables[level.name, address >> span]

    def _store(self, address: int, data: bytes) -> None:
        """Write through the domain's frames, which are scattered in machine memory."""
        at, rest = address - self._image.base, memoryview(data)
        while rest:
            size = min(len(rest), PAGE_SIZE - at % PAGE_SIZE)
            machine = (self._domain.frames[at >> PAGE_SHIFT] << PAGE_SHIFT) + at % PAGE_SIZE
            self._memory.write(machine, rest[:size])
            at, rest = at + size, rest[size:]


def _runs(frames: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours among ``frames``, as first and end."""
    first = end = -1
    for mfn in sorted(frames):
        if mfn != end:
            if end >= 0:
                yield first, end
            first = mfn
        end = mfn + 1
    yield first, end
