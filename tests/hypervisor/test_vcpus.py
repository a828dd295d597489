"""Domains with more than one vCPU: how they start and stop, and what is each one's own (vcpu.h; paper 2.1.2, 3.3)."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_bench import FREE_PFN, READ_ONLY, REQUESTS, TABLE
from vcpu_bench import CONTEXT, SIZE, SLICE, Bench

from xenlab import Hypervisor, ImageError, Machine, boot
from xenlab.abi.numbers import (
    FLAT_RING1_CS,
    FLAT_RING1_DS,
    FLAT_RING3_CS,
    FLAT_RING3_DS,
    Errno,
    Hypercall,
    MmuextOp,
    Runstate,
    Shutdown,
    UvmFlags,
    VcpuFlags,
    VcpuOp,
)
from xenlab.abi.structures import VcpuGuestContext
from xenlab.hypervisor import auditor
from xenlab.hypervisor.accounting import runstate, usage
from xenlab.hypervisor.descriptor_tables import place_of
from xenlab.hypervisor.domain import RunState
from xenlab.hypervisor.frames import PINNED, FrameType
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.layout import GDT_LIMIT, gdt_base, segments_end
from xenlab.hypervisor.lifecycle import new_domain
from xenlab.hypervisor.preemption import TABLE_COST, Allowance
from xenlab.hypervisor.schedulers import Bvt, Credit, RoundRobin
from xenlab.hypervisor.trace import Trace
from xenlab.machine.paging import PAE, TWO_LEVEL, PagingMode
from xenlab.machine.segments import Descriptor
from xenlab.timeline import Timeline

IDLE = "start: jmp start"
TABLES = FREE_PFN + 20
DATA = 0x00CF_B300_0000_FFFF
SELECTOR, LOCAL_SELECTOR = 1 << 3 | 1, 2 << 3 | 4 | 1


@pytest.fixture(params=[False, True], ids=["probed", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture
def bench(mode: PagingMode) -> Bench:
    return Bench(mode)


def segment(base: int) -> int:
    """A data segment of ring 1 that begins at ``base``."""
    return Descriptor(base, 0xFFF, 0xB3, 0x4).encode()


def descriptors(bench: Bench, pfn: int, values: dict[int, int]) -> int:
    """Fill page ``pfn`` with descriptors, and let it be read only; its frame."""
    page = bytearray(4096)
    for index, value in values.items():
        page[8 * index : 8 * index + 8] = value.to_bytes(8, "little")
    bench.write(bench.address(pfn), bytes(page))
    assert bench.map(pfn, bench.entry(pfn, READ_ONLY), UvmFlags.INVLPG) == 0
    return bench.frames[pfn]


def root(bench: Bench, pfn: int) -> int:
    """Another root table with the same tables below it, in page ``pfn``, and pages behind it; its frame."""
    memory, mode = bench.xen.memory, bench.mode
    count = 4 if mode is PAE else 1024
    entries = {n: mode.read(memory, bench.root << 12, n) for n in range(count)}
    if mode is PAE:
        # The l2 table with the hypervisor's range belongs to one root only, here as on an x86.
        top = mode.frame_of(entries[3])
        below = {n: mode.read(memory, top << 12, n) for n in range(512)}
        own = bench.table(pfn + 1, {n: entry for n, entry in below.items() if 0xC000_0000 + (n << 21) < 0xF580_0000})
        entries[3] = mode.entry(own, 1)
    else:
        entries = {n: entry for n, entry in entries.items() if n << 22 < 0xFC00_0000}
    return bench.table(pfn, entries)


class TestBuild:
    def test_how_many_there_may_be(self, mode: PagingMode) -> None:
        xen = Hypervisor(Machine(4))
        for wrong in (0, -1, 33, 1.0, True, "2"):
            with pytest.raises(ImageError, match="from 1 to 32 vCPUs"):
                boot(xen, IDLE, mode=mode, max_vcpus=wrong)
        assert not xen.domains
        domain = boot(xen, IDLE, mode=mode, max_vcpus=32)
        assert len(domain.vcpus) == 32
        assert sorted(xen.vcpus) == list(range(32))

    @pytest.mark.parametrize(
        ("vcpus", "tables"),
        [(1, (1, 1)), (2, (1, 1)), (8, (1, 1)), (9, (1, 2)), (16, (1, 2)), (17, (2, 3)), (32, (2, 4))],
    )
    def test_what_they_cost(self, mode: PagingMode, vcpus: int, tables: tuple[int, int]) -> None:
        xen = Hypervisor(Machine(4))
        first = boot(xen, IDLE, mode=mode)
        before = xen.frames.free_frames
        domain = boot(xen, IDLE, mode=mode, max_vcpus=vcpus)
        assert len(domain.own_tables) == tables[mode is PAE]
        assert before - xen.frames.free_frames == 256 + 1 + len(domain.own_tables)
        auditor.check(xen)
        xen.destroy(domain)
        assert xen.frames.free_frames == before
        assert not first.ended

    def test_too_little_memory_for_the_tables(self) -> None:
        xen = Hypervisor(Machine(2))
        left = xen.frames.free_frames
        xen.frames.allocate(left - 256 - 2 - 3, -1)
        with pytest.raises(ImageError, match=r"needs 263 free frames, 261 are left"):
            boot(xen, IDLE, mode=PAE, max_vcpus=32)

    def test_windows_are_each_ones_own(self, mode: PagingMode) -> None:
        bench = Bench(mode, 32)
        bases = [vcpu.gdt_base for vcpu in bench.domain.vcpus]
        assert bases == [gdt_base(number) for number in range(32)]
        assert [vcpu.state.gdt for vcpu in bench.domain.vcpus] == [(base, GDT_LIMIT) for base in bases]
        spans = sorted((base, base + 2 * (GDT_LIMIT + 1)) for base in bases)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        # A domain that is built afterwards has the first window again.
        assert Bench(mode, 1, xen=bench.xen).vcpu.state.gdt == (gdt_base(0), GDT_LIMIT)

    @pytest.mark.parametrize("vcpus", [1, 2, 32])
    def test_the_auditor_knows_all_windows(self, mode: PagingMode, vcpus: int) -> None:
        """Also before there is a vCPU; and an entry too many in the window of the last one is seen."""
        xen = Hypervisor(Machine(4))
        domain = new_domain(xen, "new", mode, 20, vcpus=vcpus)
        assert auditor.audit(xen) == []
        for address in (gdt_base(vcpus - 1) + 4096, gdt_base(vcpus) - 4096):
            table, index = place_of(mode, domain.own_tables, address)
            before = mode.read(xen.memory, table << 12, index)
            mode.write(xen.memory, table << 12, index, mode.entry(domain.frames[0], 0x63))
            (violation,) = auditor.audit(xen)
            assert violation.invariant is auditor.Invariant.RANGE
            assert f"entry {index} of the hypervisor's table {table:#x}" in violation.where
            mode.write(xen.memory, table << 12, index, before)

    def test_all_but_the_first_are_down(self, bench: Bench) -> None:
        first, second = bench.domain.vcpus
        assert (first.run_state, second.run_state) == (RunState.RUNNABLE, RunState.DOWN)
        assert (first.initialised, second.initialised) == (True, False)
        bench.xen.run(1000)
        assert runstate(bench.xen, second)[2] == (0, 0, 0, bench.xen.now)
        assert bench.xen.memory.bytes[second.info + 1] == 1
        bench.end()


class TestStart:
    def test_it_runs_where_its_context_says(self, mode: PagingMode, portable: bool) -> None:
        bench = Bench(mode, portable=portable)
        vcpu = bench.start(ebx=1, ecx=2, edx=3, esi=4, ebp=5, eax=6)
        state = vcpu.state
        assert state.general()[:4] == (6, 2, 3, 1)
        assert (state.esi, state.edi, state.ebp, state.cpl) == (4, 1, 5, 1)
        bench.xen.run(20_000)
        counts = bench.at("counts"), bench.at("counts", 1)
        assert min(counts) > 4_000
        assert abs(counts[0] - counts[1]) <= 1_000
        bench.end()

    def test_thirty_two_of_them(self, mode: PagingMode) -> None:
        bench = Bench(mode, 32)
        for number in range(1, 32):
            bench.start(number=number, kernel_sp=bench.address(FREE_PFN + 13), esp=bench.address(FREE_PFN + 13))
        bench.xen.run(70_000)
        assert all(bench.at("counts", number) > 900 for number in range(32))
        bench.end()

    def test_refusals_in_order(self, bench: Bench) -> None:
        assert bench.op(VcpuOp.INITIALISE, 2, CONTEXT) == -Errno.ENOENT
        assert bench.op(99, 2) == -Errno.ENOENT
        assert bench.op(99, 1) == -Errno.ENOSYS
        assert bench.op(VcpuOp.UP) == -Errno.EINVAL
        assert bench.op(VcpuOp.INITIALISE, 0, 0x1000) == -Errno.EFAULT
        assert bench.op(VcpuOp.INITIALISE, 0, CONTEXT) == -Errno.EEXIST
        assert bench.initialise(bench.context()) == 0
        assert bench.op(VcpuOp.INITIALISE, 1, 0x1000) == -Errno.EFAULT
        assert bench.initialise(bench.context()) == -Errno.EEXIST
        assert bench.initialise(bench.context(ldt_base=1)) == -Errno.EEXIST

    def test_a_context_must_be_there_to_its_end(self, bench: Bench) -> None:
        bench.write(CONTEXT, bytes(bench.context()))
        assert bench.map(FREE_PFN + 9, 0, UvmFlags.INVLPG) == 0
        # It is shorter than a page: on the last byte before the hole, and one further on.
        end = bench.address(FREE_PFN + 9)
        assert bench.op(VcpuOp.INITIALISE, 1, end - SIZE + 1) == -Errno.EFAULT
        assert not bench.domain.vcpus[1].initialised
        bench.write(end - SIZE, bytes(bench.context()))
        assert bench.op(VcpuOp.INITIALISE, 1, end - SIZE) == 0

    @pytest.mark.parametrize(
        "fields",
        [
            {"ldt_base": 0x1001},
            {"ldt_ents": 8193},
            {"gdt_ents": 14 * 512 + 1},
            {"gdt_ents": 0xFFFF_FFFF},
            {"gdt": "neighbour"},
            {"gdt": "written"},
            {"gdt": "table"},
            {"gdt": "xen"},
            {"gdt": "second"},
            {"gdt": "gates"},
            {"cr3": 0},
            {"cr3": 0xFFFF_FFFF},
            {"cr3": "neighbour"},
            {"cr3": "their root"},
            {"cr3": "written"},
            {"cr3": "leaf"},
            {"cr3": "own table"},
        ],
        ids=str,
    )
    def test_what_is_refused_leaves_no_trace(self, mode: PagingMode, fields: dict[str, Any], frozen: Any) -> None:
        bench = Bench(mode)
        neighbour = boot(bench.xen, IDLE, mode=mode)
        bench.xen.pause(neighbour)
        leaf = bench.xen.mmu.leaf_of(bench.vcpu, bench.address(0))[0]
        good = descriptors(bench, FREE_PFN, {1: DATA})
        frames: dict[Any, int] = {
            "neighbour": neighbour.frames[30],
            "their root": neighbour.vcpus[0].state.cr3 >> 12,
            "written": bench.frames[FREE_PFN + 1],
            "table": leaf,
            "leaf": leaf,
            "xen": bench.xen.frames.m2p_frames[0],
            "own table": bench.domain.own_tables[0],
            "gates": descriptors(bench, FREE_PFN + 2, {5: 0x0000_EE00_0008_0000}),
        }
        context = bench.context(**{name: value for name, value in fields.items() if name not in ("gdt", "cr3")})
        context.gdt_ents = max(context.gdt_ents, 3 * 512)
        for place in range(3):
            context.gdt_frames[place] = good
        if "gdt" in fields:
            context.gdt_frames[2] = frames.get(fields["gdt"], 1)
        if "cr3" in fields:
            context.ctrlreg[3] = bench.cr3(frames.get(fields["cr3"], fields["cr3"] if fields["cr3"] != "own" else 0))
        vcpu = bench.domain.vcpus[1]
        counts, state = bench.xen.frames.state(), vcpu.snapshot()
        assert bench.initialise(context) == -Errno.EINVAL
        after, before = bench.xen.frames.state(), frozen(bench.xen)
        del counts["left"], after["left"]
        assert (after, vcpu.snapshot()) == (counts, state)
        assert bench.op(VcpuOp.INITIALISE, 1, CONTEXT) == -Errno.EINVAL
        assert frozen(bench.xen) == before
        bench.xen.destroy(neighbour)
        bench.end()

    def test_online_at_once(self, bench: Bench) -> None:
        assert bench.initialise(bench.context(flags=VcpuFlags.ONLINE | VcpuFlags.IN_KERNEL)) == 0
        assert bench.op(VcpuOp.IS_UP) == 1
        bench.xen.run(6_000)
        assert bench.at("counts", 1) > 0

    def test_control_debug_and_privilege(self, bench: Bench) -> None:
        context = bench.context(eflags=0xFFFF_FFFF)
        context.ctrlreg[0], context.ctrlreg[2], context.ctrlreg[4] = 0xFFFF_FFFF, 0x1234_5678, 0xFFFF_FFFF
        for number, value in enumerate((0x1000, 0x2000, 0x3000, 0xFFFF_FFFF, 7, 7, 0, 0xFFFF_FFFF)):
            context.debugreg[number] = value
        assert bench.initialise(context) == 0
        vcpu = bench.domain.vcpus[1]
        control = vcpu.control
        assert (control["cr0"], control["cr2"], control["cr4"]) == (0x8005_003B, 0x1234_5678, 0xC)
        assert [control[f"dr{n}"] for n in (0, 1, 2, 3, 6, 7)] == [
            0x1000,
            0x2000,
            0x3000,
            0xFFFF_FFFF,
            0xFFFF_0FF0,
            0x400,
        ]
        assert (vcpu.io.level, vcpu.watched) == (3, False)
        assert vcpu.state.eflags & 0x2_7200 == 0x200  # neither IOPL, nor NT, nor virtual-8086 mode

    def test_breakpoints(self, mode: PagingMode, portable: bool) -> None:
        bench = Bench(mode, portable=portable)
        context = bench.handlers(bench.context())
        context.trap_ctxt[1].cs, context.trap_ctxt[1].address = FLAT_RING1_CS, bench.label("handler")
        # On the second instruction of `work`, behind the seven bytes of the first.
        context.debugreg[0], context.debugreg[7] = bench.label("work") + 7, 0x401
        assert bench.initialise(context) == 0
        assert bench.op(VcpuOp.UP) == 0
        bench.xen.run(4_500)
        assert (bench.at("seen"), bench.at("counts", 1)) == (bench.label("work") + 7, 1)
        assert bench.domain.vcpus[1].control["dr6"] & 0xF == 1
        assert (bench.vcpu.watched, bench.vcpu.control["dr7"]) == (False, 0x400)
        assert bench.at("counts") > 1_000

    def test_selectors_of_ring_0_are_moved(self, bench: Bench) -> None:
        context = bench.context(cs=FLAT_RING1_CS & ~3, ss=FLAT_RING1_DS & ~3, kernel_ss=FLAT_RING1_DS & ~3)
        context.trap_ctxt[6].cs, context.trap_ctxt[6].address = FLAT_RING1_CS & ~3, 0x1000
        context.event_callback_cs, context.event_callback_eip = 0x18, 0x2000
        context.failsafe_callback_cs, context.failsafe_callback_eip = 0x28, 0x3000
        context.flags |= VcpuFlags.FAILSAFE_DISABLES_EVENTS
        assert bench.initialise(context) == 0
        vcpu = bench.domain.vcpus[1]
        assert (vcpu.traps[6].cs, vcpu.kernel_ss) == (FLAT_RING1_CS, FLAT_RING1_DS)
        assert (vcpu.event_callback.cs, vcpu.event_callback.masks_events) == (0x19, True)
        assert (vcpu.failsafe_callback.cs, vcpu.failsafe_callback.masks_events) == (0x29, True)
        assert vcpu.traps[7] is None
        assert bench.op(VcpuOp.UP) == 0
        bench.xen.run(6_000)
        assert bench.at("counts", 1) > 0

    def test_in_ring_3(self, mode: PagingMode, portable: bool) -> None:
        bench = Bench(mode, portable=portable)
        code = FREE_PFN + 4
        bench.write(bench.address(code), b"\x40\xeb\xfd")  # inc eax; jmp
        assert bench.map(code, bench.entry(code, TABLE), UvmFlags.INVLPG) == 0
        selectors = {"cs": FLAT_RING3_CS, "ss": FLAT_RING3_DS, "ds": FLAT_RING3_DS, "es": FLAT_RING1_DS}
        vcpu = bench.start(**selectors, eip=bench.address(code))
        assert vcpu.state.cpl == 3
        bench.xen.run(6_000)
        assert not bench.domain.ended
        assert (vcpu.state.cpl, vcpu.state.segment("es").selector) == (3, 0)
        assert vcpu.state.eax > 900

    def test_floating_point_registers(self, mode: PagingMode, portable: bool) -> None:
        bench = Bench(mode, portable=portable)
        image = bytearray(512)
        struct.pack_into("<HHB", image, 0, 0x027F, 0x3800, 0x80)
        struct.pack_into("<I", image, 24, 0x1FA0)
        image[32:42] = bytes.fromhex("0000000000000080ff3f")  # 1.0
        image[160:176] = bytes(range(16))
        context = bench.context(flags=4 | VcpuFlags.I387_VALID)
        context.fpu_ctxt[:] = list(image)
        assert bench.initialise(context) == 0
        found = bench.domain.vcpus[1].state.architectural()
        assert (found["fpcw"], found["fpsw"] & 0x3800, found["mxcsr"]) == (0x027F, 0x3800, 0x1FA0)
        assert found["st0"].to_bytes(10, "little") == bytes(image[32:42])
        assert found["xmm0"].to_bytes(16, "little") == bytes(range(16))
        assert bench.op(VcpuOp.UP) == 0
        bench.xen.run(6_000)
        after = bench.domain.vcpus[1].state.architectural()
        assert all(after[name] == value for name, value in found.items() if name.startswith(("st", "xmm", "fp", "mx")))

    def test_floating_point_registers_that_no_cpu_loads(self, mode: PagingMode, portable: bool) -> None:
        bench = Bench(mode, portable=portable)
        image = bytes([0x7F] * 512)
        context = bench.context(flags=4 | VcpuFlags.I387_VALID)
        context.fpu_ctxt[:] = list(image)
        assert bench.initialise(context) == 0
        found = bench.domain.vcpus[1].state.architectural()
        assert (found["mxcsr"], found["fpcw"], found["xmm3"]) == (0, 0, 0)
        other = Bench(mode, portable=portable)
        assert other.initialise(other.context()) == 0
        state = other.domain.vcpus[1].state.architectural()
        assert (state["mxcsr"], state["fpcw"]) == (0x1F80, 0x37F)


class TestSegments:
    def test_a_table_for_each(self, mode: PagingMode, portable: bool) -> None:
        bench = Bench(mode, 3, portable=portable)
        for number in (1, 2):
            bench.write(bench.address(TABLES + number), (0x100 + number).to_bytes(4, "little"))
            mfn = descriptors(bench, FREE_PFN + number, {1: segment(bench.address(TABLES + number))})
            context = bench.handlers(bench.context("through_fs", number, gdt_ents=512, fs=SELECTOR))
            context.gdt_frames[0] = mfn
            assert bench.initialise(context, number) == 0
            assert bench.op(VcpuOp.UP, number) == 0
        bench.xen.run(20_000)
        assert [bench.at("counts", number) for number in (1, 2)] == [0x101, 0x102]
        mine = bench.domain.vcpus[1].gdt[0]
        assert bench.xen.frames.type[mine] == FrameType.DESCRIPTORS
        assert bench.map(FREE_PFN + 1, bench.entry(FREE_PFN + 1), UvmFlags.INVLPG) == -Errno.EBUSY
        bench.end()

    def test_the_same_frames_for_two(self, bench: Bench) -> None:
        mfn = descriptors(bench, FREE_PFN, {1: segment(0)})
        bench.write(REQUESTS, mfn.to_bytes(4, "little"))
        assert bench.call(Hypercall.set_gdt, REQUESTS, 512) == 0
        context = bench.context(gdt_ents=512)
        context.gdt_frames[0] = mfn
        assert bench.initialise(context) == 0
        assert bench.xen.frames.uses[mfn] == 2
        assert bench.call(Hypercall.set_gdt, 0, 0) == 0
        assert (bench.xen.frames.uses[mfn], bench.xen.frames.type[mfn]) == (1, FrameType.DESCRIPTORS)
        bench.end()

    def test_a_change_is_seen_by_all(self, bench: Bench) -> None:
        """A descriptor that a vCPU has loaded, which does not run, is taken away: it fails when it runs again."""
        mfn = descriptors(bench, FREE_PFN, {1: segment(0)})
        context = bench.handlers(bench.context(gdt_ents=512, fs=SELECTOR))
        context.gdt_frames[0] = mfn
        assert bench.initialise(context) == 0
        assert bench.op(VcpuOp.UP) == 0
        bench.xen.run(3_000)
        vcpu = bench.domain.vcpus[1]
        assert vcpu.state.segment("fs").selector == SELECTOR
        bench.run_me()
        assert bench.call(Hypercall.update_descriptor, (mfn << 12) + 8, 0, 0, 0) == 0
        assert vcpu.failing
        bench.xen.run(8_000)
        assert bench.at("seen", 1) == 99

    @pytest.mark.parametrize(
        ("selectors", "seen"),
        [
            ({"ds": 0x13}, 99),
            ({"gs": LOCAL_SELECTOR}, 99),
            ({"cs": 0x18}, 13),
            ({"cs": 0}, 13),
            ({"cs": FLAT_RING1_DS}, 13),
        ],
        ids=str,
    )
    def test_registers_that_cannot_be_loaded(
        self, mode: PagingMode, portable: bool, selectors: dict[str, int], seen: int
    ) -> None:
        bench = Bench(mode, portable=portable)
        vcpu = bench.start(**selectors)
        bench.xen.run(8_000)
        assert not bench.domain.ended, bench.domain.report
        assert bench.at("seen", 1) == seen
        assert vcpu.state.cpl == 1
        bench.end()

    @pytest.mark.parametrize("ss", [0, FLAT_RING3_DS, LOCAL_SELECTOR, SELECTOR])
    @pytest.mark.parametrize("ds", [FLAT_RING1_DS, 0x13])
    def test_no_stack_for_a_handler(self, mode: PagingMode, portable: bool, ss: int, ds: int) -> None:
        bench = Bench(mode, portable=portable)
        bench.start(ss=ss, ds=ds)
        bench.xen.run(6_000)
        assert "vCPU 1, a stack segment that cannot be loaded" in bench.domain.report
        bench.end()

    @pytest.mark.parametrize("selectors", [{"ss": 0}, {"cs": 0x1B}, {"ss": FLAT_RING1_DS}, {"cs": 0x1B, "ss": 0}])
    def test_an_application_without_a_stack(self, mode: PagingMode, portable: bool, selectors: dict[str, int]) -> None:
        bench = Bench(mode, portable=portable)
        vcpu = bench.start(**{"cs": FLAT_RING3_CS, "ss": FLAT_RING3_DS} | selectors)
        bench.xen.run(6_000)
        assert (bench.at("seen", 1), vcpu.state.cpl) == (13, 1)
        bench.end()

    def test_and_nobody_to_mend_them(self, bench: Bench) -> None:
        """Without a failsafe callback the register is empty; without a handler the domain ends, and says by whom."""
        assert bench.initialise(bench.context(ds=0x13, es=0x13)) == 0
        assert bench.op(VcpuOp.UP) == 0
        bench.xen.run(6_000)
        assert [bench.domain.vcpus[1].state.segment(name).selector for name in ("ds", "es")] == [0, 0]
        other = Bench(bench.mode)
        assert other.initialise(other.context(cs=0)) == 0
        assert other.op(VcpuOp.UP) == 0
        other.xen.run(6_000)
        assert "ended: vCPU 1, " in other.domain.report
        assert all(vcpu.run_state is RunState.ENDED for vcpu in other.domain.vcpus)

    def test_local_tables(self, mode: PagingMode, portable: bool) -> None:
        """Each has one at an address of its own; pages are shown to each when it looks, and taken from one only."""
        bench = Bench(mode, 3, portable=portable)
        for number in (1, 2):
            bench.write(bench.address(TABLES + number), (0x200 + number).to_bytes(4, "little"))
            descriptors(bench, FREE_PFN + number, {2: segment(bench.address(TABLES + number))})
            bench.start(
                "through_fs", number, fs=LOCAL_SELECTOR, ldt_base=bench.address(FREE_PFN + number), ldt_ents=512
            )
        assert not bench.vcpu.ldt[1]
        bench.xen.run(20_000)
        assert [bench.at("counts", number) for number in (1, 2)] == [0x201, 0x202]
        tables = bench.xen.descriptor_tables
        shown = [tables.ldt_frames(vcpu) for vcpu in bench.domain.vcpus]
        assert shown == [[], [bench.frames[FREE_PFN + 1]], [bench.frames[FREE_PFN + 2]]]
        tables.forget_ldt(bench.domain.vcpus[1])
        assert tables.ldt_frames(bench.domain.vcpus[2])
        bench.end()

    def test_a_look_into_a_local_table_that_is_not_there(self, mode: PagingMode, portable: bool) -> None:
        """It is a page fault at the guest's own address, by whichever window the CPU looked."""
        bench = Bench(mode, 3, portable=portable)
        vcpu = bench.start("load", 2, ecx=LOCAL_SELECTOR, ldt_base=0x1000_0000, ldt_ents=512)
        bench.xen.run(8_000)
        assert bench.at("seen", 1) == 13
        assert vcpu.control["cr2"] == bench.xen.memory.words[vcpu.info + 8 >> 2] == 0x1000_0010
        assert bench.vcpu.control["cr2"] == 0
        bench.end()

    def test_a_local_table_may_be_anywhere_and_is_then_of_no_use(self, mode: PagingMode) -> None:
        """As in Xen, its address is looked at when it is used."""
        for base in (0xFFFF_F000, gdt_base(0), segments_end(mode), 0x1000):
            bench = Bench(mode)
            bench.start(fs=LOCAL_SELECTOR, ldt_base=base, ldt_ents=8192)
            bench.xen.run(6_000)
            assert bench.at("seen", 1) == 99
            bench.end()

    def test_the_window_of_another_cannot_be_written(self, mode: PagingMode) -> None:
        bench = Bench(mode)
        bench.start()
        table, index = place_of(mode, bench.domain.own_tables, gdt_base(1))
        before = bench.mode.read(bench.xen.memory, table << 12, index)
        assert bench.map(FREE_PFN, mode.entry(table, 0x63)) == -Errno.EBUSY
        state = bench.vcpu.state
        bench.run_me()
        state.eip, state.ebx = bench.label("sleep"), gdt_base(1)
        bench.xen.cpu.forget_code(0, bench.xen.memory.size)
        bench.write(bench.label("sleep"), b"\xc7\x03\x01\x00\x00\x00")  # mov dword ptr [ebx], 1
        bench.xen.run(6_000)
        assert bench.domain.crashed
        assert bench.mode.read(bench.xen.memory, table << 12, index) == before


