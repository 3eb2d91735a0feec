# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers instead of QEMU's: the interposer and its client of the gdbstub, against a fake stub."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paprscm.emulator.gdbstub import PC
from paprscm.errors import CapabilityError, GuestLostError, HostError
from paprscm.hcall.interposer import Answer, Interposer, Reply, busy, call_sites, script
from paprscm.papr import Hcall, ReturnCode

BASE = 0xC000000000001000
SYMBOLS = f"""\
{BASE:016x} T plpar_hcall
{BASE + 0x20:016x} t plpar_hcall_trace
{BASE + 0x40:016x} T plpar_hcall_norets
--
{BASE + 0x60:016x} T plpar_hcall_raw
{BASE + 0x80:016x} T plpar_hcall9
"""
SC_1 = bytes.fromhex("22000044")
NOP = bytes.fromhex("00000060")
# Each function's third instruction.
CODE = b"".join((NOP * 2 + SC_1 + NOP * 5) for _ in range(4))
CALL, TRACE, SPARE = BASE + 8, BASE + 0x28, BASE + 0x68
FLUSH = Hcall.H_SCM_FLUSH


@dataclass
class Cpu:
    """Registers of a CPU, by number; others are 0."""

    registers: dict[int, int] = field(default_factory=dict)


def at(address: int, number: int = FLUSH, *, stack: int = 0x100, drc: int = 0x90000003) -> Cpu:
    """A CPU at an instruction, with the arguments of a call."""
    return Cpu({PC: address, 1: stack, 3: number, 4: drc, 5: 7})


class Stub:
    """A gdbstub whose guest stops as listed: thread and CPU; then it runs until interrupted."""

    def __init__(self, folder: Path, stops: list[tuple[str, Cpu]], *, unasked: bytes = b"") -> None:
        self.scratch = folder
        self.qmp = SimpleNamespace(hmp=self.hmp, execute=lambda *_words: None)
        self.stops = stops
        self.unasked = unasked
        self.cpu = Cpu()
        self.breakpoints: list[int] = []
        self.detached = False
        self.closes_at = ""
        self.written: dict[int, bytes] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def hmp(self, line: str) -> str:
        """The monitor's command gdbserver."""
        if line == "gdbserver none":
            self._thread.join(5)
            self._listener.close()
            return ""
        path = re.fullmatch(r"gdbserver unix:(.*),server=on,wait=off", line)
        assert path
        self._listener.bind(path[1])
        self._listener.listen(1)
        self._thread.start()
        return ""

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock:
            if self.unasked:
                sock.sendall(frame(self.unasked))
            data = b""
            while True:
                received = sock.recv(4096)
                if not received:
                    return
                data += received.replace(b"+", b"")
                while match := re.match(rb"\$([^#]*)#..|\x03", data):
                    data = data[match.end() :]
                    if match[1] is not None and match[1].decode() == self.closes_at:
                        return
                    answer = b"T02thread:01;" if match[1] is None else self._answer(match[1])
                    if answer is not None:
                        sock.sendall(frame(answer))

    def _answer(self, packet: bytes) -> bytes | None:
        text = packet.decode()
        match text[0], re.split("[,=:]", text[1:]):
            case "?", _:
                return b"T05thread:01;"
            case "q", _:
                return b"l"
            case "c", _:
                if not self.stops:
                    return None
                thread, self.cpu = self.stops.pop(0)
                return f"T05thread:{thread};".encode()
            case "p", [number]:
                return (
                    self.cpu.registers.get(int(number, 16), 0).to_bytes(8, "little").hex().encode()
                )
            case "P", [number, value]:
                self.cpu.registers[int(number, 16)] = int.from_bytes(bytes.fromhex(value), "little")
            case "m", [address, size]:
                start = int(address, 16) - (BASE & 0xFFFF)
                if not 0 <= start < len(CODE):
                    return b"E14"
                return CODE[start : start + int(size, 16)].hex().encode()
            case "M", [address, _size, content]:
                self.written[int(address, 16)] = bytes.fromhex(content)
            case "Z", [_kind, address, _size]:
                self.breakpoints.append(int(address, 16))
            case "z", [_kind, address, _size]:
                self.breakpoints.remove(int(address, 16))
            case "D", _:
                self.detached = True
        return b"OK"


def frame(content: bytes) -> bytes:
    """A packet."""
    return b"+$%s#%02x" % (content, sum(content) % 256)


@contextlib.contextmanager
def interposed(stub: Stub, answer: Answer, **options: Any) -> Iterator[Interposer]:
    """An interposer that has handled all stops of the stub."""
    with Interposer(stub, SYMBOLS, answer, **options) as interposer:  # type: ignore[arg-type]
        deadline = threading.Event()
        while stub.stops and not deadline.wait(0.01):
            pass
        yield interposer
    assert stub.detached


