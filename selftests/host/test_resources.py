# SPDX-License-Identifier: GPL-2.0-or-later
"""Number of concurrent tests: by CPUs and memory, or by the user's choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paprscm.host.resources import Resources, compute_budget, read_resources
from paprscm.settings import Settings

AVOCADO = str(Path(sys.executable).with_name("avocado"))
OPTION = "run.max_parallel_tasks"
TOO_MUCH = 1 << 20
"""Guest memory that no host has, MiB."""


@pytest.mark.parametrize(
    ("found", "memory_mib", "tests", "reason"),
    [
        (Resources(2, 16384), 1024, 2, "2: 1 for each of 2 CPUs; memory for 12"),
        (Resources(1, 16384), 1024, 1, "1: 1 for each of 1 CPU; memory for 12"),
        (
            Resources(0.5, 16384, cpus_from="cpu.max"),
            1024,
            1,
            "1: 1 for each of 0.5 CPUs (by the cgroup's cpu.max); memory for 12",
        ),
        (Resources(3.9, 16384), 1024, 3, "3: 1 for each of 3.9 CPUs; memory for 12"),
        (
            Resources(16, 8192),
            1024,
            6,
            "6: 8.0 GiB of memory available, of which the host keeps 0.5 GiB and a guest may take "
            "1.2 GiB; CPUs for 16",
        ),
        (Resources(16, 512 + 2 * 1224), 1024, 2, "CPUs for 16"),
        (Resources(16, 512 + 2 * 1224 - 1), 1024, 1, "CPUs for 16"),
        (Resources(16, 8192), 4096, 1, "CPUs for 16"),
    ],
)
def test_the_scarcer_decides(found: Resources, memory_mib: int, tests: int, reason: str) -> None:
    decided = compute_budget(found, Settings(memory_mib=memory_mib))
    assert (decided.tests, decided.fits) == (tests, True)
    assert decided.reason.endswith(reason)


def test_a_guest_bigger_than_the_memory() -> None:
    decided = compute_budget(
        Resources(8, 2048, memory_from="memory.max"), Settings(memory_mib=2048)
    )
    assert (decided.tests, decided.fits) == (1, False)
    assert decided.reason == (
        "1, which may not fit: 2.0 GiB of memory available (by the cgroup's memory.max), of which "
        "the host keeps 0.5 GiB and a guest may take 2.2 GiB; set memory_mib to less"
    )


MEMINFO = "MemTotal:       16384000 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"
MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 22 0:26 {top} /sys/fs/cgroup rw,nosuid,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""
GIB = 1 << 30


def machine(
    root: Path, groups: dict[str, dict[str, str]], *, own: str, top: str = "/", cpus: int = 8
) -> Resources:
    """Resources with this /proc and /sys, in the format of cgroups(7)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/mountinfo").write_text(MOUNTINFO.format(top=top))
    (root / "proc/self/cgroup").write_text(own)
    for group, files in groups.items():
        folder = root / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
        return read_resources(root)


UNLIMITED = {
    "cpu.max": "max 100000",
    "memory.max": "max",
    "memory.high": "max",
    "memory.current": str(GIB),
    "memory.stat": "anon 4096\nfile 8192",
}
SESSION = "0::/user.slice/user-1000.slice/session-2.scope\n"
SLICE = "user.slice/user-1000.slice"


def test_no_limit(tmp_path: Path) -> None:
    limits = machine(tmp_path, {SLICE: UNLIMITED, f"{SLICE}/session-2.scope": {}}, own=SESSION)
    assert limits == Resources(8, 8192)


@pytest.mark.parametrize("group", ["user.slice", SLICE, f"{SLICE}/session-2.scope"])
def test_limits_of_all_groups_above_hold(tmp_path: Path, group: str) -> None:
    limits = {
        "cpu.max": "150000 100000",
        "memory.max": str(3 * GIB),
        "memory.current": str(2 * GIB),
        # Page cache is reclaimable; memory in tmpfs, which `file` also counts, is not.
        "memory.stat": f"anon 4096\nfile {2 * GIB}\ninactive_file {GIB // 2}\nactive_file {GIB}",
    }
    groups = {f"{SLICE}/session-2.scope": UNLIMITED, SLICE: UNLIMITED, group: limits}
    total = machine(tmp_path, groups, own=SESSION)
    assert total == Resources(1.5, 2560, "cpu.max", "memory.max")


def test_limits_above_the_machine_s_resources(tmp_path: Path) -> None:
    wide = {**UNLIMITED, "cpu.max": "3200000 100000", "memory.max": str(64 * GIB)}
    assert machine(tmp_path, {"a": wide}, own="0::/a\n") == Resources(8, 8192)


def test_a_limit_that_slows_down(tmp_path: Path) -> None:
    slow = {**UNLIMITED, "memory.max": str(8 * GIB), "memory.high": str(2 * GIB)}
    total = machine(tmp_path, {"a": slow}, own="0::/a\n")
    assert (total.available_mib, total.memory_from) == (1024, "memory.high")


def test_more_used_than_allowed(tmp_path: Path) -> None:
    full = {"memory.max": str(GIB), "memory.current": str(GIB + 4096), "memory.stat": ""}
    assert machine(tmp_path, {"a": full}, own="0::/a\n").available_mib == 0


