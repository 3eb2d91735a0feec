# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's root file system: Debian packages on a read-only disk, with its own ssh keys."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from paprscm import log
from paprscm.debian import toolchain
from paprscm.debian.packages import ARCH, Archive, Download, first_available
from paprscm.errors import ConfigError, HostError
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.paths import GUEST_TOOLS, IMAGES

_FORMAT = "1"
"""Change it when this module changes the content of the disk."""
_AGENT = GUEST_TOOLS / "agent.c"
_NEEDS_BYTES = 1_800_000_000
_BLOCK_SIZE = 4096
_INODE_SIZE = 256
_KEY_TYPE = "ssh-ed25519"

# Folders that tests and people write to; the disk itself is read-only and shared by guests.
_WRITABLE = ("/tmp", "/run", "/root", "/mnt", "/var/tmp", "/var/log", "/home")  # noqa: S108
# Used for pmem in the cover letter of the patch series, and by its users.
_MOUNT_POINTS = ("mnt1", "mnt2", "mnt3", "mnt4", "proc", "sys", "dev", "mnt", "run")
# Maintainer scripts would create these through update-alternatives.
_ALTERNATIVES = {"cc": "gcc", "c99": "gcc", "awk": "mawk"}
_APPLETS = (
    *(
        "clear",
        "free",
        "gunzip",
        "gzip",
        "halt",
        "hexdump",
        "hostname",
        "ifconfig",
        "ip",
        "less",
        "lspci",
    ),
    *("nc", "ping", "poweroff", "reboot", "reset", "resize", "route", "tar", "time", "top"),
    *("unxz", "usleep", "uptime", "vi", "watch", "which", "xxd", "xzcat", "zcat"),
)
_ETC = {
    "passwd": (
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
    ),
    "group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    # No passwords: dropbear accepts keys only, and the console needs none.
    "shadow": "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n",
    "shells": "/bin/sh\n/bin/bash\n/bin/dash\n",
    "hostname": "guest\n",
    "hosts": "127.0.0.1 localhost guest\n10.0.2.15 guest\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
    # The guest has no network, and the image must not contain data of the host.
    "resolv.conf": "",
    "profile": (
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        "[ -z \"$BASH_VERSION\" ] || PS1='\\u@\\h:\\w\\$ '\n"
    ),
}
_FSTAB = (
    "proc /proc proc nosuid,nodev,noexec 0 0",
    "sysfs /sys sysfs nosuid,nodev,noexec 0 0",
    "debugfs /sys/kernel/debug debugfs nosuid,nodev,noexec 0 0",
    "tracefs /sys/kernel/tracing tracefs nosuid,nodev,noexec 0 0",
    "devpts /dev/pts devpts gid=5,mode=620,ptmxmode=666 0 0",
    "tmpfs /dev/shm tmpfs mode=1777 0 0",
    *(f"tmpfs {place} tmpfs mode=0755 0 0" for place in _WRITABLE if not place.endswith("tmp")),
    *(f"tmpfs {place} tmpfs mode=1777 0 0" for place in _WRITABLE if place.endswith("tmp")),
)


@dataclass(frozen=True)
class Userland:
    """One complete root file system.

    Attributes:
        disk: raw ext4 image without a journal; attach it with readonly=on.
        client_key: OpenSSH private key for logins as root.
        host_key_public: the guest's host key as in known_hosts: type, space, base64.
        busybox: static busybox for the guest's architecture, for an initramfs.
        suite: the Debian suite.
        versions: version of each Debian package.
    """

    disk: Path
    client_key: Path
    host_key_public: str
    busybox: Path
    suite: str
    versions: Mapping[str, str] = field(hash=False, repr=False)


def obtain_userland(
    archive: Archive, suites: Sequence[str], *, proceed: Callable[[], None] = lambda: None
) -> Userland | Download:
    """Return a userland from the cache, else download the packages of the first complete suite.

    Args:
        archive: the mirror and the cache.
        suites: Debian suites, preferred first.
        proceed: called several times a second; may raise to end the download.

    Raises:
        HostError: a tool of build_rootfs() is missing.
        UnavailableError: no suite can provide the packages.
        Error: as Archive.download().
    """
    for suite in suites:
        if userland := find_rootfs(archive.cache, suite=suite):
            return userland

    for tool, package in (("fakeroot", "fakeroot"), ("mke2fs", "e2fsprogs")):
        if shutil.which(tool, path=_tool_path()) is None:
            raise HostError(f"{tool} is not installed", hint=f"apt install {package}")

    def attempt(suite: str) -> Download:
        with log.step(f"fetching the guest's userland (Debian {suite}, {ARCH})"):
            return archive.download(
                _recipe(suite)[0], suite=suite, arch=ARCH, title="userland", proceed=proceed
            )

    return first_available(suites, attempt, title="userland")


