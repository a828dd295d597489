"""Hostile guests.  Each test says what is attacked (background), what must hold (invariant), and how (construction)."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hostile_guest import FRAMES_OVER_CODE

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.domain import CONSOLE_BYTES, Domain
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.engine import TRANSLATIONS, Engine
from xenlab.machine.memory import Memory
from xenlab.machine.paging import TWO_LEVEL
from xenlab.timeline import Timeline
from xenlab.timeline.digest import machine_hash

NEIGHBOUR = "start: inc eax\n jmp start"
TABLE = """
        mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
"""


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    """Each kind of CPU."""
    return bool(request.param)


def beside_a_neighbour(text: str, mode: Any = TWO_LEVEL, portable: bool = False, budget: int = 20_000) -> Domain:
    """The attacker after a run in which its neighbour has to get on."""
    xen = Hypervisor(Machine(memory_mib=8, portable=portable), trace=Trace())
    attacker = boot(xen, text, mode=mode)
    neighbour = boot(xen, NEIGHBOUR, name="neighbour", mode=mode)
    xen.run(budget)
    if not attacker.ended:
        xen.pause(attacker)
        xen.run(budget)
    assert neighbour.vcpus[0].state.eax > 1000
    assert xen.now >= budget
    state = attacker.vcpus[0].state
    assert state.cpl in (1, 3)
    assert attacker.ended or state.eflags & 0x3000 == 0, "I/O privilege"
    return attacker


PROBES = {
    "nested task": "pushfd\n or dword ptr [esp], 0x4000\n popfd\n push 0\n iretd",
    "I/O privilege by popf": "push 0x3202\n popfd",
    "single step": "pushfd\n or dword ptr [esp], 0x100\n popfd\n1: jmp 1b",
    "single step over a stack load": "pushfd\n or dword ptr [esp], 0x100\n popfd\n push ss\n pop ss\n int 0x82",
    "4 G repetitions": "mov ecx, -1\n1: mov esi, offset udata\n rep lodsb",
    "4 G ports": "mov ecx, -1\n rep insb",
    "the last byte": "mov eax, 0xffffffff\n jmp eax",
    "jump into the hypervisor": "mov eax, 0xfc000000\n jmp eax",
    "execute the descriptor table": "mov eax, 0xff00e000\n jmp eax",
    "write the descriptor table": "mov dword ptr [0xff00e018], 0",
    "stack at 0": "xor esp, esp\n int3",
    "stack that wraps": "mov esp, 8\n ud2",
    "stack in the hypervisor": "mov esp, 0xfc000010\n ud2",
    "stack in the descriptor table": "mov esp, 0xff00f000\n ud2",
    "hypercall iret at the wrap": "mov esp, 0xfffffff8\n mov eax, __HYPERVISOR_iret\n int 0x82",
    "ring 0 by far return": "push 0xe018\n push offset after\n retf",
    "ring 0 by far call": "lcall 0xe018, 0xc0002000",
    "far call inwards": "lcall FLAT_RING1_CS, 0xc0002000",
    "undecodable": ".byte 0xff, 0xff",
    "every vector": "int 1\n int 2\n int 8\n int 14\n int 0xff",
    "prefixed hypercall": ".byte 0x66, 0xf3, 0xcd, 0x82",
    "system calls": "syscall\n sysenter\n sysexit\n sysret",
    "self-modifying": "1: inc dword ptr [2f+1]\n2: mov eax, 5\n jmp 1b",
}


@pytest.mark.parametrize("name", PROBES)
def test_probe_changes_neither_ring_nor_neighbour(
    name: str, ring: int, mode: Any, portable: bool, play_source: Any
) -> None:
    """Background: instructions that have broken monitors.

    Invariant: the attacker stays in ring 1 or 3 without I/O privilege, and its neighbour gets its turns.
    Construction: the instruction in ring 1 and 3, in both formats of page tables, on both CPUs.
    """
    beside_a_neighbour(play_source(PROBES[name], ring), mode, portable)


def test_handlers_that_cannot_be_fetched(mode: Any, portable: bool) -> None:
    """Background: time is instructions begun.  A handler on a page that is not there begins none.

    Invariant: a guest cannot stop time; nobody would be scheduled, and Ctrl-C would not be seen.
    Construction: the handlers of #PF and #GP stand where a fetch raises the other, and the stack is
    long enough for tens of thousands of frames.
    """
    text = f"""
start:  {TABLE}
        ud2
table:  .byte 6, 0
        .short FLAT_RING1_CS
        .long 0x1000
        .byte 13, 0
        .short FLAT_RING1_CS
        .long 0x1000
        .byte 14, 0
        .short FLAT_RING1_CS
        .long 0xFF100000
        .long 0, 0
"""
    attacker = beside_a_neighbour(text, mode, portable)
    assert attacker.crashed
    assert "triple fault" in attacker.report


def test_one_handler_on_a_missing_page_is_no_triple_fault(mode: Any, portable: bool) -> None:
    """The counterpart: #UD's handler is missing, #PF's is not and ends the guest in good order."""
    text = f"""
start:  {TABLE}
        ud2
handler: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_reboot
table:  .byte 6, 0
        .short FLAT_RING1_CS
        .long 0x1000
        .byte 14, 0
        .short FLAT_RING1_CS
        .long handler
        .long 0, 0
"""
    attacker = beside_a_neighbour(text, mode, portable)
    assert (attacker.crashed, attacker.shutdown) == (False, 1)


VIRTUAL_8086 = 5 * "push 0x10\n " + "push 0x900\n push 0x23202\n push 0\n push 0x4000\n iretd"


