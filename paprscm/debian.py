# SPDX-License-Identifier: GPL-2.0-or-later
"""Fetch Debian packages of any suite and architecture into a folder, without root."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from paprscm import log, process
from paprscm.errors import ConfigError, Error, HostError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""The archive's public keys, as package debian-archive-keyring installs them."""

_MERGED = ("bin", "sbin", "lib", "lib64")
_MIRROR_HINT = "set mirror= to the URI of a Debian mirror, such as the one in /etc/apt/sources.list"
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
# How this host reaches the network is its apt's business; mmdebstrap starts from an empty apt.conf.
_NETWORK_OPTIONS = ("Acquire::http", "Acquire::ForceIP", "Acquire::Retries", "Acquire::Check-Date")
_REFRESH_S = 0.2


def resolve_mirror(setting: str) -> str:
    """The Debian mirror to fetch from, without a slash at its end.

    Args:
        setting: a URI, or 'auto' for the one that the host's own apt uses for Debian's archive.

    Raises:
        ConfigError: the URI is none, or the host's apt knows no Debian mirror.
    """
    if setting != "auto":
        if not re.fullmatch(r"[a-z+]+:/[^\s\[\]]+", setting):
            raise ConfigError(f"mirror={setting} is not a URI", hint=_MIRROR_HINT)
        return setting.rstrip("/")
    if shutil.which("apt-get") is None:
        raise ConfigError("this host has no apt that could name a Debian mirror", hint=_MIRROR_HINT)
    for label, site in _apt_sites("--release-info"):
        if label == "Debian":
            return site
    # Before the first `apt-get update` apt does not know the labels.
    for _, site in _apt_sites("--no-release-info"):
        if site.endswith("/debian"):
            return site
    raise ConfigError("the host's apt sources name no Debian mirror", hint=_MIRROR_HINT)


def extract(
    packages: Sequence[str], *, suite: str, mirror: str, arch: str, target: Path, title: str
) -> dict[str, str]:
    """Unpack packages and all that they depend on into `target`; no maintainer script runs.

    Args:
        packages: names of binary packages.
        suite: codename or suite name ("trixie", "sid").
        mirror: URI of a Debian mirror.
        arch: Debian architecture ("ppc64el").
        target: the folder; it must be absent or empty. On an error its content is undefined.
        title: what is fetched, for the progress bars.

    Returns:
        The version of each package that was unpacked.

    Raises:
        ConfigError: the suite or a package does not exist there.
        HostError: mmdebstrap is missing, the mirror cannot be reached, the download broke off or
            was damaged, no space.
    """
    if shutil.which("mmdebstrap") is None:
        raise HostError("mmdebstrap is not installed", hint="apt install mmdebstrap")
    target.parent.mkdir(parents=True, exist_ok=True)
    watch = _Watch(target, title)
    with contextlib.ExitStack() as stack:
        stack.callback(watch.close)
        # A mmdebstrap that is killed leaves its files to whoever removes the target's parent.
        temporary = tempfile.TemporaryDirectory(prefix=".mmdebstrap-", dir=target.parent)
        argv = [
            "mmdebstrap",
            "--mode=chrootless",
            "--variant=extract",
            # The one level that names each package as it is unpacked.
            "--debug",
            f"--architectures={arch}",
            f"--include={','.join(packages)}",
            *(f"--aptopt={option}" for option in _network_options()),
            suite,
            str(target),
            _source_line(suite, mirror),
        ]
        env = {**os.environ, "LC_ALL": "C.UTF-8", "TMPDIR": stack.enter_context(temporary)}
        try:
            process.run(
                argv, env=env, on_line=watch.line, idle_s=_REFRESH_S, on_idle=watch.count_download
            )
        except HostError as error:
            raise _explain(watch, error, suite=suite, mirror=mirror, arch=arch) from error
    _merge_usr(target)
    return watch.versions


def _apt_sites(option: str) -> list[tuple[str, str]]:
    """Label and URI of each network source of the host's apt."""
    argv = ["apt-get", "indextargets", option, "--format", "$(LABEL)|$(SITE)"]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    targets = [line.partition("|")[::2] for line in found.stdout.splitlines()]
    return [(label, site.rstrip("/")) for label, site in targets if not site.startswith("cdrom:")]


def _source_line(suite: str, mirror: str) -> str:
    # One explicit line: mmdebstrap would add the security and update suites of a stable release,
    # whose indices may not match each other on a mirror that is being updated. Suites that expire
    # (testing, sid) are used for what they hold, however old the mirror's copy is.
    options = ["check-valid-until=no"]
    if KEYRING.is_file():
        options.append(f"signed-by={KEYRING}")
    return f"deb [{' '.join(options)}] {mirror} {suite} main"


def _network_options() -> list[str]:
    argv = ["apt-config", "dump"]
    dump = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    return [
        line
        for line in dump.splitlines()
        if line.startswith(_NETWORK_OPTIONS) and not line.endswith(' "";')
    ]


def _merge_usr(root: Path) -> None:
    """Make /bin, /lib, … links into /usr, as on every Debian since 12.

    Up to Debian 12 packages still hold files in /lib and /bin, and count on these links.
    """
    for name in _MERGED:
        place = root / name
        if place.is_symlink():
            continue
        if place.is_dir():
            _move_into(place, root / "usr" / name)
            place.rmdir()
        if (root / "usr" / name).is_dir():
            place.symlink_to(f"usr/{name}")