class TestPageTables:
    def test_a_root_is_counted_for_each(self, bench: Bench) -> None:
        mfn = bench.root
        uses = bench.xen.frames.uses[mfn]
        vcpu = bench.start()
        assert bench.xen.frames.uses[mfn] == uses + 1
        other = root(bench, TABLES)
        bench.xen.mmu.load_base(vcpu, other)
        assert bench.xen.frames.uses[mfn] == uses
        assert bench.xen.frames.type[other] != FrameType.NONE
        bench.end()

    def test_an_address_space_of_its_own(self, mode: PagingMode, portable: bool) -> None:
        """The second vCPU sees another page at an address; the first unpins the root, which stays."""
        bench = Bench(mode, portable=portable)
        other = root(bench, TABLES)
        context = bench.handlers(bench.context())
        context.ctrlreg[3] = bench.cr3(other)
        assert bench.extended(bench.pin_root, other) == 0
        assert bench.initialise(context) == 0
        assert bench.extended(MmuextOp.UNPIN_TABLE, other) == 0
        assert not bench.xen.frames.flags[other] & PINNED
        assert bench.op(VcpuOp.UP) == 0
        bench.xen.run(20_000)
        assert bench.at("counts", 1) > 2_000
        assert bench.domain.vcpus[1].state.cr3 >> 12 == other
        assert bench.map(TABLES, bench.entry(TABLES)) == -Errno.EBUSY
        bench.end()

    def test_long_checks_are_made_in_parts(self, mode: PagingMode, monkeypatch: pytest.MonkeyPatch) -> None:
        """XSA-296: the root still has to be checked, which takes longer than one call may."""
        bench = Bench(mode)
        other = root(bench, TABLES)
        context = bench.context()
        context.ctrlreg[3] = bench.cr3(other)
        context.gdt_frames[0], context.gdt_ents = descriptors(bench, FREE_PFN, {}), 512
        bench.write(CONTEXT, bytes(context))
        costs = TABLE_COST * (2 if mode is PAE else 1)  # of the root, or the root alone, besides the descriptors
        with monkeypatch.context() as patch:
            patch.setattr(Allowance, "begin", lambda self: setattr(self, "left", costs))
            assert not bench.call_once(Hypercall.vcpu_op, VcpuOp.INITIALISE, 1, CONTEXT)
        assert bench.xen.frames.uses[bench.frames[FREE_PFN]] == 0
        assert not bench.domain.vcpus[1].initialised
        assert bench.xen.page_tables.partial
        assert bench.op(VcpuOp.INITIALISE, 1, CONTEXT) == 0
        assert not bench.xen.page_tables.partial
        bench.end()

    def test_a_context_with_nothing_but_a_root(self, mode: PagingMode) -> None:
        """What the proof of concept of XSA-296 starts: it can be, and ends its domain as soon as it runs."""
        bench = Bench(mode)
        top = bench.table(TABLES + 1, {})
        mfn = bench.table(TABLES, {3: mode.entry(top, 1)}) if mode is PAE else top
        context = VcpuGuestContext(flags=4)
        context.ctrlreg[3] = bench.cr3(mfn)
        assert bench.initialise(context) == 0
        assert bench.xen.frames.uses[mfn] == 1
        assert bench.op(VcpuOp.UP) == 0
        bench.xen.run(6_000)
        assert "ended: vCPU 1, exception 13" in bench.domain.report
        bench.end()

    def test_given_up_in_the_middle(self, mode: PagingMode, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = Bench(mode)
        context = bench.context()
        context.ctrlreg[3] = bench.cr3(root(bench, TABLES))
        bench.write(CONTEXT, bytes(context))
        with monkeypatch.context() as patch:
            patch.setattr(Allowance, "begin", lambda self: setattr(self, "left", 1))
            assert not bench.call_once(Hypercall.vcpu_op, VcpuOp.INITIALISE, 1, CONTEXT)
        bench.end()

    def test_flushes_for_some(self, bench: Bench) -> None:
        """A set without the vCPU that asks needs no flush: whoever gets the CPU finds its TLB empty."""
        second = bench.start()
        counts = bench.xen.tlb.counts

        def flushed(vcpu: Any, chosen: int) -> dict[str, int]:
            before = dict(counts)
            bench.xen.guest_memory.write_words(vcpu, REQUESTS, (MmuextOp.TLB_FLUSH_MULTI, 0, REQUESTS + 32))
            bench.xen.guest_memory.write_words(vcpu, REQUESTS + 12, (MmuextOp.INVLPG_MULTI, 0xC000_0000, REQUESTS + 32))
            bench.xen.guest_memory.write_words(vcpu, REQUESTS + 32, (chosen,))
            assert bench.xen.mmu.mmuext_op(vcpu, REQUESTS, 2, 0, 0x7FF0) == 0
            return {name: counts[name] - before[name] for name in ("asked", "page")}

        bench.run_me()
        for vcpu in (bench.vcpu, second):
            for chosen in range(4):
                expected = chosen >> vcpu.number & 1
                assert flushed(vcpu, chosen) == {"asked": expected, "page": expected}


class TestUpAndDown:
    def test_down_and_up_again(self, bench: Bench) -> None:
        vcpu = bench.start()
        bench.xen.run(8_000)
        bench.run_me()
        assert bench.op(VcpuOp.DOWN) == 0
        assert bench.op(VcpuOp.DOWN) == 0
        counted = bench.at("counts", 1)
        bench.xen.run(8_000)
        assert (bench.at("counts", 1), bench.op(VcpuOp.IS_UP)) == (counted, 0)
        assert bench.op(VcpuOp.UP) == bench.op(VcpuOp.UP) == 0
        bench.xen.run(8_000)
        assert bench.at("counts", 1) > counted
        assert sum(runstate(bench.xen, vcpu)[2]) == bench.xen.now

    def test_the_last_one_ends_the_domain(self, bench: Bench) -> None:
        bench.start()
        assert bench.op(VcpuOp.DOWN, 0) == 0
        assert bench.vcpu.run_state is RunState.DOWN
        bench.xen.run(6_000)
        assert bench.xen.current is bench.domain.vcpus[1]
        assert bench.xen.vcpu_ops.vcpu_op(bench.domain.vcpus[1], VcpuOp.DOWN, 1, 0) == 0
        assert bench.domain.shutdown is Shutdown.POWEROFF
        bench.end()

    def test_by_the_reason_that_it_gave(self, bench: Bench) -> None:
        bench.domain.shutdown_code = Shutdown.REBOOT
        assert bench.op(VcpuOp.DOWN, 0) == 0
        assert bench.domain.shutdown is Shutdown.REBOOT

    def test_sleep_survives(self, bench: Bench) -> None:
        vcpu = bench.start("sleep")
        bench.xen.memory.bytes[vcpu.info + 1] = 0
        bench.xen.run(6_000)
        assert vcpu.run_state is RunState.BLOCKED
        bench.run_me()
        assert bench.op(VcpuOp.DOWN) == bench.op(VcpuOp.UP) == 0
        assert vcpu.run_state is RunState.BLOCKED
        assert bench.op(VcpuOp.DOWN) == 0
        bench.xen.wake(vcpu)
        assert vcpu.run_state is RunState.DOWN
        assert bench.op(VcpuOp.UP) == 0
        assert vcpu.run_state is RunState.RUNNABLE

    def test_pausing_the_domain_pauses_those_that_are_up(self, mode: PagingMode) -> None:
        bench = Bench(mode, 4)
        bench.start(number=1)
        sleeper = bench.start("sleep", number=2)
        bench.xen.run(20_000)
        states = [vcpu.run_state for vcpu in bench.domain.vcpus]
        assert states == [RunState.RUNNABLE, RunState.RUNNABLE, RunState.BLOCKED, RunState.DOWN]
        bench.xen.pause(bench.domain)
        bench.xen.pause(bench.domain)
        assert {vcpu.run_state for vcpu in bench.domain.vcpus} == {RunState.PAUSED, RunState.DOWN}
        counts = [bench.at("counts", number) for number in range(3)]
        bench.xen.run(6_000)
        assert [bench.at("counts", number) for number in range(3)] == counts
        bench.xen.submit(Typed(bench.domain.domid, b"x"))
        bench.xen.run(1)
        bench.xen.unpause(bench.domain)
        assert sleeper.run_state is RunState.RUNNABLE
        bench.xen.run(20_000)
        assert all(bench.at("counts", number) > counts[number] for number in range(3))

    @pytest.mark.parametrize("entry", ["leave", "break"])
    def test_one_ends_all(self, mode: PagingMode, entry: str) -> None:
        bench = Bench(mode, 3)
        bench.start(number=1)
        assert bench.initialise(bench.context(entry, 2), 2) == 0
        assert bench.op(VcpuOp.UP, 2) == 0
        bench.xen.run(20_000)
        assert bench.domain.shutdown is (Shutdown.REBOOT if entry == "leave" else Shutdown.CRASH)
        assert {vcpu.run_state for vcpu in bench.domain.vcpus} == {RunState.ENDED}
        assert ("vCPU 2, " in bench.domain.report) is (entry == "break")
        bench.end()

    def test_nmis(self, mode: PagingMode, portable: bool) -> None:
        bench = Bench(mode, 4, portable=portable)
        bench.start(number=1)
        sleeper = bench.start("sleep", number=2)
        bench.xen.memory.bytes[sleeper.info + 1] = 0
        bench.xen.run(20_000)
        assert sleeper.run_state is RunState.BLOCKED
        woken = bench.at("counts", 2)
        bench.run_me()
        assert [bench.op(VcpuOp.SEND_NMI, number) for number in (1, 2, 3)] == [0, 0, 0]
        assert bench.op(VcpuOp.SEND_NMI, 1, 4) == -Errno.EINVAL
        bench.xen.run(20_000)
        assert [bench.at("nmis", number) for number in (1, 2, 3)] == [1, 1, 0]
        assert bench.at("counts", 2) == woken + 1
        bench.start(number=3)  # one that was sent before it began
        bench.xen.run(20_000)
        assert bench.at("nmis", 3) == 1


class TestRecords:
    def test_a_place_for_another_that_is_down(self, bench: Bench) -> None:
        mfn, vcpu = bench.frames[FREE_PFN], bench.domain.vcpus[1]
        bench.write(REQUESTS, struct.pack("<QII", mfn, 64, 0))
        assert bench.op(VcpuOp.REGISTER_VCPU_INFO, 1, REQUESTS) == 0
        assert vcpu.info == (mfn << 12) + 64
        assert bench.xen.memory.bytes[vcpu.info + 1] == 1
        assert bench.op(VcpuOp.REGISTER_VCPU_INFO, 1, REQUESTS) == -Errno.EINVAL
        assert bench.vcpu.info_mfn == 0
        bench.end()

    def test_no_place_for_one_that_is_up(self, bench: Bench) -> None:
        bench.start()
        bench.write(REQUESTS, struct.pack("<QII", bench.frames[FREE_PFN], 64, 0))
        assert bench.op(VcpuOp.REGISTER_VCPU_INFO, 1, REQUESTS) == -Errno.EINVAL
        assert bench.op(VcpuOp.DOWN) == 0
        assert bench.op(VcpuOp.REGISTER_VCPU_INFO, 1, REQUESTS) == 0

    def test_areas_of_another(self, bench: Bench) -> None:
        """Written at once through the page tables of the one that asks, then at each turn through its own."""
        area = bench.address(FREE_PFN)
        bench.write(REQUESTS, struct.pack("<II", area, 0))
        assert bench.op(VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, 1, REQUESTS) == 0
        assert bench.word(area) == Runstate.OFFLINE
        bench.write(REQUESTS, struct.pack("<II", area + 64, 0))
        assert bench.op(VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA, 1, REQUESTS) == 0
        assert bench.word(area + 64) == 2
        bench.start()
        bench.xen.run(3_000_000)
        assert bench.word(area) == Runstate.RUNNING
        assert bench.word(area + 64) > 2
        assert bench.op(VcpuOp.GET_RUNSTATE_INFO, 1, area) == 0
        assert bench.word(area) == Runstate.RUNNABLE


class TestShares:
    @pytest.mark.parametrize("scheduler", [Bvt, Credit])
    def test_a_weight_counts_for_each_vcpu(self, scheduler: Any) -> None:
        """As in Xen's credit scheduler and in its BVT: a domain with two vCPUs that run gets twice the share."""
        xen = Hypervisor(Machine(8), scheduler=scheduler())
        two, one = Bench(vcpus=2, xen=xen), Bench(vcpus=1, xen=xen)
        two.start()
        xen.run(6_000_000)
        shares = [usage(xen, bench.domain).running for bench in (two, one)]
        assert 1.8 < shares[0] / shares[1] < 2.2
        two.xen.vcpu_ops.vcpu_op(two.domain.vcpus[0], VcpuOp.DOWN, 1, 0)
        before = list(shares)
        xen.run(6_000_000)
        shares = [usage(xen, bench.domain).running - had for bench, had in zip((two, one), before, strict=True)]
        assert 0.8 < shares[0] / shares[1] < 1.25


_NUMBER = st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from((0, 1, 4096, 512, 513, 7168, 0x202, 0x302, 0x3202)))
_SELECTOR = st.one_of(
    st.integers(0, 0xFFFF),
    st.sampled_from((0, 3, 8, 9, 0xC, 0x14, FLAT_RING1_CS, FLAT_RING1_DS, FLAT_RING3_CS, FLAT_RING3_DS)),
)
_WILD = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("eax", "ebx", "ecx", "esi", "ebp", "esp", "eflags", "eip", "flags"), _NUMBER),
        **dict.fromkeys(("cs", "ss", "ds", "es", "fs", "gs", "kernel_ss"), _SELECTOR),
        **dict.fromkeys(("kernel_sp", "ldt_ents", "gdt_ents", "event_callback_eip", "failsafe_callback_eip"), _NUMBER),
        "ldt_base": st.integers(0, 0xF_FFFF).map(lambda page: page << 12),
    },
)


