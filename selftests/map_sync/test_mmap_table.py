# SPDX-License-Identifier: GPL-2.0-or-later
"""Table of mmap() results, compared with this machine's kernel and with altered results.

do_mmap() is the same on every architecture, so the table's columns for tmpfs and for files without
DAX also hold for this machine.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from guest_tool import compile_on_host

from paprscm.guest.report import ProbeError
from paprscm.map_sync.mmap_report import Access, Cell, CellReport, parse_cells
from paprscm.map_sync.mmap_table import (
    ANONYMOUS,
    CELLS,
    OK,
    RANGES,
    SF,
    FileKind,
    as_documented,
    at_offsets,
    expected_answer,
    table_differences,
)
from paprscm.map_sync.verdict import MappingFacts, MapResult

PAGE = os.sysconf("SC_PAGESIZE")
ALL = (*CELLS, *RANGES, *ANONYMOUS)
SYNC = Cell(type="shared_validate", sync=True)
PLAIN = Cell(type="shared_validate")

Try = Callable[..., tuple[CellReport, ...]]


def changed(mapping: MappingFacts, **changes: Any) -> MappingFacts:
    """A mapping with changed fields, without checks of their consistency."""
    result = copy.copy(mapping)
    for name, value in changes.items():
        msgspec.structs.force_setattr(result, name, value)
    return result


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("map_sync", tmp_path_factory.mktemp("map_sync") / "map_sync")


def run(
    binary: Path, path: Path, cells: Sequence[Cell], pages: int | None
) -> subprocess.CompletedProcess[str]:
    words = ["--no-truncate" if pages is None else f"--pages={pages}"]
    words += [f"--cell={cell.words}" for cell in cells]
    return subprocess.run([binary, *words, path], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def attempt(binary: Path) -> Try:
    def attempt_on(
        path: Path, cells: Sequence[Cell], *, pages: int | None = 2
    ) -> tuple[CellReport, ...]:
        done = run(binary, path, cells, pages)
        return parse_cells(done.stdout, done.returncode, done.stderr, path=str(path), cells=cells)

    return attempt_on


@pytest.fixture(scope="module")
def on_tmpfs(attempt: Try) -> tuple[CellReport, ...]:
    """All cells on this machine's tmpfs."""
    folder = Path("/dev/shm")  # noqa: S108
    if not os.access(folder, os.W_OK):
        pytest.skip("no tmpfs")
    path = folder / f"paprscm-cells-{os.getpid()}"
    try:
        return attempt(path, ALL)
    finally:
        path.unlink(missing_ok=True)


def test_the_table_has_every_combination_once() -> None:
    every = {
        (kind, sync, unknown, access)
        for kind in ("none", "shared", "shared_validate", "private")
        for sync in (False, True)
        for unknown in (False, True)
        for access in Access
    }
    combinations = [(cell.type, cell.sync, cell.unknown_bit, cell.access) for cell in CELLS]
    assert len(combinations) == len(every) == 48
    assert set(combinations) == every


def test_this_kernels_tmpfs(on_tmpfs: tuple[CellReport, ...]) -> None:
    assert {r.file.fs_name for r in on_tmpfs if r.file} == {"tmpfs"}
    assert table_differences(on_tmpfs, FileKind.UNAWARE) == []


def test_this_kernels_file_without_dax(attempt: Try, tmp_path: Path) -> None:
    reports = attempt(tmp_path / "file", ALL)
    assert reports[0].file is not None
    if reports[0].file.fs_name not in ("xfs", "ext4"):
        pytest.skip(f"{tmp_path} is on {reports[0].file.fs_name}")
    assert reports[0].file.dax is False
    assert table_differences(reports, FileKind.REFUSES) == []


@pytest.mark.parametrize("kind", [FileKind.GRANTS, FileKind.REFUSES, FileKind.DEVICE])
def test_another_kind_of_file_has_differences(
    on_tmpfs: tuple[CellReport, ...], kind: FileKind
) -> None:
    other = [
        c for c in ALL if expected_answer(c, kind)[0] != expected_answer(c, FileKind.UNAWARE)[0]
    ]
    texts = table_differences(on_tmpfs, kind)
    if kind is not FileKind.DEVICE:
        assert [text.partition(":")[0] for text in texts] == [str(cell) for cell in other]
    else:
        # For a device, a successful pread() is a difference, too.
        assert len(texts) > len(other) > 10


