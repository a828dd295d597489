"""The portable CPU gives the same traces, times and registers as the probed one."""

from __future__ import annotations

import pytest
from bare_machine import CODE, MEMORY_FORMS, Bare
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.hypervisor.core import Hypervisor, Stop
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.layout import ProbeError
from xenlab.machine.machine import Machine
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.machine.portable import PortableCpu
from xenlab.toolstack import boot

# Faults of every kind bounced to ring 1, emulated instructions, ports, gates, a long string
# instruction, a jump into nowhere, then ring 3 with faults, x87 and a loop that is preempted.
GUEST = """
start: mov ebx, offset traps
 mov eax, __HYPERVISOR_set_trap_table
 int 0x82
 mov ebx, FLAT_RING1_SS
 mov ecx, offset kstack_top
 mov eax, __HYPERVISOR_stack_switch
 int 0x82
 fld1
 fldpi
 mov eax, 0x3f800000
 movd xmm3, eax
 fninit
 fld1
 fldpi
 fdivp
 mov eax, [0x1000]
 mov [0x2004], eax
 ud2
 mov eax, cr0
 mov eax, cr4
 rdtsc
 cpuid
lock add [0xc0002000], eax
 in al, 0x60
 out 0x60, al
 int 3
 int 0x50
 mov ecx, 70000
 mov esi, offset user_start
 mov edi, offset user_start
 rep lodsb
 mov ax, 0x10
 mov ds, ax
 mov eax, 0xdead
 jmp eax
 .align 16
back:
 push FLAT_RING3_SS
 push offset ustack_top
 push 0x202
 push FLAT_RING3_CS
 push offset user
  jmp hypercall_page + 32*23
hn:  jmp hypercall_page + 32*23
pf: add esp,4
 mov dword ptr [esp], offset back
  jmp hypercall_page + 32*23
skip2: add esp,4
skip2n: add dword ptr [esp], 2
  jmp hypercall_page + 32*23
done: mov ebx, SCHEDOP_shutdown
 mov ecx, offset reason
 mov eax, __HYPERVISOR_sched_op
 int 0x82
reason: .long 0
traps: .byte 6,0
 .word FLAT_RING1_CS
 .long skip2n
 .byte 14,0
 .word FLAT_RING1_CS
 .long pfskip
 .byte 13,0
 .word FLAT_RING1_CS
 .long skip2
 .byte 3,3
 .word FLAT_RING1_CS
 .long hn
 .byte 0x50,3
 .word FLAT_RING1_CS
 .long hn
 .byte 0x51,3
 .word FLAT_RING1_CS
 .long done
 .long 0,0
pfskip:
 cmp dword ptr [esp+4], 0xdead
 je pf
 add esp,4
 add dword ptr [esp], 5
  jmp hypercall_page + 32*23
 .align 4096
user_start:
user: mov eax, 7
 add eax, -7
 fldpi
 hlt
 nop
 mov [0xc0002000], eax
 mov eax, [0xc0002000]
 mov ecx, 100000
1: dec ecx
 jnz 1b
 int 0x51
 .skip 512
ustack_top:
 .align 4096
user_end:
 .skip 4096
kstack_top:
"""


def run_two(portable: bool, mode, slice_length: int):
    xen = Hypervisor(Machine(16, portable=portable), trace=Trace())
    domains = [boot(xen, GUEST, name=name, mode=mode) for name in ("a", "b")]
    stop = Stop.BUDGET
    while stop is Stop.BUDGET:
        stop = xen.run(slice_length).stop
        assert xen.now < 3_000_000
    return xen, domains


@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def test_two_domains_give_the_same_trace_registers_and_memory(mode) -> None:
    (probed, ours), (portable, theirs) = run_two(False, mode, 1_000_000), run_two(True, mode, 77_777)
    assert portable.trace.raw() == probed.trace.raw()
    assert portable.now == probed.now
    for one, other in zip(ours, theirs, strict=True):
        assert not one.crashed
        assert other.vcpus[0].state.architectural() == one.vcpus[0].state.architectural()
    assert portable.memory.bytes == probed.memory.bytes


def test_the_guest_of_that_test_meets_what_it_is_for() -> None:
    xen, domains = run_two(False, TWO_LEVEL, 1_000_000)
    traps = {(e.vector, e.ring) for e in xen.trace.events(Kind.TRAP)}
    assert {(6, 1), (14, 1), (13, 1), (3, 1), (0x50, 1), (13, 3), (14, 3), (0x51, 3)} <= traps
    assert {e.error for e in xen.trace.events(Kind.TRAP) if e.vector == 14} >= {0, 2, 5, 7}
    assert len(xen.trace.events(Kind.EMULATE)) >= 6
    assert len(xen.trace.events(Kind.SWITCH)) > 4
    assert all(domain.vcpus[0].state.architectural()["st0"] for domain in domains)


def test_a_failed_probe_chooses_the_portable_cpu(monkeypatch) -> None:
    def fail() -> None:
        raise ProbeError("forced")

    monkeypatch.setattr("xenlab.machine.machine.probe", fail)
    assert isinstance(Machine(1).cpu, PortableCpu)


@settings(max_examples=150)
@given(
    form=st.sampled_from(MEMORY_FORMS),
    offset=st.sampled_from([0, 1, 0x7F8, 0xFF0, 0xFFD, 0xFFF]),
    flags=st.lists(st.sampled_from([0, 1, 3, 5, 7, 0x67]), min_size=2, max_size=2),
    no_execute=st.booleans(),
    ring=st.sampled_from([1, 3]),
    mode=st.sampled_from([TWO_LEVEL, PAE]),
)
def test_error_codes_agree_for_every_kind_of_access(form, offset, flags, no_execute, ring, mode) -> None:
    seen = []
    for portable in (False, True):
        bare = Bare(mode, ring, portable)
        for page, bits in zip((0x30, 0x31), flags, strict=True):
            nx = 1 << 63 if no_execute and mode is PAE else 0
            bare.map(page, page << 12 | bits | nx)
        bare.run(form.format(a=hex(0x30000 + offset)), 40)
        seen.append((bare.traps, bare.state.architectural(), bytes(bare.memory.bytes)))
    assert seen[1] == seen[0]


@pytest.mark.parametrize("portable", [False, True])
def test_save_and_restore_round_trip(portable: bool) -> None:
    bare = Bare(portable=portable)
    bare.run("fldpi\nmov eax, 5\nstd\nmov ebx, 0x33\nmov ds, ebx\nud2")
    before = dict(bare.state.architectural())
    saved = bare.state.save()
    bare.traps.clear()
    bare.run("cld\nfninit\nmov eax, 0x21\nmov ds, eax\nud2")
    assert bare.state.architectural() != before
    bare.state.restore(saved)
    assert bare.state.architectural() == before
    bare.cpu.run_until(bare.cpu.instructions + 1)
    assert bare.traps[-1].eip == before["eip"] > CODE
    assert bare.state.architectural() == before
