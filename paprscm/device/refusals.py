# SPDX-License-Identifier: GPL-2.0-or-later
"""Refusals: a command line, and the message with which each QEMU version refuses it.

The rows are in refusal_rows.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paprscm.device.launch import Attempt
from paprscm.log import quoted
from paprscm.papr import SCM_MIN_LABEL_SIZE
from paprscm.vm.machine import GIB, MIB

Version = tuple[int, int]
Words = tuple[str, ...]

DIMM_BYTES = 512 * MIB + SCM_MIN_LABEL_SIZE
"""A good DIMM's backing file: two SCM blocks and the smallest label area."""

FILES: Mapping[str, int] = {
    "dimm": DIMM_BYTES,
    "second": DIMM_BYTES,
    "longer": DIMM_BYTES + 4096,
    "label4g": 256 * MIB + 4 * GIB,
    "large": 16 * GIB,
}
"""Backing files by the name of their placeholder, with their sizes in bytes."""

MEMORY = "256M,slots=4,maxmem=8G"
"""The board of most rows: room for 7.75 GiB of DIMMs at 1 GiB."""


@dataclass(frozen=True)
class Message:
    """Message of a range of QEMU versions.

    Attributes:
        text: the message without QEMU's name and the option in front; with placeholders.
        since: the first version that says so, (major, minor).
        until: the first that does not any more; None: the last one known does.
    """

    text: str
    since: Version = (7, 0)
    until: Version | None = None

    def holds(self, version: Sequence[int]) -> bool:
        """Return True if a QEMU of this version prints the message."""
        found = tuple(version[:2])
        return self.since <= found and (self.until is None or found < self.until)

    def __str__(self) -> str:
        since = "QEMU {}.{}".format(*self.since)
        return since + (" to before {}.{}".format(*self.until) if self.until else " and later")


@dataclass(frozen=True)
class Refusal:
    """A command line that QEMU must refuse.

    Attributes:
        name: what is wrong with it; unique.
        words: the command line, with placeholders such as {dimm} (see `make_files`).
        messages: what it is refused with, by version; exactly one holds for each.
        source: where QEMU says so.
        machine: machine options to add.
    """

    name: str
    words: Words
    messages: tuple[Message, ...]
    source: str
    machine: str = ""

    def message(self, version: Sequence[int]) -> Message:
        """Return the message that a QEMU of this version must print."""
        (found,) = (message for message in self.messages if message.holds(version))
        return found

    def expected(self, version: Sequence[int], places: Mapping[str, str]) -> str:
        """Return a copy with the placeholders filled in."""
        return self.message(version).text.format_map(places)

    def difference(
        self, found: Attempt, version: Sequence[int], places: Mapping[str, str]
    ) -> str | None:
        """Both texts where QEMU did not refuse in the expected words; else None.

        Only that QEMU refuses, and gives a reason, is its contract (`Attempt.refused`).
        """
        wanted = self.expected(version, places)
        said = without_option(found.text, filled(self.words, places))
        if found.refused and said == wanted:
            return None
        return (
            f"{self.name}: {found}\n"
            f"  expected ({self.message(version)}; {self.source}):\n{quoted(wanted)}"
        )


def make_files(folder: Path) -> dict[str, str]:
    """Make what the rows' placeholders stand for, all of it sparse.

    Returns: the paths by placeholder: the FILES, {fifo}, {folder} itself, {absent} (which is not
    there); and {memdev}, the backend that a message names.
    """
    places = {name: str(folder / name) for name in (*FILES, "fifo", "absent")}
    for name, size in FILES.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    os.mkfifo(places["fifo"])
    return places | {"folder": str(folder), "memdev": "mem0"}


