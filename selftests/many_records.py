# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of many jobs over time, with breakages, known issues and noise, for selftests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from records import GUEST, KERNEL, QEMU, finding, make_record

from paprscm.results.record import Environment, Metric, Record, Test, Times

KERNELS = {
    "6.1": ["6.1.190", "6.1.191", "6.1.192"],
    "6.12": ["6.12.107", "6.12.111", "6.12.113", "6.12.115", "6.12.117"],
    "7.2": ["7.2.9", "7.2.11", "7.2.13"],
}
SLOW = "7.2.13"
"""Kernel on which metrics are 20 % larger."""
QEMUS = {"7.2": "7.2.22", "10.0": "10.0.13"}
SUBJECTS = ("device", "flush", "hcall", "map_sync", "migration", "pmem", "power_cut")


def many(runs: int = 200, tests: int = 300, seed: int = 1) -> Iterator[Record]:
    """Jobs in several environments, one every four hours; equal arguments give equal records."""
    chance = random.Random(seed)  # noqa: S311
    places = [(kernel, qemu) for kernel in KERNELS for qemu in QEMUS]
    first = datetime(2026, 10, 1, 3, 0, tzinfo=UTC)
    for number in range(runs):
        kernel, qemu = places[number % len(places)]
        releases = KERNELS[kernel]
        release = releases[number * len(releases) // runs]
        start = first + timedelta(hours=4 * number)
        record = make_record(
            *(_test(test, number / runs, kernel, release, chance) for test in range(tests)),
            id=f"{number:07x}{'0' * 33}",
            start=start.isoformat(),
            end=(start + timedelta(seconds=180 + 40 * chance.random())).isoformat(),
        )
        guest = replace(
            GUEST,
            qemu=replace(QEMU, version=QEMUS[qemu], sha256=qemu * 16),
            kernel=replace(KERNEL, release=f"{release}-paprscm", build_id=release),
        )
        yield replace(record, environments={"guest": guest, "bare": Environment(qemu=guest.qemu)})


def _test(number: int, moment: float, kernel: str, release: str, chance: random.Random) -> Test:
    subject = SUBJECTS[number % len(SUBJECTS)]
    name = (
        f"{subject}/test_{subject}_{number // 40}.py:Dimm{number % 5}.test_case_{number}_pmem_off"
    )
    changes: dict[str, Any] = {
        "id": f"{number:03}-tests/{name}",
        "name": name,
        "file": f"tests/{name.partition(':')[0]}",
        "subject": subject,
        "contract": f"Case {number}: data that fsync() has acknowledged are in the backing file.",
        "times": Times(
            start="2026-11-27T02:45:40.000+01:00",
            began_s=10.0 + number,
            duration_s=round((0.3 + number % 7) * chance.lognormvariate(0, 0.05), 3),
        ),
    }
    status: Any = "PASS"
    if number % 11 == 3:
        issue = f"linux-case-{number % 33}"
        status, changes["reason"] = "WARN", f"known issue {issue}: it showed"
        changes["known_issues"] = (finding(issue, version=f"{release}-paprscm"),)
    if number % 29 == 5:
        status, changes["reason"] = "CANCEL", "this QEMU was built without libpmem"
    if number == 40 and kernel == "6.12" and moment > 0.8:
        status, changes["reason"] = "FAIL", "fsync returned 0, 4096 bytes are not in the file"
        changes["logs"] = (f"test-results/{number}/data/guest/console.log",)
    if number == 81 and moment > 0.93:
        status, changes["reason"] = "FAIL", "xfs: 'MAP_SYNC accepted', expected 'MAP_SYNC refused'"
    if number == 120 and chance.random() < 0.15:
        status, changes["reason"] = "FAIL", "3 of 4 writer threads ended within 60 s"
    if number == 200 and 0.5 < moment < 0.55:
        status, changes["reason"] = "ERROR", "no space left in /var/tmp"
    if number % 3 == 0:
        slower = 1.2 if release == SLOW else 1.0
        changes["metrics"] = tuple(
            Metric(
                name="call_median",
                value=round(40 * slower * chance.lognormvariate(0, 0.04), 4),
                unit="us",
                dimensions={"fstype": fstype},
            )
            for fstype in ("ext4", "xfs")
        )
    command = f"avocado run tests/{name}"
    return Test(status=status, environment="guest", command=command, **changes)
