# SPDX-License-Identifier: GPL-2.0-or-later
"""Restored guests: equal for tests, but with their own random numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cold_and_warm.seen import Seen, differences

from paprscm.emulator.qmp import Qmp
from paprscm.errors import KilledError
from paprscm.guest.environment import Environment
from paprscm.guest.guest import Guest
from paprscm.guest.snapshot import NotRestoredError, Snapshot, load_state
from paprscm.paths import ROOT
from paprscm.results.record import read_record
from paprscm.vm.machine import Machine, Nvdimm

pytestmark = pytest.mark.guest

TEN = ROOT / "selftests" / "cold_and_warm" / "ten.py"
DIMMS = Machine(nvdimms=(Nvdimm(slot=1), Nvdimm(slot=4)))

# Values from the guest's random numbers, and its time.
_DRAW = """
set -e
dd if=/dev/hwrng bs=32 count=1 2>/dev/null | od -An -v -tx1 | tr -d ' \\n'
echo " hwrng"
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'
echo " urandom"
echo "$(cat /proc/sys/kernel/random/uuid) uuid"
echo "$(cat /proc/sys/kernel/random/boot_id) boot_id"
mktemp -u /tmp/XXXXXXXXXX | sed 's/$/ mktemp/'
truncate -s 320M /tmp/xfs /tmp/ext4
mkfs.xfs -q /tmp/xfs
mkfs.ext4 -q -F /tmp/ext4
for type in xfs ext4; do
	echo "$(blkid -p -o value -s UUID /tmp/$type) $type"
done
echo "$(date +%s.%N) time"
"""


@pytest.fixture
def snapshot(environment: Environment) -> Snapshot:
    """The snapshot, which `make test` makes before the first test."""
    if environment.snapshot is None:
        pytest.skip("no snapshot: `paprscm image` makes it, where restoring works")
    return environment.snapshot


@pytest.fixture
def restore(
    environment: Environment, snapshot: Snapshot, tmp_path: Path
) -> Callable[..., contextlib.AbstractContextManager[Guest]]:
    """Restore a guest that ends with the block; never boot one instead."""

    def start(machine: Machine = DIMMS, begin: Snapshot = snapshot) -> Guest:
        folder = tmp_path / f"guest{len(list(tmp_path.iterdir()))}"
        return Guest(environment.equipment, machine, folder=folder, snapshot=begin)

    return start


Restore = Callable[..., contextlib.AbstractContextManager[Guest]]


def draw(guest: Guest) -> tuple[dict[str, str], float]:
    """Random values of the guest by name, and the delay of its clock, s."""
    answer = guest.succeed(_DRAW, timeout_s=120)
    values = {name: value for value, name in (line.split() for line in answer.splitlines())}
    assert set(values) >= {"hwrng", "urandom", "uuid", "boot_id", "mktemp", "xfs", "ext4", "time"}
    return values, time.time() - float(values.pop("time"))


def cookie(guest: Guest) -> bytes:
    """The first random bytes of the ssh server, from its SSH_MSG_KEXINIT.

    The server draws its half of the session's keys next (RFC 4253, sections 6 and 7.1).
    """
    with socket.create_connection(("127.0.0.1", guest.ssh_port), timeout=20) as sock:
        sock.sendall(b"SSH-2.0-selftest\r\n")
        stream = sock.makefile("rb")
        assert stream.readline().startswith(b"SSH-2.0-dropbear")
        _length, _padding, kind = struct.unpack(">IBB", stream.read(6))
        assert kind == 20
        return stream.read(16)


def test_random_values_differ_between_two_guests(restore: Restore) -> None:
    """Random numbers, uuids of file systems and ssh keys differ; the clock is the host's."""
    with restore() as one, restore() as other:
        (first, late_s), (second, later_s) = draw(one), draw(other)
        assert [name for name in first if first[name] == second[name]] == []
        # The delay includes the transfer of the answer.
        assert -0.1 < late_s < 5
        assert -0.1 < later_s < 5
        assert cookie(one) != cookie(other)


def test_a_guest_s_changes_stay_in_that_guest(restore: Restore, snapshot: Snapshot) -> None:
    """Guests of one snapshot run concurrently, and do not change it."""
    before = [file.stat().st_mtime_ns for file in sorted(snapshot.folder.iterdir())]
    with restore() as one, restore() as other:
        one.succeed("head -c 64M /dev/urandom > /tmp/own")
        other.fail("test -e /tmp/own")
        assert one.machine.nvdimms == other.machine.nvdimms
    with restore() as later:
        later.fail("test -e /tmp/own")
    assert [file.stat().st_mtime_ns for file in sorted(snapshot.folder.iterdir())] == before


