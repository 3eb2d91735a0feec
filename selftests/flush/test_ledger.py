# SPDX-License-Identifier: GPL-2.0-or-later
"""Flushes of a guest that migrates, compared with the syncs of made-up QEMUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from paprscm.flush.ledger import FlushLedger
from paprscm.papr import drc_index
from paprscm.vm.sync_shim import Counts

SLOT = 3


class FakeVm:
    """A QEMU with counts of one DIMM's file."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def syncs(self, slot: int) -> Any:
        assert slot == SLOT
        return SimpleNamespace(counts=lambda _operation: Counts(self.begun, self.ended, 0, 0))


@pytest.fixture
def source() -> FakeVm:
    return FakeVm()


@pytest.fixture
def ledger(source: FakeVm, monkeypatch: pytest.MonkeyPatch) -> FlushLedger:
    monkeypatch.setattr("paprscm.flush.ledger.FlushTrace", lambda _guest: None)
    guest: Any = SimpleNamespace(vm=source)
    source.begun = source.ended = 7  # before the ledger was opened
    return FlushLedger(guest, [SLOT], threads=4)


def migrate(
    ledger: FlushLedger, source: FakeVm, pending: int | None, held: int | None
) -> tuple[tuple[int, int], FakeVm]:
    """Migrate with 10 syncs of which 3 did not end; return the bounds and the destination."""
    source.begun, source.ended = source.begun + 10, source.ended + 7
    destination: Any = FakeVm()
    origin: Any = source
    sent = None if pending is None else {SLOT: pending}
    ledger.add(origin, destination, sent, held)
    return ledger.repeated[SLOT], destination


@pytest.mark.parametrize(
    ("pending", "held", "bounds"),
    [
        (None, None, (3, 4)),
        (5, None, (3, 5)),
        (5, SLOT, (3, 3)),
        (None, SLOT, (3, 3)),
    ],
)
def test_bounds_of_repeated_syncs(
    ledger: FlushLedger,
    source: FakeVm,
    pending: int | None,
    held: int | None,
    bounds: tuple[int, int],
) -> None:
    assert migrate(ledger, source, pending, held)[0] == bounds


def test_repeated_syncs_are_counted_over_all_qemus(ledger: FlushLedger, source: FakeVm) -> None:
    _bounds, destination = migrate(ledger, source, None, None)
    destination.begun = destination.ended = 5
    ended: Any = [SimpleNamespace(drc=drc_index(SLOT))] * 11
    ledger.flushes += ended
    assert (ledger.syncs(), ledger.flushed()) == ({SLOT: 15}, {SLOT: 11})
    assert ledger.settle() == {SLOT: 4}
    assert migrate(ledger, destination, None, SLOT)[0] == (4 + 3, 4 + 3)
