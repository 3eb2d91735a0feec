# SPDX-License-Identifier: GPL-2.0-or-later
"""Fault injection in the guest's kernel: each allocation of papr_scm and libnvdimm, and bios.

A call is repeated, and each time the next allocation fails, until a call makes no further
allocation. A failed call must return an error and must not hang, and the last one must succeed.
Allowed kernel messages are listed here; lockdep, KFENCE and the list checks report other faults. At
the end, kmemleak must not find a leak.
"""

from __future__ import annotations

import errno

from paprscm.checks import containing
from paprscm.driver import fault_injection
from paprscm.driver.fault_injection import LIBNVDIMM, FailNthReport, aim, expect_errors, fail_each
from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.pmem.dump import RegionError
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF
from paprscm.vm.machine import MIB, Machine

PLATFORM = "/sys/bus/platform/drivers/papr_scm"
ND = "/sys/bus/nd"
SLOT = 2
ATTRIBUTES: tuple[fault_injection.Attribute, ...] = ("failslab", "fail_page_alloc")
# Of papr_scm.c, papr_scm_nvdimm_init; of drivers/base/dd.c, really_probe and call_driver_probe; of
# drivers/nvdimm/claim.c, devm_nsio_enable, which turns an allocation failure into -EBUSY.
ANNOUNCED = (
    r"papr_scm .*: Error (?:creating|registering) ",
    r"really_probe: driver_sysfs_add failed",
    r"probe with driver \w+ failed with error -\d+",
    r"could not reserve region",
)
# drivers/nvdimm/namespace_devs.c, __reserve_free_pmem and grow_dpa_allocation, which is inlined:
# they WARN for a failed allocation, but also return the error.
RESERVE = (r"WARNING: .* (?:__reserve_free_pmem|grow_dpa_allocation|size_store)\+",)
# drivers/nvdimm/dimm.c, nvdimm_probe; region.c, nd_region_probe: messages of a disabled DIMM.
DISABLED = (r"probe with driver \w+ failed with error -\d+", r"nmem\d+: is disabled, failing probe")
# Errors of a driver's probe for a failed allocation: some drivers replace ENOMEM.
PROBE_ERRORS = (errno.ENOMEM, errno.ENXIO, errno.ENODEV, errno.EBUSY)


