# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of known issues: their versions, and the verdict on an issue that shows or not."""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest

from paprscm.errors import ConfigError, ContractError, HostError
from paprscm.known_issues import (
    FOLDER,
    SEVERITIES,
    TRIGGERS,
    IssueState,
    KnownIssue,
    names,
    read_issue,
)
from paprscm.results.observations import Observations
from paprscm.testcase import QemuTest

FIELDS = {
    "Location": "Linux `mm/x.c`, `f`; `mm/y.h:g`",
    "Severity": "wrong result",
    "Triggered by": "guest root",
    "Since": "Linux 5.3",
    "Fixed in": "none",
    "Seen in": "1.2 to\n  3.4",
    "Reported": "not yet",
    "Shown by": "`tests/a/test_b.py:C.test_d`,\n  `tests/a/test_b.py:C.test_e`",
}


def write_issue(folder: Path, fields: dict[str, str]) -> KnownIssue:
    lines = "".join(f"- **{name}:** {value}\n" for name, value in fields.items())
    text = f"# It does x\n\n{lines}\nThe prose.\n\nMore.\n\n## Fix\n\n    one\n"
    (folder / "linux-x.md").write_text(text)
    return read_issue("linux-x", folder=folder)


def issue(folder: Path, since: str, fixed_in: str) -> KnownIssue:
    return write_issue(folder, {**FIELDS, "Since": since, "Fixed in": fixed_in})


STATES = {
    # Releases, and builds of them.
    "5.2.21": IssueState.BEFORE,
    "5.3.0-paprscm": IssueState.PRESENT,
    "6.1.192": IssueState.PRESENT,
    "6.12.111": IssueState.PRESENT,
    "6.12.112": IssueState.FIXED,
    "6.12.117-paprscm": IssueState.FIXED,
    "6.13.9": IssueState.PRESENT,
    "6.19.300": IssueState.PRESENT,
    "7.2.5": IssueState.PRESENT,
    "7.2.6-mine": IssueState.FIXED,
    "7.3.0": IssueState.FIXED,
    "7.10.0": IssueState.FIXED,
    "10.0.0": IssueState.FIXED,
    # Release candidates are before the release, and may have the fix.
    "5.3.0-rc1": IssueState.PRESENT,
    "6.12.0-rc3-00123-gabcdef": IssueState.PRESENT,
    "v7.2-rc1-5-gdeadbeef": IssueState.PRESENT,
    "6.12.112-rc1": IssueState.UNCERTAIN,
    "6.12.113-rc1": IssueState.FIXED,
    "7.3.0-rc2+": IssueState.UNCERTAIN,
    "7.3-rc2": IssueState.UNCERTAIN,
    "7.4-rc1": IssueState.FIXED,
    "7.2.0-rc7-next-20260812": IssueState.UNCERTAIN,
    # Development after a release.
    "6.12.110-00300-gabcdef0": IssueState.PRESENT,
    "6.12.111-00300-gabcdef0": IssueState.UNCERTAIN,
    "6.12.111+": IssueState.UNCERTAIN,
    "6.12.0-dirty": IssueState.PRESENT,
    "7.1.0-00300-gabcdef0": IssueState.PRESENT,
    "7.2.0-mine-00300-gabcdef0": IssueState.UNCERTAIN,
    "7.2.0-00300-gabcdef0-dirty": IssueState.UNCERTAIN,
    "7.2.0+": IssueState.UNCERTAIN,
    "7.3.0-00300-gabcdef0": IssueState.FIXED,
    # A distribution's kernel may have any fix.
    "5.14.0-503.el9.ppc64le": IssueState.UNCERTAIN,
    "6.4.0-150600.23-default": IssueState.UNCERTAIN,
    "6.8.0-45-generic": IssueState.UNCERTAIN,
    "5.15.153.1-microsoft-standard": IssueState.UNCERTAIN,
    "6.1.192+deb12-powerpc64le": IssueState.UNCERTAIN,
    "6.12.117+deb13-powerpc64le": IssueState.FIXED,
}


