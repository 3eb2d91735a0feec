# SPDX-License-Identifier: GPL-2.0-or-later
"""Fault injection: the report of guest_tools/fail_nth.c, its verdict, and aim()."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from typing import cast

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.driver import fault_injection
from paprscm.driver.fault_injection import FailNthReport, expect_errors
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError, read_report

LINE = (
    '{"tool":"fail_nth","version":1,"operation":"write",'
    '"rounds":[[1,true,12,90],[2,true,0,80],[3,false,0,70]],"injected":2,"ended":true}\n'
)


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("fail_nth", tmp_path / "tool", compiler=FOR_THE_GUEST))


@pytest.mark.parametrize(
    "words",
    [[], ["read"], ["paint", "x"], ["write", "x"], ["read", "x", "y"], ["--most=0", "read", "x"]],
)
def test_a_wrong_command_line_is_refused(tmp_path: Path, words: list[str]) -> None:
    tool = compile_on_host("fail_nth", tmp_path / "tool")
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")


def test_report() -> None:
    report = read_report(FailNthReport, LINE, 0)
    assert [(one.number, one.failed, one.errno, one.duration_us) for one in report.rounds] == [
        (1, True, 12, 90),
        (2, True, 0, 80),
        (3, False, 0, 70),
    ]
    assert report.answers == {"ENOMEM": 1, "0": 1}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fail_nth", "other"),
        ('"version":1', '"version":2'),
        ("[1,true,12,90],", ""),
        ("[2,true,0,80]", "[2,true,0]"),
        ("[2,true,0,80]", "[2,false,0,80]"),
        ("[2,true,0,80]", "[2,true,-1,80]"),
        ("[2,true,0,80]", "[2,1,0,80]"),
        ("[2,true,0,80]", "[4,true,0,80]"),
        ('"injected":2', '"injected":3'),
        ('"ended":true', '"ended":false'),
        ("}", ',"more":1}'),
    ],
)
def test_contradictory_report(old: str, new: str) -> None:
    with pytest.raises(ProbeError):
        read_report(FailNthReport, LINE.replace(old, new), 0)


def test_the_exit_status_must_match() -> None:
    with pytest.raises(ProbeError):
        read_report(FailNthReport, LINE, 1)
    with pytest.raises(ProbeError):
        read_report(FailNthReport, "", 4, "fail_nth: x: 2 No such file or directory\n")


def test_verdicts() -> None:
    report = read_report(FailNthReport, LINE, 0)
    expect_errors(report, [errno.ENOMEM], optional=1)
    with pytest.raises(ContractError, match="success in spite of an injected failure: rounds"):
        expect_errors(report, [errno.ENOMEM])
    with pytest.raises(ContractError, match="unexpected errno"):
        expect_errors(report, [errno.EIO], optional=1)
    broken = read_report(FailNthReport, LINE.replace("[3,false,0,70]", "[3,false,5,70]"), 1)
    with pytest.raises(ContractError, match="errno 5 without an injected failure"):
        expect_errors(broken, [errno.ENOMEM], optional=1)
    endless = LINE.replace(
        ',[3,false,0,70]],"injected":2,"ended":true', '],"injected":2,"ended":false'
    )
    with pytest.raises(ContractError, match="no end after 2 failures"):
        expect_errors(read_report(FailNthReport, endless, 1), [errno.ENOMEM], optional=1)
    idle = LINE.replace("[1,true,12,90],[2,true,0,80],[3,false,0,70]", "[1,false,0,70]")
    with pytest.raises(HostError, match="no allocation that could fail"):
        expect_errors(
            read_report(FailNthReport, idle.replace('"injected":2', '"injected":0'), 0), []
        )


class RecordingGuest:
    """A guest with these symbols, which records its commands."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def succeed(self, command: str) -> str:
        self.commands.append(command)
        return (
            "c000000000000100 t first\nc000000000000180 t between\n--\n"
            "c000000000000200 t last\nc000000000000200 t alias\nc000000000000280 t behind\n"
            "c000000000000300 t later\n--\n"
            "c000000000000400 t kmemleak_open\nc000000000000480 T kmemleak_vmalloc\n"
            "c000000000000500 T kmemleak_free_part\n"
        )


def test_aim_covers_the_first_to_the_end_of_the_last_function() -> None:
    guest = RecordingGuest()
    fault_injection.aim(cast(Guest, guest), ("last", "first"))
    assert "debug/failslab " in guest.commands[1]
    assert "echo 0xc000000000000100 > require-start" in guest.commands[1]
    assert "echo 0xc000000000000280 > require-end" in guest.commands[1]
    assert "echo 0xc000000000000400 > reject-start" in guest.commands[1]
    assert "echo 0xc000000000000500 > reject-end" in guest.commands[1]
    with pytest.raises(HostError, match="no function nobody"):
        fault_injection.aim(cast(Guest, guest), ("first", "nobody"))
