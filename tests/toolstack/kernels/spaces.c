/*
 * Address spaces: a kernel builds page tables by hand, pins and loads them, reads them through themselves, gives up the
 * first ones, and goes back and forth by the hypercall and by moves to CR3, which Xen carries out for it.
 *
 * The new space shares the kernel's l1 tables, and has a page of its own at OWN, and its tables at LINEAR.
 */
#include "traps.h"

#define OWN ((char *)0x80000000)
#define LINEAR_SLOT 7
#if PAE
#define LINEAR (OWN + (LINEAR_SLOT << 21))
#else
#define LINEAR ((char *)(LINEAR_SLOT << 22))
#endif

PAGES(page, 2);
PAGES(tables, 8);
static entry *leaves;          /* the l1 table for OWN */
static entry *branches;        /* the l2 table that names it */
static entry *top;             /* the l2 table for the kernel's range */
static entry *new_root;

static u32 read_cr3(void)
{
    u32 cr3;
    asm volatile("movl %%cr3, %0" : "=r"(cr3));
    return cr3;
}

static u64 write_cr3(u32 cr3)
{
    return GUARDED("movl %[cr3], %%cr3", : [resume] "=m"(resume) : [cr3] "r"(cr3) : "memory");
}

static u32 cr3_of(const volatile void *table)
{
    return mfn_of(table) << 12 | mfn_of(table) >> 20;
}

static long read_only(const volatile void *at)
{
    return map(at, page_entry(at, READ_ONLY), UVMF_INVLPG);
}

static long writable(const volatile void *at)
{
    return map(at, page_entry(at, LEAF), UVMF_INVLPG);
}

static void fill(void)
{
    u32 guests = HYPERVISOR_START >> shift[LEVELS - 1 - PAE] & (count[0] - 1);
    leaves = (entry *)tables[0];
    leaves[0] = page_entry(page[0], LEAF);
    leaves[1] = page_entry(page[1], READ_ONLY);
    leaves[2] = page_entry(leaves, READ_ONLY);
#if PAE
    branches = (entry *)tables[1];
    top = (entry *)tables[2];
    new_root = (entry *)tables[3];
    const entry *old_top = (const entry *)seen_at(info, FRAME(root[3]), info->nr_pages);
    for (u32 n = 0; n < guests; n++)
        top[n] = old_top[n];
    new_root[2] = page_entry(branches, PRESENT);
    new_root[3] = page_entry(top, PRESENT);
    branches[0] = page_entry(leaves, TABLE);
#else
    new_root = top = branches = (entry *)tables[1];
    for (u32 n = 0; n < guests; n++)
        new_root[n] = root[n];
    new_root[(u32)OWN >> 22] = page_entry(leaves, TABLE);
#endif
    branches[LINEAR_SLOT] = page_entry(branches, PRESENT | ACCESSED);
}

static void check_pinning(void)
{
    fill();
    answer("pin of tables that can be written", extended(MMUEXT_PIN_ROOT, mfn_of(new_root), 0), -EINVAL);
    answer("l1 table to read", read_only(leaves), 0);
    answer("l2 table to read", read_only(branches), 0);
    answer("l2 table of the kernel's to read", read_only(top), 0);
    answer("root table to read", read_only(new_root), 0);
    answer("load of a page of data", extended(MMUEXT_NEW_BASEPTR, mfn_of(page[0]), 0), -EINVAL);
    answer("load of somebody else's", extended(MMUEXT_NEW_BASEPTR, not_mine(), 0), -EINVAL);
    answer("pin of somebody else's", extended(MMUEXT_PIN_L1_TABLE, not_mine(), 0), -EINVAL);
    answer("unpin of what is not pinned", extended(MMUEXT_UNPIN_TABLE, mfn_of(new_root), 0), -EINVAL);
    answer("pin", extended(MMUEXT_PIN_ROOT, mfn_of(new_root), 0), 0);
    answer("pin twice", extended(MMUEXT_PIN_ROOT, mfn_of(new_root), 0), -EINVAL);
    answer("pin of an l1 table as another", extended(MMUEXT_PIN_L2_TABLE, mfn_of(leaves), 0), -EINVAL);
    answer("pinned table to write", writable(new_root), -EBUSY);
    answer("l1 table below to write", writable(leaves), -EBUSY);
    same("store to a pinned table", try_store(leaves, 0), FAULT(14, 3, leaves));
    same("the first space goes on", try_load(OWN), FAULT(14, 0, OWN));
}

