# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmark of the suite: cold, warm, and warm in parallel; durations and statuses."""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from paprscm import log
from paprscm.commands.leaks import LeakWatch
from paprscm.commands.series import Series
from paprscm.commands.suite_time import JobTime, account, time_values
from paprscm.errors import CapabilityError, ConfigError, HostError
from paprscm.guest.environment import Environment
from paprscm.host.keeper import PR_SET_PDEATHSIG
from paprscm.host.resources import compute_budget, read_resources
from paprscm.results.record import FILE, read_record

MODES = ("cold", "warm", "parallel")
# Avocado gives a test 60 s to end its guests (avocado.cfg).
_INTERRUPT_LIMIT_S = 90.0
_LAST_LINES = 15


@dataclass(frozen=True)
class JobTest:
    """Result of one test: status, duration, and the reason if it did not pass."""

    status: str
    duration_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One `avocado run`.

    Attributes:
        mode: one of MODES.
        duration_s: from its start to its end.
        tests: result of each test, by name.
        restored, booted: number of restored and of booted guests.
        time: where the time went.
    """

    mode: str
    duration_s: float
    tests: dict[str, JobTest]
    restored: int
    booted: int
    time: JobTime = field(default_factory=JobTime)

    @property
    def statuses(self) -> dict[str, int]:
        """Number of tests by status, the most frequent one first."""
        counted = Counter(sorted(test.status for test in self.tests.values()))
        return dict(counted.most_common())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Jobs to run.

    Attributes:
        environment: kernel, userland and QEMU of the guests.
        modes: some of MODES.
        tests: files or test names.
        chosen: settings from the command line, by name.
        words: options of `avocado run`.
        concurrent: number of concurrent tests in the mode "parallel".
    """

    environment: Environment
    modes: tuple[str, ...]
    tests: tuple[str, ...]
    chosen: Mapping[str, str]
    words: tuple[str, ...]
    concurrent: int

    def argv(self, mode: str, *, results: Path, scratch: Path) -> list[str]:
        """The command line of one job."""
        start = "cold" if mode == "cold" else "auto"
        settings = {**self.chosen, "start": start, "scratch_dir": str(scratch)}
        return [
            *(str(Path(sys.executable).with_name("avocado")), "run", *self.words),
            *(f"--max-parallel-tasks={self.slots(mode)}", "--job-results-dir", str(results)),
            *self.tests,
            *(word for name, value in settings.items() for word in ("-p", f"{name}={value}")),
        ]

    def slots(self, mode: str) -> int:
        """The number of concurrent tests."""
        return self.concurrent if mode == "parallel" else 1

    def title(self, mode: str) -> str:
        """Description of the mode."""
        if mode == "parallel":
            return f"warm, {self.concurrent} concurrent"
        return f"{mode}, sequential"


def parse_modes(text: str, *, start: str = "auto") -> tuple[str, ...]:
    """The modes of a comma-separated list.

    Args:
        text: the list.
        start: the setting `start`.

    Raises:
        ConfigError: a mode is unknown, or all modes are warm and `start` is cold.
    """
    modes = tuple(dict.fromkeys(word for word in text.split(",") if word))
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"there is no mode '{mode}'", hint="some of " + ",".join(MODES))
    if not modes:
        raise ConfigError("--modes is empty", hint="some of " + ",".join(MODES))
    if start == "cold" and "cold" not in modes:
        raise ConfigError(f"--modes={text} with start=cold", hint="omit one of them")
    return modes


def select_modes(
    environment: Environment,
    modes: tuple[str, ...],
    *,
    tests: Iterable[str],
    chosen: Mapping[str, str],
    words: Iterable[str] = (),
) -> Plan:
    """Select the modes that can run here; without a snapshot, the cold mode only.

    Raises:
        CapabilityError: none can run.
    """
    if environment.snapshot is None and modes != ("cold",):
        cold = environment.settings.start == "cold"
        reason = "start=cold" if cold else "there is no snapshot to restore guests from"
        if "cold" not in modes:
            raise CapabilityError(reason)
        log.logger.info("only the mode 'cold' is measured: %s", reason)
        modes = ("cold",)
    return Plan(
        environment=environment,
        modes=modes,
        tests=tuple(tests),
        chosen=chosen,
        words=tuple(words),
        concurrent=compute_budget(read_resources(), environment.settings).tests,
    )


