"""The clocks a guest can read: real time, virtual time, wall-clock time (paper 3.3.2).

The problem: a kernel counts ticks to know the time.  In a virtual machine ticks are missed whenever somebody else
runs, so the hypervisor has to say what time it is, and it should not take a call to ask.

The idea: whoever gets the CPU finds in its shared page what real time was at one reading of the time-stamp counter,
and how fast that counts::

    real time = system_time + ((TSC - tsc_timestamp) << tsc_shift) * tsc_to_system_mul / 2^32

Wall-clock time is real time plus what it was when the machine was started.  Virtual time, the time that the vCPU
itself has run, is in its runstate record (`vcpu_op`).  Each record has a version, odd while it is being written, so
that a reader who was interrupted in the middle can tell.

Here the CPU does `CPU_HZ` instructions a second, one each cycle: real time is the number of instructions, in units of
`INSTRUCTION_NS`.  An old record is still exact then, and is renewed, when its owner gets the CPU, only if it
is older than `RECORD_AGE`.

The invariant: real time never goes back and is the same for all domains.  What breaks without it: files from the
future.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xenlab.abi.structures import SharedInfo, VcpuInfo, VcpuTimeInfo
from xenlab.machine.memory import PAGE_SHIFT

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor
    from xenlab.hypervisor.domain import Domain, Vcpu

CPU_HZ = 100_000_000
INSTRUCTION_NS = 1_000_000_000 // CPU_HZ
# Ten milliseconds.
RECORD_AGE = CPU_HZ // 100
# Nanoseconds a cycle as a fraction of 2^32: ten are five eighths, shifted by four.
TSC_SHIFT = 4
TSC_MULTIPLIER = (INSTRUCTION_NS << 32) >> TSC_SHIFT
# Midnight before the day on which the paper was presented, 20 October 2003, in seconds since 1970.
WALL_CLOCK_AT_START = 1_066_608_000
_RECORD = VcpuInfo.time.offset
_MASK = (1 << 64) - 1


def to_ns(instructions: int) -> int:
    """Instructions as nanoseconds."""
    return instructions * INSTRUCTION_NS


def to_instructions(nanoseconds: int) -> int:
    """The first instruction at or after so many nanoseconds."""
    return -(-nanoseconds // INSTRUCTION_NS)


class Clocks:
    """Writes the records.

    Attributes:
        wall_clock: seconds since 1970 and nanoseconds when real time was 0.
    """

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._memory = xen, xen.memory
        self.wall_clock = (WALL_CLOCK_AT_START, 0)

    def refresh(self, vcpu: Vcpu, asking: Vcpu | None = None) -> None:
        """Write the time record of ``vcpu`` anew, and its copy through the page tables of the vCPU that asks."""
        now = self._xen.now
        vcpu.record_due = now + RECORD_AGE
        at = vcpu.info + _RECORD
        version = self._memory.words[at >> 2] + 2 & 0xFFFF_FFFE
        record = bytes(VcpuTimeInfo(version, 0, now, to_ns(now) & _MASK, TSC_MULTIPLIER, TSC_SHIFT))
        self._memory.write(at, record)
        if vcpu.time_area:
            self._xen.vcpu_ops.copy_out(asking or vcpu, vcpu.time_area, record)

    def show_wall_clock(self, domain: Domain) -> None:
        """Write the wall-clock record of ``domain``."""
        at = domain.shared_info_mfn << PAGE_SHIFT
        seconds, nanoseconds = self.wall_clock
        words = self._memory.words
        words[at + SharedInfo.wc_sec.offset >> 2] = seconds & 0xFFFF_FFFF
        words[at + SharedInfo.wc_sec_hi.offset >> 2] = seconds >> 32
        words[at + SharedInfo.wc_nsec.offset >> 2] = nanoseconds
        version = at + SharedInfo.wc_version.offset >> 2
        words[version] = words[version] + 2 & 0xFFFF_FFFE

    def set_wall_clock(self, seconds: int, nanoseconds: int, real_ns: int) -> None:
        """It was so late, since 1970, when real time was ``real_ns``: the control domain knows better."""
        total = seconds * 1_000_000_000 + nanoseconds - real_ns
        self.wall_clock = divmod(total, 1_000_000_000)
        for domain in self._xen.domains.values():
            self.show_wall_clock(domain)

    def state(self) -> Any:
        """Everything, as plain data."""
        return self.wall_clock

    def load(self, state: Any) -> None:
        """Take over what `state` gave."""
        self.wall_clock = state
