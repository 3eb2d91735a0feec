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
from paprscm.pmem.fs_health import KERNEL_LOG, complaints
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.pmem.namespaces import CharacterDevice, create_namespace, file_offset, find_namespaces
from paprscm.pmem.regions import find_region
from paprscm.power_cut.generate import BEFORE, programs
from paprscm.power_cut.images import Cut, Image, images, write_image
from paprscm.power_cut.programs import read_tree, run_steps
from paprscm.power_cut.steps import Program, Step
from paprscm.power_cut.store_log import PAGE, StoreLog, read_log
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
CONTROL = 200
"""Images within which a host that lies must be detected; the most that was needed is 12."""
LIES = {"every sync": 1.0, "half of the syncs": 0.5}
"""Lies of the control: the probability that a sync is reported, but not done."""
STEPS_PER_RUN = 200
SYNC_S = 60.0
"""Time limit of a sync on a busy host, s."""


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
        judge_of = functools.partial(
            _Judge,
            self,
            disk,
            f"mount -t {fstype} -o {options}",
            steps.program,
            Image("newest", Cut(log, log.last).newest),
        )
        judge = judge_of()
        judged, began = 0, time.monotonic()
        for point in _spread(points, -(-count // PER_POINT), dice):
            for image in images(Cut(log, point), dice, limit=PER_POINT, torn=self.torn()):
                judged += 1
                detail = judge.context(done[point])
                for text in judge.differences(image, done[point]):
                    self.check(f"{image.name} at point {point}", text, "", detail=detail)
            self.checkpoint()
        duration_s = time.monotonic() - began
        self.measure("syncs, points and images", [len(log.syncs), len(points), judged])
        self.metric("image", duration_s / judged, "s", fstype=fstype, options=options)
        # A kernel may complain about the images of a host that lies.
        self.control(judge_of(allowed=[""]), log, start, done, points, dice)

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
            # The end of a sync is in the log before it is counted.
            syncs = guest.vm.syncs(disk.slot)
            syncs.wait_ended(syncs.counts().begun, SYNC_S)
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
        for what, share in LIES.items():
            for number in range(1, CONTROL + 1):
                point = dice.choice(points)
                # Drawn for each image: a file system may make its syncs in pairs, of which the
                # second one is enough.
                done_syncs = {s for s in log.syncs if s.point < start or dice.random() >= share}
                (image,) = images(Cut(log, point, counts=done_syncs.__contains__), dice, limit=1)
                if judge.differences(image, done[point]):
                    self.metric("images_to_detection", number, "images", lie=what)
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
    """A guest that mounts one image after the other.

    Args:
        test: the test; the guest ends with it.
        disk: the DIMM.
        mount: the command that mounts a file system, without device and folder.
        program: the steps of all programs.
        newest: the DIMM's last contents. The guest starts with them, and so finds the namespace,
            even if the images lack it.
        allowed: kernel messages that are expected (regular expressions).
    """

    def __init__(
        self,
        test: PowerCut,
        disk: Nvdimm,
        mount: str,
        program: Program,
        newest: Image,
        *,
        allowed: Iterable[str] = (),
    ) -> None:
        self._slot = disk.slot
        files = test.keep(disk)
        self._file = files.path(disk.slot)
        self._program = program
        write_image(newest, self._slot, self._file)
        self._guest = test.boot(Machine(nvdimms=files.nvdimms()), allowed=allowed)
        (namespace,) = find_namespaces(self._guest, find_region(self._guest, self._slot))
        self._guest.succeed(f"mkdir -p {FOLDER}")
        # Messages of an image before this one do not count.
        self._mount = f"dmesg -C; {mount} {namespace.path} {FOLDER}"

    def differences(self, image: Image, done: int) -> list[str]:
        """Return what is missing or wrong in an image, when `done` steps had returned."""
        write_image(image, self._slot, self._file)
        mounted = self._guest.run(self._mount)
        if mounted.status:
            return [f"cannot be mounted: {mounted.stderr.strip()}"]
        tree = read_tree(self._guest, FOLDER)
        messages = self._guest.succeed(f"umount {FOLDER} && {KERNEL_LOG}")
        return [*complaints(messages), *self._program.expected(done).differences(tree)]

    def context(self, done: int) -> str:
        """The position of the cut in the program, for a report."""
        steps = self._program.steps
        following = str(steps[done]) if done < len(steps) else "none"
        return f"{done} steps had returned; the next was {following}"
