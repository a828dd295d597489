"""What vCPUs of one domain share, page tables above all, and what must not show through (paper 2.1.1, 3.3.3)."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from memory_bench import BASE, FREE_PFN, REQUESTS, TABLE
from vcpu_bench import Bench

from xenlab import Hypervisor, Machine
from xenlab.abi.numbers import (
    FLAT_RING1_CS,
    FLAT_RING1_DS,
    FLAT_RING3_CS,
    FLAT_RING3_DS,
    Hypercall,
    Runstate,
    VcpuOp,
    VmAssist,
    VmAssistType,
)
from xenlab.hypervisor import auditor
from xenlab.hypervisor.frames import TSS_FRAME
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import PagingMode

A, B = FREE_PFN + 4, FREE_PFN + 5


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def test_an_entry_that_one_changes_is_new_to_the_other(mode: PagingMode, portable: bool) -> None:
    """Without a flush: the TLB of the other is empty when it gets the CPU."""
    bench = Bench(mode, portable=portable)
    for pfn, value in ((A, 0xAAAA), (B, 0xBBBB)):
        bench.write(bench.address(pfn), value.to_bytes(4, "little"))
    bench.start("look", ebx=bench.address(A))
    bench.xen.run(5_000)
    assert bench.at("counts", 1) == 0xAAAA
    bench.run_me()
    assert bench.map(A, bench.entry(B)) == 0
    bench.xen.run(5_000)
    assert bench.at("counts", 1) == 0xBBBB


def test_a_record_goes_where_the_page_is_now(bench: Bench) -> None:
    """One vCPU moves the page in which another has the record of its states; what it named before is free for all."""
    bench.start()
    bench.write(REQUESTS, struct.pack("<II", bench.address(A), 0))
    assert bench.op(VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, 1, REQUESTS) == 0
    bench.xen.run(5_000)
    assert bench.word(bench.address(A)) == Runstate.RUNNING
    bench.run_me()
    old, new = bench.frames[A], bench.frames[B]
    bench.write(bench.address(A), bytes(44))
    assert bench.map(A, bench.entry(B)) == 0
    bench.xen.run(5_000)
    assert not any(bench.xen.memory.frame(old)[:44])
    assert struct.unpack_from("<I", bench.xen.memory.frame(new))[0] == Runstate.RUNNING
    assert bench.map(A, 0) == 0
    bench.xen.run(5_000)  # nowhere
    assert not bench.domain.ended


@pytest.fixture
def bench(mode: PagingMode) -> Bench:
    return Bench(mode)


@pytest.mark.parametrize("turn", [1, 2, 3, 7])
def test_a_table_is_open_for_nobody_else(mode: PagingMode, portable: bool, turn: int) -> None:
    """One stores to a page table over and over, one reads through it: what is seen is one page or the other."""
    bench = Bench(
        mode, xen=Hypervisor(Machine(8, portable=portable), trace=Trace(), scheduler=RoundRobin(turn)), vcpus=3
    )
    assert bench.call(Hypercall.vm_assist, VmAssist.ENABLE, VmAssistType.WRITABLE_PAGETABLES) == 0
    for pfn, value in ((A, 0xAAAA), (B, 0xBBBB)):
        bench.write(bench.address(pfn), value.to_bytes(4, "little"))
    table, index = bench.xen.mmu.leaf_of(bench.vcpu, bench.address(A))
    place = BASE + (bench.xen.frames.m2p[table] << 12) + index * mode.entry_size
    entries = [bench.entry(pfn) & 0xFFFF_FFFF for pfn in (A, B)]
    bench.start("swap", 1, ebx=place, ecx=entries[1], edx=entries[0])
    bench.start("look", 2, ebx=bench.address(A))
    seen = set()
    for _ in range(150):
        bench.xen.run(11)
        auditor.check(bench.xen)
        seen.add(bench.at("counts", 2))
    assert seen <= {0, 0xAAAA, 0xBBBB}
    assert {0xAAAA, 0xBBBB} <= seen
    assert bench.xen.trace is not None
    writes = bench.xen.trace.events(Kind.TABLE_WRITE)
    assert len(writes) > 50
    assert all(write.kept for write in writes)
    assert not bench.domain.ended
    bench.end()


def test_system_calls_on_stacks_of_their_own(mode: PagingMode, portable: bool) -> None:
    """The gate that the CPU takes by itself is a vCPU's: each enters its own kernel stack."""
    bench = Bench(mode, 3, portable=portable)
    code = FREE_PFN + 6
    bench.write(bench.address(code), b"\xcd\x80\xeb\xfc")  # int 0x80; jmp
    assert bench.map(code, bench.entry(code, TABLE)) == 0
    vcpus = []
    for number in (1, 2):
        top = bench.address(FREE_PFN + 20 + number)
        context = bench.handlers(
            bench.context(number=number, eip=bench.address(code), kernel_sp=top, esp=0x1000 * number)
        )
        registers = context.user_regs
        registers.cs, registers.ss, registers.ds = FLAT_RING3_CS, FLAT_RING3_DS, FLAT_RING3_DS
        row: Any = context.trap_ctxt[0x80]
        row.cs, row.address, row.flags = FLAT_RING1_CS, bench.label("system"), 3
        assert bench.initialise(context, number) == 0
        assert bench.op(VcpuOp.UP, number) == 0
        vcpus.append(bench.domain.vcpus[number])
    bench.xen.run(20_000)
    assert not bench.domain.ended, bench.domain.report
    assert all(vcpu.state.gate is not None for vcpu in vcpus)
    tops = [bench.address(FREE_PFN + 20 + number) for number in (1, 2)]
    assert [vcpu.state.inner_stack for vcpu in vcpus] == [(top, FLAT_RING1_DS) for top in tops]
    assert all(bench.word(top - 4096) > 500 for top in tops)
    assert [bench.word(top - 8) for top in tops] == [0x1000, 0x2000]  # ESP of ring 3, in the last frame
    assert bench.xen.trace is not None
    assert {event.frame for event in bench.xen.trace.events(Kind.GATE)} == {top - 20 for top in tops}


def test_the_task_state_segment_is_that_of_the_one_that_runs(mode: PagingMode, portable: bool) -> None:
    bench = Bench(mode, 3, portable=portable)
    for number in (1, 2):
        bench.start(number=number)
    seen = set()
    for _ in range(12):
        bench.xen.run(1_500)
        assert bench.xen.current is not None
        inner = struct.unpack_from("<II", bench.xen.memory.frame(TSS_FRAME), 12)
        assert inner == (bench.xen.current.kernel_esp, bench.xen.current.kernel_ss)
        seen.add(bench.xen.current.number)
    assert seen == {0, 1, 2}
