/*
 * A kernel that starts as test frameworks for Xen do: it asks the hypervisor's CPUID before it has a handler, runs with the
 * applications' data segments, unmaps page 0, opens every page to its applications, and prints each line on both
 * consoles, waiting until the tools have read their one.
 */
#include "services.h"

PAGES(user_stack, 1);
static volatile struct xencons_interface *console;

/* Both consoles; to the tools' one as far as there is room, then again. */
static void say(const char *text)
{
    u32 left = length_of(text), port = info->console.domU.evtchn;
    hypercall(CONSOLE_IO, CONSOLEIO_WRITE, left, (long)text);
    while (left) {
        for (; left && console->out_prod - console->out_cons < sizeof console->out; left--)
            console->out[console->out_prod++ % sizeof console->out] = *text++;
        failed += hypercall(32, 4, (long)&port, 0) != 0;
        while (console->out_cons != console->out_prod)
            hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
    }
}

static void open_all_pages(void)
{
    for (u32 address = PAGE; address < HYPERVISOR_START; address += PAGE) {
        volatile entry *place = place_of((void *)address);
        if (!place) {
            address |= (1u << shift[1]) - PAGE;
            continue;
        }
        if ((*place & PRESENT) && !(*place & USER) && map((void *)address, *place | USER, UVMF_INVLPG))
            failed++;
    }
}

void in_user(void);
asm("in_user: int $0x80\n ud2\n");

void kernel(const struct start_info *start_info)
{
    u32 leaf = XEN_CPUID_FIRST_LEAF, b, c = 0, d;
    asm volatile(".byte 0x0f, 0x0b\n .ascii \"xen\"\n cpuid" : "+a"(leaf), "=b"(b), "+c"(c), "=d"(d));
    memory_start(start_info);
    traps_start();
    asm volatile("movl %0, %%ds\n movl %0, %%es\n movl %0, %%fs\n movl %0, %%gs" : : "r"(FLAT_RING3_DS));
    console = (void *)seen_at(info, info->console.domU.mfn, info->nr_pages);
    say("--- a kernel that starts like a test framework ---\n");
    failed += b != 0x566e6558;
    failed += map(0, 0, UVMF_INVLPG) != 0;
    failed += try_load((void *)0) != FAULT(14, 0, 0);
    open_all_pages();
    fault.count = 0;
    enter_user((u32)in_user, (u32)(user_stack + 1));
    failed += fault.vector != 128;
    failed += GUARDED(".byte 0x0f, 0x0b\n .ascii \"xen\"\n movl $1, %%eax", : [resume] "=m"(resume) : : "eax", "memory")
        != FAULT(6, 0, 0);
    say(failed ? "Test result: FAILURE\n" : "Test result: SUCCESS\n");
    shut_down(POWEROFF);
}
