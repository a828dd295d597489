"""``xenlab boot``: the console, standard input, and the exit statuses that scripts rely on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from xenlab.abi.structures import StartInfo

Run = Callable[..., Result]
Elf = Callable[..., Path]
Start = Callable[..., "subprocess.Popen[bytes]"]

WRITE = """
write: mov ebx, CONSOLEIO_write
    mov eax, __HYPERVISOR_console_io
    int 0x82
    ret
"""
SHUTDOWN = """
    mov ebx, SCHEDOP_shutdown
    mov ecx, offset reason
    mov eax, __HYPERVISOR_sched_op
    int 0x82
reason: .long SHUTDOWN_{}
"""
HELLO = """
    mov ecx, 6
    mov edx, offset message
    call write
{end}
message: .ascii "hello\\n"
"""
# Echoes what it reads and sleeps between; ends when a chunk begins with q.
ECHO = """
again: mov ebx, CONSOLEIO_read
    mov ecx, 64
    mov edx, offset buffer
    mov eax, __HYPERVISOR_console_io
    int 0x82
    mov ecx, eax
    test ecx, ecx
    jz sleep
    call write
    cmp byte ptr [buffer], 'q'
    jne again
    {end}
sleep: mov ebx, SCHEDOP_block
    mov eax, __HYPERVISOR_sched_op
    int 0x82
    jmp again
buffer: .space 64
"""
SPIN = "spin: jmp spin"


def hello(end: str) -> str:
    return HELLO.format(end=end) + WRITE


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes, str]:
    """Exit status and all output of a process that was left to end."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.decode()


def test_poweroff_is_0_and_the_console_is_stdout(xenlab: Run, elf: Elf) -> None:
    result = xenlab("boot", elf(hello(SHUTDOWN.format("poweroff"))))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "hello\n", "")


def test_reboot_is_0_and_said(xenlab: Run, elf: Elf) -> None:
    result = xenlab("boot", elf(hello(SHUTDOWN.format("reboot"))))
    assert (result.exit_code, result.stdout) == (0, "hello\n")
    assert "SHUTDOWN_reboot" in result.stderr


def test_crash_is_3_with_a_report(xenlab: Run, elf: Elf) -> None:
    result = xenlab("boot", elf(hello("ud2")))
    assert (result.exit_code, result.stdout) == (3, "hello\n")
    assert "no handler" in result.stderr
    assert "ud2" in result.stderr


def test_crash_that_the_guest_declares_is_3(xenlab: Run, elf: Elf) -> None:
    result = xenlab("boot", elf(hello(SHUTDOWN.format("crash"))))
    assert result.exit_code == 3
    assert "SHUTDOWN_crash" in result.stderr


def test_budget_is_4_and_exact(xenlab: Run, elf: Elf) -> None:
    result = xenlab("boot", elf(hello(SPIN)), "--max-instructions", 123_457)
    assert (result.exit_code, result.stdout) == (4, "hello\n")
    assert "123,457 instructions ran out" in result.stderr
    assert "at instruction 123,457 " in result.stderr


# Ends with the reason that says whether vCPU 2 exists: poweroff if so, else a crash.
THREE_VCPUS = """
    mov ebx, 3
    mov ecx, 2
    mov eax, __HYPERVISOR_vcpu_op
    int 0x82
    test eax, eax
    jz there
    ud2
there:
""" + SHUTDOWN.format("poweroff")


def test_vcpus(xenlab: Run, elf: Elf) -> None:
    assert xenlab("boot", elf(THREE_VCPUS), "--vcpus", 3).exit_code == 0
    assert xenlab("boot", elf(THREE_VCPUS), "--vcpus", 2).exit_code == 3
    assert xenlab("boot", elf(THREE_VCPUS)).exit_code == 3
    result = xenlab("boot", elf(SPIN), "--vcpus", 2, "--max-instructions", 1000)
    assert result.exit_code == 4
    assert "at instruction 1,000, vCPU 0, is runnable, ring 1" in result.stderr
    for wrong in (0, 33):
        result = xenlab("boot", elf(SPIN), "--vcpus", wrong)
        assert result.exit_code == 2
        assert "from 1 to 32 vCPUs" in result.stderr


