# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a file system is well: what the kernel says of it, and what its checker finds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from paprscm.errors import ContractError
from paprscm.pmem import Mount

if TYPE_CHECKING:
    from paprscm.guest import Guest

# What file systems say when all is well: fs/xfs/xfs_super.c, xfs_log.c, xfs_log_recover.c,
# fs/ext4/super.c, orphan.c. A record of the log that QEMU's end has cut in two is no damage: its
# checksum is there to find that, and what it holds was not promised.
_WELL: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"XFS with [a-z, ]+$",
        r"XFS \(\w+\): (?:Mounting V5 Filesystem|Unmounting Filesystem) [-0-9a-f]{36}$",
        r"XFS \(\w+\): Ending clean mount$",
        r"XFS \(\w+\): (?:Starting|Ending) recovery \(logdev: internal\)$",
        r"XFS \(\w+\): (?:DAX enabled\. Warning: )?EXPERIMENTAL",
        r"XFS \(\w+\): Torn write \(CRC failure\) detected at log block 0x[0-9a-f]+\. "
        r"Truncating head block from 0x[0-9a-f]+\.$",
        r"EXT4-fs \(\w+\): (?:un)?mount(?:ed|ing) filesystem [-0-9a-f]{36}",
        r"EXT4-fs \(\w+\): DAX enabled\. Warning: EXPERIMENTAL",
        r"EXT4-fs \(\w+\): recovery complete$",
        r"EXT4-fs \(\w+\): \d+ (?:orphan inodes? deleted|truncates? cleaned up)$",
    )
)
_SPEAKERS: Final = re.compile(r"(?:XFS|EXT4-fs|JBD2|Buffer I/O|I/O error)\b.*")


def complaints(messages: str) -> list[str]:
    """What a file system says only when something is wrong.

    Args:
        messages: of the kernel, one a line, as dmesg prints them.
    """
    said = [found[0].strip() for found in map(_SPEAKERS.search, messages.splitlines()) if found]
    return [text for text in said if not any(well.match(text) for well in _WELL)]


def expect_no_complaints(messages: str) -> None:
    """Assert that no file system complains.

    Raises:
        ContractError: one does.
    """
    if said := complaints(messages):
        raise ContractError(
            "a file system complains:\n" + "\n".join(f"    {text}" for text in said)
        )


def check_offline(guest: Guest, mounts: Iterable[Mount], *, timeout_s: float = 120.0) -> None:
    """Unmount file systems and have their checkers look at them, in one round trip.

    Raises:
        ContractError: a checker found something, or the kernel complained.
    """
    lines = ["set -e"]
    for mount in mounts:
        disk = shlex.quote(mount.device)
        lines += [
            f"umount {shlex.quote(mount.mountpoint)}",
            f"xfs_repair -n {disk} 2>&1" if mount.fstype == "xfs" else f"e2fsck -fn {disk} 2>&1",
        ]
    guest.succeed("\n".join(lines), timeout_s=timeout_s)
    expect_no_complaints(guest.succeed("dmesg"))
