# SPDX-License-Identifier: GPL-2.0-or-later
"""Device tree and sysfs of the guest agree with the command line of the device.

QEMU's side is hw/ppc/spapr_nvdimm.c (spapr_dt_nvdimm); Linux' is papr_scm.c (papr_scm_probe and
papr_scm_nvdimm_init) and drivers/nvdimm/region_devs.c (deep_flush_show, region_visible).
"""

from paprscm.papr import NODE, PARENT_NODE, SCM_BLOCK_SIZE
from paprscm.pmem.namespaces import BlockDevice, create_fsdax
from paprscm.pmem.regions import Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import OVERRIDE, PMEM_ON
from paprscm.vm.machine import MIB, Machine, Nvdimm, in_words

# Sizes and label sizes differ, so that a test cannot confuse two DIMMs. The sum is small enough for
# the hash page table of a guest with POWER8 and 4 KiB pages
# (known_issues/linux-hash-loses-secondary-bolted-entries.md).
KINDS = (
    PMEM_ON.at(0),
    Nvdimm(slot=1, size_bytes=768 * MIB, label_bytes=256 << 10),
    OVERRIDE.at(2, 256 * MIB),
    Nvdimm(slot=3, device="nvdimm", uuid="7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11"),
)


class DeviceTree(PaprScmTest):
    """
    The properties of each kind of DIMM as Linux reads them.

    :avocado: tags=map_sync,device_tree
    """

    def judge(self, region: Region, disk: BlockDevice, nvdimm: Nvdimm) -> None:
        """Compare each property of spapr_dt_nvdimm, and the sysfs files that follow from them."""
        node, by_hcall = region.node, nvdimm.flushes_by_hcall
        table = {
            "path": (node.path, f"/{PARENT_NODE}/{NODE}@{nvdimm.drc:08x}"),
            "ibm,my-drc-index": (node.drc_index, nvdimm.drc),
            "reg": (node.raw.get("reg"), nvdimm.drc.to_bytes(4, "big")),
            "compatible": (node.compatible, (NODE,)),
            "device_type": (node.device_type, NODE),
            "ibm,unit-guid": (node.unit_guid, nvdimm.guid),
            "ibm,block-size": (node.block_size, SCM_BLOCK_SIZE),
            "ibm,number-of-blocks": (node.number_of_blocks, nvdimm.size_bytes // SCM_BLOCK_SIZE),
            "ibm,metadata-size": (node.metadata_size, nvdimm.label_bytes),
            "ibm,pmem-application": (node.application, "operating-system"),
            "ibm,cache-flush-required": (node.cache_flush_required, True),
            "ibm,hcall-flush-required": (node.hcall_flush_required, by_hcall),
            "size": (region.size_bytes, nvdimm.size_bytes),
            "deep_flush": (region.deep_flush, "1" if by_hcall else "0"),
            # deep_flush is writable only for a region with a flush callback (region_visible).
            "mode of deep_flush": (region.deep_flush_mode, 0o644 if by_hcall else 0o444),
            "persistence_domain": (region.persistence_domain, "memory_controller"),
            "read_only": (region.read_only, False),
            "queue/dax": (disk.dax, "1"),
        }
        # A write cache is optional for a disk that does not need flushes.
        if by_hcall:
            table["queue/write_cache"] = (disk.write_cache, "write back")
        for name, (found, expected) in table.items():
            self.check(f"{in_words(nvdimm)}: {name}", found, expected)
        self.usual(f"{in_words(nvdimm)}: queue/fua", disk.fua, "1" if by_hcall else "0")
        self.usual(f"{in_words(nvdimm)}: queue/write_cache", disk.write_cache, "write back")

    def test_at_boot(self) -> None:
        """Each kind of DIMM that is present at boot has its device-tree node and sysfs files."""
        guest = self.boot(
            Machine(nvdimms=tuple(kind.holding("fsdax") for kind in KINDS)), cold=True
        )
        for nvdimm in KINDS:
            region = wait_for_region(guest, nvdimm.slot)
            self.judge(region, create_fsdax(guest, region), nvdimm)

    def test_hotplugged(self) -> None:
        """Each kind of DIMM that is plugged later has the same node and sysfs files as at boot."""
        self.require_qemu(*KINDS)
        guest = self.boot()
        for nvdimm in KINDS:
            guest.plug(nvdimm.holding("fsdax"))
            region = wait_for_region(guest, nvdimm.slot)
            self.judge(region, create_fsdax(guest, region), nvdimm)
