"""The benchmarks of page tables measure what they say: updates that succeed and change what an entry is used for."""

from __future__ import annotations

import pytest

from xenlab.abi.numbers import Hypercall
from xenlab.cli.benchmarks import Unit, catalogue, memory
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.trace import Kind, Trace

NAMES = [name for name, benchmark in catalogue().items() if benchmark.prepare.__module__ == memory.__name__]


@pytest.mark.parametrize("name", NAMES)
def test_each_gives_a_value(name: str) -> None:
    assert catalogue()[name].prepare()() > 0


@pytest.mark.parametrize("count", [1, 8, 64, 512])
def test_a_batch_updates_as_many_entries_as_it_says(count: int) -> None:
    xen, domain = memory.updating(count)
    xen.trace = Trace()
    xen.run(6 * memory.BATCH_INSTRUCTIONS)
    check(xen)
    assert not domain.ended
    returns = xen.trace.events(Kind.RETURN)
    assert {(event.number, event.result) for event in returns} == {(Hypercall.mmu_update, 0)}
    assert len(returns) in (5, 6, 7)
    # The entries are writable or read-only by turns, all of them.
    writable = set()
    for _ in range(2 * memory.BATCH_INSTRUCTIONS):
        xen.run(1)
        writable.add(sum(1 for mfn in domain.frames[400 : 400 + count] if xen.frames.uses[mfn]))
    assert writable == {0, count}


def test_a_target_may_be_a_time() -> None:
    benchmark = catalogue()["pin_table"]
    assert benchmark.target_at(1000) == 60
    assert benchmark.target_at(10_000) == 20
    assert benchmark.met(59, 1000)
    assert not benchmark.met(61, 1000)
    assert catalogue()["build_space"].unit is Unit.PER_SECOND
    assert catalogue()["build_space"].met(2_000_000, 1000)
