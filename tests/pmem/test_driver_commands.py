# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of DIMM and bus, and the PDSMs of papr_scm: health, and injected errors.

The contract is in include/uapi/linux/ndctl.h and papr_pdsm.h. drivers/nvdimm/bus.c (__nd_ioctl)
checks a command and copies its buffer; papr_scm.c (papr_scm_ndctl) executes it. The label area has
tests of its own: pmem/test_label_commands.py.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace

from paprscm.checks import one_of
from paprscm.driver.dimm_commands import (
    BUS_NAMES,
    FATAL,
    HEALTH,
    HEALTHY,
    INJECT_BAD_SHUTDOWN,
    INJECT_FATAL,
    MAX_BUFFER,
    NAMES,
    NEEDED,
    PDSM_BYTES,
    SET_DATA,
    SMART_INJECT,
    Answer,
    Command,
    Package,
    errno_name,
    get_data,
    get_size,
    health,
    inject,
    read_payload,
    send,
    set_data,
)
from paprscm.driver.dimm_oracle import ND, OUT_OF_BOUNDS, Dimm, Judge, find_dimms, idle
from paprscm.guest.guest import Guest
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm

ARMED = PMEM_OFF.at(3, SMALL)
UNARMED = replace(PMEM_OFF.at(1, SMALL), unarmed=True)
U32 = 1 << 32
BOTH = INJECT_FATAL | INJECT_BAD_SHUTDOWN
SILENT = "linux-papr-scm-command-errors-unreported"
WRAPS = "linux-nd-ioctl-sizes-wrap"
TYPE = "linux-nd-ioctl-ignores-type"
TRUNCATES = "linux-papr-scm-truncates-command"
# arch/powerpc/include/uapi/asm/ioctl.h: the direction is "read and write".
_READ_WRITE = 6 << 29


def ioctl(letter: str, number: int, command: Command | None = None) -> Command:
    """An ioctl of this type and number, with the buffer of a command or of 128 zeros."""
    like = command or Command("", 0, bytes(128), range(0))
    request = _READ_WRITE | 64 << 16 | ord(letter) << 8 | number
    return replace(like, what=f"'{letter}' {number}", request=request)


