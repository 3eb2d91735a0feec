# SPDX-License-Identifier: GPL-2.0-or-later
"""Moments of a boot, from the first instruction on, at which a test acts.

A moment is an event, not a time, so a slow host does not change it. Most are breakpoints, before
the first instruction of a function of the guest's kernel: then the machine is stopped, and has
executed nothing of that function.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from paprscm.build.symbols import entry_points
from paprscm.emulator.gdbstub import Gdb
from paprscm.errors import CapabilityError, GuestLostError
from paprscm.guest.guest import Guest

# QEMU hw/ppc/spapr.c, translate_kernel_address: KERNEL_LOAD_ADDR and 28 bits of the address. There
# the kernel runs until it moves itself to address 0 (Linux arch/powerpc/kernel/head_64.S).
_LOAD_ADDRESS, _LOAD_MASK = 0x400000, 0x0FFFFFFF


@dataclass(frozen=True)
class Moment:
    """A moment of a boot; without `function` and `prints`, the one before the first instruction.

    Attributes:
        name: for a report.
        function: the machine is stopped before this function of the kernel runs.
        before_move: the function runs before the kernel moves itself to address 0.
        prints: the console has printed a line with this text; the machine runs on meanwhile.
    """

    name: str
    function: str = ""
    before_move: bool = False
    prints: str = ""

    def __str__(self) -> str:
        return self.name

    def address(self, linked: int) -> int:
        """Return the address at which a vCPU executes an instruction of the function."""
        return (linked & _LOAD_MASK) + _LOAD_ADDRESS if self.before_move else linked


def reachable(moments: Iterable[Moment], vmlinux: Path) -> dict[Moment, int]:
    """Find the moments that a kernel has, and the address of each breakpoint (else 0).

    A driver that is a module has no function in the vmlinux, and no moment.

    Raises:
        CapabilityError: the vmlinux has no symbol table.
    """
    moments = tuple(moments)
    entries = entry_points(vmlinux, {"start_kernel"} | {one.function for one in moments} - {""})
    if not entries:
        raise CapabilityError(
            f"{vmlinux} has no symbol table, so the moments of its boot cannot be found",
            hint="give the vmlinux from the top of a build tree as kernel=",
        )
    return {
        one: one.address(entries[one.function]) if one.function else 0
        for one in moments
        if not one.function or one.function in entries
    }


def visit(
    guest: Guest, moments: dict[Moment, int], act: Callable[[Moment], object], *, limit_s: float
) -> None:
    """Boot a stopped machine, and act at each moment; at the end the machine runs.

    Args:
        guest: its machine has executed nothing since its start or its reset.
        moments: in the order of a boot, as `reachable` returns them.
        act: called at each moment.
        limit_s: time limit from one moment to the next, s.

    Raises:
        GuestLostError: a moment was not reached; the message names it.
    """
    start = guest.console.line_count
    printing: list[Moment] = []

    def follow(lines: Collection[Moment]) -> None:
        for line in lines:
            _wait_printed(guest, line, start, limit_s)
            act(line)

    with Gdb.of(guest.qmp, guest.vm.scratch / "gdb") as gdb:
        for moment, address in moments.items():
            if moment.prints:
                printing.append(moment)
                continue
            if moment.function:
                try:
                    gdb.run_to(
                        address,
                        limit_s=limit_s,
                        alive=guest.check,
                        meanwhile=functools.partial(follow, tuple(printing)),
                    )
                except GuestLostError as error:
                    guest.check()
                    raise GuestLostError(
                        f"the boot does not reach the moment '{moment}': {error.message}\n"
                        f"  the console ends with:\n{guest.console.tail()}"
                    ) from error
                printing.clear()
            act(moment)
    follow(printing)


def _wait_printed(guest: Guest, moment: Moment, start: int, limit_s: float) -> None:
    marks = {moment.name: re.compile(re.escape(moment.prints))}
    line = guest.console.wait_for(marks, timeout_s=limit_s, silence_s=math.inf, start=start)
    if line is None:
        guest.check()
        raise GuestLostError(
            f"the console has not printed '{moment.prints}' within {limit_s:g} s\n"
            f"  it ends with:\n{guest.console.tail()}"
        )
