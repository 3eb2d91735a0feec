# SPDX-License-Identifier: GPL-2.0-or-later
"""The same flushes, counted in the guest's driver, at its hypervisor calls, and on the host."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from paprscm.errors import ContractError
from paprscm.flush.trace import FlushTrace, TracedFlush, TraceReading
from paprscm.guest.guest import Guest
from paprscm.papr import drc_index
from paprscm.vm.sync_shim import Operation


@dataclass(frozen=True)
class Account:
    """Totals between two moments at which no flush was in progress.

    Attributes:
        flushes: of each slot.
        syncs: of each slot's backing file, by the operation that the host was asked for.
    """

    flushes: Mapping[int, tuple[TracedFlush, ...]]
    syncs: Mapping[int, Mapping[Operation, int]]

    @property
    def count(self) -> int:
        """Number of flushes, of all slots."""
        return sum(map(len, self.flushes.values()))

    @property
    def calls(self) -> int:
        """Number of hcalls that they took."""
        return sum(len(flush.calls) for made in self.flushes.values() for flush in made)

    def all(self) -> tuple[TracedFlush, ...]:
        """The flushes of all slots, by slot."""
        return tuple(flush for made in self.flushes.values() for flush in made)

    def expect(
        self, flushes: Mapping[int, int], operation: Operation = Operation.FDATASYNC
    ) -> None:
        """Assert how many there were of each slot, and that each was one sync by `operation`.

        Args:
            flushes: how many of each slot that has any.
            operation: what the host must have been asked for.

        Raises:
            ContractError: with all counts.
        """
        found = {slot: len(made) for slot, made in self.flushes.items() if made}
        synced = {slot: dict(counts) for slot, counts in self.syncs.items() if counts}
        wanted = {slot: {operation: count} for slot, count in flushes.items() if count}
        if found != {slot: count for slot, count in flushes.items() if count}:
            raise ContractError(
                f"flushes by slot: {found}, expected {dict(flushes)}; synced: {_in_words(synced)}"
            )
        if synced != wanted:
            raise ContractError(f"synced: {_in_words(synced)}, expected {_in_words(wanted)}")


class FlushAccounts:
    """Three counts of the same thing, which must agree.

    A flush is: one call of papr_scm_pmem_flush; one H_SCM_FLUSH with token 0, and polls until its
    end; one sync of the backing file. The hypervisor calls are counted twice, see flush_trace.

    Args:
        guest: with a flush shim in its QEMU.
        slots: of all its DIMMs.

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
            limit_s: for how long the counts may differ, because something is under way, s.

        Raises:
            ContractError: they still differ; with all of them.
        """
        deadline = time.monotonic() + limit_s
        while True:
            reading = self.trace.read()
            self._flushes += reading.flushes
            syncs = self._syncs()
            if self._agree(reading, syncs):
                break
            if time.monotonic() > deadline:
                raise ContractError(f"the counts differ: {self._words(reading, syncs)}")
            time.sleep(0.05)
        by_drc = {drc_index(slot): slot for slot in self._slots}
        flushes: dict[int, list[TracedFlush]] = {slot: [] for slot in self._slots}
        for flush in self._flushes:
            if flush.drc not in by_drc:
                raise ContractError(f"a flush of drc {flush.drc:#x}, which no DIMM has")
            flushes[by_drc[flush.drc]].append(flush)
        self._flushes = []
        account = Account(
            {slot: tuple(made) for slot, made in flushes.items()},
            {slot: _difference(syncs[slot], self._before[slot]) for slot in self._slots},
        )
        synced = {slot: sum(account.syncs[slot].values()) for slot in self._slots}
        if synced != {slot: len(made) for slot, made in flushes.items()}:
            raise ContractError(
                f"flushes by slot: { {s: len(f) for s, f in flushes.items()} }, "
                f"syncs: {_in_words(account.syncs)}"
            )
        self._before = syncs
        return account

    def _agree(self, reading: TraceReading, syncs: Mapping[int, Mapping[Operation, int]]) -> bool:
        first, calls = reading.traced
        under_way = any(
            self._guest.vm.syncs(slot).counts().begun != sum(syncs[slot].values())
            for slot in self._slots
        )
        return (
            not under_way
            and reading.entered == first == reading.ended == self._total(syncs)
            and calls == reading.hcalls
        )

    def _total(self, syncs: Mapping[int, Mapping[Operation, int]]) -> int:
        return _sum(syncs) - self._base

    def _syncs(self) -> dict[int, dict[Operation, int]]:
        """The syncs that ended so far."""
        return {
            slot: {op: self._guest.vm.syncs(slot).counts(op).ended for op in Operation}
            for slot in self._slots
        }

    def _words(self, reading: TraceReading, syncs: Mapping[int, Mapping[Operation, int]]) -> str:
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
