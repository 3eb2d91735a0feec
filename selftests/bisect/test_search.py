# SPDX-License-Identifier: GPL-2.0-or-later
"""Bisections of a small history by the real git."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from paprscm.bisect.odds import missed, runs_needed
from paprscm.bisect.search import (
    Outcome,
    Result,
    Run,
    Search,
    State,
    load_state,
    save_state,
)
from paprscm.bisect.worktree import Commit, Repository, Worktree
from paprscm.errors import ConfigError

QUESTION = {"good": "c0"}
SHOWS = Run(Outcome.SHOWS, "test: wrong", "test: wrong")
GONE = Run(Outcome.GONE)


class History:
    """A repository with the commits c0, c1, … on one branch; each changes the files it names."""

    def __init__(self, folder: Path, commits: Sequence[dict[str, str]]) -> None:
        self.folder = folder / "source"
        self.folder.mkdir()
        self._git("init", "-q", "-b", "main")
        for number, files in enumerate(commits):
            for name, text in {**files, "number": str(number)}.items():
                (self.folder / name).write_text(text)
            self._git("add", "-A")
            self._git("commit", "-q", "-m", f"change {number}")
            self._git("tag", f"c{number}")
        self.repository = Repository(self.folder)
        self.tree = self.repository.worktree(folder / "tree", self.commit(0))
        self.asked: list[str] = []

    def _git(self, *words: str) -> None:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        subprocess.run(["git", "-C", self.folder, *identity, *words], check=True)

    def commit(self, number: int) -> Commit:
        return self.repository.commit(f"c{number}")

    def search(
        self,
        look: Callable[[Worktree], Run],
        good: int,
        bad: int,
        *,
        fix: bool = False,
        state: State | None = None,
        save: Callable[[State], None] = lambda _: None,
        runs: int = 3,
    ) -> Result:
        def try_once(commit: Commit, _: str) -> Run:
            self.asked.append(commit.subject)
            return look(self.tree)

        search = Search(
            self.repository,
            self.tree,
            good=self.commit(good),
            bad=self.commit(bad),
            fix=fix,
            try_once=try_once,
            state=state or State(QUESTION),
            save=save,
            runs=runs,
        )
        return search.run()


def content(tree: Worktree) -> Run:
    """The bug is the word "wrong" in a file."""
    return SHOWS if "wrong" in (tree.folder / "file").read_text() else GONE


def history(folder: Path, *words: str) -> History:
    return History(folder, [{"file": word} for word in words])


def test_the_first_bad_commit_is_found_and_proven(tmp_path: Path) -> None:
    made = History(
        tmp_path,
        [{"file": "right", "other": "a"}, {}, {}, {"other": "b"}, {"file": "wrong"}, {}, {}, {}],
    )
    result = made.search(content, 0, 7)
    assert result.culprit == made.commit(4)
    assert result.culprit.subject == "change 4"
    # Its revert conflicts in the file that each commit changes.
    assert result.proof is None
    assert f"# first bad commit: [{made.commit(4).id}] change 4" in result.log
    assert content(made.tree) is SHOWS, "the worktree is not as it was"


def test_a_revert_proves_the_culprit(tmp_path: Path) -> None:
    made = History(tmp_path, [{"file": "right"}, {}, {}, {}])
    (made.folder / "file").write_text("wrong")
    made._git("commit", "-q", "-a", "-m", "the culprit")
    made._git("rm", "-q", "number")
    made._git("commit", "-q", "-m", "later")
    made._git("tag", "c9")
    result = made.search(content, 0, 9)
    assert result.culprit is not None
    assert result.culprit.subject == "the culprit"
    assert result.proof == GONE
    assert made.asked[-1] == "later, with a revert"


def test_a_commit_that_is_not_the_only_cause_is_not_proven(tmp_path: Path) -> None:
    made = History(tmp_path, [{"file": "right", "twin": ""}, {}])
    (made.folder / "file").write_text("wrong")
    made._git("commit", "-q", "-a", "-m", "the culprit")
    (made.folder / "twin").write_text("wrong")
    made._git("commit", "-q", "-a", "-m", "another cause")
    made._git("tag", "c9")

    def either(tree: Worktree) -> Run:
        texts = [(tree.folder / name).read_text() for name in ("file", "twin")]
        return SHOWS if "wrong" in texts else GONE

    result = made.search(either, 0, 9)
    assert result.culprit is not None
    assert result.culprit.subject == "the culprit"
    assert result.proof is not None
    assert result.proof.outcome is Outcome.SHOWS


def test_the_first_fixed_commit(tmp_path: Path) -> None:
    made = history(tmp_path, "wrong", "wrong", "wrong", "right", "right")
    result = made.search(content, 4, 0, fix=True)
    assert result.culprit == made.commit(3)
    assert "first fixed commit" in result.log


def test_a_commit_that_does_not_build_is_left_out(tmp_path: Path) -> None:
    made = history(tmp_path, "right", "right", "broken", "wrong", "wrong", "wrong")

    def build(tree: Worktree) -> Run:
        if (tree.folder / "file").read_text() == "broken":
            raise ConfigError("it does not compile")
        return content(tree)

    saved: list[dict[str, Run]] = []
    result = made.search(build, 0, 5, save=lambda state: saved.append(dict(state.commits)))
    assert result.culprit is None
    assert {one.subject for one in result.suspects} == {"change 2", "change 3"}
    broken = saved[-1][made.commit(2).id]
    assert broken == Run(Outcome.UNKNOWN, reason="it does not compile")


def test_ends_that_are_not_what_they_are_said_to_be(tmp_path: Path) -> None:
    made = history(tmp_path, "right", "wrong", "right", "wrong")
    with pytest.raises(ConfigError, match=r'"change 2".* does not show the bug in 3 runs'):
        made.search(content, 0, 2)
    with pytest.raises(ConfigError, match=r'"change 1".* shows the bug, too: test: wrong'):
        made.search(content, 1, 3)
    with pytest.raises(ConfigError, match="is not in the history") as caught:
        made.search(content, 2, 1)
    assert "--fix" in str(caught.value.hint)
    with pytest.raises(ConfigError, match=r'"change 3".* cannot be judged: no boot'):
        made.search(lambda _: Run(Outcome.UNKNOWN, reason="no boot"), 0, 3)
    assert Counter(made.asked)["change 0"] == 0, "the good end was tried before the bad one"


def test_a_rare_bug_is_looked_for_more_often(tmp_path: Path) -> None:
    """A bug that shows in each third run of a commit that has it."""
    made = history(tmp_path, *["right"] * 4, *["wrong"] * 5)
    runs: Counter[str] = Counter()

    def flaky(tree: Worktree) -> Run:
        name = (tree.folder / "number").read_text()
        runs[name] += 1
        return content(tree) if runs[name] % 3 == 0 else GONE

    result = made.search(flaky, 0, 8, runs=6)
    assert result.culprit == made.commit(4)
    assert result.passes == runs_needed(2, 6, 0.05 / 6)
    assert runs["3"] == runs["0"] == result.passes
    assert runs["4"] == 3, "it showed at the third run"


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    made = history(tmp_path, *["right"] * 6, *["wrong"] * 6)
    file = tmp_path / "state.json"
    left = [7]

    def interrupted(tree: Worktree) -> Run:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return content(tree)

    def save(state: State) -> None:
        save_state(file, state)

    with pytest.raises(KeyboardInterrupt):
        made.search(interrupted, 0, 11, save=save)
    known = list(made.asked)
    made.asked.clear()
    tree = made.repository.worktree(tmp_path / "tree", made.commit(0))
    assert tree.folder == made.tree.folder
    result = made.search(content, 0, 11, state=load_state(file, QUESTION), save=save)
    assert result.culprit == made.commit(6)
    assert "change 11" not in made.asked, "the bad end was measured again"
    assert not set(made.asked) & set(known[:-1])


def test_a_state_of_something_else_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    state = State(QUESTION, 2, 3, "x", {"a": Run(Outcome.UNKNOWN, reason="r"), "b": SHOWS})
    save_state(file, state)
    assert load_state(file, QUESTION) == state
    assert load_state(file, {"good": "c1"}) == State({"good": "c1"})
    for damage in (b"", b"[]", b"{}", b'{"format": 1}', b"\xff", file.read_bytes()[:-9]):
        file.write_bytes(damage)
        assert load_state(file, QUESTION) == State(QUESTION)


def test_a_repository_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not in a git repository"):
        Repository(tmp_path)
    made = history(tmp_path, "right")
    for name in ("nowhere", "--all", "c0:file"):
        with pytest.raises(ConfigError, match=f"has no commit {name}"):
            made.repository.commit(name)
    made.repository.remove(made.tree.folder)
    assert not made.tree.folder.exists()


@pytest.mark.parametrize(("failures", "runs"), [(5, 5), (1, 1), (2, 5), (1, 10)])
def test_odds_by_their_definition(failures: int, runs: int) -> None:
    """The formula, against a sum over failure rates."""
    steps = 20_000
    rates = [(number + 0.5) / steps for number in range(steps)]
    likelihood = [rate**failures * (1 - rate) ** (runs - failures) for rate in rates]
    always = float(failures == runs)
    total = always + sum(likelihood) / steps
    for passes in (1, 2, 5):
        pairs = zip(rates, likelihood, strict=True)
        summed = sum(weight * (1 - rate) ** passes for rate, weight in pairs) / steps
        if failures < runs:
            total = sum(likelihood) / steps
        assert missed(failures, runs, passes) == pytest.approx(summed / total, rel=1e-3)
    passes = runs_needed(failures, runs, 0.01)
    assert missed(failures, runs, passes) <= 0.01 < missed(failures, runs, passes - 1)
