# SPDX-License-Identifier: GPL-2.0-or-later
"""Slow and hanging syncs on the host: callers that must wait, and work that must continue.

papr_scm_pmem_flush (arch/powerpc/platforms/pseries/papr_scm.c) repeats the hcall until the
hypervisor no longer answers H_LONG_BUSY. Between two calls it sleeps for the time of the hint, 10
ms with QEMU. It has no time limit, ignores signals, and holds no lock.
"""

from __future__ import annotations

import re
import shlex

from paprscm import timesheet
from paprscm.checks import above, at_least, at_most, below
from paprscm.errors import ConfigError, ContractError
from paprscm.flush.syscalls import parse_persist, persist
from paprscm.flush.trace import count_hcalls
from paprscm.guest.guest import Guest
from paprscm.guest.tools import install_tool
from paprscm.pmem.fs_health import KERNEL_LOG, check_offline, expect_no_complaints
from paprscm.pmem.mounts import dax_mount, mount
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import find_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm
from paprscm.vm.sync_shim import Shim

PAGE = 65536
DIMM, OTHER = PMEM_OFF.at(2, SMALL), PMEM_OFF.at(5, SMALL)
LARGE = PMEM_OFF.at(2, FOR_XFS)
FLUSH = "dwrite=0:1:49"
"""The step of persist that writes "1" to deep_flush."""
POLL_S = 0.010
# Linux 7.2 adds " in I/O wait" after "blocked" for such a task.
HUNG_TASK = r"INFO: task \S+:\d+ blocked.* for more than"
# include/uapi/asm-generic/signal.h; bit 8 of a mask is SIGKILL's.
SIGKILL_MASK = 1 << 8


