"""The system call that goes from ring 3 to ring 1 by the CPU alone, and what may not (paper 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING1_SS, FLAT_RING3_CS, FLAT_RING3_SS
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode

# An application that makes system calls for ever; EDI counts them in the kernel, on the kernel's stack.
CALLER = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, {stack_selector}
        mov ecx, {stack}
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        mov byte ptr [shared_info + 1], {mask}
        push FLAT_RING3_SS
        push offset user_stack
        push 0x202
        push FLAT_RING3_CS
        push offset again
        iretd
handler: inc edi
        iretd
protection: inc ebp
        add esp, 4
        add dword ptr [esp], 2
        iretd
table:  .byte 0x80, {flags}
        .short {selector}
        .long handler
        .byte 13, 0
        .short FLAT_RING1_CS
        .long protection
        .long 0, 0
        .align 4096
other:  .skip 4096
kernel_stack:
        .align 4096
user_start:
again:  {before}
        int 0x80
        jmp again
        .skip 256
user_stack:
        .align 4096
user_end:
"""
USUAL = {
    "stack_selector": "FLAT_RING1_SS",
    "stack": "offset kernel_stack",
    "mask": "0",
    "flags": "3",
    "selector": "FLAT_RING1_CS",
    "before": "nop",
}


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


Started = tuple[Hypervisor, Vcpu, list[tuple[int, int, int]]]
Start = Callable[..., Started]


@pytest.fixture
def start(portable: bool) -> Start:
    """``start(**parts)`` runs the caller; the machine, its vCPU, and all traps that the hypervisor saw."""

    def run(mode: PagingMode = TWO_LEVEL, budget: int = 200, **parts: str) -> Started:
        xen = Hypervisor(Machine(4, portable=portable), trace=Trace())
        domain = boot(xen, CALLER.format(**USUAL | parts), mode=mode)
        traps: list[tuple[int, int, int]] = []
        handler = xen.cpu.handler

        def watched(vector: int, error: int, address: int) -> None:
            traps.append((vector, error, address))
            handler(vector, error, address)

        xen.cpu.handler = watched
        xen.run(budget)
        return xen, domain.vcpus[0], traps

    return run


def gates(xen: Hypervisor) -> list[Event]:
    assert xen.trace is not None
    return xen.trace.events(Kind.GATE)


def test_it_does_not_enter_the_hypervisor(start: Start, mode: PagingMode) -> None:
    xen, vcpu, traps = start(mode)
    assert [trap[0] for trap in traps] == [0x82, 0x82]
    assert vcpu.state.edi == xen.cpu.gates.taken == len(gates(xen)) == 37


@pytest.mark.parametrize("mask", ["0", "1"])
def test_the_frame_is_what_hardware_pushes(start: Start, mode: PagingMode, mask: str) -> None:
    xen, vcpu, _traps = start(mode, mask=mask, before="stc")
    symbols = vcpu.domain.symbols
    first = gates(xen)[0]
    behind = symbols["again"] + 3
    # The real flags, with interrupts on, and no event mask beside CS, whatever it is.
    assert first.words == (behind, FLAT_RING3_CS, 0x203, symbols["user_stack"], FLAT_RING3_SS)
    assert (first.vector, first.from_ring, first.to_ring) == (0x80, 3, 1)
    assert (first.handler, first.frame) == (symbols["handler"], symbols["kernel_stack"] - 20)
    assert xen.memory.bytes[vcpu.info + 1] == int(mask)


def test_the_frame_is_in_memory_and_the_handler_in_ring_1(start: Start, mode: PagingMode) -> None:
    xen, vcpu, _traps = start(mode, budget=12)
    while vcpu.state.eip != vcpu.domain.symbols["handler"]:
        xen.run(1)
    state, last = vcpu.state, gates(xen)[-1]
    assert (state.cpl, state.esp) == (1, last.frame)
    assert [state.segment(name).selector for name in ("cs", "ss")] == [FLAT_RING1_CS, FLAT_RING1_SS]
    assert xen.guest_memory.read_words(vcpu, last.frame, 5) == last.words
    assert state.eflags & 0x200


def test_single_step_and_nested_task_end_at_the_gate(start: Start) -> None:
    """TF and NT are in the frame and off in the handler; TF comes back with IRET."""
    xen, vcpu, _traps = start(
        budget=60,
        before="pushfd\n or dword ptr [esp], 0x4100\n popfd\n nop",
        flags="3\n .short FLAT_RING1_CS\n .long handler\n .byte 1, 0\n .short FLAT_RING1_CS\n .long step\n .byte 99, 3",
        selector="FLAT_RING1_CS",
        mask="0\n jmp over\nstep: and dword ptr [esp + 8], 0xfffffeff\n iretd\nover: nop",
    )
    assert not vcpu.domain.crashed
    assert all(event.words[2] & 0x4000 for event in gates(xen))


