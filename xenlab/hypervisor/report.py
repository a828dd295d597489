"""The report that stays behind when a guest is ended for a fault of its own (paper 2.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.trace import decode
from xenlab.machine.disassembler import disassemble
from xenlab.machine.engine import GENERAL

if TYPE_CHECKING:
    from xenlab.hypervisor.core import Hypervisor

# The registers at a trap, or a hypercall, are too many for a line.
_LONG = ("registers",)
_STACK_WORDS, _CODE_BYTES, _EVENTS = 8, 15, 8
_LONGEST_VALUE = 60


def crash_report(hypervisor: Hypervisor, vcpu: Vcpu, reason: str) -> str:
    """Why, where, with which registers, what was on the stack and what led there."""
    domain, state = vcpu.domain, vcpu.state
    lines = [
        f"domain {domain.domid} ({domain.name}) ended: {_whose(vcpu)}{reason}",
        f"  at instruction {hypervisor.now}, ring {state.cpl}, eip {state.eip:#010x}{_symbol(vcpu, state.eip)}",
        *_code(hypervisor, vcpu),
        *_registers(vcpu),
        *_stack(hypervisor, vcpu),
        *_events(hypervisor),
    ]
    return "\n".join(lines)


def _whose(vcpu: Vcpu) -> str:
    return f"vCPU {vcpu.number}, " if len(vcpu.domain.vcpus) > 1 else ""


def _symbol(vcpu: Vcpu, address: int) -> str:
    below = [(at, name) for name, at in vcpu.domain.symbols.items() if at <= address]
    if not below:
        return ""
    at, name = max(below)
    return f" ({name}+{address - at:#x})"


def _code(hypervisor: Hypervisor, vcpu: Vcpu) -> list[str]:
    code = hypervisor.guest_memory.read_code(vcpu, _CODE_BYTES)
    if not code:
        return ["  no code can be fetched there"]
    instruction = disassemble(code, vcpu.state.eip, count=1)[0]
    return [f"  instruction: {instruction.text}"]


def _registers(vcpu: Vcpu) -> list[str]:
    state = vcpu.state
    values = [f"{name} {value:08x}" for name, value in zip(GENERAL, state.general(), strict=True)]
    selectors = " ".join(f"{name} {state.segment(name).selector:04x}" for name in ("cs", "ss", "ds", "es", "fs", "gs"))
    control = vcpu.control
    return [
        "  " + "  ".join(values[:4]),
        "  " + "  ".join(values[4:]),
        f"  eflags {state.eflags:08x}  {selectors}",
        f"  cr0 {control['cr0']:08x}  cr2 {control['cr2']:08x}  cr3 {state.cr3:08x}  "
        f"kernel stack {vcpu.kernel_ss:04x}:{vcpu.kernel_esp:08x}",
    ]


def _stack(hypervisor: Hypervisor, vcpu: Vcpu) -> list[str]:
    state = vcpu.state
    words = []
    for number in range(_STACK_WORDS):
        address = state.segment("ss").base + state.esp + 4 * number & 0xFFFF_FFFF
        try:
            words.append(f"{hypervisor.guest_memory.read_word(vcpu, address):08x}")
        except HypercallError:
            break
    return ["  stack: " + (" ".join(words) or f"nothing readable at {state.esp:#010x}")]


def _events(hypervisor: Hypervisor) -> list[str]:
    if hypervisor.trace is None:
        return []
    lines = ["  last events:"]
    for raw in hypervisor.trace.raw()[-_EVENTS:]:
        event = decode(raw)
        whose = f"domain {event.domain}" if event.domain >= 0 else "nobody"
        values = ", ".join(f"{name} {_shown(value)}" for name, value in event.values.items() if name not in _LONG)
        lines.append(f"    {event.time:>10} {event.kind.name.lower()}, {whose}: {values}")
    return lines


def _shown(value: object) -> str:
    """A value of an event in at most `_LONGEST_VALUE` characters; frames are told in words."""
    if isinstance(value, tuple) and all(isinstance(word, int) for word in value):
        text = " ".join(f"{word:08x}" for word in value)
    else:
        text = f"{value:#x}" if isinstance(value, int) and not -10 < value < 10 else str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
