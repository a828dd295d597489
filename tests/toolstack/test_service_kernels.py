"""Kernels in C, written from Xen's headers, check the small hypercalls, I/O privilege and the virtual processor.

What they check stands in ``kernels/*.c``, as for `test_memory_kernels`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from test_memory_kernels import run
from typer.testing import CliRunner

from xenlab.abi.numbers import Shutdown
from xenlab.cli.app import app
from xenlab.hypervisor import auditor

Compile = Callable[..., Path]
KERNELS = ("services", "ports", "processor")
ONLY_ORDINARY = {
    "which is denied",
    "reading the interrupt controller",
    "adding a device",
    "setting up an interrupt",
}


def checks(source: Path, initial: bool) -> list[str]:
    """The names of the checks in a kernel's source that are made, in their order."""
    found = re.findall(r'^\s+(?:same|answer)\("([^"]+)",', source.read_text(), re.MULTILINE)
    return [name for name in dict.fromkeys(found) if not (initial and name in ONLY_ORDINARY)]


@pytest.mark.parametrize("initial", [False, True], ids=["ordinary", "initial"])
@pytest.mark.parametrize("pae", [0, 1], ids=["two-level", "PAE"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_answered_as_by_xen(
    compile_kernel: Compile, repository: Path, name: str, pae: int, initial: bool
) -> None:
    xen, domain = run(compile_kernel(name, pae=pae), pae, initial)
    expected = [f"ok {check}" for check in checks(repository / f"tests/toolstack/kernels/{name}.c", initial)]
    assert domain.console.splitlines() == [*expected, "passed"], domain.console + domain.report
    assert domain.shutdown is Shutdown.POWEROFF
    auditor.check(xen)


HEADERS = ("xen.h", "version.h", "features.h", "sched.h", "physdev.h", "callback.h", "nmi.h", "errno.h")
HEADERS += ("hvm/hvm_op.h", "sysctl.h", "domctl.h", "platform.h", "arch-x86/cpuid.h")


def their_name(name: str) -> str:
    """Xen's name for a number of ``services.h``."""
    if re.fullmatch(r"E[A-Z0-9]+", name):
        return f"XEN_{name}"
    named = name.startswith(("XEN_SYSCTL", "XEN_DOMCTL", "XEN_CPUID", "XENPF", "PHYSDEVOP"))
    return name if named or not re.fullmatch(r"[A-Z_]+", name) else f"__HYPERVISOR_{name.lower()}"


@pytest.mark.skipif(not Path("/usr/include/xen/xen.h").exists(), reason="needs Xen's headers (Debian: libxen-dev)")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_declarations_of_these_kernels_are_xens(repository: Path, tmp_path: Path) -> None:
    text = (repository / "tests/toolstack/kernels/services.h").read_text()
    ours = dict(re.findall(r"\b([A-Z][A-Za-z0-9_]+) = ((?:0x)?[0-9a-f]+)\b", text))
    assert len(ours) > 60
    lines = ["#include <stdint.h>", "#define __XEN_TOOLS__", "#define __XEN_INTERFACE_VERSION__ 0x00040d00"]
    lines += [f"#include <xen/{header}>" for header in HEADERS]
    lines += [f'_Static_assert({value} == {their_name(name)}, "{name}");' for name, value in ours.items()]
    source = tmp_path / "declarations.c"
    source.write_text("\n".join(lines) + "\n")
    command = ["gcc", "-m32", "-ffreestanding", "-fsyntax-only", source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("pae", [0, 1], ids=["two-level", "PAE"])
def test_kernel_that_starts_like_a_test_framework(compile_kernel: Compile, pae: int) -> None:
    """By the command, linked to address 0 as such kernels are: each line comes twice, by console_io and by the ring."""
    kernel = compile_kernel("framework", pae=pae, base=0)
    result = CliRunner().invoke(app, ["boot", str(kernel), "--memory", "16", "--max-instructions", "20000000"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        *["--- a kernel that starts like a test framework ---"] * 2,
        *["Test result: SUCCESS"] * 2,
    ]
