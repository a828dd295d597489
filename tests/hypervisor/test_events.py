"""Event channels: ports and errnos, bits and upcalls, in every order in which they can come; guests that use them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, product
from typing import Any

import pytest
from event_guests import MASKS, SENDER, STORES_TO_A_TABLE, receiver

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import (
    DOMID_SELF,
    FLAT_RING1_CS,
    HYPERCALL_VECTOR,
    CallbackOp,
    CallbackType,
    Errno,
    EvtchnOp,
    EvtchnStatus,
    Hypercall,
    SchedOp,
    Virq,
)
from xenlab.errors import HypercallError
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.domain import Domain, RunState, Vcpu
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import TWO_LEVEL, PagingMode
from xenlab.timeline import Destroy, Timeline
from xenlab.toolstack import Image, image_from_source

SCRATCH, NOWHERE, READ_ONLY = 0xC000_8000, 0x8000_0000, 0xFC00_0000
IDLE = "start: jmp start\n .align 4096\n .skip 0x8000"
KEPT = 0xDEAD_BEEF


@dataclass(frozen=True, slots=True)
class Send:
    """An event from outside: what a tool in ``domid`` sends through ``port``."""

    domid: int
    port: int

    def apply(self, hypervisor: Hypervisor) -> None:
        hypervisor.events.send(hypervisor.domains[self.domid], self.port)


class Bench:
    """Three domains that are held still while calls are made for them; the first is the control domain."""

    def __init__(self, mode: PagingMode = TWO_LEVEL) -> None:
        self.xen = Hypervisor(Machine(memory_mib=8), trace=Trace())
        self.control, self.a, self.b = (boot(self.xen, IDLE, mode=mode, privileged=not number) for number in range(3))

    def op(self, domain: Domain, command: int, *words: int, at: int = SCRATCH) -> tuple[int, ...]:
        """The result, and then the words of the argument as the call has left them."""
        vcpu = domain.vcpus[0]
        if at == SCRATCH:
            self.xen.guest_memory.write_words(vcpu, at, words)
        result = self.call(domain, self.xen.events.event_channel_op, command, at)
        return result, *self.xen.guest_memory.read_words(vcpu, SCRATCH, len(words))

    def call(self, domain: Domain, handler: Any, *arguments: int) -> int:
        try:
            return int(handler(domain.vcpus[0], *arguments))
        except HypercallError as refusal:
            return -refusal.errno

    def unbound(self, domain: Domain, remote: int) -> int:
        result, _who, port = self.op(domain, EvtchnOp.ALLOC_UNBOUND, DOMID_SELF | remote << 16, 0)
        assert not result
        return port

    def connect(self, receiver: Domain, sender: Domain) -> tuple[int, int]:
        """Ports of the receiver and of the sender."""
        theirs = self.unbound(receiver, sender.domid)
        result, _who, _port, ours = self.op(sender, EvtchnOp.BIND_INTERDOMAIN, receiver.domid, theirs, 0)
        assert not result
        return theirs, ours

    def status(self, domain: Domain, port: int) -> tuple[int, ...]:
        result, _who, _port, *found = self.op(domain, EvtchnOp.STATUS, DOMID_SELF, port, 9, 9, KEPT, KEPT)
        assert not result
        return tuple(found)

    def audit(self) -> None:
        """Every channel has two ends that name each other."""
        for domain in self.xen.domains.values():
            for port, found in domain.ports.items():
                assert 0 < port < 1024
                if found.status == EvtchnStatus.INTERDOMAIN:
                    other = self.xen.domains[found.remote].ports[found.remote_port]
                    assert (other.status, other.remote, other.remote_port) == (found.status, domain.domid, port)


def bits(xen: Hypervisor, domain: Domain) -> tuple[int, int, int, int]:
    """The first words of pending and mask, the selector, and whether an upcall is pending."""
    page = xen.memory.frame(domain.shared_info_mfn)
    pending, mask = (struct.unpack_from("<I", page, at)[0] for at in (2048, 2176))
    return pending, mask, struct.unpack_from("<I", page, 4)[0], page[0]


def set_byte(xen: Hypervisor, domain: Domain, offset: int, value: int) -> None:
    xen.memory.frame(domain.shared_info_mfn)[offset] = value


@pytest.fixture
def bench(mode: PagingMode) -> Iterator[Bench]:
    made = Bench(mode)
    yield made
    made.audit()


class TestPorts:
    def test_the_lowest_free_port_is_taken_and_the_table_ends(self, bench: Bench) -> None:
        assert [bench.unbound(bench.a, 2) for _ in range(3)] == [1, 2, 3]
        assert bench.op(bench.a, EvtchnOp.CLOSE, 2)[0] == 0
        assert [bench.unbound(bench.a, 2) for _ in range(2)] == [2, 4]
        for _ in range(1023 - 4):
            bench.unbound(bench.a, 2)
        for command, words in (
            (EvtchnOp.ALLOC_UNBOUND, (DOMID_SELF, 0)),
            (EvtchnOp.BIND_IPI, (0, 0)),
            (EvtchnOp.BIND_VIRQ, (0, 0, 0)),
            (EvtchnOp.BIND_INTERDOMAIN, (DOMID_SELF, 1, 0)),
        ):
            assert bench.op(bench.a, command, *words) == (-Errno.ENOSPC, *words)

    def test_interdomain(self, bench: Bench) -> None:
        theirs, ours = bench.connect(bench.a, bench.b)
        assert bench.status(bench.a, theirs) == (2, 0, KEPT & 0xFFFF_0000 | 2, ours)
        assert bench.status(bench.b, ours) == (2, 0, KEPT & 0xFFFF_0000 | 1, theirs)
        # Something may have been sent before; only the one that binds is told.
        assert bits(bench.xen, bench.b) == (1 << ours, 0, 1, 1)
        assert bits(bench.xen, bench.a) == (0, 0, 0, 0)

    def test_within_one_domain(self, bench: Bench) -> None:
        assert bench.connect(bench.a, bench.a) == (1, 2)
        assert bench.op(bench.a, EvtchnOp.SEND, 2)[0] == 0
        assert bits(bench.xen, bench.a)[0] == 0b110
        assert bench.op(bench.a, EvtchnOp.CLOSE, 2)[0] == 0
        assert bench.status(bench.a, 1)[0] == EvtchnStatus.UNBOUND

    @pytest.mark.parametrize("closer", ["a", "b", "destroyed"])
    def test_closing_one_end_makes_the_other_unbound(self, closer: str, bench: Bench) -> None:
        theirs, ours = bench.connect(bench.a, bench.b)
        if closer == "a":
            assert bench.op(bench.a, EvtchnOp.CLOSE, theirs)[0] == 0
            assert bench.status(bench.b, ours)[:3] == (1, 0, KEPT & 0xFFFF_0000 | 1)
            assert bench.status(bench.a, theirs) == (0, 0, KEPT, KEPT)
            return
        if closer == "b":
            assert bench.op(bench.b, EvtchnOp.CLOSE, ours)[0] == 0
            assert bits(bench.xen, bench.b)[0] == 0, "what was pending there is forgotten"
        else:
            bench.xen.destroy(bench.b)
        assert bench.status(bench.a, theirs) == (1, 0, KEPT & 0xFFFF_0000 | 2, KEPT)
        assert bench.op(bench.a, EvtchnOp.SEND, theirs)[0] == 0, "nobody hears it"
        if closer == "b":
            assert bench.op(bench.b, EvtchnOp.BIND_INTERDOMAIN, 1, theirs, 0)[0] == 0

    def test_status_of_the_others(self, bench: Bench) -> None:
        assert bench.op(bench.a, EvtchnOp.BIND_VIRQ, Virq.TIMER, 0, 0)[::3] == (0, 1)
        assert bench.op(bench.a, EvtchnOp.BIND_IPI, 0, 0) == (0, 0, 2)
        assert bench.status(bench.a, 1) == (EvtchnStatus.VIRQ, 0, Virq.TIMER, KEPT)
        assert bench.status(bench.a, 2) == (EvtchnStatus.IPI, 0, KEPT, KEPT)
        for port in (0, 3, 1023):
            assert bench.status(bench.a, port) == (EvtchnStatus.CLOSED, 0, KEPT, KEPT)

    def test_the_control_domain_may_ask_and_allocate_for_others(self, bench: Bench) -> None:
        assert bench.op(bench.control, EvtchnOp.ALLOC_UNBOUND, 1 | DOMID_SELF << 16, 0)[::2] == (0, 1)
        assert bench.op(bench.control, EvtchnOp.STATUS, 1, 1, 9, 9, 9, 9) == (0, 1, 1, 1, 0, 0, 9)
        assert bench.op(bench.a, EvtchnOp.ALLOC_UNBOUND, 2, 0)[0] == -Errno.EPERM
        assert bench.op(bench.a, EvtchnOp.STATUS, 2, 1, 9, 9, 9, 9)[0] == -Errno.EPERM
        assert bench.op(bench.a, EvtchnOp.ALLOC_UNBOUND, 1 | 2 << 16, 0)[0] == 0, "itself, by its number"


# Port 1 is unbound for domain 2, 2 bound to domain 0, 3 a timer, 4 a signal; 5 is free.
REFUSED: list[tuple[int, tuple[int, ...], int]] = [
    (EvtchnOp.ALLOC_UNBOUND, (77, 0), Errno.ESRCH),
    (EvtchnOp.BIND_INTERDOMAIN, (77, 1, 0), Errno.ESRCH),
    *((EvtchnOp.BIND_INTERDOMAIN, (DOMID_SELF, port, 0), Errno.EINVAL) for port in (0, 1, 2, 3, 4, 5, 1024, 2**32 - 1)),
    (EvtchnOp.BIND_VIRQ, (24, 0, 0), Errno.EINVAL),
    (EvtchnOp.BIND_VIRQ, (2**32 - 1, 0, 0), Errno.EINVAL),
    (EvtchnOp.BIND_VIRQ, (Virq.DOM_EXC, 1, 0), Errno.EINVAL),
    (EvtchnOp.BIND_VIRQ, (Virq.DEBUG, 1, 0), Errno.ENOENT),
    (EvtchnOp.BIND_VIRQ, (Virq.TIMER, 0, 0), Errno.EEXIST),
    (EvtchnOp.BIND_IPI, (1, 0), Errno.ENOENT),
    *((EvtchnOp.CLOSE, (port,), Errno.EINVAL) for port in (0, 5, 1024, 2**32 - 1)),
    *((EvtchnOp.SEND, (port,), Errno.EINVAL) for port in (0, 3, 5, 1024, 2**32 - 1)),
    (EvtchnOp.STATUS, (77, 1, 0, 0, 0, 0), Errno.ESRCH),
    (EvtchnOp.STATUS, (2, 1024, 0, 0, 0, 0), Errno.EINVAL),
    (EvtchnOp.STATUS, (2, 1, 0, 0, 0, 0), Errno.EPERM),
    *((EvtchnOp.UNMASK, (port,), Errno.EINVAL) for port in (1024, 2**32 - 1)),
    *((EvtchnOp.BIND_VCPU, (port, 0), Errno.EINVAL) for port in (0, 3, 4, 5, 1024)),
    (EvtchnOp.BIND_VCPU, (5, 1), Errno.ENOENT),
    *((command, (0, 0, 0), Errno.ENOSYS) for command in (2, 10, 11, 12, 13, 14, 2**32 - 1)),
]


@pytest.fixture(scope="module")
def refusing() -> Bench:
    made = Bench()
    made.unbound(made.a, 2)
    made.op(made.a, EvtchnOp.BIND_INTERDOMAIN, 0, made.unbound(made.control, 1), 0)
    made.op(made.a, EvtchnOp.BIND_VIRQ, Virq.TIMER, 0, 0)
    made.op(made.a, EvtchnOp.BIND_IPI, 0, 0)
    return made


@pytest.mark.parametrize(("command", "words", "errno"), REFUSED)
def test_refused_calls_change_nothing(
    command: int, words: tuple[int, ...], errno: int, refusing: Bench, frozen_for_module: Any
) -> None:
    refusing.xen.guest_memory.write_words(refusing.a.vcpus[0], SCRATCH, words)
    ports, before = dict(refusing.a.ports), frozen_for_module(refusing.xen)
    assert refusing.op(refusing.a, command, *words) == (-errno, *words)
    assert (refusing.a.ports, frozen_for_module(refusing.xen)) == (ports, before)


@pytest.mark.parametrize("command", sorted(EvtchnOp))
@pytest.mark.parametrize("at", [0, NOWHERE, 2**32 - 2, READ_ONLY])
def test_wild_pointers(command: int, at: int, refusing: Bench) -> None:
    if at == READ_ONLY and command in (EvtchnOp.CLOSE, EvtchnOp.SEND, EvtchnOp.UNMASK, EvtchnOp.BIND_VCPU):
        pytest.skip("these only read")
    ports = dict(refusing.a.ports)
    assert refusing.op(refusing.a, command, at=at)[0] == -Errno.EFAULT
    assert refusing.a.ports == ports


def test_ports_that_may_move_to_another_vcpu(bench: Bench) -> None:
    bench.unbound(bench.a, 2)
    bench.op(bench.a, EvtchnOp.BIND_VIRQ, Virq.DOM_EXC, 0, 0)
    assert [bench.op(bench.a, EvtchnOp.BIND_VCPU, port, 0)[0] for port in (1, 2)] == [0, 0]


class TestBits:
    @pytest.mark.parametrize("pending", [0, 1])
    @pytest.mark.parametrize("masked", [0, 1])
    @pytest.mark.parametrize("selected", [0, 1])
    @pytest.mark.parametrize("upcall", [0, 1])
    def test_each_step_is_taken_only_from_0(
        self, pending: int, masked: int, selected: int, upcall: int, bench: Bench
    ) -> None:
        port, ours = bench.connect(bench.a, bench.b)
        page = bench.xen.memory.frame(bench.a.shared_info_mfn)
        page[0], page[4], page[2048], page[2176] = upcall, selected, pending << port, masked << port
        assert bench.op(bench.b, EvtchnOp.SEND, ours)[0] == 0
        on = not pending and not masked
        expected = (1 << port, masked << port, selected | on, upcall | (on and not selected))
        assert bits(bench.xen, bench.a) == expected
        assert bench.op(bench.a, EvtchnOp.UNMASK, port)[0] == 0
        after = (1 << port, 0, expected[2] | masked, expected[3] | (masked and not expected[2]))
        assert bits(bench.xen, bench.a) == after

    def test_the_selector_names_the_word(self, bench: Bench) -> None:
        while bench.unbound(bench.a, 2) < 1023:
            pass
        assert bench.op(bench.b, EvtchnOp.BIND_INTERDOMAIN, 1, 1023, 0)[0] == 0
        bench.op(bench.b, EvtchnOp.SEND, 1)
        page = bench.xen.memory.frame(bench.a.shared_info_mfn)
        assert bytes(page[4:8]) == bytes((0, 0, 0, 0x80)) == bytes(page[2048 + 124 : 2048 + 128])

    def test_unmask_of_a_free_port_does_nothing(self, bench: Bench) -> None:
        set_byte(bench.xen, bench.a, 2176, 0xFF)
        assert bench.op(bench.a, EvtchnOp.UNMASK, 3)[0] == 0
        assert bits(bench.xen, bench.a) == (0, 0xFF, 0, 0)

    def test_the_control_domain_hears_that_a_domain_ended(self, bench: Bench) -> None:
        for domain in (bench.control, bench.a):
            assert bench.op(domain, EvtchnOp.BIND_VIRQ, Virq.DOM_EXC, 0, 0)[3] == 1
        bench.xen.crash(bench.b.vcpus[0], "by this test")
        assert bits(bench.xen, bench.control) == (2, 0, 1, 1)
        assert bits(bench.xen, bench.a) == (0, 0, 0, 0)
        set_byte(bench.xen, bench.control, 2048, 0)
        bench.xen.destroy(bench.b)
        assert bits(bench.xen, bench.control)[0] == 2


class TestCallbacksAndSleep:
    @pytest.mark.parametrize("cs", [FLAT_RING1_CS, FLAT_RING1_CS - 1])
    def test_both_ways_to_register(self, cs: int, bench: Bench) -> None:
        vcpu, calls = bench.a.vcpus[0], bench.xen.hypercalls.handlers
        assert bench.call(bench.a, calls[Hypercall.set_callbacks], cs, 0x1234, 0, 0) == 0
        assert vcpu.event_callback is not None
        assert (vcpu.event_callback.cs, vcpu.event_callback.eip) == (FLAT_RING1_CS, 0x1234)
        for kind, eip in ((CallbackType.EVENT, 0x5678), (CallbackType.FAILSAFE, 0x9ABC)):
            bench.xen.guest_memory.write_words(vcpu, SCRATCH, (kind, cs, eip))
            assert bench.call(bench.a, calls[Hypercall.callback_op], CallbackOp.REGISTER, SCRATCH) == 0
            assert bench.call(bench.a, calls[Hypercall.callback_op], CallbackOp.UNREGISTER, SCRATCH) == -Errno.EINVAL
        assert vcpu.event_callback.eip == 0x5678

    def test_refused_callbacks(self, bench: Bench) -> None:
        callback_op = bench.xen.hypercalls.handlers[Hypercall.callback_op]
        # SYSCALL's is for 64-bit kernels, and the old number of SYSENTER's is gone.
        for kind in (2, 3, 6, 8, 0xFFFF):
            bench.xen.guest_memory.write_words(bench.a.vcpus[0], SCRATCH, (kind, 0, 0))
            for command in CallbackOp:
                assert bench.call(bench.a, callback_op, command, SCRATCH) == -Errno.ENOSYS
        assert bench.call(bench.a, callback_op, 2, SCRATCH) == -Errno.EINVAL
        for command in CallbackOp:
            assert bench.call(bench.a, callback_op, command, NOWHERE) == -Errno.EFAULT

    def poll(
        self, bench: Bench, *ports: int, count: int | None = None, timeout: int = 0, at: int = SCRATCH + 32
    ) -> int:
        how_many = len(ports) if count is None else count
        bench.xen.guest_memory.write(
            bench.a.vcpus[0],
            SCRATCH,
            struct.pack("<IIQ", at, how_many, timeout).ljust(32) + struct.pack(f"<{len(ports)}I", *ports),
        )
        return bench.call(bench.a, bench.xen.services.sched_op, SchedOp.POLL, SCRATCH)

    def test_refused_polls(self, bench: Bench) -> None:
        assert self.poll(bench, count=129) == -Errno.EINVAL
        assert self.poll(bench, 1024) == -Errno.EINVAL
        assert self.poll(bench, count=1, at=NOWHERE) == -Errno.EFAULT
        assert bench.call(bench.a, bench.xen.services.sched_op, SchedOp.POLL, NOWHERE) == -Errno.EFAULT
        assert bench.a.vcpus[0].run_state is RunState.RUNNABLE

    @pytest.mark.parametrize("polled", [(), (1,), (2,), (1, 2), (3, 3)])
    def test_poll_wakes_for_its_port_or_if_several_for_any(self, polled: tuple[int, ...], bench: Bench) -> None:
        vcpu = bench.a.vcpus[0]
        set_byte(bench.xen, bench.a, 1, 1)
        set_byte(bench.xen, bench.a, 2176, 0xFF)
        ours = [bench.connect(bench.a, bench.b)[1] for _ in range(2)]
        assert self.poll(bench, *polled) == 0
        assert vcpu.run_state is RunState.BLOCKED
        bench.op(bench.b, EvtchnOp.SEND, ours[0])
        assert (vcpu.run_state is RunState.BLOCKED) == (polled == (2,))
        bench.op(bench.b, EvtchnOp.SEND, ours[1])
        assert (vcpu.run_state, vcpu.polling) == (RunState.RUNNABLE, 0)
        assert self.poll(bench, 1) == 0
        assert vcpu.run_state is RunState.RUNNABLE, "it is pending"

    def test_nobody_sleeps_over_an_event(self, bench: Bench) -> None:
        vcpu, (_port, ours) = bench.a.vcpus[0], bench.connect(bench.a, bench.b)
        bench.op(bench.b, EvtchnOp.SEND, ours)
        set_byte(bench.xen, bench.a, 1, 1)
        assert bench.call(bench.a, bench.xen.services.sched_op, SchedOp.BLOCK, 0) == 0
        assert vcpu.run_state is RunState.RUNNABLE
        assert bench.xen.memory.frame(bench.a.shared_info_mfn)[1] == 0
        assert self.poll(bench, 9) == 0
        assert vcpu.run_state is RunState.RUNNABLE


@dataclass
class Model:
    """What must become of sends and masks, without words and selectors: two ports, one receiver."""

    pending: set[int] = field(default_factory=set)
    masked: set[int] = field(default_factory=set)
    closed: bool = False
    raised: bool = False
    depth: int = 0
    served: list[tuple[int, ...]] = field(default_factory=list)

    def do(self, action: str) -> None:
        kind, port = action[:-1], int(action[-1])
        if kind == "send" and port not in self.pending:
            self.pending.add(port)
            self.raised |= port not in self.masked
        elif kind == "mask":
            self.masked.add(port)
        elif kind == "unmask":
            self.raised |= port in self.masked and port in self.pending
            self.masked.discard(port)
        elif kind == "close":
            self.closed = bool(port)
        elif kind == "finish" and self.depth:
            self.served.append(tuple(sorted(self.pending - self.masked)))
            self.pending &= self.masked
            self.raised = self.closed = False
            self.depth -= 1
        if self.raised and not self.closed:
            self.depth += 1
            self.closed = True


class Receiver(Bench):
    """Domain a with a callback whose instructions are done by hand, and two senders."""

    def __init__(self) -> None:
        super().__init__()
        self.xen.trace = None
        self.ports = [self.connect(self.a, sender) for sender in (self.control, self.b)]
        self.vcpu = self.a.vcpus[0]
        self.xen.current = self.vcpu
        self.xen.cpu.load(self.vcpu.state)
        self.xen.pick_needed = False
        self.page = self.xen.memory.frame(self.a.shared_info_mfn)
        self.page[1] = 0
        self.vcpu.state.esp = SCRATCH + 0x800
        set_callbacks = self.xen.hypercalls.handlers[Hypercall.set_callbacks]
        self.call(self.a, set_callbacks, FLAT_RING1_CS, SCRATCH + 0x100)
        self.xen.guest_memory.write_words(self.vcpu, SCRATCH, (1,))
        self.start = self.vcpu.state.save(), bytes(self.page)

    def begin(self) -> None:
        registers, self.page[:] = self.start
        self.vcpu.state.restore(registers)
        self.frames: list[tuple[int, int]] = []
        self.served: list[tuple[int, ...]] = []

    def trap(self, number: int, *arguments: int) -> None:
        """A hypercall; what it may have changed of the registers is forgotten, but for an upcall's work."""
        state = self.vcpu.state
        state.eax, state.ebx, state.ecx = number, *(*arguments, 0, 0)[:2]
        self.xen.trap(HYPERCALL_VECTOR, 0, 0)

    def do(self, action: str) -> None:
        kind, port = action[:-1], int(action[-1])
        before = self.vcpu.state.eip, self.vcpu.state.esp
        if kind == "send":
            self.xen.events.send((self.control, self.b)[port - 1], self.ports[port - 1][1])
            self.xen.events.upcall(self.vcpu)
        elif kind == "mask":
            self.page[2176] |= 1 << port
            self.trap(Hypercall.xen_version)
        elif kind == "unmask":
            self.xen.guest_memory.write_words(self.vcpu, SCRATCH, (port,))
            self.trap(Hypercall.event_channel_op, EvtchnOp.UNMASK, SCRATCH)
        elif kind == "close":
            self.page[1] = port
            self.trap(Hypercall.xen_version)
        elif self.frames:
            before = self.frames.pop()
            self.finish()
        if self.vcpu.state.esp != before[1]:
            # An upcall, and one only: three words on the stack, events masked.
            assert (self.vcpu.state.esp, self.vcpu.state.eip) == (before[1] - 12, SCRATCH + 0x100)
            assert self.page[1] == 1
            self.frames.append(before)
        else:
            assert self.vcpu.state.eip == before[0]

    def finish(self) -> None:
        self.page[0] = self.page[4] = 0
        found = self.page[2048] & ~self.page[2176]
        self.page[2048] &= ~found & 0xFF
        self.served.append(tuple(port for port in (1, 2) if found >> port & 1))
        self.vcpu.state.esp -= 4
        self.trap(Hypercall.iret)


