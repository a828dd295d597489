"""Guest kernels: assembly sources that the lessons, the benchmarks and the tests run."""

from __future__ import annotations

from importlib.resources import files

from xenlab.errors import ImageError


def names() -> list[str]:
    """The guests that come with xenlab."""
    return sorted(entry.name.removesuffix(".s") for entry in files(__name__).iterdir() if entry.name.endswith(".s"))


def source(name: str) -> str:
    """The assembly source of the guest ``name``.  Raises ImageError for a name that is not there."""
    if name not in names():
        raise ImageError(f"guest {name!r}: expected one of {', '.join(names())}")
    return (files(__name__) / f"{name}.s").read_text(encoding="utf-8")
