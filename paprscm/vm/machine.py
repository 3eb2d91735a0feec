# SPDX-License-Identifier: GPL-2.0-or-later
"""A pseries machine and its NVDIMMs as data."""

from __future__ import annotations

import shlex
import uuid as uuids
from dataclasses import dataclass, replace
from pathlib import Path

from paprscm.emulator import binary
from paprscm.emulator.binary import Qemu
from paprscm.errors import CapabilityError, ConfigError
from paprscm.papr import MAX_SLOTS, SCM_BLOCK_SIZE, SCM_MIN_LABEL_SIZE, drc_index
from paprscm.settings import Settings

MIB = 1 << 20
GIB = 1 << 30

# Address space for DIMMs, bytes. The same for all machines whose DIMMs fit, because a restored
# guest must have the maxmem of the saved one.
_DIMM_ROOM = 6 * GIB
# Minimum that remains free for DIMMs that are plugged into the running guest, bytes.
_HOTPLUG_ROOM = 2 * GIB

_UUIDS = uuids.UUID("6f1c7a52-3a0e-4b43-9a1f-5a7e61f0c9d4")

_DEVICES = ("spapr-nvdimm", "nvdimm")

Properties = dict[str, str | int | bool]


@dataclass(frozen=True, kw_only=True)
class Nvdimm:
    """One NVDIMM and its backing file.

    Attributes:
        slot: the memory slot; determines the DRC index, by which the guest identifies the region.
        device: "spapr-nvdimm", or "nvdimm" (which never requests H_SCM_FLUSH).
        pmem: the backend's pmem=on: QEMU may treat the file as real persistent memory.
        pmem_override: request H_SCM_FLUSH from the guest in spite of pmem=on.
        size_bytes: size of the region in the guest: a multiple of 256 MiB (PAPR's SCM block).
        label_bytes: size of the label area, behind the data in the same file; at least 128 KiB.
        uuid: the device's uuid; None: derived from the slot, the same at every start.
        share: the backend's share=on; without it no write reaches the file.
        unarmed: the device reports that it cannot persist data.
        read_only: the backend's readonly=on; QEMU accepts it only with `unarmed`.
        holds: the content of its new backing file at the guest's start: "" (zeros), a namespace of
            the whole region ("fsdax", "devdax", "raw", "sector"), or a file system in an fsdax
            namespace ("xfs", "ext4"); see paprscm/guest/dimm_content.py.
        file: an existing backing file of size_bytes + label_bytes; None: a temporary file.
        number: number in the ids of its backend and its device; None: the slot.
        address: its guest address; None: QEMU chooses it, by the order of the devices.
        node: its NUMA node.
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
    holds: str = ""
    file: Path | None = None
    number: int | None = None
    address: int | None = None
    node: int = 0

    def __post_init__(self) -> None:
        if self.device not in _DEVICES:
            raise ConfigError(
                f"'{self.device}' is not an NVDIMM device", hint="one of " + ", ".join(_DEVICES)
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
                f"a DIMM of {self.size_bytes} bytes without its label area of "
                f"{self.label_bytes} bytes is not a multiple of 256 MiB",
                hint=f"{lower // MIB}M or {upper // MIB}M; a file of "
                f"{lower + self.label_bytes} or {upper + self.label_bytes} bytes",
            )
        if self.uuid is not None:
            try:
                uuids.UUID(self.uuid)
            except ValueError as error:
                raise ConfigError(f"'{self.uuid}' is not a uuid") from error
        if self.holds and (self.file is not None or not self.share or self.read_only):
            raise ConfigError(
                f"a DIMM that holds {self.holds} needs a new backing file that the guest writes to",
                hint="without file=, share=off and readonly=on",
            )
        if self.file is not None:
            self._check_file(self.file)

    def _check_file(self, file: Path) -> None:
        try:
            file_size = file.stat().st_size
        except OSError as error:
            raise ConfigError(f"backing file {file}: {error.strerror}") from error
        if file_size != self.file_bytes:
            raise ConfigError(
                f"backing file {file} has {file_size} bytes; size {self.size_bytes} and label "
                f"{self.label_bytes} make {self.file_bytes}",
                hint=f"truncate -s {self.file_bytes} {shlex.quote(str(file))}, or another size=",
            )

    def at(self, slot: int, size_bytes: int | None = None) -> Nvdimm:
        """Return the same kind of DIMM in this slot, with this size."""
        return replace(self, slot=slot, size_bytes=size_bytes or self.size_bytes)

    def holding(self, content: str) -> Nvdimm:
        """Return the same DIMM with this initial content."""
        return replace(self, holds=content)

    @property
    def drc(self) -> int:
        """DRC index that QEMU assigns to the device, and by which the guest identifies it."""
        return drc_index(self.slot)

    @property
    def flushes_by_hcall(self) -> bool:
        """True if the guest must call H_SCM_FLUSH: QEMU commit 8601b4f11d47 (in v7.0)."""
        return self.device == "spapr-nvdimm" and (not self.pmem or self.pmem_override)

    @property
    def file_bytes(self) -> int:
        """Size of the backing file: data and label area."""
        return self.size_bytes + self.label_bytes

    @property
    def guid(self) -> str:
        """The device's uuid."""
        return self.uuid or str(uuids.uuid5(_UUIDS, str(self.slot)))

    @property
    def memdev(self) -> str:
        """Id of its memory backend, under which a migration finds its content."""
        return f"mem{self.slot if self.number is None else self.number}"

    def backend(self, file: Path) -> Properties:
        """Return the memory backend's properties, as arguments of QMP's object-add."""
        properties: Properties = {
            "qom-type": "memory-backend-file",
            "id": self.memdev,
            "mem-path": str(file),
            "size": self.file_bytes,
            "share": self.share,
        }
        # A QEMU without libpmem rejects pmem=off, too.
        if self.pmem:
            properties["pmem"] = True
        if self.read_only:
            properties["readonly"] = True
        return properties

    def frontend(self) -> Properties:
        """Return the device's properties, as arguments of QMP's device_add."""
        properties: Properties = {
            "driver": self.device,
            "id": f"nv{self.slot if self.number is None else self.number}",
            "memdev": self.memdev,
            "slot": self.slot,
            "label-size": self.label_bytes,
            "uuid": self.guid,
        }
        if self.address is not None:
            properties["addr"] = self.address
        if self.node:
            properties["node"] = self.node
        if self.pmem_override:
            properties["pmem-override"] = True
        if self.unarmed:
            properties["unarmed"] = True
        return properties


