# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that do not come to their end: cancelled, or with one of the two QEMUs killed.

The source goes on with its pending flushes, or the destination has not begun to run; never both,
and never neither while the source is alive.
"""

import signal
import socket
import time
from collections import Counter
from collections.abc import Callable

from paprscm import timesheet
from paprscm.errors import ContractError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.handover import hold_flushes
from paprscm.migration.transfer import COPIED, SHARED, LoadError, Way, saving, wait_loaded
from paprscm.papr import Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine
from paprscm.vm.shim_layout import Operation

FLUSH = Hcall.H_SCM_FLUSH
LIMIT_S = 30.0

Act = Callable[[ScmJudge, socket.socket], None]


def cancel(judge: ScmJudge, _connection: socket.socket) -> None:
    """Cancel the migration."""
    judge.bare.qmp.execute("migrate_cancel")


def hang_up(_judge: ScmJudge, connection: socket.socket) -> None:
    """Close the socket, as a destination that ends."""
    connection.close()


class BrokenOff(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def source(self) -> ScmJudge:
        """A machine with a completed flush and three pending ones."""
        dimms = self.keep(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL)).nvdimms()
        machine = Machine(nvdimms=dimms, smp=1, memory_mib=256)
        judge = ScmJudge(self.bare(machine, shim=self.shim()), dimms)
        judge.make(request(FLUSH, drc_index(1), 0))
        judge.wait_completed(1, 1)
        judge.hold(0)
        judge.make(*[request(FLUSH, drc_index(0), 0)] * 3)
        return judge

    def goes_on(self, judge: ScmJudge, what: str) -> None:
        """Check that each flush of the source ends once, with one sync in all."""
        if judge.bare.qmp.execute("query-status")["status"] != "running":
            judge.bare.go_on()
        judge.bare.keep_awake(False)
        judge.make(*(request(FLUSH, drc_index(0), token) for token in (1, 2, 3)))
        judge.release(0)
        judge.poll_to_the_end()
        judge.make(*(request(FLUSH, drc_index(0), token) for token in (1, 2, 3)))
        self.check(f"syncs of the source, {what}", judge.bare.vm.syncs(0).counts().begun, 3)
        self.check(f"syncs of slot 1, {what}", judge.bare.vm.syncs(1).counts().begun, 1)

    def break_off(
        self,
        judge: ScmJudge,
        way: Way,
        received: int,
        act: Callable[[ScmJudge, socket.socket], None],
    ) -> str:
        """Migrate into a socket, read some bytes, break it off; return the migration's status."""
        bare = judge.bare
        bare.keep_awake(True)
        way.prepare(bare.vm)
        path = bare.vm.scratch / "outgoing"
        with socket.socket(socket.AF_UNIX) as listener:
            # A small buffer: QEMU cannot send much more than was read.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(LIMIT_S)
            bare.qmp.execute("migrate", uri=f"unix:{path}")
            connection, _ = listener.accept()
            path.unlink()
            with connection, saving(bare.vm):
                connection.settimeout(LIMIT_S)
                while received > 0 and (chunk := connection.recv(received)):
                    received -= len(chunk)
                act(judge, connection)
                return self.wait_ended(judge)

    def wait_ended(self, judge: ScmJudge) -> str:
        """Wait for the end of a migration; return its status."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            status = str(judge.bare.qmp.execute("query-migrate").get("status"))
            if status in ("cancelled", "failed", "completed"):
                return status
            # The event may have come before the migration was broken off.
            time.sleep(0.005)
        raise ContractError(f"the migration has the status {status} after {LIMIT_S:g} s")

    def test_cancelled(self) -> None:
        """A cancelled migration leaves the source and its flushes as they were."""
        # While it sends memory. Later QEMU does not answer its monitor until everything is sent.
        for received in (0, self.random().randrange(1 << 20)):
            judge = self.source()
            status = self.break_off(judge, COPIED, received, cancel)
            self.check(f"status, cancelled after {received} bytes", status, "cancelled")
            self.goes_on(judge, f"cancelled after {received} bytes")
            judge.bare.close()

    def test_destination_killed(self) -> None:
        """When the destination goes, the migration fails, and the source goes on."""
        generator = self.random()
        for way in (SHARED, SHARED, COPIED):
            judge = self.source()
            received = generator.randrange(1, 2 << 20)
            status = self.break_off(judge, way, received, hang_up)
            what = f"broken off after {received} bytes {way.name}"
            self.check(f"status, {what}", status, "failed")
            self.goes_on(judge, what)
            judge.bare.close()

    def start_migration(self, judge: ScmJudge) -> BareMachine:
        """Begin to migrate to a new QEMU with files of its own; return that machine."""
        copies = self.keep(*judge.nvdimms).nvdimms()
        machine = Machine(nvdimms=copies, smp=1, memory_mib=256)
        destination = self.bare(machine, shim=self.shim(), source=judge.bare, shares_memory=False)
        hold_flushes(destination.vm, 0)
        judge.bare.keep_awake(True)
        for bare in (judge.bare, destination):
            COPIED.prepare(bare.vm)
        uri = f"unix:{destination.vm.scratch / 'incoming'}"
        destination.qmp.execute("migrate-incoming", uri=uri)
        judge.bare.qmp.execute("migrate", uri=uri)
        return destination

    def test_killed(self) -> None:
        """One QEMU that is killed during a migration leaves a machine that works, or none.

        Without the destination, the source goes on. Without the source, the destination runs only
        if it has received everything; else it ends with a message.
        """
        generator = self.random()
        ends: Counter[str] = Counter()
        for _ in range(int(self.params.get("kills", default=2))):
            judge = self.source()
            destination = self.start_migration(judge)
            # At any moment of the migration, which takes half a second on an idle host.
            timesheet.pause(generator.uniform(0, 0.6))
            destination.process.send_signal(signal.SIGKILL)
            status = self.wait_ended(judge)
            ends[f"destination killed, {status}"] += 1
            if status == "failed":
                self.goes_on(judge, "destination killed")
            destination.close()
            judge.bare.close()

            judge = self.source()
            destination = self.start_migration(judge)
            # As above.
            timesheet.pause(generator.uniform(0, 0.6))
            judge.bare.process.send_signal(signal.SIGKILL)
            try:
                wait_loaded(destination.vm)
            except LoadError as error:
                ends["source killed, refused"] += 1
                self.check("exit status of the destination", error.is_refusal, True)
                self.check("its message", bool(error.text), True)
            else:
                ends["source killed, completed"] += 1
                destination.adopt()
                follower = judge.follow(destination)
                follower.make(*(request(FLUSH, drc_index(0), token) for token in (1, 2, 3)))
                follower.release(0)
                follower.poll_to_the_end()
                syncs = destination.vm.syncs(0).counts(Operation.FDATASYNC).begun
                self.check("syncs of the destination, source killed", syncs, 3)
            destination.close()
        self.measure("ends", dict(ends))
        self.log.info("%s", dict(ends))
