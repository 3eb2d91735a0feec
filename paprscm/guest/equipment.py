# SPDX-License-Identifier: GPL-2.0-or-later
"""Parts that the guests of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paprscm.guest.dimm_content import DimmContents
from paprscm.guest.tools import ToolBinaries
from paprscm.settings import Settings
from paprscm.vm.argv import Payload
from paprscm.vm.machine import Board


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """Parts that all guests of a run have in common.

    Attributes:
        settings: time limits and folders.
        qemu: command-line prefix that starts QEMU.
        payload: kernel, modules and root disk.
        client_key: our ssh key (a file).
        host_key: the guest's public key.
        board: processors, memory and firmware, where a machine leaves them open.
        contents: contents for DIMMs that should not start empty; None: they start empty.
        tools: binaries of guest tools; None: each guest compiles its own.
    """

    settings: Settings
    qemu: tuple[str, ...]
    payload: Payload
    client_key: Path
    host_key: str
    board: Board = Board()
    contents: DimmContents | None = None
    tools: ToolBinaries | None = None
