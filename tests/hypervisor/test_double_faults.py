"""Exceptions that cannot be handed over, and handlers that fault again: the guest ends, and nobody else does."""

from __future__ import annotations

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.trace import Trace
from xenlab.machine.paging import PagingMode

BYSTANDER = "start: inc eax\n jmp start"
BUDGET = 400_000


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def suffer(
    attack: str, rows: str, mode: PagingMode, portable: bool = False, budget: int = BUDGET
) -> tuple[Hypervisor, Domain, Domain]:
    """A guest that registers ``rows`` and runs ``attack``, beside one that only counts; both have run."""
    text = f"""
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        {attack}
stop:   jmp stop
table:  {rows}
        .long 0, 0
"""
    xen = Hypervisor(Machine(8, portable=portable), trace=Trace())
    guest, other = boot(xen, text, mode=mode), boot(xen, BYSTANDER)
    xen.run(budget)
    return xen, guest, other


def row(vector: int, handler: str, cs: str = "FLAT_RING1_CS") -> str:
    return f".byte {vector}, 0\n .short {cs}\n .long {handler}\n"


ENDS = {
    "no handler": ("ud2", row(14, "stop"), "exception 6 (#UD invalid opcode) and no handler"),
    "the handler's page is not there": ("ud2", row(6, "0x1000"), "exception 14 (#PF page fault) at address 0x00001000"),
    "neither is that of the page fault's": ("ud2", row(6, "0x1000") + row(14, "0x2000"), "triple fault"),
    "the page fault's own handler is not there": ("mov eax, [0x1000]", row(14, "0x2000"), "triple fault"),
    "the handler is in the hypervisor": ("ud2", row(6, "0xff800000"), "#GP protection) and no handler"),
    "all are in the hypervisor": ("ud2", row(6, "0xff800000") + row(13, "0xff800000"), "triple fault"),
    "the handlers are data": ("ud2", row(6, "stop", "FLAT_RING1_DS"), "unusable code selector 0xe021"),
    "the handlers are applications' code": ("ud2", row(6, "stop", "FLAT_RING3_CS"), "less privileged"),
    "no stack": ("mov esp, 0x1000\n ud2", row(6, "stop"), "is not on writable memory"),
    "no stack for a push": ("mov esp, 0x1000\n push eax", row(14, "stop"), "is not on writable memory"),
    "the stack is in the hypervisor": ("mov esp, 0xff010000\n ud2", row(6, "stop"), "is not on writable memory"),
    "the stack is a page table": (
        "mov esp, [esi + 60]\n add esp, 64\n ud2",
        row(6, "stop"),
        "is not on writable memory",
    ),
    "the stack wraps round": ("mov esp, 4\n ud2", row(6, "stop"), "is not on writable memory"),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_guest(name: str, mode: PagingMode, portable: bool) -> None:
    attack, rows, reason = ENDS[name]
    xen, guest, other = suffer(attack, rows, mode, portable, 8_000)
    assert guest.crashed
    assert reason in guest.report
    assert not other.ended
    assert other.vcpus[0].state.eax > 3_000
    before = other.vcpus[0].state.eax
    xen.destroy(guest)
    xen.run(1_000)
    assert other.vcpus[0].state.eax > before


# Handlers that fault again.  What is left of the stack is used up, or time passes for ever; nobody else is held up.
AGAIN = {
    "a handler that faults in its first instruction": ("mov eax, [0x1000]", row(14, "start + 0")),
    "a page-fault handler that reads what is not there": ("faults: mov eax, [0x1000]", row(14, "faults")),
    "one that forgets its stack": ("mov edi, esp\nfaults: mov esp, edi\n mov eax, [0x1000]", row(14, "faults")),
    "one that faults otherwise": ("first: ud2\nsecond: mov eax, [0x1000]", row(6, "second") + row(14, "first")),
    "invalid opcodes": ("faults: ud2", row(6, "faults")),
    "software interrupts": ("again: int3", row(3, "again")),
    "single steps": ("pushfd\n or dword ptr [esp], 0x100\n popfd\nagain: jmp again", row(1, "again")),
    "no place to step to": (
        "pushfd\n or dword ptr [esp], 0x100\n popfd\n nop\n nop",
        row(1, "0x1000") + row(14, "stop"),
    ),
    "faults of the emulated": ("faults: hlt", row(13, "faults")),
}


@pytest.mark.parametrize("name", AGAIN)
def test_handlers_that_fault_again(name: str, mode: PagingMode) -> None:
    attack, rows = AGAIN[name]
    xen, guest, other = suffer(attack, rows, mode)
    assert xen.now == BUDGET
    # Half of the time, or all that the guest that has ended left over, is the other's.
    assert other.vcpus[0].state.eax > BUDGET // 2 // 2 - 60_000
    assert not other.ended
    if guest.crashed:
        assert "is not on writable memory" in guest.report


def test_one_instruction_is_one_step_of_time_even_there(mode: PagingMode) -> None:
    """A guest that faults without end can be run, and stopped, instruction by instruction."""
    xen = Hypervisor(Machine(4), trace=Trace())
    text = "start: mov ebx, offset table\n mov eax, __HYPERVISOR_set_trap_table\n int 0x82\n mov edi, esp\n"
    text += "faults: mov esp, edi\n ud2\ntable: " + row(6, "faults") + ".long 0, 0"
    boot(xen, text, mode=mode)
    for number in range(1, 200):
        xen.run(1)
        assert xen.now == number


def test_the_report_says_what_led_there(mode: PagingMode) -> None:
    attack = "mov eax, 0x1234\n mov ecx, 0xabcd\n mov esp, 0x2000\n mov [0x1000], ecx"
    _xen, guest, _other = suffer(attack, row(14, "stop"), mode, budget=1_000)
    report = guest.report
    first, second, *_rest = report.splitlines()
    assert first.startswith("domain 0 (guest) ended: the frame for exception 14 (#PF page fault) at 0x00001ff0")
    assert "ring 1" in second
    assert "(start+" in second
    assert "instruction: mov dword ptr [0x1000], ecx" in report
    assert "eax 00001234  ecx 0000abcd" in report
    assert "esp 00002000" in report
    assert "stack: nothing readable" in report
    assert "cr0 80050033" in report
    assert "kernel stack e021:" in report
    assert "trap, domain 0: vector 0xe, error 2, address 0x1000" in report
    assert "hypercall, domain 0: number 0" in report
