"""The commands and their options.  What each does stands in a module that is imported when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from xenlab.errors import XenlabError

FAILURE = 2


class _Commands(TyperGroup):
    """Errors that are meant for the user end a command with their message, not with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except XenlabError as error:
            _note(f"xenlab: {error}")
            raise typer.Exit(FAILURE) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A small x86 hypervisor to learn from, and a course on it.",
)


def _note(text: str) -> None:
    typer.echo(text, err=True)


@app.command()
def lab(
    check: Annotated[bool, typer.Option("--check", help="Execute every lesson and print a line for each.")] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where JupyterLab listens; 8888 or near it if not given.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, open nothing.")] = False,
) -> None:
    """Open the lessons in JupyterLab."""
    from xenlab.cli import places

    lessons = places.lessons()
    if check:
        raise typer.Exit(_check(lessons))
    from xenlab.cli.lab import open_lab

    home = places.clone()
    raise typer.Exit(open_lab(home, lessons[0].relative_to(home), port, browser=not no_browser, note=typer.echo))


def _check(lessons: list[Path]) -> int:
    from xenlab.cli.lab_check import check_lessons

    width = max(len(lesson.stem) for lesson in lessons)
    failed = False
    for outcome in check_lessons(lessons):
        typer.echo(outcome.line(width))
        failed = failed or bool(outcome.problem)
    return int(failed)


@app.command()
def boot(
    image: Annotated[Path, typer.Argument(help="ELF kernel with Xen notes, or assembly source (.s, .asm).")],
    memory: Annotated[int, typer.Option(metavar="MIB", help="The guest's memory in MiB.")] = 32,
    max_instructions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Give up after so many instructions; never if not given.")
    ] = None,
    cmdline: Annotated[str, typer.Option(metavar="S", help="The guest's command line.")] = "",
    privileged: Annotated[bool, typer.Option("--privileged", help="Boot it as the initial domain.")] = False,
    vcpus: Annotated[int, typer.Option(metavar="N", help="How many virtual CPUs its kernel may start.")] = 1,
) -> None:
    """Boot a guest with this terminal as its console.

    Exit status: 0 the guest shut itself down, 2 it cannot be loaded, 3 it crashed, 4 it did not end (its
    instructions ran out, or it sleeps and standard input has ended), 130 Ctrl-C.
    """
    from xenlab.cli.boot import Order, Session
    from xenlab.cli.keyboard import standard_input

    order = Order(image, memory, max_instructions, cmdline, privileged, vcpus)
    raise typer.Exit(int(Session(order, standard_input(), sys.stdout.buffer, _note).run()))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="All quick ones if none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Repetitions, in turns with the floor.")] = 51,
    everything: Annotated[bool, typer.Option("--all", help="The slow ones too.")] = False,
) -> None:
    """Measure, as ratios to a bare trap into Python in the same run."""
    from rich.console import Console

    from xenlab.cli.bench import measure, select

    selected = select(names or [], everything=everything)
    with Console(stderr=True).status("measuring") as status:
        results = measure(selected, repeat, status.update)
    if as_json:
        typer.echo(results.to_json())
    else:
        Console().print(results.table())


@app.command()
def grade(
    submissions: Annotated[list[Path], typer.Argument(metavar="SUBMISSION...", help="Notebooks that were handed in.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one list, an object for each submission.")] = False,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="How many are graded at once.")] = 1,
) -> None:
    """Grade submissions, each in a process of its own."""
    import json

    from xenlab.grading import grade as judge

    reports = judge(submissions, workers=workers)
    if as_json:
        typer.echo(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        typer.echo("\n\n".join(report.text() for report in reports))


@app.command()
def release(
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write what students get, without solutions, into DIR.")
    ] = None,
) -> None:
    """Generate exercises/ from solutions/."""
    from xenlab.cli import places
    from xenlab.grading.release import release as generate

    for written in generate(places.folder("solutions"), places.clone() / "exercises", bundle=bundle):
        typer.echo(written)


@app.command()
def doctor() -> None:
    """Check the installation: a line for each thing, and what to do where one is missing."""
    from xenlab.cli.doctor import examine

    missing = False
    for finding in examine():
        typer.echo(finding.line())
        missing = missing or finding.verdict == "MISSING"
    raise typer.Exit(int(missing))
