"""Every hypercall with good, bad and wild arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypercall_bench import BASE, END, IDLE, SCRATCH, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from xenlab import Hypervisor, boot
from xenlab.abi.numbers import DOMID_SELF, Errno, Hypercall, SchedOp, Shutdown
from xenlab.abi.structures import MulticallEntry
from xenlab.errors import InvariantError
from xenlab.hypervisor.domain import RunState
from xenlab.hypervisor.frames import FREE
from xenlab.hypervisor.hypercalls import hypercall_page
from xenlab.hypervisor.trace import Kind
from xenlab.machine.paging import PAE, RW, TWO_LEVEL, PagingMode

SERVED = {
    Hypercall.set_trap_table,
    Hypercall.stack_switch,
    Hypercall.multicall,
    Hypercall.xen_version,
    Hypercall.console_io,
    Hypercall.iret,
    Hypercall.sched_op,
    Hypercall.mmu_update,
    Hypercall.mmuext_op,
    Hypercall.update_va_mapping,
    Hypercall.update_va_mapping_otherdomain,
    Hypercall.set_gdt,
    Hypercall.update_descriptor,
    Hypercall.memory_op,
    Hypercall.vm_assist,
    Hypercall.set_callbacks,
    Hypercall.callback_op,
    Hypercall.event_channel_op,
    Hypercall.vcpu_op,
    Hypercall.set_timer_op,
    Hypercall.set_virtual_timer,
    Hypercall.event_channel_op_compat,
    Hypercall.sched_op_compat,
    Hypercall.physdev_op,
    Hypercall.physdev_op_compat,
    Hypercall.nmi_op,
    Hypercall.fpu_taskswitch,
    Hypercall.set_debugreg,
    Hypercall.get_debugreg,
    Hypercall.platform_op,
    Hypercall.sysctl,
    Hypercall.domctl,
    Hypercall.hvm_op,
    Hypercall.kexec_op,
    Hypercall.xenpmu_op,
    Hypercall.hypfs_op,
    Hypercall.mca,
}
# Batches are done up to the first that is refused, long texts printed up to where they cannot be read; a wild set
# of vCPUs to flush is found when the entry is changed.
DONE_IN_PART = {
    Hypercall.multicall,
    Hypercall.mmu_update,
    Hypercall.mmuext_op,
    Hypercall.update_va_mapping,
    Hypercall.update_va_mapping_otherdomain,
    Hypercall.console_io,
}


@pytest.fixture
def bench(mode: PagingMode) -> Bench:
    return Bench(mode)


@pytest.fixture(scope="module")
def bench_table() -> Bench:
    return Bench()


@given(number=st.integers(0, 2**32 - 1) | st.integers(0, 80))
def test_unknown_numbers_are_enosys(bench_table: Bench, number: int) -> None:
    if number in SERVED:
        return
    before = bench_table.vcpu.state.architectural()
    assert bench_table.call(number) == -Errno.ENOSYS
    after = dict(bench_table.vcpu.state.architectural())
    assert {**before, "eax": 0} == {**after, "eax": 0}


def test_hypercall_page_byte_for_byte() -> None:
    page = hypercall_page()
    assert len(page) == 4096
    for number in range(128):
        stub = page[32 * number : 32 * number + 32]
        if number == 23:  # push %eax; mov $23, %eax; int $0x82
            assert stub.rstrip(b"\xcc") == bytes.fromhex("50 b8 17000000 cd82")
        else:
            assert stub.rstrip(b"\xcc") == b"\xb8" + number.to_bytes(4, "little") + bytes.fromhex("cd82 c3")


def test_hypercall_page_in_memory_works_by_call(mode: PagingMode, play_text: Any) -> None:
    text = "start: mov ebx, XENVER_version\n call hypercall_page + 32 * __HYPERVISOR_xen_version\n stop: jmp stop"
    seen = play_text(text, mode, budget=8)
    assert seen.vcpu.state.eax >> 16 == 4
    assert seen.vcpu.state.eip == seen.label("stop")


WILD = {
    "null": 0,
    "one": 1,
    "last below the image": BASE - 1,
    "end of memory": END,
    "across the end": END - 1,
    "far": 0x8000_0000,
    "hypervisor": 0xFD00_0000,
    "descriptor table": 0xFF00_E000,
    "wraps around": 0xFFFF_FFFF,
    "wraps around later": 0xFFFF_FFF0,
}
# Calls that read or write behind a pointer: arguments with None where the pointer goes.
POINTERS: dict[str, tuple[int, tuple[int | None, ...]]] = {
    "set_trap_table": (Hypercall.set_trap_table, (None,)),
    "console write": (Hypercall.console_io, (0, 16, None)),
    "shutdown": (Hypercall.sched_op, (2, None)),
    "multicall": (Hypercall.multicall, (None, 3)),
    **{f"xen_version {command}": (Hypercall.xen_version, (command, None)) for command in (1, 2, 3, 4, 5, 6, 8, 9)},
}
READ_ONLY_IS_FINE = {"set_trap_table", "console write", "shutdown"}


def with_pointer(arguments: tuple[int | None, ...], pointer: int) -> list[int]:
    return [pointer if argument is None else argument for argument in arguments]


@pytest.mark.parametrize("place", WILD)
@pytest.mark.parametrize("name", POINTERS)
def test_wild_pointer_is_efault_and_changes_nothing(
    name: str, place: str, bench: Bench, frozen: Callable[[Hypervisor], Any]
) -> None:
    if (name, place) == ("set_trap_table", "null"):
        pytest.skip("a null table means: forget all handlers")
    if place == "descriptor table" and name in READ_ONLY_IS_FINE:
        pytest.skip("covered by the next test")
    number, arguments = POINTERS[name]
    # EAX holds the result; all else must be as it was.
    bench.call(number, *with_pointer(arguments, WILD[place]))
    before = frozen(bench.xen)
    assert bench.call(number, *with_pointer(arguments, WILD[place])) == -Errno.EFAULT
    assert frozen(bench.xen) == before


@pytest.mark.parametrize("name", [name for name in POINTERS if name not in READ_ONLY_IS_FINE])
@pytest.mark.parametrize("where", ["page table", "across into a page table"])
def test_results_are_not_written_over_page_tables(
    name: str, where: str, bench: Bench, frozen: Callable[[Hypervisor], Any]
) -> None:
    number, arguments = POINTERS[name]
    pointer = bench.tables - (2 if where.startswith("across") else 0)
    bench.call(number, *with_pointer(arguments, pointer))
    before = frozen(bench.xen)
    assert bench.call(number, *with_pointer(arguments, pointer)) == -Errno.EFAULT
    assert frozen(bench.xen) == before


@pytest.mark.parametrize("pointer", [0xFF00_E018, 0xFF00_0000, 0xF580_0000, 0xFC00_0000])
def test_the_hypervisors_range_is_not_read_for_a_guest(pointer: int, bench: Bench) -> None:
    """The guest's kernel may read the descriptor table itself, but not have it read past its segment limit."""
    if bench.vcpu.state.mode is TWO_LEVEL and pointer == 0xF580_0000:
        pytest.skip("ordinary memory without PAE, and not mapped")
    assert bench.call(Hypercall.console_io, 0, 8, pointer) == -Errno.EFAULT
    assert not bench.domain.console_out


