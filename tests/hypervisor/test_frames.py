"""Exception frames, instruction by instruction, against the Intel SDM (volume 3, chapter 6)."""

from __future__ import annotations

from typing import Any

import pytest

from xenlab.abi.numbers import FLAT_RING1_CS, FLAT_RING3_CS, FLAT_RING3_SS
from xenlab.hypervisor.trace import Kind

# name: (probe, vector, EIP as bytes from `probe`, error code in ring 1, in ring 3); None: no error code.
# Faults stand at the instruction, traps behind it.
CASES: dict[str, tuple[str, int, int, int | None, int | None]] = {
    "div by zero": ("xor ecx, ecx\n div ecx", 0, 2, None, None),
    "idiv overflow": (".byte 0x99, 0xf7, 0x3d\n .long udata", 0, 1, None, None),
    "single step": ("pushfd\n or dword ptr [esp], 0x100\n popfd\n nop\n nop", 1, 10, None, None),
    "int3": ("int3", 3, 1, None, None),
    "int 3": (".byte 0xcd, 3", 3, 2, None, None),
    "into": ("mov al, 127\n add al, 1\n into", 4, 5, None, None),
    "bound": ("mov eax, 9\n bound eax, [udata + 4]", 5, 5, None, None),
    "ud2": ("ud2", 6, 0, None, None),
    "no such opcode": (".byte 0x0f, 0xff", 6, 0, None, None),
    "lock nop": (".byte 0xf0, 0x90", 6, 0, None, None),
    "syscall": (".byte 0x0f, 0x05", 6, 0, None, None),
    "load of an empty descriptor": ("mov eax, 0x10b\n mov ds, eax", 13, 5, 0x108, 0x108),
    "load of an empty descriptor of Xen's page": ("mov eax, 0xe00b\n mov ds, eax", 13, 5, 0xE008, 0xE008),
    "load of the last descriptor": ("mov eax, 0xfff9\n mov ds, eax", 13, 5, 0xFFF8, 0xFFF8),
    "load from the absent LDT": ("mov eax, 0xf\n mov ds, eax", 13, 5, 0xC, 0xC),
    "null stack segment": ("xor eax, eax\n mov ss, eax", 13, 2, 0, 0),
    "far jump to a null selector": (".byte 0xea\n .long after\n .short 0", 13, 0, 0, 0),
    "far jump to an empty descriptor": (".byte 0xea\n .long after\n .short 0x1238", 13, 0, 0x1238, 0x1238),
    "far jump to a data segment": (".byte 0xea\n .long after\n .short FLAT_RING3_DS", 13, 0, 0xE030, 0xE030),
    "load of a stack segment of another ring": ("mov eax, 0xe01b\n mov ss, eax", 13, 5, 0xE018, 0xE018),
    "iret with the nested-task flag": ("pushfd\n or dword ptr [esp], 0x4000\n popfd\n iretd", 10, 9, 0, 0),
    "x87 division by zero": ("fninit\n fldcw word ptr [udata + 12]\n fld1\n fldz\n fdivp\n fwait", 16, 14, None, None),
    "hlt": ("hlt", 13, 0, 0, 0),
    "cli": ("cli", 13, 0, 0, 0),
    "in": ("in al, 0x80", 13, 0, 0, 0),
    "out": ("out dx, eax", 13, 0, 0, 0),
    "sysenter": (".byte 0x0f, 0x34", 13, 0, 0, 0),
    "invlpg": ("invlpg [eax]", 13, 0, 0, 0),
    "lgdt": ("lgdt [udata]", 13, 0, 0, 0),
    "lidt": ("lidt [udata]", 13, 0, 0, 0),
    "ltr": ("ltr ax", 13, 0, 0, 0),
    "lldt": ("lldt ax", 13, 0, 0, 0),
    "lmsw": ("lmsw ax", 13, 0, 0, 0),
    # SWAPGS exists in 64-bit mode only.
    "swapgs": (".byte 0x0f, 0x01, 0xf8", 6, 0, None, None),
    "read of nothing": ("mov eax, [0x1000]", 14, 0, 0, 4),
    "write of nothing": ("mov [0x1000], eax", 14, 0, 2, 6),
    # Hardware says "write" (2, 6); the emulator reads first, so that is what faults.
    "read-modify-write of nothing": ("inc dword ptr [0x1000]", 14, 0, 0, 4),
    "push on nothing": ("mov esp, offset user_end + 0x100000\n push eax", 14, 5, 2, 6),
}

