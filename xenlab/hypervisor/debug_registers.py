"""Debug registers of a guest: what may be put into them (paper 2.1.2).

The problem: the four breakpoint addresses, the status DR6 and the control DR7 are privileged, yet a guest's
debugger needs them.  It may set them by moves, which fault and are carried out (`emulate`), or by a hypercall.

The invariant: DR7 never holds what would act on others: no general-detect bit, which would stop the hypervisor's own
use of the registers, and no breakpoint on ports while the guest has not asked for that extension in its CR4.
Reserved bits read as hardware has them.  What breaks without it: the hypervisor traps on itself.

DR4 and DR5 are other names for DR6 and DR7, unless CR4 switches debug extensions on: then they do not exist.  A
breakpoint's address may lie anywhere, in the hypervisor's range too, where the guest can only miss it.

Breakpoints on execution and on data act (`breakpoints`); one on ports is accepted and never hit.
Errnos are those of Xen's arch/x86/pv/misc-hypercalls.c for 32-bit guests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from xenlab.abi.numbers import Errno, Hypercall
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Vcpu

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

CR4_DEBUG_EXTENSIONS = 0x8
STATUS_ONES, STATUS_ZEROS = 0xFFFF_0FF0, 0x1000
CONTROL_ONE, CONTROL_ZEROS = 0x400, 0xD800
GENERAL_DETECT, ENABLED = 0x2000, 0xFF
SINGLE_STEP = 0x4000
_ON_PORTS = 2
_U32 = 0xFFFF_FFFF


class DebugRegisters:
    """The hypercalls ``set_debugreg`` and ``get_debugreg``."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen = xen
        xen.hypercalls.register(Hypercall.set_debugreg, self.set_debugreg)
        xen.hypercalls.register(Hypercall.get_debugreg, self.get_debugreg)

    def set_debugreg(self, vcpu: Vcpu, number: int, value: int, *_: int) -> int:
        """Put ``value`` into register ``number``."""
        vcpu.control |= written(vcpu.control, number, value)
        self._xen.exceptions.breakpoints.note(vcpu)
        return 0

    def get_debugreg(self, vcpu: Vcpu, number: int, *_: int) -> int:
        """The register itself, and so a large one looks like an errno."""
        return vcpu.control[register_name(vcpu.control, number)]


def register_name(control: Mapping[str, int], number: int) -> str:
    """``drN`` as the guest means it.  Raises HypercallError(ENODEV) where there is no such register."""
    if number in (4, 5) and not control["cr4"] & CR4_DEBUG_EXTENSIONS:
        number += 2
    if number > 7 or number in (4, 5):
        raise HypercallError(Errno.ENODEV)
    return f"dr{number}"


def written(control: Mapping[str, int], number: int, value: int) -> dict[str, int]:
    """What a write of ``value`` makes of the registers.

    Raises:
        HypercallError: ENODEV for a register that does not exist, EPERM for a value that it must not have.
    """
    name = register_name(control, number)
    if name == "dr6":
        value = value & ~STATUS_ZEROS | STATUS_ONES
    elif name == "dr7":
        value = value & ~CONTROL_ZEROS | CONTROL_ONE
        ports = any(value >> 16 + 4 * n & 3 == _ON_PORTS for n in range(4))
        if value & GENERAL_DETECT or (value & ENABLED and ports and not control["cr4"] & CR4_DEBUG_EXTENSIONS):
            raise HypercallError(Errno.EPERM)
    return {name: value & _U32}
