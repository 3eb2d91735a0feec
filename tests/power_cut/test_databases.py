# SPDX-License-Identifier: GPL-2.0-or-later
"""Contract of databases on a DIMM that is flushed by H_SCM_FLUSH.

After a power cut of the host, a database can be opened, passes its own check, and has exactly the
transactions whose commit had returned, and perhaps the next one.

SQLite (write-ahead log with synchronous=FULL, rollback journal with EXTRA) and LMDB (write and
shared mapping) commit transactions in a guest; the images are built as in test_files.py, and
another guest mounts each, and opens the databases. The libraries are Debian's
(paprscm/power_cut/databases.py).

Sources: https://www.sqlite.org/pragma.html#pragma_synchronous, https://www.sqlite.org/wal.html,
lmdb.h.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.power_cut.campaign import (
    COUNTER,
    Campaign,
    image_count,
    is_torn,
    make_counter,
    stop_and_read,
)
from paprscm.power_cut.databases import (
    KINDS,
    Databases,
    differences,
    fetch_libraries,
    read_check,
)
from paprscm.power_cut.images import Image, write_image
from paprscm.power_cut.mounted import FOLDER, MountedImages
from paprscm.power_cut.store_log import StoreLog
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm

SIZES: dict[FsType, int] = {"ext4": SMALL, "xfs": FOR_XFS}
TRANSACTIONS = 12
"""Transactions of each database; more with many images."""
IMAGES = 12
"""Images of the default run; -p images=N is another number."""


class DatabaseCut(PaprScmTest):
    """
    Databases, and the host's power goes off.

    :avocado: tags=flush,promise
    """

    timeout = 900

    def test_ext4(self) -> None:
        """On ext4 with DAX, databases have exactly the committed transactions after a power cut.

        With -p images=N, N images are judged instead of 12, after more transactions. Controls check
        that a host that lies about its syncs is detected.

        :avocado: tags=quick
        """
        self.judge("ext4", "dax=always")

    def test_xfs(self) -> None:
        """On XFS with DAX, databases have exactly the committed transactions after a power cut."""
        self.judge("xfs", "dax=always")

    def test_ext4_page_cache(self) -> None:
        """On ext4 without DAX, databases have exactly the committed transactions after a cut."""
        self.judge("ext4", "dax=never")

    def judge(self, fstype: FsType, options: str) -> None:
        """Commit transactions, build images, and check the databases in another guest."""
        dice = self.random()
        count = image_count(str(self.params.get("images", default=IMAGES)))
        torn = is_torn(str(self.params.get("torn", default="no")))
        transactions = max(TRANSACTIONS, count // 20)
        libraries = fetch_libraries(self.settings)
        disk = PMEM_OFF.at(1, SIZES[fstype])
        log, done = self.record(disk, fstype, options, libraries, transactions)
        # The databases exist before the first transaction.
        campaign = Campaign(log, done, 1, dice, torn)
        # The images are only read: with pmem=on, their recovery needs no flushes.
        files = self.keep(replace(disk, pmem=True))
        write_image(campaign.newest, disk.slot, files.path(disk.slot))
        guest = self.boot(Machine(nvdimms=files.nvdimms()))
        mounted = MountedImages(guest, disk.slot, fstype, options)
        databases = Databases(guest, FOLDER)
        databases.install(libraries)
        command = databases.check_command()

        def judge(image: Image, done: int) -> list[str]:
            result, wrong = mounted.read(image, command)
            if result is not None:
                wrong += differences(read_check(result), done, transactions)
            return wrong

        def explain(_image: Image, done: int, _wrong: list[str]) -> str:
            return f"{done} transactions were committed"

        campaign.judge(
            self, judge, count, explain, lambda _done: KINDS, fstype=fstype, options=options
        )
        # A kernel may complain about the images of a host that lies.
        with guest.expect_messages(""):
            campaign.expect_force(self, judge)

    def record(
        self,
        disk: Nvdimm,
        fstype: FsType,
        options: str,
        libraries: list[Path],
        transactions: int,
    ) -> tuple[StoreLog, list[int]]:
        """Commit transactions; return the log, and the number of transactions at each point."""
        machine = Machine(nvdimms=(COUNTER, disk.holding(fstype)))
        shim = self.shim(log=Path(self.workdir) / "stores")
        with self.environment.guest(machine, folder=self.folder("guest"), shim=shim) as guest:
            counter = make_counter(guest)
            dax_mount(guest, disk.slot, fstype, FOLDER, options=options)
            databases = Databases(guest, FOLDER)
            databases.install(libraries)
            for kind in KINDS:
                databases.run(kind, counter.path, 0)
            guest.succeed(f"sync -f {FOLDER}")
            for kind in KINDS:
                databases.run(kind, counter.path, transactions)
            log = stop_and_read(guest, [shim], [COUNTER.slot, disk.slot])
        return log, counter.at_points(log)
