# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/map_sync.c, compiled and run on the host: everything except DAX."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.map_sync.verdict import (
    MapResult,
    MapSyncReport,
    Verdict,
    judge_map_sync,
    parse_map_sync,
)

PAGE = os.sysconf("SC_PAGESIZE")
REFERENCE_LINE = "Failed to mmap with Operation not supported\n"

Probe = Callable[..., MapSyncReport]


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("map_sync", tmp_path_factory.mktemp("map_sync") / "map_sync")


def _run(binary: Path, *args: str | bytes | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, *args], capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def probe(binary: Path) -> Probe:
    def run(*args: str | bytes | Path) -> MapSyncReport:
        result = _run(binary, *args)
        return parse_map_sync(result.stdout, result.returncode, result.stderr)

    return run


@pytest.fixture
def tmpfs() -> Path:
    path = Path("/dev/shm")  # noqa: S108
    if not os.access(path, os.W_OK):
        pytest.skip("no tmpfs")
    return path / f"paprscm-map_sync-{os.getpid()}"


@pytest.mark.parametrize("optimisation", ["-O0", "-O2", "-O3"])
def test_compiles_natively(tmp_path: Path, optimisation: str) -> None:
    compile_on_host("map_sync", tmp_path / "map_sync", optimisation)


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("map_sync", tmp_path / "map_sync", compiler=FOR_THE_GUEST))


def test_ordinary_file(probe: Probe, tmp_path: Path) -> None:
    report = probe("--control", "--pages=3", tmp_path / "file")
    assert report.page_size == PAGE
    assert report.file is not None
    assert (report.file.type, report.file.size_bytes) == ("regular", 3 * PAGE)
    assert report.file.dax is False
    mapping, control = report.mapping, report.control
    assert (mapping.result, mapping.stage) == (MapResult.REFUSED, "mmap")
    assert (mapping.errno, mapping.errno_name) == (95, "EOPNOTSUPP")
    assert report.stderr == REFERENCE_LINE
    assert control is not None
    assert (control.result, control.pages_accessed) == (MapResult.MAPPED, 3)
    assert (control.store_in_mapping, control.store_in_file) == (True, True)
    assert control.vm_flags is not None
    assert {"rd", "wr", "sh"} <= control.vm_flags
    assert judge_map_sync(report).verdict is Verdict.NOT_DAX


def test_tmpfs_grants_a_spurious_sync(probe: Probe, tmpfs: Path) -> None:
    """MAP_SHARED|MAP_SYNC gives `sf` on tmpfs: smaps alone is not evidence."""
    try:
        refused = probe("--control", tmpfs)
        granted = probe("--control", "--type=shared", tmpfs)
    finally:
        tmpfs.unlink(missing_ok=True)
    assert refused.mapping.errno_name == "EOPNOTSUPP"
    assert granted.mapping.result is MapResult.MAPPED
    assert granted.mapping.vm_flags is not None
    assert "sf" in granted.mapping.vm_flags
    assert granted.control is not None
    assert granted.control.vm_flags is not None
    assert "sf" not in granted.control.vm_flags
    assert {judge_map_sync(refused).verdict, judge_map_sync(granted).verdict} == {Verdict.NOT_DAX}


