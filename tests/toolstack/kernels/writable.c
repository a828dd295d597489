/*
 * Writable page tables: with the assist on, a kernel stores to its l1 tables as if they were memory.
 */
#include "traps.h"

PAGES(page, 4);

static volatile entry *place;

static void assist(u32 command)
{
    hypercall(VM_ASSIST, command, VMASST_TYPE_writable_pagetables, 0);
}

static void flush(void)
{
    extended(MMUEXT_INVLPG_LOCAL, (u32)page[0], 0);
}

/* The entry without the marks that the MMU sets by itself. */
static u64 now(void)
{
    return *place & ~(entry)(ACCESSED | DIRTY);
}

static u64 plain(u32 n, u64 flags)
{
    return page_entry(page[n], flags) & ~(entry)(ACCESSED | DIRTY);
}

static void check_assist(void)
{
    same("store without the assist", try_store(place, 0), FAULT(14, 3, place));
    answer("unknown assist", hypercall(VM_ASSIST, VMASST_CMD_enable, 30, 0), -EINVAL);
    answer("unknown command", hypercall(VM_ASSIST, 7, VMASST_TYPE_writable_pagetables, 0), -ENOSYS);
    answer("assist on", hypercall(VM_ASSIST, VMASST_CMD_enable, VMASST_TYPE_writable_pagetables, 0), 0);
}

#if PAE
static void store(u64 e)
{
    /* As kernels do: the upper half first, so that the entry is not present before it is whole. */
    ((volatile u32 *)place)[1] = e >> 32;
    asm volatile("" ::: "memory");
    ((volatile u32 *)place)[0] = e;
}

static void clear(void)
{
    ((volatile u32 *)place)[0] = 0;
    asm volatile("" ::: "memory");
    ((volatile u32 *)place)[1] = 0;
}

static u64 exchange(u64 old, u64 e)
{
    asm volatile("lock cmpxchg8b %[place]"
                 : "+A"(old), [place] "+m"(*place)
                 : "b"((u32)e), "c"((u32)(e >> 32))
                 : "memory", "cc");
    return old;
}
#else
static void store(u64 e)
{
    *place = e;
}

static void clear(void)
{
    *place = 0;
}

static u64 exchange(u64 old, u64 e)
{
    u32 found = old;
    asm volatile("lock cmpxchgl %[e], %[place]"
                 : "+a"(found), [place] "+m"(*place)
                 : [e] "r"((u32)e)
                 : "memory", "cc");
    return found;
}
#endif

static void check_stores(void)
{
    for (u32 n = 0; n < 4; n++)
        WORD(page[n]) = n;
    clear();
    same("entry is cleared", *place, 0);
    flush();
    same("page is gone", try_load(page[0]), FAULT(14, 0, page[0]));
    store(plain(1, PRESENT | RW));
    same("entry is stored", now(), plain(1, PRESENT | RW));
    same("no fault was seen", fault.count, 1);
    same("another page is there", WORD(page[0]), 1);
    store(plain(2, PRESENT | RW));
    flush();
    same("entry is stored over", WORD(page[0]), 2);
    store(plain(2, PRESENT));
    flush();
    same("page is to read", try_store(page[0], 0), FAULT(14, 3, page[0]));
    store(0xffffff8eull << 12 | 0xffe);
    same("anything that is not present", *place, (entry)(0xffffff8eull << 12 | 0xffe));
    clear();
    store(page_entry(page[0], LEAF));
    flush();
    same("page is back", WORD(page[0]), 0);
}

static void check_halves(void)
{
#if PAE
    volatile u32 *half = (volatile u32 *)place;
    u64 e = plain(1, PRESENT | RW) | NX;
    clear();
    half[0] = e;
    half[1] = e >> 32;
    same("lower half first", now(), e);
    half[1] = 0;
    half[0] = 0;
    same("upper half is cleared first", *place, 0);
    store(e);
    /* A frame number with more than 32 bits of address, which is none: its lower half is still to come. */
    half[1] = 0xf;
    same("upper half that names no frame", *place & PRESENT, 0);
    half[1] = e >> 32;
    half[0] = e;
    same("after both halves", now(), e);
#endif
}

