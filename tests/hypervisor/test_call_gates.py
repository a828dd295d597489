"""Call gates in a guest's own descriptor table, which the CPU takes by itself (paper 2.1.1, 3.1)."""

from __future__ import annotations

import subprocess
import sys
from random import Random
from typing import Any

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING3_CS, FLAT_RING3_SS
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.layout import TSS_BASE
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode
from xenlab.machine.vectors import SOFTWARE

FLAT_CODE, FLAT_DATA = 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF


def gate(selector: int, *, dpl: int = 3, count: int = 0, kind: int = 0xC, offset: int = 0, present: int = 1) -> int:
    """A gate descriptor."""
    high = offset & 0xFFFF_0000 | (present << 15 | dpl << 13 | kind << 8 | count)
    return high << 32 | selector << 16 | offset & 0xFFFF


# The descriptors stand in `table`, which becomes the GDT; selector 0x10 is the gate under test.
GUEST = """
start:  mov ebp, esi
        mov ebx, offset traps
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov ebx, {stack_selector}
        mov ecx, {stack}
        mov eax, __HYPERVISOR_stack_switch
        int 0x82
        mov eax, offset handler                     # the gate under test leads there
        mov word ptr [table + 16], ax
        shr eax, 16
        mov word ptr [table + 22], ax
        mov eax, [ebp + 68]                         # the list of frames
        mov ecx, offset table
        sub ecx, 0xC0000000
        shr ecx, 12
        mov eax, [eax + ecx * 4]
        mov [frame], eax
        mov ecx, eax
        shl ecx, 12
        or ecx, 0x61
        xor edx, edx
        xor esi, esi
        mov ebx, offset table
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        mov [mapped], eax
        mov ebx, offset frame
        mov ecx, 512
        mov eax, __HYPERVISOR_set_gdt
        int 0x82
        mov [accepted], eax
        push FLAT_RING3_SS
        push offset user_stack
        push 0x202
        push FLAT_RING3_CS
        push offset user_start
        iretd
        .align 4
handler: inc edi
        mov esi, esp
        retf {dropped}
fault:  pop dword ptr [error]
stop:   mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        .align 8
traps:  {rows}
        .long 0, 0
reason: .long SHUTDOWN_poweroff
frame:  .long 0
mapped: .long -1
accepted: .long -1
error:  .long -1
        .skip 512
kernel_stack:
        .align 4096
table:  {table}
        .skip 4096 - (. - table)
        .align 4096
user_start:
        {before}
again:  lcall {called}, 0x12345678
after:  {behind}
        .skip 256
user_stack:
        .long 0x11111111, 0x22222222, 0x33333333, 0x44444444
        .align 4096
user_end:
"""
ROWS = (
    "\n".join(f".byte {vector}, 0\n .short FLAT_RING1_CS\n .long fault" for vector in (8, 10, 11, 12, 13, 14, 17))
    + "\n .byte 0x80, 3\n .short FLAT_RING1_CS\n .long stop"
)


def play(
    descriptors: list[int], mode: PagingMode = TWO_LEVEL, portable: bool = False, budget: int = 400, **parts: str
) -> tuple[Hypervisor, Domain]:
    defaults = {
        "stack_selector": "FLAT_RING1_SS",
        "stack": "offset kernel_stack",
        "called": "0x13",
        "dropped": "0",
        "before": "nop",
        "behind": "int 0x80",
        "rows": ROWS,
    }
    table = "\n".join(f".long {value & 0xFFFF_FFFF:#x}, {value >> 32:#x}" for value in descriptors)
    xen = Hypervisor(Machine(4, portable=portable), trace=Trace())
    domain = boot(xen, GUEST.format(table=table, **defaults | parts), mode=mode)
    xen.run(budget)
    return xen, domain


