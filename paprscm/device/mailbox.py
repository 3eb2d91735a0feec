# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypervisor calls and their answers as data, and the guest memory through which they travel.

The other end is guest_tools/hcalls.c; struct mailbox and struct call there are the layout here.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from paprscm.papr import Hcall, return_code_name

TIMEBASE_HZ: Final = 512_000_000
"""The frequency of the timebase (QEMU include/hw/ppc/spapr.h:SPAPR_TIMEBASE_FREQ)."""

REGISTERS: Final = 9
"""Number of arguments of a call, and of outputs in addition to its return code: r4 to r12."""

MAILBOXES: Final = 128 << 20
"""The guest address of the first vCPU's mailbox."""
MAILBOX_SIZE: Final = 1 << 20
MAX_CALLS: Final = 3824
"""Number of calls that fit into a mailbox."""

_CALLS, _CALL_SIZE = 0x1000, 256
_SPARE = 0x800
_IN, _OUT = struct.Struct(">13Q"), struct.Struct(">q13Q")
_POLL = 1
_MASK = (1 << 64) - 1
_NOT_BEGUN = _MASK


class _Word(IntEnum):
    """The words that a mailbox begins with."""

    VECTOR = 0
    SRR0 = 1
    SRR1 = 2
    DAR = 3
    DSISR = 4
    GENERATION = 5
    ENTRY = 6
    REQUEST = 7
    RESPONSE = 8
    COUNT = 9
    GATE = 10
    ARRIVED = 11
    INDEX = 12
    OPEN = 13


@dataclass(frozen=True)
class Call:
    """A hypervisor call to make, once or repeatedly.

    Attributes:
        opcode: its number, r3.
        args: r4 to r12, 64 bits each; negative ones in two's complement; missing ones are 0.
        times: how often to make it: just so often, or with `poll` at most so often.
        poll: repeat only for as long as the answer is H_LONG_BUSY_ORDER_*, and give what came back
            in r4 as the second argument (the token of H_SCM_FLUSH).
        pause_us: how long to wait between two polls, µs; the vCPU sleeps meanwhile.

    Raises:
        ValueError: no call can be like that.
    """

    opcode: int
    args: tuple[int, ...] = ()
    times: int = 1
    poll: bool = False
    pause_us: float = 0

    def __post_init__(self) -> None:
        if not 0 <= self.opcode <= _MASK:
            raise ValueError(f"opcode {self.opcode:#x} is not a 64-bit number")
        if len(self.args) > REGISTERS:
            raise ValueError(f"{len(self.args)} arguments; a call has {REGISTERS}")
        for argument in self.args:
            if not -(1 << 63) <= argument <= _MASK:
                raise ValueError(f"argument {argument:#x} is not a 64-bit number")
        if not 1 <= self.times <= _MASK:
            raise ValueError(f"a call cannot be made {self.times} times")
        if not 0 <= self.pause_us <= 1e9:
            raise ValueError(f"a pause of {self.pause_us:g} µs is not possible")

    def __str__(self) -> str:
        """As in "H_SCM_HEALTH(0x90000000)"; a call that is not in papr.py stays a number."""
        try:
            name = Hcall(self.opcode).name
        except ValueError:
            name = f"hypervisor call {self.opcode:#x} "
        return f"{name}({', '.join(f'{argument & _MASK:#x}' for argument in self.args)})"


@dataclass(frozen=True)
class Answer:
    """Answer to a call, the last time that it was made.

    Attributes:
        code: the return code, r3, as a signed number.
        outputs: r4 to r12, unsigned.
        made: how often it was made.
        busy: how many of these times the answer was H_LONG_BUSY_ORDER_*.
        began: the timebase before the first time, ticks; all vCPUs have the same.
        ended: the timebase after the last time, ticks.
    """

    code: int
    outputs: tuple[int, ...]
    made: int
    busy: int
    began: int
    ended: int

    @property
    def duration_s(self) -> float:
        """From before the first time to after the last, by the guest's clock, s."""
        return (self.ended - self.began) / TIMEBASE_HZ

    def __str__(self) -> str:
        """As in "H_SUCCESS, 0x0, 0x8000000000000000": without the zeros at the end."""
        used = len(self.outputs)
        while used and not self.outputs[used - 1]:
            used -= 1
        words = [return_code_name(self.code), *(f"{word:#x}" for word in self.outputs[:used])]
        return ", ".join(words) + (f" (call {self.made})" if self.made > 1 else "")


