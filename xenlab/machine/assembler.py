"""The assembler: 32-bit x86 source in Intel syntax to the bytes at an address.

Problem: guests and exercises are written in assembly, and a student's typing error must come back as a sentence about
a line of the source.  `assembler_source` translates to LLVM's dialect, `assembler_process` lets LLVM encode it,
`linker` makes one flat image of the object; `assembler_numbers` refuses what LLVM would cut, `assembler_hints` says
what to write instead.
Invariant: the same source, base and symbols give the same bytes, and each address of an instruction knows its line.
Without it, replay could not rebuild a guest, and a view could not mark the current line.

The language: `mov eax, [ebx+4]`, registers without prefix, `offset label` for a label's address, both ';' and '#'
start a comment; directives are those of the GNU assembler.  `iret`, `pushf`, `popf` and pushes move 32 bits.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from types import MappingProxyType

from xenlab.errors import AssemblyError, XenlabError
from xenlab.machine import assembler_hints as hints
from xenlab.machine.assembler_numbers import macros, oversized, plain_constants, value_of
from xenlab.machine.assembler_process import Rejected, emit_object
from xenlab.machine.assembler_source import (
    BODIES,
    BODY_ENDS,
    LINE_LABEL,
    REGISTERS,
    Line,
    Translation,
    split_lines,
    translate,
    words,
)
from xenlab.machine.linker import ADDRESS_SPACE, IMAGE_LIMIT, Image, LinkError, link

SOURCE_LIMIT = 1 << 20
REFUSED = {
    ".incbin": ("files cannot be put into the image", "write the bytes with `.byte`"),
    ".include": ("files cannot be included", "join the sources in Python before assembling"),
    ".code16": ("only 32-bit code can be assembled", "leave this line out"),
    ".code16gcc": ("only 32-bit code can be assembled", "leave this line out"),
    ".code64": ("only 32-bit code can be assembled", "leave this line out"),
    ".att_syntax": ("only Intel syntax can be assembled", "leave this line out"),
    ".comm": ("common symbols belong to linkers of many files", "write `.bss`, then the label and `.skip SIZE`"),
}
BULK = {".fill", ".skip", ".space", ".zero", ".org", ".rept", ".rep"}
ALIGNMENTS = {".align", ".balign", ".p2align"}
REFUSED_ANYWHERE = re.compile(r"\.inc(?:bin|lude)\b|\.\S*\\\S*\s+\"", re.I)
UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e]")
DIAGNOSTIC = re.compile(r"^<(stdin|instantiation|unknown)>:(\d+)(?::(\d+))?: error: (.*)\n?(.*)", re.M)
DIAGNOSTICS_READ = 100
OUT_OF_MEMORY = re.compile(r"out of memory|bad_alloc|length_error|Allocation failed", re.I)
NO_SYMBOLS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Program:
    """An assembled program.

    Attributes:
        code: the image to place at ``base``: .text, then the other sections, zeros for .bss.
        base: address of the first byte.
        symbols: absolute address of each label.
        lines: (address, 1-based source line), sorted, for each line that puts bytes into the image; the bytes
            of a macro belong to the line that invokes it, those of ``.rept`` to its first line.
    """

    code: bytes
    base: int
    symbols: dict[str, int]
    lines: tuple[tuple[int, int], ...]

    def line_at(self, address: int) -> int | None:
        """The source line whose bytes hold ``address``; None outside the image."""
        if not self.base <= address < self.base + len(self.code):
            return None
        return _line_at(self.lines, address)


def _line_at(lines: Sequence[tuple[int, int]], address: int) -> int | None:
    index = bisect_right(lines, address, key=lambda entry: entry[0])
    return lines[index - 1][1] if index else None


def _placed_lines(labels: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    """(address, line) for each of the labels that `translate` put before a line, sorted."""
    placed = ((at, name.removeprefix(LINE_LABEL)) for name, at in labels.items() if name.startswith(LINE_LABEL))
    return tuple(sorted((at, int(number)) for at, number in placed))


def assemble(source: str, base: int = 0, *, symbols: Mapping[str, int] = NO_SYMBOLS) -> Program:
    """Assemble ``source`` to run at ``base``.

    Args:
        source: 32-bit Intel syntax, at most 1 MiB.
        base: address of the first byte.
        symbols: constants that the source may use by name; what the source defines itself wins.

    Raises:
        AssemblyError: with line, column, problem and hint for the first error, and how many lines more have one.
        XenlabError: the base is no 32-bit address, or LLVM is not installed or failed.
    """
    if not 0 <= base < ADDRESS_SPACE:
        raise XenlabError(f"the base of a program must be a 32-bit address, found {base:#x}")
    program = _assemble(source, base, tuple(sorted((n, v % ADDRESS_SPACE) for n, v in symbols.items())))
    return replace(program, symbols=dict(program.symbols))


@lru_cache(maxsize=256)
def _assemble(source: str, base: int, symbols: tuple[tuple[str, int], ...]) -> Program:
    if len(source) > SOURCE_LIMIT:
        raise AssemblyError(1, 1, f"the source has {len(source)} characters; the limit is {SOURCE_LIMIT} (1 MiB)")
    lines = split_lines(source)
    for number, line in enumerate(lines, start=1):
        _check(number, line)
    _check_numbers(lines, dict(symbols))
    translation = translate(lines, dict(symbols))
    try:
        image = link(emit_object(translation.text), base)
    except Rejected as rejection:
        raise _rejected(rejection.diagnostics, translation) from None
    except LinkError as error:
        raise _unlinkable(error, translation, dict(symbols)) from None
    return _program(image, base)


def _program(image: Image, base: int) -> Program:
    symbols = {name: address for name, address in image.labels.items() if not name.startswith(LINE_LABEL)}
    return Program(image.code, base, symbols, _placed_lines(image.labels))


def _error(number: int, column: int, problem: str, line: Line, hint: str = "") -> AssemblyError:
    return AssemblyError(number, column, problem, line.kept.rstrip().replace("\t", " "), hint)


def _check(number: int, line: Line) -> None:
    """Refuse what must not reach LLVM, or what it would not name well."""
    if odd := UNPRINTABLE.search(line.bare.replace("\x01", " ")):
        problem = f"the character {odd[0]!r} may stand in strings and comments only"
        raise _error(number, odd.start() + 1, problem, line, "type it anew, with plain quotes and spaces")
    if control := re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", line.kept):
        raise _error(number, control.start() + 1, f"the character {control[0]!r} cannot be assembled", line)
    word = line.word
    if ".intel_syntax" in word and line.bare[line.operands_at :].strip() != "noprefix":
        raise _error(number, line.word_at + 1, "registers are written without prefix", line, "leave this line out")
    if word in REFUSED:
        raise _error(number, line.word_at + 1, REFUSED[word][0], line, REFUSED[word][1])
    if hidden := REFUSED_ANYWHERE.search(line.kept):
        raise _error(number, hidden.start() + 1, "files cannot be put into the image", line)
    _check_brackets(number, line)
    _check_bulk(number, line)


def _check_brackets(number: int, line: Line) -> None:
    """LLVM takes an address without its closing bracket, and drops what stands in it."""
    opened: list[int] = []
    for at, character in enumerate(line.bare):
        if character == "[":
            opened.append(at)
        elif character == "]" and not (opened and opened.pop() >= 0):
            raise _error(number, at + 1, "this ']' closes nothing", line, "write a '[' before the address")
    if opened:
        raise _error(number, opened[-1] + 1, "this '[' is not closed", line, "write a ']' behind the address")


def _check_bulk(number: int, line: Line) -> None:
    match = re.match(r"\s*(0x[0-9a-f]+|\d+)", line.bare[line.operands_at :], re.I) if line.word in BULK else None
    if match and value_of(match[1]) > IMAGE_LIMIT:
        column = line.operands_at + match.start(1) + 1
        raise _error(number, column, f"{match[1]} is more than the limit of an image, {IMAGE_LIMIT:#x} (64 MiB)", line)


def _check_numbers(lines: list[Line], symbols: Mapping[str, int]) -> None:
    known, unknown = plain_constants(lines, symbols), macros(lines)
    for number, line in enumerate(lines, start=1):
        if line.word not in unknown and (found := oversized(line, known)):
            problem = f"{found.text} does not fit into the {found.bits} bits that this instruction has for it"
            raise _error(number, found.column + 1, problem, line)


def _rejected(diagnostics: str, translation: Translation) -> XenlabError:
    """The error that LLVM's words stand for."""
    lines = translation.lines
    found = list(islice(DIAGNOSTIC.finditer(diagnostics), DIAGNOSTICS_READ))
    if not found:
        if OUT_OF_MEMORY.search(diagnostics):
            number = next((n for n, line in enumerate(lines, 1) if line.word in BULK | BODIES), 1)
            return _error(number, 1, "the assembler ran out of memory on this source", lines[number - 1])
        return XenlabError(f"the assembler ended without naming an error: {diagnostics.strip()[-500:]}")
    (number, column), *others = [_place(match, translation) for match in found]
    line = lines[number - 1]
    problem, hint = hints.explain(found[0][4].strip(), line)
    return _error(number, column, problem + _more({n for n, _ in others} - {number}), line, hint)


