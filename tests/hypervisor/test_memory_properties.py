"""Random sequences of all memory hypercalls; batches against single updates; counts against a naive model."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_bench import DONE, FREE_PFN, LEAF, LISTS, PRESENT, READ_ONLY, REQUESTS, TABLE, Guest, LostPageError, guests

from xenlab.abi.numbers import DOMID_SELF, Hypercall, MemoryOp, MmuextOp
from xenlab.errors import HypercallError
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FrameTable, FrameType
from xenlab.hypervisor.page_entries import Use, judge_entry
from xenlab.hypervisor.page_types import GRANTED, REFUSED, UNTYPED, UNUSED, VALIDATE, FrameTypes
from xenlab.machine.memory import Memory
from xenlab.machine.paging import NX, PAE, TWO_LEVEL, PagingMode


class Naive:
    """The plainest part for the slot: every single use in a list, and asked entry by entry.

    Attributes:
        kept: the uses of each frame.
    """

    def __init__(self, most_uses: int = 1 << 26) -> None:
        self.kept: dict[int, list[int]] = {}
        self._most = most_uses

    def entry(self, level: str, flags: int, domid: int, owner: int) -> int:
        return judge_entry(level, flags, domid, owner)

    def take(self, mfn: int, use: int) -> int:
        uses = self.kept.setdefault(mfn, [])
        typed = [other for other in uses if other]
        if len(uses) >= self._most or (use and typed and typed[0] != use):
            return REFUSED
        uses.append(use)
        return VALIDATE if use and not typed and use != Use.WRITE else GRANTED

    def drop(self, mfn: int, use: int) -> int:
        uses = self.kept[mfn]
        uses.remove(use)
        return UNTYPED * (bool(use) and use not in uses) + UNUSED * (not uses)

    def columns(self, count: int) -> tuple[list[int], list[int]]:
        """`uses` and `refs` as the frame table keeps them."""
        uses = [sum(1 for use in self.kept.get(mfn, ()) if use) for mfn in range(count)]
        return uses, [len(self.kept.get(mfn, ())) for mfn in range(count)]


def one_by_one(mode: PagingMode) -> Guest:
    """A guest on a machine whose page types know no arrays."""
    return guests(mode, page_types=Naive())[0]


# What an update does to which of a few entries: kind, entry, page, flags.
UPDATE = st.tuples(
    st.sampled_from(["plain"] * 12 + ["marks", "m2p", "odd", "wild", "root", "data", "superpage", "foreign", "lost"]),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sampled_from([LEAF, LEAF, READ_ONLY, 0, PRESENT, LEAF | 4, 0xFFE]),
)


def updates_for(guest: Guest, recipe: list[tuple[str, int, int, int]]) -> list[tuple[int, int]]:
    """The same updates on either machine, which deal out the same frames."""
    made = []
    for kind, place, page, flags in recipe:
        pointer, value = guest.place(FREE_PFN + place), guest.entry(FREE_PFN + page, flags)
        if kind == "marks":
            pointer |= 2
        elif kind == "m2p":
            pointer, value = guest.frames[FREE_PFN + page] << 12 | 1, place
        elif kind == "odd":
            pointer |= 3
        elif kind == "wild":
            pointer = 1 << 45 | place
        elif kind == "root":
            value = guest.mode.entry(guest.root, flags)
        elif kind == "data":
            pointer = guest.frames[FREE_PFN + page] << 12
        elif kind == "superpage":
            value |= 0x80
        elif kind == "foreign":
            value = guest.mode.entry(guest.xen.frames.m2p_frames[0], flags)
        elif kind == "lost":
            value = guest.mode.entry(guest.frames[FREE_PFN + 61], flags)
        made.append((pointer, value))
    return made


def everything(guest: Guest) -> tuple[Any, ...]:
    """All that an update may change."""
    xen = guest.xen
    state = xen.frames.state()
    if isinstance(xen.page_types, Naive):
        uses, refs = xen.page_types.columns(xen.frames.count)
    else:
        uses, refs = list(state["uses"]), list(state["refs"])
    del state["uses"], state["refs"]
    memory = b"".join(bytes(xen.memory.frame(mfn)) for mfn in range(xen.frames.count) if xen.frames.owner[mfn] != -2)
    stale = {mfn for mfn, left in enumerate(state.pop("left")) if left == xen.cpu.flushes}
    return uses, refs, memory, state, stale, dict(xen.tlb.counts), guest.domain.pages


@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
@settings(max_examples=120)
@given(recipe=st.lists(UPDATE, min_size=1, max_size=200), runs=st.lists(st.integers(0, 60), max_size=2))
def test_batches_are_what_single_updates_are(
    mode: PagingMode, recipe: list[tuple[str, int, int, int]], runs: list[int]
) -> None:
    """State, errno and count of a batch on arrays equal those of the same batch one by one."""
    for start in runs:  # long runs of ordinary updates, which a random list seldom has
        recipe = [("plain", (start + n) % 61, (start + 3 * n) % 61, LEAF) for n in range(30)] + recipe
    pair = (guests(mode)[0], one_by_one(mode))
    results = []
    for guest in pair:
        # A page that is given up while it is mapped: it must not come back by a batch.
        guest.write(LISTS + 64, struct.pack("<I", guest.frames[FREE_PFN + 61]))
        guest.write(LISTS, struct.pack("<IIIII", LISTS + 64, 1, 0, 0, DOMID_SELF))
        assert guest.call(Hypercall.memory_op, MemoryOp.DECREASE_RESERVATION, LISTS) == 1
        results.append(guest.updates(*updates_for(guest, recipe)))
        check(guest.xen)
    assert results[0] == results[1]
    assert everything(pair[0]) == everything(pair[1])


@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
@settings(max_examples=60)
@given(
    entries=st.dictionaries(
        st.integers(0, 511),
        st.tuples(st.integers(0, 60), st.sampled_from([LEAF, LEAF, LEAF, READ_ONLY, 0xFFE, LEAF | 0x80, LEAF | 8])),
        max_size=80,
    ),
    odd=st.sampled_from([None, None, None, "root", "hypervisor", "beyond"]),
)
def test_whole_tables_are_what_their_entries_are(
    mode: PagingMode, entries: dict[int, tuple[int, int]], odd: str | None
) -> None:
    """Pinning a table on arrays equals pinning it entry by entry, and so does unpinning."""
    results = []
    for guest in (guests(mode)[0], one_by_one(mode)):
        page = {index: guest.entry(FREE_PFN + pfn, flags) for index, (pfn, flags) in entries.items()}
        if odd:
            mfn = {"root": guest.root, "hypervisor": 20, "beyond": guest.xen.frames.count + 7}[odd]
            page[77] = mode.entry(mfn, LEAF)
        mfn = guest.table(FREE_PFN + 70, page)
        results.append((guest.extended(MmuextOp.PIN_L1_TABLE, mfn), everything(guest)))
        check(guest.xen)
        results.append((guest.extended(MmuextOp.UNPIN_TABLE, mfn), everything(guest)))
        check(guest.xen)
    assert results[:2] == results[2:]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 5), st.sampled_from(list(Use))),
        max_size=60,
    )
)
def test_counts_are_those_of_a_naive_model(steps: list[tuple[bool, int, Use]]) -> None:
    """Against a model that keeps every single use in a list."""
    frames, naive = FrameTable(Memory(1)), Naive(most_uses=8)
    types = FrameTypes(frames, most_uses=8)
    for taking, mfn, use in steps:
        if taking:
            assert types.take(mfn, use) == naive.take(mfn, use)
        elif use in naive.kept.get(mfn, ()):
            assert types.drop(mfn, use) == naive.drop(mfn, use)
        typed = [other for other in naive.kept.get(mfn, ()) if other]
        assert (list(frames.uses), list(frames.refs)) == naive.columns(frames.count)
        assert frames.type[mfn] == (typed[0] if typed else FrameType.NONE)


class Storm:
    """Domains that call whatever comes to their mind, now and then with sense."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        mode = self.random.choice((TWO_LEVEL, PAE))
        self.guests = guests(mode, 3, privileged=True, machine_mib=6)
        self.xen = self.guests[0].xen
        self.others = [PAE if mode is TWO_LEVEL else TWO_LEVEL]
        self.guests.append(Guest(self.xen, self.others[0], 1, False))
        self.operations = 0

    def frame(self, guest: Guest) -> int:
        """Mostly a page of the guest's that nothing important lies in."""
        pick = self.random.random()
        if pick < 0.8:
            return self.random.choice(self.xen.frames.owned_by(guest.domain.domid) or [0])
        if pick < 0.9:
            return guest.frames[FREE_PFN + self.random.randrange(30)]
        return self.random.choice(
            (self.random.choice(self.guests).root, self.random.randrange(self.xen.frames.count), 1 << 20)
        )

    def page(self, guest: Guest) -> int:
        """A frame of a few that are used again and again, so that sequences hit the same one."""
        if self.random.random() < 0.85:
            return guest.frames[FREE_PFN + self.random.randrange(24)]
        return self.frame(guest)

    def flags(self, guest: Guest) -> int:
        choices = [LEAF, LEAF, LEAF, READ_ONLY, READ_ONLY, TABLE, PRESENT, 0, LEAF | 0x80, LEAF | 0x100, 0xFFE]
        if guest.mode is PAE:
            choices += [LEAF | NX, PRESENT, PRESENT]
        return self.random.choice(choices)

    def value(self, guest: Guest) -> int:
        return guest.mode.entry(self.page(guest), self.flags(guest)) & (1 << 8 * guest.mode.entry_size) - 1

    def pointer(self, guest: Guest) -> int:
        index = self.random.choice((self.random.randrange(32), self.random.randrange(1024)))
        at = (self.page(guest) << 12) + index * guest.mode.entry_size % 4096
        if self.random.random() < 0.3:
            at = self.leaf(guest)
        return at | self.random.choice((0,) * 12 + (1, 2, 3, 4))

    def leaf(self, guest: Guest) -> int:
        """The entry for one of the guest's free pages, if it can still be found."""
        try:
            return guest.place(FREE_PFN + self.random.randrange(40))
        except HypercallError:  # the guest has unmapped its own tables
            return 0

    def update(self, guest: Guest) -> None:
        count = self.random.choice((1, 1, 2, 5, 40))
        batch = [(self.pointer(guest), self.value(guest)) for _ in range(count)]
        if self.random.random() < 0.3:
            start = self.leaf(guest)
            batch = [(start + n * guest.mode.entry_size, self.value(guest)) for n in range(count)]
        foreign = self.random.choice((DOMID_SELF,) * 8 + (0, 1, 2, 2 << 16 | 1, 1 << 16 | DOMID_SELF))
        _result, done = guest.updates(*batch, foreign=foreign)
        self.operations += min(done, count) + 1

    def extended(self, guest: Guest) -> None:
        known = (0, 1, 2, 3, 4, 4, 5, 15, 6, 7, 16, 17, 13)
        commands = [self.random.choice(known) for _ in range(self.random.choice((1, 1, 3)))]
        words = [(command, self.page(guest), self.page(guest)) for command in commands]
        guest.write(REQUESTS, b"".join(struct.pack("<III", *operation) for operation in words))
        foreign = self.random.choice((DOMID_SELF,) * 8 + (1, 3))
        guest.call(Hypercall.mmuext_op, REQUESTS, len(words), DONE, foreign)
        self.operations += len(words)

    def va(self, guest: Guest) -> None:
        address = guest.address(FREE_PFN + self.random.randrange(60))
        if self.random.random() < 0.1:
            address = self.random.randrange(1 << 32)
        entry, number = self.value(guest), Hypercall.update_va_mapping
        flags = self.random.choice((0, 0, 1, 2, 6, 3, 0x1001))
        if self.random.random() < 0.2:
            number = Hypercall.update_va_mapping_otherdomain
        guest.call(number, address, entry, entry >> 32, flags, self.random.randrange(5))
        self.operations += 1

    def memory(self, guest: Guest) -> None:
        command = self.random.choice((0, 1, 1, 6, 6, 11, 3, 4, 2, 12))
        order = self.random.choice((0,) * 8 + (1, 3, 40))
        count = self.random.choice((1, 1, 3))
        numbers = [self.page(guest) if command in (1, 11) else FREE_PFN + self.random.randrange(60) for _ in range(8)]
        guest.write(LISTS + 64, struct.pack("<8I", *numbers))
        out = struct.pack("<IIIII", LISTS + 64 + 16, count, order, 0, DOMID_SELF) + bytes(4)
        domid = self.random.choice((DOMID_SELF,) * 8 + (0, 1, 77))
        guest.write(LISTS, struct.pack("<IIIII", LISTS + 64, count, order, 0, domid) + out)
        guest.call(Hypercall.memory_op, command, LISTS)
        self.operations += count

    def descriptors(self, guest: Guest) -> None:
        if self.random.random() < 0.5:
            frames = [self.page(guest) for _ in range(2)]
            guest.write(LISTS, struct.pack("<2I", *frames))
            guest.call(Hypercall.set_gdt, LISTS, self.random.choice((0, 5, 512, 700, 1024, 9000)))
        else:
            address = (self.page(guest) << 12) + self.random.randrange(0, 4096, 4)
            words = self.random.choice(((0xFFFF, 0x00CF_FA00), (0xFFFF, 0x00CF_9A00), (0, 0xE900), (1, 0x8C00), (0, 0)))
            guest.call(Hypercall.update_descriptor, address, 0, *words)
        self.operations += 1

    def contents(self, guest: Guest) -> None:
        """The guest fills a page of its own with what might be a page table."""
        pfn = FREE_PFN + self.random.randrange(24)
        size = guest.mode.entry_size
        page = bytearray(4096)
        for _ in range(self.random.choice((0, 1, 4, 30))):
            index = self.random.randrange(4096 // size)
            page[index * size : (index + 1) * size] = self.value(guest).to_bytes(size, "little")
        guest.write(guest.address(pfn), bytes(page))

    def table(self, guest: Guest) -> None:
        """With sense: a table of some level is written, unmapped, mostly without a flush, and pinned or loaded."""
        pick, mode = self.random, guest.mode
        pfn = FREE_PFN + pick.randrange(24)
        level = pick.choice((1, 1, 1, 2, 2, 3))
        mfn, size = guest.frames[pfn], mode.entry_size
        page = bytearray(4096)
        for index, entry in self.plausible(guest, level, mfn):
            page[index * size : (index + 1) * size] = entry.to_bytes(size, "little")
        guest.write(guest.address(pfn), bytes(page))
        guest.map(pfn, 0, pick.choice((0, 0, 2)))
        guest.extended(level - 1, mfn)
        if pick.random() < 0.3:
            guest.extended(pick.choice((MmuextOp.NEW_BASEPTR, MmuextOp.NEW_USER_BASEPTR)), mfn)
        if pick.random() < 0.4:
            guest.extended(MmuextOp.UNPIN_TABLE, mfn)
        self.operations += 3

    def plausible(self, guest: Guest, level: int, mfn: int) -> list[tuple[int, int]]:
        """Entries that such a table may have."""
        pick, mode = self.random, guest.mode
        of_type = self.xen.frames.type
        pages = [guest.frames[FREE_PFN + n] for n in range(24)]
        if level == 1:
            return [
                (pick.randrange(512), mode.entry(pick.choice(pages), pick.choice((LEAF, READ_ONLY)))) for _ in pages
            ]
        if level == 2:
            tables = [frame for frame in pages if of_type[frame] in (0, FrameType.L1)] + [guest.place(5) >> 12]
            made = [(pick.randrange(400), mode.entry(pick.choice(tables), TABLE)) for _ in range(3)]
            if mode is TWO_LEVEL:
                made += [(n, mode.read(self.xen.memory, guest.root << 12, n)) for n in range(768, 772)]
            return [*made, (401, mode.entry(pick.choice((mfn, *pages)), PRESENT))]
        tables = [frame for frame in pages if of_type[frame] in (FrameType.L2, FrameType.L2_TOP)]
        if mode is TWO_LEVEL or not tables:
            return [(3, mode.entry(mfn, PRESENT))]
        old = mode.read(self.xen.memory, guest.root << 12, 3)
        return [(pick.randrange(3), mode.entry(pick.choice(tables), PRESENT)), (3, old)]

    def switch(self, guest: Guest) -> None:
        """Somebody starts over: a domain ends and another one takes its place."""
        if self.random.random() < 0.3 and guest.domain.domid:
            place = self.guests.index(guest)
            self.xen.destroy(guest.domain)
            self.guests[place] = Guest(self.xen, guest.mode, 1, False)

    def usable(self, guest: Guest) -> bool:
        """Whether the guest can still pass arguments; one that unmapped its own memory is ended."""
        try:
            self.xen.guest_memory.check_writable(guest.vcpu, REQUESTS, 0x7200)
        except HypercallError:
            return False
        return not guest.domain.ended

    def run(self, operations: int) -> None:
        acts: list[Callable[[Guest], None]] = [self.update] * 6 + [self.extended] * 4 + [self.va] * 4
        acts += [self.table] * 8 + [self.contents] * 3 + [self.memory] * 2 + [self.descriptors, self.switch]
        while self.operations < operations:
            guest = self.random.choice(self.guests)
            guest.run_me()
            if not self.usable(guest):
                place = self.guests.index(guest)
                privileged = guest.domain.privileged
                self.xen.destroy(guest.domain)
                self.guests[place] = Guest(self.xen, guest.mode, 1, privileged)
                continue
            with suppress(LostPageError):
                self.random.choice(acts)(guest)


PER_STORM = 5_000
STORMS = 8  # 40,000 operations
MORE_STORMS = 500


@pytest.mark.parametrize(
    "seed", [*range(STORMS), *(pytest.param(seed, marks=pytest.mark.storm) for seed in range(STORMS, MORE_STORMS))]
)
def test_any_calls_in_any_order(seed: int) -> None:
    """The auditor is content after every call (see `conftest`), and nothing of the domains is left at the end."""
    storm = Storm(seed)
    storm.run(PER_STORM)
    for guest in storm.guests:
        domain: Domain = guest.domain
        storm.xen.destroy(domain)
    check(storm.xen)
    frames = storm.xen.frames
    assert frames.free_frames == frames.owner.count(-2)
    assert set(frames.owner) == {-1, -2}
    assert frames.refs.count(0) == frames.count
