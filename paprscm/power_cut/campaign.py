# SPDX-License-Identifier: GPL-2.0-or-later
"""One run of a guest with a log of its stores, and the images of power cuts in it.

Programs in the guest count their completed steps in a DIMM of their own, whose pages are in the
log, too. So the log has the number of completed steps at each of its points.
"""

from __future__ import annotations

import random
import time
from collections import Counter as Counts
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from paprscm.errors import ConfigError, HostError
from paprscm.guest.guest import Guest
from paprscm.pmem.namespaces import (
    Namespace,
    create_namespace,
    file_offset,
    find_namespace,
)
from paprscm.pmem.regions import Region, find_region
from paprscm.power_cut.images import Cut, Image, images
from paprscm.power_cut.store_log import PAGE, LogPart, StoreLog, read_log
from paprscm.vm.dimms import PMEM_ON, SMALL
from paprscm.vm.sync_shim import Shim

COUNTER = PMEM_ON.at(0, SMALL).holding("devdax")
"""Before the other DIMMs: its pages are logged first, so that the count is not too high."""
PER_POINT = 2
"""Images of one point: the oldest one, and random ones."""
CONTROL = 200
"""Images within which a host that lies must be detected."""
LIES = {"every sync": 1.0, "half of the syncs": 0.5}
"""Lies of the control, with their probabilities."""
_SYNC_S = 60.0
"""Time limit of a sync on a busy host, s."""

Judge = Callable[[Image, int], list[str]]
"""Returns what is missing or wrong in an image, when so many steps had returned."""


Explain = Callable[[Image, int, list[str]], str]
"""Returns the circumstances of what is wrong in an image, when so many steps had returned."""


