# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel messages about files that share blocks on XFS with DAX."""

from __future__ import annotations

import re

from paprscm.channel.kmsg import has_frame, traces
from paprscm.errors import CapabilityError
from paprscm.guest.guest import Guest

HUGE_PAGE_ISSUE = "linux-xfs-dax-huge-page-of-shared-blocks-fails"
HUGE_PAGE_WARNING = r"WARNING: .*(dax_insert_entry|vmf_insert_folio_pmd)\+"
"""The kernel's warnings with that issue, a regular expression."""

PIN_ISSUE = "linux-xfs-dax-pin-of-shared-block-hangs"
_PIN_BUG = re.compile(r"kernel BUG at mm/gup\.c")


def stopped_at_pin(guest: Guest) -> bool:
    """Return True if the kernel stopped at a pin of a shared page, as it does with DEBUG_VM."""
    bugs = traces(guest.console.lines, _PIN_BUG)
    return any(has_frame(bug, "sanity_check_pinned_pages") for bug in bugs)


def huge_page_warnings(guest: Guest) -> list[str]:
    """The warnings of that issue on the guest's console."""
    return [line for line in guest.console.lines if re.search(HUGE_PAGE_WARNING, line)]


def require_shared_blocks(guest: Guest) -> None:
    """Require a kernel that vouches for shared blocks, after an XFS with DAX was mounted.

    Linux 6.1 warns of DAX on XFS when it mounts it (fs/xfs/xfs_super.c).

    Raises:
        CapabilityError: the kernel calls DAX on XFS experimental.
    """
    if guest.succeed("dmesg | grep 'XFS.*DAX enabled.*EXPERIMENTAL' || :"):
        raise CapabilityError("the kernel calls DAX on XFS experimental")