NUMBERS = st.sampled_from(sorted(SERVED - {Hypercall.iret})) | st.integers(0, 80)
WORDS = (
    st.integers(0, 40)
    | st.sampled_from([*WILD.values(), BASE, SCRATCH, SCRATCH + 0xFFF, END - 4096, END - 8, 0xC000_1000])
    | st.integers(0, 2**32 - 1)
    | st.integers(BASE, END + 64)
)


@settings(max_examples=100)
@given(calls=st.lists(st.tuples(NUMBERS, st.lists(WORDS, min_size=6, max_size=6)), min_size=1, max_size=8))
def test_any_hypercall_answers_with_a_number_and_a_refused_one_changes_nothing(
    frozen_for_module: Callable[[Hypervisor], Any], calls: list[tuple[int, list[int]]]
) -> None:
    frozen, bench = frozen_for_module, Bench()
    for number, arguments in calls:
        if bench.vcpu.run_state is not RunState.RUNNABLE:
            break
        bench.vcpu.state.eax = 0
        for name, value in zip(("ebx", "ecx", "edx", "esi", "edi", "ebp"), arguments, strict=True):
            setattr(bench.vcpu.state, name, value)
        before = frozen(bench.xen)
        result = bench.call(number, *arguments)
        assert result >= -max(Errno) or number == Hypercall.get_debugreg  # which gives the register itself
        if result < 0 and number not in DONE_IN_PART:
            bench.vcpu.state.eax = 0
            assert frozen(bench.xen) == before


