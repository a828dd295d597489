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
    sched_op_compat = 6
    platform_op = 7
    set_debugreg = 8
    get_debugreg = 9
    update_descriptor = 10
    memory_op = 12
    multicall = 13
    update_va_mapping = 14
    set_timer_op = 15
    event_channel_op_compat = 16
    xen_version = 17
    console_io = 18
    physdev_op_compat = 19
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
    hvm_op = 34
    sysctl = 35
    domctl = 36
    kexec_op = 37
    xenpmu_op = 40
    hypfs_op = 42
    mca = 48
    # Ours: the paper's alarm on virtual time, which Xen dropped, at a number that x86 leaves free (arch_7).
    set_virtual_timer = 55


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
    ENODEV = 19
    EINVAL = 22
    ENOSPC = 28
    ENOSYS = 38
    ENODATA = 61
    ETIME = 62
    ERESTART = 85  # inside Xen only: the guest makes the call again and never sees it
    EOPNOTSUPP = 95


class SchedOp(IntEnum):
    """Commands of ``sched_op`` (sched.h)."""

    YIELD = 0
    BLOCK = 1
    SHUTDOWN = 2
    POLL = 3
    REMOTE_SHUTDOWN = 4
    SHUTDOWN_CODE = 5
    WATCHDOG = 6
    PIN_OVERRIDE = 7


class Shutdown(IntEnum):
    """Why a domain shut itself down (sched.h)."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


class EvtchnOp(IntEnum):
    """Commands of ``event_channel_op`` (event_channel.h)."""

    BIND_INTERDOMAIN = 0
    BIND_VIRQ = 1
    CLOSE = 3
    SEND = 4
    STATUS = 5
    ALLOC_UNBOUND = 6
    BIND_IPI = 7
    BIND_VCPU = 8
    UNMASK = 9


class EvtchnStatus(IntEnum):
    """What a port is (event_channel.h)."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    VIRQ = 4
    IPI = 5


class Virq(IntEnum):
    """Virtual interrupts: what the hypervisor itself has to tell (xen.h)."""

    TIMER = 0
    DEBUG = 1
    DOM_EXC = 3
    XENOPROF = 7
    XENPMU = 13
    VIRTUAL_TIMER = 23  # ours, where Xen has VIRQ_ARCH_7


VIRQS = 24


class VcpuOp(IntEnum):
    """Commands of ``vcpu_op`` (vcpu.h)."""

    INITIALISE = 0
    UP = 1
    DOWN = 2
    IS_UP = 3
    GET_RUNSTATE_INFO = 4
    REGISTER_RUNSTATE_MEMORY_AREA = 5
    SET_PERIODIC_TIMER = 6
    STOP_PERIODIC_TIMER = 7
    SET_SINGLESHOT_TIMER = 8
    STOP_SINGLESHOT_TIMER = 9
    REGISTER_VCPU_INFO = 10
    SEND_NMI = 11
    GET_PHYSID = 12
    REGISTER_VCPU_TIME_MEMORY_AREA = 13


VCPU_SSHOTTMR_FUTURE = 1


class VcpuFlags(IntFlag):
    """What a ``vcpu_guest_context`` says of itself: VGCF_* (arch-x86/xen.h)."""

    I387_VALID = 1 << 0
    IN_KERNEL = 1 << 2
    FAILSAFE_DISABLES_EVENTS = 1 << 3
    SYSCALL_DISABLES_EVENTS = 1 << 4
    ONLINE = 1 << 5


class Runstate(IntEnum):
    """``vcpu_runstate_info.state`` (vcpu.h)."""

    RUNNING = 0
    RUNNABLE = 1
    BLOCKED = 2
    OFFLINE = 3


class CallbackOp(IntEnum):
    """Commands of ``callback_op`` (callback.h)."""

    REGISTER = 0
    UNREGISTER = 1


class CallbackType(IntEnum):
    """What a callback is for (callback.h)."""

    EVENT = 0
    FAILSAFE = 1
    NMI = 4
    SYSENTER = 5
    SYSCALL32 = 7


class NmiOp(IntEnum):
    """Commands of ``nmi_op`` (nmi.h)."""

    REGISTER = 0
    UNREGISTER = 1


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
    BUILD_ID = 10


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
# The machine-to-physical list begins there too, and ends at the latest here.
MACH2PHYS_END_TWO_LEVEL, MACH2PHYS_END_PAE = 0xFC40_0000, 0xF680_0000


