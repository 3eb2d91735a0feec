# SPDX-License-Identifier: GPL-2.0-or-later
"""Steps of a program that changes files, and the states that a power cut may leave.

The rules are those of the system calls, not of one file system:

- fsync(2), fdatasync(2), msync(2), O_DSYNC: the file's data, and the metadata that are needed to
  read them, are durable when the call returns. The name of the file needs fsync of its folder.
- A write with O_DIRECT, and a store to a DAX mapping, is in the device's memory, but not durable:
  that takes one of the calls above, or a write to the region's attribute deep_flush.
- sync(2) and syncfs(2): everything is durable when they return (Linux waits for the write-back).
- What was changed later may be durable or not, each sector of 512 bytes on its own. The size may be
  any between the sizes in that time.
- rename(2): the new name always exists; on a journaling file system a name is old or new, and an
  inode has as many names as its link count says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeVar

SECTOR = 512

WRITES = ("write", "dwrite", "direct", "ddirect", "store", "dax")
"""Verbs that write bytes to a file."""
_IN_DEVICE = ("direct", "ddirect", "dax")
"""Those that do not leave data in the guest's page cache."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """A file or folder that was found.

    Attributes:
        folder: it is a folder.
        inode, links: its inode's number and link count.
        size: its size, bytes; 0 for a folder.
        sectors: the byte of which each sector consists; None for a sector of several bytes.
        errno: errno of a read that failed, or 0.
    """

    folder: bool
    inode: int
    links: int
    size: int
    sectors: tuple[int | None, ...]
    errno: int = 0


@dataclass(frozen=True)
class Step:
    """One step, as guest_tools/powercut.c makes it.

    Attributes:
        verb: such as "write".
        name: the file, relative to the program's folder.
        other: second name of rename and link, or the text of "set".
        offset, length, byte: range and content, in bytes; `length` is also that of truncate.
    """

    verb: str
    name: str
    other: str = ""
    offset: int = 0
    length: int = 0
    byte: int = 0

    def __str__(self) -> str:
        if self.verb in ("rename", "link", "set"):
            return f"{self.verb}={self.name}:{self.other}"
        if self.verb in WRITES:
            return f"{self.verb}={self.name}:{self.offset}:{self.length}:{self.byte}"
        if self.verb == "msync":
            return f"{self.verb}={self.name}:{self.offset}:{self.length}"
        return f"{self.verb}={self.name}" + (f":{self.length}" if self.verb == "truncate" else "")

    def inside(self, folder: str) -> Step:
        """The same step with names in a folder."""
        other = f"{folder}/{self.other}" if self.other else ""
        name = folder if self.name == "." else f"{folder}/{self.name}"
        return Step(self.verb, name, other, self.offset, self.length, self.byte)


@dataclass
class _Node:
    """A file or folder, with everything that it was: (number of the step, value)."""

    folder: bool
    sizes: list[tuple[int, int]] = field(default_factory=list)
    sectors: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    kept: int = -1
    """Last step that made all of it durable."""
    kept_sectors: dict[int, int] = field(default_factory=dict)
    """Last step that made a sector durable, if later than `kept`."""
    kept_size: int = -1
    in_device: dict[int, int] = field(default_factory=dict)
    """Last step that wrote a sector to the device's memory, if no later one wrote to the cache."""

    @property
    def size(self) -> int:
        return self.sizes[-1][1]


