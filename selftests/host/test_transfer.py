# SPDX-License-Identifier: GPL-2.0-or-later
"""Import gives exactly the exported entries; a damaged or foreign file is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from paprscm.errors import ConfigError, HostError
from paprscm.host import transfer
from paprscm.host.cache import MANIFEST, Cache, CacheEntry

HOLE = 4 << 20


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def other(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "elsewhere" / "other cache")


def fill(folder: Path) -> None:
    (folder / "tool").write_text("#!/bin/sh\n")
    (folder / "tool").chmod(0o755)
    (folder / "key").write_text("secret")
    (folder / "key").chmod(0o600)
    (folder / "tree/usr/lib").mkdir(parents=True)
    (folder / "tree/lib").symlink_to("usr/lib")
    (folder / "tree/etc").mkdir()
    (folder / "tree/etc/link").symlink_to("/etc/alternatives/x")
    with (folder / "disk.img").open("wb") as disk:
        disk.write(b"begin")
        disk.seek(HOLE)
        disk.write(b"end")
        disk.truncate(2 * HOLE)


@pytest.fixture
def entries(cache: Cache) -> list[CacheEntry]:
    return [
        cache.ensure("userland", {"suite": "trixie"}, fill),
        cache.ensure("kernel", {"source": "6.12"}, lambda folder: fill(folder)),
    ]


@pytest.fixture
def file(entries: list[CacheEntry], tmp_path: Path) -> Path:
    file = tmp_path / "cache.tar.zst"
    assert transfer.export(entries, file) == file.stat().st_size
    return file


def test_import_gives_the_same_entries(entries: list[CacheEntry], other: Cache, file: Path) -> None:
    added, present = transfer.restore(other, file)
    assert ([entry.path.relative_to(other.root) for entry in added], present) == (
        [Path(entry.kind, entry.key) for entry in entries],
        0,
    )
    imported = other.find("userland", {"suite": "trixie"})
    assert imported is not None
    assert imported.created == entries[0].created
    for name in ("tool", "key", "disk.img"):
        original, copy = entries[0].path / name, imported.path / name
        assert original.read_bytes() == copy.read_bytes()
        assert original.stat().st_mode == copy.stat().st_mode
        assert original.stat().st_mtime_ns == copy.stat().st_mtime_ns
    assert (imported.path / "disk.img").stat().st_blocks * 512 < HOLE, "holes stay holes"
    assert (imported.path / "tree/lib").readlink() == Path("usr/lib")
    assert (imported.path / "tree/etc/link").readlink() == Path("/etc/alternatives/x")
    assert transfer.restore(other, file) == ([], 2)


def test_identity_depends_on_the_content(
    cache: Cache, entries: list[CacheEntry], other: Cache, file: Path, tmp_path: Path
) -> None:
    transfer.restore(other, file)
    disk = Path("userland", entries[0].key, "disk.img")
    assert cache.identity(cache.root / disk) == other.identity(other.root / disk)
    assert cache.identity(cache.root / disk) != cache.identity(entries[0].path / "tool")
    own = tmp_path / "vmlinux"
    own.write_text("a")
    before = cache.identity(own)
    own.write_text("bc")
    assert cache.identity(own) != before


def test_cut_file(other: Cache, file: Path) -> None:
    data = file.read_bytes()
    for length in (0, 3, len(data) // 2, len(data) - 20):
        file.write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"cache\.tar\.zst") as caught:
            transfer.restore(other, file)
        assert "cache export" in str(caught.value.hint)
    assert list(other.root.glob("*/.*")) == []


def repack(
    file: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]
) -> None:
    plain = zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read()
    output = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(plain)) as old,
        tarfile.open(fileobj=output, mode="w") as new,
    ):
        for info in old:
            content = old.extractfile(info) if info.isreg() else None
            info, data = change(info, content.read() if content else b"")
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    file.write_bytes(zstandard.compress(output.getvalue()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tool", r"userland/\w+/tool is damaged"),
        (MANIFEST, r"is not the key of its manifest"),
    ],
)
def test_changed_content(other: Cache, file: Path, name: str, message: str) -> None:
    def change(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if info.name.startswith("userland/") and info.name.endswith("/" + name):
            if name == MANIFEST:
                manifest = json.loads(data)
                manifest["fields"] = {"suite": "sid"}
                data = json.dumps(manifest).encode()
            else:
                data = data.replace(b"sh", b"rm")
        return info, data

    repack(file, change)
    with pytest.raises(ConfigError, match=message):
        transfer.restore(other, file)
    assert other.entries() == []


@pytest.mark.parametrize(
    "name", ["../../escaped", "/var/escaped", "userland/../../escaped", "locks/x", "extra"]
)
def test_names_that_lead_elsewhere(other: Cache, file: Path, tmp_path: Path, name: str) -> None:
    def change(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if info.name.endswith("/tool"):
            base = info.name.removesuffix("tool")
            info.name = base + name if name in ("extra", "../../escaped") else name
        return info, data

    repack(file, change)
    with pytest.raises(ConfigError, match=r"outside of|expected|not in its manifest|lacks tool"):
        transfer.restore(other, file)
    assert list(tmp_path.rglob("*escaped*")) == []


def test_nothing_is_written_through_a_link(other: Cache, file: Path, tmp_path: Path) -> None:
    """A link to a folder outside of the cache, and then a file below the link."""

    def change(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if info.name.endswith("/tree/lib"):
            info.linkname = str(tmp_path)
        elif info.name.endswith("/tree/usr/lib"):
            info.name = info.name.replace("usr/lib", "lib/escaped")
        return info, data

    repack(file, change)
    with pytest.raises((ConfigError, HostError)):
        transfer.restore(other, file)
    assert not (tmp_path / "escaped").exists()


def test_file_that_does_not_exist(other: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        transfer.restore(other, tmp_path / "gone")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="text"):
        transfer.restore(other, tmp_path / "text")


def test_export_to_a_file_that_cannot_be_written(entries: list[CacheEntry]) -> None:
    with pytest.raises(HostError, match="cannot be written"):
        transfer.export(entries, Path("/proc/cache.tar.zst"))


def test_export_does_not_replace_a_device_or_a_pipe(
    entries: list[CacheEntry], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(HostError, match="is not a regular file"):
        transfer.export(entries, pipe)
    assert pipe.is_fifo()
