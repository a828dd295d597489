/*
 * Reads its console ring and writes back what it read, in capitals, until it reads a full stop.  It looks at the ring
 * again and again, since nothing tells it that something has come.  It says nothing before it is spoken to.
 */
#include "kernel.h"

void kernel(const struct start_info *info)
{
    char byte = 0;
    use_ring(info);
    while (byte != '.') {
        while (ring->in_prod == ring->in_cons)
            hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
        byte = ring->in[ring->in_cons % sizeof ring->in];
        asm volatile("" ::: "memory");
        ring->in_cons++;
        if (byte >= 'a' && byte <= 'z')
            byte += 'A' - 'a';
        print_some(&byte, 1);
    }
    shut_down(POWEROFF);
}
