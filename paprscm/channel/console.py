# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's serial console: boot marks and a watch for kernel messages."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TextIO

import pexpect
import pexpect.fdpexpect

from paprscm import timesheet
from paprscm.channel.kmsg import Trouble, classify, text_of
from paprscm.errors import ConfigError, GuestLostError
from paprscm.settings import Settings
from paprscm.vm.argv import BASE_CMDLINE

_KEEP_LINES = 4000


class Console:
    """Reads the console in a thread, so that QEMU never blocks on it.

    Args:
        sock: our end of the socket; closed with the console.
        on_event: called in the reading thread at the first kernel message that reports a fault, and
            after QEMU has closed its end.
        allowed: kernel messages that the test expects.
        mirror: stream that receives a copy of the output; None: no copy.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_event: Callable[[], None],
        allowed: Iterable[re.Pattern[str]] = (),
        mirror: TextIO | None = None,
    ) -> None:
        self._sock = sock
        self._mirror = mirror
        self._on_event = on_event
        self.allowed = list(allowed)
        """Expected messages; may be extended while the guest runs."""
        self.trouble: Trouble | None = None
        """The first message that reports a fault, or a later fatal one."""
        self._lines: deque[tuple[float, str]] = deque(maxlen=_KEEP_LINES)
        self._count = 0
        self._last_s = time.monotonic()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="console", daemon=True)
        self._thread.start()

    @timesheet.during("waits")
    def wait_for(
        self,
        marks: Mapping[str, re.Pattern[str]],
        *,
        timeout_s: float,
        silence_s: float,
        start: int = 0,
    ) -> tuple[str, str, float] | None:
        """Wait until a line matches one of several patterns.

        Args:
            marks: patterns by name; searched in every line.
            timeout_s: time limit in total, s.
            silence_s: time limit without any output, s.
            start: number of the first line to search.

        Returns:
            The mark's name, the line and its arrival time (time.monotonic()); None when a limit was
            reached, the console is `closed` or the kernel has reported `trouble`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                first = self._count - len(self._lines)
                for when, line in list(self._lines)[max(0, start - first) :]:
                    for name, pattern in marks.items():
                        if pattern.search(line):
                            return name, line, when
                start = self._count
                now = time.monotonic()
                quiet = self._last_s + silence_s
                if self._closed or self.trouble or now >= min(deadline, quiet):
                    return None
                self._changed.wait(min(deadline, quiet) - now)

    @timesheet.during("waits")
    def settle(self, quiet_s: float = 0.3, at_most_s: float = 3.0) -> None:
        """Wait until the guest prints nothing for `quiet_s`: a call trace has many lines."""
        deadline = time.monotonic() + at_most_s
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                until = min(deadline, self._last_s + quiet_s)
                if now >= until:
                    return
                self._changed.wait(until - now)

    @property
    def closed(self) -> bool:
        """True after QEMU has closed its end."""
        return self._closed

    @property
    def lines(self) -> list[str]:
        """The last 4,000 lines so far."""
        with self._changed:
            return [line for _when, line in self._lines]

    @property
    def line_count(self) -> int:
        """Number of lines so far, and so of the next one, for wait_for()."""
        return self._count

    def restart_silence(self) -> None:
        """Count the silence of wait_for() from now on: the machine was stopped before."""
        with self._changed:
            self._last_s = time.monotonic()

    def tail(self, count: int = 20) -> str:
        """Return the last lines, or those from the trouble on, indented for a message."""
        lines = self.lines
        begin = max(0, len(lines) - count)
        if self.trouble is not None:
            at = [i for i, line in enumerate(lines) if self.trouble.text in line]
            if at and at[0] + count < len(lines):
                begin = max(0, at[0] - 2)
        part = lines[begin : begin + count]
        return "\n".join(f"    {line}" for line in part) or "    (nothing was printed)"

    def send(self, keys: bytes) -> None:
        """Send key strokes of an interactive user; commands use Guest.run()."""
        self._sock.sendall(keys)

    def close(self) -> None:
        """Stop reading; call it after QEMU has ended."""
        self._thread.join(timeout=2)
        self._sock.close()

    def _read(self) -> None:
        # Not SocketSpawn: it raises TypeError on text in pexpect 4.9.
        reader = pexpect.fdpexpect.fdspawn(
            self._sock.fileno(), encoding="utf-8", codec_errors="replace", timeout=None
        )
        reader.logfile_read = self._mirror
        while True:
            try:
                ended = reader.expect(["\n", pexpect.EOF])
            except (OSError, ValueError):
                ended = 1
            text = str(reader.before or "").rstrip("\r")
            if text or not ended:
                self._take(text)
            if ended:
                with self._changed:
                    self._closed = True
                    self._changed.notify_all()
                self._on_event()
                return

    def _take(self, line: str) -> None:
        # Control characters could manipulate the terminal on which a report is read.
        line = "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line)
        trouble = classify(line, self.allowed)
        with self._changed:
            now = time.monotonic()
            self._lines.append((now, line))
            self._count += 1
            self._last_s = now
            is_first = trouble is not None and self.trouble is None
            if is_first or (trouble is not None and trouble.fatal):
                self.trouble = trouble
            self._changed.notify_all()
        if is_first:
            self._on_event()


