# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots: answers of a restored guest are checked, and a snapshot fits only its machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paprscm.emulator.binary import Qemu
from paprscm.errors import GuestLostError, HostError
from paprscm.guest.snapshot import (
    SEED_BYTES,
    NotRestoredError,
    Port,
    Snapshot,
    load_state,
    save_state,
)
from paprscm.vm.argv import MemoryFile, Payload, Wiring, qemu_argv
from paprscm.vm.backing_files import ScratchFiles
from paprscm.vm.machine import MIB, Board, Machine, Nvdimm
from paprscm.vm.vm import Vm

BOARD = Board(memory_mib=256)


def alive() -> None:
    """Check of a guest that is not lost."""


@pytest.fixture
def ends() -> Iterator[tuple[Port, socket.socket]]:
    """Our port, and QEMU's end of it."""
    ours, theirs = socket.socketpair()
    port = Port(ours)
    with theirs:
        yield port, theirs
    port.close()


def test_wake_has_the_time_the_regions_and_a_seed(ends: tuple[Port, socket.socket]) -> None:
    port, guest = ends
    port.wake(regions=2)
    port.wake(regions=2)
    first, second = guest.recv(1000).decode().splitlines()
    words = first.split()
    assert words[0] == "wake"
    assert abs(int(words[1]) + int(words[2]) / 1e9 - time.time()) < 5
    assert words[3] == "2"
    assert re.fullmatch(f"[0-9a-f]{{{2 * SEED_BYTES}}}", words[5])
    assert words[5] != second.split()[5]


def test_answers_come_in_pieces_or_together(ends: tuple[Port, socket.socket]) -> None:
    port, guest = ends
    guest.send(b"awa")
    guest.send(b"ke 2\nregions 1\n")
    assert port.wait_awake(alive) == 2
    assert port.wait_regions(alive) == 1


@pytest.mark.parametrize(
    "said",
    [
        b"failed RNDADDENTROPY: EPERM (errno 1)\n",
        b"regions 2\n",
        b"awake -1\n",
        b"awake 99999999999\n",
        b"awake 2 \n",
        b"\xff\xfe\n",
        b"x" * 600,
    ],
)
def test_a_malformed_answer_is_an_error(ends: tuple[Port, socket.socket], said: bytes) -> None:
    port, guest = ends
    guest.send(said)
    with pytest.raises(NotRestoredError, match="the restored guest sent"):
        port.wait_awake(alive)


def test_a_closed_port_is_detected_immediately(ends: tuple[Port, socket.socket]) -> None:
    port, guest = ends
    guest.close()
    with pytest.raises(NotRestoredError, match="closed"):
        port.wait_awake(alive)


def test_silence_has_a_limit(
    ends: tuple[Port, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, _guest = ends
    monkeypatch.setattr("paprscm.guest.snapshot._AWAKE_LIMIT_S", 0.1)
    with pytest.raises(NotRestoredError, match=r"did not send 'awake' within 0\.1 s"):
        port.wait_awake(alive)


def test_a_lost_guest_stays_a_lost_guest(ends: tuple[Port, socket.socket]) -> None:
    """A kernel that panics when a DIMM is plugged must not cause a cold boot instead."""
    port, _guest = ends

    def lost() -> None:
        raise GuestLostError("Kernel panic")

    with pytest.raises(GuestLostError, match="Kernel panic"):
        port.wait_awake(lost)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"nvdimms": (Nvdimm(slot=1), Nvdimm(slot=2, pmem=True))}, True),
        ({"nvdimms": tuple(Nvdimm(slot=n) for n in range(8))}, True),
        ({"cmdline": ("dyndbg",)}, False),
        ({"slots": 9}, False),
        ({"type": "pseries-7.2"}, False),
        ({"smp": 1}, False),
        ({"memory_mib": 512}, False),
        # More DIMM space than the saved guest has.
        ({"nvdimms": (Nvdimm(size_bytes=8192 * MIB),)}, False),
    ],
)
def test_a_snapshot_fits_machines_that_differ_only_in_dimms(
    change: dict[str, object], fits: bool
) -> None:
    snapshot = Snapshot(folder=Path("/s"), board=BOARD, has_rom=False)
    machine = Machine(**change)  # type: ignore[arg-type]
    assert snapshot.fits(machine, machine.board(BOARD)) == fits


def test_a_snapshot_is_for_one_firmware() -> None:
    snapshot = Snapshot(folder=Path("/s"), board=BOARD, has_rom=False)
    assert not snapshot.fits(Machine(), dataclasses.replace(BOARD, firmware="slof"))


