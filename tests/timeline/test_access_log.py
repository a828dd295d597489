"""A recorded run is the run itself, and a replay through a TLB is the same whichever way it goes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, TimelineError, boot, guests
from xenlab.errors import PartError
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs import lesson03
from xenlab.labs.tlb_guests import ACTIONS, LIBRARY, action
from xenlab.machine.accesses import AccessKind
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.machine.tlb import EVICTED, FIRST, FLUSHED, Policy, Tlb
from xenlab.timeline import Timeline
from xenlab.timeline.access_log import BY_HYPERVISOR, NO_TRAP, UNNAMED, AccessLog, Enter, Flush, Leave, Touch, recorded
from xenlab.timeline.digest import machine_hash
from xenlab.timeline.tlb_replay import ENTRY, EXIT, HYPERVISOR_PAGE, TlbReplay, both_spaces

PORTABLE = pytest.mark.parametrize("portable", [False, True], ids=["probed", "portable"])
SLICE = 1_000
# Rings 1 and 3, faults, hypercalls, batches, preemption, a guest that sleeps.
SOURCES = {name: guests.source(name) for name in ("rings", "calls", "hello")} | {
    "counter": guests.source("counter").replace("20000", "300"),
    "echo": lesson03.ECHO,
}
BUSY = "again: mov eax, [there]\n mov [there], eax\n jmp again\n .align 4096\nthere: .long 0"
# A guest that stores into its own page table, which the hypervisor opens for that one instruction.
TABLES = """
        .set PT_BASE, 60
        .set MFN_LIST, 68
start:  mov ebp, [esi + MFN_LIST]
        mov edi, [esi + PT_BASE]
        mov ebx, VMASST_CMD_enable
        mov ecx, VMASST_TYPE_writable_pagetables
        mov eax, __HYPERVISOR_vm_assist
        int 0x82
        mov eax, [window]
        mov ecx, offset window
        shr ecx, 10
        and ecx, 0xffc
        and dword ptr [edi + 4096 + ecx], 0xfffffffd
        mov eax, [window]
stay:   jmp stay
        .align 4096
window: .long 0
"""
# One that takes 16 pages out of its page table by one batch.
BATCH = (
    """
        .set PT_BASE, 60
        .set MFN_LIST, 68
start:  mov ebp, [esi + MFN_LIST]
        mov edi, [esi + PT_BASE]
        mov eax, offset pages
        call entry_of
        mov ebx, offset batch
        mov ecx, 16
next:   mov [ebx], eax
        add ebx, 16
        add eax, 4
        dec ecx
        jnz next
        mov ebx, offset batch
        mov ecx, 16
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
stay:   jmp stay
"""
    + LIBRARY
    + """
        .align 4096
batch:  .skip 4096
pages:  .skip 65536
"""
)

NULL_CALLS = """
        mov edi, {calls}
again:  xor ebx, ebx
        mov eax, __HYPERVISOR_xen_version
        int 0x82
        mov eax, [there]
        dec edi
        jnz again
stay:   jmp stay
        .align 4096