def require(qemu: Qemu, nvdimm: Nvdimm) -> None:
    """Require the QEMU features that the DIMM needs.

    Raises:
        CapabilityError: one of them is missing; the hint names a QEMU that has it.
    """
    hint = "qemu=debian:trixie fetches one that has it"
    if nvdimm.pmem and not qemu.has_pmem:
        raise CapabilityError(f"{qemu.path} is built without libpmem: it has no pmem=on", hint=hint)
    if nvdimm.pmem_override and not qemu.has_pmem_override:
        raise CapabilityError(f"{qemu.path} has no pmem-override", hint=hint)


@dataclass(frozen=True, kw_only=True)
class Board:
    """Processors, memory and firmware of a machine.

    Attributes:
        smp: vCPUs.
        memory_mib: memory size without the DIMMs, MiB.
        cpu: the -cpu model.
        firmware: "vof" or "slof".
        accel: "tcg" or "kvm".
    """

    smp: int = 2
    memory_mib: int = 1024
    cpu: str = "POWER9"
    firmware: str = "vof"
    accel: str = "tcg"


def board_of(settings: Settings, qemu: Qemu) -> Board:
    """Return the board that the settings select.

    Raises:
        CapabilityError: KVM was requested and is not available.
    """
    accel = binary.accel(settings.accel, qemu)
    auto = "host" if accel == "kvm" else "POWER9"
    return Board(
        smp=settings.smp,
        memory_mib=settings.memory_mib,
        cpu=auto if settings.cpu == "auto" else settings.cpu,
        firmware=settings.firmware,
        accel=accel,
    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The pseries machine that a test requests; for its kernel and disk see argv.Payload.

    Attributes:
        nvdimms: the DIMMs at boot.
        slots: number of memory slots, and so of PMEM DRCs.
        cmdline: words to add to the kernel's command line.
        smp, memory_mib, cpu, firmware: as in Board; None: from the settings.
        type: QEMU's machine type.
        options: further options of -machine.
        disk: file of a second disk, /dev/vdb, which the guest may write to.
        iommu: disks and network access memory through the IOMMU (virtio's iommu_platform).
        nodes: NUMA nodes; node 0 has all memory.
        distances: (node, other node, distance), in both directions; all others are QEMU's.
        room_bytes: address space for DIMMs that are plugged later, if more is needed than usual.
    """

    nvdimms: tuple[Nvdimm, ...] = ()
    slots: int = 8
    cmdline: tuple[str, ...] = ()
    smp: int | None = None
    memory_mib: int | None = None
    cpu: str | None = None
    firmware: str | None = None
    type: str = "pseries"
    options: tuple[str, ...] = ()
    disk: Path | None = None
    iommu: bool = False
    nodes: int = 1
    distances: tuple[tuple[int, int, int], ...] = ()
    room_bytes: int = 0

    def __post_init__(self) -> None:
        taken: set[int] = set()
        for nvdimm in self.nvdimms:
            if nvdimm.slot in taken:
                raise ConfigError(
                    f"two DIMMs have slot {nvdimm.slot}", hint="give each DIMM its own slot="
                )
            if nvdimm.slot >= self.slots:
                raise ConfigError(
                    f"slot {nvdimm.slot} is out of range",
                    hint=f"the machine has {self.slots} slots",
                )
            taken.add(nvdimm.slot)
        if not 0 < self.slots <= MAX_SLOTS:
            raise ConfigError(f"slots={self.slots} is out of range", hint=f"1 to {MAX_SLOTS}")

    def board(self, defaults: Board) -> Board:
        """Return this machine's board, with `defaults` for its unset fields."""
        return replace(
            defaults,
            smp=self.smp or defaults.smp,
            memory_mib=self.memory_mib or defaults.memory_mib,
            cpu=self.cpu or defaults.cpu,
            firmware=self.firmware or defaults.firmware,
        )

    @property
    def dimm_room_bytes(self) -> int:
        """Address space for DIMMs, bytes: for those at boot and for some that are plugged later."""
        present = sum(dimm.size_bytes for dimm in self.nvdimms)
        return max(_DIMM_ROOM, present + max(_HOTPLUG_ROOM, self.room_bytes))


def in_words(nvdimm: Nvdimm) -> str:
    """Return a short description of a DIMM: "slot 0: spapr-nvdimm pmem=on"."""
    return (
        f"slot {nvdimm.slot}: {nvdimm.device}"
        + (" pmem=on" if nvdimm.pmem else " pmem=off")
        + (" pmem-override=on" if nvdimm.pmem_override else "")
    )