def word(xen: Hypervisor, domain: Domain, name: str) -> int:
    return xen.guest_memory.read_word(domain.vcpus[0], domain.symbols[name])


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def test_a_call_from_ring_3_to_ring_1_and_back(mode: PagingMode, portable: bool) -> None:
    loop = {"behind": "jmp again"}
    xen, domain = play([0, 0, gate(FLAT_RING1_CS)], mode, portable, **loop)
    assert (word(xen, domain, "mapped"), word(xen, domain, "accepted")) == (0, 0)
    state, symbols = domain.vcpus[0].state, domain.symbols
    assert state.edi > 50
    # The frame: the caller's stack and the place behind the call, on the kernel's stack.
    assert state.esi == symbols["kernel_stack"] - 16
    frame = xen.guest_memory.read_words(domain.vcpus[0], state.esi, 4)
    assert frame == (symbols["after"], FLAT_RING3_CS, symbols["user_stack"], FLAT_RING3_SS)
    # And the hypervisor has not heard of it.
    assert xen.trace is not None
    last = max(event.time for event in xen.trace.events())
    assert last < 100


def test_parameters_are_copied(portable: bool) -> None:
    xen, domain = play([0, 0, gate(FLAT_RING1_CS, count=3)], portable=portable, dropped="12", behind="jmp after")
    state = domain.vcpus[0].state
    frame = xen.guest_memory.read_words(domain.vcpus[0], state.esi, 7)
    assert frame[2:5] == (0x1111_1111, 0x2222_2222, 0x3333_3333)
    assert state.esp == domain.symbols["user_stack"] + 12
    assert (state.cpl, state.edi) == (3, 1)


def test_the_stack_follows_the_vcpu(portable: bool) -> None:
    """Two domains that switch every few instructions, each with a stack of its own."""
    from xenlab.hypervisor.schedulers import RoundRobin

    xen = Hypervisor(Machine(8, portable=portable), scheduler=RoundRobin(13), trace=Trace())
    table = f".long 0, 0, 0, 0, {gate(FLAT_RING1_CS) & 0xFFFF_FFFF:#x}, {gate(FLAT_RING1_CS) >> 32:#x}"
    parts = {
        "stack_selector": "FLAT_RING1_SS",
        "called": "0x13",
        "dropped": "0",
        "before": "nop",
        "behind": "jmp again",
    }
    domains = [
        boot(xen, GUEST.format(table=table, rows=ROWS, stack=f"offset kernel_stack - {below}", **parts), mode=mode)
        for below, mode in ((0, TWO_LEVEL), (64, PAE))
    ]
    xen.run(1200)
    for domain, below in zip(domains, (0, 64), strict=True):
        assert domain.vcpus[0].state.edi > 50
        assert domain.vcpus[0].state.esi == domain.symbols["kernel_stack"] - below - 16


