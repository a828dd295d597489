"""From our assembly language to LLVM's, line by line, remembering where each column came from.

Problem: LLVM's Intel syntax takes ';' for a separator, has no far jumps and no jumps to fixed addresses, and in 32-bit
code silently makes 16-bit forms of ``iret``, ``pushf``, ``push ds`` and ``push offset x``, and a memory operand of a
constant like ``len = . - message``.  Students should write what the processor's manual says.
Invariant: line n of the source is line n + 1 of the output (after one line of predefined constants), and every
character of the output knows the source column that it stands for.  Without it, errors would point at the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import accumulate


def word_list(text: str) -> tuple[str, ...]:
    """The blank-separated words of ``text``: tables of names read better so."""
    return tuple(text.split())


LINE_LABEL = "xenlab$line$"
VALUE = "xenlab$value$"
REGISTERS = word_list("""
    eax ebx ecx edx esi edi ebp esp ax bx cx dx si di bp sp al ah bl bh cl ch dl dh cs ds es fs gs ss cr0 cr2
    cr3 cr4 dr0 dr1 dr2 dr3 dr6 dr7
""")
NAME = r"[A-Za-z_.$][\w.$]*"
HEAD = re.compile(rf"(?P<labels>\s*(?:(?:{NAME}|\d+)\s*:(?!:)\s*)*)(?P<word>[A-Za-z_.][\w.]*)?(?P<rest>.*)", re.S)
LABEL = re.compile(rf"({NAME})\s*:")
EQUATE = re.compile(rf"\s*(?:({NAME})\s*={{1,2}}(?!=)\s*(.*)|\.(?:set|equ|equiv)\s+({NAME})\s*,\s*(.*))", re.S)
WORD = re.compile(rf"(?<![\w.$]){NAME}")
PREDEFINABLE = re.compile(r"[A-Za-z_]\w*")
TOKENS = re.compile(r'"(?:\\.|[^"\\])*"?|\'(?:\\.|[^\\])\'|/\*|//|[#;]', re.S)
BODIES = {".macro", ".rept", ".rep", ".irp", ".irpc"}
BODY_ENDS = {".endm", ".endmacro", ".endr"}
DATA = word_list("""
    .rept .rep .irp .irpc .byte .short .value .word .2byte .long .int .4byte .quad .8byte .octa .ascii .asciz
    .string .fill .skip .space .zero .float .single .double
""")

# What LLVM calls the 32-bit form (or the 16-bit one) of what the manual calls by these names.
RENAMED = {"iret": "iretd", "iretw": "iret", "pushf": "pushfd", "popf": "popfd", "xlat": "xlatb"}
SEGMENT_REGISTER = re.compile(r"\s*([cdefgs]s)\s*", re.I)
FROM_SEGMENT = re.compile(r"\s*(?:[abcd]x|[sd]i|[sb]p)\s*,\s*[cdefgs]s\s*", re.I)
PUSHED_ADDRESS = re.compile(r"\s*(?:dword\s+ptr\s+)?offset\s+(.+)", re.I | re.S)
FAR = re.compile(r"\s*(?:far\s+(?:ptr\s+)?)?([^:\[\]\"]+?)\s*:\s*(?:offset\s+)?([^:\[\]\"]+)", re.I | re.S)
FAR_PAIR = re.compile(r"\s*([^,\[\]]+?)\s*,\s*(?:offset\s+)?([^,\[\]]+)", re.I | re.S)
FAR_MEMORY = re.compile(r"(\s*)far\s+(?:ptr\s+)?(\[.*)", re.I | re.S)
BRANCH = re.compile(r"(?:jmp|call|j[a-z]{1,4}|loop\w*)", re.I)
FIXED_TARGET = re.compile(r"\s*(?:0x[0-9a-f]+|\d+)\s*(?:[-+].*)?|\s*\.\s*(?:[-+].*)?", re.I | re.S)
ARITHMETIC = re.compile(r"[\w.$\s()*/+~<>&|^-]+")
SEGMENT_OVERRIDE = re.compile(r"\b[cdefgs]s\s*:", re.I)
ATT, INTEL = ".att_syntax; ", "; .intel_syntax noprefix"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some output text: copied from the source at 0-based ``column``, or put there in place of what stood there."""

    text: str
    column: int
    copied: bool = True


