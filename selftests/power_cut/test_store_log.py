# SPDX-License-Identifier: GPL-2.0-or-later
"""Log of stores that the flush shim writes, read back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paprscm.host.cache import Cache
from paprscm.power_cut.store_log import PAGE, LogPart, StoreLog, Sync, read_log
from paprscm.vm.sync_shim import Shim, build

# Opens and maps files, and executes its arguments: "0:3=a" stores a page of letters into file 0,
# "0:3-" makes a hole there, "0!" syncs file 0.
PROGRAM = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
count = int(sys.argv[1])
handles = [os.open(name, os.O_RDWR) for name in sys.argv[2 : 2 + count]]
maps = [mmap.mmap(handle, 0) for handle in handles]
for word in sys.argv[2 + count :]:
    file = int(word[0])
    if word[1] == "!":
        libc.fdatasync(handles[file])
        continue
    page = int(word[2:-2] if "=" in word else word[2:-1])
    if word[-1] == "-":
        start, length = ctypes.c_long(page * 4096), ctypes.c_long(4096)
        assert libc.fallocate(handles[file], 3, start, length) == 0
    else:
        maps[file][page * 4096 : page * 4096 + 4096] = word[-1].encode() * 4096
"""


def page(letter: str) -> bytes:
    return letter.encode() * PAGE


class Recorder:
    """Runs the program with the shim on sparse files of 1000 pages."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = library
        self._folder = folder
        self.files = [folder / "0", folder / "1"]
        self.durations_s: list[float | None] = []

    def run(self, *words: str, fail: bool = False) -> StoreLog:
        for file in self.files:
            with file.open("wb") as handle:
                handle.truncate(1000 * PAGE)
        return read_log([self.record("log", *words, fail=fail)], self.files)

    def record(self, name: str, *words: str, fail: bool = False) -> LogPart:
        """Go on with the files as they are."""
        log = self._folder / name
        with Shim(self._library, log=log) as shim:
            watched = [shim.watch(file) for file in self.files]
            if fail:
                watched[0].fail(5)
            subprocess.run(
                [*shim.prefix(), sys.executable, "-c", PROGRAM, "2", *self.files, *words],
                pass_fds=shim.pass_fds,
                check=True,
            )
            self.durations_s = [record.duration_s for record in watched[0].records()]
        return LogPart(log)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(build(Cache(tmp_path / "cache")), tmp_path)


def test_each_sync_has_the_pages_that_changed_before_it(recorder: Recorder) -> None:
    log = recorder.run("0:3=a", "1:999=b", "0!", "0:3=c", "0:4=c", "1!", "0!", "0:3=d")
    assert list(log.pages) == [
        {(0, 3): page("a"), (1, 999): page("b")},
        {(0, 3): page("c"), (0, 4): page("c")},
        {},
        {(0, 3): page("d")},
    ]
    assert log.syncs == (
        Sync(0, 0, 0, ended=1),
        Sync(1, 1, 1, ended=2),
        Sync(2, 0, 2, ended=3),
    )


def test_a_page_that_gets_its_old_content_and_a_hole(recorder: Recorder) -> None:
    log = recorder.run("0:3=a", "0!", "0:3=b", "0:3=a", "0!", "0:3-", "0!", "0!")
    assert list(log.pages) == [{(0, 3): page("a")}, {}, {(0, 3): bytes(PAGE)}, {}, {}]


def test_a_failed_sync(recorder: Recorder) -> None:
    log = recorder.run("0:3=a", "0!", fail=True)
    assert log.syncs == (Sync(0, 0, 0, ended=1, error=5),)


def test_a_logged_sync_takes_time_on_any_disk(recorder: Recorder) -> None:
    recorder.run("0!", "0!")
    first, second = recorder.durations_s
    assert first is not None and second is not None and min(first, second) >= 0.005


def test_the_logs_of_two_processes_are_one(recorder: Recorder) -> None:
    recorder.run("0!")
    parts = [
        recorder.record("first", "0:3=a", "0:4=a", "0!", "1:5=a"),
        recorder.record("second", "0:3=b", "0:4-", "0!", "0:6=c", "1!"),
    ]
    log = read_log(parts, recorder.files)
    assert list(log.pages) == [
        {(0, 3): page("a"), (0, 4): page("a")},
        {(0, 3): page("b"), (0, 4): bytes(PAGE), (1, 5): page("a")},
        {(0, 6): page("c")},
        {},
    ]
    assert log.syncs == (Sync(0, 0, 0, ended=1), Sync(0, 0, 1, ended=2), Sync(1, 1, 2, ended=3))


def test_logging_does_not_fill_holes(recorder: Recorder) -> None:
    recorder.run("0:3=a", "0!", "0:900=b", "0!")
    assert recorder.files[0].stat().st_blocks * 512 < 100 * PAGE
    assert recorder.files[1].stat().st_blocks == 0


def test_without_a_log_nothing_is_written(tmp_path: Path) -> None:
    with Shim(build(Cache(tmp_path / "cache"))) as shim:
        assert "PAPRSCM_STORE_LOG" not in " ".join(shim.prefix())