UNMASK = "mov byte ptr [shared_info + 1], 0"


def needs_other_stack(name: str, ring: int) -> bool:
    # A ring-1 kernel without a stack cannot be given a frame; its end is tested elsewhere.
    return name == "push on nothing" and ring == 1


@pytest.mark.parametrize("name", CASES)
def test_frame_is_what_hardware_would_push(name: str, ring: int, mode: Any, play: Any) -> None:
    if needs_other_stack(name, ring):
        pytest.skip("ends the guest")
    probe, vector, offset, *errors = CASES[name]
    seen = play(probe, ring, mode, udata=".long 0, 5, 8, 0")
    error = errors[ring == 3]
    assert seen.first.vector == vector
    frame = seen.frame
    assert frame["eip"] == seen.label("probe") + offset
    # A kernel begins with its events masked, and its IRET into ring 3 takes the mask away.
    assert frame["cs"] == (FLAT_RING3_CS if ring == 3 else FLAT_RING1_CS | 1 << 16)
    assert bool(frame["eflags"] & 0x200) == (ring == 3)
    assert frame.get("error") == error
    assert len(seen.first.words) == 3 + (error is not None) + 2 * (ring == 3)
    if ring == 3:
        assert frame["ss"] == FLAT_RING3_SS
    assert seen.first.from_ring == ring
    assert seen.first.to_ring == 1
    # The frame is in the guest's memory, at the handler's ESP.
    assert seen.word("seen", 16) == seen.first.frame
    assert seen.words(seen.first.frame, len(seen.first.words)) == seen.first.words
    assert not seen.domain.crashed


@pytest.mark.parametrize(
    ("probe", "address", "errors"),
    [
        ("mov eax, [0x1234]", 0x1234, (0, 4)),
        ("mov eax, 0x2000\n jmp eax", 0x2000, (0, 4)),
        ("mov eax, [user_end]", None, (None, 5)),
        ("mov byte ptr [start], 1", None, (None, 7)),
        ("mov esi, [boot_info_copy]\n mov esi, [esi + 60]\n mov [esi], eax", None, (3, None)),
        ("mov eax, [user_end - 2]", None, (None, 5)),
    ],
    ids=["read", "jump", "kernel page", "write kernel page", "write page table", "crossing"],
)
def test_page_fault_leaves_its_address_in_shared_info(
    probe: str, address: int | None, errors: tuple[int | None, int | None], ring: int, mode: Any, play: Any
) -> None:
    error = errors[ring == 3]
    if error is None:
        pytest.skip("no fault in this ring")
    seen = play(probe, ring, mode, setup="mov [boot_info_copy], esi", udata="boot_info_copy: .long 0")
    if address is None:
        address = {"[user_end]": "user_end", "[start]": "start", "[user_end - 2]": "user_end"}.get(
            next((part for part in ("[user_end]", "[start]", "[user_end - 2]") if part in probe), "")
        )
        address = seen.label(address) if address else seen.word(seen.word("boot_info_copy") + 60)
    # Only entries with NX make the CPU say that it was a fetch.
    fetch = 0x10 if mode.has_nx and "jmp" in probe else 0
    assert (seen.first.vector, seen.frame["error"]) == (14, error | fetch)
    shared = seen.xen.memory.words[(seen.domain.shared_info_mfn << 12) + 8 >> 2]
    assert shared == address == seen.word(0xC000_1000, 8)


def test_fetch_error_code_names_the_fetch_only_where_entries_have_nx(mode: Any, play: Any) -> None:
    seen = play("mov eax, 0x2000\n jmp eax", 1, mode)
    # NX is enabled in both, but without PAE there is no bit for it, and the CPU reports none.
    assert seen.frame["error"] == (0x10 if mode.has_nx else 0)
    assert seen.frame["eip"] == 0x2000


