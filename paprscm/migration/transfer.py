# SPDX-License-Identifier: GPL-2.0-or-later
"""Transfer of a machine's state between two QEMUs: directly, or as bytes that a test can read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import shlex
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paprscm.emulator.qmp import RefusedError
from paprscm.errors import CapabilityError, ContractError, GuestLostError, HostError
from paprscm.host.process import describe_status
from paprscm.vm.vm import Vm

_LIMIT_S = 60.0
# Together less than the time limit of an answer (emulator/qmp.py).
_PATIENCE_S = 5.0
_ANSWER_LIMIT_S = 15.0
_CHUNK = 1 << 20


class LoadError(ContractError):
    """A QEMU does not load a stream.

    Attributes:
        status: exit status of the QEMU, negative for a signal; None: it still runs.
        how: description of the status.
        text: its output.
    """

    def __init__(self, status: int | None, text: str) -> None:
        self.how = "still runs" if status is None else describe_status(status)
        super().__init__(f"QEMU does not load the stream ({self.how}); its output:\n{text}")
        self.status = status
        self.text = text

    @property
    def is_refusal(self) -> bool:
        """True if QEMU refused the stream and ended in order, as opposed to a crash or a hang."""
        return self.status == 1


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to migrate.

    Attributes:
        name: for a report.
        scheme: "bytes" (through this process, which sees the stream), or what QEMU's URI begins
            with: "unix", "exec" or "file".
        capabilities: set on both sides.
        parameters: arguments of migrate-set-parameters, set on both sides.
        contents: the stream carries the contents of memory that is shared with a file. Without
            them both QEMUs need the same files (x-ignore-shared).
    """

    name: str
    scheme: str = "bytes"
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    contents: bool = False

    def prepare(self, vm: Vm) -> None:
        """Set capabilities and parameters.

        Raises:
            RefusedError: QEMU lacks one of them.
        """
        wanted = {"events", *self.capabilities, *(() if self.contents else ("x-ignore-shared",))}
        states = {
            item["capability"]: item["state"]
            for item in vm.qmp.execute("query-migrate-capabilities")
        }
        # An earlier migration of this QEMU may have set others.
        changed = {name for name, state in states.items() if state} ^ wanted
        vm.qmp.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": name in wanted} for name in changed],
        )
        if self.parameters:
            vm.qmp.execute("migrate-set-parameters", **self.parameters)


SHARED = Way(name="state only")
"""State only: memory and DIMMs are files that both QEMUs map, one after the other."""
COPIED = Way(name="with contents", contents=True)
"""Everything is in the stream."""


def save(vm: Vm, way: Way = SHARED) -> bytes:
    """Migrate a machine into memory; it is stopped afterwards, and can be continued with `cont`.

    Raises:
        ContractError: QEMU cannot save it; the machine goes on.
        CapabilityError: as saving().
        GuestLostError: QEMU ended.
    """
    way.prepare(vm)
    with _listener(vm.scratch) as (path, listener):
        received = bytearray()

        def receive() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    while chunk := connection.recv(_CHUNK):
                        received.extend(chunk)

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        with saving(vm):
            _start(vm, uri=f"unix:{path}")
        # QEMU reports the end after its last write, and closes the socket shortly after.
        thread.join(_LIMIT_S)
        if thread.is_alive():
            raise HostError("QEMU has not closed the migration's socket")
    return bytes(received)


def load(vm: Vm, stream: bytes, way: Way = SHARED) -> None:
    """Load a stream into a QEMU that waits for one (-incoming defer).

    Raises:
        LoadError: QEMU refuses the stream, or ends while it loads.
    """
    way.prepare(vm)
    path = vm.scratch / "incoming"
    with _load_errors(vm):
        vm.qmp.execute("migrate-incoming", uri=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_LIMIT_S)
        sock.connect(str(path))
        path.unlink()
        # QEMU closes its end at the first error.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(stream)
    wait_loaded(vm)


def migrate(source: Vm, destination: Vm, way: Way) -> bytes | None:
    """Migrate a machine from one QEMU to another; return the stream if this process saw it.

    Raises:
        LoadError: the destination refuses, or ends.
        ContractError: the source cannot save.
        CapabilityError: as saving().
        RefusedError: a QEMU does not know this way.
    """
    if way.scheme == "bytes":
        stream = save(source, way)
        load(destination, stream, way)
        return stream
    way.prepare(source)
    way.prepare(destination)
    with saving(source):
        _connect(source, destination, way)
    return None


def _connect(source: Vm, destination: Vm, way: Way) -> None:
    """Migrate a machine in a way that this process does not see."""
    path = shlex.quote(str(destination.scratch / "stream"))
    if way.scheme == "unix":
        with _load_errors(destination):
            destination.qmp.execute("migrate-incoming", uri=f"unix:{path}")
        try:
            if "postcopy-ram" in way.capabilities:
                source.qmp.execute("migrate", uri=f"unix:{path}")
                source.qmp.execute("migrate-start-postcopy")
            else:
                _start(source, uri=f"unix:{path}")
        finally:
            wait_loaded(destination)
        return
    # QEMU 7.2 reports "completed" before cat has written everything.
    out = (
        f"exec:cat > {path}.new && mv {path}.new {path}" if way.scheme == "exec" else f"file:{path}"
    )
    _start(source, uri=out)
    _wait_for(destination.scratch / "stream")
    with _load_errors(destination):
        uri = f"exec:cat {path}" if way.scheme == "exec" else f"file:{path}"
        destination.qmp.execute("migrate-incoming", uri=uri)
    wait_loaded(destination)


