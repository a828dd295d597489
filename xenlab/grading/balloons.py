"""Several guests with balloon drivers on one machine, with a student's policy or driver (exercise 13).

A scenario is plain data, so that it can be sent to the student's process:

    domains   for each: ``plan`` (its command line), ``least`` and ``most`` pages
    interval  instructions from one question to the policy to the next; 0: the policy is not asked
    tell      targets from outside, as ``[time, domid, pages]``
    budget    instructions

All domains run the same image.  As in `decisions`, a decision is plain data and checked before it is used: of a policy
``{"targets": [[domid, pages], ...]}``, of a driver ``{"change": pages}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xenlab.grading.decisions import Decision, Sink, Unusable, check_object, described
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.trace import Trace
from xenlab.machine.machine import Machine
from xenlab.toolstack import Image, boot
from xenlab.toolstack.balloon import Balance, Row, SetMaximum, SetMinimum, SetTarget

MEMORY_MIB = 4
_MOST_PAGES = 1 << 20
Scenario = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to the policy: free pages, what it was told of the domains, and its targets."""

    time: int
    free: int
    domains: tuple[Row, ...]
    targets: Mapping[int, int]


class PolicySlot:
    """A policy whose decisions pass through a `Sink`.

    Attributes:
        asked: all questions with their answers, in order.
    """

    def __init__(self, sink: Sink, part: Any, now: Callable[[], int]) -> None:
        self._sink, self._part, self._now = sink, part, now
        self.asked: list[Asked] = []

    def targets(self, free: int, domains: Sequence[Row]) -> Mapping[int, int]:
        rows = tuple(dict(row) for row in domains)
        if not rows:
            return {}
        found = targets_of(self._sink.next(lambda: self._ask(free, rows)), {row["domid"] for row in rows})
        self.asked.append(Asked(self._now(), free, rows, found))
        return found

    def _ask(self, free: int, rows: Sequence[Row]) -> Decision:
        try:
            return _encode_targets(self._part.targets(free, [dict(row) for row in rows]))
        except (Exception, SystemExit) as problem:
            return {"unusable": f"targets raised {described(problem)}"}


class DriverSlot:
    """A driver's decision, asked by the guest through a hypercall: target, have, free, missing."""

    def __init__(self, sink: Sink, part: Any) -> None:
        self._sink, self._part = sink, part

    def call(
        self, arguments: tuple[int, ...], _read: Callable[[int, int], bytes | None]
    ) -> tuple[int, Mapping[int, bytes]]:
        return change_of(self._sink.next(lambda: self._ask(arguments[:4]))), {}

    def _ask(self, arguments: tuple[int, ...]) -> Decision:
        try:
            found = self._part.change(*arguments)
        except (Exception, SystemExit) as problem:
            return {"unusable": f"change raised {described(problem)}"}
        if not isinstance(found, int):
            return {"unusable": f"change must return a whole number, it returned {found!r:.80}"}
        return {"change": int(found)}


def _encode_targets(value: Any) -> Decision:
    if not isinstance(value, Mapping):
        return {"unusable": f"targets must return a dict of pages by domid, it returned {value!r:.80}"}
    for domid, pages in value.items():
        if not isinstance(domid, int) or not isinstance(pages, int):
            return {"unusable": f"targets must be whole numbers by domid, found {domid!r:.40}: {pages!r:.40}"}
    return {"targets": [[int(domid), int(pages)] for domid, pages in value.items()]}


def targets_of(decision: Any, known: set[int]) -> dict[int, int]:
    """The targets of a policy's decision.  Raises Unusable."""
    check_object(decision)
    pairs = decision.get("targets")
    if not isinstance(pairs, list) or len(pairs) > len(known):
        raise Unusable(f"expected targets for at most {len(known)} domains, found {decision!r:.80}")
    return dict(_target_of(pair, known) for pair in pairs)


def _target_of(pair: Any, known: set[int]) -> tuple[int, int]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(number) is int for number in pair):
        raise Unusable(f"expected a target as [domid, pages], found {pair!r:.80}")
    domid, pages = pair
    if domid not in known:
        raise Unusable(f"a target for domain {domid}: expected one of {sorted(known)}")
    if not 1 <= pages <= _MOST_PAGES:
        raise Unusable(f"a target of {pages} pages for domain {domid}: expected 1 to {_MOST_PAGES}")
    return domid, pages


def change_of(decision: Any) -> int:
    """The pages to get, or below zero to give back, of a driver's decision.  Raises Unusable."""
    check_object(decision)
    change = decision.get("change")
    if type(change) is not int or not -_MOST_PAGES <= change <= _MOST_PAGES:
        raise Unusable(f"expected a whole number of pages, found {decision!r:.80}")
    return change


@dataclass(slots=True)
class Played:
    """A scenario that has run: the machine, why the part could not go on, and what the policy was asked."""

    xen: Hypervisor
    problem: str
    asked: list[Asked]


def play(image: Image, scenario: Scenario, number: int, sink: Sink, part: Any = None) -> Played:
    """Run a scenario on a machine of its own; hypercall ``number`` asks the driver's part."""
    xen = Hypervisor(Machine(MEMORY_MIB), hypercalls={number: DriverSlot(sink, part)}, trace=Trace())
    for wanted in scenario["domains"]:
        domain = boot(xen, image, command_line=wanted["plan"])
        xen.submit(SetMinimum(domain.domid, wanted["least"]))
        xen.submit(SetMaximum(domain.domid, wanted["most"]))
    for time, domid, pages in scenario["tell"]:
        xen.inputs.submit(time, SetTarget(domid, pages))
    policy = PolicySlot(sink, part, lambda: xen.now)
    if scenario["interval"]:
        xen.inputs.submit(scenario["interval"], Balance(policy, scenario["interval"]))
    problem = ""
    try:
        xen.run(scenario["budget"])
    except Unusable as reason:
        problem = str(reason)
    return Played(xen, problem, policy.asked)
