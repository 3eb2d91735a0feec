# SPDX-License-Identifier: GPL-2.0-or-later
"""The fork server and its children: they start, end, are killed, and outlive it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paprscm.host.keeper import start_time
from paprscm.plugins import fork_server, spawner
from paprscm.plugins.runner import monitor
from paprscm.plugins.spawner import Runner

# Functions for children of the server.
STAND_IN = """
import os, subprocess, sys, time
from pathlib import Path

def run(argv):
    target, seconds = argv
    part = Path(target + ".part")
    part.write_text(f"{os.getpid()} {os.getppid()} {Path('/proc/self/comm').read_text()}")
    part.rename(target)
    time.sleep(float(seconds))

def run_with_child(argv):
    if not (pid := os.fork()):
        time.sleep(100)
        os._exit(0)
    Path(argv[0] + ".child").write_text(str(pid))
    run(argv)

def facts(_):
    return [sys.path, os.environ.get("GIVEN"), sys.stdin.read()]

def end(_):
    sys.exit(3)

def fail(_):
    raise ValueError("in the child")
"""


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of its own for each test, without the suite's modules."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(fork_server, "_MODULES", ())
    monkeypatch.setattr(spawner, "_FUNCTION", "stand_in:run")
    fork_server.start.cache_clear()
    yield
    fork_server.start().close()
    fork_server.start.cache_clear()
    assert fork_server._servers.pop().wait(10) == 0


async def started(path: Path) -> tuple[int, int, str]:
    """The pid of a runner and of its parent, and its name, once it runs."""
    for _ in range(500):
        if path.exists():
            pid, parent, name = path.read_text().split()
            return int(pid), int(parent), name
        await asyncio.sleep(0.02)
    raise TimeoutError


async def gone(pid: int) -> None:
    """Return once a process has ended; its socket is closed a moment earlier."""
    while start_time(pid):
        await asyncio.sleep(0.01)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario(), 30)

    asyncio.run(main())


def test_runners_of_one_server_end_by_themselves(tmp_path: Path) -> None:
    async def scenario() -> None:
        paths = [tmp_path / str(number) for number in range(3)]
        runners = [Runner([str(path), "0.3"]) for path in paths]
        began = [await started(path) for path in paths]
        assert [pid for pid, _parent, _name in began] == [one.pid for one in runners]
        assert len({parent for _pid, parent, _name in began}) == 1
        assert {name for *_, name in began} == {"stand_in"}
        for one in runners:
            await one.wait()
            await one.wait()
            await gone(one.pid)

    play(scenario)


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_runner_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Also while a process that it has forked, such as that of the test, lives on."""
    monkeypatch.setattr(spawner, "_FUNCTION", "stand_in:run_with_child")

    async def scenario() -> None:
        one = Runner([str(tmp_path / "0"), "100"])
        await started(tmp_path / "0")
        child = int((tmp_path / "0.child").read_text())
        getattr(one, how)()
        await one.wait()
        assert start_time(child) != ""
        os.kill(child, signal.SIGKILL)
        # Its number may be that of another process now.
        monkeypatch.setattr(os, "kill", None)
        getattr(one, how)()

    play(scenario)


def test_runners_outlive_their_server(tmp_path: Path) -> None:
    async def scenario() -> None:
        one = Runner([str(tmp_path / "0"), "100"])
        _pid, parent, _name = await started(tmp_path / "0")
        os.kill(parent, signal.SIGKILL)
        assert fork_server._servers.pop().wait(10) == -signal.SIGKILL
        # A new server starts later runners.
        other = Runner([str(tmp_path / "1"), "0"])
        assert (await started(tmp_path / "1"))[1] != parent
        await other.wait()
        assert start_time(one.pid) != ""
        one.terminate()
        await one.wait()
        await gone(one.pid)

    play(scenario)


def test_a_server_that_is_killed_while_it_starts_is_replaced(tmp_path: Path) -> None:
    fork_server.start()
    fork_server._servers.pop().kill()
    assert fork_server.call("stand_in:facts", None).result() is not None


def test_a_child_has_our_environment_and_not_our_path(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_server.start()
    monkeypatch.setenv("GIVEN", "later")
    monkeypatch.syspath_prepend("/wrong")
    path, given, read = fork_server.call("stand_in:facts", None).result()
    assert "/wrong" in sys.path
    assert ("/wrong" in path, given, read) == (False, "later", "")


def test_a_child_without_a_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert fork_server.call("stand_in:end", None).result() is None
    assert fork_server.call("stand_in:fail", None).result() is None
    assert "ValueError: in the child" in capfd.readouterr().err


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
def test_a_child_that_takes_too_long_is_killed(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    child = fork_server.call("stand_in:run", [str(tmp_path / "0"), "100"])
    if error is KeyboardInterrupt:
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(error):
        child.result(0.2 if error is TimeoutError else None)
    child.socket.settimeout(10)
    assert child.socket.recv(1) == b""


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
    monkeypatch.setattr("paprscm.plugins.runner._STATUS_INTERVAL_S", 0.05)
    assert next(monitor(queue))["status"] == "running"
