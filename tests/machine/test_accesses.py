"""An instrumented run sees every access once, with its linear address, and leaves no trace in the machine."""

from __future__ import annotations

import pytest
from bare_machine import CODE, GDT, MEMORY_FORMS, PAGE_FLAGS, STACK, Bare
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.machine.accesses import AccessKind, accesses
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.machine.segments import Descriptor

READ, WRITE, FETCH = AccessKind
PORTABLE = pytest.mark.parametrize("portable", [False, True], ids=["probed", "portable"])
# Where pages lie in memory when they do not lie at their own addresses; 0x32 is a second way to 0x30.
ELSEWHERE = {0x30: 0x51, 0x31: 0x50, 0x32: 0x51, STACK - 1 >> 12: 0x53, STACK >> 12: 0x54, 0xFF: 0x55}


def watched(bare: Bare, source: str, budget: int = 40) -> list[tuple[AccessKind, int, int]]:
    seen: list[tuple[AccessKind, int, int]] = []
    with accesses(bare.cpu, bare.memory, lambda *access: seen.append(access[:3])) as watch:
        bare.run(source, budget)
    assert watch.unexplained == 0
    return seen


def data(seen: list[tuple[AccessKind, int, int]]) -> list[tuple[AccessKind, int, int]]:
    return [access for access in seen if access[0] is not FETCH]


@PORTABLE
def test_fetches_reads_and_writes_come_in_their_order(portable: bool) -> None:
    seen = watched(Bare(portable=portable), "mov eax, [0x30000]\ninc dword ptr [0x30004]\npush eax\nud2")
    assert seen == [
        (FETCH, CODE, 5),
        (READ, 0x30000, 4),
        (FETCH, CODE + 5, 6),
        (READ, 0x30004, 4),
        (WRITE, 0x30004, 4),
        (FETCH, CODE + 11, 1),
        (WRITE, STACK - 4, 4),
        (FETCH, CODE + 12, 1),
    ]


@PORTABLE
def test_each_round_of_a_string_instruction_is_seen(portable: bool) -> None:
    seen = watched(Bare(portable=portable), "mov esi, 0x30ff8\nmov edi, 0x32000\nmov ecx, 3\nrep movsd\nud2")
    assert data(seen) == [access for at in (0, 4, 8) for access in ((READ, 0x30FF8 + at, 4), (WRITE, 0x32000 + at, 4))]


@PORTABLE
@pytest.mark.parametrize("code", ["mov eax, [0x30000]", "mov [0x30000], eax"])
def test_an_access_that_faults_is_not_seen(portable: bool, code: str) -> None:
    bare = Bare(portable=portable)
    bare.map(0x30, 0)
    assert data(watched(bare, code)) == []
    assert bare.traps[0].vector == 14


@PORTABLE
def test_what_a_stopped_instruction_does_not_begin_is_not_seen(portable: bool) -> None:
    seen = watched(Bare(portable=portable), "nop\nin al, 0x60\nmov eax, [0x30000]\nnop")
    assert seen == [(FETCH, CODE, 1), (FETCH, CODE + 1, 2)]


@PORTABLE
def test_a_budget_ends_the_report(portable: bool) -> None:
    assert len(watched(Bare(portable=portable), "again: jmp again", 17)) == 17


@PORTABLE
def test_nothing_is_seen_after_the_end_and_code_runs_on(portable: bool) -> None:
    bare = Bare(portable=portable)
    seen = watched(bare, "again: inc dword ptr [0x30000]\njmp again", 10)
    before = len(seen)
    bare.cpu.run_until(bare.cpu.instructions + 10)
    assert len(seen) == before
    assert bare.memory.words[0x30000 >> 2] == 10


@PORTABLE
def test_what_the_callback_raises_comes_out_at_the_end(portable: bool) -> None:
    def seen(*_access: object) -> None:
        raise LookupError("from a callback")

    bare = Bare(portable=portable)
    with pytest.raises(LookupError, match="from a callback"), accesses(bare.cpu, bare.memory, seen):
        bare.run("again: jmp again", 10)
    bare.cpu.run_until(bare.cpu.instructions + 10)
    assert bare.cpu.instructions == 20


def test_watching_leaves_stale_translations_where_they_are() -> None:
    bare = Bare()
    bare.memory.words[0x30000 >> 2], bare.memory.words[0x31000 >> 2] = 111, 222
    bare.load("again: mov eax, [0x30000]\njmp again")
    bare.cpu.run_until(2)
    bare.map(0x30, 0x31 << 12 | PAGE_FLAGS)
    seen: list[object] = []
    with accesses(bare.cpu, bare.memory, lambda *access: seen.append(access[:3])) as watch:
        bare.cpu.run_until(4)
    bare.cpu.run_until(6)
    assert bare.state.eax == 111
    # No page leads to that frame any more, and the watch had not begun when one did.
    assert (watch.unexplained, len(seen)) == (1, 2)
    bare.cpu.flush_tlb()
    bare.cpu.run_until(8)
    assert bare.state.eax == 222


def test_a_stale_translation_that_was_seen_is_traced_back() -> None:
    bare = Bare()
    seen: list[tuple[AccessKind, int, int]] = []
    with accesses(bare.cpu, bare.memory, lambda *access: seen.append(access[:3])) as watch:
        bare.load("again: mov eax, [0x30000]\njmp again")
        bare.cpu.run_until(2)
        bare.map(0x30, 0x31 << 12 | PAGE_FLAGS)
        bare.cpu.run_until(4)
    assert data(seen) == 2 * [(READ, 0x30000, 4)]
    assert watch.unexplained == 0


@PORTABLE
@pytest.mark.parametrize("prefix", ["fs", "gs", "es"])
def test_the_base_of_a_segment_counts(portable: bool, prefix: str) -> None:
    bare = Bare(portable=portable)
    descriptor = Descriptor(0x31000, 0xFFFFF, 0xF3, 0xC)
    bare.memory.write(GDT + 0x38, descriptor.encode().to_bytes(8, "little"))
    seen = watched(bare, f"mov eax, 0x3b\nmov {prefix}, eax\nmov eax, {prefix}:[0x123]\nud2")
    assert (READ, 0x31123, 4) in seen


@settings(max_examples=150)
@given(
    form=st.sampled_from(MEMORY_FORMS),
    offset=st.sampled_from([0, 1, 0x7F8, 0xFF0, 0xFFD, 0xFFF]),
    ring=st.sampled_from([1, 3]),
    mode=st.sampled_from([TWO_LEVEL, PAE]),
    portable=st.booleans(),
)
def test_where_memory_lies_elsewhere_the_same_linear_addresses_are_seen(form, offset, ring, mode, portable) -> None:
    seen = []
    for frames in ({}, ELSEWHERE):
        bare = Bare(mode, ring, portable)
        for page, frame in frames.items():
            bare.map(page, frame << 12 | PAGE_FLAGS)
        seen.append(watched(bare, form.format(a=hex(0x30000 + offset))))
    assert seen[1] == seen[0]
