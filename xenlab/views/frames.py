"""The frame builder: choose what happens, and see the words that the guest's handler finds (lesson 07; paper 2.1.2).

The choices are the exception, the ring in which it is raised, whether events are masked, and whether the handler's
gate masks them.  Each choice is a guest of its own, which can be stepped over the exception: nothing is drawn but what
stands on its stack at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from xenlab.errors import HypercallError
from xenlab.hypervisor.core import Hypervisor, RunResult
from xenlab.hypervisor.domain import Vcpu
from xenlab.hypervisor.trace import Event, Kind
from xenlab.machine.disassembler import disassemble
from xenlab.machine.vectors import PAGE_FAULT
from xenlab.timeline import Timeline, When
from xenlab.views.canvas import Canvas, clip
from xenlab.views.palette import APPLICATION, HYPERVISOR, KERNEL, RING_COLOURS, ink_on
from xenlab.views.picture import Picture, table
from xenlab.views.story import FrameWord, frame_words, newest_first, short_vector, symbol

_STEPS, _SLOTS, _LINE = 200, 6, 24
_LEFT, _STACK_X, _TOP = 16, 300, 62
_CHIP, _CHIP_GAP = 24, 4
_MASK, _CR2 = 1, 8
_LONGEST = 15
_PRESENT, _WRITE, _USER = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Choice:
    """What happens to the guest.

    Attributes:
        vector: the exception, or the software interrupt.
        ring: where it is raised, 1 or 3.
        masked: whether events are masked then.
        gate_masks: whether the gate has them masked on entry.
    """

    vector: int
    ring: int = 3
    masked: bool = False
    gate_masks: bool = False


@dataclass(frozen=True, slots=True)
class StackSlot:
    """A word of the stack as it is now; its name is empty while it is no part of the frame."""

    address: int
    value: int
    name: str = ""
    meaning: str = ""


class FrameBuilder(Picture):
    """A frame that is built by a guest's exception, and the way there, step by step; a timeline too.

    Args:
        make: the guest for a choice, at its start.
        vectors: what can be chosen.
        choice: what is chosen first.

    Attributes:
        choice: what is chosen now.
    """

    title = "The frame builder"

    def __init__(self, make: Callable[[Choice], Timeline], vectors: Sequence[int], choice: Choice) -> None:
        self._make, self._vectors = make, tuple(vectors)
        self.choose(choice)

    def choose(self, choice: Choice) -> None:
        """Run the guest for ``choice`` to the first instruction of its handler."""
        self.choice, self._timeline = choice, self._make(choice)
        while self.delivered() is None and not self.hypervisor.domains[0].ended and self.position < _STEPS:
            self._timeline.run(1)

    @property
    def hypervisor(self) -> Hypervisor:
        """The machine of the present choice."""
        return self._timeline.hypervisor

    @property
    def position(self) -> int:
        return self._timeline.position

    @property
    def start(self) -> int:
        return self._timeline.start

    @property
    def end(self) -> int:
        return self._timeline.end

    def run(self, instructions: int) -> RunResult:
        return self._timeline.run(instructions)

    def seek(self, time: int) -> int:
        return self._timeline.seek(time)

    def back_to(self, goal: When) -> Event | None:
        return self._timeline.back_to(goal)

    def run_to(self, goal: When, most: int) -> Event | None:
        return self._timeline.run_to(goal, most)

    def delivered(self) -> Event | None:
        """The delivery of the chosen exception, None before it."""
        kinds, vector = (Kind.DELIVER, Kind.GATE), self.choice.vector
        events = (event for _key, event in newest_first(self.hypervisor) if event.kind in kinds)
        return next((event for event in events if event.vector == vector), None)

    def frame(self) -> list[FrameWord]:
        """The words of the frame, highest address first; none before it is built."""
        event = self.delivered()
        return [] if event is None else frame_words(self.hypervisor, event)

    def slots(self) -> list[StackSlot]:
        """The six highest words of the handler's stack as they stand in memory, highest address first."""
        words = {word.address: word for word in self.frame()}
        top = max(words) + 4 if words else self._next_stack()
        return [self._slot(top - 4 * place, words.get(top - 4 * place)) for place in range(1, _SLOTS + 1)]

    def _next_stack(self) -> int:
        vcpu = self._vcpu
        return vcpu.kernel_esp if self.choice.ring == 3 else vcpu.state.esp

    def _slot(self, address: int, word: FrameWord | None) -> StackSlot:
        try:
            value = self.hypervisor.guest_memory.read_word(self._vcpu, address)
        except HypercallError:
            value = 0
        if word is None:
            return StackSlot(address, value)
        return StackSlot(address, value, word.name, word_meaning(self.choice.vector, word))

    @property
    def _vcpu(self) -> Vcpu:
        return self.hypervisor.domains[0].vcpus[0]

    def shared(self) -> tuple[int, int]:
        """Event mask and CR2 as they stand in the shared page."""
        memory, info = self.hypervisor.memory, self._vcpu.info
        return memory.bytes[info + _MASK], memory.words[info + _CR2 >> 2]

    def select(self, key: str) -> bool:
        if key not in self._keys():
            return False
        self.choose(self._keys()[key])
        return True

    def _keys(self) -> dict[str, Choice]:
        now = self.choice
        keys = {f"vector.{vector}": replace(now, vector=vector) for vector in self._vectors}
        keys |= {f"ring.{ring}": replace(now, ring=ring) for ring in (1, 3)}
        for value in (False, True):
            keys[f"masked.{value}"] = replace(now, masked=value)
            keys[f"gate.{value}"] = replace(now, gate_masks=value)
        return keys

    def text(self) -> str:
        esp = self._vcpu.state.esp
        rows = [
            (
                f"{slot.address:#010x}",
                slot.name,
                f"{slot.value:#010x}",
                slot.meaning,
                "ESP" if slot.address == esp else "",
            )
            for slot in self.slots()
        ]
        stack = table(("address", "word", "value", "meaning", ""), rows)
        return f"{self.title}: {self._chosen()}\n{self._summary()}\n\n{stack}\n\n" + "\n".join(self._facts())

    def _chosen(self) -> str:
        now = self.choice
        return (
            f"{short_vector(now.vector)} in ring {now.ring}, events {'masked' if now.masked else 'not masked'}, "
            f"the gate {'masks them' if now.gate_masks else 'leaves them'}"
        )

    def _summary(self) -> str:
        if self.hypervisor.current is None:
            return f"{self.position} instructions, CPU idle"
        state = self._vcpu.state
        code = disassemble(self.hypervisor.guest_memory.read_code(self._vcpu, _LONGEST), state.eip, count=1)
        place = symbol(self._vcpu.domain, state.eip) or f"{state.eip:#x}"
        return f"{self.position} instructions; ring {state.cpl}, {place}: {code[0].text if code else '(no code)'}"

    def _facts(self) -> list[str]:
        mask, cr2 = self.shared()
        event = self.delivered()
        ways = {None: "not raised yet", Kind.GATE: "the CPU by itself: no hypervisor", Kind.DELIVER: "the hypervisor"}
        return [
            f"Frame built by: {ways[event.kind if event else None]}",
            f"Shared page: event mask {mask}, CR2 {cr2:#x}",
        ]

    def svg(self) -> str:
        canvas = Canvas(self.title, self._summary())
        bottom = self._draw_choices(canvas)
        self._draw_stack(canvas)
        return canvas.render(max(bottom, _TOP + 20 + _LINE * _SLOTS + 96))

    def _draw_choices(self, canvas: Canvas) -> float:
        now, y = self.choice, float(_TOP)
        canvas.text(_LEFT, y, "What is raised", "b")
        y += 8
        for place, vector in enumerate(self._vectors):
            x, row = _LEFT + 88 * (place % 3), place // 3
            at = (x, y + (_CHIP + _CHIP_GAP) * row)
            _draw_chip(canvas, at, 84, f"vector.{vector}", _label(vector), vector == now.vector)
        y += (_CHIP + _CHIP_GAP) * -(-len(self._vectors) // 3) + 20
        for label, prefix, values, chosen in (
            ("In which ring", "ring", ((1, "1 kernel"), (3, "3 application")), now.ring),
            ("Events are", "masked", ((False, "not masked"), (True, "masked")), now.masked),
            ("The handler's gate", "gate", ((False, "leaves them"), (True, "masks them")), now.gate_masks),
        ):
            canvas.text(_LEFT, y, label, "b")
            for place, (value, name) in enumerate(values):
                _draw_chip(canvas, (_LEFT + 132 * place, y + 8), 128, f"{prefix}.{value}", name, value == chosen)
            y += _CHIP + 34
        return y

    def _draw_stack(self, canvas: Canvas) -> None:
        esp, slots = self._vcpu.state.esp, self.slots()
        canvas.text(_STACK_X, _TOP, "The handler's stack, highest address on top", "b")
        for place, slot in enumerate(slots):
            _draw_slot(canvas, slot, _TOP + 10 + _LINE * place, esp)
        y = _TOP + 10 + _LINE * _SLOTS + 26
        if esp not in {slot.address for slot in slots}:
            canvas.text(_STACK_X, y, f"ESP is {esp:#010x}, on another stack or above all these.", "d")
        y += 24
        for fact in self._facts():
            canvas.text(_STACK_X, y, fact)
            y += 20


def _label(vector: int) -> str:
    name = short_vector(vector)
    return f"{vector} {name}" if name.startswith("#") else name


def _draw_chip(canvas: Canvas, at: tuple[float, float], width: float, key: str, label: str, chosen: bool) -> None:
    (x, y), ring = at, key.removeprefix("ring.")
    colour = RING_COLOURS[int(ring)] if key.startswith("ring.") else KERNEL if chosen else "var(--soft)"
    if key.startswith("ring.") and not chosen:
        colour = "var(--soft)"
    canvas.open_event(key, f"choose {label}", selected=False)
    outline = {"stroke": "var(--ink)", "stroke_width": "2"} if chosen else {"stroke": "var(--rule)"}
    canvas.rect(x, y, width, _CHIP, fill=colour, rx="4", **outline)
    style = f"{ink_on(colour)} b s" if chosen else "s"
    canvas.text(x + width / 2, y + 16, label, style.strip(), anchor="middle")
    canvas.close()


def _draw_slot(canvas: Canvas, slot: StackSlot, y: float, esp: int) -> None:
    canvas.text(_STACK_X, y + 17, f"{slot.address:08x}", "m d")
    colour = _COLOURS.get(slot.name, KERNEL) if slot.name else "var(--soft)"
    canvas.rect(_STACK_X + 72, y, 176, _LINE, fill=colour, stroke="var(--bg)")
    ink = ink_on(colour)
    canvas.text(_STACK_X + 80, y + 17, slot.name, f"{ink} b".strip())
    canvas.text(_STACK_X + 242, y + 17, f"{slot.value:08x}", f"m {ink}" if slot.name else "m d", anchor="end")
    if slot.address == esp:
        canvas.path(f"M{_STACK_X + 252} {y + 12}l9 -6v4h8v4h-8v4z", fill=HYPERVISOR)
        canvas.text(_STACK_X + 274, y + 17, "ESP", "b")
    canvas.text(_STACK_X + 310, y + 17, clip(slot.meaning, 42), "d s")


# What belongs to the interrupted code, what only the kernel's handler asks for.
_COLOURS = {"ESP": APPLICATION, "SS": APPLICATION, "error": HYPERVISOR}


def word_meaning(vector: int, word: FrameWord) -> str:
    """What a word of a frame says; an error code says it in words."""
    if word.name != "error":
        return word.meaning or ("of the interrupted code" if word.name == "ESP" else "")
    if vector == PAGE_FAULT:
        return page_fault_bits(word.value)
    index = word.value >> 3
    if word.value & _WRITE:
        return f"entry {index:#x} of the trap table"
    return f"selector {word.value & ~7:#x}" if index else "no selector is to blame"


def page_fault_bits(error: int) -> str:
    """A page fault's error code in words."""
    why = "no right" if error & _PRESENT else "no page"
    return f"{why}; {'write' if error & _WRITE else 'read'} in ring {'3' if error & _USER else '0 to 2'}"


__all__ = ["Choice", "FrameBuilder", "StackSlot", "page_fault_bits", "word_meaning"]
