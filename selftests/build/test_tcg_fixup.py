# SPDX-License-Identifier: GPL-2.0-or-later
"""The ISA fix-up changes only instructions that QEMU lacks, and only in code."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from paprscm.build import tcg_fixup
from paprscm.emulator import instructions
from paprscm.errors import CapabilityError, ConfigError, HostError, KilledError

TOOLS = "powerpc64le-linux-gnu-"
LACKS_ALL = {i.name: False for i in tcg_fixup.INSTRUCTIONS}
LACKS_DCBF = LACKS_ALL | {"phwsync": True, "plwsync": True}
SIGNATURE = (
    b"S" * 40 + struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, 40) + b"~Module signature appended~\n"
)

# Two functions, one of them without a size, and lookalikes of instructions around them.
CODE = """
	.text
	.long	0x7cc020ac		# outside of a function: data
	.type	first, @function
first:
	.long	0x7cc3f8ac		# dcbstps 3,31
	.long	0x7c8004ac		# phwsync
	.long	0x7c0320ac		# dcbf 3,4: every QEMU has it
	nop
	.size	first, . - first
	.long	0x7c8028ac		# after the function's end
	.type	second, @function
second:
	.long	0x7c9f18ac		# dcbfps 31,3
	.long	0x7ca004ac		# plwsync
	.byte	0xac, 0x28, 0xc0, 0x7c	# dcbstps 0,5, as little-endian bytes
	.section .rodata
	.long	0x7cc020ac
"""

Assemble = Callable[..., Path]


@pytest.fixture
def assemble(tmp_path: Path) -> Assemble:
    """Assemble source text into an object file; link it on request."""

    def make(text: str, *, link: bool = False, big: bool = False) -> Path:
        source, objects = tmp_path / "code.S", tmp_path / "code.o"
        source.write_text(text)
        endian = "-mbig" if big else "-mlittle"
        subprocess.run([TOOLS + "as", "-a64", endian, "-o", objects, source], check=True)
        if not link:
            return objects
        target = tmp_path / "code"
        emulation = ["-EB", "-m", "elf64ppc"] if big else []
        subprocess.run(
            [TOOLS + "ld", *emulation, "-e", "0", "-Ttext", "0x10000", "-o", target, objects],
            check=True,
        )
        return target

    return make


def words(path: Path, section: str, order: str = "<") -> list[int]:
    """The words of a section."""
    dump = path.with_suffix(".dump")
    argv: list[str | Path] = [
        TOOLS + "objcopy",
        "-O",
        "binary",
        f"--only-section={section}",
        path,
        dump,
    ]
    subprocess.run(argv, check=True)
    data = dump.read_bytes()
    return list(struct.unpack(f"{order}{len(data) // 4}I", data[: len(data) & ~3]))


@pytest.mark.parametrize("link", [False, True])
def test_changes_functions_only(assemble: Assemble, tmp_path: Path, link: bool) -> None:
    source = assemble(CODE, link=link)
    before = source.read_bytes()
    report = tcg_fixup.fix_file(source, tmp_path / "fixed", LACKS_ALL)
    assert report.scope == "functions"
    assert report.functions == {"first": 2, "second": 3}
    assert report.instructions == {"dcbstps": 2, "dcbfps": 1, "phwsync": 1, "plwsync": 1}
    assert report.sites == 5
    assert source.read_bytes() == before
    text = words(tmp_path / "fixed", ".text")
    assert (
        text[:10]
        == [
            0x7CC020AC,  # outside of a function
            0x7C03F8AC,
            0x7C0004AC,
            0x7C0320AC,
            0x60000000,
            0x7C8028AC,  # after the function
            0x7C1F18AC,
            0x7C2004AC,
            0x7C0028AC,
            *text[9:10],
        ]
    )
    assert words(tmp_path / "fixed", ".rodata") == [0x7CC020AC]


def test_changes_only_what_is_missing(assemble: Assemble, tmp_path: Path) -> None:
    report = tcg_fixup.fix_file(assemble(CODE), tmp_path / "fixed", LACKS_DCBF)
    assert report.instructions == {"dcbstps": 2, "dcbfps": 1}
    assert 0x7C8004AC in words(tmp_path / "fixed", ".text")


@pytest.mark.parametrize("executes", [{}, dict.fromkeys(LACKS_ALL, True)])
def test_nothing_missing_copies(
    assemble: Assemble, tmp_path: Path, executes: dict[str, bool]
) -> None:
    source = assemble(CODE)
    report = tcg_fixup.fix_file(source, tmp_path / "fixed", executes)
    assert (report.scope, report.sites) == ("nothing", 0)
    assert (tmp_path / "fixed").read_bytes() == source.read_bytes()


def test_without_symbols_scans_executable_sections(assemble: Assemble, tmp_path: Path) -> None:
    source = assemble(CODE, link=True)
    subprocess.run([TOOLS + "strip", source], check=True)
    report = tcg_fixup.fix_file(source, tmp_path / "fixed", LACKS_ALL)
    assert report.scope == "sections"
    # The two words outside of the functions are no longer distinguishable from code; .rodata is.
    assert report.functions == {".text": 7}
    assert words(tmp_path / "fixed", ".rodata") == [0x7CC020AC]


def test_without_sections_scans_executable_segments(assemble: Assemble, tmp_path: Path) -> None:
    source = assemble(CODE + "\n.data\n.long 0x7cc020ac\n", link=True)
    data = bytearray(source.read_bytes())
    data[0x28:0x30] = bytes(8)  # e_shoff
    data[0x3C:0x40] = bytes(4)  # e_shnum, e_shstrndx
    source.write_bytes(data)
    report = tcg_fixup.fix_file(source, tmp_path / "fixed", LACKS_DCBF)
    assert report.scope == "segments"
    # The linker puts .rodata into the executable segment, and .data into a separate one.
    assert report.sites == 6
    assert (tmp_path / "fixed").read_bytes().count(bytes.fromhex("ac20c07c")) == 1


def test_big_endian(assemble: Assemble, tmp_path: Path) -> None:
    source = assemble(CODE, big=True)
    report = tcg_fixup.fix_file(source, tmp_path / "fixed", LACKS_ALL)
    assert report.functions == {"first": 2, "second": 2}
    text = words(tmp_path / "fixed", ".text", ">")
    assert text[6:9] == [0x7C1F18AC, 0x7C2004AC, 0xAC28C07C]


def test_word_under_relocation_stays(assemble: Assemble, tmp_path: Path) -> None:
    source = assemble(
        """
	.text
	.type	f, @function