class FlushSlow(PaprScmTest):
    """
    A slow or hanging flush.

    :avocado: tags=flush
    """

    def machine(self, *nvdimms: Nvdimm, allowed: tuple[str, ...] = ()) -> Guest:
        """Boot a guest whose flushes can be delayed."""
        self.watcher: Shim = self.shim()
        return self.boot(Machine(nvdimms=nvdimms), allowed=allowed, shim=self.watcher)

    def deep_flush(self, guest: Guest, nvdimm: Nvdimm) -> str:
        """The sysfs file that flushes a region."""
        return f"{find_region(guest, nvdimm.slot).device}/deep_flush"

    def begin(self, guest: Guest, name: str, path: str, *steps: str) -> int:
        """Begin steps in the background, with the report in /tmp/NAME; return the pid."""
        words = shlex.join([str(install_tool(guest, "persist")), path, *steps])
        return int(guest.succeed(f"{words} > /tmp/{name} 2>&1 < /dev/null & echo $!"))

    def state(self, guest: Guest, pid: int) -> tuple[str, int]:
        """The state of a process, and its pending signals."""
        # A task that polls a flush runs for a moment between two sleeps.
        read = f"status=$(cat /proc/{pid}/status)"
        running = "case $status in *State:?R*) ;; *) break ;; esac"
        loop = f"for try in $(seq 20); do {read} || exit; {running}; done"
        lines = guest.succeed(f'{loop}; echo "$status"')
        status = dict(line.split(":\t", 1) for line in lines.splitlines() if ":\t" in line)
        return status["State"][0], int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)

    def test_waited_for(self) -> None:
        """fsync polls the flush, and returns after a sync of 1 ms, 50 ms or 1 s, never before."""
        guest = self.machine(DIMM)
        disk = create_namespace(guest, find_region(guest, DIMM.slot), mode="raw").disk
        syncs, polls = guest.vm.syncs(DIMM.slot), {}
        for delay_s, count in ((0.001, 8), (0.05, 4), (1.0, 2)):
            syncs.delay(delay_s)
            before, since = count_hcalls(guest), len(self.watcher.records())
            steps = persist(guest, disk.path, *["fsync"] * count)
            hcalls, records = count_hcalls(guest) - before, self.watcher.records(since)
            what = f"sync of {delay_s:g} s"
            self.expect(f"{what}: errnos", [step.errno for step in steps], [0] * count)
            self.expect(f"{what}: results", [record.result for record in records], [0] * count)
            for step, record in zip(steps, records, strict=True):
                if record.duration_s is None:
                    raise ContractError(f"{what}: fsync returned before the sync ended: {step}")
                self.check(f"{what}: its duration, s", record.duration_s, at_least(delay_s))
                self.check(f"{what}: fsync, s", step.duration_s, at_least(record.duration_s))
            # One call begins a flush, at least one polls it; calls are 10 ms or more apart (hint).
            took_s = sum(step.duration_s for step in steps)
            self.check(f"{what}: hcalls", hcalls, at_least(2 * count))
            self.check(f"{what}: hcalls", hcalls, at_most(2 * count + took_s / POLL_S))
            polls[delay_s] = hcalls / count - 1
            self.metric("fsync", took_s / count, "s", sync_s=f"{delay_s:g}")
            self.metric("polls", polls[delay_s], "hcalls", sync_s=f"{delay_s:g}")
        self.check("polls in 50 ms, more than in 1 ms", polls[0.05], above(polls[0.001]))
        # A sleep of 10 ms may take 20 ms with 100 ticks a second, and longer on a busy host.
        self.check("polls in 1 s", polls[1.0], above(max(10.0, polls[0.05])))

    def test_others_go_on(self) -> None:
        """During a slow sync, other flushes of its DIMM and of others end, and timers fire.

        -p sync_s=N is the duration of the sync, s.
        """
        sync_s = float(self.params.get("sync_s", default="10"))
        if not 5 <= sync_s <= 200:
            raise ConfigError(f"sync_s={sync_s:g} is not from 5 to 200 s")
        guest = self.machine(DIMM, OTHER)
        paths = [self.deep_flush(guest, nvdimm) for nvdimm in (OTHER, DIMM)]
        syncs, hcalls = guest.vm.syncs(DIMM.slot), count_hcalls(guest)
        syncs.delay(sync_s)
        pid = self.begin(guest, "slow", paths[1], FLUSH)
        syncs.wait_begun(1)
        # The first sync stays delayed; later ones are not.
        syncs.clear()
        quick, ticks, rounds = [], [], 0
        while True:
            steps = [step for path in paths for step in persist(guest, path, *[FLUSH] * 3)]
            with timesheet.during("waits"):
                clock = "cut -d ' ' -f 1 /proc/uptime"
                # The kernel's timers must fire meanwhile.
                began, ended = guest.succeed(f"{clock}; sleep 1; {clock}").split()
            counts = syncs.counts()
            if counts.begun - counts.ended != 1:
                break
            rounds += 1
            self.expect("errnos meanwhile", [step.errno for step in steps], [0] * len(steps))
            quick += [step.duration_s for step in steps]
            ticks.append(float(ended) - float(began))
        self.metric("rounds_meanwhile", rounds, "rounds")
        self.metric("longest_other_flush", max(quick, default=0), "s")
        self.metric("longest_sleep_of_1_s", max(ticks, default=0), "s")
        self.expect("rounds meanwhile", rounds, at_least(2))
        self.check("longest other flush, s", max(quick), below(sync_s / 2))
        self.check("longest sleep of 1 s, s", max(ticks), below(sync_s / 2))
        guest.wait_until(f"! test -d /proc/{pid}")
        (slow,) = parse_persist(guest.succeed("cat /tmp/slow"), 0, (FLUSH,))
        hcalls = count_hcalls(guest) - hcalls
        self.metric("slow_flush", slow.duration_s, "s")
        self.metric("hcalls", hcalls, "hcalls")
        self.check("errno of the slow flush", slow.errno, 0)
        self.check("duration of the slow flush, s", slow.duration_s, at_least(sync_s))
        self.check("duration of the slow flush, s", slow.duration_s, below(sync_s + 10))
        self.check("hcalls of all flushes", hcalls, above(sync_s * 10))

    def test_hung_task_watcher(self) -> None:
        """The hung-task watcher reports a task that waits for a hanging flush.

        The control is an fsync on ext4, which waits for the journal's thread.
        """
        self.require_kernel("CONFIG_DETECT_HUNG_TASK")
        guest = self.machine(LARGE.holding("ext4"), allowed=(HUNG_TASK,))
        mounted = dax_mount(guest, LARGE.slot, "ext4", "/mnt/pm")
        persist(guest, "/mnt/pm/file", f"write=0:{PAGE}:1", "fsync")
        guest.succeed(
            "echo 2 > /proc/sys/kernel/hung_task_timeout_secs && "
            "echo -1 > /proc/sys/kernel/hung_task_warnings"
        )
        syncs = guest.vm.syncs(LARGE.slot)
        syncs.hang()
        path = f"{mounted.region.device}/deep_flush"
        waits = self.begin(guest, "waits", path, FLUSH)
        behind = self.begin(guest, "behind", "/mnt/pm/file", f"write={PAGE}:{PAGE}:2", "fsync")
        syncs.wait_begun(syncs.counts().ended + 2)
        # The control: a task that the watcher does report.
        guest.wait_until(f"dmesg | grep 'INFO: task persist.*:{behind} blocked'", timeout_s=30)
        with timesheet.during("waits"):
            # Two periods of the kernel's watcher, which must not report the other task.
            log = guest.succeed("sleep 5; dmesg")
        states = {pid: self.state(guest, pid)[0] for pid in (waits, behind)}
        syncs.release()
        guest.wait_until(f"! test -d /proc/{waits} && ! test -d /proc/{behind}")
        self.expect("the tasks' states", states, {waits: "D", behind: "D"})
        for name, steps in (("waits", (FLUSH,)), ("behind", ("write", "fsync"))):
            results = parse_persist(guest.succeed(f"cat /tmp/{name}"), 0, steps)
            self.expect(f"errnos, {name}", [step.errno for step in results], [0] * len(steps))
        check_offline(guest, [mounted.mount])
        counts = syncs.counts()
        self.check("syncs that ended and failed", (counts.ended, counts.failed), (counts.begun, 0))
        reported = {int(pid) for pid in re.findall(r"INFO: task \S+:(\d+) blocked", log)}
        self.known_issue(
            "linux-hung-task-misses-flush",
            shows=waits not in reported,
            found="with a limit of 2 s, a task that waits for a flush for 7 s is "
            + ("not reported" if waits not in reported else "reported"),
        )

    def test_killed(self) -> None:
        """A process that is killed while it waits for a flush leaves nothing behind.

        So far it ends only when the flush ends: the loop in papr_scm_pmem_flush does not check for
        signals.
        """
        guest = self.machine(LARGE.holding("xfs"))
        mounted, file = dax_mount(guest, LARGE.slot, "xfs", "/mnt/pm"), "/mnt/pm/file"
        persist(guest, file, f"write=0:{PAGE}:1", "fsync")
        syncs = guest.vm.syncs(LARGE.slot)
        before = syncs.counts()
        syncs.hang()
        pid = self.begin(guest, "killed", file, f"write=0:{PAGE}:2", "fdatasync")
        syncs.wait_begun(before.begun + 1)
        guest.succeed(f"kill -KILL {pid}")
        polls = count_hcalls(guest)
        with timesheet.during("waits"):
            guest.succeed("sleep 2")  # The driver goes on with its polls meanwhile.
        if guest.run(f"test -d /proc/{pid}").status:
            self.remark("a process that waits for a flush can be killed; so far it could not")
        else:
            state, pending = self.state(guest, pid)
            self.usual("the state of the killed process", state, "D")
            self.expect("SIGKILL is pending", pending & SIGKILL_MASK, SIGKILL_MASK)
            self.expect("hcalls after 2 s more", count_hcalls(guest), above(polls + 10))
        self.expect("syncs that ended", syncs.counts().ended, before.ended)
        syncs.release()
        guest.wait_until(f"! test -d /proc/{pid}")
        # It dies when it returns from the kernel, before it can print anything.
        self.check("output of the killed process", guest.succeed("cat /tmp/killed"), "")
        after = syncs.counts()
        self.check("syncs that ended and failed", (after.ended, after.failed), (after.begun, 0))
        self.usual("flushes of the killed fdatasync", after.begun - before.begun, 1)
        polls = count_hcalls(guest)
        self.check("hcalls after the flush has ended", count_hcalls(guest), polls)
        # The file system still works, and the killed process's write survived.
        guest.succeed("umount /mnt/pm && echo 3 > /proc/sys/vm/drop_caches")
        mount(guest, mounted.device, "xfs", "/mnt/pm")
        results = persist(guest, file, f"read=0:{PAGE}", f"write={PAGE}:{PAGE}:3", "fsync")
        outcome = (results[0].byte, [step.errno for step in results])
        self.check("byte and errnos after a remount", outcome, (2, [0] * 3))
        expect_no_complaints(guest.succeed(KERNEL_LOG))
        check_offline(guest, [mounted.mount])
