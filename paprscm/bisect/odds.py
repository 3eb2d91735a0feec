# SPDX-License-Identifier: GPL-2.0-or-later
"""Number of runs after which a commit without a failure counts as one without the bug."""

from __future__ import annotations


def missed(failures: int, runs: int, passes: int) -> float:
    """Probability that a commit with the bug passes a number of runs in a row.

    The failure rate p is known from runs with the bug. Before them, half of all bugs are taken to
    fail in every run, and the rate of the others to be anywhere between 0 and 1 with equal
    probability. If all runs have failed, p = 1 has the probability 1 - 1/(runs + 2) after them;
    otherwise p has a beta distribution with the parameters failures + 1 and runs - failures + 1.

    Args:
        failures: number of failed runs with the bug, at least 1.
        runs: number of runs with it.
        passes: number of runs in a row.
    """
    result = 1 / (runs + 2) if failures == runs else 1.0
    for done in range(passes):
        result *= (runs - failures + 1 + done) / (runs + 2 + done)
    return result


def runs_needed(failures: int, runs: int, error: float) -> int:
    """The smallest number of passes with which `missed` is at most `error`.

    Args:
        failures, runs: as for missed().
        error: a probability above 0.
    """
    passes = 1
    while missed(failures, runs, passes) > error:
        passes += 1
    return passes
