from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from xenlab.errors import AssemblyError, XenlabError
from xenlab.machine.assembler import Program, assemble
from xenlab.machine.disassembler import disassemble


def code(source: str, base: int = 0, **symbols: int) -> str:
    return assemble(source, base, symbols=symbols).code.hex()


def rejection(source: str, **symbols: int) -> AssemblyError:
    with pytest.raises(AssemblyError) as caught:
        assemble(source, symbols=symbols)
    return caught.value


# Encodings from the processor manual; GNU as agrees.
ENCODINGS = {
    "mov eax, 18": "b812000000",
    "mov cr3, eax": "0f22d8",
    "mov ax, ds": "668cd8",
    "mov eax, gs:[0]": "65a100000000",
    "mov al, ';'": "b03b",
    "mov al, '#'": "b023",
    "int 0x82": "cd82",
    "iret": "cf",
    "iretd": "cf",
    "iretw": "66cf",
    "pushf": "9c",
    "popf": "9d",
    "pushfd": "9c",
    "popfd": "9d",
    "pushfw": "669c",
    "pushad": "60",
    "popad": "61",
    "push ds": "1e",
    "push cs": "0e",
    "pop fs": "0fa1",
    "push 5": "6a05",
    "rep movsd": "f3a5",
    "lar eax, ecx": "0f02c1",
    "verr ax": "0f00e0",
    "sidt [eax]": "0f0108",
    "lgdt [0x5000]": "0f011500500000",
    "ud2": "0f0b",
    ".byte 0x0f, 0x0b": "0f0b",
    "jmp 8:0x1234": "ea341200000800",
    "ljmp 8, 0x1234": "ea341200000800",
    "call far ptr 8:0x1234": "9a341200000800",
    "jmp far [eax]": "ff28",
    "jmp fword ptr [eax]": "ff28",
    "jmp 0x1005": "e900100000",
    "jmp .": "ebfe",
    "MOV EAX, EBX": "89d8",
    "lock cmpxchg [ebx], ecx": "f00fb10b",
    "xlat": "d7",
}


@pytest.mark.parametrize("source", ENCODINGS)
def test_encoding(source: str) -> None:
    assert code(source) == ENCODINGS[source]


def test_addresses_are_absolute_and_sections_follow_each_other() -> None:
    program = assemble(
        """
        .data
        first: .long second
        .text
        start: mov ecx, offset message
               mov eax, [first]
               call start
        .section .rodata
        message: .asciz "a;b#c"
        .bss
        .align 8
        second: .skip 4
        """,
        0x100000,
    )
    assert program.symbols == {"start": 0x100000, "first": 0x10000F, "message": 0x100013, "second": 0x100020}
    assert program.code.hex(" ", 4).startswith("b9")
    assert program.code[1:5] == (0x100013).to_bytes(4, "little")
    assert program.code[6:10] == (0x10000F).to_bytes(4, "little")
    assert program.code[10:15].hex() == "e8f1ffffff"
    assert program.code[0xF:0x13] == (0x100020).to_bytes(4, "little")
    assert program.code[0x13:0x19] == b"a;b#c\0"
    assert program.code[0x19:] == bytes(11)


def test_relocations_of_every_width() -> None:
    assert code("x: .byte x\n.word x\n.long x", 0x10) == "10" + "1000" + "10000000"
    assert code("jecxz x\nnop\nx: jmp x") == "e30190ebfe"
    assert code("mov ax, offset x\nx:", 0x100) == "66b80401"


def test_directives() -> None:
    assert code(".rept 3\nnop\n.endr") == "909090"
    assert code(".macro two value\nmov al, \\value\nnop\n.endm\ntwo 7\ntwo 8") == "b00790b00890"
    assert code(".set n, 1\n.if n\nnop\n.else\nhlt\n.endif") == "90"
    assert code('.fill 2, 1, 0xcc\n.align 4\n.ascii "ab"\n.word 1') == "cccc9090" + "6162" + "0100"
    assert code("1: jmp 1b\njmp 1f\n1:") == "ebfeeb00"


@pytest.mark.parametrize("source", ["mov edx, len\n{}", "{}\n.text\nmov edx, len", ".if 0\n.endif\nmov edx, len\n{}"])
def test_length_of_a_message_is_a_number_wherever_it_is_defined(source: str) -> None:
    program = assemble(source.format('.data\nmessage: .ascii "hello"\nlen = . - message'))
    assert program.code[:5].hex() == "ba05000000"


