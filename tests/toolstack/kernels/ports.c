/*
 * I/O privilege: who may CLI, STI, IN and OUT at which level, by both interfaces; the bitmap; what ports answer; and that
 * INS and OUTS touch memory only as their own ring may.
 */
#include "services.h"

PAGES(user_code, 1);
PAGES(user_stack, 1);
PAGES(bitmap, 2);
PAGES(text, 1);
#define IN(port, value, suffix) \
    GUARDED("in" suffix " %%dx, %%" value, : [resume] "=m"(resume), "+a"(eax) : "d"(port) : "memory")
#define OUT(port, value, suffix) \
    GUARDED("out" suffix " %%" value ", %%dx", : [resume] "=m"(resume) : "a"(eax), "d"(port) : "memory")
#define REFUSED FAULT(13, 0, 0)
#define COME_BACK FAULT(128, 0, 0)

extern char user_cli[], user_sti[], user_in[], user_out[], user_ins[], user_outs[], user_nothing[], user_last[];
asm(".pushsection .rodata\n"
    "user_cli: cli\n int $0x80\n"
    "user_sti: sti\n int $0x80\n"
    "user_in: movl $0x12345678, %eax\n inb $0x80, %al\n int $0x80\n"
    "user_out: outb %al, $0x80\n int $0x80\n"
    "user_ins: movl $0xe033, %ecx\n movl %ecx, %es\n popl %edi\n movl $0x80, %edx\n movl $4, %ecx\n rep insb\n int $0x80\n"
    "user_outs: movl $0xe033, %ecx\n movl %ecx, %ds\n popl %esi\n movl $0x80, %edx\n outsb\n int $0x80\n"
    "user_nothing: int $0x80\n"
    "user_last:\n"
    ".popsection");

/* Run the code from user_cli on, beginning at a label, in ring 3, with a word on its stack. */
static u64 user(const char *label, const void *word)
{
    *(volatile u32 *)(user_stack[0] + PAGE - 4) = (u32)word;
    fault.count = 0;
    enter_user((u32)user_code + (label - user_cli), (u32)(user_stack[0] + PAGE - 4));
    return FAULT(fault.vector, fault.error, fault.address);
}

static long set_level(u32 level)
{
    return physdev(PHYSDEVOP_set_iopl, &level);
}

/* How many of the four instructions kernel and application may execute, as two digits. */
static u32 allowed(void)
{
    u32 eax = 0, count = 0;
    count += GUARDED("cli", : [resume] "=m"(resume) : : "memory") == 0;
    count += GUARDED("sti", : [resume] "=m"(resume) : : "memory") == 0;
    count += IN(0x80, "al", "b") == 0;
    count += OUT(0x80, "al", "b") == 0;
    count *= 16;
    count += user(user_cli, 0) == COME_BACK;
    count += user(user_sti, 0) == COME_BACK;
    count += user(user_in, 0) == COME_BACK;
    count += user(user_out, 0) == COME_BACK;
    return count;
}

static void check_levels(void)
{
    u32 eax = 0;
    same("cli at the start", GUARDED("cli", : [resume] "=m"(resume) : : "memory"), REFUSED);
    same("out at the start", OUT(0x80, "al", "b"), REFUSED);
    same("cli of an application at the start", user(user_cli, 0), REFUSED);
    same("out of an application at the start", user(user_out, 0), REFUSED);
    same("nobody at level 0", allowed(), 0x00);
    answer("level 1", set_level(1), 0);
    same("the kernel at level 1", allowed(), 0x40);
    answer("level 2", set_level(2), 0);
    same("the kernel at level 2", allowed(), 0x40);
    answer("level 3", set_level(3), 0);
    same("both at level 3", allowed(), 0x44);
    answer("level 4", set_level(4), -EINVAL);
    answer("level that cannot be read", physdev(PHYSDEVOP_set_iopl, (void *)0x1000), -EFAULT);
    same("both still at level 3", allowed(), 0x44);
    same("a frame does not show the level", fault.eflags & 0x3000, 0);
    user_flags = 0x202;
    user(user_nothing, 0);
    same("a return does not set it", allowed(), 0x44);
    answer("level 0", set_level(0), 0);
}

