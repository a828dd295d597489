"""Numbers that guest and hypervisor agree on: hypercalls, errnos, commands, reasons.

All values are those of Xen's public headers; the header is named beside each group.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

HYPERCALL_VECTOR = 0x82


class Hypercall(IntEnum):
    """Hypercall numbers (xen.h).  A number that is not served answers -ENOSYS."""

    set_trap_table = 0
    mmu_update = 1
    set_gdt = 2
    stack_switch = 3
    set_callbacks = 4
    fpu_taskswitch = 5
    platform_op = 7
    set_debugreg = 8
    get_debugreg = 9
    update_descriptor = 10
    memory_op = 12
    multicall = 13
    update_va_mapping = 14
    set_timer_op = 15
    xen_version = 17
    console_io = 18
    grant_table_op = 20
    vm_assist = 21
    update_va_mapping_otherdomain = 22
    iret = 23
    vcpu_op = 24
    mmuext_op = 26
    nmi_op = 28
    sched_op = 29
    callback_op = 30
    event_channel_op = 32
    physdev_op = 33
    sysctl = 35
    domctl = 36


class Errno(IntEnum):
    """Error numbers (errno.h); a hypercall that fails returns one of them negated."""

    EPERM = 1
    ENOENT = 2
    ESRCH = 3
    E2BIG = 7
    EAGAIN = 11
    ENOMEM = 12
    EACCES = 13
    EFAULT = 14
    EBUSY = 16
    EEXIST = 17
    EINVAL = 22
    ENOSPC = 28
    ENOSYS = 38
    EOPNOTSUPP = 95


class SchedOp(IntEnum):
    """Commands of ``sched_op`` (sched.h)."""

    YIELD = 0
    BLOCK = 1
    SHUTDOWN = 2


class Shutdown(IntEnum):
    """Why a domain shut itself down (sched.h)."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


class ConsoleIo(IntEnum):
    """Commands of ``console_io`` (xen.h)."""

    WRITE = 0
    READ = 1


class XenVersion(IntEnum):
    """Commands of ``xen_version`` (version.h)."""

    VERSION = 0
    EXTRAVERSION = 1
    COMPILE_INFO = 2
    CAPABILITIES = 3
    CHANGESET = 4
    PLATFORM_PARAMETERS = 5
    GET_FEATURES = 6
    PAGESIZE = 7
    GUEST_HANDLE = 8
    COMMANDLINE = 9


class StartFlags(IntFlag):
    """``start_info.flags`` (xen.h)."""

    PRIVILEGED = 1
    INITDOMAIN = 2


# Selectors that Xen provides in its own page of every descriptor table (arch-x86/xen-x86_32.h).
FLAT_RING1_CS, FLAT_RING1_DS, FLAT_RING1_SS = 0xE019, 0xE021, 0xE021
FLAT_RING3_CS, FLAT_RING3_DS, FLAT_RING3_SS = 0xE02B, 0xE033, 0xE033
FIRST_RESERVED_GDT_PAGE = 14

# Where the hypervisor's part of every address space begins (arch-x86/xen-x86_32.h).
HYPERVISOR_START_TWO_LEVEL = 0xFC00_0000
HYPERVISOR_START_PAE = 0xF580_0000
