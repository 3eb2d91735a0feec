# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether what a call in the guest promised was true when it returned, by the host's own times.

What was stored before a call that promises durability must be synced when it returns: there must
be a sync of the backing file that began after the data were stored, and ended well before the call
did. That it is another thread's does not matter. The two clocks are compared by exchanging times
through memory of a DIMM that guest and host have both mapped.
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
from paprscm.guest.tools import compile_tool
from paprscm.pmem.namespaces import CharacterDevice, file_offset
from paprscm.pmem.regions import Region
from paprscm.vm.sync_shim import Record

_ROUNDS = 300
# The comparison itself is good to less than 1 us. Over minutes the two may drift apart by more: the
# guest's kernel rounds the factor by which it multiplies its timebase.
_DRIFT_NS = 50_000


@dataclass(frozen=True)
class ClockOffset:
    """Offset from the guest's CLOCK_MONOTONIC_RAW to the host's monotonic time.

    Attributes:
        low_ns, high_ns: it lies between these two, ns.
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
            HostError: they contradict each other: a clock was changed in between.
        """
        both = ClockOffset(max(self.low_ns, other.low_ns), min(self.high_ns, other.high_ns))
        if both.width_ns < 0:
            raise HostError(f"the guest's clock and the host's drift: {self}, later {other}")
        return both


class _ClockReport(ToolReport, frozen=True, kw_only=True):
    """In each round the guest's time before, the host's, and the guest's afterwards, ns."""

    tool: Literal["flush"]
    verb: Literal["clock"]
    rounds: tuple[tuple[Natural, Natural, Natural], ...]


def compare_clocks(guest: Guest, region: Region, device: CharacterDevice) -> ClockOffset:
    """Compare the guest's clock with the host's, some hundred times in one round trip.

    Args:
        guest: where.
        region: of a DIMM with share=on.
        device: a DAX device on it; its first words are overwritten.

    Raises:
        ProbeError: the program in the guest gave no report that can be believed.
        HostError: it can hardly be the memory of that DIMM.
    """
    begin = file_offset(guest, region, device)
    command = [str(compile_tool(guest, "flush")), "clock", f"--rounds={_ROUNDS}", device.path]
    with _Answers(guest.file(region.slot), begin):
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
    """Assert that each call that succeeded was right to say so.

    As far as the offset is not known, it is taken as is best for the guest.

    Args:
        calls: on what is on one DIMM.
        syncs: of its backing file.
        offset: between the two clocks.

    Raises:
        ContractError: how many were wrong, and the worst.
    """
    made = [call for call in calls if not call.errno]
    good = sorted(
        (sync.begin_ns, sync.end_ns)
        for sync in syncs
        if sync.end_ns is not None and sync.result == 0
    )
    begins = [begin for begin, _end in good]
    earliest = _earliest_ends(good)
    wrong: list[tuple[int, DurableCall]] = []
    for call in made:
        place = bisect.bisect_left(begins, call.begin_ns + offset.low_ns)
        late_ns = earliest[place] - (call.end_ns + offset.high_ns)
        if late_ns > 0:
            wrong.append((late_ns, call))
    if wrong:
        late_ns, worst = max(wrong, key=lambda pair: pair[0])
        when = f"{late_ns / 1e6:.3f} ms too late" if late_ns < _NEVER // 2 else "never"
        raise ContractError(
            f"{len(wrong)} of {len(made)} calls returned before what was stored had been synced; "
            f"the worst, {worst.operation} of thread {worst.thread}, returned after "
            f"{worst.duration_s * 1000:.3f} ms, and the first sync that began after the store "
            f"ended {when}"
        )


_NEVER = 1 << 62


def _earliest_ends(good: Sequence[tuple[int, int]]) -> list[int]:
    """Of the syncs from each place on, when the first ends; behind the last, never."""
    earliest = [_NEVER]
    for _begin, end in reversed(good):
        earliest.append(min(end, earliest[-1]))
    return earliest[::-1]


class _Answers:
    """Answers guest_tools/flush.c's questions for the time, in a thread of its own."""

    def __init__(self, file: Path, begin: int) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, args=(file, begin), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _answer(self, file: Path, begin: int) -> None:
        handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(handle, mmap.PAGESIZE, offset=begin)
        finally:
            os.close(handle)
        with memory, memoryview(memory) as raw, raw.cast("Q") as words:
            seen = words[0]
            while not self._over.is_set():
                if words[0] == seen:
                    continue
                # The number goes last: it tells that the time is there.
                seen = words[0]
                words[2] = time.monotonic_ns()
                words[1] = seen