static void check_ports(void)
{
    u32 eax = 0x12345678;
    set_level(1);
    IN(0x80, "al", "b");
    same("a byte of ones", eax, 0x123456ff);
    IN(0x80, "ax", "w");
    same("two bytes of ones", eax, 0x1234ffff);
    IN(0x80, "eax", "l");
    same("four bytes of ones", eax, 0xffffffff);
    eax = 0x8f;
    OUT(0x70, "al", "b");
    eax = 0;
    IN(0x70, "al", "b");
    same("the clock's index is kept", eax, 0x8f);
    eax = 0x80001234;
    OUT(0xcf8, "eax", "l");
    eax = 0;
    IN(0xcf8, "eax", "l");
    same("the bus's address is kept", eax, 0x80001234);
    IN(0xcfc, "eax", "l");
    same("and nothing is there", eax, 0xffffffff);
    set_level(0);
}

static void check_bitmap(void)
{
    struct { void *map; u32 ports; } argument = {bitmap, 65536};
    for (u32 n = 0; n < PAGE; n++)
        bitmap[0][n] = bitmap[1][n] = 0xff;
    answer("bitmap", physdev(PHYSDEVOP_set_iobitmap, &argument), 0);
    same("port that is not in it", user(user_in, 0), REFUSED);
    bitmap[0][0x10] = 0xfe;
    same("port that is in it", user(user_in, 0), COME_BACK);
    same("and it reads as ones", fault.eax, 0x123456ff);
    same("cli is not in it", user(user_cli, 0), REFUSED);
    argument.ports = 0x80;
    answer("shorter bitmap", physdev(PHYSDEVOP_set_iobitmap, &argument), 0);
    same("port behind its end", user(user_in, 0), REFUSED);
    argument.ports = 65537;
    answer("bitmap of too many ports", physdev(PHYSDEVOP_set_iobitmap, &argument), -EINVAL);
    argument.map = (void *)(HYPERVISOR_START - 8191), argument.ports = 8;
    answer("bitmap in the hypervisor", physdev(PHYSDEVOP_set_iobitmap, &argument), -EINVAL);
    answer("bitmap that cannot be read", physdev(PHYSDEVOP_set_iobitmap, (void *)0x1000), -EFAULT);
    argument.map = (void *)0x1000, argument.ports = 65536;
    answer("bitmap where there is nothing", physdev(PHYSDEVOP_set_iobitmap, &argument), 0);
    same("allows nothing", user(user_in, 0), REFUSED);
    argument.map = 0, argument.ports = 0;
    answer("no bitmap", physdev(PHYSDEVOP_set_iobitmap, &argument), 0);
}

static void check_strings(void)
{
    set_level(3);
    map(text, page_entry(text, LEAF | USER), UVMF_INVLPG);
    WORD(text) = WORD(text[0] + 4) = 0x01010101;
    same("rep insb", user(user_ins, text[0] + 1), COME_BACK);
    same("ones are stored", WORD(text) == 0xffffff01 && WORD(text[0] + 4) == 0x010101ff, 1);
    same("outsb", user(user_outs, text), COME_BACK);
    map(text, page_entry(text, READ_ONLY | USER), UVMF_INVLPG);
    same("outsb of a page to read", user(user_outs, text), COME_BACK);
    map(text, page_entry(text, LEAF), UVMF_INVLPG);
    same("outsb of the kernel's page", user(user_outs, text) >> 56, 14);
    set_level(0);
}

static void check_architectural(void)
{
    answer("architectural_iopl", vm_assist(VMASST_CMD_enable, VMASST_TYPE_architectural_iopl), 0);
    for (u32 level = 0; level < 4; level++) {
        user_flags = 0x202 | level << 12;
        user(user_nothing, 0);
        if ((fault.eflags & 0x3000) != level << 12 || allowed() != (level == 3 ? 0x44 : 0x40))
            failed++;
    }
    same("levels by returns, seen in frames", failed, 0);
    user_flags = 0x202;
    user(user_nothing, 0);
    answer("level 3 by the hypercall", set_level(3), 0);
    GUARDED("ud2", : [resume] "=m"(resume) : : "memory");
    same("is seen by the kernel in a frame", fault.eflags & 0x3000, 0x3000);
    answer("architectural_iopl switched off", vm_assist(VMASST_CMD_disable, VMASST_TYPE_architectural_iopl), 0);
    GUARDED("ud2", : [resume] "=m"(resume) : : "memory");
    same("is not seen any more", fault.eflags & 0x3000, 0);
    answer("level 0 again", set_level(0), 0);
    same("nobody again", allowed(), 0x00);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    traps_start();
    for (u32 n = 0; n < (u32)(user_last - user_cli); n++)
        user_code[0][n] = user_cli[n];
    map(user_code, page_entry(user_code, LEAF | USER), UVMF_INVLPG);
    map(user_stack, page_entry(user_stack, LEAF | USER), UVMF_INVLPG);
    check_levels();
    check_ports();
    check_bitmap();
    check_strings();
    check_architectural();
    memory_end();
}
