# SPDX-License-Identifier: GPL-2.0-or-later
"""Random operations on the extents of files in the guest, made by guest_tools/extents.c."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Literal

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Natural, ToolReport, check_report, read_report
from paprscm.guest.tools import run_tool

_LIMIT_S = 300.0


class ExtentsReport(ToolReport, frozen=True, kw_only=True):
    """What became of the steps.

    Attributes:
        steps: number of steps that were made, including the failed one.
        block: block size, bytes.
        done: successful operations, by name.
        unsupported: operations that this file system does not have, by name.
        failure: what was wrong; "" if nothing was.
        step: the last operation: its name, file, offset and length, bytes above the base.
        at: offset of the first wrong byte.
        expected, found: the byte there; or sizes, or 1 for "equal" and 0 for "different".
        errno: of an operation that failed.
    """

    tool: Literal["extents"]
    steps: Natural
    block: Natural
    done: dict[str, Natural]
    unsupported: dict[str, Natural]
    failure: str
    step: str
    at: Natural
    expected: Natural
    found: Natural
    errno: Natural

    def __post_init__(self) -> None:
        check_report(set(self.done) == set(self.unsupported), "done and unsupported differ")

    @property
    def exit_status(self) -> int:
        return int(self.failure != "")

    @property
    def punch_shows_blocks(self) -> bool:
        """A whole block within a punched range does not read as zeros; its edges do."""
        match = re.fullmatch(r"punch \w (\d+)\+(\d+)", self.step)
        if match is None or not self.failure or self.expected or not self.found:
            return False
        start, length = int(match[1]), int(match[2])
        return self.at % self.block == 0 and start < self.at <= start + length - self.block

    @property
    def place(self) -> str:
        """The last step, what was wrong, and where."""
        return (
            f"step {self.steps}, {self.step}: {self.failure} (at {self.at}: expected "
            f"{self.expected}, found {self.found}; errno {self.errno})"
        )

    def expect_correct(self, needed: Set[str]) -> None:
        """Assert that no step failed, and that each needed operation was made.

        Raises:
            ContractError: a file has wrong contents, or an operation failed.
            HostError: a needed operation never succeeded: it was not tested.
        """
        if self.failure:
            raise ContractError(self.place)
        if missing := sorted(name for name in needed if not self.done.get(name)):
            raise HostError(f"never made in {self.steps} steps: {', '.join(missing)}")


def exercise(
    guest: Guest,
    folder: str,
    scratch: str,
    *,
    block_bytes: int,
    base: int,
    seed: int,
    steps: int,
) -> ExtentsReport:
    """Make random operations on two files of a folder.

    Args:
        guest: the guest.
        folder: where the files are made.
        scratch: path of another disk, which is overwritten.
        block_bytes: block size of its file system.
        base: the files are sparse up to this offset, bytes.
        seed: the same seed makes the same operations.
        steps: number of operations.

    Raises:
        ProbeError: the tool failed, or its report cannot be believed.
        GuestLostError: the guest was lost, or an operation did not end.
    """
    words = [f"--block={block_bytes}", f"--base={base}", f"--seed={seed}", f"--steps={steps}"]
    words += [folder, scratch]
    result = run_tool(guest, "extents", words, timeout_s=_LIMIT_S)
    return read_report(ExtentsReport, result.stdout, result.status, result.stderr)
