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
"""Operations of the threads: on files of their own, on their own pages of a common file (stripes),
and on a file in which all threads access all pages (arena)."""


class _FaultsReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["faults"]
    seed: Natural
    error_count: Natural
    errors: tuple[str, ...]

    def __post_init__(self) -> None:
        listed, count = len(self.errors), self.error_count
        check_report(bool(listed) == bool(count) and listed <= count, f"{listed} errors of {count}")

    @property
    def exit_status(self) -> int:
        return int(self.error_count > 0)


class FaultLoadReport(_FaultsReport, frozen=True, kw_only=True):
    """Operations of the threads, and the errors that they detected.

    Attributes:
        seed, sync, threads: as requested.
        page_size: page size of the guest, bytes.
        duration_ns: duration of the load alone, ns.
        operations: number of successful operations of each kind.
        sigbus_expected: stores beyond the end of a thread's own file: each raised SIGBUS.
        sigbus_arena: SIGBUS after a truncation by another thread.
        error_count: number of errors.
        errors: the first errors.
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
        seed: as requested.
        files, bytes: number of compared files and bytes.
        arena_bytes: number of compared bytes of the arena file.
        error_count: number of errors.
        errors: the first errors.
    """

    verb: Literal["verify"]
    files: Natural
    bytes: Natural
    arena_bytes: Natural


def expect_load(report: FaultLoadReport) -> None:
    """Assert that there was no error, and that every kind of operation happened.

    Raises:
        ContractError: there were errors.
        HostError: a kind of operation, or SIGBUS, never happened: the load was incomplete.
    """
    if report.error_count:
        raise ContractError(_listed("under load", report.error_count, report.errors))
    never = [kind for kind, count in report.operations.items() if not count]
    never += [] if report.sigbus_expected else ["SIGBUS beyond the end of a file"]
    never += [] if report.sigbus_arena else ["SIGBUS after a truncation by another thread"]
    if never:
        raise HostError(f"the load never included: {', '.join(never)}")


def expect_verified(report: FaultVerifyReport, load: FaultLoadReport) -> None:
    """Assert that the files have the expected contents, and that they were compared.

    Raises:
        ContractError: a byte or a file differs.
        HostError: nothing was compared, or the files of another run.
    """
    if report.error_count:
        raise ContractError(_listed("after the load", report.error_count, report.errors))
    if report.seed != load.seed or not report.files or not report.bytes:
        raise HostError(f"nothing was verified: {report}")


def _listed(when: str, count: int, errors: tuple[str, ...]) -> str:
    return f"{when}, {count} errors:\n" + "\n".join(f"    {error}" for error in errors)
