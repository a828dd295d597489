/*
 * The small hypercalls: what they answer to an ordinary domain and to the initial one, and what they refuse.
 *
 * Command line: other=N the number of another domain, which exists; "initial=1" for the initial domain.
 */
#include "services.h"

PAGES(buffer, 1);
#define UNMAPPED ((void *)0x1000)
static u32 initial;

static long version(u32 command, void *argument)
{
    return hypercall(XEN_VERSION, command, (long)argument, 0);
}

static void check_version(void)
{
    u32 *words = (u32 *)buffer;
    answer("XENVER_version", version(XENVER_version, UNMAPPED), 4 << 16 | 17);
    for (u32 command = XENVER_extraversion; command <= XENVER_commandline; command++)
        if (command != XENVER_pagesize && version(command, UNMAPPED) != -EFAULT)
            failed++;
    same("answers that cannot be written", failed, 0);
    answer("XENVER_extraversion", version(XENVER_extraversion, buffer), 0);
    same("it begins with a dot", buffer[0][0], '.');
    answer("XENVER_compile_info", version(XENVER_compile_info, buffer), 0);
    answer("XENVER_capabilities", version(XENVER_capabilities, buffer), 0);
    same("guests of 32 bits", words[0] == 0x2d6e6578 && words[1] == 0x2d302e33 && words[2] == 0x5f363878, 1);
    answer("XENVER_changeset", version(XENVER_changeset, buffer), 0);
    answer("XENVER_platform_parameters", version(XENVER_platform_parameters, buffer), 0);
    same("where the hypervisor begins", words[0], HYPERVISOR_START);
    answer("XENVER_pagesize", version(XENVER_pagesize, 0), PAGE);
    answer("XENVER_pagesize with an argument", version(XENVER_pagesize, buffer), -EINVAL);
    answer("XENVER_guest_handle", version(XENVER_guest_handle, buffer), 0);
    words[0] = 0;
    answer("XENVER_commandline", version(XENVER_commandline, buffer), 0);
    if (!initial)
        same("which is denied", words[0] == 0x6e65643c && words[1] == 0x3e646569 && !buffer[0][8], 1);
    words[0] = 64;
    if (!initial)
        answer("XENVER_build_id", version(XENVER_build_id, buffer), -EPERM);
    else
        answer("XENVER_build_id", version(XENVER_build_id, buffer), -ENODATA);
    answer("versions that do not exist", version(11, buffer), -ENOSYS);
}

static u32 features(u32 word)
{
    u32 map[2] = {word, 0x5a5a5a5a};
    long result = version(XENVER_get_features, map);
    return result ? (u32)result : map[1];
}

static void check_features(void)
{
    u32 always = 1 << XENFEAT_mmu_pt_update_preserve_ad | 1 << XENFEAT_highmem_assist | 1 << XENFEAT_not_direct_mapped;
    same("features", features(0) & always, always);
    same("feature of the initial domain", features(0) >> XENFEAT_dom0 & 1, initial);
    answer("second word of features", features(1), -EINVAL);
    same("page tables above 4 GiB, as the notes said", features(0) >> XENFEAT_pae_pgdir_above_4gb & 1, 1);
    answer("pae_extended_cr3", vm_assist(VMASST_CMD_enable, VMASST_TYPE_pae_extended_cr3), 0);
    same("page tables above 4 GiB", features(0) >> XENFEAT_pae_pgdir_above_4gb & 1, 1);
    answer("pae_extended_cr3 again", vm_assist(VMASST_CMD_disable, VMASST_TYPE_pae_extended_cr3), 0);
    same("no page tables above 4 GiB", features(0) >> XENFEAT_pae_pgdir_above_4gb & 1, 0);
}

static void check_vm_assist(void)
{
    u32 refused = 0;
    for (u32 kind = 0; kind <= VMASST_TYPE_runstate_update_flag; kind++)
        refused += vm_assist(VMASST_CMD_enable, kind) != 0 || vm_assist(VMASST_CMD_disable, kind) != 0;
    same("helps that there are", refused, 0);
    answer("help that there is not", vm_assist(VMASST_CMD_enable, 6), -EINVAL);
    answer("help for 64 bits", vm_assist(VMASST_CMD_enable, VMASST_TYPE_m2p_strict), -EINVAL);
    answer("help far beyond", vm_assist(VMASST_CMD_enable, 0x80000002), -EINVAL);
    answer("neither on nor off", vm_assist(2, VMASST_TYPE_writable_pagetables), -ENOSYS);
    answer("neither, and no help", vm_assist(2, 6), -EINVAL);
}

