# SPDX-License-Identifier: GPL-2.0-or-later
"""What users give as a kernel: each form leads to the same vmlinux, modules and configuration."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from paprscm.build import kernel_files
from paprscm.build.kernel_files import open_kernel
from paprscm.errors import ConfigError, HostError
from paprscm.host.cache import Cache

AS, LD = "powerpc64le-linux-gnu-as", "powerpc64le-linux-gnu-ld"
RELEASE = "6.12.9-test"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_content_size=False).compress,
}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def link(folder: Path, name: str, *lines: str) -> Path:
    """Link an ELF file for ppc64le from lines of assembler."""
    source, result = folder / f"{name}.S", folder / name
    source.write_text("\n".join(lines) + "\n")
    subprocess.run([AS, "-a64", "-mlittle", "-o", f"{result}.o", source], check=True)
    subprocess.run([LD, "-e", "0", "-o", result, f"{result}.o"], check=True)
    return result


@pytest.fixture
def vmlinux(tmp_path: Path) -> Path:
    text = f'\t.asciz "Linux version {RELEASE} (a@b) (gcc) #1 SMP"'
    return link(tmp_path, "vmlinux", '\t.section .rodata,"a"', text)


def zimage(folder: Path, kernel: Path, packed: bytes) -> Path:
    """A boot wrapper as of arch/powerpc/boot/wrapper."""
    payload = folder / "payload"
    payload.write_bytes(packed)
    section = '\t.section .kernel:vmlinux.strip,"a"'
    return link(folder, "zImage", section, f'\t.incbin "{payload}"')


def tree(folder: Path, vmlinux: Path, *, modules: str = "lib/modules") -> Path:
    """The files of a kernel package."""
    root = folder / "root"
    (root / "boot").mkdir(parents=True)
    shutil.copyfile(vmlinux, root / f"boot/vmlinux-{RELEASE}")
    (root / f"boot/config-{RELEASE}").write_text("CONFIG_PAPR_SCM=m\n")
    drivers = root / modules / RELEASE / "kernel"
    drivers.mkdir(parents=True)
    (drivers / "papr_scm.ko").write_bytes(b"module")
    return root


def package(root: Path) -> Path:
    control = root / "DEBIAN"
    control.mkdir()
    (control / "control").write_text(
        "Package: linux-image\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    )
    result = root.with_suffix(".deb")
    argv: list[str | Path] = ["dpkg-deb", "--root-owner-group", "--build", root, result]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return result


def archive(root: Path, suffix: str, *parts: str) -> Path:
    plain = root.with_suffix(".tar")
    subprocess.run(["tar", "-C", root, "-cf", plain, *(parts or ("boot", "lib"))], check=True)
    if not suffix:
        return plain
    result = Path(f"{plain}.{suffix}")
    result.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    return result


def test_a_vmlinux_is_used_in_place(cache: Cache, vmlinux: Path, tmp_path: Path) -> None:
    files = open_kernel(cache, vmlinux, tmp_path)
    assert (files.vmlinux, files.modules, files.config) == (vmlinux, tmp_path, None)
    assert not cache.entries()


@pytest.mark.parametrize("form", COMPRESS)
def test_compressed(cache: Cache, vmlinux: Path, tmp_path: Path, form: str) -> None:
    packed = tmp_path / f"vmlinux.{form}"
    packed.write_bytes(COMPRESS[form](vmlinux.read_bytes()))
    files = open_kernel(cache, packed, None)
    assert files.vmlinux.read_bytes() == vmlinux.read_bytes()
    # Unpacked once.
    assert open_kernel(cache, packed, None) == files
    packed.write_bytes(COMPRESS[form](vmlinux.read_bytes() + b"changed"))
    assert open_kernel(cache, packed, None).vmlinux != files.vmlinux


@pytest.mark.parametrize("form", [None, *COMPRESS])
def test_zimage(cache: Cache, vmlinux: Path, tmp_path: Path, form: str | None) -> None:
    content = vmlinux.read_bytes()
    image = zimage(tmp_path, vmlinux, COMPRESS[form](content) if form else content)
    assert open_kernel(cache, image, None).vmlinux.read_bytes() == content
    packed = tmp_path / "zImage.gz"
    packed.write_bytes(gzip.compress(image.read_bytes()))
    assert open_kernel(cache, packed, None).vmlinux.read_bytes() == content


@pytest.mark.parametrize("modules", ["lib/modules", "usr/lib/modules"])
@pytest.mark.parametrize("form", ["deb", "", "gz", "xz", "zst"])
def test_packages(cache: Cache, vmlinux: Path, tmp_path: Path, form: str, modules: str) -> None:
    root = tree(tmp_path, vmlinux, modules=modules)
    parts = ("boot", modules.partition("/")[0])
    files = open_kernel(
        cache, package(root) if form == "deb" else archive(root, form, *parts), None
    )
    assert files.vmlinux.read_bytes() == vmlinux.read_bytes()
    assert files.config is not None
    assert files.config.read_text() == "CONFIG_PAPR_SCM=m\n"
    assert files.modules is not None
    names = [path.name for path in files.modules.glob(f"lib/modules/{RELEASE}/kernel/*")]
    assert names == ["papr_scm.ko"]


def test_modules_apart(cache: Cache, vmlinux: Path, tmp_path: Path) -> None:
    """KernelCI has a zImage and modules.tar.xz; Debian has two packages."""
    root = tree(tmp_path, vmlinux)
    packed = archive(root, "xz", "lib")
    image = zimage(tmp_path, vmlinux, gzip.compress(vmlinux.read_bytes()))
    files = open_kernel(cache, image, packed)
    assert files.modules is not None
    assert (files.modules / "lib/modules" / RELEASE / "kernel/papr_scm.ko").is_file()
    assert files.config is None


def refuse(cache: Cache, kernel: Path, text: str) -> None:
    entries = len(cache.entries())
    with pytest.raises((ConfigError, HostError), match=text):
        open_kernel(cache, kernel, None)
    assert len(cache.entries()) == entries


def test_bad_files(cache: Cache, vmlinux: Path, tmp_path: Path) -> None:
    for form, compress in COMPRESS.items():
        packed = tmp_path / f"cut.{form}"
        packed.write_bytes(compress(vmlinux.read_bytes())[:-20])
        refuse(cache, packed, "is compressed and damaged")
    root = tree(tmp_path, vmlinux)
    packed = archive(root, "")
    packed.write_bytes(packed.read_bytes()[:3000])
    refuse(cache, packed, "cannot be unpacked: .*EOF")
    modules = archive(root, "xz", "lib")
    refuse(cache, modules, "must hold one kernel, .* it holds none")
    for other in (vmlinux, archive(root, "gz", "boot")):
        with pytest.raises(ConfigError, match="holds no lib/modules"):
            open_kernel(cache, vmlinux, other)
    shutil.copyfile(vmlinux, root / "boot/vmlinuz-2")
    refuse(cache, archive(root, ""), f"it holds vmlinux-{RELEASE}, vmlinuz-2")
    deb = package(root)
    deb.write_bytes(deb.read_bytes()[:500])
    refuse(cache, deb, "cannot be unpacked")


def test_other_files_are_left_to_inspect(cache: Cache, tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF", b"#!/bin/sh\n"):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert open_kernel(cache, path, None) == kernel_files.KernelFiles(path, None)
    absent = tmp_path / "absent"
    assert open_kernel(cache, absent, None).vmlinux == absent
