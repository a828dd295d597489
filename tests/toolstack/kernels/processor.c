/*
 * The processor as a kernel in ring 1 finds it: control, debug and model-specific registers, CPUID by the
 * forced-emulation prefix, breakpoints, and what is left to hypercalls.
 */
#include "services.h"

PAGES(stubs, 1);
PAGES(user_code, 1);
PAGES(user_stack, 1);
#define REFUSED FAULT(13, 0, 0)
#define UNDEFINED FAULT(6, 0, 0)
#define PLAIN(instruction) GUARDED(instruction, : [resume] "=m"(resume) : : "memory")
#define READ(value, from) GUARDED("movl %%" from ", %0", : "=r"(value), [resume] "=m"(resume) : : "memory")
#define LOAD(to, value) GUARDED("movl %[from], %%" to, : [resume] "=m"(resume) : [from] "r"(value) : "memory")
enum { CR0_TS = 8, CR4_TSD = 4, CR4_DE = 8, CR4_PAE = 0x20, CR4_PGE = 0x80 };

static void check_control(void)
{
    u32 cr0, cr2, cr3, cr4, value;
    same("cr0", READ(cr0, "cr0"), 0);
    same("protection, paging, write protection", cr0 & 0x80010001, 0x80010001);
    same("cr0 as it is", LOAD("cr0", cr0), 0);
    same("cr0 without paging", LOAD("cr0", cr0 & 0x7fffffff), REFUSED);
    same("cr0 without write protection", LOAD("cr0", cr0 & ~0x10000), REFUSED);
    same("cr0 with task switched", LOAD("cr0", cr0 | CR0_TS), 0);
    READ(value, "cr0");
    same("task switched", value, cr0 | CR0_TS);
    same("clts", PLAIN("clts"), 0);
    READ(value, "cr0");
    same("task no longer switched", value, cr0);
    same("cr2", READ(cr2, "cr2"), 0);
    same("cr2 written", LOAD("cr2", 0x12345678), 0);
    READ(cr2, "cr2");
    same("cr2 read", cr2, 0x12345678);
    same("cr3", READ(cr3, "cr3"), 0);
    same("is the root table", cr3 / PAGE, mfn_of(root));
    same("cr3 as it is", LOAD("cr3", cr3), 0);
    same("cr3 of nobody", LOAD("cr3", not_mine() * PAGE), REFUSED);
    same("cr4", READ(cr4, "cr4"), 0);
    same("PAE is what the page tables are", (cr4 & CR4_PAE) != 0, PAE);
    same("cr4 of zeros", LOAD("cr4", 0), 0);
    READ(value, "cr4");
    same("has no effect on the machine's bits", value, cr4);
    same("cr4 of its own bits", LOAD("cr4", cr4 | CR4_TSD | CR4_DE | CR4_PGE | 0x800), 0);
    READ(value, "cr4");
    same("which are kept", value, cr4 | CR4_TSD | CR4_DE);
    same("cr4 back", LOAD("cr4", cr4), 0);
    same("registers that do not exist", PLAIN(".byte 0x0f, 0x20, 0xc8") != 0 && PLAIN(".byte 0x0f, 0x20, 0xe8") != 0, 1);
    same("wbinvd", PLAIN("wbinvd"), 0);
    same("invd", PLAIN("invd"), REFUSED);
    same("invlpg", PLAIN("invlpg (%%esp)"), REFUSED);
    same("hlt", PLAIN("hlt"), REFUSED);
    same("rdpmc", PLAIN("movl $0, %%ecx\n 2: rdpmc"), REFUSED);
    same("lmsw", PLAIN("movl $1, %%eax\n lmsw %%ax"), REFUSED);
    same("lgdt", PLAIN("lgdt (%%esp)"), REFUSED);
    same("lidt", PLAIN("lidt (%%esp)"), REFUSED);
    same("lldt", PLAIN("movl $0, %%eax\n lldt %%ax"), REFUSED);
    same("ltr", PLAIN("movl $0, %%eax\n ltr %%ax"), REFUSED);
    same("smsw", PLAIN("smsw %%ax"), 0);
    same("sgdt", PLAIN("subl $8, %%esp\n sgdt (%%esp)\n addl $8, %%esp"), 0);
}

