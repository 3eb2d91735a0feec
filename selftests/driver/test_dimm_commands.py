# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of a DIMM: guest_tools/nd_ioctl.c, its report, and the oracle of its answers."""

from __future__ import annotations

import errno
import json
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from guest_tool import FOR_THE_GUEST, HostShell, compile_on_host, is_ppc64le

from paprscm.checks import differ
from paprscm.driver.dimm_commands import (
    FATAL,
    PRESET,
    Answer,
    Command,
    RaceReport,
    Reading,
    Step,
    get_data,
    health,
    inject,
    read_health,
    read_payload,
    send,
    set_data,
)
from paprscm.driver.dimm_oracle import Judge, places
from paprscm.errors import ContractError
from paprscm.guest import tools
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError, read_report
from paprscm.host.cache import Cache

# asm-generic/ioctls.h; of a regular file: its size, 4 bytes.
FIONREAD = 0x541B
AREA = bytes(range(256)) * 4
DONE = struct.pack("<i", 0)


class Checks:
    """Names of the values that differ."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.judge = Judge(self.check, [])

    def check(self, what: str, found: object, expected: object) -> None:
        if differ(found, expected):
            self.wrong.append(what)


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("nd_ioctl", tmp_path / "tool", compiler=FOR_THE_GUEST))


@pytest.mark.parametrize(
    "words",
    [
        *([], ["run"], ["walk", "/dev/null"], ["run", "--most=1", "/dev/null"], ["run", "a", "b"]),
        *(["race", "/dev/null", "8", "64"], ["race", "--most=1", "/dev/null", "8"]),
        ["race", "--most=1", "/dev/null", "8", "129"],
    ],
)
def test_a_wrong_command_line_is_refused(tmp_path: Path, words: list[str]) -> None:
    tool = compile_on_host("nd_ioctl", tmp_path / "tool")
    result = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.parametrize(
    "step",
    ["get", "get 0", "get 0g", "get 00*0", "get *2", "get 00*2x", "paint 00", "get 00*9999999"],
)
def test_a_wrong_step_is_refused(tmp_path: Path, step: str) -> None:
    tool = compile_on_host("nd_ioctl", tmp_path / "tool")
    result = subprocess.run([tool, "run", "/dev/null"], input=step.encode(), capture_output=True)
    assert result.returncode == 2


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """This machine as a guest."""
    monkeypatch.setattr(tools, "TOOLS_FOLDER", tmp_path / "tools")
    shell = HostShell()
    inputs = {"userland": "a", "qemu": "b", "cpu": "c"}
    shell.tools = tools.ToolBinaries(cache=Cache(tmp_path / "cache"), inputs=inputs)
    return cast(Guest, shell)


def test_steps_run_in_their_order(tmp_path: Path, shell: Guest) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"123456789")
    data = bytes(4) + bytes(range(90)) + b"\0" * 70000 + b"ab" + b"\xff" * 40
    size = Command("size", FIONREAD, data, range(4))
    steps: list[Step] = [
        size,
        size.guarded(),
        Reading(str(file)),
        get_data(0, 8),
        Reading("/nonexistent"),
    ]
    steps += [size.cut(3), size.cut(0)]
    first, second, text, refused, missing, *cut = send(shell, str(file), steps)
    assert first.data == struct.pack("<I", 9) + data[4:]
    assert second.data[: len(data)] == first.data
    assert [answer.is_stray for answer in (first, second, refused)] == [False] * 3
    assert text.text == "123456789"
    assert (refused.errno, refused.changed) == (errno.ENOTTY, False)
    assert [answer.errno for answer in cut] == [errno.EFAULT] * 2
    with pytest.raises(ContractError, match="ENOENT"):
        _ = missing.text
    with pytest.raises(TypeError):
        _ = missing.command
    (sealed,) = send(shell, str(file), [size], sealed=True)
    assert sealed.errno == errno.EFAULT


def test_the_device_may_be_read_only(tmp_path: Path, shell: Guest) -> None:
    folder = Reading(str(tmp_path))
    assert send(shell, str(tmp_path), [folder], read_only=True)[0].errno == errno.EISDIR
    with pytest.raises(ProbeError, match="EISDIR"):
        send(shell, str(tmp_path), [folder])


def test_report_of_a_race() -> None:
    report = {"tool": "nd_ioctl", "version": 1, "verb": "race"}
    report |= {"rounds": 9, "succeeded": 8, "foreign": ["5a00"]}
    assert read_report(RaceReport, json.dumps(report), 0).foreign == ("5a00",)
    for wrong in ({"succeeded": 10}, {"foreign": ["5a", "5a"]}, {"verb": "run"}, {"rounds": -1}):
        with pytest.raises(ProbeError):
            read_report(RaceReport, json.dumps(report | wrong), 0)


def answered(command: Command, output: bytes, *, number: int = 0, at: int | None = None) -> Answer:
    """The command with this output."""
    begin = command.output.start if at is None else at
    data = command.data[:begin] + output + command.data[begin + len(output) :]
    return Answer(command, number, data)


@pytest.mark.parametrize("status", [DONE, bytes([PRESET] * 4)])
def test_a_read_that_is_right(status: bytes) -> None:
    checks = Checks()
    checks.judge.reads([answered(get_data(5, 9).guarded(), status + AREA[5:14])], AREA)
    assert checks.wrong == []


@pytest.mark.parametrize(
    "answer",
    [
        answered(get_data(5, 9), DONE + AREA[4:13]),
        answered(get_data(5, 9), DONE + AREA[5:13] + b"\0"),
        answered(get_data(5, 9), DONE + AREA[5:13]),
        answered(get_data(5, 9).guarded(), DONE + AREA[5:15]),
        answered(get_data(5, 9), b"\1\0\0\0" + AREA[5:14]),
        answered(get_data(5, 9), DONE + AREA[5:14], number=errno.EIO),
        answered(replace(get_data(5, 9), output=range(9, 21)), DONE + AREA[5:14], at=8),
    ],
)
def test_a_read_that_is_wrong(answer: Answer) -> None:
    checks = Checks()
    checks.judge.reads([answer], AREA)
    assert checks.wrong


def test_refusals() -> None:
    beyond = get_data(1024, 4).guarded()
    unchanged = Answer(beyond, 0, beyond.data)
    refused = replace(unchanged, errno=errno.EINVAL)
    checks = Checks()
    checks.judge.refused([refused])
    checks.judge.refused([refused], errno.EINVAL, errno.ENOTTY)
    checks.judge.refused([answered(beyond, b"\7\0\0\0")])
    checks.judge.refused([unchanged, refused], silent=True)
    assert (checks.wrong, checks.judge.unreported) == ([], ["read 0x400+0x4"])
    for answer, numbers, silent in (
        (unchanged, (), False),
        (refused, (errno.EPERM,), False),
        (unchanged, (errno.EPERM,), True),
        (answered(beyond, DONE), (), True),
        (answered(beyond, b"\7", number=errno.EINVAL), (), False),
        (answered(beyond, b"\7\0\0\0" + bytes(5)), (), False),
    ):
        checks = Checks()
        checks.judge.refused([answer], *numbers, silent=silent)
        assert checks.wrong, (answer, numbers, silent)


def test_a_write_leaves_its_input() -> None:
    write = set_data(0, b"abc").guarded()
    checks = Checks()
    checks.judge.succeeded([answered(write, DONE), Answer(write, 0, write.data)])
    assert checks.wrong == []
    checks.judge.succeeded([answered(write, b"A", at=8)])
    assert checks.wrong == ["write 0x0+0x3: memory outside of its output changed"]


def pdsm(payload: bytes, *, status: int = 0, size: int = 192) -> bytes:
    """Output of a PDSM from nd_fw_size on."""
    return struct.pack("<IiHH", size, status, 0, 0) + payload.ljust(184, b"\0")


def test_health() -> None:
    command = health().build().guarded()
    found = read_health(
        answered(command, pdsm(struct.pack("<I6BHH2xQ", 2, 1, 0, 0, 0, 0, 0, FATAL, 0, 7)))
    )
    assert (found.unarmed, found.health, found.dirty_shutdowns) == (1, FATAL, 7)
    assert found.papr_flags == {"not_armed", "smart_notify"}
    for wrong in (
        answered(command, pdsm(b"", status=-22)),
        answered(command, pdsm(b"", size=8)),
        answered(command, pdsm(bytes(100) + b"secret")),
        answered(command, pdsm(b"") + b"\0"),
        answered(command, pdsm(b""), number=errno.EINVAL),
        Answer(command, 0, command.data),
    ):
        with pytest.raises(ContractError):
            read_health(wrong)


def test_an_injected_error() -> None:
    command = inject(3, fatal=True).build()
    assert command.data[72:78] == b"\3\0\0\0\1\0"
    assert len(command.data) == 64 + 2 * 192
    assert read_payload(answered(command, pdsm(b"\1")))[:4] == b"\1\0\0\0"


def test_places_are_in_the_area() -> None:
    found = places(4096, 8, random.Random(1))  # noqa: S311
    assert all(offset >= 0 and length > 0 and offset + length <= 4096 for offset, length in found)
    assert {(0, 8), (4088, 8), (1, 1), (4095, 1)} <= set(found)
