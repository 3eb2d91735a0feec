# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm report-issue`: a known issue as a mail or as an entry of a tracker."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from paprscm.commands import issue_report
from paprscm.commands.cli import main
from paprscm.commands.maintainers import Addresses, addresses
from paprscm.commands.reproduce import Outcome, judge_output
from paprscm.commands.standalone import standalone
from paprscm.known_issues import names, read_issue
from paprscm.paths import KNOWN_ISSUES

MAINTAINERS = """\
Maintainers List
----------------

	F: a line of the introduction

LIBNVDIMM: NON-VOLATILE MEMORY DEVICE SUBSYSTEM
M:	Dan <dan@example.org>
R:	Vishal <vishal@example.org>
L:	nvdimm@lists.example.org
S:	Supported
F:	drivers/nvdimm/
F:	include/linux/*nd*
X:	drivers/nvdimm/virtio*

DEVICE DIRECT ACCESS (DAX)
M:	Dan <dan@example.org>
L:	nvdimm@lists.example.org (moderated for non-subscribers)
F:	drivers/dax/

PAPR
M:	Michael <michael@example.org>
L:	linuxppc@lists.example.org
N:	papr_scm
F:	arch/powerpc/
F:	hw/*/spapr*

THE REST
M:	Linus <linus@example.org>
L:	linux-kernel@example.org
F:	*
F:	*/
"""


@pytest.mark.parametrize(
    ("files", "people", "lists"),
    [
        (["drivers/nvdimm/pmem.c"], ["Dan", "Vishal"], ["nvdimm"]),
        (["drivers/dax/device.c"], ["Dan"], ["nvdimm"]),
        (["drivers/dax/a.c", "drivers/nvdimm/b.c"], ["Dan", "Vishal"], ["nvdimm"]),
        (["drivers/nvdimm/virtio_pmem.c"], ["Linus"], ["linux-kernel"]),
        (["include/linux/nd.h"], ["Dan", "Vishal"], ["nvdimm"]),
        (["include/linux/nd/x.h"], ["Linus"], ["linux-kernel"]),
        (["drivers/x/papr_scm.c"], ["Michael"], ["linuxppc"]),
        (["hw/ppc/spapr_nvdimm.c"], ["Michael"], ["linuxppc"]),
        (["hw/ppc/x/spapr_nvdimm.c"], ["Linus"], ["linux-kernel"]),
        (["mm/x.c"], ["Linus"], ["linux-kernel"]),
        ([], [], []),
    ],
)
def test_addresses_of_files(files: list[str], people: list[str], lists: list[str]) -> None:
    found = addresses(MAINTAINERS, files)
    assert [person.partition(" ")[0] for person in found.people] == people
    assert [address.partition("@")[0] for address in found.lists] == lists


RECEIVERS = Addresses(("Dan <dan@example.org>", "Vishal <vishal@example.org>"), ("l@example.org",))


def expectation(script: Path) -> str:
    """The line of a script that states the contract."""
    return next(line for line in script.read_text().splitlines() if line.startswith("expected "))


@pytest.mark.parametrize("name", names())
def test_a_report_answers_what_a_maintainer_asks(name: str) -> None:
    """Versions, place, steps, expectation and effect; and nothing that only the suite knows."""
    known = read_issue(name)
    text = issue_report.render(known, RECEIVERS)
    for version in known.since:
        assert str(version) in text
    assert known.files[0] in text
    assert known.severity in text
    assert "xpected" in text
    assert known.script is None or expectation(known.script) in text
    assert known.patch is None or known.patch.read_text() in text
    # No links into the repository, and no reference to its tests where there is a script.
    assert ".md)" not in text
    if known.script is not None and known.script.name == "host.sh":
        steps = text[text.index("Steps to reproduce") :]
        assert re.search("^The script [a-z]", steps, re.MULTILINE)
        assert "paprscm reproduce" not in text
        assert "known_issues/" not in steps
        assert ("QEMU=PATH" in steps) == (known.product == "QEMU")
    assert known.script is None or "avocado run tests" not in text


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("qemu-")])
def test_a_report_to_qemu_needs_no_knowledge_of_the_suite(name: str) -> None:
    """It names no tests, no command and no other issue of the suite."""
    known = read_issue(name)
    text = issue_report.render(known, RECEIVERS)
    prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for word in ("tests/", "paprscm", "this suite", "the test", *names()):
        assert word not in prose.lower()
    # The script is described, and a fix of the project is named.
    assert known.script is None or re.search(r"^The script [a-z]+s ", prose, re.MULTILINE)
    assert not known.fixed_in or known.reported.partition(": ")[2].split("\n")[0] in prose


