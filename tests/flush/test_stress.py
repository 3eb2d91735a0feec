# SPDX-License-Identifier: GPL-2.0-or-later
"""Flushes from many threads on several DIMMs, during hotplug and other changes.

papr_scm_pmem_flush holds no lock and sleeps between its hcalls; QEMU syncs in up to 64 threads,
which its disks share. Possible faults: lost or merged flushes, a token used for another DIMM, a
sleep in atomic context, leaked memory or threads.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path

from paprscm import timesheet
from paprscm.errors import ContractError, HostError
from paprscm.flush.accounts import FlushAccounts
from paprscm.flush.load import FlushLoadReport, run_flush_load
from paprscm.flush.trace import expect_protocol
from paprscm.guest.guest import Guest
from paprscm.hcall.mailbox import Call
from paprscm.papr import Hcall, ReturnCode
from paprscm.pmem.fs_health import KERNEL_LOG, check_offline, expect_no_complaints
from paprscm.pmem.mounts import Mount, dax_mount
from paprscm.pmem.namespaces import create_fsdax, create_namespace
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest, QemuTest
from paprscm.vm.dimms import FOR_XFS, PLAIN, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

DISK, XFS, EXT4, BUSY, OTHER = 0, 1, 2, 3, 4
FLUSHED = (DISK, XFS, EXT4)
DIMMS = (
    PMEM_OFF.at(DISK, SMALL).holding("fsdax"),
    PMEM_OFF.at(XFS, FOR_XFS).holding("xfs"),
    PMEM_OFF.at(EXT4, SMALL).holding("ext4"),
    PMEM_OFF.at(BUSY, SMALL),
    PLAIN.at(OTHER, SMALL).holding("fsdax"),
)

SLOW_S = 0.02
"""Longest injected sync latency."""
LOAD_S = 6

# Idle threads of QEMU's pool end after 10 s (util/thread-pool.c). When many time out together, a
# newer C library reports some of them as woken, and they wait again; with QEMU 11.1 that took three
# rounds.
POOL_LIMIT_S = 90.0
MANY = 16_000

# Changes that run during the flushes; rounds are counted, and every command must succeed.
CHANGES = {
    "hotplug": "echo 0 > $C/online && echo 1 > $C/online",
    "namespace": "ndctl disable-namespace $N && ndctl enable-namespace $N && "
    "echo $P > $B/unbind && echo $P > $B/bind",
    "disk": "dd if=/dev/vda of=/dev/null bs=1M count=8 iflag=direct && "
    "dd if=/dev/zero of=$O bs=1M count=8 oflag=direct && dd if=$O of=/dev/null bs=1M count=8",
}


class FlushStress(PaprScmTest):
    """
    A disk, XFS and ext4 on three DIMMs, flushed by many threads concurrently.

    :avocado: tags=flush,stress
    """

    def machine(self) -> Guest:
        """Boot a guest with the DIMMs and their file systems, and count its flushes."""
        guest = self.boot(Machine(nvdimms=DIMMS), shim=self.shim())
        self.seeds = self.random()
        self.regions = {n.slot: wait_for_region(guest, n.slot) for n in DIMMS}
        self.disk = create_fsdax(guest, self.regions[DISK]).path
        self.mounts: list[Mount] = [
            dax_mount(guest, XFS, "xfs", "/mnt/xfs").mount,
            dax_mount(guest, EXT4, "ext4", "/mnt/ext4").mount,
        ]
        self.namespace = create_namespace(guest, self.regions[BUSY], mode="fsdax")
        self.other = create_fsdax(guest, self.regions[OTHER]).path
        limit = "/proc/sys/kernel/hung_task_timeout_secs"
        guest.succeed(f"[ ! -e {limit} ] || echo 20 > {limit}")
        self.accounts = FlushAccounts(guest, [n.slot for n in DIMMS])
        return guest

    def deep(self) -> list[str]:
        """The regions' deep_flush files."""
        return [f"{self.regions[slot].device}/deep_flush" for slot in FLUSHED]

    def mixed(self) -> list[str]:
        """The disk and the mount points for a mixture of calls."""
        return [self.disk, *(mount.mountpoint for mount in self.mounts)]

    def judge(self, name: str, result: FlushLoadReport, slots: Sequence[int] = FLUSHED) -> None:
        """Check that all calls succeeded, and that the flush counts of each DIMM agree."""
        result.expect_success()
        account = self.accounts.take(limit_s=15)
        expect_protocol(account.all())
        flushes = {slot: len(found) for slot, found in account.flushes.items()}
        account.expect(flushes)
        durations = sorted(call.duration_s for call in result.calls)
        self.metric("calls", len(result.calls), "calls", load=name)
        for slot, count in flushes.items():
            self.metric("flushes", count, "flushes", load=name, slot=slot)
        self.metric("hcalls", account.calls, "hcalls", load=name)
        self.metric("flush_rate", account.count / result.duration_s, "flushes/s", load=name)
        self.metric("call_median", durations[len(durations) // 2], "s", load=name)
        self.metric("call_longest", durations[-1], "s", load=name)
        if unflushed := [slot for slot in slots if not flushes[slot]]:
            raise HostError(f"the load did not flush the slots {unflushed}")

    def finish(self, guest: Guest) -> None:
        """Check that no file system reports an error, online or offline."""
        expect_no_complaints(guest.succeed(KERNEL_LOG))
        check_offline(guest, self.mounts)

    def test_operations(self) -> None:
        """48 threads flush three DIMMs with each kind of call and slow syncs; no flush is lost."""
        guest = self.machine()
        for slot in FLUSHED:
            guest.vm.syncs(slot).delay(0, SLOW_S)
        kinds: list[tuple[str, Sequence[str]]] = [("deep_flush", self.deep())]
        kinds += [(kind, self.mixed()) for kind in ("fsync", "dsync", "mixed")]
        kinds += [("msync", [mount.mountpoint for mount in self.mounts])]
        for kind, targets in kinds:
            seed = self.seeds.getrandbits(60)
            result = run_flush_load(guest, kind, targets, threads=48, count=6, seed=seed)  # type: ignore[arg-type]
            self.judge(kind, result, FLUSHED if kind != "msync" else (XFS, EXT4))
        self.finish(guest)

    def test_beside_everything(self) -> None:
        """During hotplug of CPU, namespace and driver, no flush is lost and no thread leaks."""
        guest = self.machine()
        for slot in FLUSHED:
            guest.vm.syncs(slot).delay(0, SLOW_S)
        self.begin(guest)
        result = self.load(guest, LOAD_S)
        rounds = self.end(guest)
        self.measure("beside", rounds)
        self.judge("beside everything", result)
        if idle := [name for name, count in rounds.items() if not count]:
            raise HostError(f"changes without a complete round: {', '.join(idle)}")
        self.finish(guest)
        expect_threads_end(guest.vm.process.pid)

    def load(self, guest: Guest, limit_s: int) -> FlushLoadReport:
        """Load the guest with a mixture of calls by 24 threads."""
        seed = self.seeds.getrandbits(60)
        return run_flush_load(
            guest, "mixed", self.mixed(), threads=24, count=100_000, limit_s=limit_s, seed=seed
        )

    def begin(self, guest: Guest) -> None:
        """Begin the changes in the background."""
        region = self.regions[BUSY]
        values = {
            "C": f"/sys/devices/system/cpu/cpu{self.settings.smp - 1}",
            "N": self.namespace.name,
            # The platform device is the parent of the region's bus.
            "P": f"ibm,persistent-memory:ibm,pmemory@{region.drc:x}",
            "B": "/sys/bus/platform/drivers/papr_scm",
            "O": self.other,
        }
        settings = " ".join(f"{name}={value}" for name, value in values.items())
        loops = [
            f"( n=0; while [ -e /tmp/go ]; do {{ {what}; }} > /tmp/{name}.log 2>&1 || "
            f"{{ echo failed > /tmp/{name}; exit; }}; n=$((n + 1)); done; "
            f"echo $n > /tmp/{name} ) < /dev/null > /dev/null 2>&1 &"
            for name, what in CHANGES.items()
        ]
        guest.succeed("\n".join([f"touch /tmp/go; {settings}", *loops]))

    def end(self, guest: Guest) -> dict[str, int]:
        """End the changes; return the number of rounds of each."""
        guest.succeed("rm /tmp/go")
        rounds = {}
        for name in CHANGES:
            text = guest.wait_until(f"[ -s /tmp/{name} ] && cat /tmp/{name}", timeout_s=30)
            if not re.fullmatch(r"\d+", text):
                raise ContractError(f"{name} failed: {guest.succeed(f'cat /tmp/{name}.log')}")
            rounds[name] = int(text)
        return rounds


def expect_threads_end(pid: int) -> None:
    """Check that the threads of a QEMU's pool end when no sync is pending."""
    deadline = time.monotonic() + POOL_LIMIT_S
    while workers := _workers(pid):
        if time.monotonic() > deadline:
            raise ContractError(
                f"{len(workers)} idle threads of QEMU's pool after {POOL_LIMIT_S:g} s"
            )
        # QEMU ends a thread after 10 s without work (util/thread-pool.c), without an event.
        timesheet.pause(0.2)


class FlushMemory(QemuTest):
    """
    Thousands of flushes of a machine without an operating system.

    :avocado: tags=flush,stress
    """

    def test_nothing_is_kept(self) -> None:
        """Thousands of completed flushes leave neither memory nor a thread behind in QEMU.

        A guest with an operating system is too noisy: QEMU keeps some MiB of translated code, and
        a flush takes a hundred bytes (spapr_nvdimm.c).
        """
        nvdimm = PMEM_OFF.at(0, SMALL)
        bare = self.bare(Machine(nvdimms=(nvdimm,), smp=1, memory_mib=256))
        pid = bare.vm.process.pid
        grown = []
        for count in (5_000, MANY):
            before = _own_kib(pid)
            for _ in range(0, count, 1000):
                flush = Call(Hcall.H_SCM_FLUSH, (nvdimm.drc, 0), 10_000_000, True)
                answers = bare.batch([flush] * 1000, timeout_s=60)
                codes = {answer.code for answer in answers}
                self.expect("codes of 1000 flushes", codes, {ReturnCode.H_SUCCESS})
            grown.append(_own_kib(pid) - before)
        self.measure("grown_kib", grown)
        # The first round fills QEMU's caches. Each flush that is kept takes 60 bytes.
        if grown[1] * 1024 > MANY * 32:
            raise ContractError(f"QEMU's memory grew by {grown[1]} KiB in {MANY} flushes")
        expect_threads_end(pid)


def _own_kib(pid: int) -> int:
    """QEMU's anonymous resident memory, KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise HostError(f"/proc/{pid}/status has no RssAnon")
    return int(match[1])


def _workers(pid: int) -> list[int]:
    """The threads of a QEMU's pool (util/thread-pool.c names them)."""
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        # It may end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (task / "comm").read_text().strip() == "worker":
                pids.append(int(task.name))
    return pids
