# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypervisor calls and their answers as data, and mailboxes in guest memory that transfer them.

The counterpart is guest_tools/hcalls.c, whose struct mailbox and struct call define the layout.
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

from paprscm.papr import HCALL_REGISTERS, Hcall, return_code_name

TIMEBASE_HZ: Final = 512_000_000
"""The frequency of the timebase (QEMU include/hw/ppc/spapr.h:SPAPR_TIMEBASE_FREQ)."""

MAILBOXES: Final = 128 << 20
"""The guest address of the first vCPU's mailbox."""
MAILBOX_SIZE: Final = 1 << 20
MAX_CALLS: Final = 3824
"""Number of calls that fit into a mailbox."""

_CALLS, _CALL_SIZE = 0x1000, 256
_SPARE = 0x800
_IN, _OUT = struct.Struct(">13Q"), struct.Struct(">q13Q")
_POLL, _READ = 1, 2
_MASK = (1 << 64) - 1
_NOT_STARTED = _MASK


class _Word(IntEnum):
    """Index of each word at the beginning of a mailbox."""

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
    AWAKE = 14
    ASLEEP = 15


@dataclass(frozen=True)
class Call:
    """A hypervisor call to make, once or repeatedly.

    Attributes:
        opcode: its number, r3.
        args: r4 to r12, 64 bits each; negative ones in two's complement; missing ones are 0.
        times: number of repetitions; with `poll` the maximum.
        poll: repeat only while the return code is H_LONG_BUSY_ORDER_*, with the returned r4 as
            second argument (the token of H_SCM_FLUSH).
        pause_us: pause between two polls, µs; the vCPU sleeps meanwhile.
        reads: read 8 bytes at the real address args[0] into r4, instead of a call; the opcode is of
            no effect.

    Raises:
        ValueError: a field is out of range.
    """

    opcode: int
    args: tuple[int, ...] = ()
    times: int = 1
    poll: bool = False
    pause_us: float = 0
    reads: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.opcode <= _MASK:
            raise ValueError(f"opcode {self.opcode:#x} is not a 64-bit number")
        if len(self.args) > HCALL_REGISTERS:
            raise ValueError(f"{len(self.args)} arguments; a call has {HCALL_REGISTERS}")
        if self.reads and not self.args:
            raise ValueError("a read without an address")
        for argument in self.args:
            if not -(1 << 63) <= argument <= _MASK:
                raise ValueError(f"argument {argument:#x} is not a 64-bit number")
        if not 1 <= self.times <= _MASK:
            raise ValueError(f"a call cannot be made {self.times} times")
        if not 0 <= self.pause_us <= 1e9:
            raise ValueError(f"a pause of {self.pause_us:g} µs is not possible")

    def __str__(self) -> str:
        """Such as "H_SCM_HEALTH(0x90000000)"; an opcode that is not in papr.py stays a number."""
        if self.reads:
            return f"read of {self.args[0]:#x}"
        try:
            name = Hcall(self.opcode).name
        except ValueError:
            name = f"hypervisor call {self.opcode:#x} "
        return f"{name}({', '.join(f'{argument & _MASK:#x}' for argument in self.args)})"


@dataclass(frozen=True)
class Answer:
    """Answer to the last repetition of a call.

    Attributes:
        code: the return code, r3, as a signed number.
        outputs: r4 to r12, unsigned.
        count: number of repetitions.
        busy: number of repetitions that returned H_LONG_BUSY_ORDER_*.
        begin_ticks: timebase before the first repetition, common to all vCPUs.
        end_ticks: timebase after the last repetition.
    """

    code: int
    outputs: tuple[int, ...]
    count: int
    busy: int
    begin_ticks: int
    end_ticks: int

    @property
    def duration_s(self) -> float:
        """Duration of all repetitions by the guest's clock, s."""
        return (self.end_ticks - self.begin_ticks) / TIMEBASE_HZ

    def __str__(self) -> str:
        """Such as "H_SUCCESS, 0x0, 0x8000000000000000", without trailing zeros."""
        used = len(self.outputs)
        while used and not self.outputs[used - 1]:
            used -= 1
        words = [return_code_name(self.code), *(f"{word:#x}" for word in self.outputs[:used])]
        return ", ".join(words) + (f" (call {self.count})" if self.count > 1 else "")


