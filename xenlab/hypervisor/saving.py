"""The whole hypervisor as plain data, and back (for `xenlab.timeline`).

The invariant: after `restore` the hypervisor goes on as it did after `snapshot`, provided that machine
memory has been put back too.  What breaks without it: a step back leads to a past that never was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xenlab.hypervisor.event_bits import SlottedEvents
from xenlab.hypervisor.parts import load_part, save_part
from xenlab.machine.memory import PAGE_SHIFT

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor


def snapshot(xen: Hypervisor) -> dict[str, Any]:
    """Everything but memory and trace."""
    return {
        "time": xen.now,
        "current": xen.current.key if xen.current else None,
        "slice": (xen.slice_end, xen.pick_needed),
        "scheduler": xen.scheduler,
        "parts": {name: save_part(part) for name, part in _parts(xen)},
        "frames": xen.frames.state(),
        "tables": xen.page_tables.state(),
        "shared": xen.shared_pages.state(),
        "domains": dict(xen.domains),
        "states": {domid: domain.snapshot() for domid, domain in xen.domains.items()},
        "vcpus": dict(xen.vcpus),
        "clocks": xen.clocks.state(),
        "timers": xen.timers.state(),
        "inputs": xen.inputs.state(),
    }


def restore(xen: Hypervisor, saved: dict[str, Any]) -> None:
    """Take over what `snapshot` gave."""
    xen.cpu.instructions = saved["time"]
    # In place: the mechanisms hold the dictionary.
    xen.domains.clear()
    xen.domains.update(saved["domains"])
    xen.vcpus = dict(saved["vcpus"])
    for domid, domain in xen.domains.items():
        domain.restore(saved["states"][domid])
    xen.current = None if saved["current"] is None else xen.vcpus[saved["current"]]
    xen.slice_end, xen.pick_needed = saved["slice"]
    xen.scheduler = saved["scheduler"]  # the tools may have put in another one since
    for name, part in _parts(xen):
        load_part(part, saved["parts"][name])
    xen.frames.load(saved["frames"])
    xen.page_tables.load(saved["tables"])
    xen.shared_pages.load(saved["shared"])
    xen.inputs.load(saved["inputs"])
    xen.clocks.load(saved["clocks"])
    xen.timers.load(saved["timers"])
    xen.cpu.deadline = min(xen.slice_end, xen.timers.due)
    if xen.current is not None:
        xen.cpu.load(xen.current.state)


def forget_caches(xen: Hypervisor) -> None:
    """Empty the TLB, and forget code in all pages that are written without telling the CPU each time."""
    xen.guest_memory.forget_written()
    xen.cpu.gates.forget_written()
    for domain in xen.domains.values():
        for mfn in {domain.shared_info_mfn, *(vcpu.info >> PAGE_SHIFT for vcpu in domain.vcpus)}:
            xen.cpu.forget_code(mfn << PAGE_SHIFT, mfn + 1 << PAGE_SHIFT)
    xen.cpu.flush_tlb()


def _parts(xen: Hypervisor) -> list[tuple[str, object]]:
    """The parts that were passed in and may remember something, by name."""
    calls = [(f"hypercall {number}", part) for number, part in sorted(xen.hypercalls.parts.items())]
    slots: list[tuple[str, object]] = [
        ("scheduler", xen.scheduler),
        ("emulator", xen.emulator),
        ("alarms", xen.timers.alarms),
        ("page_types", xen.page_types),
        ("flush_policy", xen.tlb.policy),
    ]
    if isinstance(xen.events, SlottedEvents):
        slots.append(("event_bits", xen.events.part))
    if xen.bounce is not None:
        slots.append(("bounce", xen.bounce))
    return slots + calls
