# SPDX-License-Identifier: GPL-2.0-or-later
"""Ledgers, reports of promise, and the verdict on many reports."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paprscm.errors import ContractError, HostError
from paprscm.guest.report import ProbeError, read_report
from paprscm.pmem.fs_health import complaints, expect_no_complaints
from paprscm.power_cut.sudden_end import (
    Ledger,
    Phase,
    ProgramState,
    Side,
    Tally,
    expect_kept,
    require_statistical_power,
)
from paprscm.power_cut.sudden_end_report import PromiseReport
from paprscm.vm.backing_files import BackingFiles
from paprscm.vm.machine import MIB, Nvdimm

SYNC = Side(slot=0, fstype="xfs", sync=True)
CONTROL = Side(slot=1, fstype="xfs", sync=False)
NONCE = 0x0102030405060708


def report(**changes: Any) -> dict[str, Any]:
    """A report without a loss."""
    return {
        "tool": "promise",
        "version": 1,
        "seed": 5,
        "done": 40,
        "page_size": 65536,
        "files": 3,
        "pages": 20,
        "intact": 20,
        "lost": {"file": 0, "size": 0, "extent": 0, "bytes": 0, "strange": 0},
        "findings": [],
        **changes,
    }


def lossy(kind: str = "extent", **changes: Any) -> dict[str, Any]:
    """A report of one lost page."""
    finding = {"kind": kind, "file": 2, "offset": 65536, "expected": 0xAB, "found": 0}
    lost = {**report()["lost"], kind: 1}
    return report(intact=19, lost=lost, findings=[finding], **changes)


def parse(raw: dict[str, Any], status: int | None = None) -> Any:
    chosen = (1 if any(raw["lost"].values()) else 0) if status is None else status
    return read_report(PromiseReport, json.dumps(raw) + "\n", chosen)


def test_a_good_report() -> None:
    parsed = parse(report())
    assert parsed.kept
    assert not parsed.lossy
    assert str(parsed) == "all 20 pages of 3 files are intact"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("file", "file f000002 is missing"),
        ("size", "file f000002 has 0 bytes of 171"),
        ("extent", "file f000002, offset 0x10000: no extent"),
        ("bytes", "file f000002, offset 0x10000: 0x0 for 0xab"),
        ("strange", "file f000002, offset 0x10000: 0x0 for 0xab"),
    ],
)
def test_each_kind_of_loss(kind: str, text: str) -> None:
    parsed = parse(lossy(kind))
    assert not parsed.kept
    assert parsed.strange is (kind == "strange")
    assert parsed.lossy is (kind != "strange")
    assert str(parsed) == f"1 of 20 pages of 3 files are lost ({kind} 1): {text}"


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(tool="other"),
        lambda raw: raw.update(version=2),
        lambda raw: raw.update(extra=1),
        lambda raw: raw.pop("seed"),
        lambda raw: raw.update(done="40"),
        lambda raw: raw.update(done=-1),
        lambda raw: raw.update(intact=21),
        lambda raw: raw.update(intact=19),
        lambda raw: raw.update(files=21),
        lambda raw: raw["lost"].pop("bytes"),
        lambda raw: raw["lost"].update(other=0),
        lambda raw: raw["lost"].update(bytes=1),
        lambda raw: raw.update(findings=lossy()["findings"]),
        lambda raw: raw.update(findings=None),
    ],
)
def test_bad_reports(change: Callable[[dict[str, Any]], object]) -> None:
    raw = report()
    change(raw)
    with pytest.raises(ProbeError):
        read_report(PromiseReport, json.dumps(raw) + "\n", 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["findings"].append(raw["findings"][0]),
        lambda raw: raw["findings"].clear(),
        lambda raw: raw["findings"][0].update(kind="bytes"),
        lambda raw: raw["findings"][0].update(kind="other"),
        lambda raw: raw["findings"][0].update(expected=None),
        lambda raw: raw["findings"][0].update(expected="171"),
        lambda raw: raw["findings"][0].update(found=True),
        lambda raw: raw["findings"][0].update(found=-1),
        lambda raw: raw["findings"][0].pop("offset"),
        lambda raw: raw["findings"][0].update(more=1),
    ],
)
def test_bad_findings(change: Callable[[dict[str, Any]], object]) -> None:
    raw = lossy()
    change(raw)
    with pytest.raises(ProbeError):
        read_report(PromiseReport, json.dumps(raw) + "\n", 1)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", 0),
        ("{}\n", 0),
        ("[]\n", 0),
        ("Killed\n", 137),
        (json.dumps(report()) + "\nmore\n", 0),
        (json.dumps(report()) + "\n", 1),
        (json.dumps(report()) + "\n", 4),
        (json.dumps(lossy()) + "\n", 0),
    ],
)
def test_no_reports(text: str, status: int) -> None:
    with pytest.raises(ProbeError, match="cannot be believed"):
        read_report(PromiseReport, text, status)


def entry(**changes: Any) -> bytes:
    """Page of a ledger, as stored by a guest."""
    fields = {"magic": b"PAPRPROM", "nonce": NONCE, "page": 65536, "done": 7, "phase": 5}
    fields |= {"state": 1, "errno": 0, "stage": b"", **changes}
    return struct.pack("<8sQQ40xQQQQ32s", *fields.values())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sparse file with one valid ledger among others."""
    path = tmp_path / "dimm"
    with path.open("wb") as opened:
        opened.truncate(64 * MIB)
        for place, content in (
            (5 * MIB, entry(nonce=NONCE + 1)),
            (5 * MIB + 4096, entry(magic=b"PAPRPRON")),
            # Not at the start of a page: for example a part of another file.
            (9 * MIB + 512, entry(done=1)),
            (33 * MIB + 8192, entry()),
        ):
            opened.seek(place)
            opened.write(content)
    return path


