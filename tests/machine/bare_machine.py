"""A machine without a hypervisor: identity-mapped memory, flat segments, one vCPU, a log of its traps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from xenlab.machine.assembler import assemble
from xenlab.machine.machine import Machine
from xenlab.machine.paging import ACCESSED, DIRTY, PRESENT, RW, TWO_LEVEL, USER, PagingMode
from xenlab.machine.segments import flat_code, flat_data

GDT, CODE, STACK, TABLES, DATA = 0x2000, 0x4000, 0xA000, 0x10000, 0x20000
SELECTORS = {1: (0x19, 0x21), 3: (0x2B, 0x33)}
PAGE_FLAGS = PRESENT | RW | USER | ACCESSED | DIRTY
# Every way that instructions reach memory, at address ``{a}``.
MEMORY_FORMS = (
    "mov eax, [{a}]", "mov [{a}], eax", "add [{a}], eax", "add eax, [{a}]", "xchg [{a}], eax",
    "lock inc dword ptr [{a}]",
    "cmpxchg [{a}], ecx", "cmpxchg8b [{a}]", "push dword ptr [{a}]", "pop dword ptr [{a}]", "call dword ptr [{a}]",
    "fld tbyte ptr [{a}]", "fstp tbyte ptr [{a}]", "movups xmm0, [{a}]", "movups [{a}], xmm0", "fxsave [{a}]",
    "bts [{a}], eax", "inc byte ptr [{a}]", "mov esp, {a}\npushad", "mov esp, {a}\npopad", "mov esp, {a}\nretf",
    "mov esp, {a}\niretd", "mov esp, {a}\ncall 0x4100", "mov ebp, {a}\nleave", "mov esi, {a}\nmovsd",
    "mov edi, {a}\nmovsd", "mov edi, {a}\nmov ecx, 9\nrep stosd", "mov ds, [{a}]", "les eax, [{a}]",
    "jmp dword ptr [{a}]", "lcall [{a}]", "mov eax, {a}\njmp eax", "fnstenv [{a}]", "enter 8, 3",
    "mov esp, {a}\npop es",
    "mov ebx, {a}\nmov al, 0\nxlatb", "mov eax, 1\nimul edx, [{a}], 5", "mov eax, {a}\nlldt ax",
)  # fmt: skip


@dataclass(frozen=True)
class Trap:
    """One trap as the handler saw it."""

    vector: int
    error: int
    address: int
    eip: int
    ring: int
    time: int


@dataclass
class Bare:
    """One MiB of memory, all mapped at its own address for everyone.

    Attributes:
        handle: called with the machine at each trap; the run ends there if it is None.
    """

    mode: PagingMode = TWO_LEVEL
    ring: int = 1
    portable: bool = False
    handle: Callable[[Bare, Trap], None] | None = None
    traps: list[Trap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = Machine(1, portable=self.portable)
        self.memory, self.cpu = self.machine.memory, self.machine.cpu
        self.write_tables()
        table = b"".join(
            d.encode().to_bytes(8, "little") for d in (flat_code(1), flat_data(1), flat_code(3), flat_data(3))
        )
        self.memory.write(GDT + 0x18, table)
        self.cpu.set_gdt(GDT, 0xFFF)
        self.cpu.handler = self._trap
        self.cpu.deadline = 1 << 62
        self.state = self.new_state(self.ring)
        self.cpu.load(self.state)

    @property
    def leaf_table(self) -> int:
        """Machine address of the l1 table that maps all memory."""
        return TABLES + 0x1000 * (len(self.mode.levels) - 1)

    def write_tables(self) -> None:
        """One table of each level, one after the other."""
        for depth, level in enumerate(self.mode.levels[:-1]):
            flags = PRESENT if level.name == "l3" else PRESENT | RW | USER | ACCESSED
            self.mode.write(self.memory, TABLES + 0x1000 * depth, 0, TABLES + 0x1000 * (depth + 1) | flags)
        for page in range(self.memory.frames):
            self.map(page, page << 12 | PAGE_FLAGS)

    def map(self, page: int, entry: int) -> None:
        """Set the l1 entry of ``page``."""
        self.mode.write(self.memory, self.leaf_table, page, entry)

    def new_state(self, ring: int):
        state = self.cpu.new_state(self.mode, TABLES)
        code, data = SELECTORS[ring]
        state.load_segment("ss", data, flat_data(ring))
        state.load_segment("cs", code, flat_code(ring))
        for name in ("ds", "es", "fs", "gs"):
            state.load_segment(name, data, flat_data(ring))
        state.esp, state.eip, state.eflags = STACK, CODE, 0x202
        return state

    def load(self, source: str | bytes) -> None:
        """Put code at `CODE` and stand there."""
        code = source if isinstance(source, bytes) else assemble(source, CODE).code
        self.memory.write(CODE, code)
        self.cpu.forget_code(CODE, CODE + 0x2000)
        self.state.eip = CODE

    def run(self, source: str | bytes, budget: int = 1000) -> list[Trap]:
        """Run ``source`` until the first trap or the budget's end; the traps so far."""
        self.load(source)
        self.cpu.run_until(self.cpu.instructions + budget)
        return self.traps

    def _trap(self, vector: int, error: int, address: int) -> None:
        state = self.cpu.state
        trap = Trap(vector, error, address, state.eip, state.cpl, self.cpu.instructions)
        self.traps.append(trap)
        if self.handle is None:
            self.cpu.stop()
        else:
            self.handle(self, trap)


__all__ = ["CODE", "DATA", "GDT", "MEMORY_FORMS", "PAGE_FLAGS", "SELECTORS", "STACK", "TABLES", "Bare", "Trap"]
