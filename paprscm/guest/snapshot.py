# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots of booted guests, and the protocol that wakes a restored guest."""

from __future__ import annotations

import os
import re
import select
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from paprscm.emulator.qmp import Qmp
from paprscm.errors import GuestLostError, HostError
from paprscm.vm.argv import MemoryFile
from paprscm.vm.machine import Board, Machine

SEED_BYTES = 64
"""Size of the random seed that guest_tools/warm.c expects."""

# A restored guest answers after 0.2 s; if it takes longer than this, it never will.
_AWAKE_LIMIT_S = 10.0
# After this the test continues, and finds the missing region itself.
_REGIONS_LIMIT_S = 10.0
_LOAD_LIMIT_S = 10.0
_LINE_LIMIT = 512


class NotRestoredError(HostError):
    """A restored guest did not wake. Not a verdict on the product; booting may still work."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Saved state of a booted guest, from which other guests are restored.

    Attributes:
        folder: its files: the guest's memory, the state of the rest of the machine, its console.
        board: the board of the saved machine, which has no DIMM.
        has_rom: see MemoryFile.
        offline: saved with its secondary CPUs offline, because this QEMU does not restore running
            ones.
    """

    folder: Path
    board: Board
    has_rom: bool
    offline: bool = False

    @property
    def memory(self) -> MemoryFile:
        """File with the initial content of the guest's memory."""
        return MemoryFile(path=self.folder / "memory", restored=True, has_rom=self.has_rom)

    @property
    def state(self) -> Path:
        """QEMU's migration stream, without the memory."""
        return self.folder / "state"

    @property
    def console(self) -> Path:
        """Console output of the guest until it was saved."""
        return self.folder / "console.log"

    def fits(self, machine: Machine, board: Board) -> bool:
        """Return True if a machine equals the saved one, apart from DIMMs, which are plugged."""
        saved = Machine()
        rest = replace(machine, nvdimms=(), smp=None, memory_mib=None, cpu=None, firmware=None)
        same_room = machine.dimm_room_bytes == saved.dimm_room_bytes
        return board == self.board and rest == saved and same_room


def save_state(qmp: Qmp, file: Path) -> None:
    """Write the state of a machine, without its memory, to a file, and leave the machine stopped.

    Its memory must be a MemoryFile, which QEMU excludes from the stream.

    Raises:
        HostError: QEMU cannot write the state.
    """
    qmp.execute("stop")
    _prepare(qmp)
    # exec:, because QEMU 7.2 has no file:. QEMU may report "completed" before cat has written all.
    draft, target = (shlex.quote(str(path)) for path in (file.with_suffix(".new"), file))
    _migrate(qmp, "migrate", f"exec:cat > {draft} && mv {draft} {target}")
    deadline = time.monotonic() + _LOAD_LIMIT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise HostError(f"QEMU's state was not written to {file} within {_LOAD_LIMIT_S:g} s")
        # The end of QEMU's child causes no event here.
        time.sleep(0.005)


def load_state(qmp: Qmp, snapshot: Snapshot) -> None:
    """Load the state into a QEMU that was started with -incoming defer -S.

    Raises:
        NotRestoredError: QEMU does not load it.
    """
    try:
        _prepare(qmp)
        _migrate(qmp, "migrate-incoming", f"exec:cat {shlex.quote(str(snapshot.state))}")
    except (GuestLostError, HostError) as error:
        raise NotRestoredError(f"QEMU does not load the snapshot: {error.message}") from error


def _prepare(qmp: Qmp) -> None:
    names = ("x-ignore-shared", "events")
    qmp.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": True} for name in names],
    )


def _migrate(qmp: Qmp, command: str, uri: str) -> None:
    def ended(data: dict[str, str]) -> bool:
        return data.get("status") in ("completed", "failed")

    # Takes 0.1 s. QEMU 7.2 waits forever for the rest of an empty file.
    result = qmp.execute_until(command, "MIGRATION", ended, limit_s=_LOAD_LIMIT_S, uri=uri)
    if result["status"] == "failed":
        reason = qmp.execute("query-migrate").get("error-desc", "no reason given")
        raise HostError(f"QEMU's {command} failed: {reason}")


class Port:
    """Our end of the port on which guest_tools/warm.c listens in the guest.

    Args:
        sock: one end of a socketpair whose other end QEMU has; the port takes ownership.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = b""

    def wake(self, *, regions: int) -> None:
        """Send the time, a random seed and the number of regions to expect.

        Args:
            regions: number of nvdimm regions.
        """
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        limit_ms = int(_REGIONS_LIMIT_S * 1000)
        seed = os.urandom(SEED_BYTES).hex()
        line = f"wake {seconds} {nanoseconds} {regions} {limit_ms} {seed}\n"
        self._sock.sendall(line.encode())

    def wait_awake(self, alive: Callable[[], None]) -> int:
        """Wait until clock and seed are set and timers fire; return the number of such CPUs.

        Args:
            alive: polled meanwhile; raises if the guest is lost.

        Raises:
            NotRestoredError: the guest does not answer, or reports a failure.
        """
        return self._answer("awake", _AWAKE_LIMIT_S, alive)

    def wait_regions(self, alive: Callable[[], None]) -> int:
        """Wait for the nvdimm regions; return how many have their driver, usually all."""
        return self._answer("regions", _REGIONS_LIMIT_S + _AWAKE_LIMIT_S, alive)

    def close(self) -> None:
        """Close the socket; QEMU may have ended already."""
        self._sock.close()

    def _answer(self, word: str, limit_s: float, alive: Callable[[], None]) -> int:
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while b"\n" not in self._lines:
            if time.monotonic() >= deadline:
                raise NotRestoredError(
                    f"the restored guest did not send '{word}' within {limit_s:g} s"
                )
            alive()
            if not poll.poll(50):
                continue
            chunk = self._sock.recv(_LINE_LIMIT)
            if not chunk:
                alive()
                raise NotRestoredError("QEMU closed the restored guest's port")
            self._lines += chunk
            if len(self._lines) > _LINE_LIMIT:
                raise NotRestoredError(f"the restored guest sent {self._lines[:60]!r}…")
        line, _, self._lines = self._lines.partition(b"\n")
        match = re.fullmatch(rb"([a-z]+) ([0-9]{1,6})", line)
        if match is None or match[1].decode() != word:
            raise NotRestoredError(f"the restored guest sent {line!r}, expected '{word}'")
        return int(match[2])
