/*
 * Faults: what a kernel's handlers are told, guard pages, pages to read only, pages made on demand, and ring 3.
 */
#include "traps.h"

PAGES(page, 4);
PAGES(demand, 16);
PAGES(user_code, 1);
PAGES(user_stack, 1);
PAGES(code, 1);

#define FETCH (PAE ? 0x10 : 0)

static void check_kernel_faults(void)
{
    u32 table = mfn_of((void *)place_of(page[0]));
    same("load from page 0", try_load((void *)0), FAULT(14, 0, 0));
    same("load from nowhere", try_load((void *)0x10000004), FAULT(14, 0, 0x10000004));
    same("store to nowhere", try_store((void *)0x10000008, 1), FAULT(14, 2, 0x10000008));
    same("call of nowhere", try_call((void *)0x10000010), FAULT(14, FETCH, 0x10000010));
    same("page is there", try_load(page[0]), 0);
    answer("page unmapped", map(page[0], 0, UVMF_INVLPG), 0);
    same("load from a guard page", try_load(page[0] + 8), FAULT(14, 0, page[0] + 8));
    same("store to a guard page", try_store(page[0] + 12, 1), FAULT(14, 2, page[0] + 12));
    same("load from its neighbour", try_load(page[1]), 0);
    same("load across the end of its neighbour", try_load(page[0] - 2), FAULT(14, 0, page[0]));
    answer("page mapped to read", map(page[0], page_entry(page[0], READ_ONLY), UVMF_INVLPG), 0);
    same("load from a page to read", try_load(page[0]), 0);
    same("store to a page to read", try_store(page[0] + 16, 1), FAULT(14, 3, page[0] + 16));
    answer("page mapped to write", map(page[0], page_entry(page[0], LEAF), UVMF_INVLPG), 0);
    same("store to a page to write", try_store(page[0] + 16, 0x77), 0);
    same("the store is seen", WORD(page[0] + 16), 0x77);
    answer("page table mapped to read", map(page[0], entry_of(table, READ_ONLY), UVMF_INVLPG), 0);
    same("store to a page table", try_store(page[0], 0), FAULT(14, 3, page[0]));
    answer("page back", map(page[0], page_entry(page[0], LEAF), UVMF_INVLPG), 0);
    same("store to the machine-to-physical list", try_store((void *)(M2P + mfn_of(page[0])), 0),
         FAULT(14, 3, M2P + mfn_of(page[0])));
    code[0][0] = 0xc3;
    same("call of a page", try_call(code), 0);
#if PAE
    answer("page mapped not to execute", map(code, page_entry(code, LEAF | NX), UVMF_INVLPG), 0);
    same("load from a page not to execute", try_load(code), 0);
    same("call of a page not to execute", try_call(code), FAULT(14, 0x11, code));
    answer("page mapped to execute again", map(code, page_entry(code, LEAF), UVMF_INVLPG), 0);
    same("call of a page again", try_call(code), 0);
#endif
    same("undefined instruction", GUARDED("ud2", : [resume] "=m"(resume) : : "memory"), FAULT(6, 0, 0));
    same("privileged instruction", GUARDED("hlt", : [resume] "=m"(resume) : : "memory"), FAULT(13, 0, 0));
}

static int give_page(struct frame *frame)
{
    u32 address = fault.address & -PAGE;
    if (frame->vector != 14 || address - (u32)demand >= sizeof demand)
        return 0;
    return map((void *)address, page_entry((void *)address, LEAF), UVMF_INVLPG) == 0;
}

static void check_demand_paging(void)
{
    u32 sum = 0;
    for (u32 n = 0; n < 16; n++) {
        WORD(demand[n]) = n;
        map(demand[n], 0, UVMF_INVLPG);
    }
    mend = give_page;
    fault.count = 0;
    for (u32 n = 0; n < 16; n++)
        sum += WORD(demand[15 - n]);
    same("pages on demand hold what they held", sum, 120);
    same("a fault for each", fault.count, 16);
    for (u32 n = 0; n < 16; n++)
        sum += WORD(demand[n])++;
    same("no fault any more", fault.count, 16);
    for (u32 n = 0; n < 16; n++)
        map(demand[n], 0, UVMF_INVLPG);
    asm volatile("cld\n rep stosl" : : "D"(demand), "c"(sizeof demand / 4), "a"(5) : "memory");
    same("a fault for each page of a long store", fault.count, 32);
    same("the long store", WORD(demand[15] + PAGE - 4), 5);
    mend = 0;
}

