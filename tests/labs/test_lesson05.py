"""The scenes of lesson 05 show what the machine did."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab.abi.numbers import Errno, Hypercall, MmuextOp
from xenlab.errors import PartError, XenlabError
from xenlab.hypervisor.auditor import audit
from xenlab.hypervisor.trace import Kind
from xenlab.labs import lesson05
from xenlab.labs.obedient import READ_ONLY, TABLE, WRITABLE, Obedient
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode

MODES = pytest.mark.parametrize("mode", [TWO_LEVEL, PAE], ids=lambda mode: mode.name)


@MODES
def test_the_obedient_guest_does_what_it_is_told(mode: PagingMode) -> None:
    guest = Obedient(mode=mode)
    page, other = guest.page(0), guest.page(1)
    assert guest.store(page.address, 0x1234).fault is None
    assert guest.load(page.address).result == 0x1234
    assert guest.xen.memory.words[page.mfn << 10] == 0x1234
    assert guest.update_va_mapping(other.address, mode.entry(page.mfn, READ_ONLY)).result == 0
    assert guest.load(other.address).result == 0x1234
    assert guest.store(other.address, 1).fault == 3
    assert guest.load(0x1000).fault == 0
    assert guest.call(Hypercall.xen_version).result == 4 << 16 | 17
    assert guest.call(63).result == -Errno.ENOSYS
    assert audit(guest.xen) == []


@MODES
def test_the_obedient_guest_knows_its_frames(mode: PagingMode) -> None:
    guest = Obedient(mode=mode)
    assert guest.tables[0] == guest.root
    assert guest.leaf in guest.tables
    assert len(guest.tables) == len(mode.levels)
    assert guest.address_of(guest.page(3).mfn) == guest.page(3).address
    assert guest.xen.frames.owner[guest.neighbour] == 1
    assert guest.leaf_of(guest.page(0).address)[0] == guest.leaf


def test_an_order_that_ends_the_guest_is_reported() -> None:
    guest = Obedient()
    with pytest.raises(XenlabError, match="did not come back"):
        guest.call(Hypercall.sched_op, 2, guest.data, data=bytes(4))


def test_a_batch_says_how_many_were_done() -> None:
    guest = Obedient()
    entry = guest.mode.entry(guest.page(0).mfn, WRITABLE)
    updates = [(guest.pointer(guest.leaf, 300 + place), entry) for place in range(5)]
    assert guest.mmu_update(*updates).done == 5
    updates[3] = (guest.pointer(guest.leaf, 303), guest.mode.entry(guest.leaf, WRITABLE))
    answer = guest.mmu_update(*updates)
    assert (answer.result, answer.done) == (-Errno.EBUSY, 3)


def test_the_guest_tables_lives_the_life_of_a_table() -> None:
    timeline = lesson05.tables_timeline()
    timeline.run(1_000)
    guest = timeline.hypervisor.domains[0]
    assert guest.console == "!..!..!...!"
    assert not guest.crashed
    timeline.seek(0)
    assert guest.console == ""
    kinds = [event.kind for event in timeline.hypervisor.trace.events()] if timeline.hypervisor.trace else []
    assert Kind.REFUSED not in kinds


def test_every_attempt_is_refused_with_a_reason_and_leaves_the_auditor_content() -> None:
    found = lesson05.refused_updates()
    count = len(lesson05.ATTEMPTS)
    assert f"content after {count} of {count}." in found
    assert found.count(" -E") == count
    assert "rule of its own" not in found


def test_the_trusting_validator_lets_through_what_ours_refuses() -> None:
    broken, impossible = 0, {}
    for what, attempt in lesson05.ATTEMPTS.items():
        guest = Obedient(page_types=lesson05.Trusting())
        try:
            attempt(guest)
        except PartError as problem:
            impossible[what] = str(problem)
        broken += audit(guest.xen) != []
    # A frame that is not there, and code that was taken for page tables.
    assert list(impossible) == ["a frame beyond the end of memory", "the l1 table as a root"]
    assert all("no such frame" in problem for problem in impossible.values())
    assert broken >= 9


def test_batches_are_measured_against_single_updates() -> None:
    costs = lesson05.batching((1, 16, 64), count=64, repeat=2)
    assert [(cost.batch, cost.traps) for cost in costs] == [(1, 64), (16, 4), (64, 1)]
    assert all(cost.update_ns > 0 for cost in costs)


@pytest.mark.parametrize("batch", [1, 8, 512])
def test_the_measured_loop_is_the_updates_and_nothing_else(batch: int) -> None:
    xen = lesson05._batch_machine(batch, 512)
    guest = xen.domains[0]
    leaf = xen.mmu.leaf_of(guest.vcpus[0], 0xC000_0000)[0]
    entries = {TWO_LEVEL.read(xen.memory, leaf << 12, index) >> 12 for index in range(512, 1024)}
    assert len(entries) == 1
    (mfn,) = entries
    assert xen.frames.uses[mfn] == 513
    again = guest.symbols["again"]
    # After a whole number of rounds it is where the round begins.
    assert guest.vcpus[0].state.eip == again


def test_a_forgotten_queue_is_a_page_fault_that_is_mended() -> None:
    events = lesson05.queueing().splitlines()[2:]
    assert [line.split()[1].split("(")[0] for line in events] == [
        "set_trap_table",
        "#PF",
        "frame",
        "mmu_update",
        "sched_op",
        "domain:",
    ]


def test_a_new_table_is_a_page_until_it_is_one() -> None:
    guest = Obedient()
    pages = [guest.page(20), guest.page(21)]
    page = lesson05.new_table(guest, 10, pages)
    entry = guest.mode.entry(page.mfn, TABLE)
    assert guest.update(guest.root, 700, entry).result == -Errno.EINVAL
    guest.make_read_only(page)
    assert guest.update(guest.root, 700, entry).result == 0
    assert "l1 table  2" in lesson05.describe_frames(guest.xen, 0)
    assert lesson05.read_through(guest, 700 << 22).endswith(": 0x0")
    assert "page fault" in lesson05.read_through(guest, (700 << 22) + 2 * 4096)


def test_linear_addresses_lead_to_the_entries() -> None:
    guest = Obedient()
    assert guest.update(guest.root, 699, guest.mode.entry(guest.root, lesson05.PRESENT)).result == 0
    for page in (guest.page(0), guest.page(77)):
        seen = guest.load(lesson05.linear_address(699, page.address)).result & 0xFFFF_FFFF
        assert seen == guest.entry_at(*guest.leaf_of(page.address))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["leaf", "root", "pin", "unpin", "store"]),
            st.integers(0, 1023),
            st.sampled_from(["own", "leaf", "root", "neighbour", "xen", "nowhere"]),
            st.integers(0, 0xFFF),
        ),
        max_size=6,
    )
)
def test_whatever_it_is_told_the_auditor_stays_content(orders: list[tuple[str, int, str, int]]) -> None:
    guest = Obedient()
    guest.writable_tables()
    frames = {"own": guest.page(5).mfn, "leaf": guest.leaf, "root": guest.root, "neighbour": guest.neighbour}
    frames |= {"xen": 17, "nowhere": 0xFFFFF}
    leaf = guest.leaf
    for what, index, name, flags in orders:
        # What maps the guest's own code and orders stays; the rest is fair game.
        index = max(index, 200) if what in ("leaf", "store") else index % 700
        entry = guest.mode.entry(frames[name], flags)
        if what == "leaf":
            guest.update(leaf, index, entry)
        elif what == "root":
            guest.update(guest.root, index, entry)
        elif what == "store":
            guest.store(guest.address_of(leaf) + 4 * index, entry)
        else:
            command = MmuextOp.PIN_L1_TABLE if what == "pin" else MmuextOp.UNPIN_TABLE
            guest.extended(command, frames[name] & 0xFFFFF)
        assert audit(guest.xen) == []
