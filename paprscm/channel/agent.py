# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands in the guest through guest_tools/agent.c, on a virtio-serial port.

A command takes a fifth of the time that an ssh channel takes under TCG, and a guest needs no
connection first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from paprscm.channel.command import CommandResult, TimedOutError, indented, short
from paprscm.errors import GuestLostError, HostError

_HEADER = struct.Struct(">cII")
_CHUNK = 1 << 15
# The agent answers with no more than it was sent, or than fits into its buffer.
_MOST_PAYLOAD = 1 << 20
_TAKE_LIMIT_S = 10.0


@dataclass
class _Running:
    """A command in progress: its output so far, and its exit code when it has ended."""

    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    status: int | None = None
    errno: int = 0
    changed: threading.Event = field(default_factory=threading.Event)


def _frame(kind: bytes, number: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, number, len(payload)) + payload


def _chunks(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))


class Agent:
    """Our end of the agent's port; commands may run concurrently, from several threads.

    Args:
        sock: one end of a socketpair; the other one is QEMU's. Owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._running: dict[int, _Running] = {}
        self._count = 0
        self._lost = ""
        threading.Thread(target=self._read, name="agent", daemon=True).start()

    def run(
        self, command: str, *, stdin: bytes = b"", timeout_s: float, alive: Callable[[], None]
    ) -> CommandResult:
        """Run a command by the guest's /bin/sh and wait for its end.

        Args:
            command: one or several lines of shell.
            stdin: its standard input.
            timeout_s: its limit.
            alive: raises if the guest was lost meanwhile.

        Raises:
            TimedOutError: it did not end in time.
            GuestLostError: the port was closed.
            HostError: the guest could not start a shell.
        """
        started = time.monotonic()
        # With something behind it the shell does not exec the last command, and so turns its death
        # by signal n into the status 128 + n.
        with self._begun() as (number, running):
            frames = [
                _frame(b"r", number, f"{command}\nexit $?".encode()),
                *(_frame(b"i", number, chunk) for chunk in _chunks(stdin)),
                _frame(b"i", number),
            ]
            self._send(b"".join(frames), started + timeout_s)
            ended = running.changed.wait(started + timeout_s - time.monotonic())
        if not ended:
            alive()
            raise TimedOutError(
                f"`{short(command)}` did not end within {timeout_s:g} s; its output so far:\n"
                f"{indented(running.out + running.err)}"
            )
        if running.errno:
            raise HostError(f"the guest cannot start a shell: {os.strerror(running.errno)}")
        if running.status is None:
            alive()
            raise GuestLostError(f"lost the guest in `{short(command)}`: {self._lost}")
        return CommandResult(
            command=command,
            # Below 0: the shell itself was killed.
            status=running.status if running.status >= 0 else 255,
            stdout=running.out.decode(errors="replace"),
            stderr=running.err.decode(errors="replace"),
            stdout_bytes=bytes(running.out),
            duration_s=time.monotonic() - started,
        )

    def answers(self, timeout_s: float) -> bool:
        """Return True if the agent answers within `timeout_s`."""
        with self._begun() as (number, running):
            self._send(_frame(b"h", number), time.monotonic() + timeout_s)
            return running.changed.wait(timeout_s) and not self._lost

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Send nothing inside, after the guest has taken what was sent; commands continue.

        Raises:
            HostError: the guest does not take it.
        """
        with self._sending:
            deadline = time.monotonic() + _TAKE_LIMIT_S
            while fcntl.ioctl(self._sock, termios.TIOCOUTQ, b"\0" * 4) != b"\0" * 4:
                if time.monotonic() > deadline:
                    raise HostError("the guest's agent does not take its commands")
                # A socket that the other end has emptied causes no event.
                time.sleep(0.001)
            yield

    def close(self) -> None:
        """Hang up; callers that wait for the end of a command are woken."""
        self._lose("the port was closed")
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._sending:
            # The reader's file keeps the descriptor until it has come to the end.
            self._sock.close()

    @contextlib.contextmanager
    def _begun(self) -> Iterator[tuple[int, _Running]]:
        with self._lock:
            self._count += 1
            number, running = self._count, _Running()
            self._running[number] = running
            if self._lost:
                running.changed.set()
        try:
            yield number, running
        finally:
            with self._lock:
                del self._running[number]

    def _send(self, frames: bytes, deadline: float) -> None:
        """Send frames; a guest that takes them too slowly, or not at all, is for the caller."""
        rest = memoryview(frames)
        with contextlib.suppress(OSError), self._sending:
            if self._lost:
                return
            poll = select.poll()
            poll.register(self._sock, select.POLLOUT)
            while rest and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self._sock.send(rest, socket.MSG_DONTWAIT) :]

    def _read(self) -> None:
        try:
            with self._sock.makefile("rb") as stream:
                while header := stream.read(_HEADER.size):
                    kind, number, length = _HEADER.unpack(header)
                    if length > _MOST_PAYLOAD:
                        raise ValueError(f"a frame of {length} bytes")
                    self._take(kind, number, stream.read(length))
            self._lose("QEMU closed the port")
        except (OSError, ValueError, struct.error) as error:
            # What comes from a guest is not trusted.
            self._lose(f"the agent's port: {error}")

    def _take(self, kind: bytes, number: int, payload: bytes) -> None:
        with self._lock:
            running = self._running.get(number)
        if running is None:
            # It had timed out.
            return
        if kind == b"o":
            running.out += payload
        elif kind == b"e":
            running.err += payload
        elif kind == b"x":
            running.status = os.waitstatus_to_exitcode(*struct.unpack(">i", payload))
            running.changed.set()
        elif kind == b"f":
            (running.errno,) = struct.unpack(">I", payload)
            running.changed.set()
        elif kind == b"h":
            running.changed.set()
        else:
            raise ValueError(f"a frame of kind {kind!r}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            self._lost = self._lost or reason
            for running in self._running.values():
                running.changed.set()
