"""Scenes of lesson 00: a first guest, several on one CPU, and what a domain finds when it starts (paper 1, 2.1, 3.4).

The lesson itself uses `Hypervisor`, `boot` and `Timeline` as anyone would.  Here stands only what
would distract: machines with several guests, and state made into tables.
"""

from __future__ import annotations

import base64
import ctypes
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from xenlab.abi.structures import StartInfo
from xenlab.hypervisor.core import Hypervisor
from xenlab.hypervisor.domain import VCPUS_PER_DOMAIN, Domain
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.machine.assembler import assemble
from xenlab.machine.disassembler import disassemble
from xenlab.machine.machine import Machine
from xenlab.machine.memory import PAGE_SHIFT
from xenlab.timeline import Timeline
from xenlab.timeline.perfetto import to_perfetto
from xenlab.toolstack import boot
from xenlab.toolstack.image import SOURCE_BASE, SOURCE_CODE, abi_symbols
from xenlab.views.picture import table

_MACHINE_MIB = 8
_DATA = re.compile(r"\s*(?:[\w.$]+:\s*)*\.")
_BYTES_SHOWN, _WORD = 10, 4


def start(guests: Mapping[str, str]) -> Hypervisor:
    """A machine that records its trace, with one domain for each of ``guests``: assembly source by name."""
    xen = Hypervisor(Machine(_MACHINE_MIB), trace=Trace())
    for name, source in guests.items():
        boot(xen, source, name=name)
    return xen


def listing(source: str) -> str:
    """What the assembler made of each line of ``source``: address, bytes, and the bytes read back as an instruction."""
    program = assemble(source, SOURCE_CODE, symbols=abi_symbols())
    lines = source.split("\n")
    ends = [address for address, _number in program.lines[1:]] + [program.base + len(program.code)]
    rows = []
    for (address, number), end in zip(program.lines, ends, strict=True):
        code = program.code[address - program.base : end - program.base]
        text = lines[number - 1].split("#")[0].strip()
        rows.append((f"{address:08x}", _hex(code), _meaning(code, address, text), text))
    return table(("address", "bytes", "read back", "source"), rows)


def _hex(code: bytes) -> str:
    return code[:_BYTES_SHOWN].hex(" ") + (" …" if len(code) > _BYTES_SHOWN else "")


def _meaning(code: bytes, address: int, text: str) -> str:
    if _DATA.match(text):
        return f"({len(code)} bytes of data)"
    return "; ".join(instruction.text for instruction in disassemble(code, address))


def turns(xen: Hypervisor, most: int = 12) -> str:
    """Who got the CPU when, from the trace's first SWITCH events."""
    assert xen.trace is not None
    rows = [
        (f"{event.time:,}", _name(xen, event.from_vcpu), _name(xen, event.to_vcpu), f"{event.slice:,}")
        for event in xen.trace.events(Kind.SWITCH)[:most]
    ]
    return table(("at instruction", "from", "to", "for at most"), rows)


def _name(xen: Hypervisor, vcpu: int) -> str:
    return "nobody" if vcpu < 0 else f"{vcpu // VCPUS_PER_DOMAIN} {xen.domains[vcpu // VCPUS_PER_DOMAIN].name}"


def start_info(xen: Hypervisor, domain: Domain) -> StartInfo:
    """The ``start_info`` page of a domain that has not run yet: ESI still points at it."""
    vcpu = domain.vcpus[0]
    return StartInfo.from_buffer_copy(xen.guest_memory.read(vcpu, vcpu.state.esi, ctypes.sizeof(StartInfo)))


def start_info_table(info: StartInfo) -> str:
    """The fields that lesson 00 speaks of, with their meaning."""
    rows = (
        ("magic", info.magic.decode(), "which interface this is"),
        ("nr_pages", str(info.nr_pages), "pages of memory that the domain has"),
        ("shared_info", f"{info.shared_info:#010x}", "machine address of the page shared with the hypervisor"),
        ("pt_base", f"{info.pt_base:#010x}", "where the domain sees its own page tables"),
        ("nr_pt_frames", str(info.nr_pt_frames), "how many pages they take"),
        ("mfn_list", f"{info.mfn_list:#010x}", "where it finds the list from pfn to mfn"),
        ("cmd_line", repr(info.cmd_line.decode()), "text from whoever built the domain"),
    )
    return table(("field", "value", "what it tells the guest"), rows)


def frames(xen: Hypervisor, domain: Domain, pfns: Sequence[int]) -> str:
    """Some pseudo-physical frames, the machine frames behind them, and the same bytes seen both ways.

    Not for pfn 1: over its address the builder maps the page that is shared with the hypervisor.
    """
    mfns = _mfn_list(xen, domain)
    rows = [(str(pfn), f"{mfn:#x}", *_both_ways(xen, domain, pfn, mfn)) for pfn, mfn in _pick(mfns, pfns)]
    heads = ("pfn", "mfn", "guest's address", "bytes there", "machine address", "bytes there")
    return table(heads, rows)


def _mfn_list(xen: Hypervisor, domain: Domain) -> Sequence[int]:
    """The list as the guest itself would read it."""
    info = start_info(xen, domain)
    raw = xen.guest_memory.read(domain.vcpus[0], info.mfn_list, info.nr_pages * _WORD)
    return memoryview(raw).cast("I")


def _pick(mfns: Sequence[int], pfns: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((pfn, mfns[pfn]) for pfn in pfns)


def _both_ways(xen: Hypervisor, domain: Domain, pfn: int, mfn: int) -> tuple[str, str, str, str]:
    virtual, machine = SOURCE_BASE + (pfn << PAGE_SHIFT), mfn << PAGE_SHIFT
    seen = xen.guest_memory.read(domain.vcpus[0], virtual, 6)
    return f"{virtual:#010x}", seen.hex(" "), f"{machine:#010x}", xen.memory.read(machine, 6).hex(" ")


class TraceFile:
    """A run as a file for Perfetto's viewer, offered as a link that works on a remote server too."""

    def __init__(self, timeline: Timeline, name: str = "trace.json") -> None:
        names = {domid: domain.name for domid, domain in timeline.hypervisor.domains.items()}
        self.name = name
        self.content = json.dumps(to_perfetto(timeline.events(), names, timeline.position)).encode()

    def __repr__(self) -> str:
        return f"{self.name}: {len(self.content):,} bytes for ui.perfetto.dev"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.content).decode()
        name = escape(self.name, quote=True)
        link = f'<a download="{name}" href="data:application/json;base64,{data}">Download {name}</a>'
        return f"{link} ({len(self.content):,} bytes)"
