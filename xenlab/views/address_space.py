"""A domain's whole address space on one page (lesson 04; paper 2.1.1).

The problem: four gigabytes to scale, and a guest of one megabyte, which is thinner than a hair there.  So there
are three scales: all of it in 64 cells of 64 MiB; below, the pages of the guest, and the last cell, which is the
hypervisor's; and then a line for each area, whatever its size.

Colour says for whom a page is: kernel, application, hypervisor.  A full box can be written by
the guest, a hollow one only read.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FrameType
from xenlab.hypervisor.layout import start_of
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.pages import Area, Page, areas, flag_text, owner_name, pfn_text
from xenlab.views.palette import APPLICATION, HYPERVISOR, KERNEL
from xenlab.views.picture import Picture, table

_CELLS, _CELL_BYTES = 64, 64 << 20
_LEFT, _RIGHT = 16.0, WIDTH - 16.0
_ZOOM_LEFT, _ZOOM_GAP = 424.0, 24.0
_STRIP, _ZOOM, _ROWS_TOP, _ROW, _GAP_ROW = 66.0, 118.0, 174.0, 21.0, 17.0
_DETAIL_X = 566.0
# As high as it becomes in the lessons, so that nothing below moves while the run plays.
_LEAST_HEIGHT = 610.0
_FRAMES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class _Zoom:
    """A part of the address space drawn large: from where to where, and where in the picture."""

    start: int
    end: int
    left: float
    right: float

    def x(self, address: int) -> float:
        """Where an address lies."""
        return self.left + (self.right - self.left) * (address - self.start) / (self.end - self.start)


class AddressSpaceView(Picture):
    """What is mapped where in a domain's address space, for whom, and who may write.

    Args:
        domid: which domain; if None, the one on the CPU, else the first there is.

    Attributes:
        selected: first linear address of the chosen area, as text.
    """

    title = "Address space"

    def __init__(self, xen: Hypervisor, domid: int | None = None) -> None:
        self._xen, self._domid = xen, domid
        self.selected: str | None = None

    def domain(self) -> Domain | None:
        """Whose address space is shown."""
        if self._domid is not None:
            return self._xen.domains.get(self._domid)
        if self._xen.current is not None:
            return self._xen.current.domain
        return next((domain for _domid, domain in sorted(self._xen.domains.items()) if domain.vcpus), None)

    def areas(self) -> list[Area]:
        """The areas and gaps from 0 to 4 GiB; empty without such a domain."""
        domain = self.domain()
        return areas(self._xen, domain) if domain and domain.vcpus else []

    def select(self, key: str) -> bool:
        if not any(_key(area) == key for area in self.areas() if area.pages):
            return False
        self.selected = key
        return True

    def chosen(self, found: list[Area]) -> Area | None:
        """The selected area; the first one that is mapped, if none is or it has gone."""
        mapped = [area for area in found if area.pages]
        return next((area for area in mapped if _key(area) == self.selected), mapped[0] if mapped else None)

    def text(self) -> str:
        domain, found = self.domain(), self.areas()
        if domain is None or not found:
            return f"{self.title}: no domain yet"
        rows = [
            (f"{area.start:#010x}", f"{area.end - 1:#010x}", size(area), area.name or "not mapped", area.rights)
            for area in found
        ]
        parts = [f"{self.title}: {_summary(domain, found)}", table(("from", "to", "size", "what", "guest may"), rows)]
        chosen = self.chosen(found)
        if chosen is not None:
            parts.append(table(("chosen", chosen.name), self.detail(chosen)))
        return "\n\n".join(parts)

    def detail(self, area: Area) -> list[tuple[str, str]]:
        """An area's first pages: names and values."""
        first = area.pages[0]
        rows = [
            ("from", f"{area.start:#010x}"),
            ("pages", f"{len(area.pages)}"),
            ("guest may", area.rights),
            ("l1 entry", f"{first.entry:#x}"),
            ("flags", flag_text(first.entry)),
            ("frame", f"{first.mfn:#x}"),
        ]
        if first.mfn < self._xen.frames.count:
            rows += self._frame(first)
        frames = " ".join(f"{page.mfn:x}" for page in area.pages[:_FRAMES_SHOWN])
        return [*rows, ("all frames", frames + (" …" if len(area.pages) > _FRAMES_SHOWN else ""))]

    def _frame(self, page: Page) -> list[tuple[str, str]]:
        frames = self._xen.frames
        kind = FrameType(frames.type[page.mfn]).name.lower().replace("_", " ")
        return [
            ("its pfn (M2P)", pfn_text(frames.m2p[page.mfn])),
            ("owner", owner_name(frames.owner[page.mfn])),
            ("type", f"{kind}, used so {frames.uses[page.mfn]} ×"),
            ("references", str(frames.refs[page.mfn])),
        ]

    def svg(self) -> str:
        domain, found = self.domain(), self.areas()
        if domain is None or not found:
            canvas = Canvas(self.title)
            canvas.text(16, 60, "No domain yet.", "d")
            return canvas.render(80)
        canvas = Canvas(self.title, _summary(domain, found))
        _draw_legend(canvas)
        _draw_whole(canvas, domain, found)
        for zoom in _zooms(domain, found):
            _draw_zoom(canvas, domain, zoom, found)
        bottom = self._draw_rows(canvas, domain, found)
        return canvas.render(max(bottom + 12, _LEAST_HEIGHT))

    def _draw_rows(self, canvas: Canvas, domain: Domain, found: list[Area]) -> float:
        chosen, y = self.chosen(found), _ROWS_TOP
        for area in found:
            if area.pages:
                _draw_row(canvas, domain, area, y, selected=area is chosen)
                y += _ROW
            else:
                canvas.text(_LEFT + 118, y + 12, f"⋮ {size(area)} not mapped", "d s")
                y += _GAP_ROW
        if chosen is not None:
            self._draw_detail(canvas, domain, chosen)
        return y

    def _draw_detail(self, canvas: Canvas, domain: Domain, area: Area) -> None:
        rows = self.detail(area)
        canvas.rect(_DETAIL_X, _ROWS_TOP, _RIGHT - _DETAIL_X, 34 + 19 * len(rows), "soft", rx="6")
        _box(canvas, domain, area.pages[0], _DETAIL_X + 12, _ROWS_TOP + 9)
        canvas.text(_DETAIL_X + 32, _ROWS_TOP + 20, area.name, "b")
        for place, (name, value) in enumerate(rows):
            y = _ROWS_TOP + 43 + 19 * place
            canvas.text(_DETAIL_X + 12, y, name, "d s")
            canvas.text(_DETAIL_X + 104, y, clip(value, 26), "m")


