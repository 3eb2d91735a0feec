# SPDX-License-Identifier: GPL-2.0-or-later
"""Base of context managers that start on entry and leave nothing behind."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self


class Lifetime:
    """Context manager that creates on entry, removes on exit and leaves nothing behind.

    A subclass creates everything in `_start()`, and registers the clean-up with `_resources`.
    """

    def __init__(self) -> None:
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start; on an error, clean up and raise what the class documents."""
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
        """End it and remove everything created for it, except its logs."""
        self._resources.close()

    def _start(self) -> None:
        raise NotImplementedError
