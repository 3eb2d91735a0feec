# SPDX-License-Identifier: GPL-2.0-or-later
"""Inspection of a vmlinux without running it; other files are refused by type."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paprscm.build import vmlinux
from paprscm.errors import CapabilityError, ConfigError

TOOLS = "powerpc64le-linux-gnu-"
CONFIG = "CONFIG_PPC_64K_PAGES=y\nCONFIG_PAPR_SCM=m\n# CONFIG_XFS_FS is not set\nCONFIG_HZ=250\n"

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Link a stand-in for a vmlinux."""

    def build(
        *,
        banner: str = "Linux version 6.12.9-test (a@b) (gcc) #1 SMP",
        config: str | None = CONFIG,
        driver: bool = False,
        zero_page: int = 0,
        section: str = ".rodata",
        big: bool = False,
        link: bool = True,
        build_id: str = "none",
    ) -> Path:
        (tmp_path / "config.gz").write_bytes(gzip.compress((config or "").encode()))
        source = [f'\t.section {section},"a"', f'\t.asciz "{banner}"']
        if config is not None:
            source += ['\t.ascii "IKCFG_ST"', f'\t.incbin "{tmp_path}/config.gz"']
            source += ['\t.ascii "IKCFG_ED"']
        if driver:
            source.append('\t.asciz "papr_scm"')
        if zero_page:
            # As in a real vmlinux, where other exported symbols end in the same name.
            source += ["\t.globl __kstrtab_empty_zero_page", "__kstrtab_empty_zero_page:"]
            source += ["\t.bss", "\t.globl empty_zero_page", "\t.type empty_zero_page, @object"]
            source += ["empty_zero_page:", f"\t.space {zero_page}"]
            source += [f"\t.size empty_zero_page, {zero_page}"]
        (tmp_path / "k.S").write_text("\n".join(source) + "\n")
        endian = ["-mbig"] if big else ["-mlittle"]
        argv: list[str | Path] = [
            TOOLS + "as",
            "-a64",
            *endian,
            "-o",
            tmp_path / "k.o",
            tmp_path / "k.S",
        ]
        subprocess.run(argv, check=True)
        if not link:
            return tmp_path / "k.o"
        emulation = ["-EB", "-m", "elf64ppc"] if big else []
        output: list[str | Path] = ["-o", tmp_path / "vmlinux", tmp_path / "k.o"]
        argv = [TOOLS + "ld", *emulation, "-e", "0", f"--build-id={build_id}", *output]
        subprocess.run(argv, check=True)
        return tmp_path / "vmlinux"

    return build


def test_reads_the_embedded_configuration(make: Make) -> None:
    kernel = vmlinux.inspect(make())
    assert kernel.release == "6.12.9-test"
    assert kernel.page_size == 65536
    assert kernel.papr_scm == vmlinux.MODULE
    assert kernel.has_symbols
    assert (kernel.option("HZ"), kernel.option("XFS_FS"), kernel.option("NONE")) == (
        "250",
        "n",
        "n",
    )
    kernel.require_option("PAPR_SCM")
    with pytest.raises(CapabilityError, match="built without CONFIG_XFS_FS"):
        kernel.require_option("XFS_FS")


def test_without_configuration_looks_at_symbols_and_strings(make: Make) -> None:
    kernel = vmlinux.inspect(make(config=None, driver=True, zero_page=4096))
    assert kernel.config is None
    assert kernel.page_size == 4096
    assert kernel.papr_scm == vmlinux.BUILT_IN
    assert kernel.option("HZ") is None
    with pytest.raises(CapabilityError, match="CONFIG_XFS_FS is unknown"):
        kernel.require_option("XFS_FS")


def test_unknown_stays_unknown(make: Make) -> None:
    path = make(config=None)
    subprocess.run([TOOLS + "strip", path], check=True)
    kernel = vmlinux.inspect(path)
    assert (kernel.page_size, kernel.papr_scm, kernel.has_symbols) == (None, vmlinux.UNKNOWN, False)
    vmlinux.require_usable(kernel, has_modules=True)
    with pytest.raises(ConfigError, match="neither papr_scm nor its configuration") as caught:
        vmlinux.require_usable(kernel, has_modules=False)
    assert "set modules=" in str(caught.value.hint)


def test_papr_scm_absent_or_a_module(make: Make) -> None:
    kernel = vmlinux.inspect(make())
    vmlinux.require_usable(kernel, has_modules=True)
    with pytest.raises(ConfigError, match=r"is a module of .* and no modules were given"):
        vmlinux.require_usable(kernel, has_modules=False)
    kernel = vmlinux.inspect(make(config="CONFIG_PPC_4K_PAGES=y\n", driver=True))
    assert kernel.page_size == 4096
    for has_modules in (True, False):
        with pytest.raises(ConfigError, match="has no papr_scm") as caught:
            vmlinux.require_usable(kernel, has_modules=has_modules)
        assert "paprscm kernel build" in str(caught.value.hint)


def test_xmon_is_switched_off(make: Make) -> None:
    assert vmlinux.inspect(make(config="CONFIG_XMON=y\n")).words == ()
    assert vmlinux.inspect(make(config="CONFIG_XMON_DEFAULT=y\n")).words == ("xmon=off",)
    assert vmlinux.inspect(make(config=None, driver=True)).words == ("xmon=off",)