def test_a_report_names_the_programs_first_and_x86() -> None:
    text = issue_report.render(read_issue("qemu-unbind-mem-aborts"), None)
    assert re.findall(r"^([\w.]+):$", text, re.MULTILINE) == [
        *("unbind.c", "reproduce.sh", "bare.h", "fix.patch"),
    ]
    text = issue_report.render(read_issue("qemu-nvdimm-uuid-settable"), None)
    assert "On x86: `QEMU=qemu-system-x86_64 sh PATH/reproduce.sh`" in text
    assert "QEMU flavor: qemu-system-ppc64 and qemu-system-x86_64\n" in text


def test_bare_h_names_the_compiler_s_options() -> None:
    """Its header has the same ones as compile() of lib.sh."""

    def options(file: str, last: str) -> list[str]:
        text = (KNOWN_ISSUES / file).read_text()
        words = text[text.index("-mbig-endian") : text.index(last)]
        return [word for word in words.split() if word.startswith("-")]

    assert options("bare.h", "program.c\n") == options("lib.sh", '"$here/$1.c"')


@pytest.mark.parametrize("name", [name for name in names() if read_issue(name).script])
def test_a_standalone_script_has_all_functions(name: str) -> None:
    script = read_issue(name).script
    assert script is not None
    library = (script.parents[1] / "lib.sh").read_text()
    text = standalone(script.read_text(), library)
    # Outside comments, quotes, variables, and verbs of other commands.
    other = r'^\s*#.*$|"(?:[^"\\\n]|\\.)*"|\$\w+|\b(?:dmsetup|avocado) \w+'
    words = re.sub(other, "", text, flags=re.MULTILINE)
    defined = set(re.findall(r"^(\w+)\(\)", text, re.MULTILINE))
    for function in re.findall(r"^(\w+)\(\)", library, re.MULTILINE):
        assert function in defined or not re.search(rf"(?<![\w./-]){function}(?![\w./=-])", words)


