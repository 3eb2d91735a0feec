# SPDX-License-Identifier: GPL-2.0-or-later
"""Fragments of kernel configurations: parse, merge, and check against the produced .config."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import ConfigError
from paprscm.paths import IMAGES

_OPTION = re.compile(r"CONFIG_(\w+)=(\".*\"|\S+)")
_OFF = re.compile(r"# CONFIG_(\w+) is not set")
_OR = re.compile(r" or (?=(?:# )?CONFIG_|nothing$)")
_DIRECTIVE = re.compile(r"#@\s*(.*)")
_BLOCK = re.compile(r"^(?:menu)?config (\w+)\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
_DEPENDS = re.compile(r"^\s+depends on (.*)$", re.MULTILINE)

NO_SUCH_OPTION = "this kernel has no such option"


@dataclass(frozen=True)
class Requirement:
    """One line of a fragment: a kernel must have one of its options.

    Attributes:
        options: name without "CONFIG_" and value of each, in order of preference; "n" means off.
        optional: met by a kernel that has none of these options in its Kconfig.
        every_kernel: also merged over the .config of an own source tree.
    """

    options: dict[str, str]
    optional: bool = False
    every_kernel: bool = True


@dataclass(frozen=True)
class Fragment:
    """Options that a kernel must have, and the kernels that need them.

    Attributes:
        requirements: requirements by the name of their first option.
        objects: number of objects of the default kernel; 0 if unknown.
    """

    requirements: dict[str, Requirement]
    objects: int

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Fragment:
        """Parse fragments; options and directives of a later one override.

        Raises:
            ConfigError: a file cannot be read, or has a line that is not an option, comment or
                directive.
        """
        requirements: dict[str, Requirement] = {}
        objects = 0
        for path in paths:
            every_kernel = True
            for number, line in enumerate(_lines(path), start=1):
                if match := _DIRECTIVE.fullmatch(line):
                    words = match[1].split()
                    if words == ["every", "kernel"]:
                        every_kernel = True
                    elif words == ["default", "kernel"]:
                        every_kernel = False
                    elif len(words) == 2 and words[0] == "objects" and words[1].isdecimal():
                        objects = int(words[1])
                    else:
                        raise ConfigError(f"{path}:{number}: unknown directive: {line}")
                    continue
                *first, last = _OR.split(line)
                optional = bool(first) and last == "nothing"
                texts = first if optional else [*first, last]
                options = dict(option for text in texts if (option := _option(text)))
                if len(options) == len(texts):
                    name = next(iter(options))
                    before = requirements.get(name)
                    everywhere = every_kernel or (before is not None and before.every_kernel)
                    requirements[name] = Requirement(options, optional, everywhere)
                elif line and not line.startswith("#"):
                    raise ConfigError(f"{path}:{number}: not an option or a comment: {line}")
        return cls(requirements, objects)

    @property
    def digest(self) -> str:
        """Digest of the options, independent of comments and order."""
        ordered = _text(sorted(self.values(own_tree=False).items()))
        return hashlib.sha256(ordered.encode()).hexdigest()[:16]

    def required(self, *, own_tree: bool) -> list[Requirement]:
        """Requirements of the default kernel, or of one with its own .config."""
        return [one for one in self.requirements.values() if one.every_kernel or not own_tree]

    def values(self, *, own_tree: bool) -> dict[str, str]:
        """All options with alternatives; kconfig takes the last of a choice, the preferred one.

        kconfig ignores unknown options.
        """
        return {
            name: value
            for one in self.required(own_tree=own_tree)
            for name, value in reversed(one.options.items())
        }

    def text(self, *, own_tree: bool) -> str:
        """The options as lines of a .config."""
        return _text(self.values(own_tree=own_tree).items())


def default_fragment() -> Path:
    """The fragment of the default kernel."""
    return IMAGES / "kernel.config"


def fragments(page_size: str, *, debug: bool = False) -> list[Path]:
    """The default kernel's fragments; a later one overrides.

    Args:
        page_size: "64k" or "4k".
        debug: fragments of the debug kernel.
    """
    base = default_fragment()
    kinds = ["4k"] * (page_size == "4k") + ["debug"] * debug
    return [base, *(base.with_name(f"kernel-{kind}.config") for kind in kinds)]


def merge(base: str, options: Mapping[str, str]) -> str:
    """A .config with `options` over those of `base`, for `make olddefconfig`.

    A driver that is a module in `base` stays a module, even if `options` have it built in.
    """
    lines = []
    modules = set()
    for line in base.splitlines():
        match = _OPTION.fullmatch(line.strip()) or _OFF.fullmatch(line.strip())
        if match and match[1] in options:
            if line.strip().endswith("=m") and options[match[1]] == "y":
                modules.add(match[1])
            continue
        lines.append(line)
    values = {name: "m" if name in modules else value for name, value in options.items()}
    return "\n".join(lines) + "\n" + _text(values.items())


def unmet(requirements: Iterable[Requirement], produced: Mapping[str, str]) -> list[Requirement]:
    """The requirements without an option in `produced`; a module counts as built in."""
    return [
        one
        for one in requirements
        if not any(
            (actual := produced.get(name, "n")) == value or (value, actual) == ("y", "m")
            for name, value in one.options.items()
        )
    ]


def explain(names: Iterable[str], produced: Mapping[str, str], tree: Path) -> dict[str, str]:
    """Reason why each option is not set, according to its Kconfig entry.

    Args:
        names: options, without "CONFIG_".
        produced: the produced configuration.
        tree: the kernel source.
    """
    options = set(names)
    entries: dict[str, str] = {}
    for path in tree.rglob("Kconfig*"):
        if not path.is_file():
            continue
        for name, body in _BLOCK.findall(path.read_text(errors="replace") + "\n"):
            if name in options:
                # Without the help text.
                facts = re.split(r"^\s+help\b", body, maxsplit=1, flags=re.MULTILINE)[0]
                entries[name] = entries.get(name, "") + facts
    return {name: _reason(entries.get(name), produced, name) for name in options}


def _reason(entry: str | None, produced: Mapping[str, str], name: str) -> str:
    if entry is None:
        return NO_SUCH_OPTION
    unset = [
        symbol
        for line in _DEPENDS.findall(entry)
        for symbol in re.findall(r"(?<![!\w])([A-Z][A-Z0-9_]*)\b(?!\s*=)", line)
        if symbol not in produced
    ]
    if unset:
        return "depends on " + ", ".join(dict.fromkeys(unset)) + ", not set"
    if not re.search(r'^\s+(?:bool|tristate|int|hex|string|prompt)[ \t]+"', entry, re.MULTILINE):
        return "it cannot be set directly, other options select it"
    return f"it became {produced.get(name, 'n')}"


def _option(text: str) -> tuple[str, str] | None:
    """Name and value of an option as a .config has it."""
    if match := _OPTION.fullmatch(text):
        return match[1], match[2]
    return (match[1], "n") if (match := _OFF.fullmatch(text)) else None


def _text(options: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f"# CONFIG_{name} is not set\n" if value == "n" else f"CONFIG_{name}={value}\n"
        for name, value in options
    )


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the kernel config fragment {path} cannot be read: {error}") from error
