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

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.power_cut.campaign import (
    COUNTER,
    PER_POINT,
    Campaign,
    Judge,
    image_count,
    is_torn,
    make_counter,
    stop_and_read,
)
from paprscm.power_cut.generate import BEFORE, programs, shortest
from paprscm.power_cut.images import Image, write_image
from paprscm.power_cut.mounted import FOLDER, MountedImages
from paprscm.power_cut.programs import read_tree, run_steps, tree_command
from paprscm.power_cut.steps import Program, Step
from paprscm.power_cut.store_log import StoreLog
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm

SIZES: dict[FsType, int] = {"ext4": SMALL, "xfs": FOR_XFS}
PROGRAMS = 40
"""Programs in one guest."""
IMAGES = 20
"""Images of the default run; -p images=N is another number."""
TRIES = 12
"""Shorter programs to run, after one has failed."""


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
        """On XFS with DAX, everything that a system call made durable is there after a cut.

        :avocado: tags=quick
        """
        self.judge("xfs", "dax=always")

    def test_ext4_page_cache(self) -> None:
        """On ext4 without DAX, everything that a system call made durable is there after a cut."""
        self.judge("ext4", "dax=never")

    def judge(self, fstype: FsType, options: str) -> None:
        """Run programs, build images, and judge them in another guest."""
        dice = self.random()
        count = image_count(str(self.params.get("images", default=IMAGES)))
        disk = PMEM_OFF.at(1, SIZES[fstype])
        steps = _Steps(programs(dice, max(PROGRAMS, count // 10)))
        log, done = self.record(disk, fstype, options, steps)
        torn = is_torn(str(self.params.get("torn", default="no")))
        campaign = Campaign(log, done, len(steps.before), dice, torn)
        # The images are only read: with pmem=on, their recovery needs no flushes.
        files = self.keep(replace(disk, pmem=True))
        write_image(campaign.newest, disk.slot, files.path(disk.slot))
        guest = self.boot(Machine(nvdimms=files.nvdimms()))
        mounted = MountedImages(guest, disk.slot, fstype, options)
        command = tree_command(guest, FOLDER)

        def judge_of(program: Program) -> Judge:
            def differences(image: Image, done: int) -> list[str]:
                result, wrong = mounted.read(image, command)
                if result is not None:
                    wrong += program.expected(done).differences(read_tree(result))
                return wrong

            return differences

        def fails(program: Sequence[Step]) -> bool:
            """Run one program alone, and judge images of all its cuts."""
            alone = _Steps([("alone", program)])
            log, done = self.record(disk, fstype, options, alone)
            cuts = Campaign(log, done, len(alone.before), dice, torn)
            judge = judge_of(alone.program)
            images = cuts.images(PER_POINT * len(cuts.points))
            return any(judge(image, done[point]) for image, point in images)

        def explain(image: Image, done: int, wrong: list[str]) -> str:
            path = Path(self.outputdir) / "image"
            with path.open("wb") as file:
                file.truncate(disk.file_bytes)
            write_image(image, disk.slot, path)
            found = f"{steps.context(done)}; the image is {path}"
            program = steps.of(wrong[0])
            # A kernel may complain about the images.
            with guest.expect_messages(""):
                if not program or not fails(program):
                    return f"{found}; no program alone fails"
                short = shortest(program, fails, tries=TRIES)
            return f"{found}; this program fails: {' '.join(map(str, short))}"

        judge = judge_of(steps.program)
        campaign.judge(self, judge, count, explain, steps.begun, fstype=fstype, options=options)
        # A kernel may complain about the images of a host that lies.
        with guest.expect_messages(""):
            campaign.expect_force(self, judge)

    def record(
        self, disk: Nvdimm, fstype: FsType, options: str, steps: _Steps
    ) -> tuple[StoreLog, list[int]]:
        """Run programs; return the log, and the number of completed steps at each point."""
        machine = Machine(nvdimms=(COUNTER, disk.holding(fstype)))
        shim = self.shim(log=Path(self.workdir) / "stores")
        with self.environment.guest(machine, folder=self.folder("guest"), shim=shim) as guest:
            counter = make_counter(guest)
            dax_mount(guest, disk.slot, fstype, FOLDER, options=options)
            guest.succeed(f"sync {FOLDER}")
            run_steps(guest, FOLDER, counter.path, steps.program.steps)
            log = stop_and_read(guest, [shim], [COUNTER.slot, disk.slot])
        return log, counter.at_points(log)


class _Steps:
    """The steps of all programs, each in a folder of its own."""

    def __init__(self, programs: Iterable[tuple[str, Sequence[Step]]]) -> None:
        self._programs = list(programs)
        self.before: list[Step] = []
        after: list[Step] = []
        begins: list[int] = []
        for number, (_, steps) in enumerate(self._programs):
            folder = f"p{number}"
            self.before += [Step("mkdir", folder), *(step.inside(folder) for step in BEFORE)]
            begins.append(len(after))
            after += [step.inside(folder) for step in steps]
        self.before.append(Step("syncfs", "."))
        self.program = Program([*self.before, *after])
        self._begins = [len(self.before) + begin for begin in begins]

    def begun(self, done: int) -> Iterator[str]:
        """Names of the programs that have begun when so many steps had returned."""
        begun = bisect.bisect_right(self._begins, done)
        return (name for name, _ in self._programs[:begun])

    def of(self, difference: str) -> Sequence[Step]:
        """The program in whose folder a difference is; empty if it is in none."""
        match = re.match(r"p(\d+)/", difference)
        return self._programs[int(match[1])][1] if match else ()

    def context(self, done: int) -> str:
        """The position of a cut in the program, for a report."""
        steps = self.program.steps
        following = str(steps[done]) if done < len(steps) else "none"
        return f"{done} steps had returned; the next was {following}"
