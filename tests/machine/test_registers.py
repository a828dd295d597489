"""The engine's registers used in place, and how many of them have to be copied when another vCPU runs."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from random import Random

import pytest
from bare_machine import Bare

from xenlab.machine import layout
from xenlab.machine.cpu import ProbedCpu
from xenlab.machine.engine import GENERAL, Engine
from xenlab.machine.layout import ProbeError, probe
from xenlab.machine.machine import Machine
from xenlab.machine.memory import Memory
from xenlab.machine.peek import peeking
from xenlab.machine.portable import PortableCpu
from xenlab.machine.registers import EngineRegisters

# One or more of everything that has a state of its own: x87, MMX, SSE, flags, segments, stack frames, faults.
PIECES = [
    "fninit\n fldpi\n fld1\n fsin\n fstp st(3)\n fincstp",
    "fld1\n fldz\n fdivp\n fnstsw ax\n fnstcw [esp - 8]",
    "mov eax, 0x12345678\n movd mm1, eax\n paddd mm1, mm1\n emms",
    "fnsave [0x8000]\n frstor [0x8000]",
    "fxsave [0x8000]\n fxrstor [0x8000]",
    "mov dword ptr [0x8000], 0x7f80\n ldmxcsr [0x8000]\n stmxcsr [0x8004]",
    "mov eax, 7\n cvtsi2sd xmm7, eax\n sqrtsd xmm6, xmm7\n divsd xmm6, xmm7\n pshufd xmm5, xmm6, 27",
    "pcmpeqd xmm0, xmm0\n psrlq xmm0, 3\n pmovmskb eax, xmm0\n maskmovdqu xmm0, xmm1",
    "pushfd\n or dword ptr [esp], 0x240cd5\n popfd\n adc eax, ebx\n std\n lahf\n sahf\n daa\n aam",
    "push ds\n pop es\n mov eax, ds\n mov fs, eax\n mov gs, eax\n lar ebx, ax\n lsl ecx, ax\n verr ax\n verw ax",
    "lds ebx, [0x8010]\n les ebx, [0x8010]",
    "enter 16, 3\n leave\n pushad\n popad\n xlatb\n cmpxchg8b [0x8000]\n bswap edx\n lock xadd [0x8000], eax",
    "mov edi, 0x8000\n mov esi, 0x8100\n mov ecx, 9\n cld\n rep movsb\n repne scasb\n mov ecx, 3\n rep stosd",
    "xor ecx, ecx\n div ecx",
    "int3",
    "int 0x55",
    "into\n bound eax, [0x8000]",
    "hlt",
    "mov eax, cr0",
    "mov eax, dr0",
    "rdtsc",
    "rdmsr",
    "xgetbv",
    "cpuid",
    "in al, dx",
    "sysenter",
    "syscall",
    "ud2",
    "mov eax, [0xf0000000]",
    "mov fs, esp",
    "sgdt [0x8000]\n sidt [0x8000]\n smsw eax\n sldt eax\n str eax",
    "monitor",
    "prefetcht0 [0x8000]\n sfence\n lfence\n mfence\n clflush [0x8000]\n pause\n nop",
]

# Bytes: XMM8 to XMM31, which exist in 64-bit mode only, and registers that instructions use on the way.
_SCRATCH = 26 * 64
_BEFORE_ERROR_CODE = 16


def test_memory_that_is_there_is_read_and_nothing_happens_where_there_is_none() -> None:
    content = bytes(range(256)) * 40
    buffer = ctypes.create_string_buffer(content, len(content))
    with peeking() as peek:
        assert peek(ctypes.addressof(buffer), len(content)) == content
        assert peek(ctypes.addressof(buffer) + 5000, 77) == content[5000:5077]
        assert peek(8, 64) == b""
        assert peek(0x00FF_FFFF_FFFF_0000, 64) == b""


def test_the_place_is_the_engine_s_own_and_each_engine_has_one() -> None:
    engines = [Engine(Memory(1)) for _ in range(3)]
    places = [EngineRegisters(engine, probe()) for engine in engines]
    for number, engine in enumerate(engines):
        engine.write("ebx", 0x1000 + number)
    assert [place.view[1][6] for place in places] == [0x1000, 0x1001, 0x1002]
    places[1].view[1][2 * GENERAL.index("edi")] = 0xDEAD_BEEF
    assert [engine.read("edi") for engine in engines] == [0, 0xDEAD_BEEF, 0]


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("piece", PIECES, ids=[piece.split("\n")[0] for piece in PIECES])
def test_what_is_not_copied_is_not_the_guest_s_to_change(piece: str, ring: int) -> None:
    """Behind what a switch copies stand scratch registers, and what the engine notes of the last exception."""
    bare = Bare(ring=ring)
    bare.load(f"{piece}\n1: jmp 1b")
    assert isinstance(bare.cpu, ProbedCpu)
    everything, found = bare.cpu._registers.all, probe()
    before = bytes(everything)
    bare.cpu.run_until(60)
    changed = {at for at in range(found.span, len(before), 4) if everything[at : at + 4] != before[at : at + 4]}
    scratch = range(found.span, found.span + _SCRATCH)
    exception = range(found.error_code - found.general - _BEFORE_ERROR_CODE, len(before))
    assert changed <= {*exception, *scratch}, sorted(changed)


def test_each_engine_s_registers_are_found_wherever_the_heap_puts_it() -> None:
    """Among engines made between other things some have a pointer that leads past the CPU by chance."""
    random, kept = Random(1), []
    for number in range(60):
        kept.append([bytearray(random.randrange(100, 60_000)) for _ in range(random.randrange(40))])
        if random.random() < 0.5:
            random.shuffle(kept)
            del kept[: len(kept) // 2]
        engine = Engine(Memory(1))
        registers = EngineRegisters(engine, probe())
        engine.write("esi", number)
        assert registers.view[1][2 * GENERAL.index("esi")] == number


def test_a_library_without_the_pointer_means_the_portable_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_CPU_BYTES_SEARCHED", 64)
    probe.cache_clear()
    try:
        with pytest.raises(ProbeError, match="registers of the running CPU: found behind no pointer"):
            probe()
        assert isinstance(Machine(1).cpu, PortableCpu)
    finally:
        monkeypatch.undo()
        probe.cache_clear()
    assert isinstance(Machine(1).cpu, ProbedCpu)


def test_a_pointer_that_was_right_by_chance_in_one_engine_is_not_followed_in_another() -> None:
    """What lies just before the CPU in one engine lies elsewhere in the next."""
    found, engine = probe(), Engine(Memory(1))
    right = EngineRegisters(engine, found)
    engine.write("edx", 77)
    assert right.view[1][4] == 77
    wrong = tuple((place, distance + 8) for place, distance in found.running)
    assert EngineRegisters(engine, replace(found, running=wrong + found.running)).view[1][4] == 77
    with pytest.raises(ProbeError, match="not where they are in another engine"):
        EngineRegisters(engine, replace(found, running=wrong))
