"""The balloon driver, targets and limits, and the policy: by plain numbers, and with guests that need memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, Machine, XenlabError, boot, guests
from xenlab.abi.numbers import HYPERCALL_VECTOR
from xenlab.errors import PartError
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, NO_PFN
from xenlab.hypervisor.trace import HAS, MOST, TARGET, Kind, Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode, mapped_pages
from xenlab.timeline import Timeline
from xenlab.toolstack.balloon import (
    Balance,
    MoveUnderPressure,
    Row,
    SetMaximum,
    SetMinimum,
    SetTarget,
    ballooned,
    read_store,
    share,
)

BASE = 0xC000_0000
AWAY = 0xFFFF_FFFF
LOW = 4  # free pages that the driver leaves to its kernel


@pytest.fixture(autouse=True)
def audited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Audits the whole machine after every hypercall that maps or moves memory; counts the audits."""
    audits, trap = [0], Hypervisor.trap

    def trap_and_check(self: Hypervisor, vector: int, error: int, address: int) -> None:
        number = self.current.state.eax if self.current else 0
        trap(self, vector, error, address)
        # Thousands of calls on a large machine would take minutes.
        if vector == HYPERCALL_VECTOR and number in (12, 13, 14) and self.frames.count <= 8 * 256:
            check(self)
            audits[0] += 1

    monkeypatch.setattr(Hypervisor, "trap", trap_and_check)
    return audits


