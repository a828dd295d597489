/*
 * Looks at everything that a domain is promised to find at its start (xen.h, "Start-of-day memory layout"), and says
 * what it found: a line for each broken promise, then a verdict.
 *
 * The command line tells it what it cannot know otherwise: pages=N for its memory, and "initial" for the initial domain.
 */
#include "kernel.h"

#if PAE
typedef u64 entry;
enum { LEVELS = 3 };
static const u32 shift[] = {12, 21, 30}, count[] = {512, 512, 4};
#define MAGIC "xen-3.0-x86_32p"
#define HYPERVISOR_START 0xf5800000u
#define FRAME(e) ((u32)((e) >> 12 & 0xffffff))
#else
typedef u32 entry;
enum { LEVELS = 2 };
static const u32 shift[] = {12, 22}, count[] = {1024, 1024};
#define MAGIC "xen-3.0-x86_32"
#define HYPERVISOR_START 0xfc000000u
#define FRAME(e) ((e) >> 12)
#endif

enum { PRESENT = 1, RW = 2, USER = 4, ACCESSED = 0x20, DIRTY = 0x40 };
#define NX (1ull << 63)

extern struct {
    u32 eax, ebx, ecx, edx, esi, edi, ebp, esp, cs, ss, ds, es, fs, gs, eflags;
} at_start;

static const struct start_info *info;
static const u32 *mfns;
static u32 broken, base;
static u32 zeros[1024], data[4] = {1, 2, 3, 4};
/* One bit for each machine frame. */
static u8 mine[1 << 17];
static u8 visited[256];

static void expect(const char *what, u64 found, u64 wanted)
{
    if (found == wanted)
        return;
    broken++;
    print("BROKEN ");
    print(what);
    print(": expected ");
    print_hex(wanted);
    print(", found ");
    print_hex(found);
    print("\n");
}

static u32 page_up(u32 address)
{
    return (address + PAGE - 1) & -PAGE;
}

static int starts_with(const char *text, const char *beginning)
{
    while (*beginning)
        if (*text++ != *beginning++)
            return 0;
    return 1;
}

/* The text behind the first "name" in the command line, 0 if it is not there. */
static const char *option(const char *name)
{
    for (const char *text = info->cmd_line; *text; text++)
        if (starts_with(text, name))
            return text + length_of(name);
    return 0;
}

static u32 number(const char *text)
{
    u32 value = 0;
    while (text && *text >= '0' && *text <= '9')
        value = 10 * value + (*text++ - '0');
    return value;
}

static u32 owns(u32 mfn)
{
    return mfn >> 20 ? 0 : mine[mfn >> 3] >> (mfn & 7) & 1;
}

static void check_frames(void)
{
    u32 twice = 0;
    for (u32 pfn = 0; pfn < info->nr_pages; pfn++) {
        twice += owns(mfns[pfn]) || mfns[pfn] >> 20;
        mine[mfns[pfn] >> 3 & 0x1ffff] |= 1 << (mfns[pfn] & 7);
    }
    expect("frames that are listed twice", twice, 0);
    expect("shared_info is at the start of a page", info->shared_info % PAGE, 0);
    expect("shared_info is there", info->shared_info != 0, 1);
    expect("shared_info is one of the frames listed", owns(info->shared_info / PAGE), 0);
}

/* A table is looked at where it is mapped: among the nr_pt_frames pages from pt_base on. */
static const entry *table(u32 mfn)
{
    u32 first = (info->pt_base - base) / PAGE;
    for (u32 n = 0; n < info->nr_pt_frames; n++)
        if (mfns[first + n] == mfn) {
            visited[n] = 1;
            return (const entry *)(info->pt_base + n * PAGE);
        }
    return 0;
}

/* The entry that maps an address, 0 if there is none. */
static entry leaf(u32 address)
{
    const entry *at = (const entry *)info->pt_base;
    for (int level = LEVELS - 1; level; level--) {
        entry e = at[address >> shift[level] & (count[level] - 1)];
        if (!(e & PRESENT) || !(at = table(FRAME(e))))
            return 0;
    }
    return at[address >> shift[0] & (count[0] - 1)];
}

