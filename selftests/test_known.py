# SPDX-License-Identifier: GPL-2.0-or-later
"""A known issue says which versions have it, in a form that can be read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from paprscm.errors import ConfigError
from paprscm.known import FOLDER, load


def issue(folder: Path, line: str) -> Path:
    (folder / "qemu-x.md").write_text(f"# QEMU does x\n\n- **Where:** there\n{line}\n")
    return folder


def test_versions_are_ranges_with_both_ends_included(tmp_path: Path) -> None:
    known = load(
        "qemu-x", folder=issue(tmp_path, "- **Versions:** QEMU 7.0 to 7.2, 9.1, 10.0 to 11.1")
    )
    assert known.title == "QEMU does x"
    listed = [(7, 0, 0), (7, 2, 22), (9, 1, 3), (10, 0, 0), (11, 1, 99)]
    others = [(6, 2, 0), (8, 0, 0), (9, 0, 9), (9, 2, 0), (11, 2, 0)]
    assert all(known.lists(version) for version in listed)
    assert not any(known.lists(version) for version in others)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "names no versions"),
        ("- **Versions:** QEMU all", "'all' is no range"),
        ("- **Versions:** QEMU 7.2, x", "'x' is no range"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("qemu-x", folder=issue(tmp_path, line))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"known issue .*qemu-y"):
        load("qemu-y", folder=tmp_path)


def test_every_file_is_in_the_table() -> None:
    names = {file.stem for file in FOLDER.glob("*.md")} - {"README"}
    table = (FOLDER / "README.md").read_text()
    assert names == {name for name in names if f"]({name}.md)" in table}


def test_every_issue_that_a_test_names_can_be_read() -> None:
    """A typing error would be noticed only where the bug shows."""
    trees = [ast.parse(file.read_text()) for file in (FOLDER.parent / "tests").glob("*.py")]
    strings = {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {text for text in strings if re.fullmatch(r"qemu-[a-z0-9-]+", text)}
    assert len(named) > 10
    for name in named:
        load(name)
