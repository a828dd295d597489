"""The bounce as a part: ours is the fast path in plain values, and no part gives a guest what it may not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from test_frames import CASES, needs_other_stack

from xenlab import Hypervisor, Machine, boot
from xenlab.abi.numbers import FLAT_RING3_SS
from xenlab.errors import PartError
from xenlab.hypervisor.bounce import SHARED, XenBounce
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.timeline import Timeline

MASKED = "mov byte ptr [shared_info + 1], 1"
OPEN = "mov byte ptr [shared_info + 1], 0"


def run(text: str, part: Any = None, budget: int = 3_000) -> Hypervisor:
    xen = Hypervisor(Machine(memory_mib=4), trace=Trace(), bounce=part)
    boot(xen, text)
    xen.run(budget)
    return xen


def what_guests_saw(xen: Hypervisor) -> tuple[Any, ...]:
    assert xen.trace is not None
    domain = xen.domains[0]
    shared = bytes(xen.memory.frame(domain.shared_info_mfn))
    events = [raw for raw in xen.trace.raw() if raw[1] != Kind.CRASH]  # each has words of its own for why
    return events, domain.shutdown, shared, dict(domain.vcpus[0].state.architectural())


@pytest.mark.parametrize("setup", [MASKED, OPEN], ids=["masked", "open"])
@pytest.mark.parametrize("name", CASES)
def test_the_part_in_plain_values_does_what_the_fast_way_does(
    name: str, setup: str, ring: int, play_source: Any
) -> None:
    if needs_other_stack(name, ring):
        pytest.skip("ends the guest")
    text = play_source(CASES[name][0], ring, udata=".long 0, 5, 8, 0", setup=setup)
    assert what_guests_saw(run(text, XenBounce())) == what_guests_saw(run(text))


@pytest.mark.parametrize(
    ("probe", "flags", "cs"),
    [("ud2", 0, "FLAT_RING3_CS"), ("ud2", 4, "FLAT_RING1_CS"), ("int 0x81", 7, "FLAT_RING1_CS")],
)
def test_the_part_honours_rings_and_masks_of_the_gate(
    probe: str, flags: int, cs: str, ring: int, play_source: Any, row: Any
) -> None:
    table = "\n".join(row(vector, flags, "handler", cs) for vector in (6, 0x81)) + "\n" + row(14)
    text = play_source(probe, ring, table=table, setup=OPEN)
    assert what_guests_saw(run(text, XenBounce())) == what_guests_saw(run(text))


class Changed(XenBounce):
    """Xen's frames, with some of the answer changed."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def frame(self, *question: Any) -> Mapping[str, Any] | None:
        answer = super().frame(*question)
        assert answer is not None
        return dict(answer) | {
            name: dict(answer[name]) | value if isinstance(value, dict) else value
            for name, value in self.changes.items()
        }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"registers": {"cs": 0xE008}}, "asks for ring 0"),
        ({"registers": {"cs": 0xE008, "ss": 0xE010}}, "asks for ring 0"),
        ({"registers": {"cs": 0x1231}}, "unusable code selector 0x1231"),
        ({"registers": {"cs": 0xE012}}, "unusable code selector"),
        ({"registers": {"ss": 0}}, "unusable stack selector 0x0"),
        ({"registers": {"ss": FLAT_RING3_SS}}, "unusable stack selector"),
        ({"registers": {"esp": 0x1000}}, "the frame at 0x00001000 is not on memory that ring 1 may write"),
        ({"registers": {"esp": 0xFC000000}}, "the frame at 0xfc000000"),
        ({"registers": {"esp": 0xFFFFFFF8}}, "the frame at 0xfffffff8"),
        ({"registers": {"esp": 0xC000_0000 - 8}}, "the frame at 0xbffffff8"),
    ],
)
def test_what_a_guest_may_not_have_ends_it(changes: dict[str, Any], said: str, play_source: Any) -> None:
    xen = run(play_source("ud2", 3), Changed(**changes))
    assert xen.domains[0].crashed
    assert said in xen.domains[0].report


def test_a_handler_in_ring_3_gets_its_frame_only_where_ring_3_may_write(play_source: Any) -> None:
    asked: list[bool] = []

    class OnTheKernelsStack(XenBounce):
        def frame(self, trap: Any, registers: Any, gate: Any, kernel: Any, writable: Any) -> Mapping[str, Any] | None:
            asked.extend(writable(address, 12) for address in (registers["esp"] - 12, 0xC000_2000, 0xFF00_0000))
            answer = super().frame(trap, registers, gate, kernel, writable)
            return dict(answer or {}) | {"registers": dict(answer or {})["registers"] | {"esp": 0xC000_2000}}

    table = ".byte 6, 0\n .short FLAT_RING3_CS\n .long handler"
    xen = run(play_source("ud2", 3, table=table), OnTheKernelsStack())
    assert asked == [True, False, False]
    assert "the frame at 0xc0002000 is not on memory that ring 3 may write" in xen.domains[0].report


