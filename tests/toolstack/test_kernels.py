"""Kernels that a C compiler built from Xen's headers start here, and find everything that the interface promises.

What they look at stands in ``kernels/start_of_day.c``; here is where they are linked to, and what they are started as.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from xenlab import Hypervisor, ImageError, Machine
from xenlab.abi.kernel_notes import Feature
from xenlab.abi.numbers import Shutdown
from xenlab.hypervisor.domain import Domain
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.toolstack import boot, load_image
from xenlab.toolstack.console import DrainConsole

Compile = Callable[..., Path]
PROMISED = "all as promised\n"
SLICE, LONGEST = 20_000, 40_000_000


@pytest.fixture(params=[0, 1], ids=["two-level", "PAE"])
def pae(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


def run(kernel: Path, memory_mib: int, *options: str, privileged: bool = False) -> Domain:
    """Start ``kernel`` and let it run to its end, with its ring drained between slices."""
    xen = Hypervisor(Machine(memory_mib + 4))
    text = " ".join((f"pages={memory_mib * 256}", *options))
    domain = boot(xen, kernel, memory_mib=memory_mib, command_line=text, privileged=privileged)
    while not domain.ended and xen.now < LONGEST:
        xen.submit(DrainConsole(domain.domid))
        xen.run(SLICE)
    xen.submit(DrainConsole(domain.domid))
    xen.run(1)
    return domain


def check(domain: Domain) -> None:
    assert domain.console.endswith(PROMISED), domain.console + domain.report
    assert domain.shutdown is Shutdown.POWEROFF


@pytest.mark.parametrize("memory_mib", [2, 3, 4, 5, 8, 16, 33, 100])
def test_domain_of_any_size(compile_kernel: Compile, pae: int, memory_mib: int) -> None:
    domain = run(compile_kernel("start_of_day", pae=pae), memory_mib)
    check(domain)
    assert domain.console == f"command line: pages={memory_mib * 256}\n{PROMISED}"


@pytest.mark.parametrize("memory_mib", [2, 8, 64])
def test_initial_domain(compile_kernel: Compile, pae: int, memory_mib: int) -> None:
    domain = run(compile_kernel("start_of_day", pae=pae), memory_mib, "initial", privileged=True)
    check(domain)
    assert domain.console_mfn == 0


@pytest.mark.parametrize("base", [0, 0x10_0000, 0x4000_0000, 0xBFF0_0000, 0xC020_0000, 0xF480_0000])
def test_virtual_base_anywhere(compile_kernel: Compile, pae: int, base: int) -> None:
    check(run(compile_kernel("start_of_day", pae=pae, base=base), 8))


# The elements end just before and just behind the last 512 KiB of the 4 MiB that the region would else have.
@pytest.mark.parametrize("offset", [0, 0x1000, *range(0x34_0000, 0x37_0000, 0x4000), 0x3D_C000, 0x40_0000])
def test_padding_behind_the_last_element(compile_kernel: Compile, pae: int, offset: int) -> None:
    check(run(compile_kernel("start_of_day", pae=pae, offset=offset), 16))


def test_every_way_to_print_and_to_call(compile_kernel: Compile, pae: int) -> None:
    for macros in (("BY_RING",), ("WITHOUT_PAGE",), ("BY_RING", "WITHOUT_PAGE")):
        check(run(compile_kernel("start_of_day", *macros, pae=pae), 8))


def test_broken_promises_are_seen(compile_kernel: Compile, pae: int) -> None:
    for privileged, told in ((False, "initial"), (True, "")):
        domain = run(compile_kernel("start_of_day", pae=pae), 2, told, privileged=privileged)
        assert domain.shutdown is Shutdown.CRASH
        assert "BROKEN flags: expected 0x" in domain.console
        assert domain.console.endswith("\nbroken\n")


def test_kernel_from_before_the_notes(compile_kernel: Compile, pae: int) -> None:
    for base in (0, 0xC000_0000):
        kernel = compile_kernel("start_of_day", "LEGACY", pae=pae, base=base, physical=base)
        notes = load_image(kernel).notes
        assert (notes.legacy, notes.guest_os, notes.guest_version) == (True, "xenlab-test", "0.9")
        check(run(kernel, 8))


def test_what_the_notes_say_is_kept(compile_kernel: Compile, pae: int) -> None:
    image = load_image(compile_kernel("start_of_day", pae=pae))
    notes = image.notes
    assert image.mode is (PAE if pae else TWO_LEVEL)
    assert (notes.guest_os, notes.guest_version) == ("xenlab-test", "1.0")
    assert (notes.xen_version, notes.loader) == ("xen-3.0", "generic")
    assert notes.required == {"writable_page_tables"}
    assert notes.supported == {Feature.writable_page_tables, Feature.pae_pgdir_above_4gb, Feature.dom0}
    assert (notes.entry, notes.virt_base, notes.paddr_offset) == (0xC010_0000, 0xC000_0000, None)
    assert (notes.hypercall_page, notes.hv_start_low, notes.suspend_cancel) == (0xC010_1000, 0xF580_0000, True)
    assert load_image(compile_kernel("start_of_day", "WITHOUT_PAGE", pae=pae)).hypercall_page is None


def test_kernel_linked_without_a_thought_to_physical_addresses(compile_kernel: Compile, pae: int) -> None:
    check(run(compile_kernel("start_of_day", pae=pae, physical=0xC000_0000), 8))


def test_region_that_reaches_into_the_hypervisor(compile_kernel: Compile) -> None:
    with pytest.raises(
        ImageError, match=r"0xf5400000 to 0xf5c00000, reaches into the hypervisor's range at 0xf5800000"
    ):
        run(compile_kernel("start_of_day", pae=1, base=0xF540_0000, offset=0x36_0000), 16)
    with pytest.raises(ImageError, match=r"needs 1\d\d\d KiB with its page tables, the domain has 1024 KiB"):
        run(compile_kernel("start_of_day", pae=1), 1)


@pytest.mark.skipif(not Path("/usr/include/xen/xen.h").exists(), reason="needs Xen's headers (Debian: libxen-dev)")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_declarations_of_the_kernels_are_xens(repository: Path, tmp_path: Path) -> None:
    fields = {
        "start_info": "nr_pages shared_info flags store_mfn store_evtchn console.domU.mfn console.dom0.info_size"
        " pt_base nr_pt_frames mfn_list mod_start mod_len cmd_line first_p2m_pfn nr_p2m_frames",
        "xencons_interface": "out in_cons in_prod out_cons out_prod",
    }
    lines = ["#include <stdint.h>"]
    lines += [f"#define {name} our_{name}" for name in fields]
    lines += ['#include "kernel.h"']
    lines += [f"#undef {name}" for name in fields]
    lines += ["#define __XEN_INTERFACE_VERSION__ 0x00040d00", "#include <xen/xen.h>", "#include <xen/io/console.h>"]
    for name, parts in fields.items():
        lines.append(f'_Static_assert(sizeof(struct our_{name}) == sizeof(struct {name}), "size of {name}");')
        for part in parts.split():
            offsets = [f"__builtin_offsetof(struct {prefix}{name}, {part})" for prefix in ("our_", "")]
            lines.append(f'_Static_assert({offsets[0]} == {offsets[1]}, "{part}");')
    source = tmp_path / "declarations.c"
    source.write_text("\n".join(lines) + "\n")
    kernels = repository / "tests/toolstack/kernels"
    command = ["gcc", "-m32", "-ffreestanding", "-fsyntax-only", "-I", kernels, source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