static void check_callbacks(void)
{
    u32 three[3] = {CALLBACKTYPE_event, FLAT_RING1_CS, (u32)trap_6};
    u32 wrong = 0;
    for (u32 type = 0; type < 10; type++) {
        long expected = type == CALLBACKTYPE_syscall || type == CALLBACKTYPE_sysenter_deprecated || type == 6 || type > 7
            ? -ENOSYS : 0;
        three[0] = type;
        wrong += hypercall(CALLBACK_OP, CALLBACKOP_register, (long)three, 0) != expected;
        if (type != CALLBACKTYPE_nmi && !expected)
            expected = -EINVAL;
        wrong += hypercall(CALLBACK_OP, CALLBACKOP_unregister, (long)three, 0) != expected;
    }
    same("callbacks of all types", wrong, 0);
    answer("callback that cannot be read", hypercall(CALLBACK_OP, CALLBACKOP_register, (long)UNMAPPED, 0), -EFAULT);
    answer("callback command that does not exist", hypercall(CALLBACK_OP, 2, (long)three, 0), -EINVAL);
    answer("set_callbacks", hypercall5(SET_CALLBACKS, FLAT_RING1_CS, (long)trap_6, FLAT_RING1_CS, (long)trap_6, 0), 0);
    answer("nmi_op", hypercall(NMI_OP, XENNMI_register_callback, (long)three, 0), 0);
    answer("nmi_op that cannot be read", hypercall(NMI_OP, XENNMI_register_callback, (long)UNMAPPED, 0), -EFAULT);
    answer("nmi_op undone", hypercall(NMI_OP, XENNMI_unregister_callback, 0, 0), 0);
    answer("nmi_op that does not exist", hypercall(NMI_OP, 2, 0, 0), -ENOSYS);
}

static void check_devices(void)
{
    u32 argument[4] = {0};
    long refusal = initial ? -ENODEV : -EPERM;
    answer("unmasking notifications", physdev(PHYSDEVOP_IRQ_UNMASK_NOTIFY, 0), 0);
    answer("end of an interrupt that nobody has", physdev(PHYSDEVOP_eoi, argument), -EINVAL);
    answer("status of an interrupt that nobody has", physdev(PHYSDEVOP_irq_status_query, argument), -EINVAL);
    if (!initial) {
        answer("reading the interrupt controller", physdev(PHYSDEVOP_apic_read, argument), -EPERM);
        answer("adding a device", physdev(PHYSDEVOP_manage_pci_add, argument), -EPERM);
        answer("setting up an interrupt", physdev(PHYSDEVOP_setup_gsi, argument), -EPERM);
    }
    answer("taking an interrupt away", physdev(PHYSDEVOP_unmap_pirq, argument), refusal);
    answer("device command that cannot be read", physdev(PHYSDEVOP_apic_read, UNMAPPED), -EFAULT);
    answer("device command that does not exist", physdev(99, argument), -ENOSYS);
}

static long control(u32 number, u32 version, u32 domain)
{
    u32 *words = (u32 *)buffer;
    words[0] = 2, words[1] = version, words[2] = domain;
    return hypercall(number, (long)words, 0, 0);
}

static void check_control(void)
{
    long refusal = initial ? -ENOSYS : -EPERM;
    answer("sysctl of another version", control(SYSCTL, XEN_SYSCTL_INTERFACE_VERSION - 1, 0), -EACCES);
    answer("sysctl", control(SYSCTL, XEN_SYSCTL_INTERFACE_VERSION, 0), refusal);
    answer("domctl of another version", control(DOMCTL, XEN_DOMCTL_INTERFACE_VERSION + 1, 0), -EACCES);
    answer("domctl of nobody", control(DOMCTL, XEN_DOMCTL_INTERFACE_VERSION, 777), -ESRCH);
    answer("domctl", control(DOMCTL, XEN_DOMCTL_INTERFACE_VERSION, told("other=")), refusal);
    answer("platform_op of another version", control(PLATFORM_OP, 0x02000000, 0), -EACCES);
    answer("platform_op", control(PLATFORM_OP, XENPF_INTERFACE_VERSION, 0), refusal);
    answer("sysctl that cannot be read", hypercall(SYSCTL, (long)UNMAPPED, 0, 0), -EFAULT);
    answer("domctl that cannot be read", hypercall(DOMCTL, (long)UNMAPPED, 0, 0), -EFAULT);
    answer("platform_op that cannot be read", hypercall(PLATFORM_OP, (long)UNMAPPED, 0, 0), -EFAULT);
    answer("kexec_op", hypercall(KEXEC_OP, 0, 0, 0), refusal);
    answer("hypfs_op", hypercall(HYPFS_OP, 0, 0, 0), refusal);
    answer("xenpmu_op", hypercall(XENPMU_OP, 0, 0, 0), -EOPNOTSUPP);
    answer("xsm_op", hypercall(XSM_OP, 0, 0, 0), -ENOSYS);
    answer("set_segment_base", hypercall(SET_SEGMENT_BASE, 0, 0, 0), -ENOSYS);
    *(u32 *)buffer = DOMID_SELF;
    answer("parameter of full virtualization", hypercall(HVM_OP, HVMOP_get_param, (long)buffer, 0), -EINVAL);
    answer("hvm_op that does not exist", hypercall(HVM_OP, 77, (long)buffer, 0), -ENOSYS);
    answer("hypercall that does not exist", hypercall(63, 0, 0, 0), -ENOSYS);
}

