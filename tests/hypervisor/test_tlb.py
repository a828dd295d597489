"""When the TLB is emptied and when not, as the guest sees it and as it is counted and traced (paper 2.1.1)."""

from __future__ import annotations

import pytest
from memory_bench import FREE_PFN, Guest, guests

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import Hypercall, MmuextOp
from xenlab.hypervisor.tlb import REASONS, FlushIfStale
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import PagingMode

A, B = FREE_PFN, FREE_PFN + 1
CALLS = """
again:  mov ebx, XENVER_pagesize
        mov eax, __HYPERVISOR_xen_version
        int 0x82
        jmp again
"""
YIELDS = """
again:  mov ebx, SCHEDOP_yield
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp again
"""
# Reads through page A, maps page B there, and reads again: without a flush, and with one.
STALE = """
start:  mov ebp, esi
        mov dword ptr [0xC0028000], 0xAAAA
        mov dword ptr [0xC0029000], 0xBBBB
        mov edi, [0xC0028000]
        mov edx, [ebp + 68]
        mov ecx, [edx + {b} * 4]
        shl ecx, 12
        or ecx, 0x63
        mov ebx, 0xC0028000
        xor edx, edx
        mov esi, {flags}
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        mov edx, [0xC0028000]
done:   jmp done
"""


def flushes(xen: Hypervisor) -> dict[str, int]:
    return {reason: count for reason, count in xen.tlb.counts.items() if count}


def test_a_hypercall_flushes_nothing(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    boot(xen, CALLS, mode=mode)
    xen.run(10)
    before, emptied = flushes(xen), xen.cpu.flushes
    xen.run(400)
    assert (flushes(xen), xen.cpu.flushes) == (before, emptied)


def test_each_switch_between_domains_flushes(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    for _ in range(2):
        boot(xen, YIELDS, mode=mode)
    xen.run(400)
    assert xen.trace is not None
    switches = [event for event in xen.trace.events(Kind.SWITCH) if event.to_vcpu >= 0]
    traced = [event for event in xen.trace.events(Kind.FLUSH) if event.reason == "switch"]
    assert len(switches) == len(traced) == xen.tlb.counts["switch"] > 50


def test_a_domain_alone_is_not_switched(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    boot(xen, YIELDS, mode=mode)
    xen.run(400)
    assert xen.tlb.counts["switch"] == 1


@pytest.mark.parametrize(("flags", "seen"), [(0, 0xAAAA), ("UVMF_INVLPG", 0xBBBB), ("UVMF_TLB_FLUSH", 0xBBBB)])
def test_the_guest_sees_the_old_page_until_it_flushes(flags: object, seen: int, mode: PagingMode) -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    domain = boot(xen, STALE.format(b=B, flags=flags), mode=mode)
    xen.run(40)
    state = domain.vcpus[0].state
    assert state.eip == domain.symbols["done"], domain.report
    assert (state.edi, state.edx) == (0xAAAA, seen)


def test_a_frame_without_a_stale_entry_is_retyped_without_a_flush(mode: PagingMode) -> None:
    (guest,) = guests(mode)
    mfn = guest.table(A, {})
    guest.extended(MmuextOp.TLB_FLUSH_LOCAL)
    before = flushes(guest.xen)
    guest.extended(MmuextOp.PIN_L1_TABLE, mfn)
    assert flushes(guest.xen) == before


def test_a_frame_with_one_is_not(mode: PagingMode) -> None:
    (guest,) = guests(mode)
    mfn = guest.table(A, {})
    guest.extended(MmuextOp.PIN_L1_TABLE, mfn)
    assert guest.xen.tlb.counts["retyped"] == 1
    guest.extended(MmuextOp.UNPIN_TABLE, mfn)
    guest.extended(MmuextOp.PIN_L1_TABLE, mfn)
    assert guest.xen.tlb.counts["retyped"] == 1


class Never:
    """A part that never flushes by itself."""

    def must_flush(self, reason: str, left: int, flushes: int) -> bool:
        assert reason in REASONS
        assert left <= flushes
        return False


def test_the_decision_is_a_part(mode: PagingMode) -> None:
    xen = Hypervisor(Machine(4), flush_policy=Never())
    guest = Guest(xen, mode, 1, False)
    guest.extended(MmuextOp.PIN_L1_TABLE, guest.table(A, {}))
    assert xen.tlb.counts["retyped"] == 0
    assert FlushIfStale().must_flush("retyped", 5, 5)
    assert not FlushIfStale().must_flush("retyped", 4, 5)


def test_flushes_name_their_page(mode: PagingMode) -> None:
    (guest,) = guests(mode)
    guest.call(Hypercall.update_va_mapping, guest.address(A), guest.entry(B), guest.entry(B) >> 32, 2)
    assert guest.xen.trace is not None
    last = guest.xen.trace.events(Kind.FLUSH)[-1]
    assert (last.reason, last.address) == ("page", guest.address(A))
