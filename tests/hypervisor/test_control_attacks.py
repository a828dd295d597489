"""Hostile guests against time, breakpoints, gates, callbacks and ports.

Each test says what is attacked (background), what must hold (invariant), and how (construction).  The auditor looks at
the whole machine after every hypercall (see `conftest`).
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hostile_guest import FRAMES_OVER_CODE, machine, suffer
from hypercall_bench import SCRATCH, Bench

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import Hypercall, SchedOp, Shutdown
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.bounce import XenBounce
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.domain import Domain, RunState
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import TWO_LEVEL, PagingMode
from xenlab.timeline import Timeline

MS, SECOND = 100_000, 100_000_000  # instructions
TABLE = """
        mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
"""


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    """Each kind of CPU."""
    return bool(request.param)


def batch(bench: Bench, *calls: tuple[int, ...]) -> int:
    """Several hypercalls as one; their array stands behind `SCRATCH`."""
    entries = [struct.pack("<8I", call[0], 0, *call[1:], *(0,) * (7 - len(call))) for call in calls]
    bench.write(SCRATCH + 1024, b"".join(entries))
    return bench.call(Hypercall.multicall, SCRATCH + 1024, len(calls))


def replayed(text: str, interval: int, end: int, mode: PagingMode = TWO_LEVEL) -> Domain:
    """A guest that has run, and run again, forwards and backwards, with the same machine at each of many times."""
    xen = Hypervisor(Machine(memory_mib=4))
    guest = boot(xen, text, mode=mode)
    timeline = Timeline(xen, interval=interval, snapshots=30)
    hashes = {}
    while timeline.position < end:
        timeline.run(97)
        hashes[timeline.position] = timeline.machine_hash()
    assert not guest.ended, guest.report
    for time in [*reversed(hashes), *hashes]:
        timeline.seek(time)
        assert timeline.machine_hash() == hashes[time], time
    return guest


class TestTime:
    def test_both_watchdogs_at_once(self) -> None:
        """Background: the end of a domain takes its timers away, while those that are due are gone through.

        Invariant: a domain ends once, and takes nobody with it.
        Construction: both watchdogs set in one batch, so for the same instruction.
        """
        bench = Bench()
        bench.write(SCRATCH, struct.pack("<II", 0, 1))
        assert batch(bench, *[(Hypercall.sched_op, SchedOp.WATCHDOG, SCRATCH)] * 2) == 0
        assert bench.domain.watchdogs == 3
        bench.xen.run(2 * SECOND)
        assert bench.domain.shutdown is Shutdown.WATCHDOG
        assert not any(bench.xen.timers.state()[3:])

    def test_polling_port_0(self) -> None:
        """Background: port 0 is never in use, and 0 stands for a vCPU that does not poll.

        Invariant: a poll with a limit ends.
        """
        bench = Bench()
        bench.write(SCRATCH, struct.pack("<IIQI", SCRATCH + 16, 1, 50 * 1_000_000, 0))
        assert bench.call(Hypercall.sched_op, SchedOp.POLL, SCRATCH) == 0
        assert bench.vcpu.run_state is RunState.BLOCKED
        assert bench.xen.run(100 * MS).stop is Stop.BUDGET
        assert bench.vcpu.run_state is RunState.RUNNABLE


RETURN = f"""
start:  {TABLE}
        push FLAT_RING3_SS
        push offset stack
        push 0x202
        push 0x103
        push offset user_start
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82
        .align 4
table:  .byte 13, 0
        .short FLAT_RING3_CS
        .long user_start
        .long 0, 0
        .align 4096
user_start: mov eax, [esp]
        mov ebx, [esp + 4]
again:  inc ecx
        mov edx, cs
        jmp again
        .skip 256
