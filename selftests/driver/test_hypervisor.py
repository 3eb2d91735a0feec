# SPDX-License-Identifier: GPL-2.0-or-later
"""The buffer of statistics, and the report of guest_tools/nd_pmu.c."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.driver.hypervisor import STATISTIC, STATISTICS_HEADER, PmuReport, statistics
from paprscm.guest.report import ProbeError, read_report

LINE = '{"tool":"nd_pmu","version":1,"results":[[0,0],[0,3],[22,0]]}\n'


def test_the_buffer_of_statistics_is_big_endian() -> None:
    buffer = statistics({"MemLife ": 99, "CtlResCt": 1 << 40})
    assert buffer.hex(" ", 8) == (
        "53434d5354415453 0000000100000002 4d656d4c69666520 0000000000000063 "
        "43746c5265734374 0000010000000000"
    )
    assert len(buffer) == STATISTICS_HEADER.size + 2 * STATISTIC.size


def test_a_count_may_be_wrong() -> None:
    assert statistics({"MemLife ": 1}, count=9)[12:16] == bytes([0, 0, 0, 9])


def test_nd_pmu_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("nd_pmu", tmp_path / "tool", compiler=FOR_THE_GUEST))


@pytest.mark.parametrize(
    "words",
    [
        *([], ["1", "2"], ["x", "2", "0", "read"], ["1", "2", "-1"], ["1", "2", "0", "paint"]),
        *(["1", "2", "0", "write=x"], ["1", "2", "0", "read", "write"]),
    ],
)
def test_a_wrong_command_line_is_refused(tmp_path: Path, words: list[str]) -> None:
    tool = compile_on_host("nd_pmu", tmp_path / "tool")
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")


def test_report() -> None:
    assert read_report(PmuReport, LINE, 0).results == ((0, 0), (0, 3), (22, 0))


@pytest.mark.parametrize(
    ("old", "new"),
    [("nd_pmu", "other"), ("[0,3]", "[0]"), ("[0,3]", "[0,-3]"), ("[22,0]", '["EINVAL",0]')],
)
def test_contradictory_report(old: str, new: str) -> None:
    with pytest.raises(ProbeError):
        read_report(PmuReport, LINE.replace(old, new), 0)