there:  .long 0
"""


def machine(*sources: str, portable: bool = False, mode=TWO_LEVEL, trace: bool = True) -> Hypervisor:
    scheduler = RoundRobin(SLICE)
    xen = Hypervisor(Machine(16, portable=portable), scheduler=scheduler, trace=Trace() if trace else None)
    for source in sources:
        boot(xen, source, mode=mode)
    return xen


def record(xen: Hypervisor, instructions: int) -> AccessLog:
    with recorded(xen) as log:
        xen.run(instructions)
    return log


@PORTABLE
@pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def test_a_recorded_run_is_the_run_without_recording(portable: bool, mode) -> None:
    plain, watched = (machine(*SOURCES.values(), portable=portable, mode=mode) for _ in range(2))
    plain.run(12_000)
    watched.run(2_000)
    log = record(watched, 8_000)
    watched.run(2_000)
    assert watched.trace.raw() == plain.trace.raw()
    assert machine_hash(watched) == machine_hash(plain)
    assert log.unexplained == 0
    assert log.stale() == []


def test_both_processors_give_the_same_log() -> None:
    logs = [record(machine(*SOURCES.values(), portable=portable), 10_000) for portable in (False, True)]
    assert logs[0].entries == logs[1].entries
    kinds = {entry.kind for entry in logs[0].entries if type(entry) is Touch}
    assert kinds == set(AccessKind)


def test_nothing_is_left_behind() -> None:
    xen = machine(SOURCES["calls"])
    log = record(xen, 100)
    length = len(log.entries)
    assert xen.cpu.handler == xen.trap
    assert not {"read", "read_words", "write", "write_words", "machine_address"} & set(vars(xen.guest_memory))
    assert "flush" not in vars(xen.tlb)
    assert "load" not in vars(xen.cpu)
    xen.run(1_000)
    assert len(log.entries) == length


def test_recording_ends_when_the_run_fails() -> None:
    class Broken:
        def call(self, arguments, read):
            raise LookupError("a part that fails")

    xen = Hypervisor(Machine(8), hypercalls={17: Broken()})
    boot(xen, SOURCES["calls"])
    with pytest.raises(PartError, match="a part that fails"), recorded(xen) as log:
        xen.run(1_000)
    assert type(log.entries[-1]) is Leave
    assert xen.cpu.handler == xen.trap


def test_the_hypervisor_is_entered_and_left_in_turn_and_time_goes_forward() -> None:
    xen = machine(*SOURCES.values())
    log = record(xen, 20_000)
    assert all(before.time <= after.time for before, after in pairwise(log.entries))
    inside = False
    for entry in log.entries:
        if type(entry) in (Enter, Leave):
            assert (type(entry) is Enter) is not inside
            inside = type(entry) is Enter
        elif type(entry) is Flush:
            assert inside
        else:
            assert (entry.eip == BY_HYPERVISOR) is inside
    assert not inside
    vectors = [entry.vector for entry in log.entries if type(entry) is Enter and entry.vector != NO_TRAP]
    events = xen.trace.events()
    assert vectors == [
        0x82 if e.kind is Kind.HYPERCALL else e.vector for e in events if e.kind in (Kind.TRAP, Kind.HYPERCALL)
    ]


def test_a_fetch_is_logged_for_each_instruction_begun() -> None:
    xen = machine(*SOURCES.values())
    log = record(xen, 5_000)
    times = {entry.time for entry in log.entries if type(entry) is Touch and entry.kind is AccessKind.FETCH}
    assert times == set(range(1, xen.now + 1))


@PORTABLE
def test_flushes_are_logged_when_a_slice_ends_and_inside_a_call(portable: bool) -> None:
    xen = machine(BUSY, BUSY, portable=portable)
    xen.run(1)
    before = xen.cpu.flushes
    log = record(xen, 5 * SLICE)
    flushes = [entry for entry in log.entries if type(entry) is Flush]
    assert len(flushes) == xen.cpu.flushes - before == 5
    assert {entry.vector for entry in log.entries if type(entry) is Enter} == {NO_TRAP}
    polite = lesson03.talkers(polite=True, instructions=1)
    assert {entry.vector for entry in record(polite, 1_000).entries if type(entry) is Enter} == {0x82}


def test_copies_of_the_hypervisor_are_accesses_to_the_guests_pages() -> None:
    xen = machine(SOURCES["hello"])
    domain = xen.domains[0]
    log = record(xen, 100)
    copies = [entry for entry in log.entries if type(entry) is Touch and entry.eip == BY_HYPERVISOR]
    page = domain.symbols["message"] >> 12
    assert [(copy.page, copy.kind) for copy in copies] == [(page, AccessKind.READ)] * 2
    assert copies[0].frame == domain.frames[page - 0xC0000]


def test_a_copy_over_the_end_of_a_page_touches_both() -> None:
    source = SOURCES["hello"] + "\n .align 4096\n"
    source = source.replace("message: ", ".align 4096\n.fill 4090, 1, 0\nmessage: ")
    log = record(machine(source), 4 + 1)
    copies = [entry.page for entry in log.entries if type(entry) is Touch and entry.eip == BY_HYPERVISOR]
    assert len(copies) == 2
    assert copies[1] == copies[0] + 1


@pytest.fixture(scope="module")
def log() -> AccessLog:
    return record(machine(*SOURCES.values()), 15_000)


def test_the_hypervisor_at_the_top_costs_its_pages_once() -> None:
    xen = machine(NULL_CALLS.format(calls=100))
    xen.run(1)
    top, own = both_spaces(record(xen, 650), ways=None)
    # Code, data, and the hypervisor's four.
    assert top.fills == {FIRST: 6}
    # The code after each call; the data, first read after the first, and the hypervisor's after each other one.
    assert own.fills == {FIRST: 6, FLUSHED: 100 + 99 * 5}
    assert own.flushes == {ENTRY: 100, EXIT: 100}
    assert top.flushes == {}
    assert own.hits + own.misses == top.hits + top.misses


def test_pages_of_the_hypervisor_are_as_many_as_asked_and_at_the_top() -> None:
    xen = machine(NULL_CALLS.format(calls=3))
    entries = record(xen, 100)
    for count in (0, 1, 7):
        tlb = TlbReplay(entries, Tlb(), hypervisor_pages=count).to_end()
        assert sum(entry is not None and entry.page >= HYPERVISOR_PAGE for entry in tlb.slots) == count
    with pytest.raises(TimelineError, match="expected 0 to 1024 pages"):
        TlbReplay(entries, Tlb(), hypervisor_pages=-1)


def test_global_pages_of_the_hypervisor_survive_a_switch() -> None:
    entries = record(machine(BUSY, BUSY), 4 * SLICE)
    plain, kept = (TlbReplay(entries, Tlb(), hypervisor_global=chosen).to_end() for chosen in (False, True))
    assert plain.fills[FLUSHED] - kept.fills[FLUSHED] == 4 * 3


@given(
    times=st.lists(st.integers(0, 16_000), min_size=1, max_size=6), own=st.booleans(), policy=st.sampled_from(Policy)
)
def test_a_replay_does_not_depend_on_the_way(log: AccessLog, times: list[int], own: bool, policy: Policy) -> None:
    wandering = TlbReplay(log, Tlb(16, 2, policy), own_space=own)
    for time in times:
        wandering.to(time)
    direct = TlbReplay(log, Tlb(16, 2, policy), own_space=own)
    direct.to(times[-1])
    assert wandering.tlb.state() == direct.tlb.state()
    held = {entry.page for entry in direct.tlb.slots if entry is not None}
    assert {page: wandering.causes.get(page) for page in held} == {page: direct.causes.get(page) for page in held}


@pytest.mark.parametrize(("entries", "ways"), [(8, 2), (64, 4), (64, None), (1024, None)])
def test_an_address_space_of_its_own_never_misses_less(log: AccessLog, entries: int, ways: int | None) -> None:
    top, own = both_spaces(log, entries=entries, ways=ways)
    assert own.misses > top.misses
    assert own.flushes.total() == 2 * log.traps()
    assert entries < 1024 or top.fills[EVICTED] == 0


@PORTABLE
@pytest.mark.parametrize("name", [*ACTIONS, "writable tables"])
def test_flushes_in_the_log_are_those_in_the_trace(portable: bool, name: str) -> None:
    source = action(ACTIONS[name]) if name in ACTIONS else TABLES
    plain, watched = machine(source, BUSY, portable=portable), machine(source, BUSY, portable=portable)
    plain.run(4_500)
    log = record(watched, 4_500)
    assert watched.trace.raw() == plain.trace.raw()
    assert machine_hash(watched) == machine_hash(plain)
    assert log.unexplained == 0
    assert all(before.time <= after.time for before, after in pairwise(log.entries))
    logged = [(entry.reason, entry.address) for entry in log.entries if type(entry) is Flush]
    traced = [(event.reason, event.address) for event in watched.trace.events(Kind.FLUSH)]
    # The last one may have had no access behind it.
    assert logged in (traced, traced[:-1])
    assert name != "writable tables" or "opened" in dict(logged)


def test_a_flush_outside_the_hypervisors_knowledge_has_no_name() -> None:
    xen = machine(BUSY)
    timeline = Timeline(xen, interval=100)
    with recorded(xen) as log:
        timeline.run(250)
    assert [(entry.reason, entry.time) for entry in log.entries if type(entry) is Flush] == [
        ("switch", 1),
        (UNNAMED, 101),
        (UNNAMED, 201),
    ]


def test_a_batch_of_updates_is_read_from_the_guests_page() -> None:
    xen = machine(BATCH)
    log = record(xen, 120)
    symbols = xen.domains[0].symbols
    assert xen.domains[0].vcpus[0].state.eax == 0
    copies = [entry for entry in log.entries if type(entry) is Touch and entry.eip == BY_HYPERVISOR]
    assert [(copy.page, copy.kind) for copy in copies] == [(symbols["batch"] >> 12, AccessKind.READ)]