@pytest.mark.parametrize("vector", [0, 1, 5, 6, 8, 11, 13, 14, 17, 31, 32, 0x40, 0x81, 0x83, 0xFF])
@pytest.mark.parametrize("dpl", [0, 1, 3])
def test_software_interrupt_needs_a_gate_of_its_ring(vector: int, dpl: int, ring: int, play: Any) -> None:
    protection = "" if vector == 13 else ".byte 13, 0\n .short FLAT_RING1_CS\n .long handler\n"
    table = f"{protection}.byte {vector}, {dpl}\n .short FLAT_RING1_CS\n .long handler"
    seen = play(f"int {vector}", ring, table=table)
    if dpl >= ring:
        # No error code, whatever the vector: nothing failed.  EIP is behind the instruction.
        assert seen.first.vector == vector
        assert seen.first.words[0] == seen.label("after")
        assert len(seen.first.words) == 3 + 2 * (ring == 3)
    else:
        assert (seen.first.vector, seen.frame["error"]) == (13, vector * 8 + 2)
        assert seen.frame["eip"] == seen.label("probe")


@pytest.mark.parametrize("vector", [0x20, 0x80, 0x82, 0xFF])
def test_software_interrupt_without_a_gate(vector: int, play: Any) -> None:
    seen = play(f"int {vector}", 3, table=".byte 13, 0\n .short FLAT_RING1_CS\n .long handler")
    assert (seen.first.vector, seen.frame["error"]) == (13, vector * 8 + 2)
    assert seen.frame["eip"] == seen.label("probe")


def test_hypercall_from_an_application_is_refused(mode: Any, play: Any) -> None:
    seen = play("mov eax, __HYPERVISOR_sched_op\n mov ebx, 2\n mov ecx, offset reason\n int 0x82", 3, mode)
    assert (seen.first.vector, seen.frame["error"]) == (13, 0x412)
    assert seen.frame["eip"] == seen.label("after") - 2


@pytest.mark.parametrize("probe", ["int3", ".byte 0xcd, 3", "mov al, 127\n add al, 1\n into"])
def test_breakpoint_and_overflow_are_open_to_applications_whatever_the_gate_says(probe: str, play: Any) -> None:
    """Xen's own gates for vectors 3 and 4 have DPL 3, and it does not look at the guest's again."""
    seen = play(probe, 3)
    assert seen.first.vector in (3, 4)
    assert seen.frame["eip"] == seen.label("after")


def test_software_page_fault_does_not_pass_for_a_real_one(play: Any) -> None:
    """``int 14`` has neither an error code nor an address; CR2 of an earlier fault stays."""
    table = ".byte 14, 3\n .short FLAT_RING1_CS\n .long handler"
    seen = play("int 14", 3, table=table)
    assert len(seen.first.words) == 5
    assert seen.vcpu.control["cr2"] == 0


def test_software_protection_fault_is_not_emulated(play: Any) -> None:
    """After ``int 13`` EIP stands at the next instruction; that one has not faulted and must not be carried out."""
    table = ".byte 13, 1\n .short FLAT_RING1_CS\n .long handler"
    seen = play("int 13\n clts", 1, table=table)
    assert seen.first.vector == 13
    assert seen.frame["error"] == seen.label("probe") + 2  # the first word is EIP: there is no error code
    assert not seen.xen.trace.events(Kind.EMULATE)


RANGE = ("mov eax, [{0}]", "mov [{0}], eax", "inc dword ptr [{0}]", "mov eax, {0}\n jmp eax", "push dword ptr [{0}]")


@pytest.mark.parametrize("form", RANGE)
@pytest.mark.parametrize("where", ["start", "middle", "top", "wrap"])
def test_hypervisor_range_is_a_segment_limit(form: str, where: str, ring: int, mode: Any, play: Any) -> None:
    # What lies below, the machine-to-physical list, can be read.
    start = 0xF680_0000 if mode.has_nx else 0xFC40_0000
    address = {"start": start, "middle": 0xFD12_3456, "top": 0xFFFF_FFFC, "wrap": 0xFFFF_FFFE}[where]
    seen = play(form.format(hex(address)), ring, mode)
    assert (seen.first.vector, seen.frame["error"]) == (13, 0)
    jump = "jmp" in form
    assert seen.frame["eip"] == (address if jump else seen.label("probe"))
    # Nothing of the hypervisor's went into a register, and the address is not reported as a page's.
    assert seen.word("seen", 4) in (seen.label("table"), 0x8000)
    assert seen.vcpu.control["cr2"] == 0


