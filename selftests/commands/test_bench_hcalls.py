# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bench hcalls`: rates of real hcalls; a wrong answer is an error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from paprscm import settings
from paprscm.commands import bench_hcalls, cli
from paprscm.emulator.binary import Qemu
from paprscm.errors import ContractError
from paprscm.papr import Hcall
from paprscm.paths import ROOT
from paprscm.settings import Settings


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a measurement that takes a second."""
    monkeypatch.setattr(bench_hcalls, "_CALLS", 50)
    monkeypatch.setattr(bench_hcalls, "_FLUSHES", 5)
    monkeypatch.setattr(bench_hcalls, "_PERSISTS", 1)
    return dataclasses.replace(settings.load(config=ROOT / "avocado.cfg"), scratch_dir=tmp_path)


def test_each_call_and_each_way_to_flush_has_a_rate(qemu: Qemu, chosen: Settings) -> None:
    series = bench_hcalls.measure_hcalls(qemu, chosen, 2)
    names = {call.name for call in bench_hcalls._ARGUMENTS}
    flushes = {"H_SCM_FLUSH to its end, fdatasync", "fdatasync of the same file by the host"}
    if qemu.has_pmem_override:
        flushes.add("H_SCM_FLUSH to its end, pmem_persist")
    assert set(series.values) == names | flushes
    assert {len(values) for values in series.values.values()} == {2}
    assert all(rate > 1 for values in series.values.values() for rate in values)
    assert json.loads(series.as_json())["unit"] == "1/s"
    console = Console(width=100, record=True)
    console.print(bench_hcalls.hcall_table(series))
    assert "2 rounds, QEMU" in console.export_text()


def test_a_refused_call_is_an_error(
    qemu: Qemu, chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_hcalls._ARGUMENTS, Hcall.H_SCM_HEALTH, (0x90000009,))
    with pytest.raises(ContractError, match="H_SCM_HEALTH answered H_PARAMETER"):
        bench_hcalls.measure_hcalls(qemu, chosen, 1)


def test_nothing_is_left_in_the_scratch_folder(qemu: Qemu, chosen: Settings) -> None:
    bench_hcalls.measure_hcalls(qemu, chosen, 1)
    assert list(chosen.scratch_dir.iterdir()) == []


def test_branches_of_a_folder_without_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["branches", str(tmp_path)]) == 2
    assert "is not a job's folder" in capsys.readouterr().err
