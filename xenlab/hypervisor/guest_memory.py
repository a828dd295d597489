"""Reading and writing a guest's memory on its behalf (paper 2.1.1, 3.1).

The problem: most hypercalls take pointers.  A pointer may be wild, may point at a read-only
page, into the hypervisor, or run off the end of a page into nothing.

The invariant: a copy succeeds only where the guest's own kernel could have made the same
access, and a copy that fails has changed nothing.  What breaks without it: a guest uses the
hypervisor's hand to write where its own may not.
"""

from __future__ import annotations

from collections.abc import Iterator

from xenlab.abi.numbers import Errno
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.layout import start_of
from xenlab.machine.memory import PAGE_SIZE, Memory
from xenlab.machine.paging import READ, WRITE, Access, PageFault, walk


class GuestMemory:
    """Copies to and from linear addresses of a vCPU."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def read(self, vcpu: Vcpu, address: int, length: int, access: Access = READ) -> bytes:
        """``length`` bytes at ``address``.  Raises HypercallError(EFAULT)."""
        pieces = self._pieces(vcpu, address, length, access)
        return b"".join(self._memory.bytes[at : at + size] for at, size in pieces)

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> None:
        """Store ``data`` at ``address``, all of it or nothing.  Raises HypercallError(EFAULT)."""
        pieces = list(self._pieces(vcpu, address, len(data), WRITE))
        done = 0
        for at, size in pieces:
            self._memory.bytes[at : at + size] = data[done : done + size]
            done += size

    def check_writable(self, vcpu: Vcpu, address: int, length: int) -> None:
        """Raise HypercallError(EFAULT) unless `write` of ``length`` bytes there would succeed."""
        for _piece in self._pieces(vcpu, address, length, WRITE):
            pass

    def read_word(self, vcpu: Vcpu, address: int) -> int:
        """The 32-bit word at ``address``.  Raises HypercallError(EFAULT)."""
        return int.from_bytes(self.read(vcpu, address, 4), "little")

    def read_code(self, vcpu: Vcpu, length: int) -> bytes:
        """Up to ``length`` bytes at CS:EIP, as many as the guest could execute."""
        state = vcpu.state
        address = state.segment("cs").base + state.eip & 0xFFFF_FFFF
        access = Access(user=state.cpl == 3, fetch=True)
        code = b""
        try:
            for at, size in self._pieces(vcpu, address, length, access):
                code += self._memory.bytes[at : at + size]
        except HypercallError:
            pass  # the instruction may well end before the page does
        return code

    def _pieces(self, vcpu: Vcpu, address: int, length: int, access: Access) -> Iterator[tuple[int, int]]:
        """The machine addresses and sizes that a linear range consists of, page by page."""
        state = vcpu.state
        if length < 0 or address + length > start_of(state.mode):
            raise HypercallError(Errno.EFAULT)
        while length:
            size = min(length, PAGE_SIZE - address % PAGE_SIZE)
            found = walk(self._memory, state.mode, state.cr3, address, access)
            if isinstance(found, PageFault):
                raise HypercallError(Errno.EFAULT)
            yield found.machine, size
            address, length = address + size, length - size
