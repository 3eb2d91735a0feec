# SPDX-License-Identifier: GPL-2.0-or-later
"""An attempt distinguishes an accepted machine, a refused one, and an accident."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from paprscm.device.launch import attempt
from paprscm.emulator.binary import Qemu
from paprscm.errors import ContractError, HostError, KilledError

FDT_MAGIC = bytes.fromhex("d00dfeed")


def script(qemu: Qemu, folder: Path, text: str) -> Qemu:
    """A script in place of QEMU."""
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return dataclasses.replace(qemu, path=path, argv_prefix=(str(path),))


def test_an_accepted_machine_has_answers_and_a_tree(qemu: Qemu) -> None:
    outcome = attempt(
        qemu, ["-m", "256M"], commands=[("query-memory-devices", {}), ("no-such-command", {})]
    )
    assert (outcome.accepted, outcome.refused, outcome.text) == (True, False, "")
    assert outcome.tree is not None
    assert outcome.tree.startswith(FDT_MAGIC)
    assert outcome.returned(0) == []
    with pytest.raises(ContractError, match="no-such-command"):
        outcome.returned(1)


def test_a_refused_machine_has_a_reason_without_qemu_s_name(qemu: Qemu) -> None:
    outcome = attempt(qemu, ["-m", "256M", "-device", "spapr-nvdimm"])
    assert (outcome.accepted, outcome.refused, outcome.tree) == (False, True, None)
    assert outcome.text == "-device spapr-nvdimm: 'memdev' property must be set"
    with pytest.raises(
        ContractError, match=r"did not create the machine: exit status 1.*\n.*'memdev'"
    ):
        outcome.returned(0)


def test_machine_options_are_added(qemu: Qemu) -> None:
    assert attempt(qemu, ["-m", "256M"], machine="x-vof=nonsense").refused


@pytest.mark.parametrize(
    ("text", "status"),
    [("kill -SEGV $$", -11), ("kill -ABRT $$", -6), ("exit 1", 1), ("echo no >&2; exit 3", 3)],
)
def test_an_accident_is_neither(qemu: Qemu, tmp_path: Path, text: str, status: int) -> None:
    """A signal, another status, or a refusal without a reason."""
    outcome = attempt(script(qemu, tmp_path, text), ["-m", "256M"])
    assert (outcome.status, outcome.accepted, outcome.refused) == (status, False, False)


@pytest.mark.parametrize(
    "text", ["kill -KILL $$", "echo 'qemu: terminating on signal 15 from pid 1 (init)' >&2"]
)
def test_a_qemu_ended_from_outside_is_not_a_result(qemu: Qemu, tmp_path: Path, text: str) -> None:
    """The machine is neither accepted nor refused; after a SIGTERM QEMU's status is 0."""
    with pytest.raises(KilledError, match="from outside"):
        attempt(script(qemu, tmp_path, text), ["-m", "256M"])


def test_a_qemu_without_a_tree_has_not_accepted(qemu: Qemu, tmp_path: Path) -> None:
    assert not attempt(script(qemu, tmp_path, "cat > /dev/null"), []).accepted


def test_a_qemu_that_does_not_end_is_ended(qemu: Qemu, tmp_path: Path) -> None:
    silent = script(qemu, tmp_path, "echo stuck >&2; exec sleep 60")
    with pytest.raises(HostError, match=r"did not end within 0.3 s; it printed:\n +stuck"):
        attempt(silent, [], timeout_s=0.3)
