"""The birth and the end of a domain, as far as it is the hypervisor's affair (paper 2.3, 3.4).

The control domain's tools decide what a domain is made of; the hypervisor gives it a number, frames and
its shared page, checks the page tables that the tools have written as it checks any guest's, and
takes everything back at the end.

The invariant: from its first instruction on a domain runs on page tables that were validated, and after its end
nothing of it is left but what other domains still map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.abi.numbers import Shutdown, Virq
from xenlab.errors import HypercallError, ImageError, MachineError
from xenlab.hypervisor import scheduling
from xenlab.hypervisor.accounting import change_places, settle
from xenlab.hypervisor.domain import VCPUS_PER_DOMAIN, Domain, RunState, Vcpu
from xenlab.hypervisor.frames import PINNED, XEN
from xenlab.hypervisor.layout import GDT_BASE, GDT_LIMIT, descriptor_slots, gdt_base
from xenlab.hypervisor.page_tables import root_use
from xenlab.hypervisor.report import crash_report
from xenlab.hypervisor.trace import HAS, Kind
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import PagingMode

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor


def new_domain(
    xen: Hypervisor, name: str, mode: PagingMode, pages: int, *, privileged: bool = False, vcpus: int = 1
) -> Domain:
    """A domain with memory and without a vCPU; nobody has its number yet.

    Args:
        xen: where.
        name: for people.
        mode: the format of its page tables.
        pages: how many frames it gets, and may have.
        privileged: whether it is the control domain.
        vcpus: how many it will have; the hypervisor keeps windows to the descriptor tables of so many.

    Raises:
        MachineError: not enough free frames; nothing is changed then.
    """
    needed = pages + frames_beside(xen, mode, vcpus)
    if needed > xen.frames.free_frames:
        raise MachineError(f"out of machine memory: {needed} frames wanted, {xen.frames.free_frames} free")
    xen.allowance.unlimited()
    domid = free_domid(xen)
    xen.shared_pages.make(mode)
    shared_info, *own_tables = xen.frames.allocate(1 + len(descriptor_slots(mode, vcpus)), XEN)
    xen.shared_pages.fill_own_tables(mode, own_tables, vcpus)
    slots = xen.shared_pages.slots(mode, own_tables, vcpus)
    domain = Domain(
        domid, name, mode, [], own_tables, shared_info, slots, 0, pages, privileged=privileged, max_vcpus=vcpus
    )
    xen.domains[domid] = domain
    xen.reservations.adopt(domain, shared_info)
    xen.clocks.show_wall_clock(domain)
    domain.frames.extend(xen.reservations.allocate(domain, pages))
    for pfn, mfn in enumerate(domain.frames):
        xen.frames.m2p[mfn] = pfn
    return domain


def frames_beside(xen: Hypervisor, mode: PagingMode, vcpus: int = 1) -> int:
    """How many frames a new domain with so many vCPUs costs besides its own memory."""
    return 1 + len(descriptor_slots(mode, vcpus)) + (0 if xen.shared_pages.are_made(mode) else 2)


def free_domid(xen: Hypervisor) -> int:
    """The lowest domain id that is not in use."""
    return next(number for number in range(len(xen.domains) + 1) if number not in xen.domains)


def add_vcpu(xen: Hypervisor, vcpu: Vcpu) -> None:
    """Let the first vCPU of a new domain begin, paused, on the page tables that its state names; they are pinned.

    Raises:
        ImageError: they are not valid; nothing is changed then.
    """
    domain, root = vcpu.domain, vcpu.state.cr3 >> PAGE_SHIFT
    use = root_use(domain.mode)
    xen.allowance.unlimited()
    try:
        xen.page_tables.take(domain, root, use)
    except HypercallError as refusal:
        raise ImageError(
            f"domain {domain.domid} ({domain.name}): its first page tables are not valid (errno {refusal.errno})"
        ) from None
    xen.page_tables.take(domain, root, use)
    xen.frames.flags[root] |= PINNED
    _enlist(xen, vcpu)
    xen.record(Kind.DOMAIN, domain.domid, "created")
    xen.record(Kind.MEMORY, domain.domid, HAS, domain.pages)


def add_others(xen: Hypervisor, domain: Domain) -> None:
    """Let ``domain`` have all vCPUs that it was made for.  The others are down, with no page tables to run on: what
    they run is up to the first one (`guest_context`)."""
    if domain.max_vcpus == len(domain.vcpus):
        return
    try:
        for number in range(len(domain.vcpus), domain.max_vcpus):
            # That of all states made from now on, so of this one.
            xen.cpu.set_gdt(gdt_base(number), GDT_LIMIT)
            key = domain.domid * VCPUS_PER_DOMAIN + number
            _enlist(xen, Vcpu(key, domain, xen.cpu.new_state(domain.mode, 0), run_state=RunState.DOWN))
    finally:
        xen.cpu.set_gdt(GDT_BASE, GDT_LIMIT)


def _enlist(xen: Hypervisor, vcpu: Vcpu) -> None:
    vcpu.account.since = xen.now
    vcpu.domain.vcpus.append(vcpu)
    xen.vcpus[vcpu.key] = vcpu
    scheduling.introduce(xen, vcpu)


def pause(xen: Hypervisor, domain: Domain) -> None:
    """Stop running ``domain`` until `unpause`; one that is paused stays so."""
    for vcpu in domain.vcpus:
        _stop(xen, vcpu, RunState.PAUSED)
    xen.record(Kind.DOMAIN, domain.domid, "paused")


def unpause(xen: Hypervisor, domain: Domain) -> None:
    """Let a paused domain go on from where it was."""
    for vcpu in domain.vcpus:
        if vcpu.run_state is RunState.PAUSED:
            _go_on(xen, vcpu)
    xen.record(Kind.DOMAIN, domain.domid, "unpaused")


def bring_up(xen: Hypervisor, vcpu: Vcpu) -> None:
    """Let a vCPU that is down go on from where it was, or begin."""
    if vcpu.run_state is RunState.DOWN:
        _go_on(xen, vcpu)


def take_down(xen: Hypervisor, vcpu: Vcpu) -> None:
    """Stop running one vCPU until `bring_up`, though its domain goes on; the last one to go ends the domain."""
    if all(other is vcpu or other.run_state is RunState.DOWN for other in vcpu.domain.vcpus):
        code = vcpu.domain.shutdown_code
        shut_down(xen, vcpu.domain, Shutdown.POWEROFF if code is None else code)
    else:
        _stop(xen, vcpu, RunState.DOWN)


def _stop(xen: Hypervisor, vcpu: Vcpu, run_state: RunState) -> None:
    if vcpu.run_state in (RunState.RUNNABLE, RunState.BLOCKED):
        vcpu.paused_from = vcpu.run_state
        xen.sleep(vcpu, run_state)


def _go_on(xen: Hypervisor, vcpu: Vcpu) -> None:
    if vcpu.paused_from is RunState.RUNNABLE:
        xen.make_runnable(vcpu)
    else:
        settle(xen, vcpu)
        vcpu.run_state = vcpu.paused_from


def crash(xen: Hypervisor, vcpu: Vcpu, reason: str) -> None:
    """End the domain of ``vcpu`` for a fault of its own, with a report."""
    xen.record(Kind.CRASH, vcpu.domid, reason)
    vcpu.domain.report = crash_report(xen, vcpu, reason)
    shut_down(xen, vcpu.domain, Shutdown.CRASH)


def shut_down(xen: Hypervisor, domain: Domain, reason: Shutdown) -> None:
    """End ``domain``; its memory stays until `destroy`, and the control domain is told."""
    domain.shutdown = reason
    for vcpu in domain.vcpus:
        xen.sleep(vcpu, RunState.ENDED)
        xen.timers.forget(vcpu)
    xen.record(Kind.DOMAIN, domain.domid, f"ended:{reason.name.lower()}")
    xen.events.raise_virq(Virq.DOM_EXC)


def destroy(xen: Hypervisor, domain: Domain) -> None:
    """End ``domain`` if it still lives and give its frames, scrubbed, back to the free ones.

    Once; its number and its frames may by then be another's.
    """
    if xen.domains.get(domain.domid) is not domain:
        return
    if not domain.ended:
        xen.shut_down(domain, Shutdown.POWEROFF)
    xen.allowance.unlimited()
    for vcpu in domain.vcpus:
        _drop_tables(xen, vcpu)
        xen.vcpu_ops.release(vcpu)
        scheduling.forget(xen, vcpu)
        del xen.vcpus[vcpu.key]
        if xen.current is vcpu:
            change_places(xen, vcpu, None, xen.now)
            xen.current = None
    xen.events.close_all(domain)
    xen.reservations.reclaim(domain)
    xen.frames.release(domain.own_tables)
    del xen.domains[domain.domid]
    xen.record(Kind.DOMAIN, domain.domid, "destroyed")
    xen.events.raise_virq(Virq.DOM_EXC)


def _drop_tables(xen: Hypervisor, vcpu: Vcpu) -> None:
    """No page table and no descriptor table of a vCPU that ended, if it ever began, is in use any more."""
    xen.descriptor_tables.release(vcpu)
    for mfn in (vcpu.state.cr3 >> PAGE_SHIFT, vcpu.user_base):
        if mfn:
            xen.page_tables.drop(vcpu.domain, mfn, root_use(vcpu.domain.mode))