def test_sleep_without_input_is_4_and_said(start: Start, elf: Elf) -> None:
    process = start("boot", elf(ECHO.format(end="") + WRITE))
    status, out, err = ended(process)
    assert (status, out) == (4, b"")
    assert "it sleeps, and standard input has ended" in err


def test_stdin_reaches_the_guest_while_it_sleeps(start: Start, elf: Elf) -> None:
    process = start("boot", elf(ECHO.format(end=SHUTDOWN.format("poweroff")) + WRITE))
    assert process.stdin is not None
    assert process.stdout is not None
    for line in (b"first\n", b"second\n"):
        process.stdin.write(line)
        process.stdin.flush()
        assert process.stdout.readline() == line
    # Standard input stays open: the reading thread must not keep the process alive.
    process.stdin.write(b"q\n")
    process.stdin.flush()
    assert process.wait(60) == 0
    assert ended(process)[1:] == (b"q\n", "")


def test_all_of_a_long_input_arrives(start: Start, elf: Elf) -> None:
    process = start("boot", elf(ECHO.format(end="") + WRITE))
    data = b"".join(b"%d bottles\n" % number for number in range(20_000))
    out, _ = process.communicate(data, timeout=60)
    assert out == data
    assert process.returncode == 4


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_console_is_shown_at_once_and_ctrl_c_is_130(start: Start, elf: Elf) -> None:
    process = start("boot", elf(hello(SPIN)))
    assert process.stdout is not None
    assert process.stdout.readline() == b"hello\n"
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert status == 130
    assert err.startswith("interrupted: domain 0 (kernel.elf)")
    assert "Traceback" not in err


@pytest.mark.parametrize("privileged", [False, True])
def test_command_line_and_privilege_are_passed(xenlab: Run, elf: Elf, privileged: bool) -> None:
    source = f"""
        mov ecx, 7
        lea edx, [esi + {StartInfo.cmd_line.offset}]
        call write
        mov al, [esi + {StartInfo.flags.offset}]
        add al, '0'
        mov [shown], al
        mov ecx, 1
        mov edx, offset shown
        call write
        {SHUTDOWN.format("poweroff")}
    shown: .byte 0
    """
    result = xenlab("boot", elf(source + WRITE), "--cmdline", "quiet=1", *["--privileged"] * privileged)
    assert result.stdout == "quiet=1" + ("3" if privileged else "0")


def test_memory_is_passed(xenlab: Run, elf: Elf) -> None:
    pages = 5 * 256
    source = f"""
        cmp dword ptr [esi + {StartInfo.nr_pages.offset}], {pages}
        je right
        ud2
    right: {SHUTDOWN.format("poweroff")}
    """
    assert xenlab("boot", elf(source), "--memory", 5).exit_code == 0
    assert xenlab("boot", elf(source), "--memory", 6).exit_code == 3


