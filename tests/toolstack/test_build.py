"""What a new guest finds: registers, memory, page tables, ``start_info``."""

from __future__ import annotations

import ctypes

import pytest

from xenlab import Hypervisor, ImageError, Machine, boot
from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING1_DS, FLAT_RING1_SS, StartFlags
from xenlab.abi.structures import StartInfo
from xenlab.hypervisor.domain import Domain, RunState
from xenlab.hypervisor.frames import FREE, XEN
from xenlab.hypervisor.layout import GDT_BASE, GDT_LIMIT, TSS_BASE, segments_end, start_of
from xenlab.machine.paging import PAE, RW, TWO_LEVEL, USER, PagingMode, mapped_pages
from xenlab.toolstack import Image, build, image_from_source
from xenlab.toolstack.image import Section

BASE = 0xC000_0000
GUEST = """
start:  jmp start
        .align 4096
user_start: .skip 8192
user_end:
"""


@pytest.fixture(params=[TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> PagingMode:
    found: PagingMode = request.param
    return found


def info_of(xen: Hypervisor, domain: Domain) -> StartInfo:
    vcpu = domain.vcpus[0]
    data = xen.guest_memory.read(vcpu, vcpu.state.esi, ctypes.sizeof(StartInfo))
    return StartInfo.from_buffer_copy(data)


def words_at(xen: Hypervisor, domain: Domain, address: int, count: int) -> list[int]:
    data = memoryview(xen.guest_memory.read(domain.vcpus[0], address, 4 * count))
    return list(data.cast("I"))


@pytest.mark.parametrize("memory_mib", [1, 2, 3, 4, 5, 8, 13, 32])
def test_memory_of_a_new_guest(memory_mib: int, mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=memory_mib + 2))
    domain = boot(xen, GUEST, memory_mib=memory_mib, mode=mode, command_line="one two")
    vcpu, info, pages = domain.vcpus[0], info_of(xen, domain), memory_mib * 256
    assert info.magic == {"two-level": b"xen-3.0-x86_32", "PAE": b"xen-3.0-x86_32p"}[mode.name]
    assert info.cmd_line == b"one two"
    assert (info.nr_pages, info.flags) == (pages, 0)
    assert info.shared_info == domain.shared_info_mfn << 12
    assert info.pt_base % 4096 == 0
    # The list of machine frames, the page tables and the owners say the same.
    p2m = words_at(xen, domain, info.mfn_list, pages)
    assert p2m == domain.frames
    assert len(set(p2m)) == pages
    assert all(xen.frames.owner[mfn] == domain.domid for mfn in p2m)
    mapped = dict(mapped_pages(xen.memory, mode, vcpu.state.cr3))
    own = {address: mode.frame_of(entry) for address, entry in mapped.items() if address < start_of(mode)}
    # The first region has 4 MiB here, and no more is mapped.
    expected = {BASE + (pfn << 12): mfn for pfn, mfn in enumerate(p2m[:1024])}
    assert own == {**expected, 0xC000_1000: domain.shared_info_mfn}
    # Store and console follow behind start_info, which ESI points at.
    place = vcpu.state.esi - BASE >> 12
    assert p2m[place + 1 : place + 3] == [info.store_mfn, info.console_mfn]
    assert domain.console_mfn == info.console_mfn
    # Page tables: nr_pt_frames pages from pt_base on, the root first, read-only, and no others.
    tables = {(info.pt_base - BASE >> 12) + number for number in range(info.nr_pt_frames)}
    assert vcpu.state.cr3 == p2m[min(tables)] << 12
    writable = {address for address, entry in mapped.items() if entry & RW}
    assert writable == set(own) - {BASE + (pfn << 12) for pfn in tables}
    # Only what the source marks is open to applications.
    symbols = domain.symbols
    user = {address for address, entry in mapped.items() if entry & USER}
    assert user == set(range(symbols["user_start"], symbols["user_end"], 4096))


def test_no_page_table_is_left_unused_or_missing(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=16))
    image = Image("large", BASE, BASE, (Section(BASE, b"\xeb\xfe", 7 << 20),), mode)
    domain = boot(xen, image, memory_mib=9)
    info = info_of(xen, domain)
    # Below the root: an l1 table for each 4 (2) MiB of the first 8; with PAE an l2 that also holds the hypervisor's.
    assert info.nr_pt_frames == {"two-level": 1 + 2, "PAE": 1 + 1 + 4}[mode.name]
    # From elsewhere, the hypervisor's range has an l2 of its own.
    low = build(xen, Image("low", 0, 0, (Section(0, b"\xeb\xfe", 2),), mode), memory_mib=4)
    assert info_of(xen, low).nr_pt_frames == {"two-level": 1 + 1, "PAE": 1 + 2 + 2}[mode.name]


