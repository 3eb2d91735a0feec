# SPDX-License-Identifier: GPL-2.0-or-later
"""Files for GitHub, GitLab and containers: they match their schemas, and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from paprscm.commands.doctor import HOST_PACKAGES, parse_host_packages
from paprscm.paths import ROOT

GITHUB = ROOT / ".github"
SCHEMAS = {
    GITHUB / "workflows/suite.yml": "vendor.github-workflows",
    GITHUB / "ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
    GITHUB / "ISSUE_TEMPLATE/wrong-verdict.yml": "vendor.github-issue-forms",
    GITHUB / "ISSUE_TEMPLATE/product-bug.yml": "vendor.github-issue-forms",
    ROOT / ".gitlab-ci.yml": "vendor.gitlab-ci",
}
PIPELINES = [GITHUB / "workflows/suite.yml", ROOT / ".gitlab-ci.yml"]


def check(file: Path, schema: str, *words: str) -> None:
    """Check a file against a schema of check-jsonschema; nothing is downloaded."""
    program = Path(sys.executable).with_name("check-jsonschema")
    argv = [str(program), *words, "--builtin-schema", schema, str(file)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_fits_its_schema(file: Path) -> None:
    # Tags such as !reference are specific to GitLab.
    gitlab = ("--data-transform", "gitlab-ci") if file.name == ".gitlab-ci.yml" else ()
    check(file, SCHEMAS[file], *gitlab)


def test_every_job_has_a_time_limit() -> None:
    check(PIPELINES[0], "custom.github-workflows-require-timeout")


def test_every_yaml_file_has_a_schema() -> None:
    assert {*GITHUB.rglob("*.yml"), ROOT / ".gitlab-ci.yml"} == set(SCHEMAS)


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.name)
def test_commands_of_a_pipeline_exist(file: Path) -> None:
    text = re.sub(r"\$\{\{.*?\}\}", "X", file.read_text())
    commands = re.findall(r"^\s*- (?:run: )?((?:\.ci/|make ).*)$", text, re.M)
    assert len(commands) == 3
    for command in commands:
        # `make -n` only prints its commands; `bash -n` only checks the syntax.
        program = "make -n" if command.startswith("make ") else "bash -n"
        line = f"{program} {command.removeprefix('make ')}"
        subprocess.run(["bash", "-c", line], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_container_has_the_host_packages() -> None:
    line = re.search(r"\$\((sed -n .*) /tmp/host-packages\)", (ROOT / "Containerfile").read_text())
    assert line is not None
    done = subprocess.run(
        ["sh", "-c", f"{line[1]} {HOST_PACKAGES}"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.split() == [p.name for p in parse_host_packages(HOST_PACKAGES.read_text())]


def test_the_container_s_user_is_not_root() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    assert lines.index("USER suite") < lines.index("RUN make setup")
