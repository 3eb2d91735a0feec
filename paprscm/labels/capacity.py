# SPDX-License-Identifier: GPL-2.0-or-later
"""Model of a region's capacity: namespaces, free extents, and the fate of each request.

The rules are those of drivers/nvdimm/namespace_devs.c: a namespace is one contiguous range, begins
and ends at a multiple of the region's `align`, and takes one slot of the label area
(drivers/nvdimm/label.c). The place is the kernel's choice: the model accepts any free extent, and
takes over the place that sysfs reports.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from paprscm.labels.metadata import StoredNamespace
from paprscm.labels.region_state import DeviceState, NamespaceState, RegionState
from paprscm.pmem.namespaces import NamespaceMap, NamespaceMode
from paprscm.vm.machine import MIB

SUBSECTION: Final = 2 * MIB
"""Least alignment of memory with page structures (include/linux/mmzone.h, SUBSECTION_SIZE)."""
LARGEST_COMPAT: Final = 16 * MIB
"""Largest value of memremap_compat_align(): that of hash with pages of 16 MiB
(drivers/nvdimm/region_devs.c, MEMREMAP_COMPAT_ALIGN_MAX)."""
RESERVED: Final = 8192
"""Space for the information block (drivers/nvdimm/pfn_devs.c, nd_pfn_init)."""
PAGE_STRUCTURE: Final = 64
"""Space for one page structure with map=dev (drivers/nvdimm/nd.h, MAX_STRUCT_PAGE_SIZE)."""
SECTOR_SHARE: Final = 0.8
"""A sector namespace has this share of its size for data, or more."""
LEAST_SECTOR: Final = 32 * MIB
"""A smaller sector namespace may be refused: an arena has 16 MiB or more (drivers/nvdimm/btt.h)."""

Difference = tuple[str, object, object]
"""The name of a value, the found one and the expected one, as for `check` of a test."""


@dataclass(frozen=True, order=True)
class Extent:
    """A range of a region, bytes."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.size

    def contains(self, other: Extent) -> bool:
        """Return True if the other range lies inside."""
        return self.start <= other.start and other.end <= self.end


class Outcome(enum.Enum):
    """The fate of a request."""

    SUCCESS = "succeeds"
    REFUSED = "is refused"
    EITHER = "succeeds or is refused"


@dataclass(frozen=True)
class Judgement:
    """The outcome that the contract demands, and the reason for another one than SUCCESS."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Parameters of a new namespace.

    Attributes:
        mode: its mode.
        map: location of the page structures of fsdax and devdax, else None.
        size_bytes: None: the largest free extent.
        align: alignment of fsdax and devdax, else None. Never ndctl's default, which is that of the
            region's pfn seed: a refused request changes it.
        uuid: None: a random one.
    """

    mode: NamespaceMode
    map: NamespaceMap | None = None
    size_bytes: int | None = None
    align: int | None = None
    uuid: str | None = None

    def __str__(self) -> str:
        size = "whole" if self.size_bytes is None else f"{self.size_bytes / MIB:g}M"
        words = [self.mode, size]
        if self.map is not None:
            words += [f"map={self.map}", f"align={self.align}"]
        return " ".join([*words, *([f"uuid={self.uuid}"] if self.uuid else [])])


@dataclass(frozen=True)
class Known:
    """A namespace of the model.

    Attributes:
        stored: its uuid, offset and size.
        device: its device whenever it is enabled.
        enabled: it has a driver.
    """

    stored: StoredNamespace
    device: DeviceState
    enabled: bool = True

    @property
    def extent(self) -> Extent:
        """Its range."""
        return Extent(self.stored.offset, self.stored.size_bytes)


