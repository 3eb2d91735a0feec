# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypervisor calls from Python: a machine that runs only guest_tools/hcalls.c.

Without a kernel, and with VOF as firmware, the first call returns 0.2 s after the start. The
program only makes the calls; tests prepare and check them in Python.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from paprscm.debian.toolchain import PREFIX, compile_c
from paprscm.emulator.binary import Qemu
from paprscm.emulator.qmp import Qmp
from paprscm.errors import ConfigError, ContractError, Error, GuestLostError, HostError
from paprscm.hcall.mailbox import (
    MAILBOX_SIZE,
    MAILBOXES,
    Answer,
    Call,
    GuestMemory,
    Mailbox,
)
from paprscm.host.cache import Cache
from paprscm.host.lifetime import Lifetime
from paprscm.host.process import Process, describe_status
from paprscm.paths import GUEST_TOOLS
from paprscm.vm.argv import bare_argv, script
from paprscm.vm.backing_files import ScratchFiles
from paprscm.vm.machine import MIB, Board, Machine, Nvdimm
from paprscm.vm.sync_shim import Shim
from paprscm.vm.vm import Vm

FREE: Final = range(160 * MIB, 256 * MIB)
"""Unused guest memory, for a test's own data."""

# Floating point and vectors are disabled at the start; QEMU chooses the load address.
_FLAGS = (
    "-mbig-endian -m64 -mabi=elfv2 -mcpu=power8 -msoft-float -mno-altivec -mno-vsx "
    "-O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-stack-protector "
    "-fno-asynchronous-unwind-tables -nostdlib -static -Wl,-Ttext=0,--build-id=none"
)

# QEMU's own, include/hw/ppc/spapr.h: KVMPPC_H_RTAS and RTAS_START_CPU.
_H_RTAS, _START_CPU = 0xF000, 0x2006

_BUSY_POLLS = 200
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 1e-3
_START_LIMIT_S = 20.0


def compile_program(cache: Cache) -> Path:
    """Compile the program that makes the hcalls, unless the cache has it; return its path.

    Raises:
        HostError: the cross compiler is missing, or fails.
    """
    # VOF enters at the beginning of the linked program: hcalls.S.
    sources = [GUEST_TOOLS / "hcalls.S", GUEST_TOOLS / "hcalls.c"]
    return compile_c(cache, "hcalls", sources, compiler=f"{PREFIX}gcc", flags=_FLAGS)


