# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual page and the completion scripts name every verb and every option."""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paprscm.commands import cli

PAPRSCM = Path(sys.executable).with_name("paprscm")


@functools.cache
def printed(*words: str) -> str:
    done = subprocess.run([PAPRSCM, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser of the command, and the parsers of all verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from parsers(verb)


PARSERS = list(parsers(cli.parser()))
OPTIONS = {o for p in PARSERS for a in p._actions for o in a.option_strings if o.startswith("--")}


def test_the_manual_page_has_every_verb_and_option() -> None:
    page = printed("--man").replace("\\-", "-")
    assert page.startswith(".TH PAPRSCM")
    assert len(PARSERS) > 15
    assert [p.prog for p in PARSERS[1:] if f"'{p.prog}'" not in page] == []
    assert [option for option in OPTIONS - {"--help"} if option not in page] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_completion_script_has_every_option(shell: str) -> None:
    script = printed("--completion", shell)
    # tcsh's script has options without their dashes.
    names = {option.lstrip("-") for option in OPTIONS}
    assert [name for name in names if name not in script] == []


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("paprscm ca", {"cache"}),
        ("paprscm cache ", {"ls", "export", "import", "prune"}),
        ("paprscm shell --nv", {"--nvdimm"}),
        ("paprscm kernel build --so", {"--source"}),
        ("paprscm run known_issues/READ", {"known_issues/README.md"}),
    ],
)
def test_bash_completes(line: str, answers: set[str], tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(printed("--completion", "bash"))
    (tmp_path / "known_issues").mkdir()
    (tmp_path / "known_issues/README.md").touch()
    words = line.split(" ")
    script_line = (
        f"source {script}; COMP_WORDS=({' '.join(words[:-1])} '{words[-1]}'); "
        f"COMP_CWORD={len(words) - 1}; _shtab_paprscm 2>/dev/null; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script_line], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert answers <= set(done.stdout.split())
