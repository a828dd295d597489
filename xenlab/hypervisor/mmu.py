"""The hypercalls for page tables (paper 2.1.1, 3.3.3): `mmu_update`, `update_va_mapping`, `mmuext_op`.

A guest reads its page tables as it likes and changes them through here:

    mmu_update            any number of entries, by the machine address of each
    update_va_mapping     the one entry that maps a linear address
    mmuext_op             pin and unpin tables, load another root table, flush, set the local descriptor table

A table that is *pinned* stays a table while nothing names it, so a guest that switches between its address
spaces does not have them checked each time.  Loading another root table by `mmuext_op` is what
a move to CR3 was.

Updates of one table that stand together in a batch are done on arrays (`mmu_batch`).

All argument checks and errnos are Xen's (arch/x86/mm.c).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from xenlab.abi.numbers import (
    DOMID_SELF,
    MMU_UPDATE_PREEMPTED,
    Errno,
    Hypercall,
    MmuextOp,
    MmuUpdate,
    UvmFlags,
)
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.foreign import named_domain
from xenlab.hypervisor.frames import OWNED, PINNED, TABLES, VALIDATED, FrameType
from xenlab.hypervisor.layout import start_of
from xenlab.hypervisor.mmu_batch import LONG_ENOUGH, LeafBatches
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_tables import root_use
from xenlab.hypervisor.page_types import REFUSED
from xenlab.hypervisor.preemption import UPDATE_COST, Continuation, Preempted
from xenlab.hypervisor.tlb import ASKED, BASE, PAGE
from xenlab.machine.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xenlab.machine.paging import PAE, PRESENT, PagingMode

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

UPDATE_BYTES, EXTENDED_BYTES = 16, 12
_PIN_USES = {MmuextOp.PIN_L1_TABLE: Use.L1, MmuextOp.PIN_L2_TABLE: Use.L2, MmuextOp.PIN_L3_TABLE: Use.L3}
# A PV guest's addresses are the machine's: there is nothing that the last one would leave untranslated.
_STORES = (MmuUpdate.NORMAL, MmuUpdate.PRESERVE_AD, MmuUpdate.NO_TRANSLATE)
_FLUSHES = (MmuextOp.TLB_FLUSH_LOCAL, MmuextOp.TLB_FLUSH_MULTI, MmuextOp.TLB_FLUSH_ALL)
_PAGE_FLUSHES = (MmuextOp.INVLPG_LOCAL, MmuextOp.INVLPG_MULTI, MmuextOp.INVLPG_ALL)
_FLUSH_TYPE = 3  # the bits of UvmFlags that say how


class Mmu:
    """The hypercalls; each takes a vCPU and plain numbers."""

    def __init__(self, xen: Hypervisor) -> None:
        self._xen, self._memory, self._guest = xen, xen.memory, xen.guest_memory
        self._frames, self._tables, self._tlb = xen.frames, xen.page_tables, xen.tlb
        self._allowance = xen.allowance
        self._batches = LeafBatches(
            xen.memory, xen.guest_memory, xen.frames, xen.page_tables, xen.tlb, xen.reservations.release
        )
        table = xen.hypercalls
        table.register(Hypercall.mmu_update, self.mmu_update)
        table.register(Hypercall.update_va_mapping, self.update_va_mapping)
        table.register(Hypercall.update_va_mapping_otherdomain, self.update_va_mapping_otherdomain)
        table.register(Hypercall.mmuext_op, self.mmuext_op)

    def mmu_update(self, vcpu: Vcpu, address: int, count: int, done_at: int, foreign: int, *_: int) -> int:
        """Change entries of page tables, in order, up to the first that cannot be.

        Args:
            address: of an array of ``mmu_update``: machine address of an entry with a command in its lowest bits,
                and the new entry.
            count: how many; with its top bit set, an interrupted call is made again.
            done_at: where to store how many were done, 0 for nowhere.
            foreign: whose frames may be mapped (low half) and whose tables they are (high half, plus one).
        """
        owner = named_domain(self._xen.domains, vcpu.domain, foreign & 0xFFFF)
        tables = vcpu.domain
        if foreign >> 16:
            tables = self._table_owner(vcpu.domain, (foreign >> 16) - 1)
        if tables is not vcpu.domain and owner is not tables:
            # A guest must not come to map memory that is neither its own nor granted, whoever asks for it.
            raise HypercallError(Errno.EPERM)

        def one_by_one(at: int) -> None:
            pointer_low, pointer_high, low, high = self._guest.read_words(vcpu, at, 4)
            self._update(tables, owner, pointer_low | pointer_high << 32, low | high << 32)

        def many(at: int, left: int) -> int:
            if left < LONG_ENOUGH or owner is not tables:
                return 0
            return self._batches.run(vcpu, tables, at, left)

        return self._in_turn(vcpu, (address, count, done_at), UPDATE_BYTES, one_by_one, many)

    def _table_owner(self, caller: Domain, domid: int) -> Domain:
        """Whose tables are meant: here a domain may name itself, but by its number only."""
        if domid == caller.domid:
            return caller
        if domid == DOMID_SELF:
            raise HypercallError(Errno.EINVAL)
        try:
            return named_domain(self._xen.domains, caller, domid)
        except HypercallError as refusal:
            raise HypercallError(Errno.EINVAL if refusal.errno == Errno.ESRCH else refusal.errno) from None

    def _in_turn(
        self,
        vcpu: Vcpu,
        arguments: tuple[int, int, int],
        size: int,
        one: Callable[[int], None],
        many: Callable[[int, int], int] = lambda _at, _left: 0,
    ) -> int:
        """Do the elements of an array one after the other; store how many were done, and give the last one's errno."""
        address, count, done_at = arguments
        done = 0
        if count & MMU_UPDATE_PREEMPTED:
            count &= ~MMU_UPDATE_PREEMPTED
            done = self._done_before(vcpu, done_at)
        self._allowance.begin()
        result, index = 0, 0
        try:
            while index < count:
                if self._allowance.left <= 0:
                    raise Preempted
                at = address + index * size
                taken = many(at, count - index)
                if not taken:
                    self._allowance.left -= UPDATE_COST
                    one(at)
                    taken = 1
                index += taken
        except HypercallError as refusal:
            result = -refusal.errno
        except Preempted:
            self._store_done(vcpu, done_at, done + index)
            left = (count - index) | MMU_UPDATE_PREEMPTED
            raise Continuation(ebx=address + index * size, ecx=left) from None
        self._store_done(vcpu, done_at, done + index)
        return result

    def _done_before(self, vcpu: Vcpu, address: int) -> int:
        with suppress(HypercallError):
            return self._guest.read_word(vcpu, address) if address else 0
        return 0

    def _store_done(self, vcpu: Vcpu, address: int, done: int) -> None:
        """Store the count; the updates are done, so a guest that gave a bad place for it is told nothing."""
        with suppress(HypercallError):
            if address:
                self._guest.write_words(vcpu, address, (done & 0xFFFF_FFFF,))

    def _update(self, tables: Domain, owner: Domain, pointer: int, value: int) -> None:
        """One element of `mmu_update`."""
        command = pointer & tables.mode.entry_size - 1
        mfn = pointer >> PAGE_SHIFT
        if command == MmuUpdate.MACHPHYS:
            self._check_owned(owner, mfn)
            self._frames.m2p[mfn] = value & 0xFFFF_FFFF
        elif command in _STORES:
            self._check_owned(tables, mfn)
            value &= (1 << 8 * tables.mode.entry_size) - 1
            index = (pointer & PAGE_SIZE - 1) // tables.mode.entry_size
            self._store(tables, owner, mfn, index, value, command == MmuUpdate.PRESERVE_AD)
        else:
            raise HypercallError(Errno.ENOSYS)

    def _check_owned(self, domain: Domain, mfn: int) -> None:
        if mfn >= self._frames.count or self._frames.owner[mfn] != domain.domid:
            raise HypercallError(Errno.EINVAL)

    def _store(self, tables: Domain, owner: Domain, mfn: int, index: int, value: int, keep_marks: bool) -> None:
        if self._frames.type[mfn] in TABLES:
            # Only pages may be another domain's; its tables are judged by what it owns itself.
            foreign_table = owner is not tables and self._frames.type[mfn] != FrameType.L1
            if foreign_table or not self._frames.flags[mfn] & VALIDATED:
                raise HypercallError(Errno.EINVAL)
            self._tables.update(tables, mfn, index, value, owner=owner, keep_marks=keep_marks)
        # A frame that is no table is written as any other, if it can be written at all.
        elif self._tables.types.take(mfn, Use.WRITE) == REFUSED:
            raise HypercallError(Errno.EINVAL)
        else:
            tables.mode.write(self._memory, mfn << PAGE_SHIFT, index, value)
            self._tables.drop(tables, mfn, Use.WRITE)
            self._xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)

    def update_va_mapping(self, vcpu: Vcpu, address: int, low: int, high: int, flags: int, *_: int) -> int:
        """Change the l1 entry that maps a linear address, and flush as asked.

        Args:
            address: linear address.
            low, high: the new entry; ``high`` counts in PAE mode only.
            flags: `UvmFlags`.
        """
        return self._update_va(vcpu, vcpu.domain, address, low | high << 32, flags)

    def update_va_mapping_otherdomain(
        self, vcpu: Vcpu, address: int, low: int, high: int, flags: int, domid: int, *_: int
    ) -> int:
        """`update_va_mapping` to a page of another domain; for the control domain."""
        owner = named_domain(self._xen.domains, vcpu.domain, domid & 0xFFFF)
        return self._update_va(vcpu, owner, address, low | high << 32, flags)

    def _update_va(self, vcpu: Vcpu, owner: Domain, address: int, entry: int, flags: int) -> int:
        domain = vcpu.domain
        if domain.mode is not PAE:
            entry &= 0xFFFF_FFFF
        mfn, index = self.leaf_of(vcpu, address)
        self._allowance.begin()
        self._tables.update(domain, mfn, index, entry, owner=owner)
        kind = flags & _FLUSH_TYPE
        if kind in (UvmFlags.TLB_FLUSH, UvmFlags.INVLPG):
            chosen = flags & ~_FLUSH_TYPE
            some = chosen not in (0, UvmFlags.ALL)
            self._flush_for(vcpu, kind == UvmFlags.TLB_FLUSH, address, chosen if some else None)
        return 0

    def _flush_for(self, vcpu: Vcpu, everything: bool, address: int, chosen: int | None = None) -> None:
        """Flush what the vCPUs in the set at ``chosen`` may hold; None for all, or for the one that asks only.

        There is one CPU, and whoever gets it finds its TLB empty.  So only the one that asks can hold anything.
        """
        if chosen is not None and not self._guest.read_word(vcpu, chosen) >> vcpu.number & 1:
            return
        if everything:
            self._tlb.flush(ASKED)
        else:
            self._tlb.flush(PAGE, address & PAGE_MASK)

    def leaf_of(self, vcpu: Vcpu, address: int) -> tuple[int, int]:
        """Frame and index of the l1 entry that maps ``address`` in the running address space; EINVAL if there is none.

        That the tables above it lead to one of the guest's own is seen from its owner and type.
        """
        mode, domain = vcpu.domain.mode, vcpu.domain
        table = vcpu.state.cr3 >> PAGE_SHIFT
        for level in mode.levels[:-1]:
            entry = mode.read(self._memory, table << PAGE_SHIFT, level.index(address))
            if not entry & PRESENT:
                raise HypercallError(Errno.EINVAL)
            table = mode.frame_of(entry)
        usable = self._frames.owner[table] == domain.domid and self._frames.type[table] == FrameType.L1
        if not usable or address >= start_of(mode):
            raise HypercallError(Errno.EINVAL)
        return table, mode.levels[-1].index(address)

    def mmuext_op(self, vcpu: Vcpu, address: int, count: int, done_at: int, foreign: int, *_: int) -> int:
        """Do the commands of `MmuextOp` in an array of ``mmuext_op``, in order, up to the first that cannot be."""
        owner = named_domain(self._xen.domains, vcpu.domain, foreign & 0xFFFF)

        def one(at: int) -> None:
            command, first, second = self._guest.read_words(vcpu, at, 3)
            if command not in self._commands:
                raise HypercallError(Errno.ENOSYS)
            self._commands[command](self, vcpu, owner, command, first, second)

        return self._in_turn(vcpu, (address, count, done_at), EXTENDED_BYTES, one)

    def _pin(self, _vcpu: Vcpu, owner: Domain, command: int, mfn: int, _second: int) -> None:
        use = _pin_use(owner.mode, command)
        self._check_owned(owner, mfn)
        self._tables.take(owner, mfn, use)
        if self._frames.flags[mfn] & PINNED or not self._frames.flags[mfn] & OWNED:
            self._tables.drop(owner, mfn, use)
            raise HypercallError(Errno.EINVAL)
        self._frames.flags[mfn] |= PINNED

    def _unpin(self, _vcpu: Vcpu, owner: Domain, _command: int, mfn: int, _second: int) -> None:
        self._check_owned(owner, mfn)
        if not self._frames.flags[mfn] & PINNED:
            raise HypercallError(Errno.EINVAL)
        self.unpin(owner, mfn)

    def unpin(self, domain: Domain, mfn: int) -> None:
        """Undo a pin."""
        self._frames.flags[mfn] &= ~PINNED
        self._tables.drop(domain, mfn, self._frames.type[mfn])

    def _new_base(self, vcpu: Vcpu, owner: Domain, _command: int, mfn: int, _second: int) -> None:
        if owner is not vcpu.domain:
            raise HypercallError(Errno.EPERM)
        self.load_base(vcpu, mfn)

    def load_base(self, vcpu: Vcpu, mfn: int) -> None:
        """Walk from the root table in frame ``mfn`` from now on; the one before may be used otherwise then."""
        domain, use = vcpu.domain, root_use(vcpu.domain.mode)
        self._check_owned(domain, mfn)
        self._tables.take(domain, mfn, use)
        # Its address leads to other pages now.
        self._xen.descriptor_tables.forget_ldt(vcpu)
        before = vcpu.state.cr3 >> PAGE_SHIFT
        vcpu.state.cr3 = mfn << PAGE_SHIFT
        self._tables.drop(domain, before, use)
        self._tlb.flush(BASE)

    def _new_user_base(self, vcpu: Vcpu, owner: Domain, _command: int, mfn: int, _second: int) -> None:
        """The root table for ring 3, where that needs one of its own; on 32-bit x86 it is kept and never walked."""
        domain, use = vcpu.domain, root_use(vcpu.domain.mode)
        if owner is not domain:
            raise HypercallError(Errno.EPERM)
        if mfn:
            self._check_owned(domain, mfn)
            self._tables.take(domain, mfn, use)
        before, vcpu.user_base = vcpu.user_base, mfn
        if before:
            self._tables.drop(domain, before, use)

    def _flush(self, vcpu: Vcpu, owner: Domain, command: int, address: int, second: int) -> None:
        if owner is not vcpu.domain:
            raise HypercallError(Errno.EPERM)
        some = command in (MmuextOp.TLB_FLUSH_MULTI, MmuextOp.INVLPG_MULTI)
        self._flush_for(vcpu, command in _FLUSHES, address, second if some else None)

    def _flush_cache(self, vcpu: Vcpu, owner: Domain, *_: int) -> None:
        """Caches of data are not modelled; a domain without devices may not write them back, as in Xen."""
        if owner is not vcpu.domain:
            raise HypercallError(Errno.EPERM)
        raise HypercallError(Errno.EACCES)

    def _set_ldt(self, vcpu: Vcpu, owner: Domain, _command: int, address: int, entries: int) -> None:
        if owner is not vcpu.domain:
            raise HypercallError(Errno.EPERM)
        self._xen.descriptor_tables.set_ldt(vcpu, address, entries)

    def _fill(self, _vcpu: Vcpu, owner: Domain, command: int, mfn: int, source: int) -> None:
        """Clear a page, or copy one to another, by frame."""
        self._check_owned(owner, mfn)
        data = bytes(PAGE_SIZE)
        if command == MmuextOp.COPY_PAGE:
            self._check_owned(owner, source)
            data = bytes(self._memory.frame(source))
        if self._tables.types.take(mfn, Use.WRITE) == REFUSED:
            raise HypercallError(Errno.EINVAL)
        self._memory.frame(mfn)[:] = data
        self._tables.drop(owner, mfn, Use.WRITE)
        self._xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)

    _commands: ClassVar[dict[int, Callable[..., None]]] = {
        **dict.fromkeys((*_PIN_USES, MmuextOp.PIN_L4_TABLE), _pin),
        MmuextOp.UNPIN_TABLE: _unpin,
        MmuextOp.NEW_BASEPTR: _new_base,
        MmuextOp.NEW_USER_BASEPTR: _new_user_base,
        **dict.fromkeys((*_FLUSHES, *_PAGE_FLUSHES), _flush),
        MmuextOp.FLUSH_CACHE: _flush_cache,
        MmuextOp.SET_LDT: _set_ldt,
        **dict.fromkeys((MmuextOp.CLEAR_PAGE, MmuextOp.COPY_PAGE), _fill),
    }


def _pin_use(mode: PagingMode, command: int) -> Use:
    """What a pinned frame is used as.  Raises HypercallError for a level that the format does not have."""
    use = _PIN_USES.get(MmuextOp(command))
    if use == Use.L2 and len(mode.levels) == 2:
        return Use.L2_TOP
    if use is None or use > len(mode.levels):
        raise HypercallError(Errno.EINVAL)
    return use