def measure_suite(plan: Plan, rounds: int, *, keep: Path | None = None) -> tuple[Series, list[str]]:
    """Run the suite in each mode and round.

    Args:
        plan: the jobs.
        rounds: number of rounds; each begins with another mode.
        keep: folder for the jobs' results; None: remove them.

    Returns:
        The figures, and the reasons to doubt them, one sentence each: a test with different
        statuses, a lost snapshot, leaks of a job.

    Raises:
        HostError: a job ran no test.
    """
    jobs: list[Job] = []
    doubts: list[str] = []
    began = time.time()
    with tempfile.TemporaryDirectory(
        prefix="paprscm-bench-",
        dir=plan.environment.settings.scratch_dir,
        # After a second interrupt the keepers of guests may still be cleaning up.
        ignore_cleanup_errors=True,
    ) as name:
        scratch = Path(name) / "scratch"
        scratch.mkdir()
        watch = LeakWatch(scratch)
        for number in range(rounds):
            for mode in _turned(plan.modes, number):
                title = f"round {number + 1} of {rounds}: {plan.title(mode)}"
                folder = (keep or Path(name)) / f"{began:.0f}-{number + 1}-{mode}"
                folder.mkdir(parents=True)
                before, lives = watch.look(), _snapshot_id(plan.environment)
                with log.step(title):
                    jobs.append(_job(plan, mode, folder, scratch))
                leaks = watch.compare(before)
                doubts += [f"{title}: left behind: {problem}" for problem in leaks.problems]
                if _snapshot_id(plan.environment) != lives:
                    doubts.append(f"{title}: the snapshot was lost, so later guests were booted")
    doubts += status_differences(jobs)
    return _series(plan, began, jobs, doubts), doubts


def status_differences(jobs: Sequence[Job]) -> list[str]:
    """A sentence for each test with different statuses in the jobs."""
    differences = []
    for name in dict.fromkeys(name for job in jobs for name in job.tests):
        ends: dict[str, list[str]] = {}
        reasons = []
        for job in jobs:
            test = job.tests.get(name, JobTest("(not run)", 0.0, ""))
            ends.setdefault(job.mode, []).append(test.status)
            if test.reason and test.status != "PASS":
                reasons.append(f"{test.status} in {job.mode}: {test.reason}")
        if len({status for statuses in ends.values() for status in statuses}) > 1:
            statuses_text = ", ".join(
                f"{mode} {' '.join(statuses)}" for mode, statuses in ends.items()
            )
            reason = f" ({reasons[0]})" if reasons else ""
            differences.append(f"{name} has different statuses: {statuses_text}{reason}")
    return differences


