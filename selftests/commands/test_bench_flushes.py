# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bench flush`: consistent counts, and a table and a plot of the measured values."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from paprscm.commands import bench, bench_flushes, cli, flush_plot
from paprscm.commands.bench_flushes import PERCENTILES, cells_of, parse_numbers, percentile
from paprscm.commands.series import Series
from paprscm.errors import CAPABILITY_STATUS, ContractError
from paprscm.flush.load import DurableCall, FlushLoadReport
from paprscm.guest.guest import Guest
from paprscm.paths import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def made_up(rounds: int = 3, threads: tuple[int, ...] = (1, 64)) -> Series:
    """A series whose figures differ in magnitude; the middle round is the median."""
    dimms = (1, 2, 4, 8)
    names = [(t, d, f"{t} threads {d} DIMMs") for d in dimms for t in threads]
    factors = [1.0, 0.5, 3.0][:rounds]
    values = {f"{name} flushes": [60.0 * t * f for f in factors] for t, _d, name in names}
    values |= {f"{name} fdatasync": [123456.0 * f for f in factors] for _t, _d, name in names}
    details = {
        f"{name} {mark} ms": [base * d * f for f in factors]
        for _t, d, name in names
        for mark, base in zip(PERCENTILES, (16.0, 20.0, 24.0, 99.0), strict=True)
    }
    details |= {f"{name} polls": [1.25 * f for f in factors] for _t, _d, name in names}
    environment = {
        "qemu": "10.0.2 (Debian 1:10.0.2+ds-2+deb13u1+b1)",
        "kernel": "6.12.107-paprscm",
        "accel": "tcg",
    }
    axes = {"threads": list(threads), "dimms": list(dimms)}
    return Series(environment, 1.0, "1/s", values, {**axes, **details})


def test_a_percentile_is_one_of_the_values() -> None:
    hundred = [float(n) for n in range(100, 0, -1)]
    assert [percentile(hundred, p) for p in PERCENTILES.values()] == [50, 90, 99, 100]
    assert [percentile([3.0, 1.0, 2.0], p) for p in PERCENTILES.values()] == [2, 3, 3, 3]
    assert percentile([7.0], 50) == 7


def test_a_cell_has_the_medians_of_the_rounds_and_its_bound() -> None:
    cells = cells_of(made_up())
    assert [(cell.dimms, cell.threads) for cell in cells[:3]] == [(1, 1), (1, 64), (2, 1)]
    last = cells[-1]
    assert (last.flushes, last.fdatasync, last.polls) == (64 * 60, 123456, 1.25)
    assert last.latency_ms == {"p50": 128, "p90": 160, "p99": 192, "max": 792}
    # 64 threads, each of which sleeps 10 ms per flush.
    assert last.bound == 6400


def test_the_table_fits_a_terminal_and_shows_every_cell() -> None:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=80, record=True, file=nowhere)
        console.print(bench_flushes.flush_table(made_up()))
    lines = console.export_text().splitlines()
    assert "3 rounds" in lines[0]
    assert "QEMU 10.0.2 (Debian" in lines[1]
    assert "Linux 6.12.107-paprscm, tcg" in lines[1]
    assert not any("…" in line for line in lines), lines
    words = [line.split() for line in lines]
    assert words[3] == ["flushes", "bound", "p50", "p90", "p99", "max", "fdatasync"]
    assert [
        "8",
        "64",
        "3,840",
        "6,400",
        "128.0",
        "160.0",
        "192.0",
        "792.0",
        "1.25",
        "123,456",
    ] in words
    assert sum(len(row) == 10 and row[0].isdigit() for row in words) == 8


@pytest.mark.parametrize("threads", [(1, 2, 4, 8, 16, 32, 64), (2,)], ids=["many", "one"])
def test_the_plot_has_its_labels(threads: tuple[int, ...], tmp_path: Path) -> None:
    series = made_up(threads=threads)
    svg, png = tmp_path / "new" / "plot.svg", tmp_path / "plot.png"
    flush_plot.draw_plot(series, svg)
    flush_plot.draw_plot(series, png)
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = svg.read_text()
    assert ElementTree.fromstring(text).tag == f"{SVG}svg"  # noqa: S314 - our own
    # Text is drawn as outlines, so that no font is needed; a comment has the text.
    labels = (
        *("QEMU 10.0.2 (Debian", "6.12.107-paprscm, tcg", "flushes a second", "threads in the"),
        *("latency of a flush, ms", "1 DIMM", "8 DIMMs", "p50", "p99", "fdatasync", "10 ms"),
        *map(str, threads),
    )
    assert [words for words in labels if words not in text] == []
    assert "<text" not in text
    first = svg.read_bytes()
    flush_plot.draw_plot(series, svg)
    assert svg.read_bytes() == first, "the same series gives a different file"


def test_the_lines_of_the_plot_are_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    monkeypatch.setattr(
        flush_plot, "_line", lambda _axes, row, value, **_style: lines.append([*map(value, row)])
    )
    monkeypatch.setattr(
        flush_plot, "_finish", lambda axes, *_rest: axes.set_xlim(1, 64) and axes.set_ylim(1, 2)
    )
    flush_plot.draw_plot(made_up(), tmp_path / "plot.svg")
    cells = cells_of(made_up())
    rows = [cells[place : place + 2] for place in range(0, 8, 2)]
    assert lines == [
        *([c.flushes for c in row] for row in rows),
        *([c.fdatasync for c in row] for row in rows),
        [100, 6400],
        *([c.latency_ms["p50"] for c in row] for row in rows),
        *([c.latency_ms["p99"] for c in row] for row in rows),
        [10, 10],
    ]


