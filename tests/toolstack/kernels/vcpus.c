/*
 * A second vCPU: what its start refuses, and what two of them do with each other, each with tables, events and timers of
 * its own.
 *
 * Command line: vcpus=N how many there are.  All checks are made by the first one.
 */
#include "services.h"

enum { ENOENT = 2, EEXIST = 17, ETIME = 62 };
enum { SET_TIMER_OP = 15, VCPU_OP = 24, EVENT_CHANNEL_OP = 32 };
enum {
    VCPUOP_initialise = 0, VCPUOP_up = 1, VCPUOP_down = 2, VCPUOP_is_up = 3, VCPUOP_get_runstate_info = 4,
    VCPUOP_set_periodic_timer = 6, VCPUOP_stop_periodic_timer = 7, VCPUOP_set_singleshot_timer = 8,
    VCPUOP_stop_singleshot_timer = 9, VCPUOP_register_vcpu_info = 10, VCPUOP_send_nmi = 11, VCPUOP_get_physid = 12
};
enum {
    EVTCHNOP_bind_interdomain = 0, EVTCHNOP_bind_virq = 1, EVTCHNOP_close = 3, EVTCHNOP_send = 4,
    EVTCHNOP_alloc_unbound = 6, EVTCHNOP_bind_ipi = 7, EVTCHNOP_bind_vcpu = 8
};
enum { SCHEDOP_block = 1, VIRQ_TIMER = 0, VIRQ_CONSOLE = 2, PORTS = 32, NMI = 2 };
enum { RUNNING = 0, BLOCKED = 2, OFFLINE = 3 };
enum { OWN_SEGMENT = 1 << 3 | 1, ROUNDS = 50 };

struct user_regs {
    u32 ebx, ecx, edx, esi, edi, ebp, eax, trap, eip, cs, eflags, esp, ss, es, ds, fs, gs;
};
struct vcpu_guest_context {
    u8 fpu[512];
    u32 flags;
    struct user_regs user_regs;
    struct trap_info trap_ctxt[256];
    u32 ldt_base, ldt_ents, gdt_frames[16], gdt_ents, kernel_ss, kernel_sp, ctrlreg[8], debugreg[8];
    u32 event_callback_cs, event_callback_eip, failsafe_callback_cs, failsafe_callback_eip, vm_assist;
};
struct vcpu_runstate_info { u32 state; u64 entered, time[4]; } __attribute__((packed));

PAGES(segments, 2);
PAGES(second_stack, 2);
PAGES(second_info, 1);
PAGES(data, 1);
static struct vcpu_guest_context context;
static volatile struct vcpu_info *own[2];
static volatile u32 served[2][PORTS], nmis, beats, first_port, second_port, seen_segment, seen_number, lesson, rounds;
static volatile u32 alarm_at, woke_early, parked;
extern char upcall_0[], upcall_1[], second_start[], on_nmi[];

asm(".macro upcall number\n"
    "upcall_\\number:\n"
    "  pushal\n pushl %ds\n pushl %es\n"
    "  movl $0xe021, %eax\n movl %eax, %ds\n movl %eax, %es\n"
    "  pushl $\\number\n call serve\n addl $4, %esp\n"
    "  popl %es\n popl %ds\n popal\n"
    "  jmp hypercall_page + 32 * 23\n"
    ".endm\n"
    ".text\n"
    "upcall 0\n upcall 1\n"
    "second_start:\n"
    "  movl %edi, seen_number\n"
    "  call second\n"
    "1: jmp 1b\n"
    "on_nmi:\n"
    "  incl %ss:nmis\n"
    "  jmp hypercall_page + 32 * 23\n");

void serve(u32 number)
{
    volatile struct shared_info *shared = (volatile struct shared_info *)shared_page;
    volatile u32 *pending = (volatile u32 *)shared->rest, *mask = pending + 32;
    own[number]->evtchn_upcall_pending = 0;
    own[number]->evtchn_pending_sel = 0;
    for (u32 port = 1; port < PORTS; port++)
        if ((*pending & ~*mask) >> port & 1) {
            asm volatile("lock btrl %1, %0" : "+m"(*pending) : "r"(port));
            served[number][port]++;
        }
}

static long vcpu_op(u32 command, u32 number, void *argument)
{
    return hypercall(VCPU_OP, command, number, (long)argument);
}

