# SPDX-License-Identifier: GPL-2.0-or-later
"""A folder that is replaced as a whole."""

from __future__ import annotations

import contextlib
import errno
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from paprscm.errors import ConfigError, HostError

MARK = "paprscm-site.txt"
"""File by which a site is recognised; a folder without it is not replaced."""


@contextlib.contextmanager
def replacement(target: Path) -> Iterator[Path]:
    """Give a new folder that takes the target's place at the end, or is removed after an error.

    Of several concurrent replacements the last one stays. The target is absent only between two
    renames.

    Args:
        target: absent, an empty folder, or a site.

    Raises:
        ConfigError: the target is something else.
        HostError: the folder cannot be written; the target is unchanged.
    """
    target = target.resolve()
    check(target)
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
        # mkdtemp's folders are private; a web server reads this one.
        part.chmod(0o755)
        yield part
        (part / MARK).write_text("Written by `paprscm report`, which replaces this folder.\n")
        _exchange(part, target)
    except OSError as error:
        raise HostError(
            f"{target} was not written: {error.strerror}",
            hint="an earlier site there is unchanged" if target.exists() else None,
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def check(target: Path) -> None:
    """Raise ConfigError if the target is neither absent, nor an empty folder, nor a site."""
    while (seen := _identity(target)) is not None:
        if not target.is_dir():
            raise ConfigError(f"{target} is not a folder", hint="--output takes a new folder")
        with contextlib.suppress(FileNotFoundError):
            if (target / MARK).is_file() or not any(target.iterdir()):
                return
        # Another report may have moved it, and may be deleting it.
        if seen == _identity(target):
            raise ConfigError(
                f"{target} is not empty, and is not a site of `paprscm report`",
                hint="--output takes a new folder, or a site to replace",
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """Inode and time of change, which a rename changes; None if the path is absent."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _exchange(part: Path, target: Path) -> None:
    """Rename the part to the target; an existing target is moved aside first, and then removed."""
    prefix = f".{target.name[:100]}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as aside:
        for number in itertools.count():
            try:
                part.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    with contextlib.suppress(OSError):
                        (Path(aside) / str(number - 1)).rename(target)
                    raise
            check(target)
            # Another report may have moved it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                target.rename(Path(aside) / str(number))
