# SPDX-License-Identifier: GPL-2.0-or-later
"""Content-addressed cache of built and downloaded artifacts; an entry is complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paprscm.errors import Error, HostError
from paprscm.log import logger

MANIFEST = "manifest.json"
_HINT_ELSEWHERE = "set cache_dir to a folder that you can write to"


@dataclass(frozen=True)
class CacheEntry:
    """One complete entry of the cache.

    Attributes:
        path: its folder; callers must not write to it.
        kind: "kernel", "userland", …
        fields: everything that determines its content; the key is their digest.
        size_bytes: disk usage of its files.
        created: time of its creation, seconds since the epoch.
        used: time of its last use, seconds since the epoch.
        is_workspace: its files change (`Cache.workspace`).
    """

    path: Path
    kind: str
    fields: dict[str, str]
    size_bytes: int
    created: float
    used: float
    is_workspace: bool

    @property
    def key(self) -> str:
        """The digest of the fields, which is the folder's name."""
        return self.path.name


class Cache:
    """Content-keyed folders below one root.

    An entry is built in a temporary folder and published by rename, so that a reader never sees a
    partial one. A manifest holds size, time and digest of each file: an entry with a truncated,
    changed or missing file is detected at its next use, and built again.

    Args:
        root: the cache's folder; created with mode 0700 for the first entry.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def ensure(
        self,
        kind: str,
        fields: Mapping[str, str],
        build: Callable[[Path], None],
        *,
        needs_bytes: int = 0,
        keep: int | None = None,
    ) -> CacheEntry:
        """Return the entry of `kind` with `fields`; build it if it is absent or damaged.

        Args:
            kind: kind of the entry; a folder name.
            fields: everything that determines the content.
            build: fills an empty folder.
            needs_bytes: free space that the build requires.
            keep: after a build, keep so many entries of the kind, the most recently used ones.

        Raises:
            HostError: no space, or no permission.
            Error: raised by `build`; the unfinished entry is removed.
        """
        place = self._place(kind, fields)
        if entry := self._usable(place, kind):
            return entry
        with self.lock(f"{kind}-{place.name}", purpose=f"builds the {kind}"):
            # Another process may have built it in the meantime.
            if entry := self._usable(place, kind):
                return entry
            self._make(place, fields, build, needs_bytes)
        entry = self._usable(place, kind)
        if entry is None:
            raise HostError(f"the {kind} was built but cannot be read back from {place}")
        if keep is not None:
            for old in self.entries(kind)[keep:]:
                self.remove(old.path)
        return entry

    def find(self, kind: str, fields: Mapping[str, str]) -> CacheEntry | None:
        """The entry if it is complete, else None; nothing is built."""
        return self._usable(self._place(kind, fields), kind)

    def get(self, kind: str, key: str) -> CacheEntry:
        """The entry with this key.

        Raises:
            HostError: the cache has no such entry.
        """
        entry = self._read(self.root / kind / key, kind)
        if entry is None:
            raise HostError(f"the cache {self.root} has no entry {kind}/{key}")
        return entry

    @contextmanager
    def workspace(self, kind: str, fields: Mapping[str, str], *, purpose: str) -> Iterator[Path]:
        """Lock and yield a folder whose files change, such as the objects of an incremental build.

        It is not checked for damage; `entries` and `prune` include it.

        Args:
            kind: kind of the entry; a folder name.
            fields: identification of the folder.
            purpose: action of the holder, for messages of waiting processes.
        """
        place = self._place(kind, fields)
        with self.lock(f"{kind}-{place.name}", purpose=purpose):
            with self._write_errors():
                _make_private(place)
                _write_manifest(place, fields, None)
                os.utime(place)
            yield place

    @contextmanager
    def adopt(self, kind: str, key: str) -> Iterator[Path | None]:
        """Yield an empty folder for an imported entry, which brings its own manifest.

        The entry is published when the body of the `with` ends, and removed if the body raises.
        Yields None if the cache already has the entry.
        """
        place = self.root / kind / key
        with self.lock(f"{kind}-{key}", purpose=f"imports the {kind}"):
            if self._usable(place, kind):
                yield None
                return
            with self._work_folder(place) as work:
                yield work
                os.sync()

    def identity(self, path: Path) -> str:
        """A text that changes with the file's content.

        For a file in the cache it is the digest in the manifest, which is the same on every
        machine; for any other file it consists of path, size and time.
        """
        path = path.resolve()
        root = self.root.resolve()
        if path.is_relative_to(root):
            kind, key, *rest = path.relative_to(root).parts
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                files = json.loads((root / kind / key / MANIFEST).read_bytes())["files"]
                return f"{kind} {files['/'.join(rest)]['sha256']}"
        info = path.stat()
        return f"{path} {info.st_size} {info.st_mtime_ns}"

    def entries(self, kind: str = "*") -> list[CacheEntry]:
        """All entries, or those of a kind, the most recently used first."""
        manifests = self.root.glob(f"{kind}/*/{MANIFEST}")
        entries = (self._read(m.parent, m.parent.parent.name) for m in manifests)
        return sorted((e for e in entries if e), key=lambda e: e.used, reverse=True)

    def prune(self, *, unused_for_s: float) -> list[CacheEntry]:
        """Remove and return the entries that were not used in the last `unused_for_s` seconds.

        Entries that are being built stay. The remains of an unfinished build stay, too: the next
        build of the same entry removes them.
        """
        unused = [e for e in self.entries() if time.time() - e.used >= unused_for_s]
        return [entry for entry in unused if self.remove(entry.path)]

    def remove(self, place: Path) -> bool:
        """Remove the entry in this folder; return False if it is being built and stays."""
        with self.lock(f"{place.parent.name}-{place.name}", purpose="prunes", wait=False) as locked:
            if locked and place.exists():
                self._discard(place)
            return locked

    @contextmanager
    def lock(self, name: str, *, purpose: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock `name` among all processes on this machine.

        The kernel releases it when its holder dies, so it is never stale.

        Args:
            name: a file name.
            purpose: action of the holder, for messages of waiting processes ("builds the kernel").
            wait: False: if another process holds it, do not wait, and yield False.
        """
        folder = self.root / "locks"
        with self._write_errors():
            _make_private(self.root)
            _make_private(folder)
            handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
                logger.info("another run %s; waiting for it", holder or purpose)
                fcntl.flock(handle, fcntl.LOCK_EX)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"(pid {os.getpid()}) {purpose}\n".encode(), 0)
            yield True
        finally:
            os.close(handle)

    @staticmethod
    def key(fields: Mapping[str, str]) -> str:
        """The key of an entry with these fields: the name of its folder."""
        text = json.dumps(dict(fields), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _place(self, kind: str, fields: Mapping[str, str]) -> Path:
        return self.root / kind / self.key(fields)

    def _make(
        self,
        place: Path,
        fields: Mapping[str, str],
        build: Callable[[Path], None],
        needs_bytes: int,
    ) -> None:
        with self._write_errors():
            _make_private(place.parent)
            free = shutil.disk_usage(place.parent).free
            if free < needs_bytes:
                raise HostError(
                    f"{place.parent} has {free / 1e9:.1f} GB free, "
                    f"the {place.parent.name} needs {needs_bytes / 1e9:.1f} GB",
                    hint="free some, `paprscm cache prune`, or set cache_dir",
                )
        with self._work_folder(place) as work:
            build(work)
            _seal(work, fields)

    @contextmanager
    def _work_folder(self, place: Path) -> Iterator[Path]:
        """A temporary folder that becomes the entry when the body has ended."""
        with self._write_errors():
            _make_private(place.parent)
            for stale in place.parent.glob(f".{place.name}-*"):
                _remove_tree(stale)
            work = place.parent / f".{place.name}-{os.getpid()}"
            work.mkdir(mode=0o700)
        try:
            with self._write_errors():
                yield work
                if place.exists():
                    self._discard(place)
                work.rename(place)
        finally:
            _remove_tree(work)

    def _usable(self, place: Path, kind: str) -> CacheEntry | None:
        entry = self._read(place, kind)
        if entry is None:
            if place.exists():
                logger.warning("cache entry %s/%s has no manifest: building anew", kind, place.name)
            return None
        damage = _damage(place)
        if damage:
            logger.info("cache entry %s/%s: %s: building anew", kind, place.name, damage)
            return None
        with contextlib.suppress(OSError):  # A read-only cache can be used.
            os.utime(place)
        return entry

    def _read(self, place: Path, kind: str) -> CacheEntry | None:
        try:
            manifest = json.loads((place / MANIFEST).read_bytes())
            files = manifest["files"]
            if files is None:
                blocks = sum(path.lstat().st_blocks for path in place.rglob("*"))
            else:
                blocks = sum(item.get("blocks", 0) for item in files.values())
            return CacheEntry(
                path=place,
                kind=kind,
                fields=manifest["fields"],
                size_bytes=512 * blocks,
                created=manifest["created"],
                used=place.stat().st_mtime,
                is_workspace=files is None,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _discard(self, place: Path) -> None:
        # Rename first: a process that opens it now finds a complete entry or none.
        aside = place.parent / f".{place.name}-{os.getpid()}-gone"
        place.rename(aside)
        _remove_tree(aside)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Error:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HostError(
                    f"no space left in the cache {self.root}",
                    hint="free some, `paprscm cache prune`, or set cache_dir",
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise HostError(
                    f"the cache {self.root} cannot be written: {error.strerror}",
                    hint=_HINT_ELSEWHERE,
                ) from error
            if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
                raise HostError(
                    f"the cache {self.root} cannot be made: {error.filename}: {error.strerror}",
                    hint=_HINT_ELSEWHERE,
                ) from error
            raise


def _make_private(folder: Path) -> None:
    # Entries hold ssh keys.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _remove_tree(path: Path) -> None:
    def writable(function: Any, name: str, _info: Any) -> None:
        # Package trees hold folders without write permission.
        Path(name).parent.chmod(0o700)
        with contextlib.suppress(OSError):
            Path(name).chmod(0o700)
        function(name)

    if path.exists():
        shutil.rmtree(path, onerror=writable)


def _seal(folder: Path, fields: Mapping[str, str]) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        if stat.S_ISREG(info.st_mode):
            files[str(path.relative_to(folder))] = {
                "size": info.st_size,
                "blocks": info.st_blocks,
                "mtime_ns": info.st_mtime_ns,
                "sha256": _digest(path),
            }
    _write_manifest(folder, fields, files)
    # The manifest must not survive a power cut that its files do not survive.
    os.sync()


def _write_manifest(
    folder: Path, fields: Mapping[str, str], files: Mapping[str, object] | None
) -> None:
    manifest = {"fields": dict(fields), "created": time.time(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _damage(place: Path) -> str | None:
    """The damage of an entry, or None; a digest is computed only if a file's time has changed."""
    files = json.loads((place / MANIFEST).read_bytes())["files"]
    for name, sealed in files.items():
        path = place / name
        try:
            info = path.lstat()
        except OSError:
            return f"{name} is missing"
        if info.st_size != sealed["size"]:
            return f"{name} has {info.st_size} bytes instead of {sealed['size']}"
        if info.st_mtime_ns != sealed["mtime_ns"] and _digest(path) != sealed["sha256"]:
            return f"{name} was changed"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
