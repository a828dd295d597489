"""The CPU: runs guest code until a trap, and hands every trap to one handler.

The problem: the hypervisor must see each exception and software interrupt with the guest's
registers at hand, change what it likes, and let the guest, or another one, go on.  And it
must be able to run exactly N instructions, so that any run can be repeated and stepped.

How a trap goes: Unicorn calls back with a vector; the handler gets it with error code and address, and works
on `Cpu.state`, which is the engine's own registers; the guest goes on with whatever they are then.  A domain
switch is `Cpu.load` of another state inside the handler, which copies one set of registers out and the other
one in; the engine never leaves its loop.

The invariant: time is the number of instructions begun, as the engine counts them, and it
does not depend on how a run is cut into slices.  What breaks without it: replay (lesson 00),
preemption at the same instruction on every machine, and every grade.

`ProbedCpu` works through offsets that were probed (`layout`); `PortableCpu` gives the same
results through Unicorn's public calls alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from unicorn import x86_const as x86

from xenlab.machine.engine import Context, Engine
from xenlab.machine.gates import Gates
from xenlab.machine.interrupts import deferred_interrupts
from xenlab.machine.layout import CC_OP_EFLAGS, Layout
from xenlab.machine.memory import Memory
from xenlab.machine.paging import TWO_LEVEL, PagingMode
from xenlab.machine.power import CR0, CR0_PG, install_instruction_hooks, power_on, set_paging
from xenlab.machine.registers import EngineRegisters
from xenlab.machine.state import CC_OP, CR2, ContextState
from xenlab.machine.vectors import INVALID_OPCODE, MACHINE_CHECK, PAGE_FAULT, SOFTWARE, WITH_ERROR_CODE

TrapHandler = Callable[[int, int, int], None]
StepHandler = Callable[[bool], None]

# A task state segment that is not "busy": with any other type the emulator would end the process at a call gate.
TSS_ATTRIBUTES, TSS_LIMIT = 0x8900, 0x67
ESP1 = 12  # where the stack for ring 1 stands in it; SS behind it

# About 10 ms of guest code, so that Ctrl-C is noticed; the public limit is 20 ms.
SLICE = 400_000


class Cpu(Protocol):
    """What the hypervisor and the timeline use of a CPU.

    ``flushes`` counts how often the TLB was emptied, or is about to be; ``gates`` takes the software interrupts that
    do not come to the handler.
    """

    handler: TrapHandler
    state: Any
    flushes: int
    gates: Gates

    @property
    def instructions(self) -> int:
        """Instructions begun since power-on; right inside a handler, too."""
        ...

    @instructions.setter
    def instructions(self, value: int) -> None: ...

    def new_state(self, mode: PagingMode, cr3: int) -> Any:
        """Registers for a new vCPU: ring 0, zeros, paging on."""
        ...

    def set_gdt(self, base: int, limit: int) -> None:
        """Point GDTR of all states made from now on at linear address ``base``."""
        ...

    def set_tss(self, base: int, machine: int) -> None:
        """Point TR of all states made from now on at a task state segment at linear ``base``, machine ``machine``."""
        ...

    def set_inner_stack(self, state: Any, selector: int, pointer: int) -> None:
        """Let ``state`` enter ring 1 on this stack when it goes there through a call gate."""
        ...

    def load(self, state: Any) -> None:
        """Make ``state`` the one that runs next and flush the TLB."""
        ...

    deadline: int

    @property
    def engine(self) -> Engine:
        """What executes the code; for instruments, such as `accesses`."""
        ...

    @property
    def time_in_guest(self) -> int:
        """In a callback of the engine: `instructions` with the one at hand; -1 if that is none of the guest's."""
        ...

    def run_until(self, end: int) -> None:
        """Run until ``instructions`` reaches ``end`` or ``deadline``, or the handler calls `stop`."""
        ...

    def stop(self) -> None:
        """From the handler: end the run after this trap."""
        ...

    def single_step(self, done: StepHandler) -> None:
        """From the handler: execute one instruction, or one round of a repeated one, and then call ``done``.

        It takes no time: the trap before it has been counted.  If it traps in turn, ``done`` is called with
        true, and then the handler.
        """
        ...

    def flush_tlb(self) -> None:
        """Forget all cached translations before the next instruction."""
        ...

    def forget_code(self, begin: int, end: int) -> None:
        """Forget code translated from machine addresses ``begin`` to ``end``, which Python changed."""
        ...


