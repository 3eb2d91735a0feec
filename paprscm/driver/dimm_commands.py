# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of a DIMM's character device: label area, health, and injected health.

The layouts are those of include/uapi/linux/ndctl.h and papr_pdsm.h (asm/ before Linux 6.10);
guest_tools/nd_ioctl.c compares them with the headers. A command's buffer has a preset value in each
output field, so that an output is distinguished from a field that the kernel has not written.
"""

from __future__ import annotations

import errno
import itertools
import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Natural, ProbeError, ToolReport, check_report, read_report
from paprscm.guest.tools import install_tool

PRESET: Final = 0xA5
"""Byte of each output field before the call."""
PRESET_STATUS: Final = int.from_bytes([PRESET] * 4, "little")
_GUARD: Final = bytes([0xEE] * 64)
MAX_BUFFER: Final = 4 << 20
"""Limit of a command's input and output, bytes: include/linux/libnvdimm.h, ND_IOCTL_MAX_BUFLEN."""
NAMES: Final = {
    **{1: "smart", 2: "smart_thresh", 3: "flags", 4: "get_size", 5: "get_data", 6: "set_data"},
    **{7: "effect_size", 8: "effect_log", 9: "vendor", 10: "cmd_call"},
}
"""Commands of a DIMM by number: ndctl.h, nvdimm_cmd_name()."""
BUS_NAMES: Final = {1: "ars_cap", 2: "ars_start", 3: "ars_status", 4: "clear_error", 10: "cmd_call"}
"""Commands of a bus: nvdimm_bus_cmd_name()."""
NEEDED: Final = frozenset(("get_size", "get_data", "set_data", "cmd_call"))
"""Commands of papr_scm's DIMMs: papr_scm.c, PAPR_SCM_DIMM_CMD_MASK; a later kernel may add some."""
SET_DATA: Final = 6
FAMILY_PAPR: Final = 5
HEALTH: Final = 1
SMART_INJECT: Final = 2
INJECT_FATAL: Final = 1
INJECT_BAD_SHUTDOWN: Final = 2
HEALTHY: Final = 0
UNHEALTHY: Final = 1
CRITICAL: Final = 2
FATAL: Final = 3
DSC_VALID: Final = 2
PDSM_BYTES: Final = 192
"""Size of a PDSM's header (8 bytes) and payload."""
_PACKAGE = struct.Struct("<QQII9II")
_PDSM_HEADER = 8
_HEALTH = struct.Struct("<I6BHH2xQ")
# Repetitions from which a run of equal bytes is shorter when it is compressed.
_RUN = 16


@dataclass(frozen=True)
class Command:
    """One ioctl.

    Attributes:
        what: for messages.
        request: "size", "get", "set" or "call", or the ioctl's number.
        data: content of the buffer.
        output: the part of the buffer that the kernel may change.
        status_at: offset of the preset status in the buffer; None: there is none.
    """

    what: str
    request: str | int
    data: bytes
    output: range
    status_at: int | None = None

    def guarded(self) -> Command:
        """Return the same command in a longer buffer, which the kernel must not change."""
        return replace(self, data=self.data + _GUARD)

    def cut(self, size: int) -> Command:
        """Return the same command in a shorter buffer, with inaccessible memory behind it."""
        what = f"{self.what} in {size} bytes"
        return replace(self, what=what, data=self.data[:size], output=range(0))

    @property
    def line(self) -> str:
        """The step of guest_tools/nd_ioctl.c."""
        return f"{self.request} {_compressed(self.data) or '-'}"


@dataclass(frozen=True)
class Reading:
    """Reads a file, such as one in sysfs, between two ioctls."""

    path: str

    @property
    def line(self) -> str:
        """The step of guest_tools/nd_ioctl.c."""
        return f"read {self.path}"


Step = Command | Reading


@dataclass(frozen=True)
class Answer:
    """The result of a step.

    Attributes:
        step: the command, or the file.
        errno: 0: the ioctl succeeded.
        data: content of the buffer after the call, or of the file.
    """

    step: Step
    errno: int
    data: bytes

    @property
    def command(self) -> Command:
        """The command of the answer."""
        if isinstance(self.step, Reading):
            raise TypeError(f"{self.step.path} is not a command")
        return self.step

    @property
    def text(self) -> str:
        """The file's content.

        Raises:
            ContractError: the file cannot be read.
        """
        if self.errno:
            raise ContractError(f"{self.step.line}: {errno_name(self.errno)}")
        return self.data.decode()

    @property
    def status(self) -> int | None:
        """The command's status; None: it has none, or the kernel has not written it."""
        place = self.command.status_at
        if place is None or place + 4 > len(self.data):
            return None
        status = int.from_bytes(self.data[place : place + 4], "little")
        return None if status == PRESET_STATUS else status

    @property
    def refused(self) -> bool:
        """The command was refused, and the caller can see that."""
        return self.errno != 0 or bool(self.status)

    @property
    def changed(self) -> bool:
        """The call has changed the buffer."""
        return self.data != self.command.data

    @property
    def is_stray(self) -> bool:
        """The call has changed memory that does not belong to the output."""
        before, output = self.command.data, self.command.output
        return (
            self.data[: output.start] != before[: output.start]
            or self.data[output.stop :] != before[output.stop :]
        )


