# SPDX-License-Identifier: GPL-2.0-or-later
"""Random steps on the namespaces of a region: each has its command, its outcome and its effect."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from paprscm.labels.capacity import Capacity, Judgement, Outcome, Request
from paprscm.pmem.namespaces import NamespaceMap, NamespaceMode
from paprscm.pmem.regions import Region
from paprscm.vm.machine import MIB

ALIGNMENTS: Final = (4096, 65536, 2 * MIB, 16 * MIB, 1024 * MIB)
"""Requested alignments; those that the region does not support are refused."""
MANY: Final = 8
"""With so many namespaces, as in a full region, "destroy" is more frequent than "create"."""
Kind = Literal[
    "create",
    "destroy",
    "disable",
    "enable",
    "reconfigure",
    "resize",
    "disable region",
    "rebind",
    "restart",
]
_SUCCESS: Final = Judgement(Outcome.SUCCESS)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        kind: what it does; "resize" is a write to sysfs, for a disabled raw namespace, and
            "restart" a new guest on the same backing file.
        uuid: the existing namespace that it is about.
        request: the new namespace.
        keeps_size: for "reconfigure", without a size: that of the request is the present one.
        size_bytes: the new size, for "resize".
        force: the option of that name, for "destroy".
    """

    kind: Kind
    uuid: str = ""
    request: Request | None = None
    keeps_size: bool = False
    size_bytes: int = 0
    force: bool = True

    def __str__(self) -> str:
        words = [self.kind, self.uuid, "" if self.force else "without --force"]
        words.append(f"to {self.size_bytes / MIB:g}M" if self.size_bytes else "")
        words.append(str(self.request or ""))
        return " ".join(word for word in words if word)

    @property
    def probes(self) -> bool:
        """The region is probed anew."""
        return self.kind in ("disable region", "rebind", "restart")

    def command(self, region: Region, names: Mapping[str, str]) -> str:
        """Shell code for the guest.

        Args:
            region: the region.
            names: the current name of each namespace, by its uuid.
        """
        name = names.get(self.uuid, "")
        match self.kind:
            case "create" | "reconfigure":
                request = self.request or Request(mode="raw")
                options = _options(
                    replace(request, size_bytes=None) if self.keeps_size else request
                )
                which = f"-r {region.name}" if self.kind == "create" else f"-f -e {name}"
                return f"ndctl create-namespace {which} {options}"
            case "destroy":
                return f"ndctl destroy-namespace {'-f ' if self.force else ''}{name}"
            case "disable" | "enable":
                return f"ndctl {self.kind}-namespace {name}"
            case "resize":
                return f"/bin/echo {self.size_bytes} > /sys/bus/nd/devices/{name}/size"
            case "disable region":
                return f"ndctl disable-region {region.name} && ndctl enable-region {region.name}"
            case "rebind":
                folder = "/sys/bus/nd/drivers/nd_region"
                return " && ".join(
                    f"echo {region.name} > {folder}/{action}" for action in ("unbind", "bind")
                )
            case "restart":
                raise ValueError("a restart is not a command of the guest")

    def judge(self, capacity: Capacity) -> Judgement:
        """The outcome that the contract demands."""
        if self.kind == "destroy" and not self.force and capacity.namespaces[self.uuid].enabled:
            return Judgement(Outcome.REFUSED, "the namespace is enabled")
        if self.kind == "resize":
            return capacity.judge_size(self.uuid, self.size_bytes)
        if self.request is None:
            return _SUCCESS
        if self.kind == "reconfigure":
            return without(capacity, self.uuid).judge(self.request)
        return capacity.judge(self.request)


def _options(request: Request) -> str:
    values = {
        "-m": request.mode,
        "-M": request.map,
        "-s": request.size_bytes,
        "-a": request.align,
        "-u": request.uuid,
    }
    return " ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def without(capacity: Capacity, uuid: str) -> Capacity:
    """A copy of a model without one namespace."""
    copy = Capacity(capacity.geometry, capacity.foreign)
    copy.namespaces = {key: known for key, known in capacity.namespaces.items() if key != uuid}
    return copy


