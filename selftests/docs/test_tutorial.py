# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/writing-tests.md, followed exactly: its files are written, its commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from paprscm.debian import kernel_source
from paprscm.guest.environment import Environment
from paprscm.host.cache import Cache
from paprscm.paths import ROOT

TUTORIAL = ROOT / "docs/writing-tests.md"
KERNEL = "## Change the kernel"


@pytest.fixture
def copy(tmp_path: Path, environment: Environment) -> Path:
    """A copy of the suite's tests, next to the home folder of a user with the same cache."""
    folder = tmp_path / "suite"
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "avocado.cfg", folder)
    (tmp_path / "home").mkdir()
    return folder


def follow(text: str, folder: Path, cache_dir: Path) -> int:
    """Write each file and run each command; return the number of commands."""
    env = {
        **os.environ,
        "HOME": str(folder.parent / "home"),
        "XDG_CACHE_HOME": str(cache_dir.parent),
        # Of the outputs in the tutorial.
        "COLUMNS": "100",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    count = 0
    for block in MarkdownIt().parse(text):
        if block.type != "fence":
            continue
        language, _, name = block.info.partition(" ")
        if language == "python":
            (folder / name).write_text(block.content)
        for command, output in commands(block.content) if language == "console" else ():
            count += 1
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env=env,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            expected = ".*".join(map(re.escape, output.split("…")))
            printed = re.sub(r"^JOB LOG.*\n", "", done.stdout, flags=re.MULTILINE)
            assert re.fullmatch(expected, printed, re.DOTALL), f"{command}\n{done.stdout}"
    return count


def commands(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with the output below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


@pytest.mark.guest
def test_the_tutorial_without_a_kernel_build(copy: Path, environment: Environment) -> None:
    text = TUTORIAL.read_text().partition(KERNEL)[0]
    assert follow(text, copy, environment.settings.cache_dir) == 5


@pytest.mark.guest
@pytest.mark.slow
def test_the_tutorial_with_a_kernel_build(copy: Path, environment: Environment) -> None:
    cache_dir = environment.settings.cache_dir
    archive = kernel_source.find_source(Cache(cache_dir), environment.settings)
    assert archive is not None
    tree = copy.parent / "home/linux"
    kernel_source.unpack_source(archive / "linux.tar.xz", tree)
    try:
        assert follow(TUTORIAL.read_text(), copy, cache_dir) == 7
    finally:
        cache = Cache(cache_dir)
        for entry in cache.entries():
            if entry.fields.get("source") == str(tree.resolve()):
                cache.remove(entry.path)
