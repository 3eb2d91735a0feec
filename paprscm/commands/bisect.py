# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bisect`: the commit of Linux or QEMU that broke a test or fixed a known issue."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paprscm import log, settings
from paprscm.bisect.search import Outcome, Result, Run, Search, load_state, save_state
from paprscm.bisect.signature import judge, named_test
from paprscm.bisect.worktree import Commit, Repository
from paprscm.build.kbuild import build_tree as build_kernel
from paprscm.commands import manual
from paprscm.commands.bench_ab import complete_jobs, job_argv, run_job
from paprscm.commands.reproduce import Outcome as Reproduced
from paprscm.commands.reproduce import Reproducer, attempt
from paprscm.debian.toolchain import require_program
from paprscm.emulator.qemu_build import build_tree as build_qemu
from paprscm.errors import ConfigError
from paprscm.host.cache import Cache
from paprscm.known_issues import KnownIssue, read_issue
from paprscm.paths import SUITE_VARIABLE
from paprscm.results.record import Record
from paprscm.settings import Settings, expanded

KIND = "bisect"
"""Kind of the cache's workspaces with worktree and state."""


def add_verb(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `bisect` to those of `paprscm`."""
    text = (
        "Find the commit that broke tests, which are the words after --; status 0: found, 1: "
        "narrowed down, 2: not possible. The same command continues an interrupted search."
    )
    added = verbs.add_parser("bisect", help=text, description=text, parents=[common])
    trees = added.add_mutually_exclusive_group(required=True)
    for option, name in (("--source", "Linux"), ("--qemu-source", "QEMU")):
        text = f"git repository of {name}; it gets a worktree, and is not changed otherwise"
        manual.takes_files(trees.add_argument(option, type=Path, metavar="TREE", help=text))
    added.add_argument("--good", required=True, metavar="COMMIT", help="it does not have the bug")
    added.add_argument("--bad", required=True, metavar="COMMIT", help="it has the bug")
    text = "find the commit that fixed the bug: BAD is older than GOOD"
    added.add_argument("--fix", action="store_true", help=text)
    text = "the bug is a known issue, and its reproduction is run instead of tests"
    added.add_argument("--issue", metavar="NAME", default="", help=text)
    text = "every failure is the bug, not only the one that BAD shows first"
    added.add_argument("--any-failure", action="store_true", help=text)
    added.add_argument("--config", type=Path, help="the .config of Linux; default: the suite's own")
    added.add_argument(
        "--runs", type=int, default=5, help="runs of BAD, to measure how often it fails (5)"
    )
    text = "probability of a wrong answer for a bug that does not always show (0.05)"
    added.add_argument("--error", type=float, default=0.05, metavar="P", help=text)
    added.set_defaults(verb=bisect)


def bisect(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Bisect, and print the culprit with a draft of a report."""
    if bool(arguments.rest) == bool(arguments.issue):
        raise ConfigError(
            "give the tests that fail, or a known issue",
            hint="paprscm bisect … -- tests/flush/test_fsync.py, or --issue NAME",
        )
    if arguments.runs < 1 or not 0 < arguments.error < 1:
        raise ConfigError("--runs is at least 1, and --error between 0 and 1")
    issue = read_issue(arguments.issue) if arguments.issue else None
    product = "Linux" if arguments.source else "QEMU"
    if issue and issue.product != product:
        raise ConfigError(f"{issue.name} is an issue of {issue.product}, not of {product}")
    require_program("git")
    repository = Repository(expanded(arguments.source or arguments.qemu_source).resolve())
    good, bad = repository.commit(arguments.good), repository.commit(arguments.bad)
    given = {name: getattr(arguments, name) for name in settings.names()}
    values = {name: value for name, value in given.items() if value is not None}
    question = {
        **{"good": good.id, "bad": bad.id, "fix": str(arguments.fix), "issue": arguments.issue},
        **{"tests": shlex.join(arguments.rest), "any_failure": str(arguments.any_failure)},
        **{"settings": json.dumps(values, sort_keys=True), "config": _digest(arguments.config)},
    }
    cache = Cache(chosen.cache_dir)
    fields = {"source": str(repository.folder)}
    with cache.workspace(KIND, fields, purpose=f"bisects {repository.folder}") as folder:
        state_file = folder / "state.json"
        tree = repository.worktree(folder / "tree", bad)
        trial = _Trial(arguments, issue, chosen, cache, tree.folder, folder / "jobs", values)
        search = Search(
            repository,
            tree,
            good=good,
            bad=bad,
            fix=arguments.fix,
            try_once=trial.run,
            state=load_state(state_file, question),
            save=lambda state: save_state(state_file, state),
            runs=arguments.runs,
            error=arguments.error,
        )
        result = search.run()
        log_file = folder / "bisect.log"
        log_file.write_text(result.log)
        state_file.unlink(missing_ok=True)
        repository.remove(tree.folder)
    print(f"git bisect log: {log_file}")
    test = "" if issue else path_of(named_test(result.signature), arguments.rest)
    print(describe(result, good, bad, fix=arguments.fix, test=test))
    return 0 if result.culprit else 1


class _Trial:
    """Builds a commit and looks for the bug; a commit that is built already is not built again."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        issue: KnownIssue | None,
        chosen: Settings,
        cache: Cache,
        tree: Path,
        jobs: Path,
        given: Mapping[str, str],
    ) -> None:
        self._arguments = arguments
        self._chosen = chosen
        self._cache = cache
        self._tree = tree
        self._jobs = jobs
        self._given = given
        self._issue = issue
        self._built: tuple[Commit, dict[str, str]] | None = None

    def run(self, commit: Commit, signature: str) -> Run:
        """Build the tree, unless it was the last one, and look for the bug."""
        if self._built is None or self._built[0] != commit:
            self._built = None
            self._built = commit, self._build()
        values = {**self._given, **self._built[1]}
        if self._issue is not None:
            return _reproduce(self._issue, values)
        every = not signature or self._arguments.any_failure
        tests = self._arguments.rest
        if not every:
            # Avocado takes the method for a regular expression.
            tests = [path_of(named_test(signature), tests) + "$"]
        record = self._job(values, tests)
        return judge(record, signature, any_failure=self._arguments.any_failure)

    def _build(self) -> dict[str, str]:
        """Build the worktree; return the settings that use the product."""
        if self._arguments.qemu_source is not None:
            return {"qemu": str(build_qemu(self._cache, self._tree))}
        built = build_kernel(
            self._cache,
            self._tree,
            config=self._arguments.config,
            page_size=self._chosen.page_size,
            debug=self._chosen.kernel == "debug",
        )
        modules = {"modules": str(built.modules)} if built.modules else {}
        return {"kernel": str(built.vmlinux), **modules}

    def _job(self, values: Mapping[str, str], tests: list[str]) -> Record:
        shutil.rmtree(self._jobs, ignore_errors=True)
        self._jobs.mkdir()
        os.environ[SUITE_VARIABLE] = "1"
        run_job(job_argv(values, tests, self._jobs, []), self._jobs, 0)
        return complete_jobs(self._jobs)[0]


def path_of(name: str, tests: Sequence[str]) -> str:
    """The reference of a test for Avocado.

    Args:
        name: its name in a record, which begins below the folder of the suite.
        tests: references of files or folders, one of which contains it.
    """
    for word in tests:
        file = Path(word.partition(":")[0])
        for folder in (file, *file.parents):
            if (folder / name.partition(":")[0]).is_file():
                return str(folder / name)
    return name


def _reproduce(issue: KnownIssue, values: Mapping[str, str]) -> Run:
    found = attempt(Reproducer(values, echo=log.logger.debug), issue)
    outcome = {Reproduced.SHOWN: Outcome.SHOWS, Reproduced.GONE: Outcome.GONE}
    judged = outcome.get(found.outcome, Outcome.UNKNOWN)
    return Run(judged, issue.name if judged is Outcome.SHOWS else "", found.found)


def _digest(config: Path | None) -> str:
    try:
        return hashlib.sha256(expanded(config).read_bytes()).hexdigest() if config else ""
    except OSError as error:
        raise ConfigError(f"{config}: {error.strerror}") from error


def describe(result: Result, good: Commit, bad: Commit, *, fix: bool, test: str) -> str:
    """The result for the terminal, with a draft of a report.

    Args:
        result: the end of the search.
        good, bad: its ends.
        fix: it looked for the fix.
        test: reference of the test that failed; empty for a known issue.
    """
    word = "fixed" if fix else "bad"
    culprit = result.culprit
    if culprit is None:
        suspects = "\n".join(f"  {one}" for one in result.suspects)
        return (
            f"the first {word} commit is one of these; the others could not be judged:\n{suspects}"
        )
    lines = [f"first {word} commit: {culprit}"]
    newer = good if fix else bad
    if result.proof is None:
        lines.append(f"not proven: it cannot be reverted on {newer}")
    else:
        expected = Outcome.SHOWS if fix else Outcome.GONE
        verdict = "proven" if result.proof.outcome is expected else "not proven"
        reason = f" ({result.proof.reason})" if result.proof.reason else ""
        what = {
            Outcome.SHOWS: "the bug shows",
            Outcome.GONE: f"the bug is gone in {result.passes} runs",
            Outcome.UNKNOWN: "it could not be judged",
        }[result.proof.outcome]
        lines.append(f"{verdict}: with this commit reverted on {newer}, {what}{reason}")
    if fix:
        return "\n".join(lines)
    again = f"paprscm run {shlex.quote(test)}" if test else f"paprscm reproduce {result.signature}"
    lines += [
        "",
        f'Since commit {culprit.id[:12]} ("{culprit.subject}"):',
        f"  {result.signature}",
        f"Reproduction: {again}",
        "",
        f'Fixes: {culprit.id[:12]} ("{culprit.subject}")',
        "Reported-by: NAME <ADDRESS>",
    ]
    return "\n".join(lines)
