"""Callbacks, NMIs, and the doors of the control interface."""

from __future__ import annotations

import pytest
from hypercall_bench import END, SCRATCH, Bench

from xenlab import boot
from xenlab.abi.numbers import (
    DOMCTL_VERSION,
    DOMID_SELF,
    FLAT_RING1_CS,
    PLATFORM_VERSION,
    SYSCTL_VERSION,
    CallbackOp,
    CallbackType,
    Errno,
    Hypercall,
)
from xenlab.hypervisor.domain import Gate
from xenlab.machine.paging import PagingMode
from xenlab.machine.vectors import NMI

IDLE = "start: jmp start"


@pytest.fixture
def bench(mode: PagingMode) -> Bench:
    return Bench(mode)


def words(bench: Bench, *values: int, size: int = 256) -> int:
    bench.write(SCRATCH, b"".join(value.to_bytes(4, "little") for value in values).ljust(size, b"\0"))
    return SCRATCH


class TestCallbacks:
    """By the rules of Xen's arch/x86/pv/callback.c for 32-bit guests."""

    @pytest.mark.parametrize("kind", [kind for kind in CallbackType if kind != CallbackType.NMI])
    def test_can_be_replaced_only(self, kind: int, bench: Bench) -> None:
        at = words(bench, kind | 1 << 16, 0xE018, 0x1234)
        assert bench.call(Hypercall.callback_op, CallbackOp.REGISTER, at) == 0
        assert bench.call(Hypercall.callback_op, CallbackOp.UNREGISTER, at) == -Errno.EINVAL
        expected = Gate(FLAT_RING1_CS, 0x1234, 0, True) if kind == CallbackType.EVENT else None
        assert bench.vcpu.event_callback == expected

    def test_for_nmis_is_a_row_of_the_trap_table(self, bench: Bench) -> None:
        assert bench.call(Hypercall.callback_op, CallbackOp.REGISTER, words(bench, 4, 0x33, 0x1234)) == 0
        assert bench.vcpu.traps[NMI] == Gate(FLAT_RING1_CS, 0x1234, 0, True)
        assert bench.call(Hypercall.callback_op, CallbackOp.UNREGISTER, words(bench, 4)) == 0
        assert bench.vcpu.traps[NMI] is None

    def test_sizes_of_arguments(self, bench: Bench) -> None:
        bench.write(END - 4, (4).to_bytes(4, "little"))
        assert bench.call(Hypercall.callback_op, CallbackOp.REGISTER, END - 8) == -Errno.EFAULT
        assert bench.call(Hypercall.callback_op, CallbackOp.UNREGISTER, END - 4) == 0
        assert bench.call(Hypercall.callback_op, CallbackOp.UNREGISTER, END) == -Errno.EFAULT

    @pytest.mark.parametrize("command", [2, 3, 0xFFFF_FFFF])
    def test_unknown_commands(self, command: int, bench: Bench) -> None:
        assert bench.call(Hypercall.callback_op, command, END) == -Errno.EINVAL
        assert bench.call(Hypercall.nmi_op, command, END) == -Errno.ENOSYS

    def test_nmi_op(self, bench: Bench) -> None:
        assert bench.call(Hypercall.nmi_op, 0, words(bench, 0x4321, 0)) == 0
        assert bench.vcpu.traps[NMI] == Gate(FLAT_RING1_CS, 0x4321, 0, True)
        assert bench.call(Hypercall.nmi_op, 0, END - 4) == -Errno.EFAULT
        assert bench.call(Hypercall.nmi_op, 1, END) == 0
        assert bench.vcpu.traps[NMI] is None
        assert bench.call(Hypercall.nmi_op, 1, 0) == 0


class TestControlInterface:
    """Reading, version, privilege: in this order."""

    CALLS = (
        (Hypercall.sysctl, SYSCTL_VERSION, 136),
        (Hypercall.domctl, DOMCTL_VERSION, 144),
        (Hypercall.platform_op, PLATFORM_VERSION, 136),
    )

    @pytest.mark.parametrize(("number", "version", "size"), CALLS)
    def test_order_of_checks(self, number: int, version: int, size: int, bench: Bench) -> None:
        for privileged, refusal in ((False, Errno.EPERM), (True, Errno.ENOSYS)):
            bench.domain.privileged = privileged
            assert bench.call(number, END - size + 1) == -Errno.EFAULT
            for wrong in (0, version - 1, version + 1, 0xFFFF_FFFF):
                assert bench.call(number, words(bench, 1, wrong)) == -Errno.EACCES
            bench.write(END - size, words_of(2, version, bench.domain.domid).ljust(size, b"\0"))
            assert bench.call(number, END - size) == -refusal

    def test_domctl_asks_for_the_domain_first(self, bench: Bench) -> None:
        other = boot(bench.xen, IDLE, mode=bench.domain.mode)
        assert bench.call(Hypercall.domctl, words(bench, 2, DOMCTL_VERSION, other.domid)) == -Errno.EPERM
        assert bench.call(Hypercall.domctl, words(bench, 2, DOMCTL_VERSION, 77)) == -Errno.ESRCH
        # But for the command that makes one.
        assert bench.call(Hypercall.domctl, words(bench, 1, DOMCTL_VERSION, 77)) == -Errno.EPERM

    def test_hvm_op(self, bench: Bench) -> None:
        for command in (0, 1):
            assert bench.call(Hypercall.hvm_op, command, words(bench, DOMID_SELF)) == -Errno.EINVAL
            assert bench.call(Hypercall.hvm_op, command, words(bench, 77)) == -Errno.ESRCH
            assert bench.call(Hypercall.hvm_op, command, END - 12) == -Errno.EFAULT
        assert bench.call(Hypercall.hvm_op, 2, END) == -Errno.ENOSYS

    @pytest.mark.parametrize("number", [Hypercall.kexec_op, Hypercall.hypfs_op, Hypercall.mca])
    def test_refused_before_the_argument_is_read(self, number: int, bench: Bench) -> None:
        assert bench.call(number, 0, END) == -Errno.EPERM
        bench.domain.privileged = True
        assert bench.call(number, 0, END) == -Errno.ENOSYS

    def test_nobody_counts_events(self, bench: Bench) -> None:
        assert bench.call(Hypercall.xenpmu_op, 0, END) == -Errno.EOPNOTSUPP

    @pytest.mark.parametrize("number", [25, 27, 31, 38, 39])
    def test_not_served_to_anybody(self, number: int, bench: Bench) -> None:
        """Segment bases, access control, profiling, transcendent memory and Argo."""
        for privileged in (False, True):
            bench.domain.privileged = privileged
            assert bench.call(number, 0, 0) == -Errno.ENOSYS


def words_of(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in values)