class TestConsole:
    def test_writes_add_up(self, bench: Bench) -> None:
        bench.write(SCRATCH - 2, b"ab\xff\0cd")
        assert bench.call(Hypercall.console_io, 0, 6, SCRATCH - 2) == 0
        assert bench.call(Hypercall.console_io, 0, 0, 0xFFFF_FFFF) in (0, -Errno.EFAULT)
        assert bench.call(Hypercall.console_io, 0, 1, SCRATCH) == 0
        assert bytes(bench.domain.console_out) == b"ab\xff\0cd\xff"
        assert bench.domain.console == "ab\\xff\0cd\\xff"

    @pytest.mark.parametrize("count", [0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 21])
    def test_texts_longer_than_memory_are_printed_as_far_as_they_go(self, count: int, bench: Bench) -> None:
        bench.write(SCRATCH, b"begin")
        bench.write(END - 4096 - 3, b"end")
        assert bench.call_to_its_end(Hypercall.console_io, 0, count, SCRATCH) == -Errno.EFAULT
        text = bytes(bench.domain.console_out)
        assert text.startswith(b"begin")
        assert b"end" in text[-4200:]
        assert len(text) == END - SCRATCH

    @pytest.mark.parametrize("count", [0x8000_0000, 0xFFFF_FFFF])
    def test_reads_of_more_than_an_int_counts(self, count: int, bench: Bench) -> None:
        assert bench.call(Hypercall.console_io, 1, count, SCRATCH) == -Errno.E2BIG

    def test_reads_take_what_was_typed_and_no_more(self, bench: Bench) -> None:
        bench.domain.console_in += b"hello"
        bench.write(SCRATCH, b"." * 8)
        assert bench.call(Hypercall.console_io, 1, 2, SCRATCH) == 2
        assert bench.call(Hypercall.console_io, 1, 100, SCRATCH + 2) == 3
        assert bench.call(Hypercall.console_io, 1, 100, SCRATCH + 5) == 0
        assert bench.read(SCRATCH, 8) == b"hello..."

    def test_what_cannot_be_stored_stays_typed(self, bench: Bench) -> None:
        bench.domain.console_in += b"hello"
        assert bench.call(Hypercall.console_io, 1, 5, END - 4) == -Errno.EFAULT
        assert bench.call(Hypercall.console_io, 1, 5, bench.tables) == -Errno.EFAULT
        assert bytes(bench.domain.console_in) == b"hello"

    @pytest.mark.parametrize("command", [2, 3, 0x8000_0000, 0xFFFF_FFFF])
    def test_unknown_commands(self, command: int, bench: Bench) -> None:
        assert bench.call(Hypercall.console_io, command, 1, SCRATCH) == -Errno.ENOSYS


VERSION_SIZES = {1: 16, 2: 144, 3: 1024, 4: 64, 5: 4, 6: 8, 8: 16, 9: 1024}


