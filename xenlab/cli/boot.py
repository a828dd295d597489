"""``xenlab boot``: one guest on a machine of its own, with this terminal as its console.

A guest prints by ``console_io`` or into its console ring, and reads either way too: `ConsoleDaemon` looks after
the ring between two slices.  The initial domain has no ring.

Exit statuses that scripts can rely on:

    0    the guest shut itself down (a reboot or suspend counts, and is said on stderr)
    2    the image cannot be loaded, or the command line is wrong
    3    the guest crashed: by a fault that nothing handled, or it said so itself
    4    it did not end: its budget of instructions ran out, or it sleeps, with no input left that could wake it
    130  Ctrl-C
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from xenlab.abi.numbers import Shutdown
from xenlab.cli.keyboard import Keyboard
from xenlab.errors import ImageError
from xenlab.hypervisor.core import Hypervisor, Stop
from xenlab.hypervisor.domain import Domain, Vcpu
from xenlab.machine.machine import Machine
from xenlab.toolstack import Image, boot, image_from_source, load_image
from xenlab.toolstack.console import ConsoleDaemon

SOURCES = (".s", ".asm")
# A few milliseconds of guest code: the console is flushed and the keyboard asked this often.
SLICE = 100_000
_UNREAD_LIMIT = 1 << 16
_HOST_MIB = 8
_GREATEST_MIB = 960  # what a kernel at 0xC0000000 can map at once, below the hypervisor's range


class Exit(IntEnum):
    """Exit status of the command; see the head of this file."""

    SHUT_DOWN = 0
    CRASHED = 3
    UNFINISHED = 4
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Order:
    """What to boot, and how.

    Attributes:
        image: an ELF kernel with Xen notes, or assembly source by its suffix, ``.s`` or ``.asm``.
        memory_mib: the guest's memory.
        budget: instructions after which it is given up; None for no limit.
        command_line: what the guest finds in ``start_info``.
        privileged: boot it as the initial domain.
        vcpus: how many virtual CPUs its kernel may start, the first included.
    """

    image: Path
    memory_mib: int
    budget: int | None
    command_line: str
    privileged: bool
    vcpus: int = 1


class Session:
    """A guest between a keyboard and a screen.

    Args:
        order: what to boot.
        keyboard: what is typed.
        screen: gets the console's bytes as they come.
        note: gets everything said about the guest, for people.

    Raises:
        AssemblyError, ImageError: the image cannot be loaded.
    """

    def __init__(self, order: Order, keyboard: Keyboard, screen: BinaryIO, note: Callable[[str], None]) -> None:
        if not 1 <= order.memory_mib <= _GREATEST_MIB:
            raise ImageError(f"--memory {order.memory_mib}: a 32-bit guest can have from 1 to {_GREATEST_MIB} MiB")
        image = _load(order.image)
        self._order, self._keyboard, self._screen, self._note = order, keyboard, screen, note
        self._xen = Hypervisor(Machine(order.memory_mib + _HOST_MIB))
        self._guest: Domain = boot(
            self._xen,
            image,
            memory_mib=order.memory_mib,
            command_line=order.command_line,
            privileged=order.privileged,
            max_vcpus=order.vcpus,
        )
        self._console = ConsoleDaemon(self._xen, self._guest)
        self._shown = 0
        self._unread_at_last_nudge = 0

    def run(self) -> Exit:
        """Run the guest to its end, or as far as it gets."""
        try:
            reason = self._run()
        except KeyboardInterrupt:
            self._settle()
            self._note(f"interrupted: {self._where()}")
            return Exit.INTERRUPTED
        self._settle()
        return self._ending() if self._guest.ended else self._unfinished(reason)

    def _run(self) -> str:
        """Why it stopped, for a guest that did not end."""
        budget = self._order.budget
        while not self._guest.ended:
            left = SLICE if budget is None else budget - self._xen.now
            if left <= 0:
                return f"its budget of {budget:,} instructions ran out"
            self._feed()
            self._console.attend()
            stop = self._xen.run(min(SLICE, left)).stop
            self._show()
            if stop is Stop.IDLE and not self._guest.ended:
                self._settle()
                if self._woken():
                    continue
                return "it sleeps, and standard input has ended: nothing can wake it any more"
        return ""

    def _feed(self) -> None:
        """Pass on what was typed, unless the guest is far behind in reading."""
        if self._console.unread < _UNREAD_LIMIT and (data := self._keyboard.typed()):
            self._console.type(data)

    def _woken(self) -> bool:
        """Whether a sleeping guest got something to wake up for."""
        unread = self._console.unread
        # It may have looked for input just before some came, and gone to sleep just after.
        if unread and unread != self._unread_at_last_nudge:
            self._unread_at_last_nudge = unread
            data = b""
        elif not (data := self._keyboard.wait()):
            return False
        self._console.type(data)
        return True

    def _settle(self) -> None:
        """Show what is still in the guest's ring, although it does not run on now."""
        self._console.attend()
        while self._xen.inputs.apply_next(self._xen):
            pass
        self._show()

    def _show(self) -> None:
        out, lost = self._guest.console_out, self._guest.console_lost
        written = lost + len(out)
        if written > self._shown:
            data, self._shown = bytes(out[max(0, self._shown - lost) :]), written
            self._screen.write(data)
            self._screen.flush()

    def _ending(self) -> Exit:
        reason = self._guest.shutdown
        if reason in (Shutdown.CRASH, Shutdown.WATCHDOG):
            self._note(self._guest.report or f"the guest says that it crashed (SHUTDOWN_{reason.name.lower()})")
            return Exit.CRASHED
        if reason is not None and reason is not Shutdown.POWEROFF:
            self._note(f"the guest asked for SHUTDOWN_{reason.name.lower()}, which ends it here")
        return Exit.SHUT_DOWN

    def _unfinished(self, reason: str) -> Exit:
        self._note(f"the guest was stopped: {reason}\n{self._where()}")
        return Exit.UNFINISHED

    def _where(self) -> str:
        guest = self._guest
        begun = [vcpu for vcpu in guest.vcpus if vcpu.initialised]
        head = f"domain {guest.domid} ({guest.name}) at instruction {self._xen.now:,}"
        return "\n".join(f"{head}{_which(vcpu)} is {_place(vcpu)}" for vcpu in begun)


def _which(vcpu: Vcpu) -> str:
    return f", vCPU {vcpu.number}," if len(vcpu.domain.vcpus) > 1 else ""


def _place(vcpu: Vcpu) -> str:
    state = vcpu.state
    registers = f"eip {state.eip:#010x}, esp {state.esp:#010x}, eax {state.eax:#010x}"
    return f"{vcpu.run_state.name.lower()}, ring {state.cpl}, {registers}"


def _load(path: Path) -> Image:
    if path.suffix.lower() not in SOURCES:
        return load_image(path)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ImageError(f"image {str(path)!r}: cannot be read as text: {problem}") from None
    return image_from_source(source, path.name)
