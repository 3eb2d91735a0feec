# SPDX-License-Identifier: GPL-2.0-or-later
"""Record QEMU's syncs of DIMM backing files, and inject delays, errors and hangs.

A small library (host_tools/flush_shim.c) is preloaded into QEMU only. It records each fdatasync,
fsync, msync and pmem_persist on a watched file in memory that it shares with this process, and
delays, fails or holds the call according to the rule in that memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from paprscm import timesheet
from paprscm.debian.toolchain import compile_c
from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.host.cache import Cache
from paprscm.paths import HOST_TOOLS
from paprscm.vm.shim_layout import (
    FILES,
    FLUSHES,
    MAGIC,
    PAGE,
    RECORDS,
    RULE,
    Injected,
    Operation,
    describe,
)

_SOURCES = (HOST_TOOLS / "flush_shim.c", HOST_TOOLS / "store_log.c")
_HEADERS = (HOST_TOOLS / "store_log.h",)
_FLAGS = "-std=gnu11 -O2 -Wall -Wextra -Werror -shared -fPIC -fvisibility=hidden -pthread"
# Time limit for the library to fill in a record that it has claimed, s; takes < 1 µs of CPU time.
_FILL_LIMIT_S = 0.1
_UINT32_MAX = (1 << 32) - 1


FALLIBLE = (Operation.FDATASYNC, Operation.FSYNC, Operation.MSYNC)
"""Calls that can fail; pmem_persist returns nothing."""


def build(cache: Cache) -> Path:
    """Compile the library with the host's C compiler unless the cache has it; return its path.

    Raises:
        HostError: there is no C compiler, or it rejects the source.
    """
    layout, _digest = describe()
    return compile_c(
        cache,
        "flush-shim",
        _SOURCES,
        compiler="cc",
        flags=_FLAGS,
        headers={
            "flush_shim_layout.inc": layout,
            **{header.name: header.read_text() for header in _HEADERS},
        },
    )


@dataclass(frozen=True)
class Record:
    """One call on a watched file.

    Attributes:
        number: from 0, in the order in which the calls began.
        path: the file, under the name passed to watch().
        operation: the call.
        begin_ns: time of the call, comparable with time.monotonic_ns().
        end_ns: time of its return; None: in progress.
        result: 0 or the errno; None: in progress.
        injected: the faults that were injected.
        delay_s: injected delay, s.
        thread: kernel id (TID) of the calling thread.
        start, end: the bytes of the file that the call covers; fdatasync and fsync cover it all,
            with `end` 2^63 - 1.
    """

    number: int
    path: Path
    operation: Operation
    begin_ns: int
    end_ns: int | None
    result: int | None
    injected: Injected
    delay_s: float
    thread: int
    start: int
    end: int

    @property
    def duration_s(self) -> float | None:
        """Duration of the call, s; None while it is in progress."""
        return None if self.end_ns is None else (self.end_ns - self.begin_ns) / 1e9


@dataclass(frozen=True)
class Counts:
    """Calls begun, ended and failed so far, and the maximum that were in progress concurrently."""

    begun: int
    ended: int
    failed: int
    most_in_flight: int


class Shim:
    """Memory shared with the library in one QEMU; each QEMU needs its own.

    As a context manager it clears all rules on exit; records stay readable.

    Args:
        library: the path that build() returned.
        before: capabilities.sanitizers() of the QEMU.
        seed: seed of the random delays, which makes them repeatable.
        log: a file to which the contents of all watched files are logged (host_tools/store_log.h);
            None: no log.

    Attributes:
        log: as the argument.
    """

    def __init__(
        self,
        library: Path,
        *,
        before: Sequence[str] = (),
        seed: int = 0,
        log: Path | None = None,
    ) -> None:
        self._library = library
        # LD_PRELOAD cannot contain every path (ld.so(8): " :$"), and a library on a noexec mount
        # cannot be loaded.
        self._copy = os.memfd_create("flush_shim.so")
        os.write(self._copy, library.read_bytes())
        self._preload = ":".join((*before, f"/proc/{os.getpid()}/fd/{self._copy}"))
        self._handle = os.memfd_create("paprscm-shim")
        os.ftruncate(self._handle, ctypes.sizeof(PAGE))
        # Its fields are aligned, so each access is atomic.
        self._page = PAGE.from_buffer(mmap.mmap(self._handle, ctypes.sizeof(PAGE)))
        self._page.magic, self._page.layout, self._page.seed = MAGIC, describe()[1], seed
        self._files: list[WatchedFile] = []
        self._handles = [self._handle, self._copy]
        self.log = log
        self._log_handle: int | None = None
        if log is not None:
            self._log_handle = os.open(
                log, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
            )
            self._handles.append(self._log_handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._files:
            file.clear()
        while self._handles:
            os.close(self._handles.pop())

    def prefix(self, *, inherits: bool = True) -> tuple[str, ...]:
        """Return command-line words before QEMU's own that preload the library into QEMU only.

        Args:
            inherits: QEMU inherits pass_fds.
        """
        env = shutil.which("env") or "/usr/bin/env"
        place = "" if inherits else f"/proc/{os.getpid()}/fd/"
        words = [env, f"LD_PRELOAD={self._preload}", f"PAPRSCM_SHIM={place}{self._handle}"]
        if self._log_handle is not None:
            words.append(f"PAPRSCM_STORE_LOG={place}{self._log_handle}")
        return tuple(words)

    @property
    def pass_fds(self) -> tuple[int, ...]:
        """Descriptors that QEMU must inherit under the same numbers."""
        return tuple(h for h in (self._handle, self._log_handle) if h is not None)

    @property
    def loaded(self) -> int | None:
        """Pid of the process that has loaded the library; None: not loaded yet."""
        pid: int = self._page.loaded
        return pid if pid > 0 else None

    def require_loaded(self, timeout_s: float = 5.0) -> int:
        """Wait until QEMU has loaded the library, which happens before main(); return its pid.

        Raises:
            CapabilityError: the library was not loaded within `timeout_s`.
            HostError: the library was built from another source.
        """
        if not _until(lambda: self._page.loaded != 0, timeout_s):
            raise CapabilityError(
                f"QEMU did not load the flush shim within {timeout_s:g} s",
                hint="start it with prefix() and pass_fds; a static program cannot load it",
            )
        if self.loaded is None:
            raise HostError(f"{self._library} does not match paprscm/vm/sync_shim.py")
        return self.loaded

    def watch(self, path: Path, data_bytes: int = 0) -> WatchedFile:
        """Start to record the calls on a file, under any of its names.

        The file must exist and must not be mapped yet: msync and pmem_persist have only an address,
        and only later mappings are known.

        Args:
            path: the file.
            data_bytes: size of a DIMM's data, without the label area behind them; 0: all are data.

        Raises:
            HostError: the file cannot be opened, or 64 files are watched already.
        """
        try:
            # Kept open, so that no other file can reuse its inode number.
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"{path} cannot be watched: {error.strerror}") from error
        self._handles.append(handle)
        info, number = os.fstat(handle), len(self._files)
        for known, entry in zip(self._files, self._page.file, strict=False):
            if (entry.dev, entry.ino) == (info.st_dev, info.st_ino):
                return known
        if number == FILES:
            raise HostError(f"{path} cannot be watched: {FILES} files are watched already")
        entry = self._page.file[number]
        entry.dev, entry.ino, entry.data = info.st_dev, info.st_ino, data_bytes
        _barrier()
        self._page.files = number + 1
        self._files.append(WatchedFile(self, entry, path))
        return self._files[-1]

    def records(self, since: int = 0) -> list[Record]:
        """Return the calls begun so far, in order of their begin, from number `since` on.

        Raises:
            HostError: some of them were overwritten (the last 65,536 are kept); see also `check`.
        """
        self.check()
        records = []
        for number in range(since, self._page.begun):
            if (record := self._read(number)) is None:
                break
            records.append(record)
        _barrier()
        if since < (oldest := self._page.begun - RECORDS):
            raise HostError(f"the flush shim's records {since} to {oldest - 1} are overwritten")
        return records

    def check(self) -> None:
        """Raise HostError if calls of msync or pmem_persist may have been missed."""
        if self._page.lost:
            raise HostError(f"{self._page.lost} mappings of watched files are unknown to the shim")

    def _read(self, number: int) -> Record | None:
        slot = self._page.records[number % RECORDS]
        # A QEMU that was killed while it filled in a record leaves it incomplete.
        _until(lambda: slot.state >> 1 > number, _FILL_LIMIT_S)
        state = slot.state
        if state >> 1 != number + 1:
            return None
        # The other fields are valid only if they are read after the state.
        _barrier()
        ended = state & 1
        return Record(
            number=number,
            path=self._files[slot.file].path,
            operation=Operation(slot.operation),
            begin_ns=slot.begin_ns,
            end_ns=slot.end_ns if ended else None,
            result=slot.result if ended else None,
            injected=Injected(slot.injected),
            delay_s=slot.delay_us / 1e6,
            thread=slot.thread,
            start=slot.start,
            end=slot.end,
        )


class WatchedFile:
    """One file that a Shim watches, and its rule.

    A rule has three parts: delay, failure, hang. Each method sets one part, for later calls of the
    given operations. If several parts apply to a call, it hangs, then is delayed, then fails. A
    number out of range raises ValueError.
    """

    def __init__(self, shim: Shim, entry: Any, path: Path) -> None:
        self.path = path
        self._shim = shim
        self._entry = entry
        self._rule = RULE()
        self._changing = threading.Lock()

    def is_mapped(self) -> bool:
        """Return True if a process with the shim has mapped the file."""
        return bool(self._entry.mapped)

    def counts(self, operation: Operation | None = None) -> Counts:
        """Return the calls so far, of one operation or of FLUSHES; raises as Shim.check() does."""
        self._shim.check()
        counts = self._entry.counts[len(Operation) if operation is None else operation]
        # In this order, so that `ended` cannot exceed `begun`.
        ended, failed, most = counts.ended, counts.failed, counts.most
        return Counts(counts.begun, ended, failed, most)

    def records(self, since: int = 0) -> list[Record]:
        """Return the calls on this file; as Shim.records()."""
        return [record for record in self._shim.records(since) if record.path == self.path]

    def partial(self, size_bytes: int, since: int = 0) -> list[Record]:
        """Return the calls that do not cover the file's first bytes, and so cannot flush a DIMM.

        Args:
            size_bytes: the size of the DIMM without its label area.
            since: number of the first record; raises as Shim.records() does.
        """
        records = [one for one in self.records(since) if one.operation in FLUSHES]
        return [record for record in records if record.start > 0 or record.end < size_bytes]

    def delay(
        self,
        low_s: float,
        high_s: float | None = None,
        *,
        operations: Collection[Operation] = FLUSHES,
    ) -> None:
        """Delay each call by `low_s`, or by a random time from `low_s` to `high_s`, <= 3600 s."""
        high_s = low_s if high_s is None else high_s
        if not 0 <= low_s <= high_s <= 3600:
            raise ValueError(f"delay from {low_s} to {high_s} s")
        low_us, high_us = round(low_s * 1e6), round(high_s * 1e6)
        self._set("delay", delay_mask=_mask(operations), delay_low_us=low_us, delay_high_us=high_us)

    def fail(
        self,
        errno: int,
        *,
        nth: int | None = None,
        every: int | None = None,
        following: int | None = None,
        operations: Collection[Operation] = FALLIBLE,
    ) -> None:
        """Make calls fail without executing them: all calls unless nth, every or following is set.

        Args:
            errno: their error, 1 to 4095.
            nth: fail only the n-th call from now; the next call is the first.
            every: fail the n-th, 2n-th, 3n-th … call from now.
            following: fail the next n calls.
            operations: the calls to fail.

        Raises:
            ValueError: a number is out of range, two of nth, every and following are set, or
                `operations` includes pmem_persist, which cannot fail.
        """
        limits = [n for n in (nth, every, following) if n is not None]
        if len(limits) > 1 or not 0 < errno < 4096 or not all(0 < n <= _UINT32_MAX for n in limits):
            raise ValueError(f"fail({errno}, {nth=}, {every=}, {following=})")
        if Operation.PMEM_PERSIST in operations:
            raise ValueError("pmem_persist cannot fail")
        first, step, last = nth or every or 1, every or 1, nth or following or _UINT32_MAX
        calls = {"fail_first": first, "fail_step": step, "fail_last": last}
        self._set("fail", fail_mask=_mask(operations), fail_errno=errno, **calls)

    def hang(self, *, operations: Collection[Operation] = FLUSHES) -> None:
        """Hold each call until release()."""
        self._set("hang", hang_mask=_mask(operations))

    def hanging(self) -> int:
        """Number of calls that have begun and not ended while hang() is in force."""
        counts = self.counts()
        return counts.begun - counts.ended if self._rule.hang_mask else 0

    def release(self) -> None:
        """Release the calls that hang, within about 2 ms, and hold no later call."""
        self._set("hang", hang_mask=0)

    def clear(self) -> None:
        """Remove the rule; calls that hang are released, calls that are delayed stay delayed."""
        self._set("delay", "fail", "hang", delay_mask=0, fail_mask=0, hang_mask=0)

    def wait_begun(
        self, n: int, timeout_s: float = 30, operation: Operation | None = None
    ) -> Counts:
        """Wait until `n` calls have begun since watch(); raises ContractError with the counts."""
        return self._wait("begun", n, timeout_s, operation)

    def wait_ended(self, n: int, timeout_s: float, operation: Operation | None = None) -> Counts:
        """Wait until `n` calls have ended since watch(); raises ContractError with the counts."""
        return self._wait("ended", n, timeout_s, operation)

    def _wait(self, verb: str, n: int, limit_s: float, operation: Operation | None) -> Counts:
        if not _until(lambda: getattr(self.counts(operation), verb) >= n, limit_s):
            counts = self.counts(operation)
            what = "flushes" if operation is None else f"{operation.name.lower()} calls"
            raise ContractError(
                f"{self.path}: {n} {what} should have {verb} within {limit_s:g} s:"
                f" {counts.begun} have begun, {counts.ended} ended, {counts.failed} failed"
            )
        return self.counts(operation)

    def _set(self, *parts: str, **values: int) -> None:
        """Publish a rule with these values changed; the counters of `parts` restart."""
        with self._changing:
            generation = self._entry.generation + 1
            values |= {f"{part}_epoch": generation for part in parts}
            for name, value in values.items():
                setattr(self._rule, name, value)
            # Write the copy that the library does not read now; see rule_of() in flush_shim.c.
            _barrier()
            self._entry.rules[generation & 1] = self._rule
            _barrier()
            self._entry.generation = generation
            if not self._rule.hang_mask:
                self._entry.released = generation


@timesheet.during("waits")
def _until(done: Callable[[], bool], limit_s: float) -> bool:
    """Poll until done() is true; return False after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not (ready := done()) and time.monotonic() < deadline:
        # The shim only writes memory.
        time.sleep(0.0005)
    return ready


def _mask(operations: Collection[Operation]) -> int:
    return sum(1 << operation for operation in set(operations))


def _barrier() -> None:
    """Full memory barrier: acquiring and releasing a lock implies one."""
    with threading.Lock():
        pass
