# SPDX-License-Identifier: GPL-2.0-or-later
"""Client of QEMU's gdbstub, which runs a stopped machine up to an instruction.

The protocol is the GDB Remote Serial Protocol (GDB manual, appendix E); QEMU's side is
gdbstub/gdbstub.c.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from paprscm.errors import GuestLostError, HostError
from paprscm.vm.qmp import Qmp

_ANSWER_LIMIT_S = 30.0
# An interval at which the end of the guest is noticed.
_POLL_S = 0.2
_PACKET = re.compile(rb"\$([^$#]*)#([0-9a-f]{2})", re.DOTALL)


class NotReachedError(GuestLostError):
    """The machine did not execute an instruction within its limit."""


class Gdb:
    """A connection to the gdbstub of a stopped machine.

    Under TCG a breakpoint changes nothing in the guest's memory, and no vCPU executes anything
    while the machine is stopped.

    Args:
        sock: connected to the gdbstub; the caller closes it.

    Raises:
        HostError: the answer is not that of a gdbstub.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = b""
        answer = self._ask("?")
        if answer[:1] not in ("T", "S"):
            raise HostError(f"QEMU's gdbstub answers {answer!r} to '?'")

    @classmethod
    @contextlib.contextmanager
    def of(cls, qmp: Qmp, path: Path) -> Iterator[Self]:
        """Connect to a stopped QEMU. At the end of the context the machine runs.

        After an exception it stays stopped.

        Args:
            qmp: its monitor.
            path: where QEMU creates a socket.
        """
        qmp.hmp(f"gdbserver unix:{path},server=on,wait=off")
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                gdb = cls(sock)
                yield gdb
                gdb._expect_ok("D")
            # The next gdbserver replaces this one, and would lose its socket to it.
            qmp.hmp("gdbserver none")
        except OSError as error:
            raise HostError(f"QEMU's gdbstub cannot be reached: {error}") from error

    def run_to(
        self,
        address: int,
        *,
        limit_s: float,
        alive: Callable[[], object] = lambda: None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Let the machine run, and return when it has stopped before an instruction.

        Args:
            address: of the instruction, as the vCPU sees it.
            limit_s: time limit, s.
            alive: called while the machine runs; raises if the guest is lost.
            meanwhile: called once, after the machine was started.

        Raises:
            NotReachedError: no vCPU executed the instruction within the limit.
            GuestLostError: QEMU has closed the connection.
        """
        self._expect_ok(f"Z0,{address:x},4")
        self._send("c")
        meanwhile()
        deadline = time.monotonic() + limit_s
        while (answer := self._receive(_POLL_S)) is None:
            alive()
            if time.monotonic() > deadline:
                raise NotReachedError(f"no vCPU has executed {address:#x} within {limit_s:g} s")
        if not answer.startswith("T05"):
            raise GuestLostError(f"the machine stopped with {answer!r} before {address:#x}")
        self._expect_ok(f"z0,{address:x},4")

    def _expect_ok(self, command: str) -> None:
        if (answer := self._ask(command)) != "OK":
            raise HostError(f"QEMU's gdbstub answers {answer!r} to {command!r}")

    def _ask(self, command: str) -> str:
        self._send(command)
        if (answer := self._receive(_ANSWER_LIMIT_S)) is None:
            raise GuestLostError(f"QEMU's gdbstub does not answer {command!r}")
        return answer

    def _send(self, command: str) -> None:
        body = command.encode("ascii")
        try:
            self._sock.sendall(b"$%s#%02x" % (body, sum(body) & 0xFF))
        except OSError as error:
            raise GuestLostError(f"QEMU's gdbstub is gone (at {command!r})") from error

    def _receive(self, limit_s: float) -> str | None:
        """The next packet; None if there is none within the limit."""
        deadline = time.monotonic() + limit_s
        while (packet := _PACKET.search(self._received)) is None:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = self._sock.recv(4096)
            except TimeoutError:
                return None
            except OSError:
                part = b""
            if not part:
                raise GuestLostError("QEMU's gdbstub has closed the connection")
            self._received += part
        self._received = self._received[packet.end() :]
        body = packet[1]
        if sum(body) & 0xFF != int(packet[2], 16):
            raise HostError(f"a packet of QEMU's gdbstub has a wrong checksum: {packet[0]!r}")
        self._sock.sendall(b"+")
        return body.decode("ascii", "replace")
