"""Where the emulated CPU is not an x86: the list in ARCHITECTURE.md, one test each.

A test that fails here after an update of Unicorn is good news, and a line to take off that list.
"""

from __future__ import annotations

from xenlab import Hypervisor, boot
from xenlab.abi.numbers import Shutdown
from xenlab.hypervisor.trace import Event, Kind, Trace
from xenlab.labs.tlb_guests import REMAP
from xenlab.machine.machine import Machine

SHUTDOWN = """
finish: mov ebx, SCHEDOP_shutdown
        mov ecx, offset reason
        mov eax, __HYPERVISOR_sched_op
        int 0x82
reason: .long SHUTDOWN_poweroff
"""


def run(source: str) -> Hypervisor:
    xen = Hypervisor(trace=Trace())
    guest = boot(xen, source + SHUTDOWN)
    xen.run(10_000)
    assert guest.shutdown is Shutdown.POWEROFF, guest.report
    return xen


def run_with_handler(vector: int, faulting: str) -> tuple[Hypervisor, Event]:
    """Run one faulting instruction in ring 1 whose handler ends the guest; also its delivery."""
    xen = run(
        f"""
start:  mov ebx, offset table
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov edi, offset buffer
        mov edx, 0x3f8
site:   {faulting}
        hlt
table:  .byte {vector}, 0
        .word FLAT_RING1_CS
        .long finish, 0, 0
buffer: .long 0xffffffff
"""
    )
    (delivery,) = xen.trace.events(Kind.DELIVER)
    assert delivery.vector == vector
    return xen, delivery


def test_a_store_into_the_running_block_is_counted_twice() -> None:
    rounds = 10
    xen = run(
        f"""
        mov ecx, {rounds}
again:  inc dword ptr [changed + 1]
changed: mov ebp, 1
        dec ecx
        jnz again
        """
    )
    begun = 1 + 4 * rounds + 4
    assert xen.now == begun + rounds


def test_with_a_jump_between_store_and_target_it_is_counted_once() -> None:
    rounds = 10
    xen = run(
        f"""
        mov ecx, {rounds}
again:  inc dword ptr [changed + 1]
        jmp changed
changed: mov ebp, 1
        dec ecx
        jnz again
        """
    )
    assert xen.now == 1 + 5 * rounds + 4


def test_a_refused_int_with_a_prefix_reports_the_middle_of_the_instruction() -> None:
    _xen, delivery = run_with_handler(13, ".byte 0x3e\n int 0x30")
    site = _xen.domains[0].symbols["site"]
    assert delivery.words[:2] == (0x30 << 3 | 2, site + 1)


def test_ins_writes_a_zero_before_its_fault() -> None:
    xen, delivery = run_with_handler(13, "insb")
    domain = xen.domains[0]
    assert delivery.words[:2] == (0, domain.symbols["site"])
    word = xen.guest_memory.read_word(domain.vcpus[0], domain.symbols["buffer"])
    assert word == 0xFFFF_FF00


def test_a_read_modify_write_faults_as_a_read() -> None:
    _xen, delivery = run_with_handler(14, "inc dword ptr [0x1000]")
    assert delivery.words[0] == 0


def test_segment_limits_are_not_enforced() -> None:
    xen = Hypervisor(trace=Trace())
    boot(xen, "mov eax, [0xfd000000]\n hlt")
    raw: list[int] = []

    def listen(vector: int, error: int, address: int) -> None:
        raw.append(vector)
        xen.trap(vector, error, address)

    xen.cpu.handler = listen
    xen.run(10)
    (trap,) = xen.trace.events(Kind.TRAP)
    assert raw == [14], "the CPU got past the segment limit and found no page"
    assert (trap.vector, trap.error) == (13, 0), "the guest is told of the limit"


def test_the_portable_cpu_has_no_stale_translations() -> None:
    """The guest looks at a page, changes its page-table entry, looks, flushes, and looks again."""
    said = []
    for portable in (False, True):
        xen = Hypervisor(Machine(8, portable=portable))
        guest = boot(xen, REMAP)
        xen.run(200)
        said.append(guest.console)
    assert said == ["aab", "abb"]


def test_a_flush_of_one_page_empties_the_tlb() -> None:
    """The same guest, but the page that it has flushed is another one."""
    xen = Hypervisor(Machine(8))
    guest = boot(xen, REMAP.replace("MMUEXT_INVLPG_LOCAL, window", "MMUEXT_INVLPG_LOCAL, other"))
    xen.run(200)
    assert guest.console == "aab"


def test_forgetting_translated_code_empties_the_tlb() -> None:
    """The same guest, with code of another page forgotten after it has changed its page-table entry."""
    said = []
    for forget in (False, True):
        xen = Hypervisor(Machine(8))
        guest = boot(xen, REMAP)
        for _ in range(200):
            if guest.vcpus[0].state.eip == guest.symbols["changed"]:
                break
            xen.run(1)
        if forget:
            xen.cpu.forget_code(0, 0x1000)
        xen.run(200)
        said.append(guest.console)
    assert said == ["aab", "abb"]
