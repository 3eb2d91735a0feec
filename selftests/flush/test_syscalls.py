# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/persist.c, compiled and run on the host, and strict parsing of its reports."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from guest_tool import compile_on_host

from paprscm.errors import ContractError
from paprscm.flush import syscalls
from paprscm.flush.syscalls import HeldFile, parse_persist
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError

FINE = {"offset": 0, "length": 0, "byte": None, "errno": 0, "error": "", "begin_ns": 1, "end_ns": 3}
OPEN = {"step": "open", "result": 0, **FINE}
FSYNC = {"step": "fsync", "result": 0, **FINE}
EIO = {"result": None, "errno": 5, "error": "EIO"}


def line(*steps: dict[str, Any], **changes: Any) -> str:
    """A report."""
    return json.dumps({"tool": "persist", "version": 1, "steps": steps, **changes}) + "\n"


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("persist", tmp_path_factory.mktemp("persist") / "persist")


def run(tool: Path, path: Path | str, *steps: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool, path, *steps], capture_output=True, text=True, check=False)


def test_each_kind_of_step(tool: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    steps = (
        *("write=0:100:7", "fsync", "dwrite=50:50:8", "store=10:5:9", "msync=10:5"),
        *("fdatasync", "syncfs", "read=0:10", "read=10:5", "read=0:100", "read=200:1"),
    )
    done = run(tool, file, *steps)
    results = parse_persist(done.stdout, done.returncode, steps, done.stderr)
    assert [step.errno for step in results] == [0] * len(steps)
    assert [step.result for step in results] == [100, 0, 50, 0, 0, 0, 0, 10, 5, 100, 0]
    assert [step.byte for step in results[-4:]] == [7, 9, None, None]
    assert file.read_bytes() == b"\7" * 10 + b"\t" * 5 + b"\7" * 35 + b"\10" * 50


def test_a_failed_step_does_not_stop_the_rest(tool: Path, tmp_path: Path) -> None:
    steps = ("store=0:1:1", "msync=0:1", "write=0:1:1", "read=0:1")
    file = tmp_path / "empty"
    done = run(tool, file, *steps)
    results = parse_persist(done.stdout, done.returncode, steps, done.stderr)
    # A store beyond the end of a file is SIGBUS.
    assert [step.error for step in results] == ["EFAULT", "", "", ""]
    assert results[-1].byte == 1


def test_full_device(tool: Path) -> None:
    done = run(tool, "/dev/full", "write=0:1:1")
    (results,) = parse_persist(done.stdout, done.returncode, ("write=0:1:1",))
    assert (results.errno, results.error, results.result) == (28, "ENOSPC", None)


def test_a_file_that_cannot_be_opened(tool: Path, tmp_path: Path) -> None:
    done = run(tool, tmp_path / "none" / "file", "fsync")
    with pytest.raises(ContractError, match="cannot be opened: ENOENT"):
        parse_persist(done.stdout, done.returncode, ("fsync",))


def test_a_folder_is_opened_to_be_synced(tool: Path, tmp_path: Path) -> None:
    done = run(tool, tmp_path, "fsync", "write=0:1:1")
    results = parse_persist(done.stdout, done.returncode, ("fsync", "write=0:1:1"), done.stderr)
    assert [step.error for step in results] == ["", "EBADF"]


def test_o_dsync_needs_no_open_later(tool: Path, tmp_path: Path) -> None:
    """The descriptor with O_DSYNC is opened at the start: writes go to the old file."""
    (tmp_path / "next").write_bytes(b"\1")
    held = HeldFile(here(tool), str(tmp_path / "file"), "await", "dwrite=0:1:2")
    (tmp_path / "next").rename(tmp_path / "file")
    assert [step.error for step in held.result()] == ["", ""]
    assert (tmp_path / "file").read_bytes() == b"\1"


def here(tool: Path) -> Guest:
    """This host as a guest that runs shell commands."""

    def run(command: str) -> SimpleNamespace:
        argv = ["env", f"TMPDIR={tool.parent}", "sh", "-c", command]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        return SimpleNamespace(status=done.returncode, stdout=done.stdout, stderr=done.stderr)

    def succeed(command: str) -> str:
        done = run(command)
        assert done.status == 0, done
        return str(done.stdout).rstrip("\n")

    return cast("Guest", SimpleNamespace(run=run, succeed=succeed, tool=tool))


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the tool of this host instead of compiling it in the guest."""
    monkeypatch.setattr(syscalls, "install_tool", lambda guest, _name: guest.tool)


def test_a_held_file(tool: Path, tmp_path: Path) -> None:
    """Steps before "await" run when the object is created, later ones after go()."""
    file = tmp_path / "file"
    held = HeldFile(here(tool), str(file), "write=0:3:1", "await", "read=0:3")
    assert file.read_bytes() == b"\1\1\1"
    file.write_bytes(b"\2\2\2")
    written, waited, read = held.result()
    assert (written.result, waited.result, read.byte) == (3, 0, 2)
    assert not held.wait_blocked()
    assert written.end_ns <= waited.begin_ns <= waited.end_ns <= read.begin_ns


def test_a_held_file_that_cannot_be_opened(tool: Path, tmp_path: Path) -> None:
    held = HeldFile(here(tool), str(tmp_path / "none" / "file"), "await", "fsync")
    with pytest.raises(ContractError, match="cannot be opened: ENOENT"):
        held.result()


@pytest.mark.parametrize(
    "step", ["sync", "write=1", "write=1:2:3:4", "fsync=1", "fsync=", "fsync=a", "read=-1:1", ","]
)
def test_invalid_steps(tool: Path, tmp_path: Path, step: str) -> None:
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
def test_contradictory_reports(text: str) -> None:
    with pytest.raises(ProbeError):
        parse_persist(text, 0, ("fsync",))


def test_the_exit_status_must_match_the_report() -> None:
    with pytest.raises(ProbeError):
        parse_persist(line(OPEN, FSYNC), 1, ("fsync",))
