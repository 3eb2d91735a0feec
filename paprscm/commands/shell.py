# SPDX-License-Identifier: GPL-2.0-or-later
"""Interactive shell in a guest: ssh, or the serial console."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Iterator

from paprscm.errors import ConfigError
from paprscm.guest.guest import Guest

ESCAPE = b"\x1d"
"""Ctrl-], which leaves the serial console; telnet's escape."""


def require_terminal() -> None:
    """Raise unless stdin and stdout are a terminal.

    Raises:
        ConfigError: stdin or stdout is a pipe or a file.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "a shell needs a terminal", hint="without one: `paprscm shell -c COMMAND`"
        )


def connect_serial(guest: Guest) -> None:
    """Connect the keyboard with the serial console until Ctrl-] or the guest's end.

    The guest's console must have been mirrored to stdout from its boot on.
    """
    with _raw():
        guest.console.send(b"\n")
        while not guest.console.closed:
            if select.select([0], [], [], 0.2)[0]:
                keys = os.read(0, 1024)
                before, escape, _ = keys.partition(ESCAPE)
                guest.console.send(before)
                if escape or not keys:
                    return


def connect_ssh(guest: Guest) -> int:
    """Connect the terminal with a shell over ssh until it ends; return its exit status."""
    size = shutil.get_terminal_size()
    channel = guest.connect().shell(os.environ.get("TERM", "vt100"), size.columns, size.lines)

    def resize(_number: int, _frame: object) -> None:
        now = shutil.get_terminal_size()
        channel.resize_pty(now.columns, now.lines)

    before = signal.signal(signal.SIGWINCH, resize)
    try:
        with _raw(), contextlib.closing(channel):
            while True:
                ready = select.select([0, channel.fileno()], [], [])[0]
                if channel.fileno() in ready:
                    data = channel.recv(32768)
                    if not data:
                        return channel.recv_exit_status()
                    os.write(1, data)
                if 0 in ready:
                    keys = os.read(0, 1024)
                    if not keys:
                        return 0
                    channel.sendall(keys)
    finally:
        signal.signal(signal.SIGWINCH, before)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
        print()  # noqa: T201 - the shell's prompt begins on a line of its own
