/*
 * Descriptor tables: a GDT and an LDT of the kernel's own, segments loaded from them, and what may stand in them.
 */
#include "traps.h"

PAGES(gdt, 2);
PAGES(ldt, 2);
PAGES(page, 1);

/* Selectors of the first entries, for ring 1. */
#define IN_GDT(n) ((n) << 3 | 1)
#define IN_LDT(n) ((n) << 3 | 5)
enum { DATA = 0x92, CODE = 0x9a, FOR_RING_1 = 0x20, FOR_RING_3 = 0x60 };
#define SMALL 4u /* flags: 32 bits, limit in bytes */

static u64 descriptor(u32 at, u32 limit, u32 access, u32 flags)
{
    return (limit & 0xffff) | (u64)(at & 0xffffff) << 16 | (u64)access << 40 | (u64)(limit >> 16 & 15) << 48
           | (u64)flags << 52 | (u64)(at >> 24) << 56;
}

static u64 data_at(const volatile void *at)
{
    return descriptor((u32)at, PAGE - 1, DATA | FOR_RING_1, SMALL);
}

static u32 read_fs(void)
{
    u32 value;
    asm volatile("movl %%fs:0, %0" : "=r"(value));
    return value;
}

static u64 load_fs(u32 selector)
{
    return GUARDED("movw %w[selector], %%fs", : [resume] "=m"(resume) : [selector] "r"(selector) : "memory");
}

static u32 privilege_of(u64 found)
{
    return found >> 45 & 3;
}

static long set_gdt(const u32 *list, u32 entries)
{
    return hypercall(SET_GDT, (long)list, entries, 0);
}

static long update_descriptor(u64 at, u64 value)
{
    return hypercall5(UPDATE_DESCRIPTOR, (u32)at, at >> 32, (u32)value, value >> 32, 0);
}

static long read_only(const volatile void *at)
{
    return map(at, page_entry(at, READ_ONLY), UVMF_INVLPG);
}

static long writable(const volatile void *at)
{
    return map(at, page_entry(at, LEAF), UVMF_INVLPG);
}

static void check_set_gdt(void)
{
    u64 *table = (u64 *)gdt[0];
    u32 list[2] = {mfn_of(gdt[0]), mfn_of(gdt[1])}, bad[2] = {mfn_of(gdt[0]), not_mine()};
    table[1] = data_at(page);
    table[2] = descriptor((u32)page, PAGE - 1, DATA, SMALL);
    table[3] = descriptor(0, 0xfffff, CODE | FOR_RING_1, 12);
    table[4] = descriptor((u32)page, PAGE - 1, (DATA | FOR_RING_1) & ~0x80, SMALL);
    WORD(page) = 0x600d;
    answer("set_gdt of a page that can be written", set_gdt(list, 512), -EINVAL);
    answer("first page to read", read_only(gdt[0]), 0);
    answer("second page to read", read_only(gdt[1]), 0);
    answer("set_gdt with somebody else's frame", set_gdt(bad, 1024), -EINVAL);
    answer("first page is a page still", writable(gdt[0]), 0);
    read_only(gdt[0]);
    answer("set_gdt of too many entries", set_gdt(list, 14 * 512 + 1), -EINVAL);
    answer("set_gdt of a list that cannot be read", set_gdt((u32 *)0x1000, 512), -EFAULT);
    answer("set_gdt", set_gdt(list, 1024), 0);
    same("segment of its own", load_fs(IN_GDT(1)), 0);
    same("shows what is at its base", read_fs(), 0x600d);
    same("a descriptor for ring 0 is for ring 1", privilege_of(table[2]), 1);
    same("and can be loaded", load_fs(IN_GDT(2)), 0);
    same("another one is as it was", privilege_of(table[1]), 1);
    same("segment that is not present", load_fs(IN_GDT(4)), FAULT(11, IN_GDT(4) & ~3, 0));
    same("empty descriptor", load_fs(IN_GDT(9)), FAULT(13, IN_GDT(9) & ~3, 0));
    same("descriptor behind the table", load_fs(IN_GDT(3000)), FAULT(13, IN_GDT(3000) & ~3, 0));
    same("the flat segments are there", load_fs(FLAT_RING1_DS), 0);
    answer("table in use to write", writable(gdt[0]), -EBUSY);
    same("store to the table", try_store(gdt[0] + 8, 0), FAULT(14, 3, gdt[0] + 8));
    answer("table in use as page table", extended(MMUEXT_PIN_L1_TABLE, mfn_of(gdt[0]), 0), -EINVAL);
}

static void check_code_segment(void)
{
    u32 cs, back;
    asm volatile("movl %%cs, %[back]\n pushl %[mine]\n pushl $1f\n lretl\n"
                 "1: movl %%cs, %[cs]\n pushl %[back]\n pushl $2f\n lretl\n2:"
                 : [cs] "=&r"(cs), [back] "=&r"(back)
                 : [mine] "i"(IN_GDT(3))
                 : "memory");
    same("code runs in a segment of its own", cs & 0xffff, IN_GDT(3));
    same("and comes back", back & 0xffff, FLAT_RING1_CS);
}