static u32 strange_tables, strange_flags, leaves;

static void look_at(const entry *at, int level, u32 address)
{
    for (u32 n = 0; n < count[level]; n++) {
        u32 here = address + (n << shift[level]);
        entry e = at[n];
        if (here >= HYPERVISOR_START)
            return;
        if (!(e & PRESENT))
            continue;
        if (level == 0) {
            leaves++;
            strange_flags += (e & 0xfff & ~(entry)(PRESENT | RW | ACCESSED | DIRTY)) != 0;
            continue;
        }
        entry allowed = level == 2 ? PRESENT : PRESENT | RW | USER | ACCESSED | DIRTY;
        strange_flags += (e & 0xfff & ~allowed) != 0;
        const entry *below = table(FRAME(e));
        if (below)
            look_at(below, level - 1, here);
        else
            strange_tables++;
    }
}

static void check_tables(void)
{
    u32 cr3, unused = 0;
    asm volatile("mov %%cr3, %0" : "=r"(cr3));
    expect("frame in CR3", cr3 >> 12, mfns[(info->pt_base - base) / PAGE]);
    visited[0] = 1;
    look_at((const entry *)info->pt_base, LEVELS - 1, 0);
#if PAE
    expect("slot 3 of the root is present", ((const entry *)info->pt_base)[3] & PRESENT, PRESENT);
    expect("its table is one of the first", table(FRAME(((const entry *)info->pt_base)[3])) != 0, 1);
#endif
    for (u32 n = 0; n < info->nr_pt_frames; n++)
        unused += !visited[n];
    expect("page tables outside pt_base, nr_pt_frames", strange_tables, 0);
    expect("page tables in nr_pt_frames that nothing names", unused, 0);
    expect("entries with unusual flags", strange_flags, 0);
}

static u32 region_end(void)
{
    u32 end = (at_start.esp + PADDING + REGION - 1) & -REGION;
    return (end - base) / PAGE < info->nr_pages ? end : base + info->nr_pages * PAGE;
}

static void check_region(void)
{
    u32 end = region_end(), pages = (end - base) / PAGE, wrong = 0, locked = 0, open = 0;
    u32 first_table = (info->pt_base - base) / PAGE;
    for (u32 pfn = 0; pfn < pages; pfn++) {
        entry e = leaf(base + pfn * PAGE);
        int is_table = pfn - first_table < info->nr_pt_frames;
        wrong += !(e & PRESENT) || FRAME(e) != mfns[pfn];
        locked += !is_table && !(e & RW);
        open += is_table && (e & RW);
    }
    expect("pages of the region that are not mapped, or to another frame", wrong, 0);
    expect("pages of the region that cannot be written", locked, 0);
    expect("page tables that can be written", open, 0);
    expect("pages mapped below the hypervisor", leaves, pages);
    *(volatile u32 *)(end - 4) = 0x12345678;
    expect("the last word of the region", *(volatile u32 *)(end - 4), 0x12345678);
}

/* The elements, in their order, packed, each at the start of a page. */
static void check_order(int initial)
{
    u32 at = page_up((u32)image_end);
    expect("mod_start", info->mod_start, 0);
    expect("mod_len", info->mod_len, 0);
    expect("mfn_list", info->mfn_list, at);
    at = page_up(at + 4 * info->nr_pages);
    expect("start_info", at_start.esi, at);
    at += PAGE;
    if (!initial) {
        expect("store_mfn", info->store_mfn, mfns[(at - base) / PAGE]);
        expect("console mfn", info->console.domU.mfn, mfns[(at + PAGE - base) / PAGE]);
        at += 2 * PAGE;
    }
    expect("pt_base", info->pt_base, at);
    at += info->nr_pt_frames * PAGE;
    expect("stack pointer", at_start.esp, at + PAGE);
}

