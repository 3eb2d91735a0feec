# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows of refusals: they are consistent, and a message matches its own reason only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paprscm.device.refusal_rows import GROUPS, find_row
from paprscm.device.refusals import (
    FILES,
    LIMITS,
    RefusalReason,
    filled,
    make_files,
    names_one,
    reason_patterns,
)

ROWS = [row for rows in GROUPS.values() for row in rows]


def test_names_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) > 50
    assert all(find_row(row.name) is row for row in ROWS)


def test_each_row_has_a_reason_and_each_reason_a_pattern() -> None:
    assert not [row.name for row in ROWS if not row.reasons]
    assert all(re.compile(reason.value) for reason in RefusalReason)
    assert len({reason.value for reason in RefusalReason}) == len(RefusalReason)


def test_all_placeholders_are_filled(tmp_path: Path) -> None:
    places = make_files(tmp_path)
    for words in (*(row.words for row in ROWS), *LIMITS.values()):
        filled(words, places)
    assert {Path(places[name]).stat().st_size for name in FILES} == set(FILES.values())
    assert Path(places["fifo"]).is_fifo()
    assert not Path(places["absent"]).exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-device spapr-nvdimm,slot=9: invalid slot number 9, valid range is [0-3]", "slot 9 of 4"),
        ("warning: old\nMemory hotplug not supported for this machine", "machine type pseries-2.4"),
        ('unsupported machine type: "pseries-2.4"\nUse -machine help', "machine type pseries-2.4"),
    ],
)
def test_a_message_matches_its_own_reason_only(text: str, reason: str) -> None:
    reasons = find_row(reason).reasons
    assert names_one(text, reasons)
    assert {other for other in RefusalReason if other.is_in(text)} == set(reasons)
    assert not names_one("no", reasons)


def test_reasons_in_a_report() -> None:
    assert reason_patterns([RefusalReason.NO_UUID, RefusalReason.SLOT_BUSY]) == (
        r"/NVDIMM device requires the uuid to be set/ or /slot \d+ is busy/"
    )
