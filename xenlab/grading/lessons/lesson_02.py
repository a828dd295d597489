"""Exercise 02: the emulation of privileged instructions, by rules that the seed chooses.

Guests execute privileged instructions one after the other; each raises #GP, and the student's part
decides.  A step says which instruction and what has to follow.  Where a step goes wrong, later
ones are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xenlab.abi.numbers import Shutdown
from xenlab.grading.decisions import Unusable, changes_of
from xenlab.grading.guests import EMULATOR, Run, Slot
from xenlab.grading.instances import Choices
from xenlab.grading.lessons.base import Finding, Guest, Plan
from xenlab.hypervisor.trace import Event, Kind
from xenlab.machine.vectors import PROTECTION

Expected = Callable[[Mapping[str, int]], Mapping[str, int]]
_CR4_BITS = (0x1, 0x2, 0x4, 0x8, 0x80, 0x200, 0x400)
_READS_ONE = (0x800, 0x1000, 0x2000, 0x4000)
_MSR_BASE = 0x4000_0000
_REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_KERNEL, _APPLICATION = 1, 3


@dataclass(frozen=True, slots=True)
class Step:
    """One privileged instruction of a guest.

    Attributes:
        instruction: its assembly.
        expected: what changes besides EIP, from the time stamp (``tsc``); None if it has to be refused.
        rule: the rule of the task that says so.
        setup: instructions before it.
        ring: where it is executed; those of ring 3 come last.
    """

    instruction: str
    expected: Expected | None
    rule: str
    setup: str = ""
    ring: int = _KERNEL


class Emulation:
    """A scaled clock, a CR4 with a bit that reads as one, a register of the hypervisor's; all else is refused."""

    number = "02"
    title = "The emulation of privileged instructions"
    slot = Slot(EMULATOR, ("MyEmulator",))
    plan = (
        Plan("02.1", 3, "RDTSC gives the guest its own time"),
        Plan("02.2", 2, "CR4 is read and written as the task says, on the guest's virtual register"),
        Plan("02.3", 1, "RDMSR gives the one register that the task names"),
        Plan("02.4", 4, "what the guest may not have is refused and changes nothing", needs="02.1"),
    )

    def __init__(self, seed: int) -> None:
        choices = Choices(seed, self.number)
        self.factor = choices.pick("factor", (3, 5, 7, 9, 11))
        # Near the end of 64 bits: the time of a guest that runs long enough begins again at 0.
        self.offset = 0xFFFF_FFFF_FFFF_0000 + choices.number("offset", 0, 0x4000)
        self.users = choices.pick("users", (True, False))
        self.allowed = sum(choices.sample("allowed", _CR4_BITS, 3))
        self.forbidden = [bit for bit in _CR4_BITS if not bit & self.allowed]
        self.one = choices.pick("one", _READS_ONE)
        self.msr = _MSR_BASE + choices.number("msr", 0x10, 0xFFF)
        self.value = choices.number("value", 1 << 33, (1 << 64) - 1)
        self.parameters: dict[str, Any] = {
            "factor": self.factor,
            "offset": self.offset,
            "users_may_read_time": self.users,
            "cr4_allowed": self.allowed,
            "cr4_reads_one": self.one,
            "msr": self.msr,
            "msr_value": self.value,
        }

    def task(self) -> str:
        users = "Applications (ring 3) may use it too." if self.users else "Applications (ring 3) are refused."
        return (
            "Your hypervisor's rules:\n\n"
            f"* **RDTSC** (`0F 31`) gives `tsc * {self.factor} + {self.offset:#x}`, low half in EAX, high half in EDX, "
            f"modulo 2^64. {users}\n"
            f"* **MOV r32, CR4** (`0F 20 /4`) gives the virtual `cr4` with bit {self.one:#x} set, "
            "whichever register `r32` is.\n"
            f"* **MOV CR4, r32** (`0F 22 /4`) stores the bits of {self.allowed:#x}. Bit {self.one:#x} in it is "
            "ignored: a kernel writes back what it read. Any other bit set: refused.\n"
            f"* **RDMSR** (`0F 32`) with ECX = {self.msr:#x} gives {self.value:#x}, "
            "low half in EAX, high half in EDX.\n"
            "* The three last ones are for the kernel (ring 1) only. **Every other instruction is refused**, "
            "whatever Xen does with it.\n\n"
            "To refuse is to return `None`: the guest gets #GP and nothing changes. No instruction has a prefix."
        )

    def clock(self, **same: Any) -> Step:
        """A step that reads the time."""
        return Step("rdtsc", self._time, f"EDX:EAX = tsc * {self.factor} + {self.offset:#x}", **same)

    def _time(self, system: Mapping[str, int]) -> Mapping[str, int]:
        return _halves(system["tsc"] * self.factor + self.offset)

    def read_cr4(self, register: str, stored: int) -> Step:
        """A step that reads CR4, of which the guest stored some bits."""
        value = stored & self.allowed | self.one
        return Step(f"mov {register}, cr4", lambda _system: {register: value}, f"{register.upper()} = {value:#x}")

    def write_cr4(self, register: str, value: int) -> Step:
        """A step that writes CR4 with a value that is allowed."""
        stored, setup = value & self.allowed, f"mov {register}, {value:#x}"
        return Step(f"mov cr4, {register}", lambda _system: {"cr4": stored}, f"CR4 = {stored:#x}", setup)

    def read_msr(self) -> Step:
        """A step that reads the register of the task."""
        rule = f"register {self.msr:#x} holds {self.value:#x}"
        return Step("rdmsr", lambda _system: _halves(self.value), rule, f"mov ecx, {self.msr:#x}")

    def refused(self, instruction: str, setup: str = "", ring: int = _KERNEL) -> Step:
        """A step that must not be emulated."""
        return Step(instruction, None, "it must be refused", setup, ring)

    def guests(self) -> list[Guest]:
        scratch = "mov eax, 0x11111111\nmov edx, 0x22222222"
        return [
            self.guest("02.1", "clock", (self.clock(setup=scratch), self.clock(setup="nop\nnop\nmov ebx, 5"))),
            self.guest(
                "02.2", "cr4", (self.read_cr4("eax", 0), self.write_cr4("eax", self.allowed), self.read_cr4("eax", -1))
            ),
            self.guest("02.3", "register", (self.read_msr(),)),
            self.guest(
                "02.4", "greedy", (self.refused("hlt"), self.refused("mov cr4, eax", f"mov eax, {self.forbidden[0]}"))
            ),
        ]

    def guest(self, check: str, name: str, steps: tuple[Step, ...]) -> Guest:
        """A guest that executes ``steps`` in order and then shuts itself down."""
        return Guest(check, name, source(steps), steps)

    def examine(self, answer: dict[str, Any]) -> list[Finding]:
        raise NotImplementedError("the answer of exercise 02 is a part")

    def judge(self, guest: Guest, run: Run, decisions: Sequence[Any]) -> Finding:
        traps = [event for event in run.of(Kind.TRAP) if event.vector == PROTECTION]
        for number, step in enumerate(guest.steps):
            if number >= len(traps):
                return _failed(guest, f"`{step.instruction}` was never reached; {run.end()}")
            problem = _problem(step, traps[number], decisions[number] if number < len(decisions) else None, run)
            if problem:
                where = run.step(traps[number].time, traps[number].eip)
                return _failed(guest, f"first wrong step: {where}\n{problem}")
        if run.domain.shutdown is not Shutdown.POWEROFF:
            return _failed(guest, f"after its last step it should shut down with poweroff; {run.end()}")
        return Finding(guest.check, True)


