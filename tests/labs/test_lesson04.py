"""The scenes of lesson 04 show what the machine did."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, XenlabError, boot, guests
from xenlab.abi.numbers import Errno
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.frames import FREE, XEN
from xenlab.labs import lesson04
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode

ALIAS = 0xC020_0000


@pytest.fixture(params=[TWO_LEVEL, PAE], ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> PagingMode:
    found: PagingMode = request.param
    return found


def test_the_timeline_is_at_the_first_instruction_and_the_neighbour_never_runs() -> None:
    timeline = lesson04.frames_timeline()
    assert timeline.position == 0
    timeline.run(10_000)
    frames, neighbour = timeline.hypervisor.domains.values()
    assert frames.console == "12345"
    assert (neighbour.console, neighbour.ended) == ("", False)
    check(timeline.hypervisor)


def test_a_step_of_the_guest_can_be_waited_for() -> None:
    timeline = lesson04.frames_timeline()
    assert lesson04.run_until_printed(timeline, "123").console == "123"
    with pytest.raises(XenlabError, match="before it printed '129'"):
        lesson04.run_until_printed(timeline, "129")


def test_a_swap_changes_frames_and_nothing_else() -> None:
    timeline = lesson04.frames_timeline()
    xen, shown = timeline.hypervisor, ["left", "right", ALIAS]

    def rows() -> list[list[str]]:
        return [line.split() for line in lesson04.where(xen, xen.domains[0], shown).splitlines()[2:]]

    lesson04.run_until_printed(timeline, "1234")
    left, right, alias = rows()
    lesson04.run_until_printed(timeline, "12345")
    new_left, new_right, new_alias = rows()
    assert (new_left[:3], new_right[:3]) == (left[:3], right[:3])
    assert (new_left[3], new_right[3]) == (right[3], left[3])
    assert (new_left[5], new_right[5]) == (left[5], right[5]) == (hex(ord("l")), hex(ord("r")))
    # The second address still names the old frame.
    assert alias[2] == new_alias[2] == left[3]
    assert new_alias[4] == right[5]


def test_observe_gives_registers_or_the_fault(mode: PagingMode) -> None:
    seen = lesson04.observe("mov eax, 1; mov ebx, 2; mov ecx, 3; mov edx, 4".replace("; ", "\n"), mode=mode)
    assert (seen.eax, seen.ebx, seen.ecx, seen.edx, seen.fault, seen.entries) == (1, 2, 3, 4, "", 0)
    assert str(seen) == "EAX = 0x1, EBX = 0x2, ECX = 0x3, EDX = 0x4"
    assert lesson04.observe("xor ebx, ebx\n mov eax, __HYPERVISOR_xen_version\n int 0x82", mode=mode).entries == 1
    fault = lesson04.observe("mov eax, 5\n mov [0x1000], eax", mode=mode)
    assert str(fault) == "#PF(2) at 0x1000, by the instruction at here+0x5"
    assert fault.eax == 0


def test_observe_has_the_lists_and_the_tables_at_hand(mode: PagingMode) -> None:
    seen = lesson04.observe(
        "mov eax, [ebp + 4 * 7]\n mov ebx, [M2P + 4 * eax]\n mov ecx, [edi]\n mov edx, M2P", mode=mode
    )
    assert (seen.eax, seen.ebx) == (seen.domain.frames[7], 7)
    assert lesson04.observe("mov [ebp], eax", mode=mode).fault == ""
    for refused in ("mov [edi], eax", "mov [M2P], eax"):
        assert lesson04.observe(refused, mode=mode).fault.startswith("#PF(3)")


def test_code_that_does_not_end_or_crashes_is_reported() -> None:
    with pytest.raises(XenlabError, match="did not come to its end"):
        lesson04.observe("again: jmp again")
    with pytest.raises(XenlabError, match="exception 6"):
        lesson04.observe("ud2")


@settings(max_examples=20)
@given(frame=st.integers(0, 2100))
def test_only_an_own_frame_can_be_renumbered(frame: int) -> None:
    code = f"""
        mov dword ptr [scratch], {frame} * 4096 + MMU_MACHPHYS_UPDATE
        mov dword ptr [scratch + 8], 0x1234
        mov ebx, offset scratch
        mov ecx, 1
        mov esi, DOMID_SELF
        mov eax, __HYPERVISOR_mmu_update
        int 0x82
    """
    seen = lesson04.observe(code, neighbours=1)
    frames = seen.xen.frames
    own = frames.owner_of(frame) == seen.domain.domid
    assert seen.eax == (0 if own else -Errno.EINVAL % 2**32)
    assert frame >= frames.count or (frames.m2p[frame] == 0x1234) is own


def test_where_names_an_address_in_all_three_worlds() -> None:
    xen = Hypervisor()
    domain = boot(xen, guests.source("hello"), name="hello")
    message = domain.symbols["message"]
    pfn = message - 0xC000_0000 >> 12
    row = lesson04.where(xen, domain, ["message"]).splitlines()[2].split()
    machine = domain.frames[pfn] << 12 | message & 0xFFF
    assert row == ["message", hex(message), hex(pfn), hex(domain.frames[pfn]), hex(machine), hex(ord("H"))]
    assert lesson04.where(xen, domain, [0x1000]).endswith("not mapped")


def test_confusion_hits_whoever_owns_the_number() -> None:
    found = lesson04.confusion(neighbours=2)
    assert [item.pfn for item in found] == list(range(256))
    assert {item.owner for item in found} == {XEN, FREE, 0, 1, 2}
    for item in found:
        assert item.errno == (0 if item.owner == 2 else Errno.EBUSY)
        assert (item.got is None) is (item.owner != 2)
        assert item.got != item.pfn
    text = lesson04.tally(found, guest=2)
    assert sum(int(line.split()[-1]) for line in text.splitlines()[2:]) == 256
    assert "the guest itself" in text


def test_walks_end_at_the_byte_or_where_a_table_is_missing(mode: PagingMode) -> None:
    xen = Hypervisor()
    domain = boot(xen, guests.source("hello"), name="hello", mode=mode)
    rows = lesson04.walk_steps(xen, domain, domain.symbols["message"]).splitlines()[2:]
    assert [row.split()[0] for row in rows] == [*(level.name for level in mode.levels), "page"]
    assert rows[-1].split()[-1] == hex(ord("H"))
    bits = [tuple(int(bit) for bit in row.split()[1].split("–")) for row in rows]
    assert bits[0][0] == 31
    assert bits[-1][1] == 0
    assert all(low == high + 1 for (_high, low), (high, _low) in pairwise(bits))
    assert len(lesson04.walk_steps(xen, domain, 0).splitlines()) == 3
