# SPDX-License-Identifier: GPL-2.0-or-later
"""Failures in the guest's kernel: each allocation of papr_scm and libnvdimm in turn, and bios.

A call is made again and again, and another allocation fails each time, until there is none left. It
must say so, may not hang, and must work when nothing fails. What the kernel may say then is listed
here; lockdep, KFENCE and the list checks say the rest. At the end nothing may be left that nobody
points to (kmemleak).
"""

from __future__ import annotations

import errno

from paprscm.guest.guest import Guest
from paprscm.pmem import fault_injection
from paprscm.pmem.dump import RegionError
from paprscm.pmem.fault_injection import LIBNVDIMM, Report, aim, expect_errors, fail_each
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.machine import MIB, Machine, Nvdimm

PLATFORM = "/sys/bus/platform/drivers/papr_scm"
ND = "/sys/bus/nd"
SLOT = 2
ATTRIBUTES: tuple[fault_injection.Attribute, ...] = ("failslab", "fail_page_alloc")
# Of papr_scm.c, papr_scm_nvdimm_init; of drivers/base/dd.c, really_probe and call_driver_probe; of
# drivers/nvdimm/claim.c, devm_nsio_enable, for which no memory is no room.
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
        """CANCEL on a kernel that fails nothing."""
        super().setUp()
        with self.verdict():
            fault_injection.require(self.environment.kernel)

    def start(self, *allowed: str) -> tuple[Guest, Region]:
        """A guest with its DIMM, from whose leaks on ours count."""
        guest = self.boot(Machine(nvdimms=(Nvdimm(slot=SLOT),)), allowed=allowed)
        region = wait_for_region(guest, SLOT, 30)
        fault_injection.forget_leaks(guest)
        return guest, region

    def judge(self, what: str, report: Report, *allowed: int, optional: int = 0) -> None:
        """The errors that came out."""
        longest = max(one.duration_us for one in report.rounds)
        self.measure(what, {"answers": report.answers, "longest_us": longest})
        expect_errors(report, allowed or [errno.ENOMEM], optional=optional)

    def works(self, guest: Guest) -> None:
        """All is as it was before, and nothing was left behind."""
        region = wait_for_region(guest, SLOT, 30)
        guest.succeed(f"echo 1 > {region.device}/deep_flush")
        made = create_namespace(guest, region, mode="fsdax")
        guest.succeed(
            f"dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>&1 && "
            f"dd if=/tmp/data of={made.path} bs=64k oflag=direct conv=fsync 2>&1 && "
            f"dd if={made.path} bs=64k count=4 iflag=direct 2> /dev/null | cksum > /tmp/read && "
            f'[ "$(cksum < /tmp/data)" = "$(cat /tmp/read)" ]'
        )
        found = fault_injection.leaks(guest)
        ours = [one for one in found if any(word in one for word in ("papr_scm", "nvdimm", "nd_"))]
        self.measure("leaks", {"ours": len(ours), "others": len(found) - len(ours)})
        if ours:
            self.fail(f"{len(ours)} objects were left behind, the first:\n{ours[0]}")

    def test_driver_of_the_dimm(self) -> None:
        """Whatever allocation of papr_scm's probe fails, bind says so, and the next one works."""
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
        """Whatever allocation of nd_region's probe fails, bind says so, and the next one works."""
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
        """Whatever allocation of nd_pmem's probe fails, bind says so, and the next one works."""
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
        """Whatever allocation fails, a namespace gets its size and labels, or an error is said."""
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
        # What the labels say: the drivers read them anew.
        name = guest.succeed(f"ls {PLATFORM} | grep {region.drc:x}")
        before = guest.succeed(f"cat {folder}/uuid {size}")
        guest.succeed(f"cd {PLATFORM} && echo {name} > unbind && echo {name} > bind")
        try:
            region = wait_for_region(guest, SLOT, 30)
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
        if after != before:
            self.fail(f"the labels have {after!r}, the kernel had {before!r}")
        self.works(guest)

    def test_ioctls(self) -> None:
        """Whatever allocation fails, a DIMM's health and label area are had, or ENOMEM is said."""
        guest, region = self.start()
        assert region.dimm is not None
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
        self.assertEqual(after, before, "the label area")
        guest.succeed(f"echo {region.name} > {ND}/drivers/nd_region/bind")
        self.works(guest)

    def test_bios(self) -> None:
        """A bio that fails is EIO for who wrote, read or flushed, and the next one works."""
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
        # All of them at a time, as a cable that is pulled.
        guest.succeed(f"cd {folder} && echo -1 > times && echo 100 > probability")
        for command in (
            f"dd if=/dev/zero of={disk.path} bs=4k count=1 oflag=direct",
            f"dd if={disk.path} of=/dev/null bs=4k count=1 iflag=direct",
            f"dd if=/dev/zero of={disk.path} bs=4k count=1 conv=fsync",
        ):
            said = guest.fail(command).stderr
            if "Input/output error" not in said:
                self.fail(f"{command} says {said!r}")
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
