# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices after a power cut: programs that write to them, and their content in an image.

A raw device has no metadata, so the host reads it from the image, without a guest.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from paprscm.power_cut.generate import with_byte
from paprscm.power_cut.images import Image, Place
from paprscm.power_cut.steps import SECTOR, Entry, Program, Step
from paprscm.power_cut.store_log import PAGE, ZEROS

KIB = 1024
DISK = "disk"
"""Name of the device in the folder of the programs."""
AREA = 128 * KIB
"""Size of a program's own part of the device, bytes: two pages of the guest."""
STRIDE = 4096 * KIB
"""Distance of the areas, bytes: 60 of them are all over a DIMM of 256 MiB."""

Operation = Callable[[int], list[Step]]
"""Steps in a program's area, for the size of a sector, bytes."""

CACHED: dict[str, Operation] = {
    "sector": lambda unit: [_write("write", 2 * unit, unit)],
    "page": lambda _unit: [_write("write", 8 * KIB, 4 * KIB)],
    "two pages of the guest": lambda _unit: [_write("write", 0, AREA)],
    "one range twice": lambda unit: [
        _write("write", 16 * KIB, 4 * unit),
        _write("write", 16 * KIB, 4 * unit),
    ],
    "two ranges": lambda unit: [
        _write("write", 4 * KIB, unit),
        _write("write", AREA - 8 * unit, 2 * unit),
    ],
    "O_DSYNC": lambda unit: [_write("dwrite", 32 * KIB, 3 * unit)],
    "cached and O_DSYNC": lambda unit: [
        _write("write", 24 * KIB, unit),
        _write("dwrite", 24 * KIB + unit, unit),
    ],
    "store": lambda _unit: [_write("store", 60 * KIB, 8 * KIB)],
}
"""Operations that leave data in the guest's page cache, by name."""
DIRECT: dict[str, Operation] = {
    "direct sector": lambda unit: [_write("direct", 5 * unit, unit)],
    "direct page": lambda _unit: [_write("direct", 40 * KIB, 4 * KIB)],
    "direct twice": lambda unit: [
        _write("direct", 44 * KIB, 2 * unit),
        _write("direct", 44 * KIB, 4 * unit),
    ],
    "direct, 64 KiB": lambda _unit: [_write("direct", 32 * KIB, 64 * KIB)],
    "direct with O_DSYNC": lambda unit: [_write("ddirect", 48 * KIB, 2 * unit)],
}
"""Operations with O_DIRECT."""
SECTORS = {
    name: (CACHED | DIRECT)[name]
    for name in (
        *("sector", "one range twice", "two ranges", "O_DSYNC", "cached and O_DSYNC"),
        *("direct sector", "direct twice", "direct with O_DSYNC"),
    )
}
"""Operations on few sectors, for a BTT: it flushes the DIMM four times for each."""
DAX: dict[str, Operation] = {
    "a page": lambda _unit: [_write("dax", 8 * KIB, 4 * KIB)],
    "a sector": lambda _unit: [_write("dax", 512, 512)],
    "all": lambda _unit: [_write("dax", 0, AREA)],
    "twice": lambda _unit: [_write("dax", 64 * KIB, 8 * KIB), _write("dax", 66 * KIB, 8 * KIB)],
}
"""Stores to a DAX device."""


def _write(verb: str, offset: int, length: int) -> Step:
    return Step(verb, DISK, offset=offset, length=length)


CALLS = ("fsync", "fdatasync", "msync", "deep_flush")
"""Calls that make data on a block device durable; sync(2) has a test of its own."""


def _programs(
    dice: random.Random, operations: Mapping[str, Sequence[Step]], count: int, calls: Sequence[str]
) -> Iterator[tuple[str, list[Step]]]:
    """Each operation, followed by each call that makes it durable; then pairs of them."""
    singles = [
        (name, [*steps, way])
        for name, steps in operations.items()
        for way in _durable(steps, calls)
    ]
    dice.shuffle(singles)
    pairs = (
        ("2 operations", [*dice.choice(singles)[1], *dice.choice(singles)[1]])
        for _ in itertools.count()
    )
    values = itertools.cycle(range(2, 256))
    for name, steps in itertools.islice(itertools.chain(singles, pairs), count):
        yield name, [with_byte(step, values) for step in steps]


def _moved(step: Step, place: int) -> Step:
    return dataclasses.replace(step, offset=step.offset + place)


