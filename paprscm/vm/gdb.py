# SPDX-License-Identifier: GPL-2.0-or-later
"""Client of QEMU's gdbstub: stop a guest's CPUs at instructions, and change registers and memory.

The protocol is described in GDB's manual, "Remote Serial Protocol"; QEMU's side is
gdbstub.c (gdbstub/ since 8.1) and target/ppc/gdbstub.c.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from paprscm.errors import GuestLostError, HostError
from paprscm.vm.vm import Vm

PC: Final = 64
"""Number of the register of the next instruction (QEMU gdb-xml/power64-core.xml)."""
_LIMIT_S = 30.0
_STOP = re.compile(rb"[TS]([0-9a-f]{2})(?:.*thread:p?([0-9a-f.]+);)?")
_TRAP = 5


@dataclass(frozen=True)
class Stop:
    """A CPU of the guest that stopped all others.

    Attributes:
        thread: the CPU's number for the gdbstub, from "1" on.
        at_breakpoint: it stopped at an instruction, and not because of interrupt().
    """

    thread: str
    at_breakpoint: bool


class Gdb:
    """Connection to the gdbstub of a running QEMU; a context manager.

    The guest is stopped when the connection is made, must be stopped when it is closed, and then
    runs on. A stop is a stop of QEMU's machine, so its disks are flushed (softmmu/cpus.c,
    do_vm_stop).

    Args:
        vm: the QEMU.
        little_endian: byte order of the registers, which is that of the guest's current mode.

    Raises:
        HostError: QEMU has no gdbstub, or it does not answer.
    """

    def __init__(self, vm: Vm, *, little_endian: bool = True) -> None:
        self._vm = vm
        self._order: Literal["little", "big"] = "little" if little_endian else "big"
        self._buffer = b""
        self._sending = threading.Lock()

    def __enter__(self) -> Gdb:
        path = self._vm.scratch / "gdb"
        answer = self._vm.qmp.hmp(f"gdbserver unix:{path},server=on,wait=off")
        with contextlib.ExitStack() as undo:
            undo.callback(path.unlink, missing_ok=True)
            undo.callback(self._end)
            self._socket = undo.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.settimeout(_LIMIT_S)
            self._connect(path, answer)
            self._ask("QStartNoAckMode")
            # QEMU reads single registers only for a client that has asked for their description.
            self._ask("qXfer:features:read:target.xml:0,fff")
            # A CPU in user mode has no access to the kernel's effective addresses.
            self._expect_ok("Qqemu.PhyMemMode:1")
            undo.callback(self._detach)
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _connect(self, path: Path, answer: str) -> None:
        try:
            self._socket.connect(str(path))
        except OSError as error:
            raise HostError(f"QEMU's gdbstub is not there: {answer.strip() or error}") from error

    def _end(self) -> None:
        """Remove the gdbstub, which keeps its breakpoints; the guest runs on."""
        with contextlib.suppress(GuestLostError):
            self._vm.qmp.hmp("gdbserver none")
            self._vm.qmp.execute("cont")

    def _detach(self) -> None:
        """Remove the breakpoints; the guest must be stopped."""
        with contextlib.suppress(GuestLostError, OSError):
            self._expect_ok("D")

    def break_at(self, address: int) -> None:
        """Stop the guest before it executes the instruction at an effective address."""
        self._expect_ok(f"Z0,{address:x},4")

    def remove_break(self, address: int) -> None:
        """Remove a breakpoint."""
        self._expect_ok(f"z0,{address:x},4")

    def run(self) -> None:
        """Let the guest run; wait() returns when it stops."""
        self._send("c")

    def interrupt(self) -> None:
        """Stop the running guest; another thread may be in wait()."""
        with self._sending:
            self._socket.sendall(b"\x03")

    def wait(self) -> Stop:
        """Wait until the guest stops, however long that takes.

        Raises:
            GuestLostError: QEMU has ended.
        """
        packet = self._packet(None)
        match = _STOP.match(packet)
        if match is None:
            raise HostError(f"QEMU's gdbstub sent {packet!r} instead of a stop")
        return Stop((match[2] or b"1").decode(), int(match[1], 16) == _TRAP)

    def select(self, thread: str) -> None:
        """Choose the CPU whose registers are accessed."""
        self._expect_ok(f"Hg{thread}")

    def register(self, number: int) -> int:
        """Return a 64-bit register: 0 to 31, or PC."""
        return int.from_bytes(bytes.fromhex(self._ask(f"p{number:x}")), self._order)

    def set_register(self, number: int, value: int) -> None:
        """Change a 64-bit register: 0 to 31, or PC."""
        data = value.to_bytes(8, self._order)
        self._expect_ok(f"P{number:x}={data.hex()}")

    def read(self, address: int, size: int) -> bytes:
        """Read memory of the guest at a real address."""
        return bytes.fromhex(self._ask(f"m{address:x},{size:x}"))

    def write(self, address: int, data: bytes) -> None:
        """Change memory of the guest at a real address."""
        self._expect_ok(f"M{address:x},{len(data):x}:{data.hex()}")

    def _expect_ok(self, text: str) -> None:
        if (answer := self._ask(text)) != "OK":
            raise HostError(f"QEMU's gdbstub answers {answer!r} to {text!r}")

    def _ask(self, text: str) -> str:
        self._send(text)
        answer = self._packet(_LIMIT_S).decode()
        # The stop by the connection itself, which QEMU before 8.1 reports unasked.
        while _STOP.fullmatch(answer.encode()):
            answer = self._packet(_LIMIT_S).decode()
        if re.fullmatch(r"E[0-9a-f]{2}", answer):
            raise HostError(f"QEMU's gdbstub answers {answer} to {text!r}")
        return answer

    def _send(self, text: str) -> None:
        data = text.encode()
        with self._sending:
            self._socket.sendall(b"$%s#%02x" % (data, sum(data) % 256))

    def _packet(self, limit_s: float | None) -> bytes:
        """Return the next packet's content; its checksum adds nothing on a local socket."""
        self._socket.settimeout(limit_s)
        for data in self._received():
            if match := re.match(rb"[^$]*\$([^#]*)#..", data, re.DOTALL):
                self._buffer = data[match.end() :]
                return match[1]
        raise GuestLostError("QEMU's gdbstub has closed the connection")

    def _received(self) -> Iterator[bytes]:
        """Everything that has arrived and is not consumed, again after each arrival."""
        yield self._buffer
        while True:
            try:
                data = self._socket.recv(65536)
            except TimeoutError as error:
                raise GuestLostError(
                    f"QEMU's gdbstub did not answer within {_LIMIT_S:g} s"
                ) from error
            if not data:
                return
            self._buffer += data
            yield self._buffer
