# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that access the memory of DIMMs: DAX pages, and DIMMs that are system RAM.

A virtio disk accesses the guest's memory at its real address, or through the IOMMU
(iommu_platform), as PCI devices of real machines do. Then Linux needs TCEs for the DIMMs, too:
arch/powerpc/platforms/pseries/iommu.c, enable_ddw and iommu_mem_notifier. devdax becomes system RAM
by drivers/dax/kmem.c.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from paprscm.checks import at_least, at_most
from paprscm.errors import CapabilityError, HostError
from paprscm.guest.guest import Guest
from paprscm.pmem.namespaces import CharacterDevice, create_namespace, file_offset
from paprscm.pmem.pins import pattern, pin_pages
from paprscm.pmem.regions import read_page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.backing_files import find_word, written_chunks
from paprscm.vm.dimms import PMEM_ON
from paprscm.vm.machine import GIB, MIB, Machine

DIMM = PMEM_ON.at(3, GIB)
DISK = "/dev/vdb"
PIECES = 40
# Bit 33 of a virtio device's features (linux/virtio_config.h, VIRTIO_F_ACCESS_PLATFORM).
ACCESS_PLATFORM = 33
ISSUE = "linux-dma-window-lacks-pmem"
# QEMU hw/virtio/virtio.c: a descriptor's address is not mapped.
FAULT = "bogus descriptor or out of resources"
DRIVERS = "/sys/bus/dax/drivers"
MEMORY = "/sys/devices/system/memory"
NODES = "/sys/devices/system/node"
DISTANCES = (0, 1, 20), (0, 2, 80), (1, 2, 80)
"""Of three nodes; also a guest that knows only form 1 of PAPR's associativity can show them."""


class DmaTest(PaprScmTest):
    """
    Base of the tests: a guest with a second disk.

    :avocado: disable
    """

    def start(self, *, iommu: bool, node: int | None = None) -> Guest:
        """Boot a guest; its devices use the IOMMU, or do not. It has nodes if the DIMM has one."""
        folder = tempfile.TemporaryDirectory(dir=self.settings.scratch_dir)
        disk = Path(self.leave.enter_context(folder)) / "disk"
        with disk.open("wb") as file:
            file.truncate(16 * MIB)
        machine = Machine(nvdimms=(DIMM,), disk=disk, iommu=iommu)
        if node is not None:
            dimm = replace(DIMM, node=node)
            machine = replace(machine, nvdimms=(dimm,), nodes=3, distances=DISTANCES)
        guest = self.boot(machine)
        features = guest.succeed("cat /sys/block/vdb/device/features")
        used = features[ACCESS_PLATFORM] == "1"
        self.expect("the disk uses the IOMMU", used, iommu)
        # A control: it can access other memory.
        report = pin_pages(guest, 16 * MIB, DISK, count=4, seed=1)
        self.check("pieces of RAM", report.pieces, 6)
        return guest

    def devdax(self, guest: Guest) -> CharacterDevice:
        """Make a devdax namespace of the whole DIMM."""
        region = wait_for_region(guest, DIMM.slot)
        namespace = create_namespace(guest, region, mode="devdax", map="dev")
        self.start_offset = file_offset(guest, region, namespace.character_device)
        return namespace.character_device


class Dma(DmaTest):
    """
    A disk and the pages of a devdax device.

    :avocado: tags=pmem
    """

    def judge(self, *, iommu: bool) -> None:
        """Let the disk access the first, the last, and other pages; compare with the file."""
        guest = self.start(iommu=iommu)
        device = self.devdax(guest)
        seed = self.random().getrandbits(32)
        with ThreadPoolExecutor(1) as pool:
            pinned = pool.submit(pin_pages, guest, device.path, DISK, count=PIECES, seed=seed)
            while not wait([pinned], 0.2).done:
                if iommu and FAULT in guest.vm.output():
                    # The disk never answers again.
                    guest.kill()
                    self.known_issue(ISSUE, shows=True, found=f"QEMU reports '{FAULT}'")
                    return
        report = pinned.result()
        if iommu:
            self.known_issue(ISSUE, shows=False, found="the disk accesses the DIMM")
        self.check("size of the mapping", report.size, device.size_bytes)
        ends = {0, device.size_bytes - 65536}
        self.check("ends of the device that were not accessed", ends - {*report.offsets}, set())
        with guest.file(DIMM.slot).open("rb") as file:
            for offset in report.offsets:
                file.seek(self.start_offset + offset)
                self.check(f"the file at {offset:#x}", file.read(64), pattern(offset))

    def test_direct(self) -> None:
        """A disk reads into and writes from all of a DAX device, its ends included."""
        self.judge(iommu=False)

    def test_iommu(self) -> None:
        """A disk behind the IOMMU reads into and writes from all of a DAX device."""
        self.judge(iommu=True)