static void check_words(void)
{
    u32 old = page_entry(page[3], LEAF);
    store(page_entry(page[2], LEAF));
    asm volatile("xchgl %[e], %[place]" : [e] "+r"(old), [place] "+m"(*(volatile u32 *)place) : : "memory");
    same("xchg gives the old entry", old, (u32)page_entry(page[2], LEAF));
    flush();
    same("xchg stores the new one", WORD(page[0]), 3);
    same("compare and exchange, another is there", exchange(page_entry(page[1], LEAF), 0), *place);
    same("nothing is stored", FRAME(*place), mfn_of(page[3]));
    u64 found = *place;
    same("compare and exchange, the same is there", exchange(found, page_entry(page[1], LEAF)), found);
    flush();
    same("the new one is stored", WORD(page[0]), 1);
    asm volatile("lock andl %[mask], %[place]"
                 : [place] "+m"(*(volatile u32 *)place) : [mask] "r"(~RW) : "memory", "cc");
    flush();
    same("write permission taken by lock and", try_store(page[0], 5), FAULT(14, 3, page[0]));
    asm volatile("lock orl %[mask], %[place]" : [place] "+m"(*(volatile u32 *)place) : [mask] "r"(RW) : "memory", "cc");
    flush();
    same("and given by lock or", try_store(page[0], 1), 0);
    asm volatile("lock btrl $6, %[place]" : [place] "+m"(*(volatile u32 *)place) : : "memory", "cc");
    same("dirty bit cleared by lock btr", *place & DIRTY, 0);
    asm volatile("lock btsl $6, %[place]" : [place] "+m"(*(volatile u32 *)place) : : "memory", "cc");
    same("and set by lock bts", *place & DIRTY, DIRTY);
    asm volatile("andb %[mask], %[place]"
                 : [place] "+m"(*(volatile u8 *)place) : [mask] "q"((u8)~ACCESSED) : "memory", "cc");
    same("accessed bit cleared by a store of a byte", *place & ACCESSED, 0);
    same("nothing else has changed", now(), plain(1, PRESENT | RW));
    store(page_entry(page[0], LEAF));
    flush();
}

static void check_several(void)
{
    for (u32 n = 0; n < 4; n++)
        place[n] = page_entry(page[3 - n], LEAF);
    extended(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
    u32 seen = 0;
    for (u32 n = 0; n < 4; n++)
        seen = seen << 4 | WORD(page[n]);
    same("four pages the other way round", seen, 0x3210);
    asm volatile("cld\n rep stosl" : : "D"(place), "a"(0), "c"(4 * sizeof(entry) / 4) : "memory");
    seen = 0;
    for (u32 n = 0; n < 4; n++)
        seen |= place[n] != 0;
    same("four entries cleared by one instruction", seen, 0);
    for (u32 n = 0; n < 4; n++)
        place[n] = page_entry(page[n], LEAF);
    extended(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
}

static void check_refused(void)
{
    u32 table = mfn_of((void *)place);
    same("entry that lets a table be written", try_store(place, entry_of(table, LEAF)), FAULT(14, 3, place));
    same("entry with somebody else's frame", try_store(place, entry_of(not_mine(), LEAF)), FAULT(14, 3, place));
    same("superpage", try_store(place, page_entry(page[0], LEAF | PSE)), FAULT(14, 3, place));
    same("entry is as before", now(), plain(0, PRESENT | RW));
    same("page is as before", WORD(page[0]), 0);
    same("table to read", try_store(place, entry_of(table, READ_ONLY)), 0);
    same("table is read", ((volatile entry *)page[0])[(u32)page[0] >> 12 & (count[0] - 1)], *place);
    store(page_entry(page[0], LEAF));
    flush();
    same("store to the root table", try_store((void *)root, 0), FAULT(14, 3, root));
#if PAE
    const void *branch = seen_at(info, FRAME(root[3]), info->nr_pages);
    same("store to the table above", try_store((void *)branch, 0), FAULT(14, 3, branch));
#endif
    assist(VMASST_CMD_disable);
    same("store with the assist off again", try_store(place, 0), FAULT(14, 3, place));
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    traps_start();
    place = place_of(page[0]);
    check_assist();
    check_stores();
    check_halves();
    check_words();
    check_several();
    check_refused();
    memory_end();
}
