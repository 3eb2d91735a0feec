# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/promise.c in a guest that is killed: what it had counted, and what that proves."""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from paprscm.errors import ContractError, HostError
from paprscm.guest.report import ProbeError
from paprscm.pmem.mounts import FsType
from paprscm.power_cut.sudden_end_report import PromiseReport

# guest_tools/promise.c, struct ledger, of a little-endian guest.
_MAGIC: Final = b"PAPRPROM"
_LEDGER: Final = struct.Struct("<8sQQ40xQQQQ32s")
_SMALLEST_PAGE: Final = 4096


class Phase(IntEnum):
    """Phase of promise when it was killed (promise.c, enum phase)."""

    NOTHING = 0
    CREATE = 1
    EXTEND = 2
    ALLOCATE = 3
    FAULT = 4
    STORE = 5
    OVERWRITE = 6
    REMOVE = 7
    SETTLE = 8


class ProgramState(IntEnum):
    """State of promise (promise.c, enum state)."""

    STARTING = 0
    RUNNING = 1
    FINISHED = 2
    FAILED = 3


@dataclass(frozen=True, kw_only=True)
class LedgerCounts:
    """Contents of the ledger.

    Attributes:
        done: steps that are promised.
        phase: of the step that is under way.
        state: of the program.
        page_size: of the guest, bytes.
        errno, stage: of the step that failed; 0 and "" if none did.
    """

    done: int
    phase: Phase
    state: ProgramState
    page_size: int
    errno: int
    stage: str


class Ledger:
    """The pages of a DIMM's backing file in which programs in the guest count their steps.

    The guest maps them with DAX, so a store of its is in this file at once, and stays there
    whatever becomes of QEMU.

    Args:
        file: the backing file; QEMU may have it open, with share=on.
    """

    def __init__(self, file: Path) -> None:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._ranges = _Data(handle)
            self._map = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
        except BaseException:
            os.close(handle)
            raise
        self._places: dict[int, int] = {}

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
        self._ranges.close()

    def read(self, nonce: int) -> LedgerCounts | None:
        """Return the counts of the program with this `nonce`; None: nothing yet.

        Raises:
            ProbeError: what is there is no ledger.
        """
        place = self._places.get(nonce)
        if place is None:
            place = self._find(nonce)
            if place is None:
                return None
            self._places[nonce] = place
        # Copied in one go, but not at one moment: done goes first, and is all that counts.
        fields = _LEDGER.unpack_from(self._map, place)
        magic, there, page_size, done, phase, state, number, stage = fields
        try:
            if (magic, there) != (_MAGIC, nonce):
                raise ValueError("it was overwritten")
            return LedgerCounts(
                done=done,
                phase=Phase(phase),
                state=ProgramState(state),
                page_size=page_size,
                errno=number,
                stage=stage.rstrip(b"\0").decode("ascii"),
            )
        except ValueError as error:
            raise ProbeError(f"the ledger cannot be believed: {error}: {fields}") from error

    def _find(self, nonce: int) -> int | None:
        wanted = _MAGIC + nonce.to_bytes(8, "little")
        for start, end in self._ranges.look():
            for place in range(start, end, _SMALLEST_PAGE):
                if self._map[place : place + len(wanted)] == wanted:
                    return place
        return None


class _Data:
    """The parts of a sparse file that hold data."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def look(self) -> Iterable[tuple[int, int]]:
        end = 0
        while True:
            try:
                start = os.lseek(self._handle, end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(self._handle, start, os.SEEK_HOLE)
            yield start - start % _SMALLEST_PAGE, end

    def close(self) -> None:
        os.close(self._handle)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One file system of its own, stored to in one way.

    Attributes:
        slot: of the DIMM that it is on.
        fstype: of the file system.
        sync: whether mappings have MAP_SYNC; without, it is the control.
    """

    slot: int
    fstype: FsType
    sync: bool

    @property
    def mountpoint(self) -> str:
        """Where it is mounted."""
        return f"/mnt/{self.slot}"

    def __str__(self) -> str:
        return f"{self.fstype} {'with' if self.sync else 'without'} MAP_SYNC"


@dataclass(kw_only=True)
class Tally:
    """Results of all cuts of one side so far.

    Attributes:
        cuts: how many there were.
        lossy: how many of them lost something.
        files, pages: that were promised.
        pages_lost: of these.
        lost: how much of each kind (promise_report.KINDS) was found.
        phases: what the program was about at the cut.
        wrong: what should not be, in words.
    """

    cuts: int = 0
    lossy: int = 0
    files: int = 0
    pages: int = 0
    pages_lost: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, side: Side, phase: Phase, report: PromiseReport) -> None:
        """Count one cut.

        With MAP_SYNC nothing may be lost; without, anything may, but even then nothing may be
        there that nobody stored.
        """
        self.cuts += 1
        self.lossy += report.lossy
        self.files += report.files
        self.pages += report.pages
        self.pages_lost += report.pages - report.intact
        self.lost.update(report.lost)
        self.phases[phase.name.lower()] += 1
        if report.strange or (side.sync and not report.kept):
            self.wrong.append(
                f"{side}, killed after {report.done} steps, at {phase.name.lower()}: {report}"
            )

    def figures(self) -> dict[str, Any]:
        """All of it, for the whiteboard."""
        return {**dataclasses.asdict(self), "lost": +self.lost, "phases": dict(self.phases)}


def expect_kept(tallies: Mapping[Side, Tally]) -> None:
    """Assert that no promise was broken.

    Raises:
        ContractError: one was, or there is what nobody stored.
    """
    if wrong := [text for tally in tallies.values() for text in tally.wrong]:
        raise ContractError("\n".join(wrong))


def underpowered(tallies: Mapping[Side, Tally]) -> list[str]:
    """Why the cuts could not have shown a broken promise; empty if they could."""
    reasons = []
    for side, tally in tallies.items():
        if not tally.pages:
            reasons.append(f"{side}: nothing was promised in {tally.cuts} cuts")
        elif not side.sync and not tally.lossy:
            reasons.append(
                f"{side}: nothing was lost in {tally.cuts} cuts, so that what {side.fstype} keeps "
                "with MAP_SYNC proves nothing"
            )
    return reasons


def require_statistical_power(tallies: Mapping[Side, Tally]) -> None:
    """Make sure that the cuts could have shown a broken promise.

    A control that has lost nothing shows that the cuts came when there was nothing to lose, and
    then the other side's success proves nothing. That is no PASS; nor is it the kernel's fault
    (FAIL), or something that was known to be missing beforehand (CANCEL). It is this machinery
    that did not do what it is for: ERROR.

    Raises:
        HostError: a control lost nothing, or nothing was promised.
    """
    if reasons := underpowered(tallies):
        raise HostError("; ".join(reasons), hint="more of them: -p cuts=")
