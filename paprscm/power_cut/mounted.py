# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that mounts one image after the other (guest_tools/mounted.c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

from paprscm.channel.command import CommandResult
from paprscm.guest.guest import Guest
from paprscm.guest.report import Natural, ToolReport, check_report, read_report
from paprscm.guest.tools import run_tool
from paprscm.pmem.fs_health import complaints
from paprscm.pmem.mounts import FsType
from paprscm.pmem.namespaces import find_namespace
from paprscm.power_cut.images import Image, write_image

FOLDER: Final = "/mnt/cut"
"""The mount point in the guest."""


class _MountReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["mounted"]
    mount: Natural
    mount_error: str
    status: Natural | None
    umount: Natural
    umount_error: str
    messages: tuple[str, ...]

    def __post_init__(self) -> None:
        check_report(bool(self.mount) == (self.status is None), "mount and status disagree")


class MountedImages:
    """The file systems of images, mounted one after the other.

    Args:
        guest: a guest whose DIMM has the namespace that all images have.
        slot: slot of the DIMM.
        fstype, options: of mount(2).
    """

    def __init__(self, guest: Guest, slot: int, fstype: FsType, options: str) -> None:
        self._guest = guest
        self._slot = slot
        guest.succeed(f"mkdir -p {FOLDER}")
        self._mount = [find_namespace(guest, slot, "fsdax").path, fstype, options, FOLDER]

    def read(self, image: Image, command: Sequence[str]) -> tuple[CommandResult | None, list[str]]:
        """Mount an image, and run a command.

        Args:
            image: the image.
            command: absolute path of a program, and its arguments.

        Returns:
            The command's result, and errors that the kernel reports; None if the image cannot be
            mounted.
        """
        write_image(image, self._slot, self._guest.file(self._slot))
        result = run_tool(self._guest, "mounted", [*self._mount, *command])
        # The command prints first, perhaps nothing.
        *output, last = result.stdout.splitlines(keepends=True) or [""]
        report = read_report(_MountReport, last, result.status, result.stderr)
        wrong = complaints("\n".join(report.messages))
        if report.status is None:
            return None, [f"cannot be mounted: {report.mount_error}", *wrong]
        if report.umount:
            wrong.append(f"cannot be unmounted: {report.umount_error}")
        return replace(result, status=report.status, stdout="".join(output)), wrong
