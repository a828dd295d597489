"""Kernels in C, written from Xen's headers, check the memory interface: each prints a line for each check.

What they check stands in ``kernels/*.c``, in the order in which it is checked: that is the list of lines expected.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from xenlab import Hypervisor, Machine
from xenlab.abi.numbers import Shutdown
from xenlab.hypervisor import auditor
from xenlab.hypervisor.domain import Domain
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.toolstack import boot

Compile = Callable[..., Path]
KERNELS = ("frames", "calls", "faults", "spaces", "writable", "descriptors")
IDLE = "start: jmp start"
LONGEST = 2_000_000
# Checks that are made in one format of page tables only, or by one kind of domain only.
ONLY_PAE = {
    "commands that do not exist",
    "last entry of the root",
    "page mapped not to execute",
    "load from a page not to execute",
    "call of a page not to execute",
    "page mapped to execute again",
    "call of a page again",
    "the old root and its l2 tables are pages, its l1 tables are in use",
    "lower half first",
    "upper half is cleared first",
    "upper half that names no frame",
    "after both halves",
    "store to the table above",
    "long code is refused",
}
ONLY_ORDINARY = {
    "frame behind the end of memory",
    "uncached page",
    "frames of another",
    "tables of another",
    "update_va_mapping_otherdomain",
    "MMUEXT_FLUSH_CACHE",
}
ONLY_INITIAL = {
    "frames of itself by number",
    "tables of itself by number",
    "another's frame as one's own",
    "another's frame",
    "another's frame is written",
    "one's own frame as another's",
    "another's frame as a table",
    "another's frame by update_va_mapping_otherdomain",
    "the same frame",
}


def checks(source: Path, pae: int, initial: bool) -> list[str]:
    """The names of the checks in a kernel's source that are made, in their order."""
    left_out = (set() if pae else ONLY_PAE) | (ONLY_ORDINARY if initial else ONLY_INITIAL)
    found = re.findall(r'^\s+(?:same|answer)\("([^"]+)",', source.read_text(), re.MULTILINE)
    # A name that stands there twice is one check, whose answer depends on who asks.
    return [name for place, name in enumerate(found) if name not in left_out and name not in found[:place]]


def run(kernel: Path, pae: int, initial: bool) -> tuple[Hypervisor, Domain]:
    """Run ``kernel`` to its end beside another domain: as domain 0, or as an ordinary one beside domain 0."""
    xen, mode = Hypervisor(Machine(16)), PAE if pae else TWO_LEVEL
    first = boot(xen, IDLE, memory_mib=1, mode=mode, privileged=not initial)
    text, other = f"other={first.domid}", first
    if initial:
        other = boot(xen, IDLE, memory_mib=1, mode=mode)
        xen.destroy(first)
        text = f"initial=1 other={other.domid} frame={other.frames[1]}"
    xen.pause(other)
    domain = boot(xen, kernel, memory_mib=4, command_line=text, privileged=initial)
    assert (domain.domid == 0) is initial
    xen.run(LONGEST)
    return xen, domain