static long channel(u32 command, u32 *argument)
{
    return hypercall(EVENT_CHANNEL_OP, command, (long)argument, 0);
}

static u32 bind_ipi(u32 number)
{
    u32 argument[2] = {number, 0};
    return channel(EVTCHNOP_bind_ipi, argument) ? 0 : argument[1];
}

static u32 bind_timer(u32 number)
{
    u32 argument[3] = {VIRQ_TIMER, number, 0};
    return channel(EVTCHNOP_bind_virq, argument) ? 0 : argument[2];
}

static void send(u32 port)
{
    if (channel(EVTCHNOP_send, &port))
        failed++;
}

/* Sleep until this vCPU has served a port so often. */
static void wait_for(u32 number, u32 port, u32 times)
{
    for (;;) {
        own[number]->evtchn_upcall_mask = 1;
        asm volatile("" ::: "memory");
        if (served[number][port] >= times)
            break;
        hypercall(SCHED_OP, SCHEDOP_block, 0, 0);
    }
    own[number]->evtchn_upcall_mask = 0;
    hypercall(XEN_VERSION, XENVER_version, 0, 0);
}

static u64 now_ns(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return ((u64)high << 32 | low) * 10;
}

static u32 read_own_segment(void)
{
    u32 value;
    asm volatile("movl %1, %%fs\n movl %%fs:0, %0" : "=r"(value) : "r"(OWN_SEGMENT));
    return value;
}

/* What the second vCPU does, one lesson after the other. */
void second(void)
{
    seen_segment = read_own_segment();
    own[1]->evtchn_upcall_mask = 0;
    while (rounds < ROUNDS) {
        wait_for(1, second_port, rounds + 1);
        rounds++;
        send(first_port);
    }
    seen_segment = 0;
    asm volatile("movl %%fs:0, %0" : "=r"(seen_segment));
    u32 timer = bind_timer(1);
    u64 at = now_ns() + 3000000;
    hypercall(SET_TIMER_OP, (u32)at, at >> 32, 0);
    wait_for(1, timer, 1);
    woke_early = now_ns() < at;
    send(first_port);
    vcpu_op(VCPUOP_down, 1, 0);
    parked = 1;
    send(first_port);
    for (;;)
        beats++;
}

static void segment_at(u32 page, const volatile void *base)
{
    u64 at = (u32)base;
    u64 *table = (u64 *)segments[page];
    table[1] = 0x00cfb30000000fffull | (at & 0xffffff) << 16 | (at >> 24) << 56;
    map(segments[page], page_entry(segments[page], READ_ONLY), UVMF_INVLPG);
}

static long try_with(u32 *field, u32 value)
{
    u32 kept = *field;
    *field = value;
    long result = vcpu_op(VCPUOP_initialise, 1, &context);
    *field = kept;
    return result;
}

static u32 cr3_of(u32 mfn)
{
    return mfn << 12 | mfn >> 20;
}

static void fill_context(void)
{
    context.flags = 1 << 2;
    context.user_regs = (struct user_regs){.edi = 0x5ec0, .eip = (u32)second_start, .cs = FLAT_RING1_CS & ~3,
        .eflags = 0x3202, .esp = (u32)(second_stack + 1), .ss = FLAT_RING1_DS, .es = FLAT_RING1_DS,
        .ds = FLAT_RING1_DS};
    context.trap_ctxt[NMI] = (struct trap_info){0, 0, FLAT_RING1_CS, (u32)on_nmi};
    context.gdt_frames[0] = mfn_of(segments[1]);
    context.gdt_ents = 16;
    context.kernel_ss = FLAT_RING1_DS;
    context.kernel_sp = (u32)(second_stack + 2);
    context.ctrlreg[3] = cr3_of(mfn_of(root));
    context.event_callback_cs = FLAT_RING1_CS;
    context.event_callback_eip = (u32)upcall_1;
    context.failsafe_callback_cs = FLAT_RING1_CS;
}