ACTIONS = ("send1", "send2", "mask1", "unmask1", "close1", "close0", "finish0")
LENGTH = 5


class TestEveryOrder:
    """All sequences of `LENGTH` actions of two senders and a receiver, each against the model, step by step."""

    @pytest.fixture
    def auditor(self) -> None:
        """Not here: the frames of memory do not change, and there are a hundred thousand calls."""

    def test_none_is_lost_and_none_doubled(self, auditor: None) -> None:
        real = Receiver()
        for sequence in product(ACTIONS, repeat=LENGTH):
            real.begin()
            model = Model()
            for action in (*sequence, "unmask1", "close0", *["finish0"] * (LENGTH + 2)):
                real.do(action)
                model.do(action)
                state = len(real.frames), real.page[0], real.page[1], real.page[2048], real.served
                bits = sum(1 << port for port in model.pending)
                assert state == (model.depth, model.raised, model.closed, bits, model.served), (sequence, action)
            assert not real.frames
            assert not model.pending
            for port in (1, 2):
                sent = sequence.count(f"send{port}")
                assert min(sent, 1) <= sum(port in served for served in real.served) <= sent


IMAGES: dict[tuple[str, PagingMode], Image] = {}


def image(source: str, mode: PagingMode) -> Image:
    if (source, mode) not in IMAGES:
        IMAGES[source, mode] = image_from_source(source, mode=mode)
    return IMAGES[source, mode]


