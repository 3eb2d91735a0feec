# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts about a vmlinux, and requirements of a guest kernel."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import mmap
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from elftools.elf.segments import NoteSegment

from paprscm.errors import CapabilityError, ConfigError

BUILT_IN = "built in"
MODULE = "module"
ABSENT = "absent"
UNKNOWN = "unknown"

_WANT_VMLINUX = "give the vmlinux from the top of a ppc64le build tree"
# Linux, kernel/configs.c.
_CONFIG_START, _CONFIG_END = b"IKCFG_ST", b"IKCFG_ED"
_BANNER = re.compile(rb"Linux version ([0-9][^\s\0]*) ")
_SYMBOL = struct.Struct("<IBBHQQ")


@dataclass(frozen=True)
class Kernel:
    """Facts about one vmlinux.

    Attributes:
        path: the ELF file.
        release: as printed by `uname -r` ("6.12.107-paprscm").
        page_size: bytes; None if neither configuration nor symbols have it.
        config: its options without "CONFIG_" ("y", "m", "250", '"text"'); None without IKCONFIG.
        papr_scm: BUILT_IN, MODULE, ABSENT or UNKNOWN (neither built in, nor a configuration).
        has_symbols: it has a symbol table, which the TCG fix-up prefers.
        size_bytes: size of the file.
        load_bytes: memory of its loaded segments.
        build_id: the linker's, of the GNU note; None without one.
    """

    path: Path
    release: str
    page_size: int | None
    config: Mapping[str, str] | None
    papr_scm: str
    has_symbols: bool
    size_bytes: int
    load_bytes: int
    build_id: str | None = None

    def option(self, name: str) -> str | None:
        """The value of CONFIG_`name`, "n" if it is off; None without a configuration."""
        return None if self.config is None else self.config.get(name, "n")

    @property
    def config_sha256(self) -> str | None:
        """Digest of the options, which their order does not change; None without them."""
        if self.config is None:
            return None
        lines = "".join(f"{name}={value}\n" for name, value in sorted(self.config.items()))
        return hashlib.sha256(lines.encode(errors="replace")).hexdigest()

    def mmu(self, cpu: str) -> str | None:
        """The MMU that the kernel uses on this CPU unless its command line has disable_radix.

        Args:
            cpu: the -cpu model.

        Returns:
            "radix" or "hash" (arch/powerpc/mm/init_64.c, early_init_devtree); None: the
            configuration or the generation of the CPU is not known.
        """
        generation = re.match(r"power(\d+)", cpu, re.IGNORECASE)
        if generation is None or self.config is None:
            return None
        options = "PPC_RADIX_MMU", "PPC_RADIX_MMU_DEFAULT"
        radix = int(generation[1]) >= 9 and all(self.option(name) == "y" for name in options)
        return "radix" if radix else "hash"

    @property
    def words(self) -> tuple[str, ...]:
        """Words for its command line: with xmon a panic waits for input instead of ending QEMU."""
        return () if self.option("XMON_DEFAULT") == "n" else ("xmon=off",)

    def require_option(self, name: str, *, hint: str | None = None) -> None:
        """Raise unless CONFIG_`name` is built in or a module.

        Args:
            name: the option without "CONFIG_".
            hint: a kernel that has it; None: that of `paprscm kernel build`.

        Raises:
            CapabilityError: the kernel was built without it, or its configuration is unknown.
        """
        if self.config is None:
            raise CapabilityError(
                f"the kernel {self.release} does not hold its configuration, so CONFIG_{name} is "
                "unknown",
                hint="build it with CONFIG_IKCONFIG=y, or give modules= with its configs.ko",
            )
        if self.option(name) == "n":
            raise CapabilityError(
                f"the kernel {self.release} was built without CONFIG_{name}",
                hint=hint
                or "build it with `paprscm kernel build`, which merges images/kernel.config",
            )


