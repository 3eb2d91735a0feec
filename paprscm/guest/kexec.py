# SPDX-License-Identifier: GPL-2.0-or-later
"""Another kernel in a running guest, started by guest_tools/kexec.c without a reset."""

from __future__ import annotations

import shlex
from typing import Final

from paprscm.guest.command import require_success
from paprscm.guest.guest import Guest
from paprscm.guest.tools import install_tool, run_tool
from paprscm.vm.argv import Payload

_KERNEL: Final = "/tmp/vmlinux"  # noqa: S108 - in the guest
_INITRD: Final = "/tmp/initramfs"  # noqa: S108 - in the guest
_LIMIT_S = 60.0
CRASH_MEMORY: Final = "crashkernel=256M"
"""Word of the kernel's command line that reserves memory for a crash kernel."""


def load_kernel(guest: Guest, payload: Payload, *, crash: bool = False) -> None:
    """Load the guest's kernel once more, with its command line.

    Args:
        guest: the guest.
        payload: its kernel, as QEMU gets it: on TCG, a copy without the instructions that TCG
            cannot execute.
        crash: load it for a panic; the guest must have been booted with CRASH_MEMORY. It runs on
            one CPU, and without memory for a crash kernel.

    Raises:
        ContractError: the kernel does not load it.
    """
    words = guest.succeed("cat /proc/cmdline").split()
    if crash:
        words = [word for word in words if word != CRASH_MEMORY] + ["nr_cpus=1"]
    guest.put(payload.kernel, _KERNEL)
    arguments = ["crash" if crash else "load", _KERNEL, " ".join(words)]
    if payload.initrd:
        guest.put(payload.initrd, _INITRD)
        arguments.append(_INITRD)
    require_success(run_tool(guest, "kexec", arguments, timeout_s=_LIMIT_S))
    # The kernel has its own copies.
    guest.succeed(f"rm -f {_KERNEL} {_INITRD}")


def start_loaded(guest: Guest) -> None:
    """Start the kernel of load_kernel(); the command's own end arrives before that."""
    tool = shlex.quote(str(install_tool(guest, "kexec")))
    guest.succeed(f"(sleep 0.1; {tool} execute) < /dev/null > /dev/null 2>&1 &")
