# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that mounts one image after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from paprscm.guest.guest import Guest
from paprscm.pmem.fs_health import KERNEL_LOG, complaints
from paprscm.pmem.namespaces import find_namespaces
from paprscm.pmem.regions import find_region
from paprscm.power_cut.images import Image, write_image

FOLDER: Final = "/mnt/cut"
"""The mount point in the guest."""

T = TypeVar("T")


class MountedImages:
    """The file systems of images, mounted one after the other.

    Args:
        guest: a guest whose DIMM has the namespace that all images have.
        slot: slot of the DIMM.
        mount: command that mounts the file system, without device and folder.
    """

    def __init__(self, guest: Guest, slot: int, mount: str) -> None:
        self.guest = guest
        self._slot = slot
        (namespace,) = find_namespaces(guest, find_region(guest, slot))
        guest.succeed(f"mkdir -p {FOLDER}")
        # Messages of an image before this one do not count.
        self._mount = f"dmesg -C; {mount} {namespace.path} {FOLDER}"

    def read(self, image: Image, look: Callable[[], T]) -> tuple[T | None, list[str]]:
        """Mount an image and look at it.

        Args:
            image: the image.
            look: called while it is mounted.

        Returns:
            What `look` returns, and errors that the kernel reports; None if it cannot be mounted.
        """
        write_image(image, self._slot, self.guest.file(self._slot))
        mounted = self.guest.run(self._mount)
        if mounted.status:
            return None, [f"cannot be mounted: {mounted.stderr.strip()}"]
        seen = look()
        messages = self.guest.succeed(f"umount {FOLDER} && {KERNEL_LOG}")
        return seen, complaints(messages)
