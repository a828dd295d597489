"""What to write instead: from LLVM's complaint, or from the look of a line, to a sentence that helps.

Problem: LLVM says "unknown token in expression" to everything that another assembler would have understood.
Invariant: a hint names something that our assembler accepts.  Without it, students try spellings at random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from xenlab.machine.assembler_source import Line, register_bits, word_list

MNEMONICS = word_list("""
    aaa aad aam aas adc add and arpl bound bsf bsr bswap bt btc btr bts call cbw cdq clc cld cli clts cmc cmova
    cmovb cmove cmovg cmovl cmovne cmp cmpsb cmpsd cmpxchg cmpxchg8b cpuid cwd cwde daa das dec div enter hlt
    idiv imul in inc insb insd int int3 into invd invlpg iret iretd ja jae jb jbe jc je jecxz jg jge jl jle jmp
    jna jnb jnc jne jng jno jnp jns jnz jo jp js jz lahf lar lds lea leave les lfs lgdt lgs lidt lldt lmsw lock
    lodsb lodsd loop loope loopne lsl lss ltr mov movsb movsd movsx movzx mul neg nop not or out outsb outsd
    pause pop popad popfd push pushad pushfd rcl rcr rdmsr rdtsc rep repe repne ret retf rol ror sahf sar sbb
    scasb scasd seta setae setb setbe sete setg setl setne sgdt shl shld shr shrd sidt sldt smsw stc std sti
    stosb stosd str sub syscall sysenter sysexit test ud2 verr verw wbinvd wrmsr xadd xchg xlatb xor
""")
DIRECTIVES = word_list("""
    .align .ascii .asciz .balign .bss .byte .data .else .elseif .endif .endm .endr .equ .fill .global .if .ifdef
    .ifndef .irp .long .macro .org .p2align .rept .rodata .section .set .short .skip .space .string .text .word
    .zero
""")
SIZES = "byte ptr (8 bits), word ptr (16 bits) or dword ptr (32 bits)"

# Lines as other assemblers want them, and how to say the same here; groups fill the braces.
FOREIGN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.I), hint)
    for pattern, hint in (
        (r"\s*\[\s*bits\s+32\s*\]|\s*bits\s+32\b", "leave this line out: code is always 32-bit"),
        (r"\s*\[?\s*bits\b", "only 32-bit code can be assembled; leave this line out"),
        (r"\s*(?:section|segment)\s+(\.?\w+)", "write `.section {0}` (or just `.text`, `.data`, `.bss`)"),
        (r"\s*(?:global|globl|extern|public)\s+\w+", "leave this line out: all labels are in one image"),
        (r"\s*(\w+)\s+equ\b\s*(.*)", "write `{0} = {1}`"),
        (r"\s*%define\s+(\w+)\s+(.+)", "write `{0} = {1}`"),
        (r"\s*%macro\s+(\w+)", "write `.macro {0} first, second` … `.endm`, and `\\first` for an argument"),
        (r"\s*%(?:include|if|else|endif|endmacro)\w*", "write directives with a dot, such as `.if` and `.endif`"),
        (r"\s*times\s+(\S+)\s+(?:db|nop)\s*(\S*)", "write `.fill {0}, 1, {1}` or `.rept {0}` … `.endr`"),
        (r"\s*times\s+(\S+)", "write `.rept {0}`, the statement, and `.endr` on lines of their own"),
        (r"\s*(\w+)\s+db\s+(.+)", "write `{0}: .byte {1}` (for text `.ascii`, or `.asciz` with a final zero)"),
        (r"\s*(?:\w+\s*:)?\s*db\s+(.+)", "write `.byte {0}` (for text `.ascii`, or `.asciz` with a final zero)"),
        (r"\s*(\w+:?\s+)?dw\s+(.+)", "write `.word {1}`"),
        (r"\s*(\w+:?\s+)?dd\s+(.+)", "write `.long {1}`"),
        (r"\s*(\w+:?\s+)?dq\s+(.+)", "write `.quad {1}`"),
        (r"\s*(\w+:?\s+)?resb\s+(.+)", "write `.skip {1}`"),
        (r"\s*(\w+:?\s+)?resw\s+(.+)", "write `.skip 2*({1})`"),
        (r"\s*(\w+:?\s+)?resd\s+(.+)", "write `.skip 4*({1})`"),
        (r"\s*(org|align)\s+(\S+)", "write `.{0} {1}` (the image's address is the argument `base` of assemble)"),
        (r".*%(e?[abcd][xhl]|e?[sd]i|e?[sb]p|[cdefgs]s|cr\d)\b", "this is AT&T syntax; write `{0}`, destination first"),
        (r".*\$(0x[0-9a-f]+|\d+)", "this is AT&T syntax; write the number without '$': `{0}`"),
        (r".*\$([a-z_]\w*)", "this is AT&T syntax; write `offset {0}`"),
        (r".*[\[\s,](?:byte|word|dword)\s*\[", "write `byte ptr [`, `word ptr [` or `dword ptr [`"),
        (r".*(?<![\w.])\$(?![\w.])", "write `.` for the current address"),
        (r".*\b([0-9][0-9a-f]*)h\b", "write hexadecimal numbers as `0x{0}`"),
    )
)

COMPLAINTS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), problem, hint)
    for pattern, problem, hint in (
        (r"ambiguous operand size for instruction '(\w+)'", "the operand size of '{0}' is not clear", f"write {SIZES}"),
        (r"Expected 'PTR' or 'ptr' token", "'ptr' is missing after the operand size", f"write {SIZES}"),
        (
            r"register %(\w+) is only available in 64-bit mode",
            "the register '{0}' exists in 64-bit code only",
            "use a 32-bit register such as eax",
        ),
        (r"symbol '(.+)' is already defined|redefinition of '(.+)'", "the symbol '{0}' is defined twice", ""),
        (r"no matching '\.end(?:macro|m)' in definition", "this `.macro` has no end", "end it with `.endm`"),
        (r"no matching '\.endr'", "this `.rept` has no end", "end it with `.endr`"),
        (r"unmatched \.ifs", "an `.if` has no end", "end it with `.endif`"),
        (r"unknown token in expression", "the expression cannot be read at this place", ""),
        (r"unexpected token at start of statement", "no statement begins like this", ""),
        (r"out of range literal value", "the number does not fit into what this directive makes", ""),
        (
            r"value of (-?\d+) is too large for field of (\d) byte",
            "the distance {0} does not fit into {1} byte",
            "move the target nearer, or jump there in two steps",
        ),
        (r"unterminated string constant", "the string has no closing quote", 'end the string with "'),
        (r"instruction requires: 64-bit mode", "the instruction with these operands exists in 64-bit code only", ""),
        (r"Undefined temporary symbol", "a jump to a numeric label that does not follow or precede it", ""),
        (
            r"expected absolute expression|expected assembly-time absolute expression",
            "a number is needed here that is known at this line",
            "define the constant further up",
        ),
    )
)


def closest(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?" for the nearest of ``known``, or ""."""
    by_lower = {word.lower(): word for word in known}
    match = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.65)
    return f"did you mean '{by_lower[match[0]]}'?" if match else ""