def test_source_can_be_booted(xenlab: Run, tmp_path: Path) -> None:
    path = tmp_path / "guest.s"
    path.write_text(hello(SHUTDOWN.format("poweroff")), encoding="utf-8")
    assert xenlab("boot", path).stdout == "hello\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"#!/bin/sh\n", "expected an ELF file"),
        (lambda data: b"", "expected an ELF file"),
        (lambda data: data[:60], "truncated"),
        (lambda data: data[:2000], "truncated"),
        (lambda data: data[:4] + b"\2" + data[5:], "64-bit"),
    ],
    ids=["script", "empty", "header cut", "segment cut", "64-bit"],
)
def test_bad_image_is_2(xenlab: Run, elf: Elf, damage: Callable[[bytes], bytes], message: str) -> None:
    path = elf(SPIN)
    path.write_bytes(damage(path.read_bytes()))
    result = xenlab("boot", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("xenlab: image 'kernel.elf'")
    assert message in result.stderr


@pytest.mark.parametrize("memory", [0, 961, -1])
def test_memory_out_of_range_is_2(xenlab: Run, elf: Elf, memory: int) -> None:
    result = xenlab("boot", elf(SPIN), "--memory", memory)
    assert result.exit_code == 2
    assert "1 to 960 MiB" in result.stderr


def test_image_that_does_not_fit_is_2(xenlab: Run, elf: Elf) -> None:
    result = xenlab("boot", elf(f"{SPIN}\n.space 0x200000"), "--memory", 1)
    assert result.exit_code == 2
    assert "has 1024 KiB" in result.stderr


def test_missing_image_is_2(xenlab: Run, tmp_path: Path) -> None:
    result = xenlab("boot", tmp_path / "none.elf")
    assert result.exit_code == 2
    assert "none.elf" in result.stderr


def test_mistake_in_source_is_2_with_its_line(xenlab: Run, tmp_path: Path) -> None:
    path = tmp_path / "guest.s"
    path.write_text("nop\nmovv eax, 1\n", encoding="utf-8")
    result = xenlab("boot", path)
    assert result.exit_code == 2
    assert "line 2, column 1" in result.stderr


@pytest.mark.parametrize("pae", [0, 1])
@pytest.mark.parametrize(("privileged", "by_ring"), [(False, False), (False, True), (True, False)])
def test_kernel_built_from_xens_headers(
    xenlab: Run, compile_kernel: Callable[..., Path], pae: int, privileged: bool, by_ring: bool
) -> None:
    kernel = compile_kernel("start_of_day", *["BY_RING"] * by_ring, pae=pae)
    text = "pages=8192" + " initial" * privileged
    result = xenlab("boot", kernel, "--cmdline", text, *["--privileged"] * privileged)
    assert (result.exit_code, result.stdout) == (0, f"command line: {text}\nall as promised\n"), result.stderr


@pytest.mark.parametrize("length", [1, 1024, 20_000])
def test_stdin_reaches_a_guest_through_its_ring(start: Start, compile_kernel: Callable[..., Path], length: int) -> None:
    data = b"".join(b"%d bottles\n" % number for number in range(length))[: length - 1] + b"."
    process = start("boot", compile_kernel("echo", pae=1))
    out, err = process.communicate(data, timeout=60)
    assert (process.returncode, out, err) == (0, data.upper(), b"")


def test_ring_is_shown_while_the_guest_waits(start: Start, compile_kernel: Callable[..., Path]) -> None:
    process = start("boot", compile_kernel("echo", pae=0))
    assert process.stdin is not None
    assert process.stdout is not None
    for line in (b"first\n", b"second\n"):
        process.stdin.write(line)
        process.stdin.flush()
        assert process.stdout.readline() == line.upper()
    process.stdin.write(b".")
    process.stdin.flush()
    assert ended(process)[:2] == (0, b".")


BY_RING = """
    lea edi, [esi + 8192]
    mov dword ptr [edi + 1024], 0x21676e72      # "rng!"
    mov dword ptr [edi + 3084], 4
    {end}
"""


@pytest.mark.parametrize(
    ("end", "options", "status"),
    [
        (SHUTDOWN.format("poweroff"), (), 0),
        ("ud2", (), 3),
        (SPIN, ("--max-instructions", 1000), 4),
        (f"mov ebx, SCHEDOP_block\nmov eax, __HYPERVISOR_sched_op\nint 0x82\n{SPIN}", ("--max-instructions", 1000), 4),
    ],
    ids=["ended", "crashed", "cut off", "asleep"],
)
def test_what_is_in_the_ring_at_the_end_is_shown(
    xenlab: Run, elf: Elf, end: str, options: tuple[object, ...], status: int
) -> None:
    result = xenlab("boot", elf(BY_RING.format(end=end)), *options)
    assert (result.exit_code, result.stdout) == (status, "rng!")
