# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs of a modular kernel: loads modules, then switches to the root disk."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from paprscm.build.compression import uncompressed
from paprscm.build.tcg_fixup import fix_file, is_signed
from paprscm.build.vmlinux import UNKNOWN, Kernel, configured, embedded_config
from paprscm.debian.toolchain import PREFIX
from paprscm.errors import ConfigError
from paprscm.host.process import run

# Module names and their options, in load order. Only existing modules and their dependencies are
# loaded. The drivers of the disk come first, so that a kernel that hangs in the devices under test
# already has its root disk.
MODULES: Mapping[str, str] = {
    "virtio_pci": "VIRTIO_PCI",
    "virtio_console": "VIRTIO_CONSOLE",
    "virtio_blk": "VIRTIO_BLK",
    "virtio_net": "VIRTIO_NET",
    "virtio_rng": "HW_RANDOM_VIRTIO",
    "ext4": "EXT4_FS",
    "xfs": "XFS_FS",
    "dm_mod": "BLK_DEV_DM",
    "libnvdimm": "LIBNVDIMM",
    "nd_btt": "ND_BTT",
    "nd_pmem": "BLK_DEV_PMEM",
    "dax": "DAX",
    "device_dax": "DEV_DAX",
    "dax_pmem": "DEV_DAX_PMEM",
    "kmem": "DEV_DAX_KMEM",
    "papr_scm": "PAPR_SCM",
}
# Without these no test is possible.
_REQUIRED = frozenset(("virtio_pci", "virtio_blk", "ext4", "papr_scm", "nd_pmem"))

_SUFFIX = re.compile(r"\.ko(\.gz|\.xz|\.zst)?$")
_STRIP = f"{PREFIX}strip"
_ROOT_LIMIT_S = 10

# The root disk is mounted read-only, without /proc and /sys: its own /init mounts those.
_INIT = """\
#!/bin/busybox sh
# Load the modules, mount the root disk, and become its /init.
b=/bin/busybox
$b mount -t devtmpfs devtmpfs /dev
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys

while read -r file; do
	$b insmod "/modules/$file" || echo "initramfs: cannot load $file"
done < /modules/order

root=/dev/vda
for word in $($b cat /proc/cmdline); do
	case $word in
	root=*) root=${{word#root=}} ;;
	esac
done
tries=0
until [ -b "$root" ]; do
	tries=$((tries + 1))
	if [ $tries -gt {tries} ]; then
		echo "initramfs: no root disk $root after {limit_s} s"
		exit 1
	fi
	$b usleep 50000
done
$b mount -o ro "$root" /root || exit 1
$b mount -o move /dev /root/dev
$b umount /sys
$b umount /proc
exec $b switch_root /root /init
"""


@dataclass(frozen=True)
class Initramfs:
    """An initramfs and its contents.

    Attributes:
        path: the cpio archive.
        modules: names in load order.
        sites: number of instruction words that the TCG fix-up changed in them.
    """

    path: Path
    modules: tuple[str, ...]
    sites: int


