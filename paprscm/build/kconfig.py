# SPDX-License-Identifier: GPL-2.0-or-later
"""Fragments of kernel configurations: read, merged, and checked against what became of them."""

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
    """One line of a fragment: the options of which a kernel must have one.

    Attributes:
        options: name without "CONFIG_" and value of each, in order of preference; "n" means off.
        optional: met by a kernel that knows none of these options.
        every_kernel: also merged over the .config of an own source tree.
    """

    options: dict[str, str]
    optional: bool = False
    every_kernel: bool = True


@dataclass(frozen=True)
class Fragment:
    """Options that a kernel must have, and for which kernels.

    Attributes:
        requirements: by the name of their first option.
        objects: number of objects that the default kernel compiles, 0 where it is not known.
    """

    requirements: dict[str, Requirement]
    objects: int

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Fragment:
        """Read fragments; in a later one options override, and so do its directives.

        Raises:
            ConfigError: a file cannot be read, or has a line that is not an option, comment or
                directive.
        """
        requirements: dict[str, Requirement] = {}
        objects = 0
        for path in paths:
            every_kernel = True
            for number, line in enumerate(_lines(path), start=1):
                if found := _DIRECTIVE.fullmatch(line):
                    words = found[1].split()
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
        """Names what the fragment asks for; comments and order do not count."""
        ordered = _text(sorted(self.values(own_tree=False).items()))
        return hashlib.sha256(ordered.encode()).hexdigest()[:16]

    def required(self, *, own_tree: bool) -> list[Requirement]:
        """Requirements on the default kernel, or on one with its own .config."""
        return [one for one in self.requirements.values() if one.every_kernel or not own_tree]

    def values(self, *, own_tree: bool) -> dict[str, str]:
        """All options, alternatives too. Of a choice the preferred one is last: kconfig takes that.

        A kernel ignores those that it does not know.
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
    """The fragment that the default kernel is made of."""
    return IMAGES / "kernel.config"


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
    return "\n".join(kept) + "\n" + _text(values.items())


def unmet(requirements: Iterable[Requirement], produced: Mapping[str, str]) -> list[Requirement]:
    """The requirements of which `produced` has no option; a module will do for built in."""
    return [
        one
        for one in requirements
        if not any(
            (got := produced.get(name, "n")) == value or (value, got) == ("y", "m")
            for name, value in one.options.items()
        )
    ]


def explain(names: Iterable[str], produced: Mapping[str, str], tree: Path) -> dict[str, str]:
    """Explain why each option did not survive, as far as its Kconfig entry shows.

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
        return NO_SUCH_OPTION
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


def _option(text: str) -> tuple[str, str] | None:
    """Name and value of an option as a .config has it."""
    if found := _OPTION.fullmatch(text):
        return found[1], found[2]
    return (found[1], "n") if (found := _OFF.fullmatch(text)) else None


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
