# SPDX-License-Identifier: GPL-2.0-or-later
"""Source of a guest tool as sent to the guest, and the key of its binary."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from paprscm.guest import tools
from paprscm.guest.report import Fields, MalformedError, Natural, read_line
from paprscm.guest.tools import TOOLS, tool_source, tools_digest
from paprscm.paths import GUEST_TOOLS


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a copy of guest_tools."""
    copy = tmp_path / "guest_tools"
    shutil.copytree(GUEST_TOOLS, copy)
    monkeypatch.setattr(tools, "_SOURCES", copy)
    return copy


@pytest.mark.parametrize("name", [*TOOLS, "fail_nth", "moved"])
def test_each_tool_uses_the_shared_header(name: str) -> None:
    text = tool_source(name)
    assert '#include "' not in text
    own = (GUEST_TOOLS / f"{name}.c").read_text()
    for shared in ("static void usage", "strtoull", "clock_gettime", '"{\\"tool', "getopt_long"):
        assert shared not in own


def test_a_change_of_the_header_is_another_tool(sources: Path) -> None:
    before = tools_digest(*TOOLS)
    with (sources / "report.h").open("a") as header:
        header.write("/* more */\n")
    assert tools_digest(*TOOLS) != before


def test_gcc_names_the_lines_of_both_files(sources: Path, tmp_path: Path) -> None:
    for name in ("report.h", "moved.c"):
        with (sources / name).open("a") as file:
            file.write(f"#warning of {name}\n")
    (tmp_path / "one.c").write_text(tool_source("moved"))
    command = ["gcc", "-fsyntax-only", str(tmp_path / "one.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("report.h", "moved.c"):
        last = len((sources / name).read_text().splitlines())
        assert f"{name}:{last}:2: warning: #warning of {name}" in done.stderr


class _Inner(Fields, frozen=True, kw_only=True):
    size: Natural
    name: str | None


class _Outer(Fields, frozen=True, kw_only=True):
    inner: _Inner


def test_a_line_is_read() -> None:
    text = '{"inner":{"size":18446744073709551615,"name":"\\udcc3\\udca9\\udcff"}}\n'
    inner = read_line(_Outer, text).inner
    assert (inner.size, inner.name) == (2**64 - 1, "é\udcff")


@pytest.mark.parametrize(
    ("inner", "what"),
    [
        ('"size":1', r"missing required field `name` - at `\$\.inner`"),
        ('"size":1,"name":null,"more":1', "unknown field `more`"),
        ('"size":null,"name":null', "got `null`"),
        ('"size":-1,"name":null', ">= 0"),
        ('"size":1.0,"name":null', "got `float`"),
        ('"size":true,"name":null', "got `bool`"),
        ('"size":"1","name":null', "got `str`"),
        ('"size":1,"name":7', "got `int`"),
        ('"size":1,"name":null,"size":1', "a key occurs twice"),
        ('"size":Infinity,"name":null', "Infinity is not a number"),
    ],
)
def test_a_malformed_line(inner: str, what: str) -> None:
    with pytest.raises(MalformedError, match=what):
        read_line(_Outer, f'{{"inner":{{{inner}}}}}\n')
