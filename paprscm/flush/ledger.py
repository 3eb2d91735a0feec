# SPDX-License-Identifier: GPL-2.0-or-later
"""Flushes of a guest that migrates, and the syncs of all its QEMUs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

from paprscm.flush.trace import FlushTrace, TracedFlush, TraceReading
from paprscm.guest.guest import Guest
from paprscm.papr import drc_index
from paprscm.vm.shim_layout import Operation
from paprscm.vm.vm import Vm


class FlushLedger:
    """Flushes in the guest, and syncs of all QEMUs that it has had.

    Args:
        guest: the guest.
        slots: slots of its DIMMs.
        threads: largest number of concurrent flushes of a DIMM.

    Attributes:
        repeated: number of syncs of each slot that a destination repeated: bounds before settle()
            has counted them.
    """

    def __init__(self, guest: Guest, slots: Iterable[int], *, threads: int) -> None:
        self._slots = tuple(slots)
        self._threads = threads
        self._vms = [guest.vm]
        self._base = self._begun()
        self._trace = FlushTrace(guest)
        self.flushes: list[TracedFlush] = []
        self.repeated = dict.fromkeys(self._slots, (0, 0))

    def add(
        self, source: Vm, destination: Vm, pending: Mapping[int, int] | None, held: int | None
    ) -> None:
        """Add a migration, which repeats syncs of pending flushes.

        Args:
            source, destination: the two QEMUs.
            pending: pending flushes of each slot in the stream; None: unknown.
            held: slot whose syncs did not end before it.
        """
        self._vms.append(destination)
        for slot in self._slots:
            counts = source.syncs(slot).counts(Operation.FDATASYNC)
            # A sync that has ended may have been pending when the source stopped, and that of a
            # pending flush may not have begun.
            low = counts.begun - counts.ended
            high = self._threads if pending is None else pending.get(slot, 0)
            if slot == held:
                high = low
            before = self.repeated[slot]
            self.repeated[slot] = before[0] + low, before[1] + high

    def settle(self) -> dict[int, int]:
        """Return the number of syncs of each slot beyond one for each flush."""
        syncs, flushed = self.syncs(), self.flushed()
        extra = {slot: syncs[slot] - flushed[slot] for slot in self._slots}
        self.repeated = {slot: (count, count) for slot, count in extra.items()}
        return extra

    def read(self) -> TraceReading:
        """Read the guest's trace."""
        reading = self._trace.read()
        self.flushes += reading.flushes
        return reading

    def syncs(self) -> dict[int, int]:
        """Syncs of each slot so far, by all QEMUs."""
        begun = self._begun()
        return {slot: begun[slot] - self._base[slot] for slot in self._slots}

    def flushed(self) -> dict[int, int]:
        """Flushes of each slot so far that have ended."""
        by_drc = Counter(flush.drc for flush in self.flushes)
        return {slot: by_drc[drc_index(slot)] for slot in self._slots}

    def _begun(self) -> Counter[int]:
        total: Counter[int] = Counter()
        for vm, slot in itertools.product(self._vms, self._slots):
            total[slot] += vm.syncs(slot).counts(Operation.FDATASYNC).begun
        return total
