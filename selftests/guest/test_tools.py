# SPDX-License-Identifier: GPL-2.0-or-later
"""Source of a guest tool as sent to the guest, and its binary, which is compiled once."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from guest_tool import HostShell

from paprscm.errors import ContractError
from paprscm.guest import tools
from paprscm.guest.environment import Environment
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, MalformedError, Natural, ProbeError, read_line
from paprscm.guest.tools import (
    KIND,
    TOOLS,
    ToolBinaries,
    install_tool,
    run_tool,
    tool_source,
    tools_digest,
)
from paprscm.host.cache import Cache
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


INPUTS = {"userland": "a", "qemu": "b", "cpu": "c"}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostShell:
    """A shell for a "guest" that has no binaries yet, and an empty cache."""
    monkeypatch.setattr(tools, "TOOLS_FOLDER", tmp_path / "tools")
    shell = HostShell()
    shell.tools = ToolBinaries(cache=Cache(tmp_path / "cache"), inputs=INPUTS)
    return shell


def install(shell: HostShell, *, anew: bool = False) -> tuple[bytes, bool]:
    """Install `moved` in a guest without it; return the binary, and whether gcc ran."""
    shell.commands.clear()
    target = Path(install_tool(cast(Guest, shell), "moved", anew=anew))
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.stat().st_mode & 0o777 == 0o755
    binary = target.read_bytes()
    shutil.rmtree(target.parent)
    return binary, any("gcc" in command for command in shell.commands)


def test_the_second_guest_does_not_compile(shell: HostShell) -> None:
    binary, compiled = install(shell)
    assert compiled
    assert binary[:4] == b"\x7fELF"
    assert install(shell) == (binary, False)
    target = install_tool(cast(Guest, shell), "moved")
    shell.commands.clear()
    assert install_tool(cast(Guest, shell), "moved") == target
    assert shell.commands == [f"[ -x {target} ]"]


def test_the_command_that_runs_a_tool_also_places_it(shell: HostShell) -> None:
    guest = cast(Guest, shell)
    install(shell)
    shell.commands.clear()
    for commands in (2, 3):
        result = run_tool(guest, "moved", ["--no-such-option"])
        assert (result.status, result.stdout) == (2, "")
        assert "usage: moved MOVES" in result.stderr
        assert len(shell.commands) == commands


def test_a_tool_that_cannot_be_placed_is_reported(
    shell: HostShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(shell)
    (tmp_path / "file").touch()
    monkeypatch.setattr(tools, "TOOLS_FOLDER", tmp_path / "file/tools")
    with pytest.raises(ContractError, match="ended with status 71"):
        run_tool(cast(Guest, shell), "moved", [])


def test_anew_compiles_the_same_bytes(shell: HostShell) -> None:
    binary, _compiled = install(shell)
    assert install(shell, anew=True) == (binary, True)


@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs_make_another_binary(shell: HostShell, name: str) -> None:
    install(shell)
    assert shell.tools is not None
    shell.tools = dataclasses.replace(shell.tools, inputs={**INPUTS, name: "other"})
    assert install(shell)[1]


@pytest.mark.parametrize("what", ["report.h", "moved.c", "flags"])
def test_other_sources_make_another_binary(
    shell: HostShell, sources: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    install(shell)
    if what == "flags":
        monkeypatch.setattr(tools, "_GCC", "gcc -O1")
    else:
        with (sources / what).open("a") as file:
            file.write("/* more */\n")
    assert install(shell)[1]


@pytest.mark.parametrize("change", [lambda text: text[:-1], lambda text: text[:-1] + b"?"])
def test_a_damaged_binary_is_compiled_again(
    shell: HostShell, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    binary, _compiled = install(shell)
    (file,) = (tmp_path / "cache" / KIND).glob("*/moved")
    file.write_bytes(change(binary))
    assert install(shell) == (binary, True)


def test_a_foreign_binary_is_reported(shell: HostShell, tmp_path: Path) -> None:
    """A complete entry that this gcc did not make."""
    assert shell.tools is not None
    shell.tools.ensure("moved", lambda: b"foreign")
    assert install(shell) == (b"foreign", False)
    with pytest.raises(ProbeError, match="gcc made another moved in this guest"):
        install(shell, anew=True)


def test_a_failed_compilation_is_not_kept(
    shell: HostShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "_GCC", "gcc -no-such-flag")
    with pytest.raises(ProbeError, match="does not compile in the guest"):
        install(shell)
    assert Cache(tmp_path / "cache").entries() == []


@pytest.mark.guest
def test_guests_of_two_machines_have_the_same_binary(
    environment: Environment, boot: Callable[..., Guest], tmp_path: Path
) -> None:
    """Restored or not: gcc in this guest makes the bytes that earlier guests made."""
    own = environment.equipment.tools
    assert own is not None
    assert set(own.inputs) == {"userland", "qemu", "cpu"}
    guest = boot()
    path = install_tool(guest, "map_sync")
    before = guest.get(str(path))
    assert guest.get(str(install_tool(guest, "map_sync", anew=True))) == before


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
