/*
 * The hypercalls that change page tables: update_va_mapping, mmu_update, batches of both, and what they refuse.
 *
 * Command line: other=N the number of another domain, which exists; "initial=1" for the initial domain, and then
 * frame=N for a frame of that other domain's.
 */
#include "memory.h"

PAGES(one, 1);
PAGES(two, 1);
PAGES(three, 1);
#define NOWHERE ((char *)0x10000000)
#define UNMAPPED ((void *)0x1000)

static void back(void)
{
    map(one, page_entry(one, LEAF), UVMF_INVLPG);
    map(two, page_entry(two, LEAF), UVMF_INVLPG);
    map(three, page_entry(three, LEAF), UVMF_INVLPG);
}

static void check_update_va_mapping(void)
{
    u32 table = mfn_of((void *)place_of(one));
    WORD(one) = 1, WORD(two) = 2, WORD(three) = 3;
    answer("update_va_mapping", map(one, page_entry(two, LEAF), UVMF_INVLPG | UVMF_LOCAL), 0);
    same("another frame is seen", WORD(one), 2);
    same("the entry is what was asked for", *place_of(one) & ~(entry)(ACCESSED | DIRTY), page_entry(two, PRESENT | RW));
    answer("update_va_mapping of no address", map(NOWHERE, page_entry(two, LEAF), 0), -EINVAL);
    answer("update_va_mapping of the hypervisor's",
           map((char *)HYPERVISOR_START, page_entry(two, LEAF), 0), -EINVAL);
    answer("frame of somebody else", map(one, entry_of(not_mine(), LEAF), 0), -EBUSY);
    answer("frame of somebody else to read", map(one, entry_of(not_mine(), READ_ONLY), 0), -EBUSY);
    if (!told("initial=")) {
        answer("frame behind the end of memory",
               map(one, entry_of(memory_op(XENMEM_maximum_ram_page, 0) + 0x100, LEAF), 0), -EPERM);
        answer("uncached page", map(one, page_entry(one, LEAF | PCD), 0), -EINVAL);
    }
    answer("superpage", map(one, page_entry(one, LEAF | PSE), 0), -EINVAL);
    answer("global page", map(one, page_entry(one, LEAF | GLOBAL), 0), -EINVAL);
    same("after all refusals the entry is as before", *place_of(one) & ~(entry)(ACCESSED | DIRTY),
         page_entry(two, PRESENT | RW));
    answer("software's bits", map(one, page_entry(one, LEAF | 0xe00), UVMF_INVLPG), 0);
    same("software's bits are kept", *place_of(one) & 0xe00, 0xe00);
    answer("anything that is not present", map(one, (entry)0xfffffffe, UVMF_INVLPG), 0);
    same("anything is kept", *place_of(one), (entry)0xfffffffe);
    answer("page table to read", map(one, entry_of(table, READ_ONLY), UVMF_INVLPG), 0);
    same("page table is read", ((volatile entry *)one)[(u32)one >> 12 & (count[0] - 1)], entry_of(table, READ_ONLY));
    answer("page table to write", map(one, entry_of(table, LEAF), UVMF_INVLPG), -EBUSY);
    answer("root table to write", map(one, page_entry(root, LEAF), UVMF_INVLPG), -EBUSY);
    back();
}

static void check_flushes(void)
{
    u32 set[2] = {1, 0};
    answer("no flush", map(one, page_entry(two, LEAF), UVMF_NONE), 0);
    answer("flush of all", map(one, page_entry(three, LEAF), UVMF_TLB_FLUSH | UVMF_ALL), 0);
    same("flush of all is seen", WORD(one), 3);
    answer("flush of all on this CPU", map(one, page_entry(two, LEAF), UVMF_TLB_FLUSH | UVMF_LOCAL), 0);
    same("flush of all on this CPU is seen", WORD(one), 2);
    answer("flush of one on all CPUs", map(one, page_entry(three, LEAF), UVMF_INVLPG | UVMF_ALL), 0);
    same("flush of one on all CPUs is seen", WORD(one), 3);
    answer("flush on a set of CPUs", map(one, page_entry(two, LEAF), UVMF_TLB_FLUSH | (u32)set), 0);
    same("flush on a set of CPUs is seen", WORD(one), 2);
    answer("set of CPUs that cannot be read", map(one, page_entry(three, LEAF), UVMF_INVLPG | 0x1000), -EFAULT);
    same("entry is changed all the same", FRAME(*place_of(one)), mfn_of(three));
    back();
}