def test_the_call_sites_of_a_kernel() -> None:
    sites = call_sites(SYMBOLS, lambda address, size: CODE[address - BASE :][:size])
    assert sites.used == (CALL, TRACE)
    assert sites.spare == SPARE


@pytest.mark.parametrize("missing", ["plpar_hcall_raw", r"plpar_hcall$|plpar_hcall_trace"])
def test_a_kernel_without_symbols_is_refused(missing: str) -> None:
    lines = "\n".join(line for line in SYMBOLS.splitlines() if not re.search(missing, line))
    with pytest.raises(CapabilityError, match="were not found"):
        call_sites(lines, lambda address, size: CODE[address - BASE :][:size])


def test_an_answer_is_given_instead_of_qemu(tmp_path: Path) -> None:
    cpu = at(TRACE)
    stub = Stub(tmp_path, [("01", cpu)], unasked=b"T02thread:01;")
    reply = Reply(code=ReturnCode.H_HARDWARE, outputs=(5, 6), memory={0x40: b"xyz"})
    with interposed(stub, script(H_SCM_FLUSH=[reply])) as interposer:
        pass
    (answered,) = interposer.calls
    assert answered.call.arguments == (0x90000003, 7, 0, 0, 0, 0)
    assert (answered.code, answered.outputs, answered.interposed) == (-1, (5, 6, 0, 0), True)
    assert cpu.registers[PC] == TRACE + 4
    assert cpu.registers[3] == (1 << 64) - 1
    assert stub.written == {0x40: b"xyz"}


def test_other_calls_go_to_qemu(tmp_path: Path) -> None:
    begun, ended = at(CALL), at(SPARE + 4)
    ended.registers[3] = 0
    other, other_ended = at(CALL, 0x58, stack=0x200), at(SPARE + 4, 0x58, stack=0x200)
    stops = [("01", begun), ("02", ended), ("01", other), ("01", other_ended)]
    with interposed(Stub(tmp_path, stops), script()) as interposer:
        pass
    assert begun.registers[PC] == other.registers[PC] == SPARE
    assert ended.registers[PC] == other_ended.registers[PC] == CALL + 4
    (answered,) = interposer.calls
    assert (answered.code, answered.interposed) == (0, False)


def test_an_interrupt_may_make_a_call_within_another_one(tmp_path: Path) -> None:
    stops = [
        ("01", at(CALL, stack=0x100)),
        ("01", at(TRACE, 0x58, stack=0x200)),
        ("01", inner := at(SPARE + 4, stack=0x200)),
        ("02", outer := at(SPARE + 4, stack=0x100)),
    ]
    with interposed(Stub(tmp_path, stops), script()) as interposer:
        pass
    assert (inner.registers[PC], outer.registers[PC]) == (TRACE + 4, CALL + 4)
    assert [one.call.hcall for one in interposer.calls] == [FLUSH]


def test_the_last_call_ends_it(tmp_path: Path) -> None:
    last = at(CALL, Hcall.H_SCM_HEALTH)
    stub = Stub(tmp_path, [("01", last)])
    with interposed(stub, script(), until=Hcall.H_SCM_HEALTH) as interposer:
        pass
    assert interposer.calls == []
    assert stub.breakpoints == [SPARE + 4]
    assert last.registers[PC] == CALL


def test_an_error_in_an_answer_is_raised_at_the_end(tmp_path: Path) -> None:
    def answer(_call: object) -> Reply:
        raise HostError("no answer")

    with (
        pytest.raises(HostError, match="no answer"),
        interposed(Stub(tmp_path, [("01", at(CALL))]), answer),
    ):
        pass


def test_replies_are_given_in_their_order(tmp_path: Path) -> None:
    cpus = [at(CALL) for _ in range(3)]
    replies = [busy(11), busy(12, ReturnCode.H_LONG_BUSY_ORDER_1_MSEC), Reply(code=0)]
    stops = [("01", cpu) for cpu in cpus]
    with interposed(Stub(tmp_path, stops), script(H_SCM_FLUSH=replies)) as interposer:
        pass
    assert [(one.code, one.outputs[0]) for one in interposer.calls] == [(1, 11), (9900, 12), (0, 0)]


def test_a_qemu_that_ends_is_reported(tmp_path: Path) -> None:
    stub = Stub(tmp_path, [("01", at(CALL))])
    stub.closes_at = "p40"
    with (
        pytest.raises(GuestLostError, match="closed the connection"),
        Interposer(stub, SYMBOLS, script()),  # type: ignore[arg-type]
    ):
        pass


def test_a_kernel_that_is_not_found_leaves_the_machine_running(tmp_path: Path) -> None:
    stub = Stub(tmp_path, [])
    with pytest.raises(CapabilityError), Interposer(stub, "", script()):  # type: ignore[arg-type]
        pass