@pytest.mark.parametrize("initial", [False, True], ids=["ordinary", "initial"])
@pytest.mark.parametrize("pae", [0, 1], ids=["two-level", "PAE"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_answered_as_by_xen(
    compile_kernel: Compile, repository: Path, name: str, pae: int, initial: bool
) -> None:
    xen, domain = run(compile_kernel(name, pae=pae), pae, initial)
    expected = [f"ok {check}" for check in checks(repository / f"tests/toolstack/kernels/{name}.c", pae, initial)]
    assert domain.console.splitlines() == [*expected, "passed"], domain.console + domain.report
    assert domain.shutdown is Shutdown.POWEROFF
    auditor.check(xen)


def test_other_answers_are_seen(compile_kernel: Compile) -> None:
    """An ordinary domain that was told to be the initial one is refused what it then expects."""
    xen = Hypervisor(Machine(16))
    other = boot(xen, IDLE, memory_mib=1, mode=PAE, privileged=True)
    xen.pause(other)
    text = f"initial=1 other=0 frame={other.frames[1]}"
    domain = boot(xen, compile_kernel("calls", pae=1), memory_mib=4, command_line=text)
    xen.run(LONGEST)
    assert domain.shutdown is Shutdown.CRASH
    line = "FAIL another's frame: expected 0x0000000000000000 got 0x00000000ffffffff\n"
    assert line in domain.console
    assert domain.console.endswith("failed\n")


HEADERS = ("xen.h", "memory.h", "errno.h")
SIZES = {
    "mmu_update": "ptr val",
    "mmuext_op": "cmd arg1 arg2",
    "xen_memory_reservation": "extent_start nr_extents extent_order mem_flags domid",
    "xen_memory_exchange": "in out nr_exchanged",
    "xen_machphys_mapping": "v_start v_end max_mfn",
    "trap_info": "vector flags cs address",
    "multicall_entry": "op result args",
    "vcpu_info": "evtchn_upcall_pending evtchn_upcall_mask evtchn_pending_sel",
}


def declared(text: str) -> dict[str, str]:
    """Our names of numbers in ``memory.h``, and Xen's names for them."""
    found = re.findall(r"\b([A-Z][A-Za-z0-9_]+) = (?:0x)?[0-9a-f]+\b", text)
    hypercalls = text[text.index("SET_TRAP_TABLE") : text.index("MMUEXT_OP =")] + "MMUEXT_OP"
    names = {}
    for name in found:
        if re.search(rf"\b{name}\b", hypercalls):
            names[name] = f"__HYPERVISOR_{name.lower()}"
        elif re.fullmatch(r"E[A-Z]+", name):
            names[name] = f"XEN_{name}"
        elif name.startswith(("MMU", "UVMF_", "XENMEM_", "VMASST_", "DOMID_", "FLAT_")):
            names[name] = name
    return names


@pytest.mark.skipif(not Path("/usr/include/xen/xen.h").exists(), reason="needs Xen's headers (Debian: libxen-dev)")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_declarations_of_these_kernels_are_xens(repository: Path, tmp_path: Path) -> None:
    kernels = repository / "tests/toolstack/kernels"
    names = declared((kernels / "memory.h").read_text())
    assert len(names) > 50
    lines = [
        "#include <stdint.h>",
        "#define PAE 1",
        *(f"#define {name} our_{name}" for name in (*SIZES, "shared_info")),
    ]
    lines += ['#include "memory.h"', *(f"#undef {name}" for name in (*SIZES, "shared_info"))]
    lines += [f"enum {{ ours_of_{name} = {name} }};" for name in names]
    lines += ["#undef shared_info", "#define start_info xen_start_info"]
    lines += ["#define __XEN_INTERFACE_VERSION__ 0x00040d00", *(f"#include <xen/{header}>" for header in HEADERS)]
    lines += [f'_Static_assert(ours_of_{name} == {theirs}, "{name}");' for name, theirs in names.items()]
    for name, fields in SIZES.items():
        ours, theirs = f"struct our_{name}", f"struct {name}"
        lines.append(f'_Static_assert(sizeof({ours}) == sizeof({theirs}), "size of {name}");')
        for field in fields.split():
            offsets = [f"__builtin_offsetof({structure}, {field})" for structure in (ours, theirs)]
            lines.append(f'_Static_assert({offsets[0]} == {offsets[1]}, "{name}.{field}");')
    lines.append('_Static_assert(__builtin_offsetof(struct our_vcpu_info, cr2) == 8, "cr2");')
    source = tmp_path / "declarations.c"
    source.write_text("\n".join(lines) + "\n")
    command = ["gcc", "-m32", "-ffreestanding", "-fsyntax-only", "-I", kernels, source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
