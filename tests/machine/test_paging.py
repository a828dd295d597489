"""The walk in Python against the emulated MMU: result, error code, accessed and dirty bits."""

from __future__ import annotations

import pytest
from bare_machine import DATA, STACK, TABLES, Bare, Trap
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.machine.paging import (
    ACCESSED,
    DIRTY,
    NX,
    PAE,
    PRESENT,
    PSE,
    RW,
    TWO_LEVEL,
    USER,
    Access,
    PageFault,
    mapped_pages,
    walk,
)

# Linear 0x0080_0000 up has tables of its own; code, stack and descriptors stay mapped below.
AREA, AREA_L2, AREA_L1 = 0x0080_0000, 0x40000, 0x41000
FLAG_BITS = [PRESENT, PRESENT, PRESENT, RW, USER, ACCESSED, DIRTY, 0x8, 0x10, 0x100, 0x200, 0x800]
CODE_OF = {"read": "mov eax, [ebx]", "write": "mov [ebx], eax", "fetch": "jmp ebx", "modify": "inc dword ptr [ebx]"}


def entries(extra: list[int]):
    """Flag bits of an entry, mostly present."""
    return st.sets(st.sampled_from([*FLAG_BITS, *extra])).map(sum)


def place(bare: Bare, middle: int, leaf: int) -> None:
    """Install a middle-level and a leaf entry for the first page of the area."""
    mode = bare.mode
    if mode is TWO_LEVEL:
        mode.write(bare.memory, TABLES, AREA >> 22, AREA_L1 | middle & ~PSE)
    else:
        frame = 0 if middle & PSE else AREA_L1
        mode.write(bare.memory, TABLES + 0x1000, AREA >> 21, frame | middle)
    mode.write(bare.memory, AREA_L1, 0, leaf)


def check(bare: Bare, kind: str, middle: int, leaf: int) -> None:
    bare.memory.frame(DATA >> 12)[:] = b"\x0f\x0b" * 2048  # UD2, so that a fetch ends there
    bare.cpu.forget_code(DATA, DATA + 0x1000)
    place(bare, middle, leaf)
    before = bare.memory.read(TABLES, 0x3000), bare.memory.read(AREA_L1, 0x1000)
    bare.traps.clear()
    bare.cpu.load(bare.state)
    bare.state.ebx, bare.state.esp = AREA + 0x10, STACK
    bare.run(f"{CODE_OF[kind]}\nint 0x40", 20)
    after = bare.memory.read(TABLES, 0x3000), bare.memory.read(AREA_L1, 0x1000)
    bare.memory.write(TABLES, before[0])
    bare.memory.write(AREA_L1, before[1])
    user = bare.ring == 3
    kinds = {"read": ["read"], "write": ["write"], "fetch": ["fetch"], "modify": ["read", "write"]}[kind]
    for each in kinds:
        access = Access(write=each == "write", user=user, fetch=each == "fetch")
        found = walk(bare.memory, bare.mode, TABLES, AREA + 0x10, access)
        if isinstance(found, PageFault):
            break
    agree(bare.traps, found)
    assert (bare.memory.read(TABLES, 0x3000), bare.memory.read(AREA_L1, 0x1000)) == after


def agree(traps: list[Trap], found) -> None:
    assert len(traps) == 1
    if isinstance(found, PageFault):
        assert (traps[0].vector, traps[0].error, traps[0].address) == (14, found.error, found.address)
    else:
        assert traps[0].vector != 14


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("ring", [1, 3])
@settings(max_examples=60)
@given(kind=st.sampled_from(list(CODE_OF)), middle=entries([PSE]), leaf=entries([PSE]))
def test_two_level_walk_agrees_with_the_cpu(ring: int, portable: bool, kind: str, middle: int, leaf: int) -> None:
    check(machine(TWO_LEVEL, ring, portable), kind, middle, DATA | leaf)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("ring", [1, 3])
@settings(max_examples=80)
@given(
    kind=st.sampled_from(list(CODE_OF)),
    middle=entries([PSE, NX, 1 << 52, 1 << 62, 1 << 13]),
    leaf=entries([PSE, NX, 1 << 52, 1 << 62]),
)
def test_pae_walk_agrees_with_the_cpu(ring: int, portable: bool, kind: str, middle: int, leaf: int) -> None:
    if middle & PSE:
        middle &= ~NX if kind == "fetch" else -1
        kind = "read" if kind == "fetch" else kind  # the large page begins with zeros, not with UD2
    else:
        middle &= ~(1 << 13)
    check(machine(PAE, ring, portable), kind, middle, DATA | leaf)


_machines: dict[tuple[str, int, bool], Bare] = {}


def machine(mode, ring: int, portable: bool) -> Bare:
    key = mode.name, ring, portable
    if key not in _machines:
        _machines[key] = Bare(mode, ring, portable)
    return _machines[key]


@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def test_mapped_pages_lists_every_leaf_in_order(mode) -> None:
    bare = Bare(mode)
    bare.map(7, 0)
    pages = list(mapped_pages(bare.memory, mode, TABLES))
    assert [address >> 12 for address, _ in pages] == [page for page in range(256) if page != 7]
    assert all(entry >> 12 == address >> 12 for address, entry in pages)


def test_a_walk_without_update_changes_nothing() -> None:
    bare = Bare()
    bare.map(7, 7 << 12 | PRESENT | RW)
    walk(bare.memory, TWO_LEVEL, TABLES, 7 << 12, Access(write=True), update=False)
    assert TWO_LEVEL.read(bare.memory, bare.leaf_table, 7) == 7 << 12 | PRESENT | RW
    walk(bare.memory, TWO_LEVEL, TABLES, 7 << 12, Access(write=True))
    assert TWO_LEVEL.read(bare.memory, bare.leaf_table, 7) == 7 << 12 | PRESENT | RW | ACCESSED | DIRTY
