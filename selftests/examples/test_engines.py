# SPDX-License-Identifier: GPL-2.0-or-later
"""The matrix on engines that labs have: Slurm, GitLab, Kubernetes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paprscm.host.process import Process
from paprscm.matrix.outcome import read_finished
from paprscm.paths import ROOT

EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
MATRIX = """\
tests = ["tests/device/test_validation.py"]
[axes.qemu]
host = {}
absent = { qemu = "/absent/qemu-system-ppc64" }
[axes.smp]
smp1 = { smp = 1 }
smp2 = { smp = 2 }
"""
LIMIT_S = 300

SLURM = """\
ClusterName=selftest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment for commands of an own Slurm with one node."""
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("needs Slurm: apt install slurm-wlm")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    controller, node = free_ports(2)
    file = folder / "slurm.conf"
    file.write_text(
        SLURM.format(
            host=socket.gethostname().split(".")[0],
            controller=controller,
            node=node,
            user=subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip(),
            folder=folder,
        )
    )
    env = {**os.environ, "SLURM_CONF": str(file), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with contextlib.ExitStack() as stack:
        for daemon in ("slurmctld", "slurmd"):
            log = stack.enter_context((folder / f"{daemon}.log").open("wb"))
            argv: list[str | Path] = [shutil.which(daemon) or daemon, "-D", "-f", file]
            process = Process(argv, env=env, stdout=log.fileno(), stderr=log.fileno())
            stack.callback(process.kill)
        limit = time.monotonic() + 60
        while "idle" not in run(["sinfo", "-h", "-o", "%T"], env):
            assert time.monotonic() < limit, (folder / "slurmd.log").read_text()
            # The daemons report nothing that could be waited for.
            time.sleep(0.5)
        yield env


def run(argv: list[str | Path], env: dict[str, str], cwd: Path = ROOT) -> str:
    result = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


@pytest.mark.guest
def test_slurm_runs_the_cells_and_merges_them(slurm: dict[str, str], tmp_path: Path) -> None:
    """A real Slurm: two cells have results, two could not be built, and all are in the grid."""
    (tmp_path / "matrix.toml").write_text(MATRIX)
    output = tmp_path / "out"
    script = EXAMPLES / "slurm/matrix.sh"
    text = run([script, tmp_path / "matrix.toml", output], slurm)
    limit = time.monotonic() + LIMIT_S
    while run(["squeue", "-h"], slurm).strip():
        assert time.monotonic() < limit, run(["squeue"], slurm) + text
        # Slurm has no command that waits for a job which depends on others.
        time.sleep(1)
    cells = {cell.outcome.cell: cell for cell in read_finished([output])}
    assert sorted(cells) == ["absent-smp1", "absent-smp2", "host-smp1", "host-smp2"]
    assert "/absent/qemu-system-ppc64" in cells["absent-smp1"].outcome.reason
    assert cells["host-smp2"].is_fine
    assert "host-smp1" in (output / "merge.log").read_text()
    assert (output / "grid.html").is_file()


def test_gitlab_pipeline_is_valid(tmp_path: Path) -> None:
    """The generated child pipeline meets GitLab's schema, and has a job for each cell."""
    file = str(EXAMPLES.relative_to(ROOT) / "matrix.toml")
    listed = subprocess.run(
        [BIN / "paprscm", "matrix", "list", "--json", file],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    script = EXAMPLES / "gitlab/pipeline.py"
    made = subprocess.run(
        [sys.executable, script, file], input=listed, capture_output=True, check=True
    ).stdout
    cells = [cell["id"] for cell in json.loads(listed)["cells"]]
    pipeline = json.loads(made)
    assert set(pipeline) == {"stages", "merge", *cells}
    (tmp_path / "cells.yml").write_bytes(made)
    schema: list[str | Path] = [BIN / "check-jsonschema", "--builtin-schema", "vendor.gitlab-ci"]
    subprocess.run([*schema, tmp_path / "cells.yml"], check=True)
    pipeline[cells[0]]["retry"] = {"max": 9}
    (tmp_path / "wrong.yml").write_text(json.dumps(pipeline))
    wrong = subprocess.run([*schema, tmp_path / "wrong.yml"], capture_output=True, check=False)
    assert wrong.returncode == 1


def test_kubernetes_job_is_valid() -> None:
    """The indexed Job meets the schema of Kubernetes, and its shards are those of the matrix."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    yaml = pytest.importorskip("ruamel.yaml")
    job = yaml.YAML(typ="safe").load((EXAMPLES / "kubernetes/matrix-job.yaml").read_text())
    validate.validate(job, "1.31", strict=True)
    spec = job["spec"]
    (command,) = spec["template"]["spec"]["containers"][0]["args"]
    assert f'--shard "$((JOB_COMPLETION_INDEX + 1))/{spec["completions"]}"' in command
    spec["completions"] = "many"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.31", strict=True)
