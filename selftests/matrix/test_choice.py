# SPDX-License-Identifier: GPL-2.0-or-later
"""Cells of a matrix: their choice covers what it must, and shards divide them."""

from __future__ import annotations

import random
from pathlib import Path

import covertable
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paprscm.errors import ConfigError, HostError
from paprscm.matrix.choice import choose, coverable, covered, shard
from paprscm.matrix.plan import Exclusion, Plan, read_plan
from paprscm.paths import ROOT

Axes = dict[str, dict[str, dict[str, str]]]
EXAMPLE = ROOT / "examples/matrix.toml"


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Matrices of 2 to 5 axes, with up to 3 excluded combinations."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    axes: Axes = {f"a{n}": {f"v{v}": {} for v in range(size)} for n, size in enumerate(sizes)}
    exclusions = []
    for _ in range(draw(st.integers(0, 3))):
        names = draw(st.lists(st.sampled_from(sorted(axes)), min_size=2, max_size=3, unique=True))
        values = {name: (draw(st.sampled_from(sorted(axes[name]))),) for name in names}
        exclusions.append(Exclusion(values, "so"))
    return Plan(axes, tuple(exclusions))


@settings(deadline=None, max_examples=150)
@given(plans(), st.sampled_from([2, 3]))
def test_each_possible_combination_is_in_a_cell(plan: Plan, strength: int) -> None:
    possible = coverable(plan, min(strength, len(plan.axes)))
    cells = choose(plan, strength)
    assert covered(cells, min(strength, len(plan.axes))) == possible
    ids = [cell.id for cell in cells]
    assert len(set(ids)) == len(ids)
    assert {cell.id for cell in cells} <= {cell.id for cell in plan.cells()}
    assert [cell.id for cell in choose(plan, strength)] == ids


def test_the_example() -> None:
    plan = read_plan(EXAMPLE)
    pairs, triples = choose(plan, 2), choose(plan, 3)
    assert len(list(plan.cells())) == 4 * 2 * (4 * 3 - 1) * 3 * 2
    assert 12 <= len(pairs) <= 20
    assert len(pairs) < len(triples) < 90
    assert all("power11-host" not in cell.id for cell in triples)
    assert pairs[0].settings.keys() >= {"kernel_source"}


def test_an_incomplete_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan({"a": {"1": {}, "2": {}}, "b": {"1": {}, "2": {}}, "c": {"1": {}, "2": {}}})
    real = covertable.make
    monkeypatch.setattr(covertable, "make", lambda *a, **k: real(*a, **k)[:-1])
    with pytest.raises(HostError, match="the choice of cells lacks"):
        choose(plan, 2)


def test_an_excluded_cell_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    axes: Axes = {"a": {"1": {}, "2": {}}, "b": {"1": {}, "2": {}}, "c": {"1": {}, "2": {}}}
    real = covertable.make

    def forgetful(factors: object, strength: int, constraints: object) -> object:
        return real(factors, strength=strength)

    monkeypatch.setattr(covertable, "make", forgetful)
    with pytest.raises(HostError, match="and has"):
        choose(Plan(axes, (Exclusion({"a": ("1",), "b": ("1",)}, "so"),)), 2)


@settings(deadline=None)
@given(plans(), st.integers(1, 6), st.integers(0, 1 << 32))
def test_each_cell_is_in_one_shard(plan: Plan, count: int, seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311
    cells = list(plan.cells())
    durations = {cell.id: draw.uniform(1, 100) for cell in cells if draw.random() < 0.7}
    shards = [shard(cells, number, count, durations) for number in range(1, count + 1)]
    ids = [cell.id for some in shards for cell in some]
    assert sorted(ids) == sorted(cell.id for cell in cells)


def test_the_longest_cells_are_divided_first() -> None:
    plan = Plan({"a": {name: {} for name in ("p", "q", "r", "s")}})
    durations = {"p": 10.0, "q": 10.0, "r": 30.0, "s": 10.0}
    first, second = (shard(choose(plan, None), n, 2, durations) for n in (1, 2))
    assert [cell.id for cell in first] == ["r"]
    assert [cell.id for cell in second] == ["p", "q", "s"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes = 1", "axes is not a table"),
        ("", "there are no axes"),
        ("other = 1", "the file has an unknown key other"),
        ("[axes.a]", "the axis a has no values"),
        ("[axes.A]\nx = {}", "the axis 'A' needs a name"),
        ('[axes.a]\n"x-y" = {}', "the value 'x-y' of a needs"),
        ("[axes.a]\nx = 1", "a.x is not a table"),
        ("[axes.a]\nx = { kernal = 1 }", "a.x: there is no setting kernal"),
        ("[axes.a]\nx = { cpu = [1] }", "a.x.cpu is neither a text nor a number"),
        ("[axes.a]\nx = { smp = 1 }\n[axes.b]\ny = { smp = 2 }", "smp is on the axes a and b"),
        ("[axes.a]\nx = {}\n[[exclude]]\na = 'x'", "an exclude has no reason"),
        ("[axes.a]\nx = {}\n[[exclude]]\nreason = 'r'", "names no axis"),
        ("[axes.a]\nx = {}\n[[exclude]]\na = 'y'\nreason = 'r'", "a has no value y"),
        ("[axes.a]\nx = {}\n[[exclude]]\nb = 'y'\nreason = 'r'", "unknown key b"),
        ("exclude = 1\n[axes.a]\nx = {}", "exclude is not a list of tables"),
        ("tests = 1\n[axes.a]\nx = {}", "tests is not a list of texts"),
        ("[axes.a", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "matrix.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_plan(file)