def test_constants_are_immediates_in_every_instruction() -> None:
    data = '\n.data\nm: .ascii "abc"\nlen = . - m'
    assert code("push len ; comment" + data) == "6a03" + "616263"
    assert code("cmp edx, len*2 - 1" + data) == "83fa05" + "616263"
    assert code("shl eax, len\nint len" + data) == "c1e003cd03" + "616263"
    assert code("x = 5\nmov eax, [ebx+x]\nmov ecx, [x]") == "8b43058b0d05000000"


def test_label_alias_remains_an_address_in_memory() -> None:
    assert code("mov eax, [alias]\n.data\nm: .long 1\nalias = m") == "a105000000" + "01000000"


def test_comments_of_all_kinds() -> None:
    source = 'nop ; a "quote\nnop # it\'s\nnop // x\n/* several\nlines ; */ nop\n.ascii "/*;#//\\";"'
    assert code(source) == "90909090" + b'/*;#//";'.hex()
    assert assemble(source).line_at(3) == 5


def test_predefined_symbols_are_constants_that_the_source_may_override() -> None:
    assert code("mov eax, console_io", console_io=18) == "b812000000"
    assert code("mov eax, console_io\nconsole_io = 3", console_io=18) == "b803000000"
    assert code("jmp here\nhere: nop", here=0x5000) == "eb0090"
    assert code("call page + 32", page=0x1000) == "e81b100000"
    assert code("mov eax, 5", eax=3, mov=4, unused=5) == "b805000000"
    assert assemble("mov eax, nr", symbols={"nr": 1}).symbols == {}


def test_line_map() -> None:
    source = (
        "start: nop\n\n.macro two\nnop\nnop\n.endm\ntwo\n.rept 2\nhlt\n.endr\n.if 0\nnop\n.endif\nlast: ret\n.byte 1\n"
    )
    program = assemble(source, 0x1000)
    assert program.lines == ((0x1000, 1), (0x1001, 7), (0x1003, 8), (0x1005, 14), (0x1006, 15))
    assert [program.line_at(0x1000 + i) for i in range(7)] == [1, 7, 7, 8, 8, 14, 15]
    assert program.line_at(0xFFF) is None
    assert program.line_at(0x1007) is None


def test_empty_source() -> None:
    assert assemble("") == Program(b"", 0, {}, ())
    assert assemble("; nothing\n", 0x1000).line_at(0x1000) is None


def test_results_do_not_share_state_and_can_be_pickled() -> None:
    first = assemble("a: nop")
    first.symbols["a"] = 99
    assert assemble("a: nop").symbols == {"a": 0}
    assert pickle.loads(pickle.dumps(first)) == first