static void check_update_descriptor(void)
{
    u64 at = machine_of(gdt[0] + 8 * 5), *table = (u64 *)gdt[0];
    static const u8 system[] = {0x81, 0x82, 0x83, 0x85, 0x86, 0x87, 0x89, 0x8b, 0x8e, 0x8f};
    answer("update_descriptor", update_descriptor(at, data_at(page + 0) + (8u << 16)), 0);
    WORD(page[0] + 8) = 0x88;
    same("new segment", load_fs(IN_GDT(5)), 0);
    same("shows what is at its new base", read_fs(), 0x88);
    answer("update_descriptor for ring 0", update_descriptor(at, descriptor((u32)page, 99, DATA, SMALL)), 0);
    same("stands there for ring 1", privilege_of(table[5]), 1);
    answer("update_descriptor for ring 3",
           update_descriptor(at, descriptor((u32)page, 99, DATA | FOR_RING_3, SMALL)), 0);
    same("stands there for ring 3", privilege_of(table[5]), 3);
    u64 before = table[5];
    u32 wrong = 0;
    for (u32 n = 0; n < sizeof system; n++)
        wrong += update_descriptor(at, descriptor((u32)page, 99, system[n] | FOR_RING_1, 0)) != -EINVAL;
    same("system descriptors are refused", wrong, 0);
#if PAE
    answer("long code is refused", update_descriptor(at, descriptor(0, 0xfffff, CODE | FOR_RING_1, 10)), -EINVAL);
#endif
    same("after all refusals it is as before", table[5], before);
    answer("anything that is not present", update_descriptor(at, descriptor(0, 99, 0x0e, 0)), 0);
    answer("no descriptor at all", update_descriptor(at, 0), 0);
    same("stands there", table[5], 0);
    answer("update_descriptor between two", update_descriptor(at + 4, 0), -EINVAL);
    answer("update_descriptor of somebody else's", update_descriptor((u64)not_mine() * PAGE, 0), -EINVAL);
    answer("update_descriptor of a page table", update_descriptor(machine_of(root), 0), -EINVAL);
    answer("update_descriptor in a page of data", update_descriptor(machine_of(page[0] + 16), data_at(page)), 0);
    same("is stored", WORD(page[0] + 16), (u32)data_at(page));
}

static void check_ldt(void)
{
    u64 *table = (u64 *)ldt[0];
    table[1] = data_at(page);
    *(u64 *)ldt[1] = data_at(page[0] + 4);
    WORD(page) = 0x111, WORD(page[0] + 4) = 0x222;
    answer("MMUEXT_SET_LDT", extended(MMUEXT_SET_LDT, (u32)ldt, 1024), 0);
    same("page that can be written is none of the LDT", load_fs(IN_LDT(1)), FAULT(14, 0, ldt[0] + 8));
    answer("first page of the LDT to read", read_only(ldt[0]), 0);
    same("segment from the LDT", load_fs(IN_LDT(1)), 0);
    same("shows what is there", read_fs(), 0x111);
    answer("page of the LDT to write", writable(ldt[0]), -EBUSY);
    answer("page not looked at yet to write", writable(ldt[1]), 0);
    answer("second page of the LDT to read", read_only(ldt[1]), 0);
    same("segment from its second page", load_fs(IN_LDT(512)), 0);
    same("shows what is there too", read_fs(), 0x222);
    same("empty descriptor of the LDT", load_fs(IN_LDT(7)), FAULT(13, IN_LDT(7) & ~3, 0));
    same("descriptor behind the LDT", load_fs(IN_LDT(1024)), FAULT(13, IN_LDT(1024) & ~3, 0));
    answer("descriptor of the LDT changed", update_descriptor(machine_of(ldt[0] + 8), data_at(page[0] + 4)), 0);
    same("segment from the LDT again", load_fs(IN_LDT(1)), 0);
    same("shows the change", read_fs(), 0x222);
    answer("LDT between two pages", extended(MMUEXT_SET_LDT, (u32)ldt + 8, 10), -EINVAL);
    answer("LDT of too many entries", extended(MMUEXT_SET_LDT, (u32)ldt, 8193), -EINVAL);
    answer("a shorter LDT", extended(MMUEXT_SET_LDT, (u32)ldt, 512), 0);
    answer("its second page to write", writable(ldt[1]), 0);
    same("segment from the shorter LDT", load_fs(IN_LDT(1)), 0);
    same("descriptor behind the shorter LDT", load_fs(IN_LDT(512)), FAULT(13, IN_LDT(512) & ~3, 0));
    load_fs(FLAT_RING1_DS);
    answer("no LDT", extended(MMUEXT_SET_LDT, 0, 0), 0);
    same("segment from no LDT", load_fs(IN_LDT(1)), FAULT(13, IN_LDT(1) & ~3, 0));
    answer("page of no LDT to write", writable(ldt[0]), 0);
}

static void check_no_gdt(void)
{
    load_fs(FLAT_RING1_DS);
    answer("set_gdt of nothing", set_gdt(0, 0), 0);
    same("segment from nothing", load_fs(IN_GDT(1)), FAULT(13, IN_GDT(1) & ~3, 0));
    answer("old GDT to write", writable(gdt[0]), 0);
    same("is a page", try_store(gdt[0], 0), 0);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    traps_start();
    check_set_gdt();
    check_code_segment();
    check_update_descriptor();
    check_ldt();
    check_no_gdt();
    memory_end();
}
