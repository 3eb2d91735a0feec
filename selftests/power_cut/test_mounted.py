# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/mounted.c on the host, and what becomes of its report."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.channel.command import CommandResult
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError
from paprscm.power_cut import mounted
from paprscm.power_cut.images import Image
from paprscm.power_cut.mounted import MountedImages

COMPLAINT = "<3>[  1.0] EXT4-fs error (device pmem1): bad block"


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("mounted", tmp_path_factory.mktemp("mounted") / "mounted")


def run(binary: Path, *words: str) -> tuple[list[str], dict[str, Any]]:
    """Run the tool; return the lines before its report, and the report."""
    if not os.access("/dev/kmsg", os.R_OK):
        pytest.skip("/dev/kmsg cannot be read")
    done = subprocess.run([str(binary), *words], capture_output=True, text=True, check=True)
    *lines, report = done.stdout.splitlines()
    return lines, json.loads(report)


def test_a_program_sees_what_is_mounted(binary: Path, tmp_path: Path) -> None:
    script = "echo one; touch there; ls; exit 3"
    words = ("none", "tmpfs", "size=1m", str(tmp_path), "/bin/sh", "-c", f"cd {tmp_path}; {script}")
    lines, report = run(binary, *words)
    if report["mount_error"] == "EPERM":
        pytest.skip("this user cannot mount")
    assert lines == ["one", "there"]
    assert (report["mount"], report["umount"], report["status"]) == (0, 0, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_program(binary: Path, tmp_path: Path) -> None:
    words = ("none", "tmpfs", "", str(tmp_path), "/bin/sh", "-c", "kill -9 $$")
    _, report = run(binary, *words)
    if report["mount_error"] == "EPERM":
        pytest.skip("this user cannot mount")
    assert report["status"] == 128 + 9


def test_a_mount_that_fails(binary: Path, tmp_path: Path) -> None:
    lines, report = run(binary, "/nothing", "ext4", "", str(tmp_path), "/bin/echo")
    assert lines == []
    assert report["mount_error"] in ("ENOENT", "EPERM")
    assert report["status"] is None


def test_a_missing_word_is_refused(binary: Path) -> None:
    done = subprocess.run([binary, "/nothing", "ext4", "", "/"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_it_compiles_for_the_guest(tmp_path: Path) -> None:
    target = tmp_path / "mounted"
    assert is_ppc64le(compile_on_host("mounted", target, "-static", compiler=FOR_THE_GUEST))


def read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str, **report: object
) -> tuple[CommandResult | None, list[str]]:
    """The result of MountedImages for a guest whose tool prints this."""
    fields = {"tool": "mounted", "version": 1, "mount": 0, "mount_error": "", "status": 0}
    fields |= {"umount": 0, "umount_error": "", "messages": [], **report}
    text = output + json.dumps(fields) + "\n"
    monkeypatch.setattr(
        mounted, "run_tool", lambda *_: CommandResult("", 0, text, "", text.encode(), 0.0)
    )
    monkeypatch.setattr(mounted, "find_namespace", lambda *_: SimpleNamespace(path="/dev/pmem1"))
    file = tmp_path / "dimm"
    file.write_bytes(bytes(8192))
    guest = cast("Guest", SimpleNamespace(succeed=lambda _: "", file=lambda _: file))
    images = MountedImages(guest, 1, "ext4", "dax=always")
    seen = images.read(Image("newest", {(1, 1): b"x" * 4096}), ["/bin/true"])
    assert file.read_bytes() == bytes(4096) + b"x" * 4096
    return seen


def test_the_output_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, wrong = read(monkeypatch, tmp_path, "one\ntwo\n", status=7)
    assert result
    assert (result.stdout, result.status, wrong) == ("one\ntwo\n", 7, [])


def test_what_is_wrong_with_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = {"mount": 117, "mount_error": "EUCLEAN", "status": None, "messages": [COMPLAINT]}
    result, wrong = read(monkeypatch, tmp_path, "", **failed)
    assert result is None
    assert wrong == ["cannot be mounted: EUCLEAN", "EXT4-fs error (device pmem1): bad block"]
    _, wrong = read(monkeypatch, tmp_path, "", umount=16, umount_error="EBUSY")
    assert wrong == ["cannot be unmounted: EBUSY"]


def test_a_report_that_contradicts_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="mount and status disagree"):
        read(monkeypatch, tmp_path, "", mount=5, mount_error="EIO")
