/*
 * Numbers of the small hypercalls: xen.h, version.h, sched.h, physdev.h, callback.h, nmi.h, hvm_op.h, and the versions
 * of sysctl.h, domctl.h and platform.h.
 */
#ifndef SERVICES_H
#define SERVICES_H

#include "traps.h"

enum { E2BIG = 7, ENODEV = 19, ENOSPC = 28, ENODATA = 61, EOPNOTSUPP = 95 };

enum {
    SET_CALLBACKS = 4, SCHED_OP_COMPAT = 6, PLATFORM_OP = 7, SET_DEBUGREG = 8, GET_DEBUGREG = 9,
    EVENT_CHANNEL_OP_COMPAT = 16, XEN_VERSION = 17, PHYSDEV_OP_COMPAT = 19, SET_SEGMENT_BASE = 25, XSM_OP = 27,
    NMI_OP = 28, CALLBACK_OP = 30, PHYSDEV_OP = 33, HVM_OP = 34, SYSCTL = 35, DOMCTL = 36, KEXEC_OP = 37,
    XENPMU_OP = 40, HYPFS_OP = 42
};

enum {
    XENVER_version = 0, XENVER_extraversion = 1, XENVER_compile_info = 2, XENVER_capabilities = 3,
    XENVER_changeset = 4, XENVER_platform_parameters = 5, XENVER_get_features = 6, XENVER_pagesize = 7,
    XENVER_guest_handle = 8, XENVER_commandline = 9, XENVER_build_id = 10
};

enum {
    XENFEAT_pae_pgdir_above_4gb = 4, XENFEAT_mmu_pt_update_preserve_ad = 5, XENFEAT_highmem_assist = 6,
    XENFEAT_dom0 = 11, XENFEAT_not_direct_mapped = 16
};

enum {
    SCHEDOP_remote_shutdown = 4, SCHEDOP_shutdown_code = 5, SCHEDOP_watchdog = 6, SCHEDOP_pin_override = 7
};

enum {
    PHYSDEVOP_IRQ_UNMASK_NOTIFY = 4, PHYSDEVOP_irq_status_query = 5, PHYSDEVOP_set_iopl = 6, PHYSDEVOP_set_iobitmap = 7,
    PHYSDEVOP_apic_read = 8, PHYSDEVOP_eoi = 12, PHYSDEVOP_unmap_pirq = 14, PHYSDEVOP_manage_pci_add = 15,
    PHYSDEVOP_setup_gsi = 21
};

enum { VMASST_TYPE_pae_extended_cr3 = 3, VMASST_TYPE_architectural_iopl = 4, VMASST_TYPE_runstate_update_flag = 5,
       VMASST_TYPE_m2p_strict = 32 };

enum { CALLBACKOP_register = 0, CALLBACKOP_unregister = 1 };
enum {
    CALLBACKTYPE_event = 0, CALLBACKTYPE_failsafe = 1, CALLBACKTYPE_syscall = 2, CALLBACKTYPE_sysenter_deprecated = 3,
    CALLBACKTYPE_nmi = 4, CALLBACKTYPE_sysenter = 5, CALLBACKTYPE_syscall32 = 7
};
enum { XENNMI_register_callback = 0, XENNMI_unregister_callback = 1 };
enum { CONSOLEIO_read = 1, HVMOP_get_param = 1 };

enum { XEN_SYSCTL_INTERFACE_VERSION = 0x15, XEN_DOMCTL_INTERFACE_VERSION = 0x15, XENPF_INTERFACE_VERSION = 0x03000001 };

enum { XEN_CPUID_FIRST_LEAF = 0x40000000 };

static inline long physdev(u32 command, const void *argument)
{
    return hypercall(PHYSDEV_OP, command, (long)argument, 0);
}

static inline long vm_assist(u32 command, u32 kind)
{
    return hypercall(VM_ASSIST, command, kind, 0);
}

#endif