@pytest.mark.parametrize("version", STATES)
def test_a_linux_version_is_compared_with_since_and_fixed_in(tmp_path: Path, version: str) -> None:
    known = issue(tmp_path, "Linux 5.3", "6.12.112, 7.2.6, 7.3")
    assert (known.title, known.product) == ("It does x", "Linux")
    assert known.state(version) is STATES[version]


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("7.2.18", IssueState.PRESENT),
        ("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", IssueState.FIXED),
        ("8.2.4", IssueState.PRESENT),
        ("9.2.4", IssueState.PRESENT),
        ("9.2.50", IssueState.UNCERTAIN),
        ("9.2.92 (v10.0.0-rc2)", IssueState.UNCERTAIN),
        ("v10.0.0-rc2", IssueState.UNCERTAIN),
        ("10.0.0", IssueState.FIXED),
        ("10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)", IssueState.FIXED),
        ("11.1.50 (v11.1.0-1234-gabcdef)", IssueState.FIXED),
    ],
)
def test_a_qemu_version_is_compared_with_since_and_fixed_in(
    tmp_path: Path, version: str, state: IssueState
) -> None:
    assert issue(tmp_path, "QEMU 7.0", "7.2.19, 10.0").state(version) is state


def test_the_next_release_bounds_a_development_version(tmp_path: Path) -> None:
    known = issue(tmp_path, "QEMU 7.0", "11.1.3, 12.0")
    # A development version is not on the stable branch 11.1.
    assert known.state("11.1.50") is IssueState.PRESENT
    assert known.state("11.2.50") is IssueState.UNCERTAIN
    assert known.state("11.2.91") is IssueState.UNCERTAIN
    assert known.state("11.1.4") is IssueState.FIXED
    known = issue(tmp_path, "QEMU 7.0", "12.0-rc2")
    assert known.state("11.2.91 (v12.0.0-rc1)") is IssueState.UNCERTAIN
    assert known.state("11.2.92 (v12.0.0-rc2)") is IssueState.FIXED
    known = issue(tmp_path, "Linux 5.3", "7.0-rc2")
    assert known.state("6.18.0-00300-gabcdef0") is IssueState.PRESENT
    assert known.state("6.19.0-00300-gabcdef0") is IssueState.UNCERTAIN
    assert known.state("7.0.0-rc1") is IssueState.UNCERTAIN
    assert known.state("7.0.0-rc2") is IssueState.FIXED


def test_a_bug_that_came_with_a_backport_and_has_no_fix(tmp_path: Path) -> None:
    known = issue(tmp_path, "Linux 6.12.112, 7.3", "none")
    assert known.fixed_in == ()
    assert known.state("6.12.111") is IssueState.BEFORE
    assert known.state("6.12.112") is IssueState.PRESENT
    assert known.state("7.2.13") is IssueState.BEFORE
    assert known.state("9.0.0") is IssueState.PRESENT
    assert known.state("5.14.0-503.el9.ppc64le") is IssueState.UNCERTAIN


@pytest.mark.parametrize("version", ["next-20261122", "7", "v7.x", ""])
def test_an_invalid_version_is_an_error(tmp_path: Path, version: str) -> None:
    with pytest.raises(HostError, match=r"is not a version of Linux"):
        issue(tmp_path, "Linux 5.3", "7.0").state(version)


