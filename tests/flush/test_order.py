# SPDX-License-Identifier: GPL-2.0-or-later
"""No call that promises durability returns before its data are durable.

fsync(2), fdatasync(2), msync(2) with MS_SYNC, syncfs(2), and writes with O_DSYNC return when the
data are on stable storage, "so that all changed information can be retrieved even if the system
crashes". On pmem=off the data are durable when a sync of the backing file has ended that began
after the store; the host records both times.
"""

from __future__ import annotations

from paprscm.errors import ContractError, HostError
from paprscm.flush.durability import ClockOffset, compare_clocks, expect_durable
from paprscm.flush.load import run_flush_load
from paprscm.guest.guest import Guest
from paprscm.pmem.mounts import dax_mount
from paprscm.pmem.namespaces import CharacterDevice, create_fsdax, create_namespace
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PLAIN, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

DISK, XFS, EXT4, CLOCK = 0, 1, 2, 3
SIZES = {DISK: SMALL, XFS: FOR_XFS, EXT4: SMALL}
CONTENTS = {DISK: "fsdax", XFS: "xfs", EXT4: "ext4"}
THREADS = 12
CALLS = 30
"""Calls per thread."""

SYNC_LOW_S, SYNC_HIGH_S = 0.008, 0.04
"""Injected sync latency; a call that returns sooner cannot have waited for a flush."""


class FlushOrder(PaprScmTest):
    """
    A random mixture of calls from several threads, with slow syncs.

    :avocado: tags=flush
    """

    def compare(self, guest: Guest) -> ClockOffset:
        """Measure the clock offset of guest and host, accurate enough for the comparison."""
        offset = compare_clocks(guest, self.region, self.device)
        for _ in range(4):
            if offset.width_ns < SYNC_LOW_S * 1e9 / 4:
                break
            offset = offset.narrowed(compare_clocks(guest, self.region, self.device))
        self.log.info("the clocks are compared to %d us", offset.width_ns // 1000)
        return offset

    def test_never_too_few(self) -> None:
        """On a disk, XFS and ext4, data are synced before the call that promises it returns."""
        random = self.random()
        dimms = [PMEM_OFF.at(slot, SIZES[slot]).holding(CONTENTS[slot]) for slot in SIZES]
        # A plain nvdimm is never flushed, so the clock comparison does not depend on flushes.
        dimms.append(PLAIN.at(CLOCK, SMALL))
        shim = self.shim()
        guest = self.boot(Machine(nvdimms=tuple(dimms)), shim=shim)
        self.region = wait_for_region(guest, CLOCK)
        device = create_namespace(guest, self.region, mode="devdax").device
        if not isinstance(device, CharacterDevice):
            raise ContractError(f"ndctl made no character device: {device}")
        self.device = device
        disk = create_fsdax(guest, wait_for_region(guest, DISK)).path
        targets = [disk, "/mnt/xfs", "/mnt/ext4"]
        dax_mount(guest, XFS, "xfs", targets[XFS])
        dax_mount(guest, EXT4, "ext4", targets[EXT4])
        before = self.compare(guest)
        for slot in SIZES:
            guest.vm.syncs(slot).delay(SYNC_LOW_S, SYNC_HIGH_S)
        result = run_flush_load(
            guest, "mixed", targets, threads=THREADS, count=CALLS, seed=random.getrandbits(60)
        )
        for slot in SIZES:
            guest.vm.syncs(slot).clear()
        result.expect_success()
        offset = before.narrowed(self.compare(guest))
        if offset.width_ns > SYNC_LOW_S * 1e9 / 2:
            raise HostError(f"the clocks could be compared to {offset.width_ns} ns only")
        records = shim.records()
        for slot in SIZES:
            path = guest.vm.syncs(slot).path
            expect_durable(result.on(slot), [r for r in records if r.path == path], offset)
        kinds: dict[str, int] = {}
        for call in result.calls:
            kinds[call.operation] = kinds.get(call.operation, 0) + 1
        self.measure("calls", kinds)
        self.metric("syncs", len(records), "syncs")
        self.metric("clock_width", offset.width_ns / 1000, "us")