class TestVersion:
    """By the rules of Xen's common/kernel.c."""

    def test_plain_answers(self, bench: Bench) -> None:
        assert bench.call(Hypercall.xen_version, 0, 0xFFFF_FFFF) == 4 << 16 | 17
        assert bench.call(Hypercall.xen_version, 7, 0) == 4096
        assert bench.call(Hypercall.xen_version, 7, SCRATCH) == -Errno.EINVAL

    @pytest.mark.parametrize("command", VERSION_SIZES)
    def test_size_of_each_answer(self, command: int, bench: Bench) -> None:
        size = VERSION_SIZES[command]
        start = END - size
        bench.write(start - 8, b"\0" * 8 if command == 6 else b"\xaa" * 8)
        bench.write(start, b"\0" * size if command == 6 else b"\xaa" * size)
        assert bench.call(Hypercall.xen_version, command, start) == 0
        if command != 6:
            assert bench.read(start - 8, 8) == b"\xaa" * 8
            # An ordinary domain is denied the command line, in nine bytes.
            assert b"\xaa" not in bench.read(start, 9 if command == 9 else size)
        bench.domain.privileged = True
        assert bench.call(Hypercall.xen_version, command, start + 1) == -Errno.EFAULT

    def test_what_the_answers_say(self, bench: Bench) -> None:
        assert bench.call(Hypercall.xen_version, 5, SCRATCH) == 0
        start = int.from_bytes(bench.read(SCRATCH, 4), "little")
        assert start == (0xF580_0000 if bench.vcpu.state.mode is PAE else 0xFC00_0000)
        assert bench.call(Hypercall.xen_version, 3, SCRATCH) == 0
        assert b"xen-3.0-x86_32" in bench.read(SCRATCH, 64)
        bench.write(SCRATCH, bytes(8))
        assert bench.call(Hypercall.xen_version, 6, SCRATCH) == 0
        # The A/D bits of mmu_update, MMUEXT_CLEAR_PAGE and MMUEXT_COPY_PAGE, and no direct mapping.
        assert bench.read(SCRATCH + 4, 4) == (1 << 5 | 1 << 6 | 1 << 16).to_bytes(4, "little")

    @pytest.mark.parametrize("privileged", [False, True])
    def test_features_of_this_domain(self, privileged: bool, bench: Bench) -> None:
        bench.domain.privileged = privileged
        assert bench.call(Hypercall.vm_assist, 0, 3) == 0
        bench.write(SCRATCH, bytes(8))
        assert bench.call(Hypercall.xen_version, 6, SCRATCH) == 0
        word = int.from_bytes(bench.read(SCRATCH + 4, 4), "little")
        assert word & (1 << 4 | 1 << 11) == 1 << 4 | privileged << 11

    def test_command_line_is_for_the_control_domain(self, bench: Bench) -> None:
        for privileged, size in ((False, 9), (True, 1024)):
            bench.domain.privileged = privileged
            bench.write(SCRATCH, b"\xaa" * 1025)
            assert bench.call(Hypercall.xen_version, 9, SCRATCH) == 0
            assert bench.read(SCRATCH, 1025).rstrip(b"\xaa") == (bytes(size) if privileged else b"<denied>\0")

    def test_build_id(self, bench: Bench) -> None:
        bench.write(SCRATCH, bytes(4) + b"\x20\0\0\0")
        assert bench.call(Hypercall.xen_version, 10, 0) == -Errno.EPERM
        assert bench.call(Hypercall.xen_version, 10, SCRATCH) == -Errno.EPERM
        bench.domain.privileged = True
        assert bench.call(Hypercall.xen_version, 10, 0) == -Errno.ENODATA
        assert bench.call(Hypercall.xen_version, 10, SCRATCH) == -Errno.EINVAL
        assert bench.call(Hypercall.xen_version, 10, SCRATCH + 4) == -Errno.ENODATA
        assert bench.call(Hypercall.xen_version, 10, END) == -Errno.EFAULT

    def test_features_beyond_the_first_word(self, bench: Bench) -> None:
        bench.write(SCRATCH, b"\x01\0\0\0\xaa\xaa\xaa\xaa")
        assert bench.call(Hypercall.xen_version, 6, SCRATCH) == -Errno.EINVAL
        assert bench.read(SCRATCH + 4, 4) == b"\xaa" * 4

    @pytest.mark.parametrize("command", [11, 100, 0xFFFF_FFFF])
    def test_unknown_commands(self, command: int, bench: Bench) -> None:
        assert bench.call(Hypercall.xen_version, command, SCRATCH) == -Errno.ENOSYS


