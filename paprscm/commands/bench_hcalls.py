# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmark of hcalls and flushes per second that QEMU completes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from paprscm import log
from paprscm.commands.series import Series
from paprscm.emulator.binary import Qemu
from paprscm.errors import ContractError
from paprscm.hcall.bare_metal import BareMachine, compile_program
from paprscm.hcall.mailbox import Call
from paprscm.host.cache import Cache
from paprscm.papr import BIND_ANY_ADDRESS, Hcall, ReturnCode, UnbindScope
from paprscm.settings import Settings
from paprscm.vm.machine import MIB, Machine, Nvdimm, require

_CALLS = 20_000
_FLUSHES = 2_000
_PERSISTS = 50
"""Fewer, because pmem_persist covers the whole DIMM each time."""

_SYNCED = Nvdimm(slot=0, size_bytes=256 * MIB)
_PERSISTENT = Nvdimm(slot=1, size_bytes=256 * MIB, pmem=True, pmem_override=True)

_DRC = _SYNCED.drc
_ARGUMENTS = {
    Hcall.H_SCM_READ_METADATA: (_DRC, 0, 8),
    Hcall.H_SCM_WRITE_METADATA: (_DRC, 0, 0, 8),
    Hcall.H_SCM_BIND_MEM: (_DRC, 0, 1, BIND_ANY_ADDRESS, 0),
    Hcall.H_SCM_UNBIND_ALL: (UnbindScope.DRC, _DRC, 0),
    Hcall.H_SCM_HEALTH: (_DRC,),
    Hcall.H_SCM_PERFORMANCE_STATS: (_DRC,),
}


def measure_hcalls(qemu: Qemu, settings: Settings, rounds: int) -> Series:
    """Measure hcalls a second by opcode, flushes a second, and fdatasync on the host.

    Each is measured once in each round, so that a disturbance affects all.

    Args:
        qemu: the QEMU to measure.
        settings: cache_dir and scratch_dir.
        rounds: number of rounds.

    Raises:
        ContractError: a call fails.
    """
    nvdimms = [_SYNCED]
    if qemu.has_pmem_override:
        require(qemu, _PERSISTENT)
        nvdimms.append(_PERSISTENT)
    machine = Machine(nvdimms=tuple(nvdimms), smp=1, memory_mib=256)
    values: dict[str, list[float]] = {}
    began = time.time()
    with (
        tempfile.TemporaryDirectory(prefix="paprscm-bench-") as folder,
        BareMachine(
            qemu,
            compile_program(Cache(settings.cache_dir)),
            machine,
            folder=Path(folder),
            scratch_dir=settings.scratch_dir,
        ) as bare,
        log.quiet(),
        log.progress("hcalls", rounds, "rounds") as bar,
    ):
        for number in range(-1, rounds):
            for name, measure in _measures(bare, nvdimms).items():
                rate = measure()
                # The first round is a warm-up: it fills caches and translates the program.
                if number >= 0:
                    values.setdefault(name, []).append(rate)
            bar.update(number + 1)
    dimensions = {"qemu": qemu.version_text, "qemu_path": str(qemu.path), "accel": bare.board.accel}
    return Series(dimensions, began, "1/s", values)


def hcall_table(series: Series) -> Table:
    """The series for a terminal."""
    count = len(next(iter(series.values.values())))
    table = Table(title=f"a second, {count} rounds, QEMU {series.environment['qemu']}")
    table.title_justify = "left"
    table.add_column("measurement")
    for name in ("median", "min", "max"):
        table.add_column(name, justify="right")
    for name, spread in series.summary().items():
        table.add_row(name, *(f"{spread[column]:,.0f}" for column in ("median", "min", "max")))
    return table


def _measures(bare: BareMachine, nvdimms: list[Nvdimm]) -> dict[str, Callable[[], float]]:
    measures: dict[str, Callable[[], float]] = {
        call.name: lambda call=call: _rate(bare, call)  # type: ignore[misc]
        for call in _ARGUMENTS
    }
    measures["H_SCM_FLUSH to its end, fdatasync"] = lambda: _flushes(bare, nvdimms[0], _FLUSHES)
    if len(nvdimms) > 1:
        measures["H_SCM_FLUSH to its end, pmem_persist"] = lambda: _flushes(
            bare, nvdimms[1], _PERSISTS
        )
    measures["fdatasync of the same file by the host"] = lambda: _syncs(bare.file(0))
    return measures


def _rate(bare: BareMachine, call: Hcall) -> float:
    (answer,) = bare.batch([Call(call, _ARGUMENTS[call], times=_CALLS)], timeout_s=60)
    if answer.code not in (ReturnCode.H_SUCCESS, ReturnCode.H_FUNCTION):
        raise ContractError(f"{call.name} answered {answer}")
    return _CALLS / answer.duration_s


def _flushes(bare: BareMachine, nvdimm: Nvdimm, count: int) -> float:
    """Flushes a second, one after the other, each polled without a pause until its end."""
    flush = Call(Hcall.H_SCM_FLUSH, (nvdimm.drc, 0), 10_000_000, True)
    answers = bare.batch([flush] * count, timeout_s=300)
    if wrong := [answer for answer in answers if answer.code != ReturnCode.H_SUCCESS]:
        raise ContractError(f"a flush ended with {wrong[0]}")
    return count / sum(answer.duration_s for answer in answers)


def _syncs(file: Path) -> float:
    handle = os.open(file, os.O_RDWR)
    try:
        began = time.monotonic()
        for _ in range(_FLUSHES):
            os.fdatasync(handle)
        return _FLUSHES / (time.monotonic() - began)
    finally:
        os.close(handle)
