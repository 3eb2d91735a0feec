# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs on block devices, judged in images of a simulated device."""

from __future__ import annotations

import random
from unittest.mock import Mock

import pytest

from paprscm.errors import HostError
from paprscm.power_cut.blocks import (
    AREA,
    CACHED,
    DAX,
    DIRECT,
    BlockPrograms,
    Layout,
    Operation,
)
from paprscm.power_cut.campaign import Campaign
from paprscm.power_cut.images import Image
from paprscm.power_cut.steps import WRITES
from paprscm.power_cut.store_log import PAGE, StoreLog, Sync

COUNT = 30
LAYOUT = Layout(COUNT, ((1, 0),), stride=AREA)


def dice() -> random.Random:
    return random.Random(1)  # noqa: S311


def programs(*groups: dict[str, Operation], unit: int = 512, whole: bool = False) -> BlockPrograms:
    operations = {name: made for group in groups for name, made in group.items()}
    return BlockPrograms(dice(), operations, count=COUNT, unit=unit, whole=whole, stride=AREA)


def run(these: BlockPrograms, *, forgets: str = "", torn: bool = False) -> Campaign:
    """The campaign of a device without a cache, which syncs in each call but `forgets`."""
    memory = bytearray(these.size)
    pages: list[dict[tuple[int, int], bytes]] = []
    syncs: list[Sync] = []
    done: list[int] = []
    changed: set[int] = set()

    def point(number: int) -> None:
        pages.append({(1, n): bytes(memory[n * PAGE : (n + 1) * PAGE]) for n in changed})
        changed.clear()
        done.append(number)

    for number, step in enumerate(these.steps):
        if step.verb in WRITES:
            end = step.offset + step.length
            memory[step.offset : end] = bytes([step.byte]) * step.length
            changed.update(range(step.offset // PAGE, -(-end // PAGE)))
        if step.verb not in ("write", "direct", "store", "dax", forgets):
            point(number)
            syncs.append(Sync(len(syncs), 1, len(pages) - 1, len(pages)))
    point(len(these.steps))
    return Campaign(StoreLog(pages, syncs), done, len(these.before), dice(), torn)


def differences(these: BlockPrograms, campaign: Campaign) -> list[str]:
    return [
        text
        for image, point in campaign.images(60)
        for text in these.differences(LAYOUT.read(image), campaign.done[point])
    ]


@pytest.mark.parametrize("group", [CACHED | DIRECT, DAX])
@pytest.mark.parametrize("torn", [False, True])
def test_a_device_that_syncs_has_everything(group: dict[str, Operation], torn: bool) -> None:
    these = programs(group)
    assert differences(these, run(these, torn=torn)) == []


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "msync", "dwrite", "ddirect", "deep_flush"])
def test_each_call_without_a_sync_is_found(call: str) -> None:
    these = programs(CACHED, DIRECT)
    # The calls of later programs sync, too; the oldest image of each point has it.
    campaign = run(these, forgets=call)
    assert any(
        these.differences(LAYOUT.read(image), campaign.done[point])
        for image, point in campaign.images(2 * len(campaign.points))
    )


def test_lies_are_found() -> None:
    these = programs(CACHED)
    campaign = run(these)

    def judge(image: Image, done: int) -> list[str]:
        return these.differences(LAYOUT.read(image), done)

    assert all(number < 20 for number in campaign.control(judge).values())
    with pytest.raises(HostError, match="was a lie"):
        campaign.control(lambda _image, _done: [], limit=5)


def test_the_judged_states_are_counted() -> None:
    these = programs(CACHED)
    campaign, seen = run(these), list[int]()

    def judge(_image: Image, done: int) -> list[str]:
        seen.append(done)
        return []

    test = Mock()
    campaign.judge(test, judge, 40, these.explain, these.begun)
    facts = {call.args[0]: call.args[1] for call in test.measure.call_args_list}
    # A program has begun when its first step is the next one.
    begun = sum(done >= begin for done in seen for begin in these.begins)
    assert sum(facts["states by operation"].values()) == begun
    assert set(facts["states by operation"]) <= {*CACHED, "2 operations"}
    assert facts["syncs, points and images"][2] == len(seen)


def test_torn_blocks_are_found() -> None:
    these = programs(DIRECT, unit=PAGE, whole=True)
    assert differences(these, run(these)) == []
    assert any("is torn" in text for text in differences(these, run(these, torn=True)))


def test_a_striped_device_is_read_from_its_members() -> None:
    layout = Layout(4, ((1, PAGE), (2, 0)), stride=AREA)
    places = list(layout.places())
    pages = {place: bytes([number]) * PAGE for number, place in enumerate(places)}
    assert layout.read(Image("", pages)) == b"".join(pages.values())
    assert places[:2] == [(1, 1), (1, 2)]
    assert places[16:18] == [(2, 0), (2, 1)]
    assert places[32] == (1, 17)
    # An area has two chunks, one on each member.
    far = list(Layout(2, ((1, 0), (2, 0)), stride=4 * AREA).places())
    assert far[32:34] == [(1, 64), (1, 65)]
    assert far[48] == (2, 64)
