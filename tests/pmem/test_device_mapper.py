# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that the device mapper makes of DIMMs: MAP_SYNC, flushes, and a member that goes.

Such a disk has DAX if each member has it, and is synchronous if each member is
(drivers/md/dm-table.c, dm_table_set_restrictions: device_not_dax_capable and
device_not_dax_synchronous_capable). A flush of the disk is a flush of each member
(Documentation/admin-guide/device-mapper, drivers/md/dm.c, __send_empty_flush).
"""

import errno
import time
from collections.abc import Sequence

from paprscm import timesheet
from paprscm.channel.command import require_success
from paprscm.driver.removal import ND, BackgroundUnbind
from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.flush.syscalls import HeldFile, persist
from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import Verdict, judge_map_sync
from paprscm.pmem.mounts import FsType, make_filesystem, mount, try_mount
from paprscm.pmem.namespaces import (
    BlockDevice,
    Namespace,
    create_fsdax,
    create_namespace,
    find_namespace,
)
from paprscm.pmem.regions import read_page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import MIB, Machine, Nvdimm

SECTOR = 512
NO_DRIVER = 77
"""Exit status of our own; dmsetup's is 1."""
CHUNK = 128
"""Sectors of a stripe: one page of 64 KiB."""
PART = 32 * MIB // SECTOR
"""Sectors of each member."""
HELD_S = 0.5
"""Duration for which a call is observed to wait for a flush, s."""


def create(guest: Guest, name: str, table: str) -> str:
    """Create a disk from a table of dmsetup(8); return its path, which works without udev.

    Raises:
        CapabilityError: the guest's kernel has no device mapper.
    """
    made = guest.run(
        f"dmsetup version > /dev/null || exit {NO_DRIVER}\n"
        f"dmsetup create {name} <<'E' && dmsetup info -c --noheadings -o blkdevname {name}\n"
        f"{table}\nE"
    )
    if made.status == NO_DRIVER:
        raise CapabilityError("the guest's kernel was built without CONFIG_BLK_DEV_DM")
    node = require_success(made).stdout.strip()
    if not node.startswith("dm-") or not node[3:].isdecimal():
        raise HostError(f"dmsetup printed {node!r}, not the name of a dm device")
    return f"/dev/{node}"


def linear(members: Sequence[str], *, at_mib: int = 0) -> str:
    """Table of a dm-linear: one part of each member, from at_mib on."""
    return "\n".join(
        f"{index * PART} {PART} linear {path} {at_mib * MIB // SECTOR}"
        for index, path in enumerate(members)
    )


def striped(members: Sequence[str], *, at_mib: int = 0) -> str:
    """Table of a dm-stripe: one part of each member, from at_mib on."""
    places = " ".join(f"{path} {at_mib * MIB // SECTOR}" for path in members)
    return f"0 {len(members) * PART} striped {len(members)} {CHUNK} {places}"


class DeviceMapperTest(PaprScmTest):
    """
    Base of the tests of the device mapper.

    :avocado: disable
    """

    def disks(self, guest: Guest, *nvdimms: Nvdimm) -> dict[int, BlockDevice]:
        """The fsdax disk of each DIMM, by its slot."""
        return {
            nvdimm.slot: create_fsdax(guest, wait_for_region(guest, nvdimm.slot))
            for nvdimm in nvdimms
        }

    def probe(
        self, guest: Guest, what: str, path: str, expected: Verdict, fstype: FsType = "ext4"
    ) -> None:
        """Probe a new file, and compare the verdict."""
        report = map_sync(guest, path)
        self.measure(what, report.line)
        self.check_map_sync(what, report, expected, fstype=fstype)

    def expect_dax(self, guest: Guest, what: str, disk: str, dax: str) -> None:
        """Check what the block layer says of a disk."""
        shown = guest.succeed(f"cat /sys/block/{disk.removeprefix('/dev/')}/queue/dax")
        self.check(f"{what}: queue/dax", shown, dax)