def test_descriptor_table_can_be_read_by_the_kernel_but_not_written(mode: Any, play: Any) -> None:
    seen = play("mov ebx, [0xff00e018]\n mov ecx, [0xff00e01c]\n mov [0xff00e018], ebx", 1, mode)
    assert (seen.first.vector, seen.frame["error"]) == (13, 0)
    low, high = seen.word("seen", 4), seen.word("seen", 8)
    assert high >> 13 & 3 == 1  # a descriptor of ring 1
    assert low
    for probe in ("mov ebx, [0xff00e018]", "mov [0xff00e018], ebx"):
        assert play(probe, 3, mode).first.vector == 13


@pytest.mark.parametrize("selector", ["FLAT_RING1_DS", "FLAT_RING3_DS"])
def test_descriptor_loads_do_not_write_the_table(selector: str, mode: Any, play: Any) -> None:
    """The accessed bits are set beforehand: a load that had to set one would fault on the read-only page."""
    seen = play(f"mov eax, {selector}\n mov fs, eax\n mov gs, eax", 1, mode)
    assert seen.first.vector == 0x80


def test_ring3_cannot_load_the_kernels_segments(play: Any) -> None:
    seen = play("mov eax, FLAT_RING1_DS\n mov ds, eax", 3)
    assert (seen.first.vector, seen.frame["error"]) == (13, FLAT_RING1_CS + 8 & ~7)


@pytest.mark.parametrize("probe", ["sgdt [udata]", "sidt [udata]", "sldt eax", "str eax", "smsw eax", "pushfd\n popfd"])
def test_holes_of_x86_do_not_trap(probe: str, ring: int, mode: Any, play: Any) -> None:
    assert play(probe, ring, mode).first.vector == 0x80


def test_sgdt_tells_an_application_where_the_hypervisor_is(mode: Any, play: Any) -> None:
    seen = play("sgdt [udata]", 3, mode)
    data = seen.xen.guest_memory.read(seen.vcpu, seen.label("udata"), 6)
    assert (data[:2], data[2:]) == (b"\xff\xff", (0xFF00_0000).to_bytes(4, "little"))


def test_popf_silently_keeps_the_interrupt_flag(ring: int, play: Any) -> None:
    seen = play("pushfd\n and dword ptr [esp], 0xfffffdff\n popfd\n pushfd\n pop ebx", ring, setup=UNMASK)
    assert seen.first.vector == 0x80
    assert seen.first.words[2] & 0x200  # still set: the instruction was ignored, not refused


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("gate_flags", [0, 4])
def test_event_mask_in_the_frame(masked: int, gate_flags: int, ring: int, play: Any) -> None:
    table = f".byte 6, {gate_flags}\n .short FLAT_RING1_CS\n .long handler"
    seen = play(
        "ud2", ring, table=table, setup=f"mov byte ptr [shared_info + 1], {masked}", flags=hex(0x202 ^ masked << 9)
    )
    cs, eflags = seen.first.words[1], seen.first.words[2]
    assert cs >> 16 == masked
    assert bool(eflags & 0x200) is not bool(masked)
    assert eflags & 0x3000 == 0
    mask = seen.xen.memory.bytes[(seen.domain.shared_info_mfn << 12) + 1]
    assert mask == (1 if gate_flags else masked)


@pytest.mark.parametrize("probe", ["nop", "pushfd", "mov eax, ebx"])
def test_a_single_step_is_seen_in_dr6(probe: str, ring: int, mode: Any, play: Any) -> None:
    flags = "pushfd\n or dword ptr [esp], 0x100\n popfd"
    seen = play(f"{flags}\n {probe}", ring, mode)
    assert seen.first.vector == 1
    assert seen.vcpu.control["dr6"] == 0xFFFF_4FF0


def test_int_1_is_no_step(play: Any) -> None:
    seen = play("int 1", 1, table=".byte 1, 1\n .short FLAT_RING1_CS\n .long handler")
    assert seen.first.vector == 1
    assert seen.vcpu.control["dr6"] == 0xFFFF_0FF0


def test_handler_runs_without_trap_and_alignment_flags(play: Any) -> None:
    seen = play("nop", 3, flags="0x44302")
    assert seen.first.vector == 1
    assert seen.frame["eflags"] & 0x40100 == 0x40100
    assert seen.vcpu.state.eflags & 0x40100 == 0
