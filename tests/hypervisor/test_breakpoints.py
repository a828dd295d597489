"""Breakpoints that a guest sets for itself: where they are hit, and that nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.breakpoints import loads_stack_segment
from xenlab.hypervisor.trace import Kind, Trace

ARM = """
    mov eax, {address}
    mov dr{number}, eax
    mov eax, {control:#x}
    mov dr7, eax
"""


def armed(address: str, kind: int, size: int, number: int = 0) -> str:
    """Instructions that switch on one breakpoint."""
    return ARM.format(
        address=address, number=number, control=2 << 2 * number | (kind | size - 1 << 2) << 16 + 4 * number
    )


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def play_on(request: pytest.FixtureRequest, play_source: Callable[..., str]) -> Callable[..., Any]:
    """Run a guest on either CPU; its first delivered exception: vector, frame, and the whole hypervisor."""

    def run(probe: str, ring: int = 1, whole: bool = False, **parts: Any) -> Any:
        xen = Hypervisor(Machine(4, portable=request.param), trace=Trace())
        domain = boot(xen, play_source(probe, ring, **parts))
        xen.run(2_000)
        assert xen.trace is not None
        first = next(event for event in xen.trace.events() if event.kind in (Kind.DELIVER, Kind.GATE))
        if whole:
            return xen
        place = {address: name for name, address in domain.symbols.items()}
        assert domain.vcpus[0].watched == bool(domain.vcpus[0].control["dr7"] & 0xFF)
        return first.vector, place.get(first.words[0]), first.words[2] & 0x10000, domain.vcpus[0].control["dr6"] & 0xF

    return run


@pytest.mark.parametrize("number", range(4))
def test_execution_comes_before_the_instruction(number: int, play_on: Any) -> None:
    probe = f"{armed('offset there', 0, 1, number)}\n mov ebx, 1\n there: mov ebx, 2\n nop"
    assert play_on(probe) == (1, "there", 0x10000, 1 << number)


def test_a_return_gets_past_it(play: Any) -> None:
    """The handler counts, and returns by the hypercall; the place is in a loop of three rounds."""
    text = f"""
    start:  mov ebx, offset table
            mov eax, __HYPERVISOR_set_trap_table
            int 0x82
            {armed("offset there", 0, 1)}
            mov ecx, 3
    again:  nop
    there:  nop
            loop again
    stop:   jmp stop
    handler: inc edi
            push eax
            mov eax, __HYPERVISOR_iret
            int 0x82
    table:  .byte 1, 0
            .short FLAT_RING1_CS
            .long handler
            .long 0, 0
    """
    xen = Hypervisor(Machine(4), trace=Trace())
    domain = boot(xen, text)
    xen.run(200)
    state = domain.vcpus[0].state
    assert (state.edi, state.ecx, state.eip) == (3, 0, domain.symbols["stop"])


@pytest.mark.parametrize(
    ("instruction", "kind", "size", "hit"),
    [
        ("mov [udata + 4], al", 1, 4, True),
        ("mov [udata + 7], al", 1, 4, True),
        ("mov [udata + 3], eax", 1, 4, True),
        ("mov [udata + 3], al", 1, 4, False),
        ("mov [udata + 8], al", 1, 4, False),
        ("mov al, [udata + 4]", 1, 4, False),
        ("mov al, [udata + 4]", 3, 4, True),
        ("mov [udata + 4], al", 3, 4, True),
        ("mov [udata + 5], al", 1, 2, True),
        ("mov [udata + 6], al", 1, 2, False),
        ("mov [udata + 5], al", 1, 1, False),
        ("inc dword ptr [udata + 4]", 1, 4, True),
        ("push dword ptr [udata + 4]", 3, 4, True),
    ],
)
def test_data_comes_behind_the_instruction(instruction: str, kind: int, size: int, hit: bool, play_on: Any) -> None:
    probe = f"{armed('offset udata + 4', kind, size, 2)}\n {instruction}\n there: nop"
    found = play_on(probe, udata=".long 0, 0, 0")
    assert found[:2] == ((1, "there") if hit else (0x80, None))
    assert found[3] == (4 if hit else 0)


def test_an_odd_address_means_the_aligned_one(play_on: Any) -> None:
    probe = f"{armed('offset udata + 7', 1, 4)}\n mov [udata + 4], al\n there: nop"
    assert play_on(probe, udata=".long 0, 0, 0")[:2] == (1, "there")


@pytest.mark.parametrize("load", ["mov ss, [udata]", "push dword ptr [udata]\n pop ss"])
def test_behind_a_load_of_the_stack_segment_it_waits(load: str, play_on: Any) -> None:
    probe = f"{armed('offset udata', 3, 4)}\n mov ebx, esp\n {load}\n mov esp, ebx\n there: nop"
    if "push" in load:
        # The push is a hit of its own, so only the pop may be one.
        probe = f"push dword ptr [udata]\n {armed('esp', 3, 4)}\n mov ebx, esp\n pop ss\n mov esp, ebx\n there: nop"
    assert play_on(probe, udata=".long 0xe021")[:2] == (1, "there")


def test_a_fault_in_between_loses_what_waits(play_on: Any) -> None:
    probe = f"{armed('offset udata', 3, 4)}\n mov ss, [udata]\n there: ud2"
    assert play_on(probe, udata=".long 0xe021") == (6, "there", 0, 0)


def test_a_faulting_instruction_hits_nothing(play_on: Any) -> None:
    """It has read what is watched when the page that it writes to turns out not to be there."""
    probe = f"{armed('offset udata', 3, 4)}\n mov esi, offset udata\n mov edi, 0x10000000\n movsd"
    vector, _place, _mask, hits = play_on(probe, udata=".long 0")
    assert (vector, hits) == (14, 0)


def test_each_round_of_a_repeated_instruction(play: Any) -> None:
    probe = f"{armed('offset udata + 4', 1, 1)}\n mov edi, offset udata\n mov ecx, 9\n there: rep stosb"
    seen = play(probe, 1, udata=".skip 12")
    assert (seen.first.vector, seen.frame["eip"]) == (1, seen.label("there"))
    assert seen.word("seen", 8) == 4


def test_together_with_single_steps(play_on: Any) -> None:
    """DR6 names both; without the flag for steps it names the breakpoint alone."""
    step = "pushf\n or dword ptr [esp], 0x100\n popf"
    for flag, status in ((step, 0x4001), ("nop", 1)):
        arm = armed("offset udata", 1, 4)
        xen = play_on(f"{arm}\n {flag}\n mov [udata], al\n there: nop", udata=".long 0", whole=True)
        (vcpu,) = xen.vcpus.values()
        assert vcpu.control["dr6"] == 0xFFFF_0FF0 | status


def test_in_an_application(play: Any) -> None:
    """A kernel sets it, its application hits it."""
    setup = armed("offset udata", 1, 4)
    seen = play("mov dword ptr [udata], 5\n there: nop", 3, setup=setup, udata=".long 0")
    assert (seen.first.vector, seen.first.from_ring, seen.frame["eip"]) == (1, 3, seen.label("there"))


def test_the_hypercall_switches_it_on_too(play: Any) -> None:
    calls = "\n".join(
        f"mov ebx, {number}\n mov ecx, {value}\n mov eax, 8\n int 0x82"
        for number, value in ((3, "offset udata"), (7, f"{2 << 6 | 1 << 28:#x}"))
    )
    seen = play(f"{calls}\n mov byte ptr [udata], 5\n there: nop", 1, udata=".long 0")
    assert (seen.first.vector, seen.frame["eip"]) == (1, seen.label("there"))
    assert seen.vcpu.control["dr6"] & 0xF == 8


def test_switched_off_again(play_on: Any) -> None:
    probe = f"{armed('offset udata', 1, 4)}\n xor eax, eax\n mov dr7, eax\n mov [udata], al\n there: nop"
    assert play_on(probe, udata=".long 0")[0] == 0x80


def test_in_the_hypervisors_range_it_is_missed(play_on: Any) -> None:
    assert play_on(f"{armed('0xfc000000', 3, 4)}\n mov al, [udata]\n there: nop")[0] == 0x80


COUNT = "start: inc dword ptr [counter]\n jmp start\n .align 4\n counter: .long 0"


def test_others_run_on_as_if_nothing_were(frozen: Callable[[Hypervisor], Any]) -> None:
    """The same two domains, with a breakpoint of one that is never hit and with none: the same at the same times."""
    ends = []
    for control in (0x400, 0x402):
        xen = Hypervisor(Machine(8))
        text = f"start: mov eax, 0x1000\n mov dr0, eax\n mov eax, {control}\n mov dr7, eax\n jmp start"
        one, two = boot(xen, text), boot(xen, COUNT)
        for length in (1_000, 37, 20_000, 1, 3_000):
            xen.run(length)
        ends.append((xen.now, [dict(domain.vcpus[0].state.architectural()) for domain in (one, two)]))
        assert one.vcpus[0].watched == (control == 0x402)
    assert {**ends[0][1][0], "eax": 0} == {**ends[1][1][0], "eax": 0}
    assert (ends[0][0], ends[0][1][1]) == (ends[1][0], ends[1][1][1])


@pytest.mark.parametrize(
    ("code", "answer"),
    [("8e d0", True), ("8e 15", True), ("66 8e d0", True), ("17", True), ("8e d8", False), ("8e", False), ("", False)],
)
def test_loads_of_the_stack_segment(code: str, answer: bool) -> None:
    assert loads_stack_segment(bytes.fromhex(code)) == answer
