# SPDX-License-Identifier: GPL-2.0-or-later
"""MAP_SYNC is granted on a synchronous backend and refused where the guest must flush by hcall.

Linux decides it in drivers/nvdimm/pmem.c (pmem_attach_disk: set_dax_synchronous) from
ibm,hcall-flush-required in the device tree, which papr_scm reads. QEMU sets the property from the
backend's pmem= and the device's pmem-override= (hw/ppc/spapr_nvdimm.c, spapr_dt_nvdimm).
"""

from paprscm.guest.guest import Guest
from paprscm.guest.tools import install_tool
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import Verdict
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import OVERRIDE, PLAIN, PMEM_OFF, PMEM_ON
from paprscm.vm.machine import Machine, Nvdimm, in_words


class OneDimm(PaprScmTest):
    """
    One DIMM.

    :avocado: tags=map_sync
    """

    def judge(self, nvdimm: Nvdimm, fstype: FsType, verdict: Verdict) -> None:
        """Boot with a DAX file system on one DIMM, and compare the probe's verdict."""
        guest = self.boot(Machine(nvdimms=(nvdimm.holding(fstype),)))
        dax_mount(guest, nvdimm.slot, fstype, "/mnt")
        report = map_sync(guest, "/mnt/file")
        self.measure("probe", report.line)
        self.check_map_sync(fstype, report, verdict, fstype=fstype)

    def test_pmem_on_xfs(self) -> None:
        """On XFS over pmem=on, MAP_SYNC succeeds and is in the mapping's VmFlags."""
        self.judge(PMEM_ON, "xfs", Verdict.ACCEPTED)

    def test_pmem_on_ext4(self) -> None:
        """On ext4 over pmem=on, MAP_SYNC succeeds and is in the mapping's VmFlags."""
        self.judge(PMEM_ON, "ext4", Verdict.ACCEPTED)

    def test_pmem_off_xfs(self) -> None:
        """On XFS over pmem=off, MAP_SYNC fails with EOPNOTSUPP on a file that is DAX."""
        self.judge(PMEM_OFF, "xfs", Verdict.REFUSED)

    def test_pmem_off_ext4(self) -> None:
        """On ext4 over pmem=off, MAP_SYNC fails with EOPNOTSUPP on a file that is DAX."""
        self.judge(PMEM_OFF, "ext4", Verdict.REFUSED)

    def test_pmem_override_xfs(self) -> None:
        """On XFS over pmem=on with pmem-override=on, MAP_SYNC fails with EOPNOTSUPP."""
        self.judge(OVERRIDE, "xfs", Verdict.REFUSED)

    def test_pmem_override_ext4(self) -> None:
        """On ext4 over pmem=on with pmem-override=on, MAP_SYNC fails with EOPNOTSUPP."""
        self.judge(OVERRIDE, "ext4", Verdict.REFUSED)

    def test_plain_nvdimm_xfs(self) -> None:
        """On XFS over a plain nvdimm, MAP_SYNC succeeds though the file behind it is ordinary.

        The device model older than spapr-nvdimm (QEMU 7.0) never requires H_SCM_FLUSH: a known
        hole, kept for existing guests.
        """
        self.judge(PLAIN, "xfs", Verdict.ACCEPTED)

    def test_plain_nvdimm_ext4(self) -> None:
        """On ext4 over a plain nvdimm, MAP_SYNC succeeds though the file behind it is ordinary."""
        self.judge(PLAIN, "ext4", Verdict.ACCEPTED)


class Compiled(PaprScmTest):
    """
    The probe as gcc compiles it in this guest; other tests use a copy of such a binary.

    :avocado: tags=map_sync
    """

    def test_in_the_guest(self) -> None:
        """A probe that was compiled in this guest has both verdicts, on pmem=on and pmem=off.

        It must be the same, byte for byte, as the one that other tests use.
        """
        cases = ((PMEM_ON.at(0), Verdict.ACCEPTED), (PMEM_OFF.at(1), Verdict.REFUSED))
        guest = self.boot(Machine(nvdimms=tuple(dimm.holding("xfs") for dimm, _verdict in cases)))
        install_tool(guest, "map_sync", anew=True)
        for nvdimm, verdict in cases:
            mountpoint = f"/mnt/{nvdimm.slot}"
            dax_mount(guest, nvdimm.slot, "xfs", mountpoint)
            report = map_sync(guest, f"{mountpoint}/file")
            self.measure(f"probe slot {nvdimm.slot}", report.line)
            self.check_map_sync(in_words(nvdimm), report, verdict, fstype="xfs")


