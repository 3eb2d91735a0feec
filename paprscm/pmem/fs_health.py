# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors of file systems: kernel messages, and file system checkers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Final

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.pmem.mounts import Mount

KERNEL_LOG: Final = "dmesg -r"
"""Shell command that prints the kernel's messages with their levels, for `complaints`."""

# include/linux/kern_levels.h. File systems print normal events (a mount, a recovery) with
# KERN_NOTICE or KERN_INFO, and errors with a lower number.
_WARNING: Final = 4
# Warnings that are not errors: fs/xfs/xfs_super.c, xfs_log_recover.c, fs/ext4/super.c. A log record
# torn by the end of QEMU is not damage: its checksum detects it, and its content had not been
# committed.
_HARMLESS: Final = re.compile(
    r"(?:XFS|EXT4-fs) \(\w+\): (?:"
    r"(?:DAX enabled\. Warning: )?EXPERIMENTAL"
    r"|Torn write \(CRC failure\) detected at log block 0x[0-9a-f]+\. "
    r"Truncating head block from 0x[0-9a-f]+\.$)"
    # Of more than five mounts in 30 s; only notices of mounts are limited by this state
    # (fs/ext4/super.c, ext4_mount_msg_ratelimit).
    r"|EXT4-fs (?:un)?mount: \d+ callbacks suppressed$"
)
# Normal-level messages about damage: fs/ext4/super.c, print_daily_error_info.
_DAMAGE: Final = re.compile(r"(?:error count since last fsck|(?:initial|last) error at time)\b")
_MESSAGE: Final = re.compile(r"(?:<([0-9]+)>)?.*?((?:XFS|EXT4-fs|JBD2|Buffer I/O|I/O error)\b.*)")


def complaints(messages: str) -> list[str]:
    """Messages of file systems that report an error.

    Args:
        messages: kernel messages, one a line, as KERNEL_LOG prints them; a line without a level
            counts as an error.
    """
    errors = []
    for line in messages.splitlines():
        if (match := _MESSAGE.match(line)) is None:
            continue
        # The level is in the lowest three bits, the facility above.
        level, text = int(match[1] or 0) & 7, match[2].strip()
        if _DAMAGE.search(text) or (level <= _WARNING and not _HARMLESS.match(text)):
            errors.append(text)
    return errors


def expect_no_complaints(messages: str) -> None:
    """Assert that no file system reports an error.

    Raises:
        ContractError: one does; with its messages.
    """
    if errors := complaints(messages):
        raise ContractError(
            "a file system reports errors:\n" + "\n".join(f"    {text}" for text in errors)
        )


def check_offline(guest: Guest, mounts: Iterable[Mount], *, timeout_s: float = 120.0) -> None:
    """Unmount file systems and run their checkers, in one round trip.

    Raises:
        ContractError: a checker or the kernel reports an error.
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
