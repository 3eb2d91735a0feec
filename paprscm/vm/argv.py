# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line, computed from a machine and from what it boots."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.vm.machine import MIB, Machine, Properties

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
        qmp_fd: QEMU's monitor.
        port_fd: the virtio-serial port through which a restored guest is woken.
        console_log: what the guest prints is added there by QEMU itself.
    """

    console_fd: int
    qmp_fd: int
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
    payload: Payload,
    files: Mapping[int, Path],
    wiring: Wiring | None,
    memory: MemoryFile | None = None,
) -> list[str]:
    """The command line of one guest; nothing is asked of the machine that we run on.

    Args:
        qemu: how the binary is started.
        machine: what is wanted.
        payload: what it boots.
        files: the backing file of each slot.
        wiring: None: console and monitor on the terminal, for a person who runs it by hand.
        memory: None: QEMU's own. A guest that is restored gets its DIMMs later, by hotplug.
    """
    argv = [
        *_board(qemu, machine, "memory-backend=ram" if memory else ""),
        *(("-object", _words(memory.backend(machine.memory_mib))) if memory else ()),
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
            *_monitor(wiring.qmp_fd),
            *("-chardev", f"socket,id=port,fd={wiring.port_fd}"),
        ]
    argv += ["-device", f"virtserialport,chardev=port,name={PORT_NAME}"]
    if memory and memory.restored:
        return [*argv, "-incoming", "defer", "-S"]
    return argv + _dimms(machine, files)


def bare_argv(
    qemu: Sequence[str],
    machine: Machine,
    files: Mapping[int, Path],
    qmp_fd: int | None,
    *,
    program: Path | None = None,
    memory_fd: int | None = None,
) -> list[str]:
    """The command line of a machine with nothing but its DIMMs, for tests of the device alone.

    Args:
        qemu: how the binary is started.
        machine: what is wanted; its firmware boots nothing but `program`.
        files: the backing file of each slot.
        qmp_fd: QEMU's monitor; None: on the terminal, for a person who runs it by hand.
        program: a freestanding program to run; without one the machine is stopped (-S).
        memory_fd: the guest's memory is this file, shared with us; None: QEMU's own.
    """
    argv = [
        *_board(qemu, machine, "memory-backend=ram" if memory_fd is not None else ""),
        *(("-kernel", str(program)) if program else ("-S",)),
        *(_monitor(qmp_fd) if qmp_fd is not None else ("-monitor", "stdio")),
    ]
    if memory_fd is not None:
        # Opened by QEMU itself, so that a plain file and a memfd will both do.
        memory = MemoryFile(path=Path(f"/proc/self/fd/{memory_fd}"), restored=False)
        argv += ["-object", _words(memory.backend(machine.memory_mib))]
    return argv + _dimms(machine, files)


def _board(qemu: Sequence[str], machine: Machine, option: str = "") -> list[str]:
    """The machine proper: type, processors, memory."""
    words = [
        "pseries",
        *(["x-vof=on"] if machine.firmware == "vof" else []),
        *([TCG_CAPS] if machine.accel == "tcg" else []),
        *([option] if option else []),
    ]
    return [
        *qemu,
        *("-machine", ",".join(words)),
        *("-accel", machine.accel),
        *("-cpu", machine.cpu),
        *("-smp", str(machine.smp)),
        *("-m", f"{machine.memory_mib}M,slots={machine.slots},maxmem={machine.maxmem_mib}M"),
        "-nodefaults",
        *("-display", "none"),
    ]


def _monitor(qmp_fd: int) -> list[str]:
    # Not -mon, which QEMU 11.1 calls deprecated at each start.
    return ["-chardev", f"socket,id=qmp,fd={qmp_fd}", "-qmp", "chardev:qmp"]


def _dimms(machine: Machine, files: Mapping[int, Path]) -> list[str]:
    argv: list[str] = []
    for nvdimm in machine.nvdimms:
        argv += ["-object", _words(nvdimm.backend(files[nvdimm.slot]))]
        argv += ["-device", _words(nvdimm.frontend())]
    return argv


def script(argv: Sequence[str], files: Mapping[Path, int]) -> str:
    """A shell script that runs the same command line by hand.

    Args:
        argv: from qemu_argv() without a wiring.
        files: backing files to make first if they are gone, with their sizes in bytes.
    """
    lines = ["#!/bin/sh", "# The guest's console is on the terminal; C-a x ends QEMU."]
    lines += [
        f"[ -e {shlex.quote(str(file))} ] || "
        f"{{ mkdir -p {shlex.quote(str(file.parent))} && "
        f"truncate -s {size} {shlex.quote(str(file))}; }}"
        for file, size in files.items()
    ]
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
