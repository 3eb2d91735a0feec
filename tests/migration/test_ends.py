# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests that end, or start another kernel, while flushes are pending.

A flush belongs to the machine, not to the kernel that began it: QEMU forgets it only in a reset,
which waits for its sync (hw/ppc/spapr_nvdimm.c, spapr_nvdimm_finish_flushes). kexec and kdump do
not reset the machine. A kernel that shuts its devices down flushes each DIMM that has a namespace
(Linux drivers/nvdimm/pmem.c, nd_pmem_shutdown); so flushes are held of a DIMM without one.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from paprscm.checks import above
from paprscm.errors import ContractError
from paprscm.flush.trace import FlushTrace, expect_protocol
from paprscm.guest.guest import Guest
from paprscm.guest.kexec import CRASH_MEMORY, NO_HCALL_STATS, end_kernel, load_kernel, start_loaded
from paprscm.migration.moves import SAME_FILES, Mover, write_synced
from paprscm.migration.stream import DimmState, read_states
from paprscm.migration.transfer import save
from paprscm.papr import Hcall
from paprscm.pmem.namespaces import create_fsdax, find_namespaces
from paprscm.pmem.regions import find_region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

DISK, IDLE = PMEM_OFF.at(3, SMALL).holding("fsdax"), PMEM_OFF.at(5, SMALL)
PENDING = 4
"""Flushes that hang."""
ROUNDS = 3
HELD_S = 1.0
"""Time without an answer after which the monitor is blocked, s."""
BEGIN_S, END_S, BOOT_S = 60.0, 60.0, 120.0
"""Time limits on a busy host: for a flush to begin, for QEMU's end, for a start of the guest."""
COUNTS = "CONFIG_HCALL_STATS"
KEXEC_CPUS = 1
"""With two, a kernel that is started by kexec sometimes waits forever for the other one."""
PANIC = (r"sysrq: Trigger a crash", r"Kernel panic", r"OS terminated")


class EndTest(PaprScmTest):
    """
    Base of tests with one DIMM that has data, and one whose flushes hang.

    :avocado: disable
    """

    def start(self, *words: str, allowed: tuple[str, ...] = (), smp: int | None = None) -> Guest:
        """Start a guest with synced data on a disk.

        Args:
            words: for its kernel; with any of them it boots, and has its DIMMs from then on.
            allowed: kernel messages that the test expects.
            smp: number of vCPUs; None: from the settings.
        """
        machine = Machine(nvdimms=(DISK, IDLE), cmdline=words, smp=smp)
        guest = self.leave.enter_context(
            self.environment.guest(
                machine,
                folder=self.folder("guest"),
                allowed=allowed,
                shim=self.shim(),
                # Then its memory is not in the stream that left_behind() reads.
                migrates=True,
            )
        )
        self.data = write_synced(
            guest, DISK.slot, create_fsdax(guest, find_region(guest, DISK.slot)).path
        )
        # In the page cache: a pending flush may block the root disk, see flush().
        guest.succeed("sleep 0")
        return guest

    def flush(self, guest: Guest, pending: int) -> None:
        """Begin flushes of the idle DIMM, which hang.

        One after the other: while a thread of QEMU's pool wakes up, QEMU queues all requests for
        that thread, those of disks as well (util/thread-pool.c, idle_threads). They would wait for
        the first sync.
        """
        syncs = guest.vm.syncs(IDLE.slot)
        begun = syncs.counts().begun
        syncs.hang()
        path = f"{find_region(guest, IDLE.slot).device}/deep_flush"
        for number in range(pending):
            guest.succeed(f"echo 1 > {path} < /dev/null 2> /dev/null &")
            syncs.wait_begun(begun + number + 1, BEGIN_S)

    def expect_data(self, guest: Guest) -> None:
        """Check that the file behind the disk has the synced data."""
        found = self.data.is_in(guest.file(DISK.slot))
        self.check("synced data are in the file", found, True)