static void check_info(int initial)
{
    for (u32 n = 0; n < sizeof MAGIC; n++)
        expect("magic", info->magic[n], MAGIC[n]);
    expect("nr_pages", info->nr_pages, number(option("pages=")));
    expect("flags", info->flags, initial ? PRIVILEGED_INITIAL_DOMAIN : 0);
    expect("first_p2m_pfn", info->first_p2m_pfn, 0);
    expect("nr_p2m_frames", info->nr_p2m_frames, 0);
    if (!initial)
        return;
    expect("store_mfn of the initial domain", info->store_mfn, 0);
    expect("console info", info->console.dom0.info_off, sizeof *info);
    expect("size of the console info", info->console.dom0.info_size >= 24, 1);
    expect("screen", *((const u8 *)info + info->console.dom0.info_off), 0);
}

static u32 rights(u32 selector)
{
    u32 found = 0;
    asm("lar %1, %0" : "+r"(found) : "r"(selector) : "cc");
    return found & 0xfe00; /* present, privilege level, class, kind; not whether it was accessed */
}

static u32 limit(u32 selector)
{
    u32 found = 0;
    asm("lsl %1, %0" : "+r"(found) : "r"(selector) : "cc");
    return found;
}

static void check_segments(void)
{
    expect("CS", at_start.cs, 0xe019);
    expect("SS", at_start.ss, 0xe021);
    expect("DS", at_start.ds, 0xe021);
    expect("ES", at_start.es, 0xe021);
    expect("FS", at_start.fs, 0xe021);
    expect("GS", at_start.gs, 0xe021);
    expect("rights of 0xe019", rights(0xe019), 0xba00);
    expect("rights of 0xe021", rights(0xe021), 0xb200);
    expect("rights of 0xe02b", rights(0xe02b), 0xfa00);
    expect("rights of 0xe033", rights(0xe033), 0xf200);
    for (u32 selector = 0xe019; selector <= 0xe033; selector += 8 + 2 * (selector == 0xe021))
        expect("limit below the hypervisor", limit(selector) >= HYPERVISOR_START - 1, 1);
    expect("interrupts are on, direction is up", at_start.eflags & 0x600, 0x200);
}

static void check_image(void)
{
    u32 dirty = 0;
    for (u32 n = 0; n < 1024; n++)
        dirty |= zeros[n];
    expect("memory behind the file is zero", dirty, 0);
    expect("data", data[0] + data[1] + data[2] + data[3], 10);
#ifndef WITHOUT_PAGE
    expect("hypercall page", *(const u8 *)(hypercall_page + 32 * SCHED_OP), 0xb8);
#endif
}

static void check_pages(void)
{
    const u32 *store = (const u32 *)seen_at(info, info->store_mfn, (info->pt_base - base) / PAGE);
    const u32 *console = (const u32 *)seen_at(info, info->console.domU.mfn, (info->pt_base - base) / PAGE);
    u32 dirty = 0;
    for (u32 n = 0; store && n < PAGE / 4; n++)
        dirty |= store[n];
    expect("store page is mapped", store != 0, 1);
    expect("store page is empty", dirty, 0);
    expect("console page is mapped", console != 0, 1);
    for (u32 n = 768; console && n < 772; n++)
        expect("console indices", console[n], 0);
}

void kernel(const struct start_info *start_info)
{
    info = start_info;
    mfns = (const u32 *)info->mfn_list;
    base = (u32)virt_base;
    int initial = option("initial") != 0;
    if (!initial)
        check_pages();
#ifdef BY_RING
    use_ring(info);
#endif
    check_info(initial);
    check_order(initial);
    check_segments();
    check_image();
    check_frames();
    check_tables();
    check_region();
    print("command line: ");
    print(info->cmd_line);
    print(broken ? "\nbroken\n" : "\nall as promised\n");
    shut_down(broken ? CRASHED : POWEROFF);
}
