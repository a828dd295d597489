"""Guests of exercise 08: a receiver that closes, opens, works and sleeps, and a sender that does not wait for it.

A `Race` writes both down, action by action, as one program; the sender is the domain with a command line.  How their
instructions lie between each other follows from how many each executes in its turn.

The receiver's callback loses nothing by itself: it takes away the flag and the selector, and then looks at the open
ports of each group that was selected.  An insistent port's bit it leaves as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from xenlab.abi.structures import SharedInfo, StartInfo
from xenlab.grading.event_slot import EventRules
from xenlab.hypervisor.event_bits import WORD

_PENDING, _MASK = SharedInfo.evtchn_pending.offset, SharedInfo.evtchn_mask.offset


class Race:
    """A receiver and a sender that are being written.

    Attributes:
        rules: what the bits mean.
        ports: those between the two.
        turn: instructions that each gets before the other's turn.
    """

    def __init__(self, rules: EventRules, ports: Sequence[int], turn: int) -> None:
        self.rules, self.ports, self.turn = rules, tuple(ports), turn
        self._receiver: list[str] = []
        self._sender: list[str] = []
        self._labels = 0

    @property
    def scenario(self) -> dict[str, object]:
        """As it is sent to the student's process."""
        return {"ports": list(self.ports), "turn": self.turn}

    @property
    def asked(self) -> dict[str, int]:
        """How often each question but the last comes up in it."""
        return {"send": len(self._sender), "unmask": sum(text.endswith(_UNMASK) for text in self._receiver)}

    def source(self) -> str:
        """The assembly of both."""
        opened = [self._mask(port, True) for port in self.ports] if self.rules.open_is_1 else []
        parts = (_BEGIN, *opened, *self._receiver, _SLEEP_FOR_EVER, self._callback(), _AS_SENDER, *self._sender, _END)
        return "\n".join([*parts, self._data()])

    # What the receiver does.

    def takes(self) -> Race:
        """It takes upcalls from now on; one that waits, at once."""
        self._receiver.append(_TAKE.format(label=self._label()))
        return self

    def shuts(self) -> Race:
        """It takes no upcalls from now on."""
        self._receiver.append(" mov byte ptr [CLOSED], 1")
        return self

    def closes(self, port: int) -> Race:
        """It closes a port, by a store."""
        self._receiver.append(self._mask(port, False))
        return self

    def opens(self, port: int) -> Race:
        """It has a port opened, by the hypercall."""
        self._receiver.append(f" mov dword ptr [argument], {port}\n{_UNMASK}")
        return self

    def works(self, rounds: int) -> Race:
        """It computes for twice so many instructions."""
        self._receiver.append(self._wait(rounds))
        return self

    def blocks(self) -> Race:
        """It sleeps once."""
        self._receiver.append(_BLOCK)
        return self

    # What the sender does.

    def sends(self, *ports: int, pause: int = 1) -> Race:
        """It sends to one port after the other, each time after twice so many instructions."""
        for port in ports:
            self._sender.append(self._wait(pause) + f" mov dword ptr [argument], {port}\n{_SEND}")
        return self

    def _label(self) -> str:
        self._labels += 1
        return f"l{self._labels}"

    def _wait(self, rounds: int) -> str:
        label = self._label()
        return f" mov ecx, {rounds}\n{label}: dec ecx\n jnz {label}\n"

    def _mask(self, port: int, is_open: bool) -> str:
        instruction = "bts" if is_open == bool(self.rules.open_is_1) else "btr"
        return f" {instruction} dword ptr [shared_info + {_place(_MASK, port)}], {port % WORD}"

    def _callback(self) -> str:
        return "\n".join([_CALLBACK, *map(self._look, self.ports), _LEAVE])

    def _look(self, port: int) -> str:
        rules, bit = self.rules, port % WORD
        closed = "jnc" if rules.open_is_1 else "jc"
        take = "bt" if rules.is_insistent(port) else "btr"
        return _LOOK.format(
            group=port // rules.group,
            mask=_place(_MASK, port),
            pending=_place(_PENDING, port),
            bit=bit,
            closed=closed,
            take=take,
            port=port,
            next=self._label(),
        )

    def _data(self) -> str:
        counters = "\n".join(f"served{port}: .long 0" for port in self.ports)
        return f"{counters}\nargument: .long 0\nreason: .long SHUTDOWN_poweroff\n .skip 512\nstack:\n"


def _place(bits: int, port: int) -> int:
    return bits + 4 * (port // WORD)


_BEGIN = f"""
 .set UPCALL, shared_info
 .set CLOSED, shared_info + 1
 .set SELECTOR, shared_info + 4
start: mov esp, offset stack
 mov byte ptr [CLOSED], 1
 cmp byte ptr [esi + {StartInfo.cmd_line.offset}], 0
 jne sender
 xor edx, edx
 xor esi, esi
 mov ebx, FLAT_RING1_CS
 mov ecx, offset callback
 mov eax, __HYPERVISOR_set_callbacks
 int 0x82
"""
_TAKE = """
 mov byte ptr [CLOSED], 0
 cmp byte ptr [UPCALL], 0
 je {label}
 xor ebx, ebx
 mov eax, __HYPERVISOR_xen_version
 int 0x82
{label}:"""
_UNMASK = """
 mov ebx, EVTCHNOP_unmask
 mov ecx, offset argument
 mov eax, __HYPERVISOR_event_channel_op
 int 0x82
"""
_SEND = _UNMASK.replace("unmask", "send")
_BLOCK = """
 mov ebx, SCHEDOP_block
 xor ecx, ecx
 mov eax, __HYPERVISOR_sched_op
 int 0x82
"""
_SLEEP_FOR_EVER = f"asleep: {_BLOCK} jmp asleep"
_CALLBACK = """
callback: push eax
 push edx
 mov byte ptr [UPCALL], 0
 xor edx, edx
 xchg edx, [SELECTOR]"""
_LOOK = """
 bt edx, {group}
 jnc {next}
 bt dword ptr [shared_info + {mask}], {bit}
 {closed} {next}
 {take} dword ptr [shared_info + {pending}], {bit}
 jnc {next}
 inc dword ptr [served{port}]
{next}:"""
_LEAVE = """
 pop edx
 pop eax
 jmp hypercall_page + 32 * __HYPERVISOR_iret
"""
_AS_SENDER = "sender:"
_END = """
 mov ebx, SCHEDOP_shutdown
 mov ecx, offset reason
 mov eax, __HYPERVISOR_sched_op
 int 0x82
 .align 4
"""

__all__ = ["Race"]