def _summary(domain: Domain, found: list[Area]) -> str:
    mine = [page for area in found for page in area.pages if page.address < start_of(domain.mode)]
    writable, user = sum(page.writable for page in mine), sum(page.user for page in mine)
    return f"domain {domain.domid}, {domain.mode.name}: {len(mine)} pages, {writable} writable, {user} for ring 3"


def size(area: Area) -> str:
    """How large an area is."""
    length = area.end - area.start
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if length >= 1 << shift:
            return f"{length / (1 << shift):.3g} {unit}"
    return f"{length >> 10} KiB"


def _key(area: Area) -> str:
    return f"{area.start:#x}"


def _colour(domain: Domain, page: Page) -> str:
    if page.address >= start_of(domain.mode):
        return HYPERVISOR
    return APPLICATION if page.user else KERNEL


def _look(colour: str, *, full: bool) -> dict[str, str]:
    return {"fill": colour if full else "var(--bg)", "stroke": colour, "stroke_width": "2"}


def _box(canvas: Canvas, domain: Domain, page: Page, x: float, y: float) -> None:
    canvas.rect(x, y, 12, 12, **_look(_colour(domain, page), full=page.writable), rx="2")


def _draw_legend(canvas: Canvas) -> None:
    x = _LEFT
    for colour, name in ((KERNEL, "guest kernel"), (APPLICATION, "ring 3 too"), (HYPERVISOR, "hypervisor")):
        canvas.rect(x, 41, 12, 12, **_look(colour, full=True), rx="2")
        canvas.text(x + 18, 51, name, "s")
        x += 34 + 6.3 * len(name)
    canvas.rect(x, 41, 12, 12, **_look("var(--ink)", full=False), rx="2")
    canvas.text(x + 18, 51, "hollow: the guest may only read", "s")


