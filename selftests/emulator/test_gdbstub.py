# SPDX-License-Identifier: GPL-2.0-or-later
"""Client of the gdbstub: breakpoints, and a stub that answers wrongly, late or not at all."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from paprscm.emulator.gdbstub import Gdb, NotReachedError
from paprscm.errors import GuestLostError, HostError

COMMAND = re.compile(rb"\$([^#]*)#[0-9a-f]{2}")


def packet(body: str) -> bytes:
    return b"$%s#%02x" % (body.encode(), sum(body.encode()) & 0xFF)


class Stub:
    """A gdbstub in a thread.

    Args:
        sock: its end of the connection; it is closed at the answer "".
        answers: answers by command; other commands are answered with OK, None with silence.
    """

    def __init__(self, sock: socket.socket, answers: Mapping[str, bytes | None]) -> None:
        self.commands: list[str] = []
        self._sock, self._answers = sock, answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        received = b""
        with self._sock:
            while part := self._sock.recv(4096):
                received += part
                while command := COMMAND.search(received):
                    received = received[command.end() :]
                    self.commands.append(command[1].decode())
                    answer = self._answers.get(self.commands[-1], packet("OK"))
                    if answer == b"":
                        return
                    self._sock.sendall(b"+" + (answer or b""))

    def join(self) -> None:
        self._thread.join()


STOPPED = {"?": packet("T05thread:01;"), "c": packet("T05thread:02;")}


@contextmanager
def stub(answers: Mapping[str, bytes | None]) -> Iterator[tuple[Stub, socket.socket]]:
    ours, theirs = socket.socketpair()
    served = Stub(theirs, answers)
    try:
        yield served, ours
    finally:
        ours.close()
        served.join()


def test_a_breakpoint_is_set_and_removed() -> None:
    calls: list[str] = []
    with stub(STOPPED) as (served, sock):
        Gdb(sock).run_to(0xC000000001003558, limit_s=10, meanwhile=lambda: calls.append("runs"))
    assert served.commands == ["?", "Z0,c000000001003558,4", "c", "z0,c000000001003558,4"]
    assert calls == ["runs"]


def test_an_answer_may_arrive_in_parts() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"+$T05th")
        later = threading.Timer(0.05, theirs.sendall, [packet("T05thread:01;")[6:]])
        later.start()
        Gdb(ours)
        later.join()


def test_an_instruction_that_is_not_reached() -> None:
    polls: list[int] = []
    with stub({**STOPPED, "c": None}) as (_served, sock):
        gdb = Gdb(sock)
        with pytest.raises(NotReachedError, match="no vCPU has executed 0x400000 within"):
            gdb.run_to(0x400000, limit_s=0.1, alive=lambda: polls.append(1))
    assert polls


def test_a_lost_guest_is_noticed_at_once() -> None:
    def lost() -> None:
        raise GuestLostError("the guest panicked")

    with stub({**STOPPED, "c": None}) as (_served, sock):
        gdb = Gdb(sock)
        with pytest.raises(GuestLostError, match="panicked"):
            gdb.run_to(0x400000, limit_s=60, alive=lost)


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ({"Z0,400000,4": packet("E22")}, HostError, "answers 'E22' to 'Z0,400000,4'"),
        ({"Z0,400000,4": packet("")}, HostError, "answers '' to 'Z0"),
        ({"c": packet("T02thread:01;")}, GuestLostError, "stopped with 'T02thread:01;'"),
        ({"c": packet("W00")}, GuestLostError, "stopped with 'W00'"),
        ({"c": b""}, GuestLostError, "closed the connection"),
        ({"c": b"$T05#00"}, HostError, "wrong checksum"),
    ],
)
def test_wrong_answers(
    answers: Mapping[str, bytes | None], error: type[Exception], message: str
) -> None:
    with stub({**STOPPED, **answers}) as (_served, sock):
        gdb = Gdb(sock)
        with pytest.raises(error, match=re.escape(message)):
            gdb.run_to(0x400000, limit_s=10)


def test_another_server_is_refused() -> None:
    with stub({"?": packet("")}) as (_served, sock), pytest.raises(HostError, match=r"answers ''"):
        Gdb(sock)


class Monitor:
    """A monitor that starts a gdbstub."""

    def __init__(self, answers: Mapping[str, bytes | None]) -> None:
        self.answers = answers
        self._serving: threading.Thread | None = None
        self._stubs: list[Stub] = []
        self.lines: list[str] = []

    def hmp(self, line: str) -> str:
        self.lines.append(line)
        if line == "gdbserver none":
            return "Disabled gdbserver"
        path = re.fullmatch(r"gdbserver unix:(.*),server=on,wait=off", line)
        assert path is not None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path[1])
            listener.listen()
            client = listener.dup()

        def serve() -> None:
            with client:
                sock, _ = client.accept()
            self._stubs.append(Stub(sock, self.answers))

        self._serving = threading.Thread(target=serve)
        self._serving.start()
        return ""

    def commands(self) -> list[str]:
        """All commands that the stub received, after its client has disconnected."""
        assert self._serving is not None
        # The client may disconnect before the stub is in the list.
        self._serving.join()
        self._stubs[0].join()
        return self._stubs[0].commands


def test_the_machine_runs_at_the_end_of_the_context(tmp_path: Path) -> None:
    monitor = Monitor(STOPPED)
    with Gdb.of(monitor, tmp_path / "gdb") as gdb:  # type: ignore[arg-type]
        gdb.run_to(0x400000, limit_s=10)
    assert monitor.commands()[-1] == "D"
    assert monitor.lines[1:] == ["gdbserver none"]


def test_the_machine_stays_stopped_after_an_exception(tmp_path: Path) -> None:
    monitor = Monitor(STOPPED)
    with (
        pytest.raises(ZeroDivisionError),
        Gdb.of(monitor, tmp_path / "gdb"),  # type: ignore[arg-type]
    ):
        raise ZeroDivisionError
    assert monitor.commands() == ["?"]


def test_a_qemu_without_gdbstub(tmp_path: Path) -> None:
    class Refusing:
        hmp: Callable[[str], str] = staticmethod(lambda _line: "gdbstub: unsupported")

    with (
        pytest.raises(HostError, match="cannot be reached: "),
        Gdb.of(Refusing(), tmp_path / "gdb"),  # type: ignore[arg-type]
    ):
        pass
