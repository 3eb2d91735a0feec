# SPDX-License-Identifier: GPL-2.0-or-later
"""One suite and architecture of a Debian mirror, read by the host's apt without root.

Configuration, index and package folder are separate from the host's, below the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from paprscm import log
from paprscm.errors import Error, HostError
from paprscm.host import process
from paprscm.host.cache import Cache

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""The archive's public keys, as package debian-archive-keyring installs them."""

DOWNLOADS = "downloads"
"""Folder below the cache's root for package indexes and packages that are not yet unpacked."""

SOURCE = "source"
"""The architecture of source packages."""

_OTHER_HINT = "set another suite or mirror="
# Network options are taken from the host's apt.
_NETWORK_OPTIONS = ("Acquire::http", "Acquire::ForceIP", "Acquire::Retries", "Acquire::Check-Date")
# Downloads do not lock the index. Meanwhile another apt may update it, which deletes these files.
_NO_CACHE_FILES = ("-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=")
_REFRESH_S = 0.2
_ASK_LIMIT_S = 20.0
_ASK_THREADS = 8
_LISTED = 12


class UnavailableError(HostError):
    """This suite of this mirror cannot provide the packages; another suite may."""


@dataclass(frozen=True)
class PackageFile:
    """One file of a package, or of a source package, to download.

    Attributes:
        uri: its address on the mirror.
        name: its file name in apt's folder, NAME_VERSION_ARCH.deb for a package.
        size_bytes: its size.
    """

    uri: str
    name: str
    size_bytes: int

    @property
    def package(self) -> str:
        """The package's name."""
        return self.name.split("_")[0]

    @property
    def version(self) -> str:
        """The package's version."""
        return unquote(self.name.split("_")[1])


