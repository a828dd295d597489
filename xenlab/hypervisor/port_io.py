"""IN, OUT, INS and OUTS of a guest that may: carried out on its behalf (paper 2.1.2).

The problem: the real I/O privilege level of a guest is 0, so each of its port instructions faults.  If the
virtual level (`physdev`), or the guest's own bitmap for its applications, does not allow it, that fault is the
guest's.  If it does, the next question is whether the domain was given that port: the administrator's, not the guest's
to answer.  No domain is given any here, since there are no devices; and what nobody answers reads as ones, and
what is written there is gone, as on a bus without a device.

Two ports are the hypervisor's own latches, as in Xen: 0x70 and, as four bytes, 0xcf8 keep what was written, since
kernels try in this way whether there is a clock chip or a PCI bus behind them; there is none.

The invariant: INS and OUTS touch memory only where the guest's own ring could.  What breaks without it: an
application with a privilege level of 3 has the hypervisor write over its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.physdev import level_for
from xenlab.machine.engine import SEGMENTS
from xenlab.machine.paging import READ, USER_READ, USER_WRITE, WRITE
from xenlab.machine.state import DF

if TYPE_CHECKING:
    from xenlab.hypervisor.guest_memory import GuestMemory

CLOCK_PORT, PCI_PORT = 0x70, 0xCF8
# Rounds of a repeated instruction that are done in one trap; the rest is done when it is executed again.  A trap counts
# as one instruction however long it takes, so there are few: else a guest could stop time for all but the host.
ROUNDS = 32
_U32, _U16 = 0xFFFF_FFFF, 0xFFFF
_OPERAND_SIZE, _ADDRESS_SIZE, _REPEAT = 0x66, 0x67, (0xF2, 0xF3)
_SEGMENT_PREFIXES = dict(zip((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65), SEGMENTS, strict=True))
_WRITE_FAULT, _FROM_USER = 2, 4  # bits of a page fault's error code
Changes = dict[str, int]


class Faulted(Exception):
    """INS or OUTS reached memory that the guest may not use: a page fault with this error code and address."""

    def __init__(self, error: int, address: int) -> None:
        super().__init__(f"page fault {error:#x} at {address:#010x}")
        self.error, self.address = error, address


@dataclass(frozen=True, slots=True)
class PortInstruction:
    """One decoded instruction.

    Attributes:
        length: of it, with prefixes.
        size: bytes of the port, 1, 2 or 4.
        output: OUT or OUTS.
        port: as an immediate operand, None for DX.
        string: INS or OUTS.
        repeated: with a REP prefix.
        segment: which OUTS reads from.
        mask: of the index and count registers.
    """

    length: int
    size: int
    output: bool
    port: int | None
    string: bool
    repeated: bool
    segment: str
    mask: int


def decode_port(code: bytes) -> PortInstruction | None:
    """The port instruction that ``code`` begins with, None if it is another."""
    size, mask, repeated, segment, at = 4, _U32, False, "ds", 0
    while at < len(code):
        byte = code[at]
        if byte == _OPERAND_SIZE:
            size = 2
        elif byte == _ADDRESS_SIZE:
            mask = _U16
        elif byte in _REPEAT:
            repeated = True
        elif byte in _SEGMENT_PREFIXES:
            segment = _SEGMENT_PREFIXES[byte]
        else:
            break
        at += 1
    if at >= len(code):
        return None
    opcode, port = code[at], None
    string, immediate = opcode in range(0x6C, 0x70), opcode in range(0xE4, 0xE8)
    if not (string or immediate or opcode in range(0xEC, 0xF0)):
        return None
    if immediate:
        at += 1
        if at >= len(code):
            return None
        port = code[at]
    return PortInstruction(at + 1, size if opcode & 1 else 1, bool(opcode & 2), port, string, repeated, segment, mask)


def carry_out_port(guest: GuestMemory, vcpu: Vcpu, code: bytes) -> Changes | None:
    """Carry out a port instruction; what it changed, None if it is none or not allowed.

    Raises:
        Faulted: what was done before that memory stays done.
    """
    found = decode_port(code)
    if found is None:
        return None
    state = vcpu.state
    port = state.edx & _U16 if found.port is None else found.port
    if not is_allowed(guest, vcpu, port, found.size):
        return None
    behind = state.eip + found.length & _U32
    if found.string:
        return _string(guest, vcpu, found, port, behind)
    changes = {"eip": behind}
    if found.output:
        _write(vcpu, port, found.size, state.eax)
    else:
        mask = (1 << 8 * found.size) - 1
        changes["eax"] = state.eax = state.eax & ~mask | _read(vcpu, port, found.size)
    state.eip = behind
    return changes


def is_allowed(guest: GuestMemory, vcpu: Vcpu, port: int, size: int) -> bool:
    """Whether the guest has let the ring that runs use ``size`` ports from ``port`` on."""
    if vcpu.state.cpl <= level_for(vcpu):
        return True
    if port + size > vcpu.io.ports:
        return False
    bits = 0
    for number in range(2):  # as the CPU does, even if the ports end in the first byte
        try:
            byte = guest.read(vcpu, vcpu.io.bitmap + (port >> 3) + number, 1)[0]
        except HypercallError:
            byte = 0xFF
        bits |= byte << 8 * number
    return not bits >> (port & 7) & (1 << size) - 1


def _read(vcpu: Vcpu, port: int, size: int) -> int:
    clock, pci = vcpu.domain.latches
    if port == PCI_PORT and size == 4:
        return pci
    value = (1 << 8 * size) - 1
    if port <= CLOCK_PORT < port + size:
        shift = 8 * (CLOCK_PORT - port)
        value = value & ~(0xFF << shift) | clock << shift
    return value


def _write(vcpu: Vcpu, port: int, size: int, value: int) -> None:
    clock, pci = vcpu.domain.latches
    if port == PCI_PORT and size == 4:
        pci = value & _U32
    elif port <= CLOCK_PORT < port + size:
        clock = value >> 8 * (CLOCK_PORT - port) & 0xFF
    vcpu.domain.latches = clock, pci


def _string(guest: GuestMemory, vcpu: Vcpu, found: PortInstruction, port: int, behind: int) -> Changes:
    """INS and OUTS, up to `ROUNDS` times; EIP moves on only behind the last round."""
    state, mask = vcpu.state, found.mask
    left = state.ecx & mask if found.repeated else 1
    step = -found.size if state.eflags & DF else found.size
    for _round in range(min(left, ROUNDS)):
        name = "esi" if found.output else "edi"
        index = getattr(state, name)
        _transfer(guest, vcpu, found, port, index & mask)
        setattr(state, name, index & ~mask & _U32 | index + step & mask)
        left -= 1
        if found.repeated:
            state.ecx = state.ecx & ~mask & _U32 | left
    if not left:
        state.eip = behind
    return {"ecx": state.ecx, "esi": state.esi, "edi": state.edi, "eip": state.eip}


def _transfer(guest: GuestMemory, vcpu: Vcpu, found: PortInstruction, port: int, offset: int) -> None:
    user = vcpu.state.cpl == 3
    base = vcpu.state.segment(found.segment if found.output else "es").base
    address = base + offset & _U32
    try:
        if found.output:
            data = guest.read(vcpu, address, found.size, USER_READ if user else READ)
            _write(vcpu, port, found.size, int.from_bytes(data, "little"))
        else:
            guest.check_writable(vcpu, address, found.size, USER_WRITE if user else WRITE)
            guest.write(vcpu, address, _read(vcpu, port, found.size).to_bytes(found.size, "little"))
    except HypercallError:
        error = (0 if found.output else _WRITE_FAULT) | (_FROM_USER if user else 0)
        raise Faulted(error, address) from None
