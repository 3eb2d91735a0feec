# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's disk: owned by root for any builder, with matching keys and a working /init."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from paprscm.debian import rootfs
from paprscm.debian.apt import UnavailableError
from paprscm.debian.packages import Archive, Download
from paprscm.debian.rootfs import Userland
from paprscm.errors import ConfigError, HostError
from paprscm.guest.guest import Guest
from paprscm.host.cache import Cache
from paprscm.paths import IMAGES

needs_tools = pytest.mark.skipif(
    not all(shutil.which(t, path=os.environ["PATH"] + ":/sbin") for t in ("fakeroot", "debugfs")),
    reason="needs fakeroot and e2fsprogs",
)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def extracted(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """Packages and suites of each download; a few files replace their contents."""
    calls: list[tuple[list[str], str]] = []

    def download(_: Archive, packages: list[str], *, suite: str, **__: Any) -> Download:
        calls.append((packages, suite))
        return Download(suite, cache.root / "downloads/x", ())

    def unpack(_: Download, target: Path, *, title: str) -> dict[str, str]:
        for name in ("usr/bin/busybox", "usr/bin/gzip", "usr/share/doc/a/b", "etc/apt/sources"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(name)
        (target / "usr/bin/busybox").chmod(0o755)
        # These files must not be in the image.
        (target / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
        (target / "etc/hostname").write_text("my-laptop\n")
        (target / "dev").mkdir()
        (target / "dev/null").touch()
        return {"ndctl": "81-1"}

    monkeypatch.setattr(Archive, "download", download)
    monkeypatch.setattr(Download, "unpack", unpack)
    return calls


@pytest.fixture
def own_umask() -> Iterator[None]:
    """Restore the umask after the test."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def ensure(cache: Cache, boot_test: Callable[[Userland], None] | None = None) -> Userland:
    obtained = rootfs.obtain_userland(Archive(cache), ["trixie"])
    if isinstance(obtained, Userland):
        return obtained
    return rootfs.build_rootfs(cache, obtained, boot_test=boot_test)


def debugfs(disk: Path, request: str) -> str:
    tool = shutil.which("debugfs", path=os.environ["PATH"] + ":/sbin")
    assert tool
    done = subprocess.run([tool, "-R", request, disk], capture_output=True, text=True, check=True)
    return done.stdout


def test_package_list() -> None:
    text = "# all\n\ngcc   # compiles\n-usr/share/doc/*\n  make\n-/usr/bin/x # unused\n"
    assert rootfs.parse_packages(text) == (["gcc", "make"], ["usr/share/doc/*", "usr/bin/x"])
    with pytest.raises(ConfigError, match="line 2: 'make fio'"):
        rootfs.parse_packages("gcc\nmake fio\n")


def test_list_of_this_project() -> None:
    packages, unwanted = rootfs.parse_packages((IMAGES / "packages").read_text())
    needed = {"gcc", "libc6-dev", "make", "ndctl", "daxctl", "xfsprogs", "e2fsprogs", "strace"}
    assert needed | {"util-linux", "kmod", "fio", "dropbear-bin"} <= set(packages)
    assert len(packages) == len(set(packages))
    assert all(".." not in pattern for pattern in unwanted)


def test_init_is_a_shell_script() -> None:
    init = IMAGES / "init"
    subprocess.run(["sh", "-n", init], check=True)
    assert init.read_text().startswith("#!/bin/busybox sh\n")
    assert init.stat().st_mode & stat.S_IXUSR


def test_host_key_as_dropbear_keeps_it() -> None:
    key = Ed25519PrivateKey.generate()
    data = rootfs.dropbear_private(key)
    (length,) = struct.unpack_from(">I", data)
    assert data[4 : 4 + length] == b"ssh-ed25519"
    (size,) = struct.unpack_from(">I", data, 4 + length)
    body = data[8 + length :]
    assert size == len(body) == 64
    # The public half after the seed verifies a signature by the seed.
    signature = Ed25519PrivateKey.from_private_bytes(body[:32]).sign(b"text")
    Ed25519PublicKey.from_public_bytes(body[32:]).verify(signature, b"text")
    kind, encoded = rootfs.openssh_public(key).split()
    assert paramiko.Ed25519Key(data=base64.b64decode(encoded)).get_name() == kind


@needs_tools
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_disk_and_keys(
    cache: Cache, extracted: list[Any], tmp_path: Path, own_umask: None, umask: int
) -> None:
    os.umask(umask)
    seen = []

    def boot_test(unpublished: Userland) -> None:
        seen.append(unpublished.disk.parent.name)
        assert unpublished.disk.stat().st_size > 0
        assert unpublished.client_key.exists()

    userland = ensure(cache, boot_test)
    assert seen[0].startswith("."), "the boot test comes before it is published"
    assert userland.versions == {"ndctl": "81-1"}
    assert userland.busybox.read_text() == "usr/bin/busybox"
    assert stat.S_IMODE(userland.client_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(userland.disk.parent.stat().st_mode) == 0o700

    tool = shutil.which("e2fsck", path=os.environ["PATH"] + ":/sbin")
    assert tool
    subprocess.run([tool, "-fn", userland.disk], check=True, capture_output=True)
    for path, mode in (
        ("/init", "0755"),
        ("/etc/dropbear/host_key", "0600"),
        ("/etc/skel.root", "0700"),
        ("/etc/skel.root/.ssh/authorized_keys", "0600"),
        ("/etc/shadow", "0600"),
        ("/root", "0700"),
        ("/mnt1", "0755"),
        ("/usr/bin", "0755"),
        ("/usr/bin/busybox", "0755"),
        ("/etc/passwd", "0644"),
        ("/", "0755"),
    ):
        info = debugfs(userland.disk, f"stat {path}")
        assert f"Mode:  {mode}" in info, path
        assert "User:     0   Group:     0" in info, path
    assert "has_journal" not in debugfs(userland.disk, "features")

    client = paramiko.Ed25519Key.from_private_key_file(str(userland.client_key))
    authorized = debugfs(userland.disk, "cat /etc/skel.root/.ssh/authorized_keys").split()
    assert authorized[1] == client.get_base64()
    raw = tmp_path / "host_key"
    debugfs(userland.disk, f"dump /etc/dropbear/host_key {raw}")
    assert base64.b64decode(userland.host_key_public.split()[1])[-32:] == raw.read_bytes()[-32:]


@needs_tools
def test_no_host_files_and_no_unwanted_files_are_on_the_disk(
    cache: Cache, extracted: list[Any]
) -> None:
    disk = ensure(cache).disk
    assert debugfs(disk, "cat /etc/resolv.conf") == ""
    assert debugfs(disk, "cat /etc/hostname") == "guest\n"
    for path in ("/usr/share/doc/a", "/etc/apt", "/dev/null"):
        assert debugfs(disk, f"stat {path}") == "", path
    # Applets are only linked for commands that no package has.
    assert "symlink" not in debugfs(disk, "stat /usr/bin/gzip")
    assert 'Fast link dest: "busybox"' in debugfs(disk, "stat /usr/bin/poweroff")


@needs_tools
def test_built_once_and_again_when_its_recipe_changes(
    cache: Cache, extracted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rootfs.find_rootfs(cache, suite="trixie") is None
    first = ensure(cache)
    assert ensure(cache) == first == rootfs.find_rootfs(cache, suite="trixie")
    assert len(extracted) == 1
    images = tmp_path / "images"
    shutil.copytree(IMAGES, images)
    monkeypatch.setattr(rootfs, "IMAGES", images)
    (images / "packages").write_text("# other reasons\n" + (images / "packages").read_text())
    assert ensure(cache).disk == first.disk, "a comment does not cause a new download"
    (images / "init").write_text((images / "init").read_text() + "# changed\n")
    second = ensure(cache)
    assert second.disk != first.disk
    assert second.host_key_public != first.host_key_public, "each userland has its own keys"
    with (images / "packages").open("a") as file:
        file.write("gdb\n")
    assert ensure(cache).disk not in (first.disk, second.disk)
    assert extracted[-1][0][-1] == "gdb"


@needs_tools
def test_the_next_suite_replaces_an_incomplete_one(
    cache: Cache, extracted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    download = Archive.download

    def refuse(archive: Archive, packages: list[str], *, suite: str, **rest: Any) -> Download:
        if suite == "trixie":
            raise UnavailableError("trixie lacks libc6")
        return download(archive, packages, suite=suite, **rest)

    monkeypatch.setattr(Archive, "download", refuse)
    obtained = rootfs.obtain_userland(Archive(cache), ["trixie", "forky"])
    assert isinstance(obtained, Download)
    userland = rootfs.build_rootfs(cache, obtained, boot_test=None)
    assert userland.suite == "forky"
    # A cached userland is used before anything is fetched.
    monkeypatch.setattr(Archive, "download", download)
    assert rootfs.obtain_userland(Archive(cache), ["trixie", "forky"]) == userland
    assert [suite for _, suite in extracted] == ["forky"]


@needs_tools
def test_userland_that_does_not_boot_is_not_kept(cache: Cache, extracted: list[Any]) -> None:
    def fails(_: Userland) -> None:
        raise HostError("it does not boot")

    with pytest.raises(HostError, match="it does not boot"):
        ensure(cache, fails)
    assert rootfs.find_rootfs(cache, suite="trixie") is None
    assert list((cache.root / "userland").iterdir()) == []


def test_missing_tool(
    cache: Cache, extracted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rootfs, "_tool_path", lambda: str(tmp_path))
    with pytest.raises(HostError, match="apt install fakeroot"):
        ensure(cache)
    assert not extracted, "nothing is downloaded"


@pytest.mark.guest
def test_init_in_a_guest(boot: Callable[..., Guest]) -> None:
    guest = boot()
    console = [line.strip() for line in guest.console.lines]
    assert console.count("paprscm: ready") == 1
    assert console.index("paprscm: init") < console.index("paprscm: ready")
    assert not [line for line in console if "paprscm: failed" in line]

    assert "/usr/sbin:/usr/bin:/sbin:/bin" in guest.succeed("echo $PATH")
    assert guest.succeed("ulimit -c") == "0"
    for place in ("/tmp", "/run", "/root", "/mnt", "/var/tmp", "/dev/shm"):  # noqa: S108
        guest.succeed(f"echo x > {place}/x && rm {place}/x")
    for place in ("/sys/kernel/debug", "/sys/kernel/tracing", "/dev/pts", "/mnt1", "/mnt2"):
        guest.succeed(f"test -d {place}")
    guest.succeed("test -e /sys/kernel/tracing/available_events && test -e /sys/kernel/debug/bdi")
    # The disk is shared by guests.
    assert "Read-only file system" in guest.fail("touch /etc/x").stderr
    # pid 1 inherits orphans, and reaps them.
    guest.succeed("for i in 1 2 3; do sh -c 'sleep 0.1 & sleep 0.1 &'; done; sleep 0.5")
    assert guest.run("ps -eo stat= | grep -c ^Z").stdout.strip() == "0"
    # No process reads the console, and it has no shell.
    assert guest.run("fuser /dev/hvc0; ps -t hvc0 -o comm=").stdout.split() in ([], ["init"])


@pytest.mark.guest
def test_keys_in_a_guest(boot: Callable[..., Guest]) -> None:
    guest = boot()
    modes = guest.succeed("stat -c '%U %a' /root /root/.ssh /root/.ssh/authorized_keys")
    assert modes.splitlines() == ["root 700", "root 700", "root 600"]
    # No password opens it, and sshd does not ask for one.
    assert guest.succeed("cut -d: -f2 /etc/shadow | sort -u") == "*"
    command = guest.succeed("tr '\\0' ' ' < /proc/$(cat /run/dropbear.pid)/cmdline").split()
    assert {"-s", "-j", "-k"} <= set(command)
    assert "-R" not in command


@pytest.mark.guest
def test_commands_of_the_suite_in_a_guest(boot: Callable[..., Guest]) -> None:
    guest = boot()
    # papr_pdsm.h would depend on the suite: it moved from asm/ to linux/ with the headers of 6.10.
    program = b'#include <stdio.h>\n#include <linux/ndctl.h>\nint main(void) { puts("hi"); }\n'
    guest.succeed("cc -O2 -Wall -Werror -x c - -o /tmp/probe", stdin=program)
    assert guest.succeed("cd /tmp && ./probe") == "hi"
    guest.succeed("ndctl --version && daxctl --version && xfs_io -V && fio --version")
    guest.succeed("strace -f -o /tmp/trace true && grep -q execve /tmp/trace")
    guest.succeed("truncate -s 400M /tmp/image && mkfs.xfs -q /tmp/image")
    guest.succeed("awk 'BEGIN { exit 0 }' && hostname && which ip")
