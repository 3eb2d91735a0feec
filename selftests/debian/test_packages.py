# SPDX-License-Identifier: GPL-2.0-or-later
"""Download of packages by the real apt from a real archive; each failure has a hint."""

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
from typing import Any

import pytest

from paprscm.debian import apt
from paprscm.debian import packages as debian
from paprscm.debian.apt import AptSource, UnavailableError
from paprscm.debian.packages import Archive, Download
from paprscm.errors import ConfigError, Error, HostError
from paprscm.host.cache import Cache

SUITE, ARCH = "trixie", "ppc64el"

needs_tools = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("apt-get", "gpg", "dpkg-deb")),
    reason="needs apt, gpg and dpkg-deb",
)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the archive with ranges; cuts packages short while `cut` is set on the server."""

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.suffix != ".deb" or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cut = self.server.cut  # type: ignore[attr-defined]
        body = content[start : len(content) // 2 if cut else None]
        self.server.sent.append((path.name, len(body)))  # type: ignore[attr-defined]
        self.wfile.write(body)
        self.close_connection = True


class Served:
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
        self._release()
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(root))
        )
        self.server.cut = False  # type: ignore[attr-defined]
        self.server.sent = []  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.mirror = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        subprocess.run(["gpgconf", "--homedir", self._gnupg, "--kill", "all"], check=False)

    def add_sources(self, name: str, *versions: str) -> None:
        """Add versions of a source package, each of three files that begin with the version."""
        stanzas = []
        for version in versions:
            plain = version.partition(":")[2]
            stanzas.append(
                f"Package: {name}\nVersion: {version}\nDirectory: pool\nFormat: 3.0 (quilt)\n"
            )
            for hash_name, title in (("md5", "Files"), ("sha256", "Checksums-Sha256")):
                stanzas[-1] += f"{title}:\n"
                for suffix in (".dsc", ".orig.tar.xz", ".debian.tar.xz"):
                    base = plain.rpartition("-")[0] if "orig" in suffix else plain
                    file = self.root / f"pool/{name}_{base}{suffix}"
                    file.write_text(f"{plain} {suffix}\n")
                    data = file.read_bytes()
                    digest = hashlib.new(hash_name, data).hexdigest()
                    stanzas[-1] += f" {digest} {len(data)} {file.name}\n"
        index = self.root / f"dists/{SUITE}/main/source/Sources"
        index.parent.mkdir()
        index.write_text("\n".join(stanzas))
        self._release()

    def _release(self) -> None:
        """Write and sign the release file for the indexes that there are."""
        top = self.root / "dists" / SUITE
        indexes = [*top.glob("main/*/Packages"), *top.glob("main/source/Sources")]
        lines = [
            f" {hashlib.sha256(data).hexdigest()} {len(data)} {index.relative_to(top)}\n"
            for index in indexes
            for data in [index.read_bytes()]
        ]
        release = (
            f"Origin: Debian\nSuite: {SUITE}\nCodename: {SUITE}\nArchitectures: {ARCH}\n"
            # Expired long ago: an old release file is accepted.
            "Components: main\nDate: Sat, 01 Mar 2025 00:00:00 UTC\n"
            "Valid-Until: Sat, 08 Mar 2025 00:00:00 UTC\n"
            f"SHA256:\n{''.join(lines)}"
        )
        signed = self._gpg("--clearsign", stdin=release.encode())
        (top / "InRelease").write_bytes(signed)

    def _gpg(self, *words: str, stdin: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self._gnupg), "--batch", "--passphrase", "", *words]
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
        # Not compressed, so that the size on disk is the size that is transferred.
        argv = ["dpkg-deb", "-Znone", "--root-owner-group", "--build", str(tree), str(file)]
        subprocess.run(argv, check=True, capture_output=True)
        data = file.read_bytes()
        return (
            f"{control}Filename: pool/{file.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\n"
        )


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    root = tmp_path / "archive"
    root.mkdir()
    served = Served(root)
    monkeypatch.setattr(apt, "KEYRING", served.keyring)
    # Read by apt-config and passed on: no retries.
    config = tmp_path / "apt.conf"
    config.write_text('Acquire::Retries "0";\nAcquire::http::Proxy "DIRECT";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    yield served
    served.close()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache, 100%: of it")


@pytest.fixture
def mirror(archive: Served, cache: Cache) -> Archive:
    return Archive(cache, archive.mirror)


def download(
    mirror: Archive, packages: list[str], suite: str = SUITE, *, alone: bool = False
) -> Download:
    return mirror.download(packages, suite=suite, arch=ARCH, title="test", alone=alone)


@needs_tools
def test_packages_and_their_dependencies_are_unpacked(
    mirror: Archive, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "made" / "root"
    with caplog.at_level(logging.INFO, "avocado.paprscm"):
        versions = mirror.extract(["second"], suite=SUITE, arch=ARCH, target=target, title="test")
    assert versions == {"libfirst": "2:1.0-1", "second": "3.5"}
    assert (target / "usr/share/libfirst/content").read_bytes() == b"library" * 100_000
    assert (target / "usr/share/second/content").read_bytes() == b"tool"
    # An old path, as in packages of Debian 12.
    assert (target / "usr/lib/x.so").read_bytes() == b"tool"
    assert (target / "lib").readlink() == Path("usr/lib")
    assert not (target / "lib64").is_symlink(), "the folder is empty"
    progress = [record.getMessage() for record in caplog.records]
    assert "test: download: 1 of 1 MB" in progress
    assert "test: unpack: 1 of 1 MB" in progress
    left = [path.name for path in (mirror.cache.root / apt.DOWNLOADS).iterdir()]
    assert len(left) == 1, "packages stay after they were unpacked"
    assert left[0].startswith("index-")
    mirror.prune(unused_for_s=3600)
    assert (mirror.cache.root / apt.DOWNLOADS / left[0]).is_dir()
    mirror.prune(unused_for_s=0)
    assert not (mirror.cache.root / apt.DOWNLOADS / left[0]).exists()


@needs_tools
def test_package_that_does_not_exist(mirror: Archive) -> None:
    with pytest.raises(
        UnavailableError, match=r"Debian trixie .*ppc64el.* has no package gone, lo"
    ):
        download(mirror, ["second", "gone", "lost"])


@needs_tools
def test_suite_that_does_not_exist(mirror: Archive) -> None:
    with pytest.raises(UnavailableError, match="has no suite potato"):
        download(mirror, ["second"], suite="potato")


@needs_tools
def test_files_of_the_index_that_the_mirror_lacks(
    archive: Served, mirror: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    """During a mirror's update the next suite is tried, and the error names each file."""
    archive.tool_package.unlink()
    total, absent = mirror.absent_files(["second"], suite=SUITE, arch=ARCH)
    assert absent == ["second_3.5_ppc64el.deb"]
    assert total > 700_000
    with pytest.raises(UnavailableError, match=r"lacks 1 package files .*: second_3.5_ppc64el.deb"):
        download(mirror, ["second"])
    with (
        caplog.at_level(logging.INFO, "avocado.paprscm"),
        pytest.raises(UnavailableError) as caught,
    ):
        debian.first_available(
            [SUITE, "potato"], lambda suite: download(mirror, ["second"], suite), title="userland"
        )
    assert "no suite of trixie, potato can provide the userland" in caught.value.message
    assert "second_3.5_ppc64el.deb" in caught.value.message
    assert "has no suite potato" in caught.value.message
    assert "mirror=" in str(caught.value.hint)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "trying the next suite" in line] == [
        f"Debian trixie ({archive.mirror}, ppc64el) lacks 1 package files of its index: "
        "second_3.5_ppc64el.deb; trying the next suite"
    ]


