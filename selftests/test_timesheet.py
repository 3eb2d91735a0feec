# SPDX-License-Identifier: GPL-2.0-or-later
"""Time of a test by activity: each moment counts once, nested activities and threads included."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from paprscm import timesheet
from paprscm.channel.command import TOOLS_FOLDER, counted
from paprscm.emulator.binary import Qemu
from paprscm.results.observations import read_whiteboard
from paprscm.testcase import QemuTest
from paprscm.timesheet import Timesheet


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sheet(clock: Clock) -> Timesheet:
    return Timesheet(clock)


def spent(record: dict[str, Any]) -> dict[str, float]:
    return {name: seconds for name, seconds in record["seconds"].items() if seconds}


def begun(record: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in record["counts"].items() if count}


def test_nested_activities_count_once(clock: Clock, sheet: Timesheet) -> None:
    clock.now += 1
    with sheet.during("starts"):
        clock.now += 2
        with sheet.during("waits"), sheet.during("commands"):
            clock.now += 4
    with sheet.during("commands", "tools"):
        clock.now += 8
    with sheet.during("commands"):
        clock.now += 16
        with sheet.during("commands"):
            clock.now += 32
        clock.now += 64
    clock.now += 128
    record = sheet.record()
    assert spent(record) == {"starts": 6, "tools": 8, "commands": 112, "rest": 129}
    assert begun(record) == {"starts": 1, "tools": 1, "commands": 2}


def test_threads_share_the_wall_clock(clock: Clock, sheet: Timesheet) -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with sheet.during("tools"):
            inside.set()
            leave.wait(10)

    with sheet.during("commands"):
        clock.now += 1
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(10)
        clock.now += 2
    clock.now += 4
    leave.set()
    thread.join()
    clock.now += 8
    assert spent(sheet.record()) == {"commands": 1, "tools": 6, "rest": 8}


def test_an_exception_ends_an_activity(clock: Clock, sheet: Timesheet) -> None:
    @sheet.during("waits")
    def fail() -> None:
        clock.now += 1
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^$"):
            fail()
    clock.now += 1
    assert spent(sheet.record()) == {"waits": 2, "rest": 1}


def test_a_restart_forgets(clock: Clock, sheet: Timesheet) -> None:
    with sheet.during("commands"):
        clock.now += 1
    clock.now += 1
    sheet.restart()
    assert (spent(sheet.record()), begun(sheet.record())) == ({}, {})


def test_the_cpu_time_has_that_of_ended_children() -> None:
    sheet = Timesheet()
    subprocess.run(["sh", "-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"], check=True)
    assert sheet.record()["cpu_s"] > 0.02


def test_a_command_with_a_tool_is_a_tool() -> None:
    timesheet.restart()
    for command in ("true", f"[ -x {TOOLS_FOLDER}/flush-1 ] && {TOOLS_FOLDER}/flush-1"):
        with counted(command):
            pass
    assert begun(timesheet.record()) == {"commands": 1, "tools": 1}


@pytest.mark.parametrize("fails", [False, True])
def test_a_test_records_its_own_time(tmp_path: Path, *, fails: bool) -> None:
    class Example(QemuTest):
        def find_qemu(self) -> Qemu:
            time.sleep(0.01)
            return cast(Qemu, SimpleNamespace(path="qemu"))

        def test(self) -> None:
            timesheet.pause(0.05)
            self.check("a value", 1, 2 if fails else 1)

    example = cast(Any, Example)("test", base_logdir=str(tmp_path))
    example.run_avocado()
    observed = read_whiteboard(example.whiteboard)
    assert example.status == ("FAIL" if fails else "PASS")
    assert observed.activities["waits"] >= 0.05
    assert observed.activities["set-up"] >= 0.01
    assert sum(observed.activities.values()) <= example.time_elapsed + 0.001
    assert begun({"counts": observed.counts}) == {"set-up": 1, "waits": 1}