class RunReport(ToolReport, frozen=True, kw_only=True):
    """The results of all steps.

    Attributes:
        results: errno, and the buffer as hexadecimal text; None: it is unchanged.
    """

    tool: Literal["nd_ioctl"]
    verb: Literal["run"]
    results: tuple[tuple[Natural, str | None], ...]


class RaceReport(ToolReport, frozen=True, kw_only=True):
    """Writes whose length another thread changed meanwhile.

    Attributes:
        rounds: number of writes.
        succeeded: number of writes that returned 0.
        foreign: the label area's bytes, if some of them are not those of the caller.
    """

    tool: Literal["nd_ioctl"]
    verb: Literal["race"]
    rounds: Natural
    succeeded: Natural
    foreign: tuple[str, ...]

    def __post_init__(self) -> None:
        check_report(self.succeeded <= self.rounds, "more writes succeeded than were made")
        check_report(len(self.foreign) <= 1, "more than one reading")


def send(
    guest: Guest,
    device: str,
    steps: Sequence[Step],
    *,
    read_only: bool = False,
    sealed: bool = False,
) -> list[Answer]:
    """Run steps in one program of the guest, in one round trip.

    Args:
        guest: the guest.
        device: path of a character device.
        steps: ioctls of that device, and files.
        read_only: open it with O_RDONLY.
        sealed: the kernel cannot write to the buffers.

    Raises:
        ProbeError: the report of the tool is invalid.
    """
    flags = [*["--read-only"] * read_only, *["--sealed"] * sealed]
    words = [str(install_tool(guest, "nd_ioctl")), "run", *flags, device]
    text = "".join(f"{step.line}\n" for step in steps)
    result = guest.run(shlex.join(words), stdin=text.encode())
    report = read_report(RunReport, result.stdout, result.status, result.stderr)
    if len(report.results) != len(steps):
        raise ProbeError(f"nd_ioctl reports {len(report.results)} of {len(steps)} steps")
    return [
        Answer(step, number, _content(step, data))
        for step, (number, data) in zip(steps, report.results, strict=True)
    ]


def race(guest: Guest, device: str, small: int, large: int, *, most: int) -> RaceReport:
    """Write to the label area, while another thread changes the command's length.

    Args:
        guest: the guest, with two vCPUs.
        device: path of the DIMM's character device.
        small, large: the two lengths, bytes.
        most: maximum number of writes.

    Raises:
        ProbeError: the report of the tool is invalid.
    """
    tool = str(install_tool(guest, "nd_ioctl"))
    words = [tool, "race", f"--most={most}", device, str(small), str(large)]
    result = guest.run(shlex.join(words))
    return read_report(RaceReport, result.stdout, result.status, result.stderr)


def errno_name(number: int) -> str:
    """The name of an errno, or "0"."""
    return errno.errorcode.get(number, str(number))


def get_size() -> Command:
    """ND_CMD_GET_CONFIG_SIZE."""
    return Command("size", "size", bytes([PRESET] * 12), range(12), 0)


def get_data(offset: int, length: int, *, room: int | None = None) -> Command:
    """ND_CMD_GET_CONFIG_DATA.

    Args:
        offset: place in the label area, bytes.
        length: number of bytes to read.
        room: size of the output buffer, bytes; None: `length`.
    """
    size = length if room is None else room
    data = struct.pack("<III", offset, length, PRESET_STATUS) + bytes([PRESET]) * size
    return Command(f"read {offset:#x}+{length:#x}", "get", data, range(8, len(data)), 8)


def set_data(offset: int, content: bytes, *, length: int | None = None) -> Command:
    """ND_CMD_SET_CONFIG_DATA.

    Args:
        offset: place in the label area, bytes.
        content: the bytes to write.
        length: number of bytes to write; None: that of `content`.
    """
    size = len(content) if length is None else length
    data = struct.pack("<II", offset, size) + content + bytes([PRESET] * 4)
    status_at = len(data) - 4 if size == len(content) else None
    return Command(
        f"write {offset:#x}+{size:#x}", "set", data, range(len(data) - 4, len(data)), status_at
    )