def filled(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """A command line with its placeholders filled in."""
    return [word.format_map(places) for word in words]


def without_option(text: str, words: Sequence[str]) -> str:
    """Return QEMU's message without the option that precedes it.

    Args:
        text: its words.
        words: the command line, as QEMU got it.
    """
    for option, value in itertools.pairwise(words):
        text = text.replace(f"{option} {value}: ", "")
    return text


def backend(
    number: int = 0,
    *,
    kind: str = "file",
    path: str | None = "{dimm}",
    size: int | None = DIMM_BYTES,
    more: str = "share=on",
) -> Words:
    """The words of one memory backend; None leaves a property out.

    Args:
        number: makes the id, "mem0".
        kind: memory-backend-`kind`.
        path: mem-path.
        size: bytes.
        more: what else it gets, comma-separated.
    """
    words = [f"memory-backend-{kind},id=mem{number}"]
    words += [f"mem-path={path}"] if path is not None else []
    words += [f"size={size}"] if size is not None else []
    return ("-object", ",".join(words + ([more] if more else [])))


def device(number: int = 0, driver: str = "spapr-nvdimm", **changes: str | None) -> Words:
    """The words of one NVDIMM that is good but for the changes.

    Args:
        number: makes the id, "nv0", the backend that it takes, "mem0", and its uuid.
        driver: its type.
        changes: properties, with underscores for dashes; None leaves one out.
    """
    properties: dict[str, str | None] = {
        "id": f"nv{number}",
        "memdev": f"mem{number}",
        "label_size": "128K",
        "uuid": f"{number + 1:08x}-52f5-4d0a-8d5c-0c3f1f0b9a11",
        **changes,
    }
    words = [f"{k.replace('_', '-')}={v}" for k, v in properties.items() if v is not None]
    return ("-device", ",".join((driver, *words)))


def dimm(**changes: str | None) -> Words:
    """A good backend, and a device on it that is good but for the changes."""
    return (*backend(), *device(0, "spapr-nvdimm", **changes))


def on(**changes: Any) -> Words:
    """A backend that is good but for the changes, and a good device on it."""
    return (*backend(**changes), *device())


def board(*words: str, memory: str = MEMORY) -> Words:
    """A command line: the board's memory, and the rest."""
    return ("-m", memory, *words)


TWO = (*dimm(slot="0"), *backend(1, path="{second}"))
"""A DIMM, and the backend of a second."""
ORDINARY = ("-object", "memory-backend-ram,id=ram,size=256M")
NODES = (*ORDINARY, "-numa", "node,nodeid=0,memdev=ram", "-numa", "node,nodeid=1")


def row(
    name: str, words: Words, texts: str | tuple[Message, ...], source: str, machine: str = ""
) -> Refusal:
    """A row; the board has MEMORY unless the words say -m."""
    line = words if words[0] == "-m" else board(*words)
    return Refusal(
        name, line, (Message(texts),) if isinstance(texts, str) else texts, source, machine
    )


def changed(version: Version, old: str, new: str) -> tuple[Message, ...]:
    """A text until a version, and another one from it on."""
    return (Message(old, until=version), Message(new, since=version))


_ALL = 8 * GIB - 256 * MIB + SCM_MIN_LABEL_SIZE
LIMITS: Mapping[str, Words] = {
    "label of 128K": board(*dimm()),
    "label leaves one block": board(*dimm(label_size=str(DIMM_BYTES - 256 * MIB))),
    "file longer than the size": board(*on(path="{large}")),
    "all of the room": board(*on(path="{large}", size=_ALL)),
    "uuid in capitals": board(*dimm(uuid="7F9B6A0E-52F5-4D0A-8D5C-0C3F1F0B9A11")),
    "last slot of 32": board(*dimm(slot="31"), memory="256M,slots=32,maxmem=8G"),
    "last address": board(*dimm(addr="0x210000000")),
    "last node": board(*NODES, *dimm(node="1")),
    "read-only and unarmed": board(*backend(more="share=on,readonly=on"), *device(unarmed="on")),
    "empty file": board(*on(path="{absent}")),
}
"""Machines just within the limits: QEMU must accept them silently."""
