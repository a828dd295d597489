"""The one family of exceptions that xenlab raises at its users.

A guest's mistake never raises through the hypervisor: it becomes an errno or a fault
inside the guest.  What is raised here is for the person at the keyboard, so each message
names the thing, what was expected of it and what was found.
"""

from __future__ import annotations


class XenlabError(Exception):
    """Base of everything that xenlab raises on purpose."""


class AssemblyError(XenlabError):
    """Assembly source that the assembler could not accept.

    Attributes:
        line: 1-based line in the source as the caller passed it.
        column: 1-based column in that line.
        problem: what is wrong, in one sentence.
        hint: what to write instead, or an empty string where we cannot know.
    """

    def __init__(self, line: int, column: int, problem: str, source_line: str = "", hint: str = "") -> None:
        self.line, self.column, self.problem, self.hint = line, column, problem, hint
        text = f"line {line}, column {column}: {problem}"
        if source_line.strip():
            text += f"\n    {source_line}\n    {' ' * (column - 1)}^"
        if hint:
            text += f"\n  {hint}"
        super().__init__(text)


class ImageError(XenlabError):
    """A guest image that cannot be loaded: not ELF, truncated, of the wrong class, too big."""


class MachineError(XenlabError):
    """The simulated hardware was asked for something that it does not have."""


class GuestCrashed(XenlabError):
    """A guest ended by a fault of its own; carries the crash report as text."""


class PartError(XenlabError):
    """A part in one of the hypervisor's slots answered what no part may, or raised; says which, when, and what."""


class ScheduleError(XenlabError):
    """Scheduling parameters that a scheduler does not have or cannot follow, or a vCPU that it does not know."""


class InvariantError(XenlabError):
    """The auditor found something that must never be.

    Attributes:
        invariant: the name of what does not hold.
    """

    def __init__(self, invariant: str, text: str) -> None:
        self.invariant = invariant
        super().__init__(text)


class TimelineError(XenlabError):
    """A run that cannot be taken back: something in it was not recorded or cannot be saved."""


class HypercallError(XenlabError):
    """Raised inside a hypercall to end it with an errno; never seen outside the hypervisor.

    Attributes:
        errno: the positive number of Xen's ``errno.h``; the guest receives its negative.
    """

    def __init__(self, errno: int, reason: str = "") -> None:
        self.errno = errno
        super().__init__(reason or f"errno {errno}")