def inspect(path: Path) -> Kernel:
    """Read the facts about a vmlinux, in about 0.1 s.

    Args:
        path: a ppc64le vmlinux, with or without debug information.

    Raises:
        ConfigError: the file is not a ppc64le vmlinux; with its kind.
    """
    with _mapped(path) as data:
        if data[:4] != b"\x7fELF":
            raise _not_elf(path, data)
        try:
            elf = ELFFile(cast("IO[bytes]", data))
            _check_kind(path, elf)
            loads = list(elf.iter_segments("PT_LOAD"))
            spans = [(s["p_offset"], s["p_offset"] + s["p_filesz"]) for s in loads if s["p_filesz"]]
            begins = [s["p_vaddr"] for s in loads]
            ends = [s["p_vaddr"] + s["p_memsz"] for s in loads]
            table = elf.get_section_by_name(".symtab")
            symbols = table if isinstance(table, SymbolTableSection) else None
            build_id = _build_id(elf)
        except (ELFError, struct.error, ValueError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is a damaged ELF file: {error}", hint=_WANT_VMLINUX) from (
                error
            )
        if any(end > len(data) for _start, end in spans):
            raise ConfigError(
                f"{path} is truncated: it has {len(data)} bytes, its segments end at "
                f"{max(end for _start, end in spans)}",
                hint="copy or build it again",
            )
        banner = _search(_BANNER, data, spans)
        if banner is None:
            raise ConfigError(f"{path} is a ppc64le ELF file, but not a kernel", hint=_WANT_VMLINUX)
        config = embedded_config(data, spans)
        return Kernel(
            path=path,
            release=banner[1].decode(errors="replace"),
            page_size=_page_size(config, symbols, data),
            config=config,
            papr_scm=_papr_scm(config, data, spans),
            has_symbols=symbols is not None,
            size_bytes=len(data),
            load_bytes=max(ends, default=0) - min(begins, default=0),
            build_id=build_id,
        )


def require_usable(kernel: Kernel, *, has_modules: bool) -> None:
    """Raise unless `kernel` can drive the devices under test.

    Args:
        kernel: returned by `inspect`.
        has_modules: a folder of its modules was given, too.

    Raises:
        ConfigError: it has no papr_scm, or only as a module and no modules were given; or it
            ignores its command line.
    """
    if kernel.option("CMDLINE_FORCE") == "y":
        raise ConfigError(
            f"the kernel {kernel.release} ({kernel.path}) ignores QEMU's -append: it was built "
            f"with CONFIG_CMDLINE_FORCE and boots with {kernel.option('CMDLINE')}",
            hint="build it without CMDLINE_FORCE; `paprscm kernel build` switches it off",
        )
    if kernel.papr_scm == UNKNOWN and not has_modules:
        raise ConfigError(
            f"the kernel {kernel.release} ({kernel.path}) has neither papr_scm nor its "
            "configuration (CONFIG_IKCONFIG=y) built in",
            hint="if papr_scm is a module of it, set modules= to the INSTALL_MOD_PATH of its `make "
            "modules_install`; else `paprscm kernel build --source DIR` builds one with papr_scm",
        )
    if kernel.papr_scm == ABSENT:
        raise ConfigError(
            f"the kernel {kernel.release} ({kernel.path}) has no papr_scm",
            hint="it needs CONFIG_PAPR_SCM; `paprscm kernel build --source DIR` sets it",
        )
    if kernel.papr_scm == MODULE and not has_modules:
        raise ConfigError(
            f"papr_scm is a module of the kernel {kernel.release} ({kernel.path}), "
            "and no modules were given",
            hint="set modules= to the INSTALL_MOD_PATH of its `make modules_install`",
        )


def configured(kernel: Kernel, config: Mapping[str, str]) -> Kernel:
    """Return a copy with a configuration from outside its vmlinux."""
    return dataclasses.replace(
        kernel,
        config=config,
        page_size=_configured_page_size(config),
        papr_scm=_configured_papr_scm(config),
    )


def read_config(path: Path) -> dict[str, str]:
    """The options of a .config that a package installs; {} if it cannot be read."""
    try:
        return parse_config(path.read_text(errors="replace"))
    except OSError:
        return {}


def parse_config(text: str) -> dict[str, str]:
    """The options of a .config, without "CONFIG_"; those that are off are left out."""
    options = re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE)
    return {name: value.strip() for name, value in options if value.strip() != "n"}


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError(f"the kernel {path} is not a regular file", hint=_WANT_VMLINUX)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise ConfigError(f"the kernel {path} is empty", hint=_WANT_VMLINUX)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ConfigError(f"the kernel {path} does not exist", hint=_WANT_VMLINUX) from error
    except IsADirectoryError as error:
        raise ConfigError(
            f"the kernel {path} is a folder",
            hint=f"for a source tree: `paprscm kernel build --source {path}`",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the kernel {path} cannot be read: {error.strerror}", hint=_WANT_VMLINUX
        ) from error
    with mapping:
        yield mapping