def test_the_kernel_too_may_call_itself(start: Start) -> None:
    text = CALLER.format(**USUAL).replace("push FLAT_RING3_SS", "mov esi, esp\n int 0x80\n push FLAT_RING3_SS", 1)
    xen = Hypervisor(Machine(4), trace=Trace())
    domain = boot(xen, text)
    xen.run(30)
    first = gates(xen)[0]
    assert (first.from_ring, first.to_ring, len(first.words)) == (1, 1, 3)
    assert first.words[1] == FLAT_RING1_CS
    assert first.frame == domain.vcpus[0].state.esi - 12


SLOW = {
    "a gate that masks events": {"flags": "7"},
    "a selector of the hypervisor's page": {"selector": "FLAT_RING1_CS + 0x100"},
    "data": {"selector": "FLAT_RING1_DS"},
    "the applications' flat code": {"selector": "FLAT_RING3_CS"},
    "an empty descriptor": {"selector": "0x109"},
    "the empty local table": {"selector": "0xd"},
    "a null selector": {"selector": "0"},
    "code as stack": {"stack_selector": "FLAT_RING1_CS"},
    "the applications' stack": {"stack_selector": "FLAT_RING3_SS"},
    "a null stack": {"stack_selector": "0"},
    "no stack there": {"stack": "0x1000"},
    "the stack in the hypervisor": {"stack": "0xff000100"},
    "the stack in the machine's list": {"stack": "0xfc000800"},
    "the stack half in nothing": {"stack": "user_end + 8"},
    "the stack at the end of all addresses": {"stack": "8"},
}


@pytest.mark.parametrize("name", SLOW)
def test_what_the_cpu_would_fault_at_goes_to_the_hypervisor(start: Start, name: str) -> None:
    xen, vcpu, traps = start(**SLOW[name])
    assert xen.cpu.gates.taken == 0
    assert 0x80 in [trap[0] for trap in traps]
    assert vcpu.state.cpl != 0
    # The hypervisor can do with the first what the CPU cannot, and ends the guest for the others.
    assert vcpu.domain.crashed == (name != "a gate that masks events")


def test_a_closed_gate_is_a_protection_fault(start: Start) -> None:
    xen, vcpu, traps = start(flags="1")
    assert xen.cpu.gates.taken == 0
    assert vcpu.state.ebp > 5
    assert {trap[0] for trap in traps} == {0x82, 0x80}


def test_a_stack_in_a_page_table_is_not_written(start: Start, mode: PagingMode) -> None:
    xen, vcpu, _traps = start(mode, stack="[esi + 60]\n add ecx, 64")
    assert xen.cpu.gates.taken == 0
    assert vcpu.domain.crashed


@pytest.mark.parametrize("offset", [4, 8, 12, 16, 6])
def test_a_frame_over_two_pages(start: Start, mode: PagingMode, offset: int) -> None:
    xen, vcpu, _traps = start(mode, stack=f"offset other + {offset}")
    assert xen.cpu.gates.taken == 37
    last = gates(xen)[-1]
    assert xen.guest_memory.read_words(vcpu, last.frame, 5) == last.words


def test_a_table_of_a_domain_is_its_own(portable: bool) -> None:
    """Two domains with different handlers, switched every few instructions."""
    from xenlab.hypervisor.schedulers import RoundRobin

    xen = Hypervisor(Machine(8, portable=portable), scheduler=RoundRobin(17), trace=Trace())
    parts = USUAL | {"before": "nop\n nop"}
    texts = (CALLER.format(**USUAL), CALLER.format(**parts | {"stack": "offset kernel_stack - 64"}))
    domains = [boot(xen, text, mode=mode) for text, mode in zip(texts, (TWO_LEVEL, PAE), strict=True)]
    plain = boot(xen, "start: int 0x80\n jmp start")
    xen.run(600)
    assert plain.crashed
    for domain, below in zip(domains, (0, 64), strict=True):
        mine = [event for event in gates(xen) if event.domain == domain.domid]
        # One may stand before its first instruction in the kernel.
        assert 20 < domain.vcpus[0].state.edi <= len(mine) <= domain.vcpus[0].state.edi + 1
        assert {event.frame for event in mine} == {domain.symbols["kernel_stack"] - below - 20}


def test_unregistering_closes_the_way(play_text: Any) -> None:
    text = CALLER.format(**USUAL).replace(
        "push FLAT_RING3_SS", "xor ebx, ebx\n mov eax, __HYPERVISOR_set_trap_table\n int 0x82\n push FLAT_RING3_SS", 1
    )
    seen = play_text(text)
    assert seen.domain.crashed
    assert not seen.delivered
