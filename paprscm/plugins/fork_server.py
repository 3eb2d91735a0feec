# SPDX-License-Identifier: GPL-2.0-or-later
"""Process that has imported Avocado's runner and the suite, and forks a child for each request.

A child needs no imports, which take most of a second. It is not a fork of Avocado's process, whose
sys.path is wrong (known_issues/avocado-safeloader-sys-path).

Avocado's process sends a socket for each child. On it the child writes its process id, reads the
function to call, and writes the result; all are lines of JSON. The end of the child closes it. The
server ends when Avocado's process does, however that ends; children go on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

# Imported by most tests; one that cannot be imported is reported by the test that needs it.
_MODULES = (
    "paprscm.plugins.runner",
    "paprscm.plugins.classes",
    "paprscm.commands.image",
    "paprscm.testcase",
    "paprscm.map_sync.probe",
    "paprscm.flush.accounts",
)
# Time for a child to unwind after ^C, which reaches the whole foreground group, s.
_UNWIND_S = 0.25


class Child:
    """A child of the server, which calls a function.

    Args:
        function: "module:name"; its argument and its result are JSON.
        argument: the argument.

    Attributes:
        pid: its process id.

    Raises:
        OSError: the server has ended.
    """

    def __init__(self, function: str, argument: Any) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(start(), [b"+"], [theirs.fileno()])
        self._lines = self.socket.makefile("r")
        # As for a child of ours.
        request = {"function": function, "argument": argument, "environment": dict(os.environ)}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        pid = self._lines.readline()
        if not pid:
            raise BrokenPipeError
        self.pid = int(pid)

    def result(self, timeout_s: float | None = None) -> Any:
        """The function's result; None: the child has ended without one.

        Raises:
            TimeoutError: after the time limit; the child is killed.
        """
        self.socket.settimeout(timeout_s)
        try:
            return json.loads(self._lines.readline() or "null")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                select.select([self.socket], [], [], _UNWIND_S)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            raise


def call(function: str, argument: Any) -> Child:
    """Start a child of the server, if need be of a new server."""
    try:
        return Child(function, argument)
    except OSError:
        start.cache_clear()
        return Child(function, argument)


@functools.cache
def start() -> socket.socket:
    """Start the server, once; its imports take a while, so the earlier the better."""
    ours, theirs = socket.socketpair()
    with theirs:
        words = "-P", "-m", "paprscm.plugins.fork_server", str(theirs.fileno()), *_MODULES
        _servers.append(
            subprocess.Popen(
                [sys.executable, *words], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        )
    return ours


# Popen warns about a running process that is forgotten.
_servers: list[subprocess.Popen[bytes]] = []


def main() -> None:
    """Import the modules of the command line, and fork a child for each socket that comes."""
    _name("fork-server")
    # ^C reaches the whole foreground group; only Avocado and the children handle it.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # No zombies: no process waits for the children.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in sys.argv[2:]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()
    requests = socket.socket(fileno=int(sys.argv[1]))
    while handles := socket.recv_fds(requests, 1, 1)[1]:
        connection = socket.socket(fileno=handles[0])
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, on_interrupt)
        requests.close()
        _serve(connection)


def _serve(connection: socket.socket) -> None:
    """Call the requested function in this child, and end."""
    try:
        # A process that outlives this child must not hide its end.
        os.register_at_fork(after_in_child=connection.close)
        connection.sendall(b"%d\n" % os.getpid())
        with connection.makefile("r") as lines:
            request = json.loads(lines.readline())
        os.environ.clear()
        os.environ.update(request["environment"])
        module, _, name = request["function"].partition(":")
        _name(module.rpartition(".")[2])
        result = getattr(importlib.import_module(module), name)(request["argument"])
        # Avocado's process may have ended.
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(json.dumps(result).encode() + b"\n")
    except (SystemExit, KeyboardInterrupt):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _name(text: str) -> None:
    """Name this process for ps(1); its command line is that of the server."""
    Path("/proc/self/comm").write_text(text)


if __name__ == "__main__":
    main()
