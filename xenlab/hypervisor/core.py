"""The hypervisor: one entry for every trap, and the loop that runs guests (paper 2, 3.1).

Three rules hold this file together:

1. Every trap of every guest arrives at `Hypervisor.trap`, with the guest's registers saved.
   Work is done there, on plain data, and the guest goes on, or another one does.
2. Mechanisms are parts that were passed in.  This file knows what they are for, not how
   they work.
3. Nothing that a guest does raises out of here.  It gets an errno, an exception of its own,
   or its end, with a report.

The life of a trap: `Cpu` saves the context and calls `trap`.  A hypercall goes to the table; a
privileged instruction to the emulator; any other exception to `TrapDelivery`, which builds
the frame that the guest's handler expects.  If the trap changed who may run, the scheduler
is asked and another vCPU's context is loaded before `Cpu` returns into guest code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from xenlab.abi.numbers import HYPERCALL_VECTOR, Shutdown
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Domain, RunState, Vcpu
from xenlab.hypervisor.emulate import Emulator, PrivilegedInstructions
from xenlab.hypervisor.guest_memory import GuestMemory
from xenlab.hypervisor.heap import XEN, FrameHeap
from xenlab.hypervisor.hypercalls import HypercallPart, HypercallTable, unknown
from xenlab.hypervisor.inputs import Input, InputQueue
from xenlab.hypervisor.layout import GDT_BASE, GDT_LIMIT, reserved_gdt_page
from xenlab.hypervisor.parts import load_part, save_part
from xenlab.hypervisor.report import crash_report
from xenlab.hypervisor.schedulers import RoundRobin, Scheduler
from xenlab.hypervisor.services import Services
from xenlab.hypervisor.trace import NO_DOMAIN, Kind, Trace
from xenlab.hypervisor.traps import KERNEL_RING, TrapDelivery, Undeliverable
from xenlab.machine.cpu import BREAKPOINT, OVERFLOW, PAGE_FAULT, PROTECTION, SOFTWARE
from xenlab.machine.machine import Machine
from xenlab.machine.paging import PagingMode

_U32 = 0xFFFF_FFFF
_LONGEST_INSTRUCTION = 15
# INT n without prefixes, which do nothing: where they begin cannot be seen from behind.
_INTERRUPT_BYTES = 2
_SOFTWARE_INTERRUPT_ERROR = 2  # "the selector is an index into the IDT"
# Enum members as plain numbers: looking one up on its class costs more than recording it.
_HYPERCALL, _RETURN, _SWITCH = int(Kind.HYPERCALL), int(Kind.RETURN), int(Kind.SWITCH)
_REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags")


class Stop(Enum):
    """Why `Hypervisor.run` returned."""

    BUDGET = auto()
    IDLE = auto()


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did.

    Attributes:
        instructions: how many were begun.
        stop: BUDGET when all were used, IDLE when no vCPU could run any more.
    """

    instructions: int
    stop: Stop


