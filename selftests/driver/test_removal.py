# SPDX-License-Identifier: GPL-2.0-or-later
"""Verdicts about removed devices: hangs, errors, and lost slots in the backing file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from paprscm.driver import removal
from paprscm.driver.removal import RemovalReport, WorkerReport, lost_slots
from paprscm.errors import ContractError, HostError

WORKER = WorkerReport(
    kind="direct",
    other=False,
    acks=9,
    stale_loads=0,
    stale_stores=0,
    stale_writes=0,
    dropped=0,
    errors={"EIO": 1},
    slots=((3, 5),),
)
REPORT = RemovalReport(
    version=1,
    tool="removal",
    seed=1,
    rounds=1,
    hung=False,
    phase="end",
    stacks="",
    failure="",
    errno=0,
    unbind_us=(7,),
    workers=(WORKER,),
)


def changed(**fields: Any) -> RemovalReport:
    """The report with other fields of its only worker."""
    worker = msgspec.structs.replace(WORKER, **fields)
    return msgspec.structs.replace(REPORT, workers=(worker,))


def test_a_report_without_faults_is_correct() -> None:
    REPORT.expect_correct(1)


@pytest.mark.parametrize(
    ("report", "kind", "text"),
    [
        (msgspec.structs.replace(REPORT, hung=True), ContractError, "hangs"),
        (msgspec.structs.replace(REPORT, failure="bind", errno=5), ContractError, "errno 5"),
        (changed(other=True), ContractError, "another DIMM"),
        (changed(errors={}), HostError, "ended"),
        (changed(acks=0), HostError, "made 0 calls"),
    ],
)
def test_faults_are_named(report: RemovalReport, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        report.expect_correct(1)


@pytest.mark.parametrize(("version", "lost"), [(2, 1), (3, 0), (4, 0), (5, 0), (6, 1)])
def test_a_slot_has_the_acknowledged_version_or_a_later_one(
    tmp_path: Path, version: int, lost: int
) -> None:
    file = tmp_path / "dimm"
    file.write_bytes(bytes(4096) + b"".join(removal._words(0, version)))
    assert len(lost_slots(file, 4096, REPORT, [0])) == lost


def test_one_wrong_word_is_a_lost_slot(tmp_path: Path) -> None:
    file = tmp_path / "dimm"
    words = removal._words(0, 3)
    file.write_bytes(b"".join([*words[:-1], bytes(8)]))
    assert len(lost_slots(file, 0, REPORT, [0])) == 1