def test_a_ledger_is_found(file: Path) -> None:
    with Ledger(file) as ledger:
        ledger_entry = ledger.read(NONCE)
        assert ledger.read(1) is None
    assert ledger_entry is not None
    assert (ledger_entry.done, ledger_entry.phase, ledger_entry.state) == (
        7,
        Phase.STORE,
        ProgramState.RUNNING,
    )
    assert (ledger_entry.page_size, ledger_entry.errno, ledger_entry.stage) == (65536, 0, "")


def test_a_ledger_is_read_while_it_is_written(file: Path) -> None:
    with Ledger(file) as ledger, file.open("r+b") as writer:
        assert ledger.read(99) is None
        for nonce in (NONCE, 99):
            for done in (1, 1 << 40):
                writer.seek(33 * MIB + (8192 if nonce == NONCE else 4096))
                writer.write(entry(nonce=nonce, done=done, state=3, errno=28, stage=b"mmap"))
                writer.flush()
                ledger_entry = ledger.read(nonce)
                assert ledger_entry is not None
                assert (ledger_entry.done, ledger_entry.state) == (done, ProgramState.FAILED)
                assert (ledger_entry.errno, ledger_entry.stage) == (28, "mmap")


@pytest.mark.parametrize(
    "changes", [{"phase": 9}, {"state": 4}, {"stage": b"\xff"}, {"nonce": 3}, {"magic": b"other"}]
)
def test_a_contradictory_ledger(file: Path, changes: dict[str, Any]) -> None:
    with Ledger(file) as ledger, file.open("r+b") as writer:
        assert ledger.read(NONCE) is not None
        writer.seek(33 * MIB + 8192)
        writer.write(entry(**changes))
        writer.flush()
        with pytest.raises(ProbeError, match="the ledger cannot be believed"):
            ledger.read(NONCE)


def test_backing_files_have_no_name(tmp_path: Path) -> None:
    dimms = [Nvdimm(slot=3, pmem=True), Nvdimm(slot=1, size_bytes=256 * MIB)]
    with BackingFiles(tmp_path, dimms) as files:
        assert list(tmp_path.iterdir()) == []
        first, second = files.nvdimms()
        assert (first.slot, first.pmem, second.slot) == (3, True, 1)
        assert first.file is not None
        assert first.file.stat().st_size == dimms[0].file_bytes
        assert files.path(1).stat().st_size == dimms[1].file_bytes
        # Another process can open it, and it stays sparse.
        first.file.open("r+b").write(b"kept")
        assert os.system(f"grep -q kept {first.file}") == 0  # noqa: S605
        assert first.file.stat().st_blocks * 512 < MIB
        closed = first.file
    assert not closed.exists()


def test_backing_files_need_a_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(HostError, match="cannot create backing files"),
        BackingFiles(tmp_path / "none", [Nvdimm()]),
    ):
        pass


def tally(side: Side, *reports: dict[str, Any]) -> Tally:
    total = Tally()
    for each in reports:
        total.add(side, Phase.FAULT, parse(each))
    return total


def test_kept_with_force() -> None:
    tallies = {SYNC: tally(SYNC, report(), report()), CONTROL: tally(CONTROL, report(), lossy())}
    expect_kept(tallies)
    require_statistical_power(tallies)
    figures = tallies[CONTROL].figures()
    assert (figures["cuts"], figures["lossy"], figures["pages_lost"]) == (2, 1, 1)
    assert (figures["lost"], figures["phases"]) == ({"extent": 1}, {"fault": 2})
    json.dumps(figures)


@pytest.mark.parametrize("kind", ["file", "size", "extent", "bytes", "strange"])
def test_a_broken_promise(kind: str) -> None:
    tallies = {SYNC: tally(SYNC, report(), lossy(kind)), CONTROL: tally(CONTROL, lossy())}
    with pytest.raises(ContractError, match=r"xfs with MAP_SYNC, killed after 40 steps, at fault"):
        expect_kept(tallies)


