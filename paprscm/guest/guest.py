# SPDX-License-Identifier: GPL-2.0-or-later
"""A running pseries guest: started on entry, controlled by its methods, ended on exit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from paprscm import log
from paprscm.channel.agent import Agent
from paprscm.channel.command import CommandResult, TimedOutError, counted, log_command
from paprscm.channel.console import StartTimes, StuckError, wait_until_ready
from paprscm.channel.kmsg import Trouble
from paprscm.channel.verbs import Verbs
from paprscm.errors import ConfigError, ContractError, Error, GuestLostError, HostError
from paprscm.guest.channels import Channels
from paprscm.guest.dimm_content import GuestDimms
from paprscm.guest.equipment import Equipment
from paprscm.guest.snapshot import NotRestoredError, Snapshot, load_state
from paprscm.host.lifetime import Lifetime
from paprscm.host.process import describe_status
from paprscm.vm.argv import MemoryFile, qemu_argv, script
from paprscm.vm.backing_files import ScratchFiles, copy_content
from paprscm.vm.machine import MIB, Machine, Nvdimm, in_words
from paprscm.vm.sync_shim import Shim
from paprscm.vm.vm import Vm

if TYPE_CHECKING:
    from paprscm.channel.ssh import Ssh

# Last messages of a kernel without the drivers of this machine.
_NO_ROOT = re.compile(r"Unable to mount root|No working init|Cannot open root|: no root disk")
_NO_ROOT_HINT = "the kernel needs virtio_pci, virtio_blk and ext4, built in or in modules="


class Guest(Verbs, Lifetime):
    """One guest; use it as a context manager.

    Args:
        equipment: the parts that all guests of a run have in common.
        machine: the guest's machine.
        folder: folder for console.log, qemu.log and qemu.sh, which are kept.
        allowed: expected kernel messages (regular expressions); any other Oops, BUG, WARNING,
            lockup or driver error fails the method that runs at that moment.
        mirror: stream that receives a copy of the console output, in addition to console.log.
        snapshot: state to restore instead of booting; it must fit the machine.
        memory_file: file that becomes the memory of a guest that will be saved.
        shim: preloaded into its QEMU, to record and disturb the syncs of the backing files.
        migrates: the guest may continue at another QEMU, see successor().
        during_boot: called with the guest before its machine, which boots, executes the first
            instruction; it may let the machine run.

    Raises:
        NotRestoredError: the restored guest does not run.
        GuestLostError: the guest did not boot.
        HostError: QEMU did not start.
    """

    def __init__(
        self,
        equipment: Equipment,
        machine: Machine,
        *,
        folder: Path,
        allowed: Iterable[str] = (),
        mirror: TextIO | None = None,
        snapshot: Snapshot | None = None,
        memory_file: Path | None = None,
        shim: Shim | None = None,
        migrates: bool = False,
        during_boot: Callable[[Guest], object] | None = None,
    ) -> None:
        super().__init__()
        self._migrates = migrates
        self._during_boot = during_boot
        self._mirror = mirror
        self._shim = shim
        self._snapshot = snapshot
        self._memory = snapshot.memory if snapshot else None
        if memory_file is not None:
            self._memory = MemoryFile(path=memory_file, restored=False)
        self.machine = machine
        self.board = machine.board(equipment.board)
        self.dimms = GuestDimms(equipment.contents, self.file)
        self.tools = equipment.tools
        self.folder = folder
        self.times = StartTimes()
        self._equipment = equipment
        self._settings = equipment.settings
        self._allowed = [re.compile(pattern) for pattern in allowed]
        self._event = threading.Event()
        self._reported = False
        self._lost_reason = ""
        self._marks = itertools.count(1)
        self._ssh: Ssh | None = None
        self._agent: Agent | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Do not repeat a report that a test has provoked and caught.
        must_report = error is None and not self._reported
        try:
            if must_report:
                self.check()
        finally:
            self.close()
        # The last lines of the console were read only now; they may report a fault.
        if must_report and (trouble := self.console.trouble):
            raise self._report(trouble)

    def run(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        """Run a command by the guest's /bin/sh; any exit status is accepted.

        Args:
            command: shell, one line or several.
            timeout_s: time limit, s; None: the setting command_limit_s.
            stdin: its standard input.

        Raises:
            GuestLostError: the command did not end within its limit, or the guest was lost.
            ContractError: the kernel printed a message that reports a fault.
        """
        self.check()
        limit_s = self._settings.command_limit_s if timeout_s is None else timeout_s
        channel = self._ssh if self._agent is None else self._agent
        assert channel is not None  # noqa: S101
        try:
            with counted(command):
                result = channel.run(command, stdin=stdin, timeout_s=limit_s, alive=self.check)
        except TimedOutError as error:
            self._lose(f"a command did not end within {limit_s:g} s")
            self._reported = True
            raise TimedOutError(
                f"{error.message}\n  the console ends with:\n{self.console.tail()}"
            ) from None
        except GuestLostError:
            # The connection may end shortly before the console shows the reason.
            self._event.wait(2.0)
            self.check()
            raise
        log_command(result)
        self.check()
        return result

    def plug(self, nvdimm: Nvdimm) -> None:
        """Plug a DIMM into the running guest, which notices it asynchronously.

        Raises:
            RefusedError: QEMU refuses it; then nothing has changed.
        """
        self.vm.plug(nvdimm)

    def file(self, slot: int) -> Path:
        """Return the backing file of the DIMM in `slot`."""
        return self.vm.file(slot)

    @contextlib.contextmanager
    def expect_messages(self, *patterns: str) -> Iterator[None]:
        """Expect kernel messages: inside this context they do not fail the test."""
        added = [re.compile(pattern) for pattern in patterns]
        self.console.allowed.extend(added)
        try:
            yield
            # Read all messages printed so far before they count as faults again.
            mark = f"paprscm: mark {next(self._marks)}"
            self.run(f"echo '<1>{mark}' > /dev/kmsg")
            # Only the mark's own line counts, however long the guest was silent before.
            self.console.wait_for(
                {"mark": re.compile(re.escape(mark) + "$")}, timeout_s=10, silence_s=float("inf")
            )
        finally:
            for pattern in added:
                self.console.allowed.remove(pattern)

    def check(self) -> None:
        """Raise if the guest is lost or its kernel has reported a fault.

        Raises:
            ContractError: an Oops, a warning, … that is not expected.
            GuestLostError: a panic, a hang, or the end of QEMU.
            KilledError: QEMU was killed from outside.
        """
        if not self._event.is_set():
            return
        self._reported = True
        # A call trace has many lines.
        self.console.settle()
        if trouble := self.console.trouble:
            raise self._report(trouble)
        reason = self._lost_reason
        if not reason:
            status = self.process.wait(2.0)
            how = "closed its console" if status is None else f"ended, {describe_status(status)}"
            reason = f"QEMU {how}; its output:\n{self.vm.output()}"
        raise GuestLostError(f"{reason}\n  the guest's console ends with:\n{self.console.tail()}")

    def _report(self, trouble: Trouble) -> Error:
        text = f"{trouble.text}\n  its console:\n{self.console.tail(30)}"
        no_root = any(_NO_ROOT.search(line) for line in self.console.lines)
        if no_root and self.times.init is None:
            return ConfigError(f"the guest's kernel has no root disk: {text}", hint=_NO_ROOT_HINT)
        kind = GuestLostError if trouble.fatal else ContractError
        return kind(f"the guest's kernel reports: {text}")

    def kill(self) -> None:
        """End QEMU with SIGKILL, like a power cut; the backing files remain."""
        self._lose("the guest was killed")
        self._reported = True
        self.process.kill()

    def hang_up(self) -> None:
        """Close the channels for commands; after connect() commands go over ssh."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self.disconnect()

    def disconnect(self) -> None:
        """Close the ssh connection."""
        if self._ssh is not None:
            self._ssh.close()

    def connect(self) -> Ssh:
        """Connect to the guest's ssh server, which may still be starting.

        Raises:
            GuestLostError: no connection within silence_limit_s, or the guest is lost.
        """
        # Most guests need no ssh, and paramiko takes a tenth of a second to import.
        from paprscm.channel.ssh import Ssh

        self._ssh = Ssh(
            port=self.ssh_port,
            client_key=self._equipment.client_key,
            host_key=self._equipment.host_key,
            timeout_s=self._settings.silence_limit_s,
            alive=self.check,
        )
        self._resources.callback(self._ssh.close)
        return self._ssh

    def _start(self) -> None:
        dimms = ", ".join(map(in_words, self.machine.nvdimms)) or "no DIMM"
        how = "restore" if self._snapshot else "boot"
        with log.step(f"{how} a guest ({dimms})"):
            self._start_qemu()
            if self._snapshot:
                try:
                    self._restore(self._snapshot)
                except NotRestoredError as error:
                    self._expect_not_killed(error)
                    raise
            else:
                self._boot()
            self._note("commands")

    def _start_qemu(self) -> None:
        """Start QEMU, with its console on a socket that it inherits."""
        # Exit order is the reverse: QEMU ends first, so that the console's reader reaches EOF.
        self._channels = self._resources.enter_context(
            Channels(on_event=self._on_event, allowed=self._allowed, mirror=self._mirror)
        )
        self.console, self._port = self._channels.console, self._channels.port
        self._agent = self._channels.agent
        if self._migrates:
            self._memory = self._own_memory()
        self._use(self._start_vm(self.machine, self.folder, self._shim))

    def _own_memory(self) -> MemoryFile:
        """Create the file of the memory of a guest that migrates; all its QEMUs map it."""
        handle = os.memfd_create("paprscm-memory")
        self._resources.callback(os.close, handle)
        os.ftruncate(handle, self.board.memory_mib * MIB)
        path = Path(f"/proc/{os.getpid()}/fd/{handle}")
        if self._memory is not None:
            copy_content(self._memory.path, path)
        return MemoryFile(path=path, restored=self._memory is not None, shared=True)

    def _start_vm(
        self, machine: Machine, folder: Path, shim: Shim | None, *, incoming: bool = False
    ) -> Vm:
        stack, equipment, channels = self._resources, self._equipment, self._channels
        files = stack.enter_context(
            ScratchFiles(self._settings.scratch_dir, machine.nvdimms, image=self.dimms.image)
        )
        parts = (equipment.qemu, machine, self.board, equipment.payload, files.paths)
        wiring, stopped = channels.wiring(folder), self._during_boot is not None
        return stack.enter_context(
            Vm(
                qemu_argv(*parts, wiring, self._memory, incoming=incoming, stopped=stopped),
                files,
                folder=folder,
                by_hand=script(qemu_argv(*parts, None), machine.nvdimms, files.paths),
                pass_fds=channels.pass_fds,
                shim=shim,
            )
        )

    def _use(self, vm: Vm) -> None:
        """Continue with this QEMU."""
        self.vm, self.process, self.qmp = vm, vm.process, vm.qmp
        if self._migrates:
            self._channels.follow(vm.process)
        else:
            self._channels.let_go()

    def successor(self, machine: Machine, *, folder: Path, shim: Shim | None = None) -> Vm:
        """Start a QEMU that waits for this guest's state; it ends with the guest.

        Args:
            machine: as the guest's, but its DIMMs may have other files.
            folder, shim: of this QEMU.
        """
        return self._start_vm(machine, folder, shim, incoming=True)

    @contextlib.contextmanager
    def moving(self, vm: Vm) -> Iterator[None]:
        """Continue at a successor, which loads the guest's state inside this context.

        Both QEMUs map the same memory; it may be in the stream only if the guest is stopped.

        Running commands continue; meanwhile no input is sent to the guest. Then the old QEMU is
        killed. After an exception the guest stays where it is.
        """
        assert self._agent is not None  # noqa: S101
        with self._agent.silent():
            yield
            old = self.process
            self._use(vm)
            # Before any input: it would take it from the socket that both have.
            old.kill()
        self.__dict__.pop("ssh_port", None)

    def _boot(self) -> None:
        """Wait for the guest's marks, and for its agent or ssh server."""
        begin_s = self.vm.exec_s
        if self._during_boot is not None:
            self._during_boot(self)
            self.qmp.execute("cont")
            self.console.restart_silence()
            begin_s = time.monotonic()
        try:
            if not wait_until_ready(
                self.console,
                self.times,
                exec_s=self.vm.exec_s,
                begin_s=begin_s,
                settings=self._settings,
            ):
                self._event.wait()
                self.check()
        except StuckError as error:
            state = self.qmp.execute("query-status")["status"]
            paused = f"; QEMU reports status {state}; its output:\n{self.vm.output()}"
            self._lose(error.message + (paused if state != "running" else ""))
            self.check()
        assert self._agent is not None  # noqa: S101
        if self.times.agent is None:
            # The kernel has no virtio_console.
            self._agent.close()
            self._agent = None
            self.connect()
        elif not self._agent.answers(self._settings.silence_limit_s):
            self.check()
            raise GuestLostError(f"the guest's agent does not answer\n{self.console.tail()}")

    def _restore(self, snapshot: Snapshot) -> None:
        """Load the state, plug the DIMMs and let the guest run."""
        # QEMU appends to it.
        (self.folder / "console.log").write_bytes(snapshot.console.read_bytes())
        load_state(self.qmp, snapshot)
        self._note("restored")
        for nvdimm in self.machine.nvdimms:
            self.vm.attach(nvdimm)
        self._port.wake(regions=len(self.machine.nvdimms))
        self.qmp.execute("cont")
        assert self._agent is not None  # noqa: S101
        self._port.wait_awake(self.check)
        self._note("awake")
        count = self._port.wait_regions(self.check)
        self._note("regions")
        if not self._agent.answers(self._settings.silence_limit_s):
            self.check()
            raise NotRestoredError("the agent of the restored guest does not answer")
        if count != (dimms := len(self.machine.nvdimms)):
            log.logger.info("%d regions of %d DIMMs have their driver", count, dimms)

    def _expect_not_killed(self, error: NotRestoredError) -> None:
        """Raise if a signal ended QEMU: then the snapshot may be good, and is kept."""
        if (status := self.process.wait(1.0)) is not None and status < 0:
            raise GuestLostError(
                f"QEMU ended during the restore, {describe_status(status)}"
            ) from error

    def _note(self, mark: str) -> None:
        setattr(self.times, mark, time.monotonic() - self.vm.exec_s)

    @functools.cached_property
    def ssh_port(self) -> int:
        """Return the port that QEMU chose; choosing one beforehand would be a race."""
        answer = self.qmp.hmp("info usernet")
        match = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", answer)
        if match is None:
            raise HostError(f"QEMU forwards no port to the guest: {answer.strip()}")
        return int(match[1])

    def _on_event(self) -> None:
        """Wake the callers that wait for the end of a command: the console reports an event."""
        self._event.set()
        if self._agent is not None:
            self._agent.close()
        self.disconnect()

    def _lose(self, reason: str) -> None:
        self._lost_reason = self._lost_reason or reason
        self._event.set()
