# SPDX-License-Identifier: GPL-2.0-or-later
"""Spawner "paprscm": runners are forked from a process that has imported everything already.

With Avocado's own spawner each test imports Avocado and the suite again: half a second of CPU time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

from avocado.plugins.spawners.process import ProcessSpawner, ProcessSpawnerHandle

from paprscm.host.keeper import start_time

_KIND = "avocado-instrumented"
_MODULE = "paprscm.plugins.runner_server"
# Interval of the check for a runner whose server was killed, s.
_POLL_S = 0.1


class _Runner:
    """A runner, with the part of asyncio.subprocess.Process that ProcessSpawner uses."""

    def __init__(self, server: _Server, pid: int) -> None:
        self.pid = pid
        self._server = server

    async def wait(self) -> int:
        await self._server.end_of(self.pid)
        return 0

    def terminate(self) -> None:
        self._server.send(signal=signal.SIGTERM, pid=self.pid)

    def kill(self) -> None:
        self._server.send(signal=signal.SIGKILL, pid=self.pid)


class _Server:
    """The process that forks runners, and what it has reported."""

    def __init__(self) -> None:
        self._started: asyncio.Queue[int | None] = asyncio.Queue()
        self._ended: dict[int, asyncio.Event] = {}
        self._begun: dict[int, str] = {}
        self._starting = asyncio.Lock()
        self._alive = True
        self._writer: asyncio.StreamWriter | None = None

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", _MODULE),
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))

    async def spawn(self, argv: list[str]) -> _Runner | None:
        """Start a runner; None: the server has ended."""
        async with self._starting:
            if self._writer is None:
                await self._start()
            if not self._alive:
                return None
            self.send(start=argv)
            pid = await self._started.get()
        if pid is None:
            return None
        return _Runner(self, pid)

    def send(self, **request: Any) -> None:
        if self._writer is not None and self._alive:
            self._writer.write(json.dumps(request).encode() + b"\n")
        elif "signal" in request and start_time(request["pid"]) == self._begun[request["pid"]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(request["pid"], request["signal"])

    async def end_of(self, pid: int) -> None:
        """Wait until a runner has ended, also when the server was killed."""
        ended = asyncio.ensure_future(self._ended[pid].wait())
        await asyncio.wait({ended, self._reading}, return_when=asyncio.FIRST_COMPLETED)
        # Not a child of ours: only the server could wait for it.
        while not ended.done() and start_time(pid) == self._begun[pid]:
            await asyncio.sleep(_POLL_S)  # Only after the server was killed.
        ended.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                report = json.loads(line)
                if "started" in report:
                    self._ended[report["started"]] = asyncio.Event()
                    self._begun[report["started"]] = start_time(report["started"])
                    self._started.put_nowait(report["started"])
                else:
                    self._ended[report["ended"]].set()
        self._alive = False
        self._started.put_nowait(None)


class ForkSpawner(ProcessSpawner):
    """Process spawner for instrumented tests; other kinds are started as by Avocado's own."""

    description = "Forks runners from a process that has imported the suite"
    _server: _Server | None = None

    @staticmethod
    async def check_task_requirements(runtime_task: Any) -> bool:
        """Return True if there is a runner; Avocado starts one to learn that, for half a second."""
        if runtime_task.task.runnable.kind == _KIND:
            return True
        return bool(await ProcessSpawner.check_task_requirements(runtime_task))

    async def spawn_task(self, runtime_task: Any) -> bool:
        """Start the runner of a task."""
        task = runtime_task.task
        if task.runnable.kind == _KIND:
            self.create_task_output_dir(runtime_task)
            if self._server is None:
                self._server = _Server()
            argv = ["avocado-runner-avocado-instrumented", "task-run", *task.get_command_args()]
            runner = await self._server.spawn(argv)
            if runner is not None:
                runtime_task.spawner_handle = ProcessSpawnerHandle(runner)
                return True
        return bool(await super().spawn_task(runtime_task))
