# SPDX-License-Identifier: GPL-2.0-or-later
"""kbuild's make in a folder for objects (O=), with progress, and safe against being killed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paprscm.debian import prerequisites, toolchain
from paprscm.errors import Error, HostError
from paprscm.host import process
from paprscm.host.folders import require_make
from paprscm.log import Bar, logger, progress

_REFRESH_S = 0.5

# One line of make's output for each of these is one object of the progress bar.
_OBJECT = re.compile(r"^  (?:CC|AS)\s")
_WRONG = re.compile(
    r": (?:fatal )?error: |undefined reference|internal compiler error|Kconfig\S*:\d+: "
    r"|\*\*\* (?!Waiting)"
)


def run_build(
    words: Sequence[str],
    what: str,
    *,
    wrong: re.Pattern[str],
    log_file: Path,
    on_line: Callable[[str], None],
    **options: Any,
) -> None:
    """Run a build tool; with several jobs its last line is rarely the cause of a failure.

    Args:
        words: the command line.
        what: its name, for the message.
        wrong: matches the lines that report errors.
        log_file: file to which the output is appended.
        on_line: called with each line.
        options: more arguments of process.run().

    Raises:
        HostError: it failed; with the first errors, and the log's path as hint.
    """
    errors: list[str] = []

    def line(text: str) -> None:
        on_line(text)
        if wrong.search(text):
            errors.append(text.strip())

    try:
        process.run(words, log_file=log_file, on_line=line, **options)
    except HostError as error:
        if not errors:
            raise
        # Unlike those of the compiler, make's own errors are only consequences.
        cause = [text for text in errors if "***" not in text] or errors
        lines = "".join(f"\n    {text}" for text in cause[:8])
        raise HostError(f"{what} failed:{lines}", hint=f"the whole log: {log_file}") from error


class Make:
    """make in one O= folder."""

    def __init__(
        self,
        source: Path,
        objects: Path,
        log_file: Path,
        *variables: str,
        proceed: Callable[[], None] = lambda: None,
    ) -> None:
        require_make(objects)
        require_make(source)
        objects.mkdir(parents=True, exist_ok=True)
        self.source = source
        self.objects = objects
        self._log_file = log_file
        self._proceed = proceed
        jobs = len(os.sched_getaffinity(0)) + 1
        self._argv = [
            *("make", f"-j{jobs}", "-C", str(source), f"O={objects}", "ARCH=powerpc"),
            *(f"CROSS_COMPILE={toolchain.PREFIX}", *variables),
        ]
        passed, missed = prerequisites.kbuild_environment(os.environ)
        if missed:
            logger.warning(
                "not passed on to the kernel build: %s of the environment", ", ".join(missed)
            )
        self._env = {
            **passed,
            "LC_ALL": "C",
            "KBUILD_BUILD_USER": "paprscm",
            "KBUILD_BUILD_HOST": "paprscm",
        }

    def run(self, *targets: str, bar: Bar | None = None, total: int = 0) -> int:
        """Make the targets; return the number of compiled objects.

        Raises:
            HostError: make failed; with the first errors, and the log's path as hint.
        """
        compiled = 0

        def line(text: str) -> None:
            nonlocal compiled
            if _OBJECT.match(text):
                compiled += 1
                if bar is not None:
                    # The total is from an earlier build, or of another version.
                    bar.update(compiled, max(total, compiled) if total else None)

        run_build(
            [*self._argv, *targets],
            f"`make {' '.join(targets)}` in {self.source}",
            wrong=_WRONG,
            log_file=self._log_file,
            on_line=line,
            env=self._env,
            idle_s=_REFRESH_S,
            on_idle=self._proceed,
        )
        return compiled

    def compile(
        self, produced: dict[str, str], *, total: int, blame: type[Error] = HostError
    ) -> int:
        """Make vmlinux, and modules if any; return the number of compiled objects."""
        targets = ["vmlinux", "modules"] if "m" in produced.values() else ["vmlinux"]
        try:
            with progress("kernel objects", total or None, "objects") as bar:
                return self.run(*targets, bar=bar, total=total)
        except HostError as error:
            raise blame(error.message, hint=error.hint) from error


@contextmanager
def marked(objects: Path) -> Iterator[None]:
    """Delete incomplete objects of a build that was killed.

    make deletes incomplete targets when it fails or is interrupted, but not when it is killed; such
    an object is newer than its source, so that make would use it. kbuild (scripts/Kbuild.include,
    if_changed_dep) writes .NAME.cmd and removes .NAME.d when NAME is complete.
    """
    objects.mkdir(parents=True, exist_ok=True)
    marker = objects / ".building"
    if marker.exists():
        since = marker.stat().st_mtime_ns
        for path in objects.rglob("*.[ao]"):
            written = path.lstat().st_mtime_ns
            command = path.with_name(f".{path.name}.cmd")
            whole = command.exists() and command.stat().st_mtime_ns >= written
            if written >= since and (not whole or path.with_name(f".{path.name}.d").exists()):
                path.unlink()
        (objects / "vmlinux").unlink(missing_ok=True)
    marker.write_text("")
    try:
        yield
    except Error:
        marker.unlink()
        raise
    marker.unlink()
