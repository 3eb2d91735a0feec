# SPDX-License-Identifier: GPL-2.0-or-later
"""Download Debian packages of any suite and architecture and unpack them, without root.

An interrupted download continues in the next run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from paprscm import log
from paprscm.debian.apt import (
    DOWNLOADS,
    SOURCE,
    AptSource,
    PackageFile,
    UnavailableError,
    absent_files,
)
from paprscm.errors import ConfigError, HostError
from paprscm.host.cache import Cache
from paprscm.settings import Settings

ARCH = "ppc64el"
"""Debian's name of the guests' architecture."""

AUTO_SUITES = ("trixie", "bookworm", "forky", "sid")
"""Suites that the setting 'auto' stands for, in this order."""

_MERGED = ("bin", "sbin", "lib", "lib64")
_MIRROR_HINT = "set mirror= to the URI of a Debian mirror, such as the one in /etc/apt/sources.list"

T = TypeVar("T")


@dataclass(frozen=True)
class Download:
    """Packages and all their dependencies, complete in a folder.

    Attributes:
        suite: the Debian suite that they are from.
        folder: folder of the files; remove() deletes it.
        files: one file for each package.
    """

    suite: str
    folder: Path
    files: tuple[PackageFile, ...]

    def unpack(self, target: Path, *, title: str) -> dict[str, str]:
        """Unpack all packages into `target`; no maintainer script runs.

        Args:
            target: a folder that does not exist or is empty. On an error its content is undefined.
            title: the progress bar's title.

        Returns:
            The version of each package.

        Raises:
            HostError: a package cannot be unpacked, or no space is left.
        """
        for name in _MERGED:
            # As on every Debian since 12; packages up to Debian 12 still have files in /lib and
            # /bin, and need these links.
            (target / "usr" / name).mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(f"usr/{name}")
        unpacked = 0
        with log.progress(f"{title}: unpack", self.size_bytes, unit="bytes") as bar:
            for file in self.files:
                unpack_package(self.folder / file.name, target)
                unpacked += file.size_bytes
                bar.update(unpacked)
        for name in _MERGED:
            if not any((target / "usr" / name).iterdir()):
                (target / name).unlink()
                (target / "usr" / name).rmdir()
        return {file.package: file.version for file in self.files}

    @property
    def size_bytes(self) -> int:
        """The size of all package files."""
        return sum(file.size_bytes for file in self.files)

    def remove(self) -> None:
        """Delete the package files."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Archive:
    """A Debian mirror, and the folder for its downloads.

    Attributes:
        cache: downloads are kept in a folder below its root.
        mirror: URI of the mirror, or 'auto' for that of the host's apt.
        offline: never use the network.
    """

    cache: Cache
    mirror: str = "auto"
    offline: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Archive:
        """The archive for the settings."""
        return cls(Cache(settings.cache_dir), settings.mirror, settings.offline)

    def extract(
        self, packages: Sequence[str], *, suite: str, arch: str, target: Path, title: str
    ) -> dict[str, str]:
        """Download packages with all dependencies, unpack them into `target`, delete the files.

        Arguments and errors are those of download() and Download.unpack().
        """
        download = self.download(packages, suite=suite, arch=arch, title=title)
        versions = download.unpack(target, title=title)
        download.remove()
        return versions

    def download(
        self,
        packages: Sequence[str],
        *,
        suite: str,
        arch: str,
        title: str,
        alone: bool = False,
        proceed: Callable[[], None] = lambda: None,
    ) -> Download:
        """Download packages and all their dependencies.

        Args:
            packages: names of binary packages.
            suite: codename or suite name ("trixie", "sid").
            arch: Debian architecture ("ppc64el").
            title: name of the download, for messages and the progress bar.
            alone: without the dependencies.
            proceed: called several times a second; may raise to end the download.

        Raises:
            UnavailableError: the suite or a package does not exist, files are missing from the
                mirror, or do not match Debian's signatures.
            ConfigError: the mirror's URI is invalid, or the host's apt has no Debian mirror.
            HostError: offline, apt is missing, the mirror cannot be reached, the download was
                interrupted, or no space.
        """
        source = self._source(suite, arch, title, proceed)
        with self.cache.lock(f"download-{source.key(packages)}", purpose=f"downloads the {title}"):
            folder = self._root / source.key(packages)
            files = source.plan(packages, alone=alone)
            (folder / "partial").mkdir(parents=True, exist_ok=True)
            source.fetch(packages, files, folder, alone=alone)
        return Download(suite, folder, files)

    def fetch_source(
        self, package: str, *, suite: str, version: str = "", target: Path, title: str
    ) -> str:
        """Download the newest version of a source package whose files the mirror has.

        Args:
            package: name of the source package.
            suite: codename or suite name.
            version: upstream's version, or a complete one; "": any.
            target: a folder of the cache, for the files.
            title: name of the download, for messages and the progress bar.

        Returns:
            The version.

        Raises:
            As download().
        """
        source = self._source(suite, SOURCE, title, lambda: None)
        folder = self._root / source.key([package])

        def attempt(exact: str) -> str:
            files = source.plan_source(package, exact)
            folder.mkdir(parents=True, exist_ok=True)
            source.fetch_source(package, exact, files, folder)
            for file in files:
                (folder / file.name).rename(target / file.name)
            shutil.rmtree(folder)
            return exact

        with self.cache.lock(f"download-{folder.name}", purpose=f"downloads the {title}"):
            versions = source.source_versions(package, version)
            return first_available(versions, attempt, title=title, kind="version")

    def absent_files(
        self, packages: Sequence[str], *, suite: str, arch: str
    ) -> tuple[int, list[str]]:
        """Ask the mirror for each package file without downloading it.

        Returns:
            The size of all files, bytes, and the names of those that the mirror lacks.

        Raises:
            As download().
        """
        source = self._source(suite, arch, "packages", lambda: None)
        files = source.plan(packages)
        return sum(file.size_bytes for file in files), [file.name for file in absent_files(files)]

    def prune(self, *, unused_for_s: float) -> None:
        """Remove indexes and interrupted downloads that were not used for `unused_for_s`."""
        for folder in self._root.glob("*"):
            if time.time() - folder.stat().st_mtime >= unused_for_s:
                with self.cache.lock(
                    f"download-{folder.name}", purpose="prunes", wait=False
                ) as locked:
                    if locked:
                        shutil.rmtree(folder)

    @property
    def _root(self) -> Path:
        return self.cache.root / DOWNLOADS

    def _source(self, suite: str, arch: str, title: str, proceed: Callable[[], None]) -> AptSource:
        if self.offline:
            raise HostError(
                f"offline=yes, and the cache {self.cache.root} lacks the {title} "
                f"(Debian {suite}, {arch})",
                hint="on a machine with network: `paprscm image`, `paprscm cache export FILE`; "
                "here: `paprscm cache import FILE`",
            )
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise HostError(
                "this host lacks apt-get or dpkg-deb, which fetch Debian packages",
                hint="install the packages apt and dpkg (Fedora has them, too), or "
                "`paprscm cache import` what another machine exported",
            )
        mirror = resolve_mirror(self.mirror, suite)
        source = AptSource(self.cache, mirror, suite, arch, title, proceed)
        source.update()
        return source