stack:  .align 4096
user_end:
"""


@pytest.mark.parametrize("bounce", [None, XenBounce()], ids=["own", "part"])
def test_a_failed_return_handled_by_the_application(bounce: Any, mode: PagingMode, portable: bool) -> None:
    """Background: a return that fails raises its exception where it would have gone, while the CPU is still in ring 1.

    Invariant: code of ring 3 runs in ring 3.
    Construction: a return to ring 3 by a code selector without a descriptor, and a handler of #GP in ring 3.
    """
    xen = Hypervisor(Machine(memory_mib=4, portable=portable), bounce=bounce)
    guest = boot(xen, RETURN, mode=mode)
    xen.run(200)
    state = guest.vcpus[0].state
    assert state.ecx > 20
    assert (state.cpl, state.edx & 3, state.segment("ss").selector & 3) == (3, 3, 3)
    assert (state.eax, state.ebx) == (0x100, guest.symbols["user_start"])  # the frame: error code, and EIP


def test_a_failed_return_with_a_bad_stack_too(mode: PagingMode, portable: bool) -> None:
    text = RETURN.replace("push FLAT_RING3_SS", "push 0x10b")
    xen = Hypervisor(Machine(memory_mib=4, portable=portable))
    guest = boot(xen, text, mode=mode)
    xen.run(200)
    assert "unusable stack selector 0x10b" in guest.report


class TestBreakpoints:
    def test_on_the_handler_of_breakpoints(self, mode: PagingMode, portable: bool) -> None:
        """Background: a breakpoint on execution comes before its instruction, when no time has passed.

        Invariant: a guest cannot stop time.
        Construction: a breakpoint on the first instruction of the handler of breakpoints, with a long stack.
        """
        text = f"""
start:  {TABLE}
        mov esp, offset top
        mov eax, offset handler
        mov dr0, eax
        mov eax, 2
        mov dr7, eax
        jmp handler
        .align 4
table:  .byte 1, 0
        .short FLAT_RING1_CS
        .long handler
        .long 0, 0
        .align 4096
        .skip 0x40000
top:    .align 4096
handler: inc ebx
        jmp handler
"""
        xen = Hypervisor(Machine(memory_mib=4, portable=portable), trace=Trace())
        guest = boot(xen, text, mode=mode)
        assert xen.run(500).stop is Stop.IDLE
        assert "triple fault" in guest.report
        assert xen.trace is not None
        assert len(xen.trace.events(Kind.DELIVER)) == 3

    # A hit behind a load of SS waits for the instruction behind; each round of the loop has one.
    WAITING = f"""
start:  {TABLE}
        mov eax, offset data
        mov dr0, eax
        mov eax, 0xf0002
        mov dr7, eax
again:  mov ss, [data]
        {{behind}}
        inc ecx
        jmp again
handler: inc edi
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4
data:   .long FLAT_RING1_DS
table:  .byte 1, 0
        .short FLAT_RING1_CS
        .long handler
        .long 0, 0
"""

    @pytest.mark.parametrize("interval", [13, 37])
    def test_a_hit_that_waits_is_replayed(self, interval: int) -> None:
        """Invariant: what waits between two instructions is part of the machine.

        Construction: snapshots every few instructions, also between hit and exception.
        """
        state = replayed(self.WAITING.format(behind="nop"), interval, 500).vcpus[0].state
        assert state.edi > 20

    @pytest.mark.parametrize("behind", ["nop", "int 0x82"])
    def test_a_hit_that_waits_is_not_lost(self, behind: str, portable: bool) -> None:
        """Background: the instruction behind the load of SS may be a hypercall, or another guest be next.

        Invariant: each hit is one exception.
        """
        xen = Hypervisor(Machine(memory_mib=8, portable=portable), scheduler=RoundRobin(5))
        guests = [boot(xen, self.WAITING.format(behind=behind)) for _ in range(2)]
        xen.run(1200)
        for guest in guests:
            assert not guest.ended, guest.report
            state = guest.vcpus[0].state
            assert state.ecx > 20
            assert abs(state.edi - state.ecx) <= 1

    def test_on_a_handler_of_faults_at_fetching(self, portable: bool) -> None:
        """Background: a fault at fetching takes no time, so that the handler's first instruction is in the same step.

        Invariant: a breakpoint there is hit nevertheless.
        """
        text = f"""