class ProbedCpu:
    """A CPU whose traps are taken inside the engine's hook, through probed offsets.

    Attributes:
        handler: called as ``handler(vector, error_code, address)`` for each trap; the address
            is that of a page fault, else 0.
        state: the registers that run, or will run next.
    """

    handler: TrapHandler
    state: ContextState

    def __init__(self, memory: Memory, layout: Layout) -> None:
        self.memory = memory
        self._engine = Engine(memory)
        words = (ctypes.c_uint64 * 2).from_address(self._engine.handle + layout.counter)
        # [0] counts instructions begun in this slice and is zero between slices, [1] is the limit.
        self._counter = memoryview(words).cast("B").cast("Q")
        self._base = 0
        self._slice_end = 0
        self._deadline = 0
        self._running = False
        self._stopping: int | None = None
        self._failure: BaseException | None = None
        self._leaving: Context | None = None
        self._leaving_vector = 0
        self._step: StepHandler | None = None
        self._flush = True
        self.flushes = 0
        self.gates = Gates(memory, self.forget_code)
        self._inner: memoryview | list[int] = [0, 0]  # nowhere, until there is a task state segment
        power_on(self._engine)
        self._registers = EngineRegisters(self._engine, layout)
        self._exception, self._old_exception = self._registers.exception, self._registers.old_exception
        # What every vCPU starts from; the engine itself holds whatever guest ran last.
        self._reset = bytes(self._registers.all)
        # Nobody's, until the first is loaded.
        self.state = ContextState(self._registers, TWO_LEVEL, 0, entered=True)
        self._install_hooks()

    def new_state(self, mode: PagingMode, cr3: int) -> ContextState:
        with self._after_reset():
            set_paging(self._engine, mode)
            state = ContextState(self._registers, mode, cr3)
        state.set_ldt(0, 0)  # after a reset it would be all of the first 64 KiB
        return state

    def set_gdt(self, base: int, limit: int) -> None:
        with self._after_reset():
            self._engine.uc.reg_write(x86.UC_X86_REG_GDTR, (0, base, limit, 0))
            self._reset = bytes(self._registers.all)

    def set_tss(self, base: int, machine: int) -> None:
        with self._after_reset():
            self._engine.uc.reg_write(x86.UC_X86_REG_TR, (0, base, TSS_LIMIT, TSS_ATTRIBUTES))
            self._reset = bytes(self._registers.all)
        self._inner = self.memory.words[machine + ESP1 >> 2 : machine + ESP1 + 8 >> 2]

    def set_inner_stack(self, state: ContextState, selector: int, pointer: int) -> None:
        state.inner_stack = pointer, selector
        if state is self.state:
            self._inner[0], self._inner[1] = pointer, selector

    @contextmanager
    def _after_reset(self) -> Iterator[None]:
        """The engine as it was after power-on, for something that a new vCPU shall find; then as it was before."""
        kept = bytes(self._registers.all)
        self._registers.all[:] = self._reset
        try:
            yield
        finally:
            self._registers.all[:] = kept
            self._flush = True

    @property
    def instructions(self) -> int:
        return self._base + self._counter[0]

    @instructions.setter
    def instructions(self, value: int) -> None:
        self._base = value

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def time_in_guest(self) -> int:
        return self.instructions if self._running and self._stopping is None else -1

    def load(self, state: ContextState) -> None:
        if state is not self.state:
            state.enter(self.state)
            self.state = state
        self._inner[0], self._inner[1] = state.inner_stack
        # `flush_tlb`, spelled out.
        self._flush = True
        self.flushes += 1

    def flush_tlb(self) -> None:
        self._flush = True
        self.flushes += 1

    def forget_code(self, begin: int, end: int) -> None:
        # The library translates the addresses by the current tables; without paging they are machine
        # addresses, and no page fault is left in flight.
        kept = bytes(self._registers.all)
        self._engine.write("cr0", CR0 & ~CR0_PG)
        self._engine.forget_code(begin, end)
        self._engine.write("cr0", CR0)
        self._registers.all[:] = kept

    def single_step(self, done: StepHandler) -> None:
        self._step = done
        self._counter[1] = self._counter[0] + 1

    def _end_step(self, trapped: bool) -> None:
        """What `single_step` asked for has been done, as far as it went."""
        done, self._step = self._step, None
        assert done is not None
        done(trapped)

    def stop(self) -> None:
        if self._stopping is None:
            self._stopping = self._counter[0]
            if self._running:
                self._engine.stop()

    @property
    def deadline(self) -> int:
        """Time at which the run ends at the latest; may be changed from the handler."""
        return self._deadline

    @deadline.setter
    def deadline(self, time: int) -> None:
        self._deadline = time
        if self._running:
            # Never below what was already begun, and never past the slice.  Spelled out, as each switch sets it.
            allowed, counter = (time if time < self._slice_end else self._slice_end) - self._base, self._counter
            begun = counter[0]
            counter[1] = allowed if allowed > begun else begun

    def _end_slice(self) -> None:
        """Let the slice in progress end before the next instruction; safe at any moment of a run."""
        self._slice_end = 0
        # A single step ends the slice by itself, and must not be left out.
        if self._step is None:
            self._counter[1] = min(self._counter)

    def run_until(self, end: int) -> None:
        self._stopping = None
        with deferred_interrupts(self._end_slice) as mark:
            while self._stopping is None and (left := min(end, self._deadline) - self._base) > 0:
                self._slice(min(left, SLICE), end)
                mark.check()

    def _slice(self, count: int, end: int) -> None:
        self._slice_end = min(end, self._base + SLICE)
        self.state.starts()
        self._old_exception[0] = -1
        self._take_flush()
        self._running = True
        before = self._counter[0] = 0
        status = self._engine.start(self.state.eip, count)
        self._running = False
        reached = self._counter[0] if self._stopping is None else self._stopping
        self._base += min(reached, self._counter[1])
        self._counter[0] = 0
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            self.state.has_stopped()
        else:
            # Now, since ending a single step may let another state run.
            leaving.resume()
            self.state.words[CC_OP] = CC_OP_EFLAGS
            self._stopping = None
        if self._step is not None:
            self._base -= 1
            self._end_step(leaving is not None)
        if leaving is not None:
            self._trap_outside(self._leaving_vector)
        # Stopped before the first instruction, the machine did what was asked.
        elif status or (reached <= before and self._stopping is None):
            self._trap_outside(MACHINE_CHECK)

    def _take_flush(self) -> None:
        if self._flush:
            self._flush = False
            self._engine.write_cr3(self.state.cr3)

    def _trap_outside(self, vector: int) -> None:
        self._old_exception[0] = -1
        self.handler(vector, 0, 0)

    def _install_hooks(self) -> None:
        engine, cr3, load_cr3 = self._engine, self._engine.cr3, self._engine.load_cr3

        def on_interrupt(_engine: int, vector: int, _data: int) -> None:
            state = self.state
            try:
                if self._step is not None:
                    self._counter[0] -= 1
                    self.deadline = self._deadline
                    self._end_step(True)
                if vector >= 32:
                    gate = state.gate
                    if gate is None or vector != gate.vector or not self.gates.enter(state, gate, self.flushes):
                        self.handler(vector, 0, 0)
                elif self._leaving is None:  # else: the single step behind an instruction that will not have happened
                    self._old_exception[0] = -1
                    state.words[CC_OP] = CC_OP_EFLAGS
                    error, software, behind = self._exception()
                    if software:
                        # INT 6 comes as an invalid opcode does, with EIP still before it.
                        error, state.eip = SOFTWARE, behind
                    elif vector not in WITH_ERROR_CODE:
                        error = 0
                    self.handler(vector, error, state.words[CR2] if vector == PAGE_FAULT and not software else 0)
            except BaseException as failure:
                self._fail(failure)
            if self._flush:
                self._flush = False
                cr3[0] = self.state.cr3
                load_cr3()

        def on_invalid(_engine: int, _data: int) -> bool:
            on_interrupt(0, INVALID_OPCODE, 0)
            return True

        engine.on_interrupt(on_interrupt)
        engine.on_invalid(on_invalid)
        install_instruction_hooks(engine, self._begin_leaving)

    def _begin_leaving(self, vector: int) -> None:
        self._leaving = Context(self._engine)
        self._leaving_vector = vector
        self.stop()

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self.stop()
