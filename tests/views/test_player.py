"""The control bar's Python side, driven without a browser."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable

import pytest
from view_guests import ENDLESS, talker

from xenlab import Hypervisor, Machine, boot
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.timeline import Timeline
from xenlab.views import CallTimeline, MachineView, live
from xenlab.views.player import ANY_EVENT, IDLE, NO_EARLIER, Player
from xenlab.views.widget import LiveView


def timeline_of(source: str) -> Timeline:
    xen = Hypervisor(Machine(memory_mib=4), trace=Trace())
    boot(xen, source)
    return Timeline(xen)


def in_loop(play: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(play(), 60)

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
def player(timeline: Timeline) -> Player:
    return Player(timeline, lambda: None)


def test_steps_and_steps_back(player: Player, timeline: Timeline) -> None:
    player.step(40)
    digest = timeline.machine_hash()
    player.step(3)
    assert timeline.position == 43
    player.back(3)
    assert (timeline.position, timeline.machine_hash()) == (40, digest)
    player.back(1_000)
    assert timeline.position == timeline.start


def test_each_movement_draws(timeline: Timeline) -> None:
    drawn = []
    player = Player(timeline, lambda: drawn.append(timeline.position))
    player.step(5)
    player.seek(2)
    assert drawn == [5, 2]


def test_play_and_pause(player: Player, timeline: Timeline) -> None:
    async def play() -> None:
        player.speed = 1_000_000
        player.play()
        await until(lambda: timeline.position > 5_000)
        player.pause()
        assert not player.playing
        reached = timeline.position
        await asyncio.sleep(0.2)
        assert timeline.position == reached

    in_loop(play)


def test_other_work_goes_on_while_an_endless_guest_plays() -> None:
    timeline = timeline_of(ENDLESS)
    player = Player(timeline, lambda: None)

    async def play() -> None:
        player.speed = 1_000_000
        player.play()
        others = 0
        while timeline.position < 50_000:
            await asyncio.sleep(0)
            others += 1
        player.pause()
        assert others > 50_000 / player._piece

    in_loop(play)


def test_playing_ends_with_the_guest() -> None:
    timeline = timeline_of(talker("bye"))
    player = Player(timeline, lambda: None)

    async def play() -> None:
        player.to_end()
        await until(lambda: not player.playing)

    in_loop(play)
    assert timeline.hypervisor.domains[0].ended
    assert player.status == IDLE


def test_events_forward_and_back(player: Player, timeline: Timeline) -> None:
    visited = []

    async def play() -> None:
        for _event in range(8):
            player.next_event()
            await until(lambda: not player.playing)
            visited.append(timeline.position)

    in_loop(play)
    assert visited == sorted(set(visited))
    times = {event.time for event in timeline.events()}
    assert set(visited[1:]) <= times
    player.previous_event()
    assert timeline.position in times
    assert timeline.position < visited[-1]


def test_the_event_buttons_stop_at_what_was_chosen(player: Player, timeline: Timeline) -> None:
    places = []

    async def play() -> None:
        player.stop = "exceptions"
        for _event in range(3):
            player.next_event()
            await until(lambda: not player.playing)
            places.append((timeline.position, player.status))

    in_loop(play)
    meant = [event.time for event in timeline.events() if event.kind is Kind.TRAP]
    assert places == [(time, f"trap of domain 0 at {time}") for time in meant]
    player.stop = "hypercalls"
    calls = [event.time for event in timeline.events() if event.kind is Kind.HYPERCALL]
    for time in calls[:-4:-1]:
        player.previous_event()
        assert (timeline.position, player.status) == (time, f"hypercall of domain 0 at {time}")
    player.stop = "console"
    player.previous_event()
    assert (timeline.position, player.status) == (calls[-3], NO_EARLIER)


def test_an_event_that_never_comes_ends_with_the_guest() -> None:
    timeline = timeline_of(talker("bye"))
    player = Player(timeline, lambda: None)

    async def play() -> None:
        player.stop = "page tables"
        player.next_event()
        await until(lambda: not player.playing)

    in_loop(play)
    assert (player.status, timeline.hypervisor.domains[0].ended) == (IDLE, True)


def test_what_is_due_at_a_time_has_happened_behind_it() -> None:
    xen = Hypervisor(Machine(memory_mib=4), scheduler=RoundRobin(100), trace=Trace())
    for _guest in range(2):
        boot(xen, ENDLESS)
    timeline = Timeline(xen)
    player = Player(timeline, lambda: None)
    player.stop = "switches"

    async def play() -> None:
        for _event in range(3):
            player.next_event()
            await until(lambda: not player.playing)

    in_loop(play)
    assert (timeline.position, timeline.last_events(2)[0].kind) == (201, Kind.SWITCH)
    player.previous_event()
    assert (timeline.position, timeline.hypervisor.current.domid) == (101, 1)


def test_event_after_a_long_silence() -> None:
    source = "start: mov ecx, 30000\nwait: loop wait\n int 0x82\n jmp start"
    timeline = timeline_of(source)
    player = Player(timeline, lambda: None)

    async def play() -> None:
        for _event in range(2):
            player.next_event()
            await until(lambda: not player.playing)

    in_loop(play)
    assert timeline.position == 30_002


def test_a_new_command_takes_over(player: Player, timeline: Timeline) -> None:
    async def play() -> None:
        player.play()
        player.step(7)
        assert not player.playing
        assert timeline.position == 7
        await asyncio.sleep(0.1)
        assert timeline.position == 7

    in_loop(play)


def test_interrupt_pauses_and_leaves_a_usable_machine() -> None:
    timeline = timeline_of(ENDLESS)
    drawn = threading.Event()

    def interrupt_once() -> None:
        if timeline.position > 1_000 and not drawn.is_set():
            drawn.set()
            signal.raise_signal(signal.SIGINT)

    player = Player(timeline, interrupt_once)

    async def play() -> None:
        player.speed = 1_000_000
        player.play()
        await until(lambda: not player.playing)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # asyncio.run would turn the signal into a cancelled main task; the kernel's loop does not.
        loop = asyncio.new_event_loop()
        loop.run_until_complete(asyncio.wait_for(play(), 60))
        loop.close()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert player.status == "Interrupted."
    before = timeline.position
    player.step(5)
    assert timeline.position == before + 5


def test_errors_become_the_status(player: Player, timeline: Timeline) -> None:
    player.step(5)
    timeline.hypervisor.run(5)  # past the timeline's back
    player.step(1)
    assert "timeline" in player.status


@pytest.fixture
def view(timeline: Timeline) -> LiveView:
    return live(timeline, MachineView(timeline.hypervisor), CallTimeline(timeline.hypervisor))


def test_live_view_draws_what_the_views_draw(view: LiveView, timeline: Timeline) -> None:
    before = view.frames
    view.command({"do": "step", "n": 100})
    assert view.frames != before
    assert view.frames[1]["text"] == CallTimeline(timeline.hypervisor).text()
    assert (view.position, view.end) == (100, 100)
    view.command({"do": "back", "n": 100})
    assert view.frames == before
    assert (view.position, view.end) == (0, 100)


def test_live_view_selects_events(view: LiveView, timeline: Timeline) -> None:
    view.command({"do": "step", "n": 100})
    key = CallTimeline(timeline.hypervisor).steps()[0].key
    before = view.frames
    view.command({"do": "select", "view": 1, "key": key})
    assert view.frames[0] == before[0]
    assert view.frames[1] != before[1]


def test_live_view_answers_and_survives_nonsense(view: LiveView) -> None:
    for content in (
        {"do": "step", "n": "x", "id": 4},
        {"do": "select", "view": 9, "key": "1.0", "id": 5},
        {"id": 6},
        7,
    ):
        view._on_message(view, content, [])
    view._on_message(view, {"do": "select", "view": 1, "key": ["x"], "id": 7}, [])
    assert (view.answered, view.position) == (7, 0)


def test_live_view_speed_comes_from_the_list(view: LiveView) -> None:
    view.speed = 10_000
    assert view.player.speed == 10_000
    view.speed = 12_345
    assert view.player.speed == 10_000


def test_live_view_event_buttons_stop_at_what_is_chosen(view: LiveView, timeline: Timeline) -> None:
    view.command({"do": "step", "n": 150})
    view.stop = "hypercalls"
    assert view.stops[0] == ANY_EVENT
    assert view.player.stop in view.stops
    view.command({"do": "previous"})
    last = [event for event in timeline.all_events() if event.kind is Kind.HYPERCALL and event.time < 150][-1]
    assert (view.position, view.status) == (last.time, f"hypercall of domain 0 at {last.time}")
    assert view.frames[1]["text"] == CallTimeline(timeline.hypervisor).text()
    assert str(last.time) in view.frames[1]["text"].split()
    view.stop = "nonsense"
    assert view.player.stop == "hypercalls"


def test_displaying_leaves_stills(view: LiveView, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    updated: list[dict[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            updated.append(data)

    def display(data: dict[str, str], *, raw: bool, display_id: bool = False) -> Handle:
        shown.append(data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    view._ipython_display_()
    widget, *stills = shown
    assert "application/vnd.jupyter.widget-view+json" in widget
    assert [set(still) for still in stills] == [{"image/svg+xml", "text/plain"}] * 2
    assert all("xl-still" in still["image/svg+xml"] for still in stills)
    assert sum(len(part) for still in stills for part in still.values()) < 60_000
    view.command({"do": "step", "n": 50})
    assert [still["text/plain"] for still in updated[-2:]] == [frame["text"] for frame in view.frames]