start:  {TABLE}
        mov eax, offset fault
        mov dr0, eax
        mov eax, 2
        mov dr7, eax
        mov eax, 0x1000
        jmp eax
fault:  inc ecx
        jmp fault
hit:    inc edi
        xor eax, eax
        mov dr7, eax
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4
table:  .byte 1, 0
        .short FLAT_RING1_CS
        .long hit
        .byte 14, 0
        .short FLAT_RING1_CS
        .long fault
        .long 0, 0
"""
        xen = Hypervisor(Machine(memory_mib=4, portable=portable))
        guest = boot(xen, text)
        xen.run(100)
        state = guest.vcpus[0].state
        assert (guest.ended, state.edi) == (False, 1)
        assert state.ecx > 20


# Sends itself an event, whose bit stands in the immediate operand of an instruction that it executes.
EVENT_BITS = """
start:  mov edi, 11
1:      mov ecx, offset ipi
        mov ebx, EVTCHNOP_bind_ipi
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        dec edi
        jne 1b
        {move}
        mov byte ptr [PLACE], 0xb9
        mov byte ptr [PLACE + 5], 0xc3
        mov ebp, offset PLACE
again:  mov dword ptr [PLACE + 1], 0
        {clear}
        call ebp
        mov ecx, offset port
        mov ebx, EVTCHNOP_send
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        nop
        nop
        nop
        call ebp
        add [sum], ecx
        jmp again
        .align 4
ipi:    .long 0, 0
port:   .long 9
sum:    .long 0
        .align 4096
own:    .skip 4096
"""
# The same with the record of the vCPU in a page of its own: the selector's lowest bit is where the operand is.
MOVE = """
        mov eax, [esi + 68]
        mov ecx, offset own - 0xC0000000
        shr ecx, 12
        mov eax, [eax + ecx * 4]
        mov [request], eax
        mov edx, offset request
        xor ecx, ecx
        mov ebx, 10
        mov eax, __HYPERVISOR_vcpu_op
        int 0x82
        jmp 2f
        .align 4
request: .long 0, 0, 64, 0
2:
"""


class TestCode:
    """Background: the CPU does not notice that Python writes over code that it has translated.

    Invariant: how long old code goes on being executed is the same in every replay.
    """

    @pytest.mark.parametrize("interval", [37, 101, 700])
    def test_frames_that_the_cpu_pushes_by_a_gate(self, interval: int, mode: PagingMode) -> None:
        """Construction: the frame of a direct system call lies over a function that is called before and after."""
        replayed(FRAMES_OVER_CODE.format(enter="int 0x80", vector=0x80, flags=1), interval, 2500, mode)

    @pytest.mark.parametrize("interval", [37, 101])
    def test_event_bits(self, interval: int) -> None:
        """Construction: the words of pending bits in the shared page are a function."""
        text = EVENT_BITS.format(move="", clear="").replace("PLACE", "shared_info + 2048")
        guest = replayed(text, interval, 1500)
        assert guest.ports[9]

    @pytest.mark.parametrize("interval", [37, 101])
    def test_a_record_of_the_guests_own(self, interval: int) -> None:
        """Construction: `vcpu_info` moved into a page of code; its selector is an operand."""
        clear = "mov dword ptr [shared_info + 2048], 0\n mov byte ptr [own + 64], 0"
        text = EVENT_BITS.format(move=MOVE, clear=clear).replace("PLACE", "own + 67")
        guest = replayed(text, interval, 1500)
        assert guest.vcpus[0].info_mfn


class TestNmi:
    def test_in_a_batch_that_is_called_again(self, mode: PagingMode) -> None:
        """Background: a batch that used up its allowance sets EIP back, so that the guest makes the call again.

        Invariant: what is set back is the caller's EIP, and the whole batch is done.
        Construction: an NMI first, and more calls behind it than one allowance covers.
        """
        text = f"""