@pytest.mark.parametrize(
    ("since", "fixed_in", "message"),
    [
        ("Windows 11.0", "none", "'Since' names none of QEMU, Linux, Avocado"),
        ("5.3", "none", "'Since' names none of"),
        ("QEMU all", "none", "'all' is not a version"),
        ("QEMU 7.0 to 11.1", "none", "'7.0 to 11.1' is not a version"),
        ("QEMU 7.0", "not yet", "'not yet' is not a version"),
        ("QEMU 7.0", "7.2, x", "'x' is not a version"),
        ("QEMU 7.0", "7.2.0", "'7.2.0' is not a version"),
        ("QEMU 7.0", "7.2 (in theory)", "is not a version"),
        ("QEMU 7.0", "8.2, 10.0", "8.2 and 10.0 count for the same branch"),
        ("QEMU 7.0", "7.2.19, 7.2.22", "count for the same branch"),
        ("QEMU 7.0", "10.0, 10.1.3", "count for the same branch"),
        ("QEMU 7.0", "6.2", "fixed in 6.2, which does not come after 'Since'"),
        ("QEMU 7.0", "7.0", "fixed in 7.0, which does not come after 'Since'"),
        ("Linux 6.12.112, 7.3", "6.13.5, 7.4", "fixed in 6.13.5, which does not come after"),
    ],
)
def test_an_invalid_line_is_an_error(
    tmp_path: Path, since: str, fixed_in: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        issue(tmp_path, since, fixed_in)


def test_the_fields_of_a_file(tmp_path: Path) -> None:
    more = {"Machine": "`pmem=on`, `pmem=off,size=1G`", "Settings": "`kernel=debug`"}
    known = write_issue(tmp_path, {**FIELDS, **more})
    assert known.location == "`mm/x.c`, `f`; `mm/y.h:g`"
    assert known.files == ["mm/x.c", "mm/y.h"]
    assert (known.severity, known.trigger) == ("wrong result", "guest root")
    assert known.seen_in == "1.2 to 3.4"
    assert known.tests == ["tests/a/test_b.py:C.test_d", "tests/a/test_b.py:C.test_e"]
    assert known.machine == ("pmem=on", "pmem=off,size=1G")
    assert known.settings == {"kernel": "debug"}
    assert known.description == "The prose.\n\nMore."
    assert known.section("Fix") == "    one"
    assert known.section("Reproduce") == ""
    assert (known.script, known.patch, known.attachments) == (None, None, [])


def test_the_folder_of_an_issue(tmp_path: Path) -> None:
    folder = tmp_path / "linux-x"
    folder.mkdir()
    for name in ("lib.sh", "bare.h"):
        (tmp_path / name).write_text("shared\n")
    (folder / "guest.sh").write_text('. "$(dirname "$0")/../lib.sh"\n')
    (folder / "x.c").write_text("int x;\n")
    (folder / "fix.patch").write_text("---\n")
    known = write_issue(tmp_path, FIELDS)
    assert known.script == folder / "guest.sh"
    assert known.patch == folder / "fix.patch"
    assert known.attachments == [tmp_path / "lib.sh", folder / "guest.sh", folder / "x.c"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_missing(tmp_path: Path, name: str) -> None:
    fields = {key: value for key, value in FIELDS.items() if key != name}
    with pytest.raises(ConfigError, match=f"has no field '- .*{name}:") as caught:
        write_issue(tmp_path, fields)
    assert "README.md" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Severity": "bad"}, "Severity is 'bad', not one of silent data loss"),
        ({"Triggered by": "me"}, "Triggered by is 'me', not one of guest kernel"),
        ({"Seen": "6.1"}, "unknown fields: Seen"),
        ({"Settings": "`debug`"}, "'debug' is not NAME=VALUE"),
        ({"Seen in": "6.1\n- **Since:** Linux 5.3"}, "the field 'Since' twice"),
        ({"Seen in": "6.1\nand 6.2"}, "text between its fields"),
    ],
)
def test_a_field_is_wrong(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_issue(tmp_path, {**FIELDS, **fields})


def test_a_misspelled_name_gets_a_hint(tmp_path: Path) -> None:
    write_issue(tmp_path, FIELDS)
    with pytest.raises(ConfigError) as caught:
        read_issue("linux-y", folder=tmp_path)
    assert caught.value.hint == "linux-x?"


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"known issue .*qemu-y"):
        read_issue("qemu-y", folder=tmp_path)


NAMES = names()
ROOT = FOLDER.parent