class FaultInjection(PaprScmTest):
    """
    One DIMM that is flushed by hcall.

    :avocado: tags=flush,debug
    """

    timeout = 900

    def setUp(self) -> None:
        """CANCEL on a kernel without fault injection."""
        super().setUp()
        with self.verdict():
            self.require_kernel(*fault_injection.OPTIONS, hint=fault_injection.DEBUG_KERNEL)

    def start(self, *allowed: str) -> tuple[Guest, Region]:
        """Boot a guest with its DIMM; forget earlier leaks."""
        guest = self.boot(Machine(nvdimms=(PMEM_OFF.at(SLOT),)), allowed=allowed)
        region = wait_for_region(guest, SLOT)
        fault_injection.clear_leaks(guest)
        return guest, region

    def judge(self, what: str, report: FailNthReport, *allowed: int, optional: int = 0) -> None:
        """Check that the calls returned only allowed errors."""
        longest = max(round_.duration_us for round_ in report.rounds)
        self.measure(what, report.answers)
        self.metric("longest_call", longest, "us", calls=what)
        expect_errors(report, allowed or [errno.ENOMEM], optional=optional)

    def works(self, guest: Guest) -> None:
        """Check that the DIMM still works, and that no memory has leaked."""
        region = wait_for_region(guest, SLOT)
        guest.succeed(f"echo 1 > {region.device}/deep_flush")
        path = create_namespace(guest, region, mode="fsdax").path
        guest.succeed(
            f"dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>&1 && "
            f"dd if=/tmp/data of={path} bs=64k oflag=direct conv=fsync 2>&1 && "
            f"dd if={path} bs=64k count=4 iflag=direct 2> /dev/null | cksum > /tmp/read && "
            f'[ "$(cksum < /tmp/data)" = "$(cat /tmp/read)" ]'
        )
        leaks = fault_injection.read_leaks(guest)
        ours = [one for one in leaks if any(word in one for word in ("papr_scm", "nvdimm", "nd_"))]
        self.metric("leaks", len(ours), "objects", owner="driver")
        self.metric("leaks", len(leaks) - len(ours), "objects", owner="others")
        if ours:
            raise ContractError(f"{len(ours)} objects have leaked, the first:\n{ours[0]}")

    def test_driver_of_the_dimm(self) -> None:
        """When any allocation of papr_scm's probe fails, bind fails; the next bind works."""
        guest, region = self.start(*ANNOUNCED)
        name = guest.succeed(f"ls {PLATFORM} | grep {region.drc:x}")
        aim(guest, ("papr_scm_probe",))
        guest.succeed(f"echo {name} > {PLATFORM}/unbind")
        report = fail_each(
            guest, "write", f"{PLATFORM}/bind", name, undo=[(f"{PLATFORM}/unbind", name)]
        )
        self.judge("bind papr_scm", report, *PROBE_ERRORS, optional=99)
        self.works(guest)

    def test_driver_of_the_region(self) -> None:
        """When any allocation of nd_region's probe fails, bind fails; the next bind works."""
        guest, region = self.start(*ANNOUNCED)
        drivers = f"{ND}/drivers/nd_region"
        aim(guest, LIBNVDIMM)
        guest.succeed(f"echo {region.name} > {drivers}/unbind")
        report = fail_each(
            guest,
            "write",
            f"{drivers}/bind",
            region.name,
            undo=[(f"{drivers}/unbind", region.name)],
        )
        self.judge("bind nd_region", report, *PROBE_ERRORS, optional=99)
        self.works(guest)

    def test_driver_of_the_disk(self) -> None:
        """When any allocation of nd_pmem's probe fails, bind fails; the next bind works."""
        guest, region = self.start(*ANNOUNCED)
        namespace = create_namespace(guest, region, mode="raw", size_bytes=64 * MIB)
        drivers = f"{ND}/drivers/nd_pmem"
        aim(guest, ("nd_pmem_probe",))
        guest.succeed(f"echo {namespace.name} > {drivers}/unbind")
        report = fail_each(
            guest,
            "write",
            f"{drivers}/bind",
            namespace.name,
            undo=[(f"{drivers}/unbind", namespace.name)],
        )
        self.judge("bind nd_pmem", report, *PROBE_ERRORS, optional=99)
        self.works(guest)

    def test_namespace(self) -> None:
        """When any allocation fails, a namespace gets its size and labels, or the write fails."""
        guest, region = self.start(*RESERVE, *DISABLED)
        seed = guest.succeed(f"cat {region.device}/namespace_seed")
        folder = f"{ND}/devices/{seed}"
        aim(guest, LIBNVDIMM)
        uuid = guest.succeed(f"tee {folder}/uuid < /proc/sys/kernel/random/uuid")
        size = f"{folder}/size"
        report = fail_each(
            guest, "write", size, str(64 * MIB), undo=[(size, "0"), (f"{folder}/uuid", uuid)]
        )
        self.judge(
            "size of a namespace",
            report,
            *(errno.ENOMEM, errno.ENOSPC, errno.ENXIO),
            optional=99,
        )
        # Bind the drivers again, so that they read the labels from the DIMM.
        name = guest.succeed(f"ls {PLATFORM} | grep {region.drc:x}")
        before = guest.succeed(f"cat {folder}/uuid {size}")
        guest.succeed(f"cd {PLATFORM} && echo {name} > unbind && echo {name} > bind")
        try:
            region = wait_for_region(guest, SLOT)
        except RegionError:
            log = guest.succeed("dmesg | grep -F 'error -16'")
            self.known_issue(
                "linux-label-slots-leak", shows=True, found=f"the DIMM is disabled: {log}"
            )
            return
        after = guest.succeed(
            f"cd {region.device} && for n in namespace*; do [ ! -e $n/size ] || "
            f'[ "$(cat $n/size)" = 0 ] || cat $n/uuid $n/size; done'
        )
        self.expect("uuid and size in the labels", after, before)
        self.works(guest)

    def test_ioctls(self) -> None:
        """When any allocation fails, the health and label ioctls either work or return ENOMEM."""
        guest, region = self.start()
        if region.dimm is None:
            raise ContractError(f"{region.name} has no DIMM")
        node = f"/dev/{region.dimm.name}"
        # The kernel locks the label area while the region is active.
        guest.succeed(f"echo {region.name} > {ND}/drivers/nd_region/unbind")
        before = guest.succeed(f"ndctl read-labels {region.dimm.name} | cksum")
        for words in (("health", node), ("label", node)):
            # fail_page_alloc in addition to failslab: vmalloc() takes whole pages.
            for attribute in ATTRIBUTES:
                aim(guest, LIBNVDIMM, attribute=attribute)
                report = fail_each(guest, *words)
                self.judge(f"{words[0]}, {attribute}", report)
        after = guest.succeed(f"ndctl read-labels {region.dimm.name} | cksum")
        self.check("checksum of the label area", after, before)
        guest.succeed(f"echo {region.name} > {ND}/drivers/nd_region/bind")
        self.works(guest)

    def test_bios(self) -> None:
        """A failed bio is EIO for the write, read or fsync that caused it; the next one works."""
        guest, region = self.start()
        namespace = create_namespace(guest, region, mode="raw", size_bytes=64 * MIB)
        disk = namespace.disk
        aim(guest, ("nd_pmem_probe",))
        folder = f"{fault_injection.DEBUGFS}/fail_make_request"
        guest.succeed(
            f"dd if=/dev/urandom of=/tmp/old bs=4k count=1 2>&1 && "
            f"dd if=/tmp/old of={disk.path} bs=4k oflag=direct 2>&1 && "
            f"echo 0 > {folder}/verbose && echo 1 > /sys/block/{disk.name}/make-it-fail"
        )
        for words in (("pwrite", disk.path), ("fsync", disk.path)):
            self.judge(words[0], fail_each(guest, *words), errno.EIO)
        guest.succeed(f"dd if=/tmp/old of={disk.path} bs=4k oflag=direct 2>&1")
        # All bios fail, as after a surprise removal.
        guest.succeed(f"cd {folder} && echo -1 > times && echo 100 > probability")
        for command in (
            f"dd if=/dev/zero of={disk.path} bs=4k count=1 oflag=direct",
            f"dd if={disk.path} of=/dev/null bs=4k count=1 iflag=direct",
            f"dd if=/dev/zero of={disk.path} bs=4k count=1 conv=fsync",
        ):
            reason = guest.fail(command).stderr
            self.expect(f"error of {command}", reason, containing("Input/output error"))
        guest.succeed(f"echo 0 > {folder}/probability")
        # The page cache still has the data that could not be written back; compare the disk.
        guest.succeed(
            f"blockdev --flushbufs {disk.path}; echo 3 > /proc/sys/vm/drop_caches; "
            f"dd if={disk.path} bs=4k count=1 iflag=direct 2> /dev/null | cksum > /tmp/read && "
            f'[ "$(cksum < /tmp/old)" = "$(cat /tmp/read)" ] && '
            f"echo 0 > /sys/block/{disk.name}/make-it-fail"
        )
        guest.succeed(f"ndctl destroy-namespace -f {namespace.name}")
        self.works(guest)
