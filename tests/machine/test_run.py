"""Running exactly so many instructions, and stopping in every way there is."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from bare_machine import CODE, DATA, Bare
from hypothesis import given, settings
from hypothesis import strategies as st

WORK = f"""
    mov ecx, 300
    mov edi, {DATA}
    xor eax, eax
    cld
    rep stosd
again:
    add eax, ecx
    ud2
    mov [{DATA}], eax
    in al, 0x60
    int 0x40
    jmp again
"""


def working(portable: bool) -> Bare:
    """A guest whose faults are skipped."""

    def skip(bare: Bare, trap) -> None:
        bare.cpu.state.eip += 2 if trap.vector < 32 else 0

    bare = Bare(portable=portable, handle=skip)
    bare.load(WORK)
    return bare


@pytest.mark.parametrize("portable", [False, True])
@settings(max_examples=25)
@given(slices=st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_the_count_is_exact_and_does_not_depend_on_slicing(portable: bool, slices: list[int]) -> None:
    whole, cut = working(portable), working(portable)
    whole.cpu.run_until(sum(slices))
    for length in slices:
        start = cut.cpu.instructions
        cut.cpu.run_until(start + length)
        assert cut.cpu.instructions == start + length
    assert cut.traps == whole.traps
    assert cut.state.architectural() == whole.state.architectural()
    assert cut.memory.bytes == whole.memory.bytes


@pytest.mark.parametrize("portable", [False, True])
def test_a_budget_ends_inside_a_string_instruction(portable: bool) -> None:
    bare = working(portable)
    bare.cpu.run_until(104)
    assert bare.state.ecx == 200
    assert bare.state.edi == DATA + 400


@pytest.mark.parametrize("portable", [False, True])
def test_stop_in_the_handler_ends_the_run_at_that_trap(portable: bool) -> None:
    bare = Bare(portable=portable)
    bare.run("nop\nnop\nint 0x40\nnop", 100)
    assert bare.cpu.instructions == 3
    assert bare.traps[0].time == 3


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("instruction", ["ud2", "in al, 0x60", "syscall", "int 0x40"])
def test_stop_ends_the_run_for_every_way_into_the_handler(portable: bool, instruction: str) -> None:
    bare = Bare(portable=portable)
    bare.run(f"{instruction}\n1: jmp 1b", 100)
    assert bare.cpu.instructions == 1


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("deadline", "end"), [(2, 3), (40, 40), (5000, 1000)])
def test_the_handler_may_move_the_deadline(portable: bool, deadline: int, end: int) -> None:
    def move(bare: Bare, _trap) -> None:
        bare.cpu.deadline = deadline

    bare = Bare(portable=portable, handle=move)
    bare.cpu.deadline = 500
    bare.run("nop\nnop\nint 0x40\n1: jmp 1b", 1000)
    assert bare.cpu.instructions == end


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("instruction", ["ud2", "in al, 0x60", "int 0x40", "mov eax, [0x40000000]"])
def test_an_exception_in_the_handler_reaches_the_caller_and_the_machine_goes_on(portable, instruction) -> None:
    def fail(_bare: Bare, _trap) -> None:
        raise RuntimeError("from the handler")

    bare = Bare(portable=portable, handle=fail)
    with pytest.raises(RuntimeError, match="from the handler"):
        bare.run(f"nop\n{instruction}\nmov ebx, 7", 100)
    assert bare.cpu.instructions == 2
    bare.handle = None
    bare.state.eip = bare.memory.bytes.obj.find(b"\xbb\x07", CODE)
    bare.cpu.run_until(bare.cpu.instructions + 1)
    assert bare.state.ebx == 7


@pytest.mark.parametrize("portable", [False, True])
def test_ctrl_c_ends_an_endless_guest_and_the_machine_goes_on(portable: bool) -> None:
    bare = Bare(portable=portable)
    bare.load("1: inc eax\njmp 1b")
    ours = threading.main_thread().ident
    interrupt = (lambda: signal.pthread_kill(ours, signal.SIGINT)) if hasattr(signal, "pthread_kill") else None
    timer = threading.Timer(0.2, interrupt or (lambda: os.kill(os.getpid(), signal.CTRL_C_EVENT)))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        bare.cpu.run_until(1 << 60)
    timer.join()
    begun, eax = bare.cpu.instructions, bare.state.eax
    assert abs(2 * eax - begun) <= 1
    bare.cpu.run_until(begun + 1000)
    assert bare.cpu.instructions == begun + 1000
    assert bare.state.eax == eax + 500


@pytest.mark.parametrize("portable", [False, True])
def test_flags_survive_a_trap_and_a_slice_of_another_state(portable: bool) -> None:
    """Flags are kept elsewhere during a run than between runs; a state moves between the two."""
    bare = Bare(portable=portable)
    one, two = bare.state, bare.new_state(3)
    two.eip = CODE + 0x100
    bare.load(
        "mov al, 0x7f\nadd al, 1\nint 0x40\nnop\npushfd\npop ebx\nud2\n.org 0x100\n xor eax, eax\nint 0x41\n1: jmp 1b"
    )
    bare.state.eip = CODE
    bare.handle = lambda bare, trap: bare.cpu.load(two if trap.vector == 0x40 else one) if trap.vector >= 32 else stop()

    def stop() -> None:
        bare.cpu.stop()

    bare.cpu.run_until(4)
    bare.cpu.run_until(5)
    bare.cpu.load(one)
    bare.cpu.run_until(6)
    bare.cpu.load(two)
    bare.cpu.run_until(8)
    bare.cpu.load(one)
    bare.cpu.run_until(30)
    overflow_sign_adjust = 0x890
    assert one.ebx & 0x8D5 == overflow_sign_adjust


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize(
    ("instruction", "vector"),
    [("in eax, dx", 13), ("out dx, eax", 13), ("rep insb", 13), ("syscall", 6), ("sysenter", 13), ("rdtsc", 13)],
)
def test_instructions_that_leave_the_engine_have_not_happened(portable, ring, instruction, vector) -> None:
    bare = Bare(ring=ring, portable=portable)
    bare.load(f"mov eax, 0x77\nmov edx, 0x60\nmov ecx, 3\ncmp eax, edx\n{instruction}\nnop")
    bare.cpu.run_until(4)
    before = dict(bare.state.architectural())
    bare.cpu.run_until(20)
    assert [(trap.vector, trap.error, trap.time) for trap in bare.traps] == [(vector, 0, 5)]
    assert bare.state.architectural() == before


def test_a_new_state_inherits_nothing_from_the_guest_that_ran() -> None:
    bare = Bare(ring=3)
    fresh = dict(bare.new_state(1).architectural())
    bare.run("mov eax, 0x5ec4e7\nfldpi\nmovd xmm0, eax\nstd\nud2")
    assert dict(bare.new_state(1).architectural()) == fresh


def test_code_that_python_changed_is_seen_after_forget_code() -> None:
    bare = Bare()
    bare.run("1: mov eax, 1\nint 0x40")
    bare.run("1: mov eax, 2\nint 0x40")
    assert bare.state.eax == 2
