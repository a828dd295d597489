"""Registers, flags and the code around EIP of the vCPU on the CPU (lessons 00 to 02)."""

from __future__ import annotations

from collections.abc import Mapping

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Vcpu
from xenlab.machine.engine import GENERAL
from xenlab.views.canvas import WIDTH, Canvas, clip
from xenlab.views.code import CodeLine, CodeReader
from xenlab.views.palette import RING_COLOURS
from xenlab.views.picture import Picture, table
from xenlab.views.story import flag_names

_SEGMENTS = ("cs", "ss", "ds", "es")
_LINE, _CODE_X = 20, 308


class RegistersView(Picture):
    """The registers of the vCPU that runs, or of the one that ran last, and its code.

    Args:
        sources: assembly source by domain id; its lines are shown beside the instructions.
    """

    title = "Registers and code"

    def __init__(self, xen: Hypervisor, *, sources: Mapping[int, str] | None = None) -> None:
        self._xen, self._code = xen, CodeReader(xen, sources)

    def vcpu(self) -> Vcpu | None:
        """Whose registers are shown: the vCPU on the CPU, else that of the first domain there is."""
        if self._xen.current is not None:
            return self._xen.current
        found = (domain.vcpus[0] for _domid, domain in sorted(self._xen.domains.items()) if domain.vcpus)
        return next(found, None)

    def values(self, vcpu: Vcpu) -> list[tuple[str, int]]:
        """General registers, EIP, EFLAGS and segment selectors, by name."""
        state = vcpu.state
        values = list(zip(GENERAL, state.general(), strict=True))
        values += [("eip", state.eip), ("eflags", state.eflags)]
        return values + [(name, state.segment(name).selector) for name in _SEGMENTS]

    def code(self, vcpu: Vcpu) -> list[CodeLine]:
        """The instructions around EIP."""
        base = vcpu.state.segment("cs").base
        return self._code.around(vcpu.domain.domid, base + vcpu.state.eip & 0xFFFF_FFFF, before=3, after=6)

    def text(self) -> str:
        vcpu = self.vcpu()
        if vcpu is None:
            return f"{self.title}: no domain yet"
        registers = [(name, f"{value:08x}") for name, value in self.values(vcpu)]
        code = [
            (">" if line.here else "", f"{line.address:08x}", line.raw, line.text, line.source or line.label)
            for line in self.code(vcpu)
        ]
        return "\n\n".join(
            (
                f"{self.title}: {self._summary(vcpu)}",
                table(("register", "value"), registers) + f"\nflags: {flag_names(vcpu.state.eflags)}",
                table(("", "address", "bytes", "instruction", "source"), code),
            )
        )

    def svg(self) -> str:
        vcpu = self.vcpu()
        if vcpu is None:
            canvas = Canvas(self.title)
            canvas.text(16, 60, "No domain yet.", "d")
            return canvas.render(80)
        canvas = Canvas(self.title, self._summary(vcpu))
        canvas.rect(16, 42, 276, 10 + 7 * _LINE + 26, "soft", rx="6")
        for place, (name, value) in enumerate(self.values(vcpu)):
            x, y = 28 + 134 * (place // 7), 62 + _LINE * (place % 7)
            canvas.text(x, y, name, "m d")
            canvas.text(x + 56, y, f"{value:08x}", "m")
        canvas.text(28, 62 + _LINE * 7 + 4, "flags " + flag_names(vcpu.state.eflags), "m")
        _draw_code(canvas, self.code(vcpu), RING_COLOURS[vcpu.state.cpl])
        return canvas.render(50 + 10 * _LINE)

    def _summary(self, vcpu: Vcpu) -> str:
        running = "runs" if vcpu is self._xen.current else "does not run"
        return f"{self._xen.now:,} instructions, domain {vcpu.domain.domid} {running}, ring {vcpu.state.cpl}"


def _draw_code(canvas: Canvas, lines: list[CodeLine], colour: str) -> None:
    for place, line in enumerate(lines):
        y = 62 + _LINE * place
        if line.here:
            canvas.rect(_CODE_X - 6, y - 15, WIDTH - _CODE_X - 10, _LINE, fill=colour, rx="3")
        ink = "k" if line.here else ""
        canvas.text(_CODE_X, y, f"{'▶' if line.here else ' '} {line.address:08x}", f"m {ink or 'd'}")
        canvas.text(_CODE_X + 90, y, clip(line.text, 31), f"m b {ink}" if line.here else "m")
        canvas.text(_CODE_X + 322, y, clip(line.source or line.label, 35), f"m s {ink or 'd'}")
    if not lines:
        canvas.text(_CODE_X, 62, "No code can be read at EIP.", "d")
