# SPDX-License-Identifier: GPL-2.0-or-later
"""Progress on the terminal: nested, timed steps, and bars for countable work."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

# Avocado's runner forwards loggers whose names begin with "avocado." to the test's own log.
logger = logging.getLogger("avocado.paprscm")

_depth: ContextVar[int] = ContextVar("depth", default=0)
_background: ContextVar[bool] = ContextVar("background", default=False)


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr; while a bar is shown, that prints lines above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The stream to write to."""
        return sys.stderr


def to_terminal(*, verbose: bool = False) -> None:
    """Send the steps to stderr, for commands that run outside Avocado."""
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


@contextmanager
def step(text: str) -> Iterator[None]:
    """Log the start of a step, and its end with the duration."""
    indent = "  " * _depth.get()
    logger.info("%s%s", indent, text)
    token = _depth.set(_depth.get() + 1)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        logger.info("%s%s: failed after %.1f s", indent, text, time.monotonic() - started)
        raise
    else:
        logger.info("%s%s: %.1f s", indent, text, time.monotonic() - started)
    finally:
        _depth.reset(token)


@contextmanager
def in_background() -> Iterator[None]:
    """Log bars as lines within the block: a terminal shows only the foreground's bar."""
    token = _background.set(True)
    try:
        yield
    finally:
        _background.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """Log only warnings within the block, for many equal steps that a bar summarizes."""
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


class Bar:
    """Progress of countable work: a bar on a terminal, ten lines in a log.

    Args:
        title: name of the work.
        total: number of units, or None while it is unknown.
        unit: "bytes", or the plural name of a unit.
    """

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._logged = -1
        self._done = 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        # Avocado replaces a test's stderr with an object that is not a file.
        if getattr(sys.stderr, "isatty", bool)() and not _background.get():
            count: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
            columns = (TextColumn("{task.description:<24}"), BarColumn(), count)
            self._progress = Progress(
                *columns, TimeElapsedColumn(), console=Console(stderr=True), transient=False
            )
            self._progress.start()
            self._task = self._progress.add_task(title, total=total)

    def update(self, done: int, total: int | None = None) -> None:
        """Set the number of finished units, and the total once it is known."""
        self._done = done
        if total is not None:
            self._total = total
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=self._total)
        elif self._total:
            tenth = min(10, 10 * done // self._total)
            if tenth > self._logged:
                self._logged = tenth
                logger.info("%s%s: %s", "  " * _depth.get(), self._title, self._amount())

    def close(self) -> None:
        """Stop updating the bar; it stays on the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def _amount(self) -> str:
        if self._unit == "bytes":
            return f"{self._done / 1e6:.0f} of {(self._total or 0) / 1e6:.0f} MB"
        return f"{self._done} of {self._total} {self._unit}"


@contextmanager
def progress(title: str, total: int | None = None, unit: str = "files") -> Iterator[Bar]:
    """Show the progress of countable work: `with progress(...) as bar: bar.update(n)`."""
    bar = Bar(title, total, unit)
    try:
        yield bar
    finally:
        bar.close()


def quoted(text: str, *, last: int = 20) -> str:
    """The last lines of an output, indented, without terminal control characters."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return "\n".join(f"    {line}" for line in clean.splitlines()[-last:]) or "    (nothing)"
