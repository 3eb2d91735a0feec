# SPDX-License-Identifier: GPL-2.0-or-later
"""Another kernel in a running guest, started by guest_tools/kexec.c without a reset."""

from __future__ import annotations

from typing import Final

from paprscm.channel.command import require_success
from paprscm.guest.guest import Guest
from paprscm.guest.tools import install_tool, run_tool
from paprscm.vm.argv import Payload

_KERNEL: Final = "/tmp/vmlinux"  # noqa: S108 - in the guest
_INITRD: Final = "/tmp/initramfs"  # noqa: S108 - in the guest
_LIMIT_S = 60.0
CRASH_MEMORY: Final = "crashkernel=384M"
"""Word of the kernel's command line that reserves memory for a crash kernel."""
NO_HCALL_STATS: Final = "initcall_blacklist=__machine_initcall_pseries_hcall_inst_init"
"""Word of the command line of a kernel that starts another one: it must not trace its hcalls, as
HCALL_STATS does, when its per-CPU data are gone (known_issues/linux-kexec-traces-hcalls.md)."""
_OWN = (CRASH_MEMORY, NO_HCALL_STATS)


def load_kernel(guest: Guest, payload: Payload, *, crash: bool = False) -> None:
    """Load the guest's kernel once more, with its command line, but with HCALL_STATS.

    Args:
        guest: the guest, booted with NO_HCALL_STATS.
        payload: its kernel, as QEMU gets it: on TCG, a copy without the instructions that TCG
            cannot execute.
        crash: load it for a panic, to run on one CPU; the guest was booted with CRASH_MEMORY.

    Raises:
        ContractError: the kernel does not load it.
    """
    words = [word for word in guest.succeed("cat /proc/cmdline").split() if word not in _OWN]
    if crash:
        words.append("nr_cpus=1")
    guest.put(payload.kernel, _KERNEL)
    arguments = ["crash" if crash else "load", _KERNEL, " ".join(words)]
    if payload.initrd:
        guest.put(payload.initrd, _INITRD)
        arguments.append(_INITRD)
    require_success(run_tool(guest, "kexec", arguments, timeout_s=_LIMIT_S))
    # The kernel has its own copies.
    guest.succeed(f"rm -f {_KERNEL} {_INITRD}")


def start_loaded(guest: Guest) -> None:
    """Start the kernel of load_kernel()."""
    end_kernel(guest, f"{install_tool(guest, 'kexec')} execute")


def end_kernel(guest: Guest, command: str) -> None:
    """Run a shell command that ends the guest's kernel."""
    # The end of this round trip must arrive before.
    guest.succeed(f"(sleep 0.1; {command}) < /dev/null > /dev/null 2>&1 &")
