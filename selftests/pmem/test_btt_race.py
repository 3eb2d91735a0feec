# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/same_block.c on the host, its report, and call traces of a console."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le
from msgspec.structs import replace

from paprscm.channel.kmsg import spins, traces
from paprscm.errors import ContractError, HostError
from paprscm.guest.report import ProbeError, read_report
from paprscm.pmem.btt_race import (
    DONE,
    PROGRESS,
    RunningWriters,
    SameBlockReport,
    btt_sleep,
    expect_written,
    parse_writers,
)

LINE = (
    '{"tool":"same_block","version":1,"threads":2,"moves":2,"duration_ns":9,"writes":[3,4],'
    '"errno":0,"whole":true}\n'
)
FINE = SameBlockReport(
    tool="same_block",
    version=1,
    threads=2,
    writes=(3, 4),
    moves=2,
    duration_ns=9,
    errno=0,
    whole=True,
)


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("same_block", tmp_path / "tool", compiler=FOR_THE_GUEST))


def test_threads_write_a_block_and_print_their_progress(tmp_path: Path) -> None:
    tool = compile_on_host("same_block", tmp_path / "tool")
    disk, progress = tmp_path / "disk", tmp_path / "progress"
    disk.write_bytes(bytes(65536))
    progress.touch()
    words = ["--threads=3", "--seconds=1", f"--progress={progress}", str(disk)]
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    if result.returncode == 1 and '"errno":22' in result.stdout:
        pytest.skip("no O_DIRECT there")
    assert (result.returncode, result.stderr) == (0, "")
    report = read_report(SameBlockReport, result.stdout, 0)
    expect_written(report)
    assert len(report.writes) == 3
    lines = progress.read_text().splitlines()
    assert all(PROGRESS.search(line) for line in lines[:-1])
    assert DONE.search(lines[-1])
    # Each word has the thread's number, and the count of its last write.
    number, count = divmod(int.from_bytes(disk.read_bytes()[:8], "little"), 1 << 48)
    assert 0 < count <= report.writes[number - 1]


def test_progress_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tool = compile_on_host("same_block", tmp_path / "tool")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(65536))
    words = ["--seconds=1", "--progress=/dev/full", str(disk)]
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == "same_block: /dev/full: 28 ENOSPC\n"


def test_progress_is_written_without_a_seek(tmp_path: Path) -> None:
    """/dev/kmsg refuses lseek(2), and accepts one line per write(2)."""
    if shutil.which("strace") is None:
        pytest.skip("no strace")
    tool = compile_on_host("same_block", tmp_path / "tool")
    disk, progress, log = tmp_path / "disk", tmp_path / "progress", tmp_path / "strace"
    disk.write_bytes(bytes(65536))
    progress.touch()
    words = ["--seconds=1", f"--progress={progress}", str(disk)]
    calls = ["strace", "-y", "-e", "trace=write,lseek", "-o", str(log)]
    subprocess.run([*calls, tool, *words], capture_output=True, check=False)
    calls_on_file = [line for line in log.read_text().splitlines() if str(progress) in line]
    assert calls_on_file
    assert all(line.startswith("write(") and line.count("\\n") == 1 for line in calls_on_file)


@pytest.mark.parametrize("words", [[], ["--threads=0", "x"], ["--seconds=x", "x"], ["--no", "x"]])
def test_a_wrong_command_line_is_refused(tmp_path: Path, words: list[str]) -> None:
    tool = compile_on_host("same_block", tmp_path / "tool")
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")


def test_a_missing_disk_is_an_error(tmp_path: Path) -> None:
    tool = compile_on_host("same_block", tmp_path / "tool")
    result = subprocess.run(
        [tool, "--seconds=1", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    with pytest.raises(ContractError, match="errno 2"):
        expect_written(read_report(SameBlockReport, result.stdout, 1))


def test_report() -> None:
    assert read_report(SameBlockReport, LINE, 0) == FINE
    assert parse_writers(f"ended\n0\n{LINE}") == FINE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("same_block", "other"),
        ('"version":1', '"version":2'),
        ("[3,4]", "[3]"),
        ("[3,4]", "[3,-4]"),
        ('"whole":true', '"whole":1'),
        ('"errno":0,', ""),
        ("}", ',"more":1}'),
    ],
)
def test_contradictory_report(old: str, new: str) -> None:
    with pytest.raises(ProbeError):
        read_report(SameBlockReport, LINE.replace(old, new), 0)