def build_rootfs(
    cache: Cache, download: Download, *, boot_test: Callable[[Userland], None] | None
) -> Userland:
    """Build the root file system from the packages, and delete the packages.

    Args:
        cache: the cache for the result.
        download: packages from obtain_userland().
        boot_test: boots a guest on it and raises if that fails; called before the entry is
            published. None: no test.

    Raises:
        HostError: no space.
    """
    suite = download.suite
    _, unwanted, fields = _recipe(suite)

    def fill(folder: Path) -> None:
        with log.step(f"making the guest's userland (Debian {suite}, {ARCH})"):
            _build(folder, download, unwanted, _compile_agent(cache))
            if boot_test is not None:
                with log.step("boot test"):
                    boot_test(_load(folder, suite))

    entry = cache.ensure("userland", fields, fill, needs_bytes=_NEEDS_BYTES)
    download.remove()
    return _load(entry.path, suite)


def find_rootfs(cache: Cache, *, suite: str) -> Userland | None:
    """The root file system of a suite from the cache, or None; nothing is built."""
    entry = cache.find("userland", _recipe(suite)[2])
    return _load(entry.path, suite) if entry else None


def packages() -> list[str]:
    """Names of the userland's Debian packages, without dependencies."""
    return parse_packages((IMAGES / "packages").read_text())[0]


def parse_packages(text: str) -> tuple[list[str], list[str]]:
    """The packages and the unwanted path patterns in the text of a package list.

    Raises:
        ConfigError: a line holds more than one word.
    """
    packages, unwanted = [], []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 1:
            raise ConfigError(f"package list, line {number}: '{line}' names more than one package")
        if words[0].startswith("-"):
            unwanted.append(words[0][1:].lstrip("/"))
        else:
            packages.append(words[0])
    return packages, unwanted


def _recipe(suite: str) -> tuple[list[str], list[str], dict[str, str]]:
    listing = (IMAGES / "packages").read_text()
    packages, unwanted = parse_packages(listing)
    fields = {
        "suite": suite,
        # Not the file: a changed comment must not cause a new download.
        "packages": hashlib.sha256(repr((sorted(packages), sorted(unwanted))).encode()).hexdigest(),
        "init": hashlib.sha256((IMAGES / "init").read_bytes()).hexdigest(),
        "agent": hashlib.sha256(_AGENT.read_bytes()).hexdigest(),
        "format": _FORMAT,
    }
    return packages, unwanted, fields


def _load(folder: Path, suite: str) -> Userland:
    return Userland(
        disk=folder / "disk.img",
        client_key=folder / "client_key",
        host_key_public=(folder / "host_key.pub").read_text().strip(),
        busybox=folder / "busybox",
        suite=suite,
        versions=json.loads((folder / "versions.json").read_text()),
    )


def _compile_agent(cache: Cache) -> Path:
    """Compile the agent for any guest: the oldest CPU, and whatever C library it has."""
    return toolchain.compile_c(
        cache,
        "agent",
        [_AGENT],
        compiler=f"{toolchain.PREFIX}gcc",
        flags="-O2 -Wall -Wextra -Werror -mcpu=power8 -static -s",
    )


def _build(folder: Path, download: Download, unwanted: list[str], agent: Path) -> None:
    root = folder / "root"
    versions = download.unpack(root, title="userland")
    (folder / "versions.json").write_text(json.dumps(versions, indent=1, sort_keys=True))
    shutil.copy(root / "usr/bin/busybox", folder / "busybox")
    _prune(root, unwanted)
    client, host = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    _write_private(folder / "client_key", _openssh_private(client))
    (folder / "host_key.pub").write_text(openssh_public(host) + "\n")
    target = root / "usr/local/sbin/paprscm-agent"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(agent, target)
    target.chmod(0o755)
    _configure(root, client_public=openssh_public(client), host_key=dropbear_private(host))
    with log.step("writing the disk"):
        _make_disk(root, folder / "disk.img")
    shutil.rmtree(root)