class TestSchedOp:
    """By the rules of Xen's common/sched/core.c."""

    def words(self, bench: Bench, *values: int) -> int:
        bench.write(SCRATCH, b"".join(value.to_bytes(4, "little") for value in values))
        return SCRATCH

    def test_the_first_shutdown_code_counts(self, bench: Bench) -> None:
        for reason in (4, 1):
            assert bench.call(Hypercall.sched_op, SchedOp.SHUTDOWN_CODE, self.words(bench, reason)) == 0
        assert not bench.domain.ended
        assert bench.call(Hypercall.sched_op, SchedOp.SHUTDOWN, self.words(bench, 0)) == 0
        assert bench.domain.shutdown is Shutdown.WATCHDOG

    def test_shutdown_of_another(self, bench: Bench) -> None:
        other = boot(bench.xen, IDLE, mode=bench.domain.mode)
        remote = SchedOp.REMOTE_SHUTDOWN
        assert bench.call(Hypercall.sched_op, remote, self.words(bench, 77, 0)) == -Errno.ESRCH
        assert bench.call(Hypercall.sched_op, remote, self.words(bench, DOMID_SELF, 0)) == -Errno.ESRCH
        for domid in (other.domid, bench.domain.domid):
            assert bench.call(Hypercall.sched_op, remote, self.words(bench, domid, 0)) == -Errno.EPERM
        assert bench.call(Hypercall.sched_op, remote, END - 4) == -Errno.EFAULT
        bench.domain.privileged = True
        for reason in (3, 0):
            assert bench.call(Hypercall.sched_op, remote, self.words(bench, other.domid, reason)) == 0
        assert other.shutdown is Shutdown.CRASH
        assert not bench.domain.ended

    def test_watchdogs_are_counted(self, bench: Bench) -> None:
        def watchdog(number: int, timeout: int) -> int:
            return bench.call(Hypercall.sched_op, SchedOp.WATCHDOG, self.words(bench, number, timeout))

        assert [watchdog(0, 0), watchdog(3, 5), watchdog(1, 5), watchdog(2, 0)] == [-Errno.EINVAL] * 4
        assert [watchdog(0, 5) for _ in range(3)] == [1, 2, -Errno.ENOSPC]
        assert [watchdog(1, 9), watchdog(1, 0), watchdog(1, 0)] == [0, 0, -Errno.EINVAL]
        assert [watchdog(0, 1), watchdog(2, 0), watchdog(0, 1)] == [1, 0, 2]
        assert bench.call(Hypercall.sched_op, SchedOp.WATCHDOG, END - 4) == -Errno.EFAULT

    def test_a_watchdog_ends_a_domain_that_forgets_it(self, bench: Bench) -> None:
        def watchdog(number: int, timeout: int) -> int:
            return bench.call(Hypercall.sched_op, SchedOp.WATCHDOG, self.words(bench, number, timeout))

        second, xen = 100_000_000, bench.xen
        assert [watchdog(0, 1), watchdog(0, 5), watchdog(1, 3)] == [1, 2, 0]
        bench.call(Hypercall.sched_op, SchedOp.BLOCK, 0)
        start = xen.now
        xen.run(3 * second - 1)
        assert not bench.domain.ended
        xen.run(second)
        assert bench.domain.shutdown is Shutdown.WATCHDOG
        assert xen.now == start + 3 * second

    def test_a_watchdog_that_was_stopped_bites_nobody(self, bench: Bench) -> None:
        for number, timeout in ((0, 1), (1, 0)):
            bench.call(Hypercall.sched_op, SchedOp.WATCHDOG, self.words(bench, number, timeout))
        bench.call(Hypercall.sched_op, SchedOp.BLOCK, 0)
        bench.xen.run(300_000_000)
        assert not bench.domain.ended

    @pytest.mark.parametrize(("processor", "answer"), [(0, 0), (1, -Errno.EINVAL), (0xFFFF_FFFF, 0)])
    def test_pin_override_is_for_the_control_domain(self, processor: int, answer: int, bench: Bench) -> None:
        pin = SchedOp.PIN_OVERRIDE
        assert bench.call(Hypercall.sched_op, pin, self.words(bench, processor)) == -Errno.EPERM
        assert bench.call(Hypercall.sched_op, pin, END) == -Errno.EPERM
        bench.domain.privileged = True
        assert bench.call(Hypercall.sched_op, pin, self.words(bench, processor)) == answer
        assert bench.call(Hypercall.sched_op, pin, END) == -Errno.EFAULT

    def test_as_it_was_before_xen_3_1(self, bench: Bench) -> None:
        assert bench.call(Hypercall.sched_op_compat, 3, 0) == -Errno.ENOSYS
        assert bench.call(Hypercall.sched_op_compat, 0, 0) == 0
        assert bench.call(Hypercall.sched_op_compat, 2, 9) == -Errno.EINVAL
        assert bench.call(Hypercall.sched_op_compat, 2, 1) == 0
        assert bench.domain.shutdown is Shutdown.REBOOT

    @pytest.mark.parametrize("command", [8, 99, 0xFFFF_FFFF])
    def test_unknown_commands(self, command: int, bench: Bench) -> None:
        assert bench.call(Hypercall.sched_op, command, SCRATCH) == -Errno.ENOSYS
        assert bench.vcpu.run_state is RunState.RUNNABLE

    @pytest.mark.parametrize("reason", range(6))
    def test_shutdown_with_each_reason(self, reason: int, bench: Bench) -> None:
        bench.write(SCRATCH, reason.to_bytes(4, "little"))
        assert bench.call(Hypercall.sched_op, 2, SCRATCH) == 0
        assert bench.domain.shutdown == reason
        assert bench.domain.crashed == (reason == 3)

    @pytest.mark.parametrize("reason", [6, 0x7F, 0xFF])
    def test_shutdown_for_no_reason_that_exists(self, reason: int, bench: Bench) -> None:
        bench.write(SCRATCH, reason.to_bytes(4, "little"))
        assert bench.call(Hypercall.sched_op, 2, SCRATCH) == -Errno.EINVAL
        assert not bench.domain.ended

    def test_block_opens_the_event_mask(self, bench: Bench) -> None:
        bench.write(0xC000_1001, b"\1")
        assert bench.call(Hypercall.sched_op, 1, 0) == 0
        assert bench.read(0xC000_1001, 1) == b"\0"
        assert bench.vcpu.run_state is RunState.BLOCKED


