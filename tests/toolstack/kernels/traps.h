/*
 * Exceptions: a table of handlers, loads and stores that may fault, and a way into ring 3 and back.
 *
 * Kernels that include this have one shared_info, mapped by traps_start, for the address of a page fault.
 */
#ifndef TRAPS_H
#define TRAPS_H

#include "memory.h"

struct frame {
    u32 es, ds, edi, esi, ebp, unused, ebx, edx, ecx, eax, vector, error, eip, cs, eflags;
    u32 esp, ss; /* only if the ring changed */
};

PAGES(shared_page, 1);
PAGES(trap_stack, 1);
static volatile struct { u32 vector, error, address, count, eax, eip, eflags; } fault;
/* Where to go on after the next fault; 0 if none is expected. */
static volatile u32 resume;
/* Asked first; answers whether the fault is mended. */
static int (*volatile mend)(struct frame *);
extern char trap_1[], trap_6[], trap_11[], trap_12[], trap_13[], trap_14[], trap_128[];
void trap(struct frame *frame);
void enter_user(u32 eip, u32 esp);
u32 kernel_esp_saved;
/* What enter_user returns to ring 3 with. */
u32 user_flags = 0x202;

asm(".macro trap_entry vector, error=0\n"
    "trap_\\vector:\n"
    "  .if !\\error\n pushl $0\n .endif\n"
    "  pushl $\\vector\n"
    "  jmp trap_common\n"
    ".endm\n"
    ".text\n"
    "trap_entry 1\n trap_entry 6\n trap_entry 11, 1\n trap_entry 12, 1\n trap_entry 13, 1\n trap_entry 14, 1\n trap_entry 128\n"
    "trap_common:\n"
    "  pushal\n pushl %ds\n pushl %es\n"
    "  movl $0xe021, %eax\n movl %eax, %ds\n movl %eax, %es\n"
    "  pushl %esp\n call trap\n addl $4, %esp\n"
    "  popl %es\n popl %ds\n popal\n addl $8, %esp\n"
    "  jmp hypercall_page + 32 * 23\n"
    /* enter_user(eip, esp): to ring 3; trap() comes back to its caller from there. */
    "enter_user:\n"
    "  movl 4(%esp), %eax\n movl 8(%esp), %ecx\n"
    "  pushal\n movl %esp, kernel_esp_saved\n"
    "  pushl $0xe033\n pushl %ecx\n pushl user_flags\n pushl $0xe02b\n pushl %eax\n"
    "  jmp hypercall_page + 32 * 23\n"
    "back_to_kernel:\n"
    "  movl kernel_esp_saved, %esp\n popal\n ret\n");

static struct trap_info trap_table[] = {
    {1, 0, FLAT_RING1_CS, (u32)trap_1},   {6, 0, FLAT_RING1_CS, (u32)trap_6},   {11, 0, FLAT_RING1_CS, (u32)trap_11},
    {12, 0, FLAT_RING1_CS, (u32)trap_12}, {13, 0, FLAT_RING1_CS, (u32)trap_13}, {14, 0, FLAT_RING1_CS, (u32)trap_14}, {128, 3, FLAT_RING1_CS, (u32)trap_128},
    {0, 0, 0, 0},
};

static inline const struct shared_info *shared_info(void)
{
    return (const struct shared_info *)shared_page;
}

void trap(struct frame *frame)
{
    fault.vector = frame->vector;
    fault.error = frame->error;
    fault.address = frame->vector == 14 ? ((const volatile struct shared_info *)shared_page)->vcpu_info[0].cr2 : 0;
    fault.eax = frame->eax;
    fault.eip = frame->eip;
    fault.eflags = frame->eflags;
    fault.count++;
    if (mend && mend(frame))
        return;
    if ((frame->cs & 3) == 3)
        asm volatile("jmp back_to_kernel");
    if (!resume) {
        print("FAIL unexpected exception ");
        print_hex(frame->vector);
        print(" error ");
        print_hex(frame->error);
        print(" at ");
        print_hex(frame->eip);
        print(" address ");
        print_hex(fault.address);
        print("\n");
        shut_down(CRASHED);
    }
    frame->eip = resume;
    resume = 0;
}

static inline void traps_start(void)
{
    map(shared_page, entry_of(info->shared_info / PAGE, LEAF), UVMF_INVLPG);
    hypercall(SET_TRAP_TABLE, (long)trap_table, 0, 0);
    hypercall(STACK_SWITCH, FLAT_RING1_DS, (long)(trap_stack + 1), 0);
}

/* Vector, error code and address of a fault as one number, 0 for none. */
#define FAULT(vector, error, address) ((u64)(vector) << 56 | (u64)(error) << 32 | (u32)(address))

/* Run one instruction; what came of it, as FAULT has it. */
#define GUARDED(instruction, ...)                                                                                    \
    ({                                                                                                               \
        fault.count = 0;                                                                                             \
        asm volatile("movl $1f, %[resume]\n " instruction "\n1: movl $0, %[resume]" __VA_ARGS__);                    \
        fault.count ? FAULT(fault.vector, fault.error, fault.address) : 0;                                           \
    })

static inline u64 try_load(const volatile void *at)
{
    u32 value;
    return GUARDED("movl %[at], %[value]",
                   : [value] "=&r"(value), [resume] "=m"(resume)
                   : [at] "m"(*(const volatile u32 *)at)
                   : "memory");
}

static inline u64 try_store(volatile void *at, u32 value)
{
    return GUARDED("movl %[value], %[at]",
                   : [resume] "=m"(resume), [at] "=m"(*(volatile u32 *)at)
                   : [value] "r"(value)
                   : "memory");
}

/* Call code at an address, which returns at once if it can be fetched. */
static inline u64 try_call(const volatile void *at)
{
    u32 esp;
    fault.count = 0;
    asm volatile("movl %%esp, %[esp]\n movl $1f, %[resume]\n call *%[at]\n1: movl $0, %[resume]\n movl %[esp], %%esp"
                 : [esp] "=&r"(esp), [resume] "=m"(resume)
                 : [at] "r"(at)
                 : "memory", "eax", "ecx", "edx");
    return fault.count ? FAULT(fault.vector, fault.error, fault.address) : 0;
}

#endif
