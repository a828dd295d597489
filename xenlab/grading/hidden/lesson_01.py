"""The truth about an instruction, found by running it in ring 0 and in ring 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from xenlab.grading.lessons import worlds
from xenlab.grading.lessons.base import Finding
from xenlab.grading.lessons.lesson_01 import CLASSES, ClassifyAndProve, prove
from xenlab.machine.state import IF

_CHECK = dict(zip(CLASSES, ("01.1", "01.2", "01.3"), strict=True))
_OTHERS = 1
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
    """Each class, and each proof."""
    classes = answer.get("classification")
    given = classes if isinstance(classes, dict) else {}
    known = {name: truth(name) for name in lesson.instructions}
    silent = [name for name, (right, _) in known.items() if right == "silent"]
    proofs = [_proved(name, given.get(name), answer.get("proofs")) for name in silent]
    return [_class(kind, known, given) for kind in CLASSES] + proofs


def _class(kind: str, known: dict[str, tuple[str, str]], given: dict[str, Any]) -> Finding:
    """One class.

    A wrong word costs in the class where the instruction belongs.  It costs in the class that was named only
    together with a second one, so that calling all instructions the same earns nothing.
    """
    missed = [name for name, (right, _) in known.items() if right == kind and given.get(name) != kind]
    others = [name for name, (right, _) in known.items() if right != kind and given.get(name) == kind]
    if missed:
        name = missed[0]
        return Finding(_CHECK[kind], False, f"{name!r} is called {given.get(name)!r:.40}: {known[name][1]}")
    said = f"{len(others)} others are called {kind!r} too, like {others[0]!r}: {known[others[0]][1]}" if others else ""
    return Finding(_CHECK[kind], len(others) <= _OTHERS, said)


def _proved(name: str, called: Any, proofs: Any) -> Finding:
    """The proof of a silent instruction; says why it is asked for where the class was wrong too."""
    finding = prove(name, proofs)
    if finding.passed or called == "silent":
        return finding
    why = "it is silent, and each silent instruction's proof counts by itself, besides its class in 01.2"
    return replace(finding, message=f"{finding.message}\n{why}")