def test_the_console_begins_with_the_boot(restore: Restore) -> None:
    """The console log is complete, also for a restored guest."""
    with restore() as guest:
        guest.succeed("echo '<1>after the restore' > /dev/kmsg")
    log = (guest.folder / "console.log").read_text(errors="replace")
    positions = [log.index(what) for what in ("Linux version", "paprscm: ready", "after the")]
    assert positions == sorted(positions)


def damaged(snapshot: Snapshot, folder: Path) -> Snapshot:
    """A copy of the snapshot in a separate cache, with a state that cannot be loaded."""
    copy = folder / "cache" / "snapshot" / snapshot.folder.name
    shutil.copytree(snapshot.folder, copy, ignore=shutil.ignore_patterns("memory"))
    (copy / "memory").symlink_to(snapshot.folder / "memory")
    (copy / "state").write_bytes(b"\0" * 1000)
    return dataclasses.replace(snapshot, folder=copy)


def test_a_guest_that_does_not_wake_is_booted(
    environment: Environment, snapshot: Snapshot, restore: Restore, tmp_path: Path
) -> None:
    """The test continues, and the snapshot is dropped, so that the next job makes a new one."""
    bad = damaged(snapshot, tmp_path)
    with pytest.raises(NotRestoredError, match="does not load"), restore(begin=bad):
        pass
    settings = dataclasses.replace(environment.settings, cache_dir=tmp_path / "cache")
    here = dataclasses.replace(environment, settings=settings, snapshot=bad)
    with here.guest(DIMMS, folder=tmp_path / "guest") as guest:
        assert "restored" not in guest.times.reached()
        assert "Linux version" in guest.succeed("cat /proc/version")
    assert not bad.folder.exists()
    assert (snapshot.folder / "memory").exists()


def run_ten(start: str, folder: Path) -> dict[str, tuple[str, Path]]:
    """Run the ten tests; return status and folder of recorded state by name of the test."""
    done = subprocess.run(
        [
            *(sys.executable.replace("python", "avocado"), "run", str(TEN)),
            *("-p", f"start={start}", "--job-results-dir", str(folder)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "map_sync")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    tests = read_record(folder / "latest").tests
    assert len(tests) == 10, done.stdout + done.stderr
    outcomes: dict[str, tuple[str, Path]] = {}
    for test in tests:
        marks = {metric.dimensions.get("mark") for metric in test.metrics}
        warm = "restored" in marks
        assert warm == (start == "auto"), f"{test.name} was started otherwise: {marks}"
        place = (folder / "latest" / test.logs[0]).parent / "data" / "seen"
        outcomes[test.name.rpartition(":")[2]] = (test.status, place)
    return outcomes


def test_ten_tests_do_not_depend_on_the_start(
    environment: Environment, snapshot: Snapshot, tmp_path: Path
) -> None:
    """Ten tests of the suite, cold and warm: verdicts, device tree, sysfs and kernel messages."""
    del snapshot

    def contents() -> set[Path]:
        return set((environment.settings.cache_dir / "dimm").glob("*"))

    before = contents()
    cold = run_ten("cold", tmp_path / "cold")
    if contents() != before:
        # A guest that made the content of a DIMM has other messages and device numbers.
        cold = run_ten("cold", tmp_path / "again")
    warm = run_ten("auto", tmp_path / "auto")
    faults = []
    for name in sorted(cold.keys() | warm.keys()):
        (status, seen), (status_warm, seen_warm) = cold[name], warm[name]
        if (status, status_warm) != ("PASS", "PASS"):
            faults.append(f"{name}: {status} cold, {status_warm} warm")
            continue
        one, other = Seen(seen), Seen(seen_warm)
        assert min(len(one.tree), len(one.files), len(one.log)) > 50, name
        faults += [f"{name}: {line}" for line in differences(one, other)]
    assert faults == []


def qemu_below(logs: Path) -> int:
    """Pid of the QEMU whose console log is below a folder."""
    [pid] = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if b"qemu" in (words := cmdline(folder)).partition(b"\0")[0]
        and f"logfile={logs}".encode() in words
    ]
    return pid


def cmdline(folder: Path) -> bytes:
    """The command line of a process, or nothing if it has just ended."""
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_qemu_does_not_drop_the_snapshot(
    snapshot: Snapshot, restore: Restore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other guest is booted instead, and the snapshot stays."""

    def load_and_kill(qmp: Qmp, begin: Snapshot) -> None:
        os.kill(qemu_below(tmp_path), 9)
        load_state(qmp, begin)

    monkeypatch.setattr("paprscm.guest.guest.load_state", load_and_kill)
    with pytest.raises(KilledError, match="was killed by SIGKILL from outside"), restore():
        pass
    assert snapshot.folder.exists()
