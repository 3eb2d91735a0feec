# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON from a guest, taken apart so that nothing missing, unknown or of another type gets by."""

from __future__ import annotations

import errno
import json
from typing import Any, TypeVar

from paprscm.errors import HostError

_T = TypeVar("_T", int, str, bool, dict[str, Any], list[Any])


class MalformedError(ValueError):
    """What is wrong with the text, and in which field."""


def load_line(text: str) -> Fields:
    """Parse output that must be one JSON object on one line.

    Raises:
        MalformedError: it is not, or a key comes twice in an object.
    """
    line = text.removesuffix("\n")
    if not line or "\n" in line:
        raise MalformedError(f"{len(text.splitlines())} lines instead of one")
    try:
        raw = json.loads(line, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedError(f"no JSON: {error}") from error
    return Fields(raw, "report")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise MalformedError(f"a field comes twice: {sorted(key for key, _ in pairs)}")
    return fields


def _no_constant(text: str) -> None:
    raise MalformedError(f"{text} is no number")


class Fields:
    """A JSON object that is taken apart field by field until nothing is left.

    Args:
        raw: what must be an object.
        where: its name in messages.

    Raises:
        MalformedError: it is no object; so do all methods when the object is not as they say.
    """

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise MalformedError(f"{where} is no object")
        self._left: dict[str, Any] = dict(raw)
        self._where = where

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """The field `key`, which must be there: null, or a `kind`; no number is negative."""
        if key not in self._left:
            raise MalformedError(f"{self._where}.{key} is missing")
        value = self._left.pop(key)
        # Not isinstance(): True is no number here.
        if value is not None and type(value) is not kind:
            raise MalformedError(f"{self._where}.{key} is {value!r}")
        if type(value) is int and value < 0:
            raise MalformedError(f"{self._where}.{key} is negative")
        return value

    def take(self, key: str, kind: type[_T]) -> _T:
        """The field `key`, which must be a `kind`."""
        value = self.optional(key, kind)
        if value is None:
            raise MalformedError(f"{self._where}.{key} is null")
        return value

    def done(self) -> None:
        """Nothing may be left."""
        if self._left:
            raise MalformedError(f"{self._where} has unknown fields {sorted(self._left)}")

    def require(self, holds: bool, what: str) -> None:
        """Say `what` is wrong unless something `holds`."""
        if not holds:
            raise MalformedError(f"{self._where}: {what}")


class ProbeError(HostError):
    """A tool of ours did not build or run, or its report contradicts itself."""


def unbelievable(
    tool: str, error: MalformedError, stdout: str, status: int, stderr: str
) -> ProbeError:
    """What a tool in the guest printed is no report of its; the error, with what it printed.

    Args:
        tool: its name.
        error: what is wrong with the report.
        stdout, status, stderr: what it printed, and its exit status.
    """
    return ProbeError(
        f"the report of {tool} cannot be believed: {error}; status {status}, "
        f"stdout {stdout[:2000]!r}, stderr {stderr[:1000]!r}"
    )


def parse_errno(fields: Fields, key: str) -> tuple[int | None, str | None]:
    """An errno's number and name, both None where there was no error."""
    number, name = fields.optional(key, int), fields.optional(f"{key}_name", str)
    fields.require((number is None) == (name is None), f"{key} is {number}, its name {name}")
    # The generic numbers, which powerpc has too.
    known = getattr(errno, name or "", number)
    fields.require(number == known and number != 0, f"{key} {number} is not {name}")
    return number, name


def parse_path(text: str) -> str:
    """A path: each byte above 0x7f came as a lone surrogate; where they make UTF-8, as such."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