@dataclass(frozen=True, kw_only=True)
class Package:
    """The fields of an ND_CMD_CALL.

    Attributes:
        what: for messages.
        family, command: the PDSM's family and number.
        size_in, size_out: sizes in the package, bytes.
        payload: content of the PDSM's payload; the rest is preset.
        package_reserved: the first reserved field of the package.
        reserved: the two reserved fields of the PDSM's header.
        room: size of the buffer behind the package, bytes; None: size_in + size_out.
    """

    what: str
    command: int = HEALTH
    family: int = FAMILY_PAPR
    size_in: int = 0
    size_out: int = PDSM_BYTES
    payload: bytes = b""
    package_reserved: int = 0
    reserved: tuple[int, int] = (0, 0)
    room: int | None = None

    def build(self) -> Command:
        """Return the ioctl."""
        package = _PACKAGE.pack(
            self.family,
            self.command,
            self.size_in,
            self.size_out,
            self.package_reserved,
            *[0] * 8,
            PRESET_STATUS,
        )
        body = struct.pack("<IHH", PRESET_STATUS, *self.reserved) + self.payload
        room = self.size_in + self.size_out if self.room is None else self.room
        body = body[:room] + bytes([PRESET]) * (room - len(body))
        # From nd_fw_size on.
        output = range(len(package) - 4, len(package) + min(room, PDSM_BYTES))
        return Command(self.what, "call", package + body, output, len(package))


def health() -> Package:
    """PAPR_PDSM_HEALTH."""
    return Package(what="health")


def inject(flags: int, *, fatal: bool = False, bad_shutdown: bool = False) -> Package:
    """PAPR_PDSM_SMART_INJECT.

    Args:
        flags: what to set or clear: INJECT_FATAL, INJECT_BAD_SHUTDOWN.
        fatal: set the health to FATAL.
        bad_shutdown: report that the last shutdown lost data.
    """
    return Package(
        what=f"inject {flags:#x}",
        command=SMART_INJECT,
        size_in=PDSM_BYTES,
        payload=struct.pack("<IBB", flags, fatal, bad_shutdown),
    )


@dataclass(frozen=True)
class Health:
    """The answer to PAPR_PDSM_HEALTH: struct nd_papr_pdsm_health.

    Attributes:
        extension_flags: fields that are valid: 1: fuel_gauge, DSC_VALID: dirty_shutdowns.
        unarmed, bad_shutdown, bad_restore, scrubbed, locked, encrypted: 0 or 1.
        health: HEALTHY to FATAL.
        fuel_gauge: remaining life, percent.
        dirty_shutdowns: number of shutdowns that lost data.
    """

    extension_flags: int
    unarmed: int
    bad_shutdown: int
    bad_restore: int
    scrubbed: int
    locked: int
    encrypted: int
    health: int
    fuel_gauge: int
    dirty_shutdowns: int

    @property
    def papr_flags(self) -> frozenset[str]:
        """The words of papr/flags in sysfs that mean the same."""
        words = {
            "not_armed": self.unarmed,
            "flush_fail": self.bad_shutdown,
            "restore_fail": self.bad_restore,
            "encrypted": self.encrypted,
            "scrubbed": self.scrubbed,
            "locked": self.locked,
            "smart_notify": self.health,
        }
        return frozenset(word for word, value in words.items() if value)


def read_health(answer: Answer) -> Health:
    """Parse the answer to health().

    Raises:
        ContractError: the command was refused, or the answer is incomplete, or has bytes that are
            neither a field's nor the caller's.
    """
    payload = read_payload(answer)
    rest = payload[_HEALTH.size :]
    if set(rest) - {0, PRESET}:
        raise ContractError(f"health: unknown bytes behind the fields: {rest.hex()}")
    return Health(*_HEALTH.unpack(payload[: _HEALTH.size]))


def read_payload(answer: Answer) -> bytes:
    """The payload of a PDSM that succeeded.

    Raises:
        ContractError: it was refused, or its header is wrong.
    """
    what, begin = answer.command.what, _PACKAGE.size
    status, *reserved = struct.unpack_from("<IHH", answer.data, begin)
    size = _PACKAGE.unpack_from(answer.data)[-1]
    found = (errno_name(answer.errno), status, reserved, size, answer.is_stray)
    expected = ("0", 0, [0, 0], PDSM_BYTES, False)
    if found != expected:
        raise ContractError(
            f"{what}: errno, status, reserved, size and stray bytes: {found}, expected {expected}"
        )
    return answer.data[begin + _PDSM_HEADER : begin + PDSM_BYTES]


def _content(step: Step, data: str | None) -> bytes:
    if data is not None:
        return bytes.fromhex(data)
    return step.data if isinstance(step, Command) else b""


def _compressed(data: bytes) -> str:
    """The bytes as a word of nd_ioctl's steps."""
    parts, plain = [], bytearray()
    for byte, group in itertools.groupby(data):
        count = len(list(group))
        if count < _RUN:
            plain += bytes([byte] * count)
            continue
        if plain:
            parts.append(plain.hex())
            plain.clear()
        parts.append(f"{byte:02x}*{count}")
    return "+".join([*parts, plain.hex()] if plain else parts)
