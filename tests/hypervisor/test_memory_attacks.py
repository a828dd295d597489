"""Hostile guests against the memory of others and the page tables of their own.

Each test says what is attacked (background), what must hold (invariant), and how (construction).  The auditor looks at
the whole machine after every hypercall (see `conftest`), and a neighbour has to get on and to keep its bytes.
"""

from __future__ import annotations

import signal
import struct
from typing import Any

import pytest
from hostile_guest import BASE, NEIGHBOUR, Outcome, machine, source, suffer, their_frames
from hypothesis import given
from hypothesis import strategies as st

from xenlab import boot
from xenlab.abi.numbers import HYPERCALL_VECTOR, Errno
from xenlab.errors import HypercallError
from xenlab.hypervisor.auditor import check
from xenlab.hypervisor.descriptor_tables import checked_descriptor
from xenlab.hypervisor.frames import FREE, FrameType
from xenlab.hypervisor.layout import segments_end
from xenlab.hypervisor.trace import Kind
from xenlab.machine.paging import PAE, TWO_LEVEL
from xenlab.machine.segments import Descriptor
from xenlab.timeline import Timeline
from xenlab.timeline.digest import machine_hash


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    """Each kind of CPU."""
    return bool(request.param)


WRITABLE_TABLES = """
        mov ebx, VMASST_CMD_enable
        mov ecx, VMASST_TYPE_writable_pagetables
        mov eax, __HYPERVISOR_vm_assist
        int 0x82
        call note
"""
# EDI becomes the linear address of the l1 entry that maps `one`.
OWN_ENTRY = """
        mov eax, LEAF_TABLE
        call table_at
        mov edi, offset one
        shr edi, 12
        and edi, ENTRIES - 1
        lea edi, [eax + edi * ENTRY_SIZE]
"""


def test_port_input_into_an_open_page_table(mode: Any, portable: bool) -> None:
    """Background: INS stores a zero before the CPU asks whether the port may be used at all.

    Invariant: the trap of an instruction reaches the guest that executed it, also if ending the instruction ended that
    guest.
    Construction: INS to the frame number of a leaf entry, which the table's supervision takes back, and no handler:
    the attacker is ended while its instruction has still a trap to take, and the neighbour is next.
    """
    attack = f"""{WRITABLE_TABLES}
        xor ebx, ebx
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        call note
        {OWN_ENTRY}
        add edi, 2
        mov eax, 0x41414141
        insb
"""
    after = suffer(attack, mode, portable)
    assert after.results(2) == (0, 0)
    assert "exception 13 (#GP protection) and no handler" in after.attacker.report
    assert "insb" in after.attacker.report
    assert after.word("one") == 0


# `one` becomes a local descriptor table: mapped read-only, so that it may be one.
LOCAL_TABLE = """
        mov eax, offset one
        call mfn_of
        mov edx, eax
        mov eax, offset one
        mov ecx, 1
        call map
        call note
        mov eax, MMUEXT_SET_LDT
        mov edx, offset one
        mov ecx, 512
        call extended
        call note
"""


@pytest.mark.parametrize(
    "touch", ["mov dword ptr [0xff010000], 1", "mov eax, 0xff010000\n jmp eax"], ids=["written", "executed"]
)
def test_local_descriptors_touched_by_the_guest(touch: str, mode: Any, portable: bool) -> None:
    """Background: the CPU's own look into the LDT faults, the hypervisor puts the page there and lets it look again.

    Invariant: what faults again is a fault; a use of the page is counted once; time passes.
    Construction: the kernel writes to the hypervisor's mapping of its LDT, or executes it: present by then,
    and refused each time.
    """
    after = suffer(f"{LOCAL_TABLE} {touch}", mode, portable)
    # Where there is no execute permission to refuse, zeros are an instruction that stores to the same page.
    refused = 17 if "jmp" in touch and mode.has_nx else 3
    assert after.results(4) == (0, 0, 14, refused)
    assert after.xen.frames.uses[after.frame_of("one")] == 1


def test_a_root_table_that_frees_itself(mode: Any) -> None:
    """Background: with the last use of a table goes what its entries name; with the last reference to a frame, its
    contents.

    Invariant: dropping a table drops all that it names, each once.
    Construction: a root table that its owner has given up, and whose only other reference is a read-only mapping in
    an l1 table below its own first entry.  It is scrubbed while its entries are being dropped.
    """
    entries = (("one", 0, "two"), ("one", 1, "three"), ("two", 0, "one"))
    if len(mode.levels) == 3:
        entries = (("one", 0, "four"), ("one", 1, "five"), ("four", 0, "two"), ("five", 0, "three"), ("two", 0, "one"))
    fill = "".join(
        f"""
        mov eax, offset {below}
        call mfn_of
        shl eax, 12
        or eax, 1
        mov [{table} + {index} * ENTRY_SIZE], eax
"""
        for table, index, below in entries
    )
    close = "".join(
        f"""
        mov eax, offset {name}
        xor edx, edx
        xor ecx, ecx
        call map
        call note
"""
        for name in ("one", "two", "three", "four", "five")
    )
    attack = f"""
        xor eax, eax
        call table_at
        mov esi, eax
        mov edi, offset one
        mov ecx, 1024
        rep movsd
        {fill}
        {close}
        mov eax, offset one
        call mfn_of
        mov ebp, eax
        mov edx, eax
        mov eax, MMUEXT_NEW_BASEPTR
        call extended
        call note
        mov eax, XENMEM_decrease_reservation
        mov edx, ebp
        call memory
        call note
        xor eax, eax
        call table_mfn
        mov edx, eax
        mov eax, MMUEXT_NEW_BASEPTR
        call extended
        call note
"""
    after = suffer(attack, mode)
    assert after.results(8) == (0, 0, 0, 0, 0, 0, 1, 0)
    frames = after.xen.frames
    assert frames.owner[after.frame_of("one")] == FREE
    for name in ("two", "three"):
        assert (frames.type[after.frame_of(name)], frames.refs[after.frame_of(name)]) == (FrameType.NONE, 1)
    after.xen.destroy(after.attacker)
    assert frames.owned_by(after.attacker.domid) == []