@dataclass(frozen=True, slots=True)
class Line:
    """A source line without comments (``kept``), also without the insides of strings (``bare``): equally long."""

    kept: str
    bare: str

    @property
    def labels(self) -> list[str]:
        """The labels that stand before the statement."""
        return LABEL.findall(self._head["labels"])

    @property
    def word(self) -> str:
        """The mnemonic or directive in lower case, or ""."""
        return (self._head["word"] or "").lower()

    @property
    def operands_at(self) -> int:
        """0-based column behind the mnemonic."""
        return self._head.start("rest")

    @property
    def word_at(self) -> int:
        """0-based column of the statement behind its labels."""
        return self._head.end("labels")

    @property
    def _head(self) -> re.Match[str]:
        match = HEAD.match(self.bare)
        assert match is not None  # every part of the pattern is optional
        return match

    @property
    def equate(self) -> tuple[str, str] | None:
        """Name and expression, if this is ``name = expression`` or ``.set name, expression``."""
        match = EQUATE.fullmatch(self.bare[self.word_at :])
        return (match[1] or match[3], match[2] or match[4] or "") if match else None


def split_lines(source: str) -> list[Line]:
    """The source's lines, comments blanked; a block comment and a string may run over several."""
    text = source.replace("\r\n", "\n")
    kept, bare, at = [], [], 0
    while match := TOKENS.search(text, at):
        begin, quoted = match.start(), match[0][0] in "\"'"
        end = match.end() if quoted else _comment_end(text, begin)
        token = text[begin:end] if quoted else _blank(text[begin:end])
        kept += [text[at:begin], token]
        bare += [text[at:begin], token[:1] + _blank(token[1:-1], "\x01") + token[1:][-1:] if quoted else token]
        at = end
    kept.append(text[at:])
    bare.append(text[at:])
    return [Line(*pair) for pair in zip("".join(kept).split("\n"), "".join(bare).split("\n"), strict=True)]


def _comment_end(text: str, begin: int) -> int:
    block = text.startswith("/*", begin)
    end = text.find("*/" if block else "\n", begin + 2 * block)
    return len(text) if end < 0 else end + 2 * block


def _blank(text: str, filler: str = " ") -> str:
    return re.sub(r"[^\n]", filler, text)


def words(line: Line) -> list[str]:
    """The names that a line uses, outside strings."""
    return WORD.findall(line.bare)


def register_bits(operand: str) -> int:
    """The width of a general register; 0 for any other operand."""
    if operand.lower() not in REGISTERS[:24]:
        return 0
    return 32 if operand.lower().startswith("e") else 8 if operand[-1:].lower() in "lh" else 16


def defined_names(lines: list[Line]) -> set[str]:
    """What the source itself defines: labels and equates."""
    return {n for line in lines for n in line.labels} | {e[0] for line in lines if (e := line.equate)}


def constants(lines: list[Line], predefined: Set[str]) -> set[str]:
    """Names of numbers, not addresses: equates of numbers and of differences, and the predefined ones."""
    known = set(predefined)
    for name, expression in (e for line in lines if (e := line.equate)):
        if name.lower() not in REGISTERS and (
            "-" in expression or all(word in known for word in WORD.findall(expression))
        ):
            known.add(name)
    return known


