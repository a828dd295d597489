"""The start-of-day layout as numbers: whatever the image, the rules of xen.h hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xenlab import ImageError
from xenlab.hypervisor.layout import start_of
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode
from xenlab.toolstack.image import Image, Section
from xenlab.toolstack.plan import STACK_PAGES, Plan, first_tables, plan

MODES = st.sampled_from([TWO_LEVEL, PAE])
PAGES = st.integers(0, 0xF_F000)
REGION, PADDING = 4 << 20, 512 << 10


@given(MODES, PAGES, st.integers(1, 12 << 20), st.integers(1, 960), st.booleans())
def test_elements_in_order_and_room_behind(
    mode: PagingMode, base_page: int, size: int, memory_mib: int, initial: bool
) -> None:
    base = base_page << 12
    image = Image("any", base, base, (Section(base, b"", size),), mode)
    try:
        found = plan(image, memory_mib, privileged=initial)
    except ImageError:
        check_refusal(mode, base, size, memory_mib)
        return
    rings = [] if initial else [found.store, found.console]
    assert [found.p2m, found.start_info, *rings, found.tables, found.stack] == in_order(found, size, initial)
    assert (found.store is None, found.console is None) == (initial, initial)
    end, room = found.address(found.mapped), found.address(found.mapped) - found.top_of_stack
    if found.mapped < found.total:
        assert end % REGION == 0
        assert PADDING <= room < PADDING + REGION
    assert end <= start_of(mode)
    assert found.table_list == first_tables(mode, base, end)


def in_order(found: Plan, size: int, initial: bool) -> list[int]:
    """Where each element has to begin if all are packed."""
    p2m = -(-size // 4096)
    start_info = p2m + -(-found.total * 4 // 4096)
    rings = [] if initial else [start_info + 1, start_info + 2]
    tables = start_info + 1 + len(rings)
    return [p2m, start_info, *rings, tables, tables + len(found.table_list)]


def check_refusal(mode: PagingMode, base: int, size: int, memory_mib: int) -> None:
    """Only what cannot be done is refused: too little memory for the image, or too little space above it."""
    tables = 4 + (size + (memory_mib << 10) >> 21) + 4
    elements = size + (memory_mib << 10) + (4 + tables + STACK_PAGES << 12)
    assert elements > memory_mib << 20 or base + min(elements + PADDING + 2 * REGION, memory_mib << 20) > start_of(mode)


@given(MODES, PAGES, st.integers(1, 4096))
def test_each_address_has_its_tables_and_each_table_is_needed(mode: PagingMode, base_page: int, pages: int) -> None:
    base, end = base_page << 12, min(base_page + pages, 0x10_0000) << 12
    tables = [(table.level.name, table.number) for table in first_tables(mode, base, end)]
    needed = {(mode.levels[0].name, 0)}
    for above, level in zip(mode.levels, mode.levels[1:], strict=False):
        needed |= {(level.name, address >> above.shift) for address in (*range(base, end, 4096), end - 1)}
    if mode is PAE:
        needed.add(("l2", 3))
    assert set(tables) == needed
    assert len(tables) == len(set(tables))
    assert tables == sorted(tables, key=lambda table: (-int(table[0][1]), table[1]))
