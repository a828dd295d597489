"""Back to the event or the change that led here, and forward to the next: found exactly, and told in words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_guests import guests, machine, slices

from xenlab import Hypervisor, Machine, TimelineError, boot
from xenlab.abi.numbers import Hypercall
from xenlab.hypervisor.inputs import Pause, Typed
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind
from xenlab.machine.paging import TWO_LEVEL, walk
from xenlab.timeline import Boot, Cause, Change, FrameContent, FrameUse, PendingPort, Timeline, When
from xenlab.timeline.goals import Watch
from xenlab.toolstack import image_from_source

# EBX: machine address of the l1 entry of page 100; EDI: its linear address.
TABLE = """
start:  mov edi, [esi + 60]             # pt_base
        add edi, 0x1000
        mov eax, edi
        sub eax, 0xC0000000
        shr eax, 12
        mov ecx, [esi + 68]             # mfn_list
        mov ebx, [ecx + 4 * eax]
        shl ebx, 12
        add ebx, 400
        add edi, 400
"""
BY_CALL = (
    TABLE
    + """
        mov [request], ebx
        mov eax, [edi]
        or eax, 0x200
        mov [request + 8], eax
        mov ecx, 30
wait:   loop wait
        mov ebx, offset request
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
done:   inc eax
        jmp done
request: .long 0, 0, 0, 0
"""
)
BY_STORE = (
    """
start:  mov ebp, esi
        mov ebx, VMASST_CMD_enable
        mov ecx, VMASST_TYPE_writable_pagetables
        mov eax, __HYPERVISOR_vm_assist
        int 0x82
        mov esi, ebp
"""
    + TABLE.replace("start:", "")
    + """
        mov ecx, 30
wait:   loop wait
        or dword ptr [edi], 0x200
done:   inc eax
        jmp done
"""
)
STORES = """
start:  mov ecx, 50
wait:   loop wait
        mov dword ptr [number], 0x1234
        mov dword ptr [number], 0
        mov ecx, 60
after:  loop after
        jmp after
        .align 4096
number: .long 0
        .align 4096
"""
COUNTS = "start: inc dword ptr [number]\n xor eax, [number]\n jmp start\n .align 4096\nnumber: .long 0\n .align 4096"
SLEEPS = """
start:  mov ebx, SCHEDOP_poll
        mov ecx, offset poll
        mov eax, __HYPERVISOR_sched_op
        int 0x82
        jmp start
