# SPDX-License-Identifier: GPL-2.0-or-later
"""I/O between a mapped DAX device and a disk in the guest, and the kernel's page structures."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Literal

from paprscm.errors import CapabilityError, ContractError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Natural, ToolReport, mix, read_report
from paprscm.guest.tools import run_tool

_LIMIT_S = 120.0


class PinsReport(ToolReport, frozen=True, kw_only=True):
    """What became of the pieces.

    Attributes:
        size: of the device, bytes.
        pieces: number of pieces that were written and read.
        failure: what was wrong; "" if nothing was.
        at: offset of the last piece, bytes.
        errno: of I/O that failed.
        offsets: of all pieces in the device, bytes.
    """

    tool: Literal["pins"]
    size: Natural
    pieces: Natural
    failure: str
    at: Natural
    errno: Natural
    offsets: tuple[Natural, ...]

    @property
    def exit_status(self) -> int:
        return int(self.failure != "")


def pattern(offset: int) -> bytes:
    """The first words that pin_pages() leaves in the piece at an offset."""
    return b"".join(mix(offset + word).to_bytes(8, "little") for word in range(8))


def pin_pages(
    guest: Guest, device: str | int, scratch: str, *, count: int, seed: int
) -> PinsReport:
    """Let a disk read and write the pages of a DAX device, or of a program's memory.

    Args:
        guest: the guest.
        device: path of the character device, which is overwritten; or size of the memory, bytes.
        scratch: path of another disk, which is overwritten.
        count: number of pieces beside the first and the last one.
        seed: the same seed uses the same pieces.

    Raises:
        ProbeError: the tool failed, or its report cannot be believed.
        ContractError: a piece has other contents, or I/O failed.
    """
    of = ["memory"] if isinstance(device, int) else [device]
    if isinstance(device, int):
        of.insert(0, f"--memory={device}")
    words = [f"--count={count}", f"--seed={seed}", *of, scratch]
    result = run_tool(guest, "pins", words, timeout_s=_LIMIT_S)
    report = read_report(PinsReport, result.stdout, result.status, result.stderr)
    if report.failure:
        raise ContractError(f"{device} at {report.at}: {report.failure} (errno {report.errno})")
    return report


class PinFileReport(ToolReport, frozen=True, kw_only=True):
    """Result of the write of a mapped page to a disk.

    Attributes:
        ended: False: it used the CPU until it was killed.
        errno: 0 if it succeeded.
    """

    tool: Literal["pin_file"]
    ended: bool
    errno: Natural


def write_mapped_page(guest: Guest, path: str, scratch: str) -> bool:
    """Write the first page of a mapped file to a disk with O_DIRECT.

    Returns False if the write does not end: it uses the CPU for seconds. One that waits for the
    disk is waited for.

    Args:
        guest: the guest.
        path: the file.
        scratch: path of a disk, which is overwritten.

    Raises:
        ProbeError: the tool failed, or its report cannot be believed.
        ContractError: the write failed.
    """
    result = run_tool(guest, "pin_file", [path, scratch], timeout_s=_LIMIT_S)
    report = read_report(PinFileReport, result.stdout, result.status, result.stderr)
    if report.errno:
        raise ContractError(f"O_DIRECT from a mapping of {path}: errno {report.errno}")
    return report.ended


def page_structure_bytes(guest: Guest) -> int:
    """Size of the kernel's struct page, bytes, as the kernel itself exports it for dumps.

    The guest tells where the note is (kernel/ksysfs.c, vmcoreinfo), and QEMU reads it.

    Raises:
        CapabilityError: the kernel has no such note.
    """
    file = "/sys/kernel/vmcoreinfo"
    words = guest.run(f"cat {file}").stdout.split()
    if len(words) != 2:
        raise CapabilityError("the kernel has no vmcoreinfo", hint="it needs CONFIG_KEXEC_FILE")
    place, size = (int(word, 16) for word in words)
    with tempfile.NamedTemporaryFile(prefix="paprscm-vmcoreinfo-") as note:
        guest.qmp.execute("pmemsave", val=place, size=size, filename=note.name)
        text = Path(note.name).read_bytes().decode(errors="replace")
    match = re.search(r"^SIZE\(page\)=(\d+)$", text, re.MULTILINE)
    if match is None:
        raise ContractError(f"the kernel's vmcoreinfo lacks SIZE(page): {text[:300]!r}")
    return int(match[1])
