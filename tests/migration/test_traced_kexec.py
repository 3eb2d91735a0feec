# SPDX-License-Identifier: GPL-2.0-or-later
"""kexec of a kernel that traces its hcalls, as CONFIG_HCALL_STATS does.

Before the switch the kernel poisons the address of its per-CPU data (arch/powerpc/kexec/core_64.c,
default_machine_kexec). No memory is there: on hardware, and on a QEMU that models it, an access is
a machine check.
"""

import os
import re
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from paprscm import timesheet
from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.kexec import load_kernel, start_loaded
from paprscm.hcall.bare_metal import FREE
from paprscm.hcall.mailbox import Call
from paprscm.testcase import PaprScmTest
from paprscm.vm.machine import Machine

POISON = 0x0DEADDEADEEEEEE8
"""An aligned real address in the poisoned range, of which real mode ignores the highest digit."""
BOOT_S = 120.0
"""Time limit of a start on a busy host, s."""
PERIOD_S, SAMPLES = 0.1, 50
BUSY_S = 2.0
REAL = (1 << 60) - 1
"""Bits of an address in the kernel that are its real address."""
ENTRIES_END = 0x10000
"""End of a kernel's entries of exceptions (arch/powerpc/kernel/exceptions-64s.S)."""


class Sample(NamedTuple):
    """A vCPU at one moment.

    Attributes:
        nip: address of the next instruction.
        r1: the stack pointer.
        srr0: address of what an exception has interrupted.
        cpu_s: CPU time of QEMU so far, s.
    """

    nip: int
    r1: int
    srr0: int
    cpu_s: float


def take_sample(guest: Guest) -> Sample:
    """Return the vCPU's state."""
    text = guest.qmp.hmp("info registers")
    patterns = (r"NIP (\w+)", r"GPR00 \w+ (\w+)", r"(?m)^\s*SRR0 (\w+)")
    found = [re.search(pattern, text) for pattern in patterns]
    if not all(found):
        raise HostError("QEMU's `info registers` has another form", hint=text[:400])
    nip, r1, srr0 = (int(match[1], 16) for match in found if match)
    # After the name, which may have spaces (proc_pid_stat(5)): utime and stime.
    fields = Path(f"/proc/{guest.process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return Sample(nip, r1, srr0, ticks / os.sysconf("SC_CLK_TCK"))


def is_endless(samples: Sequence[Sample]) -> bool:
    """Return True if a vCPU has only taken exceptions for BUSY_S of CPU time.

    It is always at an entry of an exception or at the interrupted instruction, with one stack. CPU
    time, because on a busy host a vCPU may stand still.
    """
    return (
        samples[-1].cpu_s - samples[0].cpu_s >= BUSY_S
        and len({sample.r1 for sample in samples}) == 1
        and all(one.nip == one.srr0 or one.nip & REAL < ENTRIES_END for one in samples)
    )


class TracedKexec(PaprScmTest):
    """
    :avocado: tags=migration
    """

    def test_hcall_stats(self) -> None:
        """A kernel that counts its hcalls starts another one by kexec."""
        self.require_kernel("CONFIG_KEXEC_FILE", "CONFIG_HCALL_STATS")
        self.require_machine_check()
        guest = self.boot(Machine(smp=1))
        load_kernel(guest, self.environment.equipment.payload)
        printed = len(guest.console.lines)
        start_loaded(guest)
        stuck = self.is_stuck(guest, printed)
        self.known_issue(
            "linux-kexec-traces-hcalls",
            shows=stuck,
            found="a kernel with HCALL_STATS "
            + ("takes an exception again and again instead of starting" if stuck else "starts")
            + " the next one",
        )

    def require_machine_check(self) -> None:
        """CANCEL the test if reads where no memory is have a value."""
        bare = self.bare(Machine(smp=1, memory_mib=256))
        bare.write(FREE.start, bytes(range(8)))
        (control,) = bare.batch([Call(0, (FREE.start,), reads=True)])
        self.expect("a read of memory", control.outputs[0], 0x0001020304050607)
        try:
            (answer,) = bare.batch([Call(0, (POISON,), reads=True)])
        except HostError as error:
            if "exception 0x200" not in error.message:
                raise
        else:
            raise CapabilityError(
                f"on this QEMU a read of {POISON:#x}, where no memory is, has the value "
                f"{answer.outputs[0]:#x}",
                hint="QEMU 10.0 answers with a machine check",
            )
        bare.close()

    def is_stuck(self, guest: Guest, printed: int) -> bool:
        """Return True if the vCPU takes the same exception for ever, False if a kernel starts."""
        marks = {"kernel": re.compile("Linux version")}
        seen: deque[Sample] = deque(maxlen=SAMPLES)
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            if guest.console.wait_for(marks, timeout_s=0, silence_s=BOOT_S, start=printed):
                return False
            guest.check()
            seen.append(take_sample(guest))
            if len(seen) == SAMPLES and is_endless(list(seen)):
                return True
            # Between two samples.
            timesheet.pause(PERIOD_S)
        raise ContractError(f"no kernel started within {BOOT_S:g} s")
