"""Domains and their virtual CPUs: what the hypervisor keeps for each guest (paper 2.3, 3.4).

A domain owns machine frames and has one or more vCPUs.  Everything here is data; the
mechanisms that act on it stand in files of their own.

A domain knows its memory by pseudo-physical frame numbers; the list from these to machine frames is the
domain's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from xenlab.abi.numbers import EvtchnStatus, Shutdown
from xenlab.hypervisor.accounting import Account
from xenlab.hypervisor.layout import GDT_BASE, LDT_BASE, flat_segments, gdt_base, segments_end
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.machine.paging import PagingMode
from xenlab.machine.state import CpuState, Segment

VECTORS = 256
# A vCPU's key is its domain's id times this, plus its number in the domain.
VCPUS_PER_DOMAIN = 32
CONSOLE_BYTES = 1 << 20
VCPU_INFO_BYTES = 64  # struct vcpu_info in xen.h
TICK_INSTRUCTIONS = 1_000_000  # ten milliseconds
# Control and debug registers as the guest sees them at its start; of CR4 its own bits.
INITIAL_CONTROL = {"cr0": 0x8005_0033, "cr2": 0, "cr4": 0x0}
INITIAL_DEBUG = {"dr0": 0, "dr1": 0, "dr2": 0, "dr3": 0, "dr6": 0xFFFF_0FF0, "dr7": 0x400}


class RunState(Enum):
    """What a vCPU is doing; only `RUNNABLE` ones are offered to the scheduler.

    `PAUSED` is the control domain's affair, all vCPUs of a domain at once; `DOWN` is the kernel's own, one by one, and
    how all but the first begin.
    """

    RUNNABLE = auto()
    BLOCKED = auto()
    PAUSED = auto()
    ENDED = auto()
    DOWN = auto()


@dataclass(frozen=True, slots=True)
class Gate:
    """One registered exception handler: a row of the virtual trap table.

    Attributes:
        cs, eip: where the handler starts.
        dpl: the outermost ring that may raise the vector by ``int``.
        masks_events: whether entering it sets the event mask.
    """

    cs: int
    eip: int
    dpl: int
    masks_events: bool


@dataclass(frozen=True, slots=True)
class Port:
    """One end of an event channel.

    Attributes:
        status: what it is.
        vcpu: number of the vCPU that its events go to.
        remote: the domain at the other end, or the one that may bind to it.
        remote_port: the other end's port, 0 while it is unbound.
        virq: the virtual interrupt that it stands for, -1 for none.
    """

    status: EvtchnStatus
    vcpu: int = 0
    remote: int = 0
    remote_port: int = 0
    virq: int = -1


@dataclass(frozen=True, slots=True)
class IoRights:
    """What a vCPU may do with I/O ports (`port_io`).

    Attributes:
        level: the outermost ring that may use them all.
        bitmap: linear address of a bit for each port, 0 where any ring may use it.
        ports: how many ports the bitmap has.
    """

    level: int = 0
    bitmap: int = 0
    ports: int = 0


@dataclass(slots=True, eq=False)
class Vcpu:
    """A virtual CPU.

    Attributes:
        key: number that schedulers and the trace know it by.
        domain: whose it is.
        state: registers while it is not running.
        traps: the virtual trap table; None where no handler is registered.
        event_callback: where it takes events, None before it has said so.
        nmi_pending: whether it was sent an NMI that it has not got yet.
        nmi_masked: whether it handles one, and gets no other before its next ``iret`` hypercall.
        failsafe_callback: where it goes on when its segment registers cannot be loaded, None before it has said so.
        failing: whether that is due.
        polling: the port that it sleeps for (`events.poll`), -1 for any, 0 for none.
        kernel_ss, kernel_esp: stack for entries from ring 3.
        control: virtual control and debug registers by name.
        io: which I/O ports it may use.
        shown_level: its I/O privilege level as its kernel sees it in frames: bits of EFLAGS.
        run_state: see `RunState`.
        paused_from: what it will be when it is paused or down no more.
        watched: whether it has a breakpoint on (`breakpoints`).
        held_hits: breakpoints that it has hit and is not told of yet, as bits.
        fetch_faults: when the last fault at an address was, and how many there were with no instruction begun since.
        domid: its domain's number.
        number: its own number in the domain.
        gdt_base, ldt_base: linear addresses of its window to its descriptor tables (`layout`).
        address_limit: the first linear address that the guest's segments do not reach.
        info: machine address of its `vcpu_info`: a part of the shared-information page, or where it asked for.
        info_mfn: the frame that it asked for, 0 for none.
        account: how it spent its time.
        record_due: when its time record is to be renewed, if it gets the CPU.
        attended: whether something has to be done whenever it gets the CPU or loses it (`timers`, `vcpu_op`).
        tick_period, last_tick: of its periodic timer, in instructions.
        runstate_area, time_area: linear addresses where it wants copies of its records, 0 for nowhere.
        opened_at: when a page table was last opened for a store of its (`writable_tables`).
        gdt: frames of its descriptor table, behind the hypervisor's own page.
        ldt: linear address and number of entries of its local descriptor table.
        user_base: root table that it named for its applications, 0 for none.
        flat_code, flat_data: the hypervisor's flat segments by selector.
        translations: machine address of a page by its linear number, and for writing by that number inverted (`~`).
        translated_at: at which flush count that was.
    """

    key: int
    domain: Domain
    state: CpuState
    traps: list[Gate | None] = field(default_factory=lambda: [None] * VECTORS)
    event_callback: Gate | None = None
    failsafe_callback: Gate | None = None
    nmi_pending: bool = False
    nmi_masked: bool = False
    failing: bool = False
    polling: int = 0
    kernel_ss: int = 0
    kernel_esp: int = 0
    control: dict[str, int] = field(default_factory=lambda: INITIAL_CONTROL | INITIAL_DEBUG)
    io: IoRights = IoRights()
    shown_level: int = 0
    run_state: RunState = RunState.PAUSED
    paused_from: RunState = RunState.RUNNABLE
    watched: bool = False
    held_hits: int = 0
    fetch_faults: tuple[int, int] = (-1, 0)
    opened_at: int = -1
    gdt: tuple[int, ...] = ()
    ldt: tuple[int, int] = (0, 0)
    user_base: int = 0
    info_mfn: int = 0
    account: Account = field(default_factory=Account)
    record_due: int = 0
    attended: bool = False
    tick_period: int = TICK_INSTRUCTIONS
    last_tick: int = 0
    runstate_area: int = 0
    time_area: int = 0
    domid: int = field(init=False)
    number: int = field(init=False)
    gdt_base: int = field(init=False)
    ldt_base: int = field(init=False)
    info: int = field(init=False)
    address_limit: int = field(init=False)
    flat_code: dict[int, Segment] = field(init=False)
    flat_data: dict[int, Segment] = field(init=False)
    translations: dict[int, int] = field(default_factory=dict)
    translated_at: int = -1

    def __post_init__(self) -> None:
        self.number = self.key % VCPUS_PER_DOMAIN
        self.domid = self.domain.domid
        self.gdt_base = gdt_base(self.number)
        self.ldt_base = self.gdt_base + LDT_BASE - GDT_BASE
        self.address_limit = segments_end(self.state.mode)
        self.info = (self.domain.shared_info_mfn << PAGE_SHIFT) + self.number * VCPU_INFO_BYTES
        self.flat_code = flat_segments(self.state.mode, code=True)
        self.flat_data = flat_segments(self.state.mode, code=False)

    @property
    def initialised(self) -> bool:
        """Whether it has page tables to run on, and so everything else (`guest_context`)."""
        return self.state.cr3 != 0

    @property
    def asleep(self) -> bool:
        """Whether it waits for an event, be it paused or down besides."""
        kept = self.run_state in (RunState.PAUSED, RunState.DOWN)
        return (self.paused_from if kept else self.run_state) is RunState.BLOCKED

    def snapshot(self) -> dict[str, Any]:
        """Everything but the memory, as plain data."""
        return {
            "registers": self.state.save(),
            "traps": tuple(self.traps),
            "events": (self.event_callback, self.polling),
            "kernel_stack": (self.kernel_ss, self.kernel_esp),
            "control": dict(self.control),
            "watched": (self.watched, self.held_hits),
            "io": (self.io, self.shown_level),
            "run_state": (self.run_state, self.paused_from),
            "fetch_faults": self.fetch_faults,
            "opened_at": self.opened_at,
            "tables": (self.gdt, self.ldt, self.user_base),
            "info": (self.info, self.info_mfn),
            "account": self.account.state(),
            "clocks": (self.record_due, self.attended, self.tick_period, self.last_tick),
            "areas": (self.runstate_area, self.time_area),
            "gate": self.state.gate,
            "failsafe": (self.failsafe_callback, self.failing),
            "nmi": (self.nmi_pending, self.nmi_masked),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `snapshot` gave."""
        self.state.restore(saved["registers"])
        self.traps = list(saved["traps"])
        self.event_callback, self.polling = saved["events"]
        self.kernel_ss, self.kernel_esp = saved["kernel_stack"]
        self.control = dict(saved["control"])
        self.watched, self.held_hits = saved["watched"]
        self.io, self.shown_level = saved["io"]
        self.run_state, self.paused_from = saved["run_state"]
        self.fetch_faults, self.opened_at = saved["fetch_faults"], saved["opened_at"]
        self.gdt, self.ldt, self.user_base = saved["tables"]
        self.info, self.info_mfn = saved["info"]
        self.account = Account.of(saved["account"])
        self.record_due, self.attended, self.tick_period, self.last_tick = saved["clocks"]
        self.runstate_area, self.time_area = saved["areas"]
        self.state.gate = saved["gate"]
        self.failsafe_callback, self.failing = saved["failsafe"]
        self.nmi_pending, self.nmi_masked = saved["nmi"]
        self.state.inner_stack = self.kernel_esp, self.kernel_ss


