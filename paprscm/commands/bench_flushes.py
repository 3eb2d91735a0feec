# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmark of flushes a second and their latency, by threads in the guest and by DIMMs."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from paprscm import log
from paprscm.commands.series import Series
from paprscm.emulator.capabilities import sanitizers
from paprscm.errors import ConfigError, ContractError
from paprscm.flush.load import FlushLoadReport, run_flush_load
from paprscm.flush.trace import count_hcalls
from paprscm.guest.environment import Environment
from paprscm.guest.guest import Guest
from paprscm.host.cache import Cache
from paprscm.pmem.regions import find_region
from paprscm.vm import sync_shim
from paprscm.vm.machine import MIB, Machine, Nvdimm

THREADS = (1, 2, 4, 8, 16, 32, 64)
DIMMS = (1, 2, 4, 8)
MOST_THREADS = 256
MOST_DIMMS = 8

SLEEP_MS = 10
"""Minimum sleep of the driver between two polls (papr_scm.c:papr_scm_pmem_flush): QEMU
answers a new flush with H_LONG_BUSY_ORDER_10_MSEC. A kernel sleeps whole ticks, and one more."""

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}

_DIMM_BYTES = 256 * MIB
# Duration of a cell; the guest's program accepts whole seconds only.
_CELL_S = 1
# More flushes than a thread can complete in that time.
_COUNT = 1000 * _CELL_S // SLEEP_MS + 1
_RAW_S = 0.25


@dataclass(frozen=True, kw_only=True)
class RateCell:
    """Figures for a number of threads and of DIMMs; each is the median of the rounds.

    Attributes:
        threads: number of threads in the guest; thread i flushes DIMM i modulo the number of DIMMs.
        dimms: number of DIMMs.
        flushes: completed flushes a second, of all threads.
        latency_ms: duration of the guest's call, by the names of PERCENTILES, ms.
        polls: hypervisor calls of a flush after its first.
        fdatasync: calls a second by the same number of threads on the host, on the same files.
    """

    threads: int
    dimms: int
    flushes: float
    latency_ms: dict[str, float]
    polls: float
    fdatasync: float

    @property
    def bound(self) -> float:
        """Flushes a second if each took only one sleep of 10 ms."""
        return self.threads * 1000 / SLEEP_MS


