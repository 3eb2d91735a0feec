# SPDX-License-Identifier: GPL-2.0-or-later
"""Fault injection in a guest's kernel, one allocation after the other, and memory leaks after it.

See Linux, Documentation/fault-injection/fault-injection.rst. The stack trace filter limits failures
to allocations below certain functions; guest_tools/fail_nth.c selects the n-th of them through
/proc/self/fail-nth.
"""

from __future__ import annotations

import errno
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from paprscm import timesheet
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, Natural, ToolReport, check_report, read_report
from paprscm.guest.tools import install_tool

Attribute = Literal["failslab", "fail_page_alloc", "fail_make_request"]

LIBNVDIMM: Final = (
    *("nvdimm_bus_lock", "nvdimm_bus_register", "nvdimm_set_config_data", "nd_region_probe"),
    *("nd_dax_probe", "nd_pmem_probe", "nvdimm_namespace_attach_btt"),
)
"""Functions of drivers/nvdimm, which its Makefile links as one object: the code between the first
and the last of them belongs to libnvdimm, too."""

_WATCHER = ("kmemleak_open", "kmemleak_vmalloc")
"""kmemleak's own bookkeeping allocations are exempt: they do not belong to the driver, and kmemleak
copes with failures."""

DEBUGFS = "/sys/kernel/debug"
OPTIONS: Final = (
    *("CONFIG_FAILSLAB", "CONFIG_FAIL_MAKE_REQUEST"),
    *("CONFIG_FAULT_INJECTION_STACKTRACE_FILTER", "CONFIG_DEBUG_KMEMLEAK"),
)
"""Kernel options that this module needs."""
DEBUG_KERNEL: Final = "-p kernel=debug has it, as images/kernel-debug.config asks for it"
"""Hint if the kernel lacks one of them."""
# mm/kmemleak.c, MSECS_MIN_AGE: younger objects are not reported.
_LEAK_AGE_S = 6
_SCAN_LIMIT_S = 180.0


class Round(Fields, frozen=True, array_like=True):
    """One call with one injected failure, or none.

    Attributes:
        number: number of the request to fail.
        failed: the call made that request, and it failed.
        errno: errno of the call; 0: it succeeded.
        duration_us: duration of the call.
    """

    number: Natural
    failed: bool
    errno: Natural
    duration_us: Natural


class FailNthReport(ToolReport, frozen=True, kw_only=True):
    """The rounds of one operation, up to a round without an injected failure.

    Attributes:
        operation: "write", "read", "health", "label", "pwrite" or "fsync".
        rounds: in their order.
        injected: number of rounds with an injected failure.
        ended: the last round had no injected failure.
    """

    tool: Literal["fail_nth"]
    operation: str
    rounds: tuple[Round, ...]
    injected: Natural
    ended: bool

    def __post_init__(self) -> None:
        count, failed = len(self.rounds), [one.failed for one in self.rounds]
        check_report(count > 0, "no round")
        numbers = [one.number for one in self.rounds]
        check_report(numbers == list(range(1, count + 1)), f"the rounds are {numbers}")
        check_report(
            failed == [True] * (count - self.ended) + [False] * self.ended, "a round after the last"
        )
        check_report(self.injected == sum(failed), f"injected is {self.injected}")

    @property
    def exit_status(self) -> int:
        return int(not self.ended or self.rounds[-1].errno > 0)

    @property
    def answers(self) -> dict[str, int]:
        """Number of calls with an injected failure by errno; "0": the call succeeded."""
        names = [errno.errorcode.get(one.errno, "0") for one in self.rounds if one.failed]
        return dict(Counter(names))


def aim(guest: Guest, functions: Sequence[str], *, attribute: Attribute = "failslab") -> None:
    """Limit injected failures to allocations below these functions.

    Args:
        guest: the guest.
        functions: the code between the first and the last of them in memory is included.
        attribute: the kind of failure.

    Raises:
        HostError: the kernel has no function of that name.
    """
    pattern = "|".join((*functions, *_WATCHER))
    lines = guest.succeed(f"grep -E -A 4 ' ({pattern})$' /proc/kallsyms").splitlines()
    symbols = sorted(_symbols(lines))
    writes = [
        f"echo {address:#x} > {kind}-{side}"
        for kind, names in (("require", functions), ("reject", _WATCHER))
        for side, address in zip(("start", "end"), _range(symbols, names), strict=True)
    ]
    guest.succeed(
        f"cd {DEBUGFS}/{attribute} && {' && '.join(writes)} && "
        f"echo 32 > stacktrace-depth && echo 0 > verbose && "
        f"for f in ignore-gfp-wait min-order; do [ ! -e $f ] || echo 0 > $f; done"
    )


