"""Views as one live widget with one control bar (`live`), and the still pictures beside it.

The widget is a thin shell: it shows what the views draw and hands commands to `Player`.  It
brings its own script and style; nothing is loaded from a network.

JupyterLab does not restore widgets from a saved notebook.  So displaying a `LiveView` leaves a
second output, the still pictures, which the widget's style hides while the widget is there.
When the reader opens the saved notebook without a kernel, they are what is left, at the last
position where the run stood still.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from xenlab.views.picture import Picture
from xenlab.views.player import ANY_EVENT, SPEEDS, STOPS, Movable, Player
from xenlab.views.sliders import Slider

_HERE = Path(__file__).parent
_STILL = 'class="xl'
_STILL_MARK = 'class="xl xl-still'


class LiveView(anywidget.AnyWidget):
    """One or more views of a timeline that can be stepped, played and scrubbed.

    Args:
        timeline: see `xenlab.timeline.Timeline`.
        views: pictures of ``timeline.hypervisor``.
        sliders: what the reader may set while it runs; see `sliders`.

    Attributes:
        player: the commands, for use from a cell.
    """

    _esm = (_HERE / "live.js").read_text(encoding="utf-8")
    _css = (_HERE / "live.css").read_text(encoding="utf-8")
    frames = traitlets.List(traitlets.Dict()).tag(sync=True)
    position = traitlets.Int().tag(sync=True)
    start = traitlets.Int().tag(sync=True)
    end = traitlets.Int().tag(sync=True)
    playing = traitlets.Bool().tag(sync=True)
    speed = traitlets.Int(100).tag(sync=True)
    speeds = traitlets.List(list(SPEEDS)).tag(sync=True)
    stop = traitlets.Unicode(ANY_EVENT).tag(sync=True)
    stops = traitlets.List(list(STOPS)).tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    answered = traitlets.Int().tag(sync=True)
    sliders = traitlets.List(traitlets.Dict()).tag(sync=True)

    def __init__(self, timeline: Movable, *views: Picture, sliders: Sequence[Slider] = ()) -> None:
        self._views, self._sliders = views, tuple(sliders)
        self._moved: dict[int, tuple[int, int]] = {}
        self._stills: list[Any] = []
        self.player = Player(timeline, self.refresh)
        super().__init__()
        self.on_msg(self._on_message)
        self.observe(self._on_speed, "speed")
        self.observe(self._on_stop, "stop")
        self.refresh()

    def refresh(self) -> None:
        """Draw again what has changed."""
        timeline = self.player.timeline
        with self.hold_sync():
            self.frames = [{"title": view.title, "svg": view.svg(), "text": view.text()} for view in self._views]
            self.position, self.start, self.end = timeline.position, timeline.start, timeline.end
            self.playing, self.status = self.player.playing, self.player.status
            self.sliders = [self._slider_frame(place) for place in range(len(self._sliders))]
        if not self.playing:
            self._update_stills()

    def close(self) -> None:
        """Stop playing and take the widget out of the page."""
        self.player.pause()
        super().close()

    def command(self, order: dict[str, Any]) -> None:
        """Carry out what the control bar asks: ``{"do": name, "n": number, "view": number, "key": text,
        "slider": number}``.

        Unknown orders and values of the wrong type are ignored: they come from a page.
        """
        player, number = self.player, order.get("n", 1)
        if not isinstance(number, int):
            return
        match order.get("do"):
            case "step":
                player.step(number)
            case "back":
                player.back(number)
            case "seek":
                player.seek(number)
            case "play":
                player.play()
            case "pause":
                player.pause()
            case "next":
                player.next_event()
            case "previous":
                player.previous_event()
            case "end":
                player.to_end()
            case "select":
                self._select(order)
            case "slide":
                self._slide(order.get("slider"), number)

    def _select(self, order: dict[str, Any]) -> None:
        place, key = order.get("view"), order.get("key")
        if not isinstance(place, int) or not isinstance(key, str) or not 0 <= place < len(self._views):
            return
        if self._views[place].select(key):
            self.refresh()

    def _slide(self, place: Any, value: int) -> None:
        if isinstance(place, int) and 0 <= place < len(self._sliders):
            now = self.player.timeline.position
            self._moved = {other: moved for other, moved in self._moved.items() if moved[0] <= now}
            self.player.submit(lambda timeline: self._move(place, timeline, value))

    def _move(self, place: int, timeline: Movable, value: int) -> None:
        self._moved[place] = (timeline.position, self._sliders[place].move(timeline, value))

    def _slider_frame(self, place: int) -> dict[str, Any]:
        """What was set at this moment is done when the run goes on, and shown at once."""
        frame, (moment, value) = self._sliders[place].frame(), self._moved.get(place, (-1, 0))
        return {**frame, "value": value} if moment == self.player.timeline.position else frame

    def _on_message(self, _widget: Any, content: Any, _buffers: Any) -> None:
        if not isinstance(content, dict):
            return
        try:
            self.command(content)
        finally:
            # The page sends the next order only when this one is answered.
            if isinstance(content.get("id"), int):
                self.answered = content["id"]

    def _on_speed(self, change: Any) -> None:
        if change["new"] in SPEEDS:
            self.player.speed = change["new"]

    def _on_stop(self, change: Any) -> None:
        if change["new"] in STOPS:
            self.player.stop = change["new"]

    def _ipython_display_(self) -> None:
        from IPython import display as ipython

        display: Any = ipython.display
        bundle: Any = self._repr_mimebundle_() or {}
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        data["text/plain"] = "A live view: run this cell to step through the run yourself."
        display(data, raw=True)
        self._stills = [display(_still(frame), raw=True, display_id=True) for frame in self.frames]

    def _update_stills(self) -> None:
        for handle, frame in zip(self._stills, self.frames, strict=False):
            handle.update(_still(frame), raw=True)


def _still(frame: dict[str, str]) -> dict[str, str]:
    """A view's picture, marked so that the widget can hide it, and its table."""
    return {"image/svg+xml": frame["svg"].replace(_STILL, _STILL_MARK, 1), "text/plain": frame["text"]}