class SystemRam(DmaTest):
    """
    A DIMM that becomes system RAM.

    :avocado: tags=pmem
    """

    def total(self, guest: Guest) -> int:
        """MemTotal, bytes."""
        return 1024 * int(guest.succeed("grep MemTotal /proc/meminfo").split()[1])

    def blocks(self, guest: Guest) -> set[str]:
        """Names of the kernel's memory blocks."""
        return set(guest.succeed(f"cd {MEMORY} && echo memory[0-9]*").split())

    def judge(self, *, iommu: bool, node: int | None = None) -> None:
        """Turn a DIMM into memory, use it by a program or a disk, and turn it back.

        Args:
            node: node of the DIMM, which has no other memory; None: there is one node.
        """
        guest = self.start(iommu=iommu, node=node)
        if node is not None and guest.run(f"[ -d {NODES} ]").status:
            raise CapabilityError("the guest's kernel was built without CONFIG_NUMA")
        device = self.devdax(guest)
        name = device.name
        total, blocks = self.total(guest), self.blocks(guest)
        start = int(guest.succeed(f"cat /sys/bus/dax/devices/{name}/resource"), 16)
        guest.succeed(f"echo {name} > {DRIVERS}/device_dax/unbind")
        guest.succeed(f"echo {name} > {DRIVERS}/kmem/new_id")
        added = " ".join(sorted(self.blocks(guest) - blocks))
        self.check("new blocks of memory", bool(added), True)
        size, target, *states = guest.succeed(
            f"cd {MEMORY}; cat block_size_bytes /sys/bus/dax/devices/{name}/target_node; "
            f"for m in {added}; do echo online_movable > $m/state; cat $m/state; echo $m/node*; "
            "done"
        ).split()
        expected = [("online", f"{block}/node{target}") for block in added.split()]
        self.check("new blocks", list(zip(states[::2], states[1::2], strict=True)), expected)
        grown = self.total(guest) - total
        # The page structures may be in the new memory (memmap_on_memory): 64 bytes for each page.
        new = int(size, 16) * len(expected)
        self.check("bytes of new blocks that are missing in MemTotal", new - grown, at_least(0))
        self.check(
            "bytes of new blocks that are missing in MemTotal", new - grown, at_most(new // 32)
        )
        # drivers/dax/kmem.c, dax_kmem_range.
        block = int(size, 16)
        whole = (start + device.size_bytes) // block * block - -(-start // block) * block
        self.check("bytes of new blocks", new, whole)
        if node is not None:
            self.check("the DIMM's node", int(target), node)
            memory = guest.succeed(f"grep MemTotal {NODES}/node{node}/meminfo").split()
            self.check("memory of that node", 1024 * int(memory[-2]), grown)
            self.distances(guest)
            self.use_by_policy(guest, node)
        else:
            self.use(guest, grown)

        guest.succeed(
            f"cd {MEMORY}; for m in {added}; do for _ in $(seq 50); do\n"
            # EBUSY while a page is in use, as for I/O.
            "echo offline 2> /dev/null > $m/state && continue 2; sleep 0.2\n"
            "done; cat $m/state; exit 1; done"
        )
        guest.succeed(f"echo {name} > {DRIVERS}/kmem/unbind")
        guest.succeed(f"echo {name} > {DRIVERS}/kmem/remove_id")
        guest.succeed(f"echo {name} > {DRIVERS}/device_dax/bind")
        self.check("MemTotal afterwards", self.total(guest), total)
        self.check("memory blocks afterwards", self.blocks(guest), blocks)
        # Behind the IOMMU, that is test_iommu above.
        if not iommu:
            again = pin_pages(guest, device.path, DISK, count=4, seed=1)
            self.check("size of the device afterwards", again.size, device.size_bytes)

    def use(self, guest: Guest, size: int) -> None:
        """Let a disk access so much memory that some of it is new."""
        seed = self.random().getrandbits(32)
        report = pin_pages(guest, size, DISK, count=PIECES, seed=seed)
        self.check("pieces", report.pieces, PIECES + 2)
        found = self.found(guest.file(DIMM.slot), report.offsets)
        self.metric("pieces_on_the_dimm", found, "pieces")
        if not found:
            raise HostError("none of the pieces was in the DIMM's memory")

    def use_by_policy(self, guest: Guest, node: int) -> None:
        """Write a file of a tmpfs whose pages must be of one node; they must be on the DIMM."""
        word = f"{self.random().getrandbits(256):064x}"
        size, line = 16 * MIB, len(word) + 1
        guest.succeed(
            f"mkdir /tmp/node && mount -t tmpfs -o mpol=bind:{node} none /tmp/node && "
            f"yes {word} | head -c {size} > /tmp/node/file"
        )
        copies = len(find_word(guest.file(DIMM.slot), word))
        # Pages are not in order: the copy across the end of each one is cut.
        least = size // line - size // read_page_size(guest)
        self.check("copies of a word on the DIMM", copies, at_least(least))
        guest.succeed("umount /tmp/node")

    def distances(self, guest: Guest) -> None:
        """Compare the distances of all nodes with those of the machine.

        A file has the distances to the online nodes, in their order
        (Documentation/ABI/stable/sysfs-devices-node).
        """
        output = guest.succeed(
            f"cd {NODES} && for n in node[0-9]*; do echo $n $(cat $n/distance); done"
        )
        rows = {int(name[4:]): row for name, *row in map(str.split, output.splitlines())}
        online = sorted(rows)
        far = {(a, b): d for one, other, d in DISTANCES for a, b in ((one, other), (other, one))}
        expected = {a: [str(far.get((a, b), 10)) for b in online] for a in online}
        self.check("distances", rows, expected)

    def found(self, path: Path, offsets: tuple[int, ...]) -> int:
        """Number of pieces whose pages are in the backing file, at any page of 4 KiB."""
        patterns = {pattern(offset) for offset in offsets}
        return sum(
            len(patterns & {chunk[at : at + 64] for at in range(0, len(chunk), 4096)})
            for _offset, chunk in written_chunks(path)
        )

    def test_direct(self) -> None:
        """A devdax that becomes memory adds whole blocks, which programs and disks can use."""
        self.judge(iommu=False)

    def test_iommu(self) -> None:
        """Disks behind the IOMMU can access memory that was a devdax before."""
        self.judge(iommu=True)

    def test_node(self) -> None:
        """A DIMM of a node without memory becomes that node's memory, at the machine's distances.

        arch/powerpc/platforms/pseries/papr_scm.c (target_node), arch/powerpc/mm/numa.c
        (__node_distance); PAPR, form 1 or 2 of ibm,associativity.
        """
        self.judge(iommu=False, node=2)
