# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of guest tools: one line of JSON, parsed strictly into types that declare its fields."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from paprscm.errors import HostError

Natural = Annotated[int, msgspec.Meta(ge=0)]
"""A number in a report: an integer >= 0, not a bool."""


_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """splitmix64's mixing of a number, modulo 2^64, as in guest_tools/report.h."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


class MalformedError(ValueError):
    """A field of a report is wrong; the message names it and the reason."""


class ProbeError(HostError):
    """A guest tool did not compile or run, or its report is malformed or contradicts itself."""


class Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An object in a report: it must have exactly the fields of the subclass.

    No field has a default value, so none may be missing. A subclass checks the relations between
    its fields with check_report() in __post_init__().
    """


class ToolReport(Fields, frozen=True, kw_only=True):
    """A whole report. The subclass declares `tool: Literal[NAME]`, and `verb` if there is one."""

    version: Literal[1]

    @property
    def exit_status(self) -> int:
        """Exit status of a tool that prints this report."""
        return 0


_Fields = TypeVar("_Fields", bound=Fields)
_Report = TypeVar("_Report", bound=ToolReport)


def read_report(kind: type[_Report], stdout: str, status: int, stderr: str = "") -> _Report:
    """Parse the report of a tool.

    Args:
        kind: the type that declares its fields.
        stdout: the tool's output, one line of JSON.
        status: its exit status, which must match the report.
        stderr: the tool's errors, for the message.

    Raises:
        ProbeError: the report is not of this kind, or contradicts itself or its status.
    """
    (tool,) = get_args(get_type_hints(kind)["tool"])
    with malformed_as_probe_error(tool, stdout, status, stderr):
        report = read_line(kind, stdout)
        check_report(status == report.exit_status, f"status {status}, not {report.exit_status}")
    return report


@contextmanager
def malformed_as_probe_error(tool: str, stdout: str, status: int, stderr: str) -> Iterator[None]:
    """Turn a MalformedError into a ProbeError with the tool's output."""
    try:
        yield
    except MalformedError as error:
        raise ProbeError(
            f"the report of {tool} cannot be believed: {error}; status {status}, "
            f"stdout {stdout[:2000]!r}, stderr {stderr[:1000]!r}"
        ) from error


def read_line(kind: type[_Fields], text: str) -> _Fields:
    """Parse one line that must be one JSON object.

    A byte above 0x7f in a string is encoded as a lone surrogate (guest_tools/report.h); sequences
    that form UTF-8 are decoded.

    Raises:
        MalformedError: the text is not an object of this kind, or a key occurs twice.
    """
    line = text.removesuffix("\n")
    if not line or "\n" in line:
        raise MalformedError(f"{len(text.splitlines())} lines instead of one")
    try:
        raw = json.loads(line, object_pairs_hook=_object, parse_constant=_refuse_constant)
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise MalformedError(str(error)) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedError(f"not JSON: {error}") from error


def check_report(holds: bool, what: str) -> None:
    """Raise MalformedError unless `holds`; `what` names the wrong value."""
    if not holds:
        raise MalformedError(what)


def check_errno(number: int | None, name: str | None) -> None:
    """Raise MalformedError unless an errno matches its name; without an error both are None."""
    check_report((number is None) == (name is None), f"errno is {number}, its name {name}")
    # This host's errno numbers are the generic ones, which powerpc uses, too.
    known = getattr(errno, name or "", number)
    check_report(number == known and number != 0, f"errno {number} is not {name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {key: _text(value) if isinstance(value, str) else value for key, value in pairs}
    if len(fields) != len(pairs):
        raise MalformedError(f"a key occurs twice: {sorted(key for key, _ in pairs)}")
    return fields


def _text(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _refuse_constant(text: str) -> None:
    raise MalformedError(f"{text} is not a number")
