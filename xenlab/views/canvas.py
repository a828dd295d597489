"""Drawing SVG as text, with everything that came from a guest made harmless.

The problem: names, console bytes and reasons are the guest's, and a view puts them into a page
that runs scripts.

The invariant: text enters a drawing through `printable` and XML escaping only, so the result is
well-formed whatever a guest wrote.  What breaks without it: a console line that contains a
script runs in the reader's notebook.
"""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from xenlab.views.palette import STYLE, domain_colour, domain_dash, ink_on

WIDTH = 880
# A picture file is shown at its own size: a little smaller, to fit beside JupyterLab's open side bar.
_SHOWN_WIDTH = 820
MONO_WIDTH = 7.25  # of one character of 12 px monospaced text, generously


def printable(text: str) -> str:
    """``text`` with every character that is not a printable one as its Python escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def clip(text: str, length: int) -> str:
    """At most ``length`` characters of ``text``, the last one an ellipsis if some are missing."""
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…"


def number(value: float) -> str:
    """A coordinate without needless digits."""
    return f"{value:.1f}".removesuffix(".0")


class Canvas:
    """An SVG drawing under way; coordinates in pixels from the top left.

    Args:
        title: what the picture is, for screen readers and as its heading.
        summary: one line that stands beside the heading.
    """

    def __init__(self, title: str, summary: str = "") -> None:
        self._title = title
        self._parts: list[str] = []
        self.text(16, 27, title, "h")
        if summary:
            self.text(WIDTH - 16, 27, summary, "d", anchor="end")

    def text(self, x: float, y: float, text: str, style: str = "", *, anchor: str = "", colour: str = "") -> None:
        """One line of text with its baseline at ``y``; ``colour`` only for the marks of the palette."""
        extra = f' text-anchor="{anchor}"' if anchor else ""
        extra += f' class="{style}"' if style else ""
        extra += f' style="fill:{colour}"' if colour else ""
        self._parts.append(f'<text x="{number(x)}" y="{number(y)}"{extra}>{escape(printable(text))}</text>')

    def rect(self, x: float, y: float, width: float, height: float, style: str = "", **look: str) -> None:
        """A rectangle; ``look`` holds SVG attributes (fill, stroke, rx) of our own making."""
        box = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        self._parts.append(f"<rect {box}{_attributes(style, look)}/>")

    def circle(self, x: float, y: float, radius: float, style: str = "", **look: str) -> None:
        """A circle."""
        self._parts.append(
            f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"{_attributes(style, look)}/>'
        )

    def path(self, shape: str, style: str = "", **look: str) -> None:
        """A path in SVG's own notation."""
        self._parts.append(f'<path d="{shape}"{_attributes(style, look)}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "r", **look: str) -> None:
        """A straight line."""
        self.path(f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", style, **look)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> None:
        """A line with a filled head at its end."""
        length = max(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5, 1)
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        bx, by = x2 - 8 * ux, y2 - 8 * uy
        self.line(x1, y1, bx, by, "", stroke=colour, stroke_width="2", stroke_dasharray=dash, fill="none")
        points = ((x2, y2), (bx - 4.5 * uy, by + 4.5 * ux), (bx + 4.5 * uy, by - 4.5 * ux))
        self.path("M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) + "z", fill=colour)

    def chip(self, x: float, y: float, domid: int, label: str, width: float) -> None:
        """A domain's coloured label (the hypervisor's for -1); ``y`` is the baseline of its text."""
        colour = domain_colour(domid)
        dash = domain_dash(domid)
        self.rect(x, y - 14, width, 19, fill=colour, rx="4", stroke="var(--ink)" if dash else "", stroke_dasharray=dash)
        self.text(x + width / 2, y, label, f"{ink_on(colour)} b s", anchor="middle")

    def open_event(self, key: str, label: str, *, selected: bool) -> None:
        """Begin a group that can be chosen by mouse and keyboard and explains itself when hovered."""
        name = quoteattr(printable(label))
        style = ' class="on"' if selected else ""
        self._parts.append(
            f'<g data-event={quoteattr(printable(key))} tabindex="0" role="button" aria-label={name}{style}>'
            f"<title>{escape(printable(label))}</title>"
        )

    def close(self) -> None:
        """End the group."""
        self._parts.append("</g>")

    def render(self, height: float) -> str:
        """The finished document."""
        size = f"{WIDTH} {number(height)}"
        label = quoteattr(printable(self._title))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="xl" viewBox="0 0 {size}" width="{_SHOWN_WIDTH}" '
            f'height="{number(height * _SHOWN_WIDTH / WIDTH)}" role="group" aria-label={label} '
            'style="max-width:100%;height:auto">'
            f'<style>{STYLE}</style><rect class="bg" width="{WIDTH}" height="{number(height)}" rx="8"/>'
            + "".join(self._parts)
            + "</svg>"
        )


def _attributes(style: str, look: dict[str, str]) -> str:
    found = f' class="{style}"' if style else ""
    return found + "".join(f' {name.replace("_", "-")}="{value}"' for name, value in look.items() if value)