class AptSource:
    """One suite and architecture of a mirror.

    Args:
        cache: the index is kept in a folder below its root.
        mirror: URI of the mirror.
        suite: codename or suite name ("trixie", "sid").
        arch: Debian architecture ("ppc64el"), or SOURCE.
        title: name of the download, for messages and the progress bar.
        proceed: called several times a second; may raise to end the download.
    """

    def __init__(
        self,
        cache: Cache,
        mirror: str,
        suite: str,
        arch: str,
        title: str,
        proceed: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._mirror = mirror
        self._suite = suite
        self._arch = arch
        self._title = title
        self._proceed = proceed
        self._index = cache.root / DOWNLOADS / f"index-{self.key(())}"

    def key(self, packages: Sequence[str]) -> str:
        """Name of the folder for these packages of this source."""
        text = "\0".join((self._mirror, self._suite, self._arch, *sorted(packages)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def update(self) -> None:
        """Fetch the package index, or its changes."""
        with self._locked():
            for name in ("lists/partial", "etc/apt.conf.d", "etc/preferences.d", "cache"):
                (self._index / name).mkdir(parents=True, exist_ok=True)
            os.utime(self._index)
            (self._index / "status").touch()
            (self._index / "etc/sources.list").write_text(self._source_line())
            (self._index / "apt.conf").write_text(self._configuration())
            self._apt("update")

    def plan(self, packages: Sequence[str], *, alone: bool = False) -> tuple[PackageFile, ...]:
        """The files of the packages, with all dependencies unless `alone`."""
        with self._locked():
            if alone:
                self._claim_dependencies(packages)
            lines = self._apt(
                *("install", "-qq", "--print-uris", *self._status(packages, alone), *packages)
            )
        return self._listed(lines, packages)

    def source_versions(self, package: str, version: str) -> list[str]:
        """Versions of a source package, in the index of SOURCE; the newest first.

        Args:
            package: its name.
            version: upstream's version for any revision of Debian, a complete one, or "" for all.

        Raises:
            UnavailableError: there is no such package or version.
        """
        with self._locked():
            records = self._apt("showsrc", "--only-source", package, tool="apt-cache")
        # An index lists them in ascending order, such as 1:10.2.2+ds-1.
        offered = [line[9:] for line in reversed(records) if line.startswith("Version: ")]
        pattern = re.compile(rf"(\d+:)?{re.escape(version) or '.*'}(([+~].*)?-[^-]+)?")
        if found := [one for one in offered if pattern.fullmatch(one)]:
            return found
        raise UnavailableError(
            f"{self._description} has no source package {package} {version}".rstrip(),
            hint=f"it has {', '.join(offered)}" if offered else _OTHER_HINT,
        )

    def plan_source(self, package: str, version: str) -> tuple[PackageFile, ...]:
        """The files of one version of a source package, in the index of SOURCE."""
        with self._locked():
            words = ["source", "-qq", "--print-uris", f"{package}={version}"]
            return self._listed(self._apt(*words), [package])

    def _listed(self, lines: Sequence[str], packages: Sequence[str]) -> tuple[PackageFile, ...]:
        pattern = re.compile(r"'([^']+)' (\S+\.(?:deb|dsc|tar\.\w+)) (\d+) \S*")
        matches = map(pattern.fullmatch, lines)
        files = tuple(PackageFile(m[1], m[2], int(m[3])) for m in matches if m)
        if not files:
            raise HostError(f"apt lists no file for {', '.join(packages)} of {self._description}")
        return files

    def fetch(
        self,
        packages: Sequence[str],
        files: Sequence[PackageFile],
        folder: Path,
        *,
        alone: bool = False,
    ) -> None:
        """Download the files of a plan into `folder`; files that exist are kept."""
        words = ["install", "--yes", "--download-only", "-o", f"Dir::Cache::archives={folder}"]
        self._fetch([*words, *self._status(packages, alone), *packages], files, folder)

    def fetch_source(
        self, package: str, version: str, files: Sequence[PackageFile], folder: Path
    ) -> None:
        """Download the files of a plan of a source package; files that exist are kept."""
        self._fetch(["source", "--download-only", f"{package}={version}"], files, folder)

    def _fetch(self, words: Sequence[str], files: Sequence[PackageFile], folder: Path) -> None:
        total = sum(file.size_bytes for file in files)
        with log.progress(f"{self._title}: download", total, unit="bytes") as bar:

            def proceed() -> None:
                self._proceed()
                bar.update(min(total, _present_bytes(files, folder)))

            try:
                # `apt-get source` downloads to the current folder.
                self._apt(
                    *words,
                    *_NO_CACHE_FILES,
                    cwd=folder,
                    proceed=proceed,
                    stop=re.compile(r"^\s+404\s"),
                )
            except UnavailableError as error:
                names = [file.name for file in absent_files(files)]
                if not names:
                    raise
                raise UnavailableError(
                    _absence(self._description, names), hint=_OTHER_HINT
                ) from error
            proceed()
        if missing := [file.name for file in files if not (folder / file.name).is_file()]:
            raise HostError(f"apt did not download {', '.join(missing)}")

    def _status(self, packages: Sequence[str], alone: bool) -> tuple[str, ...]:
        """The option with dpkg's status file, for packages without their dependencies."""
        if not alone:
            return ()
        return "-o", f"Dir::State::status={self._index / f'status-{self.key(packages)}'}"

    def _claim_dependencies(self, packages: Sequence[str]) -> None:
        """Write a status file that lists all dependencies of the packages as installed.

        `apt-get download` does not need it, but cannot continue an interrupted download.
        """
        records = self._apt("show", *packages, tool="apt-cache")
        relations = [
            line.partition(":")[2] for line in records if re.match(r"(Pre-)?Depends:", line)
        ]
        names = sorted({word.split()[0] for line in relations for word in re.split("[,|]", line)})
        stanza = (
            "Package: {}\nStatus: install ok installed\nArchitecture: {}\nVersion: 99999:0\n"
            "Maintainer: none\nDescription: none\n\n"
        )
        text = "".join(stanza.format(name.partition(":")[0], self._arch) for name in names)
        (self._index / f"status-{self.key(packages)}").write_text(text)

    @property
    def _description(self) -> str:
        return f"Debian {self._suite} ({self._mirror}, {self._arch})"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._cache.lock(f"download-{self._index.name}", purpose="reads a package index"):
            yield

    def _source_line(self) -> str:
        # One source: the security and update suites of a stable release may not match each other
        # on a mirror that is being updated. Suites that expire (testing, sid) are accepted from an
        # outdated mirror, too.
        options = ["check-valid-until=no"]
        if KEYRING.is_file():
            options.append(f"signed-by={KEYRING}")
        kind = "deb-src" if self._arch == SOURCE else "deb"
        return f"{kind} [{' '.join(options)}] {self._mirror} {self._suite} main\n"

    def _configuration(self) -> str:
        values = {
            "Dir": self._index,
            "Dir::State": "",
            "Dir::State::lists": "lists",
            "Dir::State::status": self._index / "status",
            "Dir::Cache": "cache",
            "Dir::Etc": "etc",
            "APT::Architecture": self._arch,
            "APT::Architectures": self._arch,
            "APT::Install-Recommends": "false",
            "APT::Update::Error-Mode": "any",
            # As root, apt would switch to a user without access to our folders.
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::PDiffs": "false",
            "Acquire::Retries": "3",
            # Each download has a lock of the cache, and its own folder.
            "Debug::NoLocking": "true",
        }
        lines = [f'{name} "{value}";' for name, value in values.items()]
        return "\n".join([*lines, *_network_options()]) + "\n"

    def _apt(
        self,
        *words: str,
        tool: str = "apt-get",
        cwd: Path | None = None,
        proceed: Callable[[], None] | None = None,
        stop: re.Pattern[str] | None = None,
    ) -> tuple[str, ...]:
        """Run apt-get and return its output; UnavailableError for a line that matches `stop`."""
        output: list[str] = []

        def line(text: str) -> None:
            output.append(text)
            if stop and stop.search(text):
                raise UnavailableError(f"{self._description}: {text.strip()}", hint=_OTHER_HINT)

        env = {
            **os.environ,
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            "APT_CONFIG": str(self._index / "apt.conf"),
        }
        try:
            result = process.run(
                [tool, "-q", *words],
                cwd=cwd,
                env=env,
                on_line=line,
                idle_s=_REFRESH_S,
                on_idle=proceed or self._proceed,
                keep_lines=10_000,
            )
        except UnavailableError:
            raise
        except HostError as error:
            raise self._explain(words, "\n".join(output), error) from error
        return result.lines

    def _explain(self, words: Sequence[str], output: str, error: HostError) -> Error:
        """The error for a failure of apt; `error` itself if the cause is unknown."""
        names = re.findall(
            r"^[EN]: (?:Unable to locate package |Package '?(?=.* has no installation))([\w.+-]+)",
            output,
            flags=re.MULTILINE,
        )
        if "E: No packages found" in output:
            names = list(words[1:])
        if version := re.search(
            r"^E: Version '(.+)' for '(.+)' was not found", output, re.MULTILINE
        ):
            offered = self._apt("madison", version[2], tool="apt-cache")
            versions = ", ".join(line.split("|")[1].strip() for line in offered if "|" in line)
            return UnavailableError(
                f"{self._description} has no {version[2]} {version[1]}",
                hint=f"it has {versions}" if versions else _OTHER_HINT,
            )
        if names:
            listed = ", ".join(dict.fromkeys(names))
            return UnavailableError(
                f"{self._description} has no package {listed}", hint=_OTHER_HINT
            )
        if "does not have a Release file" in output:
            return UnavailableError(
                f"the mirror {self._mirror} has no suite {self._suite}",
                hint="a suite is a codename such as trixie; most mirrors' URIs end in /debian",
            )
        if re.search(r"No space left|enough free space", output):
            return HostError(
                f"no space left to fetch packages of Debian {self._suite}",
                hint="free some, `paprscm cache prune`, or set cache_dir",
            )
        unsigned = r"NO_PUBKEY|signatures? (couldn't|were)|is not signed|No good signature"
        if re.search(unsigned, output):
            return UnavailableError(
                f"this host has no key that signed Debian {self._suite} on {self._mirror}",
                hint="apt install debian-archive-keyring, or a newer version of it",
            )
        if re.search(r"Hash Sum mismatch|unexpected size|Hash mismatch", output):
            return UnavailableError(
                f"files on {self._mirror} do not match the signatures of Debian {self._suite}: "
                f"{_detail(output)}",
                hint="try again in some minutes, or " + _OTHER_HINT,
            )
        if "unmet dependencies" in output:
            needs = re.findall(r"^ +(\S+ : .+)$", output, flags=re.MULTILINE)
            return UnavailableError(
                f"{self._description} lacks dependencies: {'; '.join(needs[:_LISTED])}",
                hint=_OTHER_HINT,
            )
        if re.search(r"^([EW]: (Failed|Unable) to fetch|Err:)", output, flags=re.MULTILINE):
            if words[0] == "update":
                return HostError(
                    f"the mirror {self._mirror} cannot be reached: {_detail(output)}",
                    hint="check the network and apt's proxy, or set another mirror=",
                )
            return HostError(
                f"the download from {self._mirror} was interrupted: {_detail(output)}",
                hint="run it again to continue; if that fails, set another mirror=",
            )
        return error


def _present_bytes(files: Sequence[PackageFile], folder: Path) -> int:
    """The size of the downloaded files so far, complete and partial, bytes."""
    total = 0
    for file in files:
        for place in (folder / file.name, folder / "partial" / file.name):
            # A file moves out of partial/ when it is complete.
            with contextlib.suppress(FileNotFoundError):
                total += place.stat().st_size
                break
    return total


def absent_files(files: Sequence[PackageFile]) -> list[PackageFile]:
    """The files that the mirror reports as absent."""

    def is_absent(file: PackageFile) -> bool:
        parts = urlsplit(file.uri)
        if parts.scheme == "file":
            return not Path(unquote(parts.path)).is_file()
        if parts.scheme not in ("http", "https"):
            return False
        request = urllib.request.Request(file.uri, method="HEAD")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_ASK_LIMIT_S):  # noqa: S310
                return False
        except urllib.error.HTTPError as error:
            return error.code in (404, 410)
        except OSError:
            # No answer; the download will show.
            return False

    with ThreadPoolExecutor(_ASK_THREADS) as pool:
        answers = pool.map(is_absent, files)
        return [file for file, absent in zip(files, answers, strict=True) if absent]


def _absence(source: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{source} lacks {len(names)} package files of its index: {listed}{more}"


def _network_options() -> list[str]:
    argv = ["apt-config", "dump"]
    dump = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    return [
        line
        for line in dump.splitlines()
        if line.startswith(_NETWORK_OPTIONS) and not line.endswith(' "";')
    ]


def _detail(output: str) -> str:
    """The reason in apt's output, without the file's address."""
    match = re.search(r"^[EW]: Failed to fetch \S+ +(.+)$", output, flags=re.MULTILINE)
    if match:
        return match[1]
    lines = [line for line in output.splitlines() if line.startswith(("E:", "W:", "Err:"))]
    return (lines or output.splitlines() or ["no output"])[0]