@pytest.mark.parametrize("has_rom", [False, True])
def test_a_restored_machine_gets_its_dimms_later(has_rom: bool) -> None:
    payload = Payload(kernel=Path("/k"), disk=Path("/d"))
    wiring = Wiring(console_fd=5, port_fd=7, agent_fd=8, console_log=Path("/o"))
    machine = Machine(nvdimms=(Nvdimm(),))
    memory = MemoryFile(path=Path("/m"), restored=True, has_rom=has_rom)
    files = {0: Path("/f")}
    words = qemu_argv(("qemu",), machine, BOARD, payload, files, wiring, memory)
    assert words[-3:] == ["-incoming", "defer", "-S"]
    assert not [word for word in words if "spapr-nvdimm" in word]
    # A machine that takes over a running guest has them from the start, and runs by itself.
    next_ = qemu_argv(("qemu",), machine, BOARD, payload, files, wiring, memory, incoming=True)
    assert next_[-2:] == ["-incoming", "defer"]
    assert [word for word in next_ if word.startswith("spapr-nvdimm")]
    own = "readonly=on,rom=off" if has_rom else ""
    [memory_object] = [word for word in words if word.startswith("memory-backend-file")]
    # Its writes must not reach the memory file that other guests share.
    assert memory_object.split(",share=")[1].strip(",") == ("off," + own).strip(",")
    # All QEMUs of a guest that migrates write to the same file.
    shared = dataclasses.replace(memory, shared=True).backend(256)
    assert shared["share"] is True
    assert "readonly" not in shared
    # For QEMU a booted and a restored machine must be the same.
    saved = qemu_argv(
        ("qemu",),
        machine,
        BOARD,
        payload,
        files,
        wiring,
        MemoryFile(path=Path("/m"), restored=False),
    )
    differ = set(saved) ^ set(words)
    assert not [word for word in differ if word.startswith(("pseries", "virt"))]


def stopped(qemu: Qemu, memory: MemoryFile) -> list[str]:
    """The command line of a stopped machine."""
    object_words = ",".join(
        f"{name}={('on' if value else 'off') if isinstance(value, bool) else value}"
        for name, value in memory.backend(256).items()
    )
    return [
        *qemu.argv_prefix,
        *("-machine", "pseries,x-vof=on,memory-backend=ram", "-m", "256M"),
        *("-nodefaults", "-display", "none", "-S"),
        *("-object", object_words.removeprefix("qom-type=")),
        *(("-incoming", "defer") if memory.restored else ()),
    ]


@contextlib.contextmanager
def machine(qemu: Qemu, folder: Path, memory: MemoryFile) -> Iterator[Vm]:
    """The stopped machine in a running QEMU."""
    with (
        ScratchFiles(folder) as files,
        Vm(stopped(qemu, memory), files, folder=folder / "log", by_hand="") as vm,
    ):
        yield vm


def test_a_state_is_loaded_completely_or_refused_immediately(qemu: Qemu, tmp_path: Path) -> None:
    has_rom = qemu.has("memory-backend-file", "rom")
    snapshot = Snapshot(folder=tmp_path, board=BOARD, has_rom=has_rom)
    memory = snapshot.memory.path
    with machine(qemu, tmp_path, MemoryFile(path=memory, restored=False)) as vm:
        save_state(vm.qmp, snapshot.state)
    with memory.open("r+b") as file:
        file.write(b"as it was")
    with machine(qemu, tmp_path, snapshot.memory) as vm:
        load_state(vm.qmp, snapshot)
        assert vm.qmp.execute("query-status")["status"] in ("paused", "prelaunch")
        assert vm.qmp.hmp("xp /4xb 0").split()[1:] == [hex(byte) for byte in b"as i"]
    whole = snapshot.state.read_bytes()
    for broken in (whole[: len(whole) // 2], b"\0" * 100, b""):
        snapshot.state.write_bytes(broken)
        begun = time.monotonic()
        with (
            machine(qemu, tmp_path, snapshot.memory) as vm,
            pytest.raises(NotRestoredError, match="does not load the snapshot"),
        ):
            load_state(vm.qmp, snapshot)
        assert time.monotonic() - begun < 20
    assert memory.stat().st_size == 256 * MIB


def test_a_state_is_complete_when_it_was_saved(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU finishes before the program that writes the file has begun."""
    slow = tmp_path / "bin" / "cat"
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/sh\n/bin/cat "$@" > {tmp_path}/kept; sleep 0.5; /bin/cat {tmp_path}/kept\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    memory = MemoryFile(path=tmp_path / "memory", restored=False)
    with machine(qemu, tmp_path, memory) as vm:
        save_state(vm.qmp, tmp_path / "state")
        assert (tmp_path / "state").read_bytes() == (tmp_path / "kept").read_bytes() != b""


def test_a_state_that_cannot_be_written_is_an_error(qemu: Qemu, tmp_path: Path) -> None:
    memory = MemoryFile(path=tmp_path / "memory", restored=False)
    with machine(qemu, tmp_path, memory) as vm, pytest.raises(HostError, match="migrate failed"):
        save_state(vm.qmp, tmp_path / "nowhere" / "state")