@dataclass
class Running:
    """A guest that serves events at ports 1 and 2, which come from two senders that are held still or run."""

    xen: Hypervisor
    domain: Domain
    senders: list[Domain]

    @property
    def vcpu(self) -> Vcpu:
        return self.domain.vcpus[0]

    def word(self, name: str, offset: int = 0) -> int:
        return self.xen.guest_memory.read_word(self.vcpu, self.domain.symbols[name] + offset)

    @property
    def served(self) -> tuple[int, int]:
        return self.word("served", 4), self.word("served", 8)

    @property
    def upcalls(self) -> list[Any]:
        assert self.xen.trace is not None
        return self.xen.trace.events(Kind.UPCALL)

    def send(self, sender: int, at: int | None = None) -> None:
        now = self.xen.now if at is None else at
        self.xen.inputs.submit(now, Send(self.senders[sender].domid, 1))


def running(
    source: str, mode: PagingMode, portable: bool = False, sender: str | None = None, length: int = 100_000
) -> Running:
    """A receiver whose ports 1 and 2 are bound to port 1 of each sender; without ``sender`` these stay paused."""
    machine = Machine(memory_mib=8, portable=portable)
    xen = Hypervisor(machine, scheduler=RoundRobin(length), trace=Trace())
    domain, *senders = (boot(xen, image(text, mode)) for text in (source, *[sender or IDLE] * 2))
    bench = Bench.__new__(Bench)
    bench.xen = xen
    for other in senders:
        set_byte(xen, other, 1, 1)
        # The receiver's argument has to stand in its memory, at a place that it does not need later.
        words = (DOMID_SELF | other.domid << 16, 0)
        place = domain.symbols["stack"] - 64
        xen.guest_memory.write_words(domain.vcpus[0], place, words)
        assert not xen.events.event_channel_op(domain.vcpus[0], EvtchnOp.ALLOC_UNBOUND, place)
        port = xen.guest_memory.read_word(domain.vcpus[0], place + 4)
        place = other.symbols["port"] if sender else SCRATCH
        xen.guest_memory.write_words(other.vcpus[0], place, (domain.domid, port, 0))
        assert not xen.events.event_channel_op(other.vcpus[0], EvtchnOp.BIND_INTERDOMAIN, place)
        xen.guest_memory.write_words(other.vcpus[0], place, (1,))
        if not sender:
            xen.pause(other)
    return Running(xen, domain, senders)


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


