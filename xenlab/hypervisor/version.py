"""What the hypervisor says about itself: the hypercall ``xen_version`` (paper 3.1).

The problem: one kernel image runs on hypervisors of many ages and configurations.  It asks which one this is, and
decides by the answer how it does things.

The invariant: what anybody may know is said to everybody, what only the control domain may know is denied to the
others; which of the two it is depends on the command alone.  What breaks without it: a guest reads on the
hypervisor's command line what protects it from that guest.

Numbers, sizes and errnos are those of version.h and Xen's common/kernel.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.abi.kernel_notes import Feature
from xenlab.abi.numbers import Errno, Hypercall, VmAssistType, XenVersion
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.layout import start_of
from xenlab.machine.memory import PAGE_SIZE

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

XEN_MAJOR, XEN_MINOR, EXTRA_VERSION = 4, 17, b".0-xenlab"
CAPABILITIES = b"xen-3.0-x86_32 xen-3.0-x86_32p "
_DENIED = b"<denied>\0"
_FEATURES = 1 << Feature.mmu_pt_update_preserve_ad | 1 << Feature.highmem_assist | 1 << Feature.not_direct_mapped


class Version:
    """The hypercall that tells a guest what it runs on."""

    def __init__(self, xen: Hypervisor) -> None:
        self._guest = xen.guest_memory
        xen.hypercalls.register(Hypercall.xen_version, self.xen_version)

    def xen_version(self, vcpu: Vcpu, command: int, address: int, *_: int) -> int:
        """Answer one command of version.h; most write their answer to ``address``."""
        if not command:  # VERSION, the cheapest hypercall there is
            return XEN_MAJOR << 16 | XEN_MINOR
        if command == XenVersion.PAGESIZE:
            if address:
                raise HypercallError(Errno.EINVAL)
            return PAGE_SIZE
        if command == XenVersion.GET_FEATURES:
            if self._guest.read_words(vcpu, address, 2)[0]:  # there is one word of features
                raise HypercallError(Errno.EINVAL)
            self._guest.write_words(vcpu, address + 4, (features(vcpu.domain),))
            return 0
        if command == XenVersion.BUILD_ID:
            return self._build_id(vcpu, address)
        answer = _answer(vcpu, command)
        if answer is None:
            raise HypercallError(Errno.ENOSYS)
        self._guest.write(vcpu, address, answer)
        return 0

    def _build_id(self, vcpu: Vcpu, address: int) -> int:
        """A hash that a linker leaves in a hypervisor; there is no linker here, and so no hash."""
        if not vcpu.domain.privileged:
            raise HypercallError(Errno.EPERM)
        if address and not self._guest.read_word(vcpu, address):
            raise HypercallError(Errno.EINVAL)
        raise HypercallError(Errno.ENODATA)


def features(domain: Domain) -> int:
    """The word of features that ``domain`` may count on, as bits by `Feature`."""
    if domain.assists & 1 << VmAssistType.PAE_EXTENDED_CR3:
        return _FEATURES | 1 << Feature.pae_pgdir_above_4gb | domain.privileged << Feature.dom0
    return _FEATURES | domain.privileged << Feature.dom0


def _answer(vcpu: Vcpu, command: int) -> bytes | None:
    compiled = (b"xenlab".ljust(64, b"\0"), b"xenlab".ljust(16, b"\0"), bytes(32), bytes(32))
    answers: dict[int, bytes] = {
        XenVersion.EXTRAVERSION: EXTRA_VERSION.ljust(16, b"\0"),
        XenVersion.COMPILE_INFO: b"".join(compiled),
        XenVersion.CAPABILITIES: CAPABILITIES.ljust(1024, b"\0"),
        XenVersion.CHANGESET: bytes(64),
        XenVersion.PLATFORM_PARAMETERS: start_of(vcpu.state.mode).to_bytes(4, "little"),
        XenVersion.GUEST_HANDLE: vcpu.domain.domid.to_bytes(16, "little"),
        XenVersion.COMMANDLINE: bytes(1024) if vcpu.domain.privileged else _DENIED,
    }
    return answers.get(command)
