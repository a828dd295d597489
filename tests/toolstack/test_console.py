"""The console ring between a guest and the daemon: every byte arrives, and no index does harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.structures import ConsoleRing
from xenlab.hypervisor.domain import CONSOLE_BYTES, Domain
from xenlab.hypervisor.inputs import Input, Typed
from xenlab.timeline.timeline import Timeline
from xenlab.toolstack import image_from_elf
from xenlab.toolstack.console import ConsoleDaemon, DrainConsole, FeedConsole, ring_of, room, written

Compile = Callable[..., Path]
SPIN = "start: jmp start"
U32 = st.integers(0, 2**32 - 1)


def machine(source: str = SPIN, **options: bool) -> tuple[Hypervisor, Domain]:
    xen = Hypervisor(Machine(memory_mib=4))
    domain = boot(xen, source, **options)
    xen.run(1)  # the first turn writes the time into its shared page
    return xen, domain


def ring_in(xen: Hypervisor, domain: Domain) -> ConsoleRing:
    ring = ring_of(xen, domain)
    assert ring is not None
    return ring


def do(xen: Hypervisor, *items: Input) -> None:
    for item in items:
        xen.submit(item)
    xen.run(1)


@pytest.mark.parametrize("start", [0, 1, 1000, 2047, 2048, 2**32 - 3, 2**32 - 2048])
@pytest.mark.parametrize("count", [0, 1, 5, 2047, 2048])
def test_what_the_guest_wrote_is_shown(start: int, count: int) -> None:
    xen, domain = machine()
    ring, data = ring_in(xen, domain), bytes(n * 7 % 251 for n in range(count))
    ring.out_cons = start
    ring.out_prod = (start + count) % 2**32
    for n, byte in enumerate(data):
        ring.out[(start + n) % 2048] = byte
    do(xen, DrainConsole(0), DrainConsole(0))
    assert domain.console_out == data
    assert (ring.out_cons, ring.out_prod) == (ring.out_prod, (start + count) % 2**32)


@pytest.mark.parametrize("start", [0, 1, 1000, 1023, 1024, 2**32 - 3, 2**32 - 1024])
@pytest.mark.parametrize("there", [0, 1, 1023, 1024])
@pytest.mark.parametrize("count", [0, 1, 5, 1024, 3000])
def test_what_is_typed_goes_where_there_is_room(start: int, there: int, count: int) -> None:
    xen, domain = machine()
    ring, data = ring_in(xen, domain), bytes(n * 7 % 251 for n in range(count))
    ring.in_cons, ring.in_prod = start, (start + there) % 2**32
    ring.input[:] = [255] * 1024
    do(xen, FeedConsole(0, data))
    fits = min(count, 1024 - there)
    assert (ring.in_cons, ring.in_prod) == (start, (start + there + fits) % 2**32)
    around = [ring.input[(start + there + n) % 1024] for n in range(1024)]
    assert around == [*data[:fits], *[255] * (1024 - fits)]


@example(in_cons=0, in_prod=1025, out_cons=1, out_prod=0)
@example(in_cons=5, in_prod=4, out_cons=0, out_prod=2049)
@given(U32, U32, U32, U32)
def test_no_index_does_harm(in_cons: int, in_prod: int, out_cons: int, out_prod: int) -> None:
    xen, domain = HOSTILE
    ring, place = ring_in(xen, domain), domain.console_mfn << 12
    ring.in_cons, ring.in_prod, ring.out_cons, ring.out_prod = in_cons, in_prod, out_cons, out_prod
    before, said = bytes(xen.memory.bytes), len(domain.console_out) + domain.console_lost
    do(xen, DrainConsole(0), FeedConsole(0, b"typed"))
    after = bytes(xen.memory.bytes)
    assert after[:place] == before[:place]
    assert after[place + 4096 :] == before[place + 4096 :]
    count, free = (out_prod - out_cons) % 2**32, 1024 - (in_prod - in_cons) % 2**32
    taken = len(domain.console_out) + domain.console_lost - said
    assert (taken, ring.out_cons) == ((count, out_prod) if count <= 2048 else (0, out_cons))
    assert ring.in_prod == (in_prod + min(5, max(0, free))) % 2**32
    assert (ring.in_cons, ring.out_prod) == (in_cons, out_prod)
    assert len(domain.console_out) <= CONSOLE_BYTES


HOSTILE = machine()


def test_nothing_happens_where_there_is_no_ring() -> None:
    xen, domain = machine(privileged=True)
    before = bytes(xen.memory.bytes)
    do(xen, DrainConsole(0), FeedConsole(0, b"typed"), DrainConsole(7), FeedConsole(7, b"typed"))
    assert bytes(xen.memory.bytes) == before
    assert (domain.console_mfn, domain.console_out) == (0, b"")
    xen.destroy(domain)
    do(xen, DrainConsole(0), FeedConsole(0, b"typed"))


# Gives up its mapping of the console page, whose frame comes in ESI + 52, and makes a page table of it.
TABLE = """
start:  mov eax, [esi + 52]
        mov [pin + 4], eax
        lea ebx, [esi + 8192]
        mov dword ptr [ebx + 3084], 4   # out_prod: as an entry of a page table, not present
        xor ecx, ecx
        xor edx, edx
        mov esi, 2                      # UVMF_INVLPG
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        mov edi, eax
        mov ebx, offset pin
        mov ecx, 1
        xor edx, edx
        mov esi, 0x7FF0                 # DOMID_SELF
        push edi
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82
        pop edi
        or edi, eax
