# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 on any process of a run, at any moment: 2 s later no QEMU of the run exists.

The exception is a short-lived helper: Avocado starts runners only to query their capabilities. If
one is killed after its answer, the run continues and ends normally.
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
# Processes whose death ends the run; for a keeper only while it has a QEMU.
HOLDERS = {"make", "avocado", "paprscm image", "runner or test", "keeper", "qemu"}
# Time limit for the rest of a run, also on a busy machine.
RUN_LIMIT_S = 120.0


def sockets(folder: Path) -> list[Path]:
    """Sockets below a folder."""
    return [path for path in folder.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]


def within(limit_s: float, holds: Callable[[], bool]) -> bool:
    """Wait for a condition; True if it holds in time."""
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
    del environment  # Made first, so that the runs find all artifacts in the cache.
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
        processes, victim = kill_one(scratch, moment_s, chance, where)
        if victim:
            killed[
                processes[victim] + (" (a guest ran)" if "qemu" in processes.values() else "")
            ] += 1
    print(f"seed {seed}: {dict(killed)}")  # noqa: T201
    with_guest = sum(count for role, count in killed.items() if "guest" in role)
    # Usually most kills do; with fewer the test would prove nothing.
    assert with_guest >= 2, f"too few kills hit a running guest: {killed}, seed {seed}"


def duration_of_a_run(folder: Path) -> float:
    """Duration of an undisturbed run on this machine now, s."""
    scratch = folder / "undisturbed"
    scratch.mkdir()
    began = time.monotonic()
    assert start(scratch, mark="").wait(RUN_LIMIT_S) == 0
    return time.monotonic() - began


def start(scratch: Path, *, mark: str) -> subprocess.Popen[bytes]:
    """Start a run of one test with a guest, in a new process group."""
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
    """Kill one process of one run, and check the result; return all processes and the victim."""
    mark = scratch.name + uuid.uuid4().hex

    def with_qemu() -> bool:
        return "qemu" in marked(mark).values()

    run = start(scratch, mark=mark)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(moment_s)
        processes = marked(mark)
        if not processes:
            # It has ended between the two lines above, or before.
            status = run.wait(RUN_LIMIT_S)
            assert status == 0, f"{where}: the run failed before it was killed"
            return {}, 0
        victim = chance.choice(sorted(processes))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        where = f"{where}: {processes[victim]} of {sorted(processes.values())}"
        if processes[victim] not in HOLDERS or (
            processes[victim] == "keeper" and "qemu" not in processes.values()
        ):
            run.wait(RUN_LIMIT_S)
        else:
            time.sleep(2.0)
        assert "qemu" not in (left := marked(mark)).values(), f"{where}; 2 s later: {left}"
        assert sockets(scratch) == [], where
        # No surviving process may start a QEMU later.
        assert not within(1.0, with_qemu), where
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGKILL)
        run.wait()
        # The keepers detect the end of `make`, and clean up.
        clean = within(2.0, lambda: not with_qemu())
        emptied = within(2.0, lambda: list(scratch.iterdir()) == [])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert clean, f"{where}: {marked(mark)}"
    # Without a QEMU there may have been no keeper yet to remove the folder.
    assert emptied or "qemu" not in processes.values(), f"{where}: {list(scratch.iterdir())}"
    return processes, victim
