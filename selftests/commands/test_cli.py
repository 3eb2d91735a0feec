# SPDX-License-Identifier: GPL-2.0-or-later
"""Command line: bad input gives one clear line and a hint immediately; good input works."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from paprscm.build import kbuild
from paprscm.commands.cli import main
from paprscm.commands.series import Series
from paprscm.emulator.binary import Qemu
from paprscm.guest.environment import Environment
from paprscm.host.cache import Cache
from paprscm.settings import Settings
from paprscm.vm.machine import Board, Machine, board_of


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with status 2; return its error output."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image", "--kernel", "/nonexistent"], "the kernel /nonexistent does not exist"),
        (["image", "--kernel", "/bin/true"], "is for x86-64, the guests are ppc64le"),
        (["image", "--qemu", "/nonexistent"], "qemu=/nonexistent: there is no such file"),
        (["image", "--qemu", "debian:no/suite"], "is not the name of a suite"),
        (["image", "--firmware", "uefi"], "one of vof, slof"),
        (["image", "--smp", "many"], "smp=many is not a number"),
        (["image", "--modules", "/nonexistent"], "modules= without kernel="),
        (["image", "--cache-dir", "/proc/nowhere"], "set cache_dir to a folder"),
        (["shell", "-c", "true", "--nvdimm", "size=300M"], "256M or 512M"),
        (["shell", "-c", "true", "--nvdimm", "pmen=on"], "did you mean pmem?"),
        (["shell", "-c", "true", "--nvdimm", "slot=1", "--nvdimm", "slot=1"], "two DIMMs have"),
        (["shell"], "a shell needs a terminal"),
        (["kernel", "build", "--source", "/tmp"], "is not the top of a Linux source tree"),  # noqa: S108
        (["bench", "start", "-n", "0"], "-n must be at least 1"),
        (["cache", "prune", "--days", "-1"], "--days cannot be negative"),
        (["kernel", "build", "--config", "/x"], "--config without --source"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = words if "--cache-dir" in words else [*words, "--cache-dir", str(tmp_path)]
    assert message in refused(capsys, *given)


def test_a_missing_qemu_names_the_package(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(capsys, "image", "--cache-dir", str(tmp_path / "cache"))
    assert "apt install qemu-system-ppc" in error


def test_cache_ls_and_prune(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.ensure("thing", {"a": "b"}, lambda f: (f / "x").write_text("x"))  # type: ignore[arg-type]
    with cache.workspace(kbuild.TREE, {"source": "/linux"}, purpose="builds") as objects:
        (objects / "file").write_bytes(bytes(2_000_000))
    assert main(["cache", "ls", "--cache-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "thing" in line]
    assert [line for line in lines if re.match(r"kernel-tree +\w+ +2 .*/linux", line.strip())]
    assert main(["cache", "prune", "--days", "1", "--cache-dir", str(tmp_path)]) == 0
    assert "0 entries removed" in capsys.readouterr().out
    assert main(["cache", "prune", "--days", "0", "--cache-dir", str(tmp_path)]) == 0
    assert "2 entries removed" in capsys.readouterr().out
    assert not objects.exists()
    assert main(["cache", "ls", "--cache-dir", str(tmp_path)]) == 0
    assert "thing" not in capsys.readouterr().out


def test_an_oserror_is_printed_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")

    monkeypatch.setattr(Cache, "prune", full)
    error = refused(capsys, "cache", "prune", "--cache-dir", str(tmp_path))
    assert error.startswith("paprscm: /some/file: No space left on device\n")


def test_words_after_two_dashes_are_passed_to_avocado(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _path, words: argv.extend(words))
    monkeypatch.chdir(tmp_path)
    main(["run", "--kernel", "/k", "--smp", "1", "tests/test_x.py", "--", "-t", "map_sync"])
    assert argv[1:4] == ["run", "-t", "map_sync"]
    assert argv[4:] == ["tests/test_x.py", "-p", "smp=1", "-p", "kernel=/k"]


def test_a_series_has_figures_summary_and_dimensions() -> None:
    series = Series({"qemu": "7.2"}, 1.0, "s", {"ssh": [3.0, 1.0, 2.0]})
    report = json.loads(series.as_json())
    assert report["summary"]["ssh"]["median"] == 2.0
    assert (report["values"]["ssh"], report["environment"]) == ([3.0, 1.0, 2.0], {"qemu": "7.2"})


def test_settings_make_the_board(qemu: Qemu) -> None:
    """Fields that the machine sets override the settings."""
    board = board_of(Settings(smp=1, memory_mib=768, accel="tcg"), qemu)
    assert board == Board(smp=1, memory_mib=768, cpu="POWER9", firmware="vof", accel="tcg")
    own = Machine(smp=4, cpu="POWER10").board(board)
    assert own == Board(smp=4, memory_mib=768, cpu="POWER10", firmware="vof", accel="tcg")


# A verb with a temporary folder that waits forever.
WAITS = """
import signal, sys, tempfile
from paprscm.commands import cli

# A shell without job control starts background processes with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def waits(arguments, chosen):
    with tempfile.TemporaryDirectory() as folder:
        print(folder, flush=True)
        signal.pause()

cli._doctor = waits
sys.exit(cli.main(["doctor"]))
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("nohup", [False, True])
def test_a_signal_ends_the_command_through_its_clean_up(
    number: signal.Signals, nohup: bool
) -> None:
    """SIGHUP of a terminal, SIGTERM and SIGINT end it; under nohup(1) SIGHUP does not."""
    command = subprocess.Popen(
        [*(["nohup"] if nohup else []), sys.executable, "-c", WAITS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The selftests themselves may run under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    with command, contextlib.ExitStack() as stack:
        stack.callback(command.kill)
        assert command.stdout is not None
        folder = Path(command.stdout.readline().strip())
        assert folder.is_dir()
        command.send_signal(number)
        if nohup and number is signal.SIGHUP:
            with pytest.raises(subprocess.TimeoutExpired):
                command.wait(0.5)
            command.terminate()
            number = signal.SIGTERM
        assert command.wait(30) == 128 + number
    assert not folder.exists()


def test_libraries_of_dashboards_do_not_delay_other_commands() -> None:
    code = "import sys, paprscm.commands.cli; print({'kcidb_io', 'urllib3'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.guest
def test_one_command_in_a_guest_passes_its_status_through(environment: Environment) -> None:
    del environment
    done = subprocess.run(
        [
            *(sys.executable, "-m", "paprscm.commands.cli", "shell", "--nvdimm", "pmem=on"),
            *("-c", "cat /sys/bus/nd/devices/region0/deep_flush; exit 5"),
        ],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (5, "0\n"), done.stderr
