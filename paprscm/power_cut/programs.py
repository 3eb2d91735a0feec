# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of guest_tools/powercut.c in a guest: run them, and read what a cut has left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paprscm.channel.command import CommandResult
from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, Natural, ToolReport, check_report, read_report
from paprscm.guest.tools import install_tool, run_tool
from paprscm.pmem.regions import find_region
from paprscm.power_cut.blocks import DISK
from paprscm.power_cut.steps import SECTOR, Entry, Step

DEVICE_FOLDER = "/run/cut"
"""The folder of programs that use a device."""
_STEPS = 200
"""Steps of one call; guest_tools/powercut.c takes at most 256."""


class _StepReport(Fields, frozen=True, kw_only=True):
    step: str
    errno: Natural
    error: str


class _RunReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["powercut"]
    verb: Literal["run"]
    steps: tuple[_StepReport, ...]

    @property
    def exit_status(self) -> int:
        return 1 if self.steps and self.steps[-1].errno else 0


class _EntryReport(Fields, frozen=True, kw_only=True):
    """A file or folder; `content` has runs of (first sector, sectors, byte or None)."""

    path: str
    folder: bool
    inode: Natural
    links: Natural
    size: Natural
    content: tuple[tuple[Natural, Natural, Natural | None], ...]
    errno: Natural

    def __post_init__(self) -> None:
        at = 0
        for first, count, _byte in self.content:
            check_report(first == at and count > 0, f"{self.path} has a gap at sector {at}")
            at += count
        whole = -(-self.size // SECTOR)
        check_report(bool(self.errno) or at == whole, f"{self.path} has {at} sectors")

    def entry(self) -> Entry:
        sectors = tuple(byte for _, count, byte in self.content for _ in range(count))
        return Entry(self.folder, self.inode, self.links, self.size, sectors, self.errno)


class _TreeReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["powercut"]
    verb: Literal["tree"]
    entries: tuple[_EntryReport, ...]


def run_steps(guest: Guest, folder: str, counter: str, steps: Sequence[Step]) -> None:
    """Make steps in a folder of the guest, and count them in a DAX device.

    Args:
        guest: the guest.
        folder: the program's folder.
        counter: path of a DAX device, whose first word is the number of completed steps so far.
        steps: the steps.

    Raises:
        ContractError: a step failed.
    """
    for at in range(0, len(steps), _STEPS):
        part = [str(step) for step in steps[at : at + _STEPS]]
        words = ["run", folder, counter, *part]
        result = run_tool(guest, "powercut", words, timeout_s=120)
        report = read_report(_RunReport, result.stdout, result.status, result.stderr)
        if report.steps[-1].errno:
            last = report.steps[-1]
            raise ContractError(f"{last.step} in {folder} fails with {last.error} ({last.errno})")
        check_report(len(report.steps) == len(part), f"{len(report.steps)} steps")


def use_device(guest: Guest, device: str, slot: int) -> None:
    """Make the folder DEVICE_FOLDER, in which the steps of BlockPrograms find a device.

    Args:
        guest: the guest.
        device: path of the block device or DAX device.
        slot: its DIMM, whose deep_flush is used.
    """
    attribute = find_region(guest, slot).device + "/deep_flush"
    guest.succeed(
        f"mkdir -p {DEVICE_FOLDER} && ln -s {device} {DEVICE_FOLDER}/{DISK} && "
        f"ln -s {attribute} {DEVICE_FOLDER}/{DISK}.deep_flush"
    )


def tree_command(guest: Guest, folder: str) -> list[str]:
    """A command of the guest whose result read_tree() understands."""
    return [str(install_tool(guest, "powercut")), "tree", folder]


def read_tree(result: CommandResult) -> dict[str, Entry]:
    """Return the files and folders that tree_command() found, by relative path.

    The file system's own folder for recovered files is left out.
    """
    report = read_report(_TreeReport, result.stdout, result.status, result.stderr)
    return {
        one.path.removeprefix("./"): one.entry()
        for one in report.entries
        if one.path not in (".", "./lost+found")
    }