def foreign(line: Line) -> str:
    """How to say here what the line says in another assembler's language, or ""."""
    for pattern, hint in FOREIGN:
        if match := pattern.match(line.bare):
            groups = [line.kept[slice(*match.span(i + 1))].strip() for i in range(pattern.groups)]
            return hint.format(*groups)
    return ""


def explain(complaint: str, line: Line) -> tuple[str, str]:
    """Problem and hint for LLVM's ``complaint`` about ``line``."""
    if match := re.match(r"invalid instruction mnemonic '(.*)'", complaint):
        return _unknown_mnemonic(match[1], line)
    if complaint.startswith("unknown directive"):
        return f"there is no directive '{line.word}'", closest(line.word, DIRECTIVES)
    if complaint.startswith("invalid operand for instruction"):
        return f"'{line.word}' does not take these operands", foreign(line) or _operand_hint(line)
    for pattern, problem, hint in COMPLAINTS:
        if match := pattern.match(complaint):
            groups = [group for group in match.groups() if group]
            return problem.format(*groups), hint or foreign(line)
    return complaint, foreign(line)


def _unknown_mnemonic(name: str, line: Line) -> tuple[str, str]:
    problem = f"there is no instruction '{name}'"
    if hint := foreign(line):
        return problem, hint
    if not line.bare[line.operands_at :].strip():
        return problem, " ".join(filter(None, [closest(name, MNEMONICS), f"For a label write `{name}:`."]))
    if name[-1:] in "bwl" and name[:-1] in MNEMONICS:
        return problem, f"this is AT&T syntax; write `{name[:-1]}`, destination first, registers without '%'"
    return problem, closest(name, MNEMONICS)


def _operand_hint(line: Line) -> str:
    operands = [operand.strip() for operand in line.bare[line.operands_at :].split(",")]
    sizes = {operand: size for operand in operands if (size := register_bits(operand))}
    if sum("[" in operand for operand in operands) > 1:
        return "only one operand can be in memory: go through a register"
    if len(set(sizes.values())) > 1:
        return "the operands have different sizes: " + ", ".join(f"{r} has {s} bits" for r, s in sizes.items())
    if len(operands) > 1 and re.fullmatch(r"-?\d\w*", operands[0]):
        return "the destination comes first, and it cannot be a number"
    return ""