def _problem(step: Step, trap: Event, decision: Any, run: Run) -> str:
    if not isinstance(decision, dict):
        return run.problem or "the part handed back no decision here"
    try:
        changes = changes_of(decision)
    except Unusable as reason:
        return str(reason)
    before = {**dict(zip(_REGISTERS, trap.registers, strict=True)), "eip": trap.eip}
    if step.expected is None:
        return "" if changes is None else f"{step.rule}; found {_shown(changes)}"
    after = before | dict(step.expected({"tsc": trap.time})) | {"eip": trap.eip + _length(step.instruction)}
    if changes is None:
        return f"{step.rule}; the instruction was refused"
    found = before | changes
    wrong = sorted(name for name in after | found if after.get(name) != found.get(name))
    if not wrong:
        return ""
    name = wrong[0]
    return f"{step.rule}; expected {name} {_hex(after.get(name))}, found {_hex(found.get(name))}"


def _hex(value: int | None) -> str:
    return "unchanged" if value is None else f"{value:#x}"


def _shown(changes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value:#x}" for name, value in changes.items()) or "no change"


def _length(instruction: str) -> int:
    """RDTSC and RDMSR have two bytes, moves to and from CR4 three."""
    return 3 if "cr4" in instruction else 2


def _failed(guest: Guest, message: str) -> Finding:
    return Finding(guest.check, False, f"guest {guest.name!r}: {message}")


def _halves(value: int) -> Mapping[str, int]:
    return {"eax": value & 0xFFFF_FFFF, "edx": value >> 32 & 0xFFFF_FFFF}


def source(steps: Sequence[Step]) -> str:
    """The assembly of a guest that executes ``steps``; its #GP handler goes on behind the instruction."""
    kernel = [step for step in steps if step.ring == _KERNEL]
    user = [step for step in steps if step.ring == _APPLICATION]
    leave = _TO_RING_3 if user else "jmp finish"
    lines = [_PROLOGUE, *_lines(kernel, "k"), leave, _HANDLERS]
    lines += ["user_code: mov eax, FLAT_RING3_DS", "mov ds, eax", *_lines(user, "u"), "int 0x80"]
    lines += ["resume: .long 0", ".skip 256", "user_stack:", ".align 4096", "user_end:"]
    return "\n".join(lines)


def _lines(steps: Sequence[Step], prefix: str) -> list[str]:
    lines = []
    for number, step in enumerate(steps):
        behind = f"{prefix}{number}"
        lines += [step.setup, f"mov dword ptr [resume], offset {behind}", step.instruction, f"{behind}:"]
    return lines


_PROLOGUE = """
start: mov ebx, offset traps
 mov eax, __HYPERVISOR_set_trap_table
 int 0x82
"""
_TO_RING_3 = """
 push FLAT_RING3_SS
 push offset user_stack
 push 2
 push FLAT_RING3_CS
 push offset user_code
 iret
"""
_HANDLERS = """
refused: push eax
 mov eax, [resume]
 mov [esp + 8], eax
 pop eax
 add esp, 4
 iret
finish: mov ebx, SCHEDOP_shutdown
 mov ecx, offset reason
 mov eax, __HYPERVISOR_sched_op
 int 0x82
reason: .long SHUTDOWN_poweroff
traps: .byte 13, 0
 .word FLAT_RING1_CS
 .long refused
 .byte 0x80, 3
 .word FLAT_RING1_CS
 .long finish
 .long 0, 0
.align 4096
user_start:
"""


def lesson(seed: int) -> Emulation:
    """The exercise for a seed."""
    return Emulation(seed)
