"""Reading and writing a guest's memory on its behalf (paper 2.1.1, 3.1).

The problem: most hypercalls take pointers.  A pointer may be wild, may point at a read-only
page, into the hypervisor, or run off the end of a page into nothing.

Translations are kept as the CPU keeps them, and forgotten when its TLB is flushed, so that the
hypervisor sees the guest's memory as the guest sees it.

The CPU does not notice such a write where it has already translated the page as code.  `write` tells
it each time; frames and results of batches, written far more often, tell it once for each page, so a
guest that has them written over its own running code may go on with the old code.  How long must be
the same in every replay: hence `forget_written`.

The invariant: a copy succeeds only where the guest's own kernel could have made the same
access, and a copy that fails has changed nothing.  What breaks without it: a guest uses the
hypervisor's hand to write where its own may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from xenlab.abi.numbers import Errno
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.layout import start_of
from xenlab.machine.cpu import Cpu
from xenlab.machine.memory import PAGE_SHIFT, PAGE_SIZE, Memory
from xenlab.machine.paging import READ, WRITE, Access, PageFault, walk

# Layouts of so many 32-bit words: what frames are made of.
WORDS = [Struct(f"<{count}I") for count in range(9)]
_pack_three, _pack_five, _pack_six = WORDS[3].pack_into, WORDS[5].pack_into, WORDS[6].pack_into


class GuestMemory:
    """Copies to and from linear addresses of a vCPU."""

    def __init__(self, memory: Memory, cpu: Cpu) -> None:
        self._memory, self._bytes, self._words = memory, memory.bytes, memory.words
        self._cpu = cpu
        # Machine addresses of the pages that were written since `forget_written`.
        self._written: set[int] = set()

    def read(self, vcpu: Vcpu, address: int, length: int, access: Access = READ) -> bytes:
        """``length`` bytes at ``address``.  Raises HypercallError(EFAULT)."""
        if access is READ and 0 < length <= PAGE_SIZE:
            at = self.machine_address(vcpu, address, length, False)
            if at >= 0:
                return bytes(self._bytes[at : at + length])
        pieces = self._pieces(vcpu, address, length, access)
        return b"".join(self._bytes[at : at + size] for at, size in pieces)

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> None:
        """Store ``data`` at ``address``, all of it or nothing.  Raises HypercallError(EFAULT)."""
        if data and len(data) <= PAGE_SIZE:
            at = self.machine_address(vcpu, address, len(data), True)
            if at >= 0:
                self._store(at, data)
                return
        pieces = list(self._pieces(vcpu, address, len(data), WRITE))
        done = 0
        for at, size in pieces:
            self._store(at, data[done : done + size])
            done += size

    def _store(self, at: int, data: bytes) -> None:
        self._bytes[at : at + len(data)] = data
        self._written.add(at & ~(PAGE_SIZE - 1))
        self._cpu.forget_code(at, at + len(data))

    def forget_written(self) -> None:
        """Have the CPU translate code anew in all pages that were written since the last time."""
        for page in self._written:
            self._cpu.forget_code(page, page + PAGE_SIZE)
        self._written.clear()

    def read_words(self, vcpu: Vcpu, address: int, count: int) -> tuple[int, ...]:
        """Up to eight 32-bit words at ``address``.  Raises HypercallError(EFAULT)."""
        at = self.machine_address(vcpu, address, 4 * count, False)
        if at < 0:
            return WORDS[count].unpack(self.read(vcpu, address, 4 * count))
        return WORDS[count].unpack_from(self._bytes, at)

    def write_words(self, vcpu: Vcpu, address: int, words: tuple[int, ...]) -> None:
        """Store up to eight 32-bit words, all or none.  Raises HypercallError(EFAULT)."""
        count, offset = len(words), address & 0xFFF
        # `machine_address`, spelled out for where it is known already, as a stack mostly is.
        page = vcpu.translations.get(~(address >> PAGE_SHIFT)) if vcpu.translated_at == self._cpu.flushes else None
        if page is not None and offset + 4 * count <= PAGE_SIZE:
            at = page + offset
        else:
            at = self.machine_address(vcpu, address, 4 * count, True)
        if at < 0:
            self.write(vcpu, address, WORDS[count].pack(*words))
        elif count == 3:
            # Frames, spelled out: a call with unpacked arguments takes twice as long.
            a, b, c = words
            _pack_three(self._bytes, at, a, b, c)
        elif count == 6:
            a, b, c, d, e, f = words
            _pack_six(self._bytes, at, a, b, c, d, e, f)
        elif count == 5:
            a, b, c, d, e = words
            _pack_five(self._bytes, at, a, b, c, d, e)
        else:
            WORDS[count].pack_into(self._bytes, at, *words)

    def check_writable(self, vcpu: Vcpu, address: int, length: int, access: Access = WRITE) -> None:
        """Raise HypercallError(EFAULT) unless `write` of ``length`` bytes there would succeed, or ``access`` would."""
        for _piece in self._pieces(vcpu, address, length, access):
            pass

    def read_word(self, vcpu: Vcpu, address: int) -> int:
        """The 32-bit word at ``address``.  Raises HypercallError(EFAULT)."""
        page = vcpu.translations.get(address >> PAGE_SHIFT) if vcpu.translated_at == self._cpu.flushes else None
        if page is None or address & 3:
            return int.from_bytes(self.read(vcpu, address, 4), "little")
        return self._words[page + (address & 0xFFF) >> 2]

    def read_code(self, vcpu: Vcpu, length: int) -> bytes:
        """Up to ``length`` bytes at CS:EIP, as many as the guest could execute."""
        state = vcpu.state
        address = state.segment("cs").base + state.eip & 0xFFFF_FFFF
        access = Access(user=state.cpl == 3, fetch=True)
        code = b""
        try:
            for at, size in self._pieces(vcpu, address, length, access):
                code += self._bytes[at : at + size]
        except HypercallError:
            pass  # the instruction may well end before the page does
        return code

    def machine_address(self, vcpu: Vcpu, address: int, length: int, write: bool) -> int:
        """Where ``length`` bytes at ``address`` stand, if they do not cross a page; else -1.

        Raises HypercallError(EFAULT) where the guest's kernel could not make the access.
        """
        offset = address & 0xFFF
        if offset + length > PAGE_SIZE:
            return -1
        if vcpu.translated_at != self._cpu.flushes:
            vcpu.translations.clear()
            vcpu.translated_at = self._cpu.flushes
        key = ~(address >> PAGE_SHIFT) if write else address >> PAGE_SHIFT
        page = vcpu.translations.get(key)
        if page is None:
            ((machine, _size),) = self._pieces(vcpu, address - offset, PAGE_SIZE, WRITE if write else READ)
            page = vcpu.translations[key] = machine
            if write and page not in self._written:
                self._written.add(page)
                self._cpu.forget_code(page, page + PAGE_SIZE)
        return page + offset

    def _pieces(self, vcpu: Vcpu, address: int, length: int, access: Access) -> Iterator[tuple[int, int]]:
        """The machine addresses and sizes that a linear range consists of, page by page."""
        state = vcpu.state
        if address < 0 or length < 0 or address + length > start_of(state.mode):
            raise HypercallError(Errno.EFAULT)
        while length:
            size = min(length, PAGE_SIZE - address % PAGE_SIZE)
            found = walk(self._memory, state.mode, state.cr3, address, access)
            if isinstance(found, PageFault):
                raise HypercallError(Errno.EFAULT)
            yield found.machine, size
            address, length = address + size, length - size
