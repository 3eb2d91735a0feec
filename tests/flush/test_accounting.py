# SPDX-License-Identifier: GPL-2.0-or-later
"""The number of flushes is the same in the guest, at its hypervisor calls, and on the host.

A write of 1 to a region's deep_flush calls nvdimm_flush (drivers/nvdimm/region_devs.c). With
ibm,hcall-flush-required that calls papr_scm_pmem_flush, which repeats H_SCM_FLUSH until the flush
has ended (papr_scm.c, 75b7c05ebf90). QEMU syncs the backing file once for each flush
(spapr_nvdimm.c, b5513584a08d). No flush may be lost, and no two may be merged.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from paprscm.errors import ContractError
from paprscm.flush.accounts import Account, FlushAccounts
from paprscm.flush.load import run_flush_load
from paprscm.flush.trace import expect_protocol
from paprscm.guest.guest import Guest
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import OVERRIDE, PLAIN, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import Machine, Nvdimm
from paprscm.vm.shim_layout import Operation


class FlushAccounting(PaprScmTest):
    """Base of the accounting tests."""

    def machine(self, *nvdimms: Nvdimm) -> Guest:
        """Boot a guest with these DIMMs, and count its flushes."""
        guest = self.boot(Machine(nvdimms=nvdimms), shim=self.shim())
        slots = [nvdimm.slot for nvdimm in nvdimms]
        self.regions = {slot: wait_for_region(guest, slot) for slot in slots}
        self.accounts = FlushAccounts(guest, slots)
        return guest

    def attribute(self, region: Region) -> str:
        """The sysfs file that flushes the whole region."""
        if (region.deep_flush, region.deep_flush_mode) != ("1", 0o644):
            raise ContractError(f"{region.name} has no deep_flush that can be written to: {region}")
        return f"{region.device}/deep_flush"

    def deep_flush(self, guest: Guest, slots: Sequence[int], threads: int, count: int) -> Account:
        """Flush from several threads, `count` times each, and compare the counts; return them."""
        targets = [self.attribute(self.regions[slot]) for slot in slots]
        result = run_flush_load(guest, "deep_flush", targets, threads=threads, count=count)
        result.expect_success()
        account = self.accounts.take()
        expected = {slot: len(result.on(number)) for number, slot in enumerate(slots)}
        if sum(expected.values()) != threads * count:
            raise ContractError(
                f"{threads} threads with {count} flushes each made {expected} by slot in "
                f"{result.duration_s} s"
            )
        account.expect(expected)
        flushes = account.all()
        expect_protocol(flushes)
        waits = sorted(wait for flush in flushes for wait in flush.waits_us)
        median_s = statistics.median(call.duration_s for call in result.calls)
        for name, value, unit in (
            ("flushes", account.count, "flushes"),
            ("hcalls", account.calls, "hcalls"),
            ("flush_rate", account.count / result.duration_s, "flushes/s"),
            ("call_median", median_s, "s"),
            ("wait_shortest", waits[0], "us"),
            ("wait_median", statistics.median(waits), "us"),
            ("wait_longest", waits[-1], "us"),
        ):
            self.metric(name, value, unit, threads=threads, slots=" ".join(map(str, slots)))
        return account


class DeepFlush(FlushAccounting):
    """
    Flushes of a whole region by its attribute deep_flush.

    :avocado: tags=flush
    """

    def test_one_thread(self) -> None:
        """Fifty sequential flushes are fifty H_SCM_FLUSH, each polled to its end, and fifty syncs.

        The driver polls again after the 10 ms of the answer's hint, and not much later: msleep(10)
        takes at most one jiffy longer, and a jiffy is at most 10 ms.
        """
        guest = self.machine(PMEM_OFF.at(3, SMALL))
        account = self.deep_flush(guest, [3], threads=1, count=50)
        shortest = min(flush.waits_us[0] for flush in account.all())
        if shortest > 30_000:
            raise ContractError(f"the shortest of 50 waits took {shortest / 1000} ms, not 10 to 20")

    def test_sixteen_threads(self) -> None:
        """Twenty flushes of each of sixteen threads are 320 tokens and 320 syncs."""
        guest = self.machine(PMEM_OFF.at(0, SMALL))
        self.deep_flush(guest, [0], threads=16, count=20)

    def test_four_dimms(self) -> None:
        """With sixteen threads on four DIMMs, each flush syncs only the file of its own DIMM."""
        slots = (6, 1, 4, 3)
        guest = self.machine(*(PMEM_OFF.at(slot, SMALL) for slot in slots))
        for slot in slots:
            self.deep_flush(guest, [slot], threads=1, count=slot)
        self.deep_flush(guest, slots, threads=16, count=10)


class NothingToFlush(FlushAccounting):
    """
    DIMMs that do not need flushes by hcall.

    :avocado: tags=flush
    """

    def judge(self, nvdimm: Nvdimm) -> None:
        """Check that no call that promises durability makes an hcall or a sync.

        The control is a second DIMM, which does need flushes.
        """
        other = PMEM_OFF.at(5, SMALL)
        guest = self.machine(nvdimm, other)
        region = self.regions[nvdimm.slot]
        # region_devs.c:region_visible: the file is readable, but not writable.
        attribute = f"{region.device}/deep_flush"
        result = guest.run(f"cat {attribute}; stat -c %a {attribute}; echo 1 > {attribute}")
        if result.stdout.split() != ["0", "444"] or not result.status:
            raise ContractError(f"{attribute} can be written to: {result}")
        disk = create_namespace(guest, region, mode="fsdax").disk
        for operation in ("fsync", "fdatasync", "dsync", "direct_dsync"):
            run_flush_load(guest, operation, [disk.path], threads=2, count=5).expect_success()
        guest.succeed(f"mkfs.ext4 -q {disk.path} && mkdir -p /mnt/a && mount {disk.path} /mnt/a")
        run_flush_load(guest, "mixed", ["/mnt/a"], threads=2, count=20).expect_success()
        guest.succeed("umount /mnt/a")
        self.accounts.take().expect({})
        self.deep_flush(guest, [other.slot], threads=1, count=3)

    def test_pmem_on(self) -> None:
        """On pmem=on no call that promises durability makes an H_SCM_FLUSH or a sync."""
        self.judge(PMEM_ON.at(2, SMALL))

    def test_plain_nvdimm(self) -> None:
        """On a plain nvdimm no call that promises durability makes an H_SCM_FLUSH or a sync."""
        self.judge(PLAIN.at(2, SMALL))


class Override(FlushAccounting):
    """
    A DIMM on pmem=on with pmem-override=on, which requires flushes by hcall.

    :avocado: tags=flush
    """

    def test_pmem_persist(self) -> None:
        """With pmem-override on pmem=on each flush is one pmem_persist, and never an fdatasync."""
        guest = self.machine(OVERRIDE.at(1, SMALL))
        attribute = self.attribute(self.regions[1])
        # The first pmem_persist writes back every cache line of the DIMM, which takes seconds.
        result = run_flush_load(guest, "deep_flush", [attribute], threads=4, count=5, limit_s=100)
        result.expect_success()
        account = self.accounts.take()
        account.expect({1: 20}, Operation.PMEM_PERSIST)
        expect_protocol(account.all())
        self.metric("call_longest", max(call.duration_s for call in result.calls), "s")
