/*
 * Frames: the machine-to-physical list, shared_info at an address of the kernel's own, and the domain's reservation.
 *
 * Command line: other=N the number of another domain, which exists; "initial=1" for the initial domain.
 */
#include "memory.h"

PAGES(spare, 8);
PAGES(shared, 1);

static u32 pfn_of(const void *at)
{
    return ((u32)at - base) / PAGE;
}

static void check_list(void)
{
    u32 different = 0, highest = 0;
    struct xen_machphys_mapping found = {0, 0, 0};
    for (u32 pfn = 0; pfn < info->nr_pages; pfn++) {
        different += M2P[mfns[pfn]] != pfn;
        highest = mfns[pfn] > highest ? mfns[pfn] : highest;
    }
    same("m2p agrees with mfn_list", different, 0);
    answer("machphys_mapping", memory_op(XENMEM_machphys_mapping, &found), 0);
    same("machphys_mapping start", found.v_start, HYPERVISOR_START);
    same("machphys_mapping covers our frames", found.max_mfn >= highest, 1);
    same("machphys_mapping end", (found.v_end - found.v_start) / 4 >= found.max_mfn, 1);
    answer("machphys_mapping nowhere", memory_op(XENMEM_machphys_mapping, (void *)0x1000), -EFAULT);
    same("maximum_ram_page", (u32)memory_op(XENMEM_maximum_ram_page, 0) > highest, 1);
}

static void check_machphys_update(void)
{
    u32 mfn = mfn_of(spare[0]);
    u64 ptr = (u64)mfn * PAGE | MMU_MACHPHYS_UPDATE;
    answer("MMU_MACHPHYS_UPDATE", update(ptr, 0x12345), 0);
    same("MMU_MACHPHYS_UPDATE is seen", M2P[mfn], 0x12345);
    answer("MMU_MACHPHYS_UPDATE back", update(ptr, pfn_of(spare[0])), 0);
    same("MMU_MACHPHYS_UPDATE back is seen", M2P[mfn], pfn_of(spare[0]));
    ptr = (u64)not_mine() * PAGE | MMU_MACHPHYS_UPDATE;
    answer("MMU_MACHPHYS_UPDATE of no frame of ours", update(ptr, 1), -EINVAL);
    ptr = (u64)0xfffff * PAGE | MMU_MACHPHYS_UPDATE;
    answer("MMU_MACHPHYS_UPDATE of no frame", update(ptr, 1), -EINVAL);
}

static void check_shared_info(void)
{
    u32 mfn = info->shared_info / PAGE;
    volatile struct shared_info *at = (volatile struct shared_info *)shared[0];
    answer("shared_info mapped", map(shared, entry_of(mfn, LEAF), UVMF_INVLPG), 0);
    same("no event at the start", at->vcpu_info[0].evtchn_upcall_pending, 0);
    at->vcpu_info[0].evtchn_upcall_mask = 1;
    same("shared_info can be written", at->vcpu_info[0].evtchn_upcall_mask, 1);
    answer("shared_info mapped twice", map(spare[0], entry_of(mfn, READ_ONLY), UVMF_INVLPG), 0);
    same("both show the same", ((struct shared_info *)spare[0])->vcpu_info[0].evtchn_upcall_mask, 1);
    answer("first page back", map(spare[0], page_entry(spare[0], LEAF), UVMF_INVLPG), 0);
    answer("shared_info as page table", extended(MMUEXT_PIN_L1_TABLE, mfn, 0), -EINVAL);
}

static long reservation(u32 command, u32 domid)
{
    unsigned short id = domid;
    return memory_op(command, &id);
}

static void check_questions(void)
{
    u32 other = told("other=");
    answer("current_reservation", reservation(XENMEM_current_reservation, DOMID_SELF), info->nr_pages);
    same("maximum_reservation", reservation(XENMEM_maximum_reservation, DOMID_SELF) >= (long)info->nr_pages, 1);
    answer("reservation of nobody", reservation(XENMEM_current_reservation, 777), -ESRCH);
    answer("reservation nowhere", memory_op(XENMEM_current_reservation, (void *)0x1000), -EFAULT);
    if (told("initial="))
        same("reservation of another", reservation(XENMEM_current_reservation, other) > 0, 1);
    else
        answer("reservation of another", reservation(XENMEM_current_reservation, other), -EPERM);
    answer("unknown memory_op", memory_op(63, 0), -ENOSYS);
}

static long extents(u32 command, u32 *list, u32 number, u32 order, u32 domid)
{
    struct xen_memory_reservation argument = {list, number, order, 0, domid};
    return memory_op(command, &argument);
}

static void check_decrease_and_populate(void)
{
    u32 pfn = pfn_of(spare[1]), mfn = mfns[pfn], list[3] = {mfn};
    answer("page unmapped", map(spare[1], 0, UVMF_INVLPG), 0);
    answer("decrease", extents(XENMEM_decrease_reservation, list, 1, 0, DOMID_SELF), 1);
    answer("one page less", reservation(XENMEM_current_reservation, DOMID_SELF), info->nr_pages - 1);
    answer("frame given up cannot be mapped", map(spare[1], entry_of(mfn, LEAF), UVMF_INVLPG), -EBUSY);
    answer("frame given up twice", extents(XENMEM_decrease_reservation, list, 1, 0, DOMID_SELF), 0);
    list[0] = pfn;
    answer("populate", extents(XENMEM_populate_physmap, list, 1, 0, DOMID_SELF), 1);
    answer("one page more", reservation(XENMEM_current_reservation, DOMID_SELF), info->nr_pages);
    mfns[pfn] = list[0];
    same("m2p of the new frame", M2P[list[0]], pfn);
    answer("new frame mapped", map(spare[1], page_entry(spare[1], LEAF), UVMF_INVLPG), 0);
    WORD(spare[1]) = 0x600d;
    same("new frame holds data", WORD(spare[1]), 0x600d);

    map(spare[1], 0, UVMF_INVLPG);
    map(spare[2], 0, UVMF_INVLPG);
    list[0] = mfn_of(spare[1]), list[1] = not_mine(), list[2] = mfn_of(spare[2]);
    answer("decrease up to the first bad one", extents(XENMEM_decrease_reservation, list, 3, 0, DOMID_SELF), 1);
    list[0] = pfn;
    answer("populate again", extents(XENMEM_populate_physmap, list, 1, 0, DOMID_SELF), 1);
    mfns[pfn] = list[0];
    map(spare[1], page_entry(spare[1], LEAF), UVMF_INVLPG);
    map(spare[2], page_entry(spare[2], LEAF), UVMF_INVLPG);
    same("the third was left alone", is_mine(mfn_of(spare[2])) && M2P[mfn_of(spare[2])] == pfn + 1, 1);
}

