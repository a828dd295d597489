"""A machine: memory and one CPU, switched on."""

from __future__ import annotations

from xenlab.machine.cpu import Cpu, ProbedCpu
from xenlab.machine.layout import ProbeError, probe
from xenlab.machine.memory import Memory
from xenlab.machine.portable import PortableCpu


class Machine:
    """Simulated hardware: machine memory and one x86 CPU on Unicorn.

    Args:
        memory_mib: machine memory in MiB, 1 to 2048.
        portable: use the slower CPU even where the faster one would work.

    Attributes:
        memory: the shared buffer.
        cpu: the CPU.
    """

    def __init__(self, memory_mib: int = 64, *, portable: bool = False) -> None:
        self.memory = Memory(memory_mib)
        self.cpu: Cpu = _cpu(self.memory, portable)


def _cpu(memory: Memory, portable: bool) -> Cpu:
    if portable:
        return PortableCpu(memory)
    try:
        return ProbedCpu(memory, probe())
    except ProbeError:
        return PortableCpu(memory)