extern char user_load[], user_store[], user_end[], user_call[], user_call_end[], user_hypercall[], user_hypercall_end[];
asm(".pushsection .rodata\n"
    "user_load: movl $0xe033, %ecx\n movl %ecx, %ds\n popl %eax\n movl (%eax), %eax\n int $0x80\n"
    "user_store: movl $0xe033, %ecx\n movl %ecx, %ds\n popl %eax\n movl $0x57, (%eax)\n int $0x80\n"
    "user_end:\n"
    "user_call: popl %eax\n call *%eax\n int $0x80\n"
    "user_call_end:\n"
    "user_hypercall: movl $17, %eax\n xorl %ebx, %ebx\n int $0x82\n"
    "user_hypercall_end:\n"
    ".popsection");

/* Run code in ring 3, with an address on its stack, until it faults or comes back by int $0x80. */
static u64 user_access(const char *text, const char *end, const void *address)
{
    for (u32 n = 0; n < (u32)(end - text); n++)
        user_code[0][n] = text[n];
    *(volatile u32 *)(user_stack[0] + PAGE - 4) = (u32)address;
    fault.count = 0;
    enter_user((u32)user_code, (u32)(user_stack[0] + PAGE - 4));
    return FAULT(fault.vector, fault.error, fault.address);
}

#define COME_BACK FAULT(128, 0, 0)

static void check_ring_3(void)
{
    u32 table = mfn_of((void *)place_of(page[0]));
    same("ring 3 without pages", user_access(user_hypercall, user_hypercall_end, 0), FAULT(14, 5 | FETCH, user_code));
    map(user_code, page_entry(user_code, LEAF | USER), UVMF_INVLPG);
    map(page[0], page_entry(page[0], LEAF | USER), UVMF_INVLPG);
    same("ring 3 without a stack", user_access(user_load, user_store, page[0]), FAULT(14, 5, user_stack[0] + PAGE - 4));
    map(user_stack, page_entry(user_stack, LEAF | USER), UVMF_INVLPG);
    WORD(page[0]) = 0x1234;
    same("ring 3 loads from its page", user_access(user_load, user_store, page[0]), COME_BACK);
    same("and finds what the kernel has stored", fault.eax, 0x1234);
    same("ring 3 stores to its page", user_access(user_store, user_end, page[0]), COME_BACK);
    same("and the kernel finds it", WORD(page[0]), 0x57);
    same("ring 3 loads from the kernel's page", user_access(user_load, user_store, page[1]), FAULT(14, 5, page[1]));
    same("ring 3 stores to the kernel's page", user_access(user_store, user_end, page[1]), FAULT(14, 7, page[1]));
    same("ring 3 loads from nowhere", user_access(user_load, user_store, (void *)0x10000000), FAULT(14, 4, 0x10000000));
    same("ring 3 stores to nowhere", user_access(user_store, user_end, (void *)0x10000000), FAULT(14, 6, 0x10000000));
    same("ring 3 calls the kernel", user_access(user_call, user_call_end, code), FAULT(14, 5 | FETCH, code));
    map(page[0], page_entry(page[0], READ_ONLY | USER), UVMF_INVLPG);
    same("ring 3 loads from a page to read", user_access(user_load, user_store, page[0]), COME_BACK);
    same("ring 3 stores to a page to read", user_access(user_store, user_end, page[0]), FAULT(14, 7, page[0]));
    map(page[0], entry_of(table, READ_ONLY | USER), UVMF_INVLPG);
    same("ring 3 reads a page table that it is shown", user_access(user_load, user_store, page[0]), COME_BACK);
    same("ring 3 stores to it", user_access(user_store, user_end, page[0]), FAULT(14, 7, page[0]));
    map(page[0], page_entry(page[0], LEAF), UVMF_INVLPG);
    same("user bit taken away", user_access(user_load, user_store, page[0]), FAULT(14, 5, page[0]));
    same("hypercall from ring 3", user_access(user_hypercall, user_hypercall_end, 0), FAULT(13, 0x82 * 8 + 2, 0));
    same("the kernel goes on", try_load(page[0]), 0);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    traps_start();
    check_kernel_faults();
    check_demand_paging();
    check_ring_3();
    memory_end();
}