class GuestMemory:
    """A guest's memory, shared with us: a file without a name.

    Args:
        size_bytes: how much of it there is; a multiple of the page size.

    Attributes:
        fd: the file, for QEMU.
    """

    def __init__(self, size_bytes: int) -> None:
        self.fd = os.memfd_create("paprscm-memory")
        try:
            os.truncate(self.fd, size_bytes)
            self._bytes = mmap.mmap(self.fd, size_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        # An access through it is one load or one store; struct's are byte by byte.
        self._words = memoryview(self._bytes).cast("Q")

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory.

        Raises:
            ValueError: it does not lie within the memory.
        """
        self._check(address, length)
        return self._bytes[address : address + length]

    def write(self, address: int, data: bytes) -> None:
        """Put data at a guest address; code that has run already must not be changed so.

        Raises:
            ValueError: it does not lie within the memory.
        """
        self._check(address, len(data))
        self._bytes[address : address + len(data)] = data

    def load(self, address: int) -> int:
        """The big-endian word of 64 bits at an aligned address, which the guest may write to."""
        return _swapped(self._words[address >> 3])

    def store(self, address: int, value: int) -> None:
        """Put a word at an aligned address; the guest never sees a part of it."""
        self._words[address >> 3] = _swapped(value)

    def put_call(self, address: int, call: Call) -> None:
        """Fill in the first part of a struct call."""
        arguments = [argument & _MASK for argument in call.args]
        arguments += [0] * (REGISTERS - len(arguments))
        flags = _POLL if call.poll else 0
        pause = round(call.pause_us * TIMEBASE_HZ / 1e6)
        _IN.pack_into(self._bytes, address, call.opcode, *arguments, call.times, flags, pause)

    def get_answer(self, address: int) -> Answer:
        """Read the second part of a struct call."""
        code, *outputs, made, busy, began, ended = _OUT.unpack_from(self._bytes, address + _IN.size)
        return Answer(code, tuple(outputs), made, busy, began, ended)

    def close(self) -> None:
        """Give our share of it back."""
        self._words.release()
        self._bytes.close()
        os.close(self.fd)

    def _check(self, address: int, length: int) -> None:
        if length < 0 or not 0 <= address <= len(self._bytes) - length:
            raise ValueError(f"{length} bytes at {address:#x} are not in the guest's memory")


def _swapped(value: int) -> int:
    """Between the guest's byte order and ours."""
    return int.from_bytes(value.to_bytes(8, "big"), sys.byteorder)


class Mailbox:
    """One vCPU's mailbox, and the batch of calls on its way through it.

    Args:
        memory: the guest's memory.
        cpu: the vCPU's number.

    Attributes:
        spare: a guest address with room for 2 KiB, for other purposes.
        calls: the batch.
        is_free: there is no batch.
    """

    def __init__(self, memory: GuestMemory, cpu: int) -> None:
        self._memory = memory
        self._start = MAILBOXES + cpu * MAILBOX_SIZE
        self.spare = self._start + _SPARE
        self.calls: list[Call] = []
        self.is_free = True
        self._answers: list[Answer] = []
        self._sent = 0

    @property
    def generation(self) -> int:
        """Another one each time that the vCPU starts."""
        return self._load(_Word.GENERATION)

    @property
    def entry(self) -> int:
        """The guest address at which another vCPU can be started."""
        return self._load(_Word.ENTRY)

    @property
    def exception(self) -> str | None:
        """The exception that ended the program on this vCPU, in words; None if there was none."""
        vector = self._load(_Word.VECTOR)
        if not vector:
            return None
        others = (_Word.SRR0, _Word.SRR1, _Word.DAR, _Word.DSISR)
        registers = ", ".join(f"{word.name} {self._load(word):#x}" for word in others)
        return f"exception {vector:#x} ({registers})"

    @property
    def is_at_gate(self) -> bool:
        """The vCPU has seen the batch and waits for its gate."""
        return self._load(_Word.ARRIVED) == self._load(_Word.REQUEST)

    @property
    def in_progress(self) -> int:
        """Which call of the batch is being made, from 0; their number when all were."""
        index = self._load(_Word.INDEX)
        return len(self._answers) + (index if index <= self._sent else 0)

    @property
    def current(self) -> Call | None:
        """The call that is being made, if one is."""
        index = self._load(_Word.INDEX)
        return self.calls[len(self._answers) + index] if index < self._sent else None

    def begin(self, calls: Iterable[Call], *, gate: int = 0) -> None:
        """Ask for a batch; only when there is none.

        Args:
            calls: what to do.
            gate: if not 0, wait before the first one until open_gate() of this number.
        """
        self.calls = list(calls)
        self.is_free = False
        self._answers = []
        self._send(gate)

    def open_gate(self, gate: int) -> None:
        """Let all vCPUs go that wait there; only the first one's mailbox has it."""
        self._store(_Word.OPEN, gate)

    def advance(self) -> bool:
        """Take the answers that are there, send what is left to send; whether all is answered."""
        if self._sent and self._load(_Word.RESPONSE) == self._load(_Word.REQUEST):
            self._answers += [
                self._memory.get_answer(self._place(number)) for number in range(self._sent)
            ]
            self._send()
        return not self._sent

    def end(self) -> list[Answer]:
        """The answers so far; from now on there is no batch."""
        self.is_free = True
        self._sent = 0
        return self._answers

    def _send(self, gate: int = 0) -> None:
        """Send as many of the calls that are left as there is room for."""
        done = len(self._answers)
        calls = self.calls[done : done + MAX_CALLS]
        self._sent = len(calls)
        if not calls:
            return
        for number, call in enumerate(calls):
            self._memory.put_call(self._place(number), call)
        self._store(_Word.COUNT, len(calls))
        self._store(_Word.GATE, gate)
        self._store(_Word.INDEX, _NOT_BEGUN)
        self._store(_Word.REQUEST, self._load(_Word.REQUEST) + 1)

    def _place(self, number: int) -> int:
        return self._start + _CALLS + number * _CALL_SIZE

    def _load(self, word: _Word) -> int:
        return self._memory.load(self._start + 8 * word)

    def _store(self, word: _Word, value: int) -> None:
        self._memory.store(self._start + 8 * word, value)
