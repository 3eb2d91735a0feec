# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/persist.c, compiled and run on the host, and its reports, parsed strictly."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from paprscm.errors import ContractError
from paprscm.map_sync_report import ProbeError
from paprscm.persist import parse_persist

SOURCE = Path(__file__).resolve().parent.parent / "guest_tools" / "persist.c"
FINE = {"offset": 0, "length": 0, "byte": None, "errno": 0, "error": "", "begin_ns": 1, "end_ns": 3}
OPEN = {"step": "open", "result": 0, **FINE}
FSYNC = {"step": "fsync", "result": 0, **FINE}
EIO = {"result": None, "errno": 5, "error": "EIO"}


def line(*steps: dict[str, Any], **changes: Any) -> str:
    """A report."""
    return json.dumps({"tool": "persist", "version": 1, "steps": steps, **changes}) + "\n"


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    target = tmp_path_factory.mktemp("persist") / "persist"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", target, SOURCE], check=True)
    return target


def run(tool: Path, path: Path | str, *steps: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool, path, *steps], capture_output=True, text=True, check=False)


def test_each_step_is_made(tool: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    steps = ("write=0:100:7", "fsync", "dwrite=50:50:8", "store=10:5:9", "msync=10:5")
    steps += ("fdatasync", "syncfs", "read=0:10", "read=10:5", "read=0:100", "read=200:1")
    done = run(tool, file, *steps)
    made = parse_persist(done.stdout, done.returncode, steps, done.stderr)
    assert [step.errno for step in made] == [0] * len(steps)
    assert [step.result for step in made] == [100, 0, 50, 0, 0, 0, 0, 10, 5, 100, 0]
    assert [step.byte for step in made[-4:]] == [7, 9, None, None]
    assert file.read_bytes() == b"\7" * 10 + b"\t" * 5 + b"\7" * 35 + b"\10" * 50


def test_what_fails_is_told_and_the_rest_goes_on(tool: Path, tmp_path: Path) -> None:
    steps = ("store=0:1:1", "msync=0:1", "write=0:1:1", "read=0:1")
    file = tmp_path / "empty"
    done = run(tool, file, *steps)
    made = parse_persist(done.stdout, done.returncode, steps, done.stderr)
    # A store behind the end of a file is SIGBUS.
    assert [step.error for step in made] == ["EFAULT", "", "", ""]
    assert made[-1].byte == 1


def test_full_device(tool: Path) -> None:
    done = run(tool, "/dev/full", "write=0:1:1")
    (made,) = parse_persist(done.stdout, done.returncode, ("write=0:1:1",))
    assert (made.errno, made.error, made.result) == (28, "ENOSPC", None)


def test_a_file_that_cannot_be_opened(tool: Path, tmp_path: Path) -> None:
    done = run(tool, tmp_path / "none" / "file", "fsync")
    with pytest.raises(ContractError, match="cannot be opened: ENOENT"):
        parse_persist(done.stdout, done.returncode, ("fsync",))


@pytest.mark.parametrize(
    "step", ["sync", "write=1", "write=1:2:3:4", "fsync=1", "fsync=", "fsync=a", "read=-1:1", ","]
)
def test_steps_that_are_none(tool: Path, tmp_path: Path, step: str) -> None:
    done = run(tool, tmp_path / "file", step)
    assert (done.returncode, done.stdout) == (2, "")
    with pytest.raises(ProbeError):
        parse_persist(done.stdout, done.returncode, (step,), done.stderr)


def test_a_report() -> None:
    (step,) = parse_persist(line(OPEN, {**FSYNC, **EIO}), 0, ("fsync",))
    assert (step.errno, step.error, step.result) == (5, "EIO", None)
    assert step.duration_s == 2e-9


@pytest.mark.parametrize(
    "text",
    [
        "",
        line(),
        line(FSYNC),
        line(OPEN),
        line(OPEN, FSYNC, FSYNC),
        line(OPEN, {**FSYNC, "step": "sync"}),
        line(OPEN, {**FSYNC, "step": "fdatasync"}),
        line(OPEN, {**FSYNC, "errno": 5}),
        line(OPEN, {**FSYNC, **EIO, "error": ""}),
        line(OPEN, {**FSYNC, "result": None}),
        line(OPEN, {**FSYNC, "end_ns": 0}),
        line(OPEN, FSYNC, tool="promise"),
        line(OPEN, FSYNC, version=2),
        line(OPEN, FSYNC, more=1),
    ],
)
def test_reports_that_cannot_be_believed(text: str) -> None:
    with pytest.raises(ProbeError):
        parse_persist(text, 0, ("fsync",))


def test_the_status_must_be_that_of_a_report() -> None:
    with pytest.raises(ProbeError):
        parse_persist(line(OPEN, FSYNC), 1, ("fsync",))
