# SPDX-License-Identifier: GPL-2.0-or-later
"""A matrix as a TOML file: axes, values, and combinations that make no sense.

tests = ["tests/map_sync"]                 # default: the whole suite
tags = ["map_sync"]                        # default: all

[axes.kernel]                              # each value is a set of settings
"6.12" = {}
"7.2" = { kernel_source = "linux-source-7.2", kernel_suite = "sid" }

[axes.cpu]
power8 = { cpu = "POWER8" }
power9 = {}

[[exclude]]
kernel = "7.2"
cpu = ["power8"]
reason = "…"
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paprscm import settings
from paprscm.errors import ConfigError

_HINT = "docs/matrix.md describes the format"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# Without "-", which separates the values in a cell's id.
_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]*")


@dataclass(frozen=True)
class Cell:
    """One combination of values.

    Attributes:
        values: the value of each axis, by the axis's name.
        settings: the settings of all its values.
    """

    values: Mapping[str, str]
    settings: Mapping[str, str]

    @property
    def id(self) -> str:
        """Its name: the values in the order of the axes, the same in every run of the file."""
        return "-".join(self.values.values())


@dataclass(frozen=True)
class Exclusion:
    """A combination that makes no sense.

    Attributes:
        values: values of some axes; a cell with one of them on each of these axes is left out.
        reason: why, in a sentence.
    """

    values: Mapping[str, tuple[str, ...]]
    reason: str

    def covers(self, values: Mapping[str, str]) -> bool:
        """Whether it leaves out a cell with these values, which may lack some axes."""
        return all(values.get(axis) in some for axis, some in self.values.items())


@dataclass(frozen=True)
class Plan:
    """A matrix.

    Attributes:
        axes: the settings of each value, by axis and value.
        exclusions: combinations that are left out.
        tests: files or names of tests; empty: the whole suite.
        tags: as for `paprscm run -t`; empty: all tests.
    """

    axes: Mapping[str, Mapping[str, Mapping[str, str]]]
    exclusions: tuple[Exclusion, ...] = ()
    tests: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def cell(self, values: Mapping[str, str]) -> Cell:
        """The cell with these values."""
        ordered = {axis: values[axis] for axis in self.axes}
        merged: dict[str, str] = {}
        for axis, value in ordered.items():
            merged.update(self.axes[axis][value])
        return Cell(ordered, merged)

    def reason_against(self, values: Mapping[str, str]) -> str | None:
        """Why a cell with these values is left out, or None."""
        return next((one.reason for one in self.exclusions if one.covers(values)), None)

    def cells(self) -> Iterator[Cell]:
        """All cells that are not left out."""
        for combination in itertools.product(*self.axes.values()):
            values = dict(zip(self.axes, combination, strict=True))
            if self.reason_against(values) is None:
                yield self.cell(values)


def read_plan(file: Path) -> Plan:
    """Read a matrix.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong; with its place.
    """
    try:
        with file.open("rb") as source:
            document = tomllib.load(source)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the matrix {file} cannot be read: {error}") from error
    try:
        return _plan(document)
    except _WrongError as error:
        raise ConfigError(f"{file}: {error}", hint=_HINT) from None


class _WrongError(Exception):
    """What is wrong in a file."""


def _plan(document: dict[str, Any]) -> Plan:
    _expect_keys("the file", document, {"axes", "exclude", "tests", "tags"})
    axes = {name: _axis(name, value) for name, value in _table("axes", document).items()}
    if not axes:
        raise _WrongError("there are no axes")
    owners: dict[str, str] = {}
    for axis, values in axes.items():
        for name in {name for chosen in values.values() for name in chosen}:
            if owners.setdefault(name, axis) != axis:
                raise _WrongError(f"the setting {name} is on the axes {owners[name]} and {axis}")
    exclusions = document.get("exclude", [])
    if not isinstance(exclusions, list):
        raise _WrongError("exclude is not a list of tables: [[exclude]]")
    return Plan(
        axes,
        tuple(_exclusion(one, axes) for one in exclusions),
        _strings("tests", document.get("tests", [])),
        _strings("tags", document.get("tags", [])),
    )


def _axis(name: str, content: Any) -> dict[str, dict[str, str]]:
    if not _NAME.fullmatch(name):
        raise _WrongError(f"the axis {name!r} needs a name of letters, digits and _")
    values = {}
    for value, chosen in _table(name, {name: content}).items():
        if not _VALUE.fullmatch(value):
            raise _WrongError(f"the value {value!r} of {name} needs letters, digits, '.', '_', '+'")
        known = settings.names()
        table = _table(f"{name}.{value}", {f"{name}.{value}": chosen})
        if unknown := sorted(set(table) - set(known)):
            raise _WrongError(f"{name}.{value}: there is no setting {unknown[0]}")
        values[value] = {key: _text(f"{name}.{value}.{key}", one) for key, one in table.items()}
    if not values:
        raise _WrongError(f"the axis {name} has no values")
    return values


def _exclusion(content: Any, axes: Mapping[str, Mapping[str, Any]]) -> Exclusion:
    table = dict(_table("exclude", {"exclude": content}))
    reason = table.pop("reason", None)
    if not isinstance(reason, str) or not reason.strip():
        raise _WrongError("an exclude has no reason")
    _expect_keys(f"exclude ({reason})", table, set(axes))
    if not table:
        raise _WrongError(f"exclude ({reason}) names no axis")
    values = {}
    for axis, some in table.items():
        values[axis] = _strings(f"exclude.{axis}", [some] if isinstance(some, str) else some)
        if unknown := [value for value in values[axis] if value not in axes[axis]]:
            raise _WrongError(f"exclude ({reason}): {axis} has no value {unknown[0]}")
    return Exclusion(values, reason)


def _expect_keys(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(table) - known):
        raise _WrongError(f"{where} has an unknown key {unknown[0]}; known: {sorted(known)}")


def _table(name: str, parent: Mapping[str, Any]) -> Mapping[str, Any]:
    value = parent.get(name, {})
    if not isinstance(value, dict):
        raise _WrongError(f"{name} is not a table")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _WrongError(f"{name} is not a list of texts")
    return tuple(value)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float | str):
        return str(value)
    raise _WrongError(f"{name} is neither a text nor a number")
