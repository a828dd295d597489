"""Clocks, alarms, ticks and accounts: guests that read and set them, hostile times, and models."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from time_guests import READER, SPIN, keeper, set_real, set_virtual

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import Errno, Hypercall, Runstate, SchedOp, Shutdown, VcpuOp
from xenlab.abi.structures import VcpuTimeInfo
from xenlab.errors import HypercallError, PartError
from xenlab.hypervisor import auditor
from xenlab.hypervisor.accounting import runstate, usage, virtual_time
from xenlab.hypervisor.alarms import REAL, VIRTUAL, AlarmClocks
from xenlab.hypervisor.clocks import RECORD_AGE, WALL_CLOCK_AT_START, to_ns
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.domain import Domain, RunState, Vcpu
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import TWO_LEVEL, PagingMode
from xenlab.timeline import Timeline
from xenlab.toolstack import image_from_source

MS = 100_000  # instructions
MS_NS = 1_000_000
SCRATCH, NOWHERE = 0xC000_8000, 0x8000_0000
ONCE = "cmp dword ptr [upcalls], 1\n jne over\n"
ROOM = SPIN + "\n .align 4096\n .skip 0x9000"


def machine(*guests: str, slice_ms: int = 5, mode: PagingMode = TWO_LEVEL) -> tuple[Hypervisor, list[Domain]]:
    xen = Hypervisor(Machine(memory_mib=8), scheduler=RoundRobin(slice_ms * MS), trace=Trace())
    return xen, [boot(xen, image_from_source(text, mode=mode)) for text in guests]


def went_off(xen: Hypervisor, timer: str | None = None) -> list[int]:
    assert xen.trace is not None
    return [event.time for event in xen.trace.events(Kind.TIMER) if timer in (None, event.timer)]


def word(domain: Domain, xen: Hypervisor, name: str, offset: int = 0) -> int:
    return xen.guest_memory.read_word(domain.vcpus[0], domain.symbols[name] + offset)


def log(xen: Hypervisor, domain: Domain) -> list[tuple[int, int]]:
    """When the guest was in its upcall, by its own reading, and what was pending."""
    start = domain.symbols["log"]
    data = xen.guest_memory.read(domain.vcpus[0], start, 8 * word(domain, xen, "upcalls"))
    return list(struct.iter_unpack("<II", data))


def record(xen: Hypervisor, vcpu: Vcpu) -> VcpuTimeInfo:
    return VcpuTimeInfo.from_buffer_copy(bytes(xen.memory.bytes[vcpu.info + 32 : vcpu.info + 64]))


class TestClocks:
    def test_a_guest_computes_the_time_to_the_nanosecond(self, mode: PagingMode) -> None:
        xen, (reader, *_others) = machine(READER, SPIN, SPIN, mode=mode)
        before = 0
        for _ in range(8):
            xen.run(11 * MS + 13)
            if xen.current is reader.vcpus[0]:
                rounds = word(reader, xen, "rounds")
                while word(reader, xen, "rounds") == rounds:
                    xen.run(1)
                answer = word(reader, xen, "answer") | word(reader, xen, "answer", 4) << 32
                # It read the counter some instructions ago, and those are ten nanoseconds each.
                assert 0 < to_ns(xen.now) - answer < 300
                assert answer % 10 == 0
                assert answer > before
                before = answer
        assert before

    def test_records_of_all_domains_say_the_same_time(self) -> None:
        xen, domains = machine(SPIN, SPIN, SPIN)
        xen.run(40 * MS)
        for domain in domains:
            found = record(xen, domain.vcpus[0])
            assert found.version
            assert found.version % 2 == 0
            since = xen.now - found.tsc_timestamp
            assert found.system_time + ((since << found.tsc_shift) * found.tsc_to_system_mul >> 32) == to_ns(xen.now)

    def test_a_record_is_renewed_when_it_is_old(self) -> None:
        xen, (domain, _other) = machine(SPIN, SPIN, slice_ms=1)
        versions = []
        for _ in range(50):
            xen.run(MS)
            versions.append(record(xen, domain.vcpus[0]).version)
            assert xen.now - record(xen, domain.vcpus[0]).tsc_timestamp <= RECORD_AGE + 2 * MS
        assert len(set(versions)) == 5

    def test_wall_clock(self) -> None:
        xen, (domain,) = machine(SPIN)
        at = (domain.shared_info_mfn << PAGE_SHIFT) + 2048 + 256
        version, seconds, nanoseconds = struct.unpack_from("<III", xen.memory.bytes, at)
        assert (version % 2, seconds, nanoseconds) == (0, WALL_CLOCK_AT_START, 0)
        xen.clocks.set_wall_clock(1_700_000_000, 5, real_ns=10_000_000_007)
        later, seconds, nanoseconds = struct.unpack_from("<III", xen.memory.bytes, at)
        assert (later - version, seconds, nanoseconds) == (2, 1_699_999_989, 999_999_998)

    def test_the_time_stamp_counter_counts_instructions(self) -> None:
        xen, (domain,) = machine(keeper("rdtsc\n mov [edi], eax\n rdtsc\n mov [edi + 4], eax"))
        xen.run(MS)
        first, second = (word(domain, xen, "log", offset) for offset in (0, 4))
        assert second - first == 2


class TestAlarmOnRealTime:
    def test_it_wakes_a_sleeping_domain_to_the_instruction(self, mode: PagingMode) -> None:
        xen, (domain,) = machine(keeper(set_real(30 * MS_NS)), mode=mode)
        result = xen.run(100 * MS)
        assert went_off(xen, REAL) == [30 * MS]
        assert [pending for _time, pending in log(xen, domain)] == [2]
        assert log(xen, domain)[0][0] - 30 * MS < 50
        assert (result.stop, result.instructions < 30 * MS + 200) == (Stop.IDLE, True)

    def test_a_machine_on_which_all_sleep_stops_where_it_is_asked_to(self) -> None:
        xen, (domain,) = machine(keeper(set_real(30 * MS_NS)))
        assert xen.run(10 * MS).stop is Stop.BUDGET
        assert (xen.now, xen.current, log(xen, domain)) == (10 * MS, None, [])
        xen.run(19 * MS)
        assert (xen.now, went_off(xen)) == (29 * MS, [])
        xen.run(2 * MS)
        assert went_off(xen) == [30 * MS]

    def test_it_interrupts_one_who_computes(self) -> None:
        xen, (domain,) = machine(keeper(set_real(3 * MS_NS) + "jmp work"))
        xen.run(10 * MS)
        assert went_off(xen) == [3 * MS]
        assert len(log(xen, domain)) == 1

    def test_a_later_setting_replaces_an_earlier_and_zero_takes_away(self) -> None:
        xen, (first, second) = machine(
            keeper(set_real(9 * MS_NS) + set_real(40 * MS_NS)), keeper(set_real(9 * MS_NS) + set_real(0))
        )
        xen.run(100 * MS)
        assert went_off(xen) == [40 * MS]
        assert (len(log(xen, first)), len(log(xen, second))) == (1, 0)

    @pytest.mark.parametrize("at", [1, 10, 100])
    def test_in_the_past_it_goes_off_at_once(self, at: int) -> None:
        xen, (domain,) = machine(keeper(set_real(at) + "mov dword ptr [nowhere], 1\n jmp work"))
        xen.run(MS)
        assert len(went_off(xen)) == 1
        assert xen.trace is not None
        (call,) = [event.time for event in xen.trace.events(Kind.HYPERCALL) if event.number == Hypercall.set_timer_op]
        assert went_off(xen) == [call]  # no instruction of the guest's in between
        assert len(log(xen, domain)) == 1

    @pytest.mark.parametrize("at", [-1, 1 << 63, (1 << 50) + MS_NS, (1 << 63) - 1])
    def test_at_the_end_of_time_it_goes_off_in_a_tenth_of_a_second(self, at: int) -> None:
        xen, (domain,) = machine(keeper(set_real(at)))
        xen.run(2000 * MS)
        (time,) = went_off(xen)
        assert 100 * MS < time < 100 * MS + 200
        assert len(log(xen, domain)) == 1

    def test_nobody_is_woken_where_no_port_is_bound(self) -> None:
        body = ".macro call_xen number, first, second\n mov ebx, \\first\n mov ecx, \\second\n"
        body += "mov eax, \\number\n int 0x82\n .endm\n"
        text = "start: " + body + set_real(2 * MS_NS) + "call_xen __HYPERVISOR_sched_op, SCHEDOP_block, 0\n ud2"
        xen, (domain,) = machine(text)
        assert xen.run(100 * MS).stop is Stop.IDLE
        assert domain.vcpus[0].run_state is RunState.BLOCKED

    def test_a_domain_that_ended_keeps_no_machine_awake(self) -> None:
        xen, (domain,) = machine(keeper(set_real(50 * MS_NS) + "ud2"))
        assert xen.run(100 * MS).stop is Stop.IDLE
        assert domain.crashed
        assert xen.now < MS

    def test_a_paused_domain_finds_its_event(self) -> None:
        xen, (domain,) = machine(keeper(set_real(5 * MS_NS)))
        xen.run(MS)
        xen.pause(domain)
        xen.run(10 * MS)
        assert (went_off(xen), log(xen, domain)) == ([5 * MS], [])
        xen.unpause(domain)
        xen.run(MS)
        assert len(log(xen, domain)) == 1


class TestAlarmOnVirtualTime:
    def test_it_waits_while_others_run(self) -> None:
        xen, (domain, *_others) = machine(keeper(set_virtual(12 * MS_NS) + "jmp work"), SPIN, SPIN, slice_ms=5)
        xen.run(200 * MS)
        # Two whole turns, and two milliseconds of the third, which begins behind six turns of all.
        assert went_off(xen, VIRTUAL) == [32 * MS]
        assert [pending for _time, pending in log(xen, domain)] == [4]

    def test_it_waits_while_its_domain_sleeps(self) -> None:
        xen, (domain,) = machine(
            keeper(set_virtual(MS_NS) + set_real(50 * MS_NS), "cmp dword ptr [upcalls], 1\n je work")
        )
        xen.run(100 * MS)
        (virtual,) = went_off(xen, VIRTUAL)
        assert went_off(xen, REAL) == [50 * MS]
        # What it ran before it slept is not missing any more.
        assert 50 * MS < virtual < 51 * MS
        del domain

    def test_both_of_many_domains_are_exact(self) -> None:
        guests = [keeper(set_virtual(n * MS_NS) + set_real(7 * n * MS_NS) + "jmp work") for n in range(1, 6)]
        xen, domains = machine(*guests, slice_ms=1)
        xen.run(60 * MS)
        assert sorted(went_off(xen, REAL)) == [7 * n * MS for n in range(1, 6)]
        assert len(went_off(xen, VIRTUAL)) == 5
        for number, domain in enumerate(domains, 1):
            assert {pending for _time, pending in log(xen, domain)} <= {2, 4, 6}
            assert virtual_time(xen, domain.vcpus[0]) >= number * MS


class TestTicks:
    ON = 'call_xen __HYPERVISOR_vcpu_op, 6, 0, "offset period"\n'
    PERIOD = "\n .align 4\nperiod: .long {}, 0\n .text\n"

    def guest(self, period_ns: int, then: str) -> str:
        return keeper(self.ON + then).replace("nowhere: .long 0", f"nowhere: .long 0\nperiod: .long {period_ns}, 0")

    def test_a_hundred_a_second_while_it_runs(self) -> None:
        xen, (domain,) = machine(keeper("jmp work").replace("call_xen __HYPERVISOR_vcpu_op, 7", ""))
        xen.run(100 * MS)
        assert went_off(xen) == [time * 10 * MS for time in range(1, 10)]
        assert len(log(xen, domain)) == 9

    def test_of_its_own_period(self) -> None:
        xen, (domain,) = machine(self.guest(4 * MS_NS, "jmp work"))
        xen.run(41 * MS)
        assert len(log(xen, domain)) == 10

    def test_those_missed_while_away_are_one(self) -> None:
        xen, (domain, _other) = machine(self.guest(MS_NS, "jmp work"), SPIN, slice_ms=10)
        xen.run(40 * MS)
        # Ten in its first turn of ten milliseconds, one for all ten of the other's, ten again.
        assert 19 <= len(log(xen, domain)) <= 21
        assert not [time for time, _pending in log(xen, domain) if 10 * MS < time < 20 * MS]

    def test_they_wake_nobody(self) -> None:
        xen, (domain,) = machine(self.guest(MS_NS, ""))
        assert xen.run(100 * MS).stop is Stop.IDLE
        assert domain.vcpus[0].run_state is RunState.BLOCKED


class TestPollLimits:
    def polled(self, timeout: int, then: str = "") -> tuple[Hypervisor, Domain]:
        body = 'call_xen __HYPERVISOR_sched_op, SCHEDOP_poll, "offset poll"\n inc dword ptr [nowhere]\n' + then
        text = keeper(body).replace(
            "nowhere: .long 0",
            f"nowhere: .long 0\npoll: .long port, 1\n .quad {timeout}\nport: .long 1",
        )
        xen, (domain,) = machine(text)
        return xen, domain

    def test_the_time_wakes(self) -> None:
        xen, domain = self.polled(20 * MS_NS)
        xen.run(19 * MS)
        assert word(domain, xen, "nowhere") == 0
        xen.run(2 * MS)
        assert (went_off(xen), word(domain, xen, "nowhere"), log(xen, domain)) == ([20 * MS], 1, [])

    @pytest.mark.parametrize("timeout", [1, (1 << 64) - 1])
    def test_past_and_far(self, timeout: int) -> None:
        xen, domain = self.polled(timeout)
        xen.run(MS)
        assert word(domain, xen, "nowhere") == (timeout == 1)

    def test_an_old_limit_does_not_end_another_sleep(self) -> None:
        xen, domain = self.polled(20 * MS_NS, "ud2")
        xen.run(MS)
        vcpu = domain.vcpus[0]
        vcpu.polling = 0
        xen.events.set_pending(domain, 1)
        xen.run(40 * MS)
        assert went_off(xen) == []
        del vcpu


class Calls:
    """One domain that is held still while calls are made for it."""

    def __init__(self, mode: PagingMode) -> None:
        self.xen, (self.domain, self.other) = machine(ROOM, ROOM, mode=mode)
        self.xen.run(MS)
        self.vcpu = self.domain.vcpus[0]

    def op(self, command: int, number: int = 0, *words: int, at: int = SCRATCH) -> int:
        if words:
            self.xen.guest_memory.write_words(self.vcpu, SCRATCH, words)
        try:
            return self.xen.vcpu_ops.vcpu_op(self.vcpu, command, number, at)
        except HypercallError as refusal:
            return -refusal.errno


@pytest.fixture
def calls(mode: PagingMode) -> Calls:
    return Calls(mode)


class TestVcpuOp:
    def test_numbers_and_commands(self, calls: Calls) -> None:
        assert calls.op(VcpuOp.IS_UP) == 1
        for command in (*VcpuOp, 99):
            assert calls.op(command, 1) == calls.op(command, 1 << 31) == -Errno.ENOENT
        assert calls.op(14) == calls.op(0xFFFF_FFFF) == -Errno.ENOSYS
        assert calls.op(VcpuOp.GET_PHYSID) == -Errno.EINVAL
        assert calls.op(VcpuOp.UP) == 0
        assert calls.op(VcpuOp.INITIALISE) == -Errno.EEXIST
        for command in (4, 5, 6, 8, 10, 13):
            assert calls.op(command, at=NOWHERE) == -Errno.EFAULT

    def test_the_last_that_goes_down_ends_the_domain(self, calls: Calls) -> None:
        assert calls.op(VcpuOp.DOWN) == 0
        assert calls.domain.shutdown is Shutdown.POWEROFF

    def test_runstate(self, calls: Calls) -> None:
        assert calls.op(VcpuOp.GET_RUNSTATE_INFO) == 0
        state, since, *times = struct.unpack("<IQ4Q", calls.xen.guest_memory.read(calls.vcpu, SCRATCH, 44))
        assert state == Runstate.RUNNING
        assert sum(times) == to_ns(calls.xen.now)
        assert since <= to_ns(calls.xen.now)
        assert times[Runstate.RUNNING] == to_ns(virtual_time(calls.xen, calls.vcpu)) > 0

    def test_runstate_area_is_written_at_each_turn(self, calls: Calls) -> None:
        assert calls.op(VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, 0, SCRATCH + 64, 0) == 0
        seen = []
        for _ in range(4):
            calls.xen.run(10 * MS)
            seen.append(struct.unpack("<IQ4Q", calls.xen.guest_memory.read(calls.vcpu, SCRATCH + 64, 44)))
        assert {row[0] for row in seen} == {Runstate.RUNNING}
        assert len({row[1] for row in seen}) == 4
        assert all(sum(row[2:]) == row[1] for row in seen)

    def test_areas_out_of_reach(self, calls: Calls) -> None:
        for command in (VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA):
            assert calls.op(command, 0, 0xFFFF_F000, 0) == -Errno.EFAULT
            assert calls.op(command, 0, 0xFC00_0000, 0) == -Errno.EFAULT
            assert calls.op(command, 0, NOWHERE, 0) == 0  # nothing is there, and nothing is written
        calls.xen.run(30 * MS)
        assert not calls.domain.ended

    def test_copy_of_the_time_record(self, calls: Calls) -> None:
        assert calls.op(VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA, 0, SCRATCH + 128, 0) == 0
        for _ in range(3):
            copy = calls.xen.guest_memory.read(calls.vcpu, SCRATCH + 128, 32)
            assert copy == bytes(record(calls.xen, calls.vcpu))
            calls.xen.run(30 * MS)

    def test_periods(self, calls: Calls) -> None:
        for period in (0, 1, MS_NS - 1, 1 << 63, (1 << 64) - 1):
            assert calls.op(VcpuOp.SET_PERIODIC_TIMER, 0, period & 0xFFFF_FFFF, period >> 32) == -Errno.EINVAL
        for period in (MS_NS, 1 << 62):
            assert calls.op(VcpuOp.SET_PERIODIC_TIMER, 0, period & 0xFFFF_FFFF, period >> 32) == 0
        assert calls.op(VcpuOp.STOP_PERIODIC_TIMER) == 0

    def test_single_shots(self, calls: Calls) -> None:
        assert calls.op(VcpuOp.SET_SINGLESHOT_TIMER, 0, 5, 0, 1) == -Errno.ETIME
        assert calls.op(VcpuOp.SET_SINGLESHOT_TIMER, 0, 5, 0, 0) == 0
        assert calls.xen.timers.due <= calls.xen.now
        assert calls.op(VcpuOp.STOP_SINGLESHOT_TIMER) == 0
        assert calls.xen.timers.due > calls.xen.now
        at = to_ns(calls.xen.now) + MS_NS
        assert calls.op(VcpuOp.SET_SINGLESHOT_TIMER, 0, at, 0, 1) == 0
        assert calls.xen.timers.due == calls.xen.now + MS


class TestNmi:
    # Sends itself one, and another from within the handler of the first.
    GUEST = """
