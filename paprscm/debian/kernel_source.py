# SPDX-License-Identifier: GPL-2.0-or-later
"""The Linux source of the default and debug kernel: a Debian package, in the cache."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from paprscm.debian.packages import ARCH, Archive, first_available, suites
from paprscm.errors import ConfigError, HostError
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.log import step
from paprscm.settings import Settings

SOURCE_KIND = "kernel-source"
"""Kind of its cache entry."""

_NEEDS_BYTES = 400_000_000

# Every architecture except powerpc.
_OTHER_ARCHITECTURES = ("[a-o]*", "parisc", "[q-z]*")
# Kconfig files and Makefiles stay: every configuration reads them.
_CODE_NOT_BUILT = (
    *("drivers/accel", "drivers/gpu", "drivers/iio", "drivers/infiniband", "drivers/media"),
    *("drivers/net/ethernet", "drivers/net/wireless", "drivers/staging", "sound"),
)
ARCHIVE = "linux.tar.xz"
"""Name of the source archive in an entry of the cache."""

_TEXT_SUFFIXES = ("rst", "txt", "yaml", "svg", "json", "dot", "py")


def _source_fields(settings: Settings, suite: str) -> dict[str, str]:
    return {"package": settings.kernel_source, "suite": suite}


def series(settings: Settings) -> str:
    """The series of the source, "6.12"."""
    return settings.kernel_source.removeprefix("linux-source-").partition("=")[0]


def _wanted(settings: Settings) -> str:
    """The package for apt; a version without Debian's revision means any revision."""
    package, _, version = settings.kernel_source.partition("=")
    if not version:
        return package
    return f"{package}={version}" if "-" in version else f"{package}={version}-*"


def find_source(cache: Cache, settings: Settings) -> Path | None:
    """The cache entry with archive and version of the source package, of the first suite."""
    for suite in suites(settings.kernel_suite):
        if entry := cache.find(SOURCE_KIND, _source_fields(settings, suite)):
            return entry.path
    return None


def fetch_source(archive: Archive, settings: Settings, proceed: Callable[[], None]) -> Path:
    """Download the source from the first suite that has it; return the entry as find_source().

    Args:
        archive: the mirror; its cache keeps the source.
        settings: kernel_source and kernel_suite.
        proceed: called several times a second; may raise to end the download.

    Raises:
        UnavailableError: no suite has the package.
        ConfigError: the package holds no Linux source.
        HostError: as Archive.download().
    """
    package = settings.kernel_source.partition("=")[0]

    def attempt(suite: str) -> Path:
        def fill(entry: Path) -> None:
            root = entry / "root"
            with step(f"fetching {package} (Debian {suite})"):
                download = archive.download(
                    [_wanted(settings)],
                    suite=suite,
                    # The package is in the index of each architecture. The userland needs that of
                    # ARCH, but takes nothing from security suites, and every mirror has amd64.
                    arch="amd64" if suite.endswith("-security") else ARCH,
                    title=package,
                    alone=True,
                    proceed=proceed,
                )
                download.unpack(root, title=package)
                archives = sorted((root / "usr/src").glob("linux-source-*.tar.xz"))
                if len(archives) != 1:
                    raise ConfigError(
                        f"the package {package} of {suite} holds no Linux source",
                        hint="set kernel_source to a package such as linux-source-6.12",
                    )
                (entry / "version").write_text(_package_version(root, package) + "\n")
                archives[0].rename(entry / ARCHIVE)
                shutil.rmtree(root)
                download.remove()

        fields = _source_fields(settings, suite)
        return archive.cache.ensure(SOURCE_KIND, fields, fill, needs_bytes=_NEEDS_BYTES).path

    return first_available(suites(settings.kernel_suite), attempt, title=package)


def _package_version(root: Path, package: str) -> str:
    changelog = root / "usr/share/doc" / package / "changelog.Debian.gz"
    try:
        with gzip.open(changelog, "rt", encoding="utf-8", errors="replace") as file:
            first = file.readline()
    except (OSError, EOFError) as error:
        raise HostError(f"the package {package} has no readable changelog: {error}") from error
    match = re.match(r"\S+ \(([^)]+)\)", first)
    if match is None:
        raise HostError(f"the changelog of {package} does not begin with a version: {first!r}")
    return match[1]


def unpack_source(archive: Path, tree: Path) -> None:
    """Unpack the source without the files that a powerpc build never reads: half of all."""
    code = [f"arch/{name}" for name in _OTHER_ARCHITECTURES] + list(_CODE_NOT_BUILT)
    excluded = [f"*/{folder}/*.{suffix}" for folder in code for suffix in ("[chS]", "dts", "dtsi")]
    excluded += [f"*/Documentation/*.{suffix}" for suffix in _TEXT_SUFFIXES]
    excluded += ["*/tools/testing", "*/tools/perf", "*/rust/*.rs"]
    tree.mkdir()
    with step("unpacking the kernel source"):
        process.run(
            [
                # Debian compresses in blocks, which xz can unpack in parallel.
                *("tar", "--use-compress-program=xz -T0", "-xf", archive, "-C", tree),
                *("--strip-components=1", "--wildcards"),
                *("--no-anchored", "--no-same-owner"),
                *(f"--exclude={pattern}" for pattern in excluded),
            ]
        )
