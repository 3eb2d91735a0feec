# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that a call in the guest returned only after its data were synced on the host.

Data stored before a call that promises durability must be synced when it returns: a sync of the
backing file must have begun after the store and ended before the call. It may be the sync of
another thread. The two clocks are compared by exchanging times through memory of a DIMM that guest
and host have both mapped.
"""

from __future__ import annotations

import bisect
import mmap
import os
import shlex
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paprscm.errors import ContractError, HostError
from paprscm.flush.load import DurableCall
from paprscm.guest.guest import Guest
from paprscm.guest.report import Natural, ProbeError, ToolReport, read_report
from paprscm.guest.tools import install_tool
from paprscm.pmem.namespaces import CharacterDevice, file_offset
from paprscm.pmem.regions import Region
from paprscm.vm.sync_shim import Record

_ROUNDS = 300
# The comparison itself is accurate to less than 1 us. Over minutes the clocks may drift by more:
# the guest's kernel rounds the factor between timebase and ns.
_DRIFT_NS = 50_000


@dataclass(frozen=True)
class ClockOffset:
    """Offset from the guest's CLOCK_MONOTONIC_RAW to the host's monotonic time.

    Attributes:
        low_ns, high_ns: lower and upper bound, ns.
    """

    low_ns: int
    high_ns: int

    @property
    def width_ns(self) -> int:
        """Uncertainty of the offset, ns."""
        return self.high_ns - self.low_ns

    def narrowed(self, other: ClockOffset) -> ClockOffset:
        """Combine two comparisons.

        Raises:
            HostError: they contradict each other: a clock was set in between.
        """
        both = ClockOffset(max(self.low_ns, other.low_ns), min(self.high_ns, other.high_ns))
        if both.width_ns < 0:
            raise HostError(f"the guest's clock and the host's drift: {self}, later {other}")
        return both


class _ClockReport(ToolReport, frozen=True, kw_only=True):
    """For each round: the guest's time before, the host's time, the guest's time after, ns."""

    tool: Literal["flush"]
    verb: Literal["clock"]
    rounds: tuple[tuple[Natural, Natural, Natural], ...]


def compare_clocks(guest: Guest, region: Region, device: CharacterDevice) -> ClockOffset:
    """Compare the guest's clock with the host's, 300 times in one round trip.

    Args:
        guest: the guest.
        region: region of a DIMM with share=on.
        device: a devdax device on it; its first words are overwritten.

    Raises:
        ProbeError: the report of the program in the guest is invalid.
        HostError: the times contradict each other, so the device is not on that DIMM.
    """
    begin = file_offset(guest, region, device)
    command = [str(install_tool(guest, "flush")), "clock", f"--rounds={_ROUNDS}", device.path]
    with _TimeServer(guest.file(region.slot), begin):
        result = guest.run(shlex.join(command))
    rounds = read_report(_ClockReport, result.stdout, result.status, result.stderr).rounds
    if len(rounds) != _ROUNDS:
        raise ProbeError(f"flush reports {len(rounds)} rounds, not {_ROUNDS}")
    offset = ClockOffset(
        max(host - end for _begin, host, end in rounds),
        min(host - begin for begin, host, _end in rounds),
    )
    if offset.width_ns < 0:
        raise HostError(f"the guest's clock and the host's cannot be compared: {offset}")
    return ClockOffset(offset.low_ns - _DRIFT_NS, offset.high_ns + _DRIFT_NS)


def expect_durable(
    calls: Iterable[DurableCall], syncs: Iterable[Record], offset: ClockOffset
) -> None:
    """Assert that the data of each successful call were synced before it returned.

    The uncertainty of the offset counts in favour of the guest.

    Args:
        calls: calls on targets of one DIMM.
        syncs: syncs of its backing file.
        offset: offset between the two clocks.

    Raises:
        ContractError: calls returned too early; with their number and the worst one.
    """
    successful = [call for call in calls if not call.errno]
    synced = sorted(
        (sync.begin_ns, sync.end_ns)
        for sync in syncs
        if sync.end_ns is not None and sync.result == 0
    )
    begins = [begin for begin, _end in synced]
    earliest = _earliest_ends(synced)
    early: list[tuple[int, DurableCall]] = []
    for call in successful:
        place = bisect.bisect_left(begins, call.begin_ns + offset.low_ns)
        late_ns = earliest[place] - (call.end_ns + offset.high_ns)
        if late_ns > 0:
            early.append((late_ns, call))
    if early:
        late_ns, worst = max(early, key=lambda pair: pair[0])
        when = f"{late_ns / 1e6:.3f} ms too late" if late_ns < _NEVER // 2 else "never"
        raise ContractError(
            f"{len(early)} of {len(successful)} calls returned before their data were synced; "
            f"the worst, {worst.operation} of thread {worst.thread}, returned after "
            f"{worst.duration_s * 1000:.3f} ms, and the first sync that began after the store "
            f"ended {when}"
        )


_NEVER = 1 << 62


def _earliest_ends(synced: Sequence[tuple[int, int]]) -> list[int]:
    """For each index, the earliest end among the syncs from it on; _NEVER after the last."""
    earliest = [_NEVER]
    for _begin, end in reversed(synced):
        earliest.append(min(end, earliest[-1]))
    return earliest[::-1]


class _TimeServer:
    """Thread that answers the time requests of guest_tools/flush.c."""

    def __init__(self, file: Path, begin: int) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._answer, args=(file, begin), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _answer(self, file: Path, begin: int) -> None:
        handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(handle, mmap.PAGESIZE, offset=begin)
        finally:
            os.close(handle)
        with memory, memoryview(memory) as raw, raw.cast("Q") as words:
            request = words[0]
            while not self._stop.is_set():
                if words[0] == request:
                    continue
                # The request's number goes last: it marks the time as valid.
                request = words[0]
                words[2] = time.monotonic_ns()
                words[1] = request
