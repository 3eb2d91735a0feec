# SPDX-License-Identifier: GPL-2.0-or-later
"""MAP_SYNC reports: the verdict of each, and refusal of contradictory ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
from guest_tool import HostShell

from paprscm.channel.command import CommandResult, TimedOutError
from paprscm.errors import HostError
from paprscm.guest import tools
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError
from paprscm.map_sync import probe, verdict
from paprscm.map_sync.verdict import (
    STATX_ATTR_DAX,
    Verdict,
    judge_map_sync,
    on_dax_file,
    parse_map_sync,
)
from paprscm.vm.dimms import OVERRIDE, PLAIN, PMEM_OFF, PMEM_ON
from paprscm.vm.machine import Nvdimm

PAGE = 65536
XFS = 0x58465342

Raw = dict[str, Any]


def _mapping(*, sync: bool, **changes: Any) -> Raw:
    raw: Raw = {
        "type": "shared_validate",
        "sync": sync,
        "unknown_bit": False,
        "flags": 0x80003 if sync else 3,
        "flag_names": ["MAP_SHARED_VALIDATE", *(["MAP_SYNC"] if sync else [])],
        "prot": "rw",
        "offset": 0,
        "length": PAGE,
        "result": "mapped",
        "stage": "done",
        "errno": None,
        "errno_name": None,
        "fault_offset": None,
        "vm_flags": ["rd", "wr", "sh", "mr", "mw", "me", "ms", *(["sf"] if sync else [])],
        "pages_accessed": 1,
        "first_access_ns": 250000,
        "store_in_mapping": True,
        "store_in_file": True,
        "pread_errno": None,
        "pread_errno_name": None,
    }
    return {**raw, **changes}


def _refused(name: str, number: int, *, sync: bool = True, **changes: Any) -> Raw:
    return _mapping(
        sync=sync,
        result="refused",
        stage="mmap",
        errno=number,
        errno_name=name,
        vm_flags=None,
        pages_accessed=0,
        first_access_ns=None,
        store_in_mapping=None,
        store_in_file=None,
        **changes,
    )


def _sigbus(*, sync: bool = True) -> Raw:
    return _mapping(
        sync=sync,
        result="sigbus",
        stage="store",
        fault_offset=0,
        pages_accessed=0,
        first_access_ns=None,
        store_in_mapping=None,
        store_in_file=None,
    )


def _file(dax: bool | None) -> Raw:
    mask = 0 if dax is None else STATX_ATTR_DAX | 0x70
    attributes = STATX_ATTR_DAX if dax else 0
    return {
        "type": "regular",
        "size": PAGE,
        "statx": {"attributes": attributes, "attributes_mask": mask, "dax": dax},
        "statx_errno": None,
        "statx_errno_name": None,
        "fs_type": XFS,
        "fs_block_size": PAGE,
    }


def _report(mapping: Raw, control: Raw | None, dax: bool | None = True, **changes: Any) -> Raw:
    raw: Raw = {
        "tool": "map_sync",
        "verb": "map",
        "version": 1,
        "path": "/mnt1/file",
        "page_size": PAGE,
        "opened": "rw",
        "file": _file(dax),
        "control": control,
        "mapping": mapping,
    }
    return {**raw, **changes}


STATUS = {"mapped": 0, "refused": 1, "sigbus": 3, "sigsegv": 3, "error": 4}


def _parse(raw: Raw, status: int | None = None) -> verdict.MapSyncReport:
    if status is None:
        status = STATUS.get(raw["mapping"]["result"], 0)
    return parse_map_sync(json.dumps(raw) + "\n", status)


GOOD = _mapping(sync=True)
CONTROL = _mapping(sync=False)
REFUSED = _refused("EOPNOTSUPP", 95)
NO_FILE = _mapping(
    sync=True,
    result="error",
    stage="open",
    errno=28,
    errno_name="ENOSPC",
    length=0,
    vm_flags=None,
    pages_accessed=0,
    first_access_ns=None,
    store_in_mapping=None,
    store_in_file=None,
)

ACCEPTED_CASES = [("with control", GOOD, CONTROL), ("without control", GOOD, None)]

# On a file that is DAX in statx: mapping, control, and a part of the reason.
BROKEN_CASES: list[tuple[str, Raw, Raw | None, str]] = [
    ("refused, no control", REFUSED, None, "no control"),
    ("refused, control refused too", REFUSED, _refused("EOPNOTSUPP", 95, sync=False), "control"),
    ("refused, control dies", REFUSED, _sigbus(sync=False), "control"),
    ("refused, control's store is lost", REFUSED, {**CONTROL, "store_in_file": False}, "control"),
    ("refused, control's store unread", REFUSED, {**CONTROL, "store_in_file": None}, "control"),
    ("refused, control has sf", REFUSED, {**CONTROL, "vm_flags": ["sh", "sf"]}, "control"),
    ("refused, control touched nothing", REFUSED, {**CONTROL, "pages_accessed": 0}, "control"),
    ("EINVAL", _refused("EINVAL", 22), CONTROL, "EINVAL (22)"),
    ("EACCES", _refused("EACCES", 13), CONTROL, "EACCES (13)"),
    ("ENODEV", _refused("ENODEV", 19), CONTROL, "ENODEV (19)"),
    ("mapped without sf", {**GOOD, "vm_flags": ["rd", "wr", "sh"]}, CONTROL, "sf is not in"),
    ("mapped, no VmFlags at all", {**GOOD, "vm_flags": None}, CONTROL, "no VmFlags"),
    ("mapped, VmFlags empty", {**GOOD, "vm_flags": []}, CONTROL, "sf is not in"),
    ("flags glued together", {**GOOD, "vm_flags": ["rdsf"]}, CONTROL, "sf is not in"),
    ("store lost in the mapping", {**GOOD, "store_in_mapping": False}, CONTROL, "through the map"),
    ("store unread in the mapping", {**GOOD, "store_in_mapping": None}, CONTROL, "through the map"),
    ("store not in the file", {**GOOD, "store_in_file": False}, CONTROL, "did not arrive"),
    ("file not readable", {**GOOD, "store_in_file": None}, CONTROL, "could not be read back"),
    ("nothing was stored", {**GOOD, "pages_accessed": 0}, CONTROL, "0 pages"),
    ("nothing was mapped", {**GOOD, "length": 0, "pages_accessed": 0}, None, "0 pages"),
    ("too few pages", {**GOOD, "length": 2 * PAGE}, None, "1 pages"),
    ("SIGBUS", _sigbus(), CONTROL, "sigbus"),
    ("granted, but the control is not", GOOD, _refused("EPERM", 1, sync=False), "control"),
    ("granted, control has sf", GOOD, {**CONTROL, "vm_flags": ["sf"]}, "control"),
    ("another question: no MAP_SYNC", CONTROL, CONTROL, "did not ask"),
    (
        "another question: an unknown bit was refused",
        _refused(
            "EOPNOTSUPP",
            95,
            sync=False,
            unknown_bit=True,
            flags=0x2000003,
            flag_names=["MAP_SHARED_VALIDATE", "UNKNOWN_BIT"],
        ),
        CONTROL,
        "did not ask",
    ),
    (
        "another question: MAP_SHARED",
        {**GOOD, "type": "shared", "flags": 0x80001, "flag_names": ["MAP_SHARED", "MAP_SYNC"]},
        CONTROL,
        "did not ask",
    ),
    (
        "another question: read only",
        {**GOOD, "prot": "r", "store_in_mapping": None, "store_in_file": None},
        None,
        "did not ask",
    ),
]


@pytest.mark.parametrize(("name", "mapping", "control"), ACCEPTED_CASES)
def test_accepted(name: str, mapping: Raw, control: Raw | None) -> None:
    assert judge_map_sync(_parse(_report(mapping, control))).verdict is Verdict.ACCEPTED, name


def test_refused() -> None:
    judgement = judge_map_sync(_parse(_report(REFUSED, CONTROL)))
    assert judgement.verdict is Verdict.REFUSED
    assert "EOPNOTSUPP (95)" in judgement.reason


@pytest.mark.parametrize(
    ("mapping", "control", "reason"),
    [case[1:] for case in BROKEN_CASES],
    ids=[case[0] for case in BROKEN_CASES],
)
def test_broken(mapping: Raw, control: Raw | None, reason: str) -> None:
    judgement = judge_map_sync(_parse(_report(mapping, control)))
    assert judgement.verdict is Verdict.BROKEN
    assert reason in judgement.reason


@pytest.mark.parametrize(
    ("mapping", "control"),
    [(GOOD, CONTROL), (REFUSED, CONTROL), (REFUSED, None), *[case[1:3] for case in BROKEN_CASES]],
)
def test_a_file_that_is_not_dax_is_always_not_dax(mapping: Raw, control: Raw | None) -> None:
    judgement = judge_map_sync(_parse(_report(mapping, control, dax=False)))
    assert judgement.verdict is Verdict.NOT_DAX
    assert "xfs" in judgement.reason


@pytest.mark.parametrize("mapping", [GOOD, REFUSED])
def test_dax_unknown_is_not_dax_proven(mapping: Raw) -> None:
    """A kernel without STATX_ATTR_DAX (before 5.8) allows no verdict."""
    assert judge_map_sync(_parse(_report(mapping, CONTROL, dax=None))).verdict is Verdict.BROKEN
    no_statx = {**_file(None), "statx": None, "statx_errno": 38, "statx_errno_name": "ENOSYS"}
    report = _parse(_report(mapping, CONTROL, file=no_statx))
    assert judge_map_sync(report).verdict is Verdict.BROKEN


def test_opened_read_only_is_another_question() -> None:
    assert judge_map_sync(_parse(_report(REFUSED, CONTROL, opened="r"))).verdict is Verdict.BROKEN


def test_unreached_file_is_broken() -> None:
    judgement = judge_map_sync(_parse(_report(NO_FILE, None, file=None)))
    assert judgement.verdict is Verdict.BROKEN
    assert "open with ENOSPC (28)" in judgement.reason


@pytest.mark.parametrize(
    ("nvdimm", "expected"),
    [
        (PMEM_ON, Verdict.ACCEPTED),
        (PMEM_OFF, Verdict.REFUSED),
        (OVERRIDE, Verdict.REFUSED),
        (PLAIN, Verdict.ACCEPTED),
    ],
    ids=["pmem on", "pmem off", "override", "plain"],
)
def test_the_contract_of_each_kind_of_dimm(nvdimm: Nvdimm, expected: Verdict) -> None:
    assert on_dax_file(nvdimm) is expected


def _set(raw: Raw, path: str, value: Any) -> Raw:
    changed = copy.deepcopy(raw)
    *parents, last = path.split(".")
    inner = changed
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return changed


LIES: list[tuple[str, Any]] = [
    ("tool", "other"),
    ("verb", "cell"),
    ("version", 2),
    ("version", True),
    ("page_size", 65537),
    ("page_size", 0),
    ("page_size", "65536"),
    ("page_size", -65536),
    ("opened", "w"),
    ("path", None),
    ("mapping", None),
    ("mapping", []),
    ("file", None),
    ("file.statx.dax", False),
    ("file.statx.dax", None),
    ("file.statx.dax", 1),
    ("file.statx.attributes", 0),
    ("file.statx.attributes_mask", 0),
    ("file.statx", None),
    ("file.statx_errno", 38),
    ("mapping.flags", 3),
    ("mapping.flags", 0x80003 | 0x100000),
    ("mapping.flag_names", ["MAP_SHARED_VALIDATE"]),
    ("mapping.sync", False),
    ("mapping.sync", 1),
    ("mapping.unknown_bit", True),
    ("mapping.type", "shared"),
    ("mapping.type", "hugetlb"),
    ("mapping.prot", "x"),
    ("mapping.prot", "r"),
    ("mapping.result", "refused"),
    ("mapping.result", "sigbus"),
    ("mapping.result", "fine"),
    ("mapping.stage", "mmap"),
    ("mapping.errno", 95),
    ("mapping.errno_name", "EOPNOTSUPP"),
    ("mapping.fault_offset", 0),
    ("mapping.vm_flags", "sf"),
    ("mapping.vm_flags", [1]),
    ("mapping.pages_accessed", None),
    ("mapping.pages_accessed", 1.0),
    ("mapping.length", 2 * PAGE),
    ("mapping.extra", 1),
    ("control.sync", True),
    ("control.result", "refused"),
    ("control.offset", PAGE),
    ("extra", 1),
]


@pytest.mark.parametrize(("path", "value"), LIES)
def test_a_report_that_contradicts_itself_is_not_believed(path: str, value: Any) -> None:
    honest = _report(GOOD, CONTROL)
    _parse(honest)
    with pytest.raises(ProbeError, match="cannot be believed"):
        _parse(_set(honest, path, value), 0)


REFUSED_LIES: list[tuple[str, Any]] = [
    ("errno", None),
    ("errno", 22),
    ("errno", 0),
    ("errno_name", None),
    ("errno_name", "EINVAL"),
    ("vm_flags", ["sf"]),
    ("store_in_file", True),
    ("pages_accessed", 1),
    ("stage", "done"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED_LIES)
def test_a_refusal_that_contradicts_itself_is_not_believed(key: str, value: Any) -> None:
    honest = _report(REFUSED, CONTROL)
    _parse(honest)
    with pytest.raises(ProbeError, match="cannot be believed"):
        _parse(_set(honest, f"mapping.{key}", value), 1)


@pytest.mark.parametrize("key", [*CONTROL])
def test_no_field_may_be_missing(key: str) -> None:
    raw = copy.deepcopy(_report(GOOD, CONTROL))
    del raw["mapping"][key]
    with pytest.raises(ProbeError, match="cannot be believed"):
        _parse(raw, 0)


@pytest.mark.parametrize("status", [1, 2, 3, 4, 5, 127, 139])
def test_the_exit_status_must_fit(status: int) -> None:
    with pytest.raises(ProbeError, match=f"status {status}"):
        _parse(_report(GOOD, CONTROL), status)


_LINE = json.dumps(_report(GOOD, CONTROL)) + "\n"


@pytest.mark.parametrize(
    "stdout",
    [
        *("", "\n", "Segmentation fault\n", "null\n", "[]\n", "{}\n", "[" * 100_000),
        # Each of these is an honest report with one change.
        _LINE + "more\n",
        _LINE.replace('"version": 1', '"version": 1, "version": 1'),
        _LINE.replace('"first_access_ns": 250000', '"first_access_ns": NaN'),
    ],
)
def test_garbage(stdout: str) -> None:
    with pytest.raises(HostError, match="cannot be believed"):
        parse_map_sync(stdout, 0)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostShell:
    monkeypatch.setattr(tools, "TOOLS_FOLDER", tmp_path / "tools")
    return HostShell()


def test_map_sync_builds_once(shell: HostShell, tmp_path: Path) -> None:
    guest = cast(Guest, shell)
    path = str(tmp_path / "it's a file; $(false)")
    first = probe.map_sync(guest, path)
    assert len(shell.commands) == 3  # run, gcc, copy and run
    second = probe.map_sync(guest, path, pages=2, sync=False, map_type="shared", control=False)
    assert len(shell.commands) == 4
    assert judge_map_sync(first).verdict is Verdict.NOT_DAX
    assert (second.path, second.mapping.type, second.mapping.pages_accessed) == (path, "shared", 2)
    assert len(list((tmp_path / "tools").iterdir())) == 1


def test_every_option_arrives(shell: HostShell, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8 * 4096))
    report = probe.map_sync(
        cast(Guest, shell),
        str(file),
        truncate=False,
        read_only=True,
        offset=4096,
        length=8192,
        map_type="shared",
        sync=False,
        unknown_bit=True,
        prot="r",
        control=True,
    )
    mapping = report.mapping
    assert (report.opened, mapping.offset, mapping.length) == ("r", 4096, 8192)
    assert (mapping.flags, mapping.prot, mapping.result) == (0x2000001, "r", "mapped")
    assert report.control is not None
    assert file.stat().st_size == 8 * 4096


def test_a_tool_that_does_not_compile(
    shell: HostShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "_SOURCES", tmp_path)
    (tmp_path / "map_sync.c").write_text("int main(void) { int unused; return 0; }\n")
    with pytest.raises(ProbeError, match=r"does not compile in the guest(.|\n)*unused"):
        probe.map_sync(cast(Guest, shell), str(tmp_path / "file"))
    with pytest.raises(ProbeError, match=r"no_such_tool\.c: No such file"):
        tools.install_tool(cast(Guest, shell), "no_such_tool")


def test_a_compiler_that_takes_too_long(
    shell: HostShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here = shell.run

    def run(command: str, **options: Any) -> CommandResult:
        if "gcc" in command:
            raise TimedOutError("`gcc` did not end within 120 s")
        return run_here(command, **options)

    monkeypatch.setattr(shell, "run", run)
    with pytest.raises(ProbeError, match=r"did not compile guest_tools/map_sync\.c within 120 s"):
        tools.install_tool(cast(Guest, shell), "map_sync")


def test_a_report_of_another_request(shell: HostShell, tmp_path: Path) -> None:
    """A stale or swapped report must not be accepted for the request."""
    guest = cast(Guest, shell)
    other = probe.map_sync(guest, str(tmp_path / "other"))

    class Stale(HostShell):
        def run(
            self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
        ) -> CommandResult:
            return CommandResult(command, 1, other.line, "", other.line.encode(), 0.0)

    with pytest.raises(ProbeError, match="requested was"):
        probe.map_sync(cast(Guest, Stale()), str(tmp_path / "file"))
    with pytest.raises(ProbeError, match="requested was"):
        probe.map_sync(cast(Guest, Stale()), str(tmp_path / "other"), control=False)