def test_every_file_is_a_known_issue() -> None:
    assert {file.stem for file in FOLDER.glob("*.md")} == {*NAMES, "README"}
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} <= set(NAMES)
    used = {(read_issue(name).severity, read_issue(name).trigger) for name in NAMES}
    assert {severity for severity, _ in used} == set(SEVERITIES)
    assert {trigger for _, trigger in used} == set(TRIGGERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_can_be_read(name: str) -> None:
    """Its name begins with its product, and it says how it is shown, and by what code."""
    known = read_issue(name)
    assert name.startswith(f"{known.product.lower()}-")
    assert known.files
    assert known.tests or known.shown_by.startswith("no test")
    assert known.script or known.section("Reproduce")
    assert "Expected:" in known.text or known.script
    if known.script is not None and known.script.name == "guest.sh":
        assert known.machine


@pytest.mark.parametrize("name", [name for name in NAMES if read_issue(name).tests])
def test_every_test_that_shows_an_issue_exists_and_names_it(name: str) -> None:
    for test in read_issue(name).tests:
        file, _, function = test.partition(":")
        module = documents().Module(ROOT / file)
        class_name, _, method = function.partition(".")
        owner = module.classes[class_name]
        (node,) = [
            node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == method
        ]
        assert name in module.strings(node, owner)


def documents() -> ModuleType:
    """tools/docs.py, which finds the strings that a test can reach."""
    spec = importlib.util.spec_from_file_location("docs", ROOT / "tools/docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_issue_that_a_test_names_can_be_read() -> None:
    """Otherwise a misspelled name would only be detected when the bug shows."""
    trees = [ast.parse(file.read_text()) for file in (FOLDER.parent / "tests").rglob("*.py")]
    strings = {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {text for text in strings if re.fullmatch(r"(?:qemu|linux)-[a-z0-9-]+", text)}
    assert len(named) > 10
    for name in named:
        read_issue(name)


class _Test:
    """A test with the attributes that known_issue() needs."""

    log = logging.getLogger("paprscm")

    def __init__(self, **versions: str) -> None:
        self.warnings: list[str] = []
        self.observations = Observations()
        self._versions = versions

    def versions(self) -> dict[str, str]:
        return self._versions

    def says(self, *, shows: bool, issue: str = "linux-pmem-loses-preflush-error") -> str | None:
        """Report the issue; return the requested update."""
        QemuTest.known_issue(cast(QemuTest, self), issue, shows=shows, found="fsync returned 0")
        (finding,) = self.observations.known_issues
        assert (finding.shows, finding.found) == (shows, "fsync returned 0")
        return finding.update


def test_a_known_issue_shows_where_no_fix_is_listed() -> None:
    # QEMU's version does not matter for a Linux issue.
    test = _Test(QEMU="99.0.0", Linux="6.12.107-paprscm")
    assert test.says(shows=True) is None
    assert test.warnings == ["known issue linux-pmem-loses-preflush-error: fsync returned 0"]
    (finding,) = test.observations.known_issues
    assert (finding.product, finding.version) == ("Linux", "6.12.107-paprscm")
    assert finding.title.startswith("A bio succeeds")


@pytest.mark.parametrize("release", ["6.12.117", "6.12.117+deb13-powerpc64le", "7.4.0-rc1"])
def test_a_known_issue_that_is_listed_as_fixed_is_a_regression(release: str) -> None:
    test = _Test(QEMU="7.2.22", Linux=release)
    with pytest.raises(ContractError, match="fsync returned 0: A bio succeeds") as caught:
        test.says(shows=True)
    assert str(caught.value.hint) == (
        f"a regression on Linux {release}: known_issues/linux-pmem-loses-preflush-error.md lists "
        "it as fixed in 6.12.112, 7.2.6, 7.3"
    )
    assert test.warnings == []
    assert test.observations.known_issues[0].shows


def test_a_known_issue_does_not_show() -> None:
    update = _Test(Linux="6.13.9").says(shows=False)
    assert update == (
        "known issue linux-pmem-loses-preflush-error no longer shows on Linux 6.13.9: if it is "
        "fixed there, update 'Fixed in' of known_issues/linux-pmem-loses-preflush-error.md"
    )
    for release in ("6.12.117", "7.3.0-rc2", "5.14.0-503.el9.ppc64le", "5.2.0"):
        test = _Test(Linux=release)
        assert test.says(shows=False) is None
        assert test.warnings == []


def test_a_known_issue_shows_before_its_since() -> None:
    test = _Test(Linux="5.2.21")
    update = test.says(shows=True)
    assert update is not None
    assert "shows on Linux 5.2.21: update 'Since'" in update
    assert len(test.warnings) == 1