def test_first_suite_with_the_packages() -> None:
    tried = []

    def attempt(suite: str) -> str:
        tried.append(suite)
        if suite != "c":
            raise UnavailableError(f"{suite} does not have it")
        return suite.upper()

    assert debian.first_available("abcd", attempt, title="x") == "C"
    assert tried == ["a", "b", "c"]
    # If the mirror does not answer, no other suite is tried.
    with pytest.raises(HostError, match="no network"):
        debian.first_available(
            "ab", lambda _: (_ for _ in ()).throw(HostError("no network")), title="x"
        )
    assert debian.suites("auto") == debian.AUTO_SUITES
    assert debian.suites("sid,forky") == ("sid", "forky")


def test_offline_names_what_is_missing(cache: Cache) -> None:
    with pytest.raises(HostError, match=r"offline=yes, .* lacks the test") as caught:
        download(Archive(cache, "http://127.0.0.1:9/debian", offline=True), ["second"])
    assert "cache import" in str(caught.value.hint)


@needs_tools
def test_mirror_that_does_not_answer(archive: Served, mirror: Archive) -> None:
    archive.server.shutdown()
    archive.server.server_close()
    with pytest.raises(HostError, match=r"cannot be reached: .*Connection refused") as caught:
        download(mirror, ["second"])
    assert not isinstance(caught.value, UnavailableError)
    assert "mirror=" in str(caught.value.hint)


