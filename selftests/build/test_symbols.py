# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions of a vmlinux are found at the address through which every call goes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from paprscm.build.symbols import entry_points
from paprscm.errors import ConfigError

TOOLS = "powerpc64le-linux-gnu-"
SOURCE = """
	.abiversion 2
	.globl	__elsewhere
	.section .init.text,"ax"
	.globl	long_start_kernel, start_kernel, leaf
long_start_kernel:
	nop
start_kernel:
	addis	2, 12, 1
	addi	2, 2, 4
	.localentry start_kernel, .-start_kernel
	blr
leaf:
	bl	__elsewhere
	blr
static_one:
	blr
"""


@pytest.fixture
def vmlinux(tmp_path: Path) -> Path:
    """A linked file with the functions of SOURCE."""
    (tmp_path / "k.S").write_text(SOURCE)
    argv: list[str | Path] = [
        TOOLS + "as",
        "-a64",
        "-mlittle",
        "-o",
        tmp_path / "k.o",
        tmp_path / "k.S",
    ]
    subprocess.run(argv, check=True)
    output: list[str | Path] = ["-o", tmp_path / "vmlinux", tmp_path / "k.o"]
    linking = ["-e", "0", "-Ttext=0xc000000000000000", "--unresolved-symbols=ignore-all"]
    place = "--section-start=.init.text=0xc000000001000000"
    subprocess.run([TOOLS + "ld", *linking, place, *output], check=True)
    return tmp_path / "vmlinux"


def test_a_local_call_skips_the_set_up_of_r2(vmlinux: Path) -> None:
    names = {"long_start_kernel", "start_kernel", "leaf", "static_one", "__elsewhere", "missing"}
    first = 0xC000000001000000
    assert entry_points(vmlinux, names) == {
        "long_start_kernel": first,
        "start_kernel": first + 4 + 8,
        "leaf": first + 16,
        "static_one": first + 24,
    }


def test_a_stripped_file_has_no_functions(vmlinux: Path) -> None:
    subprocess.run([TOOLS + "strip", vmlinux], check=True)
    assert entry_points(vmlinux, {"start_kernel"}) == {}


def test_a_damaged_file_is_refused(vmlinux: Path) -> None:
    with vmlinux.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ConfigError, match="damaged ELF file"):
        entry_points(vmlinux, {"start_kernel"})
