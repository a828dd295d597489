"""Facts about rings and traps of Unicorn 2.1.4 that the machine room relies on."""

from __future__ import annotations

import sys

import pytest
from unicorn import UcError
from unicorn import x86_const as x86

CODE = 0x4000


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize(
    "code", ["hlt", "cli", "sti", "mov eax, cr3", "lgdt [0x20000]", "invlpg [0x20000]", "wrmsr", "rdtsc"]
)
def test_privileged_instructions_raise_gp_at_the_instruction(bench, ring: int, code: str) -> None:
    """Real protection works, and CR4.TSD makes RDTSC trap outside ring 0."""
    bench.enter_ring(ring)
    bench.run(f"nop\n{code}")
    assert bench.vectors == [(13, CODE + 1)]


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize(
    "code",
    ["pushfd\npopfd", "sgdt [0x20000]", "sidt [0x20000]", "smsw eax", "sldt eax", "str eax", "lar eax, ecx", "verr ax"],
)
def test_the_holes_of_x86_do_not_trap(bench, ring: int, code: str) -> None:
    """Sensitive instructions that are not privileged run silently in every ring."""
    bench.enter_ring(ring)
    bench.run(f"{code}\nint 0x40")
    assert [vector for vector, _ in bench.vectors] == [0x40]


@pytest.mark.parametrize(
    ("code", "vector", "behind"), [("int 0x80", 0x80, 2), ("int3", 3, 1), ("ud2", 6, 0), ("hlt", 13, 0)]
)
def test_software_interrupts_leave_eip_behind_and_faults_at_the_instruction(bench, code, vector, behind) -> None:
    """There is no IDT: everything comes to the hook; EIP says which kind it was."""
    bench.enter_ring(3)
    bench.run(code)
    assert bench.vectors == [(vector, CODE + behind)]


@pytest.mark.parametrize("code", ["int 0x40", "ud2", "mov eax, [0x40000000]"])
def test_interrupt_and_invalid_hooks_can_redirect_the_guest(bench, code: str) -> None:
    """A context restored in the hook is what goes on."""
    other = bench.context()
    words = other.raw[bench.layout.general :].cast("B")
    target = 0x5000
    words[128:132] = target.to_bytes(4, "little")
    bench.put("mov ebx, 7\nhlt_here: jmp hlt_here", target)
    bench.on_trap = lambda _vector: other.resume()
    bench.run(code, 20)
    assert bench.engine.read("ebx") == 7


def test_supervisor_pages_are_open_to_ring_1_and_closed_to_ring_3(bench) -> None:
    """Ring 1 counts as supervisor, as on hardware; so hiding needs absent pages."""
    bench.map(0x30, 0x30000 | 3)
    bench.enter_ring(1)
    bench.run("mov eax, [0x30000]\nint 0x40")
    assert [vector for vector, _ in bench.vectors] == [0x40]


def test_supervisor_pages_are_closed_to_ring_3(bench) -> None:
    """U/S works."""
    bench.map(0x30, 0x30000 | 3)
    bench.enter_ring(3)
    bench.run("mov eax, [0x30000]\nint 0x40")
    assert bench.vectors == [(14, CODE)]


def test_write_protection_holds_for_ring_1(bench) -> None:
    """CR0.WP works: a read-only mapping of a descriptor table is safe from a kernel in ring 1."""
    bench.map(0x30, 0x30000 | 1)
    bench.enter_ring(1)
    bench.run("mov [0x30000], eax\nint 0x40")
    assert bench.vectors == [(14, CODE)]


def test_segment_limits_are_not_enforced(bench) -> None:
    """So the hypervisor's range has to be absent from the page tables."""
    small = 0x0000_B200_0000_0000 | 0x00FF | 0x0040 << 48 | 1 << 40
    bench.memory.qwords[(0x2000 >> 3) + 7] = small
    bench.enter_ring(1)
    bench.run("mov eax, 0x39\nmov ds, eax\nmov ecx, [0x20000]\nint 0x40")
    assert [vector for vector, _ in bench.vectors] == [0x40]


def test_single_step_flag_traps_after_each_instruction(bench) -> None:
    """EFLAGS.TF gives #DB."""
    bench.run("pushfd\nor dword ptr [esp], 0x100\npopfd\nnop\nnop")
    assert [vector for vector, _ in bench.vectors] == [1]


def test_the_cpu_model_has_no_rdrand(bench) -> None:
    """A source of chance would break replay."""
    bench.run("rdrand eax")
    assert bench.vectors == [(6, CODE)]


def test_two_faults_in_a_row_become_a_double_fault_unless_the_mark_is_cleaned(bench) -> None:
    """old_exception is never cleared by the library, since it uses no IDT."""
    bench.run("hlt_loop: mov ds, [selector]\nselector: .word 0x777")
    bench.engine.start(CODE, 5)
    assert [vector for vector, _ in bench.vectors] == [13, 8]


def test_a_clean_context_between_two_faults_keeps_them_single(bench) -> None:
    """old_exception stands in the context; -1 is clean."""
    clean = bench.context()
    for _ in range(3):
        clean.resume()
        bench.run("mov ds, [selector]\nselector: .word 0x777")
    assert [vector for vector, _ in bench.vectors] == [13, 13, 13]


def test_writing_selectors_by_name_does_not_change_the_ring(bench) -> None:
    """SS of another ring is refused, CS is taken without its ring; IRET or a context changes it."""
    with pytest.raises(UcError):
        bench.uc.reg_write(x86.UC_X86_REG_SS, 0x33)
    bench.uc.reg_write(x86.UC_X86_REG_CS, 0x2B)
    bench.run("mov eax, cr0\nint 0x40")
    assert [vector for vector, _ in bench.vectors] == [0x40]


def test_an_exception_in_a_hook_is_swallowed(bench, monkeypatch) -> None:
    """So hooks catch, stop, and raise again outside."""
    swallowed = []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    def fail(_vector: int) -> None:
        raise RuntimeError("from a hook")

    bench.on_trap = fail
    assert bench.run("int 0x40\nmov ebx, 5", 2) == 0
    assert bench.engine.read("ebx") == 5
    assert len(swallowed) == 1


def test_an_instruction_hook_cannot_redirect_the_guest(bench) -> None:
    """Another state resumed in the hook of IN does not go on there: so these stop, and trap outside."""
    other = bench.context()
    start = bench.layout.general + 128
    other.raw[start : start + 4] = (0x5000).to_bytes(4, "little")
    bench.put("mov ecx, 9", 0x5000)

    def on_in(_uc, _port, _size, _data) -> int:
        other.resume()
        return 0

    bench.engine.on_instruction(x86.UC_X86_INS_IN, on_in)
    bench.run("in al, 0x60\nmov ebx, 3", 2)
    assert (bench.engine.read("ebx"), bench.engine.read("ecx")) == (3, 0)
