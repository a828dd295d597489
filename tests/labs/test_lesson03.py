"""The scenes of lesson 03 show what the machine did."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, XenlabError, boot, guests
from xenlab.abi.numbers import Errno, Shutdown
from xenlab.hypervisor.core import Stop
from xenlab.hypervisor.inputs import Typed
from xenlab.hypervisor.trace import Kind, Trace
from xenlab.labs import lesson03

VERSION = 4 << 16 | 17


def test_a_conversation_is_the_calls_of_the_run() -> None:
    timeline = lesson03.calls_timeline()
    assert timeline.position == 0
    timeline.run(10_000)
    lines = lesson03.conversation(timeline.hypervisor).splitlines()[2:]
    assert lines[0].split()[:3] == ["32", "×", "xen_version"]
    assert [line.split()[-1] for line in lines[2:5]] == ["-ENOSYS", "-ENOSYS", "-EFAULT"]


def test_a_conversation_follows_the_guest() -> None:
    xen = Hypervisor(trace=Trace())
    boot(xen, guests.source("calls").replace(".set CALLS, 16", ".set CALLS, 5"), name="calls")
    xen.run(10_000)
    assert lesson03.conversation(xen).splitlines()[2].startswith("10 ×")


def test_stubs_come_from_the_guests_memory() -> None:
    xen = Hypervisor()
    domain = boot(xen, guests.source("hello"), name="hello")
    text = lesson03.stubs(xen, domain, [17, 23])
    assert text.count("int 0x82") == 2
    assert text.count("ret\n") == 1
    assert text.index("push eax") > text.index("iret = 23")
    xen.guest_memory.write(domain.vcpus[0], lesson03.SOURCE_HYPERCALL_PAGE + 32 * 17, b"\xf4")
    assert "hlt" in lesson03.stubs(xen, domain, [17])


def test_errnos_have_names() -> None:
    assert lesson03.errno_name(-14) == "-EFAULT"
    assert lesson03.errno_name(-9999) == "-9999"
    assert lesson03.errno_name(3) == "3"


def test_asking_says_the_answer_and_what_changed() -> None:
    assert lesson03.ask("xen_version", 0).result == VERSION
    assert lesson03.ask("xen_version", 0).changed == ()
    assert lesson03.ask(63).result == -Errno.ENOSYS
    assert lesson03.ask("console_io", "CONSOLEIO_write", 4, "area").changed == ("console",)
    assert lesson03.ask("stack_switch", 0xE021, 0x1234).changed == ("kernel stack",)
    written = lesson03.ask("xen_version", "XENVER_capabilities", "area")
    assert len(written.changed) == 1
    assert written.changed[0].endswith("of memory from 0xc0003000")
    assert str(lesson03.ask(63)) == "-ENOSYS; changed: nothing"


@pytest.mark.parametrize("reason", list(Shutdown))
def test_asking_hands_over_data(reason: Shutdown) -> None:
    answer = lesson03.ask("sched_op", "SCHEDOP_shutdown", "area", data=bytes([reason]))
    assert answer.xen.domains[0].shutdown is reason
    assert set(answer.changed) == {"run state", "shutdown"}


def test_seven_arguments_are_too_many() -> None:
    with pytest.raises(XenlabError, match="at most 6"):
        lesson03.ask(17, 0, 0, 0, 0, 0, 0, 0)


def test_wild_pointers_are_refused_and_change_nothing() -> None:
    rows = lesson03.wild_pointers().splitlines()[2:]
    assert len(rows) == 10
    assert all(row.split()[-2:] == ["-EFAULT", "nothing"] for row in rows)


@settings(max_examples=30)
@given(
    call=st.sampled_from(["console_io", "xen_version", "multicall", "set_trap_table", "sched_op"]),
    pointer=st.integers(0, 0xFFFF_FFFF),
    size=st.integers(0, 0x1_0000),
)
def test_a_call_that_answers_efault_changed_nothing(call: str, pointer: int, size: int) -> None:
    arguments: dict[str, tuple[int, ...]] = {
        "console_io": (0, size, pointer),
        "xen_version": (3, pointer),
        "multicall": (pointer, size),
        "set_trap_table": (pointer,),
        "sched_op": (2, pointer),
    }
    answer = lesson03.ask(call, *arguments[call])
    assert answer.result != -Errno.EFAULT or answer.changed == ()


def test_the_read_only_page_can_be_read_and_not_written() -> None:
    page = lesson03.read_only_page()
    assert lesson03.ask("console_io", 0, 16, page).result == 0
    assert lesson03.ask("xen_version", 3, page).result == -Errno.EFAULT


def test_a_walk_by_hand_ends_at_the_byte() -> None:
    xen = Hypervisor()
    domain = boot(xen, guests.source("hello"), name="hello")
    message = domain.symbols["message"]
    assert lesson03.walk_by_hand(xen, domain, message).split()[-1] == hex(ord("H"))
    assert lesson03.walk_by_hand(xen, domain, 0).split()[-1] == "absent"


def test_a_batch_is_one_trap() -> None:
    costs = lesson03.batching((1, 16), work=32, repeat=2)
    assert [(cost.calls, cost.traps) for cost in costs] == [(1, (1, 1)), (16, (16, 1))]
    assert all(min(cost.call_ns) > 0 for cost in costs)


def turns(polite: bool) -> tuple[list[str], str]:
    xen = lesson03.talkers(polite=polite)
    assert xen.trace is not None
    said = b"".join(event.data for event in xen.trace.events(Kind.CONSOLE)).decode()
    assert all(domain.shutdown is Shutdown.POWEROFF for domain in xen.domains.values())
    return lesson03.turns(xen).splitlines()[2:], said


def test_talkers_that_yield_take_turns_and_others_run_out_their_slices() -> None:
    rude, rude_said = turns(polite=False)
    assert rude_said == "aaabbbab"
    assert rude[0].split() == ["0", "domain", "0", "2,000", "aaa"]
    polite, polite_said = turns(polite=True)
    assert polite_said == "abababab"
    assert len(polite) > len(rude)


def test_echo_sleeps_until_something_is_typed() -> None:
    xen = Hypervisor()
    echo = boot(xen, lesson03.ECHO, name="echo")
    assert xen.run(100_000).stop is Stop.IDLE
    xen.submit(Typed(echo.domid, b"hello"))
    assert xen.run(100_000).stop is Stop.IDLE
    assert echo.console == "hello"
