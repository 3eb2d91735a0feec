# SPDX-License-Identifier: GPL-2.0-or-later
"""A worktree of a user's git repository: its commits, and git's bisection in it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import ConfigError, HostError
from paprscm.host import process

_FOUND = re.compile(r"^([0-9a-f]{40,64}) is the first \S+ commit", re.MULTILINE)
_ONLY_SKIPPED = re.compile(r"^([0-9a-f]{40,64})$", re.MULTILINE)


@dataclass(frozen=True)
class Commit:
    """A commit: its full id, and its subject line."""

    id: str
    subject: str

    def __str__(self) -> str:
        return f'{self.id[:12]} ("{self.subject}")'


class Repository:
    """A user's repository, which is only read.

    Raises:
        ConfigError: the folder is not in a git repository.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            _git(folder, "rev-parse", "--git-dir")
        except HostError as error:
            raise ConfigError(
                f"{folder} is not in a git repository", hint="a bisection needs the history"
            ) from error

    def commit(self, name: str) -> Commit:
        """The commit of a revision; ConfigError if there is none."""
        try:
            (line,) = _git(self.folder, "log", "-1", "--format=%H %s", f"{name}^{{commit}}", "--")
        except HostError as error:
            raise ConfigError(f"{self.folder} has no commit {name}") from error
        identifier, _, subject = line.partition(" ")
        return Commit(identifier, subject)

    def is_ancestor(self, older: Commit, newer: Commit) -> bool:
        """True if `older` is in the history of `newer`."""
        words = ["merge-base", "--is-ancestor", older.id, newer.id]
        return _status(self.folder, *words) == 0

    def count(self, older: Commit, newer: Commit) -> int:
        """Number of commits between two, with the newer one."""
        (line,) = _git(self.folder, "rev-list", "--count", f"{older.id}..{newer.id}")
        return int(line)

    def worktree(self, folder: Path, commit: Commit) -> Worktree:
        """A worktree in a folder of ours with a commit; one of an earlier run is used again."""
        if not folder.is_dir() or _status(folder, "rev-parse", "--git-dir") != 0:
            # An earlier one may have been deleted.
            _git(self.folder, "worktree", "prune")
            _git(self.folder, "worktree", "add", "--detach", "--force", str(folder), commit.id)
        tree = Worktree(folder)
        tree.reset()
        return tree

    def remove(self, folder: Path) -> None:
        """Remove a worktree."""
        _git(self.folder, "worktree", "remove", "--force", str(folder))


@dataclass(frozen=True)
class Step:
    """The next commit to test; or the end.

    Attributes:
        commit: it is checked out. None at the end.
        found: the first commit with the new state; None if it is not known.
        suspects: at the end without `found`, the commits of which it is one.
    """

    commit: str | None
    found: str | None = None
    suspects: tuple[str, ...] = ()


class Worktree:
    """A worktree of ours.

    Attributes:
        folder: its top.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self) -> None:
        """End a bisection or a revert that an earlier run left."""
        _status(self.folder, "bisect", "reset", "HEAD")
        _git(self.folder, "reset", "--quiet", "--hard")

    def check_out(self, commit: Commit) -> None:
        """Check a commit out; files that do not differ keep their time."""
        _git(self.folder, "checkout", "--quiet", "--detach", "--force", commit.id)

    def start(self, older: Commit, newer: Commit, terms: tuple[str, str]) -> Step:
        """Begin a bisection.

        Args:
            older, newer: its ends.
            terms: names of their states.
        """
        words = ["start", f"--term-old={terms[0]}", f"--term-new={terms[1]}", newer.id, older.id]
        return self._bisect(words)

    def mark(self, term: str) -> Step:
        """Say what the commit is: one of the terms, or "skip"."""
        return self._bisect([term])

    def log(self) -> str:
        """Output of `git bisect log`."""
        return "\n".join(_git(self.folder, "bisect", "log")) + "\n"

    def revert(self, commit: Commit) -> bool:
        """Revert a commit in the files; False, with unchanged files, if it does not apply."""
        if _status(self.folder, "revert", "--no-commit", "--no-edit", commit.id) == 0:
            return True
        self.reset()
        return False

    def _bisect(self, words: Sequence[str]) -> Step:
        done = process.run(
            ["git", "-C", self.folder, "bisect", *words], env=_environment(), check=False
        )
        if match := _FOUND.search(done.text):
            return Step(None, found=match[1])
        if "only 'skip'ped commits left" in done.text:
            return Step(None, suspects=tuple(_ONLY_SKIPPED.findall(done.text)))
        if done.status:
            raise HostError(f"git bisect {' '.join(words)} failed: {done.text}")
        (head,) = _git(self.folder, "rev-parse", "HEAD")
        return Step(head)


def _environment() -> dict[str, str]:
    """Git's messages are read; variables of a calling git would name another repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, "LC_ALL": "C"}


def _git(folder: Path, *words: str) -> tuple[str, ...]:
    return process.run(["git", "-C", folder, *words], env=_environment(), keep_lines=100_000).lines


def _status(folder: Path, *words: str) -> int:
    argv: list[str | Path] = ["git", "-C", folder, *words]
    return process.run(argv, env=_environment(), check=False).status
