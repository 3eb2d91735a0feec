# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings of the suite: name, default, meaning, and sources.

Sources, each overriding the one before: the default, the `[paprscm]` section of `avocado.cfg`,
`-p name=value` of Avocado or an option of the `paprscm` command.
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paprscm.errors import ConfigError

SECTION = "paprscm"

OWN_KERNELS = ("default", "debug")
"""Values of the setting `kernel` that name a kernel built by the suite."""


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else expanded(Path("~/.cache"))) / "paprscm"


def expanded(path: Path) -> Path:
    """The path with ~ replaced by the home folder.

    Raises:
        ConfigError: this user has no home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: user {os.getuid()} has no home folder",
            hint="set HOME, or cache_dir to a folder that this user can write to",
        ) from error


def _setting(default: Any, meaning: str) -> Any:
    metadata = {"meaning": meaning}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run, under the same names in avocado.cfg, -p and the options of `paprscm`."""

    qemu: str = _setting(
        "auto", "QEMU binary: a path, 'auto' (the host's) or 'debian:SUITE' (fetched, no root)"
    )
    accel: str = _setting("auto", "'auto' (KVM only where a ppc64 host has it), 'tcg' or 'kvm'")
    cpu: str = _setting("auto", "-cpu model; 'auto' is POWER9 under TCG, 'host' under KVM")
    start: str = _setting(
        "auto", "'auto' (guests are restored from a snapshot if that works) or 'cold' (booted)"
    )
    firmware: str = _setting("vof", "'vof' (boots in 2 s) or 'slof'")
    smp: int = _setting(2, "vCPUs of a guest")
    memory_mib: int = _setting(1024, "guest memory without the DIMMs, MiB")
    kernel: str = _setting(
        "default",
        "'default' (built from Debian's source), 'debug' (the same with debug options: slower), "
        "'debian:SUITE=VERSION' (the default kernel from that version of the source), or a file: "
        "vmlinux, also compressed, zImage, .deb or tar archive",
    )
    modules: Path | None = _setting(
        None,
        "modules of a kernel that is a file: INSTALL_MOD_PATH of `make modules_install`, a .deb or "
        "a tar archive; not needed for those in the same package",
    )
    page_size: str = _setting("64k", "page size of the default or debug kernel: '64k' or '4k'")
    kernel_source: str = _setting(
        "linux-source-6.12", "Debian source package of these two kernels, also PACKAGE=VERSION"
    )
    kernel_suite: str = _setting(
        "auto", "Debian suite of kernel_source; 'auto' is the first of a list that has it"
    )
    userland_suite: str = _setting(
        "auto", "Debian suite of the userland; 'auto' is the first of a list that is complete"
    )
    mirror: str = _setting("auto", "Debian mirror; 'auto' is the one that the host's apt uses")
    offline: bool = _setting(False, "'yes': never use the network; name the missing parts")
    cache_dir: Path = _setting(_default_cache_dir, "folder for everything built or fetched")
    scratch_dir: Path = _setting(
        lambda: Path(os.environ.get("TMPDIR") or "/var/tmp"),  # noqa: S108
        "folder for the backing files of DIMMs (sparse)",
    )
    formats: str = _setting(
        "",
        "formats of the results to write into the job's folder at its end: some of json, junit, "
        "kcidb, ktap, lava, markdown, squad, separated by commas",
    )
    origin: str = _setting("paprscm", "name of this CI system in reports to KCIDB")
    logs_url: str = _setting(
        "", "address at which the job's folder can be read, ending with /, for links in reports"
    )
    database: str = _setting(
        "auto",
        "history of runs: a file, postgresql://USER@HOST/NAME, or 'auto' (paprscm/history.sqlite "
        "in the user's folder for data)",
    )
    silence_limit_s: float = _setting(
        30.0, "a booting guest that prints nothing for this long is hung, s"
    )
    boot_limit_s: float = _setting(180.0, "a guest that has not booted after this long is hung, s")
    command_limit_s: float = _setting(60.0, "default time limit of a command in the guest, s")

    def __post_init__(self) -> None:
        _one_of("accel", self.accel, ("auto", "tcg", "kvm"))
        _one_of("start", self.start, ("auto", "cold"))
        _one_of("firmware", self.firmware, ("vof", "slof"))
        _one_of("page_size", self.page_size, ("64k", "4k"))
        for name in ("kernel_suite", "userland_suite"):
            if not re.fullmatch(r"[a-z][a-z0-9-]*(,[a-z][a-z0-9-]*)*", getattr(self, name)):
                raise ConfigError(
                    f"{name}={getattr(self, name)} does not name a suite",
                    hint="'auto', a codename such as trixie, or several in order: forky,sid",
                )
        if self.page_size != "64k" and self.kernel not in OWN_KERNELS:
            raise ConfigError(
                f"page_size={self.page_size} applies to the default and the debug kernel only",
                hint=f"{self.kernel} has the page size of its build",
            )
        for name, low, high in (("smp", 1, 64), ("memory_mib", 512, 1 << 20)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is out of range", hint=f"{low} to {high}"
                )
        for name in ("silence_limit_s", "boot_limit_s", "command_limit_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0")


