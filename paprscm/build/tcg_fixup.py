# SPDX-License-Identifier: GPL-2.0-or-later
"""Rewrite instructions for persistent memory that TCG cannot execute, in a copy of the kernel.

QEMU up to 11.1 does not execute `dcbfps` and `dcbstps` under TCG (GEN_HANDLER(dcbf) in
target/ppc/translate.c rejects L > 3), so every kernel since 5.9 takes a program interrupt at its
first write to pmem ("powerpc/pmem: Add flush routines using new pmem store and sync instruction").
TCG models no caches, so a plain `dcbf` is equivalent.
"""

from __future__ import annotations

import bisect
import io
import itertools
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section, SymbolTableSection

from paprscm.build.compression import uncompressed
from paprscm.errors import ConfigError

# Linux, include/linux/module_signature.h.
_SIGNATURE_MARK = b"~Module signature appended~\n"
_SIGNATURE_INFO = struct.Struct(">BBBBB3xI")
_SYMBOL = {"<": struct.Struct("<IBBHQQ"), ">": struct.Struct(">IBBHQQ")}
_STT_FUNC = 2


@dataclass(frozen=True)
class Instruction:
    """One form of an instruction, and its equivalent without cache model.

    Attributes:
        name: its mnemonic in Power ISA 3.1.
        word, mask: an instruction word w is of this form when w & mask == word.
        becomes: fixed bits of the replacement; register fields stay.
    """

    name: str
    word: int
    mask: int
    becomes: int


# dcbf has its L field (3 bits) above RA and RB; sync has no operands besides L.
DCBF, _DCBF_MASK = 0x7C0000AC, 0xFFE007FF
_HWSYNC, _LWSYNC, _SYNC_MASK = 0x7C0004AC, 0x7C2004AC, 0xFFFFFFFF

INSTRUCTIONS = (
    Instruction("dcbfps", 0x7C8000AC, _DCBF_MASK, DCBF),
    Instruction("dcbstps", 0x7CC000AC, _DCBF_MASK, DCBF),
    Instruction("phwsync", 0x7C8004AC, _SYNC_MASK, _HWSYNC),
    Instruction("plwsync", 0x7CA004AC, _SYNC_MASK, _LWSYNC),
)


@dataclass(frozen=True)
class FixReport:
    """Result of the fix-up of one file.

    Attributes:
        target: the copy.
        scope: searched ranges: "functions" (extents of the symbol table), "sections" (executable
            ones), "segments" (executable PT_LOAD), or "nothing" (QEMU executes everything).
        functions: number of sites by function; without functions by section or segment.
        instructions: number of sites by mnemonic.
        signature_dropped: a module's signature became invalid and was removed.
    """

    target: Path
    scope: str
    functions: Mapping[str, int]
    instructions: Mapping[str, int]
    signature_dropped: bool = False

    @property
    def sites(self) -> int:
        """Number of changed instruction words."""
        return sum(self.functions.values())

    def __str__(self) -> str:
        if self.scope == "nothing":
            return f"{self.target.name}: no fix-up needed"
        kinds = ", ".join(f"{n} {name}" for name, n in sorted(self.instructions.items()))
        places = f" in {len(self.functions)} {self.scope}" if self.functions else ""
        return f"{self.target.name}: {self.sites} sites rewritten{places}" + (
            f" ({kinds})" if kinds else ""
        )


def missing_instructions(executes: Mapping[str, bool]) -> tuple[Instruction, ...]:
    """The instructions that a QEMU with the probe results `executes` cannot execute."""
    return tuple(i for i in INSTRUCTIONS if executes.get(i.name) is False)


def fix_file(source: Path, target: Path, executes: Mapping[str, bool]) -> FixReport:
    """Copy a vmlinux or a module, with instructions that QEMU cannot execute rewritten.

    Words are changed only inside functions of the symbol table; without functions, in executable
    sections; without sections, in executable segments. A word with a relocation is not final and
    stays unchanged. The copy of a compressed module (.gz, .xz, .zst) is uncompressed.

    Args:
        source: the ELF file.
        target: the copy.
        executes: result of vm.instructions.probe; other instructions count as executable.

    Raises:
        ConfigError: `source` cannot be read or is not a 64-bit ELF file.
    """
    lacking = missing_instructions(executes)
    content = uncompressed(source)
    if not lacking:
        target.write_bytes(content)
        shutil.copymode(source, target)
        return FixReport(target, "nothing", {}, {})
    try:
        elf = ELFFile(io.BytesIO(content))
    except ELFError as error:
        raise ConfigError(f"{source} is not an ELF file: {error}") from error
    if elf.elfclass != 64:
        raise ConfigError(f"{source} is a {elf.elfclass}-bit ELF file, not a 64-bit one")
    order = "<" if elf.little_endian else ">"
    data = bytearray(content)
    try:
        scope, ranges = _code_ranges(elf, data, order)
    except (ELFError, struct.error, ValueError, IndexError) as error:
        raise ConfigError(f"{source} is a damaged ELF file: {error}") from error
    functions: Counter[str] = Counter()
    instructions: Counter[str] = Counter()
    for instruction in lacking:
        for name, offset in _sites(data, ranges, instruction, order):
            (word,) = struct.unpack_from(order + "I", data, offset)
            fixed = word & ~instruction.mask & 0xFFFFFFFF | instruction.becomes
            struct.pack_into(order + "I", data, offset, fixed)
            functions[name] += 1
            instructions[instruction.name] += 1
    length = _signed_length(data)
    dropped = bool(instructions) and length < len(data)
    if dropped:
        del data[length:]
    target.write_bytes(data)
    shutil.copymode(source, target)
    return FixReport(target, scope, dict(functions), dict(instructions), dropped)


