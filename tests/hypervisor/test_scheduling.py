"""Domains that share the CPU: turns of exact length, sleep, pause, and ends of each kind."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.domain import RunState
from xenlab.hypervisor.frames import FREE
from xenlab.hypervisor.inputs import Pause, Typed, Unpause
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL

LOOP = "start: inc eax\n jmp start"
YIELD = """
start:  inc edi
        mov ebx, SCHEDOP_yield
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
"""
SLEEPER = """
start:  inc edi
        mov ebx, SCHEDOP_block
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
"""
OFF = """
start:  mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        ud2
reason: .long SHUTDOWN_poweroff
"""


def machine(slice_instructions: int = 100, memory_mib: int = 8) -> Hypervisor:
    scheduler = RoundRobin(slice_instructions)
    return Hypervisor(Machine(memory_mib=memory_mib), scheduler=scheduler, trace=Trace())


def switches(xen: Hypervisor) -> list[tuple[int, int]]:
    assert xen.trace is not None
    return [(event.time, event.to_vcpu) for event in xen.trace.events(Kind.SWITCH)]


@pytest.mark.parametrize("slice_instructions", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("guests", [2, 3])
def test_turns_have_exactly_their_length(slice_instructions: int, guests: int) -> None:
    xen = machine(slice_instructions)
    domains = [boot(xen, LOOP, mode=(TWO_LEVEL, PAE)[number % 2]) for number in range(guests)]
    result = xen.run(slice_instructions * guests * 3)
    assert (result.instructions, result.stop) == (slice_instructions * guests * 3, Stop.BUDGET)
    turns = switches(xen)
    assert [time for time, _ in turns] == [slice_instructions * number for number in range(len(turns))]
    assert [vcpu // 32 for _, vcpu in turns] == [number % guests for number in range(len(turns))]
    begun = [2 * domain.vcpus[0].state.eax for domain in domains]
    assert all(abs(count - 3 * slice_instructions) <= 2 for count in begun)


@pytest.mark.parametrize("cut", [1, 3, 50, 99, 100, 101, 250])
def test_turns_do_not_depend_on_how_the_run_is_cut(cut: int) -> None:
    whole, parts = machine(), machine()
    for xen in (whole, parts):
        boot(xen, LOOP)
        boot(xen, LOOP)
    whole.run(1000)
    while parts.now < 1000:
        parts.run(min(cut, 1000 - parts.now))
    assert switches(whole) == switches(parts)
    states = [[domain.vcpus[0].state.eax for domain in xen.domains.values()] for xen in (whole, parts)]
    assert states[0] == states[1]


def test_yield_gives_the_turn_away_at_once() -> None:
    xen = machine()
    first, second = boot(xen, YIELD), boot(xen, YIELD)
    xen.run(60)
    turns = switches(xen)
    # The first turn of each has no jump back in it.
    assert [after - before for (before, _), (after, _) in pairwise(turns)] == [4, 4] + [5] * (len(turns) - 3)
    assert len(turns) == 13
    assert abs(first.vcpus[0].state.edi - second.vcpus[0].state.edi) <= 1


def test_yield_alone_comes_straight_back() -> None:
    xen = machine()
    domain = boot(xen, YIELD)
    assert xen.run(100).stop is Stop.BUDGET
    assert domain.vcpus[0].state.edi >= 19
    assert len(switches(xen)) == 1


def test_looping_guest_is_preempted_and_others_progress() -> None:
    xen = machine()
    boot(xen, "start: jmp start")
    worker = boot(xen, LOOP)
    xen.run(2000)
    assert worker.vcpus[0].state.eax >= 490


def test_blocked_guest_sleeps_until_woken() -> None:
    xen = machine()
    sleeper = boot(xen, SLEEPER)
    vcpu = sleeper.vcpus[0]
    assert (xen.run(1000).stop, vcpu.state.edi) == (Stop.IDLE, 1)
    assert xen.run(1000).instructions == 0
    for times in range(2, 5):
        xen.wake(vcpu)
        xen.wake(vcpu)  # once is enough
        assert xen.run(1000).stop is Stop.IDLE
        assert vcpu.state.edi == times
    xen.submit(Typed(sleeper.domid, b"x"))
    xen.run(100)
    assert vcpu.state.edi == 5


def test_wake_of_a_paused_sleeper_is_not_lost() -> None:
    xen = machine()
    sleeper = boot(xen, SLEEPER)
    xen.run(100)
    xen.pause(sleeper)
    xen.wake(sleeper.vcpus[0])
    assert xen.run(100).instructions == 0
    xen.unpause(sleeper)
    xen.run(100)
    assert sleeper.vcpus[0].state.edi == 2


def test_pause_of_a_sleeper_does_not_wake_it() -> None:
    xen = machine()
    sleeper = boot(xen, SLEEPER)
    xen.run(100)
    xen.pause(sleeper)
    xen.unpause(sleeper)
    assert xen.run(100).instructions == 0
    assert sleeper.vcpus[0].run_state is RunState.BLOCKED


def test_pause_and_unpause_through_the_queue() -> None:
    xen = machine()
    first, second = boot(xen, LOOP), boot(xen, LOOP)
    xen.run(150)
    xen.submit(Pause(second.domid))
    xen.run(500)
    stopped = second.vcpus[0].state.eax
    xen.run(500)
    assert second.vcpus[0].state.eax == stopped
    xen.submit(Unpause(second.domid))
    xen.submit(Pause(99))
    xen.run(500)
    assert second.vcpus[0].state.eax > stopped
    assert first.vcpus[0].state.eax > 500


def test_shutdown_of_the_last_domain_is_idle() -> None:
    xen = machine()
    domains = [boot(xen, OFF) for _ in range(3)]
    result = xen.run(1000)
    assert (result.stop, result.instructions) == (Stop.IDLE, 12)
    assert all(domain.shutdown == 0 and not domain.crashed for domain in domains)
    assert xen.run(1000).instructions == 0


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["run", "pause", "unpause", "destroy", "wake", "create", "block", "type"]), st.integers(0, 9)
    ),
    max_size=25,
)


@settings(max_examples=40)
@given(ACTIONS)
def test_anything_from_outside_at_any_moment(actions: list[tuple[str, int]]) -> None:
    xen = machine(37)
    free = xen.frames.free_frames
    for _ in range(2):
        boot(xen, LOOP)
    for action, number in actions:
        domains = list(xen.domains.values())
        if action == "run":
            xen.run(10 * number + 1)
        elif action == "create" and len(domains) < 5:
            boot(xen, (LOOP, YIELD, SLEEPER, OFF, "start: ud2")[number % 5], mode=(TWO_LEVEL, PAE)[number % 2])
        elif action == "type":
            xen.submit(Typed(number, b"key"))
        elif domains:
            domain = domains[number % len(domains)]
            if action in ("pause", "unpause", "destroy"):
                getattr(xen, action)(domain)
            elif not domain.ended:
                vcpu = domain.vcpus[0]
                (xen.wake if action == "wake" or vcpu.run_state is not RunState.RUNNABLE else xen.block)(vcpu)
    xen.run(200)
    runnable = [d for d in xen.domains.values() if d.vcpus[0].run_state is RunState.RUNNABLE]
    assert (xen.current is None) == (not runnable)
    for domain in list(xen.domains.values()):
        xen.destroy(domain)
    assert xen.run(100).stop is Stop.IDLE
    # All frames came back, but for the descriptor pages and the tables of the list that Xen keeps.
    assert free - xen.frames.free_frames <= 4
    assert_free_frames_are_zero(xen)


def assert_free_frames_are_zero(xen: Hypervisor) -> None:
    pages = xen.memory.array()
    assert not any(pages[mfn].any() for mfn, owner in enumerate(xen.frames.owner) if owner == FREE)


def test_destroy_of_the_running_domain() -> None:
    xen = machine()
    first, second = boot(xen, LOOP), boot(xen, LOOP)
    xen.run(150)
    assert xen.current is second.vcpus[0]
    xen.destroy(second)
    assert xen.current is not second.vcpus[0]
    before = first.vcpus[0].state.eax
    assert xen.run(100).stop is Stop.BUDGET
    assert first.vcpus[0].state.eax >= before + 49


def test_destroy_twice_changes_nothing() -> None:
    xen = machine()
    domain, other = boot(xen, LOOP), boot(xen, LOOP)
    xen.run(50)
    xen.destroy(domain)
    free = xen.frames.free_frames
    xen.destroy(domain)
    assert xen.frames.free_frames == free
    assert list(xen.domains.values()) == [other]
    heir = boot(xen, LOOP)
    assert heir.domid == domain.domid
    xen.destroy(domain)
    xen.run(500)
    assert xen.domains[heir.domid] is heir
    assert heir.vcpus[0].state.eax > 50


def test_dead_domain_takes_no_orders() -> None:
    xen = machine()
    domain = boot(xen, OFF)
    xen.run(50)
    for action in (xen.pause, xen.unpause):
        action(domain)
    xen.wake(domain.vcpus[0])
    assert xen.run(50).instructions == 0
    assert domain.vcpus[0].run_state is RunState.ENDED


def test_create_and_destroy_200_times_leaks_nothing() -> None:
    xen = Hypervisor(Machine(memory_mib=8))
    xen.destroy(boot(xen, LOOP))
    xen.destroy(boot(xen, LOOP, mode=PAE))
    free, owner = xen.frames.free_frames, xen.frames.owner[:]
    for number in range(200):
        domain = boot(xen, f"start: mov eax, {number}\n stop: jmp stop", mode=(TWO_LEVEL, PAE)[number % 2])
        xen.run(5)
        # Frames are used again and again: no translation of an old guest's code may survive.
        assert domain.vcpus[0].state.eax == number
        xen.destroy(domain)
    assert (xen.frames.free_frames, xen.frames.owner) == (free, owner)
    assert (xen.domains, xen.current) == ({}, None)
    assert_free_frames_are_zero(xen)


ENDS = {
    "no handler": ("ud2", "exception 6 (#UD invalid opcode) and no handler", "ud2"),
    "no handler for a page fault": ("mov eax, [0x10]", "exception 14 (#PF page fault) at address 0x000000", "mov"),
    "nowhere": ("mov eax, 0x10\n jmp eax", "exception 14 (#PF page fault) at address 0x000000", "no code"),
    "into the hypervisor": ("mov eax, 0xfd000000\n jmp eax", "exception 13 (#GP protection) and no handler", "no code"),
    "wild stack": ("mov esp, 0x10\n push eax", "exception 14", "push"),
    "hypercall with a wild stack": ("mov esp, 0x10\n mov eax, __HYPERVISOR_iret\n int 0x82", "iret", ""),
    "data as code": (".byte 0x0f, 0xff, 0xff, 0xff", "exception 6", ""),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=["two-level", "PAE"])
def test_end_of_one_leaves_the_others(name: str, mode: Any) -> None:
    probe, reason, instruction = ENDS[name]
    xen = machine()
    other = boot(xen, LOOP)
    victim = boot(xen, f"start: mov ebx, 0x1BADB002\n here: {probe}\n stop: jmp stop", name="victim", mode=mode)
    xen.run(2000)
    assert victim.crashed
    assert not other.ended
    assert other.vcpus[0].state.eax > 900
    report = victim.report
    assert f"domain {victim.domid} (victim) ended: " in report
    assert reason in report
    assert instruction in report
    assert "ebx 1badb002" in report
    assert f"eip {victim.vcpus[0].state.eip:#010x}" in report
    assert "cs e019" in report
    assert victim.vcpus[0].run_state is RunState.ENDED


@pytest.mark.parametrize("portable", [False, True])
def test_a_guest_whose_first_instruction_cannot_be_fetched_is_ended(portable: bool) -> None:
    xen = Hypervisor(Machine(memory_mib=4, portable=portable))
    domain = boot(xen, LOOP)
    domain.vcpus[0].state.eip = 0x10
    assert xen.run(100).stop is Stop.IDLE
    assert (domain.crashed, xen.now) == (True, 0)
    assert "at address 0x00000010" in domain.report


def test_fault_in_the_fault_handler_ends_when_the_stack_does(play_text: Any) -> None:
    """A handler that faults at once pushes frame after frame until the stack runs into a page table."""
    seen = play_text(
        "start: mov ebx, offset table\n mov eax, __HYPERVISOR_set_trap_table\n int 0x82\n"
        "handler: ud2\n table: .byte 6, 0\n .short FLAT_RING1_CS\n .long handler\n .long 0, 0",
        budget=100_000,
    )
    assert seen.domain.crashed
    assert "is not on writable memory" in seen.domain.report
    frames = [event.frame for event in seen.delivered]
    assert all(before - after == 12 for before, after in pairwise(frames))
    assert 4096 // 12 - 1 <= len(frames) <= 4096 // 12


def test_frames_of_a_destroyed_domain_are_zero_and_free() -> None:
    xen = machine()
    domain = boot(xen, LOOP)
    xen.run(100)
    mine = [*domain.frames, *domain.own_tables, domain.shared_info_mfn]
    assert any(any(xen.memory.frame(mfn)) for mfn in mine)
    xen.destroy(domain)
    assert all(xen.frames.owner[mfn] == FREE for mfn in mine)
    assert not any(any(xen.memory.frame(mfn)) for mfn in mine)


def test_report_says_where_in_the_source() -> None:
    xen = machine()
    domain = boot(xen, "start: nop\n broken: nop\n ud2")
    xen.run(10)
    assert "(broken+0x1)" in domain.report
    assert "instruction: ud2" in domain.report


@pytest.mark.parametrize("code", [b"\xff\xff", b"\x0f\x0b", b"\xf0\x90", b"\x0f\x04", b"\xd6" * 15, b"\x0f\xb9"])
def test_report_survives_what_the_disassembler_does_not_know(code: bytes) -> None:
    xen = machine()
    domain = boot(xen, "start: .byte " + ", ".join(str(byte) for byte in code) + "\n ud2")
    xen.run(100)
    assert domain.crashed
    assert "instruction" in domain.report


def guests(xen: Hypervisor) -> None:
    boot(xen, "start: rdtsc\n div dword ptr [0x100]\n jmp start", name="crashes")
    boot(xen, YIELD, name="polite", mode=PAE)
    boot(
        xen, "start: cld\n mov edi, offset area\n mov ecx, 100\n rep stosb\n jmp start\n area: .skip 128", name="string"
    )
    boot(xen, SLEEPER, name="sleeps")


@pytest.mark.parametrize("cuts", [(5000,), (1, 4999), (777, 1223, 3000)])
def test_same_guests_same_trace(cuts: tuple[int, ...]) -> None:
    runs = []
    for lengths in ((5000,), cuts):
        xen = machine(61)
        guests(xen)
        for length in lengths:
            xen.run(length)
        assert xen.trace is not None
        states = [dict(vcpu.state.architectural()) for domain in xen.domains.values() for vcpu in domain.vcpus]
        runs.append((xen.trace.raw(), states, bytes(xen.memory.bytes), xen.now))
    assert runs[0] == runs[1]
