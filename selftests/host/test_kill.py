# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 on any process of a run, at any moment: 2 s later there is no QEMU of it.

But for those that a run only asks something: Avocado reads what a runner can do, and one that is
killed when it has answered is not missed. Then the run goes on, and ends as any other.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import stat
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from marked import MARK, marked

from paprscm.guest.environment import Environment
from paprscm.paths import ROOT

pytestmark = pytest.mark.guest

KILLS = 20
# The processes of which each holds the run; a keeper does when it keeps a QEMU.
HOLDERS = {"make", "avocado", "paprscm image", "runner or test", "keeper", "qemu"}
# Until a run that goes on has ended, also on a machine that does other work.
RUN_LIMIT_S = 120.0


def sockets(folder: Path) -> list[Path]:
    """The sockets below a folder."""
    return [path for path in folder.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]


def within(limit_s: float, holds: Callable[[], bool]) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def test_nothing_is_left_two_seconds_after_any_kill(
    environment: Environment, tmp_path: Path
) -> None:
    """20 runs, each with one random process killed at a random moment."""
    del environment  # Made beforehand, so that the runs find everything cached.
    subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    whole_s = duration_of_a_run(tmp_path)
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)  # noqa: S311 - chance, not secrets.
    killed: Counter[str] = Counter()
    for number in range(KILLS):
        moment_s = chance.uniform(0, whole_s)
        where = f"kill {number} at {moment_s:.2f} s, seed {seed}"
        scratch = tmp_path / str(number)
        scratch.mkdir()
        there, victim = kill_one(scratch, moment_s, chance, where)
        if victim:
            killed[there[victim] + (" (a guest ran)" if "qemu" in there.values() else "")] += 1
    print(f"seed {seed}: {dict(killed)}")  # noqa: T201
    with_guest = sum(count for role, count in killed.items() if "guest" in role)
    # Most do; on a machine so slow that hardly any does, the test would prove nothing.
    assert with_guest >= 2, f"too few kills hit a running guest: {killed}, seed {seed}"


def duration_of_a_run(folder: Path) -> float:
    """How long one takes that nobody disturbs, on this machine and at this hour."""
    scratch = folder / "undisturbed"
    scratch.mkdir()
    began = time.monotonic()
    assert start(scratch, mark="").wait(RUN_LIMIT_S) == 0
    return time.monotonic() - began


def start(scratch: Path, *, mark: str) -> subprocess.Popen[bytes]:
    """A run of one test with a guest, in a process group of its own."""
    return subprocess.Popen(
        [
            *("make", "--no-print-directory", "suite"),
            f"ARGS=-p scratch_dir={scratch} --job-results-dir {scratch}-results",
            "TESTS=tests/map_sync/test_map_sync.py:TwoDimms.test_pmem_on_first_xfs",
        ],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


def kill_one(
    scratch: Path, moment_s: float, chance: random.Random, where: str
) -> tuple[dict[int, str], int]:
    """One run, one kill, and all that must hold then; who was there, and who was killed."""
    mark = scratch.name + uuid.uuid4().hex

    def with_qemu() -> bool:
        return "qemu" in marked(mark).values()

    run = start(scratch, mark=mark)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(moment_s)
        there = marked(mark)
        if not there:
            assert run.returncode == 0, f"{where}: the run failed before it was killed"
            return {}, 0
        victim = chance.choice(sorted(there))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        where = f"{where}: {there[victim]} of {sorted(there.values())}"
        if there[victim] not in HOLDERS or (
            there[victim] == "keeper" and "qemu" not in there.values()
        ):
            run.wait(RUN_LIMIT_S)
        else:
            time.sleep(2.0)
        assert "qemu" not in (left := marked(mark)).values(), f"{where}; 2 s later: {left}"
        assert sockets(scratch) == [], where
        # And none comes later, from what did not notice that it goes on alone.
        assert not within(1.0, with_qemu), where
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGKILL)
        run.wait()
        # The end of `make` is noticed by the keepers, who then clean up.
        clean = within(2.0, lambda: not with_qemu())
        emptied = within(2.0, lambda: list(scratch.iterdir()) == [])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert clean, f"{where}: {marked(mark)}"
    # Without a QEMU there may have been no keeper yet to remove the folder.
    assert emptied or "qemu" not in there.values(), f"{where}: {list(scratch.iterdir())}"
    return there, victim