@pytest.fixture(params=[TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> PagingMode:
    found: PagingMode = request.param
    return found


def machine(memory_mib: int = 4) -> Hypervisor:
    return Hypervisor(Machine(memory_mib), trace=Trace())


def balloon(xen: Hypervisor, plan: str = "", mode: PagingMode = TWO_LEVEL, memory_mib: int = 1) -> Domain:
    return boot(xen, guests.source("balloon"), name="balloon", command_line=plan, mode=mode, memory_mib=memory_mib)


def settle(xen: Hypervisor) -> None:
    """Run until every guest sleeps."""
    assert xen.run(3_000_000).stop is Stop.IDLE


def tell(xen: Hypervisor, domain: Domain, pages: int) -> None:
    xen.submit(SetTarget(domain.domid, pages))
    settle(xen)


def finish_round(xen: Hypervisor, domain: Domain) -> None:
    """Run on to where the guest's driver has nothing half done."""
    for _step in range(20_000):
        if domain.vcpus[0].state.eip == domain.symbols["round"]:
            return
        xen.run(1)
    pytest.fail(f"not at the beginning of a round\n{domain.report}")


def word(xen: Hypervisor, domain: Domain, name: str) -> int:
    return xen.guest_memory.read_word(domain.vcpus[0], domain.symbols[name])


def p2m(xen: Hypervisor, domain: Domain) -> list[int]:
    """The guest's own list of frames, by its own count of how far it reaches."""
    at, vcpu = word(xen, domain, "p2m"), domain.vcpus[0]
    return [xen.guest_memory.read_word(vcpu, at + 4 * pfn) for pfn in range(word(xen, domain, "limit"))]


def check_lists(xen: Hypervisor, domain: Domain) -> None:
    """The guest's list, the hypervisor's list, the owners and the page tables say the same."""
    own = {pfn: mfn for pfn, mfn in enumerate(p2m(xen, domain)) if mfn != AWAY}
    assert len(own) == domain.pages == word(xen, domain, "have")
    assert sorted(own.values()) == [mfn for mfn in xen.frames.owned_by(domain.domid) if mfn != domain.shared_info_mfn]
    assert all(xen.frames.m2p[mfn] == pfn for pfn, mfn in own.items())
    state = domain.vcpus[0].state
    pages = dict(mapped_pages(xen.memory, state.mode, state.cr3))
    mapped = {at - BASE >> 12: state.mode.frame_of(entry) for at, entry in pages.items() if at < 0xF000_0000}
    del mapped[1], own[1]  # the shared page is mapped over that one
    assert mapped == own
    for mfn, owner in enumerate(xen.frames.owner):
        if owner == FREE:
            assert xen.frames.m2p[mfn] == NO_PFN
            assert not any(xen.memory.frame(mfn))
    check(xen)


class TestDriver:
    def test_follows_its_target_down_and_up(self, mode: PagingMode, audited: list[int]) -> None:
        xen = machine()
        domain = balloon(xen, mode=mode)
        settle(xen)
        xen.submit(SetMaximum(domain.domid, 300))
        for target in (200, 100, 101, 60, 256, 300, 30):
            free = xen.frames.free_frames + domain.pages
            tell(xen, domain, target)
            assert (domain.pages, xen.frames.free_frames + domain.pages) == (target, free)
            assert read_store(xen, domain).have == target
            check_lists(xen, domain)
        assert not domain.ended, domain.report
        assert audited[0] > 50

    def test_a_page_comes_back_in_another_frame(self) -> None:
        xen = machine()
        domain = balloon(xen)
        settle(xen)
        before = p2m(xen, domain)
        tell(xen, domain, 100)
        others = boot(xen, "start: jmp start")
        xen.pause(others)
        tell(xen, domain, 256)
        after = p2m(xen, domain)
        assert before != after
        assert sum(old != new for old, new in zip(before, after, strict=True)) > 100
        check_lists(xen, domain)

    def test_no_lower_than_what_its_kernel_uses(self, mode: PagingMode) -> None:
        xen = machine()
        domain = balloon(xen, mode=mode)
        tell(xen, domain, 1)
        assert domain.pages == read_store(xen, domain).need < 20
        assert word(xen, domain, "free") == LOW
        check_lists(xen, domain)

    def test_the_paper_s_64_mib(self) -> None:
        xen = Hypervisor(Machine(68))
        domain = balloon(xen, memory_mib=64)
        assert domain.pages == 16_384
        tell(xen, domain, 1)
        assert domain.pages * 4 < 6.2 * 1024
        assert domain.pages < 60
        check(xen)
        assert xen.frames.free_frames > 64 * 256

    def test_not_above_its_maximum_whatever_the_target(self) -> None:
        xen = machine()
        domain = balloon(xen)
        settle(xen)
        xen.submit(SetMaximum(domain.domid, 280))
        tell(xen, domain, 1000)
        assert domain.pages == 280
        xen.submit(SetMaximum(domain.domid, 200))  # it keeps what it has, and gets nothing back once it gave
        tell(xen, domain, 1000)
        assert domain.pages == 280
        tell(xen, domain, 150)
        tell(xen, domain, 1000)
        assert domain.pages == 200
        check_lists(xen, domain)

    def test_not_more_than_the_machine_has(self) -> None:
        xen = machine()
        domain = balloon(xen)
        settle(xen)
        xen.submit(SetMaximum(domain.domid, 1024))
        tell(xen, domain, 1024)
        assert xen.frames.free_frames == 0
        assert 256 < domain.pages < 1024
        check_lists(xen, domain)

    def test_a_target_that_came_before_its_first_instruction_counts(self) -> None:
        xen = machine()
        domain = balloon(xen)
        xen.submit(SetTarget(domain.domid, 80))
        settle(xen)
        assert domain.pages == 80


class TestWorkload:
    def test_uses_and_returns_pages_by_its_command_line(self) -> None:
        xen = machine()
        domain = balloon(xen, "4: 40x30, 100x30")
        seen = set()
        for _turn in range(200):
            xen.run(1_000)
            seen.add(word(xen, domain, "used"))
        assert {0, 40, 100} <= seen
        assert max(seen) == 100
        assert not domain.ended, domain.report

    def test_takes_memory_back_when_it_runs_out(self) -> None:
        xen = machine()
        domain = balloon(xen, "4: 20x60, 150x9999")
        xen.submit(SetTarget(domain.domid, 60))
        lowest = 256
        for _turn in range(120):
            xen.run(1_000)
            lowest = min(lowest, domain.pages)
        # The target stands at 60; what the workload lacked the driver asked for above it.
        assert lowest == 60
        assert word(xen, domain, "used") == 150
        assert domain.pages > 150
        assert read_store(xen, domain).failed == 0
        check_lists(xen, domain)

    def test_out_of_memory_is_survived_and_told(self) -> None:
        xen = machine()
        domain = balloon(xen, "4: 20x20, 300x400")
        xen.submit(SetMaximum(domain.domid, 256))
        xen.run(200_000)
        words = read_store(xen, domain)
        assert (domain.pages, words.need > 256, words.failed > 0) == (256, True, True)
        assert domain.console == "out of memory\n"
        xen.submit(SetMaximum(domain.domid, 400))
        xen.run(100_000)
        assert word(xen, domain, "used") == 300
        assert domain.console == "out of memory\nmemory again\n"
        check_lists(xen, domain)

    def test_its_pages_keep_what_it_wrote_while_others_come_and_go(self) -> None:
        """The kernel stops at a page that does not hold its stamp any more."""
        xen = machine()
        domains = [balloon(xen, plan) for plan in ("8: 20x10, 300x30", "8: 300x20, 20x25")]
        for domain in domains:
            xen.submit(SetMaximum(domain.domid, 500))
        xen.submit(Balance(interval=3_000))
        xen.run(400_000)
        for domain in domains:
            finish_round(xen, domain)
            check_lists(xen, domain)


class TestInputs:
    @pytest.mark.parametrize("pages", [0, -1, True, 1.5, "12", 1 << 21])
    def test_a_target_is_a_number_of_pages(self, pages: Any) -> None:
        with pytest.raises(XenlabError, match="expected a whole number from 1"):
            SetTarget(0, pages)

    def test_nobody_is_told_where_there_is_nobody(self) -> None:
        xen = machine()
        domain = balloon(xen)
        settle(xen)
        for item in (SetTarget(7, 5), SetMaximum(7, 5), SetMinimum(7, 5)):
            xen.submit(item)
        settle(xen)
        assert domain.pages == 256

    def test_the_trace_has_what_a_domain_has_may_have_and_should_have(self) -> None:
        xen = machine()
        domain = balloon(xen)
        settle(xen)
        xen.submit(SetMaximum(domain.domid, 300))
        tell(xen, domain, 250)
        assert xen.trace is not None
        events = [(event.what, event.pages) for event in xen.trace.events(Kind.MEMORY)]
        assert events == [(HAS, 256), (MOST, 300), (TARGET, 250), (HAS, 250)]

    def test_a_run_with_targets_and_a_policy_can_be_taken_back(self) -> None:
        xen = machine()
        for plan in ("4: 20x20, 300x30", "4: 300x30, 20x20"):
            xen.submit(SetMaximum(balloon(xen, plan).domid, 400))
        timeline = Timeline(xen, interval=20_000)
        timeline.submit(Balance(interval=5_000))
        timeline.run(150_000)
        end = timeline.machine_hash()
        timeline.seek(60_000)
        timeline.seek(150_000)
        assert timeline.machine_hash() == end


GIVES_STORE_AWAY = """
start:  mov eax, [esi + 44]                  # store_mfn
        mov [frame], eax
        mov edx, [esi + 68]
        xor ebx, ebx
find:   cmp [edx + 4 * ebx], eax
        je  found
        inc ebx
        jmp find
found:  shl ebx, 12
        add ebx, 0xC0000000
        mov dword ptr [ebx + 8], 1           # it has a balloon driver, it says
        {between}
        xor ecx, ecx
        xor edx, edx
        xor esi, esi
        mov eax, __HYPERVISOR_update_va_mapping
        int 0x82
        {then}
stay:   jmp stay
        .align 4
extents: .long frame, 1, 0, 0, DOMID_SELF
pin:    .long MMUEXT_PIN_L1_TABLE
frame:  .long 0, 0
"""
GIVE_UP = "mov ebx, XENMEM_decrease_reservation\n mov ecx, offset extents\n mov eax, __HYPERVISOR_memory_op\n int 0x82"
PIN = """mov ebx, offset pin
        mov ecx, 1
        xor edx, edx
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmuext_op
        int 0x82"""


@pytest.mark.parametrize("then", [GIVE_UP, PIN], ids=["given up", "a page table now"])
def test_a_target_is_not_written_into_what_is_no_store_page_any_more(then: str) -> None:
    xen = machine()
    clear = "mov dword ptr [ebx + 8], 0" if then is PIN else ""
    domain = boot(xen, GIVES_STORE_AWAY.format(between=clear, then=then))
    xen.run(2_000)
    before = bytes(xen.memory.frame(domain.store_mfn))
    xen.submit(SetTarget(domain.domid, 0x1234))
    xen.submit(Balance())
    xen.run(2_000)
    assert bytes(xen.memory.frame(domain.store_mfn)) == before
    assert xen.trace is not None
    assert not [event for event in xen.trace.events(Kind.MEMORY) if event.what == TARGET]
    assert not domain.ended, domain.report
    check(xen)


def rows(*numbers: tuple[int, int, int, int]) -> list[dict[str, int]]:
    names = ("least", "most", "have", "need")
    return [{"domid": domid, **dict(zip(names, row, strict=True)), "target": 1} for domid, row in enumerate(numbers)]


PAGES = st.integers(1, 500)
ROWS = st.lists(st.tuples(PAGES, PAGES, PAGES, st.integers(0, 1 << 32)), min_size=1, max_size=5).map(
    lambda found: rows(*((min(a, b), max(a, b), have, need) for a, b, have, need in found))
)


def possible(free: int, domains: Sequence[Row]) -> bool:
    return sum(row["least"] for row in domains) <= free + sum(row["have"] for row in domains)


class TestPolicy:
    @given(free=st.integers(-100, 800), domains=ROWS)
    def test_keeps_to_the_limits_and_to_what_there_is(self, free: int, domains: list[dict[str, int]]) -> None:
        targets = MoveUnderPressure().targets(free, domains)
        assert set(targets) == {row["domid"] for row in domains}
        for row in domains:
            assert 1 <= targets[row["domid"]] <= row["most"]
            assert targets[row["domid"]] >= row["least"] or not possible(free, domains)
        if possible(free, domains):
            assert sum(targets.values()) <= free + sum(row["have"] for row in domains)

    @given(free=st.integers(-100, 800), domains=ROWS)
    def test_who_needs_more_gets_it_if_it_can_be_had(self, free: int, domains: list[dict[str, int]]) -> None:
        wants = {row["domid"]: min(max(row["need"], row["least"]), row["most"]) for row in domains}
        targets = MoveUnderPressure().targets(free, domains)
        if sum(wants.values()) <= free + sum(row["have"] for row in domains):
            assert all(targets[domid] >= want for domid, want in wants.items())
        elif possible(free, domains):
            assert sum(targets.values()) == free + sum(row["have"] for row in domains)
            assert all(targets[domid] <= want for domid, want in wants.items())

    @given(free=st.integers(-100, 800), domains=ROWS, step=st.integers(1, 60))
    def test_comes_to_rest_under_constant_pressure(self, free: int, domains: list[dict[str, int]], step: int) -> None:
        """Drivers that move so many pages at a time, one after the other, and a policy that looks each time."""
        for row in domains:
            row["have"] = min(row["have"], row["most"])
        told: Mapping[int, int] = {}
        for _round in range(2 + 2 * 2_500 // step + 2 * len(domains)):
            before, told = told, MoveUnderPressure().targets(free, domains)
            moved = False
            for row in domains:
                change = max(-step, min(step, told[row["domid"]] - row["have"], max(free, 0)))
                row["have"] += change
                free -= change
                moved = moved or change != 0
            if not moved and told == before:
                break
        else:
            pytest.fail("still moving")
        assert [row["have"] for row in domains] == [told[row["domid"]] for row in domains]

    def test_nothing_moves_without_need(self) -> None:
        domains = rows((10, 300, 200, 50), (10, 300, 100, 100))
        assert MoveUnderPressure().targets(0, domains) == {0: 200, 1: 100}

    def test_free_memory_goes_first_and_then_what_others_can_spare(self) -> None:
        domains = rows((10, 300, 200, 50), (10, 300, 100, 150))
        assert MoveUnderPressure().targets(30, domains) == {0: 180, 1: 150}
        assert MoveUnderPressure().targets(60, domains) == {0: 200, 1: 150}

    def test_in_a_shortage_everybody_keeps_its_minimum(self) -> None:
        domains = rows((50, 900, 100, 900), (80, 900, 100, 500), (10, 900, 100, 10))
        assert MoveUnderPressure().targets(0, domains) == {0: 50 + 107, 1: 80 + 53, 2: 10}

    @given(amount=st.integers(0, 1000), weights=st.dictionaries(st.integers(0, 9), st.integers(0, 300), max_size=6))
    def test_shares_add_up_and_nobody_gets_more_than_its_weight(self, amount: int, weights: dict[int, int]) -> None:
        parts = share(amount, weights)
        assert sum(parts.values()) == min(amount, sum(weights.values()))
        assert all(0 <= parts[key] <= weight for key, weight in weights.items())


PLANS = st.lists(st.tuples(st.integers(1, 40).map(lambda n: 10 * n), st.integers(5, 40)), min_size=1, max_size=3).map(
    lambda pairs: "6: " + ", ".join(f"{pages}x{rounds}" for pages, rounds in pairs)
)


@given(plans=st.lists(PLANS, min_size=2, max_size=3), least=st.lists(st.integers(20, 150), min_size=3, max_size=3))
@settings(max_examples=5, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_guests_under_changing_pressure(plans: list[str], least: list[int]) -> None:
    xen = machine()
    domains = [balloon(xen, plan) for plan in plans]
    for domain, pages in zip(domains, least, strict=False):
        xen.submit(SetMinimum(domain.domid, pages))
        xen.submit(SetMaximum(domain.domid, 400))
    xen.submit(Balance(interval=4_000))
    total = xen.frames.free_frames + sum(domain.pages for domain in domains)
    for _turn in range(60):
        xen.run(5_000)
        assert xen.frames.free_frames + sum(domain.pages for domain in domains) == total
        for domain in domains:
            assert domain.least_pages <= domain.pages <= domain.most_pages
    assert xen.trace is not None
    for event in xen.trace.events(Kind.MEMORY):
        if event.what == TARGET:
            assert xen.domains[event.domain].least_pages <= event.pages <= 400
    for domain in domains:
        finish_round(xen, domain)
        check_lists(xen, domain)


def test_constant_pressure_is_shared_and_then_nothing_moves() -> None:
    xen = machine()
    domains = [balloon(xen, f"6: {pages}x1") for pages in (450, 400, 100)]
    for domain in domains:
        xen.submit(SetMinimum(domain.domid, 60))
        xen.submit(SetMaximum(domain.domid, 500))
    xen.submit(Balance(interval=4_000))
    xen.run(600_000)
    settled = [domain.pages for domain in domains]
    xen.run(200_000)
    assert [domain.pages for domain in domains] == settled
    assert settled == [row["target"] for row in ballooned(xen)]
    assert xen.frames.free_frames == 0
    assert settled[0] > settled[1] > settled[2] > 60


def test_a_reserve_is_in_no_target() -> None:
    xen = machine()
    domains = [balloon(xen, "6: 350x999") for _number in range(2)]
    for domain in domains:
        xen.submit(SetMaximum(domain.domid, 500))
    total = xen.frames.free_frames + sum(domain.pages for domain in domains)
    xen.submit(Balance(interval=4_000, reserve=450))
    xen.run(600_000)
    assert sum(row["target"] for row in ballooned(xen)) <= total - 450
    # A target is a wish: what the guests need more they ask for themselves, up to their maximum.
    assert xen.frames.free_frames < 450


@pytest.mark.parametrize("answer", [None, 5, [], {0: 0}, {0: 1.5}, {7: 3}, {0: 1 << 30}, {True: 5, 0: "1"}])
def test_a_policy_that_gives_no_targets_is_named(answer: Any) -> None:
    class Strange:
        def targets(self, free: int, domains: Sequence[Row]) -> Any:
            return answer

    xen = machine()
    balloon(xen)
    settle(xen)
    xen.submit(Balance(Strange()))
    with pytest.raises(PartError, match="Strange, targets"):
        xen.run(10)


def test_a_policy_that_raises_is_named_and_the_machine_goes_on() -> None:
    class Raises:
        def targets(self, free: int, domains: Sequence[Row]) -> dict[int, int]:
            raise ValueError("out of ideas")

    xen = machine()
    domain = balloon(xen)
    settle(xen)
    xen.submit(Balance(Raises()))
    with pytest.raises(PartError, match="out of ideas"):
        xen.run(10)
    xen.inputs.forget_pending()
    tell(xen, domain, 100)
    assert domain.pages == 100
