"""Numbers and structures of the public interface, against fixed values and against Xen's headers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from xenlab.abi import kernel_notes, numbers, structures

SIZES = {
    "StartInfo": 1112,
    "ScreenInfo": 40,
    "ConsoleRing": 3088,
    "SharedInfo": 2344,
    "VcpuInfo": 64,
    "VcpuTimeInfo": 32,
    "TrapInfo": 8,
    "MulticallEntry": 32,
    "UserRegisters": 68,
    "VcpuGuestContext": 2800,
}
OFFSETS = {
    ("StartInfo", "nr_pages"): 32,
    ("StartInfo", "shared_info"): 36,
    ("StartInfo", "flags"): 40,
    ("StartInfo", "store_mfn"): 44,
    ("StartInfo", "console_mfn"): 52,
    ("StartInfo", "console_info_off"): 52,
    ("StartInfo", "pt_base"): 60,
    ("StartInfo", "nr_pt_frames"): 64,
    ("StartInfo", "mfn_list"): 68,
    ("StartInfo", "cmd_line"): 80,
    ("StartInfo", "first_p2m_pfn"): 1104,
    ("SharedInfo", "evtchn_pending"): 2048,
    ("SharedInfo", "evtchn_mask"): 2176,
    ("SharedInfo", "wc_version"): 2304,
    ("SharedInfo", "max_pfn"): 2316,
    ("VcpuInfo", "evtchn_upcall_mask"): 1,
    ("VcpuInfo", "evtchn_pending_sel"): 4,
    ("VcpuInfo", "cr2"): 8,
    ("VcpuInfo", "time"): 32,
    ("VcpuTimeInfo", "tsc_timestamp"): 8,
    ("TrapInfo", "cs"): 2,
    ("TrapInfo", "address"): 4,
    ("MulticallEntry", "args"): 8,
    ("VcpuGuestContext", "user_regs"): 516,
    ("VcpuGuestContext", "ctrlreg"): 2716,
}


def size_of(name: str) -> int:
    return ctypes.sizeof(getattr(structures, name))


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    # shared_info of a 32-bit guest: 32 vCPUs, two bitmaps, clock, arch part.
    assert size_of(name) == SIZES[name]


@pytest.mark.parametrize(("structure", "field"), OFFSETS)
def test_offsets(structure: str, field: str) -> None:
    assert getattr(getattr(structures, structure), field).offset == OFFSETS[structure, field]


def test_numbers_everyone_knows() -> None:
    assert numbers.HYPERCALL_VECTOR == 0x82
    assert (numbers.Hypercall.console_io, numbers.Hypercall.iret, numbers.Hypercall.sched_op) == (18, 23, 29)
    assert (numbers.Errno.EFAULT, numbers.Errno.EINVAL, numbers.Errno.ENOSYS) == (14, 22, 38)
    assert (numbers.FLAT_RING1_CS, numbers.FLAT_RING1_DS) == (0xE019, 0xE021)
    assert (numbers.FLAT_RING3_CS, numbers.FLAT_RING3_DS) == (0xE02B, 0xE033)
    assert [reason.name for reason in numbers.Shutdown] == [
        "POWEROFF",
        "REBOOT",
        "SUSPEND",
        "CRASH",
        "WATCHDOG",
        "SOFT_RESET",
    ]


C_NAMES = {
    "StartInfo": "struct start_info",
    "StartConsole": "__typeof__(((struct start_info *)0)->console)",
    "ScreenInfo": "struct dom0_vga_console_info",
    "ConsoleRing": "struct xencons_interface",
    "SharedInfo": "struct shared_info",
    "VcpuInfo": "struct vcpu_info",
    "VcpuTimeInfo": "struct vcpu_time_info",
    "TrapInfo": "struct trap_info",
    "MulticallEntry": "struct multicall_entry",
    "UserRegisters": "struct cpu_user_regs",
    "VcpuGuestContext": "struct vcpu_guest_context",
}
# Our name of a field: that of the C structure, where it is spelt another way there.
C_FIELDS = {
    ("StartConsole", "guest"): "domU",
    ("StartConsole", "initial"): "dom0",
    ("ConsoleRing", "input"): "in",
    ("VcpuInfo", "cr2"): "arch.cr2",
    ("SharedInfo", "max_pfn"): "arch.max_pfn",
    ("SharedInfo", "pfn_to_mfn_frame_list_list"): "arch.pfn_to_mfn_frame_list_list",
    ("SharedInfo", "nmi_reason"): "arch.nmi_reason",
    ("SharedInfo", "p2m_cr3"): "arch.p2m_cr3",
    ("SharedInfo", "p2m_vaddr"): "arch.p2m_vaddr",
    ("SharedInfo", "p2m_generation"): "arch.p2m_generation",
    ("SharedInfo", "wc_sec_hi"): "arch.wc_sec_hi",
}
PADDING = {"pad", "pad0", "pad1", "pad2", "pad3", "pad4", "pad5"}


def spelt(command: numbers.PhysdevOp) -> str:
    """The oldest commands are spelt in capitals."""
    return command.name if command == numbers.PhysdevOp.IRQ_UNMASK_NOTIFY else command.name.lower()


def expectations() -> dict[str, int]:
    """C expressions and the values that they must have."""
    expected = {f"sizeof({c_name})": size_of(name) for name, c_name in C_NAMES.items()}
    for name, c_name in C_NAMES.items():
        structure = getattr(structures, name)
        for field, *_ in structure._fields_:
            if field not in PADDING:
                c_field = C_FIELDS.get((name, field), field)
                expected[f"__builtin_offsetof({c_name}, {c_field})"] = getattr(structure, field).offset
    # The alarm on virtual time is ours, at numbers that Xen leaves to the architecture.
    own_call, own_virq = numbers.Hypercall.set_virtual_timer, numbers.Virq.VIRTUAL_TIMER
    expected |= {f"__HYPERVISOR_{call.name}": call for call in numbers.Hypercall if call != own_call}
    expected |= {"__HYPERVISOR_arch_7": own_call, "VIRQ_ARCH_7": own_virq}
    # The header shows ERESTART to Xen itself only.
    expected |= {f"XEN_{errno.name}": errno for errno in numbers.Errno if errno != numbers.Errno.ERESTART}
    expected |= {f"MMUEXT_{command.name}": command for command in numbers.MmuextOp}
    expected |= {f"UVMF_{flag.name}": flag for flag in numbers.UvmFlags}
    expected |= {f"VGCF_{str(flag.name).lower()}": flag for flag in numbers.VcpuFlags}
    expected |= {f"XENMEM_{command.name.lower()}": command for command in numbers.MemoryOp}
    expected |= {f"VMASST_CMD_{command.name.lower()}": command for command in numbers.VmAssist}
    expected |= {name: getattr(numbers, name) for name in ("DOMID_SELF", "DOMID_IO", "DOMID_XEN")}
    expected |= {f"SCHEDOP_{command.name.lower()}": command for command in numbers.SchedOp}
    expected |= {f"SHUTDOWN_{reason.name.lower()}": reason for reason in numbers.Shutdown}
    expected |= {f"EVTCHNOP_{command.name.lower()}": command for command in numbers.EvtchnOp}
    expected |= {f"EVTCHNSTAT_{status.name.lower()}": status for status in numbers.EvtchnStatus}
    expected |= {f"VIRQ_{virq.name}": virq for virq in numbers.Virq if virq != own_virq}
    expected |= {f"CALLBACKOP_{command.name.lower()}": command for command in numbers.CallbackOp}
    expected |= {f"CALLBACKTYPE_{kind.name.lower()}": kind for kind in numbers.CallbackType}
    expected |= {f"CONSOLEIO_{command.name.lower()}": command for command in numbers.ConsoleIo}
    expected |= {f"VMASST_TYPE_{kind.name.lower()}": kind for kind in numbers.VmAssistType if kind > 1}
    expected |= {f"PHYSDEVOP_{spelt(command)}": command for command in numbers.PhysdevOp}
    expected |= {f"XENNMI_{command.name.lower()}_callback": command for command in numbers.NmiOp}
    expected |= {f"HVMOP_{command.name.lower()}": command for command in numbers.HvmOp}
    expected |= {f"XENVER_{command.name.lower()}": command for command in numbers.XenVersion}
    expected |= {"SIF_PRIVILEGED": numbers.StartFlags.PRIVILEGED, "SIF_INITDOMAIN": numbers.StartFlags.INITDOMAIN}
    expected |= {name: getattr(numbers, name) for name in dir(numbers) if name.startswith("FLAT_RING")}
    expected |= {f"XEN_ELFNOTE_{note.name}": note for note in kernel_notes.ElfNote}
    expected |= {f"XENFEAT_{feature.name}": feature for feature in kernel_notes.Feature}
    expected |= {
        "FIRST_RESERVED_GDT_PAGE": numbers.FIRST_RESERVED_GDT_PAGE,
        "__HYPERVISOR_VIRT_START_PAE": numbers.HYPERVISOR_START_PAE,
        "__HYPERVISOR_VIRT_START_NONPAE": numbers.HYPERVISOR_START_TWO_LEVEL,
        "__MACH2PHYS_VIRT_END_PAE": numbers.MACH2PHYS_END_PAE,
        "__MACH2PHYS_VIRT_END_NONPAE": numbers.MACH2PHYS_END_TWO_LEVEL,
        "MMU_NORMAL_PT_UPDATE": numbers.MmuUpdate.NORMAL,
        "MMU_MACHPHYS_UPDATE": numbers.MmuUpdate.MACHPHYS,
        "MMU_PT_UPDATE_PRESERVE_AD": numbers.MmuUpdate.PRESERVE_AD,
        "MMU_PT_UPDATE_NO_TRANSLATE": numbers.MmuUpdate.NO_TRANSLATE,
        "VMASST_TYPE_4gb_segments": numbers.VmAssistType.FOUR_GB_SEGMENTS,
        "VMASST_TYPE_4gb_segments_notify": numbers.VmAssistType.FOUR_GB_SEGMENTS_NOTIFY,
        "XEN_SYSCTL_INTERFACE_VERSION": numbers.SYSCTL_VERSION,
        "XEN_DOMCTL_INTERFACE_VERSION": numbers.DOMCTL_VERSION,
        "XENPF_INTERFACE_VERSION": numbers.PLATFORM_VERSION,
        "XEN_CPUID_FIRST_LEAF": numbers.CPUID_FIRST,
        "XEN_CPUID_FIRST_LEAF + XEN_CPUID_MAX_NUM_LEAVES": numbers.CPUID_LAST,
        "XEN_CPUID_SIGNATURE_EBX": int.from_bytes(numbers.CPUID_SIGNATURE[:4], "little"),
        "XEN_CPUID_SIGNATURE_EDX": int.from_bytes(numbers.CPUID_SIGNATURE[8:], "little"),
        "XEN_CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD": numbers.CPUID_PRESERVES_AD,
        "sizeof(struct callback_unregister)": 4,
        "sizeof(struct xennmi_callback)": 8,
        "sizeof(struct physdev_set_iopl)": 4,
        "sizeof(struct physdev_set_iobitmap)": 8,
        "sizeof(struct physdev_map_pirq)": 36,
        "sizeof(struct xen_sysctl)": 136,
        "sizeof(struct xen_domctl)": 144,
        "sizeof(struct xen_platform_op)": 136,
        "sizeof(struct xen_hvm_param)": 16,
        "NR_VIRQS": numbers.VIRQS,
        "sizeof(struct evtchn_alloc_unbound)": 8,
        "sizeof(struct evtchn_bind_interdomain)": 12,
        "sizeof(struct evtchn_bind_virq)": 12,
        "sizeof(struct evtchn_bind_ipi)": 8,
        "sizeof(struct evtchn_bind_vcpu)": 8,
        "sizeof(struct evtchn_status)": 24,
        "__builtin_offsetof(struct evtchn_status, u.interdomain.port)": 20,
        "sizeof(struct callback_register)": 12,
        "sizeof(struct sched_poll)": 16,
        "EVTCHN_2L_NR_CHANNELS": 1024,
        "sizeof(struct mmu_update)": 16,
        "sizeof(struct mmuext_op)": 12,
        "sizeof(struct xen_memory_reservation)": 20,
        "sizeof(struct xen_memory_exchange)": 44,
        "XEN_LEGACY_MAX_VCPUS": structures.MAX_VCPUS,
        "MAX_GUEST_CMDLINE": structures.COMMAND_LINE_BYTES,
    }
    return expected


@pytest.mark.skipif(not Path("/usr/include/xen/xen.h").exists(), reason="needs Xen's headers (Debian: libxen-dev)")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_equal_to_xens_headers(tmp_path: Path) -> None:
    """Each expression is an assertion of the compiler's; all that fail are named at once."""
    lines = ["#define __XEN_TOOLS__", "#define __XEN_INTERFACE_VERSION__ 0x00040d00", "typedef unsigned char uint8_t;"]
    lines += ["typedef unsigned short uint16_t; typedef unsigned int uint32_t; typedef unsigned long long uint64_t;"]
    lines += ["typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;"]
    lines += ["typedef unsigned int size_t; typedef int ssize_t; typedef unsigned long uintptr_t;"]
    headers = ("xen.h", "sched.h", "version.h", "errno.h", "elfnote.h", "features.h", "io/console.h", "memory.h")
    headers += ("event_channel.h", "callback.h", "physdev.h", "nmi.h", "hvm/hvm_op.h", "hvm/params.h", "sysctl.h")
    headers += ("domctl.h", "platform.h", "arch-x86/cpuid.h", "arch-x86/xen-mca.h")
    lines += [f"#include <xen/{header}>" for header in headers]
    lines += [f'_Static_assert(({what}) == {int(value)}, "{what}");' for what, value in expectations().items()]
    source = tmp_path / "abi.c"
    source.write_text("\n".join(lines) + "\n")
    # The headers need no C library, but ask for its integer types by name.
    (tmp_path / "stdint.h").write_text("")
    command = ["gcc", "-m32", "-ffreestanding", "-fsyntax-only", "-I", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
