# SPDX-License-Identifier: GPL-2.0-or-later
"""Environment of guests: QEMU, kernel, userland and snapshot, built or fetched if missing."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from paprscm import log
from paprscm.build.vmlinux import Kernel
from paprscm.channel.command import TimedOutError
from paprscm.debian import rootfs
from paprscm.debian.packages import Archive, Download, suites
from paprscm.debian.rootfs import Userland
from paprscm.emulator import binary
from paprscm.emulator.binary import Qemu
from paprscm.errors import ConfigError
from paprscm.guest import kernel_image
from paprscm.guest.dimm_content import DimmContents
from paprscm.guest.equipment import Equipment
from paprscm.guest.guest import Guest
from paprscm.guest.make_snapshot import Recipe, ensure_snapshot, find_snapshot
from paprscm.guest.report import ProbeError
from paprscm.guest.snapshot import NotRestoredError, Snapshot
from paprscm.guest.tools import ToolBinaries, tools_digest
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.results import record
from paprscm.settings import Settings, changed
from paprscm.vm.argv import Payload
from paprscm.vm.machine import Machine, board_of
from paprscm.vm.sync_shim import Shim

# Every program that tests run in the guest must start there.
_BOOT_TEST = """
set -e
for tool in gcc make ndctl daxctl mkfs.xfs mkfs.ext4 mount kmod fio strace busybox; do
	command -v $tool > /dev/null || { echo "$tool is missing" >&2; exit 1; }
done
echo 'int main(void) { return 0; }' | gcc -x c - -o /tmp/probe && /tmp/probe
ndctl list && mkfs.xfs -V && strace -V > /dev/null
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """QEMU, kernel, userland and snapshot of the guests of one run.

    Attributes:
        settings: the user's settings.
        qemu: the QEMU under test.
        kernel: the kernel under test, before instructions are rewritten.
        kernel_source: package and version of the source of a kernel that was built here; "" for a
            user's kernel.
        userland: the Debian suite of the root file system, and its C library's version.
        fixed_sites: number of instructions that were rewritten for TCG.
        equipment: the parts that all guests have in common.
        snapshot: initial state of guests that are restored; None: all guests boot.
    """

    settings: Settings
    qemu: Qemu
    kernel: Kernel
    kernel_source: str
    userland: str
    fixed_sites: int
    equipment: Equipment
    snapshot: Snapshot | None = None

    @contextlib.contextmanager
    def guest(
        self,
        machine: Machine,
        *,
        folder: Path,
        cold: bool = False,
        allowed: Iterable[str] = (),
        mirror: TextIO | None = None,
        shim: Shim | None = None,
        migrates: bool = False,
        during_boot: Callable[[Guest], object] | None = None,
    ) -> Iterator[Guest]:
        """Run a guest: restored from the snapshot if the machine fits it, else booted.

        Args:
            machine: the guest's machine.
            folder: folder for its logs.
            cold: always boot, so that its DIMMs are present when the kernel starts.
            allowed: expected kernel messages (regular expressions).
            mirror: stream that receives a copy of its console output.
            shim: preloaded into its QEMU, to record and disturb the syncs of the backing files.
            migrates, during_boot: as for Guest; a guest with `during_boot` boots.
        """
        patterns = list(allowed)

        def start(snapshot: Snapshot | None) -> Guest:
            return Guest(
                self.equipment,
                machine,
                folder=folder,
                allowed=patterns,
                mirror=mirror,
                snapshot=snapshot,
                shim=shim,
                migrates=migrates,
                during_boot=during_boot,
            )

        snapshot = self.snapshot
        board = machine.board(self.equipment.board)
        if cold or during_boot or snapshot is None or not snapshot.fits(machine, board):
            snapshot = None
        with contextlib.ExitStack() as stack:
            try:
                guest = stack.enter_context(start(snapshot))
            except NotRestoredError as error:
                assert snapshot is not None  # noqa: S101
                log.logger.info("%s; booting it and removing the snapshot", error.message)
                Cache(self.settings.cache_dir).remove(snapshot.folder)
                guest = stack.enter_context(start(None))
            yield guest

    def describe(self) -> dict[str, str]:
        """Return the dimensions of a result, by name."""
        board = self.equipment.board
        return {
            "qemu": self.qemu.version_text,
            "qemu_path": str(self.qemu.path),
            "kernel": self.kernel.release,
            "kernel_path": str(self.kernel.path),
            "kernel_source": self.kernel_source or "none",
            "userland": self.userland,
            "page_size": str(self.kernel.page_size),
            **{name: str(value) for name, value in dataclasses.asdict(board).items()},
            "fixed_sites": str(self.fixed_sites),
            "snapshot": self.snapshot.folder.name if self.snapshot else "none",
        }

    def recorded(self) -> record.Environment:
        """The environment in the record of a job."""
        board = self.equipment.board
        kernel = record.Kernel(
            release=self.kernel.release,
            path=str(self.kernel.path),
            source=self.kernel_source,
            build_id=self.kernel.build_id,
            config_sha256=self.kernel.config_sha256,
            page_size_bytes=self.kernel.page_size,
            mmu=self.kernel.mmu(board.cpu),
            fixed_sites=self.fixed_sites,
        )
        return record.Environment(
            qemu=binary.recorded(Cache(self.settings.cache_dir), self.qemu, self.settings.qemu),
            kernel=kernel,
            userland=self.userland,
            machine=self.qemu.machine,
            snapshot=self.snapshot.folder.name if self.snapshot else None,
            settings=changed(self.settings),
            **dataclasses.asdict(board),
        )


