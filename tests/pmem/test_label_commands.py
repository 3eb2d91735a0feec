# SPDX-License-Identifier: GPL-2.0-or-later
"""ND_CMD_GET_CONFIG_SIZE, _GET_CONFIG_DATA and _SET_CONFIG_DATA of a DIMM's character device.

The contract is in include/uapi/linux/ndctl.h. drivers/nvdimm/bus.c (__nd_ioctl) checks a command
and copies its buffer, and papr_scm.c (papr_scm_meta_get, papr_scm_meta_set) makes the hcalls. The
oracle is the backing file on the host, in which the label area follows the region.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace

from paprscm.driver.dimm_commands import (
    MAX_BUFFER,
    get_data,
    get_size,
    race,
    send,
    set_data,
)
from paprscm.driver.dimm_oracle import OUT_OF_BOUNDS, Dimm, Judge, find_dimms, idle, places
from paprscm.guest.guest import Guest
from paprscm.pmem.namespaces import create_namespace
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import MIB, Machine, Nvdimm

NEAR = PMEM_OFF.at(3, SMALL)
FAR = replace(PMEM_OFF.at(1, SMALL), label_bytes=2 * MIB)
U32 = 1 << 32
SILENT = "linux-papr-scm-command-errors-unreported"
WRAPS = "linux-nd-ioctl-sizes-wrap"
TWICE = "linux-nd-ioctl-reads-sizes-twice"
# Rounds of the race; with the bug, it was hit within 6 to 203 of them.
ROUNDS = 5000


class LabelCommands(PaprScmTest):
    """
    One DIMM, or two with label areas of different sizes.

    :avocado: tags=pmem
    """

    def start(self, *nvdimms: Nvdimm, allowed: Sequence[str] = ()) -> tuple[Guest, list[Dimm]]:
        """Start a guest with DIMMs; `allowed` are expected kernel messages."""
        self.draw = self.random()
        self.judge = Judge(self.check, [])
        files = self.keep(*nvdimms)
        guest = self.boot(Machine(nvdimms=files.nvdimms()), allowed=allowed)
        return guest, find_dimms(guest, files, nvdimms)

    def read_size(self, guest: Guest, dimm: Dimm) -> int:
        """Check the size of the label area; return max_xfer."""
        (answer,) = send(guest, dimm.device, [get_size().guarded()])
        self.judge.succeeded([answer])
        size, max_xfer = (int.from_bytes(answer.data[at : at + 4], "little") for at in (4, 8))
        expected = dimm.nvdimm.label_bytes
        sizes = (size, dimm.region.node.metadata_size)
        self.check("config_size, and that of the device tree", sizes, (expected, expected))
        self.expect("max_xfer is in the area", 0 < max_xfer <= expected, True)
        return max_xfer

    def test_reads(self) -> None:
        """ND_CMD_GET_CONFIG_DATA returns the label area's bytes, at each offset and length."""
        guest, dimms = self.start(NEAR, FAR)
        idle(guest, dimms, self.draw)
        for dimm in dimms:
            area = dimm.area()
            where = places(len(area), self.read_size(guest, dimm), self.draw)
            where.append((len(area) - (1 << 17), 1 << 17))
            commands = [get_data(*place) for place in where]
            commands = [one.guarded() if n % 2 else one for n, one in enumerate(commands)]
            self.judge.reads(send(guest, dimm.device, commands), area)
            self.judge.reads(send(guest, dimm.device, commands[:9], read_only=True), area)
            # Memory that is too short, and memory to which the kernel cannot write.
            cut = [get_data(0, 64).cut(75), get_data(8, 1).cut(12), get_data(0, 8).cut(0)]
            self.judge.refused(send(guest, dimm.device, cut), errno.EFAULT)
            sealed = send(guest, dimm.device, commands[:2], sealed=True)
            self.judge.refused(sealed, errno.EFAULT)
            self.judge.area("after reads", dimm, area)

    def test_writes(self) -> None:
        """ND_CMD_SET_CONFIG_DATA changes the bytes that it names, of that DIMM, and no others."""
        guest, dimms = self.start(NEAR, FAR)
        idle(guest, dimms, self.draw)
        for dimm, other in (dimms, dimms[::-1]):
            area, others = bytearray(dimm.area()), other.area()
            where = places(len(area), self.read_size(guest, dimm), self.draw)
            self.draw.shuffle(where)
            for batch in range(0, len(where), 40):
                commands = []
                for offset, length in where[batch : batch + 40]:
                    content = self.draw.randbytes(length)
                    area[offset : offset + length] = content
                    commands.append(set_data(offset, content))
                commands = [one.guarded() if n % 2 else one for n, one in enumerate(commands)]
                self.judge.succeeded(send(guest, dimm.device, commands))
                self.judge.area(f"writes from {batch} on", dimm, bytes(area))
            cut = [set_data(0, b"new" * 8).cut(size) for size in (35, 34, 20, 7, 0)]
            self.judge.refused(send(guest, dimm.device, cut), errno.EFAULT)
            self.judge.area("after writes from short buffers", dimm, bytes(area))
            self.judge.area("the other DIMM", other, others)

    def test_ranges(self) -> None:
        """A read or a write beyond the label area is refused, and changes nothing."""
        guest, dimms = self.start(NEAR, FAR)
        idle(guest, dimms, self.draw)
        for dimm in dimms:
            area = dimm.area()
            size = len(area)
            beyond = [(size, 1), (size - 1, 2), (size - 4, 8), (size - 7, 8), (size, 8)]
            beyond += [(0, size + 1), (1, size), (size + 1, 1), (size + 4096, 4096)]
            # The sum has 33 bits.
            beyond += [(U32 - 8, 8), (U32 - 8, 16), (U32 - 4, 8), (U32 - 1, 1), (U32 - 1, 2)]
            beyond += [(1 << 31, 8), ((1 << 31) - 1, 1), (0, MAX_BUFFER - 12)]
            commands = [get_data(*place).guarded() for place in beyond]
            commands += [set_data(at, b"\x77" * length).guarded() for at, length in beyond]
            answers = send(guest, dimm.device, commands)
            self.judge.refused(answers, silent=True)
            for answer in answers:
                kept = answer.data[12:] == answer.command.data[12:]
                self.check(f"{answer.command.what}: data of a refused command kept", kept, True)
            # More than the limit of libnvdimm.
            huge = (MAX_BUFFER, MAX_BUFFER + 1, 1 << 31, U32 - 256, U32 - 16, U32 - 1)
            commands = [get_data(0, length, room=256) for length in huge]
            commands += [set_data(0, bytes(256), length=length) for length in huge]
            self.judge.refused(send(guest, dimm.device, commands))
            # A length of 0 may succeed or not; it has no effect in any case.
            empty = [get_data(at, 0).guarded() for at in (0, 1, size, size + 1, U32 - 1)]
            empty += [set_data(at, b"").guarded() for at in (0, 1, size, size + 1, U32 - 1)]
            for answer in send(guest, dimm.device, empty):
                self.check(f"{answer.command.what}: stray bytes", answer.is_stray, False)
            self.judge.area("after refused commands", dimm, area)
            self.judge.reads(send(guest, dimm.device, [get_data(0, 64)]), area)
        self.checkpoint()
        names = self.judge.unreported
        self.metric("unreported_commands", len(names), "commands")
        self.known_issue(
            SILENT,
            shows=bool(names),
            found=f"commands beyond the area return 0, without a status: {len(names)}, such as "
            f"{names[:1]}",
        )

    def test_lengths_that_wrap(self) -> None:
        """A length of nearly 4 GiB is refused: no memory of the kernel is written to the labels.

        Input and output together have a few bytes modulo 4 GiB.
        """
        guest, (dimm,) = self.start(NEAR, allowed=OUT_OF_BOUNDS)
        idle(guest, [dimm], self.draw)
        area = dimm.area()
        length, room = U32 - 4, 256
        # offset + length is in the area modulo 4 GiB. The first write is 64 bytes before the end;
        # nothing is read, because a kernel with the bug would overwrite its memory.
        commands = [
            set_data(len(area) - 64, b"\x5a" * room, length=length),
            get_data(len(area) + 4, length, room=room),
        ]
        answers = send(guest, dimm.device, commands)
        after = dimm.area()
        ended = [answer.command.what for answer in answers if not answer.refused]
        self.check("label area before the last 64 bytes", after[:-64] == area[:-64], True)
        self.judge.reads(send(guest, dimm.device, [get_data(0, 64)]), area)
        self.checkpoint()
        foreign = sum(one != other for one, other in zip(after, area, strict=True))
        self.measure("bytes written", after[-64:].hex() if foreign else None)
        self.known_issue(
            WRAPS,
            shows=bool(ended or foreign),
            found=f"{ended} returned 0; {foreign} bytes of the label area are the kernel's memory",
        )

    def test_length_that_changes(self) -> None:
        """A length that changes during a write does not write the kernel's memory to the labels."""
        self.require_cpus(2)
        guest, (dimm,) = self.start(NEAR, allowed=OUT_OF_BOUNDS)
        idle(guest, [dimm], self.draw)
        report = race(guest, dimm.device, 8, 64, most=ROUNDS)
        self.metric("raced_writes", report.rounds, "writes", hit=bool(report.foreign))
        begin = dimm.area()[:64]
        self.expect(
            "on the host: only the caller's bytes", begin == b"\x5a" * 64, not report.foreign
        )
        self.known_issue(
            TWICE,
            shows=bool(report.foreign),
            found=f"after {report.rounds} writes the label area has bytes of the kernel's memory: "
            f"{begin.hex()}",
        )

    def test_busy(self) -> None:
        """While a region or a namespace of the DIMM is active, its labels cannot be written."""
        guest, (dimm,) = self.start(NEAR)
        writes = [set_data(0, b"x"), set_data(4096, bytes(range(256)))]

        def expect_busy(what: str) -> None:
            area = dimm.area()
            self.judge.refused(send(guest, dimm.device, writes), errno.EBUSY)
            self.judge.area(what, dimm, area)
            self.judge.reads(send(guest, dimm.device, [get_data(0, 4096)]), area)

        expect_busy("region without a namespace")
        create_namespace(guest, dimm.region, mode="raw", size_bytes=64 * MIB)
        self.check("the namespace has a label", bool(dimm.area().strip(b"\0")), True)
        expect_busy("region with a namespace")
        area = dimm.area()
        guest.succeed(f"ndctl disable-region {dimm.region.name}")
        self.judge.succeeded(send(guest, dimm.device, writes[1:]))
        area = area[:4096] + bytes(range(256)) + area[4096 + 256 :]
        self.judge.area("region disabled", dimm, area)
        guest.succeed(f"ndctl enable-region {dimm.region.name}")
        expect_busy("region enabled")
