/*
 * What the kernels that check the memory interface share: page tables of both formats, hypercalls, and checks.
 *
 * A check prints "ok NAME" or "FAIL NAME: expected .. got ..".  Numbers and structures are those of xen.h and memory.h.
 */
#ifndef MEMORY_H
#define MEMORY_H

#include "kernel.h"

#if PAE
typedef u64 entry;
enum { LEVELS = 3 };
static const u32 shift[] = {12, 21, 30}, count[] = {512, 512, 4};
#define HYPERVISOR_START 0xf5800000u
#define FRAME(e) ((u32)((e) >> 12 & 0xffffff))
#else
typedef u32 entry;
enum { LEVELS = 2 };
static const u32 shift[] = {12, 22}, count[] = {1024, 1024};
#define HYPERVISOR_START 0xfc000000u
#define FRAME(e) ((e) >> 12)
#endif

enum { PRESENT = 1, RW = 2, USER = 4, PCD = 0x10, ACCESSED = 0x20, DIRTY = 0x40, PSE = 0x80, GLOBAL = 0x100 };
enum { LEAF = PRESENT | RW | ACCESSED | DIRTY, READ_ONLY = PRESENT | ACCESSED };
enum { TABLE = PRESENT | RW | USER | ACCESSED };
#define NX (1ull << 63)

enum { EPERM = 1, ESRCH = 3, EACCES = 13, EFAULT = 14, EBUSY = 16, EINVAL = 22, ENOSYS = 38 };

enum {
    SET_TRAP_TABLE = 0, MMU_UPDATE = 1, SET_GDT = 2, STACK_SWITCH = 3, UPDATE_DESCRIPTOR = 10, MEMORY_OP = 12,
    MULTICALL = 13, UPDATE_VA_MAPPING = 14, VM_ASSIST = 21, UPDATE_VA_MAPPING_OTHERDOMAIN = 22, IRET = 23,
    MMUEXT_OP = 26
};

enum { MMU_NORMAL_PT_UPDATE = 0, MMU_MACHPHYS_UPDATE = 1, MMU_PT_UPDATE_PRESERVE_AD = 2,
       MMU_PT_UPDATE_NO_TRANSLATE = 3 };

enum {
    MMUEXT_PIN_L1_TABLE = 0, MMUEXT_PIN_L2_TABLE = 1, MMUEXT_PIN_L3_TABLE = 2, MMUEXT_UNPIN_TABLE = 4,
    MMUEXT_NEW_BASEPTR = 5, MMUEXT_TLB_FLUSH_LOCAL = 6, MMUEXT_INVLPG_LOCAL = 7, MMUEXT_TLB_FLUSH_MULTI = 8,
    MMUEXT_INVLPG_MULTI = 9, MMUEXT_TLB_FLUSH_ALL = 10, MMUEXT_INVLPG_ALL = 11, MMUEXT_FLUSH_CACHE = 12,
    MMUEXT_SET_LDT = 13, MMUEXT_CLEAR_PAGE = 16, MMUEXT_COPY_PAGE = 17
};
#define MMUEXT_PIN_ROOT (PAE ? MMUEXT_PIN_L3_TABLE : MMUEXT_PIN_L2_TABLE)

enum { UVMF_NONE = 0, UVMF_TLB_FLUSH = 1, UVMF_INVLPG = 2, UVMF_LOCAL = 0, UVMF_ALL = 4 };

enum {
    XENMEM_decrease_reservation = 1, XENMEM_maximum_ram_page = 2, XENMEM_current_reservation = 3,
    XENMEM_maximum_reservation = 4, XENMEM_populate_physmap = 6, XENMEM_exchange = 11, XENMEM_machphys_mapping = 12
};

enum { VMASST_CMD_enable = 0, VMASST_CMD_disable = 1, VMASST_TYPE_writable_pagetables = 2 };

enum { DOMID_SELF = 0x7ff0 };

enum { FLAT_RING1_CS = 0xe019, FLAT_RING1_DS = 0xe021, FLAT_RING3_CS = 0xe02b, FLAT_RING3_DS = 0xe033 };

struct mmu_update { u64 ptr, val; };
struct mmuext_op { u32 cmd, arg1, arg2; };
struct xen_memory_reservation { u32 *extent_start; u32 nr_extents, extent_order, mem_flags; unsigned short domid; };
struct xen_memory_exchange { struct xen_memory_reservation in, out; u32 nr_exchanged; };
struct xen_machphys_mapping { u32 v_start, v_end, max_mfn; };
struct trap_info { u8 vector, flags; unsigned short cs; u32 address; };
struct multicall_entry { u32 op, result, args[6]; };
struct vcpu_info { u8 evtchn_upcall_pending, evtchn_upcall_mask; u32 evtchn_pending_sel, cr2, pad[5], time[8]; };
struct shared_info { struct vcpu_info vcpu_info[32]; u8 rest[PAGE - 32 * sizeof(struct vcpu_info)]; };