def find(reports: Sequence[CellReport], cell: Cell) -> CellReport:
    return next(report for report in reports if report.cell == cell)


def test_a_difference_names_cell_answers_and_rule(on_tmpfs: tuple[CellReport, ...]) -> None:
    shared = find(on_tmpfs, Cell(type="shared", sync=True))
    [text] = table_differences([shared], FileKind.REFUSES)
    assert text.startswith("MAP_SHARED|MAP_SYNC: expected EOPNOTSUPP, found mapped, VmFlags ")
    assert " sf " in text
    assert "daxdev_mapping_supported" in text
    refused = find(on_tmpfs, SYNC)
    [text] = table_differences([refused], FileKind.GRANTS)
    assert text.startswith(
        "MAP_SHARED_VALIDATE|MAP_SYNC: expected mapped with sf, found EOPNOTSUPP ("
    )


NO_SF = frozenset({"rd", "wr", "sh", "mr", "mw", "ms"})
WRONG: dict[str, tuple[Cell, dict[str, Any]]] = {
    "another errno": (SYNC, {"errno": 22, "errno_name": "EINVAL"}),
    "an error of another step": (SYNC, {"result": MapResult.ERROR, "stage": "open"}),
    "neither sf nor as without MAP_SYNC": (
        Cell(type="private", sync=True),
        {"vm_flags": frozenset({"rd", "wr", "mr"})},
    ),
    "sf unasked": (PLAIN, {"vm_flags": NO_SF | {"sf"}}),
    "not shared": (PLAIN, {"vm_flags": NO_SF - {"sh"}}),
    "may be written": (
        Cell(type="shared", access=Access.READ),
        {"vm_flags": frozenset({"rd", "mr", "mw", "ms"})},
    ),
    "no VmFlags": (PLAIN, {"vm_flags": None}),
    "SIGBUS": (PLAIN, {"result": MapResult.SIGBUS, "stage": "store", "fault_offset": 0}),
    "a page less": (PLAIN, {"pages_accessed": 1}),
    "lost in the mapping": (PLAIN, {"store_in_mapping": False}),
    "lost on the way to the file": (PLAIN, {"store_in_file": False}),
    "private, in the file": (Cell(type="private"), {"store_in_file": True}),
    "not read back": (PLAIN, {"store_in_file": None, "pread_errno": 5}),
    "stored in what is read": (
        Cell(type="private", access=Access.READ),
        {"store_in_mapping": True, "store_in_file": False},
    ),
    "anonymous, in a file": (Cell(type="shared", anonymous=True), {"store_in_file": True}),
    "mapped without a length": (Cell(type="shared_validate", length=0), {"errno": 12}),
}


@pytest.mark.parametrize(("cell", "changes"), WRONG.values(), ids=WRONG.keys())
def test_a_difference_is_detected(
    on_tmpfs: tuple[CellReport, ...], cell: Cell, changes: dict[str, Any]
) -> None:
    honest = find(on_tmpfs, cell)
    assert table_differences([honest], FileKind.UNAWARE) == []
    lying = dataclasses.replace(honest, mapping=changed(honest.mapping, **changes))
    [text] = table_differences([lying], FileKind.UNAWARE)
    assert text.startswith(f"{cell}: ")


def test_results_of_mmap_2_are_not_differences(on_tmpfs: tuple[CellReport, ...]) -> None:
    assert as_documented(on_tmpfs, FileKind.UNAWARE) == []
    mapped = [r for r in on_tmpfs if "sf" in (r.mapping.vm_flags or ())]
    assert len(mapped) > 8
    for honest in mapped:
        assert honest.mapping.vm_flags is not None
        ignored = changed(honest.mapping, vm_flags=honest.mapping.vm_flags - {"sf"})
        report = dataclasses.replace(honest, mapping=ignored)
        for kind in (FileKind.GRANTS, FileKind.REFUSES, FileKind.UNAWARE):
            assert table_differences([report], kind) == []
        assert as_documented([report], FileKind.UNAWARE) == [str(honest.cell)]
    # MAP_SYNC that must be refused is a difference, and not as documented.
    granted = find(on_tmpfs, Cell(type="shared", sync=True))
    assert len(table_differences([granted], FileKind.REFUSES)) == 1
    assert as_documented([granted], FileKind.REFUSES) == []


