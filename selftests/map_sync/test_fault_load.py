# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of faults: strict parsing, and verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from paprscm.errors import ContractError, HostError
from paprscm.guest.report import ProbeError, read_report
from paprscm.map_sync.fault_load import (
    OPERATIONS,
    FaultLoadReport,
    FaultVerifyReport,
    expect_load,
    expect_verified,
)

ERRORS = ["thread 3: load a/t3-1: byte 0x10 is 0x00, not 0x41"]


def load(**changes: Any) -> dict[str, Any]:
    """A report of a load without errors."""
    return {
        "tool": "faults",
        "version": 1,
        "verb": "load",
        "seed": 9,
        "sync": True,
        "threads": 8,
        "page_size": 65536,
        "duration_ns": 1000,
        "sigbus_expected": 5,
        "sigbus_arena": 6,
        "operations": dict.fromkeys(OPERATIONS, 10),
        "error_count": 0,
        "errors": [],
        **changes,
    }


def verify(**changes: Any) -> dict[str, Any]:
    """A report of a verification without errors."""
    return {
        "tool": "faults",
        "version": 1,
        "verb": "verify",
        "seed": 9,
        "files": 30,
        "bytes": 1000,
        "arena_bytes": 0,
        "error_count": 0,
        "errors": [],
        **changes,
    }


def loaded(raw: dict[str, Any]) -> Any:
    return read_report(FaultLoadReport, json.dumps(raw) + "\n", 1 if raw["error_count"] else 0)


def verified(raw: dict[str, Any]) -> Any:
    return read_report(FaultVerifyReport, json.dumps(raw) + "\n", 1 if raw["error_count"] else 0)


def test_good_reports() -> None:
    report = loaded(load())
    expect_load(report)
    expect_verified(verified(verify()), report)
    assert (report.seed, report.sync, report.operations["store"]) == (9, True, 10)


def test_errors_break_the_contract() -> None:
    with pytest.raises(ContractError, match=r"under load, 5 errors:\n.*thread 3: load a/t3-1"):
        expect_load(loaded(load(error_count=5, errors=ERRORS)))
    with pytest.raises(ContractError, match=r"after the load, 1 errors"):
        expect_verified(verified(verify(error_count=1, errors=ERRORS)), loaded(load()))


@pytest.mark.parametrize("kind", OPERATIONS)
def test_each_operation_must_have_happened(kind: str) -> None:
    counts = {**load()["operations"], kind: 0}
    changes = {"sigbus_arena": 0} if kind == "arena_store" else {}
    with pytest.raises(HostError, match=rf"the load never included: {kind}\b"):
        expect_load(loaded(load(operations=counts, **changes)))


@pytest.mark.parametrize("key", ["sigbus_expected", "sigbus_arena"])
def test_each_sigbus_must_have_happened(key: str) -> None:
    with pytest.raises(HostError, match="the load never included: SIGBUS"):
        expect_load(loaded(load(**{key: 0})))


@pytest.mark.parametrize("changes", [{"files": 0}, {"bytes": 0}, {"seed": 8}])
def test_something_must_have_been_verified(changes: dict[str, int]) -> None:
    with pytest.raises(HostError, match="nothing was verified"):
        expect_verified(verified(verify(**changes)), loaded(load()))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(tool="other"),
        lambda raw: raw.update(version=2),
        lambda raw: raw.update(verb="verify"),
        lambda raw: raw.update(more=1),
        lambda raw: raw.pop("threads"),
        lambda raw: raw.update(sync=1),
        lambda raw: raw.update(seed=-1),
        lambda raw: raw.update(sigbus_expected=21),
        lambda raw: raw.update(sigbus_arena=11),
        lambda raw: raw["operations"].pop("punch"),
        lambda raw: raw["operations"].update(other=1),
        lambda raw: raw["operations"].update(punch="10"),
        lambda raw: raw.update(errors=ERRORS),
        lambda raw: raw.update(error_count=1),
        lambda raw: raw.update(error_count=1, errors=ERRORS),
    ],
)
def test_bad_load_reports(change: Callable[[dict[str, Any]], object]) -> None:
    raw = load()
    change(raw)
    with pytest.raises(ProbeError, match="cannot be believed"):
        read_report(FaultLoadReport, json.dumps(raw) + "\n", 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(verb="load"),
        lambda raw: raw.update(more=1),
        lambda raw: raw.pop("files"),
        lambda raw: raw.update(files=None),
        lambda raw: raw.update(error_count=1, errors=[{"thread": 1}]),
        lambda raw: raw.update(error_count=1, errors=[1]),
        lambda raw: raw.update(error_count=1, errors=ERRORS * 2),
    ],
)
def test_bad_verify_reports(change: Callable[[dict[str, Any]], object]) -> None:
    raw = verify()
    change(raw)
    with pytest.raises(ProbeError, match="cannot be believed"):
        read_report(FaultVerifyReport, json.dumps(raw) + "\n", 1 if raw["error_count"] else 0)


@pytest.mark.parametrize(
    ("text", "status"),
    [("", 0), ("Bus error\n", 135), (json.dumps(load()) + "\n", 1), ("{}\n{}\n", 0)],
)
def test_no_reports(text: str, status: int) -> None:
    with pytest.raises(ProbeError, match="cannot be believed"):
        read_report(FaultLoadReport, text, status)
