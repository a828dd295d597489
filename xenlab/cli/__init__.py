"""The command line: lab, boot, bench, grade, release, doctor."""

from __future__ import annotations


def main() -> None:
    """Run the ``xenlab`` command."""
    from xenlab.cli.app import app

    app(prog_name="xenlab")
