"""Each invariant broken on purpose, behind the mechanisms' back: the auditor says which one, and where."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from memory_bench import FREE_PFN, LEAF, LISTS, READ_ONLY, RW, TABLE, Guest, guests

from xenlab.abi.numbers import Hypercall
from xenlab.errors import InvariantError
from xenlab.hypervisor.auditor import Invariant, audit, check, describe_entry
from xenlab.machine.paging import NX, PAE, PRESENT, TWO_LEVEL, PagingMode

A, B = FREE_PFN, FREE_PFN + 1
Undo = Callable[[], None]


def store(guest: Guest, at: int, value: int) -> Undo:
    """Write an entry past everybody; how to take it back."""
    mode, memory = guest.mode, guest.xen.memory
    table, index = at & ~0xFFF, (at & 0xFFF) // mode.entry_size
    before = mode.read(memory, table, index)
    mode.write(memory, table, index, value)
    return lambda: mode.write(memory, table, index, before)


def leaf_to_root(guest: Guest) -> Undo:
    return store(guest, guest.place(A), guest.mode.entry(guest.root, LEAF))


def leaf_to_the_hypervisor(guest: Guest) -> Undo:
    return store(guest, guest.place(A), guest.mode.entry(guest.domain.own_tables[0], READ_ONLY))


def leaf_to_a_free_frame(guest: Guest) -> Undo:
    free = guest.xen.frames.owner.index(-2)
    return store(guest, guest.place(A), guest.mode.entry(free, READ_ONLY))


def leaf_to_nowhere(guest: Guest) -> Undo:
    return store(guest, guest.place(A), guest.mode.entry(guest.xen.frames.count + 5, READ_ONLY))


def cached_leaf(guest: Guest) -> Undo:
    return store(guest, guest.place(A), guest.entry(A) | 0x10)


def superpage(guest: Guest) -> Undo:
    at = above(guest)
    value = guest.mode.read(guest.xen.memory, at & ~0xFFF, (at & 0xFFF) // guest.mode.entry_size)
    return store(guest, at, value | 0x80)


def table_of_pages(guest: Guest) -> Undo:
    """A page of data, mapped writable, named as an l1 table."""
    return store(guest, above(guest) - guest.mode.entry_size, guest.mode.entry(guest.frames[A], TABLE))


def two_levels(guest: Guest) -> Undo:
    leaf = guest.place(A) >> 12
    guest.xen.frames.flags[leaf] |= 2
    guest.xen.frames.type[leaf] = 2 if guest.mode is PAE else 4

    def undo() -> None:
        guest.xen.frames.flags[leaf] &= ~2
        guest.xen.frames.type[leaf] = 1

    return undo


def hypervisor_slot(guest: Guest) -> Undo:
    last = 4096 // guest.mode.entry_size - 1
    at = (above(guest) & ~0xFFF) + last * guest.mode.entry_size
    return store(guest, at, guest.mode.entry(guest.frames[A], TABLE))


def writable_descriptors(guest: Guest) -> Undo:
    at = (guest.domain.own_tables[0] << 12) + 14 * guest.mode.entry_size
    value = guest.mode.read(guest.xen.memory, at & ~0xFFF, 14)
    return store(guest, at, value | RW)


def ring_0_descriptor(guest: Guest) -> Undo:
    guest.map(A, guest.entry(A, READ_ONLY))
    guest.write(LISTS, struct.pack("<I", guest.frames[A]))
    assert guest.call(Hypercall.set_gdt, LISTS, 512) == 0
    at = guest.frames[A] << 9
    guest.xen.memory.qwords[at + 1] = 0x00CF_9B00_0000_FFFF
    return lambda: guest.xen.memory.qwords.__setitem__(at + 1, 0)


def listed_as_free(guest: Guest) -> Undo:
    guest.xen.frames._free.append(guest.frames[A])
    return lambda: guest.xen.frames._free.remove(guest.frames[A])


def dirty_free_frame(guest: Guest) -> Undo:
    mfn = guest.xen.frames.owner.index(-2)
    guest.xen.frames.left[mfn] = 0
    guest.xen.memory.bytes[mfn << 12] = 1

    def undo() -> None:
        guest.xen.memory.bytes[mfn << 12] = 0

    return undo


def forgotten_count(guest: Guest) -> Undo:
    guest.xen.frames.uses[guest.frames[A]] += 1
    return lambda: guest.xen.frames.uses.__setitem__(guest.frames[A], 1)


def lost_page(guest: Guest) -> Undo:
    guest.domain.pages -= 1

    def undo() -> None:
        guest.domain.pages += 1

    return undo


def stale_translation(guest: Guest) -> Undo:
    guest.word(guest.address(A))
    free = guest.xen.frames.owner.index(-2) << 12
    key = guest.address(A) >> 12
    before = guest.vcpu.translations[key]
    guest.vcpu.translations[key] = free
    return lambda: guest.vcpu.translations.__setitem__(key, before)


def above(guest: Guest) -> int:
    """Machine address of the entry above the l1 table that maps page A."""
    mode, table = guest.mode, guest.root
    for level in mode.levels[:-2]:
        table = mode.frame_of(mode.read(guest.xen.memory, table << 12, level.index(guest.address(A))))
    return (table << 12) + mode.levels[-2].index(guest.address(A)) * mode.entry_size


BREAKS = {
    leaf_to_root: Invariant.EXCLUSIVE,
    leaf_to_the_hypervisor: Invariant.OWNERSHIP,
    leaf_to_a_free_frame: Invariant.OWNERSHIP,
    leaf_to_nowhere: Invariant.OWNERSHIP,
    cached_leaf: Invariant.FLAGS,
    superpage: Invariant.FLAGS,
    table_of_pages: Invariant.EXCLUSIVE,
    two_levels: Invariant.ONE_LEVEL,
    hypervisor_slot: Invariant.RANGE,
    writable_descriptors: Invariant.RANGE,
    ring_0_descriptor: Invariant.DESCRIPTORS,
    listed_as_free: Invariant.FREE,
    dirty_free_frame: Invariant.FREE,
    forgotten_count: Invariant.COUNTS,
    lost_page: Invariant.COUNTS,
    stale_translation: Invariant.TLB,
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_it_is_found_and_named(damage: Callable[[Guest], Undo], mode: PagingMode) -> None:
    (guest,) = guests(mode)
    guest.run_me()
    if damage is table_of_pages and mode is PAE:
        pytest.skip("the entry before the first one of the only l2 table is in the root")
    undo = damage(guest)
    found = audit(guest.xen)
    undo()
    assert BREAKS[damage] in {violation.invariant for violation in found}
    assert audit(guest.xen) == []


def test_every_invariant_is_broken_by_something() -> None:
    assert {*BREAKS.values(), Invariant.TABLES_OWNED} == set(Invariant)


def test_tables_of_others(mode: PagingMode) -> None:
    guest, other = guests(mode, 2)
    undo = store(guest, above(guest), mode.entry(other.place(A) >> 12, TABLE))
    found = {violation.invariant for violation in audit(guest.xen)}
    undo()
    assert Invariant.TABLES_OWNED in found


def test_check_says_what_where_and_decoded() -> None:
    (guest,) = guests(TWO_LEVEL)
    undo = store(guest, guest.place(A), guest.mode.entry(guest.xen.frames.m2p_frames[0], READ_ONLY))
    with pytest.raises(InvariantError, match="neither owns nor was allowed to map: entry ") as caught:
        check(guest.xen)
    undo()
    assert caught.value.invariant == "OWNERSHIP"
    assert "present, accessed, dirty (frame 0x10, the hypervisor's" in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "entry", "text"),
    [
        (TWO_LEVEL, 0x1E2067, "0x1e2067: frame 0x1e2, present, writable, user, accessed, dirty"),
        (TWO_LEVEL, 0x1E2066, "0x1e2066: not present"),
        (TWO_LEVEL, 0x1000199, "0x1000199: frame 0x1000, present, write-through, uncached, superpage, global"),
        (PAE, 0x5000 | NX | PRESENT, "0x8000000000005001: frame 0x5, present, no-execute"),
    ],
)
def test_entries_in_words(mode: PagingMode, entry: int, text: str) -> None:
    assert describe_entry(mode, entry) == text


def test_an_audit_changes_nothing(mode: PagingMode) -> None:
    (guest,) = guests(mode)
    before = guest.xen.snapshot()["frames"], bytes(guest.xen.memory.bytes)
    assert audit(guest.xen) == []
    assert (guest.xen.snapshot()["frames"], bytes(guest.xen.memory.bytes)) == before