def test_the_control_domain_takes_no_tables_of_others(mode: Any) -> None:
    """Background: the control domain may map the pages of a domain that it names.

    Invariant: a page table is its owner's; nobody else walks or drops it.
    Construction: the control domain names its neighbour for an update, and a table of the neighbour's for an entry
    above the leaves.
    """
    xen = machine()
    control = boot(xen, NEIGHBOUR, name="control", mode=mode, privileged=True)
    other = boot(xen, NEIGHBOUR, name="neighbour", mode=mode)
    xen.run(10)
    vcpu, theirs = control.vcpus[0], other.vcpus[0]
    top = mode.levels[-2].index(BASE)
    roots = [state.cr3 >> 12 for state in (vcpu.state, theirs.state)]
    for _level in mode.levels[2:]:
        roots = [mode.frame_of(mode.read(xen.memory, root << 12, 3)) for root in roots]
    leaves = mode.read(xen.memory, roots[1] << 12, top)
    request = struct.pack("<QQ", roots[0] << 12 | (top + 8) * mode.entry_size, leaves)
    xen.guest_memory.write(vcpu, control.symbols["secret"], request)
    xen.current = vcpu
    xen.cpu.load(vcpu.state)
    for name, value in zip(("eax", "ebx", "ecx", "edx", "esi"), (1, control.symbols["secret"], 1, 0, 1), strict=True):
        setattr(vcpu.state, name, value)
    xen.trap(HYPERCALL_VECTOR, 0, 0)
    assert vcpu.state.eax == -Errno.EINVAL & 0xFFFF_FFFF
    assert xen.frames.uses[mode.frame_of(leaves)] == 1


# A descriptor table in `one`: entry 1 is the descriptor at `descriptor`.
GLOBAL_TABLE = """
        mov eax, [descriptor]
        mov [one + 8], eax
        mov eax, [descriptor + 4]
        mov [one + 12], eax
        mov eax, offset one
        call mfn_of
        mov [extent], eax
        mov edx, eax
        mov eax, offset one
        mov ecx, 1
        call map
        call note
        mov ebx, offset extent
        mov ecx, 512
        mov eax, __HYPERVISOR_set_gdt
        int 0x82
        call note
"""


def test_handlers_in_a_segment_that_does_not_begin_at_0(mode: Any, portable: bool) -> None:
    """Background: time is instructions begun, and a handler on a page that is not there begins none.

    Invariant: a guest cannot stop time.
    Construction: the handler's segment has a base, so the address that could not be fetched is not the handler's
    offset.  The stack lies in a page that is mapped all over the guest's address space.
    """
    attack = f"""
        jmp over
        .align 8
descriptor: .quad 0x40cfbb1000000fff    # code for ring 1 from 0x40100000 on
faults: .byte 14, 0
        .short 9
        .long 0x1000
        .long 0, 0
over:   {GLOBAL_TABLE}
        mov eax, offset two             # a table that maps one page everywhere
        call mfn_of
        shl eax, 12
        or eax, 3
        mov edi, offset three
        mov ecx, ENTRIES
        xor edx, edx
1:      mov [edi], eax
        .if ENTRY_SIZE == 8
        mov [edi + 4], edx
        .endif
        add edi, ENTRY_SIZE
        loop 1b
        mov eax, offset three
        xor edx, edx
        xor ecx, ecx
        call map
        call note
        mov ebp, 16
2:      mov eax, TOP_TABLE              # in many entries of the table above
        call table_mfn
        shl eax, 12
        lea eax, [eax + ebp * ENTRY_SIZE]
        push eax
        mov eax, offset three
        call mfn_of
        mov edx, eax
        shl edx, 12
        or edx, 3
        xor ecx, ecx
        pop eax
        call update
        inc ebp
        cmp ebp, 80
        jne 2b
        call note
        mov ebx, offset faults
        mov eax, __HYPERVISOR_set_trap_table
        int 0x82
        mov esp, 80 << ENTRY_SHIFT
        .if ENTRY_SIZE == 8
        add esp, 0xc0000000
        .endif
        mov eax, [0xf0000000]
"""
    after = suffer(attack.replace("ENTRY_SHIFT", "22" if len(mode.levels) == 2 else "21"), mode, portable)
    assert after.results(4) == (0, 0, 0, 0)
    assert "triple fault" in after.attacker.report


ONE_STORE = f"""{WRITABLE_TABLES} {OWN_ENTRY}
        mov ecx, 300
1:      loop 1b
        mov dword ptr [edi], 0
        mov eax, [edi]
        call note
        mov ecx, 1000
1:      loop 1b
"""


def test_replay_of_a_store_to_a_page_table(mode: Any, portable: bool) -> None:
    """Background: a store that faults again while its page is open is not opened a second time.

    Invariant: what was executed once is executed in every replay.
    Construction: the only store to a page table between two snapshots, and a step back behind it: the moment at which
    a page was last opened comes again.
    """
    xen = machine(portable)
    guest = boot(xen, source(ONE_STORE, mode), mode=mode)
    timeline = Timeline(xen, interval=200, snapshots=30)
    hashes = {}
    while timeline.position < 900:
        timeline.run(61)
        hashes[timeline.position] = machine_hash(xen)
    for time in [*reversed(hashes), *hashes]:
        timeline.seek(time)
        assert machine_hash(xen) == hashes[time]
    assert not guest.ended