class Synchronous(DeviceMapperTest):
    """
    MAP_SYNC on a disk whose members differ.

    :avocado: tags=map_sync
    """

    def test_members(self) -> None:
        """A dm-linear, a dm-stripe and a stack of them grant MAP_SYNC if each DIMM has pmem=on.

        The disk has DAX in any case, and MAP_SYNC is refused even for a file that lies completely
        on the synchronous part.
        """
        dimms = [dimm.holding("fsdax") for dimm in (PMEM_ON.at(0), PMEM_OFF.at(1), PMEM_ON.at(2))]
        guest = self.boot(Machine(nvdimms=tuple(dimms)))
        disks = self.disks(guest, *dimms)
        page = read_page_size(guest)
        # All disks exist concurrently, so that none reuses the dax_device of another
        # (known_issues/linux-dax-device-inherits-flags.md).
        cases = (
            ("on+off", linear, (0, 1), Verdict.REFUSED),
            ("off+on", linear, (1, 0), Verdict.REFUSED),
            ("off", linear, (1,), Verdict.REFUSED),
            ("on+on", linear, (0, 2), Verdict.ACCEPTED),
            ("on", linear, (0,), Verdict.ACCEPTED),
            ("striped on+off", striped, (0, 1), Verdict.REFUSED),
            ("striped on+on", striped, (0, 2), Verdict.ACCEPTED),
        )
        for index, (what, layout, slots, verdict) in enumerate(cases):
            name = what.replace(" ", "-")
            members = [disks[slot].path for slot in slots]
            path = create(guest, name, layout(members, at_mib=32 * index))
            if len(slots) > 1:
                # One more layer: it knows its members only as disks of the device mapper.
                path = create(guest, f"over-{name}", linear([path]))
            self.expect_dax(guest, what, path, "1")
            make_filesystem(guest, path, "ext4", page)
            mount(guest, path, "ext4", f"/mnt/{name}")
            self.probe(guest, what, f"/mnt/{name}/file", verdict)

    def test_without_dax(self) -> None:
        """A disk of which one member has no DAX has none: it is not mounted with dax=always."""
        dimms = PMEM_ON.at(0).holding("fsdax"), PMEM_ON.at(1, SMALL).holding("raw")
        guest = self.boot(Machine(nvdimms=dimms))
        (fsdax,) = self.disks(guest, dimms[0]).values()
        raw = create_namespace(guest, wait_for_region(guest, 1), mode="raw")
        whole = create(guest, "whole", linear([fsdax.path, fsdax.path]))
        mixed = create(guest, "mixed", linear([fsdax.path, raw.path], at_mib=64))
        for what, path, dax in (("fsdax", whole, "1"), ("fsdax and raw", mixed, "0")):
            self.expect_dax(guest, what, path, dax)
            make_filesystem(guest, path, "ext4", read_page_size(guest))
        mount(guest, whole, "ext4", "/mnt/whole")
        self.probe(guest, "fsdax", "/mnt/whole/file", Verdict.ACCEPTED)
        answer = try_mount(guest, mixed, "ext4", "/mnt/mixed")
        self.check("errno of a mount with dax=always", answer.errno_name, "EINVAL")
        mount(guest, mixed, "ext4", "/mnt/mixed", options="")
        self.probe(guest, "fsdax and raw", "/mnt/mixed/file", Verdict.NOT_DAX)

    def test_grown(self) -> None:
        """A synchronous dm-linear that is extended onto pmem=off no longer grants MAP_SYNC."""
        dimms = PMEM_ON.at(0).holding("fsdax"), PMEM_OFF.at(1).holding("fsdax")
        guest = self.boot(Machine(nvdimms=dimms))
        disks = self.disks(guest, *dimms)
        path = create(guest, "grows", linear([disks[0].path]))
        make_filesystem(guest, path, "ext4", read_page_size(guest))
        mount(guest, path, "ext4", "/mnt")
        self.probe(guest, "before", "/mnt/before", Verdict.ACCEPTED)
        self.checkpoint()
        rows = linear([disks[0].path, disks[1].path])
        guest.succeed(
            f"dmsetup reload grows <<'E'\n{rows}\nE\ndmsetup suspend grows && "
            f"dmsetup resume grows && [ $(dmsetup table grows | wc -l) = 2 ]"
        )
        report = map_sync(guest, "/mnt/after")
        self.measure("after", report.line)
        outcome = judge_map_sync(report)
        self.known_issue(
            "linux-dm-stays-synchronous",
            shows=outcome.verdict is Verdict.ACCEPTED,
            found=f"a dm-linear with a part on pmem=off: {outcome.verdict.value}",
        )
        if outcome.verdict not in (Verdict.ACCEPTED, Verdict.REFUSED):
            raise ContractError(str(outcome))