MASKS_ITS_EVENTS = receiver(MASKS)


def check_after(guest: Running, sent: tuple[int, int]) -> None:
    """All was served, the callback was left as often as it was entered, and the interrupted code noticed nothing."""
    assert guest.xen.run(20_000).stop is Stop.IDLE
    assert not guest.domain.ended, guest.domain.report
    for served, most in zip(guest.served, sent, strict=True):
        assert min(1, most) <= served <= most
    pending, _mask, _selector, upcall = bits(guest.xen, guest.domain)
    assert (pending, upcall, guest.word("depth"), guest.vcpu.state.edi) == (0, 0, 0, 4)
    assert guest.vcpu.state.esp == guest.domain.symbols["stack"]
    assert guest.word("upcalls") == len(guest.upcalls) <= sum(sent)


class Again:
    """One machine, put back to its beginning again and again."""

    def __init__(self, mode: PagingMode, portable: bool = False) -> None:
        self.guest = running(MASKS_ITS_EVENTS, mode, portable)
        xen = self.guest.xen
        self.saved, self.memory = xen.snapshot(), bytes(xen.memory.bytes)
        assert xen.run(10_000).stop is Stop.IDLE
        # How many instructions the receiver executes when nothing is sent; then it sleeps, and time stands still.
        self.length = xen.now

    def begin(self) -> Running:
        xen = self.guest.xen
        xen.memory.bytes[:] = self.memory
        xen.forget_caches()
        xen.inputs.log.clear()
        xen.restore(self.saved)
        assert xen.trace is not None
        xen.trace.clear()
        return self.guest


