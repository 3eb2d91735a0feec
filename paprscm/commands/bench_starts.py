# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmark of guest starts, restored and booted."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from paprscm import log
from paprscm.commands.leaks import LeakReport, LeakWatch
from paprscm.commands.series import Series
from paprscm.errors import CapabilityError, ContractError, Error, HostError
from paprscm.guest.environment import Environment
from paprscm.guest.guest import Guest
from paprscm.vm.machine import Machine, Nvdimm

# Marks of a start, with descriptions; times are measured from QEMU's exec.
MARKS = {
    "warm": {
        "restored": "state loaded",
        "awake": "clock, seed, timers right",
        "regions": "both regions ready",
        "commands": "takes commands",
        "command": "first command answered",
    },
    "cold": {
        "banner": "kernel banner",
        "init": "/init runs",
        "ready": "ssh server listens",
        "commands": "takes commands",
        "command": "first command answered",
    },
}
_DIMMS = (Nvdimm(slot=0), Nvdimm(slot=1))
_FIRST_COMMAND = "echo /sys/bus/nd/devices/region*"


def measure_starts(
    environment: Environment,
    count: int,
    *,
    warm_only: bool = False,
    warm_up: int = 1,
    failed: Path = Path("results/bench-start-failed"),
) -> tuple[Series, LeakReport]:
    """Measure starts of guests with the same two DIMMs, up to the result of a first command.

    Each round restores one guest and boots one, so that a disturbance affects both. Without a
    snapshot all guests are booted.

    Args:
        environment: kernel, userland and QEMU of the guests.
        count: number of measured rounds.
        warm_only: boot none.
        warm_up: number of rounds before them, which fill the host's page cache.
        failed: folder for the logs of a guest that did not start.

    Returns:
        The figures, and the leaks of the measured rounds.

    Raises:
        HostError: a guest did not start; a failed restore does not fall back to a boot.
        CapabilityError: `warm_only` without a snapshot.
    """
    kinds = list(MARKS) if environment.snapshot else ["cold"]
    if warm_only:
        if environment.snapshot is None:
            raise CapabilityError("there is no snapshot to restore guests from")
        kinds = ["warm"]
    seconds: dict[str, list[float]] = {f"{kind} {m}": [] for kind in kinds for m in MARKS[kind]}
    began = time.time()
    with (
        tempfile.TemporaryDirectory(
            prefix="paprscm-bench-", dir=environment.settings.scratch_dir
        ) as name,
        log.quiet(),
        log.progress("starts", count * len(kinds), "starts") as bar,
    ):
        scratch = Path(name) / "scratch"
        scratch.mkdir()
        watch, before = LeakWatch(scratch), None
        for number in range(-warm_up, count):
            if number == 0:
                before = watch.look()
            for place, kind in enumerate(kinds):
                folder = Path(name) / kind
                folder.mkdir()
                try:
                    times = _start_once(environment, kind, folder, scratch)
                except Error as error:
                    logs = shutil.copytree(folder, failed, dirs_exist_ok=True)
                    which = f"{kind} start {number + 1} of {count}" if number >= 0 else "warm-up"
                    raise HostError(f"{which}: {error.message}", hint=f"see {logs}") from error
                shutil.rmtree(folder)
                if number < 0:
                    continue
                for mark in MARKS[kind]:
                    seconds[f"{kind} {mark}"].append(times[mark])
                bar.update(number * len(kinds) + place + 1)
        assert before is not None  # noqa: S101
        snapshot = environment.snapshot.folder if environment.snapshot else None
        leaks = watch.compare(before, snapshot=snapshot)
    dimensions = {**environment.describe(), "dimms": str(len(_DIMMS))}
    return Series(dimensions, began, "s", seconds, {"left": dataclasses.asdict(leaks)}), leaks


def start_table(series: Series) -> Table:
    """The series for a terminal."""
    count = len(next(iter(series.values.values())))
    kinds = list(dict.fromkeys(name.split()[0] for name in series.values))
    many = "s" if count > 1 else ""
    heading = (
        f"{count} start{many} of each kind" if len(kinds) > 1 else f"{count} {kinds[0]} start{many}"
    )
    table = Table(title_justify="left")
    table.title = f"{heading} with two pmem=off DIMMs, seconds after QEMU's exec"
    table.add_column("start")
    table.add_column("reached")
    for name in ("median", "min", "max", "middle half"):
        table.add_column(name, justify="right")
    summary = series.summary()
    for kind, marks in MARKS.items():
        table.add_section()
        for mark, words in marks.items():
            if spread := summary.get(f"{kind} {mark}"):
                table.add_row(
                    kind,
                    words,
                    f"{spread['median']:.2f}",
                    f"{spread['min']:.2f}",
                    f"{spread['max']:.2f}",
                    f"{spread['p25']:.2f}-{spread['p75']:.2f}",
                )
    return table


def _start_once(
    environment: Environment, kind: str, folder: Path, scratch: Path
) -> Mapping[str, float]:
    """Start one guest of this kind; return the times of its marks, s."""
    equipment = dataclasses.replace(
        environment.equipment,
        settings=dataclasses.replace(environment.settings, scratch_dir=scratch),
    )
    machine = Machine(nvdimms=_DIMMS)
    snapshot = environment.snapshot if kind == "warm" else None
    began = time.monotonic()
    with Guest(equipment, machine, folder=folder, snapshot=snapshot) as guest:
        answer = guest.succeed(_FIRST_COMMAND)
        answered = time.monotonic() - guest.vm.exec_s
        if len(re.findall(r"region[0-9]+", answer)) != len(_DIMMS):
            raise ContractError(f"{len(_DIMMS)} DIMMs, but the guest has {answer}")
        times = {**guest.times.reached(), "command": answered}
    log.logger.debug("start and end: %.2f s", time.monotonic() - began)
    return times
