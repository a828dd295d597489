"""The hypervisor: one entry for every trap, and the loop that runs guests (paper 2, 3.1).

Three rules hold this file together:

1. Every trap of every guest arrives at `Hypervisor.trap`, with the guest's registers saved.
   Work is done there, on plain data, and the guest goes on, or another one does.
2. Mechanisms are parts that were passed in.  This file knows what they are for, not how
   they work.
3. Nothing that a guest does raises out of here.  It gets an errno, an exception of its own,
   or its end, with a report.

The life of a trap: `Cpu` calls `trap`, with the registers in `Cpu.state`.  A hypercall goes to the table; a
privileged instruction to the emulator; any other exception to `TrapDelivery`, which builds
the frame that the guest's handler expects.  If the trap changed who may run, the scheduler
is asked and another vCPU's registers are loaded before `Cpu` returns into guest code.  Last, a vCPU with
events pending is made to enter its callback (`events`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from xenlab.abi.numbers import HYPERCALL_VECTOR, Errno, Shutdown
from xenlab.errors import HypercallError, PartError, XenlabError
from xenlab.hypervisor import lifecycle, saving
from xenlab.hypervisor.accounting import change_places, settle
from xenlab.hypervisor.alarms import Alarms
from xenlab.hypervisor.bounce import Bounce
from xenlab.hypervisor.checked_types import CheckedTypes
from xenlab.hypervisor.clocks import Clocks
from xenlab.hypervisor.descriptor_tables import DescriptorTables
from xenlab.hypervisor.domain import Domain, RunState, Vcpu
from xenlab.hypervisor.emulate import Emulator, PrivilegedInstructions
from xenlab.hypervisor.event_bits import EventBits, event_channels
from xenlab.hypervisor.exceptions import Exceptions
from xenlab.hypervisor.frames import TSS_FRAME, FrameTable
from xenlab.hypervisor.guest_memory import GuestMemory
from xenlab.hypervisor.hypercalls import HypercallPart, HypercallTable, unknown
from xenlab.hypervisor.inputs import Input, InputQueue
from xenlab.hypervisor.layout import GDT_BASE, GDT_LIMIT, TSS_BASE
from xenlab.hypervisor.memory_op import MemoryOps
from xenlab.hypervisor.mmu import Mmu
from xenlab.hypervisor.page_tables import PageTables
from xenlab.hypervisor.page_types import FrameTypes, PageTypes
from xenlab.hypervisor.parts import wrong
from xenlab.hypervisor.preemption import Allowance, Continuation
from xenlab.hypervisor.reservations import Reservations
from xenlab.hypervisor.result import RunResult as RunResult
from xenlab.hypervisor.result import Stop as Stop
from xenlab.hypervisor.schedulers import RoundRobin, Scheduler
from xenlab.hypervisor.services import Services
from xenlab.hypervisor.shared_pages import SharedPages
from xenlab.hypervisor.timers import NEVER, Timers
from xenlab.hypervisor.tlb import SWITCH, FlushIfStale, FlushPolicy, Tlb
from xenlab.hypervisor.trace import NO_DOMAIN, Kind, Trace
from xenlab.hypervisor.traps import KERNEL_RING, TrapDelivery
from xenlab.hypervisor.vcpu_op import VcpuOps
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT

_U32 = 0xFFFF_FFFF
# Enum members as plain numbers: looking one up on its class costs more than recording it.
_HYPERCALL, _RETURN, _SWITCH, _FLUSH = (int(kind) for kind in (Kind.HYPERCALL, Kind.RETURN, Kind.SWITCH, Kind.FLUSH))
_RUNNABLE, _BLOCKED = RunState.RUNNABLE, RunState.BLOCKED


class Hypervisor:
    """A machine with domains on it.

    Args:
        machine: the hardware; 64 MiB if not given.
        scheduler: who runs next; round robin if not given.
        emulator: privileged instructions; Xen's choice if not given.
        hypercalls: further hypercalls by number, written in plain values.
        alarms: the two alarm timers of each vCPU; ours if not given.
        page_types: types and counts of frames; ours on the frame table if not given.
        bounce: frames of exceptions; Xen's if not given.
        flush_policy: when a frame that changes its use needs the TLB emptied; only if it must be, if not given.
        event_bits: what becomes of an event's bits; Xen's rules, on the page itself, if not given.
        trace: where events are recorded; None for no recording.

    Attributes:
        domains: by domain id, ended ones too until they are destroyed.
        vcpus: by key.
        slice_end: when the running vCPU's turn ends.
        pick_needed: whether the scheduler has to be asked before guest code goes on.
        recorder: takes an event as a tuple, None where nothing is recorded: for the shortest ways.
        current: the vCPU that runs, None when none can.
    """

    # In a dictionary, more than thirty attributes are read more slowly by a tenth of a trap.
    # fmt: off
    __slots__ = (
        "_bytes", "_fault", "_handlers", "_trace", "_upcall", "allowance", "bounce", "clocks", "cpu", "current",
        "descriptor_tables", "domains", "emulator", "events", "exceptions", "frames", "guest_memory",
        "hypercalls", "inputs", "machine", "memory", "memory_ops", "mmu", "page_tables", "page_types",
        "pick_needed", "recorder", "reservations", "scheduler", "services", "shared_pages", "slice_end", "timers",
        "tlb", "traps", "vcpu_ops", "vcpus",
    )
    # fmt: on

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        scheduler: Scheduler | None = None,
        emulator: Emulator | None = None,
        hypercalls: Mapping[int, HypercallPart] | None = None,
        alarms: Alarms | None = None,
        page_types: PageTypes | None = None,
        flush_policy: FlushPolicy | None = None,
        event_bits: EventBits | None = None,
        bounce: Bounce | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.machine = machine or Machine()
        self.memory = self.machine.memory
        self.cpu = self.machine.cpu
        self.scheduler: Scheduler = scheduler or RoundRobin()
        self.emulator, self.bounce = emulator or PrivilegedInstructions(), bounce
        self.trace = trace
        self.domains: dict[int, Domain] = {}
        self.allowance = Allowance()
        self.guest_memory = GuestMemory(self.memory, self.cpu)
        self.traps = TrapDelivery(self.memory, self.guest_memory)
        self.hypercalls = HypercallTable(self.guest_memory, self.allowance)
        self._handlers = self.hypercalls.handlers
        self._make_memory(page_types, flush_policy)
        self.services = Services(self)
        self.events = event_channels(self, event_bits)
        self._upcall, self._bytes = self.events.upcall, self.memory.bytes
        self.clocks, self.timers, self.vcpu_ops = Clocks(self), Timers(self, alarms), VcpuOps(self)
        self.exceptions = Exceptions(self)
        self._fault = self.exceptions.handle
        for number, part in (hypercalls or {}).items():
            self.hypercalls.register_part(number, part)
        self.inputs = InputQueue()
        self.current: Vcpu | None = None
        self.vcpus: dict[int, Vcpu] = {}
        self.slice_end, self.pick_needed = 0, False
        self.cpu.handler = self.trap
        self.cpu.set_gdt(GDT_BASE, GDT_LIMIT)
        self.cpu.set_tss(TSS_BASE, TSS_FRAME << PAGE_SHIFT)

    def _make_memory(self, page_types: PageTypes | None, flush_policy: FlushPolicy | None) -> None:
        """The mechanisms of paper 3.3.3 and 3.3.4, each in a file of its own."""
        self.frames = FrameTable(self.memory)
        self.page_types = page_types or FrameTypes(self.frames)
        self.tlb = Tlb(self.cpu, self.frames, flush_policy or FlushIfStale(), partial(self._record_here, Kind.FLUSH))
        self.reservations = Reservations(self.frames, self.tlb, self.domains, self.cpu.forget_code)
        self.descriptor_tables = DescriptorTables(self)
        self.page_tables = self.reservations.tables = PageTables(
            self.memory,
            self.frames,
            CheckedTypes(self.page_types, self.frames),
            self.tlb,
            self.descriptor_tables.check_frame,
            self.reservations.release,
            self.allowance,
            partial(self._record_here, Kind.REFUSED),
        )
        self.shared_pages = SharedPages(self.memory, self.frames)
        self.mmu = Mmu(self)
        self.memory_ops = MemoryOps(self)

    def _record_here(self, kind: Kind, *values: Any) -> None:
        self.record(kind, self.current.domid if self.current else NO_DOMAIN, *values)

    @property
    def trace(self) -> Trace | None:
        """Where events are recorded; None for no recording."""
        return self._trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._trace = trace
        self.recorder = trace.record if trace is not None else None
        self.cpu.gates.watcher = partial(self._record_here, Kind.GATE) if trace is not None else None

    @property
    def now(self) -> int:
        """Instructions begun since power-on."""
        return self.cpu.instructions

    def run(self, instructions: int) -> RunResult:
        """Run guests for at most so many instructions.

        Returns early when no vCPU can run.  After Ctrl-C, which raises KeyboardInterrupt, go on with another ``run``.
        """
        start = self.now
        end = start + instructions
        while self.now < end:
            self._do_what_is_due()
            due = self.inputs.next_time()
            until = end if due is None else min(end, due)
            if self.current is not None:
                self.exceptions.breakpoints.advance(until)
            elif self.timers.due < NEVER:
                # All sleep, and somebody has set an alarm: nothing happens until then.
                self.cpu.instructions = min(until, self.timers.due)
            else:
                return RunResult(self.now - start, Stop.IDLE)
        return RunResult(self.now - start, Stop.BUDGET)

    def _do_what_is_due(self) -> None:
        """The end of a slice, then timers, then inputs one by one, before guest code goes on.

        The order is fixed and a second call does nothing, so that a run that went idle between
        two inputs of the same time cannot be told from one that took both at once.
        """
        self._pick_if_due()
        while self.timers.due <= self.now:
            self.timers.expire()
            self._go_on()
        while self.inputs.apply_next(self):
            self._go_on()

    def _go_on(self) -> None:
        """Something happened between two instructions: an upcall, another vCPU."""
        if self.current is not None and not self.pick_needed:
            self._upcall(self.current)
        self._pick_if_due()

    def _pick_if_due(self) -> None:
        while self.pick_needed or (self.current is not None and self.now >= self.slice_end):
            self.switch()

    def trap(self, vector: int, error: int, address: int) -> None:
        """Every exception and software interrupt of every guest comes here."""
        vcpu = self.current
        assert vcpu is not None
        vcpu.account.entries += 1
        if vector == HYPERCALL_VECTOR:
            # The shortest way through, since guests come here most.
            state = vcpu.state
            frame = number, ecx, edx, ebx, _esp, ebp, esi, edi, _eip, hidden = state.frame()
            if hidden & 3 != KERNEL_RING:
                self._fault(vcpu, vector, error, address)
            else:
                record = self.recorder
                if record is not None:
                    now, domid = self.cpu.instructions, vcpu.domid
                    record((now, _HYPERCALL, domid, frame[:9]))
                try:
                    result = self._handlers.get(number, unknown)(vcpu, ebx, ecx, edx, esi, edi, ebp)
                    state.set_eax(result & _U32)
                except HypercallError as refusal:
                    result = -refusal.errno
                    state.set_eax(result & _U32)
                except Continuation as again:
                    result = -Errno.ERESTART
                    again.rewind(state)
                if record is not None:
                    record((now, _RETURN, domid, number, result))
        else:
            self._fault(vcpu, vector, error, address)
        # Only for those that take events: the look into the guest's page costs a thirtieth of a hypercall.
        if vcpu.event_callback is not None and not self.pick_needed and self._bytes[vcpu.info]:
            self._upcall(vcpu)
        while self.pick_needed:
            self.switch()

    def reschedule(self) -> None:
        """Ask the scheduler again before guest code goes on."""
        self.pick_needed = True

    def block(self, vcpu: Vcpu) -> None:
        """Let ``vcpu`` sleep until `wake`."""
        self.sleep(vcpu, _BLOCKED)

    def wake(self, vcpu: Vcpu) -> None:
        """Make a blocked vCPU runnable; one that is paused or down stays so but will not sleep on."""
        if vcpu.run_state is _BLOCKED:
            self.make_runnable(vcpu)
        else:
            vcpu.paused_from = _RUNNABLE

    def pause(self, domain: Domain) -> None:
        """Stop running ``domain`` until `unpause`.  Pausing twice is pausing once."""
        lifecycle.pause(self, domain)

    def unpause(self, domain: Domain) -> None:
        """Let a paused domain go on from where it was."""
        lifecycle.unpause(self, domain)

    def make_runnable(self, vcpu: Vcpu) -> None:
        """Offer ``vcpu``, which was not runnable, to the scheduler."""
        settle(self, vcpu)
        vcpu.account.woken = vcpu.run_state is _BLOCKED and vcpu is not self.current
        vcpu.run_state = _RUNNABLE
        self.reschedule()
        self._tell_scheduler(self.scheduler.wake, vcpu)

    def sleep(self, vcpu: Vcpu, run_state: RunState) -> None:
        """Let ``vcpu`` not be runnable any more, but be in ``run_state``."""
        settle(self, vcpu)
        before, vcpu.run_state = vcpu.run_state, run_state
        self.reschedule()
        if before is _RUNNABLE:
            self._tell_scheduler(self.scheduler.sleep, vcpu)

    def _tell_scheduler(self, news: Callable[[int, int], None], vcpu: Vcpu) -> None:
        try:
            news(vcpu.key, self.now)
        except XenlabError:
            raise
        except Exception as problem:
            told = f"told that vCPU {vcpu.key} is {vcpu.run_state.name.lower()}"
            raise wrong(self.scheduler, told, "no exception", problem) from problem

    def switch(self) -> None:
        """Ask the scheduler and make its choice the running vCPU; to be asked again if that ends by its upcall."""
        cpu, before = self.cpu, self.current
        now = cpu.instructions
        picked = chosen = None
        try:
            picked = self.scheduler.pick(now)
            if picked is not None:
                key, length = picked
                chosen, end = self.vcpus[key], now + length
        except XenlabError:
            raise
        except Exception as problem:
            raise self._wrong_pick(picked or problem) from problem
        if chosen is None:
            if any(vcpu.run_state is _RUNNABLE for vcpu in self.vcpus.values()):
                raise self._wrong_pick(None)
            cpu.stop()
        elif chosen.run_state is not _RUNNABLE or type(end) is not int or end <= now:
            raise self._wrong_pick(picked)
        self.pick_needed = False
        if chosen is not before:
            self.current = chosen
            if chosen is not None:
                cpu.load(chosen.state)
                if chosen.watched:
                    cpu.stop()
                self.tlb.counts[SWITCH] += 1
            change_places(self, before, chosen, now)
            if self.recorder is not None:
                self._record_switch(before, chosen, now, picked or (-1, 0))
        if chosen is None:
            return
        self.slice_end = end
        if now >= chosen.record_due:
            self.clocks.refresh(chosen)
        due = self.timers.due
        cpu.deadline = end if end < due else due
        if chosen.failing or chosen.nmi_pending:
            self.exceptions.go_on(chosen)
        if chosen.event_callback is not None and not self.pick_needed:
            self._upcall(chosen)

    def _record_switch(self, before: Vcpu | None, chosen: Vcpu | None, now: int, picked: tuple[int, int]) -> None:
        assert self.recorder is not None
        self.recorder((now, _SWITCH, NO_DOMAIN, before.key if before else -1, *picked))
        if chosen is not None:
            self.recorder((now, _FLUSH, chosen.domid, SWITCH, 0))

    def _wrong_pick(self, found: object) -> PartError:
        runnable = [vcpu.key for vcpu in self.vcpus.values() if vcpu.run_state is _RUNNABLE]
        expected = f"(vCPU, instructions above 0) with a vCPU of {runnable}, or None if that is empty"
        return wrong(self.scheduler, f"pick at instruction {self.now}", expected, found)

    def destroy(self, domain: Domain) -> None:
        """End ``domain`` if it still lives and take back what it has; see `lifecycle`."""
        lifecycle.destroy(self, domain)

    def shut_down(self, domain: Domain, reason: Shutdown) -> None:
        """End ``domain``; its memory stays until `destroy`."""
        lifecycle.shut_down(self, domain, reason)

    def crash(self, vcpu: Vcpu, reason: str) -> None:
        """End the domain of ``vcpu`` for a fault of its own, with a report."""
        lifecycle.crash(self, vcpu, reason)

    def forget_caches(self) -> None:
        """Empty what the CPU caches of the guests' memory: what a machine that was put back does not have."""
        saving.forget_caches(self)

    def record(self, kind: Kind, domid: int, *values: Any) -> None:
        """Add an event to the trace, if there is one."""
        if self.trace is not None:
            self.trace.record((self.cpu.instructions, kind, domid, *values))

    def submit(self, item: Input) -> None:
        """Something from outside happens now: the only way in while guests run."""
        self.inputs.submit(self.now, item)

    def snapshot(self) -> dict[str, Any]:
        """Everything but memory and trace, as plain data; see `saving`."""
        return saving.snapshot(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `snapshot` gave; memory has been put back by the caller."""
        saving.restore(self, saved)
