"""The machine at a glance: whose memory, who runs, what they said (lesson 00; paper 2.3, 3.3.4).

Frames are dealt out scattered, so memory is shown twice: how much each owner has, as one bar,
and where it lies, as a map in which a cell takes the colour of its most frequent owner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.hypervisor.frames import FREE, XEN
from xenlab.views.canvas import MONO_WIDTH, WIDTH, Canvas, clip, printable
from xenlab.views.palette import domain_colour
from xenlab.views.picture import Picture, table
from xenlab.views.story import instructions_by_domain, symbol

_COLUMNS, _CELLS, _CELL = 141, 1410, 6
_SHOWN, _LINES = 8, 4
_SCREEN_X, _SCREEN_WIDTH = 372, 492
_PAGE_KIB = 4
_FREE_ONLY = {FREE}


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One domain as the picture shows it."""

    domid: int
    name: str
    state: str
    place: str
    instructions: str
    memory_kib: int
    console: tuple[str, ...]
    on_cpu: bool


class MachineView(Picture):
    """Memory by owner, domains with their state and console, and who is on the CPU."""

    title = "The machine at a glance"

    def __init__(self, xen: Hypervisor) -> None:
        self._xen = xen

    def owners(self) -> dict[int, int]:
        """Frames by owner: `XEN`, domain ids in order, `FREE`."""
        count = Counter(self._xen.frames.owner)
        order = [XEN, *sorted(owner for owner in count if owner >= 0), FREE]
        return {owner: count[owner] for owner in order}

    def rows(self) -> list[DomainRow]:
        """What is shown of each domain, in order of their ids."""
        xen, counts, owners = self._xen, instructions_by_domain(self._xen), self.owners()
        return [
            DomainRow(
                domid,
                printable(domain.name),
                _state(xen, domain),
                _place(domain),
                f"{counts[domid]:,}" if xen.trace is not None else "not recorded",
                owners.get(domid, 0) * _PAGE_KIB,
                _tail(domain),
                xen.current in domain.vcpus,
            )
            for domid, domain in sorted(xen.domains.items())
        ]

    def text(self) -> str:
        memory = [(_owner_name(owner), str(count), f"{count * _PAGE_KIB:,}") for owner, count in self.owners().items()]
        domains = [
            (str(row.domid), row.name, row.state, row.place, row.instructions, " / ".join(row.console))
            for row in self.rows()
        ]
        headings = ("domain", "name", "state", "where", "instructions", "console")
        parts = (
            f"{self.title}: {self._summary()}",
            table(("owner", "frames", "KiB"), memory),
            table(headings, domains),
        )
        return "\n\n".join(parts)

    def svg(self) -> str:
        canvas = Canvas(self.title, self._summary())
        bottom = self._memory(canvas, 42)
        rows = self.rows()
        for row in rows[:_SHOWN]:
            bottom = _card(canvas, row, bottom + 10)
        if len(rows) > _SHOWN:
            bottom += 24
            canvas.text(16, bottom, f"and {len(rows) - _SHOWN} more domains", "d")
        if not rows:
            bottom += 30
            canvas.text(16, bottom, "No domain yet.", "d")
        return canvas.render(bottom + 14)

    def _summary(self) -> str:
        current = self._xen.current
        running = f"domain {current.domain.domid} on the CPU" if current else "CPU idle"
        return f"{self._xen.now:,} instructions, {running}"

    def _memory(self, canvas: Canvas, top: float) -> float:
        owners, frames = self.owners(), len(self._xen.frames.owner)
        x = 16.0
        for owner, count in owners.items():
            label = f"{_owner_name(owner)} {_size(count)}"
            canvas.rect(x, top + 1, 12, 12, **_fill(owner), rx="2")
            canvas.text(x + 17, top + 12, label, "s")
            x += 34 + 6.3 * len(label)
            if x > WIDTH - 120:
                break
        _bar(canvas, owners, frames, top + 21)
        cells = _cells(self._xen.frames.owner)
        rows = -(-len(cells) // _COLUMNS)
        canvas.rect(16, top + 43, _COLUMNS * _CELL, rows * _CELL, "soft")
        for owner in sorted(set(cells) - {FREE}):
            canvas.path(_squares(cells, owner, top + 43), fill=domain_colour(owner))
        return top + 43 + rows * _CELL


def _bar(canvas: Canvas, owners: dict[int, int], frames: int, top: float) -> None:
    """One bar of all memory; an owner with little still gets a visible sliver."""
    width = WIDTH - 32 - 4.0 * len(owners)
    x = 16.0
    for owner, count in owners.items():
        wide = 4 + width * count / frames if count else 0
        canvas.rect(x, top, wide, 14, **_fill(owner))
        x += wide


def _cells(owner: Sequence[int]) -> list[int]:
    """The owner to show in each cell: the most frequent one that is not `FREE`."""
    size = max(1, -(-len(owner) // _CELLS))
    cells = []
    for start in range(0, len(owner), size):
        part = owner[start : start + size]
        found = set(part) - _FREE_ONLY
        cells.append(max(sorted(found), key=part.count) if found else FREE)
    return cells


def _squares(cells: list[int], owner: int, top: float) -> str:
    """A path of one square for each cell of ``owner``."""
    parts = []
    for place, found in enumerate(cells):
        if found == owner:
            row, column = divmod(place, _COLUMNS)
            parts.append(f"M{16 + column * _CELL} {top + row * _CELL:g}h5v5h-5z")
    return "".join(parts)


def _card(canvas: Canvas, row: DomainRow, top: float) -> float:
    lines = row.console or ("(nothing on the console yet)",)
    height = 16 + 17 * _LINES  # the same with little to say, so that nothing below moves while the run plays
    canvas.rect(16, top, WIDTH - 32, height, "r", rx="6")
    canvas.chip(26, top + 23, row.domid, f"domain {row.domid}", 74)
    canvas.text(110, top + 23, clip(row.name, 16), "b")
    canvas.text(356, top + 23, f"{'▶ ' if row.on_cpu else ''}{row.state}", "b" if row.on_cpu else "", anchor="end")
    canvas.text(26, top + 45, clip(row.place, 26), "m d s")
    canvas.text(356, top + 45, f"{row.instructions} instructions", "d s", anchor="end")
    canvas.rect(_SCREEN_X, top + 5, _SCREEN_WIDTH - 6, height - 10, "soft", rx="4")
    for place, line in enumerate(_wrapped(lines)):
        canvas.text(_SCREEN_X + 8, top + 21 + 17 * place, line, "m" if row.console else "m d")
    return top + height


def _wrapped(lines: tuple[str, ...]) -> list[str]:
    """The last lines as a screen shows them: a long one goes on in the next."""
    width = int((_SCREEN_WIDTH - 20) / MONO_WIDTH)
    parts = [line[at : at + width] for line in lines for at in range(0, max(len(line), 1), width)]
    return parts[-_LINES:]


def _fill(owner: int) -> dict[str, str]:
    return {"fill": "var(--soft)", "stroke": "var(--rule)"} if owner == FREE else {"fill": domain_colour(owner)}


def _owner_name(owner: int) -> str:
    return {XEN: "hypervisor", FREE: "free"}.get(owner, f"domain {owner}")


def _size(frames: int) -> str:
    kib = frames * _PAGE_KIB
    return f"{kib / 1024:.1f} MiB" if kib >= 1024 else f"{kib} KiB"


def _state(xen: Hypervisor, domain: Domain) -> str:
    if domain.shutdown is not None:
        return "crashed" if domain.crashed else f"ended: {domain.shutdown.name.lower()}"
    if xen.current in domain.vcpus:
        return "running"
    return ", ".join(sorted({vcpu.run_state.name.lower() for vcpu in domain.vcpus if vcpu.initialised}))


def _place(domain: Domain) -> str:
    if not domain.vcpus:
        return ""
    state = domain.vcpus[0].state
    name = symbol(domain, state.eip)
    return f"ring {state.cpl} {state.eip:08x}" + (f" {name}" if name else "")


def _tail(domain: Domain) -> tuple[str, ...]:
    text = domain.console_out[-2000:].decode("utf-8", "backslashreplace")
    return tuple(printable(line) for line in text.rstrip("\n").split("\n")[-_LINES:]) if text else ()
