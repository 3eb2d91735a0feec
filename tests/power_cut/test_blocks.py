# SPDX-License-Identifier: GPL-2.0-or-later
"""Contract of block devices and DAX devices on DIMMs that are flushed by H_SCM_FLUSH.

After a power cut of the host, everything is on the device that a system call had made durable: by
fsync, fdatasync, msync or sync, by a write with O_DSYNC, or by a write to the region's attribute
deep_flush. A sector of a BTT is old or new as a whole, whatever the host has written back.

As in test_files.py, the flush shim logs the contents of the DIMMs at the begin of each sync, and
the test builds images from them. A raw device has no metadata: the host reads it from the image. A

Sources: fsync(2), open(2), Documentation/block/writeback_cache_control.rst,
Documentation/driver-api/nvdimm/btt.rst.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from paprscm.channel.kmsg import SLEEPS
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.pmem.btt_race import BTT_ISSUE
from paprscm.pmem.namespaces import (
    NamespaceMode,
    create_namespace,
    disk_offset,
    file_offset,
    find_namespace,
)
from paprscm.pmem.regions import find_region, read_page_size
from paprscm.power_cut.blocks import (
    AREA,
    CACHED,
    CALLS,
    DAX,
    DIRECT,
    SECTORS,
    STRIDE,
    BlockPrograms,
    Layout,
    Operation,
)
from paprscm.power_cut.btt import BrokenBttError, read_btt
from paprscm.power_cut.campaign import (
    COUNTER,
    LIES,
    Campaign,
    Judge,
    image_count,
    is_torn,
    make_counter,
    stop_and_read,
)
from paprscm.power_cut.images import Image, write_image
from paprscm.power_cut.programs import DEVICE_FOLDER, run_steps, use_device
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import Machine, Nvdimm

PROGRAMS = 60
"""Programs in one guest."""
IMAGES = 80
"""Images of the default run that the host reads; -p images=N is another number."""
CONTROL = 1000
"""Images within which a host that lies must be detected."""
BTT_LIES = {"every sync": 1.0, "nine of ten syncs": 0.9}
"""Lies about syncs of a BTT, which makes four for each sector: half of them nearly suffice."""
BTT_PROGRAMS = 24
"""Programs on a BTT, whose writes are slow."""
EVERY = 20
"""A guest, too, reads one of so many images of a BTT."""
CHUNK = 64 * 1024
"""Size of a stripe, bytes."""
FSDAX = PMEM_OFF.at(1, SMALL).holding("fsdax")

Prepare = Callable[[Guest], tuple[str, Layout]]
"""Makes the device; returns its path and position."""


class BlockTest(PaprScmTest):
    """
    Base of the tests of block devices.

    :avocado: disable
    """

    timeout = 900

    def judge(
        self,
        dimms: Sequence[Nvdimm],
        prepare: Prepare,
        operations: Mapping[str, Operation],
        *,
        calls: Sequence[str] = CALLS,
    ) -> None:
        """Run programs on a device, build images, and read it from each.

        Args:
            dimms: the DIMMs of the device.
            prepare: makes the device in the guest.
            operations: operations of the programs.
            calls: as for BlockPrograms.
        """
        dice = self.random()
        programs = BlockPrograms(dice, operations, count=PROGRAMS, calls=calls)
        campaign, layout = self.record([COUNTER, *dimms], prepare, programs, dice)
        self.judge_images(campaign, programs, _raw(programs, layout))

    def record(
        self,
        dimms: Sequence[Nvdimm],
        prepare: Prepare,
        programs: BlockPrograms,
        dice: random.Random,
        *,
        prepared: int = 0,
        torn: str = "no",
    ) -> tuple[Campaign, Layout]:
        """Run programs on a device, and return the log of the stores, and the device's position.

        Args:
            dimms: that of the counter, and the DIMMs of the device.
            prepare: makes the device in the guest.
            programs: the programs.
            dice: source of the random choices.
            prepared: number of their steps that were made before.
            torn: default of the parameter of this name.
        """
        shim = self.shim(log=Path(self.workdir) / "stores")
        machine = Machine(nvdimms=tuple(dimms))
        with self.environment.guest(machine, folder=self.folder("guest"), shim=shim) as guest:
            counter = make_counter(guest)
            device, layout = prepare(guest)
            use_device(guest, device, dimms[1].slot)
            run_steps(guest, DEVICE_FOLDER, counter.path, programs.steps[prepared:])
            log = stop_and_read(guest, [shim], [nvdimm.slot for nvdimm in dimms])
        done = [prepared + count for count in counter.at_points(log)]
        tears = is_torn(str(self.params.get("torn", default=torn)))
        return Campaign(log, done, len(programs.before), dice, tears), layout

    def judge_images(
        self,
        campaign: Campaign,
        programs: BlockPrograms,
        differences: Judge,
        lies: Mapping[str, float] = LIES,
    ) -> None:
        """Judge images, and then those of hosts that lie."""
        count = image_count(str(self.params.get("images", default=IMAGES)))
        campaign.judge(self, differences, count, programs.explain, programs.begun)
        campaign.expect_force(self, differences, limit=CONTROL, lies=lies)

    def disk(self, mode: NamespaceMode, slot: int = 1) -> Prepare:
        """Make a namespace with a block device on the DIMM in `slot`."""

        def prepare(guest: Guest) -> tuple[str, Layout]:
            region = find_region(guest, slot)
            disk = create_namespace(guest, region, mode=mode).disk
            offset = disk_offset(guest, region, disk)
            return disk.path, Layout(PROGRAMS, ((slot, offset),))

        return prepare


class Blocks(BlockTest):
    """
    A block device or a DAX device, and the host's power goes off.

    :avocado: tags=flush,promise
    """

    def test_fsdax(self) -> None:
        """The disk of an fsdax namespace has everything that was made durable, after a cut.

        With -p images=N, N images are judged instead of 80. Controls check that a host that lies
        about its syncs is detected.

        :avocado: tags=quick
        """
        self.judge([FSDAX], self.disk("fsdax"), CACHED | DIRECT)

    def test_sync(self) -> None:
        """After sync(2), the data that were written to a disk before it are there after a cut."""
        written = {name: CACHED[name] for name in ("sector", "page", "one range twice", "store")}
        dice = self.random()
        programs = BlockPrograms(dice, written, count=PROGRAMS, calls=("sync",))
        campaign, layout = self.record([COUNTER, FSDAX], self.disk("fsdax"), programs, dice)
        judge, done = _raw(programs, layout), campaign.done[-1]
        # The oldest image at the end: all programs have called sync(2).
        lost = judge(campaign.oldest, done)
        if lost:
            # The data that fsync(2) made durable before are there.
            self.expect("after fsync", judge(campaign.oldest, campaign.before), [])
        self.known_issue(
            "linux-sync-does-not-flush-block-devices",
            shows=bool(lost),
            found=f"{programs.context(done)}: {lost[0]}" if lost else f"{done} steps are durable",
        )
        if not lost:
            self.judge_images(campaign, programs, judge)

    def test_raw_override(self) -> None:
        """With pmem-override, a raw namespace has everything that was made durable, after a cut."""
        self.judge([OVERRIDE.at(1, SMALL).holding("raw")], self.disk("raw"), CACHED | DIRECT)

    def test_devdax(self) -> None:
        """On a devdax namespace, deep_flush makes all earlier stores durable."""

        def prepare(guest: Guest) -> tuple[str, Layout]:
            region, page = find_region(guest, 1), read_page_size(guest)
            namespace = create_namespace(guest, region, mode="devdax", align_bytes=page)
            device = namespace.character_device
            offset = file_offset(guest, region, device)
            return device.path, Layout(PROGRAMS, ((1, offset),))

        self.judge([PMEM_OFF.at(1, SMALL)], prepare, DAX)

    def test_striped(self) -> None:
        """A dm-stripe over two DIMMs flushes both, and keeps what was made durable."""
        slots = (1, 2)

        def prepare(guest: Guest) -> tuple[str, Layout]:
            members = [self.disk("fsdax", slot)(guest) for slot in slots]
            sectors = CHUNK // 512
            table = f"0 {PROGRAMS * STRIDE // 512} striped {len(slots)} {sectors} " + " ".join(
                f"{path} 0" for path, _ in members
            )
            guest.succeed(f"dmsetup create cut --table '{table}' && dmsetup mknodes")
            stripes = tuple(layout.stripes[0] for _, layout in members)
            return "/dev/mapper/cut", Layout(PROGRAMS, stripes, CHUNK)

        dimms = [FSDAX.at(slot) for slot in slots]
        # deep_flush would flush one of both.
        self.judge(dimms, prepare, CACHED | DIRECT, calls=("fsync", "fdatasync", "msync"))


class Btt(BlockTest):
    """
    A BTT, and the host's power goes off.

    :avocado: tags=flush,promise,btt
    """

    def test_sectors_of_512(self) -> None:
        """With sectors of 512 bytes, each is old or new after a cut, and keeps what was flushed."""
        self.sectors(512)

    def test_sectors_of_4096(self) -> None:
        """With sectors of 4 KiB, each is old or new after a cut, even if the host tears pages.

        The images are torn at 512 bytes (-p torn=no: at 4 KiB).

        :avocado: tags=quick
        """
        self.sectors(4096)

    def sectors(self, unit: int) -> None:
        """Make a BTT with sectors of `unit` bytes, run programs on it, and judge images."""
        dice = self.random()
        programs = BlockPrograms(
            dice, SECTORS, count=BTT_PROGRAMS, unit=unit, whole=True, stride=AREA
        )
        dimms = self.made(unit, programs.size)
        prepared = len(programs.before) - 1
        try:
            campaign, layout = self.record(
                dimms, _btt, programs, dice, prepared=prepared, torn="yes"
            )
        except ContractError as error:
            if (match := SLEEPS.search(error.message)) is None:
                raise
            # A kernel that counts preemption may kill the program after that.
            self.known_issue(BTT_ISSUE, shows=True, found=match[0])
            return
        reader = _BttReader(self, dimms[1], layout, programs, campaign.newest)
        self.judge_images(campaign, programs, reader.differences, BTT_LIES)
        self.measure("images that a guest has read, too", reader.read_by_guest)

    def made(self, unit: int, size: int) -> tuple[Nvdimm, ...]:
        """A DIMM with a BTT that is filled, and that of the counter.

        It is made with pmem=on: with pmem=off, the flushes of the initialization take 10 s.
        """
        dimms = self.keep(PMEM_ON.at(1, SMALL)).nvdimms()
        with self.environment.guest(Machine(nvdimms=dimms), folder=self.folder("guest")) as guest:
            region = find_region(guest, 1)
            guest.succeed(f"ndctl create-namespace -r {region.name} -m sector -l {unit}")
            disk = find_namespace(guest, 1, "sector").disk
            self.expect("sector", disk.sector_bytes, unit)
            guest.succeed(
                f"head -c {size} /dev/zero | tr '\\0' '\\1' | "
                f"dd of={disk.path} bs=1M iflag=fullblock conv=fsync"
            )
        return COUNTER, replace(dimms[0], pmem=False)


class _BttReader:
    """Reads a BTT from an image; a guest reads some images, too.

    Args:
        test: the test; the guest ends with it.
        disk: the DIMM with the BTT.
        layout: position of the namespace in the backing file.
        programs: the programs.
        newest: contents of the DIMM with which the guest starts.
    """

    def __init__(
        self,
        test: Btt,
        disk: Nvdimm,
        layout: Layout,
        programs: BlockPrograms,
        newest: Image,
    ) -> None:
        self._layout = layout
        self._programs = programs
        self._slot = disk.slot
        self.read_by_guest = 0
        self._images = 0
        files = test.keep(replace(disk, file=None))
        self._file = files.path(disk.slot)
        write_image(newest, self._slot, self._file)
        # A guest must not use a broken BTT; the images of hosts that lie may be.
        self._guest = test.boot(Machine(nvdimms=files.nvdimms()), allowed=[""])
        self._disk = find_namespace(self._guest, self._slot, "sector").disk
        device = f"/sys/block/{self._disk.name}/device"
        self._name = self._guest.succeed(f"basename $(readlink -f {device})")

    def differences(self, image: Image, done: int) -> list[str]:
        """Return what is missing or wrong in an image, when `done` steps had returned."""
        try:
            content = read_btt(self._layout.reader(image), self._programs.size)
        except BrokenBttError as error:
            return [f"broken BTT: {error}"]
        found = self._programs.differences(content, done)
        self._images += 1
        if not found and self._images % EVERY == 1:
            read = self._read(image)
            found = self._programs.differences(read, done) if read else ["cannot be read"]
            if read != content and not found:
                raise HostError(
                    f"{image.name}: paprscm/power_cut/btt.py reads other data than Linux"
                )
            self.read_by_guest += 1
        return found

    def _read(self, image: Image) -> bytes:
        """The content that the guest finds; empty if it finds no disk."""
        drivers = "/sys/bus/nd/drivers/nd_pmem"
        self._guest.succeed(f"echo {self._name} > {drivers}/unbind")
        write_image(image, self._slot, self._file)
        self._guest.succeed(f"echo {self._name} > {drivers}/bind")
        command = f"head -c {self._programs.size} {self._disk.path}"
        return self._guest.run(command).stdout_bytes


def _btt(guest: Guest) -> tuple[str, Layout]:
    """Find the BTT, make its content durable, and return the disk and the namespace's position."""
    region = find_region(guest, 1)
    disk = find_namespace(guest, 1, "sector").disk
    guest.succeed(f"echo 1 > {region.device}/deep_flush")
    return disk.path, Layout(BTT_PROGRAMS, ((1, disk_offset(guest, region, disk)),))


def _raw(programs: BlockPrograms, layout: Layout) -> Judge:
    """Judge of a device without metadata."""
    return lambda image, done: programs.differences(layout.read(image), done)
