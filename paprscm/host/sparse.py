# SPDX-License-Identifier: GPL-2.0-or-later
"""Sparse files: the parts that hold data."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def data_ranges(handle: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each part of a file that is not a hole, bytes (lseek(2), SEEK_DATA).

    Raises:
        OSError: the file cannot be read.
    """
    end = 0
    while True:
        try:
            start = os.lseek(handle, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(handle, start, os.SEEK_HOLE)
        yield start, end