class TestEveryMoment:
    """Events from outside before any instruction of a receiver that masks and unmasks."""

    @pytest.fixture
    def auditor(self) -> None:
        """Not here: page tables do not change, and there are a hundred thousand calls."""

    def test_one_event(self, mode: PagingMode, portable: bool, auditor: None) -> None:
        again = Again(mode, portable)
        for time in range(again.length + 1):
            guest = again.begin()
            guest.send(0, time)
            check_after(guest, (1, 0))

    @pytest.mark.parametrize("second", [0, 1], ids=["same port", "two ports"])
    def test_two_events(self, second: int, mode: PagingMode, auditor: None) -> None:
        again = Again(mode)
        for times in combinations_with_replacement(range(again.length + 1), 2):
            guest = again.begin()
            guest.send(0, times[0])
            guest.send(second, times[1])
            check_after(guest, (1, 1) if second else (2, 0))


FAR = "FLAT_RING1_CS"
# Leaves for ring 3, where it counts in EDI until three events were served.
IN_RING_3 = """
        mov ebx, FLAT_RING1_DS
        mov ecx, offset stack
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        push FLAT_RING3_SS
        push offset ustack
        push 0x202
        push FLAT_RING3_CS
        push offset user_start
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82
"""
USER = """
        .align 4096
user_start:
        mov eax, FLAT_RING3_DS
        mov ds, eax
count:  inc edi
        jmp count
        .skip 256
ustack:
        .align 4096
user_end:
"""

