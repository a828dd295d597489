"""What the auditor found, as a table: one button in the lessons, also in those without a picture of page tables."""

from __future__ import annotations

from textwrap import wrap

from xenlab.hypervisor.auditor import audit
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.frames import FREE, TABLES, XEN
from xenlab.views.picture import table

_WIDTH = 86


def audit_report(xen: Hypervisor) -> str:
    """The auditor's verdict on the whole machine as a table: one row for each thing that does not hold."""
    frames = xen.frames
    owners = [owner for owner in frames.owner if owner not in (XEN, FREE)]
    counted = sum(1 for kind in frames.type if kind in TABLES)
    head = f"{len(xen.domains)} domains, {len(owners)} frames, {counted} page tables counted again: "
    found = audit(xen)
    if not found:
        return head + "the auditor is content"
    rows: list[tuple[str, str]] = []
    for invariant in dict.fromkeys(violation.invariant for violation in found):
        rows.append((invariant.name, f"broken: {invariant.value}"))
        for violation in found:
            if violation.invariant is invariant:
                rows += [("", line) for line in wrap(f"- {violation.where}", _WIDTH, subsequent_indent="  ")]
    return f"{head}{len(found)} things do not hold\n\n" + table(
        ("invariant", "what must hold, and what was found"), rows
    )


__all__ = ["audit_report"]