static void check_refusals(void)
{
    answer("first vCPU is up", vcpu_op(VCPUOP_is_up, 0, 0), 1);
    answer("second is not", vcpu_op(VCPUOP_is_up, 1, 0), 0);
    answer("one too many", vcpu_op(VCPUOP_is_up, told("vcpus="), 0), -ENOENT);
    answer("up before initialise", vcpu_op(VCPUOP_up, 1, 0), -EINVAL);
    answer("down before initialise", vcpu_op(VCPUOP_down, 1, 0), 0);
    answer("context that cannot be read", vcpu_op(VCPUOP_initialise, 1, (void *)0x1000), -EFAULT);
    answer("context of oneself that cannot be read", vcpu_op(VCPUOP_initialise, 0, (void *)0x1000), -EFAULT);
    answer("initialise of oneself", vcpu_op(VCPUOP_initialise, 0, &context), -EEXIST);
    answer("local table at half a page", try_with(&context.ldt_base, 0x800), -EINVAL);
    answer("local table that is too long", try_with(&context.ldt_ents, 8193), -EINVAL);
    answer("global table that is too long", try_with(&context.gdt_ents, 7169), -EINVAL);
    answer("descriptors in a page that is written to", try_with(context.gdt_frames, mfn_of(data)), -EINVAL);
    answer("somebody else's descriptors", try_with(context.gdt_frames, not_mine()), -EINVAL);
    answer("descriptors in no frame", try_with(context.gdt_frames, 0xffffffff), -EINVAL);
    answer("no root", try_with(context.ctrlreg + 3, 0), -EINVAL);
    answer("root that is written to", try_with(context.ctrlreg + 3, cr3_of(mfn_of(data))), -EINVAL);
    answer("somebody else's root", try_with(context.ctrlreg + 3, cr3_of(not_mine())), -EINVAL);
    answer("root in no frame", try_with(context.ctrlreg + 3, 0xffffffff), -EINVAL);
    answer("page of descriptors can still be written to",
        map(segments[1], page_entry(segments[1], LEAF), UVMF_INVLPG), 0);
    answer("and not", map(segments[1], page_entry(segments[1], READ_ONLY), UVMF_INVLPG), 0);
}

static void check_start(void)
{
    struct { u64 mfn; u32 offset, reserved; } place = {mfn_of(second_info), 128, 0};
    struct vcpu_runstate_info state;
    u32 frame = mfn_of(segments[0]);
    answer("global table of the first", hypercall(SET_GDT, (long)&frame, 16, 0), 0);
    answer("record of one that is down", vcpu_op(VCPUOP_register_vcpu_info, 1, &place), 0);
    own[0] = &((volatile struct shared_info *)shared_page)->vcpu_info[0];
    own[1] = (volatile struct vcpu_info *)(second_info[0] + 128);
    same("begins with its events masked", own[1]->evtchn_upcall_mask, 1);
    answer("initialise", vcpu_op(VCPUOP_initialise, 1, &context), 0);
    answer("initialise again", vcpu_op(VCPUOP_initialise, 1, &context), -EEXIST);
    answer("still down", vcpu_op(VCPUOP_is_up, 1, 0), 0);
    answer("state of one that is down", vcpu_op(VCPUOP_get_runstate_info, 1, &state), 0);
    same("is offline", state.state, OFFLINE);
    answer("descriptors in use", map(segments[1], page_entry(segments[1], LEAF), UVMF_INVLPG), -EBUSY);
    hypercall5(SET_CALLBACKS, FLAT_RING1_CS, (long)upcall_0, 0, 0, 0);
    own[0]->evtchn_upcall_mask = 0;
    first_port = bind_ipi(0);
    second_port = bind_ipi(1);
    same("ports for signals", first_port && second_port, 1);
    answer("up", vcpu_op(VCPUOP_up, 1, 0), 0);
    answer("up again", vcpu_op(VCPUOP_up, 1, 0), 0);
    answer("is up", vcpu_op(VCPUOP_is_up, 1, 0), 1);
    answer("record of one that is up", vcpu_op(VCPUOP_register_vcpu_info, 1, &place), -EINVAL);
}

static void check_signals(void)
{
    same("segment of the first", read_own_segment(), 0xf1257);
    for (u32 round = 1; round <= ROUNDS; round++) {
        send(second_port);
        wait_for(0, first_port, round);
    }
    same("signals and answers", rounds, ROUNDS);
    same("registers of the second", seen_number, 0x5ec0);
    wait_for(0, first_port, ROUNDS + 1);
    same("segment of the second", seen_segment, 0x5ec07d);
    same("segment of the first again", read_own_segment(), 0xf1257);
    same("its own events only", served[0][second_port] + served[1][first_port], 0);
    same("alarm of the second", woke_early, 0);
}