def test_report_and_status_must_agree() -> None:
    with pytest.raises(ProbeError, match="status 139"):
        read_report(SameBlockReport, LINE, 139)
    failed = LINE.replace('"errno":0', '"errno":5')
    with pytest.raises(ProbeError, match="status 0"):
        read_report(SameBlockReport, failed, 0)
    assert read_report(SameBlockReport, failed, 1).errno == 5


def test_writers_that_still_run() -> None:
    stats = "77 (same block) 1) S 1 77\n78 (same block) 1) D 1 77\n79 (same block) 1) R 1 77\n"
    assert parse_writers(f"77\n{stats}") == RunningWriters(("D", "R"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ended\n139\n", "status 139"),
        ("ended\n\n", "status -1"),
        ("77\n77 (same_block) S 1 77\n", "no writer threads"),
        ("77\n", "no writer threads"),
        ("", "no writer threads"),
    ],
)
def test_a_tool_that_ended_without_a_report(output: str, message: str) -> None:
    with pytest.raises(ProbeError, match=rf"(?s){message}.*it said so"):
        parse_writers(output, "it said so")


def test_verdicts() -> None:
    expect_written(FINE)
    with pytest.raises(ContractError, match="torn"):
        expect_written(replace(FINE, whole=False))
    with pytest.raises(ContractError, match="errno 5"):
        expect_written(replace(FINE, errno=5))
    for idle in (replace(FINE, writes=(3, 0)), replace(FINE, moves=0)):
        with pytest.raises(HostError):
            expect_written(idle)


def test_traces() -> None:
    lines = ["a", "BUG: x", "1", "2", "BUG: y", "3"]
    assert traces(lines, re.compile("BUG")) == ["BUG: x\n1\n2", "BUG: y\n3"]
    assert traces(lines, re.compile("BUG"), length=2) == ["BUG: x\n1", "BUG: y\n3"]
    assert traces(lines, re.compile("Oops")) == []


SLEEP = """\
BUG: scheduling while atomic: dd/123/0x00000002
Call Trace:
[c00000000a1b7540] [c000000000c41e9c] schedule_timeout+0x8c/0x110
[c00000000a1b7610] [c0000000001b8be8] msleep+0x40/0x60
[c00000000a1b7640] [c00000000010f8b4] papr_scm_pmem_flush+0x94/0x150
[c00000000a1b76d0] [c0000000008a7c40] nvdimm_flush+0x50/0xa0
[c00000000a1b7820] [c0000000008b5b5c] btt_do_bvec+0x5ac/0xa10
"""


def test_btt_sleep() -> None:
    assert btt_sleep(SLEEP) == "papr_scm_pmem_flush sleeps below btt_write_pg in atomic context"
    lock = "3 locks held by dd/123:\n #2: c0 (&arena->map_locks[i].lock){+.+.}-{3:3}, at: btt\n"
    assert btt_sleep(SLEEP + lock).endswith("with the lock of the block's map entry")


@pytest.mark.parametrize("frame", ["] papr_scm_pmem_flush+", "] btt_do_bvec+"])
def test_sleep_elsewhere(frame: str) -> None:
    with pytest.raises(ContractError, match="not in a flush of the BTT"):
        btt_sleep(SLEEP.replace(frame, "] other+"))


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("NIP [c0000000000661dc] queued_spin_lock_slowpath+0x840/0xcfc", True),
        # With PPC_SPLPAR: a hcall that yields to the owner.
        (
            "NIP [c000000000079d3c] plpar_hcall_norets_notrace+0xc/0x2c\n"
            "LR [c00000000006552c] yield_to_preempted+0x38/0x4c\n"
            "[c000000005d777e0] [c0000000000662dc] queued_spin_lock_slowpath+0x940/0xcfc",
            True,
        ),
        ("[c000000005d777e0] [c0000000000662dc] queued_spin_lock_slowpath+0x940/0xcfc", True),
        # What an earlier call has left on the stack.
        (
            "NIP [c000000000079d3c] plpar_hcall_norets+0xc/0x2c\n"
            "[c000000005d777e0] [c00000000006c] queued_spin_lock_slowpath+0x9/0xc (unreliable)",
            False,
        ),
        ("NIP [c0000000000661dc] memcpy+0x840/0xcfc", False),
    ],
)
def test_spins(trace: str, expected: bool) -> None:
    assert spins(trace) is expected