def _durable(steps: Sequence[Step], calls: Sequence[str]) -> Iterator[Step]:
    last = steps[-1]
    ways = {verb: Step(verb, DISK) for verb in ("fsync", "fdatasync")}
    ways["msync"] = Step("msync", DISK, offset=last.offset, length=last.length)
    ways["sync"] = Step("sync", ".")
    if last.verb == "dax":
        # A DAX device has no fsync, and msync does nothing.
        ways.clear()
    if last.verb in ("direct", "dax"):
        ways["deep_flush"] = Step("deep_flush", DISK)
    return (step for verb, step in ways.items() if verb in calls)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Position of a device's first bytes in the backing files.

    Attributes:
        areas: number of areas that programs use.
        stride: distance of the areas, bytes.
        chunk: size of a stripe, bytes; a multiple of 4 KiB.
        stripes: slot of the DIMM and offset in its file, for each member of a striped device, or
            for the only one.
    """

    areas: int
    stripes: tuple[tuple[int, int], ...]
    chunk: int = 64 * KIB
    stride: int = STRIDE

    def places(self) -> Iterator[Place]:
        """The pages of the areas."""
        for area, start in itertools.product(range(self.areas), range(0, AREA, PAGE)):
            at = area * self.stride + start
            chunk, rest = divmod(at, self.chunk)
            row, member = divmod(chunk, len(self.stripes))
            slot, offset = self.stripes[member]
            yield slot, (offset + row * self.chunk + rest) // PAGE

    def read(self, image: Image) -> bytes:
        """The content of the areas in an image."""
        return b"".join(image.pages.get(place, ZEROS) for place in self.places())

    def reader(self, image: Image) -> Callable[[int, int], bytes]:
        """A function that reads bytes at an offset of the device, which is not striped."""
        ((slot, base),) = self.stripes

        def read(offset: int, length: int) -> bytes:
            first, rest = divmod(base + offset, PAGE)
            pages = range(first, -(-(base + offset + length) // PAGE))
            content = [image.pages.get((slot, page), ZEROS) for page in pages]
            return b"".join(content)[rest : rest + length]

        return read


class BlockPrograms:
    """The steps of all programs on a device, and the content that is legal after a cut.

    Each program is judged on its own, in its area: most areas are the same in many images.

    Args:
        dice: source of the order and of the pairs.
        operations: the operations, by name.
        count: number of programs. Each operation is followed by each call that makes it durable;
            then there are pairs of those.
        calls: verbs of the calls that make data durable. deep_flush is used where the data are in
            the device's memory.
        unit: size of a sector, bytes.
        whole: a sector is old or new as a whole.
        stride: distance of the areas on the device, bytes.
    """

    def __init__(
        self,
        dice: random.Random,
        operations: Mapping[str, Operation],
        *,
        count: int,
        calls: Sequence[str] = CALLS,
        unit: int = SECTOR,
        whole: bool = False,
        stride: int = STRIDE,
    ) -> None:
        made = {name: make(unit) for name, make in operations.items()}
        programs = list(_programs(dice, made, count, calls))
        self._names = [name for name, _ in programs]
        self._is_dax = any(step.verb == "dax" for step in programs[0][1])
        self._unit = unit if whole else 0
        filler = "dax" if self._is_dax else "write"
        filled = Step(filler, DISK, length=AREA, byte=1)
        durable = Step("deep_flush" if self._is_dax else "fsync", DISK)
        self.before = [*(_moved(filled, number * stride) for number in range(count)), durable]
        """The first steps: they fill all areas."""
        self.steps = list(self.before)
        """All steps."""
        self.size = count * AREA
        """Number of bytes of all areas."""
        self.begins: list[int] = []
        """Number of the first step of each program."""
        self._programs: list[Program] = []
        created = [Step("create", DISK), Step("truncate", DISK, length=AREA), Step("syncfs", ".")]
        self._made = [*created, filled, durable]
        for number, (_, steps) in enumerate(programs):
            self.begins.append(len(self.steps))
            self.steps += (_moved(step, number * stride) for step in steps)
            # A call for the whole device, of a later program, is the last step of each.
            self._programs.append(Program([*self._made, *steps, durable]))
        self._known: dict[tuple[int, int, bytes], list[str]] = {}

    def differences(self, content: bytes, done: int) -> list[str]:
        """Compare the content with what is legal when `done` steps had returned.

        Args:
            content: the content of all areas.
            done: number of steps that had returned, at least those of `before`.
        """
        found = []
        for number, area in enumerate(_parts(content, AREA)):
            key = number, self._own(number, done), area
            if key not in self._known:
                self._known[key] = self._judge(*key)
            found += self._known[key]
        return found

    def _own(self, number: int, done: int) -> int:
        """Number of completed steps of one program, with the last one if it was called."""
        begin = self.begins[number]
        end = [*self.begins, len(self.steps)][number + 1]
        later = {"deep_flush"} if self._is_dax else {"fsync", "fdatasync"}
        flushed = any(step.verb in later for step in self.steps[end:done])
        return max(0, min(done, end) - begin) + flushed

    def _judge(self, number: int, own: int, area: bytes) -> list[str]:
        sectors = tuple(map(_byte, _parts(area, SECTOR)))
        entry = Entry(False, 1, 1, len(area), sectors)
        found = self._programs[number].expected(len(self._made) + own).differences({DISK: entry})
        if self._unit:
            torn = [at for at, one in enumerate(_parts(area, self._unit)) if _byte(one) is None]
            found += [f"{DISK}: block {at} of {self._unit} bytes is torn" for at in torn[:1]]
        return [f"program {number}, {text}" for text in found]

    def begun(self, done: int) -> Iterator[str]:
        """Names of the operations of programs that have begun when so many steps had returned."""
        return iter(self._names[: bisect.bisect_right(self.begins, done)])

    def context(self, done: int) -> str:
        """The position of the cut, for a report."""
        following = str(self.steps[done]) if done < len(self.steps) else "none"
        return f"{done} steps had returned; the next was {following}"

    def explain(self, _image: Image, done: int, _wrong: list[str]) -> str:
        """The position of the cut: each program is judged on its own."""
        return self.context(done)


def _parts(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def _byte(part: bytes) -> int | None:
    return part[0] if part.count(part[0]) == len(part) else None