def is_signed(path: Path) -> bool:
    """Return True if an uncompressed module ends with a signature (scripts/sign-file.c)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_SIGNATURE_MARK)))
        return file.read() == _SIGNATURE_MARK


@dataclass(frozen=True)
class _Range:
    """File offsets [start, end) of code, with its extents sorted by start."""

    start: int
    end: int
    extents: Sequence[tuple[int, int, str]]
    unfinished: frozenset[int]


def _signed_length(data: bytearray) -> int:
    """The length of the ELF file, without an appended module signature."""
    tail = len(data) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO.size
    if tail < 0 or not data.endswith(_SIGNATURE_MARK):
        return len(data)
    length = int(_SIGNATURE_INFO.unpack_from(data, tail)[-1])
    return tail - length if length <= tail else len(data)


def _code_ranges(elf: ELFFile, data: bytearray, order: str) -> tuple[str, list[_Range]]:
    sections = list(elf.iter_sections())
    code = {
        index: section
        for index, section in enumerate(sections)
        if section["sh_type"] == "SHT_PROGBITS" and section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR
    }
    if not code:
        segments = [
            _whole(f"segment {index}", segment["p_offset"], segment["p_filesz"])
            for index, segment in enumerate(elf.iter_segments("PT_LOAD"))
            if segment["p_flags"] & 1
        ]
        return "segments", segments
    extents = _functions(sections, code, data, order, relocatable=elf["e_type"] == "ET_REL")
    unfinished = _relocated(sections, code)
    if not any(extents.values()):
        return "sections", [
            _whole(s.name, s["sh_offset"], s["sh_size"], unfinished[i]) for i, s in code.items()
        ]
    return "functions", [
        _Range(s["sh_offset"], s["sh_offset"] + s["sh_size"], extents[i], unfinished[i])
        for i, s in code.items()
    ]


def _whole(name: str, start: int, size: int, unfinished: frozenset[int] = frozenset()) -> _Range:
    return _Range(start, start + size, [(start, start + size, name)], unfinished)


def _functions(
    sections: Sequence[Section],
    code: Mapping[int, Section],
    data: bytearray,
    order: str,
    *,
    relocatable: bool,
) -> dict[int, list[tuple[int, int, str]]]:
    """The functions of each code section as sorted (start, end, name), in file offsets."""
    functions: dict[int, dict[int, tuple[int, str]]] = {index: {} for index in code}
    for table in sections:
        if not isinstance(table, SymbolTableSection) or table["sh_type"] != "SHT_SYMTAB":
            continue
        names = sections[table["sh_link"]]
        # A vmlinux has 100,000 symbols: unpack them at once, without an object for each.
        raw = memoryview(data)[table["sh_offset"] : table["sh_offset"] + table["sh_size"]]
        for name, info, _other, index, value, size in _SYMBOL[order].iter_unpack(raw):
            if info & 0xF == _STT_FUNC and index in code:
                section = code[index]
                base = 0 if relocatable else section["sh_addr"]
                offset = value - base + section["sh_offset"]
                text = _text(data, names["sh_offset"] + name)
                functions[index][offset] = max(
                    (size, text), functions[index].get(offset, (0, text))
                )
    return {index: _closed(places, code[index]) for index, places in functions.items()}


def _closed(places: Mapping[int, tuple[int, str]], section: Section) -> list[tuple[int, int, str]]:
    """Extents; a function without size (assembler's _GLOBAL) extends to the next one."""
    borders = [*sorted(places), section["sh_offset"] + section["sh_size"]]
    return [
        (start, start + places[start][0] if places[start][0] else following, places[start][1])
        for start, following in itertools.pairwise(borders)
    ]


def _text(data: bytearray, offset: int) -> str:
    return data[offset : data.index(0, offset)].decode(errors="replace")


def _relocated(
    sections: Iterable[Section], code: Mapping[int, Section]
) -> dict[int, frozenset[int]]:
    """File offsets of words with relocations, by code section."""
    offsets: dict[int, set[int]] = {index: set() for index in code}
    for table in sections:
        if isinstance(table, RelocationSection) and table["sh_info"] in code:
            base = code[table["sh_info"]]["sh_offset"]
            words = offsets[table["sh_info"]]
            words.update((base + r["r_offset"]) & ~3 for r in table.iter_relocations())
    return {index: frozenset(words) for index, words in offsets.items()}


def _sites(
    data: bytearray, ranges: Iterable[_Range], instruction: Instruction, order: str
) -> Iterator[tuple[str, int]]:
    """(name of the extent, file offset) of each word of this form."""
    pattern = _pattern(instruction, order)
    for code in ranges:
        starts = [start for start, _end, _name in code.extents]
        for match in pattern.finditer(data, code.start, code.end):
            offset = match.start()
            if (offset - code.start) % 4 or offset + 4 > code.end or offset in code.unfinished:
                continue
            place = bisect.bisect_right(starts, offset) - 1
            if place >= 0 and offset < code.extents[place][1]:
                yield code.extents[place][2], offset


def _pattern(instruction: Instruction, order: str) -> re.Pattern[bytes]:
    """Pattern of the form's bytes at any offset; a lookahead, so that matches may overlap."""
    classes = []
    for shift in (0, 8, 16, 24) if order == "<" else (24, 16, 8, 0):
        word, mask = instruction.word >> shift & 0xFF, instruction.mask >> shift & 0xFF
        allowed = (value for value in range(256) if value & mask == word)
        classes.append(b"[" + b"".join(b"\\x%02x" % value for value in allowed) + b"]")
    return re.compile(b"(?=" + b"".join(classes) + b")", re.DOTALL)
