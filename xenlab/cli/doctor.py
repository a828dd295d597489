"""``xenlab doctor``: does this installation have all it needs, and what to do where it does not."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from xenlab.errors import XenlabError

_GUEST = """
    mov ebx, CONSOLEIO_write
    mov ecx, 2
    mov edx, offset message
    mov eax, __HYPERVISOR_console_io
    int 0x82
again: jmp again
message: .ascii "ok"
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        found: what is there.
        advice: what to do; empty when all is well.
        needed: whether xenlab cannot do its work without it.
    """

    subject: str
    found: str
    advice: str = ""
    needed: bool = True

    @property
    def verdict(self) -> str:
        """``ok``, ``MISSING`` for what is needed, ``note`` for what is not."""
        return "ok" if not self.advice else "MISSING" if self.needed else "note"

    def line(self) -> str:
        """As the command prints it."""
        return f"{self.verdict:8}{self.subject}: {self.found}" + (f". {self.advice}" if self.advice else "")


def examine() -> Iterator[Finding]:
    """All findings, one after the other as they are made."""
    try:
        yield from dependencies()
    except ImportError as problem:  # packaging, which comes with JupyterLab
        yield Finding("packages", str(problem), _reinstall())
    for look in (unicorn_layout, assembler, guest, kernel, widgets, browser, course, sandbox):
        yield _safely(look)


def _safely(look: Callable[[], Finding]) -> Finding:
    """A broken package can raise anything, and is what one calls a doctor for."""
    try:
        return look()
    except Exception as problem:
        return Finding(look.__name__.replace("_", " "), f"{type(problem).__name__}: {problem}", _reinstall())


def _reinstall() -> str:
    return f"Run: {sys.executable} -m pip install -e . (in the clone)"


def dependencies() -> Iterator[Finding]:
    """Python and each package against what xenlab's own metadata asks for."""
    try:
        about = metadata.metadata("xenlab")
    except metadata.PackageNotFoundError:
        yield Finding("xenlab", "not installed in this Python", _reinstall())
        return
    yield _python(about["Requires-Python"])
    yield from filter(None, map(_dependency, metadata.requires("xenlab") or ()))


def _python(wanted: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    good = SpecifierSet(wanted).contains(found, prereleases=True)
    return Finding("Python", found, "" if good else f"Python {wanted} is needed")


def _dependency(line: str) -> Finding | None:
    """None for what is not asked for here: extras, and packages for other systems."""
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return None
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "not installed", _reinstall())
    good = requirement.specifier.contains(found, prereleases=True)
    return Finding(requirement.name, found, "" if good else f"{line} is needed. {_reinstall()}")


def unicorn_layout() -> Finding:
    """Whether the fast CPU can be used with this build of Unicorn."""
    from xenlab.machine.layout import ProbeError, probe

    try:
        layout = probe()
    except ProbeError as problem:
        return Finding(
            "Unicorn's probes",
            str(problem),
            "The portable CPU is used: the same results, more slowly",
            needed=False,
        )
    return Finding(
        "Unicorn's probes",
        f"registers at byte {layout.general}, error code at {layout.error_code}, counter at {layout.counter}",
    )


def assembler() -> Finding:
    """Whether a line can be assembled."""
    from xenlab.machine.assembler import assemble

    code = assemble("nop").code
    return Finding("assembler", f"nop is {code.hex()}", "" if code == b"\x90" else f"90 was expected. {_reinstall()}")


def guest() -> Finding:
    """Whether a guest runs."""
    from xenlab import Hypervisor, boot

    xen = Hypervisor()
    domain = boot(xen, _GUEST)
    xen.run(100)
    good = domain.console == "ok"
    return Finding(
        "a guest in six lines", f"printed {domain.console!r}", "" if good else f"'ok' was expected. {_reinstall()}"
    )


def kernel() -> Finding:
    """Whether notebooks run in this Python."""
    from jupyter_client.kernelspec import KernelSpecManager

    command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    here = not os.path.isabs(command) or os.path.realpath(command) == os.path.realpath(sys.executable)
    advice = f"Notebooks would run in another Python. Run: {sys.executable} -m ipykernel install --sys-prefix"
    return Finding("notebook kernel", command, "" if here else advice)


def widgets() -> Finding:
    """Whether JupyterLab has the browser's side of the live views."""
    from jupyter_core.paths import jupyter_path

    wanted = ("anywidget", "@jupyter-widgets/jupyterlab-manager")
    folders = [Path(folder) for folder in jupyter_path("labextensions")]
    missing = [name for name in wanted if not any((folder / name).is_dir() for folder in folders)]
    advice = f"Live views stay still. {_reinstall()}" if missing else ""
    return Finding("widgets in JupyterLab", f"without {', '.join(missing)}" if missing else ", ".join(wanted), advice)


def browser() -> Finding:
    """Whether ``xenlab lab`` can open one."""
    from xenlab.cli.lab import has_browser

    found = has_browser()
    advice = "`xenlab lab` prints the address to open instead"
    return Finding("browser", "found" if found else "none found", "" if found else advice, needed=False)


def course() -> Finding:
    """Whether the lessons are there."""
    from xenlab.cli.places import lessons

    try:
        found = lessons()
    except XenlabError as problem:
        return Finding("lessons", "none", str(problem))
    return Finding("lessons", f"{len(found)} in {found[0].parent}")


def sandbox() -> Finding:
    """What keeps a submission apart while it is graded: today, on every system, less than a sandbox."""
    limits = "a time limit" if sys.platform == "win32" else "limits on time and memory"
    return Finding(
        "grading",
        f"each submission runs in a process of its own with {limits}",
        "Results are marked untrusted: a namespace sandbox is not used yet",
        needed=False,
    )
