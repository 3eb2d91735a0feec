# SPDX-License-Identifier: GPL-2.0-or-later
"""Recorded boots of unusable kernels: each ends immediately with a clear message."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from paprscm.channel.console import Console, StartTimes, wait_until_ready
from paprscm.errors import ConfigError
from paprscm.settings import Settings

DATA = Path(__file__).parents[1] / "data"


def replay(log: str) -> tuple[bool, StartTimes, Console]:
    """Wait for a guest that prints a recorded log and then stays silent."""
    ours, theirs = socket.socketpair()
    console = Console(ours, on_event=lambda: None)
    times = StartTimes()
    theirs.sendall(log.encode())
    started = time.monotonic()
    try:
        ready = wait_until_ready(
            console, times, exec_s=started, begin_s=started, settings=Settings()
        )
    finally:
        theirs.close()
        console.close()
        assert time.monotonic() - started < 5
    return ready, times, console


def test_a_kernel_that_accepts_only_signed_modules() -> None:
    with pytest.raises(ConfigError) as caught:
        replay((DATA / "unsigned-module-6.1.log").read_text())
    assert caught.value.message == (
        "the guest's kernel refuses a module: Loading of unsigned module is rejected"
    )
    assert "modules_install" in str(caught.value.hint)


@pytest.mark.parametrize(
    "message",
    [
        "Loading of module with unavailable key is rejected",
        "xfs: version magic '6.12.9-a SMP ' should be '6.12.9-a SMP mod_unload '",
        "xfs: disagrees about version of symbol module_layout",
        "xfs: Unknown symbol iomap_readpage (err -2)",
    ],
)
def test_a_module_of_another_build(message: str) -> None:
    with pytest.raises(ConfigError, match="the guest's kernel refuses a module: "):
        replay(f"[    0.123456] {message}\r\n")


def test_a_kernel_in_its_debugger() -> None:
    """xmon prints neither Oops nor BUG, and its last line has no end."""
    ready, times, console = replay((DATA / "xmon-6.1.log").read_text().replace("ready", "wait"))
    assert not ready
    assert times.init is not None
    assert console.trouble is not None
    assert (console.trouble.kind, console.trouble.fatal) == ("xmon", True)
    assert console.trouble.text.startswith("cpu 0x0: Vector: 700 (Program Check) at [c0000000")


def test_a_kernel_that_ignores_its_command_line() -> None:
    lines = (DATA / "boot-6.12-two-dimms.log").read_text().splitlines(keepends=True)
    (at,) = (i for i, line in enumerate(lines) if "Kernel command line: " in line)
    # As recorded, and with additional words of the kernel before and after.
    replay("".join(lines))
    head, _, own = lines[at].rstrip().partition("line: ")
    replay("".join([*lines[:at], f"{head}line: nosmt {own} quiet\n", *lines[at + 1 :]]))
    lines[at] = f"{head}line: console=hvc0\n"
    with pytest.raises(ConfigError) as caught:
        replay("".join(lines))
    assert caught.value.message == (
        "the guest's kernel ignores QEMU's -append; it prints: Kernel command line: console=hvc0"
    )
    assert "CONFIG_CMDLINE_FORCE" in str(caught.value.hint)
