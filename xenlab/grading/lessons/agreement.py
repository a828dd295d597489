"""The agreement of exercise 07 between a hypervisor and its guests: what stands where in a frame, as the seed chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from xenlab.grading.instances import Choices
from xenlab.hypervisor.bounce import CR2_OFFSET, SHARED

IN_FRAME, BELOW, ABOVE = "frame", "below", "above"
_XEN = (("eip", "cs", "eflags"), ("esp", "ss"))
# All but Xen's own order.
_ORDERS = tuple(
    pair
    for pair in ((inner, outer) for inner in permutations(_XEN[0]) for outer in permutations(_XEN[1]))
    if pair != _XEN
)
# Bits that neither the selector nor a flag uses; not Xen's.
_MASK_PLACES = tuple(("cs", bit) for bit in range(17, 32)) + tuple(("eflags", bit) for bit in range(24, 32))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How frames are laid out.

    Attributes:
        words: the three words that every frame has, from the lowest address up.
        outer: the two above them that an entry from an outer ring has.
        error: `BELOW` or `ABOVE` the three.
        no_error: what stands there for an exception without an error code; empty for no word at all.
        address: `IN_FRAME`, at the lowest address, or an offset in the shared page.
        mask_word, mask_bit: where the event mask from before is kept.
        clears_direction: whether a handler begins with the direction flag clear.
    """

    words: tuple[str, ...]
    outer: tuple[str, ...]
    error: str
    no_error: tuple[int, ...]
    address: str | int
    mask_word: str
    mask_bit: int
    clears_direction: bool

    @classmethod
    def chosen(cls, choices: Choices) -> Agreement:
        """The one that a seed chooses."""
        words, outer = choices.pick("order", _ORDERS)
        offsets = [offset for offset in SHARED if offset != CR2_OFFSET]
        mask_word, mask_bit = choices.pick("mask", _MASK_PLACES)
        in_frame = choices.pick("in frame", (True, False))
        filler = choices.pick("filler", ((), (0,), (0xFFFF_FFFF,), (0xBAD,)))
        return cls(
            words,
            outer,
            choices.pick("error", (BELOW, ABOVE)),
            filler,
            IN_FRAME if in_frame else choices.pick("offset", offsets),
            mask_word,
            mask_bit,
            choices.pick("direction", (True, False)),
        )

    def parameters(self) -> dict[str, Any]:
        """The rules as the notebook gets them."""
        return {
            "words": list(self.words),
            "outer": list(self.outer),
            "error": self.error,
            "no_error": list(self.no_error),
            "address": self.address,
            "mask_word": self.mask_word,
            "mask_bit": self.mask_bit,
            "clears_direction": self.clears_direction,
        }

    def names(self, trap: Mapping[str, int], *, outer: bool) -> list[str]:
        """What the words of a frame are, from the lowest address up."""
        error = ["error"] if "error" in trap or self.no_error else []
        middle = error + list(self.words) if self.error == BELOW else list(self.words) + error
        address = ["address"] if "address" in trap and self.address == IN_FRAME else []
        return address + middle + (list(self.outer) if outer else [])

    def task(self) -> str:
        """The rules in words, as Markdown."""
        filler = f"the word `{self.no_error[0]:#x}` stands in its place" if self.no_error else "there is no word"
        place = f"at offset {self.address} of the shared page (`shared`), and not in the frame"
        if self.address == IN_FRAME:
            place = "in the frame itself, in one word more at its lowest address; the shared page is left alone"
        direction = "DF (`0x400`), " if self.clears_direction else ""
        kept = "" if self.clears_direction else " (DF, `0x400`, stays as it was)"
        return (
            "Frames in your hypervisor, always from the lowest address up:\n\n"
            f"* **Three words** are in every frame: {_listed(self.words)}.\n"
            f"* **The error code** stands {self.error} these three. For an exception without one, {filler}.\n"
            f"* **From an outer ring** two words more stand above all these: {_listed(self.outer)}, as they were. "
            "The frame is then built on the kernel's stack; else on the stack that is in use.\n"
            f"* **The address** of a page fault is left {place}.\n"
            "* **Events.** IF (`0x200`) in the saved EFLAGS is set if events were not masked, and clear if they were. "
            f"The mask from before is also kept in bit {self.mask_bit} of the word with {self.mask_word.upper()}. "
            "If the gate says so, the handler is entered with events masked; no gate unmasks them.\n"
            f"* **Flags.** The handler goes on with the flags as they were, but for {direction}TF, NT, RF and AC "
            f"(`0x100`, `0x4000`, `0x10000`, `0x40000`), which are clear{kept}. "
            "In the saved EFLAGS nothing is cleared but IF, as said.\n"
            "* **No frame.** The answer is `None` if the handler's ring is an outer one, if its stack's selector is "
            "not of its ring, or if its ring may not write all words of the frame."
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(name.upper() for name in names[:-1]) + " and " + names[-1].upper()


__all__ = ["ABOVE", "BELOW", "IN_FRAME", "Agreement"]
