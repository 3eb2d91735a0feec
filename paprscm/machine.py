# SPDX-License-Identifier: GPL-2.0-or-later
"""A pseries machine and its NVDIMMs as data, and the QEMU command line computed from them."""

from __future__ import annotations

import shlex
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import CapabilityError, ConfigError
from paprscm.papr import MAX_SLOTS, SCM_BLOCK_SIZE, SCM_MIN_LABEL_SIZE, drc_index
from paprscm.qemu import Qemu

MIB = 1 << 20
GIB = 1 << 30

# Room for DIMMs, the same for all machines whose DIMMs fit: a restored guest has that of the one
# that was saved.
_DIMM_ROOM = 6 * GIB
# A machine with more of them still has room for some that are plugged into the running guest.
_HOTPLUG_ROOM = 2 * GIB

_UUIDS = uuids.UUID("6f1c7a52-3a0e-4b43-9a1f-5a7e61f0c9d4")

# Default mitigations that TCG does not model; without this QEMU prints four warnings at each start.
TCG_CAPS = "cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"

type_names = ("spapr-nvdimm", "nvdimm")

BASE_CMDLINE = "console=hvc0 root=/dev/vda ro init=/init"
"""Begins the command line of each guest's kernel."""
PORT_NAME = "paprscm"
"""The guest finds the port of its restoring by this name, in /sys/class/virtio-ports/*/name."""

Properties = dict[str, str | int | bool]


