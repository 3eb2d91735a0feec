# SPDX-License-Identifier: GPL-2.0-or-later
"""Failures in the guest's kernel: each allocation of papr_scm and libnvdimm in turn, and bios.

A call is repeated, and another allocation fails each time, until none is left. It must return an
error, must not hang, and must work when nothing fails. The kernel messages that this allows are
listed here; lockdep, KFENCE and the list checks report everything else. At the end, kmemleak must
not find a leak.
"""

from __future__ import annotations

import errno

from paprscm.checks import containing
from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.pmem import fault_injection
from paprscm.pmem.dump import RegionError
from paprscm.pmem.fault_injection import LIBNVDIMM, FailNthReport, aim, expect_errors, fail_each
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
# drivers/nvdimm/namespace_devs.c, __reserve_free_pmem and grow_dpa_allocation, which is inlined: a
# WARNING is more than a lack of memory deserves; an error comes out.
RESERVE = (r"WARNING: .* (?:__reserve_free_pmem|grow_dpa_allocation|size_store)\+",)
# drivers/nvdimm/dimm.c, nvdimm_probe; region.c, nd_region_probe: what makes a DIMM unusable.
DISABLED = (r"probe with driver \w+ failed with error -\d+", r"nmem\d+: is disabled, failing probe")
# What a driver's probe may say: no memory is also no device, and no room.
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
        """Boot a guest with its DIMM; leaks count from now on."""
        guest = self.boot(Machine(nvdimms=(PMEM_OFF.at(SLOT),)), allowed=allowed)
        region = wait_for_region(guest, SLOT)
        fault_injection.clear_leaks(guest)
        return guest, region

    def judge(self, what: str, report: FailNthReport, *allowed: int, optional: int = 0) -> None:
        """Check the errors that the calls returned."""
        longest = max(one.duration_us for one in report.rounds)
        self.measure(what, {"answers": report.answers, "longest_us": longest})
        expect_errors(report, allowed or [errno.ENOMEM], optional=optional)

    def works(self, guest: Guest) -> None:
        """Check that the DIMM still works, and that nothing has leaked."""
        region = wait_for_region(guest, SLOT)
        guest.succeed(f"echo 1 > {region.device}/deep_flush")
        made = create_namespace(guest, region, mode="fsdax")
        guest.succeed(
            f"dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>&1 && "
            f"dd if=/tmp/data of={made.path} bs=64k oflag=direct conv=fsync 2>&1 && "
            f"dd if={made.path} bs=64k count=4 iflag=direct 2> /dev/null | cksum > /tmp/read && "
            f'[ "$(cksum < /tmp/data)" = "$(cat /tmp/read)" ]'
        )
        found = fault_injection.read_leaks(guest)
        ours = [one for one in found if any(word in one for word in ("papr_scm", "nvdimm", "nd_"))]
        self.measure("leaks", {"ours": len(ours), "others": len(found) - len(ours)})
        if ours:
            raise ContractError(f"{len(ours)} objects have leaked, the first:\n{ours[0]}")

    def test_driver_of_the_dimm(self) -> None:
        """Each allocation of papr_scm's probe can fail: bind fails then, and works afterwards."""
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
        """Each allocation of nd_region's probe can fail: bind fails then, and works afterwards."""
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
        """Each allocation of nd_pmem's probe can fail: bind fails then, and works afterwards."""
        guest, region = self.start(*ANNOUNCED)
        made = create_namespace(guest, region, mode="raw", size_bytes=64 * MIB)
        drivers = f"{ND}/drivers/nd_pmem"
        aim(guest, ("nd_pmem_probe",))
        guest.succeed(f"echo {made.name} > {drivers}/unbind")
        report = fail_each(
            guest, "write", f"{drivers}/bind", made.name, undo=[(f"{drivers}/unbind", made.name)]
        )
        self.judge("bind nd_pmem", report, *PROBE_ERRORS, optional=99)
        self.works(guest)

    def test_namespace(self) -> None:
        """Each allocation can fail: a namespace gets its size and labels, or the write an error."""
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
        # The labels' content: the drivers read them anew.
        name = guest.succeed(f"ls {PLATFORM} | grep {region.drc:x}")
        before = guest.succeed(f"cat {folder}/uuid {size}")
        guest.succeed(f"cd {PLATFORM} && echo {name} > unbind && echo {name} > bind")
        try:
            region = wait_for_region(guest, SLOT)
        except RegionError:
            said = guest.succeed("dmesg | grep -F 'error -16'")
            self.known_issue(
                "linux-label-slots-leak", shows=True, found=f"the DIMM is disabled: {said}"
            )
            return
        after = guest.succeed(
            f"cd {region.device} && for n in namespace*; do [ ! -e $n/size ] || "
            f'[ "$(cat $n/size)" = 0 ] || cat $n/uuid $n/size; done'
        )
        self.expect("uuid and size in the labels", after, before)
        self.works(guest)

    def test_ioctls(self) -> None:
        """Each allocation can fail: the ioctls for health and labels work, or return ENOMEM."""
        guest, region = self.start()
        if region.dimm is None:
            raise ContractError(f"{region.name} has no DIMM")
        node = f"/dev/{region.dimm.name}"
        # The label area is the kernel's own while the region is there.
        guest.succeed(f"echo {region.name} > {ND}/drivers/nd_region/unbind")
        before = guest.succeed(f"ndctl read-labels {region.dimm.name} | cksum")
        for words in (("health", node), ("label", node)):
            # The second comes on top: vmalloc() takes whole pages.
            for attribute in ATTRIBUTES:
                aim(guest, LIBNVDIMM, attribute=attribute)
                report = fail_each(guest, *words)
                self.judge(f"{words[0]}, {attribute}", report)
        after = guest.succeed(f"ndctl read-labels {region.dimm.name} | cksum")
        self.check("checksum of the label area", after, before)
        guest.succeed(f"echo {region.name} > {ND}/drivers/nd_region/bind")
        self.works(guest)

    def test_bios(self) -> None:
        """A failed bio is EIO for the caller that wrote, read or flushed; the next one works."""
        guest, region = self.start()
        made = create_namespace(guest, region, mode="raw", size_bytes=64 * MIB)
        disk = made.disk
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
        # All of them, as if a cable were pulled.
        guest.succeed(f"cd {folder} && echo -1 > times && echo 100 > probability")
        for command in (
            f"dd if=/dev/zero of={disk.path} bs=4k count=1 oflag=direct",
            f"dd if={disk.path} of=/dev/null bs=4k count=1 iflag=direct",
            f"dd if=/dev/zero of={disk.path} bs=4k count=1 conv=fsync",
        ):
            reason = guest.fail(command).stderr
            self.expect(f"error of {command}", reason, containing("Input/output error"))
        guest.succeed(f"echo 0 > {folder}/probability")
        # What could not be written back is still in the page cache, and is not what is on the disk.
        guest.succeed(
            f"blockdev --flushbufs {disk.path}; echo 3 > /proc/sys/vm/drop_caches; "
            f"dd if={disk.path} bs=4k count=1 iflag=direct 2> /dev/null | cksum > /tmp/read && "
            f'[ "$(cksum < /tmp/old)" = "$(cat /tmp/read)" ] && '
            f"echo 0 > /sys/block/{disk.name}/make-it-fail"
        )
        guest.succeed(f"ndctl destroy-namespace -f {made.name}")
        self.works(guest)