def resolve_mirror(setting: str, suite: str = "") -> str:
    """The URI of the mirror with this suite, without a trailing slash.

    Security suites are on a mirror of their own, whose URI differs from that of the main one in its
    last part only, debian-security.

    Args:
        setting: a URI, or 'auto' for the Debian mirror of the host's apt.
        suite: the suite; "": one of the main mirror.

    Raises:
        ConfigError: it is not a URI, or the host's apt has no Debian mirror.
    """
    mirror = _main_mirror(setting)
    if suite.endswith("-security") and mirror.endswith("/debian"):
        return f"{mirror}-security"
    return mirror


def _main_mirror(setting: str) -> str:
    if setting != "auto":
        if not re.fullmatch(r"[a-z+]+:/[^\s\[\]]+", setting):
            raise ConfigError(f"mirror={setting} is not a URI", hint=_MIRROR_HINT)
        return setting.rstrip("/")
    if shutil.which("apt-get") is None:
        raise ConfigError("this host has no apt with the URI of a Debian mirror", hint=_MIRROR_HINT)
    for label, site in _apt_sites("--release-info"):
        if label == "Debian":
            return site
    # Before the first `apt-get update` apt does not know the labels.
    for _, site in _apt_sites("--no-release-info"):
        if site.endswith("/debian"):
            return site
    raise ConfigError("the host's apt sources list no Debian mirror", hint=_MIRROR_HINT)


def suites(setting: str) -> tuple[str, ...]:
    """The suites to try, in order.

    Args:
        setting: 'auto', or one or more suites separated by commas.
    """
    return AUTO_SUITES if setting == "auto" else tuple(setting.split(","))


def first_available(
    candidates: Sequence[str], attempt: Callable[[str], T], *, title: str, kind: str = "suite"
) -> T:
    """The result of the first suite without an UnavailableError.

    Each skipped suite is logged with the reason.

    Args:
        candidates: the suites, preferred first.
        attempt: called with one suite after the other.
        title: name of the result, for messages.
        kind: name of what the candidates are, if not suites.

    Raises:
        UnavailableError: no suite can provide it; with the reason of each.
    """
    failures: list[UnavailableError] = []
    for suite in candidates:
        try:
            return attempt(suite)
        except UnavailableError as error:
            failures.append(error)
            if suite != candidates[-1]:
                log.logger.info("%s; trying the next %s", error.message, kind)
    if len(failures) == 1:
        raise failures[0]
    reasons = "".join(f"\n    {error.message}" for error in failures)
    raise UnavailableError(
        f"no {kind} of {', '.join(candidates)} can provide the {title}:{reasons}",
        hint="try again later (a mirror may be in the middle of an update), or set mirror=",
    )


def unpack_package(package: Path, target: Path) -> None:
    """Unpack the files of a .deb into a folder; no maintainer script runs.

    Raises:
        HostError: it cannot be unpacked, or no space is left.
    """
    # Each of the two ends if the other or this process ends.
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reader:
        tar = ["tar", "-x", "--same-permissions", "--no-same-owner", "--keep-directory-symlink"]
        result = subprocess.run(
            [*tar, "--warning=no-timestamp", "-C", target, "-f", "-"],
            stdin=reader.stdout,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert reader.stdout is not None  # noqa: S101
        assert reader.stderr is not None  # noqa: S101
        reader.stdout.close()
        complaint = reader.stderr.read().decode(errors="replace") + result.stderr
    if result.returncode or reader.returncode:
        if "No space left" in complaint:
            raise HostError(
                f"no space left to unpack {package.name}",
                hint="free some, `paprscm cache prune`, or set cache_dir",
            )
        raise HostError(f"{package.name} cannot be unpacked: {complaint.strip()[-500:]}")


def _apt_sites(option: str) -> list[tuple[str, str]]:
    """Label and URI of each network source of the host's apt."""
    argv = ["apt-get", "indextargets", option, "--format", "$(LABEL)|$(SITE)"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    targets = [line.partition("|")[::2] for line in result.stdout.splitlines()]
    return [(label, site.rstrip("/")) for label, site in targets if not site.startswith("cdrom:")]