class Flushes(DeviceMapperTest):
    """
    Flushes through a disk on two DIMMs with pmem=off.

    :avocado: tags=flush,pmem
    """

    SLOTS = 1, 3

    def machine(self) -> tuple[Guest, dict[int, Namespace]]:
        """Boot a guest with two DIMMs whose syncs can be held; return a raw namespace of each."""
        dimms = tuple(PMEM_OFF.at(slot, SMALL).holding("raw") for slot in self.SLOTS)
        guest = self.boot(Machine(nvdimms=dimms), shim=self.shim())
        return guest, {
            slot: create_namespace(guest, wait_for_region(guest, slot), mode="raw")
            for slot in self.SLOTS
        }

    def hold(self, guest: Guest, path: str, slot: int, byte: int) -> HeldFile:
        """Write a chunk to each member of a disk, and begin a flush of which one sync is held."""
        write = f"write=0:{len(self.SLOTS) * CHUNK * SECTOR}:{byte}"
        file = HeldFile(guest, path, write, "await", "fdatasync")
        syncs = guest.vm.syncs(slot)
        begun = syncs.counts().begun
        syncs.hang()
        file.go()
        syncs.wait_begun(begun + 1)
        return file

    def test_each_member(self) -> None:
        """An fdatasync of a striped and of a linear disk ends when the flush of each DIMM has.

        The sync of one DIMM is held at a time, so a flush of only some members would end.
        """
        guest, disks = self.machine()
        members = [disks[slot].path for slot in self.SLOTS]
        for name, layout in (("striped", striped), ("linear", linear)):
            path = create(guest, name, layout(members))
            for slot in self.SLOTS:
                what = f"{name}, sync of slot {slot} held"
                file = self.hold(guest, path, slot, slot)
                try:
                    self.expect(f"{what}: the fdatasync sleeps", file.wait_blocked(), True)
                    with timesheet.during("waits"):
                        # A call that is still waiting signals nothing.
                        time.sleep(HELD_S)
                    self.check(f"{what}: the fdatasync waits", file.wait_blocked(), True)
                finally:
                    guest.vm.syncs(slot).release()
                *_others, flush = file.result()
                self.check(f"{what}: answer", str(flush), "fdatasync: 0")
            guest.succeed(f"dmsetup remove {name}")

    def test_member_goes(self) -> None:
        """When nd_pmem goes from a member during a flush, the call ends, and so do later ones.

        What was synced is on both DIMMs; the other member still works; the disk can be removed, and
        made again when the driver is back.
        """
        guest, disks = self.machine()
        gone, stays = self.SLOTS
        table = striped([disks[slot].path for slot in self.SLOTS])
        path = create(guest, "striped", table)
        size = len(self.SLOTS) * CHUNK * SECTOR
        for step in persist(guest, path, f"write=0:{size}:71", "fdatasync"):
            self.check("before", step.errno, 0)
        name = disks[gone].name
        file = self.hold(guest, path, gone, 73)
        with guest.expect_messages(r"I/O error|lost (async|sync) page write"):
            try:
                unbind = BackgroundUnbind(guest, f"{ND}/nd_pmem", name)
                self.check("the unbind has ended during the flush", unbind.ends_early(), False)
            finally:
                guest.vm.syncs(gone).release()
            self.check("status of the unbind", unbind.wait(), "0")
            *_others, flush = file.result()
            self.measure("answer of the held call", str(flush))
            # It began before the disk went, so either answer is correct.
            if flush.errno not in (0, errno.EIO, errno.ENXIO):
                raise ContractError(f"the held call: {flush}")
            *_others, later = persist(guest, path, f"write=0:{size}:75", "fdatasync")
            self.check("a later fdatasync", later.error, "EIO")
        # Of the chunks, the second one is the first of the member that stays; the later write may
        # have reached it.
        chunk = CHUNK * SECTOR
        synced = {71, 73} if flush.errno else {73}
        steps = f"read=0:{chunk}", f"write={chunk}:{chunk}:77", "fdatasync"
        (other, *ended) = persist(guest, disks[stays].path, *steps)
        self.check("the member that stays: a synced byte", other.byte in synced | {75}, True)
        self.check("the member that stays: errors", [s.error for s in ended if s.error], [])
        guest.succeed(f"dmsetup remove striped && echo {name} > {ND}/nd_pmem/bind")
        bound = find_namespace(guest, gone, "raw")
        again = create(guest, "again", striped([bound.path, disks[stays].path]))
        (read,) = persist(guest, again, f"read=0:{chunk}")
        self.check("the member that went: a synced byte", read.byte in synced, True)