f:	.reloc	., R_PPC64_REL24, other
	.long	0x7cc020ac
	.long	0x7cc020ac
	.size	f, . - f
"""
    )
    report = tcg_fixup.fix_file(source, tmp_path / "fixed", LACKS_ALL)
    assert report.functions == {"f": 1}
    assert words(tmp_path / "fixed", ".text")[:2] == [0x7CC020AC, 0x7C0020AC]


def test_unaligned_lookalike_does_not_hide_a_site(assemble: Assemble, tmp_path: Path) -> None:
    # The bytes ac 20 c0 7c at an odd offset, overlapping a true instruction's first byte.
    source = assemble(
        """
	.text
	.type	f, @function
f:	.byte	0, 0xac, 0xac, 0xc0, 0x7c, 0, 0, 0
	.byte	0xac, 0xac, 0xc0, 0x7c
	.byte	0, 0, 0, 0xac
	.byte	0xac, 0xc0, 0x7c, 0
	.byte	0xac, 0x20, 0xc0, 0x7c
	.size	f, . - f
"""
    )
    report = tcg_fixup.fix_file(source, tmp_path / "fixed", LACKS_ALL)
    assert report.functions == {"f": 1}
    assert words(tmp_path / "fixed", ".text")[5] == 0x7C0020AC


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".xz", lambda data: lzma.compress(data, check=lzma.CHECK_CRC32)),
        (".zst", zstandard.ZstdCompressor(write_content_size=False).compress),
    ],
)
def test_compressed_module(
    assemble: Assemble, tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    plain = assemble(CODE)
    packed = tmp_path / f"code.ko{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    from_packed, from_plain = tmp_path / "a.ko", tmp_path / "b.ko"
    assert tcg_fixup.fix_file(packed, from_packed, LACKS_ALL).sites == 5
    tcg_fixup.fix_file(plain, from_plain, LACKS_ALL)
    assert from_packed.read_bytes() == from_plain.read_bytes()
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"compressed and damaged|not an ELF file"):
        tcg_fixup.fix_file(packed, from_packed, LACKS_ALL)


def test_signature_is_dropped_only_after_a_change(assemble: Assemble, tmp_path: Path) -> None:
    plain = assemble(CODE)
    signed = tmp_path / "signed.ko"
    signed.write_bytes(plain.read_bytes() + SIGNATURE)
    report = tcg_fixup.fix_file(signed, tmp_path / "fixed.ko", LACKS_ALL)
    assert report.signature_dropped
    assert (tmp_path / "fixed.ko").stat().st_size == plain.stat().st_size

    plain = assemble("\t.text\n\t.type f, @function\nf:\tblr\n\t.size f, . - f\n")
    signed.write_bytes(plain.read_bytes() + SIGNATURE)
    report = tcg_fixup.fix_file(signed, tmp_path / "fixed.ko", LACKS_ALL)
    assert not report.signature_dropped
    assert (tmp_path / "fixed.ko").read_bytes() == signed.read_bytes()


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF"])
def test_not_elf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ConfigError, match="not an ELF file"):
        tcg_fixup.fix_file(tmp_path / "file", tmp_path / "fixed", LACKS_ALL)


def test_cut_short(assemble: Assemble, tmp_path: Path) -> None:
    data = assemble(CODE).read_bytes()
    for length in (70, len(data) // 2, len(data) - 100):
        (tmp_path / "file").write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"damaged ELF file|not an ELF file"):
            tcg_fixup.fix_file(tmp_path / "file", tmp_path / "fixed", LACKS_ALL)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        tcg_fixup.fix_file(tmp_path / "file", tmp_path / "fixed", LACKS_ALL)


def test_instructions_have_the_assembler_s_encoding(tmp_path: Path) -> None:
    source, objects = tmp_path / "all.S", tmp_path / "all.o"
    source.write_text("dcbfps 3,31\ndcbstps 3,31\nphwsync\nplwsync\n")
    argv: list[str | Path] = [TOOLS + "as", "-a64", "-mlittle", "-mpower10", "-o", objects, source]
    subprocess.run(argv, check=True)
    for instruction, word in zip(tcg_fixup.INSTRUCTIONS, words(objects, ".text"), strict=True):
        assert word & instruction.mask == instruction.word, instruction.name


@pytest.fixture
def qemu() -> str:
    """The host's QEMU."""
    path = shutil.which("qemu-system-ppc64")
    assert path, "qemu-system-ppc64 is not installed"
    return path


@pytest.mark.guest
def test_probe_answers_for_each_instruction(qemu: str) -> None:
    assert set(instructions.probe([qemu])) == set(LACKS_ALL)


def test_probe_refuses_an_untrustworthy_answer(tmp_path: Path) -> None:
    liar = tmp_path / "liar"
    liar.write_text("#!/bin/sh\necho 'isa-probe: dcbf=1 dcbfps=1 illegal=1 end'\n")
    liar.chmod(0o755)
    with pytest.raises(HostError, match="is unreliable"):
        instructions.probe([str(liar)])


def test_killed_probe_is_not_a_result(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    with pytest.raises(KilledError, match="from outside"):
        instructions.probe([str(killed)])


def test_probe_without_an_answer(tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho 'no such machine' >&2\n")
    silent.chmod(0o755)
    with pytest.raises(CapabilityError, match=r"without an answer.*no such machine"):
        instructions.probe([str(silent)])
    silent.write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(CapabilityError, match=r"no answer.*took more than 0\.3 s"):
        instructions.probe([str(silent)], timeout_s=0.3)
