# SPDX-License-Identifier: GPL-2.0-or-later
"""Avocado's runner for one test, in a child of the fork server."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from avocado.core.utils import messages
from avocado.plugins.runners import avocado_instrumented

# How often a runner reports that its test still runs, s; avocado/core/nrunner/runner.py.
_STATUS_INTERVAL_S = 0.5


def run(argv: list[str]) -> None:
    """Run Avocado's runner with this command line, as `python -m` would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in (1, 2):
        os.dup2(nothing, handle)
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = argv
    runner = avocado_instrumented.AvocadoInstrumentedTestRunner
    runner._monitor = staticmethod(monitor)  # type: ignore[method-assign]
    avocado_instrumented.main()


def monitor(queue: Any) -> Iterator[dict[str, Any]]:
    """Pass a test's messages on as they come.

    Avocado's own loop sleeps 10 ms before each message (known_issues/avocado-delays-messages).
    """
    while True:
        if not wait([queue._reader], _STATUS_INTERVAL_S):
            yield messages.RunningMessage.get()
            continue
        message = queue.get()
        if message.get("type") != "early_state":
            yield message
        if message.get("status") == "finished":
            return
