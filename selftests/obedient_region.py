# SPDX-License-Identifier: GPL-2.0-or-later
"""A region that obeys the rules of a region's capacity, without a guest."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from paprscm.labels.capacity import PAGE_STRUCTURE, RESERVED, SUBSECTION, Known, Request
from paprscm.labels.capacity_steps import Step
from paprscm.labels.metadata import StoredNamespace
from paprscm.labels.region_state import DeviceState, NamespaceState, RegionState
from paprscm.vm.machine import MIB

UNIT = 16 * MIB
GIB = 1024 * MIB
START = 0x40000000
ALIGNMENTS = frozenset({65536, 2 * MIB, GIB})
LABELS = 9


@dataclass
class Kernel:
    """A region that obeys the rules.

    Attributes:
        dice: chooses the place of a namespace.
        namespaces: as in the model, but computed here.
    """

    dice: random.Random
    size_bytes: int = 16 * UNIT
    namespaces: list[Known] = field(default_factory=list)

    def holes(self) -> list[tuple[int, int]]:
        """Begin and end of each free range."""
        edges = [0]
        for one in sorted(self.namespaces, key=lambda one: one.stored.offset):
            edges += [one.stored.offset, one.stored.offset + one.stored.size_bytes]
        edges.append(self.size_bytes)
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(begin, end) for begin, end in pairs if end > begin]

    def make(self, step: Step) -> bool:
        """Make a step; return whether it succeeded."""
        at = [one for one in self.namespaces if one.stored.uuid == step.uuid]
        if step.kind == "create":
            return self.create(step.request or Request(mode="raw"))
        if step.kind == "reconfigure":
            if step.request is None or step.request.align not in (None, *ALIGNMENTS):
                return False
            self.namespaces.remove(at[0])
            return self.create(step.request)
        if step.kind == "destroy":
            if at[0].enabled and not step.force:
                return False
            self.namespaces.remove(at[0])
        elif step.kind == "resize":
            return self.resize(at[0], step.size_bytes)
        elif step.kind in ("enable", "disable"):
            self.namespaces.remove(at[0])
            self.namespaces.append(replace(at[0], enabled=step.kind == "enable"))
        else:
            self.namespaces = [replace(one, enabled=True) for one in self.namespaces]
        return True

    def resize(self, one: Known, size: int) -> bool:
        offset, own = one.stored.offset, one.stored.size_bytes
        more = size - own
        if size % UNIT or size <= 0:
            return False
        behind = [end - begin for begin, end in self.holes() if begin == offset + own]
        before = [end - begin for begin, end in self.holes() if end == offset]
        if more > 0 and more > max(behind, default=0):
            if more > max(before, default=0):
                return False
            offset -= more
        stored = replace(one.stored, offset=offset, size_bytes=size)
        device = replace(one.device, offset=offset, size_bytes=size)
        self.namespaces.remove(one)
        self.namespaces.append(replace(one, stored=stored, device=device))
        return True

    def create(self, request: Request) -> bool:
        size = request.size_bytes
        if size is None:
            size = max((end - begin for begin, end in self.holes()), default=0)
        name = request.uuid or str(uuid.UUID(int=self.dice.getrandbits(128)))
        places = [
            place
            for begin, end in self.holes()
            for place in range(begin, end - size + 1, UNIT)
            if size
        ]
        used = {one.stored.uuid for one in self.namespaces}
        if size % UNIT or not places or name in used or len(self.namespaces) >= LABELS:
            return False
        offset = self.dice.choice(places)
        device = DeviceState(mode="raw", uuid=name, size_bytes=size, offset=offset)
        if request.mode == "sector":
            device = DeviceState(mode="sector", uuid=name, size_bytes=size - 2 * MIB)
        elif request.align is not None:
            if request.align not in ALIGNMENTS:
                return False
            grain = max(request.align, SUBSECTION)
            pages = size // 65536 if request.map == "dev" else 0
            begin = START + offset + RESERVED + PAGE_STRUCTURE * pages
            begin = (begin + grain - 1) // grain * grain
            end = (START + offset + size) // grain * grain
            if end <= begin:
                return False
            device = DeviceState(
                mode=request.mode,
                uuid=str(uuid.UUID(int=self.dice.getrandbits(128))),
                size_bytes=end - begin,
                map=request.map,
                align=request.align,
                offset=begin - START,
            )
        self.namespaces.append(Known(StoredNamespace(name, offset, size), device))
        return True

    def state(self) -> RegionState:
        sizes = [end - begin for begin, end in self.holes()]
        listed = {
            "size": self.size_bytes,
            "available_size": sum(sizes),
            "max_available_extent": max(sizes, default=0),
        }
        return RegionState(
            start=START,
            size_bytes=self.size_bytes,
            align=UNIT,
            available_bytes=sum(sizes),
            largest_bytes=max(sizes, default=0),
            alignments=ALIGNMENTS,
            slots=LABELS - len(self.namespaces),
            has_seed=True,
            namespaces={one.stored.uuid: self.namespace(one) for one in self.namespaces},
            listed=listed,
        )

    def namespace(self, one: Known) -> NamespaceState:
        device = one.device if one.enabled else None
        fields: dict[str, Any] = {"size": one.stored.size_bytes, "uuid": one.stored.uuid}
        if device is None:
            fields |= {"state": "disabled", "mode": "raw"}
        else:
            fields |= {"size": device.size_bytes, "uuid": device.uuid, "mode": device.mode}
            fields |= {"map": device.map, "align": device.align}
        return NamespaceState(
            name="namespace0.0",
            stored=one.stored,
            mode=one.device.mode,
            device=device,
            listed=fields,
        )
