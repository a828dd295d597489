"""Facts about contexts, counting and the TLB of Unicorn 2.1.4 that the machine room relies on."""

from __future__ import annotations

import ctypes

import pytest
import unicorn

from xenlab.machine import layout as at
from xenlab.machine.engine import GENERAL
from xenlab.machine.layout import probe

CODE = 0x4000


def word(context, distance: int) -> int:
    start = probe().general + distance
    return int.from_bytes(context.raw[start : start + 4], "little")


def test_the_version_is_the_measured_one() -> None:
    """All facts were measured on this release."""
    assert unicorn.__version__ == "2.1.4"


def test_general_registers_stand_eight_bytes_apart_in_a_context(bench) -> None:
    """AX CX DX BX SP BP SI DI, then EIP."""
    for number, name in enumerate(GENERAL):
        bench.engine.write(name, 0x1111 * (number + 1))
    bench.engine.write("eip", 0x1234)
    context = bench.context()
    assert [word(context, 8 * number) for number in range(8)] == [0x1111 * n for n in range(1, 9)]
    assert word(context, at.EIP) == 0x1234


def test_segment_caches_stand_in_a_row(bench) -> None:
    """ES CS SS DS FS GS: selector, base, limit, attributes."""
    bench.enter_ring(3)
    context = bench.context()
    selectors = [word(context, at.SEGMENT_CACHES + at.SEGMENT_STRIDE * number) for number in range(6)]
    assert selectors[1:3] == [0x2B, 0x33]
    assert word(context, at.HFLAGS) & at.HF_CPL == 3


@pytest.mark.parametrize(
    ("code", "entry", "error"),
    [("mov eax, [0x30000]", 0, 4), ("mov [0x30000], eax", 0, 6), ("inc dword ptr [0x30000]", 0x30005, 7)],
)
def test_the_error_code_of_a_page_fault_stands_in_the_context(bench, code: str, entry: int, error: int) -> None:
    """At the probed place, in the hook."""
    bench.map(0x30, entry)
    found = []

    def on_trap(_vector: int) -> None:
        raw = bench.context().raw
        found.append(int.from_bytes(raw[bench.layout.error_code : bench.layout.error_code + 4], "little"))
        bench.engine.stop()

    bench.on_trap = on_trap
    bench.enter_ring(3)
    bench.run(code)
    assert found == [error]


def test_flags_move_between_two_places_when_a_run_begins_and_ends(bench) -> None:
    """Inside a run the condition codes are the truth; a new run takes them from the flags word."""
    inside = []

    def on_trap(_vector: int) -> None:
        inside.append(bench.context())
        bench.engine.stop()

    bench.on_trap = on_trap
    bench.engine.write("eflags", 2)
    bench.run("xor eax, eax\nint 0x40\npushfd\npop ebx")
    assert bench.engine.read("eflags") & 0x40
    inside[0].raw[probe().general + at.EFLAGS] = 2
    inside[0].resume()
    bench.engine.start(CODE + 4, 2)
    assert not bench.engine.read("ebx") & 0x40


def counter(bench):
    return (ctypes.c_uint64 * 2).from_address(bench.engine.handle + bench.layout.counter)


def test_the_counter_counts_instructions_begun(bench) -> None:
    """After an expired run it reads one more than the limit."""
    bench.run("1: jmp 1b", 37)
    assert list(counter(bench)) == [38, 37]


def test_each_iteration_of_a_string_instruction_counts(bench) -> None:
    """And the run ends between two of them."""
    bench.run("mov ecx, 100\nmov edi, 0x20000\nrep stosb", 12)
    assert bench.engine.read("ecx") == 90


def test_a_fault_that_is_retried_counts_again(bench) -> None:
    """Time is instructions begun, not finished."""
    bench.map(0x30, 0)
    seen = []

    def on_trap(_vector: int) -> None:
        seen.append(counter(bench)[0])
        bench.map(0x30, 0x30007)
        clean.resume()
        bench.engine.write_cr3(0x10000)

    bench.put("mov eax, [0x30000]\nint3")
    bench.engine.write("eip", CODE)
    clean = bench.context()
    bench.on_trap = on_trap
    bench.engine.start(CODE, 2)
    assert seen == [1]
    assert counter(bench)[0] == 3


def test_a_limit_lowered_in_the_hook_ends_the_run_there(bench) -> None:
    """So one instruction can be let through, and a deadline can be moved."""

    def on_trap(_vector: int) -> None:
        counter(bench)[1] = counter(bench)[0] + 3

    bench.on_trap = on_trap
    bench.run("int 0x40\n1: inc eax\njmp 1b", 1000)
    assert counter(bench)[0] == 5


def test_an_entry_changed_from_python_stays_stale_until_cr3_is_written(bench) -> None:
    """Restoring a context does not empty the TLB."""
    bench.memory.words[0x31000 >> 2] = 0x31
    bench.run("mov eax, [0x30000]", 1)
    bench.map(0x30, 0x31007)
    same = bench.context()
    same.resume()
    bench.run("mov eax, [0x30000]", 1)
    assert bench.engine.read("eax") == 0
    bench.engine.write_cr3(0x10000)
    bench.engine.start(CODE, 1)
    assert bench.engine.read("eax") == 0x31


def test_code_changed_from_python_runs_old_until_its_cache_is_removed(bench) -> None:
    """Whoever writes code calls forget_code."""
    bench.run("mov eax, 1", 1)
    bench.memory.write(CODE + 1, b"\x02")
    bench.engine.start(CODE, 1)
    assert bench.engine.read("eax") == 1
    bench.uc.ctl_remove_cache(CODE, CODE + 0x1000)
    bench.engine.start(CODE, 1)
    assert bench.engine.read("eax") == 2


def test_guest_stores_to_code_are_noticed(bench) -> None:
    """Self-modifying code needs no help."""
    bench.run("call f\nmov byte ptr [f + 1], 7\ncall f\nint 0x40\nf: mov al, 1\nret")
    assert bench.engine.read("eax") & 0xFF == 7


def test_memory_is_shared_and_not_copied(bench) -> None:
    """mem_map_ptr: a guest's store is in the buffer at once."""
    bench.run("mov dword ptr [0x20000], 0x1234", 1)
    assert bench.memory.words[0x20000 >> 2] == 0x1234


def test_the_virtual_tlb_mode_names_each_access(bench) -> None:
    """What the portable CPU finds error codes with: kinds in the order of the accesses."""
    kinds = []

    def fill(_uc, address: int, kind: int, entry, _data) -> bool:
        kinds.append((kind, address))
        entry.paddr, entry.perms = address, unicorn.UC_PROT_ALL
        return True

    bench.uc.hook_add(unicorn.UC_HOOK_TLB_FILL, fill)
    bench.put("movsd")
    bench.engine.write("esi", 0x20000)
    bench.engine.write("edi", 0x30000)
    bench.uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
    bench.engine.write_cr3(0x10000)
    bench.engine.start(CODE, 1)
    assert kinds == [(unicorn.UC_MEM_FETCH, CODE), (unicorn.UC_MEM_READ, 0x20000), (unicorn.UC_MEM_WRITE, 0x30000)]
