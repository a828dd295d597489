"""A machine: memory and one CPU, switched on."""

from __future__ import annotations

from xenlab.machine.cpu import ProbedCpu
from xenlab.machine.layout import probe
from xenlab.machine.memory import Memory


class Machine:
    """Simulated hardware: machine memory and one x86 CPU on Unicorn.

    Args:
        memory_mib: machine memory in MiB, 1 to 2048.

    Attributes:
        memory: the shared buffer.
        cpu: the CPU.
    """

    def __init__(self, memory_mib: int = 64) -> None:
        self.memory = Memory(memory_mib)
        self.cpu = ProbedCpu(self.memory, probe())
