# SPDX-License-Identifier: GPL-2.0-or-later
"""kexec of a kernel that traces its hcalls, as CONFIG_HCALL_STATS does.

Before the switch the kernel poisons the address of its per-CPU data (arch/powerpc/kexec/core_64.c,
default_machine_kexec). No memory is there: on hardware, and on a QEMU that models it, an access is
a machine check.
"""

import re
import time
from collections import deque

from paprscm import timesheet
from paprscm.device.mailbox import Call
from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.kexec import load_kernel, start_loaded
from paprscm.testcase import PaprScmTest
from paprscm.vm.machine import Machine

POISON = 0x0DEADDEADEEEEEE8
"""An aligned real address in the poisoned range, of which real mode ignores the highest digit."""
BOOT_S = 120.0
"""Time limit of a start on a busy host, s."""
PERIOD_S, SAMPLES = 0.1, 50


def exception(guest: Guest) -> tuple[str, ...]:
    """Return the vCPU's stack pointer, and the address and state that an exception interrupted."""
    text = guest.qmp.hmp("info registers")
    patterns = (r"GPR00 \w+ (\w+)", r"(?m)^\s*SRR0 (\w+)", r"\bSRR1 (\w+)")
    found = [re.search(pattern, text) for pattern in patterns]
    if not all(found):
        raise HostError("QEMU's `info registers` has another form", hint=text[:400])
    return tuple(match[1] for match in found if match)


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
        self.expect("a read of memory", bare.batch([Call(0, (0,), reads=True)])[0].code, 0)
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
        """Return True if the vCPU takes the same exception for ever, False if a kernel starts.

        Of a vCPU that runs, at least the stack pointer changes within some seconds.
        """
        marks = {"kernel": re.compile("Linux version")}
        seen: deque[tuple[str, ...]] = deque(maxlen=SAMPLES)
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            if guest.console.wait_for(marks, timeout_s=0, silence_s=BOOT_S, start=printed):
                return False
            guest.check()
            seen.append(exception(guest))
            if len(seen) == SAMPLES and len(set(seen)) == 1:
                return True
            # Between two samples.
            timesheet.pause(PERIOD_S)
        raise ContractError(f"no kernel started within {BOOT_S:g} s")
