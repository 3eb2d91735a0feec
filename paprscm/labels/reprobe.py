# SPDX-License-Identifier: GPL-2.0-or-later
"""Let libnvdimm read the metadata of a DIMM anew, by unbinding and binding its drivers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.labels.metadata import StoredNamespace
from paprscm.pmem.regions import Region

# The shell's own `echo` and `read` start no process, which is slow under TCG.
_SCRIPT = """\
set -u
drivers=/sys/bus/nd/drivers region={region} dimm={dimm} device={device}
bind() {{ echo "$2" > $drivers/$1/$3 || echo "refused $3 $1"; }}
{{
[ ! -e $device/driver ] || bind nd_region $region unbind
[ ! -e $device/../$dimm/driver ] || bind nvdimm $dimm unbind
bind nvdimm $dimm bind
bind nd_region $region bind
# Devices are added asynchronously.
read -r probed < $device/../wait_probe
}} 2> /dev/null
for folder in $device/namespace[0-9]*; do
	[ -e "$folder/size" ] || continue
	uuid='' resource=''
	read -r size < "$folder/size"
	read -r uuid < "$folder/uuid" || :
	read -r resource < "$folder/resource" || :
	echo "namespace ${{folder##*/}} $size ${{uuid:--}} ${{resource:--}}"
done 2> /dev/null
for disk in $device/*/block/* $device/*/*/block/* $device/*/dax[0-9]*.[0-9]*; do
	[ -e "$disk/size" ] || continue
	read -r size < "$disk/size"
	echo "device ${{disk##*/}} $size"
done
read -r start < $device/resource
echo "region $start"
"""
_SECTOR = 512


@dataclass(frozen=True)
class Reprobed:
    """What the drivers made of a DIMM's metadata.

    Attributes:
        namespaces: those with a size, by their offset in the region.
        devices: size of each disk and character device, bytes.
        refused: the drivers that refused to bind: "nvdimm", "nd_region".
    """

    namespaces: frozenset[StoredNamespace]
    devices: dict[str, int]
    refused: tuple[str, ...]


def reprobe(guest: Guest, region: Region) -> Reprobed:
    """Unbind the drivers of a region and its DIMM, bind them, and list the result.

    Raises:
        ContractError: the region has no DIMM, or a driver could not be unbound.
        GuestLostError: the guest did not survive it.
    """
    if region.dimm is None:
        raise ContractError(f"{region.name} has no DIMM")
    script = _SCRIPT.format(region=region.name, dimm=region.dimm.name, device=region.device)
    return _parse(guest.succeed(script), region)


def _parse(output: str, region: Region) -> Reprobed:
    lines = [line.split(" ") for line in output.splitlines()]
    stuck = [words[2] for words in lines if words[:2] == ["refused", "unbind"]]
    starts = [int(words[1], 16) for words in lines if words[0] == "region"]
    if stuck or len(starts) != 1:
        raise ContractError(f"{region.name}: unbinding {' '.join(stuck)} failed:\n{output}")
    namespaces = set()
    for words in lines:
        if words[0] == "namespace" and words[2] != "0":
            name, size, uuid, resource = words[1:]
            if not re.fullmatch(r"0x[0-9a-f]+", resource):
                raise ContractError(f"{name} has {size} bytes at {resource}")
            offset = int(resource, 16) - starts[0]
            namespaces.add(StoredNamespace(uuid, offset, int(size)))
    sizes = {words[1]: int(words[2]) for words in lines if words[0] == "device"}
    return Reprobed(
        namespaces=frozenset(namespaces),
        devices={
            name: size if name.startswith("dax") else size * _SECTOR for name, size in sizes.items()
        },
        refused=tuple(words[2] for words in lines if words[:2] == ["refused", "bind"]),
    )
