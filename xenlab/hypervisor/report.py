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

_STACK_WORDS, _CODE_BYTES, _EVENTS = 8, 15, 5


def crash_report(hypervisor: Hypervisor, vcpu: Vcpu, reason: str) -> str:
    """Why, where, with which registers, what was on the stack and what led there."""
    domain, state = vcpu.domain, vcpu.state
    lines = [
        f"domain {domain.domid} ({domain.name}) ended: {reason}",
        f"  at instruction {hypervisor.now}, ring {state.cpl}, eip {state.eip:#010x}{_symbol(vcpu, state.eip)}",
        *_code(hypervisor, vcpu),
        *_registers(vcpu),
        *_stack(hypervisor, vcpu),
        *_events(hypervisor),
    ]
    return "\n".join(lines)


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
    return [
        "  " + "  ".join(values[:4]),
        "  " + "  ".join(values[4:]),
        f"  eflags {state.eflags:08x}  {selectors}",
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
        lines.append(f"    {event.time:>10} {event.kind.name.lower()} domain {event.domain}")
    return lines
