# SPDX-License-Identifier: GPL-2.0-or-later
"""Export cache entries to one file, and import them on another machine.

The file is a tar archive, compressed with zstd. Each entry begins with its manifest, followed by
its files. An import checks each file against its digest in the manifest, and the entry's key
against its fields. This detects damage, but does not protect against an attacker: an imported
kernel and QEMU run on this machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import zstandard

from paprscm import log
from paprscm.errors import ConfigError, HostError
from paprscm.host.cache import MANIFEST, Cache, CacheEntry

_BLOCK = 1 << 16
_PLACE = re.compile(rf"([a-z][a-z-]*)/([0-9a-f]{{16}})/{re.escape(MANIFEST)}")
_LEVEL = 3
_NOT_OURS = "it is not a complete file of `paprscm cache export`"


def export(entries: Sequence[CacheEntry], file: Path) -> int:
    """Write entries to a file, completely or not at all; return its size in bytes.

    Args:
        entries: the entries.
        file: the new file; an existing one is replaced.

    Raises:
        HostError: it cannot be written, is a device or a pipe, or an entry was removed meanwhile.
    """
    if file.exists() and not file.is_file():
        raise HostError(f"{file} is not a regular file", hint="give the name of a new file")
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    total = sum(entry.size_bytes for entry in entries)
    exported_bytes = 0
    try:
        with (
            log.progress("export", total, unit="bytes") as bar,
            draft.open("wb") as raw,
            zstandard.ZstdCompressor(level=_LEVEL, threads=-1).stream_writer(raw) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            for entry in entries:
                base = f"{entry.kind}/{entry.key}"
                archive.add(entry.path / MANIFEST, f"{base}/{MANIFEST}", filter=_anonymous)
                for path in sorted(entry.path.rglob("*")):
                    name = str(path.relative_to(entry.path))
                    if name != MANIFEST:
                        archive.add(path, f"{base}/{name}", recursive=False, filter=_anonymous)
                exported_bytes += entry.size_bytes
                bar.update(exported_bytes)
        draft.replace(file)
    except OSError as error:
        raise HostError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return file.stat().st_size


def restore(cache: Cache, file: Path) -> tuple[list[CacheEntry], int]:
    """Add the entries of a file to the cache; entries that the cache has stay unchanged.

    Args:
        cache: the destination.
        file: a file written by export().

    Returns:
        The added entries, and the number of entries that the cache already had.

    Raises:
        ConfigError: the file was not written by export(), or is damaged. Complete entries before
            the damage were added.
        HostError: the cache cannot be written.
    """
    added: list[CacheEntry] = []
    present = 0
    try:
        with (
            file.open("rb") as raw,
            zstandard.ZstdDecompressor().stream_reader(raw) as plain,
            tarfile.open(fileobj=plain, mode="r|") as archive,
            log.progress("import", file.stat().st_size, unit="bytes") as bar,
        ):
            for incoming in _entries(archive):
                with cache.adopt(incoming.kind, incoming.key) as folder:
                    if folder is None:
                        present += 1
                    incoming.write(folder)
                if folder is not None:
                    added.append(cache.get(incoming.kind, incoming.key))
                bar.update(raw.tell())
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        raise
    except (tarfile.TarError, zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: {error}", hint=_NOT_OURS) from error
    if not added and not present:
        raise ConfigError(f"{file} holds no cache entry", hint=_NOT_OURS)
    return added, present


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


@dataclass
class _Incoming:
    """One entry of an archive that is being read.

    Attributes:
        kind, key: kind and key in the cache.
        manifest: its manifest, unchanged.
        members: its files, folders and links; read each before the next.
    """

    kind: str
    key: str
    manifest: bytes
    members: Iterator[tuple[str, tarfile.TarInfo, BinaryIO | None]]
    links: list[tuple[Path, str]] = field(default_factory=list)

    def write(self, folder: Path | None) -> None:
        """Write the entry into a folder and check each file; None: skip the entry.

        Raises:
            ValueError: it does not match its manifest.
        """
        place = f"{self.kind}/{self.key}"
        manifest = json.loads(self.manifest)
        sealed: dict[str, Any] = manifest["files"]
        if Cache.key(manifest["fields"]) != self.key:
            raise ValueError(f"{place} is not the key of its manifest")
        written = set()
        modes: list[tuple[Path, int]] = []
        for name, info, content in self.members:
            if folder is None:
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if info.isdir():
                target.mkdir(exist_ok=True)
                modes.append((target, info.mode))
            elif info.issym():
                self.links.append((target, info.linkname))
            elif content is not None and name in sealed:
                digest = _write_sparse(content, target, info.mode)
                if digest != sealed[name]["sha256"]:
                    raise ValueError(f"{place}/{name} is damaged")
                mtime_ns = sealed[name]["mtime_ns"]
                os.utime(target, ns=(mtime_ns, mtime_ns))
                written.add(name)
            else:
                raise ValueError(f"{place}/{name} is not in its manifest")
        if folder is None:
            return
        if missing := sorted(set(sealed) - written):
            raise ValueError(f"{place} lacks {', '.join(missing[:5])}")
        # Last, so that no file is written through a link of the archive.
        for target, destination in self.links:
            target.symlink_to(destination)
        for target, mode in reversed(modes):
            target.chmod(mode & 0o777)
        (folder / MANIFEST).write_bytes(self.manifest)


def _entries(archive: tarfile.TarFile) -> Iterator[_Incoming]:
    """The entries of an archive; write each before the next."""
    # Iterating over the archive itself would start again with the members already read.
    stream = iter(archive.next, None)
    pending: list[tarfile.TarInfo] = []

    def members(base: str) -> Iterator[tuple[str, tarfile.TarInfo, BinaryIO | None]]:
        for info in stream:
            if not info.name.startswith(base + "/"):
                pending.append(info)
                return
            path = PurePosixPath(info.name[len(base) + 1 :])
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"{info.name} is outside of the cache")
            if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
                raise ValueError(f"{info.name} is a special file")
            if info.islnk():
                raise ValueError(f"{info.name} is a hard link")
            content = archive.extractfile(info) if info.isreg() else None
            yield str(path), info, content  # type: ignore[misc]

    while True:
        info = pending.pop() if pending else next(stream, None)
        if info is None:
            return
        match = _PLACE.fullmatch(info.name)
        if match is None or not info.isreg():
            raise ValueError(f"{info.name} where a manifest is expected")
        content = archive.extractfile(info)
        assert content is not None  # noqa: S101
        yield _Incoming(match[1], match[2], content.read(), members(f"{match[1]}/{match[2]}"))


def _write_sparse(content: BinaryIO, target: Path, mode: int) -> str:
    """Write a file with holes instead of zeros; return the SHA-256 digest of its content."""
    digest = hashlib.sha256()
    size = 0
    with target.open("xb") as output:
        while block := content.read(_BLOCK):
            digest.update(block)
            size += len(block)
            if any(block):
                output.write(block)
            else:
                output.seek(len(block), io.SEEK_CUR)
        output.truncate(size)
    target.chmod(mode & 0o777)
    return digest.hexdigest()