static u64 read_msr(u32 number, u64 *value)
{
    u32 low = 0, high = 0;
    u64 result = GUARDED("rdmsr", : "+a"(low), "+d"(high), [resume] "=m"(resume) : "c"(number) : "memory");
    *value = (u64)high << 32 | low;
    return result;
}

static u64 write_msr(u32 number, u64 value)
{
    return GUARDED("wrmsr", : [resume] "=m"(resume) : "c"(number), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static void check_msrs(void)
{
    static const u32 zeros[] = {0x17, 0x8b, 0xc1, 0xc2, 0xce, 0x140, 0x186, 0x198, 0x199, 0x345, 0x309, 0x38d};
    static const u32 refused[] = {0x79, 0x10a, 0x174, 0x175, 0x176, 0x200, 0x800, 0xc0000081, 0xc0000100, 0xc0000102};
    u64 value, again;
    u32 wrong = 0;
    same("EFER", read_msr(0xc0000080, &value), 0);
    same("no execution where the page says so", value & 0xd00, 0x800);
    same("EFER as it is", write_msr(0xc0000080, value), 0);
    same("EFER with system calls", write_msr(0xc0000080, value ^ 1), REFUSED);
    same("APIC_BASE", read_msr(0x1b, &value), 0);
    same("at its usual place, for the first processor", value, 0xfee00900);
    same("APIC_BASE written", write_msr(0x1b, value), REFUSED);
    same("MISC_ENABLE", read_msr(0x1a0, &value), 0);
    same("neither branch traces nor precise events", value & 0x1800, 0x1800);
    same("MISC_ENABLE written", write_msr(0x1a0, 0), 0);
    read_msr(0x1a0, &again);
    same("without effect", again, value);
    same("FEATURE_CONTROL", read_msr(0x3a, &value), 0);
    same("is locked", value & 1, 1);
    same("time stamp", read_msr(0x10, &value), 0);
    read_msr(0x10, &again);
    same("goes on", again > value, 1);
    for (u32 n = 0; n < sizeof zeros / sizeof *zeros; n++)
        wrong += read_msr(zeros[n], &value) != 0 || value;
    same("registers that read as zeros", wrong, 0);
    for (u32 n = 0; n < sizeof refused / sizeof *refused; n++)
        wrong += read_msr(refused[n], &value) != REFUSED || write_msr(refused[n], 0) != REFUSED;
    same("registers that do not exist for guests", wrong, 0);
    same("performance counter written", write_msr(0xc1, 0x1234), 0);
    same("MISC_FEATURES_ENABLES", write_msr(0x140, 0), 0);
    same("MISC_FEATURES_ENABLES with faulting", write_msr(0x140, 1), REFUSED);
}

static void cpuid(u32 leaf, u32 subleaf, u32 *out)
{
    asm volatile(".byte 0x0f, 0x0b\n .ascii \"xen\"\n cpuid"
                 : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
                 : "0"(leaf), "2"(subleaf));
}

static void check_cpuid(void)
{
    u32 out[4], native[4];
    cpuid(XEN_CPUID_FIRST_LEAF, 0, out);
    same("leaves of the hypervisor", out[0] >= XEN_CPUID_FIRST_LEAF + 2 && out[0] < XEN_CPUID_FIRST_LEAF + 16, 1);
    same("XenVMMXenVMM", out[1] == 0x566e6558 && out[2] == 0x65584d4d && out[3] == 0x4d4d566e, 1);
    cpuid(XEN_CPUID_FIRST_LEAF + 1, 0, out);
    same("version", out[0], hypercall(XEN_VERSION, XENVER_version, 0, 0));
    cpuid(XEN_CPUID_FIRST_LEAF + 2, 0, out);
    same("pages of hypercalls", out[0], 1);
    same("MMU_PT_UPDATE_PRESERVE_AD", out[2] & 1, 1);
    same("wrmsr fills a page", write_msr(out[1], (u64)mfn_of(stubs) * PAGE), 0);
    u32 different = 0;
    for (u32 n = 0; n < PAGE; n++)
        different += stubs[0][n] != (u8)hypercall_page[n];
    same("like the one from the start", different, 0);
    same("wrmsr of a page table", write_msr(out[1], (u64)mfn_of(root) * PAGE), REFUSED);
    same("wrmsr of somebody else's page", write_msr(out[1], (u64)not_mine() * PAGE), REFUSED);
    same("wrmsr of a second page", write_msr(out[1], (u64)mfn_of(stubs) * PAGE | 2), REFUSED);
    cpuid(1, 0, out);
    same("there is a hypervisor", out[2] >> 31, 1);
    same("no superpages, global pages or virtual-8086 mode", out[3] & (1 << 1 | 1 << 3 | 1 << 13), 0);
    asm volatile("cpuid" : "=a"(native[0]), "=b"(native[1]), "=c"(native[2]), "=d"(native[3]) : "0"(1), "2"(0));
    same("the processor itself says the same of its features", native[3], out[3]);
    same("prefix before another instruction",
         PLAIN(".byte 0x0f, 0x0b\n .ascii \"xen\"\n nop"), UNDEFINED);
    same("half a prefix", PLAIN(".byte 0x0f, 0x0b\n .ascii \"xem\"\n cpuid"), UNDEFINED);
}

static long get(u32 number)
{
    return hypercall(GET_DEBUGREG, number, 0, 0);
}

static long set(u32 number, u32 value)
{
    return hypercall(SET_DEBUGREG, number, value, 0);
}

static void check_debug(void)
{
    u32 value, cr4;
    same("dr6 at the start", (u32)get(6), 0xffff0ff0);
    same("dr7 at the start", get(7), 0x400);
    answer("set_debugreg 0", set(0, 0x1234), 0);
    same("get_debugreg 0", get(0), 0x1234);
    READ(value, "db0");
    same("is what a move reads", value, 0x1234);
    answer("address in the hypervisor", set(3, HYPERVISOR_START), 0);
    answer("dr4 is dr6", set(4, 0), 0);
    same("whose reserved bits are ones", (u32)get(6), 0xffff0ff0);
    answer("dr5 is dr7", set(5, 0), 0);
    same("whose reserved bit is a one", get(7), 0x400);
    answer("general detect", set(7, 0x2000), -EPERM);
    answer("breakpoint on ports", set(7, 0x20001), -EPERM);
    answer("ninth register", set(8, 0), -ENODEV);
    answer("ninth register read", get(8), -ENODEV);
    same("general detect by a move", LOAD("db7", 0x2000), REFUSED);
    READ(cr4, "cr4");
    LOAD("cr4", cr4 | CR4_DE);
    answer("no dr4 with extensions", set(4, 0), -ENODEV);
    answer("no dr5 with extensions", get(5), -ENODEV);
    same("no dr4 by a move with extensions", PLAIN(".byte 0x0f, 0x21, 0xe0"), UNDEFINED);
    answer("breakpoint on ports with extensions", set(7, 0x20001), 0);
    set(7, 0);
    LOAD("cr4", cr4);
}

#define DEBUG FAULT(1, 0, 0)
static volatile u32 watched, beside;
static u32 flat = FLAT_RING1_DS;
extern char at_breakpoint[], behind_store[], behind_load[];

static void check_breakpoints(void)
{
    set(6, 0xffff0ff0);
    set(0, (u32)&watched);
    same("breakpoint on stores by a move", LOAD("db7", 0x000d0602), 0);
    same("store to it", GUARDED("movl $5, %[watched]\n behind_store: nop",
                                : [resume] "=m"(resume), [watched] "=m"(watched) : : "memory"), DEBUG);
    same("comes behind the store", fault.eip == (u32)behind_store && watched == 5, 1);
    same("is in dr6", get(6) & 15, 1);
    same("load from it", GUARDED("movl %[watched], %%eax", : [resume] "=m"(resume) : [watched] "m"(watched) : "eax"), 0);
    same("store beside it", GUARDED("movl $6, %[beside]", : [resume] "=m"(resume), [beside] "=m"(beside) : : "memory"), 0);
    set(7, 0);
    same("switched off", GUARDED("movl $7, %[watched]", : [resume] "=m"(resume), [watched] "=m"(watched) : : "memory"), 0);
    set(0, (u32)&flat);
    set(7, 0x000f0402);
    same("load of SS", GUARDED("mov %[flat], %%ss\n nop\n behind_load: nop", : [resume] "=m"(resume) : [flat] "m"(flat) : "memory"),
         DEBUG);
    same("comes one instruction later", fault.eip, (u32)behind_load);
    set(1, (u32)at_breakpoint);
    set(7, 0x00000408);
    same("breakpoint on execution", PLAIN("nop\n at_breakpoint: nop"), DEBUG);
    same("comes before the instruction", fault.eip, (u32)at_breakpoint);
    same("which a return gets past", fault.eflags & 0x10000, 0x10000);
    same("second one is in dr6", get(6) & 3, 3);
    set(7, 0);
    set(6, 0);
}

extern char user_rdtsc[], user_cpuid[], user_rdmsr[], user_read_cr0[], user_sgdt[], user_end_of_code[];
asm(".pushsection .rodata\n"
    "user_rdtsc: rdtsc\n int $0x80\n"
    "user_cpuid: movl $0x40000000, %eax\n .byte 0x0f, 0x0b\n .ascii \"xen\"\n cpuid\n int $0x80\n"
    "user_rdmsr: movl $0xc0000080, %ecx\n rdmsr\n int $0x80\n"
    "user_read_cr0: movl %cr0, %eax\n int $0x80\n"
    "user_sgdt: subl $8, %esp\n sgdt (%esp)\n int $0x80\n"
    "user_end_of_code:\n"
    ".popsection");

static u64 user(const char *label)
{
    fault.count = 0;
    enter_user((u32)user_code + (label - user_rdtsc), (u32)(user_stack[0] + PAGE - 4));
    return FAULT(fault.vector, fault.error, fault.address);
}

static void check_user(void)
{
    u32 cr4;
    for (u32 n = 0; n < (u32)(user_end_of_code - user_rdtsc); n++)
        user_code[0][n] = user_rdtsc[n];
    map(user_code, page_entry(user_code, LEAF | USER), UVMF_INVLPG);
    map(user_stack, page_entry(user_stack, LEAF | USER), UVMF_INVLPG);
    same("an application reads the time stamp", user(user_rdtsc), FAULT(128, 0, 0));
    READ(cr4, "cr4");
    LOAD("cr4", cr4 | CR4_TSD);
    same("unless its kernel forbids it", user(user_rdtsc), REFUSED);
    LOAD("cr4", cr4);
    same("an application asks the hypervisor's CPUID", user(user_cpuid), FAULT(128, 0, 0));
    same("and is answered", fault.eax >> 8, XEN_CPUID_FIRST_LEAF >> 8);
    same("an application reads EFER", user(user_rdmsr), REFUSED);
    same("an application reads cr0", user(user_read_cr0), REFUSED);
    same("an application reads where the descriptors are", user(user_sgdt), FAULT(128, 0, 0));
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    traps_start();
    check_control();
    check_msrs();
    check_cpuid();
    check_debug();
    check_breakpoints();
    check_user();
    memory_end();
}