static void check_timers(void)
{
    u64 period = 1000000, shot[2] = {now_ns() + 2000000, 0};
    u32 timer = bind_timer(0);
    same("timer of the first", timer != 0, 1);
    answer("alarm of another", vcpu_op(VCPUOP_set_singleshot_timer, 1, shot), -EINVAL);
    answer("no alarm of another", vcpu_op(VCPUOP_stop_singleshot_timer, 1, 0), -EINVAL);
    answer("tick of another", vcpu_op(VCPUOP_set_periodic_timer, 1, &period), 0);
    answer("no tick of another", vcpu_op(VCPUOP_stop_periodic_timer, 1, 0), 0);
    vcpu_op(VCPUOP_stop_periodic_timer, 0, 0);
    u32 before = served[0][timer];
    answer("alarm of one's own", vcpu_op(VCPUOP_set_singleshot_timer, 0, shot), 0);
    wait_for(0, timer, before + 1);
    same("goes off", now_ns() >= shot[0], 1);
    answer("timer twice", bind_timer(1), 0);
    answer("processor's number", vcpu_op(VCPUOP_get_physid, 1, &shot), -EINVAL);
}

static void check_down_and_up(void)
{
    struct vcpu_runstate_info state;
    while (vcpu_op(VCPUOP_is_up, 1, 0))
        hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
    u32 got = served[0][first_port];
    send(second_port);
    hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
    same("a sleeper that is down does not hear", served[1][second_port], ROUNDS);
    same("nor run", parked, 0);
    answer("up from there", vcpu_op(VCPUOP_up, 1, 0), 0);
    wait_for(0, first_port, got + 1);
    same("it went on", parked, 1);
    same("and heard", served[1][second_port], ROUNDS + 1);
    while (beats < 100)
        hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
    answer("an NMI", vcpu_op(VCPUOP_send_nmi, 1, 0), 0);
    answer("an NMI with an argument", vcpu_op(VCPUOP_send_nmi, 1, &state), -EINVAL);
    for (u32 had = beats; beats < had + 100;)
        hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
    same("is taken by the other", nmis, 1);
    answer("down by the other", vcpu_op(VCPUOP_down, 1, 0), 0);
    u32 had = beats;
    hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
    same("it stands still", beats, had);
    answer("its state", vcpu_op(VCPUOP_get_runstate_info, 1, &state), 0);
    same("offline once more", state.state == OFFLINE && state.time[RUNNING] && state.time[BLOCKED], 1);
    answer("up for the rest", vcpu_op(VCPUOP_up, 1, 0), 0);
}

static void check_routes(void)
{
    u32 loop[2] = {DOMID_SELF | DOMID_SELF << 16, 0};
    answer("a port for oneself", channel(EVTCHNOP_alloc_unbound, loop), 0);
    u32 bind[3] = {DOMID_SELF, loop[1], 0};
    answer("both ends", channel(EVTCHNOP_bind_interdomain, bind), 0);
    u32 to[2] = {bind[2], 1};
    answer("an end to the second", channel(EVTCHNOP_bind_vcpu, to), 0);
    u32 before = served[1][bind[2]];
    send(loop[1]);
    while (served[1][bind[2]] == before)
        hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
    same("where it arrives", served[1][bind[2]], before + 1);
    to[1] = 0;
    answer("and back", channel(EVTCHNOP_bind_vcpu, to), 0);
    before = served[0][bind[2]];
    send(loop[1]);
    wait_for(0, bind[2], before + 1);
    to[1] = told("vcpus=");
    answer("to one that is not there", channel(EVTCHNOP_bind_vcpu, to), -ENOENT);
    u32 signal[2] = {second_port, 0};
    answer("a signal of another", channel(EVTCHNOP_bind_vcpu, signal), -EINVAL);
    u32 console[3] = {VIRQ_CONSOLE, 1, 0};
    answer("an event of the machine, for one", channel(EVTCHNOP_bind_virq, console), -EINVAL);
    u32 nobody[2] = {told("vcpus="), 0};
    answer("a signal for nobody", channel(EVTCHNOP_bind_ipi, nobody), -ENOENT);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    traps_start();
    static volatile u32 words[2] = {0xf1257, 0x5ec07d};
    segment_at(0, &words[0]);
    segment_at(1, &words[1]);
    fill_context();
    check_refusals();
    check_start();
    check_signals();
    check_timers();
    check_down_and_up();
    check_routes();
    memory_end();
}