static void check_still_mapped(void)
{
    u32 pfn = pfn_of(spare[3]), list[1] = {mfns[pfn]};
    WORD(spare[3]) = 0x5711;
    answer("decrease of a mapped page", extents(XENMEM_decrease_reservation, list, 1, 0, DOMID_SELF), 1);
    same("it can still be read", WORD(spare[3]), 0x5711);
    answer("until it is unmapped", map(spare[3], 0, UVMF_INVLPG), 0);
    answer("then it is gone", reservation(XENMEM_current_reservation, DOMID_SELF), info->nr_pages - 1);
    list[0] = pfn;
    answer("populate in its place", extents(XENMEM_populate_physmap, list, 1, 0, DOMID_SELF), 1);
    mfns[pfn] = list[0];
    answer("mapped in its place", map(spare[3], page_entry(spare[3], LEAF), UVMF_INVLPG), 0);
}

static void check_bad_extents(void)
{
    u32 list[1] = {pfn_of(spare[0])};
    answer("populate of a huge piece", extents(XENMEM_populate_physmap, list, 1, 20, DOMID_SELF), 0);
    answer("populate for nobody", extents(XENMEM_populate_physmap, list, 1, 0, 777), 0);
    answer("populate from nowhere", extents(XENMEM_populate_physmap, (u32 *)0x1000, 1, 0, DOMID_SELF), 0);
    answer("populate of nothing", extents(XENMEM_populate_physmap, list, 0, 0, DOMID_SELF), 0);
    answer("decrease nowhere", memory_op(XENMEM_decrease_reservation, (void *)0x1000), 0);
}

static struct xen_memory_exchange trade(u32 *in, u32 number, u32 *out, u32 out_number, u32 order)
{
    return (struct xen_memory_exchange){
        {in, number, 0, 0, DOMID_SELF}, {out, out_number, order, 0, DOMID_SELF}, 0};
}

static void check_exchange(void)
{
    u32 pfn = pfn_of(spare[4]), in[4] = {mfns[pfn]}, out[4] = {pfn};
    struct xen_memory_exchange one = trade(in, 1, out, 1, 0);
    answer("exchange of a mapped page", memory_op(XENMEM_exchange, &one), -EINVAL);
    same("nothing was exchanged", one.nr_exchanged, 0);
    map(spare[4], 0, UVMF_INVLPG);
    answer("exchange", memory_op(XENMEM_exchange, &one), 0);
    same("one was exchanged", one.nr_exchanged, 1);
    same("for another one", out[0] != in[0], 1);
    same("m2p of the frame got", M2P[out[0]], pfn);
    mfns[pfn] = out[0];
    answer("frame got can be mapped", map(spare[4], page_entry(spare[4], LEAF), UVMF_INVLPG), 0);

    for (u32 n = 0; n < 4; n++) {
        in[n] = mfns[pfn + n];
        map(spare[4 + n], 0, UVMF_INVLPG);
    }
    out[0] = pfn;
    one = trade(in, 4, out, 1, 2);
    answer("exchange for one piece of four", memory_op(XENMEM_exchange, &one), 0);
    same("four were exchanged", one.nr_exchanged, 4);
    same("the piece is aligned", out[0] & 3, 0);
    u32 different = 0;
    for (u32 n = 0; n < 4; n++) {
        mfns[pfn + n] = out[0] + n;
        different += M2P[out[0] + n] != pfn + n;
        different += map(spare[4 + n], page_entry(spare[4 + n], LEAF), UVMF_INVLPG) != 0;
        different += (WORD(spare[4 + n]) = n) != WORD(spare[4 + n]);
    }
    same("the piece is ours", different, 0);
    answer("as many pages as before", reservation(XENMEM_current_reservation, DOMID_SELF), info->nr_pages);

    one = trade(in, 4, out, 2, 2);
    answer("exchange for more", memory_op(XENMEM_exchange, &one), -EINVAL);
    one = trade(in, 1, out, 1, 0);
    one.nr_exchanged = 2;
    answer("exchange with more done than there are", memory_op(XENMEM_exchange, &one), -EINVAL);
    one = trade(in, 1, out, 1, 0);
    one.out.domid = 0;
    answer("exchange with another", memory_op(XENMEM_exchange, &one), -EINVAL);
    answer("exchange nowhere", memory_op(XENMEM_exchange, (void *)0x1000), -EFAULT);
}

void kernel(const struct start_info *start_info)
{
    memory_start(start_info);
    check_list();
    check_machphys_update();
    check_shared_info();
    check_questions();
    check_decrease_and_populate();
    check_still_mapped();
    check_bad_extents();
    check_exchange();
    memory_end();
}
