"""One colour for each kind of thing, the same in every view.

The problem: a reader who learned in lesson 00 that orange is the hypervisor must not unlearn it
in lesson 05, and one reader in twelve does not see red and green apart.

The invariant: colours are Okabe and Ito's, and no colour stands alone: a label, a symbol or a
dashed outline says the same.  What breaks without it: a picture that only some can read.
Types of frames stand beside their owners in one picture, so their colours are others: of Paul Tol's
muted scheme, which is made for the same eyes.

Paper, ink and rules take the notebook theme's own variables; where there is none (a web page,
a picture file) the values behind the comma hold, so a picture always brings its own background.
"""

from __future__ import annotations

HYPERVISOR = "#D55E00"
KERNEL = "#56B4E9"
APPLICATION = "#F0E442"
DARK, LIGHT = "#111111", "#FFFFFF"
DOMAINS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7")
RING_COLOURS = {0: HYPERVISOR, 1: KERNEL, 2: "var(--soft)", 3: APPLICATION}
RING_NAMES = {0: "hypervisor", 1: "guest kernel", 2: "not used", 3: "application"}
# White is read on these, black on the others.
_DARK_ONES = frozenset((DOMAINS[0], "#AA4499", "#882255", "#CC3311"))
# The outline tells domains with the same colour apart: plain, dashed, dotted.
DASHES = ("", "6 3", "2 2")

# By the number of `FrameType`: fill, and the sign that says the same.
FRAME_COLOURS = ("var(--soft)", "#88CCEE", "#44AA99", "#AA4499", "#44AA99", "#882255", "#DDCC77")
FRAME_SIGNS = ("", "l1", "l2", "l3", "l2", "d", "w")
REFUSED = "#CC3311"

STYLE = """
.xl{--bg:var(--jp-layout-color1,#fff);--ink:var(--jp-content-font-color1,#1b1b1b);
--dim:var(--jp-content-font-color2,#5a5a5a);--soft:var(--jp-layout-color2,#eee);--rule:var(--jp-border-color1,#bdbdbd);
--sans:var(--jp-ui-font-family,system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif);
--mono:var(--jp-code-font-family,Menlo,Consolas,'DejaVu Sans Mono',monospace);font-family:var(--sans);font-size:13px}
@media(prefers-color-scheme:dark){.xl{--bg:var(--jp-layout-color1,#1b1b1b);--ink:var(--jp-content-font-color1,#eee);
--dim:var(--jp-content-font-color2,#b5b5b5);--soft:var(--jp-layout-color2,#333);--rule:var(--jp-border-color1,#5c5c5c)}}
.xl text{fill:var(--ink);white-space:pre}.xl .m{font-family:var(--mono);font-size:12px}.xl .d{fill:var(--dim)}
.xl .h{font-weight:600;font-size:15px}.xl .b{font-weight:600}.xl .s{font-size:11px}
.xl .k{fill:#111111}.xl .w{fill:#ffffff}.xl .r{stroke:var(--rule);fill:none}
.xl .bg{fill:var(--bg)}.xl .soft{fill:var(--soft)}.xl [data-event]{cursor:pointer;outline:none}
.xl .hit{fill:transparent}.xl [data-event]:hover .hit,.xl .on .hit{fill:var(--soft)}
.xl [data-event]:focus-visible .hit{stroke:var(--ink);stroke-width:2}
""".strip().replace("\n", "")


def domain_colour(domid: int) -> str:
    """The colour of a domain; a negative id is the hypervisor's."""
    return HYPERVISOR if domid < 0 else DOMAINS[domid % len(DOMAINS)]


def domain_dash(domid: int) -> str:
    """The outline's dash pattern, which differs between domains of one colour."""
    return DASHES[max(domid, 0) // len(DOMAINS) % len(DASHES)]


def ink_on(colour: str) -> str:
    """CSS class of text that can be read on a colour of this palette; none for one of the theme's own."""
    if colour.startswith("var"):
        return ""
    return "w" if colour in _DARK_ONES else "k"
