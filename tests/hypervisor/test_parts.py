"""Parts and guests that misbehave: one clear error, or the guest's own end, and a machine that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from xenlab import Hypervisor, boot
from xenlab.errors import PartError
from xenlab.hypervisor.domain import CONSOLE_BYTES
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace

LOOP = "again: jmp again"


class Bad(RoundRobin):
    """A round robin whose next pick is ``answer``, or what that raises."""

    answer: Any = None
    bad = False

    def pick(self, now: int) -> tuple[int, int] | None:
        if not self.bad:
            return super().pick(now)
        self.bad = False
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [(0, 0), (0, -5), (7, 100), (0, 1.5), (0,), "x", 3, None, ValueError("no idea")],
    ids=repr,
)
def test_a_scheduler_that_picks_nonsense_is_named_and_the_machine_goes_on(answer: Any) -> None:
    scheduler = Bad(slice_instructions=100)
    xen = Hypervisor(scheduler=scheduler)
    boot(xen, LOOP)
    xen.run(1000)
    scheduler.answer, scheduler.bad = answer, True
    with pytest.raises(PartError, match=r"Bad, pick at instruction 1000: expected .* vCPU of \[0\]"):
        xen.run(1000)
    before = xen.now
    xen.run(1000)
    assert xen.now == before + 1000


def test_a_scheduler_may_not_pick_one_that_sleeps() -> None:
    scheduler = Bad()
    xen = Hypervisor(scheduler=scheduler)
    asleep, _awake = (boot(xen, LOOP) for _ in range(2))
    xen.pause(asleep)
    scheduler.answer, scheduler.bad = (0, 100), True
    with pytest.raises(PartError, match=r"found \(0, 100\)"):
        xen.run(1000)


@pytest.mark.parametrize("answer", [{"eax": "7"}, {"eaxx": 7}, [1], {"eip": 1.0}, KeyError("cr9")], ids=repr)
def test_an_emulator_that_answers_nonsense_is_named(answer: Any) -> None:
    class Emulator:
        def emulate(
            self, _code: bytes, _registers: Mapping[str, int], _system: Mapping[str, int]
        ) -> Mapping[str, int] | None:
            if isinstance(answer, Exception):
                raise answer
            return answer

    xen = Hypervisor(emulator=Emulator())
    boot(xen, "cli")
    with pytest.raises(PartError, match="Emulator, emulation of the instruction at 0xc0002000, bytes fa"):
        xen.run(100)


@pytest.mark.parametrize(
    "answer",
    [None, 5, (1, 2), (1, {2: "x"}), (1, {-1: b""}), (1, {"a": b""}), (1, {1.5: b""}), IndexError("9")],
    ids=repr,
)
def test_a_hypercall_part_that_answers_nonsense_is_named(answer: Any) -> None:
    class Part:
        def call(self, _arguments: tuple[int, ...], _read: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    xen = Hypervisor(hypercalls={40: Part()})
    boot(xen, "mov eax, 40\n int 0x82")
    with pytest.raises(PartError, match="Part, hypercall 40 with arguments"):
        xen.run(100)


def test_a_handler_that_cannot_be_fetched_ends_the_guest_and_not_the_time_of_others() -> None:
    source = """
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov eax, [0x10]
table:  .byte 14, 0
        .word FLAT_RING1_CS
        .long 0x1000, 0, 0
    """
    xen = Hypervisor()
    victim, other = boot(xen, source), boot(xen, LOOP)
    result = xen.run(1000)
    assert victim.crashed
    assert "triple fault: not even the handler at 0x00001000" in victim.report
    assert result.instructions == 1000
    assert not other.ended


def test_no_guest_gets_far_in_virtual_8086_mode() -> None:
    xen = Hypervisor()
    guest = boot(xen, "push 0x20202\n push FLAT_RING1_CS\n push 0\n iretd")
    xen.run(1000)
    assert guest.crashed


def test_a_guest_that_writes_for_ever_keeps_only_its_last_words() -> None:
    source = """
again:  mov ebx, CONSOLEIO_write
        mov ecx, 65536
        mov edx, 0xc0002000
        mov eax, __HYPERVISOR_console_io
        int 0x82
        jmp again
    """
    xen = Hypervisor(trace=Trace())
    guest = boot(xen, source)
    xen.run(6 * 40)
    assert len(guest.console_out) == CONSOLE_BYTES
    assert guest.console_lost == 40 * 65536 - CONSOLE_BYTES
    assert guest.console.startswith(f"[{guest.console_lost} bytes before this are not kept]")
    assert max(len(event.data) for event in xen.trace.events(Kind.CONSOLE)) == 1024


class Believing:
    """A validator that refuses nothing."""

    def entry(self, _level: str, _flags: int, _domid: int, _owner: int) -> int:
        return 0

    def take(self, _mfn: int, use: int) -> int:
        return 1 if 0 < use < 6 else 0

    def drop(self, _mfn: int, _use: int) -> int:
        return 0


def test_a_validator_that_lets_a_guest_map_a_frame_that_is_not_there_is_named() -> None:
    xen = Hypervisor(page_types=Believing(), trace=Trace())
    boot(
        xen,
        """
start:  mov ebx, 0xc0100000
        mov ecx, 0xfffff063
        xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
stay:   jmp stay
""",
    )
    with pytest.raises(PartError, match=r"Believing, entry\('l1', 0x63, 0, -3\): expected a negated errno"):
        xen.run(100)
    xen.run(100)
