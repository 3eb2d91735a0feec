# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/moved.c on the host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from guest_tool import compile_on_host


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    tool = compile_on_host("moved", tmp_path / "moved")
    return subprocess.run([tool, *words], capture_output=True, text=True, check=False, timeout=60)


def test_the_process_is_moved(tmp_path: Path) -> None:
    if not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("needs the CPUs 0 and 1")
    result = run(tmp_path, "20")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("words", [[], ["0"], ["x"], ["1", "2"]])
def test_a_wrong_command_line_is_refused(tmp_path: Path, words: list[str]) -> None:
    assert run(tmp_path, *words).returncode == 2
