# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor's client and a QEMU that goes away."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import pytest

from paprscm.emulator.qmp import Qmp
from paprscm.errors import GuestLostError

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


class EndedError(GuestLostError):
    """The reason of the end, which the caller of Qmp knows."""


def ended() -> None:
    raise EndedError("QEMU was ended from outside")


@pytest.fixture
def monitor() -> tuple[Qmp, socket.socket]:
    """A client that has just connected, and QEMU's end."""
    ours, theirs = socket.socketpair()

    def greet() -> None:
        theirs.sendall(json.dumps(GREETING).encode() + b"\n")
        theirs.recv(4096)
        theirs.sendall(b'{"return": {}}\n')

    thread = threading.Thread(target=greet)
    thread.start()
    qmp = Qmp(ours, on_disconnect=ended)
    thread.join()
    return qmp, theirs


def test_a_command_that_the_library_never_ends(
    monitor: tuple[Qmp, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    qmp, theirs = monitor

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(qmp._client, "execute", never)
    threading.Timer(0.2, theirs.shutdown, [socket.SHUT_RDWR]).start()
    started = time.monotonic()
    with pytest.raises(EndedError):
        qmp.execute("query-status")
    assert time.monotonic() - started < 10
    qmp.close()


def test_an_answer_before_the_end_counts(
    monitor: tuple[Qmp, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the library passes it on after it has noticed that QEMU disconnected."""
    qmp, theirs = monitor
    execute = qmp._client.execute

    async def late(*words: Any) -> object:
        answer = await execute(*words)
        await asyncio.sleep(0.05)
        return answer

    def answer_and_end() -> None:
        request = json.loads(theirs.recv(4096))
        theirs.sendall(json.dumps({"return": 1, "id": request["id"]}).encode() + b"\n")
        theirs.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(qmp._client, "execute", late)
    threading.Thread(target=answer_and_end).start()
    assert qmp.execute("quit") == 1
    with pytest.raises(EndedError):
        qmp.execute("query-status")
    qmp.close()