def test_registers_of_a_new_guest(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    domain = build(xen, image_from_source(GUEST, mode=mode), memory_mib=1)
    vcpu, info = domain.vcpus[0], info_of(xen, domain)
    state = vcpu.state
    assert vcpu.run_state is RunState.PAUSED
    assert (state.cpl, state.eip) == (1, domain.symbols["start"])
    assert state.general()[:4] == (0, 0, 0, 0)
    assert (state.ebp, state.edi) == (0, 0)
    assert state.eflags == 0x202
    selectors = [state.segment(name).selector for name in ("cs", "ss", "ds", "es", "fs", "gs")]
    assert selectors == [FLAT_RING1_CS, FLAT_RING1_SS, *[FLAT_RING1_DS] * 4]
    assert {state.segment(name).limit for name in ("cs", "ss", "ds")} == {segments_end(mode) - 1}
    assert {state.segment(name).base for name in ("cs", "ss", "ds", "es", "fs", "gs")} == {0}
    # The stack lies behind the page tables; the kernel's stack for entries from ring 3 is the same.
    assert state.esp == info.pt_base + info.nr_pt_frames * 4096 + 4096
    assert (vcpu.kernel_ss, vcpu.kernel_esp) == (FLAT_RING1_SS, state.esp)


def test_second_guest_starts_as_clean_as_the_first(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=8))
    first = boot(xen, "start: mov eax, 5\n fld1\n movd xmm3, eax\n mov eax, [0x1234]\n jmp start")
    fresh = dict(build(xen, image_from_source(GUEST, mode=mode), memory_mib=1).vcpus[0].state.architectural())
    xen.run(100)
    assert first.crashed
    later = dict(build(xen, image_from_source(GUEST, mode=mode), memory_mib=1).vcpus[0].state.architectural())
    for values in (fresh, later):
        del values["cr3"]
    assert later == fresh


@pytest.mark.parametrize("privileged", [False, True])
def test_only_the_initial_domain_is_marked(privileged: bool) -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    domain = boot(xen, GUEST, privileged=privileged)
    expected = StartFlags.PRIVILEGED | StartFlags.INITDOMAIN if privileged else 0
    assert info_of(xen, domain).flags == expected


def test_hypervisor_range_holds_the_list_and_the_descriptor_table_only(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    domain = boot(xen, GUEST, mode=mode)
    above = {
        address: entry
        for address, entry in mapped_pages(xen.memory, mode, domain.vcpus[0].state.cr3)
        if address >= start_of(mode)
    }
    m2p = [start_of(mode) + 4096 * page for page in range(len(xen.frames.m2p_frames))]
    assert set(above) == {*m2p, *range(GDT_BASE, GDT_BASE + GDT_LIMIT, 4096), TSS_BASE}
    assert [mode.frame_of(above[address]) for address in m2p] == list(xen.frames.m2p_frames)
    assert not any(entry & (RW | USER) for entry in above.values())
    assert {xen.frames.owner[mode.frame_of(entry)] for entry in above.values()} == {XEN}
    assert all(xen.frames.owner[mfn] == XEN for mfn in domain.own_tables)
    assert not set(domain.own_tables) & set(domain.frames)


def test_domains_share_no_frame(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=8))
    domains = [boot(xen, GUEST, mode=mode) for _ in range(4)]
    frames = [mfn for domain in domains for mfn in (*domain.frames, *domain.own_tables, domain.shared_info_mfn)]
    assert len(frames) == len(set(frames))
    assert [domain.domid for domain in domains] == [0, 1, 2, 3]