def test_a_mapping_has_whole_pages(on_tmpfs: tuple[CellReport, ...]) -> None:
    """On a device whose alignment is a page, half a page is mapped as a whole one."""
    report = find(on_tmpfs, PLAIN)
    half = dataclasses.replace(
        report,
        mapping=changed(
            report.mapping, length=PAGE // 2, pages_accessed=1, store_in_file=None, pread_errno=22
        ),
    )
    assert half.mapped_bytes == PAGE
    assert table_differences([half], FileKind.DEVICE, align_bytes=PAGE) == []
    assert len(table_differences([half], FileKind.DEVICE, align_bytes=2 * PAGE)) == 1


def test_other_flags_are_allowed(on_tmpfs: tuple[CellReport, ...]) -> None:
    report = find(on_tmpfs, PLAIN)
    assert report.mapping.vm_flags is not None
    flags = report.mapping.vm_flags | {"hg", "ac"}
    more = dataclasses.replace(report, mapping=changed(report.mapping, vm_flags=flags))
    assert table_differences([more], FileKind.UNAWARE) == []


def test_a_device_requires_alignment_and_cannot_be_read(on_tmpfs: tuple[CellReport, ...]) -> None:
    report = find(on_tmpfs, PLAIN)
    unreadable = dataclasses.replace(
        report, mapping=changed(report.mapping, store_in_file=None, pread_errno=22)
    )
    assert table_differences([unreadable], FileKind.DEVICE, align_bytes=PAGE) == []
    [text] = table_differences([unreadable], FileKind.DEVICE, align_bytes=1 << 21)
    assert text.startswith("MAP_SHARED_VALIDATE: expected EINVAL, found mapped, VmFlags ")
    [text] = table_differences([report], FileKind.DEVICE, align_bytes=PAGE)
    assert "expected pread() to fail" in text


