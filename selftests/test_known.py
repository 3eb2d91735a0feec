# SPDX-License-Identifier: GPL-2.0-or-later
"""A known issue says which versions have it, in a form that can be read."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any, cast

import pytest

from paprscm.errors import ConfigError, ContractError, HostError
from paprscm.known import FOLDER, load
from paprscm.testcase import QemuTest


def issue(folder: Path, line: str) -> Path:
    (folder / "qemu-x.md").write_text(f"# QEMU does x\n\n- **Where:** there\n{line}\n")
    return folder


def test_versions_are_ranges_with_both_ends_included(tmp_path: Path) -> None:
    known = load(
        "qemu-x", folder=issue(tmp_path, "- **Versions:** QEMU 7.0 to 7.2, 9.1, 10.0 to 11.1")
    )
    assert known.title == "QEMU does x"
    assert known.product == "QEMU"
    listed = ["7.0.0", "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "9.1.3", "10.0.0", "11.1.99"]
    others = ["6.2.0", "8.0.0", "9.0.9", "9.2.0", "11.2.0"]
    assert all(known.lists(version) for version in listed)
    assert not any(known.lists(version) for version in others)


def test_versions_of_linux_are_judged_by_the_release(tmp_path: Path) -> None:
    known = load("qemu-x", folder=issue(tmp_path, "- **Versions:** Linux 5.13 to 6.12"))
    assert known.product == "Linux"
    assert all(known.lists(release) for release in ("5.13.0", "6.1.192-2", "6.12.107-paprscm"))
    assert not any(known.lists(release) for release in ("5.12.19", "6.13.0-rc1+", "7.2.13"))
    with pytest.raises(HostError, match="'next-20261122' is no version of Linux"):
        known.lists("next-20261122")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "names no versions"),
        ("- **Versions:** Avocado 113", "names no versions"),
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
    named = {text for text in strings if re.fullmatch(r"(?:qemu|linux)-[a-z0-9-]+", text)}
    assert len(named) > 10
    for name in named:
        load(name)


class _Test:
    """As much of a test as known_issue() needs."""

    log = logging.getLogger("paprscm")

    def __init__(self, **versions: str) -> None:
        self.shown: list[str] = []
        self.measured: dict[str, Any] = {}
        self._versions = versions

    def versions(self) -> dict[str, str]:
        return self._versions

    def measure(self, name: str, value: Any) -> None:
        self.measured[name] = value

    def says(self, *, shows: bool) -> None:
        issue = "linux-devdax-grants-map-sync"
        QemuTest.known_issue(cast(QemuTest, self), issue, shows=shows, found="granted")


def test_an_issue_of_linux_is_judged_against_the_kernel() -> None:
    # The QEMU's version would not be listed, and is not asked.
    test = _Test(QEMU="99.0.0", Linux="6.12.107-paprscm")
    test.says(shows=False)
    assert test.shown == []
    test.says(shows=True)
    assert test.shown == ["known issue linux-devdax-grants-map-sync: granted"]
    assert test.measured == {"known issue linux-devdax-grants-map-sync": "shows"}
    test = _Test(QEMU="7.2.22", Linux="99.0.0-rc1")
    with pytest.raises(ContractError, match="granted: Linux's devdax") as caught:
        test.says(shows=True)
    assert "does not list Linux 99.0.0-rc1" in str(caught.value.hint)
    assert test.shown == []
