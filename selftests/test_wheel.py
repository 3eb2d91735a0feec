# SPDX-License-Identifier: GPL-2.0-or-later
"""The package, installed from its wheel and used in a folder that is not the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from records import example

from paprscm.paths import ROOT
from paprscm.report.site import write_site
from paprscm.results.record import encode


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without the environment of this checkout, its venv and its make."""
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PAPRSCM_RUN", "PAPRSCM_SUITE")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        words, cwd=cwd, env=environ, capture_output=True, text=True, timeout=560, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = [
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = run(sys.executable, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a venv with the wheel; a path file adds the dependencies of this venv."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    words = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    done = run(sys.executable, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for script in Path(sys.executable).parent.glob("avocado*"):
        _, _, code = script.read_text().partition("\n")
        copy = folder / "bin" / script.name
        copy.write_text(f"#!{python}\n{code}")
        copy.chmod(0o755)
    return folder / "bin"


def test_all_data_files_are_in_the_wheel(wheel: Path) -> None:
    """The wheel has each tracked file of the data folders, and no generated file."""
    folders = ("avocado.cfg", "guest_tools", "host_tools", "images", "known_issues", "tests")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("the checkout is not a git repository")
    names = zipfile.ZipFile(wheel).namelist()
    data = {name.removeprefix("paprscm/data/") for name in names if "paprscm/data/" in name}
    assert data == set(tracked.stdout.splitlines())


def test_a_site_of_a_job(bin_folder: Path, tmp_path: Path) -> None:
    """The wheel has templates and assets: the site is the same as that of the checkout."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job/record.json").write_bytes(encode(example()))
    done = run(bin_folder / "paprscm", "report", "job", "--output", "site", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    write_site([example()], tmp_path / "own")
    trees = [
        {str(f.relative_to(site)): f.read_bytes() for f in site.rglob("*") if f.is_file()}
        for site in (tmp_path / "site", tmp_path / "own")
    ]
    assert trees[0] == trees[1] and "assets/uPlot.LICENSE" in trees[0]


def test_doctor(bin_folder: Path, tmp_path: Path) -> None:
    done = run(bin_folder / "paprscm", "doctor", cwd=tmp_path)
    # Status 1: something is missing on this host, and the table says what.
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert "QEMU" in done.stdout


@pytest.mark.parametrize(
    "test",
    [
        "device/test_validation.py:Validation.test_sizes_and_labels$",
        pytest.param(
            "map_sync/test_map_sync.py:OneDimm.test_pmem_on_xfs$", marks=pytest.mark.guest
        ),
    ],
)
def test_a_test_of_the_suite(bin_folder: Path, tmp_path: Path, test: str) -> None:
    """In a folder without avocado.cfg, the suite's own settings apply."""
    (tests,) = bin_folder.parent.glob("lib/python*/site-packages/paprscm/data/tests")
    done = run(bin_folder / "paprscm", "run", "-t", test.split("/")[0], tests / test, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = (tmp_path / "results").glob("job-*")
    results = json.loads((job / "results.json").read_text())
    assert [each["status"] for each in results["tests"]] == ["PASS"]
    assert str(tests) in results["tests"][0]["name"]
    config = json.loads((job / "jobdata" / "args.json").read_text())
    assert config["task.timeout.running"] == 600