class Program:
    """The states of a program's files before and after each step.

    Args:
        steps: the steps; all succeed.

    Raises:
        ValueError: a step cannot succeed, or its range is not in whole sectors.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self._now: dict[str, _Node] = {".": _Node(folder=True)}
        self._nodes: list[_Node] = [self._now["."]]
        # For each name: (number of the step, node or None).
        self._names: dict[str, list[tuple[int, _Node | None]]] = {}
        self._kept_names: list[tuple[int, str | None]] = []

    def expected(self, done: int) -> Expectation:
        """States that are legal when `done` steps have returned; the next may have begun."""
        program = Program(self.steps)
        for number, step in enumerate(self.steps[: done + 1]):
            program._make(number, step, returned=number < done)
        return Expectation(program._names, program._kept_names, done)

    def _make(self, number: int, step: Step, *, returned: bool) -> None:
        verb, name = step.verb, step.name
        if verb in ("create", "mkdir"):
            if name in self._now:
                raise ValueError(f"{step}: {name} exists")
            node = _Node(folder=verb == "mkdir", sizes=[(number, 0)])
            self._nodes.append(node)
            self._name(number, name, node)
        elif verb in ("unlink", "rmdir"):
            self._find(step)
            self._name(number, name, None)
        elif verb in ("rename", "link"):
            node = self._find(step)
            if node.folder:
                raise ValueError(f"{step}: {name} is a folder")
            if verb == "rename":
                self._name(number, name, None)
            self._name(number, step.other, node)
        elif verb == "truncate":
            self._resize(number, self._find(step), step.length)
        elif verb in WRITES:
            self._write(number, self._find(step), step)
        elif verb not in ("fsync", "fdatasync", "msync", "sync", "syncfs", "deep_flush"):
            raise ValueError(f"unknown verb in {step}")
        if returned:
            self._keep(number, step)

    def _keep(self, number: int, step: Step) -> None:
        """Note what is durable after a step."""
        if step.verb in ("sync", "syncfs"):
            for node in self._nodes:
                node.kept = number
            self._kept_names.append((number, None))
        elif step.verb in ("fsync", "fdatasync"):
            node = self._find(step)
            node.kept = number
            if node.folder and step.verb == "fsync":
                self._kept_names.append((number, step.name))
        elif step.verb == "deep_flush":
            node = self._find(step)
            node.kept_sectors |= node.in_device
        elif step.verb in ("dwrite", "ddirect", "msync"):
            node = self._find(step)
            node.kept_size = number
            for sector in _sectors(step):
                node.kept_sectors[sector] = number

    def _find(self, step: Step) -> _Node:
        try:
            return self._now[step.name]
        except KeyError:
            raise ValueError(f"{step}: {step.name} does not exist") from None

    def _name(self, number: int, name: str, node: _Node | None) -> None:
        parent = str(PurePosixPath(name).parent)
        if parent not in self._now:
            raise ValueError(f"{parent} does not exist")
        self._names.setdefault(name, [(-1, None)]).append((number, node))
        if node is None:
            del self._now[name]
        else:
            self._now[name] = node

    def _resize(self, number: int, node: _Node, size: int) -> None:
        if size % SECTOR:
            raise ValueError(f"a size of {size} bytes is not in whole sectors")
        for sector in range(size // SECTOR, node.size // SECTOR):
            node.sectors.setdefault(sector, []).append((number, 0))
        node.sizes.append((number, size))

    def _write(self, number: int, node: _Node, step: Step) -> None:
        if step.verb in ("store", "dax") and step.offset + step.length > node.size:
            raise ValueError(f"{step}: beyond the end of the file")
        for sector in _sectors(step):
            node.sectors.setdefault(sector, []).append((number, step.byte))
            node.in_device.pop(sector, None)
            if step.verb in _IN_DEVICE:
                node.in_device[sector] = number
        if step.offset + step.length > node.size:
            node.sizes.append((number, step.offset + step.length))


def _sectors(step: Step) -> range:
    if step.offset % SECTOR or step.length % SECTOR:
        raise ValueError(f"{step}: not in whole sectors")
    return range(step.offset // SECTOR, (step.offset + step.length) // SECTOR)


class Expectation:
    """States that are legal after a cut."""

    def __init__(
        self,
        names: Mapping[str, list[tuple[int, _Node | None]]],
        kept_names: Sequence[tuple[int, str | None]],
        done: int,
    ) -> None:
        self._names = names
        self._kept_names = kept_names
        self.done = done

    def differences(self, found: Mapping[str, Entry]) -> list[str]:
        """Compare the files that a cut has left; return what is not legal.

        Args:
            found: files and folders by path, relative to the program's folder, without itself.
        """
        return [*self._of_names(found), *self._of_links(found)]

    def _of_names(self, found: Mapping[str, Entry]) -> Iterator[str]:
        for name in found:
            if name not in self._names:
                yield f"{name}: exists, but was never created"
        for name, history in self._names.items():
            parent = str(PurePosixPath(name).parent)
            if parent != "." and parent not in found:
                # Without its folder it cannot be there; the folder is judged on its own.
                continue
            kept = max(
                (n for n, folder in self._kept_names if folder is None or folder == parent),
                default=-1,
            )
            nodes = [node for _, node in _window(history, kept)]
            entry = found.get(name)
            if entry is None:
                if None not in nodes:
                    yield f"{name}: missing"
                continue
            reasons = [_mismatch(entry, node) for node in nodes if node is not None]
            if not reasons:
                yield f"{name}: exists"
            elif all(reasons):
                yield f"{name}: {reasons[-1]}"

    @staticmethod
    def _of_links(found: Mapping[str, Entry]) -> Iterator[str]:
        by_inode: dict[int, list[str]] = {}
        for name, entry in found.items():
            if not entry.folder:
                by_inode.setdefault(entry.inode, []).append(name)
        for names in by_inode.values():
            links = found[names[0]].links
            if links != len(names):
                yield f"{', '.join(sorted(names))}: {links} links"


def _window(history: Sequence[tuple[int, _T]], kept: int) -> list[tuple[int, _T]]:
    """The value that is durable since step `kept`, and all later ones."""
    last = max((i for i, (number, _) in enumerate(history) if number <= kept), default=0)
    return list(history[last:])


def _mismatch(entry: Entry, node: _Node) -> str:
    """Reason why a file found cannot be this one; empty if it can."""
    if entry.folder != node.folder:
        return "is a folder" if entry.folder else "is not a folder"
    if node.folder:
        return ""
    if entry.errno:
        return f"cannot be read, errno {entry.errno}"
    sizes = [size for _, size in _window([(-1, 0), *node.sizes], max(node.kept, node.kept_size))]
    if not min(sizes) <= entry.size <= max(sizes):
        return f"has {entry.size} bytes, not {_range(sizes)}"
    for sector, byte in enumerate(entry.sectors):
        kept = max(node.kept, node.kept_sectors.get(sector, -1))
        history = [(-1, 0), *node.sectors.get(sector, [])]
        legal = {value for _, value in _window(history, kept)}
        # A store in progress may leave a part of a sector.
        if byte not in legal and not (byte is None and len(legal) > 1):
            text = "several bytes" if byte is None else f"byte {byte}"
            return f"has {text} in sector {sector}, not {' or '.join(map(str, sorted(legal)))}"
    return ""


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
