# SPDX-License-Identifier: GPL-2.0-or-later
"""A running pseries guest: booted on entering, asked and steered meanwhile, gone on leaving."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

import paramiko

from paprscm import log
from paprscm.errors import ConfigError, ContractError, Error, GuestLostError, HostError
from paprscm.guest.console import Console, StartTimes, StuckError, wait_until_ready
from paprscm.guest.dimm_content import DimmContents, GuestDimms
from paprscm.guest.kmsg import Trouble
from paprscm.guest.snapshot import NotRestoredError, Port, Snapshot, load_state
from paprscm.guest.ssh import CommandResult, Ssh, TimedOutError, log_command, outcome, reporting
from paprscm.host.lifetime import Lifetime
from paprscm.host.process import describe_status
from paprscm.log import quoted
from paprscm.settings import Settings
from paprscm.vm.argv import MemoryFile, Payload, Wiring, qemu_argv, script
from paprscm.vm.backing_files import ScratchFiles
from paprscm.vm.machine import Board, Machine, Nvdimm, in_words
from paprscm.vm.sync_shim import Shim
from paprscm.vm.vm import Vm

# What a kernel without the drivers of our machine ends with.
_NO_ROOT = re.compile(r"Unable to mount root|No working init|Cannot open root|: no root disk")
_NO_ROOT_HINT = "does the kernel have virtio_pci, virtio_blk and ext4, built in or in modules=?"


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """Parts that all guests of a run have in common.

    Attributes:
        settings: time limits and folders.
        qemu: how the QEMU is started.
        payload: kernel, modules and root disk.
        client_key: our ssh key (a file).
        host_key: the guest's public key.
        board: processors, memory and firmware, where a machine leaves them open.
        contents: contents for DIMMs that should not start empty; None: they start empty.
    """

    settings: Settings
    qemu: tuple[str, ...]
    payload: Payload
    client_key: Path
    host_key: str
    board: Board = Board()
    contents: DimmContents | None = None


class Guest(Lifetime):
    """One guest; use it as a context manager.

    Args:
        equipment: what it is made of.
        machine: what it looks like.
        folder: where console.log, qemu.log and qemu.sh go; they stay.
        allowed: kernel messages that the test expects (regular expressions); any other Oops, BUG,
            WARNING, lockup or driver error fails whatever runs in the guest at that moment.
        mirror: where to write what the guest's console prints, in addition to console.log.
        snapshot: begin there instead of booting; it must fit the machine.
        memory_file: its memory becomes this file, for a guest that will be saved.
        shim: goes into its QEMU, to watch and to disturb the syncs of the backing files.

    Raises:
        NotRestoredError: the snapshot did not come to life.
        GuestLostError: it did not boot.
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
    ) -> None:
        super().__init__()
        self._mirror = mirror
        self._shim = shim
        self._snapshot = snapshot
        self._memory = snapshot.memory if snapshot else None
        if memory_file is not None:
            self._memory = MemoryFile(path=memory_file, restored=False)
        self.machine = machine
        self.board = machine.board(equipment.board)
        self.dimms = GuestDimms(equipment.contents)
        self.folder = folder
        self.times = StartTimes()
        self._equipment = equipment
        self._settings = equipment.settings
        self._allowed = [re.compile(pattern) for pattern in allowed]
        self._event = threading.Event()
        self._told = False
        self._lost_why = ""
        self._marks = itertools.count(1)
        self._ssh: Ssh | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What was reported, and caught by a test that provoked it, is not reported again.
        tell = error is None and not self._told
        try:
            if tell:
                self.check()
        finally:
            self.close()
        # The console is read to its end only now; the last lines may hold the worst.
        if tell and (trouble := self.console.trouble):
            raise self._report(trouble)

    def run(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        """Run a command by the guest's /bin/sh, whatever its exit status.

        Args:
            command: shell, one line or several.
            timeout_s: its own limit; the setting command_limit_s when None.
            stdin: what it reads.

        Raises:
            GuestLostError: it did not end within its limit, or the guest went away.
            ContractError: the kernel printed what no healthy kernel prints.
        """
        self.check()
        limit_s = self._settings.command_limit_s if timeout_s is None else timeout_s
        assert self._ssh is not None  # noqa: S101
        try:
            result = self._ssh.run(command, stdin=stdin, timeout_s=limit_s, alive=self.check)
        except TimedOutError as error:
            self._lose(f"a command did not end within {limit_s:g} s")
            self._told = True
            raise TimedOutError(
                f"{error.message}\n  the console ends with:\n{self.console.tail()}"
            ) from None
        except GuestLostError:
            # The connection may end a moment before the console tells why.
            self._event.wait(2.0)
            self.check()
            raise
        log_command(result)
        self.check()
        return result

    def succeed(self, command: str, *, timeout_s: float | None = None, stdin: bytes = b"") -> str:
        """Run a command that must end with status 0; its output without the last line end.

        Raises:
            ContractError: it failed.
        """
        result = reporting(self.run(command, timeout_s=timeout_s, stdin=stdin))
        if result.status:
            raise ContractError(f"{outcome(result)}, expected 0")
        return result.stdout.removesuffix("\n")

    def fail(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        """Run a command that must not end with status 0.

        Raises:
            ContractError: it succeeded.
        """
        result = reporting(self.run(command, timeout_s=timeout_s, stdin=stdin))
        if not result.status:
            raise ContractError(f"{outcome(result)}, expected it to fail")
        return result

    def wait_until(self, command: str, *, timeout_s: float = 10.0) -> str:
        """Repeat a command, in the guest and in one round trip, until it succeeds; its output.

        Raises:
            ContractError: it still fails after `timeout_s`.
        """
        # The guest's own clock: 20 ms between two tries cost nothing there.
        loop = (
            "end=$(( $(cut -d. -f1 /proc/uptime) + $1 )); "
            'until out=$(sh -c "$2" 2>&1); status=$?; case $status in 0|126|127) ;; *) status=99; '
            "[ $(cut -d. -f1 /proc/uptime) -ge $end ];; esac; do sleep 0.02; done; "
            'printf "%s\\n" "$out"; exit $status'
        )
        line = shlex.join(["sh", "-c", loop, "wait_until", str(int(timeout_s) + 1), command])
        result = reporting(self.run(line, timeout_s=timeout_s * 2 + 10))
        if result.status:
            raise ContractError(
                f"`{command}` still fails after {timeout_s:g} s; its output:\n"
                f"{quoted(result.stdout)}"
            )
        return result.stdout.removesuffix("\n")

    def put(self, data: bytes | Path, target: str, *, mode: int = 0o644) -> None:
        """Write a file in the guest, byte for byte.

        Args:
            data: the content, or a file of ours.
            target: the path in the guest; its folder must exist.
            mode: its permissions.
        """
        content = data.read_bytes() if isinstance(data, Path) else data
        path = shlex.quote(target)
        self.succeed(f"cat > {path} && chmod {mode:o} {path}", stdin=content)

    def get(self, path: str) -> bytes:
        """Read a file of the guest, byte for byte."""
        result = reporting(self.run(f"cat -- {shlex.quote(path)}"))
        if result.status:
            raise ContractError(f"{outcome(result)}, expected 0")
        return result.stdout_bytes

    def plug(self, nvdimm: Nvdimm) -> None:
        """Plug a DIMM into the running guest; the guest notices a moment later.

        Raises:
            RefusedError: QEMU does not take it; then everything is as it was before.
        """
        self.vm.plug(nvdimm)

    def shell(self, term: str, columns: int, rows: int) -> paramiko.Channel:
        """An interactive shell of the guest, on a pseudo terminal of that size."""
        assert self._ssh is not None  # noqa: S101
        return self._ssh.shell(term, columns, rows)

    def file(self, slot: int) -> Path:
        """The backing file of the DIMM in `slot`."""
        return self.vm.file(slot)

    @contextlib.contextmanager
    def expect_messages(self, *patterns: str) -> Iterator[None]:
        """Announce kernel messages: within, they do not fail the test."""
        added = [re.compile(pattern) for pattern in patterns]
        self.console.allowed.extend(added)
        try:
            yield
            # What the kernel has printed by now must have been read before it counts again.
            mark = f"paprscm: mark {next(self._marks)}"
            self.run(f"echo '<1>{mark}' > /dev/kmsg")
            # However long the guest was silent before: only the mark's own line counts.
            self.console.wait_for(
                {"mark": re.compile(re.escape(mark) + "$")}, timeout_s=10, silence_s=float("inf")
            )
        finally:
            for pattern in added:
                self.console.allowed.remove(pattern)

    def check(self) -> None:
        """Raise if the guest is lost or its kernel printed what no healthy kernel prints.

        Raises:
            ContractError: an Oops, a warning, … that was not announced.
            GuestLostError: a panic, a hang, or QEMU is gone.
            KilledError: QEMU was ended from outside.
        """
        if not self._event.is_set():
            return
        self._told = True
        # A call trace comes in many lines.
        self.console.settle()
        if trouble := self.console.trouble:
            raise self._report(trouble)
        reason = self._lost_why
        if not reason:
            status = self.process.wait(2.0)
            how = "closed its console" if status is None else f"ended, {describe_status(status)}"
            reason = f"QEMU {how}; it said:\n{self.vm.says()}"
        raise GuestLostError(f"{reason}\n  the guest's console ends with:\n{self.console.tail()}")

    def _report(self, trouble: Trouble) -> Error:
        what = f"{trouble.text}\n  its console:\n{self.console.tail(30)}"
        no_root = any(_NO_ROOT.search(line) for line in self.console.lines)
        if no_root and self.times.init is None:
            return ConfigError(f"the guest's kernel has no root disk: {what}", hint=_NO_ROOT_HINT)
        kind = GuestLostError if trouble.fatal else ContractError
        return kind(f"the guest's kernel reports: {what}")

    def kill(self) -> None:
        """End QEMU with SIGKILL, as a power cut would; the backing files stay."""
        self._lose("the guest was killed")
        self._told = True
        self.process.kill()

    def hang_up(self) -> None:
        """Close the ssh connection; connect() makes a new one."""
        if self._ssh is not None:
            self._ssh.close()

    def connect(self) -> None:
        """Call the guest's ssh server until it answers.

        Raises:
            GuestLostError: it does not within silence_limit_s, or the guest is lost.
        """
        self._ssh = Ssh(
            port=self.ssh_port,
            client_key=self._equipment.client_key,
            host_key=self._equipment.host_key,
            timeout_s=self._settings.silence_limit_s,
            alive=self.check,
        )
        self._resources.callback(self._ssh.close)

    def _start(self) -> None:
        dimms = ", ".join(map(in_words, self.machine.nvdimms)) or "no DIMM"
        how = "restore" if self._snapshot else "boot"
        with log.step(f"{how} a guest ({dimms})"):
            self._start_qemu()
            self.ssh_port = self._find_ssh_port()
            if self._snapshot:
                self._restore(self._snapshot)
            else:
                self._boot()
                self.connect()
                self._note("ssh")

    def _start_qemu(self) -> None:
        """Start QEMU, with its console on a socket that it inherits."""
        stack, equipment, machine = self._resources, self._equipment, self.machine
        files = stack.enter_context(
            ScratchFiles(self._settings.scratch_dir, machine.nvdimms, image=self.dimms.image)
        )
        with contextlib.ExitStack() as theirs:

            def pair() -> tuple[socket.socket, int]:
                ours, other = socket.socketpair()
                return ours, theirs.enter_context(other).fileno()

            sock, console_fd = pair()
            # Left in the other order: QEMU goes first, so that the console's reader finds the end.
            self.console = Console(
                sock, on_event=self._on_event, allowed=self._allowed, mirror=self._mirror
            )
            stack.callback(self.console.close)
            sock, port_fd = pair()
            self._port = Port(sock)
            stack.callback(self._port.close)
            wiring = Wiring(
                console_fd=console_fd, port_fd=port_fd, console_log=self.folder / "console.log"
            )
            parts = (equipment.qemu, machine, self.board, equipment.payload, files.paths)
            self.vm = stack.enter_context(
                Vm(
                    qemu_argv(*parts, wiring, self._memory),
                    files,
                    folder=self.folder,
                    by_hand=script(qemu_argv(*parts, None), machine.nvdimms, files.paths),
                    pass_fds=(console_fd, port_fd),
                    shim=self._shim,
                )
            )
        self.process, self.qmp = self.vm.process, self.vm.qmp

    def _boot(self) -> None:
        """Wait for the guest's marks."""
        try:
            if not wait_until_ready(
                self.console, self.times, exec_s=self.vm.exec_s, settings=self._settings
            ):
                self._event.wait()
                self.check()
        except StuckError as error:
            state = self.qmp.execute("query-status")["status"]
            paused = f"; QEMU has it {state} and said:\n{self.vm.says()}"
            self._lose(error.message + (paused if state != "running" else ""))
            self.check()

    def _restore(self, snapshot: Snapshot) -> None:
        """Load the state, plug the DIMMs, let it run; it is called while it wakes."""
        # QEMU goes on writing there.
        (self.folder / "console.log").write_bytes(snapshot.console.read_bytes())
        try:
            load_state(self.qmp, snapshot)
        except NotRestoredError as error:
            self._expect_not_killed(error)
            raise
        self._note("restored")
        for nvdimm in self.machine.nvdimms:
            self.vm.attach(nvdimm)
        self._port.wake(regions=len(self.machine.nvdimms))
        self.qmp.execute("cont")
        with ThreadPoolExecutor(1, "ssh") as pool:
            connecting = pool.submit(self.connect)
            connecting.add_done_callback(lambda _: self._note("ssh"))
            try:
                self._port.awake(self.check)
                self._note("awake")
                there = self._port.regions(self.check)
                self._note("regions")
            except BaseException as error:
                try:
                    if isinstance(error, NotRestoredError):
                        self._expect_not_killed(error)
                finally:
                    # So that the call ends.
                    self._lose("it was given up")
                    self.process.kill()
                raise
        connecting.result()
        if there != (wanted := len(self.machine.nvdimms)):
            log.logger.info("%d regions of %d DIMMs have their driver", there, wanted)

    def _expect_not_killed(self, error: NotRestoredError) -> None:
        """Raise if a signal ended QEMU: that says nothing about the snapshot, which is kept."""
        if (status := self.process.wait(1.0)) is not None and status < 0:
            raise GuestLostError(f"QEMU ended in its restore, {describe_status(status)}") from error

    def _note(self, mark: str) -> None:
        setattr(self.times, mark, time.monotonic() - self.vm.exec_s)

    def _find_ssh_port(self) -> int:
        """The port that QEMU chose; asking for one beforehand would be a race."""
        answer = self.qmp.hmp("info usernet")
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", answer)
        if found is None:
            raise HostError(f"QEMU forwards no port to the guest: {answer.strip()}")
        return int(found[1])

    def _on_event(self) -> None:
        """Something happened on the console: wake the caller that waits for a command's end."""
        self._event.set()
        self.hang_up()

    def _lose(self, why: str) -> None:
        self._lost_why = self._lost_why or why
        self._event.set()
