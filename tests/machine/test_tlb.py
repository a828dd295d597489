"""The TLB as a model: against a simpler model, and fed by guests whose misses can be counted by hand."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
from bare_machine import DATA, Bare
from hypothesis import given
from hypothesis import strategies as st

from xenlab.errors import MachineError
from xenlab.machine.accesses import accesses
from xenlab.machine.paging import GLOBAL, PRESENT, RW
from xenlab.machine.tlb import EVICTED, FIRST, FLUSHED, Policy, Tlb, TlbCost, TlbEntry

PORTABLE = pytest.mark.parametrize("portable", [False, True], ids=["probed", "portable"])
GEOMETRIES = [(64, 4), (64, None), (64, 1), (8, 2), (6, 3), (1, 1)]
FLAGS = PRESENT | RW


def touch(tlb: Tlb, *pages: int) -> list[bool]:
    return [tlb.access(page, page + 0x100, FLAGS) for page in pages]


def pages_in(tlb: Tlb) -> set[int]:
    return {entry.page for entry in tlb.slots if entry is not None}


@pytest.mark.parametrize(("entries", "ways"), [(0, 4), (64, 0), (64, 5), (64, 128), (12, 4), (64, -4)])
def test_a_geometry_without_a_power_of_two_of_sets_is_refused(entries: int, ways: int) -> None:
    with pytest.raises(MachineError, match="TLB: expected ways"):
        Tlb(entries, ways)


def test_the_default_is_64_entries_in_4_ways_least_recently_used() -> None:
    tlb = Tlb()
    assert (tlb.entries, tlb.ways, tlb.sets, tlb.policy) == (64, 4, 16, Policy.LRU)
    assert Tlb(64, None).sets == 1


def test_a_page_stands_in_the_set_of_its_low_bits() -> None:
    tlb = Tlb()
    touch(tlb, 0x3, 0x13, 0x23, 0x33, 0x4)
    assert [entry and entry.page for entry in tlb.slots[12:16]] == [0x3, 0x13, 0x23, 0x33]
    # A fifth page of that set does not fit, though 59 slots are free.
    touch(tlb, 0x43)
    assert tlb.lookup(0x3) is None
    assert len(pages_in(tlb)) == 5


def test_the_policies_differ_in_what_they_throw_out() -> None:
    lru, turns = Tlb(4, None), Tlb(4, None, Policy.ROUND_ROBIN)
    for tlb in (lru, turns):
        touch(tlb, 1, 2, 3, 4, 1, 5)
    assert pages_in(lru) == {1, 3, 4, 5}
    assert pages_in(turns) == {2, 3, 4, 5}


@pytest.mark.parametrize(("entries", "ways"), GEOMETRIES)
@given(pages=st.lists(st.integers(0, 200) | st.integers(0, 12), max_size=300))
def test_least_recently_used_is_what_a_plain_model_says(entries: int, ways: int | None, pages: list[int]) -> None:
    tlb = Tlb(entries, ways)
    sets: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(tlb.sets)]
    for page in pages:
        chosen = sets[page % tlb.sets]
        hit = page in chosen
        if not hit and len(chosen) == tlb.ways:
            chosen.popitem(last=False)
        chosen[page] = None
        chosen.move_to_end(page)
        assert touch(tlb, page) == [hit]
        assert pages_in(tlb) == {held for one in sets for held in one}
    assert tlb.hits + tlb.misses == len(pages)


ACTIONS = st.one_of(
    st.tuples(st.just("touch"), st.integers(0, 40)),
    st.tuples(st.just("page"), st.integers(0, 40)),
    st.tuples(st.just("flush"), st.booleans()),
)


def act(tlb: Tlb, action: tuple[str, int]) -> None:
    name, number = action
    if name == "touch":
        tlb.access(number, number + 1, FLAGS | (GLOBAL if number % 5 == 0 else 0))
    elif name == "page":
        tlb.flush_page(number, "page")
    else:
        tlb.flush("whole", global_too=bool(number))


@given(
    geometry=st.sampled_from(GEOMETRIES),
    policy=st.sampled_from(Policy),
    actions=st.lists(ACTIONS, max_size=120),
    cut=st.integers(0, 120),
)
def test_invariants_hold_and_a_state_goes_on_as_it_would_have(geometry, policy, actions, cut) -> None:
    tlb = Tlb(*geometry, policy)
    for action in actions[:cut]:
        act(tlb, action)
    copy = Tlb(*geometry, policy)
    copy.load(tlb.state())
    for action in actions[cut:]:
        act(tlb, action)
        act(copy, action)
    assert copy.state() == tlb.state()
    held = [(place, entry) for place, entry in enumerate(tlb.slots) if entry is not None]
    assert len({entry.page for _place, entry in held}) == len(held)
    for place, entry in held:
        assert place // tlb.ways == entry.page % tlb.sets
        assert tlb.lookup(entry.page) is entry
    assert tlb.hits + tlb.misses == sum(name == "touch" for name, _number in actions)
    assert tlb.flushes.total() == sum(name != "touch" for name, _number in actions)


def test_a_state_is_plain_data_and_of_one_geometry() -> None:
    tlb = Tlb(8, 2)
    touch(tlb, 1, 2, 3)
    tlb.flush("asked")
    assert json.loads(json.dumps(tlb.state()))["counts"] == [0, 0, {"first": 3}, {"asked": 1}]
    with pytest.raises(MachineError, match="expected the state of one with"):
        Tlb(8, 4).load(tlb.state())


def test_a_hit_answers_with_the_old_entry() -> None:
    tlb = Tlb()
    tlb.access(7, 0x111, FLAGS)
    tlb.access(7, 0x222, PRESENT)
    assert tlb.lookup(7) == TlbEntry(7, 0x111, FLAGS)
    tlb.flush_page(7, "page")
    tlb.access(7, 0x222, PRESENT)
    assert tlb.lookup(7) == TlbEntry(7, 0x222, PRESENT)


def test_fills_say_why_they_were_needed() -> None:
    tlb = Tlb(2, None)
    touch(tlb, 1, 2)
    tlb.flush("switch")
    touch(tlb, 1, 2, 3)
    touch(tlb, 1)
    assert tlb.fills == {FIRST: 3, FLUSHED: 2, EVICTED: 1}
    assert (tlb.misses, tlb.hits) == (6, 0)


def test_global_entries_survive_a_new_base_but_not_the_flush_of_their_page() -> None:
    tlb = Tlb()
    tlb.access(1, 1, FLAGS | GLOBAL)
    tlb.access(2, 2, FLAGS)
    tlb.flush("switch")
    assert pages_in(tlb) == {1}
    tlb.flush_page(1, "page")
    assert pages_in(tlb) == set()
    tlb.access(1, 1, FLAGS | GLOBAL)
    tlb.flush("all", global_too=True)
    assert pages_in(tlb) == set()
    assert tlb.flushes == {"switch": 1, "page": 1, "all": 1}
    assert tlb.page_flushes == 1


def test_costs_follow_their_parameters() -> None:
    tlb = Tlb()
    touch(tlb, 1, 2, 1)
    tlb.flush("switch")
    tlb.flush_page(9, "page")
    cost = TlbCost(levels=3, level_cycles=10, flush_cycles=1000, page_cycles=7)
    assert (cost.walks(tlb), cost.flushing(tlb), cost.total(tlb)) == (60, 1007, 1067)
    assert TlbCost(levels=2).walks(tlb) * 3 == TlbCost(levels=3).walks(tlb) * 2


# A loop over so many pages, so often; then the end.
LOOP = """
        mov edx, {rounds}
