"""The page-table hypercalls with good and bad arguments: state, errno, counts (paper 3.3.3; Xen's arch/x86/mm.c)."""

from __future__ import annotations

import pytest
from memory_bench import (
    ACCESSED,
    DIRTY,
    DONE,
    FREE_PFN,
    LEAF,
    PRESENT,
    READ_ONLY,
    REQUESTS,
    RW,
    TABLE,
    Guest,
    LostPageError,
    guests,
)

from xenlab.abi.numbers import DOMID_IO, DOMID_SELF, DOMID_XEN, Errno, Hypercall, MmuextOp, MmuUpdate, UvmFlags
from xenlab.hypervisor.frames import NO_PFN, PINNED, VALIDATED, FrameType
from xenlab.hypervisor.page_entries import Use
from xenlab.machine.paging import NX, PAE, TWO_LEVEL, PagingMode

A, B, C = FREE_PFN, FREE_PFN + 1, FREE_PFN + 2


@pytest.fixture
def guest(mode: PagingMode) -> Guest:
    return guests(mode)[0]


class TestMmuUpdate:
    def test_an_entry_is_changed_and_counted(self, guest: Guest) -> None:
        frames = guest.xen.frames
        before = frames.refs[guest.frames[B]], frames.uses[guest.frames[B]]
        assert guest.update(guest.place(A), guest.entry(B)) == 0
        assert guest.now(A) == guest.entry(B)
        assert (frames.refs[guest.frames[B]], frames.uses[guest.frames[B]]) == (before[0] + 1, before[1] + 1)
        assert frames.uses[guest.frames[A]] == 0

    def test_the_mmu_walks_what_was_stored(self, guest: Guest) -> None:
        guest.write(guest.address(B), b"here")
        assert guest.update(guest.place(A), guest.entry(B)) == 0
        guest.extended(MmuextOp.TLB_FLUSH_LOCAL)
        assert guest.word(guest.address(A)).to_bytes(4, "little") == b"here"

    @pytest.mark.parametrize(
        ("flags", "errno"),
        [
            (LEAF | 0x80, Errno.EINVAL),
            (LEAF | 0x100, Errno.EINVAL),
            (LEAF | 0x8, Errno.EINVAL),
            (LEAF | 0x10, Errno.EINVAL),
            (READ_ONLY | 0xE00, 0),
            (0xFFE, 0),
        ],
    )
    def test_flags(self, guest: Guest, flags: int, errno: int) -> None:
        assert guest.update(guest.place(A), guest.entry(B, flags)) == -errno
        assert guest.now(A) == (guest.entry(A) if errno else guest.entry(B, flags))

    def test_high_flags_of_pae(self) -> None:
        (guest,) = guests(PAE)
        assert guest.update(guest.place(A), guest.entry(B, LEAF | NX)) == 0
        for bit in range(52, 63):
            assert guest.update(guest.place(A), guest.entry(B, LEAF | 1 << bit)) == -Errno.EINVAL
        for bit in range(36, 52):
            assert guest.update(guest.place(A), guest.entry(B) | 1 << bit) == -Errno.EPERM

    def test_two_level_ignores_the_upper_word(self) -> None:
        (guest,) = guests(TWO_LEVEL)
        assert guest.update(guest.place(A), guest.entry(B) | 0xFFFF_FFFF << 32) == 0
        assert guest.now(A) == guest.entry(B)

    def test_frames_of_others(self, mode: PagingMode) -> None:
        guest, other = guests(mode, 2)
        frames = guest.xen.frames
        cases = {
            "another domain's": (other.frames[A], Errno.EBUSY),
            "the hypervisor's": (frames.m2p_frames[0], Errno.EBUSY),
            "its own table of the hypervisor's": (guest.domain.own_tables[0], Errno.EBUSY),
            "a free one": (next(mfn for mfn in range(frames.count) if frames.owner[mfn] == -2), Errno.EBUSY),
            "none": (frames.count, Errno.EPERM),
            "far from any": (0xF_FFFF, Errno.EPERM),
        }
        for name, (mfn, errno) in cases.items():
            assert guest.update(guest.place(A), mode.entry(mfn, READ_ONLY)) == -errno, name
        assert guest.now(A) == guest.entry(A)
        assert len(guest.refusals()) == len(cases)

    def test_the_shared_page_may_be_mapped(self, guest: Guest) -> None:
        assert guest.update(guest.place(A), guest.mode.entry(guest.domain.shared_info_mfn, LEAF)) == 0

    def test_a_page_table_can_be_mapped_to_be_read_only(self, guest: Guest) -> None:
        table = guest.place(A) >> 12
        assert guest.update(guest.place(A), guest.mode.entry(table, READ_ONLY)) == 0
        assert guest.update(guest.place(A), guest.mode.entry(table, LEAF)) == -Errno.EBUSY
        assert guest.update(guest.place(A), guest.mode.entry(guest.root, LEAF)) == -Errno.EBUSY

    def test_a_flag_of_an_entry_in_use_is_checked_too(self, guest: Guest) -> None:
        """Same frame, same use: still no superpage."""
        assert guest.update(guest.place(A), guest.entry(A) | 0x80) == -Errno.EINVAL
        table_entry = _branch_place(guest)
        value = guest.mode.read(guest.xen.memory, table_entry & ~0xFFF, (table_entry & 0xFFF) // guest.mode.entry_size)
        assert guest.update(table_entry, value | 0x80) == -Errno.EINVAL

    def test_preserving_marks(self, guest: Guest) -> None:
        assert guest.update(guest.place(A) | 2, guest.entry(A, PRESENT | RW)) == 0
        assert guest.now(A) == guest.entry(A, LEAF)
        assert guest.update(guest.place(A), guest.entry(A, PRESENT | RW)) == 0
        assert guest.now(A) == guest.entry(A, PRESENT | RW)

    def test_machine_to_physical(self, guest: Guest) -> None:
        mfn = guest.frames[A]
        assert guest.xen.frames.m2p[mfn] == A
        assert guest.update(mfn << 12 | 1, 0x1234) == 0
        assert guest.xen.frames.m2p[mfn] == 0x1234
        assert guest.update(guest.xen.frames.count << 12 | 1, 5) == -Errno.EINVAL
        assert guest.update(1 << 12 | 1, 5) == -Errno.EINVAL

    def test_commands_that_do_not_exist(self, guest: Guest) -> None:
        for command in range(4, guest.mode.entry_size):
            assert guest.update(guest.place(A) | command, guest.entry(B)) == -Errno.ENOSYS
        assert guest.now(A) == guest.entry(A)

    def test_a_machine_address_that_needs_no_translation(self, guest: Guest) -> None:
        assert guest.update(guest.place(A) | MmuUpdate.NO_TRANSLATE, guest.entry(B)) == 0
        assert guest.now(A) == guest.entry(B)

    def test_a_frame_that_is_no_table_is_written_as_data(self, guest: Guest) -> None:
        assert guest.update(guest.frames[A] << 12, 0x1234_5678) == 0
        assert guest.word(guest.address(A)) == 0x1234_5678

    def test_a_frame_that_cannot_be_written_is_not(self, mode: PagingMode) -> None:
        guest, other = guests(mode, 2)
        for mfn in (other.frames[A], guest.xen.frames.m2p_frames[0], guest.xen.frames.count, 1 << 40):
            assert guest.update(mfn << 12, 0) == -Errno.EINVAL

    def test_the_first_refusal_ends_the_call(self, guest: Guest) -> None:
        bad = guest.mode.entry(guest.root, LEAF)
        batch = [(guest.place(A), guest.entry(B)), (guest.place(B), bad), (guest.place(C), guest.entry(A))]
        assert guest.updates(*batch) == (-Errno.EBUSY, 1)
        assert (guest.now(A), guest.now(B), guest.now(C)) == (guest.entry(B), guest.entry(B), guest.entry(C))

    @pytest.mark.parametrize("count", [0, 1, 16, 100, 300])
    def test_done_is_stored(self, guest: Guest, count: int) -> None:
        assert guest.updates(*[(guest.place(A), guest.entry(A))] * count) == (0, count)

    def test_wild_requests(self, guest: Guest) -> None:
        for address in (0x1000, 0xFC00_0000, 0xFFFF_FFF8, 0xC00F_FFF8):
            assert guest.call(Hypercall.mmu_update, address, 2, 0, DOMID_SELF) == -Errno.EFAULT
            assert guest.call(Hypercall.mmu_update, address, 100, 0, DOMID_SELF) == -Errno.EFAULT

    def test_a_wild_place_for_the_count_is_ignored(self, guest: Guest) -> None:
        for done in (0x1000, 0xFC00_0000, guest.vcpu.state.cr3):
            for count in (0, 1 << 31):
                assert guest.call(Hypercall.mmu_update, REQUESTS, count, done, DOMID_SELF) == 0

    def test_wild_later_elements(self, guest: Guest) -> None:
        """The array runs off the end of memory: what comes before is done and counted."""
        end = guest.address(256)
        batch = b"".join(
            number.to_bytes(8, "little") for update in [(guest.place(A), guest.entry(A))] * 20 for number in update
        )
        guest.write(end - len(batch), batch)
        assert guest.call(Hypercall.mmu_update, end - len(batch), 30, DONE, DOMID_SELF) == -Errno.EFAULT
        assert guest.word(DONE) == 20

    def test_other_domains(self, mode: PagingMode) -> None:
        control, other = guests(mode, 2, privileged=True)
        entry = mode.entry(other.frames[A], LEAF)
        assert control.update(control.place(A), entry, foreign=1) == 0
        assert other.update(other.place(A), other.mode.entry(control.frames[A], LEAF), foreign=0) == -Errno.EPERM
        for foreign, errno in ((5, Errno.ESRCH), (0, Errno.ESRCH), (DOMID_IO, Errno.EPERM), (DOMID_XEN, Errno.EPERM)):
            assert control.update(control.place(B), entry, foreign=foreign) == -errno
        # The tables of another domain, with pages of somebody else, and with its own.
        assert control.update(other.place(B), control.entry(A), foreign=2 << 16 | DOMID_SELF) == -Errno.EPERM
        assert control.update(other.place(B), other.entry(A), foreign=2 << 16 | 1) == 0
        assert other.now(B) == other.entry(A)
        assert other.update(control.place(B), 0, foreign=1 << 16 | DOMID_SELF) == -Errno.EPERM
        assert control.update(control.place(B), 0, foreign=9 << 16 | DOMID_SELF) == -Errno.EINVAL

    def test_whose_tables_may_be_said_of_oneself_by_number_only(self, mode: PagingMode) -> None:
        for number, guest in enumerate(guests(mode, 2, privileged=True)):
            assert guest.update(guest.place(A), guest.entry(B), foreign=number + 1 << 16 | DOMID_SELF) == 0
            foreign = DOMID_SELF + 1 << 16 | DOMID_SELF
            assert guest.update(guest.place(A), guest.entry(A), foreign=foreign) == -Errno.EINVAL
            assert guest.now(A) == guest.entry(B)

    def test_another_domains_frame_becomes_no_table(self, mode: PagingMode) -> None:
        """Its entries would be judged by what the domain owns that only borrows the frame."""
        control, other = guests(mode, 2, privileged=True)
        mfn, place = other.table(A, {}), _branch_place(control) + mode.entry_size
        assert control.update(place, mode.entry(mfn, TABLE), foreign=1) == -Errno.EINVAL
        assert control.update(place, 0, foreign=1) == -Errno.EINVAL
        assert other.xen.frames.type[mfn] == FrameType.NONE


def _branch_place(guest: Guest) -> int:
    """Machine address of the entry above the l1 table that maps page A."""
    mode, table = guest.mode, guest.root
    for level in mode.levels[:-2]:
        table = mode.frame_of(mode.read(guest.xen.memory, table << 12, level.index(guest.address(A))))
    return (table << 12) + mode.levels[-2].index(guest.address(A)) * mode.entry_size


class TestUpdateVaMapping:
    def test_flushes_as_asked(self, guest: Guest) -> None:
        counts = guest.xen.tlb.counts
        before = dict(counts)
        assert guest.map(A, guest.entry(B)) == 0
        assert guest.map(A, guest.entry(B), UvmFlags.INVLPG | UvmFlags.ALL) == 0
        assert guest.map(A, guest.entry(B), UvmFlags.TLB_FLUSH) == 0
        guest.write(REQUESTS, (0b1).to_bytes(4, "little"))
        assert guest.map(A, guest.entry(B), UvmFlags.TLB_FLUSH | REQUESTS) == 0
        guest.write(REQUESTS, (0b110).to_bytes(4, "little"))  # sets of vCPUs without the one that asks
        assert guest.map(A, guest.entry(B), UvmFlags.TLB_FLUSH | REQUESTS) == 0
        assert guest.map(A, guest.entry(B), UvmFlags.INVLPG | REQUESTS) == 0
        changed = {name: counts[name] - before[name] for name in counts if counts[name] != before[name]}
        assert changed == {"page": 1, "asked": 2}

    def test_a_wild_set_of_vcpus(self, guest: Guest) -> None:
        assert guest.map(A, guest.entry(B), UvmFlags.TLB_FLUSH | 0x1000) == -Errno.EFAULT

    @pytest.mark.parametrize("address", [0x1000, 0xBFFF_F000, 0xF580_0000, 0xFC00_0000, 0xFF00_E000, 0xFFFF_FFFF])
    def test_an_address_without_a_table(self, guest: Guest, address: int) -> None:
        assert guest.call(Hypercall.update_va_mapping, address, guest.entry(A), 0, 0) == -Errno.EINVAL

    def test_other_domains_pages(self, mode: PagingMode) -> None:
        control, other = guests(mode, 2, privileged=True)
        number, address = Hypercall.update_va_mapping_otherdomain, control.address(A)
        entry = mode.entry(other.frames[A], LEAF)
        assert control.call(number, address, entry, entry >> 32, 0, 1) == 0
        assert control.call(number, address, entry, entry >> 32, 0, 7) == -Errno.ESRCH
        assert other.call(number, address, entry, entry >> 32, 0, 0) == -Errno.EPERM
        other.write(other.address(A), b"seen")
        control.extended(MmuextOp.TLB_FLUSH_LOCAL)
        assert control.word(address).to_bytes(4, "little") == b"seen"

    def test_another_domains_page_outlives_it(self, mode: PagingMode) -> None:
        """Domain0 maps a page of a domain that ends: the frame is free only when Domain0 lets go."""
        control, other = guests(mode, 2, privileged=True)
        mfn, frames = other.frames[A], control.xen.frames
        entry = mode.entry(mfn, LEAF)
        control.call(Hypercall.update_va_mapping_otherdomain, control.address(A), entry, entry >> 32, 0, 1)
        control.xen.destroy(other.domain)
        assert frames.owner[mfn] not in (-2, 1)
        heir = Guest(control.xen, mode, 1, False)
        assert heir.domain.domid == 1
        assert mfn not in heir.frames
        assert control.map(A, 0) == 0
        assert frames.owner[mfn] == -2


class TestPinning:
    def test_a_pinned_table_stays_one(self, guest: Guest) -> None:
        mfn, frames = guest.table(A, {0: guest.entry(B), 5: guest.entry(C, READ_ONLY)}), guest.xen.frames
        assert guest.extended(MmuextOp.PIN_L1_TABLE, mfn) == 0
        assert (frames.type[mfn], frames.flags[mfn] & (PINNED | VALIDATED)) == (FrameType.L1, PINNED | VALIDATED)
        assert guest.map(A, guest.entry(A)) == -Errno.EBUSY
        assert guest.extended(MmuextOp.PIN_L1_TABLE, mfn) == -Errno.EINVAL
        assert guest.extended(MmuextOp.UNPIN_TABLE, mfn) == 0
        assert guest.extended(MmuextOp.UNPIN_TABLE, mfn) == -Errno.EINVAL
        assert guest.map(A, guest.entry(A)) == 0
        assert frames.uses[guest.frames[B]] == 1

    def test_a_table_that_is_mapped_writable(self, guest: Guest) -> None:
        assert guest.extended(MmuextOp.PIN_L1_TABLE, guest.frames[A]) == -Errno.EINVAL
        assert guest.map(A, guest.entry(A, READ_ONLY)) == 0
        assert guest.extended(MmuextOp.PIN_L1_TABLE, guest.frames[A]) == 0

    @pytest.mark.parametrize("place", [0, 3, 100, 511])
    def test_one_bad_entry_spoils_the_table(self, guest: Guest, place: int) -> None:
        good = {n: guest.entry(FREE_PFN + 20 + n % 50) for n in range(0, 512, 2)}
        frames, before = guest.xen.frames, None
        mfn = guest.table(A, {**good, place: guest.mode.entry(guest.root, LEAF)})
        before = frames.state()
        assert guest.extended(MmuextOp.PIN_L1_TABLE, mfn) == -Errno.EBUSY
        after = frames.state()
        assert {name: after[name] == before[name] for name in ("type", "uses", "refs", "flags")} == dict.fromkeys(
            ("type", "uses", "refs", "flags"), True
        )
        assert guest.refusals()[-1][:2] == (mfn, place)

    def test_levels_that_the_format_does_not_have(self, guest: Guest) -> None:
        mfn = guest.table(A, {})
        assert guest.extended(MmuextOp.PIN_L4_TABLE, mfn) == -Errno.EINVAL
        if guest.mode is TWO_LEVEL:
            assert guest.extended(MmuextOp.PIN_L3_TABLE, mfn) == -Errno.EINVAL

    def test_a_root_of_pae_needs_its_last_slot(self) -> None:
        (guest,) = guests(PAE)
        assert guest.extended(MmuextOp.PIN_L3_TABLE, guest.table(A, {})) == -Errno.EINVAL
        top = guest.table(B, {})
        root = guest.table(C, {3: PAE.entry(top, PRESENT)})
        assert guest.extended(MmuextOp.PIN_L3_TABLE, root) == 0
        assert guest.xen.frames.type[top] == FrameType.L2_TOP
        assert guest.extended(MmuextOp.UNPIN_TABLE, root) == 0
        assert guest.xen.frames.type[top] == FrameType.NONE

    def test_the_root_of_pae_loses_the_bits_that_hardware_reserves(self) -> None:
        (guest,) = guests(PAE)
        top = guest.table(B, {})
        root = guest.table(C, {3: PAE.entry(top, PRESENT | RW | ACCESSED | DIRTY | 4)})
        assert guest.extended(MmuextOp.PIN_L3_TABLE, root) == 0
        assert PAE.read(guest.xen.memory, root << 12, 3) == PAE.entry(top, PRESENT)

    def test_frames_that_are_not_the_guests(self, mode: PagingMode) -> None:
        guest, other = guests(mode, 2)
        for mfn in (other.frames[A], guest.xen.frames.count, 0xFFFF_FFFF, 0):
            for command in (*range(5), MmuextOp.NEW_BASEPTR, MmuextOp.CLEAR_PAGE):
                assert guest.extended(command, mfn) == -Errno.EINVAL

    def test_unpin_drops_the_whole_tree(self, guest: Guest) -> None:
        frames, leaf = guest.xen.frames, guest.table(A, {7: guest.entry(B)})
        if guest.mode is TWO_LEVEL:
            root = guest.table(C, {9: guest.mode.entry(leaf, TABLE)})
        else:
            top = guest.table(FREE_PFN + 5, {9: guest.mode.entry(leaf, TABLE)})
            root = guest.table(C, {3: guest.mode.entry(top, PRESENT)})
        assert guest.extended(guest.pin_root, root) == 0
        assert frames.type[leaf] == FrameType.L1
        assert frames.uses[guest.frames[B]] == 2
        assert guest.extended(MmuextOp.UNPIN_TABLE, root) == 0
        assert frames.type[leaf] == frames.type[root] == FrameType.NONE
        assert frames.uses[guest.frames[B]] == 1


class TestBasePointer:
    def test_a_new_root_is_validated_and_walked(self, guest: Guest) -> None:
        root = _copy_of_root(guest)
        flushes = guest.xen.tlb.counts["base pointer"]
        old = guest.root
        assert guest.extended(MmuextOp.NEW_BASEPTR, root) == 0
        assert guest.root == root
        assert guest.xen.tlb.counts["base pointer"] == flushes + 1
        assert guest.xen.frames.uses[old] == 1  # its pin
        guest.write(guest.address(A), b"x")  # it can still be walked

    def test_a_frame_that_is_no_root(self, guest: Guest) -> None:
        root = guest.root
        for mfn in (guest.frames[A], guest.place(A) >> 12):
            assert guest.extended(MmuextOp.NEW_BASEPTR, mfn) == -Errno.EINVAL
        assert guest.root == root

    def test_the_same_root_again(self, guest: Guest) -> None:
        uses = guest.xen.frames.uses[guest.root]
        assert guest.extended(MmuextOp.NEW_BASEPTR, guest.root) == 0
        assert guest.xen.frames.uses[guest.root] == uses

    def test_a_root_for_applications(self, guest: Guest) -> None:
        uses = guest.xen.frames.uses[guest.root]
        assert guest.extended(MmuextOp.NEW_USER_BASEPTR, guest.root) == 0
        assert guest.xen.frames.uses[guest.root] == uses + 1
        assert guest.extended(MmuextOp.NEW_USER_BASEPTR, guest.frames[A]) == -Errno.EINVAL
        assert guest.extended(MmuextOp.NEW_USER_BASEPTR, 0) == 0
        assert guest.xen.frames.uses[guest.root] == uses


def _copy_of_root(guest: Guest) -> int:
    """A root table with the guest's entries of the old one; in PAE mode with the same tables below."""
    size, slots = guest.mode.entry_size, guest.mode.levels[0].entries if guest.mode is PAE else 1008
    entries = {n: guest.mode.read(guest.xen.memory, guest.root << 12, n) for n in range(slots)}
    assert size
    return guest.table(A + 3, {n: entry for n, entry in entries.items() if entry})


class TestReservedSlots:
    def test_the_hypervisors_entries_cannot_be_changed(self, guest: Guest) -> None:
        mode, top = guest.mode, _branch_place(guest) >> 12
        first = 1008 if mode is TWO_LEVEL else 428
        for index in (first, first + 1, 4096 // mode.entry_size - 1):
            assert guest.update((top << 12) + index * mode.entry_size, 0) == -Errno.EPERM
        assert guest.update((top << 12) + (first - 1) * mode.entry_size, 0) == 0

    def test_the_last_slot_of_a_root_of_pae(self) -> None:
        (guest,) = guests(PAE)
        assert guest.update((guest.root << 12) + 24, 0) == -Errno.EINVAL
        assert guest.update((guest.root << 12) + 32, 0) == -Errno.EINVAL

    def test_what_the_guest_put_there_is_gone(self, guest: Guest) -> None:
        """A new top table with entries in the hypervisor's range."""
        mode, first = guest.mode, 1008 if guest.mode is TWO_LEVEL else 428
        bad = {first + n: mode.entry(guest.frames[B], TABLE) for n in range(4)}
        mfn = guest.table(A, bad)
        root = mfn if mode is TWO_LEVEL else guest.table(C, {3: mode.entry(mfn, PRESENT)})
        assert guest.extended(guest.pin_root, root) == 0
        assert mode.read(guest.xen.memory, mfn << 12, first) == guest.domain.hypervisor_slots[first]
        assert mode.read(guest.xen.memory, mfn << 12, first + 1) == 0
        assert guest.extended(MmuextOp.UNPIN_TABLE, root) == 0
        assert mode.read(guest.xen.memory, mfn << 12, first) == 0


class TestLinearTables:
    def test_a_table_that_names_itself(self, guest: Guest) -> None:
        mode, top = guest.mode, _branch_place(guest) >> 12
        at = (top << 12) + 5 * mode.entry_size
        uses = guest.xen.frames.uses[top]
        assert guest.update(at, mode.entry(top, PRESENT | RW)) == -Errno.EINVAL
        assert guest.update(at, mode.entry(top, PRESENT)) == 0
        assert guest.xen.frames.uses[top] == uses
        shift = mode.levels[-2].shift
        window = (3 << 30 if mode is PAE else 0) + (5 << shift)
        guest.extended(MmuextOp.TLB_FLUSH_LOCAL)
        own_leaf = window + (mode.levels[-2].index(guest.address(A)) << 12)
        index = mode.levels[-1].index(guest.address(A))
        assert guest.word(own_leaf + index * mode.entry_size) == guest.now(A) & 0xFFFF_FFFF
        with pytest.raises(LostPageError):
            guest.write(own_leaf, b"x")
        assert guest.update(at, 0) == 0
        assert guest.xen.frames.uses[top] == uses

    def test_tables_that_name_others(self) -> None:
        (guest,) = guests(PAE)
        one, two, three = (guest.table(FREE_PFN + n, {}) for n in range(3))
        for mfn in (one, two, three):
            assert guest.extended(MmuextOp.PIN_L2_TABLE, mfn) == 0
        assert guest.update(one << 12, PAE.entry(two, PRESENT)) == 0
        assert guest.xen.frames.uses[two] == 2
        # Neither a chain nor a ring.
        assert guest.update(two << 12, PAE.entry(three, PRESENT)) == -Errno.EINVAL
        assert guest.update(three << 12, PAE.entry(one, PRESENT)) == -Errno.EINVAL
        assert guest.update(two << 12, PAE.entry(one, PRESENT)) == -Errno.EINVAL
        assert guest.extended(MmuextOp.UNPIN_TABLE, two) == 0
        assert guest.xen.frames.type[two] == FrameType.L2
        assert guest.extended(MmuextOp.UNPIN_TABLE, one) == 0
        assert guest.xen.frames.type[two] == FrameType.NONE
        assert guest.extended(MmuextOp.UNPIN_TABLE, three) == 0


class TestOtherCommands:
    def test_unknown_ones(self, guest: Guest) -> None:
        for command in (14, 18, 21, 99, 0xFFFF_FFFF):
            assert guest.extended(command) == -Errno.ENOSYS

    def test_clear_and_copy(self, guest: Guest) -> None:
        guest.write(guest.address(A), b"data" * 1024)
        assert guest.extended(MmuextOp.COPY_PAGE, guest.frames[B], guest.frames[A]) == 0
        assert guest.word(guest.address(B)) == int.from_bytes(b"data", "little")
        assert guest.extended(MmuextOp.CLEAR_PAGE, guest.frames[B]) == 0
        assert guest.word(guest.address(B)) == 0
        assert guest.extended(MmuextOp.CLEAR_PAGE, guest.root) == -Errno.EINVAL
        assert guest.extended(MmuextOp.COPY_PAGE, guest.frames[B], 1) == -Errno.EINVAL

    def test_flushes_are_for_oneself(self, mode: PagingMode) -> None:
        control, _other = guests(mode, 2, privileged=True)
        for command in (MmuextOp.TLB_FLUSH_LOCAL, MmuextOp.NEW_BASEPTR, MmuextOp.SET_LDT, MmuextOp.FLUSH_CACHE):
            assert control.extended(command, foreign=1) == -Errno.EPERM
        assert control.extended(MmuextOp.FLUSH_CACHE) == -Errno.EACCES
        assert control.extended(MmuextOp.INVLPG_MULTI, control.address(A), 0x1000) == -Errno.EFAULT
        assert control.extended(MmuextOp.INVLPG_MULTI, control.address(A), REQUESTS) == 0

    def test_pins_for_another_domain(self, mode: PagingMode) -> None:
        control, other = guests(mode, 2, privileged=True)
        mfn = other.table(A, {})
        assert control.extended(MmuextOp.PIN_L1_TABLE, mfn) == -Errno.EINVAL
        assert control.extended(MmuextOp.PIN_L1_TABLE, mfn, foreign=1) == 0
        assert control.extended(MmuextOp.UNPIN_TABLE, mfn, foreign=1) == 0


class TestPreemption:
    """A tree of more tables than one call may check."""

    COUNT = 300

    def tree(self) -> tuple[Guest, int, list[int]]:
        (guest,) = guests(TWO_LEVEL, memory_mib=2, machine_mib=8)
        leaves = [guest.table(100 + n, {n: guest.entry(90)}) for n in range(self.COUNT)]
        return guest, guest.table(99, {n: guest.mode.entry(leaf, TABLE) for n, leaf in enumerate(leaves)}), leaves

    def test_the_call_is_made_again_until_it_is_done(self) -> None:
        guest, root, leaves = self.tree()
        assert guest.extended(MmuextOp.PIN_L2_TABLE, root) == 0
        assert guest.continued > 0
        frames = guest.xen.frames
        assert frames.uses[root] == 1
        assert all(frames.flags[leaf] & VALIDATED for leaf in leaves)
        assert frames.uses[guest.frames[90]] == self.COUNT + 1
        assert guest.xen.page_tables.partial == {}

    def half_done(self) -> tuple[Guest, int, list[int]]:
        guest, root, leaves = self.tree()
        guest.write(REQUESTS, b"".join(word.to_bytes(4, "little") for word in (MmuextOp.PIN_L2_TABLE, root, 0)))
        assert not guest.call_once(Hypercall.mmuext_op, REQUESTS, 1, DONE, DOMID_SELF)
        assert guest.xen.page_tables.partial
        return guest, root, leaves

    def test_a_half_checked_table_is_of_no_use(self) -> None:
        guest, root, _leaves = self.half_done()
        frames = guest.xen.frames
        assert not frames.flags[root] & VALIDATED
        assert guest.map(99, guest.mode.entry(root, LEAF)) == -Errno.EBUSY
        assert guest.extended(MmuextOp.PIN_L1_TABLE, root) == -Errno.EINVAL
        assert guest.update(root << 12, 0) == -Errno.EINVAL
        assert guest.extended(MmuextOp.UNPIN_TABLE, root) == -Errno.EINVAL

    def test_another_way_in_goes_on_where_the_first_stopped(self) -> None:
        guest, root, leaves = self.half_done()
        assert guest.extended(MmuextOp.NEW_BASEPTR, guest.root) == 0
        old = guest.root
        assert guest.extended(MmuextOp.NEW_USER_BASEPTR, root) == 0
        assert guest.root == old
        assert guest.xen.frames.uses[root] == 1
        assert guest.xen.frames.flags[root] & VALIDATED
        assert guest.xen.frames.uses[leaves[0]] == 1

    def test_the_domain_may_end_in_the_middle(self) -> None:
        guest, _root, _leaves = self.half_done()
        xen = guest.xen
        free = xen.frames.free_frames
        xen.destroy(guest.domain)
        assert xen.frames.free_frames == free + 512 + 2

    def test_a_bad_end_takes_the_good_beginning_back(self) -> None:
        guest, root, leaves = self.tree()
        last = self.COUNT + 2
        bad = guest.mode.entry(guest.frames[50], TABLE)  # mapped writable
        guest.mode.write(guest.xen.memory, root << 12, last, bad)
        assert guest.extended(MmuextOp.PIN_L2_TABLE, root) == -Errno.EINVAL
        assert guest.continued > 0
        frames = guest.xen.frames
        assert not any(frames.type[mfn] for mfn in (root, *leaves))
        assert frames.uses[guest.frames[90]] == 1

    def test_inside_a_batch(self) -> None:
        guest, root, _leaves = self.tree()
        request = b"".join(word.to_bytes(4, "little") for word in (MmuextOp.PIN_L2_TABLE, root, 0))
        guest.write(REQUESTS + 0x800, request)
        words = [Hypercall.mmuext_op, 0, REQUESTS + 0x800, 1, 0, DOMID_SELF, 0, 0]
        words += [Hypercall.xen_version, 0, 7, 0, 0, 0, 0, 0]
        guest.write(REQUESTS, b"".join(word.to_bytes(4, "little") for word in words))
        assert guest.call(Hypercall.multicall, REQUESTS, 2) == 0
        assert guest.continued > 0
        assert (guest.word(REQUESTS + 4), guest.word(REQUESTS + 36)) == (0, 4096)
        assert guest.xen.frames.flags[root] & PINNED

    def test_long_batches_are_done_in_parts(self) -> None:
        (guest,) = guests(TWO_LEVEL, memory_mib=2)
        entry = b"".join(word.to_bytes(4, "little") for word in (Hypercall.xen_version, 0, 7, 0, 0, 0, 0, 0))
        guest.write(guest.address(100), entry * 3000)
        assert guest.call(Hypercall.multicall, guest.address(100), 3000) == 0
        assert guest.continued >= 2
        assert guest.word(guest.address(100) + 2999 * 32 + 4) == 4096


def test_a_freed_number_is_nobodys(guest: Guest) -> None:
    frames = guest.xen.frames
    free = [mfn for mfn in range(frames.count) if frames.owner[mfn] == -2]
    assert all(frames.m2p[mfn] == NO_PFN for mfn in free)
    # Owned, written by the hypervisor, and mapped by the builder.
    assert frames.refs[guest.domain.shared_info_mfn] == 3
    assert frames.type[guest.domain.shared_info_mfn] == Use.WRITE