def _more(numbers: set[int]) -> str:
    """How many other lines have errors, as the end of a sentence."""
    return f"; {len(numbers)} more {'line has' if len(numbers) == 1 else 'lines have'} errors" if numbers else ""


def _place(match: re.Match[str], translation: Translation) -> tuple[int, int]:
    """Source line and column that one of LLVM's diagnostics is about."""
    lines = translation.lines
    if "unmatched .ifs" in match[4]:
        return _open_condition(lines)
    if match[1] == "stdin":
        number = min(max(int(match[2]) - 1, 1), len(lines))
        return number, translation.column(number, int(match[3] or 1))
    return _inside_body(lines, match[5]) if match[1] == "instantiation" else _unplaced(lines, match[4])


def _open_condition(lines: tuple[Line, ...]) -> tuple[int, int]:
    """Source line and column of the first ``.if`` that is not ended: LLVM names the end of the source."""
    opened = []
    for number, line in enumerate(lines, start=1):
        if line.word.startswith(".if"):
            opened.append((number, line.word_at + 1))
        elif line.word == ".endif" and opened:
            opened.pop()
    return opened[0] if opened else (1, 1)


def _unplaced(lines: tuple[Line, ...], complaint: str) -> tuple[int, int]:
    """Source line and column for a complaint that LLVM makes at the end, without a place."""
    labels = [match[1] if (match := re.match(r"\s*(\d+)\s*:", line.bare)) else "" for line in lines]
    for number, line in enumerate(lines, start=1):
        use = re.search(r"(?<![\w.$])(\d+)([bf])\b", line.bare) if "temporary symbol" in complaint else None
        if use and use[1] not in (labels[:number] if use[2] == "b" else labels[number:]):
            return number, use.start() + 1
        if "BSS" in complaint and ".bss" in line.bare:
            return number, line.word_at + 1
    return 1, 1


