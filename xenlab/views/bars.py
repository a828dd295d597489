"""Costs as bars beside what the paper measured (lessons 03, 06, 15; paper 4).

The static picture is our own SVG.  A plotly figure carries about 5 MB of JavaScript with each
widget, so `BarsView.plotly_figure` is for the one place in a lesson where zooming helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xenlab.errors import XenlabError
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.palette import DOMAINS, HYPERVISOR
from xenlab.views.picture import Picture, table

_ROW, _BAR_X, _VALUE_WIDTH = 44, 220, 120


class BarsView(Picture):
    """Horizontal bars, each with its reference if there are any.

    Args:
        labels: what each bar is.
        values: its length, in ``unit``, not negative.
        reference: the paper's figures to compare with, one for each bar.

    Raises:
        XenlabError: as many labels, values and references as each other were expected.
    """

    def __init__(
        self,
        labels: Sequence[str],
        values: Sequence[float],
        unit: str,
        *,
        reference: Sequence[float] | None = None,
        title: str = "Cost",
    ) -> None:
        lengths = {len(labels), len(values), len(reference if reference is not None else values)}
        if len(lengths) != 1:
            raise XenlabError(f"bars: expected as many labels as values and references, found {sorted(lengths)}")
        self.title, self.unit = title, unit
        self.labels, self.values = tuple(labels), tuple(values)
        self.reference = None if reference is None else tuple(reference)

    def text(self) -> str:
        rows = [(label, f"{value:,.4g}") for label, value in zip(self.labels, self.values, strict=True)]
        heads: tuple[str, ...] = ("what", self.unit)
        if self.reference is None:
            return f"{self.title}\n\n" + table(heads, rows)
        with_paper = [(*row, f"{value:,.4g}") for row, value in zip(rows, self.reference, strict=True)]
        return f"{self.title}\n\n" + table((*heads, "paper"), with_paper)

    def svg(self) -> str:
        canvas = Canvas(
            self.title, f"in {self.unit}" + ("; filled: here; outlined: the paper" if self.reference else "")
        )
        longest = max((*self.values, *(self.reference or ())), default=0) or 1
        scale = (WIDTH - _BAR_X - _VALUE_WIDTH) / longest
        for place, (label, value) in enumerate(zip(self.labels, self.values, strict=True)):
            top = 48 + _ROW * place
            canvas.text(_BAR_X - 12, top + 18, clip(label, 28), anchor="end")
            _bar(canvas, top, value, scale, 16, fill=DOMAINS[0])
            if self.reference is not None:
                _bar(
                    canvas, top + 19, self.reference[place], scale, 9, stroke=HYPERVISOR, fill="none", stroke_width="2"
                )
        return canvas.render(56 + _ROW * len(self.labels))

    def plotly_figure(self) -> Any:
        """The same as an interactive plotly figure (not a widget: about 5 MB less in the page)."""
        import plotly.graph_objects as plotly

        series = [plotly.Bar(name="here", x=self.labels, y=self.values, marker_color=DOMAINS[0])]
        if self.reference is not None:
            series.append(plotly.Bar(name="paper", x=self.labels, y=self.reference, marker_color=HYPERVISOR))
        return plotly.Figure(series, {"title": {"text": self.title}, "yaxis": {"title": {"text": self.unit}}})


def _bar(canvas: Canvas, top: float, value: float, scale: float, height: float, **look: str) -> None:
    canvas.rect(_BAR_X, top + 2, max(value * scale, 1), height, **look)
    canvas.text(_BAR_X + value * scale + 8, top + 4 + height * 0.72, f"{value:,.4g}", "m" if height > 10 else "m s d")


cost_bars = BarsView