def fail_each(
    guest: Guest,
    *words: str,
    undo: Sequence[tuple[str, str]] = (),
    most: int = 1000,
    timeout_s: float = 240.0,
) -> FailNthReport:
    """Repeat a call, and let the next request in it fail each time.

    Args:
        guest: the guest; `aim` selects the requests.
        words: operation and path, the arguments of guest_tools/fail_nth.c.
        undo: paths and texts to write to them after a successful call.
        most: maximum number of rounds.
        timeout_s: time limit of all rounds.

    Raises:
        ProbeError: the report of the tool is invalid.
    """
    tool = str(install_tool(guest, "fail_nth"))
    options = [f"--most={most}", *(f"--undo={path}={text}" for path, text in undo)]
    result = guest.run(shlex.join([tool, *options, *words]), timeout_s=timeout_s)
    return read_report(FailNthReport, result.stdout, result.status, result.stderr)


def expect_errors(report: FailNthReport, allowed: Iterable[int], *, optional: int = 0) -> None:
    """Assert that each injected failure resulted in an error, and that the last call succeeded.

    Args:
        report: returned by `fail_each`.
        allowed: permitted errnos of the call.
        optional: maximum number of calls that may succeed with an injected failure, because the
            allocation was optional.

    Raises:
        ContractError: an error was ignored or has another errno, or the rounds did not end.
        HostError: no failure was injected: nothing was tested.
    """
    name = report.operation
    if not report.ended or report.rounds[-1].errno:
        last = report.rounds[-1]
        raise ContractError(
            f"{name}: errno {last.errno} without an injected failure"
            if report.ended
            else f"{name}: no end after {last.number} failures: {report.answers}"
        )
    failed = [one for one in report.rounds if one.failed]
    if not failed:
        raise HostError(f"{name}: there was no allocation that could fail")
    permitted = set(allowed)
    if wrong := [one for one in failed if one.errno and one.errno not in permitted]:
        raise ContractError(f"{name}: unexpected errno: {wrong[:3]}")
    if len(silent := [one.number for one in failed if not one.errno]) > optional:
        raise ContractError(f"{name}: success in spite of an injected failure: rounds {silent}")


def clear_leaks(guest: Guest) -> None:
    """Clear kmemleak's list of leaks."""
    guest.succeed(f"echo clear > {DEBUGFS}/kmemleak")


def read_leaks(guest: Guest) -> list[str]:
    """Leaked objects reported by kmemleak, each with its call trace.

    kmemleak reports objects that are older than 5 s and did not change between two scans.
    """
    messages = r"kmemleak: \d+ new suspected memory leaks"
    with guest.expect_messages(messages), timesheet.during("waits"):
        text = guest.succeed(
            # kmemleak does not report younger objects.
            f"sleep {_LEAK_AGE_S}; for n in 1 2 3; do echo scan > {DEBUGFS}/kmemleak; done; "
            f"cat {DEBUGFS}/kmemleak",
            timeout_s=_SCAN_LIMIT_S,
        )
    return [part for part in re.split(r"^(?=unreferenced object )", text, flags=re.M) if part]


def _range(symbols: Sequence[tuple[int, str]], names: Iterable[str]) -> tuple[int, int]:
    """Addresses of the first of these functions and of the end of the last one."""
    required = set(names)
    if missing := required - {name for _address, name in symbols}:
        raise HostError(f"the guest's kernel has no function {', '.join(sorted(missing))}")
    last = max(address for address, name in symbols if name in required)
    return (
        min(address for address, name in symbols if name in required),
        min(address for address, _name in symbols if address > last),
    )


def _symbols(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    for line in lines:
        words = line.split()
        if len(words) >= 3:
            yield int(words[0], 16), words[2]