def _prune(root: Path, patterns: list[str]) -> None:
    for pattern in patterns:
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for path in (root / "dev").iterdir():
        # devtmpfs is mounted on it.
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _configure(root: Path, *, client_public: str, host_key: bytes) -> None:
    """Write the files that maintainer scripts and an administrator would write."""
    for name in (*_MOUNT_POINTS, *(place.lstrip("/") for place in _WRITABLE)):
        (root / name).mkdir(parents=True, exist_ok=True)
    # Useless in the guest, or written here.
    for name in ("apt", "dpkg", *_ETC):
        path = root / "etc" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name, content in _ETC.items():
        (root / "etc" / name).write_text(content)
    (root / "etc/fstab").write_text("".join(line + "\n" for line in _FSTAB))
    (root / "etc/mtab").unlink(missing_ok=True)
    (root / "etc/mtab").symlink_to("/proc/self/mounts")
    for name, real in _ALTERNATIVES.items():
        _link(root / "usr/bin" / name, real)
    for name in _APPLETS:
        if not any((root / folder / name).exists() for folder in ("usr/bin", "usr/sbin")):
            _link(root / "usr/bin" / name, "busybox")
    _make_readable(root)
    (root / "etc/shadow").chmod(0o600)
    (root / "root").chmod(0o700)
    init = root / "init"
    shutil.copyfile(IMAGES / "init", init)
    init.chmod(0o755)
    _make_folder(root / "etc/dropbear", 0o755)
    _write_private(root / "etc/dropbear/host_key", host_key)
    # /init copies it to root's home, which is a tmpfs.
    _make_folder(root / "etc/skel.root", 0o700)
    _make_folder(root / "etc/skel.root/.ssh", 0o700)
    authorized = f"{client_public} paprscm\n".encode()
    _write_private(root / "etc/skel.root/.ssh/authorized_keys", authorized)


def _make_readable(root: Path) -> None:
    """Give all users of the guest the read permissions of root.

    With a umask of 077, unpacked files are readable by root only. Packages contain no secrets.
    """
    for path in (root, *root.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode):
            opened = stat.S_IMODE(mode) | (mode & 0o500) >> 3 | (mode & 0o500) >> 6
            if opened != stat.S_IMODE(mode):
                path.chmod(opened)


def _make_disk(root: Path, disk: Path) -> None:
    blocks, inodes = _tree_size(root)
    # Inode tables, bitmaps and directories that grow while mke2fs fills them.
    inodes += inodes // 20 + 64
    blocks += inodes * _INODE_SIZE // _BLOCK_SIZE + blocks // 25 + 1024
    process.run(
        [
            # Under fakeroot all files belong to root, independent of the user.
            "fakeroot",
            "mke2fs",
            "-q",
            *("-t", "ext4"),
            # The disk is read-only: no journal, no resizing; checksums cost time under TCG.
            *("-O", "^has_journal,^resize_inode,^metadata_csum,^64bit"),
            *("-b", str(_BLOCK_SIZE)),
            *("-I", str(_INODE_SIZE)),
            *("-N", str(inodes)),
            *("-m", "0"),
            *("-L", "paprscm"),
            *("-d", root),
            disk,
            str(blocks),
        ],
        env={**os.environ, "PATH": _tool_path(), "LC_ALL": "C.UTF-8"},
    )


def _tree_size(root: Path) -> tuple[int, int]:
    """Number of blocks and inodes of the tree on ext4."""
    blocks = inodes = 0
    counted: set[int] = set()
    for path in (root, *root.rglob("*")):
        info = path.lstat()
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            if info.st_ino in counted:
                continue
            counted.add(info.st_ino)
        inodes += 1
        # ext4 stores a link target of up to 59 bytes in the inode.
        if not (stat.S_ISLNK(info.st_mode) and info.st_size < 60):
            blocks += -(-info.st_size // _BLOCK_SIZE)
    return blocks, inodes


def _tool_path() -> str:
    # mke2fs is in /sbin, which a user's PATH need not have.
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _make_folder(path: Path, mode: int) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(mode)


def _write_private(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def openssh_public(key: Ed25519PrivateKey) -> str:
    """The public key as in authorized_keys: type, space, base64."""
    blob = _string(_KEY_TYPE.encode()) + _string(_raw_public(key))
    return f"{_KEY_TYPE} {base64.b64encode(blob).decode()}"


def dropbear_private(key: Ed25519PrivateKey) -> bytes:
    """The private key in dropbear's format (signkey.c:buf_put_priv_key, ed25519.c)."""
    seed = key.private_bytes(
        serialization.Encoding.Raw,
        serialization.PrivateFormat.Raw,
        serialization.NoEncryption(),
    )
    return _string(_KEY_TYPE.encode()) + _string(seed + _raw_public(key))


def _openssh_private(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def _raw_public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _string(data: bytes) -> bytes:
    """RFC 4251, section 5: a length of four bytes, and the bytes."""
    return struct.pack(">I", len(data)) + data