class Report(Protocol):
    """The part of a test that images are reported to (paprscm.testcase)."""

    def check(self, what: str, found: object, expected: object, *, detail: str = "") -> bool: ...
    def checkpoint(self) -> None: ...
    def metric(self, name: str, value: float, unit: str, **dimensions: object) -> None: ...
    def measure(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class Counter:
    """The DAX device whose first word is the number of completed steps.

    Attributes:
        path: its path in the guest.
        offset: its offset in the backing file of `COUNTER`, bytes.
    """

    path: str
    offset: int

    def at_points(self, log: StoreLog) -> list[int]:
        """Return the number of completed steps at each point of a log."""
        done, counts = 0, []
        place = (COUNTER.slot, self.offset // PAGE)
        for changed in log.pages:
            if place in changed:
                done = int.from_bytes(changed[place][self.offset % PAGE :][:8], "little")
            counts.append(done)
        return counts


def make_counter(guest: Guest) -> Counter:
    """Make the counter of a guest on the DIMM `COUNTER`."""
    region = find_region(guest, COUNTER.slot)
    return _counter(guest, region, create_namespace(guest, region, mode="devdax"))


def find_counter(guest: Guest) -> Counter:
    """Find the counter that an earlier kernel has made."""
    region = find_region(guest, COUNTER.slot)
    return _counter(guest, region, find_namespace(guest, COUNTER.slot, "devdax"))


def _counter(guest: Guest, region: Region, namespace: Namespace) -> Counter:
    device = namespace.character_device
    return Counter(device.path, file_offset(guest, region, device))


def stop_and_read(guest: Guest, shims: Sequence[Shim], slots: Sequence[int]) -> StoreLog:
    """Stop a guest, wait for its syncs, and read the log of its stores.

    Args:
        guest: the guest.
        shims: those of its QEMUs, in the order of its migrations. Their logs are removed: they may
            have a gigabyte.
        slots: the slots of all its DIMMs, in the order of the machine.
    """
    guest.vm.qmp.execute("stop")
    for slot in slots:
        # The end of a sync is in the log before it is counted.
        syncs = guest.vm.syncs(slot)
        syncs.wait_ended(syncs.counts().begun, _SYNC_S)
    parts = [_part(shim) for shim in shims]
    log = read_log(parts, [guest.file(slot) for slot in slots])
    for part in parts:
        part.path.unlink()
    return log


def _part(shim: Shim) -> LogPart:
    assert shim.log is not None  # noqa: S101 - that of a recorded QEMU
    records = shim.records()
    return LogPart(shim.log, {record.number: (record.start, record.end) for record in records})


@dataclass
class Campaign:
    """The images of one log.

    Attributes:
        log: the log of stores.
        done: number of completed steps at each point.
        before: number of the first steps, which prepare: no cut is before their end.
        dice: source of the random choices.
        torn: each sector of 512 bytes is written on its own.
    """

    log: StoreLog
    done: Sequence[int]
    before: int
    dice: random.Random
    torn: bool = False
    points: list[int] = field(init=False)
    """Points at which the power may go off."""

    def __post_init__(self) -> None:
        first = next((n for n, done in enumerate(self.done) if done >= self.before), None)
        if first is None:
            raise HostError(f"no point of the log is after the first {self.before} steps")
        self.points = list(range(first, self.log.last + 1))

    @property
    def newest(self) -> Image:
        """The contents at the end."""
        return Image("newest", Cut(self.log, self.log.last).newest)

    @property
    def oldest(self) -> Image:
        """The oldest contents that a cut at the end may leave."""
        return Image("oldest", Cut(self.log, self.log.last).oldest)

    def images(
        self, count: int, *, per_point: int = PER_POINT, among: Collection[int] = ()
    ) -> Iterator[tuple[Image, int]]:
        """Yield about `count` legal images, each with its point.

        The last point is among them, and those that have a number of completed steps of `among`.
        """
        chosen = [p for p in self.points if self.done[p] in among or p == self.points[-1]]
        others = [point for point in self.points if point not in chosen]
        more = max(0, min(-(-count // per_point) - len(chosen), len(others)))
        for point in [*chosen, *self.dice.sample(others, more)]:
            for image in images(Cut(self.log, point), self.dice, limit=per_point, torn=self.torn):
                yield image, point

    def judge(
        self,
        test: Report,
        judge: Judge,
        count: int,
        explain: Explain,
        begun: Callable[[int], Iterable[str]],
        *,
        among: Collection[int] = (),
        **dimensions: str,
    ) -> None:
        """Judge images; the test ends as FAIL at the first one that lacks what was promised.

        An image has a state of each program that has begun at its cut; the number of judged states
        by operation is recorded.

        Args:
            test: the test.
            judge: judges the images.
            count, among: as for `images`.
            explain: explains what is wrong in an image.
            begun: names the operation of each program that has begun when so many steps had
                returned.
            dimensions: of the metric, the time of an image.
        """
        judged, began, states = 0, time.monotonic(), Counts[str]()
        for image, point in self.images(count, among=among):
            judged += 1
            done = self.done[point]
            states.update(begun(done))
            wrong = judge(image, done)
            detail = explain(image, done, wrong) if wrong else ""
            for text in wrong:
                test.check(f"{image.name} at point {point}", text, "", detail=detail)
            test.checkpoint()
        test.metric("image", (time.monotonic() - began) / judged, "s", **dimensions)
        numbers = [len(self.log.syncs), len(self.points), judged]
        test.measure("syncs, points and images", numbers)
        test.measure("states by operation", dict(sorted(states.items())))

    def expect_force(
        self, test: Report, judge: Judge, *, limit: int = CONTROL, lies: Mapping[str, float] = LIES
    ) -> None:
        """As `control`, and record the number of images that each lie needed."""
        for lie, number in self.control(judge, limit=limit, lies=lies).items():
            test.metric("images_to_detection", number, "images", lie=lie)

    def control(
        self, judge: Judge, *, limit: int = CONTROL, lies: Mapping[str, float] = LIES
    ) -> dict[str, int]:
        """Check that a host that lies about its syncs since the preparation is detected.

        Args:
            judge: judges the images.
            limit: number of images within which each lie must be detected.
            lies: for each, the probability that a sync is reported, but not done.

        Returns:
            The number of images that each lie needed.

        Raises:
            HostError: a lie is not detected, so the verdicts mean nothing.
        """
        return {what: self._detect(judge, what, share, limit) for what, share in lies.items()}

    def _detect(self, judge: Judge, what: str, share: float, limit: int) -> int:
        for number in range(1, limit + 1):
            point = self.dice.choice(self.points)
            # Drawn for each image: a file system may make its syncs in pairs, of which the second
            # one is enough.
            first = self.points[0]
            done = {s for s in self.log.syncs if s.point < first or self.dice.random() >= share}
            cut = Cut(self.log, point, counts=done.__contains__)
            (image,) = images(cut, self.dice, limit=1)
            if judge(image, self.done[point]):
                return number
        raise HostError(f"{limit} images of a host have all data; {what} was a lie")


def image_count(text: str) -> int:
    """The parameter images=N.

    Raises:
        ConfigError: it is not a positive number.
    """
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"images={text} is not a number of images")
    return int(text)


def is_torn(text: str) -> bool:
    """The parameter torn=yes or torn=no: the host writes each sector of 512 bytes on its own.

    Raises:
        ConfigError: it is neither.
    """
    if text not in ("yes", "no"):
        raise ConfigError(f"torn={text} is neither yes nor no")
    return text == "yes"