# source -> line, column, words of problem, words of hint
ERRORS = [
    ("nop\n  mvo eax, 1", 2, 3, "'mvo'", "'mov'"),
    ("start\n", 1, 1, "'start'", "`start:`"),
    ("mov eax, %ebx", 1, 10, "expression", "AT&T syntax; write `ebx`"),
    ("mov eax, $1", 1, 10, "expression", "`1`"),
    ("movl eax, ebx", 1, 1, "'movl'", "`mov`"),
    ("mov rax, 1", 1, 5, "'rax'", "eax"),
    ("mov al, ebx", 1, 1, "operands", "al has 8 bits, ebx has 32 bits"),
    ("mov [eax], [ebx]", 1, 1, "operands", "through a register"),
    ("mov 5, eax", 1, 1, "operands", "destination comes first"),
    ("mov [eax], 5", 1, 5, "size", "dword ptr"),
    ("inc dword [eax]", 1, 11, "'ptr'", "dword ptr"),
    ("a: nop\na: nop", 2, 1, "'a' is defined twice", ""),
    (".algn 4", 1, 1, "'.algn'", "'.align'"),
    ("db 1", 1, 1, "'db'", "`.byte 1`"),
    ('text db "hi", 0', 1, 13, "", '`text: .byte "hi", 0`'),
    ("dd 7", 1, 1, "'dd'", "`.long 7`"),
    ("resb 8", 1, 1, "'resb'", "`.skip 8`"),
    ("section .text", 1, 1, "'section'", "`.section .text`"),
    ("global start", 1, 1, "'global'", "leave this line out"),
    ("[bits 32]", 1, 1, "", "leave this line out"),
    ("size equ 5", 1, 11, "", "`size = 5`"),
    ("times 5 db 0", 1, 12, "", "`.fill 5, 1, 0`"),
    ("mov eax, 0FFh", 1, 14, "", "`0x0FF`"),
    (".code64", 1, 1, "32-bit", "leave"),
    ("nop\n.if 1\n.if 0\n.endif\nnop", 2, 1, "`.if`", "`.endif`"),
    ("\n.macro a\nnop", 2, 1, "`.macro`", "`.endm`"),
    ('mov eax, "abc', 1, 10, "closing quote", '"'),
    ("nop\njmp 2f", 2, 5, "numeric label", ""),
    ("mov eax, “5”", 1, 10, "'“'", "plain quotes"),
    ("é: nop", 1, 1, "'é'", ""),
    ("nop\n\tmov eax, mesage\nmessage:", 2, 11, "'mesage' is not defined", "'message'"),
    ("jmp far 8:nowhere", 1, 11, "'nowhere' is not defined", ""),
    ("mov eax, ebxx", 1, 10, "'ebxx' is not defined", "'ebx'"),
    (".macro m a\n bogus \\a\n.endm\nm 1", 2, 2, "'bogus'", ""),
    (".rept 2\n  bogus 3\n.endr", 2, 3, "'bogus'", ""),
    (".byte x\n.skip 300\nx:", 1, 1, "does not fit", ""),
    ("nop\n.bss\nnop", 2, 1, "BSS", ""),
    (".comm x, 4", 1, 1, "common", ".bss"),
    ('.error "stop here"', 1, 1, "stop here", ""),
    ("/* é */ nop; “\nl: mov eax, 'é' ; x", 2, 13, "", ""),
    ("mov eax, ebx /* ü */ ecx", 1, 22, "", ""),
]


@pytest.mark.parametrize(("source", "line", "column", "problem", "hint"), ERRORS)
def test_error_names_place_problem_and_remedy(source: str, line: int, column: int, problem: str, hint: str) -> None:
    error = rejection(source)
    assert (error.line, error.column) == (line, column), str(error)
    assert problem in error.problem
    assert hint in error.hint


def test_error_message_shows_the_source_line_with_a_caret() -> None:
    assert "\n    \x20bogus eax\n     ^" in str(rejection("nop\n bogus eax ; comment"))


def test_address_that_does_not_fit_is_refused_at_its_line() -> None:
    error = rejection("nop\nnop\n.word x\n.skip 0x10000\nx: .byte x")
    assert (error.line, error.column) == (3, 1)
    assert "0x10004 does not fit into 16 bits; 1 more line has errors" in error.problem


@pytest.mark.parametrize("source", ["bogus\nnop\nbogus\nmov eax, ,", "call x\nnop\ncall y\ncall x"])
def test_further_errors_are_counted(source: str) -> None:
    error = rejection(source)
    assert error.line == 1
    assert error.problem.endswith("; 2 more lines have errors")


def test_unknown_predefined_symbol_is_guessed() -> None:
    assert "'CONSOLE_IO'" in rejection("mov eax, CONSOL_IO", CONSOLE_IO=18).hint


@pytest.mark.parametrize("rewritten", ["push ds ; x\n", "jmp 8:start\nstart:", "push offset start\nstart:"])
def test_lines_behind_rewritten_ones_keep_their_numbers(rewritten: str) -> None:
    number = rewritten.count("\n") + 2
    error = rejection(f"{rewritten}\n  bogus eax")
    assert (error.line, error.column) == (number, 3)


