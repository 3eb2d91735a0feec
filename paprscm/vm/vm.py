# SPDX-License-Identifier: GPL-2.0-or-later
"""One running QEMU: its process, its monitor, the backing files of its DIMMs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from paprscm.emulator.qmp import Qmp
from paprscm.errors import CapabilityError, GuestLostError, HostError
from paprscm.host.lifetime import Lifetime
from paprscm.host.process import Process, describe_status
from paprscm.log import quoted
from paprscm.vm.backing_files import ScratchFiles
from paprscm.vm.machine import Nvdimm
from paprscm.vm.sync_shim import Shim, WatchedFile

# Time limit for QEMU to end after it has closed the monitor, s.
_END_LIMIT_S = 2.0


class StartError(HostError):
    """QEMU does not start.

    Attributes:
        refused: it has ended with status 1, as it does when it refuses its command line.
    """

    def __init__(self, message: str, *, hint: str, refused: bool) -> None:
        super().__init__(message, hint=hint)
        self.refused = refused


class Vm(Lifetime):
    """One QEMU; use it as a context manager.

    It adds the monitor to the command line, on a socket that QEMU inherits, so that nothing is left
    behind in the file system.

    Args:
        argv: the command line without a monitor, with `files` behind its DIMMs.
        files: backing files of its DIMMs; plug() adds files.
        folder: folder for qemu.log and qemu.sh, which are kept.
        by_hand: content of qemu.sh: a shell script that runs the same machine on a terminal.
        pass_fds: other descriptors that QEMU inherits under the same numbers.
        shim: preloaded into this QEMU, to record and disturb the syncs of the backing files.

    Raises:
        StartError: QEMU does not start.

    Attributes:
        process: the QEMU process.
        qmp: its monitor.
        exec_s: time of its start, by time.monotonic().
    """

    process: Process
    qmp: Qmp
    exec_s: float

    def __init__(
        self,
        argv: Sequence[str],
        files: ScratchFiles,
        *,
        folder: Path,
        by_hand: str,
        pass_fds: Sequence[int] = (),
        shim: Shim | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self._argv = tuple(argv)
        self._by_hand = by_hand
        self._files = files
        self._shim = shim
        self._watched: dict[int, WatchedFile] = {}
        self._pass_fds = tuple(pass_fds)

    def plug(self, nvdimm: Nvdimm) -> None:
        """Plug a DIMM into the running machine; the guest notices it asynchronously.

        Raises:
            RefusedError: QEMU refuses it; then nothing has changed.
        """
        file = self._files.make(nvdimm)
        with contextlib.ExitStack() as undo:
            if nvdimm.file is None:
                undo.callback(file.unlink)
            # watch() must precede QEMU's mmap.
            watched = self._shim.watch(file, nvdimm.size_bytes) if self._shim else None
            self._attach(nvdimm, file, watched)
            undo.pop_all()
        self._files.paths[nvdimm.slot] = file
        if watched is not None:
            self._watched[nvdimm.slot] = watched

    def attach(self, nvdimm: Nvdimm) -> None:
        """Plug a DIMM that has a backing file already but is not on the command line.

        Raises:
            RefusedError: QEMU refuses it.
        """
        self._attach(nvdimm, self.file(nvdimm.slot), self._watched.get(nvdimm.slot))

    def _attach(self, nvdimm: Nvdimm, file: Path, watched: WatchedFile | None) -> None:
        with contextlib.ExitStack() as undo:
            self.qmp.execute("object-add", **nvdimm.backend(file))
            undo.callback(self.qmp.execute, "object-del", id=nvdimm.memdev)
            if watched is not None:
                _require_mapped(watched)
            self.qmp.execute("device_add", **nvdimm.frontend())
            undo.pop_all()

    @property
    def scratch(self) -> Path:
        """Folder that is removed with the backing files."""
        return self._files.folder

    def file(self, slot: int) -> Path:
        """Return the backing file of the DIMM in `slot`."""
        return self._files.paths[slot]

    def syncs(self, slot: int) -> WatchedFile:
        """Return the syncs of the backing file of the DIMM in `slot`; requires a shim."""
        return self._watched[slot]

    def release_syncs(self) -> list[int]:
        """Release all syncs that hang; return the slots of their DIMMs."""
        slots = [slot for slot, watched in self._watched.items() if watched.hanging()]
        for slot in slots:
            self._watched[slot].release()
        return slots

    def successor(self, *words: str) -> list[str]:
        """Return the command line of a QEMU that replaces this one in its process.

        Args:
            words: its monitor, and other options.
        """
        shim = self._shim.prefix(inherits=False) if self._shim else ()
        return [*shim, *self._argv, *words]

    def reconnect(self, path: Path) -> None:
        """Use the monitor at this socket from now on, of a new QEMU in the same process."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            self._connect(sock.dup())

    def output(self) -> str:
        """Return QEMU's output so far, indented for a message."""
        return quoted((self.folder / "qemu.log").read_text(errors="replace"))

    def _start(self) -> None:
        stack = self._resources
        self.folder.mkdir(parents=True, exist_ok=True)
        script = self.folder / "qemu.sh"
        script.write_text(self._by_hand)
        script.chmod(0o755)
        shim = self._shim
        if shim:
            self._watched = {
                slot: shim.watch(file, self._files.data_bytes[slot])
                for slot, file in self._files.paths.items()
            }
        ours, theirs = socket.socketpair()
        with theirs, (self.folder / "qemu.log").open("wb") as output:
            self.exec_s = time.monotonic()
            self.process = Process(
                [
                    *(shim.prefix() if shim else ()),
                    *self._argv,
                    # Not -mon: QEMU 11.1 prints a deprecation warning at each start.
                    *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-qmp", "chardev:qmp"),
                ],
                stdout=output.fileno(),
                stderr=subprocess.STDOUT,
                pass_fds=(*self._pass_fds, theirs.fileno(), *(shim.pass_fds if shim else ())),
                scratch=self._files.folder,
                output_file=Path(output.name),
            )
        stack.callback(self.process.kill)
        try:
            self._connect(ours)
        except GuestLostError as error:
            status = self.process.wait(_END_LIMIT_S)
            how = "does not answer" if status is None else describe_status(status)
            raise StartError(
                f"QEMU did not start ({how}); its output:\n{self.output()}",
                hint=f"its command line: {self.folder / 'qemu.sh'}",
                refused=status == 1,
            ) from error
        if shim:
            shim.require_loaded()
            backends = {memdev["id"] for memdev in self.qmp.execute("query-memdev")}
            for slot, watched in self._watched.items():
                if f"mem{slot}" in backends:
                    _require_mapped(watched)

    def _connect(self, sock: socket.socket) -> None:
        # wait() raises KilledError if QEMU was killed from outside.
        self.qmp = Qmp(sock, on_disconnect=lambda: self.process.wait(_END_LIMIT_S))
        self._resources.callback(self.qmp.close)


def _require_mapped(file: WatchedFile) -> None:
    """Raise CapabilityError if the shim is not in the process that maps the file."""
    if not file.is_mapped():
        raise CapabilityError(
            f"the flush shim does not see QEMU's mapping of {file.path}: "
            "it was loaded into another process",
            hint="set qemu= to the binary itself, not to a program that starts it",
        )
