# SPDX-License-Identifier: GPL-2.0-or-later
"""Cached content of DIMMs (a namespace, a file system): created once in a guest, then copied.

The cache key includes all that the bytes depend on: the kernel, guest_tools/pmem.c, the userland's
tools, QEMU, the CPU with its MMU, and the DIMM's size, label area and uuid. Linux keeps a checksum
of the uuid in the labels (drivers/nvdimm/namespace_devs.c, nd_region_interleave_set_cookie).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paprscm.host.cache import Cache
from paprscm.vm.backing_files import is_blank, pack_content
from paprscm.vm.machine import Nvdimm

KIND = "dimm"
_FORMAT = "2"
# Contents to keep (a few MB each); every rebuilt kernel adds some.
_KEEP = 200


@dataclass(frozen=True, kw_only=True)
class DimmContents:
    """Cached contents for DIMMs of one kernel, userland and QEMU.

    Attributes:
        cache: keeps the contents.
        inputs: the part of the key that does not depend on the DIMM.
    """

    cache: Cache
    inputs: Mapping[str, str]

    def find(self, nvdimm: Nvdimm) -> Path | None:
        """Return a file with the packed content that the DIMM should hold; None: not cached."""
        entry = self.cache.find(KIND, self._fields(nvdimm))
        return entry.path / "content" if entry else None

    def store(self, nvdimm: Nvdimm, file: Path) -> None:
        """Cache the content of a backing file; the guest must have flushed it."""

        def build(folder: Path) -> None:
            pack_content(file, folder / "content")

        self.cache.ensure(KIND, self._fields(nvdimm), build, keep=_KEEP)

    def _fields(self, nvdimm: Nvdimm) -> dict[str, str]:
        return {
            "holds": nvdimm.holds,
            "size": f"{nvdimm.size_bytes} + {nvdimm.label_bytes}",
            "device": f"{nvdimm.device} {nvdimm.guid}",
            **self.inputs,
            "format": _FORMAT,
        }


class GuestDimms:
    """Initial contents of one guest's DIMMs, valid until a test changes them.

    Args:
        contents: the cached contents; None: all DIMMs start empty.
        file: returns the backing file of a slot.
    """

    def __init__(self, contents: DimmContents | None, file: Callable[[int], Path]) -> None:
        self._contents = contents
        self._file = file
        self._ready: dict[int, Nvdimm] = {}
        self._missing: dict[int, Nvdimm] = {}

    def image(self, nvdimm: Nvdimm) -> Path | None:
        """Return the packed content for the new backing file of a DIMM; None: it stays empty."""
        if self._contents is None or not nvdimm.holds:
            return None
        image = self._contents.find(nvdimm)
        (self._missing if image is None else self._ready)[nvdimm.slot] = nvdimm
        return image

    def take(self, slot: int, holds: str) -> bool:
        """Return True if the DIMM in `slot` started with this content; only the first time."""
        nvdimm = self._ready.pop(slot, None)
        return nvdimm is not None and nvdimm.holds == holds

    def should_keep(self, slot: int, holds: str) -> bool:
        """Return True if the DIMM in `slot` should hold this content but is still all zeros."""
        nvdimm = self._missing.get(slot)
        return nvdimm is not None and nvdimm.holds == holds and is_blank(self._file(slot))

    def keep(self, slot: int) -> None:
        """Cache the content that was created in the guest, for later guests."""
        nvdimm = self._missing.pop(slot)
        assert self._contents is not None  # noqa: S101
        self._contents.store(nvdimm, self._file(slot))
