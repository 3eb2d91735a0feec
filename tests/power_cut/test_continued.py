# SPDX-License-Identifier: GPL-2.0-or-later
"""Contract of a disk whose guest is migrated or reset: a power cut of the host takes nothing away.

As in test_blocks.py, the flush shims of all QEMUs log the contents of the DIMM, and the host reads
the disk from images. A flush that was pending in a migration is made by the destination before it
reports success (QEMU commit b5513584a08d, in v7.0; hw/ppc/spapr_nvdimm.c,
spapr_nvdimm_flush_post_load). A reset waits for flushes and forgets their results
(spapr_nvdimm_finish_flushes, the same file); a flush of the next kernel must not get an old one.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.migration.moves import SAME_FILES, Mover
from paprscm.pmem.namespaces import create_fsdax, disk_offset, find_namespace
from paprscm.pmem.regions import find_region
from paprscm.power_cut.blocks import CACHED, DIRECT, BlockPrograms, Layout
from paprscm.power_cut.campaign import (
    COUNTER,
    Campaign,
    Counter,
    find_counter,
    image_count,
    is_torn,
    make_counter,
    stop_and_read,
)
from paprscm.power_cut.images import Image
from paprscm.power_cut.programs import DEVICE_FOLDER, run_steps, use_device
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine
from paprscm.vm.sync_shim import Shim

DISK = PMEM_OFF.at(1, SMALL).holding("fsdax")
PROGRAMS = 40
"""Programs in one guest."""
IMAGES = 80
"""Images of the default run; -p images=N is another number."""
CONTROL = 1000
"""Images within which a host that lies must be detected."""
NEAR = 8
"""Cuts within so many steps of the migration or reset are always judged."""
PENDING = 8
"""Flushes that a reset interrupts."""
BEGIN_S = 60.0
"""Time limit on a busy host for a flush to begin, s."""
BOOT_S = 180.0
"""Time limit for a kernel to start, s."""


class Continued(PaprScmTest):
    """
    A guest that goes on after a migration or a reset, and then the host's power goes off.

    :avocado: tags=flush,promise,migration
    """

    timeout = 900

    def start(self) -> tuple[Guest, Counter, Layout, Shim]:
        """A guest that can migrate, and whose stores are logged, with a disk."""
        shim = self.shim(log=Path(self.workdir) / "stores")
        guest = self.leave.enter_context(
            self.environment.guest(
                Machine(nvdimms=(COUNTER, DISK)),
                folder=self.folder("guest"),
                shim=shim,
                migrates=True,
            )
        )
        counter = make_counter(guest)
        region = find_region(guest, DISK.slot)
        disk = create_fsdax(guest, region)
        use_device(guest, disk.path, DISK.slot)
        layout = Layout(PROGRAMS, ((DISK.slot, disk_offset(guest, region, disk)),))
        return guest, counter, layout, shim

    def judge(
        self,
        guest: Guest,
        counter: Counter,
        shims: list[Shim],
        programs: BlockPrograms,
        layout: Layout,
        step: int,
    ) -> None:
        """Read the logs of a guest's QEMUs, and judge images, first those near a step."""
        log = stop_and_read(guest, shims, [COUNTER.slot, DISK.slot])
        torn = is_torn(str(self.params.get("torn", default="no")))
        done = counter.at_points(log)
        campaign = Campaign(log, done, len(programs.before), self.dice, torn)
        count = image_count(str(self.params.get("images", default=IMAGES)))
        near = range(step - NEAR, step + NEAR)

        def differences(image: Image, done: int) -> list[str]:
            return programs.differences(layout.read(image), done)

        campaign.judge(self, differences, count, programs.explain, programs.begun, among=near)
        campaign.expect_force(self, differences, limit=CONTROL)

    def test_migration(self) -> None:
        """Flushes before and after a migration, and one that is pending in it, keep their word.

        With -p images=N, N images are judged instead of 80. Controls check that a host that lies
        about its syncs is detected.

        :avocado: tags=quick
        """
        self.dice = self.random()
        programs = BlockPrograms(self.dice, CACHED | DIRECT, count=PROGRAMS)
        half = programs.begins[PROGRAMS // 2]
        guest, counter, layout, first = self.start()
        run_steps(guest, DEVICE_FOLDER, counter.path, programs.steps[:half])
        mover = Mover(guest, self.environment)
        second = self.shim(log=Path(self.workdir) / "stores-of-destination")
        vm = mover.successor(SAME_FILES, folder=self.folder("guest"), shim=second)
        syncs = guest.vm.syncs(DISK.slot)
        begun = syncs.counts().begun
        syncs.hang()
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(run_steps, guest, DEVICE_FOLDER, counter.path, programs.steps[half:])
            syncs.wait_begun(begun + 1, BEGIN_S)
            mover.move(vm, SAME_FILES)
            rest.result()
        self.judge(guest, counter, [first, second], programs, layout, half)

    def test_reset(self) -> None:
        """After a reset with pending flushes, those of the next kernel keep their word.

        The programs write with O_DIRECT: what is in the DIMM's memory survives a reset, and the
        next flush makes it durable.
        """
        self.dice = self.random()
        programs = BlockPrograms(self.dice, DIRECT, count=PROGRAMS)
        # Early: the next kernel makes as many flushes, and would get the results of equal tokens.
        first = programs.begins[PROGRAMS // 8]
        guest, counter, layout, shim = self.start()
        run_steps(guest, DEVICE_FOLDER, counter.path, programs.steps[:first])
        self.reset(guest)
        disk = find_namespace(guest, DISK.slot, "fsdax").disk
        use_device(guest, disk.path, DISK.slot)
        run_steps(guest, DEVICE_FOLDER, find_counter(guest).path, programs.steps[first:])
        self.judge(guest, counter, [shim], programs, layout, first)

    def reset(self, guest: Guest) -> None:
        """Reset a guest while it flushes; its next kernel has started when this returns."""
        path = find_region(guest, DISK.slot).device + "/deep_flush"
        syncs = guest.vm.syncs(DISK.slot)
        begun, printed = syncs.counts().begun, len(guest.console.lines)
        # Endless: when the kernel is reset, it has not asked for all results.
        endless = f"(while :; do echo 1 > {path}; done) < /dev/null > /dev/null 2>&1 &\n"
        guest.succeed(endless * PENDING)
        syncs.wait_begun(begun + PENDING, BEGIN_S)
        # The suite's guests end with the first reset (-no-reboot).
        guest.qmp.execute("set-action", reboot="reset")
        guest.qmp.execute("system_reset")
        ready = {"ready": re.compile("paprscm: ready")}
        console = guest.console
        if not console.wait_for(ready, timeout_s=BOOT_S, silence_s=math.inf, start=printed):
            raise ContractError(f"the guest did not start again within {BOOT_S:g} s")
