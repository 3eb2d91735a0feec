# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the host, and name missing packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from paprscm.debian import packages as debian
from paprscm.debian import rootfs
from paprscm.debian.apt import UnavailableError
from paprscm.debian.packages import Archive
from paprscm.debian.toolchain import PREFIX
from paprscm.emulator import binary
from paprscm.emulator.capabilities import BINARY, sanitizers
from paprscm.errors import ConfigError, Error
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.host.resources import compute_budget, read_resources
from paprscm.paths import IMAGES
from paprscm.settings import Settings

HOST_PACKAGES = IMAGES / "host-packages"
_CROSS_COMPILER = f"{PREFIX}gcc"

# A new cache holds kernel source, kernel objects, and the userland with its packages at once.
_CACHE_NEEDS_BYTES = 6_000_000_000
# Two DIMMs of 512 MiB in each of a few concurrent guests.
_SCRATCH_NEEDS_BYTES = 4_000_000_000
_NOT_DISKS = ("tmpfs", "ramfs", "devtmpfs", "overlay")

Grade = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        grade: "ok", "missing" (a requirement is absent or unusable), or "note" (usable with
            restrictions).
        subject: the checked object, in a word or two.
        text: the result, for a person.
        packages: packages of this host's distribution that fix it.
    """

    grade: Grade
    subject: str
    text: str
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostPackage:
    """One line of images/host-packages.

    Attributes:
        name: the package of Debian and Ubuntu.
        proof: a command, an absolute path, or "module:" and a Python module.
        reason: its purpose.
        fedora: the package of Fedora; "" if Fedora has none and the suite runs without it.
    """

    name: str
    proof: str
    reason: str
    fedora: str = ""

    @property
    def is_installed(self) -> bool:
        """True if the package's command, file or module exists."""
        if self.proof.startswith("module:"):
            return importlib.util.find_spec(self.proof.removeprefix("module:")) is not None
        if self.proof.startswith("/"):
            return Path(self.proof).exists()
        # Some tools are in /sbin, which a user's PATH need not have.
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        return shutil.which(self.proof, path=path) is not None


def parse_host_packages(text: str) -> list[HostPackage]:
    """Parse a list such as images/host-packages.

    Raises:
        ConfigError: a line has no proof.
    """
    packages = []
    for number, line in enumerate(text.splitlines(), 1):
        entry, _, reason = line.partition("#")
        words = entry.split()
        if not words:
            continue
        if len(words) not in (2, 3):
            raise ConfigError(f"host packages, line {number}: '{line}' is not: package proof")
        fedora = words[2] if len(words) == 3 else words[0]
        fedora = "" if fedora == "-" else fedora
        packages.append(HostPackage(words[0], words[1], reason.strip(), fedora))
    return packages


def system() -> Literal["debian", "fedora", "other"]:
    """Family of this host's distribution, which decides about package names."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return "other"
    names = {release.get("ID"), *release.get("ID_LIKE", "").split()}
    if names & {"debian", "ubuntu"}:
        return "debian"
    return "fedora" if names & {"fedora", "rhel"} else "other"


def inspect_host(settings: Settings) -> list[Finding]:
    """Check all requirements of the suite; build nothing.

    Only package indexes are downloaded.
    """
    cache = Cache(settings.cache_dir)
    findings = _packages(parse_host_packages(HOST_PACKAGES.read_text()))
    findings += _python_packages()
    findings += _qemu(cache, settings)
    findings += _cross_compiler()
    findings += _concurrency(settings)
    findings.append(_folder("cache", settings.cache_dir, _CACHE_NEEDS_BYTES))
    findings.append(_folder("scratch", settings.scratch_dir, _SCRATCH_NEEDS_BYTES, durable=True))
    findings += _userland(settings)
    return findings


def is_broken(findings: Sequence[Finding]) -> bool:
    """Return True if a requirement is missing."""
    return any(finding.grade == "missing" for finding in findings)


def install_line(findings: Sequence[Finding]) -> str | None:
    """The command that installs every missing package, or None."""
    packages = " ".join(dict.fromkeys(name for finding in findings for name in finding.packages))
    tools = {"debian": "apt install", "fedora": "dnf install", "other": "Debian's names:"}
    return f"{tools[system()]} {packages}" if packages else None


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print the findings as a table, and the command that installs missing packages.

    Args:
        findings: the findings.
        console: the destination; None: standard output.
    """
    console = console or Console()
    styles = {"ok": "green", "missing": "bold red", "note": "yellow"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        style = styles[finding.grade]
        table.add_row(f"[{style}]{finding.grade}[/]", finding.subject, _plain(finding.text))
    console.print(table)
    if line := install_line(findings):
        # Not wrapped, so that it can be copied.
        console.print(f"\n{line}", soft_wrap=True, highlight=False, markup=False)


def _plain(text: str) -> str:
    # Rich interprets [...] as markup.
    return text.replace("[", r"\[")


def _packages(required: Sequence[HostPackage]) -> list[Finding]:
    kind = system()
    names = [
        (package, package.fedora if kind == "fedora" else package.name) for package in required
    ]
    absent = [(package, name) for package, name in names if name and not package.is_installed]
    if not absent:
        return [Finding("ok", "host packages", f"all {len(required)} of them")]
    if kind == "other":
        return [
            Finding(
                "missing",
                "tool",
                f"{package.proof}: {package.reason} (Debian and Ubuntu: {name}, "
                f"Fedora: {package.fedora or 'none'})",
                (name,),
            )
            for package, name in absent
        ]
    return [
        Finding("missing", "package", f"{name}: {package.reason}", (name,))
        for package, name in absent
    ]


def _python_packages() -> list[Finding]:
    try:
        required = importlib.metadata.requires("paprscm") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("missing", "python", "the project is not installed; run tools/setup")]
    # Extras are for development only.
    names = [re.split(r"[\s<>=!~;\[(]", line)[0] for line in required if "extra ==" not in line]
    absent = [name for name in names if not _is_installed(name)]
    if absent:
        return [
            Finding("missing", "python", f"not installed: {', '.join(absent)}; run tools/setup")
        ]
    return [Finding("ok", "python", f"{platform.python_version()}, all {len(names)} packages")]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _qemu(cache: Cache, settings: Settings) -> list[Finding]:
    if settings.qemu.startswith("debian:") and not binary.is_fetched(cache, settings.qemu):
        return [Finding("note", "QEMU", f"{settings.qemu} will be fetched by the first run")]
    if settings.qemu == "auto" and shutil.which(BINARY) is None:
        # Already listed among the host packages.
        return []
    try:
        qemu = binary.resolve(Archive.of(settings), settings.qemu)
    except Error as error:
        return [Finding("missing", "QEMU", str(error))]
    lacking = [
        text
        for present, text in (
            (qemu.has_pmem, "no libpmem, so tests of pmem=on are cancelled"),
            (qemu.has_pmem_override, "no pmem-override, so its tests are cancelled"),
            (qemu.has_vof or settings.firmware == "slof", "no x-vof, so set firmware=slof"),
            (
                not qemu.missing_for_guests,
                f"no {', '.join(qemu.missing_for_guests)}, so tests with guests are cancelled",
            ),
        )
        if not present
    ]
    try:
        sanitizers(qemu.path)
    except Error as error:
        lacking.append(f"{error.message}, so tests that need it are cancelled")
    abilities = "; ".join(lacking) if lacking else "spapr-nvdimm, pmem, pmem-override, x-vof"
    grade: Grade = "note" if lacking else "ok"
    findings = [Finding(grade, "QEMU", f"{qemu.version_text}: {abilities}")]
    try:
        accel, reason = binary.accel_and_reason(settings.accel, qemu)
    except Error as error:
        return [*findings, Finding("missing", "accelerator", str(error))]
    text = f"{accel.upper()}: {reason}" if reason else accel.upper()
    return [*findings, Finding("ok", "accelerator", text)]


