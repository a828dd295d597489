"""Hypercalls: one table from number to function (paper 3.1).

The problem: a guest kernel asks the hypervisor for an operation as an application asks a
kernel: by a software interrupt, with a number in EAX and up to six arguments in EBX, ECX, EDX,
ESI, EDI and EBP.  The answer comes back in EAX: zero or more, or a negated errno.

The invariant: whatever the arguments, a hypercall either does its whole work or returns an
errno and leaves everything as it was; one that works on an array does so for each element, and
says how many it has done.  Nothing that a guest passes can raise further than the table.  What
breaks without it: one domain's mistake stops all.

Guests do not write ``int 0x82`` themselves but call into the hypercall page, which the
hypervisor fills in, so that the way in can change without the guest knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from xenlab.abi.numbers import HYPERCALL_VECTOR, Errno, Hypercall
from xenlab.errors import HypercallError, XenlabError
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.guest_memory import GuestMemory
from xenlab.hypervisor.parts import is_mapping, wrong
from xenlab.hypervisor.preemption import BATCHED_CALL_COST, Allowance, Continuation
from xenlab.machine.memory import PAGE_SIZE

Handler = Callable[..., int]
_STUB_BYTES = 32
_MULTICALL_ENTRY = 32
MAX_MULTICALL = 4096
_ARGUMENTS = ("ebx", "ecx", "edx", "esi", "edi", "ebp")
_ADDRESSES = range(1 << 32)
_NOT_IN_BATCHES = frozenset((int(Hypercall.multicall), int(Hypercall.iret)))


class HypercallPart(Protocol):
    """The slot for one hypercall written in terms of plain values (lesson 03)."""

    def call(
        self, arguments: tuple[int, ...], read: Callable[[int, int], bytes | None]
    ) -> tuple[int, Mapping[int, bytes]]:
        """Answer one call.

        Args:
            arguments: EBX, ECX, EDX, ESI, EDI and EBP.
            read: ``read(address, length)`` gives the guest's memory, None where it has none.

        Returns:
            The result (0 or more, or a negated errno), and what to write into the guest's
            memory, by address.  Where one write cannot be done none is, and the guest gets -EFAULT.
        """
        ...


def unknown(_vcpu: Vcpu, *_: int) -> int:
    """What every number without a handler does."""
    return -Errno.ENOSYS


def _refused(_vcpu: Vcpu, *_: int) -> int:
    return -Errno.EINVAL


class HypercallTable:
    """Number to function, and the rules that hold for all of them.

    Attributes:
        handlers: by number; `Hypervisor.trap` calls them as ``handler(vcpu, ebx, ecx, edx, esi,
            edi, ebp)`` and turns a HypercallError into its errno.
        parts: those of `register_part`, by number.
    """

    def __init__(self, guest_memory: GuestMemory, allowance: Allowance) -> None:
        self._guest, self._allowance = guest_memory, allowance
        self.handlers: dict[int, Handler] = {}
        self.parts: dict[int, HypercallPart] = {}
        self.register(Hypercall.multicall, self._multicall)

    def register(self, number: int, handler: Handler) -> None:
        """Serve ``number`` by ``handler(vcpu, ebx, ecx, edx, esi, edi, ebp)``.

        A handler names the arguments that it uses and takes the rest as ``*_``.
        """
        self.handlers[number] = handler

    def register_part(self, number: int, part: HypercallPart) -> None:
        """Serve ``number`` by a part that takes and returns plain values."""

        self.parts[number] = part

        def handler(vcpu: Vcpu, *arguments: int) -> int:
            result, writes = _answer(number, part, arguments, lambda at, size: self._read_or_none(vcpu, at, size))
            for address, data in writes.items():
                self._guest.check_writable(vcpu, address, len(data))
            for address, data in writes.items():
                self._guest.write(vcpu, address, data)
            return result

        self.register(number, handler)

    def _multicall(self, vcpu: Vcpu, address: int, count: int, *_: int) -> int:
        """Do ``count`` calls from an array of entries, each with its result written back.

        The calls share one allowance; what is left when it is used up is done when the guest makes the call again.
        """
        if count > MAX_MULTICALL:
            raise HypercallError(Errno.EINVAL)
        end = address + count * _MULTICALL_ENTRY
        self._guest.check_writable(vcpu, address, end - address)
        self._allowance.begin()
        self._allowance.shared = True
        try:
            self._batch(vcpu, address, end)
        finally:
            self._allowance.shared = False
        return 0

    def _batch(self, vcpu: Vcpu, address: int, end: int) -> None:
        for at in range(address, end, _MULTICALL_ENTRY):
            if self._allowance.left <= 0:
                raise Continuation(ebx=at, ecx=(end - at) // _MULTICALL_ENTRY)
            self._allowance.left -= BATCHED_CALL_COST
            number, _result, ebx, ecx, edx, esi, edi, ebp = self._guest.read_words(vcpu, at, 8)
            # A batch inside a batch would let a guest build work of any depth; IRET would leave the batch.
            handler = _refused if number in _NOT_IN_BATCHES else self.handlers.get(number, unknown)
            try:
                result = handler(vcpu, ebx, ecx, edx, esi, edi, ebp)
            except HypercallError as refusal:
                result = -refusal.errno
            except Continuation as again:
                self._keep_arguments(vcpu, at, again)
                raise Continuation(ebx=at, ecx=(end - at) // _MULTICALL_ENTRY) from None
            # A call may have unmapped the array that it stands in: then the batch ends with EFAULT.
            self._guest.write_words(vcpu, at + 4, (result & 0xFFFF_FFFF,))
            if vcpu.domain.ended:
                break

    def _keep_arguments(self, vcpu: Vcpu, at: int, again: Continuation) -> None:
        """A call of the batch is to be made again: its new arguments go where it is read from."""
        for name, value in again.registers.items():
            place = at + 8 + 4 * _ARGUMENTS.index(name)
            self._guest.write_words(vcpu, place, (value & 0xFFFF_FFFF,))

    def _read_or_none(self, vcpu: Vcpu, address: int, length: int) -> bytes | None:
        try:
            return self._guest.read(vcpu, address, length)
        except HypercallError:
            return None


def _answer(
    number: int, part: HypercallPart, arguments: tuple[int, ...], read: Callable[[int, int], bytes | None]
) -> tuple[int, Mapping[int, bytes]]:
    """What ``part`` answers, if it is an answer.  Raises PartError."""
    did = f"hypercall {number} with arguments {', '.join(map(hex, arguments))}"
    expected = "a tuple (result, writes): a whole number, and bytes by whole-number address"
    try:
        found: Any = part.call(arguments, read)
    except XenlabError:
        raise
    except Exception as problem:
        raise wrong(part, did, expected, problem) from problem
    is_pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], int)
    if not is_pair or not is_mapping(found[1], _ADDRESSES, (bytes, bytearray)):
        raise wrong(part, did, expected, found)
    result, writes = found
    return result, writes


def hypercall_page() -> bytes:
    """The page of stubs, 32 bytes each; a guest calls ``page + 32 * number``.

    All are ``mov eax, number; int 0x82; ret``, but that for IRET first saves EAX, which it
    would otherwise lose, and does not return (Xen's arch/x86/pv/hypercall.c).
    """
    page = bytearray(b"\xcc" * PAGE_SIZE)
    for number in range(PAGE_SIZE // _STUB_BYTES):
        stub = b"\xb8" + number.to_bytes(4, "little") + bytes((0xCD, HYPERCALL_VECTOR)) + b"\xc3"
        if number == Hypercall.iret:
            stub = b"\x50" + stub[:-1]
        page[number * _STUB_BYTES : number * _STUB_BYTES + len(stub)] = stub
    return bytes(page)


__all__ = ["HypercallPart", "HypercallTable", "hypercall_page"]