static void check_mmu_update(void)
{
    u64 place = machine_of(place_of(one));
    u32 done = 99;
    struct mmu_update list[3] = {{place, page_entry(two, PRESENT | RW)}};
    answer("mmu_update", updates(list, 1, &done, DOMID_SELF), 0);
    same("mmu_update counts", done, 1);
    same("mmu_update stores", *place_of(one), page_entry(two, PRESENT | RW));
    extended(MMUEXT_INVLPG_LOCAL, (u32)one, 0);
    WORD(one) = 4;
    same("the MMU marks", *place_of(one) & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    answer("preserve A/D", update(place | MMU_PT_UPDATE_PRESERVE_AD, page_entry(two, PRESENT)), 0);
    same("A/D are kept", *place_of(one), page_entry(two, PRESENT | ACCESSED | DIRTY));
    answer("normal update", update(place, page_entry(two, PRESENT)), 0);
    same("A/D are lost", *place_of(one), page_entry(two, PRESENT));
    answer("preserve A/D, with them", update(place | MMU_PT_UPDATE_PRESERVE_AD, page_entry(two, READ_ONLY)), 0);
    same("A is set", *place_of(one), page_entry(two, READ_ONLY));
    answer("update without translation", update(place | MMU_PT_UPDATE_NO_TRANSLATE, page_entry(two, PRESENT)), 0);
    same("is a normal one", *place_of(one), page_entry(two, PRESENT));

    list[0] = (struct mmu_update){place, page_entry(three, LEAF)};
    list[1] = (struct mmu_update){machine_of(place_of(two)), page_entry(one, LEAF)};
    list[2] = (struct mmu_update){machine_of(place_of(three)), page_entry(two, LEAF)};
    answer("three at once", updates(list, 3, &done, DOMID_SELF), 0);
    same("three are counted", done, 3);
    extended(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
    same("three are seen", FRAME(*place_of(one)) == mfn_of(three) && FRAME(*place_of(two)) == mfn_of(one)
         && FRAME(*place_of(three)) == mfn_of(two), 1);
    list[0].val = page_entry(one, LEAF);
    list[1].val = page_entry(two, LEAF | PSE);
    list[2].val = page_entry(three, LEAF);
    answer("the second one is bad", updates(list, 3, &done, DOMID_SELF), -EINVAL);
    same("one is counted", done, 1);
    same("the first is done, the third is not",
         FRAME(*place_of(one)) == mfn_of(one) && FRAME(*place_of(three)) == mfn_of(two), 1);
    done = 99;
    answer("none at all", updates(list, 0, &done, DOMID_SELF), 0);
    same("none is counted", done, 0);
    answer("without a count", updates(list, 1, 0, DOMID_SELF), 0);
    answer("count that cannot be stored", updates(list, 1, UNMAPPED, DOMID_SELF), 0);
    answer("list that cannot be read", updates(UNMAPPED, 1, &done, DOMID_SELF), -EFAULT);
    back();
    extended(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
}

static void check_refusals(void)
{
    u64 place = machine_of(place_of(one)), top = machine_of(root);
#if PAE
    u32 known = 0;
    for (u32 command = 4; command < 8; command++)
        known += update(place | command, page_entry(one, LEAF)) != -ENOSYS;
    same("commands that do not exist", known, 0);
    answer("last entry of the root", update(top + 3 * sizeof(entry), 0), -EINVAL);
    top = (u64)FRAME(root[3]) * PAGE;
#endif
    u32 last = HYPERVISOR_START >> shift[LEVELS - 1 - PAE] & (count[0] - 1);
    answer("the hypervisor's entry", update(top + last * sizeof(entry), 0), -EPERM);
    answer("the hypervisor's last entry", update(top + (count[0] - 1) * sizeof(entry), 0), -EPERM);
    answer("table of somebody else", update((u64)not_mine() * PAGE, 0), -EINVAL);
    answer("table that is no frame", update((u64)0xfffff * PAGE, 0), -EINVAL);
    answer("entry with somebody else's frame", update(place, entry_of(not_mine(), LEAF)), -EBUSY);
    answer("entry that lets a table be written",
           update(place, entry_of((u32)(place / PAGE), LEAF)), -EBUSY);
    answer("table of somebody else's in a table", update(top + 5 * sizeof(entry), entry_of(not_mine(), TABLE)), -EINVAL);
    answer("page that is written to as a table", update(top + 5 * sizeof(entry), page_entry(one, TABLE)), -EINVAL);
    answer("superpage in a table", update(top + 5 * sizeof(entry), page_entry(one, TABLE | PSE)), -EINVAL);
    answer("entry in a page of data", update(machine_of(two) + 16, 0x12345678), 0);
    same("is stored as data", WORD(two[0] + 16), 0x12345678);
}

static void check_domains(void)
{
    u64 place = machine_of(place_of(one)), self = page_entry(one, LEAF);
    u32 other = told("other=");
    answer("frames of nobody", update_from(place, self, 777), -ESRCH);
    answer("tables of nobody", update_from(place, self, 778 << 16 | DOMID_SELF), -EINVAL);
    answer("update_va_mapping_otherdomain of nobody",
           hypercall5(UPDATE_VA_MAPPING_OTHERDOMAIN, (u32)one, (u32)self, self >> 32, 0, 777), -ESRCH);
    answer("update_va_mapping_otherdomain of itself",
           hypercall5(UPDATE_VA_MAPPING_OTHERDOMAIN, (u32)one, (u32)self, self >> 32, 0, DOMID_SELF), 0);
    if (!told("initial=")) {
        answer("frames of another", update_from(place, self, other), -EPERM);
        answer("tables of another", update_from(place, self, (other + 1) << 16 | DOMID_SELF), -EPERM);
        answer("update_va_mapping_otherdomain",
               hypercall5(UPDATE_VA_MAPPING_OTHERDOMAIN, (u32)one, (u32)self, self >> 32, 0, other), -EPERM);
        return;
    }
    u64 theirs = entry_of(told("frame="), LEAF);
    answer("frames of itself by number", update_from(place, self, 0), -ESRCH);
    answer("tables of itself by number", update_from(place, self, 1 << 16 | DOMID_SELF), 0);
    answer("another's frame as one's own", update(place, theirs), -EBUSY);
    answer("another's frame", update_from(place, theirs, other), 0);
    extended(MMUEXT_INVLPG_LOCAL, (u32)one, 0);
    WORD(one) = 0x7e57;
    same("another's frame is written", WORD(one), 0x7e57);
    answer("one's own frame as another's", update_from(place, self, other), -EBUSY);
    answer("another's frame as a table",
           update_from(machine_of(root) + 2 * sizeof(entry), entry_of(told("frame="), PRESENT), other), -EINVAL);
    answer("another's frame by update_va_mapping_otherdomain",
           hypercall5(UPDATE_VA_MAPPING_OTHERDOMAIN, (u32)two, (u32)theirs, theirs >> 32, UVMF_INVLPG, other), 0);
    same("the same frame", WORD(two), 0x7e57);
    back();
}

static struct multicall_entry mapping_call(void *at, entry e)
{
    return (struct multicall_entry){UPDATE_VA_MAPPING, 99, {(u32)at, (u32)e, (u64)e >> 32, UVMF_INVLPG, 0, 0}};
}

static void check_multicall(void)
{
    struct multicall_entry calls[4] = {
        mapping_call(one, page_entry(two, LEAF)), mapping_call(NOWHERE, page_entry(two, LEAF)),
        {63, 99, {0}}, mapping_call(two, page_entry(one, LEAF))};
    WORD(one) = 1, WORD(two) = 2;
    answer("multicall", hypercall(MULTICALL, (long)calls, 4, 0), 0);
    answer("first of four", calls[0].result, 0);
    answer("second of four, refused", calls[1].result, -EINVAL);
    answer("third of four, unknown", calls[2].result, -ENOSYS);
    answer("fourth of four", calls[3].result, 0);
    same("first is seen", WORD(one), 2);
    same("fourth is seen", WORD(two), 1);
    answer("multicall of none", hypercall(MULTICALL, (long)calls, 0, 0), 0);
    answer("multicall that cannot be read", hypercall(MULTICALL, 0x1000, 1, 0), -EFAULT);
    back();
}

static void check_extended(void)
{
    struct mmuext_op list[3] = {{MMUEXT_CLEAR_PAGE, mfn_of(two), 0}, {99, 0, 0}, {MMUEXT_CLEAR_PAGE, mfn_of(three), 0}};
    u32 done = 99;
    WORD(one) = 1, WORD(two) = 2, WORD(three) = 3;
    answer("second command is unknown", hypercall5(MMUEXT_OP, (long)list, 3, (long)&done, DOMID_SELF, 0), -ENOSYS);
    same("one command is counted", done, 1);
    same("MMUEXT_CLEAR_PAGE", WORD(two), 0);
    same("third command is not done", WORD(three), 3);
    answer("MMUEXT_COPY_PAGE", extended(MMUEXT_COPY_PAGE, mfn_of(two), mfn_of(one)), 0);
    same("page is copied", WORD(two), 1);
    answer("MMUEXT_CLEAR_PAGE of a table", extended(MMUEXT_CLEAR_PAGE, mfn_of(root), 0), -EINVAL);
    answer("MMUEXT_CLEAR_PAGE of somebody else's", extended(MMUEXT_CLEAR_PAGE, not_mine(), 0), -EINVAL);
    answer("MMUEXT_TLB_FLUSH_ALL", extended(MMUEXT_TLB_FLUSH_ALL, 0, 0), 0);
    answer("MMUEXT_INVLPG_ALL", extended(MMUEXT_INVLPG_ALL, (u32)one, 0), 0);
    done = 1;
    answer("MMUEXT_TLB_FLUSH_MULTI", extended(MMUEXT_TLB_FLUSH_MULTI, 0, (u32)&done), 0);
    answer("MMUEXT_INVLPG_MULTI", extended(MMUEXT_INVLPG_MULTI, (u32)one, (u32)&done), 0);
    if (!told("initial="))
        answer("MMUEXT_FLUSH_CACHE", extended(MMUEXT_FLUSH_CACHE, 0, 0), -EACCES);
    answer("commands for nobody", hypercall5(MMUEXT_OP, (long)list, 1, 0, 777, 0), -ESRCH);
    answer("commands that cannot be read", hypercall5(MMUEXT_OP, 0x1000, 1, 0, DOMID_SELF, 0), -EFAULT);
    answer("no commands", hypercall5(MMUEXT_OP, (long)list, 0, (long)&done, DOMID_SELF, 0), 0);
    same("no command is counted", done, 0);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    check_update_va_mapping();
    check_flushes();
    check_mmu_update();
    check_refusals();
    check_domains();
    check_multicall();
    check_extended();
    memory_end();
}
