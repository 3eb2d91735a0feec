# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot as its console tells it: the marks on the way up, and how to know that it got stuck."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from paprscm.argv import BASE_CMDLINE
from paprscm.console import Console
from paprscm.errors import ConfigError, GuestLostError
from paprscm.kmsg import text_of
from paprscm.settings import Settings

_MARKS = {
    "banner": re.compile(r"^(?:\[.*\])? ?Linux version "),
    "init": re.compile(r"^paprscm: init"),
    "ready": re.compile(r"^paprscm: ready"),
    "failed": re.compile(r"^paprscm: failed: "),
    # Linux, init/main.c:print_kernel_cmdline; not printed under "quiet".
    "command line": re.compile(r"^(?:\[.*\])? ?Kernel command line: "),
    # Linux, kernel/module/: signing.c, main.c, version.c.
    "module": re.compile(
        r"Loading of .* is rejected$|: version magic '.*' should be '|"
        r": disagrees about version of symbol |: Unknown symbol "
    ),
}


@dataclass
class StartTimes:
    """When a guest reached its marks, in seconds after QEMU's exec; None: not on its way.

    Attributes:
        banner, init, ready: a boot, as the console tells it.
        restored, awake, regions: a restored guest: its state was loaded; clock, random numbers and
            timers are right; the regions of its DIMMs have their driver.
        ssh: connected.
    """

    banner: float | None = None
    init: float | None = None
    ready: float | None = None
    restored: float | None = None
    awake: float | None = None
    regions: float | None = None
    ssh: float | None = None

    def reached(self) -> dict[str, float]:
        """The marks that were on its way, by name."""
        return {mark: when for mark, when in vars(self).items() if when is not None}


class StuckError(GuestLostError):
    """The guest does not come up, and its console does not say why."""


def wait_until_ready(
    console: Console, times: StartTimes, *, exec_s: float, settings: Settings
) -> bool:
    """Wait until the guest's ssh server listens.

    Args:
        console: the guest's.
        times: where to note when each mark was reached.
        exec_s: when QEMU was started (time.monotonic()).
        settings: boot_limit_s and silence_limit_s.

    Returns:
        False if the console ended or told of trouble, which is for the caller to explain.

    Raises:
        GuestLostError: /init says that it cannot do its work.
        ConfigError: the kernel ignores its command line, or refuses one of its modules.
        StuckError: a limit was reached; the message names it.
    """
    deadline = exec_s + settings.boot_limit_s
    wanted = dict(_MARKS)
    while "ready" in wanted:
        found = console.wait_for(
            wanted,
            timeout_s=deadline - time.monotonic(),
            silence_s=settings.silence_limit_s,
        )
        if found is None:
            if console.closed or console.trouble:
                return False
            if time.monotonic() >= deadline:
                limit = f"is not up after {settings.boot_limit_s:g} s (setting boot_limit_s)"
            else:
                limit = (
                    f"printed nothing for {settings.silence_limit_s:g} s while booting "
                    "(setting silence_limit_s)"
                )
            raise StuckError(f"the guest {limit}")
        mark, line, when = found
        if mark == "failed":
            raise GuestLostError(f"the guest cannot boot: {line}\n{console.tail()}")
        if mark == "module":
            raise ConfigError(
                f"the guest's kernel refuses a module: {text_of(line)}",
                hint="modules= must come from the build of the vmlinux, with the signatures that "
                "its modules_install made",
            )
        if mark == "command line":
            if BASE_CMDLINE not in line:
                raise ConfigError(
                    f"the guest's kernel ignores QEMU's -append; it prints: {text_of(line)}",
                    hint="build it without CONFIG_CMDLINE_FORCE; `paprscm kernel build` does",
                )
        else:
            setattr(times, mark, when - exec_s)
        del wanted[mark]
    return True