@pytest.mark.parametrize(
    ("own", "top"),
    [
        pytest.param("0::/\n", "/", id="own namespace"),
        pytest.param("0::/docker/1f2e\n", "/docker/1f2e", id="the host's namespace"),
        pytest.param("0::/docker/1f2e\n", "/docker", id="a parent is mounted"),
        pytest.param("0::/../other\n", "/", id="outside of the namespace"),
        pytest.param("0::/elsewhere\n", "/docker/1f2e", id="outside of the mount"),
        pytest.param("12:cpu:/x\n0::/\n", "/", id="together with v1"),
    ],
)
def test_container(tmp_path: Path, own: str, top: str) -> None:
    limits = {"cpu.max": "200000 100000", "memory.max": str(GIB), "memory.current": "0"}
    total = machine(tmp_path, {"": limits}, own=own, top=top)
    assert total == Resources(2, 1024, "cpu.max", "memory.max")


def test_no_cgroup_v2(tmp_path: Path) -> None:
    limits = {"cpu.max": "200000 100000", "memory.max": str(GIB), "memory.current": "0"}
    total = machine(tmp_path, {"": limits}, own="1:memory:/x\n", cpus=3)
    assert total == Resources(3, 8192)


OTHER = "from avocado import Test\nclass A(Test):\n    def test(self):\n        pass\n"
OURS = '''
from paprscm.testcase import QemuTest


class Ours(QemuTest):
    """
    :avocado: tags=device
    """

    def test(self):
        pass
'''
JOB = """
import json, pathlib, sys
from avocado.core.job import Job

common, suites = json.loads(sys.argv[1])
with Job.from_config(common, suites) as job:
    assert job.run() == 0
    found = [suite.config["run.max_parallel_tasks"] for suite in job.test_suites]
    pathlib.Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of Avocado, with a test of the suite and another one."""
    (tmp_path / "ours.py").write_text(OURS)
    (tmp_path / "other.py").write_text(OTHER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rror" not in done.stderr
    return done.stdout


def configured(*before: str) -> int:
    lines = run(*before, AVOCADO, "config").splitlines()
    (value,) = [line.split()[1] for line in lines if line.split()[:1] == [OPTION]]
    return int(value)


def suites(*, every: dict[str, object], each: list[dict[str, object]]) -> list[int]:
    """Number of concurrent tests in each suite of a job, run by Avocado's Job API."""
    common = {"run.results_dir": str(Path("results").absolute()), "core.show": ["none"], **every}
    run(sys.executable, "-c", JOB, json.dumps([common, each]))
    numbers: list[int] = json.loads(Path("found.json").read_text())
    return numbers


def test_avocado_s_default_is_the_budget(project: Path) -> None:
    assert configured() == compute_budget(read_resources(), Settings()).tests
    assert configured("taskset", "-c", str(min(os.sched_getaffinity(0)))) == 1
    (project / "avocado.cfg").write_text(f"[paprscm]\nmemory_mib = {TOO_MUCH}\n")
    assert configured() == 1


def test_a_configuration_file_overrides_the_default(project: Path) -> None:
    (project / "avocado.cfg").write_text("[run]\nmax_parallel_tasks = 7\n")
    assert configured() == 7
    (project / "other.cfg").write_text("[run]\nmax_parallel_tasks = 5\n")
    words = run(AVOCADO, "--config", "other.cfg", "config").split()
    assert words[words.index(OPTION) + 1] == "5"
    assert suites(every={}, each=[{"resolver.references": ["ours.py"]}]) == [7]


def test_a_wrong_setting_does_not_keep_avocado_from_starting(project: Path) -> None:
    (project / "avocado.cfg").write_text("[paprscm]\nmemory_mb = 1024\n")
    assert configured() == compute_budget(read_resources(), Settings()).tests


def test_the_command_line_overrides_the_file(project: Path) -> None:
    (project / "avocado.cfg").write_text("[run]\nmax_parallel_tasks = 7\n")
    run(AVOCADO, "run", "--job-results-dir", "results", "--max-parallel-tasks=3", "ours.py")
    (recorded,) = project.glob("results/job-*/jobdata/args.json")
    assert json.loads(recorded.read_text())[OPTION] == 3
    assert "Tests side by side" not in (recorded.parents[1] / "job.log").read_text()


def test_the_jobs_own_settings_count(project: Path) -> None:
    paprscm = str(Path(sys.executable).with_name("paprscm"))
    run(paprscm, "run", f"--memory-mib={TOO_MUCH}", "ours.py", "--", "--job-results-dir=results")
    (log,) = project.glob("results/job-*/job.log")
    assert "Tests side by side: 1, which may not fit" in log.read_text()


def test_each_suite_of_a_job_has_its_own_number(project: Path) -> None:
    """Other tests run with Avocado's default; an explicit choice is always kept."""
    (project / "avocado.cfg").write_text(f"[paprscm]\nmemory_mib = {TOO_MUCH}\n")
    ours: dict[str, object] = {"resolver.references": ["ours.py"]}
    other: dict[str, object] = {"resolver.references": ["other.py"]}
    cpus = os.cpu_count()
    assert cpus is not None
    assert suites(every={}, each=[ours, other, {**ours, OPTION: cpus}]) == [1, cpus, cpus]
    assert suites(every={OPTION: 4}, each=[ours]) == [4]