start:  {TABLE}
        mov edi, offset calls
        mov edx, 2000
1:      mov dword ptr [edi], __HYPERVISOR_sched_op_compat
        add edi, 32
        dec edx
        jne 1b
        mov dword ptr [calls], __HYPERVISOR_vcpu_op
        mov dword ptr [calls + 8], 11
        mov ebx, offset calls
        mov ecx, 2000
        mov eax, __HYPERVISOR_multicall
        int 0x82
        mov [answer], eax
        jmp .
handler: inc dword ptr [count]
        jmp hypercall_page + 32 * __HYPERVISOR_iret
        .align 4
answer: .long 1
count:  .long 0
table:  .byte 2, 0
        .short FLAT_RING1_CS
        .long handler
        .long 0, 0
        .align 4096
calls:  .skip 64000
"""
        xen = Hypervisor(Machine(memory_mib=4))
        guest = boot(xen, text, mode=mode)
        xen.run(10_000)
        vcpu, read = guest.vcpus[0], xen.guest_memory.read_word
        assert not guest.ended, guest.report
        assert [read(vcpu, guest.symbols[name]) for name in ("count", "answer")] == [1, 0]


class TestPorts:
    @pytest.mark.parametrize("instruction", ["insb", "insd", "outsd"])
    def test_four_thousand_million_rounds(self, instruction: str, portable: bool) -> None:
        """Background: a trap counts as one instruction, however many rounds of it are done.

        Invariant: a round is not much cheaper in time than any other trap.
        """
        text = f"""
start:  mov ebx, 6
        mov ecx, offset level
        mov eax, __HYPERVISOR_physdev_op
        int 0x82
        mov ecx, -1
        mov edi, offset room
        mov esi, edi
        rep {instruction}
level:  .long 1
        .align 4096
room:   .skip 0x10000
"""
        xen = Hypervisor(Machine(memory_mib=4, portable=portable))
        guest = boot(xen, text)
        xen.run(30)
        assert not guest.ended
        assert 0 < 2**32 - 1 - guest.vcpus[0].state.ecx <= 30 * 32


TARGETS = {
    "their page": "THEIR_PAGE",
    "their shared page": "THEIR_SHARED_PAGE",
    "their descriptors": "THEIR_DESCRIPTORS",
    "the flat descriptors": "FLAT_DESCRIPTORS",
    "the list of numbers": "NUMBER_LIST",
    "no frame": "NO_FRAME",
}
# `one` becomes the page of the vCPU's record.
OWN_RECORD = """
        mov eax, offset one
        call mfn_of
        mov [record], eax
        mov edx, offset record
        xor ecx, ecx
        mov ebx, 10
        mov eax, __HYPERVISOR_vcpu_op
        int 0x82
        call note
"""
RECORD = """
        jmp finish
        .align 8
record: .long 0, 0, 64, 0
"""
# What is then done to that page, and what it answers.
AFTERWARDS = {
    "given up": ("mov edx, [record]\n mov eax, XENMEM_decrease_reservation\n call memory\n call note", (1,)),
    "given up and unmapped": (
        """
        mov edx, [record]
        mov eax, XENMEM_decrease_reservation
        call memory
        call note
        mov eax, offset one
        xor edx, edx
        xor ecx, ecx
        call map
        call note
        """,
        (1, 0),
    ),
    "made a page table": (
        """
        mov eax, offset one
        mov edx, [record]
        mov ecx, 1
        call map
        call note
        mov eax, MMUEXT_PIN_L1_TABLE
        mov edx, [record]
        call extended
        call note
        """,
        (0, -22),
    ),
    "registered again": (
        "xor ecx, ecx\n mov edx, offset record\n mov ebx, 10\n mov eax, __HYPERVISOR_vcpu_op\n int 0x82\n call note",
        (-22,),
    ),
}
# It goes on for a while, with a tick each millisecond and a limit to each sleep.
GO_ON = """
        mov esi, 6
