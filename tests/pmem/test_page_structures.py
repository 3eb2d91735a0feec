# SPDX-License-Identifier: GPL-2.0-or-later
"""Page structures of a DIMM's memory: their layout, and I/O that pins pages through them.

If struct page has a size that is a power of two, the kernel shares pages of page structures between
huge pages of devdax (arch/powerpc/mm/book3s64/radix_pgtable.c, vmemmap_populate_compound_pages).
"""

from __future__ import annotations

import re

from paprscm.channel.kmsg import OOPS, has_frame, traces
from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.flush.syscalls import persist
from paprscm.guest.guest import Guest
from paprscm.pmem.namespaces import (
    CharacterDevice,
    NamespaceMap,
    create_fsdax,
    create_namespace,
    disk_offset,
    file_offset,
)
from paprscm.pmem.pins import page_structure_bytes, pattern, pin_pages
from paprscm.pmem.regions import Region, read_page_size, wait_for_region
from paprscm.settings import OWN_KERNELS
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_ON, SMALL
from paprscm.vm.machine import GIB, MIB, Machine

LARGE = 5 * GIB
PIECES = 40
ISSUE = "linux-devdax-initializes-pages-of-others"
# Functions in the call trace of each known issue; the first that fits is it.
FRAMES = {
    ISSUE: ("memmap_init_compound",),
    "linux-devdax-leaves-page-structures-unset": (
        "set_pfnblock_flags_mask",
        "memmap_init_zone_device",
    ),
}