class MmuUpdate(IntEnum):
    """The two lowest bits of ``mmu_update.ptr`` (xen.h)."""

    NORMAL = 0
    MACHPHYS = 1
    PRESERVE_AD = 2
    NO_TRANSLATE = 3


# Set in the count of ``mmu_update`` and ``mmuext_op`` when an interrupted call is made again (xen.h).
MMU_UPDATE_PREEMPTED = 1 << 31


class MmuextOp(IntEnum):
    """Commands of ``mmuext_op`` (xen.h)."""

    PIN_L1_TABLE = 0
    PIN_L2_TABLE = 1
    PIN_L3_TABLE = 2
    PIN_L4_TABLE = 3
    UNPIN_TABLE = 4
    NEW_BASEPTR = 5
    TLB_FLUSH_LOCAL = 6
    INVLPG_LOCAL = 7
    TLB_FLUSH_MULTI = 8
    INVLPG_MULTI = 9
    TLB_FLUSH_ALL = 10
    INVLPG_ALL = 11
    FLUSH_CACHE = 12
    SET_LDT = 13
    NEW_USER_BASEPTR = 15
    CLEAR_PAGE = 16
    COPY_PAGE = 17


class UvmFlags(IntFlag):
    """Flags of ``update_va_mapping`` (xen.h); without `ALL`, the other bits point to a set of vCPUs or are 0."""

    TLB_FLUSH = 1
    INVLPG = 2
    ALL = 4


class MemoryOp(IntEnum):
    """Commands of ``memory_op`` (memory.h); from bit 6 on the number holds how far an interrupted call came."""

    INCREASE_RESERVATION = 0
    DECREASE_RESERVATION = 1
    MAXIMUM_RAM_PAGE = 2
    CURRENT_RESERVATION = 3
    MAXIMUM_RESERVATION = 4
    MACHPHYS_MFN_LIST = 5
    POPULATE_PHYSMAP = 6
    MEMORY_MAP = 9
    EXCHANGE = 11
    MACHPHYS_MAPPING = 12
    MAXIMUM_GPFN = 14


# Domain ids with a meaning (xen.h).
DOMID_SELF, DOMID_IO, DOMID_XEN = 0x7FF0, 0x7FF1, 0x7FF2


class VmAssist(IntEnum):
    """Commands of ``vm_assist`` (xen.h)."""

    ENABLE = 0
    DISABLE = 1


class VmAssistType(IntEnum):
    """What ``vm_assist`` switches (xen.h)."""

    FOUR_GB_SEGMENTS = 0
    FOUR_GB_SEGMENTS_NOTIFY = 1
    WRITABLE_PAGETABLES = 2
    PAE_EXTENDED_CR3 = 3
    ARCHITECTURAL_IOPL = 4
    RUNSTATE_UPDATE_FLAG = 5


class PhysdevOp(IntEnum):
    """Commands of ``physdev_op`` (physdev.h)."""

    IRQ_UNMASK_NOTIFY = 4
    IRQ_STATUS_QUERY = 5
    SET_IOPL = 6
    SET_IOBITMAP = 7
    APIC_READ = 8
    APIC_WRITE = 9
    ALLOC_IRQ_VECTOR = 10
    EOI = 12
    MAP_PIRQ = 13
    UNMAP_PIRQ = 14
    MANAGE_PCI_ADD = 15
    MANAGE_PCI_REMOVE = 16
    RESTORE_MSI = 19
    MANAGE_PCI_ADD_EXT = 20
    SETUP_GSI = 21
    GET_FREE_PIRQ = 23
    PCI_MMCFG_RESERVED = 24
    PCI_DEVICE_ADD = 25
    PCI_DEVICE_REMOVE = 26
    RESTORE_MSI_EXT = 27
    PREPARE_MSIX = 30
    RELEASE_MSIX = 31


class HvmOp(IntEnum):
    """Commands of ``hvm_op`` that any domain may make (hvm_op.h)."""

    SET_PARAM = 0
    GET_PARAM = 1


# What a caller of ``sysctl``, ``domctl`` and ``platform_op`` has to name (sysctl.h, domctl.h, platform.h).
SYSCTL_VERSION = DOMCTL_VERSION = 0x15
PLATFORM_VERSION = 0x0300_0001

# Leaves of CPUID that the hypervisor answers (arch-x86/cpuid.h).
CPUID_FIRST, CPUID_LAST = 0x4000_0000, 0x4000_0005
CPUID_SIGNATURE = b"XenVMMXenVMM"
CPUID_PRESERVES_AD = 1