class Chooser:
    """Chooses steps.

    Args:
        dice: the random numbers.
        modes: modes of namespaces.
        sizes: usual sizes of namespaces, bytes.
        leave_out: returns True for a request that is not made, because of a known issue.
    """

    def __init__(
        self,
        dice: random.Random,
        modes: Sequence[NamespaceMode],
        sizes: Sequence[int],
        *,
        leave_out: Callable[[Request], bool] = lambda _request: False,
    ) -> None:
        self._dice, self._modes, self._sizes = dice, modes, sizes
        self._leave_out = leave_out
        self._former: list[str] = []

    def choose(self, capacity: Capacity) -> Step:
        """The next step; of "create" and "reconfigure" also impossible ones."""
        known = capacity.namespaces
        enabled = [uuid for uuid, one in known.items() if one.enabled]
        disabled = [uuid for uuid in known if uuid not in enabled]
        is_full = len(known) >= MANY or capacity.available < 3 * capacity.geometry.unit
        resizable = [uuid for uuid in disabled if known[uuid].device.mode == "raw"]
        weights: dict[Kind, int] = {
            "create": 4 if is_full else 14,
            "destroy": 12 if is_full else 4 * bool(known),
            "disable": 3 * bool(enabled),
            "enable": 4 * bool(disabled),
            "reconfigure": 4 * bool(known),
            "resize": 8 * bool(resizable),
            "disable region": 1,
            "rebind": 1,
            "restart": 1,
        }
        (kind,) = self._dice.choices(list(weights), list(weights.values()))
        if kind == "create":
            return Step(kind, request=self._request(capacity))
        if kind == "reconfigure":
            return self._reconfigure(capacity, self._dice.choice(list(known)))
        if kind == "destroy":
            chosen = self._dice.choice(list(known))
            self._former.append(chosen)
            return Step(kind, chosen, force=self._dice.random() < 0.8)
        if kind == "resize":
            return self._resize(capacity, self._dice.choice(resizable))
        if kind in ("disable", "enable"):
            return Step(kind, self._dice.choice(enabled if kind == "disable" else disabled))
        return Step(kind)

    def _reconfigure(self, capacity: Capacity, chosen: str) -> Step:
        """Another mode, and perhaps another uuid or size.

        ndctl destroys the data, perhaps the namespace, before it requests the new one; after a
        refusal they would be lost, which is not the kernel's fault. So only requests that succeed
        in place, or whose alignment is refused before.
        """
        freed = without(capacity, chosen)
        size = capacity.namespaces[chosen].extent.size
        for _ in range(20):
            request = self._request(freed)
            keeps_size = self._dice.random() < 0.6
            if keeps_size or request.size_bytes is None:
                request = replace(request, size_bytes=size)
            unsupported = request.align not in (None, *capacity.geometry.alignments)
            success = freed.judge(request).outcome is Outcome.SUCCESS
            if unsupported or (success and capacity.can_resize(chosen, request.size_bytes or 0)):
                return Step("reconfigure", chosen, request, keeps_size)
        return Step("reconfigure", chosen, Request(mode="raw", size_bytes=size))

    def _resize(self, capacity: Capacity, chosen: str) -> Step:
        """Another size of a disabled raw namespace.

        Not one that the kernel refuses although there is so much free space elsewhere: then it
        warns (known_issues/linux-namespace-growth-warns.md).
        """
        own, unit = capacity.namespaces[chosen].extent.size, capacity.geometry.unit
        sizes = [own + unit * count for count in range(-3, 4)]
        possible = [size for size in sizes if size > 0 and capacity.can_resize(chosen, size)]
        impossible = [own + capacity.largest + unit, own + capacity.geometry.page_bytes]
        size = self._dice.choice(possible if self._dice.random() < 0.7 else impossible)
        return Step("resize", chosen, size_bytes=size)

    def _request(self, capacity: Capacity) -> Request:
        while self._leave_out(request := self._any_request(capacity)):
            pass
        return request

    def _any_request(self, capacity: Capacity) -> Request:
        mode = self._dice.choice(self._modes)
        location: NamespaceMap | None = None
        align = None
        if mode in ("fsdax", "devdax"):
            location = self._dice.choice(("mem", "dev"))
            supported = sorted(capacity.geometry.alignments)
            align = self._dice.choice(supported if self._dice.random() < 0.85 else ALIGNMENTS)
        return Request(
            mode=mode,
            map=location,
            size_bytes=self._size(capacity),
            align=align,
            uuid=self._uuid(capacity),
        )

    def _size(self, capacity: Capacity) -> int | None:
        unit = capacity.geometry.unit
        extents = [extent.size for extent in capacity.free()] or [unit]
        special = (
            self._dice.choice(extents),
            None,
            capacity.largest + unit,
            capacity.available or unit,
            unit + capacity.geometry.page_bytes,
        )
        return self._dice.choice(special if self._dice.random() < 0.3 else self._sizes)

    def _uuid(self, capacity: Capacity) -> str | None:
        """None, a new one, that of a former namespace, or one in use."""
        kinds = ["", str(uuid.UUID(int=self._dice.getrandbits(128), version=4))]
        kinds += [*self._former[-1:], *list(capacity.namespaces)[:1]]
        return self._dice.choices(kinds, [10, 4, *[1] * (len(kinds) - 2)])[0] or None
