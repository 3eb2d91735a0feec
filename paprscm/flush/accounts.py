# SPDX-License-Identifier: GPL-2.0-or-later
"""Flushes counted in the guest's driver, at its hypervisor calls, and on the host."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from paprscm import timesheet
from paprscm.errors import ContractError
from paprscm.flush.trace import FlushTrace, TracedFlush, TraceReading
from paprscm.guest.guest import Guest
from paprscm.papr import drc_index
from paprscm.vm.shim_layout import FLUSHES, Operation


@dataclass(frozen=True)
class Account:
    """Totals between two moments without a flush in progress.

    Attributes:
        flushes: flushes of each slot.
        syncs: number of syncs of each slot's backing file, by operation.
    """

    flushes: Mapping[int, tuple[TracedFlush, ...]]
    syncs: Mapping[int, Mapping[Operation, int]]

    @property
    def count(self) -> int:
        """Number of flushes, of all slots."""
        return sum(map(len, self.flushes.values()))

    @property
    def calls(self) -> int:
        """Number of H_SCM_FLUSH calls of these flushes."""
        return sum(len(flush.calls) for flushes in self.flushes.values() for flush in flushes)

    def all(self) -> tuple[TracedFlush, ...]:
        """The flushes of all slots, by slot."""
        return tuple(flush for flushes in self.flushes.values() for flush in flushes)

    def expect(
        self, flushes: Mapping[int, int], operation: Operation = Operation.FDATASYNC
    ) -> None:
        """Assert the number of flushes of each slot, and that each was one sync by `operation`.

        Args:
            flushes: expected number of each slot that has any.
            operation: expected operation on the host.

        Raises:
            ContractError: the numbers differ; with all counts.
        """
        observed = {slot: len(ended) for slot, ended in self.flushes.items() if ended}
        synced = {slot: dict(counts) for slot, counts in self.syncs.items() if counts}
        expected = {slot: {operation: count} for slot, count in flushes.items() if count}
        if observed != {slot: count for slot, count in flushes.items() if count}:
            raise ContractError(
                f"flushes by slot: {observed}, expected {dict(flushes)}; "
                f"synced: {_in_words(synced)}"
            )
        if synced != expected:
            raise ContractError(f"synced: {_in_words(synced)}, expected {_in_words(expected)}")


class FlushAccounts:
    """Three counts of the same flushes, which must agree.

    A flush is one call of papr_scm_pmem_flush, one H_SCM_FLUSH with token 0 and polls until its
    end, and one sync of the backing file. The hypervisor calls are counted twice, see trace.py.

    Args:
        guest: a guest with a flush shim in its QEMU.
        slots: slots of all its DIMMs.

    Raises:
        CapabilityError: its kernel cannot be probed.
    """

    def __init__(self, guest: Guest, slots: Collection[int]) -> None:
        self._guest = guest
        self._slots = tuple(slots)
        self._before = self._syncs()
        self._base = _sum(self._before)
        self.trace = FlushTrace(guest)
        self._flushes: list[TracedFlush] = []

    def take(self, *, limit_s: float = 5.0) -> Account:
        """Return the totals since the last call.

        Args:
            limit_s: time for the counts to agree, because flushes may be in progress, s.

        Raises:
            ContractError: the counts still differ; with all counts.
        """
        deadline = time.monotonic() + limit_s
        while True:
            reading = self.trace.read()
            self._flushes += reading.flushes
            syncs = self._syncs()
            if self._agree(reading, syncs):
                break
            if time.monotonic() > deadline:
                raise ContractError(f"the counts differ: {self._counts(reading, syncs)}")
            # The guest's trace and the shim count at different moments of a flush.
            timesheet.pause(0.05)
        by_drc = {drc_index(slot): slot for slot in self._slots}
        flushes: dict[int, list[TracedFlush]] = {slot: [] for slot in self._slots}
        for flush in self._flushes:
            if flush.drc not in by_drc:
                raise ContractError(f"a flush of drc {flush.drc:#x}, which is not a DIMM's")
            flushes[by_drc[flush.drc]].append(flush)
        self._flushes = []
        account = Account(
            {slot: tuple(ended) for slot, ended in flushes.items()},
            {slot: _difference(syncs[slot], self._before[slot]) for slot in self._slots},
        )
        synced = {slot: sum(account.syncs[slot].values()) for slot in self._slots}
        if synced != {slot: len(ended) for slot, ended in flushes.items()}:
            raise ContractError(
                f"flushes by slot: { {s: len(f) for s, f in flushes.items()} }, "
                f"syncs: {_in_words(account.syncs)}"
            )
        self._before = syncs
        return account

    def _agree(self, reading: TraceReading, syncs: Mapping[int, Mapping[Operation, int]]) -> bool:
        first, calls = reading.traced
        in_progress = any(
            self._guest.vm.syncs(slot).counts().begun != sum(syncs[slot].values())
            for slot in self._slots
        )
        return (
            not in_progress
            and reading.entered == first == reading.ended == self._total(syncs)
            and calls == reading.hcalls
        )

    def _total(self, syncs: Mapping[int, Mapping[Operation, int]]) -> int:
        return _sum(syncs) - self._base

    def _syncs(self) -> dict[int, dict[Operation, int]]:
        """Number of ended syncs of each slot, by operation."""
        return {
            slot: {op: self._guest.vm.syncs(slot).counts(op).ended for op in FLUSHES}
            for slot in self._slots
        }

    def _counts(self, reading: TraceReading, syncs: Mapping[int, Mapping[Operation, int]]) -> str:
        first, calls = reading.traced
        return (
            f"papr_scm_pmem_flush was called {reading.entered} times; H_SCM_FLUSH began "
            f"{first} flushes and ended {reading.ended}, in {calls} calls, of which HCALL_STATS "
            f"counted {reading.hcalls}; the host synced {self._total(syncs)} times"
        )


def _sum(syncs: Mapping[int, Mapping[Operation, int]]) -> int:
    return sum(sum(counts.values()) for counts in syncs.values())


def _difference(
    now: Mapping[Operation, int], before: Mapping[Operation, int]
) -> dict[Operation, int]:
    return {op: count - before[op] for op, count in now.items() if count != before[op]}


def _in_words(syncs: Mapping[int, Mapping[Operation, int]]) -> str:
    words = [
        f"slot {slot} {count} by {operation.name.lower()}"
        for slot, counts in syncs.items()
        for operation, count in counts.items()
    ]
    return ", ".join(words) or "none"
