# SPDX-License-Identifier: GPL-2.0-or-later
"""The verb `image`: build or fetch QEMU, kernel and userland, and make the snapshot of guests.

A job calls it before its first test, in a process that has not imported the other verbs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from paprscm import log, settings
from paprscm.debian.packages import Archive
from paprscm.emulator.binary import resolve
from paprscm.errors import CAPABILITY_STATUS, CapabilityError, Error
from paprscm.guest.environment import prepare
from paprscm.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--quiet", action="store_true", help="print only steps and errors")
    parser.add_argument("--only-qemu", action="store_true", help="only for tests without a guest")
    parser.add_argument(
        "--no-snapshot",
        action="store_true",
        help="do not make the snapshot that guests are restored from",
    )


def image(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Prepare what the arguments ask for, and print its versions; return 0.

    Raises:
        Error: it is impossible with these settings, or on this machine.
    """
    if arguments.only_qemu:
        qemu = resolve(Archive.of(chosen), chosen.qemu)
        if not arguments.quiet:
            print(f"{qemu.version_text} {qemu.path}")
        return 0
    environment = prepare(chosen, make_snapshot=not arguments.no_snapshot)
    if arguments.quiet:
        return 0
    table = Table.grid(padding=(0, 2))
    for name, value in environment.describe().items():
        table.add_row(name, value)
    Console().print(table)
    return 0


def prepare_job(request: dict[str, Any]) -> int:
    """Do the same for a job, without output; return the exit status.

    Args:
        request: `settings`, those of the job's command line; `only_qemu` and `no_snapshot`, as the
            options.
    """
    arguments = argparse.Namespace(
        quiet=True, only_qemu=request["only_qemu"], no_snapshot=request["no_snapshot"]
    )
    return run_verb(lambda: image(arguments, settings.load(request["settings"])), verbose=False)


def run_verb(verb: Callable[[], int], *, verbose: bool) -> int:
    """Run a verb; return its exit status. An error prints message and hint; status 2 or 3."""
    log.to_terminal(verbose=verbose)
    _unwind_on(signal.SIGHUP, signal.SIGTERM)
    try:
        return verb()
    except Error as error:
        print(f"paprscm: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return CAPABILITY_STATUS if isinstance(error, CapabilityError) else 2
    except OSError as error:
        # Usually for the user to fix: a disk, a permission, a closed terminal.
        log.logger.debug("", exc_info=True)
        print(f"paprscm: {error.filename or 'the system'}: {error.strerror}", file=sys.stderr)
        print("  hint: paprscm -v shows the traceback", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paprscm: interrupted; the next run continues", file=sys.stderr)
        return 130


def _unwind_on(*numbers: signal.Signals) -> None:
    """Exit through every `finally` on these signals, unless they are ignored, as under nohup(1)."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    for number in numbers:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
