"""The slot for event bits: Xen's rules as a part do what ours do on the page; a wrong part breaks nobody."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from event_guests import MASKS, SENDER, receiver

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import EvtchnStatus, SchedOp
from xenlab.errors import PartError
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.domain import Domain, Port, RunState
from xenlab.hypervisor.event_bits import Bits, EventBits, XenBits, bits_of
from xenlab.hypervisor.events import AT_MASK, AT_PENDING, AT_SELECTOR, AT_UPCALL, THROUGH
from xenlab.hypervisor.lifecycle import bring_up
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.timeline import Timeline

IDLE = "start: jmp start"


def two(event_bits: EventBits | None, *sources: str, length: int = 7) -> Hypervisor:
    """Domains whose ports 1 and 2 are bound crosswise; the first is the one that is looked at."""
    xen = Hypervisor(Machine(4), scheduler=RoundRobin(length), event_bits=event_bits, trace=Trace())
    for source in sources or (IDLE, IDLE):
        boot(xen, source)
    for domid, port in product((0, 1), (1, 2)):
        xen.domains[domid].ports[port] = Port(EvtchnStatus.INTERDOMAIN, 0, 1 - domid, port)
    return xen


def put(xen: Hypervisor, domain: Domain, bits: Bits) -> None:
    page = xen.memory.frame(domain.shared_info_mfn)
    page[0], page[1], page[4], page[2048], page[2176] = bits.upcall, bits.closed, bits.selector, bits.pending, bits.mask


ALL_BITS = [
    Bits(pending << 1, mask << 1, selector, upcall, closed)
    for pending, mask, selector, upcall, closed in product((0, 1), repeat=5)
]


@pytest.fixture(scope="module")
def pair() -> tuple[Hypervisor, Hypervisor]:
    return two(None), two(XenBits())


@pytest.mark.parametrize("part", [None, XenBits()], ids=["ours", "part"])
@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.DOWN])
def test_an_event_for_a_sleeper_that_may_not_run(part: EventBits | None, state: RunState) -> None:
    """It does not run for that, but it does not sleep on either when it may."""
    xen = two(part)
    domain, vcpu = xen.domains[0], xen.domains[0].vcpus[0]
    xen.memory.bytes[vcpu.info + 1] = 0
    xen.block(vcpu)
    vcpu.run_state, vcpu.paused_from = state, RunState.BLOCKED
    xen.events.send(xen.domains[1], 1)
    assert (vcpu.run_state, vcpu.paused_from) == (state, RunState.RUNNABLE)
    if state is RunState.DOWN:
        bring_up(xen, vcpu)
    else:
        xen.unpause(domain)
    assert vcpu.run_state is RunState.RUNNABLE


class TestOursInTheSlot:
    @pytest.mark.parametrize("asleep", [False, True])
    @pytest.mark.parametrize("action", ["send", "unmask", "block"])
    @pytest.mark.parametrize("bits", ALL_BITS, ids=str)
    def test_each_action_from_all_bits(
        self, bits: Bits, action: str, asleep: bool, pair: tuple[Hypervisor, Hypervisor]
    ) -> None:
        seen = []
        for xen in pair:
            domain, vcpu = xen.domains[0], xen.domains[0].vcpus[0]
            vcpu.run_state = RunState.BLOCKED if asleep and action == "send" else RunState.RUNNABLE
            xen.scheduler = RoundRobin()
            for other in xen.vcpus.values():
                if other.run_state is RunState.RUNNABLE:
                    xen.scheduler.wake(other.key, 0)
            put(xen, domain, bits)
            if action == "send":
                xen.events.send(xen.domains[1], 1)
            elif action == "unmask":
                xen.events.clear_mask(domain, 1)
            else:
                xen.services.sched_op(vcpu, SchedOp.BLOCK, 0)
            seen.append((bits_of(xen, domain), vcpu.run_state))
        assert seen[0] == seen[1]

    @pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
    def test_guests_run_alike(self, length: int) -> None:
        body = receiver(MASKS)
        runs = []
        for part in (None, XenBits()):
            xen = two(part, body, SENDER, length=length)
            xen.run(5_000)
            assert xen.trace is not None
            # A part cannot say whether an event stopped at its own mask or at the selector.
            runs.append([raw[:5] if raw[1] == Kind.EVENT else raw for raw in xen.trace.raw()])
        assert runs[0] == runs[1]
        assert sum(raw[1] == Kind.UPCALL for raw in runs[0]) > 5

    def test_a_timeline_takes_a_part_back(self) -> None:
        class Counting(XenBits):
            asked = 0

            def send(self, *told: Any) -> Any:
                self.asked += 1
                return super().send(*told)

        part = Counting()
        xen = two(part, receiver("mov byte ptr [shared_info + 1], 0\nspin: jmp spin"), SENDER)
        timeline = Timeline(xen)
        timeline.run(2_000)
        after = part.asked, timeline.machine_hash()
        timeline.seek(500)
        assert 0 < part.asked < after[0]
        timeline.seek(2_000)
        assert (part.asked, timeline.machine_hash()) == after


@pytest.mark.parametrize(
    ("bits", "stopped"),
    [
        (Bits(2, 0, 0, 0, 0), AT_PENDING),
        (Bits(0, 2, 0, 0, 0), AT_MASK),
        (Bits(0, 0, 1, 0, 0), AT_SELECTOR),
        (Bits(0, 0, 0, 1, 0), AT_UPCALL),
        (Bits(0, 0, 0, 0, 1), THROUGH),
    ],
)
def test_the_trace_says_where_an_event_stopped(bits: Bits, stopped: str) -> None:
    xen = two(None)
    put(xen, xen.domains[0], bits)
    xen.events.send(xen.domains[1], 1)
    xen.events.set_pending(xen.domains[1], 2)
    assert xen.trace is not None
    first, second = xen.trace.events(Kind.EVENT)
    assert (first.domain, first.port, first.sender, first.stopped) == (0, 1, 1, stopped)
    assert (second.domain, second.port, second.sender) == (1, 2, -1)


WRONG: list[tuple[str, Any]] = [
    ("send", None),
    ("send", 3),
    ("send", {"pending": -1}),
    ("send", {"pending": 1 << 32}),
    ("send", {"pending": True}),
    ("send", {"upcall": 256}),
    ("send", {"mask": 0}),
    ("send", {"wake": 1}),
    ("send", {3: 3}),
    ("send", KeyError("nothing")),
    ("unmask", {"pending": 0}),
    ("unmask", {"wake": True}),
    ("block", {"selector": 0}),
    ("block", {"sleep": 0}),
]


@pytest.mark.parametrize(("question", "answer"), WRONG, ids=repr)
def test_a_wrong_answer_is_named_and_changes_nothing(question: str, answer: Any) -> None:
    class Wrong(XenBits):
        def _wrong(self, *_told: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    setattr(Wrong, question, Wrong._wrong)
    xen = two(Wrong())
    domain, events = xen.domains[0], xen.events
    ask = {
        "send": lambda: events.send(xen.domains[1], 1),
        "unmask": lambda: events.clear_mask(domain, 1),
        "block": lambda: events.block(domain.vcpus[0]),
    }
    with pytest.raises(PartError, match=rf"Wrong, {question}\(.*for domain 0: expected a dict of what changes"):
        ask[question]()
    assert bits_of(xen, domain)[:4] == (0, 0, 0, 0)


def test_a_part_that_forgets_all_loses_everything_and_breaks_nobody() -> None:
    class Nothing:
        def send(self, *_told: Any) -> dict[str, int]:
            return {}

        unmask = send

        def block(self, *_told: Any) -> dict[str, int]:
            return {"sleep": True}

    xen = two(Nothing(), receiver(), SENDER, length=50)
    bystander = boot(xen, "start: inc eax\n jmp start")
    assert xen.run(5_000).stop is Stop.BUDGET
    assert bystander.vcpus[0].state.eax > 500
    assert xen.domains[0].vcpus[0].run_state is RunState.BLOCKED
    assert bits_of(xen, xen.domains[0]).pending == 0
