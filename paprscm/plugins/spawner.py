# SPDX-License-Identifier: GPL-2.0-or-later
"""Spawner "paprscm": runners are forked from a process that has imported everything already.

With Avocado's own spawner each test imports Avocado and the suite again: half a second of CPU time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import Any

from avocado.core.nrunner.runnable import RUNNERS_REGISTRY_STANDALONE_EXECUTABLE
from avocado.plugins.spawners.process import ProcessSpawner, ProcessSpawnerHandle

from paprscm.plugins import fork_server

_KIND = "avocado-instrumented"
_FUNCTION = "paprscm.plugins.runner:run"


class Runner:
    """A runner, with the part of asyncio.subprocess.Process that ProcessSpawner uses."""

    def __init__(self, argv: list[str]) -> None:
        self._child = fork_server.call(_FUNCTION, argv)
        self.pid = self._child.pid
        self._child.socket.setblocking(False)
        self._end = asyncio.create_task(self._read_to_end())

    async def _read_to_end(self) -> None:
        while await asyncio.get_running_loop().sock_recv(self._child.socket, 16):
            pass

    async def wait(self) -> int:
        await asyncio.wait([self._end])
        return 0

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if not self._end.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkSpawner(ProcessSpawner):
    """Process spawner for instrumented tests; other kinds are started as by Avocado's own."""

    description = "Forks runners from a process that has imported the suite"

    def is_operational(self) -> bool:
        """Return True; and tell Avocado the runner, which it would start to query its kinds."""
        command = [sys.executable, "-m", "avocado.plugins.runners.avocado_instrumented"]
        RUNNERS_REGISTRY_STANDALONE_EXECUTABLE.setdefault(_KIND, command)
        return bool(super().is_operational())

    async def spawn_task(self, runtime_task: Any) -> bool:
        """Start the runner of a task."""
        task = runtime_task.task
        if task.runnable.kind != _KIND:
            return bool(await super().spawn_task(runtime_task))
        self.create_task_output_dir(runtime_task)
        argv = ["avocado-runner-avocado-instrumented", "task-run", *task.get_command_args()]
        runtime_task.spawner_handle = ProcessSpawnerHandle(Runner(argv))
        return True
