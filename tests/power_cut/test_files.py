# SPDX-License-Identifier: GPL-2.0-or-later
"""Contract of fsync and its relatives on a DIMM that is flushed by H_SCM_FLUSH.

After a power cut of the host, everything is there that a system call had made durable.

A guest's stores are in the host's page cache at once, so a killed QEMU loses nothing, and a missing
flush costs nothing. Here the flush shim logs the DIMM's contents at the begin of each sync of its
file, and the test builds images that a power cut could have left: a page has the content that the
last completed sync guarantees, or any later one (paprscm/power_cut/images.py). Another guest mounts
each image, and its files are compared with what the programs had been promised at that moment.

Sources: fsync(2), sync(2), open(2) (O_DSYNC), msync(2), rename(2).
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from paprscm.errors import ConfigError, ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.pmem.fs_health import KERNEL_LOG, complaints
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.pmem.namespaces import CharacterDevice, create_namespace, file_offset, find_namespaces
from paprscm.pmem.regions import find_region
from paprscm.power_cut.generate import BEFORE, programs
from paprscm.power_cut.images import Cut, Image, images, write_image
from paprscm.power_cut.programs import read_tree, run_steps
from paprscm.power_cut.steps import Program, Step
from paprscm.power_cut.store_log import PAGE, StoreLog, Sync, read_log
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import Machine, Nvdimm

COUNTER = PMEM_ON.at(0, SMALL)
"""Before the other DIMM: its pages are logged first, so that the count is not too high."""
SIZES: dict[FsType, int] = {"ext4": SMALL, "xfs": FOR_XFS}
FOLDER = "/mnt/cut"
PROGRAMS = 40
"""Programs in one guest."""
IMAGES = 20
"""Images of the default run; -p images=N is another number."""
PER_POINT = 2
"""Images of one point: the oldest one, and random ones."""
CONTROL = 60
"""Images within which a host that lies must be detected."""
LIES = {"every sync": 1, "every second sync": 2}
"""Lies of the control: of so many syncs, one is reported but not done."""
STEPS_PER_RUN = 200


class PowerCut(PaprScmTest):
    """
    The host's power goes off.

    :avocado: tags=flush,promise
    """

    timeout = 900

    def test_ext4(self) -> None:
        """On ext4 with DAX, everything that a system call made durable is there after a power cut.

        With -p images=N, N images are judged instead of 20, and more programs are run. Controls
        check that a host that lies about its syncs is detected.
        """
        self.judge("ext4", "dax=always")

    def test_xfs(self) -> None:
        """On XFS with DAX, everything that a system call made durable is there after a cut."""
        self.judge("xfs", "dax=always")

    def test_ext4_page_cache(self) -> None:
        """On ext4 without DAX, everything that a system call made durable is there after a cut."""
        self.judge("ext4", "dax=never")

    def judge(self, fstype: FsType, options: str) -> None:
        """Run programs, build images, and judge them in another guest."""
        dice = self.random()
        count = self.number()
        disk = PMEM_OFF.at(1, SIZES[fstype])
        log, steps, start, offset = self.record(disk, fstype, options, dice, count)
        done = _counts(log, offset)
        points = [point for point in range(start, log.last + 1) if done[point] >= len(steps.before)]
        judge = _Judge(self, disk, fstype, options, steps.program)
        found = 0
        for point in _spread(points, -(-count // PER_POINT), dice):
            for image in images(Cut(log, point), dice, limit=PER_POINT, torn=self.torn()):
                found += 1
                for text in judge.differences(image, done[point]):
                    self.check(f"{image.name} at point {point}", text, "", detail=judge.context)
            self.checkpoint()
        self.control(judge, log, start, done, points, dice)
        self.measure("syncs, points and images", [len(log.syncs), len(points), found])
        self.metric("image", judge.duration_s / judge.count, "s", fstype=fstype, options=options)

    def number(self) -> int:
        """Number of images, from -p images=N."""
        text = str(self.params.get("images", default=IMAGES))
        if not text.isdecimal() or not int(text):
            raise ConfigError(f"images={text} is not a number of images")
        return int(text)

    def torn(self) -> bool:
        """With -p torn=yes, the host writes each sector of 512 bytes on its own."""
        text = str(self.params.get("torn", default="no"))
        if text not in ("yes", "no"):
            raise ConfigError(f"torn={text} is neither yes nor no")
        return text == "yes"

    def record(
        self, disk: Nvdimm, fstype: FsType, options: str, dice: random.Random, count: int
    ) -> tuple[StoreLog, _Steps, int, int]:
        """Run programs; return the log, the steps, their first point, and the counter's offset."""
        files = self.keep(COUNTER, disk)
        path = Path(self.workdir) / f"stores-{fstype}"
        steps = _Steps(programs(dice, max(PROGRAMS, count // 10)))
        with self.environment.guest(
            Machine(nvdimms=files.nvdimms()), folder=self.folder("guest"), shim=self.shim(log=path)
        ) as guest:
            region = find_region(guest, COUNTER.slot)
            counter = create_namespace(guest, region, mode="devdax").device
            if not isinstance(counter, CharacterDevice):
                raise ContractError(f"{counter.path} is not a DAX device")
            offset = file_offset(guest, region, counter)
            dax_mount(guest, disk.slot, fstype, FOLDER, options=options)
            guest.succeed(f"sync {FOLDER}")
            start = guest.vm.syncs(disk.slot).counts().begun
            for part in steps.parts():
                run_steps(guest, FOLDER, counter.path, part)
            guest.vm.qmp.execute("stop")
            log = read_log(path, [files.path(COUNTER.slot), files.path(disk.slot)])
        path.unlink()
        return log, steps, start, offset

    def control(
        self,
        judge: _Judge,
        log: StoreLog,
        start: int,
        done: Sequence[int],
        points: Sequence[int],
        dice: random.Random,
    ) -> None:
        """Check that a host is detected that lies about syncs since the first program.

        Raises:
            HostError: it is not, so the verdicts mean nothing.
        """
        for what, step in LIES.items():
            for number in range(1, CONTROL + 1):
                point = dice.choice(points)
                cut = Cut(log, point, counts=functools.partial(_is_done, start, step))
                (image,) = images(cut, dice, limit=1)
                if judge.differences(image, done[point]):
                    self.metric("images to detection", number, "images", lie=what)
                    break
            else:
                raise HostError(f"{CONTROL} images of a host have all data; {what} was a lie")


class _Steps:
    """The steps of all programs, each in a folder of its own."""

    def __init__(self, programs: Iterable[Sequence[Step]]) -> None:
        self.before: list[Step] = []
        after: list[Step] = []
        for number, steps in enumerate(programs):
            folder = f"p{number}"
            self.before += [Step("mkdir", folder), *(step.inside(folder) for step in BEFORE)]
            after += [step.inside(folder) for step in steps]
        self.before.append(Step("syncfs", "."))
        self.program = Program([*self.before, *after])

    def parts(self) -> list[Sequence[Step]]:
        steps = self.program.steps
        return [steps[at : at + STEPS_PER_RUN] for at in range(0, len(steps), STEPS_PER_RUN)]


def _is_done(start: int, step: int, sync: Sync) -> bool:
    """False for a sync that a lying host reports but does not do: each `step`-th one."""
    return sync.point < start or sync.point % step > 0


def _counts(log: StoreLog, offset: int) -> list[int]:
    """Number of completed steps at each point."""
    done, counts = 0, []
    place = (COUNTER.slot, offset // PAGE)
    for changed in log.pages:
        if place in changed:
            done = int.from_bytes(changed[place][offset % PAGE :][:8], "little")
        counts.append(done)
    return counts


def _spread(points: Sequence[int], count: int, dice: random.Random) -> list[int]:
    """A choice of points in random order; the last one is among them."""
    others = dice.sample(points[:-1], min(count, len(points)) - 1)
    return [points[-1], *others]


class _Judge:
    """A guest that mounts one image after the other."""

    def __init__(
        self, test: PowerCut, disk: Nvdimm, fstype: FsType, options: str, program: Program
    ) -> None:
        self._test = test
        self._files = test.keep(disk)
        self._disk = disk
        self._mount = f"mount -t {fstype} -o {options}"
        self._program = program
        self._guest: Guest | None = None
        self._device = ""
        self.count = 0
        self.duration_s = 0.0
        self.context = ""

    def differences(self, image: Image, done: int) -> list[str]:
        """Return what is missing or wrong in an image, when `done` steps had returned."""
        started = time.monotonic()
        try:
            return self._differences(image, done)
        finally:
            self.count += 1
            self.duration_s += time.monotonic() - started

    def _differences(self, image: Image, done: int) -> list[str]:
        slot = self._disk.slot
        write_image(image, slot, self._files.path(slot))
        guest = self._guest or self._start()
        self.context = f"{done} steps had returned; the next was {self._next(done)}"
        mounted = guest.run(f"{self._mount} {self._device} {FOLDER}")
        if mounted.status:
            return [f"cannot be mounted: {mounted.stderr.strip()}"]
        tree = read_tree(guest, FOLDER)
        guest.succeed(f"umount {FOLDER}")
        messages = guest.succeed(f"{KERNEL_LOG} && dmesg -C")
        return [*complaints(messages), *self._program.expected(done).differences(tree)]

    def _next(self, done: int) -> str:
        steps = self._program.steps
        return str(steps[done]) if done < len(steps) else "none"

    def _start(self) -> Guest:
        """Start the guest with the first image, whose labels and namespace all images have."""
        test = self._test
        self._guest = test.boot(Machine(nvdimms=self._files.nvdimms()), allowed=[""])
        (namespace,) = find_namespaces(self._guest, find_region(self._guest, self._disk.slot))
        self._device = namespace.path
        self._guest.succeed(f"mkdir -p {FOLDER}")
        return self._guest
