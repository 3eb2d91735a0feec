# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests that migrate while they flush.

QEMU sends the state of each H_SCM_FLUSH with the machine: the results that the guest has not asked
for, and the pending flushes, which the destination starts again (QEMU commit b5513584a08d, in v7.0;
hw/ppc/spapr_nvdimm.c, spapr_nvdimm_flush_post_load).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from paprscm.checks import at_least, at_most
from paprscm.errors import ConfigError
from paprscm.flush.ledger import FlushLedger
from paprscm.flush.load import FlushLoadReport, run_flush_load
from paprscm.flush.trace import expect_protocol
from paprscm.guest.guest import Guest
from paprscm.migration.moves import OTHER_FILES, SAME_FILES, Mover, SyncedData, write_synced
from paprscm.migration.transfer import Way
from paprscm.pmem.fs_health import KERNEL_LOG, check_offline, expect_no_complaints
from paprscm.pmem.mounts import dax_mount
from paprscm.pmem.namespaces import create_fsdax
from paprscm.pmem.regions import find_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm
from paprscm.vm.sync_shim import Shim
from paprscm.vm.vm import Vm

DISK, EXT4 = PMEM_OFF.at(3, SMALL).holding("fsdax"), PMEM_OFF.at(1, SMALL).holding("ext4")
DIMMS = (DISK, EXT4)
FOLDER = "/mnt/ext4"
THREADS = 8
"""Half of them on each DIMM."""
BEGIN_S = 60.0
"""Time limit on a busy host for a load to begin, s."""
LOAD_S = 1
"""Time in which calls of a load begin, s: longer than a migration without contents takes."""