class PageStructures(PaprScmTest):
    """
    A devdax namespace.

    :avocado: tags=pmem
    """

    def test_layout(self) -> None:
        """The size of struct page, which decides how it is mapped, is that of distributions.

        It is a metric; only the suite's own kernels must have 64 bytes (CONFIG_MEMCG).
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON.at(0, SMALL),)))
        size = page_structure_bytes(guest)
        self.metric("page_structure", size, "bytes")
        if size != 64 and self.environment.settings.kernel in OWN_KERNELS:
            raise HostError(f"struct page of the suite's kernel has {size} bytes, not 64")

    def judge(self, location: NamespaceMap) -> None:
        """Pin pages of namespaces of each alignment, twice: before and after they are disabled."""
        guest = self.boot(
            Machine(nvdimms=(PMEM_ON.at(0, LARGE), PMEM_ON.at(1, SMALL).holding("raw")))
        )
        region = wait_for_region(guest, 0)
        scratch = create_namespace(guest, wait_for_region(guest, 1), mode="raw").path
        nd = "/sys/bus/nd/devices"
        listed = guest.succeed(f"cat {nd}/$(cat {nd}/{region.name}/dax_seed)/supported_alignments")
        aligns = list(map(int, listed.split()))
        for align in aligns:
            size = max(2 * align, GIB) if align < GIB else 3 * align
            try:
                device = create_namespace(
                    guest,
                    region,
                    mode="devdax",
                    map=location,
                    size_bytes=size,
                    align_bytes=align,
                ).character_device
            except ContractError:
                oopses = traces(guest.console.lines, OOPS)
                for issue, frames in FRAMES.items():
                    if oopses and all(has_frame(oopses[0], frame) for frame in frames):
                        found = f"align {align}: an Oops in {frames[0]}"
                        self.known_issue(issue, shows=True, found=found)
                        return
                raise
            self.check(f"alignment of {device.name}", device.align_bytes, align)
            self.pin(guest, region, device, scratch, f"align {align}, new")
            namespaces = f"namespace -r {region.name} all"
            guest.succeed(f"ndctl disable-{namespaces} && ndctl enable-{namespaces}")
            self.pin(guest, region, device, scratch, f"align {align}, enabled again")
            guest.succeed(f"ndctl destroy-namespace -f -r {region.name} all")
        # The bug needs huge pages that have fewer page structures, of 64 bytes, than fit into two
        # pages.
        page = read_page_size(guest)
        if location == "mem" and any(page < align < 2 * page // 64 * page for align in aligns):
            self.known_issue(ISSUE, shows=False, found=f"aligned to {listed}")

    def pin(
        self, guest: Guest, region: Region, device: CharacterDevice, scratch: str, what: str
    ) -> None:
        """Let a disk access pages of the device, and compare the pieces with the backing file."""
        seed = self.random().getrandbits(32)
        report = pin_pages(guest, device.path, scratch, count=PIECES, seed=seed)
        self.expect(f"{what}: size of the device", report.size, device.size_bytes)
        start = file_offset(guest, region, device)
        with guest.file(0).open("rb") as file:
            for offset in report.offsets:
                file.seek(start + offset)
                found = file.read(64)
                self.check(f"{what}: the file at {offset:#x}", found, pattern(offset))
        self.metric("pieces", report.pieces, "pieces", of=what)

    def test_pinned_map_mem(self) -> None:
        """A disk accesses pages of a devdax with page structures in memory, at each alignment."""
        self.judge("mem")

    def test_pinned_map_dev(self) -> None:
        """A disk accesses pages of a devdax with page structures on the DIMM, at each alignment."""
        self.judge("dev")


SECONDARY_ISSUE = "linux-hash-loses-secondary-bolted-entries"
# A lost mapping: of the vmemmap, while it is filled, or of the DIMM, when it is written to.
LOST = re.compile(r"BUG: Unable to handle kernel data access")
LOST_FRAMES = "memremap_pages", "pmem_submit_bio"
HPT_SIZE = re.compile(r"ppc64_pft_size += 0x([0-9a-f]+)|HPT resize to shift (\d+) complete")
FULL = "Unable to create linear mapping"
PLACES = 63
ROOM = 40 * GIB


class HashTable(PaprScmTest):
    """
    DIMMs that fill the hash page table of a guest with POWER8.

    Linux maps its memory by bolted entries, one for each page. The table is made for the guest's
    memory; DIMMs that are plugged later do not enlarge it.

    :avocado: tags=pmem
    """

    def test_nearly_full(self) -> None:
        """DIMMs whose pages fill the hash page table to 15/16 can be accessed at each place.

        arch/powerpc/mm/book3s64/hash_utils.c, htab_bolt_mapping: an entry whose group is full is
        put into the secondary group; by the Power ISA, its H bit says in which of the two it is.
        """
        small = PMEM_ON.at(0, SMALL)
        machine = Machine(cpu="POWER8", memory_mib=1024, room_bytes=ROOM)
        guest = self.boot(machine, cold=True)
        guest.plug(small)
        wait_for_region(guest, small.slot)
        sizes = HPT_SIZE.findall(guest.succeed("dmesg"))
        if not sizes:
            raise CapabilityError("the guest has no hash page table")
        # The last one is in force; an entry has 16 bytes.
        first, resized = sizes[-1]
        entries = 1 << (int(resized) if resized else int(first, 16)) - 4
        room = entries * 15 // 16 * read_page_size(guest)
        memory = guest.board.memory_mib * MIB
        large = PMEM_ON.at(1, (room - memory - small.size_bytes) // SMALL * SMALL)
        if large.size_bytes > ROOM - SMALL:
            raise CapabilityError("the hash page table is larger than the guest's memory needs")
        self.measure("entries, and size of the DIMM", (entries, large.size_bytes))
        try:
            guest.plug(large)
            region = wait_for_region(guest, large.slot)
            disk = create_fsdax(guest, region)
            step = disk.size_bytes // PLACES // MIB * MIB
            writes = [f"write={step * place}:4096:{place + 1}" for place in range(PLACES)]
            results = persist(guest, disk.path, *writes, "fsync")
        except ContractError:
            if any(FULL in line for line in guest.console.lines):
                raise CapabilityError("the hash page table has no room for the DIMM") from None
            oopses = traces(guest.console.lines, LOST)
            if not oopses or not has_frame(oopses[0], *LOST_FRAMES):
                raise
            found = f"an Oops with {large.size_bytes // MIB} MiB in a table of {entries} entries"
            self.known_issue(SECONDARY_ISSUE, shows=True, found=found)
            return
        # Whether an entry is in a secondary group depends on the addresses of all others: this run
        # proves nothing about the issue.
        self.check("errors of writes", [r.error for r in results if r.error], [])
        begin = disk_offset(guest, region, disk)
        with guest.file(large.slot).open("rb") as file:
            for place in range(PLACES):
                file.seek(begin + step * place)
                self.check(f"the file at place {place}", set(file.read(4096)), {place + 1})