def prepare(settings: Settings, *, make_snapshot: bool = False) -> Environment:
    """Build or fetch everything that guests need, according to the settings.

    Args:
        settings: the user's settings.
        make_snapshot: make a snapshot if there is none; this costs the time that about eight tests
            save.

    Raises:
        Error: a part is not available; the message names it, the hint tells how to get it.
    """
    archive = Archive.of(settings)
    cache = archive.cache
    qemu = binary.resolve(archive, settings.qemu)
    binary.require_guests(qemu)
    board = board_of(settings, qemu)
    if board.firmware == "vof" and not qemu.has_vof:
        raise ConfigError(f"{qemu.path} has no x-vof machine option", hint="set firmware=slof")
    with process.run_in_background(
        lambda proceed: rootfs.obtain_userland(
            archive, suites(settings.userland_suite), proceed=proceed
        )
    ) as obtaining:
        # Compile the kernel while packages are downloaded; a failed download cancels the build.
        kernel = kernel_image.obtain(archive, settings, obtaining.check)
        under_test = kernel.kernel
        obtained = obtaining.result()
    executes = {} if board.accel == "kvm" else kernel_image.instructions_of(cache, qemu, board.cpu)
    vmlinux, sites = kernel_image.fix(cache, under_test, executes)

    def equipment(userland: Userland, initrd: Path | None) -> Equipment:
        programs = {
            "userland": cache.identity(userland.disk),
            "qemu": qemu.key,
            "cpu": f"{board.cpu} {board.accel}",
        }
        return Equipment(
            settings=settings,
            qemu=qemu.argv_prefix,
            payload=Payload(
                kernel=vmlinux,
                disk=userland.disk,
                initrd=initrd,
                words=under_test.words,
            ),
            client_key=userland.client_key,
            host_key=userland.host_key_public,
            board=board,
            tools=ToolBinaries(cache=cache, inputs=programs),
            contents=DimmContents(
                cache=cache,
                inputs={
                    **programs,
                    "kernel": cache.identity(under_test.path),
                    "maker": tools_digest("pmem"),
                },
            ),
        )

    def assemble(userland: Userland) -> Environment:
        initrd = kernel_image.initrd(cache, kernel, userland, executes)
        return Environment(
            settings=settings,
            qemu=qemu,
            kernel=under_test,
            kernel_source=kernel.source,
            userland=f"Debian {userland.suite}, libc6 {userland.versions.get('libc6')}",
            fixed_sites=sites,
            equipment=equipment(userland, initrd),
        )

    def boot_test(userland: Userland) -> None:
        parts = assemble(userland).equipment
        with (
            tempfile.TemporaryDirectory(prefix="paprscm-boot-test-") as folder,
            Guest(parts, Machine(), folder=Path(folder)) as guest,
        ):
            guest.succeed(_BOOT_TEST)

    if isinstance(obtained, Download):
        obtained = rootfs.build_rootfs(cache, obtained, boot_test=boot_test)
    environment = assemble(obtained)
    if settings.start == "cold":
        return environment
    recipe = Recipe(cache=cache, qemu=qemu, equipment=environment.equipment)
    try:
        outcome = ensure_snapshot(recipe) if make_snapshot else find_snapshot(recipe)
    except (TimedOutError, ProbeError) as error:
        reason = error.message.splitlines()[0]
        log.logger.warning("no snapshot in this run, so guests are booted: %s", reason)
        return environment
    if outcome is not None and outcome.snapshot is None:
        log.logger.info(
            "guests are booted, because restored guests do not work: %s", outcome.reason
        )
    return dataclasses.replace(environment, snapshot=outcome.snapshot if outcome else None)
