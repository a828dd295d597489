"""The slower CPU: the same results as `ProbedCpu` through Unicorn's public calls alone.

The problem: an engine of another build may keep its state in other places than `layout` looks
for.  Then nothing may be read from or written to a saved context directly, but registers can
still be read and written by name, contexts restored as a whole, and code be run.

How it works.  A trap ends the run; the hook only notes its vector.  The registers are read, the
handler works on them as plain numbers, and the state is built anew for the next run:

1. restore a context of ring 0 saved at power-on; only that cleans the mark of an exception in
   flight, without which the next fault would be a double fault;
2. load code segment and ring by a real IRET, from a stack and a descriptor table in a page of the
   CPU's own, at a physical address above all machine memory, with paging off;
3. write the other registers by name, paging and the guest's own table last.

Code in ring 0, which only labs run, may load system registers.  They are read after each run that
began there, and from then on belong to the state.

Instructions are counted by a hook on each.  Error codes come from `fault_code`.

The invariant: same guests, same traps, same instruction times, same registers as on the probed
CPU, to the bit (tests run both).  One thing differs that a guest can tell, if it changes its page tables and does
not flush, and lesson 06 says so:

* the TLB is emptied at every trap, so a changed entry takes effect at once.

Four differ where no validated guest can:

* the hidden part of a segment register is not readable.  It is followed by selector: a guest that
  loads the same selector again, after the hypervisor changed its descriptor, keeps the old one
  until it loads another;
* in ring 3, an operand that a segment load takes from inside the descriptor table itself faults
  with the code of the descriptor's access; the hypervisor's range is reported as #GP anyway;
* what code in ring 0 loads into CR3, debug and model-specific registers lasts until the next trap;
* a page fault for which no refused access is found on the second try has the code 0.
"""

from __future__ import annotations

from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import UcError

from xenlab.errors import MachineError
from xenlab.machine.cpu import ESP1, SLICE, TSS_ATTRIBUTES, TSS_LIMIT, StepHandler, TrapHandler
from xenlab.machine.engine import FLOATING_POINT, GENERAL, REGISTER_IDS, SEGMENTS, Context, Engine
from xenlab.machine.fault_code import LONGEST_INSTRUCTION, PageFaultCodes, SelectorCodes, read_linear
from xenlab.machine.gates import Gates
from xenlab.machine.interrupts import deferred_interrupts
from xenlab.machine.memory import Memory
from xenlab.machine.paging import READ, PageFault, PagingMode, walk
from xenlab.machine.portable_state import FLOATING_ORDER, PortableState
from xenlab.machine.power import CR0, install_instruction_hooks, power_on, set_paging
from xenlab.machine.register_batch import RegisterBatch
from xenlab.machine.segments import Descriptor, flat_data
from xenlab.machine.state import CR0_TS, VM, Segment
from xenlab.machine.vectors import INVALID_OPCODE, MACHINE_CHECK, PAGE_FAULT, SOFTWARE, WITH_ERROR_CODE

# Above 2 GiB, the most that machine memory can have, and below every guest's segment limit.
_SCRATCH, _SCRATCH_BYTES = 0xF000_0000, 0x3_0000
_TABLE, _STUB, _STACK, _LOCAL = (_SCRATCH + at for at in (0, 0x1_0000, 0x1_8000, 0x2_0000))
_TABLE_LIMIT, _RING0_SS = 0xFFFF, 8
_TABLE_INDICATOR = 4
_PAGING = 0x8000_0000
_IRETD = b"\xcf"
_SHORT_INTERRUPTS = {3: b"\xcc", 4: b"\xce"}
_INTEGER = (*GENERAL, "eip", "eflags", "cr2", *SEGMENTS)
# Those that only ring 0 can load, besides the GDT's; CR0 last, since it switches paging on.
_SYSTEM = tuple(getattr(x86, f"UC_X86_REG_{name}") for name in ("IDTR", "LDTR", "TR", "CR4", "CR0"))
_DPL, _VM_SEGMENT, _PRESENT_LDT = 3 << 45, 0xF300, 0x8200


