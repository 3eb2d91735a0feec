# SPDX-License-Identifier: GPL-2.0-or-later
"""The model of a region's capacity, against a region that obeys the rules and against others."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from obedient_region import ALIGNMENTS, GIB, LABELS, START, UNIT, Kernel

from paprscm.checks import differ
from paprscm.labels import capacity as capacity_module
from paprscm.labels.capacity import (
    Capacity,
    Difference,
    Extent,
    Geometry,
    Known,
    Outcome,
    Request,
)
from paprscm.labels.capacity_steps import Chooser, Step, without
from paprscm.labels.metadata import StoredNamespace
from paprscm.labels.region_state import DeviceState, NamespaceState, RegionState
from paprscm.pmem.namespaces import NamespaceMode
from paprscm.vm.machine import MIB

MODES: tuple[NamespaceMode, ...] = ("raw", "fsdax", "devdax", "sector")
SIZES = (UNIT, 2 * UNIT, 3 * UNIT, 64 * UNIT)


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311


def geometry(**fields: Any) -> Geometry:
    usual = Geometry(
        start=START, size_bytes=16 * UNIT, unit=UNIT, alignments=ALIGNMENTS, labels=LABELS
    )
    return replace(usual, **fields)


def known(number: int, start: int, size: int, *, enabled: bool = True) -> Known:
    """A raw namespace; start and size in units."""
    name = str(uuid.UUID(int=number))
    stored = StoredNamespace(name, start * UNIT, size * UNIT)
    device = DeviceState(mode="raw", uuid=name, size_bytes=size * UNIT, offset=start * UNIT)
    return Known(stored, device, enabled)


def model(*namespaces: Known, **fields: Any) -> Capacity:
    capacity = Capacity(geometry(**fields))
    capacity.namespaces = {one.stored.uuid: one for one in namespaces}
    return capacity


def wrong(differences: list[Difference]) -> list[str]:
    return [what for what, found, expected in differences if differ(found, expected)]


def run(
    seed: int,
    steps: int,
    change: Callable[[RegionState], RegionState] = lambda state: state,
    *,
    size_bytes: int = 16 * UNIT,
) -> list[str]:
    """Make random steps; return what the model finds wrong in the first step with differences.

    Args:
        seed: of the steps and of the kernel's choices.
        steps: their number.
        change: of each state.
        size_bytes: size of the region.
    """
    kernel = Kernel(dice(seed), size_bytes)
    capacity = Capacity.of(kernel.state())
    chooser = Chooser(dice(seed), MODES, SIZES)
    for _ in range(steps):
        step = chooser.choose(capacity)
        judgement = step.judge(capacity)
        success = kernel.make(step)
        outcome = Outcome.SUCCESS if success else Outcome.REFUSED
        if judgement.outcome not in (outcome, Outcome.EITHER):
            return [f"{step}: {outcome.value}, {judgement}"]
        state = change(kernel.state())
        found: list[str] = []
        if success:
            if step.kind in ("destroy", "reconfigure"):
                capacity.destroy(step.uuid)
            if step.kind in ("disable", "enable"):
                capacity.set_enabled(step.uuid, enabled=step.kind == "enable")
            if step.kind == "resize":
                found += wrong(capacity.resize(step.uuid, step.size_bytes, state))
            if step.probes:
                capacity.probe()
            if step.request is not None:
                found += wrong(capacity.adopt(step.request, state))
        area = frozenset(one.stored for one in kernel.namespaces)
        found += wrong(list(capacity.differences(state, area)))
        if found:
            return [f"{step}: {what}" for what in found]
    return []


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [16 * UNIT, 3 * GIB])
def test_a_region_that_obeys_the_rules_has_no_differences(seed: int, size: int) -> None:
    assert run(seed, 150, size_bytes=size) == []


def _changed_namespace(**fields: Any) -> Callable[[RegionState], RegionState]:
    """A change of each namespace."""

    def change(state: RegionState) -> RegionState:
        return replace(
            state,
            namespaces={
                key: replace(one, **{name: new(one) for name, new in fields.items()})
                for key, one in state.namespaces.items()
            },
        )

    return change


def _stored(**fields: int) -> Callable[[RegionState], RegionState]:
    return _changed_namespace(
        stored=lambda one: replace(
            one.stored,
            **{name: getattr(one.stored, name) + more for name, more in fields.items()},
        )
    )


def _device(**fields: Any) -> Callable[[RegionState], RegionState]:
    """A change of each fsdax and devdax device; a number is added."""

    def new(one: NamespaceState) -> DeviceState | None:
        if one.device is None or one.device.map is None:
            return one.device
        values: dict[str, Any] = {
            name: value if isinstance(value, str) else getattr(one.device, name) + value
            for name, value in fields.items()
        }
        return replace(one.device, **values)

    return _changed_namespace(device=new)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: replace(s, size_bytes=s.size_bytes + UNIT), "size of the region"),
        (lambda s: replace(s, available_bytes=s.available_bytes + UNIT), "available_size"),
        (lambda s: replace(s, available_bytes=s.largest_bytes), "available_size"),
        (lambda s: replace(s, largest_bytes=s.available_bytes), "max_available_extent"),
        (lambda s: replace(s, slots=LABELS), "available_slots"),
        (lambda s: replace(s, listed={}), "ndctl: the region"),
        (lambda s: replace(s, namespaces={}), "new enabled namespaces"),
        (_stored(offset=4096), "offset modulo align"),
        (_stored(offset=16 * UNIT), "was in a free extent"),
        (_stored(size_bytes=UNIT), "size"),
        (_stored(size_bytes=-UNIT), "size"),
        (_changed_namespace(mode=lambda _one: "btt"), "mode"),
        (_changed_namespace(listed=lambda _one: None), "ndctl"),
        (_changed_namespace(listed=lambda one: {**one.listed, "size": 1}), "ndctl"),
        (_changed_namespace(device=lambda _one: None), "new enabled namespaces"),
        (_device(map="none"), "map"),
        (_device(mode="raw"), "mode"),
        (_device(align=65536), "align"),
        (_device(size_bytes=4096), "size of data modulo alignment"),
        (_device(size_bytes=UNIT), "is inside"),
        (_device(offset=-2 * MIB), "space for metadata"),
        (_device(offset=4096), "address modulo align"),
    ],
)
def test_a_wrong_state_is_found(change: Callable[[RegionState], RegionState], text: str) -> None:
    found = run(1, 60, change)
    assert any(text in what for what in found), found


def test_a_namespace_in_the_wrong_place_is_found_later() -> None:
    """A change after the creation is found, not only one in the new namespace."""
    kernel = Kernel(dice(1))
    capacity = Capacity.of(kernel.state())
    request = Request(mode="fsdax", map="dev", size_bytes=3 * UNIT, align=65536)
    assert kernel.create(request)
    assert wrong(capacity.adopt(request, kernel.state())) == []
    area = frozenset(one.stored for one in kernel.namespaces)
    for change in (_stored(offset=UNIT), _device(size_bytes=-2 * MIB), _device(uuid="other")):
        assert wrong(list(capacity.differences(change(kernel.state()), area)))
    assert wrong(list(capacity.differences(kernel.state(), frozenset())))


WRONG_RULES: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("unit", lambda patch: _patch_geometry(patch, unit=2 * UNIT)),
    ("labels", lambda patch: _patch_geometry(patch, labels=LABELS + 1)),
    ("size", lambda patch: _patch_geometry(patch, size_bytes=17 * UNIT)),
    ("alignments", lambda patch: _patch_geometry(patch, alignments=ALIGNMENTS | {16 * MIB})),
    ("largest", lambda patch: patch.setattr(Capacity, "largest", Capacity.available)),
    (
        "metadata",
        lambda patch: patch.setattr(capacity_module, "RESERVED", 17 * MIB),
    ),
    ("resize", lambda patch: patch.setattr(Capacity, "can_resize", lambda *_words: True)),
    ("probe", lambda patch: patch.setattr(Capacity, "probe", lambda _self: None)),
    ("destroy", lambda patch: patch.setattr(Capacity, "destroy", lambda *_words: None)),
]


def _patch_geometry(patch: pytest.MonkeyPatch, **fields: Any) -> None:
    original = Capacity.of.__func__  # type: ignore[attr-defined]

    def changed(cls: type[Capacity], state: RegionState) -> Capacity:
        capacity: Capacity = original(cls, state)
        capacity.geometry = replace(capacity.geometry, **fields)
        return capacity

    patch.setattr(Capacity, "of", classmethod(changed))


@pytest.mark.parametrize(("rule", "change"), WRONG_RULES, ids=[rule for rule, _ in WRONG_RULES])
def test_a_wrong_rule_of_the_model_is_found(
    rule: str, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    assert any(run(seed, 150) for seed in range(12)), rule


def test_free_extents() -> None:
    capacity = model(known(1, 2, 3), known(2, 5, 1), known(3, 15, 1))
    extents = [Extent(0, 2 * UNIT), Extent(6 * UNIT, 9 * UNIT)]
    assert (capacity.free(), capacity.largest, capacity.available) == (extents, 9 * UNIT, 11 * UNIT)
    assert model().free() == [Extent(0, 16 * UNIT)]
    assert model(known(1, 0, 16)).free() == []
    foreign = Capacity(geometry(), [Extent(0, UNIT)])
    assert foreign.free() == [Extent(UNIT, 15 * UNIT)]


@pytest.mark.parametrize(
    ("request_", "outcome", "reason"),
    [
        (Request(mode="raw", size_bytes=9 * UNIT), Outcome.SUCCESS, ""),
        (Request(mode="raw"), Outcome.SUCCESS, ""),
        (Request(mode="raw", size_bytes=10 * UNIT), Outcome.REFUSED, "largest free extent"),
        (Request(mode="raw", size_bytes=UNIT + 65536), Outcome.REFUSED, "multiple"),
        (Request(mode="raw", size_bytes=0), Outcome.REFUSED, "multiple"),
        (
            Request(mode="raw", size_bytes=UNIT, uuid=str(uuid.UUID(int=1))),
            Outcome.REFUSED,
            "in use",
        ),
        (
            Request(mode="fsdax", map="mem", size_bytes=UNIT, align=UNIT),
            Outcome.REFUSED,
            "not supported",
        ),
        (Request(mode="fsdax", map="mem", size_bytes=UNIT, align=65536), Outcome.SUCCESS, ""),
        (Request(mode="fsdax", map="dev", size_bytes=UNIT, align=GIB), Outcome.REFUSED, "aligned"),
        (Request(mode="sector", size_bytes=UNIT), Outcome.EITHER, "BTT"),
        (Request(mode="sector", size_bytes=2 * UNIT), Outcome.SUCCESS, ""),
    ],
)
def test_judgements(request_: Request, outcome: Outcome, reason: str) -> None:
    judgement = model(known(1, 2, 3), known(2, 5, 1), known(3, 15, 1)).judge(request_)
    assert judgement.outcome is outcome
    assert reason in judgement.reason


def test_a_full_region_and_a_full_label_area_refuse() -> None:
    request = Request(mode="raw")
    assert "full" in model(known(1, 0, 16)).judge(request).reason
    assert "slot" in model(known(1, 0, 1), labels=1).judge(request).reason


@pytest.mark.parametrize(
    ("size", "free", "outcome"),
    [
        # From 1 GiB on, each place has an aligned piece behind the information block only if the
        # size is nearly 2 GiB; one that begins at an aligned address needs all of 2 GiB.
        (GIB - UNIT, 3 * GIB, Outcome.REFUSED),
        (GIB, 3 * GIB, Outcome.REFUSED),
        (GIB + UNIT, 3 * GIB, Outcome.EITHER),
        (2 * GIB, 3 * GIB, Outcome.SUCCESS),
        # Only one place, at an aligned address.
        (GIB + UNIT, GIB + UNIT, Outcome.REFUSED),
    ],
)
def test_large_alignment(size: int, free: int, outcome: Outcome) -> None:
    request = Request(mode="devdax", map="mem", size_bytes=size, align=GIB)
    assert model(size_bytes=free).judge(request).outcome is outcome


def test_hash_may_need_a_larger_alignment() -> None:
    request = Request(mode="fsdax", map="mem", size_bytes=UNIT, align=65536)
    capacity = model(alignments=frozenset({65536}))
    assert capacity.judge(request).outcome is Outcome.EITHER
    assert capacity.judge(replace(request, size_bytes=2 * UNIT)).outcome is Outcome.SUCCESS


@pytest.mark.parametrize(
    ("size", "possible"), [(1, True), (3, True), (4, True), (5, True), (6, True), (7, False)]
)
def test_growth_is_only_into_adjacent_space(size: int, possible: bool) -> None:
    # Free: 2 units before, 3 units behind; 8 units elsewhere.
    capacity = model(known(1, 2, 3), known(2, 8, 1), known(3, 9, 7))
    capacity.destroy(known(3, 9, 7).stored.uuid)
    name = known(1, 2, 3).stored.uuid
    assert capacity.can_resize(name, size * UNIT) is possible
    outcome = Outcome.SUCCESS if possible else Outcome.REFUSED
    assert capacity.judge_size(name, size * UNIT).outcome is outcome


def test_a_step_without_force_is_refused_for_an_enabled_namespace() -> None:
    enabled, disabled = known(1, 0, 1), known(2, 1, 1, enabled=False)
    capacity = model(enabled, disabled)
    for one, outcome in ((enabled, Outcome.REFUSED), (disabled, Outcome.SUCCESS)):
        step = Step("destroy", one.stored.uuid, force=False)
        assert step.judge(capacity).outcome is outcome
    assert list(without(capacity, enabled.stored.uuid).namespaces) == [disabled.stored.uuid]
