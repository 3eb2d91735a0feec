# SPDX-License-Identifier: GPL-2.0-or-later
"""A bisection: both ends first, then git's choice of commits, then a proof by a revert."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from paprscm.bisect.odds import runs_needed
from paprscm.bisect.worktree import Commit, Repository, Worktree
from paprscm.errors import ConfigError
from paprscm.log import logger, step
from paprscm.results.files import publish

FORMAT = 1
"""Version of the state file."""


class Outcome(enum.Enum):
    """Result of one run, or of all runs of one commit."""

    SHOWS = "shows"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Run:
    """One run of the tests, or the judgement on a commit.

    Attributes:
        outcome: UNKNOWN if the bug could not be looked for.
        signature: which bug it is, comparable between runs; empty unless it shows.
        reason: one sentence for people.
    """

    outcome: Outcome
    signature: str = ""
    reason: str = ""


@dataclass
class State:
    """Progress of a bisection; kept in a file, so that an interrupted one can continue.

    Attributes:
        question: what is bisected; another question has another state.
        failures, runs: runs at the end with the bug, and how many of them showed it.
        signature: the bug.
        commits: the judgement on each commit, by id.
    """

    question: Mapping[str, str]
    failures: int = 0
    runs: int = 0
    signature: str = ""
    commits: dict[str, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The end of a bisection.

    Attributes:
        culprit: the first commit with the new state; None if it is one of the suspects.
        suspects: commits that could not be judged, with the last one that has the new state.
        proof: what the newer end does with the culprit reverted; None: it does not revert.
        signature: the bug.
        passes: number of runs of a commit that count as "gone".
        log: output of `git bisect log`.
    """

    culprit: Commit | None
    suspects: tuple[Commit, ...]
    proof: Run | None
    signature: str
    passes: int
    log: str