@needs_tools
def test_package_without_its_dependencies(archive: Served, mirror: Archive) -> None:
    """A mirror that lacks dependencies can still provide the Linux source."""
    next(archive.root.glob("pool/libfirst*")).unlink()
    done = download(mirror, ["second"], alone=True)
    assert [(file.package, file.version) for file in done.files] == [("second", "3.5")]
    assert (done.folder / done.files[0].name).stat().st_size == done.size_bytes
    with pytest.raises(UnavailableError, match="has no package gone"):
        download(mirror, ["gone"], alone=True)
    archive.tool_package.unlink()
    done.remove()
    with pytest.raises(UnavailableError, match=r"lacks 1 package files .*: second_3.5_ppc64el.deb"):
        download(mirror, ["second"], alone=True)


@needs_tools
@pytest.mark.parametrize("alone", [False, True])
def test_interrupted_download_is_resumed(archive: Served, mirror: Archive, alone: bool) -> None:
    archive.server.cut = True  # type: ignore[attr-defined]
    with pytest.raises(HostError, match="was interrupted") as caught:
        download(mirror, ["libfirst"], alone=alone)
    assert "run it again to continue" in str(caught.value.hint)
    archive.server.cut = False  # type: ignore[attr-defined]
    sent: list[tuple[str, int]] = archive.server.sent  # type: ignore[attr-defined]
    sent.clear()
    done = download(mirror, ["libfirst"], alone=alone)
    sizes = {file.name: file.size_bytes for file in done.files}
    for name, size_bytes in sizes.items():
        assert (done.folder / name).stat().st_size == size_bytes
    assert 0 < sum(count for _, count in sent) <= sum(sizes.values()) * 0.6
    # A complete file is not fetched again.
    sent.clear()
    assert download(mirror, ["libfirst"], alone=alone).files == done.files
    assert sent == []


