# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that closes its monitor is judged by its exit, which follows later."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paprscm.errors import ContractError, GuestLostError, KilledError
from paprscm.vm.backing_files import ScratchFiles
from paprscm.vm.vm import Vm

# Greet, negotiate, close the monitor, and end half a second later in the given way.
QEMU = """
import json, os, socket, sys, time
[end, _option, chardev, *_rest] = sys.argv[1:]
monitor = socket.socket(fileno=int(chardev.rpartition("=")[2]))
version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
for answer in ({"QMP": {"version": version, "capabilities": []}}, {"return": {}}):
    monitor.sendall(json.dumps(answer).encode() + b"\\r\\n")
    monitor.recv(4096)
monitor.close()
time.sleep(0.5)
exec(end)
"""


@contextlib.contextmanager
def with_end(folder: Path, end: str) -> Iterator[Vm]:
    """A machine whose QEMU ends that way."""
    argv = [sys.executable, "-c", QEMU, end]
    with ScratchFiles(folder) as files, Vm(argv, files, folder=folder, by_hand="") as vm:
        yield vm


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 9)", "print('q: terminating on signal 15 from pid 1 (init)')"]
)
def test_a_signal_from_outside_is_detected_after_the_monitor_closed(
    tmp_path: Path, end: str
) -> None:
    with pytest.raises(KilledError, match="from outside"), with_end(tmp_path, end) as vm:
        vm.qmp.execute("query-status")


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 11)", "sys.exit(1)", "sys.exit(0)"])
def test_its_own_exit_is_a_contract_error(tmp_path: Path, end: str) -> None:
    with pytest.raises(ContractError) as caught, with_end(tmp_path, end) as vm:
        vm.qmp.execute("query-status")
    assert isinstance(caught.value, GuestLostError)
    assert "monitor is gone" in caught.value.message
