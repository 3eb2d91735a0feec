# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of guest_tools/faults.c on page faults under load, and their checks."""

from __future__ import annotations

from typing import Final, Literal

from paprscm.errors import ContractError, HostError
from paprscm.guest.report import Natural, ToolReport, check_report

OPERATIONS: Final = (
    *("create", "store", "load", "read", "extend", "truncate", "punch", "rename", "replace"),
    *("remove", "sync", "stripe_store", "stripe_load", "stripe_punch", "stripe_extend"),
    *("arena_store", "arena_truncate", "arena_punch"),
)
"""What the threads do: to files of their own, to the pages of a common file that are their own
(stripes), and to a file in which nothing is anybody's (arena)."""


class _FaultsReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["faults"]
    seed: Natural
    error_count: Natural
    errors: tuple[str, ...]

    def __post_init__(self) -> None:
        shown, count = len(self.errors), self.error_count
        check_report(bool(shown) == bool(count) and shown <= count, f"{shown} errors of {count}")

    @property
    def exit_status(self) -> int:
        return int(self.error_count > 0)


class FaultLoadReport(_FaultsReport, frozen=True, kw_only=True):
    """Operations of the threads, and the errors they found.

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

    verb: Literal["load"]
    sync: bool
    threads: Natural
    page_size: Natural
    duration_ns: Natural
    operations: dict[str, Natural]
    sigbus_expected: Natural
    sigbus_arena: Natural

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = self.operations
        check_report(counts.keys() == set(OPERATIONS), f"operations are {sorted(counts)}")
        check_report(
            self.sigbus_expected <= counts["store"] + counts["replace"]
            and self.sigbus_arena <= counts["arena_store"],
            "more SIGBUS than stores",
        )


class FaultVerifyReport(_FaultsReport, frozen=True, kw_only=True):
    """Contents of the files after the load.

    Attributes:
        seed: as asked for.
        files, bytes: that were compared.
        arena_bytes: of the file in which nothing is anybody's.
        error_count: how many errors there were.
        errors: the first of them.
    """

    verb: Literal["verify"]
    files: Natural
    bytes: Natural
    arena_bytes: Natural


def expect_load(report: FaultLoadReport) -> None:
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


def expect_verified(report: FaultVerifyReport, load: FaultLoadReport) -> None:
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