class DriverCommands(PaprScmTest):
    """
    One DIMM, or two, of which one is unarmed.

    :avocado: tags=pmem
    """

    def start(self, *nvdimms: Nvdimm, allowed: Sequence[str] = ()) -> tuple[Guest, list[Dimm]]:
        """Start a guest with DIMMs; `allowed` are expected kernel messages."""
        self.judge = Judge(self.check, [])
        files = self.keep(*nvdimms)
        guest = self.boot(Machine(nvdimms=files.nvdimms()), allowed=allowed)
        return guest, find_dimms(guest, files, nvdimms)

    def calls(self, guest: Guest, dimm: Dimm, *packages: Package) -> list[Answer]:
        """Send PDSMs, each in a buffer with a guard."""
        return send(guest, dimm.device, [package.build().guarded() for package in packages])

    def test_numbers(self) -> None:
        """A device executes only the commands that it lists; open for reading, it changes nothing.

        Documentation/driver-api/ioctl.rst: other numbers fail with ENOTTY; EINVAL is permitted.
        """
        guest, (dimm,) = self.start(ARMED)
        idle(guest, [dimm], self.random())
        area = dimm.area()
        folder = f"{ND}/{dimm.nmem.name}"
        listed, bus, bus_listed = guest.succeed(
            f"cat {folder}/commands; bus=$(dirname $(readlink -f {folder})); basename $bus; "
            "cat $bus/commands"
        ).split("\n")[:3]
        missing = NEEDED - set(listed.split())
        self.check("commands that the DIMM does not list", missing, frozenset())
        refusals = (errno.ENOTTY, errno.EINVAL)
        numbers = [*range(18), 31, 32, 63, 64, 65, 127, 128, 255]
        for device, names, executed in (
            (f"/dev/ndctl{bus.removeprefix('ndbus')}", BUS_NAMES, bus_listed.split()),
            (dimm.device, NAMES, listed.split()),
        ):
            unlisted = [ioctl("N", n) for n in numbers if names.get(n) not in executed]
            self.judge.refused(send(guest, device, unlisted), *refusals)

        writes = [set_data(0, b"read-only"), health().build()]
        writes.append(inject(INJECT_FATAL, fatal=True).build())
        self.judge.refused(send(guest, dimm.device, writes, read_only=True), errno.EPERM)
        reads = [get_size(), get_data(64, 64)]
        self.judge.reads(send(guest, dimm.device, reads, read_only=True)[1:], area)
        self.judge.health(guest, dimm)
        self.judge.area("after the read-only device", dimm, area)
        self.checkpoint()

        foreign = ioctl("M", SET_DATA, set_data(64, bytes(64)))
        (answer,) = send(guest, dimm.device, [foreign])
        written = dimm.area() != area
        self.known_issue(
            TYPE,
            shows=written or not answer.errno,
            found=f"the ioctl {foreign.what}: {errno_name(answer.errno)}; the label area is "
            f"{'written' if written else 'unchanged'}",
        )

    def test_health(self) -> None:
        """PAPR_PDSM_HEALTH agrees with QEMU, papr/flags and injected errors, for each DIMM."""
        guest, dimms = self.start(ARMED, UNARMED)
        for dimm in dimms:
            self.judge.health(guest, dimm)
        for dimm, other in (dimms, dimms[::-1]):
            status, bad = HEALTHY, False
            for flags, fatal, bad_shutdown in (
                (0, True, True),
                (INJECT_FATAL, True, False),
                (INJECT_BAD_SHUTDOWN, False, True),
                (0, False, False),
                (INJECT_FATAL, False, True),
                (BOTH, True, False),
                (BOTH, True, True),
                (BOTH, False, False),
            ):
                # A flag that does not exist has no effect, and is not returned.
                package = inject(flags | 1 << 31, fatal=fatal, bad_shutdown=bad_shutdown)
                (answer,) = self.calls(guest, dimm, package)
                supported = int.from_bytes(read_payload(answer)[:4], "little")
                self.check(f"{package.what}: supported flags", supported, flags)
                if flags & INJECT_FATAL:
                    status = FATAL if fatal else HEALTHY
                if flags & INJECT_BAD_SHUTDOWN:
                    bad = bad_shutdown
                self.judge.health(guest, dimm, status=status, bad=bad)
            self.judge.health(guest, other)

    def malformed(self) -> list[Package]:
        """PDSMs that are refused; each would inject an error or read the health."""
        fatal = inject(BOTH, fatal=True, bad_shutdown=True)
        changes: list[tuple[str, Package, dict[str, int | tuple[int, int]]]] = []
        for number in (0, 1, 2, 3, 4, 6, 63, 64, U32 + 5, U32 << 31 | 5, 2**64 - 1):
            changes.append((f"family {number:#x}", fatal, {"family": number}))
        for number in (0, 3, 4, 6, 10, 255, (1 << 31) - 1, 1 << 31, U32 - 1, U32, U32 << 31):
            changes.append((f"command {number:#x}", fatal, {"command": number}))
        for size in (0, 4, 7, 8, 16, 184, 191, 193, 200, 65536):
            changes.append((f"size_out {size}", fatal, {"size_out": size}))
            changes.append((f"size_out {size}", health(), {"size_out": size}))
            changes.append((f"size_in {size}", fatal, {"size_in": size}))
        for size in (MAX_BUFFER, (1 << 31) - 1, 1 << 31, U32 - 512, U32 - 1):
            for package in (health(), fatal):
                changes.append((f"size_in {size:#x}", package, {"size_in": size, "room": 512}))
                changes.append((f"size_out {size:#x}", package, {"size_out": size, "room": 512}))
        for reserved in ((1, 0), (0, 1), (0xFFFF, 0xFFFF)):
            for package in (health(), fatal):
                changes.append((f"reserved {reserved}", package, {"reserved": reserved}))
        return [
            replace(package, what=f"{package.what} with {what}", **values)  # type: ignore[arg-type]
            for what, package, values in changes
        ]

    def test_malformed_calls(self) -> None:
        """A PDSM with a wrong family, number, size or reserved field is refused, without effect."""
        guest, (dimm,) = self.start(ARMED)
        self.judge.refused(self.calls(guest, dimm, *self.malformed()), silent=True)
        self.judge.health(guest, dimm)
        cut = [health().build().cut(size) for size in (0, 63, 64, 255)]
        self.judge.refused(send(guest, dimm.device, cut), errno.EFAULT)
        # Any input is permitted for a PDSM without one, and unsettled for the package's reserved
        # fields: ndctl.h requires zeros, and only some drivers refuse others.
        fine = [replace(health(), what=f"size_in {size}", size_in=size) for size in (8, 192, 4096)]
        for answer in self.calls(guest, dimm, *fine):
            read_payload(answer)
        reserved = replace(health(), what="package's reserved field", package_reserved=1)
        (answer,) = self.calls(guest, dimm, reserved)
        self.check(reserved.what, errno_name(answer.errno), one_of("0", "EINVAL"))
        self.judge.health(guest, dimm)
        guest.succeed(f"echo 1 > {dimm.region.device}/deep_flush")
        self.checkpoint()
        names = self.judge.unreported
        self.metric("unreported_commands", len(names), "commands")
        self.known_issue(
            SILENT,
            shows=bool(names),
            found=f"malformed PDSMs that return 0, without a status: {len(names)}, such as "
            f"{names[:1]}",
        )

    def test_truncated_command(self) -> None:
        """A PDSM's number has 64 bits: one that differs in the upper half is refused."""
        guest, (dimm,) = self.start(ARMED)
        packages = [
            replace(health(), what="health + 2**32", command=U32 + HEALTH),
            replace(
                inject(INJECT_FATAL, fatal=True),
                what="inject + 2**63",
                command=(U32 << 31) + SMART_INJECT,
            ),
        ]
        answers = self.calls(guest, dimm, *packages)
        accepted = [answer.command.what for answer in answers if not answer.refused]
        # The injected error, if the second one was executed.
        self.judge.health(guest, dimm, status=FATAL if len(accepted) > 1 else HEALTHY)
        self.checkpoint()
        self.known_issue(TRUNCATES, shows=bool(accepted), found=f"{accepted} were executed")

    def test_sizes_that_wrap(self) -> None:
        """A PDSM whose sizes are a few bytes modulo 4 GiB is refused."""
        guest, (dimm,) = self.start(ARMED, allowed=OUT_OF_BOUNDS)
        # 64 bytes of the package and size_in are 48: the buffer in the kernel has 240 bytes, and
        # the payload ends at 256. kmalloc() rounds up to 256, so nothing else is overwritten.
        package = replace(health(), what="size_in 2**32 - 16", size_in=U32 - 16, room=PDSM_BYTES)
        (answer,) = self.calls(guest, dimm, package)
        self.check(f"{package.what}: stray bytes", answer.is_stray, False)
        self.judge.health(guest, dimm)
        self.checkpoint()
        self.known_issue(
            WRAPS,
            shows=not answer.refused,
            found=f"{package.what}: {errno_name(answer.errno)}, and the health was written",
        )