loop:   jmp loop
pin:    .long 0, 0, 0                   # MMUEXT_PIN_L1_TABLE
"""


def test_page_table_is_not_written() -> None:
    xen, domain = machine(TABLE)
    xen.run(1000)
    assert domain.vcpus[0].state.edi == 0, domain.report
    mfn = domain.console_mfn
    before = bytes(xen.memory.frame(mfn))
    assert any(before)
    assert ring_of(xen, domain) is None
    do(xen, DrainConsole(0), FeedConsole(0, b"typed"))
    assert bytes(xen.memory.frame(mfn)) == before
    assert domain.console_out == b""


# The code in the console page is replaced while it runs: EDI counts down, and up as soon as a byte has been typed.
CODE = """
start:  lea ebx, [esi + 8192]
        mov dword ptr [ebx], 0xFDEB4F   # dec edi; jmp back
        jmp ebx
"""


def test_code_in_the_page_is_what_stands_there() -> None:
    xen, domain = machine(CODE)
    xen.run(1002)
    assert domain.vcpus[0].state.edi == 2**32 - 500
    do(xen, FeedConsole(0, b"\x47"))
    xen.run(997)
    assert domain.vcpus[0].state.edi == 2**32 - 500 + 499


def talk(xen: Hypervisor, domain: Domain, data: bytes, slices: int, length: int = 3000) -> ConsoleDaemon:
    """Type ``data`` and attend to the console between slices, until the guest ends."""
    daemon = ConsoleDaemon(xen, domain)
    daemon.type(data)
    for _ in range(slices):
        daemon.attend()
        xen.run(length)
        if domain.ended:
            break
    daemon.attend()
    xen.run(1)
    return daemon


@pytest.mark.parametrize("pae", [0, 1])
@pytest.mark.parametrize("length", [1, 100, 1024, 5000])
def test_guest_that_echoes(compile_kernel: Compile, pae: int, length: int) -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    domain = boot(xen, compile_kernel("echo", pae=pae, offset=0))
    data = bytes(ord("a") + n % 26 for n in range(length - 1)) + b"."
    daemon = talk(xen, domain, data, 2000)
    assert domain.console_out == data.upper()
    assert domain.ended
    assert daemon.unread == 0


READER = """
start:  mov ebx, CONSOLEIO_read
        mov ecx, 10
        mov edx, offset buffer
        mov eax, __HYPERVISOR_console_io
        int 0x82
        mov ecx, eax
        test ecx, ecx
        jz start
        mov ebx, CONSOLEIO_write
        mov edx, offset buffer
        mov eax, __HYPERVISOR_console_io
        int 0x82
        jmp start
buffer: .space 10
"""


def test_guest_that_reads_by_hypercall_gets_everything_once() -> None:
    xen, domain = machine(READER)
    daemon = ConsoleDaemon(xen, domain)
    for number in range(300):
        daemon.type(b"line %d\n" % number)
        daemon.attend()
        xen.run(500)
    assert domain.console == "".join(f"line {number}\n" for number in range(300))
    assert daemon.unread == 0
    # The ring was offered the first of it, and left alone when the guest had shown where it reads.
    assert ring_in(xen, domain).in_prod == len("line 0\n")


def test_what_nobody_reads_waits() -> None:
    xen, domain = machine()
    daemon = talk(xen, domain, b"x" * 1500, 3)
    assert (daemon.unread, room(ring_in(xen, domain)), written(ring_in(xen, domain))) == (1500, 0, 0)


def test_initial_domain_reads_by_hypercall_alone() -> None:
    xen, domain = machine(READER, privileged=True)
    daemon = talk(xen, domain, b"hello", 3)
    assert (domain.console, daemon.unread) == ("hello", 0)


def test_typing_wakes_a_guest_that_reads_its_ring() -> None:
    source = """
    start:  lea edi, [esi + 8192]
    look:   mov eax, [edi + 3072]
            cmp eax, [edi + 3076]
            je sleep
            inc dword ptr [edi + 3072]
            inc ebp
            jmp look
    sleep:  mov ebx, SCHEDOP_block
            mov eax, __HYPERVISOR_sched_op
            int 0x82
            jmp look
    """
    xen, domain = machine(source)
    daemon = ConsoleDaemon(xen, domain)
    for count in range(1, 6):
        xen.run(1000)
        daemon.type(b"k")
        daemon.attend()
        xen.run(1000)
        assert (domain.vcpus[0].state.ebp, daemon.unread) == (count, 0)
    daemon.type(b"")
    time = xen.now
    xen.run(1000)
    assert xen.now > time


def test_console_is_the_same_in_every_replay(compile_kernel: Compile) -> None:
    xen = Hypervisor(Machine(memory_mib=4))
    domain = boot(xen, image_from_elf(compile_kernel("echo", pae=1, offset=0).read_bytes()))
    timeline = Timeline(xen, interval=2000)
    states = {}
    for number in range(20):
        timeline.submit(FeedConsole(0, b"step %d " % number))
        timeline.submit(Typed(0, b"unread"))
        timeline.run(1500)
        timeline.submit(DrainConsole(0))
        timeline.run(1)
        states[timeline.position] = timeline.machine_hash(), domain.console
    assert domain.console.startswith("STEP 0 STEP 1 STEP 2 ")
    for time in reversed(states):
        timeline.seek(time)
        assert (timeline.machine_hash(), xen.domains[0].console) == states[time]
    timeline.seek(max(states))
    assert (timeline.machine_hash(), xen.domains[0].console) == states[max(states)]
