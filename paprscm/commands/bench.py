# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs of `paprscm bench`: measure, record the series and print its medians."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from rich.console import Console, Group, RenderableType

from paprscm import log, settings
from paprscm.commands import (
    bench_flushes,
    bench_hcalls,
    bench_starts,
    bench_suite,
    flush_plot,
    suite_time,
)
from paprscm.commands.series import Series, append_series, read_series
from paprscm.debian.packages import Archive
from paprscm.emulator.binary import resolve
from paprscm.errors import ConfigError, HostError
from paprscm.guest.environment import prepare
from paprscm.paths import SUITE_VARIABLE
from paprscm.settings import Settings


def start(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Time starts of guests."""
    _check_rounds(arguments)
    if arguments.warm_only and chosen.start == "cold":
        raise ConfigError("--warm-only with start=cold", hint="omit one of them")
    environment = prepare(chosen, make_snapshot=True)
    failed = arguments.series.parent / "bench-start-failed"
    series, leaks = bench_starts.measure_starts(
        environment, arguments.n, warm_only=arguments.warm_only, failed=failed
    )
    _show(arguments, series, bench_starts.start_table)
    if leaks.problems:
        raise HostError(str(leaks))
    if not arguments.json:
        print(leaks)
    return 0


def suite(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Run the suite's jobs in each mode and compare them."""
    _check_rounds(arguments)
    os.environ[SUITE_VARIABLE] = "1"
    modes = bench_suite.parse_modes(arguments.modes, start=chosen.start)
    values = {name: getattr(arguments, name) for name in settings.names()}
    plan = bench_suite.select_modes(
        prepare(chosen, make_snapshot=True),
        modes,
        tests=arguments.tests,
        chosen={name: value for name, value in values.items() if value is not None},
        words=arguments.rest,
    )
    keep = arguments.series.parent / "bench-suite" if arguments.keep else None
    series, doubts = bench_suite.measure_suite(plan, arguments.n, keep=keep)
    before = suite_time.comparable(series, read_series(arguments.series))
    _show(
        arguments,
        series,
        lambda series: Group(
            bench_suite.suite_table(series), suite_time.time_table(series, before)
        ),
    )
    for doubt in doubts:
        print(f"paprscm: {doubt}", file=sys.stderr)
    if not doubts and not arguments.json:
        print("every test has the same status in all jobs; nothing left behind")
    if keep:
        log.logger.info("results of the jobs: %s", keep)
    return 1 if doubts else 0


def hcall(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Measure hcalls and flushes per second without a guest."""
    _check_rounds(arguments)
    qemu = resolve(Archive.of(chosen), chosen.qemu)
    _show(
        arguments, bench_hcalls.measure_hcalls(qemu, chosen, arguments.n), bench_hcalls.hcall_table
    )
    return 0


def flush(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Measure flushes per second in a guest, by threads and DIMMs."""
    _check_rounds(arguments)
    threads = bench_flushes.parse_numbers(
        "--threads", arguments.threads, bench_flushes.MOST_THREADS
    )
    dimms = bench_flushes.parse_numbers("--dimms", arguments.dimms, bench_flushes.MOST_DIMMS)
    flush_plot.check_plot_file(arguments.plot)
    environment = prepare(chosen, make_snapshot=True)
    series = bench_flushes.measure_flushes(environment, threads, dimms, arguments.n)
    _show(arguments, series, bench_flushes.flush_table)
    flush_plot.draw_plot(series, arguments.plot)
    log.logger.info("plot: %s", arguments.plot)
    return 0


def _check_rounds(arguments: argparse.Namespace) -> None:
    if arguments.n < 1:
        raise ConfigError("-n must be at least 1")


def _show(
    arguments: argparse.Namespace,
    series: Series,
    table: Callable[[Series], RenderableType],
) -> None:
    """Record a series and print it."""
    append_series(series, arguments.series)
    if arguments.json:
        print(series.as_json())
    else:
        Console().print(table(series))
