# SPDX-License-Identifier: GPL-2.0-or-later
"""Base of context managers that start on entry and leave nothing behind."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self


class Lifetime:
    """Context manager that creates on entry, removes on exit and leaves nothing behind.

    A subclass makes everything in `_start()`, and puts what undoes it on `_resources`.
    """

    def __init__(self) -> None:
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start it, or leave nothing of it; raises as the class says."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it and remove all that was made for it; its logs stay."""
        self._resources.close()

    def _start(self) -> None:
        raise NotImplementedError
