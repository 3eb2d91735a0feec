# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots in a qcow2 file (QMP's snapshot-save and snapshot-load) with pending flushes.

A load resets the machine first, which waits for its pending flushes (QEMU spapr_nvdimm.c:
spapr_nvdimm_finish_flushes); then it loads the state of the snapshot.
"""

import copy
from typing import Any

from paprscm.errors import ContractError
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.transfer import saving
from paprscm.papr import Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine
from paprscm.vm.shim_layout import Operation
from paprscm.vm.vm import Vm

FLUSH = Hcall.H_SCM_FLUSH
LIMIT_S = 60.0


def run_job(vm: Vm, command: str, **arguments: Any) -> None:
    """Run a job to its end; raise ContractError if it fails."""
    job = command

    def ended(data: dict[str, Any]) -> bool:
        return data == {"id": job, "status": "concluded"}

    vm.qmp.execute_until(
        command, "JOB_STATUS_CHANGE", ended, limit_s=LIMIT_S, job_id=job, **arguments
    )
    (state,) = (one for one in vm.qmp.execute("query-jobs") if one["id"] == job)
    vm.qmp.execute("job-dismiss", id=job)
    if "error" in state:
        raise ContractError(f"{command} has failed: {state['error']}")


def create_qcow2(vm: Vm) -> str:
    """Create a qcow2 file for snapshots, open it, and return its node."""
    file = vm.scratch / "snapshots.qcow2"
    file.touch()
    vm.qmp.execute("blockdev-add", driver="file", node_name="file", filename=str(file))
    options = {"driver": "qcow2", "file": "file", "size": 1 << 20}
    run_job(vm, "blockdev-create", options=options)
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name="disk", file="file")
    return "disk"


class Snapshots(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def test_load(self) -> None:
        """A load restores the flushes of the snapshot, and syncs its pending ones again.

        Flushes that began after the snapshot are unknown after the load, although they have ended.
        """
        dimms = self.keep(PMEM_OFF.at(0, SMALL)).nvdimms()
        machine = Machine(nvdimms=dimms, smp=1, memory_mib=256)
        judge = ScmJudge(self.bare(machine, shim=self.shim()), dimms)
        vm, syncs = judge.bare.vm, judge.bare.vm.syncs(0)
        node = create_qcow2(vm)
        snapshot = {"tag": "flushes", "vmstate": node, "devices": [node]}
        # Tokens 1 and 2 have ended, 3 to 5 are pending.
        judge.make(*[request(FLUSH, drc_index(0), 0)] * 2)
        judge.wait_completed(0, 2)
        judge.hold(0)
        for token in (3, 4, 5):
            judge.make(request(FLUSH, drc_index(0), 0))
            # Several at once could block the writes to the qcow2 file, see
            # known_issues/qemu-thread-pool-waits-for-hung-request.md.
            syncs.wait_begun(token)
        judge.bare.keep_awake(True)
        with saving(vm):
            run_job(vm, "snapshot-save", **snapshot)
        judge.bare.keep_awake(False)
        saved = copy.deepcopy(judge.model)
        judge.release(0)
        judge.poll_to_the_end()
        # Tokens 6 and 7 are pending when the load begins.
        syncs.delay(0.1)
        judge.make(*[request(FLUSH, drc_index(0), 0)] * 2)
        run_job(vm, "snapshot-load", **snapshot)
        judge.bare.adopt()
        judge.model = saved
        saved.release(0)
        judge.make(*(request(FLUSH, drc_index(0), token) for token in (6, 7, 3, 4, 5, 0)))
        judge.poll_to_the_end()
        judge.make(*(request(FLUSH, drc_index(0), token) for token in range(1, 8)))
        self.check("syncs", syncs.counts(Operation.FDATASYNC).begun, 7 + 3 + 1)
        self.check("syncs of a part", syncs.partial(SMALL), [])
