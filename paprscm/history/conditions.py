# SPDX-License-Identifier: GPL-2.0-or-later
"""The conditions of a run, and their differences between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from paprscm.history.runs import main_environment
from paprscm.results.record import Environment, Record
from paprscm.results.text import one_line
from paprscm.settings import names

NEVER_COMPARED: Final = ("host", "settings", "parameters")
"""Conditions that must be equal: their effect is not that of a kernel or a QEMU."""
_GROUPS: Final = {
    "kernel configuration": "kernel",
    "page size": "kernel",
    "MMU": "kernel",
    "machine": "QEMU",
}
"""Conditions that change with another one."""
_LIMITS: Final = ("scratch_dir", "silence_limit_s", "boot_limit_s", "command_limit_s")
"""Settings that no other condition shows."""


def conditions(record: Record) -> dict[str, str]:
    """The conditions of a run by name; "" for one that is not known."""
    host = record.host
    words = [host.cpu, f"{host.cores} cores", host.machine, host.kernel]
    return {
        **conditions_of_test(record, main_environment(record)),
        "host": one_line(", ".join(words)),
    }


def conditions_of_test(record: Record, environment: Environment | None) -> dict[str, str]:
    """The conditions of a test by name, without the host.

    Args:
        record: of its run.
        environment: of the test.
    """
    suite = record.suite
    # The environment has the effect of settings.
    parameters = {k: v for k, v in record.job.parameters.items() if k not in names()}
    found = {
        **(_of_environment(environment) if environment else {}),
        "parameters": _pairs(parameters),
        "suite": f"{(suite.commit or suite.version)[:12]}{' modified' if suite.modified else ''}",
    }
    return {name: one_line(text) for name, text in found.items()}


def mixed(records: Sequence[Record]) -> dict[str, list[str]]:
    """The conditions that differ within a set of runs, with their values."""
    values: dict[str, list[str]] = {}
    for own in map(conditions, records):
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    return {name: sorted(set(texts)) for name, texts in values.items() if len(set(texts)) > 1}


def differences(a: Record, b: Record) -> dict[str, tuple[str, str]]:
    """The conditions that differ between two runs."""
    one, two = conditions(a), conditions(b)
    return {
        name: (one.get(name, ""), two.get(name, ""))
        for name in {**one, **two}
        if one.get(name, "") != two.get(name, "")
    }


def subjects(different: Sequence[str]) -> list[str]:
    """The causes among conditions that differ, such as "kernel" for its configuration, too."""
    return sorted({_GROUPS.get(name, name) for name in different})


def _of_environment(environment: Environment) -> dict[str, str]:
    kernel, qemu = environment.kernel, environment.qemu
    settings = {k: v for k, v in environment.settings.items() if k in _LIMITS}
    return {
        "kernel": f"{kernel.release} {(kernel.build_id or '')[:12]}" if kernel else "",
        "kernel configuration": (kernel.config_sha256 or "")[:12] if kernel else "",
        "page size": str(kernel.page_size_bytes or "") if kernel else "",
        "MMU": (kernel.mmu or "") if kernel else "",
        "QEMU": f"{qemu.version.partition(' ')[0]} {qemu.sha256[:12]}",
        "machine": environment.machine or "",
        "CPU": environment.cpu or "",
        "accelerator": environment.accel or "",
        "firmware": environment.firmware or "",
        "vCPUs": str(environment.smp or ""),
        "memory": f"{environment.memory_mib or ''}",
        "userland": environment.userland or "",
        "start of guests": "restored" if environment.snapshot else "booted",
        "settings": _pairs(settings),
    }


def _pairs(values: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(values.items()))
