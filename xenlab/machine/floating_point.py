"""The x87 and SSE registers as FXSAVE writes them, in 512 bytes.

The problem: who hands over a whole processor hands over its floating-point registers in the form in which the CPU
itself stores and loads them; Unicorn takes them one by one.

    0 control  2 status  4 tags, a bit each  24 MXCSR  32 ST0 to ST7 by 16 bytes  160 XMM0 to XMM7 by 16 bytes

The invariant: an image that FXRSTOR would refuse, for a reserved bit of MXCSR, is not loaded.  What breaks without it:
what a guest has written makes the emulator's state one that no CPU can be in.
"""

from __future__ import annotations

IMAGE_BYTES = 512
_CONTROL, _STATUS, _TAGS, _MXCSR, _STACK, _VECTORS, _SLOT = 0, 2, 4, 24, 32, 160, 16
_MXCSR_RESERVED = ~0xFFFF
_EMPTY = 3


def from_image(image: bytes) -> dict[str, int]:
    """The registers by the names of `FLOATING_POINT`, those first that others depend on; all zero if it is refused."""
    if _number(image, _MXCSR, 4) & _MXCSR_RESERVED:
        image = bytes(IMAGE_BYTES)  # what Xen loads then
    used = image[_TAGS]
    values = {
        "fpsw": _number(image, _STATUS, 2),
        "fpcw": _number(image, _CONTROL, 2),
        "fptag": sum(_EMPTY << 2 * n for n in range(8) if not used >> n & 1),
        "mxcsr": _number(image, _MXCSR, 4),
    }
    values |= {f"st{n}": _number(image, _STACK + _SLOT * n, 10) for n in range(8)}
    return values | {f"xmm{n}": _number(image, _VECTORS + _SLOT * n, _SLOT) for n in range(8)}


def _number(image: bytes, at: int, size: int) -> int:
    return int.from_bytes(image[at : at + size], "little")


__all__ = ["IMAGE_BYTES", "from_image"]
