/*
 * What the test kernels use of Xen's public interface, in declarations of their own (xen.h, elfnote.h, sched.h,
 * io/console.h, arch-x86/xen-x86_32.h), and how they print.  The kernels are for a compiler and a linker that know
 * nothing of xenlab.
 *
 * Compiled with -DPAE=0 or 1; LEGACY for the __xen_guest section instead of notes; WITHOUT_PAGE for hypercalls by the
 * bare interrupt; BY_RING to print through the console ring.
 */
#ifndef KERNEL_H
#define KERNEL_H

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

struct start_info {
    char magic[32];
    u32 nr_pages, shared_info, flags, store_mfn, store_evtchn;
    union {
        struct { u32 mfn, evtchn; } domU;
        struct { u32 info_off, info_size; } dom0;
    } console;
    u32 pt_base, nr_pt_frames, mfn_list, mod_start, mod_len;
    char cmd_line[1024];
    u32 first_p2m_pfn, nr_p2m_frames;
};

struct xencons_interface {
    char in[1024], out[2048];
    u32 in_cons, in_prod, out_cons, out_prod;
};

enum { CONSOLE_IO = 18, SCHED_OP = 29 };
enum { CONSOLEIO_WRITE = 0, SCHEDOP_YIELD = 0, SCHEDOP_SHUTDOWN = 2, POWEROFF = 0, CRASHED = 3 };
enum { PRIVILEGED_INITIAL_DOMAIN = 3 };

#define PAGE 4096u
#define REGION (4u << 20)
#define PADDING (512u << 10)

/* From the linker script: addresses of which only the value counts. */
extern char virt_base[], image_end[];
extern char hypercall_page[];

static inline long hypercall(int number, long one, long two, long three)
{
    long result;
#ifdef WITHOUT_PAGE
    asm volatile("int $0x82" : "=a"(result), "+b"(one), "+c"(two), "+d"(three) : "a"(number) : "memory");
#else
    asm volatile("call *%[stub]"
                 : "=a"(result), "+b"(one), "+c"(two), "+d"(three)
                 : [stub] "r"(hypercall_page + 32 * number)
                 : "memory");
#endif
    return result;
}

static inline void shut_down(u32 reason)
{
    hypercall(SCHED_OP, SCHEDOP_SHUTDOWN, (long)&reason, 0);
    for (;;)
        ;
}

/* 0 until the kernel has found its console page. */
static volatile struct xencons_interface *ring;

static inline void print_some(const char *text, u32 length)
{
    if (!ring) {
        hypercall(CONSOLE_IO, CONSOLEIO_WRITE, length, (long)text);
        return;
    }
    for (u32 n = 0; n < length; n++) {
        while (ring->out_prod - ring->out_cons == sizeof ring->out)
            hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
        ring->out[ring->out_prod % sizeof ring->out] = text[n];
        asm volatile("" ::: "memory");
        ring->out_prod++;
    }
}

static inline u32 length_of(const char *text)
{
    u32 length = 0;
    while (text[length])
        length++;
    return length;
}

static inline void print(const char *text)
{
    print_some(text, length_of(text));
}

static inline void print_hex(u64 number)
{
    char digits[18] = "0x";
    for (int n = 0; n < 16; n++)
        digits[2 + n] = "0123456789abcdef"[number >> (60 - 4 * n) & 15];
    print_some(digits, 18);
}

/* Where a frame of the first region is seen; 0 if it is none. */
static inline char *seen_at(const struct start_info *info, u32 mfn, u32 pages)
{
    const u32 *mfns = (const u32 *)info->mfn_list;
    for (u32 pfn = 0; pfn < pages; pfn++)
        if (mfns[pfn] == mfn)
            return virt_base + pfn * PAGE;
    return 0;
}

static inline void use_ring(const struct start_info *info)
{
    u32 console_pages = ((u32)info->pt_base - (u32)virt_base) / PAGE;
    ring = (volatile struct xencons_interface *)seen_at(info, info->console.domU.mfn, console_pages);
}

#endif