def entry(op: int, *arguments: int) -> bytes:
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    return bytes(MulticallEntry(op=op, result=0xEEEE_EEEE, args=padded))


class TestMulticall:
    def results(self, bench: Bench, count: int, at: int = SCRATCH) -> list[int]:
        words = (int.from_bytes(bench.read(at + 32 * n + 4, 4), "little") for n in range(count))
        return [word - (word >> 31 << 32) for word in words]

    def test_results_one_by_one(self, bench: Bench) -> None:
        batch = (
            entry(Hypercall.xen_version, 0),
            entry(63),
            entry(Hypercall.console_io, 0, 4, BASE - 4),
            entry(Hypercall.stack_switch, 0xE021, 0x1234),
            entry(2**32 - 1),
            entry(Hypercall.multicall, SCRATCH, 1),
            entry(Hypercall.iret),
        )
        bench.write(SCRATCH, b"".join(batch))
        assert bench.call(Hypercall.multicall, SCRATCH, len(batch)) == 0
        refused = -Errno.EINVAL
        assert self.results(bench, len(batch)) == [4 << 16 | 17, -38, -14, 0, -38, refused, refused]
        assert bench.vcpu.kernel_esp == 0x1234

    def test_nothing_is_done_unless_every_result_can_be_stored(self, bench: Bench) -> None:
        at = END - 32
        bench.write(at, entry(Hypercall.stack_switch, 0xE021, 0x4321))
        assert bench.call(Hypercall.multicall, at, 2) == -Errno.EFAULT
        assert bench.vcpu.kernel_esp != 0x4321
        assert bench.read(at + 4, 4) == b"\xee" * 4

    @pytest.mark.parametrize("count", [0x1000_0000, 0x0800_0001, 0x7FFF_FFFF, 0xFFFF_FFFF])
    def test_huge_counts(self, count: int, bench: Bench) -> None:
        assert bench.call(Hypercall.multicall, SCRATCH, count) in (-Errno.EINVAL, -Errno.EFAULT)

    def test_empty_batch(self, bench: Bench) -> None:
        assert bench.call(Hypercall.multicall, SCRATCH, 0) == 0

    def test_unaligned_batch_across_pages(self, bench: Bench) -> None:
        at = SCRATCH + 4096 - 33
        bench.write(at, entry(Hypercall.xen_version, 7) * 3)
        assert bench.call(Hypercall.multicall, at, 3) == 0
        assert self.results(bench, 3, at) == [4096] * 3

    def test_a_call_may_rewrite_the_entries_behind_it(self, bench: Bench) -> None:
        """Each entry is read when its turn comes, from the memory as it is then; nothing breaks."""
        bench.write(SCRATCH, entry(Hypercall.xen_version, 1, SCRATCH + 32) + entry(Hypercall.stack_switch, 1, 0x5555))
        assert bench.call(Hypercall.multicall, SCRATCH, 2) == 0
        assert self.results(bench, 2) == [0, -Errno.ENOSYS]
        assert bench.vcpu.kernel_esp != 0x5555

    def test_batch_ends_with_its_domain(self, bench: Bench) -> None:
        bench.write(SCRATCH + 512, bytes(4))
        batch = entry(Hypercall.sched_op, 2, SCRATCH + 512) + entry(Hypercall.stack_switch, 1, 0x5555)
        bench.write(SCRATCH, batch)
        bench.call(Hypercall.multicall, SCRATCH, 2)
        assert bench.domain.ended
        assert bench.vcpu.kernel_esp != 0x5555