@dataclass(slots=True, eq=False)
class Domain:
    """A guest and what it owns.

    Attributes:
        domid: its number; 0 is the control domain.
        name: for people.
        mode: the format of its page tables.
        frames: machine frame of each pseudo-physical frame when it was built: ``frames[pfn] == mfn``.
        own_tables: frames the hypervisor holds on the domain's behalf, never the guest's.
        shared_info_mfn: frame of the shared-information page.
        hypervisor_slots: the hypervisor's entries in each top table of the domain's, by index.
        pages: how many frames it has now; its reservation.
        most_pages: how many it may have.
        least_pages: how many the control domain's tools leave it; the hypervisor does not look at it.
        store_mfn: frame of the page that it shares with those tools, 0 for none.
        writable_tables: whether its stores to page tables are carried out (`writable_tables`).
        privileged: whether it may use the control interface.
        assists: helps for ported kernels that are on: a set of bits by `VmAssistType`.
        latches: what it last wrote to ports 0x70 and 0xcf8.
        shutdown_code: why it will have ended, if it has said so before (`SchedOp.SHUTDOWN_CODE`).
        watchdogs: which of its watchdogs are set: a set of bits.
        max_vcpus: how many virtual CPUs it was made for.
        vcpus: those that it has, by number.
        ports: its event channels that are in use, by port.
        console_out: the last that it wrote to its console, at most `CONSOLE_BYTES`.
        console_lost: how many bytes it wrote before those.
        console_in: what was typed and not yet read.
        shutdown: why it ended, None while it has not.
        report: the crash report, empty when it did not crash.
        symbols: names of its addresses, for disassembly and reports.
        console_mfn: frame of its console ring, 0 if it has none.
    """

    domid: int
    name: str
    mode: PagingMode
    frames: list[int]
    own_tables: list[int]
    shared_info_mfn: int
    hypervisor_slots: dict[int, int]
    pages: int
    most_pages: int
    least_pages: int = 0
    max_vcpus: int = 1
    store_mfn: int = 0
    writable_tables: bool = False
    privileged: bool = False
    assists: int = 0
    latches: tuple[int, int] = (0, 0)
    shutdown_code: Shutdown | None = None
    watchdogs: int = 0
    vcpus: list[Vcpu] = field(default_factory=list)
    ports: dict[int, Port] = field(default_factory=dict)
    console_out: bytearray = field(default_factory=bytearray)
    console_lost: int = 0
    console_in: bytearray = field(default_factory=bytearray)
    shutdown: Shutdown | None = None
    report: str = ""
    symbols: dict[str, int] = field(default_factory=dict)
    console_mfn: int = 0

    @property
    def console(self) -> str:
        """What it wrote to its console, as text; bytes that are not UTF-8 are shown as escapes."""
        text = self.console_out.decode("utf-8", "backslashreplace")
        return f"[{self.console_lost} bytes before this are not kept]\n{text}" if self.console_lost else text

    def write_console(self, data: bytes) -> None:
        """Add what the guest wrote.  A guest may write for ever; only the last `CONSOLE_BYTES` are kept."""
        self.console_out += data
        excess = len(self.console_out) - CONSOLE_BYTES
        if excess > 0:
            del self.console_out[:excess]
            self.console_lost += excess

    @property
    def ended(self) -> bool:
        """Whether it has shut down or crashed."""
        return self.shutdown is not None

    @property
    def crashed(self) -> bool:
        """Whether a fault of its own ended it."""
        return self.shutdown is Shutdown.CRASH

    def snapshot(self) -> dict[str, Any]:
        """Everything but the memory, as plain data."""
        return {
            "memory": (self.pages, self.most_pages, self.least_pages, self.writable_tables),
            "ports": dict(self.ports),
            "services": (self.assists, self.latches, self.shutdown_code, self.watchdogs),
            "console": (bytes(self.console_out), bytes(self.console_in), self.console_lost),
            "end": (self.shutdown, self.report),
            "vcpus": [vcpu.snapshot() for vcpu in self.vcpus],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `snapshot` gave."""
        self.pages, self.most_pages, self.least_pages, self.writable_tables = saved["memory"]
        self.ports = dict(saved["ports"])
        self.assists, self.latches, self.shutdown_code, self.watchdogs = saved["services"]
        out, typed, self.console_lost = saved["console"]
        self.console_out, self.console_in = bytearray(out), bytearray(typed)
        self.shutdown, self.report = saved["end"]
        for vcpu, state in zip(self.vcpus, saved["vcpus"], strict=True):
            vcpu.restore(state)
