# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm reproduce`: run the smallest reproduction of a known issue.

known_issues/NAME/ may contain one script, with the files that it needs:

host.sh    runs on the host, in an empty folder. $QEMU is the emulator; without it, the script runs
           qemu-system-ppc64 of the PATH.
guest.sh   runs as root in a guest; its arguments are the names of the regions of the DIMMs that the
           issue's field 'Machine' lists.

A script prints a line "expected: …" and a line "found: …", and exits with an Outcome. It needs
nothing of the suite but known_issues/lib.sh and bare.h. Without a script, the first test of
'Shown by' is run.
"""

from __future__ import annotations

import enum
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm import log, settings
from paprscm.commands.dimm_syntax import parse_nvdimm
from paprscm.debian.packages import Archive
from paprscm.emulator import binary
from paprscm.emulator.binary import Qemu
from paprscm.errors import ConfigError, Error
from paprscm.guest.environment import Environment, prepare
from paprscm.host import process
from paprscm.host.process import describe_status
from paprscm.known_issues import IssueState, KnownIssue
from paprscm.paths import ROOT
from paprscm.pmem.regions import wait_for_region
from paprscm.results.record import read_record
from paprscm.vm.machine import Machine, require

LIMIT_S = 300.0
"""Time limit of a reproduction, s."""

_EXPECTED, _FOUND = "expected: ", "found: "


class Outcome(enum.IntEnum):
    """Outcome of a reproduction; its value is the exit status of the script."""

    GONE = 0
    SHOWN = 1
    UNKNOWN = 2


@dataclass(frozen=True)
class Reproduction:
    """Result of a reproduction.

    Attributes:
        outcome: the issue is gone, shows, or the script could not tell.
        expected: the contract, in one sentence; empty if the script did not print it.
        found: the observation, or the reason of UNKNOWN.
        versions: versions of the products by name, as far as the reproduction used them.
        duration_s: its duration, s, without the preparation of QEMU, kernel and userland.
    """

    outcome: Outcome
    expected: str
    found: str
    versions: Mapping[str, str]
    duration_s: float


def judge_output(status: int, lines: Sequence[str]) -> tuple[Outcome, str, str]:
    """Outcome of a script, and the texts of its lines "expected: …" and "found: …".

    A shell exits with 1 for many reasons, so 0 and 1 count only with both lines.

    Args:
        status: its exit status.
        lines: its output.
    """
    expected, found = (
        next((line.removeprefix(mark) for line in reversed(lines) if line.startswith(mark)), "")
        for mark in (_EXPECTED, _FOUND)
    )
    if status not in (0, 1):
        default = f"{describe_status(status)}; {lines[-1] if lines else 'no output'}"
        return Outcome.UNKNOWN, expected, found or default
    if not (expected and found):
        missing = " and ".join(
            f"'{mark.strip()}'"
            for mark, text in ((_EXPECTED, expected), (_FOUND, found))
            if not text
        )
        return Outcome.UNKNOWN, expected, f"exit status {status}, but no line {missing}"
    return Outcome(status), expected, found


class Reproducer:
    """Runs reproductions with the user's settings; prepares QEMU and guests once.

    Args:
        given: settings that the user gave, by name. They override those of an issue.
        echo: called with each line that a reproduction prints.
    """

    def __init__(self, given: Mapping[str, str], *, echo: Callable[[str], None]) -> None:
        self._given = given
        self._echo = echo
        self._environments: dict[settings.Settings, Environment] = {}

    def run(self, issue: KnownIssue) -> Reproduction:
        """Run the reproduction of an issue.

        Raises:
            ConfigError: the issue has no reproduction.
        """
        chosen = settings.load({**issue.settings, **self._given})
        if issue.script is not None:
            on_host = issue.script.name == "host.sh"
            return (self._on_host if on_host else self._in_guest)(issue, issue.script, chosen)
        if issue.tests:
            return self._test(issue, chosen)
        raise ConfigError(
            f"{issue.name} has no reproduction that can be run",
            hint=f"known_issues/{issue.name}.md describes it",
        )

    def _on_host(self, issue: KnownIssue, script: Path, chosen: settings.Settings) -> Reproduction:
        qemu = binary.resolve(Archive.of(chosen), chosen.qemu)
        with tempfile.TemporaryDirectory(
            prefix="paprscm-reproduce-", dir=chosen.scratch_dir
        ) as name:
            folder = Path(name)
            emulator = _emulator(folder, qemu)
            (folder / "work").mkdir()
            done = process.run(
                ["sh", script],
                cwd=folder / "work",
                env={**os.environ, "QEMU": str(emulator), "PYTHON": sys.executable},
                timeout_s=LIMIT_S,
                on_line=self._echo,
                check=False,
            )
        outcome = judge_output(done.status, done.lines)
        return Reproduction(*outcome, {"QEMU": qemu.version_text}, done.duration_s)

    def _environment(self, chosen: settings.Settings) -> Environment:
        environment = self._environments.get(chosen) or prepare(chosen)
        self._environments[chosen] = environment
        return environment

    def _in_guest(self, issue: KnownIssue, script: Path, chosen: settings.Settings) -> Reproduction:
        environment = self._environment(chosen)
        versions = {"QEMU": environment.qemu.version_text, "Linux": environment.kernel.release}
        nvdimms = tuple(parse_nvdimm(text, slot=slot) for slot, text in enumerate(issue.machine))
        for nvdimm in nvdimms:
            require(environment.qemu, nvdimm)
        started = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="paprscm-reproduce-") as folder,
            # The kernel's complaints may be what the script looks for.
            environment.guest(Machine(nvdimms=nvdimms), folder=Path(folder), allowed=[""]) as guest,
        ):
            place = "/tmp/known_issues"  # noqa: S108 - a folder of the guest
            guest.succeed(f"mkdir -p {place}/{issue.name}")
            for file in issue.attachments:
                guest.put(file, f"{place}/{file.relative_to(issue.folder.parent)}")
            regions = [wait_for_region(guest, nvdimm.slot) for nvdimm in nvdimms]
            words = ["sh", script.name, *(region.device.rpartition("/")[2] for region in regions)]
            result = guest.run(
                f"cd {place}/{issue.name} && {shlex.join(words)} 2>&1", timeout_s=LIMIT_S
            )
        lines = result.stdout.splitlines()
        for line in lines:
            self._echo(line)
        outcome = judge_output(result.status, lines)
        return Reproduction(*outcome, versions, time.monotonic() - started)

    def _test(self, issue: KnownIssue, chosen: settings.Settings) -> Reproduction:
        """Run a test of the suite, and read its verdict on the issue."""
        # Not within the time limit: a kernel may have to be built.
        self._environment(chosen)
        test = issue.tests[0]
        with tempfile.TemporaryDirectory(prefix="paprscm-reproduce-") as folder:
            # Avocado takes the method for a regular expression.
            words = [str(Path(sys.executable).with_name("avocado")), "run", f"{ROOT / test}$"]
            words += ["--job-results-dir", folder]
            for name, value in {**issue.settings, **self._given}.items():
                words += ["-p", f"{name}={value}"]
            done = process.run(
                words, cwd=ROOT, timeout_s=LIMIT_S, on_line=log.logger.debug, check=False
            )
            jobs = list(Path(folder).glob("job-*"))
            tests = read_record(jobs[0]).tests if jobs else ()
        if not tests:
            reason = f"avocado run {test}: {describe_status(done.status)}\n{done.text.strip()}"
            return Reproduction(Outcome.UNKNOWN, "", reason, {}, done.duration_s)
        (result,) = tests
        for finding in result.known_issues:
            if finding.name == issue.name:
                self._echo(f"{_FOUND}{finding.found}")
                outcome = Outcome.SHOWN if finding.shows else Outcome.GONE
                versions = {finding.product: finding.version}
                return Reproduction(outcome, "", finding.found, versions, done.duration_s)
        reason = f"{test} ended as {result.status}: {result.reason}"
        return Reproduction(Outcome.UNKNOWN, "", reason, {}, done.duration_s)


def _emulator(folder: Path, qemu: Qemu) -> Path:
    """Write a script that starts the emulator; a fetched one needs more than its path."""
    file = folder / "qemu-system-ppc64"
    file.write_text(f'#!/bin/sh\nexec {shlex.join(qemu.argv_prefix)} "$@"\n')
    file.chmod(0o755)
    return file


def attempt(reproducer: Reproducer, issue: KnownIssue) -> Reproduction:
    """Reproduce one issue; an error of QEMU, the guest or the host is an UNKNOWN outcome."""
    started = time.monotonic()
    try:
        return reproducer.run(issue)
    except Error as error:
        text = f"{error.message} ({error.hint})" if error.hint else error.message
        return Reproduction(Outcome.UNKNOWN, "", text, {}, time.monotonic() - started)


def remark(issue: KnownIssue, result: Reproduction) -> str:
    """Comparison of an outcome with the issue's file; empty if they agree."""
    version = result.versions.get(issue.product)
    if result.outcome is Outcome.UNKNOWN or version is None:
        return ""
    shows = result.outcome is Outcome.SHOWN
    if shows and issue.state(version) is IssueState.FIXED:
        return "listed as fixed in this version: a regression"
    return issue.update(version, shows=shows) or ""