def test_hypercalls_are_audited(bench: Bench, auditor: list[int]) -> None:
    bench.call(Hypercall.xen_version, 0)
    assert auditor[0] == 1


@pytest.mark.parametrize("damage", ["foreign frame", "writable table", "writable descriptors", "lost frame"])
def test_auditor_notices(damage: str, bench: Bench) -> None:
    xen, state, mode = bench.xen, bench.vcpu.state, bench.vcpu.state.mode
    if damage == "lost frame":
        xen.frames.owner[bench.domain.frames[5]] = FREE
        undo = partial(xen.frames.owner.__setitem__, bench.domain.frames[5], bench.domain.domid)
    else:
        address = {"foreign frame": SCRATCH, "writable table": bench.tables, "writable descriptors": 0xFF00_E000}[
            damage
        ]
        table = mode.root_address(state.cr3)
        for level in mode.levels[:-1]:
            table = mode.frame_of(mode.read(xen.memory, table, level.index(address))) << 12
        index = mode.levels[-1].index(address)
        entry = mode.read(xen.memory, table, index)
        undo = partial(mode.write, xen.memory, table, index, entry)
        mode.write(xen.memory, table, index, 3 << 12 | 1 if damage == "foreign frame" else entry | RW)
    with pytest.raises(InvariantError):
        bench.call(Hypercall.xen_version, 0)
    undo()  # the fixture audits once more at the end


def test_trace_has_a_return_for_each_hypercall(play_text: Any) -> None:
    seen = play_text("start: mov eax, 77\n int 0x82\n mov eax, 17\n mov ebx, 7\n int 0x82\n stop: jmp stop", budget=9)
    calls, returns = (seen.xen.trace.events(kind) for kind in (Kind.HYPERCALL, Kind.RETURN))
    assert [event.number for event in calls] == [77, 17] == [event.number for event in returns]
    assert [event.result for event in returns] == [-38, 4096]
    assert [event.time for event in calls] == [2, 5] == [event.time for event in returns]
