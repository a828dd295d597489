"""Each picture and each table: from a real run, different for different guests, safe whatever a guest wrote."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from view_guests import ENDLESS, ROUND_TRIPS, talker

from xenlab import Hypervisor, Machine
from xenlab.errors import XenlabError
from xenlab.hypervisor.trace import Kind
from xenlab.views import (
    AddressSpaceView,
    BarsView,
    CallTimeline,
    MachineView,
    P2mView,
    Picture,
    RegistersView,
    RingsView,
)
from xenlab.views.canvas import Canvas, clip, printable
from xenlab.views.picture import table
from xenlab.views.story import describe, instructions_by_domain, last_moves, last_steps

Run = Callable[..., Hypervisor]
SVG = "{http://www.w3.org/2000/svg}"
VIEWS = (MachineView, RingsView, CallTimeline, RegistersView, AddressSpaceView, P2mView)
LIMIT = 60_000


def words_in(view: Picture) -> str:
    """All text that the picture draws."""
    root = ElementTree.fromstring(view.svg())
    return "\n".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


@pytest.mark.parametrize("view", VIEWS)
def test_forms_are_there_and_small(view: type[Picture], run: Run) -> None:
    picture = view(run(talker("hello"), ROUND_TRIPS))
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"image/svg+xml", "text/plain"}
    assert ElementTree.fromstring(bundle["image/svg+xml"]).tag == f"{SVG}svg"
    assert sum(map(len, bundle.values())) < LIMIT


@pytest.mark.parametrize("view", VIEWS)
def test_another_guest_gives_another_picture(view: type[Picture], run: Run) -> None:
    one, other = view(run(talker("hello"), ROUND_TRIPS)), view(run(talker("hello"), ENDLESS))
    assert one.text() != other.text()
    assert one.svg() != other.svg()


@pytest.mark.parametrize("view", VIEWS)
def test_the_same_run_gives_the_same_picture(view: type[Picture], run: Run) -> None:
    assert view(run(ROUND_TRIPS)).svg() == view(run(ROUND_TRIPS)).svg()


@pytest.mark.parametrize("view", VIEWS)
def test_height_stays_while_a_run_goes_on(view: type[Picture], run: Run) -> None:
    xen = run(talker("hello"), ROUND_TRIPS, budget=0)
    picture = view(xen)
    heights = set()
    for _step in range(120):
        xen.run(1)
        heights.add(ElementTree.fromstring(picture.svg()).get("viewBox"))
    assert len(heights) == 1


@pytest.mark.parametrize("view", VIEWS)
def test_machine_without_domains_or_trace(view: type[Picture]) -> None:
    picture = view(Hypervisor(Machine(memory_mib=1)))
    ElementTree.fromstring(picture.svg())
    assert picture.title in picture.text()


def test_machine_view_shows_state_console_and_memory(run: Run) -> None:
    view = MachineView(run(talker("hello, world"), ENDLESS, budget=500))
    first, second = view.rows()
    assert (first.state, first.console, first.on_cpu) == ("ended: poweroff", ("hello, world",), False)
    assert (second.state, second.console, second.on_cpu) == ("running", (), True)
    assert first.memory_kib >= 1024
    assert int(first.instructions) + int(second.instructions) == 500
    assert sum(view.owners().values()) == 8 * 256
    assert "hello, world" in view.text()
    assert "hello, world" in words_in(view)


def test_many_domains_are_cut_short(run: Run) -> None:
    view = MachineView(run(*[ENDLESS] * 10, budget=10, memory_mib=16))
    assert "and 2 more domains" in words_in(view)
    assert len(view.rows()) == 10
    assert len(view.svg()) + len(view.text()) < LIMIT


def test_console_is_harmless(run: Run) -> None:
    view = MachineView(run(talker(r"</text><script>alert(1)</script>]]>\033[31m\001\377")))
    root = ElementTree.fromstring(view.svg())
    assert not list(root.iter(f"{SVG}script"))
    assert r"<script>alert(1)</script>]]>\x1b[31m\x01" in words_in(view)
    assert "\x1b" not in view.text()


def test_names_are_harmless(run: Run) -> None:
    for view in VIEWS:
        picture = view(run(talker("x"), name='"><script>\x07'))
        assert not list(ElementTree.fromstring(picture.svg()).iter(f"{SVG}script"))


@given(st.text(), st.text())
def test_any_text_gives_well_formed_xml(title: str, text: str) -> None:
    canvas = Canvas(title, text)
    canvas.open_event(text, text, selected=True)
    canvas.text(0, 0, text)
    canvas.close()
    root = ElementTree.fromstring(canvas.render(10))
    assert printable(text) in ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]


@given(st.text(), st.integers(1, 40))
def test_clip_keeps_within_length(text: str, length: int) -> None:
    assert len(clip(text, length)) <= length
    assert clip(text, len(text) + length) == text


def test_table_aligns_columns() -> None:
    assert table(("a", "long"), [("xyz", "1")]) == "a    long\n---  ----\nxyz  1"


def test_rings_show_moves_and_the_frame_of_the_trace(run: Run) -> None:
    xen = run(ROUND_TRIPS)
    view = RingsView(xen)
    assert xen.trace is not None
    newest = xen.trace.events(Kind.DELIVER)[-1]
    event, words = view.frames()[0]
    assert event == newest
    assert [word.value for word in reversed(words)] == list(newest.words)
    assert [word.name for word in words] == ["SS", "ESP", "EFLAGS", "CS | mask", "EIP"]
    assert words[-1].address == newest.frame
    for word in words:
        assert f"{word.value:08x}" in words_in(view)
    rings = [(move.from_ring, move.to_ring) for move in last_moves(xen, 40)]
    assert {(3, 0), (0, 1), (1, 0), (0, 3)} == set(rings)
    # Each move starts where the one before ended.
    assert all(before[1] == after[0] for before, after in pairwise(rings))


def test_calls_show_arguments_results_and_code(run: Run) -> None:
    source = talker("hello")
    view = CallTimeline(run(source), sources={0: source})
    step = next(step for step in view.steps() if "console_io" in describe(view._xen, step))
    assert "console_io(0x0, 0x5," in describe(view._xen, step)
    assert describe(view._xen, step).endswith("= 0")
    detail = view.detail(step)
    assert ("result", "0") in detail.values
    here = [line for line in detail.code if line.here]
    assert [line.text for line in here] == ["int 0x82"]
    assert here[0].source == "6: int 0x82"


def test_failed_call_shows_the_errno(run: Run) -> None:
    xen = run("start: mov eax, 60\n int 0x82\n jmp start")
    assert "= -ENOSYS" in CallTimeline(xen).text()


def test_selection_changes_the_detail(run: Run) -> None:
    view = CallTimeline(run(ROUND_TRIPS))
    keys = [step.key for step in view.steps()]
    assert len(set(keys)) == len(keys)
    texts = set()
    for key in keys:
        assert view.select(key)
        texts.add(view.text())
    assert len(texts) == len(keys)
    assert not view.select("no such key")
    assert not MachineView(run(ROUND_TRIPS)).select(keys[0])


def test_count_limits_the_lines(run: Run) -> None:
    xen = run(ROUND_TRIPS)
    assert len(last_steps(xen, 3)) == 3
    assert last_steps(xen, 5)[-3:] == last_steps(xen, 3)


def test_instructions_add_up(run: Run) -> None:
    xen = run(ENDLESS, ROUND_TRIPS, budget=5_000)
    assert sum(instructions_by_domain(xen).values()) == 5_000


def test_registers_mark_the_instruction_at_eip(run: Run) -> None:
    xen = run(ROUND_TRIPS, budget=1_003)
    view = RegistersView(xen, sources={0: ROUND_TRIPS})
    vcpu = view.vcpu()
    assert vcpu is not None
    here = [line for line in view.code(vcpu) if line.here]
    assert [line.address for line in here] == [vcpu.state.eip]
    number, _, text = here[0].source.partition(": ")
    assert ROUND_TRIPS.split("\n")[int(number) - 1].strip() == text
    assert f"{vcpu.state.esp:08x}" in words_in(view)


def test_code_at_an_unmapped_address(run: Run) -> None:
    xen = run(ENDLESS)
    xen.domains[0].vcpus[0].state.eip = 0x10
    assert "No code can be read" in words_in(RegistersView(xen))


def test_bars_compare_with_the_reference() -> None:
    view = BarsView(["call", "fault"], [1.5, 3.0], "floors", reference=[1.0, 2.0])
    assert view.text().splitlines()[-2:] == ["call   1.5     1", "fault  3       2"]
    assert len(list(ElementTree.fromstring(view.svg()).iter(f"{SVG}rect"))) == 1 + 4
    assert [list(bar.y) for bar in view.plotly_figure().data] == [[1.5, 3.0], [1.0, 2.0]]


def test_bars_refuse_unequal_lengths() -> None:
    with pytest.raises(XenlabError, match="as many labels"):
        BarsView(["a"], [1.0, 2.0], "ns")


def test_views_load_nothing_heavy() -> None:
    heavy = ("anywidget", "ipywidgets", "plotly", "capstone")
    program = f"import sys, xenlab.views; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_domain_that_ended_itself_does_not_return(run: Run) -> None:
    xen = run(talker("bye"))
    assert [(move.from_ring, move.to_ring) for move in last_moves(xen, 3)] == [(1, 0), (0, 1), (1, 0)]
    shutdown = [text for step in last_steps(xen, 12) if "sched_op" in (text := describe(xen, step))]
    assert len(shutdown) == 1
    assert "=" not in shutdown[0]


def test_source_lines_come_without_comments_and_once(run: Run) -> None:
    source = "start:   nop  # why not\n jmp start\n .align 16"
    view = RegistersView(run(source, budget=10), sources={0: source})
    vcpu = view.vcpu()
    assert vcpu is not None
    found = [line.source for line in view.code(vcpu) if line.source]
    assert found[:2] == ["1: start: nop", "2: jmp start"]
    assert found.count("2: jmp start") == 1


def test_a_long_line_on_the_console_goes_on_in_the_next(run: Run) -> None:
    text = "".join(f"{number:03}" for number in range(60))
    drawn = words_in(MachineView(run(talker(text))))
    assert text in drawn.replace("\n", "")
    assert text not in drawn
