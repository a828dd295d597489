"""Every lesson shows the same where the probes of the library's layout fail and the slower CPU is used."""

from __future__ import annotations

import ast
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from xenlab.labs import lesson01
from xenlab.labs.instruction_matrix import run_matrix
from xenlab.labs.lesson01 import Observation, observe
from xenlab.machine.layout import ProbeError
from xenlab.machine.machine import Machine
from xenlab.machine.portable import PortableCpu
from xenlab.views.picture import Picture
from xenlab.views.widget import LiveView

# Hundreds of domains take minutes on the portable CPU.
LONG = "10-scheduling"
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# Beyond the lessons' table: segment loads, faults of all kinds, system registers, ways that leave the engine.
MORE_INSTRUCTIONS = (
    "mov eax, ss", "push ss", "mov ss, si", "mov fs, si", "mov gs, cx", "mov cs, cx", "mov edx, 0x1234; mov ds, dx",
    "lldt cx", "ltr cx", "str eax; sldt ecx", "clts", "lmsw cx", "mov eax, cr4", "mov cr4, ecx", "mov cr3, edx",
    "mov eax, dr7", "rdmsr", "int 3", "int 13", "div al", "mov eax, [0x200000]", "mov [0x200000], eax", "iretd",
    "retf", "in al, 0x60", "syscall", "push 0x102; popf; nop", "ud2",
)  # fmt: skip
# `observe` runs them one by one, so that each finds in place what the one before has loaded.
RING_0 = (
    "push cs; pop eax; mov ebx, cs; mov ecx, ss; mov edx, ds",
    "mov ecx, cs; lar eax, ecx; lsl ebx, ecx",
    "mov eax, ss; mov ss, eax; push esp; pop eax",
    "mov eax, cs; push eax; push offset 1f; retf; 1: nop",
    "mov eax, 0; mov ds, eax; mov eax, [buffer]",
    "mov dword ptr [buffer + 2], 0x12345; lgdt [buffer]; nop; sgdt [buffer + 8]; mov eax, [buffer + 10]",
    "mov dword ptr [buffer + 2], 0x12345; lidt [buffer]; nop; sidt [buffer + 8]; mov eax, [buffer + 10]",
    "mov eax, cr4; or eax, 8; mov cr4, eax; mov ebx, cr4",
    "mov eax, cr0; xor eax, 2; mov cr0, eax; mov ebx, cr0; clts; smsw ecx",
    "cli; pushf; pop eax; sti; hlt; pushf; pop ebx",
    "push 0x3202; popf; pushf; pop eax",
    "fldpi; fstp dword ptr [buffer]; mov eax, [buffer]",
    "mov eax, [0xfd000000]",
    "mov eax, [0x1000]",
    "in al, 0x60",
    "mov eax, 17; int 0x82",
)


@pytest.fixture
def fail_probes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and every machine made from then on has the portable CPU."""

    def fail() -> None:
        raise ProbeError("forced")

    def force() -> None:
        monkeypatch.setattr("xenlab.machine.machine.probe", fail)
        assert isinstance(Machine(1).cpu, PortableCpu)

    return force


def test_the_matrix_is_the_same(fail_probes: Any) -> None:
    probed = run_matrix().rows
    fail_probes()
    assert run_matrix().rows == probed


def test_the_matrix_of_other_instructions_is_the_same(fail_probes: Any) -> None:
    instructions = [text.replace(";", "\n") for text in MORE_INSTRUCTIONS]
    probed = run_matrix(instructions).rows
    assert {cell.vector for row in probed for cell in row.cells} >= {None, 0, 1, 3, 6, 13, 14}
    fail_probes()
    assert run_matrix(instructions).rows == probed


def seen(found: Observation) -> tuple[object, ...]:
    assert found.xen.trace is not None
    return found.before, found.after, found.traps, found.xen.trace.raw(), found.xen.domains[0].report


def test_code_in_ring_0_does_the_same(fail_probes: Any) -> None:
    probed = {code: seen(observe(code, 0)) for code in RING_0}
    fail_probes()
    assert {code: seen(observe(code, 0)) for code in RING_0} == probed


def test_a_saved_state_of_ring_0_keeps_its_system_registers(fail_probes: Any) -> None:
    fail_probes()
    source = "start: mov eax, cr0\nxor eax, 2\nmov cr0, eax\nlidt [table]\nagain: smsw ebx\nsidt [place]\njmp again\n"
    source += "table: .word 7\n.long 0x12345\nplace: .skip 8"
    first, second = lesson01.kernel(source, ring=0), lesson01.kernel(source, ring=0)
    first.run(5)
    state = second.domains[0].vcpus[0].state
    state.restore(first.domains[0].vcpus[0].state.save())
    second.run(3)
    vcpu, place = second.domains[0].vcpus[0], second.domains[0].symbols["place"]
    assert not state.ebx & 2
    assert second.guest_memory.read(vcpu, place, 6) == bytes.fromhex("070045230100")


def parts(cell: str, name: str) -> tuple[CodeType, CodeType | None]:
    """A cell's statements, and its last expression, whose value Jupyter shows."""
    tree = ast.parse(cell)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        return compile(tree, name, "exec"), None
    tree.body.pop()
    return compile(tree, name, "exec"), compile(ast.Expression(last.value), name, "eval")


def shown(value: Any) -> Any:
    if isinstance(value, LiveView):
        return value.frames
    return (value.text(), value.svg()) if isinstance(value, Picture) else repr(value)


def outputs(notebook: Path, measured: bool = True) -> list[tuple[str, str, Any]]:
    """Each code cell, what it printed, and what it showed; those that measure the host only if that is wanted."""
    found: list[tuple[str, str, Any]] = []
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            # Times are the host's, and only the faster CPU keeps stale translations.
            hosts, stale = "call_ns" in source or "update_ns" in source, "cpu_keeps_stale_entries" in source
            if hosts and not measured:
                found.append((source, "", None))
                continue
            statements, expression = parts(source, f"{notebook.name}, cell {len(found)}")
            with redirect_stdout(io.StringIO()) as printed:
                exec(statements, names)
                value = eval(expression, names) if expression else None
            silent = hosts or stale or "throughput" in source
            found.append((source, "" if silent else printed.getvalue(), None if hosts or stale else shown(value)))
    return found


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(path, marks=pytest.mark.storm if path.stem == LONG else ()) for path in NOTEBOOKS],
    ids=[path.stem for path in NOTEBOOKS],
)
def test_a_lesson_prints_and_shows_the_same(notebook: Path, fail_probes: Any) -> None:
    probed = outputs(notebook)
    fail_probes()
    assert outputs(notebook, measured=False) == probed


def test_all_lessons_are_compared() -> None:
    assert {path.name[:2] for path in NOTEBOOKS} >= {"00", "01", "02", "03", "04", "05"}
