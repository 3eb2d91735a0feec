# SPDX-License-Identifier: GPL-2.0-or-later
"""What users have as a kernel: a vmlinux, compressed or in a zImage, packages, archives."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import Section

from paprscm.build.compression import is_compressed, uncompressed
from paprscm.debian.packages import unpack_package
from paprscm.errors import ConfigError
from paprscm.host.cache import Cache
from paprscm.log import step

KIND = "own-kernel"
"""Kind of the cache entries with unpacked kernels and modules."""

# arch/powerpc/boot/wrapper puts the kernel, usually compressed, into ".kernel:vmlinux.strip".
_WRAPPED = ".kernel:"
_PACKAGE = b"!<arch>\ndebian-binary"
_TAR_MAGIC = slice(257, 262)
# Compressed wrapper, wrapped kernel, compressed kernel.
_LAYERS = 4


@dataclass(frozen=True)
class KernelFiles:
    """The files of one kernel.

    Attributes:
        vmlinux: the ELF file; other files are left to vmlinux.inspect() to refuse.
        modules: a folder with lib/modules/RELEASE; None if there are no modules.
        config: the configuration that a package installs beside its kernel, or None.
    """

    vmlinux: Path
    modules: Path | None
    config: Path | None = None


def open_kernel(cache: Cache, kernel: Path, modules: Path | None) -> KernelFiles:
    """The vmlinux and modules in what the user gave; unpacked once, into the cache.

    Args:
        cache: for the unpacked files, by the content of what they were in.
        kernel: a vmlinux, also compressed (.gz, .xz, .zst); a zImage; a .deb of `make bindeb-pkg`
            or a distribution; or a tar archive of `make tar-pkg`.
        modules: an INSTALL_MOD_PATH, a tar archive of it, or a .deb; None: those in `kernel`.

    Raises:
        ConfigError: a package has no kernel or several, or a file is damaged.
        HostError: no space is left, or a tool is missing.
    """
    files = _open(cache, kernel, _fill_kernel)
    if modules is None:
        return files
    if not modules.is_file():
        return KernelFiles(files.vmlinux, modules, files.config)
    packed = _open(cache, modules, _fill_modules)
    if packed.modules is None:
        raise ConfigError(
            f"modules={modules} holds no lib/modules",
            hint="give the INSTALL_MOD_PATH of `make modules_install`, or an archive of it",
        )
    return KernelFiles(files.vmlinux, packed.modules, files.config or packed.config)


def _open(cache: Cache, path: Path, fill: Callable[[Path, Path], None]) -> KernelFiles:
    if not path.is_file() or not _needs_unpacking(path):
        return KernelFiles(path, None)
    fields = {"file": cache.identity(path), "holds": fill.__name__.removeprefix("_fill_")}

    def unpack(entry: Path) -> None:
        with step(f"unpacking {path.name}"):
            fill(path, entry)

    folder = cache.ensure(KIND, fields, unpack, needs_bytes=4 * path.stat().st_size).path
    modules, config = folder / "modules", folder / "config"
    return KernelFiles(
        folder / "vmlinux",
        modules if modules.is_dir() else None,
        config if config.is_file() else None,
    )


def _needs_unpacking(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(512)
            if is_compressed(start) or start.startswith(_PACKAGE) or start[_TAR_MAGIC] == b"ustar":
                return True
            return start.startswith(b"\x7fELF") and _wrapped_kernel(ELFFile(file)) is not None
    except (OSError, ELFError, ValueError):
        # vmlinux.inspect() says what is wrong with it.
        return False


def _fill_kernel(path: Path, entry: Path) -> None:
    """Write vmlinux, and from a package its modules and config, if it has them."""
    root = entry / "root"
    if not _unpack_tree(path, root):
        (entry / "vmlinux").write_bytes(_unwrap(path))
        return
    images = sorted(one for one in root.glob("boot/vmlinu[xz]*") if one.is_file())
    if len(images) != 1:
        names = ", ".join(image.name for image in images) or "none"
        raise ConfigError(
            f"{path} must hold one kernel, boot/vmlinux-RELEASE; it holds {names}",
            hint="modules alone are given with modules=",
        )
    (entry / "vmlinux").write_bytes(_unwrap(images[0]))
    _keep(root, entry)


def _fill_modules(path: Path, entry: Path) -> None:
    root = entry / "root"
    if _unpack_tree(path, root):
        _keep(root, entry)


def _keep(root: Path, entry: Path) -> None:
    """Move modules and configuration out of an unpacked tree, and remove the rest."""
    folders = [one for one in (root / "lib/modules", root / "usr/lib/modules") if one.is_dir()]
    for modules in folders:
        if any(modules.rglob("*.ko*")):
            (entry / "modules/lib").mkdir(parents=True)
            modules.rename(entry / "modules/lib/modules")
            break
    configs = [*root.glob("boot/config-*"), *root.glob("usr/lib/modules/*/config")]
    configs += [*root.glob("lib/modules/*/config"), *entry.glob("modules/lib/modules/*/config")]
    if configs:
        shutil.copyfile(configs[0], entry / "config")
    shutil.rmtree(root)


def _unpack_tree(path: Path, root: Path) -> bool:
    """Unpack a package or tar archive into `root`; False if the file is neither."""
    with path.open("rb") as file:
        start = file.read(len(_PACKAGE))
    if start == _PACKAGE:
        root.mkdir()
        unpack_package(path, root)
        return True
    data = uncompressed(path)
    if data[_TAR_MAGIC] != b"ustar":
        return False
    root.mkdir()
    argv: list[str | Path] = [
        "tar",
        "-x",
        "--no-same-owner",
        "--no-same-permissions",
        "-C",
        root,
        "-f",
        "-",
    ]
    result = subprocess.run(argv, input=data, capture_output=True, check=False)
    if result.returncode:
        reason = result.stderr.decode(errors="replace").strip()[-300:]
        raise ConfigError(f"{path} cannot be unpacked: {reason}")
    return True


def _unwrap(path: Path) -> bytes:
    """The kernel in a compressed file or a zImage."""
    data = uncompressed(path)
    for _ in range(_LAYERS):
        try:
            elf = ELFFile(io.BytesIO(data)) if data.startswith(b"\x7fELF") else None
            section = None if elf is None else _wrapped_kernel(elf)
            if section is None:
                return data
            data = bytes(section.data())
        except (ELFError, ValueError) as error:
            raise ConfigError(f"{path} is a damaged ELF file: {error}") from error
        data = uncompressed(path, data)
    raise ConfigError(f"{path} has more than {_LAYERS} layers of wrappers")


def _wrapped_kernel(elf: ELFFile) -> Section | None:
    sections = elf.iter_sections()
    return next((one for one in sections if one.name.startswith(_WRAPPED)), None)
