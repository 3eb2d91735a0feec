# SPDX-License-Identifier: GPL-2.0-or-later
"""A running Linux guest that continues at another QEMU."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from paprscm.channel.command import TimedOutError, require_valid
from paprscm.debian.toolchain import PREFIX, compile_c
from paprscm.errors import CapabilityError, ContractError
from paprscm.guest.environment import Environment
from paprscm.guest.guest import Guest
from paprscm.host.cache import Cache
from paprscm.migration.stream import DimmState, read_states
from paprscm.migration.transfer import Way, load, migrate, save
from paprscm.paths import GUEST_TOOLS
from paprscm.vm.backing_files import written_chunks
from paprscm.vm.sync_shim import Shim
from paprscm.vm.vm import Vm

# The default limit is 128 MiB/s.
_FAST: Final[Mapping[str, Any]] = {"max-bandwidth": 1 << 34}
SAME_FILES: Final = Way(name="same files", parameters=_FAST)
"""Both QEMUs have the same files behind the DIMMs."""
OTHER_FILES: Final = Way(name="other files", parameters=_FAST, contents=True)
"""The contents of the DIMMs are in the stream."""

_TOOL = "/tmp/wake"  # noqa: S108 - in the guest
_WAKE_LIMIT_S = 60.0
_MIGRATES_DECREMENTER = (8, 2)
"""The first version of QEMU that does; see known_issues/qemu-decr-not-migrated.md."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One migration of a guest.

    Attributes:
        source, destination: the two QEMUs.
        states: flush states in the stream, by DIMM; None: the stream was not read.
        downtime_s: time without a running vCPU, as the source measures it; without the time to load
            a stream that was saved first, s.
        total_s: from the start of the migration to the running destination, s.
        awake_s: from then until timers fire on all CPUs of the guest, s.
    """

    source: Vm
    destination: Vm
    states: tuple[DimmState, ...] | None
    downtime_s: float
    total_s: float
    awake_s: float

    @property
    def pending(self) -> Counter[int] | None:
        """Number of pending flushes of each DRC in the stream; None: the stream was not read."""
        if self.states is None:
            return None
        return Counter(flush.drc for state in self.states for flush in state.pending)


@dataclass(frozen=True)
class SyncedData:
    """Data that a guest has written and synced.

    Attributes:
        content: 4096 random bytes.
        place: their offset in the DIMM's backing file.
    """

    content: bytes
    place: int

    def is_in(self, file: Path) -> bool:
        """Return True if a backing file has them."""
        with file.open("rb") as stream:
            stream.seek(self.place)
            return stream.read(len(self.content)) == self.content


def write_synced(guest: Guest, slot: int, path: str) -> SyncedData:
    """Write and sync data in the guest.

    Args:
        guest: the guest.
        slot: slot of the DIMM.
        path: a file on the DIMM, or its disk, whose first bytes are overwritten.

    Raises:
        ContractError: the data are not in the backing file.
    """
    content = os.urandom(4096)
    options = "bs=4096 iflag=fullblock conv=fsync,notrunc status=none"
    require_valid(guest.run(f"dd of={path} {options}", stdin=content))
    for start, chunk in written_chunks(guest.file(slot)):
        if (place := chunk.find(content)) >= 0:
            return SyncedData(content, start + place)
    raise ContractError(f"data that were synced to {path} are not in the file of slot {slot}")


class Mover:
    """Moves one guest from QEMU to QEMU.

    If this QEMU does not restore running secondary CPUs (Snapshot.offline), the guest's are taken
    offline.

    Args:
        guest: a guest that was started with `migrates`.
        environment: its QEMU and kernel.

    Raises:
        CapabilityError: no snapshot proves that this QEMU restores a running Linux.
    """

    def __init__(self, guest: Guest, environment: Environment) -> None:
        if environment.snapshot is None:
            raise CapabilityError(
                "no snapshot proves that a Linux guest goes on in another process of this QEMU",
                hint="paprscm image makes one, unless start=cold is set",
            )
        self._guest = guest
        self._qemu = environment.qemu
        # Not compiled in the guest, which takes a second; static, so that it starts in no time.
        program = compile_c(
            Cache(environment.settings.cache_dir),
            "wake",
            [GUEST_TOOLS / "wake.c"],
            compiler=f"{PREFIX}gcc",
            flags="-O2 -Wall -Wextra -Werror -mcpu=power8 -static -s",
        )
        guest.put(program, _TOOL, mode=0o755)
        if environment.snapshot.offline:
            guest.succeed("for f in /sys/devices/system/cpu/cpu[1-9]*/online; do echo 0 > $f; done")
        self._cpus = int(guest.succeed(_TOOL))

    def successor(self, way: Way, *, folder: Path, shim: Shim | None = None) -> Vm:
        """Start the next QEMU, which waits for the guest; see Guest.successor()."""
        machine = self._guest.machine
        dimms = tuple(
            replace(dimm, holds="", file=None if way.contents else self._guest.file(dimm.slot))
            for dimm in machine.nvdimms
        )
        return self._guest.successor(replace(machine, nvdimms=dimms), folder=folder, shim=shim)

    def move(
        self, vm: Vm, way: Way, *, through_stream: bool = False, stopped: bool = False
    ) -> Move:
        """Migrate the guest to a successor; the old QEMU is killed.

        Args:
            vm: of successor(), with the same `way`.
            way: the way of the stream.
            through_stream: save the whole stream first, and load it when the guest has stopped;
                else both QEMUs are connected.
            stopped: stop the guest first, and continue it at the destination.

        Raises:
            ValueError: contents in the stream, but not stopped: under TCG, QEMU loses stores
                (known_issues/qemu-tcg-migration-loses-stores.md).
            ContractError: QEMU cannot save or load it, or does not keep its run state.
            GuestLostError: the guest does not continue.
        """
        if way.contents and not stopped:
            raise ValueError(f"{way.name} of a running guest")
        guest, source = self._guest, self._guest.vm
        states = None
        began = time.monotonic()
        with guest.moving(vm):
            if stopped:
                source.qmp.execute("stop")
            if through_stream:
                stream = save(source, way)
                states = tuple(read_states(stream))
                load(vm, stream, way)
            else:
                migrate(source, vm, way)
            state = vm.qmp.execute("query-status")["status"]
            if state != (expected := "paused" if stopped else "running"):
                raise ContractError(f"the destination is {state}, expected {expected}")
            if stopped:
                vm.qmp.execute("cont")
            downtime_ms = source.qmp.execute("query-migrate")["downtime"]
        arrived = time.monotonic()
        self._wake()
        return Move(
            source=source,
            destination=vm,
            states=states,
            downtime_s=downtime_ms / 1000,
            total_s=arrived - began,
            awake_s=time.monotonic() - arrived,
        )

    def _wake(self) -> None:
        try:
            cpus = int(self._guest.succeed(_TOOL, timeout_s=_WAKE_LIMIT_S))
        except TimedOutError as error:
            if self._qemu.version >= _MIGRATES_DECREMENTER:
                raise
            # Commands that are running would wait for their time limits.
            self._guest.kill()
            # Seen with Linux 7.2.13; wake.c starts the timers of earlier versions.
            raise CapabilityError(
                "after a migration, this kernel's timers do not fire: this QEMU does not migrate "
                "the decrementer (known_issues/qemu-decr-not-migrated.md)",
                hint="QEMU 8.2 or later does",
            ) from error
        if cpus != self._cpus:
            raise ContractError(f"timers fire on {cpus} of {self._cpus} CPUs")
