# SPDX-License-Identifier: GPL-2.0-or-later
"""All that guests are made of, from the settings: QEMU, kernel, userland; built where missing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paprscm import isa, kbuild, kernel, log, modules, qemu, userland
from paprscm.cache import Cache
from paprscm.errors import ConfigError
from paprscm.guest import Equipment, Guest
from paprscm.kernel import Kernel
from paprscm.machine import Machine, Payload
from paprscm.qemu import Qemu
from paprscm.settings import Settings
from paprscm.userland import Userland

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
    """What the guests of one run have in common.

    Attributes:
        settings: what the user chose.
        qemu: the QEMU under test.
        kernel: the kernel under test, as it was given or built.
        accel: "tcg" or "kvm".
        cpu: the -cpu model.
        fixed_sites: how many instructions were rewritten for TCG.
        equipment: the same, as a guest takes it.
    """

    settings: Settings
    qemu: Qemu
    kernel: Kernel
    accel: str
    cpu: str
    fixed_sites: int
    equipment: Equipment

    def furnish(self, machine: Machine) -> Machine:
        """The machine with CPU, memory, firmware and accelerator from the settings."""
        chosen = self.settings
        return dataclasses.replace(
            machine,
            smp=chosen.smp,
            memory_mib=chosen.memory_mib,
            cpu=self.cpu,
            firmware=chosen.firmware,
            accel=self.accel,
        )

    def describe(self) -> dict[str, str]:
        """The dimensions of a result, by name."""
        return {
            "qemu": self.qemu.version_text,
            "qemu_path": str(self.qemu.path),
            "kernel": self.kernel.release,
            "kernel_path": str(self.kernel.path),
            "page_size": str(self.kernel.page_size),
            "accel": self.accel,
            "cpu": self.cpu,
            "smp": str(self.settings.smp),
            "memory_mib": str(self.settings.memory_mib),
            "firmware": self.settings.firmware,
            "fixed_sites": str(self.fixed_sites),
        }


def prepare(settings: Settings) -> Environment:
    """All that guests need, as the settings ask for it; built or fetched where it is missing.

    Args:
        settings: what the user chose.

    Raises:
        Error: something cannot be had; the message says what, the hint how.
    """
    cache = Cache(settings.cache_dir)
    binary = qemu.resolve(cache, settings.qemu, mirror=settings.mirror)
    accel = qemu.accel(settings.accel, binary)
    if settings.firmware == "vof" and not binary.has_vof:
        raise ConfigError(f"{binary.path} has no x-vof machine option", hint="set firmware=slof")
    cpu = settings.cpu
    if cpu == "auto":
        cpu = "host" if accel == "kvm" else "POWER9"
    under_test = _kernel(cache, settings)
    executes = {} if accel == "kvm" else _executes(cache, binary, cpu)
    vmlinux, sites = _fixed(cache, under_test, executes)

    def equipment(land: Userland, initrd: Path | None) -> Equipment:
        return Equipment(
            settings=settings,
            qemu=binary.argv_prefix,
            payload=Payload(kernel=vmlinux, disk=land.disk, initrd=initrd),
            client_key=land.client_key,
            host_key=land.host_key_public,
        )

    def environment(land: Userland) -> Environment:
        initrd = _initramfs(cache, settings, under_test, land, executes)
        return Environment(
            settings=settings,
            qemu=binary,
            kernel=under_test,
            accel=accel,
            cpu=cpu,
            fixed_sites=sites,
            equipment=equipment(land, initrd),
        )

    def boot_test(land: Userland) -> None:
        made_of = environment(land)
        with (
            tempfile.TemporaryDirectory(prefix="paprscm-boot-test-") as folder,
            Guest(made_of.equipment, made_of.furnish(Machine()), folder=Path(folder)) as guest,
        ):
            guest.succeed(_BOOT_TEST)

    return environment(
        userland.ensure(cache, suite=settings.suite, mirror=settings.mirror, boot_test=boot_test)
    )


def _kernel(cache: Cache, settings: Settings) -> Kernel:
    if settings.kernel == "default":
        if settings.modules is not None:
            raise ConfigError(
                "modules= without kernel=: the default kernel needs none",
                hint="give the vmlinux that they belong to",
            )
        built = kbuild.build_default(cache, settings)
        return kernel.inspect(built.vmlinux)
    found = kernel.inspect(Path(settings.kernel).expanduser().absolute())
    kernel.check(found, has_modules=settings.modules is not None)
    return found


def _executes(cache: Cache, binary: Qemu, cpu: str) -> Mapping[str, bool]:
    """What the TCG of this very binary can execute; asked of it once."""
    name = f"instructions-{cpu}-{isa.probe_digest()}"
    answer = qemu.remember(cache, binary, name, lambda: isa.probe(binary.argv_prefix, cpu=cpu))
    return {str(name): bool(able) for name, able in answer.items()}


def _identity(path: Path) -> str:
    info = path.stat()
    return f"{path.resolve()} {info.st_size} {info.st_mtime_ns}"


def _fixed(cache: Cache, found: Kernel, executes: Mapping[str, bool]) -> tuple[Path, int]:
    """The kernel as this QEMU can execute it, and how many instructions had to be rewritten."""
    lacking = isa.missing(executes)
    if not lacking:
        return found.path, 0

    def build(folder: Path) -> None:
        report = isa.fix_file(found.path, folder / "vmlinux", executes)
        log.logger.info("instruction fix-up for TCG: %s", report)
        (folder / "sites.json").write_text(json.dumps(report.sites))

    fields = {
        "kernel": _identity(found.path),
        "release": found.release,
        "rewritten": " ".join(instruction.name for instruction in lacking),
    }
    entry = cache.ensure("fixed-kernel", fields, build, needs_bytes=2 * found.size_bytes)
    return entry.path / "vmlinux", int(json.loads((entry.path / "sites.json").read_text()))


def _initramfs(
    cache: Cache,
    settings: Settings,
    found: Kernel,
    land: Userland,
    executes: Mapping[str, bool],
) -> Path | None:
    """The initramfs with the kernel's modules, if it has any."""
    folder_of_modules = settings.modules
    if folder_of_modules is None:
        return None
    files = modules.find_modules(found, folder_of_modules)
    content = "\n".join(_identity(path) for _name, path in sorted(files.items()))
    fields = {
        "kernel": _identity(found.path),
        "release": found.release,
        "modules": hashlib.sha256(content.encode()).hexdigest(),
        "rewritten": " ".join(instruction.name for instruction in isa.missing(executes)),
        "busybox": str(land.versions.get("busybox-static")),
    }

    def build(folder: Path) -> None:
        made = modules.build_initramfs(
            found,
            folder_of_modules,
            land.busybox,
            folder / "initramfs",
            executes=executes,
        )
        log.logger.info("initramfs: %d modules, %d sites rewritten", len(made.modules), made.sites)

    return cache.ensure("initramfs", fields, build).path / "initramfs"
