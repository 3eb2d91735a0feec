# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line, computed from a machine and from what it boots."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.vm.machine import MIB, Board, Machine, Nvdimm, Properties

# Default mitigations that TCG does not model; without this QEMU prints four warnings at each start.
TCG_CAPS = "cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"

BASE_CMDLINE = "console=hvc0 root=/dev/vda ro init=/init"
"""Begins the command line of each guest's kernel."""
PORT_NAME = "paprscm"
"""The guest finds the port of its restoring by this name, in /sys/class/virtio-ports/*/name."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Files that the machine boots: a vmlinux, an initramfs for its modules, and the root disk.

    Attributes:
        kernel: the vmlinux.
        disk: the root disk.
        initrd: the initramfs, if there is one.
        words: what this kernel needs on its command line.
    """

    kernel: Path
    disk: Path
    initrd: Path | None = None
    words: tuple[str, ...] = ()

    def cmdline(self, machine: Machine) -> str:
        """The kernel's command line."""
        return " ".join(
            (
                BASE_CMDLINE,
                # A kernel whose virtio_net is a module would wait 12 s for eth0 before it loads any
                # (net/ipv4/ipconfig.c, CONF_CARRIER_TIMEOUT); then /init configures it.
                *(() if self.initrd else ("ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off",)),
                # A panic ends QEMU at once (-no-reboot): an event instead of a timeout.
                "panic=-1",
                *self.words,
                *machine.cmdline,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Channels to a running QEMU: connected sockets that it inherits.

    Sockets from socketpair(2) have no name in the file system that could be left behind.

    Attributes:
        console_fd: the guest's serial console.
        port_fd: the virtio-serial port through which a restored guest is woken.
        console_log: what the guest prints is added there by QEMU itself.
    """

    console_fd: int
    port_fd: int
    console_log: Path


@dataclass(frozen=True, kw_only=True)
class MemoryFile:
    """The guest's memory as a file, so that many guests can begin with the same.

    Attributes:
        path: the file.
        restored: the guest begins with what is in it, and keeps what it changes to itself; it then
            waits for its state (-incoming) before it runs. Otherwise the file becomes its memory.
        has_rom: the QEMU can open the file read-only and yet give the guest memory that it can
            write to (readonly=on,rom=off, from 9.0 on).
    """

    path: Path
    restored: bool
    has_rom: bool = False

    def backend(self, size_mib: int) -> Properties:
        """The object behind the memory, for -object."""
        properties: Properties = {
            "qom-type": "memory-backend-file",
            "id": "ram",
            "mem-path": str(self.path),
            "size": size_mib * MIB,
            "share": not self.restored,
        }
        if self.restored and self.has_rom:
            # Alone, readonly=on makes the guest's memory a ROM.
            properties |= {"readonly": True, "rom": "off"}
        return properties


def qemu_argv(
    qemu: Sequence[str],
    machine: Machine,
    board: Board,
    payload: Payload,
    files: Mapping[int, Path],
    wiring: Wiring | None,
    memory: MemoryFile | None = None,
) -> list[str]:
    """The command line of one guest, without a monitor; no question is put to this host.

    Args:
        qemu: how the binary is started.
        machine: its DIMMs and kernel words.
        board: its processors and memory.
        payload: what it boots.
        files: the backing file of each slot.
        wiring: None: console and monitor on the terminal, for a person who runs it by hand.
        memory: None: QEMU's own. A guest that is restored gets its DIMMs later, by hotplug.
    """
    argv = [
        *_base(qemu, machine, board, "memory-backend=ram" if memory else ""),
        *(("-object", _words(memory.backend(board.memory_mib))) if memory else ()),
        "-no-reboot",
        *("-kernel", str(payload.kernel)),
        *(("-initrd", str(payload.initrd)) if payload.initrd else ()),
        *("-append", payload.cmdline(machine)),
        *("-blockdev", _words(_disk(payload.disk))),
        *("-device", "virtio-blk-pci,drive=root,romfile="),
        *("-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-rng-pci"),
        *("-device", "virtio-serial-pci"),
    ]
    if wiring is None:
        argv += ["-serial", "mon:stdio", "-chardev", "null,id=port"]
    else:
        log = _escaped(str(wiring.console_log))
        console = f"socket,id=console,fd={wiring.console_fd},logfile={log},logappend=on"
        argv += [
            *("-chardev", console),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=port,fd={wiring.port_fd}"),
        ]
    argv += ["-device", f"virtserialport,chardev=port,name={PORT_NAME}"]
    if memory and memory.restored:
        return [*argv, "-incoming", "defer", "-S"]
    return argv + _dimms(machine, files)


def bare_argv(
    qemu: Sequence[str],
    machine: Machine,
    board: Board,
    files: Mapping[int, Path],
    *,
    program: Path | None = None,
    memory_fd: int | None = None,
) -> list[str]:
    """The command line of a machine with nothing but its DIMMs, for tests of the device alone.

    Args:
        qemu: how the binary is started.
        machine: its DIMMs.
        board: its processors and memory; the firmware boots nothing but `program`.
        files: the backing file of each slot.
        program: a freestanding program to run; without one the machine is stopped (-S).
        memory_fd: the guest's memory is this file, shared with us; None: QEMU's own.
    """
    argv = [
        *_base(qemu, machine, board, "memory-backend=ram" if memory_fd is not None else ""),
        *(("-kernel", str(program)) if program else ("-S",)),
    ]
    if memory_fd is not None:
        # Opened by QEMU itself, so that a plain file and a memfd will both do.
        memory = MemoryFile(path=Path(f"/proc/self/fd/{memory_fd}"), restored=False)
        argv += ["-object", _words(memory.backend(board.memory_mib))]
    return argv + _dimms(machine, files)


def _base(qemu: Sequence[str], machine: Machine, board: Board, option: str = "") -> list[str]:
    """The machine proper: type, processors, memory."""
    words = [
        "pseries",
        *(["x-vof=on"] if board.firmware == "vof" else []),
        *([TCG_CAPS] if board.accel == "tcg" else []),
        *([option] if option else []),
    ]
    maxmem_mib = board.memory_mib + machine.dimm_room_bytes // MIB
    return [
        *qemu,
        *("-machine", ",".join(words)),
        *("-accel", board.accel),
        *("-cpu", board.cpu),
        *("-smp", str(board.smp)),
        *("-m", f"{board.memory_mib}M,slots={machine.slots},maxmem={maxmem_mib}M"),
        "-nodefaults",
        *("-display", "none"),
    ]


def _dimms(machine: Machine, files: Mapping[int, Path]) -> list[str]:
    argv: list[str] = []
    for nvdimm in machine.nvdimms:
        argv += ["-object", _words(nvdimm.backend(files[nvdimm.slot]))]
        argv += ["-device", _words(nvdimm.frontend())]
    return argv


def script(argv: Sequence[str], nvdimms: Iterable[Nvdimm], files: Mapping[int, Path]) -> str:
    """A shell script that runs a command line by hand.

    Args:
        argv: a command line without our channels.
        nvdimms: its DIMMs.
        files: the backing file of each slot; one that is gone is made first.
    """
    lines = ["#!/bin/sh", "# Console or monitor are on the terminal; C-a x ends a guest's QEMU."]
    for nvdimm in nvdimms:
        file = files[nvdimm.slot]
        lines.append(
            f"[ -e {shlex.quote(str(file))} ] || "
            f"{{ mkdir -p {shlex.quote(str(file.parent))} && "
            f"truncate -s {nvdimm.file_bytes} {shlex.quote(str(file))}; }}"
        )
    words: list[str] = []
    for word in argv:
        # One option and its value on a line.
        words.append(("\\\n  " if word.startswith("-") else "") + shlex.quote(word))
    return "\n".join(lines) + "\nexec " + " ".join(words) + ' "$@"\n'


def _disk(disk: Path) -> Properties:
    return {
        "driver": "raw",
        "node-name": "root",
        "read-only": True,
        "file.driver": "file",
        "file.filename": str(disk),
    }


def _words(properties: Properties) -> str:
    """Properties as QEMU's command line wants them: a=b,c=on; the first key may stay unnamed."""
    words: list[str] = []
    for name, value in properties.items():
        text = ("on" if value else "off") if isinstance(value, bool) else _escaped(str(value))
        words.append(text if name in ("qom-type", "driver") and not words else f"{name}={text}")
    text = ",".join(words)
    # -blockdev has no implied first key.
    return "driver=" + text if "node-name" in properties else text


def _escaped(text: str) -> str:
    return text.replace(",", ",,")
