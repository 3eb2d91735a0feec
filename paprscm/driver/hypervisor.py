# SPDX-License-Identifier: GPL-2.0-or-later
"""A DIMM's driver, and answers of the hypervisor to it that QEMU never gives."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, Literal

from paprscm.driver.removal import PLATFORM, platform_device
from paprscm.errors import CapabilityError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Natural, ToolReport, read_report
from paprscm.guest.tools import install_tool, run_tool
from paprscm.hcall.interposer import SYMBOLS, Answer, Interposer
from paprscm.papr import Hcall

REPORTED: Final = (
    r"papr_scm \S+: (flush error|bind err|unbind error|Failed to query|Unknown performance stats)"
)
"""Messages of the driver about errors that the hypervisor reports."""
EYE_CATCHER: Final = b"SCMSTATS"
"""Begin of the buffer of H_SCM_PERFORMANCE_STATS (Linux include/linux/papr_scm.h)."""
STATISTICS_HEADER: Final = struct.Struct(">8sII")
"""Eye catcher, version and number of statistics (papr_scm.c, struct papr_scm_perf_stats)."""
STATISTIC: Final = struct.Struct(">8sQ")
"""Name and value (struct papr_scm_perf_stat)."""


class Hypervisor:
    """Answers calls of a guest's kernel instead of QEMU.

    Args:
        guest: the guest.
        tools: guest tools to compile before the first answer: a stop at each call slows them.

    Raises:
        CapabilityError: the guest has the hash MMU, with which each page fault makes a call.
    """

    def __init__(self, guest: Guest, *tools: str) -> None:
        # Without symbols, call_sites() gives the reason.
        output = guest.succeed(f"sed -n 's/^MMU.*: //p' /proc/cpuinfo; {SYMBOLS} || :")
        mmu, _, self._symbols = output.partition("\n")
        if mmu != "Radix":
            raise CapabilityError(
                f"other answers of the hypervisor need the radix MMU, not {mmu}",
                hint="cpu=POWER9 or later",
            )
        for tool in tools:
            install_tool(guest, tool)
        self._guest = guest

    def answers(self, answer: Answer, *, until: Hcall | None = None) -> Interposer:
        """Return a context manager in which the answers to calls are chosen.

        Args:
            answer: chooses the answers.
            until: ends with the first call of this kind.

        Raises:
            CapabilityError: the kernel does not show where it makes hypervisor calls.
        """
        return Interposer(self._guest.vm, self._symbols, answer, until=until)


def set_driver(guest: Guest, slot: int, action: Literal["bind", "unbind"]) -> bool:
    """Bind papr_scm to the DIMM in a slot, or unbind it; return True if it is bound afterwards."""
    name = platform_device(slot)
    write = f"echo {name} 2> /dev/null > {PLATFORM}/{action}"
    state = f"[ -e /sys/bus/platform/devices/{name}/driver ] && echo bound || echo unbound"
    return guest.succeed(f"{write}; {state}") == "bound"


def statistics(values: Mapping[str, int], *, count: int | None = None) -> bytes:
    """The buffer of H_SCM_PERFORMANCE_STATS with these statistics.

    Args:
        values: value by name; names have 8 characters.
        count: number of statistics in the header; None: the true one.
    """
    header = STATISTICS_HEADER.pack(EYE_CATCHER, 1, len(values) if count is None else count)
    return header + b"".join(STATISTIC.pack(name.encode(), value) for name, value in values.items())


class PmuReport(ToolReport, frozen=True, kw_only=True):
    """The report of guest_tools/nd_pmu.c.

    Attributes:
        results: errno and count of perf_event_open, and of each step.
    """

    tool: Literal["nd_pmu"]
    results: tuple[tuple[Natural, Natural], ...]


def count_event(guest: Guest, name: str, event: int, *steps: str) -> PmuReport:
    """Count an event of a DIMM's performance monitor.

    Args:
        guest: the guest.
        name: the DIMM, such as "nmem0".
        event: number of the event (papr_scm.c, nvdimm_events_map).
        steps: "read", "close" or "write=PATH=TEXT".

    Raises:
        ProbeError: the report of the tool is invalid.
    """
    folder = f"/sys/bus/event_source/devices/{name}"
    kind, cpus = guest.succeed(f"cat {folder}/type {folder}/cpumask").split()
    words = [kind, str(event), cpus.partition(",")[0].partition("-")[0], *steps]
    result = run_tool(guest, "nd_pmu", words)
    return read_report(PmuReport, result.stdout, result.status, result.stderr)