_MARKS = {
    "banner": re.compile(r"^(?:\[.*\])? ?Linux version "),
    "init": re.compile(r"^paprscm: init"),
    "agent": re.compile(r"^paprscm: agent"),
    "ready": re.compile(r"^paprscm: ready"),
    "failed": re.compile(r"^paprscm: failed: "),
    # Linux, init/main.c:print_kernel_cmdline; not printed under "quiet".
    "command line": re.compile(r"^(?:\[.*\])? ?Kernel command line: "),
    # Linux, kernel/module/: signing.c, main.c, version.c.
    "module": re.compile(
        r"Loading of .* is rejected$|: version magic '.*' should be '|"
        r": disagrees about version of symbol |: Unknown symbol "
    ),
}


@dataclass
class StartTimes:
    """Times at which a guest reached its marks, s after QEMU's exec; None: not reached.

    Attributes:
        banner, init, agent, ready: a boot, as the console reports it.
        restored, awake, regions: a restored guest: its state was loaded; clock, random numbers and
            timers are right; the regions of its DIMMs have their driver.
        commands: the guest takes commands.
    """

    banner: float | None = None
    init: float | None = None
    agent: float | None = None
    ready: float | None = None
    restored: float | None = None
    awake: float | None = None
    regions: float | None = None
    commands: float | None = None

    def reached(self) -> dict[str, float]:
        """Return the marks that were reached, by name."""
        return {mark: when for mark, when in vars(self).items() if when is not None}


class StuckError(GuestLostError):
    """The guest does not finish its boot, and its console shows no reason."""


def wait_until_ready(
    console: Console, times: StartTimes, *, exec_s: float, begin_s: float, settings: Settings
) -> bool:
    """Wait until the guest has booted (/init prints its mark "ready").

    Args:
        console: the guest's console.
        times: receives the time of each mark.
        exec_s: start time of QEMU (time.monotonic()).
        begin_s: time from which boot_limit_s counts.
        settings: boot_limit_s and silence_limit_s.

    Returns:
        False if the console was closed or reported trouble; the caller reports the reason.

    Raises:
        GuestLostError: /init reported a failure.
        ConfigError: the kernel ignores its command line, or refuses one of its modules.
        StuckError: a limit was reached; the message names it.
    """
    deadline = begin_s + settings.boot_limit_s
    pending = dict(_MARKS)
    while "ready" in pending:
        match = console.wait_for(
            pending,
            timeout_s=deadline - time.monotonic(),
            silence_s=settings.silence_limit_s,
        )
        if match is None:
            if console.closed or console.trouble:
                return False
            if time.monotonic() >= deadline:
                limit = f"is not up after {settings.boot_limit_s:g} s (setting boot_limit_s)"
            else:
                limit = (
                    f"printed nothing for {settings.silence_limit_s:g} s while booting "
                    "(setting silence_limit_s)"
                )
            raise StuckError(f"the guest {limit}")
        mark, line, when = match
        if mark == "failed":
            raise GuestLostError(f"the guest cannot boot: {line}\n{console.tail()}")
        if mark == "module":
            raise ConfigError(
                f"the guest's kernel refuses a module: {text_of(line)}",
                hint="set modules= to the output of `make modules_install` of the same build, with "
                "its module signatures",
            )
        if mark == "command line":
            if BASE_CMDLINE not in line:
                raise ConfigError(
                    f"the guest's kernel ignores QEMU's -append; it prints: {text_of(line)}",
                    hint="build it without CONFIG_CMDLINE_FORCE, as `paprscm kernel build` does",
                )
        else:
            setattr(times, mark, when - exec_s)
        del pending[mark]
    return True
