"""What a kernel built for Xen can say about itself: numbers of its ELF notes and of features.

The values are those of elfnote.h and features.h.
"""

from __future__ import annotations

from enum import IntEnum

NOTE_NAME = b"Xen\0"
# The section that kernels from before the notes have instead: one string of NAME=VALUE pairs.
LEGACY_SECTION = "__xen_guest"


class ElfNote(IntEnum):
    """Types of the notes named "Xen" (elfnote.h)."""

    INFO = 0
    ENTRY = 1
    HYPERCALL_PAGE = 2
    VIRT_BASE = 3
    PADDR_OFFSET = 4
    XEN_VERSION = 5
    GUEST_OS = 6
    GUEST_VERSION = 7
    LOADER = 8
    PAE_MODE = 9
    FEATURES = 10
    BSD_SYMTAB = 11
    HV_START_LOW = 12
    L1_MFN_VALID = 13
    SUSPEND_CANCEL = 14
    INIT_P2M = 15
    MOD_START_PFN = 16
    SUPPORTED_FEATURES = 17
    PHYS32_ENTRY = 18


class Feature(IntEnum):
    """Bits of ``SUPPORTED_FEATURES`` and of ``XENVER_get_features``, by the names in ``FEATURES`` (features.h)."""

    writable_page_tables = 0
    writable_descriptor_tables = 1
    auto_translated_physmap = 2
    supervisor_mode_kernel = 3
    pae_pgdir_above_4gb = 4
    mmu_pt_update_preserve_ad = 5
    highmem_assist = 6
    gnttab_map_avail_bits = 7
    hvm_callback_vector = 8
    hvm_safe_pvclock = 9
    hvm_pirqs = 10
    dom0 = 11
    memory_op_vnode_supported = 13
    ARM_SMCCC_supported = 14
    linux_rsdp_unrestricted = 15
    not_direct_mapped = 16
    direct_mapped = 17