poll:   .long 0, 0, 100000000, 0
"""
BLOCKS = "start: mov ebx, SCHEDOP_block\n mov eax, __HYPERVISOR_sched_op\n int 0x82\n jmp start"
BUSY = "start: inc eax\n jmp start"


def timeline_of(*sources: str, interval: int = 100, portable: bool = False) -> Timeline:
    xen = Hypervisor(Machine(8, portable=portable), scheduler=RoundRobin(50))
    for number, source in enumerate(sources):
        boot(xen, source, mode=TWO_LEVEL, privileged=not number)
    return Timeline(xen, interval=interval)


def frame_of(xen: Hypervisor, domid: int, name: str) -> int:
    state = xen.domains[domid].vcpus[0].state
    found = walk(xen.memory, state.mode, state.cr3, xen.domains[domid].symbols[name], update=False)
    return found.machine >> 12  # type: ignore[union-attr]


def table_of(timeline: Timeline, domid: int) -> FrameContent:
    """The l1 entry of page 100."""
    xen = timeline.hypervisor
    table, index = xen.mmu.leaf_of(xen.domains[domid].vcpus[0], 0xC000_0000 + (100 << 12))
    return FrameContent(table, 4 * index, 4)


def changes_of(timeline: Timeline, watch: Watch, end: int) -> list[int]:
    """All of them, found by looking after each instruction."""
    values = []
    for time in range(timeline.start, end + 1):
        timeline.seek(time)
        values.append(watch.value(timeline.hypervisor))
    return [timeline.start + at for at in range(1, len(values)) if values[at] != values[at - 1]]


@pytest.mark.parametrize("portable", [False, True])
def test_the_hypercall_that_changed_a_page_table(portable: bool) -> None:
    timeline = timeline_of(BUSY, BY_CALL, portable=portable)
    watch = table_of(timeline, 1)
    timeline.run(1000)
    here, machine = timeline.position, timeline.machine_hash()
    change = timeline.last_change(watch)
    assert change is not None
    assert (timeline.position, timeline.machine_hash()) == (here, machine)
    assert (change.cause, change.domain, change.instruction) == (Cause.HYPERCALL, 1, "int 0x82")
    assert change.event is not None
    assert change.event.number == Hypercall.mmu_update
    assert (change.before[1] ^ change.after[1], change.time) == (2, change.event.time)
    assert f"{watch.name} changed by domain 1: mmu_update, at 0x" in str(change)
    assert change.difference.startswith(f"{watch.offset:#05x}: 0x")
    # Right behind it; and one instruction before it, all is as it was.
    assert timeline.back_to(watch) == change
    assert timeline.position == change.time
    timeline.back()
    assert watch.value(timeline.hypervisor) == change.before
    assert timeline.run_to(watch) == change


@pytest.mark.parametrize("portable", [False, True])
def test_a_store_into_a_page_table_is_told_with_what_became_of_it(portable: bool) -> None:
    timeline = timeline_of(BUSY, BY_STORE, portable=portable)
    watch = table_of(timeline, 1)
    timeline.run(1000)
    change = timeline.last_change(watch)
    assert change is not None
    assert (change.cause, change.domain, change.instruction) == (Cause.STORE, 1, "or dword ptr [edi], 0x200")
    assert change.event is not None
    assert change.event.kind is Kind.TABLE_WRITE
    assert change.time == change.event.time
    assert changes_of(timeline, watch, 300)[-1] == change.time


@pytest.mark.parametrize("portable", [False, True])
def test_what_was_changed_and_changed_back_is_found(portable: bool) -> None:
    timeline = timeline_of(STORES, portable=portable)
    watch = FrameContent(frame_of(timeline.hypervisor, 0, "number"))
    timeline.run(5000)
    change = timeline.last_change(watch)
    assert change is not None
    assert (change.time, change.cause) == (53, Cause.STORE)
    assert change.difference == "0x000: 0x00001234 -> 0x00000000"
    assert change.instruction.startswith("mov dword ptr [0x")
    timeline.seek(30)
    first, second = timeline.run_to(watch), timeline.run_to(watch)
    assert first is not None
    assert (first.time, second) == (52, change)
    assert timeline.run_to(watch, 500) is None
    assert timeline.position == 553
    assert timeline.back_to(watch) == change
    assert timeline.back_to(watch) == first
    assert timeline.back_to(watch) is None
    assert timeline.position == 52


@pytest.mark.parametrize("portable", [False, True])
def test_a_store_that_reaches_over_from_the_page_before(portable: bool) -> None:
    source = STORES.replace("[number]", "[number + 4094]").replace(
        "number: .long 0", "number: .space 4096\nnext: .long 0"
    )
    source = source.replace("0x1234", "0x12345678").replace(", 0\n", ", 0x12340000\n")
    timeline = timeline_of(source, portable=portable)
    watch = FrameContent(frame_of(timeline.hypervisor, 0, "next"))
    timeline.run(1000)
    change = timeline.last_change(watch)
    assert change is not None
    assert (change.time, change.cause, change.difference) == (52, Cause.STORE, "0x000: 0x00000000 -> 0x00001234")
    timeline.seek(10)
    assert timeline.run_to(watch) == change


def test_the_mmu_marks_a_page_as_written() -> None:
    timeline = timeline_of(STORES)
    xen = timeline.hypervisor
    table, index = xen.mmu.leaf_of(xen.domains[0].vcpus[0], xen.domains[0].symbols["number"])
    xen.memory.words[(table << 12) + 4 * index >> 2] &= ~0x60
    timeline.rebase()
    watch = FrameContent(table)
    timeline.run(1000)
    change = timeline.last_change(watch)
    assert change is not None
    assert (change.time, change.cause, change.domain) == (52, Cause.MMU, 0)
    assert "the MMU marked a page-table entry as used, at 0x" in str(change)
    timeline.seek(20)
    assert timeline.run_to(watch) == change


def test_never_changed() -> None:
    timeline = timeline_of(BUSY, COUNTS)
    timeline.run(3000)
    spare = FrameContent(timeline.hypervisor.domains[0].frames[-3])
    assert timeline.last_change(spare) is None
    assert timeline.back_to(spare) is None
    assert timeline.back_to(FrameUse(spare.mfn)) is None
    assert timeline.position == 3000
    assert timeline.run_to(spare, 1000) is None
    assert timeline.position == 4000


def test_a_slice_that_ends_does_not_hide_who_it_was() -> None:
    timeline = timeline_of(COUNTS, COUNTS)
    watches = [FrameContent(frame_of(timeline.hypervisor, domid, "number")) for domid in (0, 1)]
    timeline.run(400)
    found = [timeline.last_change(watch) for watch in watches]
    assert [(change.domain, change.time <= 350) for change in found if change] == [(0, True), (1, False)]


def test_an_input_is_to_blame() -> None:
    timeline = timeline_of(BUSY)
    watch = FrameUse(timeline.hypervisor.frames._free[-1])
    timeline.run(500)
    timeline.submit(Boot(image_from_source(COUNTS, "second")))
    timeline.run(500)
    change = timeline.last_change(watch)
    assert change is not None
    assert (change.time, change.cause, change.domain) == (501, Cause.OUTSIDE, -1)
    assert "changed by the input Boot(" in str(change)
    assert "owner -2 -> 1" in change.difference


def test_an_input_to_an_idle_machine() -> None:
    timeline = timeline_of(BLOCKS)
    idle = timeline.run(100).instructions
    timeline.submit(Boot(image_from_source(COUNTS)))
    timeline.submit(Pause(1))
    timeline.run(100)
    change = timeline.last_change(FrameUse(timeline.hypervisor.domains[1].frames[-1]))
    assert change is not None
    assert (change.time, timeline.position, change.cause) == (idle, idle, Cause.OUTSIDE)


class Write:
    """From outside: a byte into a frame."""

    def __init__(self, mfn: int, value: int) -> None:
        self.mfn, self.value = mfn, value

    def apply(self, hypervisor: Hypervisor) -> None:
        hypervisor.memory.frame(self.mfn)[5] = self.value

    def __repr__(self) -> str:
        return f"Write({self.value})"


def test_inputs_while_nobody_runs() -> None:
    timeline = timeline_of(
        "start: mov ebx, SCHEDOP_block\n mov eax, __HYPERVISOR_sched_op\n int 0x82\n jmp start", SLEEPS
    )
    xen = timeline.hypervisor
    watch = FrameContent(xen.domains[0].frames[-2], 4, 4)
    for time, value in ((1000, 7), (2000, 0), (4000, 7)):
        xen.inputs.submit(time, Write(watch.mfn, value))
    timeline.run(3000)
    change = timeline.last_change(watch)
    assert change is not None
    assert (change.time, change.domain) == (2001, -1)
    difference = "0x004: 0x00000700 -> 0x00000000"
    assert str(change) == f"2,001: {watch.name} changed by the input Write(0) ({difference})"
    before = timeline.back_to(watch), timeline.back_to(watch), timeline.back_to(watch)
    assert [found.time for found in before if found] == [2001, 1001]
    assert [found.time for found in [timeline.run_to(watch) for _ in range(2)] if found] == [2001, 4001]


def test_bad_goals_are_refused() -> None:
    timeline = timeline_of(BUSY)
    timeline.run(10)
    count = timeline.hypervisor.frames.count
    for mfn in (-1, count):
        with pytest.raises(TimelineError, match=f"expected one of the machine's, 0 to {count - 1:#x}"):
            timeline.last_change(FrameContent(mfn))
    with pytest.raises(TimelineError, match="expected bytes within its 4096, found 8 bytes at 0xffc"):
        FrameContent(3, 0xFFC, 8)
    with pytest.raises(TimelineError, match="port: expected 0 to 1023, found 1024"):
        PendingPort(0, 1024)
    assert timeline.position == 10


@settings(max_examples=20)
@given(data=st.data(), sources=st.tuples(guests, guests), slice_instructions=slices)
def test_changes_are_those_that_looking_after_each_instruction_finds(
    data: st.DataObject, sources: tuple[str, str], slice_instructions: int
) -> None:
    timeline = Timeline(machine(sources, slice_instructions), interval=64, snapshots=6)
    timeline.run(150)
    timeline.submit(Typed(0, b"abc"))
    timeline.run(150)
    xen = timeline.hypervisor
    stack = frame_of(xen, 0, "buffer")
    shared, root = xen.domains[0].shared_info_mfn, xen.domains[0].vcpus[0].state.cr3 >> 12
    table, _index = xen.mmu.leaf_of(xen.domains[1].vcpus[0], 0xC000_0000)
    watch: Watch = FrameContent(data.draw(st.sampled_from((stack, frame_of(xen, 1, "buffer"), table, shared, root))))
    if data.draw(st.booleans()):
        watch = FrameUse(watch.mfn)
    expected = changes_of(timeline, watch, timeline.end)
    here = data.draw(st.integers(0, timeline.end))
    timeline.seek(here)
    last = timeline.last_change(watch)
    assert (last.time if last else None) == max((time for time in expected if time <= here), default=None)
    found: list[Change] = []
    while (change := timeline.back_to(watch)) is not None and len(found) < 5:
        found.append(change)
        assert timeline.position == change.time
        assert watch.value(xen) == change.after
    assert [change.time for change in found] == [time for time in reversed(expected) if time < here][:5]
    timeline.seek(here)
    following = [time for time in expected if time > here]
    change = timeline.run_to(watch, timeline.end - here)
    assert (change.time if change else None) == (following[0] if following else None)


@settings(max_examples=20)
@given(data=st.data(), sources=st.tuples(guests, guests), slice_instructions=slices)
def test_events_are_visited_one_by_one_in_both_directions(
    data: st.DataObject, sources: tuple[str, str], slice_instructions: int
) -> None:
    timeline = Timeline(machine(sources, slice_instructions), interval=64)
    kind = data.draw(st.sampled_from((Kind.HYPERCALL, Kind.TRAP, Kind.SWITCH, Kind.CONSOLE)))
    timeline.run(200)
    timeline.seek(0)
    forward, places = [], []
    while timeline.position < 400 and (event := timeline.run_to(When(kind), 400 - timeline.position)) is not None:
        assert event in timeline.events()
        assert not forward or event.time > forward[-1].time or timeline.position > places[-1]
        forward.append(event)
        places.append(timeline.position)
    timeline.seek(400)
    meant = [event for event in timeline.events() if event.kind is kind and event.time < 400]
    assert all({event.time, event.time + 1} & set(places) for event in meant)
    timeline.step()
    backward = []
    while (event := timeline.back_to(When(kind))) is not None:
        assert event == [happened for happened in timeline.events() if happened.kind is kind][-1]
        assert event.time in (timeline.position, timeline.position - 1)
        backward.append(timeline.position)
    assert [place for place in backward if place < 400] == sorted({*places} - {400}, reverse=True)


def test_events_by_what_they_are() -> None:
    timeline = timeline_of(BUSY, BY_CALL)
    timeline.run(500)
    call = timeline.back_to(When(number=Hypercall.mmu_update, domain=1))
    assert call is not None
    assert (call.kind, call.time) == (Kind.HYPERCALL, timeline.position)
    assert timeline.last_events(1)[0].kind is Kind.RETURN
    assert timeline.back_to(When(number=Hypercall.mmu_update)) is None
    back = timeline.back_to(When(Kind.SWITCH, test=lambda event: event.to_vcpu == 32))
    assert back is not None
    assert timeline.position == back.time + 1
    assert timeline.run_to(When(Kind.RETURN, number=Hypercall.mmu_update)) is not None
    assert timeline.position == call.time
    assert timeline.back_to(When(vector=14)) is None
    assert timeline.run_to(When(Kind.CRASH), 2000) is None


def test_the_end_of_a_guest_that_crashes() -> None:
    timeline = timeline_of(BUSY, "start: mov ecx, 20\nwait: loop wait\n ud2")
    crash = timeline.run_to(When(Kind.CRASH))
    assert crash is not None
    assert (timeline.hypervisor.domains[1].crashed, crash.time) == (True, timeline.position)
    trap = timeline.back_to(When(vector=14))
    assert trap is None
    timeline.back()
    assert not timeline.hypervisor.domains[1].ended


SENDS = """
start:  mov ebx, EVTCHNOP_alloc_unbound
        mov ecx, offset unbound
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        mov ax, [unbound + 4]
        mov [bind + 4], eax
        mov ebx, EVTCHNOP_bind_interdomain
        mov ecx, offset bind
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
        mov eax, [bind + 8]
        mov [send], eax
        mov ecx, 25
wait:   loop wait
        mov ebx, EVTCHNOP_send
        mov ecx, offset send
        mov eax, __HYPERVISOR_event_channel_op
        int 0x82
done:   jmp done
unbound: .short DOMID_SELF, DOMID_SELF
        .long 0
bind:   .long DOMID_SELF, 0, 0
send:   .long 0
"""


def test_the_send_that_made_a_port_pending() -> None:
    timeline = timeline_of(SENDS)
    timeline.run(500)
    domain = timeline.hypervisor.domains[0]
    port = min(domain.ports)
    change = timeline.last_change(PendingPort(0, port))
    assert change is not None
    assert str(change).startswith(f"{change.time:,}: port {port} of domain 0 changed by domain 0: event_channel_op")
    assert change.difference == "not pending -> pending"
    assert timeline.last_change(PendingPort(5, 1)) is None
