# SPDX-License-Identifier: GPL-2.0-or-later
"""Namespaces and their labels after a power cut.

The kernel writes a label into a free slot, and then an index block that lists it
(drivers/nvdimm/label.c). The writes are hypervisor calls; QEMU stores the bytes into the label
area, behind the DIMM's data in the same file.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.power_cut.images import Image
from paprscm.power_cut.store_log import PAGE, ZEROS
from paprscm.vm.machine import MIB, Nvdimm

SIZES = (32 * MIB, 48 * MIB, 64 * MIB)
"""Sizes of namespaces."""
MOST = 3
"""Largest number of namespaces at a moment."""
_LABEL_OFFSET = 48
"""Offset of the first label's position in an index block (drivers/nvdimm/label.h)."""


@dataclass(frozen=True)
class Change:
    """A change of one namespace.

    Attributes:
        uuid: of the namespace.
        size: its new size, bytes; 0: it is destroyed.
        is_new: it is made.
    """

    uuid: str
    size: int
    is_new: bool


def changes(dice: random.Random, count: int) -> list[Change]:
    """Random changes: namespaces are made, made smaller and destroyed.

    They do not grow: a namespace that cannot grow in place triggers a kernel warning (known issue
    linux-namespace-growth-warns). The first two changes make one each. So a namespace is there
    while another one changes, and an image that lost it shows that a host lied.
    """
    sizes: dict[str, int] = {}
    found = []
    for number in range(count):
        kind = "make" if number < 2 else dice.choice(("make", "resize", "destroy"))
        if not sizes or (kind == "make" and len(sizes) < MOST):
            suffix = dice.getrandbits(48)
            change = Change(f"00000000-0000-4000-8000-{suffix:012x}", dice.choice(SIZES), True)
        else:
            uuid = dice.choice(sorted(sizes))
            smaller = [size for size in SIZES if size < sizes[uuid]]
            size = dice.choice(smaller) if smaller and kind != "destroy" else 0
            change = Change(uuid, size, False)
        sizes[change.uuid] = change.size
        sizes = {uuid: size for uuid, size in sizes.items() if size}
        found.append(change)
    return found


@dataclass
class Namespaces:
    """The sizes of all namespaces, by the steps of a program.

    Attributes:
        sizes: for each uuid: (number of the step that changed its size, size).
        flushes: numbers of the steps that flushed the DIMM.
    """

    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    flushes: list[int] = field(default_factory=list)

    def acknowledged(self, done: int) -> dict[str, int]:
        """Sizes by uuid after `done` steps, without those that do not exist."""
        last = {uuid: _before(history, done)[-1] for uuid, history in self.sizes.items()}
        return {uuid: size for uuid, size in last.items() if size}

    def legal(self, done: int, *, synced: bool = False) -> dict[str, list[int]]:
        """Sizes that each namespace may have after a cut; 0: it does not exist.

        Args:
            done: number of steps that had returned; the next one may have begun.
            synced: each change is durable when its step returns, without a flush.
        """
        flushed = max((number for number in self.flushes if number < done), default=-1)
        flushed = done - 1 if synced else flushed
        return {
            uuid: [
                _before(history, flushed + 1)[-1],
                *(size for number, size in history if flushed < number <= done),
            ]
            for uuid, history in self.sizes.items()
        }

    def differences(
        self, found: Mapping[str, int], done: int, *, synced: bool = False
    ) -> dict[str, str]:
        """Compare the namespaces that a cut has left; return what is not legal, by uuid."""
        legal = self.legal(done, synced=synced)
        wrong = {uuid: "exists" for uuid in found if uuid not in legal}
        for uuid, sizes in legal.items():
            size = found.get(uuid, 0)
            if size not in sizes:
                wrong[uuid] = f"has {size} bytes, not {' or '.join(map(str, dict.fromkeys(sizes)))}"
        return wrong


def _before(history: Sequence[tuple[int, int]], step: int) -> list[int]:
    return [0, *(size for number, size in history if number < step)]


_READ = """
for n in namespace*.*; do
	read -r size < $n/size
	[ $size = 0 ] || { read -r uuid < $n/uuid; echo $uuid $size; }
done
"""

# Region and namespaces are probed asynchronously. At first the seed is a namespace of the labels;
# when that has its driver, an empty one usually follows. Only then can a namespace be made.
_BIND = """
echo {name} > {driver}/bind
for try in $(seq 40); do
	cat /sys/bus/nd/devices/ndbus*/wait_probe > /dev/null
	seed='' size=''
	cd /sys/bus/nd/devices/region* && read -r seed < namespace_seed && read -r size < $seed/size
	[ "$size" != 0 ] || break
	# No file tells when the seed is empty.
	sleep 0.02
done
[ -n "$size" ] && [ -e driver ] || exit 3
{read}
[ "$size" = 0 ] || exit 0
read -r align < align
read -r uuid < /proc/sys/kernel/random/uuid
cd $seed && /bin/echo $uuid > uuid && /bin/echo $align > size || exit 4
"""


def read_namespaces(guest: Guest, device: str) -> dict[str, int]:
    """Sizes of a region's namespaces by uuid, as its driver has read them from the labels.

    Args:
        guest: the guest.
        device: the region's path in sysfs.
    """
    return _sizes(guest.succeed(f"cd {device}\n{_READ}"))


def bind_again(guest: Guest, driver: str, name: str) -> tuple[dict[str, int], str]:
    """Bind the driver of the only DIMM of a guest, which reads the labels; make a namespace, if the
    region has an empty one for that.

    Args:
        guest: the guest.
        driver: path of the driver in sysfs.
        name: name of its device.

    Returns:
        The sizes of the namespaces by uuid, without the new one, and why the DIMM is not usable.
    """
    result = guest.run(_BIND.format(name=name, driver=driver, read=_READ))
    reasons = {0: "", 3: "the DIMM is disabled", 4: "the DIMM does not take another namespace"}
    if result.status not in reasons:
        raise ContractError(f"bind of {name} ended with {result.status}: {result.stderr.strip()}")
    reason = " ".join([reasons[result.status], result.stderr.strip()]).strip()
    return _sizes(result.stdout), reason if result.status else ""


def _sizes(text: str) -> dict[str, int]:
    sizes = [line.split() for line in text.splitlines()]
    if len({uuid for uuid, _ in sizes}) != len(sizes):
        raise ContractError(f"two namespaces have one uuid: {sizes}")
    return {uuid: int(size) for uuid, size in sizes}


class LabelArea:
    """The label area of a DIMM in images.

    Args:
        dimm: the DIMM.
    """

    def __init__(self, dimm: Nvdimm) -> None:
        self._slot = dimm.slot
        self._pages = range(dimm.size_bytes // PAGE, dimm.file_bytes // PAGE)

    def content(self, image: Image) -> bytes:
        """Its bytes."""
        return b"".join(image.pages.get((self._slot, page), ZEROS) for page in self._pages)

    def is_in_order(self, image: Image, oldest: Image, newest: Image) -> bool:
        """The image has no part of an index block that is newer than a label.

        Args:
            image: an image.
            oldest, newest: those of the same cut. Between them is one change.
        """
        areas = [self.content(one) for one in (image, oldest, newest)]
        labels = max(int.from_bytes(area[_LABEL_OFFSET:][:8], "little") for area in areas)
        found, before, after = ((area[:labels], area[labels:]) for area in areas)
        return found[0] == before[0] or found[1] == after[1]