# descriptors 1 to 4 (4 is used by some), what set_gdt says.
REFUSED = {
    "a gate to data of the hypervisor's page": gate(0xE020),
    "a gate to the applications' flat code": gate(FLAT_RING3_CS),
    "a gate to an empty descriptor of the hypervisor's page": gate(0xE001),
    "a gate to behind the hypervisor's page": gate(0xFFF9),
    "reserved bits": gate(FLAT_RING1_CS) | 0x20 << 32,
    "all reserved bits": gate(FLAT_RING1_CS, count=0xFF),
    "a 16-bit call gate": gate(FLAT_RING1_CS, kind=4),
    "an interrupt gate": gate(FLAT_RING1_CS, kind=14),
    "a trap gate": gate(FLAT_RING1_CS, kind=15),
    "a task gate": gate(FLAT_RING1_CS, kind=5),
    "an available task state segment": gate(0, kind=9),
    "a busy task state segment": gate(0, kind=11),
    "a 16-bit task state segment": gate(0, kind=1),
    "a local table": gate(0, kind=2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_table(name: str) -> None:
    """Background: a gate is entered by anybody whom its level admits, and its target's own level in it is ignored.

    Invariant: no descriptor that the CPU can load gives ring 0, or leads there.
    """
    xen, domain = play([0, 0, REFUSED[name]])
    assert word(xen, domain, "accepted") == 0x1_0000_0000 - 22
    assert domain.vcpus[0].gdt == ()
    assert domain.vcpus[0].state.edi == 0


def test_a_selector_that_asks_for_ring_0_is_moved_to_ring_1(portable: bool) -> None:
    xen, domain = play([0, 0, gate(FLAT_RING1_CS & ~3, dpl=0)], portable=portable, called="0x10")
    stored = xen.memory.qwords[(domain.vcpus[0].gdt[0] << 12) + 16 >> 3]
    assert stored >> 16 & 0xFFFF == FLAT_RING1_CS
    assert stored >> 45 & 3 == 1
    # And with a level of 1 it is closed to applications.
    assert word(xen, domain, "error") == 0x10
    assert domain.vcpus[0].state.edi == 0


# (descriptors from the second on, parts), (vector, error code)
FAULTS: dict[str, tuple[list[int], dict[str, str], tuple[int, int]]] = {
    "a gate of the kernel's": ([0, gate(FLAT_RING1_CS, dpl=1)], {}, (13, 0x10)),
    "a gate that is not there": ([0, gate(FLAT_RING1_CS, present=0)], {}, (11, 0x10)),
    "to a null selector": ([0, gate(0)], {}, (13, 0)),
    "to an empty descriptor": ([0, gate(0x101)], {}, (13, 0x100)),
    "to itself": ([0, gate(0x10)], {}, (13, 0x10)),
    "to data": ([0, gate(0x19), FLAT_DATA | 1 << 45], {}, (13, 0x18)),
    "to code that is not there": ([0, gate(0x19), FLAT_CODE & ~(1 << 47) | 1 << 45], {}, (11, 0x18)),
    "to the empty local table": ([0, gate(0x1D)], {}, (13, 0x1C)),
    "to ring 2, for which there is no stack": ([0, gate(0x1A), FLAT_CODE | 2 << 45], {}, (10, 0)),
    "on the applications' stack": ([0, gate(FLAT_RING1_CS)], {"stack_selector": "FLAT_RING3_SS"}, (10, 0xE030)),
    "on code": ([0, gate(FLAT_RING1_CS)], {"stack_selector": "FLAT_RING1_CS"}, (10, 0xE018)),
    "on an empty descriptor": ([0, gate(FLAT_RING1_CS)], {"stack_selector": "0x109"}, (10, 0x108)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_gate(name: str, portable: bool) -> None:
    descriptors, parts, (vector, error) = FAULTS[name]
    xen, domain = play([0, *descriptors], portable=portable, **parts)
    assert xen.trace is not None
    traps = [(event.vector, event.error) for event in xen.trace.events(Kind.TRAP)]
    assert traps[0] == (vector, error)
    assert domain.vcpus[0].state.edi == 0
    if not parts:
        assert word(xen, domain, "error") == error
    else:
        assert "kernel stack has the unusable selector" in domain.report  # the handler needs it too


@pytest.mark.parametrize(
    "stack", ["0x1000", "0xff000100", "0xff020000", "0xff020010", "0xfc000800", "[ebp + 60]\n add ecx, 64", "8"]
)
def test_a_frame_goes_only_where_ring_1_may_write(stack: str, mode: PagingMode) -> None:
    """Background: the CPU pushes the frame with the rights of the inner ring; the guest says where.

    Invariant: nothing of the hypervisor's, and no page table, is written.
    """
    _xen, domain = play([0, 0, gate(FLAT_RING1_CS)], mode, stack=stack)
    assert domain.crashed
    assert domain.vcpus[0].state.edi == 0


def test_the_task_state_segment_is_out_of_reach(mode: PagingMode) -> None:
    for attack in (f"mov dword ptr [{TSS_BASE + 8:#x}], 0xe019", f"inc dword ptr [{TSS_BASE + 4:#x}]", "ltr ax"):
        xen, domain = play([0, 0, gate(FLAT_RING1_CS)], mode, before=attack)
        assert domain.vcpus[0].state.edi == 0
        assert xen.trace is not None
        assert (xen.trace.events(Kind.TRAP)[0].vector, domain.crashed) == (13, False)
    assert bytes(xen.memory.frame(1)[:12]) == bytes(12)


@pytest.mark.parametrize("entry", [0, 0x0000_6300_0000_0067, 0x0000_6100_0000_0067])
def test_a_nested_task_leads_nowhere(entry: int, portable: bool) -> None:
    """Background: IRET with NT set returns to the task that the task state segment names first, which is none.

    Construction: the null descriptor made a task state segment that is not present, which nobody refuses.
    """
    before = "pushfd\n or dword ptr [esp], 0x4000\n popfd\n iretd"
    xen, domain = play([entry, 0, gate(FLAT_RING1_CS)], portable=portable, before=before)
    assert xen.trace is not None
    first = xen.trace.events(Kind.TRAP)[0]
    assert (first.vector, first.error) == (11 if entry >> 40 & 2 else 10, 0)
    assert not domain.crashed


FUZZ = """
import sys
sys.path.insert(0, {folder!r})
from test_call_gates import fuzz
fuzz({seed}, {rounds})
"""


def fuzz(seed: int, rounds: int) -> None:
    """Random tables of descriptors, each entered by every far transfer; the CPU never leaves rings 1 to 3."""
    chance = Random(seed)
    for _ in range(rounds):
        pool = [chance.choice([FLAT_CODE, FLAT_DATA]) | chance.randrange(4) << 45 for _ in range(3)]
        targets = [0, 0x10, 0x18, 0x1B, 0x21, 0x2A, 0x33, FLAT_RING1_CS, 0x1D]
        table = [0, 0]
        for _descriptor in range(6):
            value = chance.choice(
                [gate(chance.choice(targets), dpl=chance.randrange(4), count=chance.randrange(32)), *pool]
            )
            table.append(value ^ (1 << chance.choice((40, 42, 43, 47)) if chance.random() < 0.3 else 0))
        selector = chance.randrange(2, 8) << 3 | chance.randrange(4)
        transfer = chance.choice(["lcall", "ljmp"])
        parts = {
            "called": f"{selector:#x}",
            "before": chance.choice(
                ["nop", "pushfd\n or dword ptr [esp], 0x4000\n popfd", f"{transfer} {selector:#x}, 0"]
            ),
            "behind": chance.choice(["int 0x80", "jmp again", "retf", "iretd"]),
            "stack_selector": chance.choice(["FLAT_RING1_SS", "0x19", "0x22", "FLAT_RING3_SS", "0"]),
        }
        xen, domain = play(table, chance.choice((TWO_LEVEL, PAE)), chance.random() < 0.2, 150, **parts)
        for vcpu in domain.vcpus:
            assert vcpu.state.cpl
        assert bytes(xen.memory.frame(1)[:12]) == bytes(12)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_table_that_is_let_in_ends_the_process(seed: int) -> None:
    """In a process of its own: where the emulator finds a task state segment that it does not like, it aborts."""
    from pathlib import Path

    script = FUZZ.format(folder=str(Path(__file__).parent), seed=seed, rounds=25)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_call_gates_are_not_software_interrupts() -> None:
    """A fault at a gate comes with its error code, not as an INT."""
    seen: list[Any] = []
    xen, _domain = play([0, 0, gate(FLAT_RING1_CS, dpl=1)], budget=0)
    handler = xen.cpu.handler
    xen.cpu.handler = lambda *trap: (seen.append(trap), handler(*trap))[1]  # type: ignore[func-returns-value]
    xen.run(400)
    assert (13, 0x10, 0) in seen
    assert all(error != SOFTWARE for vector, error, _address in seen if vector == 13)
