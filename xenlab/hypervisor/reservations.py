"""How much memory a domain has, and how frames come and go (paper 3.3.4).

Each domain has a reservation, the frames that it owns, and a maximum.  Within the maximum it may ask for more
and give frames back at any time.

To own a frame is one reference to it, as a mapping is.  A frame that its owner gives up while something still
refers to it stays as it is until the last reference goes; only then is it scrubbed and free.  So a domain that
has its own page mapped twice and gives it up keeps seeing it, and nobody else gets it.

The invariant: a free frame is referred to by nothing.  What breaks without it: memory of one domain
turns up in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from xenlab.errors import MachineError
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, ORPHAN, OWNED, PINNED, FrameTable
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_tables import PageTables
from xenlab.hypervisor.tlb import FREED, Tlb
from xenlab.machine.memory import PAGE_SHIFT


class Reservations:
    """Gives frames to domains and takes them back.

    Args:
        frames, tlb: the machine's.
        domains: by id.
        forget_code: called with the machine addresses of what has changed: the first, and the one behind.
    """

    def __init__(
        self, frames: FrameTable, tlb: Tlb, domains: Mapping[int, Domain], forget_code: Callable[[int, int], None]
    ) -> None:
        self._frames, self._tlb, self._domains, self._forget_code = frames, tlb, domains, forget_code
        self.tables: PageTables

    def allocate(self, domain: Domain, count: int, order: int = 0) -> list[int]:
        """Give ``domain`` so many extents of ``2**order`` frames each, contiguous and aligned.

        Returns:
            All frames, extent by extent.

        Raises:
            MachineError: the domain's maximum or the machine does not allow it; nothing is given then.
        """
        wanted = count << order
        if domain.pages + wanted > domain.most_pages:
            raise MachineError(
                f"domain {domain.domid} has {domain.pages} frames and may have {domain.most_pages}: no {wanted} more"
            )
        taken = self._frames.allocate(wanted, domain.domid, order)
        for mfn in taken:
            self._own(mfn)
        domain.pages += wanted
        return taken

    def _own(self, mfn: int) -> None:
        self._frames.flags[mfn] = OWNED
        self.tables.types.take(mfn, Use.READ)

    def adopt(self, domain: Domain, mfn: int) -> None:
        """Let the domain own a frame that the hypervisor goes on writing to, as data for ever: its shared page."""
        self._frames.owner[mfn] = domain.domid
        self._own(mfn)
        self.tables.types.take(mfn, Use.WRITE)

    def give_up(self, domain: Domain, mfn: int) -> bool:
        """Let ``domain`` not own frame ``mfn`` any more; False if it does not, or must keep it."""
        owns = self._frames.owner_of(mfn) == domain.domid and self._frames.flags[mfn] & OWNED
        if not owns or mfn == domain.shared_info_mfn:
            return False
        self._disown(domain, mfn)
        return True

    def _disown(self, domain: Domain, mfn: int) -> None:
        flags = self._frames.flags
        if flags[mfn] & PINNED:
            flags[mfn] &= ~PINNED
            self.tables.drop(domain, mfn, self._frames.type[mfn])
        flags[mfn] &= ~OWNED
        self.tables.drop(domain, mfn, Use.READ)

    def release(self, mfn: int) -> None:
        """Nothing refers to frame ``mfn`` any more: it is scrubbed and free."""
        owner = self._domains.get(self._frames.owner[mfn])
        if owner is not None and mfn != owner.shared_info_mfn:
            owner.pages -= 1
        # At once: a stale entry would let the old owner write to a frame that counts as scrubbed.
        self._tlb.reused(mfn, FREED)
        self._frames.release([mfn])
        self._forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)

    def reclaim(self, domain: Domain) -> None:
        """Take back all frames of a domain whose page tables are not walked any more."""
        self._tlb.flush(FREED)
        self._tlb.watching = False
        try:
            self._reclaim(domain)
        finally:
            self._tlb.watching = True

    def _reclaim(self, domain: Domain) -> None:
        self.tables.drop_partial(domain)
        flags, owner = self._frames.flags, self._frames.owner
        mine = self._frames.owned_by(domain.domid)
        # Pins first: a table that is dropped drops what it names, in the order of the tree.
        for mfn in mine:
            if flags[mfn] & PINNED and owner[mfn] == domain.domid:
                flags[mfn] &= ~PINNED
                self.tables.drop(domain, mfn, self._frames.type[mfn])
        self.tables.drop(domain, domain.shared_info_mfn, Use.WRITE)
        for mfn in mine:
            if flags[mfn] & OWNED and owner[mfn] == domain.domid:
                self._disown(domain, mfn)
        for mfn in mine:
            if owner[mfn] != FREE:
                # Another domain still maps it; it is free as soon as that ends.
                owner[mfn] = ORPHAN
