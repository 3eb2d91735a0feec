# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/moved.c on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from paprscm.paths import GUEST_TOOLS

SOURCE = GUEST_TOOLS / "moved.c"


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    flags = ["-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", tmp_path / "moved", SOURCE], check=True)
    return subprocess.run(
        [tmp_path / "moved", *words], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_process_is_moved(tmp_path: Path) -> None:
    if not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("it takes the CPUs 0 and 1")
    result = run(tmp_path, "20")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("words", [[], ["0"], ["x"], ["1", "2"]])
def test_a_wrong_command_line_is_refused(tmp_path: Path, words: list[str]) -> None:
    assert run(tmp_path, *words).returncode == 2