def build_initramfs(
    kernel: Kernel,
    modules: Path,
    busybox: Path,
    target: Path,
    *,
    executes: Mapping[str, bool],
) -> Initramfs:
    """Write an initramfs that loads the kernel's modules and switches to the root disk.

    Args:
        kernel: the kernel that will load them.
        modules: INSTALL_MOD_PATH of `make modules_install`.
        busybox: a static ppc64el busybox.
        target: the archive to write.
        executes: result of vm.instructions.probe; `{}`: rewrite nothing.

    Raises:
        ConfigError: the modules belong to another kernel; a required one is missing; one is
            damaged; or one needs a fix-up, but the kernel enforces signatures.
    """
    available = find_modules(kernel, modules)
    missing = [
        name
        for name, option in MODULES.items()
        if name in _REQUIRED and kernel.option(option) == "m" and name not in available
    ]
    if kernel.papr_scm == UNKNOWN and "papr_scm" not in available:
        missing.append("papr_scm")
    if missing:
        raise ConfigError(
            f"{modules} lacks {', '.join(missing)}, which the kernel {kernel.release} has as "
            + ("a module" if len(missing) == 1 else "modules"),
            hint="run `make modules_install INSTALL_MOD_PATH=...` of the same build",
        )
    order = load_order([*MODULES], available, release=kernel.release)
    files: dict[str, tuple[int, bytes]] = {}
    sites = 0
    with tempfile.TemporaryDirectory(prefix="paprscm-modules-") as folder:
        copies, unsigned = [], []
        for position, name in enumerate(order):
            copy = Path(folder) / f"{position:02}-{name}.ko"
            report = fix_file(available[name], copy, executes)
            sites += report.sites
            if report.signature_dropped and kernel.option("MODULE_SIG_FORCE") == "y":
                raise ConfigError(
                    f"{available[name]} has instructions that this QEMU cannot execute "
                    f"({', '.join(report.instructions)}); rewritten, it loses its signature, and "
                    f"the kernel {kernel.release} has CONFIG_MODULE_SIG_FORCE",
                    hint=f"build {name} in, or the kernel without CONFIG_MODULE_SIG_FORCE",
                )
            copies.append(copy)
            if not is_signed(copy):
                unsigned.append(copy)
        if unsigned and shutil.which(_STRIP):
            # A distribution's xfs.ko has 30 MB of debug information. strip would drop a signature,
            # which the kernel may enforce (CONFIG_MODULE_SIG_FORCE, lockdown).
            run([_STRIP, "--strip-debug", *unsigned])
        for copy in copies:
            files[f"modules/{copy.name}"] = (0o100644, copy.read_bytes())
        names = "".join(f"{copy.name}\n" for copy in copies)
    files["modules/order"] = (0o100644, names.encode())
    script = _INIT.format(tries=_ROOT_LIMIT_S * 20, limit_s=_ROOT_LIMIT_S)
    files["init"] = (0o100755, script.encode())
    files["bin/busybox"] = (0o100755, busybox.read_bytes())
    write_cpio(target, files, folders=("dev", "proc", "sys", "root"))
    return Initramfs(target, tuple(order), sites)


def with_config(kernel: Kernel, modules: Path) -> Kernel:
    """The kernel with the configuration of its configs.ko, if CONFIG_IKCONFIG is a module.

    Raises:
        ConfigError: the modules belong to another kernel.
    """
    path = find_modules(kernel, modules).get("configs")
    if kernel.config is not None or path is None:
        return kernel
    data = uncompressed(path)
    config = embedded_config(data, [(0, len(data))])
    return kernel if config is None else configured(kernel, config)


def find_modules(kernel: Kernel, modules: Path) -> dict[str, Path]:
    """The modules of `kernel` below a modules_install folder, by name ("nd_pmem").

    Raises:
        ConfigError: there are no modules, or only those of another kernel.
    """
    base = modules / "lib" / "modules"
    try:
        versions = sorted(path.name for path in base.iterdir() if path.is_dir())
    except OSError as error:
        raise ConfigError(
            f"modules={modules} is not the INSTALL_MOD_PATH of modules_install: "
            f"lib/modules cannot be read ({error.strerror})",
            hint="give the INSTALL_MOD_PATH of `make modules_install`",
        ) from error
    if kernel.release not in versions:
        installed = ", ".join(versions) or "none"
        raise ConfigError(
            f"the modules in {modules} are for {installed}, the kernel is {kernel.release}",
            hint="install the modules of the same build as the vmlinux",
        )
    return {
        _SUFFIX.sub("", path.name).replace("-", "_"): path
        for path in sorted((base / kernel.release).rglob("*.ko*"))
        if _SUFFIX.search(path.name) and path.is_file()
    }


