# SPDX-License-Identifier: GPL-2.0-or-later
"""Process that has imported Avocado's runner and the suite, and forks a runner for each test.

Run by the spawner (spawner.py) with a socket as its standard input. Each line that it reads and
writes is JSON:

    {"start": [WORD, …]}            start a runner with this command line
    {"signal": NUMBER, "pid": PID}  send a signal to a runner, unless it has ended
    {"started": PID}                answers "start"
    {"ended": PID}                  a runner has ended

It ends when the spawner closes the socket; the runners that it has started go on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from avocado.core.utils import messages
from avocado.plugins.runners import avocado_instrumented

_RUNNER = avocado_instrumented.AvocadoInstrumentedTestRunner
# How often a runner reports that its test still runs, s; avocado/core/nrunner/runner.py.
_STATUS_INTERVAL_S = 0.5
# Imported by most tests; one that cannot be imported is reported by the test that needs it.
_MODULES = ("paprscm.testcase", "paprscm.map_sync.probe", "paprscm.flush.accounts")


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


def main() -> None:
    _RUNNER._monitor = staticmethod(monitor)  # type: ignore[method-assign]
    for name in _MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    _name("runner-server")
    commands = socket.socket(fileno=os.dup(0))
    woken, wake = os.pipe()
    for handle in (woken, wake):
        os.set_blocking(handle, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # ^C reaches the whole foreground group; only avocado handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    runners: set[int] = set()
    rest = b""
    while True:
        ready, _, _ = select.select([commands.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in _reap(runners):
                _tell(commands, ended=pid)
        if commands.fileno() not in ready:
            continue
        chunk = commands.recv(1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "start" in request:
                pid = os.fork()
                if not pid:
                    _become_runner(request["start"], commands, woken, wake)
                runners.add(pid)
                _tell(commands, started=pid)
            elif request["pid"] in runners:
                os.kill(request["pid"], request["signal"])


def _tell(commands: socket.socket, **words: int) -> None:
    with contextlib.suppress(OSError):
        commands.sendall(json.dumps(words).encode() + b"\n")


def _name(text: str) -> None:
    """Name this process for ps(1); its command line is that of the server."""
    Path("/proc/self/comm").write_text(text)


def _reap(runners: set[int]) -> Iterator[int]:
    for pid in list(runners):
        if os.waitpid(pid, os.WNOHANG)[0]:
            runners.discard(pid)
            yield pid


def _become_runner(argv: list[str], commands: socket.socket, *pipe: int) -> None:
    """Run Avocado's runner in this child, as `python -m` would."""
    status = 1
    try:
        _name("runner")
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        commands.close()
        for handle in pipe:
            os.close(handle)
        nothing = os.open(os.devnull, os.O_RDWR)
        for handle in range(3):
            os.dup2(nothing, handle)
        sys.argv = argv
        avocado_instrumented.main()
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
