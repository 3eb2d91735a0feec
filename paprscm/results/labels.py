# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of tests, metrics and environments, as dashboards want them."""

from __future__ import annotations

import re

from paprscm.results.record import Environment, Metric, Record, Test


def parts(test: Test) -> tuple[str, ...]:
    """The name in parts: subject, file, class and method, and the variant."""
    path, _, method = test.name.rpartition(":")
    words = [word.removesuffix(".py") for word in (path or test.name).split("/")]
    return (*words, *method.replace(";", ".").split(".")) if path else tuple(words)


def metric_label(metric: Metric) -> str:
    """Name and dimensions: "flush_rate load=xfs slots=2"."""
    dimensions = (f"{name}={value}" for name, value in sorted(metric.dimensions.items()))
    return " ".join((metric.name, *dimensions))


def safe(text: str) -> str:
    """The text with "-" for every character but letters, digits, "_" and "-"."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "x"


def describe(environment: Environment) -> dict[str, str]:
    """An environment as texts by name, without the parts that it does not have."""
    kernel, qemu = environment.kernel, environment.qemu
    values = {
        "kernel": kernel and kernel.release,
        "kernel_source": kernel and kernel.source,
        "kernel_build_id": kernel and kernel.build_id,
        "kernel_config_sha256": kernel and kernel.config_sha256,
        "page_size_bytes": kernel and kernel.page_size_bytes,
        "mmu": kernel and kernel.mmu,
        "qemu": qemu.version,
        "qemu_sha256": qemu.sha256,
        "libpmem": "yes" if qemu.libpmem else "no",
        "machine": environment.machine,
        "cpu": environment.cpu,
        "accel": environment.accel,
        "smp": environment.smp,
        "memory_mib": environment.memory_mib,
        "firmware": environment.firmware,
        "userland": environment.userland,
    }
    return {name: str(value) for name, value in values.items() if value}


def title(environment: Environment | None) -> str:
    """An environment in a few words."""
    if environment is None:
        return "unknown environment"
    qemu = f"QEMU {environment.qemu.version.split()[0]}"
    if environment.kernel is None:
        return f"{qemu} without a kernel"
    kernel = environment.kernel
    pages = f"{kernel.page_size_bytes // 1024}K pages" if kernel.page_size_bytes else ""
    words = (kernel.release, pages, kernel.mmu, environment.cpu, environment.accel, qemu)
    return ", ".join(word for word in words if word)


def by_environment(record: Record) -> dict[str, list[Test]]:
    """The tests by their environment's key; "" for those of an unknown one."""
    groups: dict[str, list[Test]] = {}
    keys = {id(environment): key for key, environment in record.environments.items()}
    for test in record.tests:
        environment = record.environment(test)
        groups.setdefault(keys[id(environment)] if environment else "", []).append(test)
    return groups
