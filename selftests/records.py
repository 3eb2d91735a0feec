# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of jobs for selftests."""

from __future__ import annotations

from typing import Any

from paprscm.results.record import (
    Environment,
    Finding,
    Host,
    Job,
    Kernel,
    Metric,
    Qemu,
    Record,
    Suite,
    Test,
    Times,
)

START = "2026-11-27T02:45:40.000+01:00"
QEMU = Qemu(
    version="10.0.13 (Debian 1:10.0.13)",
    path="/usr/bin/qemu-system-ppc64",
    setting="auto",
    sha256="ab" * 32,
    libpmem=True,
)
KERNEL = Kernel(
    release="6.12.117-paprscm",
    path="/k/vmlinux",
    source="linux-source-6.12 6.12.117-1",
    build_id="0b27d1a5",
    config_sha256="cd" * 32,
    page_size_bytes=65536,
    mmu="radix",
    fixed_sites=3,
)
GUEST = Environment(
    qemu=QEMU,
    kernel=KERNEL,
    userland="Debian bookworm",
    accel="tcg",
    cpu="POWER9",
    firmware="vof",
    machine="pseries-10.0",
    smp=2,
    memory_mib=1024,
)
BARE = Environment(qemu=QEMU)


def finding(name: str, **changes: Any) -> Finding:
    """A known issue of Linux that shows."""
    fields = {
        **{"title": f"{name} breaks", "product": "Linux", "version": "6.12.117-paprscm"},
        **{"shows": True, "found": f"{name} was seen"},
    }
    return Finding(name=name, **{**fields, **changes})


def make_test(name: str, status: Any = "PASS", duration_s: float = 1.0, **changes: Any) -> Test:
    """A test of the subject "flush" that ended after a second; its number is in the id."""
    fields: dict[str, Any] = {
        "id": f"1-tests/flush/test_x.py:X.{name}",
        "name": f"flush/test_x.py:X.{name}",
        "file": "tests/flush/test_x.py",
        "subject": "flush",
        "contract": f"The contract of {name}.",
        "environment": "guest",
        "times": Times(start=START, began_s=10.0, duration_s=duration_s),
        "command": f"avocado run tests/flush/test_x.py:X.{name}",
    }
    return Test(status=status, **{**fields, **changes})


def make_record(*tests: Test, **changes: Any) -> Record:
    """The record of a job that has ended."""
    job: dict[str, Any] = {
        **{"id": "1d2803ed", "start": START, "end": "2026-11-27T02:47:06.000+01:00"},
        **{"command": ("avocado", "run", "tests/"), "folder": "/work", "status": 0},
    }
    return Record(
        job=Job(**{**job, **changes}),
        host=Host(
            cpu="AMD EPYC",
            cores=2,
            memory_mib=24105,
            machine="x86_64",
            kernel="6.18",
            distribution="Debian 12",
        ),
        suite=Suite(version="0.1.0", commit="f" * 40, modified=False),
        environments={"guest": GUEST, "bare": BARE},
        tests=tests,
    )


def example() -> Record:
    """A job with a test of each status, hostile texts, metrics and known issues."""
    hostile = 'a \x1b[31mred\x1b[0m </testcase>]]> & "q" \x00\x08 ￾ \u202e é\nsecond line'
    return make_record(
        make_test(
            "test_pass",
            metrics=(
                Metric(name="flush_rate", value=1234.5, unit="flushes/s"),
                Metric(name="guest_start", value=0.5, unit="s", dimensions={"mark": "ready"}),
                Metric(name="guest_start", value=0.7, unit="s", dimensions={"mark": "ready"}),
            ),
            known_issues=(finding("linux-gone", shows=False, update="linux-gone is gone"),),
        ),
        make_test(
            "test_warn",
            "WARN",
            reason="known issue linux-loses-error: it was lost",
            known_issues=(
                finding("linux-loses-error", found="it was lost"),
                finding("qemu-sigbus", product="QEMU", version="10.0.13"),
            ),
        ),
        make_test("test_remark", "WARN", reason="other text than in earlier versions"),
        make_test(
            "test_fail",
            "FAIL",
            reason=f"{hostile}",
            hint="look at the console",
            logs=("test-results/4/debug.log", "test-results/4/data/guest/console.log"),
        ),
        make_test("test_error", "ERROR", reason="no disk"),
        make_test("test_cancel", "CANCEL", reason="no libpmem", hint="qemu=debian:trixie"),
        make_test("test_skip", "SKIP", reason="skipped"),
        make_test(
            "test_interrupted", "INTERRUPTED", reason="not started", times=None, environment=None
        ),
        make_test("test_bare", environment="bare", subject="hcall"),
    )
