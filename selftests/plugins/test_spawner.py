# SPDX-License-Identifier: GPL-2.0-or-later
"""Runners that are forked from a warm process: they start, end, are killed, and outlive it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paprscm.host.keeper import start_time
from paprscm.plugins import spawner
from paprscm.plugins.runner_server import monitor

# In the place of Avocado's runner: writes its pid and waits for as long as it is asked to.
RUNNER = """
import os, sys, time
from pathlib import Path
from paprscm.plugins import runner_server

def runner():
    target, seconds = sys.argv
    part = Path(target + ".part")
    part.write_text(f"{os.getpid()} {os.getppid()} {Path('/proc/self/comm').read_text()}")
    part.rename(target)
    time.sleep(float(seconds))

runner_server._MODULES = ()
runner_server.avocado_instrumented.main = runner
runner_server.main()
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start servers whose runners are the stand-in."""
    (tmp_path / "stand_in.py").write_text(RUNNER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(spawner, "_MODULE", "stand_in")


async def started(path: Path) -> tuple[int, int, str]:
    """The pid of a runner and of its parent, and its name, once it runs."""
    for _ in range(500):
        if path.exists():
            pid, parent, name = path.read_text().split()
            return int(pid), int(parent), name
        await asyncio.sleep(0.02)
    raise TimeoutError


Scenario = Callable[[spawner._Server], Awaitable[None]]


def play(scenario: Scenario) -> None:
    async def main() -> None:
        server = spawner._Server()
        await asyncio.wait_for(scenario(server), 30)

    asyncio.run(main())


def test_runners_of_one_server_end_by_themselves(tmp_path: Path) -> None:
    async def scenario(server: spawner._Server) -> None:
        paths = [tmp_path / str(number) for number in range(3)]
        runners = await asyncio.gather(*(server.spawn([str(path), "0.3"]) for path in paths))
        began = [await started(path) for path in paths]
        assert [pid for pid, _parent, _name in began] == [one.pid for one in runners if one]
        assert len({parent for _pid, parent, _name in began}) == 1
        assert {name for *_, name in began} == {"runner"}
        for one in runners:
            assert one is not None
            await one.wait()
            assert not Path(f"/proc/{one.pid}").exists()

    play(scenario)


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_runner_is_ended(tmp_path: Path, how: str) -> None:
    async def scenario(server: spawner._Server) -> None:
        one = await server.spawn([str(tmp_path / "0"), "100"])
        assert one is not None
        await started(tmp_path / "0")
        getattr(one, how)()
        await one.wait()
        # Its number may be that of another process now.
        getattr(one, how)()

    play(scenario)


def test_runners_outlive_their_server(tmp_path: Path) -> None:
    async def scenario(server: spawner._Server) -> None:
        one = await server.spawn([str(tmp_path / "0"), "2"])
        assert one is not None
        pid, parent, _name = await started(tmp_path / "0")
        os.kill(parent, signal.SIGKILL)
        began = time.monotonic()
        # Later runners are started as by Avocado's own spawner.
        while await server.spawn([str(tmp_path / "1"), "0"]) is not None:
            await asyncio.sleep(0.05)
        await one.wait()
        assert 0.5 < time.monotonic() - began < 10
        assert start_time(pid) == ""

    play(scenario)


def test_the_server_ends_with_its_socket(tmp_path: Path) -> None:
    """Which the kernel closes however the job ends."""

    async def scenario(server: spawner._Server) -> None:
        await server.spawn([str(tmp_path / "0"), "0"])
        assert server._writer is not None
        server._writer.close()
        assert await server._process.wait() == 0

    play(scenario)


@pytest.fixture
def queue() -> Iterator[Any]:
    yield multiprocessing.SimpleQueue()


def test_messages_are_passed_on_as_they_come(queue: Any) -> None:
    """Avocado's own loop takes 10 ms for each (known_issues/avocado-delays-messages.md)."""
    count = 300
    queue.put({"type": "early_state"})
    for number in range(count):
        queue.put({"type": "log", "number": number})
    queue.put({"status": "finished"})
    began = time.monotonic()
    passed = list(monitor(queue))
    assert time.monotonic() - began < count * 0.010 / 2
    assert [one.get("number") for one in passed] == [*range(count), None]


def test_a_silent_test_is_reported_as_running(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paprscm.plugins.runner_server._STATUS_INTERVAL_S", 0.05)
    assert next(monitor(queue))["status"] == "running"