def test_virtual_8086_mode(ring: int, mode: Any, portable: bool, play_source: Any) -> None:
    """Background: QEMU enters virtual-8086 mode by IRET from any ring, and takes I/O privilege with it.

    Invariant: no handler in ring 1 begins with I/O privilege or with real-mode segments.
    Construction: IRET with VM and IOPL set, to a page that is not there.
    """
    attacker = beside_a_neighbour(play_source(VIRTUAL_8086, ring), mode, portable)
    assert "virtual-8086" in attacker.report


def test_frame_of_a_ring3_handler_in_kernel_memory(mode: Any, play: Any, row: Any) -> None:
    """Background: the hypervisor pushes frames with the rights of ring 1.

    Invariant: an application does not write kernel memory through it.
    Construction: a handler in ring 3, and an application whose ESP points at the kernel's data.
    """
    table = row(6, 0, "after", "FLAT_RING3_CS") + "\n .long 0, 0"
    seen = play("mov esp, offset data + 16\n ud2", 3, mode, table=table, data=".skip 16, 0x55")
    assert seen.words("data", 4) == (0x5555_5555,) * 4
    assert "ring 3 may not write the exception frame" in seen.domain.report


FLOOD = """
start:  mov ebx, CONSOLEIO_write
        mov ecx, 65536
        mov edx, 0xC0002000
        mov eax, __HYPERVISOR_console_io
        int 0x82
        inc dword ptr [start + 0x8000]
        jmp start
"""


def test_console_flood() -> None:
    """Background: what a guest prints is kept for people to read.

    Invariant: a guest cannot take the host's memory.
    Construction: 64 KiB printed again and again.
    """
    xen = Hypervisor(Machine(memory_mib=4), trace=Trace())
    guest = boot(xen, FLOOD)
    xen.run(700)
    assert len(guest.console_out) == CONSOLE_BYTES
    assert guest.console_lost + CONSOLE_BYTES == 100 * 65536
    assert guest.console.startswith(f"[{guest.console_lost} bytes before this are not kept]\n")
    assert max(len(event.data) for event in xen.trace.events(Kind.CONSOLE)) == 1024
    saved, lost = guest.snapshot(), guest.console_lost
    xen.run(700)
    guest.restore(saved)
    assert guest.console_lost == lost


def test_translated_code_is_bounded() -> None:
    """Background: the library keeps translations until its buffer is full, 1 GiB by itself.

    Invariant and construction: as above; a guest that changes its code fills 64 MiB and no more.
    """
    assert Engine(Memory(1)).uc.ctl_get_tcg_buffer_size() == TRANSLATIONS


def test_frames_pushed_over_running_code() -> None:
    """Background: the CPU does not notice that the hypervisor writes over code it has translated.

    Invariant: what was executed once is executed in every replay.
    Construction: exception frames are pushed over a function that is called before and after.
    """
    xen = Hypervisor(Machine(memory_mib=4))
    guest = boot(xen, FRAMES_OVER_CODE.format(enter="ud2", vector=6, flags=0))
    timeline = Timeline(xen, interval=700, snapshots=30)
    hashes = {}
    while timeline.position < 9000:
        timeline.run(611)
        hashes[timeline.position] = machine_hash(xen)
    assert not guest.ended, guest.report
    for time in [*reversed(hashes), *hashes]:
        timeline.seek(time)
        assert machine_hash(xen) == hashes[time]


def test_code_read_from_the_console(portable: bool) -> None:
    """The same through a hypercall that a loader would use: new code is executed at once, every time."""
    text = """
start:  call patched
        mov [seen + edi * 4], ecx
        inc edi
        mov ebx, CONSOLEIO_read
        mov ecx, 1
        mov edx, offset patched + 1
        mov eax, __HYPERVISOR_console_io
        int 0x82
        cmp edi, 4
        jne start
        jmp .
seen:   .skip 16
        .align 4096
patched: mov ecx, 1
        ret
"""
    xen = Hypervisor(Machine(memory_mib=4, portable=portable))
    guest = boot(xen, text)
    guest.console_in += bytes((2, 3, 4))
    xen.run(200)
    where = guest.symbols["seen"]
    assert xen.guest_memory.read_words(guest.vcpus[0], where, 4) == (1, 2, 3, 4)


class Interrupting:
    """A hypercall during which somebody presses Ctrl-C."""

    def __init__(self, active: bool) -> None:
        self.active = active

    def call(self, _arguments: tuple[int, ...], _read: Any) -> tuple[int, dict[int, bytes]]:
        if self.active:
            signal.raise_signal(signal.SIGINT)
        return 0, {}

    def state(self) -> None:
        """Nothing that the machine depends on."""

    def load(self, _state: None) -> None:
        """See `state`."""


@pytest.mark.parametrize("also", ["inc esi", "rdtsc"])
def test_interrupt_in_a_storm_of_traps(also: str, portable: bool) -> None:
    """Background: Ctrl-C is seen between slices of 400,000 instructions, and a trap may take a second.

    Invariant: it is acted on behind the trap in progress, and no instruction is lost or counted twice.
    Construction: Ctrl-C in each of a hundred hypercalls; the same run without is the measure.
    """
    text = f"""
start:  {TABLE}
1:      mov eax, 60
        int 0x82
        {also}
        jmp 1b
table:  .long 0, 0
"""
    machines = [
        Hypervisor(Machine(memory_mib=4, portable=portable), hypercalls={60: Interrupting(flag)})
        for flag in (False, True)
    ]
    for xen in machines:
        boot(xen, text)
    quiet, disturbed = machines
    quiet.run(400)
    interrupts = 0
    while disturbed.now < 400:
        try:
            disturbed.run(400 - disturbed.now)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 99
    assert machine_hash(disturbed) == machine_hash(quiet)
