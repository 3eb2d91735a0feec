# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of hcalls with migrations between them; see hcall/sequences.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from paprscm.errors import ContractError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.judge import ScmJudge
from paprscm.hcall.sequences import FLUSHED, Control, Make, SequenceRunner, steps
from paprscm.migration.handover import Handover, hand_over
from paprscm.papr import Hcall


class Migrate(NamedTuple):
    """A migration to a new QEMU.

    Attributes:
        held: slots whose syncs are held on the destination from the start.
        failing: slots whose syncs fail there.
    """

    held: frozenset[int]
    failing: frozenset[int]


_slots = st.frozensets(st.sampled_from(FLUSHED))
_migrations = st.builds(Migrate, _slots, _slots)
_flushes = st.builds(
    Make, st.just(Hcall.H_SCM_FLUSH), st.sampled_from(FLUSHED), st.tuples(st.just(0))
)
_holds = st.builds(Control, st.just("hold"), st.sampled_from(FLUSHED))
# Flushes and holds, so that most migrations have pending flushes.
_segments = st.lists(
    st.integers(0, 9).flatmap(lambda n: _flushes if n < 3 else _holds if n < 5 else steps),
    min_size=5,
    max_size=25,
)
histories = st.lists(
    st.one_of(_segments, st.builds(lambda part, end: [*part, end], _segments, _migrations)),
    min_size=1,
    max_size=5,
)
"""Sequences with migrations between them."""


class MigratingRunner(SequenceRunner):
    """Runs sequences with migrations.

    Args:
        start: starts a machine with the DIMMs; returns its judge.
        follow: starts the destination of a machine, with a shim.

    Attributes:
        pending, completed: number of flushes that were migrated so far.
        migrations: number of migrations.
    """

    def __init__(
        self, start: Callable[[], ScmJudge], follow: Callable[[BareMachine], BareMachine]
    ) -> None:
        super().__init__(start)
        self._follow = follow
        self._last: Handover | None = None
        self.pending = self.completed = self.migrations = 0

    def run(self, sequence: Sequence[Any]) -> None:
        """Run one sequence, and compare the syncs of the last machine."""
        super().run(sequence)
        if self._last is not None and (wrong := self._last.compare_syncs()):
            raise ContractError("; ".join(wrong))

    def control(self, step: Any) -> None:
        """Apply an action to the machine and to the model."""
        if isinstance(step, Control):
            super().control(step)
            return
        source = self.judge.bare
        self.done.append(
            f"migrate: held {sorted(step.held)}, failing {sorted(step.failing)} on the destination"
        )
        destination = self._follow(source)
        self._last = hand_over(self.judge, destination, held=step.held, failing=step.failing)
        self.judge = self._last.judge
        source.close()
        self.migrations += 1
        self.pending += self._last.pending
        self.completed += self._last.completed

    def _recover(self) -> None:
        # Not a reset: QEMU waits there for flushes that may never end.
        self.hcalls += self.judge.calls
        self.judge.bare.close()
        self.judge, self._last = self._start(), None
