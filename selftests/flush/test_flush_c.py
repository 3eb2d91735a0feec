# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/flush.c, compiled and run on the host."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.errors import ContractError
from paprscm.flush import durability
from paprscm.flush.durability import compare_clocks
from paprscm.flush.load import FlushLoadReport
from paprscm.guest.report import read_report


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("flush", tmp_path_factory.mktemp("flush") / "flush")


def _run(binary: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, *words], capture_output=True, text=True, timeout=60, check=False)


def _load(binary: Path, *words: str | Path) -> FlushLoadReport:
    result = _run(binary, "load", *words)
    return read_report(FlushLoadReport, result.stdout, result.returncode, result.stderr)


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("flush", tmp_path / "flush", compiler=FOR_THE_GUEST))


def test_threads_share_the_targets(binary: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    report = _load(binary, "--op=fsync", "--threads=3", "--count=4", "--seed=5", *folders)
    report.expect_success()
    assert (report.seed, report.threads, report.targets) == (5, 3, 2)
    assert [call.thread for call in report.calls] == [0] * 4 + [1] * 4 + [2] * 4
    assert {call.operation for call in report.calls} == {"fsync"}
    assert [len(report.on(target)) for target in (0, 1)] == [8, 4]
    assert sorted(file.name for file in folders[0].iterdir()) == ["flush.0", "flush.2"]
    for earlier, later in zip(report.on(1), report.on(1)[1:], strict=False):
        assert earlier.end_ns <= later.begin_ns


def test_a_mixture_has_every_call_of_files(binary: Path, tmp_path: Path) -> None:
    report = _load(binary, "--op=mixed", "--count=60", tmp_path)
    report.expect_success()
    kinds = {call.operation for call in report.calls}
    assert kinds == {"fsync", "fdatasync", "msync", "dsync", "syncfs"}


def test_deep_flush_writes_to_the_attribute(binary: Path, tmp_path: Path) -> None:
    attribute = tmp_path / "deep_flush"
    attribute.write_text("0\n")
    _load(binary, "--op=deep_flush", "--threads=2", "--count=2", attribute).expect_success()
    assert attribute.read_text() == "1\n"


def test_a_failed_call_is_reported(binary: Path) -> None:
    report = _load(binary, "--op=deep_flush", "--count=2", "/dev/full")
    assert [call.errno for call in report.calls] == [28, 28]
    with pytest.raises(ContractError, match=r"2 of 2 calls failed.* No space left on device"):
        report.expect_success()


def test_the_limit_ends_it(binary: Path, tmp_path: Path) -> None:
    report = _load(binary, "--op=fsync", "--count=1000000", "--limit=1", tmp_path)
    assert 0.9 < report.duration_s < 30
    assert 0 < len(report.calls) < 1_000_000


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["store"],
        ["load"],
        ["load", "."],
        ["load", "--op=fsync"],
        ["load", "--op=sync", "."],
        ["load", "--op=fsync", "--threads=0", "."],
        ["load", "--op=fsync", "--count=1x", "."],
        ["load", "--op=fsync", "--rounds=3", "."],
        ["load", "--op=direct_dsync", "."],
        ["load", "--op=fsync", *["."] * 17],
        ["load", "--wrong", "."],
        ["clock", "/dev/null"],
        ["clock", "--rounds=1"],
        ["clock", "--rounds=1", "--op=fsync", "/dev/null"],
    ],
)
def test_a_wrong_command_line(binary: Path, words: list[str]) -> None:
    result = _run(binary, *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: flush" in result.stderr


def test_a_missing_target(binary: Path, tmp_path: Path) -> None:
    result = _run(binary, "load", "--op=fsync", tmp_path / "missing")
    assert (result.returncode, result.stdout) == (4, "")
    assert "missing: 2 ENOENT" in result.stderr


class _Guest:
    """Run the program on this host; one file is the DIMM, the device and its memory."""

    def __init__(self, binary: Path, memory: Path, begin: int) -> None:
        self._binary = binary
        self._memory = memory
        self._begin = begin

    def file(self, _slot: int) -> Path:
        return self._memory

    def run(self, command: str) -> Any:
        words = command.split()
        result = _run(self._binary, *words[1:])
        return SimpleNamespace(stdout=result.stdout, status=result.returncode, stderr=result.stderr)


def test_clocks_are_compared(binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    memory = tmp_path / "memory"
    memory.write_bytes(bytes(2 << 20))
    monkeypatch.setattr(durability, "file_offset", lambda *_: 0)
    monkeypatch.setattr(durability, "install_tool", lambda *_: binary)
    region, device = SimpleNamespace(slot=0), SimpleNamespace(path=str(memory))
    offset = compare_clocks(_Guest(binary, memory, 0), region, device)  # type: ignore[arg-type]
    true = time.monotonic_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    assert offset.low_ns - 1_000_000 < true < offset.high_ns + 1_000_000
    assert 0 < offset.width_ns < 50_000_000


def test_no_answer(binary: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(2 << 20))
    result = _run(binary, "clock", "--rounds=1", memory)
    assert result.returncode == 4
    assert "the host does not answer" in result.stderr
    assert "rounds" not in json.dumps(result.stderr)
