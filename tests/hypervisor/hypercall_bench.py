"""A guest that is held still while hypercalls are made with its registers."""

from __future__ import annotations

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import HYPERCALL_VECTOR
from xenlab.hypervisor.trace import Trace
from xenlab.machine.paging import TWO_LEVEL, PagingMode

BASE = 0xC000_0000
SCRATCH, END = 0xC000_8000, 0xC010_0000
IDLE = "start: jmp start\n .align 4096\n .skip 0x8000"


class Bench:
    """One guest with 1 MiB at `BASE`; what stands from `SCRATCH` on is nobody's."""

    def __init__(self, mode: PagingMode = TWO_LEVEL) -> None:
        self.xen = Hypervisor(Machine(memory_mib=4), trace=Trace())
        self.domain = boot(self.xen, IDLE, mode=mode)
        self.xen.run(10)
        self.vcpu = self.domain.vcpus[0]

    def call(self, number: int, *arguments: int) -> int:
        """The result of one hypercall, as the signed number that a guest's C code would see."""
        state = self.vcpu.state
        for name, value in zip(("ebx", "ecx", "edx", "esi", "edi", "ebp"), arguments, strict=False):
            setattr(state, name, value)
        state.eax = number
        self.xen.trap(HYPERCALL_VECTOR, 0, 0)
        return state.eax - (state.eax >> 31 << 32)

    def write(self, address: int, data: bytes) -> None:
        self.xen.guest_memory.write(self.vcpu, address, data)

    def read(self, address: int, length: int) -> bytes:
        return self.xen.guest_memory.read(self.vcpu, address, length)

    @property
    def tables(self) -> int:
        return int.from_bytes(self.read(self.vcpu.state.esi + 60, 4), "little")

    def call_to_its_end(self, number: int, *arguments: int) -> int:
        """`call`, and again as often as the guest would execute its instruction."""
        state, eip = self.vcpu.state, self.vcpu.state.eip
        result = self.call(number, *arguments)
        while state.eip != eip:
            state.eip = eip
            result = self.call(number, state.ebx, state.ecx, state.edx, state.esi, state.edi, state.ebp)
        return result