class BareMachine(Lifetime):
    """A machine that makes hypervisor calls; use it as a context manager. Several may run at once.

    Args:
        qemu: the QEMU under test.
        program: returned by compile_program().
        machine: its DIMMs; with at least 256 MiB.
        folder: folder of qemu.log and qemu.sh, which stay.
        scratch_dir: folder of the backing files, which are removed with the machine.
        board: defaults for processors and memory; the firmware is always VOF.
        shim: loaded into this QEMU; see Vm.
        source: the machine whose state this one will load; call adopt() after that.
        shares_memory: map the same guest memory as `source`; only one of them may run at a time.
        incoming: QEMU's -incoming, once for each; only with `source`.

    Raises:
        ConfigError: the program cannot run on such a machine.
        HostError: on entering, QEMU or the program does not start.

    Attributes:
        vm: the QEMU.
        ready_s: time from QEMU's start to the start of the program, s.
        first_answer_s: time from QEMU's start to the end of the first batch, s; 0 before that.
    """

    vm: Vm
    _memory: GuestMemory

    def __init__(
        self,
        qemu: Qemu,
        program: Path,
        machine: Machine,
        *,
        folder: Path,
        scratch_dir: Path,
        board: Board | None = None,
        shim: Shim | None = None,
        source: BareMachine | None = None,
        shares_memory: bool = False,
        incoming: Sequence[str] = ("defer",),
    ) -> None:
        self.board = board = replace(machine.board(board or Board()), firmware="vof")
        if board.memory_mib < FREE.stop // MIB:
            raise ConfigError(
                f"{board.memory_mib} MiB are not enough for a bare machine",
                hint=f"at least {FREE.stop // MIB}",
            )
        if MAILBOXES + board.smp * MAILBOX_SIZE > FREE.start:
            raise ConfigError(f"{board.smp} vCPUs are too many for a bare machine")
        super().__init__()
        self.machine = machine
        self.ready_s = self.first_answer_s = 0.0
        self._qemu = qemu
        self._program = program
        self._folder = folder
        self._scratch_dir = scratch_dir
        self._shim = shim
        self._source = source
        self._shares_memory = shares_memory
        self._incoming = [word for uri in incoming for word in ("-incoming", uri)]
        self._running: list[int] = []
        self._kept = b""
        self._gates = itertools.count(1)

    @property
    def qmp(self) -> Qmp:
        """QEMU's monitor."""
        return self.vm.qmp

    @property
    def process(self) -> Process:
        """The QEMU's process."""
        return self.vm.process

    def file(self, slot: int) -> Path:
        """The backing file of the DIMM in `slot`."""
        return self.vm.file(slot)

    def plug(self, nvdimm: Nvdimm) -> None:
        """Plug a DIMM, whose calls work at once; RefusedError if QEMU refuses it."""
        self.vm.plug(nvdimm)

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory; ValueError if there is none at that address."""
        return self._memory.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory (see FREE); ValueError if there is none at that address."""
        self._memory.write(address, data)

    def call(self, opcode: int, *args: int) -> Answer:
        """Make one call on vCPU 0; as batch()."""
        return self.batch([Call(opcode, args)])[0]

    def batch(
        self, calls: Iterable[Call], *, cpu: int = 0, timeout_s: float = 10.0
    ) -> list[Answer]:
        """Make any number of calls, one after the other, and return their answers.

        Args:
            calls: the calls.
            cpu: the vCPU that makes them.
            timeout_s: time limit of all calls.

        Raises:
            ValueError: the vCPU does not run, or has another batch.
            GuestLostError: QEMU ended; with the call in progress.
            KilledError: QEMU was ended from outside.
            ContractError: a call does not return in time.
            HostError: the program in the machine failed.
        """
        self.start(calls, cpu)
        return self.finish(cpu, timeout_s)

    def start(self, calls: Iterable[Call], cpu: int = 0) -> None:
        """Start a batch without waiting for its end; call finish() later.

        finish() sends the calls beyond mailbox.MAX_CALLS.

        Raises:
            ValueError: as batch().
        """
        self._free_box(cpu).begin(calls)

    def finish(self, cpu: int = 0, timeout_s: float = 10.0) -> list[Answer]:
        """Wait for the end of the batch of start(); raises as batch().

        It may be called again for a batch that did not end in time.
        """
        return self._finish(cpu, time.monotonic() + timeout_s)

    def in_progress(self, cpu: int = 0) -> int:
        """Index of the current call in a vCPU's batch; the number of calls at the end.

        Raises:
            ValueError: the vCPU has no batch.
        """
        return self._busy_box(cpu).in_progress

    def together(
        self, work: Mapping[int, Iterable[Call]], timeout_s: float = 10.0
    ) -> dict[int, list[Answer]]:
        """Make calls on several vCPUs, which begin at the same moment; raises as batch().

        Args:
            work: the calls of each vCPU.
            timeout_s: time limit of all calls.
        """
        deadline = time.monotonic() + timeout_s
        boxes = {cpu: self._free_box(cpu) for cpu in work}
        batches = {cpu: list(calls) for cpu, calls in work.items()}
        if not all(batches.values()):
            raise ValueError("there is no call for one of the vCPUs")
        gate = next(self._gates)
        for cpu, calls in batches.items():
            boxes[cpu].begin(calls, gate=gate)
        self._wait(
            lambda: all(box.is_at_gate for box in boxes.values()),
            deadline,
            lambda: HostError("not all vCPUs came to the gate in time"),
        )
        self._boxes[0].open_gate(gate)
        return {cpu: self._finish(cpu, deadline) for cpu in work}

    def start_cpus(self, count: int) -> None:
        """Start the program on vCPUs 0 to count - 1; vCPUs that already run continue.

        Raises:
            ValueError: the machine has fewer vCPUs.
            ContractError: QEMU does not start a vCPU (RTAS start-cpu).
        """
        if not 1 <= count <= self.board.smp:
            raise ValueError(f"{count} vCPUs of {self.board.smp}")
        first = self._boxes[0]
        for cpu in range(1, count):
            if cpu in self._running:
                continue
            before = self._boxes[cpu].generation
            # Token, number of arguments, number of results, arguments, result.
            request = struct.pack(">6Ii", _START_CPU, 3, 1, cpu, first.entry, cpu, -1)
            self.write(first.spare, request)
            answer = self.call(_H_RTAS, first.spare)
            (status,) = struct.unpack(">i", self.read(first.spare + len(request) - 4, 4))
            if answer.code or status:
                raise ContractError(f"start-cpu of vCPU {cpu}: status {status} ({answer})")
            self._wait_for_start(cpu, before, _START_LIMIT_S)

    def reset(self, *, timeout_s: float = _START_LIMIT_S) -> None:
        """Reset the machine and wait until the program runs again, on vCPU 0 only.

        The batches of the vCPUs are dropped; memory stays unchanged.

        Raises:
            GuestLostError: QEMU ended.
            HostError: the program does not start in time.
        """
        before = self._boxes[0].generation
        self.qmp.execute("system_reset")
        self._running.clear()
        self._wait_for_start(0, before, timeout_s)
        for box in self._boxes:
            box.end()

    def keep_awake(self, awake: bool) -> None:
        """Keep the vCPUs from sleeping, as a migration requires, or let them sleep again.

        QEMU before 8.2 does not start the decrementer after a migration
        (known_issues/qemu-decr-not-migrated.md), so that a vCPU that sleeps would not wake up.
        """
        boxes = [self._boxes[cpu] for cpu in self._running]
        for box in boxes:
            box.keep_awake(awake)
        if awake:
            self._wait(
                lambda: not any(box.is_asleep for box in boxes),
                time.monotonic() + _START_LIMIT_S,
                lambda: HostError("a vCPU does not wake up"),
            )

    def remember(self) -> None:
        """Keep a copy of what the program has in memory, for go_on(); the machine is stopped.

        A destination with the same memory changes it: mailboxes and the stacks behind them.
        """
        self._kept = self.read(MAILBOXES, self.board.smp * MAILBOX_SIZE)

    def go_on(self) -> None:
        """Continue the machine as it was at remember()."""
        self.write(MAILBOXES, self._kept)
        self.qmp.execute("cont")
        self.keep_awake(False)

    def adopt(self) -> None:
        """Continue the batches of the source, or its own, after its state was loaded."""
        if source := self._source:
            self._running = list(source._running)
            for box, other in zip(self._boxes, source._boxes, strict=True):
                box.take_over(other)
        self.keep_awake(False)

    def _start(self) -> None:
        source = self._source
        shared = source._memory if source is not None and self._shares_memory else None
        self._memory = GuestMemory(self.board.memory_mib * MIB, shared)
        self._resources.callback(self._memory.close)
        self._boxes = [Mailbox(self._memory, cpu) for cpu in range(self.board.smp)]

        files = ScratchFiles(self._scratch_dir, self.machine.nvdimms)
        self._resources.enter_context(files)
        parts = (self._qemu.argv_prefix, self.machine, self.board, files.paths)
        # The memory that we share is of no use to a person who runs the script.
        by_hand = [*bare_argv(*parts, program=self._program), "-monitor", "stdio"]
        incoming = () if source is None else self._incoming
        self.vm = Vm(
            [*bare_argv(*parts, program=self._program, memory_fd=self._memory.fd), *incoming],
            files,
            folder=self._folder,
            by_hand=script(by_hand, self.machine.nvdimms, files.paths),
            pass_fds=(self._memory.fd,),
            shim=self._shim,
        )
        self._resources.enter_context(self.vm)
        if source is not None:
            return
        self._wait_for_start(0, 0, _START_LIMIT_S)
        self.ready_s = time.monotonic() - self.vm.exec_s

    def _wait_for_start(self, cpu: int, before: int, timeout_s: float) -> None:
        box = self._boxes[cpu]

        def late() -> HostError:
            state = box.exception or "nothing happens"
            return HostError(f"{self._program} does not start on vCPU {cpu}: {state}")

        self._wait(lambda: box.generation != before, time.monotonic() + timeout_s, late)
        self._running.append(cpu)

    def _free_box(self, cpu: int) -> Mailbox:
        """The mailbox of a vCPU that has no batch."""
        if cpu not in self._running:
            raise ValueError(f"vCPU {cpu} does not run")
        box = self._boxes[cpu]
        if not box.is_free:
            # First report a problem of the machine, if there is one.
            self._check()
            raise ValueError(f"vCPU {cpu} has a batch already")
        return box

    def _busy_box(self, cpu: int) -> Mailbox:
        """The mailbox of a vCPU that has a batch."""
        if cpu not in self._running or self._boxes[cpu].is_free:
            raise ValueError(f"vCPU {cpu} has no batch")
        return self._boxes[cpu]

    def _finish(self, cpu: int, deadline: float) -> list[Answer]:
        box = self._busy_box(cpu)
        # Another vCPU's long batch must not wait for this one before its next part is sent.
        others = [self._boxes[other] for other in self._running if other != cpu]

        def is_done() -> bool:
            for other in others:
                other.advance()
            return box.advance()

        def late() -> ContractError:
            if box.current is None:
                return ContractError(f"vCPU {cpu} did not begin with its calls in time")
            place = f"call {box.in_progress + 1} of {len(box.calls)}"
            return ContractError(f"{box.current} on vCPU {cpu}, {place}, did not return in time")

        self._wait(is_done, deadline, late)
        self.first_answer_s = self.first_answer_s or time.monotonic() - self.vm.exec_s
        return box.end()

    def _wait(
        self, is_done: Callable[[], bool], deadline: float, late: Callable[[], Error]
    ) -> None:
        """Wait for the program, first busily: most waits take microseconds."""
        for _ in range(_BUSY_POLLS):
            if is_done():
                return
        pause_s = _SHORTEST_SLEEP_S
        while not is_done():
            self._check()
            if time.monotonic() > deadline:
                raise late()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_SLEEP_S)

    def _check(self) -> None:
        """Raise an error if QEMU or the program has failed."""
        status = self.process.wait(0)
        if status is not None:
            raise GuestLostError(
                f"QEMU ended, {describe_status(status)}, while it {self._doing()}; "
                f"it said:\n{self.vm.output()}"
            )
        for cpu in self._running:
            if exception := self._boxes[cpu].exception:
                raise HostError(f"vCPU {cpu} took {exception}; QEMU {self._doing()}")

    def _doing(self) -> str:
        """Description of the calls that QEMU executes for the vCPUs."""
        calls = {cpu: self._boxes[cpu].current for cpu in self._running}
        busy = [f"{call} on vCPU {cpu}" for cpu, call in calls.items() if call]
        return f"executed {' and '.join(busy)}" if busy else "had no call to execute"
