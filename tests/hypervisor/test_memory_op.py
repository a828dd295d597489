"""The hypercall for memory: what each command answers, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import DOMID_IO, DOMID_SELF, DOMID_XEN, HYPERCALL_VECTOR, Errno, Hypercall, MemoryOp, MmuextOp
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, NO_PFN, PINNED, FrameType
from xenlab.hypervisor.preemption import ALLOWANCE
from xenlab.hypervisor.trace import HAS, Kind, Trace
from xenlab.machine.paging import PAE, PRESENT, RW, TWO_LEVEL, PagingMode

IDLE = "start: jmp start\n .align 4096\n .skip 0x8000"
STRUCT, LIST, END = 0xC000_8000, 0xC000_8100, 0xC010_0000
FREE_PAGE = 0xC00A_0000
WILD = (0, 0x8000_0000, END, END - 8, 0xFD00_0000, 0xFFFF_FFF8)
INCREASE, DECREASE, POPULATE = MemoryOp.INCREASE_RESERVATION, MemoryOp.DECREASE_RESERVATION, MemoryOp.POPULATE_PHYSMAP

STALE = """
start:  mov eax, [esi + 68]                  # mfn_list
        mov eax, [eax + 4 * 0xA0]
        mov [frame], eax
        {touch}
        mov ebx, {page}
        xor ecx, ecx
        xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        mov ebx, XENMEM_decrease_reservation
        mov ecx, offset extents
        mov eax, __HYPERVISOR_memory_op
        int 0x82
        {touch}
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
extents: .long frame, 1, 0, 0, DOMID_SELF
frame:  .long 0
"""
TOUCHES = {
    "a store": "mov dword ptr [{page}], 0x5EC4E7",
    "the hypervisor's copy": """
        mov ebx, XENVER_extraversion
        mov ecx, {page}
        mov eax, __HYPERVISOR_xen_version
        int 0x82""",
}


class Bench:
    """A guest that is held still while it makes hypercalls, beside another one."""

    def __init__(self, mode: PagingMode = TWO_LEVEL, *, privileged: bool = False, memory_mib: int = 6) -> None:
        self.xen = Hypervisor(Machine(memory_mib), trace=Trace())
        # Dealt out in order, frames leave whole pieces behind for large extents.
        self.xen.frames._free.sort(reverse=True)
        self.domain = boot(self.xen, IDLE, mode=mode, privileged=privileged)
        self.other = boot(self.xen, IDLE, mode=mode)
        self.xen.pause(self.other)
        self.xen.run(10)
        self.vcpu = self.domain.vcpus[0]
        self.start_info = self.vcpu.state.esi

    def hypercall(self, number: int, *arguments: int) -> int:
        state = self.vcpu.state
        for name, value in zip(("ebx", "ecx", "edx", "esi", "edi", "ebp"), arguments, strict=False):
            setattr(state, name, value)
        state.eax = number
        self.xen.trap(HYPERCALL_VECTOR, 0, 0)
        return state.eax - (state.eax >> 31 << 32)

    def op(self, command: int, address: int = STRUCT) -> int:
        return self.hypercall(Hypercall.memory_op, command, address)

    def words(self, address: int, *values: int) -> None:
        for number, value in enumerate(values):
            self.xen.guest_memory.write_words(self.vcpu, address + 4 * number, (value & 0xFFFF_FFFF,))

    def read(self, address: int, count: int = 1) -> list[int]:
        return [self.xen.guest_memory.read_word(self.vcpu, address + 4 * number) for number in range(count)]

    def extents(
        self,
        command: int,
        values: Sequence[int] | None,
        *,
        order: int = 0,
        domid: int = DOMID_SELF,
        count: int | None = None,
        start: int = 0,
    ) -> int:
        """A call on a list of extents; without ``values`` there is no list."""
        if values is not None:
            self.words(LIST, *values)
        given = len(values or ()) if count is None else count
        self.words(STRUCT, LIST if values is not None else 0, given, order, 0, domid)
        return self.op(command | start << 6)

    def map(self, address: int, entry: int) -> int:
        return self.hypercall(Hypercall.update_va_mapping, address, entry, 0, 0)

    def mfn(self, address: int) -> int:
        return self.domain.frames[address - 0xC000_0000 >> 12]

    def unmap(self, *addresses: int) -> list[int]:
        """The frames of these pages, mapped nowhere now."""
        assert [self.map(address, 0) for address in addresses] == [0] * len(addresses)
        return [self.mfn(address) for address in addresses]

    def pages(self, count: int) -> list[int]:
        """Addresses of pages that nothing is done with."""
        return [FREE_PAGE + (number << 12) for number in range(count)]

    def raise_maximum(self, pages: int) -> None:
        self.domain.most_pages = self.domain.pages + pages


@pytest.fixture
def bench(mode: PagingMode) -> Bench:
    return Bench(mode)


@pytest.fixture
def control(mode: PagingMode) -> Bench:
    return Bench(mode, privileged=True)


class TestQuestions:
    def test_current_and_maximum_reservation(self, bench: Bench) -> None:
        bench.words(STRUCT, DOMID_SELF)
        bench.domain.most_pages = 300
        assert bench.op(MemoryOp.CURRENT_RESERVATION) == 256
        assert bench.op(MemoryOp.MAXIMUM_RESERVATION) == 300

    def test_a_domain_may_name_itself_by_number(self, bench: Bench) -> None:
        bench.words(STRUCT, bench.domain.domid)
        assert bench.op(MemoryOp.CURRENT_RESERVATION) == 256

    @pytest.mark.parametrize("command", [MemoryOp.CURRENT_RESERVATION, MemoryOp.MAXIMUM_RESERVATION])
    def test_of_others_only_the_control_domain_may_ask(self, command: int, bench: Bench, control: Bench) -> None:
        for asking, answer in ((bench, -Errno.EPERM), (control, 256)):
            asking.words(STRUCT, asking.other.domid)
            assert asking.op(command) == answer
            asking.words(STRUCT, 77)
            assert asking.op(command) == -Errno.ESRCH

    @pytest.mark.parametrize("address", WILD[:3])
    def test_wild_pointers(self, address: int, bench: Bench) -> None:
        for command in (MemoryOp.CURRENT_RESERVATION, MemoryOp.MAXIMUM_RESERVATION, MemoryOp.MACHPHYS_MAPPING):
            assert bench.op(command, address) == -Errno.EFAULT

    def test_maximum_ram_page(self, bench: Bench) -> None:
        assert bench.op(MemoryOp.MAXIMUM_RAM_PAGE, 0) == 6 * 256

    def test_machphys_mapping_leads_to_the_list(self, bench: Bench, mode: PagingMode) -> None:
        assert bench.op(MemoryOp.MACHPHYS_MAPPING) == 0
        start, end, last = bench.read(STRUCT, 3)
        assert start == (0xF580_0000 if mode is PAE else 0xFC00_0000)
        assert (end - start, last) == (4 * 6 * 256, 6 * 256 - 1)
        # What the guest reads there with its own eyes; the hypervisor's copies do not go above `start_of`.
        assert bench.xen.frames.m2p[bench.domain.frames[7]] == 7

    @pytest.mark.parametrize("command", [5, 7, 8, 9, 10, 13, 14, 40, 63])
    def test_commands_that_are_not_served(self, command: int, bench: Bench) -> None:
        assert bench.op(command) == -Errno.ENOSYS


class TestDecrease:
    def test_pages_that_are_mapped_nowhere_are_free_and_scrubbed(self, bench: Bench) -> None:
        pages = bench.pages(3)
        for page in pages:
            bench.words(page, 0x5EC4E7)
        mfns, free = bench.unmap(*pages), bench.xen.frames.free_frames
        assert bench.extents(DECREASE, mfns) == 3
        assert (bench.domain.pages, bench.xen.frames.free_frames) == (253, free + 3)
        for mfn in mfns:
            assert bench.xen.frames.owner[mfn] == FREE
            assert bench.xen.frames.m2p[mfn] == NO_PFN
            assert not any(bench.xen.memory.frame(mfn))

    def test_a_mapped_page_stays_until_it_is_unmapped(self, bench: Bench) -> None:
        (page,) = bench.pages(1)
        mfn = bench.mfn(page)
        bench.words(page, 0x5EC4E7)
        assert bench.extents(DECREASE, [mfn]) == 1
        assert bench.read(page) == [0x5EC4E7]
        assert (bench.xen.frames.owner[mfn], bench.domain.pages) == (bench.domain.domid, 256)
        # It is given up already: neither that nor another use as a table can be asked for again.
        assert bench.extents(DECREASE, [mfn]) == 0
        assert bench.map(page, 0) == 0
        assert (bench.xen.frames.owner[mfn], bench.domain.pages) == (FREE, 255)
        assert bench.map(page, mfn << 12 | PRESENT) == -Errno.EBUSY

    @pytest.mark.parametrize("touch", TOUCHES)
    def test_a_stale_translation_does_not_lead_into_a_free_frame(self, touch: str, mode: PagingMode) -> None:
        """The guest unmaps a page and does not flush, gives its frame up, and writes where the page was."""
        xen = Hypervisor(Machine(memory_mib=4))
        by = TOUCHES[touch].format(page=FREE_PAGE)
        domain = boot(xen, STALE.format(touch=by, page=FREE_PAGE), mode=mode)
        xen.run(20_000)
        mfn = domain.frames[0xA0]
        assert xen.frames.owner[mfn] == FREE
        assert not any(xen.memory.frame(mfn))
        assert domain.crashed == (touch == "a store")

    def test_the_first_bad_frame_ends_the_list(self, bench: Bench) -> None:
        mine = bench.unmap(*bench.pages(2))
        strange = bench.other.frames[20]
        for bad in (strange, 0, 6 * 256, 0xFFFF_FFFF, mine[0], bench.domain.shared_info_mfn):
            left = bench.domain.pages
            assert bench.extents(DECREASE, [mine[0], bad, mine[1]]) == (1 if left == 256 else 0)
            assert bench.domain.pages == 255
        assert bench.xen.frames.owner[strange] == bench.other.domid
        assert bench.xen.frames.owner[mine[1]] == bench.domain.domid

    def test_a_pinned_table_is_unpinned_and_free(self, bench: Bench) -> None:
        (page,) = bench.pages(1)
        (mfn,) = bench.unmap(page)
        bench.words(STRUCT, MmuextOp.PIN_L1_TABLE, mfn, 0)
        assert bench.hypercall(Hypercall.mmuext_op, STRUCT, 1, 0, DOMID_SELF) == 0
        frames = bench.xen.frames
        assert (frames.type[mfn], frames.flags[mfn] & PINNED) == (FrameType.L1, PINNED)
        assert bench.extents(DECREASE, [mfn]) == 1
        assert (frames.owner[mfn], frames.type[mfn], frames.flags[mfn]) == (FREE, FrameType.NONE, 0)

    def test_a_table_in_use_stays_a_table(self, bench: Bench) -> None:
        root = bench.vcpu.state.cr3 >> 12
        assert bench.extents(DECREASE, [root]) == 1
        frames = bench.xen.frames
        assert frames.owner[root] == bench.domain.domid
        assert frames.type[root] != FrameType.NONE
        bench.xen.run(10)
        assert not bench.domain.ended

    def test_extents_of_several_frames(self, bench: Bench) -> None:
        bench.raise_maximum(8)
        assert bench.extents(INCREASE, [0], order=3) == 1
        (first,) = bench.read(LIST)
        assert bench.extents(DECREASE, [first], order=3) == 1
        assert bench.domain.pages == 256
        # Of an extent that is the domain's by half, that half is gone, and it does not count as done.
        bench.raise_maximum(4)
        assert bench.extents(INCREASE, [0], order=2) == 1
        (first,) = bench.read(LIST)
        assert bench.extents(DECREASE, [first + 1]) == 1
        assert bench.extents(DECREASE, [first], order=2) == 0
        assert bench.domain.pages == 258

    def test_what_came_from_a_list_that_ends_is_counted(self, bench: Bench) -> None:
        mfns = bench.unmap(*bench.pages(2))
        bench.words(END - 8, *mfns)
        bench.words(STRUCT, END - 8, 5, 0, 0, DOMID_SELF)
        assert bench.op(DECREASE) == 2
        assert bench.domain.pages == 254


class TestIncrease:
    def test_frames_are_named_in_the_list(self, bench: Bench) -> None:
        bench.raise_maximum(3)
        assert bench.extents(INCREASE, [1, 1, 1]) == 3
        mfns = bench.read(LIST, 3)
        assert len(set(mfns)) == 3
        for mfn in mfns:
            assert bench.xen.frames.owner[mfn] == bench.domain.domid
            assert bench.xen.frames.m2p[mfn] == NO_PFN
            assert bench.map(FREE_PAGE, mfn << 12 | PRESENT | RW) == 0

    def test_without_a_list_they_are_not_named(self, bench: Bench) -> None:
        bench.raise_maximum(3)
        assert bench.extents(INCREASE, None, count=3) == 3
        assert bench.domain.pages == 259

    def test_not_above_the_maximum(self, bench: Bench) -> None:
        assert bench.extents(INCREASE, [0]) == 0
        bench.raise_maximum(2)
        assert bench.extents(INCREASE, [0] * 5) == 2
        assert bench.domain.pages == bench.domain.most_pages
        bench.domain.most_pages = 10  # what a domain has when its maximum sinks it keeps
        assert bench.extents(INCREASE, [0]) == 0
        assert bench.domain.pages == 258

    def test_not_more_than_the_machine_has(self, bench: Bench) -> None:
        bench.raise_maximum(10_000)
        free = bench.xen.frames.free_frames
        assert bench.extents(INCREASE, None, count=free + 5) == free
        assert bench.xen.frames.free_frames == 0
        assert bench.extents(INCREASE, None, count=1) == 0

    @pytest.mark.parametrize("order", [1, 4, 9])
    def test_orders_are_contiguous_and_aligned(self, order: int, bench: Bench) -> None:
        bench.raise_maximum(1 << order)
        assert bench.extents(INCREASE, [0], order=order) == 1
        (first,) = bench.read(LIST)
        assert first % (1 << order) == 0
        assert all(bench.xen.frames.owner[first + n] == bench.domain.domid for n in range(1 << order))

    @pytest.mark.parametrize("order", [19, 31, 0xFFFF_FFFF])
    def test_orders_beyond_reason(self, order: int, bench: Bench, control: Bench) -> None:
        for caller in (bench, control):
            caller.raise_maximum(10_000)
            for command in (INCREASE, DECREASE, POPULATE):
                assert caller.extents(command, [1], order=order) == 0
            assert caller.domain.pages == 256

    def test_larger_orders_are_for_the_control_domain(self) -> None:
        for privileged, done in ((False, 0), (True, 1)):
            bench = Bench(privileged=privileged, memory_mib=16)
            bench.raise_maximum(1 << 10)
            assert bench.extents(INCREASE, [0], order=10) == done

    def test_a_list_that_cannot_be_written_gives_nothing(self, bench: Bench) -> None:
        bench.raise_maximum(5)
        (table,) = bench.read(bench.start_info + 60)
        for place in (*WILD[1:3], *WILD[4:], table):
            bench.words(STRUCT, place, 5, 0, 0, DOMID_SELF)
            assert bench.op(INCREASE) == 0
            assert bench.op(POPULATE) == 0
            assert bench.domain.pages == 256


class TestPopulate:
    def test_frames_get_the_numbers_that_were_asked_for(self, bench: Bench) -> None:
        pages = bench.pages(3)
        pfns = [page - 0xC000_0000 >> 12 for page in pages]
        before = bench.unmap(*pages)
        assert bench.extents(DECREASE, before) == 3
        assert bench.extents(POPULATE, pfns) == 3
        mfns = bench.read(LIST, 3)
        assert [bench.xen.frames.m2p[mfn] for mfn in mfns] == pfns
        assert all(not any(bench.xen.memory.frame(mfn)) for mfn in mfns)
        assert bench.domain.pages == 256
        for page, mfn in zip(pages, mfns, strict=True):
            assert bench.map(page, mfn << 12 | PRESENT | RW) == 0
            bench.words(page, page)
        assert [bench.read(page)[0] for page in pages] == pages

    def test_an_extent_is_numbered_in_order(self, bench: Bench) -> None:
        bench.raise_maximum(8)
        assert bench.extents(POPULATE, [0x400], order=3) == 1
        (first,) = bench.read(LIST)
        assert list(bench.xen.frames.m2p[first : first + 8]) == list(range(0x400, 0x408))

    def test_what_fits_is_done_and_counted(self, bench: Bench) -> None:
        bench.raise_maximum(2)
        assert bench.extents(POPULATE, [0x400, 0x401, 0x402]) == 2
        assert bench.read(LIST, 3)[2] == 0x402

    def test_the_trace_says_what_a_domain_has(self, bench: Bench) -> None:
        bench.raise_maximum(2)
        bench.extents(POPULATE, [0x400, 0x401])
        bench.extents(POPULATE, [0x402])
        assert bench.xen.trace is not None
        mine = [event for event in bench.xen.trace.events(Kind.MEMORY) if event.domain == bench.domain.domid]
        assert [(event.what, event.pages) for event in mine] == [(HAS, 256), (HAS, 258)]


@pytest.mark.parametrize("command", [INCREASE, DECREASE, POPULATE])
class TestOnOthers:
    def test_the_control_domain_may(self, command: int, control: Bench) -> None:
        other = control.other
        other.most_pages += 1
        last = other.frames[-1]
        values = [last] if command == DECREASE else [0x500]
        assert control.extents(command, values, domid=other.domid) == 1
        # The page that was given up for it is mapped by its owner, and stays until that unmaps it.
        assert (other.pages, control.domain.pages) == (256 if command == DECREASE else 257, 256)
        if command == POPULATE:
            assert control.xen.frames.owner[control.read(LIST)[0]] == other.domid

    def test_another_guest_may_not(self, command: int, bench: Bench) -> None:
        bench.other.most_pages += 1
        last = bench.other.frames[-1]
        for domid in (bench.other.domid, 77, DOMID_IO, DOMID_XEN, 0xFFFF):
            assert bench.extents(command, [last], domid=domid) == 0
        assert bench.other.pages == 256
        assert bench.xen.frames.owner[last] == bench.other.domid

    @pytest.mark.parametrize("address", WILD)
    def test_a_wild_structure_does_nothing(self, command: int, address: int, bench: Bench) -> None:
        assert bench.op(command, address) == 0
        assert bench.op(command | 5 << 6, address) == 5
        assert bench.domain.pages == 256

    @pytest.mark.parametrize("count", [1 << 26, 1 << 31, 0xFFFF_FFFF])
    def test_more_extents_than_a_number_can_count(self, command: int, count: int, bench: Bench) -> None:
        bench.raise_maximum(10)
        assert bench.extents(command, [0x500], count=count) == 0
        assert bench.domain.pages == 256

    def test_a_start_behind_the_end(self, command: int, bench: Bench) -> None:
        bench.raise_maximum(10)
        assert bench.extents(command, [0x500], start=3) == 3
        assert bench.extents(command, []) == 0
        assert bench.domain.pages == 256


class TestLongLists:
    """A list that costs more than a call's allowance is done in parts, and its end is the same."""

    COUNT = 900

    def whole(self, bench: Bench, command: int) -> tuple[int, int]:
        """The answer, and how often the call was interrupted."""
        # The guest really executes its INT 0x82 again, since its EIP is set back to it.
        state, cuts = bench.vcpu.state, 0
        while True:
            eip = state.eip
            result = bench.op(command)
            if state.eip == eip:
                return result, cuts
            assert state.eip == eip - 2
            state.eip, cuts, command = eip, cuts + 1, state.ebx
            assert command >> 6

    def test_increase_and_decrease(self) -> None:
        bench = Bench(memory_mib=16)
        bench.raise_maximum(2 * ALLOWANCE)
        # A list in memory of its own: a page for each 1024 frames.
        bench.words(STRUCT, 0, ALLOWANCE // 4 + 100, 0, 0, DOMID_SELF)
        result, cuts = self.whole(bench, INCREASE)
        assert (result, cuts) == (ALLOWANCE // 4 + 100, 1)
        assert bench.domain.pages == 256 + ALLOWANCE // 4 + 100

    def test_orders_cost_more(self) -> None:
        bench = Bench(memory_mib=32)
        bench.raise_maximum(1 << 13)
        bench.words(STRUCT, 0, 8, 9, 0, DOMID_SELF)
        result, cuts = self.whole(bench, INCREASE)
        assert (result, bench.domain.pages) == (8, 256 + 8 * 512)
        assert cuts == 1


class TestExchange:
    def exchange(
        self,
        bench: Bench,
        given: Sequence[int],
        wanted: Sequence[int],
        orders: tuple[int, int] = (0, 0),
        domids: tuple[int, int] = (DOMID_SELF, DOMID_SELF),
        done: int = 0,
    ) -> int:
        bench.words(LIST, *given)
        bench.words(LIST + 0x800, *wanted)
        bench.words(STRUCT, LIST, len(given), orders[0], 0, domids[0])
        bench.words(STRUCT + 20, LIST + 0x800, len(wanted), orders[1], 0, domids[1], done)
        return bench.op(MemoryOp.EXCHANGE)

    def test_single_frames_for_others(self, bench: Bench) -> None:
        mfns = bench.unmap(*bench.pages(2))
        free = bench.xen.frames.free_frames
        assert self.exchange(bench, mfns, [0xA0, 0xA1]) == 0
        new = bench.read(LIST + 0x800, 2)
        assert new[0] not in mfns
        assert [bench.xen.frames.m2p[mfn] for mfn in new] == [0xA0, 0xA1]
        assert bench.xen.frames.owner[mfns[1]] == FREE
        assert (bench.domain.pages, bench.xen.frames.free_frames) == (256, free)
        assert bench.read(STRUCT + 40) == [2]

    def test_scattered_frames_for_a_contiguous_extent_and_back(self, bench: Bench) -> None:
        mfns = bench.unmap(*bench.pages(8))
        assert self.exchange(bench, mfns, [0x300], (0, 3)) == 0
        (first,) = bench.read(LIST + 0x800)
        assert first % 8 == 0
        assert list(bench.xen.frames.m2p[first : first + 8]) == list(range(0x300, 0x308))
        assert self.exchange(bench, [first], list(range(0x300, 0x308)), (3, 0)) == 0
        assert (bench.domain.pages, bench.domain.most_pages) == (256, 256)

    def test_a_mapped_frame_is_refused_and_nothing_happens(self, bench: Bench) -> None:
        first, second = bench.pages(2)
        (free,) = bench.unmap(first)
        mapped, table = bench.mfn(second), bench.vcpu.state.cr3 >> 12
        for bad in (mapped, table, bench.other.frames[9], bench.domain.shared_info_mfn, 0xFFFF_FFFF):
            assert self.exchange(bench, [bad], [0xA0]) == -Errno.EINVAL
            assert bench.read(STRUCT + 40) == [0]
        assert self.exchange(bench, [free, free], [0xA0], (0, 1)) == -Errno.EINVAL
        assert bench.xen.frames.owner[free] == bench.domain.domid

    def test_the_sizes_have_to_agree(self, bench: Bench) -> None:
        mfns = bench.unmap(*bench.pages(3))
        assert self.exchange(bench, mfns, [0xA0, 0xA1]) == -Errno.EINVAL
        assert self.exchange(bench, mfns, [0xA0], (0, 1)) == -Errno.EINVAL
        assert self.exchange(bench, mfns, [0, 0, 0], domids=(DOMID_SELF, bench.other.domid)) == -Errno.EINVAL
        assert self.exchange(bench, mfns, [0, 0, 0], done=4) == -Errno.EINVAL
        assert self.exchange(bench, mfns[:1], [0xA0], (13, 13)) == -Errno.EPERM
        assert bench.domain.pages == 256

    def test_out_of_memory(self, bench: Bench) -> None:
        mfns = bench.unmap(*bench.pages(2))
        bench.domain.most_pages = 10_000
        bench.extents(INCREASE, None, count=bench.xen.frames.free_frames - 1)
        assert self.exchange(bench, mfns[:1], [0xA0]) == 0
        bench.extents(INCREASE, None, count=bench.xen.frames.free_frames)
        assert self.exchange(bench, mfns[1:], [0xA1]) == -Errno.ENOMEM
        assert bench.xen.frames.owner[mfns[1]] == bench.domain.domid

    def test_of_another_domain(self, bench: Bench, control: Bench) -> None:
        assert self.exchange(bench, [bench.other.frames[9]], [9], domids=(bench.other.domid,) * 2) == -Errno.EPERM
        # Its pages are mapped, so even the control domain gets no further than that.
        frame = control.other.frames[9]
        assert self.exchange(control, [frame], [9], domids=(control.other.domid,) * 2) == -Errno.EINVAL

    @pytest.mark.parametrize("address", WILD)
    def test_wild_pointers(self, address: int, bench: Bench) -> None:
        assert bench.op(MemoryOp.EXCHANGE, address) == -Errno.EFAULT

    def test_lists_that_cannot_be_read_or_written(self, bench: Bench) -> None:
        (mfn,) = bench.unmap(*bench.pages(1))
        (table,) = bench.read(bench.start_info + 60)
        for old, new in ((END, LIST), (LIST, END), (LIST, table), (0xFD00_0000, LIST)):
            bench.words(LIST, mfn)
            bench.words(STRUCT, old, 1, 0, 0, DOMID_SELF)
            bench.words(STRUCT + 20, new, 1, 0, 0, DOMID_SELF, 0)
            assert bench.op(MemoryOp.EXCHANGE) == -Errno.EFAULT
            assert bench.xen.frames.owner[mfn] == bench.domain.domid


@pytest.fixture(scope="module")
def shared_bench() -> Bench:
    """One machine for many examples; it only has to stay sound."""
    bench = Bench(privileged=True)
    bench.domain.most_pages = bench.other.most_pages = 400
    return bench


def total(xen: Hypervisor) -> int:
    return xen.frames.free_frames + sum(domain.pages for domain in xen.domains.values())


def belongs(domain: Domain, mfn: int, xen: Hypervisor) -> bool:
    return 0 <= mfn < xen.frames.count and xen.frames.owner[mfn] == domain.domid


@given(
    command=st.integers(0, 15),
    start=st.integers(0, 3),
    values=st.lists(st.integers(0, 6 * 256 + 3) | st.integers(0, 2**32 - 1), max_size=6),
    order=st.sampled_from([0, 0, 0, 1, 2, 9, 20]),
    domid=st.sampled_from([DOMID_SELF, DOMID_SELF, 0, 1, 5, DOMID_IO]),
)
@settings(max_examples=150)
def test_whatever_is_asked_for_frames_are_neither_lost_nor_shared(
    shared_bench: Bench, command: int, start: int, values: list[int], order: int, domid: int
) -> None:
    bench = shared_bench
    before = total(bench.xen)
    # The pages that hold code, lists and tables of the caller's are not for giving away here.
    kept = set(bench.domain.frames[:40])
    values = [0x700 if belongs(bench.domain, value, bench.xen) and value in kept else value for value in values]
    if order == 0 or command != DECREASE:
        bench.extents(command, values, order=order, domid=domid, start=start)
    check(bench.xen)
    assert total(bench.xen) == before
    assert all(domain.pages <= domain.most_pages for domain in bench.xen.domains.values())
