# SPDX-License-Identifier: GPL-2.0-or-later
"""Kprobes, which the suite uses to count flushes, do not change the kernel's behaviour.

A kprobe is a trap. Later the kernel replaces the trap by a branch to a copy of
optprobe_template_entry (arch/powerpc/kernel/optprobes_head.S), unless
/proc/sys/debug/kprobes-optimization is 0; FlushTrace sets it to 0. At a function entry that ftrace
knows, ftrace calls the probe instead.
"""

from __future__ import annotations

import re

from paprscm.guest.guest import Guest
from paprscm.guest.tools import install_tool
from paprscm.testcase import PaprScmTest

ISSUE = "linux-kprobe-restores-paca"
MOVES = 200
LIMIT_S = 60.0
"""Time without an end or an error after which the guest hangs; 200 moves take 1 s."""
END = re.compile(r"moved: status (\d+)$")
# Messages of a kernel in which a CPU uses the per-CPU data of another.
LOST = re.compile(r"\bBUG[: ]|Oops: |Unable to handle kernel |rethook: |Kernel panic|INFO: .*stall")

OPTIMIZATION = "/proc/sys/debug/kprobes-optimization"
LIST = "grep read_zero /sys/kernel/debug/kprobes/list"
# Each read of /dev/zero calls read_zero (drivers/char/mem.c).
SET = f"""
echo 0 > {OPTIMIZATION} && cd /sys/kernel/tracing
[ -d events ] || mount -t tracefs tracefs . && cd /sys/kernel/tracing || exit
echo 'r:moved/read read_zero' > kprobe_events && echo 1 > events/moved/read/enable && {LIST}
"""


class Kprobes(PaprScmTest):
    """
    A return probe in a process that is moved from CPU to CPU.

    :avocado: tags=flush,kprobes
    """

    def test_process_that_moves(self) -> None:
        """A process that is moved to another CPU inside a probe's code keeps running."""
        self.require_kernel("CONFIG_KPROBE_EVENTS", "CONFIG_OPTPROBES", "CONFIG_PREEMPTION")
        self.require_cpus(2)
        guest = self.boot(allowed=[LOST.pattern])
        probe = guest.succeed(SET)
        if "[FTRACE]" not in probe:
            self.expect("kernel message while the probe is a trap", self.move(guest), "")
            guest.succeed(f"echo 1 > {OPTIMIZATION}")
            probe = guest.wait_until(f"{LIST} | grep OPTIMIZED")
        end = self.move(guest)
        if end:
            guest.kill()
        else:
            guest.check()
        kind = "ftrace's" if "[FTRACE]" in probe else "optimized"
        self.known_issue(
            ISSUE,
            shows=bool(end),
            found=f"return probe on read_zero, {kind}: {end or f'{MOVES} moves'}",
        )

    def move(self, guest: Guest) -> str:
        """Move the process; return the first message of a broken kernel, or ""."""
        console, tool = guest.console, install_tool(guest, "moved")
        start = len(console.lines)
        guest.succeed(
            f"setsid sh -c '{tool} {MOVES}; echo \"<1>moved: status $?\" > /dev/kmsg' "
            "> /dev/null 2>&1 < /dev/null &"
        )
        match = console.wait_for(
            {"end": END, "lost": LOST}, timeout_s=LIMIT_S, silence_s=float("inf"), start=start
        )
        if match is None:
            return f"the guest hangs for {LIMIT_S:.0f} s"
        _name, line, _when = match
        return "" if line.endswith("moved: status 0") else (line.partition("] ")[2] or line).strip()
