# SPDX-License-Identifier: GPL-2.0-or-later
"""Flushes from many threads on several DIMMs, during hotplug and other changes.

papr_scm_pmem_flush holds no lock and sleeps between its hypervisor calls; QEMU has up to 64
threads that sync, which its disks share. What may go wrong is lost or merged flushes, a token of
one DIMM taken for another's, a sleep in atomic context, leaked memory or threads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from paprscm.device.mailbox import Call
from paprscm.errors import ContractError, HostError
from paprscm.flush.accounts import FlushAccounts
from paprscm.flush.load import FlushLoadReport, run_flush_load
from paprscm.flush.trace import expect_protocol
from paprscm.guest.guest import Guest
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
"""A sync takes up to so long."""
LOAD_S = 6

# Threads of QEMU's pool that have nothing to do end after 10 s (util/thread-pool.c). Of many that
# time out at once some are told by a newer C library that they were woken, and wait anew; with
# QEMU 11.1 that took three rounds.
POOL_LIMIT_S = 90.0
MANY = 16_000

# The rounds of each are counted, and every command must succeed.
BESIDE = {
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
        """The regions' attributes."""
        return [f"{self.regions[slot].device}/deep_flush" for slot in FLUSHED]

    def mixed(self) -> list[str]:
        """The disk and the mount points for a mixture of calls."""
        return [self.disk, *(mount.mountpoint for mount in self.mounts)]

    def judge(self, name: str, made: FlushLoadReport, slots: Sequence[int] = FLUSHED) -> None:
        """Check that all calls succeeded, and that the counts of the DIMMs agree."""
        made.expect_success()
        account = self.accounts.take(limit_s=15)
        expect_protocol(account.all())
        flushes = {slot: len(found) for slot, found in account.flushes.items()}
        account.expect(flushes)
        durations = sorted(call.duration_s for call in made.calls)
        self.measure(
            name,
            {
                "calls": len(made.calls),
                "flushes": flushes,
                "hcalls": account.calls,
                "flushes_per_s": account.count / made.duration_s,
                "p50_ms": durations[len(durations) // 2] * 1000,
                "max_ms": durations[-1] * 1000,
            },
        )
        if never := [slot for slot in slots if not flushes[slot]]:
            raise HostError(f"nothing was flushed in the slots {never}: the load was none")

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
            made = run_flush_load(guest, kind, targets, threads=48, count=6, seed=seed)  # type: ignore[arg-type]
            self.judge(kind, made, FLUSHED if kind != "msync" else (XFS, EXT4))
        self.finish(guest)

    def test_beside_everything(self) -> None:
        """While a CPU, a namespace and a driver come and go, no flush and no thread is lost."""
        guest = self.machine()
        for slot in FLUSHED:
            guest.vm.syncs(slot).delay(0, SLOW_S)
        self.begin(guest)
        made = self.load(guest, LOAD_S)
        rounds = self.end(guest)
        self.measure("beside", rounds)
        self.judge("beside everything", made)
        if idle := [name for name, count in rounds.items() if not count]:
            raise HostError(f"beside the flushes there never was: {', '.join(idle)}")
        self.finish(guest)
        expect_threads_end(guest.vm.process.pid)

    def load(self, guest: Guest, limit_s: int) -> FlushLoadReport:
        """Load the guest with a mixture of calls by 24 threads."""
        seed = self.seeds.getrandbits(60)
        return run_flush_load(
            guest, "mixed", self.mixed(), threads=24, count=100_000, limit_s=limit_s, seed=seed
        )

    def begin(self, guest: Guest) -> None:
        """Begin the changes that go on meanwhile."""
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
            for name, what in BESIDE.items()
        ]
        guest.succeed("\n".join([f"touch /tmp/go; {settings}", *loops]))

    def end(self, guest: Guest) -> dict[str, int]:
        """End the changes; the number of rounds of each."""
        guest.succeed("rm /tmp/go")
        rounds = {}
        for name in BESIDE:
            said = guest.wait_until(f"[ -s /tmp/{name} ] && cat /tmp/{name}", timeout_s=30)
            if not re.fullmatch(r"\d+", said):
                raise ContractError(f"{name} failed: {guest.succeed(f'cat /tmp/{name}.log')}")
            rounds[name] = int(said)
        return rounds


def expect_threads_end(pid: int) -> None:
    """Check that the threads of a QEMU's pool end when there is nothing to sync."""
    deadline = time.monotonic() + POOL_LIMIT_S
    while workers := _workers(pid):
        if time.monotonic() > deadline:
            raise ContractError(f"{len(workers)} threads of QEMU's pool do not end")
        time.sleep(0.2)


class FlushMemory(QemuTest):
    """
    Thousands of flushes of a machine without an operating system.

    :avocado: tags=flush,stress
    """

    def test_nothing_is_kept(self) -> None:
        """Thousands of completed flushes leave neither memory nor a thread behind in QEMU.

        A guest with an operating system cannot show that: for what it executes the first time QEMU
        keeps some MiB, and a flush is a hundred bytes (spapr_nvdimm.c).
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
        # The first fill what is kept for later ones. Each that is not forgotten takes 60 bytes.
        if grown[1] * 1024 > MANY * 32:
            raise ContractError(f"QEMU's memory grew by {grown[1]} KiB in {MANY} flushes")
        expect_threads_end(pid)


def _own_kib(pid: int) -> int:
    """QEMU's anonymous resident memory, KiB."""
    rollup = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", rollup, re.MULTILINE)
    if found is None:
        raise HostError(f"/proc/{pid}/status has no RssAnon")
    return int(found[1])


def _workers(pid: int) -> list[int]:
    """The threads of a QEMU's pool (util/thread-pool.c names them)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == "worker":
            found.append(int(task.name))
    return found
