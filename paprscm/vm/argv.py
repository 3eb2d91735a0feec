# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line, computed from a machine and its boot files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.vm.machine import MIB, Board, Machine, Nvdimm, Properties

# Disables default mitigations that TCG does not model; QEMU would print four warnings per start.
TCG_CAPS = "cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"

BASE_CMDLINE = "console=hvc0 root=/dev/vda ro init=/init"
"""First words of every guest kernel's command line."""
AGENT_PORT = "paprscm.agent"
"""The port of guest_tools/agent.c; images/init looks for this name."""
PORT_NAME = "paprscm"
"""Name of the virtio-serial port through which a restored guest is woken
(/sys/class/virtio-ports/*/name)."""
# A transitional device cannot have iommu_platform (QEMU hw/virtio/virtio-pci.c). Not by -global:
# pseries of 10.0 and 11.1 then end, because virtio-net-pci-non-transitional has no disable-legacy.
_IOMMU = ",disable-legacy=on,iommu_platform=on"


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Files that the machine boots: a vmlinux, an initramfs for its modules, and the root disk.

    Attributes:
        kernel: the vmlinux.
        disk: the root disk.
        initrd: the initramfs; None: none.
        words: command-line words that this kernel needs.
    """

    kernel: Path
    disk: Path
    initrd: Path | None = None
    words: tuple[str, ...] = ()

    def cmdline(self, machine: Machine) -> str:
        """Return the kernel's command line."""
        return " ".join(
            (
                BASE_CMDLINE,
                # With an initramfs /init configures the network: a kernel whose virtio_net is a
                # module waits 12 s for eth0 before /init can load any module
                # (net/ipv4/ipconfig.c, CONF_CARRIER_TIMEOUT).
                *(() if self.initrd else ("ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off",)),
                # A panic ends QEMU immediately (with -no-reboot): an event instead of a timeout.
                "panic=-1",
                # TCG translates ld.so and libc again for each address that they are mapped at: a
                # process starts in 15 ms without address space randomization, in 60 ms with it.
                "norandmaps",
                *self.words,
                *machine.cmdline,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Channels to a running QEMU: connected sockets that it inherits.

    Sockets from socketpair(2) leave nothing behind in the file system.

    Attributes:
        console_fd: the guest's serial console.
        port_fd: the virtio-serial port through which a restored guest is woken.
        agent_fd: the virtio-serial port through which the guest's agent receives commands.
        console_log: the file to which QEMU appends the guest's console output.
    """

    console_fd: int
    port_fd: int
    agent_fd: int
    console_log: Path


@dataclass(frozen=True, kw_only=True)
class MemoryFile:
    """The guest's memory as a file, which many guests can share as their initial memory.

    Attributes:
        path: the file.
        restored: True: the file is the guest's initial memory, its writes stay private, and it
            waits for its state (-incoming) before it runs. False: the guest writes to the file.
        shared: the guest writes to the file although it was restored; the next QEMU of a guest that
            migrates maps the same file.
        has_rom: the QEMU can open the file read-only and still give the guest writable memory
            (readonly=on,rom=off, since QEMU 9.0).
    """

    path: Path
    restored: bool
    shared: bool = False
    has_rom: bool = False

    def backend(self, size_mib: int) -> Properties:
        """Return the memory backend's properties, for -object."""
        properties: Properties = {
            "qom-type": "memory-backend-file",
            "id": "ram",
            "mem-path": str(self.path),
            "size": size_mib * MIB,
            "share": self.shared or not self.restored,
        }
        if self.restored and self.has_rom and not self.shared:
            # Without rom=off, readonly=on makes the guest's memory a ROM.
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
    *,
    incoming: bool = False,
    stopped: bool = False,
) -> list[str]:
    """Return the command line of one guest, without a monitor; a pure function.

    Args:
        qemu: command-line prefix that starts the binary.
        machine: its DIMMs and kernel words.
        board: its processors and memory.
        payload: its kernel and disk.
        files: the backing file of each slot.
        wiring: the channels; None: console and monitor on the terminal, for a manual run.
        memory: the guest's memory; None: QEMU allocates it. A restored guest gets its DIMMs later,
            by hotplug.
        incoming: wait for the state of a running guest, which includes its memory and its DIMMs.
        stopped: a guest that boots stops before its first instruction.
    """
    iommu = _IOMMU if machine.iommu else ""
    argv = [
        *_base(qemu, machine, board, "memory-backend=ram" if memory else ""),
        *(("-object", _words(memory.backend(board.memory_mib))) if memory else ()),
        *_numa(machine, board),
        "-no-reboot",
        *("-kernel", str(payload.kernel)),
        *(("-initrd", str(payload.initrd)) if payload.initrd else ()),
        *("-append", payload.cmdline(machine)),
        *("-blockdev", _words(_disk("root", payload.disk, read_only=True))),
        *("-device", f"virtio-blk-pci,drive=root,romfile={iommu}"),
        *(_second_disk(machine.disk, iommu) if machine.disk else ()),
        *("-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22"),
        *("-device", f"virtio-net-pci,netdev=net,romfile={iommu}"),
        *("-device", f"virtio-rng-pci{iommu}"),
        *("-device", f"virtio-serial-pci{iommu}"),
    ]
    if wiring is None:
        argv += ["-serial", "mon:stdio", "-chardev", "null,id=port", "-chardev", "null,id=agent"]
    else:
        log = _escaped(str(wiring.console_log))
        console = f"socket,id=console,fd={wiring.console_fd},logfile={log},logappend=on"
        argv += [
            *("-chardev", console),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=port,fd={wiring.port_fd}"),
            *("-chardev", f"socket,id=agent,fd={wiring.agent_fd}"),
        ]
    for chardev, name in (("port", PORT_NAME), ("agent", AGENT_PORT)):
        argv += ["-device", f"virtserialport,chardev={chardev},name={name}"]
    if incoming:
        return [*argv, *_dimms(machine, files), "-incoming", "defer"]
    if memory and memory.restored:
        return [*argv, "-incoming", "defer", "-S"]
    return [*argv, *_dimms(machine, files), *(["-S"] if stopped else [])]


def bare_argv(
    qemu: Sequence[str],
    machine: Machine,
    board: Board,
    files: Mapping[int, Path],
    *,
    program: Path | None = None,
    memory_fd: int | None = None,
) -> list[str]:
    """Return the command line of a machine that has only DIMMs, for tests of the device alone.

    Args:
        qemu: command-line prefix that starts the binary.
        machine: its DIMMs.
        board: its processors and memory; the firmware boots only `program`.
        files: the backing file of each slot.
        program: a freestanding program to run; None: the machine stays stopped (-S).
        memory_fd: descriptor of a file that becomes the guest's memory, shared with this process;
            None: QEMU allocates it.
    """
    argv = [
        *_base(qemu, machine, board, "memory-backend=ram" if memory_fd is not None else ""),
        *(("-kernel", str(program)) if program else ("-S",)),
    ]
    if memory_fd is not None:
        # QEMU opens the path itself, so both a plain file and a memfd work.
        memory = MemoryFile(path=Path(f"/proc/self/fd/{memory_fd}"), restored=False)
        argv += ["-object", _words(memory.backend(board.memory_mib))]
    return argv + _dimms(machine, files)


def _base(qemu: Sequence[str], machine: Machine, board: Board, option: str = "") -> list[str]:
    """Return the part that all machines share: type, processors, memory."""
    words = [
        machine.type,
        *(["x-vof=on"] if board.firmware == "vof" else []),
        *([TCG_CAPS] if board.accel == "tcg" else []),
        *([option] if option else []),
        *machine.options,
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


def _numa(machine: Machine, board: Board) -> list[str]:
    if machine.nodes == 1:
        return []
    size = board.memory_mib * MIB
    argv = ["-object", _words({"qom-type": "memory-backend-ram", "id": "node0", "size": size})]
    for node in range(machine.nodes):
        argv += ["-numa", f"node,nodeid={node}" + ("" if node else ",memdev=node0")]
    for node, other, distance in machine.distances:
        argv += ["-numa", f"dist,src={node},dst={other},val={distance}"]
    return argv


def _dimms(machine: Machine, files: Mapping[int, Path]) -> list[str]:
    argv: list[str] = []
    for nvdimm in machine.nvdimms:
        argv += ["-object", _words(nvdimm.backend(files[nvdimm.slot]))]
        argv += ["-device", _words(nvdimm.frontend())]
    return argv


def script(argv: Sequence[str], nvdimms: Iterable[Nvdimm], files: Mapping[int, Path]) -> str:
    """Return a shell script that runs a command line manually.

    Args:
        argv: a command line without Wiring.
        nvdimms: its DIMMs.
        files: the backing file of each slot; the script creates missing ones.
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
        # One option and its value per line.
        words.append(("\\\n  " if word.startswith("-") else "") + shlex.quote(word))
    return "\n".join(lines) + "\nexec " + " ".join(words) + ' "$@"\n'


def _second_disk(disk: Path, iommu: str) -> list[str]:
    words = _words(_disk("second", disk, read_only=False))
    return ["-blockdev", words, "-device", f"virtio-blk-pci,drive=second,romfile={iommu}"]


def _disk(name: str, disk: Path, *, read_only: bool) -> Properties:
    return {
        "driver": "raw",
        "node-name": name,
        "read-only": read_only,
        "file.driver": "file",
        "file.filename": str(disk),
    }


def _words(properties: Properties) -> str:
    """Format properties for QEMU's command line: a=b,c=on; the first key may stay implicit."""
    words: list[str] = []
    for name, value in properties.items():
        text = ("on" if value else "off") if isinstance(value, bool) else _escaped(str(value))
        words.append(text if name in ("qom-type", "driver") and not words else f"{name}={text}")
    text = ",".join(words)
    # -blockdev has no implicit first key.
    return "driver=" + text if "node-name" in properties else text


def _escaped(text: str) -> str:
    return text.replace(",", ",,")