class LinuxTest(PaprScmTest):
    """
    Base of tests with a Linux guest that migrates.

    :avocado: disable
    """

    def start(self, *nvdimms: Nvdimm) -> Guest:
        """Start a guest that can migrate."""
        guest = self.leave.enter_context(
            self.environment.guest(
                Machine(nvdimms=nvdimms),
                folder=self.folder("guest"),
                shim=self.shim(),
                migrates=True,
            )
        )
        self.shims: dict[Vm, Shim] = {}
        self.mover = Mover(guest, self.environment)
        return guest

    def synced(self, guest: Guest, nvdimm: Nvdimm) -> SyncedData:
        """Write and sync data on the disk of a DIMM."""
        disk = create_fsdax(guest, find_region(guest, nvdimm.slot))
        return write_synced(guest, nvdimm.slot, disk.path)

    def successor(self, way: Way) -> Vm:
        """A QEMU that waits for the guest, with a shim of its own."""
        shim = self.shim()
        vm = self.mover.successor(way, folder=self.folder("guest"), shim=shim)
        self.shims[vm] = shim
        return vm


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A way to move a guest.

    Attributes:
        way: same files or other ones.
        through_stream, stopped: as for Mover.move().
        held: slot whose flushes are pending in the migration.
    """

    way: Way
    through_stream: bool = False
    stopped: bool = False
    held: int | None = None

    def __str__(self) -> str:
        words = [
            "stopped" if self.stopped else "running",
            "through a stream" if self.through_stream else "connected",
            self.way.name,
        ]
        return ", ".join(words) + ("" if self.held is None else f", flushes of {self.held} pending")


PLANS = (
    Plan(way=SAME_FILES, held=EXT4.slot),
    Plan(way=SAME_FILES, stopped=True, through_stream=True, held=DISK.slot),
    Plan(way=SAME_FILES),
    # Contents take seconds: not in the default run.
    Plan(way=OTHER_FILES, stopped=True, through_stream=True, held=EXT4.slot),
    Plan(way=SAME_FILES, through_stream=True, held=DISK.slot),
    Plan(way=OTHER_FILES, stopped=True, held=DISK.slot),
    Plan(way=SAME_FILES, through_stream=True),
    Plan(way=OTHER_FILES, stopped=True),
)


class LinuxMoves(LinuxTest):
    """
    A Linux guest that migrates under load.

    :avocado: tags=migration
    """

    def test_under_load(self) -> None:
        """In a migration, live or stopped, with the same files or others, no flush is lost.

        Each call in the guest succeeds and returns once. A flush is one H_SCM_FLUSH with a token of
        its own, polled to its end, and one sync of its DIMM's file, or two if it was pending in the
        migration. What was synced before is in the file that the guest now has. The guest's kernel
        reports nothing. -p moves=N is the number of migrations.
        """
        count, dice = self.moves(), self.random()
        guest = self.start(*DIMMS)
        disk = create_fsdax(guest, find_region(guest, DISK.slot)).path
        mount = dax_mount(guest, EXT4.slot, "ext4", FOLDER).mount
        self.ledger = FlushLedger(guest, [dimm.slot for dimm in DIMMS], threads=THREADS // 2)
        self.series: list[dict[str, object]] = []
        kept: list[SyncedData] = []
        for number, plan in zip(range(count), itertools.cycle(PLANS), strict=False):
            kept.append(write_synced(guest, EXT4.slot, f"{FOLDER}/kept{number}"))
            report = self.move(guest, plan, [disk, FOLDER], dice.getrandbits(60))
            self.judge(guest, plan, report)
            there = [data.is_in(guest.file(EXT4.slot)) for data in kept]
            self.check(f"{plan}: synced data are in the new file", there, [True] * len(kept))
            self.measure("moves", self.series)
            self.checkpoint()
        expect_protocol(self.ledger.flushes)
        expect_no_complaints(guest.succeed(KERNEL_LOG))
        check_offline(guest, [mount])

    def moves(self) -> int:
        """Number of migrations, from -p moves=N."""
        text = str(self.params.get("moves", default="3"))
        if not text.isdecimal() or not int(text):
            raise ConfigError(f"moves={text} is not a number of migrations")
        return int(text)

    def move(self, guest: Guest, plan: Plan, targets: Sequence[str], seed: int) -> FlushLoadReport:
        """Migrate under load."""
        successor = self.successor(plan.way)
        syncs = {dimm.slot: guest.vm.syncs(dimm.slot) for dimm in DIMMS}
        before = {slot: file.counts().begun for slot, file in syncs.items()}
        if plan.held is not None:
            syncs[plan.held].hang()
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(
                run_flush_load,
                guest,
                "mixed",
                targets,
                threads=THREADS,
                count=100_000,
                limit_s=LOAD_S,
                seed=seed,
            )
            # With one flush held, those of the other DIMM may wait as well (test_ends.py, flush).
            for slot in syncs if plan.held is None else [plan.held]:
                syncs[slot].wait_begun(before[slot] + 1, BEGIN_S)
            move = self.mover.move(
                successor,
                plan.way,
                through_stream=plan.through_stream,
                stopped=plan.stopped,
            )
            report = load.result()
        pending = None
        if move.pending is not None:
            pending = {dimm.slot: move.pending[dimm.drc] for dimm in DIMMS}
        self.ledger.add(move.source, move.destination, pending, plan.held)
        self.series.append(
            {
                "plan": str(plan),
                "downtime_s": move.downtime_s,
                "total_s": round(move.total_s, 3),
                "awake_s": round(move.awake_s, 3),
                "calls": len(report.calls),
            }
        )
        if plan.held is not None:
            counts = move.source.syncs(plan.held).counts()
            unfinished = counts.begun - counts.ended
            self.check(f"{plan}: syncs that did not end at the source", unfinished, at_least(1))
            if pending is not None:
                sent = pending[plan.held]
                self.check(f"{plan}: pending flushes in the stream", sent, at_least(unfinished))
        return report

    def judge(self, guest: Guest, plan: Plan, report: FlushLoadReport) -> None:
        """Check the calls, and that the counts of guest and hosts agree."""
        report.expect_success()
        # The file system commits its journal in the background.
        guest.succeed(f"sync {FOLDER}")
        reading = self.ledger.read()
        first, calls = reading.traced
        self.check(
            f"{plan}: flushes that the driver began, that were hcalls, that ended",
            (reading.entered, first),
            (reading.ended, reading.ended),
        )
        self.check(f"{plan}: H_SCM_FLUSH by the trace", calls, reading.hcalls)
        bounds = self.ledger.repeated
        for slot, extra in self.ledger.settle().items():
            low, high = bounds[slot]
            what = f"{plan}: syncs of slot {slot} that were repeated, so far"
            self.series[-1]["repeated"] = self.ledger.repeated.copy()
            detail = f"{self.ledger.syncs()[slot]} syncs, {self.ledger.flushed()[slot]} flushes"
            bound = (at_least(low), at_most(high))
            self.check(what, (extra, extra), bound, detail=detail)


class LinuxPromises(LinuxTest):
    """
    Data that a guest has synced before it migrates.

    :avocado: tags=migration
    """

    def test_other_files(self) -> None:
        """After a migration to another file, data that the guest had synced are synced there.

        The guest does not sync them again, because its fsync has succeeded.
        """
        guest = self.start(DISK)
        data = self.synced(guest, DISK)
        vm = self.successor(OTHER_FILES)
        self.mover.move(vm, OTHER_FILES, stopped=True)
        self.expect("the data have arrived", data.is_in(vm.file(DISK.slot)), True)
        loaded = self.covering(vm, DISK.slot)
        self.known_issue(
            "qemu-migration-leaves-dimm-unsynced",
            shows=not loaded,
            found=f"QEMU has synced the DIMM's new file {loaded} times",
        )
        guest.succeed(f"echo 1 > {find_region(guest, DISK.slot).device}/deep_flush")
        flushed = self.covering(vm, DISK.slot)
        self.check("syncs of the whole file by a flush", flushed - loaded, 1)

    def covering(self, vm: Vm, slot: int) -> int:
        """Number of successful syncs of a DIMM's whole file, or of its whole mapping."""
        ends = vm.file(slot).stat().st_size
        records = self.shims[vm].records()
        return sum(
            record.path == vm.file(slot)
            and record.result == 0
            and record.start == 0
            and record.end >= ends
            for record in records
        )
