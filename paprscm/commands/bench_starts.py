# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements that print medians and keep a series; they have no verdict of their own."""

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

# From QEMU's exec to each of them.
MARKS = {
    "warm": {
        "restored": "state loaded",
        "awake": "clock, seed, timers right",
        "regions": "both regions ready",
        "ssh": "ssh connected",
        "command": "first command answered",
    },
    "cold": {
        "banner": "kernel banner",
        "init": "/init runs",
        "ready": "ssh server listens",
        "ssh": "ssh connected",
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
    """Start guests with the same two DIMMs, each to its first command's answer.

    In each round one is restored and one is booted, so that what disturbs one disturbs both.
    Without a snapshot all are booted.

    Args:
        environment: what they are made of.
        count: how many rounds are counted.
        warm_only: boot none.
        warm_up: rounds before those, which fill the host's page cache.
        failed: where the logs of a guest go that did not start.

    Returns:
        The figures, and what the counted rounds left behind.

    Raises:
        HostError: a guest did not start; one that was to be restored is not booted instead.
        CapabilityError: `warm_only` without a snapshot.
    """
    kinds = list(MARKS) if environment.snapshot else ["cold"]
    if warm_only:
        if environment.snapshot is None:
            raise CapabilityError("there is no snapshot that guests could be restored from")
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
                    kept = shutil.copytree(folder, failed, dirs_exist_ok=True)
                    which = f"{kind} start {number + 1} of {count}" if number >= 0 else "warm-up"
                    raise HostError(f"{which}: {error.message}", hint=f"see {kept}") from error
                shutil.rmtree(folder)
                if number < 0:
                    continue
                for mark in MARKS[kind]:
                    seconds[f"{kind} {mark}"].append(times[mark])
                bar.update(number * len(kinds) + place + 1)
        assert before is not None  # noqa: S101
        snapshot = environment.snapshot.folder if environment.snapshot else None
        left = watch.compare(before, snapshot=snapshot)
    dimensions = {**environment.describe(), "dimms": str(len(_DIMMS))}
    return Series(dimensions, began, "s", seconds, {"left": dataclasses.asdict(left)}), left


def start_table(series: Series) -> Table:
    """The series of starts for a terminal."""
    count = len(next(iter(series.values.values())))
    kinds = list(dict.fromkeys(name.split()[0] for name in series.values))
    many = "s" if count > 1 else ""
    what = (
        f"{count} start{many} of each kind" if len(kinds) > 1 else f"{count} {kinds[0]} start{many}"
    )
    shown = Table(title_justify="left")
    shown.title = f"{what} with two pmem=off DIMMs, seconds after QEMU's exec"
    shown.add_column("start")
    shown.add_column("reached")
    for name in ("median", "min", "max", "middle half"):
        shown.add_column(name, justify="right")
    summary = series.summary()
    for kind, marks in MARKS.items():
        shown.add_section()
        for mark, words in marks.items():
            if spread := summary.get(f"{kind} {mark}"):
                shown.add_row(
                    kind,
                    words,
                    f"{spread['median']:.2f}",
                    f"{spread['min']:.2f}",
                    f"{spread['max']:.2f}",
                    f"{spread['p25']:.2f}-{spread['p75']:.2f}",
                )
    return shown


def _start_once(
    environment: Environment, kind: str, folder: Path, scratch: Path
) -> Mapping[str, float]:
    """One start, of that kind and no other; when it reached its marks."""
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