def test_stored_values_are_in_the_file(attempt: Try, tmp_path: Path) -> None:
    """map_sync stores the same values that `stored` computes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * PAGE))
    reports = attempt(path, at_offsets([PLAIN, PLAIN, PLAIN], 2 * PAGE), pages=None)
    assert [r.mapping.offset for r in reports] == [0, 2 * PAGE, 4 * PAGE]
    content = path.read_bytes()
    stored = {at: value for r in reports for at, value in r.stored().items()}
    assert sorted(stored) == [page * PAGE for page in range(6)]
    assert all(content[at : at + 8] == value for at, value in stored.items())
    assert len(set(stored.values())) == 6


def test_the_file_is_emptied_for_each_cell(attempt: Try, tmp_path: Path) -> None:
    """A store of one cell must not be evidence for the next."""
    path = tmp_path / "file"
    attempt(path, [PLAIN, Cell(type="shared", access=Access.READ)], pages=3)
    assert path.read_bytes() == bytes(3 * PAGE)


def test_a_signal_ends_one_cell_only(attempt: Try, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    first, second = attempt(path, [PLAIN, Cell(type="shared", anonymous=True)], pages=None)
    assert (first.mapping.result, second.mapping.result) == (MapResult.SIGBUS, MapResult.MAPPED)
    assert second.file is None


def test_a_file_that_cannot_be_opened(attempt: Try, tmp_path: Path) -> None:
    [report] = attempt(tmp_path / "missing", [PLAIN], pages=None)
    assert (report.mapping.stage, report.mapping.errno_name) == ("open", "ENOENT")
    [text] = table_differences([report], FileKind.REFUSES)
    assert "found error at open with ENOENT" in text


def test_fsync(attempt: Try, tmp_path: Path) -> None:
    with_fsync = dataclasses.replace(PLAIN, fsync=True)
    [good] = attempt(tmp_path / "file", [with_fsync])
    assert (good.fsync, good.fsync_errno) == (True, None)
    # /dev/zero has no fsync in its file operations: drivers/char/mem.c.
    [bad] = attempt(Path("/dev/zero"), [with_fsync], pages=None)
    assert (bad.fsync, bad.fsync_errno) == (False, 22)


def test_a_fixed_address(attempt: Try, tmp_path: Path) -> None:
    fixed = dataclasses.replace(PLAIN, address_align=1 << 21)
    [report] = attempt(tmp_path / "file", [fixed])
    assert report.mapping.flags == 0x13
    assert table_differences([report], FileKind.REFUSES) == []
    assert str(fixed) == "MAP_SHARED_VALIDATE|MAP_FIXED"


# --- contradictory reports ------------------------------------------------------------------------


@pytest.fixture
def lines(binary: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """An honest report of SYNC, PLAIN with fsync, and an anonymous mapping."""
    done = run(binary, tmp_path / "file", HONEST_CELLS, 2)
    return [json.loads(line) for line in done.stdout.splitlines()]


HONEST_CELLS = (SYNC, dataclasses.replace(PLAIN, fsync=True), Cell(type="shared", anonymous=True))


def parse(lines: Sequence[dict[str, Any]], path: Path, status: int = 0) -> tuple[CellReport, ...]:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return parse_cells(text, status, "", path=str(path / "file"), cells=HONEST_CELLS)


def test_an_honest_report_is_accepted(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    assert [report.cell for report in parse(lines, tmp_path)] == list(HONEST_CELLS)


@pytest.mark.parametrize(
    ("number", "key", "value"),
    [
        (0, "tool", "promise"),
        (0, "verb", "map"),
        (0, "version", 2),
        (0, "path", "/other"),
        (0, "page_size", 8192),
        (0, "page_size", 5000),
        (0, "opened", "r"),
        (0, "opened", "none"),
        (0, "file", None),
        (0, "seed", -1),
        (0, "seed", 1 << 64),
        (0, "seed", None),
        (0, "fsync", True),
        (0, "more", 1),
        (1, "fsync", None),
        (1, "fsync", False),
        (1, "fsync_errno", 22),
        (2, "opened", "rw"),
        (2, "file", {}),
        (0, "mapping.sync", False),
        (0, "mapping.unknown_bit", True),
        (0, "mapping.type", "shared"),
        (0, "mapping.prot", "r"),
        (0, "mapping.offset", 4096),
        (0, "mapping.errno", None),
        (1, "mapping.flags", 0x23),
        (2, "mapping.flags", 1),
        (2, "mapping.flag_names", ["MAP_SHARED"]),
    ],
)
def test_lies(
    lines: list[dict[str, Any]], tmp_path: Path, number: int, key: str, value: object
) -> None:
    at = lines[number]
    *outer, last = key.split(".")
    for name in outer:
        at = at[name]
    at[last] = value
    with pytest.raises(ProbeError, match="cannot be believed"):
        parse(lines, tmp_path)


def test_reports_of_other_cells(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    for wrong in (lines[:2], [*lines, lines[0]], [lines[1], lines[0], lines[2]], []):
        with pytest.raises(ProbeError, match="cannot be believed"):
            parse(wrong, tmp_path)
    for status in (1, 2, 3, 4, 5, 139):
        with pytest.raises(ProbeError, match=f"status {status}"):
            parse(lines, tmp_path, status)
    for key in lines[0]:
        cut = [{name: value for name, value in lines[0].items() if name != key}, *lines[1:]]
        with pytest.raises(ProbeError, match="cannot be believed"):
            parse(cut, tmp_path)


def test_a_report_of_another_length_is_refused(binary: Path, tmp_path: Path) -> None:
    cell = dataclasses.replace(PLAIN, length=PAGE)
    done = run(binary, tmp_path / "file", [cell], 2)
    path = str(tmp_path / "file")
    assert parse_cells(done.stdout, 0, "", path=path, cells=[cell])
    other = dataclasses.replace(PLAIN, length=2 * PAGE)
    with pytest.raises(ProbeError, match="wrong length"):
        parse_cells(done.stdout, 0, "", path=path, cells=[other])


def test_only_devdax_refuses_private_mappings() -> None:
    """The columns differ only where the kernel's code does."""
    for cell in CELLS:
        granting, refusing, unaware, device = (expected_answer(cell, kind)[0] for kind in FileKind)
        assert (device == granting) == (cell.type != "private")
        assert (refusing == granting) == (granting != SF)
        assert granting != SF or cell.sync
        assert granting != OK or not cell.sync
        if cell.type != "shared_validate":
            assert unaware == granting