def test_the_control_may_lose_but_not_invent() -> None:
    expect_kept({CONTROL: tally(CONTROL, lossy("file"), lossy("bytes"))})
    with pytest.raises(ContractError, match="xfs without MAP_SYNC"):
        expect_kept({CONTROL: tally(CONTROL, lossy("strange"))})


def test_a_control_without_loss_has_no_force() -> None:
    """Neither PASS nor FAIL: an error other than ContractError ends as ERROR."""
    tallies = {SYNC: tally(SYNC, report()), CONTROL: tally(CONTROL, report())}
    expect_kept(tallies)
    with pytest.raises(HostError, match="xfs without MAP_SYNC: nothing was lost in 1 cuts"):
        require_statistical_power(tallies)


def test_nothing_promised_has_no_force() -> None:
    nothing = report(files=0, pages=0, intact=0)
    tallies = {SYNC: tally(SYNC, nothing), CONTROL: tally(CONTROL, lossy())}
    with pytest.raises(HostError, match="xfs with MAP_SYNC: no step was completed in 1 cuts"):
        require_statistical_power(tallies)


# Messages of 6.1, of 6.12 and of a fictitious kernel.
WELL = """\
<6>[    0.530000] SGI XFS with security attributes, no debug enabled
<6>[    1.000000] EXT4-fs (vda): mounted filesystem with ordered data mode. Quota mode: disabled.
<6>[    1.000000] EXT4-fs (vda): mounted filesystem 5e9fa66e-2c0e-4b4c-8f44-2ac7b2f5b6ea ro with \
ordered data mode. Quota mode: disabled.
<4>[    3.000000] XFS (pmem4): DAX enabled. Warning: EXPERIMENTAL, use at your own risk
<5>[    3.000000] XFS (pmem4): Mounting V5 Filesystem
<5>[    3.000000] XFS (pmem4): Mounting V5 Filesystem 70e898c5-c085-48c1-8081-61f5aa1f6f4e
<5>[    3.100000] XFS (pmem4): Starting recovery (logdev: internal)
<4>[    3.100000] EXT4-fs mount: 2 callbacks suppressed
<4>[    3.100000] EXT4-fs unmount: 13 callbacks suppressed
<4>[    3.200000] XFS (pmem4): Torn write (CRC failure) detected at log block 0x80. Truncating \
head block from 0x100.
<6>[    3.300000] XFS (pmem3): a mount in other words
<12>[    3.300000] XFS (pmem3): EXPERIMENTAL atomic writes feature in use. Use at your own risk!
<4>[    4.000000] EXT4-fs (pmem2): DAX enabled. Warning: EXPERIMENTAL, use at your own risk
<6>[    4.000000] EXT4-fs (pmem2): 3 orphan inodes deleted
<3>[    6.000000] systemd: nothing of ours
"""


def test_healthy_file_systems() -> None:
    assert complaints(WELL) == []
    expect_no_complaints(WELL)


@pytest.mark.parametrize(
    "text",
    [
        "EXT4-fs error: 2 callbacks suppressed",
        "XFS (pmem4): Metadata CRC error detected at xfs_agf_read_verify+0xa0/0xf0",
        "XFS (pmem4): Corruption of in-memory data (0x8) detected at xfs_trans_cancel",
        "XFS (pmem4): log mount/recovery failed: error -117",
        "XFS (pmem4): DAX not supported for blocksize. Turning off DAX.",
        "XFS: Assertion failed: fs_is_ok, file: fs/xfs/libxfs/xfs_btree.c, line: 1",
        "EXT4-fs error (device pmem2): ext4_lookup:1812: inode #2: comm ls: deleted inode",
        "EXT4-fs warning (device pmem2): dx_probe:890: inode #2",
        "EXT4-fs (pmem2): Delayed block allocation failed for inode 12",
        "EXT4-fs (pmem2): error count since last fsck: 3",
        "EXT4-fs (pmem2): initial error at time 1700000000: ext4_lookup:1812: inode 2",
        "EXT4-fs (pmem2): DAX unsupported by block device.",
        "JBD2: Invalid checksum recovering data block 3 in log",
        "JBD2: recovery failed",
        "Buffer I/O error on dev pmem2, logical block 0, lost async page write",
        "I/O error, dev pmem2, sector 0 op 0x1:(WRITE) flags 0x3800 phys_seg 1 prio class 2",
    ],
)
def test_complaints(text: str) -> None:
    level = 5 if "error count" in text or "initial error" in text else 4
    assert complaints(f"{WELL}<{level}>[    7.000000] {text}\n") == [text]
    assert complaints(f"{WELL}[    7.000000] {text}\n") == [text]
    with pytest.raises(ContractError, match="a file system reports errors"):
        expect_no_complaints(text)