# What is prepared, the callback, its segment, and what the report says.
WILD = {
    "stack": ("mov esp, 0x1000", "offset callback", FAR, "the frame for an event"),
    "stack in the hypervisor": ("mov esp, 0xff000000", "offset callback", FAR, "the frame for an event"),
    "stack in a page table": (
        "mov esp, [esi + 60]\n add esp, 64",
        "offset callback",
        FAR,
        "the frame for an event",
    ),
    "address": ("nop", "0x1000", FAR, "14 (#PF page fault) at address 0x00001000"),
    "data of the hypervisor": ("nop", "0xff000000", FAR, "no handler registered for it"),
    "segment": (
        "nop",
        "offset callback",
        "FLAT_RING1_DS",
        "for an event has the unusable code selector",
    ),
    "null segment": ("nop", "offset callback", "0", "for an event has the unusable code selector"),
    "ring 3": ("nop", "offset callback", "FLAT_RING3_CS", "the handler's ring 3 is less privileged than ring 1"),
}


class TestGuests:
    def test_the_frame(self, mode: PagingMode, portable: bool) -> None:
        guest = running(receiver("mov byte ptr [shared_info + 1], 0\nspin: inc edi\n jmp spin"), mode, portable)
        guest.send(0, 101)
        guest.xen.run(102)
        (event,) = guest.upcalls
        eip, cs, flags = event.words
        assert (event.time, event.domain, event.from_ring, event.to_ring) == (101, 0, 1, 1)
        assert event.handler == guest.domain.symbols["callback"]
        assert event.frame == guest.domain.symbols["stack"] - 12
        assert eip in (guest.domain.symbols["spin"], guest.domain.symbols["spin"] + 1)
        assert (cs, flags & 0x200) == (FLAT_RING1_CS, 0x200)
        assert guest.xen.memory.frame(guest.domain.shared_info_mfn)[1] == 1

    def test_from_ring_3_it_goes_to_the_kernels_stack(self, mode: PagingMode, portable: bool) -> None:
        guest = running(receiver(IN_RING_3) + USER, mode, portable)
        for time in (300, 500):
            guest.send(0, time)
        guest.xen.run(1000)
        assert [(event.from_ring, event.to_ring, len(event.words)) for event in guest.upcalls] == [(3, 1, 5)] * 2
        assert (guest.served, guest.vcpu.state.cpl) == ((2, 0), 3)
        assert guest.vcpu.state.edi > 200

    def test_while_masked_nothing_comes_and_then_once(self, mode: PagingMode, portable: bool) -> None:
        body = "spin: inc edi\n cmp edi, 200\n jb spin\n mov byte ptr [shared_info + 1], 0\n nop\n" + (
            "call_xen __HYPERVISOR_xen_version"
        )
        guest = running(receiver(body), mode, portable)
        for time in (50, 100, 150):
            guest.send(0, time)
        assert guest.xen.run(2000).stop is Stop.IDLE
        assert (guest.served, guest.vcpu.state.edi) == ((1, 0), 200)
        (event,) = guest.upcalls
        assert event.time > 600, "the loop took that long, and the trap behind it brought the event"

    def test_nested(self, mode: PagingMode, portable: bool) -> None:
        inside = """
        mov byte ptr [shared_info + 1], 0
        push ebx
        mov eax, __HYPERVISOR_xen_version
        mov ebx, 0
        mov ecx, 0
        int 0x82
        pop ebx
        mov byte ptr [shared_info + 1], 1
"""
        body = "mov byte ptr [shared_info + 1], 0\nspin: inc edi\n cmp edi, 50\n jb spin"
        guest = running(receiver(body, inside), mode, portable)
        guest.send(0, 50)
        guest.send(1, 74)
        assert guest.xen.run(2000).stop is Stop.IDLE
        assert guest.served == (1, 1)
        assert (guest.word("deepest"), guest.word("depth")) == (2, 0)

    def test_it_sleeps_until_an_event_comes(self, mode: PagingMode, portable: bool) -> None:
        guest = running(receiver(), mode, portable)
        assert guest.xen.run(1000).stop is Stop.IDLE
        for times in range(1, 4):
            guest.xen.submit(Send(guest.senders[0].domid, 1))
            assert guest.xen.run(1000).stop is Stop.IDLE
            assert (guest.served, guest.word("woken")) == ((times, 0), times)

    def test_before_there_is_a_callback_events_wait(self, mode: PagingMode) -> None:
        guest = running("start: inc edi\n jmp start\n .skip 4096\n stack:", mode)
        guest.send(0, 50)
        guest.xen.run(200)
        assert not guest.domain.ended
        assert (guest.upcalls, bits(guest.xen, guest.domain)[3]) == ([], 1)

    def test_a_store_to_a_page_table_is_not_interrupted(self, mode: PagingMode, portable: bool) -> None:
        tables = len(mode.levels) - 1
        guest = running(receiver(STORES_TO_A_TABLE.format(tables_before=4096 * tables)), mode, portable)
        assert guest.xen.run(1000).stop is Stop.IDLE
        assert not guest.domain.ended, guest.domain.report
        assert guest.xen.trace is not None
        (store,) = guest.xen.trace.events(Kind.TABLE_WRITE)
        assert (len(store.changes), store.kept) == (1, True)
        (event,) = guest.upcalls
        assert event.words[0] > guest.domain.symbols["stored"]

    @pytest.mark.parametrize("length", [1, 7, 100])
    def test_a_storm_leaves_the_receiver_its_turns(self, length: int, mode: PagingMode, portable: bool) -> None:
        body = "mov byte ptr [shared_info + 1], 0\nspin: inc edi\n jmp spin"
        guest = running(receiver(body), mode, portable, SENDER, length)
        guest.xen.run(6_000)
        assert not any(domain.ended for domain in guest.xen.domains.values())
        sent = [sender.vcpus[0].state.esi for sender in guest.senders]
        assert all(0 < served <= count for served, count in zip(guest.served, sent, strict=True))
        assert guest.word("upcalls") <= len(guest.upcalls) <= guest.word("upcalls") + 1
        # A third of the turns is its own.
        assert guest.xen.trace is not None
        turns = [event.to_vcpu for event in guest.xen.trace.events(Kind.SWITCH)]
        assert turns.count(guest.vcpu.key) >= len(turns) // 3 - 1

    def test_a_storm_does_not_stop_a_bystander(self, mode: PagingMode) -> None:
        guest = running(receiver(), mode, sender=SENDER, length=500)
        bystander = boot(guest.xen, image("start: inc eax\n jmp start", mode), mode=mode)
        guest.xen.run(16_000)
        assert bystander.vcpus[0].state.eax > 1_500

    def test_a_timeline_replays_it(self, mode: PagingMode) -> None:
        body = "mov byte ptr [shared_info + 1], 0\nspin: inc edi\n jmp spin"
        guest = running(receiver(body), mode, sender=SENDER, length=50)
        timeline = Timeline(guest.xen, interval=500)
        timeline.run(1234)
        timeline.submit(Send(guest.senders[1].domid, 1))
        timeline.run(3000)
        after, events, ports = timeline.machine_hash(), timeline.events(), dict(guest.domain.ports)
        assert sum(event.kind is Kind.UPCALL for event in events) > 10
        timeline.submit(Destroy(guest.senders[1].domid))
        timeline.run(100)
        assert guest.domain.ports != ports
        for goal in (700, 1234, 2001):
            timeline.seek(goal)
            assert timeline.hypervisor.domains[0].ports == ports
        timeline.seek(4234)
        assert (timeline.machine_hash(), timeline.events()) == (after, events)

    @pytest.mark.parametrize("name", WILD)
    def test_a_callback_that_cannot_be_entered_ends_its_guest_alone(
        self, name: str, mode: PagingMode, portable: bool
    ) -> None:
        prepare, callback, cs, report = WILD[name]
        text = f"""
start:  mov byte ptr [shared_info + 1], 0
        {prepare}
        mov ebx, {cs}
        mov ecx, {callback}
        mov eax, __HYPERVISOR_set_callbacks
        int 0x82
spin:   jmp spin
callback: jmp callback
        .skip 4096
stack:
"""
        guest = running(text, mode, portable)
        other = boot(guest.xen, image("start: inc eax\n jmp start", mode))
        guest.send(0, 100)
        guest.xen.run(2000)
        assert guest.domain.crashed
        assert report in guest.domain.report
        assert other.vcpus[0].state.eax > 500
        guest.xen.destroy(guest.domain)
        assert guest.senders[0].ports[1].status == EvtchnStatus.UNBOUND
