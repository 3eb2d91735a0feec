# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel under test: obtain it, rewrite instructions that TCG lacks, pack its modules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paprscm import log
from paprscm.build import initramfs, kbuild, kernel_files, tcg_fixup, vmlinux
from paprscm.build.vmlinux import Kernel
from paprscm.debian.packages import Archive
from paprscm.debian.rootfs import Userland
from paprscm.emulator import binary, instructions
from paprscm.emulator.binary import Qemu
from paprscm.errors import ConfigError
from paprscm.host.cache import Cache
from paprscm.settings import OWN_KERNELS, Settings, expanded


@dataclass(frozen=True)
class UnderTest:
    """The kernel under test.

    Attributes:
        kernel: facts about its vmlinux.
        modules: a folder with lib/modules/RELEASE, or None.
        source: package and version of a source that was built here; "" for a user's own kernel.
    """

    kernel: Kernel
    modules: Path | None
    source: str


def obtain(archive: Archive, settings: Settings, proceed: Callable[[], None]) -> UnderTest:
    """Build, find or unpack the kernel under test.

    Args:
        archive: packages and cache for the default kernels.
        settings: kernel, modules and kernel_source.
        proceed: called several times a second during a build; cancels it by raising.

    Raises:
        ConfigError: modules= is set without kernel=, or the kernel does not fit the suite.
    """
    if settings.kernel in OWN_KERNELS:
        if settings.modules is not None:
            raise ConfigError(
                f"modules= without kernel=: the {settings.kernel} kernel needs no modules",
                hint="set kernel= to the vmlinux of the same build",
            )
        built = kbuild.build_default(archive, settings, proceed=proceed)
        package = settings.kernel_source.partition("=")[0]
        return UnderTest(vmlinux.inspect(built.vmlinux), None, f"{package} {built.source}")
    path = expanded(Path(settings.kernel)).absolute()
    files = kernel_files.open_kernel(archive.cache, path, settings.modules)
    kernel = vmlinux.inspect(files.vmlinux)
    if kernel.config is None and files.config is not None:
        kernel = vmlinux.configured(kernel, vmlinux.read_config(files.config))
    if files.modules is not None:
        kernel = initramfs.with_config(kernel, files.modules)
    vmlinux.require_usable(kernel, has_modules=files.modules is not None)
    return UnderTest(kernel, files.modules, "")


def instructions_of(cache: Cache, qemu: Qemu, cpu: str) -> Mapping[str, bool]:
    """Return which instructions this QEMU executes under TCG; probed once per binary."""
    name = f"instructions-{cpu}-{instructions.probe_digest()}"
    answer = binary.remember(
        cache, qemu, name, lambda: instructions.probe(qemu.argv_prefix, cpu=cpu)
    )
    return {str(name): bool(executed) for name, executed in answer.items()}


def fix(cache: Cache, kernel: Kernel, executes: Mapping[str, bool]) -> tuple[Path, int]:
    """Return a kernel that this QEMU can execute, and the number of rewritten instructions."""
    lacking = tcg_fixup.missing_instructions(executes)
    if not lacking:
        return kernel.path, 0

    def build(folder: Path) -> None:
        report = tcg_fixup.fix_file(kernel.path, folder / "vmlinux", executes)
        log.logger.info("instruction fix-up for TCG: %s", report)
        (folder / "sites.json").write_text(json.dumps(report.sites))

    fields = {
        "kernel": cache.identity(kernel.path),
        "release": kernel.release,
        "rewritten": " ".join(instruction.name for instruction in lacking),
    }
    entry = cache.ensure("fixed-kernel", fields, build, needs_bytes=2 * kernel.size_bytes)
    return entry.path / "vmlinux", int(json.loads((entry.path / "sites.json").read_text()))


def initrd(
    cache: Cache,
    under_test: UnderTest,
    userland: Userland,
    executes: Mapping[str, bool],
) -> Path | None:
    """Build or find the initramfs with the kernel's modules; None if it has none."""
    kernel, folder_of_modules = under_test.kernel, under_test.modules
    if folder_of_modules is None:
        return None
    files = initramfs.find_modules(kernel, folder_of_modules)
    content = "\n".join(cache.identity(path) for _name, path in sorted(files.items()))
    fields = {
        "kernel": cache.identity(kernel.path),
        "release": kernel.release,
        "modules": hashlib.sha256(content.encode()).hexdigest(),
        "rewritten": " ".join(
            instruction.name for instruction in tcg_fixup.missing_instructions(executes)
        ),
        "busybox": str(userland.versions.get("busybox-static")),
    }

    def build(folder: Path) -> None:
        report = initramfs.build_initramfs(
            kernel,
            folder_of_modules,
            userland.busybox,
            folder / "initramfs",
            executes=executes,
        )
        log.logger.info(
            "initramfs: %d modules, %d sites rewritten", len(report.modules), report.sites
        )

    return cache.ensure("initramfs", fields, build).path / "initramfs"