def suite_table(series: Series) -> Table:
    """The series for a terminal."""
    count = max(map(len, series.values.values()))
    table = Table(title_justify="left")
    rounds = f"medians of {count} rounds" if count > 1 else "1 round"
    table.title = f"the suite, {rounds}, seconds, QEMU {series.environment['qemu']}"
    table.add_column("mode", no_wrap=True)
    spread = ["min-max"] if count > 1 else []
    for name in ("job", *spread, "all tests", "one test"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("guests")
    table.add_column("tests")
    summary = series.summary()
    for mode, title in series.found["modes"].items():
        job = summary[f"{mode} job"]
        table.add_row(
            title,
            f"{job['median']:.1f}",
            *(f"{job['min']:.1f}-{job['max']:.1f}" for _ in spread),
            f"{summary[f'{mode} all tests']['median']:.1f}",
            f"{summary[f'{mode} one test']['median']:.2f}",
            _once(series.found["guests"][mode]),
            _once(series.found["statuses"][mode]),
        )
    return table


def read_job(folder: Path, mode: str, began_s: float, ended_s: float, *, slots: int = 1) -> Job:
    """Read a job's results.

    Args:
        folder: parent of the job's folder.
        mode: mode of the job.
        began_s, ended_s: start and end of the job, time.monotonic().
        slots: number of concurrent tests.

    Raises:
        HostError: the job ran no test.
    """
    jobs = list(folder.glob(f"job-*/{FILE}"))
    tests = read_record(jobs[0]).tests if jobs else ()
    if not tests:
        last_lines = (
            (folder / "avocado.log").read_text(errors="replace").splitlines()[-_LAST_LINES:]
        )
        lines = "\n".join(f"    {line}" for line in last_lines)
        raise HostError(f"the job ran no test; its last lines:\n{lines}")
    results, restored, booted = {}, 0, 0
    for test in tests:
        reason = test.reason.partition("\n")[0]
        duration_s = test.times.duration_s if test.times else 0.0
        results[test.name] = JobTest(test.status, duration_s, reason)
        starts = [metric.dimensions for metric in test.metrics if metric.name == "guest_start"]
        warm = {start["guest"] for start in starts if start["mark"] == "restored"}
        restored += len(warm)
        booted += len({start["guest"] for start in starts} - warm)
    return Job(
        mode=mode,
        duration_s=ended_s - began_s,
        tests=results,
        restored=restored,
        booted=booted,
        time=account(tests, began_s, ended_s, slots),
    )


def _turned(modes: tuple[str, ...], number: int) -> tuple[str, ...]:
    first = number % len(modes)
    return modes[first:] + modes[:first]


def _snapshot_id(environment: Environment) -> int | None:
    """A number that changes when the snapshot is dropped or made anew."""
    if environment.snapshot is None or not environment.snapshot.folder.exists():
        return None
    return environment.snapshot.folder.stat().st_ino


def _series(plan: Plan, began: float, jobs: Sequence[Job], doubts: Sequence[str]) -> Series:
    values: dict[str, list[float]] = {}
    statuses: dict[str, list[dict[str, int]]] = {}
    guests: dict[str, list[dict[str, int]]] = {}
    each: dict[str, dict[str, list[float]]] = {}
    times = {mode: [job.time for job in jobs if job.mode == mode] for mode in plan.modes}
    for mode in plan.modes:
        values |= time_values(mode, times[mode])
        for job in (job for job in jobs if job.mode == mode):
            own_s = [test.duration_s for test in job.tests.values()]
            values.setdefault(f"{mode} job", []).append(job.duration_s)
            values.setdefault(f"{mode} all tests", []).append(sum(own_s))
            values.setdefault(f"{mode} one test", []).append(statistics.median(own_s))
            statuses.setdefault(mode, []).append(job.statuses)
            guests.setdefault(mode, []).append({"restored": job.restored, "booted": job.booted})
            for name, test in job.tests.items():
                each.setdefault(name, {}).setdefault(mode, []).append(round(test.duration_s, 2))
    dimensions = {
        **plan.environment.describe(),
        "tests": " ".join([*plan.words, *plan.tests]),
        "side_by_side": str(plan.concurrent),
        "cpus": read_resources().cpus_text,
    }
    results = {
        "modes": {mode: plan.title(mode) for mode in plan.modes},
        "statuses": statuses,
        "guests": guests,
        "tests": each,
        "counts": {mode: [job.counts for job in times[mode]] for mode in times},
        "unrecorded": {mode: [job.unrecorded for job in times[mode]] for mode in times},
        "doubts": list(doubts),
    }
    return Series(dimensions, began, "s", values, results)


def _once(rounds: Iterable[Mapping[str, int]]) -> str:
    """Counts of the rounds, once if they are equal."""
    texts = (
        ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"
        for counts in rounds
    )
    return " / ".join(dict.fromkeys(texts))


def _job(plan: Plan, mode: str, folder: Path, scratch: Path) -> Job:
    began = time.monotonic()
    run_avocado(plan.argv(mode, results=folder, scratch=scratch), folder / "avocado.log")
    return read_job(folder, mode, began, time.monotonic(), slots=plan.slots(mode))


def run_avocado(argv: Sequence[str], log_file: Path) -> None:
    """Run Avocado to its end; it cannot outlive us."""
    log.logger.debug("%s", " ".join(argv))
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)

    with log_file.open("wb") as output:
        # A process group of its own, so that a ^C reaches it only through _interrupt().
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=in_child,  # One thread, so no deadlock.
        )
        try:
            child.wait()
        except BaseException:
            _interrupt(child)
            raise


def _interrupt(child: subprocess.Popen[bytes]) -> None:
    """End Avocado as by ^C in its terminal: it ends its tests, which end their guests."""
    with log.step("ending the job"):
        try:
            os.killpg(child.pid, signal.SIGINT)
            child.wait(_INTERRUPT_LIMIT_S)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            # The keepers end its guests.
            child.kill()
            child.wait()
