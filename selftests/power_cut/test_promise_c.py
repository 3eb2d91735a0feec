# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/promise.c, compiled and run on the host: it detects each kind of loss."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.guest.report import read_report
from paprscm.power_cut.sudden_end import Ledger, Phase, ProgramState
from paprscm.power_cut.sudden_end_report import PromiseReport

PAGE = os.sysconf("SC_PAGESIZE")
SEED, NONCE, STEPS = 11, 0x1122334455667788, 150

Verify = Callable[..., PromiseReport]


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("promise", tmp_path_factory.mktemp("promise") / "promise")


def _store(
    binary: Path, folder: Path, *options: str, steps: int = STEPS, seed: int = SEED
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    words = [f"--ledger={folder.parent / 'ledger'}", f"--nonce={NONCE}", f"--seed={seed}"]
    words += ["--sync=off", f"--steps={steps}", *(options or ("--any-file",))]
    return subprocess.run(
        [binary, "store", *words, folder], capture_output=True, text=True, timeout=60, check=False
    )


def _verify(binary: Path, folder: Path, *, done: int = STEPS, seed: int = SEED) -> PromiseReport:
    result = subprocess.run(
        [binary, "verify", f"--seed={seed}", f"--done={done}", folder],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return read_report(PromiseReport, result.stdout, result.returncode, result.stderr)


@pytest.fixture
def folder(binary: Path, tmp_path: Path) -> Path:
    """Files after STEPS steps."""
    result = _store(binary, tmp_path / "files")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return tmp_path / "files"


def _stored(folder: Path) -> tuple[Path, int]:
    """A file of several pages, and the offset of a page that was stored to."""
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        pages = [at for at in range(0, len(content), PAGE) if any(content[at : at + PAGE])]
        if len(pages) > 2:
            return file, pages[1]
    raise AssertionError("no file has three pages that were stored to")


@pytest.mark.parametrize("optimisation", ["-O0", "-O2", "-O3"])
def test_compiles_natively(tmp_path: Path, optimisation: str) -> None:
    compile_on_host("promise", tmp_path / "promise", optimisation)


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("promise", tmp_path / "promise", compiler=FOR_THE_GUEST))


def test_nothing_is_lost(binary: Path, folder: Path) -> None:
    report = _verify(binary, folder)
    assert report.kept
    assert report.pages == report.intact > 20
    assert report.files > 2
    assert str(report).startswith(f"all {report.pages} pages")


def test_the_ledger_counts(binary: Path, folder: Path) -> None:
    with Ledger(folder.parent / "ledger") as ledger:
        entry = ledger.read(NONCE)
        assert ledger.read(NONCE + 1) is None
    assert entry is not None
    assert (entry.done, entry.phase, entry.state) == (STEPS, Phase.NOTHING, ProgramState.FINISHED)
    assert (entry.page_size, entry.errno, entry.stage) == (PAGE, 0, "")


@pytest.mark.parametrize("steps", range(1, 60))
def test_any_end_of_the_plan(binary: Path, tmp_path: Path, steps: int) -> None:
    """At any stop, the last step may or may not have been counted."""
    _store(binary, tmp_path / "files", steps=steps)
    assert _verify(binary, tmp_path / "files", done=steps).kept
    assert _verify(binary, tmp_path / "files", done=steps - 1).kept


def test_long_plans_remove_old_files(binary: Path, tmp_path: Path) -> None:
    assert _store(binary, tmp_path / "files", steps=1200).returncode == 0
    assert len(list((tmp_path / "files").iterdir())) in (32, 33)
    assert _verify(binary, tmp_path / "files", done=1200).kept


def test_more_than_the_counted_steps_is_strange(binary: Path, folder: Path) -> None:
    """Two steps beyond the counted ones cannot both have been in progress."""
    for done in range(STEPS - 12, STEPS - 8):
        report = _verify(binary, folder, done=done)
        assert report.strange


def test_data_of_another_seed_are_strange(binary: Path, folder: Path) -> None:
    report = _verify(binary, folder, seed=SEED + 1)
    assert report.strange
    assert not report.intact


def test_a_lost_file_is_named(binary: Path, folder: Path) -> None:
    file, _ = _stored(folder)
    file.unlink()
    report = _verify(binary, folder)
    assert report.lost == {"file": 1, "size": 0, "extent": 0, "bytes": 0, "strange": 0}
    assert report.lossy
    assert not report.strange
    assert report.intact < report.pages
    assert f"file {file.name} is missing" in str(report)


def test_a_short_file_is_named(binary: Path, folder: Path) -> None:
    file, _ = _stored(folder)
    size = file.stat().st_size
    os.truncate(file, size - 8)
    report = _verify(binary, folder)
    assert report.lost["size"] == 1
    assert f"file {file.name} has {size - 8} bytes of {size}" in str(report)
    os.truncate(file, 0)
    report = _verify(binary, folder)
    assert report.lost == {"file": 0, "size": 1, "extent": 0, "bytes": 0, "strange": 0}
    assert report.pages - report.intact > 2


def test_a_long_file_is_strange(binary: Path, folder: Path) -> None:
    file, _ = _stored(folder)
    os.truncate(file, file.stat().st_size + 100 * PAGE)
    assert _verify(binary, folder).lost["strange"] == 1


def test_a_lost_extent_is_named(binary: Path, folder: Path) -> None:
    file, offset = _stored(folder)
    content = file.read_bytes()
    with file.open("r+b") as opened:
        # Rewrite the file with a hole, which works on any file system with sparse files.
        opened.truncate(offset)
        opened.seek(offset + PAGE)
        opened.write(content[offset + PAGE :])
    report = _verify(binary, folder)
    # Pages outside of the plan were written, too, but as zeros: that is not strange.
    assert report.lost["extent"] == 1
    assert report.lost["file"] == report.lost["size"] == report.lost["strange"] == 0
    assert f"file {file.name}, offset {offset:#x}: no extent" in str(report)


@pytest.mark.parametrize("place", [0, 8, PAGE // 2, PAGE - 8])
def test_lost_bytes_are_named(binary: Path, folder: Path, place: int) -> None:
    file, offset = _stored(folder)
    with file.open("r+b") as opened:
        opened.seek(offset + place)
        old = opened.read(8)
        opened.seek(offset + place)
        opened.write(bytes(8))
    report = _verify(binary, folder)
    assert report.lost == {"file": 0, "size": 0, "extent": 0, "bytes": 1, "strange": 0}
    assert report.intact == report.pages - 1
    expected = int.from_bytes(old, "little")
    assert f"offset {offset + place:#x}: 0x0 for {expected:#x}" in str(report)


@pytest.mark.parametrize("place", [0, 3, PAGE - 1])
def test_a_damaged_byte_is_strange(binary: Path, folder: Path, place: int) -> None:
    file, offset = _stored(folder)
    with file.open("r+b") as opened:
        opened.seek(offset + place)
        old = opened.read(1)
        opened.seek(offset + place)
        opened.write(bytes([old[0] ^ 0x10]))
    report = _verify(binary, folder)
    assert report.strange
    assert not report.lossy
    assert not report.kept


def test_data_after_a_short_store_are_strange(binary: Path, folder: Path) -> None:
    """A block that was not zeroed has its former content."""
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for at in range(0, len(content), PAGE):
            if any(content[at : at + PAGE]) and not any(content[at + PAGE - 8 : at + PAGE]):
                with file.open("r+b") as opened:
                    opened.seek(at + PAGE - 8)
                    opened.write(b"old data")
                report = _verify(binary, folder)
                assert report.lost["strange"] == 1
                assert f"offset {at + PAGE - 8:#x}: 0x6174616420646c6f for 0x0" in str(report)
                return
    raise AssertionError("all pages are stored to their ends")


def test_an_older_version_of_a_page_is_strange(binary: Path, tmp_path: Path) -> None:
    """A page that was stored to twice must have the second content."""
    previous: dict[str, bytes] = {}
    for steps in range(1, 400):
        shutil.rmtree(tmp_path / "files", ignore_errors=True)
        _store(binary, tmp_path / "files", steps=steps)
        now = {file.name: file.read_bytes() for file in (tmp_path / "files").iterdir()}
        for name, content in now.items():
            old = previous.get(name, b"")
            again = [
                at
                for at in range(0, len(old), PAGE)
                if any(old[at : at + PAGE]) and old[at : at + PAGE] != content[at : at + PAGE]
            ]
            if again:
                (tmp_path / "files" / name).write_bytes(old)
                # Two steps after the first content was the last one.
                assert _verify(binary, tmp_path / "files", done=steps).strange
                return
        previous = now
    raise AssertionError("no page is stored to twice in 400 steps")


@pytest.mark.parametrize("name", ["other", "f000999", "f0", "f000001x"])
def test_an_unknown_file_is_strange(binary: Path, folder: Path, name: str) -> None:
    (folder / name).touch()
    assert _verify(binary, folder).lost["strange"] == 1


def test_files_must_be_dax(binary: Path, tmp_path: Path) -> None:
    result = _store(binary, tmp_path / "files", "--steps=5")
    assert result.returncode == 4
    assert "not DAX: 95" in result.stderr
    with Ledger(tmp_path / "ledger") as ledger:
        entry = ledger.read(NONCE)
    assert entry is not None
    assert (entry.state, entry.stage, entry.errno) == (ProgramState.FAILED, "not DAX", 95)


def test_a_refused_mapping_is_reported(binary: Path, tmp_path: Path) -> None:
    result = _store(binary, tmp_path / "files", "--any-file", "--sync=on")
    assert (result.returncode, "mmap: 95" in result.stderr) == (4, True)
    with Ledger(tmp_path / "ledger") as ledger:
        entry = ledger.read(NONCE)
    assert entry is not None
    assert (entry.state, entry.stage, entry.phase) == (ProgramState.FAILED, "mmap", Phase.CREATE)


def test_a_ledger_is_used_again(binary: Path, tmp_path: Path) -> None:
    """A new run overwrites the count of an earlier run."""
    _store(binary, tmp_path / "files")
    _store(binary, tmp_path / "more", steps=3)
    with Ledger(tmp_path / "ledger") as ledger:
        entry = ledger.read(NONCE)
    assert entry is not None
    assert entry.done == 3


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["store"],
        ["lose", "dir"],
        ["store", "--seed=1", "--sync=on", "--ledger=l", "dir"],
        ["store", "--seed=1", "--nonce=1", "--ledger=l", "dir"],
        ["store", "--nonce=1", "--sync=on", "--ledger=l", "dir"],
        ["store", "--seed=1", "--nonce=1", "--sync=maybe", "--ledger=l", "dir"],
        ["store", "--seed=1", "--nonce=1", "--sync=on", "dir"],
        ["verify", "--seed=1", "dir"],
        ["verify", "--done=1", "dir"],
        ["verify", "--seed=1", "--done=x", "dir"],
        ["verify", "--seed=1", "--done=1", "one", "two"],
        ["verify", "--seed=99999999999999999999", "--done=1", "dir"],
        ["verify", "--bogus", "--seed=1", "--done=1", "dir"],
    ],
)
def test_usage(binary: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = subprocess.run(
        [binary, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: promise" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_fails(binary: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [binary, "verify", "--seed=1", "--done=1", tmp_path / "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (4, "")
