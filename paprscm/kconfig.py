# SPDX-License-Identifier: GPL-2.0-or-later
"""Fragments of kernel configurations: read, merged, and checked against what became of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import ConfigError

_OPTION = re.compile(r"CONFIG_(\w+)=(\S.*)")
_OFF = re.compile(r"# CONFIG_(\w+) is not set")
_DIRECTIVE = re.compile(r"#@\s*(.*)")
_BLOCK = re.compile(r"^(?:menu)?config (\w+)\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
_DEPENDS = re.compile(r"^\s+depends on (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Fragment:
    """Options that a kernel must have, and for which kernels.

    Attributes:
        options: all of them, without "CONFIG_"; "n" means off.
        every: those that are also merged over an own tree's .config.
        objects: how many the default kernel compiles, 0 where nobody measured it.
    """

    options: dict[str, str]
    every: dict[str, str]
    objects: int

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Fragment:
        """Read fragments; in a later one options override, and so do its directives.

        Raises:
            ConfigError: a file cannot be read, or a line of it is no option, comment or directive.
        """
        options: dict[str, str] = {}
        every: dict[str, str] = {}
        objects = 0
        for path in paths:
            everywhere = True
            for number, line in enumerate(_lines(path), start=1):
                if found := _DIRECTIVE.fullmatch(line):
                    words = found[1].split()
                    if words == ["every", "kernel"]:
                        everywhere = True
                    elif words == ["default", "kernel"]:
                        everywhere = False
                    elif len(words) == 2 and words[0] == "objects" and words[1].isdecimal():
                        objects = int(words[1])
                    else:
                        raise ConfigError(f"{path}:{number}: unknown directive: {line}")
                    continue
                if found := _OPTION.fullmatch(line):
                    name, value = found[1], found[2]
                elif found := _OFF.fullmatch(line):
                    name, value = found[1], "n"
                elif not line or line.startswith("#"):
                    continue
                else:
                    raise ConfigError(f"{path}:{number}: not an option or a comment: {line}")
                options[name] = value
                if everywhere or name in every:
                    every[name] = value
        return cls(options, every, objects)

    @property
    def digest(self) -> str:
        """Names what the fragment asks for; comments and order do not count."""
        return hashlib.sha256(_text(dict(sorted(self.options.items()))).encode()).hexdigest()[:16]

    def text(self, *, own_tree: bool) -> str:
        """The options as lines of a .config."""
        return _text(self.every if own_tree else self.options)


def default_fragment() -> Path:
    """The fragment that the default kernel is made of."""
    return Path(__file__).resolve().parent.parent / "images" / "kernel.config"


def fragments(page_size: str, *, debug: bool = False) -> list[Path]:
    """The default kernel's fragments; a later one overrides.

    Args:
        page_size: "64k" or "4k".
        debug: of the kernel that watches itself.
    """
    base = default_fragment()
    kinds = ["4k"] * (page_size == "4k") + ["debug"] * debug
    return [base, *(base.with_name(f"kernel-{kind}.config") for kind in kinds)]


def merge(base: str, options: Mapping[str, str]) -> str:
    """A .config with `options` over those of `base`, for `make olddefconfig`.

    A driver that is a module in `base` stays one where `options` want it built in: that is how its
    owner runs it.
    """
    kept = []
    modules = set()
    for line in base.splitlines():
        found = _OPTION.fullmatch(line.strip()) or _OFF.fullmatch(line.strip())
        if found and found[1] in options:
            if line.strip().endswith("=m") and options[found[1]] == "y":
                modules.add(found[1])
            continue
        kept.append(line)
    values = {name: "m" if name in modules else value for name, value in options.items()}
    return "\n".join(kept) + "\n" + _text(values)


def unmet(wanted: Mapping[str, str], produced: Mapping[str, str]) -> list[str]:
    """Names of the wanted options that `produced` does not have; a module will do for built in."""
    return [
        name
        for name, value in wanted.items()
        if (got := produced.get(name, "n")) != value and (value, got) != ("y", "m")
    ]


def explain(names: Iterable[str], produced: Mapping[str, str], tree: Path) -> dict[str, str]:
    """Why each option did not survive, as far as its Kconfig entry tells.

    Args:
        names: options, without "CONFIG_".
        produced: the configuration that came out.
        tree: the kernel source.
    """
    wanted = set(names)
    entries: dict[str, str] = {}
    for path in tree.rglob("Kconfig*"):
        if not path.is_file():
            continue
        for name, body in _BLOCK.findall(path.read_text(errors="replace") + "\n"):
            if name in wanted:
                # Without the help text, which may speak of anything.
                facts = re.split(r"^\s+help\b", body, maxsplit=1, flags=re.MULTILINE)[0]
                entries[name] = entries.get(name, "") + facts
    return {name: _reason(entries.get(name), produced, name) for name in wanted}


def _reason(entry: str | None, produced: Mapping[str, str], name: str) -> str:
    if entry is None:
        return "this kernel has no such option"
    needed = [
        symbol
        for line in _DEPENDS.findall(entry)
        for symbol in re.findall(r"(?<![!\w])([A-Z][A-Z0-9_]*)\b(?!\s*=)", line)
        if symbol not in produced
    ]
    if needed:
        return "depends on " + ", ".join(dict.fromkeys(needed)) + ", not set"
    if not re.search(r'^\s+(?:bool|tristate|int|hex|string|prompt)[ \t]+"', entry, re.MULTILINE):
        return "it cannot be set directly, others select it"
    return f"it came out as {produced.get(name, 'n')}"


def _text(options: Mapping[str, str]) -> str:
    return "".join(
        f"# CONFIG_{name} is not set\n" if value == "n" else f"CONFIG_{name}={value}\n"
        for name, value in options.items()
    )


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the kernel config fragment {path} cannot be read: {error}") from error