def test_interrupt_while_a_page_table_is_open(mode: Any, portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Background: Ctrl-C ends a run before the next instruction.

    Invariant: the instruction for which a page table was opened is executed before anything else is.
    Construction: Ctrl-C right behind the opening.
    """
    xen = machine(portable)
    guest = boot(xen, source(ONE_STORE, mode), mode=mode)
    step = xen.cpu.single_step

    def interrupted(done: Any) -> None:
        step(done)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(xen.cpu, "single_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        xen.run(2_000)
    xen.run(2_000)
    assert guest.ended
    results = guest.symbols["results"]
    assert xen.guest_memory.read_words(guest.vcpus[0], results, 3) == (0, 0, 0)
    assert xen.guest_memory.read_word(guest.vcpus[0], guest.symbols["cursor"]) == results + 8


def test_local_descriptors_in_another_address_space(mode: Any, portable: bool) -> None:
    """Background: the LDT has a linear address, and its pages are shown to the CPU when it first looks.

    Invariant: what the CPU finds in it is what stands at that address now.
    Construction: a page of the LDT is shown, another root table is loaded, and the page is mapped writable.  Where it
    stays shown that is refused, and a guest with another LDT at the same address goes on with the old one.
    """
    attack = f"""
        mov dword ptr [one + 8], 0x0000ffff     # data for ring 1
        mov dword ptr [one + 12], 0x00cfb300
        {LOCAL_TABLE}
        mov eax, 13
        mov fs, eax
        xor eax, eax
        call table_mfn
        mov edx, eax
        mov eax, MMUEXT_NEW_BASEPTR
        call extended
        call note
        mov eax, offset one
        call mfn_of
        mov edx, eax
        mov eax, offset one
        mov ecx, 3
        call map
        call note
        mov eax, 13
        mov fs, eax                             # now the page cannot be shown: a page fault at its address
"""
    after = suffer(attack, mode, portable)
    assert after.results(6) == (0, 0, 0, 0, 14, 0)
    info = after.attacker.shared_info_mfn << 12
    assert after.xen.memory.words[info + 8 >> 2] == after.attacker.symbols["one"] + 8


def test_code_written_as_a_descriptor(mode: Any, portable: bool) -> None:
    """Background: the CPU does not notice that the hypervisor writes over code it has translated.

    Invariant: new code is executed at once, and so in every replay.
    Construction: a function is changed by `update_descriptor`, which also writes to ordinary pages.
    """
    attack = """
        mov dword ptr [one], 0x000001b8         # mov eax, 1; inc eax; ret
        mov dword ptr [one + 4], 0x00c34000
        call one
        call one
        call note
        mov eax, offset one
        call mfn_of
        shl eax, 12
        mov ebx, eax
        xor ecx, ecx
        mov edx, 0x000002b8
        mov esi, 0x00c34000
        mov eax, __HYPERVISOR_update_descriptor
        int 0x82
        call note
        call one
        call note
"""
    assert suffer(attack, mode, portable).results(3) == (2, 0, 3)


@given(
    value=st.integers(0, 2**64 - 1),
    base=st.integers(-0x3000, 0x3000),
    mode=st.sampled_from([TWO_LEVEL, PAE]),
)
def test_no_segment_reaches_the_hypervisor(value: int, base: int, mode: Any) -> None:
    """Background: on the paper's machines nothing but segment limits protects the hypervisor.

    Invariant: a descriptor that was checked does not give ring 0, is a segment that ends below the hypervisor if it
    begins there, and is not changed by being checked again.
    Construction: all descriptors, near the end of the guest's part too.
    """
    end = segments_end(mode)
    for start in (value >> 16 & 0xFF_FFFF | value >> 56 << 24, end + base):
        wanted = value & ~0xFF00_00FF_FFFF_0000 | (start & 0xFF_FFFF) << 16 | start >> 24 << 56
        try:
            checked = checked_descriptor(wanted, end)
        except HypercallError:
            assert Descriptor.decode(wanted).present
            continue
        found = Descriptor.decode(checked)
        assert checked_descriptor(checked, end) == checked
        if found.present:
            assert found.dpl > 0
            assert found.is_segment or not found.access & 0xF
            assert not found.is_segment or not found.base < end <= found.base + found.limit


def call(*lines: str) -> str:
    """Assembly lines and a note of the result."""
    return "\n".join((*lines, "call note", ""))


def remap(name: str, flags: int, frame: str = "") -> str:
    """Map the page ``name`` with ``flags``: its own frame, or another."""
    find = f"mov edx, {frame}" if frame else f"mov eax, offset {name}\n call mfn_of\n mov edx, eax"
    return call(find, f"mov eax, offset {name}", f"mov ecx, {flags}", "call map")


def extended(command: str, frame: str, second: str = "0") -> str:
    """One ``mmuext_op`` on a frame: a number, or the frame of a page of the guest's."""
    find = f"mov edx, {frame}" if frame.isupper() else f"mov eax, offset {frame}\n call mfn_of\n mov edx, eax"
    return call(find, f"mov eax, {command}", f"mov ecx, {second}", "call extended")


def decrease(frame: str) -> str:
    """Give up a frame."""
    find = f"mov edx, {frame}" if frame.isupper() else f"mov eax, offset {frame}\n call mfn_of\n mov edx, eax"
    return call(find, "mov eax, XENMEM_decrease_reservation", "call memory")


def guarded(store: str, label: str) -> str:
    """A store that should fault; the attack goes on behind it."""
    return f"mov dword ptr [resume], offset {label}\n {store}\n{label}: mov dword ptr [resume], offset finish\n"


EPERM, EFAULT, EBUSY, EINVAL, ENOSYS = (
    -Errno.EPERM,
    -Errno.EFAULT,
    -Errno.EBUSY,
    -Errno.EINVAL,
    -Errno.ENOSYS,
)
SELF_ENTRY = """
        mov eax, offset one
        call mfn_of
        shl eax, 12
        or eax, {flags}
        mov [one], eax
"""


def test_a_page_table_mapped_writable(mode: Any, portable: bool) -> None:
    """Background: whoever writes to a page table past the hypervisor maps what he likes.

    Invariant: no frame is a page table and writable.
    Construction: the first l1 table mapped writable; stored to where it is mapped; a page that is mapped writable
    pinned; a table with itself as a writable leaf; the same with the leaf made writable only after it is a table.
    """
    attack = (
        call("mov eax, LEAF_TABLE", "call table_mfn", "mov edx, eax", "mov eax, offset two", "mov ecx, 3", "call map")
        + guarded("mov eax, LEAF_TABLE\n call table_at\n mov dword ptr [eax], 0", "stored")
        + extended("MMUEXT_PIN_L1_TABLE", "one")
        + SELF_ENTRY.format(flags=3)
        + remap("one", 1)
        + extended("MMUEXT_PIN_L1_TABLE", "one")
        + remap("one", 3)
        + SELF_ENTRY.format(flags=1)
        + remap("one", 1)
        + extended("MMUEXT_PIN_L1_TABLE", "one")
        + call("mov eax, offset one", "call mfn_of", "shl eax, 12", "lea edx, [eax + 3]", "xor ecx, ecx", "call update")
        + remap("one", 3)
    )
    after = suffer(attack, mode, portable)
    assert after.results(11) == (EBUSY, 14, 3, EINVAL, 0, EBUSY, 0, 0, 0, EBUSY, EBUSY)


def test_flags_that_change_what_an_entry_means(mode: Any) -> None:
    """Background: an update that leaves frame and permission as they are takes nothing and drops nothing, and so may be
    quick (Xen advisory 182).

    Invariant: no entry has a flag that gives it another meaning than the one that was checked.
    Construction: superpage, global, uncached and reserved bits on new entries and on those that are there, at the
    leaves and above; and the write permission of a read-only mapping of a page table.
    """
    flags = [0x81, 0x101, 0x11, 0x9, 0x83, 0x103]
    above = """
        mov eax, TOP_TABLE
        call table_mfn
        shl eax, 12
        add eax, TOP_INDEX * ENTRY_SIZE
        push eax
        mov eax, LEAF_TABLE
        call table_mfn
        mov edx, eax
        shl edx, 12
        or edx, {flags}
        mov ecx, {high}
        pop eax
        call update
"""
    attack = "".join(remap("one", number) for number in flags)
    attack += "".join(call(above.format(flags=number, high=0)) for number in (0xE7, 0x167, 0x77))
    attack += call(
        "mov eax, LEAF_TABLE\n call table_at\n push eax\n call mfn_of\n mov edx, eax\n pop eax",
        "mov ecx, 3",
        "call map",
    )
    count = len(flags) + 3
    if mode is PAE:
        attack += call(above.format(flags=0x67, high=1 << 30))
    after = suffer(attack, mode)
    assert after.results(count + 1) == (EINVAL,) * count + (EBUSY,)
    assert mode is not PAE or after.results(count + 2)[-1] == EINVAL


def test_entry_addresses_between_entries() -> None:
    """Background: the lowest bits of an entry's address are a command.

    Invariant: an entry is changed as a whole or not at all.
    Construction: all commands that are none; where an entry has four bytes, there are four commands.
    """
    mode, commands = PAE, range(4, PAE.entry_size)
    attack = "".join(
        call("mov eax, offset two", "call entry_of", f"or eax, {number}", "xor edx, edx", "xor ecx, ecx", "call update")
        for number in commands
    )
    assert suffer(attack, mode).results(len(commands)) == (ENOSYS,) * len(commands)


@pytest.mark.parametrize(
    "frame",
    [
        "THEIR_PAGE",
        "THEIR_TABLE",
        "THEIR_SHARED_PAGE",
        "THEIR_DESCRIPTORS",
        "FLAT_DESCRIPTORS",
        "NUMBER_LIST",
        "NO_FRAME",
    ],
)
def test_frames_of_others(frame: str, mode: Any) -> None:
    """Background: guests name machine frames, and can name any.

    Invariant: a guest gets at frames of its own only.
    Construction: frames of the neighbour's, the hypervisor's and none at all in every place where a frame is named.
    """
    attack = (
        remap("one", 3, frame)
        + remap("one", 1, frame)
        + extended("MMUEXT_PIN_L1_TABLE", frame)
        + extended("MMUEXT_PIN_L2_TABLE", frame)
        + extended("MMUEXT_UNPIN_TABLE", frame)
        + extended("MMUEXT_NEW_BASEPTR", frame)
        + extended("MMUEXT_NEW_USER_BASEPTR", frame)
        + extended("MMUEXT_CLEAR_PAGE", frame)
        + extended("MMUEXT_COPY_PAGE", "one", frame)
        + decrease(frame)
        + call(f"mov eax, {frame} << 12", "xor edx, edx", "xor ecx, ecx", "call update")
        + call(f"mov eax, {frame} << 12 | 1", "xor edx, edx", "xor ecx, ecx", "call update")
        + call(
            "mov eax, TOP_TABLE\n call table_mfn\n shl eax, 12\n add eax, (TOP_INDEX + 8) * ENTRY_SIZE",
            f"mov edx, {frame} << 12 | 7",
            "xor ecx, ecx",
            "call update",
        )
        + call(
            f"mov dword ptr [extent], {frame}",
            "mov ebx, offset extent",
            "mov ecx, 1",
            "mov eax, __HYPERVISOR_set_gdt",
            "int 0x82",
        )
        + call(
            f"mov ebx, {frame} << 12",
            "xor ecx, ecx\n xor edx, edx",
            "mov eax, __HYPERVISOR_update_descriptor",
            "int 0x82",
        )
    )
    after = suffer(attack, mode)
    results = after.results(15)
    assert results[:2] == ((EPERM if frame == "NO_FRAME" else EBUSY),) * 2
    assert results[2:9] == (EINVAL,) * 7
    assert results[9] == 0
    assert results[10:] == (EINVAL,) * 5


STALE = {
    "page table": remap("one", 1) + extended("MMUEXT_PIN_L1_TABLE", "one"),
    "descriptors": remap("one", 1)
    + call(
        "mov eax, offset one\n call mfn_of\n mov [extent], eax",
        "mov ebx, offset extent",
        "mov ecx, 512",
        "mov eax, __HYPERVISOR_set_gdt",
        "int 0x82",
    ),
    "nobody's": remap("one", 0, "0") + "mov eax, offset one\n" + decrease("one"),
}


class NeverFlush:
    """A policy that believes in guests."""

    def must_flush(self, _reason: str, _left: int, _flushes: int) -> bool:
        return False


@pytest.mark.parametrize("becomes", STALE)
def test_a_stale_translation_used(becomes: str, mode: Any, portable: bool) -> None:
    """Background: the TLB keeps what the page table said, and guests decide when it is emptied.

    Invariant: no TLB entry leads to a frame of another owner, or lets a guest write to a page table.
    Construction: a page is written to, its mapping taken away without a flush, and its frame becomes something else.
    The store afterwards has to fault; where nobody flushes, it goes through.
    """
    attack = "mov dword ptr [one], 0\n" + STALE[becomes] + guarded("mov dword ptr [one + 64], 0x5000", "stale")
    after = suffer(attack, mode, portable)
    done = 1 if becomes == "nobody's" else 0
    assert after.results(4) == (0, done, 14, 2 if done else 3)
    assert not any(after.xen.memory.frame(after.frame_of("one"))[64:72])
    if becomes == "page table" and not portable:
        believing = machine(flush_policy=NeverFlush())
        after = suffer(attack, mode, xen=believing)
        assert after.noted == 2
        assert bytes(after.xen.memory.frame(after.frame_of("one"))[64:68]) == (0x5000).to_bytes(4, "little")


def set_gdt(page: str) -> str:
    """Use one page as descriptor table."""
    find = f"mov eax, offset {page}\n call mfn_of\n mov [extent], eax"
    return call(find, "mov ebx, offset extent\n mov ecx, 512", "mov eax, __HYPERVISOR_set_gdt", "int 0x82")


FORBIDDEN = {
    "call gate into the hypervisor's descriptors": 0x0000EC00E0080000,
    "interrupt gate": 0x0000EE00E0190000,
    "task gate": 0x0000E50000080000,
    "task state": 0x0000E90000000067,
    "busy task state": 0x0000EB0000000067,
    "local table": 0x0000E2000000FFFF,
    "data that grows downwards": 0x00CFF7000000FFFF,
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_descriptors_that_lead_to_ring_0(name: str, mode: Any) -> None:
    """Background: a far transfer through a gate or a task changes the ring.

    Invariant: no descriptor that the CPU can load gives ring 0, or leads there.
    Construction: each kind as part of a page that becomes a descriptor table, and stored into one by hypercall.
    """
    value = FORBIDDEN[name]
    attack = (
        f"mov dword ptr [one + 16], {value & 0xFFFF_FFFF:#x}\n mov dword ptr [one + 20], {value >> 32:#x}\n"
        + remap("one", 1)
        + set_gdt("one")
        + remap("two", 1)
        + set_gdt("two")
        + call(
            "mov eax, offset two\n call mfn_of\n shl eax, 12\n lea ebx, [eax + 8]",
            f"xor ecx, ecx\n mov edx, {value & 0xFFFF_FFFF:#x}\n mov esi, {value >> 32:#x}",
            "mov eax, __HYPERVISOR_update_descriptor",
            "int 0x82",
        )
        + remap("two", 3)
        + guarded("mov dword ptr [two + 8], 1", "stored")
    )
    after = suffer(attack, mode)
    assert after.results(8) == (0, EINVAL, 0, 0, EINVAL, EBUSY, 14, 3)


@pytest.mark.parametrize(("name", "access"), [("ring 0", 0x9A), ("conforming, ring 0", 0x9E)])
def test_code_for_ring_0(name: str, access: int, mode: Any, portable: bool) -> None:
    """Background: a code segment says in which ring it runs; a conforming one runs in that of its caller.

    Invariant: as above.
    Construction: flat code for ring 0 in a descriptor table of the guest's, entered by a far return; there CS is looked
    at, and an instruction for ring 0 tried.
    """
    attack = (
        f"mov dword ptr [one + 8], 0xffff\n mov dword ptr [one + 12], {0xCF << 16 | access << 8:#x}\n"
        + remap("one", 1)
        + set_gdt("one")
        + "push 9\n push offset inside\n retf\ninside: mov eax, cs\n call note\n"
        + guarded("lgdt [one]", "refused")
        + guarded("push 8\n push offset finish\n retf", "outside")
    )
    after = suffer(attack, mode, portable)
    assert after.results(7) == (0, 0, 9, 13, 0, 13, 8)
    stored = after.xen.memory.qwords[(after.frame_of("one") << 12) + 8 >> 3]
    assert stored >> 45 & 3 == 1, name


def test_frames_given_up_while_in_use(mode: Any, portable: bool) -> None:
    """Background: a guest may give a frame back at any time.

    Invariant: a frame that something refers to is nobody else's; a free one is referred to by nothing.
    Construction: a mapped page, a pinned table, the descriptor table in use, and the root table in use, are given up;
    each goes on as it was, none can be given up again, and what is not in use goes.
    """
    attack = (
        "mov dword ptr [three], 0x1234\n"
        + decrease("three")
        + decrease("three")
        + call("mov eax, [three]")
        + remap("two", 1)
        + extended("MMUEXT_PIN_L1_TABLE", "two")
        + decrease("two")
        + extended("MMUEXT_PIN_L1_TABLE", "two")
        + remap("one", 1)
        + set_gdt("one")
        + decrease("one")
        + remap("one", 0, "0")
        + call("mov eax, [boot_info]\n mov eax, [eax + 60]\n call mfn_of\n mov edx, eax", "mov eax, 1", "call memory")
        + remap("four", 0, "0")
        + decrease("four")
        + remap("four", 3)
    )
    after = suffer(attack, mode, portable)
    assert after.results(15) == (1, 0, 0x1234, 0, 0, 1, EINVAL, 0, 0, 1, 0, 1, 0, 1, EBUSY)
    frames, others = after.xen.frames, [after.frame_of(name) for name in ("one", "two", "three")]
    assert all(frames.owner[mfn] == after.attacker.domid for mfn in others)
    assert frames.owner[after.frame_of("four")] == FREE
    after.xen.destroy(after.attacker)
    assert all(frames.owner[mfn] == FREE for mfn in others)


def test_a_count_pushed_to_its_end(mode: Any) -> None:
    """Background: a count that overflows is 0, and a frame with none is free.

    Invariant: a use that cannot be counted is refused.
    Construction: one page is mapped again and again where counts end at 30; in single updates, and in one table
    that becomes one as a whole.
    """
    attack = (
        """
        xor ebx, ebx
        mov ebp, offset results + 0x80000
1:      mov eax, ebp
        call mfn_of
        mov eax, offset one
        call mfn_of
        mov edx, eax
        mov eax, ebp
        mov ecx, 1
        call map
        add ebp, 4096
        inc ebx
        test eax, eax
        jz 1b
        call note
        mov eax, ebx
        call note
        mov ecx, ENTRIES
        mov edi, offset two
        mov eax, offset one
        call mfn_of
        shl eax, 12
        or eax, 1
        mov ecx, 40
2:      mov [edi], eax
        add edi, ENTRY_SIZE
        loop 2b
"""
        + remap("two", 1)
        + extended("MMUEXT_PIN_L1_TABLE", "two")
    )
    after = suffer(attack, mode, xen=machine(most_uses=30))
    assert after.results(4) == (EBUSY, 29, 0, EBUSY)
    assert after.xen.frames.refs[after.frame_of("one")] == 30


def test_arrays_that_end_in_nothing(mode: Any) -> None:
    """Background: an array is read as it is worked through.

    Invariant: what was done is done completely, and counted; what was not done has changed nothing.
    Construction: the second of two updates lies on a page that is not there, and so does the count; the count lies
    in a page table, which Xen does not mind; a batch takes away the page that it stands on.
    """
    both = "mov ebx, offset two - 16\n mov esi, DOMID_SELF\n mov eax, __HYPERVISOR_mmu_update\n int 0x82"
    attack = (
        remap("two", 0, "0")
        + "mov eax, offset three\n call entry_of\n mov [two - 16], eax\n"
        + "xor eax, eax\n mov [two - 12], eax\n mov [two - 8], eax\n mov [two - 4], eax\n"
        + call("mov ecx, 2\n mov edx, offset request", both)
        + call("mov eax, [request]")
        + guarded("mov eax, [three]", "gone")
        + call("mov ecx, 1\n mov edx, offset two", both)
        + "mov eax, TOP_TABLE\n call table_at\n mov edx, eax\n"
        + call("mov ecx, 1", both)
        + "mov dword ptr [one], __HYPERVISOR_update_va_mapping\n mov dword ptr [one + 8], offset one\n"
        + "mov dword ptr [one + 20], 1\n"
        + "mov dword ptr [one + 32], __HYPERVISOR_xen_version\n"
        + call("mov ebx, offset one\n mov ecx, 2\n mov eax, __HYPERVISOR_multicall", "int 0x82")
    )
    after = suffer(attack, mode)
    assert after.results(8) == (0, EFAULT, 1, 14, 0, 0, 0, EFAULT)


TREE = (
    "".join(
        f"""
        mov eax, offset {below}
        call mfn_of
        shl eax, 12
        or eax, 1
        mov [one + {index} * ENTRY_SIZE], eax
"""
        for index, below in enumerate(("two", "three", "four"))
    )
    + remap("one", 1)
    + remap("two", 1)
    + remap("three", 1)
    + extended("MMUEXT_PIN_L2_TABLE", "one")
)


def interrupted_check(mode: Any, then: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A guest whose call pinned two tables of three when its allowance was used up, and what it does ``then``."""
    monkeypatch.setattr("xenlab.hypervisor.preemption.ALLOWANCE", 70)
    xen = machine()
    neighbour = boot(xen, NEIGHBOUR, mode=mode)
    xen.pause(neighbour)
    text = source(f"{TREE} jmp finish\n abandoned: {then}", mode, their_frames(xen, neighbour))
    attacker = boot(xen, text, name="attacker", mode=mode)
    while not xen.page_tables.partial:
        assert not attacker.ended
        xen.run(1)
    return xen, attacker


def test_a_check_that_is_never_ended(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Background: checking a tree of tables may be interrupted, and a guest need not make the call again (Xen
    advisories 45 and 299).

    Invariant: a table that is not checked to its end is used by nobody, and cannot become anything else.
    Construction: the call is abandoned half-way.  The table is mapped writable, updated, pinned as another level, and
    used as a root; a table that was not reached yet is given an entry of the neighbour's, and the check is ended.
    """
    then = (
        remap("one", 3)
        + call("mov eax, offset one\n call mfn_of\n shl eax, 12", "xor edx, edx\n xor ecx, ecx", "call update")
        + extended("MMUEXT_PIN_L1_TABLE", "one")
        + extended("MMUEXT_UNPIN_TABLE", "one")
        + remap("two", 3)
        + "mov dword ptr [four], THEIR_PAGE << 12 | 3\n"
        + remap("four", 1)
        + extended("MMUEXT_PIN_L2_TABLE", "one")
        + remap("one", 3)
        + remap("two", 3)
    )
    xen, attacker = interrupted_check(mode, then, monkeypatch)
    attacker.vcpus[0].state.eip = attacker.symbols["abandoned"]
    # The hypervisor had set it back to the call.
    xen.run(5_000)
    outcome = Outcome(xen, attacker, attacker)
    expected = (0, 0, 0, EBUSY, EINVAL, EINVAL, EINVAL, EBUSY, 0, EBUSY, 0, 0)
    assert outcome.results(12) == expected
    assert not xen.page_tables.partial


def test_the_end_in_the_middle_of_a_check(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Background and invariant: as above, and nothing is left of a domain that is destroyed.

    Construction: the domain is destroyed while the check of its tables is interrupted, and another one gets its number
    and its frames.
    """
    xen, attacker = interrupted_check(mode, "", monkeypatch)
    frames, domid = list(attacker.frames), attacker.domid
    xen.destroy(attacker)
    assert not xen.page_tables.partial
    assert all(xen.frames.owner[mfn] == FREE and not xen.frames.refs[mfn] for mfn in frames)
    check(xen)
    other = boot(xen, NEIGHBOUR, name="next", mode=mode)
    assert other.domid == domid
    xen.run(1_000)
    assert not other.ended


STORES = {
    "a mapping of a table": "mov eax, edi\n call mfn_of\n shl eax, 12\n or eax, 3\n mov [edi], eax",
    "another's page": "mov eax, THEIR_PAGE << 12 | 3\n mov [edi], eax",
    "superpage": "mov eax, [edi]\n or eax, 0x80\n mov [edi], eax",
    "by exchange": "mov eax, THEIR_PAGE << 12 | 1\n xchg [edi], eax",
    "by repetition": "mov eax, THEIR_PAGE << 12 | 1\n mov ecx, 1\n rep stosd",
    "by push": "mov esp, edi\n add esp, 4\n push THEIR_PAGE << 12 | 1",
    "its own permission": "mov eax, [edi + ebp]\n or eax, 2\n mov [edi + ebp], eax",
    "many at once": "mov eax, THEIR_PAGE << 12 | 1\n lea esp, [edi + 32]\n pushad",
    "by a float": "fld qword ptr [secret]\n fstp qword ptr [edi]",
}


@pytest.mark.parametrize("name", STORES)
def test_stores_to_an_open_page_table(name: str, mode: Any, portable: bool) -> None:
    """Background: a store to a page table is executed with the page open, and judged afterwards.

    Invariant: between two instructions no page table is writable, and an entry that may not stand there does not.
    Construction: entries that `mmu_update` would refuse, by instructions that store in different ways; among them
    the entry that maps the table itself, made writable through itself.
    """
    own = "mov ebp, edi\n and ebp, 0xfffff000\n shr ebp, 12\n and ebp, ENTRIES - 1\n"
    own += "lea ebp, [ebp * ENTRY_SIZE]\n mov eax, edi\n and eax, 4095\n sub ebp, eax\n"
    attack = f"""
        jmp over
        .align 8
secret: .long THEIR_PAGE << 12 | 3, 0
over:   {WRITABLE_TABLES} {OWN_ENTRY} {own}
        mov ebx, [edi]
        mov [two], ebx
        mov [two + 4], edi
        {guarded(STORES[name], "stored")}
        mov edi, [two + 4]
        mov eax, [edi]
        sub eax, [two]
        and eax, 0xffffff9f     # the marks of the MMU
        call note
"""
    after = suffer(attack, mode, portable)
    if "esp" in STORES[name]:
        # The page fault is to be pushed where it was refused to push.
        assert "is not on writable memory" in after.attacker.report
    else:
        assert after.results(4) == (0, 14, 3, 0)
    kept = [event for event in after.xen.trace.events(Kind.TABLE_WRITE) if event.kept]
    assert not kept


def test_frames_exchanged_while_in_use(mode: Any) -> None:
    """Background: an exchange takes frames and gives others.

    Invariant: a frame to which anything refers is not given away.
    Construction: a mapped page, a pinned table, the neighbour's page, and no frame at all are offered.
    """
    offers = ("one", "two", "THEIR_PAGE", "NO_FRAME", "THEIR_SHARED_PAGE")
    attack = remap("two", 1) + extended("MMUEXT_PIN_L1_TABLE", "two")
    for offer in offers:
        find = f"mov eax, {offer}" if offer.isupper() else f"mov eax, offset {offer}\n call mfn_of"
        attack += call(
            f"{find}\n mov [extent], eax",
            "mov dword ptr [request], offset extent\n mov dword ptr [request + 4], 1\n mov dword ptr [request + 8], 0",
            "mov dword ptr [request + 16], DOMID_SELF",
            "mov dword ptr [request + 20], offset extent\n mov dword ptr [request + 24], 1",
            "mov dword ptr [request + 28], 0\n mov dword ptr [request + 36], DOMID_SELF",
            "mov dword ptr [request + 40], 0",
            "mov ebx, XENMEM_exchange\n mov ecx, offset request\n mov eax, __HYPERVISOR_memory_op\n int 0x82",
        )
    after = suffer(attack, mode)
    assert after.results(7) == (0, 0, *[EINVAL] * 5)


def test_tables_that_name_their_own_level(mode: Any, portable: bool) -> None:
    """Background: an l2 table may stand where an l1 table is expected, so that a guest finds its tables at linear
    addresses (Xen advisories 182 and 240).

    Invariant: no table is writable that way, and a table that is named so names none.
    Construction: the root of the hypervisor's range names itself, writable and not; the entry is made writable; the
    tables are stored to through it.  In PAE mode two more l2 tables name one another, in a row and in a ring.
    """
    itself = (
        "mov eax, TOP_TABLE\n call table_mfn\n shl eax, 12\n mov edx, eax\n add eax, (TOP_INDEX + 8) * ENTRY_SIZE\n"
    )

    def names(table: str, below: str, flags: int) -> str:
        find = f"mov eax, offset {below}\n call mfn_of\n shl eax, 12\n or eax, {flags}\n push eax\n"
        find += f"mov eax, offset {table}\n call mfn_of\n shl eax, 12\n"
        return call(find + "pop edx\n xor ecx, ecx\n call update")

    attack = (
        call(itself + "or edx, 7\n xor ecx, ecx\n call update")
        + call(itself + "or edx, 5\n xor ecx, ecx\n call update")
        + call(itself + "or edx, 0x85\n xor ecx, ecx\n call update")
        + call(itself + "or edx, 7\n xor ecx, ecx\n call update")
        + "mov eax, (TOP_INDEX + 8) << TOP_SHIFT | TOP_INDEX << 12\n"
        + ("add eax, 0xc0000000\n" if mode is PAE else "")
        + "mov ebx, [eax]\n"
        + guarded("mov dword ptr [eax], 0", "stored")
    )
    expected = [EINVAL, 0, EINVAL, EINVAL, 14, 3]
    if mode is PAE:
        attack += "".join(remap(name, 1) + extended("MMUEXT_PIN_L2_TABLE", name) for name in ("one", "two", "three"))
        attack += names("one", "two", 1) + names("two", "three", 1) + names("two", "one", 1) + names("three", "one", 1)
        attack += names("three", "two", 3) + names("three", "two", 1)
        attack += extended("MMUEXT_UNPIN_TABLE", "two") + remap("two", 3)
        attack += extended("MMUEXT_UNPIN_TABLE", "one") + extended("MMUEXT_UNPIN_TABLE", "three") + remap("two", 3)
        expected += [0] * 7 + [EINVAL] * 4 + [0, 0, EBUSY, 0, 0, 0]
    after = suffer(attack.replace("TOP_SHIFT", "22" if mode is TWO_LEVEL else "21"), mode, portable)
    assert after.results(len(expected)) == tuple(expected)
    after.xen.destroy(after.attacker)
    assert after.xen.frames.owned_by(after.attacker.domid) == []


def test_a_foreign_page_outlives_its_owner(mode: Any) -> None:
    """Background: the control domain maps pages of domains that may end at any time, and whose numbers are used again.

    Invariant: a frame that somebody maps is given to nobody.
    Construction: a page of a domain is mapped, the domain destroyed, another one gets its number and all free memory
    that it asks for; the page stays as it is until it is unmapped, and is then free and empty.
    """
    xen = machine()
    control = boot(xen, NEIGHBOUR, name="control", mode=mode, privileged=True)
    other = boot(xen, NEIGHBOUR, name="short-lived", mode=mode)
    xen.run(10)
    vcpu, mfn = control.vcpus[0], other.frames[other.symbols["secret"] - BASE >> 12]
    here = control.symbols["secret"]
    xen.current = vcpu
    xen.cpu.load(vcpu.state)

    def map_here(frame: int, flags: int, domid: int) -> int:
        arguments = {"eax": 22, "ebx": here, "ecx": frame << 12 | flags, "edx": 0, "esi": 1, "edi": domid}
        for name, value in arguments.items():
            setattr(vcpu.state, name, value)
        xen.trap(HYPERCALL_VECTOR, 0, 0)
        return vcpu.state.eax

    assert map_here(mfn, 3, other.domid) == 0
    xen.destroy(other)
    check(xen)
    assert xen.guest_memory.read_word(vcpu, here) == 0x5EC2E7
    again = boot(xen, NEIGHBOUR, name="again", mode=mode)
    assert again.domid == other.domid
    assert mfn not in again.frames
    xen.guest_memory.write(vcpu, here, b"mine")
    assert all(bytes(xen.memory.frame(frame)[:4]) != b"mine" for frame in again.frames)
    assert map_here(mfn, 1, again.domid) == -Errno.EBUSY & 0xFFFF_FFFF
    assert map_here(0, 0, again.domid) == 0
    assert xen.frames.owner[mfn] == FREE
    assert not any(xen.memory.frame(mfn))