@needs_tools
def test_download_that_is_stopped(mirror: Archive) -> None:
    calls = []

    def proceed() -> None:
        calls.append(1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        mirror.download(["second"], suite=SUITE, arch=ARCH, title="test", proceed=proceed)
    assert calls == [1]


@needs_tools
def test_package_that_was_changed_in_transit(archive: Served, mirror: Archive) -> None:
    data = bytearray(archive.tool_package.read_bytes())
    data[-600] ^= 1
    archive.tool_package.write_bytes(data)
    with pytest.raises(
        UnavailableError, match=r"do not match the signatures of Debian trixie: .*[Hh]ash"
    ):
        download(mirror, ["second"])


@needs_tools
def test_archive_signed_with_an_unknown_key(
    mirror: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stranger = Served(other)
    stranger.close()
    monkeypatch.setattr(apt, "KEYRING", stranger.keyring)
    with pytest.raises(UnavailableError, match="has no key that signed") as caught:
        download(mirror, ["second"])
    assert "debian-archive-keyring" in str(caught.value.hint)


def fake_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


def test_no_space_left(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Message of apt 2.6 for a full disk.
    fake_tool(
        tmp_path / "bin",
        "apt-get",
        "echo 'E: You don'\\''t have enough free space in /x/archives/.' >&2\nexit 100",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="no space left") as caught:
        download(Archive(cache, "http://127.0.0.1:9"), ["x"])
    assert "cache_dir" in str(caught.value.hint)


def test_failure_of_an_unknown_kind_shows_the_output(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(tmp_path / "bin", "apt-get", "echo 'something quite new' >&2; exit 7")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(HostError, match=r"(?s)exit status 7.*something quite new"):
        download(Archive(cache, "http://127.0.0.1:9"), ["x"])


@needs_tools
def test_package_that_cannot_be_unpacked(mirror: Archive, tmp_path: Path) -> None:
    done = download(mirror, ["second"])
    (done.folder / done.files[0].name).write_bytes(b"not a package")
    with pytest.raises(HostError, match=rf"{done.files[0].name} cannot be unpacked: dpkg-deb: "):
        done.unpack(tmp_path / "root", title="test")


def test_host_without_apt(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="lacks apt-get or dpkg-deb") as caught:
        download(Archive(cache, "http://127.0.0.1:9"), ["x"])
    assert "apt and dpkg" in str(caught.value.hint)


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


def test_mirror_from_the_settings() -> None:
    assert debian.resolve_mirror("https://m.example/debian/") == "https://m.example/debian"
    for wrong in ("m.example/debian", "http://a b/debian", "", "http://a/debian [trusted=yes]"):
        with pytest.raises(Error, match="is not a URI"):
            debian.resolve_mirror(wrong)


@needs_tools
def test_newest_source_package_whose_files_are_there(
    archive: Served, mirror: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(version: str = "", name: str = "tool") -> str:
        target = mirror.cache.root / "source"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        exact = mirror.fetch_source(
            name, suite=SUITE, version=version, target=target, title="source"
        )
        for file in target.iterdir():
            assert file.read_text().startswith(exact.partition(":")[2].partition("+")[0])
        assert len(list(target.iterdir())) == 3
        return exact

    archive.add_sources("tool", "1:1.9.1+ds-1", "1:2.0.3+ds-2~bpo12+1", "1:2.1.0-1")
    assert fetch() == "1:2.1.0-1"
    assert fetch("1.9.1") == fetch("1.9.1+ds-1") == fetch("1:1.9.1+ds-1") == "1:1.9.1+ds-1"
    assert fetch("2.0.3") == "1:2.0.3+ds-2~bpo12+1"
    for version in ("2.0", "2.1.0-2", "1"):
        with pytest.raises(UnavailableError, match=rf"no source package tool {version} ") as caught:
            fetch(version)
        assert str(caught.value.hint) == ("it has 1:2.1.0-1, 1:2.0.3+ds-2~bpo12+1, 1:1.9.1+ds-1")
    with pytest.raises(UnavailableError, match=r"no source package gone "):
        fetch(name="gone")
    (archive.root / "pool/tool_2.1.0-1.dsc").unlink()
    with caplog.at_level(logging.INFO, "avocado.paprscm"):
        assert fetch() == "1:2.0.3+ds-2~bpo12+1"
    assert "tool_2.1.0-1.dsc; trying the next version" in caplog.text
    left = [path.name for path in (mirror.cache.root / apt.DOWNLOADS).iterdir()]
    assert all(name.startswith("index-") for name in left), "files stay after they were moved"
    with pytest.raises(UnavailableError, match=r"lacks 1 package files .*: tool_2.1.0-1.dsc"):
        fetch("2.1.0")


@needs_tools
def test_a_download_needs_no_cache_file(
    archive: Served, mirror: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that updates the index deletes them, even while apt writes them."""
    fetch = AptSource._fetch

    def beside_an_update(source: AptSource, *words: Any) -> None:
        ended = threading.Event()

        def delete() -> None:
            # A pause, or apt would never find the moment to write them.
            while not ended.wait(0.001):
                for file in (source._index / "cache").glob("*.bin*"):
                    file.unlink(missing_ok=True)

        thread = threading.Thread(target=delete)
        thread.start()
        try:
            fetch(source, *words)
        finally:
            ended.set()
            thread.join()

    monkeypatch.setattr(AptSource, "_fetch", beside_an_update)
    for _ in range(4):
        download(mirror, ["libfirst"]).remove()
