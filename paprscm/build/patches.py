# SPDX-License-Identifier: GPL-2.0-or-later
"""Patches that are applied to a source tree for one build, and reverted by the next one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from paprscm.debian.toolchain import require_program
from paprscm.errors import ConfigError, HostError
from paprscm.host.process import run


def set_patches(folder: Path, unpack: Callable[[Path], None], patches: Sequence[Path]) -> None:
    """Apply these patches and no others to folder/tree.

    Only files that change get a new time stamp, so that an incremental build in folder/objects
    compiles only them. After an interruption both folders are made anew.

    Args:
        folder: the workspace of a build.
        unpack: unpacks the source to a path that does not exist.
        patches: files, relative to the top of the tree (-p1).

    Raises:
        ConfigError: a patch cannot be read, or does not apply; then none is applied.
        HostError: patch(1) is not installed.
    """
    require_program("patch")
    tree, applied, busy = folder / "tree", folder / "applied", folder / "patching"
    if busy.exists() or not tree.exists():
        for old in (tree, applied, folder / "objects"):
            shutil.rmtree(old, ignore_errors=True)
        busy.touch()
        unpack(tree)
    busy.touch()
    applied.mkdir(exist_ok=True)
    _revert(tree, applied)
    try:
        for number, patch in enumerate(patches):
            _apply(tree, patch, applied / f"{number:04}.patch")
    except ConfigError:
        _revert(tree, applied)
        busy.unlink()
        raise
    busy.unlink()


def in_words(patches: Sequence[Path]) -> str:
    """The one patch, or the number of patches, for messages."""
    return str(patches[0]) if len(patches) == 1 else f"{len(patches)} patches"


def apply_series(tree: Path, folder: Path) -> None:
    """Apply the patches that folder/series lists, as a Debian source package has them (quilt)."""
    for line in (folder / "series").read_text().splitlines():
        if words := line.partition("#")[0].split():
            _patch(tree, folder / words[0])


def _revert(tree: Path, applied: Path) -> None:
    for patch in sorted(applied.iterdir(), reverse=True):
        _patch(tree, patch, "--reverse")
        patch.unlink()


def _apply(tree: Path, patch: Path, copy: Path) -> None:
    """Apply a patch if all of it applies, and keep a copy to revert it."""
    try:
        shutil.copyfile(patch, copy)
    except OSError as error:
        raise ConfigError(f"{patch}: {error.strerror}") from error
    try:
        _patch(tree, copy, "--dry-run")
    except HostError as error:
        copy.unlink()
        raise ConfigError(
            f"{patch} does not apply: {error.message}",
            hint="patches are relative to the top of the tree (-p1)",
        ) from error
    _patch(tree, copy)


def _patch(tree: Path, patch: Path, *options: str) -> None:
    words = ["--strip=1", "--force", "--no-backup-if-mismatch", *options]
    run(["patch", *words, f"--directory={tree}", f"--input={patch}"])
