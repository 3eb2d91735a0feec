# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands through guest_tools/agent.c, compiled for this host, on a pseudo terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
import time
import tty
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paprscm.channel.agent import Agent
from paprscm.channel.command import CommandResult, TimedOutError
from paprscm.errors import GuestLostError, HostError
from paprscm.paths import GUEST_TOOLS


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("agent") / "agent"
    source = GUEST_TOOLS / "agent.c"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", target, source], check=True)
    return target


@pytest.fixture
def agent(binary: Path) -> Iterator[Agent]:
    """The host's side of an agent that serves a pseudo terminal."""
    master, slave = os.openpty()
    tty.setraw(slave)
    ours, theirs = socket.socketpair()

    def to_guest() -> None:
        while data := theirs.recv(1 << 16):
            os.write(master, data)

    def to_host() -> None:
        # EIO: the agent has ended. EPIPE: our end was closed.
        with contextlib.suppress(OSError):
            while data := os.read(master, 1 << 16):
                theirs.sendall(data)

    # They keep `master`: one may be stuck in write(2) when the agent has ended.
    for task in (to_guest, to_host):
        threading.Thread(target=task, daemon=True).start()
    agent = Agent(ours)
    subprocess.run([binary, os.ttyname(slave)], check=True)
    os.close(slave)
    pid = int(run(agent, "echo $PPID").stdout)
    yield agent
    agent.close()
    os.kill(pid, signal.SIGKILL)


def alive() -> None:
    """A guest that is not lost."""


def run(agent: Agent, command: str, stdin: bytes = b"", timeout_s: float = 20) -> CommandResult:
    return agent.run(command, stdin=stdin, timeout_s=timeout_s, alive=alive)


def test_both_streams_and_the_status(agent: Agent) -> None:
    result = run(agent, "echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.status) == ("out\n", "err\n", 7)
    assert run(agent, "kill -SEGV $$").status == 255
    assert run(agent, "sh -c 'kill -SEGV $$'").status == 128 + 11
    assert run(agent, "/nonexistent").status == 127


def test_a_command_is_in_a_session_of_its_own_at_home(agent: Agent) -> None:
    pid, session = run(agent, "echo $$; ps -o sid= -p $$").stdout.split()
    assert pid == session
    assert run(agent, "pwd").stdout.strip() == os.environ["HOME"]
    # Signals that the agent ignores, or blocks, arrive; two of glibc's own it has ignored.
    masks = run(agent, "grep -E 'SigBlk|SigIgn' /proc/self/status").stdout.split()
    assert [int(mask, 16) & (1 << 31) - 1 for mask in masks[1::2]] == [0, 0]


def test_data_of_any_size_and_kind_come_back(agent: Agent) -> None:
    data = os.urandom(1 << 20)
    assert run(agent, "cat", data).stdout_bytes == data
    assert run(agent, "cat").stdout_bytes == b""
    # One that does not read to the end.
    assert run(agent, "head -c 3", b"abc" + data).stdout == "abc"
    assert run(agent, "true", data).status == 0


def test_many_commands_run_concurrently(agent: Agent) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(40) as pool:
        results = pool.map(lambda n: run(agent, f"sleep 0.5; cat; exit {n}", b"%d" % n), range(40))
        assert [(r.stdout, r.status) for r in results] == [(str(n), n) for n in range(40)]
    assert time.monotonic() - began < 10


def test_the_end_is_that_of_the_shell(agent: Agent) -> None:
    """As over ssh: all that was written until then is there, and nothing later is waited for."""
    began = time.monotonic()
    assert run(agent, "(sleep 5; echo late) & echo early").stdout == "early\n"
    assert time.monotonic() - began < 4
    large = run(agent, "head -c 3000000 /dev/zero; echo end")
    assert large.stdout_bytes == bytes(3_000_000) + b"end\n"
    assert run(agent, "sleep 5 > /dev/null 2>&1 & echo $!; exit 3").status == 3


def test_a_command_that_does_not_end_is_named(agent: Agent) -> None:
    with pytest.raises(
        TimedOutError, match=r"(?s)`echo so far.*0\.3 s; its output so far:\n    so far"
    ):
        run(agent, "echo so far; sleep 2", timeout_s=0.3)
    # Its late end is of no command.
    assert run(agent, "echo next").stdout == "next\n"


def test_close_wakes_who_waits(agent: Agent) -> None:
    threading.Timer(0.3, agent.close).start()
    with pytest.raises(GuestLostError, match="`sleep 9`: the port was closed"):
        run(agent, "sleep 9", timeout_s=50)
    with pytest.raises(GuestLostError):
        run(agent, "true")


def test_nothing_is_sent_while_the_guest_moves(agent: Agent) -> None:
    """A running command's output arrives; the next command waits."""
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(run, agent, "sleep 0.2; echo before")
        while not agent.answers(20):
            pass
        with agent.silent():
            late = pool.submit(run, agent, "echo after")
            assert running.result(20).stdout == "before\n"
            assert not late.done()
        assert late.result(20).stdout == "after\n"


def test_a_guest_that_does_not_take_its_input_cannot_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paprscm.channel.agent._TAKE_LIMIT_S", 0.1)
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Agent(ours)) as agent:
        assert not agent.answers(0.01)
        with pytest.raises(HostError, match="does not take"), agent.silent():
            pytest.fail("it moves")


def test_a_guest_that_takes_nothing_is_noticed_in_time() -> None:
    ours, _theirs = socket.socketpair()
    agent = Agent(ours)
    began = time.monotonic()
    assert not agent.answers(0.2)
    with pytest.raises(TimedOutError):
        run(agent, "cat", bytes(10 << 20), timeout_s=0.5)
    assert time.monotonic() - began < 5
    agent.close()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">cII", b"o", 1, 1 << 31),
        struct.pack(">cII", b"?", 1, 0),
        struct.pack(">cII", b"x", 1, 2) + b"ab",
        struct.pack(">cIIi", b"x", 1, 4, 0x7F),
    ],
)
def test_nonsense_is_a_lost_guest(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    agent = Agent(ours)
    threading.Timer(0.1, theirs.sendall, [frame]).start()
    with pytest.raises(GuestLostError, match="the agent's port: "):
        run(agent, "true")