again:  mov esi, {start}
        mov ecx, {pages}
one:    mov eax, [esi]
        add esi, {stride}
        dec ecx
        jnz one
        dec edx
        jnz again
        ud2
"""
ROUNDS = 5


def run_loop(tlb: Tlb, pages: int, *, stride: int = 1, portable: bool = False) -> tuple[Bare, int]:
    """The machine and how many instructions it began."""
    bare = Bare(portable=portable)

    def feed(_kind: object, address: int, size: int, _machine: int) -> None:
        for page in {address >> 12, address + size - 1 >> 12}:
            tlb.access(page, page, FLAGS)

    with accesses(bare.cpu, bare.memory, feed):
        bare.run(LOOP.format(rounds=ROUNDS, start=DATA, pages=pages, stride=stride << 12), 10_000)
    assert bare.traps[0].vector == 6
    return bare, bare.cpu.instructions


@PORTABLE
@pytest.mark.parametrize("pages", [1, 6, 7, 8, 9, 20])
def test_a_loop_over_more_pages_than_fit_misses_each_time(portable: bool, pages: int) -> None:
    tlb = Tlb(8, None)
    _bare, instructions = run_loop(tlb, pages, portable=portable)
    assert instructions == 2 + ROUNDS * (4 + 4 * pages)
    # The code is one page more, and used all the time.
    fits = pages + 1 <= 8
    expected = 1 + (pages if fits else pages * ROUNDS)
    assert tlb.misses == expected
    assert tlb.hits == instructions + pages * ROUNDS - expected
    assert tlb.fills[EVICTED] == (0 if fits else pages * (ROUNDS - 1))


@PORTABLE
def test_pages_of_one_set_do_not_fit_where_others_would(portable: bool) -> None:
    spread, together = Tlb(64, 4), Tlb(64, 4)
    run_loop(spread, 10, portable=portable)
    run_loop(together, 10, stride=16, portable=portable)
    assert spread.misses == 11
    assert together.misses == 1 + 10 * ROUNDS


def test_round_robin_throws_out_the_code_too() -> None:
    tlb = Tlb(8, None, Policy.ROUND_ROBIN)
    run_loop(tlb, 8)
    assert tlb.misses > 1 + 8 * ROUNDS


def test_a_loop_that_flushes_misses_again() -> None:
    tlb, bare = Tlb(), Bare()
    bare.load(LOOP.format(rounds=ROUNDS, start=DATA, pages=10, stride=4096))
    again = bare.state.eip + 5

    def feed(_kind: object, address: int, _size: int, _machine: int) -> None:
        if address == again:
            tlb.flush("asked")
        tlb.access(address >> 12, address >> 12, FLAGS)

    with accesses(bare.cpu, bare.memory, feed):
        bare.cpu.run_until(10_000)
    assert tlb.flushes == {"asked": ROUNDS}
    # The code page in each round, and the others in each but the first.
    assert tlb.fills == {FIRST: 1 + 10, FLUSHED: ROUNDS + 10 * (ROUNDS - 1)}