@contextlib.contextmanager
def saving(vm: Vm) -> Iterator[None]:
    """Context in which a machine is saved whose syncs may hang.

    A QEMU that stops a machine only when its flushes have ended does not answer its monitor until
    then. In that case the syncs are released, so that the test ends in order.

    Raises:
        CapabilityError: this QEMU is one of them.
    """
    saved = threading.Event()
    released: list[int] = []

    def watch() -> None:
        # A slow QEMU that answers is only slow.
        while not saved.wait(_PATIENCE_S):
            if not vm.qmp.answers(_ANSWER_LIMIT_S) and not saved.is_set():
                released.extend(vm.release_syncs())
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        saved.set()
        watcher.join()
    if released:
        # As with the fix of known_issues/qemu-flush-error-after-save-lost.
        raise CapabilityError(
            "this QEMU saves a machine only when its flushes have ended: its monitor answered once "
            f"the syncs of slots {', '.join(map(str, released))} did not hang any more",
            hint="no flush is ever pending in its stream; the tests of such flushes do not apply",
        )


@contextlib.contextmanager
def cpr_transfer(source: Vm) -> Iterator[tuple[str, str]]:
    """Migrate in the mode cpr-transfer to a QEMU that must be started in the context.

    It yields that QEMU's -incoming options. Its monitor does not open before the source has sent
    the first part of its state (QEMU docs/devel/migration/CPR.rst).

    Raises:
        CapabilityError: QEMU has no such mode.
        ContractError: the source cannot save, or the destination does not load.
    """
    _set_mode(source, "cpr-transfer")
    paths = {name: source.scratch / name for name in ("main", "cpr")}
    address = {"transport": "socket", "type": "unix"}
    channels = [
        {"channel-type": name, "addr": {**address, "path": str(path)}}
        for name, path in paths.items()
    ]

    def send() -> None:
        _wait_for(paths["cpr"])
        with saving(source):
            _start(source, channels=channels)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        words = ",".join(f"addr.{name}={value}" for name, value in address.items())
        yield f"unix:{paths['main']}", f"cpr,{words},addr.path={paths['cpr']}"
        sent.result()


def cpr_exec(vm: Vm) -> None:
    """Replace a QEMU by a new one in the same process, in the mode cpr-exec.

    Raises:
        CapabilityError: QEMU has no such mode.
        ContractError: the new one does not load the state.
    """
    stream, monitor = vm.scratch / "stream", vm.scratch / "monitor"
    uri = f"file:{stream}"
    command = vm.successor("-qmp", f"unix:{monitor},server=on,wait=off", "-incoming", uri)
    _set_mode(vm, "cpr-exec", cpr_exec_command=command)
    with saving(vm):
        vm.qmp.execute("migrate", uri=uri)
        _wait_for(monitor)
    vm.reconnect(monitor)
    wait_loaded(vm)


def _set_mode(vm: Vm, mode: str, **parameters: Any) -> None:
    """Set a mode of live update, with its parameters."""
    way = Way(name=mode, parameters={"mode": mode, **parameters}, contents=True)
    try:
        way.prepare(vm)
    except RefusedError as error:
        raise CapabilityError(f"this QEMU has no {mode}: {error.text}") from error


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise HostError(f"{file} was not written within {_LIMIT_S:g} s")
        # Written by a program that QEMU has started.
        time.sleep(0.005)


def wait_loaded(vm: Vm) -> None:
    """Wait until an incoming migration has ended.

    Raises:
        LoadError: it failed.
    """
    deadline = time.monotonic() + _LIMIT_S
    with _load_errors(vm):
        while True:
            status = vm.qmp.execute("query-migrate").get("status")
            if status == "completed":
                return
            if status == "failed":
                # It ends by itself, except with exit-on-error=false.
                raise LoadError(vm.process.wait(2), vm.output())
            if time.monotonic() > deadline:
                raise LoadError(None, f"status {status} after {_LIMIT_S:g} s\n{vm.output()}")
            # The end of QEMU's process causes no event.
            time.sleep(0.002)


@contextlib.contextmanager
def _load_errors(vm: Vm) -> Iterator[None]:
    try:
        yield
    except GuestLostError as error:
        raise LoadError(vm.process.wait(5), vm.output()) from error


def _start(vm: Vm, **arguments: Any) -> None:
    """Run an outgoing migration, with the arguments of QMP's migrate, to its end.

    Raises:
        ContractError: QEMU cannot save the machine.
    """

    def ended(data: dict[str, Any]) -> bool:
        return data.get("status") in ("completed", "failed", "cancelled")

    data = vm.qmp.execute_until("migrate", "MIGRATION", ended, limit_s=_LIMIT_S, **arguments)
    if data["status"] != "completed":
        reason = vm.qmp.execute("query-migrate").get("error-desc", "no reason given")
        raise ContractError(f"QEMU's migration has {data['status']}: {reason}")


@contextlib.contextmanager
def _listener(folder: Path) -> Iterator[tuple[Path, socket.socket]]:
    path = folder / "outgoing"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        try:
            yield path, listener
        finally:
            path.unlink()
