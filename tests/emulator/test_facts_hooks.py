"""What the hooks on code and memory report, on which `machine.accesses` builds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import unicorn

from xenlab.machine.paging import PRESENT, RW, USER

CODE, FLAGS = 0x4000, PRESENT | RW | USER
READ, WRITE = unicorn.UC_MEM_READ, unicorn.UC_MEM_WRITE


@pytest.fixture
def seen(bench) -> Callable[[str], tuple[list[tuple[int, int]], list[tuple[int, int, int]]]]:
    """``seen(source)``: what was fetched, as (address, length), and accessed, as (kind, machine address, size)."""

    def run(source: str) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
        fetched: list[tuple[int, int]] = []
        accessed: list[tuple[int, int, int]] = []
        end = bench.engine.observe(
            lambda _engine, address, length, _data: fetched.append((address, length)),
            lambda _engine, kind, address, size, _value, _data: accessed.append((kind, address, size)),
        )
        bench.run(source + "\nud2")
        end()
        return fetched, accessed

    return run


def test_a_memory_hook_gives_the_machine_address(bench, seen) -> None:
    bench.map(0x30, 0x50 << 12 | FLAGS)
    assert seen("mov eax, [0x30010]")[1] == [(READ, 0x50010, 4)]


def test_a_code_hook_gives_the_linear_address_and_no_length_for_an_invalid_opcode(bench, seen) -> None:
    bench.memory.write(0x50000, b"\x90\x0f\x0b")
    bench.map(0x30, 0x50 << 12 | FLAGS)
    fetched, _accessed = seen("mov eax, 0x30000\njmp eax")
    assert fetched[2] == (0x30000, 1)
    assert fetched[3][0] == 0x30001
    assert fetched[3][1] > 15


def test_an_access_over_the_end_of_a_page_is_reported_once_at_its_first_byte(bench, seen) -> None:
    bench.map(0x30, 0x50 << 12 | FLAGS)
    assert seen("mov [0x30ffe], eax")[1] == [(WRITE, 0x50FFE, 4)]


def test_an_access_that_faults_is_not_reported(bench, seen) -> None:
    bench.map(0x30, 0)
    assert seen("mov eax, [0x30000]")[1] == []
    assert bench.vectors[0][0] == 14


def test_walks_of_the_mmu_are_not_reported(bench, seen) -> None:
    bench.engine.write_cr3(0x10000)
    fetched, accessed = seen("nop")
    assert [address for address, _length in fetched] == [CODE, CODE + 1]
    assert accessed == []


def test_observing_keeps_the_tlb(bench, seen) -> None:
    bench.run("mov eax, [0x30000]\nud2")
    bench.map(0x30, 0x50 << 12 | FLAGS)
    assert seen("mov eax, [0x30000]")[1] == [(READ, 0x30000, 4)]
    bench.engine.write_cr3(0x10000)
    assert seen("mov eax, [0x30000]")[1] == [(READ, 0x50000, 4)]


def test_without_forgetting_translations_hooks_are_silent_in_known_code(bench) -> None:
    bench.run("mov eax, [0x30000]\nud2")
    accessed: list[int] = []
    bench.uc.hook_add(unicorn.UC_HOOK_MEM_READ, lambda _uc, _kind, at, *_: accessed.append(at))
    bench.engine.start(CODE, 50)
    assert accessed == []
    bench.uc.ctl_flush_tb()
    bench.engine.start(CODE, 50)
    assert accessed == [0x30000]


def test_stores_to_some_addresses_are_reported_before_they_are_done(bench) -> None:
    source = """
        mov eax, 7
        mov [0x30ffc], eax
        mov [0x31000], eax
        inc dword ptr [0x31000]
        mov eax, [0x31000]
        push eax
        mov [0x30fff], eax
        mov [0x31ffe], eax
        mov [0x32000], eax
        ud2
    """
    bench.map(0x31, 0x50 << 12 | FLAGS)
    bench.run(source)
    bench.memory.words[0x50000 >> 2] = 0
    stored: list[tuple[int, int, int]] = []
    end = bench.engine.observe_stores(
        0x50000,
        0x51000,
        lambda _engine, _kind, at, size, _value, _data: stored.append((at, size, bench.memory.words[0x50000 >> 2])),
    )
    bench.engine.start(CODE, 50)
    # Neither the push nor the store that begins in the page before.
    assert stored == [(0x50000, 4, 0), (0x50000, 4, 7), (0x50FFE, 4, 0)]
    end()
    bench.engine.start(CODE, 50)
    assert len(stored) == 3