@pytest.mark.parametrize(
    "source",
    [
        '.incbin "{}"',
        '.include "{}"',
        '.INCBIN "{}"',
        'x: .incbin "{}"',
        '.macro m a b\n.\\a\\b "{}"\n.endm\nm inc bin',
        '.macro m a\n\\a "{}"\n.endm\nm .incbin',
        '.macro m a b c\n\\a\\b \\c\n.endm\nm .inc, bin, "{}"',
    ],
)
def test_files_do_not_get_into_the_image(source: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("nop")
    rejection(source.format(secret.as_posix()))


@pytest.mark.parametrize(
    "source",
    [
        ".fill 0xffffffff",
        ".org 0x7fffffff",
        ".bss\n.skip 0x4000001",
        "n = 0x10000\n.bss\n.skip n*0x1000",
        ".text\n.skip 1 << 32",
        "n = 0x10000\n.bss\n.skip n*0x10000",
    ],
)
def test_oversized_image_is_refused(source: str) -> None:
    assert rejection(source).problem


def test_oversized_source_is_refused() -> None:
    assert "1 MiB" in rejection("nop\n" * (1 << 18) + ";").problem


def test_base_must_be_a_32_bit_address() -> None:
    with pytest.raises(XenlabError, match="32-bit address"):
        assemble("nop", 1 << 32)
    with pytest.raises(XenlabError, match="4 GiB"):
        assemble("nop\nnop", 0xFFFFFFFF)
    assert assemble("nop", 0xFFFFFFFF).code == b"\x90"


def test_alignment_that_the_base_cannot_give_is_refused() -> None:
    source = ".align 4096\nnop"
    with pytest.raises(AssemblyError, match="alignment 0x1000"):
        assemble(source, 0x1010)
    assert assemble(source, 0x2000).code == b"\x90"


def test_print_directive_does_not_disturb_the_reply() -> None:
    assert code('.print "17"\nnop') == "90"


def test_assembling_goes_on_after_an_error() -> None:
    rejection("bogus_one eax")
    assert code("mov ebx, 1") == "bb01000000"
    rejection("bogus_two eax")
    assert code("mov ebx, 2") == "bb02000000"


FRAGMENTS = [
    "mov",
    "eax",
    ",",
    "[",
    "]",
    ":",
    "1b",
    "'",
    '"',
    "\\",
    ";",
    "#",
    "/*",
    ".rept 2",
    ".endr",
    ".if",
    "=",
    "$",
    "%",
]


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from([*FRAGMENTS, "\n", " "]), max_size=20).map("".join)))
@example("'")
@example('"\n"')
@example("\x00\ud800\r\x0c")
@example(".endm\n")
def test_random_text_is_assembled_or_rejected(source: str) -> None:
    error = None
    try:
        assemble(source)
    except AssemblyError as caught:
        error = caught
    if error:
        lines = source.replace("\r\n", "\n").split("\n")
        assert 1 <= error.line <= len(lines)
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1


REGISTER = st.sampled_from(["eax", "ebx", "ecx", "edx", "esi", "edi", "ebp"])
STATEMENT = st.one_of(
    st.builds("mov {}, {}".format, REGISTER, st.integers(0, 2**32 - 1).map(hex)),
    st.builds("{} {}, {}".format, st.sampled_from(["add", "xor", "cmp", "mov"]), REGISTER, REGISTER),
    st.builds("mov {}, dword ptr [{} + {}]".format, REGISTER, REGISTER, st.integers(1, 4096).map(hex)),
    st.sampled_from(["nop", "iretd", "push ds", "pop fs", "hlt", "int 0x82", "ret", "pushfd", "push 5", "lgdt [eax]"]),
)


@settings(max_examples=25)
@given(st.lists(STATEMENT, min_size=1, max_size=12), st.integers(0, 0xFFFFF).map(lambda page: page << 12))
def test_disassembly_assembles_to_the_same_bytes(statements: list[str], base: int) -> None:
    program = assemble("\n".join(statements), base)
    listing = disassemble(program.code, base)
    assert [program.line_at(entry.address) for entry in listing] == list(range(1, len(statements) + 1))
    assert assemble("\n".join(entry.text for entry in listing), base).code == program.code


@pytest.mark.parametrize(
    ("source", "column", "hint"),
    [
        ("mov eax, [ebx + ecx", 10, "']'"),
        ("mov eax, [ebx", 10, "']'"),
        ("mov eax, ebx]", 13, "'['"),
        ("mov eax, [ebx]]", 15, "'['"),
    ],
)
def test_an_unbalanced_bracket_is_an_error(source: str, column: int, hint: str) -> None:
    with pytest.raises(AssemblyError) as caught:
        assemble("nop\n" + source)
    assert (caught.value.line, caught.value.column) == (2, column)
    assert hint in caught.value.hint


def test_brackets_in_strings_and_comments_are_text() -> None:
    assert assemble('.ascii "]["  # [\n').code == b"]["
