# SPDX-License-Identifier: GPL-2.0-or-later
"""Contract of MAP_SYNC: a store and a CPU flush make data durable, without any system call.

mmap(2): shared file mappings with MAP_SYNC "provide the guarantee that while some memory
is writably mapped in the address space of the process, it will be visible in the same file at the
same offset even after the system crashes or is rebooted". In Linux the first write fault of a page
whose extent is not yet durable returns VM_FAULT_NEEDDSYNC, and dax_finish_sync_fault (fs/dax.c)
forces the journal before it makes the page writable.

Here the machine ends between two instructions: QEMU is killed with SIGKILL. Stores to a DIMM are
in the host's page cache, which a TCG guest shares; data in the guest kernel's own memory are lost.
So this test cannot detect a missing flush of the CPU's caches.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
import time
from dataclasses import dataclass

from paprscm import timesheet
from paprscm.errors import ConfigError, ContractError, Error, GuestLostError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import read_report
from paprscm.guest.tools import compile_tool
from paprscm.pmem.fs_health import KERNEL_LOG, check_offline, expect_no_complaints
from paprscm.pmem.mounts import DaxMount, dax_mount, make_filesystem, mount
from paprscm.power_cut.sudden_end import (
    Ledger,
    LedgerCounts,
    Phase,
    ProgramState,
    Side,
    Tally,
    expect_kept,
    require_statistical_power,
    underpowered,
)
from paprscm.power_cut.sudden_end_report import PromiseReport
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_ON, SMALL
from paprscm.vm.machine import Machine

SIDES = (
    Side(slot=0, fstype="xfs", sync=True),
    Side(slot=1, fstype="xfs", sync=False),
    Side(slot=2, fstype="ext4", sync=True),
    Side(slot=3, fstype="ext4", sync=False),
)
LEDGER_SLOT = 4
LEDGER = "/mnt/ledger"
TOOL = f"{LEDGER}/promise"
SIZES = {0: FOR_XFS, 1: FOR_XFS, 2: SMALL, 3: SMALL, LEDGER_SLOT: SMALL}

START_LIMIT_S = 60.0
MORE = 10
"""Additional cuts while a control has not lost anything."""
RENEWED = 8
"""On average, one cut in this many makes the file systems again instead of reusing them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the program on one side, and its progress at the kill."""

    seed: int
    nonce: int
    folder: str
    done: int = 0
    phase: Phase = Phase.NOTHING


class Promise(PaprScmTest):
    """
    QEMU is killed repeatedly; the next QEMU checks its DIMMs.

    :avocado: tags=map_sync,promise
    """

    def test_sudden_end(self) -> None:
        """With MAP_SYNC, flushed stores survive a sudden end; without MAP_SYNC, some are lost.

        On pmem=on, with XFS and ext4, for growing, sparse and allocated files: existence, size,
        extents and bytes. The control without MAP_SYNC has its own file systems, because a MAP_SYNC
        fault forces the whole journal. -p cuts=N is the number of kills of QEMU, each a cut for
        both file systems; a few more follow while a control has lost nothing.
        """
        cuts, dice = self.cuts(), self.random()
        dimms = [PMEM_ON.at(slot, size) for slot, size in SIZES.items()]
        self.require_qemu(*dimms)
        files = self.keep(*dimms)
        tallies = {side: Tally() for side in SIDES}
        runs: dict[Side, Run] = {}
        for cut in itertools.count():
            guest = self.boot(Machine(nvdimms=files.nvdimms()))
            mounts = self.mount(guest, again=cut > 0)
            for side, report in self.verify(guest, runs).items():
                tallies[side].add(side, runs[side].phase, report)
            self.measure("sides", {str(side): tally.figures() for side, tally in tallies.items()})
            # Check after each cut: more cuts would hide the cause.
            expect_kept(tallies)
            if cut >= cuts + MORE or (cut >= cuts and not underpowered(tallies)):
                check_offline(guest, [mounted.mount for mounted in mounts.values()])
                break
            self.renew(guest, mounts, dice)
            runs = self.start(guest, cut, runs, dice)
            with Ledger(files.path(LEDGER_SLOT)) as ledger:
                runs = self.kill(guest, ledger, runs, dice)
        require_statistical_power(tallies)

    def cuts(self) -> int:
        """Number of kills of QEMU, from -p cuts=N."""
        text = str(self.params.get("cuts", default="2"))
        if not text.isdecimal() or not int(text):
            raise ConfigError(f"cuts={text} is not a number of cuts")
        return int(text)

    def mount(self, guest: Guest, *, again: bool) -> dict[int, DaxMount]:
        """Mount all file systems, which replays their journals; the first time, create them.

        The program is compiled once, and stored next to the ledger. Returns the mounts by slot.
        """
        mounts = {
            side.slot: dax_mount(guest, side.slot, side.fstype, side.mountpoint, reuse=again)
            for side in SIDES
        }
        mounts[LEDGER_SLOT] = dax_mount(guest, LEDGER_SLOT, "ext4", LEDGER, reuse=again)
        if not again:
            guest.succeed(f"cp {compile_tool(guest, 'promise')} {TOOL} && sync")
        return mounts

    def renew(self, guest: Guest, mounts: dict[int, DaxMount], dice: random.Random) -> None:
        """At random, make both file systems of a type again."""
        for fstype in ("xfs", "ext4"):
            if dice.randrange(RENEWED):
                continue
            for side in SIDES:
                if side.fstype == fstype:
                    old = mounts[side.slot]
                    guest.succeed(f"umount {side.mountpoint}")
                    make_filesystem(guest, old.device, side.fstype, old.block_size)
                    mount(guest, old.device, side.fstype, side.mountpoint)

    def start(
        self, guest: Guest, cut: int, old: dict[Side, Run], dice: random.Random
    ) -> dict[Side, Run]:
        """Start the program on all sides, in new folders; remove the old folders concurrently."""
        runs = {
            side: Run(
                seed=dice.getrandbits(62),
                nonce=dice.getrandbits(62),
                folder=f"{side.mountpoint}/cut{cut}",
            )
            for side in SIDES
        }
        lines = [
            "set -e",
            f"mkdir {' '.join(run.folder for run in runs.values())}",
            # The existence of the folders is not part of the contract.
            "sync",
        ]
        lines += [
            f"setsid {TOOL} store --ledger={LEDGER}/{side.slot} --nonce={run.nonce} "
            f"--seed={run.seed} --sync={'on' if side.sync else 'off'} {run.folder} "
            f"< /dev/null > /tmp/store{side.slot} 2>&1 &"
            for side, run in runs.items()
        ]
        if old:
            folders = " ".join(run.folder for run in old.values())
            lines.append(f"setsid rm -rf {folders} < /dev/null > /dev/null 2>&1 &")
        guest.succeed("\n".join(lines))
        return runs

    @timesheet.during("waits")
    def kill(
        self, guest: Guest, ledger: Ledger, runs: dict[Side, Run], dice: random.Random
    ) -> dict[Side, Run]:
        """Kill QEMU after some more steps of a random side; return the runs with their progress."""
        chosen, more = dice.choice(SIDES), int(2 ** (dice.random() * 10))
        delay_s = dice.random() * 0.01
        deadline = time.monotonic() + START_LIMIT_S
        target: int | None = None
        while True:
            guest.check()
            entries = {side: self.entry(ledger, side, run) for side, run in runs.items()}
            now = entries[chosen]
            if target is None and now and all(entry and entry.done for entry in entries.values()):
                target = now.done + more
            if target is not None and now and now.done >= target:
                break
            if time.monotonic() > deadline:
                raise self.stalled(guest, entries)
            # The guest's stores to the mapped file cause no event on the host, so poll.
            time.sleep(0.001)
        # The moment of the cut is random.
        time.sleep(delay_s)
        guest.kill()
        # Reads the console to its end.
        guest.close()
        if guest.console.trouble:
            raise ContractError(f"the guest's kernel reports: {guest.console.trouble.text}")
        ended = {}
        for side, run in runs.items():
            entry = self.entry(ledger, side, run)
            if entry is None:
                raise HostError(f"{side}: the ledger has lost its entry")
            ended[side] = dataclasses.replace(run, done=entry.done, phase=entry.phase)
        return ended

    def stalled(self, guest: Guest, entries: dict[Side, LedgerCounts | None]) -> Error:
        """Build the error for programs without progress: their own error, or a stuck guest."""
        for side in [side for side, entry in entries.items() if entry is None]:
            # The program prints only errors; its progress is in the ledger.
            if output := guest.succeed(f"cat /tmp/store{side.slot}"):
                return HostError(f"{side}: promise could not start: {output}")
        steps = ", ".join(f"{side}: {e.done if e else 'none'}" for side, e in entries.items())
        return GuestLostError(f"after {START_LIMIT_S:g} s not every program made a step: {steps}")

    def entry(self, ledger: Ledger, side: Side, run: Run) -> LedgerCounts | None:
        """Progress of one side, or None before its first entry."""
        entry = ledger.read(run.nonce)
        if entry is None or entry.state in (ProgramState.STARTING, ProgramState.RUNNING):
            return entry
        name = os.strerror(entry.errno) if entry.errno else "no errno"
        raise ContractError(
            f"{side}: the program ended after {entry.done} steps, at {entry.stage!r}: {name}"
        )

    def verify(self, guest: Guest, runs: dict[Side, Run]) -> dict[Side, PromiseReport]:
        """Verify the files after the journal replay, which must not report an error."""
        lines = [
            f"echo side {side.slot}; {TOOL} verify --seed={run.seed} --done={run.done} "
            f"{run.folder}; echo status $?"
            for side, run in runs.items()
        ]
        with timesheet.during("tools"):
            printed = guest.succeed("\n".join([*lines, "echo kernel", KERNEL_LOG]))
        parts, _, messages = printed.partition("kernel\n")
        expect_no_complaints(messages)
        matches = re.findall(r"side (\d+)\n(.*\n)status (\d+)\n", parts)
        reports = {
            int(slot): read_report(PromiseReport, line, int(status))
            for slot, line, status in matches
        }
        if [side.slot for side in runs] != list(reports):
            raise HostError(f"unexpected output of promise:\n{parts}")
        for side, run in runs.items():
            verified = reports[side.slot].seed, reports[side.slot].done
            if verified != (run.seed, run.done):
                raise HostError(f"{side}: promise verified {verified}, expected {run}")
        return {side: reports[side.slot] for side in runs}
