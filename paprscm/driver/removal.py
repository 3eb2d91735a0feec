# SPDX-License-Identifier: GPL-2.0-or-later
"""Drivers that are unbound during I/O in the guest, by guest_tools/removal.c, and the result."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from paprscm import timesheet
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, Natural, ToolReport, check_report, mix, read_report
from paprscm.guest.tools import run_tool
from paprscm.papr import drc_index

Kind = Literal["fdatasync", "direct", "dsync", "msync", "store", "open"]

# guest_tools/removal.c.
_STRIDE: Final = 65536
_SLOT: Final = 8192
_WORKER: Final = 2 << 20
# Time for the whole program to end, in addition to the limit of one phase: a host may be busy.
_MARGIN_S: Final = 150
_PHASE_S: Final = 40
# Duration for which an unbind is observed to wait, and the limit for its end on a busy host.
_HELD_S: Final = 0.5
_SOON_S: Final = 60

ND: Final = "/sys/bus/nd/drivers"
PLATFORM: Final = "/sys/bus/platform/drivers/papr_scm"


class WorkerReport(Fields, frozen=True, kw_only=True):
    """One worker in all rounds.

    Attributes:
        kind: its calls.
        other: its device was never removed.
        acks: number of calls that promised durability and succeeded.
        stale_loads, stale_stores: accesses through a mapping of a removed device that succeeded.
        stale_writes: durable writes through a descriptor of a removed device that succeeded.
        dropped: number of rounds whose last acknowledged call, through the page cache, had lost its
            data when the device was there again.
        errors: number of the errors that ended the worker, by name; EFAULT for a SIGBUS.
        slots: for each slot, the last acknowledged version, and the last one that was tried.
    """

    kind: Kind
    other: bool
    acks: Natural
    stale_loads: Natural
    stale_stores: Natural
    stale_writes: Natural
    dropped: Natural
    errors: dict[str, Natural]
    slots: tuple[tuple[Natural, Natural], ...]

    def __post_init__(self) -> None:
        check_report(all(acked <= tried for acked, tried in self.slots), f"slots {self.slots}")


class RemovalReport(ToolReport, frozen=True, kw_only=True):
    """All rounds.

    Attributes:
        seed: of the random moments and slots.
        rounds: complete ones.
        hung: a phase did not end.
        phase: the last one.
        stacks: kernel stacks of all threads, if it hung.
        failure: what was wrong; "" if nothing was.
        errno: of a step that failed.
        unbind_us: duration of each unbind.
        workers: in the order of the command line, those on other devices first.
    """

    tool: Literal["removal"]
    seed: Natural
    rounds: Natural
    hung: bool
    phase: str
    stacks: str
    failure: str
    errno: Natural
    unbind_us: tuple[Natural, ...]
    workers: tuple[WorkerReport, ...]

    def __post_init__(self) -> None:
        check_report(len(self.unbind_us) == self.rounds, f"{self.rounds} rounds, {self.unbind_us}")

    @property
    def exit_status(self) -> int:
        return int(self.hung or self.failure != "")

    @property
    def outcome(self) -> str:
        """A hang or failure as text; "" if there was none."""
        if self.hung:
            return f"round {self.rounds + 1}, {self.phase} hangs; kernel stacks:\n{self.stacks}"
        if self.failure:
            return f"round {self.rounds + 1}, {self.phase}: {self.failure} (errno {self.errno})"
        return ""

    def expect_correct(self, rounds: int) -> None:
        """Assert that no call hung, each removed worker got an error, and each other one got none.

        Raises:
            ContractError: one of this is wrong, or acknowledged data are lost.
            HostError: the report contradicts itself.
        """
        if self.outcome:
            raise ContractError(self.outcome)
        if self.rounds != rounds:
            raise HostError(f"{self.rounds} rounds, not {rounds}")
        for worker in self.workers:
            if worker.other and worker.errors:
                raise ContractError(f"{worker.kind} on another DIMM fails: {worker.errors}")
            if not worker.other and sum(worker.errors.values()) != rounds:
                raise HostError(f"{worker.kind} ended {worker.errors} in {rounds} rounds")
            if worker.acks < rounds:
                raise HostError(f"{worker.kind} made {worker.acks} calls in {rounds} rounds")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One thread of guest_tools/removal.c.

    Attributes:
        kind: its calls.
        path: a file, or the pattern of a device in sysfs.
        number: distance from the start of the device or file, in units of 2 MiB.
    """

    kind: Kind
    path: str
    number: int = 0

    @property
    def offset(self) -> int:
        """The offset of its first slot, bytes."""
        return self.number * _WORKER

    @property
    def argument(self) -> str:
        """Its word on the command line."""
        return f"{self.kind}:{self.offset}:{self.path}"