@dataclass(frozen=True)
class Geometry:
    """The fixed properties of a region.

    Attributes:
        start: its physical address.
        size_bytes: its size.
        unit: alignment of begin and size of each namespace, bytes.
        alignments: supported alignments of fsdax and devdax, bytes; the least is the page size.
        labels: number of namespaces for which the label area has slots.
    """

    start: int
    size_bytes: int
    unit: int
    alignments: frozenset[int]
    labels: int

    @property
    def page_bytes(self) -> int:
        """The page size of the guest's kernel."""
        return min(self.alignments)

    @property
    def compat_aligns(self) -> tuple[int, int]:
        """Bounds of memremap_compat_align(): with hash it is the page size of the linear mapping.

        Only radix supports an alignment of 2 MiB.
        """
        return SUBSECTION, SUBSECTION if SUBSECTION in self.alignments else LARGEST_COMPAT


def _places(namespaces: Iterable[StoredNamespace]) -> list[str]:
    ordered = sorted(namespaces, key=lambda one: one.offset)
    return [f"{one.uuid}: {one.size_bytes:#x} at {one.offset:#x}" for one in ordered]


class Capacity:
    """The namespaces and free extents of one region.

    Args:
        geometry: the region.
        foreign: ranges of labels that belong to another region.
    """

    def __init__(self, geometry: Geometry, foreign: Iterable[Extent] = ()) -> None:
        self.geometry, self.foreign = geometry, tuple(foreign)
        self.namespaces: dict[str, Known] = {}

    @classmethod
    def of(cls, state: RegionState) -> Capacity:
        """The model of a region without namespaces."""
        if state.namespaces:
            raise ValueError(f"the region has namespaces: {state.namespaces}")
        return cls(
            Geometry(
                start=state.start,
                size_bytes=state.size_bytes,
                unit=state.align,
                alignments=state.alignments,
                labels=state.slots,
            )
        )

    def free(self) -> list[Extent]:
        """The free extents, in order; none touches another one."""
        used = [known.extent for known in self.namespaces.values()]
        extents, end = [], 0
        for extent in [*sorted([*used, *self.foreign]), Extent(self.geometry.size_bytes, 0)]:
            if extent.start > end:
                extents.append(Extent(end, extent.start - end))
            end = max(end, extent.end)
        return extents

    @property
    def largest(self) -> int:
        """Size of the largest free extent, bytes."""
        return max((extent.size for extent in self.free()), default=0)

    @property
    def available(self) -> int:
        """Size of all free extents, bytes."""
        return sum(extent.size for extent in self.free())

    def judge(self, request: Request) -> Judgement:
        """The outcome that the contract demands for a new namespace."""
        size = self.largest if request.size_bytes is None else request.size_bytes
        unit = self.geometry.unit
        refusals = (
            (request.size_bytes is None and not size, "the region is full"),
            (size % unit or request.size_bytes == 0, f"{size} is not a multiple of {unit}"),
            (size > self.largest, f"{size} > {self.largest}, the largest free extent"),
            (request.uuid in self.namespaces, "the uuid is in use"),
            (len(self.namespaces) >= self.geometry.labels, "no slot for a label is free"),
            (
                request.align is not None and request.align not in self.geometry.alignments,
                f"alignment {request.align} is not supported",
            ),
        )
        for refused, reason in refusals:
            if refused:
                return Judgement(Outcome.REFUSED, reason)
        return self._judge_place(request, size)

    def _judge_place(self, request: Request, size: int) -> Judgement:
        """As judge(), for a size that fits: whether there is space for data at each place."""
        if request.mode == "raw" or (request.mode == "sector" and size >= LEAST_SECTOR):
            return Judgement(Outcome.SUCCESS)
        if request.mode == "sector" or request.align is None:
            return Judgement(Outcome.EITHER, "small for a BTT")
        places = [
            Extent(start, size)
            for extent in self.free()
            for start in range(extent.start, extent.end - size + 1, self.geometry.unit)
        ]
        least, most = (
            [self._usable(request, place, compat) > 0 for place in places]
            for compat in self.geometry.compat_aligns
        )
        if not any(least):
            return Judgement(Outcome.REFUSED, f"no place has {request.align} aligned bytes")
        if not all(most):
            return Judgement(Outcome.EITHER, "not each place has aligned bytes")
        # ndctl's rule, not the kernel's.
        if size % request.align:
            return Judgement(Outcome.EITHER, f"{size} is not a multiple of {request.align}")
        return Judgement(Outcome.SUCCESS)

    def _usable(self, request: Request, place: Extent, compat: int) -> int:
        """Size of the data of fsdax or devdax at a place, as drivers/nvdimm/pfn_devs.c has it."""
        grain = max(request.align or 0, compat)
        begin = self.geometry.start + place.start + self._metadata(request, place.size)
        end = self.geometry.start + place.end
        return end // grain * grain - -(-begin // grain) * grain

    def _metadata(self, request: Request, size: int) -> int:
        pages = size // self.geometry.page_bytes if request.map == "dev" else 0
        return RESERVED + PAGE_STRUCTURE * pages

    def adopt(self, request: Request, state: RegionState) -> list[Difference]:
        """Take over the namespace that a successful request has created.

        Returns:
            Its differences from the contract. Without a single new namespace, nothing is adopted.
        """
        added = [state.namespaces[uuid] for uuid in state.namespaces.keys() - self.namespaces]
        if len(added) != 1 or added[0].device is None:
            names = [namespace.name for namespace in added if namespace.device is not None]
            return [(f"new enabled namespaces after: {request}", len(names), 1)]
        (namespace,) = added
        differences = list(self._differences_of_new(request, namespace, added[0].device))
        self.namespaces[namespace.stored.uuid] = Known(namespace.stored, added[0].device)
        return differences

    def _differences_of_new(
        self, request: Request, namespace: NamespaceState, device: DeviceState
    ) -> Iterator[Difference]:
        what, stored = f"{namespace.name} ({request})", namespace.stored
        size = self.largest if request.size_bytes is None else request.size_bytes
        yield f"{what}: size", stored.size_bytes, size
        extent = Extent(stored.offset, stored.size_bytes)
        yield f"{what}: offset modulo align", stored.offset % self.geometry.unit, 0
        is_free = any(free.contains(extent) for free in self.free())
        yield f"{what}: {extent} was in a free extent", is_free, True
        if request.uuid is not None:
            yield f"{what}: uuid", stored.uuid, request.uuid
        yield f"{what}: mode", (namespace.mode, device.mode), (request.mode, request.mode)
        yield f"{what}: map", device.map, request.map
        yield f"{what}: align", device.align, request.align
        yield from self._differences_of_data(what, request, extent, device)

    def _differences_of_data(
        self, what: str, request: Request, extent: Extent, device: DeviceState
    ) -> Iterator[Difference]:
        """Place and size of the data: inside, aligned, with space for metadata, without waste."""
        size = device.size_bytes
        if request.mode == "raw":
            yield f"{what}: bytes of data", size, extent.size
        elif request.mode == "sector":
            ok = SECTOR_SHARE * extent.size <= size < extent.size
            yield f"{what}: {size} bytes of data are plausible", ok, True
        elif device.offset is not None and request.align:
            data = Extent(device.offset, size)
            grain = request.align
            yield f"{what}: {size} bytes of data are more than 0", size > 0, True
            yield f"{what}: {data} is inside", extent.contains(data), True
            yield f"{what}: size of data modulo alignment", size % grain, 0
            yield f"{what}: address modulo align", (self.geometry.start + data.start) % grain, 0
            pages = size // self.geometry.page_bytes if request.map == "dev" else 0
            spare = data.start - extent.start >= RESERVED + PAGE_STRUCTURE * pages
            yield f"{what}: space for metadata before {data}", spare, True
            waste = 2 * max(grain, self.geometry.compat_aligns[1])
            least = extent.size - self._metadata(request, extent.size) - waste
            yield f"{what}: {size} bytes of data are {least} or more", size >= least, True

    def can_resize(self, uuid: str, size: int) -> bool:
        """Return True if a namespace can have this size: it grows only into adjacent space."""
        extent = self.namespaces[uuid].extent
        adjacent = [free.size for free in self.free() if extent.start == free.end]
        adjacent += [free.size for free in self.free() if extent.end == free.start]
        return size - extent.size <= max(adjacent, default=0)

    def judge_size(self, uuid: str, size: int) -> Judgement:
        """The outcome that the contract demands for another size of a disabled namespace."""
        if size % self.geometry.unit or size <= 0:
            reason = f"{size} is not a multiple of {self.geometry.unit}"
        elif not self.can_resize(uuid, size):
            reason = "the space beside the namespace is not free"
        else:
            return Judgement(Outcome.SUCCESS)
        return Judgement(Outcome.REFUSED, reason)

    def resize(self, uuid: str, size: int, state: RegionState) -> list[Difference]:
        """Take over the new range of a raw namespace; return its differences from the contract."""
        known = self.namespaces[uuid]
        if uuid not in state.namespaces:
            return [("namespaces in sysfs", sorted(state.namespaces), sorted(self.namespaces))]
        stored = state.namespaces[uuid].stored
        extent = Extent(stored.offset, stored.size_bytes)
        others = [one.extent for one in self.namespaces.values() if one is not known]
        device = replace(known.device, size_bytes=stored.size_bytes, offset=stored.offset)
        self.namespaces[uuid] = replace(known, stored=stored, device=device)
        small, large = sorted((known.extent, extent), key=lambda one: one.size)
        apart = all(one.end <= extent.start or extent.end <= one.start for one in others)
        return [
            ("size", stored.size_bytes, size),
            ("offset modulo align", stored.offset % self.geometry.unit, 0),
            (f"{large} contains {small}", large.contains(small), True),
            (f"{extent} is apart from {others}", apart, True),
            (f"{extent} is in the region", extent.end <= self.geometry.size_bytes, True),
        ]

    def destroy(self, uuid: str) -> None:
        """Free the extent of a namespace."""
        del self.namespaces[uuid]

    def set_enabled(self, uuid: str, *, enabled: bool) -> None:
        """Change a namespace's driver."""
        self.namespaces[uuid] = replace(self.namespaces[uuid], enabled=enabled)

    def probe(self) -> None:
        """Probe the region anew, as after a boot: each namespace is enabled."""
        for uuid in self.namespaces:
            self.set_enabled(uuid, enabled=True)

    def differences(
        self, state: RegionState, label_area: Iterable[StoredNamespace]
    ) -> Iterator[Difference]:
        """All values of a state, with the model's.

        Args:
            state: the state of sysfs and ndctl.
            label_area: namespaces in the label area of the backing file.
        """
        geometry = self.geometry
        stored = frozenset(known.stored for known in self.namespaces.values())
        yield (
            "size of the region",
            (state.start, state.size_bytes),
            (
                geometry.start,
                geometry.size_bytes,
            ),
        )
        yield "align of the region", state.align, geometry.unit
        for what, found in (("sysfs", state.stored), ("the label area", frozenset(label_area))):
            # Only those that differ.
            yield f"namespaces in {what}", _places(found - stored), _places(stored - found)
        yield "available_size", state.available_bytes, self.available
        yield "max_available_extent", state.largest_bytes, self.largest
        yield "available_slots", state.slots, geometry.labels - len(stored)
        listed = {
            "size": geometry.size_bytes,
            "available_size": self.available,
            "max_available_extent": self.largest,
        }
        yield "ndctl: the region", {key: state.listed.get(key) for key in listed}, listed
        for uuid, known in self.namespaces.items():
            if uuid in state.namespaces:
                yield from self._differences_of(known, state.namespaces[uuid])

    def _differences_of(self, known: Known, namespace: NamespaceState) -> Iterator[Difference]:
        what = f"{namespace.name}, {known.device.mode}"
        yield f"{what}: mode of the label", namespace.mode, known.device.mode
        device = known.device if known.enabled else None
        yield f"{what}: device", namespace.device, device
        fields: dict[str, object] = {"state": None if known.enabled else "disabled"}
        if device is None:
            fields |= {"size": known.stored.size_bytes, "uuid": known.stored.uuid}
        else:
            fields |= {"size": device.size_bytes, "uuid": device.uuid, "mode": device.mode}
            fields |= {"map": device.map, "align": device.align}
        found = namespace.listed and {key: namespace.listed.get(key) for key in fields}
        yield f"{what}: ndctl", found, fields