#define PAGES(name, number) static u8 name[number][PAGE] __attribute__((aligned(4096)))
#define WORD(page) (*(volatile u32 *)(page))
#define M2P ((const volatile u32 *)HYPERVISOR_START)

static const struct start_info *info;
static u32 *mfns;
static u32 base;
/* The root table that is in use, where it can be read. */
static const entry *root;
static u32 failed;

static inline void memory_start(const struct start_info *start_info)
{
    info = start_info;
    mfns = (u32 *)info->mfn_list;
    base = (u32)virt_base;
    root = (const entry *)info->pt_base;
}

static inline void same(const char *name, u64 got, u64 expected)
{
    if (got == expected) {
        print("ok ");
        print(name);
    } else {
        failed++;
        print("FAIL ");
        print(name);
        print(": expected ");
        print_hex(expected);
        print(" got ");
        print_hex(got);
    }
    print("\n");
}

static inline void answer(const char *name, long got, long expected)
{
    same(name, (u32)got, (u32)expected);
}

static inline void memory_end(void)
{
    print(failed ? "failed\n" : "passed\n");
    shut_down(failed ? CRASHED : POWEROFF);
}

static inline long hypercall5(int number, long one, long two, long three, long four, long five)
{
    long result;
    asm volatile("call *%[stub]"
                 : "=a"(result), "+b"(one), "+c"(two), "+d"(three), "+S"(four), "+D"(five)
                 : [stub] "0"(hypercall_page + 32 * number)
                 : "memory");
    return result;
}

static inline u32 mfn_of(const volatile void *at)
{
    return mfns[((u32)at - base) / PAGE];
}

static inline u64 machine_of(const volatile void *at)
{
    return (u64)mfn_of(at) * PAGE + (u32)at % PAGE;
}

static inline entry entry_of(u32 mfn, u64 flags)
{
    return (entry)((u64)mfn * PAGE | flags);
}

static inline entry page_entry(const volatile void *at, u64 flags)
{
    return entry_of(mfn_of(at), flags);
}

/* The entry of the lowest level that maps an address, where it can be read; 0 if there is none. */
static inline volatile entry *place_of(const volatile void *address)
{
    const entry *table = root;
    for (int level = LEVELS - 1; level; level--) {
        entry e = table[(u32)address >> shift[level] & (count[level] - 1)];
        if (!(e & PRESENT) || !(table = (const entry *)seen_at(info, FRAME(e), info->nr_pages)))
            return 0;
    }
    return (volatile entry *)&table[(u32)address >> 12 & (count[0] - 1)];
}

static inline long map(const volatile void *address, entry e, u32 flags)
{
    return hypercall5(UPDATE_VA_MAPPING, (u32)address, (u32)e, (u64)e >> 32, flags, 0);
}

static inline long updates(const struct mmu_update *list, u32 number, u32 *done, u32 domid)
{
    return hypercall5(MMU_UPDATE, (long)list, number, (long)done, domid, 0);
}

static inline long update_from(u64 ptr, u64 val, u32 domid)
{
    struct mmu_update one = {ptr, val};
    return updates(&one, 1, 0, domid);
}

static inline long update(u64 ptr, u64 val)
{
    return update_from(ptr, val, DOMID_SELF);
}

static inline long extended(u32 cmd, u32 arg1, u32 arg2)
{
    struct mmuext_op one = {cmd, arg1, arg2};
    return hypercall5(MMUEXT_OP, (long)&one, 1, 0, DOMID_SELF, 0);
}

static inline long memory_op(u32 command, void *argument)
{
    return hypercall(MEMORY_OP, command, (long)argument, 0);
}

static inline int is_mine(u32 mfn)
{
    for (u32 pfn = 0; pfn < info->nr_pages; pfn++)
        if (mfns[pfn] == mfn)
            return 1;
    return mfn == info->shared_info / PAGE;
}

/* A frame of the machine's that is not ours. */
static inline u32 not_mine(void)
{
    u32 mfn = mfns[0];
    while (is_mine(mfn))
        mfn--;
    return mfn;
}

/* The number behind "name" in the command line. */
static inline u32 told(const char *name)
{
    for (const char *text = info->cmd_line; *text; text++) {
        u32 n = 0, value = 0;
        while (name[n] && text[n] == name[n])
            n++;
        if (name[n])
            continue;
        for (text += n; *text >= '0' && *text <= '9'; text++)
            value = 10 * value + (*text - '0');
        return value;
    }
    return 0;
}

#endif
