# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bisect` with a small history in the form of QEMU's, and real builds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from paprscm.bisect.search import Outcome, Run
from paprscm.commands import bisect, cli

CONFIGURE = r"""#!/bin/sh
top=$(dirname "$0")
mkdir -p qemu-bundle
cat > build.ninja <<END
rule cc
  command = cc \$in -o \$out
build qemu-system-ppc64: cc $top/main.c
END
"""
MAIN = '#include <stdio.h>\nint main(void)\n{{\n\tputs("{}");\n{}}}\n'
ISSUE = "qemu-unbind-mem-aborts"

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("git", "ninja", "pkg-config", "cc")),
    reason="needs git, ninja, pkg-config and cc",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository with the tags v1 to v6: v4 breaks it, v3 does not compile."""
    top = tmp_path / "qemu"
    (top / "hw/ppc").mkdir(parents=True)
    (top / "hw/ppc/spapr_nvdimm.c").touch()
    (top / "configure").write_text(CONFIGURE)
    (top / "configure").chmod(0o755)
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    git = ["git", "-C", str(top), *identity]
    subprocess.run([*git, "init", "-q"], check=True)
    for number, (word, more) in enumerate(
        [
            *(("right", ""), ("right", "\t;\n"), ("right", "\terror\n"), ("wrong", "\t;\n")),
            *(("wrong", "\t;\n\t;\n"), ("wrong", "\t;\n\t;\n\treturn 0;\n")),
        ],
        1,
    ):
        (top / "main.c").write_text(MAIN.format(word, more))
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", f"step {number}"], check=True)
        subprocess.run([*git, "tag", f"v{number}"], check=True)
    return top


@pytest.fixture
def reproduced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The issue shows if the emulator prints "wrong"; collects its outputs."""
    outputs = []

    def reproduce(_: object, values: dict[str, str]) -> Run:
        done = subprocess.run([values["qemu"]], capture_output=True, text=True, check=False)
        outputs.append(done.stdout.strip())
        return Run(Outcome.SHOWS, ISSUE) if outputs[-1] == "wrong" else Run(Outcome.GONE)

    monkeypatch.setattr(bisect, "_reproduce", reproduce)
    return outputs


def words(source: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *("bisect", "--cache-dir", str(tmp_path / "cache"), "--qemu-source", str(source)),
        *("--runs", "2", *more),
    ]


def test_what_broke_a_known_issue(
    source: Path, reproduced: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(words(source, tmp_path, "--good=v1", "--bad=v6", f"--issue={ISSUE}"))
    output = capsys.readouterr().out
    # v3 does not compile, so v3 or v4 is the culprit.
    assert status == 1
    assert "is one of these" in output
    assert '("step 3")' in output
    assert '("step 4")' in output
    assert '("step 2")' not in output
    assert reproduced[:2] == ["wrong", "wrong"]
    listed = subprocess.run(
        ["git", "-C", source, "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1, "the worktree is left in the user's repository"


def test_a_culprit_and_the_draft_of_a_report(
    source: Path, reproduced: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(source, tmp_path, "--good=v4~2", "--bad=v4", f"--issue={ISSUE}")) == 1
    capsys.readouterr()
    assert cli.main(words(source, tmp_path, "--good=v6", "--bad=v4", "--issue=x")) == 2
    assert "x" in capsys.readouterr().err
    git = ["git", "-C", str(source), "-c", "user.name=n", "-c", "user.email=n@example.org"]
    (source / "main.c").write_text(MAIN.format("right", "\t;\n"))
    subprocess.run([*git, "commit", "-q", "-a", "-m", "hw/ppc: Do it right"], check=True)
    fix = words(source, tmp_path, "--fix", "--good=HEAD", "--bad=v4", f"--issue={ISSUE}")
    assert cli.main(fix) == 0
    output = capsys.readouterr().out
    assert '("hw/ppc: Do it right")' in output
    assert "proven: with this commit reverted on" in output
    assert "the bug shows" in output
    (log,) = [line for line in output.splitlines() if line.startswith("git bisect log: ")]
    assert "fixed" in Path(log.partition(": ")[2]).read_text()
    assert reproduced[-1] == "wrong"


def test_the_failed_test_is_found_below_the_given_ones(tmp_path: Path) -> None:
    folder = tmp_path / "my tests/hcall"
    folder.mkdir(parents=True)
    (folder / "test_x.py").touch()
    for given in (tmp_path / "my tests", folder, folder / "test_x.py", f"{folder}/test_x.py:X"):
        path = bisect.path_of("hcall/test_x.py:X.test_a", ["elsewhere", str(given)])
        assert path == f"{folder}/test_x.py:X.test_a"
    assert bisect.path_of("hcall/test_y.py:Y.test_a", [str(folder)]) == "hcall/test_y.py:Y.test_a"


def test_what_is_not_possible(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = ("--good=v1", "--bad=v6")
    for more, message in (
        (ends, "give the tests that fail, or a known issue"),
        ((*ends, f"--issue={ISSUE}", "--", "tests/"), "give the tests that fail, or a known"),
        (("--good=v1", "--bad=v9", f"--issue={ISSUE}"), "has no commit v9"),
        ((*ends, f"--issue={ISSUE}", "--error=0"), "--error between 0 and 1"),
        ((*ends, "--issue=linux-dm-stays-synchronous"), "is an issue of Linux, not of QEMU"),
    ):
        assert cli.main(words(source, tmp_path, *more)) == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(source / ".git")
    assert cli.main(words(source, tmp_path, *ends, f"--issue={ISSUE}")) == 2
    assert "is not in a git repository" in capsys.readouterr().err