@dataclass(frozen=True, kw_only=True)
class Nvdimm:
    """One NVDIMM and the file behind it.

    Attributes:
        slot: the memory slot; it decides the DRC index, by which the guest finds the region.
        device: "spapr-nvdimm", or "nvdimm" (which never asks the guest for H_SCM_FLUSH).
        pmem: the backend's pmem=on: QEMU may treat the file as real persistent memory.
        pmem_override: ask the guest for H_SCM_FLUSH in spite of pmem=on.
        size_bytes: what the guest can use: a multiple of 256 MiB (PAPR's SCM block).
        label_bytes: the label area behind it, in the same file; at least 128 KiB.
        uuid: None: made from the slot, the same at every start.
        share: the backend's share=on; without it nothing that is written reaches the file.
        unarmed: the device says that it cannot persist.
        read_only: the backend's readonly=on; QEMU takes it only with `unarmed`.
        file: an existing backing file of size_bytes + label_bytes; None: made, and removed again.
    """

    slot: int = 0
    device: str = "spapr-nvdimm"
    pmem: bool = False
    pmem_override: bool = False
    size_bytes: int = 512 * MIB
    label_bytes: int = SCM_MIN_LABEL_SIZE
    uuid: str | None = None
    share: bool = True
    unarmed: bool = False
    read_only: bool = False
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.device not in type_names:
            raise ConfigError(
                f"there is no NVDIMM device '{self.device}'", hint="one of " + ", ".join(type_names)
            )
        if not 0 <= self.slot < MAX_SLOTS:
            raise ConfigError(f"slot {self.slot} is out of range", hint=f"0 to {MAX_SLOTS - 1}")
        if self.label_bytes < SCM_MIN_LABEL_SIZE:
            raise ConfigError(
                f"a label area of {self.label_bytes} bytes is too small",
                hint=f"at least {SCM_MIN_LABEL_SIZE} (128K)",
            )
        if self.size_bytes <= 0 or self.size_bytes % SCM_BLOCK_SIZE:
            lower = max(1, self.size_bytes // SCM_BLOCK_SIZE) * SCM_BLOCK_SIZE
            upper = lower + SCM_BLOCK_SIZE
            raise ConfigError(
                f"a DIMM of {self.size_bytes} bytes besides its {self.label_bytes} bytes of label "
                "is no multiple of 256 MiB",
                hint=f"{lower // MIB}M or {upper // MIB}M; a file of "
                f"{lower + self.label_bytes} or {upper + self.label_bytes} bytes",
            )
        if self.uuid is not None:
            try:
                uuids.UUID(self.uuid)
            except ValueError as error:
                raise ConfigError(f"'{self.uuid}' is no uuid") from error
        if self.file is not None:
            self._check_file(self.file)

    def _check_file(self, file: Path) -> None:
        try:
            found = file.stat().st_size
        except OSError as error:
            raise ConfigError(f"backing file {file}: {error.strerror}") from error
        if found != self.file_bytes:
            raise ConfigError(
                f"backing file {file} has {found} bytes; size {self.size_bytes} and label "
                f"{self.label_bytes} make {self.file_bytes}",
                hint=f"truncate -s {self.file_bytes} {shlex.quote(str(file))}, or another size=",
            )

    @property
    def drc(self) -> int:
        """The DRC index that QEMU gives the device, and the guest's name for it."""
        return drc_index(self.slot)

    @property
    def file_bytes(self) -> int:
        """The size of the backing file: data and label area."""
        return self.size_bytes + self.label_bytes

    @property
    def guid(self) -> str:
        """The uuid that the device has."""
        return self.uuid or str(uuids.uuid5(_UUIDS, str(self.slot)))

    def backend(self, file: Path) -> Properties:
        """The object behind the device, as QMP's object-add takes it."""
        properties: Properties = {
            "qom-type": "memory-backend-file",
            "id": f"mem{self.slot}",
            "mem-path": str(file),
            "size": self.file_bytes,
            "share": self.share,
        }
        # A QEMU without libpmem has no such property, not even for "off".
        if self.pmem:
            properties["pmem"] = True
        if self.read_only:
            properties["readonly"] = True
        return properties

    def frontend(self) -> Properties:
        """The device, as QMP's device_add takes it."""
        properties: Properties = {
            "driver": self.device,
            "id": f"nv{self.slot}",
            "memdev": f"mem{self.slot}",
            "slot": self.slot,
            "label-size": self.label_bytes,
            "uuid": self.guid,
        }
        if self.pmem_override:
            properties["pmem-override"] = True
        if self.unarmed:
            properties["unarmed"] = True
        return properties


def require(qemu: Qemu, nvdimm: Nvdimm) -> None:
    """Raise unless the QEMU has what the DIMM needs.

    Raises:
        CapabilityError: it has not; with the way to one that has.
    """
    hint = "qemu=debian:trixie fetches one that has it"
    if nvdimm.pmem and not qemu.has_pmem:
        raise CapabilityError(f"{qemu.path} is built without libpmem: it has no pmem=on", hint=hint)
    if nvdimm.pmem_override and not qemu.has_pmem_override:
        raise CapabilityError(f"{qemu.path} has no pmem-override", hint=hint)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A pseries machine; how it boots and is wired to us stands in Payload and Wiring.

    Attributes:
        nvdimms: those that are there at boot.
        smp: vCPUs.
        memory_mib: its memory, besides the DIMMs, MiB.
        cpu: the -cpu model.
        firmware: "vof" or "slof".
        accel: "tcg" or "kvm".
        slots: how many memory slots, and so PMEM DRCs, there are.
        cmdline: words to add to the kernel's command line.
    """

    nvdimms: tuple[Nvdimm, ...] = ()
    smp: int = 2
    memory_mib: int = 1024
    cpu: str = "POWER9"
    firmware: str = "vof"
    accel: str = "tcg"
    slots: int = 8
    cmdline: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        taken: set[int] = set()
        for nvdimm in self.nvdimms:
            if nvdimm.slot in taken:
                raise ConfigError(f"two DIMMs want slot {nvdimm.slot}", hint="give each its slot=")
            if nvdimm.slot >= self.slots:
                raise ConfigError(
                    f"slot {nvdimm.slot} is not there", hint=f"the machine has {self.slots} slots"
                )
            taken.add(nvdimm.slot)
        if not 0 < self.slots <= MAX_SLOTS:
            raise ConfigError(f"{self.slots} slots are not possible", hint=f"1 to {MAX_SLOTS}")

    @property
    def maxmem_mib(self) -> int:
        """-m maxmem: the memory, every DIMM, and room for some that come later; MiB."""
        dimms = sum(nvdimm.size_bytes for nvdimm in self.nvdimms)
        return self.memory_mib + max(_DIMM_ROOM, dimms + _HOTPLUG_ROOM) // MIB


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What the machine boots: a vmlinux, an initramfs for its modules, and the root disk.

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
    """How a running QEMU is reached: connected sockets that it inherits.

    With sockets from socketpair(2) there is no name in the file system that could be left behind.

    Attributes:
        console_fd: the guest's serial console.
        qmp_fd: QEMU's monitor.
        port_fd: a virtio-serial port, on which a restored guest is told that it was.
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
    return "\n".join(lines) + "\nexec " + " ".join(words) + "\n"


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