def _move_into(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        place = target / path.name
        if path.is_dir() and not path.is_symlink():
            _move_into(path, place)
            path.rmdir()
        elif path.is_symlink() and os.path.lexists(place):
            # A link from the one place to the other, for programs that look there.
            path.unlink()
        else:
            path.rename(place)


class _Watch:
    """Reads mmdebstrap's output: how far it is, and what went wrong."""

    def __init__(self, target: Path, title: str) -> None:
        self._archives = target / "var/cache/apt/archives"
        self._title = title
        self._bars = contextlib.ExitStack()
        self._bar: log.Bar | None = None
        self._total = 0
        self._unpacked = 0
        self._sizes: dict[str, int] = {}
        self._previous = ""
        self.phase = "index"
        self.complaints: list[str] = []
        self.versions: dict[str, str] = {}

    def line(self, text: str) -> None:
        """Take in one line of output."""
        if match := re.match(r"Need to get (?:[\d.,]+ \w+/)?([\d.,]+) (\w+) of archives", text):
            self._total = int(float(match[1].replace(",", "")) * _UNITS.get(match[2], 1))
            self._begin("download", self._total)
        elif re.match(r"I: (\d+ )*extracting archives", text) and self.phase == "download":
            assert self._bar is not None  # noqa: S101
            self._bar.update(self._total)
            self._sizes = {deb.name: deb.stat().st_size for deb in self._archives.glob("*.deb")}
            self._begin("unpack", sum(self._sizes.values()))
        elif match := re.search(r"running dpkg-deb --fsys-tarfile .*/([^/]+\.deb)$", text):
            # The package is being unpacked from now on: it counts when the next one begins.
            self._report_unpacked()
            self._unpacked += self._sizes.get(match[1], 0)
            # apt names them package_version_arch.deb, with the epoch's colon escaped.
            name, version = match[1].split("_")[:2]
            self.versions[name] = unquote(version)
        elif re.match(r"I: (\d+ )*cleaning", text):
            self._report_unpacked()
            self.phase = "clean"
        elif re.match(r"E:|Err:|W: (GPG|Failed)|.*No space left", text):
            self.complaints.append(text)
        elif self._previous.startswith("Err:") and text.startswith("  "):
            # apt's reason, below the file's address.
            self.complaints.append(text.strip())
        self._previous = text

    def count_download(self) -> None:
        """Look how many bytes have arrived."""
        if self.phase != "download" or self._bar is None:
            return
        arrived = 0
        for folder in (self._archives, self._archives / "partial"):
            with contextlib.suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    # A file moves out of partial/ when it is complete.
                    with contextlib.suppress(FileNotFoundError):
                        arrived += file.stat().st_size if file.is_file() else 0
        self._bar.update(min(arrived, self._total))

    def close(self) -> None:
        """Let go of the terminal."""
        self._bars.close()

    def _begin(self, phase: str, total: int) -> None:
        self._bars.close()
        self.phase = phase
        self._bar = self._bars.enter_context(
            log.progress(f"{self._title}: {phase}", total, unit="bytes")
        )
        self._bar.update(0)

    def _report_unpacked(self) -> None:
        if self._bar is not None and self.phase == "unpack":
            self._bar.update(self._unpacked)


def _explain(watch: _Watch, error: HostError, *, suite: str, mirror: str, arch: str) -> Error:
    """The failure in the user's terms; apt's and mmdebstrap's own words where we know no better."""
    said = "\n".join(watch.complaints)
    if names := re.findall(
        r"^E: (?:Unable to locate package |Package '?(?=.* has no installation))([\w.+-]+)",
        said,
        flags=re.MULTILINE,
    ):
        what = ", ".join(dict.fromkeys(names))
        return ConfigError(
            f"Debian {suite} ({mirror}) has no package {what} for {arch}",
            hint="another suite= may have it",
        )
    if "does not have a Release file" in said:
        return ConfigError(
            f"the mirror {mirror} has no suite {suite}",
            hint="suite= is a codename such as trixie; mirror= ends in /debian on most mirrors",
        )
    if re.search(r"No space left|enough free space", said):
        return HostError(
            f"no space left to fetch packages of Debian {suite}",
            hint="free some, `paprscm cache prune`, or set cache_dir",
        )
    if re.search(r"NO_PUBKEY|signatures? (couldn't|were)|is not signed|No good signature", said):
        return HostError(
            f"this host has no key that signed Debian {suite} ({mirror})",
            hint="apt install debian-archive-keyring, or a newer version of it",
        )
    if re.search(r"Hash Sum mismatch|unexpected size|Hash mismatch", said):
        return HostError(
            f"what came from {mirror} is not what Debian {suite} signed: {_detail(said)}",
            hint="try again in some minutes, or set another mirror=",
        )
    if re.search(r"^(E: (Failed|Unable) to fetch|Err:)", said, flags=re.MULTILINE):
        if watch.phase == "index":
            return HostError(
                f"the mirror {mirror} cannot be reached: {_detail(said)}",
                hint="check the network and apt's proxy, or set another mirror=",
            )
        return HostError(
            f"the download from {mirror} broke off: {_detail(said)}",
            hint="run it again; if it stays so, set another mirror=",
        )
    return error


def _detail(said: str) -> str:
    """The reason that apt gives, without the file's address."""
    for line in said.splitlines():
        if not line.startswith(("E:", "Err:", "W:", "I:")):
            return line
    match = re.search(r"^E: Failed to fetch \S+ +(.+)$", said, flags=re.MULTILINE)
    return match[1] if match else said.splitlines()[0]
