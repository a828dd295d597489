"""The truth about an instruction, found by running it in ring 0 and in ring 1."""

from __future__ import annotations

from typing import Any

from xenlab.grading.lessons import worlds
from xenlab.grading.lessons.base import Finding
from xenlab.grading.lessons.lesson_01 import CLASSES, ClassifyAndProve, prove
from xenlab.machine.state import IF

_CHECK = dict(zip(CLASSES, ("01.1", "01.2", "01.3"), strict=True))
# What an instruction needs to have an effect: a selector, a byte for the table, flags with IF clear on the stack.
_SETUP = "mov ecx, kernel_cs\nmov eax, 0x5a\nxor edx, edx\npush 2\n"
_SELECTOR = {"verw cx": "kernel_ds"}


def truth(name: str) -> tuple[str, str]:
    """The class of an instruction, and what was seen of it."""
    setup = _SETUP.replace("kernel_cs", _SELECTOR.get(name, "kernel_cs"))
    for before in ("", "call interrupts_off\n"):
        built = worlds.program(f"{before}{setup}probe: {name}")
        guest = worlds.guest(built)
        if guest.trap:
            place = f"eip {guest.trap_at:#010x}: {name}"
            return "traps", f"in ring 1 it raised {guest.trap} at {place}"
        difference = _difference(worlds.native(built), guest, but_flags=IF if before else 0)
        if difference:
            return "silent", f"in ring 1 it raised nothing, and {difference}"
    return "harmless", "it raised nothing in ring 1 and left the same registers, flags and memory as in ring 0"


def _difference(native: worlds.Outcome, guest: worlds.Outcome, but_flags: int) -> str:
    for name, value in native.registers.items():
        if guest.registers[name] != value:
            return f"{name.upper()} was {guest.registers[name]:#010x} after it, in ring 0 {value:#010x}"
    if (native.eflags ^ guest.eflags) & ~but_flags:
        return f"EFLAGS were {guest.eflags:#06x} after it, in ring 0 {native.eflags:#06x}"
    return "it wrote other bytes to memory than in ring 0" if native.memory != guest.memory else ""


def findings(lesson: ClassifyAndProve, answer: dict[str, Any]) -> list[Finding]:
    """Each class right as a set, so that calling all instructions the same earns nothing; and each proof."""
    classes = answer.get("classification")
    given = classes if isinstance(classes, dict) else {}
    known = {name: truth(name) for name in lesson.instructions}
    found = []
    for kind in CLASSES:
        wrong = [name for name, (right, _) in known.items() if (given.get(name) == kind) != (right == kind)]
        said = f"{wrong[0]!r} is called {given.get(wrong[0])!r:.40}: {known[wrong[0]][1]}" if wrong else ""
        found.append(Finding(_CHECK[kind], not wrong, said))
    silent = [name for name, (right, _) in known.items() if right == "silent"]
    return found + [prove(name, answer.get("proofs")) for name in silent]