static void check_console(void)
{
    answer("console_io that does not exist", hypercall(CONSOLE_IO, 2, 0, 0), -ENOSYS);
    answer("text that cannot be read", hypercall(CONSOLE_IO, CONSOLEIO_WRITE, 4, (long)UNMAPPED), -EFAULT);
    answer("text of no length", hypercall(CONSOLE_IO, CONSOLEIO_WRITE, 0, (long)buffer), 0);
    answer("reading when nothing was typed", hypercall(CONSOLE_IO, CONSOLEIO_read, 16, (long)buffer), 0);
    answer("reading more than can be counted", hypercall(CONSOLE_IO, CONSOLEIO_read, 0x80000000, (long)buffer), -E2BIG);
}

static long sched(u32 command, u32 first, u32 second)
{
    u32 argument[2] = {first, second};
    return hypercall(SCHED_OP, command, (long)argument, 0);
}

static void check_scheduling(void)
{
    answer("yield", hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0), 0);
    answer("scheduling that does not exist", hypercall(SCHED_OP, 99, 0, 0), -ENOSYS);
    answer("shutdown for a reason that cannot be read", hypercall(SCHED_OP, SCHEDOP_SHUTDOWN, (long)UNMAPPED, 0), -EFAULT);
    answer("shutdown of nobody", sched(SCHEDOP_remote_shutdown, 777, 0), -ESRCH);
    answer("shutdown of nobody by DOMID_SELF", sched(SCHEDOP_remote_shutdown, DOMID_SELF, 0), -ESRCH);
    answer("shutdown that cannot be read", hypercall(SCHED_OP, SCHEDOP_remote_shutdown, (long)UNMAPPED, 0), -EFAULT);
    if (!initial)
        answer("shutdown of another", sched(SCHEDOP_remote_shutdown, told("other="), 0), -EPERM);
    else
        answer("shutdown of another", sched(SCHEDOP_remote_shutdown, told("other="), 0), 0);
    answer("watchdog without a time", sched(SCHEDOP_watchdog, 0, 0), -EINVAL);
    answer("watchdog that is not set", sched(SCHEDOP_watchdog, 1, 10), -EINVAL);
    answer("third watchdog", sched(SCHEDOP_watchdog, 3, 10), -EINVAL);
    answer("first watchdog", sched(SCHEDOP_watchdog, 0, 1000), 1);
    answer("second watchdog", sched(SCHEDOP_watchdog, 0, 1000), 2);
    answer("no more watchdogs", sched(SCHEDOP_watchdog, 0, 1000), -ENOSPC);
    answer("watchdog set again", sched(SCHEDOP_watchdog, 1, 2000), 0);
    answer("watchdog stopped", sched(SCHEDOP_watchdog, 1, 0), 0);
    answer("other watchdog stopped", sched(SCHEDOP_watchdog, 2, 0), 0);
    if (!initial)
        answer("pinning", sched(SCHEDOP_pin_override, 0, 0), -EPERM);
    else
        answer("pinning", sched(SCHEDOP_pin_override, 0, 0), 0);
    answer("yield as it was", hypercall(SCHED_OP_COMPAT, SCHEDOP_YIELD, 0, 0), 0);
    answer("poll as it never was", hypercall(SCHED_OP_COMPAT, 3, 0, 0), -ENOSYS);
    answer("shutdown code", sched(SCHEDOP_shutdown_code, POWEROFF, 0), 0);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    initial = told("initial=");
    check_version();
    check_features();
    check_vm_assist();
    check_callbacks();
    check_devices();
    check_control();
    check_console();
    check_scheduling();
    memory_end();
}
