# SPDX-License-Identifier: GPL-2.0-or-later
"""One running QEMU, whatever runs in it: its process, its monitor, the files behind its DIMMs."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from paprscm.errors import CapabilityError, GuestLostError, HostError
from paprscm.host.process import Process, describe_status
from paprscm.log import quoted
from paprscm.vm.argv import script
from paprscm.vm.machine import Nvdimm
from paprscm.vm.qmp import Qmp
from paprscm.vm.sync_shim import Shim, WatchedFile

Command = Callable[[Mapping[int, Path], int | None], list[str]]
"""Gives QEMU's command line for the files behind the DIMMs, by slot, and the monitor's descriptor;
with None instead, one for a person who runs it by hand."""

# A QEMU that has hung up has ended after so long, or does something else.
_END_LIMIT_S = 2.0


class Lifetime:
    """Context manager that creates on entry, removes on exit and leaves nothing behind.

    A subclass makes everything in `_start()`, and puts what undoes it on `_resources`.
    """

    def __init__(self) -> None:
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start it, or leave nothing of it; raises as the class says."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it and remove all that was made for it; its logs stay."""
        self._resources.close()

    def _start(self) -> None:
        raise NotImplementedError


class Vm(Lifetime):
    """One QEMU; use it as a context manager.

    Its monitor is on a socket that it inherits, so there is no name in the file system that could
    be left behind.

    Args:
        command: computes the command line.
        nvdimms: the DIMMs that are there from the start.
        folder: where qemu.log and qemu.sh go; they stay.
        scratch_dir: where backing files are made; they go with the QEMU.
        pass_fds: what else it inherits, under the same numbers.
        shim: goes into this QEMU, to watch and to disturb the syncs of the backing files.

    Raises:
        HostError: it does not start as it should, or there is no place for backing files.

    Attributes:
        process: the QEMU.
        qmp: its monitor.
        scratch: a folder of its own, removed at the end.
        exec_s: when it was started, by time.monotonic().
    """

    process: Process
    qmp: Qmp
    scratch: Path
    exec_s: float

    def __init__(
        self,
        command: Command,
        nvdimms: Iterable[Nvdimm],
        *,
        folder: Path,
        scratch_dir: Path,
        pass_fds: Sequence[int] = (),
        shim: Shim | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self._shim = shim
        self._watched: dict[int, WatchedFile] = {}
        self._command = command
        self._nvdimms = tuple(nvdimms)
        self._scratch_dir = scratch_dir
        self._pass_fds = tuple(pass_fds)
        self._files: dict[int, Path] = {}

    def plug(self, nvdimm: Nvdimm) -> None:
        """Plug a DIMM into the running machine; what runs in it notices a moment later.

        Raises:
            RefusedError: QEMU does not take it; then everything is as it was before.
        """
        file = self._make_file(nvdimm)
        with contextlib.ExitStack() as undo:
            if nvdimm.file is None:
                undo.callback(file.unlink)
            # Before QEMU maps it.
            watched = self._shim.watch(file) if self._shim else None
            self._attach(nvdimm, file, watched)
            undo.pop_all()
        self._own(nvdimm.slot, file, watched)

    def attach(self, nvdimm: Nvdimm) -> None:
        """Plug one of the DIMMs that are there from the start, if the command line left it out.

        Raises:
            RefusedError: QEMU does not take it.
        """
        self._attach(nvdimm, self._files[nvdimm.slot], self._watched.get(nvdimm.slot))

    def _attach(self, nvdimm: Nvdimm, file: Path, watched: WatchedFile | None) -> None:
        with contextlib.ExitStack() as undo:
            self.qmp.execute("object-add", **nvdimm.backend(file))
            undo.callback(self.qmp.execute, "object-del", id=f"mem{nvdimm.slot}")
            if watched is not None:
                _require_mapped(watched)
            self.qmp.execute("device_add", **nvdimm.frontend())
            undo.pop_all()

    def file(self, slot: int) -> Path:
        """The backing file of the DIMM in `slot`."""
        return self._files[slot]

    def syncs(self, slot: int) -> WatchedFile:
        """The syncs of the file behind the DIMM in `slot`; only with a shim."""
        return self._watched[slot]

    def says(self) -> str:
        """Return QEMU's output so far, indented for a message."""
        return quoted((self.folder / "qemu.log").read_text(errors="replace"))

    def _start(self) -> None:
        stack = self._resources
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            scratch = Path(tempfile.mkdtemp(prefix="paprscm-", dir=self._scratch_dir))
        except OSError as error:
            raise HostError(
                f"no folder for backing files in {self._scratch_dir}: {error.strerror}",
                hint="set scratch_dir",
            ) from error
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        self.scratch = scratch
        shim = self._shim
        for nvdimm in self._nvdimms:
            file = self._make_file(nvdimm)
            self._own(nvdimm.slot, file, shim.watch(file) if shim else None)
        self._write_script()
        ours, theirs = socket.socketpair()
        with theirs, (self.folder / "qemu.log").open("wb") as output:
            self.exec_s = time.monotonic()
            self.process = Process(
                [
                    *(shim.prefix() if shim else ()),
                    *self._command(self._files, theirs.fileno()),
                ],
                stdout=output.fileno(),
                stderr=subprocess.STDOUT,
                pass_fds=(
                    *self._pass_fds,
                    theirs.fileno(),
                    *(shim.pass_fds if shim else ()),
                ),
                scratch=scratch,
                output_file=Path(output.name),
            )
        stack.callback(self.process.kill)
        try:
            # One that was ended from outside is a KilledError.
            self.qmp = Qmp(ours, on_gone=lambda: self.process.wait(_END_LIMIT_S))
        except GuestLostError as error:
            status = self.process.wait(_END_LIMIT_S)
            how = "does not answer" if status is None else describe_status(status)
            raise HostError(
                f"QEMU did not start as it should ({how}); it said:\n{self.says()}",
                hint=f"its command line: {self.folder / 'qemu.sh'}",
            ) from error
        stack.callback(self.qmp.close)
        if shim:
            shim.require_loaded()
            backends = {memdev["id"] for memdev in self.qmp.execute("query-memdev")}
            for slot, watched in self._watched.items():
                if f"mem{slot}" in backends:
                    _require_mapped(watched)

    def _own(self, slot: int, file: Path, watched: WatchedFile | None) -> None:
        self._files[slot] = file
        if watched is not None:
            self._watched[slot] = watched

    def _make_file(self, nvdimm: Nvdimm) -> Path:
        """The DIMM's backing file: the user's own, or a sparse one of ours."""
        if nvdimm.file is not None:
            return nvdimm.file
        handle, name = tempfile.mkstemp(prefix=f"nvdimm{nvdimm.slot}-", dir=self.scratch)
        try:
            os.truncate(handle, nvdimm.file_bytes)
        finally:
            os.close(handle)
        return Path(name)

    def _write_script(self) -> None:
        sizes = {self._files[n.slot]: n.file_bytes for n in self._nvdimms}
        target = self.folder / "qemu.sh"
        target.write_text(script(self._command(self._files, None), sizes))
        target.chmod(0o755)


def _require_mapped(file: WatchedFile) -> None:
    """Raise CapabilityError if the shim is in a process other than the one that maps the file."""
    if not file.is_mapped():
        raise CapabilityError(
            f"the flush shim does not see how QEMU uses {file.path}: it was loaded into another "
            "process",
            hint="set qemu= to the binary itself, not to a program that starts it",
        )