def _draw_whole(canvas: Canvas, domain: Domain, found: list[Area]) -> None:
    """4 GiB in cells of 64 MiB; a cell has the colour of what is in it."""
    wide = (_RIGHT - _LEFT) / _CELLS
    colours: dict[int, str] = {}
    for area in found:
        for page in area.pages:
            colours[page.address // _CELL_BYTES] = _colour(domain, page)
    canvas.rect(_LEFT, _STRIP, _RIGHT - _LEFT, 22, "soft")
    for cell in range(_CELLS):
        if cell in colours:
            canvas.rect(_LEFT + cell * wide, _STRIP, wide, 22, fill=colours[cell])
        if cell:
            x = _LEFT + cell * wide
            canvas.line(x, _STRIP, x, _STRIP + 22, "", stroke="var(--rule)" if cell % 16 else "var(--ink)")
    border = _LEFT + wide * start_of(domain.mode) / _CELL_BYTES
    canvas.rect(border, _STRIP, _RIGHT - border, 22, fill="none", stroke=HYPERVISOR, stroke_width="2")
    for quarter in range(1, 4):
        canvas.text(_LEFT + quarter * 16 * wide - 4, _STRIP + 15, f"{quarter} GiB", "d s", anchor="end")
    canvas.text(_LEFT + 4, _STRIP + 15, "0", "d s")


def _zooms(domain: Domain, found: list[Area]) -> list[_Zoom]:
    """The guest's pages from the first to the last, if they are near each other, and the hypervisor's range."""
    border = start_of(domain.mode)
    zooms = [_Zoom(border, 1 << 32, _LEFT + _ZOOM_LEFT + _ZOOM_GAP, _RIGHT)]
    mine = [area for area in found if area.pages and area.start < border]
    if mine:
        # What is mapped far away from the builder's area has its line below, and its cell above.
        near = max(mine, key=lambda area: len(area.pages)).start // _CELL_BYTES
        close = [area for area in mine if area.start // _CELL_BYTES == near]
        zooms.insert(0, _Zoom(close[0].start, close[-1].end, _LEFT, _LEFT + _ZOOM_LEFT))
    return zooms


def _draw_zoom(canvas: Canvas, domain: Domain, zoom: _Zoom, found: list[Area]) -> None:
    wide = (_RIGHT - _LEFT) / _CELLS
    above = [_LEFT + wide * address / _CELL_BYTES for address in (zoom.start, zoom.end)]
    shape = f"M{above[0]:.1f} {_STRIP + 22}L{max(above[1], above[0] + 1):.1f} {_STRIP + 22}"
    canvas.path(f"{shape}L{zoom.right:.1f} {_ZOOM}L{zoom.left:.1f} {_ZOOM}z", "soft", opacity="0.7")
    canvas.rect(zoom.left, _ZOOM, zoom.right - zoom.left, 22, "soft")
    for area in found:
        if area.pages and zoom.start <= area.start < zoom.end:
            left, right = zoom.x(area.start), zoom.x(area.end)
            look = _look(_colour(domain, area.pages[0]), full=area.pages[0].writable)
            canvas.rect(left + 1, _ZOOM + 1, max(right - left - 2, 1), 20, **look)
    canvas.text(zoom.left, _ZOOM + 38, f"{zoom.start:08x}", "m s")
    length = size(Area(zoom.start, zoom.end, ""))
    canvas.text((zoom.left + zoom.right) / 2, _ZOOM + 38, length, "d s", anchor="middle")
    canvas.text(zoom.right, _ZOOM + 38, f"{zoom.end - 1:08x}", "m s", anchor="end")


def _draw_row(canvas: Canvas, domain: Domain, area: Area, top: float, *, selected: bool) -> None:
    label = f"{area.start:#010x} {area.name}, {size(area)}, guest may {area.rights}"
    canvas.open_event(_key(area), label, selected=selected)
    canvas.rect(8, top - 2, _DETAIL_X - 16, _ROW, "hit", rx="4")
    y = top + 13
    canvas.text(_LEFT, y, f"{area.start:08x}", "m")
    _box(canvas, domain, area.pages[0], _LEFT + 92, y - 10)
    canvas.text(_LEFT + 118, y, clip(area.name, 26), "b")
    canvas.text(_LEFT + 372, y, size(area), "d", anchor="end")
    canvas.text(_LEFT + 392, y, area.rights, "s" if area.pages[0].writable else "s d")
    canvas.close()


__all__ = ["AddressSpaceView", "size"]
