# SPDX-License-Identifier: GPL-2.0-or-later
"""Answer hypervisor calls of a running Linux instead of QEMU: answers that QEMU never gives.

Linux makes calls that have outputs, all those of storage class memory but H_SCM_WRITE_METADATA, in
plpar_hcall() (arch/powerpc/platforms/pseries/hvCall.S). QEMU's gdbstub stops the guest at its
instruction `sc 1`, before QEMU sees the call; so any kernel and any QEMU will do, unchanged.

A CPU cannot continue at a breakpoint, and while it makes a single step no other one runs. So a call
that QEMU is to answer is made by the `sc 1` of plpar_hcall_raw(), which Linux itself needs only for
kexec. Each stop takes some 50 ms; hence `until`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from paprscm.emulator.gdbstub import PC, Gdb
from paprscm.errors import CapabilityError, GuestLostError
from paprscm.host.lifetime import Lifetime
from paprscm.papr import Hcall, ReturnCode, return_code_name
from paprscm.vm.vm import Vm

_FUNCTION = "plpar_hcall(_trace)?"
_SPARE = "plpar_hcall_raw"
SYMBOLS: Final = f"grep -A 1 -E ' ({_FUNCTION}|{_SPARE})$' /proc/kallsyms"
"""Shell command for the guest, run as root; `call_sites` reads its output."""
_SYMBOL = re.compile(r"([0-9a-f]{16}) \w (\S+)")
_SC_1 = 0x44000022
_INSTRUCTION = 4
# The longest function so far has 0x7c bytes; behind the last symbol nothing is searched.
_MOST_BYTES = 512
# Effective address of real address 0 in the kernel (arch/powerpc, PAGE_OFFSET).
_LINEAR = 0xC000000000000000
_HCALLS = frozenset(map(int, Hcall))
_ARGUMENTS = range(4, 10)
_OUTPUTS = range(4, 8)
# Time limit for a stop of the guest, on a busy host, s.
_STOP_LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer to a call.

    Attributes:
        code: r3.
        outputs: r4 to r7; missing ones are 0.
        memory: bytes by the real address to which the hypervisor writes them.
    """

    code: int
    outputs: tuple[int, ...] = ()
    memory: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of storage class memory.

    Attributes:
        hcall: the call.
        arguments: r4 to r9.
        read: reads memory of the guest by address in the kernel, or real address, and size; only
            before the call is answered.
    """

    hcall: Hcall
    arguments: tuple[int, ...]
    read: Callable[[int, int], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Answered:
    """A call with its answer.

    Attributes:
        call: the call.
        code: r3, as a signed number.
        outputs: r4 to r7.
        interposed: the answer is not QEMU's.
    """

    call: Call
    code: int
    outputs: tuple[int, ...]
    interposed: bool

    def __str__(self) -> str:
        words = ", ".join(f"{word:#x}" for word in self.call.arguments)
        return f"{self.call.hcall.name}({words}) = {return_code_name(self.code)}"


class _Passed(NamedTuple):
    """A call that QEMU answers, and the address at which its caller continues."""

    call: Call | None
    pc: int


Answer = Callable[[Call], Reply | None]
"""Chooses the answer to a call; None: QEMU answers it."""


@dataclass(frozen=True)
class CallSites:
    """Addresses of instructions `sc 1` of a kernel.

    Attributes:
        used: those that make its calls.
        spare: one that is not used otherwise.
    """

    used: tuple[int, ...]
    spare: int


def call_sites(symbols: str, read: Callable[[int, int], bytes]) -> CallSites:
    """Find the instructions `sc 1` in the functions of a symbol table.

    Args:
        symbols: the output of SYMBOLS: each function and the symbol behind it.
        read: reads memory by address in the kernel and size.

    Raises:
        CapabilityError: the kernel does not show its functions.
    """
    starts = sorted({(int(m[1], 16), m[2]) for m in _SYMBOL.finditer(symbols)})
    found: dict[str, list[int]] = {}
    for (start, name), (end, _next) in itertools.pairwise(starts):
        if name == _SPARE or re.fullmatch(_FUNCTION, name):
            code = read(start, min(end - start, _MOST_BYTES))
            found[name] = [
                start + at
                for at in range(0, len(code), _INSTRUCTION)
                if int.from_bytes(code[at : at + _INSTRUCTION], "little") == _SC_1
            ]
    spare = found.pop(_SPARE, [])
    used = [address for addresses in found.values() for address in addresses]
    if not spare or not used:
        raise CapabilityError(
            "the kernel's hypervisor calls were not found",
            hint="/proc/kallsyms must show plpar_hcall (CONFIG_KALLSYMS, kptr_restrict=0)",
        )
    return CallSites(tuple(used), spare[0])


class Interposer(Lifetime):
    """Answers calls of storage class memory while the context is active.

    Other hypervisor calls go to QEMU.

    Args:
        vm: the guest's QEMU.
        symbols: the output of SYMBOLS.
        answer: chooses the answers; it is called in a thread.
        until: ends with the first call of this kind, which QEMU answers, and which is not recorded.

    Attributes:
        calls: all calls of storage class memory with their answers.

    Raises:
        CapabilityError: see `call_sites`.
        GuestLostError: QEMU ended, or does not stop the guest.
    """

    def __init__(self, vm: Vm, symbols: str, answer: Answer, *, until: Hcall | None = None) -> None:
        super().__init__()
        self._vm = vm
        self._symbols = symbols
        self._answer = answer
        self._until = until
        self._error: Exception | None = None
        self._passed: dict[int, _Passed] = {}
        self._sites = CallSites((), 0)
        self._ending = False
        self._running = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="interposer", daemon=True)
        self.calls: list[Answered] = []

    def _start(self) -> None:
        path = self._vm.scratch / "gdb"
        self._gdb = self._resources.enter_context(Gdb.of(self._vm.qmp, path))
        self._gdb.prepare_access()
        self._sites = call_sites(self._symbols, self._read)
        for address in (*self._sites.used, self._sites.spare + _INSTRUCTION):
            self._gdb.break_at(address)
        self._gdb.run()
        self._thread.start()
        self._resources.callback(self._stop)

    def _stop(self) -> None:
        """Stop the guest; after an error it stays stopped."""
        # QEMU ignores it while the guest is stopped; the thread has the error of a QEMU that ended.
        with self._running, contextlib.suppress(OSError):
            self._ending = True
            self._gdb.interrupt()
        self._thread.join(_STOP_LIMIT_S)
        if self._thread.is_alive():
            raise GuestLostError(f"QEMU did not stop the guest within {_STOP_LIMIT_S:g} s")
        if self._error is not None:
            raise self._error

    def made(self, *hcalls: Hcall) -> list[Answered]:
        """The calls of some kinds, in their order."""
        return [one for one in self.calls if one.call.hcall in hcalls]

    def _serve(self) -> None:
        try:
            while True:
                vcpu = self._gdb.wait()
                if vcpu is not None:
                    self._gdb.select(vcpu)
                    self._handle()
                with self._running:
                    if self._ending and not self._passed:
                        return
                    self._gdb.run()
        except Exception as error:  # raised again by _stop()
            self._error = error

    def _handle(self) -> None:
        # The stack identifies the call: between two stops an interrupt may make calls of its own,
        # and the task may move to another CPU.
        pc, stack = self._gdb.register(PC), self._gdb.register(1)
        if pc == self._sites.spare + _INSTRUCTION:
            passed = self._passed.pop(stack)
            if passed.call is not None:
                self._note(passed.call, interposed=False)
            self._gdb.set_register(PC, passed.pc)
            return
        number, call, reply = self._gdb.register(3), None, None
        if number == self._until:
            for address in self._sites.used:
                self._gdb.remove_break(address)
            return
        if number in _HCALLS:
            call = Call(
                hcall=Hcall(number),
                arguments=self._registers(_ARGUMENTS),
                read=self._read,
            )
            reply = self._answer(call)
        if call is None or reply is None:
            self._passed[stack] = _Passed(call, pc + _INSTRUCTION)
            self._gdb.set_register(PC, self._sites.spare)
            return
        for address, data in reply.memory.items():
            self._gdb.write(address, data)
        outputs = (*reply.outputs, *[0] * len(_OUTPUTS))
        for register, value in zip((3, *_OUTPUTS), (reply.code, *outputs), strict=False):
            self._gdb.set_register(register, value % (1 << 64))
        self._note(call, interposed=True)
        self._gdb.set_register(PC, pc + _INSTRUCTION)

    def _note(self, call: Call, *, interposed: bool) -> None:
        (code,) = self._registers((3,))
        signed = code - (1 << 64) if code >> 63 else code
        self.calls.append(Answered(call, signed, self._registers(_OUTPUTS), interposed))

    def _read(self, address: int, size: int) -> bytes:
        return self._gdb.read(address & ~_LINEAR, size)

    def _registers(self, numbers: Iterable[int]) -> tuple[int, ...]:
        return tuple(self._gdb.register(number) for number in numbers)


def script(**replies: Sequence[Reply]) -> Answer:
    """Return an answer that gives the replies of each call in their order, and then QEMU's.

    Args:
        replies: the replies by the call's name.
    """
    left = {Hcall[name]: list(sequence) for name, sequence in replies.items()}

    def answer(call: Call) -> Reply | None:
        sequence = left.get(call.hcall)
        return sequence.pop(0) if sequence else None

    return answer


def busy(token: int, code: ReturnCode = ReturnCode.H_BUSY) -> Reply:
    """The reply that asks the caller to continue with a token."""
    return Reply(code=code, outputs=(token,))