class PortableCpu:
    """A CPU that takes its traps between runs of the engine, through public calls.

    Attributes:
        handler: called as ``handler(vector, error_code, address)`` for each trap.
        state: the registers that run, or will run next.
        instructions: instructions begun since power-on.
        deadline: time at which the run ends at the latest; may be changed from the handler.
    """

    handler: TrapHandler
    state: PortableState

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.instructions = self.deadline = self.flushes = 0
        self._engine = engine = Engine(memory)
        self.gates = Gates(memory, self.forget_code)
        self._gdt = (0, 0)
        self._inner: memoryview | list[int] = [0, 0]
        self._stopping = self._running = False
        self._vector: int | None = None
        self._leaving: Context | None = None
        self._step: StepHandler | None = None
        self._begun = self._last = 0
        self._integer = RegisterBatch(engine, [(REGISTER_IDS[name], 4) for name in _INTEGER])
        self._floating = RegisterBatch(engine, [FLOATING_POINT[name] for name in FLOATING_ORDER])
        engine.uc.mem_map(_SCRATCH, _SCRATCH_BYTES)
        engine.uc.mem_write(_STUB, _IRETD)
        power_on(engine)
        self._write_gdt(_TABLE, _TABLE_LIMIT)
        engine.uc.reg_write(x86.UC_X86_REG_LDTR, (0, _LOCAL, _TABLE_LIMIT, _PRESENT_LDT))
        # After a reset the cached stack segment is a 16-bit one, whatever the hidden flags say.
        engine.write("cr0", CR0 & ~_PAGING)
        engine.uc.mem_write(_TABLE + _RING0_SS, flat_data(0).encode().to_bytes(8, "little"))
        engine.write("ss", _RING0_SS)
        self._ring0 = Context(engine)
        self._blank = self._floating.read()
        self._page_faults, self._selectors = PageFaultCodes(engine), SelectorCodes(memory)
        self._install_hooks()

    def new_state(self, mode: PagingMode, cr3: int) -> PortableState:
        return PortableState(self._blank, mode, cr3, self._gdt)

    def set_gdt(self, base: int, limit: int) -> None:
        """Point GDTR of all states made from now on at linear address ``base``."""
        self._gdt = (base, limit)

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def time_in_guest(self) -> int:
        counts = self._running and self._vector is None and self._leaving is None
        return self.instructions + self._begun if counts else -1

    def set_tss(self, base: int, machine: int) -> None:
        """Point TR of all states at a task state segment."""
        self._ring0.resume()
        self._engine.uc.reg_write(x86.UC_X86_REG_TR, (0, base, TSS_LIMIT, TSS_ATTRIBUTES))
        self._ring0.capture()
        self._inner = self.memory.words[machine + ESP1 >> 2 : machine + ESP1 + 8 >> 2]

    def set_inner_stack(self, state: PortableState, selector: int, pointer: int) -> None:
        """Let ``state`` enter ring 1 on this stack when it goes there through a call gate."""
        state.inner_stack = pointer, selector
        if state is getattr(self, "state", None):
            self._inner[0], self._inner[1] = pointer, selector

    def load(self, state: PortableState) -> None:
        self.state = state
        self._inner[0], self._inner[1] = state.inner_stack
        self.flush_tlb()

    def flush_tlb(self) -> None:
        # Nothing is cached from one trap to the next.
        self.flushes += 1

    def forget_code(self, begin: int, end: int) -> None:
        # The library translates the addresses by the current tables; without paging they are machine addresses.
        self._engine.write("cr0", CR0 & ~_PAGING)
        self._engine.forget_code(begin, end)

    def single_step(self, done: StepHandler) -> None:
        self._step = done

    def stop(self) -> None:
        self._stopping = True

    def run_until(self, end: int) -> None:
        self._stopping = False
        with deferred_interrupts() as mark:
            while not self._stopping and (left := min(end, self.deadline) - self.instructions) > 0:
                self._run_to_trap(min(left, SLICE))
                while self._step is not None:
                    self._run_to_trap(1)
                mark.check()

    def _run_to_trap(self, limit: int) -> None:
        self._enter(self.state)
        self._vector, self._leaving, self._begun, self._last = None, None, 0, 0
        self._running = True
        status = self._engine.start(self.state.eip, limit)
        self._running = False
        begun = min(self._begun, limit)
        self.instructions += begun
        if self._leaving is not None:
            self._leaving.resume()
        self._collect(self.state)
        if self._step is not None:
            done, self._step = self._step, None
            self.instructions -= begun
            done(self._vector is not None)
        if self._vector is not None:
            self._trap(self._vector)
        elif status or not begun:
            self.handler(MACHINE_CHECK, 0, 0)

    def _trap(self, vector: int) -> None:
        state, error, address = self.state, 0, 0
        gate = state.gate
        if gate is not None and vector == gate.vector and self.gates.enter(state, gate, self.flushes):
            return
        if vector < 32 and self._is_software(vector):
            error = SOFTWARE
        elif vector == PAGE_FAULT:
            address = state.cr2
            error = self._page_faults.find(state, address)
        elif vector in WITH_ERROR_CODE and self._leaving is None:
            error = self._selectors.find(state)
        self.handler(vector, error, address)

    def _is_software(self, vector: int) -> bool:
        """Whether the instruction begun last is one that names ``vector``."""
        state = self.state
        end = state.segment("cs").base + state.eip & 0xFFFF_FFFF
        if not 0 < end - self._last <= LONGEST_INSTRUCTION:
            return False
        code = read_linear(self.memory, state, self._last, end - self._last)
        return code.endswith((bytes((0xCD, vector)), _SHORT_INTERRUPTS.get(vector, b"\xcd\x03")))

    def _collect(self, state: PortableState) -> None:
        if not state.cpl:
            read = self._engine.uc.reg_read
            _selector, base, limit, _flags = read(x86.UC_X86_REG_GDTR)
            state.gdt = base, limit
            state.system = [read(number) for number in _SYSTEM]
        slots = zip(_INTEGER, self._integer.read_integers(), strict=True)
        values = dict(slots)
        selectors = {name: values[name] & 0xFFFF for name in SEGMENTS}
        if values["eflags"] & VM:
            caches = {name: Segment(number, number << 4, 0xFFFF, _VM_SEGMENT) for name, number in selectors.items()}
        else:
            caches = {name: self._cache(state, name, number) for name, number in selectors.items()}
        state.take(values, caches)
        state.floating = self._floating.read()

    def _cache(self, state: PortableState, name: str, selector: int) -> Segment:
        """The hidden part of a segment register that now holds ``selector``."""
        before = state.caches[name]
        if before.selector == selector:
            return before
        base, _limit = state.ldt if selector & _TABLE_INDICATOR else state.gdt
        found = walk(self.memory, state.mode, state.cr3, base + (selector & ~7), READ, update=False)
        if selector < 4 or isinstance(found, PageFault):
            return Segment.of(selector, None)
        return Segment.of(selector, Descriptor.decode(self.memory.qwords[found.machine >> 3]))

    def _enter(self, state: PortableState) -> None:
        """Put ``state`` into the engine."""
        engine = self._engine
        self._ring0.resume()
        engine.write("cr0", CR0)
        engine.write("cr0", CR0 & ~_PAGING)  # a change of paging empties the TLB
        self._floating.write(state.floating)
        if state.cpl or state.caches["cs"].selector >= 4:
            self._load_code_segment(state)
        if not state.cpl and state.caches["ss"].selector >= 4:
            self._load_segment("ss", state.caches["ss"])
        for name in ("es", "ds", "fs", "gs"):
            self._load_segment(name, state.caches[name])
        for name in (*GENERAL, "eflags", "cr2"):
            engine.write(name, getattr(state, name))
        self._write_gdt(*state.gdt)
        self._write_system(state)
        engine.write_cr3(state.cr3)

    def _write_system(self, state: PortableState) -> None:
        if not state.system:
            self._engine.uc.reg_write(x86.UC_X86_REG_LDTR, (0, *state.ldt, _PRESENT_LDT))
        for number, value in zip(_SYSTEM, state.system, strict=False):
            self._engine.uc.reg_write(number, value)
        if not state.system:
            set_paging(self._engine, state.mode)
            self._engine.write("cr0", CR0 | CR0_TS if state.task_switched else CR0)

    def _load_code_segment(self, state: PortableState) -> None:
        """Load CS, and with it the ring and, outside ring 0, SS."""
        code, stack = state.caches["cs"], state.caches["ss"]
        self._describe(code)
        self._describe(stack)
        # Back to the stub's address in the new segment; the instruction there is not begun.
        frame: tuple[int, ...] = (_STUB - code.base, code.selector, 2 | state.eflags & VM, 0, stack.selector)
        # IRET reads these in virtual 8086 mode, which the emulator lets every ring enter.
        frame += tuple(state.caches[name].selector for name in ("es", "ds", "fs", "gs"))
        data = b"".join((word & 0xFFFF_FFFF).to_bytes(4, "little") for word in frame)
        self._engine.uc.mem_write(_STACK, data)
        self._engine.write("esp", _STACK)
        self._vector = None
        self._engine.start(_STUB, 1)
        if self._vector is not None:
            raise MachineError(
                f"ring {state.cpl}: expected a code and a stack segment of that ring, found selectors "
                f"{code.selector:#x} and {stack.selector:#x}, which raise exception {self._vector}"
            )

    def _load_segment(self, name: str, cache: Segment) -> None:
        self._describe(cache)
        try:
            self._engine.write(name, cache.selector)
        except UcError:
            # Loaded when the ring was another: the level in the copy does not matter to accesses.
            self._describe(cache, _DPL)
            self._engine.write(name, cache.selector)

    def _describe(self, cache: Segment, also: int = 0) -> None:
        """Put the descriptor that gives ``cache`` into the CPU's own table."""
        if cache.selector >= 4:
            flags = cache.attributes >> 20 & 0xF
            value = Descriptor(cache.base, cache.limit, cache.attributes >> 8 & 0xFF, flags).encode() | also
            table = _LOCAL if cache.selector & _TABLE_INDICATOR else _TABLE
            self._engine.uc.mem_write(table + (cache.selector & 0xFFF8), value.to_bytes(8, "little"))

    def _write_gdt(self, base: int, limit: int) -> None:
        self._engine.uc.reg_write(x86.UC_X86_REG_GDTR, (0, base, limit, 0))

    def _install_hooks(self) -> None:
        engine = self._engine

        def on_interrupt(_engine: int, vector: int, _data: int) -> None:
            if self._leaving is None:  # else the single step behind an instruction that will not have happened
                self._vector = vector
            engine.stop()

        def on_invalid(_engine: int, _data: int) -> bool:
            on_interrupt(0, INVALID_OPCODE, 0)
            return True

        def on_code(_engine: int, address: int, _size: int, _data: int) -> None:
            self._begun += 1
            self._last = address

        engine.on_interrupt(on_interrupt)
        engine.on_invalid(on_invalid)
        engine.on_code(on_code)
        install_instruction_hooks(engine, self._begin_leaving)

    def _begin_leaving(self, vector: int) -> None:
        self._leaving = Context(self._engine)
        self._vector = vector
        self._engine.stop()