def load_order(names: Sequence[str], modules: Mapping[str, Path], *, release: str) -> list[str]:
    """Names of modules, each after its dependencies.

    The dependencies are read from the modules (.modinfo: depends, and "pre" of softdep), not from
    modules.dep, which may be outdated.

    Args:
        names: modules to load; names that are not in `modules` are assumed to be built in.
        modules: paths by name, from find_modules.
        release: the kernel's release; each module must match it.

    Raises:
        ConfigError: a module is damaged, or was built for another kernel.
    """
    order: list[str] = []
    visited: set[str] = set()
    providers = _aliases(modules)

    def add(name: str) -> None:
        if name in visited or name not in modules:
            return
        visited.add(name)
        info = modinfo(modules[name])
        built_for = info.get("vermagic", [""])[0].split(" ")[0]
        if built_for != release:
            raise ConfigError(
                f"{modules[name]} was built for {built_for or 'no known kernel'}, "
                f"the kernel is {release}",
                hint="install the modules of the same build as the vmlinux",
            )
        for dependency in _softdeps(info):
            add(providers.get(dependency, dependency.replace("-", "_")))
        for dependency in info.get("depends", [""])[0].split(","):
            add(dependency.replace("-", "_"))
        order.append(name)

    for name in names:
        add(name)
    return order


def modinfo(path: Path) -> dict[str, list[str]]:
    """The fields of a module's .modinfo section, each with all its values.

    Raises:
        ConfigError: it is not a module.
    """
    try:
        section = ELFFile(io.BytesIO(uncompressed(path))).get_section_by_name(".modinfo")
    except (ELFError, struct.error, ValueError) as error:
        raise ConfigError(f"{path} is a damaged module: {error}") from error
    if section is None:
        raise ConfigError(f"{path} is not a kernel module: it has no .modinfo")
    info: dict[str, list[str]] = {}
    for field in section.data().split(b"\0"):
        name, equals, value = field.decode(errors="replace").partition("=")
        if equals:
            info.setdefault(name, []).append(value)
    return info


def _softdeps(info: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules to load before: A and B of "pre: A B post: C"."""
    names: list[str] = []
    for value in info.get("softdep", ()):
        before = re.search(r"\bpre:((?:\s+[^\s:]+(?=\s|$))*)", value)
        names += before[1].split() if before else []
    return names


def _aliases(modules: Mapping[str, Path]) -> dict[str, str]:
    """Module of each algorithm that others depend on: "crc32c" -> "crc32c_generic".

    Only generic implementations: they run on every CPU model, and each exists once.
    """
    return {name.removesuffix("_generic"): name for name in modules if name.endswith("_generic")}


def write_cpio(
    target: Path, files: Mapping[str, tuple[int, bytes]], *, folders: Sequence[str] = ()
) -> None:
    """Write a "newc" cpio archive, with root as owner and zero times.

    The format is Documentation/driver-api/early-userspace/buffer-format.rst.

    Args:
        target: the archive.
        files: mode (with file type) and content by path; their folders are added.
        folders: additional folders.
    """
    parents = {str(p) for name in files for p in Path(name).parents if str(p) != "."}
    entries: list[tuple[str, int, bytes]] = [
        (name, stat.S_IFDIR | 0o755, b"") for name in sorted(parents | set(folders))
    ]
    entries += [(name, mode, content) for name, (mode, content) in files.items()]
    with target.open("wb") as archive:
        for number, (name, mode, content) in enumerate(entries, start=1):
            _write_entry(archive, number, name, mode, content)
        # /init's standard input and output, before it has mounted anything.
        _write_entry(
            archive, len(entries) + 1, "dev/console", stat.S_IFCHR | 0o600, b"", rdev=(5, 1)
        )
        _write_entry(archive, 0, "TRAILER!!!", 0, b"")
        archive.flush()
        os.fsync(archive.fileno())


def _write_entry(
    archive: io.BufferedWriter,
    number: int,
    name: str,
    mode: int,
    content: bytes,
    *,
    rdev: tuple[int, int] = (0, 0),
) -> None:
    raw = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
    # namesize, check
    numbers = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *rdev, len(raw), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in numbers)
    archive.write(header + raw + bytes(-(len(header) + len(raw)) % 4))
    archive.write(content + bytes(-len(content) % 4))
