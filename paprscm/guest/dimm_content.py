# SPDX-License-Identifier: GPL-2.0-or-later
"""Content of DIMMs (a namespace, a file system) that a guest makes once, and that is then copied.

Its bytes depend on everything that made them: the kernel, the userland's tools, QEMU, the CPU with
its MMU, and the DIMM's size, label area and uuid: Linux keeps a checksum of the uuid in the labels
(drivers/nvdimm/namespace_devs.c, nd_region_interleave_set_cookie). All of that is in the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paprscm.host.cache import Cache
from paprscm.vm.backing_files import copy_content, is_blank
from paprscm.vm.machine import Nvdimm

KIND = "dimm"
_FORMAT = "1"
# A kernel that is rebuilt all day has new ones each time, of a few MB.
_KEEP = 200


@dataclass(frozen=True, kw_only=True)
class DimmContents:
    """Contents in the cache, for DIMMs of one kernel, userland and QEMU.

    Attributes:
        cache: keeps them.
        made_by: everything that the bytes depend on in addition to the DIMM.
    """

    cache: Cache
    made_by: Mapping[str, str]

    def find(self, nvdimm: Nvdimm) -> Path | None:
        """A sparse file with the content that the DIMM should hold; None: there is none yet."""
        entry = self.cache.find(KIND, self._fields(nvdimm))
        return entry.path / "content" if entry else None

    def store(self, nvdimm: Nvdimm, file: Path) -> None:
        """Keep the content of a backing file; the guest must have flushed it."""

        def build(folder: Path) -> None:
            (folder / "content").touch()
            copy_content(file, folder / "content")

        self.cache.ensure(KIND, self._fields(nvdimm), build)
        self.cache.keep_newest(KIND, _KEEP)

    def _fields(self, nvdimm: Nvdimm) -> dict[str, str]:
        return {
            "holds": nvdimm.holds,
            "size": f"{nvdimm.size_bytes} + {nvdimm.label_bytes}",
            "device": f"{nvdimm.device} {nvdimm.guid}",
            **self.made_by,
            "format": _FORMAT,
        }


class GuestDimms:
    """Contents of the DIMMs of one guest, from its start until a test changes them.

    Args:
        contents: None: all DIMMs start empty.
    """

    def __init__(self, contents: DimmContents | None) -> None:
        self._contents = contents
        self._ready: dict[int, Nvdimm] = {}
        self._missing: dict[int, Nvdimm] = {}

    def image(self, nvdimm: Nvdimm) -> Path | None:
        """The content for the new backing file of a DIMM; None: it stays empty."""
        if self._contents is None or not nvdimm.holds:
            return None
        image = self._contents.find(nvdimm)
        (self._missing if image is None else self._ready)[nvdimm.slot] = nvdimm
        return image

    def take(self, slot: int, holds: str) -> bool:
        """Return True, once, if the DIMM in `slot` started with this content."""
        nvdimm = self._ready.pop(slot, None)
        return nvdimm is not None and nvdimm.holds == holds

    def should_keep(self, slot: int, holds: str, file: Path) -> bool:
        """Return True if the DIMM in `slot` should hold this, and is still as empty as at first."""
        nvdimm = self._missing.get(slot)
        return nvdimm is not None and nvdimm.holds == holds and is_blank(file)

    def keep(self, slot: int, file: Path) -> None:
        """Keep the content that was made in the guest, for the next one."""
        nvdimm = self._missing.pop(slot)
        assert self._contents is not None  # noqa: S101
        self._contents.store(nvdimm, file)
