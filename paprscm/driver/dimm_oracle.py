# SPDX-License-Identifier: GPL-2.0-or-later
"""Oracle for the commands of dimm_commands: answers, label area in the backing file, health."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from paprscm.checks import one_of
from paprscm.driver.dimm_commands import (
    DSC_VALID,
    HEALTHY,
    Answer,
    Reading,
    Step,
    errno_name,
    health,
    read_health,
    send,
)
from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.pmem.regions import Nmem, Region, wait_for_region
from paprscm.vm.backing_files import BackingFiles
from paprscm.vm.machine import Nvdimm

ND: Final = "/sys/bus/nd/devices"
OUT_OF_BOUNDS: Final = (r"BUG: K(ASAN|FENCE): .*(papr_|nd_ioctl|kv?free)",)
"""Messages of a kernel with KASAN or KFENCE about accesses behind a command's buffer, which known
issues cause."""
# End of the region in front of the label area, which no command may change.
_BORDER = 65536


@dataclass(frozen=True)
class Dimm:
    """A DIMM and its backing file.

    Attributes:
        nvdimm: the DIMM of the machine.
        file: its backing file, in which the label area follows the region.
        region, nmem: its devices in the guest, which are found by the DRC.
    """

    nvdimm: Nvdimm
    file: Path
    region: Region
    nmem: Nmem

    @property
    def device(self) -> str:
        """Path of its character device."""
        return f"/dev/{self.nmem.name}"

    def reading(self, name: str) -> Reading:
        """The step that reads a file of its folder in sysfs."""
        return Reading(f"{ND}/{self.nmem.name}/{name}")

    def area(self) -> bytes:
        """The label area on the host."""
        return self._bytes(self.nvdimm.size_bytes, self.nvdimm.label_bytes)

    def border(self) -> bytes:
        """The end of the region on the host."""
        return self._bytes(self.nvdimm.size_bytes - _BORDER, _BORDER)

    def fill(self, content: bytes) -> None:
        """Replace the label area on the host."""
        with self.file.open("r+b") as file:
            file.seek(self.nvdimm.size_bytes)
            file.write(content)

    def _bytes(self, offset: int, size: int) -> bytes:
        with self.file.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def find_dimms(guest: Guest, files: BackingFiles, nvdimms: Iterable[Nvdimm]) -> list[Dimm]:
    """Find DIMMs in a guest.

    Raises:
        ContractError: a DIMM has no region, or its region has no nmem device.
    """
    dimms = []
    for nvdimm in nvdimms:
        region = wait_for_region(guest, nvdimm.slot)
        if region.dimm is None:
            raise ContractError(f"{region.name} has no DIMM")
        dimms.append(Dimm(nvdimm, files.path(nvdimm.slot), region, region.dimm))
    return dimms


def idle(guest: Guest, dimms: Iterable[Dimm], draw: random.Random) -> None:
    """Disable regions, so that the kernel does not own the label areas; fill these at random."""
    for dimm in dimms:
        guest.succeed(f"ndctl disable-region {dimm.region.name}")
        dimm.fill(draw.randbytes(dimm.nvdimm.label_bytes))


def places(size: int, max_xfer: int, draw: random.Random) -> list[tuple[int, int]]:
    """Offsets and lengths in a label area: aligned or not, at its ends, and random ones.

    Args:
        size: of the area, bytes.
        max_xfer: of ND_CMD_GET_CONFIG_SIZE, bytes.
        draw: the source of random numbers.
    """
    lengths = [*range(1, 10), 15, 16, 17, 31, 63, 64, 255, 256, 257]
    lengths += [n for n in (max_xfer - 1, max_xfer, max_xfer + 1) if 0 < n <= 4096]
    fixed = [
        (offset, length)
        for length in lengths
        for offset in (0, 1, 7, 8, size // 2 - 3, size - length - 1, size - length)
    ]
    drawn = [draw.choice((draw.randint(1, 16), draw.randint(17, 2000))) for _ in range(60)]
    return fixed + [(draw.randrange(size - length + 1), length) for length in drawn]


@dataclass(frozen=True)
class Judge:
    """Checks of answers and label areas.

    Attributes:
        check: compares a named value with the expected one, as QemuTest.check().
        unreported: refused commands that returned 0 and left their status as it was: the caller
            takes them for successful.
    """

    check: Callable[[str, object, object], object]
    unreported: list[str]

    def refused(self, answers: Iterable[Answer], *numbers: int, silent: bool = False) -> None:
        """Check that commands were refused, without effect on memory.

        Args:
            answers: of the commands.
            numbers: permitted errnos; none: any, or a status.
            silent: collect commands that returned 0 without a status, instead of a difference.
        """
        for answer in answers:
            what = answer.command.what
            if numbers:
                permitted = one_of(*map(errno_name, numbers))
                self.check(f"{what}: errno", errno_name(answer.errno), permitted)
            elif silent and not answer.refused and answer.status is None:
                self.unreported.append(what)
            else:
                self.check(f"{what}: refused", answer.refused, True)
            self._memory(answer)

    def succeeded(self, answers: Iterable[Answer]) -> None:
        """Check that commands succeeded; a status that was not written does not count."""
        for answer in answers:
            what = answer.command.what
            self.check(f"{what}: errno", errno_name(answer.errno), "0")
            self.check(f"{what}: status", answer.status, one_of(None, 0))
            self._memory(answer)

    def reads(self, answers: Sequence[Answer], area: bytes) -> None:
        """Check that reads returned the bytes of the label area."""
        self.succeeded(answers)
        for answer in answers:
            data = answer.command.data
            offset, length = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4))
            found, expected = answer.data[12 : 12 + length], area[offset : offset + length]
            if found != expected:
                first = next(at for at in range(length) if found[at] != expected[at])
                part = slice(first, first + 16)
                what = f"{answer.command.what}: bytes from {first:#x} on"
                self.check(what, found[part].hex(), expected[part].hex())

    def area(self, what: str, dimm: Dimm, expected: bytes) -> None:
        """Check a label area on the host, and that the region in front of it is blank."""
        found = dimm.area()
        wrong = []
        if found != expected:
            wrong = [at for at in range(len(expected)) if found[at] != expected[at]][:8]
        self.check(f"{what}: places in slot {dimm.nvdimm.slot} that differ", wrong, [])
        self.check(f"{what}: the end of the region is blank", not dimm.border().strip(b"\0"), True)

    def health(self, guest: Guest, dimm: Dimm, *, status: int = HEALTHY, bad: bool = False) -> None:
        """Check PAPR_PDSM_HEALTH and sysfs.

        Args:
            guest: the guest.
            dimm: its DIMM.
            status: expected health, which may be injected.
            bad: the last shutdown is expected to have lost data.
        """
        flags, count = dimm.reading("papr/flags"), dimm.reading("papr/dirty_shutdown")
        # papr/flags first: PAPR_PDSM_HEALTH renews what the driver keeps.
        steps: list[Step] = [flags, health().build().guarded(), flags, count]
        before, answer, after, dirty = send(guest, dimm.device, steps)
        found = read_health(answer)
        slot = f"slot {dimm.nvdimm.slot}"
        state = (found.unarmed, found.bad_shutdown, found.health)
        expected = (int(dimm.nvdimm.unarmed), int(bad), status)
        self.check(f"{slot}: unarmed, bad shutdown, health", state, expected)
        others = (found.bad_restore, found.scrubbed, found.locked, found.encrypted)
        self.check(f"{slot}: restore, scrubbed, locked, encrypted", others, (0, 0, 0, 0))
        for name, text in (("before", before.text), ("after", after.text)):
            words = frozenset(text.split())
            self.check(f"{slot}: papr/flags {name} the command", words, found.papr_flags)
        # QEMU has no H_SCM_PERFORMANCE_STATS, which would make the fuel gauge valid.
        self.check(f"{slot}: extension_flags", found.extension_flags, one_of(0, DSC_VALID))
        if found.extension_flags & DSC_VALID:
            self.check(f"{slot}: dirty shutdowns", found.dirty_shutdowns, int(dirty.text))

    def _memory(self, answer: Answer) -> None:
        """Check that only the output has changed, and nothing if the ioctl failed."""
        what = answer.command.what
        self.check(f"{what}: memory outside of its output changed", answer.is_stray, False)
        if answer.errno:
            self.check(f"{what}: buffer changed", answer.changed, False)