1:      mov edx, offset limit
        mov ecx, edx
        mov ebx, SCHEDOP_poll
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        dec esi
        jne 1b
        jmp finish
        .align 8
limit:  .long 0, 0, 2000000, 0
"""


class TestRecords:
    @pytest.mark.parametrize("name", AFTERWARDS)
    def test_the_page_of_a_record(self, name: str, mode: PagingMode) -> None:
        """Background: the hypervisor goes on writing to a page that the guest has named once.

        Invariant: as long as it does, nobody else has the page, and it is no page table.
        Construction: the page is given up, unmapped, made a table; the guest goes on, and ends.
        """
        attack, answers = AFTERWARDS[name]
        xen = machine()
        free = xen.frames.free_frames
        outcome = suffer(OWN_RECORD + attack + GO_ON + RECORD, mode, xen=xen, budget=2_000_000)
        assert outcome.results(1 + len(answers)) == (0, *answers)
        vcpu = outcome.attacker.vcpus[0]
        assert xen.frames.owner_of(vcpu.info_mfn) == outcome.attacker.domid
        assert vcpu.account.slept > 100_000
        xen.destroy(outcome.attacker)
        xen.destroy(outcome.neighbour)
        check(xen)
        # What is left of the first domain of a format: descriptors and the list of numbers.
        assert xen.frames.free_frames == free - 2

    @pytest.mark.parametrize("command", [5, 13])
    @pytest.mark.parametrize(
        "area",
        [
            "eax, [esi + 60]",  # its root table
            "eax, 0xfc000000 - 8",
            "eax, 0xff020004",
            "eax, offset shared_info",
            "eax, offset back - 8",
            "eax, offset one - 4",
            "eax, -1",
        ],
    )
    def test_a_record_written_anywhere(self, area: str, command: int, mode: PagingMode) -> None:
        """Background: records are written to a linear address whenever a vCPU gets the CPU.

        Invariant: only where its kernel could have written.
        Construction: its page tables, the hypervisor, the shared page, the code that runs, a page's end, nothing.
        """
        attack = f"""
        mov esi, [boot_info]
        mov {area}
        mov [where], eax
        mov ecx, 0
        mov edx, offset where
        mov ebx, {command}
        mov eax, __HYPERVISOR_vcpu_op
        int 0x82
        call note
        mov esi, 20
back:   mov ebx, SCHEDOP_yield
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        dec esi
        jne back
        jmp finish
        .align 8
where:  .long 0, 0
        """
        outcome = suffer(attack, mode)
        if "back" in area:
            return  # what it then executes is its own affair
        refused = "0xf" in area or "-1" in area
        assert outcome.results(1) == ((-14,) if refused else (0,))


@pytest.mark.parametrize("frame", [*TARGETS, "their root", "its root", "its own"])
def test_a_page_of_stubs(frame: str, mode: PagingMode) -> None:
    """Background: a write to a model-specific register has the hypervisor fill a page with stubs.

    Invariant: only a page that the guest could have written itself.
    """
    own = {"its root": "xor eax, eax\n call table_mfn", "its own": "mov eax, offset one\n call mfn_of"}
    attack = f"""
        {own.get(frame, f"mov eax, {TARGETS.get(frame, 'THEIR_TABLE')}")}
        shl eax, 12
        xor edx, edx
        mov ecx, 0x40000000
        wrmsr
        xor eax, eax
        call note
    """
    outcome = suffer(attack, mode)
    assert outcome.results(1) == ((0,) if frame == "its own" else (13,))
