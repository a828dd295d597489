"""Machine memory: one buffer that the CPU, the hypervisor and the views share.

The problem: a hypervisor reads and writes guests' page tables all day.  Going through the
emulator's copying calls for each entry would cost more than the work itself.  So machine
memory is one anonymous mapping that the emulator uses in place (``uc_mem_map_ptr``), and
Python sees the same bytes through memoryviews and numpy arrays, without a copy.

The invariant: there is exactly one copy of every byte of machine memory.  What breaks
without it: a page-table entry that the hypervisor validated would not be the one that the
emulated MMU walks.

Pages that nobody wrote to cost no host memory, since the mapping is anonymous and private: reading
one finds the host's page of zeros.  `Memory.scrub` keeps it so.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

from xenlab.errors import MachineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1) & 0xFFFF_FFFF
_ZEROS = bytes(PAGE_SIZE)
MIN_MIB, MAX_MIB = 1, 2048


class Memory:
    """Machine memory of ``memory_mib`` MiB, all zero at power-on.

    Attributes:
        size: bytes.
        frames: number of 4 KiB frames.
        bytes: writable memoryview of bytes.
        words: the same memory as 32-bit words; ``words[address >> 2]``.
        qwords: the same memory as 64-bit words; ``qwords[address >> 3]``.

    Raises:
        MachineError: if the size is not a whole number from 1 to 2048 MiB.
    """

    def __init__(self, memory_mib: int) -> None:
        if not isinstance(memory_mib, int) or not MIN_MIB <= memory_mib <= MAX_MIB:
            raise MachineError(f"memory_mib: expected a whole number from {MIN_MIB} to {MAX_MIB}, found {memory_mib!r}")
        self.size = memory_mib << 20
        self.frames = self.size >> PAGE_SHIFT
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, self.size, **private)
        self.bytes = memoryview(self._map)
        self.words = self.bytes.cast("I")
        self.qwords = self.bytes.cast("Q")
        self.host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes at machine ``address``.  Raises MachineError outside memory."""
        self._check(address, length)
        return bytes(self.bytes[address : address + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at machine ``address``.  Raises MachineError outside memory.

        Code that was translated from these bytes stays in the CPU's cache: whoever writes
        code calls `Cpu.forget_code` afterwards.
        """
        self._check(address, len(data))
        self.bytes[address : address + len(data)] = data

    def frame(self, mfn: int) -> memoryview:
        """The 4,096 bytes of machine frame ``mfn``, writable in place."""
        self._check(mfn << PAGE_SHIFT, PAGE_SIZE)
        return self.bytes[mfn << PAGE_SHIFT : (mfn + 1) << PAGE_SHIFT]

    def scrub(self, mfn: int) -> None:
        """Fill frame ``mfn`` with zeros, unless it is full of them."""
        if not self.is_zero(mfn):
            self.frame(mfn)[:] = _ZEROS

    def is_zero(self, mfn: int) -> bool:
        """Whether there is nothing but zeros in frame ``mfn``."""
        # Bytes are compared at once, a memoryview element by element: a hundred times slower.
        return self.frame(mfn).tobytes() == _ZEROS

    def array(self) -> NDArray[np.uint8]:
        """All of memory as a numpy array over the same bytes, shape ``(frames, 4096)``."""
        import numpy as np

        return np.frombuffer(self._map, dtype=np.uint8).reshape(self.frames, PAGE_SIZE)

    def _check(self, address: int, length: int) -> None:
        if address < 0 or length < 0 or address + length > self.size:
            raise MachineError(
                f"machine address {address:#x}: {length} bytes there reach outside the "
                f"{self.size >> 20} MiB of machine memory"
            )
