# SPDX-License-Identifier: GPL-2.0-or-later
"""What a cell left in its folder: one results folder with a done mark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from paprscm.errors import ConfigError
from paprscm.results.files import publish
from paprscm.results.record import Record, read_record

DONE = "done.json"
"""The mark, in the cell's folder."""
CELLS = "cells"
"""Folder of the cells' folders in an output folder."""


_FORMAT = "paprscm-cell/1"
_AGAIN = "remove it, and run the cell again"


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a cell ended.

    Attributes:
        format: version of this document.
        cell: its id.
        values: its values, by axis.
        settings: its settings.
        job: folder of its job, relative to the cell's folder; "" if it was not built.
        reason: why it was not built; "" if it was.
        duration_s: its duration without what was built before, s.
    """

    format: str = _FORMAT
    cell: str
    values: dict[str, str]
    settings: dict[str, str]
    job: str
    reason: str
    duration_s: float


@dataclass(frozen=True)
class Finished:
    """A cell that has ended.

    Attributes:
        folder: its folder.
        outcome: its mark.
        record: the record of its job; None if it was not built.
    """

    folder: Path
    outcome: Outcome
    record: Record | None

    @property
    def is_fine(self) -> bool:
        """Whether it was built, and no test ended as FAIL or ERROR or was interrupted."""
        bad = {"FAIL", "ERROR", "INTERRUPTED"}
        return self.record is not None and all(t.status not in bad for t in self.record.tests)


def mark_done(folder: Path, outcome: Outcome) -> None:
    """Write the mark of a cell."""
    publish(msgspec.json.format(msgspec.json.encode(outcome), indent=2), folder / DONE)


def read_outcome(folder: Path) -> Outcome | None:
    """The mark of a cell's folder; None: it has not ended.

    Raises:
        ConfigError: the mark cannot be read, or is of another version.
    """
    try:
        outcome = msgspec.json.decode((folder / DONE).read_bytes(), type=Outcome)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{folder / DONE} cannot be read: {error}", hint=_AGAIN) from error
    if outcome.format != _FORMAT:
        raise ConfigError(f"{folder / DONE} has the format {outcome.format}", hint=_AGAIN)
    if outcome.job != Path(outcome.job).name:
        raise ConfigError(f"{folder / DONE}: {outcome.job!r} is not the name of a folder")
    return outcome


def read_finished(outputs: Iterable[Path]) -> list[Finished]:
    """The cells of output folders that have ended, in the order of their names.

    Raises:
        ConfigError: a folder holds no cell, a document cannot be read, or two folders have the
            same cell.
    """
    found: dict[str, Finished] = {}
    for output in outputs:
        folders = sorted(path.parent for path in output.glob(f"{CELLS}/*/{DONE}"))
        if not folders:
            raise ConfigError(
                f"{output} holds no cell that has ended",
                hint="give the --output of `paprscm matrix run`",
            )
        for folder in folders:
            outcome = read_outcome(folder)
            assert outcome is not None  # noqa: S101 - found by its mark
            if outcome.cell in found:
                raise ConfigError(
                    f"the cell {outcome.cell} is in {found[outcome.cell].folder} and {folder}",
                    hint="give each shard's folder once",
                )
            record = read_record(folder / outcome.job) if outcome.job else None
            found[outcome.cell] = Finished(folder, outcome, record)
    return [found[cell] for cell in sorted(found)]
