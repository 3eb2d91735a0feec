# SPDX-License-Identifier: GPL-2.0-or-later
"""Export cache entries to one file, and import them on another machine.

The file is a tar archive, compressed with zstd. For each entry it holds the manifest first, then
the files that it names; an import checks each file against its digest there, and the entry's key
against its fields. That guards against damage, not against an attacker: kernel and QEMU of an
imported file run on this machine.
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
    """Write entries to a file, whole or not at all; its size in bytes.

    Args:
        entries: what to write.
        file: the new file; one of that name is replaced.

    Raises:
        HostError: it cannot be written, or an entry was removed meanwhile.
    """
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    total = sum(entry.size_bytes for entry in entries)
    done = 0
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
                done += entry.size_bytes
                bar.update(done)
        draft.replace(file)
    except OSError as error:
        raise HostError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return file.stat().st_size


def restore(cache: Cache, file: Path) -> tuple[list[CacheEntry], int]:
    """Add a file's entries to the cache; those that are there already stay as they are.

    Args:
        cache: where they go.
        file: what export() wrote.

    Returns:
        The entries that were added, and the number of those that were there.

    Raises:
        ConfigError: this is not such a file, or it is damaged. Complete entries before the damage
            were added.
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
    """One entry, as it comes from the archive.

    Attributes:
        kind, key: its place in the cache.
        manifest: its manifest, as it was sealed.
        members: its files, folders and links; each must be read before the next.
    """

    kind: str
    key: str
    manifest: bytes
    members: Iterator[tuple[str, tarfile.TarInfo, BinaryIO | None]]
    links: list[tuple[Path, str]] = field(default_factory=list)

    def write(self, folder: Path | None) -> None:
        """Write the entry into a folder, each file checked; None: only skip it.

        Raises:
            ValueError: it is not what its manifest says.
        """
        place = f"{self.kind}/{self.key}"
        manifest = json.loads(self.manifest)
        wanted: dict[str, Any] = manifest["files"]
        if Cache.key(manifest["fields"]) != self.key:
            raise ValueError(f"{place} is not the key of its manifest")
        seen = set()
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
            elif content is not None and name in wanted:
                digest = _write_sparse(content, target, info.mode)
                if digest != wanted[name]["sha256"]:
                    raise ValueError(f"{place}/{name} is damaged")
                mtime_ns = wanted[name]["mtime_ns"]
                os.utime(target, ns=(mtime_ns, mtime_ns))
                seen.add(name)
            else:
                raise ValueError(f"{place}/{name} is not in its manifest")
        if folder is None:
            return
        if missing := sorted(set(wanted) - seen):
            raise ValueError(f"{place} lacks {', '.join(missing[:5])}")
        # Last: nothing is written through a link of the archive.
        for target, where in self.links:
            target.symlink_to(where)
        for target, mode in reversed(modes):
            target.chmod(mode & 0o777)
        (folder / MANIFEST).write_bytes(self.manifest)


def _entries(archive: tarfile.TarFile) -> Iterator[_Incoming]:
    """The entries of an archive, one after the other; each must be written before the next."""
    # Iterating over the archive itself would begin with the members that were read before.
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
    """Write a file with holes in the place of zeros; the SHA-256 digest of its content."""
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