def _cross_compiler() -> list[Finding]:
    if shutil.which(_CROSS_COMPILER) is None:
        # Already listed among the host packages.
        return []
    try:
        version = process.run([_CROSS_COMPILER, "-dumpfullversion"], timeout_s=20).text
    except Error as error:
        return [Finding("missing", "cross gcc", str(error))]
    return [Finding("ok", "cross gcc", f"{version} ({_CROSS_COMPILER})")]


def _concurrency(settings: Settings) -> list[Finding]:
    available = read_resources()
    text = f"{available.cpus_text}, {available.memory_text}"
    machine = Finding("ok", "machine", text)
    if available.cpus < 2:
        machine = Finding("note", "machine", f"{text}; expect twice the usual durations")
    decided = compute_budget(available, settings)
    return [machine, Finding("ok" if decided.fits else "note", "concurrency", decided.reason)]


def _folder(subject: str, folder: Path, needs_bytes: int, *, durable: bool = False) -> Finding:
    # The folder may not exist yet: check its nearest existing ancestor.
    folder = folder.absolute()
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "missing", subject, f"{folder}: not writable; set {subject}_dir to a folder that is"
        )
    kind = filesystem_type(place)
    free = shutil.disk_usage(place).free
    text = f"{folder} ({kind}), {free / 1e9:.1f} GB free"
    if durable and kind in _NOT_DISKS:
        return Finding(
            "note", subject, f"{text}; fdatasync has no effect there: set {subject}_dir to a disk"
        )
    if free < needs_bytes:
        return Finding("note", subject, f"{text}; {needs_bytes / 1e9:.0f} GB may be needed")
    return Finding("ok", subject, text)


def filesystem_type(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds `path`, as the kernel names it ("ext4").

    Args:
        path: an existing path.
        mountinfo: see proc(5).
    """
    path = path.resolve()
    best, kind = -1, "unknown"
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        # Spaces in the mount point are written as \040.
        point = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), before.split()[4]))
        # Of two mounts on one point the later hides the earlier.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def _userland(settings: Settings) -> list[Finding]:
    cache = Cache(settings.cache_dir)
    candidates = debian.suites(settings.userland_suite)
    for suite in candidates:
        if rootfs.find_rootfs(cache, suite=suite):
            return [Finding("ok", "userland", f"Debian {suite}, in the cache")]
    findings = []
    for suite in candidates:
        try:
            size_bytes, absent = Archive.of(settings).absent_files(
                rootfs.packages(), suite=suite, arch=debian.ARCH
            )
        except UnavailableError as error:
            findings.append(Finding("note", "userland", str(error)))
            continue
        except Error as error:
            return [*findings, Finding("missing", "mirror", str(error))]
        if not absent:
            text = f"Debian {suite} can be fetched, {size_bytes / 1e6:.0f} MB"
            return [*findings, Finding("ok", "userland", text)]
        text = f"Debian {suite}: the mirror lacks {', '.join(absent)}"
        findings.append(Finding("note", "userland", text))
    text = f"no suite of {', '.join(candidates)} is complete on the mirror; set mirror="
    return [*findings, Finding("missing", "mirror", text)]
