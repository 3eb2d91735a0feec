# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path


def publish(data: bytes, file: Path, *, durable: bool = False) -> None:
    """Write a file whole or not at all; a device or a pipe is written to, not replaced.

    Args:
        data: the content.
        file: an existing one is replaced.
        durable: the content survives a power cut of the host.

    Raises:
        OSError: it cannot be written.
    """
    if file.exists() and not file.is_file():
        file.write_bytes(data)
        return
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with part.open("wb") as output:
            output.write(data)
            if durable:
                output.flush()
                os.fsync(output.fileno())
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