@dataclass(frozen=True, slots=True)
class Translation:
    """The text for LLVM, and the way back from its columns; ``predefined`` are the constants put in front."""

    lines: tuple[Line, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    header: str

    @property
    def text(self) -> bytes:
        """What LLVM is to assemble."""
        body = ("".join(piece.text for piece in line) for line in self.pieces)
        return "\n".join([self.header, *body, ""]).encode()

    def column(self, line: int, byte_column: int) -> int:
        """The 1-based source column for LLVM's 1-based column (in bytes) of the 1-based source line."""
        pieces = self.pieces[line - 1]
        ends = accumulate(len(piece.text.encode()) for piece in pieces)
        for piece, end in zip(pieces, ends, strict=True):
            if byte_column <= end:
                inside = piece.text.encode()[: byte_column - 1 - (end - len(piece.text.encode()))]
                return 1 + piece.column + (len(inside.decode(errors="replace")) if piece.copied else 0)
        return 1 + len(self.lines[line - 1].kept.rstrip())


def translate(lines: list[Line], symbols: Mapping[str, int]) -> Translation:
    """LLVM's form of ``lines``; of ``symbols``, those are defined in front that the source uses and does not define."""
    used = {word for line in lines for word in words(line)} - defined_names(lines)
    used -= {word for word in used if word.lower() in REGISTERS or not PREDEFINABLE.fullmatch(word)}
    predefined = {name: symbols[name] for name in sorted(used & symbols.keys())}
    header = "; ".join([".intel_syntax noprefix; .code32", *(f".set {n}, {v:#x}" for n, v in predefined.items())])
    numbers = constants(lines, predefined.keys())
    pieces, depth = [], 0
    for number, line in enumerate(lines, start=1):
        depth -= line.word in BODY_ENDS
        label = [Piece(f"{LINE_LABEL}{number}: ", 0, False)] if depth <= 0 and _is_placed(line) else []
        pieces.append((*label, *_statement(line, numbers, predefined.keys())))
        depth = max(depth, 0) + (line.word in BODIES)
    return Translation(tuple(lines), tuple(pieces), header)


def _is_placed(line: Line) -> bool:
    """Does the line put bytes into the image, as far as its first word tells?"""
    return bool(line.word) and not line.equate and (not line.word.startswith(".") or line.word in DATA)


def _statement(line: Line, numbers: Set[str], literals: Set[str]) -> list[Piece]:
    if not line.word or line.word.startswith(".") or line.equate:
        return [Piece(line.kept, 0)]
    at, rest = line.operands_at, line.bare[line.operands_at :].rstrip()
    head = [Piece(line.kept[: line.word_at], 0)]
    special = _branch(line, rest, numbers) or _stack(line, rest, numbers)
    if special:
        return head + special
    word = RENAMED.get(line.word) if not rest.strip() else None
    mnemonic = Piece(word, line.word_at, False) if word else Piece(line.kept[line.word_at : at], line.word_at)
    before, operands = _operands(line, numbers, literals)
    return [*head, *before, mnemonic, *operands]


def _in_att(line: Line, instruction: str, *parts: str | tuple[int, int]) -> list[Piece]:
    """An instruction that only AT&T syntax can say; a pair is a span of the operands to copy."""
    pieces = [Piece(f"{ATT}{instruction} ", line.word_at, False)]
    for part in parts:
        if isinstance(part, str):
            pieces.append(Piece(part, line.word_at, False))
        else:
            begin, end = part[0] + line.operands_at, part[1] + line.operands_at
            pieces.append(Piece(line.kept[begin:end], begin))
    return [*pieces, Piece(INTEL, line.word_at, False)]


def _branch(line: Line, rest: str, numbers: Set[str]) -> list[Piece]:
    """Far jumps and calls, and near ones to a fixed address."""
    if line.word in ("ljmp", "lcall", "jmp", "call"):
        match = (FAR_PAIR if line.word[0] == "l" else FAR).fullmatch(rest)
        if match and not SEGMENT_OVERRIDE.search(rest):
            return _in_att(line, "l" + line.word.lstrip("l"), "$", match.span(1), ",$", match.span(2))
        if memory := FAR_MEMORY.fullmatch(rest):
            begin = line.operands_at + memory.start(2)
            word = Piece(line.word.removeprefix("l") + " fword ptr ", line.word_at, False)
            return [word, Piece(line.kept[begin:], begin)]
    if BRANCH.fullmatch(line.word) and (FIXED_TARGET.fullmatch(rest) or _is_constant(rest, numbers)):
        return _in_att(line, line.word, (0, len(rest)))
    return []


def _stack(line: Line, rest: str, numbers: Set[str]) -> list[Piece]:
    """Pushes and pops that must move four bytes, and a move that must not."""
    if line.word == "mov" and FROM_SEGMENT.fullmatch(rest):  # LLVM drops the prefix that spares the upper half
        begin = line.word_at
        return [Piece(".byte 0x66; ", begin, False), Piece(line.kept[begin:], begin)]
    if line.word in ("push", "pop") and (register := SEGMENT_REGISTER.fullmatch(rest)):
        return _in_att(line, line.word + "l", "%", register.span(1))
    if line.word == "push" and _is_constant(rest, numbers):
        return _in_att(line, "pushl", "$(", (0, len(rest)), ")")
    if line.word == "push" and (address := PUSHED_ADDRESS.fullmatch(rest)):
        return _in_att(line, "pushl", "$", address.span(1))
    return []


def _is_constant(operand: str, numbers: Set[str]) -> bool:
    """Is it arithmetic with at least one named number, and nothing else that has a name?"""
    named = WORD.findall(operand)
    return bool(named) and ARITHMETIC.fullmatch(operand) is not None and all(word in numbers for word in named)


def _operands(line: Line, numbers: Set[str], literals: Set[str]) -> tuple[list[Piece], list[Piece]]:
    """Definitions to put before the instruction, and its operands.

    LLVM takes ``len`` for a variable in memory and rejects ``offset len*2``: so each constant expression gets a name
    of its own and stands as ``offset`` of that.
    """
    before: list[Piece] = []
    pieces: list[Piece] = []
    at = line.operands_at
    for operand in line.bare[at:].split(","):
        text = Piece(line.kept[at : at + len(operand)], at)
        if _is_constant(operand, numbers) and not _is_constant(operand, literals):
            name = f"{VALUE}{len(pieces)}"
            before += [Piece(f".set {name},", at, False), text, Piece("; ", at, False)]
            text = Piece(f" offset {name}", at, False)
        pieces += [text, Piece(line.kept[at + len(operand) :][:1], at + len(operand))]
        at += len(operand) + 1
    return before, pieces
