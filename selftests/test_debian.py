# SPDX-License-Identifier: GPL-2.0-or-later
"""Packages come from a real archive by the real apt, and each failure says what to do."""

from __future__ import annotations

import hashlib
import http.server
import logging
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from paprscm import debian
from paprscm.errors import ConfigError, Error, HostError

SUITE, ARCH = "trixie", "ppc64el"

needs_tools = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("mmdebstrap", "gpg", "dpkg-deb")),
    reason="needs mmdebstrap, gpg and dpkg-deb",
)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the archive; cuts packages short once `cut` is set on the server."""

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not (self.server.cut and path.suffix == ".deb"):  # type: ignore[attr-defined]
            super().do_GET()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True


class Archive:
    """A signed Debian archive of two packages, on a port of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keyring = root / "keyring.gpg"
        self._gnupg = root / "gnupg"
        self._gnupg.mkdir(mode=0o700)
        self._gpg("--quick-generate-key", "archive", "ed25519", "sign", "never")
        self.keyring.write_bytes(self._gpg("--export"))
        library = self._package("libfirst", "2:1.0-1", "", b"library" * 100_000)
        tool = self._package("second", "3.5", "Depends: libfirst\n", b"tool", old="lib/x.so")
        self.tool_package = root / "pool/second_3.5_ppc64el.deb"
        index = root / f"dists/{SUITE}/main/binary-{ARCH}/Packages"
        index.parent.mkdir(parents=True)
        index.write_text(library + "\n" + tool)
        name = index.relative_to(root / "dists" / SUITE)
        data = index.read_bytes()
        release = (
            f"Origin: Debian\nSuite: {SUITE}\nCodename: {SUITE}\nArchitectures: {ARCH}\n"
            # Long expired: what is fetched is used for what it holds.
            "Components: main\nDate: Sat, 01 Mar 2025 00:00:00 UTC\n"
            "Valid-Until: Sat, 08 Mar 2025 00:00:00 UTC\n"
            f"SHA256:\n {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n"
        )
        signed = self._gpg("--clearsign", stdin=release.encode())
        (root / f"dists/{SUITE}/InRelease").write_bytes(signed)
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(root))
        )
        self.server.cut = False  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.mirror = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        subprocess.run(["gpgconf", "--homedir", self._gnupg, "--kill", "all"], check=False)

    def _gpg(self, *words: str, stdin: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", self._gnupg, "--batch", "--passphrase", "", *words]
        return subprocess.run(argv, input=stdin, capture_output=True, check=True).stdout

    def _package(
        self, name: str, version: str, relations: str, content: bytes, *, old: str | None = None
    ) -> str:
        tree = self.root / "tree" / name
        if old:
            (tree / old).parent.mkdir(parents=True)
            (tree / old).write_bytes(content)
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / f"usr/share/{name}").mkdir(parents=True)
        (tree / f"usr/share/{name}/content").write_bytes(content)
        control = (
            f"Package: {name}\nVersion: {version}\nArchitecture: {ARCH}\n"
            f"Maintainer: nobody <nobody@example.org>\n{relations}Description: a test\n"
        )
        (tree / "DEBIAN/control").write_text(control)
        file = self.root / f"pool/{name}_{version.split(':')[-1]}_{ARCH}.deb"
        file.parent.mkdir(exist_ok=True)
        # Not compressed: the size on the disk is the size on the line.
        argv = ["dpkg-deb", "-Znone", "--root-owner-group", "--build", tree, file]
        subprocess.run(argv, check=True, capture_output=True)
        data = file.read_bytes()
        return (
            f"{control}Filename: pool/{file.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\n"
        )


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    root = tmp_path / "archive"
    root.mkdir()
    served = Archive(root)
    monkeypatch.setattr(debian, "KEYRING", served.keyring)
    # Read by our apt-config, handed on to mmdebstrap: no waiting between tries.
    config = tmp_path / "apt.conf"
    config.write_text('Acquire::Retries "0";\nAcquire::http::Proxy "DIRECT";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    yield served
    served.close()


def extract(target: Path, packages: list[str], mirror: str, suite: str = SUITE) -> dict[str, str]:
    return debian.extract(
        packages, suite=suite, mirror=mirror, arch=ARCH, target=target, title="test"
    )


@needs_tools
def test_packages_and_what_they_need_are_unpacked(
    archive: Archive, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "made" / "root"
    with caplog.at_level(logging.INFO, "avocado.paprscm"):
        versions = extract(target, ["second"], archive.mirror)
    assert versions == {"libfirst": "2:1.0-1", "second": "3.5"}
    assert (target / "usr/share/libfirst/content").read_bytes() == b"library" * 100_000
    assert (target / "usr/share/second/content").read_bytes() == b"tool"
    assert (target / "usr/lib/x.so").read_bytes() == b"tool"
    assert (target / "lib").readlink() == Path("usr/lib")
    assert [path.name for path in target.parent.iterdir()] == ["root"], "temporary files stay"
    progress = [record.getMessage() for record in caplog.records]
    assert "test: download: 1 of 1 MB" in progress
    assert "test: unpack: 1 of 1 MB" in progress


@needs_tools
def test_package_that_is_not_there(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no package gone, lost for ppc64el"):
        extract(tmp_path / "root", ["second", "gone", "lost"], archive.mirror)


@needs_tools
def test_suite_that_is_not_there(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no suite potato"):
        extract(tmp_path / "root", ["second"], archive.mirror, suite="potato")


@needs_tools
def test_mirror_that_does_not_answer(archive: Archive, tmp_path: Path) -> None:
    archive.server.server_close()
    with pytest.raises(HostError, match=r"cannot be reached: .*Connection refused") as caught:
        extract(tmp_path / "root", ["second"], archive.mirror)
    assert "mirror=" in str(caught.value.hint)


@needs_tools
def test_download_that_is_cut(archive: Archive, tmp_path: Path) -> None:
    archive.server.cut = True  # type: ignore[attr-defined]
    with pytest.raises(HostError, match="broke off") as caught:
        extract(tmp_path / "root", ["second"], archive.mirror)
    assert "run it again" in str(caught.value.hint)


@needs_tools
def test_package_that_was_changed_on_the_way(archive: Archive, tmp_path: Path) -> None:
    data = bytearray(archive.tool_package.read_bytes())
    data[-600] ^= 1
    archive.tool_package.write_bytes(data)
    with pytest.raises(HostError, match=r"is not what Debian trixie signed: .*[Hh]ash"):
        extract(tmp_path / "root", ["second"], archive.mirror)


@needs_tools
def test_archive_signed_by_a_stranger(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stranger = Archive(other)
    stranger.close()
    monkeypatch.setattr(debian, "KEYRING", stranger.keyring)
    with pytest.raises(HostError, match="has no key that signed") as caught:
        extract(tmp_path / "root", ["second"], archive.mirror)
    assert "debian-archive-keyring" in str(caught.value.hint)


def test_folders_are_merged_into_usr(tmp_path: Path) -> None:
    for name in ("lib/a/real.so", "usr/lib/a/other.so", "sbin/tool", "usr/bin/sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "usr/lib/a/real.so").symlink_to("/lib/a/real.so")
    (tmp_path / "lib/a/other.so").symlink_to("/usr/lib/a/other.so")
    (tmp_path / "bin").symlink_to("usr/bin")
    debian._merge_usr(tmp_path)
    for name in ("lib/a/real.so", "lib/a/other.so", "sbin/tool", "bin/sh"):
        file = tmp_path / "usr" / name
        assert not file.is_symlink()
        assert file.read_text() in (name, f"usr/{name}")
        assert (tmp_path / name).samefile(file)
    assert not (tmp_path / "lib64").exists()


def fake_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What mmdebstrap 1.3.5 and tar print on a full disk.
    fake_tool(
        tmp_path / "bin",
        "mmdebstrap",
        "echo 'tar: ./usr/bin/x: Cannot write: No space left on device' >&2\n"
        "echo 'E: tar --extract failed: 512' >&2\nexit 1",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="no space left") as caught:
        extract(tmp_path / "root", ["x"], "http://127.0.0.1:9")
    assert "cache_dir" in str(caught.value.hint)


def test_failure_of_an_unknown_kind_shows_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(tmp_path / "bin", "mmdebstrap", "echo 'something quite new' >&2; exit 7")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(HostError, match=r"(?s)exit status 7.*something quite new"):
        extract(tmp_path / "root", ["x"], "http://127.0.0.1:9")


def test_mmdebstrap_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt install mmdebstrap"):
        extract(tmp_path / "root", ["x"], "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("with_labels", "without", "expected"),
    [
        (
            "Debian-Security|http://a/debian-security\nDebian|http://b/anything/",
            "",
            "http://b/anything",
        ),
        (
            "",
            "x|https://tools.example/apt\nx|http://b/debian/\nx|http://c/debian",
            "http://b/debian",
        ),
        ("Debian|cdrom:[disc]", "x|http://b/debian", "http://b/debian"),
    ],
)
def test_mirror_of_the_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_labels: str,
    without: str,
    expected: str,
) -> None:
    script = (
        f"case $2 in --release-info) printf '%s\\n' '{with_labels}';;"
        f" *) printf '%s\\n' '{without}';; esac"
    )
    fake_tool(tmp_path / "bin", "apt-get", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert debian.resolve_mirror("auto") == expected


def test_host_without_a_debian_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path / "bin", "apt-get", "echo 'Ubuntu|http://b/ubuntu'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match=r"no Debian mirror \(set mirror="):
        debian.resolve_mirror("auto")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no apt .*set mirror="):
        debian.resolve_mirror("auto")


def test_mirror_that_was_given() -> None:
    assert debian.resolve_mirror("https://m.example/debian/") == "https://m.example/debian"
    for wrong in ("m.example/debian", "http://a b/debian", "", "http://a/debian [trusted=yes]"):
        with pytest.raises(Error, match="is not a URI"):
            debian.resolve_mirror(wrong)