def parse_numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    """The sorted numbers of a comma-separated list.

    Raises:
        ConfigError: it is empty, or one of them is not from 1 to `most`.
    """
    hint = "numbers separated by commas, such as 1,2,4"
    numbers = set()
    for word in text.split(","):
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= most):
            raise ConfigError(f"{option}={text}: '{word}' is not from 1 to {most}", hint=hint)
        numbers.add(int(word))
    return tuple(sorted(numbers))


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of the values (nearest rank)."""
    return sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]


def measure_flushes(
    environment: Environment, threads: Sequence[int], dimms: Sequence[int], rounds: int
) -> Series:
    """Measure each cell once in each round, followed by fdatasync on the host.

    Hypervisor calls are counted by HCALL_STATS, which is always on, and syncs by the flush shim,
    which takes less than 20 us; there is no other instrumentation.

    Args:
        environment: kernel, userland and QEMU of the guest.
        threads, dimms: each number of threads is measured on each number of DIMMs.
        rounds: number of rounds.

    Raises:
        ContractError: a flush failed, or the host did not sync once for each.
        CapabilityError: the guest's kernel does not count its hcalls.
    """
    nvdimms = tuple(Nvdimm(slot=slot, size_bytes=_DIMM_BYTES) for slot in range(max(dimms)))
    machine = Machine(nvdimms=nvdimms)
    cells = list(itertools.product(dimms, threads))
    values: dict[str, list[float]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    began = time.time()
    before = sanitizers(environment.qemu.path)
    library = sync_shim.build(Cache(environment.settings.cache_dir))
    with (
        tempfile.TemporaryDirectory(prefix="paprscm-bench-") as folder,
        sync_shim.Shim(library, before=before) as watcher,
        environment.guest(machine, folder=Path(folder), shim=watcher) as guest,
        log.quiet(),
        log.progress("flushes", rounds * len(cells), "cells") as bar,
    ):
        bench = _Bench(guest, len(machine.nvdimms))
        # Warm-up: translates the program, and starts QEMU's threads.
        bench.flushes(max(threads), max(dimms))
        for number, (n_dimms, n_threads) in enumerate(cells * rounds, start=1):
            name = _name(n_threads, n_dimms)
            report, polls = bench.flushes(n_threads, n_dimms)
            values[f"{name} flushes"].append(len(report.calls) / report.duration_s)
            values[f"{name} fdatasync"].append(bench.fdatasyncs(n_threads, n_dimms))
            others[f"{name} polls"].append(polls)
            durations_ms = [call.duration_s * 1000 for call in report.calls]
            for mark, percent in PERCENTILES.items():
                others[f"{name} {mark} ms"].append(percentile(durations_ms, percent))
            bar.update(number)
    dimensions = {**environment.describe(), "dimm_mib": str(_DIMM_BYTES // MIB)}
    results = {"threads": list(threads), "dimms": list(dimms), **others}
    return Series(dimensions, began, "1/s", dict(values), results)


def cells_of(series: Series) -> list[RateCell]:
    """The cells of a series, by DIMMs and threads."""

    def median(name: str) -> float:
        values: list[float] = series.values.get(name) or series.found[name]
        return statistics.median(values)

    return [
        RateCell(
            threads=threads,
            dimms=dimms,
            flushes=median(f"{name} flushes"),
            latency_ms={mark: median(f"{name} {mark} ms") for mark in PERCENTILES},
            polls=median(f"{name} polls"),
            fdatasync=median(f"{name} fdatasync"),
        )
        for dimms in series.found["dimms"]
        for threads in series.found["threads"]
        for name in (_name(threads, dimms),)
    ]


def flush_title(series: Series) -> str:
    """Return a title of two lines: the measurement and its environment."""
    names, rounds = series.environment, len(next(iter(series.values.values())))
    subject = "writes to deep_flush by threads in the guest"
    return (
        f"Flushes: {subject}, {rounds} round{'s' if rounds > 1 else ''}\n"
        f"QEMU {names['qemu']}, Linux {names['kernel']}, {names['accel']}"
    )


def flush_table(series: Series) -> Table:
    """The series for a terminal of 80 columns."""
    table = Table(title=flush_title(series), box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        f"bound: threads / {SLEEP_MS} ms, the driver's sleep in each flush;\n"
        "fdatasync: on the same files, by the same number of threads on the host"
    )
    rates = ("DIMMs", "threads", "flushes\n/s", "bound\n/s")
    latencies = (f"{mark}\nms" for mark in PERCENTILES)
    for head in (*rates, *latencies, "polls", "fdatasync\n/s"):
        table.add_column(head, justify="right")
    for cell in (cells := cells_of(series)):
        if cell.threads == cells[0].threads:
            table.add_section()
        table.add_row(
            str(cell.dimms),
            str(cell.threads),
            f"{cell.flushes:,.0f}",
            f"{cell.bound:,.0f}",
            *(f"{cell.latency_ms[mark]:.1f}" for mark in PERCENTILES),
            f"{cell.polls:.2f}",
            f"{cell.fdatasync:,.0f}",
        )
    return table


class _Bench:
    """A guest; flushes, hcalls and syncs are compared after each cell."""

    def __init__(self, guest: Guest, dimms: int) -> None:
        self._guest = guest
        self._slots = range(dimms)
        self._targets = [f"{find_region(guest, slot).device}/deep_flush" for slot in self._slots]
        self._hcalls, self._syncs = count_hcalls(guest), self._counts()

    def flushes(self, threads: int, dimms: int) -> tuple[FlushLoadReport, float]:
        """Run one cell; return its flushes, and the mean number of polls of a flush."""
        done = run_flush_load(
            self._guest,
            "deep_flush",
            self._targets[:dimms],
            threads=threads,
            count=_COUNT,
            limit_s=_CELL_S,
        )
        done.expect_success()
        hcalls, syncs = count_hcalls(self._guest), self._counts()
        flushed = [len(done.on(slot)) if slot < dimms else 0 for slot in self._slots]
        synced = [now - before for now, before in zip(syncs, self._syncs, strict=True)]
        calls = hcalls - self._hcalls
        self._hcalls, self._syncs = hcalls, syncs
        if synced != flushed or calls < sum(flushed):
            raise ContractError(
                f"{_name(threads, dimms)}: by slot, {flushed} flushes and {synced} syncs; "
                f"the guest made {calls} hypervisor calls"
            )
        return done, calls / len(done.calls) - 1

    def fdatasyncs(self, threads: int, dimms: int) -> float:
        """fdatasync calls a second by the same number of threads on the host, on the same files."""
        files = [self._guest.vm.file(slot) for slot in self._slots[:dimms]]
        return fdatasyncs(files, threads, _RAW_S)

    def _counts(self) -> list[int]:
        return [self._guest.vm.syncs(slot).counts().ended for slot in self._slots]


def fdatasyncs(files: Sequence[Path], threads: int, limit_s: float) -> float:
    """fdatasync calls a second by threads of this process, spread over the files."""
    handles = [os.open(file, os.O_RDWR) for file in files]
    start = threading.Barrier(threads + 1)

    def work(handle: int) -> int:
        count = 0
        start.wait()
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            os.fdatasync(handle)
            count += 1
        return count

    try:
        with ThreadPoolExecutor(threads) as pool:
            counts = [pool.submit(work, handles[i % len(handles)]) for i in range(threads)]
            start.wait()
            began = time.monotonic()
            total = sum(count.result() for count in counts)
            return total / (time.monotonic() - began)
    finally:
        for handle in handles:
            os.close(handle)


def _name(threads: int, dimms: int) -> str:
    return f"{threads} threads {dimms} DIMMs"