class GuestMemory:
    """A guest's memory in a memfd that we share.

    Args:
        size_bytes: its size; a multiple of the page size.
        shared: map this memory instead of a new one; each of them can be closed first.

    Attributes:
        fd: the memfd, for QEMU.
    """

    fd: int

    def __init__(self, size_bytes: int, shared: GuestMemory | None = None) -> None:
        self.fd = os.dup(shared.fd) if shared else os.memfd_create("paprscm-memory")
        try:
            os.truncate(self.fd, size_bytes)
            self._bytes = mmap.mmap(self.fd, size_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        # Each access through it is one load or store; those of struct are bytewise.
        self._words = memoryview(self._bytes).cast("Q")

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory.

        Raises:
            ValueError: the range is not within the memory.
        """
        self._check(address, length)
        return self._bytes[address : address + length]

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory; must not change code that has already run.

        Raises:
            ValueError: the range is not within the memory.
        """
        self._check(address, len(data))
        self._bytes[address : address + len(data)] = data

    def load(self, address: int) -> int:
        """Read a big-endian 64-bit word at an aligned address, in one access."""
        return _swapped(self._words[address >> 3])

    def store(self, address: int, value: int) -> None:
        """Write a big-endian 64-bit word at an aligned address, in one access."""
        self._words[address >> 3] = _swapped(value)

    def put_call(self, address: int, call: Call) -> None:
        """Write the first part of a struct call."""
        arguments = [argument & _MASK for argument in call.args]
        arguments += [0] * (HCALL_REGISTERS - len(arguments))
        flags = (_POLL if call.poll else 0) | (_READ if call.reads else 0)
        pause = round(call.pause_us * TIMEBASE_HZ / 1e6)
        _IN.pack_into(self._bytes, address, call.opcode, *arguments, call.times, flags, pause)

    def get_answer(self, address: int) -> Answer:
        """Read the second part of a struct call."""
        code, *outputs, count, busy, begin_ticks, end_ticks = _OUT.unpack_from(
            self._bytes, address + _IN.size
        )
        return Answer(code, tuple(outputs), count, busy, begin_ticks, end_ticks)

    def close(self) -> None:
        """Unmap and close it."""
        self._words.release()
        self._bytes.close()
        os.close(self.fd)

    def _check(self, address: int, length: int) -> None:
        if length < 0 or not 0 <= address <= len(self._bytes) - length:
            raise ValueError(f"{length} bytes at {address:#x} are not in the guest's memory")


def _swapped(value: int) -> int:
    """Convert between the guest's byte order and ours."""
    return int.from_bytes(value.to_bytes(8, "big"), sys.byteorder)


class Mailbox:
    """One vCPU's mailbox, and the current batch of calls.

    Args:
        memory: the guest's memory.
        cpu: the vCPU's number.

    Attributes:
        spare: a guest address with 2 KiB for other purposes.
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
        """A number that changes with each start of the vCPU."""
        return self._load(_Word.GENERATION)

    @property
    def entry(self) -> int:
        """The guest address at which another vCPU can be started."""
        return self._load(_Word.ENTRY)

    @property
    def exception(self) -> str | None:
        """Description of the exception that ended the program on this vCPU, or None."""
        vector = self._load(_Word.VECTOR)
        if not vector:
            return None
        others = (_Word.SRR0, _Word.SRR1, _Word.DAR, _Word.DSISR)
        registers = ", ".join(f"{word.name} {self._load(word):#x}" for word in others)
        return f"exception {vector:#x} ({registers})"

    @property
    def is_at_gate(self) -> bool:
        """True if the vCPU has received the batch and waits at its gate."""
        return self._load(_Word.ARRIVED) == self._load(_Word.REQUEST)

    @property
    def in_progress(self) -> int:
        """Index of the current call in the batch; the number of calls at the end."""
        index = self._load(_Word.INDEX)
        return len(self._answers) + (index if index <= self._sent else 0)

    @property
    def current(self) -> Call | None:
        """The call in progress, or None."""
        index = self._load(_Word.INDEX)
        return self.calls[len(self._answers) + index] if index < self._sent else None

    @property
    def is_asleep(self) -> bool:
        """True if the vCPU sleeps, or is about to."""
        return bool(self._load(_Word.ASLEEP))

    def keep_awake(self, awake: bool) -> None:
        """Keep the vCPU from sleeping between polls, or let it sleep again."""
        self._store(_Word.AWAKE, awake)

    def begin(self, calls: Iterable[Call], *, gate: int = 0) -> None:
        """Start a batch; the mailbox must be free.

        Args:
            calls: the calls.
            gate: if not 0, the vCPU waits before the first call for open_gate() with this number.
        """
        self.calls = list(calls)
        self.is_free = False
        self._answers = []
        self._send(gate)

    def open_gate(self, gate: int) -> None:
        """Release all vCPUs that wait at this gate; for the mailbox of vCPU 0 only."""
        self._store(_Word.OPEN, gate)

    def advance(self) -> bool:
        """Read available answers and send the next calls; return True at the end of the batch."""
        if self._sent and self._load(_Word.RESPONSE) == self._load(_Word.REQUEST):
            self._answers += [
                self._memory.get_answer(self._place(number)) for number in range(self._sent)
            ]
            self._send()
        return not self._sent

    def take_over(self, other: Mailbox) -> None:
        """Continue the batch of another mailbox, whose machine has migrated to this one."""
        self.calls, self.is_free = other.calls, other.is_free
        self._answers, self._sent = other._answers, other._sent

    def end(self) -> list[Answer]:
        """End the batch, and return the answers so far."""
        self.is_free = True
        self._sent = 0
        return self._answers

    def _send(self, gate: int = 0) -> None:
        """Send as many of the remaining calls as fit."""
        answered = len(self._answers)
        calls = self.calls[answered : answered + MAX_CALLS]
        self._sent = len(calls)
        if not calls:
            return
        for number, call in enumerate(calls):
            self._memory.put_call(self._place(number), call)
        self._store(_Word.COUNT, len(calls))
        self._store(_Word.GATE, gate)
        self._store(_Word.INDEX, _NOT_STARTED)
        self._store(_Word.REQUEST, self._load(_Word.REQUEST) + 1)

    def _place(self, number: int) -> int:
        return self._start + _CALLS + number * _CALL_SIZE

    def _load(self, word: _Word) -> int:
        return self._memory.load(self._start + 8 * word)

    def _store(self, word: _Word, value: int) -> None:
        self._memory.store(self._start + 8 * word, value)