class LinuxEnds(EndTest):
    """
    A guest that ends.

    :avocado: tags=migration
    """

    def each_end(self, end: Callable[[Guest], object], *, shutdown_flushes: int) -> None:
        """End guests with and without pending flushes.

        Args:
            end: begins the end.
            shutdown_flushes: flushes of the disk by the end.
        """
        for pending in (PENDING, 0):
            guest = self.start(allowed=PANIC)
            disk, idle = (guest.vm.syncs(dimm.slot) for dimm in (DISK, IDLE))
            before = disk.counts().begun
            self.flush(guest, pending)
            began = time.monotonic()
            end(guest)
            status = guest.process.wait(END_S)
            what = f"{pending} flushes pending"
            self.metric("end", time.monotonic() - began, "s", by=what)
            self.expect(f"QEMU's exit status, {what}", status, 0)
            guest.kill()
            counts = idle.counts()
            self.check(f"syncs begun and ended, {what}", (counts.begun, counts.ended), (pending, 0))
            counts = disk.counts()
            self.check(f"syncs of the disk that ended, {what}", counts.ended, counts.begun)
            self.usual("flushes of the disk by the end", counts.begun - before, shutdown_flushes)
            self.expect_data(guest)
            idle.release()

    def test_quit(self) -> None:
        """quit ends QEMU without waiting for flushes; synced data are in the file."""

        def end(guest: Guest) -> None:
            # The monitor may close before it answers.
            self.leave.enter_context(ThreadPoolExecutor(1)).submit(guest.qmp.execute, "quit")

        self.each_end(end, shutdown_flushes=0)

    def test_powerdown(self) -> None:
        """A guest powers down while flushes of a DIMM without a namespace are pending.

        Its kernel flushes the other one, and synced data are in the file.
        """
        self.each_end(lambda guest: guest.qmp.execute("system_powerdown"), shutdown_flushes=1)

    def test_panic(self) -> None:
        """A panic ends QEMU without waiting for flushes; synced data are in the file."""
        self.each_end(
            lambda guest: end_kernel(guest, "echo c > /proc/sysrq-trigger"), shutdown_flushes=0
        )


