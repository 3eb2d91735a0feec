# SPDX-License-Identifier: GPL-2.0-or-later
"""Failures on request in a guest's kernel: aimed, one after the other, and what they left behind.

Linux, Documentation/fault-injection/fault-injection.rst. The stack trace filter lets only those
allocations fail that are made below certain functions; which of them, a thread says of itself
(guest_tools/fail_nth.c).
"""

from __future__ import annotations

import errno
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, Natural, ToolReport, check_report, read_report
from paprscm.guest.tools import compile_tool

Attribute = Literal["failslab", "fail_page_alloc", "fail_make_request"]

LIBNVDIMM: Final = (
    *("nvdimm_bus_lock", "nvdimm_bus_register", "nvdimm_set_config_data", "nd_region_probe"),
    *("nd_dax_probe", "nd_pmem_probe", "nvdimm_namespace_attach_btt"),
)
"""Functions of drivers/nvdimm, which is linked as one piece (its Makefile): what lies between the
first and the last of them is libnvdimm's as well."""

_WATCHER = ("kmemleak_open", "kmemleak_vmalloc")
"""kmemleak's own bookkeeping allocations are exempt: they do not belong to the driver, and kmemleak
copes with failures."""

DEBUGFS = "/sys/kernel/debug"
OPTIONS: Final = (
    *("CONFIG_FAILSLAB", "CONFIG_FAIL_MAKE_REQUEST"),
    *("CONFIG_FAULT_INJECTION_STACKTRACE_FILTER", "CONFIG_DEBUG_KMEMLEAK"),
)
"""Options that a kernel must have for this module."""
DEBUG_KERNEL: Final = "-p kernel=debug has it, as images/kernel-debug.config asks for it"
"""The hint where it lacks one."""
# mm/kmemleak.c, MSECS_MIN_AGE: younger objects are not reported.
_LEAK_AGE_S = 6
_SCAN_LIMIT_S = 180.0


class Round(Fields, frozen=True, array_like=True):
    """One call, while something failed in the kernel or not.

    Attributes:
        number: the number of the request that was to fail.
        failed: whether there was one.
        errno: what the call said; 0: it succeeded.
        duration_us: of the call.
    """

    number: Natural
    failed: bool
    errno: Natural
    duration_us: Natural


class FailNthReport(ToolReport, frozen=True, kw_only=True):
    """The rounds of one operation, until nothing was left to fail.

    Attributes:
        operation: "write", "read", "health", "label", "pwrite" or "fsync".
        rounds: in their order.
        injected: rounds in which something failed.
        ended: the last round is one in which nothing failed.
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
        """Number of answers to a failure by errno; "0": the call succeeded."""
        names = [errno.errorcode.get(one.errno, "0") for one in self.rounds if one.failed]
        return dict(Counter(names))


def aim(guest: Guest, functions: Sequence[str], *, attribute: Attribute = "failslab") -> None:
    """From now on, only allocations that are made below these functions can fail.

    Args:
        guest: where.
        functions: what lies between the first and the last of them in memory counts as well.
        attribute: what is to fail.

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
    """Make a call again and again, and let another request in it fail each time.

    Args:
        guest: where; `aim` says what can fail.
        words: operation and path, as guest_tools/fail_nth.c takes them.
        undo: what undoes a success: paths, and what is written there.
        most: rounds, at the most.
        timeout_s: of all of them.

    Raises:
        ProbeError: the tool gave no report that can be believed.
    """
    tool = str(compile_tool(guest, "fail_nth"))
    options = [f"--most={most}", *(f"--undo={path}={text}" for path, text in undo)]
    result = guest.run(shlex.join([tool, *options, *words]), timeout_s=timeout_s)
    return read_report(FailNthReport, result.stdout, result.status, result.stderr)


def expect_errors(report: FailNthReport, allowed: Iterable[int], *, optional: int = 0) -> None:
    """Assert that what failed in the kernel came out as an error, and that all works without.

    Args:
        report: of `fail_each`.
        allowed: the errno that may come out.
        optional: with so many failures the call may succeed anyway: what could not be
            allocated was not needed.

    Raises:
        ContractError: an error was swallowed or is another one, or it did not come to its end.
        HostError: nothing failed: nothing was tested.
    """
    what = report.operation
    if not report.ended or report.rounds[-1].errno:
        last = report.rounds[-1]
        raise ContractError(
            f"{what}: without a failure it ends with errno {last.errno}"
            if report.ended
            else f"{what}: there is no end after {last.number} failures: {report.answers}"
        )
    failed = [one for one in report.rounds if one.failed]
    if not failed:
        raise HostError(f"{what}: there was no allocation that could fail")
    wanted = set(allowed)
    if wrong := [one for one in failed if one.errno and one.errno not in wanted]:
        raise ContractError(f"{what}: an errno that does not fit: {wrong[:3]}")
    if len(silent := [one.number for one in failed if not one.errno]) > optional:
        raise ContractError(f"{what}: succeeds though something failed: rounds {silent}")


def clear_leaks(guest: Guest) -> None:
    """Ignore the leaks up to now."""
    guest.succeed(f"echo clear > {DEBUGFS}/kmemleak")


def read_leaks(guest: Guest) -> list[str]:
    """Objects without a pointer to them, each with its call trace.

    kmemleak tells what is older than 5 s and did not change between two scans.
    """
    with guest.expect_messages(r"kmemleak: \d+ new suspected memory leaks"):
        text = guest.succeed(
            f"sleep {_LEAK_AGE_S}; for n in 1 2 3; do echo scan > {DEBUGFS}/kmemleak; done; "
            f"cat {DEBUGFS}/kmemleak",
            timeout_s=_SCAN_LIMIT_S,
        )
    return [part for part in re.split(r"^(?=unreferenced object )", text, flags=re.M) if part]


def _range(symbols: Sequence[tuple[int, str]], names: Iterable[str]) -> tuple[int, int]:
    """From the first of these functions to the end of the last one."""
    wanted = set(names)
    if missing := wanted - {name for _address, name in symbols}:
        raise HostError(f"the guest's kernel has no function {', '.join(sorted(missing))}")
    last = max(address for address, name in symbols if name in wanted)
    return (
        min(address for address, name in symbols if name in wanted),
        min(address for address, _name in symbols if address > last),
    )


def _symbols(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    for line in lines:
        words = line.split()
        if len(words) >= 3:
            yield int(words[0], 16), words[2]
