# SPDX-License-Identifier: GPL-2.0-or-later
"""All that guests are made of, from the settings: QEMU, kernel, userland; built where missing."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from paprscm import log
from paprscm.build import rootfs
from paprscm.build.debian import Archive, Download, suites
from paprscm.build.rootfs import Userland
from paprscm.build.vmlinux import Kernel
from paprscm.errors import ConfigError
from paprscm.guest import kernel_image
from paprscm.guest.dimm_content import DimmContents
from paprscm.guest.guest import Equipment, Guest
from paprscm.guest.make_snapshot import Recipe, ensure_snapshot, find_snapshot
from paprscm.guest.report import ProbeError
from paprscm.guest.snapshot import NotRestoredError, Snapshot
from paprscm.guest.ssh import TimedOutError
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.settings import Settings
from paprscm.vm import binary
from paprscm.vm.argv import Payload
from paprscm.vm.binary import Qemu
from paprscm.vm.machine import Machine, board_of
from paprscm.vm.sync_shim import Shim

# Everything that the suite's tests call in the guest must start there.
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
        settings: what the user chose.
        qemu: the QEMU under test.
        kernel: the kernel under test, as it was given or built.
        kernel_source: package and version of the source that the kernel was built from here; "" for
            a user's kernel.
        userland: the Debian suite of the root file system, and its C library's version.
        fixed_sites: how many instructions were rewritten for TCG.
        equipment: the same, as a guest takes it.
        snapshot: where guests begin that do not boot; None: all of them boot.
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
    ) -> Iterator[Guest]:
        """A running guest: restored from the snapshot where that can be, else booted.

        Args:
            machine: the machine that the guest runs on.
            folder: where its logs go.
            cold: boot it: its DIMMs are there when the kernel starts.
            allowed: kernel messages that are expected (regular expressions).
            mirror: where to write what its console prints.
            shim: goes into its QEMU, to watch and to disturb the syncs of the backing files.
        """
        patterns = list(allowed)

        def start(begin: Snapshot | None) -> Guest:
            return Guest(
                self.equipment,
                machine,
                folder=folder,
                allowed=patterns,
                mirror=mirror,
                snapshot=begin,
                shim=shim,
            )

        begin = self.snapshot
        if cold or begin is None or not begin.fits(machine, machine.board(self.equipment.board)):
            begin = None
        with contextlib.ExitStack() as stack:
            try:
                guest = stack.enter_context(start(begin))
            except NotRestoredError as error:
                assert begin is not None  # noqa: S101
                log.logger.info("%s; it is booted, and the snapshot dropped", error.message)
                Cache(self.settings.cache_dir).remove(begin.folder)
                guest = stack.enter_context(start(None))
            yield guest

    def describe(self) -> dict[str, str]:
        """The dimensions of a result, by name."""
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


def prepare(settings: Settings, *, make_snapshot: bool = False) -> Environment:
    """All that guests need, as the settings ask for it; built or fetched where it is missing.

    Args:
        settings: what the user chose.
        make_snapshot: make one now if there is none; that takes as long as some eight tests save.

    Raises:
        Error: something cannot be had; the message says what, the hint how.
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
        # While the packages are downloaded the kernel is compiled; no package, no kernel needed.
        under_test, source = kernel_image.obtain(archive, settings, obtaining.check)
        obtained = obtaining.result()
    executes = {} if board.accel == "kvm" else kernel_image.instructions_of(cache, qemu, board.cpu)
    vmlinux, sites = kernel_image.fix(cache, under_test, executes)

    def equipment(land: Userland, initrd: Path | None) -> Equipment:
        return Equipment(
            settings=settings,
            qemu=qemu.argv_prefix,
            payload=Payload(
                kernel=vmlinux,
                disk=land.disk,
                initrd=initrd,
                words=under_test.words,
            ),
            client_key=land.client_key,
            host_key=land.host_key_public,
            board=board,
            contents=DimmContents(
                cache=cache,
                made_by={
                    "kernel": cache.identity(under_test.path),
                    "userland": cache.identity(land.disk),
                    "qemu": qemu.key,
                    "cpu": f"{board.cpu} {board.accel}",
                },
            ),
        )

    def environment(land: Userland) -> Environment:
        initrd = kernel_image.initrd(cache, settings, under_test, land, executes)
        return Environment(
            settings=settings,
            qemu=qemu,
            kernel=under_test,
            kernel_source=source,
            userland=f"Debian {land.suite}, libc6 {land.versions.get('libc6')}",
            fixed_sites=sites,
            equipment=equipment(land, initrd),
        )

    def boot_test(land: Userland) -> None:
        made_of = environment(land)
        with (
            tempfile.TemporaryDirectory(prefix="paprscm-boot-test-") as folder,
            Guest(made_of.equipment, Machine(), folder=Path(folder)) as guest,
        ):
            guest.succeed(_BOOT_TEST)

    if isinstance(obtained, Download):
        obtained = rootfs.build_rootfs(cache, obtained, boot_test=boot_test)
    made = environment(obtained)
    if settings.start == "cold":
        return made
    recipe = Recipe(cache=cache, qemu=qemu, equipment=made.equipment)
    try:
        outcome = ensure_snapshot(recipe) if make_snapshot else find_snapshot(recipe)
    except (TimedOutError, ProbeError) as error:
        why = error.message.splitlines()[0]
        log.logger.warning("no snapshot this time, so guests are booted: %s", why)
        return made
    if outcome is not None and outcome.snapshot is None:
        log.logger.info("guests are booted, restoring them does not work: %s", outcome.why)
    return dataclasses.replace(made, snapshot=outcome.snapshot if outcome else None)
