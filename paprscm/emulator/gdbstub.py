# SPDX-License-Identifier: GPL-2.0-or-later
"""Client of QEMU's gdbstub: stop a machine at instructions, and change registers and memory.

The protocol is the GDB Remote Serial Protocol (GDB manual, appendix E); QEMU's side is
gdbstub/gdbstub.c and target/ppc/gdbstub.c.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from paprscm.emulator.qmp import Qmp
from paprscm.errors import GuestLostError, HostError

PC: Final = 64
"""Number of the register of the next instruction (QEMU gdb-xml/power64-core.xml)."""
_ANSWER_LIMIT_S = 30.0
# An interval at which the end of the guest is noticed.
_POLL_S = 0.2
_STOP = re.compile(r"[TS][0-9a-f]{2}(?:thread:p?([0-9a-f.]+);)?.*")
_TRAP = "T05"
_PACKET = re.compile(rb"\$([^$#]*)#([0-9a-f]{2})", re.DOTALL)


class NotReachedError(GuestLostError):
    """The machine did not execute an instruction within its limit."""


class Gdb:
    """A connection to the gdbstub of a machine, which stops it.

    Under TCG a breakpoint changes nothing in the guest's memory, and no vCPU executes anything
    while the machine is stopped. Each stop costs the guest all its translated code, some 50 ms
    (gdb_vm_state_change). One thread may call interrupt() while another one is in wait().

    Args:
        sock: connected to the gdbstub; the caller closes it.

    Raises:
        HostError: the answer is not that of a gdbstub.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = b""
        self._sending = threading.Lock()
        answer = self._ask("?")
        if answer[:1] not in ("T", "S"):
            raise HostError(f"QEMU's gdbstub answers {answer!r} to '?'")

    @classmethod
    @contextlib.contextmanager
    def of(cls, qmp: Qmp, path: Path) -> Iterator[Self]:
        """Connect to a QEMU. At the end of the context, where it must be stopped, the machine runs.

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
        self.break_at(address)
        self.run()
        meanwhile()
        deadline = time.monotonic() + limit_s
        while (answer := self._receive(_POLL_S)) is None:
            alive()
            if time.monotonic() > deadline:
                raise NotReachedError(f"no vCPU has executed {address:#x} within {limit_s:g} s")
        if not answer.startswith(_TRAP):
            raise GuestLostError(f"the machine stopped with {answer!r} before {address:#x}")
        self.remove_break(address)

    def break_at(self, address: int) -> None:
        """Stop the machine before it executes the instruction at an address of the vCPU."""
        self._expect_ok(f"Z0,{address:x},4")

    def remove_break(self, address: int) -> None:
        """Remove a breakpoint."""
        self._expect_ok(f"z0,{address:x},4")

    def run(self) -> None:
        """Let the machine run; wait() returns when it stops."""
        self._send("c")

    def interrupt(self) -> None:
        """Stop the machine; without effect if it is stopped."""
        with self._sending:
            self._sock.sendall(b"\x03")

    def wait(self) -> str | None:
        """Wait until the machine stops, however long that takes.

        Returns:
            The vCPU that is at a breakpoint, for select(); None after interrupt().

        Raises:
            GuestLostError: QEMU has closed the connection.
        """
        answer = self._receive(None) or ""
        if (stop := _STOP.fullmatch(answer)) is None:
            raise GuestLostError(f"the machine stopped with {answer!r}")
        return stop[1] if answer.startswith(_TRAP) else None

    def select(self, vcpu: str) -> None:
        """Choose the vCPU whose registers are accessed."""
        self._expect_ok(f"Hg{vcpu}")

    def prepare_access(self) -> None:
        """Make single registers and real addresses accessible."""
        # QEMU reads single registers only for a client that has asked for their description.
        self._ask("qXfer:features:read:target.xml:0,fff")
        # A vCPU in user mode has no access to the kernel's effective addresses.
        self._expect_ok("Qqemu.PhyMemMode:1")

    def register(self, number: int) -> int:
        """Return a 64-bit register, 0 to 31 or PC, of a vCPU in little-endian mode."""
        return int.from_bytes(self._hex(f"p{number:x}"), "little")

    def set_register(self, number: int, value: int) -> None:
        """Change a 64-bit register."""
        self._expect_ok(f"P{number:x}={value.to_bytes(8, 'little').hex()}")

    def read(self, address: int, size: int) -> bytes:
        """Read memory at a real address."""
        return self._hex(f"m{address:x},{size:x}")

    def write(self, address: int, data: bytes) -> None:
        """Change memory at a real address."""
        self._expect_ok(f"M{address:x},{len(data):x}:{data.hex()}")

    def _hex(self, command: str) -> bytes:
        answer = self._ask(command)
        try:
            return bytes.fromhex(answer)
        except ValueError as error:
            raise HostError(f"QEMU's gdbstub answers {answer!r} to {command!r}") from error

    def _expect_ok(self, command: str) -> None:
        if (answer := self._ask(command)) != "OK":
            raise HostError(f"QEMU's gdbstub answers {answer!r} to {command!r}")

    def _ask(self, command: str) -> str:
        self._send(command)
        while (answer := self._receive(_ANSWER_LIMIT_S)) is not None:
            # QEMU before 8.1 reports unasked that the connection has stopped the machine.
            if command == "?" or _STOP.fullmatch(answer) is None:
                return answer
        raise GuestLostError(f"QEMU's gdbstub does not answer {command!r}")

    def _send(self, command: str) -> None:
        body = command.encode("ascii")
        try:
            with self._sending:
                self._sock.sendall(b"$%s#%02x" % (body, sum(body) & 0xFF))
        except OSError as error:
            raise GuestLostError(f"QEMU's gdbstub is gone (at {command!r})") from error

    def _receive(self, limit_s: float | None) -> str | None:
        """The next packet; None if there is none within the limit."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while (packet := _PACKET.search(self._received)) is None:
            left = None if deadline is None else max(0.001, deadline - time.monotonic())
            self._sock.settimeout(left)
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
        with self._sending:
            self._sock.sendall(b"+")
        return body.decode("ascii", "replace")
