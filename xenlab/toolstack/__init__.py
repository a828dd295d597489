"""What the control domain's tools do: build, boot, pause and destroy domains (paper 2.3, 3.4)."""

from __future__ import annotations

from pathlib import Path

from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import Domain
from xenlab.machine.paging import TWO_LEVEL, PagingMode
from xenlab.toolstack.build import build
from xenlab.toolstack.image import Image, image_from_elf, image_from_source, load_image


def boot(
    hypervisor: Hypervisor,
    guest: str | Path | Image,
    *,
    name: str = "guest",
    memory_mib: int = 1,
    command_line: str = "",
    privileged: bool = False,
    mode: PagingMode = TWO_LEVEL,
    max_vcpus: int = 1,
) -> Domain:
    """Build a domain and let it run with the next ``hypervisor.run``.

    Args:
        hypervisor: the machine to run it on.
        guest: assembly source, the path of an ELF file, or an `Image`.
        name: for people; an image's own name is kept.
        memory_mib: the domain's memory in MiB.
        command_line: what the guest finds in ``start_info``.
        privileged: whether it is the initial domain.
        mode: page-table format for a guest from source.
        max_vcpus: how many vCPUs its kernel may start, the first included.

    Returns:
        The domain; ``domain.console`` is what it printed.

    Raises:
        AssemblyError, ImageError, MachineError: see `image_from_source` and `build`.
    """
    if isinstance(guest, str):
        image = image_from_source(guest, name, mode)
    else:
        image = load_image(guest) if isinstance(guest, Path) else guest
    domain = build(
        hypervisor,
        image,
        memory_mib=memory_mib,
        command_line=command_line,
        privileged=privileged,
        max_vcpus=max_vcpus,
    )
    hypervisor.unpause(domain)
    return domain


__all__ = ["Image", "boot", "build", "image_from_elf", "image_from_source", "load_image"]