class TestWildContexts:
    @settings(max_examples=60)
    @given(
        wild=_WILD,
        pae=st.booleans(),
        portable=st.booleans(),
        gdt=st.lists(st.sampled_from((40, 41, 42, 43, 0)), max_size=16),
        debug=st.lists(_NUMBER, min_size=8, max_size=8),
        down=st.booleans(),
        handlers=st.booleans(),
    )
    def test_break_nobody_else(
        self,
        wild: dict[str, int],
        pae: bool,
        portable: bool,
        gdt: list[int],
        debug: list[int],
        down: bool,
        handlers: bool,
    ) -> None:
        """Whatever a vCPU begins with, it runs outside ring 0 or ends its domain; all else goes on, nothing leaks."""
        mode = PAE if pae else TWO_LEVEL
        xen = Hypervisor(Machine(8, portable=portable), scheduler=RoundRobin(SLICE))
        neighbour = boot(xen, "start: inc eax\n jmp start", mode=mode)
        bench = Bench(mode, 3, xen=xen)
        for pfn in (40, 41):
            descriptors(bench, pfn, {1: segment(0), 2: segment(0), 3: 0x00CF_BB00_0000_FFFF})
        context = bench.context(**wild)
        if handlers:
            bench.handlers(context)
        for place, pfn in enumerate(gdt):
            context.gdt_frames[place] = bench.frames[pfn] if pfn else 0
        for place, value in enumerate(debug):
            context.debugreg[place] = value
        result = bench.initialise(context)
        assert result in (0, -Errno.EINVAL)
        assert bench.op(VcpuOp.UP) == (0 if result == 0 else -Errno.EINVAL)
        auditor.check(xen)
        for _ in range(6):
            xen.run(2_500)
            assert all(vcpu.state.cpl for vcpu in bench.domain.vcpus if vcpu.initialised)
            auditor.check(xen)
        if down and not bench.domain.ended:
            bench.op(VcpuOp.DOWN)
        counted = neighbour.vcpus[0].state.eax
        xen.run(8_000)
        assert neighbour.vcpus[0].state.eax > counted
        xen.destroy(bench.domain)
        auditor.check(xen)
        assert xen.frames.free_frames == bench.free_before - (0 if xen.shared_pages.are_made(mode) else 2)


class TestReplay:
    @settings(max_examples=10)
    @given(pae=st.booleans(), portable=st.booleans(), there=st.integers(1, 4000), back=st.integers(1, 4000))
    def test_steps_back_lead_to_the_same_machine(self, pae: bool, portable: bool, there: int, back: int) -> None:
        xen = Hypervisor(Machine(4, portable=portable), scheduler=RoundRobin(300), trace=Trace())
        bench = Bench(PAE if pae else TWO_LEVEL, 3, xen=xen)
        bench.start(number=1)
        bench.start("sleep", number=2)
        timeline = Timeline(xen, interval=500, snapshots=4)
        timeline.run(9_000)
        start = timeline.position
        timeline.run(there)
        before, events = timeline.machine_hash(), timeline.events()
        timeline.run(back)
        after = timeline.machine_hash()
        timeline.seek(start + there)
        assert (timeline.machine_hash(), timeline.events()) == (before, events)
        timeline.run(back)
        assert timeline.machine_hash() == after