def _inside_body(lines: tuple[Line, ...], expanded: str) -> tuple[int, int]:
    """Source line and column of the line of a macro's or repetition's body that LLVM saw as ``expanded``."""
    openings = [number for number, line in enumerate(lines, start=1) if line.word in BODIES]
    for number in [n for opening in openings for n in _body(lines, opening)] or openings:
        pattern = r".*".join(map(re.escape, re.split(r"\\[\w@()]+", lines[number - 1].kept.strip())))
        if pattern and re.fullmatch(pattern, expanded.strip()):
            return number, lines[number - 1].word_at + 1
    number = openings[0] if openings else 1
    return number, lines[number - 1].word_at + 1


def _body(lines: tuple[Line, ...], opening: int) -> range:
    """1-based numbers of the lines of a body that is opened at line ``opening``."""
    depth = 1
    for number in range(opening + 1, len(lines) + 1):
        word = lines[number - 1].word
        depth += (word in BODIES) - (word in BODY_ENDS)
        if depth == 0:
            return range(opening + 1, number)
    return range(opening + 1, len(lines) + 1)


def _unlinkable(error: LinkError, translation: Translation, symbols: Mapping[str, int]) -> AssemblyError:
    """The place in the source that a linker's error is about."""
    lines = translation.lines
    if error.address is None:
        number = next((n for n, line in enumerate(lines, 1) if line.word in BULK | ALIGNMENTS), 1)
        return _error(number, 1, error.problem, lines[number - 1])
    placed = _placed_lines(error.labels)
    number, *others = [_line_at(placed, address) or 1 for address in (error.address, *error.further)]
    problem = error.problem + _more(set(others) - {number})
    use = re.compile(rf"(?<![\w.$]){re.escape(error.symbol)}(?![\w.$])" if error.symbol else r"(?!)")
    for candidate in (number, *range(1, len(lines) + 1)):  # a macro's body is elsewhere than its bytes' line
        if match := use.search(lines[candidate - 1].bare):
            line = lines[candidate - 1]
            known = {n for other in lines for n in words(other)} - {error.symbol, *hints.MNEMONICS} | set(symbols)
            hint = hints.foreign(line) or hints.closest(error.symbol, known | set(REGISTERS))
            return _error(candidate, match.start() + 1, problem, line, hint)
    return _error(number, lines[number - 1].word_at + 1, problem, lines[number - 1])
