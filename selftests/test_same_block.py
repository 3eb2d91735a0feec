# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/same_block.c on the host, its report, and call traces taken from a console."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from paprscm.errors import ContractError, HostError
from paprscm.map_sync_report import ProbeError
from paprscm.same_block import (
    DONE,
    PROGRESS,
    SameBlock,
    btt_sleep,
    expect_written,
    parse_same_block,
    traces,
)

SOURCE = Path(__file__).resolve().parent.parent / "guest_tools" / "same_block.c"
FINE = SameBlock(writes=(3, 4), moves=2, duration_ns=9, errno=0, whole=True)
LINE = (
    '{"tool":"same_block","version":1,"threads":2,"moves":2,"duration_ns":9,"writes":[3,4],'
    '"errno":0,"whole":true}\n'
)


def compiled(compiler: str, target: Path) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    flags = ["-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
    subprocess.run([compiler, *flags, "-o", target, SOURCE], check=True)
    return target


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert compiled("powerpc64le-linux-gnu-gcc", tmp_path / "tool").stat().st_size


def test_threads_write_a_block_and_say_how_far_they_are(tmp_path: Path) -> None:
    tool = compiled("gcc", tmp_path / "tool")
    disk, progress = tmp_path / "disk", tmp_path / "progress"
    disk.write_bytes(bytes(65536))
    progress.touch()
    words = ["--threads=3", "--seconds=1", f"--progress={progress}", str(disk)]
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    if result.returncode == 1 and '"errno":22' in result.stdout:
        pytest.skip("no O_DIRECT there")
    assert (result.returncode, result.stderr) == (0, "")
    report = parse_same_block(result.stdout)
    expect_written(report)
    assert len(report.writes) == 3
    lines = progress.read_text().splitlines()
    assert all(PROGRESS.search(line) for line in lines[:-1])
    assert DONE.search(lines[-1])
    # Of each word the thread's number, and the count of its last write.
    number, count = divmod(int.from_bytes(disk.read_bytes()[:8], "little"), 1 << 48)
    assert 0 < count <= report.writes[number - 1]


@pytest.mark.parametrize("words", [[], ["--threads=0", "x"], ["--seconds=x", "x"], ["--no", "x"]])
def test_a_wrong_command_line_is_refused(tmp_path: Path, words: list[str]) -> None:
    tool = compiled("gcc", tmp_path / "tool")
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")


def test_a_disk_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    tool = compiled("gcc", tmp_path / "tool")
    result = subprocess.run(
        [tool, "--seconds=1", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    with pytest.raises(ContractError, match="errno 2"):
        expect_written(parse_same_block(result.stdout))


def test_report() -> None:
    assert parse_same_block(LINE) == FINE


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
def test_report_that_cannot_be_believed(old: str, new: str) -> None:
    with pytest.raises(ProbeError):
        parse_same_block(LINE.replace(old, new))


def test_what_is_expected() -> None:
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
