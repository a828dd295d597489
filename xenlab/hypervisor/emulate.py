"""Privileged instructions of the guest's kernel, carried out for it (paper 2.1.2).

The problem: a kernel in ring 1 still contains instructions that only ring 0 may execute.
They fault, and the hypervisor either does for the guest what the instruction was meant to
do, on the guest's virtual registers, or hands the fault to the guest.

Which are carried out is what Xen carries out for paravirtualized kernels: CLTS, WBINVD, moves
to and from control and debug registers (`debug_registers`), RDMSR and WRMSR (`model_registers`), RDTSC, and CLI
and STI where the guest has I/O privilege; instructions for ports stand in `port_io`.  Everything else (HLT, LGDT,
LIDT, LMSW, INVLPG, INVD, RDPMC ...) is #GP to the guest, whose port to Xen replaced it by a hypercall.

The invariant: an emulated instruction changes only the guest's own virtual state, and one
that asks for something the guest may not have changes nothing.  What breaks without it: a
guest turns off write protection for everyone by a move to CR0.

The part takes and returns plain values, so a student's fits the same slot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from xenlab.abi.numbers import Errno
from xenlab.errors import HypercallError, XenlabError
from xenlab.hypervisor.debug_registers import register_name, written
from xenlab.hypervisor.domain import VCPUS_PER_DOMAIN, Vcpu
from xenlab.hypervisor.model_registers import read_register, write_register
from xenlab.hypervisor.parts import is_mapping, wrong
from xenlab.hypervisor.physdev import level_for
from xenlab.machine.paging import PAE
from xenlab.machine.vectors import INVALID_OPCODE

Values = Mapping[str, int]

GENERAL = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
CR0_TS = 0x8
# CR4 bits that are the guest's own: whether applications may read the time stamp, and debug extensions.  The others
# that it sees are the machine's, FXSAVE, exceptions of SSE and PAE, and a write of them has no effect.
CR4_TIME_FOR_KERNELS = 0x4
CR4_OWN = CR4_TIME_FOR_KERNELS | 0x8
CR4_MACHINE, CR4_PAE = 0x600, 0x20
_LOCK, _OPERAND_SIZE, _SEGMENT_PREFIXES = 0xF0, 0x66, (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)


class Emulator(Protocol):
    """The slot for emulation of privileged instructions."""

    def emulate(self, code: bytes, registers: Values, system: Values) -> Values | None:
        """Decide about one instruction that raised #GP.

        Args:
            code: up to 15 bytes, beginning with the instruction.
            registers: the eight general registers, ``eip`` and ``eflags``.
            system: ``ring`` (1 kernel, 3 application), ``iopl`` (the outermost ring with I/O privilege), ``tsc``
                (64 bits), ``vcpu`` (its number in the domain), ``machine_cr4`` (bits that are set in CR4 whatever
                the guest does), and the virtual ``cr0 cr2 cr3 cr4 dr0 dr1 dr2 dr3 dr6 dr7``.

        Returns:
            What changes, by name, among registers and virtual control and debug registers,
            with ``eip`` behind the instruction; or None to hand #GP to the guest.  A change of
            ``cr3`` loads that base pointer, as the hypercall for it does; where the hypercall
            would refuse, nothing changes, and the guest is handed #GP.  Two names are orders: the
            value of ``hypercall_page`` is the machine address of a page to be filled with the stubs, and that of
            ``exception`` the vector to hand to the guest instead of #GP, with nothing else changed.
        """
        ...


class PrivilegedInstructions:
    """Xen's choice of emulated instructions."""

    def emulate(self, code: bytes, registers: Values, system: Values) -> Values | None:
        length, opcode = decode(code)
        handler = _HANDLERS.get(opcode)
        if handler is None:
            return None
        operand = 0
        if opcode in _WITH_OPERAND:
            if length >= len(code):
                return None
            operand, length = code[length], length + 1
        changes = handler(operand, registers, system)
        if changes is None:
            return None
        return {**changes, "eip": registers["eip"] + length & 0xFFFF_FFFF}


def carry_out(
    emulator: Emulator, vcpu: Vcpu, code: bytes, now: int, orders: Mapping[str, Callable[[Vcpu, int], None]]
) -> Values | None:
    """Let ``emulator`` decide about the instruction at EIP and do what it says; None where it or we refuse.

    Args:
        emulator: the part.
        vcpu: whose instruction.
        code: what stands at EIP.
        now: the time stamp.
        orders: does what a change of ``cr3`` or ``hypercall_page`` means, or raises HypercallError.
    """
    state = vcpu.state
    registers = {name: getattr(state, name) for name in (*GENERAL, "eip", "eflags")}
    system = vcpu.control | {"ring": state.cpl, "iopl": level_for(vcpu), "tsc": now, "cr3": state.cr3}
    system["vcpu"] = vcpu.key % VCPUS_PER_DOMAIN
    system["machine_cr4"] = CR4_MACHINE | (CR4_PAE if state.mode is PAE else 0)
    changes = decide(emulator, code, registers, system, (*registers, *vcpu.control, "exception", *orders))
    if changes and "exception" in changes:
        return {"exception": changes["exception"]}
    # First of all, since these are the changes that can fail.
    for name in orders:
        if changes and name in changes:
            try:
                orders[name](vcpu, changes[name] & 0xFFFF_FFFF)
            except HypercallError:
                return None
    for name, value in (changes or {}).items():
        if name in registers:
            setattr(state, name, value & 0xFFFF_FFFF)
        elif name in vcpu.control:
            vcpu.control[name] = value & 0xFFFF_FFFF
    return changes


