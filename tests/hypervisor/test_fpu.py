"""CR0.TS and #NM: how a kernel leaves floating-point registers alone until somebody needs them (hypercall 5)."""

from __future__ import annotations

from typing import Any

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.timeline import Timeline

TS = 8
SET = "mov ebx, 1\n mov eax, __HYPERVISOR_fpu_taskswitch\n int 0x82"
CLEAR = "xor ebx, ebx\n mov eax, __HYPERVISOR_fpu_taskswitch\n int 0x82"
USERS = [
    "fld1",
    "fninit",
    "emms",
    "movaps xmm1, xmm2",
    "fwait",
    "paddd xmm0, xmm1",
    "fxsave [udata]",
    "ldmxcsr [udata]",
]


@pytest.mark.parametrize("instruction", USERS)
def test_each_kind_of_instruction_raises_it_once(instruction: str, ring: int, mode: Any, play: Any) -> None:
    seen = play(instruction, ring, mode, setup=SET, udata=".align 16\n .skip 1024")
    assert seen.first.vector == 7
    assert (seen.frame["eip"], len(seen.first.words)) == (seen.label("probe"), 3 + 2 * (ring == 3))
    assert seen.vcpu.control["cr0"] & TS == 0


@pytest.mark.parametrize("instruction", ["nop", "mov eax, ebx", "pushfd\n popfd", "cpuid", "prefetcht0 [udata]"])
def test_no_other_does(instruction: str, ring: int, play: Any) -> None:
    seen = play(instruction, ring, setup=SET)
    assert seen.first.vector == 0x80
    assert seen.vcpu.control["cr0"] & TS


def test_int_7_is_not_one(play: Any) -> None:
    seen = play("int 7", 1, setup=SET, table=".byte 7, 1\n .short FLAT_RING1_CS\n .long handler")
    assert seen.first.vector == 7
    assert seen.vcpu.control["cr0"] & TS


@pytest.mark.parametrize(
    ("setup", "raised"),
    [
        (SET + "\n" + CLEAR, False),
        (SET + "\n clts", False),
        (SET + "\n mov eax, cr0\n and eax, 0xfffffff7\n mov cr0, eax", False),
        ("mov eax, cr0\n or eax, 8\n mov cr0, eax", True),
        (CLEAR + "\n" + SET + "\n" + SET, True),
        ("mov ebx, 0x80000000\n mov eax, __HYPERVISOR_fpu_taskswitch\n int 0x82", True),
    ],
)
def test_every_way_to_set_and_clear_it(setup: str, raised: bool, play: Any) -> None:
    seen = play("fld1", 3, setup=setup)
    assert seen.first.vector == (7 if raised else 0x80)


def test_the_virtual_register_says_so(play: Any) -> None:
    seen = play("mov ebx, cr0\n clts\n mov ecx, cr0\n nop", 1, setup=SET)
    assert (seen.word("seen", 4) & TS, seen.word("seen", 8) & TS) == (TS, 0)


LAZY = """
start:  xor esi, esi
        mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
again:  mov ebx, 1
        mov eax, __HYPERVISOR_fpu_taskswitch
        int 0x82
        {work}
        inc edi
        jmp again
none:   inc esi
        iretd
table:  .byte 7, 0
        .short FLAT_RING1_CS
        .long none
        .long 0, 0
value:  .long {value}
"""


def lazy(value: int) -> str:
    return LAZY.format(
        work=f"fninit\n fild dword ptr [value]\n {'nop' + chr(10) * 2} fistp dword ptr [value]", value=value
    )


@pytest.mark.parametrize("portable", [False, True], ids=["probed", "portable"])
def test_the_flag_and_the_registers_are_each_vcpus_own(portable: bool) -> None:
    """Three domains that set it and compute, and one that never does, switched every few instructions."""
    xen = Hypervisor(Machine(8, portable=portable), scheduler=RoundRobin(7), trace=Trace())
    domains = [boot(xen, lazy(1000 + number)) for number in range(3)]
    plain = boot(xen, "start: fld1\n fistp dword ptr [value]\n inc edi\n jmp start\nvalue: .long 0")
    xen.run(2_000)
    for number, domain in enumerate(domains):
        assert not domain.crashed
        state = domain.vcpus[0].state
        # One #NM for each time that it was set.
        assert state.esi - state.edi in (0, 1)
        assert state.edi > 10
        assert xen.guest_memory.read_word(domain.vcpus[0], domain.symbols["value"]) == 1000 + number
    assert not plain.crashed
    assert plain.vcpus[0].state.edi > 50


def test_both_cpus_agree() -> None:
    found = []
    for portable in (False, True):
        xen = Hypervisor(Machine(4, portable=portable), trace=Trace())
        domain = boot(xen, lazy(77))
        xen.run(500)
        assert xen.trace is not None
        traps = [(event.time, event.vector, event.eip) for event in xen.trace.events(Kind.TRAP)]
        found.append((traps, dict(domain.vcpus[0].state.architectural())))
    assert found[0] == found[1]


def test_a_step_back_brings_it_back() -> None:
    xen = Hypervisor(Machine(4), trace=Trace())
    domain = boot(xen, lazy(5))
    timeline = Timeline(xen, interval=100)
    timeline.run(300)
    after = timeline.machine_hash()
    for goal in (50, 6, 7, 8, 150):
        timeline.seek(goal)
    timeline.seek(300)
    assert timeline.machine_hash() == after
    assert not domain.crashed