def _not_elf(path: Path, data: mmap.mmap) -> ConfigError:
    """The error for files that people give instead of a vmlinux."""
    # Documentation/arch/x86/boot.rst and Documentation/arch/arm64/booting.rst.
    if data[0x202:0x206] == b"HdrS":
        return ConfigError(f"{path} is an x86 bzImage, the guests are ppc64le", hint=_WANT_VMLINUX)
    if data[0x38:0x3C] == b"ARM\x64":
        return ConfigError(f"{path} is an arm64 Image, the guests are ppc64le", hint=_WANT_VMLINUX)
    return ConfigError(f"{path} is not an ELF file", hint=_WANT_VMLINUX)


def _check_kind(path: Path, elf: ELFFile) -> None:
    machine = elf["e_machine"]
    if machine == "EM_PPC":
        raise ConfigError(
            f"{path} is for 32-bit PowerPC (a boot wrapper or another kernel), not ppc64le",
            hint=_WANT_VMLINUX,
        )
    if machine != "EM_PPC64":
        raise ConfigError(
            f"{path} is for {_machine(machine)}, the guests are ppc64le", hint=_WANT_VMLINUX
        )
    if not elf.little_endian:
        raise ConfigError(
            f"{path} is big-endian (ppc64), the guests are little-endian (ppc64le)",
            hint="build with CONFIG_CPU_LITTLE_ENDIAN=y",
        )
    if elf["e_type"] == "ET_REL":
        raise ConfigError(
            f"{path} is an object file or a module, not a linked kernel", hint=_WANT_VMLINUX
        )


def _machine(name: str | int) -> str:
    names = {"EM_X86_64": "x86-64", "EM_386": "x86", "EM_AARCH64": "arm64", "EM_S390": "s390x"}
    return names.get(str(name), str(name).removeprefix("EM_"))


def _build_id(elf: ELFFile) -> str | None:
    segments = (part for part in elf.iter_segments() if isinstance(part, NoteSegment))
    notes = itertools.chain.from_iterable(part.iter_notes() for part in segments)
    return next((str(n["n_desc"]) for n in notes if n["n_type"] == "NT_GNU_BUILD_ID"), None)


def _search(
    pattern: re.Pattern[bytes], data: mmap.mmap | bytes, spans: list[tuple[int, int]]
) -> re.Match[bytes] | None:
    return next((m for start, end in spans if (m := pattern.search(data, start, end))), None)


def embedded_config(data: mmap.mmap | bytes, spans: list[tuple[int, int]]) -> dict[str, str] | None:
    """The configuration that CONFIG_IKCONFIG embeds in a vmlinux or configs.ko, or None.

    Args:
        data: the ELF file.
        spans: ranges of it to search, as (start, end).
    """
    match = _search(re.compile(re.escape(_CONFIG_START + b"\x1f\x8b")), data, spans)
    if match is None:
        return None
    start = match.start() + len(_CONFIG_START)
    end = data.find(_CONFIG_END, start)
    try:
        text = zlib.decompressobj(wbits=31).decompress(data[start:end])
    except zlib.error:
        return None
    return parse_config(text.decode(errors="replace"))


def _configured_page_size(config: Mapping[str, str]) -> int | None:
    return next((1024 * k for k in (4, 16, 64, 256) if f"PPC_{k}K_PAGES" in config), None)


def _configured_papr_scm(config: Mapping[str, str]) -> str:
    return {"y": BUILT_IN, "m": MODULE}.get(config.get("PAPR_SCM", "n"), ABSENT)


def _page_size(
    config: Mapping[str, str] | None, symbols: SymbolTableSection | None, data: mmap.mmap
) -> int | None:
    if config is not None:
        return _configured_page_size(config)
    if symbols is None:
        return None
    # One page of zeroes: arch/powerpc/mm/mem.c, unsigned long empty_zero_page[].
    names = symbols.stringtable
    begin = int(names["sh_offset"])
    # A linker may use the end of a longer name, here of "__kstrtab_empty_zero_page".
    matches = re.compile(rb"empty_zero_page\0").finditer(data, begin, begin + names["sh_size"])
    places = {match.start() - begin for match in matches}
    raw = data[symbols["sh_offset"] : symbols["sh_offset"] + symbols["sh_size"]]
    for name, _info, _other, _section, _value, size in _SYMBOL.iter_unpack(raw):
        if name in places and size:
            return int(size)
    return None


def _papr_scm(
    config: Mapping[str, str] | None, data: mmap.mmap, spans: list[tuple[int, int]]
) -> str:
    if config is not None:
        return _configured_papr_scm(config)
    # The driver's name, in papr_scm.c. "ibm,pmemory" is no proof: iommu.c has it, too.
    name = re.compile(rb"\0papr_scm\0")
    return BUILT_IN if _search(name, data, spans) else UNKNOWN
