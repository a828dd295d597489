"""A bare Unicorn engine for one fact each, as the machine room sets it up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from unicorn import x86_const as x86

from xenlab.machine.assembler import assemble
from xenlab.machine.engine import Context, Engine
from xenlab.machine.layout import Layout, probe
from xenlab.machine.memory import Memory
from xenlab.machine.paging import PRESENT, RW, TWO_LEVEL, USER
from xenlab.machine.power import power_on, set_paging
from xenlab.machine.segments import flat_code, flat_data

CODE, STUB, STACK, ROOT, LEAVES, GDT = 0x4000, 0x6000, 0xA000, 0x10000, 0x11000, 0x2000


class Bench:
    """One MiB, identity-mapped with two-level tables; the engine's calls are used directly."""

    def __init__(self) -> None:
        self.engine = Engine(Memory(1))
        self.uc, self.memory = self.engine.uc, self.engine.memory
        self.layout: Layout = probe()
        self.vectors: list[tuple[int, int]] = []
        self.on_trap: Callable[[int], None] = lambda _vector: self.engine.stop()
        TWO_LEVEL.write(self.memory, ROOT, 0, LEAVES | PRESENT | RW | USER)
        for page in range(256):
            TWO_LEVEL.write(self.memory, LEAVES, page, page << 12 | PRESENT | RW | USER)
        for number, descriptor in enumerate(
            (flat_code(0), flat_data(0), flat_code(1), flat_data(1), flat_code(3), flat_data(3))
        ):
            self.memory.qwords[(GDT >> 3) + 1 + number] = descriptor.encode()
        power_on(self.engine)
        self.uc.reg_write(x86.UC_X86_REG_GDTR, (0, GDT, 0xFFF, 0))
        set_paging(self.engine, TWO_LEVEL)
        self.engine.write_cr3(ROOT)
        self.engine.write("esp", STACK)
        self.engine.on_interrupt(self._interrupt)
        self.engine.on_invalid(self._invalid)

    def _interrupt(self, _engine: int, vector: int, _data: int) -> None:
        self.vectors.append((vector, self.engine.read("eip")))
        self.on_trap(vector)

    def _invalid(self, _engine: int, _data: int) -> bool:
        self._interrupt(0, 6, 0)
        return True

    def put(self, source: str, at: int = CODE) -> int:
        """Assemble to ``at``; returns the address behind it."""
        code = assemble(source, at).code
        self.memory.write(at, code)
        self.uc.ctl_remove_cache(at, at + 0x1000)
        return at + len(code)

    def run(self, source: str, count: int = 50) -> int:
        """Run ``source`` in the present ring; the status."""
        self.put(source)
        return self.engine.start(CODE, count)

    def enter_ring(self, ring: int) -> None:
        """Change ring by IRET, as hardware does."""
        code, data = {1: (0x19, 0x21), 3: (0x2B, 0x33)}[ring]
        self.put("mov eax, 0x10\nmov ss, eax\nmov esp, 0xA000", STUB)
        self.engine.start(STUB, 3)
        self.put(f"push {data}\npush {STACK}\npush 0x202\npush {code}\npush {CODE}\niretd", STUB)
        self.engine.start(STUB, 6)
        assert self.uc.reg_read(x86.UC_X86_REG_CS) == code
        assert not self.vectors

    def map(self, page: int, entry: int) -> None:
        """Set a leaf entry without telling the CPU."""
        TWO_LEVEL.write(self.memory, LEAVES, page, entry)

    def context(self) -> Context:
        """The present state, saved."""
        return Context(self.engine)


@pytest.fixture
def bench() -> Bench:
    """A fresh engine."""
    return Bench()