class Search:
    """Finds the first commit that shows a bug, or with `fix` the first one that does not.

    Args:
        repository: the user's repository.
        tree: its worktree, for the builds.
        good, bad: a commit without the bug, and one with it.
        fix: look for the fix: `bad` is the older one.
        try_once: builds the worktree and looks for the bug; its arguments are the commit and the
            signature of the bug, "" for any. ConfigError if the commit does not build.
        state: what an earlier search has found; save() is called when it changes.
        save: keeps the state.
        runs: runs at the end with the bug.
        error: probability of a wrong answer that is accepted for the whole search.
    """

    def __init__(
        self,
        repository: Repository,
        tree: Worktree,
        *,
        good: Commit,
        bad: Commit,
        fix: bool,
        try_once: Callable[[Commit, str], Run],
        state: State,
        save: Callable[[State], None],
        runs: int = 5,
        error: float = 0.05,
    ) -> None:
        self._repository = repository
        self._tree = tree
        self._good, self._bad = good, bad
        self._older, self._newer = (bad, good) if fix else (good, bad)
        self._terms = ("broken", "fixed") if fix else ("good", "bad")
        if not repository.is_ancestor(self._older, self._newer):
            raise ConfigError(
                f"{self._older} is not in the history of {self._newer}",
                hint="--fix is for a bug that the older commit has" if not fix else None,
            )
        self._fix = fix
        self._try_once = try_once
        self._state = state
        self._save = save
        self._runs = runs
        self._error = error
        self._passes = 1

    def run(self) -> Result:
        """Bisect.

        Raises:
            ConfigError: an end is not what it is said to be, or cannot be judged.
        """
        self._measure_bad_end()
        self._require_good_end()
        position = self._tree.start(self._older, self._newer, self._terms)
        while position.commit is not None:
            commit = self._repository.commit(position.commit)
            judged = self._judge(commit)
            position = self._tree.mark(self._term(judged.outcome))
        log = self._tree.log()
        self._tree.reset()
        culprit = self._repository.commit(position.found) if position.found else None
        suspects = tuple(map(self._repository.commit, position.suspects))
        proof = self._prove(culprit) if culprit else None
        return Result(culprit, suspects, proof, self._state.signature, self._passes, log)

    def _term(self, outcome: Outcome) -> str:
        if outcome is Outcome.UNKNOWN:
            return "skip"
        return self._terms[(outcome is Outcome.SHOWS) != self._fix]

    def _measure_bad_end(self) -> None:
        """Find the bug's signature, and how often it shows."""
        state = self._state
        self._tree.check_out(self._bad)
        while state.runs < self._runs:
            with step(f"{self._bad}, which has the bug: run {state.runs + 1} of {self._runs}"):
                run = self._try_once(self._bad, state.signature)
            if run.outcome is Outcome.UNKNOWN:
                raise ConfigError(f"{self._bad} cannot be judged: {run.reason}")
            state.runs += 1
            if run.outcome is Outcome.SHOWS:
                state.failures += 1
                state.signature = run.signature
                logger.info("%s", run.reason)
            self._save(state)
        if not state.failures:
            raise ConfigError(
                f"{self._bad} does not show the bug in {state.runs} runs",
                hint="name the failing tests after --, or raise --runs",
            )
        # Each judgement "gone" may be wrong: one a step, one of the end, one of the proof.
        between = self._repository.count(self._older, self._newer)
        judgements = math.ceil(math.log2(between + 1)) + 2
        self._passes = runs_needed(state.failures, state.runs, self._error / judgements)
        logger.info(
            "it shows in %d of %d runs; a commit without it in %d runs counts as one that does not "
            "have it",
            *(state.failures, state.runs, self._passes),
        )

    def _require_good_end(self) -> None:
        run = self._judge(self._good)
        if run.outcome is not Outcome.GONE:
            word = "shows the bug, too" if run.outcome is Outcome.SHOWS else "cannot be judged"
            raise ConfigError(f"{self._good} {word}: {run.reason}")

    def _judge(self, commit: Commit) -> Run:
        """The judgement on a commit, from the state if it is there."""
        if commit.id in (known := self._state.commits):
            logger.info("%s: %s (known)", commit, known[commit.id].outcome.value)
            return known[commit.id]
        self._tree.check_out(commit)
        run = self._repeat(commit)
        known[commit.id] = run
        self._save(self._state)
        return run

    def _repeat(self, commit: Commit) -> Run:
        with step(str(commit)):
            run = Run(Outcome.UNKNOWN)
            for _ in range(self._passes):
                try:
                    run = self._try_once(commit, self._state.signature)
                except ConfigError as error:
                    run = Run(Outcome.UNKNOWN, reason=error.message)
                if run.outcome is not Outcome.GONE:
                    break
            logger.info("%s%s", run.outcome.value, f": {run.reason}" if run.reason else "")
        return run

    def _prove(self, culprit: Commit) -> Run | None:
        """Judge the newer end with the culprit reverted."""
        self._tree.check_out(self._newer)
        if not self._tree.revert(culprit):
            return None
        try:
            return self._repeat(Commit(self._newer.id, f"{self._newer.subject}, with a revert"))
        finally:
            self._tree.reset()


def load_state(file: Path, question: Mapping[str, str]) -> State:
    """The state in a file; an empty one if it is missing, damaged, or of another question."""
    try:
        data = json.loads(file.read_bytes())
        if (data.pop("format"), data["question"]) != (FORMAT, dict(question)):
            return State(question)
        commits = {
            name: Run(Outcome(run["outcome"]), run["signature"], run["reason"])
            for name, run in data.pop("commits").items()
        }
        return State(**data, commits=commits)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return State(question)


def save_state(file: Path, state: State) -> None:
    """Write the state."""
    data = {"format": FORMAT, **asdict(state)}
    for run in data["commits"].values():
        run["outcome"] = run["outcome"].value
    publish(json.dumps(data, indent=1).encode(), file)