def reproduce_one(given: Mapping[str, str], issue: KnownIssue) -> Outcome:
    """Reproduce one issue, and print its output, the versions and the outcome."""
    print(f"{issue.name}: {issue.title}", flush=True)
    result = attempt(Reproducer(given, echo=lambda line: print(f"  {line}", flush=True)), issue)
    for product, version in result.versions.items():
        print(f"{product} {version}")
    if result.outcome is Outcome.UNKNOWN:
        print(f"could not tell: {result.found}")
    else:
        note = remark(issue, result)
        print(result.outcome.name.lower() + (f": {note}" if note else ""))
    return result.outcome


def reproduce_many(given: Mapping[str, str], issues: Sequence[KnownIssue]) -> Outcome:
    """Reproduce issues one after the other; print a line each, and then their numbers.

    Returns:
        UNKNOWN if one was unknown, else SHOWN if one was shown, else GONE.
    """
    reproducer = Reproducer(given, echo=log.logger.debug)
    width = max(len(issue.name) for issue in issues)
    counts: Counter[Outcome] = Counter()
    for issue in issues:
        result = attempt(reproducer, issue)
        counts[result.outcome] += 1
        text = remark(issue, result) or result.found.partition("\n")[0]
        word = result.outcome.name.lower()
        print(f"{issue.name:{width}}  {word:7}  {result.duration_s:6.1f} s  {text}", flush=True)
    print(", ".join(f"{counts[outcome]} {outcome.name.lower()}" for outcome in Outcome))
    return max(counts)