class TwoDimms(PaprScmTest):
    """
    A synchronous and an asynchronous DIMM in one guest, identified by their DRC.

    :avocado: tags=map_sync
    """

    def judge(self, fstype: FsType, *, on_slot: int, off_slot: int) -> None:
        """Mount pmem=on on /mnt1 and pmem=off on /mnt2, in any slot order, and judge both."""
        dimms = (PMEM_ON.at(on_slot), PMEM_OFF.at(off_slot))
        guest = self.boot(Machine(nvdimms=tuple(dimm.holding(fstype) for dimm in dimms)))
        for mountpoint, slot, verdict in (
            ("/mnt1", on_slot, Verdict.ACCEPTED),
            ("/mnt2", off_slot, Verdict.REFUSED),
        ):
            dax_mount(guest, slot, fstype, mountpoint)
            report = map_sync(guest, f"{mountpoint}/file")
            self.measure(f"probe {mountpoint}", report.line)
            self.check_map_sync(f"slot {slot}, {fstype}", report, verdict, fstype=fstype)

    def test_pmem_on_first_xfs(self) -> None:
        """With pmem=on in slot 0 and pmem=off in slot 1, XFS grants MAP_SYNC on slot 0 only."""
        self.judge("xfs", on_slot=0, off_slot=1)

    def test_pmem_on_first_ext4(self) -> None:
        """With pmem=on in slot 0 and pmem=off in slot 1, ext4 grants MAP_SYNC on slot 0 only."""
        self.judge("ext4", on_slot=0, off_slot=1)

    def test_pmem_off_first_xfs(self) -> None:
        """With pmem=off in slot 0 and pmem=on in slot 1, XFS grants MAP_SYNC on slot 1 only."""
        self.judge("xfs", on_slot=1, off_slot=0)

    def test_pmem_off_first_ext4(self) -> None:
        """With pmem=off in slot 0 and pmem=on in slot 1, ext4 grants MAP_SYNC on slot 1 only."""
        self.judge("ext4", on_slot=1, off_slot=0)


CASES = (
    (PMEM_ON.at(5), Verdict.ACCEPTED),
    (PMEM_OFF.at(2), Verdict.REFUSED),
    (OVERRIDE.at(3), Verdict.REFUSED),
    (PLAIN.at(0), Verdict.ACCEPTED),
)


class EachKind(PaprScmTest):
    """
    Each kind of DIMM in one guest, present at boot or plugged while it runs.

    :avocado: tags=map_sync
    """

    def judge(self, guest: Guest, fstype: FsType) -> None:
        """Check that each DIMM has the verdict of its kind."""
        for nvdimm, verdict in CASES:
            mountpoint = f"/mnt/{nvdimm.slot}"
            dax_mount(guest, nvdimm.slot, fstype, mountpoint)
            report = map_sync(guest, f"{mountpoint}/file")
            self.measure(f"probe slot {nvdimm.slot}", report.line)
            self.check_map_sync(in_words(nvdimm), report, verdict, fstype=fstype)

    def plugged(self, fstype: FsType) -> Guest:
        """Boot a guest and plug each DIMM while it runs."""
        self.require_qemu(*(nvdimm for nvdimm, _verdict in CASES))
        guest = self.boot()
        for nvdimm, _verdict in CASES:
            guest.plug(nvdimm.holding(fstype))
        return guest

    def booted(self, fstype: FsType) -> Guest:
        """Boot a guest whose kernel finds the DIMMs when it starts."""
        nvdimms = tuple(nvdimm.holding(fstype) for nvdimm, _verdict in CASES)
        return self.boot(Machine(nvdimms=nvdimms), cold=True)

    def test_at_boot_xfs(self) -> None:
        """On XFS, each kind of DIMM that is present at boot gets the verdict of its kind."""
        self.judge(self.booted("xfs"), "xfs")

    def test_at_boot_ext4(self) -> None:
        """On ext4, each kind of DIMM that is present at boot gets the verdict of its kind."""
        self.judge(self.booted("ext4"), "ext4")

    def test_hotplug_xfs(self) -> None:
        """On XFS, each kind of DIMM plugged by device_add gets the same verdict as at boot."""
        self.judge(self.plugged("xfs"), "xfs")

    def test_hotplug_ext4(self) -> None:
        """On ext4, each kind of DIMM plugged by device_add gets the same verdict as at boot."""
        self.judge(self.plugged("ext4"), "ext4")


class NotDax(PaprScmTest):
    """
    Files that are not DAX: MAP_SYNC fails with the same errno, but for another reason.

    :avocado: tags=map_sync
    """

    def judge(self, guest: Guest, path: str, fstype: str, expected: Verdict) -> None:
        """Compare the verdict of a file, and check that it is on this type of file system."""
        report = map_sync(guest, path)
        self.measure("probe", report.line)
        self.check_map_sync(path, report, expected, fstype=fstype)

    def test_xfs_with_small_blocks(self) -> None:
        """On XFS with blocks smaller than a page, a file is not DAX so far, or grants MAP_SYNC.

        fs/xfs/xfs_super.c, xfs_setup_dax_always: the mount with dax=always succeeds with a warning,
        and DAX is off. On a kernel with 4 KiB pages the blocks have 1 KiB. A kernel whose files are
        DAX there must grant MAP_SYNC, as the DIMM has pmem=on.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON,)))
        line = guest.succeed("grep -m 1 KernelPageSize /proc/self/smaps")
        small = 1024 if line.split()[1:] == ["4", "kB"] else 4096
        dax_mount(guest, 0, "xfs", "/mnt", block_size=small)
        file = map_sync(guest, "/mnt/dax").file
        is_dax = file is not None and file.dax is True
        self.usual(f"a file on XFS with blocks of {small} bytes is DAX", is_dax, False)
        self.judge(guest, "/mnt/file", "xfs", Verdict.ACCEPTED if is_dax else Verdict.NOT_DAX)

    def test_tmpfs(self) -> None:
        """A file on tmpfs is judged not DAX, although MAP_SHARED_VALIDATE works there."""
        guest = self.boot()
        guest.succeed("mkdir /mnt/t && mount -t tmpfs tmpfs /mnt/t")
        self.judge(guest, "/mnt/t/file", "tmpfs", Verdict.NOT_DAX)
