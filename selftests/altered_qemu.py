# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's QEMU behind a filter of its monitor's input."""

from __future__ import annotations

import shutil
from pathlib import Path

from paprscm.emulator.capabilities import BINARY

# QEMU makes its standard output non-blocking, and the filter's input is the same socket.
_FILTER = """
import os, select
while select.select([0], [], []) and (content := os.read(0, 65536)):
    os.write(1, content.replace({old!r}, {new!r}))
"""


def altered_qemu(folder: Path, old: str, new: str) -> Path:
    """Create a program that starts the host's QEMU and replaces text in its QMP input.

    A query for a type that does not exist gives the answer of a QEMU built without the type.

    Args:
        folder: folder of the program.
        old, new: parts of QMP commands as the client writes them, without spaces.
    """
    (folder / "filter.py").write_text(_FILTER.format(old=old.encode(), new=new.encode()))
    program = folder / "qemu"
    program.write_text(
        f'#!/bin/sh\npython3 {folder}/filter.py | exec {shutil.which(BINARY)} "$@"\n'
    )
    program.chmod(0o755)
    return program
