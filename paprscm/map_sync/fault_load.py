# SPDX-License-Identifier: GPL-2.0-or-later
"""What guest_tools/faults.c reports of page faults under load, parsed strictly and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from paprscm.errors import ContractError, HostError
from paprscm.guest.report import Fields, MalformedError, load_line, unbelievable

OPERATIONS: Final = (
    *("create", "store", "load", "read", "extend", "truncate", "punch", "rename", "replace"),
    *("remove", "sync", "stripe_store", "stripe_load", "stripe_punch", "stripe_extend"),
    *("arena_store", "arena_truncate", "arena_punch"),
)
"""What the threads do: to files of their own, to the pages of a common file that are their own
(stripes), and to a file in which nothing is anybody's (arena)."""

_STATUS_FINE, _STATUS_ERRORS = 0, 1


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What the threads did, and what was not as it must be.

    Attributes:
        seed, sync, threads: as asked for.
        page_size: of the guest, bytes.
        duration_ns: of the load alone, ns.
        operations: how many of each kind succeeded.
        sigbus_expected: stores behind the end of a file of a thread's own: all raised SIGBUS.
        sigbus_arena: stores to what another thread had truncated.
        error_count: how many errors there were.
        errors: the first of them.
    """

    seed: int
    sync: bool
    threads: int
    page_size: int
    duration_ns: int
    operations: dict[str, int]
    sigbus_expected: int
    sigbus_arena: int
    error_count: int
    errors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was in the files afterwards.

    Attributes:
        seed: as asked for.
        files, bytes: that were compared.
        arena_bytes: of the file in which nothing is anybody's.
        error_count: how many errors there were.
        errors: the first of them.
    """

    seed: int
    files: int
    bytes: int
    arena_bytes: int
    error_count: int
    errors: tuple[str, ...]


def parse_load(stdout: str, status: int, stderr: str = "") -> LoadReport:
    """Parse a report of `faults load`; nothing in it may be missing, unknown or contradictory.

    Args:
        stdout: what it printed, one line of JSON.
        status: its exit status.
        stderr: for the message.

    Raises:
        ProbeError: with what is wrong.
    """
    try:
        return _load(load_line(stdout), status)
    except MalformedError as error:
        raise unbelievable("faults", error, stdout, status, stderr) from error


def parse_verify(stdout: str, status: int, stderr: str = "") -> VerifyReport:
    """The same for `faults verify`."""
    try:
        return _verify(load_line(stdout), status)
    except MalformedError as error:
        raise unbelievable("faults", error, stdout, status, stderr) from error


def expect_load(report: LoadReport) -> None:
    """Assert that nothing went wrong, and make sure that everything happened.

    Raises:
        ContractError: there were errors.
        HostError: some kind of operation, or SIGBUS, never happened: the load was none.
    """
    if report.error_count:
        raise ContractError(_listed("under load", report.error_count, report.errors))
    never = [kind for kind, count in report.operations.items() if not count]
    never += [] if report.sigbus_expected else ["SIGBUS behind the end of a file"]
    never += [] if report.sigbus_arena else ["SIGBUS where another thread had truncated"]
    if never:
        raise HostError(f"under load there never was: {', '.join(never)}")


def expect_verified(report: VerifyReport, load: LoadReport) -> None:
    """Assert that all is there that must be, and make sure that it was looked at.

    Raises:
        ContractError: a byte or a file is not as it must be.
        HostError: there was nothing to look at, or it was of another run.
    """
    if report.error_count:
        raise ContractError(_listed("after the load", report.error_count, report.errors))
    if report.seed != load.seed or not report.files or not report.bytes:
        raise HostError(f"nothing was verified: {report}")


def _listed(when: str, count: int, errors: tuple[str, ...]) -> str:
    return f"{when}, {count} errors:\n" + "\n".join(f"    {error}" for error in errors)


def _load(fields: Fields, status: int) -> LoadReport:
    _header(fields, "load")
    counts = Fields(fields.take("operations", dict), "operations")
    operations = {kind: counts.take(kind, int) for kind in OPERATIONS}
    counts.done()
    count, errors = _errors(fields, status)
    report = LoadReport(
        seed=fields.take("seed", int),
        sync=fields.take("sync", bool),
        threads=fields.take("threads", int),
        page_size=fields.take("page_size", int),
        duration_ns=fields.take("duration_ns", int),
        operations=operations,
        sigbus_expected=fields.take("sigbus_expected", int),
        sigbus_arena=fields.take("sigbus_arena", int),
        error_count=count,
        errors=errors,
    )
    fields.done()
    fields.require(
        report.sigbus_expected <= operations["store"] + operations["replace"]
        and report.sigbus_arena <= operations["arena_store"],
        "more SIGBUS than stores",
    )
    return report


def _verify(fields: Fields, status: int) -> VerifyReport:
    _header(fields, "verify")
    count, errors = _errors(fields, status)
    report = VerifyReport(
        seed=fields.take("seed", int),
        files=fields.take("files", int),
        bytes=fields.take("bytes", int),
        arena_bytes=fields.take("arena_bytes", int),
        error_count=count,
        errors=errors,
    )
    fields.done()
    return report


def _header(fields: Fields, verb: str) -> None:
    fields.require(fields.take("tool", str) == "faults", "not of faults")
    fields.require(fields.take("version", int) == 1, "of another version")
    fields.require(fields.take("verb", str) == verb, f"not of {verb}")


def _errors(fields: Fields, status: int) -> tuple[int, tuple[str, ...]]:
    count, errors = fields.take("error_count", int), []
    for raw in fields.take("errors", list):
        each = Fields(raw, "error")
        errors.append(f"thread {each.take('thread', int)}: {each.take('what', str)}")
        each.done()
    fields.require(
        bool(errors) == bool(count) and len(errors) <= count, f"{len(errors)} errors of {count}"
    )
    fields.require(
        status == (_STATUS_ERRORS if count else _STATUS_FINE),
        f"{count} errors do not end with status {status}",
    )
    return count, tuple(errors)