# No test reads them.
_OF_REPORTS = ("formats", "origin", "logs_url", "database")


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value} is not known", hint="one of " + ", ".join(allowed))


def names() -> tuple[str, ...]:
    """The names of all settings, in the order of their declaration."""
    return tuple(f.name for f in dataclasses.fields(Settings))


def meaning(name: str) -> str:
    """Return the one-line description of the setting `name`."""
    for f in dataclasses.fields(Settings):
        if f.name == name:
            return str(f.metadata["meaning"])
    raise KeyError(name)


def as_texts(chosen: Settings) -> dict[str, str]:
    """The settings of tests as texts that load() accepts."""
    texts = {True: "yes", False: "no", None: ""}
    values = {name: getattr(chosen, name) for name in names() if name not in _OF_REPORTS}
    return {
        name: texts[value] if isinstance(value, bool | None) else str(value)
        for name, value in values.items()
    }


def changed(chosen: Settings) -> dict[str, str]:
    """The settings of tests that differ from their defaults, as texts that load() accepts."""
    usual = as_texts(Settings())
    return {name: text for name, text in as_texts(chosen).items() if text != usual[name]}


def load(
    overrides: Mapping[str, str | None] | None = None, *, config: Path = Path("avocado.cfg")
) -> Settings:
    """Read the settings.

    Args:
        overrides: values from a command line; None means "not given".
        config: the ini file with a `[paprscm]` section; may be absent.

    Raises:
        ConfigError: a name is not known, or a value does not fit.
    """
    values = _from_file(config)
    for name, value in (overrides or {}).items():
        if value is not None:
            _check_name(name, "the command line")
            values[name] = value
    values.update(_source_of(values.get("kernel", "")))
    return Settings(**{name: _convert(name, value) for name, value in values.items()})


def _source_of(kernel: str) -> dict[str, str]:
    """The settings that kernel=debian:SUITE=VERSION stands for.

    Raises:
        ConfigError: a part of it is missing.
    """
    if not kernel.startswith("debian:"):
        return {}
    match = re.fullmatch(r"debian:([a-z][a-z0-9-]*)=((\d+\.\d+)\S*)", kernel)
    if match is None:
        raise ConfigError(
            f"kernel={kernel} does not name a suite and a version of the Linux source",
            hint="debian:SUITE=VERSION, such as debian:bookworm-security=6.12.107",
        )
    source = f"linux-source-{match[3]}={match[2]}"
    return {"kernel": "default", "kernel_suite": match[1], "kernel_source": source}


def _from_file(config: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(config, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} cannot be read: {error}") from error
    if not parser.has_section(SECTION):
        return {}
    values = dict(parser.items(SECTION))
    for name in values:
        _check_name(name, f"{config} [{SECTION}]")
    return values


def _check_name(name: str, source: str) -> None:
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]}?" if close else "one of " + ", ".join(names())
        raise ConfigError(f"there is no setting '{name}' ({source})", hint=hint)


def _convert(name: str, text: str) -> Any:
    kind = {f.name: str(f.type) for f in dataclasses.fields(Settings)}[name]
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text} is not a number") from error
    if kind == "bool":
        _one_of(name, text, ("yes", "no"))
        return text == "yes"
    if kind.startswith("Path"):
        return expanded(Path(text)) if text else None
    return text
