"""The hypercalls of the control domain's tools, as far as a guest can tell (paper 2.3).

In Xen the tools build, pause and destroy domains, and set their shares, by ``domctl``, ``sysctl`` and
``platform_op``.  Here the tools are Python functions that call the hypervisor directly (`toolstack`), so of these
hypercalls only the doors are left: who may come in, and in which version of the interface.

The invariant: the answer depends on who asks before it depends on what is asked.  What breaks without it: a guest
learns, by trying, which commands there are.

The order of the checks is Xen's: the argument is read, its version compared, and then the privilege looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.abi.numbers import (
    DOMCTL_VERSION,
    DOMID_SELF,
    PLATFORM_VERSION,
    SYSCTL_VERSION,
    Errno,
    HvmOp,
    Hypercall,
)
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Vcpu

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

# What each reads before anything else: command, version, for domctl also the domain, and 128 bytes of arguments.
_SYSCTL_BYTES, _DOMCTL_BYTES, _PLATFORM_BYTES, _PARAMETER_BYTES = 136, 144, 136, 16
_CREATE_DOMAIN = 1


class ControlInterface:
    """Refuses what is not for everybody, and what nobody needs here."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._guest = xen, xen.guest_memory
        table = xen.hypercalls
        table.register(Hypercall.sysctl, self.sysctl)
        table.register(Hypercall.domctl, self.domctl)
        table.register(Hypercall.platform_op, self.platform_op)
        table.register(Hypercall.hvm_op, self.hvm_op)
        table.register(Hypercall.xenpmu_op, _no_counters)
        for number in (Hypercall.kexec_op, Hypercall.hypfs_op, Hypercall.mca):
            table.register(number, _for_the_control_domain)

    def sysctl(self, vcpu: Vcpu, address: int, *_: int) -> int:
        """The machine: console, schedulers, CPU pools, live patches."""
        self._enter(vcpu, address, _SYSCTL_BYTES, SYSCTL_VERSION)
        return _for_the_control_domain(vcpu)

    def domctl(self, vcpu: Vcpu, address: int, *_: int) -> int:
        """Another domain; which one there is comes before whether one may."""
        data = self._enter(vcpu, address, _DOMCTL_BYTES, DOMCTL_VERSION)
        command, domid = int.from_bytes(data[:4], "little"), int.from_bytes(data[8:10], "little")
        if command != _CREATE_DOMAIN:
            self._check_domain(vcpu, domid)
        return _for_the_control_domain(vcpu)

    def platform_op(self, vcpu: Vcpu, address: int, *_: int) -> int:
        """The hardware: clock, microcode, power."""
        self._enter(vcpu, address, _PLATFORM_BYTES, PLATFORM_VERSION)
        return _for_the_control_domain(vcpu)

    def hvm_op(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Parameters of fully virtualized domains, of which there are none."""
        if command not in (HvmOp.SET_PARAM, HvmOp.GET_PARAM):
            raise HypercallError(Errno.ENOSYS)
        domid = int.from_bytes(self._guest.read(vcpu, address, _PARAMETER_BYTES)[:2], "little")
        if domid != DOMID_SELF:
            self._check_domain(vcpu, domid)
        raise HypercallError(Errno.EINVAL)

    def _enter(self, vcpu: Vcpu, address: int, size: int, version: int) -> bytes:
        data = self._guest.read(vcpu, address, size)
        if int.from_bytes(data[4:8], "little") != version:
            raise HypercallError(Errno.EACCES)
        return data

    def _check_domain(self, vcpu: Vcpu, domid: int) -> None:
        if domid not in self._xen.domains:
            raise HypercallError(Errno.ESRCH)


def _for_the_control_domain(vcpu: Vcpu, *_: int) -> int:
    raise HypercallError(Errno.ENOSYS if vcpu.domain.privileged else Errno.EPERM)


def _no_counters(_vcpu: Vcpu, *_: int) -> int:
    raise HypercallError(Errno.EOPNOTSUPP)
