"""A vCPU's registers as plain numbers, for the CPU that may not look into a saved context.

The problem: `PortableCpu` reads the registers after a run, and writes them before the next.  Between
the two the hypervisor works on them as on any `CpuState`, so they have to be kept somewhere.

The invariant: whatever a run leaves in the engine and a later one can observe is kept here, but for
the exceptions that `portable` lists.  What breaks without it: a guest that finds the registers of
another guest, or those of power-on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from xenlab.machine.engine import FLOATING_POINT, GENERAL, SEGMENTS
from xenlab.machine.floating_point import from_image
from xenlab.machine.gates import TrapGate
from xenlab.machine.paging import PagingMode
from xenlab.machine.register_batch import RegisterBatch
from xenlab.machine.segments import Descriptor
from xenlab.machine.state import ARITHMETIC, DF, VM, Segment, architectural

# ST0 is relative to the top of stack in the status word, so that has to be written first.
FLOATING_ORDER = sorted(FLOATING_POINT, key=lambda name: not name.startswith("fp"))


class PortableState:
    """`CpuState` in plain numbers.

    Attributes:
        gdt: linear address and limit of the descriptor table.
        ldt: the same of the local one.
        gate, inner_stack: see `CpuState`.
        system: IDTR, LDTR, TR, CR4 and CR0 as Unicorn gives them, once the state has run in ring 0.
        task_switched: CR0.TS.
        floating: the x87 and SSE registers, as `RegisterBatch` reads them.
    """

    eax: int
    ecx: int
    edx: int
    ebx: int
    esp: int
    ebp: int
    esi: int
    edi: int
    eip: int

    def __init__(self, floating: bytes, mode: PagingMode, cr3: int, gdt: tuple[int, int]) -> None:
        self.mode, self.cr3, self.gdt, self.ldt = mode, cr3, gdt, (0, 0)
        self.gate: TrapGate | None = None
        self.inner_stack = (0, 0)
        self.task_switched = False
        self.system: list[int | tuple[int, ...]] = []
        self.floating = floating
        self.caches = {name: Segment(0, 0, 0, 0) for name in SEGMENTS}
        self.set_general((0,) * len(GENERAL))
        self.eip = self._cpl = self.cr2 = 0
        self._eflags = 2

    @property
    def cpl(self) -> int:
        return self._cpl

    @property
    def eflags(self) -> int:
        return self._eflags

    @eflags.setter
    def eflags(self, value: int) -> None:
        self._eflags = value | 2

    def segment(self, name: str) -> Segment:
        return self.caches[name]

    def load_segment(self, name: str, selector: int, descriptor: Descriptor | None) -> None:
        self.caches[name] = Segment.of(selector, descriptor)
        if name == "ss" and descriptor is not None:
            self._cpl = descriptor.dpl

    def set_ldt(self, base: int, limit: int) -> None:
        self.ldt = base, limit

    def set_task_switched(self, on: bool) -> None:
        self.task_switched = on

    def set_floating_point(self, image: bytes) -> None:
        values = from_image(image)
        self.floating = b"".join(values[name].to_bytes(RegisterBatch.SLOT, "little") for name in FLOATING_ORDER)

    def general(self) -> tuple[int, int, int, int, int, int, int, int]:
        return self.eax, self.ecx, self.edx, self.ebx, self.esp, self.ebp, self.esi, self.edi

    def set_general(self, values: tuple[int, ...]) -> None:
        """Set EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI."""
        for name, value in zip(GENERAL, values, strict=True):
            setattr(self, name, value)

    def frame(self) -> tuple[int, ...]:
        return *self.general(), self.eip, self._cpl

    def set_eax(self, value: int) -> None:
        self.eax = value

    def selectors(self) -> tuple[int, ...]:
        return tuple(cache.selector for cache in self.caches.values())

    def interrupted(self) -> tuple[int, int, int, int, int, int]:
        cs, ss = self.caches["cs"].selector, self.caches["ss"].selector
        return self.esp, self.eip, self._eflags, self._cpl, cs, ss

    def transfer(self, cs: Segment, eip: int, eflags: int, esp: int, ss: Segment | None) -> None:
        self.caches["cs"] = cs
        if ss is not None:
            self.caches["ss"] = ss
            self._cpl = ss.attributes >> 13 & 3
        self.eip, self.eflags, self.esp = eip, eflags, esp

    def enter_handler(self, cs: Segment | None, eip: int, esp: int, ss: Segment | None, kept: int) -> None:
        self.transfer(cs or self.caches["cs"], eip, self.eflags & (kept | ARITHMETIC | DF), esp, ss)

    def take(self, values: Mapping[str, int], caches: dict[str, Segment]) -> None:
        """Take over what the engine's registers held after a run."""
        self.set_general(tuple(values[name] for name in GENERAL))
        self.eip, self._eflags, self.cr2 = values["eip"], values["eflags"], values["cr2"]
        self.caches = caches
        self._cpl = 3 if self._eflags & VM else caches["cs"].selector & 3

    def save(self) -> bytes:
        caches = [[c.selector, c.base, c.limit, c.attributes] for c in self.caches.values()]
        numbers = [
            self.general(),
            self.eip,
            self._eflags,
            self.cr2,
            self.cr3,
            self._cpl,
            self.gdt,
            self.ldt,
            self.system,
            self.task_switched,
            caches,
        ]
        return self.floating + json.dumps(numbers).encode()

    def restore(self, saved: bytes) -> None:
        size = len(self.floating)
        self.floating = saved[:size]
        general, *numbers, gdt, ldt, system, self.task_switched, caches = json.loads(saved[size:])
        self.eip, self._eflags, self.cr2, self.cr3, self._cpl = numbers
        self.set_general(general)
        self.gdt, self.ldt = (gdt[0], gdt[1]), (ldt[0], ldt[1])
        self.system = [tuple(value) if isinstance(value, list) else value for value in system]
        self.caches = {name: Segment(*cache) for name, cache in zip(SEGMENTS, caches, strict=True)}

    def architectural(self) -> Mapping[str, int]:
        floating = {}
        for name, (_number, size) in FLOATING_POINT.items():
            at = FLOATING_ORDER.index(name) * RegisterBatch.SLOT
            floating[name] = int.from_bytes(self.floating[at : at + size], "little")
        return architectural(self, floating)