class Hypervisor:
    """A machine with domains on it.

    Args:
        machine: the hardware; 64 MiB if not given.
        scheduler: who runs next; round robin if not given.
        emulator: privileged instructions; Xen's choice if not given.
        hypercalls: further hypercalls by number, written in plain values.
        trace: where events are recorded; None for no recording.

    Attributes:
        domains: by domain id, ended ones too until they are destroyed.
        current: the vCPU that runs, None when none can.
    """

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        scheduler: Scheduler | None = None,
        emulator: Emulator | None = None,
        hypercalls: Mapping[int, HypercallPart] | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.machine = machine or Machine()
        self.memory = self.machine.memory
        self.cpu = self.machine.cpu
        self.scheduler = scheduler or RoundRobin()
        self.emulator = emulator or PrivilegedInstructions()
        self.trace = trace
        self.heap = FrameHeap(self.memory)
        self.guest_memory = GuestMemory(self.memory, self.cpu)
        self.traps = TrapDelivery(self.memory, self.guest_memory)
        self.hypercalls = HypercallTable(self.guest_memory)
        self._handlers = self.hypercalls.handlers
        self.services = Services(self)
        for number, part in (hypercalls or {}).items():
            self.hypercalls.register_part(number, part)
        self.inputs = InputQueue()
        self.domains: dict[int, Domain] = {}
        self.current: Vcpu | None = None
        self._vcpus: dict[int, Vcpu] = {}
        self._slice_end = 0
        self._pick_needed = False
        self._gdt_pages: dict[str, int] = {}
        self.cpu.handler = self.trap
        self.cpu.set_gdt(GDT_BASE, GDT_LIMIT)

    @property
    def trace(self) -> Trace | None:
        """Where events are recorded; None for no recording."""
        return self._trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._trace = trace
        self._record = trace.record if trace is not None else None

    @property
    def now(self) -> int:
        """Instructions begun since power-on."""
        return self.cpu.instructions

    def run(self, instructions: int) -> RunResult:
        """Run guests for at most so many instructions.

        Returns early when no vCPU can run.  Ctrl-C raises KeyboardInterrupt between two
        instructions; the machine is whole then, and ``run`` can be called again.
        """
        start = self.now
        end = start + instructions
        while self.now < end:
            self._do_what_is_due()
            if self.current is None:
                return RunResult(self.now - start, Stop.IDLE)
            due = self.inputs.next_time()
            self.cpu.run_until(end if due is None else min(end, due))
        return RunResult(self.now - start, Stop.BUDGET)

    def _do_what_is_due(self) -> None:
        """The end of a slice, then inputs one by one, before guest code goes on.

        The order is fixed and a second call does nothing, so that a run that went idle between
        two inputs of the same time cannot be told from one that took both at once.
        """
        self._pick_if_due()
        while self.inputs.apply_next(self):
            self._pick_if_due()

    def _pick_if_due(self) -> None:
        if self._pick_needed or (self.current is not None and self.now >= self._slice_end):
            self._switch()

    def trap(self, vector: int, error: int, address: int) -> None:
        """Every exception and software interrupt of every guest comes here."""
        vcpu = self.current
        assert vcpu is not None
        if vector == HYPERCALL_VECTOR:
            # The shortest way through, since guests come here most.
            frame = number, ecx, edx, ebx, _esp, ebp, esi, edi, _eip, hidden = vcpu.state.frame()
            if hidden & 3 != KERNEL_RING:
                self._exception(vcpu, vector, error, address)
            else:
                record = self._record
                if record is not None:
                    now, domid = self.cpu.instructions, vcpu.domid
                    record((now, _HYPERCALL, domid, frame[:9]))
                try:
                    result = self._handlers.get(number, unknown)(vcpu, ebx, ecx, edx, esi, edi, ebp)
                except HypercallError as refusal:
                    result = -refusal.errno
                vcpu.state.set_eax(result & _U32)
                if record is not None:
                    record((now, _RETURN, domid, number, result))
        else:
            self._exception(vcpu, vector, error, address)
        if self._pick_needed:
            self._switch()

    def _exception(self, vcpu: Vcpu, vector: int, error: int, address: int) -> None:
        if vector >= 32:
            error = SOFTWARE
        elif vector == PAGE_FAULT and address >= vcpu.address_limit:
            # On the paper's machines the segment limit stops this access before paging sees it.
            vector, error = PROTECTION, 0
        if self.trace is not None:
            frame = vcpu.state.frame()
            values = vector, max(error, 0), address, frame[:8], frame[8], frame[9] & 3
            self.record(Kind.TRAP, vcpu.domid, *values)
        if error == SOFTWARE:
            vector, error = self._software_interrupt(vcpu, vector)
        elif vector == PROTECTION and error == 0 and self._emulate(vcpu):
            return
        try:
            done = self.traps.deliver(vcpu, vector, error, address)
        except Undeliverable as reason:
            self.crash(vcpu, str(reason))
            return
        if self.trace is not None:
            self.record(Kind.DELIVER, vcpu.domid, vector, *done)

    def _software_interrupt(self, vcpu: Vcpu, vector: int) -> tuple[int, int]:
        """``int n``: through the guest's gate if its privilege allows, else #GP at the instruction."""
        gate = vcpu.traps[vector]
        # Xen's own gates for these two are open to every ring, and it asks no further.
        allowed = vector in (BREAKPOINT, OVERFLOW) or (gate is not None and gate.dpl >= vcpu.state.cpl)
        if allowed:
            return vector, SOFTWARE
        vcpu.state.eip = vcpu.state.eip - _INTERRUPT_BYTES & _U32
        return PROTECTION, vector << 3 | _SOFTWARE_INTERRUPT_ERROR

    def _emulate(self, vcpu: Vcpu) -> bool:
        state = vcpu.state
        code = self.guest_memory.read_code(vcpu, _LONGEST_INSTRUCTION)
        registers = {name: getattr(state, name) for name in _REGISTERS}
        system = vcpu.control | {"ring": state.cpl, "iopl": 0, "tsc": self.now, "cr3": state.cr3}
        changes = self.emulator.emulate(code, registers, system)
        if changes is None:
            return False
        for name, value in changes.items():
            if name in registers:
                setattr(state, name, value & _U32)
            elif name in vcpu.control:
                vcpu.control[name] = value & _U32
        self.record(Kind.EMULATE, vcpu.domain.domid, code, registers["eip"], tuple(sorted(changes.items())))
        return True

    def reschedule(self) -> None:
        """Ask the scheduler again before guest code goes on."""
        self._pick_needed = True

    def block(self, vcpu: Vcpu) -> None:
        """Let ``vcpu`` sleep until `wake`."""
        self._sleep(vcpu, RunState.BLOCKED)

    def wake(self, vcpu: Vcpu) -> None:
        """Make a blocked vCPU runnable; a paused one stays paused but will not sleep on."""
        if vcpu.run_state is RunState.PAUSED:
            vcpu.paused_from = RunState.RUNNABLE
        elif vcpu.run_state is RunState.BLOCKED:
            self._make_runnable(vcpu)

    def pause(self, domain: Domain) -> None:
        """Stop running ``domain`` until `unpause`.  Pausing twice is pausing once."""
        for vcpu in domain.vcpus:
            if vcpu.run_state in (RunState.RUNNABLE, RunState.BLOCKED):
                vcpu.paused_from = vcpu.run_state
                self._sleep(vcpu, RunState.PAUSED)
        self.record(Kind.DOMAIN, domain.domid, "paused")

    def unpause(self, domain: Domain) -> None:
        """Let a paused domain go on from where it was."""
        for vcpu in domain.vcpus:
            if vcpu.run_state is RunState.PAUSED:
                if vcpu.paused_from is RunState.RUNNABLE:
                    self._make_runnable(vcpu)
                else:
                    vcpu.run_state = vcpu.paused_from
        self.record(Kind.DOMAIN, domain.domid, "unpaused")

    def _make_runnable(self, vcpu: Vcpu) -> None:
        vcpu.run_state = RunState.RUNNABLE
        self.scheduler.wake(vcpu.key, self.now)
        self.reschedule()

    def _sleep(self, vcpu: Vcpu, run_state: RunState) -> None:
        if vcpu.run_state is RunState.RUNNABLE:
            self.scheduler.sleep(vcpu.key, self.now)
        vcpu.run_state = run_state
        self.reschedule()

    def _switch(self) -> None:
        """Ask the scheduler and make its choice the running vCPU."""
        self._pick_needed = False
        now = self.cpu.instructions
        picked, before = self.scheduler.pick(now), self.current
        if picked is None:
            self.current = None
            self.cpu.stop()
        else:
            self._slice_end = now + picked[1]
            self.cpu.deadline = self._slice_end
            self.current = self._vcpus[picked[0]]
            if self.current is not before:
                self.cpu.load(self.current.state)
        if self.trace is not None and self.current is not before:
            to, length = picked or (-1, 0)
            self.trace.record((now, _SWITCH, NO_DOMAIN, before.key if before else -1, to, length))

    def add_domain(self, domain: Domain) -> None:
        """Take over a domain that the toolstack built; it starts paused."""
        self.domains[domain.domid] = domain
        for vcpu in domain.vcpus:
            self._vcpus[vcpu.key] = vcpu
        self.record(Kind.DOMAIN, domain.domid, "created")

    def destroy(self, domain: Domain) -> None:
        """End ``domain`` if it still lives and give its frames, scrubbed, back to the free ones.

        Once; its number and its frames may by then be another's.
        """
        if self.domains.get(domain.domid) is not domain:
            return
        if not domain.ended:
            self.shut_down(domain, Shutdown.POWEROFF)
        for vcpu in domain.vcpus:
            del self._vcpus[vcpu.key]
            if self.current is vcpu:
                self.current = None
        del self.domains[domain.domid]
        frames = [*domain.frames, *domain.own_tables, domain.shared_info_mfn]
        self.heap.release(frames)
        for mfn in frames:
            self.cpu.forget_code(mfn << 12, mfn + 1 << 12)
        self.record(Kind.DOMAIN, domain.domid, "destroyed")

    def shut_down(self, domain: Domain, reason: Shutdown) -> None:
        """End ``domain``; its memory stays until `destroy`."""
        domain.shutdown = reason
        for vcpu in domain.vcpus:
            self._sleep(vcpu, RunState.ENDED)
        self.record(Kind.DOMAIN, domain.domid, f"ended:{reason.name.lower()}")

    def crash(self, vcpu: Vcpu, reason: str) -> None:
        """End the domain of ``vcpu`` for a fault of its own, with a report."""
        self.record(Kind.CRASH, vcpu.domain.domid, reason)
        vcpu.domain.report = crash_report(self, vcpu, reason)
        self.shut_down(vcpu.domain, Shutdown.CRASH)

    def free_domid(self) -> int:
        """The lowest domain id that is not in use."""
        return next(number for number in range(len(self.domains) + 1) if number not in self.domains)

    def gdt_page(self, mode: PagingMode) -> int:
        """Machine frame with the hypervisor's own descriptors for guests in ``mode``."""
        if mode.name not in self._gdt_pages:
            (mfn,) = self.heap.allocate(1, XEN)
            self.memory.frame(mfn)[:] = reserved_gdt_page(mode)
            self._gdt_pages[mode.name] = mfn
        return self._gdt_pages[mode.name]

    def record(self, kind: Kind, domid: int, *values: Any) -> None:
        """Add an event to the trace, if there is one."""
        if self.trace is not None:
            self.trace.record((self.cpu.instructions, kind, domid, *values))

    def submit(self, item: Input) -> None:
        """Something from outside happens now: the only way in while guests run."""
        self.inputs.submit(self.now, item)

    def snapshot(self) -> dict[str, Any]:
        """Everything but memory and trace, as plain data; see `xenlab.timeline`."""
        return {
            "time": self.now,
            "current": self.current.key if self.current else None,
            "slice": (self._slice_end, self._pick_needed),
            "parts": {name: save_part(part) for name, part in self._parts()},
            "heap": self.heap.state(),
            "domains": dict(self.domains),
            "states": {domid: domain.snapshot() for domid, domain in self.domains.items()},
            "vcpus": dict(self._vcpus),
            "inputs": self.inputs.state(),
            "gdt": dict(self._gdt_pages),
        }

    def _parts(self) -> list[tuple[str, object]]:
        """The parts that were passed in and may remember something, by name."""
        calls = [(f"hypercall {number}", part) for number, part in sorted(self.hypercalls.parts.items())]
        return [("scheduler", self.scheduler), ("emulator", self.emulator), *calls]

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `snapshot` gave; memory has been put back by the caller."""
        self.cpu.instructions = saved["time"]
        self.domains, self._vcpus = dict(saved["domains"]), dict(saved["vcpus"])
        for domid, domain in self.domains.items():
            domain.restore(saved["states"][domid])
        self.current = None if saved["current"] is None else self._vcpus[saved["current"]]
        self._slice_end, self._pick_needed = saved["slice"]
        for name, part in self._parts():
            load_part(part, saved["parts"][name])
        self.heap.load(saved["heap"])
        self.inputs.load(saved["inputs"])
        self._gdt_pages = dict(saved["gdt"])
        self.cpu.deadline = self._slice_end
        if self.current is not None:
            self.cpu.load(self.current.state)