static void check_new_space(void)
{
    const entry *old_root = root;
    u32 old = mfn_of(root);
    WORD(page[0]) = 0x600d;
    same("CR3 at the start", read_cr3(), cr3_of(root));
    answer("MMUEXT_NEW_BASEPTR", extended(MMUEXT_NEW_BASEPTR, mfn_of(new_root), 0), 0);
    root = new_root;
    same("CR3 is the new one", read_cr3(), cr3_of(root));
    same("page of its own", try_load(OWN) ? 0 : WORD(OWN), 0x600d);
    WORD(OWN) = 0x7a1e;
    same("seen on the other side", WORD(page[0]), 0x7a1e);
    same("page to read", try_store(OWN + PAGE, 1), FAULT(14, 3, OWN + PAGE));
    same("table in its own space", ((volatile entry *)(OWN + 2 * PAGE))[0] & ~(entry)(ACCESSED | DIRTY),
         page_entry(page[0], PRESENT | RW));
    same("store to a table in its own space", try_store(OWN + 2 * PAGE, 0), FAULT(14, 3, OWN + 2 * PAGE));
    /* What the branches map: in PAE from OWN on, else everything. */
    u32 covered = PAE ? 0 : (u32)OWN;
    volatile entry *leaf = (volatile entry *)LINEAR + (covered >> 12);
    volatile entry *branch = (volatile entry *)(LINEAR + LINEAR_SLOT * PAGE) + (covered >> 22);
    same("linear page tables", *leaf & ~(entry)(ACCESSED | DIRTY), page_entry(page[0], PRESENT | RW));
    same("the tables above in them", FRAME(*branch), mfn_of(leaves));
    same("store to linear page tables", try_store(leaf, 0), FAULT(14, 3, leaf));
    same("store to the tables above", try_store(branch, 0), FAULT(14, 3, branch));
    answer("linear page tables to write",
           update(machine_of(branches + LINEAR_SLOT), page_entry(branches, TABLE)), -EINVAL);
    answer("linear page tables again",
           update(machine_of(branches + LINEAR_SLOT), page_entry(branches, PRESENT)), 0);

    answer("old root while it is pinned", writable(old_root), -EBUSY);
    answer("unpin of the old root", extended(MMUEXT_UNPIN_TABLE, old, 0), 0);
    answer("unpin twice", extended(MMUEXT_UNPIN_TABLE, old, 0), -EINVAL);
    answer("old root is a page", writable(old_root), 0);
    same("and can be written", try_store((void *)old_root, 0), 0);
#if PAE
    u32 pages = 0;
    for (u32 n = 0; n < info->nr_pt_frames; n++)
        pages += writable((char *)info->pt_base + n * PAGE) == 0;
    same("the old root and its l2 tables are pages, its l1 tables are in use", pages > 1 && pages < info->nr_pt_frames, 1);
#endif
}

/* The l1 entry for OWN, changed without a flush. */
static void point_at(const void *at)
{
    update(machine_of(leaves), page_entry(at, LEAF));
}