def platform_device(slot: int) -> str:
    """Name of the platform device of the DIMM in a slot."""
    return f"ibm,persistent-memory:ibm,pmemory@{drc_index(slot):x}"


def disk_pattern(slot: int, parent: Literal["namespace", "pfn"]) -> str:
    """The only disk of a DIMM, whatever the numbers of its region and namespace are."""
    return f"{drc_index(slot):x}/{parent}*/block/*"


def dax_pattern(slot: int) -> str:
    """The only devdax device of a DIMM."""
    return f"{drc_index(slot):x}/dax*/dax*.*"


def remove(
    guest: Guest,
    driver: str,
    device: str,
    workers: Sequence[Worker],
    *,
    rounds: int,
    seed: int,
    others: Sequence[Worker] = (),
    mount: str | None = None,
) -> RemovalReport:
    """Unbind a driver during I/O and bind it again, several times.

    Args:
        guest: the guest.
        driver: its folder in sysfs.
        device: name of the device.
        workers: threads whose device goes.
        rounds: number of removals.
        seed: of the random moments and slots.
        others: threads whose device stays.
        mount: type, folder and disk pattern of the workers' file system, with colons between.

    Raises:
        ProbeError: the tool failed, or its report cannot be believed.
    """
    words = [
        f"--driver={driver}",
        f"--device={device}",
        f"--rounds={rounds}",
        f"--seed={seed}",
        f"--limit={_PHASE_S}",
        *(f"--other={worker.argument}" for worker in others),
        *([f"--mount={mount}"] if mount else []),
        *(worker.argument for worker in workers),
    ]
    result = run_tool(guest, "removal", words, timeout_s=_MARGIN_S + _PHASE_S)
    return read_report(RemovalReport, result.stdout, result.status, result.stderr)


class BackgroundUnbind:
    """An unbind through sysfs that may wait for I/O in flight.

    Args:
        guest: the guest.
        driver: its folder in sysfs.
        device: name of the device.
    """

    def __init__(self, guest: Guest, driver: str, device: str) -> None:
        self._guest = guest
        self._status = guest.succeed(
            f"folder=$(mktemp -d) && echo $folder/status\n"
            f"(echo {device} > {driver}/unbind; echo $? > $folder/new; "
            "mv $folder/new $folder/status) > /dev/null 2>&1 < /dev/null &"
        )

    def ends_early(self) -> bool:
        """Return True if it ends while it is observed, for half a second."""
        with timesheet.during("waits"):
            # An unbind that is still waiting signals nothing.
            time.sleep(_HELD_S)
        return self._guest.run(f"[ -e {self._status} ]").status == 0

    def wait(self) -> str:
        """Wait for its end; return the exit status of the write to sysfs."""
        return self._guest.wait_until(f"cat {self._status}", timeout_s=_SOON_S)


def lost_slots(
    file: Path, begin: int, report: RemovalReport, offsets: Sequence[int | None]
) -> list[str]:
    """Compare the slots of workers with the backing file; return a line for each wrong one.

    Args:
        file: the backing file.
        begin: offset of the device in it, bytes.
        report: of the rounds.
        offsets: for each worker of the report, the offset of its first slot in the device, bytes;
            None: the worker is on another device.
    """
    wrong = []
    with file.open("rb") as data:
        for number, (worker, offset) in enumerate(zip(report.workers, offsets, strict=True)):
            if offset is None:
                continue
            for slot, (acked, tried) in enumerate(worker.slots):
                place = begin + offset + slot * _STRIDE
                content = os.pread(data.fileno(), _SLOT, place)
                if not _is_version(content, number << 8 | slot, range(acked, tried + 1)):
                    wrong.append(
                        f"{worker.kind}, slot {slot} at {place:#x}: version {acked} is "
                        f"acknowledged, {tried} was tried, the file begins {content[:16].hex()}"
                    )
    return wrong


def _is_version(content: bytes, place: int, versions: range) -> bool:
    """True if each word is that of one of the versions."""
    expected = [_words(place, version) for version in versions]
    return all(
        any(content[8 * i : 8 * i + 8] == words[i] for words in expected) for i in range(_SLOT // 8)
    )


def _words(place: int, version: int) -> list[bytes]:
    """Contents of a slot, as in guest_tools/removal.c."""
    key = place << 48 | version << 16
    return [mix(key + i).to_bytes(8, "little") for i in range(_SLOT // 8)]