REFUSED = {
    "no memory": ({"memory_mib": 0}, "at least 1"),
    "more than the machine has": ({"memory_mib": 64}, "are left"),
    "a long command line": ({"command_line": "x" * 1024}, "at most 1023"),
    "a long command line in UTF-8": ({"command_line": "é" * 512}, "at most 1023"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_guest_leaves_nothing_behind(name: str, mode: PagingMode) -> None:
    options, message = REFUSED[name]
    xen = Hypervisor(Machine(memory_mib=4))
    owner = xen.frames.owner[:]
    with pytest.raises(ImageError, match=message):
        boot(xen, GUEST, mode=mode, **options)  # type: ignore[arg-type]
    assert xen.frames.owner == owner
    assert xen.domains == {}


@pytest.mark.parametrize("size", [8 << 20, 1 << 20])
def test_image_too_high_for_what_has_to_be_mapped(size: int, mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=16))
    base = start_of(mode) - (4 << 20)
    image = Image("high", base, base, (Section(base, b"\xeb\xfe", size),), mode)
    if size < 4 << 20:
        assert not boot(xen, image, memory_mib=12).crashed
    else:
        with pytest.raises(ImageError, match=f"reaches into the hypervisor's range at {start_of(mode):#x}"):
            boot(xen, image, memory_mib=12)


@pytest.mark.parametrize("pages", [250, 256, 300])
def test_image_too_large_for_its_memory(pages: int, mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    free = xen.frames.free_frames
    image = Image("large", BASE, BASE, (Section(BASE, b"\xeb\xfe", pages * 4096),), mode)
    with pytest.raises(ImageError, match="the domain has 1024 KiB"):
        boot(xen, image)
    assert xen.frames.free_frames == free


def test_command_line_that_is_no_text() -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    assert info_of(xen, boot(xen, GUEST, command_line="root=\udcff")).cmd_line == b"root=\xff"


def test_longest_command_line() -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    assert info_of(xen, boot(xen, GUEST, command_line="y" * 1023)).cmd_line == b"y" * 1023


def test_machine_is_filled_to_the_last_frame(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    for _ in range(3):
        boot(xen, GUEST, mode=mode)
    with pytest.raises(ImageError, match="free frames"):
        boot(xen, GUEST, mode=mode)
    assert len(xen.domains) == 3
    assert xen.frames.free_frames == xen.frames.owner.count(FREE)


@pytest.mark.parametrize("base", [0, 0x40_0000, 0x8000_0000, 0xBFF0_0000, 0xC000_0000, 0xF540_0000])
def test_image_at_any_base(base: int, mode: PagingMode) -> None:
    xen = Hypervisor(Machine(memory_mib=8))
    code = b"\x40\xeb\xfd"  # inc eax; jmp back
    image = Image("moved", base, base + 0x1000, (Section(base + 0x1000, code, 3),), mode)
    domain = boot(xen, image, memory_mib=1)
    xen.run(100)
    assert (domain.vcpus[0].state.eax, domain.crashed) == (50, False)
    mapped = dict(mapped_pages(xen.memory, mode, domain.vcpus[0].state.cr3))
    assert [mode.frame_of(mapped[base + (pfn << 12)]) for pfn in range(256)] == domain.frames


def test_user_pages_must_be_whole_pages() -> None:
    with pytest.raises(ImageError, match="page-aligned"):
        image_from_source("start: nop\nuser_start: nop\n .align 4096\nuser_end:")


def test_source_without_instructions() -> None:
    with pytest.raises(ImageError, match="no instructions"):
        image_from_source("# nothing\n")
