"""Exercise 01: classify and prove.

An instruction is *sensitive* if its effect differs between a kernel in ring 0 and the same kernel
in ring 1 on a hypervisor.  Sensitive ones that trap can be emulated; those that do not
trap are what made x86 hard to virtualize (paper 2.1.2).  Which is which is found by running each in both
worlds; no table here says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xenlab.errors import XenlabError
from xenlab.grading.guests import Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons import worlds
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.machine.assembler import Program
from xenlab.machine.disassembler import Instruction, disassemble

CLASSES = ("traps", "silent", "harmless")
_SIZE_LIMIT = 4_000
_ONLY_FORM = "each instruction has one of the three classes; whether it is the right one, the CPU says in grading"
# Sampled by theme, so that each instance has something of each.
_THEMES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (3, ("popf", "pushf", "sahf", "lahf", "cld", "cli", "sti")),
    (2, ("sgdt [buffer]", "sidt [buffer]", "sldt ax", "str ax", "lgdt [buffer]", "lidt [buffer]", "lldt ax", "ltr ax")),
    (2, ("smsw ax", "lmsw ax", "clts", "mov eax, cr0", "mov cr3, eax", "hlt", "rdmsr", "invlpg [buffer]", "wbinvd")),
    (2, ("lar eax, ecx", "lsl eax, ecx", "verr cx", "verw cx", "mov eax, cs", "push cs")),
    (2, ("xchg eax, edx", "bswap eax", "lea eax, [ebx + 8]", "xlatb", "pusha", "mul ecx", "cmpxchg [buffer], ecx")),
)


class ClassifyAndProve:
    """Eleven instructions, each in one of three classes; a program for each silent one."""

    number = "01"
    title = "Classify and prove"
    slot = Slot("", ("classification", "proofs"))
    plan = (
        Plan("01.1", 1, "the instructions that trap in ring 1 are called 'traps', and at most one other is"),
        Plan(
            "01.2",
            2,
            "the instructions that do not trap but differ between rings are called 'silent', and at most one other is",
        ),
        Plan(
            "01.3",
            1,
            "the instructions that do the same in ring 0 and in ring 1 are called 'harmless', and at most one other is",
        ),
        Plan("01.4", 6, "for each silent instruction a program whose EAX tells the two worlds apart by it"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        picked = [
            name for at, (count, theme) in enumerate(_THEMES) for name in choices.sample(f"theme{at}", theme, count)
        ]
        self.instructions: list[str] = choices.sample("order", picked, len(picked))
        self.parameters: dict[str, Any] = {"instructions": list(self.instructions)}

    def task(self) -> str:
        listed = "\n".join(f"    {name}" for name in self.instructions)
        return (
            f"Your {len(self.instructions)} instructions:\n\n{listed}\n\n"
            "1. `classification[instruction]` is `'traps'` if it raises an exception in ring 1; `'silent'` if it "
            "does not, but leaves something else behind in ring 1 than in ring 0; `'harmless'` if both are the same.\n"
            "2. `proofs[instruction]`, for each silent one, is a program that uses it and ends with another value in "
            "EAX in ring 1 than in ring 0. With the instruction replaced by NOPs, the two values must be equal."
        )

    def guests(self) -> list[Guest]:
        return []

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        raise NotImplementedError("exercise 01 has no part to run guests with")

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        """What can be said without giving the classes away: the form, and whether proofs prove."""
        classes, proofs = answer.get("classification"), answer.get("proofs")
        form = self.form(classes)
        findings = [Finding(planned.id, not form, form, _ONLY_FORM) for planned in self.plan[:3]]
        claimed = [name for name in self.instructions if isinstance(classes, dict) and classes.get(name) == "silent"]
        findings += [prove(name, proofs) for name in claimed]
        if not claimed:
            findings.append(Finding("01.4", False, "no instruction is called 'silent', so there is nothing to prove"))
        return findings

    def form(self, classes: Any) -> str:
        """What is wrong with the form of a classification, empty if nothing is."""
        if not isinstance(classes, dict):
            return f"`classification` must be a dict, found {type(classes).__name__}"
        for name in self.instructions:
            if classes.get(name) not in CLASSES:
                return f"classification[{name!r}]: expected one of {CLASSES}, found {classes.get(name)!r:.80}"
        return ""


def prove(name: str, proofs: Any) -> Finding:
    """Whether ``proofs[name]`` tells the two worlds apart by this instruction and nothing else."""
    source = proofs.get(name) if isinstance(proofs, dict) else None
    if not isinstance(source, str) or len(source) > _SIZE_LIMIT:
        return Finding(
            "01.4", False, f"proofs[{name!r}]: expected assembly of at most {_SIZE_LIMIT} characters, found none"
        )
    try:
        built = worlds.program(source)
    except XenlabError as problem:
        return Finding("01.4", False, f"proofs[{name!r}]: {problem}")
    problem_found = _problem(name, built)
    return Finding("01.4", not problem_found, f"proofs[{name!r}]: {problem_found}")


def _problem(name: str, built: Program) -> str:
    uses = {found.address for found in disassemble(built.code, built.base) if _same(found, _shape(name))}
    if not uses:
        return "the program does not contain the instruction"
    native, guest = worlds.native(built), worlds.guest(built)
    for world, outcome in (("ring 0", native), ("ring 1", guest)):
        if outcome.trap:
            at = _instruction(built, outcome.trap_at)
            return f"first wrong step: in {world}, eip {outcome.trap_at:#010x}: {at}: {outcome.trap}"
    values = native.registers["eax"], guest.registers["eax"]
    if values[0] == values[1]:
        return f"EAX ends as {values[0]:#010x} in both worlds; they must differ"
    plain = worlds.without(built, uses)
    if worlds.native(plain).registers["eax"] != worlds.guest(plain).registers["eax"]:
        return f"EAX ends as {values[0]:#010x} and {values[1]:#010x}, but it also differs without the instruction"
    return ""


def _instruction(built: Program, address: int) -> str:
    code = built.code[max(address - built.base, 0) :] if address >= built.base else b""
    return disassemble(code, address, count=1)[0].text if code else "outside the program"


def _shape(name: str) -> Instruction:
    built = worlds.program(name)
    return disassemble(built.code, built.base, count=1)[0]


def _same(one: Instruction, other: Instruction) -> bool:
    if one.mnemonic != other.mnemonic:
        return False
    # MOV and PUSH are many instructions; here the one that reads CS is meant.
    return one.mnemonic not in ("mov", "push") or one.operands.endswith("cs")


def lesson(seed: int) -> ClassifyAndProve:
    """The exercise for a seed."""
    return ClassifyAndProve(seed)