static void check_flushes(void)
{
    u32 set = 1;
    WORD(page[0]) = 10, WORD(page[1]) = 11;
    same("before", WORD(OWN), 10);
    point_at(page[1]);
    answer("MMUEXT_INVLPG_LOCAL", extended(MMUEXT_INVLPG_LOCAL, (u32)OWN, 0), 0);
    same("MMUEXT_INVLPG_LOCAL is seen", WORD(OWN), 11);
    point_at(page[0]);
    answer("MMUEXT_TLB_FLUSH_LOCAL", extended(MMUEXT_TLB_FLUSH_LOCAL, 0, 0), 0);
    same("MMUEXT_TLB_FLUSH_LOCAL is seen", WORD(OWN), 10);
    point_at(page[1]);
    answer("MMUEXT_INVLPG_MULTI", extended(MMUEXT_INVLPG_MULTI, (u32)OWN, (u32)&set), 0);
    same("MMUEXT_INVLPG_MULTI is seen", WORD(OWN), 11);
    point_at(page[0]);
    answer("MMUEXT_TLB_FLUSH_ALL", extended(MMUEXT_TLB_FLUSH_ALL, 0, 0), 0);
    same("MMUEXT_TLB_FLUSH_ALL is seen", WORD(OWN), 10);
    point_at(page[1]);
    same("the same CR3 again", write_cr3(read_cr3()), 0);
    same("empties the TLB", WORD(OWN), 11);
    answer("set that cannot be read", extended(MMUEXT_TLB_FLUSH_MULTI, 0, 0x1000), -EFAULT);
    point_at(page[0]);
    extended(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
}

/* A second space: the kernel's range only, and another page at OWN. */
static entry *second_space(void)
{
    entry *second_leaves = (entry *)tables[4], *second_root = (entry *)tables[5];
    second_leaves[0] = page_entry(page[1], LEAF);
#if PAE
    entry *second_branches = (entry *)tables[6], *second_top = (entry *)tables[7];
    u32 guests = HYPERVISOR_START >> 21 & 511;
    for (u32 n = 0; n < guests; n++)
        second_top[n] = top[n];
    second_branches[0] = page_entry(second_leaves, TABLE);
    second_root[2] = page_entry(second_branches, PRESENT);
    second_root[3] = page_entry(second_top, PRESENT);
    read_only(second_branches);
    read_only(second_top);
#else
    for (u32 n = (u32)virt_base >> 22; n < HYPERVISOR_START >> 22; n++)
        second_root[n] = root[n];
    second_root[(u32)OWN >> 22] = page_entry(second_leaves, TABLE);
#endif
    read_only(second_leaves);
    read_only(second_root);
    return second_root;
}

static void check_moves_to_cr3(void)
{
    entry *second = second_space(), *first = new_root;
    same("move to CR3 of tables that are not pinned", write_cr3(cr3_of(second)), 0);
    same("CR3 is the second space's", read_cr3(), cr3_of(second));
    same("page of the second space", WORD(OWN), 11);
    same("move back to CR3", write_cr3(cr3_of(first)), 0);
    same("page of the first space", WORD(OWN), 10);
    answer("the second root, not pinned, is a page again", writable(second), 0);
    second[0] = 0;
    answer("the second root to read", read_only(second), 0);
    same("move to CR3 of it", write_cr3(cr3_of(second)), 0);
    same("page of the second space again", WORD(OWN), 11);
    answer("back by the hypercall", extended(MMUEXT_NEW_BASEPTR, mfn_of(first), 0), 0);
    same("move to CR3 of a page of data", write_cr3(cr3_of(page[0])), FAULT(13, 0, 0));
    same("move to CR3 of somebody else's", write_cr3(not_mine() << 12), FAULT(13, 0, 0));
    same("move to CR3 of an l1 table", write_cr3(cr3_of(leaves)), FAULT(13, 0, 0));
    same("CR3 is as before", read_cr3(), cr3_of(first));
    same("page as before", WORD(OWN), 10);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    traps_start();
    check_pinning();
    check_new_space();
    check_flushes();
    check_moves_to_cr3();
    memory_end();
}