def test_the_plot_ignores_the_user_s_matplotlib_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(name: str, **environ: str) -> bytes:
        code = (
            "import sys; from pathlib import Path; sys.path[:0] = ['selftests/commands']; "
            "from test_bench_flushes import made_up; from paprscm.commands import flush_plot; "
            "flush_plot.draw_plot(made_up(), Path(sys.argv[1]))"
        )
        words = [sys.executable, "-c", code, str(tmp_path / name)]
        subprocess.run(words, cwd=ROOT, env={**os.environ, **environ}, check=True)
        return (tmp_path / name).read_bytes()

    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\n")
    plain = drawn("plain.svg")
    assert drawn("own.svg", MATPLOTLIBRC=str(tmp_path), MPLBACKEND="tkagg") == plain


def test_other_verbs_do_not_wait_for_matplotlib() -> None:
    code = "import sys, paprscm.commands.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if it prepares a guest."""

    def prepare(*_words: object, **_options: object) -> None:
        pytest.fail("it prepares a guest")

    monkeypatch.setattr(bench, "prepare", prepare)


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--threads", "1,x"], "--threads=1,x: 'x' is not from 1 to 256", "such as 1,2,4"),
        (["--threads", "0"], "'0' is not from 1 to 256", "such as 1,2,4"),
        (["--threads", ""], "'' is not from 1 to 256", "such as 1,2,4"),
        (["--threads", "²"], "'²' is not from 1 to 256", "such as 1,2,4"),
        (["--dimms", "1,9"], "--dimms=1,9: '9' is not from 1 to 8", "such as 1,2,4"),
        (["--plot", "flush.pdf"], "--plot=flush.pdf is neither .svg nor .png", "these endings"),
        (["-n", "0"], "-n must be at least 1", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_refused_immediately(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "flush", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert hint in error
    assert len(error.splitlines()) == (2 if hint else 1)


@pytest.mark.usefixtures("unprepared")
def test_missing_matplotlib_is_reported_before_the_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert cli.main(["bench", "flush"]) == CAPABILITY_STATUS
    error = capsys.readouterr().err
    assert "matplotlib, which draws the plot, is not installed" in error
    assert "tools/setup installs it" in error


def test_numbers_are_taken_once_and_in_order() -> None:
    assert parse_numbers("--threads", "8,1,8,2", 64) == (1, 2, 8)


def test_the_host_syncs_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(b"x")
    synced = []
    real = os.fdatasync

    def fdatasync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    rate = bench_flushes.fdatasyncs(files, 3, 0.05)
    assert set(synced) == {file.stat().st_ino for file in files}
    assert 0 < rate < len(synced) / 0.05


class FakeGuest:
    """A guest with the attributes that one cell needs; two flushes of slot 0 are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, synced: int, hcalls: int) -> None:
        self.ended = 0
        counted = itertools.count(10, hcalls)
        monkeypatch.setattr(bench_flushes, "count_hcalls", lambda _guest: next(counted))
        region = SimpleNamespace(device="/sys/devices/region")
        monkeypatch.setattr(bench_flushes, "find_region", lambda _guest, _slot: region)
        counts = SimpleNamespace(counts=lambda: SimpleNamespace(ended=self.ended))
        self.vm = SimpleNamespace(syncs=lambda _slot: counts)

        def load(*_words: object, **_options: object) -> FlushLoadReport:
            self.ended += synced
            calls = tuple(
                DurableCall(thread, "deep_flush", 0, 16_000_000, 0) for thread in range(2)
            )
            return FlushLoadReport(
                tool="flush",
                version=1,
                verb="load",
                seed=0,
                threads=2,
                targets=1,
                duration_ns=500_000_000,
                calls=calls,
            )

        monkeypatch.setattr(bench_flushes, "run_flush_load", load)


def test_polls_are_the_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeGuest(monkeypatch, synced=2, hcalls=5)
    bench = bench_flushes._Bench(cast(Guest, guest), 1)
    for _cell in range(2):
        done, polls = bench.flushes(2, 1)
        assert (len(done.calls), polls) == (2, 1.5)


@pytest.mark.parametrize(("synced", "hcalls"), [(1, 4), (3, 4), (2, 1)])
def test_counts_that_differ_are_an_error(
    synced: int, hcalls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = FakeGuest(monkeypatch, synced=synced, hcalls=hcalls)
    bench = bench_flushes._Bench(cast(Guest, guest), 1)
    message = rf"2 threads 1 DIMMs: .*\[2\] flushes and \[{synced}\] syncs; .* {hcalls} hyp"
    with pytest.raises(ContractError, match=message):
        bench.flushes(2, 1)


@pytest.mark.guest
def test_bench_flush_measures_a_real_guest(tmp_path: Path) -> None:
    file, plot = tmp_path / "series.jsonl", tmp_path / "plot.png"
    words = ["--threads", "2", "--dimms", "1", "--json", "--series", str(file), "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, "-m", "paprscm.commands.cli", "bench", "flush", *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    raw = json.loads(done.stdout)
    assert raw == json.loads(file.read_text())
    assert raw.pop("summary")["2 threads 1 DIMMs flushes"]["median"] > 0
    (cell,) = cells_of(Series(**raw))
    # The driver sleeps at least 10 ms on any machine, and polls at least once after that.
    assert 0 < cell.flushes <= cell.bound == 200
    assert 10 <= cell.latency_ms["p50"] <= cell.latency_ms["p90"]
    assert cell.latency_ms["p90"] <= cell.latency_ms["p99"] <= cell.latency_ms["max"]
    assert cell.polls >= 1
    assert cell.fdatasync > 0
    assert raw["environment"]["dimm_mib"] == "256"
    assert plot.read_bytes().startswith(b"\x89PNG")
