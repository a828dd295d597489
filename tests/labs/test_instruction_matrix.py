"""The matrix's cells, asked of the CPU."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from xenlab.errors import AssemblyError
from xenlab.labs.instruction_matrix import INSTRUCTIONS, execute, run_matrix
from xenlab.machine.vectors import INVALID_OPCODE, PROTECTION
from xenlab.views import InstructionMatrix, Outcome

PRIVILEGED = {
    "hlt",
    "cli",
    "sti",
    "mov eax, cr0",
    "mov eax, cr3",
    "mov cr0, edx",
    "lgdt [ebx]",
    "lidt [ebx]",
    "invlpg [ebx]",
    "wbinvd",
}
HARMLESS = {"add eax, ecx", "cpuid"}


@pytest.fixture(scope="module")
def matrix() -> InstructionMatrix:
    return run_matrix()


def test_every_instruction_is_in_its_class(matrix: InstructionMatrix) -> None:
    holes = {row.instruction for row in matrix.rows if row.is_hole}
    assert holes == set(INSTRUCTIONS) - PRIVILEGED - HARMLESS
    for row in matrix.rows:
        ring0, *outer = row.cells
        assert ring0.outcome is Outcome.EXECUTES
        if row.instruction in PRIVILEGED:
            assert [(cell.outcome, cell.vector) for cell in outer] == [(Outcome.TRAPS, PROTECTION)] * 2


def test_holes_of_both_kinds(matrix: InstructionMatrix) -> None:
    outcome = {row.instruction: row.cells[-1].outcome for row in matrix.rows}
    assert outcome["popf"] is outcome["mov eax, cs"] is outcome["lar eax, ecx"] is Outcome.DIFFERS
    assert outcome["sgdt [ebx]"] is outcome["smsw eax"] is outcome["pushf"] is Outcome.REVEALS


def test_picture_and_table_name_every_hole(matrix: InstructionMatrix) -> None:
    text = matrix.text()
    assert text.count("sensitive, does not trap") == 13
    root = ElementTree.fromstring(matrix.svg())
    drawn = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert drawn.count("!") == 13
    assert len(matrix.svg()) + len(text) < 60_000


def test_the_picture_follows_the_instructions() -> None:
    assert run_matrix(["cli"]).text() != run_matrix(["sgdt [ebx]"]).text()
    assert execute("ud2", 3).vector == INVALID_OPCODE


def test_mistyped_instruction_is_refused() -> None:
    with pytest.raises(AssemblyError):
        run_matrix(["movv eax, 1"])
