# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that begins where another was saved: what a snapshot is, and how QEMU loads it."""

from __future__ import annotations

import os
import re
import select
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import GuestLostError, HostError
from paprscm.vm.argv import MemoryFile
from paprscm.vm.machine import Board, Machine
from paprscm.vm.qmp import Qmp

SEED_BYTES = 64
"""As guest_tools/warm.c wants it."""

# A restored guest answers after 0.2 s. One that does not after so long never will.
_AWAKE_LIMIT_S = 10.0
# Then the test goes on, and finds for itself which region is missing.
_REGIONS_LIMIT_S = 10.0
_LOAD_LIMIT_S = 10.0
_LINE_LIMIT = 512


class NotRestoredError(HostError):
    """The guest did not wake; it says nothing about the product, and booting it may still work."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A guest that was saved when it was ready; others begin there.

    Attributes:
        folder: its files: the guest's memory, the state of the rest of the machine, its console.
        board: of the machine that was saved; it has no DIMM.
        has_rom: as MemoryFile says.
    """

    folder: Path
    board: Board
    has_rom: bool

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
        """Return True if a machine equals the saved one except for its DIMMs, which are plugged."""
        saved = Machine()
        return board == self.board and (
            (machine.slots, machine.cmdline, machine.dimm_room_bytes)
            == (saved.slots, saved.cmdline, saved.dimm_room_bytes)
        )


def save_state(qmp: Qmp, file: Path) -> None:
    """Write the state of a machine, without its memory, to a file; the machine is stopped then.

    Its memory must be a file of its own (MemoryFile), which QEMU leaves out of the stream.

    Raises:
        HostError: QEMU cannot write it.
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
        time.sleep(0.005)


def load_state(qmp: Qmp, snapshot: Snapshot) -> None:
    """Load the state into a QEMU that was started with -incoming defer -S.

    Raises:
        NotRestoredError: QEMU does not take it.
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

    # It takes 0.1 s. QEMU 7.2 waits for ever for the rest of an empty file.
    told = qmp.execute_until(command, "MIGRATION", ended, limit_s=_LOAD_LIMIT_S, uri=uri)
    if told["status"] == "failed":
        why = qmp.execute("query-migrate").get("error-desc", "no reason given")
        raise HostError(f"QEMU's {command} failed: {why}")


class Port:
    """Our end of the port on which guest_tools/warm.c listens in the guest.

    Args:
        sock: one end of a socketpair; the other one is QEMU's. Owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = b""

    def wake(self, *, regions: int) -> None:
        """Write what the guest finds when it runs: the time, the seed, what to wait for.

        Args:
            regions: how many nvdimm regions there will be.
        """
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        limit_ms = int(_REGIONS_LIMIT_S * 1000)
        seed = os.urandom(SEED_BYTES).hex()
        line = f"wake {seconds} {nanoseconds} {regions} {limit_ms} {seed}\n"
        self._sock.sendall(line.encode())

    def awake(self, alive: Callable[[], None]) -> int:
        """Wait until its clock and seed are set and timers fire; on how many CPUs they do.

        Args:
            alive: asked meanwhile; raises if the guest is lost.

        Raises:
            NotRestoredError: it does not answer, or something of it failed.
        """
        return self._answer("awake", _AWAKE_LIMIT_S, alive)

    def regions(self, alive: Callable[[], None]) -> int:
        """Wait for the nvdimm regions; how many have their driver, all of them as a rule."""
        return self._answer("regions", _REGIONS_LIMIT_S + _AWAKE_LIMIT_S, alive)

    def close(self) -> None:
        """Close it; QEMU may be gone already."""
        self._sock.close()

    def _answer(self, word: str, limit_s: float, alive: Callable[[], None]) -> int:
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while b"\n" not in self._lines:
            if time.monotonic() >= deadline:
                raise NotRestoredError(f"the restored guest did not say '{word}' in {limit_s:g} s")
            alive()
            if not poll.poll(50):
                continue
            chunk = self._sock.recv(_LINE_LIMIT)
            if not chunk:
                alive()
                raise NotRestoredError("QEMU closed the restored guest's port")
            self._lines += chunk
            if len(self._lines) > _LINE_LIMIT:
                raise NotRestoredError(f"the restored guest says {self._lines[:60]!r}…")
        line, _, self._lines = self._lines.partition(b"\n")
        found = re.fullmatch(rb"([a-z]+) ([0-9]{1,6})", line)
        if found is None or found[1].decode() != word:
            raise NotRestoredError(f"the restored guest says {line!r}, expected '{word}'")
        return int(found[2])