def decide(emulator: Emulator, code: bytes, registers: Values, system: Values, names: Collection[str]) -> Values | None:
    """What ``emulator`` says, if it changes only what is among ``names``.  Raises PartError."""
    did = f"emulation of the instruction at {registers['eip']:#010x}, bytes {code.hex(' ')}"
    expected = f"None, or whole numbers by names from {' '.join(names)}"
    try:
        changes = emulator.emulate(code, registers, system)
    except XenlabError:
        raise
    except Exception as problem:
        raise wrong(emulator, did, expected, problem) from problem
    if changes is not None and not is_mapping(changes, names, int):
        raise wrong(emulator, did, expected, changes)
    return changes


def decode(code: bytes) -> tuple[int, int]:
    """Length of prefixes and opcode, and the opcode (0x0Fxx for two bytes); 0 if unknown."""
    at = 0
    while at < len(code) and code[at] in (_OPERAND_SIZE, *_SEGMENT_PREFIXES):
        at += 1
    if at >= len(code) or code[at] == _LOCK:
        return at, 0
    if code[at] == 0x0F and at + 1 < len(code):
        return at + 2, 0x0F00 | code[at + 1]
    return at + 1, code[at]


def _kernel_only(
    handler: Callable[[int, Values, Values], Values | None],
) -> Callable[[int, Values, Values], Values | None]:
    def checked(operand: int, registers: Values, system: Values) -> Values | None:
        return handler(operand, registers, system) if system["ring"] < 3 else None

    return checked


def _interrupt_flag(_operand: int, _registers: Values, system: Values) -> Values | None:
    # The guest's real switch for events is the mask in its shared page; with I/O privilege
    # CLI and STI pass without effect, as in Xen, since POPF could not be caught anyway.
    return {} if system["iopl"] >= system["ring"] else None


def _clts(_operand: int, _registers: Values, system: Values) -> Values:
    return {"cr0": system["cr0"] & ~CR0_TS}


def _nothing(_operand: int, _registers: Values, _system: Values) -> Values:
    return {}


def _read_control(operand: int, _registers: Values, system: Values) -> Values | None:
    name = f"cr{operand >> 3 & 7}"
    if name not in system:
        return None
    return {GENERAL[operand & 7]: system[name] | (system["machine_cr4"] if name == "cr4" else 0)}


def _write_control(operand: int, registers: Values, system: Values) -> Values | None:
    name, value = f"cr{operand >> 3 & 7}", registers[GENERAL[operand & 7]]
    if name == "cr0":
        # Task-switched is the guest's own business; every other bit belongs to the machine.
        return {"cr0": value} if (value ^ system["cr0"]) & ~CR0_TS == 0 else None
    if name == "cr2":
        return {"cr2": value}
    if name == "cr3":
        return {"cr3": value}
    if name == "cr4":
        return {"cr4": value & CR4_OWN}
    return None


def _read_debug(operand: int, _registers: Values, system: Values) -> Values:
    try:
        return {GENERAL[operand & 7]: system[register_name(system, operand >> 3 & 7)]}
    except HypercallError:
        return {"exception": INVALID_OPCODE}


def _write_debug(operand: int, registers: Values, system: Values) -> Values | None:
    try:
        return written(system, operand >> 3 & 7, registers[GENERAL[operand & 7]])
    except HypercallError as refusal:
        return {"exception": INVALID_OPCODE} if refusal.errno == Errno.ENODEV else None


def _read_tsc(_operand: int, _registers: Values, system: Values) -> Values | None:
    if system["ring"] == 3 and system["cr4"] & CR4_TIME_FOR_KERNELS:
        return None
    return _halves(system["tsc"])


def _read_msr(_operand: int, registers: Values, system: Values) -> Values | None:
    value = read_register(registers["ecx"], system)
    return None if value is None else _halves(value)


def _write_msr(_operand: int, registers: Values, _system: Values) -> Values | None:
    return write_register(registers["ecx"], registers["edx"] << 32 | registers["eax"])


def _halves(value: int) -> Values:
    return {"eax": value & 0xFFFF_FFFF, "edx": value >> 32 & 0xFFFF_FFFF}


_HANDLERS: dict[int, Callable[[int, Values, Values], Values | None]] = {
    0xFA: _interrupt_flag,
    0xFB: _interrupt_flag,
    0x0F06: _kernel_only(_clts),
    0x0F09: _kernel_only(_nothing),
    0x0F20: _kernel_only(_read_control),
    0x0F21: _kernel_only(_read_debug),
    0x0F22: _kernel_only(_write_control),
    0x0F23: _kernel_only(_write_debug),
    0x0F30: _kernel_only(_write_msr),
    0x0F31: _read_tsc,
    0x0F32: _kernel_only(_read_msr),
}
_WITH_OPERAND = frozenset((0x0F20, 0x0F21, 0x0F22, 0x0F23))