def test_a_forced_command_line(make: Make) -> None:
    config = 'CONFIG_PAPR_SCM=y\nCONFIG_CMDLINE="console=hvc0 quiet"\nCONFIG_CMDLINE_FORCE=y\n'
    with pytest.raises(ConfigError, match='CONFIG_CMDLINE_FORCE and boots with "console=hvc0 qu'):
        vmlinux.require_usable(vmlinux.inspect(make(config=config)), has_modules=False)
    config = config.replace("FORCE", "EXTEND")
    vmlinux.require_usable(vmlinux.inspect(make(config=config)), has_modules=False)


def refuse(path: Path, message: str) -> None:
    """Check that `path` is refused with one line that matches, and a hint."""
    with pytest.raises(ConfigError) as caught:
        vmlinux.inspect(path)
    assert re.search(message, caught.value.message), caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_missing_empty_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "does not exist$")
    (tmp_path / "empty").touch()
    refuse(tmp_path / "empty", "is empty$")
    refuse(tmp_path, "is a folder$")
    os.mkfifo(tmp_path / "fifo")
    refuse(tmp_path / "fifo", "is not a regular file$")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#!/bin/sh\n", "is not an ELF file"),
        (b"MZ" + bytes(0x200) + b"HdrS" + bytes(100), "is an x86 bzImage"),
        (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(100), "is an arm64 Image"),
        (b"\x7fELF", "is a damaged ELF file"),
        (b"\x7fELF\x02\x01\x01" + bytes(57), "is for|is a damaged ELF file"),
    ],
)
def test_not_a_kernel(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    refuse(tmp_path / "file", message)


def test_x86(tmp_path: Path) -> None:
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\x3e\0\x01" + bytes(43)
    (tmp_path / "vmlinux").write_bytes(header)
    refuse(tmp_path / "vmlinux", "is for x86-64, the guests are ppc64le")


def test_big_endian(make: Make) -> None:
    refuse(make(big=True), "is big-endian")


def test_wrapper_of_32_bit(tmp_path: Path) -> None:
    header = b"\x7fELF\x01\x02\x01" + bytes(9) + b"\0\x02\0\x14\0\0\0\x01" + bytes(28)
    (tmp_path / "zImage").write_bytes(header)
    refuse(tmp_path / "zImage", "is for 32-bit PowerPC")


def test_no_kernel_at_all(make: Make) -> None:
    refuse(make(banner="Hello"), "is a ppc64le ELF file, but not a kernel")
    refuse(make(link=False), "is an object file or a module")


def test_cut_short(make: Make, tmp_path: Path) -> None:
    data = make().read_bytes()
    for length in (100, len(data) // 2, len(data) - 10):
        (tmp_path / "cut").write_bytes(data[:length])
        refuse(tmp_path / "cut", "is a damaged ELF file|is cut short")


def test_damaged_configuration_is_none(make: Make) -> None:
    path = make()
    data = bytearray(path.read_bytes())
    place = data.index(b"IKCFG_ST") + 8
    data[place + 10 : place + 20] = b"\xff" * 10
    path.write_bytes(data)
    assert vmlinux.inspect(path).config is None


def test_a_large_kernel_is_quick(make: Make, tmp_path: Path) -> None:
    # 200 MB of debug information that is not loaded.
    path, large = make(), tmp_path / "debug"
    with large.open("wb") as file:
        file.truncate(200_000_000)
    argv: list[str | Path] = [
        TOOLS + "objcopy",
        f"--add-section=.debug_info={large}",
        path,
        tmp_path / "large",
    ]
    subprocess.run(argv, check=True)
    started = time.process_time()
    assert vmlinux.inspect(tmp_path / "large").release == "6.12.9-test"
    assert time.process_time() - started < 0.3


def test_the_build_is_identified(make: Make) -> None:
    assert vmlinux.inspect(make()).build_id is None
    assert vmlinux.inspect(make(build_id="0x0123456789abcdef")).build_id == "0123456789abcdef"
    lines = CONFIG.splitlines(keepends=True)
    digest = vmlinux.inspect(make()).config_sha256
    assert digest is not None
    assert len(digest) == 64
    assert vmlinux.inspect(make(config="".join(reversed(lines)))).config_sha256 == digest
    assert vmlinux.inspect(make(config=CONFIG + "CONFIG_A=y\n")).config_sha256 != digest
    assert vmlinux.inspect(make(config=None, driver=True)).config_sha256 is None


def test_the_mmu_is_that_of_configuration_and_cpu(make: Make) -> None:
    radix = "CONFIG_PPC_RADIX_MMU=y\nCONFIG_PPC_RADIX_MMU_DEFAULT=y\n"
    kernel = vmlinux.inspect(make(config=radix))
    cpus = ("POWER9", "power10_v2.0", "POWER8", "host", "max")
    assert [kernel.mmu(cpu) for cpu in cpus] == ["radix", "radix", "hash", None, None]
    assert vmlinux.inspect(make(config="CONFIG_PPC_RADIX_MMU=y\n")).mmu("POWER9") == "hash"
    assert vmlinux.inspect(make(config=None, driver=True)).mmu("POWER9") is None