start:  mov esp, offset stack
        mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        call send
        mov esi, [count]
loop:   jmp loop
send:   xor edx, edx
        xor ecx, ecx
        mov ebx, 11
        mov eax, __HYPERVISOR_vcpu_op
        int 0x82
        mov edi, eax
        ret
handler:
        inc dword ptr [count]
        inc dword ptr [depth]
        mov eax, [depth]
        or [deepest], eax
        cmp dword ptr [count], 1
        jne done
        call send
done:   dec dword ptr [depth]
        mov eax, 0x55
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82
table:  .byte 2, 4
        .short FLAT_RING1_CS
        .long {handler}, 0, 0
        .align 4
count:  .long 0
depth:  .long 0
deepest: .long 0
        .skip 512
stack:
"""

    def test_one_at_a_time(self, mode: PagingMode) -> None:
        xen, (domain,) = machine(self.GUEST.format(handler="handler"), mode=mode)
        xen.run(400)
        assert not domain.report
        assert [word(domain, xen, name) for name in ("count", "deepest")] == [2, 1]
        assert (domain.vcpus[0].state.esi, domain.vcpus[0].state.edi) == (2, 0x55)
        assert (domain.vcpus[0].nmi_pending, domain.vcpus[0].nmi_masked) == (False, False)

    def test_without_a_handler_it_is_lost(self) -> None:
        xen, (domain,) = machine(self.GUEST.format(handler="0"))
        xen.run(400)
        assert (domain.report, word(domain, xen, "count"), domain.vcpus[0].nmi_pending) == ("", 0, False)

    def test_with_an_argument_it_is_refused(self, calls: Calls) -> None:
        assert calls.op(VcpuOp.SEND_NMI) == -Errno.EINVAL


class TestVcpuInfo:
    def mfn(self, calls: Calls, address: int) -> int:
        return calls.xen.guest_memory.machine_address(calls.vcpu, address, 4, False) >> PAGE_SHIFT

    def register(self, calls: Calls, mfn: int, offset: int) -> int:
        return calls.op(VcpuOp.REGISTER_VCPU_INFO, 0, mfn & 0xFFFF_FFFF, mfn >> 32, offset, 0)

    def test_it_moves_and_everything_is_pending(self, calls: Calls) -> None:
        mfn, old = self.mfn(calls, SCRATCH + 0x1000), calls.vcpu.info
        was = bytes(calls.xen.memory.bytes[old + 8 : old + 64])
        assert self.register(calls, mfn, 192) == 0
        assert calls.vcpu.info == (mfn << PAGE_SHIFT) + 192
        pending, _mask, selector = struct.unpack("<BB2xI", calls.xen.guest_memory.read(calls.vcpu, SCRATCH + 0x10C0, 8))
        assert (pending, selector) == (1, 0xFFFF_FFFF)
        assert calls.xen.guest_memory.read(calls.vcpu, SCRATCH + 0x10C8, 56) == was
        calls.xen.run(60 * MS)
        assert record(calls.xen, calls.vcpu).version > VcpuTimeInfo.from_buffer_copy(was[24:]).version
        auditor.check(calls.xen)

    def test_refused(self, calls: Calls) -> None:
        mfn = self.mfn(calls, SCRATCH + 0x1000)
        for offset in (4033, 4096, 0xFFFF_FFFF, 2):
            assert self.register(calls, mfn, offset) == -Errno.EINVAL
        table = calls.vcpu.state.cr3 >> PAGE_SHIFT
        foreign = calls.other.frames[9]
        for wrong in (table, foreign, 0, 1 << 31, 1 << 40, (1 << 64) - 1):
            assert self.register(calls, wrong, 0) == -Errno.EINVAL
        assert self.register(calls, mfn, 4032) == 0
        assert self.register(calls, mfn, 0) == -Errno.EINVAL  # once only

    def test_the_page_cannot_become_a_table_and_comes_back_at_the_end(self, calls: Calls) -> None:
        free = calls.xen.frames.free_frames
        mfn = self.mfn(calls, SCRATCH + 0x1000)
        assert self.register(calls, mfn, 0) == 0
        refs = calls.xen.frames.type[mfn]
        calls.xen.destroy(calls.domain)
        auditor.check(calls.xen)
        assert calls.xen.frames.free_frames > free
        assert calls.xen.frames.owner_of(mfn) != calls.domain.domid
        assert refs


class TestAccounts:
    def test_the_four_times_add_up(self) -> None:
        xen, domains = machine(keeper(set_real(20 * MS_NS), ONCE + set_real(90 * MS_NS) + "over:"), SPIN, SPIN)
        for step in range(30):
            xen.run(5 * MS + step)
            if step == 10:
                xen.pause(domains[1])
            if step == 20:
                xen.unpause(domains[1])
            for domain in domains:
                state, since, times = runstate(xen, domain.vcpus[0])
                assert sum(times) == xen.now
                assert since <= xen.now
                assert (state is Runstate.RUNNING) == (xen.current is domain.vcpus[0])
        used = [usage(xen, domain) for domain in domains]
        assert used[1].offline > 40 * MS
        assert used[0].blocked > 70 * MS
        assert sum(each.running for each in used) == xen.now
        assert used[0].entries > 5
        assert used[1].entries == 0
        assert used[0].hypervisor_ns == 1000 * used[0].entries

    def test_wake_up_latency(self) -> None:
        # It wakes in the middle of another's slice, and round robin puts it at the end.
        xen, (sleeper, _other) = machine(keeper(set_real(23 * MS_NS)), SPIN, slice_ms=5)
        xen.run(60 * MS)
        used = usage(xen, sleeper)
        assert sum(used.latencies) == 1
        assert used.latency_at(1.0) >= used.latency_at(0.5) >= 1
        assert used.switches == 2

    def test_a_wake_before_the_switch_is_no_wake(self) -> None:
        xen, (domain,) = machine(SPIN)
        xen.run(MS)
        vcpu = domain.vcpus[0]
        xen.block(vcpu)
        xen.wake(vcpu)
        xen.run(MS)
        assert (vcpu.account.switches, sum(vcpu.account.latencies)) == (1, 0)
        assert runstate(xen, vcpu)[2] == (2 * MS, 0, 0, 0)


class TestReplay:
    GUESTS = (
        keeper(set_real(3 * MS_NS) + set_virtual(2 * MS_NS) + "jmp work", set_real(9 * MS_NS)),
        keeper(set_real(5 * MS_NS), "mov eax, [upcalls]\n cmp eax, 3\n jae done\n" + set_real(50 * MS_NS) + "done:"),
    )

    def test_forward_and_back(self) -> None:
        xen, _domains = machine(*self.GUESTS, slice_ms=2)
        timeline = Timeline(xen)
        marks = {}
        for _ in range(24):
            timeline.run(MS // 3 + 7)
            marks[timeline.position] = timeline.machine_hash()
        timeline.run(60 * MS)
        for time, expected in reversed(marks.items()):
            timeline.seek(time)
            assert timeline.machine_hash() == expected

    def test_leaps_are_replayed(self) -> None:
        xen, _domains = machine(self.GUESTS[1])
        timeline = Timeline(xen)
        timeline.run(20 * MS)
        middle = timeline.machine_hash()
        timeline.run(80 * MS)
        timeline.seek(20 * MS)
        assert timeline.machine_hash() == middle

    @pytest.mark.slow
    @settings(max_examples=15, deadline=None)
    @given(pieces=st.lists(st.integers(1, 3 * MS), min_size=1, max_size=12))
    def test_time_does_not_depend_on_the_pieces_of_a_run(self, pieces: list[int]) -> None:
        def played(pieces: list[int]) -> list[tuple[Any, ...]]:
            xen, _domains = machine(*self.GUESTS, SPIN, slice_ms=2)
            for piece in pieces:
                xen.run(piece)
            assert xen.trace is not None
            return xen.trace.raw()

        assert played(pieces) == played([sum(pieces)])


ALARM = st.tuples(
    st.sampled_from(["real", "virtual", "off-real", "off-virtual", "run", "stop", "pass", "pass", "pass"]),
    st.integers(0, 3),
    st.integers(0, 60),
)


@given(st.lists(ALARM, max_size=60))
def test_alarms_go_off_as_in_a_model(steps: list[tuple[str, int, int]]) -> None:
    clocks, now, running = AlarmClocks(), 0, None
    real: dict[int, int] = {}
    virtual: dict[int, int] = {}
    ran = dict.fromkeys(range(4), 0)
    for what, vcpu, value in steps:
        if what == "real":
            clocks.set(vcpu, REAL, now + value - 10, now, ran[vcpu])
            real[vcpu] = now + value - 10
        elif what == "virtual" and running is not None:
            clocks.set(running, VIRTUAL, ran[running] + value - 10, now, ran[running])
            virtual[running] = ran[running] + value - 10
        elif what.startswith("off"):
            clock = what[4:]
            clocks.set(vcpu, clock, None, now, ran[vcpu])
            (real if clock == REAL else virtual).pop(vcpu, None)
        elif what == "run" and running is None:
            running = vcpu
            clocks.run(vcpu, now, ran[vcpu])
        elif what == "stop" and running is not None:
            clocks.stop(running, now, ran[running])
            running = None
        elif what == "pass":
            for _ in range(value):
                expected = sorted(
                    [(key, REAL) for key, at in real.items() if at <= now]
                    + [(key, VIRTUAL) for key, at in virtual.items() if key == running and at <= ran[key]]
                )
                following = clocks.next()
                assert (following is not None and following <= now) == bool(expected)
                assert sorted(clocks.expire(now)) == expected
                for key, clock in expected:
                    del (real if clock == REAL else virtual)[key]
                now += 1
                if running is not None:
                    ran[running] += 1
        again = AlarmClocks()
        again.load(clocks.state())
        assert again.next() == clocks.next()


class Wrong(AlarmClocks):
    """A part that does one thing wrong."""

    def __init__(self, method: str, does: Callable[..., Any]) -> None:
        super().__init__()
        setattr(self, method, does)

    def state(self) -> dict[str, Any]:
        return super().state()


def fail(*_: Any) -> Any:
    raise RuntimeError("mistake")


@pytest.mark.parametrize(
    ("method", "does", "message"),
    [
        ("set", fail, "mistake"),
        ("run", fail, "mistake"),
        ("next", fail, "mistake"),
        ("expire", fail, "mistake"),
        ("next", lambda: "soon", "a time in instructions, or None, found 'soon'"),
        ("next", lambda: 1, "found \\[\\]"),
        ("expire", lambda now: [], "at least one"),
        ("expire", lambda now: None, "pairs of a vCPU"),
        ("expire", lambda now: [(0, "sundial")], "sundial"),
        ("expire", lambda now: [(77, REAL)], "77"),
        ("expire", lambda now: [(0, REAL)], "a later time"),
    ],
)
def test_a_part_that_is_wrong_is_named(method: str, does: Callable[..., Any], message: str) -> None:
    part = Wrong(method, does)
    xen = Hypervisor(Machine(memory_mib=4), alarms=part)
    domain = boot(xen, keeper(set_real(2 * MS_NS)))
    with pytest.raises(PartError, match=message):
        xen.run(10 * MS)
    delattr(part, method)
    xen.destroy(domain)
    assert xen.run(1).stop is Stop.IDLE


def test_sleeping_without_a_timer_is_still_idle() -> None:
    xen, (domain,) = machine(keeper(""))
    assert xen.run(MS).stop is Stop.IDLE
    assert xen.services.sched_op(domain.vcpus[0], SchedOp.YIELD, 0) == 0
