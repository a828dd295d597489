"""Structures in memory that guest and hypervisor share, laid out as in Xen's public headers.

Each is a ctypes structure of a 32-bit guest, little-endian, and can be placed over guest
memory without a copy (``StartInfo.from_buffer(memory.frame(mfn))``).
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int8, c_uint8, c_uint16, c_uint32, c_uint64

MAX_VCPUS = 32
COMMAND_LINE_BYTES = 1024
# Of a guest with two-level page tables, and of one with PAE.
START_INFO_MAGIC, START_INFO_MAGIC_PAE = b"xen-3.0-x86_32", b"xen-3.0-x86_32p"


class GuestConsole(ctypes.LittleEndianStructure):
    """``start_info.console.domU`` (xen.h): the page of a `ConsoleRing`."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("console_mfn", c_uint32), ("console_evtchn", c_uint32))


class InitialConsole(ctypes.LittleEndianStructure):
    """``start_info.console.dom0`` (xen.h): where from its own start there is a `ScreenInfo`, and its size."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("console_info_off", c_uint32), ("console_info_size", c_uint32))


class StartConsole(ctypes.Union):
    """``start_info.console`` (xen.h): one for the initial domain, the other for all others."""

    _anonymous_ = ("guest", "initial")
    _fields_ = (("guest", GuestConsole), ("initial", InitialConsole))


class StartInfo(ctypes.LittleEndianStructure):
    """``start_info`` (xen.h): what a domain finds behind ESI when it starts."""

    _pack_ = 1
    _layout_ = "ms"
    _anonymous_ = ("console",)
    _fields_ = (
        ("magic", c_char * 32),
        ("nr_pages", c_uint32),
        ("shared_info", c_uint32),
        ("flags", c_uint32),
        ("store_mfn", c_uint32),
        ("store_evtchn", c_uint32),
        ("console", StartConsole),
        ("pt_base", c_uint32),
        ("nr_pt_frames", c_uint32),
        ("mfn_list", c_uint32),
        ("mod_start", c_uint32),
        ("mod_len", c_uint32),
        ("cmd_line", c_char * COMMAND_LINE_BYTES),
        ("first_p2m_pfn", c_uint32),
        ("nr_p2m_frames", c_uint32),
    )


class ScreenInfo(ctypes.LittleEndianStructure):
    """``dom0_vga_console_info`` (xen.h): the machine's screen; a ``video_type`` of 0 means that it has none."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("video_type", c_uint8), ("pad", c_uint8 * 3), ("u", c_uint8 * 36))


class ConsoleRing(ctypes.LittleEndianStructure):
    """``xencons_interface`` (io/console.h): two rings of bytes, and how far each side has come with each."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("input", c_uint8 * 1024),
        ("out", c_uint8 * 2048),
        ("in_cons", c_uint32),
        ("in_prod", c_uint32),
        ("out_cons", c_uint32),
        ("out_prod", c_uint32),
    )


class VcpuTimeInfo(ctypes.LittleEndianStructure):
    """``vcpu_time_info`` (xen.h): 32 bytes."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("version", c_uint32),
        ("pad0", c_uint32),
        ("tsc_timestamp", c_uint64),
        ("system_time", c_uint64),
        ("tsc_to_system_mul", c_uint32),
        ("tsc_shift", c_int8),
        ("pad1", c_int8 * 3),
    )


class VcpuInfo(ctypes.LittleEndianStructure):
    """``vcpu_info`` (xen.h): 64 bytes; ``cr2`` is where a page fault's address is left."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("evtchn_upcall_pending", c_uint8),
        ("evtchn_upcall_mask", c_uint8),
        ("pad0", c_uint16),
        ("evtchn_pending_sel", c_uint32),
        ("cr2", c_uint32),
        ("pad", c_uint32 * 5),
        ("time", VcpuTimeInfo),
    )


class SharedInfo(ctypes.LittleEndianStructure):
    """``shared_info`` (xen.h): the page that a domain and the hypervisor both write."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("vcpu_info", VcpuInfo * MAX_VCPUS),
        ("evtchn_pending", c_uint32 * 32),
        ("evtchn_mask", c_uint32 * 32),
        ("wc_version", c_uint32),
        ("wc_sec", c_uint32),
        ("wc_nsec", c_uint32),
        ("max_pfn", c_uint32),
        ("pfn_to_mfn_frame_list_list", c_uint32),
        ("nmi_reason", c_uint32),
        ("p2m_cr3", c_uint32),
        ("p2m_vaddr", c_uint32),
        ("p2m_generation", c_uint32),
        ("wc_sec_hi", c_uint32),
    )


class TrapInfo(ctypes.LittleEndianStructure):
    """``trap_info`` (arch-x86/xen.h): one row of the virtual interrupt descriptor table."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("vector", c_uint8), ("flags", c_uint8), ("cs", c_uint16), ("address", c_uint32))


class MulticallEntry(ctypes.LittleEndianStructure):
    """``multicall_entry`` (xen.h): one call of a batch; ``result`` is written back."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("op", c_uint32), ("result", c_uint32), ("args", c_uint32 * 6))


class UserRegisters(ctypes.LittleEndianStructure):
    """``cpu_user_regs`` (arch-x86/xen-x86_32.h): of the selectors only the lower half counts."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        *((name, c_uint32) for name in ("ebx", "ecx", "edx", "esi", "edi", "ebp", "eax")),
        ("error_code", c_uint16),
        ("entry_vector", c_uint16),
        ("eip", c_uint32),
        ("cs", c_uint16),
        ("saved_upcall_mask", c_uint8),
        ("pad0", c_uint8),
        ("eflags", c_uint32),
        ("esp", c_uint32),
        ("ss", c_uint16),
        ("pad1", c_uint16),
        ("es", c_uint16),
        ("pad2", c_uint16),
        ("ds", c_uint16),
        ("pad3", c_uint16),
        ("fs", c_uint16),
        ("pad4", c_uint16),
        ("gs", c_uint16),
        ("pad5", c_uint16),
    )


class VcpuGuestContext(ctypes.LittleEndianStructure):
    """``vcpu_guest_context`` (arch-x86/xen.h): all that a virtual CPU begins with; ``flags`` is of `VcpuFlags`."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("fpu_ctxt", c_uint8 * 512),
        ("flags", c_uint32),
        ("user_regs", UserRegisters),
        ("trap_ctxt", TrapInfo * 256),
        ("ldt_base", c_uint32),
        ("ldt_ents", c_uint32),
        ("gdt_frames", c_uint32 * 16),
        ("gdt_ents", c_uint32),
        ("kernel_ss", c_uint32),
        ("kernel_sp", c_uint32),
        ("ctrlreg", c_uint32 * 8),
        ("debugreg", c_uint32 * 8),
        ("event_callback_cs", c_uint32),
        ("event_callback_eip", c_uint32),
        ("failsafe_callback_cs", c_uint32),
        ("failsafe_callback_eip", c_uint32),
        ("vm_assist", c_uint32),
    )
