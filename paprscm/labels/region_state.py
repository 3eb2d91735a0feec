# SPDX-License-Identifier: GPL-2.0-or-later
"""State of a region: its capacity, its namespaces and their devices, from sysfs and from ndctl."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, replace
from typing import Any, Final

from paprscm.channel.command import CommandResult
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.labels.metadata import StoredNamespace
from paprscm.pmem.regions import Region

# The shell's own `read` starts no process, which is slow under TCG. A namespace has at most one
# device: its own disk, or one on the pfn, dax or btt device that has claimed it.
_SCRIPT = """\
set -u
output=$(eval "$1" 2>&1 < /dev/null)
echo "status $?"
printf '%s' "$output" >&2
cd {device} || exit
dimm=../{dimm}
{{
read -r probed < ../wait_probe
show() {{
	for key in $keys; do
		value=
		read -r value < "$1/$key" && echo "attr $1 $key $value"
	done
}}
keys='size align available_size max_available_extent namespace_seed resource'
show .
keys=available_slots
show "$dimm"
read -r pfn_seed < pfn_seed && keys=supported_alignments && show "$pfn_seed"
keys='size resource uuid holder_class'
for folder in namespace[0-9]*; do show "$folder"; done
keys='namespace size resource uuid mode align'
for folder in pfn[0-9]* dax[0-9]* btt[0-9]*; do show "$folder"; done
for disk in */block/* dax[0-9]*/dax[0-9]*.[0-9]*; do
	[ ! -e "$disk/size" ] || {{ read -r value < "$disk/size" && echo "device $disk $value"; }}
done
}} 2> /dev/null
echo ndctl
ndctl list -R -N -i -r {region}
"""
_SECTOR: Final = 512
_MODES: Final = {"": "raw", "pfn": "fsdax", "dax": "devdax", "btt": "sector"}
# drivers/nvdimm/pfn_devs.c, mode_show; ndctl's word.
_MAPS: Final = {"pmem": "dev", "ram": "mem"}


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """The device of an enabled namespace.

    Attributes:
        mode: "fsdax", "devdax", "raw" or "sector", after the sysfs device that it is on.
        uuid: of its information block; that of the namespace for raw.
        size_bytes: usable size.
        map: location of the page structures, "dev" or "mem"; None for raw and sector.
        align: alignment of fsdax and devdax, bytes; else None.
        offset: begin of its data in the region, bytes; None for sector, whose data has no order.
    """

    mode: str
    uuid: str
    size_bytes: int
    map: str | None = None
    align: int | None = None
    offset: int | None = None


@dataclass(frozen=True, kw_only=True)
class NamespaceState:
    """One namespace with a size.

    Attributes:
        name: "namespace0.1", which may be another one after each probe of the region.
        stored: its uuid, offset and size.
        mode: its mode according to the label, as for DeviceState.
        device: None: it is disabled.
        listed: its fields in ndctl's output, None if ndctl does not list it.
    """

    name: str
    stored: StoredNamespace
    mode: str
    device: DeviceState | None
    listed: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class RegionState:
    """The state of one region.

    Attributes:
        start: its physical address.
        size_bytes, align, available_bytes, largest_bytes: its attributes size, align,
            available_size and max_available_extent.
        alignments: supported alignments of fsdax and devdax, bytes.
        slots: free slots for labels, without the one that the kernel keeps for updates.
        has_seed: the seed is an empty namespace, so that another one can be created.
        namespaces: those with a size, by their uuid.
        listed: the region's own fields in ndctl's output.
    """

    start: int
    size_bytes: int
    align: int
    available_bytes: int
    largest_bytes: int
    alignments: frozenset[int]
    slots: int
    has_seed: bool
    namespaces: dict[str, NamespaceState]
    listed: dict[str, Any]

    @property
    def stored(self) -> frozenset[StoredNamespace]:
        """The namespaces as in their labels."""
        return frozenset(state.stored for state in self.namespaces.values())


def read_state(guest: Guest, region: Region) -> RegionState:
    """Read the state in one round trip.

    Raises:
        ContractError: an attribute is missing, ndctl failed, or two namespaces have one uuid.
        HostError: the output is malformed.
    """
    return run_and_read(guest, region, "")[1]


def run_and_read(guest: Guest, region: Region, command: str) -> tuple[CommandResult, RegionState]:
    """Run a command, and read the state behind it, in one round trip.

    Args:
        guest: the guest.
        region: the region.
        command: shell code; it may fail.

    Returns:
        The result of the command, whose output is in `stderr`, and the state.

    Raises:
        ContractError: as for read_state(), or the region has no DIMM.
        HostError: the output is malformed, or a program of the command is missing or crashed.
    """
    if region.dimm is None:
        raise ContractError(f"{region.name} has no DIMM")
    script = _SCRIPT.format(device=region.device, dimm=region.dimm.name, region=region.name)
    # The script is passed on stdin, which keeps the log of commands readable.
    result = guest.run(shlex.join(["sh", "-s", command]), stdin=script.encode())
    match = re.match(r"status ([0-9]+)\n", result.stdout)
    if result.status or match is None:
        raise ContractError(f"the state of {region.name} cannot be read: {result.stderr}")
    own = replace(result, status=int(match[1]))
    if own.tool_failure:
        raise HostError(f"{command}: {own.tool_failure}: {own.stderr}")
    return own, parse_state(result.stdout[match.end() :])


def parse_state(output: str) -> RegionState:
    """Parse what the script prints about the state; raises as read_state()."""
    texts, _, listed = output.partition("ndctl\n")
    attributes: dict[str, dict[str, str]] = {}
    devices: dict[str, int] = {}
    for line in texts.splitlines():
        match line.split(" ", 3):
            case ["attr", device, key, value]:
                attributes.setdefault(device, {})[key] = value
            case ["device", path, size] if size.isdecimal():
                owner = path.partition("/")[0]
                if owner in devices:
                    raise ContractError(f"{owner} has several devices")
                devices[owner] = int(size) * (1 if owner.startswith("dax") else _SECTOR)
            case _:
                raise HostError(f"unexpected line in the state of a region: {line!r}")
    return _Parser(attributes, devices, *_parse_listed(listed)).region()


def _parse_listed(text: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The fields of the region in ndctl's output, and those of its namespaces by their names."""
    try:
        outer = json.loads(text)
        (region,) = outer["regions"] if isinstance(outer, dict) else outer
        namespaces = {str(fields["dev"]): fields for fields in region.pop("namespaces", [])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HostError(f"ndctl's output is not as expected ({error!r}): {text!r}") from error
    return region, namespaces


class _Parser:
    """Builds the state from attributes by device, sizes of disks by owner, and ndctl's fields."""

    def __init__(
        self,
        attributes: dict[str, dict[str, str]],
        devices: dict[str, int],
        region: dict[str, Any],
        listed: dict[str, dict[str, Any]],
    ) -> None:
        self._attributes, self._devices = attributes, devices
        self._region, self._listed = region, listed
        self._start = self._number(".", "resource")

    def region(self) -> RegionState:
        pfn = self._only("supported_alignments")
        namespaces: dict[str, NamespaceState] = {}
        for name in self._attributes:
            if name.startswith("namespace") and self._number(name, "size"):
                state = self._namespace(name)
                if state.stored.uuid in namespaces:
                    raise ContractError(f"two namespaces have the uuid {state.stored.uuid}")
                namespaces[state.stored.uuid] = state
        seed = self._text(".", "namespace_seed")
        return RegionState(
            start=self._start,
            size_bytes=self._number(".", "size"),
            align=self._number(".", "align"),
            available_bytes=self._number(".", "available_size"),
            largest_bytes=self._number(".", "max_available_extent"),
            alignments=frozenset(map(int, self._text(pfn, "supported_alignments").split())),
            slots=self._number(self._only("available_slots"), "available_slots"),
            has_seed=self._attributes.get(seed, {}).get("size") == "0",
            namespaces=namespaces,
            listed=self._region,
        )

    def _namespace(self, name: str) -> NamespaceState:
        offset = self._number(name, "resource") - self._start
        stored = StoredNamespace(self._text(name, "uuid"), offset, self._number(name, "size"))
        # An empty line: no holder, as for raw.
        holder = self._text(name, "holder_class")
        if holder not in _MODES:
            raise ContractError(f"holder_class of {name} is {holder!r}")
        claims = {
            owner: fields
            for owner, fields in self._attributes.items()
            if fields.get("namespace") == name and owner in self._devices
        }
        if len(claims) + (name in self._devices) > 1:
            raise ContractError(f"{name} has devices on {', '.join(claims)} and its own")
        device = None
        if name in self._devices:
            device = DeviceState(
                mode="raw", uuid=stored.uuid, size_bytes=self._devices[name], offset=offset
            )
        for owner in claims:
            device = self._device(owner)
        return NamespaceState(
            name=name,
            stored=stored,
            mode=_MODES[holder],
            device=device,
            listed=self._listed.get(name),
        )

    def _device(self, owner: str) -> DeviceState:
        kind = owner.rstrip("0123456789.")
        size, uuid = self._devices[owner], self._text(owner, "uuid")
        if kind == "btt":
            return DeviceState(mode="sector", uuid=uuid, size_bytes=size)
        location = self._text(owner, "mode")
        if location not in _MAPS:
            raise ContractError(f"the page structures of {owner} are in {location!r}")
        return DeviceState(
            mode=_MODES[kind],
            uuid=uuid,
            size_bytes=size,
            map=_MAPS[location],
            align=self._number(owner, "align"),
            offset=self._number(owner, "resource") - self._start,
        )

    def _only(self, key: str) -> str:
        """The only device with an attribute."""
        devices = [device for device, fields in self._attributes.items() if key in fields]
        if len(devices) != 1:
            raise ContractError(f"{key} is an attribute of {devices}, not of one device")
        return devices[0]

    def _text(self, device: str, key: str) -> str:
        try:
            return self._attributes[device][key]
        except KeyError:
            raise ContractError(f"{device} has no attribute {key}") from None

    def _number(self, device: str, key: str) -> int:
        text = self._text(device, key)
        if not re.fullmatch(r"[0-9]+|0x[0-9a-f]+", text):
            raise ContractError(f"{key} of {device} is not a number: {text!r}")
        return int(text, 0)