@pytest.mark.parametrize("name", ["qemu-nvdimm-uuid-used-twice", "qemu-unbind-mem-aborts"])
def test_the_files_of_a_report_run_without_the_suite(name: str, tmp_path: Path) -> None:
    """Saved to a folder of any name, they tell the same as those of known_issues/."""
    known = read_issue(name)
    text = issue_report.render(known, RECEIVERS)
    files = dict(re.findall(r"^([\w.-]+):\n\n```\w*\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL))
    assert "lib.sh" not in files
    saved = tmp_path / "saved"
    saved.mkdir()
    for file, content in files.items():
        (saved / file).write_text(content + "\n")
    results = []
    for number, script in enumerate([known.script, saved / "reproduce.sh"]):
        work = tmp_path / str(number)
        work.mkdir()
        argv = ["sh", str(script)]
        ended = subprocess.run(argv, cwd=work, capture_output=True, text=True, check=False)
        assert ended.stderr == ""
        results.append(judge_output(ended.returncode, ended.stdout.splitlines()))
    assert results[0] == results[1]
    if results[0][0] is Outcome.UNKNOWN:
        pytest.skip(results[0][2])


def test_a_script_takes_what_it_needs_of_its_library() -> None:
    library = (
        "# A library.\n\n"
        "# Where we are.\nhere=$(pwd)\nplace=$here\n\n"
        "unused=1\n\n"
        "# On the host.\n\n"
        "gone() {\n\tprint found $*\n}\n\n"
        "print() {\n\techo $here\n}\n\n"
        "run() {\n\t$steps | print\n}\n\n"
        "save() {\n\techo stop\n}\n"
    )
    sourced = '. "$(dirname "$0")/../lib.sh"\n'
    head = f"#!/bin/sh\n{sourced}\n"
    taken = standalone(f'{head}true || gone "we run, and save"\n', library)
    assert re.findall(r"^(\w+)\(\)", taken, re.MULTILINE) == ["gone", "print"]
    assert "here=" in taken
    assert "place=" in taken
    assert "unused" not in taken
    assert "# A library." not in taken
    assert sourced not in taken
    taken = standalone(f"{head}steps=save\nrun\n", library)
    assert re.findall(r"^(\w+)\(\)", taken, re.MULTILINE) == ["print", "run", "save"]


def test_a_mail_is_plain_text() -> None:
    known = dataclasses.replace(read_issue("linux-pmem-loses-preflush-error"), folder=Path("none"))
    text = issue_report.render(known, RECEIVERS)
    head, _, body = text.partition("\n\n")
    assert head.splitlines() == [
        "To: Dan <dan@example.org>, Vishal <vishal@example.org>",
        "Cc: l@example.org",
        f"Subject: [BUG] nvdimm: {known.title}",
    ]
    prose = [line for line in body.splitlines() if not line.startswith("    ")]
    assert max(map(len, prose)) <= 72
    assert "`" not in "".join(prose)
    # Code keeps its columns.
    assert "    +	if (ret) {" in body.splitlines()


def test_without_a_source_the_mail_says_how_to_find_the_receivers() -> None:
    known = read_issue("linux-btt-sleeps-under-spinlock")
    text = issue_report.render(known, None)
    assert text.startswith("To: (scripts/get_maintainer.pl -f drivers/nvdimm/btt.c)\nSubject: ")


def test_an_entry_of_qemu_s_tracker_has_the_sections_of_its_template() -> None:
    known = read_issue("qemu-unbind-mem-aborts")
    text = issue_report.render(known, RECEIVERS)
    assert re.findall("^## (.+)$", text, re.MULTILINE) == [
        *("Host environment", "Emulated/Virtualized environment", "Description of problem"),
        *("Steps to reproduce", "Additional information"),
    ]
    lines = text.splitlines()
    assert lines[0] == f"Title: hw/ppc/spapr_nvdimm: {known.title}"
    # A guest can end its QEMU.
    assert any("security-process" in line for line in lines)
    assert "It needs powerpc64le-linux-gnu-gcc (or $CC)." in lines
    harmless = read_issue("qemu-nvdimm-uuid-used-twice")
    assert "It needs" not in issue_report.render(harmless, RECEIVERS)
    traced = issue_report.render(read_issue("qemu-label-writes-not-synced"), RECEIVERS)
    assert "It needs strace and powerpc64le-linux-gnu-gcc (or $CC)." in traced
    assert "security-process" not in issue_report.render(harmless, RECEIVERS)
    # A guest's root can harm the host; it may misread its own labels.
    for name, expected in [
        ("qemu-flush-results-outlive-kernel", True),
        ("qemu-read-metadata-sign-extends", False),
    ]:
        text = issue_report.render(read_issue(name), RECEIVERS)
        assert ("security-process" in text) is expected


def test_receivers_are_read_from_a_tree_or_an_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "linux-7.2"
    tree.mkdir()
    (tree / "MAINTAINERS").write_text(MAINTAINERS)
    (tree / "a").write_text("x")
    archive = tmp_path / "linux.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tree, tree.name)
    for source in (tree, archive):
        words = ["report-issue", "linux-btt-sleeps-under-spinlock", "--source", str(source)]
        assert main(words) == 0
        assert capsys.readouterr().out.startswith("To: Dan <dan@example.org>, Vishal")
    (tree / "MAINTAINERS").unlink()
    (tmp_path / "noise").write_text("x")
    for source in (tree, tmp_path / "noise", tmp_path / "missing"):
        words = ["report-issue", "linux-btt-sleeps-under-spinlock", "--source", str(source)]
        assert main(words) == 2
        assert "has no MAINTAINERS" in capsys.readouterr().err


def test_a_report_does_not_refer_to_files_of_the_suite() -> None:
    text = "One ([a](a.md)), two (see [b](b.md)): [c](c.md)."
    assert issue_report.without_links(text) == "One, two: c."


def test_a_report_names_the_fix_of_upstream() -> None:
    text = issue_report.render(read_issue("qemu-readonly-makes-file"), RECEIVERS)
    assert "\n### Fix\nFixed upstream: 4d6b23f7e2b7" in text
    assert "No fix is known" not in text
    text = issue_report.render(read_issue("qemu-maxmem-makes-slow-start"), RECEIVERS)
    assert "not yet" not in text
