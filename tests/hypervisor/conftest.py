"""Guests in assembly for these tests: built, run, and asked what they saw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import HYPERCALL_VECTOR
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode

# Test modules are imported by path, so helpers beside them have to be made findable.
sys.path.insert(0, str(Path(__file__).parent))

VECTORS = (0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 19)

# A guest that runs PROBE in ring 1 or, through the iret hypercall, in ring 3.  Every exception
# of the table lands in `handler`, which keeps the registers it found and ends the guest.
TEMPLATE = """
start:  mov [boot_info], esi
        mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        {setup}
        mov eax, FLAT_RING3_DS
        {segments}
        {enter}
handler:
        mov cs:[seen + 0], eax
        mov eax, FLAT_RING1_DS
        mov ds, eax
        mov [seen + 4], ebx
        mov [seen + 8], ecx
        mov [seen + 12], edx
        mov [seen + 16], esp
        mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
boot_info: .long 0
        .align 4
seen:   .skip 64
table:  {table}
        .long 0, 0
data:   {data}
        .align 4096
user_start:
        {before}
probe:  {probe}
after:  mov ebx, 0x600D
        int 0x80
        jmp after
        .align 4
udata:  {udata}
        .align 4096
ustack_low: .skip 4096
ustack:
user_end:
"""
ENTER_RING3 = """
        push FLAT_RING3_SS
        push offset ustack
        push {flags}
        push FLAT_RING3_CS
        push offset user_start
        push eax
        mov eax, __HYPERVISOR_iret
        int 0x82
"""


def row(vector: int, flags: int = 0, handler: str = "handler", cs: str = "FLAT_RING1_CS") -> str:
    """One ``trap_info``."""
    return f".byte {vector}, {flags}\n .short {cs}\n .long {handler}"


@dataclass
class Seen:
    """A guest that has run, and its first exception that was delivered, by the hypervisor or by a gate."""

    xen: Hypervisor
    domain: Domain
    delivered: list[Event]

    @property
    def first(self) -> Event:
        assert self.delivered, self.domain.report or "nothing was delivered"
        return self.delivered[0]

    @property
    def vcpu(self) -> Vcpu:
        return self.domain.vcpus[0]

    def label(self, name: str) -> int:
        return self.domain.symbols[name]

    def word(self, where: str | int, offset: int = 0) -> int:
        address = where if isinstance(where, int) else self.label(where)
        return self.xen.guest_memory.read_word(self.vcpu, address + offset)

    def words(self, where: str | int, count: int) -> tuple[int, ...]:
        return tuple(self.word(where, 4 * number) for number in range(count))

    @property
    def frame(self) -> dict[str, int]:
        """The first delivered frame, by name."""
        return named(self.first.vector, self.first.words)


def named(vector: int, words: tuple[int, ...]) -> dict[str, int]:
    """The words of a frame, lowest address first, by name."""
    names = ["eip", "cs", "eflags", "esp", "ss"]
    if vector in (8, 10, 11, 12, 13, 14, 17):
        names.insert(0, "error")
    return dict(zip(names, words, strict=False))


Play = Callable[..., Seen]


def source(
    probe: str,
    ring: int,
    *,
    setup: str = "",
    data: str = "",
    udata: str = "",
    before: str = "",
    table: str | None = None,
    flags: str = "0x202",
    segments: str | None = None,
) -> str:
    """The text of a guest that runs ``probe`` in ``ring``."""
    if table is None:
        table = "\n".join(row(vector) for vector in VECTORS) + "\n" + row(0x80, 3)
    if segments is None:
        segments = "mov ds, eax\n mov es, eax" if ring == 3 else ""
    return TEMPLATE.format(
        probe=probe,
        setup=setup,
        data=data,
        udata=udata,
        before=before,
        table=table,
        segments=segments,
        enter=ENTER_RING3.format(flags=flags) if ring == 3 else "jmp user_start",
    )


def play_source(text: str, mode: PagingMode = TWO_LEVEL, budget: int = 10_000) -> Seen:
    xen = Hypervisor(Machine(memory_mib=4), trace=Trace())
    domain = boot(xen, text, mode=mode)
    xen.run(budget)
    assert xen.trace is not None
    delivered = [event for event in xen.trace.events() if event.kind in (Kind.DELIVER, Kind.GATE)]
    return Seen(xen, domain, delivered)


@pytest.fixture(params=[TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> PagingMode:
    """Each format of page tables."""
    found: PagingMode = request.param
    return found


@pytest.fixture(params=[1, 3])
def ring(request: pytest.FixtureRequest) -> int:
    """Kernel and application."""
    found: int = request.param
    return found


@pytest.fixture
def play() -> Play:
    """``play(probe, ring, mode=..., **parts)`` runs a guest with ``probe`` in it."""

    def run(probe: str, ring: int = 1, mode: PagingMode = TWO_LEVEL, budget: int = 10_000, **parts: Any) -> Seen:
        return play_source(source(probe, ring, **parts), mode, budget)

    return run


@pytest.fixture(name="play_source")
def source_of_a_probe() -> Callable[..., str]:
    """``play_source(probe, ring, **parts)`` is the text of the guest that `play` runs."""
    return source


@pytest.fixture(name="row")
def trap_row() -> Callable[..., str]:
    """``row(vector, flags, handler, cs)`` is one row of a trap table."""
    return row


@pytest.fixture
def play_text() -> Callable[..., Seen]:
    """``play_text(source)`` runs a guest that is written out in full."""
    return play_source


@pytest.fixture(autouse=True)
def auditor(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Audits the whole machine after every hypercall of every test here; counts the audits."""
    machines: list[Hypervisor] = []
    audits = [0]
    initialize, trap = Hypervisor.__init__, Hypervisor.trap

    def remember(self: Hypervisor, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        machines.append(self)

    def audited(self: Hypervisor, vector: int, error: int, address: int) -> None:
        trap(self, vector, error, address)
        if vector == HYPERCALL_VECTOR:
            check(self)
            audits[0] += 1

    monkeypatch.setattr(Hypervisor, "__init__", remember)
    monkeypatch.setattr(Hypervisor, "trap", audited)
    yield audits
    for xen in machines:
        check(xen)


def digest(xen: Hypervisor) -> tuple[Any, ...]:
    """All that a guest could have changed: its memory, and the state kept for it."""
    state = []
    for domain in xen.domains.values():
        pages = b"".join(bytes(xen.memory.frame(mfn)) for mfn in (*domain.frames, domain.shared_info_mfn))
        for vcpu in domain.vcpus:
            kernel = (vcpu.kernel_ss, vcpu.kernel_esp, tuple(vcpu.traps), tuple(vcpu.control.items()))
            state.append((domain.domid, hash(pages), kernel, vcpu.run_state, dict(vcpu.state.architectural())))
        state.append((bytes(domain.console_out), bytes(domain.console_in), domain.shutdown))
    return tuple(state)


@pytest.fixture
def frozen() -> Callable[[Hypervisor], tuple[Any, ...]]:
    """``frozen(xen)`` is a value that changes when anything that a guest owns does."""
    return digest


@pytest.fixture(scope="module")
def frozen_for_module() -> Callable[[Hypervisor], tuple[Any, ...]]:
    """`frozen` for Hypothesis, which runs a test many times with the same fixtures."""
    return digest
