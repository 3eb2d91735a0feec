# SPDX-License-Identifier: GPL-2.0-or-later
"""Backing files of DIMMs."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from paprscm.errors import HostError
from paprscm.host.lifetime import Lifetime
from paprscm.host.sparse import data_ranges
from paprscm.vm.machine import Nvdimm

# Granularity at which zeros are skipped, bytes.
_CHUNK = 1 << 16
# Of a chunk in a packed file: offset and size, bytes.
_CHUNK_HEADER = struct.Struct(">QI")


def written_chunks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each chunk of a sparse file that is not all zeros."""
    with file.open("rb", buffering=0) as source:
        for start, end in data_ranges(source.fileno()):
            for offset in range(start, end, _CHUNK):
                chunk = os.pread(source.fileno(), min(_CHUNK, end - offset), offset)
                if chunk.strip(b"\0"):
                    yield offset, chunk


def find_word(file: Path, word: str) -> list[int]:
    """Offsets of a word in a sparse file, except of copies across a multiple of 64 KiB."""
    wanted = re.compile(re.escape(word.encode()))
    return [
        offset + match.start()
        for offset, chunk in written_chunks(file)
        for match in wanted.finditer(chunk)
    ]


def is_blank(file: Path) -> bool:
    """Return True if a file contains only zeros."""
    return next(written_chunks(file), None) is None


def pack_content(source: Path, target: Path) -> None:
    """Write the non-zero chunks of a file and their offsets into a new file, for unpack_content."""
    with target.open("xb") as file:
        for offset, chunk in written_chunks(source):
            file.write(_CHUNK_HEADER.pack(offset, len(chunk)) + chunk)


def unpack_content(packed: Path, target: Path) -> None:
    """Write packed chunks into a file of zeros, which stays sparse."""
    with packed.open("rb") as chunks, target.open("r+b", buffering=0) as file:
        while header := chunks.read(_CHUNK_HEADER.size):
            offset, size = _CHUNK_HEADER.unpack(header)
            os.pwrite(file.fileno(), chunks.read(size), offset)


def copy_content(source: Path, target: Path) -> None:
    """Copy the non-zero chunks into a file of zeros, which stays sparse."""
    with target.open("r+b", buffering=0) as file:
        for offset, chunk in written_chunks(source):
            os.pwrite(file.fileno(), chunk, offset)


class ScratchFiles(Lifetime):
    """Backing files of one machine's DIMMs, in a scratch folder that is removed with them.

    Args:
        scratch_dir: parent of the scratch folder.
        nvdimms: the DIMMs; one with a `file` keeps that file.
        image: returns the packed initial content of a DIMM's new file; None: zeros.

    Raises:
        HostError: on entry, the files cannot be created.

    Attributes:
        folder: the scratch folder.
        paths: the backing file of each slot.
        data_bytes: the size of each DIMM without its label area, by slot.
    """

    folder: Path

    def __init__(
        self,
        scratch_dir: Path,
        nvdimms: Iterable[Nvdimm] = (),
        *,
        image: Callable[[Nvdimm], Path | None] = lambda _nvdimm: None,
    ) -> None:
        super().__init__()
        self._image = image
        self.paths: dict[int, Path] = {}
        self.data_bytes: dict[int, int] = {}
        self._scratch_dir = scratch_dir
        self._nvdimms = tuple(nvdimms)

    def _start(self) -> None:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="paprscm-", dir=self._scratch_dir))
            self._resources.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.paths.update((nvdimm.slot, self.make(nvdimm)) for nvdimm in self._nvdimms)
        except OSError as error:
            raise _no_place(self._scratch_dir, error) from error

    def make(self, nvdimm: Nvdimm) -> Path:
        """Return the DIMM's own file, or create one; the caller adds it to `paths`."""
        self.data_bytes[nvdimm.slot] = nvdimm.size_bytes
        if nvdimm.file is not None:
            return nvdimm.file
        handle, name = tempfile.mkstemp(prefix=f"nvdimm{nvdimm.slot}-", dir=self.folder)
        try:
            os.truncate(handle, nvdimm.file_bytes)
        finally:
            os.close(handle)
        if image := self._image(nvdimm):
            unpack_content(image, Path(name))
        return Path(name)


class BackingFiles(Lifetime):
    """Backing files of DIMMs that several guests use, one after the other.

    The files are unlinked, so nothing remains when this process ends, even if it is killed.

    Args:
        scratch_dir: folder in which the sparse files are created.
        nvdimms: the DIMMs; their `file` is ignored.

    Raises:
        HostError: on entry, the files cannot be created.
    """

    def __init__(self, scratch_dir: Path, nvdimms: Iterable[Nvdimm]) -> None:
        super().__init__()
        self._scratch_dir = scratch_dir
        self._nvdimms = {nvdimm.slot: nvdimm for nvdimm in nvdimms}
        self._handles: dict[int, int] = {}

    def _start(self) -> None:
        try:
            for slot, nvdimm in self._nvdimms.items():
                handle, name = tempfile.mkstemp(prefix="paprscm-", dir=self._scratch_dir)
                self._resources.callback(os.close, handle)
                Path(name).unlink()
                os.truncate(handle, nvdimm.file_bytes)
                self._handles[slot] = handle
        except OSError as error:
            raise _no_place(self._scratch_dir, error) from error

    def path(self, slot: int) -> Path:
        """Return the file's path for QEMU, valid until these files are closed."""
        return Path(f"/proc/{os.getpid()}/fd/{self._handles[slot]}")

    def nvdimms(self) -> tuple[Nvdimm, ...]:
        """Return the DIMMs with these files, for the next guest."""
        return tuple(
            dataclasses.replace(nvdimm, file=self.path(slot))
            for slot, nvdimm in self._nvdimms.items()
        )


def _no_place(folder: Path, error: OSError) -> HostError:
    return HostError(
        f"cannot create backing files in {folder}: {error.strerror}", hint="set scratch_dir"
    )