def test_sigbus_on_an_empty_file(probe: Probe, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    report = probe("--no-truncate", "--sync=off", "--control", empty)
    assert empty.stat().st_size == 0
    for mapping in (report.mapping, report.control):
        assert mapping is not None
        assert (mapping.result, mapping.stage) == (MapResult.SIGBUS, "store")
        assert (mapping.fault_offset, mapping.pages_accessed) == (0, 0)
        assert mapping.vm_flags


def test_sigbus_beyond_the_end(probe: Probe, tmp_path: Path) -> None:
    report = probe("--pages=2", f"--length={5 * PAGE}", "--sync=off", tmp_path / "file")
    assert report.mapping.result is MapResult.SIGBUS
    assert (report.mapping.fault_offset, report.mapping.pages_accessed) == (2 * PAGE, 2)


def test_load_raises_sigbus_too(probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    report = probe("--no-truncate", "--read-only", "--prot=r", "--sync=off", tmp_path / "empty")
    assert (report.mapping.result, report.mapping.stage) == (MapResult.SIGBUS, "load")


def test_stores_reach_the_requested_offset(probe: Probe, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xaa" * 4 * PAGE)
    report = probe("--no-truncate", f"--offset={PAGE}", f"--length={2 * PAGE}", "--sync=off", file)
    assert (report.mapping.offset, report.mapping.length) == (PAGE, 2 * PAGE)
    assert report.mapping.store_in_file is True
    content = file.read_bytes()
    changed = [
        page for page in range(4) if content[page * PAGE : (page + 1) * PAGE] != b"\xaa" * PAGE
    ]
    assert changed == [1, 2]


def test_the_file_is_emptied(probe: Probe, tmp_path: Path) -> None:
    """Blocks of an earlier run would avoid the page faults under test."""
    (tmp_path / "file").write_bytes(b"\xaa" * 3 * PAGE)
    probe("--pages=2", "--sync=off", tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 2 * PAGE
    assert not any(content[8:PAGE])


def test_private_store_does_not_reach_the_file(probe: Probe, tmp_path: Path) -> None:
    report = probe("--type=private", "--sync=off", tmp_path / "file")
    assert (report.mapping.store_in_mapping, report.mapping.store_in_file) == (True, False)
    assert not any((tmp_path / "file").read_bytes())


def test_each_run_stores_other_values(probe: Probe, tmp_path: Path) -> None:
    """A value of an earlier run must not look like a store of this run."""
    contents = set()
    for _ in range(3):
        probe("--sync=off", tmp_path / "file")
        contents.add((tmp_path / "file").read_bytes())
    assert len(contents) == 3


@pytest.mark.parametrize(
    ("options", "errno_name"),
    [
        (["--type=none"], "EINVAL"),
        (["--unknown-bit", "--sync=off"], "EOPNOTSUPP"),
        (["--read-only", "--sync=off"], "EACCES"),
        (["--offset=1", "--sync=off", "--length=1"], "EINVAL"),
        (["--length=0", "--sync=off"], "EINVAL"),
    ],
)
def test_refusals(probe: Probe, tmp_path: Path, options: list[str], errno_name: str) -> None:
    report = probe(*options, tmp_path / "file")
    assert report.mapping.result is MapResult.REFUSED
    assert report.mapping.errno_name == errno_name
    assert report.stderr.startswith("Failed to mmap with ")


def test_unknown_bit_is_ignored_by_map_shared(probe: Probe, tmp_path: Path) -> None:
    report = probe("--type=shared", "--unknown-bit", "--sync=off", tmp_path / "file")
    assert report.mapping.result is MapResult.MAPPED
    assert report.mapping.flags == 0x2000001


def test_no_access_without_protection(probe: Probe, tmp_path: Path) -> None:
    report = probe("--prot=none", "--sync=off", tmp_path / "file")
    assert (report.mapping.result, report.mapping.pages_accessed) == (MapResult.MAPPED, 0)


@pytest.mark.parametrize(
    ("path", "stage", "errno_name"),
    [
        ("/nonexistent/file", "open", "ENOENT"),
        ("/", "open", "EISDIR"),
        ("/dev/null", "truncate", "EINVAL"),
    ],
)
def test_failed_steps(probe: Probe, path: str, stage: str, errno_name: str) -> None:
    report = probe("--control", path)
    assert report.mapping.result is MapResult.ERROR
    assert (report.mapping.stage, report.mapping.errno_name) == (stage, errno_name)
    assert (report.file, report.control) == (None, None)
    assert judge_map_sync(report).verdict is Verdict.BROKEN


def test_no_truncate_requires_an_existing_file(probe: Probe, tmp_path: Path) -> None:
    report = probe("--no-truncate", tmp_path / "missing")
    assert (report.mapping.stage, report.mapping.errno_name) == ("open", "ENOENT")
    assert not (tmp_path / "missing").exists()


def test_fifo_is_not_waited_for(probe: Probe, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    report = probe("--no-truncate", "--read-only", "--prot=r", "--sync=off", tmp_path / "fifo")
    assert report.mapping.errno_name == "ENODEV"


@pytest.mark.parametrize(
    "name",
    [
        b"with space",
        b'quote"back\\slash',
        b"line\nend\ttab\x01\x7f",
        "é☃".encode(),
        b"\xff\xfe\x80",
    ],
)
def test_strange_names(probe: Probe, tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    report = probe("--sync=off", path)
    assert report.mapping.result is MapResult.MAPPED
    assert os.fsencode(report.path) == path
    assert report.line.isascii()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus", "file"],
        [],
        ["one", "two"],
        ["--type=hugetlb", "file"],
        ["--sync=maybe", "file"],
        ["--prot=rwx", "file"],
        ["--pages=-1", "file"],
        ["--pages=1x", "file"],
        ["--pages=", "file"],
        ["--pages=0x7fffffffffffffff", "file"],
        ["--length=99999999999999999999", "file"],
        ["file", "--offset"],
        ["--cell=hugetlb", "file"],
        ["--cell=", "file"],
        ["--cell=shared,huge", "file"],
        ["--cell=shared,sync=1", "file"],
        ["--cell=shared,offset", "file"],
        ["--cell=shared,length=-1", "file"],
        ["--cell=shared,,sync", "file"],
        ["--cell=shared,address-align=0", "file"],
        ["--cell=shared,address-align=512", "file"],
        ["--cell=shared,anonymous,fsync", "file"],
        ["--cell=shared", "--control", "file"],
    ],
)
def test_usage(binary: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = subprocess.run(
        [binary, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert "usage: map_sync" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_lost_report_has_its_own_status(binary: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [binary, "--sync=off", tmp_path / "file"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 5
    assert "28 ENOSPC" in result.stderr


def test_report_has_the_same_fields_for_both_mappings(binary: Path, tmp_path: Path) -> None:
    """An unknown field is detected here, not first in a guest."""
    line = _run(binary, "--control", tmp_path / "file").stdout
    report: dict[str, Any] = json.loads(line)
    assert report["control"].keys() == report["mapping"].keys()
    assert line.count("\n") == 1
