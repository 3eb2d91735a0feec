# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a file system is well: what the kernel says of it, and what its checker finds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Final

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.pmem.mounts import Mount

KERNEL_LOG: Final = "dmesg -r"
"""Shell that prints the kernel's messages with their levels, as `complaints` takes them."""

# include/linux/kern_levels.h. What file systems print with KERN_NOTICE and KERN_INFO is news (a
# mount, a recovery), whatever the words of a version; with a lower number it is a complaint.
_WARNING: Final = 4
# Warnings when all is well: fs/xfs/xfs_super.c, xfs_log_recover.c, fs/ext4/super.c. A log
# record that was torn when QEMU ended is not damage: its checksum detects it, and its content was
# not promised.
_WELL: Final = re.compile(
    r"(?:XFS|EXT4-fs) \(\w+\): (?:"
    r"(?:DAX enabled\. Warning: )?EXPERIMENTAL"
    r"|Torn write \(CRC failure\) detected at log block 0x[0-9a-f]+\. "
    r"Truncating head block from 0x[0-9a-f]+\.$)"
)
# News of damage: fs/ext4/super.c, print_daily_error_info.
_DAMAGE: Final = re.compile(r"(?:error count since last fsck|(?:initial|last) error at time)\b")
_SPEAKERS: Final = re.compile(r"(?:<([0-9]+)>)?.*?((?:XFS|EXT4-fs|JBD2|Buffer I/O|I/O error)\b.*)")


def complaints(messages: str) -> list[str]:
    """Messages that a file system prints only in case of an error.

    Args:
        messages: of the kernel, one a line, as KERNEL_LOG prints them; a line without a level
            counts as an error.
    """
    found = []
    for line in messages.splitlines():
        if (said := _SPEAKERS.match(line)) is None:
            continue
        # Above the three bits of the level is the facility.
        level, text = int(said[1] or 0) & 7, said[2].strip()
        if _DAMAGE.search(text) or (level <= _WARNING and not _WELL.match(text)):
            found.append(text)
    return found


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
    expect_no_complaints(guest.succeed(KERNEL_LOG))