class LinuxRestarts(EndTest):
    """
    A guest that starts another kernel.

    :avocado: tags=migration
    """

    def start(self, *words: str, allowed: tuple[str, ...] = (), smp: int | None = None) -> Guest:
        """Start a guest with synced data on a disk, and with its DIMMs from the boot on."""
        # A kernel that finds DIMMs at its boot makes a DMA window whose table is 1 GB of the stream
        # that left_behind() reads (arch/powerpc/platforms/pseries/iommu.c, enable_ddw).
        return super().start("disable_ddw", *words, allowed=allowed, smp=smp)

    def restart(
        self, guest: Guest, begin: Callable[[], object], what: str, *, pending: int, waits: bool
    ) -> bool:
        """Start another kernel; return True if QEMU's monitor is blocked meanwhile.

        If it is blocked, the flushes are released; else they still hang.

        Args:
            guest: the guest.
            begin: begins the restart.
            what: its name, for a report.
            pending: number of flushes that hang; they still do if the monitor is not blocked.
            waits: this restart waits for flushes, so the monitor may be blocked.
        """
        # The suite's guests end with the first reset (-no-reboot).
        guest.qmp.execute("set-action", reboot="reset")
        printed, syncs = len(guest.console.lines), guest.vm.syncs(IDLE.slot)
        ended = syncs.counts().ended
        began = time.monotonic()
        durations_s: list[float] = []
        blocked = False

        def timed(call: Callable[[], object]) -> None:
            start = time.monotonic()
            call()
            durations_s.append(time.monotonic() - start)

        with ThreadPoolExecutor(1) as pool:
            # The monitor may not answer system_reset, either.
            answer = pool.submit(timed, begin)
            while not self.printed(guest, "paprscm: ready", printed, 0.05):
                guest.check()
                if time.monotonic() - began > BOOT_S:
                    raise ContractError(f"the guest did not start again within {BOOT_S:g} s")
                if not blocked and wait([answer], HELD_S if waits else END_S).not_done:
                    blocked = True
                    self.check(f"{what}: syncs that ended", syncs.counts().ended, ended)
                    syncs.release()
                answer.result(END_S)
                answer = pool.submit(timed, lambda: guest.qmp.execute("query-status"))
        self.metric("guest_ready", time.monotonic() - began, "s", by=what)
        self.metric("slowest_answer", max(durations_s), "s", by=what)
        if not blocked:
            counts = syncs.counts()
            self.check(f"{what}: flushes that hang", counts.begun - counts.ended, pending)
        return blocked

    def printed(self, guest: Guest, text: str, start: int, limit_s: float) -> bool:
        """Return True if the guest prints a text after the first `start` lines, within a time."""
        marks = {"text": re.compile(re.escape(text))}
        line = guest.console.wait_for(marks, timeout_s=limit_s, silence_s=math.inf, start=start)
        return line is not None

    def expect_reset(self, what: str, *, blocked: bool) -> None:
        """Report that a reset blocks QEMU."""
        self.known_issue(
            "qemu-reset-waits-for-flush",
            shows=blocked,
            found=f"in a {what} while flushes hang the monitor "
            + (f"does not answer for {HELD_S:g} s" if blocked else "answers"),
        )

    def expect_next_kernel(self, guest: Guest, what: str) -> None:
        """Check flushes of the next kernel, and that it has the data.

        No token of the old kernel occurs again. If those of the old kernel hang, its own hang with
        them, and all are released.
        """
        disk, region = (find_region(guest, dimm.slot) for dimm in (DISK, IDLE))
        syncs = guest.vm.syncs(IDLE.slot)
        before = syncs.counts()
        trace = FlushTrace(guest)
        # Not by guest_tools/flush.c, which the new guest would have to compile.
        rounds = f"for _ in $(seq {ROUNDS}); do echo 1 > {region.device}/deep_flush; done &\n"
        with ThreadPoolExecutor(1) as pool:
            flushed = pool.submit(guest.succeed, f"{rounds * PENDING}wait")
            syncs.wait_begun(before.begun + 1, BEGIN_S)
            syncs.release()
            flushed.result()
        flushes = trace.read().flushes
        expect_protocol(flushes)
        self.check(f"{what}: new flushes", len(flushes), ROUNDS * PENDING)
        tokens = [flush.calls[0].token for flush in flushes]
        # Each earlier flush had one sync, and one token.
        self.check(f"{what}: the lowest new token", min(tokens), above(before.begun))
        counts, expected = syncs.counts(), before.begun + len(flushes)
        self.check(f"{what}: syncs begun", counts.begun, expected)
        self.check(f"{what}: syncs ended", counts.ended, expected)
        (namespace,) = find_namespaces(guest, disk)
        words = f"head -c {len(self.data.content)} {namespace.disk.path}"
        found = guest.succeed(f"{words} | od -An -v -tx1 | tr -d ' \\n'")
        self.check(f"{what}: synced data are on the disk", found == self.data.content.hex(), True)
        self.expect_data(guest)

    def left_behind(self, guest: Guest) -> DimmState:
        """Stop the guest; return QEMU's state of the idle DIMM's flushes, in a stream."""
        guest.qmp.execute("stop")
        _disk, idle = read_states(save(guest.vm, SAME_FILES))
        return idle

    def expect_forgotten(self, guest: Guest) -> None:
        """Check that QEMU has forgotten the flushes of all kernels."""
        state = self.left_behind(guest)
        self.check("flushes in QEMU's state", (state.pending, state.completed), ((), ()))

    def test_reset(self) -> None:
        """A reset waits for pending flushes and forgets them; the next kernel's are its own."""
        guest = self.start()
        for pending in (PENDING, 0):
            what = f"reset, {pending} flushes pending"
            self.flush(guest, pending)
            blocked = self.restart(
                guest,
                lambda: guest.qmp.execute("system_reset"),
                what,
                pending=pending,
                waits=bool(pending),
            )
            if pending:
                self.expect_reset("reset", blocked=blocked)
            else:
                self.check(f"{what}: the monitor is blocked", blocked, False)
            self.expect_next_kernel(guest, what)
        self.expect_forgotten(guest)

    def test_reboot_after_migration(self) -> None:
        """A guest that reboots with flushes pending since its migration boots when they end.

        The next kernel's flushes are its own, and data that were synced before are there.
        """
        guest = self.start()
        mover = Mover(guest, self.environment)
        self.flush(guest, PENDING)
        vm = mover.successor(SAME_FILES, folder=self.folder("guest"), shim=self.shim())
        syncs = vm.syncs(IDLE.slot)
        syncs.hang()
        mover.move(vm, SAME_FILES)
        # The others may wait for it, see flush().
        syncs.wait_begun(1, BEGIN_S)
        blocked = self.restart(
            guest,
            lambda: end_kernel(guest, "echo b > /proc/sysrq-trigger"),
            "reboot",
            pending=PENDING,
            waits=True,
        )
        self.expect_reset("reboot", blocked=blocked)
        self.expect_next_kernel(guest, "reboot")
        self.expect_forgotten(guest)

    def test_kexec_with_flushes(self) -> None:
        """A kernel that is started by kexec flushes while flushes of the old kernel are pending.

        The old kernel's end flushes the disk. The monitor answers.
        """
        self.kexec(PENDING)

    def test_kexec_without_flushes(self) -> None:
        """After kexec a kernel has flushes of its own, and QEMU has none of the old kernel."""
        self.kexec(0)

    def kexec(self, pending: int) -> None:
        """Start another kernel while flushes hang, and judge it."""
        self.require_kernel("CONFIG_KEXEC_FILE", COUNTS)
        guest = self.start(NO_HCALL_STATS, smp=KEXEC_CPUS)
        load_kernel(guest, self.environment.equipment.payload)
        disk = guest.vm.syncs(DISK.slot)
        begun = disk.counts().begun
        self.flush(guest, pending)
        blocked = self.restart(
            guest, lambda: start_loaded(guest), "kexec", pending=pending, waits=False
        )
        self.check("the monitor is blocked", blocked, False)
        self.usual("flushes of the disk by kexec", disk.counts().begun - begun, 1)
        self.expect_bound(guest)
        self.expect_next_kernel(guest, "kexec")
        self.expect_left(guest, "kexec", pending)

    def test_kexec_after_plug(self) -> None:
        """A DIMM that was plugged into the running guest is there after kexec."""
        self.require_kernel("CONFIG_KEXEC_FILE")
        guest = self.boot(Machine(cmdline=(NO_HCALL_STATS,), smp=KEXEC_CPUS), shim=self.shim())
        guest.plug(IDLE)
        node = wait_for_region(guest, IDLE.slot).node.path
        load_kernel(guest, self.environment.equipment.payload)
        self.restart(guest, lambda: start_loaded(guest), "kexec", pending=0, waits=False)
        lost = guest.run(f"[ -d /proc/device-tree{node} ]").status != 0
        self.known_issue(
            "linux-kexec-forgets-plugged-dimm",
            shows=lost,
            found=f"after kexec {node} is " + ("missing" if lost else "in the device tree"),
        )

    def test_kdump(self) -> None:
        """After a panic the crash kernel flushes while flushes of the old kernel are pending.

        It has the data that were synced before. The monitor answers.
        """
        self.require_kernel("CONFIG_KEXEC_FILE", "CONFIG_CRASH_DUMP", "CONFIG_PROC_VMCORE", COUNTS)
        guest = self.start(NO_HCALL_STATS, CRASH_MEMORY, allowed=PANIC, smp=KEXEC_CPUS)
        load_kernel(guest, self.environment.equipment.payload, crash=True)
        disk = guest.vm.syncs(DISK.slot)
        begun = disk.counts().begun
        self.flush(guest, PENDING)
        blocked = self.restart(
            guest,
            lambda: end_kernel(guest, "echo c > /proc/sysrq-trigger"),
            "kdump",
            pending=PENDING,
            waits=False,
        )
        self.check("the monitor is blocked", blocked, False)
        self.expect("the crash kernel has the dump", guest.run("[ -s /proc/vmcore ]").status, 0)
        self.check("syncs of the disk since the panic", disk.counts().begun - begun, 0)
        self.expect_bound(guest)
        self.expect_next_kernel(guest, "kdump")
        self.expect_left(guest, "kdump", PENDING)

    def expect_bound(self, guest: Guest) -> None:
        """Check that the new kernel has bound both DIMMs with one H_SCM_BIND_MEM each."""
        calls = guest.succeed(
            "awk '{ n[$1] += $2 } END { for (i in n) print i, n[i] }' "
            "/sys/kernel/debug/hcall_inst/cpu*"
        )
        lines = [line.split() for line in calls.splitlines()]
        counts = {int(opcode): int(count) for opcode, count in lines}
        names = (Hcall.H_SCM_BIND_MEM, Hcall.H_SCM_UNBIND_MEM, Hcall.H_SCM_UNBIND_ALL)
        found = {call.name: counts.get(int(call), 0) for call in names}
        expected = dict(zip(found, (2, 0, 0), strict=True))
        self.check("calls of the new kernel", found, expected)

    def expect_left(self, guest: Guest, what: str, pending: int) -> None:
        """Report whether QEMU still has flushes of the old kernel, which no kernel polls."""
        state = self.left_behind(guest)
        tokens = sorted(flush.token for flush in (*state.pending, *state.completed))
        unknown = [token for token in tokens if token > pending]
        self.check(f"{what}: other flushes in QEMU's state", unknown, [])
        if pending:
            self.known_issue(
                "qemu-flush-results-outlive-kernel",
                shows=bool(tokens),
                found=f"{what}: QEMU has {len(tokens)} results for the old kernel",
            )
