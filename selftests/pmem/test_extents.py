# SPDX-License-Identifier: GPL-2.0-or-later
"""Which failures of the extents tool are the known issue of punched holes."""

from __future__ import annotations

import pytest

from paprscm.errors import ContractError, HostError
from paprscm.pmem.extents import ExtentsReport

BLOCK = 65536


def make_report(step: str, at: int, expected: int = 0, found: int = 0x5A) -> ExtentsReport:
    return ExtentsReport(
        tool="extents",
        version=1,
        steps=383,
        block=BLOCK,
        done={"punch": 3, "sync": 0},
        unsupported={"punch": 0, "sync": 0},
        failure="a read returns other contents" if found != expected else "",
        step=step,
        at=at,
        expected=expected,
        found=found,
        errno=0,
    )


@pytest.mark.parametrize(
    ("step", "at", "shows"),
    [
        ("punch b 145447+720121", 3 * BLOCK, True),
        ("punch b 145447+720121", 12 * BLOCK, True),
        # The edges are zeroed, and no block of theirs is given up.
        ("punch b 145447+720121", 145447, False),
        ("punch b 145447+720121", 2 * BLOCK, False),
        ("punch b 145447+720121", 13 * BLOCK, False),
        ("punch b 145447+720121", 3 * BLOCK + 1, False),
        ("write b 145447+720121", 3 * BLOCK, False),
    ],
)
def test_only_whole_blocks_of_a_hole_are_the_known_issue(step: str, at: int, shows: bool) -> None:
    assert make_report(step, at).punch_shows_blocks is shows


@pytest.mark.parametrize(("expected", "found"), [(3, 0), (3, 0x5A), (0, 0)])
def test_only_data_in_place_of_zeros_are_the_known_issue(expected: int, found: int) -> None:
    assert not make_report("punch b 0+524288", BLOCK, expected, found).punch_shows_blocks


def test_a_failure_names_its_step() -> None:
    with pytest.raises(
        ContractError, match=r"step 383, punch b 0\+8: a read returns other contents"
    ):
        make_report("punch b 0+8", 0).expect_correct(set())


def test_an_operation_that_was_never_made_is_no_verdict() -> None:
    report = make_report("punch b 0+8", 0, found=0)
    report.expect_correct({"punch"})
    with pytest.raises(HostError, match="never made in 383 steps: sync"):
        report.expect_correct({"punch", "sync"})
