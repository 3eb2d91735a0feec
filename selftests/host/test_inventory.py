# SPDX-License-Identifier: GPL-2.0-or-later
"""Description of the host and of the suite's version."""

from __future__ import annotations

import subprocess
from pathlib import Path

from paprscm.host.inventory import describe_host, describe_suite


def test_this_machine() -> None:
    host = describe_host()
    assert host.cpu
    assert host.cores >= 1
    assert host.memory_mib > 256
    assert host.distribution != "unknown"


def test_a_machine_without_these_files(tmp_path: Path) -> None:
    host = describe_host(tmp_path)
    assert (host.cpu, host.memory_mib, host.distribution) == (host.machine, 0, "unknown")


def test_a_power_machine(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16777216 kB\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=x\nPRETTY_NAME="Debian \\"13\\""\n')
    host = describe_host(tmp_path)
    assert (host.cpu, host.memory_mib) == ("POWER9, altivec supported", 16384)


def git(folder: Path, *words: str) -> str:
    identity = "-c", "user.name=a", "-c", "user.email=a@example.org"
    done = subprocess.run(
        ["git", *identity, "-C", folder, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    # An installed wheel has no repository, and a new one has no commit.
    assert describe_suite(tmp_path).commit is None
    git(tmp_path, "init", "-q")
    assert describe_suite(tmp_path).commit is None
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "x")
    suite = describe_suite(tmp_path)
    assert (suite.commit, suite.modified) == (git(tmp_path, "rev-parse", "HEAD"), False)
    # Results of jobs are not changes of the suite.
    (tmp_path / "other").write_text("1")
    assert not describe_suite(tmp_path).modified
    (tmp_path / "file").write_text("2")
    assert describe_suite(tmp_path).modified