def test_a_part_that_gives_up_ends_the_guest_and_not_its_neighbour(play_source: Any) -> None:
    class GivesUp:
        def frame(self, *_question: Any) -> None:
            return None

    xen = Hypervisor(Machine(memory_mib=4), bounce=GivesUp())
    lost = boot(xen, play_source("ud2", 3))
    other = boot(xen, "again: jmp again")
    xen.run(2_000)
    assert "exception 6 (#UD invalid opcode), which its bounce cannot deliver" in lost.report
    assert not other.ended


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (7, "a mapping with words, registers"),
        ({"words": [1]}, "a mapping with words, registers"),
        ({"words": [1], "registers": {}, "ring": 0}, "no other name"),
        ({"words": [], "registers": {}}, "words: a list of 1 to 16"),
        ({"words": [1] * 17, "registers": {}}, "words: a list of 1 to 16"),
        ({"words": [-1], "registers": {}}, "words: a list"),
        ({"words": [1 << 32], "registers": {}}, "words: a list"),
        ({"words": [True], "registers": {}}, "words: a list"),
        ({"words": [1], "registers": {"eip": 1}}, "registers: all of eip cs eflags esp ss"),
        (RuntimeError("no idea"), "it raised RuntimeError: no idea"),
    ],
)
def test_an_answer_that_is_none_is_named(answer: Any, expected: str, play_source: Any) -> None:
    class Bad:
        def frame(self, *_question: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    with pytest.raises(PartError, match=r"Bad, frame for #UD invalid opcode at 0x") as raised:
        run(play_source("ud2", 3), Bad())
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shared": {0: 1}}, "by offsets from 8 to 28"),
        ({"shared": {32: 1}}, "by offsets"),
        ({"shared": {9: 1}}, "by offsets"),
        ({"shared": {8: -1}}, "by offsets"),
        ({"shared": 3}, "by offsets"),
        ({"event_mask": 2}, "event_mask: 0 or 1"),
        ({"event_mask": True}, "event_mask: 0 or 1"),
        ({"registers": {"eip": "x"}}, "registers: all of"),
        ({"registers": {"eip": -1}}, "registers: whole numbers of 32 bits"),
    ],
)
def test_a_part_writes_nowhere_else_in_the_shared_page(
    changes: dict[str, Any], expected: str, play_source: Any
) -> None:
    with pytest.raises(PartError) as raised:
        run(play_source("ud2", 3), Changed(**changes))
    assert expected in str(raised.value)


def test_words_for_the_handler_may_stand_anywhere_in_its_part_of_the_page(play_source: Any) -> None:
    values = {offset: 0x1111 * place for place, offset in enumerate(SHARED)}
    xen = run(play_source("ud2", 3), Changed(shared=values, event_mask=1))
    page = xen.memory.frame(xen.domains[0].shared_info_mfn)
    assert [int.from_bytes(page[at : at + 4], "little") for at in SHARED] == list(values.values())
    assert page[1] == 1


def test_flags_that_are_not_the_guests_stay_as_they_are(play_source: Any) -> None:
    part = Changed(registers={"eflags": 0xFFFF_FFFF})
    # TF is the guest's; with it, its handler would be interrupted before it ends the guest.
    xen = run(play_source("ud2", 3, table=".byte 6, 0\n .short FLAT_RING1_CS\n .long handler"), part)
    assert xen.trace is not None
    flags = [event.registers for event in xen.trace.events(Kind.TRAP)]
    assert flags
    state = xen.domains[0].vcpus[0].state.architectural()
    assert not state["eflags"] & 0x27000  # neither I/O privilege, nor a nested task, nor virtual-8086 mode


def test_a_run_is_taken_back_with_its_part(play_source: Any) -> None:
    class Counts(XenBounce):
        count = 0

        def frame(self, *question: Any) -> Mapping[str, Any] | None:
            self.count += 1
            return super().frame(*question)

    part = Counts()
    xen = Hypervisor(Machine(memory_mib=4), trace=Trace(), bounce=part)
    boot(xen, play_source("ud2", 3))
    timeline = Timeline(xen)
    timeline.run(200)
    assert part.count == 1
    timeline.seek(1)
    assert part.count == 0
