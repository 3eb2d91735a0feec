# SPDX-License-Identifier: GPL-2.0-or-later
"""Page faults under load: threads map, store, truncate, punch holes and rename concurrently.

A DAX mapping maps the file system's own blocks. Before a truncation or a hole frees a block, the
block must be removed from every mapping (fs/dax.c, dax_layout_busy_page; mm/truncate.c,
truncate_pagecache), while other threads fault pages in (mapping->invalidate_lock). The rest of a
page must be zeroed in place (dax_truncate_page). A fault here is a store into another file's block,
or a block that is never freed.
"""

from __future__ import annotations

from paprscm.guest.guest import Guest
from paprscm.guest.report import read_report
from paprscm.guest.tools import install_tool
from paprscm.map_sync.fault_load import (
    FaultLoadReport,
    FaultVerifyReport,
    expect_load,
    expect_verified,
)
from paprscm.pmem.fs_health import KERNEL_LOG, check_offline, expect_no_complaints
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON
from paprscm.vm.machine import Machine, Nvdimm

THREADS = 8
OPERATIONS = 250
"""Operations per thread."""
LIMIT_S = 30


class Faults(PaprScmTest):
    """
    Eight threads on one DAX file system.

    :avocado: tags=map_sync,faults
    """

    def judge(self, guest: Guest, slot: int, fstype: FsType, *, sync: bool) -> None:
        """Load a file system, unmount it, mount it again, and verify every byte."""
        seed = self.random().getrandbits(62)
        mounted = dax_mount(guest, slot, fstype, f"/mnt/{slot}").mount
        tool, words = self.tool, f"--seed={seed} --expected=/tmp/expected{slot}"
        result = guest.run(
            f"mkdir /tmp/expected{slot} && {tool} load {words} --sync={'on' if sync else 'off'} "
            f"--threads={THREADS} --operations={OPERATIONS} --limit={LIMIT_S} {mounted.mountpoint}"
        )
        load = read_report(FaultLoadReport, result.stdout, result.status, result.stderr)
        self.measure(f"load {fstype}", result.stdout)
        expect_load(load)
        # Nothing of the load is left in memory then.
        guest.succeed(
            f"umount {mounted.mountpoint} && echo 3 > /proc/sys/vm/drop_caches && "
            f"mount -o dax=always {mounted.device} {mounted.mountpoint}"
        )
        result = guest.run(f"{tool} verify {words} {mounted.mountpoint}")
        verified = read_report(FaultVerifyReport, result.stdout, result.status, result.stderr)
        self.measure(f"verify {fstype}", result.stdout)
        expect_verified(verified, load)
        expect_no_complaints(guest.succeed(KERNEL_LOG))
        check_offline(guest, [mounted])

    def machine(self, *nvdimms: Nvdimm) -> Guest:
        """Boot a guest with these DIMMs, and compile the tool in it."""
        guest = self.boot(Machine(nvdimms=nvdimms))
        self.tool = install_tool(guest, "faults")
        return guest

    def test_map_sync_xfs(self) -> None:
        """On XFS with MAP_SYNC, eight threads lose no byte and store nothing beyond EOF."""
        self.judge(self.machine(PMEM_ON.holding("xfs")), 0, "xfs", sync=True)

    def test_map_sync_ext4(self) -> None:
        """On ext4 with MAP_SYNC, eight threads lose no byte and store nothing beyond EOF."""
        self.judge(self.machine(PMEM_ON.holding("ext4")), 0, "ext4", sync=True)

    def test_flushed_by_hcall(self) -> None:
        """On XFS and ext4 over pmem=off, eight threads with mappings and fsync lose no byte."""
        guest = self.machine(PMEM_OFF.at(0).holding("xfs"), PMEM_OFF.at(1).holding("ext4"))
        self.judge(guest, 0, "xfs", sync=False)
        self.judge(guest, 1, "ext4", sync=False)
