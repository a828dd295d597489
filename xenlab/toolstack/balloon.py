"""Ballooning, the control domain's side: targets, limits, and who gets memory when it is short (paper 3.3.4).

The problem: memory is divided when domains are built, and their needs change afterwards.  Only a guest knows
which of its pages it can do without, and only the control domain knows who needs them more.  So each guest has a
*balloon driver*: blown up, it takes pages away from its own kernel and hands their frames to the hypervisor;
deflated, it gives them back.  The control domain just says how many pages each guest should have.

What it says stands in a page that it shares with the guest, the store page of ``start_info``, in words of 32 bits:

    0  target   written by the tools: how many pages the domain should have; 0: nothing was said yet
    1  need     written by the guest: how many pages it could use now
    2  have     written by the guest: how many it has; 0: it has no balloon driver
    3  failed   written by the guest: how often its allocator had nothing to give

In Xen the same numbers travel through xenstore, which replaces this layout as soon as there is one here.

A target is a wish.  What a domain *may* have is its maximum, which the hypervisor keeps to.  And what the guest
writes is a claim: how many pages it has is asked of the hypervisor, and a need counts up to the maximum only.

The policy is a slot: plain numbers in, plain numbers out, and it remembers nothing, so that a run can be taken back.
`Balance` asks it at fixed instruction times.

The invariant: nobody is asked to go below its minimum, nobody is offered more than its maximum, and the targets
together are no more than there is.  What breaks without it: a guest that gave its memory away in
good faith fails for lack of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xenlab.errors import XenlabError
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import OWNED
from xenlab.hypervisor.page_entries import Use
from xenlab.hypervisor.page_types import REFUSED
from xenlab.hypervisor.parts import is_mapping, wrong
from xenlab.hypervisor.trace import MOST, TARGET, Kind
from xenlab.machine.memory import PAGE_SHIFT

Row = Mapping[str, int]
_TARGET, _NEED, _HAVE, _FAILED = range(4)
_MOST_PAGES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoreWords:
    """What stands in a domain's store page, word by word."""

    target: int
    need: int
    have: int
    failed: int


def read_store(xen: Hypervisor, domain: Domain) -> StoreWords:
    """The words of the store page; zeros where the domain has none any more."""
    if not _is_usable(xen, domain):
        return StoreWords(0, 0, 0, 0)
    at = domain.store_mfn << PAGE_SHIFT >> 2
    return StoreWords(*xen.memory.words[at : at + 4])


def _is_usable(xen: Hypervisor, domain: Domain) -> bool:
    """Whether the store page is still the domain's: it may have given that frame away too."""
    mfn = domain.store_mfn
    return bool(mfn) and xen.frames.owner_of(mfn) == domain.domid and bool(xen.frames.flags[mfn] & OWNED)


def _write_target(xen: Hypervisor, domain: Domain, pages: int) -> bool:
    """Store the target as a guest's own kernel might: not into what is a page table by now."""
    if not _is_usable(xen, domain):
        return False
    types, mfn = xen.page_tables.types, domain.store_mfn
    if types.take(mfn, Use.WRITE) == REFUSED:
        return False
    xen.memory.words[(mfn << PAGE_SHIFT >> 2) + _TARGET] = pages
    types.drop(mfn, Use.WRITE)
    xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)
    return True


@dataclass(frozen=True, slots=True)
class SetTarget:
    """The tools tell a domain how many pages it should have, and wake it.

    Raises:
        XenlabError: not a number of pages from 1 on.
    """

    domid: int
    pages: int

    def __post_init__(self) -> None:
        _check_pages("a target", self.pages, 1)

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        domain = hypervisor.domains.get(self.domid)
        if domain is None or domain.ended or not _write_target(hypervisor, domain, self.pages):
            return
        hypervisor.record(Kind.MEMORY, self.domid, TARGET, self.pages)
        for vcpu in domain.vcpus:
            hypervisor.wake(vcpu)


@dataclass(frozen=True, slots=True)
class SetMaximum:
    """The tools say how many pages a domain may have.  One that has more keeps them, and gets no others."""

    domid: int
    pages: int

    def __post_init__(self) -> None:
        _check_pages("a maximum", self.pages, 0)

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        domain = hypervisor.domains.get(self.domid)
        if domain is not None:
            domain.most_pages = self.pages
            hypervisor.record(Kind.MEMORY, self.domid, MOST, self.pages)


