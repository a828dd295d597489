"""Hostile guests against the memory of others and the page tables of their own.

Each test says what is attacked (background), what must hold (invariant), and how (construction).  The auditor looks at
the whole machine after every hypercall (see `conftest`), and a neighbour has to get on and to keep its bytes.
"""

from __future__ import annotations

import signal
import struct
from typing import Any

import pytest
from hostile_guest import BASE, NEIGHBOUR, machine, source, suffer
from hypothesis import given
from hypothesis import strategies as st

from xenlab import boot
from xenlab.abi.numbers import HYPERCALL_VECTOR, Errno
from xenlab.errors import HypercallError
from xenlab.hypervisor.descriptor_tables import checked_descriptor
from xenlab.hypervisor.frames import FREE, FrameType
from xenlab.hypervisor.layout import segments_end
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
