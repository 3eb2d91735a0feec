# SPDX-License-Identifier: GPL-2.0-or-later
"""Ledger of guest_tools/promise.c in a killed guest, and the verdict over many kills."""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from paprscm.errors import ContractError, HostError
from paprscm.guest.report import ProbeError
from paprscm.host.lifetime import Lifetime
from paprscm.host.sparse import data_ranges
from paprscm.pmem.mounts import FsType
from paprscm.power_cut.sudden_end_report import PromiseReport

# guest_tools/promise.c, struct ledger, in a little-endian guest.
_MAGIC: Final = b"PAPRPROM"
_LEDGER: Final = struct.Struct("<8sQQ40xQQQQ32s")
_SMALLEST_PAGE: Final = 4096


class Phase(IntEnum):
    """Phase of the program at the kill (promise.c, enum phase)."""

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
    """State of the program (promise.c, enum state)."""

    STARTING = 0
    RUNNING = 1
    FINISHED = 2
    FAILED = 3


@dataclass(frozen=True, kw_only=True)
class LedgerCounts:
    """Contents of the ledger.

    Attributes:
        done: number of completed steps, whose data must survive.
        phase: phase of the step in progress.
        state: state of the program.
        page_size: page size of the guest, bytes.
        errno, stage: errno and name of a failed step; 0 and "" if none failed.
    """

    done: int
    phase: Phase
    state: ProgramState
    page_size: int
    errno: int
    stage: str


class Ledger(Lifetime):
    """The pages of a DIMM's backing file in which programs in the guest count their steps.

    The guest maps them with DAX, so that its stores are in this file at once, and stay there when
    QEMU ends.

    Args:
        file: the backing file, with share=on; QEMU may have it open.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._places: dict[int, int] = {}

    def _start(self) -> None:
        self._handle = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        self._resources.callback(os.close, self._handle)
        self._map = mmap.mmap(self._handle, 0, prot=mmap.PROT_READ)
        self._resources.callback(self._map.close)

    def read(self, nonce: int) -> LedgerCounts | None:
        """Return the counts of the program with this `nonce`; None: it has not begun.

        Raises:
            ProbeError: the ledger is invalid.
        """
        place = self._places.get(nonce)
        if place is None:
            place = self._find(nonce)
            if place is None:
                return None
            self._places[nonce] = place
        # The copy is not atomic. `done` is read first; the other fields do not affect the verdict.
        fields = _LEDGER.unpack_from(self._map, place)
        magic, found_nonce, page_size, done, phase, state, number, stage = fields
        try:
            if (magic, found_nonce) != (_MAGIC, nonce):
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
        header = _MAGIC + nonce.to_bytes(8, "little")
        for start, end in data_ranges(self._handle):
            for place in range(start - start % _SMALLEST_PAGE, end, _SMALLEST_PAGE):
                if self._map[place : place + len(header)] == header:
                    return place
        return None


@dataclass(frozen=True, kw_only=True)
class Side:
    """A file system, and the kind of its mappings.

    Attributes:
        slot: slot of its DIMM.
        fstype: its type.
        sync: mappings have MAP_SYNC; without, it is the control.
    """

    slot: int
    fstype: FsType
    sync: bool

    @property
    def mountpoint(self) -> str:
        """Mount point."""
        return f"/mnt/{self.slot}"

    def __str__(self) -> str:
        return f"{self.fstype} {'with' if self.sync else 'without'} MAP_SYNC"


@dataclass(kw_only=True)
class Tally:
    """Results of all cuts of one side so far.

    Attributes:
        cuts: number of cuts.
        lossy: number of cuts with lost data.
        files, pages: files and pages that had to survive.
        pages_lost: lost pages among these.
        lost: damages by kind (sudden_end_report.KINDS).
        phases: cuts by the phase of the program.
        wrong: violations, one sentence each.
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

        With MAP_SYNC no data may be lost. Without, data may be lost, but data that no process
        stored must not appear.
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
        """All fields, for the record."""
        return {**dataclasses.asdict(self), "lost": +self.lost, "phases": dict(self.phases)}


def expect_kept(tallies: Mapping[Side, Tally]) -> None:
    """Assert that all data that had to survive did, and that no other data appeared.

    Raises:
        ContractError: data were lost, or data that no process stored appeared.
    """
    if wrong := [text for tally in tallies.values() for text in tally.wrong]:
        raise ContractError("\n".join(wrong))


def underpowered(tallies: Mapping[Side, Tally]) -> list[str]:
    """Reasons why this run could not have detected lost data; empty if it could."""
    reasons = []
    for side, tally in tallies.items():
        if not tally.pages:
            reasons.append(f"{side}: no step was completed in {tally.cuts} cuts")
        elif not side.sync and not tally.lossy:
            reasons.append(
                f"{side}: nothing was lost in {tally.cuts} cuts, so the result for {side.fstype} "
                "with MAP_SYNC proves nothing"
            )
    return reasons


def require_statistical_power(tallies: Mapping[Side, Tally]) -> None:
    """Require that this run could have detected lost data.

    If the control has lost nothing, the cuts came when there was nothing to lose, and the success
    with MAP_SYNC proves nothing. That is not a PASS, not the kernel's fault (FAIL), and not a
    missing capability (CANCEL), but a failure of the suite: ERROR.

    Raises:
        HostError: a control lost nothing, or no step was completed.
    """
    if reasons := underpowered(tallies):
        raise HostError("; ".join(reasons), hint="more cuts: -p cuts=N")
