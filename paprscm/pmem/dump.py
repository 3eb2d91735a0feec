# SPDX-License-Identifier: GPL-2.0-or-later
"""Run guest_tools/pmem.c in a guest and parse its output."""

from __future__ import annotations

import math
import re
from typing import Final

from paprscm import timesheet
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.tools import run_tool
from paprscm.papr import drc_index

_HEX_LINE: Final = re.compile(r"(?: [0-9a-f]{2})+")
_FILE: Final = re.compile(r"([0-9]+) ([0-7]{1,4}) (.+)")


class RegionError(ContractError):
    """The guest has no region for the slot, or the region contradicts the device tree."""


class Dump:
    """Output of the tool, parsed strictly; guest_tools/pmem.c describes the lines.

    Raises:
        HostError: the output is malformed.
    """

    def __init__(self, output: str) -> None:
        self.texts: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.regions: list[tuple[str, str, str]] = []
        self.sizes: dict[str, int] = {}
        self.modes: dict[str, int] = {}
        self.step = ""
        self.complete = False
        blob: str | None = None
        for line in output.removesuffix("\n").split("\n") if output else ():
            word, _, rest = line.partition(" ")
            key, _, value = rest.partition(" ")
            if self.complete:
                raise HostError(f"pmem printed after the end: {line!r}")
            if blob is not None and _HEX_LINE.fullmatch(line):
                self.blobs[blob] += bytes.fromhex(line)
                continue
            blob = None
            if word == "text" and key and key not in self.texts:
                self.texts[key] = value
            elif word == "blob" and key and not value and key not in self.blobs:
                self.blobs[blob := key] = b""
            elif word == "found" and len(parts := rest.split(" ")) == 3:
                self.regions.append((parts[0], parts[1], parts[2]))
            elif word == "file" and (file := _FILE.fullmatch(rest)) and file[3] not in self.modes:
                self.modes[file[3]] = int(file[2], 8)
                if "/" not in file[3]:
                    self.sizes[file[3]] = int(file[1])
            elif word == "step" and key and not value:
                self.step = key
            elif line == "done":
                self.complete = True
            else:
                raise HostError(f"unexpected output of pmem: {line!r}")

    def text(self, key: str) -> str:
        try:
            return self.texts[key]
        except KeyError:
            raise ContractError(f"the guest has no {key}; it has {sorted(self.texts)}") from None

    def number(self, key: str) -> int:
        text = self.text(key)
        if not re.fullmatch(r"[0-9]+|0x[0-9a-f]+", text):
            raise ContractError(f"{key} is not a number: {text!r}")
        return int(text, 0)

    def properties(self) -> dict[str, bytes]:
        rest = self.blobs.get("props", b"")
        if len(rest) != sum(self.sizes.values()):
            raise HostError(f"{len(rest)} bytes of properties, but their sizes are {self.sizes}")
        properties = {}
        for name, size in self.sizes.items():
            properties[name], rest = rest[:size], rest[size:]
        return properties

    def words(self, key: str) -> frozenset[str] | None:
        return frozenset(self.texts[key].split()) if key in self.texts else None


_STEPS_LIMIT_S = 120.0
# pmem exits with this if its step "find" finds no region.
_NO_REGION = 3


@timesheet.during("DIMMs")
def run_steps(
    guest: Guest,
    title: str,
    steps: list[str],
    values: dict[str, str] | None = None,
    *,
    slot: int | None = None,
    timeout_s: float = 0.0,
) -> Dump:
    """Run steps of the tool in the guest and return their output.

    Args:
        guest: the guest.
        title: name of the operation, for messages.
        steps: names of the steps.
        values: settings of the tool.
        slot: memory slot of the DIMM.
        timeout_s: time to wait for the region, s.

    Raises:
        RegionError: no region.
        ContractError: a step failed.
        HostError: a program is missing or crashed, or the output is malformed.
    """
    settings = {"wait_ms": str(math.ceil(1000 * timeout_s)), **(values or {})}
    if slot is not None:
        settings["drc"] = f"{drc_index(slot):x}"
    words = [*(f"{key}={value}" for key, value in settings.items()), *steps]
    result = run_tool(guest, "pmem", words, timeout_s=timeout_s + _STEPS_LIMIT_S)
    dump = Dump(result.stdout)
    if result.status == _NO_REGION and dump.step == "find" and slot is not None:
        regions = "".join(f"\n  {name}: node {node}, {path}" for name, node, path in dump.regions)
        raise RegionError(
            f"no region of slot {slot} (drc {drc_index(slot):#x}) within {timeout_s:g} s; "
            f"there are: {regions or 'none'}{_trouble(dump)}"
        )
    message = result.stderr.strip() or "(no message)"
    if result.tool_failure:
        raise HostError(f"{title}: step '{dump.step}': {result.tool_failure}:\n{message}")
    if result.status:
        raise ContractError(
            f"{title}: step '{dump.step}' ended with status {result.status}:\n{message}"
        )
    if not dump.complete:
        raise HostError(f"{title}: the output ends in step '{dump.step}':\n{message}")
    return dump


def _trouble(dump: Dump) -> str:
    return f"\n  {dump.texts['trouble']}" if "trouble" in dump.texts else ""