@dataclass(frozen=True, slots=True)
class SetMinimum:
    """The tools promise a domain that no policy will ask it to go below so many pages."""

    domid: int
    pages: int

    def __post_init__(self) -> None:
        _check_pages("a minimum", self.pages, 0)

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it."""
        domain = hypervisor.domains.get(self.domid)
        if domain is not None:
            domain.least_pages = self.pages


def _check_pages(what: str, pages: Any, least: int) -> None:
    if isinstance(pages, bool) or not isinstance(pages, int) or not least <= pages <= _MOST_PAGES:
        raise XenlabError(f"{what} of {pages!r} pages: expected a whole number from {least} to {_MOST_PAGES}")


class BalloonPolicy(Protocol):
    """The slot for the decision who gets how much (lesson 13)."""

    def targets(self, free: int, domains: Sequence[Row]) -> Mapping[int, int]:
        """How many pages each domain should have.

        Args:
            free: frames that nobody has, beyond the reserve; below 0 where the reserve is not whole.
            domains: of each domain with a balloon driver, in the order of their numbers: ``domid``, ``least`` and
                ``most`` (it must not get less, or more), ``have`` (pages now), ``need`` (pages it could use) and
                ``target`` (what it was told last).

        Returns:
            Targets by domid; a domain that is not named keeps the one it has.
        """
        ...


class MoveUnderPressure:
    """Memory moves only when somebody needs it: first what is free, then what others have beyond their needs.

    When even that is not enough, everybody gets its minimum, and the rest is shared in proportion to what
    each needs above that.
    """

    def targets(self, free: int, domains: Sequence[Row]) -> Mapping[int, int]:
        wants = {row["domid"]: wanted(row) for row in domains}
        least = {row["domid"]: max(min(row["least"], row["most"]), 1) for row in domains}
        have = {row["domid"]: max(min(row["have"], row["most"]), 1) for row in domains}
        total = free + sum(row["have"] for row in domains)
        if sum(least.values()) > total:  # more was promised than there is: nobody is asked to give anything
            return have
        if sum(wants.values()) > total:
            above = {domid: wants[domid] - least[domid] for domid in wants}
            shared = share(total - sum(least.values()), above)
            return {domid: least[domid] + shared[domid] for domid in wants}
        surplus = {domid: max(have[domid] - wants[domid], 0) for domid in wants}
        lacking = sum(max(wants[domid] - have[domid], 0) for domid in wants)
        taken = share(max(lacking - free, 0), surplus)
        return {domid: max(wants[domid], have[domid]) - taken[domid] for domid in wants}


def wanted(row: Row) -> int:
    """What a domain asks for, within its limits; of these the maximum counts more."""
    return max(min(max(row["need"], row["least"]), row["most"]), 1)


def share(amount: int, weights: Mapping[int, int]) -> dict[int, int]:
    """Divide ``amount`` in proportion to ``weights``, in whole numbers, nobody more than its weight.

    What rounding leaves goes to the largest remainders, of equal ones to the one named first.
    """
    whole = sum(weights.values())
    amount = min(amount, whole)
    parts = {key: amount * weight // whole if whole else 0 for key, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda key: -(amount * weights[key] % whole) if whole else 0)
    for key in by_remainder[: amount - sum(parts.values())]:
        parts[key] += 1
    return parts


@dataclass(frozen=True, slots=True)
class Balance:
    """The tools look at all domains with a balloon driver and set their targets, again and again.

    Args:
        policy: decides.
        interval: instructions from one look to the next.
        reserve: free frames that no target counts on, for domains still to be built.
    """

    policy: BalloonPolicy = field(default_factory=MoveUnderPressure, repr=False)
    interval: int = 10_000
    reserve: int = 0

    def __post_init__(self) -> None:
        _check_pages("an interval", self.interval, 1)

    def apply(self, hypervisor: Hypervisor) -> None:
        """Do it.  Raises PartError where the policy gives no targets."""
        rows = ballooned(hypervisor)
        free = hypervisor.frames.free_frames - self.reserve
        told = {row["domid"]: row["target"] for row in rows}
        for domid, pages in sorted(_asked(self.policy, free, rows).items()):
            if told[domid] != pages:
                SetTarget(domid, pages).apply(hypervisor)


def ballooned(xen: Hypervisor) -> list[dict[str, int]]:
    """What a policy is told of each domain that has a balloon driver and has not ended."""
    rows = []
    for domid, domain in sorted(xen.domains.items()):
        words = read_store(xen, domain)
        if words.have and not domain.ended:
            limits = {"least": domain.least_pages, "most": domain.most_pages}
            rows.append({"domid": domid, **limits, "have": domain.pages, "need": words.need, "target": words.target})
    return rows


def _asked(policy: BalloonPolicy, free: int, rows: list[dict[str, int]]) -> Mapping[int, int]:
    did, expected = f"targets({free}, {rows})", "whole numbers of pages from 1 on, by domid"
    try:
        found = policy.targets(free, [dict(row) for row in rows])
    except XenlabError:
        raise
    except Exception as problem:
        raise wrong(policy, did, expected, problem) from problem
    known = frozenset(row["domid"] for row in rows)
    if not is_mapping(found, known, int) or not all(1 <= pages <= _MOST_PAGES for pages in found.values()):
        raise wrong(policy, did, expected, found)
    return found
