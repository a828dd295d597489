"""Runs instructions that may kill an emulator, one after the other; prints a line each.  Started by a test."""

from __future__ import annotations

import random
import sys
import zlib

from bare_machine import CODE, DATA, GDT, Bare

from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.machine.state import ARITHMETIC

CASES = {
    "icebp": b"\xf1",
    "int1": b"\xcd\x01",
    "ud0": b"\x0f\xff\xc0",
    "ud1": b"\x0f\xb9\xc0",
    "ud2": b"\x0f\x0b",
    "lock nop": b"\xf0\x90",
    "lock mov": b"\xf0\x89\x00",
    "only prefixes": b"\x66" * 20,
    "hlt": "hlt",
    "far jump, null": "ljmp 0, 0x4000",
    "far jump, no descriptor": "ljmp 0x100, 0x4000",
    "far jump, outside the table": "ljmp 0xfff8, 0x4000",
    "far jump, local table": "ljmp 0x1f, 0x4000",
    "far jump, data": "ljmp 0x21, 0x4000",
    "far call, ring 1": "lcall 0x19, 0x4000",
    "far call, ring 3": "lcall 0x2b, 0x4000",
    "far call, no descriptor": "lcall 0x100, 0x4000",
    "lss": f"lss esp, [{DATA:#x}]",
    "mov ss, null": "xor eax, eax\nmov ss, eax",
    "mov ss, code": "mov eax, 0x19\nmov ss, eax",
    "mov ss, other ring": "mov eax, 0x33\nmov ss, eax",
    "mov cs": b"\x8e\xc8",
    "retf to nothing": "push 0\npush 0\nretf",
    "retf inwards": "push 0x8\npush 0x4000\nretf",
    "retf to a task segment": "push 0x3b\npush 0\nretf",
    "iret to nothing": "push 0\npush 0\npush 0\niretd",
    "iret to virtual 8086": "push 0x33\npush 0x9000\npush 0x20002\npush 0x2b\npush 0x4000\niretd",
    "iret with nested task": "pushfd\nor dword ptr [esp], 0x4000\npopfd\niretd",
    "ltr": "mov eax, 0x38\nltr ax",
    "lldt": "mov eax, 0x50\nlldt ax",
    "into": "mov al, 0x7f\nadd al, 1\ninto",
    "bound": f"mov eax, 5\nbound eax, [{DATA:#x}]",
    "divide": "xor ecx, ecx\ndiv ecx",
    "single step": "pushfd\nor dword ptr [esp], 0x100\npopfd\nnop\nnop",
    "sysenter": "sysenter",
    "syscall": b"\x0f\x05",
    "sysexit": "sysexit",
    "sysret": b"\x0f\x07",
    "rsm": b"\x0f\xaa",
    "vmcall": b"\x0f\x01\xc1",
    "monitor": b"\x0f\x01\xc8",
    "mwait": b"\x0f\x01\xc9",
    "clgi": b"\x0f\x01\xdd",
    "xgetbv": b"\x0f\x01\xd0",
    "jump to nowhere": "mov eax, 0x40000000\njmp eax",
    "jump to the last byte": "mov eax, 0xffffffff\njmp eax",
    "stack nowhere": "mov esp, 0x40000000\npush eax",
    "in": "in al, 0x60",
    "rep insb": "mov ecx, 5\nrep insb",
    "rep outsb": "mov ecx, 5\nrep outsb",
    "fault on x87": "fninit\nfldcw word ptr [zero]\nfld1\nfldz\nfdivp\nfwait\nzero: .word 0",
    "enter deep": "mov ebp, 0x40000000\nenter 16, 31",
    "wrmsr": "wrmsr",
    "rdpmc": "rdpmc",
}
# The hypervisor lets no such descriptor into a table.  The process has to survive one all the same.
SYSTEM_CASES = {
    "task segment": "ljmp 0x38, 0",
    "busy task segment": "lcall 0x40, 0",
    "task gate": "lcall 0x48, 0",
    "local table descriptor": "lcall 0x50, 0",
}
# At 0x38: an available and a busy task segment, a task gate, a local descriptor table.
SYSTEM_DESCRIPTORS = (0x0000_E900_6000_0067, 0x0000_EB00_6000_0067, 0x0000_E500_0038_0000, 0x0000_E200_6000_00FF)


def say(*words: object, end: str = "\n") -> None:
    sys.stdout.write(" ".join(map(str, words)) + end)
    sys.stdout.flush()


def put_system_descriptors(bare: Bare) -> None:
    for number, descriptor in enumerate(SYSTEM_DESCRIPTORS):
        bare.memory.write(GDT + 0x38 + 8 * number, descriptor.to_bytes(8, "little"))


def system(portable: bool) -> None:
    cases(portable, SYSTEM_CASES)


def cases(portable: bool, guests=CASES) -> None:
    for mode in (TWO_LEVEL, PAE):
        for ring in (1, 3):
            for name, source in guests.items():
                say(mode.name, ring, name, end=": ")
                bare = Bare(mode, ring, portable)
                if guests is SYSTEM_CASES:
                    put_system_descriptors(bare)
                traps = bare.run(source, 50)
                say([(t.vector, t.error, hex(t.address), hex(t.eip), t.ring, t.time) for t in traps])


def short_fuzz(portable: bool) -> None:
    fuzz(portable, 400)


def fuzz(portable: bool, budget: int = 4000) -> None:
    """Random bytes as code; each trap skips a byte."""

    def skip(bare: Bare, _trap) -> None:
        state = bare.cpu.state
        state.eip = CODE + (state.eip + 1) % 0x1000
        state.esp = 0x9F00 + random.randrange(16)
        # The portable CPU may find a wrong carry there (tests/hypervisor/test_flags_of_faults.py).
        state.eflags &= ~ARITHMETIC
        # From some code segments nothing can be fetched, and no time passes.
        faults[bare.cpu.instructions] = faults.get(bare.cpu.instructions, 0) + 1
        if faults[bare.cpu.instructions] > 500:
            bare.cpu.stop()

    faults: dict[int, int] = {}
    for seed in range(24):
        random.seed(seed)
        for ring in (1, 3):
            say("fuzz", seed, ring, end=": ")
            bare = Bare((TWO_LEVEL, PAE)[seed % 2], ring, portable)
            # The guest may write its code, data and stack; everything else is read-only to it.
            for page in (*range(CODE >> 12), *range(0x10, 0x20)):
                bare.map(page, page << 12 | (5 if page == GDT >> 12 else 1))
            table = bare.memory.read(GDT, 0x1000)
            bare.handle = skip
            faults.clear()
            bare.run(random.randbytes(0x1000), budget)
            assert bare.memory.read(GDT, 0x1000) == table, "the descriptor table has changed"
            assert bare.cpu.state.cpl >= ring, f"ring {bare.cpu.state.cpl}"
            say(
                bare.cpu.instructions,
                zlib.crc32(repr((bare.traps, bare.cpu.state.architectural())).encode()),
            )


if __name__ == "__main__":
    {"cases": cases, "system": system, "fuzz": fuzz, "short_fuzz": short_fuzz}[sys.argv[1]](sys.argv[2] == "portable")
    say("end")
